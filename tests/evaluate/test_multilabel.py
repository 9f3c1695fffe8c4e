"""validate.py --task multilabel: several labels an image, measured by mAP and F1."""

import json
import tarfile

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score
from timm.data import create_dataset, create_loader

from tests.evaluate.conftest import make_model
from tests.images import add, noise, png
from tests.models import VIT, VIT_ARCH, as_words
from tests.processes import run_together
from tweo_timm.evaluate.cli import main
from tweo_timm.train.cli import main as train

CLASSES = 4
MODEL = ["--num-classes", str(CLASSES), "--task", "multilabel", "--device", "cpu", "-j", "0", "-b", "4"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """WebDataset shards of noise with any number of labels an image, none included."""
    root = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    splits = {}
    for split, count in (("train", 16), ("validation", 11)):
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            for index in range(count):
                add(tar, f"{index:04d}.png", png(noise(rng)))
                labels = np.flatnonzero(rng.random(CLASSES) < 0.4).tolist()
                add(tar, f"{index:04d}.json", json.dumps({"labels": labels}).encode())
        splits[split] = {"name": split, "filenames": [f"{split}.tar"], "shard_lengths": [count], "num_samples": count}
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return ["--dataset", "wds/toy", "--data-dir", str(root), "--target-key", "labels"]


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    """Two short trainings on the shards."""
    root = tmp_path_factory.mktemp("runs")
    words = ["--model", VIT_ARCH, "--model-kwargs", *as_words(VIT)]
    words += [*MODEL, *shards, "--opt", "adamw", "--warmup-epochs", "0", "--epochs", "1", "--output", str(root)]
    for name, weight in (("base", "0"), ("tweo", "0.1")):
        assert train([*words, "--experiment", name, "--tweo-weight", weight]) == 0
    return [root / name for name in ("base", "tweo")]


def checkpoint(folder):
    return str(folder / "last.pth.tar")


def summary(folder):
    header, row = (folder / "summary.csv").read_text().splitlines()
    return dict(zip(header.split(","), row.split(","), strict=True))


def test_metrics_are_those_of_scikit_learn_on_the_logits_of_a_plain_loop(photos, tmp_path, capsys):
    model = make_model(1)
    torch.save({"arch": VIT_ARCH, "state_dict": model.state_dict()}, tmp_path / "weights.pth.tar")
    loader = create_loader(
        create_dataset("", root=str(photos), split="validation"),
        input_size=(3, 32, 32),
        batch_size=21,
        num_workers=0,
        device=torch.device("cpu"),
        crop_pct=1.0,
        interpolation="bicubic",
        mean=model.pretrained_cfg["mean"],
        std=model.pretrained_cfg["std"],
    )
    images, targets = next(iter(loader))
    with torch.no_grad():
        scores = model(images).sigmoid().numpy()
    labels = torch.nn.functional.one_hot(targets, 3).numpy()
    words = ["--num-classes", "3", "--task", "multilabel", "--multilabel-threshold", "0.45", "--crop-pct", "1.0"]
    words += ["--checkpoint", str(tmp_path / "weights.pth.tar"), "--model-kwargs", *as_words(VIT)]
    assert main([*words, "--data-dir", str(photos), "--device", "cpu", "-j", "0", "-b", "4"]) == 0
    result = json.loads(capsys.readouterr().out.split("--result\n")[1])
    assert result["map"] == pytest.approx(100 * average_precision_score(labels, scores, average="macro"), abs=1e-3)
    for average in ("micro", "macro"):
        expected = 100 * f1_score(labels, scores >= 0.45, average=average, zero_division=0)
        assert result[f"{average}_f1"] == pytest.approx(expected, abs=1e-3)
    assert "top1" not in result


def test_a_checkpoint_scores_what_its_training_recorded_and_is_compared_and_quantized(runs, shards, tmp_path):
    words = [
        "--checkpoint",
        *map(checkpoint, runs),
        *MODEL,
        *shards,
        "--quantize",
        "w8a8-tt",
        "--report",
        str(tmp_path),
    ]
    assert main([*words, "--calibration-images", "8", "--stethoscope"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    for folder, record in zip(runs, report["checkpoints"], strict=True):
        assert record["map"] == pytest.approx(float(summary(folder)["eval_map"]), abs=1e-4)
        assert 0 <= record["quantized"][0]["map"] <= 100
    difference = report["checkpoints"][1]["map"] - report["checkpoints"][0]["map"]
    assert report["comparison"][0]["map_difference"] == pytest.approx(difference)
    assert "top1_difference" not in report["comparison"][0]
    assert "mAP %" in (tmp_path / "report.md").read_text()
    assert "map_w8a8-tt" in (tmp_path / "report.csv").read_text().splitlines()[0]
    assert (tmp_path / "quantized.png").exists()


def test_two_processes_measure_what_one_does(checkpoints, photos, tmp_path):
    words = ["--checkpoint", str(checkpoints[0]), "--data-dir", str(photos), "--task", "multilabel"]
    words += ["--device", "cpu", "-j", "0", "-b", "4"]
    assert main([*words, "--report", str(tmp_path / "one")]) == 0
    assert run_together(lambda: main([*words, "--report", str(tmp_path / "two")])) == [0, 0]
    one, two = (json.loads((tmp_path / name / "report.json").read_text())["checkpoints"][0] for name in ("one", "two"))
    assert two["map"] == pytest.approx(one["map"], abs=1e-9)
    assert (two["correct"], two["peak_abs"]) == (one["correct"], one["peak_abs"])


def test_task_and_label_field_are_those_of_the_training_unless_given(runs, shards, capsys):
    words = ["--checkpoint", checkpoint(runs[0]), "--device", "cpu", "-j", "0", "-b", "4", *shards[:4]]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out.split("--result\n")[1])
    assert result["map"] == pytest.approx(float(summary(runs[0])["eval_map"]), abs=1e-4)
    assert main([*words, "--task", "classification"]) == 1
    assert "give --task multilabel" in capsys.readouterr().err


def test_reports_of_different_tasks_are_not_compared(runs, shards, checkpoints, photos, tmp_path, capsys):
    assert main(["--checkpoint", checkpoint(runs[0]), *MODEL, *shards, "--report", str(tmp_path / "several")]) == 0
    one = ["--checkpoint", str(checkpoints[0]), "--data-dir", str(photos), "--device", "cpu", "-j", "0"]
    assert main([*one, "--report", str(tmp_path / "one")]) == 0
    files = [str(tmp_path / name / "report.json") for name in ("several", "one")]
    capsys.readouterr()
    assert main(["--compare-reports", *files]) == 1
    out, err = capsys.readouterr()
    assert "different --task" in err
    assert "mAP" not in out


def test_reports_at_different_thresholds_are_not_compared(runs, shards, tmp_path, capsys):
    words = ["--checkpoint", checkpoint(runs[0]), *MODEL, *shards]
    for name in ("0.4", "0.5"):
        assert main([*words, "--multilabel-threshold", name, "--report", str(tmp_path / name)]) == 0
    files = [str(tmp_path / name / "report.json") for name in ("0.4", "0.5")]
    assert main(["--compare-reports", *files, "--report", str(tmp_path / "both")]) == 1
    assert "'threshold': 0.4" in capsys.readouterr().err


def test_a_stream_in_two_processes_is_refused(runs, shards, capfd):
    assert run_together(lambda: main(["--checkpoint", checkpoint(runs[0]), *MODEL, *shards])) == [1, 1]
    assert "without torchrun" in capfd.readouterr().err


def test_labels_in_lists_ask_for_the_task(checkpoints, shards, capsys):
    assert main(["--checkpoint", str(checkpoints[0]), "--device", "cpu", "-j", "0", "-b", "4", *shards]) == 1
    assert "give --task multilabel" in capsys.readouterr().err
