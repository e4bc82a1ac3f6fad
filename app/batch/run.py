"""One batch run: read, compare with what is on disk, make what is missing, write down how it went."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...attention.errors import GraftError, ModelLoadError
from ..console import FAILED, INTERRUPTED, NOT_STARTED, OK, USAGE, one_line, say
from ..errors import ManifestError, OutputError, WorkerError
from ..models import check_model, find_device, find_dtype
from ..outputs import output_folder
from .engines import Engine, Records, engine
from .manifest import BadRow, Manifest, file_names, read_manifest
from .plan import Job, Setup, batches, in_shard, make_job
from .progress import Progress
from .sheet import write_sheets
from .store import Record, Store
from .worker import problems


@dataclass(frozen=True)
class Options:
    """How to run a manifest. Neutral values: all rows, resume, never stop early."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    engine: str = "local"
    workers: int = 2
    shard: tuple[int, int] | None = None
    overwrite: bool = False
    retry_failed: bool = False
    max_failures: int | None = None
    sheet: bool = True
    quiet: bool = False


@dataclass
class Plan:
    """What is to be done with each row of the manifest (of this shard)."""

    jobs: list[Job] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    kept: int = 0
    """Rows that are finished already."""
    given_up: int = 0
    """Rows that failed in an earlier run and are not tried again."""

    @property
    def rows(self) -> int:
        """Rows of this shard."""
        return len(self.jobs) + len(self.bad) + self.kept + self.given_up


def run_batch(manifest_path: Path, setup: Setup, options: Options) -> tuple[int, dict[str, Any]]:
    """Run a manifest.

    Returns:
        The exit code and the summary that is also in `summary.json`.

    Raises:
        GraftError: nothing was started: the manifest, a setting, or the output folder.
    """
    run = _checked(setup, options)
    manifest = read_manifest(manifest_path, options.defaults)
    store = Store(output_folder(setup.out), options.shard)
    with store.locked():
        records = store.records()
        plan = make_plan(manifest, setup, options, store, records)
        gone = _of_vanished_rows(manifest, records)
        store.keep_last(drop=gone)
        for name in gone:
            del records[name]
        if setup.metadata:
            _refuse_foreign(store, plan, records)
        outcome = _Outcome(store, records, manifest, plan, options)
        for bad in plan.bad:
            outcome.add(_bad_record(manifest, bad))
        outcome.follow(run(setup, batches(plan.jobs, setup.batch_size), options.workers))
        return _finish(manifest, store, plan, outcome, options)


def _checked(setup: Setup, options: Options) -> Engine:
    """The engine; what every row would fail at is told before a row is touched."""
    find_dtype(setup.dtype)
    if options.engine != "ray":  # whose devices are elsewhere
        find_device(setup.device)
    return engine(options.engine)


def dry_run(manifest_path: Path, setup: Setup, options: Options) -> tuple[int, list[str], dict[str, Any]]:
    """Read everything, open every picture, make every plugin, and write nothing.

    Returns:
        The exit code (2 if anything is wrong), one line for each error, and counts.
    """
    _checked(setup, options)
    manifest = read_manifest(manifest_path, options.defaults)
    store = Store(setup.out, options.shard)
    records = store.records() if setup.out.is_dir() else {}
    plan = make_plan(manifest, setup, options, store, records)
    if any(job.model == setup.model for job in plan.jobs):
        check_model(setup.model, setup.variant)
    wrong = [(bad.line, bad.message) for bad in plan.bad]
    for job in plan.jobs:
        wrong += [(job.line, one_line(error)) for error in problems(job, setup)]
    seconds = [record["seconds"] for record in records.values() if record.get("seconds")]
    counts: dict[str, Any] = {
        "rows": plan.rows, "to_do": len(plan.jobs), "pictures": sum(len(job.files) for job in plan.jobs),
        "finished": plan.kept, "errors": len(wrong),
    }  # fmt: skip
    if seconds:
        counts["estimated_seconds"] = round(sum(seconds) / len(seconds) * len(plan.jobs))
    lines = [f"{manifest.where(line)}: {message}" for line, message in sorted(wrong)]
    return (USAGE if wrong else OK), lines, counts


def make_plan(manifest: Manifest, setup: Setup, options: Options, store: Store, records: Mapping[str, Record]) -> Plan:
    """Compare every row of this shard with what the folder says about it."""
    plan = Plan()
    for bad in manifest.bad:
        if _mine(bad.id, options):
            plan.bad.append(bad)
    for line, row in manifest.rows:
        if not _mine(row.id, options):
            continue
        try:
            job = make_job(row, line, setup, options.seed)
        except GraftError as error:
            plan.bad.append(BadRow(row.id, line, one_line(error)))
            continue
        record = records.get(row.id)
        same = record is not None and record.get("hash") == job.hash and not options.overwrite
        if same and record["status"] == "ok" and store.holds(record):
            plan.kept += 1
        elif same and record["status"] == "failed" and not options.retry_failed:
            plan.given_up += 1
        else:
            plan.jobs.append(job)
    return plan


def _mine(row_id: str, options: Options) -> bool:
    return options.shard is None or in_shard(row_id, *options.shard)


def _refuse_foreign(store: Store, plan: Plan, records: Mapping[str, Record]) -> None:
    """Refuse to overwrite pictures of somebody else."""
    known = {name for record in records.values() for name in _pictures(record)}
    wanted = [name for job in plan.jobs for name in job.files]
    foreign = store.foreign(wanted, known)
    if foreign:
        raise OutputError(f"{foreign} in {str(store.folder)!r} was not made by diffgraft; choose another folder")


