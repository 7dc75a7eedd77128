"""What CRIU's images say of the tree: processes, and their threads."""

from __future__ import annotations

from crcli.criu import messages
from crcli.criu.images import ImageFile, join_threads_to_leaders, read_tree

ALIVE, DEAD = 1, 2
GARBAGE = 2079925488


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
