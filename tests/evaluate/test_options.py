import subprocess
import sys

import pytest

import tweo_timm
from tests.reference_flags import assert_flag_is_timms, dest_of, reference_flags
from tweo_timm.evaluate.options import ValidateOptions, as_namespace, parse_validate_options
from tweo_timm.run.flags import CommandLine, option_table
from tweo_timm.run.recipe import RecipeError, dump_options

TABLE = option_table(ValidateOptions)
LINE = CommandLine(ValidateOptions, "validate.py", "")


@pytest.mark.parametrize("row", reference_flags("validate"), ids=lambda row: row["flag"])
def test_flag_has_the_name_default_and_type_of_timms_validate_script(row):
    assert_flag_is_timms(row, TABLE, LINE)


def test_reference_table_is_complete():
    assert len(reference_flags("validate")) == 57


def test_only_this_packages_flags_and_those_of_timm_1_0_31_go_beyond_the_reference():
    reference = {dest_of(row["flag"]) for row in reference_flags("validate")}
    ours = "config config_unknown print_config report quantize calibration_images calibration_split stethoscope "
    ours += "colinearity colinearity_block colinearity_channel fp8_readiness sites export compare_reports tweo_blocks"
    ours += " group zero_outliers side_backbone export_input export_dtype onnx survey survey_sizes max_drop"
    ours += " calibration clipped_softmax"
    ours += " exif bn_eps pretrained_cfg_overlay"  # timm's train.py has these, whose checkpoints are validated
    assert set(TABLE) - reference == {*ours.split(), "task", "target_format", "multilabel_threshold"}


@pytest.mark.parametrize("dest", [name for name, option in TABLE.items() if option.scalar is bool])
def test_boolean_set_in_yaml_is_switched_off_on_the_command_line_and_back(dest, tmp_path):
    recipe = tmp_path / "validate.yaml"
    recipe.write_text(f"{dest}: true\n" if TABLE[dest].flag.recorded else "")
    off, on = TABLE[dest].negative_names[0], TABLE[dest].names[0]
    assert getattr(parse_validate_options(["-c", str(recipe), off]), dest) is False
    assert LINE.parse([off, on])[dest] is True


def test_several_checkpoints_schemes_and_reports_are_lists():
    words = "--checkpoint a.pth b.pth --quantize w8a8-tt w8a8-tt+res --compare-reports x.json y.json -m vit /data"
    options = parse_validate_options(words.split())
    assert options.checkpoint == ["a.pth", "b.pth"]
    assert options.quantize == ["w8a8-tt", "w8a8-tt+res"]
    assert options.compare_reports == ["x.json", "y.json"]
    assert (options.model, options.data_dir, options.data) == ("vit", "/data", None)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--torchscript", ["--torchscript cannot be honoured", "--torchcompile"]),
        ("--survey --quantize w8a8-tt --calibration percentile:99.9", ["a survey calibrates by absmax"]),
        ("--fuser te", ["--fuser te cannot be honoured"]),
        ("--aot-autograd", ["--aot-autograd cannot be honoured", "--torchcompile aot_eager"]),
        ("--num-gpu 2", ["--num-gpu 2 cannot be honoured", "--num-gpu 1"]),
        ("--naflex-loader", ["--naflex-loader cannot be honoured", "padding"]),
        ("--calibration percentile:99.99", ["--calibration percentile:99.99 does nothing without --quantize"]),
        ("--export-input uint8", ["--export-input uint8 does nothing without --export onnx"]),
        ("--amp --model-dtype float16", ["--amp needs a float32 model"]),
        ("--colinearity-block blocks.3", ["--colinearity-block", "--colinearity"]),
        ("--colinearity-channel 3", ["--colinearity-channel", "--colinearity"]),
        ("--calibration-images 0", ["--calibration-images is 0", "at least 1"]),
        ("--crop-pct 1.5", ["--crop-pct is 1.5", "above 0 and at most 1"]),
        ("--tweo-blocks (", ["--tweo-blocks '('", "no regular expression"]),
    ],
)
def test_setting_that_cannot_be_honoured_is_refused_with_the_remedy(argv, words):
    with pytest.raises(ValueError, match=r"\w") as refused:
        parse_validate_options(argv.split())
    assert all(word in str(refused.value) for word in words), refused.value


def test_settings_round_trip_through_yaml(tmp_path):
    words = "--checkpoint a.pth --quantize w8a8-tt --model-kwargs depth=2 sizes=(1,2) --mean 0.5 0.5 0.5 --num-gpu 1"
    options = parse_validate_options(words.split())
    path = tmp_path / "validate.yaml"
    path.write_text(dump_options(options))
    assert parse_validate_options(["-c", str(path)]) == options
    assert vars(as_namespace(options))["model_kwargs"] == {"depth": 2, "sizes": (1, 2)}


def test_unknown_key_in_a_validation_file_names_the_nearest(tmp_path):
    path = tmp_path / "validate.yaml"
    path.write_text("fp8_readines: true\n")
    with pytest.raises(RecipeError, match="did you mean 'fp8_readiness'"):
        parse_validate_options(["-c", str(path)])


def test_help_is_grouped_and_needs_neither_torch_nor_timm():
    code = f"""
import sys, types
package = types.ModuleType("tweo_timm")
package.__path__ = {list(tweo_timm.__path__)!r}
sys.modules.update(tweo_timm=package, torch=None, timm=None)
from tweo_timm.evaluate.options import parse_validate_options
parse_validate_options(["-h"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for words in ("Outliers, quantization, diagnosis:", "--checkpoint FILE [FILE ...]", "--amp, --no-amp"):
        assert words in result.stdout
