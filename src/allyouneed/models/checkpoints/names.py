"""Rules between the names and layouts of our tensors and those of other people's checkpoints, read in both directions.

A rule ties one tensor of theirs to one or more of ours; `{i}` stands for the number of the layer (of a model with two
stacks, `{j}` for that of the second). The layouts differ in
three ways: transposed (GPT-2 stores matrices input × output), fused (queries, keys and values in one; or, the other way
round, ours has all experts' matrices in one where theirs has each by itself), and permuted (GGUF stores the rotary
pairs of LLaMA's queries and keys next to each other). Fusing and permuting only ever move
whole rows, so that rules without a transposition serve blocks of quantised bytes as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from allyouneed.core.errors import InputError, brief

# tensors that old checkpoints carry and every model computes for itself
COMPUTED = (
    *(".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias"),
    "embeddings.position_ids",
    "coder.embed_positions.weight",  # Marian's sines and cosines
    ".EncDecAttention.relative_attention_bias.weight",  # T5's, which no implementation looks at
)
SHOWN = 3  # tensors that a message names
HOMELESS = "which have no place in this model: it would compute without them"

Split = Callable[[Tensor], Sequence[Tensor]]
Join = Callable[[Sequence[Tensor]], Tensor]


def _whole(tensor: Tensor) -> Sequence[Tensor]:
    return (tensor,)


def _only(parts: Sequence[Tensor]) -> Tensor:
    return parts[0]


@dataclass(frozen=True)
class Rule:
    """`split` makes ours of theirs, `join` theirs of ours."""

    ours: tuple[str, ...]
    theirs: str
    split: Split = _whole
    join: Join = _only
    optional: bool = False  # left out of many checkpoints (a tied head)
    again: bool = False  # a second name of what another rule has; compared where it stands, and never written
    mend: str = ""  # what to do where the two are not the same
    row: int | None = None  # theirs is this one of those stacked in ours

    @property
    def plain(self) -> bool:
        """Whether it is another name and nothing else, whatever the tensor is stored as."""
        return self.split is _whole and self.join is _only and not self.again

    def at(self, sign: str, layer: int) -> Rule:
        """The rule for one layer."""
        ours = tuple(name.replace(f"{{{sign}}}", str(layer)) for name in self.ours)
        return replace(self, ours=ours, theirs=self.theirs.replace(f"{{{sign}}}", str(layer)))


def same(ours: str, theirs: str) -> Rule:
    """Another name, nothing else."""
    return Rule((ours,), theirs)


def again(ours: str, theirs: str, mend: str = "") -> Rule:
    """A second name under which some checkpoints hold the same tensor once more."""
    return Rule((ours,), theirs, optional=True, again=True, mend=mend)


def head(theirs: str, *, tied: bool, embedding: str = "embedding.weight") -> Rule:
    """The head's matrix; a tied one is the embedding, which some checkpoints hold once more under the head's name."""
    if tied:
        return again(embedding, theirs, mend="for a head of its own, set tie_word_embeddings to false in config.json")
    return same("head.weight", theirs)


def both(ours: str, theirs: str) -> tuple[Rule, Rule]:
    """Weight and bias of one layer under another name."""
    return same(f"{ours}.weight", f"{theirs}.weight"), same(f"{ours}.bias", f"{theirs}.bias")


def stacked(ours: str, theirs: str, count: int) -> list[Rule]:
    """`count` matrices, each under a name of its own in which `{e}` is its number, in one of ours (count, …)."""

    def rule(e: int) -> Rule:
        return Rule((ours,), theirs.replace("{e}", str(e)), join=lambda parts: parts[0][e].contiguous(), row=e)

    return [rule(e) for e in range(count)]


def transposed(ours: str, theirs: str) -> Rule:
    """A matrix stored input × output."""
    return Rule((ours,), theirs, lambda t: (t.t().contiguous(),), lambda parts: parts[0].t().contiguous())


def thirds(ours: Iterable[str], theirs: str) -> Rule:
    """Queries, keys and values as the first, second and last third of the rows."""
    return Rule(tuple(ours), theirs, lambda t: t.chunk(3), lambda parts: torch.cat(tuple(parts)))


def transposed_thirds(ours: Iterable[str], theirs: str) -> Rule:
    """The same in a matrix stored input × output."""
    return Rule(
        tuple(ours),
        theirs,
        lambda t: [part.contiguous() for part in t.t().chunk(3)],
        lambda parts: torch.cat(tuple(parts)).t().contiguous(),
    )


def by_head(ours: Iterable[str], theirs: str, num_heads: int) -> Rule:
    """Queries, keys and values interleaved: for each head its query rows, key rows, value rows."""

    def split(tensor: Tensor) -> list[Tensor]:
        heads = tensor.unflatten(0, (num_heads, 3, -1))
        return [heads[:, n].flatten(0, 1).contiguous() for n in range(3)]

    def join(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([part.unflatten(0, (num_heads, -1)) for part in parts], 1).flatten(0, 2).contiguous()

    return Rule(tuple(ours), theirs, split, join)


def paired(ours: str, theirs: str, num_heads: int) -> Rule:
    """Rows whose rotary partners stand next to each other (0, 1), not half a head apart (0, D/2)."""

    def split(tensor: Tensor) -> tuple[Tensor]:
        return (tensor.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous(),)

    def join(parts: Sequence[Tensor]) -> Tensor:
        return parts[0].unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()

    return Rule((ours,), theirs, split, join)


def expand(rules: Iterable[Rule], layers: Mapping[str, int]) -> Iterator[Rule]:
    """The rules with `{i}` replaced by each layer's number, i being a key of `layers`."""
    for rule in rules:
        sign = next((sign for sign in layers if f"{{{sign}}}" in rule.theirs), None)
        if sign is None:
            yield rule
        else:
            yield from (rule.at(sign, layer) for layer in range(layers[sign]))


