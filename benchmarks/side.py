"""Side networks against linear probe, LoRA and full fine-tuning: the tables of docs/side.md.

    OMP_NUM_THREADS=1 python benchmarks/side.py step                             # vit_small_patch16_224, batch 32
    OMP_NUM_THREADS=1 python benchmarks/side.py photos dinov2_small_224.safetensors
    OMP_NUM_THREADS=1 python benchmarks/side.py bases dinov2_small_224.safetensors
    OMP_NUM_THREADS=1 python benchmarks/side.py epoch                            # from a cache, against features

LoRA is peft's, which takes timm's models as they are: `pip install peft`, for `step` and `photos`.

`step` makes training steps of each method with random weights: the largest resident set of its process, less that of a
process that only imports what it needs, and the processor time of a step. Parameters, gradients and optimizer are part
of both.
Aims: LAST at most 0.4 of full fine-tuning's memory, and 0.6 of its time.

`epoch` computes the features of a DINOv2 ViT-S/14 with random weights into a cache, and trains an epoch from it,
reading included: processor time of an image in both. Aim: a tenth.

`bases` trains linear probes on features of the same DINOv2 in its own basis and in a rotated one.

`photos` trains each method on a real DINOv2 ViT-S/14 (timm's vit_small_patch14_dinov2, position embeddings for 224
pixels): 4 training crops of each of 14 photographs, 20 validation crops of other tiles; 32 pixels each, resized to 224.
No augmentation, AdamW, weight decay 0.01, cosine, batches of 14. Learning rates were chosen on the crops of seed 7, by
`--tune`, for every method; seeds 0, 1 and 2 have crops and initial weights of their own. Side networks and probe read
features that are computed once, in float32 or in a quantized backbone. Every training is a process of its own.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from tweo_timm import machine
from tweo_timm.photos import write_photo_crops
from tweo_timm.rewrite.methods import METHODS as METHODS_OF_ROTATION
from tweo_timm.side import Last, Miet
from tweo_timm.side.backbone import prepare
from tweo_timm.side.cache import CachedFeatures, FeatureCache
from tweo_timm.side.miet import in_transit, message_bytes

ARCH, CLASSES, TRAIN, VALIDATION, BATCH = "vit_small_patch14_dinov2", 14, 4, 20, 14
METHODS = ("probe", "last", "miet", "lora", "full")
RATES = {"probe": (1e-3, 3e-3, 1e-2), "last": (3e-4, 1e-3, 3e-3), "miet": (3e-4, 1e-3, 3e-3)}
RATES |= {"lora": (1e-3,), "full": (3e-5,)}
EPOCHS = {"probe": 60, "last": 30, "miet": 30, "lora": 10, "full": 10}
SEEDS = {"probe": (0, 1, 2), "last": (0, 1, 2), "miet": (0, 1, 2), "lora": (0,), "full": (0,)}
FLOAT = "float32"
PRECISIONS = (FLOAT, "w8a8-tt+res+rot")
TUNING_SEED = 7
PROBES = 20  # initial weights that `bases` averages over
# Memory is compared under a fixed policy of glibc, which costs time: docs of benchmarks/train_memory.py.
FIXED_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}


# ------------------------------------------------------------------------------------------------------- the methods


class Probe(nn.Module):
    """A linear layer on the class token of the frozen backbone, after its last norm."""

    def __init__(self, backbone: Any, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False).eval()
        self.fc = nn.Linear(backbone.num_features, num_classes)
        self.from_cache = False

    def features(self, images: Tensor) -> Tensor:
        """Return class tokens (B, C) of images."""
        with torch.no_grad():
            found: Tensor = self.backbone.forward_features(images)[:, 0]
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of images, or of features where `from_cache` is set."""
        y: Tensor = self.fc(x if self.from_cache else self.features(x))
        return y


