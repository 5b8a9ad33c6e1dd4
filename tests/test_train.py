"""The parts of training and the loop in one process, against closed forms, torch's own and a loop by hand."""

from __future__ import annotations

import math
import os
import pty
import signal
import sys
import threading
import types
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_run import At, Tiny, batches, counting, run, same, settings, tiny, untimed
from torch import Tensor, nn

from allyouneed.cli import main
from allyouneed.core.errors import InputError
from allyouneed.core.metrics import read
from allyouneed.core.seeds import generator
from allyouneed.objectives.loss import Loss
from allyouneed.objectives.next_token import next_token
from allyouneed.train.averages import Ema
from allyouneed.train.gradients import differentiate
from allyouneed.train.interrupts import Stopped, watched
from allyouneed.train.loop import Training
from allyouneed.train.optimizers import AdamW, decay_groups
from allyouneed.train.ranks import Ranks
from allyouneed.train.schedules import Constant, Cosine, InverseSquareRoot, Linear
from allyouneed.train.trackers import TensorBoard, Trackio

ALONE = Ranks()


# Schedules


def test_inverse_square_root_is_the_transformers():
    d, warmup = 512, 4000
    ours = InverseSquareRoot(warmup=warmup)
    for t in (1, 2, 1999, 3999, 4000, 4001, 100_000):
        theirs = d**-0.5 * min(t**-0.5, t * warmup**-1.5)  # Vaswani et al. 2017, eq. 3
        assert (d * warmup) ** -0.5 * ours(t, 100_000) == pytest.approx(theirs, rel=1e-12)


def rates_of_torch(make: Any, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Cosine(floor=0.1), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=40, eta_min=0.1)),
        (Linear(floor=0.2), lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.2, total_iters=40)),
        (Constant(), lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)),
    ],
)
def test_schedules_are_torchs(ours, theirs):
    assert [ours(t, 40) for t in range(1, 41)] == pytest.approx(rates_of_torch(theirs, 40), abs=1e-12)


@pytest.mark.parametrize("kind", [Constant, Linear, Cosine, InverseSquareRoot])
def test_warmup_is_a_straight_line_to_the_peak(kind):
    rates = [kind(warmup=10)(t, 100) for t in range(1, 101)]
    assert rates[:10] == pytest.approx([t / 10 for t in range(1, 11)])
    assert max(rates) == 1.0 and all(a >= b for a, b in pairwise(rates[9:]))


def test_warmup_longer_than_the_run():
    assert [Cosine(warmup=10)(t, 4) for t in (1, 4)] == [0.1, 0.4]


# Optimiser and average


def test_matrices_decay_and_vectors_and_embeddings_do_not():
    module = nn.ModuleDict({"e": nn.Embedding(5, 4), "l": nn.Linear(4, 3), "n": nn.LayerNorm(3), "f": nn.Linear(3, 3)})
    module["f"].requires_grad_(False)
    decayed, rest = decay_groups(module)
    names = {id(p): name for name, p in module.named_parameters()}
    assert [names[id(p)] for p in decayed] == ["l.weight"]
    assert [names[id(p)] for p in rest] == ["e.weight", "l.bias", "n.weight", "n.bias"]


def test_a_head_tied_to_the_embedding_does_not_decay():
    decayed, rest = decay_groups(Tiny())
    assert [tuple(p.shape) for p in decayed] == [(8, 8)]
    assert len(rest) == 4


