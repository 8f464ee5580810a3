"""The check that every test on disk is collected, on folders that hide one."""

import pytest

from scripts.collected import main

PYPROJECT = '[tool.pytest.ini_options]\ntestpaths = ["tests"]\naddopts = ["--import-mode=importlib"]\n'
TEST = "def test_it():\n    pass\n"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    (tmp_path / "tests/test_seen.py").write_text(TEST)
    return tmp_path


def test_where_all_is_collected_it_is_counted(root, capfd):
    (root / "tests/helpers.py").write_text("def make_test_server():\n    pass\n")
    assert main(root) == 0
    assert capfd.readouterr() == ("collected: 1 tests of 1 files\n", "")


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("tests/build/test_hidden.py", TEST),
        ("tests/.more/test_hidden.py", TEST),
        ("tests/hidden.py", TEST),
        ("tests/hidden_test_cases.py", "class TestIt:\n    def test_it(self):\n        pass\n"),
        ("tests/test_empty.py", ""),
        ("tests/test_class.py", "class Cases:\n    def test_it(self):\n        pass\n"),
    ],
)
def test_a_file_whose_tests_are_not_collected_is_named(root, capfd, path, content):
    (root / path).parent.mkdir(exist_ok=True)
    (root / path).write_text(content)
    assert main(root) == 1
    assert f"not collected: {path}\n" in capfd.readouterr().err


def test_pytest_addopts_does_not_change_what_is_compared(root, monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k nothing_at_all")
    assert main(root) == 0


def test_a_file_that_cannot_be_imported_ends_it(root):
    (root / "tests/test_broken.py").write_text("import no_such_module\n")
    with pytest.raises(SystemExit, match="no_such_module"):
        main(root)
