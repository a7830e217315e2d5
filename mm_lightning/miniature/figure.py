"""A person as a mesh that moves: the drawn vertices, their texture coordinates, and where they go in each frame.

Letters: V vertices of the shape, D drawn vertices (one per vertex and kind of surface), T triangles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from mm_lightning.miniature.anatomy import PARTS, Anatomy
from mm_lightning.miniature.hair import HairMesh, dress
from mm_lightning.miniature.motion import COLUMN
from mm_lightning.miniature.people import Person
from mm_lightning.miniature.skin import EYE_PATCHES, HAIR_PATCH, PATCH_RADIUS, PATCHES, azimuthal, torso_coordinates

GAZE = (26.0, 18.0)  # degrees sideways and up or down at full action
CANONICAL_EYES_TO_CHIN = 0.121  # metres
PIVOT_BELOW_EYES, PIVOT_BEHIND_EYES = 0.085, 0.10  # metres, where the canonical head turns on the neck


@dataclass(frozen=True)
class Landmarks:
    """Vertices of the shape that stand for points of the face; L and R are the person's own sides."""

    canthi: np.ndarray  # (2, 2): for R then L eye, its outer and inner corner
    nose: int
    mouth: np.ndarray  # (2,): corners, R then L
    chin: int
    face: np.ndarray  # (K,) what a face detector's box goes round

    def of(self, vertices: np.ndarray) -> np.ndarray:
        """The five points (5, 3), those of the person's right side first: they are on the viewer's left."""
        return np.concatenate([vertices[self.canthi].mean(1), vertices[[self.nose, *self.mouth]]])


class Sculptor:
    """Turns people into figures; all that does not depend on the person is prepared once."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.hair = HairMesh(anatomy)
        self.landmarks = find_landmarks(anatomy)
        self.num_shape = len(anatomy.template)
        shape_triangles = np.concatenate([anatomy.triangles, self.hair.triangles + self.num_shape])
        parts = np.append(anatomy.parts, np.full(len(self.hair.triangles), len(PARTS), np.int8))
        self.drawn, self.triangles, drawn_parts = split_parts(shape_triangles, parts)
        self.texture_coordinates = self._texture_coordinates(drawn_parts)
        self.shape_triangles = shape_triangles
        self.normal_sum = incidence(shape_triangles, self.num_shape + self.hair.num_vertices)
        self.eyes = [self._eye(side) for side in (-1, 1)]
        fields = anatomy.action_fields.copy()
        fields[:, np.concatenate(self.eyes)] = 0
        self.moving = np.flatnonzero(np.abs(fields).max((0, 2)) > 1e-6)
        self.fields = fields[:, self.moving].reshape(len(fields), -1)

    def _eye(self, side: int) -> np.ndarray:
        vertices = np.unique(self.anatomy.triangles[self.anatomy.parts == PARTS.index("eye")])
        return vertices[self.anatomy.canonical[vertices, 0] * side > 0]

    def _texture_coordinates(self, drawn_parts: np.ndarray) -> np.ndarray:
        """(D, 2): skin by direction from the head's middle; eyes and torso seen from the front; the rest plain."""
        positions = np.concatenate([self.anatomy.canonical, np.zeros((self.hair.num_vertices, 3), np.float32)])
        coordinates = azimuthal(positions[self.drawn])
        is_torso = drawn_parts == PARTS.index("torso")
        coordinates[is_torso] = torso_coordinates(positions[self.drawn[is_torso]])
        for part, patch in PATCHES.items():
            coordinates[drawn_parts == PARTS.index(part)] = patch
        for side, patch in zip((-1, 1), EYE_PATCHES, strict=True):
            of_eye = (drawn_parts == PARTS.index("eye")) & (positions[self.drawn, 0] * side > 0)
            points = positions[self.drawn[of_eye]]
            radius = np.ptp(points[:, 0]) / 2
            centre = (points.max(0) + points.min(0)) / 2
            coordinates[of_eye] = patch + PATCH_RADIUS * ((points - centre) / radius)[:, [0, 2]]
        is_hair = drawn_parts == len(PARTS)
        coordinates[is_hair] = HAIR_PATCH + PATCH_RADIUS * self.hair.coordinates[self.drawn[is_hair] - self.num_shape]
        return coordinates

    def __call__(self, person: Person) -> Figure:
        rest = self.anatomy.shape(person.phenotypes, person.local_changes)
        bald = rest.copy()
        rest, strands = dress(rest, self.vertex_normals(rest), person, self.anatomy, self.hair)
        return Figure(self, bald, np.concatenate([rest, strands]))

    def vertex_normals(self, vertices: np.ndarray) -> np.ndarray:
        """Unit normals (N, 3) of the shape's, or of all, vertices."""
        triangles = self.shape_triangles if len(vertices) > self.num_shape else self.anatomy.triangles
        a, b, c = (vertices[triangles[:, corner]] for corner in range(3))
        normals = self.normal_sum[: len(vertices), : len(triangles)] @ np.cross(b - a, c - a)
        return normals / np.linalg.norm(normals, axis=1, keepdims=True).clip(1e-12)


