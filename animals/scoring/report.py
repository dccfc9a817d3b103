"""What a validation run leaves behind: report.json, predictions.csv, report.html and two plots.

Beside the reports' folders stands index.html, which each run writes again (page.py makes the pages).
"""

import csv
import json
import os

from animals.command import UserError
from animals.files import write_json
from animals.scoring.page import report_page, write_index
from animals.scoring.plots import confusion_figure, reliability_figure

BRIEF = ("accuracy", "n", "chance", "macro_f1", "ece", "images_per_second", "accuracy_ci95", "seconds", "model")


def write_report(report, rows, folder, language="en"):
    """Everything about one run into `folder`, and the index beside that.

    All is made beside it first; an interrupted run leaves the old report.
    """
    new = f"{os.path.normpath(folder)}.new"
    os.makedirs(new, exist_ok=True)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(new, "predictions.csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    write_json(os.path.join(new, "report.json"), report)
    confusion_figure(report).savefig(os.path.join(new, "confusion_matrix.png"), dpi=150)
    reliability_figure(report).savefig(os.path.join(new, "reliability.png"), dpi=150)
    with open(os.path.join(new, "report.html"), "w", encoding="utf-8") as file:
        file.write(report_page(report, rows, folder, language))
    for name in os.listdir(new):
        os.replace(os.path.join(new, name), os.path.join(folder, name))
    os.rmdir(new)
    write_index(os.path.dirname(os.path.normpath(folder)), language)


def read_report(path):
    """(report, rows) as they were written, from a report folder or a file in it. Raises UserError if they are not."""
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    try:
        with open(os.path.join(folder, "report.json"), encoding="utf-8") as file:
            report = json.load(file)
        with open(os.path.join(folder, "predictions.csv"), newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            row["correct"] = {"True": True, "False": False}[row["correct"]]
            row |= {key: float(row[key]) for key in ("probability", *report["labels"])}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: found no readable report ({error!r}); expected a folder with report.json and predictions.csv; "
            "make it with validation.sh"
        ) from None
    return report, rows


def print_report(report, folder):
    """The tables for people, then the line for programs."""
    low, high = report["accuracy_ci95"]
    part = f" of {report['held_out']}" if report["held_out"] > report["n"] else ""
    print(f"\n{'label':<12} {'n':>5} {'precision':>9} {'recall':>7} {'95 % interval':>14} {'f1':>6}")
    for label, row in report["per_class"].items():
        interval = "{:.3f}, {:.3f}".format(*row["recall_ci95"])
        print(
            f"{label:<12} {row['n']:>5} {row['precision']:>9.3f} {row['recall']:>7.3f} {interval:>14} {row['f1']:>6.3f}"
        )
    print(
        f"\naccuracy {report['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f}, n = {report['n']}{part}; chance "
        f"{report['chance']:.2f}, always {report['majority_label']} {report['majority']:.2f}), macro-F1 "
        f"{report['macro_f1']:.4f}"
    )
    print("\n".join([leaks_line(report), certainty_line(report), answered_line(report)]))
    if report["comparison"]:
        print_comparison(report["comparison"])
    print(f"\n{'rival':<12} {'accuracy':>8}  95 % interval   {'this less it':>12}  95 % interval      {'p':>7}")
    for row in report["baselines"]:
        interval, difference = "{:.4f}, {:.4f}".format(*row["accuracy_ci95"]), row["difference_ci95"]
        print(
            f"{row['name']:<12} {row['accuracy']:>8.4f}  {interval}  {row['difference']:>+12.4f}  "
            f"{difference[0]:+.4f}, {difference[1]:+.4f}  {row['mcnemar_p']:>7.3g}"
        )
    print(
        f"{report['seconds']:.1f} s, {report['images_per_second']:.1f} images/s; {len(report['excluded'])} pictures "
        f"excluded; open {os.path.join(folder, 'report.html')}"
    )
    print(json.dumps({key: report[key] for key in BRIEF} | {"report": os.path.join(folder, "report.json")}))


def leaks_line(report):
    """How far the accuracy can be trusted: what of the held-out pictures training has seen."""
    leaks, n = report["leaks"], report["n"]
    if not leaks["checked"]:
        return "leaks: not known; `python data_process_utils.py` looks for pictures that are in both splits"
    line = f"leaks: none of the {n} pictures has a twin or look-alike in train"
    if leaks["n_without"] < n:
        line = f"leaks: {n - leaks['n_without']} of the {n} pictures have a twin ({leaks['identical']}) or look-alike "
        line += f"({leaks['look_alikes']}) in train"
        if leaks["n_without"]:
            low, high = leaks["accuracy_without_ci95"]
            line += f"; accuracy without them {leaks['accuracy_without']:.4f} (95 % interval {low:.4f} to {high:.4f}, "
            line += f"n = {leaks['n_without']})"
    if leaks["groups"] < n:
        line += f"; look-alikes among them: {leaks['groups']} groups, so the intervals are taken at n / "
        line += f"{report['design_effect']:.2f} (design effect)"
    return line


def certainty_line(report):
    found = report["calibration"]
    noise = found["ece_if_calibrated"]
    verdict = found["verdict"] if found["verdict"] != "calibrated" else f"calibrated, as far as {report['n']} can tell"
    return (
        f"certainty: {verdict}; calibration error {found['ece']:.4f}, a perfectly calibrated model shows "
        f"{noise['median']:.4f} (median) to {noise['percentile_99']:.4f} (99th percentile)"
    )


def answered_line(report):
    """What test.py --min_probability would cost and bring."""
    chosen = [row for row in report["answered"] if row["min_probability"] in (0.5, 0.8, 0.95) and row["share"]]
    said = [f"{r['min_probability']} answers {r['share']:.0%} at {r['accuracy']:.1%}" for r in chosen]
    return f"test.py --min_probability: {', '.join(said) or 'every answer is less certain than 0.5'}"


def print_comparison(c):
    (low, high), name = c["difference_ci95"], c["model"]
    print(
        f"against {name}: {c['accuracy']:.4f} - {c['other_accuracy']:.4f} = {c['difference']:+.4f} (95 % interval "
        f"{low:+.4f} to {high:+.4f}); {c['only_this']} pictures only this one has right, {c['only_other']} only the "
        f"other; McNemar's exact p = {c['mcnemar_p']:.3g}"
    )
