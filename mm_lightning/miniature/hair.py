"""Hair: the scalp raised along its normals inside a hairline, a curtain behind the face for long hair, a bun.

Positions in comments and constants are canonical: metres from the point between the eyes of the average adult, x to the
person's left, y backwards, z up.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mm_lightning.miniature.anatomy import PARTS, Anatomy
from mm_lightning.miniature.people import Person


class Cut(NamedTuple):
    """What a style does, in metres; `front` is the hairline's height over the eyes, `length` how far below the eyes the
    curtain ends (None: no curtain)."""

    thickness: float
    front: float = 0.068
    temple: float = 0.0
    rough: float = 0.0
    length: float | None = None
    bun: bool = False


CUTS = {
    "bald": Cut(0.0, front=1.0),
    "buzzed": Cut(0.003),
    "short": Cut(0.010, front=0.070, rough=0.002),
    "parted": Cut(0.014, front=0.066),
    "fringe": Cut(0.013, front=0.050),
    "curly": Cut(0.022, front=0.062, rough=0.004),
    "receding": Cut(0.006, front=0.085, temple=0.03),
    "bob": Cut(0.014, front=0.058, length=0.105),
    "long": Cut(0.013, front=0.062, length=0.20),
    "bun": Cut(0.008, front=0.064, bun=True),
}
# The hairline from the forehead to the nape: its height at a depth y, away from the front and its parameters.
SIDE_Y = np.array([-0.03, 0.0, 0.035, 0.055, 0.068, 0.10, 0.125, 0.16, 0.21])
SIDE_Z = np.array([0.066, 0.058, 0.038, 0.0, -0.005, 0.0, -0.035, -0.06, -0.075])
NUM_AROUND, NUM_DOWN = 33, 7
BUN_SHAPE = (9, 12)


def hair_depth(canonical: np.ndarray, person: Person) -> np.ndarray:
    """How far inside the hairline each point (..., 3) lies, in metres upwards; negative outside."""
    cut = CUTS[person.hair_style]
    x, y, z = np.moveaxis(canonical, -1, 0)
    line = np.interp(y, SIDE_Y, SIDE_Z)
    front = cut.front + 0.008 * person.hairline
    near = np.clip((0.06 - y) / 0.08, 0, 1)  # 1 on the forehead, 0 from the ears on
    line = line + near * (front - SIDE_Z[0]) + cut.temple * near * np.clip((np.abs(x) - 0.02) / 0.03, 0, 1)
    if person.hair_style == "parted":
        line = line - 0.012 * near * np.clip(1 - np.abs(x - 0.03) / 0.06, -0.5, 1)
    if person.hair_style == "bald":
        line = np.full_like(line, 1.0)
    return z - line


class HairMesh:
    """Topology of what hair adds to the head: a curtain and a bun, drawn for every person, shrunk to a point if unused.

    Attributes:
        triangles: (T, 3); coordinates: (N, 2) in [-1, 1] for the texture.
        roots: (NUM_AROUND,) vertices of the scalp over which the curtain hangs, from the right side over the back.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        curtain, bun = grid(NUM_AROUND, NUM_DOWN), grid(*BUN_SHAPE)
        self.num_curtain = NUM_AROUND * NUM_DOWN
        self.num_vertices = self.num_curtain + BUN_SHAPE[0] * BUN_SHAPE[1]
        self.triangles = np.concatenate([curtain, bun + self.num_curtain])
        self.coordinates = np.concatenate([grid_coordinates(NUM_AROUND, NUM_DOWN), grid_coordinates(*BUN_SHAPE)])
        self.roots = find_roots(anatomy)
        self.skin = np.unique(anatomy.triangles[anatomy.parts == PARTS.index("skin")])

    def curtain(self, rest: np.ndarray, length: float, volume: float, thickness: float) -> np.ndarray:
        """(NUM_AROUND * NUM_DOWN, 3): from inside the cap outwards and down."""
        roots = smooth(rest[self.roots])
        centre = np.array([0, roots[:, 1].mean() - 0.01, 0])
        outward = (roots - centre) * [1, 1, 0]
        outward = outward / np.linalg.norm(outward, axis=1, keepdims=True)
        down = np.linspace(0, 1, NUM_DOWN)[:, None, None]
        bulge = thickness * 0.6 + (0.010 + 0.016 * volume) * np.sin(np.pi * np.clip(down * 0.8, 0, 1)) ** 0.7
        points = roots + outward * bulge - np.array([0, 0, length]) * down
        return points.transpose(1, 0, 2).reshape(-1, 3)

    def bun(self, rest: np.ndarray, volume: float) -> np.ndarray:
        """(N, 3): a ball on the crown."""
        radius = 0.026 + 0.014 * volume
        theta = np.linspace(0, np.pi, BUN_SHAPE[0])[:, None]
        phi = np.linspace(0, 2 * np.pi, BUN_SHAPE[1])[None]
        ball = np.stack([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta) + 0 * phi], -1)
        top = rest[self.skin][rest[self.skin, 2].argmax()]
        return (top * [0, 1, 1] + np.array([0, 0.02, 0.6 * radius]) + radius * ball).reshape(-1, 3)


