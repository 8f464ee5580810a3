"""Locks as text, and the names they are kept under."""

import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.errors import InvalidVersion
from builder.package_index.wheel_file import LockedWheel
from builder.reference import Platform
from builder.wheels.inputs import for_serving
from builder.wheels.lock import Lock, lock_key, lock_keys, moments, rounded
from builder.wheels.requirements import Requirements

AMD64 = Platform.parse("linux/amd64")
SHA = "ab" * 32


def wheel(name="x", version="1.0", **fields):
    filename = fields.pop("filename", f"{name.replace('-', '_')}-{version}-py3-none-any.whl")
    return LockedWheel(name=name, version=version, filename=filename, sha256=fields.pop("sha256", SHA), **fields)


def lock(*wheels, **fields):
    return Lock(platform=AMD64, python=fields.pop("python", "3.11"), wheels=wheels, **fields)


names = st.from_regex(r"[a-z0-9]+(?:-[a-z0-9]+){0,2}", fullmatch=True)
versions = st.from_regex(r"[1-9][0-9]?\.[0-9](?:\.post[1-9])?(?:\+cpu)?", fullmatch=True)
wheels = st.builds(
    wheel,
    name=names,
    version=versions,
    sha256=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
    size=st.none() | st.integers(0, 1 << 40),
    origin=st.sampled_from(["index", "address", "model"]),
)
locks = st.builds(
    lambda found, glibc, as_of: Lock(
        platform=AMD64,
        python="3.11.2",
        glibc=glibc,
        as_of=as_of,
        exempt=tuple(sorted({one.name for one in found[:1]})),
        wheels=tuple(sorted(found, key=lambda one: one.name)),
    ),
    st.lists(wheels, max_size=5, unique_by=lambda one: one.name),
    st.none() | st.tuples(st.just(2), st.integers(17, 50)),
    st.none() | st.datetimes(timezones=st.just(UTC)).filter(lambda moment: moment.year > 1000),
)


@given(locks)
def test_a_lock_and_its_text_are_the_same(made):
    text = made.to_text()
    assert Lock.from_text(text) == made
    assert Lock.from_text(text.encode()).to_text() == text
    assert "://" not in text


def test_addresses_and_times_are_no_part_of_it():
    plain = lock(wheel())
    known = lock(
        wheel(url="https://me:secret@example.com/x-1.0-py3-none-any.whl", uploaded=datetime(2020, 1, 1, tzinfo=UTC))
    )
    assert known.to_text() == plain.to_text()
    assert known == plain
    assert hash(known.wheels[0]) == hash(plain.wheels[0])
    assert "secret" not in repr(known)


def test_it_is_a_pylock_that_others_read():
    document = tomllib.loads(
        lock(wheel(), wheel("y", "2.0", origin="model"), as_of=datetime(2024, 1, 1, tzinfo=UTC)).to_text()
    )
    assert document["lock-version"] == "1.0"
    assert [package["name"] for package in document["packages"]] == ["x", "y"]
    assert document["packages"][0]["wheels"] == [{"path": "x-1.0-py3-none-any.whl", "hashes": {"sha256": SHA}}]
    from packaging.pylock import Pylock

    Pylock.from_dict(document).validate()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('name = "x"', 'name = "X"'),
        ('name = "x"', 'name = "y"'),
        ('version = "1.0"', 'version = "1.0.0"'),
        ('path = "x-1.0-py3-none-any.whl"', 'path = "../x-1.0-py3-none-any.whl"'),
        ('path = "x-1.0-py3-none-any.whl"', 'path = "x-1.0-py3-none-any.whl\\n"'),
        (SHA, SHA[:-1]),
        (SHA, SHA.upper()),
        ("wheels = [", "wheels = [{}, "),
        ("[[packages]]", "[[other]]\n[packages]"),
        ('lock-version = "1.0"', 'lock-version = "2.0"'),
        ('created-by = "model-image-builder"', 'created-by = "uv"'),
        ('platform = "linux/amd64"', 'platform = "x"'),
        ('python = "3.11"', 'python = "2.7"'),
        ('python = "3.11"', "python = 3.11"),
        ("[tool.model-image-builder]", "[tool.other]"),
        ('created-by = "model-image-builder"', "created-by ="),
        ("path = ", "size = -1, path = "),
        ("path = ", 'size = "many", path = '),
    ],
)
def test_an_altered_lock_is_refused(old, new):
    text = lock(wheel()).to_text()
    assert old in text
    with pytest.raises(InvalidVersion, match="cached lock is invalid"):
        Lock.from_text(text.replace(old, new))


