"""Predicted against measured: the only place where a replay meets a simulated machine."""
