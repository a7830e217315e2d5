"""Face recognisers as frozen PyTorch networks: aligned faces -> embeddings, differentiable in the pixels.

Letters: B batch, H W pixels, S side of the aligned face, E embedding.
"""

import importlib.util
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from mm_lightning.encoders.alignment import align_faces, invert_similarity, similarity_transform, warp_similarity
from mm_lightning.encoders.iresnet import read_iresnet
from mm_lightning.encoders.packs import DEFAULT_ROOT, resolve_pack

# insightface's `arcface_dst`: eyes, nose tip, mouth corners in a 112-pixel face.
ARCFACE_TEMPLATE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
# The same five points of the mean face in dlib's `get_face_chip_details`; in its numbering of 68 points: the means of
# 36-41 and of 42-47, 30, 48, 54.
DLIB_MEAN_FACE = (
    (0.2254918333, 0.2159903333),
    (0.7547613333, 0.2159903333),
    (0.490127, 0.515625),
    (0.254149, 0.780233),
    (0.726104, 0.780233),
)
DLIB_SIZE, DLIB_PADDING = 150, 0.25
# (width, number of blocks, stride of the first block) of each stage.
DLIB_STAGES = ((32, 3, 1), (64, 4, 2), (128, 3, 2), (256, 3, 2), (256, 1, 2))
DLIB_WEIGHTS = "dlib_face_recognition_resnet_model_v1.dat"
# Mean and standard deviation (128,) of dlib's embeddings of the miniature's train people's stills.
DLIB_STATISTICS = Path(__file__).with_name("dlib_standardized.safetensors")


class FaceRecognizer(nn.Module):
    """A frozen network that tells people apart, always in evaluation mode; autocast does not reach into it.

    Attributes:
        name: for reports.
        embed_dim: E.
        image_size: S.
        template: (5, 2) positions of eyes, nose tip and mouth corners in the aligned face, in pixels.
    """

    template: Tensor

    def __init__(self, name: str, embed_dim: int, image_size: int, template: Tensor) -> None:
        super().__init__()
        self.name = name
        self.embed_dim = embed_dim
        self.image_size = image_size
        self.register_buffer("template", template.float(), persistent=False)

    def train(self, mode: bool = True) -> "FaceRecognizer":
        return super().train(False)

    def align(self, pixels: Tensor, landmarks: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] and (B, 5, 2) pixel positions -> (B, 3, S, S) in [-1, 1]."""
        return align_faces(pixels, landmarks, self.template, self.image_size)

    def embed(self, pixels: Tensor, landmarks: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] with one face each, landmarks (B, 5, 2) -> raw embeddings (B, E)."""
        return self(self.align(pixels, landmarks))

    def forward(self, faces: Tensor) -> Tensor:
        """Aligned RGB faces (B, 3, S, S) in [-1, 1] -> raw embeddings (B, E), not normalised.

        Raises:
            ValueError: faces of another shape.
        """
        if faces.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"{self.name} takes aligned faces (B, 3, {self.image_size}, {self.image_size}), got "
                f"{tuple(faces.shape)}; `embed` aligns whole pictures"
            )
        with torch.autocast(faces.device.type, enabled=False):
            return self.compute_embedding(faces.to(self.template.dtype))

    def compute_embedding(self, faces: Tensor) -> Tensor:
        raise NotImplementedError


class DlibRecognizer(FaceRecognizer):
    """dlib's 128-d face ResNet, with the weights of the PyPI package `face_recognition_models`.

    Two pictures show the same person when their embeddings are closer than 0.6 (Euclidean), dlib's own threshold.

    Args:
        weights: a `dlib_face_recognition_resnet_model_v1.dat`; None takes the package's.
    """

    def __init__(self, weights: str | os.PathLike | None = None) -> None:
        padded = (torch.tensor(DLIB_MEAN_FACE) + DLIB_PADDING) / (1 + 2 * DLIB_PADDING)
        # dlib's chip coordinates put the first pixel's centre at 0.5.
        super().__init__("dlib", embed_dim=128, image_size=DLIB_SIZE, template=padded * DLIB_SIZE - 0.5)
        self.register_buffer("mean", torch.tensor([122.782, 117.001, 104.298]).view(3, 1, 1), persistent=False)
        state = read_dlib_weights(Path(weights) if weights else find_dlib_weights())
        self.network = _empty_dlib_resnet()
        self.network.load_state_dict(state, assign=True)
        self.requires_grad_(False).eval()

    def align(self, pixels: Tensor, landmarks: Tensor) -> Tensor:
        # dlib fits the mean face to the picture; the opposite fit gives smaller faces, the more the pose differs.
        template = self.template.expand(len(landmarks), -1, -1)
        transform = invert_similarity(similarity_transform(template, landmarks))
        return warp_similarity(pixels, transform, self.image_size)

    def compute_embedding(self, faces: Tensor) -> Tensor:
        return self.network(((faces + 1) * 127.5 - self.mean) / 256)


