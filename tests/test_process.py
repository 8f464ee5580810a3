"""`run` against real processes: streams, ends, and leaves nothing."""

import os
import resource
import signal
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.errors import BuildFailed, Terminated
from builder.process import LONGEST_LINE, Limits, Lines, run
from tests.waiting import HANG, ended, growing

PATH = {"PATH": os.environ["PATH"]}


def python(code, *, tmp_path, timeout=HANG, env=PATH, output=None):
    lines = []
    code = run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, timeout=timeout, output=output or lines.append, name="it"
    )
    return code, lines


def cut_short(code, tmp_path, seconds):
    """Run a program that prints its number and does not end; returns the number when the timeout has ended it."""
    for timeout in growing(seconds):
        lines = []
        with pytest.raises(BuildFailed, match=rf"it took longer than {timeout:g} seconds.*BUILD_TIMEOUT"):
            python(code, tmp_path=tmp_path, timeout=timeout, output=lines.append)
        if lines:
            break
    return int(lines[0])


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_the_child_sees_the_given_environment_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setenv("REGISTRY_TOKEN", "hidden-from-children")
    code, lines = python(
        "import os,sys; print(sorted(k for k in os.environ if k != 'LC_CTYPE'), os.getcwd(), sys.stdin.read()=='')",
        tmp_path=tmp_path,
        env={"A": "1"},
    )
    assert code == 0
    assert lines == [f"['A'] {tmp_path} True"]


def test_both_streams_come_as_one_and_the_exit_code_is_returned(tmp_path):
    code, lines = python(
        "import sys; print('out', flush=True); print('err', file=sys.stderr); sys.exit(7)", tmp_path=tmp_path
    )
    assert (code, lines) == (7, ["out", "err"])


def test_a_signal_is_a_negative_exit_code(tmp_path):
    assert python("import os; os.kill(os.getpid(), 9)", tmp_path=tmp_path) == (-signal.SIGKILL, [])


def test_arguments_are_read_by_no_shell(tmp_path):
    lines = []
    run(["echo", "$(id); `id`", "*"], env=PATH, cwd=tmp_path, timeout=HANG, output=lines.append, name="echo")
    assert lines == ["$(id); `id` *"]


def test_lines_come_while_the_child_runs(tmp_path):
    go = tmp_path / "go"

    def output(line):
        if line == "first":
            go.touch()

    code, _ = python(
        "import pathlib,time\nprint('first', flush=True)\nwhile not pathlib.Path('go').exists(): time.sleep(0.01)",
        tmp_path=tmp_path,
        output=output,
    )
    assert code == 0


def test_a_flood_is_drained(tmp_path):
    code, lines = python("for n in range(50_000): print(n)", tmp_path=tmp_path)
    assert code == 0
    assert lines == [str(n) for n in range(50_000)]


def test_a_timeout_ends_the_child_and_names_the_setting(tmp_path):
    pid = cut_short("import os,time; print(os.getpid(), flush=True); time.sleep(6000)", tmp_path, 1.5)
    assert not alive(pid)


def test_a_child_that_closed_its_output_is_still_held_to_the_timeout(tmp_path):
    code = "import os,time; print(os.getpid(), flush=True); os.close(1); os.close(2); time.sleep(6000)"
    assert not alive(cut_short(code, tmp_path, 1))


def test_a_child_deaf_to_sigterm_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("builder.process.GRACE", 0.3)
    code = (
        "import os,signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(os.getpid(), flush=True); time.sleep(6000)"
    )
    assert not alive(cut_short(code, tmp_path, 1))


def test_what_the_child_left_behind_is_ended_and_does_not_hold_us(tmp_path):
    # It holds the output open for longer than the program may take.
    code, lines = python(
        "import subprocess; print(subprocess.Popen(['sleep', '6000']).pid, flush=True)", tmp_path=tmp_path
    )
    assert code == 0
    assert ended(int(lines[0]))


@pytest.mark.parametrize("error", [Terminated, KeyboardInterrupt, ValueError])
def test_an_exception_ends_the_whole_group_first(tmp_path, error):
    pids = []

    def output(line):
        pids.extend(int(pid) for pid in line.split())
        raise error

    with pytest.raises(error):
        python(
            "import os,subprocess,time\n"
            "print(os.getpid(), subprocess.Popen(['sleep', '6000']).pid, flush=True); time.sleep(6000)",
            tmp_path=tmp_path,
            output=output,
        )
    assert len(pids) == 2
    assert all(ended(pid) for pid in pids)


