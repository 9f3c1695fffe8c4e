"""Imports point one way, and importing the package does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tweo_timm

ROOT = Path(tweo_timm.__file__).parent

# From the top down: a module may import its own layer and those below it. fp8.* is whatever is not named otherwise.
LAYERS = [
    ["train.__main__", "evaluate.__main__", "rewrite.__main__", "survey.__main__", "quickstart"],
    ["train.cli", "evaluate.cli", "repair.cli"],
    ["train", "evaluate", "repair"],
    ["run"],
    ["side"],
    ["survey"],
    ["quant", "diagnose"],
    ["rewrite", "fp8.patch", "fp8.health", "fp8"],
    ["callbacks"],
    ["task", "penalty", "upstream"],
    ["measurement"],
    ["outliers"],
    ["tap", "blocks", "families", "prenorm", "draft", "stats", "loss", "balance", "fp8.*"],
    ["layers", "clipped_softmax", "flow", "stream", "batches"],
    ["fp8.arithmetic", "fp8.scaling"],
    ["fp8.cast", "fp8.recipe", "config", "side.config", "artefact"],
    ["settings", "photos", "records", "schema", "fingerprint"],
    [
        "suggestion",
        "fingerprint",
        "version",
        "machine",
        "tables",
        "outputs",
        "media",
        "structure",
        "modes",
        "extras",
        "needs",
        "wide",
    ],
]
# On one layer, or above, and yet the first does not know the second.
STRANGERS = [("train", "evaluate"), ("evaluate", "train")]
STRANGERS += [("train", "repair"), ("evaluate", "repair")]
STRANGERS += [("repair", other) for other in ("train", "evaluate")]
STRANGERS += [(other, "task") for other in ("quant", "diagnose", "fp8", "outliers")]


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in ROOT.rglob("*.py") if module_name(path)}


def layer(module):
    """The layer of the longest listed name that the module is or stands in."""
    names = {name: level for level, layer_names in enumerate(LAYERS) for name in layer_names}
    found = [name for name in names if module == name or module.startswith(f"{name.removesuffix('.*')}.")]
    assert found, f"{module} stands in no layer: add it to LAYERS and say so in docs/design.md"
    return names[max(found, key=len)]


def imports(path):
    """Every module that a file imports, inside functions too, as absolute names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule.removeprefix("tweo_timm.") in MODULES else node.module


def own_imports(path):
    """The modules of this package that a file imports, without the package's name."""
    names = {name.removeprefix("tweo_timm.") for name in imports(path) if name.startswith("tweo_timm.")}
    return {name for name in names if name in MODULES}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_its_own_layer_and_those_below(module):
    upward = {name for name in own_imports(MODULES[module]) if layer(name) < layer(module)}
    assert not upward, f"{module} imports upward: {sorted(upward)}"


@pytest.mark.parametrize(("one", "other"), STRANGERS)
def test_neighbours_do_not_know_each_other(one, other):
    known = {
        module: sorted(name for name in own_imports(path) if name.split(".")[0] == other)
        for module, path in MODULES.items()
        if module.split(".")[0] == one
    }
    assert not any(known.values()), known


@pytest.mark.parametrize("module", ["loss", "stats", "fp8.cast"])
def test_arithmetic_knows_no_timm(module):
    known, new = set(), {module}
    while new:
        known |= new
        new = {name for one in new for name in own_imports(MODULES[one])} - known
    assert not [name for one in known for name in imports(MODULES[one]) if name.split(".")[0] == "timm"]


def test_only_te_imports_transformer_engine():
    importers = {m for m, path in MODULES.items() if any("transformer_engine" in name for name in imports(path))}
    assert importers <= {"fp8.te"}


@pytest.mark.parametrize("package", ["lightning", "transformers"])
def test_only_its_callback_imports_another_trainer(package):
    importers = {m for m, path in MODULES.items() if any(name.split(".")[0] == package for name in imports(path))}
    assert importers == {"callbacks.lightning" if package == "lightning" else "callbacks.trainer"}


def test_nothing_depends_on_the_plugin_for_timms_script():
    assert not [module for module, path in MODULES.items() if "upstream" in own_imports(path)]


def test_importing_the_package_registers_nothing_and_loads_nothing_heavy():
    program = """
import logging, sys
import timm, timm.task, timm.scheduler, timm.utils, torch
classes = [timm.task.TrainingTask, timm.task.ClassificationTask, timm.scheduler.scheduler.Scheduler,
           timm.utils.CheckpointSaver, torch.nn.Module]
before = [dict(vars(cls)) for cls in classes], timm.list_models(), list(logging.root.handlers), sys.gettrace()
known = set(sys.modules)
import tweo_timm
after = [dict(vars(cls)) for cls in classes], timm.list_models(), list(logging.root.handlers), sys.gettrace()
assert before == after
loaded = {name.split(".")[0] for name in set(sys.modules) - known}
print(sorted(loaded & {"matplotlib", "transformer_engine", "onnx", "onnxruntime", "tensorboard", "rich",
                       "lightning", "transformers"}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_there_is_no_circle_of_imports_not_even_for_type_checkers():
    graph = {module: own_imports(path) - {module} for module, path in MODULES.items()}
    while leaves := [module for module, known in graph.items() if not known & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert not graph, f"these import each other, or what does: {sorted(graph)}"
