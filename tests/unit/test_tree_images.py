"""What CRIU's images say of the tree: processes, their threads, and where their memory is to be found."""

from __future__ import annotations

import os
from pathlib import Path

from crcli.criu import messages
from crcli.criu.images import ImageFile, join_threads_to_leaders, read_tree
from crcli.criu.skeleton import laid_out_memory
from crcli.criu.workspace import Workspace
from crcli.memory.extents import PAGE, Extent, Source, SpaceKey, SpaceKind
from crcli.memory.replay import Inherited, Run

ALIVE, DEAD = 1, 2
GARBAGE = 2079925488
IN_PARENT, PRESENT = 1, 4


class Folder(dict[str, bytes]):
    """Images in memory."""

    def names(self) -> list[str]:
        """Sorted, as those of a folder."""
        return sorted(self)

    def read(self, name: str) -> bytes:
        """One image."""
        return self[name]

    def write(self, name: str, data: bytes) -> None:
        """Keep an image."""
        self[name] = data


def image(*entries: object) -> bytes:
    """An image file that holds these messages."""
    return ImageFile(bytes(4), list(entries)).encode()


def core(state: int) -> bytes:
    """What CRIU writes of a process in this state."""
    entry = messages.core_entry()
    entry.mtype = 1
    entry.tc.task_state, entry.tc.comm = state, "true"
    entry.tc.personality = entry.tc.flags = entry.tc.blk_sigset = entry.tc.exit_code = 0
    if state == ALIVE:
        entry.thread_core.cg_set = 1
        entry.thread_core.futex_rla = entry.thread_core.futex_rla_len = 0
    return image(entry)


def test_threads_that_a_dead_process_never_had_are_left_out() -> None:
    """CRIU has written what happened to be in its memory ("core-2079925488.img: no such file")."""
    processes = [
        messages.pstree_entry(pid=5, ppid=0, pgid=5, sid=5, threads=[5, 6]),
        messages.pstree_entry(pid=7, ppid=5, pgid=5, sid=5, threads=[GARBAGE]),
    ]
    folder = Folder({"pstree.img": image(*processes), "core-7.img": core(DEAD)})
    folder |= {f"core-{thread}.img": core(ALIVE) for thread in (5, 6)}
    join_threads_to_leaders(folder)  # type: ignore[arg-type]
    root, child = read_tree(folder)
    assert (root.threads, root.alive) == ((5, 6), True)
    assert (child.threads, child.alive) == ((), False)


def test_what_children_inherit_is_laid_out_once(tmp_path: Path) -> None:
    """A child's pagemap sends CRIU to its parent's page file for what it inherits; its own holds the rest."""
    parent, child = (SpaceKey(SpaceKind.PROCESS, pid) for pid in (5, 6))
    early = {
        parent: [Extent(10, 4, Source.CHUNK, 0, 0), Extent(14, 2, Source.CHUNK, 1, 0)],
        child: [Extent(12, 1, Source.CHUNK, 2, 0), Extent(40, 3, Source.ZERO)],
    }
    inherited = {child: Inherited(parent, [Run(10, 2), Run(13, 1), Run(14, 2)])}
    images = Workspace(os.open(tmp_path, os.O_RDONLY))
    with images, laid_out_memory(images, early, inherited) as places:
        assert [os.fstat(fd).st_size // PAGE for fd, _ in places.values()] == [6, 4]
        assert places[child][1] == {12: 0, 40: PAGE}
    parents = tmp_path / "parent"
    assert page_runs(tmp_path / "pagemap-5.img") == (1, [(10, 6, PRESENT)])
    assert page_runs(tmp_path / "pagemap-6.img") == (
        2,
        [(10, 2, IN_PARENT), (12, 1, PRESENT), (13, 3, IN_PARENT), (40, 3, PRESENT)],
    )
    assert page_runs(parents / "pagemap-6.img") == (1, [(10, 6, PRESENT)])
    assert (parents / "pages-1.img").samefile(tmp_path / "pages-1.img")


def page_runs(path: Path) -> tuple[int, list[tuple[int, int, int]]]:
    """Which page file a pagemap is of, and its runs: first page, pages, flags."""
    data = path.read_bytes()
    size = int.from_bytes(data[8:12], "little")
    head = messages.pagemap_head.FromString(data[12 : 12 + size])
    entries = ImageFile.parse(data[:8] + data[12 + size :], messages.pagemap_entry).entries
    return head.pages_id, [(entry.vaddr // PAGE, entry.nr_pages, entry.flags) for entry in entries]
