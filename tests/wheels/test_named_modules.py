"""Modules that a model's files name: read from opcodes and text, whatever they are, and never run."""

import bz2
import gzip
import importlib.metadata
import io
import json
import lzma
import os
import pickle
import random
import struct
import subprocess
import sys
import xmlrpc.client
import zipfile

import cloudpickle
import joblib
import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from builder.model_folder import BROUGHT, COMES_WITH
from builder.wheels import imports
from builder.wheels.imports import NamedModules, read_named_modules
from builder.wheels.zip import BadArchive, read_directory
from tests.waiting import HANG

MLMODEL = """\
flavors:
  python_function: {loader_module: mlflow.pyfunc.model, python_model: python_model.pkl, data: data}
"""
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


@pytest.fixture
def read(tmp_path):
    """Return the modules that files of a model folder name; `MLmodel` may be another one."""

    def make(files, mlmodel=MLMODEL):
        for name, content in {"MLmodel": mlmodel, **files}.items():
            path = tmp_path / "m" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_named_modules(tmp_path, "m", [f"m/{name}" for name in files])

    make.folder = tmp_path
    return make


def loaded(found):
    """Return what is loaded beside MLflow's loader."""
    return found.loaded.keys() - {"mlflow.pyfunc.model"}


class Model:
    """Pickled by value, like a class of a notebook's."""

    def predict(self, rows):
        from sklearn.preprocessing import scale

        return scale(rows.to_parquet(), xmlrpc.client)


cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.mark.parametrize("protocol", PROTOCOLS[2:])
def test_a_class_by_value_names_what_its_methods_import(read, protocol):
    found = read({"python_model.pkl": cloudpickle.dumps(Model(), protocol)})
    assert found.uses == {
        "scikit-learn": "m/python_model.pkl names sklearn.preprocessing",
        "pyarrow": "m/python_model.pkl names to_parquet",
    }
    # What a method imports is imported when it is called; a module that it has as a global, when the model is loaded.
    assert "xmlrpc" in {name.partition(".")[0] for name in loaded(found)}
    assert not any(name.startswith("sklearn") for name in loaded(found))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_class_by_reference_is_imported(read, protocol):
    # Two of one module, so that its name comes from the memo; arrays between them; and a long string.
    content = pickle.dumps(
        [xmlrpc.client.Binary, xmlrpc.client.Fault, np.zeros(300_000), "x" * 5000, json.JSONDecoder], protocol
    )
    # For Python 2 a module has the name that it had there.
    names = {"json.decoder", "xmlrpc.client" if protocol > 2 else "xmlrpclib"}
    found = loaded(read({"python_model.pkl": content}))
    # The first two protocols look like text, and text like them.
    assert found >= names if protocol >= 2 else not found
    # Of what MLflow does not load itself nobody knows whether it is ever loaded.
    assert not loaded(read({"other.pkl": content}))


def test_a_long_argument_is_passed_over(read, monkeypatch):
    monkeypatch.setattr(imports, "_MOST_ARGUMENT", 100)
    for value in ("x" * 1000, b"x" * 1000, bytearray(1000), np.zeros(1000)):
        content = pickle.dumps([value, xmlrpc.client.Binary], 5)
        found = loaded(read({"python_model.pkl": content}))
        assert ("xmlrpc.client" in found) == (not isinstance(value, str))
    # A string that is as long cannot be read as one: what is behind it is searched, and decides no refusal.
    for string in (b"X", b"T"):
        content = b"\x80\x02(" + string + (1000).to_bytes(4, "little") + b"x" * 1000 + b"csklearn.svm\nSVC\nl."
        assert read({"python_model.pkl": content}) == NamedModules(
            loaded={"mlflow.pyfunc.model": "m/MLmodel"}, uses={"scikit-learn": "m/python_model.pkl names sklearn"}
        )


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_compressed_pickles_are_read(read, pack):
    found = read({"python_model.pkl": pack(cloudpickle.dumps([Model(), xmlrpc.client.Fault]))})
    assert "scikit-learn" in found.uses
    assert "xmlrpc.client" in loaded(found)


@pytest.mark.parametrize("compress", [0, 3, ("gzip", 1), ("bz2", 1), ("xz", 1)])
def test_joblib_writes_arrays_between_opcodes(read, compress):
    content = io.BytesIO()
    # The bytes of the array are opcodes that name a module.
    array = np.frombuffer(pickle.dumps(xmlrpc.client.Fault, 2) * 10, dtype=np.uint8)
    joblib.dump([json.JSONDecoder, array, "sklearn.svm", xmlrpc.client.Binary], content, compress=compress)
    found = read({"python_model.pkl": content.getvalue()})
    assert "scikit-learn" in found.uses
    assert "json.decoder" in loaded(found)
    assert "xmlrpc.client" not in loaded(found)


