"""Fills the templates in pages/: a checkpoint's report and the index of all reports. Commands call render() for theirs.

Each page is one file and fetches nothing. Its numbers are those of report.json, its sentences come from
pages/texts.json. Pictures are embedded as small JPEGs up to EMBEDDED bytes, the most confident mistakes first; the
other pictures are shown by file name.
"""

import base64
import io
import json
import os
from math import ceil, floor
from pathlib import Path
from urllib.parse import quote

from animals.checkpoint.steps import run_name
from animals.files import printable, replacing
from animals.pictures.read import PictureError, load_picture
from animals.scoring.metrics import one_sided
from animals.scoring.scorer import LOW_MASS

PAGES = Path(__file__).parent / "pages"
# key: [English, Chinese]; under "labels" and "reasons": the English name, which programs use, and the Chinese one
TEXTS = json.loads((PAGES / "texts.json").read_text(encoding="utf-8"))
EMBEDDED = 13_000_000  # bytes of base64 per page; 3,000 pictures need about 10,000,000
SMALL, LARGE = 96, 240  # pixels, longest side: of a thumbnail; of a picture in a gallery
WORST, MISTAKES, CHANGED = 8, 48, 96  # pictures at most: on the first screen; in the gallery; of a comparison


class Texts:
    """The sentences of the pages in one language, `en` or `zh`. A call fills the {places} of one sentence.

    Values are escaped; the sentences are trusted HTML. `count` chooses between the two forms of "one|many".
    """

    def __init__(self, language):
        self.column = ("en", "zh").index(language)

    def __call__(self, key, count=None, **values):
        from markupsafe import Markup

        one, _, many = TEXTS[key][self.column].partition("|")
        return Markup(many if many and count != 1 else one).format(**{k: visible(v) for k, v in values.items()})

    def label(self, label):
        """The name of a label, or of the answer `unsure`, in this language; other labels have none but themselves."""
        return TEXTS["labels"].get(label, label) if self.column else label

    def reason(self, text):
        """The message of a PictureError ("category" or "category: detail") in this language."""
        category, colon, detail = text.partition(": ")
        return (TEXTS["reasons"].get(category, category) if self.column else category) + colon + detail


def report_page(report, rows, folder, language):
    """The HTML of report.html, for a report in `folder` (pictures are linked relative to it)."""
    number = report["labels"].index
    wrong = sorted((row for row in rows if not row["correct"]), key=lambda row: -row["probability"])
    right = sorted((row for row in rows if row["correct"]), key=lambda row: row["probability"])
    in_cell, by_name, comparison = {}, {row["image"]: row for row in rows}, report["comparison"]
    for row in wrong + right:
        in_cell.setdefault((number(row["label"]), number(row["prediction"])), []).append(row)
    changed = [side | {"row": by_name[side["image"]]} for side in comparison["changed"]] if comparison else []
    changed.sort(key=lambda side: side["row"]["correct"])
    shown = [row["accuracy_ci95"] for row in report.get("baselines") or [] if row["name"] != "majority"]  # far below
    bins, classes = report["calibration"]["bins"], [row for row in report["per_class"].values() if row["n"]]
    return render(
        "report.html",
        folder,
        language,
        report=report,
        one_sided=one_sided(report),
        low_mass=LOW_MASS,
        scale=scale(report["accuracy_ci95"]),
        baselines_scale=scale(report["accuracy_ci95"], *shown),
        class_scale=scale((min(row["recall_ci95"][0] for row in classes), 1)),
        confidence_scale=scale((min(row["confidence"] for row in bins), 1)),
        accuracy_scale=scale((min(row["accuracy_ci95"][0] for row in bins), 1)),
        cells=[{"t": t, "p": p, "rows": cell} for (t, p), cell in sorted(in_cell.items())],
        mistakes=wrong[:MISTAKES],
        worst=WORST,
        changed=changed[:CHANGED],
        other_said={side["image"]: side["other_prediction"] for side in changed},
        **embed([row["image"] for row in wrong + right], [row["image"] for row in wrong[:MISTAKES]]),
    )


