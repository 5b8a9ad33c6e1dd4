"""Requests and who of them runs: what each may ask for, turns, interruptions, and what is free afterwards."""

from __future__ import annotations

import copy
import random
from collections import Counter

import pytest
import torch

from allyouneed.core.errors import InputError
from allyouneed.generate.beams import beam_search
from allyouneed.generate.engine import Engine
from allyouneed.generate.language_model import Sampling
from allyouneed.generate.requests import Request, RequestError, Step
from allyouneed.generate.stopping import StopStrings
from allyouneed.models import llama, rwkv
from allyouneed.models.decoder import Decoder
from allyouneed.nn.sight import Memory


@pytest.fixture(scope="module")
def module() -> Decoder:
    torch.manual_seed(0)
    config = llama.architecture(vocab_size=101, context=96, dim=32, num_layers=2, num_heads=4, num_kv_heads=2)
    module = config.build().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(4)
    return module


def engine_of(module: Decoder, eos_ids: tuple[int, ...] = (), **config: object) -> Engine:
    return Engine(module, eos_ids, Engine.Config(**config))  # type: ignore[arg-type]


def finish(engine: Engine) -> dict[int, list[Step]]:
    found: dict[int, list[Step]] = {}
    while not engine.idle:
        for step in engine.step():
            found.setdefault(step.request, []).append(step)
    return found


def tokens(steps: list[Step]) -> list[int]:
    return [step.token for step in steps]


def ask(engine: Engine, ids: list[int], **fields: object) -> list[Step]:
    sampling = {name: fields.pop(name) for name in list(fields) if hasattr(Sampling, name) and name != "stop"}
    number = engine.add(Request(ids=ids, sampling=Sampling(**{"max_new_tokens": 8} | sampling), **fields))  # type: ignore[arg-type]
    return finish(engine)[number]


@torch.no_grad()
def logits_after(module: Decoder, ids: list[int]) -> torch.Tensor:
    return module(torch.tensor([ids])).logits[0, -1]


def drawn(count: int, source: random.Random) -> list[Request]:
    """Requests of all kinds, drawn tokens among them."""
    found = []
    for i in range(count):
        ids = [source.randrange(101) for _ in range(source.randrange(1, 30))]
        options = {"temperature": source.choice([0.0, 0.7, 1.5]), "top_p": source.choice([1.0, 0.9]), "seed": i}
        options |= {"top_k": source.choice([0, 20]), "frequency_penalty": source.choice([0.0, 0.5])}
        options |= {"repetition_penalty": source.choice([1.0, 1.2]), "max_new_tokens": source.randrange(1, 20)}
        found.append(Request(ids=ids, sampling=Sampling(**options)))
    return found


@pytest.mark.parametrize(
    "config",
    [
        {"max_batch": 16},
        {"max_batch": 3, "chunk": 5, "block_size": 4},
        {"block_size": 4, "blocks": 16, "share_prefixes": False},
        {"block_size": 4, "blocks": 16},
    ],
    ids=["batched", "chunked", "preempted", "preempted and found again"],
)
def test_a_seed_draws_the_same_alone_and_in_any_batch(module, config):
    requests = drawn(40, random.Random(1))
    alone = [tokens(next(iter(run_one(module, request).values()))) for request in requests]
    engine = engine_of(module, **config)
    numbers = [engine.add(request) for request in requests]
    found = finish(engine)
    assert [tokens(found[number]) for number in numbers] == alone
    assert [len(each) for each in alone] == [request.sampling.max_new_tokens for request in requests]
    assert ("blocks" in config) == (engine.statistics().preemptions > 0)


def run_one(module: Decoder, request: Request) -> dict[int, list[Step]]:
    engine = engine_of(module)
    engine.add(request)
    return finish(engine)


