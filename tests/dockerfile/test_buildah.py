"""Buildah for real: what it builds is looked at in the layout, and a hostile author's RUN steps are run."""

import contextlib
import gzip
import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from builder.dockerfile.buildah import Buildah, registries_conf
from builder.dockerfile.engine import BuildJob
from builder.errors import BuildFailed, InvalidSettings, InvalidVersion, ServiceUnavailable, Terminated
from builder.process import run
from builder.reference import Platform, Repository
from builder.settings import BuildSettings, Network
from tests.waiting import HANG, LONG_HANG, growing, until

AMD64 = Platform("linux", "amd64")

pytestmark = pytest.mark.skipif(not Buildah().available(), reason="Buildah is not installed")


@pytest.fixture(scope="session")
def storage(tmp_path_factory):
    """One storage for all tests, so that the base image is pulled once."""
    folder = tmp_path_factory.mktemp("buildah")
    yield folder
    subprocess.run(
        ["buildah", f"--root={folder}/storage", f"--runroot={folder}/run", "rm", "--all"],
        check=False,
        capture_output=True,
    )


@pytest.fixture
def make(tmp_path, storage, monkeypatch):
    """Give a function that builds a Dockerfile and returns the image; what was printed is in `make.lines`."""
    monkeypatch.setattr("builder.dockerfile.buildah._SHORT", HANG)

    def build(
        dockerfile, *, files=None, platform=AMD64, engine=None, network=None, timeout=LONG_HANG, output=None, **more
    ):
        context = tmp_path / "context"
        context.mkdir(exist_ok=True)
        for name, content in (files or {}).items():
            (context / name).parent.mkdir(parents=True, exist_ok=True)
            (context / name).write_bytes(content)
        (context / "Dockerfile").write_text(dockerfile)
        layout = tmp_path / "layouts" / f"{platform.folder}-{len(build.lines)}"
        job = BuildJob(
            context=context,
            dockerfile=context / "Dockerfile",
            platform=platform,
            layout=layout,
            timeout=timeout,
            network=network or Network(),
            **more,
        )
        (engine or Buildah(storage=storage)).build(job, output or build.lines.append)
        return Image(layout)

    build.lines = []
    return build


class Image:
    """The one image of a layout."""

    def __init__(self, layout: Path) -> None:
        index = json.loads((layout / "index.json").read_text())
        (self.descriptor,) = index["manifests"]
        self._blobs = layout / "blobs" / "sha256"
        self.manifest = self._json(self.descriptor)
        self.config = self._json(self.manifest["config"])

    def _json(self, descriptor):
        return json.loads((self._blobs / descriptor["digest"].removeprefix("sha256:")).read_text())

    def entries(self, *, skip=1):
        """Return the tar entries of the layers above the first ones, by name: content, or None for what is no file."""
        found = {}
        for layer in self.manifest["layers"][skip:]:
            raw = (self._blobs / layer["digest"].removeprefix("sha256:")).read_bytes()
            content = gzip.decompress(raw) if "gzip" in layer["mediaType"] else raw
            with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                found.update({m.name: tar.extractfile(m).read() if m.isfile() else None for m in tar})
        return found


