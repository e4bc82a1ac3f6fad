"""Where results go: names that are safe on every file system, and files that are whole or not there."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import unicodedata
from pathlib import Path

from .errors import OutputError

TEMPORARY = ".diffgraft-"
LONGEST_NAME = 150
_SAFE = re.compile(r"[\w(\[][\w .()\[\]+=,@-]*")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|contact-sheet.*", re.IGNORECASE)


def safe_name(text: str) -> str:
    """`text` as a file name without suffix: itself where that is safe everywhere, else a slug with a hash of it."""
    name = unicodedata.normalize("NFC", text)
    if (
        _SAFE.fullmatch(name)
        and name[-1] not in " ."
        and not _RESERVED.fullmatch(name)
        and len(name.encode("utf-8", "surrogatepass")) <= LONGEST_NAME
        and _can_be_named(name)
    ):
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    slug = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")[:60]
    return f"{slug or 'row'}-{digest}"


def _can_be_named(name: str) -> bool:
    """Whether this machine's file names can hold it: in the C locale, without Python's UTF-8 mode, ASCII alone."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def same_file_key(name: str) -> str:
    """Names with equal keys are one file on some file system."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def output_folder(path: str | os.PathLike[str]) -> Path:
    """The folder, made if missing and proven writable.

    Raises:
        OutputError: it is a file, or nothing can be written in it.
    """
    folder = Path(path).expanduser()
    probe = folder / f"{TEMPORARY}probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except (FileExistsError, NotADirectoryError):
        raise OutputError(f"{str(folder)!r} is a file; results need a folder") from None
    except OSError as error:
        raise OutputError(f"nothing can be written in {str(folder)!r}: {error.strerror}") from None
    return folder.resolve()


def clear_after(folder: Path, process: int | None) -> None:
    """Remove what a process that was killed while it wrote, has left in a folder."""
    for left in folder.glob(f"{TEMPORARY}{process}-*.tmp"):
        left.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write through a temporary file beside `path`: a reader, or a crash, sees the old file or the new one.

    Raises:
        OutputError: the disk is full, or the place cannot be written.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        raise OutputError(f"{str(path)!r} cannot be written: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)
