"""Speculation changes what tokens cost, never what they are: laws, distributions, and the engine with and without."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from scipy import stats

from allyouneed.core.errors import InputError
from allyouneed.data.tokenizers import byte_tokenizer
from allyouneed.generate.drafting import Draft, EarlyExit, Length
from allyouneed.generate.engine import Engine
from allyouneed.generate.language_model import Sampling
from allyouneed.generate.requests import Request
from allyouneed.generate.sampling import Sampler, draw, judged
from allyouneed.generate.speculation import Pace, PromptLookup, Speculator, agreement, expected
from allyouneed.models import llama, rwkv
from allyouneed.models.decoder import Decoder

V, DRAWS = 16, 20_000
SURE = 1e-3  # a test of a true distribution falls below once in a thousand; seeds are fixed


def distributions(seed: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A target and a draft that resembles it, logits (V,)."""
    source = torch.Generator().manual_seed(seed)
    target = torch.randn(V, generator=source) * 2
    return target / temperature, (target + torch.randn(V, generator=source)) / temperature


def goodness(found: Counter, wanted: dict, total: int) -> float:
    """The p-value of Pearson's test, cells of less than 5 expected put together."""
    cells = [(found[key], total * share) for key, share in wanted.items()]
    large, small = [cell for cell in cells if cell[1] >= 5], [cell for cell in cells if cell[1] < 5]
    assert sum(found.values()) == total and all(wanted.get(key, 0) > 0 for key in found)
    if sum(cell[1] for cell in small) > 0:
        large.append((sum(cell[0] for cell in small), sum(cell[1] for cell in small)))
    observed, frequencies = zip(*large, strict=True)
    scale = sum(observed) / sum(frequencies)
    return stats.chisquare(observed, [frequency * scale for frequency in frequencies]).pvalue


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_kept_is_distributed_as_the_target(seed, temperature):
    logits, guess = distributions(seed, temperature)
    p, q, source = logits.double().softmax(-1), guess.double().softmax(-1), random.Random(seed)
    found = Counter(judged(p, q, draw(guess, source), source) for _ in range(DRAWS))
    assert goodness(found, dict(enumerate(p.tolist())), DRAWS) > SURE


def test_the_chi_square_test_notices_a_wrong_rule():
    """The draft kept too often, or the rest drawn from p itself: both are found out."""
    logits, guess = distributions(0, 1.0)
    p, q, source = logits.double().softmax(-1), guess.double().softmax(-1), random.Random(0)
    drafts = Counter(draw(guess, source) for _ in range(DRAWS))
    assert goodness(drafts, dict(enumerate(p.tolist())), DRAWS) < 1e-9
    naive: Counter[int] = Counter()
    for _ in range(DRAWS):
        draft = draw(guess, source)
        naive[draft if source.random() * q[draft] < p[draft] else draw(logits, source)] += 1
    assert goodness(naive, dict(enumerate(p.tolist())), DRAWS) < 1e-9


def test_the_target_is_the_distribution_after_bias_penalties_guide_and_filters():
    class Odd:
        """Allows tokens 1, 3, 5 …"""

        finished = False

        def allowed(self):
            return torch.arange(V) % 2 == 1

    logits, guess = distributions(3, 1.0)
    sampling = Sampling(temperature=0.8, top_p=0.9, top_k=6, frequency_penalty=0.5, logit_bias=((1, 1.5),), seed=0)
    sampler = Sampler(sampling, [0], V, guide=Odd())  # type: ignore[arg-type]
    odds, source = guess.double().softmax(-1), random.Random(1)
    found = Counter(sampler.judge(logits, draw(guess, source), odds) for _ in range(DRAWS))
    plain = Counter(sampler.choose(logits) for _ in range(DRAWS))
    wanted = {i: share for i, share in enumerate(sampler.odds(logits).tolist()) if share}
    assert 2 <= len(wanted) <= 6 and all(i % 2 for i in wanted)
    assert goodness(found, wanted, DRAWS) > SURE and goodness(plain, wanted, DRAWS) > SURE


