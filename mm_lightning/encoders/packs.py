"""insightface model packs on disk: find the recognition network, repair the known fault, explain what is missing.

A pack is a folder `<root>/models/<name>/` of ONNX files. The packs that carry an IResNet recogniser are `buffalo_l` and
`buffalo_m` (w600k_r50.onnx) and `antelopev2` (glintr100.onnx); their embedding spaces differ.
"""

import logging
import os
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

logger = logging.getLogger(__name__)

DEFAULT_ROOT = "~/.insightface"
RECOGNITION_PATTERNS = ("w600k_*.onnx", "glintr100.onnx", "*arcface*.onnx")
HOW_TO_GET = (
    "Download the pack (for instance buffalo_l.zip or antelopev2.zip) from "
    "https://github.com/deepinsight/insightface/releases/tag/v0.7 and unzip it so that the .onnx files lie directly in "
    "the folder. insightface's pretrained packs are licensed for non-commercial research only."
)


def resolve_pack(name_or_folder: str | os.PathLike, root: str | os.PathLike = DEFAULT_ROOT) -> Path:
    """Path of a pack's recognition network.

    A doubly nested pack (`antelopev2/antelopev2/*.onnx`, as that zip unpacks) is repaired in place.

    Args:
        name_or_folder: the name of a pack under `<root>/models`, a pack's folder, or an .onnx file.
        root: insightface's root folder.

    Raises:
        FileNotFoundError: no such pack, or none of its files is a recognition network.
        ValueError: several files could be it, or one is not an ONNX file.
    """
    given = Path(name_or_folder).expanduser()
    if given.suffix == ".onnx":
        if not given.is_file():
            raise FileNotFoundError(f"No such recognition network: {given}. {HOW_TO_GET}")
        return given
    folder = _find_folder(given, Path(root).expanduser() / "models")
    return find_recognition_model(repair_nested_pack(folder))


def _find_folder(given: Path, models: Path) -> Path:
    candidates = [given] if given.is_absolute() else [models / given, given]
    for folder in candidates:
        if folder.is_dir():
            return folder
    looked = " and ".join(str(folder) for folder in candidates)
    archive = candidates[0].with_name(candidates[0].name + ".zip")
    unzip = f"{archive} lies there but is not unpacked. " if archive.is_file() else ""
    raise FileNotFoundError(
        f"No insightface pack {str(given)!r}: looked for a folder {looked} with one of "
        f"{', '.join(RECOGNITION_PATTERNS)}. {unzip}{HOW_TO_GET}"
    )


def repair_nested_pack(folder: Path) -> Path:
    """Move the files of `folder/<same name>/` up into `folder`, each atomically, never over an existing file.

    Several processes may do so at once. Where the folder cannot be written to, the inner one is returned, to be used as
    it is.
    """
    nested = folder / folder.name
    strays = [stray for stray in sorted(nested.glob("*.onnx")) if not (folder / stray.name).exists()]
    if not strays:
        return folder
    try:
        for stray in strays:
            with suppress(FileNotFoundError):  # another process was faster
                stray.replace(folder / stray.name)
    except OSError as error:
        logger.warning("Pack %s is doubly nested and could not be repaired (%s): reading %s", folder, error, nested)
        return nested
    with suppress(OSError):  # kept while it holds anything else
        nested.rmdir()
    logger.warning("Pack %s was doubly nested: moved %s up", folder, ", ".join(stray.name for stray in strays))
    return folder


def find_recognition_model(folder: Path) -> Path:
    """The one recognition network among a folder's ONNX files: by name, else by its 112-pixel input and 512-d output.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several.
    """
    files = sorted(folder.glob("*.onnx"))
    found = [file for file in files if any(fnmatch(file.name, pattern) for pattern in RECOGNITION_PATTERNS)]
    found = found or [file for file in files if _maps_face_to_embedding(file)]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{folder} holds several recognition networks ({names}): give the path of one of these files")
    if not found:
        names = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        raise FileNotFoundError(
            f"No recognition network in {folder}: expected one of {', '.join(RECOGNITION_PATTERNS)}, found {names}. "
            f"{HOW_TO_GET}"
        )
    return found[0]


def load_onnx(path: Path) -> onnx.ModelProto:
    """Parse an ONNX file.

    Raises:
        ValueError: it is not one, for instance because the download broke off.
    """
    try:
        model = onnx.load(path)
    except DecodeError:
        model = None
    if model is None or not model.graph.node:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is not a readable ONNX file, perhaps a broken download: "
            f"delete it and fetch it again. {HOW_TO_GET}"
        )
    return model


def _maps_face_to_embedding(path: Path) -> bool:
    graph = load_onnx(path).graph
    weights = {weight.name for weight in graph.initializer}
    inputs = [_dims(value) for value in graph.input if value.name not in weights]
    outputs = [_dims(value) for value in graph.output]
    return len(inputs) == len(outputs) == 1 and inputs[0][1:] == [3, 112, 112] and outputs[0][1:] == [512]


def _dims(value: onnx.ValueInfoProto) -> list[int]:
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]
