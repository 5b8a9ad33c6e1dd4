"""Mixtures of experts: routers and losses against their equations in float64, banks against a loop over experts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers.models.mixtral import modeling_mixtral
from transformers.models.switch_transformers import modeling_switch_transformers as theirs

from allyouneed.core.config import Config
from allyouneed.core.errors import InputError
from allyouneed.models import mixtral
from allyouneed.nn import grouped
from allyouneed.nn.capacity import Factor, PerRow, Unlimited, places
from allyouneed.nn.moe import Experts, GatedExperts, MoE, active_parameters
from allyouneed.nn.noisy_routers import Hierarchical, NoisyTopK, noisy_top_k
from allyouneed.nn.routers import Router, Top1, Top2, TopK
from allyouneed.nn.routing import Routing
from allyouneed.objectives.balanced import LOSSES, Tally, balanced, tallied
from allyouneed.objectives.loss import Loss
from allyouneed.objectives.next_token import next_token

ROUTERS = {
    "top k": TopK.Config(k=3),
    "one of all": TopK.Config(k=1),
    "all": TopK.Config(k=6),
    "top 1": Top1.Config(),
    "top 1, half the room": Top1.Config(capacity=Factor(factor=0.5)),
    "top 2": Top2.Config(),
    "two places a row": Top2.Config(capacity=PerRow(places=2)),
    "noisy": NoisyTopK.Config(k=2),
    "hierarchical": Hierarchical.Config(groups=3, k=2),
}


def layer(router: Config, experts: type[Experts] = GatedExperts, **changes: object) -> MoE:
    """Six experts in float64, every parameter random."""
    torch.manual_seed(0)
    sizes = {"num_experts": 6, "hidden_dim": 20} | changes
    module = MoE.Config(router=router, experts=experts.Config(**sizes)).build(16).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def answered(module: nn.Module, x: Tensor) -> tuple[Tensor, Routing]:
    """What the layer gives and how its router routed."""
    heard: list[Routing] = []
    hook = module.router.register_forward_hook(lambda part, given, routing: heard.append(routing))
    y = module(x)
    hook.remove()
    return y, heard[0]


def dense_loop(module: MoE, x: Tensor, routing: Routing) -> Tensor:
    """Every expert computes every token; what the gates leave out counts nothing."""
    flat, y = x.flatten(0, -2), torch.zeros_like(x.flatten(0, -2))
    for e in range(module.experts.num_experts):
        firsts = [flat @ module.experts.get_submodule(name).weight[e].t() for name in module.experts.first]
        out = module.experts.middle(*firsts) @ module.experts.out.weight[e].t()
        y = y + out * (routing.gates * (routing.experts == e)).sum(-1, keepdim=True)
    return y.view_as(x)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max().item() <= tolerance


@pytest.mark.parametrize("bank", [Experts, GatedExperts])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ROUTERS)
def test_grouped_is_a_dense_loop_gradients_included(name, bank, training, monkeypatch):
    monkeypatch.setattr(grouped, "PIECE", 4)  # so that runs have several pieces
    module = layer(ROUTERS[name], bank).train(training)
    x = torch.randn(3, 11, 16, dtype=torch.double, requires_grad=True)
    y, routing = answered(module, x)
    expected = dense_loop(module, x, routing)
    close(y, expected)
    told = torch.randn_like(y)
    learned = [p for p in (x, *module.parameters()) if p.requires_grad]
    ours = torch.autograd.grad(y, learned, told, retain_graph=True, allow_unused=True)
    slow = torch.autograd.grad(expected, learned, told, allow_unused=True)
    for a, b in zip(ours, slow, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b)
    with torch.no_grad():
        torch.manual_seed(1)
        kept = module(x)
        torch.manual_seed(1)
    close(kept, module(x))


def test_float32_is_a_dense_loop_and_so_is_the_grouped_product():
    module = layer(TopK.Config(), num_experts=8, hidden_dim=64).float()
    x = torch.randn(2, 40, 16, requires_grad=True)
    y, routing = answered(module, x)
    close(y, dense_loop(module, x, routing), 1e-5)
    bank, order = module.experts, grouped.Order.by_expert(routing.experts, routing.kept, 8)
    ends = order.counts.cumsum(0).tolist()
    ups = [bank.gate.weight, bank.up.weight]
    by_product = grouped.by_grouped_product(
        order.spread(x.flatten(0, 1)), ends, bank._hidden, ups, bank.out.weight, None
    )
    close(order.gather(by_product, routing.gates).view_as(y), y, 1e-5)
    told = torch.randn_like(by_product)
    ours = grouped.feed_forward(
        order.spread(x.flatten(0, 1)), order.counts.tolist(), bank._hidden, ups, bank.out.weight
    )
    for a, b in zip(*(torch.autograd.grad(o, [x, *bank.parameters()], told) for o in (ours, by_product)), strict=True):
        close(a, b, 1e-5)


def test_mixtral_block_of_transformers():
    from transformers import MixtralConfig

    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_local_experts": 6, "num_experts_per_tok": 2}
    block = modeling_mixtral.MixtralSparseMoeBlock(MixtralConfig(**sizes, experts_implementation="eager"))
    module = layer(TopK.Config()).float()
    with torch.no_grad():
        block.gate.weight.copy_(module.router.weight)
        block.experts.gate_up_proj.copy_(torch.cat((module.experts.gate.weight, module.experts.up.weight), 1))
        block.experts.down_proj.copy_(module.experts.out.weight)
    x = torch.randn(3, 50, 16)
    close(module(x), block(x), 1e-5)


def test_dropout_of_the_hidden_layer_is_that_of_the_backward_pass():
    module = layer(TopK.Config(), dropout=0.4)
    x = torch.randn(2, 9, 16, dtype=torch.double, requires_grad=True)

    def again(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return module(x)

    assert torch.autograd.gradcheck(again, (x,))
    assert (again(x) - module.eval()(x)).abs().max() > 1e-3


# Routers and losses


def by_hand(noisy: list[float], clean: list[float], deviation: list[float], k: int) -> list[float]:
    """P(x, i), number by number (Shazeer et al. 2017, eq. 8 and 9)."""
    found = []
    for i, (mean, spread) in enumerate(zip(clean, deviation, strict=True)):
        others = sorted((h for j, h in enumerate(noisy) if j != i), reverse=True)
        found.append(0.5 * (1 + math.erf((mean - others[k - 1]) / spread / math.sqrt(2))))
    return found


@pytest.mark.parametrize("k", [1, 2, 4])
def test_noisy_top_k_is_its_equations(k):
    torch.manual_seed(0)
    router = NoisyTopK.Config(k=k).build(dim=7, num_experts=5).double()
    assert not router.weight.any() and not router.noise.any()  # no signal and some noise
    for parameter in router.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(1, 30, 7, dtype=torch.double)
    torch.manual_seed(4)
    routing = router(x)
    torch.manual_seed(4)
    clean = x[0] @ router.weight.t()
    deviation = (x[0] @ router.noise.t()).exp().log1p()
    noisy = clean + torch.randn_like(clean) * deviation
    load, importance = torch.zeros(5).double(), torch.zeros(5).double()
    for token in range(30):
        best = noisy[token].argsort(descending=True)[:k]
        assert sorted(routing.experts[token].tolist()) == sorted(best.tolist())
        gates = torch.zeros(5).double()
        gates[best] = noisy[token, best].softmax(-1)
        importance += gates
        load += torch.tensor(
            by_hand(noisy[token].tolist(), clean[token].tolist(), deviation[token].tolist(), k)
        ).double()
    close(routing.load, load, 1e-6)
    close(routing.importance, importance, 1e-6)
    tally = Tally.of(routing)
    for name, values in (("load", load), ("importance", importance)):
        cv = values.std(correction=0) / values.mean()
        close(LOSSES[name](tally), cv**2, 1e-6)


def test_load_is_the_mean_count_over_noise():
    """What the paper's estimator estimates: the count that noise drawn again and again would give."""
    torch.manual_seed(0)
    clean, deviation = torch.randn(1, 6).double(), torch.rand(1, 6).double() + 0.2
    many, spread = clean.expand(200_000, 6), deviation.expand(200_000, 6)
    _, experts, chances = noisy_top_k(many, spread, 2)
    counted = torch.bincount(experts.flatten(), minlength=6) / len(many)
    assert (chances.mean(0) - counted).abs().max() < 0.01


