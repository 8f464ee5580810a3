"""Compare the tests on disk with what pytest collects: `python -m scripts.collected`.

pytest leaves out folders by their name (`norecursedirs` has `build` by default) and files by theirs, and says nothing.
So this is not one of the tests, which could be left out too: scripts/test.sh runs it before them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

_ROOT = Path(__file__).parent.parent
# A test of a module or of a class.
_TEST = re.compile(r"^(?:    )?(?:async )?def test_", re.MULTILINE)


def on_disk(root: Path) -> set[str]:
    """Return the files below tests/ that are called `test_*.py` or hold tests, as paths from `root`."""
    paths = [Path(folder, name) for folder, _, names in os.walk(root / "tests") for name in names]
    return {
        path.relative_to(root).as_posix()
        for path in paths
        if path.suffix == ".py" and (path.name.startswith("test_") or _TEST.search(path.read_text()))
    }


def collected(root: Path) -> Counter[str]:
    """Return how many tests pytest collects from each file where the command line names none.

    Raises:
        SystemExit: it collects nothing, or a file cannot be imported; its own message is printed.
    """
    # PYTEST_ADDOPTS selects what runs this time; all that can run is wanted.
    environ = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    command = [sys.executable, "-m", "pytest", "--collect-only", "--quiet", "-p", "no:cacheprovider"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=root, env=environ)
    if done.returncode:
        sys.exit(f"pytest cannot collect the tests:\n{done.stdout}{done.stderr}")
    return Counter(line.split("::")[0] for line in done.stdout.splitlines() if "::" in line)


def main(root: Path = _ROOT) -> int:
    """Print how many files and tests there are, and return 1 where a file's tests are not collected."""
    found = collected(root)
    missing = sorted(on_disk(root) - set(found))
    print(f"collected: {found.total()} tests of {len(found)} files", flush=True)
    for path in missing:
        print(f"not collected: {path}", file=sys.stderr)
    if missing:
        print(
            "pytest leaves these files out, so their tests never run: see `testpaths`, `norecursedirs` and "
            "`python_files` in pyproject.toml, and call the files test_*.py.",
            file=sys.stderr,
        )
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
