"""Predictors: how likely is each expert of a later layer? One file each."""
