"""Pictures into folders by the name given: `python test.py --sort_into DIR`.

DIR/<label>/, DIR/unsure/, DIR/unreadable/: hard links to the pictures, copies where there can be none (another disk);
nothing of the user's is moved. A name that is taken gets a suffix (1-2.jpg). DIR/manifest.csv says what went where, a
row as soon as its picture is there, so a killed run goes on where it stopped. Run again: a picture that is no longer
where the manifest says was moved by the user and stays as it is; one that is still there follows a changed name.
"""

import csv
import filecmp
import hashlib
import io
import os
import shutil
import sys
from collections import Counter

from animals.command import UserError

MANIFEST = "manifest.csv"
COLUMNS = ["image", "sha256", "prediction", "probability", "file"]  # file: below DIR


def sort_into(folder, rows):
    """Sort the dicts of test.py's CSV. -> how many were `new`, `there`, `moved` by the user, `renamed`, `gone`."""
    from tqdm import tqdm

    os.makedirs(folder, exist_ok=True)
    known = read_manifest(folder)
    claimed = {row["file"] for row in known.values()}
    count = Counter()
    with open(os.path.join(folder, MANIFEST), "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not file.tell():
            writer.writeheader()
        for row in tqdm(rows, desc="sorting", unit="image", disable=None):
            source = os.path.realpath(row["image"])
            into = "unreadable" if row["error"] else row["prediction"].replace("/", "_")
            new = {"image": source, "sha256": digest(source), "prediction": into, "probability": row["probability"]}
            before = known.get((source, new["sha256"]))
            if not new["sha256"]:
                count["gone"] += 1
                continue
            if before:
                there = os.path.join(folder, before["file"])
                if not os.path.lexists(there) or not same(source, there):
                    count["moved"] += 1
                    continue
                if before["prediction"] == into:
                    count["there"] += 1
                    continue
            target = free_name(folder, into, source, claimed)
            path = os.path.join(folder, target)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if before:
                os.rename(there, path)
            elif not os.path.lexists(path):  # else: from a run that was killed before it wrote the row
                link_or_copy(source, path, folder)
            count["renamed" if before else "new"] += 1
            claimed.add(target)
            known[source, new["sha256"]] = new | {"file": target}
            writer.writerow(known[source, new["sha256"]])
            file.flush()
    return count


def read_manifest(folder):
    """{(image, sha256): its last row}; a line that a kill cut off is taken away. Raises UserError on another file."""
    path = os.path.join(folder, MANIFEST)
    if not os.path.exists(path):
        return {}
    with open(path, "rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
    whole = content[: content.rfind(b"\n") + 1].decode("utf-8", "replace")
    rows = csv.DictReader(io.StringIO(whole, newline=""))
    if whole and rows.fieldnames != COLUMNS:
        raise UserError(f"{path}: found the columns {rows.fieldnames}; expected {COLUMNS}; name another --sort_into")
    return {(row["image"], row["sha256"]): row for row in rows}


def free_name(folder, into, source, claimed):
    """Where a picture goes, below `folder`: its own name, or with a suffix. Never over another file.

    A file of that name that no row speaks of and that is this very picture: linked by a run that was killed.
    """
    stem, extension = os.path.splitext(os.path.basename(source))
    for k in range(1, sys.maxsize):
        name = os.path.join(into, f"{stem}-{k}{extension}" if k > 1 else stem + extension)
        path = os.path.join(folder, name)
        if not os.path.lexists(path) or (name not in claimed and same(source, path)):
            return name


def same(source, path):
    return os.path.isfile(path) and (os.path.samefile(source, path) or filecmp.cmp(source, path, shallow=False))


def link_or_copy(source, target, folder):
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        part = os.path.join(folder, ".copying")
        shutil.copy2(source, part)
        os.rename(part, target)


def digest(path):
    """sha256 of a file, in hexadecimal; "" where there is no file."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
