"""Recurrent cells against torch's and against their equations in float64; layers and model along rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from allyouneed.core.config import Config
from allyouneed.core.errors import InputError
from allyouneed.data.batches import Windows
from allyouneed.models.recurrent import RecurrentModel
from allyouneed.nn.ffn import MLP
from allyouneed.nn.moe import Experts, MoE
from allyouneed.nn.noisy_routers import Hierarchical, NoisyTopK
from allyouneed.nn.norms import BatchNorm, LayerNorm, NoNorm, RMSNorm
from allyouneed.nn.recurrent import GRU, LSTM, Recurrent
from allyouneed.nn.sandwich import Sandwich
from allyouneed.objectives.balanced import balanced
from allyouneed.objectives.next_token import next_token
from allyouneed.train.loop import Training, train
from allyouneed.train.optimizers import AdamW

NORMS = {"layer": LayerNorm.Config(), "rms": RMSNorm.Config(), "batch": BatchNorm.Config(), "none": NoNorm.Config()}
CELLS = {"lstm": LSTM, "gru": GRU}


def randomised(module: nn.Module) -> nn.Module:
    """Every parameter random, so that none can hide."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
    return module


@torch.no_grad()
def test_an_lstm_without_norm_is_torchs() -> None:
    torch.manual_seed(0)
    ours, theirs = randomised(LSTM.Config().build(7, 5)), randomised(nn.LSTMCell(5, 7))
    ours.input.weight.copy_(theirs.weight_ih)
    ours.hidden.weight.copy_(theirs.weight_hh)
    ours.bias.copy_(theirs.bias_ih + theirs.bias_hh)
    state = expected = (torch.randn(3, 7), torch.randn(3, 7))
    for x in torch.randn(6, 3, 5):
        state, expected = ours(x, state), theirs(x, expected)
        for found, wanted in zip(state, expected, strict=True):
            assert (found - wanted).abs().max() <= 1e-6


@torch.no_grad()
def test_a_gru_without_norm_is_torchs() -> None:
    torch.manual_seed(0)
    ours, theirs = randomised(GRU.Config().build(7, 5)), randomised(nn.GRUCell(5, 7))
    ours.input.weight.copy_(theirs.weight_ih)
    ours.hidden.weight.copy_(theirs.weight_hh)
    ours.bias.copy_(theirs.bias_ih)
    ours.bias[:14] += theirs.bias_hh[:14]
    ours.candidate_bias.copy_(theirs.bias_hh[14:])
    expected = torch.randn(3, 7)
    state = (expected,)
    for x in torch.randn(6, 3, 5):
        state, expected = ours(x, state), theirs(x, expected)
        assert (state[0] - expected).abs().max() <= 1e-6


def normed(kind: str, part: nn.Module, rows: list[list[float]]) -> list[list[float]]:
    """A norm's equation, number by number."""
    if kind == "none":
        return rows
    gain, bias = part.weight.tolist(), part.bias.tolist() if kind != "rms" else [0.0] * len(rows[0])
    of = list(map(list, zip(*rows, strict=True))) if kind == "batch" else rows
    done = []
    for values in of:
        mean = 0.0 if kind == "rms" else sum(values) / len(values)
        scale = (sum((v - mean) ** 2 for v in values) / len(values) + (1e-6 if kind == "rms" else 1e-5)) ** 0.5
        done.append([(v - mean) / scale for v in values])
    done = list(map(list, zip(*done, strict=True))) if kind == "batch" else done
    return [[g * v + b for g, v, b in zip(gain, row, bias, strict=True)] for row in done]


def sigmoid(x: float) -> float:
    return 1 / (1 + torch.exp(torch.tensor(-x, dtype=torch.double)).item())


def tanh(x: float) -> float:
    return 2 * sigmoid(2 * x) - 1


def products(weight: torch.Tensor, rows: list[list[float]]) -> list[list[float]]:
    return [[sum(w * v for w, v in zip(line, row, strict=True)) for line in weight.tolist()] for row in rows]


@torch.no_grad()
@pytest.mark.parametrize("kind", NORMS)
def test_an_lstm_with_norm_is_its_equation_in_float64(kind: str) -> None:
    torch.manual_seed(1)
    cell, D = randomised(LSTM.Config(norm=NORMS[kind]).build(4, 3)).double(), 4
    x, h, c = torch.randn(5, 3).double(), torch.randn(5, 4).double(), torch.randn(5, 4).double()
    found = cell(x, (h, c))
    hidden = normed(kind, cell.hidden_norm, products(cell.hidden.weight, h.tolist()))
    given = normed(kind, cell.input_norm, products(cell.input.weight, x.tolist()))
    sums = [
        [a + b + e for a, b, e in zip(p, q, cell.bias.tolist(), strict=True)]
        for p, q in zip(hidden, given, strict=True)
    ]
    after = [
        [sigmoid(s[D + j]) * c[r, j].item() + sigmoid(s[j]) * tanh(s[2 * D + j]) for j in range(D)]
        for r, s in enumerate(sums)
    ]
    shown = normed(kind, cell.cell_norm, after)
    expected = [[sigmoid(s[3 * D + j]) * tanh(shown[r][j]) for j in range(D)] for r, s in enumerate(sums)]
    assert (found[1] - torch.tensor(after).double()).abs().max() <= 1e-6
    assert (found[0] - torch.tensor(expected).double()).abs().max() <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("kind", NORMS)