def test_a_signal_handler_that_raises_ends_the_child(tmp_path):
    def terminated(*_):
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminated)
    seen = []

    def output(line):
        seen.append(int(line))
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()

    try:
        with pytest.raises(Terminated):
            python("import os,time; print(os.getpid(), flush=True); time.sleep(6000)", tmp_path=tmp_path, output=output)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not alive(seen[0])


@pytest.mark.parametrize("argv", [["no-such-program-anywhere"], ["/etc/passwd"]])
def test_a_program_that_cannot_start_is_named(tmp_path, argv):
    with pytest.raises(BuildFailed, match=f"engine cannot be started: {argv[0]}"):
        run(argv, env=PATH, cwd=tmp_path, timeout=HANG, output=print, name="engine")


@pytest.mark.parametrize(
    ("raw", "lines"),
    [
        (b"", []),
        (b"a\nb", ["a", "b"]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"a\n\nb\n", ["a", "", "b"]),
        (b" 1%\r50%\r100%\ndone\n", ["100%", "done"]),
        (b"100%\r   \r\n", ["100%"]),
        (b"\xff\xfeok\n", ["\ufffd\ufffdok"]),
        ("é\n".encode(), ["é"]),
        (b"cut \xc3", ["cut \ufffd"]),
        (b"x" * (LONGEST_LINE * 3) + b"\ny\n", ["x" * (LONGEST_LINE - 1) + "…", "y"]),
        (b"x" * LONGEST_LINE + b"\n", ["x" * LONGEST_LINE]),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1 << 20])
def test_lines(raw, lines, size):
    reader = Lines()
    seen = [line for at in range(0, len(raw), size) for line in reader.feed(raw[at : at + size])]
    assert [*seen, *reader.rest()] == lines


@given(st.lists(st.binary(max_size=40)), st.integers(1, 20))
def test_no_line_is_longer_than_the_limit_or_holds_a_line_break(chunks, limit):
    reader = Lines(limit)
    seen = [line for chunk in chunks for line in reader.feed(chunk)] + list(reader.rest())
    assert all(len(line) <= limit and "\n" not in line and "\r" not in line for line in seen)
    assert len(seen) in {b"".join(chunks).count(b"\n"), b"".join(chunks).count(b"\n") + 1}


LIMITS = Limits(memory=500 << 20, processor=1)
# A limit is set as soon as the program runs: it waits until it has it.
WAIT = "import resource, time\nwhile resource.getrlimit(resource.RLIMIT_DATA)[0] != {}: time.sleep(0.01)\n"
WAIT_FOR_PROCESSOR = WAIT.replace("RLIMIT_DATA", "RLIMIT_CPU").format(LIMITS.processor)


def limited(code, tmp_path, limits):
    lines = []
    argv = [sys.executable, "-c", code]
    return run(argv, env=PATH, cwd=tmp_path, timeout=HANG, output=lines.append, name="it", limits=limits), lines


def test_memory_is_limited_for_what_a_program_starts_as_well(tmp_path):
    inner = "import subprocess, sys; b = 'x' * (700 << 20)"
    code, lines = limited(f"{WAIT.format(LIMITS.memory)}import subprocess, sys\n"
                          f"sys.exit(subprocess.run([sys.executable, '-c', {inner!r}]).returncode)", tmp_path, LIMITS)  # fmt: skip
    assert code == 1
    assert lines[-1] == "MemoryError"


def test_processor_time_is_limited(tmp_path):
    assert limited(f"{WAIT_FOR_PROCESSOR}while True: pass", tmp_path, LIMITS)[0] == -signal.SIGXCPU


def test_who_ignores_the_limit_of_processor_time_is_killed(tmp_path):
    code = f"import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\n{WAIT_FOR_PROCESSOR}while True: pass"
    assert limited(code, tmp_path, LIMITS)[0] == -signal.SIGKILL


def test_an_engine_is_free_of_the_limit_that_we_have(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, before[1]))
    try:
        assert limited(WAIT.format(before[1]), tmp_path, None) == (0, [])
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