def build(method: str, backbone: Any, num_classes: int) -> nn.Module:
    if method in ("last", "miet"):
        return {"last": Last, "miet": Miet}[method](backbone, num_classes)
    if method == "probe":
        return Probe(backbone, num_classes)
    backbone.reset_classifier(num_classes)
    if method == "lora":
        settings = importlib.import_module("peft").LoraConfig(r=8, target_modules=["qkv"], modules_to_save=["head"])
        backbone = importlib.import_module("peft").get_peft_model(backbone, settings)
    model: nn.Module = backbone
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def update(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, targets: Tensor) -> None:
    functional.cross_entropy(model(x), targets).backward()
    optimizer.step()
    optimizer.zero_grad()


# ------------------------------------------------------------------------------------------ memory and time of a step


def one_step(options: argparse.Namespace) -> dict[str, Any]:
    """Make steps with random weights; what this process took is counted by who started it."""
    if options.method.startswith("imports"):
        return {"of": [importlib.import_module(name).__name__ for name in options.method.split()[1:]]}
    torch.manual_seed(0)
    model = build(options.method, timm.create_model("vit_small_patch16_224", num_classes=0), 100).train()
    optimizer = torch.optim.AdamW(trained(model), 1e-3)
    times = []
    for _ in range(options.steps):
        images, targets = torch.randn(32, 3, 224, 224), torch.randint(0, 100, (32,))
        start = time.process_time()
        update(model, optimizer, images, targets)
        times.append(time.process_time() - start)
    return {"seconds": statistics.median(times[1:]), "parameters": sum(p.numel() for p in trained(model))}


def steps(options: argparse.Namespace) -> None:
    base = dict.fromkeys(METHODS, child("step", method="imports", steps=0)["peak_mib"])
    base["lora"] = child("step", method="imports peft", steps=0)["peak_mib"]
    found = {method: child("step", method=method, steps=options.steps) for method in METHODS}
    full = found["full"]
    alone = f"imports alone take {base['full']:.0f} MiB, with peft {base['lora']:.0f}"
    print(f"vit_small_patch16_224, batch 32, float32; {said()}; {alone}")
    print("| method | trained parameters | memory, MiB | of full | processor s a step | of full |")
    print("|---|---|---|---|---|---|")
    for method, row in found.items():
        memory, whole = row["peak_mib"] - base[method], full["peak_mib"] - base["full"]
        print(
            f"| {method} | {row['parameters']} | {memory:.0f} | {memory / whole:.2f} | {row['seconds']:.2f} | "
            f"{row['seconds'] / full['seconds']:.2f} |"
        )


def epochs(options: argparse.Namespace) -> None:
    """Compare the processor time of features with that of an epoch that reads them."""
    print(f"{ARCH} at 224 pixels, {options.images} images, batch {BATCH}, float32; {said()}")
    print("| network | features, s an image | epoch from the cache, s an image | ratio |\n|---|---|---|---|")
    for method in ("last", "miet"):
        found = child("epoch", method=method, images=options.images)
        print(
            f"| {method} | {found['features']:.4f} | {found['epoch']:.4f} | {found['epoch'] / found['features']:.3f} |"
        )


def one_epoch(options: argparse.Namespace) -> dict[str, Any]:
    net: Any = build(options.method, timm.create_model(ARCH, img_size=224, num_classes=0), CLASSES)
    images, targets = torch.randn(options.images, 3, 224, 224), torch.arange(options.images) % CLASSES
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(Path(folder), "train", {}, (len(images), 1, *net.feature_shape))
        cache.begin()
        start = time.process_time()
        for index in torch.split(torch.arange(len(images)), BATCH):
            cache.write(index, 0, net.features(images[index]))
        computed = (time.process_time() - start) / len(images)
        cache.finish(targets)
        net.from_cache = True
        optimizer, times = torch.optim.AdamW(trained(net), 1e-3), []
        for _ in range(3):
            start = time.process_time()
            for x, labels in DataLoader(CachedFeatures(cache, None), BATCH, shuffle=True):
                update(net.train(), optimizer, x, labels)
            times.append((time.process_time() - start) / len(images))
    return {"features": computed, "epoch": statistics.median(times)}


# ------------------------------------------------------------------------------------------------ real features, photos


