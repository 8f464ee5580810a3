"""The commands of docs/domino.md, run as they stand in a Domino run, or outside of one, with a listener beside it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.launch import clean_environ
from tests.hook.responder import IMAGE, SECRET, responding
from tests.servers.domino import PERSONAL_TOKEN, PROJECT
from tests.waiting import HANG, LONG_HANG

ROOT = Path(__file__).parents[1]
HOOK = (ROOT / "examples/domino/publish_hook.py").read_text()
PATIENT = (
    f"import httpx2; from builder import http; http._TIMEOUT = httpx2.Timeout({HANG});"
    "from builder.__main__ import main; main()"
)
# Those for a cluster, which tests/cluster/ has, and variables that are set in Domino's pages.
OTHERS = re.compile(r"^kubectl |^LISTENER_URL=|sweep --inline", re.MULTILINE)


def blocks(language):
    page = (ROOT / "docs" / "domino.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


@pytest.fixture
def responder():
    with responding() as running:
        yield running


@pytest.fixture
def project(domino, responder, tmp_path):
    """A project with the file, a program, and a listener that takes requests."""
    # A request that is repeated would be counted: both ways to ask wait as long as a busy listener takes.
    text, changed = re.subn(
        r"^REQUEST, HELD, LOOK = 60,", f"REQUEST, HELD, LOOK = {HANG:.0f},", HOOK, flags=re.MULTILINE
    )
    assert changed == 1
    (domino.root / "publish_hook.py").write_text(text)
    (domino.root / "train.py").write_text("print('trained')\n")
    (domino.root / "token").write_text(f"{PERSONAL_TOKEN}\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "builder").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{PATIENT}" "$@"\n')
    (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    domino.environ |= {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "LISTENER_URL": responder.url,
        "SUBMIT_SECRET": SECRET,
        "PYTHONPATH": str(ROOT),
    }
    return domino


def here(text, domino, responder):
    """Return a block with this machine's names in place of the page's."""
    assert f"DOMINO_PROJECT_ID={PROJECT}" in text or "DOMINO_PROJECT_ID" not in text
    names = {"https://builder.example.com": responder.url, "https://domino.example.com": domino.host}
    for name, ours in names.items():
        text = text.replace(name, ours)
    return text


def test_every_block_is_run_or_known(project):
    run = [text for text in blocks("shell") if not OTHERS.search(text)]
    assert len(run) == 4
    assert len(blocks("py")) == 1


@pytest.mark.parametrize("number", [0, 1])
def test_what_a_job_runs(project, responder, small, number):
    script = [text for text in blocks("shell") if not OTHERS.search(text)][number]
    version = small()
    script = here(script, project, responder)
    run = project.ended(project.start(f"set -eu\n{script}", MLFLOW_RUN_ID=version.run_id))
    assert run.status == "Succeeded", run.output
    lines = [line for line in script.splitlines() if line.strip()]
    asked = [about for path, about in responder.taken if path == "/publish"]
    assert len(asked) == len(lines) == run.output.splitlines().count(IMAGE)
    assert asked[0] == {"model": version.name, "version": version.version}
    assert {"model": "pump_alarm", "version": "3"} in asked
    assert run.columns["image"] == IMAGE


def test_what_a_notebook_runs(project, responder):
    (script,) = blocks("py")
    (project.root / "cell.py").write_text(script)
    run = project.ended(project.start("python cell.py"))
    assert run.status == "Succeeded", run.output
    assert f"{IMAGE} ['linux/amd64', 'linux/arm64']" in run.output


@pytest.mark.parametrize("number", [2, 3])
def test_what_is_run_outside(project, responder, number):
    script = here([text for text in blocks("shell") if not OTHERS.search(text)][number], project, responder)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        check=False, capture_output=True, text=True, timeout=LONG_HANG, cwd=project.root,
        env=clean_environ(PATH=project.environ["PATH"], PYTHONPATH=str(ROOT), SUBMIT_SECRET=SECRET),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    if number == 3:
        assert done.stdout == f"{IMAGE}\n"
        return
    assert done.stdout.split() == list(project.runs)
    commands = [run.command for run in project.runs.values()]
    assert commands == ["builder hook pump_alarm 3", "python publish_hook.py pump_alarm 3", "python train.py"]
    asked = [about for path, about in responder.taken if path == "/publish"]
    assert asked == [{"model": "pump_alarm", "version": "3"}] * 2


def test_each_setting_that_the_page_names_exists():
    page = (ROOT / "docs" / "domino.md").read_text()
    settings = (ROOT / "docs" / "settings.md").read_text() + (ROOT / "examples/domino/publish_hook.py").read_text()
    named = set(re.findall(r"\b[A-Z]{4,}_[A-Z_]{2,}\b", page))
    assert named > {"LISTENER_URL", "SUBMIT_SECRET", "BUILDER_PACKAGE", "KUBE_TOKEN", "DOMINO_TOKEN_FILE"}
    # MLflow's own variables are not in the table.
    assert {name for name in named if name not in settings} == set()
