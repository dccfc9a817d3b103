"""What a validation run leaves behind: report.json, predictions.csv, report.html and two plots.

    python report.py logs/validation/sft-llava-1.6-7b      # make page and plots again from report.json, predictions.csv

The page is one file (report.html beside this script is its template): no script, nothing fetched, pictures embedded
as small JPEGs up to EMBEDDED bytes, the worst mistakes first; what goes beyond stands there by file name.
"""

import base64
import csv
import io
import json
import os
import sys
import time
from urllib.parse import quote

from animals.command import UserError
from animals.pictures.read import PictureError, load_picture
from animals.scoring.plots import confusion_figure, reliability_figure

EMBEDDED = 13_000_000  # bytes of base64 a page; 3,000 pictures need about 10,000,000
SMALL, LARGE = 96, 240  # pixels, longest side of a thumbnail; of a picture in a gallery
MISTAKES, UNCERTAIN, CHANGED = 48, 12, 96  # pictures in a gallery
BRIEF = ("accuracy", "n", "chance", "macro_f1", "ece", "images_per_second", "accuracy_ci95", "seconds", "model")


def write_report(report, rows, folder):
    """Everything about one run into `folder`. All is made beside it first; an interrupted run leaves the old report."""
    new = f"{os.path.normpath(folder)}.new"
    os.makedirs(new, exist_ok=True)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(new, "predictions.csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with open(os.path.join(new, "report.json"), "w", encoding="utf-8") as file:
        json.dump(report, file, indent=2, ensure_ascii=False)
    for name, figure in (
        ("confusion_matrix.png", confusion_figure(report)),
        ("reliability.png", reliability_figure(report)),
    ):
        figure.savefig(os.path.join(new, name), dpi=150)
    with open(os.path.join(new, "report.html"), "w", encoding="utf-8") as file:
        file.write(page(report, rows, folder))
    for name in os.listdir(new):
        os.replace(os.path.join(new, name), os.path.join(folder, name))
    os.rmdir(new)


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
    for c in filter(None, [report["comparison"]]):
        print_comparison(c, c["model"])
    print(f"\n{'rival':<12} {'accuracy':>8}  95 % interval   {'this less it':>12}  95 % interval      {'p':>7}")
    for row in report["rivals"]:
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


def print_comparison(c, name):
    low, high = c["difference_ci95"]
    print(
        f"against {name}: {c['accuracy']:.4f} - {c['other_accuracy']:.4f} = {c['difference']:+.4f} (95 % interval "
        f"{low:+.4f} to {high:+.4f}); {c['only_this']} pictures only this one has right, {c['only_other']} only the "
        f"other; McNemar's exact p = {c['mcnemar_p']:.3g}"
    )


# --- the page --------------------------------------------------------------------------------------------------------


def page(report, rows, folder):
    """report.html for a report in `folder` (pictures are linked relative to it)."""
    number = {label: i for i, label in enumerate(report["labels"])}
    wrong = sorted((row for row in rows if not row["correct"]), key=lambda row: -row["probability"])
    right = sorted((row for row in rows if row["correct"]), key=lambda row: row["probability"])
    by_name, changed = {row["image"]: row for row in rows}, []
    if report["comparison"]:
        changed = [side | {"row": by_name[side["image"]]} for side in report["comparison"]["changed"]]
        changed = sorted(changed, key=lambda side: side["row"]["correct"])[:CHANGED]
    in_cell = {}
    for row in wrong + right:
        in_cell.setdefault((number[row["label"]], number[row["prediction"]]), []).append(row)
    confusions = [
        {"t": t, "p": p, "count": len(cell), "total": sum(report["confusion_matrix"][t])}
        for (t, p), cell in in_cell.items()
        if t != p
    ]
    mistakes, uncertain = wrong[:MISTAKES], right[:UNCERTAIN]
    small, large, dropped = embed([row["image"] for row in wrong + right], [r["image"] for r in mistakes + uncertain])
    return render(
        folder,
        title=f"Validation of {report['model']}",
        report=report,
        cells=[{"t": t, "p": p, "rows": cell} for (t, p), cell in sorted(in_cell.items())],
        confusions=sorted(confusions, key=lambda c: (-c["count"], c["t"], c["p"]))[:10],
        mistakes=mistakes,
        uncertain=uncertain,
        changed=changed,
        small=small,
        large=large,
        dropped=dropped,
    )


def contact_sheet(rows, labels, model, folder, min_probability=0.0):
    """The page of test.py: dicts of its CSV (probabilities as floats), by the name given, the most certain first."""
    named = sorted((row for row in rows if not row["error"]), key=lambda row: -row["probability"])
    groups = [(name, [row for row in named if row["prediction"] == name]) for name in [*labels, "unsure"]]
    small, _, dropped = embed([row["image"] for row in reversed(named)], [])
    return render(
        folder,
        title="Animals, as named",
        sheet=True,
        rows=rows,
        labels=labels,
        model=model,
        min_probability=min_probability,
        date=time.strftime("%Y-%m-%d %H:%M"),
        groups=[(name, group) for name, group in groups if group],
        unreadable=[row for row in rows if row["error"]],
        small=small,
        dropped=dropped,
    )


def render(folder, template="report.html", **context):
    from jinja2 import Environment, FileSystemLoader

    def show(value, kind):
        return {
            "percent": f"{100 * value:.1f}\N{NO-BREAK SPACE}%",
            "points": f"{100 * value:+.1f}",
            "ratio": f"{value:.3f}",
            "count": f"{value:,.0f}",
            "seconds": f"{value:,.1f}",
            "round": f"{100 * value:.0f}\N{NO-BREAK SPACE}%",
            "p": f"{value:.2g}" if value >= 0.0001 else "below 0.0001",
        }[kind]

    def top(row, labels):
        """The five most probable labels, and the true one if it is not among them."""
        best = sorted(labels, key=lambda label: -row[label])[:5]
        return best if row.get("label") in [None, *best] else [*best, row["label"]]

    here = Environment(loader=FileSystemLoader(os.path.dirname(os.path.abspath(__file__))), autoescape=True)
    here.filters |= {"show": show, "top": top, "basename": os.path.basename}
    here.filters["link"] = lambda path: quote(os.path.relpath(path, folder))
    return here.get_template(template).render(small_side=SMALL, large_side=LARGE, **context)


def embed(small, large):
    """Data URIs for the page: ({path: small picture}, {path: large one}, how many did not fit into EMBEDDED bytes).

    Paths in order of importance; the large ones go first. A picture that can no longer be read is left out.
    """
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    wanted = set(large)

    def shrink(path):
        try:
            picture = load_picture(path)
        except PictureError:
            return None, None
        return [encode(picture, side) for side in ((SMALL, LARGE) if path in wanted else (SMALL,))]

    def encode(picture, side):
        copy, file = picture.copy(), io.BytesIO()
        copy.thumbnail((side, side))
        copy.save(file, "JPEG", quality=60 if side == SMALL else 75, optimize=True)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()

    result, used, dropped = ({}, {}), 0, 0
    order = list(dict.fromkeys([*large, *small]))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for start in tqdm(range(0, len(order), 256), desc="thumbnails", disable=not sys.stderr.isatty()):
            block = order[start : start + 256]
            if used > EMBEDDED:
                dropped += len(block)
                continue
            for path, sizes in zip(block, threads.map(shrink, block), strict=True):
                used += sum(len(size or "") for size in sizes)
                if used > EMBEDDED:
                    dropped += 1
                    continue
                for known, size in zip(result, sizes, strict=False):
                    known[path] = size
    return *result, dropped
