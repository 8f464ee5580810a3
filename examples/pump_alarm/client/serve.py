"""Serve the model over HTTP: POST /invocations with {"inputs": [readings, …]}."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from waitress import serve

MODEL = Path(__file__).parent.parent / "mymodel"
sys.path.insert(0, str(MODEL / "code"))

from pump_alarm import load  # noqa: E402 - it lies with the model

model = load(MODEL / "data" / "rules.toml")


def application(environ, start_response):
    """Answer one request (WSGI, PEP 3333)."""
    if environ["REQUEST_METHOD"] == "POST":
        body = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
        content = {"predictions": model.predict(body["inputs"])}
    else:
        content = {"rules": len(model.rules)}
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(content).encode()]


if __name__ == "__main__":
    # The first process of a container ignores SIGTERM unless it says what to do.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    serve(application, host="0.0.0.0", port=int(os.environ.get("PORT", "8080")))  # noqa: S104 - a container's own network
