"""Wheels that an author made: what a reader of their text files, paths and sources may cost."""

from contextlib import suppress
from pathlib import Path

import pytest
from pydantic import ValidationError

from builder.package_index.client import NoPage, parse_page
from builder.package_index.wheel_file import LockedWheel
from builder.wheels.install import Budget, WheelLayer
from builder.wheels.wheel import open_wheel
from tests.hostile.bounded import MIB, bounded
from tests.wheels.made import INFO, METADATA, PYTHON, SITE, WHEEL, built, compiler, digest, make


def read(path):
    WheelLayer(open_wheel(Path(path)), python=PYTHON)


def scripts(text):
    return {"files": {f"{INFO}/entry_points.txt": text.encode()}}


def metadata(*lines, body=""):
    return {"files": {f"{INFO}/METADATA": METADATA + "".join(f"{line}\n" for line in lines).encode() + body.encode()}}


def wheel_file(*lines):
    return {"files": {f"{INFO}/WHEEL": WHEEL + "".join(f"{line}\n" for line in lines).encode()}}


def record(text):
    return {"unlisted": {f"{INFO}/RECORD": text.encode()}}


NESTED = "[console_scripts]\n" + "".join(
    f"x{n} = {f'%(x{n + 1})s' * 10 if n < 9 else 'demo:main'}\n" for n in range(10)
)
RECORD = (
    f"{INFO}/RECORD,,\n{INFO}/METADATA,{digest(METADATA)},{len(METADATA)}\n{INFO}/WHEEL,{digest(WHEEL)},{len(WHEEL)}\n"
)

