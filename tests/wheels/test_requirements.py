"""A model's requirements, read from what MLflow and people write."""

import hashlib
import string
from contextlib import suppress
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.errors import BuilderError, InvalidVersion
from builder.package_index import Indexes, IndexUrl, built_in_index
from builder.wheels.pip_syntax import Unusable, logical_lines, parse_line
from builder.wheels.requirements import Requirements
from tests.package_index.server import make_wheel

SHA = "a" * 64
PYTHON_ENV = "python: 3.11.7\nbuild_dependencies:\n- pip\n- setuptools\ndependencies:\n- -r requirements.txt\n"
CONDA = """\
channels: [conda-forge]
dependencies:
- python=3.11.7
- pip<=24.0
- pip:
  - mlflow==3.17.2
  - numpy==2.4.6
name: mlflow-env
"""


@pytest.fixture
def model(tmp_path):
    """Write files of a model folder, and return a function that reads its requirements."""

    def read(indexes=None, **files):
        folder = tmp_path / "model"
        for name, content in files.items():
            path = folder / {"requirements": "requirements.txt", "env": "python_env.yaml", "conda": "conda.yaml"}.get(
                name, name
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        folder.mkdir(exist_ok=True)
        return Requirements.read(tmp_path, "model", indexes)

    return read


def lines(requirements):
    return requirements.to_text().splitlines()


def test_the_files_that_mlflow_logs_are_read(model):
    read = model(
        requirements="mlflow==3.17.2\nnumpy==2.4.6\nscikit-learn==1.9.1",
        env=PYTHON_ENV,
        conda=CONDA,
        MLmodel="flavors: {}\nmlflow_version: 3.17.2\n",
    )
    assert (read.python_version, read.mlflow_version) == ("3.11", "3.17.2")
    assert lines(read) == ["mlflow==3.17.2", "numpy==2.4.6", "pip", "scikit-learn==1.9.1", "setuptools"]


def test_conda_alone(model):
    assert lines(model(conda=CONDA)) == ["mlflow==3.17.2", "numpy==2.4.6"]
    assert model(conda=CONDA).python_version == "3.11"


def test_python_env_alone_and_its_file(model):
    read = model(env="python: 3.10.1\ndependencies:\n- -r more.txt\n- pandas<3\n", **{"more.txt": "scipy\n"})
    assert lines(read) == ["pandas<3", "scipy"]


def test_no_file_at_all(model):
    assert lines(model()) == []


def test_one_environment_has_one_text(model):
    one = model(
        requirements='Scikit_Learn >=1, <2\n\n# a comment\nnumpy[B,a]==2 ;python_version>"3.8"  # why\nnumpy[a,b]==2; python_version > "3.8"'
    )
    other = model(requirements='numpy[a,b]==2;python_version>"3.8"\nscikit-learn<2,>=1')
    assert one.to_text() == other.to_text() == 'numpy[a,b]==2; python_version > "3.8"\nscikit-learn<2,>=1\n'
    assert one == other


def test_options_that_are_kept(model):
    read = model(
        requirements=f"--pre\n--require-hashes\n-c bounds.txt\nnumpy==2 \\\n    --hash=sha256:{SHA} \\\n  --hash sha256:{SHA.upper()}\n-r sub/more.txt",
        **{"bounds.txt": "scipy<2", "sub/more.txt": "-r deeper.txt\n", "sub/deeper.txt": "six\n-r more.txt\n"},
    )
    assert lines(read) == ["--pre", "--require-hashes", "--constraint scipy<2", f"numpy==2 --hash=sha256:{SHA}", "six"]
    assert read.prereleases
    assert read.require_hashes


def test_local_wheel_is_named_by_content(model):
    name, content = make_wheel("in-house", "1.0")
    files = {f"wheels/{name}": content}
    one = model(requirements=f"./wheels/{name} ; python_version >= '3'\n", **files)
    digest = hashlib.sha256(content).hexdigest()
    assert lines(one) == [f'in-house @ {name}#sha256={digest} ; python_version >= "3"']
    assert [(wheel.path, wheel.size) for wheel in one.local] == [(f"wheels/{name}", len(content))]
    files[f"wheels/{name}"] = make_wheel("in-house", "1.0", padding=b"x")[1]
    assert model(requirements=f"wheels/{name}", **files).to_text() != one.to_text()


def test_addresses_a_publisher_allows(model):
    text = f"--extra-index-url https://Wheels.example.com/cpu/\nx @ https://files.example.com/a/x-1-py3-none-any.whl#sha256={SHA}\n"
    allowed = Indexes(allowed=("https://wheels.example.com/cpu", "https://files.example.com"))
    read = model(allowed, requirements=text)
    assert lines(read) == [
        "--extra-index-url https://wheels.example.com/cpu",
        f"x @ https://files.example.com/a/x-1-py3-none-any.whl --hash=sha256:{SHA}",
    ]
    assert model(Indexes(allowed=("*",)), requirements=text) == read
    for prefix in (
        "https://wheels.example.com/cpu2",
        "https://wheels.example.com.evil.com",
        "http://wheels.example.com/cpu",
        "",
    ):
        with pytest.raises(InvalidVersion, match="ALLOWED_INDEXES"):
            model(Indexes(allowed=(prefix, "https://files.example.com")), requirements=text)


def test_an_index_that_is_configured_may_be_named(model):
    ours = Indexes(extra=(IndexUrl("https://ours.example.com/simple", "me", "secret"),))
    read = model(ours, requirements="--index-url https://ours.example.com/simple/\nx==1")
    assert ours.joined(read.indexes) is ours


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("git+https://example.com/x.git", "a repository is source"),
        ("x @ git+ssh://git@example.com/x.git@v1", "a repository is source"),
        ("-e .", "editable"),
        ("--editable=./src", "editable"),
        ("./src", "not a wheel"),
        (".", "not a wheel"),
        ("../x-1-py3-none-any.whl", "not a wheel|leaves the model folder"),
        ("/etc/x-1-py3-none-any.whl", "leaves the model folder"),
        ("wheels/../../x-1-py3-none-any.whl", "leaves the model folder"),
        ("file:///etc/x-1-py3-none-any.whl", "not a wheel"),
        ("x @ file:///etc/x-1-py3-none-any.whl", "not https"),
        ("./missing-1-py3-none-any.whl", "there is no file"),
        ("x-1.tar.gz", "not a wheel"),
        ("https://example.com/x-1.tar.gz", "not a wheel"),
        ("x @ https://example.com/x-1.zip", "not a wheel"),
        ("x @ https://example.com/y-1-py3-none-any.whl", "another package"),
        ("x @ https://me:secret@example.com/x-1-py3-none-any.whl", "contains a credential"),
        ("x @ http://example.com/x-1-py3-none-any.whl", "address is not https"),
        ("x @ https://example.com/x-1-py3-none-any.whl", "ALLOWED_INDEXES"),
        ("--extra-index-url https://example.com/simple", "ALLOWED_INDEXES"),
        ("--extra-index-url http://169.254.169.254/", "address is not https"),
        ("-i https://me:secret@example.com/simple", "contains a credential"),
        ("--find-links ./wheels", "name each wheel by its path"),
        ("--trusted-host example.com", "cannot trust a host"),
        ("--no-binary :all:", "asks for source"),
        ("--config-settings=a=b x", "does not take it"),
        ("x==1 --config-settings=a=b", "building from source"),
        ("x==1 --hash=md5:abc", "sha256"),
        ("x==1 --hash=sha256:abc", "sha256"),
        ("-r missing.txt", "there is no file"),
        ("-r ../other.txt", "not in the model folder"),
        ("-r /etc/passwd", "not in the model folder"),
        ("-r https://example.com/r.txt", "not in the model folder"),
        ("-c", "lacks its value"),
        ("--frobnicate", "not supported"),
        ("x==${SECRET_TOKEN}", "publisher's environment"),
        ("x==1 'oops", "not a valid requirement"),
        ("x-", "not a valid requirement"),
        ("x; os_name", "not a valid requirement"),
        ("x; " + "(" * 2000, "more than 20 brackets"),
        ("x" * 5000, "longer than"),
        ("x>=1,,<2 \x00", "not a valid requirement"),
        ("x==1 --hash='sha256", "unclosed quote"),
    ],
)
def test_unsupported_requirements_are_refused_with_a_reason(model, text, why):
    with pytest.raises(InvalidVersion, match=why) as caught:
        model(requirements=f"numpy\n{text}\n")
    assert "line 2" in str(caught.value)
    assert "Dockerfile.template" in caught.value.remedy
    assert "secret@" not in caught.value.one_line()


