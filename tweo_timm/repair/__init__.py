"""tweo-repair: a trained checkpoint in, the same model without outliers in its residual stream out."""
