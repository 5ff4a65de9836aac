"""What runs on a device: artifact, back ends, predictor and bench. NumPy and the back end only, never torch."""
