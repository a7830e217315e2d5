"""Records of weights: they follow the bytes, and say nothing of what is not there."""

from mm_lightning.provenance import fingerprint


def test_fingerprint_sees_every_block(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(3 << 20))
    before = fingerprint([file])
    assert before == fingerprint([file])
    assert fingerprint([]) == {}
    with file.open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\1")
    assert fingerprint([file]) != before