def write_index(report_dir, language):
    """Write <report_dir>/index.html: all reports below it side by side, by run (the newest first) and step."""
    found, broken = [], []
    for path in sorted(Path(report_dir).glob("*/report.json")):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            row = {key: report[key] for key in ("step", "n", "accuracy", "accuracy_ci95", "macro_f1", "ece", "date")}
            run, name = run_name(report["model"]), path.parent.name
            row |= {"run": run, "folder": name, "final": run == name, "duplicates": report.get("duplicates")}
            found.append(row)
        except (OSError, ValueError, KeyError, TypeError):
            broken.append(str(path))
    runs = {}
    for row in sorted(found, key=lambda row: (row["step"] or 0, row["final"])):
        runs.setdefault(row["run"], []).append(row)
    tables = sorted(runs.items(), key=lambda run: max(row["date"] for row in run[1]), reverse=True)
    axis = scale(*([row["accuracy_ci95"] for row in found] or [[0, 1]]))
    with replacing(os.path.join(report_dir, "index.html")) as file:
        file.write(render("index.html", report_dir, language, runs=tables, count=len(found), scale=axis, broken=broken))


def scale(*intervals):
    """The ticks of an axis that shows these intervals within 0 to 1: round numbers, at most six parts."""
    low, high = min(low for low, _ in intervals), max(high for _, high in intervals)
    margin = max((high - low) / 4, 0.005)  # so that a single value has an axis too
    for step in (0.01, 0.02, 0.05, 0.1, 0.2):  # the last one always fits
        start, end = max(0, floor((low - margin) / step)), min(round(1 / step), ceil((high + margin) / step))
        if end - start <= 6:
            break
    return [k * step for k in range(start, end + 1)]


def at(value, ticks):
    """The position of a value on a scale, from 0 to 1."""
    return min(1, max(0, (value - ticks[0]) / (ticks[-1] - ticks[0])))


def show(value, kind):
    """A number as the pages write it."""
    space = "\N{NO-BREAK SPACE}"
    percent = f"{100 * value:.1f}{space}%"
    return {
        "percent": percent,
        "sure": percent if value < 0.9995 else f">{space}99.9{space}%",  # a probability: 100.0 % would say too much
        "round": f"{100 * value:.0f}{space}%",
        "points": f"{100 * value:+.1f}",
        "ratio": f"{value:.3f}",
        "count": f"{value:,.0f}",
        "seconds": f"{value:,.1f}",
    }[kind]


def top(row, labels):
    """The labels with a probability of at least 1 %, the most probable first, at most five."""
    best = sorted(labels, key=lambda label: -row[label])[:5]
    return [label for label in best if row[label] >= 0.01]


def render(template, folder, language, **context):
    """The HTML of a template in pages/, filled with `context`; pictures are linked relative to `folder`."""
    from jinja2 import Environment, FileSystemLoader

    texts, here = Texts(language), Environment(loader=FileSystemLoader(PAGES), autoescape=True, finalize=visible)
    here.globals["t"] = texts
    here.filters |= {"show": show, "at": at, "top": top, "basename": os.path.basename, "named": texts.label}
    here.filters |= {"why": texts.reason, "link": lambda path: quote(os.fsencode(os.path.relpath(path, folder)))}
    return here.get_template(template).render(small_side=SMALL, large_side=LARGE, **context)


def visible(value):
    """Text of a name with its control characters and its bytes that are not UTF-8 as backslashes."""
    from markupsafe import Markup

    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def embed(small, large, small_side=SMALL):
    """Pictures as data URIs: {small: {path: URI}, large: {path: URI}, dropped: how many exceed EMBEDDED}.

    small, large: paths in order of importance; the large ones come first. A picture that can no longer be read is left
    out. small_side: pixels, the longest side of a small picture.
    """
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    order, wanted = list(dict.fromkeys([*large, *small])), set(large)
    found, used, dropped = {"small": {}, "large": {}}, 0, 0

    def shrink(path):
        """The small and, where it is wanted, the large data URI; [] if the picture is unreadable or does not fit."""
        try:
            picture = load_picture(path) if used <= EMBEDDED else None
        except PictureError:
            picture = None
        sizes = [(small_side, 60 if small_side == SMALL else 50), (LARGE, 75)][: 1 + (path in wanted)]
        return [data_uri(picture, side, quality) for side, quality in sizes] if picture else []

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        shrunk = tqdm(threads.map(shrink, order), "thumbnails", len(order), disable=None)
        for path, uris in zip(order, shrunk, strict=True):
            used += sum(map(len, uris))
            dropped += used > EMBEDDED
            for size, uri in zip(found, uris, strict=False):
                if used <= EMBEDDED:
                    found[size][path] = uri
    return found | {"dropped": dropped}


def data_uri(picture, side, quality):
    """The data URI of a copy as a JPEG whose longer side has at most `side` pixels."""
    copy, file = picture.copy(), io.BytesIO()
    copy.thumbnail((side, side))
    copy.save(file, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
