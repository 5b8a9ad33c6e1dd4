"""Prompts that nothing was learned from: what a policy answers them before and after, how well, and how far it went."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from allyouneed.align.references import Reference
from allyouneed.align.rewards import Reward, scored, text_of
from allyouneed.align.samplers import Sampler
from allyouneed.align.selection import Sampled
from allyouneed.core.files import write_text
from allyouneed.core.modes import evaluating
from allyouneed.data.packing import answer, pad_right
from allyouneed.generate.language_model import Sampling, Turns
from allyouneed.models.decoder import Decoder
from allyouneed.objectives.likelihood import likelihood

ROWS = 8  # answers read at once


class HeldOut:
    """Judges a policy by its answers, always drawn from the same numbers; keeps the first and the last ones.

    Args:
        model: the policy.
        sampler: writes with its weights.
        reference: what the KL is against.
        reward: scores an answer.
        sampling: at temperature 1, for the KL; how long an answer may be, and the seed.
    """

    def __init__(
        self, model: Decoder, sampler: Sampler, reference: Reference, reward: Reward, sampling: Sampling
    ) -> None:
        self.model, self.sampler, self.reference, self.reward = model, sampler, reference, reward
        self.sampling = sampling
        self.first: list[Sampled] = []
        self.last: list[Sampled] = []

    def judge(self, prompts: Sequence[Turns]) -> dict[str, float]:
        """The mean `reward` of an answer, its `kl` to the reference (the mean of log π − log π_ref of whole answers, in
        nats), its `length` in tokens, and the share that `ended`.
        """
        with evaluating(self.model):
            self.sampler.renew()
            completions = self.sampler.complete(prompts, self.sampling)
            scores = scored(self.reward, prompts, [one.text for one in completions])
            self.last = [Sampled(*one) for one in zip(prompts, completions, scores, strict=True)]
            kl = self._kl()
        self.first = self.first or self.last
        return {
            "reward": statistics.fmean(scores),
            "kl": kl,
            "length": statistics.fmean(one.completion_tokens for one in completions),
            "ended": statistics.fmean(one.finish_reason == "stop" for one in completions),
        }

    def gains(self) -> list[float]:
        """By how much the last answer to each prompt is better than the first."""
        return [after.score - before.score for before, after in zip(self.first, self.last, strict=True)]

    def write(self, folder: Path) -> None:
        """`samples.jsonl` and, to be read side by side, `samples.md`."""
        rows = [self._row(*pair) for pair in zip(self.first, self.last, strict=True)]
        write_text(folder / "samples.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_text(folder / "samples.md", "# Held-out prompts, before and after\n" + "".join(map(_shown, rows)))

    @torch.inference_mode()
    def _kl(self) -> float:
        total = 0.0
        for start in range(0, len(self.last), ROWS):
            some = self.last[start : start + ROWS]
            pieces = [answer(self.sampler.prompt_ids(one.prompt), one.completion.token_ids) for one in some]
            batch = {name: x.to(self.model.device) for name, x in pad_right(pieces).items()}
            ours = likelihood(self.model, batch)
            with self.reference() as reference:
                total += (ours - likelihood(reference, batch)).sum().item()
        return total / len(self.last)

    def _row(self, before: Sampled, after: Sampled) -> dict[str, Any]:
        texts = {"before": before.completion.text, "after": after.completion.text}
        prompt = before.prompt if isinstance(before.prompt, str) else list(before.prompt)
        return {"prompt": prompt, **texts, "reward_before": before.score, "reward_after": after.score}


def _shown(row: dict[str, Any]) -> str:
    """One prompt with both answers, as Markdown that shows them letter by letter."""
    parts = [f"\n## {' '.join(text_of(row['prompt']).split())[:200]}\n"]
    for name in ("before", "after"):
        fence = "````" if "```" in row[name] else "```"
        parts.append(f"\n{name}, {row[f'reward_{name}']:.3f}\n\n{fence}text\n{row[name]}\n{fence}\n")
    return "".join(parts)
