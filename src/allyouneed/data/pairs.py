"""Text to text: sources and their targets as batches, for a model of two stacks or of one, and mixtures of tasks.

A pair is two lists of ids, each with the end token that the task wants. Shapes: B rows, M tokens of source, T of
target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate

import torch

from allyouneed.core.errors import InputError
from allyouneed.core.seeds import generator
from allyouneed.data.batches import Epochs, Generated
from allyouneed.data.packing import IGNORED, Batch, answer, pad_right

Pair = tuple[Sequence[int], Sequence[int]]
Collate = Callable[[Sequence[Pair]], Batch]


def ended(pairs: Iterable[Pair], end: int) -> list[Pair]:
    """Pairs whose targets close with `end`, which the model has to write.

    >>> ended([((5, 6), (7,))], end=2)
    [((5, 6), (7, 2))]
    """
    return [(source, (*target, end)) for source, target in pairs]


def apart(pairs: Sequence[Pair], *, start: int) -> Batch:
    """For encoder and decoder: `source` (B, M) with `source_segments`, `ids` (B, T) with `segments` and `targets`.

    The decoder reads `start` and all of the target but its last token (Raffel et al. 2020, sec. 2.1).

    >>> batch = apart([([5, 6], [7, 8]), ([9], [4])], start=0)
    >>> batch["ids"].tolist(), batch["targets"].tolist()
    ([[0, 7], [0, 0]], [[7, 8], [4, -100]])
    """
    width, length = (max(len(pair[side]) for pair in pairs) for side in (0, 1))
    source, ids = (torch.zeros(len(pairs), n, dtype=torch.long) for n in (width, length))
    source_segments, segments, targets = torch.zeros_like(source), torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, (read, written) in enumerate(pairs):
        source[row, : len(read)] = torch.as_tensor(read)
        ids[row, : len(written)] = torch.tensor([start, *written[:-1]])
        targets[row, : len(written)] = torch.as_tensor(written)
        source_segments[row, : len(read)] = segments[row, : len(written)] = 1
    return {
        "source": source,
        "source_segments": source_segments,
        "ids": ids,
        "segments": segments,
        "targets": targets,
    }


def bucketed(pairs: Sequence[Pair], *, tokens: int, start: int, seed: int) -> Epochs[Batch]:
    """Batches, as `apart` makes them, of about `tokens` target tokens, padding included, of pairs of like length
    (Vaswani et al. 2017, sec. 5.1). Which pairs share a batch is drawn once, the order of the batches anew each epoch.

    >>> batches = bucketed([([3] * n, [4] * n) for n in (1, 9, 2, 8)], tokens=20, start=1, seed=0)
    >>> sorted(len(next(batches)["ids"][0]) for _ in range(2))
    [2, 9]
    """
    order = torch.randperm(len(pairs), generator=generator(seed, "buckets")).tolist()
    order.sort(key=lambda i: (len(pairs[i][1]), len(pairs[i][0])))
    made: list[list[Pair]] = []
    for i in order:
        if not made or (len(made[-1]) + 1) * len(pairs[i][1]) > tokens:
            made.append([])
        made[-1].append(pairs[i])
    batches = [apart(one, start=start) for one in made]
    return Epochs(batches, batch_size=1, collate=lambda drawn: drawn[0], seed=seed)


def joined(pairs: Sequence[Pair]) -> Batch:
    """For a decoder: the source and the target that follows it as one row, and `prefix`, true where the source stands.

    Only the target is predicted, its first token from the last of the source.

    >>> batch = joined([([5, 6], [7, 8]), ([9], [4])])
    >>> batch["ids"].tolist(), batch["targets"].tolist()
    ([[5, 6, 7, 8], [9, 4, 0, 0]], [[-100, 7, 8, -100], [4, -100, -100, -100]])
    >>> batch["prefix"].tolist()
    [[True, True, False, False], [True, False, False, False]]
    """
    batch = pad_right([answer(read, written) for read, written in pairs])
    lengths = torch.tensor([len(read) for read, _ in pairs])
    batch["prefix"] = torch.arange(batch["ids"].shape[1]) < lengths[:, None]
    return batch


def rates(sizes: Mapping[str, int], *, cap: int | None = None, temperature: float = 1.0) -> dict[str, float]:
    """How often each task is drawn: min(size, cap)^(1/temperature), over the sum (Raffel et al. 2020, sec. 3.5.2).

    Temperature 1 is examples-proportional mixing; as it grows, tasks become equally frequent.

    Raises:
        InputError: a task without examples, a cap or temperature that is not positive.

    >>> rates({"a": 900, "b": 100}, cap=300)
    {'a': 0.75, 'b': 0.25}
    >>> rates({"a": 900, "b": 100}, temperature=2.0)
    {'a': 0.75, 'b': 0.25}
    """
    if not sizes or min(sizes.values()) < 1:
        raise InputError(f"sizes={dict(sizes)}: every task of a mixture needs an example")
    if temperature <= 0 or (cap is not None and cap < 1):
        raise InputError(f"cap={cap}, temperature={temperature}; both must be positive")
    weights = {task: min(size, cap or size) ** (1 / temperature) for task, size in sizes.items()}
    total = sum(weights.values())
    return {task: weight / total for task, weight in weights.items()}


class Mixture(Generated):
    """Batches of pairs of several tasks, each row's task drawn by `rates`, its example uniformly.

    >>> from functools import partial
    >>> tasks = {"a": [([5], [6])], "b": [([7], [8])]}
    >>> batch = next(Mixture(tasks, batch_size=4, collate=partial(apart, start=0), seed=0))
    >>> batch["source"].shape
    torch.Size([4, 1])
    """

    def __init__(
        self,
        tasks: Mapping[str, Sequence[Pair]],
        *,
        batch_size: int,
        collate: Collate,
        seed: int,
        cap: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        self.examples, self.batch_size, self.collate = list(tasks.values()), batch_size, collate
        self.rates = rates({task: len(examples) for task, examples in tasks.items()}, cap=cap, temperature=temperature)
        self.bounds = torch.tensor(list(accumulate(self.rates.values())), dtype=torch.float64)
        super().__init__(self._draw, seed=seed)

    def _draw(self, randomness: torch.Generator) -> Batch:
        chances = torch.rand(self.batch_size, 2, generator=randomness, dtype=torch.float64)
        tasks = torch.searchsorted(self.bounds, chances[:, 0].contiguous(), right=True).clamp(max=len(self.bounds) - 1)
        chosen = [self.examples[task] for task in tasks.tolist()]
        return self.collate(
            [examples[int(at * len(examples))] for examples, at in zip(chosen, chances[:, 1].tolist(), strict=True)]
        )
