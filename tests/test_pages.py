"""Optimizer state in pages: the same numbers as without, less memory, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import At, run, same, settings, tiny, untimed
from torch import nn

from allyouneed.core.errors import InputError
from allyouneed.train.optimizers import MOMENTS, AdamW, PagedAdamW
from allyouneed.train.pages import FilePage, HostPage, room


def paged(folder: Path, **changes):
    return settings(optimizer=PagedAdamW.Config(folder=str(folder)), **changes)


def test_weights_and_moments_have_adamw_s_bits(tmp_path: Path) -> None:
    one, other = tiny(), tiny()
    plain, kept = run(one, tmp_path / "plain"), run(other, tmp_path / "paged", paged(tmp_path))
    assert same(one, other)
    assert untimed(plain.history) == untimed(kept.history)
    last = "checkpoints/step-00000012/optimizer.safetensors"
    assert (tmp_path / "plain" / last).read_bytes() == (tmp_path / "paged" / last).read_bytes()


def test_parameters_that_lie_otherwise_and_without_gradients() -> None:
    found = []
    for kind in (AdamW, PagedAdamW):
        torch.manual_seed(0)
        module = nn.Linear(5, 3)
        module.weight = nn.Parameter(torch.randn(5, 3).t())  # not contiguous
        module.spare = nn.Parameter(torch.ones(2))
        optimizer = kind.Config(lr=0.1).build(module)
        for _ in range(3):
            module(torch.ones(2, 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([p.clone() for p in module.parameters()])
    assert all(map(torch.equal, *found))


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, parted = tiny(), tiny()
    run(whole, None, paged(tmp_path))
    stop = At(6, lambda: os.kill(os.getpid(), 2))
    with pytest.raises(KeyboardInterrupt):
        run(parted, tmp_path / "run", paged(tmp_path), callbacks=[stop])
    again, elsewhere = tiny(seed=9), tmp_path / "elsewhere"  # where pages lie makes no other run of it
    elsewhere.mkdir()
    run(again, tmp_path / "run", paged(elsewhere))
    assert same(whole, again)


def test_a_state_from_elsewhere_is_taken_into_its_pages() -> None:
    module = nn.Linear(3, 3)
    optimizer = PagedAdamW.Config().build(module)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    loaded = {name: optimizer.state[module.weight][name].clone() for name in MOMENTS}
    optimizer.state[module.weight] |= loaded
    optimizer.step()
    pages = optimizer.pages[module.weight]
    assert all(optimizer.state[module.weight][name] is pages[name].tensor for name in MOMENTS)
    assert not any(torch.equal(pages[name].tensor, loaded[name]) for name in MOMENTS)


def test_files_have_no_names(tmp_path: Path) -> None:
    run(tiny(), None, paged(tmp_path))
    page = FilePage(torch.ones(7), str(tmp_path))
    assert not list(tmp_path.iterdir())
    page.keep(page.bring().fill_(3.0))
    assert page.tensor.tolist() == [3.0] * 7


def test_no_room_is_said_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no room for 28 bytes of optimizer state: No such file"):
        FilePage(torch.ones(7), str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="no room"):
        room(torch.empty(1 << 50, device="meta"), str(tmp_path))


def test_a_copy_that_is_brought_is_kept() -> None:
    """What a GPU's pages do, here without one."""
    page = HostPage(torch.ones(2, 2))
    near = page.bring()
    near += 2
    assert page.tensor.sum() == 0
    page.keep(near)
    assert page.tensor.sum() == 8


GROWN = """
import os, sys, torch
from allyouneed.train.optimizers import AdamW, PagedAdamW

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

module = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(8)))
for p in module.parameters():
    p.grad = torch.ones_like(p)
config = PagedAdamW.Config(folder=sys.argv[1]) if sys.argv[1:] else AdamW.Config()
optimizer, before = config.build(module), resident()
optimizer.step()
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux says how much is resident")
def test_moments_are_not_resident(tmp_path: Path) -> None:
    """Of 64 MB of moments nearly all with AdamW, one parameter's at most with pages.

    Each in a process of its own: where memory has been freed before, moments may lie in what is resident already.
    """
    plain, paged = (
        int(subprocess.run([sys.executable, "-c", GROWN, *folder], capture_output=True, text=True, check=True).stdout)
        for folder in ([], [str(tmp_path)])
    )
    assert plain > 60e6 and paged < 10e6
