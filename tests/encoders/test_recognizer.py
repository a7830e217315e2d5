import dlib
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from insightface.model_zoo.arcface_onnx import ArcFaceONNX
from insightface.utils import face_align
from safetensors.torch import load_file
from torch import nn

from mm_lightning.encoders.alignment import invert_similarity, similarity_transform, warp_similarity
from mm_lightning.encoders.recognizer import (
    ArcFaceRecognizer,
    DlibRecognizer,
    check_recognizer,
    find_dlib_weights,
    load_recognizer,
    pad_to_common,
    read_dlib_weights,
)
from tests.encoders.onnx_iresnet import (
    export_folded,
    export_unfolded,
    gemm_to_matmul,
    prepend_mxnet_preprocessing,
    random_iresnet,
)
from tests.encoders.real_faces import dlib_file, faces_of_one_man, real_faces, to_picture, to_pixels

WIDTHS, DEPTHS = (4, 6, 8, 10), (1, 3, 2, 1)


@pytest.fixture(scope="module")
def dlib_recognizer():
    return load_recognizer("dlib")


@pytest.fixture(scope="module")
def dlib_library():
    return dlib.face_recognition_model_v1(dlib_file("dlib_face_recognition_resnet_model_v1.dat"))


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """The same random IResNet in every form; name -> ONNX file."""
    folder = tmp_path_factory.mktemp("models")
    network = random_iresnet(WIDTHS, DEPTHS)
    files = {"folded": export_folded(network, folder / "folded.onnx")}
    files["unfolded"] = export_unfolded(network, folder / "unfolded.onnx")
    files["mxnet"] = prepend_mxnet_preprocessing(files["unfolded"], folder / "mxnet.onnx")
    files["matmul"] = gemm_to_matmul(files["folded"], folder / "matmul.onnx")
    return files


def embeddings_of(recognizer, faces):
    return np.stack([recognizer.embed(face.pixels, torch.from_numpy(face.landmarks)[None])[0] for face in faces])


def run_onnx(path, inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: inputs})[0]


# dlib


def test_dlib_network_equals_the_library_on_real_faces(dlib_recognizer, dlib_library):
    chips = [dlib.get_face_chip(face.picture, face.shape, 150, 0.25) for face in real_faces()]
    expected = np.array([dlib_library.compute_face_descriptor(chip) for chip in chips])
    embeddings = dlib_recognizer(torch.cat([to_pixels(chip) for chip in chips]))
    np.testing.assert_allclose(embeddings, expected, rtol=0, atol=1e-5)


def test_dlib_from_five_points_agrees_with_the_library_from_68(dlib_recognizer, dlib_library):
    expected = np.array([dlib_library.compute_face_descriptor(face.picture, face.shape) for face in real_faces()])
    embeddings = embeddings_of(dlib_recognizer, real_faces())
    assert np.linalg.norm(embeddings - expected, axis=1).max() < 0.2
    distances = np.linalg.norm(embeddings[:, None] - embeddings, axis=-1)
    assert distances[~np.eye(7, dtype=bool)].min() > 0.6  # dlib's threshold: the seven people stay seven


def test_dlib_from_five_points_knows_one_man_in_different_frames(dlib_recognizer):
    embeddings = embeddings_of(dlib_recognizer, faces_of_one_man())
    distances = np.linalg.norm(embeddings[:, None] - embeddings, axis=-1)
    assert distances.max() < 0.6
    others = embeddings_of(dlib_recognizer, real_faces())
    assert np.linalg.norm(embeddings[:, None] - others, axis=-1).min() > 0.6


