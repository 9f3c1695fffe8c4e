"""attach_tweo: the gradients of the definition in every way timm trains, and nothing left behind."""

import copy
import gc
import math
import weakref

import pytest
import torch
from timm.layers import set_reentrant_ckpt
from timm.task import (
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    TokenDistillationTask,
)
from torch import nn

from tests.models import (
    BUILDERS,
    IMG_SIZES,
    NUM_CLASSES,
    batch,
    definition,
    gradients,
    largest_relative_error,
    penalty,
    tiny_deit,
    tiny_maxvit,
    tiny_swin,
    tiny_task,
    tiny_vit,
)
from tweo_timm import TweoConfig, attach_tweo, find_blocks

# A tau below the size of the activations, and a weight that makes the penalty's gradient as large as the task's.
CONFIG = TweoConfig(weight=0.3, tau=0.8)
COSINE = TweoConfig(weight=0.3, tau=0.8, schedule="cosine")


def check_step(task, images, targets, config=CONFIG, dtype=torch.float64, **how):
    """Attach, do one step, and compare loss, penalty, peak and gradients with the definition."""
    task_loss, tweo, peak, expected = definition(task, images, targets, config, dtype=dtype)
    attach_tweo(task, config)
    result = step(task, images, targets, **how)
    assert float(result["task_loss"]) == pytest.approx(task_loss, rel=1e-5)
    assert float(result["tweo_loss"]) == pytest.approx(tweo, rel=1e-5)
    assert float(result["loss"].detach()) == pytest.approx(task_loss + config.weight * tweo, rel=1e-5)
    assert float(result["peak_abs"]) == pytest.approx(peak, rel=1e-5)
    assert largest_relative_error(trained_gradients(task), expected) < 1e-5


def step(task, images, targets, steps=1):
    for _ in range(steps):  # later steps show what the first one left behind
        task.zero_grad()
        result = task(images, targets)
        result["loss"].backward()
    return result


def trained_gradients(task):
    return {name.replace("_orig_mod.", ""): g for name, g in gradients(task.get_trainable_module()).items()}


def num_hooks(task):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in task.modules())


def images_for(name):
    return batch(img_size=IMG_SIZES[name])


@pytest.mark.parametrize("reduction", ["block", "element"])
@pytest.mark.parametrize("name", BUILDERS)
def test_gradients_are_those_of_the_definition(name, reduction):
    config = TweoConfig(weight=0.3, tau=0.8, reduction=reduction)
    check_step(tiny_task(BUILDERS[name]()), *images_for(name), config=config)


def test_the_comparison_would_notice_a_weight_that_is_one_percent_off():
    task = tiny_task(tiny_vit())
    expected = definition(task, *batch(), CONFIG)[-1]
    slightly_off = definition(task, *batch(), CONFIG, weight=0.303)[-1]
    assert largest_relative_error(slightly_off, expected) > 1e-3


@pytest.mark.parametrize("name", BUILDERS)
def test_checkpointed_blocks_get_the_same_gradients(name):
    model = BUILDERS[name]()
    model.set_grad_checkpointing()
    check_step(tiny_task(model), *images_for(name), steps=2)


@pytest.mark.parametrize("build", [tiny_vit, tiny_swin])
def test_drop_path_draws_the_same_numbers_as_without_tweo(build):
    task = tiny_task(build(drop_path_rate=0.5, proj_drop_rate=0.1))
    images, targets = batch(8)
    torch.manual_seed(5)
    expected = definition(task, images, targets, CONFIG, dtype=torch.float32)[-1]
    attach_tweo(task, CONFIG)
    torch.manual_seed(5)
    step(task, images, targets)
    assert largest_relative_error(trained_gradients(task), expected) < 1e-5


