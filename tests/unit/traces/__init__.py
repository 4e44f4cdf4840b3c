"""Trace files and importers: what is written is read, and what is broken is refused."""
