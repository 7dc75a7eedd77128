"""The agent of `crcli demo`: two workers that tick into a pipe, a counter of their ticks, a log, and memory.

Run as a program of its own, with nothing but the standard library. Its log says `counter N`; upon SIGUSR1 it
says `state COUNTER HASH`, the hash being of all its memory that matters.
"""

import hashlib
import os
import random
import signal
import struct
import sys
import time

TICK_S = 0.02
_TICK = struct.Struct("<IQ")
MIB = 1 << 20


def main(random_mib: int, text_mib: int, zero_mib: int) -> None:
    """Work until killed."""
    reading, writing = os.pipe()
    for number in (1, 2):
        if os.fork() == 0:
            work(number, writing)
    os.close(writing)
    state = random.Random(4711).randbytes(random_mib * MIB)
    text = b"".join(b"%015d\n" % number for number in range(text_mib * MIB // 16))
    zeros = bytearray(zero_mib * MIB)
    for at in range(0, len(zeros), 4096):
        zeros[at] = 0  # touched, so that it is memory
    asked: list[bool] = []
    signal.signal(signal.SIGUSR1, lambda *_: asked.append(True))
    counter = 0
    print("ready", flush=True)
    while True:
        _, _ = _TICK.unpack(os.read(reading, _TICK.size))
        counter += 1
        if counter % 10 == 0:
            print("counter", counter, flush=True)
        if asked:
            asked.clear()
            digest = hashlib.sha256()
            for part in (state, text, zeros):
                digest.update(part)
            print("state", counter, digest.hexdigest(), flush=True)


def work(number: int, writing: int) -> None:
    """A worker: ticks into the pipe until nobody reads it any more."""
    count = 0
    try:
        while True:
            count += 1
            os.write(writing, _TICK.pack(number, count))
            time.sleep(TICK_S)
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:4]))