@pytest.mark.parametrize("drafts", [1, 3, 6])
def test_tokens_of_a_pass_follow_the_law(drafts):
    """E = (1 − α^(γ+1)) / (1 − α), Leviathan et al. 2023, eq. 1; α = Σ min(p, q), theorem 3.5."""
    logits, guess = distributions(5, 1.0)
    p, q, source = logits.double().softmax(-1), guess.double().softmax(-1), random.Random(drafts)
    counts = []
    for _ in range(8000):
        kept = 0
        while kept < drafts and judged(p, q, draft := draw(guess, source), source) == draft:
            kept += 1  # the draft is also kept where the rest gives it; that is never, since there p <= q
        counts.append(kept + 1)
    alpha, mean = agreement(p, q), sum(counts) / len(counts)
    error = torch.tensor(counts, dtype=torch.double).std().item() / len(counts) ** 0.5
    assert 0.3 < alpha < 0.9 and abs(mean - expected(alpha, drafts)) < 3.5 * error


def test_lookup_finds_what_the_slow_search_finds():
    def slow(tokens: Sequence[int], count: int) -> list[int]:
        for size in (5, 4, 3):
            for end in range(len(tokens) - 1, size - 1, -1):
                if size < len(tokens) and list(tokens[end - size : end]) == list(tokens[-size:]):
                    alike = max(
                        n for n in range(end + 1) if list(tokens[end - n : end]) == list(tokens[len(tokens) - n :])
                    )
                    return list(tokens[end : end + min(count, alike)])
        return []

    source, hits = random.Random(0), 0
    for number in range(200):
        lookup, tokens = PromptLookup(), [source.randrange(3) for _ in range(source.randrange(1, 30))]
        for _ in range(20):
            found = lookup.found(number, tokens, 7)
            assert found == slow(tokens, 7), tokens
            hits += bool(found)
            tokens += [source.randrange(3) for _ in range(source.randrange(1, 4))]
    assert hits > 1000


def test_a_pace_slows_down_where_nothing_is_kept():
    pace = Pace(first=4, most=16, most_rest=16)
    tried = 0
    for _ in range(1000):
        tried += bool(pace.count)
        pace.hear(pace.count, 0)
    assert tried < 70  # of 1000 passes
    pace.rest = 0
    pace.hear(4, 4)
    assert pace.count == 8 and pace.failures == 0


def model(seed: int, layers: int = 4, vocab_size: int = V, scale: float = 3.0) -> Decoder:
    torch.manual_seed(seed)
    config = llama.architecture(vocab_size=vocab_size, context=160, dim=32, num_layers=layers, num_heads=4, tied=True)
    module = config.build().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(scale)
    return module


@pytest.fixture(scope="module")
def target() -> Decoder:
    return model(0)


SPECULATORS: dict[str, Callable[[Decoder], Speculator]] = {
    "lookup": lambda module: PromptLookup(),
    "another model": lambda module: Draft(model(1, 2)),
    "the same model": lambda module: Draft(module),
    "early exit": lambda module: EarlyExit(2, Length(most=5, first=2)),
}


def prompts_of(count: int) -> list[list[int]]:
    source = random.Random(0)
    return [[source.randrange(V) for _ in range(1 + 7 * i % 30)] * (1 + i % 2) for i in range(count)]


def run(
    module: Decoder,
    requests: Sequence[Request],
    speculator: Speculator | None = None,
    *,
    eos_ids: Sequence[int] = (),
    **config: object,
) -> tuple[list[list[int]], Engine]:
    engine = Engine(module, eos_ids, Engine.Config(**{"block_size": 4, **config}), speculator)  # type: ignore[arg-type]
    found = {engine.add(request): list[int]() for request in requests}
    while not engine.idle:
        for step in engine.step():
            found[step.request].append(step.token)
    assert engine.statistics().free == engine.statistics().blocks
    return list(found.values()), engine


FEW = {"max_batch": 6, "chunk": 5, "blocks": 28}  # makes requests wait, read in chunks and be interrupted


@pytest.mark.parametrize("name", SPECULATORS)
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=40, temperature=0),
        Sampling(max_new_tokens=30, temperature=0, repetition_penalty=1.3, frequency_penalty=0.4),
        Sampling(max_new_tokens=30, temperature=0, logit_bias=((3, -2.0), (5, 1.0)), min_tokens=9),
    ],
    ids=["plain", "penalties", "bias"],
)
def test_greedy_tokens_are_the_same(target, name, sampling):
    requests = [Request(ids=ids, sampling=sampling, stop=lambda token: token == 11) for ids in prompts_of(18)]
    wanted, _ = run(target, requests, eos_ids=[7])
    found, engine = run(target, requests, SPECULATORS[name](target), eos_ids=[7])
    assert found == wanted and engine.statistics().drafts > 0
    found, engine = run(target, requests, SPECULATORS[name](target), eos_ids=[7], **FEW)
    assert found == wanted


