"""A checkpoint file that cannot be read: why not.

Files are read as plain tensors and values (torch's weights_only), which runs no code of theirs. One that holds objects
of other code, a numpy scalar or a path say, is whole and still not read.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def why_unreadable(path: Path, error: Exception) -> str:
    """Say why reading a checkpoint failed: which objects of other code it holds, or that it is damaged."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            strange = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # torch raises whatever the damage looks like
        strange = []
    if not strange:
        return f"checkpoint {path} is truncated or no checkpoint ({type(error).__name__})"
    return (
        f"checkpoint {path} holds objects of other code ({', '.join(sorted(strange)[:3])}), which are not loaded. If "
        "you trust it: read it with torch.load(FILE, weights_only=False), and save its state_dict, arch and args again"
    )
