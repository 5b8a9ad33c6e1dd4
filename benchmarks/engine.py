"""Our engine beside llama.cpp on the same GGUF file: interleaved, medians, with what the machine could give.

    python benchmarks/engine.py [--peer PYTHON] [--threads N] [--rounds N] [--json FILE]

`--peer` is an interpreter that has `llama-cpp-python`, which runs there in a process of its own (`engine_peer.py`);
without it, this one. Both sides read a prompt of 512 tokens; continue one text of 64 tokens; continue eight of them in
one batch. Ours goes through the engine, with sampling; theirs through `llama_decode` and the largest logit.

Two ratios: by the clock, and by the processor time that each side used, which other work on the machine disturbs less
(with several threads it counts their waiting, too). Limits: decoding reads all weights once a token, or once for all
streams; a prompt is bound by arithmetic.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from turns import Seconds, seconds

import allyouneed as ayn
from allyouneed.data import materials
from allyouneed.generate.engine import Engine
from allyouneed.generate.language_model import Sampling
from allyouneed.generate.requests import Request
from allyouneed.nn.flops import product

NAME, PROMPT, TEXT, STREAMS, NEW = "smollm2-135m-instruct", 512, 64, 8, 32
CASES = {"prefill, 512 tokens": PROMPT, "decode, one stream": NEW, "decode, 8 streams": STREAMS * NEW}


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(10, 40000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


class Ours:
    """Seconds of each case through the engine."""

    def __init__(self) -> None:
        self.module = ayn.load_module(NAME, packed=True)
        self.engine = Engine(self.module, config=Engine.Config(share_prefixes=False, blocks=1024))

    def time(self, case: str) -> Seconds:
        if case.startswith("prefill"):
            self._add(PROMPT, 1)
            return seconds(self._finish)
        for _ in range(STREAMS if "8" in case else 1):
            self._add(TEXT, NEW + 1)
        while not self.engine.step():
            pass
        return seconds(self._finish)

    def _add(self, length: int, new: int) -> None:
        sampling = Sampling(max_new_tokens=new, temperature=0, ignore_eos=True)
        self.engine.add(Request(ids=ids(length, seed=length), sampling=sampling))

    def _finish(self) -> None:
        while not self.engine.idle:
            self.engine.step()


class Theirs:
    """The same of a process that answers each name of a case with its seconds."""

    def __init__(self, python: str, threads: int) -> None:
        program = [python, str(Path(__file__).with_name("engine_peer.py")), str(materials.path(NAME)), str(threads)]
        self.process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def time(self, case: str) -> Seconds:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(case + "\n")
        self.process.stdin.flush()
        return Seconds(*json.loads(self.process.stdout.readline()))


def best_rate(amount: float, work: Callable[[], object]) -> float:
    return amount / min(seconds(work).clock for _ in range(5)) / 1e9


def limits() -> tuple[float, float]:
    """GB/s of reading memory and GFLOP/s of a matrix product, by PyTorch's kernels."""
    long, vector, square = torch.ones(16384, 4096), torch.ones(4096), torch.ones(2048, 2048)
    return best_rate(long.nbytes, lambda: long @ vector), best_rate(2 * 2048**3, lambda: square @ square)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", default=sys.executable)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ours, theirs = Ours(), Theirs(arguments.peer, arguments.threads)
    weights = sum(buffer.nbytes for buffer in ours.module.head.buffers()) + sum(
        buffer.nbytes for buffer in ours.module.blocks.buffers()
    )
    work = {1: ours.module.config.flops(1, 1)}
    work[PROMPT] = work[1] - product(ours.module.head, 1)  # the head reads the last token only; without scores
    memory, arithmetic = limits()
    print(f"{arguments.threads} threads; at most {memory:.1f} GB/s, {arithmetic:.0f} GFLOP/s; a token reads", end=" ")
    print(f"{weights / 1e6:.0f} MB and takes {work[1] / 1e6:.0f} MFLOP")
    rows = []
    for case, tokens in CASES.items():
        found = turns_of(theirs, ours, case, arguments.rounds)
        rates = [tokens / statistics.median(side.clock for side in sides) for sides in zip(*found, strict=True)]
        busy = [statistics.median(side.processor for side in sides) for sides in zip(*found, strict=True)]
        row = {"case": case, "llama_cpp_tok_s": rates[0], "allyouneed_tok_s": rates[1], "ratio": rates[1] / rates[0]}
        row |= {
            "processor_ratio": busy[0] / busy[1],
            "gflop_s": rates[1] * work[PROMPT if "prefill" in case else 1] / 1e9,
        }
        row |= {"gb_s": rates[1] / (STREAMS if "8" in case else 1) * weights / 1e9 if "decode" in case else None}
        rows.append(row)
        print(
            f"{case:20} llama.cpp {rates[0]:7.1f} tok/s   allyouneed {rates[1]:7.1f} tok/s   x {row['ratio']:.2f}",
            end="",
        )
        print(f" (processor x {row['processor_ratio']:.2f}); {row['gflop_s']:.0f} GFLOP/s", end="")
        print(f", {row['gb_s']:.1f} GB/s" if row["gb_s"] else "", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def turns_of(theirs: Theirs, ours: Ours, case: str, rounds: int) -> list[tuple[Seconds, Seconds]]:
    """By turns, the first round left out."""
    found = []
    for number in range(rounds + 1):
        sides = {}
        for name, side in (("theirs", theirs), ("ours", ours))[:: 1 if number % 2 else -1]:
            sides[name] = side.time(case)
        found.append((sides["theirs"], sides["ours"]))
    return found[1:]


if __name__ == "__main__":
    main()
