"""The names in an image: what its layers make together, kept as a tree in memory. No file is written or followed.

What a layer does to those below it is told by the image specification (layer.md, "Applying Changesets" and
"Whiteouts"). Links are followed inside the image alone, as after chroot(2).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from builder.images.descriptor import refuse
from builder.images.untar import DIRECTORY, HARD_LINK, REGULAR, SYMBOLIC_LINK, Entry

_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"
# What Linux allows: bytes of a path and of a name, and links on the way to a file.
_LONGEST_PATH, _LONGEST_NAME, _MOST_LINKS = 4096, 255, 40
# About what an entry takes in memory beside its names, and what an image may take.
_ENTRY_BYTES, _MOST_BYTES = 300, 256 << 20
# Steps from name to name in all paths together.
_MOST_STEPS = 50_000_000
_PROGRAM = 0o111

Release = tuple[int, int]


@dataclass(slots=True)
class File:
    """A file that is no directory and no symbolic link.

    Attributes:
        layer: the number of the layer that put it there.
        program: whether it is a regular file that somebody may execute.
        release: version of the C library that its content names; None where that was not looked for or found.
        text: its content, of the few files whose content matters.
    """

    layer: int
    program: bool = False
    release: Release | None = None
    text: bytes = b""


@dataclass(slots=True)
class Link:
    """A symbolic link and where it leads to."""

    layer: int
    target: str


@dataclass(slots=True)
class Folder:
    """A directory.

    Attributes:
        layer: the number of the last layer that put it, or something in it, there.
        opaque: the number of the last layer that hides what those below put in it; -1 for none.
        children: what is in it.
    """

    layer: int
    opaque: int = -1
    children: dict[str, Node] = field(default_factory=dict)


Node = File | Link | Folder


class RootFs:
    """The file system of an image. Layers are added from the first to the last."""

    def __init__(self) -> None:
        self._root = Folder(0)
        self._layer = 0
        self._bytes = 0
        self._steps = 0

    def begin_layer(self) -> None:
        """Begin the next layer."""
        self._layer += 1

    def add(self, entry: Entry, release: Release | None = None, text: bytes = b"") -> None:
        """Add an entry of the layer.

        Args:
            entry: as it stands in the layer's archive.
            release: of the C library in a regular file.
            text: of a regular file, as far as it matters.

        Raises:
            Malformed: nobody could unpack it, or the image has too many names for the memory.
        """
        *parents, name = _parts(entry.path) or [""]
        if not name:
            return
        if name.startswith(_WHITEOUT):
            folder, _ = self._at(parents)
            if isinstance(folder, Folder):
                self._whiteout(folder, name)
            return
        folder, _ = self._at(parents, make=True)
        if not isinstance(folder, Folder):
            refuse("it has a path that leads in a circle")
        there = folder.children.get(name)
        if entry.kind != DIRECTORY:
            self._put(folder, name, self._leaf(entry, release, text))
        elif isinstance(there, Folder):
            there.layer = self._layer
        else:
            self._put(folder, name, Folder(self._layer, opaque=self._layer))

    def find(self, path: str, *, last: bool = True) -> tuple[Node | None, str]:
        """Return what a path leads to, or None, and where that is without any link.

        Args:
            path: from the root.
            last: whether to follow a link at the path's end.
        """
        node, names = self._at(path.split("/"), last=last)
        return node, "/" + "/".join(names)

    def folders(self, name: str) -> Iterator[str]:
        """Yield the paths of all directories of a name, in no order."""
        todo: list[tuple[str, Folder]] = [("", self._root)]
        while todo:
            path, folder = todo.pop()
            for each, node in folder.children.items():
                if isinstance(node, Folder):
                    todo.append((f"{path}/{each}", node))
                    if each == name:
                        yield f"{path}/{each}"

    def _leaf(self, entry: Entry, release: Release | None, text: bytes) -> File | Link:
        if entry.kind == SYMBOLIC_LINK:
            if len(entry.target) > _LONGEST_PATH:
                refuse("it has a link that is too long")
            self._bytes += len(entry.target)
            return Link(self._layer, entry.target)
        if entry.kind == HARD_LINK:
            other, _ = self._at(_parts(entry.target), last=False)
            return (
                File(self._layer) if other is None or isinstance(other, Folder) else replace(other, layer=self._layer)
            )
        self._bytes += len(text)
        return File(self._layer, entry.kind == REGULAR and bool(entry.mode & _PROGRAM), release, text)

    def _put(self, folder: Folder, name: str, node: Node) -> None:
        if len(name) > _LONGEST_NAME:
            refuse("it has a name that is too long")
        self._bytes += _ENTRY_BYTES + len(name)
        if self._bytes > _MOST_BYTES:
            refuse("it has too many names")
        folder.children[name] = node

    def _whiteout(self, folder: Folder, name: str) -> None:
        if name == _OPAQUE:
            self._hide(folder)
            return
        name = name.removeprefix(_WHITEOUT)
        node = folder.children.get(name)
        if node is None:
            return
        if node.layer < self._layer:
            del folder.children[name]
        elif isinstance(node, Folder):
            self._hide(node)

    def _hide(self, folder: Folder) -> None:
        """Take away what the layers below put into a directory; what this layer put there stays."""
        todo = [folder]
        while todo:
            each = todo.pop()
            if each.opaque == self._layer:
                continue
            each.opaque = self._layer
            each.children = {name: node for name, node in each.children.items() if node.layer == self._layer}
            todo += [node for node in each.children.values() if isinstance(node, Folder)]

    def _at(self, parts: list[str], *, make: bool = False, last: bool = True) -> tuple[Node | None, list[str]]:
        """Return what a path leads to, and the path without links; None where there is nothing, or too many links.

        Args:
            parts: of the path.
            make: whether the whole path is of directories, which are made where there are none, for this layer.
            last: whether to follow a link at its end.
        """
        names: list[str] = []
        folders = [self._root]
        todo, links = parts[::-1], 0
        while todo:
            name = todo.pop()
            self._spend(1)
            if name in {"", "."}:
                continue
            if name == "..":
                # The root is its own parent.
                del names[-1:], folders[max(1, len(folders) - 1) :]
                continue
            node = folders[-1].children.get(name)
            if isinstance(node, Link) and (todo or last):
                links += 1
                if links > _MOST_LINKS:
                    return None, names
                if node.target.startswith("/"):
                    names, folders = [], [self._root]
                todo += node.target.split("/")[::-1]
                continue
            names.append(name)
            if make and not isinstance(node, Folder):
                node = Folder(self._layer, opaque=self._layer)
                self._put(folders[-1], name, node)
            if not isinstance(node, Folder):
                return (None if todo else node), names
            if make:
                node.layer = self._layer
            folders.append(node)
        return folders[-1], names

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > _MOST_STEPS:
            refuse("its paths and links are too long")


def _parts(path: str) -> list[str]:
    """Return the names of a path in an archive; `..` leads no further than to the root, as engines have it."""
    if len(path) > _LONGEST_PATH:
        refuse("it has a path that is too long")
    found: list[str] = []
    for name in path.split("/"):
        if name == "..":
            del found[-1:]
        elif name not in {"", "."}:
            found.append(name)
    return found
