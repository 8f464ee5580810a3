"""The program as its users run it: a process with an environment, stdout, stderr and an exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from builder.cli import builder as commands
from builder.errors import ExitCode
from tests.patience import PATIENT
from tests.versions import MLMODEL, register, seed_layout
from tests.waiting import HANG, LONG_HANG, until

COPIES = "FROM {base}\nCOPY $model_folder /app/$model_folder\nUSER 10001\n"


@pytest.fixture
def builder(mlflow_server, registry, tmp_path):
    """Run `python -m builder`; gives the finished process."""
    base = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "MLFLOW_TRACKING_URI": mlflow_server.uri,
        **PATIENT,
        "REGISTRY_URL": f"{registry.host}/cli",
        "SMOKE_TEST": "off",
    }

    def run(*arguments, **environ):
        return subprocess.run(
            [sys.executable, "-m", "builder", *arguments],
            check=False, text=True, capture_output=True, env={**base, **environ}, timeout=LONG_HANG,
        )  # fmt: skip

    run.environ = base
    return run


def bare(*arguments, **environ):
    return subprocess.run(
        [sys.executable, "-m", "builder", *arguments],
        check=False, text=True, capture_output=True, env={"PATH": os.environ["PATH"], **environ}, timeout=LONG_HANG,
    )  # fmt: skip


def last_line(done):
    """Return the last line of stderr, which says what came of it, with a time as every line has one."""
    line = json.loads(done.stderr.strip().splitlines()[-1])
    assert datetime.now(UTC) - datetime.fromisoformat(line["timestamp"]) < timedelta(hours=1)
    return line


def failure(done):
    """Return the last line of stderr, which says what failed."""
    line = last_line(done)
    assert (line["event"], line["level"], line["exit_code"]) == ("failed", "error", done.returncode)
    assert line["error"]
    return line


COMMANDS = ("publish", "plan", "fetch", "build", "push", "sweep", "warm", "download", "register", "hook")


def test_help_goes_to_stdout_and_lists_every_command():
    done = bare("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert all(f"\n  {command} " in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    done = bare(command, "--help")
    assert done.returncode == 0
    assert f"builder {command}" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns_and_has_examples_that_exist_and_exit_codes(command):
    said = bare(command, "--help", COLUMNS="80").stdout
    assert max(map(len, said.splitlines())) <= 80
    examples, _, codes = said.partition("Examples:")[2].partition("Exit codes:")
    assert codes.strip()
    assert f"builder {command}" in examples
    for number in re.findall(r"\b[6-7][0-9]\b", codes):
        assert int(number) in set(ExitCode)
    options = {option for parameter in commands.commands[command].params for option in parameter.opts}
    assert set(re.findall(r" (--[a-z-]+)", examples)) <= options


def test_help_names_every_exit_code():
    listed = re.findall(r"(?m)^ +([0-9]+)  +\w", bare("--help").stdout.partition("Exit codes:")[2])
    assert [int(code) for code in listed] == sorted(ExitCode)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["publis"],
        ["publish", "--frobnicate"],
        ["publish", "a", "1", "b"],
        ["download"],
        ["register"],
        ["warm", "--python=3.11"],
        ["warm", "--requirements=x", "--python=3"],
    ],
)
def test_a_wrong_command_line_is_usage(arguments):
    done = bare(*arguments)
    assert done.returncode == ExitCode.USAGE
    assert done.stdout == ""
    assert "builder" in done.stderr


@pytest.mark.parametrize("command", [["publish"], ["plan"], ["fetch"], ["push"], ["sweep"], ["warm"]])
def test_missing_settings_are_said_at_once(command):
    done = bare(*command)
    assert done.returncode == ExitCode.CONFIG
    assert done.stdout == ""
    assert {"MLFLOW_TRACKING_URI", "REGISTRY_URL"} <= set(failure(done)["what"].replace(":", " ").split())


@pytest.mark.parametrize("command", [["download", "x"], ["register", "--name=x", "--model=x"]])
def test_what_talks_to_mlflow_alone_needs_no_registry(command):
    done = bare(*command)
    assert done.returncode == ExitCode.CONFIG
    assert "REGISTRY_URL" not in failure(done)["what"]


def test_download_with_a_version_needs_a_model(tmp_path):
    done = bare("download", str(tmp_path), "--version", "3", MLFLOW_TRACKING_URI="http://127.0.0.1:1")
    assert done.returncode == ExitCode.USAGE
    assert "--model" in done.stderr


def test_what_fails_is_a_line_of_the_log_like_all_others(tmp_path):
    environ = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:1", "REGISTRY_URL": "127.0.0.1:1/x", "HOME": str(tmp_path)}
    environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    done = bare("publish", "a model", "7", **environ, LOG_FORMAT="json", LOG_LEVEL="error")
    line = failure(done)
    assert (done.returncode, line["model"], line["version"]) == (69, "a model", "7")
    assert line["remedy"]


BROKEN = """\
import sys
from builder import __main__
from builder.batch import download
def broken(*_, **__):
    raise RuntimeError("one\\nforged: line")