REFUSED = {
    "40,000 blanks in an entry point": (scripts(f"[console_scripts]\na{' ' * 40_000}b = demo:main"), "module:function"),
    "blanks in many entry points": (scripts(f"[console_scripts]\na{' ' * 4000}!\n" * 250), "module:function"),
    "ten levels of interpolation": (scripts(NESTED), "module:function"),
    "entry points without end": (
        scripts("[console_scripts]\n" + "".join(f"a{n}=b:c\n" for n in range(90_000))),
        "more than 10,000",
    ),
    "blanks in an entry point's target": (
        scripts(f"[console_scripts]\na = demo{' ' * 900_000}:main"),
        "module:function",
    ),
    "dots in an entry point's target": (scripts(f"[console_scripts]\na = {'a.' * 400_000}b:c"), "module:function"),
    "entry points of 2 MiB": (scripts("#" * (2 * MIB)), "2,097,152 bytes"),
    "METADATA of 31 MiB": (metadata(body="\n" * (31 * MIB)), "bytes; 8,388,608 are the most"),
    "headers without end": (metadata(*["Classifier:"] * 100_000), "headers of METADATA"),
    "a header without end": (metadata("Description: " + "x" * 4_000_000), "headers of METADATA"),
    "a folded header": (metadata("Description: x", *[" x"] * 500_000), "headers of METADATA"),
    "headers in lines of other ends": (metadata("A: b\r" * 500_000), "headers of METADATA"),
    "requirements without end": (metadata(*["Requires-Dist: a"] * 15_000), "15,000 requirements"),
    "a long requirement": (metadata("Requires-Dist: a" + " " * 50_000), "too long"),
    "a requirement of 5,000 digits": (metadata("Requires-Dist: a==" + "9" * 5000), "too long"),
    "a requirement of many parentheses": (
        metadata(f"Requires-Dist: a; {'(' * 1000}os_name == 'x'{')' * 1000}"),
        "too deep",
    ),
    "a version of 5,000 digits": (
        {"files": {f"{INFO}/METADATA": f"Metadata-Version: 2.1\nName: demo\nVersion: {'9' * 5000}\n".encode()}},
        "its Version has 5,000 characters",
    ),
    "a long name": (
        {"files": {f"{INFO}/METADATA": f"Name: {'-' * 1_000_000}\nVersion: 1.0\n".encode()}},
        "its Name has 1,000,000 characters",
    ),
    "a format of 5,000 digits": (
        {"files": {f"{INFO}/WHEEL": f"Wheel-Version: {'9' * 5000}\n".encode()}},
        "its Wheel-Version has",
    ),
    "tags without end": (wheel_file(*["Tag: py3-none-any"] * 10_000), "bytes; 65,536 are the most"),
    "a RECORD of 17 MiB": (record(RECORD + "\n" * (17 * MIB)), "bytes; 16,777,216 are the most"),
    "a RECORD of empty rows": (record(RECORD + "\n" * (16 * MIB - 1000)), "more than 200,000 rows"),
    "a RECORD in lines of other ends": (record(RECORD + "\u2028" * (5 * MIB)), "more than 200,000 rows"),
    "a RECORD of commas": (record(RECORD + "," * (16 * MIB - 1000)), "RECORD cannot be read"),
    "a RECORD that is one field": (record(RECORD + '"' + "a" * 4_000_000), "RECORD cannot be read"),
    "a size of 5,000 digits": (record(f"{RECORD}x,sha256=a,{'9' * 5000}\n"), "RECORD cannot be read"),
    "directories without end": (
        {"files": {f"{'/'.join([f'{n:x}'] * 50)}/x": b"" for n in range(2500)}},
        "more than 100,000 directories",
    ),
    "a file in the place of bin": ({"files": {"demo-1.0.data/data/bin": b""}}, "demo-1.0.data/data/bin' would replace"),
    "a file in the place of lib": ({"files": {"demo-1.0.data/data/lib": b""}}, "demo-1.0.data/data/lib' would replace"),
    "a file in the place of lib64": (
        {"files": {"demo-1.0.data/data/lib64": b""}},
        "demo-1.0.data/data/lib64' would replace",
    ),
    "a file in the place of include": (
        {"files": {"demo-1.0.data/data/include": b""}},
        "demo-1.0.data/data/include' would replace",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_costs_little(case, tmp_path):
    how, says = REFUSED[case]
    outcome = bounded(read, str(make(tmp_path, **how)))
    outcome.check(says=says)
    assert "The wheel demo-1.0-py3-none-any.whl cannot be used" in outcome.message
    assert len(outcome.message) < 1000


def rows(count):
    return "".join(f"demo/{n},sha256={'a' * 43},{n}\n" for n in range(count))


HARMLESS = {
    "a description of 8 MB": metadata(body="\n" + "long " * 1_600_000),
    "a description of blank lines": metadata(body="\n" * (8 * MIB - 1000)),
    "a description in the form of headers": metadata(body="\n" + "Requires-Dist: evil @ http://x\n" * 200_000),
    "as many headers as there may be": metadata(*["Classifier: " + "x" * 80] * 19_000),
    "as many requirements as there may be": metadata(*[f"Requires-Dist: a{n}; extra == 'all'" for n in range(5000)]),
    "extras": metadata(*[f"Provides-Extra: a{n}" for n in range(19_000)]),
    "a multipart message": metadata(
        "Content-Type: multipart/mixed; boundary=x" + ";" * 50_000, body="\n" + "--x\n" * 9999
    ),
    "as many scripts as there may be": scripts("[console_scripts]\n" + "".join(f"a{n}=b:c\n" for n in range(10_000))),
    "entry points of others": scripts("[other]\n%(x)s\nno equals sign\n" + "a" + " " * 900_000),
    "many sections": scripts("[a]\n" * 250_000),
    "as many rows as there may be": record(RECORD + rows(199_000)),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_is_not_refused_costs_little(case, tmp_path):
    # The largest RECORD that there is has 17,000 rows; one of 199,000 takes about a second.
    outcome = bounded(read, str(make(tmp_path, **HARMLESS[case])))
    outcome.check(exit_code=0, seconds=4.0 if "rows" in case else 1.0)


def test_a_long_file_name(tmp_path):
    outcome = bounded(read_as, str(make(tmp_path)), "demo-1.0-" + ".".join("abcdefgh" * 200) + "-none-any.whl")
    outcome.check(says="more than 255 characters")


def read_as(path, filename):
    open_wheel(Path(path), filename=filename)


def test_what_stands_below_the_headers_is_no_requirement(tmp_path):
    ends = ("\n\n", "\r\n\r\n", "\r\r", "\n\r\n")
    for number, end in enumerate(ends):
        text = f"Name: demo\nVersion: 1.0\nRequires-Dist: good\nA: b{end}Requires-Dist: evil\n"
        path = make(tmp_path / str(number), {f"{INFO}/METADATA": text.encode()})
        assert open_wheel(path).metadata.requires == ("good",)


def slow(count):
    """A source that is small in a wheel, and costs about a microsecond for each of its values."""
    return b"f'" + b"{a}" * count + b"'\n"


def compiled(path, seconds, shared):
    limits = {"seconds": seconds, "budget": Budget(shared)}
    built(Path(path), bytecode=compiler(**limits))


def refused(path, seconds, shared, says):
    outcome = bounded(compiled, str(path), seconds, shared)
    outcome.check(says=says)
    return outcome.message


SLOW = 100_000


def test_a_source_has_a_bound_of_its_own_and_is_named(tmp_path):
    path = make(tmp_path, {"demo/a.py": b"x = 1\n", "demo/b.py": slow(4 * SLOW), "demo/c.py": b"x = 1\n"})
    refused(path, 1, 600, "demo/b.py takes too much time to compile")


def test_many_slow_sources_are_bounded_together(tmp_path):
    """Each of them is within its own bound."""
    path = make(tmp_path, {f"demo/m{number}.py": slow(SLOW // 5) for number in range(60)})
    message = refused(path, 1, 600, "Its sources take more than")
    assert "demo-1.0-py3-none-any.whl" in message
    assert "demo/m" in message


def test_many_slow_wheels_are_bounded_together(tmp_path):
    """Each of them is within its own bound."""
    path = make(tmp_path, {f"demo/m{number}.py": slow(SLOW // 5) for number in range(5)})
    refused(path, 60, 0.001, "The sources of the version's wheels take more than")


def test_bytecode_that_grows_without_end_is_left_away(tmp_path):
    source = b"x = (" + b"".join(b'"%d" * %d, ' % (number % 10, 3000 + number) for number in range(1000)) + b")\n"
    layer, data = built(make(tmp_path, {"demo/a.py": source, "demo/b.py": b"x = 1\n"}), bytecode=compiler())
    assert layer.without_bytecode == (f"/{SITE}/demo/a.py",)
    assert len(data) < 100_000


TAGS = ".".join(f"a{number}" for number in range(2000))
NAMES = [
    f"demo-{'9' * 5000}-py3-none-any.whl",
    f"demo-1.0-{'9' * 5000}-py3-none-any.whl",
    f"demo-1.0-{TAGS}-{TAGS}-{TAGS}.whl",
    f"demo-{'9' * 5000}.tar.gz",
    f"{'-' * 100_000}.whl",
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_file_names_of_an_index(name):
    bounded(listed, name).check(exit_code=0)


def listed(name):
    (file,) = parse_page(
        f'{{"files": [{{"url": "x", "filename": "{name}"}}]}}'.encode(), "application/json", "http://x/"
    )
    assert file.release is None
    with pytest.raises(ValidationError):
        LockedWheel(name="demo", version="1.0", filename=name, sha256="a" * 64)


PAGES = [
    b"[" * 100_000,
    b'{"files": ' + b"[" * 100_000,
    b'{"files": [{"size": ' + b"9" * 5000 + b"}]}",
    b'{"files": [{"url": "http://x:' + b"9" * 5000 + b'/"}]}',
    b'{"files": [{"url": 5, "filename": {}}]}',
    b'{"files": NaN}',
    b"\xff",
]


@pytest.mark.parametrize("content", PAGES, ids=range(len(PAGES)))
def test_pages_of_an_index(content):
    bounded(page, content).check(exit_code=0)


def page(content):
    with suppress(NoPage):
        parse_page(content, "application/json", "http://x/")
    parse_page(content, "text/html", "http://x/")