def test_load_has_a_gradient_though_counts_have_none():
    router = NoisyTopK.Config(k=2).build(dim=7, num_experts=5)
    nn.init.normal_(router.weight)
    LOSSES["load"](Tally.of(router(torch.randn(1, 30, 7)))).backward()
    assert router.weight.grad.abs().max() > 1e-4 and router.noise.grad.abs().max() > 1e-5


def test_noise_that_vanishes_gives_counts_and_no_nan():
    clean = torch.randn(40, 5, requires_grad=True)
    deviation = torch.full((40, 5), -200.0, requires_grad=True)
    _, experts, chances = noisy_top_k(clean, nn.functional.softplus(deviation), 2)
    close(chances.sum(0), torch.bincount(experts.flatten(), minlength=5).float(), 1e-6)
    chances.square().sum().backward()
    assert clean.grad.isfinite().all() and deviation.grad.isfinite().all()


def test_a_hierarchy_is_its_equations():
    torch.manual_seed(0)
    router = Hierarchical.Config(groups=3, k=2).build(dim=7, num_experts=12).double()
    for parameter in router.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 20, 7, dtype=torch.double)
    routing = router.eval()(x)
    first = (x.flatten(0, 1) @ router.primary.weight.t()).topk(2)
    dense = torch.zeros(40, 12).double().scatter(1, routing.experts, routing.gates)
    for token in range(40):
        expected = torch.zeros(12).double()
        for gate, group in zip(first.values[token].softmax(-1), first.indices[token].tolist(), strict=True):
            mine = x.flatten(0, 1)[token] @ router.weight[4 * group : 4 * group + 4].t()
            best = mine.topk(2)
            expected[4 * group + best.indices] = gate * best.values.softmax(-1)
        close(dense[token], expected)
    close(routing.importance, dense.sum(0))
    # in training: Load_primary(X)_i · Load_i(X⁽ⁱ⁾)_j / |X⁽ⁱ⁾|
    torch.manual_seed(5)
    load = router.train()(x).load
    torch.manual_seed(5)
    primary = router.primary.choose(x.flatten(0, 1))
    mine = (primary.experts == 0).any(-1)
    second = router.among(x.flatten(0, 1)[mine], slice(0, 4), 2)
    close(load[:4], primary.load[0] * second.load / mine.sum(), 1e-6)