def test_an_image_of_one_platform_is_left_as_an_oci_layout(make, base_image):
    image = make(f"FROM {base_image}\nCOPY f /f\nRUN echo made > /made\nUSER 1000\n", files={"f": b"x"})
    assert image.descriptor["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert (image.config["os"], image.config["architecture"]) == ("linux", "amd64")
    entries = image.entries()
    assert (entries["f"], entries["made"]) == (b"x", b"made\n")
    assert any("STEP 3" in line for line in make.lines)


def test_a_foreign_platform_without_run_needs_no_emulation(make, base_image):
    platform = Platform("linux", "arm", "v7")
    image = make(f"FROM {base_image}\nCOPY f /f\n", files={"f": b"x"}, platform=platform)
    assert image.config["architecture"] == platform.architecture
    assert image.config.get("variant", "") == platform.variant


def test_a_second_build_takes_its_layers_from_the_cache(make, base_image):
    dockerfile = f"FROM {base_image}\nRUN head -c 8 /dev/urandom > /random\n"
    first = make(dockerfile)
    second = make(dockerfile)
    assert any("Using cache" in line for line in make.lines)
    assert first.descriptor == second.descriptor


def test_nothing_of_ours_stays_in_a_folder_beside_the_layout(make, base_image, tmp_path):
    make(f"FROM {base_image}\n")
    with pytest.raises(BuildFailed):
        make(f"FROM {base_image}\nRUN false\n")
    assert [path.name for path in (tmp_path / "layouts").iterdir() if path.name.startswith(".")] == []


def test_network_settings_are_seen_by_run_steps_and_are_not_in_the_image(make, base_image, tmp_path):
    (tmp_path / "ca.pem").write_text("THE-BUNDLE")
    (tmp_path / "pip.conf").write_text("[global]\ntimeout = 77\n")
    image = make(
        f"FROM {base_image}\nARG SSL_CERT_FILE\nUSER 1234\n"
        "RUN cat /etc/pip.conf /etc/uv/uv.toml $SSL_CERT_FILE; echo; env\n",
        network=Network(
            ca_bundle=tmp_path / "ca.pem",
            pip_config=tmp_path / "pip.conf",
            proxies={"HTTP_PROXY": "http://proxy.invalid:1", "NO_PROXY": "127.0.0.1"},
            index_variables={
                "PIP_INDEX_URL": "https://user:index-secret@index.invalid/simple",
                "UV_INDEX_URL": "https://user:index-secret@index.invalid/simple",
            },
        ),
    )
    seen = "\n".join(make.lines)
    for text in (
        "THE-BUNDLE",
        "timeout = 77",
        "cert = /run/builder/ca-bundle.pem",
        "index-url = https://user:index-secret@index.invalid/simple",
        'index-url = "https://user:index-secret@index.invalid/simple"',
        "http_proxy=http://proxy.invalid:1",
        "HTTP_PROXY=http://proxy.invalid:1",
    ):
        assert text in seen
    whole = json.dumps([image.config, image.manifest])
    assert "proxy.invalid" not in whole
    assert "index-secret" not in whole
    contents = b"".join(content or b"" for content in image.entries().values())
    assert b"BUNDLE" not in contents
    assert b"index-secret" not in contents
    # Where the base has no such files, their empty places stay; nothing else does.
    left = {name for name in image.entries() if not name.startswith(("etc", "run"))}
    assert left == set()
    assert {v for k, v in image.entries().items() if k in {"etc/pip.conf", "etc/uv/uv.toml"}} <= {b"", None}


def test_a_hostile_author_finds_no_secret_of_the_publisher(make, base_image, tmp_path, monkeypatch):
    monkeypatch.setenv("REGISTRY_TOKEN", "publisher-secret")
    (tmp_path / "outside").write_text("publisher-secret")
    docker = tmp_path / "ambient" / ".docker"
    docker.mkdir(parents=True)
    (docker / "config.json").write_text('{"auths":{"r.invalid":{"auth":"publisher-secret"}}}')
    monkeypatch.setenv("DOCKER_CONFIG", str(docker))
    monkeypatch.setenv("HOME", str(docker.parent))
    # A process of the user that a step can become is the one whose environment the kernel would show it.
    user = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
    bystander = subprocess.Popen(["sleep", "6000"], env={"PATH": os.environ["PATH"], "X": "publisher-secret"}, **user)
    escape = "import os; os.mkdir('/x'); os.chroot('/x'); os.chdir('../../../../../..'); os.chroot('.')"
    try:
        make(
            f"FROM {base_image}\n"
            f"RUN cat /proc/*/environ /proc/*/root{tmp_path}/outside {tmp_path}/outside 2>&1 | tr '\\0' '\\n'; true\n"
            f"""RUN python3 -c "{escape}; print(open('{tmp_path}/outside').read())" 2>&1; true\n"""
            "RUN env\n"
            "USER 65534:65534\n"
            "RUN cat /proc/*/environ 2>&1 | tr '\\0' '\\n'; true\n"
        )
    finally:
        bystander.kill()
        bystander.wait()
    assert any("PermissionError" in line for line in make.lines)
    # The steps themselves name the file, never its content.
    assert not any("publisher-secret" in line for line in make.lines)


def copied(source, target, authfile):
    """Copy an image from the anonymous registry into one that asks for a credential."""
    command = ["skopeo", "copy", "-q", "--src-tls-verify=false", "--dest-tls-verify=false"]
    subprocess.run([*command, f"--dest-authfile={authfile}", f"docker://{source}", f"docker://{target}"], check=True)


ESCAPES = [
    "--mount=type=bind,from=a,source=/link,target=/m,rw",
    "--mount=type=bind,source=x,target=/m",
    "--mount=type=cache,id=../../../../../../../../../../etc,target=/m",
    "--mount=type=cache,from=a,source=/link,target=/m",
    "--mount=from=a,source=/link,target=/m",
    '--"mount"=type=bind,from=a,source=/link,target=/m',
    "--mo\\unt=type=bind,from=a,source=/link,target=/m",
    "--network=host --mount=type=bind,from=a,source=/link,target=/m",
    "--mount=type=cache,target=/m --mount=type=bind,from=a,source=/link,target=/n",
    "--mount=type=$T,from=a,source=/link,target=/m",
    "\\\n  --mount=type=bind,from=a,source=/link,target=/m",
    "--mount",
]


@pytest.mark.parametrize("flags", ESCAPES)
def test_a_mount_that_can_leave_the_build_is_refused_by_an_old_buildah(make, storage, flags):
    def runner(argv, *, output, **_):
        if "--version" in argv:
            output("buildah version 1.28.2 (image-spec 1.1.0-rc2, runtime-spec 1.0.2-dev)")
            return 0
        return 1 if argv[-1] == "true" else pytest.fail("it was run")

    with pytest.raises(BuildFailed, match=r"Line 3 .*1\.28\.2.*COPY --from"):
        make(f"FROM scratch AS a\nFROM scratch\nRUN {flags} ls /m\n", engine=Buildah(storage=storage, runner=runner))


def test_a_mount_that_names_no_source_is_allowed(make, base_image):
    flags = "--mount=type=cache,id=pip,target=/root/.cache/pip,sharing=locked --mount=type=tmpfs,target=/t"
    make(f"FROM {base_image}\nRUN {flags} ls -d /t /root/.cache/pip\n")
    assert "/root/.cache/pip" in make.lines


NEWER = {
    "a script": ("RUN <<EOF\nset -eux\necho x\nEOF\n", "here-document", "1.33"),
    "a file": ("COPY <<-'END' /etc/x.conf\nsome text\nEND\n", "here-document", "1.33"),
    "a program's": ("RUN python3 <<EOF\nFROM = 1\nEOF\n", "here-document", "1.33"),
    "a link": ("COPY --link x /x\n", "COPY --link", "1.41"),
    "a link among flags": ("ADD --chown=1:1 --link=true x /x\n", "ADD --link", "1.41"),
}


@pytest.mark.parametrize(("lines", "what", "since"), NEWER.values(), ids=NEWER.keys())
def test_what_this_buildah_does_not_know_yet_is_named_with_the_release_that_does(make, storage, lines, what, since):
    """Debian 12's takes the lines of a here-document for instructions: "unknown instruction 'SET'"."""
    with pytest.raises(BuildFailed, match=rf"Line 2 of the Dockerfile .*{what}.*1\.28\.2") as caught:
        make(f"FROM scratch\n{lines}", files={"x": b"x"}, engine=old_buildah(storage))
    assert f"Buildah {since} or newer" in caught.value.remedy
    assert "Kaniko" in caught.value.remedy


def test_features_are_not_checked_for_a_new_buildah(make, storage):
    engine = old_buildah(storage, "1.41.0", runs=True)
    with pytest.raises(BuildFailed, match="exit code 9"):
        make("FROM scratch\nRUN <<EOF\nset -eux\nEOF\nCOPY --link x /x\n", engine=engine)


def test_a_packaged_buildah_that_lacks_here_documents_is_told_from_a_misspelt_instruction(make, storage):
    """Ubuntu 24.04's 1.33 was built without them."""
    said = (
        "STEP 2/3: RUN <<EOF",
        "STEP 3/3: set -eux",
        'Error: building at STEP "SET ": Build error: Unknown instruction: "SET"',
    )
    engine = old_buildah(storage, "1.33.7", *said, runs=True)
    with pytest.raises(BuildFailed, match="here-document") as caught:
        make("FROM scratch\nRUN <<EOF\nset -eux\nEOF\n", engine=engine)
    assert "Kaniko" in caught.value.remedy


def test_a_shift_operator_is_not_taken_for_a_here_document(make, base_image):
    make(f"FROM {base_image}\nRUN echo $((1 <<2)) '<<EOF'\n")
    assert "4 <<EOF" in make.lines


def old_buildah(storage, version="1.28.2", *said, runs=False):
    """Return a Buildah of some version, which prints lines and fails where it may be run at all."""

    def runner(argv, *, output, **_):
        if "--version" in argv:
            output(f"buildah version {version} (image-spec 1.1.0-rc2, runtime-spec 1.0.2-dev)")
            return 0
        if argv[-1] != "true" and not runs:
            pytest.fail("it was run")
        for line in said if argv[-1] != "true" else ():
            output(line)
        return 9

    return Buildah(storage=storage, runner=runner)


def test_only_the_credential_of_the_job_is_used_for_pulls(make, basic_registry, base_image, tmp_path, monkeypatch):
    reference = f"{basic_registry.host}/private/base:1"
    config = basic_registry.docker_config(tmp_path / "docker")
    copied(base_image, reference, config / "config.json")
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(config / "config.json"))
    monkeypatch.setenv("DOCKER_CONFIG", str(config))
    with pytest.raises(BuildFailed, match="BUILD_DOCKER_CONFIG"):
        make(f"FROM {reference}\n")
    assert make(f"FROM {reference}\n", docker_config=config).config["architecture"] == "amd64"


