"""`python -m qdefense` is the `qdefense` script."""

from qdefense.cli import main

main()
