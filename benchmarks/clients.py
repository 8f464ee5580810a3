"""Clients that the benchmark's models bring: each answers POST /invocations on port 8080."""

from __future__ import annotations

_SERVER = """
import json
from http.server import BaseHTTPRequestHandler, HTTPServer


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = json.dumps({"predictions": predict(body["inputs"])}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments):
        pass


HTTPServer(("0.0.0.0", 8080), Handler).serve_forever()
"""
_FOLDER = """\
from pathlib import Path

model_folder = Path(__file__).resolve().parents[1] / "mymodel"
"""

SKLEARN = (
    _FOLDER
    + """\
import pickle

model = pickle.loads((model_folder / "model.pkl").read_bytes())


def predict(inputs):
    return model.predict(inputs).tolist()

"""
    + _SERVER
)

# It trains as it starts, some milliseconds, so that nobody needs xgboost to run the benchmark.
XGBOOST = (
    _FOLDER
    + """\
import pandas
import xgboost

frame = pandas.DataFrame([[number + column for column in range(4)] for number in range(20)])
model = xgboost.train({"max_depth": 2}, xgboost.DMatrix(frame, label=list(range(20))), num_boost_round=5)


def predict(inputs):
    return model.predict(xgboost.DMatrix(pandas.DataFrame(inputs))).tolist()

"""
    + _SERVER
)

PURE = (
    """\
import requests


def predict(inputs):
    return [requests.__version__ for _ in inputs]

"""
    + _SERVER
)

TORCH = (
    """\
import torch
import transformers

model = torch.nn.Linear(4, 1)


def predict(inputs):
    return model(torch.tensor(inputs)).tolist()

"""
    + _SERVER
)

WEIGHTS = (
    _FOLDER
    + """\
import packaging


def predict(inputs):
    return [sum(path.stat().st_size for path in model_folder.iterdir())]

"""
    + _SERVER
)
