"""The command line: `expertune train`, `eval`, `generate`, `merge`, `export`, `audit`, `doctor`, `bench`, ..."""
