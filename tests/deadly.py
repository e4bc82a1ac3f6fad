"""A row that kills the process that runs it. In a module of its own: the dying processes import nothing else."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffgraft.app.batch.plan import Job
from diffgraft.app.outputs import TEMPORARY

PARENT, OUT = "DIFFGRAFT_TEST_PARENT", "DIFFGRAFT_TEST_OUT"


@dataclass(frozen=True)
class Deadly(Job):
    """Its task is death, outside of the process named by PARENT, with a picture half written to the folder OUT."""

    def __getattribute__(self, name: str) -> Any:
        if name == "task" and os.environ.get(PARENT) != str(os.getpid()):
            Path(os.environ[OUT], f"{TEMPORARY}{os.getpid()}-row.png.tmp").write_bytes(b"half a picture")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getattribute__(name)
