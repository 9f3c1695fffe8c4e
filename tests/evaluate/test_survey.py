"""validate.py --survey: a sentence, a table, a picture and a file of the fixed model; with a head and without."""

import json

import pytest
import torch

from tests.evaluate.conftest import make_model, run, save_checkpoint
from tweo_timm.evaluate.neighbours import nearest_are_right


def answer(folder):
    record = json.loads((folder / "report.json").read_text())["checkpoints"][0]
    return record, record["survey"], (folder / "report.md").read_text()


def test_a_survey_is_in_the_record_the_report_the_picture_and_the_terminal(checkpoints, common, tmp_path, capsys):
    from tweo_timm.evaluate.cli import main

    words = ["--checkpoint", checkpoints[0], *common, "--survey", "--max-drop", "100", "--survey-sizes", "64"]
    assert main([str(word) for word in [*words, "--report", tmp_path]]) == 0
    out = capsys.readouterr().out
    record, found, page = answer(tmp_path)
    rows = {(row["format"], row["rotated"]): row for row in found["rows"]}
    assert {name for name, _ in rows} >= {"fp16", "fp16-squares", "fp16-sums", "fp16-logits", "bf16", "fp8", "w8a8-tt"}
    assert found["verdict"].startswith("Sound: ")
    assert found["verdict"] in out
    assert found["verdict"] in page.replace("\\", "")
    assert "| w8a8-tt+res |" in out
    assert rows["fp16", False]["headroom"] > 1
    assert found["float_top1"] == pytest.approx(record["top1"])
    assert (tmp_path / "survey.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_fixed_model_is_exported(capsys, common, tmp_path):
    pytest.importorskip("onnxruntime")
    model = make_model(0)
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[:64] *= 40.0
        model.blocks[1].attn.qkv.weight[64:] *= 2.0**12
        model.blocks[1].attn.proj.weight *= 2.0**-8
    path = save_checkpoint(tmp_path / "bad" / "last.pth.tar", model)
    words = ["--checkpoint", path, *common, "--survey", "--max-drop", "0", "--export", "onnx", "--report", tmp_path]
    run(capsys, *words, "--calibration-images", "8")
    _, found, _ = answer(tmp_path)
    fixed = {fix["format"]: fix for fix in found["fix"] if fix["scheme"] and fix["scheme"].startswith("w8a8")}
    assert set(found["exported"]) | set(found["not_exported"]) == {f["format"] for f in found["fix"] if f["scheme"]}
    assert set(found["exported"]) >= {"w8a8-tt"}
    for name in set(fixed) & set(found["exported"]):
        words = ["--onnx", tmp_path / f"bad.survey.{name}.onnx", "--data-dir", common[1], "-j", "0", "-b", "4"]
        status, result, _ = run(capsys, *words)
        assert (status, result["crop_pct"]) == (0, 1.0)  # the file's own word, and not timm's default
        assert result["top1"] == pytest.approx(fixed[name]["top1"], abs=1e-3)


@pytest.mark.slow
def test_a_model_without_a_head_is_judged_by_nearest_neighbours(capsys, common, tmp_path):
    model = make_model(0)
    model.reset_classifier(0)
    path = save_checkpoint(tmp_path / "features" / "last.pth.tar", model)
    words = ["--checkpoint", path, *common, "--num-classes", "0", "--survey", "--max-drop", "0"]
    run(capsys, *words, "--report", tmp_path)
    record, found, _ = answer(tmp_path)
    sites = {site["name"] for row in found["rows"] if not row["rotated"] for site in row["sites"]}
    assert sites
    assert "head" not in sites  # the head that a rotation needs is no part of the model as it is
    assert (found["judged_by"], record["top1"]) == ("nearest neighbour", None)
    assert found["images"] == record["data"]["images"]
    assert any(row["rotated"] for row in found["rows"])


def test_nearest_neighbours_are_those_of_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    features, targets = torch.randn(40, 8, generator=generator), torch.arange(40) % 4
    features += 2 * torch.nn.functional.one_hot(targets, 8)
    bank = features + 0.1 * torch.randn(40, 8, generator=generator)
    found = nearest_are_right(features, targets, bank)
    for index in range(40):
        similar = torch.cosine_similarity(features[index : index + 1], bank)
        similar[index] = -2
        order = similar.argsort(descending=True)
        assert bool(found[index]) == bool(targets[order[0]] == targets[index])


@pytest.mark.parametrize(
    ("words", "refusal"),
    [(("--max-drop", "2"), "--max-drop does nothing without --survey"), (("--survey-sizes", "64"), "--survey-sizes")],
)
def test_settings_of_the_survey_need_it(capsys, checkpoints, common, words, refusal):
    status, _, err = run(capsys, "--checkpoint", checkpoints[0], *common, *words)
    assert status != 0
    assert refusal in err
