"""The wheels method as its users see it: from a registered version to an image in a registry that runs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import httpx2
import pytest

from builder.errors import InvalidSettings, InvalidVersion
from builder.oci.target_rules import _TARGETS, FOUNDRY
from builder.publish import plan as preview
from builder.publish import publish
from scripts.launch import clean_environ
from tests.servers.forwarding import forwarding
from tests.servers.small import push_base, small_files
from tests.versions import register
from tests.waiting import HANG, LONG_HANG

ROOT = Path(__file__).parents[2]
# The command line's entry, in a process that did something else before.
WITH_A_HISTORY = "import decimal, sqlite3, numpy, pandas; from builder.__main__ import main; main()"

# The same, and an upload waits for the registry without an end.
PATIENT = """
import httpx2
from builder.oci import transport
transport._UPLOAD_TIMEOUT = httpx2.Timeout(None)
from builder.__main__ import main
main()
"""


def run(environ, *arguments, **options):
    """Run the command line, or what stands in its place, in a process of its own; return what it did."""
    command = arguments if arguments[0] == sys.executable else (sys.executable, "-m", "builder", *arguments)
    environ = {**clean_environ(), "PYTHONPATH": str(ROOT), **environ}
    return subprocess.run(command, check=False, text=True, capture_output=True, env=environ, **options)


def succeeded(*arguments, **options):
    done = run(*arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def content(storage):
    """Return all that a registry holds: its files, and the links' content."""
    return {
        str(path.relative_to(storage)): path.read_bytes() if path.name == "link" else path.stat().st_size
        for path in Path(storage).rglob("*")
        if path.is_file() and "_uploads" not in path.parts
    }


def tags_below(registry, namespace):
    """Return the references of all tags below a namespace that name images; locks and facts are artifacts."""
    repositories = httpx2.get(f"{registry.url}/v2/_catalog?n=1000", timeout=HANG).json()["repositories"]
    return [
        f"{registry.host}/{repository}:{tag}"
        for repository in repositories
        if repository.startswith(f"{namespace}/")
        for tag in httpx2.get(f"{registry.url}/v2/{repository}/tags/list", timeout=HANG).json().get("tags") or ()
        if not tag.startswith(("lock-", "base-", "sha256-"))
    ]


def test_an_image_is_assembled_and_runs(small, small_settings, base_image, runtime, podman, crane, tmp_path):
    model = small()
    published = publish(small_settings(model, BASE_IMAGE=base_image))
    assert "PASS" in crane("validate", "--remote", str(published.reference))
    archive = tmp_path / "archive.tar"
    source = f"docker://{published.reference}"
    copy = ["skopeo", "copy", "--quiet", "--src-tls-verify=false", source, f"docker-archive:{archive}:test:1"]
    subprocess.run(copy, check=True, capture_output=True)
    for each in [runtime, *([podman] if podman != runtime else [])]:
        assert each.output(published.reference) == "prediction 42 small 11\n"
        who = each.output(published.reference, "python", "-c", "import os, sys; print(os.getuid(), sys.prefix)")
        assert who == "10001 /opt/model\n"
    config = json.loads(crane("config", str(published.reference)))
    assert config["config"]["Cmd"] == ["python", "client/app.py"]
    history = [line["created_by"] for line in config["history"] if not line.get("empty_layer")]
    assert len(history) == len(config["rootfs"]["diff_ids"])
    assert "wheel small_app-1.0-py3-none-any.whl" in history
    notes = json.loads(crane("manifest", str(published.reference)))["annotations"]
    assert notes["io.modelimage.method"] == "wheels"
    assert notes["org.opencontainers.image.base.digest"] == crane("digest", base_image).strip()
    assert model.outcome()["state"] == "published"


