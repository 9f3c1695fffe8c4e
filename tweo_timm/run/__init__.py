"""What the commands stand on: flags, recipes, rules of settings, devices, data sets, logging."""
