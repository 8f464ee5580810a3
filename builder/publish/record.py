"""The outcome of a publish, and its record in the version's tags."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal, cast, get_args

from pydantic import BaseModel, ConfigDict

from builder.budget import out_of_memory
from builder.errors import BuilderError, ExitCode, Terminated, VersionNotFound
from builder.log import get_logger
from builder.masking import one_line
from builder.models import Catalog, ModelVersion
from builder.plan import Plan
from builder.reference import Reference

State = Literal["", "pending", "running", "published", "failed", "foreign"]

_LONGEST_ERROR = 1000
_NOT_COUNTED = "(not counted)"
_INTERRUPTED = "Terminated"
_NUMBER = re.compile(r"[0-9]{1,9}")
_WEB_PAGE = re.compile(r"https?://[^\s\"'<>]{1,4000}")
_log = get_logger("outcome")


class Outcome(BaseModel):
    """The outcome of one version for one target.

    Attributes:
        target: the target's name, `pltr_foundry`.
        state: `pending`, `running`, `published`, `failed`, or `foreign` if the tag holds an image that we did not
            make; empty if nothing is known.
        image: digest reference of the image.
        tag: the reference with the tag, `quay.io/domino/model:v3`.
        source_id: source id of the published or attempted source.
        platforms: platforms of the image, `os/architecture[/variant]`.
        error: what went wrong: `Type: what remedy`.
        wanted: platforms that were wanted when work on it last began.
        attempts: attempts at this source since its last result.
        attempt: what the last attempt is known by (ATTEMPT_ID), such as the UID of its Job; empty where it has no name.
            `… (not counted)` where it failed for a reason that is not the version's.
        finished: when it ended, RFC 3339 in UTC.
        smoke_test: the result of running an image: `passed: …` or `failed: …` with its platform and digest,
            `not possible: …` with the reason, or `off`.
        log: address of the last attempt's log; empty where none is known.
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
    attempt: str = ""
    finished: str = ""
    smoke_test: str = ""
    log: str = ""

    @classmethod
    def of(cls, version: ModelVersion, target: str) -> Outcome:
        """Return the outcome that a version's tags hold for a target.

        Tags can be edited by everybody, so a malformed value counts as absent.
        """

        def tag(name: str) -> str:
            return version.tags.get(f"publish.{target}.{name}", "").strip()

        state, attempts, log = tag("state"), tag("attempts"), tag("log")
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
            attempt=tag("attempt"),
            finished=tag("finished"),
            smoke_test=tag("smoke_test"),
            # People follow it: nothing but a web page.
            log=log if _WEB_PAGE.fullmatch(log) else "",
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
            "attempt": self.attempt,
            "finished": self.finished,
            "smoke_test": self.smoke_test,
            "log": self.log,
            "state": self.state,
        }

    def is_of(self, attempt: str) -> bool:
        """Return whether this is the outcome of an attempt, by its ATTEMPT_ID."""
        return bool(attempt) and self.attempt.partition(" ")[0] == attempt

    @property
    def interrupted(self) -> bool:
        """Whether the last process was asked to end by a signal: it could not tell why."""
        return self.error.startswith(f"{_INTERRUPTED}:")

    def tags(self) -> dict[str, str]:
        """Return the outcome as tags, `publish.<target>.state` last, so that a reader of the state sees all others."""
        return {f"publish.{self.target}.{name}": value for name, value in self.values().items()}


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def record(catalog: Catalog, version: ModelVersion, outcome: Outcome, *, fresh: bool = False) -> bool:
    """Set the version's tags to an outcome, but only those that differ from MLflow's.

    It never raises: a failure to record is logged, so that it cannot hide the outcome itself.

    Args:
        catalog: where to write.
        version: the version.
        outcome: what is recorded.
        fresh: whether `version` was found just now; else it may be from before an earlier record of the same run.

    Returns:
        Whether MLflow has it now; True as well if there is no such version any more.
    """
    report = _log.bind(version=str(version), state=outcome.state)
    try:
        now = version if fresh else catalog.find(version.name, version.version)
        if now.created_ms != version.created_ms:
            report.error("the outcome is not recorded: the version was deleted, and another has its number")
            return True
        # A version that waits for its first attempt need not say that there was none.
        absent = Outcome(target=outcome.target).tags() if outcome.state == "pending" else {}
        tags = outcome.tags().items()
        changed = {name: value for name, value in tags if now.tags.get(name, absent.get(name, "")) != value}
        if changed:
            catalog.set_tags(version, changed)
    except BuilderError as error:
        report.error("the outcome could not be recorded", error=error.one_line())
        return isinstance(error, VersionNotFound)
    except Exception:  # noqa: BLE001, see above: the outcome matters more than any error
        report.exception("the outcome could not be recorded")
        return False
    return True


