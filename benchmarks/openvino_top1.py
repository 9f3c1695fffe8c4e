r"""Top-1 of exported files in OpenVINO, beside onnxruntime's, over a validation folder.

    pip install openvino
    python benchmarks/openvino_top1.py out/stress.onnx --data-dir quickstart/photos --size 32 --mean 0.5 --std 0.5 \
        --crop-pct 1

Give it the standard files (`name.onnx`): OpenVINO does not know the operators of the ones for onnxruntime. Printed:
Top-1 in both engines, the share of images with the same first class, and how far the logits are from onnxruntime's, in
per cent of their norm. On x86 without VNNI products of weights of 8 bits saturate in OpenVINO, which has no option
against it: give it a file with weights of 7 bits (w7a8-tt). Logits that are further than 10 % are marked as wrong, and
the exit status is 1.
"""

from __future__ import annotations

import argparse

import openvino
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset, create_loader

from tweo_timm.quant.deploy import RELATIVE_ERROR_LIMIT, Agreement
from tweo_timm.quant.latency import file_run

PRECISIONS = {"OpenVINO": "f32", "OpenVINO, rest bfloat16": "bf16"}


def main() -> int:
    options = parse()
    dataset = create_dataset("", root=options.data_dir, split="validation")
    status = 0
    for file in options.files:
        loader = create_loader(
            dataset,
            (3, options.size, options.size),
            options.batch,
            interpolation="bicubic",
            mean=[options.mean] * 3 if options.mean is not None else IMAGENET_DEFAULT_MEAN,
            std=[options.std] * 3 if options.std is not None else IMAGENET_DEFAULT_STD,
            crop_pct=options.crop_pct,
            num_workers=0,
            device=torch.device("cpu"),
        )
        print(file)
        for label, (top1, agreement, distance) in compare(file, loader).items():
            right = distance <= 100 * RELATIVE_ERROR_LIMIT
            words = f"Top-1 {top1:6.2f}   same class as onnxruntime {agreement:6.2f} %   logits off by {distance:.2g} %"
            print(f"  {label:24s} {words}{'' if right else ': wrong'}")
            status |= not right
    return int(status)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--mean", type=float, help="of every channel; ImageNet's if not given")
    parser.add_argument("--std", type=float)
    parser.add_argument("--crop-pct", type=float)
    parser.add_argument("--batch", type=int, default=64)
    return parser.parse_args()


def compare(file: str, loader) -> dict[str, tuple[float, float, float]]:
    """Per cent of images: right, and classified as by onnxruntime; and the norm of the difference in per cent."""
    reference = file_run(file)
    runs = {"onnxruntime": lambda images: torch.from_numpy(reference(images)[0])}
    has_bfloat16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    for label, precision in PRECISIONS.items():
        if precision == "bf16" and not has_bfloat16:
            continue
        compiled = openvino.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": precision})
        runs[label] = lambda images, compiled=compiled: torch.from_numpy(compiled([images.numpy()])[0].copy())
    counts, total = {label: [0, 0] for label in runs}, 0
    distances = {label: Agreement() for label in runs}
    for images, targets in loader:
        logits = {label: run(images) for label, run in runs.items()}
        for label, found in logits.items():
            distances[label].update(logits["onnxruntime"], found, logits["onnxruntime"])
        classes = {label: found.argmax(-1) for label, found in logits.items()}
        for label, found in classes.items():
            counts[label][0] += int((found == targets).sum())
            counts[label][1] += int((found == classes["onnxruntime"]).sum())
        total += len(targets)
    return {
        label: (100 * right / total, 100 * same / total, 100 * distances[label].summary()["relative_error"])
        for label, (right, same) in counts.items()
    }


if __name__ == "__main__":
    raise SystemExit(main())
