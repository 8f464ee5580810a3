"""Every format that an author writes, by fuzzing: a typed refusal or a result, soon, and in little memory.

Each format is fuzzed in a process of its own, with the same inputs each time; what it finds is in the failure's text.
"""

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from packaging.requirements import InvalidRequirement, Requirement

from builder.dockerfile.parser import Dockerfile
from builder.dockerfile.template import BaseImages, render
from builder.errors import BuilderError, ExitCode
from builder.model_folder import Environment
from builder.models import INPUT_TAGS, Inputs, ModelVersion, wanted_platforms
from builder.publish.record import Outcome
from builder.reference import Platform, Reference
from builder.wheels.install import WheelLayer
from builder.wheels.requirements import Requirements
from builder.wheels.wheel import open_wheel
from tests.hostile.bounded import bounded, quick, slowness
from tests.wheels.made import INFO, METADATA, PYTHON, make

EXAMPLES = 300
LARGE = 200_000
# One version's files, over and over; the process removes it.
FOLDER = "fuzz-"

_profile = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    # Shrinking a slow input takes a minute; what was found is shown as it is.
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)

NOISE = [
    "", " ", "\t", "\n", "\r\n", "\r", "\0", "\x1b[2J", "\x85", "\u2028", "\u202e", "\ufeff", "²", "é", "模", "\U0001f600",
    "\\", "\\\n", "'", '"', "#", "%", "$", "${A}", "%(x)s", "@", "&", "*", "!", "|", ">", "-", "=", "==", ":", ";", ",",
    "(", ")", "[", "]", "{", "}", "<<", "../", "/", ".", "~", "`",
]  # fmt: skip


@dataclass(frozen=True)
class Written:
    """What an author writes: parts, and how often each is repeated; short where it is shown."""

    parts: tuple[tuple[str, int], ...]

    @property
    def text(self) -> str:
        return "".join((part * count)[:LARGE] for part, count in self.parts)

    def encoded(self, errors: str) -> bytes:
        return self.text.encode("utf-8", errors)


def written(*words):
    """A format's words, noise, long runs of digits, and parts that are repeated many times."""
    part = st.one_of(st.sampled_from(words), st.sampled_from(NOISE), st.text(max_size=8))
    few = st.lists(part, max_size=10).map(lambda parts: ("".join(parts), 1))
    many = st.tuples(st.sampled_from([*words, *NOISE]), st.sampled_from([50, 1000, 20_000, LARGE]))
    digits = st.sampled_from(
        [("0", 1), ("9", 19), ("9", 4301), ("9", 20_000), ("1.", 2000), ("0x", 1), ("f", 5000), ("-1", 1)]
    )
    return st.lists(st.one_of(few, few, many, digits), min_size=1, max_size=4).map(lambda parts: Written(tuple(parts)))


def contents(*words):
    """Bytes of a file, most of them text."""
    return st.one_of(
        st.tuples(written(*words), st.sampled_from(["surrogatepass", "replace"])),
        st.tuples(st.binary(max_size=200), st.just("")),
        st.tuples(st.sampled_from(["utf-16", "utf-32", "utf-8-sig"]).map("a: b\n".encode), st.just("")),
    )


def content_of(drawn):
    what, errors = drawn
    return what.encoded(errors) if isinstance(what, Written) else what


def held(function, *arguments):
    """Call it; a refusal is of the version's kind, and neither takes long."""
    slow = slowness(0.02)
    begin = time.process_time()
    refusal = None
    try:
        function(*arguments)
    except BuilderError as error:
        refusal = error
    spent = time.process_time() - begin
    assert refusal is None or refusal.exit_code == ExitCode.DATA, refusal
    assert quick(spent, before=slow), f"{spent:.1f} s"


def folder_of(files):
    """Write a version's files into a new folder."""
    folder = Path(tempfile.mkdtemp(prefix=FOLDER))
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def read_model(name, content):
    folder = folder_of({f"model/{name}": content})
    try:
        held(Requirements.read, folder, "model")
        held(Environment.read, folder, "model")
    finally:
        shutil.rmtree(folder)


