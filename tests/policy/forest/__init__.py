"""The forest predictor and the transitions: features, fitting, scores."""