def test_a_gru_with_norm_is_its_equation_in_float64(kind: str) -> None:
    torch.manual_seed(2)
    cell, D = randomised(GRU.Config(norm=NORMS[kind]).build(4, 3)).double(), 4
    x, h = torch.randn(5, 3).double(), torch.randn(5, 4).double()
    found = cell(x, (h,))[0]
    p, q = products(cell.hidden.weight, h.tolist()), products(cell.input.weight, x.tolist())
    gates_h = normed(kind, cell.hidden_norm, [row[: 2 * D] for row in p])
    gates_x = normed(kind, cell.input_norm, [row[: 2 * D] for row in q])
    new_h = normed(kind, cell.candidate_hidden_norm, [row[2 * D :] for row in p])
    new_x = normed(kind, cell.candidate_input_norm, [row[2 * D :] for row in q])
    b, u = cell.bias.tolist(), cell.candidate_bias.tolist()
    for r in range(5):
        for j in range(D):
            reset = sigmoid(gates_h[r][j] + gates_x[r][j] + b[j])
            keep = sigmoid(gates_h[r][D + j] + gates_x[r][D + j] + b[D + j])
            new = tanh(new_x[r][j] + b[2 * D + j] + reset * (new_h[r][j] + u[j]))
            assert abs(found[r, j].item() - (keep * h[r, j].item() + (1 - keep) * new)) <= 1e-6


@torch.no_grad()
def test_batch_norm_is_torchs_in_training_and_after() -> None:
    torch.manual_seed(0)
    ours, theirs = BatchNorm.Config(momentum=0.2).build(6), nn.BatchNorm1d(6, momentum=0.2)
    for x in torch.randn(4, 10, 6) * 3 + 2:
        assert (ours(x.view(2, 5, 6)).view(10, 6) - theirs(x)).abs().max() <= 1e-6
    assert (ours.running_mean - theirs.running_mean).abs().max() <= 1e-6
    assert (ours.running_var - theirs.running_var).abs().max() <= 1e-6
    x = torch.randn(1, 6)
    assert (ours.eval()(x) - theirs.eval()(x)).abs().max() <= 1e-6


def test_batch_norm_of_one_row_is_refused_in_training_only() -> None:
    cell = LSTM.Config(norm=BatchNorm.Config(gain=0.1)).build(4)
    with pytest.raises(InputError, match="batch norm over 1 row: its variance is 0; use more rows"):
        cell(torch.randn(1, 4), cell.begin(1))
    assert cell.eval()(torch.randn(1, 4), cell.begin(1))[0].isfinite().all()
    assert cell.hidden_norm.weight.tolist() == [pytest.approx(0.1)] * 16


