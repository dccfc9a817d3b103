"""The report's page: all numbers, the pictures of each cell, no request, no overflow; TensorBoard beside the loss."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest
import sklearn.metrics as sk
from markupsafe import escape
from PIL import Image

from animals.command import UserError
from animals.scoring import page as page_maker
from animals.scoring.metrics import compare, design_effect, measure, one_sided, wilson_interval
from animals.scoring.page import TEXTS, report_page
from animals.scoring.plots import log_tensorboard
from animals.scoring.report import print_report, read_report, write_report
from animals.scoring.sheet import contact_sheet
from scripts.baselines import print_baselines
from tests.helpers.browser import Browser, find_chromium
from validation import against

REPORT = "logs/validation/sft-llava-demo"  # the one that demo/run.sh leaves
LABELS = ["cat", "dog", "never said", "rare", "<b>&"]
SIDES = ("both_right", "only_this", "only_other", "both_wrong")
COUNTS = [20, 15, 6, 1, 8]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not find_chromium():
        pytest.skip("no chromium on PATH (Debian: apt-get install chromium)")
    with Browser(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report with a class that is never predicted, one with n = 1, awkward names, and one picture that is gone."""
    root, random = tmp_path_factory.mktemp("a report's #1 100%"), np.random.default_rng(7)
    rows, other = [], []
    for k, count in enumerate(COUNTS):
        for i in range(count):
            image = root / f"{k} \"ä<i>' {i}#%20.jpg"
            Image.effect_mandelbrot((160, 120), (-2, -1, 1, 1), i + 2).convert("RGB").save(image)
            p = np.insert(random.dirichlet([0.4] * 4), 2, 0)  # label 2 is never predicted
            best = int(p.argmax())
            row = {"image": str(image), "label": LABELS[k], "prediction": LABELS[best], "probability": float(p[best])}
            row |= {"correct": best == k, "sha256": f"{k} {i}", "group": f"{k} {i}", "labels_mass": "0.0017"}
            rows.append(row | dict(zip(LABELS, p.tolist(), strict=True)))
            guess = k if random.uniform() < 0.7 else 0
            other.append({"prediction": LABELS[guess], "correct": guess == k})
    Path(rows[3]["image"]).unlink()
    truth, predicted = [[LABELS.index(row[key]) for row in rows] for key in ("label", "prediction")]
    right, other_right = [[row["correct"] for row in some] for some in (rows, other)]
    versus, interval = against("there", {"model": "m2"}, rows, other), wilson_interval(sum(other_right), 50)
    duplicates = {"checked": True, "identical": 3, "near_duplicates": 2, "n_without": 45, "groups": 40}
    kept = sum(right[5:])
    duplicates |= {"accuracy_without": kept / 45, "accuracy_without_ci95": wilson_interval(kept, 45)}
    report = measure(LABELS, truth, predicted, [[row[label] for label in LABELS] for row in rows]) | {
        "model": "some/model", "step": 1200, "date": "2030-01-01 12:00", "seconds": 12.5, "images_per_second": 4.0,
        "held_out": 60, "dtype": "float32", "per_device_eval_batch_size": 8, "processes": 2, "versions": {"torch": "2"},
        "labels_mass": 0.0017,
        "excluded": [{"image": "input/<cat>/bad.jpg", "reason": "truncated & short"}],
        "comparison": versus, "duplicates": duplicates,
        "baselines": [versus | {"name": "probe", "accuracy": sum(other_right) / 50, "accuracy_ci95": interval}],
        "quarantined": {"n": 4, "accuracy_with": 0.5, "accuracy_with_ci95": [0.4, 0.6], "n_with": 54},
    }  # fmt: skip
    folder = root / "logs" / "a report"
    write_report(report, rows, str(folder))
    return SimpleNamespace(folder=folder, report=report, rows=rows, other_right=other_right)