def test_samples_of_one_prompt_share_it_and_differ(module):
    engine = engine_of(module, block_size=4)
    sampling = [Sampling(max_new_tokens=10, temperature=1.5, seed=seed) for seed in range(6)]
    numbers = [engine.add(Request(ids=list(range(1, 24)), sampling=each)) for each in sampling]
    first = engine.step()
    assert len(first) == 6  # all at once, from logits that were computed once
    assert engine.statistics().read == 23 and engine.statistics().shared == 5 * 23
    assert engine.statistics().blocks - engine.statistics().free == 6
    found = finish(engine)
    for step in first:
        found[step.request].insert(0, step)
    alone = [
        tokens(ask(engine_of(module), list(range(1, 24)), temperature=1.5, seed=i, max_new_tokens=10)) for i in range(6)
    ]
    assert [tokens(found[number]) for number in numbers] == alone
    assert len({tuple(each) for each in alone}) == 6


@torch.no_grad()
def test_logprobs_of_prompt_and_answer_are_the_models_own(module):
    ids = [5, 17, 3, 3, 88, 41, 9, 60, 2]
    for chunk in (512, 4, 1):
        engine = engine_of(module, chunk=chunk)
        ask(engine, ids)  # what could be found must be read again for its log-probabilities
        steps = ask(engine, ids, prompt_logprobs=True, top_logprobs=3, temperature=0.9, seed=4, max_new_tokens=4)
        whole = ids + tokens(steps)
        logprobs = module(torch.tensor([whole])).logits[0].log_softmax(-1)
        assert steps[0].prompt is not None and len(steps[0].prompt) == len(ids) and steps[0].prompt[0] == (None, ())
        assert all(step.prompt is None for step in steps[1:])
        for i, (value, top) in enumerate(steps[0].prompt[1:], 1):
            assert value == pytest.approx(logprobs[i - 1, ids[i]].item(), abs=1e-4)
            assert [token for token, _ in top] == logprobs[i - 1].topk(3).indices.tolist()
        for i, step in enumerate(steps, len(ids) - 1):
            assert step.logprob == pytest.approx(logprobs[i, step.token].item(), abs=1e-4)
            assert [value for _, value in step.top] == pytest.approx(logprobs[i].topk(3).values.tolist(), abs=1e-4)


def test_bias_bans_and_forces(module):
    ids = [4, 8, 15]
    free = tokens(ask(engine_of(module), ids, temperature=0.0))
    banned = ask(engine_of(module), ids, temperature=0.0, logit_bias=tuple((token, -1e4) for token in set(free)))
    assert not set(tokens(banned)) & set(free)
    assert banned[0].logprob < 0 and banned[0].token == next(
        token for token in logits_after(module, ids).argsort(descending=True).tolist() if token not in free
    )
    assert tokens(ask(engine_of(module), ids, seed=1, logit_bias=((42, 1e4),))) == [42] * 8


@pytest.mark.parametrize(("frequency", "presence"), [(0.0, 3.0), (1.5, 0.0), (0.7, -0.4)])
def test_penalties_are_openais(module, frequency, presence):
    """mu[j] − c[j]·frequency − (c[j] > 0)·presence over what was generated, the prompt not counted."""
    ids = [7, 7, 7]
    found = tokens(
        ask(
            engine_of(module),
            ids,
            temperature=0.0,
            max_new_tokens=20,
            frequency_penalty=frequency,
            presence_penalty=presence,
        )
    )
    counts = Counter[int]()
    for i, token in enumerate(found):
        logits = logits_after(module, ids + found[:i])
        for other, count in counts.items():
            logits[other] -= count * frequency + presence
        assert int(logits.argmax()) == token
        counts[token] += 1


def test_no_end_before_the_least_number_of_tokens(module):
    ids = [1, 2, 3]
    free = tokens(ask(engine_of(module), ids, temperature=0.0, max_new_tokens=12))
    end = free[0]
    assert len(ask(engine_of(module, (end,)), ids, temperature=0.0)) == 1
    for least in (1, 4, 12):
        steps = ask(engine_of(module, (end,)), ids, temperature=0.0, max_new_tokens=12, min_tokens=least)
        assert end not in tokens(steps)[:least] and len(steps) >= least
    asked: list[int] = []
    steps = ask(engine_of(module), ids, max_new_tokens=9, min_tokens=5, stop=lambda token: asked.append(token) or True)
    assert len(steps) == 1 and steps[-1].finish_reason == "stop" and asked == tokens(steps)  # whoever says so knows


