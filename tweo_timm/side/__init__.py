"""Side networks on a frozen backbone: `Last` (arXiv:2402.04009) and `Miet` (arXiv:2406.17559), see docs/side.md."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # What type checkers read; the names are looked up when used.
    from tweo_timm.side.attention import LowRankAttention
    from tweo_timm.side.config import SideConfig
    from tweo_timm.side.last import Last
    from tweo_timm.side.miet import Miet

# Imported when first used: the settings beside them are read before there is time for torch.
_HOMES = {"Last": "last", "Miet": "miet", "LowRankAttention": "attention", "SideConfig": "config"}

__all__ = ["Last", "LowRankAttention", "Miet", "SideConfig"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
