"""Draw how the modules of builder/ import each other, and check it: `python -m scripts.house`.

A module's floor is the longest chain of run-time imports below it; imports for type checking alone are no edge. The
drawing in docs/how-it-works.md takes each package as a whole. With --check nothing is written or listed: an outdated
drawing, a circle, too many modules or floors, and names that are hard to tell apart are errors.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from itertools import combinations
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "how-it-works.md"
BEGIN = "<!-- floors: made by `python -m scripts.house`; `make lint` compares it with the imports. -->\n"
END = "<!-- end of floors -->\n"
# Upper bounds, to be lowered as the program allows: modules, and floors of the drawing (0052, 0055, 0056, 0057, 0061,
# 0062).
MODULES = 118
FLOORS = 14
# Names that may look alike, and why.
ALIKE = {
    frozenset({"builder.errors", "builder.models.errors"}): "a package's own errors, as in requests.exceptions",
    frozenset({"builder.clients", "builder.package_index.client"}): "those of all services; that of one",
    frozenset({"builder.models.store", "builder.oci.store"}): "artifacts in MLflow's store; layers in a registry's",
    frozenset({"builder.cli.listen", "builder.listener"}): "a command; what it runs",
    frozenset({"builder.wheels", "builder.wheels.wheel"}): "the package is named after BUILD_METHOD=wheels",
}
# Functions of a package that are called like a module of it: importing the module later replaces the function.
REPLACED: set[str] = set()
# What a word ends in when it is the plural, the participle or the agent of another.
_ENDINGS = ("s", "es", "d", "ed", "r", "er", "ers", "ing")

Graph = Mapping[str, set[str]]


def import_graph(package: str) -> dict[str, set[str]]:
    """Return the modules of a package, each with the modules of it that are imported at run time."""
    graph = grimp.build_graph(package, exclude_type_checking_imports=True, cache_dir=None)
    return {name: set(graph.find_modules_directly_imported_by(name)) for name in sorted(graph.modules)}


def rooms(graph: Graph) -> dict[str, set[str]]:
    """Return the same graph with each package below the top as one node; packages end in a slash."""
    packages = {".".join(name.split(".")[:2]) for name in graph if name.count(".") > 1}

    def room(name: str) -> str:
        head = ".".join(name.split(".")[:2])
        return head.partition(".")[2] + "/" * (head in packages)

    found: dict[str, set[str]] = defaultdict(set)
    for name, imported in graph.items():
        if "." in name:
            found[room(name)] |= {room(other) for other in imported if "." in other} - {room(name)}
    return dict(found)


def floors(graph: Graph) -> list[list[str]]:
    """Return the nodes by the longest chain of imports below them, the ground floor first.

    Raises:
        CycleError: there is a circle; its second argument has the nodes.
    """
    height: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        height[name] = max((height[other] + 1 for other in graph.get(name, ())), default=0)
    found: list[list[str]] = [[] for _ in range(max(height.values(), default=-1) + 1)]
    for name in sorted(height):
        found[height[name]].append(name)
    return found


def drawing(levels: list[list[str]]) -> str:
    """Return the floors as text, the uppermost first."""
    lines = [f"{number:2}  {'  '.join(names)}" for number, names in reversed(list(enumerate(levels, 1)))]
    return f"{BEGIN}```\n" + "\n".join(lines) + f"\n```\n{END}"


def hard_to_tell_apart(modules: Iterable[str]) -> list[frozenset[str]]:
    """Return the pairs of modules whose last names are equal or differ by one letter or by an ending."""
    return [
        frozenset(pair)
        for pair in combinations(sorted(modules), 2)
        if _near(*(name.rpartition(".")[2] for name in pair))
    ]


def _near(one: str, two: str) -> bool:
    short, long = sorted((one, two), key=len)
    if any(long in {short + ending, short.removesuffix("e") + ending, short[:-1] + "ies"} for ending in _ENDINGS):
        return True
    if len(short) == len(long):
        return sum(a != b for a, b in zip(short, long, strict=True)) <= 1
    return any(long[:at] + long[at + 1 :] == short for at in range(len(long)))


def replaced(root: Path, package: str) -> list[str]:
    """Return the functions and classes of packages that are called like a module of the same package."""
    found = []
    for file in sorted((root / package).rglob("__init__.py")):
        names = {
            node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        modules = {
            path.stem for path in file.parent.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
        }
        found += [".".join((*file.parent.relative_to(root).parts, name)) for name in sorted(names & modules)]
    return found


def problems(graph: Graph) -> list[str]:
    """Return what is wrong with the modules, each as a sentence."""
    found = []
    if len(graph) > MODULES:
        found.append(f"builder/ has {len(graph)} modules; at most {MODULES} are allowed. Put two together.")
    if circle := _circle(graph) or _circle(rooms(graph)):
        return [
            *found,
            f"These modules import each other in a circle: {' -> '.join(circle)}. Move what they share down.",
        ]
    if (high := len(floors(rooms(graph)))) > FLOORS:
        found.append(
            f"The drawing has {high} floors; at most {FLOORS} are allowed. Shorten the longest chain of imports."
        )
    alike = hard_to_tell_apart(graph)
    new = [" and ".join(sorted(pair)) for pair in alike if pair not in ALIKE]
    gone = [" and ".join(sorted(pair)) for pair in ALIKE if pair not in alike]
    found += [f"The names of {pair} are hard to tell apart. Rename one of them." for pair in new]
    found += [f"ALIKE in scripts/house.py has {pair}, which is outdated. Remove the entry." for pair in gone]
    return found


def _circle(graph: Graph) -> list[str]:
    try:
        floors(graph)
    except CycleError as error:
        return [str(name) for name in error.args[1]]
    return []


def lines_of(module: str) -> int:
    """Return how many lines a module of builder/ has."""
    path = ROOT / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return len(file.read_text().splitlines())


def main(arguments: list[str], page: Path = PAGE) -> int:
    """Write the drawing and list the modules, or compare; return 1 where something is wrong."""
    graph = import_graph("builder")
    wrong = problems(graph)
    wrong += [
        f"{name} is a function and a module, and importing the module replaces the function. Rename one of them."
        for name in replaced(ROOT, "builder")
        if name not in REPLACED
    ]
    if not _circle(rooms(graph)):
        text = page.read_text()
        head, _, rest = text.partition(BEGIN)
        wanted = head + drawing(floors(rooms(graph))) + rest.partition(END)[2]
        if "--check" not in arguments:
            page.write_text(wanted)
        elif text != wanted:
            wrong.append(f"The drawing in docs/{page.name} is outdated. Run 'python -m scripts.house'.")
    if "--check" not in arguments and not _circle(graph):
        for number, names in reversed(list(enumerate(floors(graph), 1))):
            for name in names:
                print(f"{number:2}  {lines_of(name):5}  {name}")
        total = sum(map(lines_of, graph))
        print(f"{len(graph)} modules, {total} lines, {len(floors(graph))} floors, {len(floors(rooms(graph)))} drawn")
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
