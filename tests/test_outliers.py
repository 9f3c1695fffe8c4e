"""record_outliers: the statistics of what the blocks returned, wherever the channels are."""

import copy

import numpy as np
import pytest
import torch

from tests.models import BUILDERS, IMG_SIZES, batch, store_outputs, tiny_maxvit, tiny_swin, tiny_vit
from tweo_timm import find_blocks, record_outliers
from tweo_timm.outliers import OutlierRecorder


def reference(output):
    """Peak, mean and kurtosis in float64 NumPy."""
    array = output.detach().double().numpy().ravel()
    centred = array - array.mean()
    return {
        "peak_abs": np.abs(array).max(),
        "mean_abs": np.abs(array).mean(),
        "kurtosis": (centred**4).mean() / (centred**2).mean() ** 2,
        "count": array.size,
    }


@pytest.mark.parametrize("name", BUILDERS)
def test_statistics_are_those_of_the_stored_outputs(name):
    model = BUILDERS[name]().eval()
    images, _ = batch(6, img_size=IMG_SIZES[name])
    stored = store_outputs(copied := copy.deepcopy(model))
    copied(images)
    with record_outliers(model) as record:
        for part in images.split(4):  # an uneven last batch
            model(part)
    summary = record.summary()
    assert [block["name"] for block in summary["blocks"]] == list(find_blocks(model))
    for block, output in zip(summary["blocks"], stored, strict=True):
        for key, value in reference(output).items():
            assert block[key] == pytest.approx(value, rel=1e-5), key
    assert summary["peak_abs"] == max(block["peak_abs"] for block in summary["blocks"])


@pytest.mark.parametrize(
    ("build", "index", "token", "channel"),
    [
        (tiny_vit, (2, 11, 7), 11, 7),  # B, N, C
        (tiny_swin, (2, 1, 3, 7), 1 * 4 + 3, 7),  # B, H, W, C with 4 x 4 tokens in the last stage
        (tiny_maxvit, (2, 7, 1, 3), 1 * 8 + 3, 7),  # B, C, H, W with 8 x 8 tokens in the last stage
    ],
    ids=["BNC", "BHWC", "BCHW"],
)
def test_a_planted_peak_is_found_by_block_token_and_channel(build, index, token, channel):
    model = build().eval()
    last = list(find_blocks(model))[-1]

    def plant(module, args, output):
        output = output.clone()
        output[index] = -1234.5
        return output

    find_blocks(model)[last].register_forward_hook(plant)
    with record_outliers(model) as record, torch.no_grad():
        model(batch(img_size=64 if build is tiny_maxvit else 32)[0])
    summary = record.summary()
    assert (summary["peak_abs"], summary["peak_block"]) == (1234.5, last)
    assert (summary["blocks"][-1]["peak_token"], summary["blocks"][-1]["peak_channel"]) == (token, channel)


def test_a_nan_peak_is_the_largest():
    model = tiny_vit(depth=3).eval()
    model.blocks[1].register_forward_hook(lambda m, a, output: output * torch.nan)
    with record_outliers(model) as record:
        model(batch()[0])
    assert record.summary()["peak_block"] == "blocks.1"


def test_blocks_that_were_not_seen_are_an_error_naming_the_first():
    model = tiny_vit()
    with record_outliers(model) as record:
        model.blocks[0](torch.zeros(1, 17, 32))
    with pytest.raises(RuntimeError, match=r"1 of 2 blocks.*blocks\.1"):
        record.summary()


def test_nothing_is_counted_outside_recording():
    model = tiny_vit().eval()
    images, _ = batch()
    recorder = OutlierRecorder(model)
    model(images * 100)
    with recorder.recording():
        model(images)
    model(images * 100)
    with record_outliers(model) as once:
        model(images)
    assert recorder.summary() == once.summary()
    recorder.reset()
    with pytest.raises(RuntimeError, match="2 of 2"):
        recorder.summary()
    recorder.remove()
    assert not any(module._forward_hooks for module in model.modules())


def test_an_error_inside_the_context_takes_the_hooks_off():
    model = tiny_vit()
    with pytest.raises(KeyError), record_outliers(model):
        raise KeyError
    assert not any(module._forward_hooks for module in model.modules())


def test_recording_changes_neither_outputs_nor_gradients_nor_mode():
    model = tiny_vit().train()
    images, _ = batch()
    plain = copy.deepcopy(model)
    plain(images).sum().backward()
    with record_outliers(model) as record:
        output = model(images)
    output.sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert model.training
    assert not any(s.requires_grad for stats in record.stats.values() for s in stats.state()["sums"].values())


def test_a_compiled_model_is_recorded_and_costs_no_graph_break_while_disarmed(dynamo):
    model = tiny_vit().eval()
    images, _ = batch()
    with record_outliers(model) as expected:
        model(images)
    recorder = OutlierRecorder(model)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        compiled(images)
        assert dynamo["graph_break"] == {}
        with recorder.recording():
            compiled(images)
    for block, reference_block in zip(recorder.summary()["blocks"], expected.summary()["blocks"], strict=True):
        assert block.pop("name") == reference_block.pop("name")
        assert block == pytest.approx(reference_block, rel=1e-5)


def test_a_model_compiled_and_run_before_recording_is_an_error_or_right(dynamo):
    model = tiny_vit().eval()
    images, _ = batch()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(images)
    with record_outliers(compiled) as record:
        compiled(images)
    with record_outliers(model) as expected:
        model(images)
    try:
        summary = record.summary()
    except RuntimeError as error:
        assert "before torch.compile" in str(error)  # noqa: PT017
    else:
        assert summary["peak_abs"] == pytest.approx(expected.summary()["peak_abs"], rel=1e-5)


def test_gather_without_processes_changes_nothing():
    model = tiny_vit().eval()
    with record_outliers(model) as record:
        model(batch()[0])
    before = record.summary()
    record.gather()
    assert record.summary() == before


def test_gather_in_a_group_of_one_changes_nothing():
    model = tiny_vit().eval()
    with record_outliers(model) as record:
        model(batch()[0])
    before = record.summary()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        record.gather()
    finally:
        torch.distributed.destroy_process_group()
    assert record.summary() == before