def _of_vanished_rows(manifest: Manifest, records: Mapping[str, Record]) -> list[str]:
    """Records of rows that could not be read and are not in the manifest any more: they were mended."""
    present = {row.id for _, row in manifest.rows} | {bad.id for bad in manifest.bad}
    return [name for name, record in records.items() if record.get("error_type") == "BadRow" and name not in present]


def _bad_record(manifest: Manifest, bad: BadRow) -> Record:
    message = f"{manifest.where(bad.line)}: {bad.message}"
    return {"id": bad.id, "status": "failed", "line": bad.line, "error_type": "BadRow", "message": message}


class _Outcome:
    """Takes the records of a run as they come."""

    def __init__(
        self, store: Store, records: dict[str, Record], manifest: Manifest, plan: Plan, options: Options
    ) -> None:
        self.store, self.records, self.options = store, records, options
        self.files = {job.id: job.files for job in plan.jobs}
        self.owners = {name: row_id for row_id, record in records.items() for name in _pictures(record)}
        self.owners |= {name: row.id for _, row in manifest.rows for name in file_names(row.id, row.n)}
        self.total, self.ok, self.failures = len(plan.jobs) + len(plan.bad), 0, []
        self.pictures = 0
        self.stopped: str | None = None
        self.code = OK
        self.started = time.monotonic()
        self.progress = Progress(self.total, options.quiet)

    def add(self, record: Record) -> None:
        """Write a record down, and delete what the row had made before.

        A row that cannot be read keeps what it has: it may be the only thing that is left of an input, or of a night.
        """
        before = self.records.get(record["id"], {})
        record["attempt"] = before.get("attempt", 0) + 1
        if record.get("error_type") != "BadRow" or before.get("status") != "ok" or not self.store.holds(before):
            self.store.discard(self._left_over(record, before))
            self.store.append(record)
            self.records[record["id"]] = record
        if record["status"] == "ok":
            self.ok += 1
            self.pictures += len(record["pictures"])
        else:
            self.failures.append({name: record.get(name) for name in ("id", "line", "error_type", "message")})
            self.progress.say(f"row {record['id'][:60]!r} failed: {record['message']}")
        self.progress.advance(len(self.failures))

    def _left_over(self, record: Record, before: Record) -> set[str]:
        """Files of the row that its new record does not have; never another row's."""
        names = {*_pictures(before), *self.files.get(record["id"], ())} - {*_pictures(record)}
        return {name for name in names if self.owners[name] == record["id"]}

    def follow(self, results: Records) -> None:
        """Take everything an engine gives, until it ends, fails as a whole, is interrupted, or too much failed."""
        try:
            while not self._enough():
                record = next(results, None)
                if record is None:
                    break
                self.add(record)
        except KeyboardInterrupt:
            self.stopped, self.code = "interrupted", INTERRUPTED
        except (ModelLoadError, WorkerError) as error:
            self.stopped, self.code = one_line(error), NOT_STARTED
        except GraftError as error:
            self.stopped, self.code = one_line(error), FAILED
        finally:
            results.close()
            self.progress.close()

    def _enough(self) -> bool:
        most = self.options.max_failures
        if most is None or len(self.failures) < most:
            return False
        self.stopped, self.code = f"stopped after {len(self.failures)} failed rows", FAILED
        return True


def _pictures(record: Record) -> Iterator[str]:
    return (picture["file_name"] for picture in record.get("pictures", ()))


def _finish(
    manifest: Manifest, store: Store, plan: Plan, outcome: _Outcome, options: Options
) -> tuple[int, dict[str, Any]]:
    """Bring the folder's overview up to date: results, metadata, sheets, summary."""
    ordered = _in_order(manifest, store)
    failed = [record for record in ordered if record["status"] != "ok"]
    code = outcome.code or (FAILED if failed or outcome.failures else OK)
    summary: dict[str, Any] = {
        "exit_code": code,
        "rows": plan.rows,
        "done": outcome.ok,
        "failed": len(outcome.failures),
        "already_done": plan.kept,
        "failed_before": plan.given_up,
        "pictures": outcome.pictures,
        "folder": {"rows": len(ordered), "failed": len(failed)},
        "seconds": round(time.monotonic() - outcome.started, 2),
        "stopped": outcome.stopped,
        "failures": outcome.failures[:100],
    }
    try:
        store.keep_last()
        store.write_metadata(ordered)
        for _ in range(10):  # a shard that ended just now wrote its rows into the file that this one has replaced
            now = _in_order(manifest, store)
            if now == ordered:
                break
            store.write_metadata(ordered := now)
        store.write_json(f"summary{store.part}.json", summary)
        if options.sheet:
            write_sheets(store.folder, ordered)
    except OutputError as error:  # a full disk must not hide how the run went
        say(one_line(error))
        summary["exit_code"] = code = code or FAILED
    return code, summary


def _in_order(manifest: Manifest, store: Store) -> list[Record]:
    """All records of the folder, other shards' too, as the manifest has them."""
    order = {row.id: line for line, row in manifest.rows} | {bad.id: bad.line for bad in manifest.bad}
    records = store.records()
    for gone in _of_vanished_rows(manifest, records):
        del records[gone]
    return sorted(records.values(), key=lambda r: (r["id"] not in order, order.get(r["id"], 0), r["id"]))


def parse_shard(text: str) -> tuple[int, int]:
    """ "i/n" as two numbers, 0 <= i <= n.

    Raises:
        ManifestError: anything else.
    """
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) <= int(count) and int(count)):
        raise ManifestError(f"--shard {text!r}: write i/n, such as 0/2 and 1/2")
    return int(index), int(count)
