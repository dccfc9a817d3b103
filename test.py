"""Name the animals in pictures without labels.

    python test.py                                          # every picture in input/test_data
    python test.py one.jpg some/folder --output names.csv   # pictures, folders or both
    python test.py --model_name_or_path model               # the untuned model

Leaves a CSV: image, prediction, probability (over the labels; all of them add up to 1), error, and one probability
column a label. A picture that cannot be read is a row with an error. Rows are written as they come, so an
interrupted run keeps what it has.
"""

import csv
import os
import sys

import config as settings
from checkpoint import load_model, load_processor
from config import UserError
from data_process_utils import list_pictures
from preflight import require_checkpoint
from validation import Scorer, add_inference_flags, score_batches


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


def main():
    parser = settings.parser(__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", metavar="PATH", help="pictures or folders (default: <input_dir>/test_data)")
    parser.add_argument("--output", default="predictions.csv", help="the CSV")
    add_inference_flags(parser)
    args = parser.parse_args()
    config = settings.take(args)
    require_checkpoint(args.model_name_or_path)
    pictures = find_pictures(args.paths or [os.path.join(config.input_dir, "test_data")])
    folder = os.path.dirname(args.output) or "."
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"--output {args.output}: {folder} is not a folder that can be written to")

    scorer = Scorer(load_processor(args.model_name_or_path), config)
    model = load_model(args.model_name_or_path, args.dtype)
    size = args.per_device_eval_batch_size
    batches = [list(range(i, min(i + size, len(pictures)))) for i in range(0, len(pictures), size)]
    unreadable = 0
    with open(args.output, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "prediction", "probability", "error", *scorer.labels])
        for indices, log_p, errors in score_batches(model, scorer, pictures, batches, args.dataloader_num_workers):
            for i, row in zip(indices, log_p.softmax(1).tolist(), strict=True):
                if i in errors:
                    unreadable += 1
                    writer.writerow([pictures[i], "", "", errors[i]] + [""] * len(row))
                else:
                    best = max(range(len(row)), key=row.__getitem__)
                    writer.writerow([pictures[i], scorer.labels[best], row[best], "", *row])
            file.flush()
    print(f"{len(pictures)} pictures, {unreadable} unreadable (column error); wrote {args.output}", file=sys.stderr)


if __name__ == "__main__":
    settings.run(main)
