"""Rewards: who may give them, what is refused by name, and choosing by them."""

from __future__ import annotations

from itertools import combinations, product
from math import log
from typing import Any

import numpy as np
import pytest
import torch
from tiny_policy import PROMPTS, REWARD, TOKENIZER, policy, small

from allyouneed.align.graders import Judge, RewardModel, from_file, open_reward
from allyouneed.align.rewards import Clipped, EachOf, Normalised, scored
from allyouneed.align.selection import (
    best_distribution,
    best_of_n,
    best_of_n_kl,
    estimated_best,
    expected_best,
    sample,
)
from allyouneed.core.errors import InputError
from allyouneed.data import instructions, jsonl
from allyouneed.generate.language_model import Completion, Sampling
from allyouneed.generate.local import LocalModel
from allyouneed.models import llama
from allyouneed.models.checkpoints.loading import save
from allyouneed.models.heads import Classifier

CHAT = [{"role": "user", "content": "Hi"}]


# What is wrong with a reward


def broken(prompt: str, completion: str) -> float:
    raise KeyError("no such word")


@pytest.mark.parametrize(
    ("reward", "line"),
    [
        (EachOf(broken), r"reward broken: KeyError: 'no such word', for the completion 'b' of the prompt 'a'"),
        (lambda p, c: [1.0], r"reward <lambda>: 1 scores for 2 completions; one for each is needed"),
        (
            lambda p, c: [1.0, float("inf")],
            r"reward <lambda>: gave inf for the completion 'd' of the prompt '\[\{\"role",
        ),
        (lambda p, c: [1.0, None], r"reward <lambda>: gave None for the completion 'd'"),
        (lambda p, c: [1.0, "2"], r"reward <lambda>: gave '2' for the completion 'd'"),
        (
            lambda p, c: 1 / 0,
            r"reward <lambda>: ZeroDivisionError: division by zero, among 2 completions, first .* 'b'",
        ),
        (lambda p, c: None, r"reward <lambda>: TypeError"),
    ],
)
def test_what_is_wrong_with_a_reward_is_named(reward: Any, line: str):
    with pytest.raises(InputError, match=line):
        scored(reward, ["a", CHAT], ["b", "d"])


def test_rewards_are_numbers_of_any_kind():
    assert scored(lambda p, c: np.array([1, 2]), ["a", "a"], ["b", "b"]) == [1.0, 2.0]
    assert scored(lambda p, c: torch.tensor([True, False]), ["a", "a"], ["b", "b"]) == [1.0, 0.0]
    assert scored(lambda p, c: [], [], []) == []


def test_a_reward_is_shifted_scaled_and_clipped():
    half = Normalised.on(REWARD, ["a"] * 4, ["aa", "aA", "AA", "AAAA"])
    found = half(["a"] * 4, ["aa", "aA", "AA", "AAAA"])
    assert np.mean(found) == pytest.approx(0) and np.std(found) == pytest.approx(1)
    assert Clipped(half, -0.5, 0.5)(["a", "a"], ["aa", "AA"]) == [0.5, -0.5]
    assert Clipped(half, 0, 1).name == half.name == "small letters"
    with pytest.raises(InputError, match=r"small letters: deviation 0\.0; it tells the answers not apart"):
        Normalised.on(REWARD, ["a"] * 2, ["aa", "aa"])


# Files


