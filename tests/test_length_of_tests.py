"""A test that works too long fails, one that only waits for a busy machine does not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = r"""
import subprocess, sys, time

WORK = "import time; end = time.thread_time() + 1\nwhile time.thread_time() < end: pass"

def test_works(): exec(WORK, {})
def test_lets_work(): subprocess.run([sys.executable, "-c", WORK])
def test_waits(): time.sleep(1)
def test_is_wrong(): assert exec(WORK, {})
"""


def test_long_tests_fail(tmp_path):
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--most-seconds", "0.7"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    failed = {line.split("::")[1].split(" ")[0]: line for line in done.stdout.splitlines() if line.startswith("FAILED")}
    assert set(failed) == {"test_works", "test_lets_work", "test_is_wrong"}, done.stdout
    assert all("more than 0.7" in failed[name] for name in ("test_works", "test_lets_work")), done.stdout
    assert "more than" not in failed["test_is_wrong"]  # what it found wrong comes first
