"""What a paper's module gives (`Paper`) and what its experiment is handed (`Report`).

Running, saving and printing are the runner's; what makes a check pass is in `checks`.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from allyouneed.core.config import Config
from allyouneed.core.files import read_json, write_json
from allyouneed.core.progress import clock
from allyouneed.core.workers import Workers, in_turn
from allyouneed.papers import checks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from allyouneed.train.ranks import Ranks

Arm = TypeVar("Arm")

SIZES = ("smoke", "laptop", "paper")
EVIDENCE = ("closed form", "small world", "real weights", "paper scale")


@dataclass(frozen=True, kw_only=True)
class Paper:
    """An experiment: `run(config, report)` tests the claim that stands in `doc`, at each of the three sizes."""

    doc: str
    run: Callable[[Any, Report], None]
    sizes: Mapping[str, Config]
    evidence: str  # of the laptop size, one of EVIDENCE; the paper size is "paper scale"
    minutes: Mapping[str, float]  # what a run takes on two cores, for the sizes that fit there
    seeds: Mapping[str, int] = field(default_factory=lambda: {"smoke": 1, "laptop": 3, "paper": 1})


class Report:
    """Collects what an experiment does and finds. Whatever is handed over must be plain JSON values.

    Work goes through `job` or `repeat`, so that it is saved once done and a stopped run goes on where it was:

        losses = report.repeat({"alibi": alibi, "sinusoidal": sinusoidal}, train)    # train(arm, seed, folder) -> value
        gains = [c - t for t, c in zip(losses["alibi"], losses["sinusoidal"])]
        report.check("gain over sinusoidal", values=gains, above=config.margin)

    Of several `ranks` each does all work, and the value of the first, which alone writes, is everybody's.
    """

    def __init__(
        self,
        *,
        slug: str,
        seeds: Sequence[int],
        folder: Path,
        evidence: str,
        quiet: bool = False,
        ranks: Ranks | None = None,
        workers: Workers = in_turn,
    ) -> None:
        self.workers = workers  # who does the jobs of `repeat`
        self.slug, self.seeds, self.folder, self.evidence, self.quiet = slug, list(seeds), folder, evidence, quiet
        self.ranks = ranks
        self.arms: dict[str, dict[str, Any]] = {}
        self.checks: list[checks.Check] = []
        self.curves: list[dict[str, Any]] = []
        self.tables: list[dict[str, Any]] = []
        self.figures: list[dict[str, str]] = []
        self.notes: list[str] = []
        self.jobs_done = self.jobs_planned = 0
        self.job_seconds = self.seconds_before = 0.0  # of all jobs; of those an earlier sitting did

    def repeat(
        self, arms: Mapping[str, Arm], work: Callable[[Arm, int, Path], Any], seeds: Sequence[int] | None = None
    ) -> dict[str, list[Any]]:
        """Do `work(arm, seed, folder)` for every arm with every seed; per arm the values, in the order of the seeds.

        `seeds` are the run's if None; fewer do for what no check asks for.
        """
        seeds = self.seeds if seeds is None else seeds
        folders = {name: re.sub(r"[^\w.+=-]+", "-", name) for name in arms}
        assert len(set(folders.values())) == len(arms), f"arms share a folder: {folders}"
        calls = {  # seeds outside: a run stopped half-way has whole comparisons
            f"{folders[name]}/seed{seed}": (arm, seed) for seed in seeds for name, arm in arms.items()
        }
        found = self._done(work, calls, self.workers)
        return {name: [found[f"{folder}/seed{seed}"] for seed in seeds] for name, folder in folders.items()}

    def job(self, key: str, work: Callable[[Path], Any]) -> Any:
        """The value of `work(folder)`, from the run's folder if it was done before. `folder` is for its checkpoints."""
        return self._done(work, {key: ()}, in_turn)[key]

    def arm(self, name: str, **facts: Any) -> None:
        """Record what an arm had at its disposal: parameters, tokens, FLOPs."""
        self.arms.setdefault(name, {}).update(facts)

    def check(
        self,
        name: str,
        value: float | None = None,
        *,
        values: Sequence[float] | None = None,
        spread: float | None = None,
        interval: tuple[float, float] | None = None,
        method: str = "95 % interval",
        above: float | None = None,
        below: float | None = None,
    ) -> checks.Check:
        """Hold a number against its bound; see `checks.measured` for the ways to say how sure it is."""
        found = checks.measured(
            name, value, values=values, spread=spread, interval=interval, method=method, above=above, below=below
        )
        self.checks.append(found)
        return found

    def curve(
        self, name: str, x: Iterable[float], ys: Iterable[Sequence[float]], *, x_label: str, y_label: str
    ) -> None:
        """Record a curve over `x`, (n,), with one line of `ys`, (seeds, n), per seed."""
        lines = [list(map(float, y)) for y in ys]
        self.curves.append(
            {"name": name, "x_label": x_label, "y_label": y_label, "x": list(map(float, x)), "ys": lines}
        )

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record a table; every row has the same keys, which head the columns."""
        self.tables.append({"name": name, "rows": [dict(row) for row in rows]})

    def note(self, text: str) -> None:
        """Record a sentence that a reader of the numbers should know."""
        self.notes.append(text)

    def figure(self, figure: Figure, caption: str, name: str = "figure") -> None:
        """Save a figure of `papers.figures`. The first is the one published beside the verdict."""
        from allyouneed.papers import figures

        assert name not in {f["name"] for f in self.figures}, f"two figures called {name!r}"
        if self._writes:
            figures.save(figure, self.folder / name)
        self.figures.append({"name": name, "caption": caption, "svg": f"{name}.svg", "png": f"{name}.png"})

    @property
    def verdict(self) -> str:
        """`holds`, `fails` or `inconclusive`, by the checks so far."""
        return checks.verdict(self.checks)

    def to_json(self) -> dict[str, Any]:
        """What was collected."""
        return {
            "seeds": self.seeds,
            "arms": self.arms,
            "checks": [check.to_json() for check in self.checks],
            "verdict": self.verdict,
            "evidence": self.evidence,
            "curves": self.curves,
            "tables": self.tables,
            "figures": self.figures,
            "notes": self.notes,
        }

    def _done(self, work: Callable[..., Any], calls: Mapping[str, tuple[Any, ...]], workers: Workers) -> dict[str, Any]:
        """What `work(*arguments, folder)` gives for each key's arguments; only what no file tells yet is done."""
        for key in calls:
            assert re.fullmatch(r"[\w.,=+-]+(/[\w.,=+-]+)*", key), f"job {key!r} cannot name a file"
        self.jobs_planned += len(calls)
        folders = {key: self.folder / "jobs" / key for key in calls}
        missing = self._told([key for key in calls if not _saved(folders[key]).exists()])
        found = {key: self._read(folders[key], before=True) for key in calls if key not in missing}
        self._announce(missing[:1])
        ended = workers(partial(_perform, work, self._writes), [(calls[key], folders[key]) for key in missing])
        for count, place in enumerate(ended, start=1):
            found[missing[place]] = self._read(folders[missing[place]], before=False)
            self._announce(missing[count : count + 1])
        return found

    def _read(self, folder: Path, *, before: bool) -> Any:
        """The value of a job that is done; `before`: by an earlier sitting."""
        record = self._told(read_json(_saved(folder)) if self._writes else None)
        self.jobs_done += 1
        self.job_seconds += record["seconds"]
        self.seconds_before += record["seconds"] if before else 0.0
        return record["value"]

    @property
    def _writes(self) -> bool:
        return self.ranks is None or self.ranks.rank == 0

    def _told(self, value: Any) -> Any:
        """What the first rank found."""
        return value if self.ranks is None else self.ranks.told(value)

    def _announce(self, keys: Sequence[str]) -> None:
        """Say which job starts, of how many, and how long they may still take."""
        for key in [] if self.quiet else keys:
            left = self.job_seconds / max(self.jobs_done, 1) * (self.jobs_planned - self.jobs_done)
            still = f"  about {clock(left)} left" if self.jobs_done else ""
            print(f"{self.slug}  {self.jobs_done + 1}/{self.jobs_planned}  {key}{still}", file=sys.stderr, flush=True)


def _saved(folder: Path) -> Path:
    """Where the value of the job that works in `folder` stands."""
    return folder.with_name(f"{folder.name}.json")


def _perform(work: Callable[..., Any], writes: bool, arguments: tuple[Any, ...], folder: Path) -> None:
    """Do a job, on whichever machine, and save its value and how long it took, if it is this process that `writes`."""
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    value = work(*arguments, folder)
    if writes:
        write_json(_saved(folder), {"seconds": round(time.monotonic() - started, 3), "value": value})
