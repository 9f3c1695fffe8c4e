"""find_blocks against the published depths of the zoo, against autograd graphs, and on models written by hand."""

import collections
import csv
import functools
import inspect
import re
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import Block
from timm.utils import ModelEmaV3
from torch import nn

from tests.models import tiny_vit
from tweo_timm.blocks import channel_axis, find_blocks
from tweo_timm.stream import streams_in

with (Path(__file__).parent / "golden" / "blocks.csv").open() as file:
    GOLDEN = list(csv.DictReader(file))

# Backward nodes that only move values, or normalise what a residual addition returned (post-norm, ReLU after the sum).
PASSING = re.compile(r"(View|Permute|Transpose|UnsafeView|Clone|NativeLayerNorm|Relu|Silu|Cat)Backward\d")


def on_meta(arch, **options):
    with torch.device("meta"):
        return timm.create_model(arch, **options)


def run(model, blocks, batch=2):
    """Outputs of every call of every block in one training forward pass."""
    outputs = collections.defaultdict(list)
    handles = [b.register_forward_hook(lambda _, __, out, name=n: outputs[name].append(out)) for n, b in blocks.items()]
    device = next(model.parameters()).device
    model.train()(torch.zeros(batch, *model.default_cfg["input_size"], device=device))
    for handle in handles:
        handle.remove()
    return outputs


def ends_in_an_addition(output):
    node = output.grad_fn
    while PASSING.fullmatch(type(node).__name__):
        node = next(inner for inner, _ in node.next_functions if inner is not None)
    return type(node).__name__ == "AddBackward0"


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: row["arch"])
def test_blocks_are_those_of_the_published_depth_called_once_and_residual(row):
    if not timm.is_model(row["arch"]):
        pytest.skip(f"timm {timm.__version__} has no {row['arch']}")
    model = on_meta(row["arch"])
    blocks = find_blocks(model)
    assert len(blocks) == int(row["blocks"])
    assert all(re.fullmatch(row["names"], name) for name in blocks)
    outputs = run(model, blocks)
    for name, block in blocks.items():
        assert len(outputs[name]) == 1, name
        streams = streams_in(outputs[name][0], block)
        assert all(ends_in_an_addition(stream) for stream in streams), name
        output = streams[0]
        axis = channel_axis(block, output)
        assert axis == int(row["axis"]), name
        coinciding = torch.empty((output.shape[axis],) * output.ndim, device="meta")
        assert channel_axis(block, coinciding) == axis, f"{name}: decided by the shape alone"


FAMILIES = [
    "vision_transformer",
    "vision_transformer_relpos",
    "vision_transformer_hybrid",
    "deit",
    "beit",
    "eva",
    "cait",
    "xcit",
    "hiera",
    "swin_transformer",
    "swin_transformer_v2",
    "swin_transformer_v2_cr",
    "maxxvit",
    "naflexvit",
    "twins",
    "pvt_v2",
    "davit",
    "metaformer",
    "volo",
    "levit",
    "nest",
    "gcvit",
    "edgenext",
    "mobilevit",
    "fastvit",
    "efficientformer",
    "convit",
    "crossvit",
    "coat",
    "pit",
    "tiny_vit",
    "visformer",
]


def test_the_table_holds_every_family_and_enough_architectures():
    known = [row["arch"] for row in GOLDEN if timm.is_model(row["arch"])]
    files = {timm.model_entrypoint(arch).__module__.rpartition(".")[2] for arch in known}
    assert len(set(known)) >= 40
    assert set(FAMILIES) <= files


# Attention that is no residual transformer block: gates of convolution nets, and pooling heads.
NO_BLOCKS = {"SplitAttn", "SelectiveKernelAttn", "BatNonLocalAttn", "BilinearAttnTransform", "AttentionPool2d"}


def attention_classes(model):
    """Independent of find_blocks: classes named after attention, and classes that call torch's fused attention."""
    named = {type(m) for m in model.modules() if re.search("Attention|Attn|MHSA|SHSA|MHA|MLA", type(m).__name__)}
    timms = {type(m) for m in model.modules() if type(m).__module__.startswith("timm.")}
    return {c.__name__ for c in named | {c for c in timms if calls_fused_attention(c)}}


