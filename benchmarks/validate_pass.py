"""What validate.py's pass over the data costs, against a plain loop over the same timm parts.

    python benchmarks/validate_pass.py            # vit_small_patch16_224 at 224 pixels, batch 16, two minutes on 2
    cores

Three ways to the same Top-1 take turns, round by round: a plain loop (timm's loader, the model, timm's accuracy), the
pass of validate.py for Top-1 alone, and the same with the statistics of every block's output. Printed: the median time
of each, and the median over rounds of its ratio to the plain loop of that round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.utils import AverageMeter, accuracy

from tweo_timm.evaluate.images import open_images
from tweo_timm.evaluate.options import ValidateOptions
from tweo_timm.evaluate.scoring import score
from tweo_timm.outliers import record_outliers
from tweo_timm.photos import write_photo_crops
from tweo_timm.run.world import World


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--crops", type=int, default=5, help="images of each of the 14 photographs")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    arguments = parser.parse_args()
    world = World(torch.device("cpu"))
    model = timm.create_model(arguments.model, num_classes=14, img_size=arguments.img_size).eval()
    config = resolve_data_config({"input_size": (3, arguments.img_size, arguments.img_size)}, model=model)
    with tempfile.TemporaryDirectory() as folder:
        photos = write_photo_crops(Path(folder) / "photos", train=1, validation=arguments.crops)
        options = ValidateOptions(
            data_dir=str(photos),
            batch_size=arguments.batch_size,
            workers=0,
            device="cpu",
            amp=arguments.amp,
            amp_dtype="bfloat16",
        )
        images = open_images(options, config, 14, world)

        def plain() -> float:
            return plain_loop(model, photos, config, arguments.batch_size, arguments.amp)

        def top1() -> float:
            return score(model, images, options, world, "").metrics["top1"]

        def with_outliers() -> float:
            with record_outliers(model) as record:
                result = score(model, images, options, world, "").metrics["top1"]
            record.summary()
            return result

        report(arguments, {"plain timm loop": plain, "validate.py, Top-1": top1, "with outliers": with_outliers})


def plain_loop(model: torch.nn.Module, photos: Path, config: dict, batch_size: int, amp: bool) -> float:
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    loader = create_loader(
        create_dataset("", root=str(photos), split="validation"),
        batch_size=batch_size,
        num_workers=0,
        device=torch.device("cpu"),
        **{key: config[key] for key in keys},
    )
    top1 = AverageMeter()
    with torch.inference_mode():
        for images, targets in loader:
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                output = model(images)
            top1.update(accuracy(output, targets)[0].item(), len(targets))
    return top1.avg


def report(arguments: argparse.Namespace, ways: dict) -> None:
    times: dict[str, list[float]] = {name: [] for name in ways}
    answers = {}
    for way in ways.values():  # warm-up
        way()
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            answers[name] = way()
            times[name].append(time.perf_counter() - start)
    assert max(answers.values()) - min(answers.values()) < 1e-3, answers
    baseline = times[next(iter(ways))]
    precision = "bfloat16 autocast" if arguments.amp else "float32"
    print(
        f"{arguments.model}, {14 * arguments.crops} images of {arguments.img_size} px, batch {arguments.batch_size}, "
        f"{precision}, {torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.rounds} rounds"
    )
    print("| pass | median s | ratio, median (min to max) |\n|---|---|---|")
    for name, measured in times.items():
        ratios = [mine / theirs for mine, theirs in zip(measured, baseline, strict=True)]
        print(
            f"| {name} | {statistics.median(measured):.2f} | "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |"
        )


if __name__ == "__main__":
    main()
