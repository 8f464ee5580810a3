"""Serve the model: POST rows to /invocations, get predictions.

curl -d '{"rows": [[5.1, 3.5, 1.4, 0.2]]}' http://127.0.0.1:8080/invocations
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow

# The first process of a container ignores SIGTERM unless it says what to do.
signal.signal(signal.SIGTERM, lambda *_: sys.exit())

MODEL = mlflow.pyfunc.load_model(str(Path(__file__).parent.parent / os.environ.get("MODEL_FOLDER", "mymodel")))


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.answer(200, {"status": "ok"})

    def do_POST(self) -> None:
        try:
            rows = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["rows"]
            self.answer(200, {"predictions": MODEL.predict(rows).tolist()})
        except mlflow.MlflowException as error:
            # Rows that are not what the model's signature says are the caller's fault, and MLflow says so.
            self.answer(error.get_http_status_code(), {"error": error.message})
        except (KeyError, TypeError, ValueError) as error:
            self.answer(400, {"error": str(error)})
        except Exception as error:  # noqa: BLE001 - whatever the model raises is answered, and printed
            traceback.print_exc()
            self.answer(500, {"error": f"{type(error).__name__} in the model; the container's log has more"})

    def answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    # In a container every address is the container's own.
    address = os.environ.get("HOST", "0.0.0.0"), int(os.environ.get("PORT", "8080"))  # noqa: S104
    server = ThreadingHTTPServer(address, Handler)
    print(f"listening on port {server.server_port}", flush=True)
    server.serve_forever()
