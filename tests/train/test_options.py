import argparse
import inspect
import subprocess
import sys
from dataclasses import dataclass, fields, make_dataclass

import pytest
import timm.utils
import torch
from timm.data import resolve_data_config
from timm.loss import create_classification_loss, resolve_class_weights
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs

import tweo_timm
from tests.reference_flags import assert_flag_is_timms, dest_of, reference_flags
from tweo_timm import TweoConfig
from tweo_timm.config import TweoOptions
from tweo_timm.evaluate.options import ValidateOptions, parse_validate_options
from tweo_timm.fp8.recipe import Fp8Options
from tweo_timm.run.flags import CommandLine, option_table
from tweo_timm.settings import flag
from tweo_timm.side.config import SideOptions
from tweo_timm.train.groups.optimizer import SCHEDULES
from tweo_timm.train.options import TrainOptions, as_namespace, parse_train_options
from tweo_timm.train.rate import resolved_lr

TABLE = option_table(TrainOptions)
LINE = CommandLine(TrainOptions, "train.py", "")
NUMBERS = sorted(name for name, option in TABLE.items() if option.scalar in (int, float))


@pytest.mark.parametrize("row", reference_flags("train"), ids=lambda row: row["flag"])
def test_flag_has_the_name_default_and_type_of_timms_train_script(row):
    assert_flag_is_timms(row, TABLE, LINE)


def test_reference_table_is_complete():
    assert len(reference_flags("train")) == 172


def test_only_this_packages_flags_and_those_of_timm_1_0_31_go_beyond_the_reference():
    reference = {dest_of(row["flag"]) for row in reference_flags("train")}
    extra = {name for name in TABLE if name not in reference}
    ours = {name for name in extra if name.startswith(("tweo_", "fp8", "side", "config", "print_config"))}
    ours |= {"tensorboard", "outlier_interval", "stop_on_peak", "fsdp", "exif", "list_recipes"}
    ours |= {"drop_path_rule", "global_batch", "clipped_softmax"}
    timm_1_0_31 = {"task", "target_format", "multilabel_threshold", "loss", "stop_epoch", "save_epochs"}
    timm_1_0_31 |= {"lr_decay_fn", "lr_stable_timescale", "loss_class_weight", "loss_pos_weight", "class_stats"}
    timm_1_0_31 |= {"loss_weight_power", "loss_weight_beta", "loss_weight_max", "pretrained_cfg_overlay"}
    timm_1_0_31 |= {"persistent_workers", "model_ema_force_fp32", "sweep_locks", "sweep_attempt"}
    timm_1_0_31 |= {name for name in extra if name.startswith(("asl_", "poly_", "twoway_", "db_"))}
    assert extra == ours | timm_1_0_31


def test_loss_options_have_the_defaults_of_timms_loss_factory():
    parameters = inspect.signature(create_classification_loss).parameters
    shared = [name for name in TABLE if name in parameters and name.split("_")[0] in ("asl", "poly", "twoway", "db")]
    assert len(shared) == 12
    for name in shared:
        assert TABLE[name].default == parameters[name].default, name


def test_class_weight_options_have_the_defaults_of_timms_resolver():
    parameters = inspect.signature(resolve_class_weights).parameters
    for option, parameter in (("power", "power"), ("beta", "beta"), ("max", "max_weight")):
        assert TABLE[f"loss_weight_{option}"].default == parameters[parameter].default


def test_tweo_defaults_are_those_of_the_configuration_except_that_it_is_off():
    config = TweoConfig()
    for name in ("tau", "power", "schedule", "end_weight", "reduction", "start", "end"):
        assert TABLE[f"tweo_{name}"].default == getattr(config, name)
    assert TABLE["tweo_weight"].default == 0


