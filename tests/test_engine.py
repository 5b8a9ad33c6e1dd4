"""Sampling, stopping, streaming and scoring, each against the formula or the slow and obvious way."""

from __future__ import annotations

import json
import random

import pytest
import torch

from allyouneed.core.config import Config
from allyouneed.core.errors import InputError
from allyouneed.data.tokenizer_training import train_bpe
from allyouneed.data.tokenizers import byte_tokenizer
from allyouneed.generate.beams import beam_search
from allyouneed.generate.engine import Engine
from allyouneed.generate.language_model import Sampling
from allyouneed.generate.local import LocalModel
from allyouneed.generate.requests import Request
from allyouneed.generate.sampling import Sampler, draw, filtered, penalise, source_of
from allyouneed.models import llama


@pytest.fixture(scope="module")
def lm() -> LocalModel:
    torch.manual_seed(0)
    module = llama.architecture(vocab_size=257, context=96, dim=32, num_layers=2, num_heads=4, tied=True).build().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(4)
    return LocalModel(module, byte_tokenizer(), "tiny", config=Engine.Config(max_batch=3))


def shares(logits: torch.Tensor, sampling: Sampling, draws: int = 20_000) -> torch.Tensor:
    source = random.Random(0)
    kept = filtered(logits, sampling)
    counts = torch.zeros(len(logits))
    for _ in range(draws):
        counts[draw(kept, source)] += 1
    return counts / draws


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.5, 0.25, 0.15, 0.1]),
        (Sampling(top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(top_p=0.7), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(top_p=0.76), [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0]),
        (Sampling(min_p=0.29), [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0]),
        (Sampling(temperature=0.5), [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
        (Sampling(top_p=0.01), [1, 0, 0, 0]),
    ],
)
def test_draws_follow_the_distribution(sampling, expected):
    found = shares(torch.tensor([0.5, 0.25, 0.15, 0.1]).log(), sampling)
    assert (found - torch.tensor(expected)).abs().max() < 0.015  # four standard deviations of 20 000 draws


def test_repetition_penalty_takes_the_sign_into_account():
    logits = torch.tensor([2.0, -2.0, 1.0])
    seen = torch.tensor([True, True, False])
    assert penalise(logits, seen, 2.0).tolist() == [1.0, -4.0, 1.0]


def test_penalty_sees_prompt_and_output():
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=1e9), [0], vocab_size=3)
    logits, chosen = torch.tensor([3.0, 2.0, 1.0]), []
    for _ in range(2):
        chosen.append(sampler.choose(logits))
        sampler.take(chosen[-1])
    assert chosen == [1, 2]


def test_a_row_does_not_depend_on_its_batch(lm):
    sampling = [Sampling(max_new_tokens=n, seed=n, temperature=1.3, top_p=0.9) for n in (12, 3, 7, 12)]
    prompts = [[65, 66, 67], [70], [80] * 9, [90, 91]]
    together: dict[int, list[int]] = {i: [] for i in range(4)}
    for step in Engine(lm.module).steps(prompts, sampling):
        together[step.request].append(step.token)
    for i in range(4):
        alone = [step.token for step in Engine(lm.module).steps([prompts[i]], [sampling[i]])]
        assert alone == together[i]
        assert len(alone) == sampling[i].max_new_tokens


def test_rows_that_only_pad_a_table_never_come(lm):
    torch.manual_seed(0)
    size = lm.tokenizer.vocab_size
    padded = llama.architecture(vocab_size=size + 300, context=96, dim=32, num_layers=2, num_heads=4).build().eval()
    model = LocalModel(padded, lm.tokenizer, "padded", config=Engine.Config(max_batch=4))
    options = [
        Sampling(max_new_tokens=60, ignore_eos=True, temperature=t, seed=i, frequency_penalty=f)
        for i, (t, f) in enumerate([(0.0, 0.0), (0.0, 1.0), (1.5, 0.0), (1.5, 1.0)])
    ]
    for found in model.complete(["The"] * 4, options):
        assert found.completion_tokens == 60 and max(found.token_ids) < size
    request = Request(ids=[65, 66], sampling=Sampling(max_new_tokens=1), top_logprobs=size + 300, prompt_logprobs=True)
    model.engine.add(request)
    (step,) = model.engine.step()
    assert len(step.top) == size and all(token < size for _, top in step.prompt or () for token, _ in top)
    with pytest.raises(InputError, match=f"token {size} is none"):
        model.engine.add(Request(ids=[size], sampling=Sampling(max_new_tokens=1)))


