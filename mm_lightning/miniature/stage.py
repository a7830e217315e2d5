"""The studio: one VTK window, one mesh, three lamps, a wall, a camera that looks along +y."""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np

from mm_lightning.miniature.motion import LIGHTS
from mm_lightning.miniature.people import RGB

DISTANCE = 4.5  # of the camera from the eyes, in frame heights
NEAR, FAR = 0.5, 0.7  # metres of depth that the camera sees before and behind the eyes


class Lamp(NamedTuple):
    """Far away; it shines from `place` towards the head."""

    place: tuple[float, float, float]
    colour: RGB
    intensity: float


WHITE, WARM, COOL = (1.0, 1.0, 1.0), (1.0, 0.90, 0.77), (0.84, 0.93, 1.0)
LAMPS: dict[str, tuple[Lamp, Lamp, Lamp]] = {
    "frontal": (Lamp((0, -1, 0.35), WHITE, 0.62), Lamp((-1, -1, 0.1), WHITE, 0.18), Lamp((1, -1, 0.1), WHITE, 0.18)),
    "left": (Lamp((-1, -0.9, 0.3), WHITE, 0.60), Lamp((1, -1, 0.1), WHITE, 0.16), Lamp((0, -1, 0.2), WHITE, 0.38)),
    "right": (Lamp((1, -0.9, 0.3), WHITE, 0.60), Lamp((-1, -1, 0.1), WHITE, 0.16), Lamp((0, -1, 0.2), WHITE, 0.38)),
    "warm": (Lamp((-0.3, -1, 0.35), WARM, 0.66), Lamp((1, -1, 0.1), WARM, 0.24), Lamp((-1, -1, 0.0), WARM, 0.14)),
    "cool": (Lamp((0.3, -1, 0.35), COOL, 0.66), Lamp((-1, -1, 0.1), COOL, 0.24), Lamp((1, -1, 0.0), COOL, 0.14)),
}
AMBIENT = 0.32
WALLS: dict[str, RGB] = {
    "grey": (0.52, 0.52, 0.53),
    "white": (0.93, 0.93, 0.92),
    "blue": (0.30, 0.44, 0.70),
    "green": (0.33, 0.55, 0.36),
    "red": (0.68, 0.32, 0.25),
    "yellow": (0.86, 0.74, 0.36),
}
TINTS: dict[str, RGB] = {"warm": (1, 0.93, 0.83), "cool": (0.86, 0.94, 1)}


class Lens(NamedTuple):
    """A pinhole that looks along +y, up being +z; metres."""

    x: float  # of the optical axis
    z: float
    depth: float  # y of the plane in which the frame is `height` high
    height: float

    @property
    def distance(self) -> float:
        return DISTANCE * self.height

    def project(self, points: np.ndarray) -> np.ndarray:
        """Points (..., 3) -> (..., 2) across and down in the frame, 0 and 1 at its edges."""
        scale = self.distance / (self.distance + points[..., 1] - self.depth) / self.height
        return np.stack([0.5 + (points[..., 0] - self.x) * scale, 0.5 - (points[..., 2] - self.z) * scale], -1)


class Picture(NamedTuple):
    pixels: np.ndarray  # (S, S, 3) uint8
    distance: np.ndarray  # (S, S) metres from the camera's plane; FAR behind the eyes at the wall