def crops(folder: Path, seed: int, split: str) -> tuple[Tensor, Tensor]:
    root = write_photo_crops(folder / f"crops{seed}", TRAIN, VALIDATION, seed)
    config = timm.get_pretrained_cfg(ARCH)
    transform = create_transform((3, 224, 224), mean=config.mean, std=config.std, crop_pct=1.0, interpolation="bicubic")
    names = sorted(path.name for path in (root / split).iterdir())
    files = [(file, names.index(file.parent.name)) for file in sorted((root / split).glob("*/*.png"))]
    images = torch.stack([transform(Image.open(file).convert("RGB")) for file, _ in files])
    return images, torch.tensor([label for _, label in files])


def dinov2(checkpoint: str) -> Any:
    return timm.create_model(ARCH, img_size=224, num_classes=0, checkpoint_path=checkpoint).eval()


def features(options: argparse.Namespace) -> dict[str, Any]:
    """Compute what probe, LAST and MIET read of all crops of a seed, and write it to a file."""
    images = {split: crops(options.folder, options.seed, split) for split in ("train", "validation")}
    start = time.process_time()
    calibration = torch.split(images["train"][0][::2], BATCH)
    backbone, basis, _ = prepare(dinov2(options.checkpoint), ARCH, options.precision, lambda: calibration, 0, None)
    made = time.process_time() - start
    last, kept = Last(backbone, CLASSES, basis=basis), {}
    start = time.process_time()
    for split, (pixels, labels) in images.items():
        z = torch.cat([last.features(part) for part in torch.split(pixels, BATCH)])
        kept[split] = (z, labels)
    seconds = (time.process_time() - start) / sum(len(pixels) for pixels, _ in images.values())
    norm = {name: value.clone() for name, value in last.head.norm.state_dict().items()}
    torch.save({**kept, "norm": norm}, options.folder / f"features-{options.seed}-{options.precision}.pt")
    return {"seconds_per_image": seconds, "seconds_to_quantize": made}


def training(options: argparse.Namespace) -> dict[str, Any]:
    """Train one method on the crops of a seed."""
    torch.manual_seed(options.seed)
    model = build(options.method, dinov2(options.checkpoint), CLASSES)
    data, norm = _inputs(options)
    if norm is not None and hasattr(model, "head"):
        model.head.norm.load_state_dict(norm)
    model.from_cache = norm is not None
    optimizer = torch.optim.AdamW(trained(model), options.rate, weight_decay=0.01)
    times = _fit(model, optimizer, data, options.epochs, options.seed)
    model.eval()
    row = {"top1": _top1(model, *data["validation"]), "seconds": statistics.median(times)}
    row["parameters"] = sum(p.numel() for p in trained(model))
    if options.method == "miet":
        messages, labels = data["validation"]
        row |= {f"top1_{bits}": _top1(model, in_transit(messages, bits), labels) for bits in (16, 8)}
        row |= {f"bytes_{bits}": message_bytes(*messages.shape[2:], bits) for bits in (16, 8)}
    return row


def _fit(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: dict[str, tuple[Tensor, Tensor]], epochs: int, seed: int
) -> list[float]:
    """Train by a cosine from the optimizer's rate; processor seconds of each epoch."""
    x, targets = data["train"]
    per_epoch, order, rate = -(-len(x) // BATCH), torch.Generator().manual_seed(seed), optimizer.defaults["lr"]
    times = []
    for epoch in range(epochs):
        start = time.process_time()
        model.train()
        for index, chosen in enumerate(torch.split(torch.randperm(len(x), generator=order), BATCH)):
            done = (epoch + index / per_epoch) / epochs
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * done))
            update(model, optimizer, x[chosen], targets[chosen])
        times.append(time.process_time() - start)
    return times


def _inputs(options: argparse.Namespace) -> tuple[dict[str, tuple[Tensor, Tensor]], Any]:
    """Images, or the features that a method reads, by split."""
    if options.method in ("lora", "full"):
        return {split: crops(options.folder, options.seed, split) for split in ("train", "validation")}, None
    kept = torch.load(options.folder / f"features-{options.seed}-{options.precision}.pt", mmap=True)
    norm = kept.pop("norm")
    if options.method == "last":
        return kept, norm
    read = {"miet": lambda z: z.sum(1, keepdim=True)}
    width = len(norm["weight"])
    read["probe"] = lambda z: functional.layer_norm(z[:, -1, 0], (width,), norm["weight"], norm["bias"], 1e-6)
    return {split: (read[options.method](z), labels) for split, (z, labels) in kept.items()}, norm


