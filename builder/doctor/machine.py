"""This machine: its clock, its package index, its engine, and what runs containers for the smoke test."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from builder.doctor import Finding, ok, skipped, warn
from builder.doctor.images import IN_A_JOB
from builder.doctor.surroundings import POLICY
from builder.errors import BuilderError, InvalidSettings
from builder.http import Client, Retry, ServerKind, api_host, is_named
from builder.reference import is_loopback
from builder.settings import network

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from builder.doctor.surroundings import Surroundings
    from builder.package_index.client import IndexFile
    from builder.settings import DoctorSettings

# What an image that serves has, so that an index should have it.
_PROJECT = "mlflow-skinny"
# Seconds that clocks may differ: what the signature of a webhook allows, and what nobody should wait to see.
_MOST_DIFFERENCE, _SOME_DIFFERENCE = 300, 60
_SERVER = ServerKind(
    name="server",
    unreachable="Check its address, and that the network and proxy settings lead to it.",
    unexpected="Check its address.",
    plain="Write its address with http.",
)
_SECONDS = 10
_COARSE = 2


def clock(around: Surroundings) -> Finding:
    """Compare this machine's clock with the `Date` of MLflow's and the registry's answers."""
    settings = around.settings
    found = {}
    with Client(_SERVER, ca_bundle=settings.ssl_cert_file, proxies=settings.proxies) as client:
        for name, url in _servers(settings).items():
            difference = _difference(client, url)
            if difference is not None:
                found[name] = difference
    if not found:
        return skipped("No server tells its time.")
    text = f"Compared with this machine's, the clock of {' and that of '.join(map(_told, found, found.values()))}."
    most = max(map(abs, found.values()))
    remedy = "Synchronize the clocks (NTP): signatures of webhooks and tokens are good for five minutes."
    if most > _MOST_DIFFERENCE:
        raise InvalidSettings(text, remedy=remedy)
    return warn(text, remedy) if most > _SOME_DIFFERENCE else ok(text)


def _servers(settings: DoctorSettings) -> dict[str, str]:
    """Return the servers whose clocks are compared, by name, each with an address that gives an answer."""
    host = settings.registry_url.host
    plain = is_loopback(host) or is_named(host, settings.insecure_registries)
    uri = settings.mlflow_tracking_uri
    found = {"MLflow": uri} if urlsplit(uri).scheme in {"http", "https"} else {}
    return {**found, "the registry": f"{'http' if plain else 'https'}://{api_host(host)}/v2/"}


def _difference(client: Client, url: str) -> float | None:
    """Return by how many seconds a server's clock is at least ahead of ours; None where it cannot be seen."""
    asked = datetime.now(tz=UTC)
    try:
        with client.send("GET", url, until=time.monotonic() + _SECONDS) as response:
            told = parsedate_to_datetime(response.headers["Date"])
    except (Retry, BuilderError, KeyError, ValueError):
        return None
    told = told if told.tzinfo else told.replace(tzinfo=UTC)
    # Told in whole seconds, and servers that look once a second may tell the one before; ours is that of some moment
    # between question and answer.
    ahead = (told - datetime.now(tz=UTC)).total_seconds()
    behind = (asked - told).total_seconds() - _COARSE
    return round(max(ahead, 0) - max(behind, 0))


def _told(name: str, seconds: float) -> str:
    if abs(seconds) <= 1:
        return f"{name} is right"
    return f"{name} is {abs(seconds):g} s {'fast' if seconds > 0 else 'slow'}"


def package_index(around: Surroundings) -> Finding:
    """Look for a package that images have in each index, and whether the index gives upload times."""
    settings = around.settings
    if settings.build_method == "dockerfile":
        return skipped("BUILD_METHOD is dockerfile: a Dockerfile asks the index by itself.")
    from builder.package_index import Indexes
    from builder.package_index.client import IndexClient, host_of

    indexes = Indexes.of(network(settings), allowed=settings.allowed_indexes)
    pages: dict[str, tuple[IndexFile, ...]] = {}
    try:
        with IndexClient(indexes, policy=POLICY) as client:
            for index in client.search_order:
                pages[index.url if index.is_file else host_of(index.url)] = client.page(index, _PROJECT) or ()
    except BuilderError:
        if around.without_credential(settings.registry_url.host):
            return skipped("This Pod reaches no package index: only Jobs that publish do.", IN_A_JOB)
        raise
    return _judged(pages)


def _judged(pages: Mapping[str, Sequence[IndexFile]]) -> Finding:
    """Return what the pages of `_PROJECT` say of the indexes, by their names."""
    text = f"Answers: {', '.join(pages) or 'no index, as none is configured'}."
    timeless = [name for name, files in pages.items() if files and not any(file.uploaded for file in files)]
    if timeless:
        what = f"{text} No upload times: {', '.join(timeless)}, so RESOLVE_AS_OF has no effect on its packages."
        return warn(what, "Use an index that gives upload times (PEP 700), or pin the requirements of models.")
    if not any(pages.values()):
        remedy = "Make it available there, as docs/air-gapped.md says: images that serve a model need it."
        return warn(f"{text} No index has {_PROJECT}.", remedy)
    return ok(f"{text} Upload times are given.")


def engine(around: Surroundings) -> Finding:
    """See whether a Dockerfile can be run here."""
    settings = around.settings
    if settings.build_method == "wheels":
        return skipped("BUILD_METHOD is wheels, which runs no Dockerfile.")
    from builder.dockerfile import select_engine
    from builder.publish import refuse_untrusted

    try:
        name = select_engine(settings).name
    except InvalidSettings as error:
        if around.in_pod:
            return skipped("No engine is in this Pod: a Dockerfile is run by a Job of its own.")
        if settings.build_method == "dockerfile" or settings.build_engine != "auto":
            raise
        return warn(f"{error.what} Versions without one can be published.", error.remedy)
    if not around.in_pod:
        refuse_untrusted(settings)
    return ok(f"{name} runs Dockerfiles.")


def smoke_test(around: Surroundings) -> Finding:
    """See whether a container runs here."""
    settings = around.settings
    if settings.smoke_test == "off":
        return skipped("SMOKE_TEST is off.")
    if settings.smoke_test_candidate or settings.in_pod or around.in_pod:
        return skipped("In a Pod, the kubelet runs the image, if the component k8s/smoke-test is installed.")
    from builder.smoke import SmokeTests

    works, said = SmokeTests(settings).check()
    if works:
        return ok(f"{said} runs containers.")
    remedy = "Install podman, or Docker with its daemon: images are then run and queried before their tags move."
    if settings.smoke_test == "required":
        message = f"SMOKE_TEST is required, and no container can be run here: {said}."
        raise InvalidSettings(message, remedy=remedy)
    return warn(f"Images are not tested here: {said}.", remedy)
