"""What a killed publisher left in the temporary folder is removed by the next one, and nothing else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from builder.publish import workspace_of
from builder.settings import CommonSettings
from tests.waiting import HANG

ROOT = Path(__file__).parent.parent
_HOLDS = """
import sys
from builder.publish import workspace_of
from builder.settings import CommonSettings
with workspace_of(CommonSettings()) as workspace:
    (workspace.folder / "large").write_bytes(bytes(1000))
    print(workspace.folder, flush=True)
    sys.stdin.read()
"""


def aged(folder):
    os.utime(folder, (0, 0))
    return folder


def test_only_what_a_dead_process_left_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("builder.process._YOUNG", HANG)
    environ = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", _HOLDS]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        subprocess.Popen(command, env=environ, cwd=ROOT, text=True, **pipes) as alive,
        subprocess.Popen(command, env=environ, cwd=ROOT, text=True, **pipes) as killed,
    ):
        living = aged(Path(alive.stdout.readline().strip()))
        dead = aged(Path(killed.stdout.readline().strip()))
        killed.send_signal(signal.SIGKILL)
        killed.wait(HANG)
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir(mode=0o700)
        prefix = dead.name[:-8]
        young, shared = Path(tempfile.mkdtemp(prefix=prefix)), Path(tempfile.mkdtemp(prefix=prefix))
        shared.chmod(0o777)
        (tmp_path / f"{prefix}linked").symlink_to(aged(elsewhere))
        others = aged(Path(tempfile.mkdtemp(prefix="builder-")))
        stay = [living, elsewhere, young, aged(shared), others]
        with workspace_of(CommonSettings()) as workspace:
            assert not dead.exists()
            assert all(folder.exists() for folder in stay)
        assert not workspace.folder.exists()
        alive.stdin.close()
        assert alive.wait(HANG) == 0
    assert not living.exists()
