"""Training: ``fit``, a loop to read from top to bottom, and the methods that plug into it."""
