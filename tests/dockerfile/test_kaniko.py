"""The Kaniko engine without Kaniko: where it works, what it says to the executor, what it makes of its answers.

The executor itself runs in tests/test_image.py. Its output below is what version 1.28.3 wrote.
"""

import os
import stat
from pathlib import Path

import pytest

from builder.dockerfile.engine import BuildJob, machine_platform
from builder.dockerfile.kaniko import Kaniko
from builder.errors import BuildFailed, InvalidSettings, ServiceUnavailable, TryAgain
from builder.reference import Platform, Repository
from builder.settings import Network

FOREIGN = Platform("linux", "s390x" if machine_platform().architecture != "s390x" else "amd64")
FLAGS = "active feature flags: FF_KANIKO_CLEAN_KANIKO_DIR"


def logged(message, level="info"):
    quoted = message.replace("\\", "\\\\").replace('"', '\\"')
    return f'time="2026-08-01T10:00:00Z" level={level} msg="{quoted}"'


class Executor:
    """Stands where the executor would: writes lines, looks at what it was given, leaves a layout."""

    def __init__(self, *lines, code=0, look=lambda executor: None):
        self.lines, self.code, self.look = lines, code, look

    def __call__(self, argv, *, env, cwd, timeout, output, name):
        self.argv, self.env, self.timeout = list(argv), dict(env), timeout
        self.options = [word.partition("=")[::2] for word in argv[1:]]
        self.look(self)
        for line in self.lines:
            output(line)
        return self.code

    def values(self, option):
        return [value for name, value in self.options if name == option]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Kaniko's own folder, in a place that is not below /tmp as far as the engine can see."""
    folder = tmp_path / "kaniko"
    (folder / "workspace" / "context").mkdir(parents=True)
    (folder / "workspace" / "context" / "Dockerfile").write_text("FROM scratch\n")
    (folder / "builder").mkdir()
    (folder / "executor").touch(mode=0o755)
    monkeypatch.setattr("builder.dockerfile.kaniko._FORBIDDEN", Path("/forbidden"))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return folder


@pytest.fixture
def job(root):
    def make(**fields):
        workspace = root / "workspace"
        network = Network(
            **{key: fields.pop(key) for key in list(fields) if key in Network.__dataclass_fields__},
        )
        values = {
            "context": workspace / "context",
            "dockerfile": workspace / "context" / "Dockerfile",
            "platform": Platform("linux", "amd64"),
            "layout": workspace / "layouts" / "linux-amd64",
            "timeout": 60.0,
            "network": network,
        }
        return BuildJob(**(values | fields))

    return make


@pytest.fixture
def build(root, job, tmp_path):
    def run(executor, **fields):
        lines = []
        Kaniko(root=root, etc=tmp_path / "etc", runner=executor).build(job(**fields), lines.append)
        return lines

    return run


def test_the_executor_gets_these_arguments(build, root):
    executor = Executor()
    build(executor)
    workspace = root / "workspace"
    assert executor.argv == [
        f"{root}/executor",
        f"--context=dir://{workspace}/context",
        f"--dockerfile={workspace}/context/Dockerfile",
        "--custom-platform=linux/amd64",
        f"--oci-layout-path={workspace}/layouts/linux-amd64",
        "--no-push",
        "--no-push-cache",
        "--reproducible",
        "--compressed-caching=false",
        "--pre-cleanup",
        "--cleanup",
        "--log-format=text",
        "--verbosity=info",
    ]
    assert executor.timeout == 60


def test_the_executor_inherits_no_environment(build, root, monkeypatch):
    monkeypatch.setenv("REGISTRY_TOKEN", "hunter2")
    executor = Executor()
    build(executor)
    assert executor.env.keys() == {
        "PATH",
        "HOME",
        "USER",
        "DOCKER_CONFIG",
        "SSL_CERT_DIR",
        "FF_KANIKO_REPRODUCIBLE_PRESERVE_BASE_LAYERS",
    }
    assert executor.env["FF_KANIKO_REPRODUCIBLE_PRESERVE_BASE_LAYERS"] == "true"


def test_without_being_the_first_process_force_is_not_set(build):
    executor = Executor()
    build(executor)
    assert not executor.values("--force")


