"""python -m tweo_timm.rewrite: the command tweo-repair."""

from tweo_timm.repair.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
