"""A person's texture: skin, lips, brows, lids, beard, freckles, wrinkles, scalp; eyes and shirt are in the corners.

The head is unrolled by direction from its middle: the face's front in the centre of the square, the back of the head
on the inscribed circle. What is painted is a function of canonical positions (metres from the point between the eyes of
the average adult, x to the person's left, y backwards, z up), so it moves with the features of each face.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.interpolate import LinearNDInterpolator
from scipy.ndimage import gaussian_filter

from mm_lightning.miniature.anatomy import PARTS, Anatomy
from mm_lightning.miniature.hair import hair_depth
from mm_lightning.miniature.people import RGB, Person

SIZE = 448
MIDDLE = np.array([0.0, 0.09, -0.03])
# The corners outside the circle hold small pictures; texture coordinates, (0, 0) at the lower left.
PATCH_RADIUS = 0.05
EYE_PATCHES = np.array([[0.06, 0.94], [0.94, 0.94]])  # right eye, left eye
HAIR_PATCH = np.array([0.06, 0.06])
TORSO_PATCH = np.array([0.94, 0.06])
PATCHES = {"mouth": (0.14, 0.02), "tongue": (0.18, 0.02), "teeth": (0.14, 0.06), "socket": (0.86, 0.02)}
SWATCHES = {"mouth": (0.16, 0.05, 0.05), "tongue": (0.62, 0.30, 0.30), "teeth": (0.93, 0.91, 0.86)}
TORSO_MIDDLE, TORSO_SIZE = -0.24, np.array([0.12, 0.08])  # metres
NECKLINE = -0.212
IRIS_RADIUS, PUPIL_RADIUS = 0.50, 0.22  # of the eyeball's


class Canvas(NamedTuple):
    """What lies at each texel of the head, S x S; positions are NaN outside the circle's content."""

    position: np.ndarray  # (S, S, 3)
    lips: np.ndarray  # (S, S) in [0, 1]
    lids: np.ndarray  # (S, S) metres to the edge of the lids
    upper: np.ndarray  # (S, S) bool, above the eye's own middle


def azimuthal(positions: np.ndarray) -> np.ndarray:
    """Canonical positions (N, 3) -> texture coordinates (N, 2) in [0, 1]."""
    offset = positions - MIDDLE
    angle = np.arccos((-offset[:, 1] / np.linalg.norm(offset, axis=1).clip(1e-9)).clip(-1, 1))
    across = offset[:, [0, 2]]
    return 0.5 + 0.5 * (angle / np.pi)[:, None] * across / np.linalg.norm(across, axis=1, keepdims=True).clip(1e-9)


def texel_coordinates(size: int) -> np.ndarray:
    """(S, S, 2) texture coordinates of a picture whose first row is at the top."""
    steps = (np.arange(size) + 0.5) / size
    return np.stack(np.meshgrid(steps, 1 - steps), -1)


