"""Shared libraries of some hundred bytes: what the loader reads of one, and no code."""

import struct

AMD64, ARM64, S390X = 62, 183, 22
_ADDRESS = 0x10000


def make_elf(*needed, soname="", module="", machine=AMD64, bits=64, order="<", padding=0):
    """Return a shared library that needs others, and defines what Python calls to import `module`.

    The name table stands `padding` bytes behind the rest.
    """
    table = b"\0"
    places = {}
    for name in filter(None, (*needed, soname, f"PyInit_{module}" if module else "")):
        places[name] = len(table)
        table += name.encode() + b"\0"
    wide = bits == 64
    header = struct.Struct(f"{order}16sHHI{'QQQ' if wide else 'III'}IHHHHHH")
    segment = struct.Struct(f"{order}{'IIQQQQQQ' if wide else 'IIIIIIII'}")
    entry = struct.Struct(f"{order}{'qQ' if wide else 'iI'}")
    count = len(needed) + bool(soname) + 3
    dynamic = header.size + 2 * segment.size
    strings = dynamic + count * entry.size + padding
    entries = [(1, places[name]) for name in needed] + ([(14, places[soname])] if soname else [])
    entries += [(5, _ADDRESS + strings), (10, len(table)), (0, 0)]
    end = strings + len(table)

    def part(kind, offset, size):
        address = _ADDRESS + offset
        fields = (4, offset, address, address, size, size) if wide else (offset, address, address, size, size, 4)
        return segment.pack(kind, *fields, 8)

    identity = b"\x7fELF" + bytes([2 if wide else 1, 1 if order == "<" else 2, 1])
    return b"".join(
        (
            header.pack(identity, 3, machine, 1, 0, header.size, 0, 0, header.size, segment.size, 2, 0, 0, 0),
            part(1, 0, end),
            part(2, dynamic, count * entry.size),
            *(entry.pack(*each) for each in entries),
            bytes(padding),
            table,
        )
    )
