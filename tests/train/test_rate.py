"""The learning rate of a run on another number of processes than its settings were written for."""

import pytest
import torch
import yaml
from timm.layers import DropPath

from tests.train.runs import session_of
from tweo_timm.train.cli import main
from tweo_timm.train.options import parse_train_options
from tweo_timm.train.rate import batch_remark, resolved_lr

SMALL = ["--num-classes", "3", "--img-size", "32"]
BATCHES = ["--global-batch", "1024", "--batch-size", "64"]
LINEAR = ["--lr-base", "5e-4", "--lr-base-size", "512", "--lr-base-scale", "linear"]


def test_swin_follows_the_batch_as_deit_does():
    for recipe in ("swin_tiny", "deit_small"):
        options = parse_train_options(["-c", recipe, "--data-dir", "/data"])
        rates = [resolved_lr(options, 128 * processes) for processes in (1, 8, 16)]
        assert rates == pytest.approx([1.25e-4, 1e-3, 2e-3], rel=1e-12)


@pytest.mark.parametrize(
    ("words", "global_batch", "parts"),
    [
        (LINEAR, 64, ("64 images", "written for 1024", "rate 6.25e-05 instead of 0.001", "--grad-accum-steps 16")),
        (LINEAR, 4096, ("4096 images", "rate 0.004 instead of 0.001", "--min-lr 0 stay", "set them by hand")),
        (["--lr", "3e-3"], 512, ("--lr 0.003 stays as it is", "--grad-accum-steps 2")),
        ([*LINEAR, "--grad-accum-steps", "3"], 1536, ("--grad-accum-steps 2 restores",)),
    ],
)
def test_another_batch_than_the_settings_are_for_is_said_with_what_moves(words, global_batch, parts):
    remark = batch_remark(parse_train_options([*BATCHES, *words]), global_batch)
    for part in parts:
        assert part in remark


def test_the_batch_that_settings_are_for_needs_no_words():
    assert batch_remark(parse_train_options([*BATCHES, *LINEAR]), 1024) == ""
    assert batch_remark(parse_train_options(LINEAR), 96) == ""


def test_a_run_of_another_batch_warns_once(images, tmp_path, caplog):
    session_of(images, tmp_path, "--global-batch", "16")
    said = [record.getMessage() for record in caplog.records if "written for" in record.getMessage()]
    assert len(said) == 1
    assert "8 images" in said[0]
    caplog.clear()
    session_of(images, tmp_path, "--global-batch", "8")
    assert "written for" not in caplog.text


@pytest.mark.parametrize(
    ("processes", "lines"),
    [
        ("8", ["# learning rate: 0.001 for 1024 images per update (128 a process x 8 x 1 accumulated)"]),
        (
            "1",
            [
                "# learning rate: 0.000125 for 128 images per update (128 a process x 1 x 1 accumulated)",
                "# written for 1024 images per update: 0.001 (global_batch)",
            ],
        ),
    ],
)
def test_print_config_tells_the_resolved_rate(processes, lines, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", processes)
    assert main(["-c", "swin_tiny", "--print-config"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-len(lines) :] == lines
    assert yaml.safe_load(shown)["lr"] is None  # the comments are no settings


def test_a_constant_drop_path_is_one_rate_in_every_block_and_keeps_the_weights(images, tmp_path):
    words = ["--drop-path", "0.2", "--drop-path-rule"]
    linear, constant = (session_of(images, tmp_path, *words, rule).model for rule in ("linear", "constant"))

    def rates(model):
        return [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]

    assert rates(linear) == pytest.approx([0, 0.2])
    assert rates(constant) == [0.2, 0.2]
    assert [block.drop_path2.drop_prob for block in constant.blocks] == [0.2, 0.2]
    assert all(torch.equal(a, b) for a, b in zip(linear.parameters(), constant.parameters(), strict=True))


def test_a_constant_drop_path_reaches_a_block_that_had_none(images, tmp_path):
    model = session_of(
        images, tmp_path, "--drop-path", "0.2", "--drop-path-rule", "constant", model=["--model", "resnet10t", *SMALL]
    ).model
    assert [module.drop_prob for module in model.modules() if isinstance(module, DropPath)] == [0.2] * 4


def test_a_model_without_drop_path_is_refused(images, tmp_path):
    words = ["--drop-path", "0.2", "--drop-path-rule", "constant"]
    with pytest.raises(ValueError, match="drop_path_rate"):
        session_of(images, tmp_path, *words, model=["--model", "efficientvit_b0", *SMALL])