def test_switch_and_z_losses_are_those_of_transformers():
    torch.manual_seed(0)
    x = torch.randn(1, 64, 16)
    router = Top1.Config(capacity=Unlimited()).build(dim=16, num_experts=6).eval()
    nn.init.normal_(router.weight)
    routing = router(x)
    tally, probabilities = Tally.of(routing), routing.logits.softmax(-1)[None]
    close(LOSSES["switch"](tally), theirs.load_balancing_loss_func(probabilities, routing.experts.view(1, 64)), 1e-6)
    close(LOSSES["z"](tally), theirs.router_z_loss_func(routing.logits[None]), 1e-5)
    f = torch.bincount(routing.experts.flatten(), minlength=6).double() / 64
    close(LOSSES["switch"](tally).double(), 6 * (f * probabilities[0].double().mean(0)).sum(), 1e-6)


def test_switch_loss_of_two_choices_is_that_of_mixtral():
    router = TopK.Config(k=2).build(dim=16, num_experts=6)
    nn.init.normal_(router.weight)
    routing = router(torch.randn(4, 32, 16))
    expected = modeling_mixtral.load_balancing_loss_func((routing.logits,), num_experts=6, top_k=2)
    close(LOSSES["switch"](Tally.of(routing)), expected, 1e-6)


