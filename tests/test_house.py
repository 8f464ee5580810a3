"""The checks of the modules of builder/, on graphs that fail one."""

from graphlib import CycleError

import pytest

from scripts import house

GRAPH = {
    "p": set(),
    "p.main": {"p.wheels.install", "p.errors"},
    "p.errors": set(),
    "p.wheels": set(),
    "p.wheels.install": {"p.wheels.lock", "p.plan"},
    "p.wheels.lock": {"p.errors"},
    "p.plan": {"p.errors"},
}


def test_a_package_is_one_node_of_the_drawing():
    levels = house.floors(house.rooms(GRAPH))
    assert levels == [["errors"], ["plan"], ["wheels/"], ["main"]]
    assert house.drawing(levels).splitlines()[1:-1] == [
        "```",
        " 4  main",
        " 3  wheels/",
        " 2  plan",
        " 1  errors",
        "```",
    ]


def test_floors_of_modules_are_the_longest_chains():
    assert house.floors(GRAPH) == [
        ["p", "p.errors", "p.wheels"],
        ["p.plan", "p.wheels.lock"],
        ["p.wheels.install"],
        ["p.main"],
    ]


def test_imports_for_type_checking_are_no_edges(tmp_path, monkeypatch):
    package = tmp_path / "drawn_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "low.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import drawn_package.high\n"
    )
    (package / "high.py").write_text("def later():\n    from drawn_package import low\n    return low\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert house.import_graph("drawn_package") == {
        "drawn_package": set(),
        "drawn_package.high": {"drawn_package.low"},
        "drawn_package.low": set(),
    }


@pytest.mark.parametrize(
    "graph",
    [
        {**GRAPH, "p.errors": {"p.main"}},
        # No circle of modules, but one of packages.
        {**GRAPH, "p.wheels.names": set(), "p.plan": {"p.wheels.names"}},
    ],
)
def test_a_circle_is_refused(graph):
    with pytest.raises(CycleError):
        house.floors(house.rooms(graph))
    assert any("circle" in sentence for sentence in house.problems(graph))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("lock", "locked"),
        ("layer", "layers"),
        ("index", "indexes"),
        ("resolve", "resolver"),
        ("registry", "registries"),
        ("store", "stores"),
        ("form", "farm"),
        ("errors", "errors"),
    ],
)
def test_names_that_differ_by_a_letter_or_an_ending_are_found(one, two):
    pair = {f"p.a.{one}", f"p.b.{two}"}
    assert house.hard_to_tell_apart(pair) == [frozenset(pair)]


def test_other_names_are_told_apart():
    assert (
        house.hard_to_tell_apart(["p.lock", "p.log", "p.layer", "p.layout", "p.wheel", "p.wheel_file", "p.zip"]) == []
    )


def test_too_many_modules_or_floors_are_refused(monkeypatch):
    monkeypatch.setattr(house, "ALIKE", {})
    assert house.problems(GRAPH) == []
    monkeypatch.setattr(house, "MODULES", len(GRAPH) - 1)
    monkeypatch.setattr(house, "FLOORS", 3)
    assert [sentence.split(";")[0] for sentence in house.problems(GRAPH)] == [
        "builder/ has 7 modules",
        "The drawing has 4 floors",
    ]


def test_an_allowed_pair_that_is_gone_is_named(monkeypatch):
    monkeypatch.setattr(house, "ALIKE", {frozenset({"p.lock", "p.locked"}): "a reason"})
    assert ["outdated" in sentence for sentence in house.problems(GRAPH)] == [True]


def test_an_outdated_drawing_is_refused_and_written_anew(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{house.BEGIN}nothing\n{house.END}after\n")
    assert house.main(["--check"], page) == 1
    assert "The drawing in docs/page.md is outdated." in capsys.readouterr().err
    assert "nothing" in page.read_text()
    house.main([], page)
    assert "  builder.publish\n" in capsys.readouterr().out
    assert house.main(["--check"], page) == 0
    assert page.read_text().startswith(f"before\n{house.BEGIN}```\n")
    assert page.read_text().endswith(f"{house.END}after\n")


def test_a_function_that_importing_a_module_replaces_is_found(tmp_path):
    inner = tmp_path / "p/inner"
    inner.mkdir(parents=True)
    (tmp_path / "p/__init__.py").write_text("def inner():\n    pass\n\n\ndef other():\n    pass\n")
    (inner / "__init__.py").write_text("def fetch():\n    from p.inner.fetch import helper\n    return helper\n")
    (inner / "fetch.py").write_text("def helper():\n    pass\n\n\ndef fetch():\n    pass\n")
    assert house.replaced(tmp_path, "p") == ["p.inner", "p.inner.fetch"]
