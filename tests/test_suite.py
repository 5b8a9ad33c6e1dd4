"""One order of the data, asked by step number, and suites of models trained on it, stopped and taken up again."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import within

from allyouneed.core.errors import InputError
from allyouneed.core.metrics import read
from allyouneed.data.batches import Windows
from allyouneed.data.replay import FixedOrder, Permutation, Planted, scattered
from allyouneed.models import gpt_neox
from allyouneed.models.checkpoints.loading import load_module, save
from allyouneed.objectives.next_token import next_token
from allyouneed.train.loop import Training
from allyouneed.train.suite import Member, kept_steps, train_suite

TOKENS = torch.randint(0, 53, (1001,), generator=torch.Generator().manual_seed(0))


def order(**changes: Any) -> FixedOrder:
    return FixedOrder(**{"tokens": TOKENS, "batch_size": 6, "length": 10, "seed": 3} | changes)


# The permutation


@pytest.mark.parametrize("size", [*range(1, 40), 255, 256, 257, 4097, 100_000])
def test_every_place_has_one_window_and_every_window_one_place(size):
    assert np.array_equal(np.sort(Permutation(size, 1)(np.arange(size))), np.arange(size))


def test_places_are_computed_one_by_one_as_all_at_once():
    whole = Permutation(1000, 2)(np.arange(1000))
    assert [int(Permutation(1000, 2)(np.array([i]))[0]) for i in range(1000)] == whole.tolist()


@pytest.mark.parametrize("size", [2, 3, 7, 16, 100])
def test_over_seeds_every_window_comes_as_often_to_each_place(size):
    """Pearson's χ² over 400 seeds a window, at two places that a weak mixing would tell apart."""
    seeds = 400 * size
    drawn = np.array([Permutation(size, seed)(np.array([0, size - 1])) for seed in range(seeds)])
    for column in drawn.T:
        counts = np.bincount(column, minlength=size)
        chi2 = ((counts - 400) ** 2 / 400).sum()
        assert chi2 < size - 1 + 4 * (2 * (size - 1)) ** 0.5, counts


def test_neighbours_do_not_stay_neighbours():
    windows = Permutation(10_000, 0)(np.arange(10_000))
    assert abs(np.corrcoef(windows[:-1], windows[1:])[0, 1]) < 0.04  # 4 standard errors
    assert abs(np.corrcoef(windows, np.arange(10_000))[0, 1]) < 0.04


# The order


def test_any_batch_is_the_one_the_iterator_gave():
    iterator = order()
    for step, given in zip(range(1, 60), iterator, strict=False):
        asked = order().batch(step)
        assert all(torch.equal(asked[name], given[name]) for name in given)
    assert given["ids"].dtype == torch.int64 and given["ids"].shape == (6, 10)


def test_an_epoch_shows_each_window_once_and_the_next_in_another_order():
    one = order()
    assert one.windows == 100
    rows = torch.cat([one.rows(step) for step in range(1, 51)])  # 300 rows: three epochs, seams within batches
    expected = TOKENS.unfold(0, 11, 10)
    epochs = rows.split(100)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted(expected.tolist())
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])


def test_far_steps_cost_what_near_ones_do():
    one = order()
    with within(1):
        far = one.batch(10**15)
    assert torch.equal(far["ids"], order().batch(10**15)["ids"])


def test_an_order_goes_on_where_it_was_and_refuses_another():
    one = order()
    for _ in range(7):
        next(one)
    state, expected = one.state_dict(), next(one)
    again = order()
    again.load_state_dict(state)
    assert torch.equal(next(again)["ids"], expected["ids"])
    for changes in ({"seed": 4}, {"batch_size": 5}, {"length": 9}, {"tokens": TOKENS[:500]}):
        with pytest.raises(InputError, match="data state: field"):
            order(**changes).load_state_dict(state)
    with pytest.raises(InputError, match="data state"):
        one.load_state_dict(Windows(TOKENS, batch_size=1, length=2, seed=0).state_dict())
    with pytest.raises(InputError, match="'step'"):
        one.load_state_dict(state | {"step": -1})
    with pytest.raises(InputError, match="the first step is 1"):
        one.batch(0)
    with pytest.raises(InputError, match="too short"):
        order(tokens=TOKENS[:10])


def test_planted_sequences_stand_where_they_were_planted_and_nothing_else_changes():
    sequences = torch.full((3, 4), 60) + torch.arange(3)[:, None]
    plan = {0: 2, 5: 0, 6: 1, 23: 2, 140: 0}
    planted, plain = Planted(order(), sequences, plan), order()
    for step in range(1, 31):
        with_them, without = planted.batch(step), plain.batch(step)
        for row in range(6):
            which = plan.get((step - 1) * 6 + row)
            ids, targets = without["ids"][row].clone(), without["targets"][row].clone()
            if which is not None:
                ids[:4], targets[:3] = sequences[which], sequences[which, 1:]
            assert torch.equal(with_them["ids"][row], ids) and torch.equal(with_them["targets"][row], targets)


def test_a_plan_is_part_of_the_state():
    sequences = torch.zeros(2, 4, dtype=torch.long)
    state = Planted(order(), sequences, {3: 0}).state_dict()
    Planted(order(), sequences, {3: 0}).load_state_dict(state)
    for others, plan in ((sequences, {3: 1}), (sequences, {4: 0}), (sequences + 1, {3: 0})):
        with pytest.raises(InputError, match="'planted'"):
            Planted(order(), others, plan).load_state_dict(state)
    with pytest.raises(InputError, match="no sequence 2"):
        Planted(order(), sequences, {0: 2})
    with pytest.raises(InputError, match="rows have 11"):
        Planted(order(), torch.zeros(1, 12), {})