class Stage:
    """A square window with one textured mesh whose topology never changes.

    Args:
        side: S, the window's side in pixels.
        triangles: (T, 3).
        texture_coordinates: (D, 2).
    """

    def __init__(self, side: int, triangles: np.ndarray, texture_coordinates: np.ndarray) -> None:
        # VTK's software OpenGL draws so small a window faster without threads of its own.
        os.environ.setdefault("LP_NUM_THREADS", "0")
        import pyvista

        self.pyvista, self.side = pyvista, side
        points = np.zeros((len(texture_coordinates), 3), np.float32)
        self.mesh = pyvista.PolyData.from_regular_faces(points, triangles)
        self.mesh.active_texture_coordinates = texture_coordinates.astype(np.float32)
        self.mesh.point_data.active_normals = np.tile(np.float32([0, -1, 0]), (len(points), 1))
        self.plotter = pyvista.Plotter(off_screen=True, window_size=(side, side), lighting="none")
        self.plotter.render_window.SetMultiSamples(0)  # the picture is reduced afterwards
        self.texture = pyvista.Texture(np.zeros((8, 8, 3), np.uint8))
        self.actor = self.plotter.add_mesh(
            self.mesh, texture=self.texture, smooth_shading=False, ambient=AMBIENT, diffuse=0.86, specular=0.06,
            specular_power=12, reset_camera=False,
        )  # fmt: skip
        self.actor.prop.interpolation = "Phong"
        self.lamps = [pyvista.Light(light_type="scene light") for _ in range(3)]
        for lamp in self.lamps:
            lamp.positional = False
            self.plotter.add_light(lamp)
        self.plotter.show(auto_close=False, interactive=False)
        self.light = LIGHTS[0]
        self._make_buffers()

    def _make_buffers(self) -> None:
        """What VTK copies each picture into; the views of them never move."""
        from vtkmodules.util.numpy_support import vtk_to_numpy
        from vtkmodules.vtkCommonCore import vtkFloatArray, vtkUnsignedCharArray

        self.pixels, self.depths = vtkUnsignedCharArray(), vtkFloatArray()
        self.pixels.SetNumberOfComponents(3)
        self.pixels.SetNumberOfTuples(self.side**2)
        self.depths.SetNumberOfTuples(self.side**2)
        self.pixel_view = vtk_to_numpy(self.pixels).reshape(self.side, self.side, 3)
        self.depth_view = vtk_to_numpy(self.depths).reshape(self.side, self.side)

    def set_texture(self, pixels: np.ndarray) -> None:
        """(S, S, 3) uint8, first row on top."""
        self.actor.texture = self.pyvista.Texture(pixels)
        self.actor.texture.interpolate = True

    def set_light(self, name: str) -> None:
        self.light = name
        for lamp, wanted in zip(self.lamps, LAMPS[name], strict=True):
            lamp.position, lamp.focal_point = wanted.place, (0, 0, 0)
            lamp.diffuse_color, lamp.intensity = wanted.colour, wanted.intensity

    def set_background(self, name: str) -> None:
        """A wall that is a little lighter above, in the colour of the light."""
        wall = np.array(WALLS[name]) * TINTS.get(self.light, (1, 1, 1))
        self.plotter.set_background(tuple((wall * 0.88).clip(0, 1)), top=tuple((wall * 1.06).clip(0, 1)))

    def set_shape(self, vertices: np.ndarray, normals: np.ndarray) -> None:
        """Drawn vertices and their normals, (D, 3) each."""
        self.mesh.points = np.ascontiguousarray(vertices, np.float32)
        self.mesh.point_data.active_normals = np.ascontiguousarray(normals, np.float32)

    def draw(self, lens: Lens) -> Picture:
        camera = self.plotter.camera
        camera.position = (lens.x, lens.depth - lens.distance, lens.z)
        camera.focal_point, camera.up = (lens.x, lens.depth, lens.z), (0, 0, 1)
        camera.view_angle = np.rad2deg(2 * np.arctan(0.5 / DISTANCE))
        near, far = lens.distance - NEAR, lens.distance + FAR
        camera.clipping_range = (near, far)
        window = self.plotter.render_window
        window.Render()
        window.GetPixelData(0, 0, self.side - 1, self.side - 1, 0, self.pixels, 0)
        window.GetZbufferData(0, 0, self.side - 1, self.side - 1, self.depths)
        depths = self.depth_view[::-1]
        return Picture(self.pixel_view[::-1], near * far / (far - depths * (far - near)))
