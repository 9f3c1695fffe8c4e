import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.reference_flags import dest_of, reference_flags
from tweo_timm.run.flags import Option, option_table
from tweo_timm.run.legacy import modernize
from tweo_timm.run.recipe import RecipeError, dump_options, load_recipe
from tweo_timm.train.options import TrainOptions, parse_train_options

ARGS = Path(__file__).parents[1] / "golden" / "args_yaml"
TABLE = option_table(TrainOptions)


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "recipe.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def parsed(path: str, *flags: str) -> TrainOptions:
    return parse_train_options(["-c", path, *flags])


# --- Files that timm and others wrote --------------------------------------------------------------------------------

# What each file must come out as, old names and strings included.
EXPECTED: dict[str, dict[str, Any]] = {
    "timm_2020_efficientnet": {
        "data_dir": "/data/imagenet",
        "opt": "rmsproptf",
        "drop_path": 0.2,
        "drop_connect": None,
        "validation_batch_size": 768,
        "eval_metric": "top1",
        "decay_epochs": 2.4,
        "amp": True,
    },
    "timm_2020_augmix": {
        "jsd_loss": True,
        "aug_splits": 3,
        "split_bn": True,
        "amp": True,
        "bn_eps": 1e-3,
        "bn_momentum": pytest.approx(0.01),
        "dist_bn": "",
        "validation_batch_size": None,
    },
    "timm_2021_deit": {
        "amp": True,
        "jsd_loss": False,
        "model": "deit_small_patch16_224",
        "mixup": 0.8,
        "opt_eps": 1e-8,
    },
    "timm_2022_resnet_a1": {"amp": True, "bce_loss": True, "aug_repeats": 3, "data_dir": "/imagenet", "opt": "lamb"},
    "timm_2023_vit": {
        "lr": None,
        "lr_base": 5e-4,
        "lr_base_scale": "linear",
        "amp_dtype": "bfloat16",
        "clip_grad": 1.0,
    },
    "timm_2024_convnext": {"opt_kwargs": {"caution": True}, "color_jitter": None, "wandb_tags": ["a", "b"]},
    "timm_2026_full": {"train_img_sizes": [160, 192, 224], "kd_distill_type": "token", "device": "cuda:0"},
    "timm_2026_defaults": {
        **{"eval_metric": "top1", "target_format": None, "smoothing": 0.1, "decay_epochs": None},
        **{"loss": "bce", "loss_pos_weight": "2.0", "bce_pos_weight": 2.0, "persistent_workers": False},
    },
    "timm_2026_multilabel": {
        **{"task": "multilabel", "loss": "asl", "save_epochs": [10, 20], "decay_epochs": None},
        **{"eval_metric": "map", "target_format": None, "persistent_workers": False},
    },
    "hub_train_hparams_vit": {"input_size": [3, 256, 256], "bce_target_thresh": 0.2, "epochs": 300, "lr": 4e-3},
    "hub_train_args_swin": {
        "lr": 1e-3,
        "epochs": 300,
        "opt_betas": [0.9, 0.999],
        "opt_kwargs": {"fused": True, "weight_decay_scale": 0.1},
        "scale": [0.08, 1.0],
        "output": "",
        "model_kwargs": {},
    },
    "checkpoint_args": {"device": "cuda", "local_rank": 0, "opt": "lamb", "amp": True},
    "tweo_timm_run": {
        "tweo_weight": 0.01,
        "tweo_schedule": "cosine",
        "fp8": "emulated",
        "fp8_exclude": ["head", "patch_embed"],
        "model_kwargs": {"window_size": (7, 7), "name": "x"},
    },
}


def test_every_sample_is_expected():
    assert {path.stem for path in ARGS.glob("*.yaml")} == set(EXPECTED)
    assert len(EXPECTED) == 13


