"""Twenty steps under Lightning's Trainer with the callback are those of a plain loop, parameter by parameter."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.models import batch, tiny_vit
from tweo_timm import Tweo, TweoConfig

pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed: pip install '.[lightning]'")

# What Lightning 2.6 says of torch 2.14, and of loaders without workers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*workers:UserWarning"),
]
CONFIG = TweoConfig(weight=0.05, tau=0.7)
BATCHES = [batch(seed=seed) for seed in range(20)]


class Module(pl.LightningModule):
    def __init__(self, model, teacher=None):
        super().__init__()
        self.model = model
        self.criterion = nn.CrossEntropyLoss()
        if teacher is not None:
            self.teacher = teacher

    def training_step(self, both, index):
        return self.criterion(self.model(both[0]), both[1])

    def validation_step(self, both, index):
        self.model(both[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)


def fit(module, callback, **kwargs):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[callback], **quiet, **kwargs)
    trainer.fit(module, DataLoader(BATCHES, batch_size=None), DataLoader(BATCHES[:2], batch_size=None))
    return trainer


def plain_loop(model, accumulate=1, config=CONFIG):
    model.train()
    tweo, criterion = Tweo(model, config), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for index, (images, targets) in enumerate(BATCHES):
        if config.schedule != "constant":
            tweo.set_progress(index // accumulate / (len(BATCHES) // accumulate))
        ((criterion(model(images), targets) + tweo.penalty()) / accumulate).backward()
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model.state_dict(), tweo.peak_abs


@pytest.fixture
def callback():
    from tweo_timm.callbacks.lightning import TweoCallback

    return TweoCallback


@pytest.mark.parametrize(("accumulate", "schedule"), [(1, "constant"), (4, "linear")])
def test_twenty_steps_are_those_of_a_plain_loop(callback, accumulate, schedule):
    config = TweoConfig(weight=0.05, tau=0.7, schedule=schedule)
    model = tiny_vit()
    twin = copy.deepcopy(model)
    trainer = fit(Module(model), callback(config), accumulate_grad_batches=accumulate)
    expected, peak = plain_loop(twin, accumulate, config)
    assert trainer.global_step == 20 // accumulate
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert trainer.logged_metrics["train_peak_abs"] == pytest.approx(float(peak), rel=1e-5)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_a_batch_that_is_skipped_counts_in_no_penalty(callback):
    class Skipping(Module):
        def training_step(self, both, index):
            loss = super().training_step(both, index)
            return None if index == 0 else loss

    model, penalties = tiny_vit(), []
    module = Skipping(model)
    module.log = lambda name, value, *_: penalties.append(value) if name == "train_tweo_penalty" else None
    twin = copy.deepcopy(model).train()
    fit(module, callback(CONFIG), limit_train_batches=2)
    expected = Tweo(twin, CONFIG)
    twin(BATCHES[1][0])
    assert [float(value) for value in penalties] == pytest.approx([float(expected.penalty().detach())], rel=1e-5)


def test_a_scaled_loss_gets_a_scaled_penalty(callback):
    made, loss = callback(CONFIG), torch.zeros((), requires_grad=True) * 1
    module = Module(tiny_vit().train())
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.precision_plugin.scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    module.log = lambda *args: None
    made.on_fit_start(trainer, module)
    reference = Tweo(module.model, CONFIG)
    module.model(BATCHES[0][0])
    made.on_before_backward(trainer, module, loss)
    assert loss.item() == pytest.approx(512 * reference.penalty().item(), rel=1e-6)


def test_two_models_in_one_module_have_to_be_told_apart(callback):
    module = Module(tiny_vit(), teacher=tiny_vit())
    with pytest.raises(ValueError, match="blocks stand in model, teacher of Module: name the module"):
        fit(module, callback(CONFIG), limit_train_batches=1)
    fit(module, callback(CONFIG, model="model"), limit_train_batches=1)


def test_manual_optimization_is_refused_with_the_way_that_works(callback):
    module = Module(tiny_vit())
    module.automatic_optimization = False
    with pytest.raises(ValueError, match=r"make a Tweo\(model\) of your own"):
        fit(module, callback(CONFIG))
