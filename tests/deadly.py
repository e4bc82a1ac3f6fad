"""A row that kills the process that runs it. In a module of its own: the dying processes import nothing else."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any

from diffgraft.app.batch.plan import Job

PARENT = "DIFFGRAFT_TEST_PARENT"


@dataclass(frozen=True)
class Deadly(Job):
    """Its task is death, outside of the process named by PARENT."""

    def __getattribute__(self, name: str) -> Any:
        if name == "task" and os.environ.get(PARENT) != str(os.getpid()):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getattribute__(name)
