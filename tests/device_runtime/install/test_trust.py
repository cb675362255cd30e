"""Trusted keys fail closed: what cannot be read is a refusal, never "no key is trusted"."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import unprivileged

from device_runtime.install import trust
from device_runtime.store import fsck
from device_runtime.store.generations import Generations
from ssd_edge import bundle, files
from ssd_edge.bundle import signing
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError


@pytest.fixture
def folder() -> Iterator[Path]:
    with unprivileged.open_folder() as made:
        yield made


@pytest.fixture
def public(tmp_path: Path) -> Path:
    return signing.new_key(tmp_path / "keys", "ours")[1]


@pytest.fixture
def unsigned(tiny_bundle: Callable[..., bytes]) -> bundle.Bundle:
    return bundle.parse(tiny_bundle())


def identity_of(public: Path) -> str:
    return signing.key_id(signing.load_public(public))


def hide(folder: Path) -> None:
    folder.chmod(0o311)


def close(folder: Path) -> None:
    folder.chmod(0o000)


def dangle(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to("nowhere")


def link(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


def become_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


def hide_the_key(folder: Path) -> None:
    next(folder.iterdir()).chmod(0o000)


def link_the_key(folder: Path) -> None:
    key = next(folder.iterdir())
    key.rename(folder.parent / "key")
    key.symlink_to("../key")


def rename_the_key(folder: Path) -> None:
    next(folder.iterdir()).rename(folder / "fleet.pem")


def swap_the_key(folder: Path) -> None:
    next(folder.iterdir()).rename(folder / f"{'0' * 16}.pub")


def damage_the_key(folder: Path) -> None:
    next(folder.iterdir()).write_text("-----BEGIN PUBLIC KEY-----")


def put_a_folder_into_it(folder: Path) -> None:
    (folder / "more").mkdir()


def open_the_folder(folder: Path) -> None:
    folder.chmod(0o777)


def open_the_key(folder: Path) -> None:
    next(folder.iterdir()).chmod(0o666)


def open_the_root(folder: Path) -> None:
    folder.parent.chmod(0o777)


def dangle_the_root(folder: Path) -> None:
    folder.parent.rename(folder.parent.with_name("gone"))
    folder.parent.symlink_to("nowhere")


def hide_the_root(folder: Path) -> None:
    folder.parent.chmod(0o000)


WAYS = [
    *(
        hide,
        close,
        dangle,
        link,
        become_a_file,
        hide_the_key,
        link_the_key,
        rename_the_key,
        swap_the_key,
        damage_the_key,
    ),
    *(put_a_folder_into_it, open_the_folder, open_the_key, open_the_root, dangle_the_root, hide_the_root),
]


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("harm", WAYS)
def test_unreadable_trust_is_a_refusal(
    folder: Path, public: Path, unsigned: bundle.Bundle, harm: Callable[[Path], None], recorded: bool
) -> None:
    root = folder / "root"
    trust.trust(root, public)
    if not recorded:  # as devices of before the record
        (root / trust.RECORD).unlink()
    harm(root / "trusted")
    with unprivileged.unprivileged(), pytest.raises((EnvironmentUnfitError, InputError)) as caught:
        trust.check_signature(root, unsigned)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("harm", [shutil.rmtree, lambda folder: next(folder.iterdir()).unlink()])
def test_lost_keys_do_not_open_the_device(
    folder: Path, public: Path, unsigned: bundle.Bundle, harm: Callable[[Path], None]
) -> None:
    root = folder / "root"
    trust.trust(root, public)
    harm(root / "trusted")
    assert trust.trusted(root) == []
    with pytest.raises(BundleRefusedError, match=r"only signed bundles, but no key is trusted .*--accept-unsigned"):
        trust.check_signature(root, unsigned)
    trust.trust(root, public)
    assert trust.trusted(root) == [identity_of(public)]


def test_a_signed_installation_is_remembered_without_any_file_of_trust(
    folder: Path, unsigned: bundle.Bundle, tmp_path: Path
) -> None:
    for name, signer, journal in (("signed", "ab", True), ("journal lost", "ab", False), ("unsigned", None, True)):
        store = Generations(folder / name)
        with store.writer():
            digest = store.add_backbone(b"x")
            store.commit({"classes.json": b"[]"}, {"signed_by": signer}, None, digest)
        if not journal:
            (store.root / "journal.jsonl").unlink()
        assert trust.trusted(store.root) == ([] if signer else None)
    (folder / "signed" / trust.RECORD).mkdir()
    trust.accept_unsigned(folder / "signed")
    assert trust.check_signature(folder / "signed", unsigned) is None


@pytest.mark.parametrize("record", [b"", b"[]", b'{"required": 0}', None])
def test_a_damaged_record_is_a_refusal(folder: Path, unsigned: bundle.Bundle, record: bytes | None) -> None:
    (folder / trust.RECORD).mkdir() if record is None else (folder / trust.RECORD).write_bytes(record)
    with pytest.raises(EnvironmentUnfitError, match="--accept-unsigned"):
        trust.check_signature(folder, unsigned)
    trust.accept_unsigned(folder)
    assert trust.check_signature(folder, unsigned) is None


@pytest.mark.parametrize("harm", [dangle, link, become_a_file, rename_the_key, damage_the_key, put_a_folder_into_it])
def test_the_way_back(folder: Path, public: Path, unsigned: bundle.Bundle, harm: Callable[[Path], None]) -> None:
    root = folder / "root"
    trust.trust(root, public)
    harm(root / "trusted")
    trust.accept_unsigned(root)
    assert trust.check_signature(root, unsigned) is None
    trust.trust(root, public)
    assert trust.trusted(root) == [identity_of(public)]


def test_keys_are_listable_whatever_the_umask(folder: Path, public: Path) -> None:
    before = os.umask(0o077)
    try:
        (folder / "root").mkdir(mode=0o755)
        (folder / "root").chmod(0o755)
        trust.trust(folder / "root", public)
    finally:
        os.umask(before)
    identity = identity_of(public)
    with unprivileged.unprivileged():
        assert trust.trusted(folder / "root") == [identity]
    before = os.umask(0o000)
    try:
        trust.trust(folder / "other", public)
    finally:
        os.umask(before)
    assert trust.trusted(folder / "other") == [identity_of(public)]


def test_leftover_of_a_crash_is_no_key(folder: Path, public: Path) -> None:
    trust.trust(folder, public)
    (folder / "trusted" / f"{files.TEMPORARY_PREFIX}1").touch()
    assert trust.trusted(folder) == [identity_of(public)]


@pytest.mark.parametrize("harm", [link, link_the_key, open_the_folder, open_the_key, open_the_root])
def test_fsck_reports_what_others_may_change(folder: Path, public: Path, harm: Callable[[Path], None]) -> None:
    store = Generations(folder / "root")
    with store.writer():
        store.commit({"classes.json": b"[]"}, {}, None, store.add_backbone(b"x"))
    trust.trust(store.root, public)
    assert fsck.check(store) == []
    harm(store.root / "trusted")
    found = [one for one in fsck.check(store) if one.severity == fsck.DAMAGE]
    assert [one.path.partition("/")[0] for one in found] == ["." if harm is open_the_root else "trusted"]
    assert "chmod go-w" in found[0].problem or "symbolic link" in found[0].problem
