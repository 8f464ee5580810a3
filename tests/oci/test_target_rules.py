"""What targets ask of an image."""

from __future__ import annotations

import pytest

from builder.errors import InvalidVersion
from builder.oci import OCI_LAYER, Descriptor
from builder.oci.target_rules import FOUNDRY, GENERAL, TargetRules, check_target, target_rules
from builder.reference import Digest, Platform, Reference

AMD64, ARM64 = Platform("linux", "amd64"), Platform("linux", "arm64")
TAGGED = Reference.parse("quay.io/domino/model:v3")
GB = 10**9


def layer(size: int = 1000, name: bytes = b"") -> Descriptor:
    return Descriptor(media_type=OCI_LAYER, digest=Digest.of(name), size=size)


def config(user: object = "10001", ports: object = ("8080/tcp",)) -> dict[str, object]:
    exposed = {port: {} for port in ports} if isinstance(ports, tuple) else ports
    return {"os": "linux", "config": {"User": user, "ExposedPorts": exposed}}


def judge(rules: TargetRules, *, reference=TAGGED, platforms=(AMD64,), layers=(), whole=None, **options) -> str:
    """Return what is said against an image, the same on all platforms; nothing where it is right."""
    images = [(platform, config(**options) if whole is None else whole, layers) for platform in platforms]
    try:
        check_target(rules, reference=reference, platforms=iter(platforms), images=iter(images))
    except InvalidVersion as error:
        return str(error)
    return ""


def test_the_target_says_which_rules():
    assert target_rules("pltr_foundry") is FOUNDRY
    assert target_rules("pltr_foundry2") is GENERAL
    assert target_rules("") is GENERAL


@pytest.mark.parametrize("user", ["10001", "10001:0", "1", "5001:5001", "10001:app", "2147483647", "007"])
def test_users_that_foundry_takes(user):
    assert judge(FOUNDRY, user=user) == ""


@pytest.mark.parametrize(
    "user",
    [
        "root",
        "0",
        "0:0",
        "00",
        "0:10001",
        "app",
        "app:10001",
        "10001x",
        "-1",
        "+1",
        "1.5",
        " 10001",
        ":10001",
        "2147483648",
        "4294967296",
        "9" * 5000,
        "١٢",
        "1\n",
        10001,
        ["1"],
    ],
)
def test_users_that_foundry_refuses(user):
    said = judge(FOUNDRY, user=user)
    shown = repr(user)[:20]
    assert said.startswith(f"{TAGGED} breaks a rule of Foundry: user is {shown}")
    assert "must be a number other than 0: make the line `USER 10001` the last USER" in said
    assert FOUNDRY.source in said
    assert len(said) < 700


@pytest.mark.parametrize(
    "whole", [{"config": {"User": ""}}, {"config": {"User": None}}, {"config": {}}, {"config": None}, {}]
)
def test_an_image_that_names_no_user_runs_as_root(whole):
    assert "user is not set, so root on linux/amd64, and must be a number" in judge(FOUNDRY, whole=whole)
    assert judge(GENERAL, whole=whole) == ""


@pytest.mark.parametrize("user", ["root", "", "app", "0"])
def test_other_targets_take_any_user(user):
    assert judge(GENERAL, user=user) == ""


@pytest.mark.parametrize("port", ["1024/tcp", "65535", "8080/udp", "8080/TCP", "9000-9010/tcp", "08080"])
def test_ports_that_foundry_takes(port):
    assert judge(FOUNDRY, ports=(port,)) == ""


@pytest.mark.parametrize("port", ["1023/tcp", "80", "0", "65536/tcp", "1000-2000/tcp", "8080-70000"])
def test_ports_that_foundry_refuses(port):
    said = judge(FOUNDRY, ports=("8080/tcp", port))
    assert f"breaks a rule of Foundry: port is {port!r} on linux/amd64, and must be from 1024 to 65535" in said
    assert "EXPOSE" in said


