"""Archives of image folders: the same data set as the folder, and no paths outside it."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssd_edge.config import DataConfig
from ssd_edge.data import Dataset, folders, load
from ssd_edge.errors import InputError
from ssd_edge.images import Pixels

TREE = [f"{split}/{name}/{n}.png" for split in ("train", "test") for name in ("hen", "Öl") for n in range(3)]
ENDINGS = [".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".zip"]


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (9, 9), (number, 5, 6)).save(stream, "PNG")
    return stream.getvalue()


def content(names: list[str] = TREE) -> dict[str, bytes]:
    return {name: png(number) for number, name in enumerate(names)}


def pack(path: Path, members: dict[str, bytes]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return path
    kind = {".tar": "w", ".tgz": "w:gz"}.get(path.suffix, f"w:{path.suffix[1:]}")
    with tarfile.open(path, kind) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def read(path: Path) -> Dataset:
    return load(DataConfig(path=str(path)), 0)


@pytest.mark.parametrize("prefix", ["", "./", "birds-1.0/"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_an_archive_equals_its_folder(ending: str, prefix: str, tmp_path: Path) -> None:
    members = content()
    for name, data in members.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(data)
    extra = {"README.md": b"x", "__MACOSX/train/hen/._0.png": b"x", f"{prefix}train/.DS_Store": b"x"}
    # in another order: members of an archive are unordered
    shuffled = {f"{prefix}{name}": members[name] for name in reversed(members)}
    dataset = read(pack(tmp_path / f"birds{ending}", {**shuffled, **extra}))
    folder = read(tmp_path / "folder")
    assert dataset.name == f"birds{ending}"
    assert dataset.classes == folder.classes == ("hen", "Öl")
    assert dataset.fingerprint == folder.fingerprint
    assert dataset.split == folder.split
    assert (dataset.train.load(range(6), Pixels(9)) == folder.train.load(range(6), Pixels(9))).all()
    assert dataset.train.names[0] == f"birds{ending}: {prefix.replace('./', '')}train/hen/0.png"


def test_unsplit_archive_and_its_prefix(tmp_path: Path) -> None:
    unsplit = content([f"set/{name}/{n}.png" for name in "ab" for n in range(5)])
    assert read(pack(tmp_path / "a.zip", {**unsplit, "set/preview.png": png(0)})).classes == ("a", "b")
    only_train = content([f"set/train/{name}/{n}.png" for name in "ab" for n in range(5)])
    assert read(pack(tmp_path / "b.zip", only_train)).classes == ("a", "b")
    with pytest.raises(InputError, match=r"at least two classes are needed, but c\.zip has only one"):
        read(pack(tmp_path / "c.zip", content(["set/1.png", "set/2.png"])))
    with pytest.raises(InputError, match=r"d\.zip contains no class with images; expected train/<class>"):
        read(pack(tmp_path / "d.zip", {"notes.txt": b"x"}))


def test_zip_from_windows(tmp_path: Path) -> None:
    members = {name.replace("/", "\\"): data for name, data in content().items()}
    assert read(pack(tmp_path / "a.zip", members)).classes == ("hen", "Öl")


def test_a_duplicate_member_counts_once(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", content())
    with tarfile.open(path, "a") as archive:
        newer = png(200)
        member = tarfile.TarInfo(TREE[0])
        member.size = len(newer)
        archive.addfile(member, io.BytesIO(newer))
    data = read(path)
    assert len(data.train) == 6
    assert data.train.load([0], Pixels(9))[0, 0, 0, 0] == 200  # the last one wins, as when unpacking


@pytest.mark.parametrize("name", ["../evil.png", "train/../../evil.png", "/tmp/evil.png"])
@pytest.mark.parametrize("ending", [".tar", ".zip"])
def test_paths_outside_the_archive_are_refused(ending: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is refused: its member '.*evil\.png' has a path that leads"):
        read(pack(tmp_path / f"a{ending}", {**content(), name: png(0)}))


def test_a_windows_path_outside_the_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leads outside"):
        read(pack(tmp_path / "a.zip", {**content(), "..\\evil.png": png(0)}))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_only_regular_files_are_accepted(kind: bytes, tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", content())
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo("train/hen/link.png")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(InputError, match=r"'train/hen/link\.png' is a link or no plain file; unpack it"):
        read(path)


def tar_header(name: str, size: bytes) -> bytes:
    """Return the header of a regular file with the given bytes as its size."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize("size", [-1, -512, -1024, 2**63, 2**88 - 1])
