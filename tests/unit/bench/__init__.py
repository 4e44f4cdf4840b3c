"""The stopwatches: what they count and compare. How fast anything is, no test says."""
