"""How each part says what it computes as records of a `Program`: the parts of which decoders are built.

Looked up by the exact class, since a subclass computes something else. What stands in no table (mixtures of experts,
recurrent mixers, memories, learned biases of distance) has no native computation: `NotLowered`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from allyouneed.nn.attention import Attention
from allyouneed.nn.block import Block, ParallelBlock, PostNorm, PreNorm
from allyouneed.nn.ffn import ACTIVATIONS, MLP, GatedMLP
from allyouneed.nn.norms import LayerNorm, NoNorm, RMSNorm
from allyouneed.nn.packed import KINDS, STEP, PackedEmbedding, PackedLinear
from allyouneed.nn.positions import Alibi, Learned, Positions, Rotary
from allyouneed.nn.program import NotLowered, Program, Weight

Lowering = Callable[..., Any]
_TABLE: dict[type, Lowering] = {}


@dataclass
class Frame:
    """What all layers of one program share; `angles` is the slot of rotary positions, once they were asked for."""

    program: Program
    positions: Positions
    angles: int | None = None

    def turn(self, x: int, heads: int, head_dim: int) -> None:
        """Queries and keys in a slot, as many heads together, turned to their positions."""
        if type(self.positions) is Rotary:
            if self.angles is None:
                self.angles = self.program.angles(self.positions.frequencies())
            self.program.turn(x, self.angles, heads, head_dim)


def lowers(*kinds: type) -> Callable[[Lowering], Lowering]:
    """The decorated function lowers modules of just these classes."""

    def register(function: Lowering) -> Lowering:
        _TABLE.update(dict.fromkeys(kinds, function))
        return function

    return register


def lower(module: nn.Module, *arguments: Any) -> Any:
    """What the module's lowering makes of its arguments.

    Raises:
        NotLowered: there is none, or somebody listens in by a hook.
    """
    if type(module) not in _TABLE or module._forward_hooks or module._forward_pre_hooks:
        raise NotLowered
    return _TABLE[type(module)](module, *arguments)


def weights(*layers: nn.Module) -> list[Weight]:
    """The matrices of linear layers or tables."""
    return [lower(layer) for layer in layers]


@lowers(nn.Linear)
def _linear(layer: nn.Linear) -> Weight:
    return Weight.plain(layer.weight, layer.bias)


@lowers(nn.Embedding)
def _embedding(layer: nn.Embedding) -> Weight:
    return Weight.plain(layer.weight)


@lowers(PackedLinear)
def _packed_linear(layer: PackedLinear) -> Weight:
    return _packed(layer, layer.out_features, layer.in_features, layer.bias)


@lowers(PackedEmbedding)
def _packed_embedding(layer: PackedEmbedding) -> Weight:
    return _packed(layer, layer.num_embeddings, layer.embedding_dim)


def _packed(layer: Any, rows: int, features: int, bias: Tensor | None = None) -> Weight:
    if layer.kind not in KINDS or features % STEP:
        raise NotLowered
    return Weight(layer.blocks, layer.kind, rows, features, bias)


@lowers(RMSNorm)
def _rms_norm(norm: RMSNorm, frame: Frame, x: int) -> int:
    return frame.program.rms_norm(x, norm.weight, norm.eps)


@lowers(LayerNorm)
def _layer_norm(norm: LayerNorm, frame: Frame, x: int) -> int:
    return frame.program.layer_norm(x, norm.weight, norm.bias, norm.eps)


@lowers(NoNorm)
def _no_norm(norm: NoNorm, frame: Frame, x: int) -> int:
    return x


@lowers(Positions, Rotary, Alibi)
def _no_table(positions: Positions) -> None:
    return None


@lowers(Learned)
def _learned(positions: Learned) -> Weight:
    return lower(positions.embedding)


@lowers(Attention)
def _attention(part: Attention, frame: Frame, x: int) -> int:
    program, heads = frame.program, (part.num_heads, part.num_kv_heads)
    qkv = program.multiply(x, weights(part.q, part.k, part.v))
    frame.turn(qkv, sum(heads), part.head_dim)
    slopes = frame.positions.slopes()
    scale = part.head_dim**-0.5 if part.scale is None else part.scale
    attended = program.attend(qkv, *heads, part.head_dim, part.window, scale, slopes)
    found = program.multiply(attended, weights(part.out))
    program.release(qkv, attended)
    return found


@lowers(MLP)
def _mlp(part: MLP, frame: Frame, x: int) -> int:
    program = frame.program
    hidden = program.multiply(x, weights(part.up))
    program.activate(hidden, _name(part.activation))
    found = program.multiply(hidden, weights(part.out))
    program.release(hidden)
    return found


@lowers(GatedMLP)
def _gated(part: GatedMLP, frame: Frame, x: int) -> int:
    program = frame.program
    hidden = program.multiply(x, weights(part.gate, part.up))
    program.gate(hidden, _name(part.activation))
    found = program.multiply(hidden, weights(part.out))
    program.release(hidden)
    return found


@lowers(Block)
def _block(block: Block, frame: Frame, x: int) -> int:
    for norm, branch in ((block.mixer_norm, block.mixer), (block.channel_norm, block.channel)):
        x = _PLACEMENTS[type(block.placement)](frame, x, norm, branch)
    return x


@lowers(ParallelBlock)
def _parallel(block: ParallelBlock, frame: Frame, x: int) -> int:
    pairs = (block.mixer_norm, block.mixer), (block.channel_norm, block.channel)
    normed = [lower(norm, frame, x) for norm, _ in pairs]  # both see the stream before it grows
    if normed[1] == x:  # the second branch would see what the first one added
        raise NotLowered
    for (_, branch), y in zip(pairs, normed, strict=True):
        frame.program.add(x, lower(branch, frame, y))
        _release(frame, x, y)
    return x


def _pre_norm(frame: Frame, x: int, norm: nn.Module, branch: nn.Module) -> int:
    y = lower(norm, frame, x)
    frame.program.add(x, lower(branch, frame, y))
    _release(frame, x, y)
    return x


def _post_norm(frame: Frame, x: int, norm: nn.Module, branch: nn.Module) -> int:
    frame.program.add(x, lower(branch, frame, x))
    y: int = lower(norm, frame, x)
    _release(frame, y, x)
    return y


_PLACEMENTS = {PreNorm: _pre_norm, PostNorm: _post_norm}


def _release(frame: Frame, kept: int, slot: int) -> None:
    """`slot` is not read again, unless a norm that does nothing made it the same as the one kept."""
    if slot != kept:
        frame.program.release(slot)


def _name(function: Callable[[Tensor], Tensor]) -> str:
    found = next((name for name, one in ACTIVATIONS.items() if one is function), None)
    if found is None:
        raise NotLowered
    return found