def test_seeds_of_either_sign_differ(lm):
    seeds = (-(2**63), -2, -1, 0, 1, 2, 2**63 - 1)
    assert len({source_of(seed).random() for seed in seeds}) == len(seeds)
    texts = [lm.generate(["Hello"], max_new_tokens=12, seed=seed)[0] for seed in (-1, 1)]
    assert texts[0] != texts[1]


def test_those_that_wait_hold_no_rows_of_the_vocabulary(lm):
    engine = Engine(lm.module, config=Engine.Config(max_batch=1))
    options = Sampling(max_new_tokens=2, repetition_penalty=1.1, frequency_penalty=0.1)
    for _ in range(4):
        engine.add(Request(ids=[1, 2, 3], sampling=options))
    engine.step()
    made = ["sampler" in vars(one) for one in engine._under_way.values()]
    assert made == [True, False, False, False]


def test_logprobs_are_the_models_own(lm):
    completion = lm.complete(["Hello"], Sampling(max_new_tokens=8, temperature=0.7, top_k=5, seed=3))[0]
    prompt = lm.tokenizer.encode("Hello")
    whole = torch.tensor([prompt + list(completion.token_ids)])
    expected = lm.module(whole).logits.detach().double().log_softmax(-1)[0, len(prompt) - 1 : -1]
    for token, found, row in zip(completion.token_ids, completion.logprobs, expected, strict=True):
        assert abs(row[token].item() - found) < 1e-4


def test_scores_equal_the_whole_forward_pass(lm):
    prompts = ["abc", "abc", "ab", "", "abcdef", "xyz "]
    continuations = ["def", "d", "zz", "start", "g" * 20, "w"]
    for prompt, continuation, found in zip(prompts, continuations, lm.score(prompts, continuations), strict=True):
        before = lm.tokenizer.encode(prompt.rstrip()) or [256]
        after = lm.tokenizer.encode(prompt[len(prompt.rstrip()) :] + continuation)
        logprobs = lm.module(torch.tensor([before + after])).logits.detach().double().log_softmax(-1)[0]
        expected = sum(logprobs[len(before) + i - 1, token].item() for i, token in enumerate(after))
        assert abs(found - expected) < 1e-4


def test_stop_strings_end_the_text_and_are_left_out(lm):
    free = lm.complete(["go"], Sampling(max_new_tokens=24, seed=5, ignore_eos=True))[0]
    stop = free.text[4:6]
    assert stop and stop not in free.text[:4]
    stopped = lm.complete(["go"], Sampling(max_new_tokens=24, seed=5, stop=("never", stop), ignore_eos=True))[0]
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop" and stopped.completion_tokens < 24
    pieces = list(lm.stream("go", Sampling(max_new_tokens=24, seed=5, stop=(stop,), ignore_eos=True)))
    assert "".join(pieces) == stopped.text and len(pieces) > 1


def test_stream_equals_complete(lm):
    sampling = Sampling(max_new_tokens=30, seed=9, temperature=1.5, ignore_eos=True)
    assert "".join(lm.stream("héllo", sampling)) == lm.complete(["héllo"], sampling)[0].text


def test_end_token_ends_unless_ignored(lm):
    class Ending(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.config, self.device = module, module.config, module.device
            self.limit, self.answers = module.limit, False

        def hidden(self, *args, **kwargs):
            return self.module.hidden(*args, **kwargs)

        def head(self, hidden):
            return torch.nn.functional.one_hot(torch.full(hidden.shape[:-1], 256), 257).float() * 9

        def forward(self, ids, cache):
            from allyouneed.models.decoder import Output

            return Output(self.head(self.hidden(ids, cache=cache)))

        def new_cache(self, *args):
            return self.module.new_cache(*args)

    engine = Engine(Ending(lm.module), eos_ids=[256])
    greedy = Sampling(max_new_tokens=5, temperature=0)
    assert [step.finish_reason for step in engine.steps([[1]], [greedy])] == ["stop"]
    ignoring = [step.finish_reason for step in engine.steps([[1]], [greedy.replace(ignore_eos=True)])]
    assert ignoring == [None] * 4 + ["length"]


def test_order_kept_over_batches(lm):
    prompts = ["a", "bb", "ccc", "dddd", "e", "ff", "ggg"]
    together = lm.generate(prompts, max_new_tokens=5, temperature=0)
    assert together == [lm.generate([prompt], max_new_tokens=5, temperature=0)[0] for prompt in prompts]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-46}, "repetition_penalty"),
        ({"frequency_penalty": 1e39}, "frequency_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"logit_bias": ((5, 1e39),)}, "logit_bias"),
        ({"temperature": 1e300}, "temperature"),
        ({"max_tokens": 3}, "max_new_tokens"),
    ],
)
def test_options_without_a_meaning_are_refused(lm, options, named):
    with pytest.raises(InputError, match=named):
        lm.generate(["a"], **options)


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_options_leave_numbers(lm, sign):
    options = {"repetition_penalty": 1e9**sign, "frequency_penalty": 1e9 * sign, "presence_penalty": 1e9 * sign}
    for temperature in (1e-5, 1e9):
        sampling = Sampling(max_new_tokens=6, temperature=temperature, logit_bias=((5, 1e9 * sign),), **options)
        assert len(list(lm.engine.steps([[1, 2, 3]], [sampling]))) == 6


