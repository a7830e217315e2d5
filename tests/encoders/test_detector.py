"""Detectors as a program with several threads uses them; what they find is tested with those who use it."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT

FROM_FOUR_THREADS = """
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from skimage.data import astronaut
from mm_lightning.encoders.detector import DlibDetector

detector = DlibDetector()
pictures = [astronaut()[: 256 + 8 * i, 64 - 2 * i : 320 + 8 * i] for i in range(8)]
alone = [detector(picture, 40) for picture in pictures]
assert all(len(faces) == 1 for faces in alone)
with ThreadPoolExecutor(4) as pool:
    found = list(pool.map(detector, 10 * pictures, 80 * [40]))
for (face,), (wanted,) in zip(found, 10 * alone, strict=True):
    assert face.score == wanted.score
    assert np.array_equal(face.landmarks, wanted.landmarks)
print("the same faces")
"""


def test_threads_share_a_dlib_detector():
    """In a process of its own, which dlib would take down."""
    run = subprocess.run(
        [sys.executable, "-c", FROM_FOUR_THREADS], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (run.returncode, run.stdout) == (0, "the same faces\n"), run.stderr[-2000:]