def test_adamw_is_the_papers():
    """Loshchilov & Hutter 2019, alg. 2, written out, in float64."""
    config = AdamW.Config(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    module = nn.Linear(3, 2).double()
    optimizer, g = config.build(module), generator(0, "adamw")
    expected = {n: (p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for n, p in module.named_parameters()}
    for t in range(1, 6):
        for name, p in module.named_parameters():
            p.grad = torch.randn(p.shape, generator=g, dtype=p.dtype)
            w, m, v = expected[name]
            m, v = 0.9 * m + 0.1 * p.grad, 0.95 * v + 0.05 * p.grad**2
            adam = (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
            expected[name] = (w - 1e-2 * (adam + (0.1 * w if name == "weight" else 0.0)), m, v)
        optimizer.step()
    for name, p in module.named_parameters():
        assert torch.allclose(p, expected[name][0], atol=1e-12, rtol=0)


def test_average_is_its_closed_form():
    module = nn.Linear(2, 2)
    ws = [torch.randn(2, 2, generator=generator(i, "w")) for i in range(6)]
    module.weight.data = ws[0].clone()
    ema = Ema(module, decay=0.8)
    for w in ws[1:]:
        module.weight.data = w.clone()
        ema.update()
    expected = 0.8**5 * ws[0] + 0.2 * sum(0.8 ** (5 - i) * ws[i] for i in range(1, 6))
    assert torch.allclose(ema.weights["weight"], expected, atol=1e-6)
    with ema.in_place():
        assert torch.equal(module(torch.eye(2)), F.linear(torch.eye(2), ema_weight := module.weight, module.bias))
        assert torch.allclose(ema_weight, expected, atol=1e-6)
    assert torch.equal(module.weight, ws[5])


# Objective and gradient


def test_next_token_is_the_mean_over_the_targets_that_count():
    module, batch = tiny(dropout=0.0), counting(generator(0))
    logp = module(batch["ids"]).logits.log_softmax(-1)
    picked = [-logp[b, t, y] for b, row in enumerate(batch["targets"].tolist()) for t, y in enumerate(row) if y != -100]
    loss = next_token(module, batch)
    assert loss.weight == len(picked)
    assert loss.mean.item() == pytest.approx(torch.stack(picked).mean().item(), abs=1e-6)


def test_next_token_hands_on_segments():
    class Listening(nn.Module):
        def forward(self, ids: Tensor, segments: Tensor | None = None) -> Any:
            self.heard, self.logits = segments, torch.zeros(*ids.shape, 11)
            return self

    module, batch = Listening(), counting(generator(0))
    next_token(module, batch)
    assert module.heard is None
    next_token(module, batch | {"segments": torch.ones(8, 6)})
    assert torch.equal(module.heard, torch.ones(8, 6))


def test_next_token_sums_bf16_logits_in_fp32():
    class Half(nn.Module):
        def forward(self, ids: Tensor, segments: Tensor | None = None) -> Any:
            self.logits = torch.zeros(*ids.shape, 11, dtype=torch.bfloat16)
            return self

    ids = torch.zeros(64, 512, dtype=torch.long)
    assert next_token(Half(), {"ids": ids, "targets": ids}).mean.item() == pytest.approx(math.log(11), rel=1e-5)


def test_gradient_of_next_token_by_finite_differences():
    module, batch = tiny(dropout=0.0, dim=3).double(), counting(generator(0), rows=3, length=4)
    names = list(dict(module.named_parameters()))

    def mean(*values: Tensor) -> Tensor:
        state = dict(zip(names, values, strict=True))
        return next_token(lambda ids, segments: torch.func.functional_call(module, state, (ids,)), batch).mean

    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert torch.autograd.gradcheck(mean, values, eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("accumulate", [1, 2, 3, 8])
def test_micro_batches_add_up_to_the_whole_batch(accumulate):
    whole, pieces, batch = tiny(dropout=0.0).double(), tiny(dropout=0.0).double(), counting(generator(0))
    next_token(whole, batch).mean.backward()
    measured = differentiate(pieces, next_token, batch, ALONE, accumulate=accumulate)
    for p, q in zip(whole.parameters(), pieces.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-12, rtol=0)
    assert measured.means["loss"] == pytest.approx(next_token(whole, batch).mean.item(), rel=1e-6)  # kept in float32
    assert measured.targets == (batch["targets"] != -100).sum()


def test_metrics_are_means_over_all_micro_batches():
    def objective(module: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        loss = next_token(module, batch)
        return Loss(loss.total, loss.weight, {"threes": (batch["targets"] == 3).sum()}, unit="words")

    batch = counting(generator(0))
    expected = (batch["targets"] == 3).sum() / (batch["targets"] != -100).sum()
    measured = differentiate(tiny(), objective, batch, ALONE, accumulate=4)
    assert measured.means["threes"] == pytest.approx(expected.item())
    assert measured.unit == "words"


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_clipping_is_torchs(limit):
    ours, theirs, batch = tiny(dropout=0.0), tiny(dropout=0.0), counting(generator(0))
    next_token(theirs, batch).mean.backward()
    norm = nn.utils.clip_grad_norm_(theirs.parameters(), limit)
    measured = differentiate(ours, next_token, batch, ALONE, clip=limit)
    assert measured.norm == pytest.approx(norm.item(), rel=1e-5)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-9)


def test_a_parameter_no_loss_reaches_has_gradient_zero():
    module = nn.ModuleDict({"used": tiny(), "unused": nn.Linear(2, 2)})
    differentiate(module, lambda m, b: next_token(m["used"], b), counting(generator(0)), ALONE)
    assert module["unused"].weight.grad.eq(0).all()


# The loop


def test_the_loop_is_the_obvious_one():
    """Five lines of plain torch, and the same weights."""
    ours, theirs, steps = tiny(dropout=0.0), tiny(dropout=0.0), 12
    history = run(ours).history
    decayed, rest = decay_groups(theirs)
    groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, foreach=False)
    losses, data = [], batches()
    for t in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 3e-4 * (t / 3 if t < 3 else 1 - (t - 3) / (steps - 3))
        loss = next_token(theirs, next(data)).mean
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert [row["loss"] for row in history] == pytest.approx(losses, abs=1e-6)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6, rtol=0)


def test_it_learns():
    training = settings(steps=300, optimizer=AdamW.Config(lr=3e-2))
    history = run(tiny(dropout=0.0), training=training).history
    assert history[0]["loss"] > 2.0 and history[-1]["loss"] < 0.1


def test_same_seed_same_bits_and_another_seed_another_dropout():
    a, b, c = tiny(), tiny(), tiny()
    run(a)
    torch.rand(7)  # what others draw makes no difference
    run(b)
    run(c, training=settings(seed=1))
    assert same(a, b) and not same(a, c)


def test_the_global_generator_goes_on_as_if_nothing_had_been():
    module = tiny()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(module)
    assert torch.equal(torch.rand(3), expected)


def test_frozen_weights_stay():
    module = tiny()
    module.embedding.requires_grad_(False)
    before = module.embedding.weight.clone()
    run(module)
    assert torch.equal(module.embedding.weight, before)


def test_what_is_logged_and_shown(tmp_path):
    class Seen:
        def __init__(self) -> None:
            self.rows: list[tuple[int, dict[str, float]]] = []
            self.ended = 0

        def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
            self.rows.append((step, dict(metrics)))

        def on_end(self) -> None:
            self.ended += 1

    seen = Seen()
    trained = run(tiny(), tmp_path, settings(log_every=5), callbacks=[seen])
    assert [row["step"] for row in trained.history] == [5, 10, 12]
    assert list(trained.history[0]) == ["step", "loss", "lr", "grad_norm", "tokens", "seconds"]
    assert trained.history[-1]["tokens"] == trained.seen and trained.step == 12
    assert list(read(tmp_path / "metrics.jsonl")) == trained.history == [{"step": s} | m for s, m in seen.rows]
    assert seen.ended == 1


def test_evaluation_sees_the_average_in_eval_mode_and_disturbs_nothing():
    plain, watched_over = tiny(), tiny()
    seen = []

    def evaluate(module: nn.Module) -> dict[str, float]:
        assert not module.training and not torch.is_grad_enabled()
        torch.rand(3)
        seen.append(module.mix.weight.clone())
        return {"valid": 1.0}

    a = run(plain, training=settings(ema=0.9))
    b = run(watched_over, training=settings(ema=0.9, evaluate_every=5), evaluate=evaluate)
    assert same(plain, watched_over) and watched_over.training
    assert [row["step"] for row in b.history if "valid" in row] == [5, 10, 12]
    assert torch.equal(seen[-1], b.averages["mix.weight"]) and torch.equal(seen[-1], a.averages["mix.weight"])
    assert not torch.equal(seen[-1], plain.mix.weight)


def test_bf16_computes_in_bf16_and_keeps_fp32_weights():
    module, types_seen = tiny(dropout=0.0), set()
    module.mix.register_forward_hook(lambda _m, _i, out: types_seen.add(out.dtype))
    history = run(module, training=settings(precision="bf16")).history
    exact = run(tiny(dropout=0.0)).history
    assert types_seen == {torch.bfloat16} and module.mix.weight.dtype == torch.float32
    assert [r["loss"] for r in history] == pytest.approx([r["loss"] for r in exact], abs=2e-2)


def test_training_reads_from_json_and_takes_overrides():
    training = settings(ema=0.5)
    assert Training.from_json(training.to_json()) == training
    assert training.override("optimizer.lr=1e-2", "schedule.warmup=7").optimizer.lr == 1e-2


# What goes wrong


@pytest.mark.parametrize("name", ["accumulate", "log_every", "evaluate_every", "save_every", "keep"])
@pytest.mark.parametrize("value", [0, -1])
def test_what_is_counted_is_at_least_one(name, value):
    with pytest.raises(InputError, match=rf"^training\.{name}={value}; it must be 1 or more$"):
        settings(**{name: value})


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan])
def test_the_norm_to_clip_to_is_positive(clip):
    with pytest.raises(InputError, match=rf"^training\.clip={clip}; it must be above 0, or None for no clipping$"):
        settings(clip=clip)


