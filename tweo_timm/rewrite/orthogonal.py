"""Orthogonal matrices that fix the all-ones direction: the changes of basis that a LayerNorm does not notice.

For row vectors x and an orthogonal Q with Q 1 = 1, the mean of x Q is that of x, and so is its variance: LayerNorm(x Q)
is LayerNorm(x) Q. Such a Q is any rotation of the other width - 1 dimensions.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def random_orthogonal(width: int, generator: torch.Generator) -> Tensor:
    """Draw a Q that fixes ones, uniformly (Haar), by QR in float64.

    The same seed gives the same Q on one machine; QR depends on LAPACK and on the number of threads.

    Returns:
        (width, width) float64 with Q 1 = 1.
    """
    gaussian = torch.randn(width - 1, width - 1, dtype=torch.float64, generator=generator)
    rest, triangle = torch.linalg.qr(gaussian)
    return _beside_ones(rest * triangle.diagonal().sign())


def hadamard_orthogonal(width: int, generator: torch.Generator) -> Tensor:
    """Draw a Q that fixes ones and spreads every channel as evenly as signs can.

    F' S F with a transform F whose first row is constant (Walsh-Hadamard for the power of two in the width, a cosine
    transform for what is left) and random signs S, that of the constant being +1; channels are shuffled before and
    after.

    Returns:
        (width, width) float64 with Q 1 = 1.
    """
    transform = _transform(width)
    signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
    signs[0] = 1.0
    matrix = transform.T @ (signs[:, None] * transform)
    before, after = torch.randperm(width, generator=generator), torch.randperm(width, generator=generator)
    return matrix[before][:, after]


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """Return the orthogonal matrix that fixes ones nearest to a matrix that nearly is one, in float64."""
    reflection = _reflection(len(matrix))
    rest = (reflection @ matrix.double() @ reflection)[1:, 1:]
    left, _, right = torch.linalg.svd(rest)
    return _beside_ones(left @ right)


def turn(tensor: Tensor, rotation: Tensor, axis: int, copies: int = 1) -> Tensor:
    """Multiply a tensor by Q along one of its axes, or along each of several copies of the channels on it."""
    last = tensor.movedim(axis, -1)
    turned = last.reshape(*last.shape[:-1], copies, len(rotation)) @ rotation
    return turned.reshape(last.shape).movedim(-1, axis)


def digest(rotation: Tensor) -> str:
    """The first 16 digits of the SHA-256 of Q in float32."""
    return hashlib.sha256(rotation.float().contiguous().numpy().tobytes()).hexdigest()[:16]


def _beside_ones(rest: Tensor) -> Tensor:
    """The Q that fixes ones and acts as `rest` on the other dimensions."""
    reflection = _reflection(len(rest) + 1)
    whole = torch.eye(len(rest) + 1, dtype=torch.float64)
    whole[1:, 1:] = rest
    return reflection @ whole @ reflection


def _reflection(width: int) -> Tensor:
    """Householder's reflection that exchanges the first axis and the direction of ones."""
    normal = torch.full((width,), -1 / math.sqrt(width), dtype=torch.float64)
    normal[0] += 1
    length = normal.square().sum()
    return torch.eye(width, dtype=torch.float64) - (2 / length if length > 0 else 0.0) * torch.outer(normal, normal)


def _transform(width: int) -> Tensor:
    """An orthogonal matrix whose first row is constant."""
    odd = width
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while odd % 2 == 0:
        odd //= 2
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / math.sqrt(2)
    index = torch.arange(odd, dtype=torch.float64)
    cosine = torch.cos(math.pi / odd * index[:, None] * (index[None, :] + 0.5)) * math.sqrt(2 / odd)
    cosine[0] = 1 / math.sqrt(odd)
    return torch.kron(matrix, cosine)
