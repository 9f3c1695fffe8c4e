"""The validation command: measurements, comparison, plots."""