def test_gshard_is_its_algorithm():
    """Algorithm 1, line by line, with its random second choice counted."""
    torch.manual_seed(0)
    router = Top2.Config(capacity=Factor(factor=0.6)).build(dim=16, num_experts=6).double()
    nn.init.normal_(router.weight)
    x = torch.randn(1, 50, 16, dtype=torch.double)
    torch.manual_seed(1)
    routing = router(x)
    torch.manual_seed(1)
    gates = (x[0] @ router.weight.t()).softmax(-1)
    chance, room = torch.rand_like(gates[:, 0]), math.ceil(0.6 * 100 / 6)
    taken, expected = [0] * 6, torch.zeros(50, 6).double()
    for choice in (0, 1):
        for token in range(50):
            (g1, g2), (e1, e2) = (found.tolist() for found in gates[token].topk(2))
            expert, gate = ((e1, g1 / (g1 + g2)), (e2, g2 / (g1 + g2)))[choice]
            if choice and not 2 * gate > chance[token]:
                continue
            if taken[expert] < room:
                expected[token, expert] = gate
            taken[expert] += 1
    close(torch.zeros(50, 6).double().scatter(1, routing.experts, routing.gates), expected)
    assert routing.dropped == sum(max(0, n - room) for n in taken) > 0
    counts = torch.bincount(gates.argmax(-1), minlength=6).double()
    close(LOSSES["gshard"](Tally.of(routing)), (counts / 50 * gates.mean(0)).sum() / 6)


def test_jitter_and_chance_are_of_training_only():
    for config in (Top1.Config(), Top2.Config(), NoisyTopK.Config(k=2)):
        router = config.build(dim=16, num_experts=6)
        for parameter in router.parameters():
            nn.init.normal_(parameter)
        x = torch.randn(1, 64, 16)
        assert torch.equal(router.eval()(x).gates, router(x).gates)
        assert not torch.equal(router.train()(x).gates, router(x).gates)


