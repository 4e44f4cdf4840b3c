"""Routing traces: read, checked, written, imported, recorded, generated; and what is fitted to them."""

import os
import sys

# The package beside this one, not what bears its name in the current folder: from then on it finds them all.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import expertflow  # noqa: F401 - behind the line that says where it is

del sys.path[0]
