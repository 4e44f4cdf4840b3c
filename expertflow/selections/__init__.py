"""Selections: which of the predicted experts are wanted? One file each."""
