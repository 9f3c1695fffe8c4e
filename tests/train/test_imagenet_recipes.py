"""Every ImageNet recipe, built: model and optimizer against what was published, read from the modules themselves."""

import math
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.layers import LayerScale
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs

from tweo_timm.blocks import find_blocks
from tweo_timm.evaluate.options import parse_validate_options
from tweo_timm.run.world import World
from tweo_timm.train.build import build_optimizer
from tweo_timm.train.cli import main
from tweo_timm.train.model import build_model
from tweo_timm.train.options import TrainOptions, as_namespace, parse_train_options
from tweo_timm.train.rate import resolved_lr

RECIPES = Path(__file__).parents[2] / "recipes"
GPUS = 8
IMAGENET = 1_281_167
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Published:
    """What a paper or its repository says of a training; `drop` is the rate of the last block."""

    parameters_m: float
    width: int
    depth: int
    drop: float
    lr: float = 1e-3
    batch: int = 1024
    epochs: int = 300
    size: int = 224
    crop: float = 0.875
    optimizer: str = "AdamW"
    decay: float = 0.05
    clip: float | None = None
    loss: str = "ce"
    constant_drop: bool = False
    layer_scale: float | None = None
    undecayed: tuple[str, ...] = ("pos_embed", "cls_token")


def deit3(parameters_m, width, depth, drop, **others):
    first = {"lr": 3e-3, "batch": 2048, "epochs": 800, "size": 192, "optimizer": "Lamb", "loss": "bce"}
    shared = {"crop": 1.0, "constant_drop": True, "layer_scale": 1e-4}
    return Published(parameters_m, width, depth, drop, **{**first, **shared, **others})


def second(parameters_m, width, depth, drop):
    settings = {"lr": 1e-5, "batch": 512, "epochs": 20, "size": 224, "optimizer": "AdamW", "decay": 0.1, "loss": "ce"}
    return deit3(parameters_m, width, depth, drop, **settings)


def swin(parameters_m, width, depth, drop):
    tables = ("relative_position_bias_table",)
    return Published(parameters_m, width, depth, drop, clip=5.0, undecayed=tables)


# Sizes in millions: README_deit.md, README_revenge.md, and the model zoo of microsoft/Swin-Transformer.
PUBLISHED = {
    "deit_tiny": Published(5, 192, 12, 0.1),
    "deit_small": Published(22, 384, 12, 0.1),
    "deit_base": Published(86, 768, 12, 0.1),
    "vit_small": Published(22, 384, 12, 0.1),
    "vit_base": Published(86, 768, 12, 0.1),
    "deit3_small": deit3(22.0, 384, 12, 0.05, lr=4e-3, size=224),
    "deit3_base": deit3(86.6, 768, 12, 0.2),
    "deit3_large": deit3(304.4, 1024, 24, 0.45),
    "deit3_base_finetune": second(86.6, 768, 12, 0.2),
    "deit3_large_finetune": second(304.4, 1024, 24, 0.45),
    "swin_tiny": swin(28, 96, 12, 0.2),
    "swin_small": swin(50, 96, 24, 0.3),
    "swin_base": swin(88, 128, 24, 0.5),
}
VARIANTS = ("", "_fp8", "_tweo", "_tweo_fp8")
NAMES = [base + variant for base in PUBLISHED for variant in VARIANTS]
# The quickstart's recipes are run here, and described with their results.
PATHS = sorted(path for path in RECIPES.glob("*.yaml") if not path.stem.startswith(("quickstart", "repair", "side")))


def recipe(name: str, *words: str) -> TrainOptions:
    return parse_train_options(["-c", str(RECIPES / f"{name}.yaml"), "--data-dir", "/data", *words])


@pytest.fixture(scope="module", params=PUBLISHED)
def built(request):
    """The options of a recipe, its model and its optimizer, without memory for the weights."""
    options = recipe(request.param)
    with torch.device("meta"):
        model = build_model(options, World(torch.device("meta")))
    namespace = as_namespace(options)
    namespace.lr = resolved_lr(options, PUBLISHED[request.param].batch)
    return PUBLISHED[request.param], options, model, build_optimizer(options, namespace, model)


