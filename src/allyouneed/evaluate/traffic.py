"""How many numbers attention moves between a large slow memory and a small fast one: equations, and a machine to count.

Three ways to compute O = softmax(QKᵀ)V for N tokens of d dimensions on a fast memory of M numbers (Dao et al. 2022):
`Standard` (algorithm 0: S and P are written out and read again), `Published` (algorithm 1: a block of keys stays, all
queries and their half-done outputs pass), `Exchanged` (a block of queries stays, all keys pass: Dao 2023, sec. 3.1, as
kernels do here). Each says in an equation what it moves, and runs on a `Machine`, which holds the arrays, refuses more
than M numbers at a time and counts every one that comes or goes; both must be equal. Theorem 2 says of them:
Θ(Nd + N²) against Θ(N²d²/M).

`rows` and `keys` are the sizes of blocks, of queries and of keys. The scale of scores is left out: it moves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allyouneed.core.errors import InputError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Traffic:
    """Numbers read from the slow memory and written to it."""

    read: int
    written: int

    @property
    def total(self) -> int:
        """Both."""
        return self.read + self.written


class Machine:
    """A slow memory with the given arrays, and a fast one of `capacity` numbers, which starts empty.

    >>> machine = Machine(8, x=np.ones((4, 2)))
    >>> machine.store("x", 2 * machine.load("x", slice(0, 2)), slice(0, 2))
    >>> machine.traffic, machine.peak
    (Traffic(read=4, written=4), 4)
    """

    def __init__(self, capacity: int, **arrays: Array) -> None:
        self.capacity, self.arrays = capacity, {name: array.copy() for name, array in arrays.items()}
        self.held: dict[str, int] = {}
        self.read = self.written = self.peak = 0

    def load(self, name: str, *part: slice) -> Array:
        """Bring a part of an array; it takes its place until it is dropped or loaded anew."""
        found = self.arrays[name][part].copy()
        self.read += found.size
        return self.hold(name, found)

    def store(self, name: str, value: Array, *part: slice) -> None:
        """Write an array, or a part of it."""
        self.arrays[name][part] = value
        self.written += value.size

    def hold(self, name: str, value: Array) -> Array:
        """Give a result its place in the fast memory."""
        self.held[name] = value.size
        self.peak = max(self.peak, sum(self.held.values()))
        if self.peak > self.capacity:
            raise InputError(f"{self.peak} numbers do not fit a fast memory of {self.capacity}: {self.held}")
        return value

    def drop(self, *names: str) -> None:
        """Forget what is no longer needed."""
        for name in names:
            del self.held[name]

    @property
    def traffic(self) -> Traffic:
        """What was moved so far."""
        return Traffic(self.read, self.written)


class Standard:
    """Algorithm 0: three passes, S = QKᵀ, P = softmax(S), O = PV, each of which reads and writes the slow memory."""

    @staticmethod
    def room(n: int, d: int, rows: int, keys: int) -> int:
        """The numbers held at a time; the softmax wants a whole row of scores."""
        return max(rows * d + keys * d + rows * keys, n)

    @staticmethod
    def blocks(n: int, d: int, capacity: int) -> tuple[int, int]:
        """The most queries at a time, beside a few keys."""
        return _largest(lambda rows: Standard.room(n, d, rows, min(KEYS, n)), n, capacity), min(KEYS, n)

    @staticmethod
    def traffic(n: int, d: int, rows: int, keys: int) -> Traffic:
        """4N² for S and P, and the keys and values once for each block of queries."""
        passes = math.ceil(n / rows)
        return Traffic(read=n * d + 2 * passes * n * d + 2 * n * n, written=2 * n * n + n * d)

    @staticmethod
    def run(machine: Machine, rows: int, keys: int) -> None:
        """From Q, K, V to O, through S and P (N, N)."""
        n = len(machine.arrays["Q"])
        machine.arrays |= {name: np.zeros((n, n)) for name in "SP"}
        for i in _parts(n, rows):
            q = machine.load("Q", i)
            for j in _parts(n, keys):
                machine.store("S", machine.hold("S", q @ machine.load("K", j).T), i, j)
            machine.drop("Q", "K", "S")
        for i in _parts(n, 1):
            machine.store("P", _softmax(machine.load("S", i)), i)
            machine.drop("S")
        for i in _parts(n, rows):
            o = machine.hold("O", np.zeros((i.stop - i.start, machine.arrays["O"].shape[1])))
            for j in _parts(n, keys):
                o += machine.load("P", i, j) @ machine.load("V", j)
            machine.store("O", o, i)
            machine.drop("O", "P", "V")


class Published:
    """Algorithm 1: a block of keys and values stays, while queries, outputs, sums ℓ and maxima m come and go."""

    @staticmethod
    def room(n: int, d: int, rows: int, keys: int) -> int:
        """K, V, Q, O, S, ℓ and m."""
        return 2 * keys * d + 2 * rows * d + rows * keys + 2 * rows

    @staticmethod
    def blocks(n: int, d: int, capacity: int) -> tuple[int, int]:
        """The most keys at a time, beside as many queries but not more than d (line 1)."""
        keys = _largest(lambda keys: Published.room(n, d, min(keys, d), keys), n, capacity)
        return min(keys, d), keys

    @staticmethod
    def traffic(n: int, d: int, rows: int, keys: int) -> Traffic:
        """Q, O, ℓ and m for each block of keys, of which there are N/keys = Θ(Nd/M)."""
        passes = math.ceil(n / keys)
        return Traffic(read=2 * n * d + passes * (2 * n * d + 2 * n), written=(passes + 1) * (n * d + 2 * n))

    @staticmethod
    def run(machine: Machine, rows: int, keys: int) -> None:
        """From Q, K, V to O, ℓ and m (N,)."""
        n, d = machine.arrays["Q"].shape
        machine.arrays |= {"l": np.zeros(n), "m": np.zeros(n)}
        for name, value in (("O", np.zeros((n, d))), ("l", np.zeros(n)), ("m", np.full(n, -np.inf))):
            machine.store(name, value)  # line 2; constants need no place
        for j in _parts(n, keys):
            k, v = machine.load("K", j), machine.load("V", j)
            for i in _parts(n, rows):
                q, o, total, m = (machine.load(name, i) for name in ("Q", "O", "l", "m"))
                s = machine.hold("S", q @ k.T)
                raised = np.maximum(m, s.max(1))
                p, before = np.exp(s - raised[:, None]), np.exp(m - raised) * total
                total = before + p.sum(1)
                o = (before[:, None] * o + p @ v) / total[:, None]
                for name, value in (("O", o), ("l", total), ("m", raised)):
                    machine.store(name, value, i)
                machine.drop("Q", "O", "l", "m", "S")
            machine.drop("K", "V")


class Exchanged:
    """The loops exchanged: a block of queries stays until its output is done, and keys and values come."""

    @staticmethod
    def room(n: int, d: int, rows: int, keys: int) -> int:
        """As of algorithm 1."""
        return Published.room(n, d, rows, keys)

    @staticmethod
    def blocks(n: int, d: int, capacity: int) -> tuple[int, int]:
        """The most queries at a time, beside a few keys."""
        return _largest(lambda rows: Exchanged.room(n, d, rows, min(KEYS, n)), n, capacity), min(KEYS, n)

    @staticmethod
    def traffic(n: int, d: int, rows: int, keys: int) -> Traffic:
        """K and V for each block of queries, of which there are N/rows = Θ(Nd/M); O and a logsumexp a row once."""
        return Traffic(read=n * d + math.ceil(n / rows) * 2 * n * d, written=n * d + n)

    @staticmethod
    def run(machine: Machine, rows: int, keys: int) -> None:
        """From Q, K, V to O and the logsumexp L (N,)."""
        n, d = machine.arrays["Q"].shape
        machine.arrays["L"] = np.zeros(n)
        for i in _parts(n, rows):
            q, size = machine.load("Q", i), i.stop - i.start
            o, total, m = np.zeros((size, d)), np.zeros(size), np.full(size, -np.inf)
            for name, value in (("O", o), ("l", total), ("m", m)):
                machine.hold(name, value)
            for j in _parts(n, keys):
                k, v = machine.load("K", j), machine.load("V", j)
                s = machine.hold("S", q @ k.T)
                raised = np.maximum(m, s.max(1))
                p, decay = np.exp(s - raised[:, None]), np.exp(m - raised)
                o, total, m = decay[:, None] * o + p @ v, decay * total + p.sum(1), raised
            machine.store("O", o / total[:, None], i)
            machine.store("L", m + np.log(total), i)
            machine.drop("Q", "K", "V", "O", "S", "l", "m")


KEYS = 16  # of a block where the queries are what stays
ALGORITHMS = (Standard, Published, Exchanged)
Algorithm = type[Standard] | type[Published] | type[Exchanged]


def measured(algorithm: Algorithm, q: Array, k: Array, v: Array, capacity: int) -> tuple[Array, Machine]:
    """Run an algorithm with the largest blocks that fit: the output (N, d), and the machine with what it counted.

    Raises:
        InputError: a fast memory that holds no block.

    >>> x = np.random.default_rng(0).standard_normal((40, 4))
    >>> _, machine = measured(Exchanged, x, x, x, capacity=400)
    >>> machine.traffic == Exchanged.traffic(40, 4, *Exchanged.blocks(40, 4, 400))
    True
    """
    machine = Machine(capacity, Q=q, K=k, V=v, O=np.zeros_like(q))
    n, d = q.shape
    algorithm.run(machine, *algorithm.blocks(n, d, capacity))
    return machine.arrays["O"], machine


def _largest(room: Callable[[int], int], n: int, capacity: int) -> int:
    """The largest size up to n whose block fits."""
    if room(1) > capacity:
        raise InputError(f"a fast memory of {capacity} numbers holds no block; at least {room(1)} are needed")
    low, high = 1, n
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if room(middle) <= capacity else (low, middle - 1)
    return low


def _parts(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _softmax(x: Array) -> Array:
    weights = np.exp(x - x.max(1, keepdims=True))
    return np.asarray(weights / weights.sum(1, keepdims=True))
