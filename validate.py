#!/usr/bin/env python3
"""Validate and compare timm checkpoints: see `python validate.py -h` and the README."""

from tweo_timm.evaluate.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
