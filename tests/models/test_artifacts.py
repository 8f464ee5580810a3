"""Paths and files that a context may be made of."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.errors import InvalidVersion
from builder.models import Artifact, Inputs
from builder.models import context as module
from builder.models.context import find_model_folder, union
from builder.safe_open import checked_path

RUN, MODEL = "mlflow-artifacts:/1/run/artifacts", "mlflow-artifacts:/1/models/m-1/artifacts"


def artifact(path, root=RUN, size=1):
    return Artifact(path=checked_path(path), size=size, root=root, remote=path)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("/etc/passwd", "absolute"),
        ("//x", "absolute"),
        ("../x", "'..'"),
        ("a/../../x", "'..'"),
        ("a/..", "'..'"),
        ("..", "'..'"),
        ("./x", "empty or '.'"),
        ("a/./x", "empty or '.'"),
        ("a//x", "empty or '.'"),
        ("a/", "empty or '.'"),
        ("", "empty or '.'"),
        (".", "empty or '.'"),
        ("a\\..\\x", "backslash"),
        ("C:\\x", "backslash"),
        ("a\nb", "line break"),
        ("a\rb", "line break"),
        ("a\x00b", "line break"),
        ("a\x1bb", "line break"),
        ("a\x7fb", "line break"),
        ("a\x85b", "line break"),
        ("a\u2028b", "line break"),
        ("a\udcffb", "control character"),
        ("a" * 256, "longer"),
        ("é" * 128, "longer"),
        ("/".join(["a" * 200] * 16), "longer"),
        ("/".join("a" * 65), "deep"),
    ],
)
def test_hostile_paths_are_refused(path, problem):
    with pytest.raises(InvalidVersion, match=problem) as raised:
        checked_path(path)
    assert raised.value.one_line().isprintable()


@pytest.mark.parametrize(
    "path", ["a", "mymodel/MLmodel", "...", "a/..b/c..", ".hidden", "with blank", "a'b\"$(c)`d`", "模型/é", "x" * 255]
)
def test_odd_paths_that_harm_nobody_are_taken(path):
    assert checked_path(path) == path


@given(st.text(max_size=40))
def test_what_passes_stays_below_the_context(tmp_path_factory, path):
    try:
        checked = checked_path(path)
    except InvalidVersion:
        return
    assert checked_path(checked) == checked == unicodedata.normalize("NFC", checked)
    base = tmp_path_factory.getbasetemp().resolve()
    assert (base / checked).resolve().is_relative_to(base)
    assert len((base / checked).relative_to(base).parts) == checked.count("/") + 1


def never(one, other):
    return False


def test_a_union_is_ordered_and_takes_the_later_of_two_same_files():
    run, model = artifact("m/MLmodel"), artifact("m/MLmodel", root=MODEL)
    found = union([artifact("z"), run, artifact("a"), model], same=lambda *_: True, whose="v")
    assert found == (artifact("a"), model, artifact("z"))


@pytest.mark.parametrize(
    "files",
    [
        [artifact("a"), artifact("a", root=MODEL)],
        [artifact("a/b"), artifact("a")],
        [artifact("a"), artifact("a/b/c")],
        [artifact("caf\u00e9"), artifact("cafe\u0301", root=MODEL)],
    ],
    ids=["two contents", "file and folder", "file above a folder", "two spellings"],
)
def test_collisions_are_refused(files):
    with pytest.raises(InvalidVersion, match="version 7"):
        union(files, same=never, whose="version 7")


def test_two_spellings_in_one_folder_are_two_files_even_if_they_are_the_same():
    with pytest.raises(InvalidVersion, match="two different files"):
        union([artifact("caf\u00e9"), artifact("cafe\u0301")], same=lambda *_: True, whose="v")


def test_too_many_files_are_refused(monkeypatch):
    monkeypatch.setattr(module, "MOST_FILES", 3)
    with pytest.raises(InvalidVersion, match="more than 3 files"):
        union((artifact(str(number)) for number in range(9)), same=never, whose="v")


@pytest.mark.parametrize(
    ("paths", "tag", "folder"),
    [
        (["mymodel/MLmodel", "client/app.py"], "", "mymodel"),
        (["a/b/MLmodel"], "", "a/b"),
        (["outer/MLmodel", "outer/artifacts/inner/MLmodel"], "", "outer"),
        (["one/MLmodel", "two/MLmodel"], "two", "two"),
        (["weights/model.bin"], "weights", "weights"),
    ],
)
def test_the_model_folder_is_found(paths, tag, folder):
    assert find_model_folder(paths, Inputs(model_folder=tag)) == folder


@pytest.mark.parametrize(
    ("paths", "tag", "problem"),
    [
        (["one/MLmodel", "two/MLmodel"], "", "'one', 'two'"),
        (["MLmodel", "two/MLmodel"], "", "'', 'two'"),
        (["client/app.py", "a/MLmodel.txt"], "", "No artifact is called MLmodel"),
        ([], "", "No artifact"),
        (["MLmodel"], "", "in no folder of its own"),
        (["mymodel/MLmodel"], "other", "no artifact in that folder"),
        (["mymodel2/MLmodel"], "mymodel", "no artifact in that folder"),
        (["mymodel"], "mymodel", "no artifact in that folder"),
    ],
)
def test_a_model_folder_that_cannot_be_told_is_an_error(paths, tag, problem):
    with pytest.raises(InvalidVersion, match=problem):
        find_model_folder(paths, Inputs(model_folder=tag))


TWO = ["one/MLmodel", "a/two/MLmodel", "two/MLmodel", "two/artifacts/inner/MLmodel", "mod\u00e9l/MLmodel"]


@pytest.mark.parametrize(
    ("source", "folder"),
    [
        ("mlflow-artifacts:/1/run/artifacts/one", "one"),
        ("s3://bucket/1/run/artifacts/two/", "two"),
        ("runs:/0123/a/two", "a/two"),
        ("runs:/0123/two/artifacts/inner", "two/artifacts/inner"),
        ("file:///mlruns/1/run/artifacts/mod%C3%A9l", "mod\u00e9l"),
        ("file:///mlruns/1/run/artifacts/mode\u0301l", "mod\u00e9l"),
    ],
)
def test_of_several_model_folders_the_source_names_the_one_that_was_registered(source, folder):
    assert find_model_folder(TWO, Inputs(source=source)) == folder
    assert find_model_folder(TWO, Inputs(source=source, model_folder="one")) == "one"


@pytest.mark.parametrize("source", ["", "models:/m-1", "runs:/0123/twone", "runs:/0123/one/data"])
def test_a_source_that_names_none_of_several_folders_decides_nothing(source):
    with pytest.raises(InvalidVersion, match="Several folders"):
        find_model_folder(TWO, Inputs(source=source))
