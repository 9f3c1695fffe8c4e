"""+rot and +rotr: the stream is rotated before anything else is done to it, and nothing else is different."""

import copy

import pytest
import torch

from tests.quant.families import make_images, make_model
from tweo_timm import quantize_static, rotate


@pytest.mark.parametrize(("scheme", "method"), [("rot", "learned"), ("rotr", "random")])
@pytest.mark.parametrize("rest", ["w8a8-tt+res{}", "w6a6-ct{}+smooth+qwt", "w8a8-tt+res{}+qwtblock"])
def test_the_suffix_quantizes_what_rotating_by_hand_gives(scheme, method, rest):
    model, images = make_model("vit"), [make_images("vit", 8)]
    before = copy.deepcopy(model.state_dict())
    quantized = quantize_static(model, images, rest.format("+" + scheme))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    rotate(model, method, images)
    assert torch.equal(quantized(images[0]), quantize_static(model, images, rest.format(""))(images[0]))
    assert quantized.quantization["rotation"]["method"] == method
    assert quantized.quantization["rotation"]["output_error"] < 1e-4


def test_a_stream_with_an_outlier_survives_int8():
    model, images = make_model("deit3"), make_images("deit3", 8)
    with torch.no_grad():
        model.blocks[0].mlp.fc2.bias[3] = 300
    expected = model(images)

    def error(scheme):
        with torch.no_grad():
            return float((quantize_static(model, [images], scheme)(images) - expected).norm() / expected.norm())

    assert error("w8a8-tt+res+rotr") < error("w8a8-tt+res") / 1.5


def test_a_model_that_cannot_be_rotated_says_why():
    with pytest.raises(ValueError, match="res-post-norm"):
        quantize_static(make_model("swinv2"), [make_images("swinv2")], "w8a8-tt+rotr")
    headless = make_model("vit")
    headless.reset_classifier(0)
    with pytest.raises(ValueError, match="no head"):
        quantize_static(headless, [make_images("vit")], "w8a8-tt+rotr")
    with pytest.raises(ValueError, match="at least one image"):
        quantize_static(make_model("vit"), [], "w8a8-tt+rot")


def test_an_exported_file_of_a_rotated_model_is_as_close_and_has_no_more_nodes(tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from tweo_timm import export_onnx

    model, images = make_model("vit"), make_images("vit", 8)
    counts = {}
    for scheme in ("w8a8-tt", "w8a8-tt+rotr"):
        quantized = quantize_static(model, [images], scheme)
        path = tmp_path / f"{scheme}.onnx"
        export_onnx(quantized, path, images[:2])
        counts[scheme] = len(onnx.load(path).graph.node)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        logits = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        assert float((logits - quantized(images)).norm() / logits.norm()) < 0.02
    assert counts["w8a8-tt"] == counts["w8a8-tt+rotr"]
