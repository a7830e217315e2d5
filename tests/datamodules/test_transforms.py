"""Boxes and landmarks follow the pixels; cached tensors; what cannot be decoded."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from datamodules.shards import DamagedSample
from datamodules.transforms import (
    Faces,
    SampleTransform,
    check_num_frames,
    collate,
    crop_offset,
    generator_for,
    map_faces,
    plan_crop,
)
from mm_lightning.prepare.shards import to_bytes
from tests.datamodules.drawn import BOX, LANDMARKS, draw, encode, encode_video, meta, picture_fields, video_fields


def sample_of(fields, key="k0"):
    return {"__key__": key, **{name: to_bytes(value) for name, value in fields.items()}}


def rectangle_in(picture, threshold=0.0):
    """Picture (3, H, W) in [-1, 1] with a bright rectangle -> its box, corners between pixels by their grey, (4,)."""
    bright = (picture.mean(0) + 1) / 2
    columns, rows = bright.amax(0), bright.amax(1)
    box = []
    for profile in (columns, rows):
        weight = profile / profile.max()
        inside = (weight > 0.5).nonzero().flatten()
        first, last = int(inside[0]), int(inside[-1])
        before, behind = weight[:first].sum(), weight[last + 1 :].sum()
        box.append((first - before - (weight[first] - 1), last + behind + (weight[last] - 1)))
    return torch.tensor([box[0][0], box[1][0], box[0][1], box[1][1]])


def as_edges(box, scale):
    """A box of pixel centres, mapped by `scale` -> the centres of the corner pixels that its drawn rectangle covers."""
    grow = (scale - 1) / 2
    return box + torch.tensor([-grow, -grow, grow, grow])


def picture_sample(size, box, **options):
    fields = {
        "png": encode(draw(size, box)),
        "txt": "A man img",
        "json": meta(size=size, boxes=[box]),
        "ref0.jpg": encode(draw(), "JPEG"),
        **options,
    }
    return sample_of(fields)


SIZES = [
    ((80, 60), (80, 56)),
    ((160, 120), (64, 64)),
    ((60, 120), (64, 32)),
    ((97, 61), (48, 48)),
    ((64, 64), (128, 128)),
]


@pytest.mark.parametrize(("source", "target"), SIZES)
@pytest.mark.parametrize("place", ["middle", "first", "last"])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_the_box_follows_the_picture_within_half_a_pixel(source, target, place, flip):
    side = 16
    origin = {"middle": [(s - side) // 2 for s in source], "first": [1, 1], "last": [s - side - 1 for s in source]}[
        place
    ]
    box = [*map(float, origin), origin[0] + side - 1.0, origin[1] + side - 1.0]
    transform = SampleTransform(target[1], target[0], reference_size=16, flip_probability=flip)
    out = transform(picture_sample(source, box))
    assert out.pixels.shape == (1, 3, target[1], target[0])
    scale = max(t / s for s, t in zip(source, target, strict=True))
    expected = as_edges(out.face_boxes[0], scale)
    assert (rectangle_in(out.pixels[0]) - expected).abs().max() < 0.5


@pytest.mark.parametrize("target", [(96, 64), (64, 64), (256, 128)])
def test_the_boxes_follow_every_frame_of_a_clip(target):
    boxes = [[10.0 + 8 * i, 20.0, 41.0 + 8 * i, 51.0] for i in range(5)]
    fields = video_fields(5) | {
        "mp4": encode_video([draw((128, 96), box) for box in boxes]),
        "json": meta(5, (128, 96), boxes),
    }
    out = SampleTransform(target[1], target[0], num_frames=5, reference_size=16)(sample_of(fields))
    scale = max(target[0] / 128, target[1] / 96)
    for frame, box in zip(out.pixels, out.face_boxes, strict=True):
        assert (rectangle_in(frame) - as_edges(box, scale)).abs().max() < 0.5


@pytest.mark.parametrize("width", [24, 48, 72, 96, 104, 144, 192, 200])
def test_widths_that_decord_misreads_come_out_right(width):
    frames = [np.full((60, 80, 3), 40 * i, np.uint8) for i in range(5)]
    fields = video_fields(5) | {"mp4": encode_video(frames)}
    out = SampleTransform(width * 3 // 4 // 8 * 8, width, num_frames=5, reference_size=16)(sample_of(fields))
    assert torch.allclose(out.pixels.mean((1, 2, 3)), torch.arange(5) * 40 / 127.5 - 1, atol=0.03)


def test_a_flip_swaps_the_viewers_left_and_right():
    straight = SampleTransform(56, 80, reference_size=16)(sample_of(picture_fields()))
    mirrored = SampleTransform(56, 80, reference_size=16, flip_probability=1.0)(sample_of(picture_fields()))
    assert torch.equal(mirrored.pixels, straight.pixels.flip(-1))
    eyes, mouth = mirrored.face_landmarks[0, :2], mirrored.face_landmarks[0, 3:]
    assert eyes[0, 0] < eyes[1, 0]
    assert mouth[0, 0] < mouth[1, 0]
    expected = straight.face_landmarks[0, [1, 0, 2, 4, 3]]
    expected[:, 0] = 79 - expected[:, 0]
    assert torch.allclose(mirrored.face_landmarks[0], expected)
    assert torch.equal(mirrored.references, straight.references)


def test_the_crop_moves_only_as_far_as_the_faces_ask():
    assert crop_offset(100, 40, None) == 30
    assert crop_offset(100, 40, [40.0, 50.0]) == 30
    assert crop_offset(100, 40, [10.0, 20.0]) == 10
    assert crop_offset(100, 40, [75.0, 85.0]) == 46
    assert crop_offset(100, 40, [0.0, 99.0]) == 30
    assert crop_offset(100, 40, [80.0, 120.0]) == 60
    assert crop_offset(40, 40, [0.0, 5.0]) == 0


def test_a_face_that_the_crop_loses_counts_as_none():
    boxes = torch.tensor([[2.0, 2.0, 12.0, 12.0], [0.0, 0.0, 0.0, 0.0], [180.0, 2.0, 190.0, 12.0]])
    landmarks = boxes[:, None, :2].expand(3, 5, 2) + 3
    plan = plan_crop((200, 20), (40, 20), boxes[:1])
    faces = map_faces(plan, Faces(boxes, landmarks))
    assert plan.offset == (2, 0)
    assert faces.boxes.tolist() == [[0, 2, 10, 12], [0] * 4, [0] * 4]
    assert faces.landmarks[0].tolist() == [[3, 5]] * 5
    assert not faces.landmarks[1:].any()


def test_a_box_that_the_crop_cuts_ends_at_the_edge():
    boxes = torch.tensor([[-4.0, -2.0, 10.0, 14.0], [30.0, 8.0, 44.0, 25.0]])
    landmarks = boxes[:, None, :2].expand(2, 5, 2)
    faces = map_faces(plan_crop((40, 20), (40, 20), boxes), Faces(boxes, landmarks))
    assert faces.boxes.tolist() == [[0, 0, 10, 14], [30, 8, 39, 19]]
    assert torch.equal(faces.landmarks, landmarks)


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (50, 50)])
def test_the_reference_square_holds_the_face_and_its_landmarks_follow(size):
    box = [size[0] - 14.0, size[1] - 14.0, size[0] - 3.0, size[1] - 3.0]
    points = [
        [x, y] for x, y in zip((box[0], box[2]) * 2 + (box[0],), (box[1], box[1], box[3], box[3], box[1]), strict=True)
    ]
    entry = {"file": "ref0.png", "box": box, "landmarks": points, "similarity": 1.0}
    fields = picture_fields() | {"json": meta() | {"references": [entry]}, "ref0.png": encode(draw(size, box))}
    out = SampleTransform(56, 80, reference_size=100, num_references=3)(sample_of(fields))
    assert out.references.shape == (3, 3, 100, 100)
    assert out.reference_mask.tolist() == [True, False, False]
    assert not out.references[1:].any()
    found = rectangle_in(out.references[0])
    corners = as_edges(torch.cat([out.reference_landmarks[0, 0], out.reference_landmarks[0, 3]]), 100 / min(size))
    assert (found - corners).abs().max() < 0.5


def test_exif_orientation_is_applied():
    picture = draw((60, 80), [10.0, 20.0, 25.0, 35.0])
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: to be shown rotated by 270 degrees
    buffer = io.BytesIO()
    Image.fromarray(np.rot90(picture).copy()).save(buffer, "PNG", exif=exif)
    fields = {
        **picture_fields(),
        "png": buffer.getvalue(),
        "json": meta(size=(60, 80), boxes=[[10.0, 20.0, 25.0, 35.0]]),
    }
    out = SampleTransform(80, 56, reference_size=16)(sample_of(fields))
    assert (rectangle_in(out.pixels[0]) - as_edges(out.face_boxes[0], 1.0)).abs().max() < 0.5


def test_16_bit_is_scaled_and_transparency_white():
    """Foreign shards hold what prepare would have converted."""
    grey = np.full((60, 80), 32768, np.uint16)
    clear = np.zeros((60, 80, 4), np.uint8)
    pixels = [
        SampleTransform(56, 80, reference_size=16)(sample_of(picture_fields() | {"png": encode(picture)})).pixels
        for picture in (grey, clear)
    ]
    assert pixels[0].unique().tolist() == pytest.approx([128 / 127.5 - 1], rel=1e-3)
    assert pixels[1].unique().tolist() == [1.0]


def test_a_longer_clip_gives_a_window_with_its_own_boxes():
    transform, sample = SampleTransform(56, 80, num_frames=5, reference_size=16), sample_of(video_fields(9))
    starts = set()
    for epoch in range(12):
        out = transform(sample, epoch)
        start = round(float((out.pixels[0, :, :5].mean() + 1) * 127.5 / 20))  # frame i has background 20 i
        starts.add(start)
        plan = plan_crop(
            (80, 60), (80, 56), torch.tensor([[10.0 + 3 * i, 20, 25 + 3 * i, 35] for i in range(start, start + 5)])
        )
        assert torch.allclose(out.face_boxes[:, 0], torch.arange(start, start + 5) * 3 + 10.0 - plan.offset[0])
    assert len(starts) > 2
    fixed = SampleTransform(56, 80, num_frames=5, reference_size=16, random_window=False)
    assert torch.equal(fixed(sample, 0).pixels, fixed(sample, 7).pixels)


def test_draws_depend_on_seed_epoch_and_key_alone():
    draws = {
        name: torch.rand(3, generator=generator_for(*name)).tolist()
        for name in [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")]
    }
    assert len({tuple(v) for v in draws.values()}) == 4
    assert torch.rand(3, generator=generator_for(0, 0, "a")).tolist() == draws[0, 0, "a"]


def test_more_references_than_wanted_are_drawn_anew_each_pass():
    sample = sample_of(picture_fields(num_references=4))
    transform = SampleTransform(56, 80, reference_size=16, num_references=2)
    seen = {tuple(round(float(p.mean()), 3) for p in transform(sample, epoch).references) for epoch in range(16)}
    assert len(seen) > 3
    assert torch.equal(transform(sample, 5).references, transform(sample, 5).references)


# Cached tensors


def latents(num_frames=3, height=7, width=10):
    mean = torch.arange(num_frames * 4 * height * width).reshape(num_frames, 4, height, width).float()
    return save({"mean": mean, "logvar": -mean})


def cached_video(**fields):
    return sample_of(video_fields(9) | {"latents.safetensors": latents()} | fields)


def test_cached_latents_replace_the_decoding():
    out = SampleTransform(56, 80, num_frames=9, reference_size=16)(cached_video(mp4=b"never opened"))
    assert out.pixels is None
    assert out.latent_moments.shape == (3, 8, 7, 10)
    assert torch.equal(out.latent_moments[:, :4], torch.arange(840.0).reshape(3, 4, 7, 10))  # the mean comes first
    assert torch.equal(out.latent_moments[:, :4], -out.latent_moments[:, 4:])
    assert out.face_boxes[:, 2].gt(0).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"height": 48}, r"k0\.latents.*\(3, 4, 7, 10\).*9 frames of 48x80.*\(3, 6, 10\)"),
        ({"num_frames": 5}, r"\(F', h, w\) = \(2, 7, 10\)"),
        ({"flip_probability": 0.5}, "not mirrored"),
        ({"spatial_compression": 4}, r"\(3, 14, 20\)"),
    ],
)
def test_cached_latents_of_another_geometry_end_the_run(options, words):
    sizes = {"height": 56, "width": 80, "num_frames": 9, "reference_size": 16} | options
    with pytest.raises(ValueError, match=words):
        SampleTransform(**sizes)(cached_video())


def test_cached_text_and_face_arrive_as_features():
    text = save({"prompt_embeds": torch.randn(6, 4), "id_token_mask": torch.tensor([0, 1, 1, 0, 0, 0])})
    stored = {
        "last_hidden_state": torch.arange(3.0)[:, None, None].expand(3, 5, 4).contiguous(),
        "penultimate_hidden_state": torch.zeros(3, 5, 4),
        "id_query": torch.arange(3.0)[:, None].expand(3, 7).contiguous(),
    }
    fields = picture_fields(num_references=3) | {"text.safetensors": text, "face.safetensors": save(stored)}
    transform = SampleTransform(56, 80, reference_size=16, num_references=2)
    samples = [transform(sample_of(fields, "a"), 0), transform(sample_of(fields, "b"), 0)]
    batch = collate(samples)
    assert batch.text.prompt_embeds.shape == (2, 6, 4)
    assert batch.text.id_token_mask.tolist() == [[False, True, True, False, False, False]] * 2
    assert batch.face.last_hidden_state.shape == (2, 2, 5, 4)
    assert batch.face.id_query.shape == (2, 2, 7)
    assert torch.equal(batch.face.reference_mask, batch.reference_mask)
    for pictures, features in zip(batch.references, batch.face.id_query[..., 0], strict=True):
        shown = (pictures[:, 1].amax((-1, -2)) + 1) * 127.5 / 60  # reference i is drawn with green 60 i
        assert shown.round().tolist() == features.tolist()


def test_cached_features_for_other_references_end_the_run():
    stored = {n: torch.zeros(2, 5, 4) for n in ("last_hidden_state", "penultimate_hidden_state")}
    fields = picture_fields() | {"face.safetensors": save(stored | {"id_query": torch.zeros(2, 7)})}
    with pytest.raises(ValueError, match=r"face\.safetensors.*1 references"):
        SampleTransform(56, 80, reference_size=16)(sample_of(fields))


def test_a_batch_mixes_no_cached_and_uncached_samples():
    transform = SampleTransform(56, 80, num_frames=9, reference_size=16)
    plain, cached = transform(sample_of(video_fields(9), "plain")), transform(cached_video())
    with pytest.raises(ValueError, match=r"pixels: there for \['plain'\] but not for \['k0'\]"):
        collate([plain, cached])
    text = save({"prompt_embeds": torch.randn(6, 4), "id_token_mask": torch.zeros(6)})
    longer = save({"prompt_embeds": torch.randn(8, 4), "id_token_mask": torch.zeros(8)})
    samples = [
        transform(sample_of(video_fields(9) | {"text.safetensors": t}, k)) for t, k in ((text, "a"), (longer, "b"))
    ]
    with pytest.raises(ValueError, match=r"text\.prompt_embeds: different shapes.*'b': \(8, 4\)"):
        collate(samples)


def test_a_sample_may_stand_twice_in_a_batch():
    sample = SampleTransform(56, 80, reference_size=16)(sample_of(picture_fields()))
    assert collate([sample, sample]).pixels.shape[0] == 2


# Damage


def without(fields, *names):
    return {name: value for name, value in fields.items() if name not in names}


def changed_json(**values):
    return {**picture_fields(), "json": meta() | values}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (picture_fields() | {"png": b"no picture"}, "png cannot be decoded"),
        (picture_fields() | {"png": picture_fields()["png"][:100]}, "png cannot be decoded"),
        (picture_fields() | {"ref0.jpg": picture_fields()["ref0.jpg"][:300]}, r"ref0\.jpg cannot be decoded"),
        (without(picture_fields(), "ref0.jpg"), r"ref0\.jpg is missing"),
        (without(picture_fields(), "png"), "no target"),
        (without(picture_fields(), "txt"), "txt cannot be read"),
        (without(picture_fields(), "json"), "json cannot be used"),
        (picture_fields() | {"txt": b"\xff\xfe\xff"}, "txt cannot be read"),
        (picture_fields() | {"json": '{"width": 80'}, "json cannot be used"),
        (picture_fields() | {"json": "[1]"}, "json cannot be used"),
        (changed_json(faces=[]), "faces of 0 frames"),
        (changed_json(faces=[{"box": BOX[:3], "landmarks": LANDMARKS}]), "box of shape"),
        (changed_json(references=[]), "no reference picture"),
        (changed_json(width=0), "width 0 is no whole number from 1"),
        (changed_json(width=None), "width None is no whole number"),
        (changed_json(height="64"), "height '64' is no whole number"),
        (changed_json(height=60.5), "height 60.5 is no whole number"),
        (changed_json(height=float("inf")), "height inf is no whole number"),
        (changed_json(num_frames=True), "num_frames True is no whole number"),
        (changed_json(faces=[{"box": [*BOX[:3], float("nan")], "landmarks": LANDMARKS}]), "finite numbers"),
        (changed_json(faces=[{"box": BOX, "landmarks": [["1", "2"]] * 5}]), r"landmarks of shape \(5, 2\), type <U1"),
        (changed_json(references=[{"file": "ref0.jpg", "box": [1e300] * 4, "landmarks": LANDMARKS}]), "finite numbers"),
        (changed_json(references=[{"box": BOX, "landmarks": LANDMARKS}]), "KeyError: 'file'"),
        (
            changed_json(references=[{"file": ["a"], "box": BOX, "landmarks": LANDMARKS}]),
            r"file \['a'\] of a reference",
        ),
        (changed_json(references=None), "json cannot be used"),
        (changed_json(cache="t5"), "json cannot be used"),
        (changed_json(width=81), r"measures \(80, 60\)"),
        (picture_fields() | {"text.safetensors": b"short"}, r"text\.safetensors cannot be read"),
        (picture_fields() | {"text.safetensors": save({"other": torch.zeros(1)})}, "lacks 'prompt_embeds'"),
    ],
)
def test_damage_is_named(fields, words):
    with pytest.raises(DamagedSample, match=words):
        SampleTransform(56, 80, reference_size=16)(sample_of(fields))


def test_whole_numbers_may_be_written_as_floats():
    transform = SampleTransform(56, 80, reference_size=16)
    plain, floats = (
        transform(sample_of({**picture_fields(), "json": json.dumps(meta() | sizes)}))
        for sizes in ({}, {"width": 80.0, "height": 60.0, "num_frames": 1.0})
    )
    assert torch.equal(plain.pixels, floats.pixels)


def test_a_name_that_is_not_utf8_is_damage():
    with pytest.raises(DamagedSample, match=r"the name 'caf\\udce9' is not UTF-8"):
        SampleTransform(56, 80, reference_size=16)(sample_of(picture_fields(), key="caf\udce9"))


@pytest.mark.parametrize(
    ("mp4", "words"),
    [
        (b"", "mp4 cannot be decoded"),
        (b"random bytes" * 100, "mp4 cannot be decoded"),
        (video_fields(5)["mp4"], "mp4"),
    ],
)
def test_a_clip_that_cannot_be_decoded_is_named(mp4, words):
    with pytest.raises(DamagedSample, match=words):
        SampleTransform(56, 80, num_frames=9, reference_size=16)(sample_of(video_fields(9) | {"mp4": mp4}))


def test_a_truncated_clip_does_not_take_the_process_down():
    whole = video_fields(9)["mp4"]
    transform = SampleTransform(56, 80, num_frames=9, reference_size=16)
    for part in (0.3, 0.6, 0.9):
        with pytest.raises(DamagedSample, match="mp4"):
            transform(sample_of(video_fields(9) | {"mp4": whole[: int(len(whole) * part)]}))


def test_a_clip_shorter_than_wanted_is_named():
    with pytest.raises(DamagedSample, match="9 frames are fewer than the 13 wanted"):
        SampleTransform(56, 80, num_frames=13, reference_size=16)(sample_of(video_fields(9)))


# Options


@pytest.mark.parametrize(("wrong", "nearest"), [(0, 1), (2, 1), (4, 5), (8, 9), (16, 17), (48, 49)])
def test_frames_must_be_4k_plus_1(wrong, nearest):
    with pytest.raises(ValueError, match=f"num_frames={wrong}: .* nearest is {nearest}"):
        check_num_frames(wrong)


def test_sizes_must_fit_the_vae():
    with pytest.raises(ValueError, match="height=60: the VAE needs a multiple of 8"):
        SampleTransform(60, 80)
    with pytest.raises(ValueError, match="num_references must be at least 1"):
        SampleTransform(56, 80, num_references=0)


def test_the_json_written_by_prepare_is_what_is_read():
    assert json.loads(to_bytes(meta())) == meta()
