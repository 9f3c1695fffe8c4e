"""The words for a residual stream: which tensors write it, which read it, through which norms, and where it ends.

What may be rewritten has to be known, not guessed: a tensor that is left out of an exact rewriting makes it a wrong
one. So these records are declared, family by family (families.py), and nothing here knows a family.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


class Unsupported(ValueError):  # noqa: N818 - the reason is the message, and users catch a ValueError
    """A model whose stream cannot be described; the message says why."""


@dataclass(frozen=True)
class Share:
    """Rows of a reader, and the bias that takes what a constant in the reader's input gives in them.

    Attributes:
        bias: name of the parameter; "" where these rows are keys and softmax takes a constant away.
        rows: first row and the row after the last.
    """

    bias: str
    rows: tuple[int, int]


@dataclass(frozen=True)
class Port:
    """One tensor with an axis along the channels of a stream.

    Attributes:
        module: the module that holds it; "" for the model itself.
        parameter: its name in the module.
        axis: the axis that runs over the stream's channels.
        role: whether its module adds to the stream or computes from it.
        norm: of a reader: the norm that stands between the stream and it; "" for none.
        scale: of a writer: the parameter (LayerScale's) that multiplies its output, channel by channel; "" for none.
        copies: how many tokens' channels lie one after the other on the axis (4 in Swin's patch merging).
        shares: of a reader: where a constant of its input can go; () if it has to stay in the norm.
    """

    module: str
    parameter: str
    axis: int
    role: Literal["writes", "reads"]
    norm: str = ""
    scale: str = ""
    copies: int = 1
    shares: tuple[Share, ...] = ()

    @property
    def name(self) -> str:
        """The tensor's name in the state dict."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter


@dataclass(frozen=True)
class Values:
    """The values of one attention, from the layer that makes them to the one that reads their mixtures, head by head.

    Attributes:
        weight: name of the weight whose rows make values.
        rows: the first of them and the row after the last.
        bias: name of the bias that is added to them; "" for none.
        bias_rows: the same for the bias.
        projection: the Linear layer that reads the heads' mixtures, one after the other.
        heads: how many heads of values there are.
        norm: a norm over all heads in front of the projection; "" for none.
    """

    weight: str
    rows: tuple[int, int]
    bias: str
    bias_rows: tuple[int, int]
    projection: str
    heads: int
    norm: str = ""


@dataclass
class Stage:
    """A stretch of blocks that share one stream.

    Attributes:
        name: such as "blocks" or "layers.1".
        width: channels of the stream.
        blocks: names of the blocks, in forward order.
        writers: every tensor that adds to the stream, biases and tokens too.
        readers: every weight that computes from it.
        values: of its attentions, but those whose outputs are gated or otherwise looked at channel by channel.
        features: None where a head reads the last norm; else the name of that norm, whose output is the model's ("":
            the stream itself is).
    """

    name: str
    width: int
    blocks: list[str] = field(default_factory=list)
    writers: list[Port] = field(default_factory=list)
    readers: list[Port] = field(default_factory=list)
    values: list[Values] = field(default_factory=list)
    features: str | None = None

    @property
    def ports(self) -> list[Port]:
        """Writers and readers."""
        return [*self.writers, *self.readers]

    @property
    def norms(self) -> dict[str, list[Port]]:
        """The norms through which the stream is read, and the readers behind each."""
        norms: dict[str, list[Port]] = {self.features: []} if self.features else {}
        for port in self.readers:
            if port.norm:
                norms.setdefault(port.norm, []).append(port)
        return norms


@dataclass
class Stream:
    """The streams of a model that may be rewritten.

    Attributes:
        stages: in forward order; at least one.
        undescribed: stages that have to stay as they are, each with the reason.
        scalable: those of them whose stream may still be multiplied by a number: a norm that begins it knows
            directions, but passes a factor on.
    """

    stages: list[Stage]
    undescribed: dict[str, str] = field(default_factory=dict)
    scalable: list[Stage] = field(default_factory=list)
