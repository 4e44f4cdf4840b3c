"""The history network, its training and rounding, the predictor and the parts that listen to it."""