def read_rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def expected_numbers(folder, report, other_right):
    """What scikit-learn and scipy say of predictions.csv, by the page's keys."""
    rows, labels = read_rows(folder / "predictions.csv"), report["labels"]
    y, said = [row["label"] for row in rows], [row["prediction"] for row in rows]
    p = np.array([[float(row[label]) for label in labels] for row in rows])
    right, groups = np.array(y) == said, [row.get("group", i) for i, row in enumerate(rows)]
    low, high = wilson_interval(sum(right), len(y), report.get("design_effect", 1))
    want = {
        "accuracy": sk.accuracy_score(y, said), "accuracy_low": low, "accuracy_high": high, "n": len(y),
        "chance": 1 / len(labels), "majority": max(map(y.count, labels)) / len(y),
        "wrong": sk.zero_one_loss(y, said, normalize=False),
        "macro_f1": sk.f1_score(y, said, labels=[*set(y)], average="macro", zero_division=0),
        "macro_precision": sk.precision_score(y, said, labels=[*set(y)], average="macro", zero_division=0),
        "macro_recall": sk.recall_score(y, said, labels=[*set(y)], average="macro", zero_division=0),
        "log_loss": sk.log_loss([labels.index(label) for label in y], p, labels=range(len(labels))),
        "seconds": report["seconds"], "images_per_second": report["images_per_second"],
    }  # fmt: skip
    want |= {"held_out": report["held_out"]} if report["held_out"] > len(y) else {}
    want |= {"labels_mass": report["labels_mass"]} if report["labels_mass"] < 0.5 else {}
    assert report["labels_mass"] == pytest.approx(np.mean([float(row["labels_mass"]) for row in rows]))
    table = sk.classification_report(y, said, labels=labels, output_dict=True, zero_division=0)
    for label, row in report["per_class"].items():
        keys = {"precision": "precision", "recall": "recall", "f1": "f1-score", "n": "support"}
        want |= {f"per_class.{label}.{ours}": table[label][theirs] for ours, theirs in keys.items()}
        want[f"per_class.{label}.recall_low"], want[f"per_class.{label}.recall_high"] = row["recall_ci95"]
    confidence, found, want["ece"] = p.max(axis=1), report["calibration"], 0
    for b, row in enumerate(found["bins"]):
        inside, key = (confidence <= row["high"]) & ((confidence > row["low"]) | (b == 0)), f"calibration.{b}."
        accuracy, mean = right[inside].mean(), confidence[inside].mean()
        want |= {f"{key}n": inside.sum(), f"{key}accuracy": accuracy, f"{key}confidence": mean}
        want["ece"] += inside.mean() * abs(accuracy - mean)
    want |= {f"ece_if_calibrated.{key}": value for key, value in found["ece_if_calibrated"].items()}
    for least in (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99):
        if (kept := confidence >= least).any():
            want[f"answered.{least}.share"], want[f"answered.{least}.accuracy"] = kept.mean(), np.mean(right[kept])
            effect = design_effect([group for group, ok in zip(groups, kept, strict=True) if ok])
            ends = wilson_interval(sum(right[kept]), sum(kept), effect)
            want[f"answered.{least}.low"], want[f"answered.{least}.high"] = ends
    if other_right:
        table = sk.confusion_matrix(right, other_right, labels=[True, False]).ravel().tolist()
        want |= {f"comparison.{name}": n for name, n in zip(SIDES, table, strict=True)}
        c = compare(right.tolist(), other_right)  # held against scipy and statsmodels in test_metrics.py
        want |= {f"comparison.{name}": c[name] for name in ("n", "accuracy", "other_accuracy", "difference")}
        for key, name in (("comparison.", ""), ("baselines.probe.", "difference_")):
            want[f"{key}{name}low"], want[f"{key}{name}high"] = c["difference_ci95"]
        want |= {"baselines.probe.difference": c["difference"], "baselines.probe.accuracy": sum(other_right) / len(y)}
        want["baselines.probe.low"], want["baselines.probe.high"] = wilson_interval(sum(other_right), len(y))
        want |= {"duplicates.identical": 3, "duplicates.near_duplicates": 2, "duplicates.n_without": 45}
        want |= {"duplicates.accuracy_without": sum(right[5:]) / 45, "duplicates.groups": 40}
        want["duplicates.low"], want["duplicates.high"] = wilson_interval(sum(right[5:]), 45)
        quarantined = {"n": 4, "n_with": 54, "accuracy_with": 0.5, "low": 0.4, "high": 0.6}
        want |= {f"quarantined.{key}": value for key, value in quarantined.items()}
    elif report["duplicates"]["checked"]:
        want |= expected_duplicates(folder, report["duplicates"], rows, right)
    return want, sk.confusion_matrix(y, said, labels=labels)


