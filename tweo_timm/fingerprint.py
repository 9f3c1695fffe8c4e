"""The SHA-256 of tensors by name: what names weights, and shows that a file of them is as it was written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def checksum(tensors: Mapping[str, Tensor], record: str = "") -> str:
    """Return 64 hexadecimal digits of a text and of the names, types, shapes and values of some tensors."""
    digest = hashlib.sha256(record.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return the first 16 digits of the checksum of some tensors."""
    return checksum(tensors)[:16]
