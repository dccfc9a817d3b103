"""The files of a validation run (report.json, predictions.csv, the pages that page.py makes) and what it prints."""

import json
import os

from animals.command import UserError
from animals.files import looked_up, read_csv, read_json, write_csv_rows, write_json
from animals.scoring.metrics import one_sided
from animals.scoring.page import report_page, write_index
from animals.scoring.scorer import LOW_MASS

BRIEF = ("accuracy", "n", "chance", "macro_f1", "ece", "images_per_second", "accuracy_ci95", "seconds", "model")


def write_report(report, rows, folder, language="en"):
    """Write the files of one run into `folder`, then the index of all reports beside it.

    report, rows: what validate() returns. The files are made beside `folder`; an interrupted run leaves the old report.
    """
    folder, new = os.path.normpath(folder), f"{os.path.normpath(folder)}.new"
    os.makedirs(new, exist_ok=True)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(new, "predictions.csv"), "w", newline="", encoding="utf-8") as file:
        write_csv_rows(file, [list(rows[0]), *(row.values() for row in rows)])
    write_json(os.path.join(new, "report.json"), report)
    with open(os.path.join(new, "report.html"), "w", encoding="utf-8") as file:
        file.write(report_page(report, rows, folder, language))
    for name in os.listdir(new):
        os.replace(os.path.join(new, name), os.path.join(folder, name))
    os.rmdir(new)
    write_index(os.path.dirname(folder), language)


def read_report(path):
    """(report, rows) as they were written, of a report's folder or a file in it. Raises UserError if there is none."""
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    try:
        report = read_json(os.path.join(folder, "report.json"))
        _, rows = read_csv(os.path.join(folder, "predictions.csv"))
        for row in rows:
            row["correct"] = {"True": True, "False": False}[row["correct"]]
            row |= {key: float(row[key]) for key in ("probability", *report["labels"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        found, expected = f"found no readable report ({error!r})", "a folder with report.json and predictions.csv"
        raise UserError(f"{looked_up(path)}: {found}; expected {expected}; make it with validation.sh") from None
    return report, rows


def print_report(report, folder):
    """Print the tables for people, then the line of JSON for programs."""
    print(f"\n{'label':<12} {'n':>5} {'precision':>9} {'recall':>7} {'95 % interval':>14} {'f1':>6}")
    for label, row in report["per_class"].items():
        line = "{:<12} {n:>5} {precision:>9.3f} {recall:>7.3f}   {:.3f}, {:.3f} {f1:>6.3f}"
        print(line.format(label, *row["recall_ci95"], **row))
    part = f" of {report['held_out']}" if report["held_out"] > report["n"] else ""
    about = "{n}{part}; chance {chance:.2f}, always {majority_label} {majority:.2f}".format(part=part, **report)
    print(f"\naccuracy {measured_line(report, '', about)}, macro-F1 {report['macro_f1']:.4f}")
    print(duplicates_line(report), calibration_line(report), sep="\n")
    if c := report.get("chosen"):
        line, n = f"chosen as the best of its run on {c['n_chosen_on']} of these pictures", c["n_others"]
        others = f"on the others it is {measured_line(c, '_others', n)}" if n else "there are no others"
        print(f"{line}, so its accuracy on them is probably a little too high; {others}")
    if q := report["quarantined"]:
        some = f"; with those that can be read the accuracy is {measured_line(q, '_with', q['n_with'])}"
        print(f"quarantine: {q['n']} held-out pictures are there{some if q['n_with'] > report['n'] else ''}")
    for line in one_sided_lines(report):
        print(line)
    if (mass := report["labels_mass"]) < LOW_MASS:
        why = "(labels_mass): the model would rather answer something else"
        print(f"warning: the probability of all labels together is {mass:.4f} on average {why}")
    if c := report["comparison"]:
        low, high = c["difference_ci95"]
        print(
            f"against {c['model']}: {c['accuracy']:.4f} - {c['other_accuracy']:.4f} = {c['difference']:+.4f} "
            f"(95 % interval {low:+.4f} to {high:+.4f}); {c['only_this']} pictures only this one has right, "
            f"{c['only_other']} only the other: {c['verdict'].replace('_', ' ')}, on these pictures, in one run"
        )
    speed = f"{report['seconds']:.1f} s, {report['images_per_second']:.1f} images/s"
    print(f"{speed}; {len(report['excluded'])} pictures excluded; open {os.path.join(folder, 'report.html')}")
    print(json.dumps({key: report[key] for key in BRIEF} | {"report": os.path.join(folder, "report.json")}))


def one_sided_lines(report):
    """Warnings, a line each, about answers that look like a failed training (metrics.one_sided)."""
    (most, never), lines = one_sided(report), []
    if most:
        lines.append(f"warning: more than 90 % of the answers are {most}, the label of fewer than half of the pictures")
    if never:
        lines.append(f"warning: never answered, though each has ten pictures or more: {', '.join(never)}")
    return lines


def measured_line(values, which, n):
    """The accuracy `accuracy{which}` of the dict `values`, its interval, and on how many pictures."""
    accuracy, bounds = values[f"accuracy{which}"], values[f"accuracy{which}_ci95"]
    return "{:.4f} (95 % interval {:.4f} to {:.4f}, n = {})".format(accuracy, *bounds, n)


def duplicates_line(report):
    """How many held-out pictures were found in training, too, what is mostly missed, and the accuracy without them."""
    found, n = report["duplicates"], report["n"]
    if not found["checked"]:
        return "duplicates: not known; `python data_process_utils.py` looks for pictures that are in both splits"
    line = f"duplicates: found, of the {n} pictures, {found['identical']} identical to a training picture and "
    line += f"{found['near_duplicates']} near-duplicates of one"
    if 0 < found["n_without"] < n:
        line += f"; accuracy without them {measured_line(found, '_without', found['n_without'])}"
    if found["groups"] < n:
        line += f"; the pictures form {found['groups']} groups of near-duplicates, so the intervals are those of "
        line += f"n / {report['design_effect']:.2f} (design effect)"
    line += "; most copies that were cropped by 5 % on each side, or have a border or a banner, are not found"
    return f"{line}; nobody knows which pictures CLIP and LLaVA had seen before"


def calibration_line(report):
    """Whether the model is right as often as its probabilities say."""
    found, noise = report["calibration"], report["calibration"]["ece_if_calibrated"]
    few = f", as far as {report['n']} pictures can tell" if found["verdict"] == "calibrated" else ""
    few = " but for one confident mistake, which one wrong label would explain" if found["one_mistake"] else few
    return (
        f"calibration: {found['verdict']}{few}; expected calibration error {found['ece']:.4f}; a perfectly calibrated "
        f"model shows {noise['median']:.4f} (median) to {noise['percentile_99']:.4f} (99th percentile)"
    )
