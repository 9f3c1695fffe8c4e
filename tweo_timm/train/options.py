"""The settings of one training run: every flag of timm's train.py under timm's names, and this package's own.

``TrainOptions`` is the one place where a setting has a name, a type and a default. Command line and YAML become a
``TrainOptions`` once, at the edge (precedence: command line, then YAML, then defaults); below it nothing parses.
Settings that cannot be honoured are refused with a reason, never ignored.

Source: timm's training script, 1.0.29 to 1.0.31. Imports neither torch nor timm, so that ``-h`` is quick.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tweo_timm.run.flags import CommandLine, as_namespace, freeze, option_table
from tweo_timm.run.recipe import naming, require_switches, resolve
from tweo_timm.run.rules import option_name
from tweo_timm.settings import Decides
from tweo_timm.train.checks import check_train_options
from tweo_timm.train.groups import TrainSettings

__all__ = ["TrainOptions", "as_namespace", "parse_train_options"]

_DESCRIPTION = (
    "Train a timm model, with or without TWEO, in FP8 or not. Every flag of timm's train.py means the same here."
)


@dataclass(frozen=True)
class TrainOptions(TrainSettings):
    """The settings of one training run, one field per flag.

    Fields that belong to one invocation rather than to the run (``config``, ``config_unknown``, ``print_config``,
    ``local_rank``) are neither compared nor written to args.yaml.

    Raises:
        ValueError: a setting is out of range, contradicts another, or cannot be honoured.
    """

    def __post_init__(self) -> None:
        # `data` is the old positional form of data_dir: one field below this line.
        if self.data:
            object.__setattr__(self, "data_dir", self.data_dir or self.data)
        object.__setattr__(self, "data", None)
        for name in ("model_kwargs", "opt_kwargs", "pretrained_cfg_overlay"):
            object.__setattr__(self, name, freeze(getattr(self, name)))
        check_train_options(self)


def parse_train_options(argv: Sequence[str] | None = None, prog: str = "train.py") -> TrainOptions:
    """Read the command line, and the YAML file it names, into settings.

    Args:
        argv: The words after the program's name; None: those of this process.
        prog: The program's name in messages.

    Returns:
        The settings, each from the command line, else from YAML, else the default. Three defaults depend on other
        settings and apply only where neither says otherwise: ``decay_epochs`` is None under the wsd and rsqrt
        schedules; ``smoothing`` is 0 and ``eval_metric`` is map for multi-label targets.

    Raises:
        SystemExit: for ``-h`` (status 0), or a word argparse does not accept (status 2), with a message.
        ValueError: the YAML file or the combination of settings is wrong; the message names key, value and remedy.
    """
    given = CommandLine(TrainOptions, prog, _DESCRIPTION).parse(argv)
    values, recipe = resolve(TrainOptions, given)
    require_switches(recipe, values)
    with naming(recipe, given):
        options = TrainOptions(**_dependent_defaults(values))
    _refuse_idle_fp8(options, given)
    return options


def _refuse_idle_fp8(options: TrainOptions, given: Mapping[str, Any]) -> None:
    """Refuse flags about FP8 where it is off. A file may hold them: by `--fp8 off` the command line overrules it."""
    idle = [option_name(name) for name in given if name.startswith("fp8_")]
    if idle and options.fp8 == "off":
        raise ValueError(f"{', '.join(idle)} does nothing with --fp8 off; give --fp8 auto too, or leave it out")


def _dependent_defaults(explicit: dict[str, Any]) -> dict[str, Any]:
    defaults: dict[str, Any] = {}
    if explicit.get("sched") in ("wsd", "rsqrt"):
        defaults["decay_epochs"] = None
    if explicit.get("task") == "multilabel":
        defaults.update(smoothing=0.0, eval_metric="map")
    return {**defaults, **explicit}


def changed_settings(before: Mapping[str, Any], options: TrainOptions) -> str:
    """Say which settings are not those of an earlier run: 'lr 0.1, now 0.2; ...'; empty if all that both know are.

    Args:
        before: the earlier run's settings; empty if they are not known.
        options: today's. What is written and where, and how the run is continued, are no settings of it.
    """
    now, elsewhere = vars(as_namespace(options)), (Decides.RECORDS, Decides.PROCESS)
    deciding = [name for name, option in option_table(TrainOptions).items() if option.decides not in elsewhere]
    known = [name for name in deciding if name in before]
    return "; ".join(f"{name} {before[name]}, now {now[name]}" for name in known if before[name] != now[name])