def test_yaml_merges_are_read_and_overridden(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("opt_kwargs: &shared {eps: 1.0e-6, amsgrad: true}\nmodel_kwargs: {<<: *shared, eps: 1.0e-5}\n")
    assert load_recipe(path, TrainOptions).values["model_kwargs"] == {"eps": 1e-5, "amsgrad": True}


@pytest.mark.parametrize("name", EXPECTED)
def test_args_yaml_of_any_age_loads_unchanged(name):
    options = parsed(str(ARGS / f"{name}.yaml"))
    assert {key: getattr(options, key) for key in EXPECTED[name]} == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_values_of_unchanged_names_arrive_as_they_were_written(name):
    path = ARGS / f"{name}.yaml"
    options = parsed(str(path))
    old = {"eval_metric", "device", "drop_connect", "drop_path", "bn_eps", "bn_momentum", "amp", "jsd_loss", "data_dir"}
    old |= {"persistent_workers"}
    for key, value in yaml.safe_load(path.read_text()).items():
        simple = isinstance(value, bool | int | float | str) and not (isinstance(value, str) and value[:1].isdigit())
        if key in TABLE and key not in old | {"data"} and simple:
            assert getattr(options, key) == value, key


def test_retired_names_are_listed_in_one_line(caplog):
    with caplog.at_level(logging.INFO):
        parsed(str(ARGS / "timm_2020_efficientnet.yaml"))
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    message = record.getMessage()
    for words in ("timm_2020_efficientnet.yaml", "drop_connect -> drop_path", "ignored", "apex_amp", "num_gpu"):
        assert words in message


def test_todays_file_says_nothing(caplog, write):
    with caplog.at_level(logging.INFO):
        parsed(write(dump_options(TrainOptions(data_dir="/d", resume="auto"))))
    assert caplog.records == []


@pytest.mark.parametrize("key", ["resume: /old/last.pth.tar", "start_epoch: 7", "wandb_resume_id: abc"])
def test_file_that_continues_another_run_says_so(key, caplog, write):
    parsed(write(f"{key}\n"))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert key.replace(": ", "=") in record.getMessage()


def test_state_of_the_process_that_wrote_the_file_does_not_enter_the_run(write):
    options = parsed(write("local_rank: 3\nrank: 3\nworld_size: 8\ndistributed: true\ndevice: cuda:3\n"))
    assert (options.local_rank, options.device) == (0, "cuda")
    # Without start-up's traces the device is what somebody asked for.
    assert parsed(write("device: cuda:3\n")).device == "cuda:3"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"jsd": True, "jsd_loss": True}, {"jsd_loss": True}),
        ({"drop_connect": 0.2, "drop_path": 0.1}, {"drop_path": 0.1}),
        ({"drop_connect": 0.2, "drop_path": None}, {"drop_path": 0.2}),
        ({"native_amp": True, "amp": False}, {"amp": True}),
        ({"bn_tf": True, "bn_eps": 1.0}, {"bn_eps": 1.0, "bn_momentum": pytest.approx(0.01)}),
        ({"validation_batch_size_multiplier": 3, "batch_size": 8}, {"batch_size": 8, "validation_batch_size": 24}),
        (
            {"validation_batch_size_multiplier": 3, "batch_size": 8, "validation_batch_size": 5},
            {"batch_size": 8, "validation_batch_size": 5},
        ),
        ({"mixup_elem": True}, {"mixup_mode": "elem"}),
        ({"eval_metric": "prec5"}, {"eval_metric": "top5"}),
    ],
)
def test_old_name_is_read_as_todays_unless_that_is_set(values, expected):
    assert modernize(values, TABLE).values == expected


def test_key_that_one_command_knows_and_another_has_retired_stays_for_the_first():
    assert modernize({"num_gpu": 1}, {"num_gpu"}).values == {"num_gpu": 1}
    assert modernize({"num_gpu": 1}, TABLE).ignored == ["num_gpu"]