def probed_dlib_template() -> np.ndarray:
    """(68, 2) dlib's template for a chip of 150 pixels, measured from outside; NaN where dlib ignores the point.

    dlib fits image = scale * chip + shift by least squares, so scale and the chip's centre are linear in the image
    points: moving point i alone shows conj(chip_i - mean) / sum(|chip - mean|^2).
    """

    def fit(points):
        parts = [dlib.point(int(x), int(y)) for x, y in points]
        shape = dlib.full_object_detection(dlib.rectangle(0, 0, 1, 1), parts)
        details = dlib.get_face_chip_details(shape, 150, 0.25)
        rect = details.rect
        center = complex(rect.left() + rect.right(), rect.top() + rect.bottom()) / 2
        return np.array([(rect.right() - rect.left() + 1) / 150 * np.exp(1j * details.angle), center])

    step = 10**9
    start = np.stack([np.arange(68) * 1000, np.zeros(68)], axis=1)
    moved = [fit(start + step * np.eye(68)[:, [index]] * [1, 0]) for index in range(68)]
    scale, center = (np.array(moved) - fit(start)).T / step
    scale[np.abs(center) < 1e-9] = np.nan
    power = 1 / np.nansum(np.abs(scale) ** 2)
    centered = scale.conj() * power
    # center_i = 1 / n + scale_i * (75 + 75j - mean)
    residual = center - 1 / np.isfinite(scale).sum()
    mean = 75 + 75j - np.nansum(residual * centered) / np.nansum(np.abs(scale) ** 2) / power
    template = centered + mean
    return np.stack([template.real, template.imag], axis=1) - 0.5


def test_dlib_template_is_the_mean_face_of_the_library(dlib_recognizer):
    points = probed_dlib_template()
    expected = [points[36:42].mean(0), points[42:48].mean(0), points[30], points[48], points[54]]
    np.testing.assert_allclose(dlib_recognizer.template, expected, rtol=0, atol=1e-4)


def test_chips_from_dlibs_whole_template_are_dlibs(dlib_library):
    points = probed_dlib_template()
    used = np.isfinite(points[:, 0])
    assert used.sum() == 33
    for face in real_faces():
        fit = similarity_transform(torch.from_numpy(points[used])[None], torch.from_numpy(face.points[used]))
        chip = to_picture(warp_similarity(face.pixels, invert_similarity(fit), 150))
        expected = dlib.get_face_chip(face.picture, face.shape, 150, 0.25)
        assert np.abs(chip - expected).mean() < 1.2  # grey levels; dlib stretches its chips by up to half a pixel
        pair = [np.array(dlib_library.compute_face_descriptor(c.round().astype(np.uint8))) for c in (chip, expected)]
        assert np.linalg.norm(pair[0] - pair[1]) < 0.02


def test_dlib_gradient_reaches_the_pixels_of_the_face(dlib_recognizer):
    face = real_faces()[0]
    pixels = face.pixels.requires_grad_()
    dlib_recognizer.embed(pixels, torch.from_numpy(face.landmarks)[None]).square().sum().backward()
    left, top = face.points[36:48].min(0).astype(int)
    right, bottom = face.points[36:48].max(0).astype(int)
    assert (pixels.grad[..., top:bottom, left:right].abs().sum(1) > 0).all()
    assert (pixels.grad[..., 500:] == 0).all()


def test_a_step_along_the_gradient_brings_two_people_closer(dlib_recognizer):
    one, other = (to_pixels(dlib.get_face_chip(face.picture, face.shape, 150, 0.25)) for face in real_faces()[:2])
    target = dlib_recognizer(other)
    one.requires_grad_()
    before = (dlib_recognizer(one) - target).square().sum()
    (slope,) = torch.autograd.grad(before, one)
    step = 1e-3 * slope / slope.abs().max()
    after = (dlib_recognizer(one - step) - target).square().sum()
    predicted = -(slope * step).sum()
    torch.testing.assert_close(after - before, predicted, rtol=0.1, atol=0)


def test_recognizer_is_frozen_and_stays_in_evaluation(dlib_recognizer):
    assert not any(parameter.requires_grad for parameter in dlib_recognizer.parameters())
    parent = nn.Sequential(dlib_recognizer).train()
    assert not any(module.training for module in parent[0].modules())
    assert set(dlib_recognizer.state_dict()) == {f"network.{name}" for name in dlib_recognizer.network.state_dict()}
    assert (dlib_recognizer.embed_dim, dlib_recognizer.image_size) == (128, 150)
    assert dlib_recognizer.template.shape == (5, 2)


