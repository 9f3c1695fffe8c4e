"""Twenty steps under the Trainer of transformers with the callback are those of a plain loop."""

import copy

import pytest
import torch

from tests.models import batch
from tweo_timm import Tweo, TweoConfig

reason = "transformers is not installed: pip install '.[transformers]'"
transformers = pytest.importorskip("transformers", reason=reason)
pytest.importorskip("accelerate", reason=reason)

CONFIG = TweoConfig(weight=0.05, tau=0.5)
BATCHES = [batch(seed=seed) for seed in range(20)]
SET = [{"pixel_values": x, "labels": y} for images, targets in BATCHES for x, y in zip(images, targets, strict=True)]


def tiny_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=6)
    return transformers.ViTForImageClassification(config)


def train(model, callback, tmp_path, **kwargs):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=kwargs.pop("batch_size", 4),
        num_train_epochs=1,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="sgd",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
        **kwargs,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=SET, callbacks=[callback])
    trainer.train()
    return trainer


def plain_loop(model, config=CONFIG):
    model.train()
    tweo, optimizer = Tweo(model, config), torch.optim.SGD(model.parameters(), lr=0.05)
    for step, (images, targets) in enumerate(BATCHES):
        if config.schedule != "constant":
            tweo.set_progress(step / len(BATCHES))
        (model(pixel_values=images, labels=targets).loss + tweo.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.fixture
def callback():
    from tweo_timm.callbacks.trainer import TweoCallback

    return TweoCallback


@pytest.mark.parametrize(
    ("schedule", "batches"), [("linear", {}), ("constant", {"batch_size": 2, "gradient_accumulation_steps": 2})]
)
def test_twenty_steps_are_those_of_a_plain_loop_with_accumulation_too(callback, tmp_path, schedule, batches):
    config = TweoConfig(weight=0.05, tau=0.5, schedule=schedule)
    model = tiny_model()
    twin = copy.deepcopy(model)
    trainer = train(model, callback(config), tmp_path, **batches)
    expected = plain_loop(twin, config)
    assert trainer.state.global_step == 20
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_training_that_was_broken_off_leaves_no_second_penalty_for_the_next(callback, tmp_path):
    model, made = tiny_model(), callback(CONFIG)
    forward = model.forward
    model.forward = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        train(model, made, tmp_path)
    model.forward = forward
    twin = copy.deepcopy(model)
    train(model, made, tmp_path)
    expected = plain_loop(twin)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_a_loss_that_the_model_does_not_return_is_refused(callback, tmp_path):
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1.*override Trainer.compute_loss"):
        train(tiny_model(), callback(CONFIG), tmp_path, label_smoothing_factor=0.1)
    model = tiny_model().train()
    made = callback(CONFIG)
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    made.on_train_begin(arguments, None, None, model=model)
    with pytest.raises(ValueError, match="ViTForImageClassification returned no loss"):
        model(pixel_values=BATCHES[0][0])
    made.on_train_end(arguments, None, None)
    model(pixel_values=BATCHES[0][0])
