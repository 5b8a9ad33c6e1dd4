"""The page about serving: its curl examples run, its table has every flag, its recipes are taken by what reads them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import httpx
import pytest
import typer
from serving import scripted, serving, tiny

from allyouneed.cli import app

HOME = Path(__file__).resolve().parents[1]
PAGE = (HOME / "docs" / "serving.md").read_text()
EXAMPLES = HOME / "docs" / "examples"
PORT = 8000  # of the page and the recipes


def flags() -> set[str]:
    command = typer.main.get_command(app).commands["serve"]
    return {name for option in command.params for name in (*option.opts, *option.secondary_opts) if name[:2] == "--"}


def curls() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S)
    return [one for block in blocks for one in re.split(r"\n\n", block.strip())]


@pytest.fixture(scope="module")
def server():
    with serving(tiny()) as running:
        yield running


@pytest.mark.parametrize("command", curls())
def test_curl(server, command):
    assert f"http://127.0.0.1:{PORT}" in command
    here = command.replace(f"http://127.0.0.1:{PORT}", server.url)
    done = subprocess.run(here, shell=True, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    if '"stream": true' in command:
        events = [line[6:] for line in done.stdout.splitlines() if line.startswith("data: ")]
        *chunks, last, end = [json.loads(event) if event != "[DONE]" else event for event in events]
        (reason,) = {c["choices"][0]["finish_reason"] for c in chunks} - {None}
        assert end == "[DONE]" and last["choices"] == []
        if reason == "length":  # drawn without a seed: it may end by itself
            assert last["usage"]["completion_tokens"] == 12
        else:
            assert reason == "stop" and 1 <= last["usage"]["completion_tokens"] <= 12
    else:
        assert "error" not in json.loads(done.stdout)


def test_the_table_has_every_flag():
    table = PAGE.partition("## Flags")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(--[a-z0-9-]+)", table.replace("`--", "` `--")))
    assert flags() - {"--help", "--share-prefixes"} <= named <= flags() | {"--host"}


@pytest.mark.parametrize("name", ["Containerfile", "allyouneed.service"])
def test_recipes_name_only_flags_there_are(name):
    text = (EXAMPLES / name).read_text()
    lines = [line for line in text.splitlines() if line.startswith(("ExecStart", "ENTRYPOINT"))]
    assert lines and all(set(re.findall(r"--[a-z0-9-]+", line)) <= flags() for line in lines)
    for source in re.findall(r"^COPY (.*) \S+$", text, re.M):
        assert all((HOME / one).exists() for one in source.split())


def test_the_image_installs_known_versions_and_owns_its_volume():
    lines = (EXAMPLES / "Containerfile").read_text().splitlines()
    installs = [i for i, line in enumerate(lines) if "pip install" in line]
    copied = next(i for i, line in enumerate(lines) if line.startswith("COPY") and "constraints.txt" in line)
    assert installs and all(i > copied and "-c constraints.txt" in lines[i] for i in installs)
    (volume,) = (line.split()[1] for line in lines if line.startswith("VOLUME"))
    assert lines.index(f"VOLUME {volume}") > lines.index(f"RUN mkdir -p {volume}") > lines.index("USER server")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_the_unit_is_one(tmp_path):
    unit = tmp_path / "allyouneed.service"
    unit.write_text(
        (EXAMPLES / "allyouneed.service").read_text().replace("/opt/allyouneed/.venv/bin/allyouneed", "/bin/true")
    )
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    said = [line for line in done.stderr.splitlines() if "allyouneed.service" in line]
    assert not said, said


@pytest.mark.skipif(shutil.which("nginx") is None, reason="no nginx here")
def test_tokens_come_through_a_proxy_one_by_one(tmp_path):
    with serving(scripted("The quick brown fox " * 15, seconds=0.03), api_key="key") as server:
        through_a_proxy(server, tmp_path)


def through_a_proxy(server, tmp_path) -> None:
    site = (EXAMPLES / "nginx.conf").read_text()
    site = site.replace(f"127.0.0.1:{PORT}", server.url.removeprefix("http://")).replace(
        "listen 8080", f"listen unix:{tmp_path}/site"
    )
    temporary = " ".join(
        f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/pid; error_log {tmp_path}/errors; daemon off; events {{}}\n"
        f"http {{ access_log off; {temporary}\n{site}\n}}"
    )
    proxy = subprocess.Popen(["nginx", "-p", str(tmp_path), "-c", f"{tmp_path}/nginx.conf"], stderr=subprocess.PIPE)
    try:
        transport = httpx.HTTPTransport(uds=f"{tmp_path}/site", retries=20)
        key = {"Authorization": f"Bearer {server.key}"}
        client = httpx.Client(transport=transport, base_url="http://proxy", timeout=30, headers=key)
        while not (tmp_path / "site").exists():
            assert proxy.poll() is None, proxy.stderr.read()
            time.sleep(0.02)
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/metrics").status_code == 403
        sent = {"prompt": "The", "max_tokens": 300, "stream": True, "temperature": 0, "ignore_eos": True}
        with client.stream("POST", "/v1/completions", json=sent) as answer:
            heaps = sum(1 for _ in answer.iter_raw())
        assert heaps > 20
        with client.stream("POST", "/v1/completions", json=sent | {"n": 3}) as answer:
            next(answer.iter_raw())
        assert server.settles(5)  # the hang-up came through
    finally:
        proxy.terminate()
        proxy.wait()
