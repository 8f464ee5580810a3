"""Templates and Dockerfiles of an author's: read in bounded time, memory and output, and never a defect of ours."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builder.dockerfile.buildah import Buildah, registries_conf
from builder.dockerfile.engine import BoundedOutput, BuildJob
from builder.dockerfile.kaniko import KanikoOutput
from builder.dockerfile.parser import Dockerfile
from builder.dockerfile.template import LARGEST_RENDERED, LARGEST_TEMPLATE, VARIABLES, BaseImages, render
from builder.errors import BuilderError, BuildFailed, ExitCode, InvalidVersion
from builder.process import run
from builder.reference import Platform
from builder.settings import Network
from tests.hostile.bounded import bounded, quick
from tests.waiting import HANG

VALUES = {
    "model_name": "my-model",
    "model_version": "7",
    "model_download_folder": ".",
    "model_folder": "mymodel",
    "model_client_folder": "client",
    "entry_point": "app.py",
    "command_line": "python -m app --x=1",
}
BASES = BaseImages(default="docker.io/library/python:{python_version}-slim")


@pytest.fixture
def context(tmp_path: Path) -> Path:
    (tmp_path / "templates").mkdir()
    (tmp_path / "mymodel").mkdir()
    return tmp_path


def rendered(context: Path, template: str | bytes, name: str = "Dockerfile.template", **values: str) -> bytes:
    raw = template if isinstance(template, bytes) else template.encode("utf-8", "surrogateescape")
    for path in (context / "templates").iterdir():
        path.unlink()
    (context / "templates" / name).write_bytes(raw)
    return render(context, {**VALUES, **values}, templates_folder="templates", base_images=BASES).dockerfile


# ---- Dockerfiles


def questions(text: str) -> None:
    """Ask everything that is asked of a Dockerfile."""
    dockerfile = Dockerfile.parse(text)
    dockerfile.declared()
    list(dockerfile.mounts())
    for instruction in dockerfile.instructions:
        instruction.flags()
    try:
        dockerfile.final_base()
        dockerfile.images({"TARGETARCH": "amd64"})
    except InvalidVersion as error:
        assert "no FROM" in error.what  # noqa: PT017  # either outcome is right


@pytest.mark.parametrize(
    ("source", "images"),
    [
        ("²", ["a", "²"]),
        ("٣", ["a", "٣"]),
        ("0²", ["a", "0²"]),
        ("1", ["a", "1"]),
        ("9" * 5000, ["a", "9" * 5000]),
        ("0", ["a"]),
        ("000000000", ["a"]),
        ("-1", ["a", "-1"]),
    ],
)
def test_a_stages_number_is_decimal_digits(source, images):
    text = f"FROM a\nFROM a\nCOPY --from={source} / /\nRUN --mount=type=bind,from={source},target=/x ls\n"
    assert list(Dockerfile.parse(text).images()) == images


@pytest.mark.parametrize("source", ["²", "9" * 5000, "\udcff", "a@sha256:b", "[::1", "-rf", "$(id)", "a\\"])
def test_what_copy_names_reaches_the_engines_files_as_a_reference_or_not_at_all(tmp_path, source):
    dockerfile = tmp_path / "Dockerfile"
    text = f"FROM 127.0.0.1:5000/a\nCOPY --from={source} / /\nRUN --mount=from={source} x\n"
    dockerfile.write_text(text, errors="surrogateescape")
    job = BuildJob(
        context=tmp_path,
        dockerfile=dockerfile,
        platform=Platform("linux", "amd64"),
        layout=tmp_path / "layout",
        timeout=1,
        network=Network(),
    )
    assert [line for line in registries_conf(job).splitlines() if line.startswith("location")] == [
        'location = "127.0.0.1:5000"'
    ]


NUMBER = "9" * 5000
ODD = {
    "escape directive": "# escape=`\nFROM a\nRUN b `\n c\n",
    "escape directive of another": "# escape=²\nFROM a\n",
    "syntax directive": "# syntax=evil.io/frontend@sha256:0\nFROM a\n",
    "expose": f"FROM a\nEXPOSE {NUMBER}/tcp ²\n",
    "user": f"FROM a\nUSER {NUMBER}:²\n",
    "healthcheck": f"FROM a\nHEALTHCHECK --interval={NUMBER}s --retries=² CMD x\n",
    "arg": f"ARG a={NUMBER}\nFROM a:$a\nENV b=$a\n",
    "heredoc descriptor": f"FROM a\nRUN {NUMBER}<<A\nA\n",
    "no keyword": "²²\n\x00\n",
    "keyword alone": "FROM a\nCOPY\nRUN\nARG\nENV\nONBUILD\nONBUILD ONBUILD\n",
}


@pytest.mark.parametrize("name", ODD)
def test_what_a_dockerfile_says_is_the_engines_to_refuse(context, name):
    assert rendered(context, ODD[name]) == ODD[name].encode()
    questions(ODD[name])


def cost(text: str) -> float:
    began = time.process_time()
    questions(text)
    return time.process_time() - began


LARGE = {
    "stages": "FROM a AS b\n",
    "stages on stages": "FROM b AS b\n",
    "sources": "FROM a AS b\nCOPY --from=c / /\n",
    "mounts": "FROM a\nRUN --mount=,,,,from=a --mount=from=b x\n",
    "here-documents": "FROM a\nRUN <<A\n",
    "here-documents on one line": "<<A ",
    "continuations": "RUN \\\n",
    "comments in between": "RUN a \\\n# c\n",
    "arguments": "ARG a=$a\n",
    "expansions": "FROM ${a:-${b\n",
    "quotes": "ENV a='\"\n",
    "flags": "--a=b ",
    "digits": "0",
    "blanks": " ",
    "tabs of a here-document": "\tA\n",
}


@pytest.mark.parametrize("name", LARGE)
def test_a_dockerfile_is_read_in_linear_time(name):
    begin = "ARG a=1\nFROM a\nRUN "
    few, many = (begin + LARGE[name] * (size // len(LARGE[name])) for size in (1 << 16, 1 << 20))
    # Sixteen times as much costs sixteen times as much, not 256 times.
    assert cost(many) < 60 * min(cost(few), cost(few)) + 0.3


def test_arguments_that_double_are_not_followed():
    text = "ARG a=0123456789\n" + "ARG a=$a$a\n" * 60 + "FROM $a\n"
    assert Dockerfile.parse(text).final_base() is None


DOCKERFILE = st.lists(
    st.sampled_from(
        ["FROM ", "a", " AS ", "b", "COPY --from=", "²", "0", "ARG ", "=", "$b", "${b:-", "}", "RUN ", "<<E"]
    )
    | st.sampled_from(
        ["\n", "\\\n", "E\n", "# escape=`\n", "`", '"', "'", " ", "\t", "\x00", "--mount=from=", ",", "\r"]
    )
    | st.text(max_size=3),
    max_size=30,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(DOCKERFILE)
def test_any_dockerfile_is_answered(text):
    questions(text)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(DOCKERFILE)
def test_any_plain_template_is_rendered_or_refused(context, text):
    try:
        rendered(context, text + "$model_name ${modle_name}")
    except BuilderError as error:
        assert error.exit_code == ExitCode.DATA  # noqa: PT017  # either outcome is right


# ---- plain templates


def test_what_values_make_of_a_template_has_a_bound(context):
    template = "$command_line\n" * (LARGEST_TEMPLATE // 14)
    with pytest.raises(InvalidVersion, match=f"more than {LARGEST_RENDERED:,} bytes") as caught:
        rendered(context, template, command_line="a" * 5000)
    assert caught.value.exit_code == ExitCode.DATA
    (context / "templates" / "create_docker_image.sh.template").write_text(template)
    with pytest.raises(InvalidVersion, match="more than"):
        render(context, {**VALUES, "command_line": "a" * 5000}, templates_folder="templates", base_images=BASES)


def test_many_problems_and_long_ones_are_told_shortly(context):
    names = "".join(f"LABEL a=${{name{number}}}\n" for number in range(LARGEST_TEMPLATE // 25))
    began = time.process_time()
    with pytest.raises(InvalidVersion, match="; and more") as caught:
        rendered(context, f"FROM a\nLABEL ${{{'b' * 10_000}}}\n{names}")
    assert len(str(caught.value)) < 3000
    assert all(name in caught.value.remedy for name in VARIABLES)
    assert time.process_time() - began < 10


# ---- Jinja2


def jinja(context: Path, template: str) -> str:
    return rendered(context, template, "Dockerfile.j2").decode()


BOUNDED = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a loop without end": "{% for i in range(10**9) %}x{% endfor %}",
    "powers": "{{ 9**(9**9) }}",
    "powers in a row": "{{ 10**10**8 }}",
    "a long word": "{{ 'a' * 10**9 }}",
    "a longer word": "{{ 'a' * 10**11 }}",
    "words of words": "{% set a = 'a' * 10**6 %}{% set b = a.replace('a', a) %}{{ b | length }}",
    "a wide format": "{{ '%1000000000d' | format(1) }}",
    "a wide format by method": "{{ '{:1000000000}'.format(1) }}",
    "centred": "{{ 'a' | center(10**9) }}",
    "an indent": "{{ ('a\n' * 10**6) | indent(10**4) }}",
    "lipsum": "{{ lipsum(10**7) }}",
    "a range as a list": "{{ (range(99999) | list) * 10**5 }}",
    "a number as text": "{{ (10**5000) | string }}",
    "recursion": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "parentheses": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "negations": "{{ " + "not " * 100_000 + "1 }}",
    "blocks": "{% if 1 %}" * 20_000,
    "lists": "{{ " + "[" * 100_000,
    "much output": "{% for i in range(9**5) %}{{ 'a' * 999 }}{% endfor %}",
    "output of one expression": "{{ 'a' * 2_000_000 }}",
    "many expressions": "{{ 1 }}" * 149_000,
    "catastrophic striptags": "{{ ('<' * 10**6) | striptags }}",
    "urlize": "{{ ('a@' * 10**6) | urlize }}",
}
ESCAPES = {
    "classes": "{{ ''.__class__.__mro__ }}",
    "by attr": "{{ '' | attr('__class__') }}",
    "by map": "{{ [''] | map(attribute='__class__') | list }}",
    "by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "by format_map": "{{ '{a.__class__.__mro__}'.format_map({'a': ''}) }}",
    "by a kept method": "{% set f = '{0.__class__}'.format %}{{ f('') }}",
    "by a filter's format": "{{ ['{0.__class__}'] | map('format', '') | list }}{{ ''.__class__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "a function's": "{{ lipsum.__globals__ }}",
    "self": "{{ self.__init__.__globals__ }}",
    "a file": "{% include '/etc/passwd' %}",
    "another template": "{% extends 'x' %}",
    "an import": "{% from '/etc/passwd' import x %}",
    "a change": "{% do server.append(1) %}",
    "a frame": "{{ (range(1) | map('upper')).gi_frame }}",
}


@pytest.mark.parametrize("name", [*BOUNDED, *ESCAPES])
def test_a_jinja_template_is_bounded_and_stays_where_it_is(context, name):
    # In a process of its own, since what its children take is counted together.
    outcome = bounded(_held, str(context), name)
    assert not outcome.error, outcome.message


def _held(context: str, name: str) -> None:
    template = {**BOUNDED, **ESCAPES}[name]
    try:
        text = jinja(Path(context), template)
    except InvalidVersion as error:
        assert "templates/Dockerfile.j2 cannot be rendered" in error.what  # noqa: PT017  # either outcome is right
        assert len(error.what) < 1000  # noqa: PT017
    else:
        assert name in BOUNDED or ("<class" not in text and "object at" not in text)
        assert len(text) <= LARGEST_TEMPLATE
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert used.ru_utime + used.ru_stime < 8
    assert used.ru_maxrss < 512 << 10


@pytest.mark.parametrize(
    "template", [r"{{ '\ud800' }}", r"{% set a = '\udcff' %}{{ a }}", r"RUN {{ '\x00\ud8' ~ '00' }}"]
)
def test_characters_that_no_text_has_are_an_error(context, template):
    try:
        jinja(context, template).encode()
    except InvalidVersion as error:
        str(error).encode()  # what is recorded is text
        assert error.exit_code == ExitCode.DATA  # noqa: PT017


def test_messages_with_such_characters_are_text(context):
    with pytest.raises(InvalidVersion) as caught:
        jinja(context, r"{{ [][{'\ud800': 1}] }}{% if '\ud800' is foo %}{% endif %}")
    str(caught.value).encode()


def test_filters_that_need_more_of_the_library_work_without_opening_a_file(context):
    template = (
        "{{ 'a b c' | wordwrap(3) }}{{ {'a': 1} | pprint }}{{ '<b>x&amp;</b>' | striptags }}{{ [1] | tojson }}"
        "{{ lipsum(1, html=false) | length > 0 }}{{ 'x' | urlize }}{{ [1, 2] | random > 0 }}{{ '\\x41\\u00e9' }}"
    )
    assert "x&" in jinja(context, template)


def test_the_renderer_has_no_credential_and_can_open_no_file(context, monkeypatch):
    # What a way out of the sandbox would find: no environment, and no descriptor but those it began with.
    monkeypatch.setenv("REGISTRY_TOKEN", "s3cret-of-the-registry")
    from builder.dockerfile import sandbox

    original = Path(sandbox.__file__).read_text()
    freed = original.replace(
        'answer["text"] = render_in_process(request["source"], request["variables"])',
        'import os\n        answer["text"] = repr(dict(os.environ)) + probe()',
    ).replace(
        "def _main() -> None:",
        "def probe():\n"
        "    found = ''\n"
        "    for path in ('/proc/self/environ', f'/proc/{__import__(\"os\").getppid()}/environ', '/etc/passwd'):\n"
        "        try:\n"
        "            found += open(path).read()\n"
        "        except OSError as error:\n"
        "            found += str(error)\n"
        "    try:\n"
        "        __import__('socket').socket()\n"
        "    except OSError as error:\n"
        "        found += str(error)\n"
        "    return found\n\n\n"
        "def _main() -> None:",
    )
    program = context / "sandbox.py"
    program.write_text(freed)
    monkeypatch.setattr(sandbox, "__file__", str(program))
    text = sandbox.render_sandboxed("x", {})
    assert "s3cret" not in text
    assert "root:" not in text
    assert text.count("Too many open files") == 4 or os.environ.get("PYTEST_XDIST_WORKER")


# ---- what a build prints


def test_a_build_that_prints_without_end_is_cut(tmp_path):
    shown: list[str] = []
    output = KanikoOutput(BoundedOutput(shown.append, 1000))
    code = run(
        ["sh", "-c", "yes 'a line' | head -n 300000; echo 'the last words'; exit 1"],
        env={"PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        timeout=HANG,
        output=output,
        name="sh",
    )
    assert code == 1
    assert shown[:1000] == ["a line"] * 1000
    assert shown[1000:] == ["The build has printed 1,000 lines; the rest is not shown."]
    # Why it failed is known all the same.
    assert "the last words" in output.failure(code, Platform("linux", "amd64")).what


PIECES = [
    'time="',
    '" level=',
    "info",
    ' msg="',
    "\\",
    '"',
    "a" * 1300,
    " ",
    "COPY ",
    "error building image: ",
    "\x1b[",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
def test_any_line_of_an_engine_is_read_quickly(line):
    began = time.process_time()
    output = KanikoOutput(lambda _line: None)
    output(line[:4000])
    assert output.failure(1, Platform("linux", "amd64")).exit_code in set(ExitCode)
    assert quick(time.process_time() - began, 2)


@pytest.mark.parametrize(
    "left", ["--all", "docker://evil.io/x:1", "sha256:" + "A" * 64, "a" * 63, "", "a" * 64 + "\nx"]
)
def test_what_is_left_as_an_images_id_is_no_argument(tmp_path, left):
    path = tmp_path / "image-id"
    path.write_text(left)
    with pytest.raises(BuildFailed, match="in place of the image's id"):
        Buildah._image_id(path)
    path.write_text(f"sha256:{'a' * 64}\n")
    assert Buildah._image_id(path) == f"sha256:{'a' * 64}"