def test_a_registry_under_a_private_ca_is_trusted_by_its_bundle(make, tls_registry, base_image, tmp_path):
    reference = f"{tls_registry.host}/private/base:1"
    config = tls_registry.docker_config(tmp_path / "docker")
    copied(base_image, reference, config / "config.json")
    image = make(f"FROM {reference}\n", docker_config=config, network=Network(ca_bundle=tls_registry.ca))
    assert image.config["architecture"] == "amd64"


def test_only_named_hosts_and_loopback_are_reached_over_plain_http(tmp_path):
    (tmp_path / "Dockerfile").write_text(
        "FROM 127.0.0.1:5000/a\nFROM quay.io/b\nFROM plain.invalid:80/c\nCOPY --from=localhost:1/t / /\n"
    )
    job = BuildJob(
        context=tmp_path,
        dockerfile=tmp_path / "Dockerfile",
        platform=AMD64,
        layout=tmp_path / "layout",
        timeout=1,
        network=Network(insecure_registries=frozenset({"plain.invalid:80", "other.invalid"})),
        cache=Repository("[::1]:5000", "cache"),
    )
    text = registries_conf(job)
    insecure = [line.split(" = ")[1].strip('"') for line in text.splitlines() if line.startswith("location")]
    assert insecure == ["127.0.0.1:5000", "[::1]:5000", "localhost:1", "other.invalid", "plain.invalid:80"]
    assert text.count("insecure = true") == 5


