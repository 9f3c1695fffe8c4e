"""Every block of code of docs/own_loop.md runs as it stands, and trains with a penalty."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.models import batch, tiny_vit
from tweo_timm.penalty import Tweo

PAGE = Path(__file__).parents[1] / "docs" / "own_loop.md"
PARTS = re.findall(r"(?:^## (.*?)$)|(?:```python\n(.*?)```)", PAGE.read_text(encoding="utf-8"), re.M | re.S)


def blocks():
    heading = ""
    for title, code in PARTS:
        heading = title or heading
        if code:
            yield pytest.param(code, id=heading)


def lightning_module(model):
    pl = pytest.importorskip("lightning.pytorch")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, images_and_targets, index):
            images, targets = images_and_targets
            return nn.functional.cross_entropy(self.model(images), targets)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module()


def names_of(code, folder):
    """What a block takes for granted."""
    torch.manual_seed(0)
    model, loader = tiny_vit().train(), [batch(seed=seed) for seed in range(2)]
    names = {"model": model, "loader": loader, "criterion": nn.CrossEntropyLoss(), "num_tokens": 17}
    names["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.01)
    if "lightning" in code:
        names["lightning_module"] = lightning_module(model)
        names["quiet"] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        names["loader"] = torch.utils.data.DataLoader(loader, batch_size=None)
    if "hf_model" in code:
        from tests.hf_models import make

        names |= {"hf_model": make("vit"), "pixels": batch()[0], "folder": str(folder)}
        pairs = [zip(*both, strict=True) for both in loader]
        names["dataset"] = [{"pixel_values": x, "labels": y} for pair in pairs for x, y in pair]
    return names


@pytest.mark.parametrize("code", list(blocks()))
# What Lightning 2.6 says of torch 2.14, and of loaders without workers.
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*workers:UserWarning")
def test_a_block_of_the_page_runs_and_its_penalty_is_asked_for(code, tmp_path, monkeypatch):
    names, asked = names_of(code, tmp_path), []
    real = Tweo.penalty
    monkeypatch.setattr(Tweo, "penalty", lambda self: asked.append(real(self)) or asked[-1])
    exec(compile(code, str(PAGE), "exec"), names)
    if "TweoConfig" in code:
        assert len(asked) == 2
        assert all(penalty.item() > 0 for penalty in asked)
