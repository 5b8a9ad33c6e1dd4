"""Rollouts as batches: prompts drawn, answered by the policy, scored, and learned from for some epochs.

An endless iterator as any other that the training loop is handed (`data.batches`), but what it gives next follows from
the weights as they are then. Holds the order of things; what a score becomes is `align.experience`'s. Shapes: B rows,
T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from allyouneed import core
from allyouneed.align import experience
from allyouneed.align.identity import check_same, digest_of, identity
from allyouneed.align.notes import Notes
from allyouneed.align.policies import LanguagePolicy
from allyouneed.align.references import Reference
from allyouneed.align.rewards import Reward, scored
from allyouneed.align.samplers import Sampler, check_lengths
from allyouneed.core.errors import InputError, brief
from allyouneed.core.modes import evaluating
from allyouneed.core.seeds import derive, generator
from allyouneed.data.batches import Epochs
from allyouneed.data.packing import IGNORED, Batch, answer, pad_right, take
from allyouneed.generate.language_model import Completion, Sampling, Turns
from allyouneed.nn.digests import digest
from allyouneed.objectives.likelihood import likelihood
from allyouneed.objectives.policy import AdaptiveKl, FixedKl, ProportionalKl, check_discounts

SAME = 1e-6  # nats: what policy and reference may differ by before training


class Text(Protocol):
    """Batches of other text, to be learned beside (`data.batches`)."""

    def __next__(self) -> Batch:
        """The next."""

    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""


class Rollouts(Iterator[Batch]):
    """Minibatches of `ids`, `targets`, `segments`, `old_logprobs`, `old_values`, `advantages` and `returns`, (B, T);
    and with text beside them, `pretraining` (B): 0 for answers, for rows of text the answers' targets per target of it.

    `state_dict` holds the rollout that is being learned from, so that a run that was killed within one goes on with it.

    Args:
        policy: what acts, and is trained on these batches.
        sampler: writes with the policy's weights.
        reference: what the KL penalty is against, mostly the policy as it began (`references.of`).
        reward: scores an answer.
        prompts: drawn from, each once an epoch.
        config: how much, and what counts.
        seed: of prompts, answers and minibatches.
        pretraining: text of which one batch joins each minibatch (PPO-ptx, Ouyang et al. 2022, sec. 3.5).
        log: a file that gets a line for each rollout, as `notes` does.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """Defaults are those of Ouyang et al. (2022, app. C.4) and, where it says nothing, of Ziegler et al. (2019)."""

        episodes: int = 512  # answers a rollout
        minibatch: int = 64  # answers a step
        epochs: int = 1  # how often each answer is learned from
        max_new_tokens: int = 48
        gamma: float = 1.0
        lam: float = 0.95
        kl: FixedKl | AdaptiveKl | ProportionalKl = field(default_factory=lambda: FixedKl(beta=0.02))
        unended: float | None = None  # the score of an answer without an end (Ziegler et al.: -1); None: the reward's
        whiten_scores: bool = False  # over a rollout, before the KL penalty (Touvron et al. 2023, sec. 3.2.3)
        tolerance: float = 1e-4  # nats: what engine and trainer may differ by in a token's log-probability

        def __post_init__(self) -> None:
            for name in ("episodes", "minibatch", "epochs", "max_new_tokens"):
                if getattr(self, name) < 1:
                    raise InputError(f"rollouts.{name}={getattr(self, name)}; at least 1 is needed")
            check_discounts("rollouts", self.gamma, self.lam)
            if self.episodes % self.minibatch:
                pair = f"rollouts.episodes={self.episodes} and minibatch={self.minibatch}"
                raise InputError(f"{pair}; the one must be a multiple of the other")

        @property
        def steps(self) -> int:
            """Of training, a rollout."""
            return self.episodes // self.minibatch * self.epochs

    def __init__(
        self,
        policy: LanguagePolicy,
        sampler: Sampler,
        reference: Reference,
        reward: Reward,
        prompts: Sequence[Turns],
        config: Config,
        *,
        seed: int,
        pretraining: Text | None = None,
        log: Path | None = None,
    ) -> None:
        self.policy, self.sampler, self.reference, self.reward = policy, sampler, reference, reward
        self.prompts, self.config, self.seed, self.pretraining = prompts, config, seed, pretraining
        self.order = Epochs(range(len(prompts)), batch_size=config.episodes, collate=experience.places, seed=seed)
        self.number, self.place, self.beta = 0, 0, config.kl.beta  # rollouts made, minibatches taken of the last
        self.rollout: Batch = {}
        self.notes = Notes(log)
        check_lengths(sampler, prompts, config.max_new_tokens, policy.model.limit)

    def __next__(self) -> Batch:
        if self.place >= self.config.steps or not self.rollout:
            self._roll()
        batch = experience.narrowed(take(self.rollout, self._chosen()))
        self.place += 1
        return batch if self.pretraining is None else experience.joined(batch, next(self.pretraining))

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, with all that is still to be learned of the last rollout."""
        left = self.rollout if self.place < self.config.steps else {}
        state = {"number": self.number, "place": self.place, "beta": self.beta, "rollout": dict(left)}
        state["made_by"] = self.identity
        beside = {} if self.pretraining is None else {"pretraining": self.pretraining.state_dict()}
        return state | {"prompts": self.order.state_dict()} | beside

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            InputError: it is of other prompts, settings, another reference, another seed or another kind of iterator.
        """
        if not isinstance(state.get("prompts"), Mapping) or not isinstance(state.get("number"), int):
            raise InputError(f"data state: fields {brief(sorted(state))} are none of rollouts")
        if ("pretraining" in state) != (self.pretraining is not None):
            raise InputError("data state: pretraining text stands in one of the state and this run, but not in both")
        check_same(state.get("made_by"), self.identity)
        self.order.load_state_dict(state["prompts"])
        self.number, self.place, self.beta = state["number"], state["place"], state["beta"]
        self.rollout = dict(state["rollout"])
        if self.pretraining is not None:
            self.pretraining.load_state_dict(state["pretraining"])

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What makes these rollouts and no others; how far engine and trainer may differ is of no account."""
        with self.reference() as reference:
            what = {"prompts": digest_of(self.prompts), "reference": digest(reference)}
        return identity(self.config, self.seed, free=("tolerance",), **what)

    def _chosen(self) -> list[int]:
        """Which answers the next minibatch is of: each once an epoch, in an order of its own."""
        epoch, part = divmod(self.place, self.config.episodes // self.config.minibatch)
        draw = generator(self.seed, "minibatches", self.number, epoch)
        order = torch.randperm(self.config.episodes, generator=draw).tolist()
        return order[part * self.config.minibatch : (part + 1) * self.config.minibatch]

    @torch.no_grad()
    def _roll(self) -> None:
        """Have the policy answer as it is now."""
        began = time.perf_counter()
        prompts = [self.prompts[int(i)] for i in next(self.order)["places"]]
        with evaluating(self.policy):
            answers = self._answers(prompts)
            batch = pad_right([answer(ids, one.token_ids) for ids, one in answers])
            read = self._read(batch)
        completions = [one for _, one in answers]
        gap = self._agreement(read["old_logprobs"], batch["targets"] != IGNORED, completions)
        scores = torch.tensor(scored(self.reward, prompts, [one.text for one in completions]))
        ended = torch.tensor([one.finish_reason == "stop" for one in completions])
        self.rollout, facts = experience.made(batch | read, scores, ended, self.beta, self.config)
        self._check_reference(batch | read)
        facts |= {"beta": self.beta, "engine_gap": gap, "rollout_seconds": time.perf_counter() - began}
        self.beta = self.config.kl(self.beta, facts["kl"])
        self.number, self.place = self.number + 1, 0
        self.notes.add({"step": self.number, **facts})

    def _answers(self, prompts: Sequence[Turns]) -> list[tuple[list[int], Completion]]:
        """The tokens of each prompt and what the policy answers, drawn at temperature 1: as it is."""
        self.sampler.renew()
        seed = derive(self.seed, "answers", self.number)
        sampling = Sampling(max_new_tokens=self.config.max_new_tokens, temperature=1.0, seed=seed)
        completions = self.sampler.complete(prompts, sampling)
        return [(self.sampler.prompt_ids(p), one) for p, one in zip(prompts, completions, strict=True)]

    def _read(self, batch: Batch) -> Batch:
        """What policy, critic and reference say of the answers, a minibatch at a time: three of (B, T)."""
        names, parts, device = ("old_logprobs", "old_values", "reference"), [], self.policy.model.device
        for start in range(0, len(batch["ids"]), self.config.minibatch):
            chosen = take(batch, slice(start, start + self.config.minibatch))
            piece = {name: x.to(device) for name, x in experience.narrowed(chosen).items()}
            read = self.policy(piece)
            with self.reference() as reference:
                found = (read.logprobs, read.values, likelihood(reference, piece))
            parts.append([experience.widened(x.float().cpu(), batch["ids"].shape[1]) for x in found])
        return {name: torch.cat(x) for name, x in zip(names, zip(*parts, strict=True), strict=True)}

    def _agreement(self, logprobs: Tensor, acted: Tensor, completions: Sequence[Completion]) -> float:
        """The largest difference between a token's log-probability as the engine and as the trainer has it.

        Raises:
            InputError: it is more than the tolerance.
        """
        told = torch.tensor([x for one in completions for x in one.logprobs])
        gap = (logprobs[acted] - told).abs().max().item()
        if not gap <= self.config.tolerance:
            line = f"rollout {self.number}: the engine's log-probabilities differ from the trainer's by {gap:.2g} nats"
            raise InputError(f"{line}, tolerance={self.config.tolerance:g}; raise it if numbers are rounded on purpose")
        return float(gap)

    def _check_reference(self, batch: Batch) -> None:
        """Before training, policy and reference are one."""
        gap = (batch["old_logprobs"] - batch["reference"]).abs().max().item()
        if self.number == 0 and not gap <= SAME:
            raise InputError(f"reference: differs from the policy before training by {gap:.2g} nats; they must be one")