@pytest.mark.parametrize(
    "case",
    [
        ("FROM {base}\nRUN echo the reason >&2; exit 3\n", BuildFailed, r"RUN echo the reason.*the reason \(exit code 3\)"),
        (
            "FROM {base}\nRUN echo \"error: command 'gcc' failed: No such file or directory\"; echo more; exit 1\n",
            BuildFailed,
            r"'gcc' failed: No such file or directory \(exit code 1\)\. The base image lacks a C compiler",
        ),
        ("FROM {base}\nRAN x\n", BuildFailed, "unknown instruction 'RAN'|unknown instruction 'ran'"),
        ("FROM {base}\nCOPY nothere /x\n", BuildFailed, "COPY nothere /x.*nothere"),
        ("FROM {host}/no/such:1\n", BuildFailed, "could not build linux/amd64.*Check the name and the tag after FROM"),
        ("FROM 127.0.0.1:1/a\n", ServiceUnavailable, "connection refused"),
        ("RUN x\n", InvalidVersion, "no FROM"),
    ],
)  # fmt: skip
def test_failures_say_what_and_what_to_do(make, base_image, registry, case):
    dockerfile, error, said = case
    with pytest.raises(error, match=said) as caught:
        make(dockerfile.format(base=base_image, host=registry.host))
    assert caught.value.remedy
    assert len(caught.value.one_line()) <= 1000


