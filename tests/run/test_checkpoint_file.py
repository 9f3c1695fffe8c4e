"""A checkpoint is a stranger's file: whole, of plain values, believed field by field, and no code of it runs."""

import argparse
import os
import pathlib
import random
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.models import tiny_vit
from tests.train.runs import same_tensors
from tweo_timm.records import Fields
from tweo_timm.run.checkpoint_file import load_weights, read
from tweo_timm.settings import AT_LEAST_0

ARGS = argparse.Namespace(model="vit_tiny_patch16_224", lr=1e-3, opt_betas=[0.9, 0.95], model_kwargs={"depth": 2})


def content(**more):
    state = tiny_vit(depth=1).state_dict()
    return {"state_dict": state, "arch": "vit_tiny_patch16_224", "epoch": 3, "version": 2, "args": ARGS, **more}


def saved(path, **more):
    torch.save(content(**more), path)
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("good") / "good.pth.tar")


def test_a_checkpoint_is_read_by_field(good):
    file = read(good)
    assert (file.arch, file.next_epoch, file.args["opt_betas"], file.ema) == (ARGS.model, 4, [0.9, 0.95], None)
    assert same_tensors(file.weights, content()["state_dict"])
    assert same_tensors(read(good, "metadata").weights, file.weights)


def flipped(data, bit):
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


@pytest.mark.parametrize("flips", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_any_flipped_bit_that_changes_the_content_is_found(flips, good, tmp_path):
    data, whole, found = good.read_bytes(), torch.load(good, weights_only=False), 0
    for bit in random.Random(0).sample(range(8 * len(data)), flips):
        (tmp_path / "flipped.pth.tar").write_bytes(flipped(data, bit))
        try:
            file = read(tmp_path / "flipped.pth.tar")
        except ValueError:
            found += 1
        else:
            assert same_tensors(dict(file.fields.mapping), whole), bit
    assert found > 0.7 * flips  # the rest is padding


def test_a_damaged_checkpoint_names_the_one_before_it(good, tmp_path):
    for name, age in (("checkpoint-1.pth.tar", 20), ("checkpoint-2.pth.tar", 10), ("later.pth.tar", 0)):
        (tmp_path / name).write_bytes(good.read_bytes())
        os.utime(tmp_path / name, ns=(10**18 - age, 10**18 - age))
    (tmp_path / "last.pth.tar").write_bytes(good.read_bytes()[:-3000])
    os.utime(tmp_path / "last.pth.tar", ns=(10**18 - 5, 10**18 - 5))
    with pytest.raises(ValueError, match=r"last.pth.tar is truncated.*the one before it is .*checkpoint-2.pth.tar"):
        read(tmp_path / "last.pth.tar")


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pwned",)


class Foreign:
    pass


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Malicious(), "posix.system"),
        (np.float64(1.5), "numpy"),
        (pathlib.PurePosixPath("/data"), "pathlib"),
        (Foreign(), "Foreign"),
    ],
)
@pytest.mark.parametrize("old_format", [False, True])
def test_what_needs_code_is_named_and_not_run(value, named, old_format, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content(metric=value), "odd.pth.tar", _use_new_zipfile_serialization=not old_format)
    with pytest.raises(ValueError, match=r"odd\.pth\.tar") as refusal:
        read(pathlib.Path("odd.pth.tar"))
    assert not os.path.exists("pwned")
    if not old_format:
        assert named in str(refusal.value)
        assert "truncated" not in str(refusal.value)


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\0" * 10_000_000)
    with pytest.raises(ValueError, match="compressed"):
        read(tmp_path / "bomb.pth")


@pytest.mark.parametrize(
    "arch",
    [
        "hf-hub:someone/model",
        "hf_hub:a/b",
        "local-dir:/etc",
        "timm/vit_tiny_patch16_224",
        "visiontransformer",
        7,
        ["vit"],
    ],
    ids=str,
)
def test_an_architecture_of_a_file_is_a_plain_name_that_timm_knows(arch, tmp_path, caplog):
    assert read(saved(tmp_path / "x.pth.tar", arch=arch)).arch is None
    assert "no architecture of timm" in caplog.text


def test_an_architecture_with_a_tag_is_known(tmp_path):
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert read(saved(tmp_path / "x.pth.tar", arch=name)).arch == name


