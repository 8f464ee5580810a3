"""What became of a version: written back to its tags, where the data scientist looks."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal, cast, get_args

from pydantic import BaseModel, ConfigDict

from builder.errors import BuilderError, one_line
from builder.log import get_logger

if TYPE_CHECKING:
    from builder.models.catalog import Catalog
    from builder.models.version import ModelVersion

State = Literal["", "pending", "running", "published", "failed", "foreign"]

_LONGEST_ERROR = 1000
_NUMBER = re.compile(r"[0-9]{1,9}")
_log = get_logger("outcome")


class Outcome(BaseModel):
    """What became of one version for one target.

    Attributes:
        target: the target's name, `pltr_foundry`.
        state: `pending`, `running`, `published`, `failed`, or `foreign` where the tag is an image we did not make;
            empty where nothing is known.
        image: digest reference of the image.
        tag: the reference with the tag, `quay.io/domino/model:v3`.
        source_id: source id of what was published or tried.
        platforms: platforms of the image, `os/architecture[/variant]`.
        error: what went wrong: `Type: what remedy`.
        wanted: platforms that were asked for when work on it last began.
        attempts: how often this source was tried since it last came to something.
        finished: when it ended, RFC 3339 in UTC.
        smoke_test: what came of running the image: `passed: …` or `failed: …` with the platform and the digest of what
            was run, `not possible: …` with the reason, or `off`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str
    state: State = ""
    image: str = ""
    tag: str = ""
    source_id: str = ""
    platforms: tuple[str, ...] = ()
    error: str = ""
    wanted: tuple[str, ...] = ()
    attempts: int = 0
    finished: str = ""
    smoke_test: str = ""

    @classmethod
    def of(cls, version: ModelVersion, target: str) -> Outcome:
        """Return what a version's tags say about a target.

        Anybody can edit tags, so a value that is not of its form counts as not there.
        """

        def tag(name: str) -> str:
            return version.tags.get(f"publish.{target}.{name}", "").strip()

        state, attempts = tag("state"), tag("attempts")
        return cls(
            target=target,
            state=cast("State", state) if state in get_args(State) else "",
            image=tag("image"),
            tag=tag("tag"),
            source_id=tag("source"),
            platforms=_names(tag("platforms")),
            wanted=_names(tag("wanted")),
            error=tag("error"),
            attempts=int(attempts) if _NUMBER.fullmatch(attempts) else 0,
            finished=tag("finished"),
            smoke_test=tag("smoke_test"),
        )

    def values(self) -> dict[str, str]:
        """Return the fields as strings, by their names without the target's; the state last."""
        return {
            "image": self.image,
            "tag": self.tag,
            "source": self.source_id,
            "platforms": ",".join(self.platforms),
            "error": one_line(self.error, _LONGEST_ERROR),
            "wanted": ",".join(self.wanted),
            "attempts": str(self.attempts),
            "finished": self.finished,
            "smoke_test": self.smoke_test,
            "state": self.state,
        }

    def tags(self) -> dict[str, str]:
        """Return the tags that say it, `publish.<target>.state` last, so that whoever sees the state sees all."""
        return {f"publish.{self.target}.{name}": value for name, value in self.values().items()}


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def record(catalog: Catalog, version: ModelVersion, outcome: Outcome) -> None:
    """Set the version's tags to an outcome, those only that differ from what MLflow holds now.

    It never raises: a failure to record is logged, so that it cannot hide the outcome itself.
    """
    report = _log.bind(version=str(version), state=outcome.state)
    try:
        # `version` may be from before an earlier record of the same run.
        now = catalog.find(version.name, version.version)
        if now.created_ms != version.created_ms:
            report.error("the outcome is not recorded: the version was deleted, and another has its number")
            return
        changed = {name: value for name, value in outcome.tags().items() if now.tags.get(name, "") != value}
        if changed:
            catalog.set_tags(version, changed)
    except BuilderError as error:
        report.error("the outcome could not be recorded", error=error.one_line())
    except Exception:  # noqa: BLE001, see above: whatever it is, the outcome matters more
        report.exception("the outcome could not be recorded")
