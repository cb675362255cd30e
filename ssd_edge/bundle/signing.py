"""Ed25519 signatures of bundles: create key pairs, sign manifests, check bundles against trusted keys.

A signature proves that the holder of the private key signed exactly this manifest, which contains the digest of every
other entry. It does not say that the bundle is good or that it is the newest.

Keys are PEM files as OpenSSL writes them. Without `cryptography`, a bundle whose signature must be checked is refused.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssd_edge import files
from ssd_edge.bundle.format import MANIFEST, Bundle, Signature
from ssd_edge.errors import BundleRefusedError, InputError, require

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_ID_LENGTH = 16


def _library(purpose: str) -> tuple[Any, Any]:
    """Import the modules ``ed25519`` and ``serialization`` of `cryptography`."""
    package = "cryptography.hazmat.primitives"
    names = ("cryptography", f"{package}.asymmetric.ed25519", f"{package}.serialization")
    _, ed25519, serialization = (require(name, "device", purpose, install="cryptography") for name in names)
    return ed25519, serialization


def new_key(folder: str | Path, name: str) -> tuple[Path, Path]:
    """Create a key pair: the private ``NAME.key``, readable only by its owner, and ``NAME.pub``.

    Args:
        folder: Folder of the files, created if it is missing.
        name: Name of both files, without a suffix.

    Returns:
        Paths of the private and of the public key.

    Raises:
        InputError: A file of that name exists, or the name is not allowed.
        EnvironmentUnfitError: `cryptography` is missing, or the folder is not writable.
    """
    ed25519, pem = _library("make keys")
    if not _NAME.fullmatch(name):
        raise InputError(f"the name of a key must have 1 to 64 characters of A-Z a-z 0-9 . _ -, but is {name!r}")
    folder = Path(folder)
    files.make_directory(folder)
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    for path in (private, public):
        if files.Tree(folder).status(path):
            raise InputError(f"{path} exists, and keys are never overwritten; choose another name")
    key = ed25519.Ed25519PrivateKey.generate()
    secret = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
    shown = key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    _create(private, secret, 0o600)
    try:
        _create(public, shown, 0o644)
    except BaseException:
        private.unlink(missing_ok=True)
        raise
    files.fsync_directory(folder)
    return private, public


def _create(path: Path, data: bytes, mode: int) -> None:
    """Create a file with its final mode. `files` would replace an existing one and make it readable by everyone."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except FileExistsError as error:
        raise InputError(f"{path} exists, and keys are never overwritten; choose another name") from error
    except OSError as error:
        raise files.unfit(path, error, "write") from error


def load_private(path: str | Path) -> Ed25519PrivateKey:
    """Read a private key.

    Raises:
        InputError: The file does not exist, is not an unencrypted Ed25519 key, or is readable by others.
        EnvironmentUnfitError: `cryptography` is missing.
    """
    ed25519, pem = _library("sign")
    data = files.read_bytes(Path(path))
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if mode & 0o077:
        raise InputError(
            f"the private key {path} is readable by others (mode {mode:04o}, but 0600 is required); "
            f"run: chmod 600 {path}, and create a new key if others may have read it"
        )
    try:
        loaded = pem.load_pem_private_key(data, password=None)
    except TypeError as error:
        raise InputError(
            f"the private key {path} has a password; only keys without a password are supported"
        ) from error
    except Exception as error:  # ValueError, and the library's own types for unknown algorithms
        raise InputError(
            f"{path} does not contain a private key in PEM format; create one with: ssd-edge keys new NAME"
        ) from error
    if not isinstance(loaded, ed25519.Ed25519PrivateKey):
        raise InputError(f"{path} contains a key that is not Ed25519; create one with: ssd-edge keys new NAME")
    key: Ed25519PrivateKey = loaded
    return key


def load_public(path: str | Path) -> Ed25519PublicKey:
    """Read a public key.

    Raises:
        InputError: The file does not exist, is not an Ed25519 key, or is a private key.
        EnvironmentUnfitError: `cryptography` is missing.
    """
    return parse_public(files.read_bytes(Path(path)), str(path))


def parse_public(data: bytes, path: str) -> Ed25519PublicKey:
    """Parse the content of a public key's file; `path` is for messages. Raises as `load_public`."""
    ed25519, pem = _library("check a signature")
    if b"PRIVATE KEY-----" in data:
        raise InputError(f"{path} contains a private key, which must stay where it was created; use NAME.pub instead")
    try:
        loaded = pem.load_pem_public_key(data)
    except Exception as error:  # ValueError, and the library's own types for unknown algorithms
        raise InputError(
            f"{path} does not contain a public key in PEM format; create one with: ssd-edge keys new NAME"
        ) from error
    if not isinstance(loaded, ed25519.Ed25519PublicKey):
        raise InputError(f"{path} contains a key that is not Ed25519; create one with: ssd-edge keys new NAME")
    key: Ed25519PublicKey = loaded
    return key


def key_id(public: Ed25519PublicKey) -> str:
    """Return the id of a public key: the first 16 hexadecimal digits of the SHA-256 of its 32 bytes."""
    return hashlib.sha256(public.public_bytes_raw()).hexdigest()[:_ID_LENGTH]


def signer(path: str | Path) -> Callable[[bytes], bytes]:
    """Return the `sign` argument of `bundle.pack` for a private key; raises like `load_private`."""
    key = load_private(path)
    identity = key_id(key.public_key())
    return lambda manifest: Signature(identity, key.sign(manifest)).to_bytes()


def trusted(folder: str | Path) -> dict[str, Ed25519PublicKey]:
    """Return all keys in the ``*.pub`` files of a folder by id; empty if the folder does not exist.

    Raises:
        InputError: A file does not contain a public key. Skipping it would silently drop a trusted key.
        EnvironmentUnfitError: The folder cannot be listed, or there are keys, but `cryptography` is missing.
    """
    keys = [load_public(path) for path in files.list_folder(Path(folder)) if path.suffix == ".pub"]
    return {key_id(key): key for key in keys}


def check(bundle: Bundle, keys: Mapping[str, Ed25519PublicKey]) -> str:
    """Check the signature of a bundle and return the id of the key that signed it.

    Args:
        bundle: Result of `bundle.read`.
        keys: Trusted keys by id, see `trusted`.

    Raises:
        BundleRefusedError: The bundle is unsigned or signed with another key, or the signature is invalid.
        EnvironmentUnfitError: `cryptography` is missing.
    """
    require("cryptography", "device", "check a signature")
    from cryptography.exceptions import InvalidSignature

    name, known = bundle.manifest["name"], ", ".join(sorted(keys))
    found = bundle.signature
    if found is None:
        raise BundleRefusedError(
            f"the bundle '{name}' is not signed, but must be signed by {known or 'a trusted key'}; "
            "sign it with: ssd-edge deploy … --sign NAME.key"
        )
    if found.key not in keys:
        raise BundleRefusedError(
            f"the bundle '{name}' is signed with the key {found.key}, but trusted keys are: {known or 'none'}; get it "
            "from a trusted source, or trust that key: ssd-edge device trust NAME.pub"
        )
    try:
        keys[found.key].verify(found.value, bundle.entries[MANIFEST])
    except InvalidSignature as error:
        raise BundleRefusedError(
            f"the signature of the bundle '{name}' by {found.key} does not match its manifest: one of them was "
            "changed; get the bundle again from a trusted source"
        ) from error
    return found.key
