"""Fills the templates of pages/: the report, test.py's contact sheet, the audit, the index of all reports.

Each page is one file. Numbers reach its template as they stand in report.json, texts come from texts.py. Nothing is
fetched: pictures are embedded as small JPEGs up to EMBEDDED bytes, the worst mistakes first; what goes
beyond stands there by file name.
"""

import base64
import io
import json
import os
import time
from math import ceil, floor
from pathlib import Path
from urllib.parse import quote

from animals.checkpoint.steps import run_name
from animals.files import replacing
from animals.pictures.read import PictureError, load_picture
from config import LABELS_IN_CHINESE

PAGES = Path(__file__).parent / "pages"
TEXTS = json.loads((PAGES / "texts.json").read_text(encoding="utf-8"))  # key: [English, Chinese]
EMBEDDED = 13_000_000  # bytes of base64 a page; 3,000 pictures need about 10,000,000
SMALL, LARGE = 96, 240  # pixels, longest side: of a thumbnail; in a gallery
SHEET, MANY = (144, 112), 2000  # of a contact sheet's thumbnail, and where there are more than MANY, so that all fit
WORST, MISTAKES, UNCERTAIN, CHANGED = 8, 48, 12, 96  # pictures on the first screen; in a gallery
FIRST = 60  # pictures that a contact sheet begins with


class Texts:
    """The sentences of the pages in one language, `en` or `zh`, from pages/texts.json.

    A call fills the {places} of a sentence. Values are escaped; the sentences are trusted HTML. `count` chooses
    between the two forms of "one|many".
    """

    def __init__(self, language):
        self.column = ("en", "zh").index(language)

    def __call__(self, key, count=None, **values):
        from markupsafe import Markup

        one, _, many = TEXTS[key][self.column].partition("|")
        return Markup(many if many and count != 1 else one).format(**values)

    def label(self, label):
        """The name of a label, or of the answer `unsure`, in this language."""
        if label == "unsure":
            return str(self("unsure"))
        return LABELS_IN_CHINESE.get(label, label) if self.column else label

    def reason(self, text):
        """The message of a PictureError ("category" or "category: detail") in this language."""
        category, colon, detail = text.partition(": ")
        known = TEXTS.get(f"reason_{category}")
        return (known[self.column] if known else category) + colon + detail


def report_page(report, rows, folder, language):
    """report.html for a report in `folder` (pictures are linked relative to it)."""
    number = {label: i for i, label in enumerate(report["labels"])}
    wrong = sorted((row for row in rows if not row["correct"]), key=lambda row: -row["probability"])
    right = sorted((row for row in rows if row["correct"]), key=lambda row: row["probability"])
    changed, other_said, by_name = [], {}, {row["image"]: row for row in rows}
    suspects = [by_name[one["image"]] | one for one in report.get("suspects", []) if one["image"] in by_name]
    if report["comparison"]:
        changed = [side | {"row": by_name[side["image"]]} for side in report["comparison"]["changed"]]
        changed = sorted(changed, key=lambda side: side["row"]["correct"])
        other_said = {side["image"]: side["other_prediction"] for side in changed}
    in_cell = {}
    for row in wrong + right:
        in_cell.setdefault((number[row["label"]], number[row["prediction"]]), []).append(row)
    pairs = {}
    for t, p in in_cell:
        if t != p:
            pairs.setdefault((min(t, p), max(t, p)), []).append((t, p, len(in_cell[t, p])))
    pairs = sorted(pairs.values(), key=lambda sides: -sum(n for _, _, n in sides))
    often = [sides for sides in pairs if sum(n for _, _, n in sides) > 1]
    bins = report["calibration"]["bins"]
    shares = [row["accuracy"] for row in report["answered"] if row["share"]]
    mistakes, uncertain = wrong[:MISTAKES], right[:UNCERTAIN]
    small, large, dropped = embed([row["image"] for row in wrong + right], [r["image"] for r in mistakes + uncertain])
    rivals = [rival for rival in report.get("baselines") or [] if rival["name"] != "majority"]  # far off the scale
    low, high = report["accuracy_ci95"]
    return render(
        "report.html",
        folder,
        language,
        report=report,
        scale=scale(low, high),
        baselines_scale=scale(
            min([low, *(rival["accuracy_ci95"][0] for rival in rivals)]),
            max([high, *(rival["accuracy_ci95"][1] for rival in rivals)]),
        ),
        class_scale=scale(min(row["recall_ci95"][0] for row in report["per_class"].values() if row["n"]), 1),
        certain_scale=scale(min(row["confidence"] for row in bins), 1),
        right_scale=scale(min(row["accuracy_ci95"][0] for row in bins), 1),
        answered_scale=scale(min(shares), max(shares)),
        calibration=report["calibration"],
        cells=[{"t": t, "p": p, "rows": cell} for (t, p), cell in sorted(in_cell.items())],
        pairs=[
            {"sides": sorted(sides, key=lambda side: -side[2]), "row": in_cell[max(sides, key=lambda s: s[2])[:2]][0]}
            for sides in often[:10]
        ],
        singles=len(pairs) - len(often),
        suspects=suspects,
        wrong=len(wrong),
        mistakes=mistakes,
        worst=WORST,
        uncertain=uncertain,
        changed=changed[:CHANGED],
        most=CHANGED,
        other_said=other_said,
        small=small,
        large=large,
        dropped=dropped,
    )