def test_the_same_image_whoever_publishes_it(small, small_environ, registry, registry_v3, tmp_path, crane):
    model = small("small-app\nmuch-code\n", tags={"MODEL_PLATFORMS": "linux/amd64,linux/arm64"})
    other = tmp_path / "elsewhere"
    other.mkdir()
    differing = {
        "REGISTRY_URL": registry_v3.host,
        "WHEEL_LAYERS": f"{registry_v3.host}/{model.name}-wheels",
        "BUILDER_WORKSPACE": str(other / "workspace"),
        "PYTHONHASHSEED": "7",
        "TZ": "Pacific/Kiritimati",
        "LC_ALL": "C.UTF-8",
        "TMPDIR": str(other),
    }
    environ = small_environ(model, **differing)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(succeeded, small_environ(model), "publish", cwd=ROOT)
        two = pool.submit(succeeded, environ, sys.executable, "-c", WITH_A_HISTORY, "publish", cwd=other, umask=0o077)
        first, second = one.result(), two.result()
    assert first.partition("@")[2] == second.partition("@")[2]
    for reference in (first, second):
        assert "PASS" in crane("validate", "--remote", reference)
    export = tmp_path / "image.tar"
    crane("export", "--platform", "linux/amd64", second, str(export))
    with tarfile.open(export) as archive:
        names = archive.getnames()
    # What was compared has bytecode in it.
    assert sum(name.endswith(".pyc") for name in names) >= 7


def test_what_the_registry_has_is_not_sent_again(small, small_settings, registry, mlflow_server, tmp_path):
    weights = os.urandom(600_000)
    files = {"mymodel/weights.txt": "41\n", "mymodel/large.bin": weights, "mymodel/small.bin": os.urandom(2000)}
    model = small(files=files)
    with forwarding(registry.host) as proxy:
        base = push_base(proxy.host)
        there = {"REGISTRY_URL": f"{proxy.host}/{model.name}", "BASE_IMAGE": base}
        proxy.seen.clear()
        first = publish(small_settings(model, **there))
        assert len(weights) < first.sent < proxy.sent
        base_layers = {each["digest"]: each["size"] for each in _platform_manifest(registry, base)["layers"]}
        # What was sent to be kept, and mounted then, is not saved.
        assert sum(base_layers.values()) <= first.saved < len(weights)
        assert first.seconds.keys() == {"fetch", "push"}
        assert first.method == "wheels"
        sent = [each.path for each in proxy.seen if each.method == "PUT" and "/blobs/" in each.path]
        assert not any(digest.partition(":")[2] in path for digest in base_layers for path in sent)
        mounted = [each for each in proxy.seen if "mount=" in each.path]
        assert mounted
        assert {each.status for each in mounted} == {201}

        proxy.seen.clear()
        changed = {**files, "mymodel/small.bin": os.urandom(2000)}
        second = register(mlflow_server.uri, small_files(**changed), name=model.name)
        again = publish(small_settings(second, **there))
        # One layer of small files, a config and manifests.
        assert 2000 < again.sent < proxy.sent < 30_000
        assert first.size * 0.9 < again.sent + again.saved < first.size * 1.1

        proxy.seen.clear()
        third = publish(small_settings(second, **there))
        assert (third.changed, third.sent, third.saved, third.method) == (False, 0, 0, "")
        assert proxy.sent == 0


def _platform_manifest(registry, base):
    path = base.partition("/")[2]
    name, _, tag = path.rpartition(":")
    accept = {"Accept": "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json"}

    def manifest(tag):
        return httpx2.get(f"{registry.url}/v2/{name}/manifests/{tag}", headers=accept, timeout=HANG).json()

    return manifest(manifest(tag)["manifests"][0]["digest"])


# -- processes that end in the middle, or are two


