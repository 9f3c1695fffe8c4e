"""The training command: options, recipes, loop, checkpoints."""