@functools.cache
def calls_fused_attention(cls):
    return "scaled_dot_product_attention" in inspect.getsource(cls)


@pytest.mark.slow
def test_every_architecture_of_timm_with_attention_is_covered_or_known_to_have_no_block(capsys):
    covered, refused, unexplained, surprising = [], collections.Counter(), [], []
    for arch in timm.list_models():
        model = on_meta(arch)
        attention = attention_classes(model)
        try:
            find_blocks(model)
        except ValueError:
            if attention & NO_BLOCKS and attention <= NO_BLOCKS:
                refused[", ".join(sorted(attention))] += 1
            elif attention:
                unexplained.append(arch)
        else:
            (covered if attention else surprising).append(arch)
    total = len(covered) + refused.total() + len(unexplained)
    with capsys.disabled():
        share = 100 * len(covered) / total
        print(f"\n{len(covered)} of timm's {total} architectures with attention are covered ({share:.1f} %)")
        print(f"refused: {dict(refused)}; timm {timm.__version__}, {len(timm.list_models())} architectures in all")
    assert unexplained == []
    assert surprising == []
    assert share >= 95
    if timm.__version__ == "1.0.31":  # as README says
        assert (len(covered), total) == (690, 709)


def test_names_and_modules_are_those_of_named_modules_in_their_order():
    model = on_meta("swin_tiny_patch4_window7_224")
    modules = dict(model.named_modules())
    blocks = find_blocks(model)
    assert all(blocks[name] is modules[name] for name in blocks)
    assert list(blocks) == [name for name in modules if name in blocks]


def test_a_second_search_after_forward_passes_finds_the_same_modules():
    model = tiny_vit()
    before = find_blocks(model)
    for _ in range(2):
        model(torch.zeros(1, 3, 32, 32))
    after = find_blocks(model)
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)


# --- wrappers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        lambda m: torch.compile(m, backend="eager"),
        lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
        lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
    ],
    ids=["data-parallel", "compile", "parallel-of-compiled", "compiled-of-parallel"],
)
def test_wrappers_are_taken_off(wrap):
    model = tiny_vit(depth=3)
    bare = find_blocks(model)
    wrapped = find_blocks(wrap(model))
    assert list(wrapped) == ["blocks.0", "blocks.1", "blocks.2"]
    assert all(wrapped[name] is bare[name] for name in bare)


def test_ddp_is_taken_off(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny_vit()
        found = find_blocks(nn.parallel.DistributedDataParallel(model))
        assert [id(b) for b in found.values()] == [id(b) for b in model.blocks]
    finally:
        torch.distributed.destroy_process_group()


def test_an_ema_yields_the_blocks_of_its_own_copy():
    model = tiny_vit()
    ema = ModelEmaV3(model)
    assert list(find_blocks(ema).values()) == list(ema.module.blocks)


def test_blocks_compiled_one_by_one_are_found_as_the_modules_that_the_model_calls():
    model = tiny_vit()
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="eager")
    found = find_blocks(model)
    assert list(found) == ["blocks.0", "blocks.1"]
    assert list(found.values()) == list(model.blocks)


def test_feature_extractors_keep_the_blocks_that_they_kept():
    model = timm.create_model("vit_tiny_patch16_224", features_only=True, img_size=32, embed_dim=32, num_heads=2)
    assert list(find_blocks(model)) == [f"model.blocks.{i}" for i in range(len(model.model.blocks))]


@pytest.mark.parametrize("arch", ["vit_base_patch16_siglip_224", "maxvit_tiny_tf_224", "swin_tiny_patch4_window7_224"])
def test_a_model_behind_a_normalisation_layer_has_the_same_blocks(arch):
    model = on_meta(arch)
    found = find_blocks(nn.Sequential(nn.Identity(), model))
    assert list(found) == [f"1.{name}" for name in find_blocks(model)]


def test_a_scripted_model_is_refused():
    scripted = torch.jit.ScriptModule()
    with pytest.raises(ValueError, match="scripted"):
        find_blocks(scripted)


def test_what_is_no_module_is_refused_by_its_type():
    with pytest.raises(TypeError, match="str"):
        find_blocks("vit_tiny_patch16_224")