def test_a_publish_killed_at_any_write_can_be_repeated(small, small_environ, small_settings, registry, crane):
    model = small()
    with forwarding(registry.host) as proxy:
        place = {"REGISTRY_URL": f"{proxy.host}/{model.name}-whole"}
        whole = publish(small_settings(model, **place)).reference
        writes = [each for each in proxy.seen if each.method in {"PUT", "POST", "PATCH"}]
        assert len(writes) > 10

    for point in (1, len(writes) // 2, len(writes) - 1):
        process: list[subprocess.Popen] = []
        started, killed = threading.Event(), threading.Event()
        count = iter(range(1, 1000))

        def rule(asked, *, point=point, process=process, started=started, killed=killed, count=count):
            if asked.method in {"PUT", "POST", "PATCH"} and next(count) == point:
                started.wait(HANG)
                process[0].kill()
                killed.set()
                raise ConnectionError
            if killed.is_set():
                raise ConnectionError

        namespace = f"{model.name}-killed-{point}"
        with forwarding(registry.host, rule) as proxy:
            environ = {**clean_environ(), **small_environ(model, REGISTRY_URL=f"{proxy.host}/{namespace}")}
            environ["PYTHONPATH"] = str(ROOT)
            process.append(
                subprocess.Popen(
                    [sys.executable, "-m", "builder", "publish"],
                    env=environ,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
            started.set()
            process[0].communicate(timeout=LONG_HANG)
            assert process[0].returncode == -9
        settings = small_settings(model, REGISTRY_URL=f"{registry.host}/{namespace}")
        # Whatever a tag names now is whole.
        for reference in tags_below(registry, namespace):
            assert "PASS" in crane("validate", "--remote", reference)
        again = publish(settings)
        assert again.reference.digest == whole.digest
        assert "PASS" in crane("validate", "--remote", str(again.reference))


def test_asked_to_end_while_the_registry_keeps_an_upload_waiting(small, small_environ, registry):
    model = small(files={"mymodel/large.bin": os.urandom(600_000)})
    fetched, held, release = threading.Event(), threading.Event(), threading.Event()

    def rule(asked):
        if fetched.is_set() and asked.method == "PUT":
            held.set()
            release.wait(LONG_HANG)

    with forwarding(registry.host, rule) as proxy:
        environ = small_environ(model, REGISTRY_URL=f"{proxy.host}/{model.name}")
        succeeded(environ, "fetch")
        fetched.set()
        environ = {**clean_environ(), "PYTHONPATH": str(ROOT), **environ}
        with subprocess.Popen([sys.executable, "-c", PATIENT, "push"], env=environ, stderr=subprocess.DEVNULL) as push:
            try:
                assert held.wait(HANG)
                push.send_signal(signal.SIGTERM)
                # A Pod's containers are killed after 30 seconds, and nothing would be recorded. It takes one, and
                # minutes on a busy machine; one that waited for the registry would take as long as the registry does.
                assert push.wait(HANG) == 75
            finally:
                release.set()
    assert model.outcome()["state"] == "failed"
    assert model.outcome()["error"].startswith("Terminated")


def test_two_publishers_of_one_wheel_at_the_same_moment(small, small_settings, registry, tmp_path, crane):
    models = [small(), small(files={"mymodel/weights.txt": "42\n"})]
    both = threading.Barrier(2, timeout=HANG)
    met = []

    def rule(asked):
        # The first layer that each of them has made: none of the two has seen the other's.
        if asked.method == "PUT" and "/wheel-layers/manifests/" in asked.path and b"small_lib" in asked.body:
            met.append(both.wait())

    with forwarding(registry.host, rule) as proxy, ThreadPoolExecutor(2) as pool:
        place = {"REGISTRY_URL": f"{proxy.host}/{models[0].name}-race"}
        futures = [
            pool.submit(publish, small_settings(model, **place, BUILDER_WORKSPACE=str(tmp_path / model.name)))
            for model in models
        ]
        references = [str(future.result().reference) for future in futures]
        assert sorted(met) == [0, 1]
        for reference in references:
            assert "PASS" in crane("validate", "--remote", reference)


# -- plans


def test_a_plan_shows_what_would_move_and_moves_nothing(small, small_settings, small_environ, registry, packages):
    model = small(tags={"MODEL_PLATFORMS": "linux/amd64,linux/arm64"})
    settings = small_settings(model)
    before, tags = content(registry.storage), model.tags()
    plan = preview(settings, check_push=True)
    text = succeeded(small_environ(model), "plan")
    assert content(registry.storage) == before
    assert model.tags() == tags
    assert [step.method for step in plan.platforms] == ["wheels", "wheels"]
    for step in plan.platforms:
        assert step.layers.known == 0
        assert set(step.layers.missing) == {"small_app-1.0-py3-none-any.whl", "small_lib-1.0-py3-none-any.whl"}
        assert step.layers.download == sum(
            len(content) for name in ("small-app", "small-lib") for content, *_ in packages.files[name].values()
        )
    assert "wheel layers: 0 known, 2 wheels to get" in text
    assert "small_lib-1.0-py3-none-any.whl" in text

    publish(settings)
    told = json.loads(succeeded(small_environ(model), "plan", "--rebuild", "--json"))
    assert [step["layers"]["known"] for step in told["platforms"]] == [2, 2]
    assert [step["layers"]["missing"] for step in told["platforms"]] == [[], []]


def test_the_phases_hand_over_through_the_workspace_alone(small, small_environ, tmp_path, crane, packages):
    model = small(tags={"MODEL_PLATFORMS": "linux/amd64,linux/arm64"})
    environ = small_environ(model)
    assert succeeded(environ, "fetch") == ""
    moved = tmp_path / "another container's"
    Path(environ["BUILDER_WORKSPACE"]).rename(moved)
    build = {"BUILDER_WORKSPACE": str(moved), "LOG_FORMAT": "json"}
    assert succeeded(build, "build") == ""
    asked = len(packages.requests)
    # Push resolves nothing: it only downloads what the recipe names.
    reference = succeeded({**environ, "BUILDER_WORKSPACE": str(moved)}, "push")
    assert {path.split("/")[1] for _, path, _ in packages.requests[asked:]} == {"files"}
    assert "PASS" in crane("validate", "--remote", reference)
    assert model.outcome()["image"] == reference


@pytest.mark.parametrize("own", [False, True], ids=["of the settings", "of the version"])
def test_a_missing_base_image_is_blamed_on_the_setting_or_the_tag(small, small_settings, registry, own):
    absent = f"{registry.host}/base/absent:1"
    model = small(tags={"MODEL_BASE_IMAGE": absent} if own else {})
    changes = {"ALLOWED_BASE_IMAGES": absent} if own else {"BASE_IMAGE": absent}
    with pytest.raises(InvalidVersion if own else InvalidSettings, match=r"The base image .* does not exist"):
        publish(small_settings(model, **changes))
    assert model.outcome()["attempts"] == ("1" if own else "0")


def test_push_keeps_what_fetch_found_out_and_may_not_keep(small, small_environ, registry, crane):
    model = small()
    refused = 403, {"Content-Type": "application/json"}, b'{"errors": [{"code": "DENIED", "message": "read-only"}]}'
    with forwarding(registry.host, lambda asked: None if asked.method in {"GET", "HEAD"} else refused) as proxy:
        environ = small_environ(model, REGISTRY_URL=f"{proxy.host}/{model.name}")
        succeeded(environ, "fetch")
        proxy.rule = lambda _asked: None
        succeeded(environ, "push")
    tags = crane("ls", f"{registry.host}/{model.name}/wheel-layers").split()
    assert {"base", "lock"} < {tag.partition("-")[0] for tag in tags}


def test_a_platform_is_added(small, small_settings, crane):
    model = small()
    first = publish(small_settings(model))
    model.set_tag("MODEL_PLATFORMS", "linux/amd64,linux/arm64")
    second = publish(small_settings(model))
    manifests = json.loads(crane("manifest", str(second.reference)))["manifests"]
    found = {each["platform"]["architecture"]: each["digest"] for each in manifests}
    assert found["amd64"] == str(first.reference.digest)
    assert set(found) == {"amd64", "arm64"}
    assert "PASS" in crane("validate", "--remote", str(second.reference))
    assert not publish(small_settings(model)).changed


def test_foundry_without_its_platform_is_refused_before_anything_is_made(small, small_settings, registry, packages):
    model = small(tags={"MODEL_PLATFORMS": "linux/arm64"})
    before, asked = content(registry.storage), len(packages.requests)
    with pytest.raises(InvalidVersion, match="platform is linux/arm64, and must be linux/amd64") as caught:
        publish(small_settings(model))
    assert caught.value.exit_code == 65
    assert content(registry.storage) == before
    assert len(packages.requests) == asked
    assert "breaks a rule of Foundry" in model.outcome()["error"]
    assert publish(small_settings(model, TARGET_TAG="EXTERNAL_TARGET_ELSEWHERE")).changed


def test_a_template_that_is_not_used_is_not_used_for_a_platform_without_a_wheel_either(small, small_settings):
    files = {"templates/Dockerfile.template": "FROM somebody/else:1\nRUN echo the author's own\n"}
    model = small("only-amd64==1.0\n", files=files, tags={"MODEL_PLATFORMS": "linux/amd64,linux/arm64"})
    plan = preview(small_settings(model, BUILD_METHOD="wheels"))
    assert [step.method for step in plan.platforms] == ["wheels", "dockerfile"]
    assert "only-amd64" in plan.dockerfile or "requirements.txt" in plan.dockerfile
    assert "author's own" not in plan.dockerfile


# -- large environments

COUNTS = """\
import importlib, importlib.metadata
print(sum(importlib.import_module(f"tiny_{number:03}").NUMBER for number in range(120)))
print(len([each for each in importlib.metadata.distributions() if each.name.startswith("tiny-")]))
"""


def test_more_wheels_than_layers(small, small_settings, base_image, runtime, crane):
    requirements = "".join(f"tiny-{number:03}==1.0\n" for number in range(120))
    model = small(requirements, files={"client/app.py": COUNTS})
    # Without bytecode, which takes a process for each wheel.
    changes = {"BASE_IMAGE": base_image, "WHEEL_BYTECODE": "false"}
    published = publish(small_settings(model, **changes))
    assert "PASS" in crane("validate", "--remote", str(published.reference))
    layers = json.loads(crane("manifest", str(published.reference)))["layers"]
    assert 70 < len(layers) <= 100
    assert runtime.output(published.reference) == f"{sum(range(120))}\n120\n"
    assert publish(small_settings(model, **changes), rebuild=True).reference == published.reference


# -- what models hold

NASTY = {
    "mymodel/with space.txt": "space",
    "mymodel/\u00fcml\u00e4ut/\u65e5\u672c\u8a9e.txt": "unicode",
    "mymodel/" + "deep/" * 60 + "file.txt": "deep",
    "mymodel/" + "n" * 240 + ".txt": "long",
    "mymodel/empty.bin": b"",
    "mymodel/.hidden": "hidden",
    "mymodel/-rf": "dash",
    "mymodel/a'b\"c$(x).txt": "quotes",
}


def test_names_that_are_hard_to_write_arrive_as_they_are(small, small_settings, crane, tmp_path):
    published = publish(small_settings(small(files=NASTY)))
    assert "PASS" in crane("validate", "--remote", str(published.reference))
    export = tmp_path / "image.tar"
    crane("export", str(published.reference), str(export))
    with tarfile.open(export) as archive:
        for path, text in NASTY.items():
            member = archive.getmember(f"app/{path}")
            assert archive.extractfile(member).read() == (text if isinstance(text, bytes) else text.encode())
            assert member.mode == 0o644
        owners = {(member.uid, member.gid) for member in archive if member.name.startswith(("app", "opt/model"))}
    assert owners == {(0, 0)}


def test_a_shard_that_changes_is_sent_alone(small, small_settings, registry, mlflow_server):
    files = {f"mymodel/shard-{number}.bin": os.urandom(400_000) for number in range(40)}
    files["mymodel/head.bin"] = os.urandom(300_000)
    model = small(files=files)
    with forwarding(registry.host) as proxy:
        there = {"REGISTRY_URL": f"{proxy.host}/{model.name}"}
        publish(small_settings(model, **there))
        before = proxy.sent
        files["mymodel/head.bin"] = os.urandom(300_000)
        publish(small_settings(register(mlflow_server.uri, small_files(**files), name=model.name), **there))
        assert 300_000 < proxy.sent - before < 500_000


def test_a_file_that_no_layer_may_hold_is_refused_before_it_is_downloaded(small, small_settings, monkeypatch):
    rules = dataclasses.replace(FOUNDRY, most_layer_bytes=700_000)
    monkeypatch.setitem(_TARGETS, "pltr_foundry", rules)
    monkeypatch.setattr("builder.publish.write_context", lambda *_, **__: pytest.fail("it is downloaded"))
    model = small(files={"mymodel/large.bin": os.urandom(700_000)})
    with pytest.raises(InvalidVersion, match=r"'app/mymodel/large.bin' of 700000 bytes .* 700000 bytes.*shards"):
        publish(small_settings(model))


def test_a_model_of_empty_files(small, small_settings, crane):
    published = publish(small_settings(small(files={"mymodel/weights.txt": b"", "client/app.py": b""})))
    assert "PASS" in crane("validate", "--remote", str(published.reference))


def test_a_client_brings_requirements_of_its_own(small, small_settings, base_image, runtime):
    files = {
        "client/requirements.txt": "tiny-007\n",
        "client/app.py": "import small_app, tiny_007\nprint(small_app.WHO, tiny_007.NUMBER)\n",
    }
    published = publish(small_settings(small(files=files), BASE_IMAGE=base_image))
    assert runtime.output(published.reference) == "small 7\n"


def test_every_line_of_a_publish_names_version_and_phase(small, small_environ, crane):
    model = small()
    done = run(small_environ(model), "publish")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert {(line["model"], line["version"]) for line in lines} == {(model.name, model.version)}
    assert [phase for phase, _ in itertools.groupby(line["phase"] for line in lines)] == ["fetch", "push", "end"]
    # Told by a thread.
    assert "assembled" in {line["event"] for line in lines}
    last = lines[-1]
    assert last["event"] == "published"
    assert f"{last['image'].rpartition(':')[0]}@{last['digest']}" == done.stdout.strip()
    assert (last["method"], last["platforms"]) == ("wheels", ["linux/amd64"])
    assert last["seconds"] > 0
    layers = {layer["digest"]: layer["size"] for layer in json.loads(crane("manifest", last["image"]))["layers"]}
    assert last["bytes"] == sum(layers.values())


def test_what_fails_is_told_with_its_time(small, small_environ):
    done = run(small_environ(small(), MODEL_VERSION="77"), "publish")
    last = json.loads(done.stderr.splitlines()[-1])
    assert last["event"] == "failed"
    assert datetime.fromisoformat(last["timestamp"]).tzinfo is UTC


# The second has more files than layers, and more layers for them on amd64 than on arm64.
MODELS = {
    "small": ("small-app\n", {}),
    "many files": (
        "small-app\n" + "".join(f"tiny-{number:03}==1.0; platform_machine == 'aarch64'\n" for number in range(9)),
        {f"mymodel/{number}.bin": random.Random(number).randbytes(300_000) for number in range(120)},
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_an_image_is_the_same_whether_its_index_was_made_at_once_or_extended(
    small, small_settings, registry, crane, kind
):
    requirements, files = MODELS[kind]
    model = small(requirements, files=files)
    first = publish(small_settings(model, TARGET_PLATFORMS="linux/amd64"))
    both = {"TARGET_PLATFORMS": "linux/amd64,linux/arm64"}
    extended = publish(small_settings(model, **both))
    at_once = publish(small_settings(model, REGISTRY_URL=f"{registry.host}/{model.name}-again", **both))
    assert extended.reference.digest == at_once.reference.digest != first.reference.digest
    index = json.loads(crane("manifest", str(at_once.reference)))
    assert index["annotations"]["io.modelimage.platforms"] == "linux/amd64,linux/arm64"
    assert str(first.reference.digest) in {entry["digest"] for entry in index["manifests"]}
