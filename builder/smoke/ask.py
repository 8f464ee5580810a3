"""Ask MLflow's scoring server in this container: is the model loaded, and does its own input example get an answer?

This file runs within the image, on the model's own Python (3.6 and later), by `python -c`; so it imports nothing of
ours, and it uses no syntax or type of a later Python. It prints a line of JSON for each thing that it has found
out. What it prints is the author's word, since it runs in the author's container: its reader bounds it.
"""

import http.client
import json
import os
import sys
import time
from typing import Any

EXAMPLES = ("serving_input_example.json", "input_example.json")
LARGEST_EXAMPLE = 64 << 20
LARGEST_ANSWER = 16 << 20
# As JSON on one line it must not be cut: its reader takes lines of 4,000 characters at most.
LONGEST_COMPLAINT = 500
_PAUSE = 0.1
# What a request to MLflow 2 and later holds one of; `messages` and others are those of chat and completion models.
_FORMS = ("inputs", "instances", "dataframe_split", "dataframe_records", "messages", "prompt", "input")
_SPLIT = ("data", "columns", "index")


def requests_for(example: Any, release: int) -> Any:
    """Return what to send for a stored example: pairs of a body and a content type, of which one has to be answered.

    MLflow has written `input_example.json` in several forms: a data frame as `columns` and `data` (1.9 and later), or
    as a list of records (before); tensors and lists below `inputs` (1 and 2), or as they are (3); and data beside
    `params` below `inputs`. `serving_input_example.json` (2.14 and later) is a request already.

    Args:
        example: the file's JSON value.
        release: the server's major release; 1 takes a data frame as it is. 0 for every form, today's first.
    """
    if not release:
        today = requests_for(example, 3)
        return today + [request for request in requests_for(example, 1) if request not in today]
    plain = "application/json"
    if isinstance(example, dict):
        if _is_split(example):
            if release < 2:  # noqa: PLR2004  # releases are what the docstring speaks of
                return [(example, plain + "; format=pandas-split"), (example, plain)]
            return [({"dataframe_split": example}, plain)]
        inner = example.get("inputs")
        if set(example) == {"inputs", "params"} and isinstance(inner, dict) and _is_split(inner):
            return [({"dataframe_split": inner, "params": example["params"]}, plain)]
        if "indptr" in example and "shape" in example:
            return []  # a sparse matrix, which no release of the server reads
        if any(name in example for name in _FORMS):
            return [(example, plain), ({"inputs": example}, plain)]
    if isinstance(example, list) and example and all(isinstance(row, dict) for row in example):
        if release < 2:  # noqa: PLR2004
            return [(example, plain + "; format=pandas-records")]
        return [({"inputs": example}, plain), ({"dataframe_records": example}, plain)]
    return [({"inputs": example}, plain)]


def _is_split(example: Any) -> bool:
    return isinstance(example.get("data"), list) and all(name in _SPLIT for name in example)


def complaint_about(status: int, answer: bytes) -> str:
    """Return what is wrong with an answer; empty where nothing is."""
    if len(answer) > LARGEST_ANSWER:
        return "the answer has more than {} bytes".format(LARGEST_ANSWER)  # noqa: UP032  # one way to format, here
    text = answer.decode("utf-8", "replace")
    if status != http.client.OK:
        return "status {}: {}".format(status, text[:LONGEST_COMPLAINT])  # noqa: UP032
    try:
        # NaN counts as valid: every release answers so for a prediction that is missing.
        json.loads(text)
    except (ValueError, RecursionError):
        return "the answer is not JSON: " + text[:LONGEST_COMPLAINT]
    return ""


def ask(port: int, model: str, deadline: float) -> None:
    """Wait until the server answers, send it the example, and print what came of each."""
    status = 0
    while status != http.client.OK:
        if time.monotonic() > deadline:
            _say("silent", status=status)
            return
        try:
            status = _request(port, "/ping", deadline)[0]
        except (OSError, http.client.HTTPException):
            time.sleep(_PAUSE)
        else:
            if status != http.client.OK:
                time.sleep(_PAUSE)
    _say("ping")
    name, problems = "", []
    for name, (example, kind) in _examples(model):  # noqa: B007  # the last one's name is said
        try:
            body = json.dumps(example).encode()
            problem = complaint_about(*_request(port, "/invocations", deadline, body, kind))
        except (OSError, http.client.HTTPException) as error:
            problem = "no answer: {!r}".format(error)  # noqa: UP032
        problems.append(problem)
        if not problem:
            break
    # The first form is the likeliest, so its problem tells most.
    _say("answer", example=name, problem=problems[0] if all(problems) and problems else "")


def _examples(model: str) -> Any:
    """Return the requests that one stored example may be, each with the file's name."""
    for name in EXAMPLES:
        path = os.path.join(model, name)  # noqa: PTH118  # pathlib's import takes longer than all of this
        try:
            if os.path.getsize(path) > LARGEST_EXAMPLE:  # noqa: PTH202
                continue
            with open(path, encoding="utf-8") as file:  # noqa: PTH123
                example = json.load(file)
        except (OSError, ValueError, RecursionError):
            continue
        release = _release() if name == EXAMPLES[1] else 2
        requests = [(example, "application/json")] if name == EXAMPLES[0] else requests_for(example, release)
        return [(name, request) for request in requests]
    return []


def _release() -> int:
    """Return the major release of MLflow in this image; 0 where it is unknown."""
    for folder in sys.path:
        try:
            names = os.listdir(folder or ".")  # noqa: PTH208
        except OSError:
            continue
        for name in names:
            # importlib.metadata came with Python 3.8.
            package, _, version = name.partition("-")
            if package in ("mlflow", "mlflow_skinny") and version.endswith(".dist-info"):
                return int(version.split(".")[0]) if version.split(".")[0].isdigit() else 0
    return 0


def _request(port: int, path: str, deadline: float, body: bytes = b"", kind: str = "") -> Any:
    """Return the status and the content of an answer, of which at most one byte too much is read."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=max(deadline - time.monotonic(), 1))
    try:
        connection.request("POST" if body else "GET", path, body or None, {"Content-Type": kind} if kind else {})
        answer = connection.getresponse()
        return answer.status, answer.read(LARGEST_ANSWER + 1)
    finally:
        connection.close()


def _say(event: str, **more: Any) -> None:
    sys.stdout.write(json.dumps(dict(more, event=event)) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    ask(int(sys.argv[1]), sys.argv[2], time.monotonic() + float(sys.argv[3]))