class DlibResNet(nn.Module):
    """dlib's `anet_type` (dnn_face_recognition_ex.cpp), its affine layers folded into the convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, DLIB_STAGES[0][0], 7, stride=2)
        blocks, in_dim = [], DLIB_STAGES[0][0]
        for width, depth, stride in DLIB_STAGES:
            blocks.append(DlibBlock(in_dim, width, stride))
            blocks.extend(DlibBlock(width, width, stride=1) for _ in range(depth - 1))
            in_dim = width
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(in_dim, 128, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = F.relu(self.conv(hidden_states))  # (B, 32, 72, 72)
        hidden_states = F.max_pool2d(hidden_states, 3, stride=2)  # (B, 32, 35, 35)
        hidden_states = self.blocks(hidden_states)  # (B, 256, 2, 2)
        return self.linear(hidden_states.mean((-1, -2)))  # (B, 128)


class DlibBlock(nn.Module):
    """Residual block without padding where it strides; the smaller operand of the sum is padded with zeros."""

    def __init__(self, in_dim: int, out_dim: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, out_dim, 3, stride, padding=int(stride == 1))
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, padding=1)
        self.shortcut = nn.Identity() if stride == 1 else nn.AvgPool2d(stride)

    def forward(self, hidden_states: Tensor) -> Tensor:
        residual = self.conv2(F.relu(self.conv1(hidden_states)))
        shortcut = self.shortcut(hidden_states)
        return F.relu(pad_to_common(residual, shortcut) + pad_to_common(shortcut, residual))


def pad_to_common(tensor: Tensor, other: Tensor) -> Tensor:
    """Zeros at the end of channels, rows and columns wherever `other` (B, C, H, W) has more."""
    channels, rows, columns = (max(b - a, 0) for a, b in zip(tensor.shape[1:], other.shape[1:], strict=True))
    return F.pad(tensor, (0, columns, 0, rows, 0, channels))


def _empty_dlib_resnet() -> DlibResNet:
    with torch.device("meta"):
        return DlibResNet()


def find_dlib_weights() -> Path:
    """The weights inside `face_recognition_models`, which is not imported: that needs the retired pkg_resources.

    Raises:
        FileNotFoundError: the package is not installed, or lacks the file.
    """
    spec = importlib.util.find_spec("face_recognition_models")
    folders = [Path(folder) / "models" for folder in spec.submodule_search_locations] if spec else []
    for folder in folders:
        if (folder / DLIB_WEIGHTS).is_file():
            return folder / DLIB_WEIGHTS
    looked = f" in {folders[0]}" if folders else ""
    raise FileNotFoundError(f"{DLIB_WEIGHTS} was not found{looked}: `pip install face_recognition_models` brings it")


def read_dlib_weights(path: Path) -> dict[str, Tensor]:
    """dlib's serialised network -> the state dict of `DlibResNet`.

    The file holds, from input to output, per convolution one tensor with weights and bias and one with its affine
    layer's gamma and beta, and at the end the transposed linear layer.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another network.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"No dlib weights at {path}: give the path of {DLIB_WEIGHTS}, or None for the package's"
        )
    reader, state = DlibReader(path), {}
    for name, module in _empty_dlib_resnet().named_modules():
        if isinstance(module, nn.Conv2d):
            sizes = [module.weight.numel(), module.out_channels]
            weight, bias = reader.read(sum(sizes)).split(sizes)
            gamma, beta = reader.read(2 * module.out_channels).chunk(2)
            weight = weight.view_as(module.weight) * gamma.view(-1, 1, 1, 1)
            state |= {f"{name}.weight": weight.float(), f"{name}.bias": (bias * gamma + beta).float()}
    state["linear.weight"] = reader.read(256, 128).view(256, 128).mT.float()
    return state


