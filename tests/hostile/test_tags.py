"""Tags of a version, and what else its author can make long or numerous in MLflow."""

import pytest

from builder.errors import InvalidVersion
from builder.models import INPUT_TAGS, Inputs, ModelVersion, natural_order, wanted_platforms
from builder.models.context import find_model_folder
from builder.oci import OCI_MANIFEST, Descriptor
from builder.oci.base_image import _entry
from builder.publish.record import Outcome
from builder.reference import Platform, Reference, parse_platforms
from tests.hostile.bounded import bounded

AMD64 = Platform("linux", "amd64")


def version(number="1", **tags):
    return ModelVersion(name="m", version=number, created_ms=1, tags=tags)


def wanted(text):
    return wanted_platforms(version(MODEL_PLATFORMS=text), (AMD64,))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("linux/arm/v99999999999", "linux/arm/v99999999999 is not a platform that images can be made for"),
        ("linux/arm/v" + "9" * 5000, "is not a platform"),
        ("linux/arm/v4", "linux/arm (/v5, /v6, /v7, /v8)"),
        ("linux/arm/7", "is not a platform"),
        ("linux/arm/v²", "is not a platform"),
        ("linux/amd64,windows/amd64", "windows/amd64 is not a platform"),
        ("linux/amd46", "linux/amd46 is not a platform"),
        ("linux/s390x/v1", "is not a platform"),
        ("darwin/arm64", "is not a platform"),
        ("linux/" + "a" * 100_000, "is not a platform"),
        ("linux/amd64," * 20_000, "names 20,000 platforms"),
        ("/" * 100_000, "is not a platform"),
        ("," * 100_000, "names no platform"),
    ],
)
def test_platforms_that_are_refused(text, says):
    outcome = bounded(wanted, text)
    outcome.check(says=says)
    assert len(outcome.message) < 1000


def test_platforms_that_exist():
    text = "linux/amd64,linux/amd64/v3,linux/arm,linux/arm/v8,linux/arm64/v8,linux/riscv64/rva23u64,linux/loong64"
    found = "linux/amd64,linux/amd64/v3,linux/arm/v7,linux/arm/v8,linux/arm64,linux/riscv64/rva23u64,linux/loong64"
    assert ",".join(map(str, parse_platforms(text))) == found


def entry(variants, variant):
    images = {}
    for each in variants:
        platform = Platform("linux", "arm", each)
        images[platform] = Descriptor.of(each.encode(), OCI_MANIFEST, platform)
    return _entry(images, Platform("linux", "arm", variant), Reference.parse("python:3.11"))


def test_a_base_for_an_older_arm_serves_a_newer_one():
    assert entry(["v5", "v6"], "v7").platform.variant == "v6"
    assert entry(["v5", "v7"], "v8").platform.variant == "v7"
    with pytest.raises(InvalidVersion, match="has no image"):
        entry(["v7"], "v6")


def test_no_variant_takes_memory():
    bounded(entry, ["v7"], "v99999999999").check(says="has no image")


@pytest.mark.parametrize("tag", [tag for tag in INPUT_TAGS if tag != "MODEL_PLATFORMS"])
@pytest.mark.parametrize("value", ["a" * 100_000, "a/" * 50_000 + "a", "." * 100_000, "²" * 5000, "-" * 100_000])
def test_long_tags(tag, value):
    bounded(Inputs.of, version(**{tag: value})).check(says=tag)


def test_outcomes_of_others():
    told = "publish.t."
    tags = {f"{told}{name}": "9" * 100_000 for name in ("attempts", "state", "wanted", "platforms", "finished")}
    assert Outcome.of(version(**tags), "t").attempts == 0
    assert Outcome.of(version(**{f"{told}attempts": "²"}), "t").attempts == 0


def test_versions_in_their_order():
    numbers = ["10", "9", "1", "9" * 5000, "100"]
    assert [each.version for each in natural_order(map(version, numbers))] == ["1", "9", "10", "100", "9" * 5000]


def many_folders():
    find_model_folder([f"{'a/' * (number % 50)}{number}/MLmodel" for number in range(100_000)], Inputs())


def test_many_model_folders():
    bounded(many_folders, seconds=60).check(says="Several folders", seconds=5)
