"""One call of some minutes on a machine with a GPU: goes on from the committed weights and writes files that travel.

    python -m diffgraft.app.bench.on_gpu --minutes 9 --out $OUT              # the transformer, then its student
    python -m diffgraft.app.bench.on_gpu --minutes 9 --out $OUT --unet       # the UNet's one-step student
    python -m diffgraft.app.bench.on_gpu --minutes 9 --out $OUT --students   # the transformer's student alone

Scenes are drawn and encoded on all cores first (nothing of `.train/` has to be there). Students go on by distribution
matching, which needs no trajectories. Whatever is written is float16, no file above 16 MB, in the form that `assets/`
holds it: copy it over. Every part is a run of its own trainer; a part that fails ends the call with what the parts
before it wrote.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .training import TimeBox, folder

TEACHER = Path(__file__).parents[2] / "assets" / "picturebook-transformer"


def start(module: str, *words: object, threads: int | None = None) -> subprocess.Popen[bytes]:
    """A trainer as a process of its own."""
    limits = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", f"{__package__}.{module}", *map(str, words)]
    return subprocess.Popen(command, env=os.environ | limits)


def finish(*running: subprocess.Popen[bytes]) -> None:
    """Waits for all of them.

    Raises:
        RuntimeError: one failed.
    """
    codes = [process.wait() for process in running]
    if any(codes):
        raise RuntimeError(f"exit codes {codes}: what the trainers said stands above")


def encode(work: Path, teacher: Path, scenes: int, workers: int) -> None:
    """Encodes `scenes` scenes on as many processes as there are workers, each with a tenth as many empty ones."""
    work.mkdir(parents=True, exist_ok=True)
    shutil.copytree(teacher / "vae", work / "vae", dirs_exist_ok=True)
    each = -(-scenes // workers)
    for count, more in ((each, ()), (-(-each // 10), ("--empty",))):
        jobs = [("--first", worker * each, "--count", count, *more) for worker in range(workers)]
        finish(*(start("latents", *job, "--work", work, threads=1) for job in jobs))


def teach(work: Path, written: Path, common: Sequence[object], minutes: float, begun: Sequence[object]) -> None:
    """The transformer on scenes that are drawn for it in `work`, to the end of a time box; saved as a pipeline."""
    finish(start("train_flow", "--minutes", minutes, *begun, "--work", work, *common))
    finish(start("train_flow", "--export", written, "--work", work))


def match(module: str, name: str, work: Path, written: Path, minutes: float, *words: object) -> None:
    """A student by distribution matching, from the committed one on; its folder `name` is copied to `written`.

    Raises:
        RuntimeError: no time is left for it, or it failed.
    """
    if minutes <= 0:
        raise RuntimeError("no time is left for the student: take more --minutes or fewer --scenes")
    work.mkdir(parents=True, exist_ok=True)
    finish(start(module, "--minutes", minutes, "--work", work, *words))
    shutil.copytree(work / name, written / name, dirs_exist_ok=True)


def main() -> None:
    """The calls of the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole call, loading left out")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--teacher", type=folder, default=TEACHER, help="to go on from; its vae at least")
    parser.add_argument("--scenes", type=int, default=24_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=Path(".train/gpu"))
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--unet", action="store_true", help="the UNet's one-step student")
    which.add_argument("--students", action="store_true", help="the transformer's few-step student alone")
    args = parser.parse_args()
    box, common = TimeBox(args.minutes), ("--device", args.device, "--batch", args.batch)
    if args.unet:
        match("matching", "one-step", args.work, args.out / "picturebook", 0.95 * args.minutes, *common)
        return
    written, teacher = args.out / "picturebook-transformer", args.teacher
    if not args.students:
        encode(args.work, args.teacher, args.scenes, args.workers)
        begun = ("--from", args.teacher) if (args.teacher / "model_index.json").is_file() else ()
        teach(args.work, written, common, 0.6 * (1 - box.fraction) * args.minutes, begun)
        teacher = written
    left = 0.9 * (1 - box.fraction) * args.minutes
    match("matching_flow", "few-steps", args.work, written, left, *common, "--teacher", teacher)


if __name__ == "__main__":
    main()
