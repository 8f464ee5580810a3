"""What all rounds of one environment gave, and the figures that follow."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks import rivals, wheels
from benchmarks.environments import Environment
from benchmarks.jobs import Cost, Outcome

COLD_RIVALS = (rivals.DOCKER, rivals.BUILDKIT_COLD)
_MEGA = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Aim:
    """What was aimed at, in one environment.

    Attributes:
        what: in words.
        most: the figure that is not to be exceeded.
        measured: the figure; None where it could not be had.
    """

    what: str
    most: float
    measured: float | None


@dataclass(frozen=True, kw_only=True)
class Results:
    """What all rounds of one environment gave.

    Attributes:
        environment: which.
        rounds: the outcomes of each round.
    """

    environment: Environment
    rounds: list[list[Outcome]] = field(default_factory=list)

    def jobs(self) -> list[str]:
        """Return the jobs' names, in the order in which they were done."""
        return list(dict.fromkeys(outcome.job for outcomes in self.rounds for outcome in outcomes))

    def outcomes(self, job: str) -> list[Outcome]:
        """Return what became of a job, round by round."""
        return [outcome for outcomes in self.rounds for outcome in outcomes if outcome.job == job]

    def reason(self, job: str) -> str:
        """Return why a job has no figures, or not all; empty where nothing was amiss."""
        return next((outcome.reason for outcome in self.outcomes(job) if outcome.reason), "")

    def costs(self, job: str) -> list[Cost]:
        """Return what a job took, in the rounds in which it was done."""
        return [outcome.cost for outcome in self.outcomes(job) if outcome.cost]

    def median(self, job: str, figure: Callable[[Cost], float]) -> float | None:
        """Return the median of a figure of a job's cost; None where it was never done."""
        values = [figure(cost) for cost in self.costs(job)]
        return statistics.median(values) if values else None

    def start(self, job: str) -> float | None:
        """Return the median of the seconds to the first prediction."""
        values = [seconds for outcome in self.outcomes(job) for seconds in outcome.starts]
        return statistics.median(values) if values else None

    def size(self, job: str) -> float | None:
        """Return the median of the image's compressed sizes, in megabytes."""
        values = [outcome.image_bytes / _MEGA for outcome in self.outcomes(job) if outcome.image_bytes]
        return statistics.median(values) if values else None

    def ratios(self, job: str, rivals_of_it: Sequence[str]) -> list[float]:
        """Return, for each round, a job's seconds over those of the quickest of some rivals in the same round."""
        found = []
        for outcomes in self.rounds:
            seconds = {outcome.job: outcome.cost.seconds for outcome in outcomes if outcome.cost}
            theirs = [seconds[rival] for rival in rivals_of_it if rival in seconds]
            if job in seconds and theirs:
                found.append(seconds[job] / min(theirs))
        return found

    def aims(self) -> list[Aim]:
        """Return what was aimed at here, with what was measured."""
        found = []
        bare, compiled, size, start = {
            "sklearn": (0.08, 0.2, 0.6, 1.0),
            "mlflow": (0.03, 0.08, 0.5, 0.8),
        }.get(self.environment.name, (None, None, None, None))
        if bare and compiled and size and start:
            found += [
                self._ratio("cold without bytecode, to the better cold rival", bare, wheels.COLD_BARE, COLD_RIVALS),
                self._ratio("cold with bytecode, to the better cold rival", compiled, wheels.COLD, COLD_RIVALS),
                Aim(
                    what="image size, to that of docker build",
                    most=size,
                    measured=_over(self.size(wheels.COLD), self.size(rivals.DOCKER)),
                ),
                Aim(
                    what="start to first prediction, to that of docker build",
                    most=start,
                    measured=_over(self.start(wheels.COLD), self.start(rivals.DOCKER)),
                ),
            ]
        if self.environment.client and self.environment.name.startswith("model-"):
            found += [
                # What compiling takes is a matter of the packages, not of the model.
                Aim(
                    what="peak memory without bytecode, MB",
                    most=300,
                    measured=self._mega(wheels.COLD_BARE, lambda cost: cost.peak),
                ),
                Aim(
                    what="sent to the registry after 1 MB changed, MB",
                    most=2,
                    measured=self._mega(wheels.CHANGED, lambda cost: cost.sent),
                ),
            ]
        else:
            hot = (rivals.BUILDKIT_HOT,)
            found.append(self._ratio("warm, to tuned BuildKit with a hot cache", 0.45, wheels.WARM, hot))
        if wheels.OTHER_COLD in self.jobs():
            found.append(self._ratio("other platform, to this one, cold", 1.1, wheels.OTHER_COLD, (wheels.COLD,)))
        return found

    def _ratio(self, what: str, most: float, job: str, rivals_of_it: Sequence[str]) -> Aim:
        values = self.ratios(job, rivals_of_it)
        return Aim(what=what, most=most, measured=statistics.median(values) if values else None)

    def _mega(self, job: str, figure: Callable[[Cost], float]) -> float | None:
        value = self.median(job, figure)
        return None if value is None else value / _MEGA


def _over(mine: float | None, theirs: float | None) -> float | None:
    return mine / theirs if mine and theirs else None
