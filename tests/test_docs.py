"""The README's and the docs' commands and examples do what they say: they are run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parents[1]
PAGES = [HOME / "README.md", *sorted((HOME / "docs").glob("*.md"))]


def blocks(kind: str) -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        pattern = re.compile(rf"^```{kind}\n(.*?)^```", re.M | re.S)
        found += [(f"{page.name}-{n}", text) for n, text in enumerate(pattern.findall(page.read_text()))]
    return found


def commands() -> list[str]:
    """Every line of the `sh` blocks that calls us, once."""
    lines = [line.split("#")[0].strip() for _, text in blocks("sh") for line in text.splitlines()]
    return list(dict.fromkeys(line for line in lines if "allyouneed" in line))


def test_there_is_something_to_run():
    assert len(commands()) >= 10 and len(blocks("python")) >= 3


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where a reader sits who does all that the pages say."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(HOME / "docs" / "examples", folder / "docs" / "examples")
    return folder


@pytest.mark.parametrize("page", sorted({name.rsplit("-", 1)[0] for name, _ in blocks("python")}))
def test_examples(page, folder):
    """The examples of one page, one after the other as a reader would run them."""
    program = "\n".join(text for name, text in blocks("python") if name.rsplit("-", 1)[0] == page)
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("command", commands())
def test_commands(command, folder):
    """In the order of the pages; a command may use what the examples and earlier commands left."""
    here = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{here}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_make_targets_exist():
    makefile = (HOME / "Makefile").read_text()
    named = {
        shlex.split(line)[1]
        for _, text in blocks("sh")
        for line in (one.split("#")[0].strip() for one in text.splitlines())
        if line.startswith("make ")
    }
    assert named and all(re.search(rf"^{target}:", makefile, re.M) for target in named)


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
