"""Which wheels share a layer."""

from __future__ import annotations

import hashlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.package_index.wheel_file import LockedWheel
from builder.wheels.layer_cache import Group, grouped


def wheel(number, size=None, version="1.0"):
    name = f"tiny-{number}"
    return LockedWheel(
        name=name,
        version=version,
        filename=f"tiny_{number}-{version}-py3-none-any.whl",
        sha256=hashlib.sha256(f"{name} {version}".encode()).hexdigest(),
        size=size,
    )


sizes = st.lists(st.none() | st.integers(0, 1 << 32), max_size=300)
environments = sizes.map(lambda each: [wheel(number, size) for number, size in enumerate(each)])
limits = st.integers(5, 100)


@given(environments, limits)
def test_every_wheel_is_in_one_group_and_there_are_not_too_many(wheels, most):
    groups = grouped(wheels, most)
    assert len(groups) <= most
    assert sorted(each.name for group in groups for each in group.wheels) == sorted(each.name for each in wheels)
    assert all(group.wheels for group in groups)


@given(environments, limits, st.randoms(use_true_random=False))
def test_the_order_does_not_matter(wheels, most, chance):
    mixed = list(wheels)
    chance.shuffle(mixed)
    assert grouped(mixed, most) == grouped(wheels, most)


@given(environments, limits)
def test_a_wheel_is_alone_where_there_is_a_layer_for_it(wheels, most):
    alone = {group.wheels[0].name for group in grouped(wheels, most) if len(group.wheels) == 1}
    if len(wheels) <= most:
        assert len(alone) == len(wheels)
    else:
        # The largest are: sharing is for the small ones.
        largest = sorted(wheels, key=lambda each: (each.size or 0, each.name))[len(wheels) - most + 4 :]
        assert {each.name for each in largest} <= alone


@given(environments.filter(bool), limits, st.data())
def test_a_new_version_of_one_wheel_changes_its_own_group_only(wheels, most, data):
    place = data.draw(st.integers(0, len(wheels) - 1))
    changed = list(wheels)
    changed[place] = wheel(place, wheels[place].size, version="2.0")
    before, after = ({group.source for group in grouped(each, most)} for each in (wheels, changed))
    assert len(before - after) == len(after - before) == 1


def test_what_a_group_is_made_from_is_named_by_all_its_wheels():
    one, other = wheel(1, 10), wheel(2, 20)
    assert Group((one,)).source == one.sha256
    assert len({Group((one,)).source, Group((other,)).source, Group((one, other)).source}) == 3
    assert Group((one, other)).size == 30
    assert Group((one, other)).title == "tiny_1-1.0-py3-none-any.whl tiny_2-1.0-py3-none-any.whl"


@pytest.mark.parametrize("count", [76, 120, 500])
def test_large_environments_use_the_layers_there_are(count):
    wheels = [wheel(number, random.Random(number).randrange(1 << 20)) for number in range(count)]
    groups = grouped(wheels, 74)
    assert 70 < len(groups) <= 74
    assert max(len(group.wheels) for group in groups) < count / 2 or count == 76
