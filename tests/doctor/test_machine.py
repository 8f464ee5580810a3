"""This machine: its clock beside those of servers, its package index, its engine, its containers."""

import contextlib
import shutil
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import sleep, time

import pytest

from tests.package_index.server import running
from tests.servers.http_server import in_thread
from tests.waiting import until


@contextlib.contextmanager
def clock_of(ahead):
    """Run a small server whose clock is some seconds ahead of this machine's."""

    class Handler(BaseHTTPRequestHandler):
        def date_time_string(self, timestamp=None):
            return formatdate(time() + ahead, usegmt=True)

        def log_message(self, *_):
            pass

        def do_GET(self):
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    with in_thread(server):
        yield f"127.0.0.1:{server.server_address[1]}"


def test_clocks_that_agree(look):
    def agree():
        found = look("clock")
        return found.state == "ok" and all(f"{name} is right" in found.found for name in ("MLflow", "the registry"))

    # MLflow's server looks at the time when it has the processor, and may have waited for that.
    until(agree)


def test_a_server_that_tells_the_second_before_is_right(look):
    """As those do that look at the time once a second; it is cut to whole seconds, too."""
    # Late in a second, so that nearly two are missing.
    sleep((0.7 - time()) % 1)
    with clock_of(-1) as host:
        assert "MLflow is right" in look("clock", MLFLOW_TRACKING_URI=f"http://{host}").found


@pytest.mark.parametrize(
    ("ahead", "state", "code", "says"),
    [(3600, "fail", 78, "fast"), (-3600, "fail", 78, "slow"), (200, "warn", 0, "fast")],
)
def test_a_clock_that_is_wrong(look, ahead, state, code, says):
    with clock_of(ahead) as host:
        of_mlflow = look("clock", MLFLOW_TRACKING_URI=f"http://{host}")
        of_registry = look("clock", REGISTRY_URL=f"{host}/doctor")
    for found, name in (of_mlflow, "MLflow"), (of_registry, "the registry"):
        assert (found.state, found.exit_code) == (state, code), found
        assert f"{name} is" in found.found
        assert says in found.found


def test_no_server_tells_the_time(look, dead_port):
    away = f"127.0.0.1:{dead_port}"
    assert look("clock", MLFLOW_TRACKING_URI=f"http://{away}", REGISTRY_URL=f"{away}/doctor").state == "skipped"


@pytest.fixture
def index():
    @contextlib.contextmanager
    def made(*, has=True, **behaviour):
        with running(**behaviour) as found:
            if has:
                found.add("mlflow-skinny", "3.1.0")
            yield found

    return made


def test_a_package_index_with_upload_times(look, index):
    with index() as found:
        answer = look("package index", UV_DEFAULT_INDEX=found.simple)
    assert answer.state == "ok", answer
    assert found.url.partition("://")[2] in answer.found


def test_a_package_index_without_upload_times(look, index):
    with index(times=False) as found:
        answer = look("package index", UV_DEFAULT_INDEX=found.simple)
    assert answer.state == "warn", answer
    assert "RESOLVE_AS_OF" in answer.found


def test_a_package_index_without_what_images_need(look, index):
    with index(has=False) as found:
        answer = look("package index", UV_DEFAULT_INDEX=found.simple)
    assert answer.state == "warn", answer
    assert "mlflow-skinny" in answer.found


def test_a_package_index_that_refuses_or_is_away(look, index, dead_port):
    with index(credential=("user", "a-word-for-it")) as found:
        refused = look("package index", UV_DEFAULT_INDEX=found.simple)
        taken = look("package index", UV_DEFAULT_INDEX=found.with_credential)
    assert (refused.state, refused.exit_code) == ("fail", 77), refused
    assert taken.state == "ok", taken
    assert "a-word-for-it" not in taken.found
    away = f"http://127.0.0.1:{dead_port}/simple"
    gone = look("package index", UV_DEFAULT_INDEX=away)
    assert (gone.state, gone.exit_code) == ("fail", 69), gone
    # The listener's Pod reaches none, and is not meant to.
    assert look("package index", in_pod=True, UV_DEFAULT_INDEX=away).state == "skipped"


def test_an_engine_that_is_here_or_is_not(look, monkeypatch):
    here = shutil.which("buildah", path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    found = look("engine")
    assert found.state == ("ok" if here else "warn"), found
    assert look("engine", BUILD_METHOD="wheels").state == "skipped"
    missing = look("engine", BUILD_ENGINE="kaniko")
    assert (missing.state, missing.exit_code) == ("fail", 78), missing
    assert look("engine", in_pod=True, BUILD_ENGINE="kaniko").state == "skipped"


def test_containers_that_can_run_or_cannot(look, monkeypatch):
    assert look("smoke test").state == "skipped"
    assert look("smoke test", in_pod=True, SMOKE_TEST="auto").state == "skipped"
    monkeypatch.setattr("builder.smoke.runtime._PATH", "/nonexistent")
    found = look("smoke test", SMOKE_TEST="auto")
    assert found.state == "warn", found
    required = look("smoke test", SMOKE_TEST="required")
    assert (required.state, required.exit_code) == ("fail", 78), required
