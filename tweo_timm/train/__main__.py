"""python -m tweo_timm.train: the training command."""

from tweo_timm.train.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