def expected_duplicates(folder, found, rows, right):
    """What duplicates.csv says of the demo's held-out pictures; one is a near-duplicate of a training picture."""
    listed = read_rows(folder.parents[2] / "cache" / "duplicates.csv")
    match = {Path(row["image"]).resolve(): row["match"] for row in listed if row["problem"] == "both splits"}
    kept = [ok for row, ok in zip(rows, right, strict=True) if Path(row["image"]).resolve() not in match]
    want = {"n_without": len(kept), "accuracy_without": sum(kept) / len(kept), "groups": found["groups"]}
    want |= {"identical": [*match.values()].count("same pixels"), "near_duplicates": [*match.values()].count("near")}
    want["low"], want["high"] = found["accuracy_without_ci95"]  # and the groups: held in test_metrics.py
    assert len(kept) < len(rows) and found["groups"] < len(rows)
    return {f"duplicates.{key}": value for key, value in want.items()}


def check_numbers(folder, other_right=None):
    report, html = read_report(str(folder))[0], (folder / "report.html").read_text(encoding="utf-8")
    want, matrix = expected_numbers(folder, report, other_right)
    found = re.findall(r'<data value="(.*?)" data-key="(.*?)">(.*?)</data>', html)
    assert len(found) == html.count("<data ") and {unescape(key) for _, key, _ in found} == want.keys()
    for value, key, text in (map(unescape, texts) for texts in found):
        assert float(value) == pytest.approx(want[key], abs=1e-9), key
        points = re.search("difference|comparison.(low|high)$", key)
        shown = float(re.sub(r"[\s%,+<=]", "", text)) / (100 if "%" in text or points else 1)
        assert shown == pytest.approx(want[key], abs=0.051 * (10 if want[key] > 99 else 1), rel=0.06), (key, text)
    cells = re.findall(r'#cell-(\d+)-(\d+)" aria-label="(\d+) pictures?', html)
    cells = {(int(t), int(p)): int(n) for t, p, n in cells}
    assert cells == {(t, p): int(n) for (t, p), n in np.ndenumerate(matrix) if n}
    assert report["confusion_matrix"] == matrix.tolist()


def test_every_number_on_the_page_is_scikit_learns(made):
    check_numbers(made.folder, made.other_right)
    assert {path.name for path in made.folder.iterdir()} == {"report.html", "report.json", "predictions.csv"}
    html = (made.folder / "report.html").read_text(encoding="utf-8")
    assert 'class="name">0 &#34;ä&lt;i&gt;&#39; 3#%20.jpg</span>' in html, "the picture that is gone, by its name"
    assert "ä<i>" not in html and "<b>&<" not in html and "truncated &amp; short" in html
    per_class = made.report["per_class"]
    assert (per_class["never said"]["precision"], per_class["never said"]["f1"], per_class["rare"]["n"]) == (0, 0, 1)


def test_every_number_on_the_demos_page(demo):
    check_numbers(demo.root / REPORT)


def fetched(browser):
    return {request.partition("#")[0] for request in browser.requests() if not request.startswith("data:")}


def shown_pictures(browser):
    links = browser.js("[...document.querySelectorAll('.cell:target li a')].map(a => [a.href, a.offsetWidth > 0])")
    assert all(visible for _, visible in links)
    return sorted(str(Path(unquote(href.removeprefix("file://"))).resolve()) for href, _ in links)


