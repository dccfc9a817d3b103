"""Name the animals in pictures that have no labels.

    python test.py                                          # every picture in input/test_data
    python test.py one.jpg some/folder --output names.csv   # pictures, folders or both
    python test.py --min_probability 0.6                    # `unsure` where the best label has less
    python test.py --min_labels_mass 0.5                    # `unsure` where the model would answer something else
    python test.py --html                                   # also a contact sheet, the least certain pictures first
    python test.py --resume                                 # go on where an interrupted run stopped

Leaves a CSV with a row per picture: image, prediction, probability, error, the second and third guess with their
probabilities, labels_mass (the probability that the model answers with any of the labels), checkpoint (it changes with
the model's files, dtype and question) and the probability of each label; these are made to add up to 1. A picture that
cannot be read has a row with an error. Each row is written as soon as it is known. Files in folders that are no
pictures have no row and are counted on stderr. Text that a spreadsheet would run gets a ' before it; bytes of a name
that are not UTF-8 are written with backslashes.
"""

import csv
import io
import os
import sys
from collections import Counter

import config as settings
from animals.checkpoint.check import require_checkpoint
from animals.checkpoint.task import checkpoint_id, settings_for
from animals.command import UserError, run
from animals.files import from_cell, looked_up, read_csv, replacing, require_writable, write_csv_rows
from animals.pictures.cache import cannot_list
from animals.pictures.prepare import counted
from animals.pictures.read import walk
from animals.ranks import choose_arithmetic
from animals.scoring.scorer import LOW_MASS, add_inference_flags, load_scorer, probabilities, score_batches
from animals.scoring.sheet import contact_sheet

GUESSES = ("top2", "top2_probability", "top3", "top3_probability")


def find_pictures(paths):
    """The paths of all pictures in files and folders. Raises UserError if a path does not exist, or there is none."""
    found, others = [], Counter()
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"{looked_up(path)}: not found; expected a picture or a folder of pictures")
        try:
            found += [picture for picture, _ in walk(path, others)] if os.path.isdir(path) else [path]
        except OSError as error:
            raise UserError(cannot_list(error, path)) from None
    if not found:
        there = counted(others) or "empty"
        raise UserError(f"{', '.join(paths)}: found no picture ({there}); put some there, or name pictures or folders")
    if others:
        print(f"no rows for files that are not pictures: {counted(others)}", file=sys.stderr)
    return found


def as_written(path: str) -> str:
    """A path as it stands in the CSV: bytes that are not UTF-8 with backslashes."""
    return path.encode(errors="backslashreplace").decode()


def require_output(output, page):
    """Raises UserError unless both files can be written: the CSV and, where one is asked for, the contact sheet."""
    folder = os.path.dirname(output) or "."
    if not os.path.isdir(folder):
        raise UserError(f"--output {output}: {folder} is not a folder that exists; make it, or name another")
    require_writable("--output", folder)
    for path in filter(None, (output, page)):
        if os.path.isdir(path):
            raise UserError(f"--output {output}: found a folder {path}; expected the name of a file; name another")
    if output == page:
        raise UserError(f"--output {output}: found no name for a CSV; expected one such as predictions.csv")


def make_row(labels, args, checkpoint, picture, mass, probability, error):
    """One row of the CSV, from labels_mass and probabilities [labels], or from the error of an unreadable picture."""
    if error:
        return [as_written(picture), "", "", error] + [""] * (len(GUESSES) + 2 + len(labels))
    (name, best), *others = sorted(zip(labels, probability, strict=True), key=lambda pair: -pair[1])
    prediction = name if best >= args.min_probability and mass >= args.min_labels_mass else "unsure"
    guesses = [cell for pair in [*others, ("", ""), ("", "")][:2] for cell in pair]  # there may be one label only
    return [as_written(picture), prediction, best, "", *guesses, mass, checkpoint, *probability]


