"""Files that are complete or absent, CSV files for spreadsheets, places to write to, folders in use by one process.

Writing goes through a second file and a rename; reading says what is wrong. Standard library only.
"""

import codecs
import contextlib
import csv
import fcntl
import io
import json
import os
import stat
import sys
import tempfile
from pathlib import Path

from animals.command import UNPRINTABLE, UserError


@contextlib.contextmanager
def replacing(path, mode="w", **options):
    """with replacing(path) as file: at any moment `path` holds its old or its new content, complete. Text is UTF-8."""
    part = Path(f"{path}.part")
    try:
        with open(part, mode, encoding=None if "b" in mode else "utf-8", **options) as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


MAX_JSON = 64_000_000  # bytes; the largest tokenizer.json of a known model has 33,000,000


def open_regular(file):
    """open(file, "rb") of a regular file: a pipe or a device might never end. Else FileNotFoundError or UserError."""
    try:
        if stat.S_ISREG(os.stat(file).st_mode):
            return open(file, "rb")
        reason = "a folder, a pipe or a device"
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = error.strerror
    raise UserError(f"{file}: cannot be read: found {reason}; expected a file; restore it, or change its rights")


def read_json(file, kind=dict):
    """The content of a JSON file, which must be a `kind`. Raises FileNotFoundError, or UserError for anything else."""
    with open_regular(file) as opened:
        try:
            if (size := os.fstat(opened.fileno()).st_size) > MAX_JSON:
                raise ValueError(f"{size:,} bytes, more than {MAX_JSON:,}")
            if isinstance(content := json.loads(opened.read().decode()), kind):
                return content
            reason = f"a {type(content).__name__} in place of a {kind.__name__}"
        except (ValueError, RecursionError) as error:
            reason = error
    raise UserError(f"{file}: found {reason}; expected JSON; restore the file")


def write_json(file, content):
    with replacing(file) as opened:
        json.dump(content, opened, indent=2, ensure_ascii=False)
        opened.write("\n")


FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")  # with such a beginning a spreadsheet takes text for a formula


def from_cell(text: str) -> str:
    """The text of a CSV cell, without the ' that write_csv_rows() put before it."""
    return text[1:] if text[:1] == "'" and text[1:].startswith(FORMULA) else text


def write_csv_rows(file, rows) -> None:
    """Append rows (lists) to an open CSV file. Text that a spreadsheet would run gets a ' before it."""
    for row in rows:
        cells = [f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value for value in row]
        # "\r" ends a line, too, but Python before 3.13 does not quote it.
        quoting = csv.QUOTE_ALL if "\r" in "".join(map(str, cells)) else csv.QUOTE_MINIMAL
        csv.writer(file, lineterminator="\n", quoting=quoting).writerow(cells)


def read_csv(path) -> tuple[list[str], list[dict[str, str]]]:
    """(columns, rows) of a CSV file of ours, also as a spreadsheet saves it: with BOM, UTF-16, `;` or tabs.

    Raises OSError, or UserError if the file is no text or no CSV.
    """
    content = Path(path).read_bytes()
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        lines = [[from_cell(cell) for cell in row] for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: found {error}; expected a CSV file in UTF-8; save it as `CSV UTF-8`") from None
    columns, *rows = lines or [[]]
    return columns, [dict(zip(columns, row, strict=False)) for row in rows if row]


def looked_up(path) -> str:
    """`path` for a message that it is not there: a relative one with the place where it was looked up."""
    return str(path) if os.path.isabs(path) else f"{path} (looked up as {os.path.abspath(path)})"


def nearest_existing(path) -> Path:
    """`path`, or the nearest path above it that exists."""
    path = Path(path).absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def require_writable(flag: str, folder) -> None:
    """Raises UserError unless a file can be made in `folder` (that of a flag), or in the nearest folder above it."""
    place = nearest_existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        found = f"found {place}, where no file can be written ({error.strerror}); expected a folder to write to"
        raise UserError(f"{flag} {folder}: {found}; name another, or change its rights") from None


@contextlib.contextmanager
def folder_lock(folder, shared=False, busy: str | None = None):
    """with folder_lock(folder): no other process holds it; with shared=True, none holds it unshared. Leaves no file.

    busy: the text of the UserError that is raised if another process holds it; None: say so and wait. The system
    releases the lock when the process ends, however it ends.
    """
    opened, kind = os.open(folder, os.O_RDONLY), fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        with contextlib.suppress(OSError):  # a file system without locks (some NFS): nothing is locked
            try:
                fcntl.flock(opened, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if busy:
                    raise UserError(busy) from None
                print(f"waiting: another command uses {folder}", file=sys.stderr, flush=True)
                fcntl.flock(opened, kind)
        yield
    finally:
        os.close(opened)


# Folders that file managers, archives, NAS and disks make for themselves.
SYSTEM = {"@eaDir", "#recycle", "@Recycle", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found"}


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is none of the user's."""
    return name.startswith(".") or name in SYSTEM


def subfolders(path) -> list[str]:
    """The names of the folders in `path`, sorted, without hidden ones."""
    with os.scandir(path) as found:
        return sorted(entry.name for entry in found if entry.is_dir() and not is_hidden(entry.name))


def deeper(input_dir: str) -> str:
    """For a message: where train_data is, if it is one folder deeper than in input_dir; else ""."""
    places = [os.path.join(input_dir, name) for name in subfolders(input_dir)] if os.path.isdir(input_dir) else []
    found = [place for place in places if os.path.isdir(os.path.join(place, "train_data"))]
    return f"; train_data is in {found[0]}: give --input_dir {found[0]}" if found else ""


def printable(name: str) -> str:
    """A name with what would act on a terminal and what is no UTF-8 as backslash escapes: for messages and lists."""
    return UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], name)
