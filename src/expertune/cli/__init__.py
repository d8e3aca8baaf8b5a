"""The command line: `expertune train`, `eval`, `generate`, `merge`, `doctor`, `bench`, `tune`, `config`."""
