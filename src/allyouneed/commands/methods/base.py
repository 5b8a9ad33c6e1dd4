"""What a method of fine-tuning is: from a task as the command line says it, all that training it takes.

Holds what the methods share. What one of them learns, its own file says; `table` lists them. Training, keeping and
showing are the command's (`commands.finetune`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allyouneed.core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from allyouneed.adapt.layers import Lora
    from allyouneed.adapt.quantise import Quantise
    from allyouneed.data import jsonl
    from allyouneed.data.packing import Piece
    from allyouneed.data.tokenizers import Tokenizer
    from allyouneed.models.checkpoints.huggingface import Model
    from allyouneed.train.loop import Batches, Training

# what only some methods take, and how it is written
OPTIONS = {
    "auxiliary": "--auxiliary",
    "beta": "--beta",
    "label_smoothing": "--label-smoothing",
    "margin_field": "--margin-field",
    "reward": "--reward",
    "samples": "--samples",
    "passes": "--passes",
    "max_new_tokens": "--max-new-tokens",
    "kl": "--kl",
    "kl_target": "--kl-target",
    "unended": "--unended",
    "ptx": "--ptx",
    "ptx_weight": "--ptx-weight",
    "ray": "--ray",
    "writers": "--writers",
}
WHERE = {"ray", "writers"}  # those that change nothing that is learned


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be learned, as the command line says it."""

    method: str
    data: Path
    valid: Path | None
    length: int | None
    seed: int
    out: Path  # the run's folder; what takes long to prepare may be kept there
    bad: list[str] | None  # where errors of lines go; None: the first one ends all
    fresh: bool = False  # whether what was prepared before is of no use
    options: Mapping[str, Any]  # those of `OPTIONS` that were given
    lora: Lora.Config | None = None  # adapters to train instead of the model
    quantise: Quantise.Config | None = None  # how their base is stored
    kept: ExitStack = field(default_factory=ExitStack)  # ends what has to last while the job is done


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a method prepares: a module, its objective, what it learns and how it is judged."""

    module: Model
    tokenizer: Tokenizer
    objective: Any
    train: Sequence[Any]
    valid: Sequence[Any]
    batches: Callable[[int, int], Batches]  # of so many examples a step and a seed, from `train`
    lengths: Sequence[int]  # tokens of each example to learn from
    judge: Callable[[Sequence[Any]], Mapping[str, float]]
    before: bool = False  # whether it can be judged as it came, too
    begin: Callable[[], Mapping[str, float]] = dict  # what takes long and comes before training; what was found
    probe: Callable[[], dict[str, Tensor]] | None = None  # the batch of its longest example, to see what training takes
    told: Mapping[str, str] = field(default_factory=dict)  # what else is said before training, a row each
    identity: Sequence[Any] = ()  # what beside examples and options makes it this job and no other
    repeats: int = 1  # steps that an example is learned from in an epoch
    whole: Callable[[int], int] = lambda batch: 1  # steps that belong together, all on answers written before them
    reference: Callable[[], AbstractContextManager[nn.Module]] | None = None  # what the module is held to
    model: Callable[[Any], Any] = lambda trained: trained  # what of the module is kept as the model
    end: Callable[[Path], Mapping[str, Any]] = lambda out: {}  # keeps what else there is, in the run's folder; facts

    def steps(self, epochs: float, batch: int) -> tuple[int, int]:
        """Of one epoch, and of all of them, whole rounds."""
        from allyouneed.data.batches import needed

        each, whole = needed(len(self.train), batch, self.repeats), self.whole(batch)
        return each, whole * max(1, round(epochs * each / whole))

    def digest(self, task: Task) -> str:
        """Of all that is learned and judged by, in order, and how."""
        read = [
            [[x.tolist() for x in one.values()] if isinstance(one, dict) else one for one in examples]
            for examples in (self.identity, self.train, self.valid)
        ]
        how = sorted((name, value) for name, value in task.options.items() if name not in WHERE)
        said = repr((task.method, how, *read))
        return hashlib.sha256(said.encode()).hexdigest()


@dataclass(frozen=True)
class Method:
    """How one thing is learned: `prepare` is handed model, tokenizer and task; `options` are those it takes, `lr` the
    peak rate where none is given, of a model trained as a whole; None: by its size.
    """

    prepare: Callable[[Any, Tokenizer, Task], Job]
    options: frozenset[str] = frozenset()
    lr: float | None = None
    exact: bool = False  # whether what is trained is compared with numbers that were read in fp32
    writes: bool = False  # whether the model writes what it learns

    def check_training(self, name: str, training: Training) -> None:
        """Refuse a precision in which two readings of one text differ, and a mesh that leaves no rank the whole model
        to write with.

        Raises:
            InputError: names the method and the setting.
        """
        if self.exact and training.precision != "fp32":
            line = f"--method {name}: precision={training.precision}, but its reference is read in fp32"
            raise InputError(f"{line} and compared with; leave precision as it is")
        if self.writes and training.mesh.splits:
            raise InputError(
                f"--method {name}: mesh splits the model, which writes answers whole on each rank; "
                "only mesh.data may be above 1"
            )

    def check(self, name: str, given: Mapping[str, Any], others: Mapping[str, Method]) -> None:
        """Refuse what this method has no use for.

        Raises:
            InputError: names the option and the methods that take it.
        """
        for option in sorted(set(given) - self.options):
            takers = ", ".join(sorted(other for other, method in others.items() if option in method.options))
            raise InputError(f"{OPTIONS[option]}: {name} has no use for it; leave it out (taken by {takers})")


def adapted(module: Any, task: Task) -> Any:
    """`module`, in place the base of adapters where the task asks for these; a head's new layer is trained whole."""
    from allyouneed.adapt import lora
    from allyouneed.adapt.quantise import fitted, quantise
    from allyouneed.models.heads import Head

    if task.quantise is not None:
        quantise(module, fitted(module, task.quantise))
        module.float()  # what is left of 16 bits
    if task.lora is not None:
        lora.adapt(module, task.lora.replace(whole=("layer",) if isinstance(module, Head) else ()), seed=task.seed)
    return module


