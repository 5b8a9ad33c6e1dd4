"""Span corruption, splits, mixtures, their objectives and Adafactor."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from functools import partial

import pytest
import torch
import transformers
from torch import nn

from allyouneed.core.errors import InputError
from allyouneed.core.seeds import generator
from allyouneed.data.pairs import Mixture, apart, joined, rates
from allyouneed.data.spans import Spans, Splits, corrupt, counts, lengths, parts, spans
from allyouneed.models import llama, t5
from allyouneed.objectives.span import rest_given_prefix, target_given_source
from allyouneed.train.loop import Training, train
from allyouneed.train.optimizers import Adafactor
from allyouneed.train.schedules import Constant

TINY = t5.architecture(vocab_size=30, dim=8, num_layers=1, num_heads=2, head_dim=3, hidden_dim=7)
SMALL = llama.architecture(vocab_size=30, context=64, dim=8, num_layers=2, num_heads=2, hidden_dim=7)


def spanned(**changes: object) -> Spans:
    given = {"batch_size": 4, "length": 64, "collate": partial(apart, start=0), "sentinel": 999, "end": 1, "seed": 3}
    return Spans(torch.arange(100, 800), **(given | changes))


# Span corruption


@pytest.mark.parametrize(
    ("length", "expected"), [(512, (568, 512, 114)), (256, (284, 256, 58)), (64, (70, 64, 14)), (3, (2, 3, 3))]
)
def test_lengths(length, expected):
    """512 to 568 and 114 are what the authors' code prints; 0.15 · 568 = 85 tokens in 28 spans."""
    assert tuple(lengths(length)) == expected


@pytest.mark.parametrize("density", [0.1, 0.15, 0.25, 0.5])
@pytest.mark.parametrize("mean", [2.0, 3.0, 5.0, 10.0])
def test_every_source_is_exactly_as_long_as_asked(density, mean):
    g = generator(0)
    for length in (3, 4, 7, 20, 33, 128):
        found = lengths(length, density, mean)
        assert found.source == length
        ids = list(range(found.text))
        source, target = corrupt(ids, spans(found.text, density, mean, g), sentinel=10**6, end=-1)
        assert (len(source), len(target)) == (found.source, found.target)


def test_the_text_can_be_put_together_again():
    g = generator(1)
    for _ in range(50):
        ids = torch.randint(10, 800, (70,), generator=g).tolist()
        source, target = corrupt(ids, spans(70, 0.15, 3.0, g), sentinel=999, end=1)
        assert source.pop() == target.pop() == 1
        hidden: dict[int, list[int]] = {}
        for token in target:
            if token >= 900:
                hidden[token] = []
            else:
                hidden[list(hidden)[-1]].append(token)
        assert list(hidden) == list(range(999, 999 - len(hidden), -1))
        assert list(itertools.chain(*(hidden.get(token, [token]) for token in source))) == ids
        assert sum(map(len, hidden.values())) == counts(70)[0]


def test_spans_begin_with_what_stays_and_never_touch():
    g = generator(2)
    for _ in range(100):
        cut = spans(70, 0.15, 3.0, g)
        assert cut[0][0] > 0 and cut[-1][1] == 70  # as in the authors' code, a text ends with a span
        assert all(end < begin for (_, end), (begin, _) in itertools.pairwise(cut))


def test_all_ways_to_cut_are_equally_likely():
    """The 10 ways to cut 6 into 3 parts: Pearson's chi-squared with 9 degrees of freedom, 99.9 % quantile."""
    g, draws = generator(4), 5000
    seen = Counter(tuple(parts(6, 3, g)) for _ in range(draws))
    ways = [w for w in itertools.product(range(1, 5), repeat=3) if sum(w) == 6]
    assert set(seen) == set(ways) and len(ways) == 10
    assert sum((seen[w] - draws / 10) ** 2 / (draws / 10) for w in ways) < 27.9


def test_batches_of_spans_are_packed_and_go_on_where_they_were():
    batches = spanned()
    batch = next(batches)
    assert batch["source"].shape == (4, 64) and batch["ids"].shape == (4, 14)
    assert batch["source_segments"].min() == batch["segments"].min() == 1  # no padding at all
    assert (batch["source"][:, -1] == 1).all() and (batch["targets"][:, -1] == 1).all()
    assert (batch["ids"][:, 0] == 0).all() and torch.equal(batch["ids"][:, 1:], batch["targets"][:, :-1])
    state = batches.state_dict()
    following = next(batches)
    batches.load_state_dict(state)
    assert torch.equal(next(batches)["source"], following["source"])
    assert not torch.equal(following["source"], batch["source"])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"length": 1024}, "too short for windows"),
        ({"length": 512, "sentinels": 27}, "needs 28 sentinels, the vocabulary has 27"),
        ({"length": 2}, "length=2"),
        ({"density": 1.0}, "density=1.0"),
        ({"length": 32, "density": 0.5, "mean": 1.0}, "length=32: no text gives it"),
    ],
)
def test_what_cannot_be_cut(changes, named):
    with pytest.raises(InputError, match=named):
        spanned(**changes)


