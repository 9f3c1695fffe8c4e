"""A backend is one class and one line of a table: what this file adds to the table works by every name of it."""

import copy
import re

import pytest
import torch
from torch import nn

from tweo_timm import Fp8Recipe, check_fp8_ran, fp8_state, load_fp8_state, patch_fp8, unpatch_fp8
from tweo_timm.fp8.backend import Replaced, backend_named
from tweo_timm.fp8.health import Fp8HealthMonitor
from tweo_timm.fp8.recipe import BACKENDS
from tweo_timm.run.world import World
from tweo_timm.tables import Entry, register
from tweo_timm.train.options import parse_train_options
from tweo_timm.train.shard import check_sharding


class BinaryLinear(nn.Linear):
    """Rounds its weight to plus and minus one."""

    def forward(self, input):
        return nn.functional.linear(input, self.weight.sign(), self.bias)


class BinaryRegion:
    """No state but whether the model ran."""

    def __init__(self):
        self.all_layers_ran = False
        self.closed = 0

    def attach(self, root):
        return [root.register_forward_hook(self._ran)]

    def _ran(self, module, args, output):
        self.all_layers_ran = True

    def close(self):
        self.closed += 1

    def state(self):
        return {"step": torch.ones(1)}

    def load_state(self, state):
        self.loaded = state


class Binary:
    """The toy backend: weights of one bit."""

    unshardable = "one bit cannot be cut"

    def obstacle(self, recipe, device):
        return "margins need more than one bit" if recipe.margin else None

    def convert(self, model, layers, recipe):
        replaced = []
        for name in layers:
            parent, _, attribute = name.rpartition(".")
            owner, linear = model.get_submodule(parent), model.get_submodule(name)
            face = BinaryLinear.__new__(BinaryLinear)
            face.__dict__.update(linear.__dict__)
            owner._modules[attribute] = face
            replaced.append(Replaced(owner, attribute, linear, face))
        return BinaryRegion(), replaced


@pytest.fixture
def toy():
    with register(BACKENDS, "binary", Entry(f"{__name__}:Binary")):
        yield


def test_a_registered_backend_patches_runs_and_unpatches_a_model(toy):
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    before = model(x)
    report = patch_fp8(model, Fp8Recipe(backend="binary", exclude=["2"]))
    assert (report.backend, report.converted, report.backend_reason) == ("binary", ("0",), "asked for by name")
    binary = nn.functional.linear(x, model[0].weight.sign(), model[0].bias)
    assert torch.equal(model(x), model[2](model[1](binary)))
    check_fp8_ran(model)
    load_fp8_state(model, fp8_state(model))
    copied = copy.deepcopy(model)
    unpatch_fp8(model)
    assert torch.equal(model(x), before)
    assert type(copied[0]) is BinaryLinear
    unpatch_fp8(copied)
    assert torch.equal(copied(x), before)


def test_its_obstacle_its_operands_and_its_shards_are_its_own_words(toy):
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(RuntimeError, match="FP8 backend 'binary' cannot run: margins need more than one bit"):
        patch_fp8(model, Fp8Recipe(backend="binary", margin=1))
    report = patch_fp8(model, Fp8Recipe(backend="binary"))
    with pytest.raises(ValueError, match="FP8 backend 'binary' does not show its operands"):
        Fp8HealthMonitor(model)
    options = parse_train_options(["--data-dir", "images", "--fsdp", "--fp8", "binary"])
    with pytest.raises(ValueError, match="--fsdp cannot be used with --fp8 binary: one bit cannot be cut"):
        check_sharding(options, World(torch.device("cpu"), distributed=True, size=2), report)


def test_flags_recipes_and_messages_know_it_while_it_is_there(toy, capsys):
    assert Fp8Recipe(backend="binary").backend == "binary"
    with pytest.raises(ValueError, match=r"did you mean 'binary'"):
        Fp8Recipe(backend="binari")
    with pytest.raises(SystemExit):
        parse_train_options(["-h"])
    assert "--fp8 {off,auto,te,native,emulated,binary}" in capsys.readouterr().out


def test_and_no_longer_afterwards():
    with pytest.raises(ValueError, match=re.escape("one of 'auto', 'te', 'native', 'emulated'")):
        Fp8Recipe(backend="binary")


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_says_whether_it_can_be_sharded_and_whether_it_runs_here(name):
    backend = backend_named(name)
    assert bool(backend.unshardable) == (name == "te")
    assert (backend.obstacle(Fp8Recipe(), torch.device("cpu")) is None) == (name == "emulated")
