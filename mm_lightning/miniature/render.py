"""Pictures of people with their ground truth: anny's mesh, drawn off-screen by VTK.

Letters: F frames, H W pixels, V vertices of the drawn mesh, T triangles.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mm_lightning.miniature.anatomy import load_anatomy
from mm_lightning.miniature.figure import Figure, Sculptor
from mm_lightning.miniature.motion import Performance
from mm_lightning.miniature.people import Person
from mm_lightning.miniature.skin import Painter
from mm_lightning.miniature.stage import Lens, Stage

SUPERSAMPLING = 3
EYE_LINE = 0.47  # of the frame's height, from above
EYES_TO_CHIN = 0.395  # of the frame's height
TOLERANCE = 0.015  # metres; a point between the corners of an eye lies behind the eyeball's front


class Rendered(NamedTuple):
    """Coordinates are pixels, (0, 0) the centre of the first one."""

    frames: np.ndarray  # (F, H, W, 3) uint8 RGB
    boxes: np.ndarray  # (F, 4) float32, x0 y0 x1 y1 of the face from chin to brows, ear to ear
    landmarks: np.ndarray  # (F, 5, 2) float32, RetinaFace order, the viewer's left first
    visible: np.ndarray  # (F, 5) bool


class Renderer:
    """Draws people; one window and one mesh serve for everybody, since all have the same topology.

    Args:
        size: H and W of the pictures.

    Raises:
        ModuleNotFoundError: anny or pyvista is not installed.
        ValueError: a size below 16.
    """

    def __init__(self, size: int = 64) -> None:
        if size < 16:
            raise ValueError(f"size must be 16 or more, got {size}")
        self.size = size
        anatomy = load_anatomy()
        self.sculptor, self.painter = Sculptor(anatomy), Painter(anatomy)
        self.stage = Stage(size * SUPERSAMPLING, self.sculptor.triangles, self.sculptor.texture_coordinates)
        self._person: Person | None = None
        self._figure: Figure | None = None

    def render(self, person: Person, performance: Performance) -> Rendered:
        """Draw every frame of `performance`; the same bytes for the same arguments on one machine."""
        figure = self._dress(person)
        self.stage.set_light(performance.light)
        self.stage.set_background(performance.background)
        rows = zip(performance.actions, performance.head, performance.camera, strict=True)
        frames = [self._frame(figure, *row) for row in rows]
        return Rendered(*(np.stack(part) for part in zip(*frames, strict=True)))

    def _dress(self, person: Person) -> Figure:
        """The person's mesh; the last one is kept, since stills and clips of a person follow each other."""
        if self._figure is None or self._person != person:
            self._figure, self._person = self.sculptor(person), person
            self.stage.set_texture(self.painter(person))
        return self._figure

    def _frame(self, figure: Figure, actions: np.ndarray, head: np.ndarray, camera: np.ndarray) -> Rendered:
        """One frame: `Rendered` without its first axis."""
        vertices, drawn = figure.posed(actions, head), self.sculptor.drawn
        lens = frame_figure(figure, camera)
        self.stage.set_shape(vertices[drawn], self.sculptor.vertex_normals(vertices)[drawn])
        picture = self.stage.draw(lens)
        landmarks = self.sculptor.landmarks.of(vertices)
        face = lens.project(vertices[self.sculptor.landmarks.face]) * self.size - 0.5
        points = lens.project(landmarks) * self.size - 0.5
        box = np.concatenate([face.min(0), face.max(0)]).astype(np.float32)
        visible = is_visible(points, landmarks[:, 1] - lens.depth + lens.distance, picture.distance)
        return Rendered(reduce_picture(picture.pixels, SUPERSAMPLING), box, points.astype(np.float32), visible)


def frame_figure(figure: Figure, camera: np.ndarray) -> Lens:
    """The lens that puts the eyes on EYE_LINE and the chin EYES_TO_CHIN below, then shifts and zooms."""
    height = figure.eyes_to_chin / EYES_TO_CHIN / (1 + camera[2])
    x, z = -camera[0] * height, figure.eye_level - (0.5 - EYE_LINE) * height + camera[1] * height
    return Lens(float(x), float(z), figure.depth, float(height))


def is_visible(points: np.ndarray, distances: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Which points (N, 2) in pixels, so far from the camera (N,), no nearer surface hides; False outside the frame.

    depth: (S, S) distance of what is drawn, S a multiple of the frame's side.
    """
    rows_columns = np.rint((points[:, ::-1] + 0.5) * SUPERSAMPLING - 0.5).astype(int)
    inside = ((rows_columns >= 0) & (rows_columns < len(depth))).all(1)
    rows, columns = rows_columns.clip(0, len(depth) - 1).T
    return inside & (distances < depth[rows, columns] + TOLERANCE)


def reduce_picture(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Average squares of `factor` pixels: (S, S, 3) uint8 -> (S / factor, S / factor, 3) uint8."""
    side = len(pixels) // factor
    means = pixels.reshape(side, factor, side, factor, 3).mean((1, 3), dtype=np.float32)
    return (means + 0.5).astype(np.uint8)
