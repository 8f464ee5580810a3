"""Base images: what their layers make together, from a real registry; hostile and odd layers are made here."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import os
import sys
import tarfile
import tracemalloc
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from builder.clients import Registries
from builder.errors import InvalidVersion, ServiceUnavailable
from builder.oci import LAYERS, OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, BytesBlob, Descriptor, Malformed
from builder.oci.authn import Credential, Credentials
from builder.oci.base_image import BaseImage
from builder.oci.base_image import base_image as read_base
from builder.oci.registry import Registry, RemoteBlob
from builder.oci.rootfs import Archive, BaseFacts, inspect_base
from builder.reference import Digest, Platform, Reference, Repository
from tests.oci.fake import Reply, serve
from tests.servers.registries import RegistryServer

AMD64, ARM64, ARM = Platform("linux", "amd64"), Platform("linux", "arm64"), Platform("linux", "arm", "v7")
GZIP, ZSTD = f"{OCI_LAYER}+gzip", f"{OCI_LAYER}+zstd"
GLIBC = b"\x7fELF" + bytes(3000) + b"GNU C Library (Debian GLIBC 2.36-9) stable release version 2.36.\n" + bytes(3000)


@pytest.fixture(scope="module")
def client(registry: RegistryServer) -> Iterator[Registry]:
    with Registries() as registries:
        yield registries.for_host(registry.host)


@dataclass
class Pushed:
    """What `push` made: ask `image` or `facts` for it."""

    client: Registry
    reference: Reference

    def image(self, platform: Platform = AMD64) -> BaseImage:
        found = read_base(self.client, self.reference, platform)
        assert found is not None
        return found

    def facts(self) -> BaseFacts:
        return inspect_base(self.client, self.image())


Push = Callable[..., Pushed]


@pytest.fixture
def push(client: Registry) -> Push:
    """Push an image of some layers; each is the blob itself, or a tar archive, which is compressed."""

    def act(
        *layers: bytes | tuple[str, bytes],
        env: Any = (),
        diff_ids: int | None = None,
        platform: Platform = AMD64,
        manifest: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
    ) -> Pushed:
        repository = Repository(client.host, f"base/{uuid.uuid4().hex}")
        blobs = [each if isinstance(each, tuple) else (GZIP, gzip.compress(each, 1)) for each in layers]
        for _, blob in blobs:
            client.push_blob(repository, BytesBlob(blob))
        count = len(blobs) if diff_ids is None else diff_ids
        written = json.dumps(
            {
                "os": platform.os,
                "architecture": platform.architecture,
                "variant": platform.variant,
                "config": {"Env": list(env) if isinstance(env, tuple) else env},
                "rootfs": {"type": "layers", "diff_ids": [str(Digest.of(b"%d" % n)) for n in range(count)]},
                **(config or {}),
            }
        ).encode()
        client.push_blob(repository, BytesBlob(written))
        content = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": Descriptor.of(written, OCI_CONFIG).to_json(),
            "layers": [Descriptor.of(blob, kind).to_json() for kind, blob in blobs],
            **(manifest or {}),
        }
        client.put_manifest(repository, json.dumps(content).encode(), OCI_MANIFEST, "v1")
        return Pushed(client, repository.tag("v1"))

    return act


# -- making layers

Made = tuple[tarfile.TarInfo, bytes]


def file(path: str, content: bytes = b"", mode: int = 0o644) -> Made:
    entry = tarfile.TarInfo(path)
    entry.size, entry.mode = len(content), mode
    return entry, content


def program(path: str) -> Made:
    return file(path, b"\x7fELF", 0o755)


def special(path: str, kind: bytes, target: str = "") -> Made:
    entry = tarfile.TarInfo(path)
    entry.type, entry.linkname, entry.mode = kind, target, 0o755
    return entry, b""


def link(path: str, target: str) -> Made:
    return special(path, tarfile.SYMTYPE, target)


def hard(path: str, target: str) -> Made:
    return special(path, tarfile.LNKTYPE, target)


def folder(path: str) -> Made:
    return special(path, tarfile.DIRTYPE)


def layer(*entries: Made, form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for entry, content in entries:
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


PYTHON = "/usr/local/bin/python3.11"
ONE = layer(program(PYTHON[1:]))


# -- the image


def test_the_base_image_of_three_platforms(base_image: str, client: Registry) -> None:
    reference = Reference.parse(base_image)
    images = {each: read_base(client, reference, each) for each in (AMD64, ARM64, ARM)}
    index = client.manifest(reference)
    assert {each.digest for each in images.values()} == {index.digest}
    assert len({each.manifest for each in images.values()}) == 3
    for platform, image in images.items():
        assert (image.reference, image.platform) == (reference, platform)
        manifest = json.loads(client.manifest(reference.repository.digest(image.manifest)).content)
        assert [each.to_json() for each in image.layers] == manifest["layers"]
        assert image.config["architecture"] == platform.architecture
        assert [str(each) for each in image.diff_ids] == image.config["rootfs"]["diff_ids"]
        facts = inspect_base(client, image)
        assert facts == BaseFacts(
            interpreters={"3.11": "/usr/bin/python3.11"},
            glibc=(2, 36),
            musl=False,
            occupied=False,
            java=False,
            libraries=facts.libraries,
        )
        assert {"libc.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libz.so.1"} < set(facts.libraries)
        assert "libgomp.so.1" not in facts.libraries
        assert BaseFacts.from_json(facts.to_json()) == facts
    assert read_base(client, reference.repository.tag("no-such-tag"), AMD64) is None


@pytest.mark.parametrize(("told", "meant"), LAYERS.items())
def test_media_types_of_layers_become_ocis(push: Push, told: str, meant: str) -> None:
    assert [each.media_type for each in push((told, b"x")).image().layers] == [meant]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"diff_ids": 2}, "has 1 layers, and its config lists 2"),
        ({"diff_ids": 0}, "has 1 layers, and its config lists 0"),
        ({"env": [1]}, "Env is not a list of strings"),
        ({"env": "PATH=/bin"}, "Env is not a list"),
        ({"config": {"config": []}, "env": ()}, None),
        ({"config": {"config": "x"}}, "config is not an object"),
        ({"config": {"config": None}}, None),
    ],
)
def test_a_base_with_unusable_layers_or_config_is_refused(
    push: Push, options: dict[str, Any], message: str | None
) -> None:
    pushed = push(ONE, **options)
    if message is None:
        assert pushed.image().environ == {}
        return
    with pytest.raises(InvalidVersion, match=f"{pushed.reference}.* is not an image: .*{message}"):
        pushed.image()


def test_a_layer_of_an_unknown_kind_is_refused(push: Push) -> None:
    pushed = push((f"{OCI_LAYER}+gzip+encrypted", b"x"))
    with pytest.raises(InvalidVersion, match=r"unknown media type .*encrypted"):
        pushed.image()


def test_an_older_arm_is_taken_for_a_newer_one(push: Push) -> None:
    pushed = push(ONE, platform=Platform("linux", "arm", "v6"))
    assert pushed.image(Platform("linux", "arm", "v8")).platform.variant == "v8"
    assert pushed.image(ARM).platform == ARM
    assert pushed.image(ARM).config["variant"] == "v6"
    with pytest.raises(InvalidVersion, match="no image for linux/arm64; it has linux/arm/v6"):
        pushed.image(ARM64)


# -- copying to another registry


@pytest.mark.parametrize("kind", ["token_registry", "tls_registry"])
def test_a_base_is_copied_between_registries_in_bounded_memory(kind, client, registry, base_image, request) -> None:
    server: RegistryServer = request.getfixturevalue(kind)
    base = read_base(client, Reference.parse(base_image), AMD64)
    credentials = Credentials(explicit=server.host, credential=Credential(server.user, server.password))
    with Registries(credentials, ca_bundle=server.ca) as registries:
        ours, there = registries.for_host(server.host), Repository(server.host, f"base/{uuid.uuid4().hex}")
        blobs = [RemoteBlob(client, base.reference.repository, each) for each in base.layers]
        assert sum(each.size for each in blobs) > 20_000_000
        tracemalloc.start()
        sent = [ours.push_blob(there, each) for each in blobs]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert sent == [each.size for each in base.layers]
        assert peak < 4_000_000
        assert [ours.push_blob(there, each) for each in blobs] == [0] * len(blobs)
        # And out of it, with its credential and certificate.
        moved = replace(base, reference=there.tag("v1"))
        assert inspect_base(ours, moved) == inspect_base(client, base)
        digest = hashlib.sha256()
        for chunk in RemoteBlob(ours, there, base.layers[0]).stream():
            digest.update(chunk)
        assert digest.hexdigest() == base.layers[0].digest.hex


def test_a_copy_whose_source_is_wrong_leaves_nothing(client: Registry) -> None:
    there = Repository(client.host, f"base/{uuid.uuid4().hex}")
    descriptor = Descriptor.of(uuid.uuid4().bytes * 10000, GZIP)
    with serve() as fake, Registries() as registries:
        fake.answer = lambda _: Reply(200, content=bytes(descriptor.size))
        blob = RemoteBlob(registries.for_host(fake.host), Repository(fake.host, "x"), descriptor)
        with pytest.raises(ServiceUnavailable, match=f"{fake.host}/x was answered with something else"):
            client.push_blob(there, blob)
    assert not client.has_blob(there, descriptor.digest)


# -- interpreters


@pytest.mark.parametrize(
    ("entries", "env", "found"),
    [
        ([program("usr/bin/python3.11"), program("usr/local/bin/python3.11")], (), {"3.11": PYTHON}),
        (
            [program("usr/bin/python3.11"), program("usr/local/bin/python3.11")],
            ("PATH=relative:/usr/bin:/usr/local/bin",),
            {"3.11": "/usr/bin/python3.11"},
        ),
        ([program("opt/conda/bin/python3.9")], (), {"3.9": "/opt/conda/bin/python3.9"}),
        ([program("opt/b/bin/python3.9"), program("opt/a/bin/python3.9")], (), {"3.9": "/opt/a/bin/python3.9"}),
        ([program("srv/py/bin/python3.10")], (), {"3.10": "/srv/py/bin/python3.10"}),
        ([program("srv/py/exec/python3.10")], ("PATH=/srv/py/exec",), {"3.10": "/srv/py/exec/python3.10"}),
        (
            [program("usr/bin/python3.9"), program("usr/bin/python3.11")],
            (),
            {"3.9": "/usr/bin/python3.9", "3.11": "/usr/bin/python3.11"},
        ),
        ([link("bin", "usr/bin"), program("usr/bin/python3.11")], ("PATH=/bin",), {"3.11": "/usr/bin/python3.11"}),
        ([link("bin", "usr/bin"), program("bin/python3.11")], (), {"3.11": "/usr/bin/python3.11"}),
        ([link("usr/local/bin/python3.11", "/opt/py/bin/python3.11"), program("opt/py/bin/python3.11")], (),
         {"3.11": "/opt/py/bin/python3.11"}),
        ([link("usr/bin/python3.11", "../libexec/python-real"), program("usr/libexec/python-real")], (),
         {"3.11": "/usr/libexec/python-real"}),
        ([link("usr/bin/python3.11", "../../../../../usr/libexec/py"), program("usr/libexec/py")], (),
         {"3.11": "/usr/libexec/py"}),
        ([program("usr/bin/python"), hard("usr/bin/python3.11", "usr/bin/python")], (),
         {"3.11": "/usr/bin/python3.11"}),
        ([program("usr/bin/p"), hard("usr/bin/q", "/usr/bin/p"), link("usr/bin/python3.11", "q")], (),
         {"3.11": "/usr/bin/q"}),
        # In an environment, the interpreter behind it; not a copy.
        ([link("venv/bin/python3.11", PYTHON), file("venv/pyvenv.cfg"), program(PYTHON[1:])], ("PATH=/venv/bin",),
         {"3.11": PYTHON}),
        ([program("venv/bin/python3.11"), file("venv/pyvenv.cfg"), program(PYTHON[1:])], ("PATH=/venv/bin",),
         {"3.11": PYTHON}),
        # None.
        ([file("usr/bin/python3.11")], (), {}),
        ([folder("usr/bin/python3.11")], (), {}),
        ([special("usr/bin/python3.11", tarfile.CHRTYPE)], (), {}),
        ([program("usr/bin/python3.11-config"), program("usr/bin/python3"), program("usr/bin/xpython3.11")], (), {}),
        ([program("python3.11"), program("usr/python3.11")], (), {}),
        ([link("usr/bin/python3.11", "gone")], (), {}),
        ([link("usr/bin/python3.11", "python3.11")], (), {}),
        ([link("usr/bin/python3.11", "a"), link("usr/bin/a", "python3.11")], (), {}),
        ([link("usr/bin/python3.11", "/")], (), {}),
        ([link("usr/bin/python3.11", "")], (), {}),
        ([program("usr/bin/x"), link("usr/bin/python3.11", "x/../x")], (), {}),
        ([hard("usr/bin/python3.11", "usr/bin/gone")], (), {}),
        ([hard("usr/bin/python3.11", "usr"), folder("usr")], (), {}),
        ([program("opt/pypy/bin/pypy3.10"), link("opt/pypy/bin/python3.10", "pypy3.10")], (), {}),
        ([program("opt/a\nhome = b/bin/python3.11"), program("opt/'$x'/bin/python3.11")], (), {}),
    ],
)  # fmt: skip
def test_which_interpreters_are_found(
    push: Push, entries: list[Made], env: tuple[str, ...], found: dict[str, str]
) -> None:
    assert push(layer(*entries), env=env).facts().interpreters == found


PROGRAM = os.path.realpath(sys.executable)


@pytest.mark.parametrize("target", [PROGRAM, f"../../../../..{PROGRAM}"])
def test_a_link_out_of_the_image_leads_nowhere(push: Push, target: str) -> None:
    assert os.access(target if target.startswith("/") else target[14:], os.X_OK)
    assert push(layer(link("usr/bin/python3.11", target))).facts().interpreters == {}


# -- layers over layers

LOWER = layer(folder("usr/local/bin"), program("usr/local/bin/python3.10"), program("usr/local/bin/python3.11"))


@pytest.mark.parametrize(
    ("upper", "found"),
    [
        ([file("usr/local/bin/.wh.python3.11")], {"3.10"}),
        ([file("usr/local/.wh.bin")], set()),
        ([file(".wh.usr")], set()),
        ([file("usr/local/bin/.wh..wh..opq")], set()),
        ([file("usr/.wh..wh..opq")], set()),
        # What the layer itself puts there stays, before or after.
        ([file("usr/.wh..wh..opq"), program("usr/local/bin/python3.12")], {"3.12"}),
        ([program("usr/local/bin/python3.12"), file("usr/.wh..wh..opq")], {"3.12"}),
        ([program("usr/local/bin/python3.12"), file("usr/.wh.local")], {"3.12"}),
        ([file(".wh.usr"), folder("usr"), program("usr/local/bin/python3.12")], {"3.12"}),
        ([program("usr/local/bin/python3.11"), file("usr/local/bin/.wh.python3.11")], {"3.10", "3.11"}),
        # What replaces, and what does not.
        ([file("usr/local/bin/python3.11")], {"3.10"}),
        ([file("usr/local")], set()),
        ([link("usr/local", "/gone")], set()),
        ([folder("usr/local/")], {"3.10", "3.11"}),
        ([folder("./usr"), folder("/usr/local")], {"3.10", "3.11"}),
        ([folder("usr/local/bin/python3.11")], {"3.10"}),
        ([program("usr/local/bin/python3.11/x")], {"3.10"}),
        ([hard("usr/bin/python3.9", "usr/local/bin/python3.10"), file("usr/local/.wh.bin")], {"3.9"}),
        # Whiteouts of what is not there, and of what no layer may delete.
        ([file("usr/lib/.wh.x"), file("gone/.wh..wh..opq"), file("usr/.wh."), file(".wh..")], {"3.10", "3.11"}),
        ([file("usr/local/bin/.wh..."), file("usr/.wh..wh.plnk")], {"3.10", "3.11"}),
    ],
)
def test_an_upper_layer_adds_replaces_and_deletes(push: Push, upper: list[Made], found: set[str]) -> None:
    assert set(push(LOWER, layer(*upper)).facts().interpreters) == found
    assert set(push(LOWER, layer(), layer(*upper), layer(file("etc/x"))).facts().interpreters) == found


def test_a_file_removed_by_a_layer_can_be_added_again(push: Push) -> None:
    gone = layer(file("usr/local/bin/.wh..wh..opq"))
    assert push(LOWER, gone, ONE).facts().interpreters == {"3.11": PYTHON}


def test_a_path_through_a_link_goes_where_the_link_leads(push: Push) -> None:
    lower = layer(link("bin", "usr/bin"), link("lib", "/usr/lib"), folder("usr/bin"))
    upper = layer(program("bin/python3.11"), file("lib/x86_64-linux-gnu/libc.so.6", GLIBC))
    facts = push(lower, upper).facts()
    assert (facts.interpreters, facts.glibc) == ({"3.11": "/usr/bin/python3.11"}, (2, 36))
    assert push(lower, upper, layer(file("bin/.wh.python3.11"))).facts().interpreters == {}


# -- libraries, and the place of the model


@pytest.mark.parametrize(
    ("entries", "glibc", "musl"),
    [
        ([file("lib/x86_64-linux-gnu/libc.so.6", GLIBC, 0o755)], (2, 36), False),
        ([file("lib64/libc.so.6", GLIBC)], (2, 36), False),
        ([file("usr/lib/libc.so.6", GLIBC)], (2, 36), False),
        ([link("lib/libc.so.6", "libc-2.31.so"), file("lib/libc-2.31.so", GLIBC.replace(b"2.36.", b"2.31."))], (2, 31), False),
        ([link("lib", "usr/lib"), file("usr/lib/aarch64-linux-gnu/libc.so.6", GLIBC)], (2, 36), False),
        ([file("lib64/libc.so.6", GLIBC), file("lib/libc.so.6", GLIBC.replace(b"2.36.", b"2.17."))], (2, 17), False),
        # Of a toolchain, not of the system.
        ([file("opt/conda/sysroot/lib64/libc.so.6", GLIBC)], None, False),
        ([file("lib64/libc.so.6", b"INPUT(libc)")], None, False),
        ([file("lib64/libc.so.6", bytes(17 << 20) + GLIBC)], None, False),
        ([link("lib64/libc.so.6", "libc.so.6")], None, False),
        ([program("lib/ld-musl-x86_64.so.1")], None, True),
        ([link("lib/ld-musl-armhf.so.1", "libc.musl-armhf.so.1")], None, True),
        ([program("opt/lib/ld-musl-x86_64.so.1"), program("lib/xld-musl-x86_64.so.1")], None, False),
        ([], None, False),
    ],
)  # fmt: skip
def test_c_libraries(push: Push, entries: list[Made], glibc: tuple[int, int] | None, musl: bool) -> None:
    facts = push(layer(*entries)).facts()
    assert (facts.glibc, facts.musl) == (glibc, musl)


@pytest.mark.parametrize("text", [b"/usr/lib/x\n", b"2.30", b"2.30000000", b"2." + b"9" * 5000, b"2.3.6\n", b"."])
def test_the_loaders_configuration_is_no_release_of_glibc(push: Push, text: bytes) -> None:
    links = [link("lib/libc.so.6", "/etc/ld.so.conf"), hard("lib64/libc.so.6", "etc/ld.so.conf")]
    made = layer(file("etc/ld.so.conf", text), *links, program(PYTHON[1:]))
    facts = push(made).facts()
    assert (facts.interpreters, facts.glibc) == ({"3.11": PYTHON}, None)
    assert push(made, layer(file("usr/lib/libc.so.6", GLIBC))).facts().glibc == (2, 36)


@pytest.mark.parametrize(
    ("entries", "occupied"),
    [
        ([folder("opt/model")], True),
        ([file("opt/model")], True),
        ([link("opt/model", "/gone")], True),
        ([file("opt/model/x/y")], True),
        ([link("opt", "var/opt"), folder("var/opt")], True),
        ([file("opt")], True),
        ([folder("opt"), folder("opt/models"), file("model")], False),
        ([], False),
    ],
)
def test_an_existing_opt_model_is_detected(push: Push, entries: list[Made], occupied: bool) -> None:
    assert push(layer(*entries)).facts().occupied is occupied


# -- archives of all kinds


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("length", [5, 100, 101, 140, 200])
def test_names_of_any_length(push: Push, form: int, length: int) -> None:
    name = "/".join(["opt", "a" * (length - 60) if length > 60 else "a", "b" * 40, "bin", "python3.11"])
    made = [program(name)]
    if form != tarfile.USTAR_FORMAT:
        made.append(link("usr/bin/python3.12", f"/{name}"))
    found = push(layer(*made, form=form)).facts().interpreters
    assert set(found.values()) == {f"/{name}"}
    assert len(found) == len(made)


def test_names_that_are_not_ascii_and_headers_that_are_global(push: Push) -> None:
    buffer = io.BytesIO()
    headers = {"path": "usr/bin/python3.9", "comment": "of the whole archive"}
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers=headers) as archive:
        for entry, content in (file("é/ü" * 40), program("usr/bin/python3.11")):
            archive.addfile(entry, io.BytesIO(content))
    assert push(buffer.getvalue()).facts().interpreters == {"3.11": "/usr/bin/python3.11"}


def header(
    name: bytes,
    *,
    kind: bytes = b"0",
    mode: bytes = b"0000755\0",
    size: bytes = b"00000000000\0",
    more: bytes = b"",
    magic: bytes = b"ustar  \0",
) -> bytes:
    block = bytearray(name.ljust(100, b"\0") + mode + b"0000000\0" * 2 + size + b"0" * 11 + b"\0")
    block += b" " * 8 + kind + bytes(100) + magic + more
    block += bytes(512 - len(block))
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_forms_that_only_old_or_odd_programs_write(push: Push) -> None:
    binary = b"\x80" + (700).to_bytes(11, "big")
    parts = [
        header(b"usr/bin/", kind=b"\0"),
        header(b"data", size=binary) + bytes(1024),
        header(b"fifo", kind=b"6", size=b"00000001000\0"),  # a size of what has no content
        header(b"unheard-of", kind=b"Z", size=b"00000000005\0") + b"ABCDE".ljust(512, b"\0"),
        header(b"usr/bin/python3.11", kind=b"\0"),
        header(b"usr/bin/python3.12", kind=b"7"),
        # GNU's older form has a time where ustar has the beginning of the path.
        header(b"usr/bin/python3.10", more=bytes(80) + b"14717463000\0"),
    ]
    found = {minor: f"/usr/bin/python{minor}" for minor in ("3.10", "3.11", "3.12")}
    assert push(b"".join(parts)).facts().interpreters == found, "without an end, too"


@pytest.mark.parametrize("ustar", [True, False])
def test_the_path_of_a_pax_header_decides_whether_an_old_entry_is_a_directory(ustar: bool) -> None:
    within = header(b"usr/bin/python3.11")
    form = {"magic": b"ustar\x0000", "more": bytes(80) + b"top"} if ustar else {}

    def found(name: bytes, record: bytes = b"") -> list[tuple[str, bool, int]]:
        made = header(name, kind=b"\0", size=b"%011o\0" % len(within), **form) + within
        if record:
            made = header(b"PaxHeader", kind=b"x", size=b"%011o\0" % len(record)) + record.ljust(512, b"\0") + made
        return [(entry.name.rstrip("/"), entry.isdir(), entry.size) for entry in Archive(iter([made]))]

    second = ("usr/bin/python3.11", False, 0)
    assert found(b"x/", b"16 path=etc/foo\n") == [("etc/foo", False, 512)]
    assert found(b"x", b"13 path=etc/\n") == [("etc", True, 0), second]
    assert found(b"x/") == [("top/x" if ustar else "x", True, 0), second]
    assert found(b"x") == [("top/x" if ustar else "x", False, 512)]


def test_a_sparse_file_is_passed_over(push: Push) -> None:
    # Old GNU form: four pieces in the header, and a block of more.
    sparse = bytearray(header(b"lib/libc.so.6", kind=b"S", size=b"%011o\0" % len(GLIBC)))
    sparse[482] = 1
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse)
    content = GLIBC + bytes(-len(GLIBC) % 512)
    made = bytes(sparse) + bytes(504) + b"\1" + bytes(7) + bytes(512) + content + ONE
    facts = push(made).facts()
    assert (facts.interpreters, facts.glibc) == ({"3.11": PYTHON}, None)


def test_layers_of_many_members_and_of_none(push: Push) -> None:
    content = layer(file("x", os.urandom(100_000)), program(PYTHON[1:]))
    members = b"".join(gzip.compress(content[start : start + 777]) for start in range(0, len(content), 777))
    for made in ((GZIP, members), (OCI_LAYER, content)):
        assert push(made).facts().interpreters == {"3.11": PYTHON}


def test_what_follows_an_archive_is_no_part_of_it(push: Push) -> None:
    empty = gzip.compress(bytes(1024))
    assert push((GZIP, empty + gzip.compress(ONE))).facts().interpreters == {}
    assert push((OCI_LAYER, ONE + b"something else")).facts().interpreters == {"3.11": PYTHON}


# -- hostile layers


def damaged(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def pax(record: bytes) -> bytes:
    return header(b"PaxHeader", kind=b"x", size=b"%011o\0" % len(record)) + record + bytes(-len(record) % 512) + ONE


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (damaged(ONE, 3), "not a tar archive, or is damaged: bad checksum"),
        (b"not a tar archive" * 100, "not a tar archive"),
        (bytes(512) + ONE, "not a tar archive"),
        (ONE[:300], "not a tar archive, or is damaged: truncated header"),
        (layer(file("x", bytes(2000)))[:1500], "middle of a file"),
        (header(b"x", size=b"77777777777\0"), "middle of a file"),
        (header(b"x", size=b"\x80" + b"\xff" * 11), "impossible number"),
        (header(b"x", size=b"\xff" * 12), "impossible number"),
        (header(b"x", size=b"0000000000x\0"), "not a tar archive, or is damaged: invalid header"),
        (header(b"x", size=b"-0000000001\0"), "impossible number"),
        (header(b"x", size=b"+0000000001\0"), "impossible number"),
        (header(b"x", size=b"000000001_0\0"), "impossible number"),
        (header(b"x", size=b"0o000000017\0"), "impossible number"),
        (header(b"x", size=b"\0" + b"00000000017"), "impossible number"),
        (ONE[:1536] + header(b"x")[:400] + bytes(1000), "not a tar archive, or is damaged"),
        (ONE[:1024] + damaged(ONE, 3), "not a tar archive, or is damaged: bad checksum"),
        (header(b"x", mode=b"+000755\0"), "impossible number"),
        (header(b"x", mode=b"0_00755\0"), "impossible number"),
        (header(b"x", kind=b"x", size=b"00077777777\0"), "extended header is too large"),
        (header(b"x", kind=b"L", size=b"00077777777\0"), "extended header is too large"),
        (header(b"x", kind=b"L", size=b"00000001000\0"), "middle of a file"),
        (pax(b"garbage"), "malformed pax header"),
        (pax(b"0 path=x\n"), "malformed pax header"),
        (pax(b"99999999999 path=x\n"), "malformed pax header"),
        (pax(b"9 path=x\n9 path=y"), "malformed pax header"),
        (pax(b"12 path=x\0y\n"), "NUL"),
        (pax(b"10 size=-1\n"), "malformed pax header"),
        (pax(b"11 size=-1\n"), "impossible size"),
        (pax(b"33 size=999999999999999999999999\n"), "impossible size"),
        (layer(link("a", "b"), link("b", "a"), file("a/x")), "in a circle"),
        (layer(file("/".join(["a" * 200] * 30))), "path that is too long"),
        (layer(file("a" * 300)), "name that is too long"),
        (layer(link("a", "b" * 5000)), "link that is too long"),
        ((GZIP, gzip.compress(layer(file("x", os.urandom(5000))))[:3000]), "compressed content is cut off"),
        ((GZIP, b""), "compressed content is cut off"),
        ((GZIP, ONE), "not compressed with gzip"),
        ((GZIP, gzip.compress(ONE)[:10] + b"\x07" * 100), "is damaged"),
        ((GZIP, b"(\xb5/\xfd" + bytes(100)), "not compressed with gzip"),
    ],
)
def test_a_damaged_layer_is_refused_by_name(push: Push, made: bytes | tuple[str, bytes], message: str) -> None:
    pushed = push(LOWER, made)
    digest = pushed.image().layers[1].digest
    with pytest.raises(InvalidVersion, match=f"{pushed.reference} .*{digest} cannot be read: .*({message})") as caught:
        pushed.facts()
    assert "Dockerfile.template" in caught.value.remedy


def test_a_bomb_is_refused_early_and_in_bounded_memory(push: Push) -> None:
    first = gzip.compress(header(b"zeros", size=b"77777777777\0"))
    member = gzip.compress(bytes(64 << 20), 9)
    pushed = push((GZIP, first + member * 20))
    tracemalloc.start()
    with pytest.raises(InvalidVersion, match=r"more than \d+ bytes when it is not compressed"):
        pushed.facts()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


def test_an_image_with_too_many_names_is_refused(push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builder.oci.rootfs._MOST_BYTES", 100_000)
    few, many = (layer(*(file(f"d/{n}") for n in range(count))) for count in (100, 400))
    assert push(few).facts()
    with pytest.raises(InvalidVersion, match="too many names"):
        push(many).facts()


def test_links_that_lead_to_links_without_end_are_refused(push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builder.oci.rootfs._MOST_STEPS", 100_000)
    links = [link(f"l{n}", "/".join(["."] * 1000) + f"/l{n + 1}") for n in range(30)]
    files = [file(f"l0/{n}") for n in range(10)]
    with pytest.raises(InvalidVersion, match="paths and links are too long"):
        push(layer(*links, folder("l30"), *files)).facts()


def test_deep_directories_are_no_deep_recursion(push: Push) -> None:
    deep = "/".join(["a"] * 2000)
    opaque = layer(*(file("/".join(["a"] * depth) + "/.wh..wh..opq") for depth in range(2000, 0, -100)))
    made = [layer(program(f"{deep}/python3.11")), opaque, layer(file(f"{deep}/x"), folder(f"{deep}/bin")), ONE]
    assert push(*made).facts().interpreters == {"3.11": PYTHON}


def test_reading_a_base_image_writes_no_file(push: Push, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    push(layer(file("../escape", b"x"), file("/tmp/../../escape", b"x"), file(f"{tmp_path}/escape", b"x"))).facts()
    assert list(tmp_path.parent.glob("*/escape")) == []
    assert not (tmp_path.parent / "escape").exists()


def test_dots_lead_no_further_than_to_the_root(push: Push) -> None:
    made = layer(program("../../usr/bin/python3.11"), program("usr/lib/../bin/./python3.12"), file(".."), file("/"))
    assert set(push(made).facts().interpreters.values()) == {"/usr/bin/python3.11", "/usr/bin/python3.12"}


def test_a_blob_damaged_in_transit_is_a_service_error(push: Push) -> None:
    image = push(LOWER).image()
    with serve() as fake, Registries() as registries:
        blob = bytearray(gzip.compress(LOWER, 1))
        blob[30] ^= 0xFF
        fake.answer = lambda _: Reply(200, content=bytes(blob))
        moved = replace(image, reference=Repository(fake.host, "x").tag("v1"))
        with pytest.raises(ServiceUnavailable, match="with something else"):
            inspect_base(registries.for_host(fake.host), moved)


@pytest.mark.parametrize("step", [1, 7, 511, 512, 513, 100_000])
def test_pieces_of_any_size_make_the_same_archive(step: int) -> None:
    made = layer(file("a" * 150, b"1" * 700), file("b"), file("c", b"2" * 512), link("d", "e" * 200))
    archive = Archive(made[start : start + step] for start in range(0, len(made), step))
    found = [
        (entry.path, archive.content() if entry.path.startswith("a") else b"", entry.linkname) for entry in archive
    ]
    assert found == [("a" * 150, b"1" * 700, ""), ("b", b"", ""), ("c", b"", ""), ("d", b"", "e" * 200)]


# -- shared libraries, and Java

LIBC = file("lib/x86_64-linux-gnu/libc.so.6", GLIBC)


@pytest.mark.parametrize(
    "path",
    [
        "usr/lib/x86_64-linux-gnu/libgomp.so.1",
        "usr/lib64/libgomp.so.1",
        "usr/local/lib/libgomp.so.1",
        "opt/own/lib/libgomp.so.1",
        "opt/conda/lib/libgomp.so.1",
        "usr/local/cuda/lib64/libgomp.so.1",
        "srv/first/libgomp.so.1",
    ],
)
def test_libraries_are_found_where_programs_look_for_them(push: Push, path: str) -> None:
    loader = [
        file("etc/ld.so.conf", b"include /etc/ld.so.conf.d/*.conf\n/srv/first"),
        file("etc/ld.so.conf.d/cuda.conf", b"# CUDA's\n/usr/local/cuda/lib64 \n"),
    ]
    made = layer(LIBC, *loader, program("opt/conda/bin/python3.11"), file(path, b"\x7fELF"))
    facts = push(made, env=("LD_LIBRARY_PATH=/nowhere:/opt/own/lib",)).facts()
    assert facts.libraries == ("libc.so.6", "libgomp.so.1")


@pytest.mark.parametrize(
    "path",
    [
        "usr/share/libgomp.so.1",
        "opt/own/lib/libgomp.so.1",
        "usr/lib/libgomp.a",
        "usr/lib/lib\x1b.so",
        "usr/lib/libgomp.so.1/x",
    ],
)
def test_other_folders_and_other_files_have_no_libraries(push: Push, path: str) -> None:
    assert push(layer(LIBC, file(path, b"\x7fELF"))).facts().libraries == ("libc.so.6",)


def test_a_library_is_known_by_each_of_its_links_that_lead_to_one(push: Push) -> None:
    made = layer(
        LIBC,
        file("usr/lib/libz.so.1.2.13", b"\x7fELF"),
        link("usr/lib/libz.so.1", "libz.so.1.2.13"),
        link("usr/lib/libgone.so.1", "libgone.so.1.0"),
    )
    assert push(made).facts().libraries == ("libc.so.6", "libz.so.1", "libz.so.1.2.13")


def test_a_configuration_that_a_layer_takes_away_counts_no_more(push: Push) -> None:
    below = layer(LIBC, file("etc/ld.so.conf.d/own.conf", b"/srv/own\n"), file("srv/own/libx.so", b"\x7fELF"))
    assert push(below).facts().libraries == ("libc.so.6", "libx.so")
    assert push(below, layer(file("etc/ld.so.conf.d/.wh.own.conf"))).facts().libraries == ("libc.so.6",)


def test_libraries_without_a_known_loader_or_too_many_are_not_known(push: Push) -> None:
    assert push(layer(file("usr/lib/libz.so.1", b"\x7fELF"))).facts().libraries is None
    many = (file(f"usr/lib/lib{number:0200}.so") for number in range(5_500))
    assert push(layer(LIBC, *many)).facts().libraries is None


def test_folders_without_end_are_bounded(push: Push) -> None:
    lines = b"".join(b"/%x\n" % number for number in range(3_000))
    last = file("b/libx.so", b"\x7fELF")
    conf = [file(f"etc/ld.so.conf.d/{number:03}.conf", lines) for number in range(300)]
    assert push(layer(LIBC, last, *conf)).facts().libraries == ("libc.so.6", "libx.so")
    assert push(layer(LIBC, last, file("etc/ld.so.conf", b"/b\n" + b" " * (1 << 14)))).facts().libraries == (
        "libc.so.6",
    )


@pytest.mark.parametrize(
    ("entries", "env", "found"),
    [
        ([program("usr/bin/java")], (), True),
        ([program("usr/lib/jvm/17/bin/java"), link("usr/bin/java", "/etc/java"), link("etc/java", "/usr/lib/jvm/17/bin/java")], (), True),
        ([program("opt/java/bin/java")], (), False),
        ([program("opt/java/bin/java")], ("PATH=/opt/java/bin",), True),
        ([program("opt/java/bin/java")], ("JAVA_HOME=/opt/java",), True),
        ([program("bin/java")], ("PATH=/usr/bin", "JAVA_HOME="), False),
        ([file("usr/bin/java", b"x")], (), False),
        ([folder("usr/bin/java")], (), False),
        ([link("usr/bin/java", "/gone")], (), False),
        ([program("usr/bin/javac"), program("usr/bin/java.sh")], (), False),
        ([program("usr/bin/java")], ("PATH=relative:", "JAVA_HOME=usr"), False),
    ],
)  # fmt: skip
def test_java_is_found_where_programs_look_for_it(
    push: Push, entries: list[Made], env: tuple[str, ...], found: bool
) -> None:
    assert push(layer(*entries), env=env).facts().java is found


# -- zstd


@pytest.mark.parametrize("version", ["3.11.7", "3.13.0rc1", "3.12"])
def test_python_version_is_believed_beside_a_zstd_layer(push: Push, version: str) -> None:
    minor = ".".join(version.split(".")[:2])
    facts = push(ONE, (ZSTD, b"x"), env=(f"PYTHON_VERSION={version}",)).facts()
    interpreters = {minor: f"/usr/local/bin/python{minor}"}
    assert facts == BaseFacts(interpreters=interpreters, glibc=None, musl=False, occupied=False)


@pytest.mark.parametrize("env", [(), ("PYTHON_VERSION=",), ("PYTHON_VERSION=3",), ("PYTHON_VERSION=3.11/../x",)])
def test_a_zstd_layer_without_python_version_is_refused(push: Push, env: tuple[str, ...]) -> None:
    pushed = push((ZSTD, b"x"), env=env)
    with pytest.raises(InvalidVersion, match=f"{pushed.reference} .*zstd.*Dockerfile.template"):
        pushed.facts()


# -- the facts as they are kept

FACTS = BaseFacts(
    interpreters={"3.11": PYTHON, "3.9": "/opt/a b"[:6]},
    glibc=(2, 31),
    musl=True,
    occupied=True,
    java=True,
    libraries=("libc.so.6", "libstdc++.so.6.0.30"),
)


@pytest.mark.parametrize("facts", [FACTS, BaseFacts(interpreters={}, glibc=None, musl=False, occupied=False)])
def test_facts_come_back_as_they_were(facts: BaseFacts) -> None:
    assert BaseFacts.from_json(facts.to_json()) == facts


def test_the_same_facts_are_the_same_bytes() -> None:
    turned = FACTS.model_copy(update={"interpreters": dict(reversed(FACTS.interpreters.items()))})
    assert turned.to_json() == FACTS.to_json()


WRONG: dict[str, list[Any]] = {
    "version": [0, 1, True, "1", None],
    "interpreters": [
        None,
        [],
        {"3.11": 1},
        {"3": "/x"},
        {"3.11.2": "/x"},
        {"3.11": "x"},
        {"3.11": "/a b"},
        {"3.11": "/x\n"},
        {"3.11\n": "/x"},
        {"3.11": ""},
    ],
    "glibc": [[], [2], [2, 3, 4], [2, "3"], [2, True], [2, -1], [2.0, 3], [2, 1000], [1000, 2], "2.36", {}],
    "musl": [None, 0, "true"],
    "occupied": [None, 1, []],
    "java": [0, "true", []],
    "libraries": ["libz.so.1", {}, [1], [None], ["a/b.so"], ["x\x1b.so"], ["name"], [""], ["x" * 256 + ".so"]],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_invalid_facts_are_refused(key: str, value: Any) -> None:
    content = json.dumps({**json.loads(FACTS.to_json()), key: value}).encode()
    with pytest.raises(Malformed):
        BaseFacts.from_json(content)


def test_facts_with_more_or_less_in_them_are_refused() -> None:
    good = json.loads(FACTS.to_json())
    spoiled = [{**good, "more": 1}, *({k: v for k, v in good.items() if k != key} for key in good)]
    for each in itertools.chain((json.dumps(value).encode() for value in spoiled), (b"", b"[]", b"{", b"null")):
        with pytest.raises(Malformed):
            BaseFacts.from_json(each)
