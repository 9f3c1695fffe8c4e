"""A stand-in for timm's train.py, which is not in the wheel: the documented calls in the documented order.

It holds timm's classes by name before the device modules are imported, as train.py does, and knows nothing of TWEO.
"""

import argparse
import importlib
import json
import os

import torch
from timm import create_model, utils
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, LogitDistillationTask, resume_task_checkpoint
from torch import nn

NUM_IMAGES, NUM_CLASSES, IMG_SIZE = 16, 6, 32
SIZES = {"img_size": IMG_SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def parse(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("--device-modules", nargs="+", default=[])
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--output", default="")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sched", default="cosine")
    parser.add_argument("--sched-on-updates", action="store_true")
    parser.add_argument("--cooldown-epochs", type=int, default=0)
    parser.add_argument("--grad-accum-steps", type=int, default=1)
    parser.add_argument("--grad-checkpointing", action="store_true")
    parser.add_argument("--model-ema", action="store_true")
    parser.add_argument("--torchcompile")
    parser.add_argument("--kd", action="store_true")
    parser.add_argument("--resume", default="")
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser.parse_args(argv)


def build_task(args, model, device):
    if args.kd:
        teacher = create_model(args.model, num_classes=NUM_CLASSES, **SIZES)
        return LogitDistillationTask(model, teacher, nn.CrossEntropyLoss(), device=device, verbose=False)
    return ClassificationTask(model=model, criterion=nn.CrossEntropyLoss(), device=device, verbose=False)


def build_scheduler(args, optimizer, updates_per_epoch):
    return create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs,
        cooldown_epochs=args.cooldown_epochs,
        step_on_epochs=not args.sched_on_updates,
        updates_per_epoch=updates_per_epoch,
    )


def main(argv):
    utils.setup_default_logging()
    args = parse(argv)
    for module in args.device_modules:
        importlib.import_module(module)
    device = utils.init_distributed_device(args)
    utils.random_seed(42, args.rank)
    torch.manual_seed(42)
    model = create_model(args.model, num_classes=NUM_CLASSES, **SIZES)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    task = build_task(args, model.to(device=device), device)
    optimizer = create_optimizer_v2(task.trainable_module, opt="adamw", lr=args.lr)
    resume_epoch = resume_task_checkpoint(task, args.resume, optimizer) if args.resume else None
    if args.model_ema:
        task.setup_ema(decay=0.9)
    if args.torchcompile:
        task.compile(backend=args.torchcompile)
    if args.distributed:
        task.prepare_distributed()
    saver = None
    if utils.is_primary(args):
        saver = utils.CheckpointSaver(
            model=model, task=task, optimizer=optimizer, args=args, checkpoint_dir=args.output, recovery_dir=args.output
        )
    images_per_process = NUM_IMAGES // args.world_size
    micro_batches = images_per_process // args.batch_size
    updates_per_epoch = (micro_batches + args.grad_accum_steps - 1) // args.grad_accum_steps
    scheduler, num_epochs = build_scheduler(args, optimizer, updates_per_epoch)
    start_epoch = resume_epoch or 0
    if scheduler is not None and start_epoch > 0:
        if args.sched_on_updates:
            scheduler.step_update(start_epoch * updates_per_epoch)
        else:
            scheduler.step(start_epoch)
    for epoch in range(start_epoch, num_epochs):
        train_metrics = train_one_epoch(epoch, task, optimizer, scheduler, args, updates_per_epoch)
        eval_metrics = validate(task, args)
        if saver is not None:
            lr = optimizer.param_groups[0]["lr"]
            utils.update_summary(
                epoch, train_metrics, eval_metrics, filename=os.path.join(args.output, "summary.csv"), lr=lr
            )
            saver.save_checkpoint(epoch, metric=eval_metrics["loss"])
        if scheduler is not None:
            scheduler.step(epoch + 1, eval_metrics["loss"])
    if args.distributed:
        torch.distributed.destroy_process_group()


def images_of(epoch, args):
    generator = torch.Generator().manual_seed(epoch)
    images = torch.randn(NUM_IMAGES, 3, IMG_SIZE, IMG_SIZE, generator=generator)
    images[-1] *= 20  # the last process sees the largest activations
    targets = torch.randint(0, NUM_CLASSES, (NUM_IMAGES,), generator=generator)
    return images.chunk(args.world_size)[args.rank], targets.chunk(args.world_size)[args.rank]


def train_one_epoch(epoch, task, optimizer, scheduler, args, updates_per_epoch):
    task.trainable_module.train()
    images, targets = images_of(epoch, args)
    num_updates = epoch * updates_per_epoch
    losses, steps = utils.AverageMeter(), []
    micro_batches = list(zip(images.split(args.batch_size), targets.split(args.batch_size), strict=True))
    for index, (micro_images, micro_targets) in enumerate(micro_batches):
        group = index // args.grad_accum_steps * args.grad_accum_steps
        accum_steps = min(args.grad_accum_steps, len(micro_batches) - group)
        result = task(micro_images, micro_targets)
        losses.update(result["loss"].item(), micro_images.size(0))
        steps.append({name: float(v.detach() if torch.is_tensor(v) else v) for name, v in result.items() if wanted(v)})
        result["loss"] /= accum_steps
        result["loss"].backward()
        if index - group + 1 < accum_steps:
            continue
        num_updates += 1
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=num_updates)
        if scheduler is not None:
            scheduler.step_update(num_updates=num_updates, metric=losses.avg)
    with open(os.path.join(args.output, f"steps-{args.rank}.jsonl"), "a") as file:
        file.writelines(json.dumps({"epoch": epoch, **step}) + "\n" for step in steps)
    return {"loss": losses.avg}


def wanted(value):
    return isinstance(value, float) or (torch.is_tensor(value) and value.ndim == 0)


@torch.no_grad()
def validate(task, args):
    images, targets = images_of(1000, args)
    for ema in (False, *([True] if task.has_ema() else [])):
        model = task.get_eval_model(ema=ema)
        model.eval()
        output = model(images * 100)  # nothing of this may be counted as training
    return {"loss": float(nn.functional.cross_entropy(output, targets))}
