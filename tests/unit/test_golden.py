"""Images of each format version are read for ever, and by whoever has read FORMAT.md."""

from __future__ import annotations

import copy
import json
import math
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from blake3 import blake3

from crcli.errors import ImageDamaged
from crcli.image import container as format_of_containers
from crcli.image import lookup, tables
from crcli.image.catalog import list_entries
from crcli.image.container import ContainerKind, pack_container, unpack_container
from crcli.image.index import KnownPagesOf, load_known
from crcli.image.manifest import Manifest, list_images, load
from crcli.image.names import ImageRef, check_name, index_key, manifest_key, new_image_id, parse_image
from crcli.image.packs import ChunkReader, PackWriter
from crcli.image.verify import verify
from crcli.image.weights import MemoryReader
from crcli.memory.blocks import Run
from crcli.memory.classify import Classifier
from crcli.memory.extents import PAGE, Origin, Source, SpaceKey, SpaceKind
from crcli.memory.weights.references import Piece, Reference
from crcli.memory.weights.views import View
from crcli.store.file import FileStore
from tests.support.images import make_image, pages
from tests.unit.golden.make import FIRST, SECOND, WEIGHTS, describe, random_page, text_page

GOLDEN = Path(__file__).parent / "golden"
DESCRIBED: list[dict[str, Any]] = json.loads((GOLDEN / "v1.json").read_text())

Pages = dict[tuple[int, int, int], bytes]
"""Every page of an image, by the kind and number of its space and by its page number."""


@pytest.fixture
def golden() -> FileStore:
    """The store that the first crcli wrote."""
    return FileStore(str(GOLDEN / "v1"))


# A second reader, written from FORMAT.md alone. It knows nothing of crcli, and takes a folder for the store.


@dataclass
class Sections:
    """A container taken apart."""

    kind: int
    bodies: dict[str, bytes]

    def records(self, tag: str, layout: str) -> Iterator[tuple[Any, ...]]:
        """The records of one table."""
        return struct.iter_unpack(layout, self.bodies[tag])


def restored(codec: int, stored: bytes, raw_size: int, digest: bytes) -> bytes:
    """A chunk or section as it was before it was stored, checked."""
    raw = stored if codec == 0 else zstandard.ZstdDecompressor().decompress(stored, max_output_size=raw_size)
    assert codec in (0, 1) and len(raw) == raw_size and blake3(raw).digest() == digest
    return raw


def take_apart(data: bytes) -> Sections:
    """Read a container by FORMAT.md."""
    magic, version, kind, count = struct.unpack_from("<8sHHI", data)
    assert magic == b"crcli\x00\x1a\n" and version in (1, 2)
    assert blake3(data[:-32]).digest() == data[-32:]
    found = Sections(kind, {})
    for number in range(count):
        tag, codec, offset, stored, raw, digest = struct.unpack_from("<4sIQQQ32s", data, 16 + 64 * number)
        body = data[offset : offset + stored]
        found.bodies[tag.decode("ascii")] = restored(codec, body, raw, digest)
    return found


def pack_ids(sections: Sections) -> list[str]:
    """The pack table, in hexadecimal."""
    return [pack.hex() for (pack,) in sections.records("PACK", "16s")]


def described(data: bytes) -> dict[str, Any]:
    """A manifest by FORMAT.md, in the words of v1.json."""
    sections = take_apart(data)
    assert sections.kind == 1
    head = json.loads(sections.bodies["META"])
    extents = sections.records("EXTN", "<QIIHBB")
    spaces = [
        {
            "kind": kind,
            "number": number,
            "extents": [
                [start, count, source, chunk, offset, bool(flags & 1)]
                for start, count, chunk, offset, source, flags in (next(extents) for _ in range(extent_count))
            ],
        }
        for kind, number, extent_count in sections.records("SPCE", "<IQI")
    ]
    assert next(extents, None) is None
    weights = described_weights(sections, head) if "weights" in head else {}
    return {
        "name": head.pop("name"),
        "id": head.pop("id"),
        "packs": pack_ids(sections),
        "chunks": [
            [pack, raw, offset, stored, codec, bool(memory), digest.hex()]
            for pack, raw, offset, stored, codec, memory, digest in sections.records("CHNK", "<IIQIHH32s")
        ],
        "spaces": spaces,
        "skeleton": head.pop("skeleton"),
        "files": head.pop("files"),
        "meta": head,
        **weights,
    }