def test_stop_strings_before_the_least_number_of_tokens_are_text():
    class Letters:
        def push(self, token: int) -> str:
            return chr(token)

        def finish(self) -> str:
            return ""

    text = StopStrings(Letters(), ["ab"], least=4)
    assert [text.push(ord(letter)) for letter in "ababab"] == [False] * 5 + [True]
    assert text.finish() == "abab"


def test_the_free_count_returns_whatever_happens(module):
    source, engine = random.Random(2), engine_of(module, block_size=4, blocks=24, max_batch=6, chunk=9)
    under_way: list[int] = []
    for request in drawn(60, source):
        under_way.append(engine.add(request))
        for _ in range(source.randrange(3)):
            engine.step()
        if source.random() < 0.3:
            engine.cancel(source.choice(under_way))  # running, waiting or finished
    finish(engine)
    statistics = engine.statistics()
    assert statistics.free == statistics.blocks == 24 and engine.waiting == engine.running == 0
    assert statistics.preemptions > 0 and statistics.evictions > 0


def test_what_is_cancelled_is_free_at_once_and_says_nothing_more(module):
    engine = engine_of(module, block_size=4, blocks=12)
    one, other = (engine.add(Request(ids=[i] * 9, sampling=Sampling(max_new_tokens=12))) for i in (1, 2))
    engine.step()
    held = engine.statistics().free
    engine.cancel(one)
    assert engine.statistics().free == held + 3
    engine.cancel(one)
    engine.cancel(12345)
    assert set(finish(engine)) == {other}
    engine.cancel(other)
    assert engine.statistics().free == 12


def test_a_listener_that_leaves_takes_its_requests_along(module):
    engine, sampling = engine_of(module), Sampling(max_new_tokens=9, seed=1)
    first, second = engine.steps([[1], [2]], [sampling] * 2), engine.steps([[3]], [sampling])
    found = [next(second).token, next(first).token, next(second).token, next(first).token]
    assert len(found) == 4 and engine.running == 3
    first.close()
    assert engine.running == 1
    rest = [step.token for step in second]
    alone = [step.token for step in engine_of(module).steps([[3]], [sampling])]
    assert [found[0], found[2], *rest] == alone and engine.idle


class BrokenError(Exception):
    """What a caller's own code raises."""


def breaking(at: int, error: type[BaseException] = BrokenError):
    """A `stop` that raises at its token number `at`."""
    asked: list[int] = []

    def stop(token: int) -> bool:
        asked.append(token)
        if len(asked) == at:
            raise error("no such luck")
        return False

    return stop


@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_breaks_one_request_ends_no_other(module, place):
    """Neither do others lose a token, wherever the broken one stands among them."""
    sampling = [Sampling(max_new_tokens=9, seed=i) for i in range(3)]
    alone = [tokens(ask(engine_of(module), [i + 1], max_new_tokens=9, seed=i)) for i in range(3)]
    engine = engine_of(module)
    for i, one in enumerate(sampling):
        stop = {"stop": breaking(4)} if i == place else {}
        engine.add(Request(ids=[i + 1], sampling=one, **stop))
    found: dict[int, list[Step]] = {i: [] for i in range(3)}
    broken: list[int] = []
    while not engine.idle:
        try:
            for step in engine.step():
                found[step.request].append(step)
        except RequestError as error:
            assert isinstance(error.cause, BrokenError)
            broken.append(error.request)
    assert broken == [place]
    assert found[place][-1].finish_reason == "error"
    for i in range(3):
        assert tokens(found[i]) == (alone[i][:4] if i == place else alone[i])
    assert engine.statistics().free == engine.statistics().blocks