def test_splits_keep_every_token_once():
    batch = next(Splits(torch.arange(100, 300), batch_size=64, length=9, collate=joined, seed=0))
    assert batch["ids"].shape == (64, 9)
    assert (batch["ids"].diff() == 1).all()
    places = batch["prefix"].sum(1)
    assert set(places.tolist()) == set(range(1, 9))
    for row, place in enumerate(places.tolist()):
        wanted = [-100] * (place - 1) + batch["ids"][row, place:].tolist() + [-100]
        assert batch["targets"][row].tolist() == wanted


# Mixtures


def test_rates_are_the_papers():
    sizes = {"a": 10, "b": 1000, "c": 100_000}
    plain = rates(sizes)
    assert plain["b"] / plain["a"] == pytest.approx(100)
    assert rates(sizes, cap=1000) == pytest.approx({"a": 10 / 2010, "b": 1000 / 2010, "c": 1000 / 2010})
    warm = rates(sizes, cap=1000, temperature=2.0)
    assert warm["b"] / warm["a"] == pytest.approx(10)
    assert rates(sizes, temperature=1e9) == pytest.approx(dict.fromkeys(sizes, 1 / 3))
    for wrong in ({"a": 0}, {}):
        with pytest.raises(InputError, match="every task"):
            rates(wrong)
    with pytest.raises(InputError, match="must be positive"):
        rates(sizes, temperature=0.0)


def test_mixture_draws_by_its_rates():
    tasks = {"a": [([5], [n]) for n in range(10, 12)], "b": [([6], [n]) for n in range(20, 26)]}
    mixture = Mixture(tasks, batch_size=4000, collate=partial(apart, start=0), seed=0)
    batch = next(mixture)
    share = (batch["source"][:, 0] == 5).float().mean().item()
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    drawn = Counter(batch["targets"][:, 0].tolist())
    assert len(drawn) == 8 and min(drawn.values()) > 0.7 * 500
    assert set(zip(batch["source"][:, 0].tolist(), batch["targets"][:, 0].tolist(), strict=True)) == {
        (source[0], target[0]) for pairs in tasks.values() for source, target in pairs
    }


# Objectives

PAIRS = [([5, 6, 7, 2], [8, 9, 2]), ([11, 2], [12, 2]), ([13, 14, 15, 16, 2], [2])]


def test_target_given_source_is_the_sum_over_single_pairs():
    module = TINY.build().eval()
    whole = target_given_source(module, apart(PAIRS, start=0))
    assert whole.weight == 6
    total = 0.0
    for source, target in PAIRS:
        logp = module(torch.tensor([source]), torch.tensor([[0, *target[:-1]]])).logits.log_softmax(-1)[0]
        total -= sum(logp[i, token].item() for i, token in enumerate(target))
    assert whole.total.item() == pytest.approx(total, abs=1e-4)


def test_gradient_of_target_given_source_by_finite_differences():
    torch.manual_seed(0)
    module, batch = TINY.build().double(), apart(PAIRS, start=0)
    names = list(dict(module.named_parameters()))

    def mean(*values: torch.Tensor) -> torch.Tensor:
        state = dict(zip(names, values, strict=True))
        return target_given_source(
            lambda *ids, **segments: torch.func.functional_call(module, state, ids, segments), batch
        ).mean

    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert torch.autograd.gradcheck(mean, values, eps=1e-6, atol=1e-7, fast_mode=True)


