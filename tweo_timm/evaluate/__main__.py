"""python -m tweo_timm.evaluate: the validation command."""

from tweo_timm.evaluate.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