def test_too_long_a_prompt_says_by_how_much(lm):
    with pytest.raises(InputError, match="exceed the context of 96 by 14"):
        lm.generate(["x" * 90], max_new_tokens=20)
    with pytest.raises(InputError, match="by 5"):
        lm.score(["x" * 90], ["y" * 11])
    with pytest.raises(InputError, match="no chat template"):
        lm.chat([{"role": "user", "content": "Hi"}])


MERGING = "aaaa bbbb aaaa bbbb abab aabb " * 40


def test_scores_where_prompt_and_continuation_merge():
    """Tokens that bridge the two, and whole continuations that outgrow one pass, count once."""
    tokenizer = train_bpe([MERGING], 280)
    torch.manual_seed(0)
    module = llama.architecture(vocab_size=280, context=600, dim=16, num_layers=1, num_heads=2).build().eval()
    lm = LocalModel(module, tokenizer, "merging")
    pairs = [
        ("aa", "aa bbbb"),
        ("bbbb a", "aaa"),
        ("abab", " aabb"),
        ("x", ""),
        ("bbbb", " ab" * 180),
        ("bbbb", " ba" * 190),
    ]
    assert any(tokenizer.encode(p) != tokenizer.encode(p + c)[: len(tokenizer.encode(p))] for p, c in pairs)
    for (prompt, continuation), found in zip(pairs, lm.score(*map(list, zip(*pairs, strict=True))), strict=True):
        alone, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + continuation)
        shared = next(
            (i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), min(len(alone), len(whole))
        )
        start = shared or 1  # nothing comes before the first token: a begin token stands in for it
        ids = torch.tensor([whole if shared else [lm._first_token(), *whole]])
        logprobs = module(ids).logits[0].double().log_softmax(-1)
        expected = sum(logprobs[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1]))
        assert found == pytest.approx(expected, abs=1e-4)


def test_what_the_context_cannot_hold_is_refused_everywhere(lm):
    ids = list(range(90))
    with pytest.raises(InputError, match="by 4"):
        beam_search(lm.engine, ids, max_new_tokens=10, beams=2)
    with pytest.raises(InputError, match="beams=0"):
        beam_search(lm.engine, ids, max_new_tokens=1, beams=0)
    with pytest.raises(InputError, match="by 4"):
        lm.embed(["x" * 100])


def test_a_tokenizer_of_another_model_is_refused(lm):
    module = llama.EXAMPLE.build()
    with pytest.raises(InputError, match=r"257 tokens, the model 53"):
        LocalModel(module, byte_tokenizer(), "mixed up")


def test_the_smallest_temperatures_are_greedy(lm):
    greedy = lm.complete(["abc"], Sampling(max_new_tokens=8, ignore_eos=True, temperature=0))[0].text
    almost = lm.complete(["abc"], Sampling(max_new_tokens=8, ignore_eos=True, temperature=1e-30, seed=1))[0].text
    assert almost == greedy


def test_biases_survive_files_and_the_command_line():
    sampling = Sampling(logit_bias=((3, -1.5), (7, 2.0)))
    assert Config.from_json(json.loads(json.dumps(sampling.to_json()))) == sampling
    assert Sampling().override("logit_bias=((3, -1.5), (7, 2))") == sampling
    with pytest.raises(InputError, match="logit_bias"):
        Config.from_json(sampling.to_json() | {"logit_bias": [[3, -1.5, 7]]})
    with pytest.raises(InputError, match="logit_bias"):
        Sampling().override("logit_bias=((3, -1.5, 7),)")
    with pytest.raises(InputError, match="logit_bias"):
        Sampling(logit_bias=((3, float("nan")),))
    with pytest.raises(InputError, match="min_tokens=5; it must be 0 to max_new_tokens=4"):
        Sampling(min_tokens=5, max_new_tokens=4)
