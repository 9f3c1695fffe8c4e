"""validate.py against timm's own parts, and against itself under other conditions."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from tests.evaluate.conftest import make_model, run, save_checkpoint
from tests.evaluate.reference import timm_top1
from tests.images import noise, write
from tests.models import VIT, VIT_ARCH, as_words, tiny_vit
from tweo_timm.evaluate.options import parse_validate_options
from tweo_timm.evaluate.subject import find_sources


def test_top1_and_peak_equal_timms_own_parts(capsys, checkpoints, common, photos):
    status, result, _ = run(capsys, "--checkpoint", checkpoints[0], *common)
    top1, summary = timm_top1(checkpoints[0], photos)
    assert status == 0
    assert result["top1"] == pytest.approx(top1, abs=1e-4)
    assert result["peak_abs"] == pytest.approx(summary["peak_abs"], rel=1e-6)
    assert result["model"] == VIT_ARCH


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
    steps = [(step["update"], step["task_loss"]) for step in first["training_losses"]]
    assert steps == [(2, 3.0), (4, 2.0), (6, 1.0)]  # (16 * 2.5 - 8 * 3) / 8 = 2
    assert second["training_losses"] == []
    assert first["peak_abs"] == max(block["peak_abs"] for block in first["blocks"])
    files = {path.name for path in (tmp_path / "report").iterdir()}
    pictures = {"peak_per_block.png", "training_loss.png", "training_peak.png", "histogram.png"}
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


def test_interrupt_keeps_what_is_finished(capsys, checkpoints, common, tmp_path, monkeypatch):
    from tweo_timm.evaluate import command as module

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


def test_results_of_a_folder_are_a_list_as_timm_writes_it(capsys, checkpoints, common, tmp_path):
    # The best first, with the file, a list even of one; safetensors are taken besides.
    folder = tmp_path / "some"
    folder.mkdir()
    shutil.copy(checkpoints[0], folder / "a.pth.tar")
    assert isinstance(run(capsys, "--checkpoint", folder, *common)[1], list)
    for seed in (1, 2, 3):
        save_checkpoint(folder / f"b{seed}.pth.tar", make_model(seed))
    _, results, _ = run(capsys, "--checkpoint", folder, *common, "--results-file", tmp_path / "r.csv")
    assert len({row["top1"] for row in results}) > 1
    assert [row["top1"] for row in results] == sorted((row["top1"] for row in results), reverse=True)
    with open(tmp_path / "r.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["checkpoint"] for row in rows] == [row["checkpoint"] for row in results]
    assert {Path(row["checkpoint"]).name for row in rows} == {"a.pth.tar", "b1.pth.tar", "b2.pth.tar", "b3.pth.tar"}


def test_folder_of_checkpoints_stands_for_all_in_it_under_its_name(capsys, checkpoints, common, tmp_path):
    for name in ("one", "planted.v2"):
        shutil.copy(checkpoints[0], tmp_path / f"{name}.pth.tar")
    _, result, _ = run(capsys, "--checkpoint", tmp_path, *common)
    assert sorted(entry["name"] for entry in result) == ["one", "planted.v2"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        ("/a/last.pth.tar /b/checkpoint-3.pth.tar /b/planted.pth /c/model.safetensors", "a b planted c"),
        ("/a/last.pth.tar /a/model_best.pth.tar", "a/last a/model_best"),
        ("/x/a/last.pth.tar /y/a/last.pth.tar", "/x/a/last.pth.tar /y/a/last.pth.tar"),
    ],
)
def test_a_checkpoint_is_called_by_its_file_or_by_its_folder_where_that_says_nothing(paths, names, tmp_path):
    given = [tmp_path / path[1:] for path in paths.split()]
    for path in given:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = find_sources(parse_validate_options(["--checkpoint", *map(str, given)]))
    assert [source.name.replace(str(tmp_path), "") for source in found] == names.split()


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
    assert json.loads((tmp_path / "r.json").read_text())["model"] == VIT_ARCH


def test_model_without_blocks_is_scored_all_the_same(capsys, common, tmp_path):
    model = timm.create_model("resnet10t", num_classes=3)
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    words = ["--num-classes", 3, "--img-size", 32, *common]
    status, result, _ = run(capsys, "--checkpoint", path, "--model", "resnet10t", *words)
    assert status == 0
    assert result["peak_abs"] is None


def test_valid_labels_say_which_of_the_models_classes_those_of_the_data_are(capsys, common, photos, tmp_path):
    model = tiny_vit(num_classes=7)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "labels.txt").write_text("5\n0\n3\n")
    words = ["--checkpoint", tmp_path / "weights.pth", "--model", VIT_ARCH, "--num-classes", 7]
    words += ["--model-kwargs", *as_words(VIT)]
    status, result, err = run(capsys, *words, *common, "--valid-labels", tmp_path / "labels.txt")
    assert status == 0, err
    head = tiny_vit(num_classes=3)
    weights = model.state_dict() | {f"head.{name}": getattr(model.head, name)[[5, 0, 3]] for name in ("weight", "bias")}
    head.load_state_dict(weights)
    torch.save(head.state_dict(), tmp_path / "three.pth")
    words[1], words[5] = tmp_path / "three.pth", 3
    _, expected, _ = run(capsys, *words, *common)
    assert result["top1"] == expected["top1"]


def test_real_labels_decide_the_comparison_and_the_quantized_accuracy_too(capsys, tmp_path):
    rng = np.random.default_rng(1)
    for number in range(12):
        folder = tmp_path / "data" / "val" / f"class{number % 6}"
        write(folder / f"ILSVRC2012_val_{number + 1:08d}.JPEG", noise(rng))
    (tmp_path / "real.json").write_text(json.dumps([[] if n == 3 else [n % 6, (n + 1) % 6] for n in range(12)]))
    paths = []
    for seed in (0, 1):
        paths.append(save_checkpoint(tmp_path / str(seed) / "last.pth.tar", make_model(seed, num_classes=6)))
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


@pytest.mark.parametrize("args", [None, {"num_classes": 3, "model_kwargs": VIT}], ids=["no options", "a dict"])
def test_options_in_a_checkpoint_may_be_a_dict_or_missing(capsys, common, tmp_path, args):
    path = tmp_path / "last.pth.tar"
    torch.save({"arch": VIT_ARCH, "args": args, "state_dict": make_model(0).state_dict()}, path)
    own = [] if args else ["--num-classes", 3, "--model-kwargs", *as_words(VIT)]
    status, _, err = run(capsys, "--checkpoint", path, "--img-size", 32, *common, *own)
    assert status == 0, err


def test_averaged_metrics_are_printed_under_timms_names(capsys, checkpoints, common):
    _, result, _ = run(capsys, "--checkpoint", checkpoints[0], *common, "--metrics-avg", "macro")
    timms = ["model", "top1", "top1_err", "top5", "top5_err", "macro_precision", "macro_recall", "macro_f1_score"]
    assert list(result)[:12] == [*timms, "param_count", "img_size", "crop_pct", "interpolation"]


def test_test_time_pooling_crops_only_where_it_pools(capsys, checkpoints, common):
    words = ["--checkpoint", checkpoints[0], *common, "--crop-pct", 0.5]
    assert run(capsys, *words, "--test-pool")[1] == run(capsys, *words)[1]
