"""validate.py against timm's own parts, and against itself under other conditions."""

import argparse
import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.utils import accuracy

from tests.evaluate.conftest import ARCH, KWARGS, make_model, save_checkpoint
from tweo_timm import record_outliers
from tweo_timm.evaluate.cli import main


def run(capsys, *words):
    """Run the command and return its status, its --result and what it said on stderr."""
    status = main([str(word) for word in words])
    out, err = capsys.readouterr()
    result = json.loads(out.split("--result\n")[1]) if "--result\n" in out else None
    return status, result, err


@pytest.fixture
def common(photos):
    return ["--data-dir", photos, "--device", "cpu", "-j", "0", "-b", "4"]


def timm_batch(model, photos, size):
    """The whole validation split as timm's own loader prepares it for a model."""
    config = resolve_data_config({"input_size": (3, size, size), "crop_pct": 1.0}, model=model)
    dataset = create_dataset("", root=str(photos), split="validation")
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    loader = create_loader(
        dataset, batch_size=21, num_workers=0, device=torch.device("cpu"), **{key: config[key] for key in keys}
    )
    return next(iter(loader))


def timm_top1(path, photos, size=32):
    """Top-1 as timm's own parts compute it, with no knowledge of this package."""
    model = timm.create_model(ARCH, num_classes=3, checkpoint_path=str(path), **KWARGS).eval()
    model.set_input_size(img_size=(size, size))
    images, targets = timm_batch(model, photos, size)
    with torch.no_grad(), record_outliers(model) as record:
        output = model(images)
    return float(accuracy(output, targets)[0]), record.summary()


def test_top1_and_peak_equal_timms_own_parts(capsys, checkpoints, common, photos):
    status, result, _ = run(capsys, "--checkpoint", checkpoints[0], *common)
    top1, summary = timm_top1(checkpoints[0], photos)
    assert status == 0
    assert result["top1"] == pytest.approx(top1, abs=1e-4)
    assert result["peak_abs"] == pytest.approx(summary["peak_abs"], rel=1e-6)
    assert result["model"] == ARCH


def test_report_holds_what_it_promises(capsys, checkpoints, common, tmp_path):
    status, _, _ = run(capsys, "--checkpoint", *checkpoints, *common, "--report", tmp_path / "report")
    assert status == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["schema"] == 1
    first, second = report["checkpoints"]
    assert (first["name"], second["name"]) == ("base", "tweo")
    promised = {
        "name",
        "arch",
        "top1",
        "top5",
        "loss",
        "peak_abs",
        "peak_block",
        "blocks",
        "training_peak_abs",
        "quantized",
    }
    assert promised <= first.keys()
    assert {"name", "peak_abs", "mean_abs", "kurtosis", "peak_token", "peak_channel"} <= first["blocks"][0].keys()
    assert [block["name"] for block in first["blocks"]] == ["blocks.0", "blocks.1"]
    assert first["training_peak_abs"] == 70.5
    assert first["training"] == [{"epoch": 0, "peak_abs": 5.0}, {"epoch": 1, "peak_abs": 70.5}]
    assert second["training_peak_abs"] is None
    assert first["peak_abs"] == max(block["peak_abs"] for block in first["blocks"])
    files = {path.name for path in (tmp_path / "report").iterdir()}
    pictures = {"peak_per_block.png", "training_peak.png", "histogram.png"}
    assert files == {"report.json", "report.md", "report.csv"} | pictures
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert "| base |" in markdown
    assert "McNemar" in markdown


def measured(tmp_path, name):
    record = json.loads((tmp_path / name / "report.json").read_text())["checkpoints"][0]
    numbers = {key: record[key] for key in ("top1", "top5", "loss", "peak_abs")}
    for block in record["blocks"]:
        numbers |= {f"{block['name']}.{key}": block[key] for key in ("peak_abs", "mean_abs", "kurtosis", "p999_abs")}
    return numbers, record["correct"]


def test_results_do_not_depend_on_batch_size_or_workers(capsys, checkpoints, photos, tmp_path):
    for name, loading in (("a", ("-j", "0", "-b", "21")), ("b", ("-j", "0", "-b", "4")), ("c", ("-j", "2", "-b", "8"))):
        words = ["--checkpoint", checkpoints[0], "--data-dir", photos, "--device", "cpu", *loading]
        assert run(capsys, *words, "--report", tmp_path / name)[0] == 0
    reference, correct = measured(tmp_path, "a")
    for name in ("b", "c"):
        numbers, theirs = measured(tmp_path, name)
        assert theirs == correct
        assert numbers == pytest.approx(reference, rel=1e-6)