# --- Files that must fail --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epocs: 3\n", ["'epocs'", "'epochs'", "--config-unknown warn"]),
        ("weight-decay: 0.1\n", ["'weight-decay'", "did you mean 'weight_decay'"]),
        ("qqqqqqq: 1\n", ["'qqqqqqq'", "no known key is near"]),
        ("epochs: many\n", ["epochs = 'many'", "an integer"]),
        ("epochs: 2.5\n", ["epochs = 2.5", "an integer"]),
        ("epochs: null\n", ["epochs = None", "an integer", "default, 300"]),
        ("amp: yes please\n", ["amp = 'yes please'", "true or false"]),
        ("amp: 1\n", ["amp = 1", "true or false"]),
        ("lr: true\n", ["lr = True", "a number or null"]),
        ("lr: .nan\n", ["lr = nan", "a number"]),
        ("lr: [0.1]\n", ["lr = [0.1]", "a number"]),
        ("model: 50\n", ["model = 50", "a string", "quote it: '50'"]),
        ("opt_betas: 0.9\n", ["opt_betas = 0.9", "a list of numbers", "[0.9]"]),
        ("opt_betas: [0.9, high]\n", ["opt_betas", "a list of numbers"]),
        ("input_size: [224, 224]\n", ["input_size", "a list of 3 integers", "got 2"]),
        ("model_kwargs: [1]\n", ["model_kwargs = [1]", "a mapping"]),
        ("model_kwargs: {1: 2}\n", ["model_kwargs", "a mapping of names"]),
        ("mixup_mode: bacth\n", ["mixup_mode = 'bacth'", "did you mean 'batch'"]),
        ("fp8: fast\n", ["fp8 = 'fast'", "'emulated'"]),
        ("sched: true\n", ["sched = True", "'cosine'"]),
        ("torchscript: true\n", ["--torchscript cannot be honoured", "--torchcompile"]),
        ("tta: 3\n", ["--tta 3 cannot be honoured", "--tta 0"]),
        ("tweo: {wieght: 0.1}\n", ["'wieght'", "'tweo'", "did you mean 'weight'"]),
        ("tweo: 0.01\n", ["tweo = 0.01", "a block such as {weight: 0.01}"]),
        ("tweo: {tau: 4}\n", ["'tweo'", "leaves TWEO off", "weight: 0.01"]),
        ("fp8: {format: e4m3}\n", ["'fp8'", "leaves FP8 off", "backend: auto"]),
        ("fp8: {backend: auto, formta: e4m3}\n", ["'formta'", "did you mean 'format'"]),
        ("tweo: {weight: 0.1}\ntweo_weight: 0.2\n", ["tweo_weight is given twice", "remove one"]),
        ("lr: 0.1\nmodel: a\nlr: 0.2\n", ["'lr' is given twice", "line 3"]),
        ("tweo: {tau: 1, tau: 2}\n", ["'tau' is given twice"]),
        ("- lr\n", ["holds list", "epochs: 300"]),
        ("lr: [0.1\n", ["not valid YAML", "line"]),
        ("x: !!python/object:os.system {}\n", ["not valid YAML"]),
        ("extends: missing.yaml\n", ["cannot read the recipe", "missing.yaml"]),
        ("extends: recip.yaml\n", ["recip.yaml", "does not exist; did you mean 'recipe.yaml'"]),
        ("extends: recipe.yaml\n", ["'extends' goes in a circle", "recipe.yaml -> recipe.yaml"]),
        ("extends: [a.yaml]\n", ["extends = ['a.yaml']", "one YAML file"]),
    ],
)
def test_broken_recipe_names_key_value_and_remedy(text, words, write):
    path = write(text)
    with pytest.raises(ValueError, match=r"\w") as refused:
        parsed(path)
    message = str(refused.value)
    assert all(word in message for word in words), message
    # What contradicts itself is said in terms of flags; everything else names the file.
    assert isinstance(refused.value, RecipeError) == (not message.startswith("--"))
    if isinstance(refused.value, RecipeError):
        assert "recipe.yaml" in message or "missing.yaml" in message


def test_missing_recipe_is_named():
    with pytest.raises(RecipeError, match=r"cannot read the recipe 'nowhere\.yaml'"):
        parsed("nowhere.yaml")


def test_unknown_keys_are_left_out_with_one_warning_where_asked(write, caplog):
    options = parsed(write("epocs: 3\nlr: 0.5\nnew_flag: 1\n"), "--config-unknown", "warn")
    assert options.lr == 0.5
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "epocs, new_flag" in record.getMessage()


# --- What a recipe may say beyond timm -------------------------------------------------------------------------------


def test_blocks_stand_for_the_flags(write):
    tweo = "tweo: {weight: 1e-2, schedule: cosine, end_weight: 1e-4, blocks: stages}\n"
    fp8 = "fp8: {backend: native, format: e4m3}\n"
    flags = "--tweo-weight 0.01 --tweo-schedule cosine --tweo-end-weight 1e-4 --tweo-blocks stages"
    flags += " --fp8 native --fp8-format e4m3"
    assert parsed(write(tweo + fp8)) == parse_train_options(flags.split())


