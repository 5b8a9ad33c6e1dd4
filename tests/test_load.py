"""Open-loop load: arrivals, who is let in when, and that what is measured is what the engine did."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from allyouneed.evaluate.load import Arrival, Static, continuous, poisson, serve
from allyouneed.evaluate.loads import Alike, Interrupted, Mixed, Text, asked
from allyouneed.generate.engine import Engine
from allyouneed.generate.requests import Step
from allyouneed.models import llama


class Recorded(Engine):
    """An engine that remembers how many ran whenever one was added."""

    beside: list[int]

    def add(self, request) -> int:
        self.beside.append(self.running)
        return super().add(request)


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return llama.EXAMPLE.build().eval()


def engine(module) -> Recorded:
    made = Recorded(module, config=Engine.Config(max_batch=3))
    made.beside = []
    return made


def alone(module, ids, answer) -> list[int]:
    steps: list[Step] = [*Engine(module).steps([ids], [asked(ids, answer).sampling])]
    return [step.token for step in steps]


LENGTHS = [(3, 9), (5, 1), (2, 4), (7, 2), (1, 6), (4, 3), (6, 5)]


def arrivals(at=0.0) -> list[Arrival]:
    return [Arrival(i * at, asked(range(1, 1 + n), answer)) for i, (n, answer) in enumerate(LENGTHS)]


@pytest.mark.parametrize("admits", [continuous, Static(3)], ids=["continuous", "static"])
def test_answers_are_those_of_requests_alone(module, admits):
    served = serve(engine(module), arrivals(), admits)
    assert [list(one.tokens) for one in served] == [alone(module, list(range(1, 1 + n)), a) for n, a in LENGTHS]
    for one, (_, answer) in zip(served, LENGTHS, strict=True):
        assert len(one.times) == answer and list(one.times) == sorted(one.times)
        assert 0 < one.first <= one.whole and len(one.pauses) == answer - 1


def test_a_static_batch_is_joined_by_nobody(module):
    made = engine(module)
    serve(made, arrivals(), Static(3))
    assert made.beside == [0] * len(LENGTHS)


def test_requests_join_a_continuous_batch(module):
    made = engine(module)
    serve(made, arrivals(at=1e-4), continuous)
    assert len(made.beside) == len(LENGTHS) and made.idle


def test_nobody_is_served_before_he_comes(module):
    served = serve(engine(module), arrivals(at=0.03), continuous)
    assert all(one.first > 0 for one in served)
    assert [one.arrived for one in served] == pytest.approx([0.03 * i for i in range(len(LENGTHS))])


def test_arrivals_are_poisson():
    gaps = np.diff([a.at for a in poisson([asked([1], 1)] * 20_000, 4.0, seed=1)])
    assert gaps.mean() == pytest.approx(0.25, rel=0.03) and gaps.std() == pytest.approx(0.25, rel=0.03)


def text() -> Text:
    source = np.random.default_rng(0)
    paragraphs = tuple(source.integers(1, 50, size=int(n)).tolist() for n in source.integers(2, 40, size=60))
    return Text([token for one in paragraphs for token in one], paragraphs, None)  # type: ignore[arg-type]


def test_loads_are_what_they_say():
    given = text()
    alike = Alike(requests=5, common=24).arrivals(given, 0)
    assert len({tuple(a.request.ids[:24]) for a in alike}) == 1 and len({tuple(a.request.ids) for a in alike}) == 5
    mixed = Mixed(requests=50, rate=2.0, longest=16).arrivals(given, 0)
    assert {a.request.sampling.max_new_tokens for a in mixed} <= set(range(1, 17))
    assert mixed[-1].at > 0 and all(a.request.sampling.ignore_eos for a in mixed)
    long = Interrupted(streams=2, answer=9, prompts=3, length=30, every=0.5).arrivals(given, 0)
    assert [a.at for a in long] == [0, 0, 0.5, 1.0, 1.5] and [len(a.request.ids) for a in long[2:]] == [30] * 3


def test_loads_differ_by_seed_alone():
    given, load = text(), Mixed(requests=8)
    one, again, other = (load.arrivals(given, seed) for seed in (0, 0, 1))
    ids = [[list(a.request.ids) for a in x] for x in (one, again, other)]
    assert ids[0] == ids[1] != ids[2]