def dress(
    rest: np.ndarray, normals: np.ndarray, person: Person, anatomy: Anatomy, mesh: HairMesh
) -> tuple[np.ndarray, np.ndarray]:
    """The shape (V, 3) with its scalp raised, and the vertices (N, 3) of curtain and bun."""
    cut = CUTS[person.hair_style]
    depth = hair_depth(anatomy.canonical, person)
    thickness = cut.thickness * (0.6 + 0.8 * person.hair_volume)
    waves = np.random.default_rng(person.detail_seed).normal(size=len(rest)) * cut.rough
    height = (thickness + waves) * np.clip(depth / 0.02, 0, 1) * (1 - anatomy.ears)
    height[np.setdiff1d(np.arange(len(rest)), mesh.skin)] = 0
    raised = rest + height[:, None] * normals
    if cut.length is not None:
        raised[:, 0] += tuck_ears(rest[:, 0], anatomy.ears)
    hidden = np.tile(rest[mesh.skin].mean(0), (mesh.num_vertices, 1))
    if cut.length is not None:
        hidden[: mesh.num_curtain] = mesh.curtain(rest, cut.length + 0.055, person.hair_volume, thickness)
    if cut.bun:
        hidden[mesh.num_curtain :] = mesh.bun(rest, person.hair_volume)
    return raised.astype(np.float32), hidden.astype(np.float32)


def tuck_ears(x: np.ndarray, ears: np.ndarray) -> np.ndarray:
    """How far the ears (V,) move inwards so that hair can hang over them."""
    beyond = np.abs(x) - np.abs(x[ears > 0.9]).min()
    return -np.sign(x) * 0.75 * ears * beyond.clip(0)


def find_roots(anatomy: Anatomy) -> np.ndarray:
    """Scalp vertices just above the ears, from before the right ear round the back to the left."""
    x, y, z = anatomy.canonical.T
    skin = np.unique(anatomy.triangles[anatomy.parts == PARTS.index("skin")])
    band = skin[(np.abs(z[skin] - 0.055) < 0.012) & (y[skin] > 0) & (anatomy.ears[skin] < 0.1)]
    angle = np.arctan2(x[band], y[band] - 0.09)  # 0 at the back
    wanted = np.linspace(-0.76 * np.pi, 0.76 * np.pi, NUM_AROUND)
    return np.array([band[np.abs(angle - value).argmin()] for value in wanted])


def smooth(points: np.ndarray, passes: int = 4) -> np.ndarray:
    """Average neighbours along the first axis; ends stay."""
    for _ in range(passes):
        points = np.concatenate([points[:1], (points[:-2] + 2 * points[1:-1] + points[2:]) / 4, points[-1:]])
    return points


def grid(rows: int, columns: int) -> np.ndarray:
    """Triangles of a rows x columns sheet."""
    first = (np.arange(rows - 1)[:, None] * columns + np.arange(columns - 1)).ravel()
    quads = [[first, first + columns, first + columns + 1], [first, first + columns + 1, first + 1]]
    return np.concatenate([np.stack(corners, 1) for corners in quads])


def grid_coordinates(rows: int, columns: int) -> np.ndarray:
    row, column = np.meshgrid(np.linspace(-1, 1, rows), np.linspace(1, -1, columns), indexing="ij")
    return np.stack([row, column], -1).reshape(-1, 2)
