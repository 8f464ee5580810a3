"""What the benchmark reckons, and what it counts: what it measures it measures for real (`make bench`)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import xml.etree.ElementTree as ET

import pytest

from benchmarks import rivals, wheels
from benchmarks.environments import environments
from benchmarks.jobs import Cost, JobFailed, Outcome, Step, run, timings
from benchmarks.memory import peak_memory
from benchmarks.meter import metered
from benchmarks.plot import plot
from benchmarks.report import grids, verdict
from benchmarks.results import Results

MEBI = 1 << 20


def outcome(job, seconds, image_bytes=0):
    cost = Cost(seconds=seconds, peak=0, sent=0, received=0, outside=0, model=0)
    return Outcome(job=job, cost=cost, image_bytes=image_bytes)


def sklearn(*rounds):
    return Results(environment=next(each for each in environments() if each.name == "sklearn"), rounds=list(rounds))


def test_a_ratio_is_to_the_quicker_rival_of_the_same_round():
    results = sklearn(
        [outcome(rivals.DOCKER, 20), outcome(rivals.BUILDKIT_COLD, 40), outcome(wheels.COLD, 2)],
        [outcome(rivals.DOCKER, 40), outcome(rivals.BUILDKIT_COLD, 10), outcome(wheels.COLD, 2)],
        [Outcome(job=rivals.DOCKER, reason="failed: x"), outcome(wheels.COLD, 2)],
    )
    assert results.ratios(wheels.COLD, (rivals.DOCKER, rivals.BUILDKIT_COLD)) == [0.1, 0.2]


def test_an_aim_that_is_missed_says_by_how_much():
    results = sklearn([outcome(rivals.DOCKER, 20, 200), outcome(wheels.COLD, 5, 100)])
    said = {aim.what: verdict(aim) for aim in results.aims()}
    assert said["cold with bytecode, to the better cold rival"] == "missed by 25 %"
    assert said["image size, to that of docker build"] == "reached"
    assert said["cold without bytecode, to the better cold rival"] == "not measured"


def test_a_job_that_was_skipped_has_a_row_without_figures():
    jobs = grids(sklearn([Outcome(job=rivals.KANIKO, reason="skipped: x")]))[0]
    assert jobs.rows == [(rivals.KANIKO, *["–"] * (len(jobs.head) - 1))]  # noqa: RUF001


def test_the_plot_is_an_svg_document_with_a_bar_for_each_job_that_was_done():
    results = sklearn([outcome(rivals.DOCKER, 20), outcome("a < b", 5), Outcome(job=rivals.KANIKO, reason="x")])
    document = ET.fromstring(plot([results]))
    bars = [float(each.attrib["width"]) for each in document.iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert len(bars) == 2
    assert bars[0] == pytest.approx(4 * bars[1], abs=0.2)


def test_a_meter_counts_both_directions_and_passes_on_the_end():
    with socket.create_server(("127.0.0.1", 0)) as server, metered(server.getsockname()[1]) as meter:

        def serve():
            connection, _ = server.accept()
            with connection:
                while connection.recv(MEBI):
                    pass
                connection.sendall(b"done")

        thread = threading.Thread(target=serve)
        thread.start()
        with socket.create_connection(("127.0.0.1", meter.port)) as client:
            client.sendall(os.urandom(3 * MEBI))
            client.shutdown(socket.SHUT_WR)
            assert client.recv(100) == b"done"
            assert client.recv(100) == b""
        thread.join()
        assert (meter.sent, meter.received) == (3 * MEBI, 4)


def test_peak_memory_is_that_of_the_processes_started_meanwhile_with_their_children():
    # It prints when it holds the memory, and waits until it is told to end.
    child = "x = b'x' * (100 << 20); print('held', flush=True); input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    command = [sys.executable, "-c", parent]
    with (
        peak_memory("") as peak,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process,
    ):
        assert process.stdout.readline() == b"held\n"
        while peak.bytes < 100 * MEBI:
            pass
        process.communicate(b"\n")
    assert 100 * MEBI < peak.bytes < 250 * MEBI


def test_the_stages_are_those_of_the_last_event_of_that_name():
    log = (
        'words\n{"event": "timings", "seconds": {"lock": 1}}\n{"event": "timings", "seconds": {"lock": 2.5}}\n{"a": 1}'
    )
    assert timings(log) == {"lock": 2.5}
    assert timings("timings\n{timings") == {}


def test_a_command_that_fails_is_reported_by_what_its_last_event_says(tmp_path):
    script = 'print(\'x\'); print(\'{"event": "failed", "what": "No such model."}\'); raise SystemExit(66)'
    step = Step(argv=(sys.executable, "-c", script), cwd=tmp_path, environ=os.environ)
    with pytest.raises(JobFailed, match=r"ended with 66: No such model\.$"):
        run(step, tmp_path / "log")