@pytest.mark.parametrize("name", SPECULATORS)
def test_seeds_give_the_same_tokens_alone_and_in_any_batch(target, name):
    samplings = [Sampling(max_new_tokens=40, temperature=0.7, top_p=0.95, seed=i) for i in range(14)]
    requests = [Request(ids=ids, sampling=one) for ids, one in zip(prompts_of(14), samplings, strict=True)]
    alone = [run(target, [request], SPECULATORS[name](target))[0][0] for request in requests]
    together, engine = run(target, requests, SPECULATORS[name](target))
    pressed, interrupted = run(target, requests, SPECULATORS[name](target), **FEW)
    assert alone == together == pressed
    assert interrupted.statistics().preemptions > 0 and engine.statistics().kept > 0
    if name == "lookup":  # what was found is compared with what is drawn anyway
        assert alone == run(target, requests)[0]


@pytest.mark.parametrize("blocks", [14, 16, 20, 30])
def test_a_draft_model_without_room_for_all_texts_holds_what_it_read(target, blocks):
    """The model shares the blocks of a prefix, its draft does not: some texts must do without."""
    prefix, draft = list(range(12)) * 2, model(1, 2)
    sampling = Sampling(max_new_tokens=12, temperature=0)
    requests = [Request(ids=[*prefix, i], sampling=sampling) for i in range(4)]
    wanted, _ = run(target, requests)
    found, engine = run(target, requests, Draft(draft, Length(first=4, most=4)), blocks=blocks, max_batch=8)
    assert found == wanted and engine.statistics().drafts > 0


@pytest.mark.parametrize("blocks", [14, 16, 20, 30])
def test_seeds_give_the_same_tokens_whatever_room_drafts_have(target, blocks):
    prefix, draft = list(range(12)) * 2, model(1, 2)
    samplings = [Sampling(max_new_tokens=16, temperature=1.0, seed=i) for i in range(5)]
    requests = [Request(ids=[*prefix, i], sampling=one) for i, one in enumerate(samplings)]

    def guessing() -> Draft:
        return Draft(draft, Length(first=4, most=4, least=0.1))

    alone = [run(target, [request], guessing())[0][0] for request in requests]
    together, engine = run(target, requests, guessing(), blocks=blocks, max_batch=8, chunk=7)
    assert together == alone and engine.statistics().kept > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_model_reads_no_more_than_a_chunk(target, temperature, monkeypatch):
    """Beside the tokens that came last: else a long prompt holds up all that run."""
    draft, chunk = Draft(model(1, 2)), 8
    engine = Engine(target, config=Engine.Config(block_size=4, chunk=chunk), speculator=draft)
    read, sizes = draft._reader.read, list[int]()
    monkeypatch.setattr(
        draft._reader, "read", lambda pieces: sizes.append(sum(len(one.ids) for one in pieces)) or read(pieces)
    )
    engine.add(Request(ids=[1, 2], sampling=Sampling(max_new_tokens=40, temperature=temperature, seed=0)))
    for _ in range(5):
        engine.step()
    for i in range(2):
        ids = [j % V for j in range(100 + i)]
        engine.add(Request(ids=ids, sampling=Sampling(max_new_tokens=20, temperature=temperature, seed=1)))
    passes = [engine.step() for _ in range(100) if not engine.idle]
    assert engine.idle and {step.request for steps in passes for step in steps} == {0, 1, 2}
    assert chunk <= max(sizes) <= chunk + 2 * 3 and sum(sizes) > 150  # one prompt at least


