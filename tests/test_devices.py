"""How much memory there is, and how much of it what an engine keeps takes."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil
import pytest

from allyouneed.core import devices
from allyouneed.generate.drafting import Draft, EarlyExit
from allyouneed.generate.engine import Engine
from allyouneed.generate.speculation import PromptLookup, Speculator
from allyouneed.models import gpt2, llama
from allyouneed.nn.paged import bytes_per_block

NONE = str(2**63 - 4096)  # what version 1 says where there is no limit


@pytest.mark.parametrize(
    ("own", "limits", "least"),
    [
        ("0::/", {"memory.max": "5000\n"}, 5000),
        ("0::/", {"memory.max": "max\n"}, None),
        ("0::/a/b", {"memory.max": "max", "a/memory.max": "300", "a/b/memory.max": "max"}, 300),
        ("0::/a/b", {"a/memory.max": "300", "a/b/memory.max": "200"}, 200),
        ("0::/not/seen/in/here", {"memory.max": "70"}, 70),
        (
            "5:memory:/a\n4:cpu,cpuacct:/a",
            {"memory/memory.limit_in_bytes": NONE, "memory/a/memory.limit_in_bytes": "9"},
            9,
        ),
        ("4:cpu:/a\n0::/a:b", {"a/memory.max": "3", "a:b/memory.max": "80"}, 80),
        ("", {}, None),
    ],
)
def test_the_least_limit_of_all_groups(own: str, limits: dict[str, str], least: int | None, tmp_path: Path) -> None:
    for name, limit in limits.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(limit)
    (tmp_path / "own").write_text(own)
    assert devices.group_limit(tmp_path / "own", tmp_path / "root") == least
    assert devices.group_limit(tmp_path / "missing", tmp_path / "root") is None


def test_a_container_has_no_more_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit, found in ((None, physical), (1000, 1000), (2 * physical, physical)):
        monkeypatch.setattr(devices, "group_limit", lambda limit=limit: limit)
        assert devices.memory() == found


@pytest.mark.parametrize("speculator", [None, PromptLookup(), EarlyExit(1), Draft(gpt2.EXAMPLE.build().eval())])
def test_blocks_take_a_quarter_with_those_of_a_draft_model(
    speculator: Speculator | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = llama.EXAMPLE.build().eval()
    draft = [speculator.module] if isinstance(speculator, Draft) else []
    each = sum(bytes_per_block(one.new_cache(1, 0), 16) for one in (module, *draft))
    monkeypatch.setattr(devices, "memory", lambda device: 4 * 7 * each + 3)
    assert Engine(module, speculator=speculator).statistics().blocks == 7


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries give memory back by themselves")
def test_freed_memory_is_given_back() -> None:
    kept = [bytes(600) for _ in range(200_000)]  # too large for Python's own pools
    last = bytes(600)  # lies above all of them
    del kept
    before = psutil.Process().memory_info().rss
    devices.give_back()
    assert before - psutil.Process().memory_info().rss > 60 << 20, last