# --- models from elsewhere ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "names", "count"),
    [
        ("vit_b_16", r"encoder\.layers\.encoder_layer_\d+", 12),
        ("swin_t", r"features\.\d+\.\d+", 2 + 2 + 6 + 2),
        ("swin_v2_t", r"features\.\d+\.\d+", 2 + 2 + 6 + 2),
        # torchvision keeps the two attentions of a MaxViT layer as elements of a Sequential: each is a block.
        ("maxvit_t", r"blocks\.\d+\.layers\.\d+\.layers\.(window|grid)_attention", 2 * (2 + 2 + 5 + 2)),
    ],
)
def test_torchvision_transformers(arch, names, count):
    with torch.device("meta"):
        found = find_blocks(getattr(torchvision.models, arch)())
    assert len(found) == count
    assert all(re.fullmatch(names, name) for name in found)


class Attention(nn.Module):
    """Attention as people write it, with the name of its query projection to choose."""

    def __init__(self, width, name="to_qkv"):
        super().__init__()
        self.add_module(name, nn.Linear(width, 3 * width))
        self.out = nn.Linear(width, width)
        self.name = name

    def forward(self, x):
        q, k, v = getattr(self, self.name)(x).chunk(3, dim=-1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v))


class FeedForward(nn.Sequential):
    def __init__(self, width):
        super().__init__(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class PreNorm(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), inner

    def forward(self, x):
        return self.inner(self.norm(x))


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class HandBlock(nn.Module):
    def __init__(self, width, name="to_qkv"):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.sa, self.ff = Attention(width, name), FeedForward(width)

    def forward(self, x):
        x = x + self.sa(self.norm1(x))
        x += self.ff(self.norm2(x))
        return x


class InlineBlock(nn.Module):
    """Attention and feed-forward in one module, with no attention module in it."""

    def __init__(self, width):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = FeedForward(width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v))
        return torch.add(x, self.mlp(x))


class TorchBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mha = nn.MultiheadAttention(width, 2, batch_first=True)
        self.lin_a, self.lin_b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        x = x.add(self.mha(x, x, x)[0])
        return x + self.lin_b(self.lin_a(x).relu())


class NamedOneByOne(nn.Module):
    """Blocks as plain attributes, not in a container."""

    def __init__(self, width):
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.block_a, self.block_b = HandBlock(width), HandBlock(width)

    def forward(self, x):
        return self.block_b(self.block_a(self.stem(x)))


class TransformersStyleLayer(nn.Module):
    """The nesting of Hugging Face's ViT: attention.attention.query, attention.output.dense, intermediate, output."""

    def __init__(self, width):
        super().__init__()
        core = nn.Module()
        core.query, core.key, core.value = (nn.Linear(width, width) for _ in range(3))
        self.attention = nn.ModuleDict({"attention": core, "output": nn.ModuleDict({"dense": nn.Linear(width, width)})})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 2 * width)})
        self.output = nn.ModuleDict({"dense": nn.Linear(2 * width, width)})

    def forward(self, x):
        core = self.attention["attention"]
        h = nn.functional.scaled_dot_product_attention(core.query(x), core.key(x), core.value(x))
        x = self.attention["output"]["dense"](h) + x
        return self.output["dense"](self.intermediate["dense"](x).relu()) + x


def pair(width):
    return nn.Sequential(Residual(PreNorm(width, Attention(width))), Residual(PreNorm(width, FeedForward(width))))


WRITTEN_BY_HAND = {
    "blocks in a Sequential at the root": (
        lambda: nn.Sequential(nn.Linear(8, 8), HandBlock(8), HandBlock(8), nn.LayerNorm(8)),
        ["1", "2"],
    ),
    "a single block in a container": (lambda: nn.Sequential(nn.Sequential(HandBlock(8))), ["0.0"]),
    "attention and feed-forward in one module": (lambda: nn.Sequential(InlineBlock(8), InlineBlock(8)), ["0", "1"]),
    "nn.MultiheadAttention": (lambda: nn.Sequential(TorchBlock(8), TorchBlock(8)), ["0", "1"]),
    "torch's encoder layers": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        ["layers.0", "layers.1"],
    ),
    "pairs of residual halves": (lambda: nn.Sequential(pair(8), pair(8)), ["0", "1"]),
    "a flat series of residual halves": (lambda: nn.Sequential(*pair(8), *pair(8)), ["0", "2"]),
    "plain attributes": (lambda: NamedOneByOne(8), ["block_a", "block_b"]),
    "deep attention modules": (
        lambda: nn.Sequential(TransformersStyleLayer(8), TransformersStyleLayer(8)),
        ["0", "1"],
    ),
}


