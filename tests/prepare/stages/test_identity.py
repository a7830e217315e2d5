import hashlib

import numpy as np
import pytest
import torch

from mm_lightning.encoders.detector import RECOGNIZER_FILE, DetectedFace, DlibFaceDetector, model_path
from mm_lightning.prepare.stages.identity import EmbedIdentity, cosine, one_thread, same_person, spread


def test_embedding_is_dlibs_own(person):
    """dlib aligns by 68 points, the port by five of them: close, not equal."""
    [face] = person.meta["faces"]
    detected = DetectedFace(np.array(face["box"]), np.array(face["landmarks"]), face["score"])
    own = DlibFaceDetector().embed(person.frames[0], detected)
    assert np.linalg.norm(own - person.embedding) < 0.3  # 0.6 is another person
    assert person.embedding.dtype == np.float32
    assert person.embedding.shape == (128,)


def test_recogniser_is_recorded(person):
    digest = hashlib.sha256(model_path(RECOGNIZER_FILE).read_bytes()).hexdigest()
    assert person.meta["recognizer"] == {"name": "dlib", "version": f"sha256:{digest[:16]}"}


def test_clip_has_the_mean_of_its_frames(window):
    faces = list(window.meta["faces"])
    shown = [i for i, face in enumerate(faces) if face]
    whole = EmbedIdentity(num_frames=len(shown))(window)[0].embedding
    singles = []
    for i in shown:
        window.meta["faces"] = [face if j == i else None for j, face in enumerate(faces)]
        singles.append(EmbedIdentity(num_frames=1)(window)[0].embedding)
    assert np.allclose(np.mean(singles, axis=0), whole, atol=1e-6)
    assert np.std(singles, axis=0).max() > 1e-3


def test_stages_in_a_wrong_order(person):
    del person.meta["faces"]
    with pytest.raises(ValueError, match="put DetectFaces or TrackFace before"):
        EmbedIdentity()(person)


def test_missing_recogniser_is_told_at_construction(tmp_path):
    with pytest.raises(FileNotFoundError, match="buffalo_l"):
        EmbedIdentity("buffalo_l", root=str(tmp_path))


def test_one_thread_is_given_back():
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_spread():
    assert spread(list(range(9)), 3) == [1, 4, 7]
    assert spread([3, 5, 7, 9, 11], 1) == [7]
    assert spread([3, 5, 7], 5) == [3, 5, 7]
    assert spread([], 2) == []
    assert len(set(spread(list(range(100)), 7))) == 7


def test_cosine_and_thresholds():
    assert cosine(np.array([1.0, 1.0]), np.array([1.0, 0.0])) == pytest.approx(2**-0.5)
    assert same_person("dlib") > same_person("buffalo_l/w600k_r50") == 0.65
