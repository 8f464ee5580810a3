"""Packages of conda's own: those that the lock has, or an index has a wheel of, are no reason to refuse a model."""

from pathlib import Path

import pytest

from builder.errors import InvalidVersion
from builder.wheels.requirements import Requirements, conda_package
from builder.wheels.resolve import lock
from tests.package_index.server import running
from tests.wheels.test_resolve import AMD64, GLIBC, asked


@pytest.fixture
def index():
    with running() as found:
        for version in ("1.21.2", "1.21.6", "1.26.4"):
            found.add("numpy", version)
        found.add("scikit-learn", "1.0.2", requires=["numpy"])
        found.add("torch", "2.1.0")
        found.add("gdal", "3.9", tag="cp311-cp311-win_amd64")
        yield found


def versions(tmp_path, index, conda, requirements=None):
    (tmp_path / "model").mkdir()
    entries = "".join(f"- {entry}\n" for entry in conda)
    (tmp_path / "model/conda.yaml").write_text(f"dependencies:\n- python=3.11\n- pip\n{entries}")
    if requirements is not None:
        (tmp_path / "model/requirements.txt").write_text(requirements)
    read = Requirements.read(tmp_path, "model")
    return lock(read, platform=AMD64, indexes=asked(index), model=Path("/nonexistent"), glibc=GLIBC).versions


def test_a_conda_package_in_the_lock_adds_no_pin(tmp_path, index):
    found = versions(tmp_path, index, ["numpy=1.21.2"], "scikit-learn\n")
    assert found == {"scikit-learn": "1.0.2", "numpy": "1.26.4"}


def test_what_the_lock_lacks_becomes_a_pin(tmp_path, index):
    found = versions(tmp_path, index, ["conda-forge::numpy=1.21", "pytorch==2.1.0", "pip: [scikit-learn]"])
    assert found == {"scikit-learn": "1.0.2", "numpy": "1.26.4", "torch": "2.1.0"}


def test_conda_alone_brings_everything(tmp_path, index):
    found = versions(tmp_path, index, ["numpy=1.21.2=py311h0_0", "scikit-learn>=1,<2"])
    assert found == {"scikit-learn": "1.0.2", "numpy": "1.21.2"}


def test_what_no_index_has_is_named_with_its_version(tmp_path, index):
    with pytest.raises(InvalidVersion, match=r"gdal==3\.9\.\*, libgcc-ng, numpy==9\.9, of which") as caught:
        versions(tmp_path, index, ["numpy==9.9", "gdal=3.9", "libgcc-ng", "pytorch"])
    assert "Dockerfile.template" in caught.value.remedy


def test_too_many_packages_are_not_looked_up(tmp_path, index):
    with pytest.raises(InvalidVersion, match="and 491 more"):
        versions(tmp_path, index, [f"package-{number}" for number in range(501)])
    assert not index.requests


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ("numpy", "numpy"),
        ("numpy=1.21", "numpy==1.21.*"),
        ("numpy=1.21.*", "numpy==1.21.*"),
        ("numpy 1.21.2", "numpy==1.21.2.*"),
        ("numpy==1.21.2", "numpy==1.21.2"),
        ("numpy=1.21.2=py38_0", "numpy==1.21.2"),
        ("pkgs/main::scikit_learn>=1.0", "scikit-learn>=1.0"),
        ("matplotlib-base", "matplotlib"),
        ("numpy[version='>1']", None),
        ("numpy @ file:///x", None),
        ("numpy=a|b", None),
        ("-r x", None),
        ("a" * 100_000, None),
    ],
)
def test_conda_entries_become_requirements(entry, text):
    found = conda_package(entry)
    assert (found.text() if found else None) == text