NEW_NAME = built_in_index().url
OLD_NAME = NEW_NAME.replace("pypi.", "pypi.python.")
PYPI = [OLD_NAME, f"{OLD_NAME}/", NEW_NAME]


@pytest.mark.parametrize("option", ["--extra-index-url", "--index-url", "-i", "--find-links", "-f"])
@pytest.mark.parametrize("address", PYPI)
@pytest.mark.parametrize("default", ["", "https://mirror.example.com/simple"])
def test_pypi_is_asked_anyway_by_whichever_name(model, option, address, default):
    indexes = Indexes(default=IndexUrl(default) if default else None)
    read = model(indexes, requirements=f"{option} {address}\nnumpy==1.26.4\n")
    assert lines(read) == ["numpy==1.26.4"]


@pytest.mark.parametrize("address", [OLD_NAME.replace(".org", ".org.example.com"), OLD_NAME.replace("simple", "other")])
def test_what_only_looks_like_pypi_is_refused(model, address):
    with pytest.raises(InvalidVersion, match="ALLOWED_INDEXES"):
        model(requirements=f"--extra-index-url {address}\nnumpy==1.26.4\n")


@pytest.mark.parametrize("path", ["croot/numpy_1672336185480/work", "tmp/build/80754af9/scipy_1597686635649/work"])
def test_a_build_path_left_by_conda_is_refused_with_a_remedy(model, path):
    with pytest.raises(InvalidVersion, match=r"write numpy==<version> instead"):
        model(requirements=f"numpy @ file:///{path}\n")