@pytest.mark.parametrize("case", WRITTEN_BY_HAND)
def test_models_written_by_hand(case):
    build, names = WRITTEN_BY_HAND[case]
    model = build()
    found = find_blocks(model)
    assert list(found) == names
    outputs = {}
    for name, block in found.items():
        block.register_forward_hook(lambda _, __, out, name=name: outputs.setdefault(name, out))
    model.train()(torch.zeros(2, 5, 8))
    assert all(ends_in_an_addition(outputs[name]) for name in names)


@pytest.mark.parametrize("name", ["qkv", "to_qkv", "qkv_proj", "Wqkv", "W_q", "query", "queries", "q_linear", "c_attn"])
def test_the_usual_names_of_query_projections_are_known(name):
    assert list(find_blocks(nn.Sequential(HandBlock(8, name), HandBlock(8, name)))) == ["0", "1"]


def test_a_module_in_two_places_counts_once():
    block = HandBlock(8)
    assert list(find_blocks(nn.Sequential(block, block, HandBlock(8)))) == ["0", "2"]


def test_residual_additions_outside_of_modules_leave_nothing_to_hook():
    """x = attn(x) + x; x = ff(x) + x in the model's own forward: no module returns the stream."""
    layers = nn.ModuleList([nn.ModuleList([PreNorm(8, Attention(8)), PreNorm(8, FeedForward(8))]) for _ in range(2)])
    with pytest.raises(ValueError, match=r"no residual transformer blocks.*2 found"):
        find_blocks(layers)


# --- errors and names by hand ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "series"),
    [
        ("resnet18", r"layer\d+\.\d+"),
        ("convnext_tiny", r"stages\.\d+\.blocks\.\d+"),
        ("mixer_s16_224", r"blocks\.\d+"),
        ("poolformer_s12", r"stages\.\d+\.blocks\.\d+"),
        ("efficientnet_b0", r"blocks\.\d+\.\d+"),
        ("resnet50_clip", r"stages\.\d+\.\d+"),
        ("cs3sedarknet_l", r"stages\.\d+\.blocks\.\d+"),
        ("vgg11", "none"),
    ],
)
def test_a_model_without_blocks_says_what_was_looked_for_and_offers_a_working_expression(arch, series):
    model = on_meta(arch)
    with pytest.raises(ValueError, match="no residual transformer blocks") as error:
        find_blocks(model)
    message = str(error.value)
    assert type(model).__name__ in message
    assert "attention" in message
    assert "blocks=REGEX" in message
    assert "--tweo-blocks" in message
    assert series in message
    if series != "none":
        assert len(find_blocks(model, series)) > 1


def test_an_expression_names_modules_by_their_whole_name():
    model = tiny_vit(depth=3)
    assert list(find_blocks(model, r"blocks\.[02]")) == ["blocks.0", "blocks.2"]
    assert list(find_blocks(model, r"blocks\.\d+\.mlp\.fc2")) == [f"blocks.{i}.mlp.fc2" for i in range(3)]
    assert find_blocks(model, r"blocks\.1")["blocks.1"] is model.blocks[1]
    assert list(find_blocks(nn.DataParallel(model), r"blocks\.1")) == ["blocks.1"]


def test_an_expression_names_the_inner_attentions_of_maxvit():
    blocks = find_blocks(on_meta("maxvit_tiny_tf_224"), r"stages\.\d+\.blocks\.\d+\.attn_(block|grid)")
    assert len(blocks) == 22


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("block", r"near names: blocks"),
        ("layers.0", r"near names: .*blocks\.\d"),
        ("blocks.[0", "not a regular expression"),
        ("xyzzy", r"near names: none.*blocks\\\.\\d\+ \(3 modules\)"),
        ("blocks.*", r"both blocks and blocks\.0 inside it.*such as blocks\\\.\\d\+"),
        ("", "whole name of no module"),
    ],
)
def test_an_expression_that_names_nothing_useful_is_an_error_with_a_remedy(expression, reason):
    with pytest.raises(ValueError, match=reason):
        find_blocks(tiny_vit(depth=3), expression)