download.download_all = broken
sys.argv[1:] = ["download", "/nonexistent"]
__main__.main()
"""


def test_a_defect_is_one_line_of_the_log_with_its_traceback():
    environ = {"PATH": os.environ["PATH"], "MLFLOW_TRACKING_URI": "http://127.0.0.1:1"}
    done = subprocess.run(
        [sys.executable, "-c", BROKEN], check=False, text=True, capture_output=True, env=environ, timeout=HANG
    )
    line = failure(done)
    assert done.returncode == ExitCode.SOFTWARE
    assert len(done.stderr.splitlines()) == 1
    assert "in broken" in line["exception"]
    assert "report it" in line["remedy"]


def test_an_error_on_a_terminal_is_for_people():
    done = bare("publish", LOG_FORMAT="text")
    assert done.stderr.startswith("error: The settings cannot be used")
    assert "\n  what to do: " in done.stderr


def test_publish_prints_the_digest_reference_and_nothing_else(builder, mlflow_server, base_image, crane, tmp_path):
    model = register(mlflow_server.uri, seed_layout(base_image, COPIES))
    message = tmp_path / "termination-log"
    message.touch()
    done = builder("publish", model.name, model.version, TERMINATION_LOG=str(message))
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert crane("digest", line).strip() == line.partition("@")[2]
    told = json.loads(message.read_text())
    seconds = told.pop("seconds")
    assert seconds.keys() == {"fetch", "build", "push"}
    assert all(0 < each < LONG_HANG for each in seconds.values())
    # Buildah packs the layers of the base again, and so nothing of this image is there.
    assert (told.pop("sent") > 0, told.pop("saved")) == (True, 0)
    assert told == {
        "state": "published",
        "image": line,
        "tag": f"{builder.environ['REGISTRY_URL']}/{model.name}:v1",
        "platforms": ["linux/amd64"],
        "changed": True,
        "method": "dockerfile",
    }
    assert all(json.loads(each)["event"] for each in done.stderr.splitlines() if each.startswith("{"))
    again = builder("publish", MODEL_NAME=model.name, MODEL_VERSION=model.version)
    assert again.stdout == done.stdout


def test_the_three_phases_hand_over_through_the_workspace(builder, mlflow_server, base_image, tmp_path):
    model = register(mlflow_server.uri, seed_layout(base_image, COPIES))
    workspace = {"BUILDER_WORKSPACE": str(tmp_path / "w")}
    fetched = builder("fetch", model.name, model.version, **workspace)
    assert (fetched.returncode, fetched.stdout) == (0, ""), fetched.stderr
    # The build phase is told of neither MLflow nor the registry.
    built = bare("build", **workspace, HOME=str(tmp_path))
    assert (built.returncode, built.stdout) == (0, ""), built.stderr
    pushed = builder("push", **workspace)
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.startswith(f"{builder.environ['REGISTRY_URL']}/{model.name}@sha256:")
    of_version = {"model": model.name, "version": model.version, "phase": "end", "level": "info"}
    end = last_line(fetched)
    assert end.items() >= {**of_version, "event": "fetched", "action": "publish", "platforms": ["linux/amd64"]}.items()
    assert end["bytes"] > 0
    assert end["seconds"] > 0
    end = last_line(pushed)
    assert end.items() >= {**of_version, "event": "published", "method": "dockerfile"}.items()
    assert end["digest"] in pushed.stdout
    again = builder("fetch", model.name, model.version, **workspace)
    assert last_line(again)["action"] == "nothing"
    again = builder("push", **workspace)
    assert last_line(again)["event"] == "already published"


def test_a_failed_build_exits_0_and_push_exits_73(builder, mlflow_server, base_image, tmp_path):
    model = register(mlflow_server.uri, seed_layout(base_image, "FROM {base}\nRUN echo the-reason >&2; false\n"))
    workspace = {"BUILDER_WORKSPACE": str(tmp_path / "w")}
    assert builder("fetch", model.name, model.version, **workspace).returncode == 0
    assert bare("build", **workspace, HOME=str(tmp_path)).returncode == 0
    message = tmp_path / "termination-log"
    message.touch()
    pushed = builder("push", **workspace, TERMINATION_LOG=str(message))
    assert pushed.returncode == ExitCode.CANNOT_CREATE
    assert pushed.stdout == ""
    assert failure(pushed)["exit_code"] == 73
    assert json.loads(message.read_text())["state"] == "failed"
    assert model.outcome()["state"] == "failed"
    about = {"model": model.name, "version": model.version, "phase": "push"}
    assert failure(pushed).items() >= about.items()


@pytest.mark.parametrize("phase", ["build", "push"])
def test_a_phase_without_the_one_before_it_says_so(builder, phase, tmp_path):
    done = builder(phase, BUILDER_WORKSPACE=str(tmp_path))
    assert done.returncode == ExitCode.USAGE
    assert "builder fetch" in failure(done)["remedy"]


def test_plan_is_for_people_and_for_programs(builder, mlflow_server, base_image):
    model = register(mlflow_server.uri, seed_layout(base_image, COPIES))
    done = builder("plan", model.name, model.version)
    assert done.returncode == 0, done.stderr
    assert "the tag does not exist" in done.stdout
    assert f"  FROM {base_image}" in done.stdout
    planned = json.loads(builder("plan", "--json", model.name, model.version).stdout)
    assert planned["action"] == "publish"
    assert planned["platforms"][0]["platform"] == "linux/amd64"


def test_no_such_version(builder):
    done = builder("publish", "nobody", "1")
    assert done.returncode == ExitCode.NO_INPUT
    assert "nobody" in failure(done)["what"]


def test_no_secret_is_printed(builder, mlflow_server, base_image):
    model = register(mlflow_server.uri, seed_layout(base_image, COPIES))
    done = builder(
        "publish", model.name, model.version,
        REGISTRY_USER="me", REGISTRY_TOKEN="t0k3n-of-mine", MLFLOW_TRACKING_PASSWORD="passw0rd-of-mine",
        MLFLOW_TRACKING_USERNAME="me", LOG_LEVEL="debug",
    )  # fmt: skip
    assert "of-mine" not in done.stderr + done.stdout


def sleeping(step):
    """Return the processes whose command is `step`."""
    found = subprocess.run(["pgrep", "-f", f"^{step}$"], check=False, capture_output=True, text=True)
    assert found.returncode in {0, 1}, found.stderr
    return found.stdout.split()


def test_sigterm_ends_the_engine_first(builder, mlflow_server, base_image, tmp_path):
    # No other process of the machine sleeps as long.
    step = f"sleep {int.from_bytes(os.urandom(3)) + 10_000}"
    model = register(mlflow_server.uri, seed_layout(base_image, f"FROM {{base}}\nRUN echo it-runs; exec {step}\n"))
    with subprocess.Popen(
        [sys.executable, "-m", "builder", "publish", model.name, model.version],
        env={**builder.environ, "BUILDER_WORKSPACE": str(tmp_path / "w")},
        text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        for line in process.stderr:
            if "it-runs" in line and '"RUN' not in line and "STEP" not in line:
                break
        until(lambda: sleeping(step))
        process.send_signal(signal.SIGTERM)
        stdout, _ = process.communicate(timeout=HANG)
    assert process.returncode == ExitCode.TEMPORARY
    assert stdout == ""
    # What was killed may take a moment to be gone.
    until(lambda: not sleeping(step))


def test_register_prints_the_version(builder, tmp_path, base_image):
    model = tmp_path / "model"
    model.mkdir()
    (model / "MLmodel").write_text(MLMODEL)
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "app.py").write_text("print(1)\n")
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "Dockerfile.template").write_text(COPIES.format(base=base_image))
    arguments = ("--name", "Registered Here", "--model", str(model), "--client", str(tmp_path / "client"))
    arguments += ("--templates", str(tmp_path / "templates"), "--entry-point", "app.py")
    done = builder("register", *arguments)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    published = builder("publish", "Registered Here", "1")
    assert published.returncode == 0, published.stderr
    (tmp_path / "templates" / "Dockerfile.template").write_text("FROM x\nCOPY ${modle_folder} /\n")
    refused = builder("register", *arguments)
    assert refused.returncode == ExitCode.DATA
    assert "model_folder" in failure(refused)["what"] + failure(refused)["remedy"]


def test_a_closed_stdout_is_no_defect(builder, mlflow_server, base_image):
    model = register(mlflow_server.uri, seed_layout(base_image, COPIES))
    with subprocess.Popen(
        [sys.executable, "-m", "builder", "plan", model.name, model.version],
        env=builder.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        process.stdout.close()
        said = process.stderr.read()
    assert "Traceback" not in said
    assert process.returncode == ExitCode.TEMPORARY


def test_warm_says_what_it_did_and_prints_nothing(builder, small, small_environ, tmp_path):
    model = small()
    model.set_tag(f"EXTERNAL_TARGET_{model.name}", "true")
    message = tmp_path / "termination-log"
    message.touch()
    environ = small_environ(model, TARGET_TAG=f"EXTERNAL_TARGET_{model.name}", TERMINATION_LOG=str(message))
    done = builder("warm", "--platforms=linux/amd64,linux/arm64", **environ)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    last = json.loads(done.stderr.splitlines()[-1])
    assert (last["event"], last["known"], last["made"]) == ("warm", 0, 2)
    assert json.loads(message.read_text()) == {"state": "warmed", "environments": {"warm": 1}, "error": ""}

    file = tmp_path / "common.txt"
    file.write_text("small-app==1.0\n-e .\n")
    done = builder("warm", "--requirements", str(file), "--python", "3.11", **environ)
    assert (done.returncode, done.stdout) == (ExitCode.DATA, "")
    assert "common.txt" in failure(done)["what"]
    assert "line 2" in failure(done)["what"]


def test_the_exit_code_of_a_sweep_is_the_publishers_own(builder, mlflow_server, base_image):
    target = "EXTERNAL_TARGET_EXIT_CODES"
    tags = {"EXTERNAL_TARGET_PLTR_FOUNDRY": "false", target: "true", "MODEL_PLATFORMS": "nonsense"}
    register(mlflow_server.uri, seed_layout(base_image), tags)
    done = builder("sweep", TARGET_TAG=target)
    assert done.returncode == 0
    assert "nonsense" in done.stderr
    assert builder("sweep", "--strict", TARGET_TAG=target).returncode == 65
    assert builder("sweep", TARGET_TAG=target, REGISTRY_URL="https://").returncode == 78


def test_settings_that_are_wrong_are_a_list_for_people():
    done = bare("sweep", LOG_FORMAT="text")
    assert done.returncode == ExitCode.CONFIG
    first, *items, last = done.stderr.splitlines()
    assert first == "error: The settings cannot be used:"
    assert [item.split()[:2] for item in items] == [["-", "MLFLOW_TRACKING_URI"], ["-", "REGISTRY_URL"]]
    assert "what to do:" in last
