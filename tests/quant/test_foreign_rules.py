"""TensorRT's rules on files that other tools write: the same thing said in other words, and what is wrong in them."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

from onnx import TensorProto, helper, numpy_helper, parser  # noqa: E402

from tweo_timm.quant.tensorrt_rules import check_tensorrt_rules  # noqa: E402

ROUNDED = "{q} = QuantizeLinear({x}, s, z) {y} = DequantizeLinear({q}, s, z)"
LAYER = (
    "q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z) d = DequantizeLinear<axis=1>(w, ws, wz) y = MatMul(a, d)"
)
SMALL = {
    "s": np.float32(0.1),
    "z": np.int8(0),
    "w": np.ones((4, 6), np.int8),
    "ws": np.full(6, 0.1, np.float32),
    "wz": np.zeros(6, np.int8),
    "ws4": np.full(4, 0.1, np.float32),
    "wz4": np.zeros(4, np.int8),
    "floats": np.ones((4, 6), np.float32),
}


def rules_of(tmp_path, body, opset=21, given="float[N,3,4] x", functions="", inner="", **constants):
    """The rules that a little graph breaks; its constants are those of SMALL that it names, and others."""
    body = body.replace("DQ<", "DequantizeLinear<")
    text = f'<ir_version: 10, opset_import: ["": {opset}, "own": 1]> g ({given}) => (float y) {{ {body} }} {functions}'
    model = parser.parse_model(text)
    for name, array in {**SMALL, **constants}.items():
        tensor = array if isinstance(array, onnx.TensorProto) else numpy_helper.from_array(np.asarray(array), name)
        if name in text:
            model.graph.initializer.append(tensor)
    path = tmp_path / "foreign.onnx"
    onnx.save(model, path)
    return {violation.rule for violation in check_tensorrt_rules(path)}


def layer(old="", new=""):
    assert old in LAYER
    return LAYER.replace(old, new)


Q, A = "q = QuantizeLinear(x, s, z)", "a = DequantizeLinear(q, s, z)"
W = "d = DequantizeLinear<axis=1>(w, ws, wz) y = MatMul(a, d)"
SCALE = "(x, s, z) a = DequantizeLinear(q, s, z)"


def scaled_by(made):
    """The layer, whose activation is scaled by what some nodes make."""
    return made + " " + layer(SCALE, "(x, made, z) a = DequantizeLinear(q, made, z)")


def zero_from(made):
    """The layer, whose activation has a zero point that some nodes make."""
    return made + " " + layer(SCALE, "(x, s, made) a = DequantizeLinear(q, s, made)")


def stored_as(attributes):
    """The layer, whose activation has no zero point."""
    return layer(SCALE, "(x, s) a = DequantizeLinear(q, s)").replace(
        "QuantizeLinear(x", f"QuantizeLinear{attributes}(x"
    )


def weighed(words):
    """The layer with other words for its weights; DQ is short for DequantizeLinear."""
    return LAYER.replace(W, words)


LEFT = "x1 = QuantizeLinear(x, s, z) a = DequantizeLinear(x1, s, z) t = Transpose<perm=[0,2,1]>(a) "
TURNED = "f = Transpose<perm=[1,0]>(w) d = DequantizeLinear<axis={axis}>(f, ws, wz) "
FLAT = "r = Constant<value_ints=[-1,4]>() b = Reshape(a, r) "
IMAGES = "i = Constant<value_ints=[-1,4,1,3]>() c = Reshape(a, i) k = Constant<value_ints=[4,6,1,1]>() "
FOUND = {
    "output_dtype int8": (stored_as("<output_dtype=3>"), set()),
    "output_dtype uint8": (stored_as("<output_dtype=2>"), {"symmetric"}),
    "output_dtype int16": (stored_as("<output_dtype=5>"), {"symmetric"}),
    "output_dtype e4m3 beside int8": (stored_as("<output_dtype=17>"), {"one kind of 8 bits"}),
    "no type at all": (stored_as(""), {"symmetric"}),
    "zero through Identity": (zero_from("made = Identity(z)"), set()),
    "three through Identity": (zero_from("made = Identity(three)"), {"symmetric"}),
    "three by value_int": (zero_from("t = Constant<value_int=3>() made = Cast<to=3>(t)"), {"symmetric"}),
    "uint8 through Identity": (zero_from("made = Identity(unsigned)"), {"symmetric"}),
    "zero at run time": (zero_from("m = ReduceMax(x) made = Cast<to=3>(m)"), {"symmetric"}),
    "scale by value_float": (scaled_by("made = Constant<value_float=0.1>()"), set()),
    "one scale by value_floats": (scaled_by("made = Constant<value_floats=[0.1]>()"), set()),
    "two scales by value_floats": (scaled_by("made = Constant<value_floats=[0.1,0.2]>()"), {"per-tensor activations"}),
    "scale through Cast and Reshape": (
        scaled_by("c = Constant<value_ints=[1]>() f = Cast<to=1>(c) made = Reshape(f, c)"),
        set(),
    ),
    "scale at run time": (scaled_by("m = Abs(x) made = ReduceMax<keepdims=0>(m)"), {"per-tensor activations"}),
    "scale of zero": (scaled_by("made = Constant<value_float=0.0>()"), {"positive scales"}),
    "scale not a number": (scaled_by("n = Constant<value_float=0.0>() made = Div(n, n)"), {"positive scales"}),
    "axis -1": (layer("axis=1", "axis=-1"), set()),
    "axis -2": (layer("axis=1", "axis=-2").replace("ws, wz", "ws4, wz4"), {"weight axis"}),
    "axis by default": (layer("<axis=1>", ""), set()),
    "weight on the left": (LEFT + "d = DQ<axis=0>(w4, ws, wz) y = MatMul(d, t)", set()),
    "weight on the left, inputs": (LEFT + "d = DQ<axis=1>(w4, ws4, wz4) y = MatMul(d, t)", {"weight axis"}),
    "turned after": (
        weighed("d = DQ<axis=0>(w4, ws, wz) f = Transpose<perm=[1,0]>(d) y = MatMul(a, f)"), set(),
    ),
    "turned after, inputs": (
        weighed("d = DQ<axis=1>(w4, ws4, wz4) f = Transpose<perm=[1,0]>(d) y = MatMul(a, f)"),
        {"weight axis"},
    ),
    "reshaped after": (
        weighed("d = DQ<axis=0>(w4, ws, wz) c = Constant<value_ints=[6,1,4]>() f = Reshape(d, c) "
        "g = Transpose<perm=[1,2,0]>(f) y = MatMul(a, g)"), set(),
    ),
    "parts put together": (
        weighed("d = DQ<axis=0>(w, ws4, wz4) e = DQ<axis=1>(w, ws, wz) "
        "f = Concat<axis=1>(e, d) y = MatMul(a, f)"), {"weight axis"},
    ),
    "Gemm": (Q + A + FLAT + "d = DQ<axis=1>(w, ws, wz) y = Gemm(b, d)", set()),
    "Gemm transB": (Q + A + FLAT + "d = DQ<axis=0>(w4, ws, wz) y = Gemm<transB=1>(b, d)", set()),
    "Gemm transB, inputs": (
        Q + A + FLAT + "d = DQ<axis=1>(w4, ws4, wz4) y = Gemm<transB=1>(b, d)", {"weight axis"},
    ),
    "Gemm on the left": (
        Q + A + FLAT + "t = Transpose(b) d = DQ<axis=1>(w4, ws4, wz4) y = Gemm(d, t)", {"weight axis"},
    ),
    "Conv, inputs": (
        Q + A + IMAGES + "d = DQ<axis=1>(w1, ws4, wz4) y = Conv(c, d)", {"weight axis"},
    ),
    "ConvTranspose": (
        Q + A + IMAGES + "v = Reshape(w, k) d = DQ<axis=1>(v, ws, wz) y = ConvTranspose(c, d)", set(),
    ),
    "ConvTranspose, inputs": (
        Q + A + IMAGES + "v = Reshape(w, k) d = DQ<axis=0>(v, ws4, wz4) y = ConvTranspose(c, d)",
        {"weight axis"},
    ),
    "float weights quantized in the file": (
        weighed("p = QuantizeLinear<axis=1>(floats, ws, wz) d = DQ<axis=1>(p, ws, wz) y = MatMul(a, d)"),
        set(),
    ),
    "the same, inputs": (
        weighed("p = QuantizeLinear<axis=0>(floats, ws4, wz4) d = DQ<axis=0>(p, ws4, wz4) y = MatMul(a, d)"),
        {"weight axis"},
    ),
    "int8 in blocks": (
        weighed("d = DQ<axis=0, block_size=2>(w, blocks) y = MatMul(a, d)"), {"weight axis"},
    ),
    "int4 in blocks": (weighed("d = DQ<axis=0, block_size=2>(four, blocks) y = MatMul(a, d)"), set()),
    "bias in int32": (layer("y = ", "b = DequantizeLinear<axis=0>(bias, ws) m = ") + " y = Add(m, b)", {"symmetric"}),
    "TensorRT's own operators": ("q = trt.TRT_FP8QuantizeLinear(x, s) y = trt.TRT_FP8DequantizeLinear(q, s)", set()),
    "TensorRT's own, of int4": ("d = trt.DequantizeLinear<axis=0, block_size=2>(four, blocks) y = MatMul(x, d)", set()),
    "QLinearMatMul": ("q = QuantizeLinear(x, s, z) y = QLinearMatMul(q, s, z, w, s, z, s, z)", {"standard operators"}),
}  # fmt: skip
OTHERS = {
    "w4": np.ones((6, 4), np.int8),
    "w1": np.ones((6, 4, 1, 1), np.int8),
    "blocks": np.full((2, 6), 0.1, np.float32),
    "four": helper.make_tensor("four", TensorProto.INT4, (4, 6), np.ones(24, np.int8)),
    "bias": np.zeros(6, np.int32),
    "three": np.int8(3),
    "unsigned": np.uint8(0),
}


@pytest.mark.parametrize("case", FOUND)
def test_a_scale_or_a_type_is_found_in_whatever_words_it_is_said(case, tmp_path):
    body, expected = FOUND[case]
    assert rules_of(tmp_path, body, **OTHERS) == expected


IF = "y = If (c) <then_branch = one () => (float y1) {{ {one} }}, else_branch = two () => (float y2) {{ {two} }}>"


def test_two_branches_may_give_one_name_to_two_things(tmp_path):
    good = "made = Constant<value_float=0.1>() q = QuantizeLinear(x, made, z) y{} = DequantizeLinear(q, made, z)"
    bad = good.replace("Constant<value_float=0.1>()", "ReduceMax<keepdims=0>(x)")
    for one, two, expected in ((good, good, set()), (good, bad, {"per-tensor activations"})):
        body = IF.format(one=one.format(1), two=two.format(2))
        assert rules_of(tmp_path, body, given="float[N,3,4] x, bool c") == expected


def test_a_graph_that_goes_round_in_circles_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the nodes Identity, Identity, Identity wait for each other"):
        rules_of(tmp_path, "a = Identity(b) b = Identity(a) y = Add(a, x)")


def test_nodes_may_stand_in_any_order(tmp_path):
    made = "made = Identity(three) "
    body = zero_from(made).removeprefix(made) + " " + made
    assert rules_of(tmp_path, body, **OTHERS) == {"symmetric"}


def test_functions_are_looked_into(tmp_path):
    functions = '<domain: "own", opset_import: ["": 21]> Rounded (x, s) => (y) {{ {} y = DequantizeLinear(q, s) }}'
    for made, expected in (("", {"symmetric"}), ("<output_dtype=3>", set())):
        function = functions.format(f"q = QuantizeLinear{made}(x, s)")
        assert rules_of(tmp_path, "y = own.Rounded(x, s)", functions=function) == expected


def test_an_initializer_that_is_listed_as_an_input_is_a_constant_as_tensorrt_takes_it(tmp_path):
    given = "float[N,3,4] x, float s, int8 z, int8[4,6] w, float[6] ws, int8[6] wz"
    assert rules_of(tmp_path, LAYER, given=given) == set()


RESIDUAL = LAYER.replace("y = ", "m = ").replace("[", "[") + " "


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        ("y = Add(x, m)", set()),
        (f"{ROUNDED.format(x='m', q='p', y='r')} y = Add(x, r)", {"residual add"}),
        (f"{ROUNDED.format(x='m', q='p', y='r')} y = Sum(r, a)", {"residual add"}),
        (f"{ROUNDED.format(x='m', q='p', y='r')} f = Mul(r, s) y = Add(a, f)", set()),
        (f"n = Mul(m, s) {ROUNDED.format(x='n', q='p', y='r')} y = Add(a, r)", {"residual add"}),
        ("y = Add(a, m)", set()),
        # a mask or a bias that is added to rounded logits is no stream
        (f"{ROUNDED.format(x='m', q='p', y='r')} k = Relu(v) y = Add(r, k)", set()),
    ],
)
def test_an_add_is_residual_if_one_side_takes_part_in_the_other(tail, expected, tmp_path):
    given = "float[N,3,4] x, float[N,3,4] v"
    square = {"w": np.ones((4, 4), np.int8), "ws": SMALL["ws4"], "wz": SMALL["wz4"]}
    assert rules_of(tmp_path, RESIDUAL + tail, given=given, **square) == expected


def test_a_stream_without_a_class_token_comes_from_a_product_itself(tmp_path):
    """The embedding is a product too; the add after the first block is residual all the same."""
    square = {"w": np.ones((4, 4), np.int8), "ws": SMALL["ws4"], "wz": SMALL["wz4"]}
    body = f"n = MatMul(x, f) m = MatMul(n, f) {ROUNDED.format(x='m', q='p', y='r')} y = Add(n, r)"
    assert rules_of(tmp_path, body, f=np.ones((4, 4), np.float32), **square) == {"residual add"}


def test_scales_in_a_file_beside_it_are_read_and_missed_by_name(tmp_path):
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21]> g (float[N,3,4] x) => (float y) {{ {LAYER} }}'
    )
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(SMALL[n]), n) for n in ("s", "z", "w", "ws", "wz")
    )
    onnx.save(model, tmp_path / "x.onnx", save_as_external_data=True, location="x.data", size_threshold=0)
    assert check_tensorrt_rules(tmp_path / "x.onnx") == []
    (tmp_path / "x.data").unlink()
    with pytest.raises(ValueError, match=r"z cannot be read: .*; keep the file with the weights beside it"):
        check_tensorrt_rules(tmp_path / "x.onnx")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_onnxruntimes_own_quantization_breaks_rules_unless_it_is_told_tensorrts(tmp_path):
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    from tests.quant.families import make_images, make_model
    from tweo_timm.quant.export import export_onnx

    class Images(CalibrationDataReader):
        def __init__(self):
            self.left = [{"images": make_images("vit", 2).numpy()}]

        def get_next(self):
            return self.left.pop() if self.left else None

    export_onnx(make_model("vit", depth=1), tmp_path / "float.onnx", make_images("vit", 2))
    told = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False, "AddQDQPairToWeight": True}
    kinds = {
        "activation_type": QuantType.QInt8,
        "weight_type": QuantType.QInt8,
        "op_types_to_quantize": ["MatMul", "Gemm"],
    }
    for how, expected in (({}, {"symmetric"}), ({"extra_options": told, **kinds}, set())):
        quantize_static(tmp_path / "float.onnx", tmp_path / "q.onnx", Images(), per_channel=True, **how)
        assert {violation.rule for violation in check_tensorrt_rules(tmp_path / "q.onnx")} >= expected
    assert check_tensorrt_rules(tmp_path / "q.onnx") == []
