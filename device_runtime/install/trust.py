"""Trusted keys of a device.

::

    ROOT/trusted/<key id>.pub      public keys; with at least one, unsigned bundles are refused
"""

from __future__ import annotations

from pathlib import Path

from ssd_edge import files
from ssd_edge.bundle import Bundle, signing
from ssd_edge.errors import InputError

TRUSTED = "trusted"  # folder in a root


def keys(root: str | Path) -> list[Path]:
    """Return the files of the trusted keys."""
    return sorted((Path(root) / TRUSTED).glob("*.pub"))


def check_signature(root: str | Path, opened: Bundle) -> str | None:
    """Return the id of the trusted key that signed a bundle, or None if no key is trusted.

    Raises:
        BundleRefusedError: No trusted key signed the bundle.
        EnvironmentUnfitError: A key is trusted, but `cryptography` is not installed.
    """
    return signing.check(opened, signing.trusted(Path(root) / TRUSTED)) if keys(root) else None


def trust(root: str | Path, key: str | Path) -> str:
    """Add a trusted key and return its id. With a trusted key, only bundles signed by one are installed.

    Args:
        root: Root of the device's state.
        key: File of a public key (``ssd-edge keys new``).

    Raises:
        InputError: The file is not a public key.
    """
    identity = signing.key_id(signing.load_public(Path(key)))
    folder = Path(root) / TRUSTED
    files.make_directory(folder)
    files.write_bytes(folder / f"{identity}.pub", files.read_bytes(Path(key)))
    return identity


def distrust(root: str | Path, identity: str) -> None:
    """Remove a trusted key. Without any trusted key, unsigned bundles are accepted.

    Raises:
        InputError: The key is not trusted; the message lists those that are.
    """
    known = trusted(root)
    if identity not in known:
        raise InputError(f"no key {identity} is trusted in {root}; trusted: {', '.join(known) or 'none'}")
    path = Path(root) / TRUSTED / f"{identity}.pub"
    path.unlink()
    files.fsync_directory(path.parent)


def trusted(root: str | Path) -> list[str]:
    """Return the ids of the trusted keys."""
    return [path.stem for path in keys(root)]
