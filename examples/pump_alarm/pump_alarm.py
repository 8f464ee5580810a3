"""A model that is written rather than trained: alarms of a pump, from rules that an engineer can read.

It is a python_function model by its loader module, so its image needs neither MLflow nor NumPy, and runs
wherever Python does.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any


class PumpAlarm:
    """Says which rules the readings of a pump break."""

    def __init__(self, rules: list[dict[str, Any]]) -> None:
        self.rules = rules

    def predict(self, readings: Any) -> list[list[str]]:
        """Return, for each row of readings, the alarms it raises."""
        rows = readings.to_dict("records") if hasattr(readings, "to_dict") else readings
        return [[rule["alarm"] for rule in self.rules if row[rule["reading"]] > rule["above"]] for row in rows]


def load(path: str | Path) -> PumpAlarm:
    """Return the model of a rules file."""
    return PumpAlarm(tomllib.loads(Path(path).read_text())["rule"])


_load_pyfunc = load  # the name that MLflow asks a loader module for
