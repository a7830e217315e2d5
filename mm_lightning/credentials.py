"""Marks generated files by C2PA content credentials, and reads the marks back.

A signed manifest inside the file says that a trained model made it. Whoever signs gives a key and a certificate that
others trust; without one, a certificate is made on this machine, which proves nothing but that the file is unchanged.
"""

from __future__ import annotations

import datetime
import json
import os
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import av
import c2pa
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from filelock import FileLock
from PIL import Image

from mm_lightning.files import temporary_path

# IPTC's word for media that a trained model made from nothing recorded
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
PACKAGE = "magicmirror-lightning"
LOCAL_NAME = "MagicMirror, test certificate of this machine"
ALGORITHMS = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
LIFETIME = datetime.timedelta(days=3650)


class Signing(NamedTuple):
    """What a file is signed with."""

    certificates: bytes  # PEM, the signer's first, then those above it
    key: bytes  # PEM, PKCS#8


class Mark(NamedTuple):
    """What a file says of its making."""

    comment: str | None  # plain metadata
    signed: bool  # a C2PA manifest is there
    intact: bool  # and fits file and signature
    generated: bool  # and says that a trained model made it
    signer: str | None
    trusted: bool  # whether the signer's certificate is on a trust list; never for one made here
    problems: tuple[str, ...]


# Whose signature ------------------------------------------------------------------------------------------------------


def read_signing(key: str | Path | None = None, certificates: str | Path | None = None) -> Signing:
    """The signer's files, or those made on this machine, when first needed.

    Args:
        key: PEM, an elliptic-curve key (P-256, P-384, P-521) without password.
        certificates: PEM chain, the signer's first.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: one of the two without the other, a key of another kind, or files that cannot sign.
    """
    if (key is None) != (certificates is None):
        raise ValueError("--signing-key and --signing-certificates go together: give both or neither.")
    if key is None or certificates is None:
        return local_signing()
    for path in (key, certificates):
        if not Path(path).is_file():
            raise FileNotFoundError(f"No such file for signing: {path}.")
    signing = Signing(Path(certificates).read_bytes(), Path(key).read_bytes())
    try_signing(signing)
    return signing


def try_signing(signing: Signing) -> None:
    """Sign a picture of one pixel: what is wrong is told now, not after an hour of generating.

    Raises:
        ValueError: the certificates are not the key's, or not for signing content.
    """
    with TemporaryDirectory() as folder:
        picture = Path(folder) / "pixel.png"
        Image.new("RGB", (1, 1)).save(picture)
        try:
            sign_file(picture, signing, "pixel")
            mark = read_mark(picture)
        except ValueError as error:
            raise ValueError(f"Nothing can be signed with this key and these certificates: {error}") from error
    if not mark.intact:
        raise ValueError(f"Signatures with this key and these certificates are not valid: {', '.join(mark.problems)}.")


def local_signing() -> Signing:
    """Key and certificates of this machine, under XDG_CACHE_HOME; only its owner can read the key."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / PACKAGE / "signing"
    key_file, certificates_file = folder / "key.pem", folder / "certificates.pem"
    if not certificates_file.is_file():  # they are written last
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # parts that start together would mix two pairs
            if not certificates_file.is_file():
                signing = make_certificates()
                write_private(key_file, signing.key)
                write_private(certificates_file, signing.certificates)
    return Signing(certificates_file.read_bytes(), key_file.read_bytes())


def write_private(path: Path, data: bytes) -> None:
    partial = temporary_path(path)
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
    partial.replace(path)


def make_certificates() -> Signing:
    """A root of our own and a signer below it, as C2PA's certificate profile wants them (specification 2.2, 14.5)."""
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root_name, name = (distinguished_name(role) for role in ("root", "signer"))
    root = build_certificate(root_name, root_key, root_name, root_key, is_root=True)
    signer = build_certificate(name, key, root_name, root_key, is_root=False)
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Signing(signer.public_bytes(pem) + root.public_bytes(pem), private)


