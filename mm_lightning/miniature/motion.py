"""What people do: smooth curves of anny's 52 facial actions, the head's pose, the camera, light and background."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Order of anny's `facial_action_labels` (ARKit's names).
ACTIONS = (
    "browDownLeft", "browDownRight", "browInnerUp", "browOuterUpLeft", "browOuterUpRight", "cheekPuff",
    "cheekSquintLeft", "cheekSquintRight", "eyeBlinkLeft", "eyeBlinkRight", "eyeLookDownLeft", "eyeLookDownRight",
    "eyeLookInLeft", "eyeLookInRight", "eyeLookOutLeft", "eyeLookOutRight", "eyeLookUpLeft", "eyeLookUpRight",
    "eyeSquintLeft", "eyeSquintRight", "eyeWideLeft", "eyeWideRight", "jawForward", "jawLeft", "jawOpen", "jawRight",
    "mouthClose", "mouthDimpleLeft", "mouthDimpleRight", "mouthFrownLeft", "mouthFrownRight", "mouthFunnel",
    "mouthLeft", "mouthLowerDownLeft", "mouthLowerDownRight", "mouthPressLeft", "mouthPressRight", "mouthPucker",
    "mouthRight", "mouthRollLower", "mouthRollUpper", "mouthShrugLower", "mouthShrugUpper", "mouthSmileLeft",
    "mouthSmileRight", "mouthStretchLeft", "mouthStretchRight", "mouthUpperUpLeft", "mouthUpperUpRight",
    "noseSneerLeft", "noseSneerRight", "tongueOut",
)  # fmt: skip
COLUMN = {name: column for column, name in enumerate(ACTIONS)}
NAMES = ("neutral", "smile", "talk", "frown", "surprise", "blink", "look_around", "turn_head", "nod")
LIGHTS = ("frontal", "left", "right", "warm", "cool")
BACKGROUNDS = ("grey", "white", "blue", "green", "red", "yellow")
MAX_HEAD = (25.0, 12.0, 8.0)  # yaw, pitch, roll in degrees
MAX_SHIFT, MAX_ZOOM = 3 / 64, 0.08
# A photo with closed eyes is thrown away, and a face network takes it for somebody else.
STILL_BLINK = 0.4
# Expressions exclude each other, and what the head does excludes what else it does.
FACES, EYES, HEADS = ("smile", "talk", "frown", "surprise"), ("blink", "look_around"), ("turn_head", "nod")
POSES = {
    "smile": {"mouthSmile": 0.85, "cheekSquint": 0.35, "mouthUpperUp": 0.25, "eyeSquint": 0.1, "mouthDimple": 0.3},
    "frown": {"browDown": 0.9, "mouthFrown": 0.8, "noseSneer": 0.25, "eyeSquint": 0.15, "mouthShrugLower": 0.3},
    "surprise": {"browInnerUp": 0.9, "browOuterUp": 0.8, "eyeWide": 0.8, "jawOpen": 0.45, "mouthFunnel": 0.25},
}


@dataclass(frozen=True)
class Performance:
    """F frames of one person.

    Attributes:
        actions: (F, 52) float32 in [0, 1], columns as ACTIONS.
        head: (F, 3) float32, yaw, pitch and roll in degrees. Positive yaw turns towards the viewer's right, positive
            pitch up, positive roll clockwise as seen by the viewer.
        camera: (F, 3) float32: how far the head moves right and down, as a fraction of the frame; zoom, where 0.05
            shows it 5 % larger.
        light, background: of LIGHTS, BACKGROUNDS.
        names: what is done, one or two of NAMES.
    """

    actions: np.ndarray
    head: np.ndarray
    camera: np.ndarray
    light: str
    background: str
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        frames = len(self.actions)
        shapes = [(self.actions, (frames, len(ACTIONS))), (self.head, (frames, 3)), (self.camera, (frames, 3))]
        if any(array.shape != shape for array, shape in shapes):
            found = [array.shape for array, _ in shapes]
            raise ValueError(f"actions, head and camera must be (F, {len(ACTIONS)}), (F, 3) and (F, 3), got {found}")
        if self.light not in LIGHTS or self.background not in BACKGROUNDS:
            raise ValueError(
                f"light {self.light!r} must be one of {LIGHTS}, background {self.background!r} one of {BACKGROUNDS}"
            )

    @property
    def num_frames(self) -> int:
        return len(self.actions)


def sample_still(rng: np.random.Generator) -> Performance:
    """One held moment of a person who does one or two things."""
    clip = sample_clip(rng, num_frames=17)
    # Where an action is at its strongest: the middle of a clip for poses, anywhere for what moves.
    frame = strongest_frame(clip) if rng.random() < 0.75 else int(rng.integers(clip.num_frames))
    part = slice(frame, frame + 1)
    actions = clip.actions[part].copy()
    blinks = [COLUMN["eyeBlinkLeft"], COLUMN["eyeBlinkRight"]]
    actions[:, blinks] = actions[:, blinks].clip(max=STILL_BLINK)
    return Performance(actions, clip.head[part], clip.camera[part], clip.light, clip.background, clip.names)


def strongest_frame(clip: Performance) -> int:
    """The frame that shows most of what the clip is named for."""
    return int((np.abs(clip.actions).sum(1) + np.abs(clip.head).sum(1) / 15).argmax())


def sample_clip(rng: np.random.Generator, num_frames: int = 17, fps: float = 8.0) -> Performance:
    """A performance of one or two things over `num_frames`.

    Raises:
        ValueError: fewer than one frame, or a rate that is not positive.
    """
    if num_frames < 1 or fps <= 0:
        raise ValueError(f"num_frames must be 1 or more and fps positive, got {num_frames} and {fps}")
    names = sample_names(rng)
    times = np.arange(num_frames) / fps
    actions, head = np.zeros((num_frames, len(ACTIONS))), base_pose(times, rng)
    for name in names:
        actions = np.maximum(actions, act(name, times, rng))
        head = head + move_head(name, times, rng)
    limits = np.array(MAX_HEAD)
    return Performance(
        actions=actions.clip(0, 1).astype(np.float32),
        head=head.clip(-limits, limits).astype(np.float32),
        camera=drift(times, rng).astype(np.float32),
        light=str(rng.choice(LIGHTS)),
        background=str(rng.choice(BACKGROUNDS)),
        names=names,
    )


def sample_names(rng: np.random.Generator) -> tuple[str, ...]:
    """One or two of NAMES that go together, in the order of NAMES."""
    first = str(rng.choice(NAMES))
    others = [name for group in (FACES, EYES, HEADS) if first not in group for name in group]
    if first == "neutral" or rng.random() < 0.5:
        return (first,)
    return tuple(sorted((first, str(rng.choice(others))), key=NAMES.index))


def base_pose(times: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Where the head points without any intent: (F, 3), nearly still."""
    offset = rng.normal(0, (4.5, 2.0, 2.0)).clip((-9, -4, -4), (9, 4, 4))
    sway = rng.normal(0, (1.0, 0.7, 0.5))
    return offset + sway * np.sin(2 * np.pi * (0.3 * times[:, None] + rng.uniform(size=3)))


