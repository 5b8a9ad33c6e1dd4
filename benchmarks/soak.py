"""A server under load for some minutes: clients that take answers whole or streamed, three in ten of which hang up, and
among them over-long prompts and garbage. At the end no block may be lost, memory may not have grown by more than 3 %,
and every answer must equal the one that the model gives alone.

The server is a process of its own (`allyouneed serve`), whose memory and figures are read from outside.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from allyouneed.generate.language_model import Sampling
from allyouneed.generate.load import load
from allyouneed.generate.local import LocalModel

WORDS = Path(__file__).read_text().split()
QUESTIONS = 24  # different ones: each is answered many times, and once alone
HANGING_UP, GARBAGE, TOO_LONG = 0.3, 0.08, 0.04  # shares
ROUTES = ("completions", "chat/completions", "responses")
ASK = [{"role": "user", "content": "x"}]
ODD = {"type": "text", "text": "x", "odd": 1}
LARGE = [  # bodies that take a server long which validates before it counts
    {"messages": ASK, "logit_bias": {str(i): "x" for i in range(100_000)}},
    {"messages": [{"role": "user", "content": [ODD] * 60_000}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}] * 4000},
    {"messages": ASK, "prompt": [1] * 500_000},
    {"messages": ASK, "tools": [{"type": "function", "function": {"name": "f", "description": "x " * 4000}}] * 100},
]
GARBAGES = [
    b"{",
    b"\xff\xfe",
    b"[" * 50_000,
    b'{"messages": "x"}',
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 99999999}',
    b'{"messages": [{"role": "user", "content": "x"}], "stop": ' + json.dumps(["x"] * 4000).encode() + b"}",
    b'{"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema", "json_schema": '
    b'{"name": "x", "schema": {"allOf": [{"type": "string"}, {"type": "null"}]}}}}',
    *(json.dumps(one).encode() for one in LARGE),
]


@dataclass(frozen=True)
class Question:
    """A prompt, how it is to be continued, and by which route."""

    prompt: str
    sampling: Sampling
    route: str

    @property
    def turns(self) -> Any:
        """As a model in process takes it."""
        return self.prompt if self.route == "completions" else [{"role": "user", "content": self.prompt}]

    @property
    def fields(self) -> dict[str, Any]:
        """As the server takes it."""
        sampling, most = self.sampling, self.sampling.max_new_tokens
        if self.route == "responses":
            return {"input": self.turns, "max_output_tokens": most, "temperature": sampling.temperature}
        name = "prompt" if self.route == "completions" else "messages"
        return {name: self.turns, "max_tokens": most, "temperature": sampling.temperature, "seed": sampling.seed}

    def text(self, answer: dict[str, Any]) -> tuple[str, int]:
        """The text of a whole answer, and how many tokens it has."""
        if self.route == "responses":
            texts = [part["text"] for item in answer["output"] for part in item["content"]]
            return "".join(texts), answer["usage"]["output_tokens"]
        (choice,) = answer["choices"]
        text = choice["text"] if self.route == "completions" else choice["message"]["content"]
        return text, answer["usage"]["completion_tokens"]

    def piece(self, event: dict[str, Any]) -> str:
        """What an event of a stream adds."""
        if self.route == "responses":
            return event["delta"] if event["type"] == "response.output_text.delta" else ""
        choice = event["choices"][0]
        return choice["text"] if self.route == "completions" else choice["delta"].get("content") or ""


@dataclass
class Seen:
    """What became of all requests."""

    kinds: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)  # seconds until the first token
    whole: list[float] = field(default_factory=list)
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)


def questions(source: random.Random) -> list[Question]:
    """Short and long prompts, short and long answers, greedy and drawn."""
    found = []
    for i in range(QUESTIONS):
        length = min(int(source.lognormvariate(3.2, 0.9)) + 2, 50)
        start = source.randrange(max(1, len(WORDS) - length))
        most = min(int(source.lognormvariate(2.6, 0.8)) + 2, 80)
        route = ROUTES[i % 3]
        greedy = i % 2 or route == "responses"  # which knows no seeds
        sampling = Sampling(max_new_tokens=most, temperature=0.0 if greedy else 0.9, seed=i)
        found.append(Question(" ".join(WORDS[start : start + length]), sampling, route))
    return found


async def client(url: str, asked: list[Question], alone: list[str], seen: Seen, end: float, seed: int) -> None:
    """One client, until the end."""
    source = random.Random(seed)
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        while time.monotonic() < end:
            kind = source.random()
            try:
                if kind < GARBAGE:
                    await garbage(http, source, seen)
                elif kind < GARBAGE + TOO_LONG:
                    await too_long(http, seen)
                else:
                    i = source.randrange(len(asked))
                    await ask(http, asked[i], alone[i], source, seen)
            except httpx.HTTPError as error:
                seen.wrong.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(source.expovariate(1.0))


async def garbage(http: httpx.AsyncClient, source: random.Random, seen: Seen) -> None:
    answer = await http.post(
        "/v1/chat/completions", content=source.choice(GARBAGES), headers={"Content-Type": "application/json"}
    )
    seen.kinds[f"garbage {answer.status_code}"] += 1
    if answer.status_code not in (400, 429):
        seen.wrong.append(f"garbage was answered with {answer.status_code}")


async def too_long(http: httpx.AsyncClient, seen: Seen) -> None:
    answer = await http.post("/v1/completions", json={"prompt": "word " * 30_000})
    seen.kinds[f"too long {answer.status_code}"] += 1
    if answer.status_code not in (400, 429):
        seen.wrong.append(f"an over-long prompt was answered with {answer.status_code}")


async def ask(http: httpx.AsyncClient, asked: Question, alone: str, source: random.Random, seen: Seen) -> None:
    """Stream an answer, or take it whole; perhaps hang up before its end."""
    leaves, began = source.random() < HANGING_UP, time.monotonic()
    try:
        if source.random() < 0.7:
            most = source.randrange(asked.sampling.max_new_tokens // 2 + 1) if leaves else None
            text = await streamed(http, asked, seen, most)
        else:
            async with asyncio.timeout(source.uniform(0, 0.3) if leaves else None):
                text = await whole(http, asked, seen)
    except TimeoutError:
        seen.kinds["hung up"] += 1
        return
    if text is None:
        seen.kinds["not answered"] += 1
        return
    seen.kinds["answered"] += 1
    seen.whole.append(time.monotonic() - began)
    if text != alone:
        seen.wrong.append(f"{asked.fields}: {text!r} instead of {alone!r}")


async def streamed(http: httpx.AsyncClient, asked: Question, seen: Seen, most: int | None) -> str | None:
    """The text; with `most`, the connection is closed after so many pieces of it."""
    pieces: list[str] = []
    began = time.monotonic()
    async with http.stream("POST", f"/v1/{asked.route}", json=asked.fields | {"stream": True}) as answer:
        if answer.status_code != 200:
            return refused(answer.status_code, asked, seen)
        async for line in answer.aiter_lines():
            if most is not None and len(pieces) >= most:
                raise TimeoutError
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if event.get("error") or event.get("type") == "error":
                    seen.wrong.append(str(event))
                    return None
                if piece := asked.piece(event):
                    if not pieces:
                        seen.first.append(time.monotonic() - began)
                    pieces.append(piece)
                    seen.tokens += 1
    return "".join(pieces)


async def whole(http: httpx.AsyncClient, asked: Question, seen: Seen) -> str | None:
    answer = await http.post(f"/v1/{asked.route}", json=asked.fields)
    if answer.status_code != 200:
        return refused(answer.status_code, asked, seen)
    text, tokens = asked.text(answer.json())
    seen.tokens += tokens
    return text


def refused(status: int, asked: Question, seen: Seen) -> None:
    """A right request may be sent away for now, and nothing else."""
    if status != 429:
        seen.wrong.append(f"{status} for {asked.route}: {asked.fields}")


def figures(url: str) -> dict[str, float]:
    """The server's own figures."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


