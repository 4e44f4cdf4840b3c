"""The command line, end to end: input that must be refused, runs, sweeps, every file of `conf/`."""
