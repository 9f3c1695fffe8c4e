"""The penalty in the trainers of other packages: each file imports its package, and nothing here imports them."""
