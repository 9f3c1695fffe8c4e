"""The oldest versions: setup.cfg's bounds, which tests/oldest.txt pins, and what needs more than they have."""

import configparser
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.images import write_images
from tests.train.runs import command, train_together
from tweo_timm import needs
from tweo_timm.train.cli import main

ROOT = Path(__file__).resolve().parents[1]


def bounds():
    """Every requirement of the package and of its tests, "name>=version"."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    lines = f"{config['options']['install_requires']}\n{extras['test']}".splitlines()
    return [line for line in lines if line]


def test_the_pins_of_the_oldest_versions_are_the_bounds_of_the_package():
    lines = (ROOT / "tests" / "oldest.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins == [requirement.replace(">=", "==") for requirement in bounds()]


def test_every_requirement_has_a_lowest_version():
    assert not [requirement for requirement in bounds() if not re.fullmatch(r"[\w-]+>=[\d.]+", requirement)]


def test_no_need_is_older_than_the_oldest_torch():
    oldest = dict(requirement.split(">=") for requirement in bounds())["torch"]
    for need in needs.NEEDS.values():
        assert torch.torch_version.TorchVersion(need.torch) > oldest


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), train=16, val=3)


@pytest.fixture
def old_torch(monkeypatch):
    """Whatever asks for torch's version meets 2.8.0."""
    version = torch.torch_version.TorchVersion("2.8.0+cu128")
    monkeypatch.setattr(needs, "torch", SimpleNamespace(__version__=version))


@pytest.mark.usefixtures("old_torch")
@pytest.mark.parametrize("name", needs.NEEDS)
def test_what_an_older_torch_lacks_is_refused_with_version_reason_and_remedy(name):
    need = needs.NEEDS[name]
    with pytest.raises(ValueError, match=f"{need.what} needs torch {need.torch} or newer, this is 2.8.0.*pip install"):
        needs.require(name)


@pytest.mark.parametrize("version", ["2.14.1", "2.14.1+cu130", "3.0.0", "2.100.0"])
def test_a_newer_torch_lacks_nothing(version, monkeypatch):
    found = torch.torch_version.TorchVersion(version)
    monkeypatch.setattr(needs, "torch", SimpleNamespace(__version__=found))
    assert not any(needs.lacking(name) for name in needs.NEEDS)


@pytest.mark.usefixtures("old_torch")
def test_compiled_fp8_is_refused_by_an_older_torch_and_nothing_is_written(images, tmp_path, capsys):
    assert main(command(images, tmp_path, "--fp8", "emulated", "--torchcompile", "aot_eager")) == 1
    assert "compilation of FP8 layers needs torch 2.11" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("old_torch")
def test_sharding_is_refused_by_an_older_torch(images, tmp_path, capfd):
    assert train_together([*command(images, tmp_path, "-b", "8"), "--fsdp"]) == [1, 1]
    assert "--fsdp needs torch 2.9.1" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