def test_autocast_does_not_reach_into_the_recognizer(dlib_recognizer):
    faces = torch.rand(1, 3, 150, 150, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embedding = dlib_recognizer(faces)
    torch.testing.assert_close(embedding, dlib_recognizer(faces), rtol=0, atol=1e-6)


def test_pad_to_common_pads_at_the_end():
    small, large = torch.ones(1, 1, 1, 2), torch.ones(1, 2, 3, 1)
    padded = pad_to_common(small, large)
    assert padded.shape == (1, 2, 3, 2)
    assert padded.sum() == padded[0, 0, 0].sum() == 2
    assert pad_to_common(large, small).shape == (1, 2, 3, 2)


def test_wrong_dlib_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="None for the package's"):
        DlibRecognizer(tmp_path / "absent.dat")
    with pytest.raises(ValueError, match=r"is not dlib_face_recognition_resnet_model_v1\.dat"):
        DlibRecognizer(dlib_file("mmod_human_face_detector.dat"))
    truncated = tmp_path / "truncated.dat"
    truncated.write_bytes(find_dlib_weights().read_bytes()[:-10_000])
    with pytest.raises(ValueError, match="no tensor of 256 x 128"):
        read_dlib_weights(truncated)


def test_unaligned_pictures_are_refused(dlib_recognizer):
    with pytest.raises(ValueError, match=r"dlib takes aligned faces \(B, 3, 150, 150\), got \(1, 3, 112, 112\)"):
        dlib_recognizer(torch.zeros(1, 3, 112, 112))


# ArcFace


