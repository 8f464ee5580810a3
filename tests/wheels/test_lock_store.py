"""Locks that versions of one environment share, through a real registry and a real index."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from builder.clients import Registries
from builder.oci.store import LayerStore
from builder.package_index import Indexes, IndexUrl
from builder.package_index.client import IndexClient
from builder.package_index.wheel_file import LockedWheel
from builder.reference import Platform, Repository
from builder.wheels.lock import Lock, lock_keys, rounded
from builder.wheels.requirements import Requirements
from builder.wheels.resolve import LOCK_FILE, LOCK_TYPE, Resolver
from builder.wheels.uv import NoWheel
from tests.package_index.server import running

AMD64, ARM64 = Platform("linux", "amd64"), Platform("linux", "arm64")
GLIBC = (2, 36)
MORNING = datetime(2024, 6, 1, 7, 30, tzinfo=UTC)


@pytest.fixture
def index():
    with running() as found:
        found.add("app", "1.0", requires=["lib"])
        found.add("lib", "1.0")
        yield found


@pytest.fixture
def store(registry):
    with Registries() as registries:
        yield LayerStore(registries.for_host(registry.host), Repository(registry.host, f"locks/{uuid.uuid4().hex}"))


@pytest.fixture
def resolver(index, store):
    with IndexClient(Indexes(default=IndexUrl(index.simple))) as client:

        def make(*lines, as_of=MORNING, python="3.11"):
            return Resolver(
                store=store,
                requirements=Requirements.of(*(lines or ("app",))),
                indexes=Indexes(default=IndexUrl(index.simple)),
                client=client,
                model=Path("/nonexistent"),
                python=python,
                as_of=as_of,
            )

        yield make


def resolved(caplog, act):
    """Return what `act` returns, and whether a resolver ran for it."""
    caplog.clear()
    return act(), "'event': 'resolving'" in caplog.text


@pytest.fixture(autouse=True)
def _all_lines(caplog):
    caplog.set_level("DEBUG")


def test_versions_of_one_day_share_a_lock(resolver, index, caplog):
    first, ran = resolved(caplog, lambda: resolver().lock(AMD64, GLIBC))
    assert ran
    index.requests.clear()
    later = resolver(as_of=MORNING + timedelta(hours=9))
    second, ran = resolved(caplog, lambda: later.lock(AMD64, GLIBC))
    assert not ran
    assert index.requests == []
    assert second == first
    assert second.to_text() == first.to_text()


@pytest.mark.parametrize(
    "change",
    [
        {"as_of": MORNING + timedelta(days=1)},
        {"as_of": MORNING - timedelta(days=1)},
        {"lines": ("app", "lib")},
    ],
    ids=str,
)
def test_different_inputs_do_not_share_a_lock(resolver, caplog, change):
    resolver().lock(AMD64, GLIBC)
    lines = change.pop("lines", ())
    _, ran = resolved(caplog, lambda: resolver(*lines, **change).lock(AMD64, GLIBC))
    assert ran


def test_platforms_and_c_libraries_differ(resolver, caplog):
    resolver().lock(AMD64, GLIBC)
    assert resolved(caplog, lambda: resolver().lock(ARM64, GLIBC))[1]
    assert resolved(caplog, lambda: resolver().lock(AMD64, (2, 28)))[1]
    assert not resolved(caplog, lambda: resolver().lock(ARM64, GLIBC))[1]


def test_todays_packages_are_looked_for_each_time(resolver, caplog):
    for _ in range(2):
        assert resolved(caplog, lambda: resolver(as_of=None).lock(AMD64, GLIBC))[1]


def test_a_lock_that_is_only_looked_at_is_not_kept(resolver, caplog):
    for _ in range(2):
        assert resolved(caplog, lambda: resolver().lock(AMD64, GLIBC, keep=False))[1]


def test_a_package_of_the_same_day_is_in_a_lock_of_the_moment(resolver, index, caplog):
    index.add("fresh", "1.0", uploaded="2024-06-01T06:00:00Z")
    first, ran = resolved(caplog, lambda: resolver("fresh").lock(AMD64, GLIBC))
    assert ran
    assert first.as_of == MORNING
    again, ran = resolved(caplog, lambda: resolver("fresh").lock(AMD64, GLIBC))
    assert not ran
    assert again == first
    # Another moment of the day has a lock of its own.
    assert resolved(caplog, lambda: resolver("fresh", as_of=MORNING + timedelta(hours=1)).lock(AMD64, GLIBC))[1]


def test_an_index_without_upload_times_shares_its_locks_too(resolver, index, caplog):
    index.times = False
    first, _ = resolved(caplog, lambda: resolver().lock(AMD64, GLIBC))
    assert "not enforced" in caplog.text
    second, ran = resolved(caplog, lambda: resolver().lock(AMD64, GLIBC))
    assert not ran
    assert second.exempt == first.exempt == ("app", "lib")


def test_what_has_no_wheel_is_not_kept(resolver, index, caplog):
    index.add("compiled", "1.0", tag="cp311-cp311-manylinux_2_17_x86_64")
    for _ in range(2):
        with pytest.raises(NoWheel):
            resolver("compiled").lock(ARM64, GLIBC)


@pytest.fixture(scope="module")
def text_of_a_lock():
    wheels = [
        LockedWheel(name=name, version="1.0", filename=f"{name}-1.0-py3-none-any.whl", sha256="ab" * 32, size=7)
        for name in ("app", "lib")
    ]
    return Lock(platform=AMD64, python="3.11", glibc=GLIBC, as_of=rounded(MORNING), wheels=wheels).to_text().encode()


def test_the_lock_that_other_tests_damage_is_valid(resolver, store, text_of_a_lock):
    store.keep_text(f"lock-{keys(resolver())[0]}", text_of_a_lock, kind=LOCK_TYPE, title=LOCK_FILE)
    assert resolver().kept(AMD64, GLIBC).to_text().encode() == text_of_a_lock


def keys(resolver, platform=AMD64):
    return lock_keys(
        resolver.requirements,
        platform=platform,
        python=resolver.python,
        glibc=GLIBC,
        indexes=resolver.indexes.identity,
        as_of=resolver.as_of,
    )


GARBAGE = {
    "nothing": lambda _right: b"",
    "no text": lambda _right: b"\xff\xfe",
    "no TOML": lambda _right: b"[[[",
    "a deep one": lambda _right: b"a = " + b"[" * 200_000,
    "another program's": lambda right: right.replace(b"model-image-builder", b"somebody", 1),
    "another platform's": lambda right: right.replace(b"linux/amd64", b"linux/arm64"),
    "another Python's": lambda right: right.replace(b'python = "3.11"', b'python = "3.12"'),
    "cut off": lambda right: right[: len(right) // 2],
    "numbers for names": lambda right: right.replace(b'name = "app"', b"name = 1"),
    "a wheel by another name": lambda right: right.replace(b'path = "app-1.0', b'path = "../lib-1.0'),
    "a wheel elsewhere": lambda right: right.replace(b'path = "app-1.0', b'path = "/etc/app-1.0'),
    "no wheels": lambda right: right.replace(b"wheels = ", b"things = "),
    "no hashes": lambda right: right.replace(b"sha256 = ", b"md5 = "),
    "a date for a table": lambda _right: b"tool = 2024-06-01",
    "a list for a table": lambda _right: b'lock-version = "1.0"\ntool = [1]',
    "packages that are none": lambda right: right + b"\n[[packages]]\nx = 1\n",
    "a size below nothing": lambda right: right.replace(b"size = ", b"size = -"),
    "a time that is none": lambda right: right.replace(b"as-of = ", b"as-of = 7 # "),
    "a wide C library": lambda right: right.replace(b"glibc = [2, 36]", b"glibc = [2, 36, 1]"),
    "an endless number": lambda right: right.replace(b"size = ", b"size = " + b"9" * 5000),
}


@pytest.mark.parametrize("spoil", GARBAGE.values(), ids=GARBAGE.keys())
def test_a_damaged_lock_is_ignored(resolver, store, text_of_a_lock, spoil, caplog):
    spoilt = spoil(text_of_a_lock)
    assert spoilt != text_of_a_lock
    for key in keys(resolver()):
        store.keep_text(f"lock-{key}", spoilt, kind=LOCK_TYPE, title=LOCK_FILE)
    assert resolver().kept(AMD64, GLIBC) is None
    assert "resolving again" in caplog.text


def test_garbage_is_replaced(resolver, store, caplog):
    one = resolver()
    first = one.lock(AMD64, GLIBC)
    for key in keys(one):
        store.keep_text(f"lock-{key}", b"garbage", kind=LOCK_TYPE, title=LOCK_FILE)
    again, ran = resolved(caplog, lambda: one.lock(AMD64, GLIBC))
    assert ran
    assert again == first
    assert not resolved(caplog, lambda: one.lock(AMD64, GLIBC))[1]


def test_a_lock_that_is_kept_says_nothing_of_where_packages_come_from(resolver, store, index):
    one = resolver()
    one.lock(AMD64, GLIBC)
    (text,) = [found for key in keys(one) if (found := store.text(f"lock-{key}", kind=LOCK_TYPE))]
    assert b"127.0.0.1" not in text
    assert b"app-1.0-py3-none-any.whl" in text
