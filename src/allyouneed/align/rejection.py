"""Rejection sampling as batches: K answers to each prompt, the best of which are learned as if a person had given them.

An endless iterator for the training loop, with `objectives.next_token`: what it gives next follows from the weights as
they are when an iteration begins (Touvron et al. 2023b, sec. 3.2.3).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allyouneed import core
from allyouneed.align.experience import places
from allyouneed.align.identity import check_same, digest_of, identity
from allyouneed.align.notes import Notes
from allyouneed.align.rewards import Reward
from allyouneed.align.samplers import Sampler, check_lengths
from allyouneed.align.selection import Sampled, best, sample
from allyouneed.core.errors import InputError, brief
from allyouneed.core.modes import evaluating
from allyouneed.core.seeds import derive
from allyouneed.data.batches import Epochs, needed
from allyouneed.data.packing import Batch, Piece, answer, pad_right
from allyouneed.generate.language_model import Sampling, Turns
from allyouneed.models.decoder import Decoder


class Rejection(Iterator[Batch]):
    """Batches of `ids`, `targets` and `segments`, (B, T): the best answer to each prompt of all iterations so far.

    An answer that was cut off is not learned, else its cut would be taken for its end: a prompt without one that ended
    is passed over until there is one. Llama 2 first learned from the last iteration alone and lost abilities by it,
    then kept the best of all before.
    `state_dict` holds the answers that are being learned from.

    Args:
        model: what answers, and is trained on these batches.
        sampler: writes with its weights.
        reward: scores an answer.
        prompts: all of them are answered in each iteration.
        config: how much.
        seed: of answers and of the order in which they are learned.
        log: a file that gets a line for each iteration, as `notes` does.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """How many answers there are and how long one learns from the best."""

        samples: int = 8  # K
        temperature: float = 1.0  # Llama 2 found 1.2 to 1.3 best for 10 to 100 answers (fig. 8)
        max_new_tokens: int = 48
        batch: int = 16  # answers a step
        epochs: float = 1.0  # over the best answers, an iteration

        def __post_init__(self) -> None:
            for name in ("samples", "max_new_tokens", "batch"):
                if getattr(self, name) < 1:
                    raise InputError(f"rejection.{name}={getattr(self, name)}; at least 1 is needed")
            if not self.epochs > 0:
                raise InputError(f"rejection.epochs={self.epochs}; a number above 0 is needed")

        def steps(self, prompts: int) -> int:
            """Of training, an iteration over so many prompts."""
            return needed(prompts, self.batch, self.epochs)

    def __init__(
        self,
        model: Decoder,
        sampler: Sampler,
        reward: Reward,
        prompts: Sequence[Turns],
        config: Config,
        *,
        seed: int,
        log: Path | None = None,
    ) -> None:
        check_lengths(sampler, prompts, config.max_new_tokens, model.limit)
        self.model, self.sampler, self.reward = model, sampler, reward
        self.prompts, self.config, self.seed, self.notes = prompts, config, seed, Notes(log)
        self.steps = config.steps(len(prompts))  # an iteration; where some are passed over, the others come more often
        self.number, self.place = 0, 0  # iterations begun, batches taken of the last
        self.kept: dict[int, tuple[Piece, float]] = {}  # the best answer to each prompt by its number, and its score
        self.order = self._ordered()
        self.identity = identity(config, seed, prompts=digest_of(prompts))

    def __next__(self) -> Batch:
        if self.place >= self.steps or not self.kept:
            self._iterate()
        self.place += 1
        numbers = sorted(self.kept)
        return pad_right([self.kept[numbers[i]][0] for i in next(self.order)["places"].tolist()])

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, with the answers kept so far."""
        numbers = sorted(self.kept)
        pieces, scores = [self.kept[i][0] for i in numbers], [self.kept[i][1] for i in numbers]
        kept = {"numbers": numbers, "scores": scores, "kept": pad_right(pieces) if pieces else {}}
        return {"number": self.number, "place": self.place, **kept, "made_by": self.identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            InputError: it is of other prompts, settings, another seed or another kind of iterator.
        """
        if "kept" not in state or len(state.get("scores", ())) != len(state.get("numbers", ())):
            raise InputError(f"data state: fields {brief(sorted(state))} are no answers to these prompts")
        check_same(state.get("made_by"), self.identity)
        self.number, self.place = state["number"], state["place"]
        pieces = _pieces(state["kept"]) if state["kept"] else []
        self.kept = dict(zip(state["numbers"], zip(pieces, state["scores"], strict=True), strict=True))
        self.order = self._ordered()
        self.order.drawn = self.place * self.config.batch

    def _ordered(self) -> Epochs[int]:
        """The order of this iteration, over the answers there are; before the first, of nothing that counts."""
        seed = derive(self.seed, "rejection", self.number)
        return Epochs(range(max(1, len(self.kept))), batch_size=self.config.batch, collate=places, seed=seed)

    def _iterate(self) -> None:
        """Have all prompts answered K times and keep what is better than what there was."""
        began, c = time.perf_counter(), self.config
        seed = derive(self.seed, "answers", self.number)
        sampling = Sampling(max_new_tokens=c.max_new_tokens, temperature=c.temperature, seed=seed)
        with evaluating(self.model):
            self.sampler.renew()
            drawn = sample(self.sampler, self.prompts, self.reward, c.samples, sampling)
        ended = [[one for one in found if one.completion.finish_reason == "stop"] for found in drawn]
        chosen = [best(found) if found else None for found in ended]  # what was cut off is not to be learned as whole
        better = self._keep(chosen)
        self.number, self.place = self.number + 1, 0
        self.order = self._ordered()
        facts = self._facts(drawn, [one for one in chosen if one is not None])
        self.notes.add({"step": self.number, **facts, "better": better, "seconds": time.perf_counter() - began})

    def _facts(self, drawn: Sequence[Sequence[Sampled]], chosen: Sequence[Sampled]) -> dict[str, float]:
        """Means of all answers' rewards, of the best ones' and of what is kept, and the share of answers that ended."""
        every = [one for found in drawn for one in found]
        scores = {"reward": every, "best": chosen}
        facts = {name: statistics.fmean(one.score for one in some) for name, some in scores.items()}
        facts["kept"] = statistics.fmean(score for _, score in self.kept.values())
        return facts | {"ended": statistics.fmean(one.completion.finish_reason == "stop" for one in every)}

    def _keep(self, chosen: Sequence[Sampled | None]) -> int:
        """Put these in the places of worse ones; how many.

        Raises:
            InputError: there is nothing to learn, since no answer ever came to an end.
        """
        better = 0
        for i, one in enumerate(chosen):
            if one is not None and (i not in self.kept or one.score > self.kept[i][1]):
                ids = self.sampler.prompt_ids(one.prompt)
                self.kept[i], better = (answer(ids, one.completion.token_ids), one.score), better + 1
        if not self.kept:
            tokens = f"max_new_tokens={self.config.max_new_tokens}"
            raise InputError(f"rejection: no answer came to an end within {tokens}; give more, or train by sft first")
        return better


def _pieces(rows: Batch) -> list[Piece]:
    """The rows of a batch without their padding."""
    widths = (rows["segments"] != 0).sum(1).tolist()
    ids, targets = rows["ids"].tolist(), rows["targets"].tolist()
    return [Piece(*(x[:width] for x in row)) for *row, width in zip(ids, targets, widths, strict=True)]
