"""Fitting to recorded traces: predictors, which are scored too, and the parameters of the trace generator.

Files in, files out. Knows no policy.
"""
