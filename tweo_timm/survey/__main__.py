"""python -m tweo_timm.survey: the command tweo-survey."""

from tweo_timm.evaluate.zoo_cli import main

if __name__ == "__main__":
    raise SystemExit(main())