def test_scattering_keeps_to_counts_and_bands():
    counts, bands = [3, 0, 5, 4], [(0, 100), (0, 10), (20, 25), (0, 8)]
    plan = scattered(counts, bands, seed=0)
    for which, (count, (first, end)) in enumerate(zip(counts, bands, strict=True)):
        places = [place for place, planted in plan.items() if planted == which]
        assert len(places) == count and all(first <= place < end for place in places)
    assert plan != scattered(counts, bands, seed=1)
    with pytest.raises(InputError, match="sequence 0 is wanted 3 times in 2"):
        scattered([3], [(0, 2)], seed=0)


# The suite


@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [
        (3, 1000, [0, 1, 2, 3]),
        (20, 10, [0, 1, 2, 4, 8, 10, 20]),
        (25, 8, [0, 1, 2, 4, 8, 16, 24, 25]),
        (3, 1, [0, 1, 2, 3]),
    ],
)
def test_the_kept_steps(steps, every, expected):
    assert kept_steps(steps, every) == expected


def test_pythia_keeps_154():
    found = kept_steps(143_000)
    assert len(found) == 154
    assert found[:12] == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000] and found[-1] == 143_000


TRAINING = Training(steps=20, save_every=3, log_every=5)
SIZES = {
    name: Member(
        model=gpt_neox.architecture(vocab_size=53, context=16, dim=dim, num_layers=1, num_heads=2), training=TRAINING
    )
    for name, dim in (("small", 16), ("large", 32))
}
KEPT = [0, 1, 2, 4, 8, 10, 20]


class Watched(FixedOrder):
    """Notes what it gives."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__(TOKENS, batch_size=4, length=10, seed=1)
        self.seen = seen

    def __next__(self) -> dict[str, torch.Tensor]:
        batch = super().__next__()
        self.seen.append(hashlib.sha256(batch["ids"].numpy().tobytes()).hexdigest())
        return batch


def suite(folder: Path, seen: list[str] | None = None, keep: Any = save) -> Any:
    return train_suite(
        SIZES,
        next_token,
        lambda: Watched([] if seen is None else seen),
        folder,
        save=keep,
        every=10,
        quiet=True,
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    seen: list[str] = []
    done = suite(folder, seen)
    assert [(name, run.step) for name, run in done.items()] == [("small", 20), ("large", 20)]
    assert seen[:20] == seen[20:] and len(set(seen)) == 20  # one order for both
    return folder


def test_every_kept_step_can_be_loaded(unbroken):
    for name, member in SIZES.items():
        assert sorted(path.name for path in (unbroken / name).glob("step*")) == sorted(f"step{k}" for k in KEPT)
        modules = [load_module(unbroken / name, step=step) for step in KEPT]
        assert all(module.config.replace(initialise=member.model.initialise) == member.model for module in modules)
        heads = [module.head.weight for module in modules]
        assert all(not torch.equal(a, b) for a, b in pairwise(heads))


@pytest.mark.parametrize("at", [0, 8, 10, 20])
def test_a_suite_that_was_stopped_goes_on_bit_for_bit(unbroken, tmp_path, at):
    """Killed while it keeps step `at` of the second size, up to three steps after a checkpoint."""

    def dies(module: torch.nn.Module, folder: Path) -> None:
        if f"step{at}" in folder.name.split(".") and "large" in folder.parts:
            raise KeyboardInterrupt
        save(module, folder)

    with pytest.raises(KeyboardInterrupt):
        suite(tmp_path, keep=dies)
    assert not (tmp_path / "large" / f"step{at}").exists() and not list((tmp_path / "large").glob("*.tmp"))
    seen: list[str] = []
    suite(tmp_path, seen)
    assert len(seen) == 20 - max(at - 1, 0) // 3 * 3  # the first size is passed over, the second goes on
    for name in SIZES:
        for step in KEPT:
            there, here = (load_module(folder / name, step=step).state_dict() for folder in (unbroken, tmp_path))
            assert all(torch.equal(there[key], here[key]) for key in there), (name, step)
        curves = [
            [{k: x for k, x in row.items() if k != "seconds"} for row in read(folder / name / "metrics.jsonl")]
            for folder in (unbroken, tmp_path)
        ]
        assert curves[0] == curves[1] and len(curves[0]) == 4


def test_names_that_are_no_folders(tmp_path):
    for name in ("", "..", "a/b"):
        with pytest.raises(InputError, match="name of a folder"):
            train_suite({name: SIZES["small"]}, next_token, lambda: Watched([]), tmp_path, save=save)
    with pytest.raises(InputError, match="every=0"):
        kept_steps(10, 0)


@pytest.mark.parametrize(
    ("step", "said"), [(9, "8 and 10"), (5, "4 and 8"), (21, "the nearest: 20"), (-1, "the nearest: 0")]
)
def test_a_step_that_was_not_kept_names_the_nearest(unbroken, step, said):
    with pytest.raises(InputError, match=rf"small: no checkpoint of step {step}; .*{said}$"):
        load_module(unbroken / "small", step=step)


def test_a_step_of_something_that_has_none(unbroken, tmp_path):
    (tmp_path / "step").mkdir()
    for name in (tmp_path, unbroken / "small" / "step8", "no-such-material"):
        with pytest.raises(InputError, match="no folder with checkpoints by step"):
            load_module(name, step=4)


def test_a_step_of_a_model_on_the_hub_is_its_revision(unbroken, monkeypatch):
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["revision"]))
        return str(unbroken / "small" / "step8")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = load_module("EleutherAI/pythia-70m", step=512)
    assert asked == [("EleutherAI/pythia-70m", "step512")]
    assert torch.equal(found.head.weight, load_module(unbroken / "small", step=8).head.weight)
