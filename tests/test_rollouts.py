"""Rollouts and the objective over them: equations, agreement with the engine, what is learned, and taking up a run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_policy import PROMPTS, TOKENIZER, policy, rollouts, run, settings, small
from tiny_run import At, same, untimed

from allyouneed.adapt.lora import Lora, adapt, parameters
from allyouneed.align import experience, references, samplers
from allyouneed.align.interaction import Interaction
from allyouneed.align.language_ppo import LanguagePPO
from allyouneed.align.policies import LanguagePolicy, Read, ValueModel
from allyouneed.align.rewards import EachOf
from allyouneed.align.rollouts import Rollouts
from allyouneed.align.samplers import LocalSampler
from allyouneed.core.errors import InputError, RemoteError
from allyouneed.core.metrics import read
from allyouneed.data.batches import Windows
from allyouneed.data.packing import IGNORED, answer, pad_right
from allyouneed.generate.language_model import Sampling
from allyouneed.models import gpt2, llama
from allyouneed.models.heads import Classifier
from allyouneed.objectives.likelihood import likelihood, token_logprobs
from allyouneed.objectives.next_token import next_token
from allyouneed.objectives.policy import AdaptiveKl, FixedKl, ProportionalKl
from allyouneed.objectives.ppo import Clipped
from allyouneed.train.checkpoints import weights
from allyouneed.train.optimizers import AdamW


def some_answers(seed: int = 0, rows: int = 6) -> dict[str, torch.Tensor]:
    """Answers of several lengths with all that a rollout knows of them."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (rows, 2), generator=draw).tolist()
    batch = pad_right([answer(list(range(1, 1 + a)), list(range(20, 20 + b))) for a, b in lengths])
    acted = batch["targets"] != IGNORED
    for name in ("old_logprobs", "reference", "old_values"):
        x = torch.randn(acted.shape, generator=draw, dtype=torch.float64)
        batch[name] = (-x.abs() if name != "old_values" else x).where(acted, 0.0)
    return batch


# Equations


def test_the_head_is_asked_only_where_a_target_follows_and_says_the_same():
    acting, batch = policy(), some_answers()
    there = {name: batch[name] for name in ("ids", "targets", "segments")}
    slow = token_logprobs(acting.model(there["ids"], there["segments"]).logits, there["targets"])
    torch.testing.assert_close(likelihood(acting.model, there), slow, atol=1e-6, rtol=0)
    torch.testing.assert_close(acting(there).logprobs, slow, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("unended", "whitened"), [(None, False), (-1.0, False), (None, True)])
def test_advantages_are_those_of_the_equations_one_token_after_another(unended, whitened):
    """δ_t = r_t + γV_{t+1} − V_t, A_t = δ_t + γλA_{t+1}, r_t = −β(log π − log π_ref), the score with the last token."""
    batch, beta = some_answers(), 0.3
    config = Rollouts.Config(gamma=0.9, lam=0.8, unended=unended, whiten_scores=whitened)
    scores, ended = torch.arange(6.0, dtype=torch.float64), torch.tensor([True, False] * 3)
    made, facts = experience.made(batch, scores, ended, beta, config)
    counted = [s if e or unended is None else unended for s, e in zip(scores.tolist(), ended.tolist(), strict=True)]
    if whitened:
        counted = ((scores - scores.mean()) / (scores.std() + 1e-8)).tolist()
    advantages, returns = {}, {}
    for row in range(6):
        places = (batch["targets"][row] != IGNORED).nonzero()[:, 0].tolist()
        later = value_after = 0.0
        for place in reversed(places):
            old, ref, value = (batch[n][row, place].item() for n in ("old_logprobs", "reference", "old_values"))
            reward = -beta * (old - ref) + (counted[row] if place == places[-1] else 0.0)
            later = reward + 0.9 * value_after - value + 0.9 * 0.8 * later
            advantages[row, place], returns[row, place] = later, later + value
            value_after = value
    flat = torch.tensor(list(advantages.values()), dtype=torch.float64)
    for (row, place), a in advantages.items():
        white = (a - flat.mean().item()) / (flat.std().item() + 1e-8)
        assert made["advantages"][row, place].item() == pytest.approx(white, abs=1e-9)
        assert made["returns"][row, place].item() == pytest.approx(returns[row, place], abs=1e-9)
    elsewhere = batch["targets"] == IGNORED
    assert not made["advantages"][elsewhere].any() and not made["returns"][elsewhere].any()
    kl = sum((batch["old_logprobs"] - batch["reference"]).sum(1).tolist()) / 6
    assert facts["kl"] == pytest.approx(kl) and facts["reward"] == 2.5 and facts["ended"] == 0.5


