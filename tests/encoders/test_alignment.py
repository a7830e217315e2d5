import cv2
import dlib
import numpy as np
import pytest
import torch
from insightface.utils import face_align
from skimage.transform import SimilarityTransform

from mm_lightning.encoders.alignment import align_faces, invert_similarity, similarity_transform, warp_similarity
from tests.encoders.real_faces import real_faces, to_picture

TEMPLATE = torch.from_numpy(face_align.arcface_dst)


def random_landmarks(num_faces: int, num_points: int) -> np.ndarray:
    return np.random.default_rng(0).normal(200, 60, (num_faces, num_points, 2))


@pytest.mark.parametrize("num_points", [2, 5, 68])
def test_similarity_equals_umeyama_of_scikit_image(num_points):
    sources, target = random_landmarks(4, num_points), random_landmarks(1, num_points)[0][::-1].copy()
    expected = [SimilarityTransform.from_estimate(source, target).params[:2] for source in sources]
    transform = similarity_transform(torch.from_numpy(sources), torch.from_numpy(target))
    np.testing.assert_allclose(transform, np.stack(expected), rtol=1e-9, atol=1e-9)


def test_similarity_of_mirrored_landmarks_does_not_mirror():
    source = random_landmarks(1, 5)
    target = source[0] * [-1, 1]
    expected = SimilarityTransform.from_estimate(source[0], target).params[:2]
    transform = similarity_transform(torch.from_numpy(source), torch.from_numpy(target))[0]
    np.testing.assert_allclose(transform, expected, rtol=1e-9, atol=1e-9)
    assert torch.linalg.det(transform[:, :2]) > 0


def test_similarity_in_float32_and_of_a_template_per_face():
    sources, targets = random_landmarks(4, 5), random_landmarks(8, 5)[4:]
    exact = similarity_transform(torch.from_numpy(sources), torch.from_numpy(targets))
    single = similarity_transform(torch.from_numpy(sources).float(), torch.from_numpy(targets))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, exact.float(), rtol=1e-5, atol=1e-3)
    alone = similarity_transform(torch.from_numpy(sources[2:3]), torch.from_numpy(targets[2]))
    torch.testing.assert_close(exact[2:3], alone)


def test_inverse_undoes_the_transform():
    transform = similarity_transform(torch.from_numpy(random_landmarks(3, 5)), TEMPLATE)
    inverse = invert_similarity(transform)
    torch.testing.assert_close(transform[..., :2] @ inverse[..., :2], torch.eye(2, dtype=torch.float64).expand(3, 2, 2))
    shift = transform[..., :2] @ inverse[..., 2:] + transform[..., 2:]
    torch.testing.assert_close(shift, torch.zeros_like(shift), rtol=0, atol=1e-9)


@pytest.mark.parametrize("index", range(7))
def test_align_faces_equals_norm_crop_of_insightface(index):
    face = real_faces()[index]
    expected = face_align.norm_crop(face.picture, face.landmarks)
    aligned = to_picture(align_faces(face.pixels, torch.from_numpy(face.landmarks)[None], TEMPLATE, 112))
    difference = np.abs(aligned - expected)
    assert difference.max() < (0.55 if int(cv2.__version__[0]) >= 5 else 8)  # grey levels; OpenCV 5 only rounds
    assert difference.mean() < 0.3


def test_outside_of_the_picture_is_black_as_in_opencv():
    face = real_faces()[0]
    left, top = face.points.min(0).astype(int) + 15
    picture = np.ascontiguousarray(face.picture[top : top + 60, left : left + 50])
    landmarks = face.landmarks - np.float32([left, top])
    expected = face_align.norm_crop(picture, landmarks)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
    aligned = to_picture(align_faces(pixels, torch.from_numpy(landmarks)[None], TEMPLATE, 112))
    black = (expected == 0).all(-1)
    assert 0.1 < black.mean() < 0.9
    np.testing.assert_allclose(aligned[black], 0, atol=0.55)
    if int(cv2.__version__[0]) >= 5:
        np.testing.assert_allclose(aligned, expected, atol=0.55)


def test_a_batch_gives_what_each_face_gives_alone():
    faces = real_faces()[:3]
    pixels = torch.cat([face.pixels for face in faces])
    landmarks = torch.from_numpy(np.stack([face.landmarks for face in faces]))
    together = align_faces(pixels, landmarks, TEMPLATE, 112)
    alone = [align_faces(pixels[i : i + 1], landmarks[i : i + 1], TEMPLATE, 112) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-4)


def test_gradients_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 6, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    landmarks = torch.rand(2, 5, 2, dtype=torch.float64, generator=generator) * 5
    landmarks.requires_grad_()
    template = torch.rand(5, 2, dtype=torch.float64, generator=generator) * 4
    assert torch.autograd.gradcheck(lambda x, points: align_faces(x, points, template, 4), (pixels, landmarks))


def test_an_absent_face_stays_finite():
    pixels = torch.rand(1, 3, 8, 8, requires_grad=True)
    landmarks = torch.zeros(1, 5, 2, requires_grad=True)
    aligned = align_faces(pixels, landmarks, TEMPLATE, 16)
    aligned.sum().backward()
    assert aligned.isfinite().all()
    assert pixels.grad.isfinite().all()
    assert landmarks.grad.isfinite().all()


def test_half_precision_pixels_do_not_lose_positions():
    face = real_faces()[2]  # x beyond 1024, where bfloat16 counts in steps of 8
    landmarks = torch.from_numpy(face.landmarks)[None]
    exact = align_faces(face.pixels, landmarks, TEMPLATE, 112)
    coarse = align_faces(face.pixels.bfloat16(), landmarks, TEMPLATE, 112)
    assert coarse.dtype == torch.bfloat16
    torch.testing.assert_close(coarse.float(), exact, rtol=0, atol=2**-7)


def test_wrong_shapes_are_named():
    pixels = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"\(2, 4, 2\) and template \(5, 2\)"):
        align_faces(pixels, torch.zeros(2, 4, 2), TEMPLATE, 112)
    with pytest.raises(ValueError, match="one face per picture"):
        align_faces(pixels, torch.zeros(3, 5, 2), TEMPLATE, 112)
    with pytest.raises(ValueError, match="one face per picture"):
        align_faces(pixels[0], torch.zeros(3, 5, 2), TEMPLATE, 112)


def dlib_chip_transform(shape: dlib.full_object_detection) -> torch.Tensor:
    """(1, 2, 3) picture -> chip, as dlib cuts it: the corners of its rectangle are centres of pixels."""
    details = dlib.get_face_chip_details(shape, 150, 0.25)
    rect = details.rect
    scale = (rect.right() - rect.left()) / 149 * np.exp(1j * details.angle)
    shift = complex(rect.left() + rect.right(), rect.top() + rect.bottom()) / 2 - scale * (74.5 + 74.5j)
    linear = [[scale.real, -scale.imag, shift.real], [scale.imag, scale.real, shift.imag]]
    return invert_similarity(torch.tensor([linear], dtype=torch.float64))


@pytest.mark.parametrize("index", range(7))
def test_warp_equals_the_interpolation_of_dlib(index):
    face = real_faces()[index]
    expected = dlib.get_face_chip(face.picture, face.shape, 150, 0.25)
    chip = to_picture(warp_similarity(face.pixels, dlib_chip_transform(face.shape), 150))
    assert (chip - expected).min() > -0.01  # dlib cuts the decimals off
    assert (chip - expected).max() < 1.01
