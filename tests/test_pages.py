"""What all pages share: names are text, axes and numbers are round, every text is there in both languages."""

import io
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from animals.scoring import page as page_maker
from animals.scoring.metrics import compare, measure
from animals.scoring.page import TEXTS, embed, render, visible
from animals.scoring.plots import confusion_figure
from animals.scoring.report import read_report, write_report
from animals.scoring.sheet import contact_sheet
from tests.conftest import ROOT
from tests.helpers.browser import Browser, find_chromium

RUN = "window.ran = 1"
HOSTILE = [
    f'<img src=x onerror="{RUN}">', "{{7*7}}{% endraw %}", f"</title></style></script><script>{RUN}</script>",
    f"\"' onmouseover='{RUN}' \" autofocus onfocus=\"{RUN}", "two\nlines\\n", "=1+1", "$x^{$ \\$",
    f"javascript:{RUN}", "-{0}",
]  # fmt: skip


def hostile_pages(root):
    """{page: the names that stand on it}: everything that has a name is named by HOSTILE."""
    rows, k = [], len(HOSTILE)
    for i in range(2 * k):
        folder = root / "input" / HOSTILE[i // 2].replace("/", "%2F")
        folder.mkdir(parents=True, exist_ok=True)
        image, best = folder / f"{folder.name}{i}.png", (i // 2 + i % 2) % k
        if i % 4:  # some are gone, and are shown by name
            Image.new("RGB", (40, 30), "red").save(image)
        p = [0.91 if j == best else 0.09 / (k - 1) for j in range(k)]
        row = {"image": str(image), "label": HOSTILE[i // 2], "prediction": HOSTILE[best], "probability": 0.91}
        rows.append(row | {"correct": i % 2 == 0, "sha256": str(i)} | dict(zip(HOSTILE, p, strict=True)))
    truth, said = [[HOSTILE.index(row[key]) for row in rows] for key in ("label", "prediction")]
    right = [row["correct"] for row in rows]
    changed = [{"image": row["image"], "other_prediction": HOSTILE[0]} for row in rows]
    bad, about = [{"image": name, "reason": f"damaged: {name}"} for name in HOSTILE], {"where": HOSTILE[3]}
    report = measure(HOSTILE, truth, said, [[row[label] for label in HOSTILE] for row in rows]) | {
        "step": 1, "date": HOSTILE[0], "seconds": 1, "images_per_second": 1, "dtype": HOSTILE[0], "processes": 1,
        "held_out": 2 * k, "per_device_eval_batch_size": 8, "versions": dict.fromkeys(HOSTILE, HOSTILE[0]),
        "excluded": bad, "comparison": compare(right, right) | {"model": HOSTILE[0], "changed": changed} | about,
        "duplicates": None, "quarantined": None,
    }  # fmt: skip
    for name in HOSTILE:
        folder = root / "logs" / name.replace("/", "%2F")
        write_report(report | {"model": f"{folder}/{folder.name}"}, rows, str(folder))
    assert read_report(str(folder)) == (report | {"model": f"{folder}/{folder.name}"}, rows)
    confusion_figure(report).savefig(io.BytesIO())
    (root / "logs" / HOSTILE[0]).joinpath("report.json").write_text("{")  # a report that cannot be read
    write_report(report | {"model": HOSTILE[1]}, rows, str(root / "logs" / HOSTILE[1]), "en")
    suspect = {"split": "train", "likely_label": HOSTILE[0], "nearest": rows[0]["image"], "neighbours": rows[:4]}
    values = {"parts": {"label": [row | suspect for row in rows], "outlier": []}, "shown": 300, "n": 9, "wrong": 2}
    images = [row["image"] for row in rows]
    page = render("audit.html", str(root), "en", model=HOSTILE[0], **values, **embed(images, images))
    (root / "audit.html").write_text(page, encoding="utf-8")
    named = [row | {"error": ""} for row in rows] + [{"image": b["image"], "error": b["reason"]} for b in bad]
    page = contact_sheet(named, HOSTILE, HOSTILE[0], str(root), "en")
    (root / "sheet.html").write_text(page, encoding="utf-8")
    folders = [name.replace("/", "%2F") for name in HOSTILE]
    of_report = {folder / "report.html": [*HOSTILE, *(Path(image).name for image in images)]}
    return of_report | {root / "logs/index.html": folders, root / "audit.html": HOSTILE, root / "sheet.html": HOSTILE}


EVERYTHING = """[...document.querySelectorAll('*')].flatMap(
  e => [[e.localName, '', ''], ...e.getAttributeNames().map(n => [e.localName, n, e.getAttribute(n).slice(0, 999)])])
"""


def test_names_are_text_on_every_page(tmp_path):
    """Class folders, labels, file names, output folders, versions: nothing runs, all are shown (line breaks as \\n)."""
    if not find_chromium():
        pytest.skip("no chromium on PATH (Debian: apt-get install chromium)")
    folders = [name.replace("/", "%2F") for name in HOSTILE]  # one file in four is gone
    pages = hostile_pages(tmp_path)
    with Browser(tmp_path / "chromium") as browser:
        for page, names in pages.items():
            browser.open(page.as_uri())
            text, everything = browser.js("document.documentElement.textContent"), browser.js(EVERYTHING)
            assert [name for name in names if visible(name) not in text] == [], page.name
            assert not [found for found in everything if found[1].startswith("on") or found[1] == "autofocus"]
            assert all(value.startswith("data:") for _, name, value in everything if name == "src")
            assert {value for _, name, value in everything if name == "href" and ":" in value} == {"data:,"}
            assert everything.count(["script", "", ""]) == (page.name != "index.html")
            assert browser.js("window.ran") is None
            fetched = {request for request in browser.requests() if not request.startswith("data:")}
            assert fetched == {page.as_uri()}
            links = browser.js("[...document.querySelectorAll('a')].map(a => a.href)")
            assert {link.partition(":")[0] for link in links} <= {"file"}, page.name
            shown = [Path(unquote(link.partition("#")[0].removeprefix("file://"))) for link in links]
            assert len(shown) > 7 and all(path.exists() or path.parent.name in folders for path in shown)
            assert browser.complaints() == []


def test_scales_are_round_and_hold_the_interval():
    """Steps by hand: as fine as six parts allow, a quarter of the interval of room on either side."""
    for (low, high), (first, last, step) in {
        (0.5, 0.5): (0.49, 0.51, 0.01), (0.515, 0.545): (0.50, 0.56, 0.01), (0.505, 0.545): (0.48, 0.56, 0.02),
        (0.0, 0.06): (0.0, 0.08, 0.02), (0.93, 1.0): (0.9, 1.0, 0.02), (0.4, 0.62): (0.3, 0.7, 0.1),
        (0.0, 1.0): (0.0, 1.0, 0.2),
    }.items():  # fmt: skip
        ticks = page_maker.scale((low, high))
        assert ticks == pytest.approx([first + k * step for k in range(round((last - first) / step) + 1)]), (low, high)
    assert [page_maker.at(value, [0.4, 0.5, 0.6]) for value in (0.3, 0.45, 0.7)] == pytest.approx([0, 0.25, 1])


def test_numbers_for_people():
    shown = {
        ("sure", 0.9994): "99.9 %", ("sure", 0.9995): "> 99.9 %", ("sure", 0.9996): "> 99.9 %",
        ("sure", 0.123): "12.3 %", ("percent", 1): "100.0 %",
        ("points", 0.01234): "+1.2", ("round", 0.126): "13 %",
    }  # fmt: skip
    for (kind, value), text in shown.items():
        assert page_maker.show(value, kind).replace("\N{NO-BREAK SPACE}", " ") == text, (kind, value)
    row = {"a": 0.01, "b": 0.5, "c": 0.2, "d": 0.1, "e": 0.1, "f": 0.09}
    assert page_maker.top(row, list("abcdef")) == ["b", "c", "d", "e", "f"]
    assert page_maker.top(row, ["a", "b"]) == ["b", "a"] and page_maker.top(row | {"a": 0.0099}, ["a", "b"]) == ["b"]


# A program or a template completes these.
DYNAMIC = ("baseline_", "verdict_", "audit_", "serve_")


def test_every_text_in_both_languages():
    """None is missing, none is unused, both fill the same places, and no template says anything by itself."""
    scoring = Path(page_maker.__file__).parent
    templates = {path.name: path.read_text(encoding="utf-8") for path in (scoring / "pages").glob("*.html")}
    files = [*scoring.parent.rglob("*.py"), *ROOT.glob("scripts/*.py"), ROOT / "config.py"]
    programs = [path.read_text(encoding="utf-8") for path in files]
    source = "".join([*templates.values(), *(text for text in programs if "Texts(" in text)])
    texts = {key: pair for key, pair in TEXTS.items() if key not in ("labels", "reasons")}
    for name, chinese in (TEXTS["labels"] | TEXTS["reasons"]).items():
        assert chinese and any(name.removesuffix(" is not read") in text for text in programs), name
    for key, (english, chinese) in texts.items():
        assert english and chinese, key
        assert set(re.findall(r"{(\w+)}", english)) == set(re.findall(r"{(\w+)}", chinese)), key
        assert re.search(r"[\u4e00-\u9fff，。]", chinese) or key == "lang", key
        prefix = next((prefix for prefix in DYNAMIC if key.startswith(prefix)), None)
        word = key.removeprefix(prefix or "").removesuffix("_about")
        assert f'"{key}"' in source or prefix and any(word in text for text in [source, *programs]), f"{key}: not used"
    assert set(re.findall(r'\bt(?:exts)?\("([\w-]+)"[,)]', source)) <= set(texts)
    for name, text in templates.items():
        for inside in (r"{#.*?#}", r"<style>.*?</style>", r"<script>.*?</script>", r"{{.*?}}", r"{%.*?%}"):
            text = re.sub(inside, "", text, flags=re.S)
        bare = re.sub(r"<[^>]*>|&nbsp;|macro-F1|ECE|F1|--min_probability|\b[np]\b", "", text)
        assert not re.search("[A-Za-z]{2}", bare), (name, re.findall("[A-Za-z ]{2,}", bare))
        assert not re.search(r'(aria-label|title|alt)="[^"{]*[A-Za-z]', text), name
