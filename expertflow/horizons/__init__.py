"""Horizons: which distances are predicted, how far ahead? One file each."""