def read_finished(path, header, labels, checkpoint):
    """[(picture, labels_mass, probabilities [labels], error)] of an interrupted run's CSV, whose last line may be cut.

    Raises UserError if the columns or the checkpoint are others: one CSV holds the answers of one model.
    """
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        lines = csv.reader(io.StringIO(file.read().rpartition("\n")[0], newline=""))
    first, *rows = [[from_cell(cell) for cell in row] for row in lines] or [header]
    if first != header:
        found = f"found the columns {','.join(first)} in {path}; expected {','.join(header)}"
        raise UserError(f"--resume: {found}; remove it, or name another --output")
    rows = [row for row in rows if len(row) == len(header)]
    if others := {row[header.index("checkpoint")] for row in rows} - {checkpoint, ""}:
        found = f"found answers of another checkpoint, dtype or prompt in {path} ({', '.join(sorted(others))})"
        way = "name the same --model_name_or_path, or leave --resume away and begin again"
        raise UserError(f"--resume: {found}; expected {checkpoint}; {way}")
    start = header.index("labels_mass")  # then the checkpoint, then the probabilities
    numbers = [[float(cell or "nan") for cell in (row[start], *row[-len(labels) :])] for row in rows]
    return [(row[0], mass, p, row[3]) for row, (mass, *p) in zip(rows, numbers, strict=True)]


def name_pictures(args, config, pictures):
    """Loads the model, then returns an iterator over [(picture, labels_mass, probabilities [labels], error)]."""
    from accelerate import PartialState

    PartialState(cpu=args.use_cpu)  # the first call decides where this process computes
    scorer, model = load_scorer(args.model_name_or_path, config, args.dtype)
    places, size = range(len(pictures)), args.per_device_eval_batch_size
    batches = [places[i : i + size] for i in places[::size]]
    scored = score_batches(model, scorer, pictures, batches, args.dataloader_num_workers)
    return (
        [(pictures[i], mass, p, errors.get(i)) for i, mass, p in zip(indices, *probabilities(log_p), strict=True)]
        for indices, log_p, errors in scored
    )


def main():
    parser = settings.parser(__doc__.splitlines()[0], (*settings.TASK_FIELDS, "input_dir", "language"))
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", help="pictures or folders (default: <input_dir>/test_data)")
    add("--output", default="predictions.csv", help="the CSV")
    add("--min_probability", type=float, default=0.0, help="0 to 1; below it the prediction is `unsure`")
    add("--min_labels_mass", type=float, default=0.0, help="0 to 1; `unsure` where all labels together have less")
    add("--html", action="store_true", help="also write a contact sheet, beside the CSV")
    add("--resume", action="store_true", help="keep the rows that --output has and name the other pictures")
    add_inference_flags(parser)
    args = parser.parse_args()
    model, output = args.model_name_or_path, args.output
    require_checkpoint(model)
    config = settings_for(settings.config_from(args), model)
    pictures = find_pictures(args.paths or [os.path.join(config.input_dir, "test_data")])
    page = f"{os.path.splitext(output)[0]}.html" if args.html else None
    require_output(output, page)
    header = ["image", "prediction", "probability", "error", *GUESSES, "labels_mass", "checkpoint", *config.labels]
    args.use_cpu, args.dtype = choose_arithmetic(args.use_cpu, args.dtype)
    checkpoint = checkpoint_id(model, args.dtype, config)
    again = args.resume and os.path.exists(output)
    finished = read_finished(output, header, config.labels, checkpoint) if again else []
    if known := {row[0] for row in finished}:
        print(f"going on: {output} has {len(known)} pictures already", file=sys.stderr)
    asked = [picture for picture in pictures if as_written(picture) not in known]

    unreadable, low, batches = 0, 0, name_pictures(args, config, asked) if asked else ()
    with replacing(output, newline="") as file:
        write_csv_rows(file, [header, *(make_row(config.labels, args, checkpoint, *done) for done in finished)])
    with open(output, "a", newline="", encoding="utf-8") as file:
        for batch in batches:
            write_csv_rows(file, [make_row(config.labels, args, checkpoint, *done) for done in batch])
            file.flush()
            unreadable += sum(error is not None for *_, error in batch)
            low += sum(mass < LOW_MASS for _, mass, *_ in batch)  # NaN is not
    print(f"{len(asked)} pictures, {unreadable} unreadable (column error); wrote {output}", file=sys.stderr)
    if low:
        found = f"{low} of them have a labels_mass below {LOW_MASS}: the model would rather answer something else"
        print(f"{found}; --min_labels_mass {LOW_MASS} names them unsure", file=sys.stderr)
    if page:
        paths = {as_written(picture): picture for picture in pictures}  # links lead to the real names
        rows = [row | {"image": paths.get(row["image"], row["image"])} for row in read_csv(output)[1]]
        about = model, os.path.dirname(output) or ".", config.language, args.min_probability, args.min_labels_mass
        with replacing(page, errors="backslashreplace") as file:
            file.write(contact_sheet(rows, config.labels, *about))
        print(f"contact sheet in {page}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