def test_impossible_sizes_in_base_256_are_refused(size: int, tmp_path: Path) -> None:
    """A member of -512 bytes is followed by itself."""
    path = tmp_path / "a.tar"
    field = b"\x80" + size.to_bytes(11, "big") if size > 0 else size.to_bytes(12, "big", signed=True)
    path.write_bytes(tar_header("a/1.png", b"%011o\0" % 0) + tar_header("a/2.png", field) + bytes(1024))
    with pytest.raises(InputError, match=r"a\.tar cannot be read .*damaged"):
        read(path)


def test_tars_of_too_many_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "MAX_MEMBERS", 3)
    with pytest.raises(InputError, match=r"a\.tar holds more than 3 members; unpack it"):
        read(pack(tmp_path / "a.tar", content()))


@pytest.mark.parametrize("ending", ENDINGS)
def test_truncated_archives_are_refused(ending: str, tmp_path: Path) -> None:
    """Truncation between two members matters most: tarfile alone does not detect it."""
    noise = np.random.default_rng(0)
    members = {name: data + noise.bytes(700) for name, data in content().items()}
    path = pack(tmp_path / f"a{ending}", members)
    complete = path.read_bytes()
    padding = tarfile.RECORDSIZE if ending == ".tar" else 0  # zero padding after the end of a tar carries no data
    for cut in [0, 100, *range(512, len(complete) - padding, 512), len(complete) - padding - 1]:
        path.write_bytes(complete[:cut])
        with pytest.raises(InputError, match=r"cannot be read \(.+\); it is damaged or cut short: copy it"):
            read(path)


@pytest.mark.parametrize("ending", ENDINGS)
def test_damaged_archives_are_refused(ending: str, tmp_path: Path) -> None:
    path = pack(tmp_path / f"a{ending}", content())
    complete = path.read_bytes()
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(40):
        data = bytearray(complete)
        for position in rng.integers(0, len(data), 3):
            data[position] ^= 1 + rng.integers(255)
        path.write_bytes(bytes(data))
        try:
            list(read(path).train.batches(Pixels(8)))
            outcomes.add("read")
        except InputError as error:
            outcomes.add("refused" if path.name in str(error) else str(error))
    assert outcomes <= {"read", "refused"}
    assert "refused" in outcomes


def test_damaged_tar_header_in_the_middle(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", content())
    data = bytearray(path.read_bytes())
    second = data.index(TREE[1].encode())
    data[second] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"cannot be read \(no valid header at byte 1,024\)"):
        read(path)


@pytest.mark.parametrize("ending", [".tar.xz", ".zip"])
def test_archives_that_unpack_too_large_are_refused(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = {**content(), "train/hen/zeros.png": bytes(3 << 20)}  # compresses to almost nothing
    path = pack(tmp_path / f"a{ending}", bomb)
    monkeypatch.setattr(folders, "MAX_BYTES", 2 << 20)
    with pytest.raises(InputError, match=r"holds more than 2,097,152 bytes; unpack it and name the folder"):
        read(path)


def test_encrypted_and_unknown_formats_are_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", content())
    data = bytearray(path.read_bytes())
    for start in (data.index(b"PK\x03\x04") + 6, data.index(b"PK\x01\x02") + 8):
        data[start] |= 1  # the flag that marks an encrypted member
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"a\.zip cannot be read .*encrypted"):
        read(path)
    other = tmp_path / "a.rar"
    other.write_bytes(b"Rar!")
    with pytest.raises(InputError, match=r"is not a data set: neither a folder nor one of \.tar, .*\.npz"):
        read(other)


def test_errors_name_the_image_and_its_archive(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar.gz", {**content(), "train/hen/9.jpg": b"text", "train/hen/8.jpg": b""})
    data = read(path)
    with pytest.raises(InputError, match=r"^a\.tar\.gz: train/hen/8\.jpg is empty"):
        list(data.train.batches(Pixels(8)))
    with pytest.raises(InputError, match=r"^a\.tar\.gz: train/hen/9\.jpg is not a JPEG"):
        data.train.load([4], Pixels(8))