def described_weights(sections: Sections, head: dict[str, Any]) -> dict[str, Any]:
    """The references of version 2."""
    rows = sections.records("WPCE", "<IHHQI")
    references = []
    for count, raw, digest in sections.records("WREF", "<II32s"):
        pieces = [next(rows) for _ in range(count)]
        assert sum(length for *_, length in pieces) == raw
        listed = [[file, view, offset, length] for file, view, _, offset, length in pieces]
        references.append([listed, raw, digest.hex()])
    assert next(rows, None) is None
    return {"weights": head.pop("weights"), "references": references}


ELEMENTS = {0: (1, 1), 1: (4, 2), 2: (4, 2), 3: (2, 4), 4: (2, 4), 5: (8, 4)}
"""For each view the bytes of an element in the file and in memory."""


def viewed(view: int, raw: bytes) -> bytes:
    """What becomes of a file's bytes."""
    if view == 1:
        words = [word[0] for word in struct.iter_unpack("<I", raw)]
        return b"".join(
            struct.pack("<H", (word + 0x7FFF + (word >> 16 & 1)) >> 16 & 0xFFFF) for word in words
        )
    if view == 3:
        return b"".join(b"\0\0" + word for (word,) in struct.iter_unpack("2s", raw))
    kinds = {2: ("<f4", "<f2"), 4: ("<f2", "<f4"), 5: ("<f8", "<f4")}
    if view in kinds:
        with np.errstate(all="ignore"):
            return bytes(np.frombuffer(raw, kinds[view][0]).astype(kinds[view][1]).tobytes())
    return raw