def test_routers_compute_in_float32():
    router = Top1.Config().build(dim=16, num_experts=6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert router(torch.randn(1, 5, 16).bfloat16()).logits.dtype == torch.float32


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("bank", [Experts, GatedExperts])
def test_banks_compute_in_what_autocast_says(bank, dropout):
    module = layer(TopK.Config(), bank, dropout=dropout).float()
    x = torch.randn(2, 30, 16, requires_grad=True)
    torch.manual_seed(3)
    expected = module(x)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert (y - expected).abs().max() <= 0.05 * expected.abs().max()
    y.float().square().sum().backward()
    for parameter in module.parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all() and parameter.grad.any()


# Capacity


@pytest.mark.parametrize("firsts_first", [True, False])
def test_places_go_to_first_choices_or_to_earlier_tokens(firsts_first):
    torch.manual_seed(0)
    experts = torch.rand(40, 5).topk(2).indices
    asked = torch.rand(40, 2) < 0.8
    taken, found = [0] * 5, places(experts, asked, 5, firsts_first=firsts_first)
    pairs = [(token, choice) for token in range(40) for choice in range(2)]
    for token, choice in sorted(pairs, key=lambda pair: pair[::-1]) if firsts_first else pairs:
        if asked[token, choice]:
            assert found[token, choice] == taken[experts[token, choice]]
            taken[experts[token, choice]] += 1


LIMITS = [PerRow(places=2), PerRow(places=1), Factor(factor=0.5, evaluation=0.5)]


@pytest.mark.parametrize("capacity", LIMITS, ids=str)
@pytest.mark.parametrize("name", ["top k", "top 1", "top 2", "noisy", "hierarchical"])
def test_in_evaluation_no_token_changes_an_earlier_one(name, capacity):
    module, dropped = layer(ROUTERS[name].replace(capacity=capacity)).eval(), 0
    for _ in range(20):
        x = torch.randn(1, 6, 16, dtype=torch.double)
        y, routing = answered(module, x)
        dropped += routing.dropped
        for since in range(1, 6):
            changed = x.clone()
            changed[:, since:] = torch.randn_like(x[:, since:])
            close(module(changed)[:, :since], y[:, :since])
    assert dropped > 0


def test_nothing_is_dropped_in_evaluation_unless_asked_for():
    x = torch.randn(2, 40, 16)
    for evaluation, expected in ((None, 0), (0.25, 80 - 6 * math.ceil(0.25 * 80 / 6))):
        router = Top1.Config(capacity=Factor(factor=0.25, evaluation=evaluation)).build(dim=16, num_experts=6)
        nn.init.normal_(router.weight)
        assert router(x).dropped > 0
        assert (router.eval()(x).dropped > 0) == (expected > 0)


def test_a_row_does_not_take_the_places_of_another():
    router = Top1.Config(capacity=PerRow(places=3)).build(dim=16, num_experts=6).eval()
    nn.init.normal_(router.weight)
    x = torch.randn(4, 20, 16)
    together = router(x).kept.view(4, 20)
    assert not together.all()
    for row in range(4):
        assert torch.equal(router(x[row : row + 1]).kept[:, 0], together[row])


# The objective


def test_balanced_adds_weighted_losses_and_metrics():
    torch.manual_seed(0)
    model, ids = mixtral.EXAMPLE.build(), torch.randint(53, (3, 17))
    batch = {"ids": ids[:, :-1], "targets": ids[:, 1:]}
    plain, loss = next_token(model, batch), balanced(next_token, switch=0.5, z=0.25)(model, batch)
    with tallied(model) as tallies:
        model(batch["ids"])
    assert len(tallies) == 2
    extra = sum(0.5 * LOSSES["switch"](t) + 0.25 * LOSSES["z"](t) for t in tallies)
    close(loss.mean, plain.mean + extra, 1e-5)
    shares = torch.stack([t.counts.max() / t.counts.sum() for t in tallies])
    close(loss.metrics["busiest"] / loss.weight, shares.mean(), 1e-6)
    loss.total.backward()
    assert not any(part._forward_hooks for part in model.modules())


def test_losses_of_balance_are_refused_where_they_mean_nothing():
    with pytest.raises(InputError, match="did you mean 'switch'"):
        balanced(next_token, swich=0.1)
    from allyouneed.models import llama

    ids = torch.randint(53, (1, 9))
    with pytest.raises(InputError, match="has none"):
        balanced(next_token, z=0.1)(llama.EXAMPLE.build(), {"ids": ids, "targets": ids})
    tally = Tally.of(Hierarchical.Config(groups=3).build(8, 12)(torch.randn(1, 9, 8)))
    for name in ("switch", "gshard"):
        with pytest.raises(InputError, match="hierarchical"):
            LOSSES[name](tally)


@pytest.mark.parametrize("loss", ["importance", "load"])
@pytest.mark.parametrize("name", [*ROUTERS, "noisy, one"])
def test_a_loss_that_moves_no_router_is_refused_in_training(name, loss):
    """By what autograd finds."""
    module = layer(NoisyTopK.Config(k=1) if name == "noisy, one" else ROUTERS[name])
    x = torch.randn(2, 40, 16, dtype=torch.double)

    def plain(module: MoE, batch: dict[str, Tensor]) -> Loss:
        return Loss(0.0 * module(batch["x"]).sum(), torch.tensor(80.0))

    value = LOSSES[loss](Tally.of(module.router(x)))
    parameters = list(module.router.parameters())
    slopes = torch.autograd.grad(value, parameters, allow_unused=True) if value.requires_grad else ()
    if any(slope is not None and slope.abs().max() > 1e-9 for slope in slopes):
        assert balanced(plain, **{loss: 1.0})(module, {"x": x}).total.requires_grad
        return
    with pytest.raises(InputError, match=rf"the {loss} loss gives {type(module.router).__name__} .* no gradient"):
        balanced(plain, **{loss: 1.0})(module, {"x": x})
    balanced(plain, **{loss: 0.0})(module, {"x": x})
    balanced(plain, **{loss: 1.0})(module.eval(), {"x": x})
    with torch.no_grad():
        assert balanced(plain, **{loss: 1.0})(module.train(), {"x": x}).total.isfinite()


@pytest.mark.parametrize("weights", [{"switch": 1.0}, {"importance": 1.0}, {"importance": 1.0, "load": 1.0}])
def test_the_losses_balance_a_router_that_begins_unbalanced(weights):
    torch.manual_seed(0)
    router = NoisyTopK.Config(k=2).build(dim=8, num_experts=6)  # with one choice all gates are 1, whatever the router
    nn.init.normal_(router.weight, std=0.3)
    with torch.no_grad():
        router.weight[0] += 2.0
    optimiser = torch.optim.Adam(router.parameters(), lr=0.02)
    x = torch.randn(1, 256, 8) + 0.5

    def share() -> float:
        return Tally.of(router.eval()(x)).busiest.item()

    before = share()
    for _ in range(200):
        optimiser.zero_grad()
        tally = Tally.of(router.train()(x))
        sum(weight * LOSSES[name](tally) for name, weight in weights.items()).backward()
        optimiser.step()
    assert before > 0.4 and share() < 0.25  # of at most 1/2, and at least 1/6


# What is refused


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ROUTERS)
def test_logits_that_are_not_finite(name, value):
    """Those of a token, then those that a broken number in any matrix of the router gives to some of many."""
    module, x = layer(ROUTERS[name]).float(), torch.randn(1, 5, 16)
    x[0, 2] = value
    with pytest.raises(InputError, match=r"the router's logits are not finite for 1 tokens; lower the learning rate"):
        module(x)
    for part, _ in module.router.named_parameters():
        module = layer(ROUTERS[name]).float()
        with torch.no_grad():
            module.router.get_parameter(part)[1, 3] = value
        with pytest.raises(InputError, match=r"the router's logits are not finite for \d+ tokens"):
            module(torch.randn(2, 40, 16))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TopK.Config(k=7).build(8, 6), "k=7 of num_experts=6; 1 to 6 can be chosen"),
        (lambda: TopK.Config(k=0).build(8, 6), "k=0 of num_experts=6"),
        (lambda: Top2.Config().build(8, 1), "k=2 of num_experts=1"),
        (lambda: Hierarchical.Config(groups=4).build(8, 6), "groups=4 does not divide num_experts=6"),
        (lambda: Hierarchical.Config(groups=4, k=3).build(8, 8), "4 groups of 2 experts"),
        (lambda: Factor(factor=0.0), "capacity factor=0.0; it must be above 0"),
        (lambda: Factor(evaluation=float("nan")), "capacity evaluation=nan"),
        (lambda: PerRow(places=0), "places=0; each expert needs at least 1"),
        (lambda: Experts.Config(num_experts=0, hidden_dim=4).build(8), "num_experts=0"),
        (lambda: Experts.Config(num_experts=2, hidden_dim=4, activation="rellu").build(8), "did you mean 'relu'"),
    ],
)
def test_sizes_that_make_no_sense(build, message):
    with pytest.raises(InputError, match=message):
        build()


def test_every_router_is_a_part():
    for config in ROUTERS.values():
        assert Config.from_json(config.to_json()) == config
        assert isinstance(config.build(dim=16, num_experts=6), Router)


def test_active_parameters_count_the_experts_a_token_passes():
    model = mixtral.EXAMPLE.build()
    bank = sum(p.numel() for p in model.blocks[0].channel.experts.parameters())
    assert active_parameters(model) == sum(p.numel() for p in model.parameters()) - 2 * (bank - bank * 2 // 5)
