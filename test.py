"""Name the animals in pictures without labels.

    python test.py                                          # every picture in input/test_data
    python test.py one.jpg some/folder --output names.csv   # pictures, folders or both
    python test.py --model_name_or_path model               # the untuned model
    python test.py --min_probability 0.6                    # `unsure` where the best label has less
    python test.py --html                                   # also names.html, a contact sheet, the least certain first
    python test.py --sort_into sorted                       # also the pictures, in a folder a label
    python test.py --resume                                 # go on where an interrupted run stopped
    python test.py --serve                                  # a local page: drop a picture, see the probabilities

Leaves a CSV: image, prediction, probability (over the labels; all of them add up to 1), error, the second and third
guess with theirs, the checkpoint's identity, and one probability column a label. A picture that cannot be read is a row
with an error. Rows are written as they come, so an interrupted run keeps what it has. --serve leaves nothing.
"""

import csv
import hashlib
import io
import os
import sys

import config as settings
from animals.checkpoint.check import require_checkpoint
from animals.checkpoint.task import settings_for
from animals.command import UserError, run
from animals.files import replacing
from animals.pictures.read import list_pictures
from animals.ranks import choose_arithmetic
from animals.scoring.page import contact_sheet
from animals.scoring.scorer import add_inference_flags, load_scorer, probabilities, score_batches
from animals.scoring.serve import Server, listen, serve
from animals.scoring.sort import sort_into

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


def identity(args, config):
    """Twelve digits that change with what answers: the checkpoint's files (name, size, time), dtype, view and words."""
    with os.scandir(args.model_name_or_path) as entries:
        files = sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in entries if e.is_file())
    about = [files, args.dtype, config.image_view, config.chat_template, config.question]
    about += [config.answer_for(label) for label in config.labels]
    return hashlib.sha256(repr(about).encode()).hexdigest()[:12]


def row_of(picture, probability, labels, min_probability, error, checkpoint):
    """One row of the CSV: probabilities [labels], or the error of a picture that could not be read."""
    if error:
        return [picture, "", "", error] + [""] * (len(GUESSES) + 1 + len(labels))
    order = sorted(range(len(labels)), key=lambda k: -probability[k])
    guesses = [cell for k in order[1:3] for cell in (labels[k], probability[k])]
    best = probability[order[0]]
    name = labels[order[0]] if best >= min_probability else "unsure"
    return [picture, name, best, "", *guesses, *[""] * (len(GUESSES) - len(guesses)), checkpoint, *probability]


def read_finished(path, header, labels, min_probability, checkpoint):
    """The whole rows of an interrupted run's CSV, whose last line may be cut.

    Raises UserError on other columns, and on rows of another checkpoint: one CSV holds one model's answers.
    """
    with open(path, newline="", encoding="utf-8") as file:
        text = file.read()
    rows = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
    if rows and rows[0] != header:
        raise UserError(
            f"--resume: found the columns {','.join(rows[0])} in {path}; expected {','.join(header)}; remove it, or "
            "name another --output"
        )
    whole = [row for row in rows[1:] if len(row) == len(header)]
    place = header.index("checkpoint")
    if others := {row[place] for row in whole} - {checkpoint, ""}:
        raise UserError(
            f"--resume: found answers of another checkpoint, dtype or prompt in {path} ({', '.join(sorted(others))}); "
            f"expected {checkpoint}; name the same --model_name_or_path, or leave --resume away and begin again"
        )
    first = len(header) - len(labels)  # the probabilities' columns start here; --min_probability may be a new one
    numbers = [[float(cell or "nan") for cell in row[first:]] for row in whole]
    return [
        row_of(row[0], p, labels, min_probability, row[3], checkpoint) for row, p in zip(whole, numbers, strict=True)
    ]


def read_rows(output):
    """The whole CSV, a dict a row."""
    with open(output, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_sheet(output, labels, model, language, min_probability):
    """The contact sheet of a CSV, beside it."""
    rows = read_rows(output)
    for row in rows:
        if not row["error"]:
            row |= {key: float(row[key]) for key in ("probability", *labels)}
    path = f"{os.path.splitext(output)[0]}.html"
    with replacing(path) as file:
        file.write(contact_sheet(rows, labels, model, os.path.dirname(path), language, min_probability))
    return path


def check_sorting(folder, paths):
    """Raises UserError unless `folder` can be written to and its pictures are not found as pictures again."""
    real = os.path.realpath(folder)
    for path in map(os.path.realpath, paths):
        if os.path.commonpath([path, real]) == path:
            raise UserError(f"--sort_into {folder}: found it within {path}; expected a folder outside; name another")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"--sort_into {folder}: found {error.strerror}; expected a folder; name another") from None