def test_all_that_the_same_model_guesses_is_kept(target):
    requests = [
        Request(ids=ids, sampling=Sampling(max_new_tokens=30, temperature=t)) for ids, t in [([1, 2], 0.0), ([3], 1.0)]
    ]
    _, engine = run(target, requests, Draft(target))
    statistics = engine.statistics()
    assert statistics.kept == statistics.drafts > 40


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
def test_sampled_texts_are_distributed_as_without_speculation(temperature):
    """The first three tokens of 20,000 texts against their probabilities under the model: first the whole engine."""
    module, prompt, texts = model(2, 2, vocab_size=5, scale=2.5), [1, 2], DRAWS
    sampling = Sampling(max_new_tokens=3, temperature=temperature)
    draft = model(3, 1, vocab_size=5, scale=2.5)
    config = Engine.Config(max_batch=250, blocks=600, block_size=8, chunk=4096)
    engine = Engine(module, config=config, speculator=Draft(draft, Length(most=2, first=2)))
    found: dict[int, list[int]] = {}
    for i in range(texts):
        found[engine.add(Request(ids=prompt, sampling=sampling.replace(seed=i)))] = []
        if i % 250 == 249:
            while not engine.idle:
                for step in engine.step():
                    found[step.request].append(step.token)
    wanted = {}
    for first in range(5):
        for second in range(5):
            ids = torch.tensor([[*prompt, first, second]])
            p = (module(ids).logits.detach()[0, 1:].double() / temperature).softmax(-1)
            for third in range(5):
                wanted[first, second, third] = (p[0, first] * p[1, second] * p[2, third]).item()
    assert goodness(Counter(tuple(tokens) for tokens in found.values()), wanted, texts) > SURE
    assert 0.1 < engine.statistics().kept / engine.statistics().drafts < 0.95


def test_a_guide_holds_under_speculation():
    from allyouneed.generate.guides import Guides

    tokenizer = byte_tokenizer()
    module, guides = model(4, 3, vocab_size=260), Guides(tokenizer)
    pattern = r"(ab|cd|ef){8}[0-9]{3}"

    def requests(temperature: float) -> list[Request]:
        samplings = [Sampling(max_new_tokens=30, temperature=temperature, seed=i) for i in range(6)]
        return [Request(ids=[65, 66 + i], sampling=one, guide=guides.regex(pattern)) for i, one in enumerate(samplings)]

    wanted, _ = run(module, requests(0.0), eos_ids=tokenizer.eos_ids)
    for make in (PromptLookup, lambda: Draft(model(5, 1, vocab_size=260)), lambda: EarlyExit(1)):
        assert run(module, requests(0.0), make(), eos_ids=tokenizer.eos_ids)[0] == wanted
        found, engine = run(module, requests(1.0), make(), eos_ids=tokenizer.eos_ids)
        texts = [tokenizer.decode(tokens) for tokens in found]
        assert all(torch.tensor([len(text) == 19 for text in texts])) and engine.statistics().drafts > 0
        assert all(set(text[:16:2]) <= set("ace") and text[16:].isdigit() for text in texts)


def test_a_guide_that_gives_up_ends_its_own_request_only(target):
    class Failing:
        """Allows all, three times."""

        finished, left = False, 3

        def allowed(self):
            return torch.ones(V, dtype=torch.bool)

        def take(self, token):
            self.left -= 1
            if not self.left:
                raise InputError("too complex")

        def copy(self):
            return self

    greedy = Sampling(max_new_tokens=10, temperature=0)
    engine = Engine(target)
    for guide in (Failing(), None):
        engine.add(Request(ids=[1, 2], sampling=greedy, guide=guide))  # type: ignore[arg-type]
    steps = [step for _ in range(10) for step in engine.step()]
    assert [step.finish_reason for step in steps if step.request == 0] == [None, None, "error"]
    assert [step.finish_reason for step in steps if step.request == 1] == [None] * 9 + ["length"]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda module: Engine(module, speculator=Draft(model(1, 1, vocab_size=V + 1))), "17 tokens"),
        (lambda module: Engine(module, speculator=EarlyExit(4)), "layers=4 of 4"),
        (lambda module: Engine(module, speculator=EarlyExit(0)), "layers=0"),
        (lambda module: Engine(rwkv.EXAMPLE.build().eval(), speculator=PromptLookup()), "state"),
        (lambda module: PromptLookup(PromptLookup.Config(shortest=6)), "shortest"),
        (lambda module: Length(first=9), "first"),
    ],
)
def test_what_cannot_work_is_refused(target, make, named):
    with pytest.raises(InputError, match=named):
        make(target)