async def watch(process: psutil.Process, seen: Seen, began: float, end: float) -> None:
    while time.monotonic() < end:
        await asyncio.sleep(2.0)
        seen.memory.append((time.monotonic() - began, process.memory_info().rss))


async def load_for(url: str, process: psutil.Process, options: argparse.Namespace, alone: list[str]) -> Seen:
    seen, began = Seen(), time.monotonic()
    end = began + 60 * options.minutes
    asked = questions(random.Random(options.seed))
    clients = (client(url, asked, alone, seen, end, options.seed + 1 + i) for i in range(options.clients))
    await asyncio.gather(*clients, watch(process, seen, began, end))
    return seen


def answers_alone(model: str, seed: int) -> list[str]:
    """What the model says to each question when nothing else is asked."""
    lm = load(model)
    assert isinstance(lm, LocalModel)
    asked = questions(random.Random(seed))
    return [lm.complete([one.turns], one.sampling)[0].text for one in asked]


def growth(memory: list[tuple[float, int]]) -> float:
    """How much the last quarter's mean of resident memory is above that of the second quarter: the first warms up."""
    sizes = [size for _, size in memory]
    quarter = max(1, len(sizes) // 4)
    early, late = sizes[quarter : 2 * quarter] or sizes[:1], sizes[-quarter:]
    return (sum(late) / len(late)) / (sum(early) / len(early)) - 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options, served = parser.parse_known_args()
    alone = answers_alone(options.model, options.seed)
    # few blocks: all are in use after a minute, and requests are interrupted now and then
    limits = ["--context", "512", "--blocks", "512"]
    command = [sys.executable, "-m", "allyouneed", "serve", options.model, "--port", "0", *limits, *served]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().split(" at ")[1].split("/v1")[0]
        try:
            before = figures(url)
            seen = asyncio.run(load_for(url, psutil.Process(server.pid), options, alone))
            after = settled(url)
        finally:
            server.terminate()
    return told(seen, before, after, options)


def settled(url: str, seconds: float = 20.0) -> dict[str, float]:
    """The figures once nothing runs any more."""
    end = time.monotonic() + seconds
    found = figures(url)
    while found["allyouneed_requests_running"] + found["allyouneed_requests_waiting"] and time.monotonic() < end:
        time.sleep(0.2)
        found = figures(url)
    return found


def told(seen: Seen, before: dict[str, float], after: dict[str, float], options: argparse.Namespace) -> int:
    """Print what was found; 1 where something is not as it must be."""
    lost = before["allyouneed_engine_free"] - after["allyouneed_engine_free"]
    grown = growth(seen.memory)
    quantiles = {
        name: [round(float(np.quantile(values, q)), 3) for q in (0.5, 0.9, 0.99)] if values else []
        for name, values in (("first token", seen.first), ("whole answer", seen.whole))
    }
    failed = bool(lost or seen.wrong or abs(grown) > 0.03)
    print(f"{options.clients} clients, {options.minutes:g} minutes: {dict(sorted(seen.kinds.items()))}")
    print(f"{seen.tokens / (60 * options.minutes):.1f} tokens/s")
    for name, values in quantiles.items():
        print(f"seconds to {name}: 50 %, 90 %, 99 %: {values}")
    print(f"blocks lost: {lost:g} of {before['allyouneed_engine_blocks']:g}; memory grew by {grown:+.2%}")
    print(f"preempted: {after['allyouneed_engine_preemptions']:g}; wrong: {len(seen.wrong)}")
    for one in seen.wrong[:10]:
        print(f"  {one[:400]}")
    if options.json:
        found = {"kinds": seen.kinds, "quantiles": quantiles, "lost": lost, "grown": grown, "wrong": seen.wrong}
        options.json.write_text(json.dumps(found | {"memory": seen.memory, "before": before, "after": after}))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
