from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.quant.families import make_images, make_model
from tweo_timm.quant.sidecar import SCHEMA, read_scales, write_scales
from tweo_timm.quant.static import quantize_static


def test_scales_read_back_as_written_and_rebuild_a_layer(tmp_path: Path) -> None:
    model, images = make_model("vit"), make_images("vit")
    quantized = quantize_static(model, [images], "w8a8-ct+res")
    written = write_scales(quantized, tmp_path / "deep" / "vit.scales.json")
    content = read_scales(tmp_path / "deep" / "vit.scales.json")
    assert content == written
    assert (content["schema"], content["scheme"], content["calibration_images"]) == (SCHEMA, "w8a8-ct+res", 4)
    entry = content["scales"]["blocks.0.mlp.fc1"]
    weight = model.get_submodule("blocks.0.mlp.fc1").weight.detach().numpy()
    steps = np.asarray(entry["weight_scale"], dtype=np.float32)[:, None]
    integers = np.clip(np.rint(weight / steps), -127, 127)
    np.testing.assert_array_equal(integers, quantized.get_submodule("blocks.0.mlp.fc1").weight_int.numpy())
    assert entry["input_scale"] > 0
    assert content["scales"]["blocks.0.add0"]["kind"] == "stream"


def test_a_folded_compensation_comes_with_the_bias_that_it_changed(tmp_path: Path) -> None:
    quantized = quantize_static(make_model("vit"), [make_images("vit", 8)], "w4a4-tt+qwt")
    content = write_scales(quantized, tmp_path / "x.json")
    compensated = {name for name, module in quantized.named_modules() if getattr(module, "compensation", None)}
    assert compensated
    assert {name for name, entry in content["scales"].items() if "bias" in entry} == compensated
    name = sorted(compensated)[0]
    layer = quantized.get_submodule(name)
    gain, shift = layer.compensation.gain, layer.compensation.shift
    wanted = shift if layer.bias is None else layer.bias * gain + shift
    torch.testing.assert_close(torch.tensor(content["scales"][name]["bias"]), wanted)
    assert len(content["scales"][name]["weight_scale"]) == len(gain)


def test_a_float_model_has_no_scales_to_write(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no quantized layer"):
        write_scales(make_model("vit"), tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"schema": 99, "scales": {}}), json.dumps({"schema": SCHEMA})])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json is no"):
        read_scales(tmp_path / "x.json")
