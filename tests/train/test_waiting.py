"""What a training step asks of a device: never a number, which is an error on the meta device, and never float64."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models import BUILDERS, IMG_SIZES, NUM_CLASSES, batch, tiny_task
from tweo_timm import Fp8HealthMonitor, Fp8Recipe, TweoConfig, attach_tweo, patch_fp8
from tweo_timm.outliers import OutlierRecorder
from tweo_timm.train.health import HealthWatch
from tweo_timm.train.meters import EpochMeters

META = torch.device("meta")


class NoFloat64(TorchDispatchMode):
    """Refuses float64 tensors on the meta device, as Apple's GPU would."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.device == META and tensor.dtype == torch.float64:
                raise TypeError(f"{func} made a float64 tensor")
        return made


@pytest.fixture
def no_float64():
    with NoFloat64():
        yield


@pytest.mark.usefixtures("no_float64")
def test_float64_on_the_device_would_be_noticed():
    with pytest.raises(TypeError, match="float64"):
        torch.ones(2, device=META).double()
    torch.ones(2, dtype=torch.float64)


@pytest.mark.usefixtures("no_float64")
@pytest.mark.parametrize("fp8", [False, True], ids=["bfloat16", "fp8"])
@pytest.mark.parametrize("family", BUILDERS)
def test_a_recorded_training_step_never_waits_and_makes_no_float64(family, fp8):
    model = BUILDERS[family]().to(META)
    if fp8:
        patch_fp8(model, Fp8Recipe(backend="emulated"))
        Fp8HealthMonitor(model).arm()
    task = tiny_task(model, device=META)
    handle = attach_tweo(task, TweoConfig())
    recorder = OutlierRecorder(model)
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
