"""Fitting predictors to recorded traces, and scoring them: files in, files out. Knows no policy."""