@pytest.mark.parametrize("form", ["folded", "unfolded", "matmul"])
def test_arcface_equals_onnxruntime(packs, form):
    operators = {node.op_type for node in onnx.load(packs[form]).graph.node}
    assert ("MatMul" in operators) == (form == "matmul")
    faces = torch.rand(3, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1
    faces = faces[: 1 if form == "unfolded" else 3]
    expected = run_onnx(packs[form], faces.numpy())
    np.testing.assert_allclose(ArcFaceRecognizer(packs[form])(faces), expected, rtol=0, atol=1e-5)


def test_arcface_equals_its_definition(packs):
    faces = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = random_iresnet(WIDTHS, DEPTHS).double()(faces.double())
    for form in ("folded", "unfolded"):
        recognizer = ArcFaceRecognizer(packs[form]).double()
        torch.testing.assert_close(recognizer(faces.double()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["folded", "mxnet"])
def test_arcface_embeds_whole_pictures_as_insightface_does(packs, form):
    library = ArcFaceONNX(str(packs[form]))
    assert library.input_mean == (0 if form == "mxnet" else 127.5)
    recognizer = ArcFaceRecognizer(packs[form])
    for face in real_faces()[:2]:
        crop = face_align.norm_crop(face.picture[..., ::-1].copy(), face.landmarks)  # BGR
        expected = library.get_feat(crop)
        embedding = recognizer.embed(face.pixels, torch.from_numpy(face.landmarks)[None])
        cosine = torch.cosine_similarity(embedding, torch.from_numpy(expected))
        assert cosine.item() > 0.9999
        exact = recognizer(to_pixels(np.ascontiguousarray(crop[..., ::-1])))
        np.testing.assert_allclose(exact, expected, rtol=0, atol=1e-5)


def test_arcface_learns_its_sizes_from_the_file(packs, tmp_path):
    recognizer = ArcFaceRecognizer(packs["folded"])
    assert (recognizer.embed_dim, recognizer.image_size) == (512, 112)
    np.testing.assert_allclose(recognizer.template, face_align.arcface_dst, rtol=1e-6)
    assert recognizer.network.blocks[1].conv1.out_channels == WIDTHS[1]
    assert len(recognizer.network.blocks) == sum(DEPTHS)
    assert not any(parameter.requires_grad for parameter in recognizer.parameters())
    small = ArcFaceRecognizer(export_folded(random_iresnet((4, 4), (2, 1), 56), tmp_path / "small.onnx", 56))
    assert small.image_size == 56
    np.testing.assert_allclose(small.template, face_align.arcface_dst / 2, rtol=1e-6)


def test_arcface_gradient_reaches_the_pixels(packs):
    face = real_faces()[0]
    pixels = face.pixels.requires_grad_()
    ArcFaceRecognizer(packs["folded"]).embed(pixels, torch.from_numpy(face.landmarks)[None]).square().sum().backward()
    assert pixels.grad.abs().sum() > 0
    assert (pixels.grad[..., 500:] == 0).all()


@pytest.mark.parametrize(
    "depths",
    [
        pytest.param((3, 4, 14, 3), id="iresnet50"),
        pytest.param((3, 13, 30, 3), id="iresnet100", marks=pytest.mark.slow),
    ],
)
def test_arcface_at_full_size_equals_onnxruntime(depths, tmp_path):
    network = random_iresnet((64, 128, 256, 512), depths)
    with torch.no_grad():  # deep stacks of random blocks overflow float32 otherwise
        for module in network.modules():
            if hasattr(module, "bn3"):
                module.bn3.weight.mul_(0.3)
    path = export_folded(network, tmp_path / "full.onnx")
    recognizer = ArcFaceRecognizer(path)
    assert sum(parameter.numel() for parameter in recognizer.parameters()) > 43e6
    faces = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = run_onnx(path, faces.numpy())
    assert np.abs(expected[0] - expected[1]).max() > 1e-2  # the faces do tell
    np.testing.assert_allclose(recognizer(faces), expected, rtol=0, atol=2e-5)


class MobileStem(nn.Module):
    """The first layers of a MobileFaceNet: a strided convolution, then a depthwise one."""

    def __init__(self):
        super().__init__()
        self.conv1, self.act = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.PReLU(8)
        self.conv2, self.fc = nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.Linear(8 * 56 * 56, 512)

    def forward(self, x):
        return self.fc(self.conv2(self.act(self.conv1(x))).flatten(1))


def test_other_networks_are_refused_with_the_reason(packs, tmp_path):
    with pytest.raises(ValueError, match=r"not an IResNet: node .*stride.* where .* was expected.*buffalo_l"):
        ArcFaceRecognizer(export_folded(MobileStem().eval(), tmp_path / "w600k_mbf.onnx"))

    model = onnx.load(packs["folded"])
    next(node for node in model.graph.node if node.op_type == "Add").op_type = "Mul"
    onnx.save(model, tmp_path / "product.onnx")
    with pytest.raises(ValueError, match="one Add was expected, there is Mul"):
        ArcFaceRecognizer(tmp_path / "product.onnx")

    model = onnx.load(packs["folded"])
    model.graph.output[0].name = next(node for node in model.graph.node if node.op_type == "Flatten").output[0]
    onnx.save(model, tmp_path / "features.onnx")
    with pytest.raises(ValueError, match="is not the graph's output"):
        ArcFaceRecognizer(tmp_path / "features.onnx")


def test_load_recognizer_finds_a_pack_by_name_folder_and_file(packs, tmp_path):
    pack = tmp_path / "models" / "buffalo_l"
    pack.mkdir(parents=True)
    file = pack / "w600k_r50.onnx"
    file.write_bytes(packs["folded"].read_bytes())
    recognizers = [load_recognizer("buffalo_l", root=tmp_path), load_recognizer(pack), load_recognizer(str(file))]
    assert {recognizer.name for recognizer in recognizers} == {"buffalo_l/w600k_r50"}
    for find in (load_recognizer, check_recognizer):
        with pytest.raises(FileNotFoundError, match=r"antelopev2.*non-commercial"):
            find("antelopev2", root=tmp_path)


def test_standardized_dlib_equals_its_definition_in_float64(dlib_recognizer):
    standardized = load_recognizer("dlib_standardized")
    statistics = load_file(check_recognizer("dlib_standardized"))
    mean, std = (statistics[name].double().numpy() for name in ("mean", "std"))
    expected = (embeddings_of(dlib_recognizer, real_faces()).astype(np.float64) - mean) / std
    np.testing.assert_allclose(embeddings_of(standardized, real_faces()), expected, rtol=0, atol=1e-4)
    assert (standardized.embed_dim, standardized.image_size) == (128, 150)
    assert torch.equal(standardized.template, dlib_recognizer.template)


def test_standardized_dlib_has_a_gradient_and_is_frozen():
    standardized = load_recognizer("dlib_standardized").train()
    faces = torch.randn(1, 3, 150, 150, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = standardized(faces)
    assert embeddings.dtype == torch.float32
    embeddings.square().sum().backward()
    assert faces.grad.abs().sum() > 0
    assert not any(module.training for module in standardized.modules())
    assert not any(parameter.requires_grad for parameter in standardized.parameters())


def test_check_recognizer_reads_no_weights(tmp_path):
    assert check_recognizer("dlib") == find_dlib_weights()
    file = tmp_path / "models" / "buffalo_l" / "w600k_r50.onnx"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"no weights")
    assert check_recognizer("buffalo_l", root=tmp_path) == file
    with pytest.raises(ValueError, match="not a readable ONNX file"):
        load_recognizer("buffalo_l", root=tmp_path)
