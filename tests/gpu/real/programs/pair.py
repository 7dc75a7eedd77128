"""Two processes on one GPU: a counter, and below it another one, with bytes of its own.

pair.py --progress FILE …    the child's lines go to FILE.child; everything else as for counter.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import counter

_SEED_OF_CHILD = "2"


def main() -> None:
    """Start the child, then count."""
    given = sys.argv[1:]
    place = given.index("--progress") + 1
    of_child = [*given[:place], f"{given[place]}.child", *given[place + 1 :], "--seed", _SEED_OF_CHILD]
    subprocess.Popen([sys.executable, str(Path(__file__).with_name("counter.py")), *of_child])
    counter.main()


if __name__ == "__main__":
    sys.exit(main())
