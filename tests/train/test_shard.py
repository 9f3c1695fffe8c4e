"""What --fsdp refuses, before anything is sharded."""

import pytest
import torch

from tweo_timm import Fp8Report
from tweo_timm.run.world import World
from tweo_timm.train.options import parse_train_options
from tweo_timm.train.shard import check_sharding

TWO = World(torch.device("cpu"), distributed=True, size=2)
TE = Fp8Report(backend="te", backend_reason="", converted=(), skipped={})
REFUSED = {
    "alone": ([], World(torch.device("cpu")), None, "torchrun"),
    "compiled": (["--torchcompile"], TWO, None, "--torchcompile"),
    "adaptive clipping": (["--clip-grad", "1", "--clip-mode", "agc"], TWO, None, "--clip-mode agc"),
    "channels last": (["--channels-last"], TWO, None, "--channels-last"),
    "two models": (["--kd-model-name", "resnet18"], TWO, None, "--kd-model-name"),
    "an EMA elsewhere": (["--model-ema", "--model-ema-force-cpu"], TWO, None, "--model-ema-force-cpu"),
    "an EMA in half precision": (["--model-ema", "--model-dtype", "bfloat16"], TWO, None, "bfloat16"),
    "Transformer Engine": (["--fp8", "auto"], TWO, TE, "--fp8 native"),
    "an unknown device": ([], World(torch.device("meta"), distributed=True, size=2), None, "cuda and cpu"),
}


def options(*words):
    return parse_train_options(["--data-dir", "images", "--fsdp", *words])


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_with_sharding_is_refused_with_a_reason(case):
    words, world, fp8, expected = REFUSED[case]
    with pytest.raises(ValueError, match=r"--fsdp cannot be used with .*" + expected):
        check_sharding(options(*words), world, fp8)


@pytest.mark.parametrize(
    ("words", "backend"),
    [([], None), (["--model-ema", "--amp"], None), (["--fp8", "auto"], "native"), (["--fp8", "emulated"], "emulated")],
)
def test_the_rest_goes_with_it(words, backend):
    fp8 = backend and Fp8Report(backend=backend, backend_reason="", converted=(), skipped={})
    check_sharding(options(*words), TWO, fp8)
