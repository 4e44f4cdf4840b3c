"""Logs of what crossed between runtime and machine, and `python -m replay.lockstep`: the same decisions again."""
