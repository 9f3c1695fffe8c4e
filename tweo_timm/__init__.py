"""TWEO for timm: transformers without extreme outliers, FP8 training and INT8 deployment."""

from tweo_timm.loss import TweoConfig, tweo_loss
from tweo_timm.version import __version__

__all__ = ["TweoConfig", "__version__", "tweo_loss"]
