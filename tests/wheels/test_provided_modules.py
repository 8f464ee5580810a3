"""Modules that an environment has: what counts as Python's own, and what a wheel's list of files makes importable."""

import pytest

from builder.errors import InvalidVersion
from builder.reference import Platform
from builder.wheels.imports import _top, check_provided
from builder.wheels.lock import Lock

EMPTY = Lock(platform=Platform.parse("linux/amd64"), python="3.8")


@pytest.mark.parametrize(
    "module",
    # Of this Python, of older ones, of Python 2, of another system, of an extension or a program, and the model's own.
    [
        *("json.decoder", "distutils.version", "copy_reg", "__builtin__", "nt", "__main__", "_cython_3_0"),
        *("__torch__.x", "helper", "lib.helper", "fast"),
    ],
)
def test_modules_of_python_and_of_the_model_need_no_package(module):
    own = ["m/code/helper.py", "m/code/deep/lib/other.txt", "m/code/fast.cpython-38-x86_64-linux-gnu.so"]
    check_provided({module: "m/python_model.pkl"}, own, EMPTY, None)


def test_a_module_that_nothing_provides_is_refused():
    with pytest.raises(InvalidVersion, match=r"m/x\.pkl names the module 'helpers\.a'"):
        check_provided({"helpers.a": "m/x.pkl", "json": "m/x.pkl"}, ["m/code/helper.py"], EMPTY, None)


@pytest.mark.parametrize(
    ("code", "path", "there"),
    [
        ("m/code", "m/code/loader.py", True),
        ("m/code", "m/code/deep/loader/__init__.py", True),
        ("m", "m/loader.py", True),  # `code: .`
        (None, "m/loader.py", True),
        ("", "loader/load.py", True),  # the working directory is where the model's folder stands
        ("", "m/loader.py", False),
        ("", "m/code/loader.py", False),
        ("m/code", "m/loader.py", False),
        ("m/code", "m/code2/loader.py", False),
    ],
)
def test_mlflow_finds_a_loader_in_the_folder_that_mlmodel_calls_code(code, path, there):
    own = ["m/MLmodel", path]
    # What anything else names may be on a path that the loader makes.
    check_provided({"loader": "m/x.pkl"}, own, EMPTY, None, code=code)
    if there:
        check_provided({"loader": "m/MLmodel"}, own, EMPTY, None, code=code)
        return
    with pytest.raises(InvalidVersion, match=r"m/MLmodel names the module 'loader'.*`code`"):
        check_provided({"loader": "m/MLmodel"}, own, EMPTY, None, code=code)


@pytest.mark.parametrize("archive", ["deps.zip", "deep/inner-1.0-py3.11.egg", "inner-1.0-py3-none-any.whl"])
def test_code_that_brings_an_archive_may_have_anything(archive):
    check_provided({"inner.y": "m/x.pkl"}, ["m/code/boot.py", f"m/code/{archive}"], EMPTY, None)
    # One that is no code is on no path.
    with pytest.raises(InvalidVersion):
        check_provided({"inner.y": "m/x.pkl"}, ["m/code/boot.py", f"m/data/{archive}"], EMPTY, None)


@pytest.mark.parametrize(
    ("name", "top"),
    [
        ("pkg/sub/module.py", "pkg"),
        ("six.py", "six"),
        ("_cffi_backend.cpython-311-x86_64-linux-gnu.so", "_cffi_backend"),
        ("pkg-1.0.dist-info/METADATA", ""),
        ("pkg-1.0.data/purelib/other/__init__.py", "other"),
        ("pkg-1.0.data/platlib/one.py", "one"),
        ("pkg-1.0.data/scripts/tool.py", ""),
        ("pkg-1.0.data/data/share/x", ""),
        ("pkg-1.0.data/data/lib/python3.11/site-packages/x.pth", "*"),
        ("pkg-1.0.data/purelib/x.pth", "*"),
        ("easy.pth", "*"),
        ("distutils-precedence.pth", ""),
        ("google_cloud-1.0-py3.8-nspkg.pth", ""),
    ],
)
def test_what_a_file_of_a_wheel_can_be_imported_by(name, top):
    assert _top(name) == top