class Named(nn.Module):
    """A module of which `rest_given_prefix` is the forward pass, for `functional_call`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return rest_given_prefix(self.module, batch).mean


def test_gradient_of_rest_given_prefix_by_finite_differences():
    torch.manual_seed(0)
    module, batch = Named(SMALL.build().double()), joined(PAIRS)
    names = list(dict(module.named_parameters()))

    def mean(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (batch,))

    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert torch.autograd.gradcheck(mean, values, eps=1e-6, atol=1e-7, fast_mode=True)


def test_a_prefix_is_seen_both_ways_and_only_the_prefix():
    """The mask written out in a naive float64 loop over who may see whom."""
    torch.manual_seed(0)
    module, batch = SMALL.build().double().eval(), joined(PAIRS)
    found = rest_given_prefix(module, batch).total
    total = 0.0
    for source, target in PAIRS:
        ids, place = torch.tensor([source + target]), len(source)
        seen = torch.tensor(
            [[k <= q or (q < place and k < place) for k in range(ids.shape[1])] for q in range(ids.shape[1])]
        )
        x = module.embedding(ids)
        turned = module.positions.rotation(torch.arange(ids.shape[1])[None])
        for block in module.blocks:
            h, mixer = block.mixer_norm(x), block.mixer
            q, k, v = (part(h).unflatten(-1, (2, 4)).transpose(1, 2) for part in (mixer.q, mixer.k, mixer.v))
            q, k = module.positions.turn(q, turned), module.positions.turn(k, turned)
            scores = (q @ k.transpose(-1, -2) / 2).masked_fill(~seen, float("-inf"))
            x = x + mixer.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            x = x + block.channel(block.channel_norm(x))
        logp = module.head(module.norm(x)).log_softmax(-1)[0]
        total -= sum(logp[place - 1 + i, token].item() for i, token in enumerate(target))
    assert found.item() == pytest.approx(total, rel=1e-9)
    causal = batch | {"prefix": torch.zeros_like(batch["prefix"])}
    assert abs(rest_given_prefix(module, causal).total.item() - total) > 1e-5


# Adafactor


def test_adafactor_is_the_papers():
    """Shazeer & Stern 2018, alg. 4 and 5, written out in float64."""
    module, g = nn.Linear(3, 2).double(), generator(0, "adafactor")
    optimizer = Adafactor.Config(lr=1e-2).build(module)
    rows, columns, whole = torch.zeros(2).double(), torch.zeros(3).double(), torch.zeros(2).double()
    weight, bias = (p.detach().clone() for p in (module.weight, module.bias))

    def root_mean_square(x: torch.Tensor) -> float:
        return x.square().mean().sqrt().item()

    def stepped(x: torch.Tensor, gradient: torch.Tensor, second: torch.Tensor, t: int) -> torch.Tensor:
        update = gradient / second.sqrt()
        update /= max(1.0, root_mean_square(update))
        return x - min(1e-2, t**-0.5) * max(1e-3, root_mean_square(x)) * update

    for t in range(1, 6):
        for p in (module.weight, module.bias):
            p.grad = torch.randn(p.shape, generator=g, dtype=p.dtype)
        beta, square = 1 - t**-0.8, module.weight.grad.square()
        rows, columns = beta * rows + (1 - beta) * square.mean(1), beta * columns + (1 - beta) * square.mean(0)
        whole = beta * whole + (1 - beta) * module.bias.grad.square()
        weight = stepped(weight, module.weight.grad, rows[:, None] * columns / rows.mean(), t)
        bias = stepped(bias, module.bias.grad, whole, t)
        optimizer.step()
    assert torch.allclose(module.weight, weight, atol=1e-12, rtol=0)
    assert torch.allclose(module.bias, bias, atol=1e-12, rtol=0)


def test_adafactor_is_transformers():
    ours, theirs = nn.Linear(5, 4), nn.Linear(5, 4)
    theirs.load_state_dict(ours.state_dict())
    optimizers = (
        Adafactor.Config(lr=1e-2).build(ours),
        transformers.Adafactor(theirs.parameters(), lr=1e-2, relative_step=False, scale_parameter=True),
    )
    for t in range(8):
        gradients = [torch.randn(p.shape, generator=generator(t, i)) for i, p in enumerate(ours.parameters())]
        for module, optimizer in zip((ours, theirs), optimizers, strict=True):
            for p, gradient in zip(module.parameters(), gradients, strict=True):
                p.grad = gradient.clone()
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_a_run_with_adafactor_goes_on_bit_for_bit(tmp_path):
    def run(steps: int, folder: object) -> nn.Module:
        torch.manual_seed(0)
        module = TINY.build()
        tasks = {"copy": [([a, b, 2], [a, b, 2]) for a in range(3, 9) for b in range(3, 9)]}
        batches = Mixture(tasks, batch_size=8, collate=partial(apart, start=0), seed=0)
        training = Training(steps=steps, optimizer=Adafactor.Config(lr=3e-2), schedule=Constant(), save_every=5)
        train(module, target_given_source, batches, training, folder=folder, quiet=True)
        return module

    whole = run(10, None)
    run(5, tmp_path)
    for p, q in zip(whole.parameters(), run(10, tmp_path).parameters(), strict=True):
        assert torch.equal(p, q) and p.isfinite().all()  # also where no gradient ever came: unused buckets