def over(examples: Sequence[Any], collate: Callable[[Any], dict[str, Tensor]]) -> Callable[[int, int], Batches]:
    """Batches of examples that are all there before training: every one once an epoch."""
    from allyouneed.data.batches import Epochs

    return lambda size, seed: Epochs(examples, batch_size=size, collate=collate, seed=seed)


def rows(pieces: Sequence[Piece], length: int) -> list[dict[str, Tensor]]:
    """Documents packed into rows, each a batch of one."""
    from allyouneed.data.packing import fit, take

    packed = fit(pieces, length)
    return [take(packed, [i]) for i in range(len(packed["ids"]))]


def joined(chosen: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Several of these as one batch."""
    import torch

    return {name: torch.cat([row[name] for row in chosen]) for name in chosen[0]}


def means(
    module: nn.Module, objective: Any, held: Sequence[Any], collate: Callable[[Any], dict[str, Tensor]]
) -> dict[str, float]:
    """The `loss` per target of what is judged by, and so the objective's metrics; eight examples at a time."""
    import torch

    device, sums, weight = next(module.parameters()).device, dict[str, float](), 0
    module.eval()
    with torch.inference_mode():
        for start in range(0, len(held), 8):
            batch = collate(held[start : start + 8])
            loss = objective(module, {name: x.to(device) for name, x in batch.items()})
            weight += int(loss.weight)
            for name, x in {"loss": loss.total, **loss.metrics}.items():
                sums[name] = sums.get(name, 0.0) + x.item()
    return {name: total / max(weight, 1) for name, total in sums.items()}


def example(tokenizer: Tokenizer, piece: Piece, most: int = 1200) -> str:
    """A piece as it is said before training, what is learned of it between ⟦ and ⟧; of a long one both ends."""
    from allyouneed.data import instructions

    text = instructions.shown(tokenizer, piece)
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def longest(lengths: Sequence[int]) -> int:
    """The place of the longest example."""
    return max(range(len(lengths)), key=lambda i: lengths[i])


def most(length: int | None, context: int) -> int:
    """The tokens that an example may have.

    Raises:
        InputError: more than the model's context.
    """
    if length is not None and not 1 <= length <= context:
        raise InputError(f"--length {length}; from 1 to the model's context of {context} tokens")
    return length or context


def parted(
    task: Task,
    kinds: Sequence[jsonl.Kind],
    make: Callable[[Any], Any],
    named: Mapping[str, str] | None = None,
) -> tuple[list[Any], list[Any]]:
    """What is learned and what is judged by: a tenth of the former where there is nothing else; `named` is as of
    `jsonl.made`.

    Raises:
        InputError: a line that is wrong, if these are not left out; nothing to learn from, or to judge by.
    """
    import torch

    from allyouneed.core.seeds import generator
    from allyouneed.data import jsonl

    found = jsonl.made(task.data, kinds, make, bad=task.bad, named=named)
    if task.valid is not None:
        held = jsonl.made(task.valid, kinds, make, bad=task.bad, named=named)
    else:
        order = torch.randperm(len(found), generator=generator(task.seed, "held out")).tolist()
        count = max(1, len(found) // 10)
        found, held = [found[i] for i in sorted(order[count:])], [found[i] for i in sorted(order[:count])]
    if not found or not held:
        raise InputError(f"{task.data}: {len(found)} lines to learn from and {len(held)} to judge by; each needs one")
    return found, held
