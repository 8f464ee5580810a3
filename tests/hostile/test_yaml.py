"""YAML of an author's, read beside credentials: MLmodel, conda.yaml, python_env.yaml."""

from pathlib import Path

import pytest
import yaml

from builder.errors import InvalidVersion
from builder.safe_open import MOST_DEPTH, MOST_NODES, MOST_YAML_BYTES, read_yaml
from builder.wheels.requirements import Requirements
from tests.hostile.bounded import bounded

LARGE = 1_000_000


def read(folder, name, content):
    model = Path(folder) / "model"
    model.mkdir(exist_ok=True)
    (model / name).write_bytes(content)
    return Requirements.read(Path(folder), "model")


def read_all(folder, content):
    for name in ("conda.yaml", "python_env.yaml", "MLmodel"):
        read(folder, name, content)


def aliases(levels, references):
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{references.format(n - 1)}]" for n in range(1, levels)]
    return "\n".join(lines).encode()


MERGES = "\n".join(
    ["a0: &a0 {k0: v}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}], k{n}: v}}" for n in range(1, 9))]
).encode()

HOSTILE = {
    "brackets": (b"[" * 100_000, "deeper than 50"),
    "braces": (b"{" * LARGE, "deeper than 50"),
    "dashes": (b"- " * (LARGE // 2), "deeper than 50"),
    "question marks": (b"? " * (LARGE // 2), "deeper than 50"),
    "aliases, 351 bytes": (aliases(9, ",".join(["*a{0}"] * 9)), "aliases written out"),
    "aliases of text": (b"a: &a " + b"x" * 900_000 + b"\nb: [" + b"*a," * 20_000 + b"]", "aliases written out"),
    "aliases that nest": (b"a0: &a0 [" + b"[" * 40 + b"]" * 41 + b"\nb: " + b"[" * 40 + b"*a0" + b"]" * 40, "deeper"),
    "an alias of itself": (b"a: &a [*a]", "not complete"),
    "merge keys of eight levels": (MERGES, "merge key"),
    "a merge key that is an alias": (b"x: &m <<\na: &a {b: c}\nd: {*m : *a}", "merge key"),
    "entries": (b"a: [" + b"a," * 490_000 + b"]", "entries"),
    "tags": (b"!<" + b"a" * LARGE + b"> x", "tag"),
    "many tags": ((b"!" + b"a" * 4000 + b" ") * 250, "tag"),
    "directives": (b"".join(b"%%TAG !a%d! b\n" % n for n in range(50_000)) + b"--- a", "'%'"),
    "directives on other lines": ("".join(f"%TAG !a{n}! b\u2028" for n in range(40_000)).encode() + b"--- a", "'%'"),
    "Python's tags": (b"a: !!python/object/apply:os.system [id]", "plain data"),
    "a key that is a list": (b"? [a]\n: b", "key that is not text"),
    "two documents": (b"a: b\n---\nc: d", "second document"),
    "another YAML": (b"%YAML 2.0\n---\na: b", "incompatible"),
    "a tab": (b"a:\n\t- b", "cannot start"),
    "NUL": (b"a: \0", "control characters"),
    "UTF-16": ("a: b".encode("utf-16"), "UTF-8"),
    "not UTF-8": (b"a: \xff", "UTF-8"),
    "a surrogate": (b'a: "\\ud800"', "invalid Unicode"),
}


@pytest.mark.parametrize(
    ("case", "name"),
    [*((case, "conda.yaml") for case in HOSTILE), ("brackets", "python_env.yaml"), ("brackets", "MLmodel")],
)
def test_what_is_refused_costs_little(case, name, tmp_path):
    content, says = HOSTILE[case]
    outcome = bounded(read, tmp_path, name, content)
    outcome.check(says=says)
    assert f"model/{name} is not YAML" in outcome.message


HARMLESS = {
    "numbers of 5,000 digits": b"mlflow_version: " + b"9" * 5000 + b"." + b"9" * 5000 + b"\npython: " + b"9" * 5000,
    "a version of 5,000 digits": b"mlflow_version: 2." + b"9" * 5000,
    "a date that is none": b"python: 2020-99-99\ndate: 2020-99-99T99:99:99Z",
    "numbers to base 2, 8, 16 and 60": b"a: [0b1" + b"1" * 9999 + b", 0777, 0x" + b"f" * 9999 + b", 190:20:30]",
    "plain data's tags": b"a: !!binary '%%%'\nb: !!set {c, d}\ne: !!omap [f: g]\nh: !!int x\ni: !!timestamp now",
    "a byte order mark": b"\xef\xbb\xbfa: b",
    "an empty file": b"",
    "a list": b"- a",
    "quotes": b"a: '" + b"'" * LARGE + b"'",
    "blank lines": b"a: '" + b"\n" * LARGE + b"'",
    "escapes": b'a: "' + b"\\n" * (LARGE // 2) + b'"',
    "exclamation marks": b'a: "' + b"! " * (LARGE // 2) + b'"',
    "comments": b"#\n" * (LARGE // 2),
    "a block": b"a: |\n" + b" b\n" * (LARGE // 3),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_is_not_refused_costs_little(case, tmp_path):
    bounded(read_all, tmp_path, HARMLESS[case]).check(exit_code=0)


def test_the_largest_file_costs_little():
    row = b"- {key: '" + b"x" * 150 + b"'}\n"
    content = row * min(MOST_YAML_BYTES // len(row), MOST_NODES // 3 - 1)
    assert len(content) > 2_000_000
    bounded(read_yaml, content, "it").check(exit_code=0)
    bounded(read_yaml, b"a" * (MOST_YAML_BYTES + 1), "it").check(says="more than 4,194,304 bytes")


def test_bounds_are_where_they_are_said_to_be():
    assert read_yaml(b"[" * MOST_DEPTH + b"]" * MOST_DEPTH, "it") is not None
    assert len(read_yaml(b"[" + b"a," * (MOST_NODES - 1) + b"]", "it")) == MOST_NODES - 1
    with pytest.raises(InvalidVersion, match="deeper"):
        read_yaml(b"[" * (MOST_DEPTH + 1) + b"]" * (MOST_DEPTH + 1), "it")
    with pytest.raises(InvalidVersion, match="entries"):
        read_yaml(b"[" + b"a," * MOST_NODES + b"]", "it")


def test_honest_files_are_read_as_pyyaml_reads_them():
    """PyYAML writes aliases for what stands in a document twice, and MLflow's metadata can hold such."""
    shared = {"k": ["v", "w"]}
    document = {
        "metadata": {"x": shared, "y": shared, "<<": "quoted", "": "empty"},
        "signature": {"inputs": '[{"type": "double", "name": "! 100%"}]' * 500, "params": None},
        "text": ["multi\nline\n", " blanks ", "é\u2028", "%a", "!b", "'", '"'],
        "nothing": [],
        "none": {},
    }
    text = yaml.safe_dump(document, sort_keys=False)
    assert "*id001" in text
    assert read_yaml(text.encode(), "it") == yaml.safe_load(text) == document


def test_scalars_are_text_and_the_last_of_two_keys_counts():
    read = read_yaml(b"python: 3.10\na: 1\na: 0x10\nb: yes\nc: ~\nd: 'null'\ne:", "it")
    assert read == {"python": "3.10", "a": "0x10", "b": "yes", "c": None, "d": "null", "e": None}


def test_a_version_in_float_form_is_the_python_meant(tmp_path):
    assert read(tmp_path, "python_env.yaml", b"python: 3.10\n").python_version == "3.10"


def test_what_stands_in_another_place_is_no_version(tmp_path):
    content = b"metadata:\n  python_version: 3.9.1\nmlflow_version: 2.9.2\nflavors: {python_function: {python_version: 3.11.7}}"
    found = read(tmp_path, "MLmodel", content)
    assert (found.python_version, found.mlflow_version) == ("3.11", "2.9.2")