def test_a_file_defines_a_reward_of_one_or_of_many(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def reward(prompt, completion):\n    return float(len(completion))\n")
    assert from_file(path)(["a"], ["bcd"]) == [3.0]
    path.write_text("def rewards(prompts, completions):\n    return [len(c) for c in completions]\n")
    many = open_reward(str(path))
    assert scored(many, ["a"], ["bcd"]) == [3.0]
    with pytest.raises(InputError, match=r"reward .*mine\.py: rewards: TypeError"):
        scored(many, ["a"], [None])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("x = 1", r"mine\.py: defines no reward\(prompt, completion\) and no rewards"),
        ("import nowhere_at_all", r"mine\.py: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("def reward(:", r"mine\.py: SyntaxError"),
    ],
)
def test_a_file_without_a_reward_is_refused(tmp_path, text, line):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(InputError, match=line):
        open_reward(str(tmp_path / "mine.py"))


def test_a_missing_file_and_a_model_that_is_no_reward_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.py: no such file"):
        open_reward(str(tmp_path / "none.py"))
    save(policy().model, tmp_path / "decoder", TOKENIZER)
    with pytest.raises(InputError, match="decoder: no reward model; train one with finetune --method reward"):
        open_reward(str(tmp_path / "decoder"))


# A model


def head(labels: tuple[str, ...] = ("reward",)) -> Classifier:
    torch.manual_seed(3)
    model = llama.EXAMPLE.replace(vocab_size=257)
    return Classifier(Classifier.Config(model=model, labels=labels, bias=False, dropout=0.5, pad_id=256))


def test_a_reward_model_reads_answers_as_they_are_learned_whatever_stands_beside_them(tmp_path):
    save(head(), tmp_path, TOKENIZER)
    reward = open_reward(str(tmp_path))
    prompts, answers = ["a", "what is it", "b"] * 7, ["yes", "no", ""] * 7
    found = scored(reward, prompts, answers)
    for prompt, answer, score in list(zip(prompts, answers, found, strict=True))[:3]:
        whole = instructions.piece(TOKENIZER, jsonl.Completion(prompt, answer)).ids if answer else [98, 256]
        ids = torch.tensor([[whole]])
        alone = head().eval()({"ids": ids, "segments": torch.ones_like(ids)})
        assert score == pytest.approx(alone.item(), abs=1e-6)
    assert len({round(score, 5) for score in found}) == 3


def test_what_a_reward_model_cannot_read_whole_is_refused():
    model = llama.EXAMPLE.replace(vocab_size=257).build()
    head = Classifier(Classifier.Config(model=model.config, labels=("reward",), bias=False, dropout=0.0), model)
    reward = RewardModel(head, TOKENIZER, "mine")
    with pytest.raises(InputError, match=r"reward mine: .* tokens exceed its context of 48, for the completion 'bbb"):
        reward(["a", "a"], ["b", "b" * 60])


def test_a_file_may_hold_dataclasses_and_look_beside_it(tmp_path):
    (tmp_path / "beside_the_reward.py").write_text("WORTH = 2.0")
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom beside_the_reward import WORTH\n"
    )
    text += "@dataclass\nclass A:\n    x: float = WORTH\ndef reward(prompt, completion):\n    return A().x\n"
    (tmp_path / "mine.py").write_text(text)
    assert from_file(tmp_path / "mine.py")(["a"], ["b"]) == [2.0]
    (tmp_path / "ends.py").write_text("raise SystemExit(3)")
    with pytest.raises(InputError, match=r"ends.py: SystemExit: 3"):
        from_file(tmp_path / "ends.py")


@pytest.mark.parametrize("score", [torch.zeros(2), torch.zeros(1, 2), 10**400, "much"])
def test_a_score_of_another_shape_is_named(score):
    with pytest.raises(InputError, match=r"reward mine: gave .* for the completion 'b' of the prompt 'a'"):
        scored(EachOf(lambda prompt, completion: score, "mine"), ["a"], ["b"])


def test_a_model_of_several_labels_is_no_reward_model():
    with pytest.raises(InputError, match="x: tells 2 labels; a reward model is a decoder with one output"):
        RewardModel(head(("good", "bad")), TOKENIZER, "x")


# A judge


class Grader:
    """A language model that answers from a list, and keeps what it was asked."""

    name = "grader"

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = list(answers), []

    def complete(self, prompts, sampling):
        self.asked += [(prompt, sampling) for prompt in prompts]
        return [Completion(self.answers.pop(0), "stop", 1, 1) for _ in prompts]


def test_a_judge_is_asked_again_only_where_it_gave_no_grade():
    lm = Grader("7", "well", " 3.5/10", "11", "Grade: 2")
    assert Judge(lm)(["a", "b", CHAT], ["{prompt}", "y", "z"]) == [7.0, 2.0, 3.5]
    texts = [prompt[0]["content"] for prompt, _ in lm.asked]
    assert "[Answer]\n{prompt}\n" in texts[0] and "user: Hi" in texts[2] and "from 1 (of no use) to 10" in texts[0]
    assert texts[3] == texts[4] == texts[1] and [s.temperature for _, s in lm.asked] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("said", "grade"),
    [("8", 8), (" 3.5/10\n", 3.5), ("Grade: 2", 2), ("grade: 9/10.", 9), ("10.", 10)]
    + [(x, None) for x in ("On a scale of 1 to 10: 8", "11", "1 to 10", "8/5", "I give 7 points", "-3", "")],
)
def test_a_grade_is_a_number_alone(said, grade):
    assert Judge(Grader())._grade(said) == grade