def listed(names: Sequence[str], tensors: Mapping[str, Any] | None = None) -> str:
    """The first few of `names` for a message, with the shapes that `tensors` have, and how many more there are.

    >>> listed(["a", "b", "c", "d"], {name: torch.zeros(2) for name in "abcd"})
    "'a' [2], 'b' [2], 'c' [2] and 1 more"
    """
    shown = [brief(name) + (f" {list(tensors[name].shape)}" if tensors else "") for name in names[:SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def to_ours(
    rules: Iterable[Rule], layers: Mapping[str, int], theirs: Mapping[str, Tensor], source: object
) -> dict[str, Tensor]:
    """Our tensors from their checkpoint.

    Raises:
        InputError: a tensor is missing, or cannot be divided as the rule asks.
    """
    rules = list(expand(rules, layers))
    known = {rule.theirs for rule in rules}
    strange = [name for name in theirs if name not in known and not name.endswith(COMPUTED)]
    missing = [rule.theirs for rule in rules if rule.theirs not in theirs and not rule.optional]
    if strange or missing:
        faults = [f"lacks {listed(missing)}"] if missing else []
        faults += [f"holds {listed(strange, theirs)}, {HOMELESS}"] if strange else []
        raise InputError(f"{source}: {'; '.join(faults)}")
    found: dict[str, Tensor] = {}
    stacks: dict[str, list[Tensor]] = {}
    for rule in rules:
        if rule.theirs not in theirs:
            continue
        for name, part in zip(rule.ours, _parts(rule, theirs[rule.theirs], source), strict=True):
            if rule.row is not None:
                stacks.setdefault(name, []).append(part)
                continue
            if rule.again and name in found:
                first = next(one.theirs for one in rules if name in one.ours)
                check_shared({first: found[name], rule.theirs: part}, source, rule.mend)
            found[name] = part
    return found | {name: _stack(name, parts, source) for name, parts in stacks.items()}


def check_shared(tensors: Mapping[str, Tensor], source: object, mend: str = "") -> None:
    """Refuse two tensors of a checkpoint that are one in the model unless they are the same.

    Raises:
        InputError: they are not; says their names and shapes, and `mend`.
    """
    one, other = tensors.values()
    if one.shape != other.shape or not torch.equal(one, other.to(one.dtype)):
        named = " and ".join(listed([name], tensors) for name in tensors)
        raise InputError(f"{source}: {named} differ, but this model has one tensor for both{mend and '; ' + mend}")


def _parts(rule: Rule, tensor: Tensor, source: object) -> Sequence[Tensor]:
    try:
        parts = rule.split(tensor)
    except RuntimeError:
        parts = ()
    if len(parts) != len(rule.ours):
        raise InputError(f"{source}: tensor {rule.theirs!r} of shape {list(tensor.shape)} cannot be divided as needed")
    return parts


def _stack(name: str, parts: Sequence[Tensor], source: object) -> Tensor:
    if len({part.shape for part in parts}) > 1:
        raise InputError(f"{source}: the matrices of {name!r} are not all of one shape")
    return torch.stack(list(parts))


def to_theirs(rules: Iterable[Rule], layers: Mapping[str, int], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their checkpoint from our tensors."""
    return {
        rule.theirs: rule.join([ours[name] for name in rule.ours])
        for rule in expand(rules, layers)
        if not rule.again and (not rule.optional or all(name in ours for name in rule.ours))
    }