def test_checkpoint_of_another_architecture_is_refused_by_name(capsys, checkpoints, common):
    status, _, err = run(capsys, "--checkpoint", checkpoints[0], "--model", "swin_tiny_patch4_window7_224", *common)
    assert status == 1
    assert ARCH in err
    assert "leave out --model" in err
    assert "Traceback" not in err


def test_weights_that_do_not_fit_are_refused(capsys, common, tmp_path):
    wrong = save_checkpoint(tmp_path / "x" / "last.pth.tar", make_model(0, depth=3))
    status, _, err = run(capsys, "--checkpoint", wrong, *common)
    assert status == 1
    assert "do not fit" in err


@pytest.mark.parametrize("damage", ["truncate", "text", "missing"])
def test_damaged_and_missing_checkpoints_are_named(capsys, checkpoints, common, tmp_path, damage):
    path = tmp_path / "broken.pth.tar"
    if damage == "truncate":
        path.write_bytes(checkpoints[0].read_bytes()[:2000])
    elif damage == "text":
        path.write_text("not a checkpoint")
    status, _, err = run(capsys, "--checkpoint", path, *common)
    assert status == 1
    assert "broken.pth.tar" in err
    assert "Traceback" not in err


def test_ema_weights_are_used_when_asked_for_and_missing_ones_are_an_error(capsys, common, tmp_path, checkpoints):
    ema = make_model(5)
    path = save_checkpoint(tmp_path / "ema" / "last.pth.tar", make_model(0), state_dict_ema=ema.state_dict())
    plain = save_checkpoint(tmp_path / "plain" / "last.pth.tar", ema)
    assert (
        run(capsys, "--checkpoint", path, "--use-ema", *common)[1]["peak_abs"]
        == (run(capsys, "--checkpoint", plain, *common)[1]["peak_abs"])
    )
    status, _, err = run(capsys, "--checkpoint", checkpoints[0], "--use-ema", *common)
    assert status == 1
    assert "no EMA weights" in err


def test_class_count_mismatch_says_both_numbers(capsys, common, tmp_path, photos, checkpoints):
    data = tmp_path / "two"
    shutil.copytree(photos, data)
    shutil.rmtree(data / "validation" / "cat")
    status, _, err = run(capsys, "--checkpoint", checkpoints[0], "--data-dir", data, "--device", "cpu", "-j", "0")
    assert status == 1
    assert "2 classes" in err
    assert "3" in err


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_is_named(capsys, tmp_path, photos, checkpoints, workers):
    data = tmp_path / "damaged"
    shutil.copytree(photos, data)
    (data / "validation" / "bee" / "3.png").write_bytes(b"no image")
    words = ["--data-dir", data, "--device", "cpu", "-j", workers, "-b", "4"]
    status, _, err = run(capsys, "--checkpoint", checkpoints[0], *words)
    assert status == 1
    assert "3.png" in err
    assert "Traceback" not in err


def test_a_misspelt_checkpoint_or_model_is_told_what_was_meant(capsys, checkpoints, photos):
    common = ["--data-dir", photos, "--device", "cpu"]
    status, _, err = run(capsys, "--checkpoint", checkpoints[0].with_name("lats.pth.tar"), *common)
    assert status == 1
    assert "does not exist" in err
    assert "did you mean 'last.pth.tar'" in err
    status, _, err = run(capsys, "--model", "vit_smal_patch16_224", *common)
    assert status == 1
    assert "did you mean 'vit_small_patch16_224'" in err


def test_missing_data_folder_is_one_clear_line(capsys, checkpoints):
    status, _, err = run(capsys, "--checkpoint", checkpoints[0], "--data-dir", "/nowhere/at/all", "--device", "cpu")
    assert status == 1
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("validate.py: error: --data-dir /nowhere/at/all does not exist")