def contact_sheet(rows, labels, model, folder, language, min_probability=0.0):
    """The page of test.py: dicts of its CSV (probabilities as floats); FIRST of all, then by the name given.

    The least certain come first: they are what needs a look.
    """
    named = sorted((row for row in rows if not row["error"]), key=lambda row: row["probability"])
    groups = [(name, [row for row in named if row["prediction"] == name]) for name in [*labels, "unsure"]]
    side = SHEET[len(named) > MANY]
    small, _, dropped = embed([row["image"] for row in named], [], side)
    return render(
        "sheet.html",
        folder,
        language,
        count=len(rows),
        labels=labels,
        model=model,
        min_probability=min_probability,
        date=time.strftime("%Y-%m-%d %H:%M"),
        first=named[:FIRST],
        groups=[(name, group) for name, group in groups if group],
        unreadable=[row for row in rows if row["error"]],
        side=side,
        small=small,
        dropped=dropped,
    )


def write_index(report_dir, language):
    """<report_dir>/index.html: every report below it side by side, by run, the newest run first, in order of steps."""
    found, broken = [], []
    for path in sorted(Path(report_dir).glob("*/report.json")):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            keys = ("model", "step", "n", "accuracy", "accuracy_ci95", "macro_f1", "ece", "date")
            row = {key: report[key] for key in keys} | {"leaks": report.get("leaks"), "folder": path.parent.name}
            run = run_name(report["model"])
            found.append(row | {"run": run, "final": run == path.parent.name})
        except (OSError, ValueError, KeyError, TypeError):
            broken.append(str(path))
    runs = {}
    for row in sorted(found, key=lambda row: (row["step"] or 0, row["final"])):
        runs.setdefault(row["run"], []).append(row)
    ordered = sorted(runs.items(), key=lambda run: max(row["date"] for row in run[1]), reverse=True)
    page = render(
        "index.html",
        report_dir,
        language,
        runs=[(run, rows, curve(rows)) for run, rows in ordered],
        count=len(found),
        scale=scale(
            min((row["accuracy_ci95"][0] for row in found), default=0),
            max((row["accuracy_ci95"][1] for row in found), default=1),
        ),
        broken=broken,
    )
    with replacing(os.path.join(report_dir, "index.html")) as file:
        file.write(page)


def curve(rows):
    """{scale, points}: a run's accuracies over its steps, x and y from 0 to 1; None for fewer than two steps."""
    rows = [row for row in rows if row["step"] is not None]
    if len({row["step"] for row in rows}) < 2:
        return None
    axis = scale(min(row["accuracy_ci95"][0] for row in rows), max(row["accuracy_ci95"][1] for row in rows))
    last = max(row["step"] for row in rows)
    points = [
        row | {"x": row["step"] / last, "y": at(row["accuracy"], axis)}
        | {"low": at(row["accuracy_ci95"][0], axis), "high": at(row["accuracy_ci95"][1], axis)}
        for row in rows
    ]  # fmt: skip
    return {"scale": axis, "points": points, "last": last}


def scale(low, high):
    """Ticks of the part of 0 to 1 on which an interval can be seen: round numbers around it, six parts at most."""
    margin = max((high - low) / 4, 0.005)  # a single value is a part, too
    for step in (0.01, 0.02, 0.05, 0.1, 0.2):  # the last one always fits
        start, end = max(0, floor((low - margin) / step)), min(round(1 / step), ceil((high + margin) / step))
        if end - start <= 6:
            return [k * step for k in range(start, end + 1)]
    raise AssertionError((low, high))


def at(value, ticks):
    """Where a value lies on a scale, 0 to 1."""
    return min(1, max(0, (value - ticks[0]) / (ticks[-1] - ticks[0])))


def show(value, kind):
    """A number for people."""
    space = "\N{NO-BREAK SPACE}"
    if kind == "sure":  # a probability: 100.0 % would say too much
        return f">{space}99.9{space}%" if value >= 0.9995 else f"{100 * value:.1f}{space}%"
    return {
        "percent": f"{100 * value:.1f}{space}%",
        "points": f"{100 * value:+.1f}",
        "ratio": f"{value:.3f}",
        "count": f"{value:,.0f}",
        "seconds": f"{value:,.1f}",
        "round": f"{100 * value:.0f}{space}%",
        "p": f"{value:.2g}" if value >= 0.0001 else "< 0.0001",
        "p=": f"= {value:.2g}" if value >= 0.0001 else "< 0.0001",
    }[kind]


def top(row, labels):
    """The labels of at least 1 %, the most probable first: five at most."""
    best = sorted(labels, key=lambda label: -row[label])[:5]
    return [label for label in best if row[label] >= 0.01]


def render(template, folder, language, **context):
    from jinja2 import Environment, FileSystemLoader

    texts = Texts(language)
    pages = FileSystemLoader(PAGES)
    here = Environment(loader=pages, autoescape=True)
    here.globals["t"] = texts
    here.filters |= {"show": show, "at": at, "top": top, "basename": os.path.basename, "named": texts.label}
    here.filters |= {"why": texts.reason, "link": lambda path: quote(os.path.relpath(path, folder))}
    return here.get_template(template).render(small_side=SMALL, large_side=LARGE, **context)


def embed(small, large, small_side=SMALL):
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
        quality = 60 if small_side == SMALL else 50
        small = data_uri(picture, small_side, quality)
        return [small, data_uri(picture, LARGE, 75)] if path in wanted else [small]

    result, used, dropped = ({}, {}), 0, 0
    order = list(dict.fromkeys([*large, *small]))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for start in tqdm(range(0, len(order), 256), desc="thumbnails", disable=None):
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


def data_uri(picture, side, quality=75):
    """A copy as a JPEG of at most `side` pixels a side."""
    copy, file = picture.copy(), io.BytesIO()
    copy.thumbnail((side, side))
    copy.save(file, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
