"""A standing attack on everything that is read: seeded mutants of every kind of input, and what became of each.

`python -m tests.attack --help` says how to run it; `tests/attack/kinds.py` is the one list that a new reader joins.
"""