@pytest.mark.parametrize("line", ["-r requirements.txt", "--requirement=./requirements.txt", "-rrequirements.txt"])
def test_conda_s_list_counts_where_python_env_names_a_file_that_is_not_there(model, line):
    read = model(env=f"python: 3.11.7\ndependencies:\n- {line}\n", conda=CONDA)
    assert lines(read) == ["mlflow==3.17.2", "numpy==2.4.6"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le"])
def test_utf_16_with_its_mark_is_read(model, encoding):
    mark = {"utf-16": b"", "utf-16-be": b"\xfe\xff", "utf-16-le": b"\xff\xfe"}[encoding]
    assert lines(model(requirements=mark + "numpy==2.4.6\r\n".encode(encoding))) == ["numpy==2.4.6"]


def test_a_client_s_file_is_named_by_its_own_path(tmp_path, model):
    model(requirements="numpy\n")
    (tmp_path / "client").mkdir()
    (tmp_path / "client/requirements.txt").write_bytes(b"\xffnumpy")
    with pytest.raises(InvalidVersion, match=r"client/requirements\.txt is not UTF-8"):
        Requirements.read(tmp_path, "model", client_folder="client")


@pytest.mark.parametrize(
    ("files", "python"),
    [
        ({"env": "python: 3.9.1", "conda": "dependencies: [python=3.10]"}, "3.9"),
        ({"conda": "dependencies: [python=3.8.5]"}, "3.8"),
        ({"conda": "dependencies: [pip]"}, "3.7"),
        ({}, "3.7"),
    ],
)
def test_python_is_that_of_the_file_that_mlflow_would_take(model, files, python):
    mlmodel = "flavors:\n  python_function:\n    python_version: 3.7.6\n"
    assert model(requirements="numpy\n", MLmodel=mlmodel, **files).python_version == python


@pytest.mark.parametrize(
    ("told", "logged"),
    [
        ("'2022-05-01 12:34:56.789'", datetime(2022, 5, 1, 12, 34, 56, 789000, tzinfo=UTC)),
        ("2022-05-01 12:34:56", datetime(2022, 5, 1, 12, 34, 56, tzinfo=UTC)),
        ("'2022-05-01T12:34:56+02:00'", datetime(2022, 5, 1, 10, 34, 56, tzinfo=UTC)),
        ("0001-01-01 00:00:00", None),
        ("'0001-01-01T00:00:00+23:59'", None),
        ("9999-99-99 00:00:00", None),
        ("yesterday", None),
        ("[2022]", None),
    ],
)
def test_when_a_model_was_logged(model, told, logged):
    assert model(requirements="numpy\n", MLmodel=f"flavors: {{}}\nutc_time_created: {told}\n").logged == logged


def test_a_revision_is_shown_as_it_is(model):
    with pytest.raises(InvalidVersion, match=r"-e git\+https://github\.com/o/r\.git@rev'"):
        model(requirements="-e git+https://github.com/o/r.git@rev\n")


def test_everything_wrong_is_said_at_once(model):
    with pytest.raises(InvalidVersion) as caught:
        model(requirements="-e .\nfine\ngit+https://x.example.com/y\n" + "bad--\n" * 20)
    said = str(caught.value)
    assert "line 1" in said
    assert "line 3" in said
    assert "and 12 more" in said


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (
            {"conda": 'dependencies: ["cudatoolkit[build=x]", gcc @ file:///x, {other: [x]}]'},
            "cudatoolkit, gcc, a value of the type dict",
        ),
        ({"conda": "dependencies:\n- [1, 2]\n", "requirements": "x"}, "conda.yaml requires"),
        ({"conda": "dependencies: [\n"}, "not YAML"),
        ({"conda": "dependencies:\n- pip:\n  - {a: b}\n"}, "not one line of text"),
        ({"conda": "dependencies:\n- pip: yes\n"}, "`pip` in conda.yaml is not a list"),
        ({"conda": "a: &a [*a]\ndependencies: [" + "[" * 3000}, "not YAML"),
        ({"env": 'dependencies: ["a\\nb"]\n'}, "not one line of text"),
        ({"requirements": b"\xff\xfe\x00"}, "not UTF-8"),
        ({"requirements": b"x" * (1 << 20) + b"yz"}, "larger than"),
        (
            {"requirements": "".join(f"-r {n}.txt\n" for n in range(30)), **{f"{n}.txt": "x" for n in range(30)}},
            "include each other",
        ),
    ],
)
def test_files_that_cannot_be_read(model, files, why):
    with pytest.raises(InvalidVersion, match=why):
        model(**files)


def test_a_link_is_not_followed(model, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "outside").write_text("secret==1")
    (tmp_path / "model/requirements.txt").symlink_to(tmp_path / "outside")
    with pytest.raises(InvalidVersion, match="links are not followed"):
        model()


def test_byte_order_mark_and_windows_line_ends(model):
    assert lines(model(requirements=b"\xef\xbb\xbfnumpy==2\r\nscipy\r\n")) == ["numpy==2", "scipy"]


@given(st.text(alphabet=string.printable, max_size=200))
def test_any_text_is_read_or_refused(text):
    try:
        read = Requirements.of(*text.splitlines(), python_version="3.11")
    except BuilderError:
        return
    again = Requirements.of(*read.to_text().splitlines(), python_version="3.11")
    assert again.to_text() == read.to_text()


@given(
    st.lists(
        st.sampled_from(
            ["a==1", "-r", "--hash", " ", "\\\n", "#", ";", "'", "@", "https://", ".whl", "-", "[", "]", "$", "{A}"]
        ),
        max_size=12,
    )
)
def test_any_requirements_line_is_parsed_or_refused(pieces):
    for number, line in logical_lines("".join(pieces)):
        with suppress(Unusable):
            list(parse_line(number, line))
