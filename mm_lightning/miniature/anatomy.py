"""The head and shoulders of `anny`'s parametric body, cut out once and kept as plain arrays.

Source: anny 0.6 (Apache-2.0), its MakeHuman/MPFB2 mesh and Face Units targets are CC0. Coordinates are metres: x to the
person's left, y backwards, z up. A shape is linear in anny's blend shapes; so are the 52 facial actions.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mm_lightning.miniature.people import LOCAL_CHANGES

if TYPE_CHECKING:
    from anny import Anny

FORMAT = 4
PARTS = ("skin", "mouth", "eye", "tongue", "teeth", "socket", "torso")
PHENOTYPES = (
    "gender", "age", "muscle", "weight", "height", "proportions", "cupsize", "firmness", "african", "asian", "caucasian"
)  # fmt: skip
ADULT = {"gender": 0.5, "age": 0.66, "african": 1 / 3, "asian": 1 / 3, "caucasian": 1 / 3}
# What of the base mesh is kept: everything of the canonical adult above the upper arms.
LOWEST_Z, WIDEST_X = 0.62, 0.26
TORSO_Z = -0.165  # canonical height below which the skin is unrolled otherwise
TEETH = ("helper-upper-teeth", "helper-lower-teeth")
SEGMENTS = {
    "mouth": ["mouth_cavity"],
    "eye": ["eye_front.L", "eye_front.R", "eye_back.L", "eye_back.R"],
    "tongue": ["tongue"],
    "socket": ["eye_cavity.L", "eye_cavity.R"],
}


@dataclass(frozen=True)
class Anatomy:
    """V vertices, T triangles, K blend shapes.

    Attributes:
        template: (V, 3) float32, the mesh that blend shapes are added to.
        blendshapes: (K, V, 3) float32: phenotypes, then each local change's positive and negative shape, then actions.
        labels: (K,) names as anny has them, "local_change:nose-hump-incr" and so on.
        phenotype_mask, phenotype_projection: anny's description of how phenotypes weigh the first blend shapes.
        triangles: (T, 3) int32; parts: (T,) index into PARTS.
        head_weight: (V,) 1 where a vertex turns with the head, 0 where it stays with the shoulders.
        lips, ears: (V,) in [0, 1], anny's masks.
        canonical: (V, 3) float32, the average adult, relative to the point between the eyes.
    """

    template: np.ndarray
    blendshapes: np.ndarray
    labels: np.ndarray
    phenotype_mask: np.ndarray
    phenotype_projection: np.ndarray
    triangles: np.ndarray
    parts: np.ndarray
    head_weight: np.ndarray
    lips: np.ndarray
    ears: np.ndarray
    canonical: np.ndarray

    def shape(self, phenotypes: dict[str, float], local_changes: dict[str, float]) -> np.ndarray:
        """A person's face at rest (V, 3) float32, in metres."""
        weights = self.phenotype_weights(phenotypes)
        vertices = self.template + np.tensordot(weights, self.blendshapes[: len(weights)], 1)
        for name, value in local_changes.items():
            row = self.local_change_rows[name] + (value < 0)
            vertices = vertices + abs(value) * self.blendshapes[row]
        return vertices.astype(np.float32)

    def phenotype_weights(self, phenotypes: dict[str, float]) -> np.ndarray:
        import torch
        from anny.models.phenotype import make_phenotype_anchors, phenotype_blendshape_weights

        values = torch.tensor([[phenotypes.get(name, 0.5) for name in PHENOTYPES]], dtype=torch.float64)
        mask = torch.from_numpy(self.phenotype_mask)
        anchors = make_phenotype_anchors(torch.float64)
        weights = phenotype_blendshape_weights(values, list(PHENOTYPES), anchors, mask, extrapolate=False)
        return (weights.numpy() @ self.phenotype_projection)[0].astype(np.float32)

    @functools.cached_property
    def local_change_rows(self) -> dict[str, int]:
        """Name -> the row of its positive blend shape; the negative one follows."""
        changes = [(label, row) for row, label in enumerate(self.labels) if label.startswith("local_change:")]
        return {label.removeprefix("local_change:"): row for label, row in changes[::2]}

    @functools.cached_property
    def action_fields(self) -> np.ndarray:
        """(52, V, 3) float32, what each facial action adds when it is 1."""
        return self.blendshapes[[label.startswith("facial_action:") for label in self.labels]]


def load_anatomy() -> Anatomy:
    """anny's head and shoulders, from this package's cache; the first call of a machine takes about two minutes.

    Raises:
        ModuleNotFoundError: anny is not installed.
    """
    path = cache_file()
    if not path.exists():
        _save(extract_anatomy(), path)
    with np.load(path) as archive:
        return Anatomy(**{field.name: archive[field.name] for field in fields(Anatomy)})


def cache_file() -> Path:
    """Where the arrays are kept: one file per version of anny, under $XDG_CACHE_HOME or ~/.cache."""
    try:
        version = importlib.metadata.version("anny")
    except importlib.metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(
            "Rendering people needs anny and pyvista: `pip install magicmirror-lightning[miniature]`"
        ) from error
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "magicmirror-lightning" / f"anatomy-anny{version}-{FORMAT}.npz"