@torch.no_grad()
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
def test_layers_go_on_where_they_were_and_begin_anew_where_told(cell: str, norm: str) -> None:
    torch.manual_seed(0)
    layers = randomised(Recurrent.Config(cell=CELLS[cell].Config(norm=NORMS[norm]), num_layers=2).build(6)).double()
    x = torch.randn(3, 9, 6).double()
    whole, last = layers(x)
    first, states = layers(x[:, :4])
    rest, after = layers(x[:, 4:], states)
    assert (torch.cat((first, rest), 1) - whole).abs().max() <= 1e-12
    pairs = [pair for one, other in zip(last, after, strict=True) for pair in zip(one, other, strict=True)]
    assert all((a - b).abs().max() <= 1e-12 for a, b in pairs)
    begins = torch.zeros(3, 9, dtype=torch.bool)
    begins[1, 4] = True
    anew = layers(x, None, begins)[0]
    assert (anew[1, 4:] - layers(x[1:2, 4:])[0][0]).abs().max() <= 1e-12
    assert (anew[[0, 2]] - whole[[0, 2]]).abs().max() <= 1e-12 and (anew[1, 4:] - whole[1, 4:]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("cell", CELLS)
def test_the_model_keeps_rows_documents_and_the_future_apart(cell: str) -> None:
    torch.manual_seed(0)
    layers = Recurrent.Config(cell=CELLS[cell].Config(norm=LayerNorm.Config()), num_layers=2)
    model = randomised(RecurrentModel.Config(vocab_size=53, dim=8, layers=layers).build()).eval().double()
    assert Config.from_json(model.config.to_json()) == model.config
    assert model.config.num_parameters() == sum(p.numel() for p in model.parameters())
    ids = torch.randint(53, (2, 12))
    changed = ids.clone()
    changed[:, 7:] = torch.randint(53, (2, 5))
    logits = model(ids).logits
    assert (logits[:, :7] - model(changed).logits[:, :7]).abs().max() <= 1e-12
    assert (logits[:, 7:] - model(changed).logits[:, 7:]).abs().max() > 1e-3
    assert (logits[1:] - model(ids[1:]).logits).abs().max() <= 1e-12
    packed = torch.cat((torch.zeros(2).long(), ids[0], ids[1], torch.zeros(1).long()))[None]
    segments = torch.tensor([[0] * 2 + [1] * 12 + [2] * 12 + [0]])
    apart = model(packed, segments=segments).logits[0]
    assert (apart[2:14] - logits[0]).abs().max() <= 1e-12 and (apart[14:26] - logits[1]).abs().max() <= 1e-12


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("norm", NORMS)
def test_the_model_trains_in_the_loop_and_learns(cell: str, norm: str, tied: bool) -> None:
    torch.manual_seed(0)
    layers = Recurrent.Config(cell=CELLS[cell].Config(norm=NORMS[norm]), num_layers=2)
    model = RecurrentModel.Config(vocab_size=5, dim=16, layers=layers, tied=tied).build()
    assert (model.head.weight is model.embedding.weight) == tied
    begun = {name: p.detach().clone() for name, p in model.named_parameters()}
    batches = Windows(torch.arange(400) % 5, batch_size=32, length=8, seed=0)
    training = Training(steps=100, log_every=1).override("optimizer.lr=0.01", "schedule.warmup=0")
    done = train(model, next_token, batches, training, quiet=True)
    assert done.history[-1]["loss"] < 0.5 * done.history[0]["loss"]
    assert all(not torch.equal(begun[name], p) for name, p in model.named_parameters())


def test_no_layers_are_refused() -> None:
    with pytest.raises(InputError, match="num_layers=0; at least 1 is needed"):
        Recurrent.Config(cell=LSTM.Config(), num_layers=0).build(4)


def mixture(between: Config) -> RecurrentModel:
    torch.manual_seed(3)
    layers = Sandwich.Config(cell=LSTM.Config(), between=between, dropout=0.2)
    return randomised(RecurrentModel.Config(vocab_size=11, dim=8, layers=layers).build())


BETWEEN = {
    "network": MLP.Config(hidden_dim=12, activation="relu", bias=False),
    "experts": MoE.Config(router=NoisyTopK.Config(k=2), experts=Experts.Config(num_experts=4, hidden_dim=12)),
    "a hierarchy": MoE.Config(
        router=Hierarchical.Config(groups=2), experts=Experts.Config(num_experts=4, hidden_dim=12)
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", BETWEEN)
def test_a_sandwich_read_in_pieces_is_what_it_is_read_at_once(kind: str) -> None:
    model, ids = mixture(BETWEEN[kind]).eval(), torch.randint(11, (3, 9))
    states, pieces = None, []
    for piece in ids.split([4, 1, 4], 1):
        hidden, states = model.read(piece, states)
        pieces.append(hidden)
    assert (torch.cat(pieces, 1) - model.hidden(ids)).abs().max() <= 1e-6
    layers, x = model.layers, model.embedding(ids)
    x = x + layers.below(x)[0]
    x = x + torch.sigmoid(layers.between(x))
    assert (model.hidden(ids) - (x + layers.above(x)[0])).abs().max() <= 1e-6
    packed = torch.cat((ids[0], ids[1]))[None]
    segments = torch.tensor([[1] * 9 + [2] * 9])
    assert (model(packed, segments).logits[0, 9:] - model(ids[1:2]).logits[0]).abs().max() <= 1e-6


def test_a_sandwich_of_experts_learns() -> None:
    model = RecurrentModel.Config(
        vocab_size=8, dim=16, layers=Sandwich.Config(cell=LSTM.Config(), between=BETWEEN["experts"])
    ).build()
    batches = Windows(torch.arange(400) % 8, batch_size=4, length=12, seed=0)
    training = Training(steps=60, optimizer=AdamW.Config(lr=2e-2))
    trained = train(model, balanced(next_token, importance=0.1, load=0.1), batches, training, quiet=True)
    assert trained.history[-1]["objective"] < 0.5 * trained.history[0]["objective"]
    assert {"importance_loss", "load_loss", "busiest", "dropped"} <= set(trained.history[0])
