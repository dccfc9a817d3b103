"""Whole files or none: what is written appears by a rename, what is read says what is wrong with it."""

import json
import os
from pathlib import Path

from animals.command import UserError


class replacing:
    """with replacing(path) as file: the path holds the old bytes or all the new ones, never a part."""

    def __init__(self, path):
        self.path, self.part = path, Path(f"{path}.part")

    def __enter__(self):
        self.file = open(self.part, "wb")
        return self.file

    def __exit__(self, kind, *rest):
        self.file.close()
        if kind is None:
            os.replace(self.part, self.path)
        else:
            self.part.unlink()


def read_json(file):
    try:
        with open(file, encoding="utf-8") as opened:
            return json.load(opened)
    except ValueError as error:
        raise UserError(f"{file}: found {error}; expected JSON; download the file again") from None


def write_json(file, content):
    part = f"{file}.part"
    with open(part, "w", encoding="utf-8") as opened:
        json.dump(content, opened, indent=2, ensure_ascii=False)
        opened.write("\n")
    os.replace(part, file)


def subfolders(path) -> list[str]:
    """The names of the folders in `path`, sorted, without hidden ones."""
    with os.scandir(path) as found:
        return sorted(entry.name for entry in found if entry.is_dir() and not entry.name.startswith("."))
