"""`python -m expertune` is the command line."""

from expertune.cli.main import main

main()