def test_empty_binary_and_oversized_locks_are_refused():
    for text in (b"", b"\xff", "x" * (5 << 20)):
        with pytest.raises(InvalidVersion):
            Lock.from_text(text)


def test_two_wheels_of_one_package_are_refused():
    text = lock(wheel()).to_text()
    package = text[text.index("[[packages]]") : text.index("[tool")]
    with pytest.raises(InvalidVersion):
        Lock.from_text(text.replace(package, package * 2))


def test_time_is_tried_from_the_day_s_beginning():
    exact = datetime(2025, 6, 1, 1, 30, 0, 500_000, tzinfo=UTC)
    assert rounded(exact) == datetime(2025, 6, 1, tzinfo=UTC)
    assert moments(exact) == (datetime(2025, 6, 1, tzinfo=UTC), datetime(2025, 6, 1, 1, 30, 1, tzinfo=UTC))
    assert moments(datetime(2025, 6, 1, tzinfo=UTC)) == (datetime(2025, 6, 1, tzinfo=UTC),)
    assert moments(None) == (None,)


def keys(requirements, **changes):
    inputs = {
        "platform": AMD64,
        "python": "3.11",
        "glibc": (2, 36),
        "indexes": "i",
        "as_of": datetime(2025, 6, 1, 9, tzinfo=UTC),
    }
    return lock_keys(requirements, **(inputs | changes))


def test_versions_of_one_day_share_a_key():
    requirements = Requirements.of("numpy==2", "scipy")
    day, exact = keys(requirements)
    later = keys(requirements, as_of=datetime(2025, 6, 1, 22, tzinfo=UTC))
    assert later[0] == day
    assert later[1] != exact
    assert keys(Requirements.of("scipy", "numpy == 2"))[0] == day
    assert (
        lock_key(
            requirements,
            platform=AMD64,
            python="3.11",
            glibc=(2, 36),
            indexes="i",
            as_of=datetime(2025, 6, 1, tzinfo=UTC),
        )
        == day
    )
    assert keys(requirements, as_of=None) == ()


@pytest.mark.parametrize(
    "change",
    [
        {"platform": Platform.parse("linux/arm64")},
        {"python": "3.12"},
        {"glibc": (2, 31)},
        {"glibc": None},
        {"indexes": "j"},
        {"as_of": datetime(2025, 6, 1, 9, tzinfo=UTC) + timedelta(days=1)},
    ],
)
def test_every_input_is_in_the_key(change):
    requirements = Requirements.of("numpy==2")
    assert not set(keys(requirements, **change)) & set(keys(requirements))


def test_keeping_the_whole_package_is_another_key():
    requirements = Requirements.of("mlflow==3.17.2")
    lean, whole = (keys(for_serving(requirements, full=full)) for full in (False, True))
    assert not set(lean) & set(whole)


def test_a_kept_lock_finds_the_model_s_own_wheels(tmp_path):
    from builder.wheels.requirements import LocalWheel

    requirements = Requirements(local=(LocalWheel(path="wheels/y-2.0-py3-none-any.whl", sha256="cd" * 32, size=3),))
    made = lock(wheel(), wheel("y", "2.0", sha256="cd" * 32, origin="model"))
    found = Lock.from_text(made.to_text()).located(requirements, tmp_path)
    assert [one.url for one in found.wheels] == [None, Path(tmp_path, "wheels/y-2.0-py3-none-any.whl").as_uri()]