def test_every_imagenet_recipe_is_published_here():
    assert {path.stem for path in PATHS} == set(NAMES)


def test_the_model_is_the_published_one(built):
    published, _, model, _ = built
    blocks = list(find_blocks(model).values())
    assert len(blocks) == published.depth
    assert blocks[0].norm1.normalized_shape == (published.width,)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(
        published.parameters_m, rel=0.15 if published.parameters_m == 5 else 0.015
    )
    assert tuple(model.patch_embed.img_size) == (published.size, published.size)
    assert model(torch.zeros(1, 3, published.size, published.size, device="meta")).shape == (1, 1000)


def test_stochastic_depth_of_every_block_is_the_published_one(built):
    published, _, model, _ = built
    for name in ("drop_path1", "drop_path2"):
        rates = [getattr(getattr(block, name), "drop_prob", 0.0) for block in find_blocks(model).values()]
        last = published.drop
        expected = [last if published.constant_drop else last * i / (len(rates) - 1) for i in range(len(rates))]
        assert rates == pytest.approx(expected, rel=1e-5)


def test_layer_scale_starts_as_published(built):
    published, _, model, _ = built
    scales = [module for module in model.modules() if isinstance(module, LayerScale)]
    assert len(scales) == (0 if published.layer_scale is None else 2 * published.depth)
    assert {scale.init_values for scale in scales} == ({published.layer_scale} - {None})
    for scale in scales[:1]:  # what it fills gamma with, which a model without memory does not hold
        filled = LayerScale(4, scale.init_values)
        assert filled.gamma.tolist() == pytest.approx([published.layer_scale] * 4)


def test_the_optimizer_is_the_published_one(built):
    published, options, model, optimizer = built
    assert type(optimizer).__name__ == published.optimizer
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay_of = {}
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(published.lr, rel=1e-12)
        assert group["eps"] == 1e-8
        assert tuple(group["betas"]) == (0.9, 0.999)
        decay_of |= {names[id(parameter)]: group["weight_decay"] for parameter in group["params"]}
    assert decay_of.keys() == set(names.values())
    for name, parameter in model.named_parameters():
        free = parameter.ndim == 1 or name.split(".")[-1] in published.undecayed
        assert decay_of[name] == (0 if free else published.decay), name
    assert options.clip_grad == published.clip


def test_batch_images_loss_and_precision_are_the_published_ones(built):
    published, options, _, _ = built
    assert options.batch_size * GPUS * options.grad_accum_steps == options.global_batch == published.batch
    assert (options.epochs, options.crop_pct, options.amp_dtype) == (published.epochs, published.crop, "bfloat16")
    assert ("bce" if options.bce_loss else "ce") == published.loss
    assert (options.mixup, options.cutmix) == (0.8, 1.0)
    data = resolve_data_config(
        vars(as_namespace(options)), pretrained_cfg=timm.get_pretrained_cfg(options.model).to_dict()
    )
    assert (data["input_size"], data["crop_pct"]) == ((3, published.size, published.size), published.crop)
    assert (tuple(data["mean"]), tuple(data["std"])) == (MEAN, STD)


def test_schedule_has_the_published_length_peak_and_end(built):
    published, options, _, _ = built
    updates = IMAGENET // published.batch
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=published.lr)
    scheduler, num_epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(as_namespace(options)), updates_per_epoch=updates
    )
    assert num_epochs == published.epochs
    assert num_epochs * updates == {1024: 375_300, 2048: 500_000, 512: 50_040}[published.batch]
    assert options.warmup_lr == 1e-6
    step = updates if options.sched_on_updates else 1
    epochs = range(published.epochs)
    rates = [scheduler._get_values(epoch * step, on_epoch=not options.sched_on_updates)[0] for epoch in epochs]
    assert rates[0] == pytest.approx(1e-6)
    # The cosine is timm's, so the peak right after the warm-up is a little below the nominal rate.
    assert max(rates) == pytest.approx(published.lr, rel=0.02)
    assert rates[-1] == pytest.approx(options.min_lr, rel=0.02)


