"""Where the scenarios run and how large they are: on a GPU, on the simulator, or on none (a stand-in)."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from tests.gpu.real.unpack import PATH_BEFORE

GIB = 1 << 30
MIB = 1 << 20

PLACES = ("gpu", "simulator", "host")


@dataclass(frozen=True)
class Setting:
    """`on` is one of PLACES, `work` the folder for all that is written, `python` what the programs run on.

    On `gpu`, sizes are those of a real model. Elsewhere they are small, and what comes out is no result.
    """

    on: str
    work: str
    python: str
    weights_bytes: int = 8 * GIB
    cache_bytes: int = 4 * GIB
    counter_mib: int = 64
    steps: int = 400

    @classmethod
    def of(cls, on: str, work: str, python: str) -> Setting:
        """The sizes that suit the place."""
        if on == "gpu":
            return cls(on, work, python)
        return cls(on, work, python, 48 * MIB, 32 * MIB, 4, 60)

    @property
    def library(self) -> str:
        """What programs use that can do without PyTorch (see programs/memory.py)."""
        if self.on == "simulator":
            return "driver"
        return "torch" if self.has_torch else "host"

    @property
    def device(self) -> str:
        """What programs are told."""
        return "cpu" if self.on == "host" else "cuda"

    @property
    def has_cuda(self) -> bool:
        """Whether there is a CUDA to be called, be it the simulator's."""
        return self.on != "host"

    @cached_property
    def has_torch(self) -> bool:
        """Whether the programs' Python has PyTorch."""
        return self.on != "simulator" and not self.missing("torch")

    def missing(self, *modules: str) -> list[str]:
        """Those of the modules that the programs' Python does not have."""
        look = "import importlib.util as u, sys; print(*(m for m in sys.argv[1:] if not u.find_spec(m)))"
        done = subprocess.run(
            [self.python, "-c", look, *modules],
            env=self.programs_environment("torch"),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return done.stdout.split()

    def programs_environment(self, library: str) -> Mapping[str, str]:
        """What a program finds in its environment: nothing of what was carried here for crcli, where it can
        do without, so that it is as any user's program on this machine."""
        environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1"}
        if library != "driver":
            environment["PYTHONPATH"] = environment.get(PATH_BEFORE, "")
        return environment

    def crcli_environment(self) -> Mapping[str, str]:
        """What crcli's commands find in theirs."""
        return os.environ | {
            "CRCLI_LOG_DIR": f"{self.work}/logs",
            "CRCLI_RATES": f"{self.work}/rates.json",
            "CRCLI_STATE_DIR": f"{self.work}/state",
            "CRCLI_CACHE_DIR": f"{self.work}/cache",
            "CRCLI_NO_PLUGINS": "1",
        }

    def limit_s(self, least: float, size: int = 0) -> float:
        """How long something may take that moves so many bytes: never at less than 100 MB/s."""
        return least + size / 100e6

    @property
    def folder(self) -> Path:
        """`work`, as a path."""
        return Path(self.work)

    def as_text(self) -> str:
        """For a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Setting:
        """Read it back."""
        return cls(**json.loads(text))
