"""Whose bundles a device takes.

::

    ROOT/trusted/<key id>.pub      public keys; as soon as there is one, an unsigned bundle is refused
"""

from __future__ import annotations

from pathlib import Path

from ssd_edge import files
from ssd_edge.bundle import Bundle, signing
from ssd_edge.errors import InputError

TRUSTED = "trusted"  # folder of a root


def keys(root: str | Path) -> list[Path]:
    """Files of the keys that sign what a device takes."""
    return sorted((Path(root) / TRUSTED).glob("*.pub"))


def check_signature(root: str | Path, opened: Bundle) -> str | None:
    """The id of the trusted key that signed a bundle; None where no key is trusted.

    Raises:
        BundleRefusedError: no trusted key signed it.
        EnvironmentUnfitError: a key is trusted, but `cryptography` is not installed.
    """
    return signing.check(opened, signing.trusted(Path(root) / TRUSTED)) if keys(root) else None


def trust(root: str | Path, key: str | Path) -> str:
    """From now on only bundles signed by a trusted key are installed; adds this one, and returns its id.

    Args:
        root: the device's state.
        key: file of a public key (``ssd-edge keys new``).

    Raises:
        InputError: no public key in that file.
    """
    identity = signing.key_id(signing.load_public(Path(key)))
    folder = Path(root) / TRUSTED
    files.make_directory(folder)
    files.write_bytes(folder / f"{identity}.pub", files.read_bytes(Path(key)))
    return identity


def distrust(root: str | Path, identity: str) -> None:
    """Take a trusted key out; without the last one, unsigned bundles are installed again.

    Raises:
        InputError: it is not trusted; lists those that are.
    """
    known = trusted(root)
    if identity not in known:
        raise InputError(f"no key {identity} is trusted in {root}; trusted: {', '.join(known) or 'none'}")
    path = Path(root) / TRUSTED / f"{identity}.pub"
    path.unlink()
    files.fsync_directory(path.parent)


def trusted(root: str | Path) -> list[str]:
    """Ids of the trusted keys."""
    return [path.stem for path in keys(root)]
