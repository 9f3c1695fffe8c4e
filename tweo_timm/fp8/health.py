"""How well FP8 represents what a training step really computed with.

A loss curve hides which layer is failing. For one armed step this records, for the input, the weight and the output
gradient of every FP8 layer, what its rounding did to it. The two failures of per-tensor scaling are visible: a stale
scale saturates, and one huge element pushes the rest below the grid. The signal-to-noise ratio is given with and
without the largest element, because that element alone can make a ruined tensor look well represented.

Costs a dozen passes over each operand of the armed step, and nothing at all on other steps. Works in eager training;
under torch.compile the armed step leaves the compiled graph at each layer. Not available with Transformer Engine,
whose kernels do not show their operands, nor with any backend that has a region of its own.
"""

from __future__ import annotations

from torch import Tensor, nn

from tweo_timm.fp8.cast import Fp8Format, absolute_maximum, round_to_fp8
from tweo_timm.fp8.patch import patch_of
from tweo_timm.fp8.region import Fp8Region
from tweo_timm.stats import decibels

Row = dict[str, str | int | float | None]


class Fp8HealthMonitor:
    """Records the FP8 health of single training steps of a patched model.

    Call `arm` before a step, then `rows` after its backward.

    Args:
        model: a model patched by `patch_fp8` with a PyTorch backend, wrapped or not.

    Raises:
        ValueError: the model is not patched, or by a backend that does not show its operands.
    """

    def __init__(self, model: nn.Module):
        patch = patch_of(model)
        if not isinstance(patch.region, Fp8Region):
            raise ValueError(
                f"FP8 backend {patch.report.backend!r} does not show its operands: use backend='native' or 'emulated' "
                "to look at them"
            )
        self._region = patch.region
        self._records: dict[tuple[str, str], dict[str, Tensor]] = {}

    def arm(self) -> None:
        """Record the next training step."""
        self._records.clear()
        self._region.observer = self

    def observe(self, layer: str, tensor: str, values: Tensor, scale: Tensor, fmt: Fp8Format) -> None:
        """Record one operand; called by the FP8 layers of an armed step.

        A layer that runs twice in a step (activation checkpointing, shared layers) keeps its last record.
        """
        self._records[layer, tensor] = _measure(values.detach(), scale.detach(), fmt)

    def rows(self, epoch: int, update: int) -> list[Row]:
        """Return one plain row per layer and tensor of the armed step, and disarm.

        Keys: ``epoch``, ``update``, ``layer``, ``tensor`` (``'x'``, ``'w'`` or ``'dy'``), ``amax``, ``scale``,
            ``saturated`` and ``flushed`` (shares of all elements: above the largest FP8
        value, and non-zero but rounded to zero), ``sqnr_db`` and ``sqnr_without_peak_db``. A ratio that does not
        exist (no signal, no error, not finite) is None.
        """
        self._region.observer = None
        rows = []
        for (layer, tensor), record in self._records.items():
            row: Row = {"epoch": epoch, "update": update, "layer": layer, "tensor": tensor}
            row |= {
                key: value.item() for key, value in record.items() if key in ("amax", "scale", "saturated", "flushed")
            }
            row["sqnr_db"] = decibels(record["signal"], record["noise"])
            row["sqnr_without_peak_db"] = decibels(record["signal_without_peak"], record["noise_without_peak"])
            rows.append(row)
        self._records.clear()
        return rows


def _measure(values: Tensor, scale: Tensor, fmt: Fp8Format) -> dict[str, Tensor]:
    """Return the statistics of one operand as scalars on its own device, so that nothing waits for it."""
    exact = values.float().flatten()
    # Measured in scaled units: dividing by the scale would add an error of its own. FP8's range squared is far inside
    # float32's, and Apple's GPU has no float64.
    scaled = exact * scale
    rounded = round_to_fp8(values, scale, fmt).float().flatten()
    squared_signal, squared_noise = scaled.square(), (rounded - scaled).square()
    signal, noise = squared_signal.sum(), squared_noise.sum()
    count = max(exact.numel(), 1)
    if exact.numel():  # cleared, not subtracted: beside one huge element the rest would cancel
        peak = exact.abs().argmax().view(1)
        squared_signal.index_fill_(0, peak, 0.0)  # squared_signal[peak] = 0 would wait for the index
        squared_noise.index_fill_(0, peak, 0.0)
    return {
        "amax": absolute_maximum(values),
        "scale": scale,
        "saturated": (scaled.abs() > fmt.max).sum() / count,
        "flushed": ((rounded == 0) & (exact != 0)).sum() / count,
        "signal": signal,
        "noise": noise,
        "signal_without_peak": squared_signal.sum(),
        "noise_without_peak": squared_noise.sum(),
    }
