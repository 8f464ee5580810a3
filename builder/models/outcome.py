"""What became of a version: written back to its tags, where the data scientist looks, and into a Pod's message."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, cast, get_args

from builder.errors import BuilderError, one_line
from builder.log import get_logger, masked
from builder.reference import Platform, parse_platforms

if TYPE_CHECKING:
    from builder.models.catalog import Catalog
    from builder.models.version import ModelVersion

State = Literal["pending", "running", "published", "failed", "foreign"]

_LONGEST_ERROR = 1000
# What Kubernetes keeps of a container's termination message.
_LONGEST_MESSAGE = 4096
_log = get_logger("outcome")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one version for one target.

    Attributes:
        target: the target's name, `pltr_foundry`.
        state: `pending`, `running`, `published`, `failed`, or `foreign` where the tag is an image we did not make.
        image: digest reference of the image.
        tag: the reference with the tag, `quay.io/domino/model:v3`.
        source: source id of what was published or tried.
        platforms: platforms of the image.
        error: what went wrong, `Type: what remedy`; made one line of at most 1,000 characters, secrets masked.
        attempts: how often this source was tried in vain.
        finished: when it ended.
    """

    target: str
    state: State
    image: str = ""
    tag: str = ""
    source: str = ""
    platforms: tuple[Platform, ...] = ()
    error: str = ""
    attempts: int = 0
    finished: datetime | None = None

    def __post_init__(self) -> None:
        """Make the error fit for a tag."""
        object.__setattr__(self, "error", one_line(masked(self.error), _LONGEST_ERROR))

    @classmethod
    def of(cls, version: ModelVersion, target: str) -> Outcome | None:
        """Return what a version's tags say about a target; None where they say nothing that can be read.

        Anybody can edit tags, so a value that is not of its form counts as not there.
        """

        def tag(name: str) -> str:
            return version.tags.get(f"publish.{target}.{name}", "").strip()

        if tag("state") not in get_args(State):
            return None
        platforms: tuple[Platform, ...] = ()
        with suppress(BuilderError):
            platforms = parse_platforms(tag("platforms"))
        finished = None
        with suppress(ValueError):
            moment = datetime.fromisoformat(tag("finished"))
            finished = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        attempts = tag("attempts")
        return cls(
            target=target,
            state=cast("State", tag("state")),
            image=tag("image"),
            tag=tag("tag"),
            source=tag("source"),
            platforms=platforms,
            error=tag("error"),
            attempts=int(attempts) if attempts.isascii() and attempts.isdigit() and len(attempts) < 10 else 0,  # noqa: PLR2004
            finished=finished,
        )

    def values(self) -> dict[str, str]:
        """Return the fields as strings, by their names without the target's; the state last."""
        return {
            "image": self.image,
            "tag": self.tag,
            "source": self.source,
            "platforms": ",".join(map(str, self.platforms)),
            "error": self.error,
            "attempts": str(self.attempts),
            "finished": self.finished.astimezone(UTC).isoformat(timespec="seconds") if self.finished else "",
            "state": self.state,
        }

    def tags(self) -> dict[str, str]:
        """Return the tags that say it, `publish.<target>.state` last, so that whoever sees the state sees all."""
        return {f"publish.{self.target}.{name}": value for name, value in self.values().items()}


def record(catalog: Catalog, version: ModelVersion, outcome: Outcome) -> None:
    """Set the version's tags to an outcome, those only that differ from what `version` holds.

    It never raises: a failure to record is logged, so that it cannot hide the outcome itself.
    """
    changed = {name: value for name, value in outcome.tags().items() if version.tags.get(name, "") != value}
    if not changed:
        return
    try:
        catalog.set_tags(version, changed)
    except BuilderError as error:
        _log.error("the outcome could not be recorded", version=str(version), state=outcome.state, error=str(error))
    except Exception:
        _log.exception("the outcome could not be recorded", version=str(version), state=outcome.state)


def termination_message(outcome: Outcome) -> str:
    """Return an outcome as JSON of at most 4,096 bytes; a long error is cut to make it fit."""
    values: dict[str, object] = {"target": outcome.target, **outcome.values(), "attempts": outcome.attempts}
    text = json.dumps(values, ensure_ascii=True)
    limit = len(outcome.error)
    while len(text) > _LONGEST_MESSAGE and limit:
        limit //= 2
        values["error"] = one_line(outcome.error, limit) if limit else ""
        text = json.dumps(values, ensure_ascii=True)
    return (
        text if len(text) <= _LONGEST_MESSAGE else json.dumps({"target": outcome.target[:200], "state": outcome.state})
    )
