"""MLmodel as MLflow's scoring server will read it."""

from __future__ import annotations

import pytest
import yaml

from builder.build.mlmodel import check_served, repaired
from builder.errors import InvalidVersion

MODEL = """\
# logged on Windows
flavors:
  python_function:
    artifacts:
      words: {{path: {artifact}, uri: 'C:\\x'}}
    env: {{conda: conda.yaml, virtualenv: python_env.yaml}}
    loader_module: {loader}
    model_code_path: {code}
    data: {data}
  sklearn: {{pickled_model: {pickled}}}
  other: {{data: C:\\nowhere}}
run_id: ünïcode
"""
GOOD = {
    "artifact": "artifacts/words.txt",
    "loader": "mlflow.pyfunc.model",
    "code": "/home/me/model.py",
    "data": "data",
    "pickled": "model.pkl",
}
PATHS = {"m/MLmodel", "m/model.py", "m/artifacts/words.txt", "m/data/a/b.bin", "m/model.pkl", "other.bin"}


def write(folder, **changes):
    (folder / "m").mkdir()
    (folder / "m/MLmodel").write_text(MODEL.format(**{**GOOD, **changes}), encoding="utf-8")
    return folder


def test_a_model_that_is_whole_is_left_as_it_is(tmp_path):
    context = write(tmp_path)
    check_served(context, "m", PATHS)
    assert repaired(context, "m", PATHS) is None


@pytest.mark.parametrize(
    ("change", "becomes"),
    [
        ({"code": r"C:\Users\me\model.py"}, {"model_code_path": "model.py"}),
        ({"code": r'"C:\\Users\\me\\model.py"'}, {"model_code_path": "model.py"}),
        ({"code": r"..\src\model.py # mine"}, {"model_code_path": "model.py"}),
        ({"data": r"data\a"}, {"data": "data/a"}),
        ({"data": r"'D:\run\data'"}, {"data": "data"}),
        ({"artifact": r"'artifacts\words.txt'"}, {"artifacts": {"words": {"path": "artifacts/words.txt", "uri": "C:\\x"}}}),
        (
            {"artifact": r"'artifacts\words.txt'", "code": r"C:\model.py", "data": r"x\data"},
            {"model_code_path": "model.py", "data": "data"},
        ),
    ],
)  # fmt: skip
def test_a_path_of_windows_is_repaired_and_nothing_else(tmp_path, change, becomes):
    context = write(tmp_path, **change)
    check_served(context, "m", PATHS)
    text = repaired(context, "m", PATHS).decode()
    before = yaml.safe_load((context / "m/MLmodel").read_text(encoding="utf-8"))
    after = yaml.safe_load(text)
    assert {key: after["flavors"]["python_function"][key] for key in becomes} == becomes
    for key in change:
        name = {"code": "model_code_path", "artifact": "artifacts"}.get(key, key)
        before["flavors"]["python_function"][name] = after["flavors"]["python_function"][name]
    assert after == before
    assert text.startswith("# logged on Windows\n")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"code": r"C:\Users\me\other_model.py"}, "Windows"),
        ({"code": "/home/me/other_model.py"}, "other_model.py"),
        ({"data": "dat"}, "'dat'"),
        ({"data": "../other.bin"}, "other.bin"),
        ({"data": "/etc/passwd"}, "/etc/passwd"),
        ({"artifact": "artifacts/gone.txt"}, "artifacts.words.path"),
        ({"loader": "mlflow.sklearn", "pickled": "model.pickle"}, "sklearn.pickled_model"),
        ({"loader": "''"}, "loader_module"),
        ({"code": r"&p C:\gone", "data": "*p"}, "no such file"),
    ],
)
def test_a_file_that_is_not_there_is_named(tmp_path, change, said):
    with pytest.raises(InvalidVersion) as caught:
        check_served(write(tmp_path, **change), "m", PATHS)
    assert said in caught.value.what
    assert "MLmodel" in caught.value.what


def test_an_alias_is_not_repaired_into_something_else(tmp_path):
    context = write(tmp_path, code=r"&p C:\model.py", data="*p")
    with pytest.raises(InvalidVersion, match="MLmodel"):
        repaired(context, "m", PATHS)


@pytest.mark.parametrize("text", ["flavors: {sklearn: {}}", "flavors: {python_function: x}", "flavors: []", "x", ""])
def test_a_model_that_cannot_be_served(tmp_path, text):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/MLmodel").write_text(text)
    with pytest.raises(InvalidVersion, match="python_function"):
        check_served(tmp_path, "m", PATHS)
