"""The frame of the papers (list, checks, reports, runs, pages) on a made-up paper; every built paper's contract."""

from __future__ import annotations

import importlib
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import within

import allyouneed
from allyouneed.core.errors import InputError
from allyouneed.core.files import read_json, write_json
from allyouneed.nn import native
from allyouneed.papers import catalogue, checks, docstrings, figures, provenance, publish, runner, table
from allyouneed.papers.base import EVIDENCE, SIZES, Report
from allyouneed.papers.schema import validate

FAKE = '''"""A made-up paper (Nobody, 2020). arXiv:2000.00000

Claim   the treatment beats the control
        by more than the margin.
Here    two generators of numbers.
Apart   everything.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from allyouneed.core.config import Config as Base
from allyouneed.papers import figures
from allyouneed.papers.base import Paper, Report

BEFORE_WORK = lambda arm, seed: None
DONE = []


@dataclass(frozen=True, kw_only=True)
class Config(Base):
    gain: float = 1.0
    margin: float = 0.5


def run(config: Config, report: Report) -> None:
    def work(mean: float, seed: int, folder: Path) -> float:
        BEFORE_WORK(mean, seed)
        DONE.append((mean, seed))
        return mean + 0.01 * random.Random(seed).random()

    found = report.repeat({"treatment": config.gain, "control, none": 0.0}, work)
    base = report.job("base", lambda folder: 0.0)
    for name, values in found.items():
        report.arm(name, parameters=1_000_000, tokens=None)
        report.curve(name, [0, 1], [[base, v] for v in values], x_label="step", y_label="score")
    gains = [t - c for t, c in zip(found["treatment"], found["control, none"])]
    report.check("gain", values=gains, above=config.margin)
    report.check("error of the formula", 0.0, below=1e-6)
    report.table("scores", [{"arm": name, "mean": sum(v) / len(v)} for name, v in found.items()])
    report.note("Numbers are made up.")
    figure, (axes,) = figures.new(3, 2)
    for curve in report.curves:
        figures.band(axes, curve["x"], curve["ys"], curve["name"])
    report.figure(figure, "Score over steps.")


PAPER = Paper(
    doc=__doc__,
    run=run,
    sizes={"smoke": Config(), "laptop": Config(gain=2.0), "paper": Config(gain=3.0)},
    evidence="small world",
    minutes={"smoke": 0.01, "laptop": 0.1},
)
'''


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A built paper called `fake`, alone in the list with `absent`; runs, results and pages go to `tmp_path`."""
    papers = sys.modules["allyouneed.papers"]
    folder = tmp_path / "papers"
    folder.mkdir()
    (folder / "fake.py").write_text(FAKE)
    rows = tuple(
        table.Row(i, slug, "A", "Nobody", 2020, "2000.00000", "A made-up paper", "Made up")
        for i, slug in enumerate(["fake", "absent"], 1)
    )
    monkeypatch.setattr(table, "PAPERS", rows)
    monkeypatch.setattr(papers, "__path__", [str(folder), *papers.__path__])
    monkeypatch.setattr(catalogue, "FOLDER", folder)
    monkeypatch.setattr(catalogue, "HOME", tmp_path)
    monkeypatch.setattr(provenance, "commit", lambda: "0123456789abcdef")
    monkeypatch.chdir(tmp_path)
    yield importlib.import_module("allyouneed.papers.fake")
    del sys.modules["allyouneed.papers.fake"]
    del papers.fake


def stop_at(arm: float, seed: int) -> Callable[[float, int], None]:
    def before_work(mean: float, now: int) -> None:
        if (mean, now) == (arm, seed):
            raise KeyboardInterrupt

    return before_work


# the list


def test_the_list_is_whole_and_in_order() -> None:
    assert [row.number for row in table.PAPERS] == list(range(1, 52))
    assert len({row.slug for row in table.PAPERS}) == len({row.source for row in table.PAPERS}) == 51
    sizes = {letter: sum(row.group == letter for row in table.PAPERS) for letter in table.GROUPS}
    assert sizes == {"A": 13, "B": 6, "C": 12, "D": 4, "E": 7, "F": 3, "G": 6}
    for row in table.PAPERS:
        assert row.slug.isidentifier() and row.slug.islower() and len(row.gist) <= 100 and not row.gist.endswith(".")
        assert row.url.startswith("https://") and 2016 <= row.year <= 2024
        if not row.source.startswith("https://"):  # an arXiv number begins with the year and month of its first version
            assert 2000 + int(row.source[:2]) == row.year and len(row.source) == 10


def test_the_public_function_and_the_room_share_their_name() -> None:
    for _ in range(2):  # importing the room puts the module where the function was
        assert [entry.slug for entry in allyouneed.papers()][:2] == ["attention", "gpt"]
    importlib.import_module("allyouneed.papers.base")
    assert len(allyouneed.papers()) == 51


def test_entries_tell_built_from_not_built(fake: Any) -> None:
    built, absent = catalogue.papers()
    assert (built.state, built.result) == ("built", None)
    assert built.claim == "the treatment beats the control\nby more than the margin."
    assert (absent.state, absent.claim, absent.result) == ("not built", None, None)
    with pytest.raises(InputError, match="'absent' is not built yet; built: fake"):
        catalogue.load("absent")
    with pytest.raises(InputError, match="unknown paper 'fak'; did you mean 'fake'"):
        catalogue.load("fak")


def test_docstrings_keep_equations_and_unlisted_sections() -> None:
    words = docstrings.parse(
        "Title (2020). arXiv:1\n\nClaim   one\n        two\n\n            y = x\n\nApart   a\nEquations\n    z = 1\n"
    )
    assert words.heading == "Title (2020). arXiv:1"
    assert words.sections == {"Claim": "one\ntwo\n\n    y = x", "Apart": "a", "Equations": "z = 1"}


# checks and verdict


@pytest.mark.parametrize(
    ("interval", "above", "below", "passed"),
    [
        ((0.1, 0.3), 0.0, None, True),
        ((0.0, 0.3), 0.0, None, None),  # the bound itself is not above it
        ((-0.3, 0.0), 0.0, None, False),
        ((-0.1, 0.3), 0.0, None, None),
        ((0.1, 0.3), None, 0.4, True),
        ((0.1, 0.4), None, 0.4, None),
        ((0.4, 0.5), None, 0.4, False),
        ((0.1, 0.3), 0.0, 0.4, True),
        ((0.1, 0.5), 0.0, 0.4, None),
        ((0.5, 0.6), 0.0, 0.4, False),
        (None, 0.0, None, None),
    ],
)
def test_a_check_is_decided_by_its_whole_interval(interval: Any, above: Any, below: Any, passed: Any) -> None:
    assert checks.Check("c", 0.2, interval, "given", above, below).passed is passed


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ([True, True], "holds"),
        ([True, None], "inconclusive"),
        ([None, False], "fails"),
        ([True, False], "fails"),
        ([], "inconclusive"),
    ],
)
def test_the_verdict_follows_from_the_checks(outcomes: list[bool | None], verdict: str) -> None:
    intervals = {True: (1.0, 2.0), None: (-1.0, 1.0), False: (-2.0, -1.0)}
    assert checks.verdict(checks.Check("c", 0.0, intervals[o], "given", above=0.0) for o in outcomes) == verdict


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_student_intervals_cover_the_truth_19_times_in_20(seeds: int) -> None:
    draw = random.Random(seeds)
    trials, covered = 4000, 0
    for _ in range(trials):
        found = checks.measured("c", values=[draw.gauss(3.0, 2.0) for _ in range(seeds)], above=0.0).interval
        assert found is not None
        covered += found[0] <= 3.0 <= found[1]
    assert covered / trials == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / trials))


def test_the_ways_to_say_how_sure_a_number_is() -> None:
    interval = checks.measured("c", values=[1.0, 2.0, 3.0], above=0.0).interval
    assert interval == pytest.approx((-0.4841, 4.4841), abs=1e-4)
    assert checks.measured("c", 1.0, spread=0.25, above=0.0).interval == (0.75, 1.25)
    assert checks.measured("c", 1.0, interval=(0.5, 1.75), above=0.0).interval == (0.5, 1.75)
    assert checks.measured("c", 1.0, above=0.0).interval == (1.0, 1.0)
    one = checks.measured("c", values=[9.0], above=0.0)
    assert (one.interval, one.passed) == (None, None)
    with pytest.raises(AssertionError, match="not a number among"):
        checks.measured("c", values=[math.nan, 1.0], above=0.0)


# running


def test_a_run_leaves_a_valid_report_and_its_files(
    fake: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = runner.run("fake", "laptop", seeds=3, overrides=["margin=0.75"])
    validate(report)
    (folder,) = (tmp_path / "runs" / "fake").iterdir()
    assert read_json(folder / "report.json") == report
    assert report["verdict"] == "holds" and report["seeds"] == [0, 1, 2] and report["config"]["margin"] == 0.75
    assert report["claim"].startswith("the treatment beats") and report["evidence"] == "small world"
    gain = report["checks"][0]
    assert gain["value"] == pytest.approx(2.0) and gain["interval"][0] <= 2.0 <= gain["interval"][1]
    assert {"config.json", "figure.png", "figure.svg", "jobs", "report.json", "report.md"} == {
        path.name for path in folder.iterdir()
    }
    told = capsys.readouterr()
    assert "about 0.1 min on two cores" in told.err and "fake  4/6  control-none/seed1" in told.err
    assert "the claim holds" in told.out and str(folder.relative_to(tmp_path) / "figure.png") in told.out
    assert "| gain | 2 |" in (folder / "report.md").read_text()


def test_fewer_seeds_do_for_what_no_check_asks_for(tmp_path: Path) -> None:
    report = Report(slug="fake", seeds=[0, 1, 2], folder=tmp_path, evidence="small world", quiet=True)
    found = report.repeat({"a": 10, "b": 20}, lambda arm, seed, folder: arm + seed, report.seeds[:1])
    assert found == {"a": [10], "b": [20]} and report.jobs_planned == 2
    assert report.repeat({"c": 30}, lambda arm, seed, folder: arm + seed) == {"c": [30, 31, 32]}


def test_paper_size_is_paper_scale_and_one_seed_decides_nothing(fake: Any) -> None:
    report = runner.run("fake", "paper", quiet=True)
    assert (report["evidence"], report["seeds"], report["verdict"]) == ("paper scale", [0], "inconclusive")


def test_a_stopped_run_goes_on_where_it_was(fake: Any, tmp_path: Path) -> None:
    whole = runner.run("fake", seeds=3, out=tmp_path / "whole", quiet=True)
    fake.DONE.clear()
    fake.BEFORE_WORK = stop_at(0.0, 1)
    with pytest.raises(KeyboardInterrupt):
        runner.run("fake", seeds=3, quiet=True)
    assert fake.DONE == [(2.0, 0), (0.0, 0), (2.0, 1)]
    fake.BEFORE_WORK = lambda mean, seed: None
    resumed = runner.run("fake", seeds=3, quiet=True)
    assert fake.DONE == [(2.0, 0), (0.0, 0), (2.0, 1), (0.0, 1), (2.0, 2), (0.0, 2)]
    assert len(list((tmp_path / "runs" / "fake").iterdir())) == 1
    assert (resumed["sittings"], whole["sittings"]) == (2, 1)
    for differing in ("seconds", "sittings"):
        del resumed[differing], whole[differing]
    assert resumed == whole


def test_a_run_that_somebody_works_on_is_not_taken_up(fake: Any) -> None:
    inner: list[dict[str, Any]] = []

    def meanwhile(mean: float, seed: int) -> None:
        fake.BEFORE_WORK = lambda mean, seed: None
        inner.append(runner.run("fake", seeds=2, quiet=True))

    fake.BEFORE_WORK = meanwhile
    outer = runner.run("fake", seeds=2, quiet=True)
    assert outer["sittings"] == inner[0]["sittings"] == 1 and len(fake.DONE) == 8
    assert len(runner.finished_runs(Path("runs/fake"))) == 2


@pytest.mark.parametrize("change", ["fresh", "seeds", "override", "code", "finished"])
def test_another_run_starts_anew(fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    fake.BEFORE_WORK = stop_at(0.0, 1)
    with pytest.raises(KeyboardInterrupt):
        runner.run("fake", seeds=2, quiet=True)
    fake.BEFORE_WORK = lambda mean, seed: None
    if change == "finished":
        runner.run("fake", seeds=2, quiet=True)
    if change == "code":
        monkeypatch.setattr(provenance, "digest", lambda: "another")
    fake.DONE.clear()
    report = runner.run(
        "fake",
        seeds=3 if change == "seeds" else 2,
        overrides=["gain=4"] if change == "override" else [],
        fresh=change == "fresh",
        quiet=True,
    )
    assert report["sittings"] == 1 and len(fake.DONE) == 2 * len(report["seeds"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "labtop"}, "unknown size 'labtop'; did you mean 'laptop'"),
        ({"overrides": ["marge=1"]}, "did you mean 'margin'"),
        ({"overrides": ["margin=wide"]}, "expected float"),
        ({"seeds": 0}, "needs at least 1"),
    ],
)
def test_wrong_options_are_named_before_anything_is_written(
    fake: Any, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        runner.run("fake", **options)
    assert not (tmp_path / "runs").exists()


# reports


def broken(report: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    copy: Any = deepcopy(report)
    *way, last = path.split(".")
    inner = copy
    for step in way:
        inner = inner[int(step) if step.isdigit() else step]
    inner[last] = value
    return copy  # type: ignore[no-any-return]


def test_every_field_of_a_report_is_required_and_checked(fake: Any) -> None:
    report = runner.run("fake", seeds=2, quiet=True)
    for name in report:
        with pytest.raises(InputError, match=f"{name} is missing"):
            validate({key: value for key, value in report.items() if key != name})
        with pytest.raises(InputError, match=rf"report: {name}: expected"):
            validate(broken(report, name, object()))
    with pytest.raises(InputError, match="mood is no field"):
        validate(broken(report, "mood", "good"))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("verdict", "fails", "but the checks say 'holds'"),
        ("checks.0.passed", False, r"checks\[0\].passed: False, but interval and bound say True"),
        ("checks.0.interval", [2.0, 1.0], r"checks\[0\].interval"),
        ("checks.0.bound", {"above": None, "below": None}, r"checks\[0\].bound"),
        ("checks.0.value", "much", r"checks\[0\].value: expected a number, got 'much'"),
        ("checks", [], "checks: expected a list of at least one object"),
        ("curves.0.ys", [[1.0]], r"curves\[0\].ys: a line is not as long as x \(2\)"),
        ("seeds", [True], "seeds"),
        ("size", "huge", "one of smoke, laptop, paper"),
        ("figures", [], "figures"),
    ],
)
def test_reports_that_contradict_themselves_are_refused(fake: Any, path: str, value: Any, message: str) -> None:
    report = runner.run("fake", seeds=2, quiet=True)
    validate(report)
    with pytest.raises(InputError, match=message):
        validate(broken(report, path, value))


# publishing


def test_publishing_copies_the_newest_laptop_run_and_writes_the_pages(fake: Any, tmp_path: Path) -> None:
    runner.run("fake", "smoke", quiet=True)
    report = runner.run("fake", quiet=True)
    runner.run("fake", "smoke", quiet=True)
    results, docs = tmp_path / "results", tmp_path / "docs" / "papers"
    written = publish.publish("fake")
    assert written == [results / "fake.json", results / "fake.svg", docs / "README.md", docs / "fake.md"]
    assert read_json(results / "fake.json") == report
    assert catalogue.find("fake").result == "holds"
    page = (docs / "fake.md").read_text()
    for part in ("# 1. A made-up paper", "The claim holds here.", "by more than the margin.", "two generators",
                 "everything.", "| gain | 2 |", "> 0.5", "3 seeds", "small world", "allyouneed run fake",
                 "../../results/fake.svg", "arXiv:2000.00000", "0123456789ab", "Numbers are made up."):  # fmt: skip
        assert part in page, part
    assert "| 1 | `fake` [A made-up paper](fake.md) | 2020 | Made up | holds |" in (docs / "README.md").read_text()
    assert "| 2 | `absent` A made-up paper | 2020 | Made up | not built |" in (docs / "README.md").read_text()
    assert publish.write_pages() == []


@pytest.mark.parametrize(
    ("size", "overrides", "seeds", "commit", "message"),
    [
        ("smoke", [], 3, "abc", "its size is 'smoke'"),
        ("laptop", ["gain=9"], 3, "abc", "not the laptop size"),
        ("laptop", [], 2, "abc", "2 seeds, and 3 belong"),
        ("laptop", [], 3, "abc+dirty", "not committed"),
        ("laptop", [], 3, "unknown", "nobody knows its commit"),
    ],
)
def test_runs_that_show_something_else_are_not_published(
    fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    size: str, overrides: list[str], seeds: int, commit: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(provenance, "commit", lambda: commit)
    runner.run("fake", size, overrides=overrides, seeds=seeds, quiet=True)
    (folder,) = (tmp_path / "runs" / "fake").iterdir()
    with pytest.raises(InputError, match=message):
        publish.publish("fake", folder)
    assert not (tmp_path / "results").exists()


def test_malformed_and_missing_reports_are_not_published(fake: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finished laptop run in runs/fake; first: allyouneed run fake"):
        publish.publish("fake")
    report = runner.run("fake", quiet=True)
    (folder,) = (tmp_path / "runs" / "fake").iterdir()
    write_json(folder / "report.json", broken(report, "verdict", "fails"))
    with pytest.raises(InputError, match="the checks say 'holds'"):
        publish.publish("fake")
    (folder / "report.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        publish.publish("fake", folder)
    with pytest.raises(InputError, match="nowhere"):
        publish.publish("fake", tmp_path / "nowhere")


# figures


def test_a_figure_is_the_same_file_every_time(tmp_path: Path) -> None:
    def draw(stem: str) -> list[bytes]:
        figure, (left, right) = figures.new(6, 3, columns=2)
        figures.band(left, [1, 2, 4], [[1.0, 2.0, 3.0], [1.5, 2.5, 3.0]], "treatment")
        figures.band(left, [1, 2, 4], [[1.0, 2.0, 3.1]], "control", figures.CONTROL, style="--")
        figures.mark(left, "trained here", x=2)
        figures.describe(left, title="Loss", x="step", y="nats")
        figures.label_ends(left)
        figures.bars(right, ["a", "b"], [1.0, -2.0], [(0.5, 1.5), (-2.5, -1.5)])
        return [path.read_bytes() for path in figures.save(figure, tmp_path / stem)]

    first, second = draw("first"), draw("second")
    assert first == second
    assert b"<dc:date>" not in first[0] and first[1].startswith(b"\x89PNG")


def test_labels_at_line_ends_keep_apart_and_in_order() -> None:
    draw = random.Random(0)
    for _ in range(200):
        heights = [draw.uniform(0, 60) for _ in range(draw.randint(1, 7))]
        places = figures._spread(heights, gap=10.0)
        ordered = [place for _, place in sorted(zip(heights, places, strict=True))]
        assert all(b - a >= 10.0 - 1e-9 for a, b in pairwise(ordered))
        assert sum(places) == pytest.approx(sum(heights))


def test_the_commit_is_marked_when_sources_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "src" / "allyouneed"
    package.mkdir(parents=True)
    (package / "a.py").write_text("a = 1\n")
    monkeypatch.setattr(provenance, "PACKAGE", package)
    assert provenance.commit() == "unknown"
    before = provenance.digest()
    provenance._git(tmp_path, "init", "-q")
    provenance._git(tmp_path, "add", ".")
    provenance._git(tmp_path, "-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "one")
    clean = provenance.commit()
    assert len(clean) == 40 and not clean.endswith("+dirty")
    (tmp_path / "results.json").write_text("{}")  # not code
    assert provenance.commit() == clean and provenance.digest() == before
    (package / "a.py").write_text("a = 2\n")
    assert provenance.commit() == clean + "+dirty" and provenance.digest() != before


# the contract of every built paper


@pytest.mark.parametrize("slug", catalogue.built())
def test_a_built_paper_says_what_it_claims_and_has_three_sizes(slug: str) -> None:
    paper = catalogue.load(slug)
    assert paper.doc == importlib.import_module(f"allyouneed.papers.{slug}").__doc__
    assert set(docstrings.SECTIONS) <= set(catalogue.docstring(slug).sections)
    assert tuple(paper.sizes) == SIZES and paper.evidence in EVIDENCE
    assert set(paper.minutes) >= {"smoke", "laptop"} and set(paper.seeds) == set(SIZES)
    for config in paper.sizes.values():
        assert config.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("slug", catalogue.built())
def test_the_smoke_run_of_a_built_paper_gives_a_valid_report(slug: str, tmp_path: Path) -> None:
    native.library()  # compiled
    with within(20):
        report = runner.run(slug, "smoke", out=tmp_path, quiet=True)
    validate(report)


def test_a_run_is_announced_with_the_minutes_that_the_published_one_took() -> None:
    took = {slug: report["seconds"] / 60 for slug in catalogue.built() if (report := catalogue.result(slug))}
    said = {slug: catalogue.load(slug).minutes["laptop"] for slug in took}
    assert not {slug: (said[slug], round(took[slug], 1)) for slug in took if said[slug] < round(took[slug])}


def test_published_results_and_pages_agree() -> None:
    for slug in catalogue.built():
        report = catalogue.result(slug)
        if report is not None:
            validate(report)
    stale = [path for path, text in publish.rendered().items() if not path.exists() or path.read_text() != text]
    assert not stale, "pages differ from docstrings and results; run `allyouneed publish --pages`"
