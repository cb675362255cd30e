"""Ed25519 signatures of bundles: make a pair of keys, sign a manifest, check a bundle against trusted keys.

A signature says that whoever holds the private key signed exactly this manifest, and the manifest holds the digest of
every other entry. It says neither that the bundle is good nor that it is the newest.

Keys are PEM files as OpenSSL writes them. `cryptography` is needed here and nowhere else; without it, a bundle that
must be checked is refused, never let through.
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
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError, require

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_ID_LENGTH = 16


def _library(purpose: str) -> tuple[Any, Any]:
    """The modules ``ed25519`` and ``serialization`` of `cryptography`."""
    package = "cryptography.hazmat.primitives"
    names = ("cryptography", f"{package}.asymmetric.ed25519", f"{package}.serialization")
    return tuple(require(name, "device", purpose, install="cryptography") for name in names)[1:]


def new_key(folder: str | Path, name: str) -> tuple[Path, Path]:
    """Make a pair of keys: ``NAME.key``, private and only for its owner to read, and ``NAME.pub``.

    Args:
        folder: is created when it is missing.
        name: of both files, without a suffix.

    Returns:
        The paths of the private and of the public key.

    Raises:
        InputError: a file of that name exists, and is not overwritten; or the name cannot be a file's.
        EnvironmentUnfitError: `cryptography` is missing, or the folder cannot be written to.
    """
    ed25519, pem = _library("make keys")
    if not _NAME.fullmatch(name):
        raise InputError(f"the name of a key has 1 to 64 characters of A-Z a-z 0-9 . _ -, but is {name!r}")
    folder = Path(folder)
    files.make_directory(folder)
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    for path in (private, public):
        if path.exists() or path.is_symlink():
            raise InputError(f"{path} exists, and a key is not overwritten; choose another name")
    key = ed25519.Ed25519PrivateKey.generate()
    secret = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
    shown = key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    _create(private, secret, 0o600)
    try:
        _create(public, shown, 0o644)
    except BaseException:
        private.unlink()
        raise
    files.fsync_directory(folder)
    return private, public


def _create(path: Path, data: bytes, mode: int) -> None:
    """A new file with this mode from its first byte. `files` would replace an old one, and make it readable to all."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except FileExistsError as error:
        raise InputError(f"{path} exists, and a key is not overwritten; choose another name") from error
    except OSError as error:
        raise EnvironmentUnfitError(f"cannot write {path}: {error.strerror or error}; choose another folder") from error


def load_private(path: str | Path) -> Ed25519PrivateKey:
    """Read a private key.

    Raises:
        InputError: no such file, no Ed25519 key in it, protected by a password, or others may read it.
        EnvironmentUnfitError: `cryptography` is missing.
    """
    ed25519, pem = _library("sign")
    data = files.read_bytes(Path(path))
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if mode & 0o077:
        raise InputError(
            f"the private key {path} may be read by others (mode {mode:04o}, but 0600 is needed) and is not used; "
            f"run: chmod 600 {path}, and make a new key if others could have read it"
        )
    try:
        key = pem.load_pem_private_key(data, password=None)
    except TypeError as error:
        raise InputError(f"the private key {path} has a password; only keys without one are used") from error
    except Exception as error:  # ValueError, and types of the library that say that an algorithm is unknown
        raise InputError(f"{path} holds no private key in PEM; make one with: ssd-edge keys new NAME") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise InputError(f"{path} holds a key of another kind than Ed25519; make one with: ssd-edge keys new NAME")
    return key


def load_public(path: str | Path) -> Ed25519PublicKey:
    """Read a public key.

    Raises:
        InputError: no such file, no Ed25519 key in it, or a private key.
        EnvironmentUnfitError: `cryptography` is missing.
    """
    ed25519, pem = _library("check a signature")
    data = files.read_bytes(Path(path))
    if b"PRIVATE KEY-----" in data:
        raise InputError(f"{path} holds a private key, which stays where it was made; give its NAME.pub instead")
    try:
        key = pem.load_pem_public_key(data)
    except Exception as error:  # ValueError, and types of the library that say that an algorithm is unknown
        raise InputError(f"{path} holds no public key in PEM; make one with: ssd-edge keys new NAME") from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise InputError(f"{path} holds a key of another kind than Ed25519; make one with: ssd-edge keys new NAME")
    return key


def key_id(public: Ed25519PublicKey) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the 32 bytes of a public key."""
    return hashlib.sha256(public.public_bytes_raw()).hexdigest()[:_ID_LENGTH]


def signer(path: str | Path) -> Callable[[bytes], bytes]:
    """What `bundle.pack` takes as `sign`: the bytes of manifest.json → those of manifest.sig; raises `load_private`."""
    key = load_private(path)
    identity = key_id(key.public_key())
    return lambda manifest: Signature(identity, key.sign(manifest)).to_bytes()


def trusted(folder: str | Path) -> dict[str, Ed25519PublicKey]:
    """Key id → key, of all ``*.pub`` in a folder; none when there is no such folder.

    Raises:
        InputError: one of them holds no public key. It is not skipped: a key that was trusted is missing.
        EnvironmentUnfitError: there are keys, but `cryptography` is missing.
    """
    keys = [load_public(path) for path in sorted(Path(folder).glob("*.pub"))]
    return {key_id(key): key for key in keys}


def check(bundle: Bundle, keys: Mapping[str, Ed25519PublicKey]) -> str:
    """The id of the key that signed a bundle, when it is one of these.

    Args:
        bundle: that `bundle.read` has made.
        keys: the trusted ones, by id; see `trusted`.

    Raises:
        BundleRefusedError: not signed, signed with another key, or the signature is wrong.
        EnvironmentUnfitError: `cryptography` is missing.
    """
    require("cryptography", "device", "check a signature")
    from cryptography.exceptions import InvalidSignature

    name, known = bundle.manifest["name"], ", ".join(sorted(keys)) or "no key"
    found = bundle.signature
    if found is None:
        raise BundleRefusedError(
            f"the bundle '{name}' is not signed, but must be by {known}; sign it: ssd-edge deploy … --sign NAME.key"
        )
    if found.key not in keys:
        raise BundleRefusedError(
            f"the bundle '{name}' is signed with the key {found.key}, but trusted is {known}; get it from whom you "
            "trust, or trust that key: ssd-edge device trust NAME.pub"
        )
    try:
        keys[found.key].verify(found.value, bundle.entries[MANIFEST])
    except InvalidSignature as error:
        raise BundleRefusedError(
            f"the signature of the bundle '{name}' is not that of its manifest by {found.key}: one of them was "
            "changed; get the bundle again from whom you trust"
        ) from error
    return found.key
