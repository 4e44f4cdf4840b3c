"""Studies: their files, estimates and verdicts."""
