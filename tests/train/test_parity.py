"""With weight 0 the training command is timm's loop; with a remainder of micro-batches it is the one large batch."""

import csv

import pytest
import torch
from timm.data import FastCollateMixup, create_dataset, create_loader, resolve_data_config
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import random_seed

from tests.images import write_images
from tests.models import SWIN, SWIN_ARCH, VIT, VIT_ARCH
from tests.train.runs import last, rows, same_tensors, train

EPOCHS = 3
ACCUMULATE = 2
SIZES = {"vit": (VIT_ARCH, VIT), "swin": (SWIN_ARCH, SWIN)}


def plain_loop(data, name, kwargs):
    """Three epochs over timm's own parts, written as its documentation puts them together."""
    random_seed(42, 0)
    model = create_model(name, num_classes=3, **kwargs)
    config = resolve_data_config({"input_size": (3, 32, 32)}, model=model)
    common = {key: config[key] for key in ("input_size", "mean", "std")} | {"num_workers": 0}
    mixup = FastCollateMixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=3)
    cpu = torch.device("cpu")
    training = create_loader(
        create_dataset("", root=data, split="train", is_training=True),
        batch_size=8,
        is_training=True,
        re_prob=0.25,
        re_mode="pixel",
        interpolation="random",
        collate_fn=mixup,
        device=cpu,
        **common,
    )
    validation = create_loader(
        create_dataset("", root=data, split="validation"),
        batch_size=8,
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        device=cpu,
        **common,
    )
    task = ClassificationTask(model, criterion_kwargs={"smoothing": 0.1, "soft_targets": True}, verbose=False)
    optimizer = create_optimizer_v2(task.trainable_module, opt="adamw", lr=1e-3, weight_decay=0.05)
    task.setup_ema(decay=0.9)
    updates = len(training) // ACCUMULATE
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=EPOCHS, warmup_epochs=1, updates_per_epoch=updates)
    done, records = 0, []
    for epoch in range(EPOCHS):
        task.trainable_module.train()
        optimizer.zero_grad()
        losses = []
        for index, (images, targets) in enumerate(training):
            loss = task(images, targets)["loss"]
            losses.append(loss.item())
            (loss / ACCUMULATE).backward()
            if index % ACCUMULATE == ACCUMULATE - 1:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                done += 1
                task.update_ema(step=done)
                scheduler.step_update(done)
        result = {"train_loss": sum(losses) / len(losses)}
        for ema in (False, True):  # timm validates both, and reports the average's
            evaluator = task.create_evaluator()
            evaluated = task.get_eval_model(ema=ema).eval()
            with torch.no_grad():
                for images, targets in validation:
                    evaluator.update(evaluated(images), targets)
        result |= {f"eval_{key}": value for key, value in evaluator.compute().items()}
        scheduler.step(epoch + 1)
        records.append(result)
    return records, model.state_dict()


@pytest.mark.parametrize("family", SIZES)
def test_three_epochs_are_those_of_a_plain_loop_over_timms_parts(family, tmp_path):
    data = write_images(tmp_path / "data", train=64, val=20)
    name, kwargs = SIZES[family]
    expected, weights = plain_loop(data, name, kwargs)
    sizes = ["--model-kwargs", *(f"{key}={value}".replace(" ", "") for key, value in kwargs.items())]
    folder = train(
        data,
        tmp_path,
        *("--epochs", "3", "--warmup-epochs", "1", "--weight-decay", "0.05", "--clip-grad", "1.0"),
        *("--mixup", "0.8", "--cutmix", "1.0", "--reprob", "0.25", "--model-ema", "--model-ema-decay", "0.9"),
        *("--grad-accum-steps", "2", "--outlier-interval", "1"),
        model=["--model", name, *sizes, "--num-classes", "3", "--input-size", "3", "32", "32"],
    )
    with open(folder / "summary.csv") as file:
        found = list(csv.DictReader(file))
    for ours, theirs in zip(found, expected, strict=True):
        for key, value in theirs.items():
            assert float(ours[key]) == pytest.approx(value, rel=1e-6), key
    for key, value in last(folder)["state_dict"].items():
        torch.testing.assert_close(value, weights[key], rtol=1e-6, atol=1e-7)


def test_a_remainder_of_micro_batches_updates_as_the_one_large_batch(tmp_path):
    # 20 images in micro-batches of 4, four to an update: groups of 16 and of 4. As one batch each: 16, then 4.
    data = write_images(tmp_path / "data", train=20, val=12)
    plain = ("--no-aug", "--opt", "sgd", "--lr", "0.1", "--epochs", "1", "--tweo-weight", "0.1")
    plain = (*plain, "--tweo-tau", "0.5", "--smoothing", "0", "--clip-grad", "0.5")
    accumulated = train(data, tmp_path, *plain, "-b", "4", "--grad-accum-steps", "4", name="accumulated")
    assert last(accumulated)["exact"]["updates"] == 2
    single = train(data, tmp_path, *plain, "-b", "4", "--grad-accum-steps", "5", name="single")
    whole = train(data, tmp_path, *plain, "-b", "20", name="whole")
    assert last(single)["exact"]["updates"] == last(whole)["exact"]["updates"] == 1
    for key, value in last(whole)["state_dict"].items():
        torch.testing.assert_close(last(single)["state_dict"][key], value, rtol=1e-5, atol=1e-6)
    remainder = large_then_small(data, tmp_path, plain)
    for key, value in remainder.items():
        torch.testing.assert_close(last(accumulated)["state_dict"][key], value, rtol=1e-5, atol=1e-6)


def large_then_small(data, tmp_path, plain):
    """The same two updates from batches of 16 and 4 images, by hand."""
    from tests.train.runs import command
    from tweo_timm.run.world import World
    from tweo_timm.train.build import build_session
    from tweo_timm.train.options import parse_train_options

    words = command(data, tmp_path, *plain, "-b", "4", name="by-hand")
    session = build_session(parse_train_options(words), World(torch.device("cpu")))
    session.task.get_trainable_module().train()
    batches = [batch for batch in session.data.train]
    for group in (batches[:4], batches[4:]):
        images, targets = (torch.cat([batch[i] for batch in group]) for i in (0, 1))
        session.task(images, targets)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(session.model.parameters(), 0.5)
        session.optimizer.step()
        session.optimizer.zero_grad()
    return session.model.state_dict()


def test_watching_outliers_neither_moves_weights_nor_random_numbers(images, tmp_path):
    extras = ("--mixup", "0.5", "--reprob", "0.5", "--drop-path", "0.1", "--model-ema")
    blind = train(images, tmp_path, *extras, "--outlier-interval", "0", name="blind")
    seen = train(images, tmp_path, *extras, "--outlier-interval", "1", "--tensorboard", "--save-images", name="seen")
    for key in ("state_dict", "state_dict_ema", "optimizer"):
        assert same_tensors(last(blind)[key], last(seen)[key])
    assert "train_kurtosis" in rows(seen)[0]
    assert "train_kurtosis" not in rows(blind)[0]
    assert "eval_kurtosis" in rows(blind)[0]
