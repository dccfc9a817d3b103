"""Name the animals in pictures that have no labels.

    python test.py                                          # every picture in input/test_data
    python test.py one.jpg some/folder --output names.csv   # pictures, folders or both
    python test.py --min_probability 0.6                    # `unsure` where the best label has less
    python test.py --html                                   # also a contact sheet, the least certain pictures first
    python test.py --resume                                 # go on where an interrupted run stopped

Leaves a CSV with a row per picture: image, prediction, probability, error, the second and third guess with their
probabilities, checkpoint (it changes with the model's files, dtype and question) and the probability of each label;
these add up to 1. A picture that cannot be read has a row with an error. Each row is written as soon as it is known.
"""

import csv
import io
import os
import sys

import config as settings
from animals.checkpoint.check import require_checkpoint
from animals.checkpoint.task import checkpoint_id, settings_for
from animals.command import UserError, run
from animals.files import replacing
from animals.pictures.read import list_pictures
from animals.ranks import choose_arithmetic
from animals.scoring.scorer import add_inference_flags, load_scorer, probabilities, score_batches
from animals.scoring.sheet import contact_sheet

GUESSES = ("top2", "top2_probability", "top3", "top3_probability")


def find_pictures(paths):
    """The paths of all pictures in files and folders. Raises UserError if a path does not exist, or there is none."""
    found = []
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"{path}: not found; expected a picture or a folder of pictures")
        found += list_pictures(path) if os.path.isdir(path) else [path]
    if not found:
        raise UserError(f"{', '.join(paths)}: found no picture; put some there, or name pictures or folders")
    return found


def make_row(labels, min_probability, checkpoint, picture, probability, error):
    """One row of the CSV, from the probabilities [labels] or from the error of a picture that could not be read."""
    if error:
        return [picture, "", "", error] + [""] * (len(GUESSES) + 1 + len(labels))
    (name, best), *others = sorted(zip(labels, probability, strict=True), key=lambda pair: -pair[1])
    guesses = [cell for pair in [*others, ("", ""), ("", "")][:2] for cell in pair]  # there may be one label only
    return [picture, name if best >= min_probability else "unsure", best, "", *guesses, checkpoint, *probability]


def read_finished(path, header, labels, checkpoint):
    """[(picture, probabilities [labels], error)] of an interrupted run's CSV, whose last line may be cut.

    Raises UserError if the columns or the checkpoint are others: one CSV holds the answers of one model.
    """
    with open(path, newline="", encoding="utf-8") as file:
        text = file.read()
    first, *rows = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))) or [header]
    if first != header:
        found = f"found the columns {','.join(first)} in {path}; expected {','.join(header)}"
        raise UserError(f"--resume: {found}; remove it, or name another --output")
    rows = [row for row in rows if len(row) == len(header)]
    if others := {row[header.index("checkpoint")] for row in rows} - {checkpoint, ""}:
        raise UserError(
            f"--resume: found answers of another checkpoint, dtype or prompt in {path} ({', '.join(sorted(others))}); "
            f"expected {checkpoint}; name the same --model_name_or_path, or leave --resume away and begin again"
        )
    return [(row[0], [float(cell or 0) for cell in row[-len(labels) :]], row[3]) for row in rows]


def name_pictures(args, config, pictures):
    """Loads the model, then returns an iterator over batches: [(picture, probabilities [labels], error or None)]."""
    from accelerate import PartialState

    PartialState(cpu=args.use_cpu)  # the first call decides where this process computes
    scorer, model = load_scorer(args.model_name_or_path, config, args.dtype)
    places, size = range(len(pictures)), args.per_device_eval_batch_size
    batches = [places[i : i + size] for i in places[::size]]
    scored = score_batches(model, scorer, pictures, batches, args.dataloader_num_workers)
    return (
        [(pictures[i], p, errors.get(i)) for i, p in zip(indices, probabilities(log_p), strict=True)]
        for indices, log_p, errors in scored
    )


def main():
    parser = settings.parser(__doc__.splitlines()[0], (*settings.TASK_FIELDS, "input_dir", "language"))
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", help="pictures or folders (default: <input_dir>/test_data)")
    add("--output", default="predictions.csv", help="the CSV")
    add("--min_probability", type=float, default=0.0, help="0 to 1; below it the prediction is `unsure`")
    add("--html", action="store_true", help="also write a contact sheet, beside the CSV")
    add("--resume", action="store_true", help="keep the rows that --output has and name the other pictures")
    add_inference_flags(parser)
    args = parser.parse_args()
    model, output, limit = args.model_name_or_path, args.output, args.min_probability
    require_checkpoint(model)
    config = settings_for(settings.config_from(args), model)
    pictures = find_pictures(args.paths or [os.path.join(config.input_dir, "test_data")])
    folder = os.path.dirname(output) or "."
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"--output {output}: {folder} is not a folder that can be written to")
    header = ["image", "prediction", "probability", "error", *GUESSES, "checkpoint", *config.labels]
    args.use_cpu, args.dtype = choose_arithmetic(args.use_cpu, args.dtype)
    checkpoint = checkpoint_id(model, args.dtype, config)
    finished = []
    if args.resume and os.path.exists(output):
        finished = read_finished(output, header, config.labels, checkpoint)
        known = {picture for picture, _, _ in finished}
        print(f"going on: {output} has {len(known)} pictures already", file=sys.stderr)
        pictures = [picture for picture in pictures if picture not in known]

    unreadable, batches = 0, name_pictures(args, config, pictures) if pictures else ()
    with replacing(output, newline="") as file:
        csv.writer(file).writerows([header, *(make_row(config.labels, limit, checkpoint, *done) for done in finished)])
    with open(output, "a", newline="", encoding="utf-8") as file:
        for batch in batches:
            csv.writer(file).writerows(make_row(config.labels, limit, checkpoint, *done) for done in batch)
            file.flush()
            unreadable += sum(error is not None for _, _, error in batch)
    print(f"{len(pictures)} pictures, {unreadable} unreadable (column error); wrote {output}", file=sys.stderr)
    if args.html:
        with open(output, newline="", encoding="utf-8") as file:
            rows, page = list(csv.DictReader(file)), f"{os.path.splitext(output)[0]}.html"
        with replacing(page) as file:
            file.write(contact_sheet(rows, config.labels, model, folder, config.language, limit))
        print(f"contact sheet in {page}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
