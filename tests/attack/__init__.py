"""Damaged files, bad configurations and hostile parts: what must be refused in one line, and never do harm."""
