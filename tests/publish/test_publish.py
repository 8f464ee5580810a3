"""Publishing for real: MLflow, a registry, Buildah, and what crane says of the result."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from builder.clients import connected
from builder.errors import BuildFailed, InvalidVersion, ServiceUnavailable, TryAgain, UsageError, VersionNotFound
from builder.publish import Published, build, fetch, publish, push, workspace_of
from builder.publish import plan as preview
from builder.publish.inspect import find
from builder.settings import Settings
from scripts.launch import clean_environ
from tests.versions import DOCKERFILE, register, seed_layout
from tests.waiting import HANG

ROOT = Path(__file__).parents[2]
# Nothing has to be run for it, so it builds for every platform.
COPIES = "FROM {base}\nCOPY $model_folder /app/$model_folder\nUSER 10001\n"


@pytest.fixture
def settings(mlflow_server, registry, tmp_path):
    def make(model, **changes) -> Settings:
        environ = {
            "MLFLOW_TRACKING_URI": mlflow_server.uri,
            "REGISTRY_URL": f"{registry.host}/models",
            "MODEL_NAME": model.name,
            "MODEL_VERSION": model.version,
            "BUILDER_WORKSPACE": str(tmp_path / "workspace"),
        }
        return Settings.from_environ({**environ, **changes})

    return make


@pytest.fixture
def new(mlflow_server, base_image):
    def make(dockerfile=DOCKERFILE, **options):
        files = {**seed_layout(base_image, dockerfile), **options.pop("files", {})}
        return register(mlflow_server.uri, {path: text for path, text in files.items() if text is not None}, **options)

    return make


def manifest_of(crane, reference):
    return json.loads(crane("manifest", str(reference)))


def push_somebody_elses(base_image, tag, crane):
    crane("copy", "--platform", "linux/amd64", base_image, str(tag))


def test_a_version_is_published_and_recorded(settings, new, base_image, crane, registry):
    model = new()
    published = publish(settings(model))

    assert str(published.tag) == f"{registry.host}/models/{model.name}:v1"
    crane("validate", "--remote", str(published.reference))
    assert crane("digest", str(published.tag)).strip() == str(published.reference.digest)
    config = json.loads(crane("config", str(published.tag)))
    assert config["config"]["User"] == "10001"
    assert any(entry.startswith("PATH=") and entry.endswith(":/home/app/bin") for entry in config["config"]["Env"])
    manifest = manifest_of(crane, published.tag)
    assert manifest["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    notes = manifest["annotations"]
    assert notes["org.opencontainers.image.base.digest"] == crane("digest", base_image).strip()
    assert {**config["config"]["Labels"], **notes} == config["config"]["Labels"]
    outcome = model.outcome()
    assert outcome.pop("finished")
    assert outcome.pop("error", "") == ""
    assert outcome == {
        "state": "published",
        "image": str(published.reference),
        "tag": str(published.tag),
        "source": notes["io.modelimage.source-id"],
        "platforms": "linux/amd64",
        "wanted": "linux/amd64",
        "attempts": "0",
        "smoke_test": "off",
    }


def test_the_image_says_nothing_of_where_it_was_made(settings, new, crane, mlflow_server, registry):
    model = new()
    tag = publish(settings(model)).tag
    said = crane("manifest", str(tag)) + crane("config", str(tag))
    # The base's own name is a standard annotation; where the image went, and MLflow, are nobody's business.
    assert mlflow_server.uri.removeprefix("http://") not in said
    assert f"{registry.host}/models" not in said


def test_the_second_time_nothing_changes(settings, new, crane):
    model = new()
    first = publish(settings(model))
    tags = model.tags()
    second = publish(settings(model))
    assert second.reference == first.reference
    assert not second.changed
    assert model.tags() == tags


def test_a_platform_is_added_to_what_is_there(settings, new, crane):
    model = new(COPIES)
    first = publish(settings(model))
    model.set_tag("MODEL_PLATFORMS", "linux/amd64,linux/arm64,linux/arm/v7")
    second = publish(settings(model))
    index = manifest_of(crane, second.tag)
    assert index["mediaType"] == "application/vnd.oci.image.index.v1+json"
    digests = {
        "/".join(part for part in (m["platform"]["os"], m["platform"]["architecture"], m["platform"].get("variant")) if part):
        m["digest"] for m in index["manifests"]
    }  # fmt: skip
    assert set(digests) == {"linux/amd64", "linux/arm64", "linux/arm/v7"}
    assert digests["linux/amd64"] == str(first.reference.digest)
    crane("validate", "--remote", str(second.reference))
    assert model.outcome()["platforms"] == "linux/amd64,linux/arm/v7,linux/arm64"
    assert not publish(settings(model)).changed


def test_the_image_is_the_same_wherever_it_is_built(settings, new):
    model = new(COPIES)
    first = publish(settings(model))
    second = publish(settings(model), rebuild=True)
    assert second.changed
    assert second.reference == first.reference


def test_a_foreign_image_is_left_alone_and_adopted_by_force(settings, new, base_image, crane):
    model = new(COPIES)
    tag = f"{settings(model).registry_url}/{model.name}:v1"
    push_somebody_elses(base_image, tag, crane)
    before = crane("digest", tag)
    published = publish(settings(model))
    assert published.reference is None
    assert crane("digest", tag) == before
    assert model.outcome()["state"] == "foreign"
    adopted = publish(settings(model), force=True)
    assert crane("digest", tag).strip() == str(adopted.reference.digest)
    assert model.outcome()["state"] == "published"


def test_another_source_is_refused_unless_forced(settings, new, crane):
    model = new(COPIES)
    first = publish(settings(model))
    model.set_tag("MODEL_ENTRY_POINT", "other.py")
    with pytest.raises(InvalidVersion, match="--force"):
        publish(settings(model))
    assert crane("digest", str(first.tag)).strip() == str(first.reference.digest)
    assert model.outcome()["state"] == "failed"
    assert publish(settings(model), force=True).changed


def test_a_failed_build_is_recorded_by_push(settings, new, crane):
    model = new("FROM {base}\nRUN echo before; echo the-reason >&2; exit 3\n")
    with pytest.raises(BuildFailed) as caught:
        publish(settings(model))
    assert caught.value.exit_code == 73
    outcome = model.outcome()
    assert outcome["state"] == "failed"
    assert outcome["error"].startswith("BuildFailed: ")
    assert outcome["attempts"] == "1"
    with pytest.raises(BuildFailed):
        publish(settings(model))
    assert model.outcome()["attempts"] == "2"


BROKEN = {
    "does not parse": ("FROM {base}\nRUNN true\n", BuildFailed, "RUNN"),
    "has no FROM": ("RUN true\n", InvalidVersion, "FROM"),
    "is empty": ("", InvalidVersion, "FROM"),
    "has a base that does not exist": ("FROM {base}-not\n", BuildFailed, "base/python:3.11-slim-not"),
    "has a base whose registry is away": ("FROM 127.0.0.1:1/no/such:1\n", ServiceUnavailable, "127.0.0.1:1"),
    "misspells a variable": ("FROM {base}\nCOPY ${{modle_folder}} /app\n", InvalidVersion, "model_folder"),
    "copies what is not there": ("FROM {base}\nCOPY nowhere /app\n", BuildFailed, "nowhere"),
}


@pytest.mark.parametrize(("dockerfile", "kind", "said"), BROKEN.values(), ids=BROKEN.keys())
def test_a_dockerfile_that_cannot_be_built_says_why(settings, new, dockerfile, kind, said):
    model = new(dockerfile)
    with pytest.raises(kind) as caught:
        publish(settings(model))
    assert said in str(caught.value)
    assert caught.value.remedy
    assert model.outcome()["state"] == "failed"


def test_a_version_without_artifacts(settings, mlflow_server):
    model = register(mlflow_server.uri, {"other/file": "x"}, folder="mymodel")
    with pytest.raises(InvalidVersion, match="MLmodel"):
        publish(settings(model))


def test_a_version_without_template_and_requirements(settings, new):
    model = new(files={"templates/Dockerfile.template": None})
    with pytest.raises(InvalidVersion, match=r"neither a template .* nor mymodel/requirements\.txt"):
        publish(settings(model))


HOSTILE_TAGS = [
    ("MODEL_ENTRY_POINT", 'app.py"]\nRUN curl evil'),
    ("MODEL_ENTRY_POINT", "$(reboot)"),
    ("MODEL_EXECUTE_PATH", "a; rm -rf /"),
    ("MODEL_EXECUTE_PATH", "`id`"),
    ("MODEL_FOLDER", "../../etc"),
    ("MODEL_CLIENT_FOLDER", "/etc/../.."),
    ("MODEL_TEMPLATES_FOLDER", "templates\nx"),
    ("MODEL_PLATFORMS", "linux/amd64;id"),
    ("MODEL_BASE_IMAGE", "evil.example.com/x"),
    ("MODEL_BASE_IMAGE", "x\nRUN id"),
]


@pytest.mark.parametrize(("tag", "value"), HOSTILE_TAGS)
def test_hostile_tags_are_refused_by_name(settings, new, tag, value):
    files = (
        {"templates/Dockerfile.template": None, "mymodel/requirements.txt": "pip\n"}
        if tag == "MODEL_BASE_IMAGE"
        else {}
    )
    model = new(tags={tag: value}, files=files)
    with pytest.raises(InvalidVersion) as caught:
        publish(settings(model))
    assert tag in str(caught.value)
    assert caught.value.exit_code == 65
    assert "\n" not in model.outcome()["error"]


def test_a_hostile_name_reaches_neither_a_dockerfile_nor_a_repository(settings, new, crane):
    model = new("FROM {base}\nLABEL of=$model_name\nUSER 10001\n", name='x"\nRUN id $(id) `id`')
    published = publish(settings(model))
    assert (
        json.loads(crane("config", str(published.tag)))["config"]["Labels"]["of"]
        == published.tag.repository.path.rpartition("/")[2]
    )


def test_aliases_name_versions(settings, new):
    model = new(COPIES)
    model.client.set_registered_model_alias(model.name, "champion", model.version)
    assert str(publish(settings(model, MODEL_VERSION="@champion")).tag).endswith(":v1")
    for version in ("@nobody", "99", "latest"):
        with pytest.raises(VersionNotFound):
            publish(settings(model, MODEL_VERSION=version))


def test_a_plan_touches_nothing(settings, new, registry, base_image, crane):
    model = new()
    tags = model.tags()
    plan = preview(settings(model), check_push=True)
    assert plan.action == "publish"
    assert f"FROM {base_image}" in plan.dockerfile
    assert 'ENTRYPOINT ["python", "/app/client/app.py"]' in plan.dockerfile
    assert {artifact.path for artifact in plan.artifacts} >= {"mymodel/MLmodel", "client/app.py"}
    assert str(plan.platforms[0].base.digest) == crane("digest", base_image).strip()
    assert model.tags() == tags
    assert f"models/{model.name}" not in crane("catalog", registry.host)


def test_changed_artifacts_are_noticed_and_taken_up_by_rebuild(settings, new, tmp_path, caplog):
    model = new(COPIES)
    first = publish(settings(model))
    late = tmp_path / "late.txt"
    late.write_text("late")
    model.client.log_artifact(model.run_id, str(late), "mymodel")
    again = publish(settings(model))
    assert not again.changed
    assert "the artifacts have changed" in caplog.text
    rebuilt = publish(settings(model), rebuild=True)
    assert rebuilt.reference != first.reference


def test_a_platform_of_other_artifacts_is_not_joined_to_the_rest(settings, new, tmp_path):
    model = new(COPIES)
    publish(settings(model))
    changed = tmp_path / "weights.txt"
    changed.write_text("43")
    model.client.log_artifact(model.run_id, str(changed), "mymodel")
    model.set_tag("MODEL_PLATFORMS", "linux/amd64,linux/arm64")
    with pytest.raises(InvalidVersion, match="--rebuild, which makes all platforms again"):
        publish(settings(model))
    assert publish(settings(model), rebuild=True).platforms == ("linux/amd64", "linux/arm64")


def test_a_published_version_needs_its_artifacts_no_longer(settings, new, mlflow_server, caplog):
    model = new(COPIES)
    first = publish(settings(model))
    shutil.rmtree(Path(mlflow_server.artifacts) / "0" / model.run_id / "artifacts")
    assert publish(settings(model)).reference == first.reference
    assert "the artifacts could not be listed" in caplog.text
    assert model.outcome()["state"] == "published"


def test_a_service_that_was_away_is_no_attempt(settings, new, impatient):
    model = new(COPIES)
    with pytest.raises(ServiceUnavailable):
        publish(settings(model, REGISTRY_URL="127.0.0.1:1/models"))
    assert model.outcome()["attempts"] == "0"
    publish(settings(model))
    tags = model.tags()
    with pytest.raises(ServiceUnavailable):
        publish(settings(model, REGISTRY_URL="127.0.0.1:1/models"), rebuild=True)
    assert model.outcome()["state"] == "published"
    assert model.outcome()["image"] == tags["publish.pltr_foundry.image"]
    assert not publish(settings(model)).changed
    assert model.outcome()["error"] == ""


def test_tags_changed_in_mid_run_are_not_published_as_they_were(settings, new):
    model = new(COPIES)
    run = phases(settings(model))
    next(run)
    next(run)
    model.set_tag("MODEL_ENTRY_POINT", "other.py")
    with pytest.raises(TryAgain, match="tags"):
        next(run)


def test_push_refuses_another_models_plan(settings, new):
    one, other = new(COPIES), new(COPIES)
    run = phases(settings(one))
    next(run)
    with (
        connected(settings(other)) as services,
        workspace_of(settings(other, BUILDER_WORKSPACE="")) as workspace,
    ):
        shutil.copytree(settings(one).workspace, workspace.folder, dirs_exist_ok=True)
        with pytest.raises(UsageError, match="MODEL_NAME"):
            push(services, workspace)


def test_a_base_that_moved_is_noticed_for_an_index_too(settings, new, crane, base_image, caplog):
    base = base_image.replace("base/python", "moving/python")
    crane("copy", base_image, base)
    model = new(COPIES.replace("{base}", base), tags={"MODEL_PLATFORMS": "linux/amd64,linux/arm64"})
    publish(settings(model))
    assert not publish(settings(model)).changed
    assert "has moved" not in caplog.text
    crane("mutate", "--label=moved=1", "--tag", base, f"{base_image}", "--platform=linux/amd64")
    publish(settings(model))
    assert f"the base image {base} has moved" in caplog.text


def phases(settings) -> Published:
    with connected(settings) as services, workspace_of(settings) as workspace:
        version = find(services)
        fetch(services, workspace, version)
        yield "fetched"
        build(settings, workspace)
        yield "built"
        push(services, workspace)


def test_a_version_deleted_in_mid_run_is_not_tagged(settings, new, crane, registry):
    model = new(COPIES)
    run = phases(settings(model))
    next(run)
    next(run)
    model.client.delete_model_version(model.name, model.version)
    with pytest.raises(VersionNotFound):
        next(run)
    assert f"models/{model.name}\n" not in crane("catalog", registry.host)


def test_a_tag_moved_in_mid_run_is_not_overwritten(settings, new, base_image, crane):
    model = new(COPIES)
    run = phases(settings(model))
    next(run)
    next(run)
    tag = f"{settings(model).registry_url}/{model.name}:v1"
    push_somebody_elses(base_image, tag, crane)
    with pytest.raises(TryAgain, match="Publish again"):
        next(run)
    assert crane("digest", tag) == crane("digest", "--platform", "linux/amd64", base_image)


def test_a_registry_that_is_away_is_not_an_absent_image(settings, new, impatient):
    model = new(COPIES)
    with pytest.raises(ServiceUnavailable, match=r"127.0.0.1:1"):
        publish(settings(model, REGISTRY_URL="127.0.0.1:1/models"))
    assert model.outcome()["error"].startswith("ServiceUnavailable: ")


def test_mlflow_that_is_away(settings, new):
    with pytest.raises(ServiceUnavailable, match=r"MLFLOW_TRACKING_URI|127.0.0.1:1"):
        publish(settings(new(COPIES), MLFLOW_TRACKING_URI="http://127.0.0.1:1"))


def test_the_published_image_runs(settings, new):
    published = publish(settings(new()))
    storage = os.environ.get("BUILDAH_ISOLATION", "chroot")
    container = subprocess.run(
        ["buildah", "from", "--tls-verify=false", str(published.reference)], check=True, text=True, capture_output=True
    ).stdout.strip()
    try:
        done = subprocess.run(
            ["buildah", "run", "--isolation", storage, container, "--", "python", "/app/client/app.py"],
            check=True, text=True, capture_output=True,
        )  # fmt: skip
    finally:
        subprocess.run(["buildah", "rm", container], check=True, capture_output=True)
    assert done.stdout == "prediction 42\n"


def test_an_engine_that_is_killed_ends_the_build_phase(settings, new, tmp_path):
    """As when memory runs out: a Pod whose first containers say that all is well would wait for ever."""
    model = new("FROM {base}\nRUN echo it-runs && sleep 300\n")
    before = settings(model)
    with connected(before) as services, workspace_of(before) as workspace:
        fetch(services, workspace, find(services))
    environ = {**clean_environ(), "BUILDER_WORKSPACE": str(before.workspace), "LOG_FORMAT": "json"}
    command = [sys.executable, "-m", "builder", "build"]
    with subprocess.Popen(command, env=environ, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            seen = []
            while not any('"it-runs"' in line for line in seen):
                seen.append(process.stderr.readline())
                assert seen[-1], "".join(seen)
            (engine,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(engine), signal.SIGKILL)
            _, log = process.communicate(timeout=HANG)
        finally:
            process.kill()
    assert process.returncode == 75, log
    assert "was killed" in log
    with pytest.raises(TryAgain, match="was killed"), connected(before) as services:
        push(services, workspace)
    assert "was killed" in model.outcome()["error"]
