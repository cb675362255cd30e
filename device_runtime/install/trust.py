"""Trusted keys of a device: whose bundles it accepts.

::

    ROOT/trusted/<key id>.pub      public keys; nothing else belongs there
    ROOT/signatures.json           true once a key was trusted, false after `accept_unsigned`

A device that was never given a key accepts every valid bundle. From the first key on it accepts only bundles signed by
a trusted key, until `accept_unsigned`: a key that cannot be read, an empty or missing folder, or a lost record means
that nothing is installed, never that everything is. A generation that was installed with a signature counts as well.
"""

from __future__ import annotations

import contextlib
import re
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from device_runtime.store.fsck import TRUSTED
from device_runtime.store.generations import Generations
from ssd_edge import files
from ssd_edge.bundle import Bundle, signing
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError, SSDEdgeError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

RECORD = "signatures.json"
BACK = "to accept unsigned bundles again: ssd-edge device trust --accept-unsigned"
_KEY = re.compile(r"[0-9a-f]{16}\.pub")


def check_signature(root: str | Path, opened: Bundle) -> str | None:
    """Return the id of the trusted key that signed a bundle, or None if the device accepts unsigned bundles.

    Raises:
        BundleRefusedError: No trusted key signed the bundle, or no key is trusted any more.
        EnvironmentUnfitError: A key is trusted, but `cryptography` is not installed; or see `trusted`.
    """
    known = trusted(root)
    if known is None:
        return None
    if not known:
        raise BundleRefusedError(
            f"{root} accepts only signed bundles, but no key is trusted there any more; trust one: ssd-edge device "
            f"trust NAME.pub, or {BACK}"
        )
    tree = files.Tree(Path(root))
    return signing.check(opened, {identity: _read_key(tree, identity) for identity in known})


def trusted(root: str | Path) -> Sequence[str] | None:
    """Return the ids of the trusted keys, or None if the device accepts unsigned bundles.

    Raises:
        EnvironmentUnfitError: It cannot be determined, or others may change it; the message says what to do.
    """
    tree = files.Tree(Path(root))
    folder = tree.root / TRUSTED
    required = _recorded(tree)
    if tree.status(folder) is None:
        return [] if required or (required is None and _signed_before(tree.root)) else None
    paths = [path for path in tree.entries(folder) if not path.name.startswith(files.TEMPORARY_PREFIX)]
    for path in paths:
        if not _KEY.fullmatch(path.name):
            raise EnvironmentUnfitError(
                f"{path} is not the file of a trusted key, which is called <key id>.pub, so it is unclear which keys "
                f"are trusted; add it with: ssd-edge device trust {path}, and remove it from {folder}"
            )
    if required is False and not paths:
        return None
    for path in (tree.root, folder, *paths):
        if problem := tree.exposure(path, group=path != tree.root):
            raise EnvironmentUnfitError(f"the trusted keys cannot be relied on: {path}: {problem}")
    return [path.stem for path in paths]


def trust(root: str | Path, key: str | Path) -> str:
    """Add a trusted key and return its id. From then on, only bundles signed by a trusted key are installed.

    Args:
        root: Root of the device's state.
        key: File of a public key (``ssd-edge keys new``).

    Raises:
        InputError: The file is not a public key.
        EnvironmentUnfitError: The key cannot be stored.
    """
    data = files.read_bytes(Path(key))
    identity = signing.key_id(signing.parse_public(data, str(key)))
    tree = files.Tree(Path(root))
    folder = tree.root / TRUSTED
    _record(tree, True)
    tree.make(folder, 0o755)
    tree.chmod(folder, 0o755)  # public keys; the user that installs must be able to list them, whatever the umask is
    _twice(lambda: tree.write(folder / f"{identity}.pub", data))
    return identity


def distrust(root: str | Path, identity: str) -> None:
    """Remove a trusted key. Without any, no bundle is installed until another is trusted or `accept_unsigned`.

    Raises:
        InputError: The key is not trusted; the message lists those that are.
        EnvironmentUnfitError: The key cannot be removed.
    """
    known = trusted(root) or []
    if identity not in known:
        raise InputError(f"no key {identity} is trusted in {root}; trusted: {', '.join(known) or 'none'}")
    tree = files.Tree(Path(root))
    _record(tree, True)
    tree.remove(tree.root / TRUSTED / f"{identity}.pub")
    tree.sync(tree.root / TRUSTED)


def accept_unsigned(root: str | Path) -> None:
    """Stop requiring signatures: remove every trusted key, and accept every valid bundle from now on.

    Raises:
        EnvironmentUnfitError: A key cannot be removed, or the decision cannot be recorded.
    """
    tree = files.Tree(Path(root))
    tree.remove(tree.root / TRUSTED)  # also if it is a file or a link
    _record(tree, False)


def _recorded(tree: files.Tree) -> bool | None:
    """Return whether signatures are required, or None if that was never recorded."""
    path = tree.root / RECORD
    try:
        value = files.parse_json(tree.read(path), str(path))
    except FileNotFoundError:
        return None
    except (OSError, BundleRefusedError) as error:
        raise EnvironmentUnfitError(f"{path} cannot be read ({error}), so nothing is installed; {BACK}") from error
    if not isinstance(value, dict) or type(value.get("required")) is not bool:
        raise EnvironmentUnfitError(
            f"{path} does not say whether signatures are required; trust a key again, or {BACK}"
        )
    required: bool = value["required"]
    return required


def _record(tree: files.Tree, required: bool) -> None:
    tree.make(tree.root, 0o755)
    about = tree.status(tree.root / RECORD)
    if about and not stat.S_ISREG(about.st_mode):
        tree.remove(tree.root / RECORD)
    _twice(lambda: tree.write(tree.root / RECORD, files.json_bytes({"required": required})))


def _signed_before(root: Path) -> bool:
    """Return True if a signature was checked when a bundle was installed, as the device's own records say."""
    store = Generations(root)
    infos = [event.get("info") for event in store.journal() if event.get("event") == "install"]
    with contextlib.suppress(InputError):  # no bundle is installed
        infos += [summary.info for summary in store.list()]
    return any(isinstance(info, dict) and info.get("signed_by") for info in infos)


def _read_key(tree: files.Tree, identity: str) -> Ed25519PublicKey:
    path = tree.root / TRUSTED / f"{identity}.pub"
    try:
        key = signing.parse_public(tree.read(path), str(path))
    except OSError as error:
        raise files.unfit(path, error) from error
    except InputError as error:
        raise EnvironmentUnfitError(f"{error}, so nothing is installed") from error
    if (actual := signing.key_id(key)) != identity:
        raise EnvironmentUnfitError(
            f"{path} contains the key {actual}; add that with: ssd-edge device trust {path}, and remove the file"
        )
    return key


def _twice(write: Callable[[], None]) -> None:
    """Write, and try again: a writer of the store that starts removes all temporary files of the root."""
    try:
        write()
    except SSDEdgeError:
        write()