def test_a_container_that_is_never_called_cannot_be_named():
    with pytest.raises(ValueError, match=r"blocks.*ModuleList.*never called"):
        find_blocks(on_meta("twins_svt_small"), "blocks")


def test_a_class_without_source_gets_the_benefit_of_the_doubt():
    """Classes made in an interactive session have no file; they are blocks all the same."""
    session = {"nn": nn}
    source = """
class InteractiveBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2)
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    def forward(self, x):
        return self.mlp(x)
"""
    exec(source, session)
    block = session["InteractiveBlock"]
    assert list(find_blocks(nn.Sequential(block(), block()))) == ["0", "1"]


# --- channel_axis ---------------------------------------------------------------------------------------------------


def small(arch, **options):
    model = timm.create_model(arch, num_classes=3, **options).eval()
    return model, find_blocks(model)


@pytest.mark.parametrize(
    ("arch", "options", "axis"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}, -1),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}, -1),
        ("hiera_tiny_224", {"img_size": 64, "embed_dim": 16, "num_heads": 1}, -1),
        ("test_vit3", {}, -1),
        ("test_coatnet", {}, 1),
    ],
)
def test_the_channel_axis_is_the_one_along_which_a_bias_moves_one_channel(arch, options, axis):
    """Independent of shapes: bump channel 3 in the bias of the block's last layer and see along which axis it moved."""
    model, blocks = small(arch, **options)
    name, block = next(iter(blocks.items()))
    last = [m for m in block.modules() if isinstance(m, nn.Linear | nn.Conv2d) and m.bias is not None][-1]
    outputs = []
    block.register_forward_hook(lambda _, __, out: outputs.append(out))
    image = torch.randn(1, *model.default_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    if "img_size" in options:
        image = image[..., : options["img_size"], : options["img_size"]]
    with torch.no_grad():
        model(image)
        last.bias[3] += 1
        model(image)
    moved = (outputs[1] - outputs[0]).abs()
    found = channel_axis(block, outputs[0])
    assert found == axis, name
    assert moved.select(found, 3).min() > 0
    others = [i for i in range(moved.shape[found]) if i != 3]
    assert moved.index_select(found, torch.tensor(others)).max() == 0


SWIN = find_blocks(on_meta("swin_tiny_patch4_window7_224"))["layers.0.blocks.0"]
MAXVIT = find_blocks(on_meta("maxvit_tiny_tf_224"))["stages.0.blocks.0"]
VIT = Block(32, 2)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(1, 130), st.integers(1, 130), st.integers(1, 4))
def test_no_spatial_size_deceives_the_channel_axis(height, width, batch):
    assert channel_axis(SWIN, torch.empty(batch, height, width, 96, device="meta")) == -1
    assert channel_axis(MAXVIT, torch.empty(batch, 64, height, width, device="meta")) == 1
    assert channel_axis(VIT, torch.empty(batch, height, 32, device="meta")) == -1


def test_channel_axis_of_blocks_without_weight_layers_and_of_odd_shapes():
    assert channel_axis(VIT, torch.empty(7, 32)) == -1
    assert channel_axis(nn.Identity(), torch.empty(2, 3, 4, 5)) == -1
    assert channel_axis(nn.Sequential(nn.BatchNorm2d(3)), torch.empty(2, 3, 4, 5)) == 1
    assert channel_axis(nn.Sequential(nn.Conv1d(3, 6, 1)), torch.empty(2, 6, 5)) == 1
    with pytest.raises(ValueError, match=r"at least 2 axes.*\(5,\)"):
        channel_axis(VIT, torch.empty(5))


def test_channels_last_memory_is_still_nchw():
    block = timm.create_model("test_coatnet").stages[2].blocks[0]
    output = torch.empty(2, channels := block.mlp.fc2.out_channels, channels, channels)
    assert channel_axis(block, output.to(memory_format=torch.channels_last)) == 1
