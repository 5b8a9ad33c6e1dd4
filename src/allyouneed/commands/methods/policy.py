"""Policies: the model itself on its own answers to prompts, by what a reward says of them (PPO, rejection sampling)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from allyouneed.align import experience, references
from allyouneed.align.actors import over_ray
from allyouneed.align.graders import open_reward
from allyouneed.align.held_out import HeldOut
from allyouneed.align.kept import KeptSampler
from allyouneed.align.language_ppo import LanguagePPO
from allyouneed.align.policies import LanguagePolicy
from allyouneed.align.rejection import Rejection
from allyouneed.align.rewards import Reward
from allyouneed.align.rollouts import Rollouts
from allyouneed.align.samplers import LocalSampler, Sampler, check_length
from allyouneed.align.sharing import SharedReward, SharedSampler
from allyouneed.commands.methods.base import Job, Method, Task, adapted, joined, most, over, parted, rows
from allyouneed.core.errors import InputError, about
from allyouneed.core.seeds import derive
from allyouneed.data import instructions, jsonl
from allyouneed.data.packing import answer, pad_right
from allyouneed.data.tokenizers import Tokenizer
from allyouneed.evaluate.statistics import bootstrap
from allyouneed.generate.language_model import Sampling, Turns
from allyouneed.models.decoder import Decoder
from allyouneed.objectives.next_token import next_token
from allyouneed.objectives.policy import FixedKl, ProportionalKl
from allyouneed.train.loop import Batches
from allyouneed.train.ranks import join

WIDTH = 64  # answers written at once
ROLLOUT = 8  # steps that answers are written for at once (Ouyang et al. 2022, app. C.4: 512 of them, 64 a step)

KEPT = "{}-of-rank-{}.jsonl"  # answers, as long as they may be of use
ASKED = ("answers", "judged")  # to learn from, and to judge by


@dataclass(frozen=True)
class _Setting:
    """What both methods are given, checked."""

    model: Decoder
    tokenizer: Tokenizer
    sampler: Sampler
    reward: Reward
    learned: list[Turns]
    judged: list[Turns]
    held: HeldOut
    answer: int  # the most tokens of an answer
    lengths: list[int]  # tokens of each prompt to learn from with the longest answer

    @property
    def told(self) -> dict[str, str]:
        """A prompt as the model reads it."""
        return {"prompt": self.tokenizer.decode(self.sampler.prompt_ids(self.learned[0]), skip_special_tokens=False)}


def ppo(module: Any, tokenizer: Tokenizer, task: Task) -> Job:
    """The model as a policy with a critic, rollouts for it, and pretraining text beside them where there is some."""
    given, set_ = task.options, _setting(module, tokenizer, task)
    policy = LanguagePolicy(set_.model)
    text = _text(tokenizer, task, max(set_.lengths))
    passes = _at_least(1, "passes", given.get("passes", 1))

    def config(size: int) -> Rollouts.Config:
        counts: Any = {"episodes": given.get("samples", ROLLOUT * size), "minibatch": size, "epochs": passes}
        how: Any = {"max_new_tokens": set_.answer, "kl": _kl(given), "unended": given.get("unended")}
        with about("--samples and --batch"):
            return Rollouts.Config(**counts, **how)

    def batches(size: int, seed: int) -> Batches:
        beside: Any = over(text, joined)(size, seed) if text else None
        reads = (set_.held.reference, set_.reward, set_.learned, config(size))
        return Rollouts(policy, set_.sampler, *reads, seed=seed, pretraining=beside, log=_log(task))

    weight = given.get("ptx_weight", 27.8)  # γ of Ouyang et al. 2022, app. C.4
    own = {"batches": batches, "repeats": passes, "whole": lambda size: config(size).steps, "identity": text}
    row = experience.joined(_longest(set_), text[0]) if text else _longest(set_)
    return _job(set_, task, policy, LanguagePPO(ptx=weight if text else 0.0), row, **own)


def rejection(module: Any, tokenizer: Tokenizer, task: Task) -> Job:
    """The model itself, and the best of several answers of its own to learn from."""
    given, set_ = task.options, _setting(module, tokenizer, task)
    passes = _at_least(1, "passes", given.get("passes", 1))

    count = _at_least(1, "samples", given.get("samples", 8))

    def config(size: int) -> Rejection.Config:
        return Rejection.Config(samples=count, max_new_tokens=set_.answer, batch=size, epochs=passes)

    def batches(size: int, seed: int) -> Batches:
        reads = (set_.sampler, set_.reward, set_.learned, config(size))
        return Rejection(set_.model, *reads, seed=seed, log=_log(task))

    own = {"batches": batches, "repeats": passes, "whole": lambda size: config(size).steps(len(set_.learned))}
    return _job(set_, task, set_.model, next_token, _longest(set_), **own)


def _setting(module: Any, tokenizer: Tokenizer, task: Task) -> _Setting:
    if not isinstance(module, Decoder):
        raise InputError(f"--method {task.method}: a decoder is wanted, which writes answers")
    name = task.options.get("reward")
    if name is None:
        raise InputError(f"--method {task.method}: --reward FILE.py, MODEL or URL says how good an answer is; add it")
    longest = _at_least(1, "max-new-tokens", task.options.get("max_new_tokens", 64))
    limit, ranks = most(task.length, module.config.context), join()
    reward = SharedReward(open_reward(name), ranks)
    reader = LocalSampler.of(module, tokenizer, width=1, tokens=1)

    def prompt(record: jsonl.Record) -> Turns:
        assert isinstance(record, jsonl.Prompt)
        asked: Any = record.prompt
        check_length(reader, asked, longest, limit)
        return cast("Turns", asked)

    learned, judged = parted(task, (jsonl.Prompt,), prompt)
    lengths = [len(reader.prompt_ids(one)) + longest for one in (*learned, *judged)]
    writer = _writer(adapted(module, task), tokenizer, task, max(lengths))
    sampler, judged_by = (SharedSampler(_kept(writer, task, name), ranks) for name in ASKED)
    drawn = Sampling(max_new_tokens=longest, seed=derive(task.seed, "held out"))
    held = HeldOut(module, judged_by, references.of(module), reward, drawn)
    return _Setting(module, tokenizer, sampler, reward, learned, judged, held, longest, lengths[: len(learned)])


def _writer(model: Decoder, tokenizer: Tokenizer, task: Task, tokens: int) -> Sampler:
    """The engine over the model, or others with a copy of it, for as long as the job lasts."""
    address = task.options.get("ray")
    if address is None:
        if "writers" in task.options:
            raise InputError("--writers says how many cores of a cluster write; name it by --ray ADDRESS")
        sampler = LocalSampler.of(model, tokenizer, width=WIDTH, tokens=tokens)
        sampler.quiet = join().rank > 0
        return sampler
    if join().world > 1:
        raise InputError("--ray: under torchrun the ranks write; leave one of the two out")
    count = _at_least(1, "writers", task.options.get("writers", 2))
    return task.kept.enter_context(over_ray(address, model, tokenizer, count=count, width=WIDTH, tokens=tokens))


def _kept(writer: Sampler, task: Task, name: str) -> Sampler:
    """What this rank writes, on file as it comes; what others write comes when it is whole."""
    if not isinstance(writer, LocalSampler):
        return writer
    path = task.out / KEPT.format(name, join().rank)
    if task.fresh:
        path.unlink(missing_ok=True)
    return task.kept.enter_context(closing(KeptSampler(writer, path)))


def _longest(set_: _Setting) -> dict[str, Tensor]:
    """A row as long as any that is learned from, as a rollout has it."""
    size = max(set_.lengths) - set_.answer
    row = pad_right([answer([0] * size, [0] * set_.answer)])
    return row | {name: torch.zeros(row["ids"].shape) for name in experience.LEARNED if name not in row}


def _job(set_: _Setting, task: Task, module: Any, objective: Any, row: dict[str, Tensor], **own: Any) -> Job:
    reward = task.options["reward"]

    def end(out: Path) -> dict[str, float]:
        set_.held.write(out)
        for kept in [path for name in ASKED for path in out.glob(KEPT.format(name, "*"))]:
            kept.unlink()
        if isinstance(module, LanguagePolicy):  # of use where training goes on another time
            save_file(module.critic.state_dict(), out / "critic.safetensors")
        gain = bootstrap(set_.held.gains())  # of prompts, each with its answers before and after
        return {"reward_gain": gain.estimate, "reward_gain_low": gain.low, "reward_gain_high": gain.high}

    return Job(
        module=module,
        tokenizer=set_.tokenizer,
        objective=objective,
        train=set_.learned,
        valid=set_.judged,
        lengths=set_.lengths,
        probe=lambda: row,
        judge=set_.held.judge,
        before=True,
        told=set_.told | {"reward": reward},
        reference=set_.held.reference,
        model=lambda trained: trained.model if isinstance(trained, LanguagePolicy) else trained,
        end=end,
        **own,
    )


def _kl(given: Mapping[str, Any]) -> FixedKl | ProportionalKl:
    """Ouyang et al. 2022, app. C.4: β = 0.02."""
    beta, target = given.get("kl", 0.02), given.get("kl_target")
    if target is None:
        return FixedKl(beta=beta)
    if not target > 0:
        raise InputError(f"--kl-target {target}; nats above 0 are needed")
    return ProportionalKl(beta=beta, target=target)


def _text(tokenizer: Tokenizer, task: Task, length: int) -> list[Any]:
    """Rows of pretraining text, none without --ptx."""
    path = task.options.get("ptx")
    if path is None:
        if "ptx_weight" in task.options:
            raise InputError("--ptx-weight says how much pretraining text counts; name it by --ptx FILE")
        return []

    def piece(record: jsonl.Record) -> Any:
        return instructions.piece(tokenizer, record)

    found = jsonl.made(path, instructions.KINDS, piece, bad=task.bad)
    if not found:
        raise InputError(f"{path}: no text to learn beside")
    return rows(found, length)


def _at_least(least: int, name: str, value: int) -> int:
    if value < least:
        raise InputError(f"--{name} {value}; at least {least} is needed")
    return value


def _log(task: Task) -> Path | None:
    return task.out / "rollouts.jsonl" if join().rank == 0 else None


RATE = 1e-5  # of PPO on GPT-2 of 124 M (Ziegler et al. 2019, their code)
SHARED = frozenset({"reward", "samples", "passes", "max_new_tokens", "ray", "writers"})
METHODS = {
    "ppo": Method(ppo, SHARED | {"kl", "kl_target", "unended", "ptx", "ptx_weight"}, RATE, exact=True, writes=True),
    "rejection": Method(rejection, SHARED, writes=True),
}
