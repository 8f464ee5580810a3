"""Domino: the two headers by which its MLflow knows a user and a run, through MLflow's own plug-in point.

MLflow finds `DominoHeaders` by the entry point `mlflow.request_header_provider` of this package and asks it before
every request. The class has the two methods that MLflow calls and does not derive from MLflow's abstract class: MLflow
loads it while it is itself being imported, so a module that imports MLflow first could not be loaded there.
"""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from typing import Final

# Not a secret: Domino's public examples sign with this word. The token names a run; what proves the user is the key.
_SIGNED_WITH: Final = "secret"


class DominoHeaders:
    """X-Domino-Api-Key and X-Domino-Execution, where DOMINO_USER_API_KEY and DOMINO_RUN_ID are both set."""

    def in_context(self) -> bool:
        """Return whether both variables are set."""
        return all(_variables())

    def request_headers(self) -> dict[str, str]:
        """Return the two headers; none where a variable is missing."""
        key, run_id = _variables()
        if not (key and run_id):
            return {}
        return {"X-Domino-Api-Key": key, "X-Domino-Execution": _execution(run_id)}


def _variables() -> tuple[str, str]:
    return os.environ.get("DOMINO_USER_API_KEY", "").strip(), os.environ.get("DOMINO_RUN_ID", "").strip()


@lru_cache(maxsize=1)
def _execution(run_id: str) -> str:
    """Return the JWT `{"execution_id": run_id}`, HS256."""
    # Imported here, since MLflow loads this module in every process that imports MLflow.
    import jwt

    with warnings.catch_warnings():
        # The word is shorter than a key should be; that it is no key is said above.
        warnings.filterwarnings("ignore", message=".*HMAC key is .* bytes long", category=UserWarning)
        return jwt.encode({"execution_id": run_id}, _SIGNED_WITH, algorithm="HS256")
