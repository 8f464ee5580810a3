"""dominostats.json and the result: replaced whole, and nothing of others is lost."""

from __future__ import annotations

import json
import os
import stat

import pytest

from builder.hook.dashboard import add_stats, write

OURS = {"state": "published", "image": "r/m@sha256:1", "seconds": 1.5}


def test_a_new_file_is_readable_by_others(tmp_path):
    path = tmp_path / "dominostats.json"
    assert add_stats(path, OURS) == ""
    assert json.loads(path.read_text()) == OURS
    mask = os.umask(0o022)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    assert [path.name for path in tmp_path.iterdir()] == ["dominostats.json"]


def test_what_others_wrote_stays(tmp_path):
    path = tmp_path / "dominostats.json"
    path.write_text('{"AUC": 0.98, "state": "trained"}')
    path.chmod(0o640)
    assert add_stats(path, OURS) == ""
    assert json.loads(path.read_text()) == {"AUC": 0.98, **OURS}
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_an_error_goes_when_a_later_hook_publishes(tmp_path):
    path = tmp_path / "dominostats.json"
    add_stats(path, {"state": "failed", "error": "It failed.", "exit_code": 65})
    add_stats(path, OURS)
    assert json.loads(path.read_text()) == OURS


def test_an_error_of_others_stays(tmp_path):
    path = tmp_path / "dominostats.json"
    path.write_text('{"error": 0.02}')
    add_stats(path, OURS)
    assert json.loads(path.read_text()) == {"error": 0.02, **OURS}


@pytest.mark.parametrize("broken", ["", "{", "[1]", '"text"', "null", "\udcff", "[" * 100_000])
def test_a_broken_file_is_left_as_it_is_and_reported(tmp_path, broken):
    path = tmp_path / "dominostats.json"
    path.write_text(broken, errors="surrogateescape")
    before = path.read_bytes()
    problem = add_stats(path, OURS)
    assert str(path) in problem
    assert "left as it is" in problem
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["dominostats.json"]


def test_a_pipe_does_not_make_it_wait(tmp_path):
    path = tmp_path / "dominostats.json"
    os.mkfifo(path)
    assert "no file" in add_stats(path, OURS)


def test_a_folder_that_is_not_there_is_reported(tmp_path):
    assert "cannot be written" in write(tmp_path / "none" / "result.json", OURS)


def test_what_cannot_replace_leaves_nothing_behind(tmp_path):
    (tmp_path / "result.json").mkdir()
    assert "cannot be written" in write(tmp_path / "result.json", OURS)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
