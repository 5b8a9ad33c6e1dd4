"""What training is said to take, against what the planner counts on fake tensors and what is plain arithmetic."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from allyouneed.adapt import lora
from allyouneed.align import references
from allyouneed.commands.methods import estimates
from allyouneed.commands.methods.base import Job, Task, over
from allyouneed.commands.methods.table import methods
from allyouneed.data.packing import document, pad_right
from allyouneed.data.tokenizers import byte_tokenizer
from allyouneed.models import llama
from allyouneed.objectives.next_token import next_token
from allyouneed.train.tracing import trace

LENGTH = 48
CONFIG = llama.architecture(vocab_size=257, context=64, dim=32, num_layers=3, num_heads=4, hidden_dim=64)
TRAINING = SimpleNamespace(accumulate=1, precision="fp32", steps=100)


def job(module: torch.nn.Module) -> Job:
    torch.manual_seed(0)
    rows = [document(torch.randint(256, (LENGTH,)).tolist()) for _ in range(6)]
    return Job(
        module=module,
        tokenizer=byte_tokenizer(),
        objective=next_token,
        train=rows,
        valid=rows[:1],
        batches=over(rows, pad_right),
        lengths=[LENGTH] * 6,
        judge=lambda held: {},
        probe=lambda: pad_right(rows[:1]),
    )


def said(text: str) -> float:
    """Bytes of memory that a text tells."""
    number, unit = re.search(r"about ([\d.]+) (MB|GB)", text).groups()
    return float(number) * {"MB": 1e6, "GB": 1e9}[unit]


def test_what_is_kept_is_what_the_planner_counts():
    kept, seconds = estimates._tried(job(CONFIG.build()), pad_right([document(list(range(LENGTH)))]), 1, TRAINING)

    def run(module: torch.nn.Module) -> None:
        ids = torch.zeros(1, LENGTH, dtype=torch.long)
        next_token(module, {"ids": ids, "targets": ids, "segments": torch.ones_like(ids)})

    counted = trace(CONFIG.build, run, LENGTH, narrow=False).kept.of_one()
    assert kept == pytest.approx(counted, rel=0.1) and 0 < seconds < 60


def test_a_step_is_what_each_row_adds_to_the_first(monkeypatch):
    """Of 3 seconds for one and 4.5 for four, ten take 7.5; and no number is drawn that training would miss."""
    times = {1: 3.0, 4: 4.5}
    monkeypatch.setattr(estimates, "_timed", lambda job, batch, training: times[len(batch["ids"])])
    made = job(CONFIG.build())
    assert estimates._tried(made, made.probe(), 10, TRAINING)[1] == pytest.approx(7.5)
    monkeypatch.setattr(estimates, "PATIENCE", 2.0)
    assert estimates._tried(made, made.probe(), 10, TRAINING)[1] == 30.0
    monkeypatch.setattr(estimates, "_timed", lambda *_: torch.rand(1).item())
    state = torch.random.get_rng_state()
    estimates.told(made, 8, TRAINING)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_adapters_have_less_state():
    whole, adapted = CONFIG.build(), CONFIG.build()
    lora.adapt(adapted, lora.Lora.Config(rank=2))
    size = 4 * sum(p.numel() for p in whole.parameters())
    few = 4 * sum(p.numel() for p in lora.parameters(adapted).values())
    kept = [estimates._tried(job(module), job(module).probe(), 1, TRAINING)[0] for module in (whole, adapted)]
    for module, state, held, bytes_ in ((whole, 3 * size, size, kept[0]), (adapted, 3 * few, size + few, kept[1])):
        one, many = (said(estimates.told(job(module), batch, TRAINING)) for batch in (1, 64))
        assert one == pytest.approx(held + state + bytes_, abs=1.1e6)
        assert many - one == pytest.approx(63 * bytes_, abs=2.2e6)
    assert all(p.grad is None for p in whole.parameters())


def test_a_machine_that_is_too_small_is_told(monkeypatch):
    monkeypatch.setattr(estimates, "memory", lambda device: 1000)
    assert "which is too little" in estimates.told(job(CONFIG.build()), 4, TRAINING)


def test_a_frozen_copy_is_counted_and_a_model_without_its_adapters_is_not():
    whole, adapted = CONFIG.build(), CONFIG.build()
    lora.adapt(adapted, lora.Lora.Config(rank=2))
    for module, more in ((whole, 4 * sum(p.numel() for p in whole.parameters())), (adapted, 0)):
        alone = job(module)
        held = replace(alone, reference=references.of(module))
        sizes = [sum(x.nbytes for x in estimates._held(one)) for one in (alone, held)]
        assert sizes[1] - sizes[0] == more


@pytest.mark.parametrize("method", ["ppo", "rejection"])
def test_policies_are_tried_by_a_row_of_a_rollout(method, tmp_path):
    """As long as the longest prompt with the longest answer, and differentiated like any other."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "abc"}\n' * 4)
    (tmp_path / "reward.py").write_text("def reward(prompt, completion):\n    return 1.0\n")
    what = {"data": tmp_path / "prompts.jsonl", "valid": None, "length": None, "out": tmp_path, "bad": None, "seed": 0}
    options = {"reward": str(tmp_path / "reward.py"), "max_new_tokens": 8}
    task = Task(method=method, options=options, **what)
    made = methods()[method].prepare(CONFIG.build(), byte_tokenizer(), task)
    assert {x.shape for x in made.probe().values()} == {(1, 3 + 8)} and max(made.lengths) == 11
    told = estimates.told(made, 4, TRAINING)
    assert "and what writing answers takes" in told and said(told) > 0
    assert all(p.grad is None for p in made.module.parameters())