BAD = {
    "--torchcompile induktor": "did you mean 'inductor'",
    "--gp medium": "pooling",
    "--model-kwargs img_size=abc": "cannot create",
    "--crop-pct 0": "--crop-pct is 0",
    "--multilabel-threshold 0.3": "--multilabel-threshold does nothing",
    "--task multilabel --multilabel-threshold 1": "--multilabel-threshold is 1",
    "--compare-reports r.json": "--compare-reports validates nothing",
    "--valid-labels nowhere.txt": "--valid-labels nowhere.txt",
    "--gp=": "--gp ''",
    "--mean 0.5 0.5": "--mean has 2 values",
    "--interpolation bicubik": "did you mean 'bicubic'",
    "--crop-pct nan": "--crop-pct is nan",
    "--task multilabel --export onnx": "--export is about one label an image",
    "--target-format multihot": "--target-format multihot needs --task multilabel",
    "--split vlaidation": "did you mean 'validation'",
    "--quantize w8a8-tt --calibration-split trian": "no split 'trian'",
    "--results-file nowhere/r.csv": "no folder nowhere",
}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_setting_is_one_line(words, capsys, checkpoints, common):
    status, _, err = run(capsys, "--checkpoint", checkpoints[0], *common, *words.split())
    assert status == 1
    assert "Traceback" not in err
    assert BAD[words] in err