class Says(torch.nn.Module):
    """A policy whose log-probabilities and values are parameters."""

    def __init__(self, logprobs: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.logprobs, self.values = torch.nn.Parameter(logprobs), torch.nn.Parameter(values)

    def forward(self, batch: Any) -> Read:
        return Read(self.logprobs, self.values)


def test_the_objective_is_the_equation_with_pretraining_text_beside_it():
    """Loss and gradients in float64, token by token, the clipped ones among them."""
    batch, config = some_answers(), Rollouts.Config()
    scores = torch.arange(6.0, dtype=torch.float64)
    made, _ = experience.made(batch, scores, torch.ones(6, dtype=torch.bool), 0.1, config)
    text = {"ids": torch.ones(3, 15, dtype=torch.int64), "targets": torch.full((3, 15), IGNORED)}
    text["targets"][:, 2:9] = 7
    both = experience.joined(made, text)
    torch.manual_seed(1)
    shape = both["ids"].shape
    told = both["targets"] != IGNORED
    says = Says(
        (both["old_logprobs"] + 0.3 * torch.randn(shape, dtype=torch.float64)).where(told, 0.0),
        (both["old_values"] + torch.randn(shape, dtype=torch.float64)).where(told, 0.0),
    )
    objective = LanguagePPO(surrogate=Clipped(epsilon=0.2), value_epsilon=0.3, value_weight=0.5, ptx=2.0)
    loss = objective(says, both)
    found = torch.autograd.grad(loss.mean, [says.logprobs, says.values])

    total, acted, clipped = 0.0, 0, 0
    for row in range(6):
        for place in told[row].nonzero()[:, 0].tolist():
            old, value = both["old_logprobs"][row, place], both["old_values"][row, place]
            ratio = (says.logprobs[row, place] - old).exp()
            gain, advantage = ratio.clamp(0.8, 1.2), both["advantages"][row, place]
            near = value + (says.values[row, place] - value).clamp(-0.3, 0.3)
            errors = [(x - both["returns"][row, place]) ** 2 for x in (says.values[row, place], near)]
            total = total - torch.minimum(ratio * advantage, gain * advantage) + 0.5 * 0.5 * torch.maximum(*errors)
            acted, clipped = acted + 1, clipped + int(not 0.8 <= ratio.item() <= 1.2)
    nll = -says.logprobs[6:][told[6:]].mean()
    expected = total / acted + 2.0 * nll
    wanted = torch.autograd.grad(expected, [says.logprobs, says.values])
    assert loss.mean.item() == pytest.approx(expected.item(), abs=1e-7) and clipped > 0
    assert loss.weight == acted and loss.metrics["far"] == clipped
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=0)  # the share of text is kept in float32


def test_micro_batches_add_up_to_the_batch():
    acting = policy()
    corpus = Windows(torch.arange(200) % 257, batch_size=4, length=20, seed=0)
    batch = next(rollouts(acting, pretraining=corpus))
    objective = LanguagePPO(ptx=1.5)
    whole = objective(acting, batch)
    parts = [objective(acting, {name: x[i::3] for name, x in batch.items()}) for i in range(3)]
    assert sum(part.weight for part in parts) == whole.weight
    torch.testing.assert_close(sum(part.total for part in parts), whole.total, atol=1e-4, rtol=1e-6)
    answers = {name: x[:8] for name, x in batch.items() if name != "pretraining"}
    told = {name: batch[name][8:] for name in ("ids", "targets", "segments")}
    separate = objective(acting, answers).mean + 1.5 * next_token(acting.model, told).mean
    torch.testing.assert_close(whole.mean, separate, atol=1e-5, rtol=1e-6)


