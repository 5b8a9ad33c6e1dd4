"""Who gives rewards: a model that learned them, a language model that is asked for a grade, a program in a file.

Each is a `Reward` (`align.rewards`). Holds how they are asked, and which of them a name means.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from allyouneed.align.rewards import EachOf, Reward, said, shown, text_of
from allyouneed.core.errors import InputError, brief
from allyouneed.data import instructions, jsonl
from allyouneed.data.packing import Piece, document, pad_right
from allyouneed.data.tokenizers import Tokenizer
from allyouneed.generate.language_model import LanguageModel, Sampling, Turns
from allyouneed.generate.load import load
from allyouneed.models.checkpoints.loading import load_module, load_tokenizer, opened
from allyouneed.models.decoder import Decoder
from allyouneed.models.heads import Classifier
from allyouneed.objectives.reward import rewards

GRADED = """You grade answers. Read the request and the answer, and judge how well the answer does what was asked.

[Request]
{prompt}

[Answer]
{completion}

Give a grade from {lowest} (of no use) to {highest} (perfect). Write the number alone."""


class RewardModel:
    """The reward of a classifier with one output, which `finetune --method reward` trains (Ouyang et al. 2022, sec.
    3.5: "the SFT model with the final unembedding layer removed", and a scalar in its place).

    Args:
        head: a decoder and its layer.
        tokenizer: its own, which need not be the policy's.
        rows: answers read at once.
    """

    def __init__(self, head: Classifier, tokenizer: Tokenizer, name: str = "model", *, rows: int = 16) -> None:
        if head.outputs != 1 or not isinstance(head.model, Decoder):
            raise InputError(f"{name}: tells {head.outputs} labels; a reward model is a decoder with one output")
        self.head, self.tokenizer, self.name, self.rows = head.eval(), tokenizer, name, rows

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Turns], completions: Sequence[str]) -> list[float]:
        """The layer's output at each answer's last token, its end.

        Raises:
            InputError: prompt and answer are longer than the model's context.
        """
        found: list[float] = []
        pieces = [self._piece(*pair) for pair in zip(prompts, completions, strict=True)]
        self._check_lengths(pieces, prompts, completions)
        for start in range(0, len(pieces), self.rows):
            batch = pad_right(pieces[start : start + self.rows])
            rows = {name: batch[name][:, None].to(self.head.model.device) for name in ("ids", "segments")}
            found += rewards(self.head, rows)[:, 0].tolist()
        return found

    def _check_lengths(self, pieces: Sequence[Piece], prompts: Sequence[Turns], completions: Sequence[str]) -> None:
        limit = self.head.model.limit
        for piece, prompt, completion in zip(pieces, prompts, completions, strict=True):
            if limit is not None and len(piece.ids) > limit:
                line = f"reward {self.name}: {len(piece.ids)} tokens exceed its context of {limit}"
                asked = shown(prompt, completion)
                raise InputError(f"{line}, for {asked}; have shorter answers, or a reward model that reads more")

    def _piece(self, prompt: Turns, completion: str) -> Piece:
        """As it was learned from; an answer without text, which is never learned from, likewise."""
        if completion.strip() or not isinstance(prompt, str):
            turns: Any = prompt
            return instructions.piece(self.tokenizer, jsonl.Completion(turns, completion))
        ids = self.tokenizer.encode(prompt + completion, add_special_tokens=True)
        return document([*ids, *self.tokenizer.eos_ids[:1]])


class Judge:
    """The reward of a language model that is asked for a grade: any of `LanguageModel`, mostly a remote one.

    Zheng et al. 2023 (arXiv:2306.05685, sec. 3.1, single answer grading). What it says counts if it is a number
    alone, n/10 with the highest grade for 10, or "Grade: n"; else it is asked again, `tries` times, the first time
    greedily.

    Args:
        lm: the judge.
        template: with {prompt}, {completion}, {lowest} and {highest}; asked as the user's turn of a conversation.
        lowest: the worst grade there is.
        highest: the best.
        tries: how often it is asked before it is given up.
    """

    def __init__(
        self, lm: LanguageModel, template: str = GRADED, *, lowest: float = 1, highest: float = 10, tries: int = 3
    ) -> None:
        for field in ("{prompt}", "{completion}"):
            if field not in template:
                raise InputError(f"judge {lm.name}: the template has no {field}; it would not see what it grades")
        self.lm, self.name, self.template, self.tries = lm, f"judge {lm.name}", template, tries
        self.lowest, self.highest = lowest, highest

    def __call__(self, prompts: Sequence[Turns], completions: Sequence[str]) -> list[float]:
        """Grades, in order.

        Raises:
            InputError: no grade came of a completion, `tries` times.
        """
        grades: dict[int, float] = {}
        for attempt in range(self.tries):
            left = [i for i in range(len(prompts)) if i not in grades]
            asked: list[Turns] = [[{"role": "user", "content": self._text(prompts[i], completions[i])}] for i in left]
            sampling = Sampling(max_new_tokens=16, temperature=float(attempt > 0), seed=attempt)
            for i, answer in zip(left, self.lm.complete(asked, sampling) if left else (), strict=True):
                grade = self._grade(answer.text)
                if grade is not None:
                    grades[i] = grade
                elif attempt + 1 == self.tries:
                    told = shown(prompts[i], completions[i])
                    raise InputError(f"reward {self.name}: {brief(answer.text)} is no grade, for {told}")
        return [grades[i] for i in range(len(prompts))]

    def _text(self, prompt: Turns, completion: str) -> str:
        values = {"prompt": text_of(prompt), "completion": completion}
        values |= {"lowest": f"{self.lowest:g}", "highest": f"{self.highest:g}"}
        return re.sub(r"\{(prompt|completion|lowest|highest)\}", lambda found: values[found[1]], self.template)

    def _grade(self, text: str) -> float | None:
        found = re.fullmatch(rf"(?:grade:)?\s*(-?\d+(?:\.\d+)?)(?:\s*/\s*{self.highest:g})?\.?", text.strip(), re.I)
        grade = None if found is None else float(found[1])
        return grade if grade is not None and self.lowest <= grade <= self.highest else None


def open_reward(name: str) -> Reward:
    """The reward that a FILE.py, a folder of a reward model, or the URL of a judge names.

    Raises:
        InputError: nothing of that name, or no reward.
    """
    if name.startswith(("http://", "https://")):
        return Judge(load(name))
    if name.endswith(".py"):
        return from_file(name)
    found = opened(name)
    head = load_module(found)
    if not isinstance(head, Classifier):
        raise InputError(
            f"{name}: no reward model; train one with finetune --method reward, or give a FILE.py or a URL"
        )
    return RewardModel(head, load_tokenizer(found), name)


def from_file(path: Path | str) -> Reward:
    """The reward that a Python file defines: `reward(prompt, completion)` of one, or `rewards(prompts, completions)` of
    lists. The file is run, as a program of whoever names it.

    Raises:
        InputError: it cannot be run, or defines neither.
    """
    path = Path(path)
    defined = _run(path)
    many, one = defined.get("rewards"), defined.get("reward")
    if callable(many):
        many.__dict__.setdefault("name", f"{path}: rewards")
        return many
    if callable(one):
        return EachOf(one, f"{path}: reward")
    raise InputError(f"{path}: defines no reward(prompt, completion) and no rewards(prompts, completions)")


def _run(path: Path) -> dict[str, Any]:
    """The names that a file defines."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; a Python file with a function `reward` is wanted")
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: a Python file is wanted, whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickle look for it
    sys.path.insert(0, folder := str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise InputError(f"{path}: {said(error)}") from error
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
    return vars(module)
