"""MLmodel as MLflow's scoring server will read it."""

from __future__ import annotations

import time

import pytest
import yaml

from builder.errors import InvalidVersion
from builder.model_folder import check_served, repaired

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


def own(tmp_path, text):
    (tmp_path / "m").mkdir(parents=True)
    (tmp_path / "m/MLmodel").write_text(f"flavors:\n  python_function: {{{text}}}\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "files"),
    [
        # Paddle and sktime put endings of their own behind the path.
        ("loader_module: mlflow.paddle, model_path: model", ["model.pdmodel", "model.pdiparams"]),
        ("loader_module: sktime.utils.mlflow_sktime, model_path: model", ["model.zip"]),
        ("loader_module: mlflow.paddle, data: data/model", ["data/model.d/x"]),
    ],
)
def test_a_path_may_be_a_prefix_of_file_names(tmp_path, caplog, text, files):
    context = own(tmp_path, text)
    paths = {"m/MLmodel", *(f"m/{file}" for file in files)}
    check_served(context, "m", paths)
    assert repaired(context, "m", paths) is None
    assert not caplog.records
    with pytest.raises(InvalidVersion, match="no such file"):
        check_served(own(tmp_path / "other", "loader_module: mlflow.paddle, model_path: mode"), "m", paths)


@pytest.mark.parametrize(
    "text",
    [
        "loader_module: my_loader, data: 's3://bucket/weights'",
        "loader_module: my_loader, data: weights.bin",
        "loader_module: mlflow.pyfunc.loaders, data: 'hf://owner/weights'",
        # An object store has no empty folders.
        "loader_module: mlflow.pyfunc.model, artifacts: {words: {path: artifacts/empty, uri: /tmp/empty}}",
    ],
)
def test_what_need_not_be_a_file_is_a_warning(tmp_path, caplog, text):
    context = own(tmp_path, text)
    check_served(context, "m", PATHS)
    assert repaired(context, "m", PATHS) is None
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert any(word in caplog.text for word in ("bucket", "weights", "artifacts/empty"))


def test_a_loader_of_one_s_own_gets_no_path_of_windows(tmp_path):
    with pytest.raises(InvalidVersion, match="Windows"):
        check_served(own(tmp_path, r"loader_module: my_loader, data: 'C:\weights.bin'"), "m", PATHS)


def test_names_are_shown_bounded_and_on_one_line(tmp_path):
    long = "k" * 3_000_000
    texts = (
        f"loader_module: mlflow.pyfunc.model, artifacts: {{? {long} : {{path: gone.txt}}}}",
        f"loader_module: mlflow.pyfunc.model, data: {long}",
        'loader_module: mlflow.pyfunc.model, artifacts: {"\\e[31m\\n\\u202e": {path: gone.txt}}',
    )
    for number, text in enumerate(texts):
        with pytest.raises(InvalidVersion) as caught:
            check_served(own(tmp_path / str(number), text), "m", PATHS)
        assert len(caught.value.what) < 1000
        assert not {"\x1b", "\n", "\u202e"} & set(caught.value.what)


def test_many_paths_are_repaired_in_one_go(tmp_path):
    artifacts = ", ".join(f"a{number}: {{path: 'b\\c'}}" for number in range(12_000))
    context = own(tmp_path, f"loader_module: mlflow.pyfunc.model, artifacts: {{{artifacts}}}, x: '{'😀' * 880_000}'")
    begin = time.thread_time()
    text = repaired(context, "m", {"m/MLmodel", "m/b/c"}).decode()
    assert time.thread_time() - begin < 5
    assert text == (context / "m/MLmodel").read_text(encoding="utf-8").replace("'b\\c'", '"b/c"')


@pytest.mark.parametrize("text", ["flavors: {sklearn: {}}", "flavors: {python_function: x}", "flavors: []", "x", ""])
def test_a_model_that_cannot_be_served(tmp_path, text):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/MLmodel").write_text(text)
    with pytest.raises(InvalidVersion, match="python_function"):
        check_served(tmp_path, "m", PATHS)
