"""An agent of many steps: it waits for an answer, has a child work on it, and remembers ever more.

    python step_agent.py STEPS WAIT_S MEBIBYTES FOLDER

Each step waits (as for a model), starts a child (as a tool) which is told the state and answers with what
follows from it, and keeps MEBIBYTES more, made from that answer. FOLDER gets a line of `progress` for each
step and, at the end, `result`: a hash of the whole memory, which is the same however the agent was
interrupted, and is nothing else if a single byte of its memory, or a step, was lost or done twice.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time

TOOL = (
    "import hashlib, sys; print(hashlib.pbkdf2_hmac('sha256', sys.stdin.buffer.read(), b'tool', 60000).hex())"
)


def main(steps: int, wait_s: float, mebibytes: int, folder: str) -> None:
    """Do all the steps."""
    memory: list[bytes] = []
    state = b"begin"
    with open(os.path.join(folder, "progress"), "a", buffering=1) as progress:
        for number in range(1, steps + 1):
            time.sleep(wait_s)
            command = [sys.executable, "-S", "-c", TOOL]
            answer = subprocess.run(command, input=state, capture_output=True, check=True).stdout
            memory.append(hashlib.shake_128(answer).digest(mebibytes << 20))
            state = hashlib.blake2b(state + answer).hexdigest().encode()
            progress.write(f"{number} {state.decode()}\n")
    whole = hashlib.blake2b(state)
    for part in memory:
        whole.update(part)
    path = os.path.join(folder, "result")
    with open(f"{path}.new", "w") as file:
        file.write(whole.hexdigest())
    os.replace(f"{path}.new", path)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