OVERFLOW = """
[...document.querySelectorAll('body *')]
  .filter(e => !e.closest('svg') && e.getBoundingClientRect().right > innerWidth + .5)
  .map(e => e.outerHTML.slice(0, 120))
  .concat(document.documentElement.scrollWidth > innerWidth ? ['page'] : [])
"""
NARROW = "[...document.querySelectorAll('.scroll')].every(e => e.scrollWidth <= e.clientWidth)"
ONE_LINE = "[...document.querySelectorAll('data')].every(e => e.getClientRects().length <= 1)"
FIRST_SCREEN = """
[...document.querySelectorAll('.score, .wrong-of, .score-strip, .worst figure:nth-child(-n+6) .file')]
  .map(e => Math.round(e.getBoundingClientRect().bottom))
"""


def check_width(browser, page):
    for width in (390, 1280):
        browser.view(width)
        browser.open(page.as_uri())
        assert browser.js(OVERFLOW) == [] and browser.complaints() == []


@pytest.mark.parametrize("which", ["made", "demo"])
def test_in_chromium(which, browser, made, demo, tmp_path):
    (report, rows), paper = read_report(str(made.folder if which == "made" else demo.root / REPORT)), []
    for language, code in (("zh", "zh-CN"), ("en", "en")):
        page = tmp_path / f"{language}.html"
        page.write_text(report_page(report, rows, str(tmp_path), language), encoding="utf-8")
        url = page.resolve().as_uri()
        for width in (390, 1280):
            for dark in (False, True):
                browser.view(width, dark=dark)
                browser.open(url)
                assert browser.js("document.documentElement.lang") == code
                assert browser.js(OVERFLOW) == []
                assert browser.js(NARROW), "a table that scrolls"
                assert browser.js(ONE_LINE), "a number broken over two lines"
                paper.append(browser.js("getComputedStyle(document.body).backgroundColor"))
                assert fetched(browser) == {url}
        first = browser.js(FIRST_SCREEN)
        assert len(first) == 9 and max(first) < 800, "accuracy, interval and six mistakes with their names"
    assert len(set(paper)) == 2, "light and dark"
    assert browser.js("[...document.scripts].filter(s => s.src).length") == 0
    assert browser.js("[...document.images].filter(i => !i.alt).length") == 0
    cells = browser.js("[...document.querySelectorAll('.confusion a')].map(a => [a.hash, a.textContent])")
    for i, (hash_, count) in enumerate(cells):
        link = f"document.querySelector('.confusion a[href=\"{hash_}\"]')"
        browser.js(f"{link}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        if i % 2:
            browser.js(f"{link}.focus()")
            browser.press_enter()
        else:
            middle = f"(r => [r.x + r.width / 2, r.y + r.height / 2])({link}.getBoundingClientRect())"
            browser.click(*browser.js(middle))
        browser.wait_for(f"location.hash == '{hash_}'", 5)
        cell = tuple(report["labels"][int(k)] for k in hash_.split("-")[1:])
        counted = [row["image"] for row in rows if (row["label"], row["prediction"]) == cell]
        assert shown_pictures(browser) == sorted(str(Path(image).resolve()) for image in counted)
        assert len(counted) == int(count)
        assert browser.js(OVERFLOW) == []
    browser.wait_for("[...document.querySelectorAll('.cell:target img')].every(i => i.complete && i.naturalWidth)", 10)
    assert fetched(browser) == {url}
    browser.js("document.querySelector('.worst .file').focus()")
    browser.press_enter()
    browser.wait_for("document.querySelector('.worst .file').textContent == 'path copied'", 5)
    worst = max((row for row in rows if not row["correct"]), key=lambda row: row["probability"])
    assert browser.js("document.querySelector('.worst .file').dataset.path") == worst["image"]
    assert browser.complaints() == []


def test_three_thousand_pictures_stay_under_15_mb(made, tmp_path, monkeypatch):
    """Noise compresses worst of all. What does not fit is listed by name, mistakes last, and the page says so."""
    random, rows = np.random.default_rng(0), []
    for i in range(3000):
        picture, wrong = tmp_path / f"{i % 20} {i}.png", i % 10 == 0
        if i < 20:
            Image.fromarray(random.integers(0, 256, (120, 160, 3), dtype=np.uint8)).save(picture)
        else:
            picture.symlink_to(f"{i % 20} {i % 20}.png")
        rows.append({"image": str(picture), "label": "a", "prediction": "ab"[wrong], "correct": not wrong})
        rows[-1] |= {"probability": 0.9, "ab"[wrong]: 0.9, "ba"[wrong]: 0.1}

    def page(rows):
        answers = [int(not row["correct"]) for row in rows]
        report = measure(["a", "b"], [0] * len(rows), answers, [[row["a"], row["b"]] for row in rows])
        report = made.report | report | dict.fromkeys(("comparison", "baselines", "duplicates"))
        html = report_page(report, rows, str(tmp_path), "en")
        assert all(f'"{i % 20}%20{i}.png" title' in html for i in range(len(rows))), "embedded or named"
        return html, set(re.findall(r'<a href="([^"]+)" [^>]*><span class="name"', html))

    html, by_name = page(rows)
    assert 10_000_000 < len(html.encode()) < 15_000_000 and not by_name
    monkeypatch.setattr(page_maker, "EMBEDDED", 1_000_000)
    html, by_name = page(rows[:300])
    assert 800_000 < len(html.encode()) < 1_400_000
    assert len(by_name) > 20 and f"{len(by_name)} pictures are shown by file name only" in html
    wrong = re.search(r'id="cell-0-1".*?</section>', html, re.S)[0]
    assert wrong.count("<img") == 30, "the mistakes were embedded first"


def test_an_interrupted_write_leaves_the_old_report(made, tmp_path):
    folder = shutil.copytree(made.folder, tmp_path / "report")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(KeyError):
        write_report({"labels": LABELS}, made.rows[:5], str(folder))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    write_report(made.report | {"date": "now"}, made.rows, str(folder))
    assert json.loads((folder / "report.json").read_text())["date"] == "now"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "report"]
    assert read_report(str(made.folder / "report.json")) == (made.report, made.rows), "what baselines.py adds a key to"
    with pytest.raises(UserError, match=f"{tmp_path}: found no readable report.*make it with validation.sh"):
        read_report(str(tmp_path))


