"""Nothing that others wrote steers the screen of whoever reads a log, a plan, a table or an error, or hides on it."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import termios
import unicodedata
from types import SimpleNamespace

import pytest

from builder import log
from builder.cli.invocation import Invocation
from builder.errors import BuildFailed
from builder.masking import json_visible, one_line, shown, visible
from tests.versions import register, seed_layout
from tests.waiting import HANG, LONG_HANG

# The title of the window, a bell, an empty screen, a colour by a C1 code, text that runs backwards, what nobody sees,
# a line that only some end, an erased line, the markup of the library that draws tables, and its names of emoji.
STEERING = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp\u2066\u200b\u2028\x08\x7f\U000e0041"
MARKUP = "[red]m[/red][link=http://e.example]l[/link]:smile:"
HOSTILE = f"a{STEERING}{MARKUP}z"
# MLflow takes neither in a name.
NAME = HOSTILE.replace("/", "").replace(":", "")
# A path with a control character is refused; what reorders or hides is an ordinary letter to a file system.
PATH = "b\u202egnp\u2066\u200b\ufeff[red]m[link=x]:smile:"
# What is drawn on a terminal is coloured by the program itself, and a progress bar is drawn over and over.
OWN = re.compile(r"\x1b\[(?:[0-9]{1,2}(?:;[0-9]{1,3}){0,2})?m|\x1b\[\?25[lh]|\x1b\[[0-9]?[AK]|\r")
STEERS = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e0fff]"
)


def harmless(text: str) -> str:
    """Return text after it was seen that nothing in it steers a screen."""
    left = OWN.sub("", text)
    assert not STEERS.search(left), ascii(left[max(0, STEERS.search(left).start() - 80) :][:160])
    assert "\N{SMILING FACE WITH OPEN MOUTH AND SMILING EYES}" not in left
    return left


# ---- the function


def test_every_character_that_steers_or_hides_is_written_out():
    for number in range(sys.maxunicode + 1):
        char = chr(number)
        if unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"}:
            assert visible(char).isascii(), hex(number)
            assert visible(char).isprintable(), hex(number)
    for char in ("\u3164", "\uffa0", "\u115f", "\u034f", "\u2800", "\U000e0100"):
        assert visible(char).isascii()


@pytest.mark.parametrize("text", ["Grüße", "模型一号", "الاسم", "नमूना", "🏃 🧪 ❤️", "a\\nb", "é", "한글"])
def test_what_people_write_stays_as_it_is(text):
    assert visible(text) == shown(text) == one_line(text) == text


def test_what_is_written_out_can_be_read():
    assert visible("\x1b[2J\u202e\U000e0041\ud800\n") == "\\x1b[2J\\u202e\\U000e0041\\ud800\\n"
    assert one_line("a\r\n\tb\u2028c  d\x00") == "a b c d\\x00"
    assert shown("a\tb\n\x1bc") == "a       b\n\\x1bc"


def test_json_says_the_same_after_it_was_made_harmless():
    value = {"ü": [HOSTILE, "\U0001f600"]}
    text = json_visible(json.dumps(value, ensure_ascii=False, indent=1))
    assert json.loads(text) == value
    assert "ü" in text
    harmless(text)


# ---- logs


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_event_is_harmless_keys_included(form, capsys):
    log.configure(form)
    logger = log.get_logger("hostile")
    logger.info(HOSTILE, path=HOSTILE, **{f"key{STEERING}": {HOSTILE: [HOSTILE, BuildFailed(HOSTILE)]}})
    logger.info("next", text=f"a\n12:00:00 [info] published\n{HOSTILE}")
    said = harmless(capsys.readouterr().err)
    assert said.count("\n") == 2
    if form == "json":
        first, second = map(json.loads, said.splitlines())
        harmless(json.dumps(first, ensure_ascii=False) + json.dumps(second, ensure_ascii=False))


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_traceback_cannot_be_taken_for_lines_of_the_log(form, capsys):
    log.configure(form)
    try:
        int(f"{HOSTILE}\n12:00:00 [info     ] published")
        json.loads(f"{HOSTILE}")
    except ValueError:
        log.get_logger("hostile").exception("defect")
    said = harmless(capsys.readouterr().err)
    assert "owned" in said
    assert not any(line.startswith("12:00:00 [info     ] published") for line in said.splitlines())
    if form == "json":
        harmless(json.loads(said)["exception"])


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_libraries_log_goes_the_same_way(form):
    program = (
        "import logging, sys, warnings\nfrom builder import log\n"
        f"log.configure({form!r}); log.mask(['the-secret-1'])\n"
        "logging.getLogger('urllib3').warning('retrying %s', sys.argv[1])\n"
        "warnings.warn(sys.argv[1])\n"
        "try:\n    raise ValueError(sys.argv[1])\nexcept ValueError: logging.getLogger('mlflow').exception('oops')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, f"{HOSTILE} the-secret-1"], capture_output=True, timeout=HANG, check=True
    )
    said = harmless(done.stderr.decode())
    assert said.count("owned") == 3
    assert "the-secret-1" not in said
    if form == "json":
        assert {"urllib3", "py.warnings", "mlflow"} == {json.loads(line)["logger"] for line in said.splitlines()}


# ---- errors and messages


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_error_is_harmless_and_a_line(form, capsys, tmp_path):
    message = tmp_path / "message"
    message.touch()
    invocation = Invocation(environ={"LOG_FORMAT": form, "TERMINATION_LOG": str(message)})
    invocation.failed("BuildFailed", f"{HOSTILE}\nsecond", HOSTILE, 73)
    said = harmless(capsys.readouterr().err)
    assert len(said.splitlines()) == (2 if form == "text" else 1)
    harmless(json.loads(message.read_text())["error"])
    invocation.defect(ValueError(f'{HOSTILE}\n{{"event": "published"}}'))
    said = harmless(capsys.readouterr().err)
    assert not any(line.startswith('{"event": "published"') for line in said.splitlines())


@pytest.mark.parametrize("text", ["é" * 5000, "\U0001f600" * 5000, "\x1b" * 5000, '"\\' * 5000, "x" * 5000])
def test_a_termination_message_is_whole_json_of_at_most_4096_bytes(text, tmp_path):
    message = tmp_path / "message"
    message.touch()
    Invocation(environ={"TERMINATION_LOG": str(message)}).leave_message({"state": "failed", "error": text, "n": [1]})
    assert message.stat().st_size <= 4096
    held = json.loads(message.read_text())
    assert held["state"] == "failed"
    assert len(held["error"]) > 100


def test_a_reference_is_printed_as_it_is_and_nothing_else_steers():
    log.mask(["domino"])
    invocation = Invocation(environ={}, stdout=io.StringIO())
    invocation.product("quay.io/domino/model@sha256:0")
    invocation.product(f"/folder/{HOSTILE}\ud800")
    assert invocation.stdout.getvalue().startswith("quay.io/domino/model@sha256:0\n")
    harmless(invocation.stdout.getvalue())


# ---- commands


def run(*arguments, terminal, **environ):
    """Run the program, its output on a terminal or not; gives what it wrote and its exit code."""
    command = [sys.executable, "-m", "builder", *arguments]
    environ = {"PATH": os.environ["PATH"], "TERM": "xterm-256color", "COLUMNS": "200", **environ}
    if not terminal:
        done = subprocess.run(command, env=environ, capture_output=True, timeout=LONG_HANG, check=False)
        return SimpleNamespace(text=(done.stdout + done.stderr).decode(), code=done.returncode)
    master, slave = pty.openpty()
    attributes = termios.tcgetattr(slave)
    attributes[1] &= ~termios.OPOST  # what is written is what is read
    termios.tcsetattr(slave, termios.TCSANOW, attributes)
    with subprocess.Popen(command, env=environ, stdin=slave, stdout=slave, stderr=slave) as process:
        os.close(slave)
        said = b""
        while True:
            try:
                chunk = os.read(master, 1 << 16)
            except OSError:  # EIO: nobody holds the other end
                break
            if not chunk:
                break
            said += chunk
    os.close(master)
    return SimpleNamespace(text=said.decode(), code=process.returncode)


@pytest.fixture(params=[False, True], ids=["pipe", "terminal"])
def terminal(request):
    return request.param


@pytest.fixture
def environ(mlflow_server, registry, tmp_path):
    return {
        "HOME": str(tmp_path),
        "MLFLOW_TRACKING_URI": mlflow_server.uri,
        "REGISTRY_URL": f"{registry.host}/screens",
        "BUILD_METHOD": "dockerfile",
    }


COPIES = "FROM {base}\n# comment\u2028USER root\u202e\x1b[2J\nCOPY $model_folder /app\n"
FAILS = "FROM {base}\nCOPY client /client\nRUN python3 /client/say.py\n"
SAYS = f"import sys\nprint({HOSTILE!r})\nsys.exit({HOSTILE!r})\n"


def hostile_version(uri, base, target, dockerfile=FAILS, path=PATH, **tags):
    """Register a version whose name, paths, template and program are hostile."""
    files = seed_layout(base, dockerfile)
    files[f"mymodel/{path}.txt"] = "x"
    files["client/say.py"] = SAYS
    name = f"{NAME} {target}{os.urandom(4).hex()}"
    return register(uri, files, {f"EXTERNAL_TARGET_{target}": "true", "MODEL_ENTRY_POINT": "app.py", **tags}, name=name)


def test_plan_prints_no_control_characters(environ, terminal, mlflow_server, base_image):
    model = hostile_version(mlflow_server.uri, base_image, "plan", COPIES)
    done = run("plan", model.name, model.version, terminal=terminal, **environ)
    said = harmless(done.text)
    assert done.code == 0, said
    assert "a\\x1b]0;owned\\x07" in said
    assert f"mymodel/{visible(PATH)}.txt" in said
    assert "  # comment\\u2028USER root\\u202e\\x1b[2J" in said
    done = run("plan", "--json", model.name, model.version, terminal=terminal, **environ)
    harmless(done.text)
    text = "".join(done.text.partition("{\n")[1:])
    planned = json.loads(text[: text.rindex("\n}") + 2])
    assert planned["version"]["name"] == model.name


def test_publish_prints_no_control_characters(environ, terminal, mlflow_server, base_image, tmp_path):
    message = tmp_path / "message"
    message.touch()
    model = hostile_version(mlflow_server.uri, base_image, "publish")
    environ = {**environ, "TERMINATION_LOG": str(message), "TARGET_TAG": "EXTERNAL_TARGET_publish"}
    done = run("publish", model.name, model.version, terminal=terminal, **environ)
    said = harmless(done.text)
    assert done.code == 73, said
    assert said.count("owned") > 2
    error = model.outcome("publish")["error"]
    for text in (error, json.loads(message.read_text())["error"]):
        assert "owned" in harmless(text)
        assert "\n" not in text


@pytest.mark.parametrize("command", ["sweep", "warm", "download"])
def test_sweep_warm_and_download_print_no_control_characters(
    command, environ, terminal, mlflow_server, base_image, tmp_path
):
    target = f"{command}{os.urandom(4).hex()}"
    hostile_version(mlflow_server.uri, base_image, target, MODEL_FOLDER=HOSTILE)
    hostile_version(mlflow_server.uri, base_image, target, MODEL_PLATFORMS=HOSTILE)
    hostile_version(mlflow_server.uri, base_image, target, "FROM {base}\nCOPY ${{modle_folder\x1b[2J}} /\n")
    hostile_version(mlflow_server.uri, base_image, target, path=NAME)
    waiting = hostile_version(mlflow_server.uri, base_image, target)
    arguments = [str(tmp_path / "to")] if command == "download" else []
    environ = {**environ, "TARGET_TAG": f"EXTERNAL_TARGET_{target}", "SWEEP_ATTEMPTS": "1"}
    said = harmless(run(command, *arguments, terminal=terminal, **environ).text)
    assert "owned" in said
    if command == "sweep":
        # What a tag of somebody's says of an earlier attempt is read back.
        waiting.set_tag(f"publish.{target}.error", HOSTILE)
        assert "waiting" in harmless(run(command, terminal=terminal, **environ).text)


def test_a_wrong_command_line(terminal):
    done = run("publish", "a", "1", HOSTILE, terminal=terminal)
    assert done.code == 64
    assert "owned" in harmless(done.text)


def test_names_of_files_that_are_no_unicode(environ, terminal, tmp_path):
    """A path's bytes that are not UTF-8 come as lone surrogates, which no stream can write."""
    name = os.fsdecode(b"requirements-\xff\x1b[2J.txt")
    (tmp_path / name).write_text("-e .\n")
    done = run("warm", "--requirements", str(tmp_path / name), "--python", "3.11", terminal=terminal, **environ)
    assert done.code == 65
    assert "\\udcff\\x1b[2J" in harmless(done.text).replace("\\\\", "\\")