def test_archives_of_pytorch_and_skops(read):
    def archive(name, content, method):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", method) as file:
            file.writestr("archive/version", "3")
            file.writestr(name, content)
        return packed.getvalue()

    mlmodel = """\
flavors:
  python_function: {loader_module: mlflow.pytorch, data: data}
  pytorch: {model_data: data}
"""
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        content = archive("archive/data.pkl", pickle.dumps(json.JSONDecoder, 2), method)
        assert "json.decoder" in read({"data/model.pth": content}, mlmodel).loaded
        schema = archive("schema.json", '{"__module__": "sklearn.svm._classes"}', method)
        assert "scikit-learn" in read({"model.skops": schema}, mlmodel).uses
        assert read({"data/model.pth": content[:-9]}, mlmodel).loaded.keys() == {"mlflow.pytorch"}


SOURCE = """\
import os, sklearn.svm as svm; import scipy
from matplotlib.pyplot import (plot,
    show)
from mlflow import (pyfunc,
    alembic)
def predict(frame):
    import \\
        docker
    frame.to_sql("x")
    return __import__("flask")
"""


def test_source_is_searched(read):
    found = read({"code/own/model.py": SOURCE, "code/broken.py": b"\xff\xfe from PIL import (", "notes.txt": SOURCE})
    wanted = {"scikit-learn", "scipy", "matplotlib", "alembic", "docker", "flask", "sqlalchemy", "pillow"}
    assert found.uses.keys() == wanted
    assert found.uses["scikit-learn"] == "m/code/own/model.py names sklearn.svm"
    assert read({"code/x.py": '"""Like flask, without docker."""\nscipy = 1\n'}).uses == {}


def test_mlmodel_s_loader_counts(read):
    found = read({}, "flavors: {python_function: {loader_module: mlflow.sklearn}}\n")
    assert found == NamedModules(
        loaded={"mlflow.sklearn": "m/MLmodel"}, uses={"scikit-learn": "m/MLmodel names mlflow.sklearn"}
    )
    own = "flavors: {python_function: {loader_module: ours, data: model.pkl}}\n"
    # How a loader of one's own reads a file is its business.
    assert read({"model.pkl": pickle.dumps(xmlrpc.client.Fault)}, own).loaded == {"ours": "m/MLmodel"}


@pytest.mark.parametrize(
    ("said", "folder"),
    [
        ("code: code", "m/code"),
        ("code: ./src/", "m/src"),
        ("code: .", "m"),
        ("code: null", ""),
        ("code: ''", ""),
        ("data: x", ""),
        # Nobody can tell what is there.
        ("code: /opt/code", None),
        ("code: ../code", None),
        ("code: [code]", None),
    ],
)
def test_the_code_folder_of_mlmodel_is_found(read, said, folder):
    assert read({}, f"flavors: {{python_function: {{loader_module: ours, {said}}}}}\n").code == folder


def test_only_the_first_pickle_of_a_file_is_loaded(read):
    content = pickle.dumps(json.JSONDecoder) + pickle.dumps([xmlrpc.client.Fault, "scipy.stats"])
    found = read({"python_model.pkl": content})
    assert loaded(found) == {"json.decoder"}
    assert "scipy" in found.uses


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80",
        b"c" * 3000,
        b"cos\nsystem\n(S'echo'\ntR.",
        b"\x80\x04\x8e" + b"\xff" * 8 + b"x",
        b"\x80\x02\x8b" + b"\xff\xff\xff\x7f" + b"1" * 500,
        b"\x80\x02L" + b"9" * 9000 + b"L\n.",
        b"\x80\x04" + b"(" * 100_000,
        b"\x80\x04" + b"\x93" * 100 + b"R\x94h\x00\x93.",
        b"\x80\x04\x8c\x00\x94\x8c\x00\x94\x93.",
        b"\x80\x02c..\nx\n.",
        b"PK\x03\x04" + b"\0" * 500,
        b"x\x9c" + b"\0" * 99,
        b"\x1f\x8b" + b"\0" * 99,
        b"\xfd7zXZ\0" + b"\0" * 99,
        gzip.compress(bytes(50 << 20), 1),
    ],
)
def test_files_that_are_not_pickles_name_no_modules(read, content):
    assert loaded(read({"python_model.pkl": content})) <= {"os"}


READING = """\
import sys
from pathlib import Path
from builder.wheels.imports import read_named_modules
print(sorted(read_named_modules(Path(sys.argv[1]), "m", ["m/python_model.pkl"]).loaded))
"""