@torch.no_grad()
def _top1(model: nn.Module, x: Tensor, targets: Tensor) -> float:
    found = torch.cat([model(part) for part in torch.split(x, BATCH)]).argmax(1)
    return 100 * float((found == targets).double().mean())


def photos(options: argparse.Namespace) -> None:
    rates, shared = _tuned(options), {"folder": options.folder, "checkpoint": options.checkpoint}
    print(f"{ARCH}, {TRAIN} training and {VALIDATION} validation crops of each photograph; {said()}")
    print(
        "| method | backbone | rate | Top-1 % by seed | mean | trained parameters | peak MiB | processor s an epoch |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    costs, edge = [], []
    for precision in options.precisions:
        costs += [child("features", seed=seed, precision=precision, **shared) for seed in (0, 1, 2)]
        for method in METHODS if precision == FLOAT else METHODS[:3]:
            settings = {"method": method, "precision": precision, "rate": rates[method], "epochs": EPOCHS[method]}
            rows = [child("training", seed=seed, **settings, **shared) for seed in SEEDS[method]]
            edge += [(precision, row) for row in rows if method == "miet"]
            top1 = [row["top1"] for row in rows]
            print(
                f"| {method} | {precision} | {rates[method]:g} | {', '.join(f'{value:.1f}' for value in top1)} | "
                f"{statistics.mean(top1):.1f} | {rows[0]['parameters']} | {max(row['peak_mib'] for row in rows):.0f} | "
                f"{statistics.median(row['seconds'] for row in rows):.2f} |",
                flush=True,
            )
    for precision, cost in zip([p for p in options.precisions for _ in range(3)], costs, strict=True):
        each, made = cost["seconds_per_image"], cost["seconds_to_quantize"]
        print(f"features in {precision}: {each:.3f} s an image; the backbone was made in {made:.0f} s")
    print("| backbone of miet | float32 | 16 bits | 8 bits | bytes an image, 16 and 8 bits |\n|---|---|---|---|---|")
    for precision, row in edge:
        sizes = f"{row['bytes_16']}, {row['bytes_8']}"
        print(f"| {precision} | {row['top1']:.1f} | {row['top1_16']:.1f} | {row['top1_8']:.1f} | {sizes} |")


def _tuned(options: argparse.Namespace) -> dict[str, float]:
    """The rates that are best on crops of another seed, or the middle ones without --tune."""
    if not options.tune:
        return {method: rates[len(rates) // 2] for method, rates in RATES.items()}
    shared = {"folder": options.folder, "checkpoint": options.checkpoint, "seed": TUNING_SEED}
    child("features", precision=FLOAT, **shared)
    best = {}
    for method, rates in RATES.items():
        settings = {"method": method, "precision": FLOAT, "epochs": EPOCHS[method], **shared}
        top1 = {rate: child("training", rate=rate, **settings)["top1"] for rate in rates} if len(rates) > 1 else {}
        best[method] = max(top1, key=lambda rate: top1[rate]) if top1 else rates[0]
        print(f"tuning {method}: {', '.join(f'{rate:g} {value:.1f}' for rate, value in top1.items())}", flush=True)
    return best


def bases(options: argparse.Namespace) -> None:
    """Compare probes in the backbone's own basis and in a rotated one, by class tokens of the crops of seed 0."""
    shared = {"seed": 0, "folder": options.folder, "checkpoint": options.checkpoint}
    kept = {}
    for precision in (FLOAT, options.precision):
        path = options.folder / f"features-0-{precision}.pt"
        if not path.exists():
            child("features", precision=precision, **shared)
        kept[precision] = torch.load(path, mmap=True)
    norm = kept[FLOAT]["norm"]
    turned = METHODS_OF_ROTATION["random"].draw.load()(len(norm["weight"]), torch.Generator().manual_seed(0)).float()
    rms = norm["weight"].square().mean().sqrt().expand_as(norm["weight"])
    bases = {
        "its own": lambda z: functional.layer_norm(z, z.shape[1:], norm["weight"], norm["bias"], 1e-6),
        "rotated, its gains at their rms": lambda z: functional.layer_norm(z @ turned, z.shape[1:], rms, None, 1e-6),
        "rotated, gains of 1": lambda z: functional.layer_norm(z @ turned, z.shape[1:], None, None, 1e-6),
    }
    print(f"{ARCH}, crops of seed 0, linear probes of {PROBES} initial weights; {said()}")
    print("| backbone | basis and norm | Top-1 %, mean | least, most |\n|---|---|---|---|")
    for precision, splits in kept.items():
        for name, read in bases.items():
            data = {split: (read(splits[split][0][:, -1, 0]), splits[split][1]) for split in ("train", "validation")}
            top1 = [_probed(data, seed) for seed in range(PROBES)]
            ends = f"{min(top1):.1f}, {max(top1):.1f}"
            print(f"| {precision} | {name} | {statistics.mean(top1):.1f} | {ends} |", flush=True)


def _probed(data: dict[str, tuple[Tensor, Tensor]], seed: int) -> float:
    torch.manual_seed(seed)
    fc = nn.Linear(data["train"][0].shape[1], CLASSES)
    _fit(fc, torch.optim.AdamW(fc.parameters(), RATES["probe"][1], weight_decay=0.01), data, EPOCHS["probe"], seed)
    return _top1(fc, *data["validation"])


# ---------------------------------------------------------------------------------------------------------- processes


def child(task: str, **settings: Any) -> dict[str, Any]:
    """Run one task in a process of its own; what it printed as JSON, with its largest resident set."""
    words = [sys.executable, __file__, "child", task]
    words += [f"--{name}={value}" for name, value in settings.items()]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, env=os.environ | (FIXED_MALLOC if task != "epoch" else {})
    )
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}")
    return {**json.loads(printed.splitlines()[-1]), "peak_mib": usage.ru_maxrss / 1024}


def said() -> str:
    processor = machine.describe()["processor"]
    return f"torch {torch.__version__}, timm {timm.__version__}, {torch.get_num_threads()} thread, {processor}"


TASKS = {"step": one_step, "epoch": one_epoch, "features": features, "training": training}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step")
    step.add_argument("--steps", type=int, default=4)
    photo = commands.add_parser("photos")
    photo.add_argument("checkpoint", type=Path, help=f"of {ARCH}, position embeddings for 224 pixels")
    photo.add_argument("--folder", type=Path, default=Path("output/side"), help="for crops and features, 2 GB")
    photo.add_argument("--precisions", nargs="+", default=PRECISIONS, help="of the backbone: float32, or schemes")
    photo.add_argument("--tune", action="store_true", help="choose the rates on the crops of another seed")
    basis = commands.add_parser("bases")
    basis.add_argument("checkpoint", type=Path, help=f"of {ARCH}, position embeddings for 224 pixels")
    basis.add_argument("--folder", type=Path, default=Path("output/side"), help="for crops and features, 2 GB")
    basis.add_argument("--precision", default=PRECISIONS[1], help="the scheme of the backbone beside float32")
    epoch = commands.add_parser("epoch")
    epoch.add_argument("--images", type=int, default=56)
    inner = commands.add_parser("child", help="what a process of its own does")
    inner.add_argument("task", choices=TASKS)
    for name, kind in {"method": str, "precision": str, "checkpoint": str, "folder": Path}.items():
        inner.add_argument(f"--{name}", type=kind)
    for name, number in {"steps": int, "images": int, "seed": int, "epochs": int, "rate": float}.items():
        inner.add_argument(f"--{name}", type=number)
    options = parser.parse_args()
    if options.command == "child":
        print(json.dumps(TASKS[options.task](options)))
        return
    if options.command in ("step", "photos") and importlib.util.find_spec("peft") is None:
        parser.error(f"{options.command} compares with LoRA, which is peft's and not installed: pip install peft")
    if options.command in ("photos", "bases"):
        options.folder.mkdir(parents=True, exist_ok=True)
    {"step": steps, "epoch": epochs, "photos": photos, "bases": bases}[options.command](options)


if __name__ == "__main__":
    main()