@pytest.mark.parametrize("build", [tiny_vit, tiny_swin])
def test_under_bfloat16_autocast_gradients_are_those_of_the_same_forward_pass(build):
    task = tiny_task(build())
    images, targets = batch()
    plain = copy.deepcopy(task)
    terms = []
    for block in find_blocks(plain.trainable_module).values():
        # In the hook, not after the model: bfloat16 gradients depend on the order in which they are added.
        block.register_forward_hook(lambda module, args, output: terms.append(penalty([output], CONFIG)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = plain(images, targets)["loss"] + CONFIG.weight * torch.stack(terms).mean()
    loss.backward()
    attach_tweo(task, CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        result = task(images, targets)
    result["loss"].backward()
    assert result["tweo_loss"].dtype == torch.float32
    assert largest_relative_error(trained_gradients(task), gradients(plain.trainable_module)) < 1e-5


@pytest.mark.parametrize("build", [tiny_vit, tiny_swin])
def test_compiled_model_has_one_graph_and_the_same_gradients(build, dynamo):
    task = tiny_task(build())
    images, targets = batch()
    expected = definition(task, images, targets, COSINE, weight=COSINE.weight_at(0.25))[-1]
    handle = attach_tweo(task, COSINE)
    task.compile(backend="aot_eager", fullgraph=True)
    for progress in (0.0, 0.5, 0.25):
        handle.set_progress(progress)
        step(task, images, targets)
    assert largest_relative_error(trained_gradients(task), expected) < 1e-5
    assert dynamo["graph_break"] == {}
    assert dynamo["stats"]["unique_graphs"] == 1  # the weight moves without compiling again


@pytest.mark.parametrize(
    "build", [pytest.param(tiny_vit, id="vit"), pytest.param(tiny_swin, id="swin", marks=pytest.mark.slow)]
)
def test_inductor_has_no_graph_break_and_the_same_gradients(build, dynamo):
    model = build(embed_dim=16, depth=1) if build is tiny_vit else build()
    task = tiny_task(model)
    images, targets = batch()
    expected = definition(task, images, targets, CONFIG)[-1]
    attach_tweo(task, CONFIG)
    task.compile(backend="inductor", fullgraph=True)
    step(task, images, targets, steps=2)
    assert largest_relative_error(trained_gradients(task), expected) < 1e-5
    assert dynamo["graph_break"] == {}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
def test_checkpointed_blocks_of_a_compiled_model_get_the_same_gradients(dynamo):
    model = tiny_vit()
    model.set_grad_checkpointing()
    task = tiny_task(model)
    expected = definition(task, *batch(), CONFIG)[-1]
    attach_tweo(task, CONFIG)
    task.compile(backend="aot_eager")
    step(task, *batch(), steps=2)
    assert largest_relative_error(trained_gradients(task), expected) < 1e-5


def test_accumulation_with_a_remainder_equals_the_large_batches():
    images, targets = batch(14)
    task = tiny_task(tiny_vit())
    groups = [slice(0, 8), slice(8, 14)]  # seven micro-batches of two: four, and three that remain
    expected = [definition(task, images[g], targets[g], CONFIG)[-1] for g in groups]
    attach_tweo(task, CONFIG)
    for group, reference in zip(groups, expected, strict=True):
        task.zero_grad()
        micro_batches = list(zip(images[group].split(2), targets[group].split(2), strict=True))
        for micro_images, micro_targets in micro_batches:
            result = task(micro_images, micro_targets)
            result["loss"] /= len(micro_batches)  # in place, as timm's train.py does
            result["loss"].backward()
        assert largest_relative_error(trained_gradients(task), reference) < 1e-5


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_a_loop_that_divides_the_loss_in_place_leaves_the_reported_losses_alone(weight):
    task = tiny_task(tiny_vit())
    attach_tweo(task, TweoConfig(weight=weight, tau=0.8))
    result = task(*batch())
    before = {name: float(result[name]) for name in ("task_loss", "tweo_loss")}
    result["loss"] /= 4
    assert {name: float(result[name]) for name in before} == before


@pytest.mark.parametrize("order", ["ema first", "attach first"])
def test_the_ema_copy_never_counts(order):
    task = tiny_task(tiny_vit())
    images, targets = batch()
    expected = definition(task, images, targets, CONFIG)[-1]
    if order == "ema first":
        task.setup_ema(decay=0.5)
        attach_tweo(task, CONFIG)
    else:
        attach_tweo(task, CONFIG)
        task.setup_ema(decay=0.5)
    ema = task.get_eval_model(ema=True)
    ema_runs = []
    # In the middle of an armed step, and in training mode.
    task.trainable_module.register_forward_hook(lambda *_: ema_runs.append(ema.train()(images)))
    step(task, images, targets, steps=2)
    task.update_ema(step=1)
    assert largest_relative_error(gradients(task.trainable_module), expected) < 1e-5
    assert len(ema_runs) == 2
    assert ema.eval()(images).isfinite().all()


def test_a_copy_made_in_the_middle_of_training_works_and_keeps_no_graph():
    task = tiny_task(tiny_vit())
    handle = attach_tweo(task, CONFIG)
    result = task(*batch())
    copied = copy.deepcopy(task.trainable_module)
    task.setup_ema()
    result["loss"].backward()
    peaks = handle.block_peaks.clone()
    copied.train()(batch()[0] * 100).sum().backward()
    assert torch.equal(handle.block_peaks, peaks)
    assert not handle._measurement._seen


def test_a_copied_task_says_that_it_has_no_tweo_and_can_get_its_own(caplog):
    task = tiny_task(tiny_vit())
    attach_tweo(task, CONFIG)
    copied = copy.deepcopy(task)
    with torch.no_grad():
        copied(*batch())
    assert "without TWEO" not in caplog.text
    for _ in range(2):
        assert "tweo_loss" not in copied(*batch())
    assert caplog.text.count("A copy of a task trains without TWEO") == 1
    attach_tweo(copied, CONFIG)
    assert torch.equal(copied(*batch())["tweo_loss"], task(*batch())["tweo_loss"])
    with pytest.raises(ValueError, match="attached already"):
        attach_tweo(copied, CONFIG)


def test_an_output_that_the_model_overwrites_is_an_error_and_no_wrong_gradient():
    model = tiny_vit(depth=3)
    model.blocks[2].register_forward_pre_hook(lambda module, args: args[0].mul_(2))
    task = tiny_task(model)
    attach_tweo(task, CONFIG)
    with pytest.raises(RuntimeError, match="inplace operation"):
        step(task, *batch())


@pytest.mark.parametrize("kind", [LogitDistillationTask, FeatureDistillationTask, TokenDistillationTask])
def test_distillation_penalises_the_student_and_only_the_student(kind):
    student = tiny_deit() if kind is TokenDistillationTask else tiny_vit()
    teacher = tiny_vit(embed_dim=48, num_heads=3)
    task = kind(student, teacher, nn.CrossEntropyLoss(), distill_loss_weight=0.7, task_loss_weight=0.2, verbose=False)
    task.trainable_module.train()
    check_step(task, *batch(), steps=2)


def test_multilabel_task_gets_the_penalty():
    task = MultiLabelClassificationTask(tiny_vit(), verbose=False)
    task.trainable_module.train()
    images, _ = batch()
    check_step(task, images, (torch.rand(4, NUM_CLASSES, generator=torch.Generator().manual_seed(0)) > 0.5).float())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", [TweoConfig(weight=0.0), COSINE], ids=["weight 0", "end of a schedule"])
def test_weight_0_is_bit_identical_to_the_plain_task(config, checkpointing):
    images, targets = batch()
    task = tiny_task(tiny_vit(drop_path_rate=0.3))
    task.trainable_module.set_grad_checkpointing(checkpointing)
    plain = copy.deepcopy(task)
    handle = attach_tweo(task, config)
    handle.set_progress(1.0)
    states = []
    for each in (plain, task):
        torch.manual_seed(3)
        result = step(each, images, targets)
        weights = [p.grad for p in each.parameters()]
        states.append([result["loss"], result["output"], *weights, torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    assert result["tweo_weight"] == 0
    assert result["peak_abs"] > 0
    assert result["tweo_loss"] > 0


def test_every_schedule_but_the_constant_one_needs_to_know_the_progress():
    task = tiny_task(tiny_vit())
    handle = attach_tweo(task, COSINE)
    with pytest.raises(RuntimeError, match="set_progress"):
        task(*batch())
    for progress in (0.0, 0.25, 1.0):
        handle.set_progress(progress)
        result = task(*batch())
        weight = COSINE.weight_at(progress)
        assert handle.weight == result["tweo_weight"] == weight
        assert float(result["loss"].detach()) == pytest.approx(
            float(result["task_loss"]) + weight * float(result["tweo_loss"]), rel=1e-6
        )
    with pytest.raises(ValueError, match=r"1\.5"):
        handle.set_progress(1.5)


def test_block_peaks_are_those_of_the_stored_outputs():
    task = tiny_task(tiny_maxvit())
    handle = attach_tweo(task, CONFIG)
    assert handle.block_peaks is None
    peaks = {}
    for name, block in find_blocks(task.trainable_module).items():
        block.register_forward_hook(lambda m, a, output, name=name: peaks.update({name: output.detach().abs().max()}))
    task(*images_for("maxvit"))
    assert handle.block_names == list(peaks)
    assert torch.equal(handle.block_peaks, torch.stack(list(peaks.values())))


def test_attach_remove_attach_leaves_no_hook_behind():
    task = tiny_task(tiny_vit())
    expected = definition(task, *batch(), CONFIG)[-1]
    hooks, keys = num_hooks(task), list(task.state_dict())
    for _ in range(2):
        handle = attach_tweo(task, CONFIG)
        assert num_hooks(task) == hooks + 2 + len(handle.block_names)
        step(task, *batch())
        assert list(task.state_dict()) == keys
        handle.remove()
        handle.remove()
        assert num_hooks(task) == hooks
        assert set(task(*batch())) == {"loss", "output"}
    attach_tweo(task, CONFIG)
    step(task, *batch())
    assert largest_relative_error(trained_gradients(task), expected) < 1e-5


def test_attaching_twice_is_refused_and_changes_nothing():
    task = tiny_task(tiny_vit())
    attach_tweo(task, CONFIG)
    hooks = num_hooks(task)
    with pytest.raises(ValueError, match=r"remove\(\)"):
        attach_tweo(task, CONFIG)
    assert num_hooks(task) == hooks


@pytest.fixture
def reentrant_checkpoints():
    set_reentrant_ckpt(True)
    yield
    set_reentrant_ckpt(False)


@pytest.mark.usefixtures("reentrant_checkpoints")
def test_reentrant_checkpoints_set_before_attaching_are_refused():
    task = tiny_task(tiny_vit())
    task.trainable_module.set_grad_checkpointing()
    with pytest.raises(RuntimeError, match="TIMM_REENTRANT_CKPT"):
        attach_tweo(task, CONFIG)
    assert num_hooks(task) == 0


@pytest.mark.usefixtures("reentrant_checkpoints")
def test_reentrant_checkpoints_set_after_attaching_are_refused():
    task = tiny_task(tiny_vit())
    attach_tweo(task, CONFIG)
    step(task, *batch())  # nothing is checkpointed yet
    task.trainable_module.set_grad_checkpointing()
    with pytest.raises(RuntimeError, match="would silently have none"):
        task(*batch())


def test_reentrant_checkpoints_of_the_models_own_making_are_noticed():
    model = tiny_vit()
    blocks = list(model.blocks)
    model.blocks.forward = lambda x: torch.utils.checkpoint.checkpoint(
        lambda x: blocks[1](blocks[0](x)), x, use_reentrant=True
    )
    task = tiny_task(model)
    attach_tweo(task, CONFIG)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        task(*batch())


def test_blocks_that_report_nothing_are_an_error_naming_the_first():
    model = tiny_vit(depth=3)
    task = tiny_task(model)
    attach_tweo(task, CONFIG)
    del model.blocks[1]  # the model skips a block that TWEO knows
    with pytest.raises(RuntimeError, match=r"1 of 3 blocks.*blocks\.1"):
        task(*batch())


def test_a_model_compiled_and_run_before_attaching_is_an_error_or_right(dynamo):
    task = tiny_task(tiny_vit())
    expected = definition(task, *batch(), CONFIG)[-1]
    task.compile(backend="aot_eager")
    step(task, *batch())
    attach_tweo(task, CONFIG)
    try:
        step(task, *batch())
    except RuntimeError as error:
        assert "before torch.compile" in str(error)  # noqa: PT017
    else:
        assert largest_relative_error(trained_gradients(task), expected) < 1e-5


@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_naflex_batches_are_refused(how):
    task = tiny_task(tiny_vit())
    attach_tweo(task, CONFIG)
    padded = {"patches": torch.zeros(1, 4, 192)}
    with pytest.raises(RuntimeError, match="padding"):
        task(padded, None) if how == "positional" else task(input=padded, target=None)


def test_without_gradients_or_in_eval_mode_the_result_is_untouched():
    task = tiny_task(tiny_vit())
    plain = set(task(*batch()))
    handle = attach_tweo(task, CONFIG)
    with torch.no_grad():
        assert set(task(*batch())) == plain
    task.trainable_module.eval()
    assert set(task(*batch())) == plain
    assert handle.block_peaks is None
    task.trainable_module.train()
    assert set(task(*batch())) == plain | {"task_loss", "tweo_loss", "tweo_weight", "peak_abs"}


def test_blocks_in_eval_mode_have_no_part_in_the_penalty():
    task = tiny_task(tiny_vit(depth=3))
    task.trainable_module.blocks[0].eval()
    whole = copy.deepcopy(task)
    handle = attach_tweo(task, CONFIG)
    outputs = []
    for block in whole.trainable_module.blocks[1:]:
        block.register_forward_hook(lambda m, a, output: outputs.append(output.detach()))
    whole(*batch())
    result = task(*batch())
    assert float(result["tweo_loss"]) == pytest.approx(float(penalty(outputs, CONFIG)), rel=1e-6)
    assert handle.block_peaks[0] == 0


def test_a_step_that_failed_does_not_reach_into_the_next():
    task = tiny_task(tiny_vit())
    images, targets = batch()
    expected = definition(task, images, targets, CONFIG)[-1]
    attach_tweo(task, CONFIG)
    with pytest.raises(IndexError):
        task(images, targets + NUM_CLASSES)
    step(task, images, targets)
    assert largest_relative_error(trained_gradients(task), expected) < 1e-5


def test_nan_in_an_activation_is_seen_in_loss_and_peak():
    task = tiny_task(tiny_vit())
    attach_tweo(task, CONFIG)
    images, targets = batch()
    images[0, 0, 0, 0] = float("nan")
    result = task(images, targets)
    assert result["tweo_loss"].isnan()
    assert result["peak_abs"].isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("values", [(-3.0, 1.0), (0.5, 2.0), (math.nan, math.inf), (-math.inf, 1.0)], ids=str)
def test_a_peak_is_the_exact_largest_magnitude_in_every_dtype(values, dtype):
    task = tiny_task(nn.Sequential(nn.Identity(), nn.Flatten()))
    handle = attach_tweo(task, TweoConfig(weight=0.0), blocks="0")
    x = torch.tensor([[*values, 0.25]], dtype=dtype)
    result = task(x, torch.tensor([1]))
    expected = torch.tensor([max(map(abs, values)) if not math.isnan(sum(values)) else math.nan])
    torch.testing.assert_close(handle.block_peaks, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(result["peak_abs"], expected[0], rtol=0, atol=0, equal_nan=True)
    assert not handle.block_peaks.requires_grad


def test_no_activation_outlives_the_step():
    task = tiny_task(tiny_vit())
    attach_tweo(task, CONFIG)
    outputs = []
    for block in task.trainable_module.blocks:
        block.register_forward_hook(lambda m, a, output: outputs.append(weakref.ref(output)))
    result = step(task, *batch())
    del result
    gc.collect()
    assert len(outputs) == 2
    assert not any(output() is not None for output in outputs)


def test_blocks_can_be_named_by_hand():
    task = tiny_task(tiny_vit(depth=3))
    handle = attach_tweo(task, CONFIG, blocks=r"blocks\.[02]")
    assert handle.block_names == ["blocks.0", "blocks.2"]
    with pytest.raises(ValueError, match="nonsense"):
        attach_tweo(tiny_task(tiny_vit()), CONFIG, blocks="nonsense")
