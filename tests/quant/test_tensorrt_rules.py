"""Files of target "qdq" keep TensorRT's rules, and what breaks one is found where it was planted."""

import numpy as np
import pytest

from tests.quant.families import make_images, make_model
from tweo_timm.quant.static import quantize_static

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from tweo_timm.quant.export import export_onnx  # noqa: E402
from tweo_timm.quant.tensorrt_rules import RULES, check_tensorrt_rules  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript.*")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A quantized ViT as a file: weights per channel, the residual stream quantized."""
    path = tmp_path_factory.mktemp("sound") / "vit.onnx"
    model, images = make_model("vit", depth=1), make_images("vit", 2)
    export_onnx(quantize_static(model, [images], "w8a8-ct+res"), path, images)
    return path


class Editing:
    """A file whose graph is changed in one place."""

    def __init__(self, path):
        self.model = onnx.load(path)
        self.graph = self.model.graph
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.made = {name: node for node in self.graph.node for name in node.output}

    def first(self, kind, of_constant):
        """The first node of a kind that reads a constant, or that does not."""
        nodes = (node for node in self.graph.node if node.op_type == kind)
        return next(node for node in nodes if (node.input[0] in self.constants) == of_constant)

    def give(self, node, index, array, data_type=None):
        """Let a node read a constant of its own."""
        tensor = numpy_helper.from_array(np.asarray(array), f"planted{index}")
        if data_type is not None:
            tensor = helper.make_tensor(tensor.name, data_type, tensor.dims, np.zeros(tensor.dims).ravel())
        self.graph.initializer.append(tensor)
        node.input[index] = tensor.name
        return node

    def residual_add(self):
        """An Add of the quantized stream, and which of its inputs is the branch."""
        for node in self.graph.node:
            made = [self.made.get(name) for name in node.input]
            if node.op_type == "Add" and all(made) and {m.op_type for m in made} == {"Add", "DequantizeLinear"}:
                return node, [m.op_type for m in made].index("Add")
        raise AssertionError("no residual add")

    def quantize_branch(self):
        add, index = self.residual_add()
        pair = self.first("QuantizeLinear", False)
        scale, zero = pair.input[1:3]
        self.graph.node.extend(
            [
                helper.make_node("QuantizeLinear", [add.input[index], scale, zero], ["planted_q"]),
                helper.make_node("DequantizeLinear", ["planted_q", scale, zero], ["planted_dq"]),
            ]
        )
        add.input[index] = "planted_dq"
        return add

    def unquantize_skip(self):
        add = self.quantize_branch()
        index = next(i for i, name in enumerate(add.input) if name != "planted_dq")
        add.input[index] = self.made[self.made[add.input[index]].input[0]].input[0]
        return add


def unsymmetric(file):
    return file.give(file.first("QuantizeLinear", False), 2, np.int8(3))


def unsigned(file):
    return file.give(file.first("QuantizeLinear", False), 2, np.uint8(0))


def scaled_per_channel(file):
    return file.give(file.first("QuantizeLinear", False), 1, np.ones(32, np.float32))


def scaled_by_zero(file):
    return file.give(file.first("QuantizeLinear", False), 1, np.float32(0))


def scaled_at_run_time(file):
    node = file.first("QuantizeLinear", False)
    node.input[1] = file.graph.node[0].output[0]
    return node


def along_another_axis(file):
    weights = (node for node in file.graph.node if node.op_type == "DequantizeLinear")
    node = next(n for n in weights if n.attribute and len(file.constants[n.input[0]].dims) == 2)
    node.attribute[0].i = 0
    return node


def mixed(file):
    return file.give(file.first("QuantizeLinear", False), 2, 0.0, TensorProto.FLOAT8E4M3FN)


def of_one_image(file):
    file.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    return helper.make_node("none", [], ["images"])


def of_integers(file):
    product = helper.make_node("MatMulInteger", ["a", "b"], ["planted"])
    file.graph.node.append(product)
    return product


def in_sixteen_bits(file):
    return file.give(file.first("QuantizeLinear", False), 2, np.int16(0))


def inside_a_branch(file):
    """What stands in an If is looked at too."""
    pair = helper.make_node("QuantizeLinear", ["images", "planted1"], ["planted_inside"])
    inner = helper.make_graph([pair], "then", [], [])
    file.give(helper.make_node("none", ["", ""], []), 1, np.float32(1))
    file.graph.node.append(helper.make_node("If", ["yes"], ["out"], then_branch=inner, else_branch=inner))
    return pair


def of_a_vendor(file):
    file.graph.node[-1].domain = "com.microsoft"
    return file.graph.node[-1]


PLANTED = {
    unsymmetric: "symmetric",
    unsigned: "symmetric",
    scaled_per_channel: "per-tensor activations",
    scaled_at_run_time: "per-tensor activations",
    scaled_by_zero: "positive scales",
    along_another_axis: "weight axis",
    Editing.quantize_branch: "residual add",
    Editing.unquantize_skip: "residual add",
    mixed: "one kind of 8 bits",
    of_one_image: "dynamic batch",
    of_a_vendor: "standard operators",
    of_integers: "standard operators",
    in_sixteen_bits: "symmetric",
    inside_a_branch: "symmetric",
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_what_breaks_a_rule_is_found_where_it_was_planted(plant, sound, tmp_path):
    file = Editing(sound)
    node = plant(file)
    onnx.save(file.model, tmp_path / "planted.onnx")
    found = check_tensorrt_rules(tmp_path / "planted.onnx")
    assert {violation.rule for violation in found} == {PLANTED[plant]}
    assert (node.name or node.output[0]) in {violation.node for violation in found}
    assert all(": " in violation.problem for violation in found)  # what is wrong, and what to do


def test_every_rule_has_a_violation_that_is_planted():
    assert set(PLANTED.values()) == set(RULES)


def test_a_file_of_target_qdq_keeps_every_rule(sound):
    assert check_tensorrt_rules(sound) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "swin", "eva02", "dinov3"])
@pytest.mark.parametrize(
    ("scheme", "dtype"), [("w8a8-tt", "float32"), ("w8a8-ct+res+attn", "float16"), ("fp8", "float32")]
)
def test_every_file_of_target_qdq_keeps_every_rule(family, scheme, dtype, tmp_path):
    images = make_images(family, 2)
    export_onnx(quantize_static(make_model(family), [images], scheme), tmp_path / "x.onnx", images, dtype=dtype)
    assert check_tensorrt_rules(tmp_path / "x.onnx") == []


def test_the_file_for_onnxruntime_is_not_for_tensorrt(tmp_path):
    model, images = make_model("vit", depth=1), make_images("vit", 2)
    export_onnx(quantize_static(model, [images], "w8a8-tt"), tmp_path / "x.onnx", images, target="onnxruntime")
    assert {violation.rule for violation in check_tensorrt_rules(tmp_path / "x.onnx")} == {
        "symmetric",
        "standard operators",
    }


def test_what_is_no_onnx_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none.onnx cannot be read: No such file"):
        check_tensorrt_rules(tmp_path / "none.onnx")
    (tmp_path / "some.onnx").write_bytes(b"\xff\xff some")
    with pytest.raises(ValueError, match=r"some.onnx is no ONNX file"):
        check_tensorrt_rules(tmp_path / "some.onnx")