def test_settings_that_are_no_plain_values_are_passed_over_with_a_word(tmp_path, caplog):
    deep = []
    for _ in range(50):
        deep = [deep]
    args = {"lr": 0.1, "mean": torch.zeros(3), "deep": deep, 5: "x", "model_kwargs": "{'a': 1}"}
    assert read(saved(tmp_path / "x.pth.tar", args=args)).args == {"lr": 0.1, "model_kwargs": "{'a': 1}"}
    assert "args.mean is no plain value" in caplog.text
    assert read(saved(tmp_path / "y.pth.tar", args=[1, 2])).args == {}


@pytest.mark.parametrize("field", ["epoch", "version"])
@pytest.mark.parametrize("value", [-3, "x", True, 1.0, 10**30, [1], {}, float("nan")], ids=str)
def test_an_epoch_that_is_none_is_refused_by_name(field, value, tmp_path):
    if (field, value) == ("version", -3):
        return
    file = read(saved(tmp_path / "x.pth.tar", **{field: value}))
    with pytest.raises(ValueError, match=f"does not fit this run: {field} is "):
        _ = file.next_epoch


@pytest.mark.filterwarnings("ignore:Validating sparse tensor:UserWarning")
@pytest.mark.parametrize(
    "value", [None, [], "x", {"a": 1}, {5: torch.zeros(1)}, {"a": torch.eye(2).to_sparse()}], ids=str
)
def test_weights_that_are_no_dense_tensors_are_refused_by_name(value, tmp_path):
    file = read(saved(tmp_path / "x.pth.tar", state_dict=value))
    with pytest.raises(ValueError, match="does not fit this run: state_dict"):
        _ = file.weights


def broken(name, change):
    state = content()["state_dict"]
    state[name] = change(state[name])
    return state


@pytest.mark.parametrize("form", ["pth", "safetensors", "averaged"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(form, value, tmp_path):
    name = "blocks.0.attn.qkv.weight"
    state = broken(name, lambda tensor: tensor.index_fill(0, torch.tensor([3]), value))
    path = tmp_path / f"x.{'safetensors' if form == 'safetensors' else 'pth'}"
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(content(state_dict_ema=state) if form == "averaged" else state, path)
    model = tiny_vit(depth=1)
    with pytest.raises(ValueError, match=rf"{path.name}: {name} is not finite"):
        load_weights(model, path)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.complex64])
def test_weights_that_are_no_floating_point_numbers_are_named(dtype, tmp_path):
    torch.save(broken("head.bias", lambda tensor: tensor.to(dtype)), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=f"head.bias is {str(dtype)[6:]}"):
        load_weights(tiny_vit(depth=1), tmp_path / "x.pth")


def test_a_tensor_that_repeats_one_number_without_end_is_no_model_s(tmp_path):
    torch.save(broken("head.bias", lambda tensor: torch.zeros(1).expand(2**40)), tmp_path / "x.pth")
    with pytest.raises(RuntimeError, match=r"size mismatch for head.bias"):
        load_weights(tiny_vit(depth=1), tmp_path / "x.pth")


def test_prefixes_of_wrappers_are_taken_off(tmp_path):
    state = {f"module._orig_mod.{name}": value for name, value in content()["state_dict"].items()}
    torch.save({"model": state}, tmp_path / "x.pth")
    model = tiny_vit(depth=1, num_classes=6)
    with torch.no_grad():
        model.head.weight.zero_()
    load_weights(model, tmp_path / "x.pth")
    assert same_tensors(dict(model.state_dict()), dict(content()["state_dict"]))


def test_fields_name_what_is_wrong():
    fields = Fields({"a": {"b": [1, {"c": "x"}]}, "n": 10**5000}, "file f")
    inner = fields.fields("a")
    with pytest.raises(ValueError, match=r"file f: a.b\[0\] is 1; it must be a dictionary"):
        inner.each("b")
    with pytest.raises(ValueError, match=r"file f: it lacks a\.d"):
        inner.text("d")
    with pytest.raises(ValueError, match="n is an integer of thousands of digits; it must be an integer, at least 0"):
        fields.integer("n", AT_LEAST_0)
    with pytest.raises(ValueError, match=r"n is .*; it must be a finite number"):
        fields.number("n")