REQUIREMENT_WORDS = (
    "numpy", "==", ">=1,<2", "===foo", "; python_version < '3.9'", " and ", " or ", "[extra]", " @ https://x/y.whl",
    "--hash=sha256:" + "a" * 64, "--extra-index-url ", "https://u:p@h/simple", "-r ", "-c ", "-e ", "-U ", "--pre",
    "requirements.txt", "git+ssh://h/r", " \\\n", "a-1-py3-none-any.whl", "a", "A_", "mlflow===foo\n", "mlflow==",
)  # fmt: skip
YAML_WORDS = (
    "a: ", "- ", "? ", "[", "{", "&a ", "*a", "<<: ", "!!set ", "!<", "!", "%TAG !a! b\n", "%YAML 1.1\n", "---\n", "...\n", "  ",
    "|\n", ">-\n", "a", "dependencies:\n", "- pip:\n", "  - numpy==1\n", "- python=3.11\n", "channels: [x]\n", "python: 3.11\n",
    "flavors:\n", "  python_function:\n", "    python_version: 3.11\n", "mlflow_version: 2.9.2\n", "null", "2020-99-99",
    "0b1", "1:60", "!!binary a", "!!python/name:os ", "- -r requirements.txt\n", "build_dependencies:\n",
)  # fmt: skip
TAG_WORDS = (
    "linux/amd64", "linux/arm/v", "linux", "/", ",", "arm64", "model", "python:3.11-slim", "@sha256:" + "a" * 64, ":443/",
    "docker.io/", "python -m app", "--x=1", "..", "published", "running", "v7", "a", "client/app.py",
)  # fmt: skip
METADATA_WORDS = (
    "Name: demo\n", "Version: 1.0\n", "Requires-Dist: ", "numpy", "(>=1)", "; extra == 'a'", " and ", "(", "Provides-Extra: a\n",
    "Content-Type: multipart/mixed; boundary=x\n", "--x\n", " folded\n", "Metadata-Version: 2.1\n", "\n\n", "a", "@ http://x/",
    "From a\n", "Description: ", "=?utf-8?q?a?=",
)  # fmt: skip
ENTRY_WORDS = (
    "[console_scripts]\n", "[gui_scripts]\n", "[x]\n", "run = demo:main\n", "a", " = ", "demo", ":", "main", "[extra]", "%(x)s",
    ".", "../", ".wh.a = a:b\n", "#", "import", "__main__",
)  # fmt: skip
RECORD_WORDS = (
    "demo/a.py,sha256=" + "a" * 43 + ",1\n", ",", "sha256=", "md5=a", f"{INFO}/RECORD,,\n", f"{INFO}/METADATA,", '"', "a", "\n",
    "..", "=",
)  # fmt: skip
DOCKER_WORDS = (
    "FROM python:3.11\n", "FROM $BASE AS a\n", "RUN ", "COPY --from=", "COPY --from=0 /a /b\n", "ENV a=b ", "ARG BASE=x\n", "<<EOF\n", "EOF\n",
    "ONBUILD ", "# escape=`\n", "# syntax=docker/dockerfile:1\n", "$model_name", "${model_folder}", "${modle_name}", "$$", "\\\n", "--mount=type=bind,from=a ",
    'CMD ["a"]\n', "a", "`\n", "LABEL a=",
)  # fmt: skip
JINJA_WORDS = (
    "{{ ", " }}", "{% for a in b %}", "{% endfor %}", "{# ", " #}", "model_name", "'a' * 9", "range(9)", "|join", ".__class__", "{% if x %}",
    "{% endif %}", "[", "(", "a", "**9", "'\\ud800'", "{% raw %}", "{{ model_name }}\n", "FROM x\n", "{{ 9 ** 9 }}", "{{ '\\ud800' }}",
)  # fmt: skip


@_profile
@given(contents(*REQUIREMENT_WORDS))
def fuzz_requirements(drawn):
    read_model("requirements.txt", content_of(drawn))


@_profile
@given(contents(*YAML_WORDS))
def fuzz_conda(drawn):
    read_model("conda.yaml", content_of(drawn))