def test_a_judge_that_never_grades_is_named():
    with pytest.raises(InputError, match="reward judge grader: 'I cannot' is no grade, for the completion 'b' of the"):
        Judge(Grader(*["I cannot"] * 3))(["a"], ["b"])
    with pytest.raises(InputError, match=r"judge grader: the template has no \{completion\}"):
        Judge(Grader(), "Grade {prompt}")


def test_a_url_is_a_judge(monkeypatch):
    monkeypatch.setattr("allyouneed.align.graders.load", lambda name: Grader("4"))
    assert scored(open_reward("http://127.0.0.1:1/v1"), ["a"], ["b"]) == [4.0]


# Best of n


PROBABILITIES, REWARDS = np.array([0.1, 0.25, 0.3, 0.05, 0.3]), np.array([1.0, 0.0, 1.0, 3.0, -1.0])


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_best_of_n_is_what_all_draws_together_give(n):
    """All 5ⁿ draws, equal rewards sharing; some outcomes tie."""
    mass = np.zeros(5)
    for drawn in product(range(5), repeat=n):
        top = [i for i in drawn if REWARDS[i] == REWARDS[list(drawn)].max()]
        for i in top:
            mass[i] += np.prod(PROBABILITIES[list(drawn)]) / len(top)
    assert best_distribution(PROBABILITIES, REWARDS, n) == pytest.approx(mass, abs=1e-12)
    assert expected_best(PROBABILITIES, REWARDS, n) == pytest.approx(mass @ REWARDS, abs=1e-12)
    assert (mass * np.log(mass / PROBABILITIES)).sum() <= best_of_n_kl(n) + 1e-12


@pytest.mark.parametrize("n", [2, 5])
def test_without_ties_its_kl_comes_to_the_formula(n):
    """Of 20,000 equally likely outcomes, all different."""
    p = np.full(20_000, 1 / 20_000)
    best = best_distribution(p, np.arange(20_000.0), n)
    assert (best * np.log(best / p)).sum() == pytest.approx(best_of_n_kl(n), abs=1e-3)
    assert best_of_n_kl(n) == pytest.approx(log(n) - (n - 1) / n)


def test_impossible_outcomes_and_rounding_leave_a_distribution():
    found = best_distribution(np.array([0.0, 0.7, 0.3]), np.array([5.0, 1.0, 2.0]), 8)
    assert found[0] == 0 and found.sum() == pytest.approx(1)


@pytest.mark.parametrize("n", range(1, 6))
def test_the_estimate_is_the_mean_over_all_subsets(n):
    scores = [0.3, -1.0, 2.0, 0.3, 0.7]
    assert estimated_best(scores, n) == pytest.approx(np.mean([max(chosen) for chosen in combinations(scores, n)]))


def test_more_than_there_are_is_refused():
    for n in (0, 3):
        with pytest.raises(InputError, match=f"best of {n} from 2 scores"):
            estimated_best([1.0, 2.0], n)


def test_the_best_of_samples_of_a_model_is_as_good_as_the_estimate_says():
    lm = LocalModel(policy().eval().model, TOKENIZER, "policy")
    sampling = Sampling(max_new_tokens=6, seed=5)
    drawn = sample(lm, PROMPTS, REWARD, 4, sampling)
    assert [len(found) for found in drawn] == [4] * 12
    for found in drawn:
        assert len({one.prompt for one in found}) == 1 and len({one.completion.text for one in found}) > 1
        assert all(one.score == small(one.completion.text) for one in found)
    best = best_of_n(lm, PROMPTS, REWARD, 4, sampling)
    assert [one.score for one in best] == [max(x.score for x in found) for found in drawn]
    with pytest.raises(InputError, match="best of n: n=0"):
        best_of_n(lm, PROMPTS, REWARD, 0, sampling)
