"""What an image needs of its base: libraries that the wheels' extensions load, and a Java for loaders that start one."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from builder.batch.warm import warm
from builder.errors import BuilderError, InvalidVersion
from builder.publish import plan as preview
from builder.publish import publish
from builder.settings import Settings
from tests.servers.forwarding import forwarding
from tests.servers.small import archive, push_base, rootfs
from tests.versions import MLMODEL
from tests.wheels.elf import ARM64, make_elf

TAG = "cp311-cp311-manylinux_2_17_x86_64"
SUFFIX = ".cpython-311-x86_64-linux-gnu.so"
# Each a package of the index, whose files these are, and what it requires.
PACKAGES = {
    "plain-code": ({f"plain_code/_main{SUFFIX}": make_elf("libc.so.6", module="_main")}, ()),
    "needs-gl": ({f"needs_gl/_main{SUFFIX}": make_elf("libGL.so.1", module="_main")}, ()),
    "bundles-qt": (
        {
            f"bundles_qt/_main{SUFFIX}": make_elf("libQt-1f2e.so", module="_main"),
            "bundles_qt.libs/libQt-1f2e.so": make_elf("libgthread-2.0.so.0", "libother.so.7"),
        },
        (),
    ),
    "has-plugin": (
        {
            f"has_plugin/_main{SUFFIX}": make_elf("libc.so.6", module="_main"),
            "has_plugin/plugins/libplug.so": make_elf("libGL.so.1"),
            "has_plugin/plugins/libarm.so": make_elf("libnowhere.so", machine=ARM64),
        },
        (),
    ),
    "needs-core": ({f"needs_core/_main{SUFFIX}": make_elf("libcore.so.1", module="_main")}, ["has-core"]),
    "has-core": ({"has_core/lib/libcore.so.1.0": make_elf("libc.so.6", soname="libcore.so.1")}, ()),
    "lightgbm": ({"lightgbm/lib/lib_lightgbm.so": make_elf("libgomp.so.1", "libc.so.6")}, ()),
}


@pytest.fixture(scope="module", autouse=True)
def _packages(packages):
    for name, (files, requires) in PACKAGES.items():
        packages.add(name, "4.6.0", tag=TAG, files=files, requires=requires)


@pytest.fixture(scope="module")
def base_with(registry):
    """Push a base image that has some more libraries."""

    def push(*libraries):
        layers = (rootfs(), archive({f"usr/lib/x86_64-linux-gnu/{name}": b"\x7fELF" for name in libraries}))
        name = re.sub(r"[^a-z0-9]", "-", "-".join(libraries).lower())
        return push_base(registry.host, f"base/with-{name}:3.11", layers=layers)

    return push


def downloads(packages, name):
    """Return how often we, and not uv, asked for a wheel."""
    ours = [path for _, path, headers in packages.requests if headers["User-Agent"].startswith("model-image-builder")]
    return sum(f"/files/{name}/" in path for path in ours)


REFUSED = {
    "needs-gl": (["libGL.so.1"], ["libGL.so.1 (_main.cpython-311"], "libgl1"),
    "bundles-qt": (
        ["libgthread-2.0.so.0", "libother.so.7"],
        ["libgthread-2.0.so.0 (libQt-1f2e.so), libother.so.7 (libQt-1f2e.so)"],
        "libglib2.0-0",
    ),
    "lightgbm": (["libgomp.so.1"], ["libgomp.so.1 (lib_lightgbm.so)"], "libgomp1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_library_that_nobody_has_is_named(small, small_settings, packages, base_with, tiny_base, name):
    libraries, said, package = REFUSED[name]
    model = small(f"{name}\n")
    settings = small_settings(model)
    # Of a wheel that was not read yet, a plan cannot tell.
    assert preview(settings).platforms[0].layers.lacks == ()
    errors = []
    for function in (publish, publish, preview):
        with pytest.raises(InvalidVersion) as caught:
            function(settings)
        errors.append(str(caught.value))
        # From then on the layer is known, and so is what it needs.
        assert downloads(packages, name) == 1
    assert len(set(errors)) == 1
    for word in (
        f"{name.replace('-', '_')}-4.6.0-{TAG}.whl",
        *said,
        tiny_base,
        "linux/amd64",
        package,
        "MODEL_BASE_IMAGE",
    ):
        assert word in errors[0]
    assert model.outcome()["state"] == "failed"
    assert libraries[0] in model.outcome()["error"]
    assert publish(small_settings(model, BASE_IMAGE=base_with(*libraries))).changed


def test_what_only_a_plugin_needs_is_a_warning(small, small_settings, small_environ, caplog, capfd):
    model = small("has-plugin\n")
    settings = small_settings(model)
    assert publish(settings).changed
    said = f"A part of the wheel has_plugin-4.6.0-{TAG}.whl cannot be loaded: it needs libGL.so.1 (libplug.so)"
    assert said in caplog.text
    assert "libnowhere.so" not in caplog.text
    caplog.clear()
    plan = preview(settings, rebuild=True)
    assert [line.startswith(said) for line in plan.platforms[0].layers.lacks] == [True]
    assert publish(settings, rebuild=True).changed
    assert said in caplog.text


def test_another_wheel_s_library_is_enough(small, small_settings, caplog):
    assert publish(small_settings(small("needs-core\n"))).changed
    assert "cannot be loaded" not in caplog.text


def test_one_layer_of_many_wheels_tells_of_each(small, small_settings, packages):
    requirements = "".join(f"tiny-{number:03}\n" for number in range(115))
    model = small(f"{requirements}needs-gl\n")
    for _ in range(2):
        with pytest.raises(InvalidVersion, match=r"needs_gl-4\.6\.0-.* needs libGL\.so\.1"):
            publish(small_settings(model))


def test_of_a_base_whose_libraries_are_not_known_nothing_is_said(small, small_settings, registry, caplog):
    # Its C library is where no loader of ours looks.
    files = {"usr/local/bin/python3.11": b"\x7fELF", "nix/store/glibc/lib/libc.so.6": b"\x7fELF"}
    base = push_base(registry.host, "base/without-a-loader:3.11", layers=(archive(files),))
    assert publish(small_settings(small("needs-gl\n"), BASE_IMAGE=base)).changed
    assert "libGL" not in caplog.text


def test_a_known_layer_costs_no_further_request(small, small_environ, registry):
    asked = []
    for requirement in ("plain-code\n", "has-plugin\n"):
        model = small(requirement)
        with forwarding(registry.host) as proxy:
            url = f"{proxy.host}/{model.name}"
            settings = Settings.from_environ(small_environ(model, REGISTRY_URL=url))
            publish(settings)
            before = len(proxy.seen)
            publish(settings, rebuild=True)
            asked.append(Counter(each.method for each in proxy.seen[before:]))
    assert asked[0] == asked[1]
    assert asked[0]["GET"] > 0


def test_warming_makes_the_layers_and_says_what_they_lack(small, small_settings, packages):
    tag = "EXTERNAL_TARGET_LIBRARIES"
    model = small("needs-gl\n", tags={tag: "true"})
    settings = small_settings(model, TARGET_TAG=tag)
    for _ in range(2):
        (warmed,) = warm(settings)
        assert (warmed.state, warmed.exit_code) == ("failed", 65)
        assert "libGL.so.1" in warmed.detail
    (verified,) = warm(settings, verify=True)
    assert (verified.state, verified.known) == ("verified", 1)


# -- Java

SPARK = MLMODEL.replace("mlflow.pyfunc.model", "mlflow.spark")
SERVED = {"mymodel/requirements.txt": "small-app\n", "client/app.py": None}


@pytest.mark.parametrize("loader", ["mlflow.spark", "mlflow.h2o", "pyspark.ml"])
def test_a_loader_that_needs_java_is_refused_before_anything_is_downloaded(
    small, small_settings, packages, tiny_base, registry, loader
):
    model = small(
        files=SERVED | {"mymodel/MLmodel": MLMODEL.replace("mlflow.pyfunc.model", loader)},
        tags={"MODEL_ENTRY_POINT": ""},
    )
    asked = len(packages.requests)
    for function in (preview, publish):
        with pytest.raises(InvalidVersion) as caught:
            function(small_settings(model))
        for word in (loader, "Java", tiny_base, "linux/amd64", "BASE_IMAGE", "Dockerfile.template"):
            assert word in str(caught.value)
    assert len(packages.requests) == asked
    assert "Java" in model.outcome()["error"]
    layers = (rootfs(), archive({"opt/java/bin/java": b"\x7fELF"}))
    base = push_base(registry.host, "base/java:3.11", layers=layers, config={"Env": ["JAVA_HOME=/opt/java"]})
    # It gets further: there is no MLflow in this index.
    with pytest.raises(BuilderError, match="mlflow"):
        publish(small_settings(model, BASE_IMAGE=base))


def test_a_client_may_do_without_java(small, small_settings, caplog):
    assert publish(small_settings(small(files={"mymodel/MLmodel": SPARK}))).changed
    assert "the client has to do without Java" in caplog.text


@pytest.mark.parametrize("loader", ["mlflow.sklearn", "mlflow.sparkle", "h2o_like.x"])
def test_other_loaders_need_no_java(small, small_settings, loader):
    model = small(
        files=SERVED | {"mymodel/MLmodel": MLMODEL.replace("mlflow.pyfunc.model", loader)},
        tags={"MODEL_ENTRY_POINT": ""},
    )
    with pytest.raises(BuilderError, match="mlflow") as caught:
        publish(small_settings(model))
    assert "Java" not in str(caught.value)


def test_an_image_that_an_engine_builds_is_judged_as_well(small, small_settings):
    model = small(files=SERVED | {"mymodel/MLmodel": SPARK}, tags={"MODEL_ENTRY_POINT": ""})
    with pytest.raises(InvalidVersion, match="needs Java"):
        publish(small_settings(model, BUILD_METHOD="dockerfile", BUILD_ENGINE="buildah"))


def test_an_engine_s_image_is_judged_whatever_the_index_settings_are(small, small_settings, registry):
    """Indexes are for RUN steps there, which may take them in another way than the wheels method."""
    model = small(files=SERVED | {"mymodel/MLmodel": SPARK}, tags={"MODEL_ENTRY_POINT": ""})
    with pytest.raises(InvalidVersion, match="Java"):
        preview(small_settings(model, BUILD_METHOD="dockerfile", UV_INDEX_STRATEGY="of-another-release"))


def test_plans_as_json_have_the_warnings(small, small_settings):
    settings = small_settings(small("has-plugin\n"))
    publish(settings)
    plan = json.loads(preview(settings, rebuild=True).model_dump_json())
    assert "libplug.so" in plan["platforms"][0]["layers"]["lacks"][0]