def test_before_the_first_step_the_surrogate_is_flat_and_nothing_is_clipped():
    """In train mode, of a policy that drops what it is trained on otherwise."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "context": 48, "dim": 16, "num_layers": 2, "num_heads": 2}
    acting = LanguagePolicy(gpt2.architecture(**sizes, dropout=0.3).build())
    lora = Lora.Config(rank=2, dropout=0.5, targets="all-linear")
    adapt(acting.model, lora)
    for pair in parameters(acting.model).values():
        torch.nn.init.normal_(pair, std=0.1)
    batch = next(rollouts(acting.train(), reference=lambda: nullcontext(acting.model)))
    loss = LanguagePPO()(acting, batch)
    assert acting.training and loss.total.requires_grad
    assert loss.metrics["far"] == 0 and abs(loss.metrics["kl_of_step"].item()) < 1e-6


def test_a_critic_of_its_own_begins_as_the_reward_model():
    torch.manual_seed(0)
    model = llama.EXAMPLE.replace(vocab_size=257).build()
    head = Classifier(Classifier.Config(model=model.config, labels=("reward",), bias=False, dropout=0.0), model).eval()
    acting = LanguagePolicy(policy().model, ValueModel(model, head.layer)).eval()
    batch = {name: x for name, x in some_answers().items() if name in ("ids", "targets", "segments")}
    values = acting(batch | {"targets": torch.where(batch["segments"] > 0, 5, IGNORED)}).values
    last = (batch["segments"] > 0).sum(1) - 1
    scores = head({name: batch[name][:, None] for name in ("ids", "segments")})[:, 0, 0]
    torch.testing.assert_close(values[range(6), last], scores)
    assert acting.critic.model is not model and not (set(acting.critic.parameters()) & set(model.parameters()))


# What is learned


@pytest.mark.parametrize(("lora", "lr", "times"), [(False, 1e-2, 2.0), (True, 2e-3, 1.4)], ids=["whole", "lora"])
def test_the_reward_rises_and_engine_and_trainer_agree_all_along(lora, lr, times):
    """From a tenth of small letters to so many times as many, of which the standard error of 192 answers is 0.1 times;
    the reference is the model that it began as, to the bit.
    """
    acting = policy(lora=lora)
    before = {name: x.clone() for name, x in policy(lora=lora).model.state_dict().items() if "adapters" not in name}
    batches = rollouts(acting, episodes=64, minibatch=32, epochs=4)
    run(acting, batches, training=settings(steps=8 * 12, optimizer=AdamW.Config(lr=lr, weight_decay=0.0)))
    first, *_, last = rows = batches.notes.rows
    assert abs(first["kl"]) <= 1e-6 and last["kl"] > 0.1
    assert all(row["engine_gap"] <= 1e-4 for row in rows) and len(rows) == 12
    reward = sum(row["reward"] for row in rows[-3:]) / 3
    assert reward > times * first["reward"], [row["reward"] for row in rows]
    with batches.reference() as reference:
        there = {name: x for name, x in reference.state_dict().items() if "adapters" not in name}
        batch = {name: x for name, x in some_answers().items() if name in ("ids", "targets", "segments")}
        torch.testing.assert_close(likelihood(reference, batch), likelihood(policy(lora=lora).model, batch))
    assert all(torch.equal(x, before[name]) for name, x in there.items())


def test_a_controller_holds_the_kl_where_it_should_be():
    """The same training without a penalty goes ten times as far."""
    ends = []
    for kl in (FixedKl(beta=0.0), ProportionalKl(beta=0.1, target=0.5, gain=2.0)):
        acting = policy()
        batches = rollouts(acting, episodes=32, minibatch=16, epochs=4, kl=kl)
        run(acting, batches, training=settings(steps=8 * 20))
        ends.append(sum(row["kl"] for row in batches.notes.rows[-5:]) / 5)
    assert ends[0] > 10 and 0.15 < ends[1] < 1.0, ends


def test_each_answer_is_learned_from_once_an_epoch_and_each_prompt_is_drawn_in_turn():
    batches = rollouts(policy(), episodes=12, minibatch=4, epochs=2)
    rows = [next(batches) for _ in range(6)]
    whole = batches.rollout
    seen = [tuple(x.tolist()) for batch in rows for x in batch["returns"][:, :1]]
    assert sorted(seen) == sorted([tuple(x.tolist()) for x in whole["returns"][:, :1]] * 2)
    starts = {TOKENIZER.decode(row[:4].tolist()) for row in whole["ids"]}
    assert starts == set(PROMPTS) and batches.number == 1


# Taking up a run


def cut(folder: Path, step: int) -> None:
    """As if a run had come no further than `step`."""
    for path in (folder / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


@pytest.mark.parametrize("step", [5, 8], ids=["within a rollout", "between two"])
def test_resuming_is_bit_for_bit(tmp_path, step):
    """A rollout is four steps. Weights, curves, what was measured of rollouts, β and the text beside them."""
    kl = ProportionalKl(beta=0.1, target=0.1, gain=2.0)

    def fresh(seed: int, log: Path | None = None) -> tuple[LanguagePolicy, Rollouts]:
        acting = policy(seed)
        acting.load_state_dict(policy(0).state_dict() if seed else acting.state_dict())
        corpus = Windows(torch.arange(200) % 257, batch_size=2, length=20, seed=0)
        return acting, rollouts(acting, kl=kl, pretraining=corpus, log=log)

    unbroken, whole = fresh(0, tmp_path / "unbroken.jsonl")
    trained = run(unbroken, whole, objective=LanguagePPO(ptx=0.5))
    log = tmp_path / "run/rollouts.jsonl"
    run(*fresh(0, log), tmp_path / "run", objective=LanguagePPO(ptx=0.5), training=settings(save_every=1, keep=20))
    cut(tmp_path / "run", step)
    resumed, again = fresh(1, log)
    history = run(resumed, again, tmp_path / "run", objective=LanguagePPO(ptx=0.5), training=settings(save_every=1))
    assert same(unbroken, resumed) and whole.beta == again.beta != 0.1
    assert untimed(history.history) == untimed(trained.history)

    def measured(path: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if k != "rollout_seconds"} for row in read(path)]

    assert measured(log) == measured(tmp_path / "unbroken.jsonl") and len(measured(log)) == 3


def test_a_run_that_is_killed_within_a_rollout_ends_as_if_it_had_not_been(tmp_path):
    done = subprocess.run([sys.executable, __file__, tmp_path, "6"], check=False)
    assert done.returncode == -signal.SIGKILL
    unbroken, resumed = policy(), policy()
    run(unbroken, rollouts(unbroken))
    trained = run(resumed, rollouts(resumed), tmp_path, training=settings(save_every=2))
    assert trained.step == 12 and same(unbroken, resumed)
    assert [row["step"] for row in trained.history] == list(range(1, 13))


def test_a_state_of_something_else_is_refused():
    batches = rollouts(policy())
    with pytest.raises(InputError, match="none of rollouts"):
        batches.load_state_dict({"drawn": 3})
    state = batches.state_dict()
    with pytest.raises(InputError, match="pretraining"):
        batches.load_state_dict(state | {"pretraining": {}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 3}, "it was taken with epochs=2, this run has epochs=3"),
        ({"gamma": 0.5}, "gamma=1.0, this run has gamma=0.5"),
        ({"minibatch": 4}, "minibatch=8, this run has minibatch=4"),
        ({"kl": FixedKl(beta=0.5)}, "kl="),
        ({"prompts": PROMPTS[::-1]}, "prompts="),
        ({"reference": references.of(policy(7).model)}, "reference="),
    ],
)
def test_a_state_taken_under_other_settings_is_refused(changes, message):
    one = rollouts(policy())
    for _ in range(3):
        next(one)
    with pytest.raises(InputError, match=message):
        rollouts(policy(), **changes).load_state_dict(one.state_dict())
    rollouts(policy(), tolerance=1e-3).load_state_dict(one.state_dict())  # of no account to what is learned


# What goes wrong


def test_another_precision_than_that_of_the_old_numbers_is_refused():
    acting = policy()
    with pytest.raises(InputError, match="precision=bf16: log-probabilities are compared with others"):
        run(acting, rollouts(acting), training=settings(precision="bf16"))


def test_a_reward_that_is_no_number_is_named_and_the_last_checkpoint_stands(tmp_path):
    calls = count()

    def failing(prompt: str, completion: str) -> float:
        return float("nan") if next(calls) >= 40 else small(completion)

    acting = policy()
    with pytest.raises(InputError, match=r"step 9: reward mine: gave nan for the completion '.*' of the prompt '. is'"):
        run(acting, rollouts(acting, EachOf(failing, "mine")), tmp_path, training=settings(save_every=4))
    again = policy(1)
    again.load_state_dict(policy().state_dict())
    trained = run(again, rollouts(again), tmp_path, training=settings(save_every=4))
    unbroken = policy()
    run(unbroken, rollouts(unbroken))
    assert trained.step == 12 and same(again, unbroken)


def test_a_reference_of_another_model_is_found_at_the_first_rollout():
    batches = rollouts(policy(), reference=references.of(policy(7).model))
    with pytest.raises(InputError, match="reference: differs from the policy before training by"):
        next(batches)


def test_an_engine_that_goes_on_with_old_weights_is_found():
    """What it has read of a prompt of more than one block."""
    acting = policy()
    batches = rollouts(acting, epochs=1, prompts=["a prompt of many letters"])
    for _ in range(2):
        next(batches)
    batches.sampler.renew = lambda: None
    with torch.no_grad():
        acting.model.embedding.weight.mul_(1.5)
    with pytest.raises(InputError, match="rollout 1: the engine's log-probabilities differ from the trainer's by"):
        next(batches)


def test_writing_that_takes_long_has_a_progress_line(monkeypatch, capsys):
    sampler = LocalSampler.of(policy().model, TOKENIZER, width=2, tokens=32)
    sampler.complete(["a", "b", "c"], Sampling(max_new_tokens=2))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(samplers, "PATIENCE", 0.0)
    sampler.complete(["a", "b", "c"], Sampling(max_new_tokens=2))
    assert "write  3/3  " in capsys.readouterr().err


def test_prompts_that_leave_no_room_for_an_answer_are_refused_before_anything_is_done():
    with pytest.raises(InputError, match="prompt 0: its 4 tokens and max_new_tokens=60 exceed the context of 48"):
        rollouts(policy(), max_new_tokens=60)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"episodes=16 and minibatch=5; the one must be a multiple"):
        rollouts(policy(), minibatch=5)
    with pytest.raises(InputError, match="epochs=0; at least 1"):
        rollouts(policy(), epochs=0)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Rollouts.Config(gamma=1.5), "rollouts.gamma=1.5; from 0 to 1"),
        (lambda: Rollouts.Config(lam=-0.1), "rollouts.lam=-0.1; from 0 to 1"),
        (lambda: Interaction.Config(gamma=float("nan")), "interaction.gamma=nan; from 0 to 1"),
        (lambda: Interaction.Config(minibatch=1), "interaction.minibatch=1; at least 2"),
        (lambda: LanguagePPO(value_epsilon=-0.2), "value_epsilon=-0.2; 0 or more"),
        (lambda: LanguagePPO(ptx=-1.0), "ptx=-1.0; 0 or more"),
        (lambda: AdaptiveKl(target=0.0), "kl.target=0.0; nats above 0"),
        (lambda: ProportionalKl(target=-6.0), "kl.target=-6.0; nats above 0"),
    ],
)
def test_numbers_without_a_meaning_are_refused(made, message):
    with pytest.raises(InputError, match=message):
        made()


def test_a_judge_that_is_lost_ends_the_run_with_its_step(tmp_path):
    calls = count()

    def lost(prompts, completions):
        if next(calls):
            raise RemoteError("http://judge: 503", 503)
        return [0.0] * len(prompts)

    acting = policy()
    with pytest.raises(RemoteError, match="step 5: http://judge: 503; training stops, the last checkpoint") as found:
        run(acting, rollouts(acting, lost), tmp_path, training=settings(save_every=4))
    assert found.value.status == 503


def test_what_is_saved_of_lora_is_what_is_trained():
    acting = policy(lora=True)
    trained = {name for name, p in acting.named_parameters() if p.requires_grad}
    assert all("adapters" in name or name.startswith("critic.") for name in trained)
    assert {name for name in weights(acting) if "adapters" in name or "critic" in name} == trained


if __name__ == "__main__":
    killed = policy()
    kill = At(int(sys.argv[2]), lambda: os.kill(os.getpid(), signal.SIGKILL))
    run(killed, rollouts(killed), Path(sys.argv[1]), training=settings(save_every=2), callbacks=[kill])