def test_the_tables_of_the_console(made, capsys):
    print_report(made.report, "there")
    said = capsys.readouterr().out
    last = said.splitlines()[-1]
    assert "of the 50 pictures, 3 identical to a training picture and 2 near-duplicates of one; accu" in said
    assert json.loads(last)["report"] == "there/report.json"
    assert "warning: the probability of all labels together is 0.0017 on average (labels_mass): the model would" in said
    assert "quarantine: 4 held-out pictures are there; with those that can be read the accuracy is 0.5000" in said
    print_baselines(made.report["baselines"])
    probe = capsys.readouterr().out.splitlines()[-1]
    assert probe.split()[:2] == ["probe", f"{sum(made.other_right) / 50:.4f}"]
    assert f"{made.report['baselines'][0]['difference']:+.4f}" in probe


def test_no_duplicate_found_is_no_promise(made, tmp_path, capsys):
    none = made.report["duplicates"] | {"identical": 0, "near_duplicates": 0, "n_without": 50, "groups": 50}
    print_report(made.report | {"duplicates": none}, "there")
    said = capsys.readouterr().out
    assert "duplicates: found, of the 50 pictures, 0 identical to a training picture and 0 near-duplicates" in said
    assert "or a banner, are not found; nobody knows which pictures CLIP and LLaVA had seen before\n" in said
    for duplicates, found in ((none, True), (made.report["duplicates"], False)):
        for language, text in (("en", "was found"), ("zh", "没有找到与")):
            html = report_page(made.report | {"duplicates": duplicates}, made.rows, str(tmp_path), language)
            assert (text in html) == found and TEXTS["duplicates_search"][language == "zh"] in html


