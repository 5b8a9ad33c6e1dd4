"""Kernels for GPUs run in an interpreter, and no test may take long; fixtures that several files share."""

import gc
import os
import time
import tracemalloc
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

os.environ["TRITON_INTERPRET"] = "1"  # before any module imports Triton, which reads it then

collect_ignore = ["vllm_run.py"]  # run by hand, where vLLM is


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--most-seconds", type=float, default=60.0, help="a test that takes longer fails; 0: none does")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many threads PyTorch and the kernels may use: what is computed does not depend on it."""
    import torch  # not before the variable above is set, and not where no test asks

    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def spent() -> tuple[float, float]:
    """Seconds on the clock, and of processors, those of finished child processes included."""
    times = os.times()
    return time.monotonic(), times.user + times.system + times.children_user + times.children_system


def since(before: tuple[float, float]) -> float:
    """Seconds by the lesser measure: a busy machine lengthens the one, many threads the other."""
    return min(now - then for now, then in zip(spent(), before, strict=True))


@pytest.fixture(scope="module", autouse=True)
def settled() -> None:
    """What files before left is not gone through by this one's garbage collections, which would halt it for 0.5 s."""
    gc.collect()
    gc.freeze()


@contextmanager
def traced() -> Iterator[list[int]]:
    """Yields a list, at the end of the most bytes that Python allocated inside."""
    peak: list[int] = []
    tracemalloc.start()
    try:
        yield peak
    finally:
        peak.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # or extension modules tell of leaks


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """What is done inside takes no longer."""
    before = spent()
    yield
    took = since(before)
    assert took <= seconds, f"took {took:.2f} s, more than {seconds:g}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Fail a test that is too long."""
    before, most = spent(), item.config.getoption("--most-seconds")
    result = yield
    took = since(before)
    if 0 < most < took:
        pytest.fail(f"took {took:.1f} s, more than {most:g}: make it smaller (half of that is what a test may take)")
    return result
