"""The examples of docs/examples that need a server: run against ours."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import allyouneed as ayn

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    command = [sys.executable, "-m", "allyouneed", "serve", MODEL, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield server.stdout.readline().split()[3]
        finally:
            server.terminate()
            server.wait(30)


def test_the_client_gets_what_the_model_says_alone(url: str) -> None:
    done = subprocess.run([sys.executable, EXAMPLES / "client.py", url], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    asked = [{"role": "user", "content": "Why is the sky blue? Answer in one sentence."}]
    said = ayn.load(MODEL).chat(asked, max_new_tokens=40, temperature=0.0)
    whole, streamed, counted = done.stdout.splitlines()
    assert whole.startswith(f"{MODEL}: {said}  (") and streamed == said
    assert counted.endswith("tokens with the question")


def test_the_batch_job_is_the_same_here_and_over_the_wire(url: str, tmp_path: Path) -> None:
    for model, out in ((MODEL, "here.jsonl"), (url, "there.jsonl")):
        command = [sys.executable, "-m", "allyouneed", "generate", model, EXAMPLES / "rows.jsonl", tmp_path / out]
        done = subprocess.run([*command, "--seed", "0", "--json"], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["errors"] == 1
    here, there = ((tmp_path / out).read_text() for out in ("here.jsonl", "there.jsonl"))
    assert here == there
    first, second, third, fourth = map(json.loads, here.splitlines())
    assert "Paris" in first["messages"][-1]["content"] and second["completion_tokens"] == 12
    assert third["error"].startswith("row 3: keys 'temprature'; accepted: prompt or messages")
    assert fourth["custom_id"] == "four" and fourth["error"] is None
