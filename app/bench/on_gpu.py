"""One call of some minutes on a machine with a GPU: goes on from the committed weights and writes files that travel.

    python -m diffgraft.app.bench.on_gpu --minutes 9 --out $OUT              # the transformer, then its student
    python -m diffgraft.app.bench.on_gpu --minutes 9 --out $OUT --unet       # the UNet's one-step student
    python -m diffgraft.app.bench.on_gpu --minutes 9 --out $OUT --students   # the transformer's student alone

Scenes are drawn and encoded on all cores first (nothing of `.train/` has to be there). Whatever is written is float16,
no file above 16 MB, in the form that `assets/` holds it: copy it over. Every part is a run of its own trainer; a part
that fails ends the call with what the parts before it wrote.
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

from .training import TimeBox

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


def collect_and_train(module: str, work: Path, common: Sequence[object], box: TimeBox, share: float) -> None:
    """A student: a third of `share` of the box for its teacher's trajectories, the rest for itself.

    Raises:
        RuntimeError: the box is over.
    """
    if share <= 0:
        raise RuntimeError("no time is left for the student: take more --minutes or fewer --scenes")
    minutes = share * box.total / 60
    finish(start(module, "--collect", "--minutes", minutes / 3, "--work", work, *common))
    finish(start(module, "--minutes", minutes * 2 / 3, "--work", work, *common))


def main() -> None:
    """The calls of the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole call, loading left out")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--teacher", type=Path, default=TEACHER, help="to go on from; its vae at least")
    parser.add_argument("--scenes", type=int, default=24_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=Path(".train/gpu"))
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--unet", action="store_true", help="the UNet's one-step student")
    which.add_argument("--students", action="store_true", help="the transformer's few-step student alone")
    args = parser.parse_args()
    box, common = TimeBox(args.minutes), ("--device", args.device, "--batch", args.batch)
    if args.unet:
        args.work.mkdir(parents=True, exist_ok=True)
        finish(start("matching", "--minutes", 0.95 * args.minutes, "--work", args.work, *common))
        shutil.copytree(args.work / "one-step", args.out / "picturebook" / "one-step", dirs_exist_ok=True)
        return
    written = args.out / "picturebook-transformer"
    if not args.students:
        encode(args.work, args.teacher, args.scenes, args.workers)
        left = 0.6 * (1 - box.fraction) * args.minutes
        begun = ("--from", args.teacher) if (args.teacher / "model_index.json").is_file() else ()
        finish(start("train_flow", "--minutes", left, *begun, "--work", args.work, *common))
        finish(start("train_flow", "--export", written, "--work", args.work))
    taught = (*common, "--teacher", args.teacher if args.students else written)
    collect_and_train("flow_student", args.work, taught, box, 0.9 * (1 - box.fraction))
    shutil.copytree(args.work / "few-steps", written / "few-steps", dirs_exist_ok=True)


if __name__ == "__main__":
    main()
