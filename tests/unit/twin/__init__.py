"""Twins, on tiny ones made here: 2 to 4 layers of 8 experts, 16 wide, a few steps on a text of this repository."""