def test_forced_where_the_first_process_is_ours(build, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    executor = Executor()
    build(executor)
    assert executor.values("--force") == [""]


def test_proxies_reach_run_steps_and_pulls_but_not_argv(build):
    executor = Executor()
    build(executor, proxies={"HTTPS_PROXY": "http://user:secret@proxy:3128", "NO_PROXY": ".svc"})
    assert executor.values("--build-arg") == ["HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"]
    assert executor.env["https_proxy"] == executor.env["HTTPS_PROXY"] == "http://user:secret@proxy:3128"
    assert "secret" not in " ".join(executor.argv)


def test_plain_http_for_the_named_hosts_only(build):
    executor = Executor()
    build(executor, insecure_registries=frozenset({"b.example:5000", "a.example"}))
    assert executor.values("--insecure-registry") == ["a.example", "b.example:5000"]
    assert not executor.values("--skip-tls-verify")


def test_the_cache_is_read_only(build):
    executor = Executor()
    build(executor, cache=Repository("quay.io", "domino/cache"))
    assert executor.values("--cache-repo") == ["quay.io/domino/cache"]
    assert executor.values("--no-push-cache") == [""]


def test_no_cache_unless_asked_for(build):
    executor = Executor()
    build(executor)
    assert not executor.values("--cache")
    assert not executor.values("--cache-repo")


def test_pull_credential_for_the_executor_alone(build, root, tmp_path):
    config = tmp_path / "pull"
    config.mkdir()
    (config / "config.json").write_text('{"auths": {}}')

    def look(executor):
        folder = Path(executor.env["DOCKER_CONFIG"])
        assert folder.is_relative_to(root)
        assert (folder / "config.json").read_text() == '{"auths": {}}'
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    executor = Executor(look=look)
    build(executor, docker_config=config)
    assert not Path(executor.env["DOCKER_CONFIG"]).exists()


def test_without_a_credential_the_folder_is_empty(build):
    build(Executor(look=lambda executor: Path(executor.env["DOCKER_CONFIG"]).rmdir()))


def test_ca_bundle_and_index_are_seen_where_kaniko_ignores_them(build, root, tmp_path):
    bundle = tmp_path / "ca.pem"
    bundle.write_text("certificates")
    seen = {}

    def look(executor):
        for path in executor.values("--ignore-path"):
            seen[path] = Path(path).read_text()
        seen["ca"] = Path(executor.env["SSL_CERT_FILE"]).read_text()

    executor = Executor(look=look)
    build(
        executor,
        ca_bundle=bundle,
        index_variables={"PIP_INDEX_URL": "https://index.example/simple", "UV_DEFAULT_INDEX": "https://uv.example"},
    )
    staged = executor.env["SSL_CERT_FILE"]
    assert staged.startswith(f"{root}/run-")
    assert seen["ca"] == "certificates"
    pip, uv = (f"{tmp_path}/etc/{name}" for name in ("pip.conf", "uv/uv.toml"))
    assert f"cert = {staged}" in seen[pip]
    assert "index-url = https://index.example/simple" in seen[pip]
    assert "https://uv.example" in seen[uv]
    assert executor.values("--build-arg") == ["SSL_CERT_FILE"]
    assert not Path(pip).exists()
    assert not Path(staged).exists()


def test_a_pip_conf_that_was_there_is_there_again(build, tmp_path):
    mine = tmp_path / "etc" / "pip.conf"
    mine.parent.mkdir()
    mine.write_text("[global]\ntimeout = 5\n")
    during = []
    executor = Executor(look=lambda executor: during.append(mine.read_text()))
    build(executor, pip_config=mine, index_variables={"PIP_INDEX_URL": "https://index.example/simple"})
    assert "timeout = 5" in during[0]
    assert "index.example" in during[0]
    assert mine.read_text() == "[global]\ntimeout = 5\n"


def test_a_link_left_in_the_place_of_pip_conf_is_not_followed(build, root, tmp_path):
    mine, precious = tmp_path / "etc" / "pip.conf", root / "workspace" / "plan.json"
    mine.parent.mkdir()
    mine.write_text("[global]\ntimeout = 5\n")
    precious.write_text("{}")

    def hostile(executor):
        mine.unlink()
        mine.symlink_to(precious)

    build(Executor(look=hostile), pip_config=mine)
    assert precious.read_text() == "{}"
    assert mine.read_text() == "[global]\ntimeout = 5\n"


def test_nothing_of_ours_stays_when_the_executor_fails(build, root, tmp_path):
    before = sorted(path.name for path in root.iterdir())
    with pytest.raises(BuildFailed):
        build(Executor(code=1), index_variables={"PIP_INDEX_URL": "https://index.example"})
    assert sorted(path.name for path in root.iterdir()) == before
    assert not (tmp_path / "etc" / "pip.conf").exists()


def test_a_build_finds_nothing_of_an_earlier_one(build, root):
    (root / "deps" / "0" / "app").mkdir(parents=True)
    (root / "caches" / "pip").mkdir(parents=True)
    during = []
    build(Executor(look=lambda executor: during.append(sorted(path.name for path in root.iterdir()))))
    assert not {"deps", "caches"} & set(during[0])


def test_a_layout_can_be_read_by_the_push_phase(build, root):
    layout = root / "workspace" / "layouts" / "linux-amd64"

    def look(executor):
        blobs = layout / "blobs" / "sha256"
        blobs.mkdir(parents=True, mode=0o700)
        (blobs / "a").touch(mode=0o600)
        (blobs / "link").symlink_to(root / "executor")
        os.mkfifo(blobs / "pipe", 0o600)

    build(Executor(look=look))
    blobs = layout / "blobs" / "sha256"
    assert stat.S_IMODE(blobs.stat().st_mode) == 0o755
    assert stat.S_IMODE((blobs / "a").stat().st_mode) == 0o644
    assert stat.S_IMODE((blobs / "pipe").lstat().st_mode) == 0o600
    assert stat.S_IMODE((root / "executor").stat().st_mode) == 0o755


@pytest.mark.parametrize("field", ["context", "dockerfile", "layout"])
def test_what_kaniko_would_delete_is_refused(build, root, tmp_path, field):
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (root / "workspace" / "link").symlink_to(outside)
    for place in (outside, root / ".." / "elsewhere", root / "workspace" / "link" / "x"):
        with pytest.raises(InvalidSettings, match="BUILDER_WORKSPACE"):
            build(Executor(look=lambda executor: pytest.fail("the executor ran")), **{field: place})


def test_a_workspace_below_tmp_is_refused(build, root, monkeypatch):
    monkeypatch.setattr("builder.dockerfile.kaniko._FORBIDDEN", root)
    with pytest.raises(InvalidSettings, match="apt-get"):
        build(Executor())


@pytest.mark.parametrize("missing", ["executor", "builder"])
def test_available_in_the_builder_image_only(root, missing):
    assert Kaniko(root=root).available()
    (root / missing).rename(root / "other")
    assert not Kaniko(root=root).available()


def test_output_is_handed_on_without_its_noise(build):
    executor = Executor(
        logged(FLAGS),
        logged("Retrieving image manifest python:3.11"),
        logged('RUN echo "a"'),
        logged("Cmd: /bin/sh"),
        logged('Args: [-c echo "a"]'),
        logged('Running: [/bin/sh -c echo "a"]'),
        "a",
        logged("no such cache", level="warning"),
        'time="2026-08-01T10:00:00Z" level=info msg="cut in the middle',
        "time=now level=info",
    )
    assert build(executor) == [
        "Retrieving image manifest python:3.11",
        'RUN echo "a"',
        "a",
        "warning: no such cache",
        "cut in the middle",
        "time=now level=info",
    ]


STEP = (
    logged("RUN pip install nothing"),
    logged("Running: [/bin/sh -c pip install nothing]"),
    "Collecting nothing",
    "ERROR: No matching distribution found for nothing",
    "",
    logged("Deleting filesystem..."),
)
IN_STEP = "error building image: error building stage: failed to execute command: "
PULL = "error building image: unable to complete operation after 0 attempts, last error: "


@pytest.mark.parametrize(
    ("lines", "kind", "message"),
    [
        (
            (*STEP, f"{IN_STEP}waiting for process to exit: exit status 1"),
            BuildFailed,
            (
                "linux/amd64: the step 'RUN pip install nothing' failed: ERROR: No matching distribution found for nothing "
                "(exit status 1). "
            ),
        ),
        (
            (logged('RUN ["/x"]'), f"{IN_STEP}starting command: fork/exec /x: no such file or directory"),
            BuildFailed,
            "the step 'RUN [\"/x\"]' failed: starting command: fork/exec /x: no such file or directory.",
        ),
        (
            ("error building image: error building stage: failed to take snapshot: write /x: no space left on device",),
            TryAgain,
            "more room",
        ),
        # What the author's own program or text says of a full disk is no reason to try for ever.
        (
            (logged("RUN dd"), "dd: No space left on device", f"{IN_STEP}waiting for process to exit: exit status 1"),
            BuildFailed,
            "more room",
        ),
        (
            (logged("RUN echo 'disk quota exceeded' && false"), f"{IN_STEP}waiting for process to exit: exit status 1"),
            BuildFailed,
            "Correct the Dockerfile",
        ),
        (
            ('error building image: stat "/x: no space left on device": no such file or directory',),
            BuildFailed,
            "Correct the Dockerfile",
        ),
        (
            ("error building image: parsing dockerfile: dockerfile parse error on line 2: unknown instruction: RNU",),
            BuildFailed,
            (
                "Kaniko could not build linux/amd64: parsing dockerfile: dockerfile parse error on line 2: unknown "
                "instruction: RNU. Correct the Dockerfile."
            ),
        ),
        (
            (f"{PULL}GET http://r.example/v2/x/manifests/1: MANIFEST_UNKNOWN: manifest unknown; map[Tag:1]",),
            BuildFailed,
            "after FROM",
        ),
        (
            (f"{PULL}GET https://r.example/v2/x/manifests/1: UNAUTHORIZED: authentication required",),
            BuildFailed,
            "BUILD_DOCKER_CONFIG",
        ),
        (
            (f'{PULL}Get "https://r.example/v2/": tls: failed to verify certificate: x509: unknown authority',),
            BuildFailed,
            "SSL_CERT_FILE",
        ),
        (
            (f'{PULL}Get "https://r.example/v2/": dial tcp 10.0.0.1:443: connect: connection refused',),
            ServiceUnavailable,
            "registry answers",
        ),
        (
            (f"{PULL}GET https://r.example/v2/x: unexpected status code 503 Service Unavailable",),
            ServiceUnavailable,
            "",
        ),
        (
            ("panic: runtime error: index out of range", "", "goroutine 1 [running]:"),
            BuildFailed,
            "panic: runtime error",
        ),
        ((logged("no image", level="fatal"),), BuildFailed, "Kaniko could not build linux/amd64: no image."),
        ((), BuildFailed, "exit code 3"),
    ],
)
def test_failures_quote_the_last_meaningful_line(build, lines, kind, message):
    with pytest.raises(kind) as caught:
        build(Executor(*lines, code=3))
    assert type(caught.value) is kind
    assert message in str(caught.value)
    assert caught.value.remedy


FAILED = f"{IN_STEP}waiting for process to exit: exit status 1"
BUILDING = ("  error: subprocess-exited-with-error", "  note: This error originates from a subprocess", "╰─> lightfm")
LACKING = {
    "setuptools": ("      error: command 'gcc' failed: No such file or directory", "a C compiler (gcc)"),
    "Debian's Python": ("error: command 'x86_64-linux-gnu-g++' failed: No such file or directory", "a C compiler (x86_64-linux-gnu-g++)"),
    "distutils": ("    unable to execute 'gcc': No such file or directory", "a C compiler (gcc)"),
    "subprocess": ("FileNotFoundError: [Errno 2] No such file or directory: 'cmake'", "the program cmake"),
    "Windows": ("error: Microsoft Visual C++ 14.0 or greater is required.", "a C compiler"),
    "CMake": ("  No CMAKE_CXX_COMPILER could be found.", "a C compiler"),
    "meson": ("../meson.build:1:0: ERROR: Unknown compiler(s): [['cc'], ['gcc'], ['clang']]", "a C compiler"),
    "autoconf": ("configure: error: no acceptable C compiler found in $PATH", "a C compiler"),
    "Rust's linker": ("error: linker `cc` not found", "a C compiler"),
    "Fortran": ("../meson.build:1:0: ERROR: Unknown compiler(s): [['gfortran'], ['flang']]", "a Fortran compiler"),
    "Rust": ("error: can't find Rust compiler", "a Rust compiler"),
    "PostgreSQL": ("Error: pg_config executable not found.", "PostgreSQL's pg_config"),
    "Python's headers": ("foo.c:1:10: fatal error: Python.h: No such file or directory", "Python's headers"),
    "a header": ("foo.c:1:10: fatal error: sql.h: No such file or directory", "the header sql.h"),
    "a library": ("/usr/bin/ld: cannot find -lgomp: No such file or directory", "the library gomp"),
    "pip": ("ERROR: Cannot find command 'git' - do you have 'git' installed and in your PATH?", "the program git"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "what"), LACKING.values(), ids=LACKING.keys())
def test_what_the_base_lacks_to_build_a_package_is_named(build, line, what):
    step = logged("RUN python3 -m pip install --requirement requirements.txt")
    with pytest.raises(BuildFailed) as caught:
        build(Executor(step, *BUILDING[:1], line, *BUILDING[1:], FAILED, code=1))
    assert line.strip() in caught.value.what
    assert f"The base image lacks {what}" in caught.value.remedy
    assert "lightfm" in caught.value.remedy
    for way_out in ("BASE_IMAGE", "Dockerfile.template", "has a wheel"):
        assert way_out in caught.value.remedy
    assert "Correct the Dockerfile" not in caught.value.remedy


def test_a_program_that_a_shell_does_not_find_is_named(build):
    with pytest.raises(BuildFailed, match="The base image lacks the program conda"):
        build(Executor(logged("RUN conda install x"), "/bin/sh: 1: conda: not found", FAILED, code=1))


def test_what_an_earlier_step_lacked_is_not_this_one_s(build):
    lines = (logged("RUN make || true"), LACKING["setuptools"][0], logged("RUN false"), "no reason", FAILED)
    with pytest.raises(BuildFailed, match="no reason") as caught:
        build(Executor(*lines, code=1))
    assert "lacks" not in str(caught.value)


NO_FILE = "ERROR: No matching distribution found for pywin32==306"
UNREACHED = (
    "WARNING: Retrying (Retry(total=4, connect=None, read=None)) after connection broken by 'NewConnectionError'"
)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ((NO_FILE,), "no engine can install it"),
        ((UNREACHED, NO_FILE), "PIP_INDEX_URL"),
        ((NO_FILE, "", "[notice] A new release of pip is available"), "no engine can install it"),
    ],
    ids=["no file of it", "no index", "not the last line"],
)
def test_what_no_index_has_is_not_the_dockerfile_s_fault(build, lines, said):
    with pytest.raises(BuildFailed, match="pywin32==306") as caught:
        build(Executor(logged("RUN pip install"), *lines, FAILED, code=1))
    assert said in caught.value.remedy
    assert "Dockerfile" not in caught.value.remedy


