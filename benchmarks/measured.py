"""From a job that was done to its outcome: the image's size, and how soon it predicts."""

from __future__ import annotations

import socket
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable

from benchmarks.images import compressed_size
from benchmarks.jobs import Cost, JobFailed, Outcome
from benchmarks.site import Round
from scripts.launch import free_port
from tests.builder_image import docker

_PORT = 8080
_STARTS = 2
_START_SECONDS = 180
_POLL_SECONDS = 0.02


def outcome(turn: Round, job: str, image: str, work: Callable[[], Cost], *, runs: bool = True) -> Outcome:
    """Do a job, then look at its image and run it.

    Args:
        turn: the round.
        job: its name.
        image: the reference that it pushes.
        work: does it.
        runs: whether this machine can run the image.
    """
    try:
        cost = work()
    except JobFailed as error:
        return Outcome(job=job, reason=f"failed: {error}")
    size = compressed_size(image)
    starts: tuple[float, ...] = ()
    if runs and turn.site.daemon:
        try:
            starts = start_times(image, turn.environment.request, own=turn.site.daemon.own)
        except JobFailed as error:
            return Outcome(job=job, cost=cost, image_bytes=size, reason=f"its image does not serve: {error}")
    return Outcome(job=job, cost=cost, image_bytes=size, starts=starts)


def start_times(image: str, request: str, *, own: bool) -> tuple[float, ...]:
    """Return the seconds from `docker run` to the first prediction, some times, the image pulled before.

    Args:
        image: its reference.
        request: the body that is sent.
        own: whether the daemon's containers are on this machine's network.

    Raises:
        JobFailed: it ends, or does not predict in time.
    """
    docker("pull", "--quiet", image)
    try:
        return tuple(first_prediction(image, request, own=own) for _ in range(_STARTS))
    finally:
        docker("rmi", "--force", image, check=False)


def first_prediction(image: str, request: str, *, own: bool) -> float:
    """Run an image, and return the seconds until POST /invocations answers with 200.

    Raises:
        JobFailed: it ends, or does not predict in time.
    """
    name = f"bench-{uuid.uuid4().hex[:12]}"
    # Docker's proxy takes connections before the server does, and has been seen to keep one for ten seconds.
    port = _PORT if own else free_port()
    network = "--network=host" if own else f"--publish=127.0.0.1:{port}:{_PORT}"
    if own and not is_free(port):
        message = f"port {port} of this machine is taken"
        raise JobFailed(message)
    start = time.monotonic()
    try:
        docker("run", "--detach", f"--name={name}", network, image)
        while (passed := time.monotonic() - start) < _START_SECONDS:
            if answers(f"http://127.0.0.1:{port}/invocations", request):
                return time.monotonic() - start
            time.sleep(_POLL_SECONDS)
            # Asking takes Docker a while, so not each time.
            if passed > 10 and docker("inspect", "--format={{.State.Running}}", name).stdout.strip() != "true":  # noqa: PLR2004
                break
        said = docker("logs", name, check=False)
        message = f"no prediction in {passed:.0f} s: … {' '.join((said.stdout + said.stderr).split())[-400:]}"
        raise JobFailed(message)
    finally:
        docker("rm", "--force", name, check=False)


def is_free(port: int) -> bool:
    """Return whether nothing listens on a port."""
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) != 0


def answers(url: str, request: str) -> bool:
    """Return whether a POST is answered with 200."""
    asked = urllib.request.Request(url, request.encode(), {"Content-Type": "application/json"})  # noqa: S310 - http
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(asked, timeout=60) as answer:
            return bool(answer.read())
    except urllib.error.HTTPError as error:
        message = f"POST /invocations answers {error.code}: {error.read()[:300]!r}"
        raise JobFailed(message) from error
    except OSError:
        return False
