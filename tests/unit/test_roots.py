"""Where a path of a tree with another root lies on this host."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from crcli.pipeline.roots import below


@pytest.fixture
def root(tmp_path: Path) -> str:
    """A root with folders, and links of every kind."""
    (tmp_path / "usr" / "lib").mkdir(parents=True)
    for name, target in {
        "lib": "usr/lib",
        "absolute": "/usr/lib",
        "above": "../../../../etc",
        "shm": "/dev/shm",
        "round": "/round",
        "twice": "absolute",
    }.items():
        os.symlink(target, tmp_path / name)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("path", "inside"),
    [
        ("/file", "/file"),
        ("/usr/lib/x", "/usr/lib/x"),
        ("/lib/x", "/usr/lib/x"),
        ("/absolute/x", "/usr/lib/x"),
        ("/twice/x", "/usr/lib/x"),
        ("/usr/../lib/./x", "/usr/lib/x"),
        ("/above/passwd", "/etc/passwd"),
        ("/../../etc/passwd", "/etc/passwd"),
        ("/not/there/yet", "/not/there/yet"),
        ("/lib", "/lib"),
    ],
)
def test_links_stay_inside_the_root(root: str, path: str, inside: str) -> None:
    """Links in a path's folders lead where they do for the tree, never out of its root; the last is kept."""
    assert below(root, path) == root + inside


@pytest.mark.parametrize("path", ["/dev/shm/x", "/shm/x", "/proc/1/stat", "/sys/x", "anon_inode:[x]", ""])
def test_what_the_kernel_makes_is_this_hosts(root: str, path: str) -> None:
    """Devices and the kernel's own files are this host's; what is no path stays as it is."""
    assert below(root, path) == path.replace("/shm/x", "/dev/shm/x").replace("/dev/dev", "/dev")


def test_without_another_root_nothing_changes() -> None:
    """No root given: every path is what it is, not even looked at."""
    assert below("", "/no/../where") == "/no/../where"


def test_links_that_lead_nowhere_end(root: str) -> None:
    """A link to itself is an error, not an endless loop."""
    with pytest.raises(OSError, match="too many symbolic links"):
        below(root, "/round/x")
