"""Counted traffic is the equations' to the last number, of algorithms that compute the right result."""

from __future__ import annotations

import numpy as np
import pytest

from allyouneed.core.errors import InputError
from allyouneed.evaluate.traffic import ALGORITHMS, Exchanged, Machine, Published, Standard, measured


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_counts_are_the_equations(algorithm):
    source = np.random.default_rng(0)
    for _ in range(80):
        n, d = source.integers(1, 60), source.integers(1, 9)
        rows, keys = source.integers(1, min(n, 25) + 1), source.integers(1, min(n, 25) + 1)
        q, k, v = source.standard_normal((3, n, d))
        machine = Machine(algorithm.room(n, d, rows, keys), Q=q, K=k, V=v, O=np.full((n, d), np.nan))
        algorithm.run(machine, rows, keys)
        assert machine.traffic == algorithm.traffic(n, d, rows, keys)
        assert machine.peak == machine.capacity and not machine.held
        weights = np.exp(q @ k.T)
        assert np.abs(machine.arrays["O"] - weights @ v / weights.sum(1, keepdims=True)).max() <= 1e-9


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_blocks_are_the_largest_that_fit(algorithm):
    for n, d, capacity in ((300, 8, 900), (64, 4, 260), (2000, 64, 20_000), (50, 2, 10**6)):
        rows, keys = algorithm.blocks(n, d, capacity)
        assert algorithm.room(n, d, rows, keys) <= capacity and max(rows, keys) <= n
        grown = (min(keys + 1, d), keys + 1) if algorithm is Published else (rows + 1, keys)
        assert algorithm.room(n, d, *grown) > capacity or max(rows, keys) == n


def test_a_fast_memory_is_not_overfilled():
    x = np.ones((40, 8))
    with pytest.raises(InputError, match="17 numbers do not fit a fast memory of 16"):
        machine = Machine(16, x=x)
        machine.load("x", slice(0, 2))
        machine.hold("y", np.zeros(1))
    with pytest.raises(InputError, match="a fast memory of 16 numbers holds no block"):
        measured(Published, x, x, x, capacity=16)


def test_theorem_2():
    """At N = 65,536, d = 64: four times the fast memory, a quarter of what tiles move, and hardly less for the rest."""
    for algorithm, fall in ((Published, 4.0), (Exchanged, 4.0), (Standard, 1.0)):
        totals = [
            algorithm.traffic(65_536, 64, *algorithm.blocks(65_536, 64, capacity)).total
            for capacity in (200_000, 800_000)
        ]
        assert abs(totals[0] / totals[1] - fall) <= 0.1 * fall