def test_an_error_reaches_the_listener_it_belongs_to(module):
    engine, sampling = engine_of(module), Sampling(max_new_tokens=6, seed=1)
    alone = [step.token for step in engine_of(module).steps([[1]], [sampling])]
    stop = breaking(3)
    healthy, broken = (
        engine.steps([[1]], [sampling]),
        engine.steps([[2]], [sampling], lambda request, token: stop(token)),
    )
    found = [next(broken).token, next(healthy).token]
    assert [found[1], *(step.token for step in healthy)] == alone  # it steps the broken one, too
    with pytest.raises(BrokenError):
        list(broken)
    assert engine.idle and engine.statistics().free == engine.statistics().blocks


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_k": 5}, {"min_p": 0.1, "seed": 3}])
def test_logits_that_are_no_numbers_end_their_request_only(module, options):
    module, sampling = copy.deepcopy(module), Sampling(max_new_tokens=4, **options)
    with torch.no_grad():
        module.embedding.weight[7] = float("nan")
    engine = engine_of(module)
    broken, healthy = (engine.add(Request(ids=[token], sampling=sampling)) for token in (7, 1))
    with pytest.raises(RequestError, match=f"request {broken} of the engine: .*no finite numbers"):
        engine.step()
    found = finish(engine)
    assert broken not in found and len(found[healthy]) == 4


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("when", ["reading", "after reading", "choosing"])
def test_a_pass_that_breaks_off_is_made_up_for(module, recurrent, when, monkeypatch):
    """Ctrl-C at any place: who interrupts loses its own request only, all others get the tokens that they would."""
    module = rwkv.EXAMPLE.build().eval() if recurrent else module
    sampling = [Sampling(max_new_tokens=6, seed=i) for i in range(3)]
    alone = [[step.token for step in engine_of(module).steps([[i + 1]], [sampling[i]])] for i in range(3)]
    engine = engine_of(module)
    stops = [breaking(3, KeyboardInterrupt) if when == "choosing" and i == 1 else breaking(99) for i in range(3)]
    streams = [engine.steps([[i + 1]], [sampling[i]], lambda _, token, i=i: stops[i](token)) for i in range(3)]
    found = [[next(stream).token] for stream in streams]
    read = engine.reader.read

    def interrupted(pieces):
        monkeypatch.undo()
        if when == "after reading":
            read(pieces)
        raise KeyboardInterrupt

    if when != "choosing":
        monkeypatch.setattr(engine.reader, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        for step in streams[1]:
            found[1].append(step.token)
    for i in (0, 2):
        assert found[i] + [step.token for step in streams[i]] == alone[i]
    assert engine.idle and engine.statistics().free == engine.statistics().blocks


def test_higher_priorities_come_first_and_interrupt(module):
    engine = engine_of(module, max_batch=2, block_size=4, blocks=40)
    sampling = Sampling(max_new_tokens=6, temperature=0.0)
    low = [engine.add(Request(ids=[i, i], sampling=sampling, priority=-1)) for i in range(1, 4)]
    engine.step()
    high = engine.add(Request(ids=[9, 9], sampling=sampling, priority=5))
    order: list[int] = []
    while not engine.idle:
        order += [step.request for step in engine.step() if step.finish_reason]
    assert order == [low[0], high, low[1], low[2]]  # the younger of the two made room
    assert engine.statistics().preemptions == 1


def test_the_youngest_is_interrupted(module):
    engine = engine_of(module, block_size=2, blocks=20, share_prefixes=False)
    sampling = Sampling(max_new_tokens=12, temperature=0.0)
    numbers = [engine.add(Request(ids=[i] * 6, sampling=sampling)) for i in range(1, 4)]
    order: list[int] = []
    while not engine.idle:
        order += [step.request for step in engine.step() if step.finish_reason]
    assert order == numbers and engine.statistics().preemptions >= 1


def test_turns_are_shared_between_clients(module):
    """One who asks for much does not keep another waiting: of two that always have requests each is served as much."""
    engine = engine_of(module, max_batch=2, share_prefixes=False)
    sampling = Sampling(max_new_tokens=4)
    clients = {}
    for i in range(40):
        clients[engine.add(Request(ids=[i] * 8, sampling=sampling, client="many"))] = "many"
    for _ in range(5):
        engine.step()
    for i in range(6):
        clients[engine.add(Request(ids=[50 + i] * 8, sampling=sampling, client="few"))] = "few"
    order: list[str] = []
    while not engine.idle:
        order += [clients[step.request] for step in engine.step() if step.finish_reason]
    assert order.index("few") <= 4
    last = len(order) - 1 - order[::-1].index("few")
    assert order[: last + 1].count("many") <= 6 + 4


def test_a_client_that_comes_back_is_owed_nothing(module):
    """Else one who waited an hour would keep all others out for as long."""
    engine = engine_of(module, max_batch=1, share_prefixes=False)
    sampling = Sampling(max_new_tokens=2)
    for i in range(20):
        engine.add(Request(ids=[i] * 8, sampling=sampling, client="steady"))
    for _ in range(20):
        engine.step()
    later = {engine.add(Request(ids=[60 + i] * 8, sampling=sampling, client="late")) for i in range(10)}
    order: list[bool] = []
    while not engine.idle:
        order += [step.request in later for step in engine.step() if step.finish_reason]
    assert 3 <= sum(order[:10]) <= 7


@pytest.mark.parametrize("rank", [{"client": "other"}, {"client": "other", "priority": 1}])
def test_samples_of_one_prompt_do_not_pass_those_whose_turn_is_sooner(module, rank):
    engine = engine_of(module, max_batch=3, chunk=8)
    many = [
        engine.add(Request(ids=list(range(16)), sampling=Sampling(max_new_tokens=9, seed=i), client="many"))
        for i in range(4)
    ]
    assert engine.step() == []  # half of the prompt is read
    other = engine.add(Request(ids=[9] * 8, sampling=Sampling(max_new_tokens=9), **rank))
    assert [step.request for step in engine.step()] == many[:2]  # two of them, from one reading; a place is left
    assert engine.statistics().shared == 16 and engine.running == 2
    assert sorted(step.request for step in engine.step()) == [*many[:2], other]
    finish(engine)


def test_samples_of_one_prompt_are_charged_a_token_each(module):
    engine = engine_of(module, max_batch=4)
    for i in range(4):
        engine.add(Request(ids=list(range(8)), sampling=Sampling(max_new_tokens=9, seed=i), client="many"))
    engine.step()
    assert engine.running == 4 and engine._scheduler._served == {"many": 8 + 3}


def test_none_is_interrupted_where_that_makes_no_room(module):
    """Blocks that a lower priority shares with others do not become free with it."""
    engine, ids = engine_of(module, block_size=4, blocks=16), list(range(32))
    ask(engine, ids, max_new_tokens=1)  # to be found
    shared = {"sampling": Sampling(max_new_tokens=20), "client": "one"}
    engine.add(Request(ids=[*ids, 1], priority=1, **shared))
    low = engine.add(Request(ids=[*ids, 2], priority=0, **shared))
    engine.step()
    assert engine.running == 2 and engine.statistics().free == 6
    waits = engine.add(Request(ids=[7] * 28, sampling=Sampling(max_new_tokens=1), priority=1))
    told = {step.request for _ in range(3) for step in engine.step()}
    assert engine.statistics().preemptions == 0 and low in told and waits not in told
    engine.add(Request(ids=[8] * 8, sampling=Sampling(max_new_tokens=1), priority=2))
    assert len(finish(engine)) == 4 and engine.statistics().free == 16


def test_long_prompts_do_not_hold_up_those_that_run(module):
    engine = engine_of(module, chunk=8)
    running = engine.add(Request(ids=[1, 2], sampling=Sampling(max_new_tokens=20)))
    engine.step()
    engine.add(Request(ids=list(range(1, 81)), sampling=Sampling(max_new_tokens=1)))
    assert [[step.request for step in engine.step()] for _ in range(9)] == [[running]] * 9
    assert len(engine.step()) == 2


def test_prefixes_are_found_after_interruptions_and_forgotten_when_weights_change(module):
    engine = engine_of(module, block_size=4)
    ids = list(range(1, 33))
    ask(engine, ids)
    ask(engine, [*ids[:20], 99, 98])
    assert engine.statistics().shared == 20
    engine.forget()
    ask(engine, ids)
    assert engine.statistics().shared == 20 and engine.statistics().cached > 0
    unshared = engine_of(module, block_size=4, share_prefixes=False)
    ask(unshared, ids)
    ask(unshared, ids)
    assert unshared.statistics().shared == unshared.statistics().cached == 0


def test_eight_bits_say_nearly_the_same(module):
    """Log-probabilities move by the error of rounding and not more; tokens of this model stay."""
    ids = list(range(1, 41))
    exact = ask(engine_of(module), ids, temperature=0.0, max_new_tokens=10)
    rounded = ask(engine_of(module, kv8=True), ids, temperature=0.0, max_new_tokens=10)
    assert tokens(rounded) == tokens(exact)
    apart = max(abs(a.logprob - b.logprob) for a, b in zip(exact, rounded, strict=True))
    assert 0 < apart < 0.2, apart


def test_beams_leave_nothing_behind_and_say_when_there_is_no_room(module):
    engine = engine_of(module, block_size=4, blocks=24)
    best = beam_search(engine, list(range(1, 30)), beams=4, max_new_tokens=12)
    assert len(best) == 4 and engine.statistics().free == 24
    assert beam_search(engine_of(module), list(range(1, 30)), beams=4, max_new_tokens=12) == best
    with pytest.raises(InputError, match="all 10 blocks are in use"):
        beam_search(engine_of(module, block_size=4, blocks=10), list(range(1, 30)), beams=4, max_new_tokens=12)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"ids": []}, "prompt is empty"),
        ({"ids": [1, 101]}, "token 101 is none of the model's; they are 0 to 100"),
        ({"ids": [-1]}, "token -1"),
        ({"sampling": Sampling(max_new_tokens=0)}, "max_new_tokens=0"),
        ({"sampling": Sampling(max_new_tokens=95)}, "exceed the context of 96 by 1"),
        ({"sampling": Sampling(max_new_tokens=60)}, "take 16 blocks of 4, the cache has 12; raise blocks"),
        ({"sampling": Sampling(logit_bias=((500, 1.0),), max_new_tokens=1)}, "token 500"),
        ({"memory": Memory(torch.zeros(1, 2, 3))}, "reads none"),
    ],
)
def test_what_can_never_run_is_refused(module, fields, named):
    engine = engine_of(module, block_size=4, blocks=12)
    usual = {"ids": [1, 2], "sampling": Sampling(max_new_tokens=3)}
    with pytest.raises(InputError, match=named):
        engine.add(Request(**usual | fields))
    assert engine.idle and engine.step() == []