# Failures that are the version's own fault and would recur. All others (an unavailable service, an expired credential,
# a setting) say nothing about the version, and do not count as attempts.
_OWN_FAULTS = frozenset({ExitCode.DATA, ExitCode.SOFTWARE, ExitCode.CANNOT_CREATE})


class Record:
    """One version's record for one target.

    Args:
        catalog: where to write.
        version: the version, with the tags it has now.
        target: the target's name.
        source_id: of the source that is being published.
        attempt: as ATTEMPT_ID: what all processes of one attempt share; empty for an attempt in a process of its own.
        log: address of the attempt's log; empty where it is not known.
    """

    def __init__(
        self,
        catalog: Catalog,
        version: ModelVersion,
        target: str,
        source_id: str,
        *,
        attempt: str = "",
        log: str = "",
    ) -> None:
        self._catalog = catalog
        self._version = version
        self._source_id = source_id
        self._attempt, self._log = attempt, log
        self._before = Outcome.of(version, target)
        self._plan: Plan | None = None

    @classmethod
    def of_plan(cls, catalog: Catalog, version: ModelVersion, plan: Plan, *, attempt: str = "") -> Record:
        """Return the record of a plan that another phase has made, and recorded as started."""
        record = cls(catalog, version, plan.target, plan.source_id, attempt=attempt)
        record._plan = plan
        return record

    def started(self, plan: Plan) -> None:
        """Record the start, and count it as an attempt; a failure that is not the version's fault takes that back.

        An attempt is counted once, however many processes begin it: a Pod that was evicted is followed by another.
        """
        self._plan = plan
        wanted = tuple(str(platform) for platform in plan.wanted)
        again = self._same_source and self._before.wanted in {wanted, ()}
        counted = again and self._begun
        self._write(
            state="running",
            source_id=self._source_id,
            tag=str(plan.reference),
            wanted=wanted,
            error="",
            attempts=max(self._before.attempts, 1) if counted else self._before.attempts + 1 if again else 1,
            attempt=self._attempt,
            smoke_test=self._before.smoke_test if self._same_source else "",
            log=self._log,
        )

    @property
    def smoke_test(self) -> str:
        """The result of the image's smoke test: of a new one, or else the one in the version's tags."""
        return self._before.smoke_test

    def smoke_tested(self, text: str) -> None:
        """Keep the result of the image's smoke test, to be written with the outcome."""
        self._before = self._before.model_copy(update={"smoke_test": text})

    def succeeded(self, plan: Plan, pinned: Reference) -> None:
        """Record the published image; a version whose tags say so already is left untouched."""
        facts: dict[str, Any] = {
            "state": "published",
            "image": str(pinned),
            "tag": str(plan.reference),
            "source_id": plan.source_id,
            "platforms": tuple(sorted(str(step.platform) for step in plan.platforms)),
            "error": "",
            "attempts": 0,
            "attempt": "",
        }
        if plan.action != "nothing" or self._before.model_copy(update=facts) != self._before:
            self._write(**facts, finished=_now())

    def left_alone(self, plan: Plan) -> None:
        """Record that the tag holds an image that is not ours."""
        facts: dict[str, Any] = {
            "state": "foreign",
            "image": "",
            "tag": str(plan.reference),
            "source_id": plan.source_id,
            "platforms": (),
            "error": plan.reason,
        }
        if self._before.model_copy(update=facts) != self._before:
            self._write(**facts, finished=_now())

    def ended(self, error: BuilderError, *, tag: str, wanted: tuple[str, ...]) -> None:
        """Record an attempt of a process that was ended while it worked on the version.

        It counts as one whether or not that process had recorded its start; this record was made before that.

        Args:
            error: what ended it.
            tag: where the version was to be published; empty if unknown.
            wanted: the platforms it was to be published for; empty if unknown.
        """
        again = self._same_source and self._before.wanted in {wanted, ()}
        self._write(
            state="failed",
            source_id=self._source_id,
            tag=tag or self._before.tag,
            wanted=wanted,
            error=error.one_line(),
            attempts=self._before.attempts + 1 if again else 1,
            attempt=self._attempt,
            finished=_now(),
        )

    def submitted(self) -> None:
        """Record that a Job is made for the version, unless its image of this source is there, or it runs already.

        The version was found just now, so its tags are not read again.
        """
        if self._before.state in {"published", "running"} and self._same_source:
            return
        facts: dict[str, Any] = {} if self._same_source else {"attempts": 0, "wanted": (), "image": "", "platforms": ()}
        self._write(**facts, fresh=True, state="pending", source_id=self._source_id, error="", log="")

    def reset(self) -> None:
        """Record that somebody wants the version to be tried again: earlier attempts no longer count."""
        if self._before.attempts or self._before.state == "failed":
            self._write(state="pending", error="", attempts=0, attempt="")

    def not_recorded(self, error: BuilderError) -> bool:
        """Record the end of an attempt whose processes could not: killed, evicted, never started.

        Args:
            error: what ended it. It counts as an attempt where it is the version's own fault.

        Returns:
            Whether it is recorded.
        """
        return self._failed(error.one_line(), own_fault=_is_own_fault(error))

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Record any failure inside, and raise it again.

        Raises:
            OverBudget: in place of a MemoryError.
        """
        try:
            yield
        except BuilderError as error:
            self._failed(error.one_line(), own_fault=_is_own_fault(error))
            raise
        except Terminated:
            said = f"{_INTERRUPTED}: the process was ended by a signal. Publish the version again."
            self._failed(said, own_fault=False)
            raise
        except MemoryError as error:
            exceeded = out_of_memory(self._version)
            self._failed(exceeded.one_line(), own_fault=True)
            raise exceeded from error
        except Exception as error:
            self._failed(f"Defect: {type(error).__name__}. See the publisher's log.", own_fault=True)
            raise

    def _failed(self, error: str, *, own_fault: bool) -> bool:
        """Record a failure; unless it is the version's fault, an existing image of this source stays `published`."""
        present = self._plan.same_source if self._plan else self._before.state == "published" and self._same_source
        counted = self._begun or bool(self._plan and self._plan.builds)
        attempts = (self._before.attempts if self._same_source else 0) + (own_fault - counted)
        return self._write(
            state="published" if present and not own_fault else "failed",
            source_id=self._source_id,
            error=error,
            attempts=max(attempts, 0),
            attempt=self._attempt if own_fault or not self._attempt else f"{self._attempt} {_NOT_COUNTED}",
            finished=_now(),
            log=self._log or self._before.log,
        )

    @property
    def _begun(self) -> bool:
        """Whether this attempt was begun, and counted, by another process."""
        before = self._before
        return bool(self._attempt) and before.attempt == self._attempt and before.state in {"running", "failed"}

    @property
    def _same_source(self) -> bool:
        """Whether the record is of earlier work on the same source."""
        return self._before.source_id == self._source_id

    def _write(self, *, fresh: bool = False, **facts: object) -> bool:
        self._before = self._before.model_copy(update=facts)
        return record(self._catalog, self._version, self._before, fresh=fresh)


def _is_own_fault(error: BuilderError) -> bool:
    return error.of_version or error.exit_code in _OWN_FAULTS


def _now() -> str:
    return datetime.now(tz=UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