@pytest.mark.parametrize("port", ["x", "", "8080/", "8080/http", "-80", "80-", "65536/tcp", "0/tcp", "8" * 5000])
def test_invalid_ports_are_refused_for_any_target(port):
    assert "port is" in judge(GENERAL, ports=(port,))
    assert "from 1 to 65535" in judge(GENERAL, ports=(port,))


@pytest.mark.parametrize("ports", [["80/tcp"], "80", 80])
def test_ports_of_a_wrong_form_are_refused(ports):
    assert f"port is {ports!r}" in judge(GENERAL, ports=ports)


@pytest.mark.parametrize("ports", [None, {}, (), ("80/tcp", "443")])
def test_other_targets_take_any_port(ports):
    assert judge(GENERAL, ports=ports) == ""


def test_foundry_runs_amd64():
    assert judge(FOUNDRY, platforms=(ARM64, AMD64)) == ""
    said = judge(FOUNDRY, platforms=(ARM64, Platform("linux", "arm", "v7")))
    assert "platform is linux/arm/v7, linux/arm64, and must be linux/amd64, alone or among others: add it" in said
    assert "MODEL_PLATFORMS" in said
    assert "platform is none" in judge(FOUNDRY, platforms=())
    assert "platform is windows/amd64" in judge(FOUNDRY, platforms=(Platform("windows", "amd64"),))
    assert judge(GENERAL, platforms=(ARM64,)) == ""


def test_a_platform_that_is_there_already_counts():
    check_target(FOUNDRY, reference=TAGGED, platforms=[AMD64, ARM64], images=[(ARM64, config(), [layer()])])


def test_foundry_refuses_latest():
    latest = Reference.parse("quay.io/domino/model")
    assert "breaks a rule of Foundry: tag is latest, and must be one that does not move" in judge(
        FOUNDRY, reference=latest
    )
    assert judge(GENERAL, reference=latest) == ""
    assert judge(FOUNDRY, reference=TAGGED.repository.digest(Digest.of(b""))) == ""


def test_a_layer_of_foundry_is_below_ten_gigabytes():
    assert judge(FOUNDRY, layers=[layer(10 * GB - 1)] * 3) == ""
    said = judge(FOUNDRY, layers=[layer(), layer(10 * GB, b"large"), layer(12 * GB, b"larger")])
    assert "breaks 2 rules" in said
    assert f"layer size is 10000000000 bytes of {Digest.of(b'large')} on linux/amd64, and must be below" in said
    assert f"layer size is 12000000000 bytes of {Digest.of(b'larger')}" in said
    assert judge(GENERAL, layers=[layer(50 * GB)]) == ""


@pytest.mark.parametrize("profile", [FOUNDRY, GENERAL])
def test_no_target_runs_more_layers_than_docker(profile):
    assert judge(profile, layers=[layer()] * 125) == ""
    assert "layers is 126 of them on linux/amd64, and must be 125 at most" in judge(profile, layers=[layer()] * 126)


def test_one_error_names_each_broken_rule_once():
    with pytest.raises(InvalidVersion) as caught:
        check_target(
            FOUNDRY,
            reference=Reference.parse("model"),
            platforms=[ARM64, Platform("linux", "s390x")],
            images=[
                (ARM64, config("app", ("80/tcp",)), [layer()]),
                (Platform("linux", "s390x"), config("app", ("8080/tcp",)), [layer(11 * GB)]),
            ],
        )
    said = caught.value.what
    assert "breaks 5 rules of Foundry" in said
    assert "user is 'app' on linux/arm64, linux/s390x, and" in said
    assert said.count("USER 10001") == 1
    rules = [
        "platform is linux/arm64",
        "tag is latest",
        "user is 'app'",
        "port is '80/tcp' on linux/arm64,",
        "layer size is 11",
    ]
    assert [said.index(rule) for rule in rules] == sorted(said.index(rule) for rule in rules)
    assert caught.value.exit_code == 65
