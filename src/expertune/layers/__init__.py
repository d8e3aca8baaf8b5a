"""Between the kernels and the models: how experts and adapters are stored, and blocks built from them."""
