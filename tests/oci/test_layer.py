"""Layers: tar archives in gzip members, a function of their content."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
import zlib
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.oci import layer
from builder.oci.layer import CHUNK, Corrupt, Deflated, Inflater, LayerWriter, Plain

PIECES = st.one_of(
    st.binary(max_size=40),
    st.integers(0, 1100).map(bytes),
    st.text("abz/~\x8f", max_size=50).map(lambda t: t.encode("latin-1")),
)
PATHS = st.text(
    st.characters(codec="utf-8", exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=80
).filter(lambda name: name not in {".", ".."})


def raw(content: bytes, level: int = 6) -> bytes:
    compressor = zlib.compressobj(level, zlib.DEFLATED, -15)
    return compressor.compress(content) + compressor.flush()


def deflated(content: bytes, *, step: int = 1 << 20, **wrong: int) -> Deflated:
    stream = raw(content)
    chunks = [stream[n : n + step] for n in range(0, len(stream), step)]
    return Deflated(chunks=chunks, size=wrong.get("size", len(content)), crc=wrong.get("crc", zlib.crc32(content)))


def plain(content: bytes, step: int = 1 << 20) -> Plain:
    return Plain(chunks=[content[n : n + step] for n in range(0, len(content), step)], size=len(content))


def written(*steps, compresses: bool = True) -> tuple[LayerWriter, bytes]:
    writer = LayerWriter(compresses=compresses)
    data = b"".join(chunk for step in steps for chunk in step(writer))
    return writer, data + b"".join(writer.finish())


@given(st.lists(PIECES, max_size=20).map(b"".join))
def test_compressed_headers_hold_what_was_put_into_them(content):
    stream = layer.deflated(content)
    assert zlib.decompressobj(-15).decompress(stream) == content
    # The next block begins on a byte boundary.
    assert zlib.decompress(stream + layer.stored(b"rest") + layer.LAST, -15) == content + b"rest"


@pytest.mark.parametrize(
    "count", [*range(4, 12), *range(255, 275), *range(510, 525), 774, 775, 776, 777, 1024, 100_000]
)
def test_zeros_of_every_length(count):
    stream = layer.deflated(b"a" + bytes(count) + b"b") + layer.stored(b"rest") + layer.LAST
    assert zlib.decompress(stream, -15) == b"a" + bytes(count) + b"b" + b"rest"


def test_a_header_takes_a_third_of_its_block():
    header = layer.file_header("opt/model/lib/python3.11/site-packages/numpy/_core/_methods.py", 12345)
    assert len(layer.deflated(header)) < 160


@pytest.mark.parametrize("size", [0, 1, 300, 65_535])
def test_a_stored_block_holds_its_content(size):
    content = os.urandom(size)
    assert zlib.decompress(layer.stored(content) + layer.LAST, -15) == content


def test_another_zlib_has_another_identity(monkeypatch):
    own = layer.zlib_identity()
    assert own == layer.zlib_identity.__wrapped__()
    compressobj = zlib.compressobj
    monkeypatch.setattr(zlib, "compressobj", lambda _level, *rest: compressobj(1, *rest))
    assert layer.zlib_identity.__wrapped__() != own


@given(
    st.lists(st.tuples(PATHS, PATHS, st.binary(max_size=300), st.booleans(), st.booleans()), max_size=8), st.booleans()
)
def test_a_layer_holds_what_was_put_into_it(entries, compresses):
    files = {f"{folder}-d/{name}-f": rest for folder, name, *rest in entries}
    steps = [
        lambda writer, path=path, content=content, executable=executable, pack=pack: writer.file(
            path, deflated(content) if pack else plain(content), executable=executable
        )
        for path, (content, executable, pack) in files.items()
    ]
    writer, data = written(*steps, compresses=compresses)
    archive = gzip.decompress(data)
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        found = {m.name: [opened.extractfile(m).read(), m.mode == 0o755] for m in opened if m.isfile()}
    assert found == {path: rest[:2] for path, rest in files.items()}
    layer = writer.layer
    assert str(layer.digest) == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert str(layer.diff_id) == f"sha256:{hashlib.sha256(archive).hexdigest()}"
    assert (layer.size, layer.uncompressed) == (len(data), len(archive))
    assert layer.descriptor.to_json()["mediaType"] == "application/vnd.oci.image.layer.v1.tar+gzip"


@pytest.mark.parametrize("length", [1, 98, 99, 100, 101, 154, 155, 156, 200, 254, 255, 256, 257, 300, 1000])
@pytest.mark.parametrize("shape", ["flat", "halves", "deep", "umlaut"])
def test_names_of_every_length(length, shape):
    flat = "x" * length
    path = {
        "flat": flat,
        "halves": f"{flat[: length // 2]}/{flat[length // 2 :]}",
        "deep": "/".join(flat[n : n + 7] for n in range(0, length, 7)),
        "umlaut": f"ü{flat}",
    }[shape].strip("/")
    archive = layer.directory_header(path) + layer.file_header(f"{path}.f", 3) + b"abc" + layer.padding(3)
    archive += layer.symlink_header(f"{path}.l", path) + layer.END
    assert len(archive) % layer.BLOCK == 0
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        folder, file, link = opened
        assert (folder.name, folder.isdir(), folder.mode) == (path, True, 0o755)
        assert (file.name, file.size, file.mode, opened.extractfile(file).read()) == (f"{path}.f", 3, 0o644, b"abc")
        assert (link.name, link.issym(), link.linkname) == (f"{path}.l", True, path)
        assert {(m.uid, m.gid, m.mtime) for m in (folder, file, link)} == {(0, 0, 315_619_200)}


def test_a_size_beyond_8_gib_stands_in_a_pax_header():
    size = 8**11
    with tarfile.open(fileobj=io.BytesIO(layer.file_header("a", size))) as opened:
        assert opened.next().size == size
    assert len(layer.file_header("a", size)) == 3 * layer.BLOCK
    assert len(layer.file_header("a", size - 1)) == layer.BLOCK


def test_a_deflate_stream_is_in_the_layer_as_it_was():
    content = os.urandom(1000) * 300
    seen: list[bytes] = []
    _, data = written(lambda writer: writer.file("a", deflated(content), observe=seen.append))
    assert raw(content) in data
    assert b"".join(seen) == content


@pytest.mark.parametrize("size", [0, 1, 65_534, 65_535, 65_536, 131_070, 200_001])
def test_a_layer_does_not_depend_on_how_its_content_comes(size):
    content = os.urandom(size)
    layers = [
        written(
            lambda writer, step=step: writer.file("a", plain(content, step)),
            lambda writer, step=step: writer.file("b", deflated(content, step=step)),
        )[1]
        for step in (1 << 20, 65_535, 65_536, 4099)
    ]
    assert len(set(layers)) == 1
    with tarfile.open(fileobj=io.BytesIO(layers[0]), mode="r:gz") as opened:
        assert opened.extractfile("a").read() == opened.extractfile("b").read() == content


def test_chunks_are_bounded():
    content = os.urandom(1 << 20)
    writer = LayerWriter()
    chunks = [
        *writer.file("a", plain(content, 1 << 18)),
        *writer.file("b", deflated(content, step=1 << 16)),
        *writer.finish(),
    ]
    assert max(map(len, chunks)) < 2 * CHUNK
    assert min(map(len, chunks[:-1])) >= CHUNK


def test_folders_and_links_are_written():
    writer, data = written(
        lambda writer: writer.directory("opt/model/empty"),
        lambda writer: writer.symlink("opt/model/bin/python", "/usr/local/bin/python3.11"),
        lambda writer: (chunk for n in range(500) for chunk in writer.symlink(f"links/{n}", "x" * 120)),
    )
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as opened:
        assert opened.getmember("opt/model/empty").isdir()
        assert opened.getmember("opt/model/bin/python").linkname == "/usr/local/bin/python3.11"
        assert opened.getmember("links/499").linkname == "x" * 120
    assert writer.layer.size < writer.layer.uncompressed / 3


@pytest.mark.parametrize("compresses", [True, False])
def test_an_empty_layer(compresses):
    _, data = written(compresses=compresses)
    assert gzip.decompress(data) == bytes(1024)


@pytest.mark.parametrize("compresses", [True, False])
def test_more_headers_than_a_stored_block_holds(compresses):
    deep = "/".join(["d" * 50] * 200)
    writer, data = written(lambda writer: writer.file(f"{deep}/f", plain(b"x")), compresses=compresses)
    assert writer.layer.uncompressed > 2 * layer.LARGEST_STORED
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as opened:
        assert opened.extractfile(f"{deep}/f").read() == b"x"


def test_a_layer_that_is_not_compressed_depends_on_no_compressor():
    """A change of this digest is a change of every model layer in every registry."""
    paths = ["app/mymodel/MLmodel", "app/mymodel/é", "app/mymodel/" + "n" * 120]
    writer, _ = written(
        *(partial(LayerWriter.file, path=path, content=plain(b"x" * 700)) for path in paths), compresses=False
    )
    assert str(writer.layer.digest) == STORED_LAYER


STORED_LAYER = "sha256:090f9dee66e51813698ad0069117c6a781dcb1c0ea5bb6d473ca55d5e7971f16"


def test_a_layer_without_its_end_has_no_digest():
    writer = LayerWriter()
    list(writer.file("a", plain(b"x")))
    with pytest.raises(RuntimeError):
        _ = writer.layer


CONTENT = b"some content " * 100
LIES = {
    "larger": (deflated(CONTENT, size=len(CONTENT) + 1), "1300 bytes, and 1301"),
    "smaller": (deflated(CONTENT, size=len(CONTENT) - 1), "more than the 1299"),
    "bomb": (deflated(bytes(10 << 20), size=10), "more than the 10 bytes"),
    "checksum": (deflated(CONTENT, crc=1), "CRC-32"),
    "cut off": (Deflated(chunks=[raw(CONTENT)[:-1]], size=len(CONTENT), crc=zlib.crc32(CONTENT)), "cut off"),
    "nothing": (Deflated(chunks=[], size=0, crc=0), "cut off"),
    "garbage": (Deflated(chunks=[b"\xff\xff\xff"], size=3, crc=0), "broken"),
    "trailing": (Deflated(chunks=[raw(CONTENT) + b"x"], size=len(CONTENT), crc=zlib.crc32(CONTENT)), "follow"),
    "trailing chunk": (Deflated(chunks=[raw(CONTENT), b"x"], size=len(CONTENT), crc=zlib.crc32(CONTENT)), "follow"),
    "two streams": (Deflated(chunks=[raw(CONTENT) * 2], size=len(CONTENT), crc=zlib.crc32(CONTENT)), "follow"),
    "plain, larger": (Plain(chunks=[b"abc"], size=2), "3 bytes, and 2"),
    "plain, smaller": (Plain(chunks=[b"abc"], size=4), "3 bytes, and 4"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_wrong_size_checksum_or_stream_is_found(case):
    content, why = LIES[case]
    with pytest.raises(Corrupt, match=why):
        list(LayerWriter().file("a", content))


def test_a_stream_cannot_reach_back_into_the_header_before_it():
    """Behind our blocks, a distance beyond its own beginning would be valid: it would copy the header."""
    before = b"secret header bytes, long enough to be repeated"
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, before)
    stream = compressor.compress(before) + compressor.flush()
    assert zlib.decompressobj(-15, zdict=before).decompress(stream) == before
    with pytest.raises(Corrupt, match="broken"):
        list(LayerWriter().file("a", Deflated(chunks=[stream], size=len(before), crc=zlib.crc32(before))))


@pytest.mark.parametrize("chunk", [1, 2, 3, 257, 258, 259, 1000])
def test_an_inflater_gives_everything_however_little_at_a_time(chunk):
    content = bytes(3000) + b"x" * 3000 + os.urandom(100)
    inflater = Inflater(len(content), zlib.crc32(content), chunk)
    found = [piece for byte in raw(content) for piece in inflater.feed(bytes([byte]))]
    inflater.end()
    assert b"".join(found) == content
    assert max(map(len, found)) <= chunk
