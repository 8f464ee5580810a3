"""What a Dockerfile declares and needs."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.dockerfile.parser import Dockerfile, expand
from builder.errors import InvalidVersion


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("ARG a", {"a"}),
        ("ARG a=1 b c='x y'", {"a", "b", "c"}),
        ("env a=1 b=2", {"a", "b"}),
        ("ENV a 1 b=2", {"a"}),
        ('ENV a="x y=z" b=c\\ d=e f=g', {"a", "b", "f"}),
        ("ENV a=1 \\\n  b=2 \\\n\n # c=3 \\\n  d=4\nARG e", {"a", "b", "d", "e"}),
        ("ENV a=1 \\\r\n  b=2\r\nRUN x\r\n", {"a", "b"}),
        ("# escape=`\nENV a=1 `\n  b=2\nENV c=x\\\nENV d=1", {"a", "b", "c", "d"}),
        ("# ENV a=1\nRUN ENV b=2\nLABEL c=1", set()),
        ("RUN cat <<EOF > f\nENV a=1\nEOF\nENV b=1", {"b"}),
        ("RUN cat <<-'EOF' && x <<E2\nENV a=1\n\tEOF\nENV c=1\nE2\nENV b=1", {"b"}),
        ("RUN cat <<NEVER\nENV a=1", {"a"}),
        ("RUN echo $((1<<a)) <<< b\nENV c=1\na\nb", {"c"}),
        ("ONBUILD ENV a=1", {"a"}),
        ("\ufeffENV a=1", {"a"}),
        ("ENV a= b=''", {"a", "b"}),
        ("ENV", set()),
        ("ARG 1x=2 =3", set()),
        ("ENV A=1", {"A"}),
        ("   ENV\ta=1", {"a"}),
    ],
)
def test_declared_names(text, names):
    assert Dockerfile.parse(text).declared() == names


@pytest.mark.parametrize(
    ("text", "base", "images"),
    [
        ("FROM python:3.11", "python:3.11", ["python:3.11"]),
        ("# c\n\nfrom python:3.11 as x\n", "python:3.11", ["python:3.11"]),
        ("FROM --platform=linux/amd64 a/b", "a/b", ["a/b"]),
        ("FROM a AS One\nFROM b\nCOPY --from=ONE /x /x", "b", ["a", "b"]),
        ("FROM a AS one\nFROM one", "a", ["a"]),
        ("FROM a AS one\nFROM one AS two\nFROM two", "a", ["a"]),
        # A stage cannot stand on itself: the second `a` names the first, and that names an image.
        ("FROM a AS a\nFROM a AS a\nFROM a", "a", ["a"]),
        ("ARG v=3.11\nFROM python:$v", "python:3.11", ["python:3.11"]),
        ("ARG v\nFROM python:${v}", None, []),
        ("ARG v\nFROM python:${v:-3.9}", "python:3.9", ["python:3.9"]),
        ("ARG r=x.io\nARG b=${r}/b:1\nFROM ${b}", "x.io/b:1", ["x.io/b:1"]),
        ("FROM a\nARG v=1\nFROM b:$v", None, ["a"]),
        ("FROM scratch", None, []),
        ("FROM a AS x\nFROM scratch\nCOPY --from=x / /\nCOPY --chown=1 --from=c/d:1 / /\nCOPY --from=0 / /", None, ["a", "c/d:1"]),
        ("FROM a\nRUN --mount=type=bind,from=tools:1,target=/t ls", "a", ["a", "tools:1"]),
        ("FROM a \\\n  AS x\nFROM x", "a", ["a"]),
        ('FROM "a:1"', "a:1", ["a:1"]),
        ("FROM a\r\nRUN b\r\n", "a", ["a"]),
        ("FROM", None, []),
        ("FROM img-$TARGETARCH", None, []),
    ],
)  # fmt: skip
def test_base_images_are_found_in_every_from(text, base, images):
    parsed = Dockerfile.parse(text)
    assert parsed.final_base() == base
    assert list(parsed.images()) == images


def test_build_arguments_win_over_defaults_and_need_an_arg():
    parsed = Dockerfile.parse("ARG v=1\nFROM a:$v")
    assert parsed.final_base({"v": "2", "w": "3"}) == "a:2"
    assert Dockerfile.parse("FROM a:$w").final_base({"w": "3"}) is None
    assert Dockerfile.parse("FROM a-$TARGETARCH").final_base({"TARGETARCH": "arm64"}) == "a-arm64"


@pytest.mark.parametrize("text", ["", "RUN x", "# FROM a", "COPY <<FROM /x\nFROM a\nFROM\n"])
def test_a_dockerfile_without_from_is_refused(text):
    with pytest.raises(InvalidVersion, match="no FROM"):
        Dockerfile.parse(text).final_base()


def test_lines_of_instructions_are_counted_from_one():
    text = "FROM a\n\n# c\nRUN x \\\n  # d\n  y\nCOPY <<E /z\nb\nE\nCMD z\n"
    assert [(i.keyword, i.first, i.last) for i in Dockerfile.parse(text).instructions] == [
        ("FROM", 1, 1),
        ("RUN", 4, 6),
        ("COPY", 7, 9),
        ("CMD", 10, 10),
    ]


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("$a-${a}", "1-1"),
        ("${a:-x}${b:-y}${b-z}${e-w}${e:-v}", "1yzv"),
        ("${a:+x}${b:+y}${e+z}", "xz"),
        (r"\$a", "$a"),
        ("$b", None),
        ("${b}", None),
        ("a$", "a$"),
    ],
)
def test_expand(text, expanded):
    assert expand(text, {"a": "1", "e": ""}) == expanded


@pytest.mark.parametrize(
    "line", ["RUN a <<X", "ENV a=b \\", "FROM a AS b", "RUN --mount=,", "COPY --a --a --a", "ENV 'a \"b", "#", "\\"]
)
@pytest.mark.parametrize("between", ["\n", " "])
def test_a_hostile_dockerfile_is_read_in_linear_time(line, between):
    text = between.join([line] * (400_000 // len(line)))
    began = time.process_time()
    parsed = Dockerfile.parse(text)
    parsed.declared()
    for instruction in parsed.instructions:
        instruction.flags()
    assert time.process_time() - began < 10


@given(st.text(alphabet=st.sampled_from(list("FROM ENV=RUN<EO\\\n\r\t\"'$#`a-{}")), max_size=80))
def test_any_text_is_read(text):
    parsed = Dockerfile.parse(text)
    parsed.declared()
    lines = text.count("\n") + 1
    assert all(1 <= i.first <= i.last <= lines for i in parsed.instructions)
