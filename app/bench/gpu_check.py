"""`make gpu-check`: what grafts cost on published shapes, on the GPU at hand, within eight minutes. No weights needed.

Denoisers of the real size with random weights, made on the device in bfloat16: plain, guided, and with each plugin;
eager, compiled block by block, and under CUDA graphs. A row that a plugin, a model or the machine refuses says why.
Writes gpu-check.json and gpu-check.md after every row: a run that is cut has what it has measured.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import diffusers
import torch

from ... import __version__
from ..outputs import write_whole
from .gpu_report import markdown
from .gpu_rows import GRAPHS, MODES, UNFORESEEN, Bench, Row, compiled, exactness, short
from .gpu_shapes import SHAPES, Shape, make
from .rows import KEPT
from .training import TimeBox

MINUTES = 7.0
"""The last row may take longer than its share: it is compiled to its end."""
STEPS = 4
SMALL = 256
"""Pixels of the pictures on which bfloat16 is held against float32."""
BLOCKS = 0.75
"""Share of the time that eager models and compiled blocks get; the rest is for CUDA graphs."""


@dataclass(frozen=True)
class Check:
    """How the machine is looked at.

    Attributes:
        box: for all of it. little: tiny models and pictures. backend: of torch.compile. most: pairs a row.
    """

    device: torch.device
    box: TimeBox
    little: bool = False
    backend: str = "inductor"
    most: int = 15

    def rows(self, shapes: Sequence[Shape], modes: Sequence[str]) -> Iterator[Row]:
        """Every row, as soon as it is known. What a shape does not use of its time is the next ones'."""
        blocks = [mode for mode in modes if mode != GRAPHS]
        yield from self._pass(shapes, blocks, BLOCKS if GRAPHS in modes else 1.0)
        yield from self._pass(shapes, [mode for mode in modes if mode == GRAPHS], 1.0)

    def _pass(self, shapes: Sequence[Shape], modes: Sequence[str], until: float) -> Iterator[Row]:
        for number, shape in enumerate(shapes if modes else ()):
            minutes = max(0.0, until * self.box.total - self.box.spent) / 60 / (len(shapes) - number)
            try:
                yield from self._of_shape(shape, modes, minutes)
            except torch.OutOfMemoryError as error:
                yield Row(shape.name, "eager", "plain", note=short(error))
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _of_shape(self, shape: Shape, modes: Sequence[str], minutes: float) -> Iterator[Row]:
        small = 128 if self.little else SMALL
        if modes == [GRAPHS] and self.device.type != "cuda":
            yield Row(shape.name, GRAPHS, "plain", note=f"{self.device.type} has no CUDA graphs")
            return
        if GRAPHS not in modes:
            yield from exactness(shape, self.device, small, self.little)
        side = small if self.little else None
        subject = make(shape, self.device, torch.bfloat16, side=side, little=self.little)
        for mode in modes:
            with compiled(subject.denoiser, mode, self.backend):
                bench = Bench(shape, subject, mode, 1 if self.little else STEPS, self.most)
                yield from bench.rows(TimeBox(minutes / len(modes)))


def where(device: torch.device) -> dict[str, str]:
    """The machine and the versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    found = {"device": name, "torch": torch.__version__, "diffusers": diffusers.__version__, "diffgraft": __version__}
    return found | ({"CUDA": str(torch.version.cuda)} if device.type == "cuda" else {})


def main(words: Sequence[str] | None = None) -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=KEPT)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES), help="these shapes")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--tiny", action="store_true", help="tiny models and pictures, for a machine without a GPU")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--most", type=int, default=15, help="pairs a row")
    args = parser.parse_args(words)
    device = torch.device(args.device)
    if device.type == "cpu" and not args.tiny:
        sys.stderr.write("no GPU here: real shapes take hours on a CPU; --tiny tries the script\n")
        return 3
    check = Check(device, TimeBox(args.minutes), args.tiny, args.backend, args.most)
    args.out.mkdir(parents=True, exist_ok=True)
    found, at = list[Row](), where(device)
    for row in check.rows([SHAPES[name] for name in args.only], args.modes):
        found.append(row)
        sys.stderr.write(f"{check.box.spent:5.0f} s  {row.shape}, {row.mode}, {row.what} {row.note}\n")
        kept = {"where": at, "rows": [asdict(row) for row in found]}
        write_whole(args.out / "gpu-check.json", json.dumps(kept, indent=1).encode())
        write_whole(args.out / "gpu-check.md", markdown(found, at).encode())
    sys.stdout.write(markdown(found, at))
    return int(any(row.note.startswith(UNFORESEEN) for row in found))


if __name__ == "__main__":
    sys.exit(main())
