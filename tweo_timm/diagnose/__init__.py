"""Where outliers come from, and what 8 bits would do to a model."""
