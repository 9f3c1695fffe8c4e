"""What the processor does is tried, once, and what follows from it is the same everywhere."""

import platform
import sys

import numpy as np
import pytest

from tweo_timm import machine

onnxruntime = pytest.importorskip("onnxruntime")
X86 = platform.machine() in ("x86_64", "AMD64")


@pytest.fixture(autouse=True)
def untried():
    machine.int8_saturates.cache_clear()
    yield
    machine.int8_saturates.cache_clear()


def pairs_in_16_bits(x, weight):
    """Sums of uint8 by int8 products as x86 without VNNI makes them: two are added in 16 bits, which saturate."""
    products = x.astype(np.int32)[:, :, None] * weight.astype(np.int32)
    return (products[:, 0::2] + products[:, 1::2]).clip(-(2**15), 2**15 - 1).sum(1)


class Session:
    """An onnxruntime that multiplies a model's input by its weight as a test says."""

    made = 0

    def __init__(self, content, providers):
        import onnx

        type(self).made += 1
        (weight,) = onnx.load_from_string(content).graph.initializer
        self.weight = onnx.numpy_helper.to_array(weight)

    def run(self, outputs, inputs):
        return [self.product(inputs["x"], self.weight)]


def saturating_vectors(x, weight):
    return pairs_in_16_bits(x, weight) if len(x) == 1 else x.astype(np.int32) @ weight


@pytest.mark.parametrize(
    ("product", "saturates"),
    [
        (pairs_in_16_bits, True),
        (saturating_vectors, True),
        (lambda x, weight: x.astype(np.int32) @ weight.astype(np.int32), False),
    ],
)
def test_whether_int8_products_saturate_is_tried_once_for_vectors_and_matrices(product, saturates, monkeypatch):
    session = type("Session", (Session,), {"product": staticmethod(product)})
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    assert [machine.int8_saturates() for _ in range(3)] == [saturates] * 3
    assert session.made == 1


@pytest.mark.skipif(not X86 or not machine.describe()["instructions"], reason="x86 whose instructions Linux lists")
def test_what_was_tried_here_is_what_the_instructions_of_this_processor_do():
    has = machine.describe()["instructions"]
    assert machine.int8_saturates() == ("avx2" in has and not {"avx_vnni", "avx512_vnni"} & set(has))


@pytest.mark.parametrize(("saturates", "options"), [(True, {"session.x64quantprecision": "1"}), (False, {})])
def test_a_session_is_told_to_be_exact_where_products_saturate_and_only_there(saturates, options, monkeypatch):
    monkeypatch.setattr(machine, "int8_saturates", lambda: saturates)
    assert machine.session_options() == options
    machine.session_options().clear()
    assert machine.session_options() == options


def test_without_the_extra_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeError, match=r"pip install '\.\[export\]' in the clone"):
        machine.int8_saturates()


CPUINFO = {
    "x86": ("model name\t: A Fast One\nflags\t\t: fpu avx2 avx512_vnni\n" * 2, "A Fast One", ["avx2", "avx512_vnni"]),
    "arm": ("processor\t: 0\nFeatures\t: fp asimddp bf16\n", "aarch64", ["asimddp", "bf16"]),
    "none": (None, "aarch64", None),
}


@pytest.mark.parametrize("kind", CPUINFO)
def test_the_processor_has_a_name_on_every_system(kind, tmp_path, monkeypatch):
    text, name, instructions = CPUINFO[kind]
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 3)
    assert machine.describe() == {"processor": name, "cores": 3, "instructions": instructions}


def test_this_processor_has_a_name():
    assert machine.describe()["processor"]
