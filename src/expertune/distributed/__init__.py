"""Several processes as one: device mesh, tokens moved to their experts, sharding, saving (docs/distributed.md)."""
