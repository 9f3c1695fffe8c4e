import math
from pathlib import Path

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs

from tweo_timm.blocks import find_blocks
from tweo_timm.train.options import TrainOptions, as_namespace, parse_train_options, resolved_lr

RECIPES = Path(__file__).parents[2] / "recipes"
GPUS = 8
IMAGENET = 1_281_167
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Name -> learning rate, global batch, epochs, drop path, training size, crop, blocks: the published settings.
PUBLISHED = {
    "deit_small": (1e-3, 1024, 300, 0.1, 224, 0.875, 12),
    "deit_base": (1e-3, 1024, 300, 0.1, 224, 0.875, 12),
    "vit_small": (1e-3, 1024, 300, 0.1, 224, 0.875, 12),
    "vit_base": (1e-3, 1024, 300, 0.1, 224, 0.875, 12),
    "deit3_small": (4e-3, 2048, 800, 0.05, 224, 1.0, 12),
    "deit3_base": (3e-3, 2048, 800, 0.2, 192, 1.0, 12),
    "deit3_base_finetune": (1e-5, 512, 20, 0.2, 224, 1.0, 12),
    "swin_tiny": (1e-3, 1024, 300, 0.2, 224, 0.875, 12),
    "swin_small": (1e-3, 1024, 300, 0.3, 224, 0.875, 24),
    "swin_base": (1e-3, 1024, 300, 0.5, 224, 0.875, 24),
}
VARIANTS = ("", "_tweo", "_tweo_fp8")
# The quickstart's recipes are run here, and described with their results.
PATHS = sorted(path for path in RECIPES.glob("*.yaml") if not path.stem.startswith("quickstart"))


def recipe(name: str) -> TrainOptions:
    return parse_train_options(["-c", str(RECIPES / f"{name}.yaml"), "--data-dir", "/data"])


def test_every_imagenet_recipe_is_published_here():
    assert {path.stem for path in PATHS} == {base + variant for base in PUBLISHED for variant in VARIANTS}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_gives_the_published_numbers(name):
    lr, global_batch, epochs, drop_path, size, crop, _ = PUBLISHED[name]
    options = recipe(name)
    assert options.batch_size * GPUS * options.grad_accum_steps == global_batch
    assert resolved_lr(options, global_batch) == pytest.approx(lr, rel=1e-12)
    assert (options.epochs, options.drop_path, options.crop_pct) == (epochs, drop_path, crop)
    assert options.amp_dtype == "bfloat16"
    data = resolve_data_config(
        vars(as_namespace(options)), pretrained_cfg=timm.get_pretrained_cfg(options.model).to_dict()
    )
    assert (data["input_size"], data["crop_pct"]) == ((3, size, size), crop)
    assert (tuple(data["mean"]), tuple(data["std"])) == (MEAN, STD)


@pytest.mark.parametrize("name", PUBLISHED)
def test_schedule_has_the_published_length_peak_and_end(name):
    lr, global_batch, epochs, *_ = PUBLISHED[name]
    options = recipe(name)
    updates = IMAGENET // global_batch
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, num_epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(as_namespace(options)), updates_per_epoch=updates
    )
    assert num_epochs == epochs
    assert num_epochs * updates == {1024: 375_300, 2048: 500_000, 512: 50_040}[global_batch]
    assert options.warmup_lr == 1e-6
    step = updates if options.sched_on_updates else 1
    rates = [scheduler._get_values(epoch * step, on_epoch=not options.sched_on_updates)[0] for epoch in range(epochs)]
    assert rates[0] == pytest.approx(1e-6)
    # The cosine is timm's, so the peak right after the warm-up is a little below the nominal rate.
    assert max(rates) == pytest.approx(lr, rel=0.02)
    assert rates[-1] == pytest.approx(options.min_lr, rel=0.02)


@pytest.mark.parametrize("name", PUBLISHED)
def test_variants_change_only_what_their_name_says(name):
    plain, tweo, fp8 = (recipe(name + variant) for variant in VARIANTS)
    names = vars(plain)

    def changed(one: TrainOptions, other: TrainOptions) -> set[str]:
        return {key for key in names if getattr(one, key) != getattr(other, key)} - {"config"}

    assert plain.tweo_weight == 0
    assert plain.fp8 == "off"
    assert changed(plain, tweo) == {"tweo_weight"}
    assert changed(tweo, fp8) == {"fp8"}
    # The paper's settings.
    assert (tweo.tweo_weight, tweo.tweo_tau, tweo.tweo_power, tweo.tweo_schedule) == (0.01, 3, 4, "constant")
    assert (fp8.fp8_format, fp8.fp8_scaling, fp8.fp8_amax_history, fp8.fp8_exclude) == ("hybrid", "delayed", 16, [])


@pytest.mark.parametrize("name", PUBLISHED)
def test_model_builds_and_its_matrix_sizes_suit_fp8(name):
    options = recipe(f"{name}_tweo_fp8")
    with torch.device("meta"):
        model = timm.create_model(options.model, drop_path_rate=options.drop_path, **options.model_kwargs)
    *_, size, _, num_blocks = PUBLISHED[name]
    assert len(find_blocks(model)) == num_blocks
    assert model(torch.zeros(1, 3, size, size, device="meta")).shape == (1, 1000)
    # FP8 matrix products need multiples of 16, the number of tokens included; only the 1000 classes are none.
    assert options.batch_size % 16 == 0
    misfits = [
        module.out_features
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and math.gcd(module.in_features, module.out_features, 16) != 16
    ]
    assert misfits == [1000]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_header_says_how_to_run_it_and_that_nobody_here_has(path):
    header = path.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"torchrun --nproc-per-node 8 train.py -c recipes/{path.name}" in header
    for label in ("Source:", "Uncertain:", "Expected:"):
        assert label in header
    assert "not run by us" in header