def _save(anatomy: Anatomy, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
        np.savez(file, **{field.name: getattr(anatomy, field.name) for field in fields(Anatomy)})
    os.replace(file.name, path)


def extract_anatomy() -> Anatomy:
    """Cut the head and shoulders out of anny's full body, with the teeth that its own head lacks."""
    model = _build_model()
    triangles, parts = _triangles(model)
    adult = _adult(model)
    centre = _eye_centre(adult, triangles[parts == PARTS.index("eye")])
    inside = (adult[:, 2] > LOWEST_Z) & (np.abs(adult[:, 0]) < WIDEST_X)
    keep = inside[triangles].all(1)
    kept, triangles = np.unique(triangles[keep], return_inverse=True)
    labels = np.array(model.blendshape_labels)
    rows = _needed_rows(labels)
    return Anatomy(
        template=model.template_vertices.numpy()[kept].astype(np.float32),
        blendshapes=model.blendshapes.numpy()[rows][:, kept].astype(np.float32),
        labels=labels[rows],
        phenotype_mask=model.stacked_phenotype_blend_shapes_mask.numpy(),
        phenotype_projection=model.phenotype_blendshape_projection.numpy(),
        triangles=triangles.reshape(-1, 3).astype(np.int32),
        parts=_with_torso(parts[keep], (adult - centre)[kept][triangles.reshape(-1, 3)]),
        head_weight=_head_weight(model)[kept],
        lips=_texture_mask(model, "lips")[kept],
        ears=_texture_mask(model, "ears")[kept],
        canonical=(adult[kept] - centre).astype(np.float32),
    )


def _build_model() -> Anny:
    import anny
    from anny.models.model_data import TopologyConfig

    topology = TopologyConfig(base_mesh="makehuman", remove_unattached_vertices=False, submodel="body")
    return anny.Anny(
        rig="makehuman-head", topology=topology, local_changes="default", facial_actions="all", phenotypes="all"
    )


def _adult(model: Anny) -> np.ndarray:
    weights = model.get_phenotype_blendshape_coefficients(**ADULT)[0].numpy()
    return model.template_vertices.numpy() + np.tensordot(weights, model.blendshapes.numpy()[: len(weights)], 1)


def _eye_centre(vertices: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    return vertices[np.unique(triangles)].mean(0)


def _needed_rows(labels: np.ndarray) -> np.ndarray:
    """All rows but those of the local changes that no person has; anny stores each change as two rows."""
    wanted = {f"local_change:{name}" for name in LOCAL_CHANGES}
    is_change = np.array([label.startswith("local_change:") for label in labels])
    positive = np.array([label in wanted for label in labels])
    return np.flatnonzero(~is_change | positive | np.roll(positive, 1))


def _triangles(model: Anny) -> tuple[np.ndarray, np.ndarray]:
    """Triangles (T, 3) of body, eyes, tongue and teeth, and their parts (T,)."""
    from anny.face_segmentation import get_face_segmentation_mask

    triangles = model.faces.numpy()
    parts = np.zeros(len(triangles), np.int8)
    for part, labels in SEGMENTS.items():
        parts[get_face_segmentation_mask(model, labels).numpy()] = PARTS.index(part)
    teeth = _helper_triangles(TEETH)
    return np.concatenate([triangles, teeth]), np.append(parts, np.full(len(teeth), PARTS.index("teeth"), np.int8))


def _with_torso(parts: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Parts (T,) where what lies below the jaw is the torso; canonical corners (T, 3, 3)."""
    return np.where((parts == PARTS.index("skin")) & (corners[..., 2].mean(1) < TORSO_Z), PARTS.index("torso"), parts)


def _helper_triangles(groups: Sequence[str]) -> np.ndarray:
    """Triangles (T, 3) of groups that anny's models leave out, from MakeHuman's base mesh in anny's wheel."""
    from anny.paths import get_anny_root_dir

    group, triangles = "", []
    for line in (Path(get_anny_root_dir()) / "data/mpfb2/3dobjs/base.obj").read_text().splitlines():
        kind, *words = line.split() or [""]
        if kind == "g":
            group = words[0]
        elif kind == "f" and group in groups:
            corners = [int(word.split("/")[0]) - 1 for word in words]
            triangles += [[corners[0], *corners[i : i + 2]] for i in range(1, len(corners) - 1)]
    return np.array(triangles)


def _head_weight(model: Anny) -> np.ndarray:
    """How far each vertex follows the head: 1 with the head's bones, less down the three of the neck."""
    share = np.ones(len(model.bone_labels))
    for bone, value in {"root": 0.0, "neck01": 0.0, "neck02": 0.33, "neck03": 0.67}.items():
        share[model.bone_labels.index(bone)] = value
    weights = model.vertex_bone_weights.numpy() * share[model.vertex_bone_indices.numpy()]
    return weights.sum(1).astype(np.float32)


def _texture_mask(model: Anny, name: str) -> np.ndarray:
    """One of MPFB2's masks at the vertices, (V,) in [0, 1]."""
    from anny.paths import get_anny_root_dir
    from PIL import Image

    picture = Image.open(Path(get_anny_root_dir()) / f"data/mpfb2/textures/mpfb_{name}.jpg").convert("L")
    uv = np.zeros((len(model.template_vertices), 2))
    uv[model.faces.numpy()] = model.texture_coordinates.numpy()[model.face_texture_coordinate_indices.numpy()]
    pixels = (np.stack([1 - uv[:, 1], uv[:, 0]], 1) * picture.height).astype(int).clip(0, picture.height - 1)
    return np.asarray(picture)[pixels[:, 0], pixels[:, 1]].astype(np.float32) / 255
