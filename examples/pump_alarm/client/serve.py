"""Serve the model over HTTP: POST /invocations with {"inputs": [readings, …]}."""

from __future__ import annotations

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MODEL = Path(__file__).parent.parent / "mymodel"
sys.path.insert(0, str(MODEL / "code"))

from pump_alarm import load  # noqa: E402 - it lies with the model

model = load(MODEL / "data" / "rules.yaml")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({"rules": len(model.rules)})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer({"predictions": model.predict(body["inputs"])})

    def answer(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    ThreadingHTTPServer(("", int(os.environ.get("PORT", "8080"))), Handler).serve_forever()