def drift(times: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The camera: a start and a slow straight way from it, (F, 3)."""
    limits = np.array([MAX_SHIFT, MAX_SHIFT, MAX_ZOOM])
    start, speed = rng.uniform(-0.8, 0.8, 3) * limits, rng.normal(0, 0.12, 3) * limits
    return (start + speed * times[:, None]).clip(-limits, limits)


def act(name: str, times: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What the face does, (F, 52)."""
    if name in POSES:
        return pose(POSES[name], hold(times, rng) * rng.uniform(0.75, 1.1))
    makers: dict[str, Callable] = {"talk": talk, "blink": blink, "look_around": look_around}
    return makers[name](times, rng) if name in makers else pose({}, times)


def pose(strengths: dict[str, float], curve: np.ndarray) -> np.ndarray:
    """Actions of both sides that follow one curve (F,) -> (F, 52)."""
    actions = np.zeros((len(curve), len(ACTIONS)))
    for name, strength in strengths.items():
        for side in ("", "Left", "Right"):
            if name + side in COLUMN:
                actions[:, COLUMN[name + side]] = strength * curve
    return actions


def hold(times: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Up, stay, and sometimes down again: (F,) in [0, 1]."""
    start, rise = rng.uniform(-0.4, 0.5), rng.uniform(0.4, 0.7)
    end = rng.uniform(1.3, 3.0)
    return smoothstep((times - start) / rise) * (1 - smoothstep((times - end) / rise))


def smoothstep(x: np.ndarray) -> np.ndarray:
    x = x.clip(0, 1)
    return x * x * (3 - 2 * x)


def talk(times: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Syllables: the jaw opens two to three times a second, and the lips change shape more slowly."""
    syllables = wave(times, rng.uniform(2.0, 2.8), rng) * (0.65 + 0.35 * wave(times, 0.7, rng))
    rounded, wide = wave(times, rng.uniform(0.8, 1.3), rng), wave(times, rng.uniform(0.8, 1.3), rng)
    parts = [({"jawOpen": 0.5, "mouthLowerDown": 0.3}, syllables), ({"mouthUpperUp": 0.2}, syllables)]
    parts += [({"mouthFunnel": 0.4, "mouthPucker": 0.25}, rounded), ({"mouthStretch": 0.35}, wide * (1 - rounded))]
    return sum(pose(strengths, curve) for strengths, curve in parts)


def wave(times: np.ndarray, frequency: float, rng: np.random.Generator) -> np.ndarray:
    """(F,) in [0, 1]."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * (frequency * times + rng.uniform()))


def blink(times: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Slow blinks, about a second apart."""
    first, pause = rng.uniform(0.2, 0.7), rng.uniform(0.9, 1.3)
    phase = np.abs((times - first + pause / 2) % pause - pause / 2)
    return pose({"eyeBlink": 1.0}, 1 - smoothstep((phase - 0.08) / 0.2))


def look_around(times: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The eyes go from side to side, and a little up and down."""
    angle = 2 * np.pi * (rng.uniform(0.4, 0.6) * times + rng.uniform())
    return gaze(np.sin(angle), 0.4 * np.sin(1.3 * angle + rng.uniform(0, 6)))


def gaze(side: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Where both eyes look, (F,) each in [-1, 1], towards the person's left and up -> (F, 52)."""
    left, right, high, low = side.clip(0), (-side).clip(0), up.clip(0), (-up).clip(0)
    curves = {"OutLeft": left, "InRight": left, "InLeft": right, "OutRight": right}
    curves |= {f"{name}{eye}": curve for name, curve in (("Up", high), ("Down", low)) for eye in ("Left", "Right")}
    actions = np.zeros((len(side), len(ACTIONS)))
    for name, curve in curves.items():
        actions[:, COLUMN[f"eyeLook{name}"]] = curve
    return actions


def move_head(name: str, times: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What the head does, (F, 3) degrees to add."""
    head = np.zeros((len(times), 3))
    if name == "turn_head":
        side, frequency = rng.choice([-1, 1]), rng.uniform(0.25, 0.4)
        head[:, 0] = side * rng.uniform(11, 18) * np.sin(2 * np.pi * (frequency * times + rng.uniform(-0.1, 0.25)))
    elif name == "nod":
        head[:, 1] = rng.uniform(6, 9) * np.sin(2 * np.pi * (rng.uniform(0.7, 1.0) * times + rng.uniform()))
    return head
