"""Policies and references against theorems: bounds, oracles, recorded predictions."""