@pytest.mark.parametrize("name", ["block_size", "max_batch", "chunk", "blocks"])
def test_configurations_that_nothing_could_run_with_are_refused(name):
    with pytest.raises(InputError, match=f"{name}=0"):
        Engine.Config(**{name: 0})


def test_recurrent_models_read_together():
    engine = engine_of(rwkv.EXAMPLE.build().eval())
    for i in range(5):
        engine.add(Request(ids=[i + 1], sampling=Sampling(max_new_tokens=2)))
    assert len(engine.step()) == engine.running == 5


def test_states_and_keys_in_one_model():
    """A model of which some layers keep states and some keys has both blocks and slots."""
    torch.manual_seed(0)
    config = llama.EXAMPLE.replace(blocks=(*rwkv.EXAMPLE.blocks, *llama.EXAMPLE.blocks))
    module, source = config.build().eval(), random.Random(3)
    requests = [
        Request(ids=[source.randrange(53) for _ in range(1 + 3 * i)], sampling=Sampling(max_new_tokens=5, seed=i))
        for i in range(8)
    ]
    alone = [tokens(next(iter(run_one(module, request).values()))) for request in requests]
    for options in ({"chunk": 4, "block_size": 4}, {"block_size": 4, "blocks": 12}):
        engine = engine_of(module, **options)
        numbers = [engine.add(request) for request in requests]
        found = finish(engine)
        assert [tokens(found[number]) for number in numbers] == alone
        assert engine.statistics().free == engine.statistics().blocks
