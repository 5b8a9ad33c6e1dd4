"""What papers on alignment and adapters make of numbers: hand-made ones, whose verdicts are known."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from allyouneed.align.exact import Point
from allyouneed.evaluate.subspaces import overlaps
from allyouneed.papers import aligned, dpo, instructgpt, llama2, lora, qlora, standing
from allyouneed.papers.base import Report
from allyouneed.papers.checks import Check


def report(tmp_path: Path, seeds: int = 3) -> Report:
    return Report(slug="hand", seeds=range(seeds), folder=tmp_path, evidence="small world", quiet=True)


def laptop(paper: ModuleType) -> Any:
    return paper.PAPER.sizes["laptop"]


def by_name(found: Report, part: str) -> Check:
    (check,) = [one for one in found.checks if part in one.name]
    return check


def line(slope: float, *places: float) -> list[Point]:
    """Policies whose gain is `slope` times the root of their divergence."""
    return [Point(kl, 1.0 + slope * math.sqrt(kl)) for kl in places]


KNOWN = dpo.Known(Point(0.0, 1.0), line(2.0, 0.001, 0.1, 1.0, 9.0), [])


def test_dpo_judges_within_what_both_arms_have_trained(tmp_path: Path) -> None:
    config, found = laptop(dpo), report(tmp_path)
    assert KNOWN.share(line(1.0, 0.01, 4.0), 0.3) == pytest.approx(0.5)
    for kl in (0.009, 4.1):
        with pytest.raises(AssertionError, match="both sides"):
            KNOWN.share(line(1.0, 0.01, 4.0), kl)
    points = {
        "DPO": [line(1.0, 0.01, 0.5, 4.0)] * 3,
        "PPO, reward model": [line(0.6, 0.1, 0.8)] * 3,  # nothing around 1 nat: judged at 0.8
        "preferred texts": [[Point(0.04, 9.0), *line(0.8, 0.05)]] * 3,  # only the last is judged
    }
    dpo._judge(config, found, [KNOWN] * 3, points)
    assert by_name(found, "PPO").value == pytest.approx(0.5 - 0.3)
    assert by_name(found, "fine-tuning").value == pytest.approx(0.5 - 0.4)
    assert found.verdict == "holds"
    assert found.arms["PPO, reward model"] == {
        "share within 0.25 nats": 0.3,
        "share within 0.5 nats": 0.3,
        "share within 1 nats": None,
    }
    assert found.notes == [f"Seed {seed}: nothing lies around 1 nats; judged at 0.8." for seed in range(3)]


def test_dpo_below_its_first_policy_is_judged_there_and_not_by_a_line_from_the_reference(tmp_path: Path) -> None:
    first = Point(0.2, 1.0 + 0.5 * math.sqrt(0.2))
    ahead = dpo._ahead(KNOWN, [first, *line(1.0, 4.0)], line(0.8, 0.05), 0.05)
    assert ahead == pytest.approx(0.25 - 0.4)


def trace(*rows: tuple[float, float, float]) -> list[dict[str, float]]:
    return [dict(zip(("even", "odd", "proxy"), row, strict=True)) for row in rows]


def test_instructgpt_tells_a_fall_from_what_the_penalty_spares(tmp_path: Path) -> None:
    free = trace((0.1, 0.1, 0.0), (0.8, 0.7, 1.0), (0.7, 0.9, 2.0), (0.3, 0.2, 3.0))
    assert instructgpt._overdone(free) == {"truth": pytest.approx(0.5), "proxy": pytest.approx(2.0)}
    still = trace((0.1, 0.1, 0.0), (0.8, 0.7, 1.0), (0.8, 0.65, 1.5))
    for bound, verdict in ((still, "holds"), (free, "fails")):  # a control that falls as far shows no penalty's worth
        found = report(tmp_path)
        traces = [{instructgpt.FREE: free, instructgpt.BOUND: bound}] * 3
        instructgpt._check_proxy(laptop(instructgpt), found, traces)
        assert found.verdict == verdict
        assert by_name(found, "with the penalty").value == pytest.approx(0.5 - instructgpt._overdone(bound)["truth"])


def test_instructgpts_reward_models_see_each_comparison_as_often_and_warm_up_alike(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[tuple[int, Any]] = []
    monkeypatch.setattr(aligned, "ranked", lambda speaker, prompts, *rest: list(prompts))
    monkeypatch.setattr(aligned, "graded", lambda speaker, some, how, *rest: seen.append((len(some), how)))
    config = laptop(instructgpt)
    instructgpt._graders(config, config.world.build(), None, 0, tmp_path)  # type: ignore[arg-type]
    for count, how in seen:
        steps, warmup = how.training.steps, how.training.schedule.warmup
        assert steps * how.rows / count == pytest.approx(450 * 32 / 2048, rel=0.02)
        assert warmup / steps == pytest.approx(22 / 450, abs=0.015)
    assert [count for count, _ in seen] == [128, 512, 2048]


def test_llama2s_model_for_both_sees_each_pair_as_often(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, float] = {}

    def ranked(speaker: Any, prompts: list[str], truth: Any, *rest: Any) -> list[Any]:
        return [SimpleNamespace(pieces=(), ranks=()) for _ in prompts]

    def graded(speaker: Any, some: list[Any], how: Any, seed: int, folder: Path, name: str) -> str:
        seen[name] = how.training.steps * how.rows / len(some)
        return name

    for name, part in (("ranked", ranked), ("graded", graded), ("right", lambda model, tested: len(model))):
        monkeypatch.setattr(aligned, name, part)
    monkeypatch.setattr(llama2, "Ranked", lambda pieces, ranks: None)
    config = laptop(llama2)
    _, accuracy = llama2._models(config, config.world.build(), None, 0, tmp_path)  # type: ignore[arg-type]
    assert set(seen) == {"helpful", "safe", "both", "helpful without margins"}
    assert set(seen.values()) == {250 * 32 / 2000}
    assert accuracy["safe"] == {"its own": len("safe"), "one for both": len("both")}  # each judged by its own


@pytest.mark.parametrize(("keeps", "wanted"), [(0, [0.0, 0.0, 0.0]), (1, [1.0, 0.0, 0.0]), (3, [1.0, 1.0, 1.0])])
def test_llama2_counts_the_turns_in_which_an_order_is_kept(keeps: int, wanted: list[float]) -> None:
    """A speaker that ends its first answers as ordered, and forgets."""
    config = laptop(llama2).ghosts.replace(turns=3, tested=5)
    world = config.world.build()

    def complete(open_: list[Any], sampling: Any) -> list[Any]:
        turn = (len(open_[0]) + 1) // 2
        endings = [one[0]["content"].split()[3] for one in open_]  # "end all with … ."
        assert len(endings) == 5 and all(len(one) == 2 * turn - 1 for one in open_)
        return [SimpleNamespace(text=f"baro {end} " if turn <= keeps else "baro") for end in endings]

    speaker: Any = SimpleNamespace(most=8, sampler=lambda: SimpleNamespace(lm=SimpleNamespace(complete=complete)))
    found = standing._kept(config, world, speaker, 0)
    assert found == wanted
    assert standing.later(found) == sum(wanted[1:]) / 2  # the first turn is no memory


def adapted(loss: float, right: float, trained: int) -> dict[str, float]:
    return {"loss": loss, "right": right, "trained": trained, "all": 10_000}


@pytest.mark.parametrize(
    ("least", "high", "low_trains", "failed"),
    [
        ((0.22, 0.88), (0.2, 0.9), 99, []),
        ((0.22, 0.0), (0.2, 0.0), 99, ["right lines, r = 1"]),  # none right: no fewer than none says nothing
        ((0.3, 0.88), (0.2, 0.9), 99, ["loss, r = 1 minus r = 64"]),
        ((0.22, 0.88), (0.2, 0.9), 100, ["share of the weights that r = 8 trains"]),
    ],
)
def test_lora_judges_rank_1_by_its_loss_and_by_lines_that_are_right(
    tmp_path: Path, least: tuple[float, float], high: tuple[float, float], low_trains: int, failed: list[str]
) -> None:
    found, config = report(tmp_path), laptop(lora)
    arms = {
        "r = 1": [adapted(*least, 12)] * 3,
        "r = 8": [adapted(0.21, 0.9, low_trains)] * 3,
        "r = 64": [adapted(*high, 800)] * 3,
        lora.FULL: [adapted(0.2, 0.9, 10_000)] * 3,
    }
    lora._check(config, found, arms, {"loss": 3.0}, {"moved": 1e-6}, [[[0.8, 0.4], [0.4, 0.5]]] * 3)
    assert [one.name for one in found.checks if one.passed is not True] == failed


def test_lora_tells_the_first_direction_from_the_others() -> None:
    eye = torch.eye(8, 20, dtype=torch.double)
    apart = torch.eye(20, dtype=torch.double)[[0, *range(8, 15)]]  # the first alone is shared
    for other, wanted in ((apart, 0.0), (eye, 1.0)):
        assert lora._beyond(overlaps(eye, other).tolist()) == pytest.approx(wanted)


def test_qlora_compares_arms_of_one_seed(tmp_path: Path) -> None:
    """Seeds far apart, arms of one seed close: only differences within seeds are sure."""

    def losses(seed: int) -> dict[str, dict[str, float]]:
        prose = {qlora.BASE: 0.0, "Int8 + DQ": 0.0, qlora.PLAIN: 0.02, qlora.NF4: 0.021, qlora.FP4: 0.05}
        found = {name: {"prose": seed + cost} for name, cost in (prose | {qlora.INT4: 0.04}).items()}
        for name in qlora.TUNED:
            found[name] |= {"code": seed + 2.0, "tuned": seed + (1.02 if name == qlora.NF4 else 1.0)}
        return found

    found = report(tmp_path, 4)
    qlora._judge(laptop(qlora), found, "hand", [losses(seed) for seed in range(4)])
    wanted = {"FP4 + DQ minus": 0.029, "Int4 + DQ minus": 0.019, "DQ minus none": 0.001, "float32": 0.02, "gains": 0.98}
    assert {part: by_name(found, part).value for part in wanted} == pytest.approx(wanted)
    failed = [one.name for one in found.checks if one.passed is not True]
    assert failed == ["hand, tuned: NF4 + DQ minus float32"]  # 0.02 beyond what it may lose
