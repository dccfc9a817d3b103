"""Files that are complete or absent: writing goes through a second file and a rename; reading says what is wrong."""

import contextlib
import json
import os
from pathlib import Path

from animals.command import UserError


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


def read_json(file):
    try:
        with open(file, encoding="utf-8") as opened:
            return json.load(opened)
    except ValueError as error:
        raise UserError(f"{file}: found {error}; expected JSON; restore the file") from None


def write_json(file, content):
    with replacing(file) as opened:
        json.dump(content, opened, indent=2, ensure_ascii=False)
        opened.write("\n")


def subfolders(path) -> list[str]:
    """The names of the folders in `path`, sorted, without hidden ones."""
    with os.scandir(path) as found:
        return sorted(entry.name for entry in found if entry.is_dir() and not entry.name.startswith("."))
