"""Name the animals in pictures without labels.

    python test.py                                          # every picture in input/test_data
    python test.py one.jpg some/folder --output names.csv   # pictures, folders or both
    python test.py --model_name_or_path model               # the untuned model
    python test.py --min_probability 0.6                    # `unsure` where the best label has less
    python test.py --html                                   # also names.html, a contact sheet, by label and certainty
    python test.py --resume                                 # go on where an interrupted run stopped

Leaves a CSV: image, prediction, probability (over the labels; all of them add up to 1), error, the second and third
guess with theirs, and one probability column a label. A picture that cannot be read is a row with an error. Rows are
written as they come, so an interrupted run keeps what it has.
"""

import csv
import io
import os
import sys

import config as settings
from animals.checkpoint.check import require_checkpoint
from animals.checkpoint.load import load_model, load_processor
from animals.checkpoint.task import settings_for
from animals.command import UserError, run
from animals.pictures.read import list_pictures
from animals.ranks import choose_arithmetic
from animals.scoring.report import contact_sheet
from animals.scoring.scorer import Scorer, add_inference_flags, score_batches

GUESSES = ("top2", "top2_probability", "top3", "top3_probability")


def find_pictures(paths):
    """Files as they are given, and every picture in the folders. Raises UserError if a path does not exist."""
    found = []
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"{path}: not found; expected a picture or a folder of pictures")
        found += list_pictures(path) if os.path.isdir(path) else [path]
    if not found:
        raise UserError(f"{', '.join(paths)}: found no picture; put some there, or name pictures or folders")
    return found


def row_of(picture, probability, labels, min_probability, error):
    """One row of the CSV: probabilities [labels], or the error of a picture that could not be read."""
    if error:
        return [picture, "", "", error] + [""] * (len(GUESSES) + len(labels))
    order = sorted(range(len(labels)), key=lambda k: -probability[k])
    guesses = [cell for k in order[1:3] for cell in (labels[k], probability[k])]
    best = probability[order[0]]
    name = labels[order[0]] if best >= min_probability else "unsure"
    return [picture, name, best, "", *guesses, *[""] * (len(GUESSES) - len(guesses)), *probability]


def read_finished(path, header, labels, min_probability):
    """The whole rows of an interrupted run's CSV, whose last line may be cut. Raises UserError on other columns."""
    with open(path, newline="", encoding="utf-8") as file:
        text = file.read()
    rows = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
    if rows and rows[0] != header:
        raise UserError(
            f"--resume: found the columns {','.join(rows[0])} in {path}; expected {','.join(header)}; remove it, or "
            "name another --output"
        )
    whole = [row for row in rows[1:] if len(row) == len(header)]
    first = len(header) - len(labels)  # the probabilities' columns start here; --min_probability may be a new one
    numbers = [[float(cell or "nan") for cell in row[first:]] for row in whole]
    return [row_of(row[0], p, labels, min_probability, row[3]) for row, p in zip(whole, numbers, strict=True)]


def write_sheet(output, labels, model, min_probability):
    """The contact sheet of a CSV, beside it."""
    with open(output, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if not row["error"]:
            row |= {key: float(row[key]) for key in ("probability", *labels)}
    path = f"{os.path.splitext(output)[0]}.html"
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        file.write(contact_sheet(rows, labels, model, os.path.dirname(path), min_probability))
    os.replace(f"{path}.new", path)
    return path


def main():
    parser = settings.parser(__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", metavar="PATH", help="pictures or folders (default: <input_dir>/test_data)")
    parser.add_argument("--output", default="predictions.csv", help="the CSV")
    parser.add_argument(
        "--min_probability", type=float, default=0.0, help="0 to 1; below it the prediction is `unsure`"
    )
    parser.add_argument("--html", action="store_true", help="also a contact sheet, beside the CSV")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows that --output has, name the other pictures"
    )
    add_inference_flags(parser)
    args = parser.parse_args()
    require_checkpoint(args.model_name_or_path)
    config = settings_for(settings.take(args), args.model_name_or_path)
    if not 0 <= args.min_probability <= 1:
        raise UserError(f"--min_probability: found {args.min_probability}; expected a number from 0 to 1")
    pictures = find_pictures(args.paths or [os.path.join(config.input_dir, "test_data")])
    folder = os.path.dirname(args.output) or "."
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"--output {args.output}: {folder} is not a folder that can be written to")
    header = ["image", "prediction", "probability", "error", *GUESSES, *config.labels]
    finished = []
    if args.resume and os.path.exists(args.output):
        finished = read_finished(args.output, header, config.labels, args.min_probability)
        known = {row[0] for row in finished}
        print(f"going on: {args.output} has {len(known)} pictures already", file=sys.stderr)
        pictures = [picture for picture in pictures if picture not in known]

    unreadable, results = 0, ()
    if pictures:
        from accelerate import PartialState

        on_cpu, dtype = choose_arithmetic(args.use_cpu, args.dtype)
        PartialState(cpu=on_cpu)  # the first one decides
        scorer = Scorer(load_processor(args.model_name_or_path, config.image_view), config)
        model = load_model(args.model_name_or_path, dtype, config.image_view)
        size = args.per_device_eval_batch_size
        batches = [list(range(i, min(i + size, len(pictures)))) for i in range(0, len(pictures), size)]
        results = score_batches(model, scorer, pictures, batches, args.dataloader_num_workers)
    with open(f"{args.output}.new", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *finished])
    os.replace(f"{args.output}.new", args.output)
    with open(args.output, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for indices, log_p, errors in results:
            for i, row in zip(indices, log_p.double().softmax(1).tolist(), strict=True):
                writer.writerow(row_of(pictures[i], row, config.labels, args.min_probability, errors.get(i)))
            file.flush()
            unreadable += len(errors)
    print(f"{len(pictures)} pictures, {unreadable} unreadable (column error); wrote {args.output}", file=sys.stderr)
    if args.html:
        path = write_sheet(args.output, config.labels, args.model_name_or_path, args.min_probability)
        print(f"contact sheet in {path}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
