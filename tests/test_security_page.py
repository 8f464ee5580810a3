"""SECURITY.md promises what tests show: each test that it names is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = re.findall(r"`(tests/[a-z_/]+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text())


def test_every_promise_names_a_test():
    page = (ROOT / "SECURITY.md").read_text()
    rows = re.findall(r"^\| (.+) \| (.+) \|$", page.partition("## What an author cannot do")[2], re.MULTILINE)
    promises = [row for row in rows if row[1] != "shown by" and not row[1].startswith("---")]
    assert len(promises) > 20
    assert [what for what, tests in promises if "::" not in tests] == []


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[name for _, name in NAMED])
def test_the_test_is_there(file, name):
    functions = [
        node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)
    ]
    assert functions.count(name) == 1
