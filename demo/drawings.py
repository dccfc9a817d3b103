"""How ten kinds of animals look: a pen, and one function per animal that draws it in the animal's own coordinates."""

import math

from PIL import ImageDraw

COATS = ["#f4efe6", "#d8c3a0", "#b98a5a", "#8a5a34", "#5a3a26", "#34302e", "#8d9096", "#b9bec6", "#d9823b", "#6f7f8f"]
BRIGHT = ["#e4572e", "#f3a712", "#f7d23e", "#76b041", "#2e86ab", "#6a4c93", "#d6409f", "#38b6a4", "#f28ca8", "#3f51b5"]


def rgb(colour):
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) if isinstance(colour, str) else colour


def shade(colour, factor):
    """The colour made darker (factor < 1) or lighter (> 1)."""
    return tuple(max(0, min(255, round(c * factor))) for c in rgb(colour))


class Pen:
    """Draws in the animal's own coordinates: x to the right, y down, the animal within -1..1, facing left."""

    def __init__(self, image, x, y, scale, turn=0.0, flip=False):
        self.draw, self.scale = ImageDraw.Draw(image), scale
        cos, sin, mirror = math.cos(turn) * scale, math.sin(turn) * scale, -1 if flip else 1
        self.place = lambda p: (x + mirror * p[0] * cos - p[1] * sin, y + mirror * p[0] * sin + p[1] * cos)

    def line(self, points, width, colour):
        points, width = [self.place(p) for p in points], max(1, round(width * self.scale))
        self.draw.line(points, rgb(colour), width, joint="curve")
        for x, y in (points[0], points[-1]):  # round ends
            self.draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), rgb(colour))

    def shape(self, points, colour, edge=0.025):
        """A filled polygon with a darker outline."""
        self.draw.polygon([self.place(p) for p in points], rgb(colour))
        if edge:
            self.line([*points, points[0]], edge, shade(colour, 0.55))

    def blob(self, x, y, rx, ry, colour, turn=0.0, edge=0.025):
        """A filled ellipse; turn in radians."""
        cos, sin = math.cos(turn), math.sin(turn)
        ring = [(rx * math.cos(a), ry * math.sin(a)) for a in (i * math.pi / 16 for i in range(32))]
        self.shape([(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in ring], colour, edge)

    def eye(self, x, y, r=0.05):
        self.blob(x, y, r * 1.5, r * 1.5, "#ffffff", edge=0)
        self.blob(x, y, r, r, "#141414", edge=0)


def legs(pen, r, xs, top, bottom, width, colour, hoof):
    for i, x in enumerate(xs):
        foot = x + r.uniform(-0.1, 0.1)
        pen.line([(x, top), (foot, bottom)], width, shade(colour, 0.75 if i % 2 else 0.95))
        pen.line([(foot, bottom - 0.04), (foot, bottom)], width, hoof)


def butterfly(pen, r, coat):
    upper, lower, spot = r.sample(BRIGHT, 3)
    spread = r.uniform(0.85, 1.1)
    for side in (-1, 1):
        pen.blob(side * 0.42 * spread, 0.4, 0.42, 0.34, lower, side * 0.7)
        pen.blob(side * 0.5 * spread, -0.28, 0.6, 0.4, upper, side * -0.6)
        pen.blob(side * 0.6 * spread, -0.36, 0.2, 0.16, spot, side * -0.6)
        pen.blob(side * 0.45 * spread, 0.42, 0.14, 0.12, spot)
        pen.line([(0, -0.4), (side * 0.14, -0.75), (side * 0.3, -0.9)], 0.04, "#2a2220")
        pen.blob(side * 0.3, -0.9, 0.04, 0.04, "#2a2220", edge=0)
    pen.blob(0, 0.08, 0.09, 0.58, "#3a2c28")
    pen.blob(0, -0.46, 0.11, 0.11, "#3a2c28")


def cat(pen, r, coat):
    side = r.choice((-1, 1))
    pen.line([(side * a, b) for a, b in ((0.3, 0.8), (0.75, 0.75), (0.9, 0.4), (0.75, 0.1))], 0.14, shade(coat, 0.8))
    pen.blob(0, 0.5, 0.46, 0.5, coat)
    for x in (-0.18, 0.18):
        pen.blob(x, 0.85, 0.13, 0.17, shade(coat, 1.08))
    for s in (-1, 1):
        pen.shape([(s * 0.52, -0.35), (s * 0.5, -1.0), (s * 0.1, -0.68)], coat)
        pen.shape([(s * 0.44, -0.5), (s * 0.44, -0.84), (s * 0.22, -0.66)], "#e8a0a8", edge=0)
    pen.blob(0, -0.28, 0.56, 0.46, coat)
    for x in (-0.14, 0, 0.14):
        pen.line([(x, -0.7), (x * 0.8, -0.5)], 0.05, shade(coat, 0.5))
    iris = r.choice(("#7fbf3f", "#f0b429", "#4aa3df"))
    for s in (-1, 1):
        pen.blob(s * 0.23, -0.33, 0.12, 0.11, iris)
        pen.blob(s * 0.23, -0.33, 0.035, 0.1, "#101010", edge=0)
        for dy in (-0.1, 0.0, 0.1):
            pen.line(
                [(s * 0.16, -0.1 + dy * 0.3), (s * 0.8, -0.1 + dy * 1.6)],
                0.025,
                "#fafafa" if sum(rgb(coat)) < 330 else "#303030",
            )
    pen.shape([(-0.08, -0.18), (0.08, -0.18), (0, -0.08)], "#e07a8a", edge=0)
    pen.line([(-0.12, 0.0), (0, -0.06), (0.12, 0.0)], 0.03, "#402020")


def chicken(pen, r, coat):
    for i in range(4):  # tail feathers
        pen.blob(0.68 + 0.05 * i, -0.42 + 0.17 * i, 0.36, 0.1, shade(coat, 0.65 + 0.1 * i), -0.9 + 0.3 * i)
    for x in (-0.08, 0.2):
        pen.line([(x, 0.5), (x, 0.92)], 0.05, "#e8a020")
        for toe in (-0.16, 0, 0.12):
            pen.line([(x, 0.88), (x + toe, 0.97)], 0.04, "#e8a020")
    pen.blob(0.1, 0.2, 0.62, 0.46, coat)
    pen.shape([(-0.5, 0.2), (-0.56, -0.55), (-0.28, -0.6), (0.1, -0.1), (0, 0.3)], coat, edge=0)
    for x, y in ((-0.56, -0.84), (-0.42, -0.9), (-0.28, -0.82)):  # comb
        pen.blob(x, y, 0.1, 0.14, "#d8232a")
    pen.blob(-0.42, -0.6, 0.22, 0.22, coat)
    pen.shape([(-0.6, -0.68), (-0.9, -0.54), (-0.6, -0.48)], "#f5a800")
    pen.blob(-0.56, -0.36, 0.07, 0.13, "#d8232a")
    pen.eye(-0.47, -0.64, 0.04)
    pen.blob(0.2, 0.16, 0.36, 0.22, shade(coat, 0.82), r.uniform(-0.3, 0.1))


def cow(pen, r, coat):
    white, patch = (coat, "#2a2624") if sum(rgb(coat)) > 420 else ("#f4f0ea", coat)
    pen.line([(0.78, -0.25), (0.95, 0.05), (0.92, 0.4)], 0.05, shade(white, 0.7))
    pen.blob(0.92, 0.45, 0.07, 0.12, patch)
    legs(pen, r, (-0.38, -0.2, 0.48, 0.66), 0.2, 0.92, 0.15, white, "#3a3030")
    pen.blob(0.34, 0.34, 0.17, 0.13, "#f0a8a8")  # udder
    pen.shape([(-0.5, -0.38), (0.74, -0.38), (0.84, -0.1), (0.78, 0.3), (-0.4, 0.34), (-0.56, 0)], white)
    for x, y in ((-0.22, -0.14), (0.2, 0.08), (0.56, -0.16)):
        pen.blob(
            x + r.uniform(-0.07, 0.07), y, r.uniform(0.13, 0.22), r.uniform(0.11, 0.17), patch, r.uniform(-1, 1), edge=0
        )
    for s in (-1, 1):  # horns and ears
        pen.line([(-0.66 + s * 0.12, -0.62), (-0.66 + s * 0.26, -0.78), (-0.66 + s * 0.2, -0.96)], 0.07, "#e8dcb8")
        pen.blob(-0.66 + s * 0.3, -0.52, 0.14, 0.07, patch, s * 0.3)
    pen.blob(-0.66, -0.36, 0.22, 0.32, white)
    pen.blob(-0.58, -0.5, 0.12, 0.14, patch, edge=0)
    pen.blob(-0.68, -0.1, 0.24, 0.16, "#f2b4b0")
    for s in (-1, 1):
        pen.blob(-0.68 + s * 0.1, -0.1, 0.04, 0.05, "#70383a", edge=0)
        pen.eye(-0.66 + s * 0.11, -0.42, 0.04)


def dog(pen, r, coat):
    ear = shade(coat, 0.6)
    pen.line([(0.6, -0.05), (0.82, -0.35), (0.84, -0.7 + r.uniform(-0.1, 0.1))], 0.12, coat)
    legs(pen, r, (-0.3, -0.12, 0.42, 0.58), 0.25, 0.9, 0.14, coat, shade(coat, 1.15))
    pen.blob(0.14, 0.16, 0.62, 0.27, coat)
    pen.shape([(-0.5, 0.1), (-0.5, -0.3), (-0.14, -0.3), (0.1, 0.0), (-0.1, 0.36)], coat, edge=0)
    pen.line([(-0.56, -0.04), (-0.14, -0.1)], 0.09, r.choice(BRIGHT))  # collar
    pen.blob(-0.42, -0.4, 0.33, 0.31, coat)
    pen.blob(-0.72, -0.28, 0.24, 0.15, shade(coat, 1.15))
    pen.blob(-0.94, -0.34, 0.08, 0.07, "#181414", edge=0)
    pen.blob(-0.7, -0.08, 0.07, 0.15, "#e8647a")  # tongue
    pen.blob(-0.2, -0.3, 0.15, 0.36, ear, r.uniform(-0.35, -0.05))  # floppy ear
    pen.eye(-0.54, -0.48)


def elephant(pen, r, coat):
    pen.line([(0.84, -0.2), (0.94, 0.1), (0.9, 0.3)], 0.05, shade(coat, 0.7))
    legs(pen, r, (-0.16, 0.08, 0.5, 0.7), 0.2, 0.9, 0.24, coat, "#d8d0c0")
    pen.blob(0.3, -0.1, 0.62, 0.52, coat)
    swing = r.uniform(-0.12, 0.1)
    pen.line([(-0.74, -0.2), (-0.84, 0.2), (-0.84, 0.55), (-0.92 + swing, 0.8)], 0.19, shade(coat, 0.55))
    pen.line([(-0.74, -0.2), (-0.84, 0.2), (-0.84, 0.55), (-0.92 + swing, 0.8)], 0.15, coat)  # trunk
    pen.blob(-0.55, -0.3, 0.36, 0.38, coat)
    pen.line([(-0.62, 0.04), (-0.7, 0.26), (-0.66, 0.36)], 0.08, "#fbf6e4")  # tusk
    pen.blob(-0.2, -0.32, 0.34, 0.46, shade(coat, 0.85), r.uniform(-0.2, 0.2))  # ear
    pen.blob(-0.2, -0.3, 0.22, 0.33, "#d8a8a4", r.uniform(-0.2, 0.2), edge=0)
    pen.eye(-0.68, -0.36, 0.04)


def horse(pen, r, coat):
    hair = shade(coat, 0.4) if sum(rgb(coat)) > 250 else rgb("#d8c090")
    for i in range(4):
        pen.line([(0.68, -0.08), (0.88, 0.1), (0.84 + 0.05 * i, 0.62 - 0.04 * i)], 0.07, shade(hair, 1 + 0.1 * i))
    legs(pen, r, (-0.26, -0.12, 0.5, 0.62), 0.2, 0.95, 0.1, coat, "#2a2422")
    pen.blob(0.18, 0.08, 0.56, 0.26, coat)
    pen.shape([(-0.34, 0.2), (-0.62, -0.62), (-0.36, -0.82), (0.1, -0.1)], coat, edge=0)
    for i in range(7):  # mane
        x, y = -0.36 + 0.07 * i, -0.86 + 0.12 * i
        pen.blob(x + 0.02, y + 0.06, 0.1, 0.16, shade(hair, 1 + 0.12 * (i % 2)), -0.6, edge=0.015)
    pen.shape([(-0.42, -0.8), (-0.38, -1.02), (-0.28, -0.8)], coat)
    pen.shape([(-0.34, -0.84), (-0.56, -0.82), (-0.94, -0.42), (-0.9, -0.26), (-0.74, -0.28), (-0.4, -0.5)], coat)
    pen.blob(-0.86, -0.36, 0.11, 0.1, shade(coat, 0.7), edge=0)
    pen.eye(-0.56, -0.66, 0.04)


def spider(pen, r, coat):
    body = shade(coat, 0.6)
    for s in (-1, 1):
        for i in range(4):
            a = -1.0 + 0.62 * i + r.uniform(-0.08, 0.08)
            knee = (s * 0.58 * math.cos(a * 0.8), 0.62 * math.sin(a * 0.8) - 0.18)
            foot = (s * (0.9 + 0.06 * math.cos(a)), 0.95 * math.sin(a * 0.95) + 0.05)
            pen.line([(s * 0.1, -0.1 + 0.06 * i), knee, foot], 0.065, shade(body, 0.7))
    pen.blob(0, 0.28, 0.32, 0.38, body)
    mark = r.choice(BRIGHT)
    pen.shape([(0, 0.06), (0.12, 0.24), (0, 0.46), (-0.12, 0.24)], mark, edge=0)
    pen.blob(0, -0.22, 0.22, 0.2, shade(body, 0.85))
    for x in (-0.08, 0.08):
        pen.eye(x, -0.3, 0.04)


def sheep(pen, r, coat):
    wool, face = coat, "#2c2826" if sum(rgb(coat)) > 330 else "#e8d8c4"
    legs(pen, r, (-0.28, -0.08, 0.36, 0.54), 0.3, 0.92, 0.1, face, "#201c1a")
    for i in range(14):  # a ring of curls, then the inside
        a = i * math.tau / 14
        pen.blob(0.14 + 0.54 * math.cos(a), -0.06 + 0.36 * math.sin(a), 0.19, 0.19, shade(wool, r.uniform(0.92, 1.05)))
    pen.blob(0.14, -0.06, 0.56, 0.38, wool, edge=0)
    for _ in range(16):
        x, y = 0.14 + r.uniform(-0.5, 0.5), -0.06 + r.uniform(-0.34, 0.34)
        pen.line(
            [(x - 0.07, y), (x - 0.04, y - 0.07), (x + 0.04, y - 0.06), (x + 0.05, y + 0.02)], 0.03, shade(wool, 0.68)
        )
    pen.blob(-0.36, -0.36, 0.17, 0.08, face, 0.5)
    pen.blob(-0.6, -0.2, 0.2, 0.3, face, 0.4)
    for x, y in ((-0.52, -0.5), (-0.66, -0.46), (-0.4, -0.48)):
        pen.blob(x, y, 0.13, 0.12, wool)
    pen.eye(-0.6, -0.26, 0.045)


def squirrel(pen, r, coat):
    tail = [(0.2, 0.75), (0.6, 0.72), (0.76, 0.35), (0.66, -0.05), (0.52, -0.4), (0.62, -0.7), (0.86, -0.74)]
    for i, (x, y) in enumerate(tail):  # a bushy tail: fat curls with hairs
        pen.blob(x, y, (0.16, 0.24, 0.28, 0.28, 0.28, 0.25, 0.16)[i], 0.24, shade(coat, 0.85), edge=0)
    for x, y in tail[1:]:
        for _ in range(5):
            a = r.uniform(0, math.tau)
            pen.line([(x, y), (x + 0.3 * math.cos(a), y + 0.3 * math.sin(a))], 0.03, shade(coat, r.choice((0.6, 1.2))))
    pen.blob(0.04, 0.38, 0.36, 0.5, coat)
    pen.blob(-0.12, 0.4, 0.2, 0.36, shade(coat, 1.35) if sum(rgb(coat)) < 500 else "#fffaf0", edge=0)
    pen.blob(0.06, 0.7, 0.24, 0.2, shade(coat, 0.92))
    pen.blob(-0.14, 0.88, 0.24, 0.08, shade(coat, 0.8))
    for x in (-0.3, -0.08):
        pen.shape([(x - 0.08, -0.5), (x, -0.9), (x + 0.12, -0.5)], shade(coat, 0.8))
    pen.blob(-0.26, -0.32, 0.32, 0.27, coat)
    pen.blob(-0.5, -0.24, 0.13, 0.1, shade(coat, 1.15))
    pen.blob(-0.6, -0.27, 0.05, 0.05, "#181414", edge=0)
    pen.eye(-0.32, -0.38)
    pen.line([(-0.06, 0.1), (-0.34, 0.22)], 0.11, shade(coat, 0.85))
    pen.blob(-0.44, 0.2, 0.13, 0.15, "#9c6428")  # the nut
    pen.blob(-0.44, 0.1, 0.15, 0.07, "#5c3a18")


ANIMALS = {  # how to draw it, the coats it comes in
    "butterfly": (butterfly, COATS),
    "cat": (cat, ["#d9823b", "#8d9096", "#3a3634", "#b98a5a", "#f0e8dc"]),
    "chicken": (chicken, ["#f4efe6", "#b5532a", "#4a4442", "#d8b070"]),
    "cow": (cow, ["#f4efe6", "#2e2a28", "#8a4f2c", "#b98a5a"]),
    "dog": (dog, ["#d8b070", "#8a5a34", "#f4efe6", "#4a3a30", "#b9753a"]),
    "elephant": (elephant, ["#8d9096", "#a3a9b2", "#757c8a", "#a59c94"]),
    "horse": (horse, ["#8a5a34", "#9c5a2c", "#3a322e", "#d0a068", "#b9bec6"]),
    "spider": (spider, ["#34302e", "#5a3a26", "#4a4f5a", "#6a4a30"]),
    "sheep": (sheep, ["#f4efe6", "#e6dcc8", "#c9c6c0", "#4a4442"]),
    "squirrel": (squirrel, ["#b5532a", "#c4703a", "#8d8a86", "#6a4228"]),
}
