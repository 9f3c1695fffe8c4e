"""validate.py believes of a stranger's checkpoint what can be believed, and scores no damaged weights."""

import socket

import pytest
import torch

from tests.evaluate.conftest import make_model, run, save_checkpoint
from tests.models import VIT


def test_weights_that_are_not_finite_are_named_and_nothing_is_scored(capsys, common, tmp_path):
    model = make_model(0)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[3, 3] = float("nan")
    status, result, err = run(capsys, "--checkpoint", save_checkpoint(tmp_path / "bad.pth.tar", model), *common)
    assert (status, result) == (1, None)
    assert "blocks.0.attn.qkv.weight is not finite" in err


def test_a_flipped_bit_is_found(capsys, common, tmp_path):
    path = save_checkpoint(tmp_path / "bad.pth.tar", make_model(0))
    data = bytearray(path.read_bytes())
    data[data.index(make_model(0).head.weight.detach().numpy().tobytes()) + 2] ^= 1
    path.write_bytes(data)
    status, _, err = run(capsys, "--checkpoint", path, *common)
    assert status == 1
    assert "checksum" in err


@pytest.mark.parametrize("arch", ["hf-hub:someone/model", "local-dir:/etc"])
def test_an_architecture_of_a_file_leads_to_no_network(arch, capsys, common, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    path = save_checkpoint(tmp_path / "x.pth.tar", make_model(0), arch=arch, args=None)
    status, _, err = run(capsys, "--checkpoint", path, *common)
    assert status == 1
    assert "--model" in err
    named = ("--model", "vit_tiny_patch16_224", "--num-classes", "3", "--input-size", "3", "32", "32")
    kwargs = [f"{key}={value}" for key, value in VIT.items() if key != "img_size"]
    assert run(capsys, "--checkpoint", path, *named, *common, "--model-kwargs", "img_size=32", *kwargs)[0] == 0


def test_lines_that_are_no_rows_cost_no_checkpoint(capsys, common, tmp_path, caplog):
    path = save_checkpoint(tmp_path / "run" / "last.pth.tar", make_model(0))
    (path.parent / "outliers.jsonl").write_bytes(
        b'{"epoch": 0, "block": "blocks.0", "train_peak_abs": 7.5}\n[1]\n'
        b'{"epoch": 0, "train_peak_abs": "x"}\n\xff\xfe\n{"epo'
    )
    status, _, _ = run(capsys, "--checkpoint", path, *common, "--report", tmp_path / "r")
    assert status == 0
    assert '"training_peak_abs": 7.5' in (tmp_path / "r" / "report.json").read_text()
    assert "3 lines are no rows" in caplog.text
