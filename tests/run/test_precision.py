"""--amp-dtype auto is bfloat16 where that is fast, float32 elsewhere, decided once; a slow precision gets a word."""

import pytest
import torch
import yaml

from tests.images import write_images
from tests.train.runs import last, same_tensors, train
from tweo_timm import machine
from tweo_timm.fp8.arithmetic import ARITHMETICS
from tweo_timm.run.precision import precision_of, resolve_precision
from tweo_timm.run.world import World
from tweo_timm.train.options import parse_train_options

CPU = World(torch.device("cpu"))
SLOW, FAST = machine.Speed(False, 14.0), machine.Speed(True, 0.25)


def pretend(monkeypatch, speed):
    monkeypatch.setattr(machine, "low_precision", lambda dtype="bfloat16", device="cpu": speed)


@pytest.mark.parametrize(
    ("speed", "began", "expected"),
    [
        (FAST, None, (True, "bfloat16")),
        (SLOW, None, (False, "float16")),
        (SLOW, dict(amp=True, amp_dtype="bfloat16"), (True, "bfloat16")),
        (FAST, dict(amp=False, amp_dtype="float16"), (False, "float16")),
    ],
)
def test_auto_is_what_is_fast_here_and_in_a_continued_run_what_it_began_with(monkeypatch, speed, began, expected):
    pretend(monkeypatch, speed)
    options = resolve_precision(parse_train_options(["--amp", "--amp-dtype", "auto"]), CPU, began)
    assert (options.amp, options.amp_dtype) == expected


def test_a_low_precision_that_is_slow_here_gets_one_warning_with_the_ratio_and_the_remedy(monkeypatch, caplog):
    options = parse_train_options(["--amp", "--amp-dtype", "bfloat16"])
    pretend(monkeypatch, FAST)
    assert resolve_precision(options, CPU) == options
    assert not caplog.records
    pretend(monkeypatch, SLOW)
    assert resolve_precision(options, CPU) == options
    assert len(caplog.records) == 1
    assert all(word in caplog.text for word in ("14 times slower", "--amp-dtype auto", "--no-amp"))


def test_auto_without_amp_is_no_autocast():
    assert precision_of(resolve_precision(parse_train_options(["--amp-dtype", "auto"]), CPU)) == "float32"


def test_the_files_of_a_run_hold_the_precision_that_was_chosen_and_going_on_elsewhere_keeps_it(tmp_path, monkeypatch):
    images, words = write_images(tmp_path / "images"), ["--amp", "--amp-dtype", "auto"]
    pretend(monkeypatch, FAST)
    whole = train(images, tmp_path / "whole", *words)
    train(images, tmp_path / "halves", *words, "--stop-epoch", "1")
    pretend(monkeypatch, SLOW)
    halves = train(images, tmp_path / "halves", *words, "--resume", "auto")
    recorded = yaml.safe_load((halves / "args.yaml").read_text())
    assert (recorded["amp"], recorded["amp_dtype"]) == (True, "bfloat16")
    assert last(halves)["args"].amp_dtype == "bfloat16"
    assert same_tensors(last(halves)["state_dict"], last(whole)["state_dict"])


def test_an_emulated_product_is_the_same_in_float32_but_for_the_order_of_its_sums(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 8, shape, generator=generator).bfloat16() for shape in ((5, 64), (64, 7)))
    scale, bias = torch.tensor(4.0), torch.randn(7, generator=generator)
    products = []
    for speed in (FAST, SLOW):
        monkeypatch.setattr("tweo_timm.fp8.arithmetic.low_precision", lambda *about, speed=speed: speed)
        products.append(ARITHMETICS["emulated"].product(a, b, scale, scale, bias, torch.bfloat16, fast=False))
    exact = (a.double() @ b.double() / 16 + bias.bfloat16().double()).bfloat16()
    assert all(torch.equal(product, exact) for product in products)


def test_a_device_s_products_are_timed_against_float32():
    speed = machine.low_precision.__wrapped__("bfloat16")
    assert speed.ratio > 0
    assert speed.fast == (speed.ratio < 1.5)
