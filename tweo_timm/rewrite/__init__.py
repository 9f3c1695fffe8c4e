"""Rewritings of a trained model that change its weights and not its function: its residual stream in another basis."""