def test_switch_of_a_block_may_come_from_the_command_line(write):
    assert parsed(write("tweo: {tau: 4}\n"), "--tweo-weight", "0.1").tweo_tau == 4


@pytest.mark.parametrize("text", ["fp8: off\n", "fp8: 'off'\n", "fp8: {backend: off}\n"])
def test_off_means_off_though_yaml_reads_it_as_false(text, write):
    assert parsed(write(text)).fp8 == "off"


def test_recipe_extends_another_relative_to_itself(write):
    write("lr: 0.1\nepochs: 10\ntweo: {weight: 0.5, tau: 2}\nmodel_kwargs: {a: 1}\n", "base/base.yaml")
    write("extends: ../base/base.yaml\nepochs: 20\ntweo: {tau: 4}\n", "middle/middle.yaml")
    options = parsed(write("extends: middle/middle.yaml\nmodel_kwargs: {b: 2}\n"))
    assert (options.lr, options.epochs, options.tweo_weight, options.tweo_tau) == (0.1, 20, 0.5, 4)
    assert options.model_kwargs == {"b": 2}


def test_circle_over_two_files_is_refused(write):
    write("extends: recipe.yaml\n", "other.yaml")
    with pytest.raises(RecipeError, match=r"recipe\.yaml -> other\.yaml -> recipe\.yaml"):
        parsed(write("extends: other.yaml\n"))


def test_empty_recipe_changes_nothing(write):
    assert parsed(write("# nothing yet\n")) == TrainOptions()


def test_exponents_without_a_dot_are_numbers_everywhere(write):
    text = (
        "lr: 5e-4\nepochs: 3E2\nmean: [5e-1, 0.5, +5e-1]\nmodel_kwargs: {a: 1e-5, b: [1e-5], c: {d: 1e-5}, e: x1e-5}\n"
    )
    options = parsed(write(text))
    assert (options.lr, options.epochs, options.mean) == (5e-4, 300, [0.5, 0.5, 0.5])
    assert options.model_kwargs == {"a": 1e-5, "b": (1e-5,), "c": {"d": 1e-5}, "e": "x1e-5"}


# --- Round trip ------------------------------------------------------------------------------------------------------

NUMBERS = {int: st.integers(1, 2**40), float: st.floats(1e-9, 1.0), bool: st.booleans(), str: st.text(max_size=8)}
KWARGS = st.dictionaries(
    st.text(st.characters(codec="ascii", categories=["Ll"]), min_size=1, max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.just("gelu"),
        lambda inner: st.lists(inner, max_size=3).map(tuple),
        max_leaves=4,
    ),
    max_size=3,
)
# Patterns must compile, and the folder's old name is folded into the new one.
FIXED = ("tweo_blocks", "fp8_exclude", "data")


def values_of(option: Option) -> st.SearchStrategy[Any]:
    scalar = st.sampled_from(tuple(option.flag.choices)) if option.flag.choices else NUMBERS[option.scalar]
    if option.is_mapping:
        return KWARGS
    count = option.flag.nargs if isinstance(option.flag.nargs, int) else None
    value = st.lists(scalar, min_size=count or 1, max_size=count or 3) if option.is_list else scalar
    return st.none() | value if option.optional else value


RECORDED = [option for option in TABLE.values() if option.flag.recorded and option.dest not in FIXED]


@settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_is_written_loads_as_equal_settings(data, tmp_path):
    chosen = data.draw(st.lists(st.sampled_from(RECORDED), max_size=6, unique_by=lambda option: option.dest))
    values = {option.dest: data.draw(values_of(option), label=option.dest) for option in chosen}
    try:
        options = TrainOptions(**values)
    except ValueError:
        assume(False)
    path = tmp_path / "args.yaml"
    path.write_text(dump_options(options), encoding="utf-8")
    assert TrainOptions(**load_recipe(path, TrainOptions).values) == options
    assert parsed(str(path)) == options


def test_written_file_holds_plain_values_under_timms_names():
    written = yaml.safe_load(dump_options(TrainOptions(model_kwargs={"window_size": (7, 7)})))
    reference = {dest_of(row["flag"]) for row in reference_flags("train")}
    assert reference - set(written) == {"local_rank"}
    assert written["model_kwargs"] == {"window_size": [7, 7]}
    assert list(written) == sorted(written)
    assert not {"config", "print_config", "config_unknown"} & set(written)