class DlibReader:
    """Finds tensors of known size, one after the other, in a file of dlib's serialisation format."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path.read_bytes()
        self.position = 0

    def read(self, num_samples: int, num_channels: int = 1) -> Tensor:
        """The next tensor of dimensions (num_samples, num_channels, 1, 1), flat, in float64."""
        header = b"\x01\x02" + b"".join(_encode_dlib_int(dim) for dim in (num_samples, num_channels, 1, 1))
        start = self.data.find(header, self.position) + len(header)
        self.position = start + 4 * num_samples * num_channels
        if start < len(header) or self.position > len(self.data):
            raise ValueError(
                f"{self.path} is not {DLIB_WEIGHTS}: no tensor of {num_samples} x {num_channels} where expected"
            )
        values = torch.frombuffer(bytearray(self.data[start : self.position]), dtype=torch.float32)
        return values.double()


def _encode_dlib_int(value: int) -> bytes:
    """A positive integer as dlib writes it: the number of bytes, then the bytes, little-endian."""
    num_bytes = (value.bit_length() + 7) // 8
    return bytes([num_bytes]) + value.to_bytes(num_bytes, "little")


class StandardizedRecognizer(FaceRecognizer):
    """Another recogniser's embedding, less its mean over people and in units of its spread: (F_id - mean) / std.

    dlib's embeddings of all people point the same way (cosine .90 between strangers, .97 within a person), so that the
    raw cosine moves in a tenth of its range. Standardised, strangers are at about 0, as they are with ArcFace.

    Args:
        recognizer: gives the raw embedding; faces are aligned its way.
        mean, std: (E,), std positive.
        name: for reports.
    """

    def __init__(self, recognizer: FaceRecognizer, mean: Tensor, std: Tensor, name: str) -> None:
        super().__init__(name, recognizer.embed_dim, recognizer.image_size, recognizer.template)
        self.recognizer = recognizer
        self.register_buffer("mean", mean.float(), persistent=False)
        self.register_buffer("std", std.float(), persistent=False)
        self.requires_grad_(False).eval()

    def align(self, pixels: Tensor, landmarks: Tensor) -> Tensor:
        return self.recognizer.align(pixels, landmarks)

    def compute_embedding(self, faces: Tensor) -> Tensor:
        return self.standardize(self.recognizer(faces))

    def standardize(self, embeddings: Tensor) -> Tensor:
        """Raw embeddings (..., E) -> standardised."""
        return (embeddings - self.mean) / self.std


class ArcFaceRecognizer(FaceRecognizer):
    """An insightface pack's ArcFace IResNet. Its pretrained weights are for non-commercial research only.

    Args:
        path: the recognition network's ONNX file, such as buffalo_l's w600k_r50.onnx (the embedding that PhotoMaker-V2
            expects) or antelopev2's glintr100.onnx (another embedding space).

    Raises:
        ValueError: the file is not an IResNet.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        path = Path(path)
        source = read_iresnet(path)
        template = torch.tensor(ARCFACE_TEMPLATE) * source.image_size / 112
        super().__init__(f"{path.parent.name}/{path.stem}", source.embed_dim, source.image_size, template)
        self.register_buffer("input_scale", source.input_scale, persistent=False)
        self.register_buffer("input_shift", source.input_shift, persistent=False)
        self.network = source.network
        self.requires_grad_(False).eval()

    def compute_embedding(self, faces: Tensor) -> Tensor:
        return self.network(faces * self.input_scale + self.input_shift)


def check_recognizer(name_or_folder: str | os.PathLike, root: str | os.PathLike = DEFAULT_ROOT) -> Path:
    """The file of weights that `load_recognizer` would read, found without reading it.

    Raises:
        FileNotFoundError, ValueError: as `load_recognizer`, for what can be told from names, and from shapes where no
            file has a known name.
    """
    name = os.fspath(name_or_folder)
    if name in ("dlib", DLIB_STATISTICS.stem):
        return find_dlib_weights() if name == "dlib" else find_dlib_weights() and DLIB_STATISTICS
    return resolve_pack(name_or_folder, root)


def load_recognizer(name_or_folder: str | os.PathLike, root: str | os.PathLike = DEFAULT_ROOT) -> FaceRecognizer:
    """Build a recogniser, on the CPU.

    Args:
        name_or_folder: "dlib", "dlib_standardized", the name of an insightface pack under `<root>/models`
            ("buffalo_l", "antelopev2"), a pack's folder, or an ONNX file.
        root: insightface's root folder.

    Raises:
        FileNotFoundError: missing weights, with where they were looked for and how to get them.
        ValueError: a file that is not a supported network.
    """
    path = check_recognizer(name_or_folder, root)
    if path == DLIB_STATISTICS:
        return StandardizedRecognizer(DlibRecognizer(), **load_file(path), name=path.stem)
    return DlibRecognizer(path) if path.name == DLIB_WEIGHTS else ArcFaceRecognizer(path)
