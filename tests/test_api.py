"""The public face: what it names, what it costs, and that its page's examples run."""

from __future__ import annotations

import contextvars
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import builder.api
from builder.log import stage, taken
from builder.process import side_by_side
from scripts.launch import clean_environ
from tests.models.http_answers import Answers, answering_server
from tests.servers.small import small_files
from tests.waiting import HANG

PAGE = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
TABLE = PAGE.partition("## What there is")[2].partition("\n## ")[0]


def test_every_name_is_there_and_is_documented():
    assert all(getattr(builder.api, name) for name in builder.api.__all__)
    assert sorted(builder.api.__all__) == builder.api.__all__
    documented = set(re.findall(r"`([A-Za-z_]+)`", re.sub(r"(?m)^(\|[^|]*\|)(.*)", r"\1", TABLE)))
    also = set(re.findall(r"`([A-Z][A-Za-z]+)`", "\n".join(re.findall(r"also (.*)", TABLE))))
    assert documented | also == set(builder.api.__all__)


def test_every_error_is_named():
    """A name that `builder.errors` gives to an error is public."""
    errors = {error.__name__ for error in vars(builder.errors).values() if is_error(error)}
    assert errors <= set(builder.api.__all__)


def is_error(value):
    return isinstance(value, type) and issubclass(value, BaseException) and value.__module__ == "builder.errors"


def test_importing_it_imports_nothing_else():
    code = "import builder.api, sys; print(sorted(m for m in sys.modules if m.startswith('builder')))"
    path = os.pathsep.join(filter(None, sys.path))
    ran = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=clean_environ(PYTHONPATH=path)
    )
    assert ran.stdout == "['builder', 'builder.api']\n"


def test_the_examples_of_its_page_run_in_their_order(small, small_environ, tmp_path, monkeypatch, capsys):
    for path, content in small_files().items():
        file = tmp_path / path.replace("mymodel", "saved")
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
    model = small()
    model.set_tag("EXTERNAL_TARGET_PLTR_FOUNDRY", "false")
    name = f"api {model.name}"
    environ = small_environ(model, MODEL_NAME="", MODEL_VERSION="", TARGET_TAG=f"EXTERNAL_TARGET_{model.name}")
    for variable, value in environ.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(tmp_path)
    blocks = [block.replace("pump_alarm", name) for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)]
    # A version is there before it is published.
    blocks.sort(key=lambda block: "register(where" not in block)
    namespace = {"os": os}
    for block in blocks:
        exec(compile(block, "docs/api.md", "exec"), namespace)
    said = capsys.readouterr().out
    assert re.search(r"@sha256:[0-9a-f]{64} \('linux/amd64',\) True", said)
    assert "nothing" in said
    assert "published" in said
    assert f"model '{name}' version 1 warm" in said
    assert f"model '{name}' version 1 current" in said
    assert (tmp_path / "downloaded").is_dir()
    assert os.environ["MLFLOW_TRACKING_URI"] == environ["MLFLOW_TRACKING_URI"]


def test_publishes_one_after_the_other_do_not_see_each_other_s_settings():
    before = dict(os.environ)
    first, second = Answers(status=403), Answers(status=403)
    with answering_server(first) as one, answering_server(second) as other:
        for uri, more in ((one, {"MLFLOW_TRACKING_TOKEN": "token-of-the-first"}), (other, {})):
            settings = builder.api.Settings.from_environ(
                {
                    "MLFLOW_TRACKING_URI": uri,
                    "REGISTRY_URL": "r.test/x",
                    "MODEL_NAME": "m",
                    "MODEL_VERSION": "1",
                    **more,
                }
            )
            with pytest.raises(builder.api.PermissionRefused):
                builder.api.publish(settings)
    assert first.headers[0]["Authorization"] == "Bearer token-of-the-first"
    assert "Authorization" not in second.headers[0]
    assert dict(os.environ) == before


def test_timings_are_those_of_one_publish():
    begun, done = threading.Event(), threading.Event()

    def other():
        taken()
        with stage("theirs"):
            begun.set()
            done.wait(HANG)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(other,))
    taken()
    with stage("ours"):
        thread.start()
        assert begun.wait(HANG)

        def work(number):
            with stage("in a thread"):
                return number

        assert sorted(side_by_side(work, [1, 2], threads=2, every=60)) == [1, 2]
    done.set()
    thread.join()
    assert set(taken()) == {"ours", "in a thread"}
    assert taken() == {}