def test_a_platform_that_cannot_be_run_is_named_with_the_ways_out(make):
    # No machine runs this: it is neither a program nor a script, as a foreign program is where nothing emulates it.
    with pytest.raises(BuildFailed, match=r"linux/s390x.*cannot run.*qemu.*MODEL_PLATFORMS"):
        make(
            "FROM scratch\nCOPY --chmod=755 sh /bin/sh\nRUN x\n",
            files={"sh": b"\x7fNOT"},
            platform=Platform("linux", "s390x"),
        )


def test_a_timeout_names_the_setting_and_leaves_no_container(make, base_image, storage):
    for seconds in growing(6):
        with pytest.raises(BuildFailed, match="BUILD_TIMEOUT"):
            make(f"FROM {base_image}\nRUN echo in the step; sleep 6000\n", timeout=seconds)
        if "in the step" in make.lines:
            break
    assert containers(storage) == []


def test_termination_ends_the_build_and_leaves_no_container(make, base_image, storage):
    def output(line):
        if line == "in the step":
            raise Terminated

    with pytest.raises(Terminated):
        make(f"FROM {base_image}\nRUN echo in the step; sleep 6000\n", output=output)
    assert containers(storage) == []
    # What was killed may take a moment to be gone.
    until(lambda: not [command for command in commands() if str(storage) in command and "build" in command])


def commands():
    """Yield the command lines of all processes."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            yield path.read_text(errors="replace")


def containers(storage):
    done = subprocess.run(
        ["buildah", f"--root={storage}/storage", f"--runroot={storage}/run", "containers", "--quiet"],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.split()


def test_where_no_namespace_can_be_made_it_builds_and_says_so(make, base_image, storage):
    def runner(argv, **more):
        return 1 if argv[-1] == "true" else run(argv, **more)

    assert make(f"FROM {base_image}\nRUN true\n", engine=Buildah(storage=storage, runner=runner)).config
    assert any("no PID namespace" in line for line in make.lines)


def test_the_childs_environment_is_clean(make, base_image, storage, monkeypatch):
    monkeypatch.setenv("REGISTRY_TOKEN", "secret-of-ours")
    seen = []

    def runner(argv, *, env, **more):
        seen.append(env)
        return run(argv, env=env, **more)

    make(f"FROM {base_image}\n", engine=Buildah(storage=storage, runner=runner))
    names = {name for env in seen for name in env}
    assert names == {"PATH", "HOME", "TMPDIR", "CONTAINERS_CONF", "CONTAINERS_REGISTRIES_CONF", "REGISTRY_AUTH_FILE"}


def test_an_unreadable_bundle_is_named(make, base_image, tmp_path):
    with pytest.raises(InvalidSettings, match="SSL_CERT_FILE"):
        make(f"FROM {base_image}\n", network=Network(ca_bundle=tmp_path / "absent.pem"))


@pytest.fixture
def machine_network():
    """The network as this machine's own environment names it."""
    settings = BuildSettings.from_environ(os.environ)
    return Network(
        ca_bundle=settings.ssl_cert_file,
        pip_config=settings.pip_config_file,
        proxies=settings.proxies,
        index_variables={name: value.get_secret_value() for name, value in settings.index_variables.items()},
    )


def test_the_apt_section_that_the_readme_warned_of_builds(make, base_image, machine_network):
    image = make(
        f"FROM {base_image}\n"
        "RUN echo 'Acquire::Retries \"10\";' > /etc/apt/apt.conf.d/retries\n"
        "RUN apt-get update \\\n"
        "    && apt-get upgrade --yes \\\n"
        "    && apt-get install -y --no-install-suggests --no-install-recommends \\\n"
        "    curl \\\n"
        "    && apt-get clean \\\n"
        "    && rm -rf /var/lib/apt/lists/*\n",
        network=machine_network,
    )
    assert "usr/bin/curl" in image.entries()
