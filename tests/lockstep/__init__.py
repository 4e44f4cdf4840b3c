"""Logs of runs, and whether a fresh policy decides by them as the logged one did."""