def test_interrupt_keeps_what_is_finished(capsys, checkpoints, common, tmp_path, monkeypatch):
    from tweo_timm.evaluate import measure as module

    measure, calls = module.measure, []

    def interrupted(subject, world):
        calls.append(subject.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(subject, world)

    monkeypatch.setattr(module, "measure", interrupted)
    status, result, _ = run(capsys, "--checkpoint", *checkpoints, *common, "--report", tmp_path / "r")
    assert status == 130
    assert result["name"] == "base"
    assert len(json.loads((tmp_path / "r" / "report.json").read_text())["checkpoints"]) == 1


def test_folder_of_checkpoints_stands_for_all_in_it_under_unique_names(capsys, checkpoints, common, tmp_path):
    for name in ("one", "two"):
        shutil.copy(checkpoints[0], tmp_path / f"{name}.pth.tar")
    _, result, _ = run(capsys, "--checkpoint", tmp_path, *common)
    assert [entry["name"] for entry in result] == [f"{tmp_path.name}/one", f"{tmp_path.name}/two"]


def test_results_file_is_timms(capsys, checkpoints, common, tmp_path):
    run(capsys, "--checkpoint", checkpoints[0], *common, "--results-file", tmp_path / "r.csv")
    header = (tmp_path / "r.csv").read_text().splitlines()[0]
    assert header.startswith("model,top1,top1_err,top5,top5_err,param_count,img_size,crop_pct,interpolation")
    run(
        capsys,
        "--checkpoint",
        checkpoints[0],
        *common,
        "--results-file",
        tmp_path / "r.json",
        "--results-format",
        "json",
    )
    assert json.loads((tmp_path / "r.json").read_text())[0]["model"] == ARCH


def test_model_without_blocks_is_scored_all_the_same(capsys, common, tmp_path):
    model = timm.create_model("resnet10t", num_classes=3)
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    words = ["--num-classes", 3, "--img-size", 32, *common]
    status, result, _ = run(capsys, "--checkpoint", path, "--model", "resnet10t", *words)
    assert status == 0
    assert result["peak_abs"] is None


@pytest.mark.parametrize("size", [("--img-size", 48), ("--input-size", 1, 48, 48)])
def test_a_size_on_the_command_line_replaces_that_of_the_training_and_keeps_its_channels(
    capsys, common, tmp_path, size
):
    model = timm.create_model("resnet10t", num_classes=3, in_chans=1)
    args = argparse.Namespace(num_classes=3, in_chans=None, input_size=[1, 32, 32], mean=[0.5], std=[0.5])
    path = tmp_path / "last.pth.tar"
    torch.save({"arch": "resnet10t", "args": args, "state_dict": model.state_dict()}, path)
    status, result, err = run(capsys, "--checkpoint", path, *size, *common)
    assert status == 0, err
    assert result["img_size"] == 48


SIZES = [("--img-size", 48), ("--input-size", 3, 48, 48), ("--model-kwargs", "img_size=48")]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_vit_is_resized_for_images_of_another_size_as_timm_resizes_it(capsys, checkpoints, common, photos, size):
    status, result, err = run(capsys, "--checkpoint", checkpoints[0], *size, *common)
    assert status == 0, err
    top1, summary = timm_top1(checkpoints[0], photos, size=48)
    assert result["img_size"] == 48
    assert result["top1"] == pytest.approx(top1, abs=1e-3)
    assert result["peak_abs"] == pytest.approx(summary["peak_abs"], rel=1e-6)


@pytest.mark.parametrize("trained_at", [224, 48])
def test_weights_alone_fit_at_their_architectures_size_and_at_the_one_asked_for(capsys, common, tmp_path, trained_at):
    path = tmp_path / "weights.pth"
    torch.save(make_model(0, img_size=trained_at).state_dict(), path)
    kwargs = [f"{name}={value}" for name, value in KWARGS.items() if name != "img_size"]
    words = ["--model", ARCH, "--num-classes", 3, "--img-size", 48, "--model-kwargs", *kwargs]
    status, result, err = run(capsys, "--checkpoint", path, *words, *common)
    assert status == 0, err
    assert result["img_size"] == 48


def test_a_model_that_cannot_be_resized_says_so(capsys, common, tmp_path):
    path = tmp_path / "weights.pth"
    mixer = timm.create_model("mixer_s32_224", num_classes=3, img_size=32)
    args = argparse.Namespace(num_classes=3, model_kwargs={"img_size": 32})
    torch.save({"arch": "mixer_s32_224", "args": args, "state_dict": mixer.state_dict()}, path)
    status, _, err = run(capsys, "--checkpoint", path, "--img-size", 64, *common)
    assert status == 1
    assert "built for images of 32x32" in err


SWIN = {"window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("alone", [False, True], ids=["checkpoint", "weights alone"])
def test_a_swin_is_built_for_the_images_as_timm_builds_it(size, alone, capsys, common, photos, tmp_path):
    arch = "swin_tiny_patch4_window7_224"
    torch.manual_seed(3)
    weights = timm.create_model(arch, num_classes=3, img_size=32, **SWIN).state_dict()
    args = argparse.Namespace(num_classes=3, model_kwargs=SWIN, img_size=32, crop_pct=1.0)
    torch.save(weights if alone else {"arch": arch, "args": args, "state_dict": weights}, tmp_path / "swin.pth")
    model = timm.create_model(arch, num_classes=3, img_size=size, **SWIN).eval()
    model.load_state_dict(weights)
    with torch.no_grad(), record_outliers(model) as record:
        model(timm_batch(model, photos, size)[0])
    words = ["--model", arch, "--num-classes", 3, "--crop-pct", 1.0, "--model-kwargs"]
    words += [f"{name}={str(value).replace(' ', '')}" for name, value in SWIN.items()]
    words += ["--img-size", size] if alone or size != 32 else []
    status, result, err = run(capsys, "--checkpoint", tmp_path / "swin.pth", *words, *common)
    assert status == 0, err
    assert result["peak_abs"] == pytest.approx(record.summary()["peak_abs"], rel=1e-5)


def test_a_model_without_blocks_keeps_its_record_when_all_sites_are_wanted(capsys, common, tmp_path):
    torch.save(timm.create_model("resnet10t", num_classes=3).state_dict(), tmp_path / "weights.pth")
    words = ["--checkpoint", tmp_path / "weights.pth", "--model", "resnet10t", "--num-classes", 3, "--img-size", 32]
    status, result, err = run(capsys, *words, "--sites", "all", *common)
    assert status == 0, err
    assert "top1" in result


@pytest.mark.filterwarnings("ignore::UserWarning:timm")  # while it resizes tables of positions
def test_a_size_that_a_model_cannot_take_is_one_line(capsys, common, tmp_path):
    sizes = {"img_size": 64, "embed_dim": (32, 32), "depths": (1, 1)}
    model = timm.create_model("maxvit_tiny_rw_224", num_classes=3, **sizes)
    path = save_checkpoint(tmp_path / "max" / "last.pth.tar", model, arch="maxvit_tiny_rw_224")
    content = torch.load(path, weights_only=False)
    content["args"].model_kwargs, content["args"].input_size = sizes, None
    torch.save(content, path)
    status, _, err = run(capsys, "--checkpoint", path, "--img-size", 100, *common)
    assert status == 1
    assert "maxvit_tiny_rw_224 does not accept images of 100x100" in err
    assert "Traceback" not in err


def test_weights_alone_need_a_model_name(capsys, common, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(make_model(0).state_dict(), path)
    status, _, err = run(capsys, "--checkpoint", path, *common)
    assert status == 1
    assert "--model NAME" in err


def test_quantized_and_diagnosed_report_is_complete(capsys, checkpoints, common, tmp_path):
    words = ["--quantize", "w8a8-tt", "w4a4-ck+res", "--calibration-images", 8, "--sites", "all"]
    words += ["--stethoscope", "--colinearity", "--fp8-readiness", "--report", tmp_path / "r"]
    status, _, err = run(capsys, "--checkpoint", *checkpoints, *common, *words)
    assert status == 0, err
    record = json.loads((tmp_path / "r" / "report.json").read_text())["checkpoints"][0]
    assert [entry["scheme"] for entry in record["quantized"]] == ["w8a8-tt", "w4a4-ck+res"]
    assert record["quantized"][0]["calibration"] == {"split": "train", "images": 8, "seed": 42}
    assert record["quantized"][0]["fidelity"]["relative_error"] < record["quantized"][1]["fidelity"]["relative_error"]
    markdown = (tmp_path / "r" / "report.md").read_text()
    for heading in ("Stethoscope", "Colinearity", "FP8 readiness", "ten sites"):
        assert heading in markdown, heading
    assert {"quantized.png", "colinearity.png"} <= {path.name for path in (tmp_path / "r").iterdir()}


def test_exported_files_are_run_timed_and_reported(capsys, checkpoints, common, tmp_path, monkeypatch):
    monkeypatch.setattr("tweo_timm.quant.latency.ROUNDS", 1)
    words = ["--quantize", "w8a8-tt", "--calibration-images", 8, "--export", "onnx", "--report", tmp_path / "r"]
    status = main([str(word) for word in ("--checkpoint", checkpoints[0], *common, *words)])
    out, err = capsys.readouterr()
    assert status == 0, err
    record = json.loads((tmp_path / "r" / "report.json").read_text())["checkpoints"][0]
    (float_file,) = record["exported"]["files"]
    assert float_file["top1"] == pytest.approx(record["top1"], rel=1e-6)
    assert record["exported"]["latency"] == []
    exported = record["quantized"][0]["exported"]
    assert exported["top1"] == pytest.approx(record["quantized"][0]["top1"], rel=1e-6)
    assert (tmp_path / "r" / "base.w8a8-tt.onnx").stat().st_size > 0
    assert [entry["batch"] for entry in exported["latency"]] == [1, 4]
    row = exported["latency"][1]["rows"][1]
    cells = ["w8a8-tt", "4", "1", "dynamic int8 ONNX", f"{row['median_ms']:.2f}", f"{row['min_ms']:.2f}"]
    cells += [f"{row['images_per_s']:.1f}", f"{row['ratio']:.2f}"]
    for text in (out.split("--result\n")[0], (tmp_path / "r" / "report.md").read_text()):
        assert "base.w8a8-tt.onnx" in text
        assert f"| {' | '.join(cells)} |" in text


def test_a_file_that_cannot_be_written_costs_no_measurement(capsys, checkpoints, common, tmp_path):
    (tmp_path / "r" / "base.w8a8-tt.onnx").mkdir(parents=True)
    words = ["--quantize", "w8a8-tt", "--calibration-images", 8, "--export", "onnx", "--report", tmp_path / "r"]
    status, result, err = run(capsys, "--checkpoint", checkpoints[0], *common, *words)
    assert status == 1
    assert "--export onnx, base w8a8-tt:" in err
    record = json.loads((tmp_path / "r" / "report.json").read_text())["checkpoints"][0]
    assert record["exported"]["files"]
    entry = record["quantized"][0]
    assert entry["top1"] >= 0
    assert "exported" not in entry
    assert entry["not_exported"] in (tmp_path / "r" / "report.md").read_text()
    assert result["top1"] == pytest.approx(record["top1"], abs=1e-3)


def test_reports_from_before_exports_were_timed_are_still_read(capsys, checkpoints, common, tmp_path):
    assert run(capsys, "--checkpoint", checkpoints[0], *common, "--export", "onnx", "--report", tmp_path / "a")[0] == 0
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    del report["checkpoints"][0]["exported"]["latency"]
    (tmp_path / "a" / "report.json").write_text(json.dumps(report))
    words = ["--compare-reports", tmp_path / "a" / "report.json", "--report", tmp_path / "b"]
    assert run(capsys, *words)[0] == 0
    markdown = (tmp_path / "b" / "report.md").read_text()
    assert "base.float32.onnx" in markdown
    assert "Latency" not in markdown


def test_impossible_wishes_are_refused_before_anything_is_measured(capsys, checkpoints, common):
    status, result, err = run(capsys, "--checkpoint", checkpoints[0], *common, "--quantize", "w8a8-xx")
    assert status == 1
    assert result is None
    assert "w8a8-xx" in err


def test_diagnosis_that_a_model_does_not_allow_is_reported_and_loses_nothing(capsys, common, tmp_path):
    model = timm.create_model("resnet10t", num_classes=3)
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    words = ["--model", "resnet10t", "--num-classes", 3, "--img-size", 32, "--colinearity", "--report", tmp_path / "r"]
    status, _, err = run(capsys, "--checkpoint", path, *words, *common)
    assert status == 0, err
    record = json.loads((tmp_path / "r" / "report.json").read_text())["checkpoints"][0]
    assert "refused" in record["colinearity"]
    assert "No colinearity" in (tmp_path / "r" / "report.md").read_text()


def collapsed(checkpoints, folder):
    """A checkpoint like the first one, whose last block has become NaN."""
    content = torch.load(checkpoints[0], weights_only=False)
    weights = {name: value.clone() for name, value in content["state_dict"].items()}
    weights["blocks.1.mlp.fc2.bias"].fill_(float("nan"))
    folder.mkdir()
    torch.save(content | {"state_dict": weights}, folder / "last.pth.tar")
    return folder / "last.pth.tar"


def test_a_model_that_collapsed_is_reported_beside_one_that_did_not(capsys, checkpoints, common, tmp_path):
    paths = [collapsed(checkpoints, tmp_path / "nan"), checkpoints[0]]
    words = ["--quantize", "w8a8-tt", "--calibration-images", 8, "--report", tmp_path / "r"]
    status, results, err = run(capsys, "--checkpoint", *paths, *common, *words)
    assert status == 1
    assert "--quantize w8a8-tt is not possible for nan" in err
    assert [result["peak_abs"] is None for result in results] == [True, False]
    records = json.loads((tmp_path / "r" / "report.json").read_text())["checkpoints"]
    assert [len(record["quantized"]) for record in records] == [0, 1]
    assert "w8a8-tt" in records[0]["not_quantized"]
    assert "--quantize w8a8-tt is not possible for nan" in (tmp_path / "r" / "report.md").read_text()
    assert {"histogram.png", "peak_per_block.png"} <= {path.name for path in (tmp_path / "r").iterdir()}


def test_a_bad_checkpoint_does_not_keep_the_others_from_being_measured(capsys, checkpoints, common, tmp_path):
    bad = tmp_path / "bad.pth.tar"
    bad.write_bytes(b"PK no checkpoint")
    status, result, err = run(capsys, "--checkpoint", bad, checkpoints[1], *common)
    assert status == 1
    assert "bad.pth.tar" in err
    assert result["name"] == "tweo"


def test_valid_labels_say_which_of_the_models_classes_those_of_the_data_are(capsys, common, photos, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(ARCH, num_classes=7, **KWARGS)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "labels.txt").write_text("5\n0\n3\n")
    kwargs = [f"{name}={value}" for name, value in KWARGS.items()]
    words = ["--checkpoint", tmp_path / "weights.pth", "--model", ARCH, "--num-classes", 7, "--model-kwargs", *kwargs]
    status, result, err = run(capsys, *words, *common, "--valid-labels", tmp_path / "labels.txt")
    assert status == 0, err
    head = timm.create_model(ARCH, num_classes=3, **KWARGS)
    weights = model.state_dict() | {f"head.{name}": getattr(model.head, name)[[5, 0, 3]] for name in ("weight", "bias")}
    head.load_state_dict(weights)
    torch.save(head.state_dict(), tmp_path / "three.pth")
    words[1], words[5] = tmp_path / "three.pth", 3
    _, expected, _ = run(capsys, *words, *common)
    assert result["top1"] == expected["top1"]


@pytest.mark.parametrize(
    ("lines", "complaint"), [("0\n1\n3\n", "index 3"), ("0\n0\n1\n", "twice"), ("1\n2\n", "lists 2")]
)
def test_valid_labels_that_cannot_be_are_refused(lines, complaint, capsys, checkpoints, common, tmp_path):
    (tmp_path / "labels.txt").write_text(lines)
    status, _, err = run(capsys, "--checkpoint", checkpoints[0], *common, "--valid-labels", tmp_path / "labels.txt")
    assert status == 1
    assert complaint in err


def test_real_labels_decide_the_comparison_and_the_quantized_accuracy_too(capsys, tmp_path):
    noise = np.random.default_rng(1)
    for number in range(12):
        folder = tmp_path / "data" / "val" / f"class{number % 6}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"ILSVRC2012_val_{number + 1:08d}.JPEG")
    (tmp_path / "real.json").write_text(json.dumps([[] if n == 3 else [n % 6, (n + 1) % 6] for n in range(12)]))
    paths = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = timm.create_model(ARCH, num_classes=6, **KWARGS)
        (tmp_path / str(seed)).mkdir()
        paths.append(save_checkpoint(tmp_path / str(seed) / "last.pth.tar", model))
    words = ["--data-dir", tmp_path / "data", "--device", "cpu", "--workers", 0, "--split", "val", "--num-classes", 6]
    words += ["--real-labels", tmp_path / "real.json", "--report", tmp_path / "r"]
    words += ["--quantize", "w8a8-tt", "--calibration-split", "val", "--calibration-images", 8]
    status, results, err = run(capsys, "--checkpoint", *paths, *words)
    assert status == 0, err
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["checkpoints"][0]["data"]["images"] == 11
    difference = results[1]["top1"] - results[0]["top1"]
    assert report["comparison"][0]["top1_difference"] == pytest.approx(difference, abs=1e-3)
    (tmp_path / "real.json").write_text("[[0]]")
    assert run(capsys, "--checkpoint", *paths, *words)[0] == 1


@pytest.mark.parametrize("more", [["--no-prefetcher"], ["--stethoscope", "--quantize", "w8a8-tt"]], ids=" ".join)
def test_a_model_for_grey_images_needs_no_mean_of_its_own(capsys, common, tmp_path, more):
    path = tmp_path / "last.pth.tar"
    args = argparse.Namespace(num_classes=3, in_chans=1, model_kwargs=KWARGS)
    torch.save({"arch": ARCH, "args": args, "state_dict": make_model(0, in_chans=1).state_dict()}, path)
    status, result, err = run(capsys, "--checkpoint", path, "--img-size", 32, *common, *more)
    assert status == 0, err
    assert result["img_size"] == 32


def test_diagnoses_and_quantization_take_a_model_in_half_precision(capsys, checkpoints, common, tmp_path):
    words = ["--model-dtype", "bfloat16", "--stethoscope", "--colinearity", "--quantize", "w8a8-tt"]
    status, _, err = run(capsys, "--checkpoint", checkpoints[0], *common, *words, "--report", tmp_path / "r")
    assert status == 0, err
    record = json.loads((tmp_path / "r" / "report.json").read_text())["checkpoints"][0]
    assert "refused" not in record["stethoscope"]
    assert record["quantized"]


@pytest.mark.parametrize("args", [None, {"num_classes": 3, "model_kwargs": KWARGS}], ids=["no options", "a dict"])
def test_options_in_a_checkpoint_may_be_a_dict_or_missing(capsys, common, tmp_path, args):
    path = tmp_path / "last.pth.tar"
    torch.save({"arch": ARCH, "args": args, "state_dict": make_model(0).state_dict()}, path)
    own = [] if args else ["--num-classes", 3, "--model-kwargs", *(f"{key}={value}" for key, value in KWARGS.items())]
    status, _, err = run(capsys, "--checkpoint", path, "--img-size", 32, *common, *own)
    assert status == 0, err


def test_named_blocks_are_those_of_every_diagnosis(capsys, checkpoints, common, tmp_path):
    words = ["--tweo-blocks", r"blocks\.1", "--stethoscope", "--report", tmp_path / "r"]
    status, _, err = run(capsys, "--checkpoint", checkpoints[0], *common, *words)
    assert status == 0, err
    record = json.loads((tmp_path / "r" / "report.json").read_text())["checkpoints"][0]
    assert [block["name"] for block in record["blocks"]] == ["blocks.1"]
    assert "blocks.0" not in json.dumps(record["stethoscope"])


def test_averaged_metrics_are_printed_under_timms_names(capsys, checkpoints, common):
    _, result, _ = run(capsys, "--checkpoint", checkpoints[0], *common, "--metrics-avg", "macro")
    assert {"macro_precision", "macro_recall", "macro_f1_score"} <= result.keys()


def test_test_time_pooling_crops_only_where_it_pools(capsys, checkpoints, common):
    words = ["--checkpoint", checkpoints[0], *common, "--crop-pct", 0.5]
    assert run(capsys, *words, "--test-pool")[1] == run(capsys, *words)[1]