def test_matrix_sizes_suit_fp8(built):
    _, options, model, _ = built
    # FP8 matrix products need multiples of 16, the number of tokens included; only the 1000 classes are none.
    assert options.batch_size % 16 == 0
    misfits = [
        module.out_features
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and math.gcd(module.in_features, module.out_features, 16) != 16
    ]
    assert misfits == [1000]


@pytest.mark.parametrize("name", PUBLISHED)
def test_arms_change_only_what_their_name_says(name):
    plain, fp8, tweo, both = (recipe(name + variant) for variant in VARIANTS)

    def changed(one: TrainOptions, other: TrainOptions) -> set[str]:
        return {key for key in vars(one) if getattr(one, key) != getattr(other, key)} - {"config"}

    assert (plain.tweo_weight, plain.fp8) == (0, "off")
    assert changed(plain, tweo) == changed(fp8, both) == {"tweo_weight"}
    assert changed(plain, fp8) == changed(tweo, both) == {"fp8"}
    # The paper's settings.
    assert (tweo.tweo_weight, tweo.tweo_tau, tweo.tweo_power, tweo.tweo_schedule) == (0.01, 3, 4, "constant")
    assert (fp8.fp8_format, fp8.fp8_scaling, fp8.fp8_amax_history, fp8.fp8_exclude) == ("hybrid", "delayed", 16, [])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_updates_of_the_recipe_run(name, images, tmp_path):
    fp8 = ["--fp8", "emulated"] if "_fp8" in name else []
    here = ["--device", "cpu", "--no-amp", "-j", "0", "--no-pin-mem", "--aug-repeats", "0", "--grad-accum-steps", "1"]
    tiny = ["--img-size", "32", "--num-classes", "3", "-b", "28", "--epochs", "1", "--warmup-epochs", "0"]
    words = ["-c", name, *fp8, *here, *tiny, "--data-dir", str(images), "--output", str(tmp_path)]
    assert main([*words, "--experiment", "run"]) == 0
    assert (tmp_path / "run" / "last.pth.tar").exists()


def script(tmp_path, broken=""):
    """Run recipes/imagenet.sh with commands that write down how they were called, the arm `broken` failing."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "torchrun").write_text(
        '#!/bin/sh\necho "torchrun $*" >> "$CALLS"\n'
        'while [ "$1" != --experiment ]; do [ "$1" = --output ] && output=$2; shift; done\n'
        f'mkdir -p "$output/$2"; [ "$2" = "{broken}" ] && exit 1; touch "$output/$2/last.pth.tar"\n'
    )
    (tools / "tweo-validate").write_text('#!/bin/sh\necho "tweo-validate $*" >> "$CALLS"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    (tmp_path / "my data").mkdir()
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "CALLS": str(tmp_path / "calls")}
    words = ["sh", str(RECIPES / "imagenet.sh"), "vit_base", "my data", "my output"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, check=False)
    return done.returncode, (tmp_path / "calls").read_text().splitlines()


def test_the_script_trains_four_arms_and_compares_them_once(tmp_path):
    status, calls = script(tmp_path)
    arms = [f"vit_base{variant}" for variant in VARIANTS]
    assert status == 0
    assert [call.split(" -c ")[1].split()[0] for call in calls[:-1]] == arms
    assert calls[-1].startswith(f"tweo-validate --checkpoint {' '.join(f'{arm}/last.pth.tar' for arm in arms)} ")
    for call in calls[:-1]:  # the commands know every word
        parse_train_options(call.replace("my ", "my").split("tweo_timm.train ")[1].split())
    parse_validate_options(calls[-1].replace("my ", "my").split()[1:])


def test_the_script_compares_what_there_is_when_an_arm_breaks(tmp_path):
    status, calls = script(tmp_path, broken="vit_base_fp8")
    assert status == 1
    assert len(calls) == 5
    assert "vit_base_fp8" not in calls[-1]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_header_says_how_to_run_it_and_that_nobody_here_has(path):
    header = path.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"torchrun --nproc-per-node 8 train.py -c recipes/{path.name}" in header
    for label in ("Source:", "Uncertain:", "Expected:"):
        assert label in header
    assert "not run by us" in header