@dataclass
class Reader:
    """Reads an image's bytes out of a folder by FORMAT.md."""

    folder: Path
    image: dict[str, Any]

    def chunk(self, number: int) -> bytes:
        """The raw bytes of one chunk."""
        pack, raw, offset, stored, codec, _, digest = self.image["chunks"][number]
        name = self.image["packs"][pack]
        whole = (self.folder / "packs" / name[:2] / name).read_bytes()
        assert whole.startswith(b"crclipk\x01")
        return restored(codec, whole[offset : offset + stored], raw, bytes.fromhex(digest))

    def reference(self, number: int, weights: dict[str, bytes]) -> bytes:
        """The bytes of memory that a reference stands for; `weights` are the files by name."""
        pieces, raw, digest = self.image["references"][number]
        found = b""
        for file, view, offset, length in pieces:
            data = weights[Path(self.image["weights"][file]["path"]).name]
            here, there = ELEMENTS[view]
            found += viewed(view, data[offset : offset + length // there * here])
        assert len(found) == raw and blake3(found).hexdigest() == digest
        return found

    def memory(self, weights: dict[str, bytes] | None = None) -> Pages:
        """Every page."""
        found: Pages = {}
        for space in self.image["spaces"]:
            for start, count, source, chunk, offset, _ in space["extents"]:
                assert source in (0, 1, 2)
                if source == 2:
                    raw = self.reference(chunk, weights or {})[offset * 4096 :]
                else:
                    raw = self.chunk(chunk)[offset * 4096 :] if source else bytes(count * 4096)
                for page in range(count):
                    key = (space["kind"], space["number"], start + page)
                    found[key] = raw[page * 4096 : (page + 1) * 4096]
        return found

    def files(self) -> dict[str, bytes]:
        """Every file, CRIU's images too, by name."""
        files = [*self.image["skeleton"], *self.image["files"]]
        found = {file["name"]: b"".join(map(self.chunk, file["chunks"])) for file in files}
        assert all(len(found[file["name"]]) == file["size"] for file in files)
        return found

    def page_digests(self, image_id: str) -> dict[str, tuple[str, int, int]]:
        """What an index tells: for each digest the pack, the chunk's offset in it, the page in the chunk."""
        sections = take_apart((self.folder / "indexes" / f"{image_id}.index").read_bytes())
        assert sections.kind == 2
        packs = pack_ids(sections)
        listed = (self.folder / "indexes" / f"{image_id}.pages").read_bytes()
        assert sections.bodies["PGHS"] == blake3(listed).digest()
        digests = struct.iter_unpack("32s", listed)
        found = {}
        for pack, raw, offset, _, _, memory, _ in sections.records("CHNK", "<IIQIHH32s"):
            for page in range(raw // 4096 if memory else 0):
                found[next(digests)[0].hex()] = (packs[pack], offset, page)
        assert next(digests, None) is None
        return found


# The same, by crcli.


def memory_of(store: FileStore, manifest: Manifest, mapped: tuple[tuple[str, str], ...] = ()) -> Pages:
    """Every page of an image as crcli reads it."""
    reader = MemoryReader(store, manifest, ChunkReader(store, manifest.packs, manifest.chunks), mapped)
    found: Pages = {}
    for space, extents in manifest.spaces.items():
        for extent in extents:
            raw = bytes(extent.pages * PAGE)
            if extent.source != Source.ZERO:
                ((_, whole),) = reader.read([Origin(extent.source, extent.chunk)])
                raw = bytes(whole)[extent.offset * PAGE :]
            for page in range(extent.pages):
                key = (int(space.kind), space.number, extent.start + page)
                found[key] = raw[page * PAGE : (page + 1) * PAGE]
    return found


def files_of(store: FileStore, manifest: Manifest) -> dict[str, bytes]:
    """Every file of an image as crcli reads it."""
    reader = ChunkReader(store, manifest.packs, manifest.chunks)
    return {file.name: reader.blob(file.chunks) for file in (*manifest.skeleton, *manifest.files)}


@pytest.mark.parametrize("image", DESCRIBED, ids=[FIRST, SECOND])
def test_version_1_says_for_ever_what_it_said_first(golden: FileStore, image: dict[str, Any]) -> None:
    """The manifests that the first crcli wrote decode to the description of that day, and are whole."""
    ref = ImageRef("golden", image["id"])
    assert describe(load(golden, ref)) == image
    assert verify(golden, ref).damage == []


def test_version_1_holds_for_ever_what_it_held(golden: FileStore) -> None:
    """Pages and files of the golden images, spelled out."""
    heap = 0x55555_5555
    first = load(golden, ImageRef("golden", FIRST))
    memory = memory_of(golden, first)
    assert [memory[1, 4711, heap + n] for n in range(5)] == [*map(text_page, range(4)), bytes(PAGE)]
    assert memory[1, 4711, 0x7FFFF_FFF0] == random_page(1)
    assert memory[2, 0xFFFF_FFF2, 0] == text_page(3)
    assert files_of(golden, first)["/var/log/agent.log"] == b"first\nsecond\n"
    newest = load(golden, ImageRef("golden"))
    memory = memory_of(golden, newest)
    assert [memory[1, 4711, heap + n] for n in range(4)] == [text_page(n) for n in (2, 3, 9, 10)]
    assert files_of(golden, newest)["/var/log/agent.log"] == b"first\nthird\n"


def test_version_1_is_listed_and_known(golden: FileStore) -> None:
    """Names resolve, listings read one section, and a later dump finds the pages that are there."""
    assert [ref.id for ref, _ in list_images(golden)] == [FIRST, SECOND]
    entries = list_entries(golden)
    assert [entry.damage for entry in entries] == ["", ""]
    assert entries[0].command == "agent --name Grüße not-UTF-8-\udcff"
    known = load_known(golden, "golden")
    asked = [blake3(page).digest() for page in (text_page(3), random_page(1), text_page(10), text_page(99))]
    *found, unknown = known.find_pages(asked)
    assert unknown is None
    places = [(known.chunk_of(page), page) for page in found if page is not None]
    assert all(first <= page < end for (_, first, end), page in places)
    where = [(*known.chunk(number), page - first) for (number, first, _), page in places]
    short = [(pack[-1], chunk.offset, page) for pack, chunk, page in where]
    assert short == [(1, 8, 3), (1, 57, 0), (6, 8, 1)]


@pytest.mark.parametrize("image", DESCRIBED, ids=[FIRST, SECOND])
def test_a_second_reader_reads_version_1(golden: FileStore, image: dict[str, Any]) -> None:
    """FORMAT.md is exact: what is written from it alone reads the golden images as crcli does."""
    assert described(golden.get(manifest_key("golden", image["id"]))) == image
    reader, manifest = Reader(GOLDEN / "v1", image), load(golden, ImageRef("golden", image["id"]))
    assert reader.memory() == memory_of(golden, manifest)
    assert reader.files() == files_of(golden, manifest)


def test_a_second_reader_reads_what_is_written_today(tmp_path: Path) -> None:
    """FORMAT.md is up to date: images written now, one on top of the other, are read by it too."""
    store = FileStore(str(tmp_path))
    store.warm(for_writing=True)
    memory = [*pages(1, 3), text_page(1), text_page(2)]
    first = make_image(store, "agent", memory[:4], file=b"log " * 5000)
    second = make_image(store, "agent", memory)
    for ref in (first, second):
        manifest = load(store, ref)
        image = described(store.get(manifest_key(ref.name, ref.id)))
        assert image == describe(manifest)
        reader = Reader(tmp_path, image)
        assert reader.memory() == memory_of(store, manifest)
        assert reader.files() == files_of(store, manifest)
    assert len(manifest.packs) == 2  # its own, and that of the first
    assert list(reader.page_digests(second.id)) == [blake3(memory[4]).hexdigest()]


def test_a_second_reader_finds_mixed_groups(tmp_path: Path) -> None:
    """Each digest of an index's mixed groups is that of the pages which its parts name, zero pages too."""
    store = FileStore(str(tmp_path))
    store.warm(for_writing=True)
    space = SpaceKey(SpaceKind.PROCESS, 4711)
    memory = [*pages(1, 15), bytes(PAGE)]
    chunks: dict[tuple[str, int], list[Any]] = {}
    for number in range(2):
        memory[3 * number] = pages(2 + number, 1)[0]
        known = load_known(store, "agent")
        writer = PackWriter(store, image_id := new_image_id(), known)
        classifier = Classifier(KnownPagesOf(known, writer.adopt), writer)
        classifier.classify(bytearray(b"".join(memory)), [Run(space, 0, 16, True, 0)])
        classifier.finish()
        writer.seal()
        writer.close()
        sections = take_apart(store.get(index_key(image_id)))
        packs = pack_ids(sections)
        for pack, raw, offset, stored, codec, _, digest in sections.records("CHNK", "<IIQIHH32s"):
            chunks[packs[pack], offset] = [stored, codec, raw, digest]
    parts = list(sections.records("MPRT", "<IQHH"))
    ((count, digest),) = sections.records("MGRP", "<I32s")
    found = b""
    for pack, offset, page, length in parts:
        if pack == 0xFFFFFFFF:
            found += bytes(4096 * length)
            continue
        stored, codec, raw, proof = chunks[packs[pack], offset]
        body = (tmp_path / "packs" / packs[pack][:2] / packs[pack]).read_bytes()[offset : offset + stored]
        found += restored(codec, body, raw, proof)[4096 * page : 4096 * (page + length)]
    assert count == len(parts) == 4 and found == b"".join(memory) and blake3(found).digest() == digest


def test_a_second_reader_finds_page_digests_by_their_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search as FORMAT.md has it ends at the row of each digest, and at none for others."""
    monkeypatch.setattr(lookup, "WORTH_A_TABLE", 1)
    ref = make_image(FileStore(str(tmp_path)), "agent", pages(1, 300))
    sections = take_apart((tmp_path / f"indexes/{ref.id}.index").read_bytes())
    table = struct.unpack("<512I", sections.bodies["PTAB"])
    listed = (tmp_path / f"indexes/{ref.id}.pages").read_bytes()
    digests = [listed[at : at + 32] for at in range(0, len(listed), 32)]

    def search(digest: bytes) -> int | None:
        entry = int.from_bytes(digest[:4], "little") % len(table)
        while table[entry] and digests[table[entry] - 1] != digest:
            entry = (entry + 1) % len(table)
        return table[entry] - 1 if table[entry] else None

    assert list(map(search, digests)) == list(range(300))
    assert {search(blake3(page).digest()) for page in pages(2, 300)} == {None}


@pytest.mark.parametrize(("number", "count"), [(0, 5), (1, 2)])
def test_page_digests_belong_to_the_chunks_of_their_index(number: int, count: int) -> None:
    """Each digest of a `.pages` object is that of the page which the pairing of FORMAT.md names."""
    image = DESCRIBED[number]
    reader = Reader(GOLDEN / "v1", image)
    by_place = {(image["packs"][chunk[0]], chunk[2]): n for n, chunk in enumerate(image["chunks"])}
    digests = reader.page_digests(image["id"])
    assert len(digests) == count
    for digest, (pack, offset, page) in digests.items():
        raw = reader.chunk(by_place[pack, offset])
        assert blake3(raw[page * 4096 : (page + 1) * 4096]).hexdigest() == digest


SECOND_VERSION: dict[str, Any] = json.loads((GOLDEN / "v2.json").read_text())[0]


def test_version_2_is_read_by_both(tmp_path: Path) -> None:
    """Its references come from a file here and one in the store; both readers make the same pages of them."""
    store = FileStore(str(GOLDEN / "v2"))
    ref = ImageRef("golden", FIRST)
    manifest = load(store, ref)
    assert describe(manifest) == described(store.get(manifest_key("golden", FIRST))) == SECOND_VERSION
    (tmp_path / "model.bin").write_bytes(WEIGHTS["model.bin"])
    memory = memory_of(store, manifest, (("/models", str(tmp_path)),))
    assert memory == Reader(GOLDEN / "v2", SECOND_VERSION).memory(WEIGHTS)
    assert memory[1, 4711, 1] == WEIGHTS["model.bin"][3 + PAGE : 3 + 2 * PAGE]
    report = verify(store, ref)
    assert report.damage == [] and report.weights_missing == ["/models/model.bin"]


def test_references_that_are_not_whole_are_refused() -> None:
    """Tables that are cut short, pieces that do not add up, files and views that do not exist."""
    pieces = (Piece(0, View.BYTES, 5, 2 * PAGE),)
    table, rows = tables.write_references([Reference(pieces, 2 * PAGE, bytes(32))])
    assert tables.read_references(table, rows, 1, "x")[0].pieces == pieces
    for bad_table, bad_rows, files in (
        (table[:-1], rows, 1),
        (table, rows[:-1], 1),
        (table, b"", 1),
        (table, rows * 2, 1),
        (table, rows, 0),
        (table.replace(b"\x00\x20", b"\x00\x10", 1), rows, 1),
        (table, rows[:4] + b"\x63\x00" + rows[6:], 1),
    ):
        with pytest.raises(ImageDamaged):
            tables.read_references(bad_table, bad_rows, files, "x")


def test_a_newer_version_is_refused_by_its_number(golden: FileStore) -> None:
    """The version is looked at before anything else can be misread, the seal included."""
    data = bytearray(golden.get(manifest_key("golden", FIRST)))
    struct.pack_into("<H", data, 8, 3)
    with pytest.raises(ImageDamaged, match=re.escape("of format 3; this crcli reads up to 2")):
        Manifest.decode(bytes(data), "golden")


@pytest.mark.parametrize("at", [0, 11, 20, 400, -33, -1])
def test_no_byte_of_a_manifest_can_change(golden: FileStore, at: int) -> None:
    """The magic, the kind, a section's entry, a body, the seal: whatever is altered, the image is refused."""
    data = bytearray(golden.get(manifest_key("golden", FIRST)))
    data[at] ^= 1
    with pytest.raises(ImageDamaged):
        Manifest.decode(bytes(data), "golden")


Head = dict[str, Any]


def sealed(golden: FileStore, change: Callable[[Head], object], version: int = 1) -> bytes:
    """A manifest, whole and sealed, whose JSON head was changed."""
    sections = take_apart(golden.get(manifest_key("golden", FIRST))).bodies
    head = json.loads(sections["META"])
    change(head)
    return pack_container(
        ContainerKind.MANIFEST, {**sections, "META": json.dumps(head).encode()}, version=version
    )


HEADS: dict[str, Callable[[Head], object]] = {
    "a path out of the skeleton": lambda head: head["skeleton"][0].update(name="../../escaped.img"),
    "a full path in the skeleton": lambda head: head["skeleton"][0].update(name="/tmp/escaped.img"),
    "a folder in the skeleton": lambda head: head["skeleton"][0].update(name=".."),
    "no name in the skeleton": lambda head: head["skeleton"][0].update(name=""),
    "one name twice in the skeleton": lambda head: head["skeleton"].append(head["skeleton"][0]),
    "a relative path of a file": lambda head: head["files"][0].update(name="log/agent.log"),
    "a path with a zero byte": lambda head: head["files"][0].update(name="/var/log/a\0b"),
    "a chunk before the first": lambda head: head["files"][0].update(chunks=[-1]),
    "a chunk behind the last": lambda head: head["files"][0].update(chunks=[1 << 40]),
    "a size that its chunks do not have": lambda head: head["files"][0].update(size=1),
    "a size without end": lambda head: head["files"][0].update(size=float("inf")),
    "a number that is none": lambda head: head["files"][0].update(mode="rw"),
    "no files": lambda head: head.pop("files"),
}


@pytest.mark.parametrize("change", HEADS.values(), ids=HEADS)
def test_a_manifest_that_makes_no_sense_is_refused(
    golden: FileStore, change: Callable[[Head], object]
) -> None:
    """A seal proves that nothing was damaged, and not that a dump wrote it: what a manifest says is looked at
    before anything is done with it. A name of the skeleton, for instance, is a file that a restore writes."""
    assert Manifest.decode(sealed(golden, lambda head: None), "golden").id == FIRST
    with pytest.raises(ImageDamaged):
        Manifest.decode(sealed(golden, change), "golden")


DOCUMENTED: Head = {
    "host": {"criu": "4.2", "page_size": 4096},
    "tree": [
        {
            "pid": 4711, "comm": "agent", "argv": ["agent"], "exe": "/bin/agent", "cwd": "/", "uid": 0,
            "threads": 1, "cpus": "0-3,8", "core_filter": 51,
            "settings": {"4711": {"cpus": "1", "io_priority": 8196, "slack_ns": 1}},
        }
    ],
    "own_packs": [0],
    "counts": {"total": 4096, "weights": 0},
    "indexes": [FIRST],
    "merged": [FIRST],
    "opened": [
        {"path": "/bin/agent", "size": 1, "mode": 33261, "build_id": "", "hash": "", "unhashed": "late"}
    ],
    "databases": [{"path": "/tmp/db", "device": 1, "inode": 2}],
    "folders": [{"path": "/tmp", "mode": 1023, "uid": 0, "gid": 0}],
    "mounts": [{"point": "/mnt", "fstype": "ext4", "source": "/dev/vda"}],
    "cgroups": ["2:cpu,cpuacct:/", "1:name=systemd:/", "0::/user.slice"],
    "plugins": [{"name": "one", "package": "of", "version": "1"}],
    "job": {
        "identity": "00", "argv": ["agent"], "cwd": "/", "files": {"agent.py": "00"},
        "environment": {"A": "00"}, "weights": {"model": "1"}, "lease": 1, "holder": "00",
        "lease_file": "job.lease", "cpu_baseline": ["sse"], "watched": "1/2/3",
        "purpose": "leave", "failures": 0, "ran_s": 1.5,
    },
    "gpu": {
        "host": {
            "driver": "580.95.05", "api": 13000, "custom_storage": False,
            "gpus": [
                {
                    "uuid": "GPU-1", "name": "H100", "index": 0, "minor": -1, "memory_bytes": 1,
                    "compute": "9.0", "persistence": True, "mig": False, "free_bytes": -1,
                }
            ],
        },
        "processes": [{"pid": 4711, "used": {"GPU-1": 1}, "saved": [[1, 2]]}],
    },
}  # fmt: skip
"""What FORMAT.md has beyond the golden images' heads."""


def places_in(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Where there is something in a head, and what; of a list its first only."""
    if place:
        yield place, value
    if isinstance(value, dict):
        for name in value:
            yield from places_in(value[name], (*place, name))
    elif isinstance(value, list) and value:
        yield from places_in(value[0], (*place, 0))


@pytest.mark.parametrize(
    "nonsense",
    [None, -2, 1 << 64, math.nan, math.inf, "\ud800", [None], [[]], {"a": None}, [{"a": None}]],
    ids=["null", "negative", "large", "nan", "infinite", "no text", "list", "lists", "object", "objects"],
)
def test_nothing_in_a_head_can_be_something_else(golden: FileStore, nonsense: Any) -> None:
    """Whichever field it is, of every kind that there is: the image is damaged, and nobody who reads that
    field later meets what he cannot handle."""
    whole = json.loads(take_apart(sealed(golden, lambda head: head.update(DOCUMENTED))).bodies["META"])
    assert Manifest.decode(sealed(golden, lambda head: head.update(whole)), "golden").id == FIRST
    passed = []
    for place, value in places_in(whole):
        if isinstance(value, dict) and isinstance(nonsense, dict):
            continue
        head = copy.deepcopy(whole)
        *folders, last = place
        at: Any = head
        for name in folders:
            at = at[name]
        at[last] = nonsense
        try:
            Manifest.decode(sealed(golden, lambda old, new=head: old.update(new)), "golden")  # type: ignore[misc]
        except ImageDamaged:
            continue
        passed.append(place)
    assert {place for place in passed if place[-1] != "mtime_ns"} == set(), "a time may be before 1970"


def test_memory_of_nobody_is_refused(golden: FileStore) -> None:
    """Memory of a process that is not in the tree, and of one process twice."""
    sections = take_apart(golden.get(manifest_key("golden", FIRST))).bodies
    (kind, pid, count), *others = struct.iter_unpack("<IQI", sections["SPCE"])
    for spaces in ([(kind, pid + 100, count), *others], [(kind, pid, count), *others, (kind, pid, 0)]):
        table = b"".join(struct.pack("<IQI", *space) for space in spaces)
        with pytest.raises(ImageDamaged):
            Manifest.decode(pack_container(ContainerKind.MANIFEST, {**sections, "SPCE": table}), "golden")


def container(*sections: tuple[bytes, bytes]) -> bytes:
    """A manifest of these raw sections, each stored as one Zstandard frame."""
    head = struct.pack("<8sHHI", b"crcli\x00\x1a\n", 1, 1, len(sections))
    offset, entries, bodies = 16 + 64 * len(sections), b"", b""
    for tag, body in sections:
        frame = zstandard.compress(body)
        entries += struct.pack("<4sIQQQ32s", tag, 1, offset, len(frame), len(body), blake3(body).digest())
        offset, bodies = offset + len(frame), bodies + frame
    return head + entries + bodies + blake3(head + entries + bodies).digest()


@pytest.mark.parametrize(
    ("tag", "body", "match"),
    [
        (b"MET\xff", b"{}", "META"),
        (b"PACK", b"", "twice"),
        (b"META", b"[" * 100_000, "recursion"),
        (b"META", b" " * (257 << 20), "too large"),
    ],
    ids=["a tag that is no text", "a tag twice", "a head without bottom", "a head that grows when read"],
)
def test_a_container_that_makes_no_sense_is_refused(
    golden: FileStore, tag: bytes, body: bytes, match: str
) -> None:
    """Whoever may write into a store can neither take down who lists it, nor fill that host's memory."""
    sections = take_apart(golden.get(manifest_key("golden", FIRST))).bodies
    head = [] if tag.startswith(b"MET") else [(b"META", sections["META"])]
    others = [(name.encode(), raw) for name, raw in sections.items() if name != "META"]
    with pytest.raises(ImageDamaged, match=match):
        Manifest.decode(container(*head, (tag, body), *others), "x")


def test_chunks_are_no_larger_than_an_extent_can_name(golden: FileStore) -> None:
    """A few hundred bytes of a pack could stand for gigabytes, which a reader would make room for."""
    sections = dict(take_apart(golden.get(manifest_key("golden", FIRST))).bodies)
    pack, _, *rest = next(struct.iter_unpack("<IIQIHH32s", sections["CHNK"]))
    for raw, is_right in ((256 << 20, True), ((256 << 20) + 1, False)):
        more = struct.pack("<IIQIHH32s", pack, raw, *rest)
        data = pack_container(ContainerKind.MANIFEST, {**sections, "CHNK": sections["CHNK"] + more})
        if is_right:
            Manifest.decode(data, "x")
            continue
        with pytest.raises(ImageDamaged, match="larger"):
            Manifest.decode(data, "x")


def test_the_sections_of_an_object_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few hundred bytes of each of many sections could stand for gigabytes."""
    monkeypatch.setattr(format_of_containers, "_RAW_LIMIT", 1 << 20)
    sections = [(b"A%03d" % number, bytes(600 << 10)) for number in range(2)]
    with pytest.raises(ImageDamaged, match="too large"):
        unpack_container(container(*sections), ContainerKind.MANIFEST, "x")


def test_names_of_version_1_are_names() -> None:
    """Ids and names as FORMAT.md gives them are taken from the command line."""
    assert parse_image(f"golden@{FIRST}") == (None, ImageRef("golden", FIRST))
    assert check_name("A-name_with.every+sign")
