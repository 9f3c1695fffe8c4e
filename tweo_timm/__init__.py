"""TWEO for timm: transformers without extreme outliers, FP8 training and INT8 deployment."""

from tweo_timm.blocks import find_blocks
from tweo_timm.loss import TweoConfig, tweo_loss
from tweo_timm.outliers import record_outliers
from tweo_timm.task import attach_tweo
from tweo_timm.version import __version__

__all__ = ["TweoConfig", "__version__", "attach_tweo", "find_blocks", "record_outliers", "tweo_loss"]
