"""A file says how it is used: exported files, scored by validate.py and by the script of docs/export.md alone."""

import argparse
import ast
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests import models
from tests.evaluate.conftest import run, save_checkpoint
from tests.images import noise, write
from tests.quant.families import randomize
from tweo_timm.artefact import Artefact, Preprocessing
from tweo_timm.evaluate.cli import main
from tweo_timm.evaluate.compare import unpacked
from tweo_timm.quant import latency

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from tweo_timm.quant.export import export_onnx  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript.*")

CLASSES = ["Grünfink", "Kiwi, klein", "Öltanker 'Å'"]
SIZES = [(32, 32), (57, 40), (8, 11), (300, 214), (37, 36)]  # width, height
VIT = (models.VIT_ARCH, {**models.VIT, "depth": 1})
SWIN = (models.SWIN_ARCH, {**models.SWIN, "patch_size": 2, "num_heads": (2, 4)})
PAGE = (Path(__file__).parents[2] / "docs/export.md").read_text(encoding="utf-8")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
SCRIPT = re.search(r"```python\n(import json, sys.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """Photographs of all sizes: smooth noise, whose crop matters, in classes with umlauts."""
    root, rng = tmp_path_factory.mktemp("birds"), np.random.default_rng(0)
    for split, rounds in (("train", 1), ("validation", 2)):
        for name in CLASSES:
            for number, size in enumerate(SIZES * rounds):
                photo = noise(rng, 5, 6).resize(size, Image.Resampling.BICUBIC)
                write(root / split / name / f"{number}.png", photo)
    return root


def checkpoint(folder, arch, kwargs):
    torch.manual_seed(0)
    model = randomize(timm.create_model(arch, num_classes=3, **kwargs).eval())
    args = argparse.Namespace(model=arch, num_classes=3, model_kwargs=kwargs, input_size=[3, 32, 32], mean=list(MEAN))
    return save_checkpoint(folder / "last.pth.tar", model, arch=arch, args=args, class_names=CLASSES)


class Exported:
    """A checkpoint's report with its exported files; `files` holds float, qdq and onnxruntime."""

    def __init__(self, folder, birds, model, kind, scheme):
        weights = checkpoint(folder, *model)
        words = ["--checkpoint", weights, "--data-dir", birds, "--device", "cpu", "-j", 0, "-b", 8, "--export", "onnx"]
        words += [
            "--quantize",
            scheme,
            "--export-input",
            kind,
            "--report",
            folder / "report",
            "--calibration-images",
            8,
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(latency, "ROUNDS", 1)
            assert main([str(word) for word in words]) == 0
        self.folder = folder / "report"
        (self.record,) = json.loads((self.folder / "report.json").read_text())["checkpoints"]
        self.exports = [self.record["exported"], self.record["quantized"][0]["exported"]]
        self.files = {Path(file["path"]): file["top1"] for export in self.exports for file in export["files"]}
        assert len(self.files) == 3


@pytest.fixture(scope="module", params=["float32", pytest.param("uint8", marks=pytest.mark.slow)])
def vit(request, tmp_path_factory, birds):
    return Exported(tmp_path_factory.mktemp("vit"), birds, VIT, request.param, "w8a8-tt")


def deployed(file, birds, monkeypatch, capsys):
    """Which images of the split the script of the docs classifies rightly, in the order of the data set."""
    images = [path for name in CLASSES for path in sorted((birds / "validation" / name).iterdir())]
    monkeypatch.setattr(sys, "argv", ["classify.py", str(file), *map(str, images)])
    capsys.readouterr()
    exec(compile(SCRIPT[1], "docs/export.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    return [line == f"{path}\t{path.parent.name}" for line, path in zip(lines, images, strict=True)]


def check_deployed(exported, birds, monkeypatch, capsys):
    for file, top1 in exported.files.items():
        right = deployed(file, birds, monkeypatch, capsys)
        assert 100 * sum(right) / len(right) == pytest.approx(top1)
        status, result, _ = run(
            capsys, "--onnx", file, "--data-dir", birds, "-j", 0, "--report", exported.folder / "own"
        )
        assert (status, result["top1"]) == (0, pytest.approx(top1, abs=1e-3))
        (record,) = json.loads((exported.folder / "own" / "report.json").read_text())["checkpoints"]
        assert unpacked(record["correct"], len(right)).tolist() == right  # image by image, not only in number
        assert record["class_names"] == CLASSES
        assert 0 < sum(right) < len(right)


def test_the_script_of_the_docs_counts_what_the_report_and_validate_count(vit, birds, monkeypatch, capsys):
    check_deployed(vit, birds, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("model", [VIT, SWIN], ids=["vit", "swin"])
@pytest.mark.parametrize("kind", ["float32", "uint8"])
def test_the_same_for_a_rotated_model_and_a_swin(model, kind, birds, tmp_path, monkeypatch, capsys):
    check_deployed(Exported(tmp_path, birds, model, kind, "w8a8-ct+res+rot"), birds, monkeypatch, capsys)


def test_the_script_needs_onnxruntime_numpy_and_pillow_alone():
    nodes = list(ast.walk(ast.parse(SCRIPT[1])))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported == {"json", "sys", "numpy", "onnxruntime", "PIL"}


def test_file_scales_and_report_say_the_same(vit):
    said = vit.exports[1]["artefact"]
    assert said["preprocessing"] == vit.record["preprocessing"]
    assert said["preprocessing"] | {"std": None} == {
        **{"input_size": [3, 32, 32], "mean": list(MEAN), "std": None},
        **{"crop_pct": 0.9, "crop_mode": "center", "interpolation": "bicubic"},
    }
    assert (said["class_names"], said["scheme"], said["arch"]) == (CLASSES, "w8a8-tt", VIT[0])
    assert said["calibration"] == {"split": "train", "images": 8, "seed": 42, "method": "absmax"}
    (scales,) = (json.loads(path.read_text()) for path in vit.folder.glob("*.scales.json"))
    assert {name: scales[name] for name in said} == said
    for file in vit.exports[1]["files"]:
        entries = {entry.key: entry.value for entry in onnx.load(file["path"]).metadata_props}
        texts = {name: entries.pop(name) for name in ("scheme", "arch", "tweo_timm")}
        assert texts | {name: json.loads(text) for name, text in entries.items()} == said


def test_pixels_in_the_graph_are_normalized_exactly_to_rounding(tmp_path):
    model = randomize(timm.create_model(VIT[0], num_classes=3, **VIT[1]).eval())
    said = Artefact(preprocessing=Preprocessing((3, 32, 32), MEAN, STD, 0.9, "center", "bicubic"))
    pixels = torch.randint(0, 256, (4, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    export_onnx(model, tmp_path / "pixels.onnx", torch.zeros(2, 3, 32, 32), input_dtype="uint8", artefact=said)
    (logits,) = onnxruntime.InferenceSession(tmp_path / "pixels.onnx").run(None, {"images": pixels.numpy()})
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        wanted = model.double()((pixels.permute(0, 3, 1, 2).double() / 255 - mean) / std)
    assert float((torch.from_numpy(logits) - wanted).norm() / wanted.norm()) < 1e-6


WEIGHT = np.random.default_rng(1).normal(size=(3, 3)).astype(np.float32)
GIVEN = ["--mean", 0.4, 0.5, 0.6, "--std", 0.2, 0.3, 0.25, "--crop-pct", 0.9]


def strangers_file(path, dtype="float32", last=False, size=(32, 32), batch="n", inputs=1, outputs=1, metadata=None):
    """A linear model of an image's mean colour, by somebody who knows nothing of us."""
    helper, kinds = onnx.helper, {"float32": 1, "float16": 10, "uint8": 2, "int64": 7}
    shape = [batch, *size, 3] if last else [batch, 3, *size]
    given = [helper.make_tensor_value_info(name, kinds[dtype], shape) for name in ("pixels", "more")[:inputs]]
    nodes = [
        helper.make_node("Cast", ["pixels"], ["x"], to=1),
        helper.make_node("ReduceMean", ["x", "axes"], ["colour"], keepdims=0),
        helper.make_node("MatMul", ["colour", "weight"], ["scores"]),
    ]
    axes = np.array([1, 2] if last else [2, 3], np.int64)
    constants = [onnx.numpy_helper.from_array(array, name) for array, name in ((axes, "axes"), (WEIGHT, "weight"))]
    nodes.append(helper.make_node("Identity", ["scores"], ["again"]))
    found = [helper.make_tensor_value_info(name, 1, [batch, 3]) for name in ("scores", "again")[:outputs]]
    graph = helper.make_graph(nodes, "colour", given, found, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    helper.set_model_props(model, metadata or {})
    onnx.save(model, path)
    return path


def scored_by_timm(birds, scale, size=32):
    """Which images that model classifies rightly, with timm's transform and NumPy."""
    config = {"input_size": (3, size, size), "crop_pct": 0.9, "interpolation": "bicubic"}
    transform = timm.data.create_transform(**config, mean=(0, 0, 0), std=(1, 1, 1))
    right = []
    for label, name in enumerate(CLASSES):
        for path in sorted((birds / "validation" / name).iterdir()):
            colour = transform(Image.open(path).convert("RGB")).double().numpy().mean((1, 2))
            right.append(int((scale(colour) @ WEIGHT.astype(np.float64)).argmax()) == label)
    return right


def normalized(colour):
    return (colour - np.array(MEAN)) / np.array(STD)


@pytest.mark.parametrize(
    ("form", "flags", "scale"),
    [
        ({}, GIVEN, normalized),
        ({"dtype": "float16", "last": True, "batch": 4}, GIVEN, normalized),
        ({"dtype": "uint8", "last": True}, GIVEN[-2:], lambda colour: 255 * colour),
        ({"dtype": "uint8", "size": ("h", "w")}, ["--img-size", 48, *GIVEN[-2:]], lambda colour: 255 * colour),
    ],
    ids=["float", "float16-last-batch-4", "pixels-last", "pixels-of-any-size"],
)
def test_a_strangers_file_is_scored_by_flags(form, flags, scale, birds, tmp_path, capsys, caplog):
    file = strangers_file(tmp_path / "theirs.onnx", **form)
    words = ["--onnx", file, "--data-dir", birds, "-j", 0, "-b", 8, *flags, "--report", tmp_path / "report"]
    status, result, _ = run(capsys, *words)
    assert (status, result["model"], result["name"]) == (0, "onnx", "theirs")
    assert "timm's crop_mode center, interpolation bicubic" in caplog.text
    (record,) = json.loads((tmp_path / "report" / "report.json").read_text())["checkpoints"]
    right = scored_by_timm(birds, scale, 48 if "--img-size" in flags else 32)
    assert unpacked(record["correct"], len(right)).tolist() == right
    assert 0 < sum(right) < len(right)


KNOWN = Artefact(preprocessing=Preprocessing((3, 32, 32), MEAN, STD, 0.9, "center", "bicubic"), class_names=CLASSES)


@pytest.mark.parametrize(
    ("form", "flags", "message"),
    [
        ({}, [], "does not say how its images are normalized: give --mean and --std"),
        ({"dtype": "uint8", "last": True}, GIVEN, "--mean 0.4 0.5 0.6: .* has its normalization in the graph; leave"),
        ({"dtype": "int64"}, GIVEN, r"takes tensor\(int64\) .*float32, float16 or uint8 are accepted"),
        ({"size": (32, 3)}, GIVEN, "does not say where the channels are: export it"),
        ({"size": ("h", "w")}, GIVEN, "images of any height: say it by --img-size N"),
        ({}, [*GIVEN, "--img-size", 48], "a height of 32 alone, not 48"),
        ({"inputs": 2}, GIVEN, r"has 2 inputs \(pixels, more\): one is accepted"),
        ({"outputs": 2}, GIVEN, r"one of the form \(batch, classes\) is accepted"),
        ({}, [*GIVEN, "--num-classes", 5], "--num-classes 5: .* has 3; leave it out"),
        ({}, [*GIVEN, "--quantize", "w8a8-tt"], "--onnx scores files as they are; leave out --quantize"),
        ({}, [*GIVEN, "--device", "cuda"], "--device cuda: --onnx runs files in onnxruntime's CPU provider"),
        ({"metadata": {"preprocessing": "{"}}, [], "preprocessing is '{'; it must be JSON"),
        ({"metadata": KNOWN.to_metadata() | {"class_names": "3"}}, [], "class_names is 3; it must be a list"),
        ({"metadata": {"preprocessing": '{"input_size": [3, 32]}'}}, [], "preprocessing.mean"),
        (
            {"metadata": KNOWN.to_metadata() | {"class_names": '["Kiwi, klein", "Grünfink", "x"]'}},
            [],
            "the classes are not those of .*class 0 is 'Kiwi, klein' there and 'Grünfink' in the data",
        ),
    ],
)
def test_what_a_file_does_not_say_or_allow_is_refused_in_one_line(form, flags, message, birds, tmp_path, capsys):
    file = strangers_file(tmp_path / "theirs.onnx", **form)
    status, _, err = run(capsys, "--onnx", file, "--data-dir", birds, "-j", 0, *flags)
    assert status == 1
    assert re.search(f"^validate.py: error: .*{message}", err, re.MULTILINE), err


def test_what_is_no_onnx_file_is_refused(birds, tmp_path, capsys):
    (tmp_path / "some.onnx").write_bytes(b"some")
    for name, message in (("some", "is no file that onnxruntime can open"), ("none", "does not exist")):
        status, _, err = run(capsys, "--onnx", tmp_path / f"{name}.onnx", "--data-dir", birds, "-j", 0)
        assert (status, message in err) == (1, True)


def test_a_file_that_speaks_for_itself_needs_no_flag_and_one_run_compares_several(birds, tmp_path, capsys, caplog):
    files = [strangers_file(tmp_path / f"{name}.onnx", metadata=KNOWN.to_metadata()) for name in "ab"]
    status, result, _ = run(capsys, "--onnx", *files, "--data-dir", birds, "-j", 0, "--report", tmp_path / "report")
    assert status == 0
    assert [row["name"] for row in result] == ["a", "b"]
    assert "timm's" not in caplog.text
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["comparison"][0]["top1_difference"] == 0
    right = scored_by_timm(birds, normalized)
    assert unpacked(report["checkpoints"][1]["correct"], len(right)).tolist() == right