@pytest.mark.parametrize("dest", [name for name, option in TABLE.items() if option.scalar is bool])
def test_boolean_set_in_yaml_is_switched_off_on_the_command_line_and_back(dest, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{dest}: true\naug_splits: 3\n" if TABLE[dest].flag.recorded else "")
    off, on = TABLE[dest].negative_names[0], TABLE[dest].names[0]
    assert getattr(parse_train_options(["-c", str(recipe), off]), dest) is False
    assert LINE.parse([off, on])[dest] is True


def test_flag_that_says_no_is_switched_off_by_saying_yes():
    assert TABLE["no_aug"].negative_names == ("--aug",)
    assert TABLE["no_prefetcher"].negative_names == ("--prefetcher",)
    assert TABLE["amp"].negative_names == ("--no-amp",)


def test_no_two_flags_share_a_name():
    names = [name for option in TABLE.values() for name in (*option.names, *option.negative_names)]
    assert len(names) == len(set(names))


def test_command_line_wins_over_yaml_which_wins_over_defaults(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("epochs: 10\nlr: 0.5\nmodel_kwargs: {depth: 3}\nmean: [0.1, 0.2, 0.3]\n")
    options = parse_train_options(["--epochs", "20", "-c", str(recipe), "--mean", "0.5", "--model-kwargs", "width=4"])
    assert (options.epochs, options.lr, options.momentum) == (20, 0.5, 0.9)
    assert options.mean == [0.5]
    # As in timm, the command line's mapping replaces the file's.
    assert options.model_kwargs == {"width": 4}


def test_number_set_in_yaml_is_unset_on_the_command_line(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("clip_grad: 5.0\n")
    assert parse_train_options(["-c", str(recipe), "--clip-grad", "none"]).clip_grad is None


@pytest.mark.parametrize(
    ("argv", "data_dir"),
    [
        (["/a"], "/a"),
        (["--model", "x", "/a"], "/a"),
        (["/a", "--model", "x"], "/a"),
        (["--amp", "/a", "--lr", "1"], "/a"),
        (["/a", "--data-dir", "/a"], "/a"),
        ([], None),
    ],
)
def test_positional_folder_is_the_old_form_of_data_dir(argv, data_dir):
    options = parse_train_options(argv)
    assert (options.data_dir, options.data) == (data_dir, None)


@pytest.mark.parametrize("parse", [parse_train_options, parse_validate_options])
def test_two_folders_are_refused(parse, tmp_path):
    # timm takes the first in silence.
    with pytest.raises(ValueError, match="names two folders, /a and --data-dir /b: give one"):
        parse(["/a", "--data-dir", "/b"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: /a\ndata_dir: /b\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml names two folders"):
        parse(["-c", str(recipe)])
    recipe.write_text("data: /a\n")
    assert parse(["--data-dir", "/b", "-c", str(recipe)]).data_dir == "/b"


@pytest.mark.parametrize(("text", "data_dir"), [("data: /old\ndata_dir: null\n", "/old"), ("data_dir: /old\n", "/old")])
def test_positional_folder_wins_over_yaml(text, data_dir, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert parse_train_options(["-c", str(recipe)]).data_dir == data_dir
    assert parse_train_options(["/new", "-c", str(recipe)]).data_dir == "/new"


@pytest.mark.parametrize(
    "words", [["a=1", "b=word"], ["c=[1, 2]", "d=None"], ["e=1e-3", "f='1'"], ["g=a=b", ""], ["h={'x': (1, 2)}"], []]
)
def test_mappings_parse_as_timm_parses_them_with_lists_as_tuples(words):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=timm.utils.ParseKwargs)
    expected = parser.parse_args(["--model-kwargs", *words]).model_kwargs
    expected = {key: tuple(value) if isinstance(value, list) else value for key, value in expected.items()}
    assert parse_train_options(["--model-kwargs", *words]).model_kwargs == expected


def test_torchcompile_alone_means_inductor():
    assert parse_train_options(["--torchcompile"]).torchcompile == "inductor"
    assert parse_train_options(["--torchcompile", "aot_eager"]).torchcompile == "aot_eager"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--tweo-wieght", "1"], ["--tweo-wieght", "did you mean '--tweo-weight'"]),
        (["--learning_rate=1"], ["--learning_rate=1"]),
        (["/data", "/more"], ["'/more'"]),
        (["--epochs", "many"], ["--epochs", "invalid int value: 'many'"]),
        (["--fp8", "fast"], ["--fp8", "'fast'", "emulated"]),
        (["--model-kwargs", "depth"], ["--model-kwargs", "'depth'", "name=value"]),
        (["--input-size", "224"], ["--input-size", "expected 3 arguments"]),
    ],
)
def test_bad_word_exits_with_one_line_that_names_it(argv, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_train_options(argv)
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert len(message.splitlines()) == 1
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--torchscript", ["--torchscript", "cannot be honoured", "--torchcompile"]),
        ("--fuser nvfuser", ["--fuser nvfuser", "cannot be honoured", "--torchcompile"]),
        ("--tta 3", ["--tta 3", "cannot be honoured", "--tta 0"]),
        ("--drop-connect 0.2", ["--drop-connect 0.2", "--drop-path 0.2"]),
        ("--naflex-loader --tweo-weight 0.1", ["--naflex-loader", "padding"]),
        ("--aug-splits 1", ["--aug-splits is 1", "at least 2"]),
        ("--jsd-loss", ["--jsd-loss needs --aug-splits"]),
        ("--split-bn", ["--split-bn needs --resplit", "--aug-splits"]),
        ("--loss jsd", ["--loss jsd needs --aug-splits"]),
        ("--bce-loss --loss asl", ["--bce-loss contradicts --loss asl"]),
        ("--bce-loss --jsd-loss --aug-splits 3", ["--jsd-loss contradicts --bce-loss"]),
        ("--amp --model-dtype bfloat16", ["--amp needs a float32 model", "--no-amp"]),
        ("--task multilabel --loss ce", ["--loss ce", "bce"]),
        ("--loss zlpr", ["--loss zlpr", "--task multilabel"]),
        ("--gp=", ["--gp ''", "avg"]),
        ("--batch-size 0", ["--batch-size is 0", "at least 1"]),
        ("--mixup-prob 1.5", ["--mixup-prob is 1.5", "between 0 and 1"]),
        ("--lr 0", ["--lr is 0", "above 0"]),
        ("--scale 1 0.1", ["--scale", "smaller first"]),
        ("--cutmix-minmax 0.2", ["--cutmix-minmax", "two numbers"]),
        ("--decay-milestones 90 30", ["--decay-milestones", "increasing"]),
        ("--task multilabel --loss db", ["--class-stats FILE"]),
        ("--task multilabel --loss-pos-weight neg_pos", ["neg_pos", "--class-stats FILE"]),
        ("--task multilabel --bce-pos-weight 2 --loss-pos-weight 3", ["--bce-pos-weight", "--loss-pos-weight"]),
        ("--model-ema-force-fp32", ["--model-ema-force-fp32", "--model-ema"]),
        ("--save-epochs 0", ["--save-epochs is [0]", "each must be at least 1"]),
        ("--train-batch-sizes 8", ["--train-batch-sizes has 1", "--train-img-sizes"]),
        ("--naflex-patch-size-probs 1", ["--naflex-patch-size-probs has 1", "--naflex-patch-sizes"]),
        ("--tweo-weight -1", ["--tweo-weight is -1", "between 0 and", "0.01 in the paper"]),
        ("--tweo-tau 0", ["--tweo-tau is 0", "between 0.001 and", "3 in the paper"]),
        ("--tweo-power 1", ["--tweo-power is 1", "above 1"]),
        (
            "--tweo-schedule linear --tweo-start 0.5 --tweo-end 0.5",
            ["--tweo-start is 0.5", "below the end of the window"],
        ),
        ("--tweo-end-weight 0.1", ["--tweo-end-weight is 0.1", "constant schedule", "cosine"]),
        ("--stop-on-peak 0", ["--stop-on-peak is 0"]),
        ("--stop-on-peak 9 --outlier-interval 0", ["--stop-on-peak needs statistics", "--outlier-interval"]),
        ("--fp8-exclude head ( ", ["--fp8-exclude is '('", "a regular expression"]),
        ("--tweo-blocks *", ["--tweo-blocks '*'", "no regular expression"]),
        ("--naflex-loader", ["--naflex-loader cannot be honoured", "--img-size"]),
        ("--num-classes 0", ["--num-classes 0 leaves nothing to learn", "classes of the data"]),
        ("--fp8-health-interval 5", ["--fp8-health-interval 5", "--fp8 auto"]),
        ("--fp8-format e4m3 --fp8-exclude head", ["--fp8-format, --fp8-exclude does nothing", "--fp8 auto"]),
        (
            "--fp8 emulated --kd-model-name vit_tiny_patch16_224 --kd-distill-type feature",
            ["--kd-distill-type feature"],
        ),
        ("--mixup 0.2 --mixup-mode half --no-prefetcher", ["--mixup-mode half", "--no-prefetcher"]),
        ("--aug-splits 3 --no-prefetcher", ["--aug-splits 3", "--no-prefetcher"]),
        ("--fp8-amax-history 0", ["--fp8-amax-history is 0", "between 1 and"]),
    ],
)
def test_setting_that_cannot_be_honoured_is_refused_with_the_remedy(argv, words):
    with pytest.raises(ValueError, match=r"\w") as refused:
        parse_train_options(argv.split())
    assert all(word in str(refused.value) for word in words), refused.value


def test_settings_that_depend_on_others_change_only_where_not_given():
    assert parse_train_options(["--sched", "wsd"]).decay_epochs is None
    assert parse_train_options(["--sched", "wsd", "--decay-epochs", "30"]).decay_epochs == 30
    assert parse_train_options([]).decay_epochs == 90
    multilabel = parse_train_options(["--task", "multilabel"])
    assert (multilabel.smoothing, multilabel.eval_metric) == (0, "map")
    assert parse_train_options(["--task", "multilabel", "--smoothing", "0.2"]).smoothing == 0.2


@pytest.mark.parametrize(
    ("argv", "global_batch", "expected"),
    [
        ("--lr 0.3 --opt adamw", 4096, 0.3),
        ("--opt sgd --lr-base 0.1", 1024, 0.4),
        ("--opt adamw --lr-base 1e-3", 1024, 2e-3),
        ("--opt lamb --lr-base 1e-3", 1024, 2e-3),
        ("--opt AdaBelief --lr-base 1e-3", 64, 5e-4),
        ("--opt adamw --lr-base 5e-4 --lr-base-size 512 --lr-base-scale linear", 1024, 1e-3),
        ("--opt sgd --lr-base 0.1 --lr-base-scale sqrt", 1024, 0.2),
    ],
)
def test_learning_rate_follows_timms_rule(argv, global_batch, expected):
    assert resolved_lr(parse_train_options(argv.split()), global_batch) == pytest.approx(expected, rel=1e-12)


def test_learning_rate_needs_a_batch():
    with pytest.raises(ValueError, match="global_batch is 0"):
        resolved_lr(TrainOptions(), 0)


def test_namespace_feeds_timms_own_functions():
    words = "--opt adamw --lr 0.01 --opt-betas 0.8 0.9 --opt-eps 1e-6 --img-size 64 --mean 0.1 0.2 0.3 --crop-pct 0.5"
    args = as_namespace(parse_train_options(words.split()))
    optimizer = create_optimizer_v2(torch.nn.Linear(2, 2), **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    assert tuple(optimizer.defaults["betas"]) == (0.8, 0.9)
    assert optimizer.defaults["eps"] == 1e-6
    config = resolve_data_config(vars(args))
    assert (config["input_size"], config["mean"], config["crop_pct"]) == ((3, 64, 64), (0.1, 0.2, 0.3), 0.5)


@pytest.mark.filterwarnings("ignore:.*[Pp]lateau.*")
@pytest.mark.parametrize("sched", SCHEDULES)
def test_every_schedule_is_one_of_timms(sched):
    args = as_namespace(parse_train_options(["--sched", sched, "--epochs", "4", "--warmup-epochs", "1", "--lr", "0.1"]))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=2)
    assert (scheduler is None) == (sched == "none")
    assert epochs >= 4


def test_namespace_shares_nothing_with_the_options():
    options = TrainOptions(model_kwargs={"depth": 3})
    args = as_namespace(options)
    args.model_kwargs["depth"] = 4
    args.scale.append(2.0)
    assert options.model_kwargs == {"depth": 3}
    assert options.scale == [0.08, 1.0]
    assert set(vars(args)) == set(TABLE)


def test_help_is_grouped_and_needs_neither_torch_nor_timm():
    # The package is entered without its __init__, which is free to import torch.
    code = f"""
import sys, types
package = types.ModuleType("tweo_timm")
package.__path__ = {list(tweo_timm.__path__)!r}
sys.modules.update(tweo_timm=package, torch=None, timm=None)
from tweo_timm.train.options import parse_train_options
parse_train_options(["-h"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for words in ("Dataset:", "TWEO: the penalty", "FP8 training:", "--amp, --no-amp", "(default: 300)", "--dr F"):
        assert words in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 120


def test_annotation_that_is_no_flag_is_refused():
    class Group:
        """Group."""

    options = make_dataclass("Options", [("when", complex, flag(1j, "Never."))], bases=(Group,))
    with pytest.raises(TypeError, match=r"when: .*complex.* is no type of a flag"):
        option_table(options)


@pytest.mark.parametrize("options", [TrainOptions, ValidateOptions])
def test_every_field_is_a_flag_and_every_flag_a_field(options):
    assert set(option_table(options)) == {item.name for item in fields(options)} - {"given"}


def test_a_group_inherited_through_a_command_s_own_group_keeps_its_flags():
    @dataclass(frozen=True)
    class Shared:
        """Data."""

        data_dir: str = flag("", "Folder.")

    @dataclass(frozen=True)
    class Own(Shared):
        """Data."""

        train_split: str = flag("train", "Split.")

    @dataclass(frozen=True)
    class Options(Own):
        """All."""

    assert list(option_table(Options)) == ["data_dir", "train_split"]


@pytest.mark.parametrize("options", [TrainOptions, ValidateOptions])
def test_every_number_has_bounds_or_is_checked_by_the_settings_of_its_component(options):
    checked = {item.name for item in (*fields(TweoOptions), *fields(Fp8Options), *fields(SideOptions))}
    numbers = {name for name, option in option_table(options).items() if option.scalar in (int, float)}
    free = {name for name in numbers - checked if option_table(options)[name].flag.bounds is None}
    assert not free


@pytest.mark.parametrize("name", NUMBERS)
def test_minus_three_is_refused_or_means_something(name):
    meaningful = {"mean", "head_init_scale", "head_init_bias"}
    flag_name = f"--{name.replace('_', '-')}"
    words = [TABLE[name].names[0], *["-3"] * (TABLE[name].flag.nargs or 1)]
    if name in meaningful:
        parse_train_options(words)
    else:
        with pytest.raises(ValueError, match=flag_name):
            parse_train_options(words)