def distinguished_name(role: str) -> x509.Name:
    parts = {NameOID.ORGANIZATION_NAME: LOCAL_NAME, NameOID.COMMON_NAME: role}
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in parts.items()])


def build_certificate(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    is_root: bool,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
         "decipher_only"), False,
    )  # fmt: skip
    usage |= {"digital_signature": not is_root, "key_cert_sign": is_root, "crl_sign": is_root}
    builder = (
        x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.BasicConstraints(ca=is_root, path_length=0 if is_root else None), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if not is_root:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def algorithm_of(signing: Signing) -> c2pa.C2paSigningAlg:
    try:
        key = serialization.load_pem_private_key(signing.key, password=None)
    except TypeError as error:
        raise ValueError("The signing key is encrypted: give one without password.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in ALGORITHMS:
        raise ValueError(f"The signing key is none of the curves {', '.join(ALGORITHMS)}: make one of these.")
    return c2pa.C2paSigningAlg[ALGORITHMS[key.curve.name]]


# Marking and reading --------------------------------------------------------------------------------------------------


def sign_file(path: Path, signing: Signing, title: str) -> None:
    """Put a manifest into an mp4, JPEG or PNG; the file is replaced only once that has worked.

    Args:
        title: of the work, such as the file's name.

    Raises:
        ValueError: the file cannot carry a manifest, or the certificate is not accepted.
    """
    generator = {"name": PACKAGE, "version": version(PACKAGE)}
    created = {"action": "c2pa.created", "digitalSourceType": SOURCE_TYPE, "softwareAgent": generator}
    assertions = [{"label": "c2pa.actions.v2", "data": {"actions": [created]}}]
    manifest = {"claim_generator_info": [generator], "title": title, "assertions": assertions}
    signed = temporary_path(path.with_suffix("")).with_suffix(path.suffix)  # the ending tells the format
    signed.unlink(missing_ok=True)
    info = c2pa.C2paSignerInfo(algorithm_of(signing), signing.certificates, signing.key, None)
    try:
        with c2pa.Signer.from_info(info) as signer, c2pa.Builder(manifest) as builder:
            builder.sign_file(path, signed, signer)
    except c2pa.C2paError as error:
        signed.unlink(missing_ok=True)
        raise ValueError(f"{path} cannot be signed: {error}") from error
    signed.replace(path)


def read_mark(path: str | Path) -> Mark:
    """What a file's metadata and its manifest say.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no file that could carry a mark.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No such file: {path}.")
    comment = read_comment(path)
    try:
        with c2pa.Reader(path) as reader:
            store, state = json.loads(reader.json()), reader.get_validation_state()
    except c2pa.C2paError as error:
        if "ManifestNotFound" in str(error):
            return Mark(comment, False, False, False, None, False, ())
        raise ValueError(f"{path}: {error}") from error
    manifest = store["manifests"][store["active_manifest"]]
    problems = tuple(status["code"] for status in store.get("validation_status", ()))
    return Mark(
        comment=comment,
        signed=True,
        intact=state in ("Valid", "Trusted"),
        generated=SOURCE_TYPE in source_types(manifest),
        signer=manifest.get("signature_info", {}).get("issuer"),
        trusted=state == "Trusted",
        problems=problems,
    )


def source_types(manifest: dict) -> set[str]:
    """Digital source types of all actions of a manifest."""
    actions = [a for a in manifest["assertions"] if a["label"].startswith("c2pa.actions")]
    return {entry.get("digitalSourceType", "") for assertion in actions for entry in assertion["data"]["actions"]}


def read_comment(path: Path) -> str | None:
    """The plain comment of a picture or a video, None without one."""
    try:
        if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".gif"):
            with Image.open(path) as picture:
                comment = picture.info.get("comment") or picture.info.get("Comment")
            return comment.decode(errors="replace") if isinstance(comment, bytes) else comment
        with av.open(str(path), metadata_errors="replace") as container:
            return container.metadata.get("comment")
    except (OSError, av.FFmpegError) as error:
        raise ValueError(f"{path} is no video or picture that can be read ({error}).") from error
