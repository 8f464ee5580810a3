"""The workspace: what the build phase leaves is read as a stranger's."""

from __future__ import annotations

import os

import pytest

from builder.errors import BuildFailed, InvalidSettings, PermissionRefused, ServiceUnavailable, TryAgain, UsageError
from builder.reference import Platform
from builder.workspace import BuildResult, Workspace


@pytest.fixture
def workspace(tmp_path):
    made = Workspace(tmp_path / "workspace")
    made.folder.mkdir()
    made.prepare()
    return made


def test_a_build_result_is_read_back_unchanged(workspace):
    result = BuildResult(engine="buildah", built=(Platform("linux", "amd64"),))
    workspace.write_result(result)
    assert workspace.result() == result
    result.check()


@pytest.mark.parametrize("kind", [BuildFailed, ServiceUnavailable, TryAgain, InvalidSettings])
def test_a_failure_is_raised_as_what_it_was(workspace, kind):
    workspace.write_result(BuildResult().failing(kind("RUN pip failed.", remedy="Look.")))
    with pytest.raises(kind, match=r"RUN pip failed\. Look\."):
        workspace.result().check()


def test_a_stranger_cannot_choose_another_error(workspace):
    workspace.write_result(BuildResult(failure=PermissionRefused.__name__, what="x"))
    with pytest.raises(BuildFailed):
        workspace.result().check()


def test_a_failure_is_one_line(workspace):
    workspace.write_result(BuildResult(failure="BuildFailed", what="a\x1b[2J\nb" * 500))
    with pytest.raises(BuildFailed) as caught:
        workspace.result().check()
    assert caught.value.what.isprintable()


def _link(path):
    path.unlink()
    path.symlink_to("/etc/hostname")


def _fifo(path):
    path.unlink()
    os.mkfifo(path)


def _folder(path):
    path.unlink()
    path.mkdir()


HOSTILE = {
    "a link": _link,
    "a pipe": _fifo,
    "a folder": _folder,
    "nothing": os.unlink,
    "an empty file": lambda path: path.write_text(""),
    "no JSON": lambda path: path.write_text("{"),
    "bytes": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "another type": lambda path: path.write_text("[]"),
    "more fields": lambda path: path.write_text('{"engine": "x", "reference": "evil.example.com/a:v1"}'),
    "a long text": lambda path: path.write_text('{"what": "' + "x" * 5000 + '"}'),
    "deep nesting": lambda path: path.write_text("[" * 100_000),
    "two mebibytes": lambda path: path.write_text(" " * (2 << 20)),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_result_is_a_failed_build(workspace, make):
    make(workspace.folder / "result.json")
    with pytest.raises(BuildFailed, match="no readable result"):
        workspace.result()


@pytest.mark.parametrize("make", [_link, _fifo, _folder])
def test_a_result_is_written_through_nothing_that_a_build_left(workspace, tmp_path, make):
    other = tmp_path / "other"
    other.write_text("kept")
    path = workspace.folder / "result.json"
    make(path)
    if path.is_symlink():
        path.unlink()
        path.symlink_to(other)
    with pytest.raises(BuildFailed, match="replaced by something"):
        workspace.write_result(BuildResult())
    assert other.read_text() == "kept"


def test_a_dockerfile_is_written_through_no_link(workspace, tmp_path):
    other = tmp_path / "other"
    other.write_text("kept")
    workspace.context.mkdir(exist_ok=True)
    for target in (other, tmp_path):
        workspace.dockerfile.unlink(missing_ok=True)
        workspace.dockerfile.symlink_to(target)
        workspace.write_dockerfile(b"FROM a")
        assert workspace.dockerfile.read_bytes() == b"FROM a"
        assert not workspace.dockerfile.is_symlink()
    assert other.read_text() == "kept"


def test_without_fetch_there_is_no_plan(tmp_path):
    with pytest.raises(UsageError, match="builder fetch"):
        Workspace(tmp_path).plan()


def test_what_an_earlier_run_left_is_removed_and_the_rest_stays(workspace):
    workspace.context.mkdir()
    (workspace.context / "old").touch()
    workspace.layout(Platform("linux", "amd64")).mkdir()
    (workspace.folder / "mine").touch()
    workspace.prepare()
    assert sorted(path.name for path in workspace.folder.iterdir()) == ["layouts", "mine", "result.json"]
    assert not any((workspace.folder / "layouts").iterdir())


def test_links_an_earlier_run_left_are_not_followed(workspace, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").touch()
    (workspace.folder / "layouts").rmdir()
    (workspace.folder / "layouts").symlink_to(victim)
    workspace.prepare()
    assert (victim / "file").exists()


def test_a_workspace_that_cannot_be_made_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidSettings, match="workspace"), Workspace(tmp_path / "file" / "workspace").locked():
        pass


def test_two_publishes_do_not_share_a_workspace(workspace):
    with (
        workspace.locked(),
        pytest.raises(TryAgain, match="BUILDER_WORKSPACE"),
        Workspace(workspace.folder).locked(),
    ):
        pass
    with workspace.locked():
        pass


def test_a_plan_of_an_earlier_run_is_not_taken_for_this_ones(workspace):
    (workspace.folder / "plan.json").write_text("{}")
    workspace.clear_plan()
    with pytest.raises(UsageError, match="builder fetch"):
        workspace.plan()


def test_a_context_that_a_download_left_unfinished_is_kept(workspace):
    workspace.context.mkdir()
    (workspace.context / "half").touch()
    workspace.prepare(keep_context=True)
    assert (workspace.context / "half").exists()
