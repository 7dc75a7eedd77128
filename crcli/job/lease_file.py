"""Where a job can read the number of its lease: a file of its own, at a path that moves with it.

The path stands in the job's environment, which no restore can change. So it is chosen when the job is
started, noted in its images, and used again on every node.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from crcli.image.lease import Lease

FOLDER = "/run/crcli/jobs"

_NAME = re.compile(r"[\w.+-]{1,160}\.lease", re.ASCII)


class LeaseFile:
    """The file of a job, which is there from when it is written to exit, whole at any instant."""

    def __init__(self, lease: Lease) -> None:
        """Of a job that is started afresh, until it is said to be another."""
        self.name = f"{lease.name}-{os.urandom(4).hex()}.lease"
        self._lease = lease

    @property
    def path(self) -> str:
        """Where the job looks."""
        return os.path.join(FOLDER, self.name)

    def follow(self, job: Mapping[str, Any]) -> None:
        """Be the file of a job that is brought back; `job` is what its image says of it."""
        name = str(job.get("lease_file", ""))
        self._remove()
        self.name = name if _NAME.fullmatch(name) else f"{self._lease.name}.lease"
        self.write()

    def write(self) -> None:
        """Write the number as it is now; where that cannot be done a job finds no file."""
        with suppress(OSError):
            os.makedirs(FOLDER, 0o755, exist_ok=True)
            with open(f"{self.path}.new", "w") as file:
                file.write(f"{self._lease.number}\n")
            os.replace(f"{self.path}.new", self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        """Unless it is another's by now, who has taken the job over on this host."""
        with suppress(OSError), open(self.path) as file:
            if file.read() == f"{self._lease.number}\n":
                os.unlink(self.path)
