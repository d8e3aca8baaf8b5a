"""Pure functions on tensors: no Transformers, no PEFT, no configuration, no environment."""