@pytest.mark.parametrize(
    "counts, most, never",
    [
        ([[10, 0, 0], [11, 1, 0], [0, 0, 9]], None, []),  # 21 of 31 answers
        ([[5, 0, 0], [10, 0, 0], [9, 1, 0]], "a", ["c"]),  # 24 of 25; ten pictures each
        ([[16, 0, 0], [5, 0, 0], [9, 0, 0]], None, []),  # all answers, but more than half of the pictures
        ([[0, 0, 0], [9, 0, 0], [0, 0, 0]], None, []),  # too few
        ([[9, 0, 0], [0, 0, 11], [1, 0, 10]], None, ["b"]),
    ],
)
def test_answers_of_one_class_only_are_said(made, tmp_path, capsys, counts, most, never):
    cells = [(t, p) for t in range(3) for p in range(3) for _ in range(counts[t][p])]
    p = [[0.98 if k == said else 0.01 for k in range(3)] for _, said in cells]
    report = made.report | measure(list("abc"), *map(list, zip(*cells, strict=True)), p)
    report |= dict.fromkeys(("comparison", "baselines", "duplicates"))
    assert one_sided(report) == (most, never)
    rows = [{"image": "x", "label": "abc"[t], "prediction": "abc"[k], "correct": t == k} for t, k in cells]
    rows = [row | dict(zip("abc", q, strict=True)) | {"probability": max(q)} for row, q in zip(rows, p, strict=True)]
    for language, (one, none) in {"en": ("More than 90", "Never named"), "zh": ("的回答是", "却从没说过")}.items():
        html = report_page(report, rows, str(tmp_path), language).partition("<nav")[0]
        assert (one in html, none in html) == (bool(most), bool(never)), language
    print_report(report | {"duplicates": made.report["duplicates"]}, "there")
    said = capsys.readouterr().out
    assert (f"warning: more than 90 % of the answers are {most}," in said) == bool(most)
    assert (f"each has ten pictures or more: {', '.join(never)}\n" in said) == bool(never)


def test_contact_sheet(made, tmp_path, browser):
    rows = [row | {"error": "", "label": None} for row in made.rows]
    rows[5]["prediction"] = "unsure"
    rows.append({"image": "broken.jpg", "prediction": "", "error": "not a <picture>"})
    html = contact_sheet(rows, LABELS, "a/model", str(tmp_path), "en", 0.4)
    (tmp_path / "sheet.html").write_text(html, encoding="utf-8")
    headings = ["cat", "dog", "rare", "&lt;b&gt;&amp;", "unsure", "unreadable"]  # `never said` is not among them
    assert re.findall(r"<h2>(.*?) <span", html) == headings
    cat = re.search(r'id="name-1".*?</section>', html, re.S)[0]
    shown = [float(x) for x in re.findall(r"</a>([\d.]+)", cat)]
    assert len(shown) == sum(row["prediction"] == "cat" for row in rows) and shown == sorted(shown)
    first = re.search(r'id="first".*?</section>', html, re.S)[0]
    order = sorted(rows[:-1], key=lambda row: row["probability"])
    assert re.findall(r'data-path="(.*?)"', first) == [str(escape(row["image"])) for row in order][:60]
    assert "not a &lt;picture&gt;" in html
    check_width(browser, tmp_path / "sheet.html")


