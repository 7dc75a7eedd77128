"""crcli on a machine with a real GPU.

python -m tests.gpu.real prepare FOLDER             make the folder to carry there (README.md beside this)
python3 -m tests.gpu.real run --from FOLDER --out DIR   there: set all up, run everything, write results.json
python -m tests.gpu.real table RESULTS.json         the results as a table for README
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

from tests.gpu.real.prepare import DEFAULT_PYTHON, ROOT, prepare
from tests.gpu.real.unpack import Unusable, environment_with, unpack


def main() -> int:
    """Do what is asked."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu.real",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("prepare")
    making.add_argument("folder", type=Path)
    making.add_argument("--python", default=DEFAULT_PYTHON, help="the version there (default: %(default)s)")
    running = commands.add_parser("run", epilog="Everything else is for the runner: see `runner --help`.")
    running.add_argument(
        "--from", dest="carried", type=Path, help="the prepared folder (default: all is installed)"
    )
    running.add_argument("--out", required=True, type=Path, help="the folder for results.json")
    running.add_argument("--work", type=Path, help="where there is room (default: the roomiest of a few)")
    showing = commands.add_parser("table")
    showing.add_argument("results", type=Path, nargs="+")
    options, for_the_runner = parser.parse_known_args()
    if for_the_runner and options.command != "run":
        parser.error(f"unknown: {' '.join(for_the_runner)}")
    if options.command == "prepare":
        manifest = prepare(options.folder, options.python)
        print(f"{options.folder}: {manifest['bytes'] / 2**20:.0f} MiB, CRIU {manifest['criu']['version']}")
        return 0
    if options.command == "run":
        _run(options, for_the_runner)
    from tests.gpu.real.table import as_markdown

    print("\n\n".join(as_markdown(json.loads(path.read_text())) for path in options.results))
    return 0


def _run(options: argparse.Namespace, for_the_runner: list[str]) -> NoReturn:
    """Set everything up and become the runner, in an environment that has it all; the runner tidies up."""
    began = time.time()
    work = Path(tempfile.mkdtemp(prefix="crcli-gpu-", dir=options.work or _roomiest()))
    try:
        added = unpack(options.carried, work) if options.carried else {"PYTHONPATH": str(ROOT)}
    except (Unusable, OSError) as error:
        shutil.rmtree(work, ignore_errors=True)
        options.out.mkdir(parents=True, exist_ok=True)
        found = {"format": 1, "stopped": f"set-up: {error}"}
        (options.out / "results.json").write_text(json.dumps(found) + "\n")
        raise SystemExit(f"set-up: {error}") from error
    command = [sys.executable, "-m", "tests.gpu.real.runner", f"--out={options.out.absolute()}"]
    command += [f"--work={work}", f"--began={began}", *for_the_runner]
    os.execve(sys.executable, command, environment_with(added))


def _roomiest() -> str:
    """Of the usual places for large files, the one with the most room; not memory, if there is another."""
    found = [
        path for path in (os.environ.get("TMPDIR", ""), "/var/tmp", "/tmp") if path and os.path.isdir(path)
    ]
    on_disk = [path for path in found if not _is_memory(path)]
    return max(on_disk or found, key=lambda path: shutil.disk_usage(path).free)


def _is_memory(path: str) -> bool:
    with open("/proc/self/mounts") as file:
        kinds = {line.split()[1]: line.split()[2] for line in file}
    while path not in kinds:
        path = os.path.dirname(path)
    return kinds[path] == "tmpfs"


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
