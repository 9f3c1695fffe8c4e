"""The flags of the training command, one group a file; :mod:`tweo_timm.train.options` puts them together."""
