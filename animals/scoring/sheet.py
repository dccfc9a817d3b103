"""The contact sheet: the page of pictures that test.py --html writes. Imported by test.py alone."""

import time

from animals.scoring.page import embed, render

SIDE, SMALL_SIDE, MANY = 144, 112, 2000  # pixels of a picture's longest side; the second if there are more than MANY
FIRST = 60  # pictures at the top of the page


def contact_sheet(rows, labels, model, folder, language, min_probability=0.0, min_labels_mass=0.0):
    """HTML for the rows of test.py's CSV (dicts), with links relative to `folder`.

    The least certain pictures come first, because they need a look; below them all pictures, by predicted label.
    """
    named = [row | {key: float(row[key]) for key in ("probability", *labels)} for row in rows if not row["error"]]
    named.sort(key=lambda row: row["probability"])
    groups = [(name, [row for row in named if row["prediction"] == name]) for name in [*labels, "unsure"]]
    side = SMALL_SIDE if len(named) > MANY else SIDE
    return render(
        "sheet.html",
        folder,
        language,
        count=len(rows),
        labels=labels,
        model=model,
        min_probability=min_probability,
        min_labels_mass=min_labels_mass,
        date=time.strftime("%Y-%m-%d %H:%M"),
        first=named[:FIRST],
        groups=[(name, group) for name, group in groups if group],
        unreadable=[row for row in rows if row["error"]],
        side=side,
        **embed([row["image"] for row in named], [], side),
    )