class Painter:
    """Paints textures (S, S, 3) uint8; what is the same for everybody is prepared once."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.canvas = stretch_canvas(anatomy)
        self.x, self.y, self.z = np.moveaxis(self.canvas.position, -1, 0)
        self.across = np.abs(self.x)

    def __call__(self, person: Person) -> np.ndarray:
        """Deterministic for a person."""
        rng = np.random.default_rng(person.detail_seed)
        colours = np.broadcast_to(np.array(person.skin), (SIZE, SIZE, 3)) * self.complexion(person, rng)[..., None]
        blush = np.array(person.skin) * [1.0, 0.62, 0.58]
        colours = blend(colours, blush, 0.35 * self.redness())
        colours = blend(colours, np.array(person.skin) * [0.55, 0.42, 0.36], self.spots(person, rng))
        colours = blend(colours, np.array(person.skin) * 0.55, self.creases(person))
        colours = blend(colours, person.lips, smooth_edge(self.canvas.lips - 0.4, 0.2))
        colours = blend(colours, np.array(person.hair) * 0.8, self.beard(person, rng))
        colours = blend(colours, person.brows, self.brows(person, rng))
        colours = blend(colours, np.array([0.07, 0.05, 0.05]), self.lashes(person))
        colours = blend(colours, self.strands(person, rng), self.scalp(person, rng))
        return self.fill_corners(np.nan_to_num(colours), person, rng)

    def complexion(self, person: Person, rng: np.random.Generator) -> np.ndarray:
        """Blotches of the skin, about 1."""
        noise = gaussian_filter(rng.normal(size=(SIZE, SIZE)), 5)
        return 1 + (0.02 + 0.03 * person.wrinkles) * noise / noise.std()

    def redness(self) -> np.ndarray:
        cheeks = bump(self.across - 0.042, 0.018) * bump(self.z + 0.042, 0.018)
        nose = bump(self.across, 0.012) * bump(self.z + 0.038, 0.012)
        return cheeks + nose

    def spots(self, person: Person, rng: np.random.Generator) -> np.ndarray:
        """Freckles over nose and cheeks, two moles, and age spots."""
        seeds = (rng.random((SIZE, SIZE)) < 0.02) * rng.uniform(0.4, 1, (SIZE, SIZE))
        freckles = gaussian_filter(seeds, 0.9) * 5 * bump(self.z + 0.035, 0.025) * bump(self.across, 0.05)
        mask = person.freckles * freckles
        for _ in range(2):
            place = rng.uniform((-0.055, -0.10), (0.055, 0.05))
            mask = mask + 0.9 * (np.hypot(self.x - place[0], self.z - place[1]) < rng.uniform(0.0, 0.0028))
        return mask.clip(0, 0.9)

    def creases(self, person: Person) -> np.ndarray:
        """Lines of age: across the forehead, from nose to mouth, beside and under the eyes."""
        if not person.wrinkles:
            return np.zeros((SIZE, SIZE))
        forehead = sum(bump(self.z - height - 1.5 * self.x**2, 0.0012) for height in (0.040, 0.049, 0.058))
        forehead = forehead * smooth_edge(0.042 - self.across, 0.008)
        fold_x = 0.019 + 0.45 * (-0.038 - self.z)
        folds = bump(self.across - fold_x, 0.0018) * smooth_edge(-0.038 - self.z, 0.004)
        folds = folds * smooth_edge(self.z + 0.082, 0.004)
        feet = sum(bump(self.z - slope * (self.across - 0.05), 0.001) for slope in (-0.7, 0.0, 0.7))
        feet = feet * smooth_edge(self.across - 0.052, 0.002) * smooth_edge(0.066 - self.across, 0.003)
        bags = bump(self.z + 0.017 - 14 * (self.across - 0.031) ** 2, 0.0015) * bump(self.across - 0.031, 0.012)
        return person.wrinkles * (0.5 * forehead + 0.7 * folds + 0.5 * feet + 0.6 * bags).clip(0, 0.9)

    def beard(self, person: Person, rng: np.random.Generator) -> np.ndarray:
        lip = bump(self.z + 0.061, 0.0065) * smooth_edge(0.034 - self.across, 0.004)
        jaw_line = np.interp(self.across, [0, 0.02, 0.03, 0.045, 0.07], [-0.090, -0.086, -0.06, -0.055, -0.02])
        jaw = smooth_edge(jaw_line - self.z, 0.006) * smooth_edge(self.z + 0.165, 0.02)
        jaw = jaw * smooth_edge(0.075 - self.y, 0.01)
        around = np.maximum(lip, jaw * (1 - self.canvas.lips))
        grain = 0.75 + 0.25 * rng.normal(size=(SIZE, SIZE)).clip(-1, 1)
        masks = {"none": 0 * lip, "stubble": 0.30 * around, "moustache": 0.9 * lip, "beard": 0.9 * around}
        return masks[person.beard] * grain * (1 - smooth_edge(self.canvas.lips - 0.4, 0.2))

    def brows(self, person: Person, rng: np.random.Generator) -> np.ndarray:
        """Two arches, thick towards the nose, thin at the end."""
        along = (self.across - 0.012) / 0.040
        arch = 0.006 * person.brow_arch * np.sin(0.85 * np.pi * along.clip(0, 1))
        middle = 0.0205 + person.brow_height + arch - 0.002 * along
        width = 0.0042 * person.brow_thickness * (1 - 0.65 * along.clip(0, 1) ** 2)
        mask = smooth_edge(width - np.abs(self.z - middle), 0.0016)
        mask = mask * smooth_edge(along, 0.06) * smooth_edge(1 - along, 0.06) * smooth_edge(0.06 - self.y, 0.01)
        return 0.92 * mask * (0.85 + 0.15 * rng.normal(size=mask.shape).clip(-1, 1))

    def lashes(self, person: Person) -> np.ndarray:
        """The lids' edges; the upper one is darker."""
        width = np.where(self.canvas.upper, 0.0022, 0.0010) * (1.25 if person.phenotypes["gender"] > 0.5 else 1)
        return np.where(self.canvas.upper, 0.9, 0.45) * smooth_edge(width - self.canvas.lids, 0.0008)

    def scalp(self, person: Person, rng: np.random.Generator) -> np.ndarray:
        ragged = gaussian_filter(rng.normal(size=(SIZE, SIZE)), 2)
        depth = hair_depth(self.canvas.position, person) + 0.003 * ragged / ragged.std()
        return smooth_edge(depth, 0.004) * (0.75 if person.hair_style == "buzzed" else 1)

    def strands(self, person: Person, rng: np.random.Generator) -> np.ndarray:
        """Hair colour with lighter and darker strands, (S, S, 3)."""
        noise = gaussian_filter(rng.normal(size=(SIZE, SIZE)), (7, 1.2))
        return np.array(person.hair) * (1 + 0.18 * noise / noise.std())[..., None]

    def fill_corners(self, colours: np.ndarray, person: Person, rng: np.random.Generator) -> np.ndarray:
        for name, centre in PATCHES.items():
            swatch = SWATCHES.get(name, tuple(0.55 * value for value in person.skin))
            paste(colours, np.array(centre), 0.018, lambda offset, swatch=swatch: np.array(swatch))
        for centre in EYE_PATCHES:
            paste(colours, centre, PATCH_RADIUS + 0.008, lambda offset: eye_picture(offset / PATCH_RADIUS, person.iris))
        paste(colours, TORSO_PATCH, PATCH_RADIUS + 0.008, lambda offset: torso_picture(offset / PATCH_RADIUS, person))
        hair = self.strands(person, rng)[: SIZE // 2, : SIZE // 2]
        paste(colours, HAIR_PATCH, PATCH_RADIUS + 0.008, lambda offset: hair[: offset.shape[0], : offset.shape[1]])
        return (colours.clip(0, 1) * 255).round().astype(np.uint8)


def torso_coordinates(positions: np.ndarray) -> np.ndarray:
    """Canonical positions (N, 3) of neck and shoulders -> texture coordinates (N, 2), seen from the front."""
    offset = (positions[:, [0, 2]] - [0, TORSO_MIDDLE]) / TORSO_SIZE
    return TORSO_PATCH + PATCH_RADIUS * offset.clip(-1, 1)


def torso_picture(offset: np.ndarray, person: Person) -> np.ndarray:
    """Neck above, shirt below a round neckline; offset (..., 2) as `torso_coordinates` scales it."""
    x, z = offset[..., 0] * TORSO_SIZE[0], offset[..., 1] * TORSO_SIZE[1] + TORSO_MIDDLE
    skin = np.ones((*x.shape, 1)) * np.array(person.skin)
    return blend(skin, person.shirt, smooth_edge(NECKLINE + 6 * x**2 - z, 0.004))


def eye_picture(offset: np.ndarray, iris: RGB) -> np.ndarray:
    """White, iris with a dark rim, pupil; offset (..., 2) from the middle, in eyeball radii."""
    radius = np.hypot(offset[..., 0], offset[..., 1])
    white = np.array([0.93, 0.92, 0.90]) * np.ones((*radius.shape, 1))
    rim = np.array(iris) * 0.45
    colours = blend(white, rim, smooth_edge(IRIS_RADIUS - radius, 0.03))
    colours = blend(colours, np.array(iris) * 1.15, smooth_edge(IRIS_RADIUS - 0.08 - radius, 0.05))
    return blend(colours, np.array([0.02, 0.02, 0.02]), smooth_edge(PUPIL_RADIUS - radius, 0.03))


def paste(colours: np.ndarray, centre: np.ndarray, radius: float, picture: Callable[[np.ndarray], np.ndarray]) -> None:
    """Draw `picture(offset)` into the square round `centre`; offset (h, w, 2) in texture coordinates."""
    offset = texel_coordinates(len(colours)) - centre
    rows, columns = np.nonzero((np.abs(offset) < radius).all(-1))
    part = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
    colours[part] = picture(offset[part])


def blend(below: np.ndarray, above: np.ndarray | RGB, mask: np.ndarray) -> np.ndarray:
    mask = np.nan_to_num(mask)[..., None]
    return below + mask * (np.asarray(above) - below)


def smooth_edge(distance: np.ndarray, width: float) -> np.ndarray:
    """1 where distance is well positive, 0 where well negative, over about `width`."""
    return (0.5 + distance / (2 * width)).clip(0, 1)


def bump(x: np.ndarray, width: float) -> np.ndarray:
    return np.exp(-((x / width) ** 2))


def stretch_canvas(anatomy: Anatomy) -> Canvas:
    """Interpolate what is known at the skin's vertices to all texels."""
    skin = np.unique(anatomy.triangles[anatomy.parts == PARTS.index("skin")])
    lids = np.intersect1d(skin, anatomy.triangles[anatomy.parts == PARTS.index("socket")])
    points = anatomy.canonical[skin]
    distance = np.linalg.norm(points[:, None] - anatomy.canonical[lids][None], axis=-1).min(1)
    values = np.column_stack([points, anatomy.lips[skin], distance])
    filled = LinearNDInterpolator(azimuthal(points), values)(texel_coordinates(SIZE))
    position, upper = filled[..., :3], filled[..., 2] > anatomy.canonical[lids, 2].mean()
    return Canvas(position, filled[..., 3], filled[..., 4], upper)