class Figure:
    """One person's mesh; `posed` puts it into a frame.

    Attributes:
        eye_level, depth: z and y of the eyes at rest, in metres.
        eyes_to_chin: as far as the chin of an average face of this size is below the eyes.
    """

    def __init__(self, sculptor: Sculptor, bald: np.ndarray, rest: np.ndarray) -> None:
        self.sculptor = sculptor
        self.rest = rest
        points = sculptor.landmarks
        middle = bald[points.canthi].mean((0, 1))
        self.eye_level, self.depth = float(middle[2]), float(middle[1])
        scale = self._size(bald) / self._size(sculptor.anatomy.canonical)
        self.eyes_to_chin = CANONICAL_EYES_TO_CHIN * scale
        self.pivot = np.array([0, self.depth + scale * PIVOT_BEHIND_EYES, self.eye_level - scale * PIVOT_BELOW_EYES])
        self.eye_centres = [(bald[eye].max(0) + bald[eye].min(0)) / 2 for eye in sculptor.eyes]
        head_weight = sculptor.anatomy.head_weight
        self.head_weight = np.append(head_weight, np.ones(len(rest) - len(head_weight), np.float32))[:, None]

    def _size(self, vertices: np.ndarray) -> float:
        """Mean of how far the chin is from the eyes and of how far they are apart, in comparable units."""
        points = self.sculptor.landmarks
        eyes = vertices[points.canthi].mean(1)
        return float(eyes[:, 2].mean() - vertices[points.chin, 2] + 1.9 * (eyes[1, 0] - eyes[0, 0])) / 2

    def posed(self, actions: np.ndarray, head: np.ndarray) -> np.ndarray:
        """Vertices (V, 3) with facial actions (52,) and the head's yaw, pitch, roll in degrees."""
        vertices = self.rest.copy()
        vertices[self.sculptor.moving] += (actions @ self.sculptor.fields).reshape(-1, 3)
        for side, eye, centre in zip(("Right", "Left"), self.sculptor.eyes, self.eye_centres, strict=True):
            vertices[eye] = (vertices[eye] - centre) @ gaze_rotation(actions, side).T + centre
        turned = (vertices - self.pivot) @ rotation(*head).T + self.pivot
        return vertices + self.head_weight * (turned - vertices)


def rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """(3, 3) for degrees as in `motion.Performance`; the face looks along -y, its left is +x, up is +z."""
    y, p, r = np.deg2rad([yaw, pitch, roll])
    turn = np.array([[np.cos(y), -np.sin(y), 0], [np.sin(y), np.cos(y), 0], [0, 0, 1]])
    nod = np.array([[1, 0, 0], [0, np.cos(p), np.sin(p)], [0, -np.sin(p), np.cos(p)]])
    tilt = np.array([[np.cos(r), 0, np.sin(r)], [0, 1, 0], [-np.sin(r), 0, np.cos(r)]])
    return (tilt @ turn @ nod).astype(np.float32)


def gaze_rotation(actions: np.ndarray, side: str) -> np.ndarray:
    """(3, 3) rotation of one eyeball."""
    look = {name: actions[COLUMN[f"eyeLook{name}{side}"]] for name in ("In", "Out", "Up", "Down")}
    to_left = look["Out"] - look["In"] if side == "Left" else look["In"] - look["Out"]
    return rotation(GAZE[0] * to_left, GAZE[1] * (look["Up"] - look["Down"]), 0)


def split_parts(triangles: np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A drawn vertex for every pair of vertex and part: (D,) its vertex, (T, 3) triangles of them, (D,) its part."""
    pairs = triangles.astype(np.int64) * (len(PARTS) + 1) + parts[:, None]
    drawn, index = np.unique(pairs, return_inverse=True)
    return drawn // (len(PARTS) + 1), index.reshape(-1, 3), drawn % (len(PARTS) + 1)


def incidence(triangles: np.ndarray, num_vertices: int) -> csr_matrix:
    """(V, T), one where a triangle has the vertex."""
    columns = np.repeat(np.arange(len(triangles)), 3)
    return csr_matrix((np.ones(len(columns), np.float32), (triangles.ravel(), columns)), (num_vertices, len(triangles)))


def find_landmarks(anatomy: Anatomy) -> Landmarks:
    """The points of the face, found on the average adult."""
    x, y, z = anatomy.canonical.T
    skin, socket = _vertices(anatomy, "skin"), _vertices(anatomy, "socket")
    lids = np.intersect1d(skin, socket)
    middle = skin[np.abs(x[skin]) < 0.002]
    nose = middle[y[middle].argmin()]
    low = middle[(z[middle] < -0.10) & (z[middle] > -0.13)]
    chin = low[(y[low] + z[low]).argmin()]
    eyes = [lids[x[lids] < 0], lids[x[lids] > 0]]
    canthi = np.array([_extremes(x, eyes[0]), _extremes(x, eyes[1])[::-1]])
    front = skin[(z[skin] < 0.035) & (z[skin] >= z[chin] - 0.004) & (y[skin] < 0.07) & (anatomy.ears[skin] < 0.3)]
    lips = skin[anatomy.lips[skin] > 0.5]
    corner = lips[x[lips].argmax()]
    mirrored = lips[np.linalg.norm(anatomy.canonical[lips] * [-1, 1, 1] - anatomy.canonical[corner], axis=1).argmin()]
    return Landmarks(canthi, int(nose), np.array([mirrored, corner]), int(chin), front)


def _vertices(anatomy: Anatomy, part: str) -> np.ndarray:
    return np.unique(anatomy.triangles[anatomy.parts == PARTS.index(part)])


def _extremes(x: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    """The vertices of smallest and largest x."""
    return np.array([vertices[x[vertices].argmin()], vertices[x[vertices].argmax()]])
