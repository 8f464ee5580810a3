"""Ours: `builder publish` with the wheels method, from each state that caches and registry can be in."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.environments import PLATFORMS, Version
from benchmarks.jobs import Cost, Outcome, perform
from benchmarks.measured import outcome
from benchmarks.site import CHECKOUT, Round
from scripts.machine import native_platform, other_platform

COLD = "ours, cold"
COLD_BARE = "ours, cold, no bytecode"
WARM = "ours, warm"
CHANGED = "ours, model changed"
OTHER_COLD = "ours, other platform, cold"
OTHER_WARM = "ours, other platform, warm"
THREE = "ours, three platforms, cold"


def ours(turn: Round) -> Iterator[Outcome]:
    """Publish from nothing and from what that leaves in the registry; no cache of this machine is ever used."""
    versions = turn.versions
    native, other = native_platform(), other_platform()
    yield publish(turn, COLD_BARE, versions.first, "bare", native, WHEEL_BYTECODE="false")
    yield publish(turn, COLD, versions.first, "native", native, WHEEL_BYTECODE="true")
    yield publish(turn, WARM, versions.other, "native", native, WHEEL_BYTECODE="true")
    yield publish(turn, CHANGED, versions.changed, "native", native, WHEEL_BYTECODE="true")
    if other in turn.environment.platforms:
        yield publish(turn, OTHER_COLD, versions.first, "other", other, WHEEL_BYTECODE="true")
        yield publish(turn, OTHER_WARM, versions.other, "other", other, WHEEL_BYTECODE="true")
    if set(PLATFORMS) <= set(turn.environment.platforms):
        yield publish(turn, THREE, versions.first, "three", ",".join(PLATFORMS), WHEEL_BYTECODE="true")


def publish(
    turn: Round, job: str, version: Version, namespace: str, platforms: str, *, python: str = "", **settings: str
) -> Outcome:
    """Publish a version into a namespace of the registry, where its wheel layers are kept too.

    Args:
        turn: the round.
        job: its name.
        version: what is published.
        namespace: where to.
        platforms: TARGET_PLATFORMS.
        python: the interpreter to run; empty for this checkout's.
        settings: further ones.
    """
    with turn.scratch() as folder:
        environ = {
            "MLFLOW_TRACKING_URI": turn.site.uri,
            "REGISTRY_URL": f"{turn.host}/{namespace}",
            "BASE_IMAGE": f"{turn.host}/base/python:{{python_version}}-slim",
            "BUILD_METHOD": "wheels",
            "TARGET_PLATFORMS": platforms,
            # One that takes any platform alone; Foundry asks for linux/amd64.
            "TARGET_TAG": "EXTERNAL_TARGET_BENCHMARK",
            "LOG_FORMAT": "json",
            # Its rivals run nothing.
            "SMOKE_TEST": "off",
            # The folder that it runs in is not the checkout.
            "PYTHONPATH": str(CHECKOUT),
            **settings,
        }
        step = turn.step(
            folder, python or turn.site.python, "-m", "builder", "publish", version.name, version.version, **environ
        )

        def work() -> Cost:
            return perform([step], turn.registry, turn.site.mlflow)

        image = f"{turn.host}/{namespace}/{version.name}:v{version.version}"
        return outcome(turn, job, image, work, runs=platforms == native_platform())