# Each pair holds those before it: to hash the last takes 2 ** 60 steps, or a stack as deep.
@pytest.mark.parametrize(
    "pairs",
    [
        b"q\x00" + b"".join(b"h%ch%c\x93q%c" % (number, number, number + 1) for number in range(60)),
        b"\x8c\x01a\x93" * 400_000,
    ],
    ids=["doubled", "deep"],
)
def test_a_name_s_pairs_do_not_nest(tmp_path, pairs):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/MLmodel").write_text(MLMODEL)
    (tmp_path / "m/python_model.pkl").write_bytes(b"\x80\x04\x8c\x01a" + pairs + b"N\x85.")
    # In a process of its own, since neither ends well.
    argv = [sys.executable, "-c", READING, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=HANG, check=False)
    assert (done.returncode, done.stdout) == (0, "['a', 'mlflow.pyfunc.model']\n"), done.stderr


@pytest.mark.parametrize("header", [2**64 - 1, 2**63, 2**63 - 1, 2**40])
def test_an_archive_s_member_beyond_its_end(read, header):
    name = b"archive/data.pkl"
    extra = struct.pack("<HHQ", 1, 8, header)
    local = b"PK\x03\x04" + bytes(26)
    numbers = (20, 20, 0, 0, 0, 0, 0, 5, 5, len(name), len(extra), 0, 0, 0, 0, 0xFFFFFFFF)
    central = struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", *numbers) + name + extra
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1, 1, len(central), len(local), 0)
    found = read({"data.pkl": local + central + end, "z.pkl": pickle.dumps("sklearn.svm")})
    assert found.uses.keys() == {"scikit-learn"}
    (read.folder / "m/data.pkl").write_bytes(local + central + end)
    with (read.folder / "m/data.pkl").open("rb") as file, pytest.raises(BadArchive, match="beyond"):
        read_directory(file.fileno())


def test_what_a_pickle_would_do_is_not_done(read, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    assert "posix" in loaded(read({"python_model.pkl": pickle.dumps(Evil())}))
    assert not (tmp_path / "made").exists()


def test_any_damage_is_read_without_a_crash(read):
    whole = cloudpickle.dumps([Model(), np.zeros(9), {"a": (1, 2.5, None, 10**30)}])
    random_ = random.Random(7)  # the same damage each time
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(random_.randrange(1, 9)):
            content[random_.randrange(len(content))] = random_.randrange(256)
        read({"python_model.pkl": bytes(content[: random_.randrange(len(content))])})


def test_opcodes_are_counted(read, monkeypatch):
    monkeypatch.setattr(imports, "_MOST_OPCODES", 1000)
    content = b"\x80\x04" + b"N0" * 600 + pickle.dumps([xmlrpc.client.Fault, "sklearn.svm"])[2:]
    found = read({"python_model.pkl": content})
    assert loaded(found) == set()
    assert "scikit-learn" in found.uses
    monkeypatch.setattr(imports, "_MOST_SEARCHED", 0)
    assert read({"python_model.pkl": content}).uses == {}


def test_what_is_unpacked_is_bounded_together(read, monkeypatch):
    monkeypatch.setattr(imports, "_MOST_UNPACKED", 1 << 20)
    bomb = gzip.compress(bytes(4 << 20))
    packed = gzip.compress(pickle.dumps("sklearn.svm"))
    assert "scikit-learn" in read({"a.pkl.gz": packed, "b.pkl.gz": bomb}).uses
    assert read({"a.pkl.gz": bomb, "b.pkl.gz": packed}).uses == {}
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for number in range(100):
            file.writestr(f"{number}/data.pkl", b"")
        file.writestr("archive/data.pkl", pickle.dumps("sklearn.svm"))
    assert read({"a.pt": archive.getvalue()}).uses == {}


def test_a_name_is_shown_on_one_line(read):
    found = read({"python_model.pkl": pickle.dumps("sklearn.\x1b[31m\n" + "x" * 150)})
    (said,) = found.uses.values()
    assert "\n" not in said
    assert "\x1b" not in said
    assert len(said) < 120


def test_the_table_has_what_the_newest_mlflow_brings():
    def requires(name):
        parsed = (Requirement(line) for line in importlib.metadata.requires(name))
        return {canonicalize_name(one.name) for one in parsed if not one.marker or one.marker.evaluate({"extra": ""})}

    brought = requires("mlflow") - requires("mlflow-skinny") - {"mlflow-skinny", "mlflow-tracing", "pandas", "numpy"}
    assert brought <= set(BROUGHT.values())
    assert COMES_WITH.keys() <= set(BROUGHT.values())
    # Each is a distribution's module, where it is installed here.
    there = importlib.metadata.packages_distributions()
    wrong = {
        module: there[module]
        for module, name in BROUGHT.items()
        if module in there and name not in map(canonicalize_name, there[module])
    }
    assert not wrong
