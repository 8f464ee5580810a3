"""Files that an author may well have meant for the Dockerfile, and whose name or place is not quite the right one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from builder.build.template import DOCKERFILE_JINJA, DOCKERFILE_TEMPLATE

# `Dockerfile`, `docker-file.tmpl`, `Containerfile.j2`, `gpu.Dockerfile`, in any case.
_NAME = re.compile(r"(?:.*\.)?(?:docker|container)[-_ ]?files?(?P<ending>(?:[._ -].*)?)")
_JINJA = re.compile(r".*j(?:inja)?2?(?:\.txt)?")
_TEMPLATE = re.compile(r"[._ -](?:te?mpl?(?:ate?)?s?|tpl|j2|jinja2?|in)(?:\.txt)?")
_TEMPLATE_FOLDERS = frozenset({"template", "templates"})
# What only mentions a Dockerfile in its name, and what its programs read beside one.
_OTHERS = (".dockerignore", ".md", ".py", ".sh", ".json", ".yaml", ".yml", ".log", ".html", ".pdf", ".png")
_MISSPELT = {"dockerfile.template": DOCKERFILE_TEMPLATE, "dockerfile.j2": DOCKERFILE_JINJA}
_LONGEST = 40


@dataclass(frozen=True, slots=True)
class Overlooked:
    """A file that is not taken for the Dockerfile, and the path under which it would be."""

    path: str
    right: str


def overlooked(paths: Iterable[str], templates_folder: str, top: Iterable[str]) -> list[Overlooked]:
    """Return the files that their author may have meant for the version's Dockerfile, at most ten.

    A template by its name, and whatever is called like a Dockerfile in a folder of templates, counts wherever it is; a
    plain Dockerfile only at the top of the artifacts and of the version's own folders: below them it belongs to code
    that was logged along.

    Args:
        paths: of the version's artifacts, none of which is a Dockerfile that is taken.
        templates_folder: where one would be.
        top: the version's other folders, those of the model and the client.
    """
    tops = {"", templates_folder, *top}
    return [each for _, each in zip(range(10), _found(paths, templates_folder, tops), strict=False)]


def _found(paths: Iterable[str], templates_folder: str, tops: set[str]) -> Iterator[Overlooked]:
    folded = templates_folder.casefold()
    for path in paths:
        folder, _, name = path.rpartition("/")
        ending = _ending(name.casefold())
        if ending is None:
            continue
        in_templates = folder.casefold().endswith(folded) or folder.rpartition("/")[2].casefold() in _TEMPLATE_FOLDERS
        if in_templates or folder in tops or _TEMPLATE.fullmatch(ending):
            right = DOCKERFILE_JINJA if _JINJA.fullmatch(ending) else DOCKERFILE_TEMPLATE
            yield Overlooked(path, f"{templates_folder}/{right}")


def _ending(name: str) -> str | None:
    """Return what follows in a name that is nearly a Dockerfile's; None for every other name."""
    if len(name) > _LONGEST or name.endswith(_OTHERS):
        return None
    if match := _NAME.fullmatch(name):
        return match["ending"]
    near = next((right for right in _MISSPELT if _one_apart(name, right)), None)
    return near and near.removeprefix("dockerfile")


def _one_apart(name: str, right: str) -> bool:
    """Return whether two names differ in one or two neighbouring characters: put in, left out, wrong or swapped."""
    if abs(len(name) - len(right)) > 1:
        return False
    same = 0
    while same < min(len(name), len(right)) and name[same] == right[same]:
        same += 1
    tail = 0
    while tail < min(len(name), len(right)) - same and name[-1 - tail] == right[-1 - tail]:
        tail += 1
    return max(len(name), len(right)) - same - tail <= 2  # noqa: PLR2004
