"""Flags that several commands have: declared here once, and inherited by the options of each command.

Source: timm's training and validation scripts, 1.0.29 to 1.0.31, for what is timm's.
"""

from __future__ import annotations

from dataclasses import dataclass

from tweo_timm.settings import flag


@dataclass(frozen=True)
class ConfigOptions:
    """Configuration."""

    config: str = flag(
        "",
        "YAML recipe, or any args.yaml that timm wrote; flags override it.",
        "-c",
        "--config",
        metavar="FILE",
        recorded=False,
    )
    config_unknown: str = flag(
        "error", "What an unknown key of --config is.", choices=("error", "warn"), recorded=False
    )
    print_config: bool = flag(False, "Print the resolved run as YAML and exit.", recorded=False)
