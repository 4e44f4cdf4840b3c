"""`python -m replay +hardware=local +policy=adaptive`."""

import sys

from replay.command import cli

if __name__ == "__main__":
    sys.exit(cli())
