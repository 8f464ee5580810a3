"""How many modules a reader who follows one publish has to open."""

import json
import subprocess
import sys
from pathlib import Path

from scripts.launch import clean_environ

ROOT = Path(__file__).parents[2]
# Upper bounds.
WHEELS = 55
NOTHING_TO_DO = 25


def entered(environ):
    """Return the functions that a publish runs, by module; Python prints the result in a process of its own."""
    command = [sys.executable, "-m", "tests.publish.entered"]
    environ = {**clean_environ(), "PYTHONPATH": str(ROOT), **environ}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_publish_enters_few_modules(small, small_environ):
    environ = small_environ(small(tags={"MODEL_PLATFORMS": "linux/amd64,linux/arm64"}))
    wheels = entered(environ)
    # What is counted is the whole of it.
    assert {"builder.publish", "builder.wheels.resolve", "builder.oci.registry"} <= set(wheels)
    assert len(wheels) <= WHEELS, json.dumps(wheels, indent=1)
    nothing = entered(environ)
    assert {"builder.publish", "builder.oci.registry"} <= set(nothing)
    assert len(nothing) <= NOTHING_TO_DO, json.dumps(nothing, indent=1)
