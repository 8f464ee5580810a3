"""Which engine is taken."""

import os
import shutil

import pytest

from builder.dockerfile import select_engine
from builder.dockerfile.buildah import Buildah
from builder.dockerfile.kaniko import Kaniko
from builder.errors import InvalidSettings
from builder.settings import BuildSettings


class Fake:
    """An engine of which only its presence is asked."""

    def __init__(self, name, *, there):
        self.name = name
        self._there = there

    def available(self):
        return self._there


def chosen(wanted, *, kaniko, buildah):
    settings = BuildSettings.from_environ({"BUILD_ENGINE": wanted})
    return select_engine(settings, [Fake("kaniko", there=kaniko), Fake("buildah", there=buildah)]).name


@pytest.mark.parametrize(
    ("wanted", "kaniko", "buildah", "name"),
    [
        ("auto", True, True, "kaniko"),
        ("auto", False, True, "buildah"),
        ("buildah", True, True, "buildah"),
        ("kaniko", True, True, "kaniko"),
    ],
)
def test_the_engine_is_the_configured_or_the_first_available_one(wanted, kaniko, buildah, name):
    assert chosen(wanted, kaniko=kaniko, buildah=buildah) == name


@pytest.mark.parametrize("wanted", ["auto", "kaniko", "buildah"])
def test_without_an_engine_the_error_names_both_remedies(wanted):
    with pytest.raises(InvalidSettings, match=r"builder image.*Kaniko.*install Buildah"):
        chosen(wanted, kaniko=False, buildah=False)


def test_a_configured_engine_is_not_replaced_by_another():
    with pytest.raises(InvalidSettings, match="BUILD_ENGINE is kaniko"):
        chosen("kaniko", kaniko=False, buildah=True)


@pytest.mark.skipif(not shutil.which("buildah"), reason="Buildah is not installed")
def test_outside_the_builder_image_buildah_is_taken():
    assert not Kaniko().available()
    assert isinstance(select_engine(BuildSettings.from_environ(os.environ)), Buildah)
