"""Few indexes in place of many: what a dump tells of so that later ones need not read earlier indexes.

A tree that is dumped again and again consists of what many dumps brought in, each a little. To know all of
it, the next one would read as many indexes; left out, what they tell of would be stored again, and every
group of pages with one of these in it be looked for page by page. So a dump that finds itself referring to
chunks of many writes, beside its own index, what the small ones among them tell of the chunks that are still
in use. As files in a log-structured store do, what was merged grows, and is merged more seldom.

Left out are chunks of which hardly a page is in use: these pages are stored again by the next dump. Otherwise
an image would come to need many times what it maps, all of which a restore fetches, and `gc` has to keep.

What is merged tells of packs that other dumps wrote: see FORMAT.md for why it may be believed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crcli.image.container import ContainerKind, pack_container
from crcli.image.lookup import TableMaker
from crcli.image.names import IndexRef
from crcli.image.tables import join_mixed, pack_group, write_chunks, write_packs
from crcli.memory.blocks import DIGEST, GROUP_PAGES
from crcli.memory.extents import PAGE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from crcli.image.index import KnownChunks
    from crcli.image.tables import Chunk
    from crcli.store.base import Buffer

MOST_SEPARATE = 8
"""With fewer indexes nothing is merged."""

_LEAST_IN_USE = 1 / 4
"""A chunk of which less is in use is left out."""

_MOST_AGAIN = 1 / 32
"""But no more at a time than this share of all pages in use: the next dump should take no longer for it."""


def choose(sizes: Mapping[IndexRef, int], in_vain: Mapping[IndexRef, int]) -> list[IndexRef]:
    """Those of the indexes that are to be merged: the smallest, by the bytes that they tell of which are in
    use. So many that few are left, and those that are not larger than all that come before. And those that
    tell of as many bytes `in_vain`, in chunks of which hardly a page is in use, which then are left out."""
    if len(sizes) < MOST_SEPARATE:
        return []
    chosen, total = list[IndexRef](), 0
    for ref, size in sorted(sizes.items(), key=lambda item: item[1]):
        if size > total and len(sizes) - len(chosen) <= MOST_SEPARATE // 2:
            break
        chosen.append(ref)
        total += size
    return chosen + [ref for ref, size in sizes.items() if ref not in chosen and in_vain.get(ref, 0) > size]


def is_hardly_used(mapped: int, raw: int) -> bool:
    """Whether of a chunk of so many bytes so few are in use that the next dump had better store them anew."""
    return mapped < raw * _LEAST_IN_USE


def merge(
    known: KnownChunks,
    chosen: Sequence[IndexRef],
    adopted: Mapping[int, int],
    chunks: Sequence[Chunk],
    packs: Sequence[bytes],
    in_use: Mapping[int, int],
) -> bytes:
    """The object that tells what `chosen` tell of the chunks that an image refers to.

    `adopted` are those chunks by their numbers among the known, `chunks` and `packs` the image's tables, and
    `in_use` says how many pages the image has of each chunk of memory.
    """
    of = {adopted[number]: number for number in known.chunks_of(chosen) if number in adopted}.values()
    taken = sorted(
        set(of).difference(_hardly_used({number: adopted[number] for number in of}, chunks, in_use))
    )
    row = {number: at for at, number in enumerate(taken)}
    digests = b"".join(known.page_digests(taken))
    table = TableMaker()
    table.expect(len(digests) // DIGEST)
    table.add(digests)
    groups = b"".join(
        pack_group(row[chunk], page, GROUP_PAGES, digest) for chunk, page, digest in known.whole_groups(row)
    )
    numbers = {pack: number for number, pack in enumerate(packs)}
    mixed, parts = join_mixed(known.found_mixed_groups(chosen), numbers)
    sections: dict[str, Buffer] = {
        "PACK": write_packs(packs),
        "CHNK": write_chunks(chunks[adopted[number]] for number in taken),
        "PGDS": digests,
        "GRPS": groups,
        "MGRP": mixed,
        "MPRT": parts,
    }
    if found_by := table.table():
        sections["PTAB"] = found_by
    return pack_container(ContainerKind.INDEX, sections)


def _hardly_used(adopted: Mapping[int, int], chunks: Sequence[Chunk], in_use: Mapping[int, int]) -> set[int]:
    """The known chunks of which hardly a page is in use, those with least first; not too many."""
    shares = {
        known: in_use[number] * PAGE / chunks[number].raw
        for known, number in adopted.items()
        if chunks[number].is_memory and number in in_use
    }
    left = sum(in_use.values()) * _MOST_AGAIN
    found = set[int]()
    for known, share in sorted(shares.items(), key=lambda item: item[1]):
        left -= in_use[adopted[known]]
        if share >= _LEAST_IN_USE or left < 0:
            break
        found.add(known)
    return found