def test_tensorboard_has_each_step_once_and_in_order(made, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run [1]" / "validation"
    for step, accuracy in ((200, 0.5), (100, 0.25), (200, 0.75), (None, 0.125)):
        log_tensorboard(made.report | {"step": step, "accuracy": accuracy}, str(folder))
    assert len(list(folder.iterdir())) == 1
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()
    points = [(point.step, point.value) for point in events.Scalars("validation/accuracy")]
    assert points == [(0, 0.125), (100, 0.25), (200, 0.75)]
    assert {"validation/macro_f1", "validation/ece"} < set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["validation/confusion_matrix"]
    pictures = events.Images("validation/confusion_matrix")
    assert [image.step for image in pictures] == [0, 100, 200]
    with Image.open(io.BytesIO(pictures[0].encoded_image_string)) as image:
        assert min(image.size) > 200 and len(image.convert("RGB").getcolors(1 << 24)) > 200, "something is on it"


def test_tensorboard_shows_scalars_and_images(demo, browser):
    command = f"-m tensorboard.main --logdir={demo.root / 'logs'} --port=0 --host=127.0.0.1"
    server = subprocess.Popen([sys.executable, *command.split()], stderr=subprocess.PIPE, text=True)
    try:
        url = next(found[0] for line in server.stderr if (found := re.search(r"http://\S+", line)))
        browser.view(1280, 3000)  # TensorBoard draws the cards that are in view
        browser.open(f"{url}?tagFilter=train/loss|validation#timeseries")
        text = "[...document.querySelectorAll('card-view')].map(card => card.innerText).join()"
        for tag in ("train\n/loss", "validation\n/accuracy", "validation\n/confusion_matrix"):
            browser.wait_for(f"{text}.includes({json.dumps(tag)})", 120)
        browser.wait_for("[...document.querySelectorAll('image-card img')].some(i => i.naturalWidth > 200)", 120)
        assert browser.js("document.querySelectorAll('scalar-card').length") >= 4
    finally:
        server.terminate()
        server.wait()


def test_index_of_two_runs(made, tmp_path, browser):
    """Three validations of two runs; one that is damaged since is named and does no harm."""
    for name, step, accuracy in (("a/checkpoint-100", 100, 0.5), ("a", 200, 0.75), ("b", None, 0.25)):
        folder = tmp_path / name.replace("/", "-")
        report = made.report | {"model": f"out/{name}", "step": step, "accuracy": accuracy}
        write_report(report | {"date": f"2030-01-0{1 + (name == 'b')}"}, made.rows, str(folder))
    check_width(browser, tmp_path / "index.html")
    runs = browser.js("[...document.querySelectorAll('section')].map(s => s.innerText)")
    assert [text.split("\n")[0] for text in runs] == ["b", "a"], "the newest first"
    [a] = [text for text in runs if text.startswith("a\n")]
    assert a.index("50.0") < a.index("75.0") and "n\u00a0=\u00a050" in a
    for link in browser.js("[...document.querySelectorAll('section a')].map(a => a.href)"):
        assert Path(unquote(link.removeprefix("file://"))).is_file()
    (tmp_path / "b" / "report.json").write_text("{")
    write_report(made.report | {"model": "out/a", "step": 200}, made.rows, str(tmp_path / "a"), "zh")
    index = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "报告读不了" in index and 'lang="zh-CN"' in index and index.count("report.html") == 2


def test_what_is_shown_where(made, monkeypatch):
    """What the template is given: the most confident mistakes first, and scales that hold all intervals."""
    monkeypatch.setattr(page_maker, "render", lambda template, folder, language, **given: given)
    page, report = report_page(made.report, made.rows, str(made.folder), "en"), made.report
    wrong = sorted((row["probability"] for row in made.rows if not row["correct"]), reverse=True)
    assert [row["probability"] for row in page["mistakes"]] == wrong[:48]
    assert len(wrong) == report["n"] - report["correct"]
    changed = [row["row"]["correct"] for row in page["changed"]]
    assert changed == sorted(changed) and len(changed) == len(report["comparison"]["changed"])
    bins = report["calibration"]["bins"]
    held = {
        "class_scale": (min(row["recall_ci95"][0] for row in report["per_class"].values() if row["n"]), 1),
        "confidence_scale": (bins[0]["confidence"], 1),
        "accuracy_scale": (min(row["accuracy_ci95"][0] for row in bins), 1),
        "scale": report["accuracy_ci95"],
        "baselines_scale": sorted(report["accuracy_ci95"] + report["baselines"][0]["accuracy_ci95"])[::3],
    }  # fmt: skip
    for name, (low, high) in held.items():
        (first, *_, last), room = page[name], (high - low) / 4 + 0.2  # no more than a step beyond
        assert low - room <= first <= low + 1e-9 and high - 1e-9 <= last <= high + room, name
        assert len(page[name]) <= 7, name
