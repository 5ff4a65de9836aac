"""Changes that make a model cheaper: one file a technique, the recipe grammar, and the order they compose in."""
