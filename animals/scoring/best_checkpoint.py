"""Which checkpoint is best? One table of all of them, for validation.py --all_checkpoints."""

import csv
import json
import os
import sys

from animals.command import UserError
from animals.files import replacing
from animals.ranks import main_process
from animals.scoring.metrics import compare

COLUMNS = (
    "rank", "checkpoint", "step", "n", "accuracy", "low", "high", "macro_f1", "ece", "log_loss", "p_best", "error",
)  # fmt: skip


def rank_checkpoints(paths, run_one, table):
    """Score each of `paths` by run_one(path) -> (report, rows, folder), best accuracy first, into the CSV `table`.

    Ties go to the lower log loss. p_best: McNemar's exact p against the best; above 0.05 it may be as good. A
    checkpoint that cannot be read is a row with the error. All ranks; only the main one prints and writes. Raises
    UserError if none could be read.
    """
    main, done, failed = main_process(), [], []
    for i, path in enumerate(paths, 1):
        if main:
            print(f"{i} of {len(paths)}: {path}", file=sys.stderr)
        try:
            report, rows, folder = run_one(path)
            done.append((report, [row["correct"] for row in rows], folder))
        except UserError as error:
            failed.append({"checkpoint": path, "error": str(error).removeprefix(f"{path}: ")})
            if main:
                print(f"  {error}", file=sys.stderr)
    if not done:
        raise UserError(f"none of {len(paths)} checkpoints could be read; the first: {failed[0]['error']}")
    done.sort(key=lambda one: (-one[0]["accuracy"], one[0]["log_loss"]))
    best, best_right, best_folder = done[0]
    ranked = [
        {"rank": rank, "checkpoint": report["model"], "low": report["accuracy_ci95"][0]}
        | {"high": report["accuracy_ci95"][1], "p_best": compare(best_right, right)["mcnemar_p"]}
        | {key: report[key] for key in ("step", "n", "accuracy", "macro_f1", "ece", "log_loss")}
        for rank, (report, right, _) in enumerate(done, 1)
    ]
    if not main:
        return
    with replacing(table, newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(ranked + failed)
    width = max(len(path) for path in paths)
    print(
        f"\n{'':>4} {'checkpoint':<{width}} {'step':>6} {'accuracy':>8}  95 % interval   {'macro-F1':>8} {'ECE':>6} "
        f"{'log loss':>8} {'p':>7}"
    )
    for row in ranked:
        step = "" if row["step"] is None else row["step"]
        interval = f"{row['low']:.4f}, {row['high']:.4f}"
        print(
            f"{row['rank']:>4} {row['checkpoint']:<{width}} {step:>6} {row['accuracy']:>8.4f}  {interval}  "
            f"{row['macro_f1']:>8.4f} {row['ece']:>6.4f} {row['log_loss']:>8.4f} {row['p_best']:>7.3g}"
        )
    for row in failed:
        print(f"{'-':>4} {row['checkpoint']:<{width}} {row['error']}")
    print(
        f"n = {best['n']}, chance {best['chance']:.2f}; p: McNemar's exact test against the first. The best of "
        f"{len(done)} looks better than it is: choose by this table, quote an accuracy from other pictures\n"
        f"table in {table}, a page for each checkpoint beside it"
    )
    brief = ("accuracy", "n", "chance", "macro_f1", "images_per_second", "model")
    report = os.path.join(best_folder, "report.json")
    print(json.dumps({key: best[key] for key in brief} | {"report": report, "checkpoints": table}))
