"""What writes and what reads the residual stream in timm's families: declared, from their code at timm 1.0.31.

A family's forward was read before it was listed, and exact classes are matched: a subclass may do something else in its
forward. Everything else is refused with a reason. tests/test_families.py holds the declarations against what is
observed when the models run, and a rewriting compares outputs on images before it lets anything stand.

Refused: norms that write the stream (pre-transformer norms as in CLIP, res-post-norm as in SwinV2), because their gains
stay in every later residual; poolings that look at single channels (max, PRR); layers that are not plain Linear layers
or convolutions (FP8, adapters, quantized).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from timm.layers import AttentionPoolLatent, GluMlp, HybridEmbed, LayerScale, Mlp, PatchEmbed, SwiGLU
from timm.layers.attention import Attention, AttentionRope
from timm.layers.diff_attention import DiffAttention
from timm.layers.hybrid_embed import HybridEmbedWithSize
from timm.layers.patch_embed import PatchEmbedWithSize
from timm.models import beit, cait, eva, swin_transformer, vision_transformer, vision_transformer_relpos
from timm.utils import unwrap_model
from torch import nn

from tweo_timm.draft import NORM_WRITES, Draft
from tweo_timm.prenorm import PreNorm
from tweo_timm.structure import Share, Stage, Stream, Unsupported, Values

_EMBEDDINGS = (PatchEmbed, PatchEmbedWithSize, HybridEmbed, HybridEmbedWithSize)
_ATTENTIONS = (
    Attention,
    AttentionRope,
    DiffAttention,
    beit.Attention,
    cait.ClassAttn,
    cait.TalkingHeadAttn,
    eva.EvaAttention,
    swin_transformer.WindowAttention,
    vision_transformer_relpos.RelPosAttention,
)
_MLPS = (Mlp, GluMlp, SwiGLU)
_PROJECTIONS = ("qkv", "q", "k", "v", "q_proj", "k_proj", "v_proj", "gate")


class Family(Protocol):
    """A family of models that share a forward."""

    def matches(self, model: nn.Module) -> bool:
        """Whether the model is of this family."""

    def describe(self, model: Any) -> Stream:
        """Describe the model's streams.

        Raises:
            Unsupported: naming the part that does not permit it.
        """


def describe_stream(model: nn.Module) -> Stream:
    """Return the tensors that write and read the residual stream of a model, stage by stage.

    Args:
        model: a timm model, or one of the same plan (prenorm.py), possibly wrapped by DDP or torch.compile.

    Raises:
        Unsupported: (a ValueError) with the reason why this model cannot be rewritten.
    """
    model = unwrap_model(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise Unsupported("a scripted model cannot be rewritten: pass the model that torch.jit.script was given")
    families: tuple[Family, ...] = (*FAMILIES, PreNorm())
    for family in families:
        if family.matches(model):
            stream = family.describe(model)
            _refuse_shared(model, stream)
            return stream
    known = ", ".join([f.name for f in FAMILIES if f.described_by is not _post_norm_swin] + [PreNorm.name])
    raise Unsupported(
        f"{type(model).__name__}: what writes and reads the residual stream of this family has not been described; "
        f"described are {known}"
    )


# --- Blocks ----------------------------------------------------------------------------------------------------------


def _pre_norm_block(draft: Draft, name: str, block: Any, keys_shift: bool = False) -> None:
    """Pre-norm: x + scale1 * attn(norm1(x)), then x + scale2 * mlp(norm2(x))."""
    _attention(draft, f"{name}.attn", block.attn, f"{name}.norm1", _scale(name, block, "1"), keys_shift)
    _mlp(draft, f"{name}.mlp", block.mlp, f"{name}.norm2", _scale(name, block, "2"))


def _scale(name: str, block: Any, index: str) -> str:
    """The parameter that scales a branch: LayerScale's, or the block's own; "" for none."""
    if isinstance(getattr(block, f"ls{index}", None), LayerScale):
        return f"{name}.ls{index}.gamma"
    return f"{name}.gamma_{index}" if getattr(block, f"gamma_{index}", None) is not None else ""


def _attention(draft: Draft, name: str, attn: Any, norm: str, scale: str, keys_shift: bool = False) -> None:
    if type(attn) not in _ATTENTIONS:
        raise Unsupported(f"{name} is a {type(attn).__name__}, an attention that has not been described")
    for projection in _PROJECTIONS:
        if isinstance(getattr(attn, projection, None), nn.Module):
            draft.reads(f"{name}.{projection}", norm, _attention_shares(name, attn, projection, keys_shift))
    draft.writes(f"{name}.proj", scale)
    if type(attn) is not DiffAttention and getattr(attn, "gate", None) is None:
        draft.stage.values.append(_values(name, attn))


def _values(name: str, attn: Any) -> Values:
    fused = isinstance(getattr(attn, "qkv", None), nn.Module)
    layer = "qkv" if fused else "v_proj" if hasattr(attn, "v_proj") else "v"
    weight, own = f"{name}.{layer}.weight", getattr(attn, layer)
    last = len(own.weight)
    rows = (last // 3 * 2 if fused else 0, last)
    bias, bias_rows = (f"{name}.{layer}.bias", rows) if own.bias is not None else ("", rows)
    if getattr(attn, "v_bias", None) is not None:
        bias, bias_rows = f"{name}.v_bias", (0, len(attn.v_bias))
    heads = getattr(attn, "num_kv_heads", attn.num_heads)
    has_norm = not isinstance(getattr(attn, "norm", None) or nn.Identity(), nn.Identity)
    return Values(weight, rows, bias, bias_rows, f"{name}.proj", heads, f"{name}.norm" if has_norm else "")


def _attention_shares(name: str, attn: Any, projection: str, keys_shift: bool) -> tuple[Share, ...] | None:
    """Where a constant in the input of a projection can go; None: into its own bias.

    A constant added to every key changes all scores of a query alike, which softmax takes away: unless keys are turned
    by their place (RoPE) or normalized afterwards. In Swin the tokens that fill up a window are zeros after the norm
    and see the bias alone, at this image size or at another: nothing may move into it.
    """
    if type(attn) is swin_transformer.WindowAttention:
        return ()
    shifts = keys_shift and isinstance(getattr(attn, "k_norm", None) or nn.Identity(), nn.Identity)
    rows = len(getattr(attn, projection).weight)
    if projection == "k_proj" and attn.k_proj.bias is None and shifts:
        return (Share("", (0, rows)),)
    if projection == "qkv" and getattr(attn, "q_bias", None) is not None:
        third = rows // 3
        q, v = Share(f"{name}.q_bias", (0, third)), Share(f"{name}.v_bias", (2 * third, rows))
        return (q, Share("", (third, 2 * third)), v) if shifts else ()
    return None


def _mlp(draft: Draft, name: str, mlp: Any, norm: str, scale: str) -> None:
    if type(mlp) not in _MLPS:
        raise Unsupported(f"{name} is a {type(mlp).__name__}, a feed-forward part that has not been described")
    for layer in ("fc1_g", "fc1_x") if type(mlp) is SwiGLU else ("fc1",):
        draft.reads(f"{name}.{layer}", norm)
    draft.writes(f"{name}.fc2", scale)


def _parallel_scaling_block(draft: Draft, name: str, block: Any) -> None:
    """Both branches at once: x + scale * (attn(in_norm(x)) + mlp(in_norm(x))), both read by one Linear layer."""
    scale = f"{name}.ls.gamma" if isinstance(block.ls, LayerScale) else ""
    draft.reads(f"{name}.in_proj", f"{name}.in_norm")
    for projection in ("out_proj", "attn_out_proj", "mlp_out_proj"):
        if getattr(block, projection, None) is not None:
            draft.writes(f"{name}.{projection}", scale)


def _parallel_things_block(draft: Draft, name: str, block: Any) -> None:
    """Branches side by side, each with its norm and scale: x + several attentions of x, then x + several MLPs."""
    for branches, part in (("attns", "attn"), ("ffns", "mlp")):
        for index, branch in enumerate(getattr(block, branches)):
            path = f"{name}.{branches}.{index}"
            scale = f"{path}.ls.gamma" if isinstance(branch.ls, LayerScale) else ""
            add = _attention if part == "attn" else _mlp
            add(draft, f"{path}.{part}", getattr(branch, part), f"{path}.norm", scale)


def _post_norm_block(draft: Draft, name: str, block: Any) -> None:
    raise Unsupported(f"{name} is a {type(block).__name__}, whose norms stand after its branches: {NORM_WRITES}")


_BLOCKS: dict[type, Callable[..., None]] = {
    vision_transformer.Block: _pre_norm_block,
    vision_transformer.ParallelScalingBlock: _parallel_scaling_block,
    vision_transformer.DiffParallelScalingBlock: _parallel_scaling_block,
    vision_transformer.ParallelThingsBlock: _parallel_things_block,
    vision_transformer.ResPostBlock: _post_norm_block,
    vision_transformer_relpos.RelPosBlock: _pre_norm_block,
    vision_transformer_relpos.ResPostRelPosBlock: _post_norm_block,
    beit.Block: _pre_norm_block,
    eva.EvaBlock: _pre_norm_block,
    eva.EvaBlockPostNorm: _post_norm_block,
    cait.LayerScaleBlock: _pre_norm_block,
    cait.LayerScaleBlockClassAttn: _pre_norm_block,
    swin_transformer.SwinTransformerBlock: _pre_norm_block,
}


def _blocks(draft: Draft, prefix: str, blocks: Iterable[nn.Module], **given: bool) -> None:
    for index, block in enumerate(blocks):
        name = f"{prefix}.{index}"
        if type(block) not in _BLOCKS:
            raise Unsupported(f"{name} is a {type(block).__name__}, a block that has not been described")
        _BLOCKS[type(block)](draft, name, block, **given if _BLOCKS[type(block)] is _pre_norm_block else {})
        draft.stage.blocks.append(name)


# --- Families --------------------------------------------------------------------------------------------------------


def _vit(model: Any) -> Stream:
    """ViT and what is built like it: embeddings, one series of blocks, a norm, a pool, a head."""
    draft = Draft(model, "blocks", model.embed_dim)
    _embeddings(draft, model)
    # Only keys that no RoPE turns may lose a constant.
    _blocks(draft, "blocks", model.blocks, keys_shift=getattr(model, "rope", None) is None)
    _tail(draft, model)
    return Stream([draft.stage])


def _cait(model: Any) -> Stream:
    """CaiT: as ViT, and blocks of the class token alone, which join the stream of the patches where they read it."""
    draft = Draft(model, "blocks", model.embed_dim)
    _embeddings(draft, model)
    _blocks(draft, "blocks", model.blocks)
    _blocks(draft, "blocks_token_only", model.blocks_token_only)
    _tail(draft, model)
    return Stream([draft.stage])


def _embeddings(draft: Draft, model: Any) -> None:
    if type(model.patch_embed) not in _EMBEDDINGS:
        raise Unsupported(f"patch_embed is a {type(model.patch_embed).__name__}, which has not been described")
    for name in ("patch_embed.norm", "norm_pre"):
        owner = model.patch_embed if name == "patch_embed.norm" else model
        if not isinstance(getattr(owner, name.split(".")[-1], None) or nn.Identity(), nn.Identity):
            raise Unsupported(f"{name} stands before the blocks (as in CLIP): {NORM_WRITES}")
    draft.writes("patch_embed.proj")
    for name in ("cls_token", "reg_token", "dist_token", "pos_embed"):
        draft.parameter(name)


def _tail(draft: Draft, model: Any) -> None:
    norms = [n for n in ("norm", "fc_norm") if not isinstance(getattr(model, n, None) or nn.Identity(), nn.Identity)]
    pool: Any = getattr(model, "attn_pool", None)
    if type(pool) is AttentionPoolLatent:
        if pool.pos_embed is not None:
            raise Unsupported("attn_pool.pos_embed is added after the last norm, whose gains could not be folded then")
        draft.reads("attn_pool.kv", "norm" if "norm" in norms else "")
        return
    if pool is not None:
        raise Unsupported(f"attn_pool is a {type(pool).__name__}, whose heads look at single channels")
    _refuse_pooling(model.global_pool)
    if len(norms) > 1:
        raise Unsupported("norm is read by fc_norm, another norm, which cannot take its gains")
    _heads(draft, model, norms[0] if norms else "", ("head", "head_dist"))


def _refuse_pooling(pool: str) -> None:
    if pool not in ("", "avg", "fast", "fastavg", "token"):
        raise Unsupported(f"pooling {pool!r} takes maxima of single channels, which a rotation mixes")


def _heads(draft: Draft, model: Any, norm: str, names: Iterable[str]) -> None:
    """Add the heads; without one, the last norm's output is the model's."""
    heads = []
    for name in names:
        owner, _, leaf = name.rpartition(".")
        head = getattr(model.get_submodule(owner), leaf, None)
        if head is not None and not isinstance(head, nn.Identity):
            heads.append(name)
    for name in heads:
        draft.reads(name, norm)
    if not heads:
        draft.stage.features = norm
        if norm:
            draft.check_norm(norm, 1)


def _swin(model: Any) -> Stream:
    """Swin: a stream for each stage; patch merging reads four tokens of one stage and begins the next."""
    stages: list[Stage] = []
    scalable: list[Stage] = []
    undescribed: dict[str, str] = {}
    for index, layer in enumerate(model.layers):
        name = f"layers.{index}"
        draft = Draft(model, name, layer.blocks[0].dim)
        begun_by_norm = index == 0 and not isinstance(model.patch_embed.norm, nn.Identity)
        if begun_by_norm:
            undescribed[name] = f"patch_embed.norm begins this stage's stream: {NORM_WRITES}"
            draft.norm_writes("patch_embed.norm")
        else:
            draft.writes(f"{name}.downsample.reduction" if index else "patch_embed.proj")
        _blocks(draft, f"{name}.blocks", layer.blocks)
        if index + 1 < len(model.layers):
            merging = f"layers.{index + 1}.downsample"
            draft.reads(f"{merging}.reduction", f"{merging}.norm", copies=4)
        else:
            _refuse_pooling(model.head.global_pool.pool_type)
            _heads(draft, model, "norm", ("head.fc",))
        (scalable if begun_by_norm else stages).append(draft.stage)
    if not stages:
        raise Unsupported(f"the only stage cannot be rewritten: {undescribed['layers.0']}")
    return Stream(stages, undescribed, scalable)


def _post_norm_swin(model: Any) -> Stream:
    raise Unsupported(f"{type(model).__name__} normalizes after its branches (res-post-norm): {NORM_WRITES}")


@dataclass(frozen=True)
class TimmFamily:
    """A `Family` of timm: exact classes, by the names of their modules, and the function that describes them."""

    name: str
    classes: tuple[str, ...]
    described_by: Callable[[Any], Stream]

    def matches(self, model: nn.Module) -> bool:
        """Whether the model's class is one of the family's."""
        return f"{type(model).__module__}.{type(model).__name__}" in {f"timm.models.{name}" for name in self.classes}

    def describe(self, model: Any) -> Stream:
        """Describe the model's streams."""
        return self.described_by(model)


FAMILIES: tuple[TimmFamily, ...] = (
    TimmFamily("ViT", ("vision_transformer.VisionTransformer", "deit.VisionTransformerDistilled"), _vit),
    TimmFamily("ViT with relative positions", ("vision_transformer_relpos.VisionTransformerRelPos",), _vit),
    TimmFamily("BEiT", ("beit.Beit",), _vit),
    TimmFamily("EVA and DINOv3", ("eva.Eva",), _vit),
    TimmFamily("CaiT", ("cait.Cait",), _cait),
    TimmFamily("Swin", ("swin_transformer.SwinTransformer",), _swin),
    TimmFamily(
        "SwinV2",
        ("swin_transformer_v2.SwinTransformerV2", "swin_transformer_v2_cr.SwinTransformerV2Cr"),
        _post_norm_swin,
    ),
)


def _refuse_shared(model: nn.Module, stream: Stream) -> None:
    """Refuse tensors that two places use: rewritten for one, they would be wrong in the other."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    ports = {port.name for stage in (*stream.stages, *stream.scalable) for port in stage.ports}
    for names in places.values():
        if len(names) > 1 and ports & set(names):
            raise Unsupported(f"{' and '.join(names)} are one tensor: give each its own before the model is rewritten")
