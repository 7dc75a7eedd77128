"""Where the command starts: `crcli`, and `python -m crcli`."""

from __future__ import annotations

import gc
import os
import sys

_GARBAGE = 100_000
"""After so many new objects Python looks for garbage, not after 700: what a command makes at its start stays,
and looking through it again and again took a tenth of the imports and a third of making an S3 client."""


_NO_MEMORY = b"crcli: there is not even memory to start here: see `ulimit -d`, `ulimit -v` and the cgroup's\n"
_NO_FILES = b"crcli: not even the files that it takes to start may be open here at once: see `ulimit -n`\n"


def main() -> int:
    """Run this process's command line and return its exit code."""
    try:
        return _main()
    except (MemoryError, SystemError, ImportError, OSError) as error:  # what comes later is reported there
        if (lack := _lack(error)) is None:
            raise
        os.write(2, lack)
        return 40


def _lack(error: BaseException) -> bytes | None:
    """What there is too little of to import all that is needed, by the error that Python makes of it."""
    if not isinstance(error, ImportError | OSError):
        return _NO_MEMORY
    if "Too many open files" in str(error):
        return _NO_FILES
    return _NO_MEMORY if "failed to map segment" in str(error) else None


def _main() -> int:
    gc.set_threshold(_GARBAGE)  # before the imports, which make most of it
    output = None
    try:
        from crcli.ui.output import Output

        output = Output.installed()
        from crcli.main import main as run

        code = run()
    except KeyboardInterrupt as error:  # during the imports: `run` handles its own
        from crcli.ui.errors import show_interrupt

        code = show_interrupt(error, "--json" in sys.argv)
    gc.freeze()  # at its end Python looks through all that is left once more: 30 ms, 100 with an S3 client
    return output.ended_with(code, sys.argv[1:]) if output is not None else code


if __name__ == "__main__":
    sys.exit(main())