def test_a_step_that_fails_for_itself_may_be_the_requirements_fault(build):
    with pytest.raises(BuildFailed, match=r"Correct the Dockerfile or, if the version has none, its requirements"):
        build(Executor(logged("RUN false"), FAILED, code=1))


def test_a_foreign_platform_names_itself_and_the_ways_out(build):
    executor = Executor(logged("RUN true"), f"{IN_STEP}starting command: fork/exec /bin/sh: exec format error", code=1)
    with pytest.raises(BuildFailed, match="has no emulation") as caught:
        build(executor, platform=FOREIGN)
    assert str(FOREIGN) in caught.value.what
    assert all(word in caught.value.remedy for word in ("qemu-user-static", "MODEL_PLATFORMS", "TARGET_PLATFORMS"))


def test_a_program_of_no_format_is_the_author_s_own_fault(build):
    executor = Executor(logged('RUN ["/x"]'), f"{IN_STEP}starting command: fork/exec /x: exec format error", code=1)
    with pytest.raises(BuildFailed, match="exec format error"):
        build(executor, platform=machine_platform())


def test_killed_is_worth_another_attempt(build):
    with pytest.raises(TryAgain, match="memory"):
        build(Executor(code=-9))


def test_a_step_s_own_error_line_is_quoted(build):
    executor = Executor(
        logged("RUN make"),
        "Error: no rule",
        f"{IN_STEP}waiting for process to exit: exit status 2",
        code=2,
    )
    with pytest.raises(BuildFailed, match=r"'RUN make' failed: Error: no rule \(exit status 2\)"):
        build(executor)
