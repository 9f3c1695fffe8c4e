"""Nothing that a training step adds waits for the device: on the meta device, reading a number is an error."""

import pytest
import torch

from tests.models import BUILDERS, IMG_SIZES, NUM_CLASSES, batch, tiny_task
from tweo_timm import Fp8Recipe, TweoConfig, attach_tweo, patch_fp8
from tweo_timm.outliers import OutlierRecorder
from tweo_timm.train.meters import EpochMeters
from tweo_timm.train.watch import HealthWatch

META = torch.device("meta")


@pytest.mark.parametrize("fp8", [False, True], ids=["bfloat16", "fp8"])
@pytest.mark.parametrize("family", BUILDERS)
def test_a_recorded_training_step_never_waits(family, fp8):
    model = BUILDERS[family]().to(META)
    if fp8:
        patch_fp8(model, Fp8Recipe(backend="emulated"))
    task = tiny_task(model, device=META)
    handle = attach_tweo(task, TweoConfig())
    recorder = OutlierRecorder(model, standing=False)
    health = HealthWatch(model, handle.block_names, META, stop_on_peak=100.0)
    meters = EpochMeters(handle.block_names, META, recorder)
    images, targets = (tensor.to(META) for tensor in batch(img_size=IMG_SIZES[family]))
    for update in range(2):
        with recorder.recording(), torch.autocast("cpu", torch.bfloat16):
            result = task(images, targets)
        health.note(update, result["loss"], handle.block_peaks)
        result["loss"].backward()
        health.note_gradients(update)
        meters.update(result, handle.block_peaks, len(targets))
    assert result["output"].shape == (len(images), NUM_CLASSES)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta"):
        meters.means()
