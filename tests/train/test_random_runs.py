"""Options in combinations that nobody chose: whatever runs at all, continues after an interruption bit for bit."""

import shutil
import signal

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from tests.models import as_words
from tests.quant.families import FAMILIES
from tests.train.runs import TINY, VIT, command, last, same_tensors
from tweo_timm.train.cli import main

IMAGES = ["--num-classes", "3", "--input-size", "3", "32", "32"]
MODELS = [
    VIT,
    ["--model", "deit3_small_patch16_224", "--model-kwargs", *TINY, *IMAGES],
    ["--model", "eva02_tiny_patch14_224", "--model-kwargs", *TINY, *IMAGES],
    ["--model", "swinv2_tiny_window8_256", "--model-kwargs", *as_words(FAMILIES["swinv2"][1]), *IMAGES],
    ["--model", "resnet10t", *IMAGES],
]
# Of each group nothing, or one.
GROUPS = [
    ["--opt lamb", "--opt lookahead_adamw", "--opt lion", "--opt muon", "--opt adafactorbv", "--opt sgd --momentum 0"],
    ["--sched plateau --patience-epochs 0", "--sched step --decay-epochs 1", "--sched wsd", "--lr-noise 0.1 0.9"],
    ["--sched-on-updates", "--warmup-epochs 1 --warmup-prefix", "--cooldown-epochs 1"],
    ["--amp --amp-dtype bfloat16", "--amp", "--model-dtype bfloat16"],
    ["--model-ema --model-ema-decay 0.9", "--model-ema --model-ema-warmup", "--model-ema --model-ema-force-cpu"],
    ["--mixup 0.5", "--mixup 0.5 --cutmix 1 --mixup-mode elem", "--mixup 0.2 --mixup-off-epoch 1"],
    ["--aa rand-m9-mstd0.5-inc1", "--aa 3a", "--aa augmix-m5-w2-d2", "--train-crop-mode rkrc"],
    ["--reprob 0.5 --remode rand", "--aug-splits 2 --jsd-loss", "--aug-splits 2 --split-bn --resplit --reprob 0.3"],
    ["--loss bce", "--bce-loss --bce-target-thresh 0.2", "--loss poly", "--task multilabel --loss asl"],
    ["--grad-accum-steps 2", "--grad-accum-steps 3"],
    ["--clip-grad 1", "--clip-grad 0.1 --clip-mode value", "--clip-grad 0.05 --clip-mode agc"],
    ["--drop 0.1", "--drop-path 0.2"],
    ["--grad-checkpointing", "--layer-decay 0.7", "--channels-last"],
    ["--tweo-weight 0.05", "--tweo-weight 0.05 --tweo-schedule cosine", "--tweo-weight 0.1 --tweo-power 3"],
    ["--outlier-interval 1", "--outlier-interval 0"],
    ["--fp8 emulated", "--fp8 emulated --fp8-scaling current", "--fp8 emulated --fp8-amax-history 3"],
    ["-j 2", "--no-prefetcher", "-j 2 --worker-seeding part"],
    ["--recovery-interval 1", "--recovery-interval 2"],
    ["--val-interval 2", "--eval-metric loss", "--checkpoint-hist 1"],
    ["--train-img-sizes 32 32 --train-batch-sizes 8 4", "--train-img-sizes 32 --train-batches-per-epoch 4"],
]
CHOICES = st.tuples(*(st.sampled_from(["", *group]) for group in GROUPS))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what odd combinations make torch and timm warn of is not ours to say
@given(model=st.sampled_from(MODELS), choices=CHOICES, batches=st.integers(1, 7))
@settings(
    max_examples=40,
    deadline=None,
    print_blob=True,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much, HealthCheck.too_slow],
)
def test_any_options_continue_bit_for_bit(model, choices, batches, images, tmp_path, interrupt):
    shutil.rmtree(tmp_path, ignore_errors=True)
    options = [word for choice in choices for word in choice.split()]
    assume(main(command(images, tmp_path, *options, name="whole", model=model)) == 0)
    interrupt(batches)
    words = command(images, tmp_path, *options, "--resume", "auto", name="cut", model=model)
    assert main(words) == 128 + signal.SIGTERM
    assert main(words) == 0
    whole, cut = last(tmp_path / "whole"), last(tmp_path / "cut")
    for key in ("state_dict", "state_dict_ema", "optimizer", "exact"):
        assert same_tensors(cut.get(key), whole.get(key)), key
    for name in ("summary.csv", "outliers.jsonl"):
        files = [tmp_path / run / name for run in ("whole", "cut")]
        assert len({file.read_text() if file.exists() else None for file in files}) == 1, name