@_profile
@given(contents(*YAML_WORDS))
def fuzz_mlmodel(drawn):
    read_model("MLmodel", content_of(drawn))


@_profile
@given(contents(*YAML_WORDS))
def fuzz_python_env(drawn):
    read_model("python_env.yaml", content_of(drawn))


@_profile
@given(
    st.dictionaries(st.sampled_from([*INPUT_TAGS, "publish.t.attempts", "publish.t.state", "T"]), written(*TAG_WORDS))
)
def fuzz_tags(drawn):
    tags = {name: each.text for name, each in drawn.items()}
    version = ModelVersion(name="m", version="1", created_ms=1, tags=tags)
    held(Inputs.of, version)
    held(wanted_platforms, version, (Platform("linux", "amd64"),))
    held(Outcome.of, version, "t")
    held(version.source_id)
    held(version.selected_by, "T")
    for text in tags.values():
        held(Reference.parse, text)


def read_wheel(files=None, unlisted=None):
    folder = Path(tempfile.mkdtemp(prefix=FOLDER))
    path = make(folder, files, unlisted=unlisted)

    def read():
        wheel = open_wheel(path)
        WheelLayer(wheel, python=PYTHON)
        for line in wheel.metadata.requires:
            try:
                Requirement(line)
            except InvalidRequirement:
                continue

    try:
        held(read)
    finally:
        shutil.rmtree(folder)


@_profile
@given(contents(*METADATA_WORDS), st.booleans())
def fuzz_metadata(drawn, begins):
    read_wheel({f"{INFO}/METADATA": (METADATA if begins else b"") + content_of(drawn)})


@_profile
@given(contents(*METADATA_WORDS, "Wheel-Version: 1.0\n", "Root-Is-Purelib: true\n", "Tag: py3-none-any\n"))
def fuzz_wheel_file(drawn):
    read_wheel({f"{INFO}/WHEEL": content_of(drawn)})


@_profile
@given(contents(*ENTRY_WORDS))
def fuzz_entry_points(drawn):
    read_wheel({f"{INFO}/entry_points.txt": content_of(drawn)})


@_profile
@given(contents(*RECORD_WORDS))
def fuzz_record(drawn):
    read_wheel(unlisted={f"{INFO}/RECORD": content_of(drawn)})


VALUES = {
    "model_name": "m",
    "model_version": "7",
    "model_download_folder": ".",
    "model_folder": "model",
    "model_client_folder": "client",
    "entry_point": "",
    "command_line": "",
}
BASES = BaseImages(default="docker.io/library/python:{python_version}-slim")


def rendered(name, content):
    folder = folder_of({f"templates/{name}": content, "model/requirements.txt": b"mlflow==3.1.0\n"})
    try:
        held(lambda: render(folder, VALUES, templates_folder="templates", base_images=BASES))
    finally:
        shutil.rmtree(folder)


@_profile
@given(contents(*DOCKER_WORDS))
def fuzz_templates(drawn):
    rendered("Dockerfile.template", content_of(drawn))


@_profile
@given(contents(*DOCKER_WORDS))
def fuzz_scripts(drawn):
    rendered("create_docker_image.sh.template", content_of(drawn))


@settings(_profile, max_examples=25)
@given(contents(*JINJA_WORDS))
def fuzz_jinja(drawn):
    rendered("Dockerfile.j2", content_of(drawn))


@_profile
@given(written(*DOCKER_WORDS))
def fuzz_dockerfiles(drawn):
    def read():
        parsed = Dockerfile.parse(drawn.text)
        parsed.declared()
        parsed.final_base({})
        parsed.images({})
        list(parsed.mounts())

    held(read)


FORMATS = sorted(name.removeprefix("fuzz_") for name in globals() if name.startswith("fuzz_"))


def fuzzed(name):
    globals()[f"fuzz_{name}"]()


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_input_is_read_or_refused_within_bounds(name):
    outcome = bounded(fuzzed, name, seconds=300)
    assert not outcome.error, outcome.message
    outcome.check(exit_code=0, seconds=300)
