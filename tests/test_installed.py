"""The package works where it is installed and the clone is not: recipes by name, commands, its own source archive."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

from tests.images import write_images
from tests.train.runs import TINY

ROOT = Path(__file__).resolve().parents[1]
MODEL = [
    "--model",
    "vit_tiny_patch16_224",
    "--model-kwargs",
    *TINY,
    "--num-classes",
    "3",
    "--input-size",
    "3",
    "32",
    "32",
]


def run(*words, cwd, check=True):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in words]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """A wheel, and a source archive, of the files that git would commit."""
    folder, clone = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("clone")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.splitlines()
    with tarfile.open(folder / "clone.tar", "w") as tar:
        for name in listed:
            if (ROOT / name).exists():
                tar.add(ROOT / name, name)
    with tarfile.open(folder / "clone.tar") as tar:
        tar.extractall(clone, filter="data")
    (folder / "clone.tar").unlink()
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ".", cwd=clone)
    return folder


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory):
    """The scripts' folder of an environment that has the wheel, and whatever it requires from this one."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    (wheel,) = archives.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=home)
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).stdout.strip()
    # A path in a .pth file is searched for packages, but its own .pth files are not read: not the clone's.
    (Path(packages) / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    found = run(python, "-c", "import tweo_timm; print(tweo_timm.__file__)", cwd=home).stdout
    assert str(home) in found
    return home / "bin"


def test_the_archives_are_what_an_index_accepts(archives):
    assert "PASSED" in run(sys.executable, "-m", "twine", "check", "--strict", *archives.iterdir(), cwd=ROOT).stdout


def test_shipped_recipes_are_found_by_name_and_listed(installed, tmp_path):
    listed = run(installed / "tweo-train", "--list-recipes", cwd=tmp_path).stdout
    names = [line.split()[0] for line in listed.splitlines()]
    assert names == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    shown = run(installed / "tweo-train", "-c", "deit_small_tweo", "--print-config", cwd=tmp_path).stdout
    assert "tweo_weight: 0.01" in shown
    assert "model: deit_small_patch16_224" in shown


def test_a_misspelt_recipe_names_the_near_one(installed, tmp_path):
    done = run(installed / "tweo-train", "-c", "deit_smal_tweo", "--print-config", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "did you mean 'deit_small_tweo'" in done.stderr


def test_two_commands_train_and_validate_on_own_images(installed, tmp_path):
    data, common = write_images(tmp_path / "data"), ["--device", "cpu", "-j", "0", "-b", "8"]
    training = ["--experiment", "mine", "--output", tmp_path / "runs", "--epochs", "1", "--warmup-epochs", "0"]
    run(installed / "tweo-train", *MODEL, "--data-dir", data, *training, "--tweo-weight", "0.01", *common, cwd=tmp_path)
    checkpoint = tmp_path / "runs" / "mine" / "last.pth.tar"
    words = ["--checkpoint", checkpoint, "--data-dir", data, "--report", tmp_path / "report", *common]
    run(installed / "tweo-validate", *words, cwd=tmp_path)
    assert (tmp_path / "report" / "report.md").exists()


def test_the_quickstart_is_a_command(installed, tmp_path):
    assert "four small trainings" in run(installed / "tweo-quickstart", "--help", cwd=tmp_path).stdout


@pytest.mark.slow
def test_the_source_archive_runs_its_own_tests(archives, tmp_path):
    (source,) = archives.glob("*.tar.gz")
    with tarfile.open(source) as tar:
        tar.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    words = ["tests/test_loss.py", "tests/test_imports.py", "tests/train/test_recipe.py", "tests/train/test_options.py"]
    program = f"import sys, pytest; sys.path.insert(0, {str(folder)!r}); sys.exit(pytest.main({words!r}))"
    run(sys.executable, "-c", program, cwd=folder)
