#!/usr/bin/env python3
"""Train a timm model with TWEO: see `python train.py -h` and the README."""

from tweo_timm.train.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
