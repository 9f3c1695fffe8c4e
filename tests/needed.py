"""Marks of tests that need a newer torch than the package does."""

import pytest

from tweo_timm.needs import lacking

dynamos_own = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
"""A warning of Dynamo's own, at a graph break."""


def needs(name: str) -> pytest.MarkDecorator:
    """Skip a test, with the reason, where this torch lacks what is named in `NEEDS`."""
    return pytest.mark.skipif(bool(lacking(name)), reason=lacking(name) or "it is there")