def test_a_run_has_no_fewer_than_no_steps():
    with pytest.raises(InputError, match=r"^training\.steps=-1; it must be 0 or more$"):
        settings(steps=-1)
    assert run(tiny(), training=settings(steps=0)).step == 0


def test_a_training_that_cannot_be_is_one_line_of_the_command(capsys):
    assert main(["run", "alibi", "--size", "smoke", "--set", "training.accumulate=0"]) == 2
    assert "error: training.accumulate=0; it must be 1 or more" in capsys.readouterr().err


def spoilt(at: int) -> Any:
    """The objective, whose loss is infinite at the `at`-th call."""
    calls = 0

    def objective(module: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        nonlocal calls
        calls += 1
        loss = next_token(module, batch)
        return Loss(loss.total * (math.inf if calls == at else 1.0), loss.weight)

    return objective


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    module = tiny()
    with pytest.raises(InputError, match=r"^step 8: the loss is inf .*last checkpoint stands$"):
        run(module, tmp_path, objective=spoilt(8))
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000003", "step-00000006"]
    assert all(p.isfinite().all() for p in module.parameters())
    resumed, unbroken = tiny(seed=1), tiny()
    run(unbroken)
    assert run(resumed, tmp_path).step == 12 and same(resumed, unbroken)


def test_a_gradient_that_is_not_finite_stops_the_run():
    def objective(module: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        return Loss(module.mix.weight.sub(module.mix.weight.detach()).sqrt().sum(), torch.tensor(1))

    with pytest.raises(InputError, match=r"step 1: the loss is 0 and the gradient's norm"):
        run(tiny(), objective=objective)


def test_a_batch_without_targets():
    with pytest.raises(InputError, match=r"^step 1: .*every target of the batch is masked"):
        run(tiny(), data=batches_of({"ids": torch.ones(2, 3).long(), "targets": torch.full((2, 3), -100)}))


def test_fewer_rows_than_micro_batches():
    with pytest.raises(InputError, match=r"a batch of 8 rows \(ids\) cannot be split in 9"):
        run(tiny(), training=settings(accumulate=9))


def batches_of(batch: dict[str, Tensor]) -> Any:
    data = batches()
    data.make = lambda _: batch
    return data


# Signals


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves(tmp_path, signum, code):
    before, stopped, unbroken = signal.getsignal(signum), tiny(), tiny()
    with pytest.raises(Stopped, match=f"{signum.name}: stopped after step 5 of 12, saved in .*goes on") as caught:
        run(stopped, tmp_path, callbacks=[At(5, lambda: os.kill(os.getpid(), signum))])
    assert caught.value.exit_code == code
    assert (tmp_path / "checkpoints/step-00000005").is_dir()
    assert signal.getsignal(signum) is before
    whole = run(unbroken)
    resumed = tiny(seed=1)
    assert untimed(run(resumed, tmp_path).history) == untimed(whole.history)
    assert same(resumed, unbroken)


def test_ctrl_c_says_what_it_waits_for_to_a_terminal(monkeypatch):
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        with pytest.raises(Stopped), watched():
            os.kill(os.getpid(), signal.SIGINT)
        assert os.read(ours, 1000) == b"\r\nstopping after this step; Ctrl-C again stops at once\r\n"
    os.close(ours)


def test_a_second_ctrl_c_interrupts_at_once(tmp_path):
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        run(tiny(), tmp_path, callbacks=[At(5, twice)])
    assert not isinstance(caught.value, Stopped)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_signal_nobody_heeded_is_not_lost():
    with pytest.raises(Stopped, match="SIGTERM"), watched():
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_in_another_thread_leaves_signals_alone():
    before, done = signal.getsignal(signal.SIGINT), []
    thread = threading.Thread(target=lambda: done.append(run(tiny(), training=settings(steps=2)).step))
    thread.start()
    thread.join()
    assert done == [2] and signal.getsignal(signal.SIGINT) is before


# Trackers


@pytest.mark.parametrize(
    ("package", "make"),
    [("tensorboard", lambda: TensorBoard("unused")), ("trackio", lambda: Trackio("unused"))],
)
def test_a_missing_tracker_is_named(monkeypatch, package, make):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=rf"^{package} is not installed; pip install 'allyouneed\[track\]'"):
        make()


def test_trackers_are_told_every_row(monkeypatch, tmp_path):
    calls: list[tuple[Any, ...]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            calls.append(("open", folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, step))

        def close(self) -> None:
            calls.append(("close",))

    class TrackioRun:
        def log(self, metrics: dict[str, float], step: int) -> None:
            calls.append(("log", step, len(metrics)))

        def finish(self) -> None:
            calls.append(("finish",))

    board, trackio = types.ModuleType("board"), types.ModuleType("trackio")
    board.SummaryWriter = Writer
    trackio.init = lambda project, name, resume: calls.append((project, name, resume)) or TrackioRun()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    run(tiny(), training=settings(steps=1), callbacks=[TensorBoard(tmp_path), Trackio("p", "n")])
    curves = [(name, 1) for name in ("loss", "lr", "grad_norm", "tokens", "seconds")]
    assert calls == [
        ("open", str(tmp_path), 1),
        *curves,
        ("p", "n", "allow"),
        ("log", 1, 5),
        ("close",),
        ("finish",),
    ]


def test_paths_may_be_strings(tmp_path):
    assert run(tiny(), str(tmp_path), settings(steps=1)).step == 1
    assert Path(tmp_path / "checkpoints/step-00000001/model.safetensors").exists()
