"""Intervals against published tables, losses against naive loops, option scores against lm-evaluation-harness."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from allyouneed.core.errors import InputError
from allyouneed.evaluate import options, perplexity, statistics, timing
from allyouneed.evaluate.options import Question, Scores

GOLDEN = json.loads((Path(__file__).parent / "golden" / "lm_eval_options.json").read_text(encoding="utf-8"))


# Two-sided 95 % and 99 % points: NIST/SEMATECH e-Handbook of Statistical Methods, sec. 1.3.6.7.2.
T_TABLE = {
    1: (12.706, 63.657),
    2: (4.303, 9.925),
    3: (3.182, 5.841),
    4: (2.776, 4.604),
    5: (2.571, 4.032),
    7: (2.365, 3.499),
    10: (2.228, 3.169),
    15: (2.131, 2.947),
    30: (2.042, 2.750),
    60: (2.000, 2.660),
    100: (1.984, 2.626),
}


class TestStatistics:
    @pytest.mark.parametrize("freedom", T_TABLE)
    def test_t_quantile_table(self, freedom):
        found = statistics.t_quantile(0.975, freedom), statistics.t_quantile(0.995, freedom)
        assert found == pytest.approx(T_TABLE[freedom], abs=5.1e-4)

    @pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.6, 0.9, 0.975, 0.9995])
    def test_t_quantile_closed_forms(self, p):
        assert statistics.t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9, abs=1e-12)
        two = (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
        assert statistics.t_quantile(p, 2) == pytest.approx(two, rel=1e-9, abs=1e-12)

    def test_student_t(self):
        interval = statistics.student_t([1.0, 2.0, 4.0, 5.0], confidence=0.95)
        half = 3.182446 * math.sqrt(10 / 3) / 2
        assert (interval.estimate, interval.low, interval.high) == pytest.approx((3, 3 - half, 3 + half), abs=1e-5)
        with pytest.raises(InputError, match="at least 2 seeds"):
            statistics.student_t([1.0])

    # Newcombe 1998, table I, method 3.
    @pytest.mark.parametrize(
        ("successes", "trials", "low", "high"),
        [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
    )
    def test_wilson(self, successes, trials, low, high):
        interval = statistics.wilson(successes, trials)
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=5.1e-5)
        mirrored = statistics.wilson(trials - successes, trials)
        assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((interval.low, interval.high))

    def test_bootstrap_of_a_mean_is_normal(self):
        items = np.random.default_rng(0).exponential(size=2000)
        interval = statistics.bootstrap(items)
        error = items.std() / math.sqrt(len(items))
        assert interval.estimate == pytest.approx(items.mean())
        assert (interval.low, interval.high) == pytest.approx(
            (items.mean() - 1.96 * error, items.mean() + 1.96 * error), abs=0.1 * error
        )

    def test_bootstrap_covers_as_promised(self):
        source = np.random.default_rng(1)
        intervals = [statistics.bootstrap(source.normal(size=60), resamples=400, seed=i) for i in range(300)]
        covered = sum(interval.low < 0 < interval.high for interval in intervals)
        promised = statistics.wilson(covered, len(intervals), confidence=0.999)
        assert promised.low < 0.95 < promised.high
        narrower = statistics.bootstrap(np.arange(60.0), confidence=0.5)
        wider = statistics.bootstrap(np.arange(60.0), confidence=0.99)
        assert wider.low < narrower.low < narrower.high < wider.high

    def test_bootstrap_of_any_statistic(self):
        source = np.random.default_rng(2)
        pairs = np.stack((source.uniform(50, 100, 500), source.uniform(20, 40, 500)), 1)
        interval = statistics.bootstrap(pairs, statistics.ratio)
        assert interval.estimate == pytest.approx(pairs[:, 0].sum() / pairs[:, 1].sum())
        assert interval.low < interval.estimate < interval.high
        middle = statistics.bootstrap(np.arange(101.0), lambda samples: np.median(samples, axis=1))
        assert middle.estimate == 50 and middle.low > 30 and middle.high < 70

    def test_bootstrap_repeats(self):
        items = np.arange(30.0)
        assert statistics.bootstrap(items, seed=3) == statistics.bootstrap(items, seed=3)
        assert statistics.bootstrap(items, seed=3) != statistics.bootstrap(items, seed=4)

    def test_pairs_show_what_arms_apart_hide(self):
        source = np.random.default_rng(3)
        control = source.normal(0, 10, 400)
        treatment = control + source.normal(0.3, 1, 400)
        paired = statistics.paired_bootstrap(treatment, control)
        assert paired.low > 0
        alone = statistics.bootstrap(treatment - control)
        assert (paired.low, paired.high) == pytest.approx((alone.low, alone.high), rel=1e-9)
        ours, theirs = statistics.bootstrap(treatment), statistics.bootstrap(control)
        assert ours.low < theirs.high

    def test_nothing_to_judge_by(self):
        with pytest.raises(InputError, match="no items"):
            statistics.bootstrap([])
        with pytest.raises(InputError, match="no trials"):
            statistics.wilson(0, 0)


class Windowed(torch.nn.Module):
    """Logits of a token depend on all tokens up to it, and on how many there are."""

    def __init__(self, vocab_size: int = 11) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(0)
        self.table = torch.randn(vocab_size, vocab_size, generator=source, dtype=torch.float64)
        self.longest = 0

    def forward(self, ids):
        self.longest = max(self.longest, ids.shape[1])
        seen = self.table[ids].cumsum(1)
        return SimpleNamespace(logits=seen / torch.arange(1, ids.shape[1] + 1)[:, None].sqrt())


def naive(module: Windowed, seen: list[int], target: int) -> float:
    """−log p of one token after the tokens `seen`, number by number."""
    row = module(torch.tensor([seen])).logits[0, -1].tolist()
    return math.log(sum(math.exp(x) for x in row)) - row[target]


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(1))


class TestPerplexity:
    def test_token_nll(self):
        module, ids = Windowed(), random_ids(3, 9)
        found = perplexity.token_nll(module(ids[:, :-1]).logits, ids[:, 1:])
        expected = [[naive(module, row[:t], row[t]) for t in range(1, 9)] for row in ids.tolist()]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)

    def test_batch_nll(self):
        module, ids = Windowed(), random_ids(3, 9)
        found = perplexity.batch_nll(module, ids[:, :-1], ids[:, 1:], batch=2)
        expected = [naive(module, row[:t], row[t]) for row in ids.tolist() for t in range(1, 9)]
        assert found == pytest.approx(np.mean(expected), rel=1e-12)

    def test_token_nll_of_half_precision_is_computed_in_single(self):
        logits, ids = torch.randn(5, 300).bfloat16(), torch.arange(5)
        found = perplexity.token_nll(logits, ids)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, perplexity.token_nll(logits.float(), ids))

    @pytest.mark.parametrize("length", [2, 5, 8, 9, 10, 23, 24, 40])
    @pytest.mark.parametrize("stride", [None, 1, 3, 7])
    @pytest.mark.parametrize("batch", [1, 4])
    def test_sliding(self, length, stride, batch):
        module, ids = Windowed(), random_ids(length)
        found = perplexity.sliding_nll(module, ids, context=8, stride=stride, batch=batch)
        expected, end = [], min(8, length - 1)
        start = 0
        while True:
            for t in range(len(expected) + 1, end + 1):
                expected.append(naive(module, ids[start:t].tolist(), int(ids[t])))
            if end == length - 1:
                break
            end = min(end + (stride or 8), length - 1)
            start = end - 8
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
        assert module.longest <= 8

    def test_a_stride_of_one_gives_every_token_the_whole_context(self):
        module, ids = Windowed(), random_ids(30)
        found = perplexity.sliding_nll(module, ids, context=8, stride=1)
        expected = [naive(module, ids[max(0, t - 8) : t].tolist(), int(ids[t])) for t in range(1, 30)]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)

    def test_texts(self):
        class Tokenizer:
            bos_id, eos_ids = None, (7,)

            def encode(self, text):
                return [ord(letter) % 11 for letter in text]

        module, text = Windowed(), "naïve 🙂 text"
        (loss,) = perplexity.perplexity(module, Tokenizer(), [text], context=100)
        ids = [7, *Tokenizer().encode(text)]
        nats = sum(naive(module, ids[:t], ids[t]) for t in range(1, len(ids)))
        assert (loss.tokens, loss.characters, loss.bytes) == (12, 12, 16)
        assert loss.nats == pytest.approx(nats, rel=1e-12)
        assert loss.perplexity == pytest.approx(math.exp(nats / 12), rel=1e-12)
        assert loss.bits_per_byte == pytest.approx(nats / 16 / math.log(2), rel=1e-12)
        assert loss.bits_per_character == pytest.approx(nats / 12 / math.log(2), rel=1e-12)
        assert perplexity.sum_losses([loss, loss]).nats_per_token == pytest.approx(loss.nats_per_token)
        with pytest.raises(InputError, match="text 1 is empty"):
            perplexity.perplexity(module, Tokenizer(), ["a", ""], context=8)

    def test_by_position(self):
        module, windows = Windowed(), random_ids(7, 13)
        found = perplexity.nll_by_position(module, windows, batch=3)
        expected = [sum(naive(module, w[:t], w[t]) for w in windows.tolist()) / 7 for t in range(1, 13)]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("context", [3, 8, 12])
    def test_last_tokens_are_the_same_at_every_context(self, context):
        module, windows = Windowed(), random_ids(5, 13)
        found = perplexity.last_tokens_nll(module, windows, context=context, last=3, batch=2)
        expected = [[naive(module, w[12 - context : t], w[t]) for t in (10, 11, 12)] for w in windows.tolist()]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


class Recorded:
    """Answers `score` from a table and remembers what it was asked."""

    def __init__(self, table: dict[tuple[str, str], float]) -> None:
        self.table, self.asked = table, []

    def score(self, prompts, continuations):
        self.asked.append(list(zip(prompts, continuations, strict=True)))
        return [self.table[pair] for pair in self.asked[-1]]


class Counting(Recorded):
    def count_tokens(self, texts):
        return [len(text.split("t")) for text in texts]


def golden_question(entry: dict) -> Question:
    return Question(entry["context"], tuple(entry["options"]), entry["answer"])


class TestOptions:
    @pytest.mark.parametrize(
        ("theirs", "ours"),
        [
            ("acc", "raw"),
            ("acc_norm", "per_character"),
            ("acc_bytes", "per_byte"),
            ("acc_mutual_info", "answer_context"),
        ],
    )
    def test_equal_to_lm_eval(self, theirs, ours):
        questions, right = [], []
        for entry in GOLDEN["requests"]:
            question = golden_question(entry)
            table = {tuple(pair): value for pair, value in zip(entry["asked"], entry["logprobs"], strict=True)}
            lm = Recorded(table)
            scores = options.score_options(lm, [question], answer_context="")
            assert set(lm.asked[0]) == set(table)
            assert options.correct([question], scores, ours)[0] == entry[theirs]
            questions.append(question)
            right += scores
        expected = np.mean([entry[theirs] for entry in GOLDEN["requests"]])
        interval = options.accuracy(questions, right)[ours]
        assert interval.estimate == pytest.approx(expected)
        assert interval.low < expected < interval.high

    def test_the_golden_requests_tell_the_normalisations_apart(self):
        names = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
        columns = [tuple(entry[name] for entry in GOLDEN["requests"]) for name in names]
        assert len(set(columns)) == 4

    @pytest.mark.parametrize("entry", GOLDEN["prompts"], ids=lambda entry: f"{entry['k']} shots")
    def test_prompts_equal_to_lm_eval(self, entry):
        shown = [golden_question(example) for example in GOLDEN["examples"][: entry["k"]]]
        found = options.with_demonstrations(golden_question(entry["question"]), shown, description=entry["description"])
        assert found.context == entry["prompt"]

    def test_normalisations_by_hand(self):
        question = Question("Where?", ("attic", "élan"), answer=1)
        table = {
            ("Where?", " attic"): -6.0,
            ("Where?", " élan"): -5.0,
            ("Answer:", " attic"): -8.0,
            ("Answer:", " élan"): -5.5,
        }
        (scores,) = options.score_options(Counting(table), [question])
        assert scores.raw == (-6.0, -5.0)
        assert scores.per_token == (-2.0, -5.0)
        assert scores.per_character == (-6 / 5, -5 / 4)
        assert scores.per_byte == (-6 / 5, -1.0)
        assert scores.answer_context == (2.0, 0.5)
        assert [scores.choice(name) for name in scores.normalisations()] == [1, 0, 1, 0, 0]
        (uncounted,) = options.score_options(Recorded(table), [question])
        assert uncounted == replace(scores, per_token=None)

    def test_one_call_and_equal_pairs_once(self):
        questions = [Question(f"Is {i} even?", ("yes", "no"), i % 2) for i in (1, 2, 1)]
        pairs = [(q.context, c) for q in questions for c in q.continuations]
        pairs += [("Answer:", " yes"), ("Answer:", " no")]
        lm = Recorded({pair: -float(i) for i, pair in enumerate(pairs)})
        scores = options.score_options(lm, questions)
        assert len(lm.asked) == 1
        assert len(lm.asked[0]) == len(set(lm.asked[0])) == 6
        assert scores[0] == scores[2] != scores[1]

    @pytest.mark.parametrize(
        ("given", "answer", "message"),
        [((), 0, "empty option or none"), (("a", ""), 0, "empty option"), (("a",), 1, "answer 1"), (("a",), -1, "-1")],
    )
    def test_bad_questions(self, given, answer, message):
        with pytest.raises(InputError, match=message):
            Question("Which?", given, answer)

    def test_no_questions(self):
        with pytest.raises(InputError, match="no questions"):
            options.accuracy([], [])

    def test_accuracy_without_a_token_count(self):
        scores = Scores(raw=(0.0, -1.0), per_character=(0.0, -1.0), per_byte=(0.0, -1.0), answer_context=(0.0, -1.0))
        found = options.accuracy([Question("?", ("a", "b"), 0)], [scores])
        assert "per_token" not in found and found["raw"].estimate == 1.0


EXAMPLES = [Question(f"Sum {i} and 1:", (str(i + 1), str(i), str(i + 2)), answer=0) for i in range(40)]


def shown(question: Question, k: int, **how) -> list[str]:
    return options.fewshot(how.pop("examples", EXAMPLES), question, k, how.pop("seed", 0), **how).context.split("\n\n")


class TestFewshot:
    def test_never_the_question_itself(self):
        for question in EXAMPLES:
            *demonstrations, last = shown(question, 39)
            assert last == question.context
            assert sorted(demonstrations) == sorted(e.solved for e in EXAMPLES if e != question)
        with pytest.raises(InputError, match=r"40 demonstrations .* 39 other"):
            options.fewshot(EXAMPLES, EXAMPLES[0], 40, 0)

    def test_the_draw(self):
        first = [shown(q, 4)[:-1] for q in EXAMPLES]
        assert first == [shown(q, 4)[:-1] for q in EXAMPLES]
        assert first != [shown(q, 4, seed=1)[:-1] for q in EXAMPLES]
        assert len({tuple(demonstrations) for demonstrations in first}) == len(EXAMPLES)
        assert [shown(q, 9)[:4] for q in EXAMPLES] == first
        counts = [sum(e.solved in demonstrations for demonstrations in first) for e in EXAMPLES]
        assert max(counts) < 13  # of 160 draws among 40: a mean of 4, 13 has a probability below 1e-3

    def test_no_shots(self):
        assert options.fewshot([], EXAMPLES[0], 0, 0) == EXAMPLES[0]
        assert options.fewshot([], EXAMPLES[0], 0, 0, description="Add. ").context == "Add. Sum 0 and 1:"

    def test_labels_drawn_by_lot_change_nothing_but_labels(self):
        drawn = [options.relabelled(example, seed=0) for example in EXAMPLES]
        assert [d.context for d in drawn] == [e.context for e in EXAMPLES]
        counts = [sum(d.answer == i for d in drawn) for i in range(3)]
        assert min(counts) > 4 and drawn != [options.relabelled(example, seed=1) for example in EXAMPLES]
        for question in EXAMPLES:
            right, lots = shown(question, 6), shown(question, 6, examples=drawn)
            assert right[-1] == lots[-1]
            assert [text.split(":")[0] for text in right] == [text.split(":")[0] for text in lots]

    @pytest.mark.parametrize(
        ("generated", "answers", "same"),
        [
            (" 124.\n", ["124"], True),
            ("THE Answer", ["answer"], True),
            ("3.5", ["35"], False),
            ("-5", ["5"], False),
            ("a", [""], False),
            ("(B)", ["b"], True),
            ("", ["A"], False),
            (")", ["]"], False),
            ("Ivan the Terrible", ["ivan terrible"], False),
            ("Straße", ["STRASSE", "street"], True),
        ],
    )
    def test_exact_match(self, generated, answers, same):
        assert options.exact_match(generated, answers) is same


def test_two_ways_are_timed_in_turn_on_the_same_given(monkeypatch):
    done: list[tuple[str, int]] = []
    clock = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def one(what: int) -> None:
        done.append(("one", what))
        clock[0] += 0.25

    def other(what: int) -> None:
        done.append(("other", what))
        clock[0] += 2.5

    found = timing.ratios(one, other, given=iter(range(9)), repeats=4, warm_up=1)
    assert done == [(name, i) for i in range(5) for name in ("one", "other")]
    assert found == [10.0] * 4