def load(args, config):
    """(scorer, model)"""
    from accelerate import PartialState

    on_cpu, dtype = choose_arithmetic(args.use_cpu, args.dtype)
    PartialState(cpu=on_cpu)  # the first one decides
    return load_scorer(args.model_name_or_path, config, dtype)


def serve_page(args, config, paths):
    """--serve: a page until it is ended. Its examples: pictures of `paths`, where there are any."""
    examples = [found for path in paths if os.path.exists(path) for found in list_pictures(path)]
    listening = listen(args.host, args.port)
    scorer, model = load(args, config)
    name = args.model_name_or_path
    serve(Server(scorer, model, name, examples, args.min_probability, config.language, args.host), listening)


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
    parser.add_argument("--sort_into", metavar="DIR", help="also the pictures in DIR/<label>/, as hard links or copies")
    parser.add_argument("--serve", action="store_true", help="instead a local page where a picture can be dropped")
    parser.add_argument("--host", default="127.0.0.1", help="address that --serve listens on; 0.0.0.0: for everybody")
    parser.add_argument("--port", type=int, default=7860, help="port that --serve listens on; 0: any free one")
    add_inference_flags(parser)
    args = parser.parse_args()
    require_checkpoint(args.model_name_or_path)
    config = settings_for(settings.take(args), args.model_name_or_path)
    if not 0 <= args.min_probability <= 1:
        raise UserError(f"--min_probability: found {args.min_probability}; expected a number from 0 to 1")
    paths = args.paths or [os.path.join(config.input_dir, "test_data")]
    if args.serve:
        if args.html or args.resume or args.sort_into:
            raise UserError(
                "--serve: found --html, --resume or --sort_into beside it; expected it alone; run them apart"
            )
        serve_page(args, config, paths)
        return
    pictures = find_pictures(paths)
    if args.sort_into:
        check_sorting(args.sort_into, paths)
    folder = os.path.dirname(args.output) or "."
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"--output {args.output}: {folder} is not a folder that can be written to")
    header = ["image", "prediction", "probability", "error", *GUESSES, "checkpoint", *config.labels]
    checkpoint = identity(args, config)
    finished = []
    if args.resume and os.path.exists(args.output):
        finished = read_finished(args.output, header, config.labels, args.min_probability, checkpoint)
        known = {row[0] for row in finished}
        print(f"going on: {args.output} has {len(known)} pictures already", file=sys.stderr)
        pictures = [picture for picture in pictures if picture not in known]

    unreadable, results = 0, ()
    if pictures:
        scorer, model = load(args, config)
        size = args.per_device_eval_batch_size
        batches = [list(range(i, min(i + size, len(pictures)))) for i in range(0, len(pictures), size)]
        results = score_batches(model, scorer, pictures, batches, args.dataloader_num_workers)
    with replacing(args.output, newline="") as file:
        csv.writer(file).writerows([header, *finished])
    with open(args.output, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for indices, log_p, errors in results:
            for i, row in zip(indices, probabilities(log_p), strict=True):
                error = errors.get(i)
                writer.writerow(row_of(pictures[i], row, config.labels, args.min_probability, error, checkpoint))
            file.flush()
            unreadable += len(errors)
    print(f"{len(pictures)} pictures, {unreadable} unreadable (column error); wrote {args.output}", file=sys.stderr)
    if args.html:
        name = args.model_name_or_path
        path = write_sheet(args.output, config.labels, name, config.language, args.min_probability)
        print(f"contact sheet in {path}", file=sys.stderr)
    if args.sort_into:
        count = sort_into(args.sort_into, read_rows(args.output))
        print(
            f"{args.sort_into}: {count['new']} pictures sorted in, {count['there'] + count['renamed']} were there "
            f"already ({count['renamed']} of them under another name now), {count['moved']} stay where you have put "
            f"them, {count['gone']} are no files; what went where: {os.path.join(args.sort_into, 'manifest.csv')}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run(main)
