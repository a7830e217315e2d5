"""Draw one training step, docs/magicmirror.svg, and one adapted block, docs/block.svg, each with a dark twin.

python docs/figure.py
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

WIDTH = 900
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
PALETTES = {
    ".svg": {
        "page": "#ffffff",
        "ink": "#1f2328",
        "soft": "#59636e",
        "line": "#818b98",
        "frozen": "#f0f2f5",
        "frozen_edge": "#a5aeb8",
        "trained": "#fff3cd",
        "trained_edge": "#c69026",
        "text": "#0969da",
        "face": "#cf5a00",
        "video": "#1a7f37",
        "identity": "#8250df",
    },
    "-dark.svg": {
        "page": "#0d1117",
        "ink": "#f0f6fc",
        "soft": "#a3abb5",
        "line": "#7d8590",
        "frozen": "#1f252d",
        "frozen_edge": "#5a636e",
        "trained": "#463507",
        "trained_edge": "#d29922",
        "text": "#58a6ff",
        "face": "#ff9b4a",
        "video": "#3fb950",
        "identity": "#c297ff",
    },
}


class Box(NamedTuple):
    """A rectangle by its centre."""

    x: float
    y: float
    width: float
    height: float

    left = property(lambda self: self.x - self.width / 2)
    right = property(lambda self: self.x + self.width / 2)
    top = property(lambda self: self.y - self.height / 2)
    bottom = property(lambda self: self.y + self.height / 2)


class Canvas:
    """Collects SVG elements; colours are names of the palette."""

    def __init__(self, palette: dict[str, str], title: str, height: int):
        self.palette, self.title, self.height = palette, title, height
        self.elements: list[str] = []

    def add(self, element: str) -> None:
        self.elements.append(element)

    def rect(self, box: Box, fill: str, edge: str = "none", radius: float = 6, extra: str = "") -> None:
        colours = f'fill="{self.palette[fill]}" stroke="{self.palette.get(edge, "none")}"'
        place = f'x="{box.left:g}" y="{box.top:g}" width="{box.width:g}" height="{box.height:g}" rx="{radius:g}"'
        self.add(f"<rect {place} {colours}{extra}/>")

    def label(self, x: float, y: float, text: str, size: float = 12, colour="ink", anchor="middle", extra="") -> None:
        """Text on a baseline; `_{...}` is set as an index, `*...*` in italics."""
        place = f'x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" fill="{self.palette[colour]}"'
        self.add(f"<text {place}{extra}>{markup(text, size)}</text>")

    def network(self, box: Box, lines: list[str], kind: str) -> Box:
        """A network, `frozen` or `trained`, or a `plain` step; the first line is its name, the others are smaller."""
        fill, edge = ("page", "frozen_edge") if kind == "plain" else (kind, f"{kind}_edge")
        self.rect(box, fill, edge, extra=' stroke-width="1.25"')
        first = box.y + 4.5 - 7 * (len(lines) - 1)
        for i, line in enumerate(lines):
            self.label(box.x, first + 14 * i, line, 12 if i == 0 else 10.5, "ink" if i == 0 else "soft")
        return box

    def path(self, points: list[tuple[float, float]], colour="line", arrow: bool = True, extra: str = "") -> None:
        """A line through points, its corners rounded."""
        end = f' marker-end="url(#{colour})"' if arrow else ""
        drawn = rounded(points)
        self.add(f'<path d="{drawn}" fill="none" stroke="{self.palette[colour]}" stroke-width="1.5"{end}{extra}/>')

    def dot(self, x: float, y: float, colour: str, radius: float = 2.6) -> None:
        self.add(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{self.palette[colour]}"/>')

    def tokens(self, x: float, y: float, colours: list[str], size: float = 8) -> None:
        """A row of token squares, centred."""
        step = size + 2
        for i, colour in enumerate(colours):
            box = Box(x + (i - (len(colours) - 1) / 2) * step, y, size, size)
            self.rect(box, colour, radius=1.5)

    def operator(self, x: float, y: float, sign: str, colour: str) -> None:
        stroke = f'stroke="{self.palette[colour]}" stroke-width="1.5"'
        self.add(f'<circle cx="{x:g}" cy="{y:g}" r="8" fill="{self.palette["page"]}" {stroke}/>')
        lines = {"+": ((-4, 0, 4, 0), (0, -4, 0, 4)), "x": ((-3, -3, 3, 3), (-3, 3, 3, -3))}[sign]
        for x0, y0, x1, y1 in lines:
            self.add(f'<path d="M{x + x0:g} {y + y0:g}L{x + x1:g} {y + y1:g}" {stroke}/>')

    def document(self) -> str:
        arrows = "".join(arrow_head(name, self.palette[name]) for name in STREAMS)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" '
            f'height="{self.height}" role="img" aria-label="{self.title}" font-family="{FONT}">\n'
            f"<title>{self.title}</title>\n<defs>{arrows}</defs>\n" + "\n".join(self.elements) + "\n</svg>\n"
        )


STREAMS = ("line", "text", "face", "video", "identity")


def arrow_head(name: str, colour: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0.5L8 4L0 7.5Z" fill="{colour}"/></marker>'
    )


def markup(text: str, size: float) -> str:
    """`_{...}` -> an index, by shifts that every browser knows; `*...*` -> italics."""
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    text = re.sub(r"\*([^*]+)\*", r'<tspan font-style="italic">\1</tspan>', text)
    down = size * 0.25
    index = rf'<tspan dy="{down:g}" font-size="{size * 0.78:g}">\1</tspan><tspan dy="{-down:g}">&#8203;</tspan>'
    return re.sub(r"_\{([^}]*)\}", index, text)


def rounded(points: list[tuple[float, float]], radius: float = 7) -> str:
    """SVG path data of a polyline with axis-parallel segments."""
    drawn = f"M{points[0][0]:g} {points[0][1]:g}"
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        entry, leave = towards(corner, before, radius), towards(corner, after, radius)
        drawn += f"L{entry[0]:g} {entry[1]:g}Q{corner[0]:g} {corner[1]:g} {leave[0]:g} {leave[1]:g}"
    return drawn + f"L{points[-1][0]:g} {points[-1][1]:g}"


def towards(start: tuple[float, float], end: tuple[float, float], distance: float) -> tuple[float, float]:
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = abs(dx) + abs(dy)
    part = min(distance, length / 2) / length
    return start[0] + dx * part, start[1] + dy * part


# One training step ---------------------------------------------------------------------------------------------------

FACE_Y, ID_Y, TEXT_Y, VIDEO_Y = 122, 196, 270, 344
INPUT_X, ENCODER_X, PART_X = 62, 196, 344
TRANSFORMER = Box(612, 233, 136, 290)


def training_step(c: Canvas) -> None:
    legend(c, 560, 28)
    inputs(c)
    front_end(c)
    transformer(c)
    losses(c)


def legend(c: Canvas, x: float, y: float) -> None:
    for offset, kind, name in ((0, "frozen", "frozen"), (78, "trained", "trained")):
        c.rect(Box(x + offset, y, 18, 13), kind, f"{kind}_edge", radius=3, extra=' stroke-width="1.25"')
        c.label(x + offset + 14, y + 4, name, 11.5, "soft", "start")
    for offset, colour, name in ((160, "text", "text"), (205, "face", "face"), (252, "video", "video")):
        c.tokens(x + offset, y, [colour])
        c.label(x + offset + 8, y + 4, name, 11.5, "soft", "start")
    c.tokens(x + 302, y, ["identity"])
    c.label(x + 310, y + 4, "id", 11.5, "soft", "start")


def portrait(c: Canvas, box: Box, colour: str) -> None:
    """A head and shoulders of nobody."""
    c.rect(box, "page", colour, radius=4, extra=' stroke-width="1.5"')
    fill = f'fill="{c.palette[colour]}" fill-opacity="0.85"'
    head, shoulder = box.height * 0.17, box.width * 0.34
    c.add(f'<circle cx="{box.x:g}" cy="{box.y - box.height * 0.12:g}" r="{head:g}" {fill}/>')
    base, top = box.bottom - 2, box.y + box.height * 0.16
    curve = f"M{box.x - shoulder:g} {base:g}C{box.x - shoulder:g} {top:g} {box.x + shoulder:g} {top:g} "
    c.add(f'<path d="{curve}{box.x + shoulder:g} {base:g}Z" {fill}/>')


def inputs(c: Canvas) -> None:
    middle = (FACE_Y + ID_Y) / 2
    for shift in (8, 4, 0):
        portrait(c, Box(INPUT_X - shift + 4, middle - shift, 40, 50), "face")
    c.label(INPUT_X, middle + 42, "reference photos", 11.5)
    c.label(INPUT_X, TEXT_Y - 3, "“a man img", 11.5, "text", extra=' font-style="italic"')
    c.label(INPUT_X, TEXT_Y + 11, "is talking”", 11.5, "text", extra=' font-style="italic"')
    for i in range(3):
        portrait(c, Box(INPUT_X - 27 + 27 * i, VIDEO_Y - 4, 27, 34), "video")
    c.label(INPUT_X, VIDEO_Y + 29, "target clip", 11.5)


def front_end(c: Canvas) -> None:
    clip = c.network(Box(ENCODER_X, FACE_Y, 108, 46), ["*F*_{feat}", "CLIP ViT"], "frozen")
    recognizer = c.network(Box(ENCODER_X, ID_Y, 108, 46), ["*F*_{id}", "face recogniser"], "frozen")
    t5 = c.network(Box(ENCODER_X, TEXT_Y, 108, 46), ["T5"], "frozen")
    vae = c.network(Box(ENCODER_X, VIDEO_Y, 108, 46), ["VAE encoder"], "frozen")
    tau_face = c.network(Box(PART_X, FACE_Y, 112, 46), ["τ_{face}", "32 learned queries"], "trained")
    tau_id = c.network(Box(PART_X, ID_Y, 112, 46), ["τ_{id}", "PhotoMaker-V2"], "frozen")
    fuse = c.network(Box(PART_X, TEXT_Y, 112, 46), ["MLP_{fuse}", "equation 5"], "trained")
    noise = c.network(Box(PART_X, VIDEO_Y, 112, 46), ["add noise", "at time *t*"], "plain")

    fork = 120
    for encoder in (clip, recognizer):
        c.path([(96, (FACE_Y + ID_Y) / 2), (fork, (FACE_Y + ID_Y) / 2), (fork, encoder.y), (encoder.left, encoder.y)])
    c.path([(106, TEXT_Y), (t5.left, TEXT_Y)], "text")
    c.path([(106, VIDEO_Y), (vae.left, VIDEO_Y)], "video")
    c.path([(clip.right, FACE_Y), (tau_face.left, FACE_Y)])
    c.path([(268, FACE_Y), (268, ID_Y - 10), (tau_id.left, ID_Y - 10)])
    c.dot(268, FACE_Y, "line")
    c.label(260, FACE_Y - 6, "*f*", 12, "soft")
    c.path([(recognizer.right, ID_Y + 10), (tau_id.left, ID_Y + 10)])
    c.label(266, ID_Y + 25, "*q*_{id}", 12, "soft")
    c.path([(t5.right, TEXT_Y), (fuse.left, TEXT_Y)], "text")
    c.path([(vae.right, VIDEO_Y), (noise.left, VIDEO_Y)], "video")
    c.path([(tau_id.x, tau_id.bottom), (fuse.x, fuse.top)], "identity")
    entries(c, tau_face.right)


def entries(c: Canvas, left: float) -> None:
    """The four things that enter the transformer."""
    right = TRANSFORMER.left
    project = c.network(Box(484, ID_Y, 62, 30), ["project"], "trained")
    c.path([(left, ID_Y), (project.left, ID_Y)], "identity")
    c.path([(project.right, ID_Y), (right, ID_Y)], "identity")
    c.label(project.x, project.bottom + 14, "for CAN", 11, "soft")
    c.tokens(426, ID_Y - 14, ["identity"] * 2)
    c.label(426, ID_Y - 23, "*x*_{id}", 12, "identity")
    for y, colour in ((FACE_Y, "face"), (TEXT_Y, "text"), (VIDEO_Y, "video")):
        c.path([(left, y), (right, y)], colour)
    middle = (left + right) / 2
    c.tokens(middle, FACE_Y - 12, ["face"] * 8)
    c.label(middle, FACE_Y - 23, "*x*_{face}, 32 tokens", 12, "face")
    c.tokens(middle, TEXT_Y - 12, ["text"] * 3 + ["identity"] * 2 + ["text"] * 3)
    c.label(middle, TEXT_Y + 17, "identity at “man”", 11, "soft")
    c.tokens(middle, VIDEO_Y - 12, ["video"] * 8)
    c.label(middle, VIDEO_Y + 17, "noisy latents", 11, "soft")


def transformer(c: Canvas) -> None:
    c.rect(TRANSFORMER, "page", "frozen_edge", radius=10, extra=' stroke-width="1.25"')
    c.label(TRANSFORMER.x, TRANSFORMER.top - 8, "CogVideoX transformer", 12)
    for i in range(6):
        x = TRANSFORMER.left + 18 + 20 * i
        if i % 2 == 0:
            bar = Box(x, (FACE_Y + VIDEO_Y) / 2, 13, VIDEO_Y - FACE_Y + 36)
            c.rect(bar, "trained", "trained_edge", radius=4, extra=' stroke-width="1.25"')
        else:
            bar = Box(x, (TEXT_Y + VIDEO_Y) / 2, 13, VIDEO_Y - TEXT_Y + 36)
            c.rect(bar, "frozen", "frozen_edge", radius=4, extra=' stroke-width="1.25"')
    last_adapted, right = TRANSFORMER.left + 18 + 80, TRANSFORMER.right
    streams = ((FACE_Y, "face", last_adapted), (ID_Y, "identity", last_adapted), (TEXT_Y, "text", right - 14))
    for y, colour, end in (*streams, (VIDEO_Y, "video", right)):
        c.path([(TRANSFORMER.left, y), (end, y)], colour, arrow=False, extra=' stroke-opacity="0.75"')
    c.label(TRANSFORMER.x, TRANSFORMER.bottom + 17, "adapters in every second block", 11, "soft")


def losses(c: Canvas) -> None:
    x, right = 792, TRANSFORMER.right
    velocity = c.network(Box(x, VIDEO_Y, 176, 46), ["velocity error", "half the samples: face only"], "plain")
    decoder = c.network(Box(x, TEXT_Y, 132, 46), ["VAE decoder", "crop around the face"], "frozen")
    recognizer = c.network(Box(x, ID_Y, 132, 46), ["*F*_{id}", "face recogniser"], "frozen")
    identity = c.network(Box(x, FACE_Y, 176, 46), ["λ (1 − cos)", "identity loss"], "plain")
    c.path([(right, VIDEO_Y), (velocity.left, VIDEO_Y)], "video")
    fork = (right + velocity.left) / 2
    c.path([(fork, VIDEO_Y), (fork, TEXT_Y), (decoder.left, TEXT_Y)], "video")
    c.dot(fork, VIDEO_Y, "video")
    c.label(fork + 9, TEXT_Y + 40, "*x̂*_{0}, the clean estimate", 11, "video", "start")
    c.path([(x, decoder.top), (x, recognizer.bottom)], "video")
    c.path([(x, recognizer.top), (x, identity.bottom)], "identity")
    dashed = ' stroke-dasharray="4 3"'
    start = (FACE_Y + ID_Y) / 2 - 33
    c.path([(INPUT_X, start), (INPUT_X, 62), (x, 62), (x, identity.top)], "identity", extra=dashed)
    c.label(INPUT_X + 10, 56, "the same photos, as *F*_{id} sees them", 11, "soft", "start")


# One adapted block ---------------------------------------------------------------------------------------------------

TOP = -8
LANES = {"text": TOP + 194, "face": TOP + 254, "video": TOP + 314}
RAIL_Y, BYPASS_Y = TOP + 146, TOP + 362
SPLIT1_X, MODULATE1_X, GATE1_X, ADD1_X = 104, 142, 520, 550
SPLIT2_X, MODULATE2_X, GATE2_X, ADD2_X = 580, 616, 790, 820


def adapted_block(c: Canvas) -> None:
    legend(c, 560, 28)
    lanes(c)
    bypass(c, SPLIT1_X, ADD1_X)
    bypass(c, SPLIT2_X, ADD2_X)
    modulation(c)
    attention(c)
    middle = (LANES["text"] + LANES["video"]) / 2
    c.network(Box(704, middle, 96, 172), ["feed-forward", "one for all three"], "frozen")
    for x in (MODULATE1_X, MODULATE2_X):
        for y in LANES.values():
            c.network(Box(x, y, 46, 26), ["norm"], "trained" if y == LANES["face"] else "frozen")
    for gate, add in ((GATE1_X, ADD1_X), (GATE2_X, ADD2_X)):
        for colour, y in LANES.items():
            c.operator(gate, y, "x", colour)
            c.operator(add, y, "+", colour)
    caption = "Before training, CAN, φ_{face} and V̂ give zero. Blocks without an adapter do not see the face stream."
    c.label(WIDTH / 2, TOP + 400, caption, 11.5, "soft")


def lanes(c: Canvas) -> None:
    for colour, y in LANES.items():
        c.tokens(44, y, [colour] * 4)
        c.label(44, y - 12, colour, 12, colour)
        c.path([(68, y), (876, y)], colour)


def bypass(c: Canvas, start: float, end: float) -> None:
    """The three residual connections, drawn as one."""
    first = LANES["text"]
    c.path([(start, first), (start, BYPASS_Y), (end, BYPASS_Y), (end, LANES["video"] + 8)])
    c.path([(end, first), (end, LANES["video"])], arrow=False)
    for colour, y in LANES.items():
        c.dot(start, y, colour, 3.2)
    c.label((start + end) / 2, BYPASS_Y + 15, "each stream's own residual", 11, "soft")


def modulation(c: Canvas) -> None:
    y = TOP + 88
    base = c.network(Box(214, y, 136, 46), ["the block's own", "factors from *t*"], "frozen")
    can = c.network(Box(504, y, 190, 46), ["CAN  φ_{cond}", "*t*, identity, the block's video shift"], "trained")
    face = c.network(Box(742, y, 136, 46), ["φ_{face}", "factors from *t*"], "trained")
    plus = (348, y)
    c.path([(base.right, y), (plus[0] - 8, y)])
    c.path([(can.left, y), (plus[0] + 8, y)], "identity")
    c.label(374, y - 8, "eq. 7", 11, "soft")
    c.path([(MODULATE1_X, RAIL_Y), (GATE2_X, RAIL_Y)], arrow=False)
    c.path([(plus[0], y), (plus[0], RAIL_Y)], arrow=False)
    c.operator(*plus, "+", "line")
    c.label(plus[0] + 8, RAIL_Y - 8, "12 factors: text, video", 11, "soft", "start")
    c.path([(face.x, face.bottom), (face.x, RAIL_Y)], "face", arrow=False)
    c.dot(face.x, RAIL_Y, "face")
    c.dot(plus[0], RAIL_Y, "line")
    c.label(face.x - 8, RAIL_Y - 8, "eq. 6: 6 factors, face", 11, "soft", "end")
    for x in (MODULATE1_X, GATE1_X, MODULATE2_X, GATE2_X):
        c.path([(x, RAIL_Y), (x, LANES["video"])], arrow=False)
        c.dot(x, RAIL_Y, "line")
    for x, name in ((MODULATE1_X, "shift, scale"), (GATE1_X, "gate"), (MODULATE2_X, "shift, scale"), (GATE2_X, "gate")):
        anchor = "end" if x == GATE1_X else "start"
        c.label(x + (7 if anchor == "start" else -7), RAIL_Y + 17, name, 11, "soft", anchor)


def attention(c: Canvas) -> None:
    middle = (LANES["text"] + LANES["video"]) / 2
    frame = Box(336, middle, 300, 172)
    c.rect(frame, "page", "frozen_edge", radius=8, extra=' stroke-width="1.25"')
    joint = c.network(
        Box(300, middle - 32, 196, 76), ["self-attention", "over [text, face, video]", "RoPE on the video"], "frozen"
    )
    cross = c.network(
        Box(300, middle + 46, 196, 56), ["cross-attention to the face", "same query, own K̂ and V̂"], "trained"
    )
    output = c.network(Box(456, middle, 44, 60), ["out"], "frozen")
    plus = (418, middle)
    c.path([(joint.right, joint.y), (plus[0], joint.y), (plus[0], middle - 8)])
    c.path([(cross.right, cross.y), (plus[0], cross.y), (plus[0], middle + 8)], "face")
    c.path([(plus[0] + 8, middle), (output.left, middle)])
    c.operator(*plus, "+", "line")
    c.label(418, frame.bottom - 8, "eq. 8", 11, "soft")


class Scene(NamedTuple):
    title: str
    height: int
    draw: Callable[[Canvas], None]


SCENES = {
    "magicmirror": Scene("One training step", 412, training_step),
    "block": Scene("One adapted block", 404, adapted_block),
}


def draw(scene: Scene, palette: dict[str, str]) -> str:
    canvas = Canvas(palette, scene.title, scene.height)
    canvas.rect(Box(WIDTH / 2, scene.height / 2, WIDTH, scene.height), "page", radius=0)
    canvas.label(24, 34, scene.title, 17, anchor="start", extra=' font-weight="600"')
    scene.draw(canvas)
    return canvas.document()


def draw_all() -> dict[str, str]:
    """File name -> SVG."""
    return {
        name + suffix: draw(scene, palette) for name, scene in SCENES.items() for suffix, palette in PALETTES.items()
    }


def main() -> None:
    for name, drawing in draw_all().items():
        Path(__file__).with_name(name).write_text(drawing, encoding="utf-8")


if __name__ == "__main__":
    main()
