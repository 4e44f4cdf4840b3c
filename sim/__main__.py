"""`python -m sim +hardware=a100 +policy=adaptive`."""

import sys

from sim.app import cli

if __name__ == "__main__":
    sys.exit(cli())
