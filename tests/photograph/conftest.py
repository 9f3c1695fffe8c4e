"""Golden files: what was seen once, to be compared with what is seen now."""

import difflib
import json
from pathlib import Path

import pytest
import torch

from tests.images import write_images
from tests.photograph.runs import trained

FOLDER = Path(__file__).parent / "golden"


class Golden:
    """Compares with the golden files, or writes them."""

    def __init__(self, update):
        self._update = update

    def read(self, name):
        return (FOLDER / name).read_text(encoding="utf-8")

    def text(self, name, text):
        """The text is that of the golden file."""
        if self._update:
            self._write(name, text)
        before = self.read(name)
        if text != before:
            lines = difflib.unified_diff(before.splitlines(), text.splitlines(), f"golden/{name}", "now", lineterm="")
            pytest.fail("behaviour changed; on purpose? then --update-golden\n" + "\n".join(lines), pytrace=False)

    def json(self, name, value):
        self.text(name, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")

    def numbers(self, name, table, tolerance):
        """Rows of numbers by key: each differs from the golden one by at most this part of the row's first number."""
        rows = ",\n".join(
            f" {json.dumps(key)}: {json.dumps([round_to_6(v) for v in row])}" for key, row in table.items()
        )
        if self._update and not ((FOLDER / name).exists() and self._worst(name, table)[0] <= tolerance):
            self._write(name, f"{{\n{rows}\n}}\n")
        worst, key = self._worst(name, table)
        assert worst <= tolerance, f"{name}: {key} is now {table.get(key)}, off by {worst:.2g} of its norm"

    def _worst(self, name, table):
        before = json.loads(self.read(name))
        if before.keys() != table.keys():
            return float("inf"), min(before.keys() ^ table.keys())
        return max(
            (max(abs(a - b) for a, b in zip(row, before[key], strict=True)) / max(abs(before[key][0]), 1e-12), key)
            for key, row in table.items()
        )

    def _write(self, name, text):
        (FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / name).write_text(text, encoding="utf-8")


def round_to_6(value):
    return float(f"{value:.6g}")


@pytest.fixture
def golden(request):
    return Golden(request.config.getoption("--update-golden"))


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Sums are added in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), train=40, val=12)


@pytest.fixture(scope="package")
def run(images, tmp_path_factory):
    """The folder of a finished run with everything on that writes: EMA, TWEO, emulated FP8 and its health."""
    return trained("vit-tweo-fp8-averaged", images, tmp_path_factory.mktemp("run"), "--fp8-health-interval", "10")
