"""Data sets: reproducible splits, and what a user reads when a file is missing, damaged or not the official one."""

import dataclasses
import errno
import gzip
import hashlib
import io
import struct
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pooch
import pytest

from spikeport.models.datasets import (
    DATA_VARIABLE,
    EVENT_SETS,
    IMAGE_SETS,
    Dataset,
    Split,
    cifar10,
    load_dataset,
    read_idx,
)
from spikeport.models.datasets.idx import IDX_SETS
from spikeport.models.errors import DataError


def assert_actionable(error: pytest.ExceptionInfo[DataError], *words: str) -> None:
    """One or two lines that hold each of the words."""
    text = str(error.value)
    assert 1 <= len(text.splitlines()) <= 2
    for word in words:
        assert word in text


# --- Digits


def images_of(data: Dataset) -> dict[str, set[bytes]]:
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    return {name: {image.tobytes() for image in split.images} for name, split in splits.items()}


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", validation=287, seed=1, test=360)


def test_digits_have_the_sizes_that_were_asked_for(digits: Dataset) -> None:
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (1150, 287, 360)
    assert digits.image_shape == (1, 8, 8)
    assert digits.class_names == tuple("0123456789")
    for split in (digits.train, digits.validation, digits.test):
        assert split.images.dtype == np.float32
        assert split.labels.dtype == np.int64
        assert (split.images.min(), split.images.max()) == (0, 1)


def test_digits_come_whole_and_each_sample_once(digits: Dataset) -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    everything = sorted(
        (*image.ravel(), label) for image, label in zip(bunch.images / 16, bunch.target.tolist(), strict=True)
    )
    found = sorted(
        (*image.astype(float).ravel(), int(label))
        for split in (digits.train, digits.validation, digits.test)
        for image, label in zip(split.images, split.labels, strict=True)
    )
    assert found == everything


def test_the_splits_of_digits_share_no_image(digits: Dataset) -> None:
    parts = images_of(digits)
    assert not parts["train"] & parts["validation"]
    assert not parts["train"] & parts["test"]
    assert not parts["validation"] & parts["test"]


def test_the_splits_of_digits_are_stratified(digits: Dataset) -> None:
    whole = np.bincount(np.concatenate([s.labels for s in (digits.train, digits.validation, digits.test)]))
    for split in (digits.train, digits.validation, digits.test):
        expected = whole / whole.sum() * len(split)
        assert (np.abs(np.bincount(split.labels) - expected) <= 1).all()


def test_the_split_of_digits_is_decided_by_the_seed_alone(digits: Dataset) -> None:
    np.random.seed(99)  # noqa: NPY002 - the split may not draw from the global state
    again = load_dataset("digits", validation=287, seed=1, test=360)
    other = load_dataset("digits", validation=287, seed=2, test=360)
    for name in ("train", "validation", "test"):
        split, same, different = (getattr(data, name) for data in (digits, again, other))
        assert np.array_equal(split.images, same.images)
        assert np.array_equal(split.labels, same.labels)
        assert not np.array_equal(split.images, different.images)


def test_digits_hold_out_360_samples_for_the_test_by_default(digits: Dataset) -> None:
    default = load_dataset("digits", validation=287, seed=1)
    assert np.array_equal(default.test.images, digits.test.images)


@pytest.mark.parametrize(
    ("validation", "test"), [(1000, 797), (2000, 10), (5, 360), (287, 3), (1432, 360)], ids=lambda n: str(n)
)
def test_a_split_of_digits_that_cannot_be_made_is_refused(validation: int, test: int) -> None:
    """None left to train on, or fewer than one of each class in a part of a stratified split."""
    with pytest.raises(DataError) as error:
        load_dataset("digits", validation=validation, seed=1, test=test)
    assert_actionable(error, "digits")


def test_an_unknown_data_set_is_named_beside_the_known_ones() -> None:
    with pytest.raises(DataError) as error:
        load_dataset("cifar", validation=1, seed=1)
    assert_actionable(error, "'cifar'", *IMAGE_SETS, *EVENT_SETS)


def test_the_options_of_recordings_do_not_touch_images(digits: Dataset) -> None:
    data = load_dataset(
        "digits", validation=287, seed=1, steps=5, bin_ms=3.0, events="count", downsample=2, subset=True
    )
    assert (data.note, data.temporal) == (digits.note, False)
    assert np.array_equal(data.train.images, digits.train.images)


# --- What every data set must be


def split(n: int = 4, labels: int = 2) -> Split:
    return Split(np.zeros((n, 1, 2, 2), np.float32), np.arange(n) % labels)


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_an_empty_split_is_refused(name: str) -> None:
    splits = {"train": split(), "validation": split(), "test": split(), name: split(0)}
    with pytest.raises(DataError) as error:
        Dataset("mine", ("a", "b"), **splits)
    assert_actionable(error, "'mine'", name, "empty")


@pytest.mark.parametrize("labels", [[0, 1, 2, 1], [0, -1, 1, 1]])
@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_labels_out_of_range_are_refused(name: str, labels: list[int]) -> None:
    splits = {"train": split(), "validation": split(), "test": split()}
    splits[name] = Split(split().images, np.array(labels))
    with pytest.raises(DataError) as error:
        Dataset("mine", ("a", "b"), **splits)
    assert_actionable(error, "'mine'", name, "labels", "0..1")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_images_that_are_not_finite_are_refused(name: str, value: float) -> None:
    splits = {"train": split(), "validation": split(), "test": split()}
    splits[name].images[3, 0, 1, 1] = value
    with pytest.raises(DataError) as error:
        Dataset("mine", ("a", "b"), **splits)
    assert_actionable(error, "'mine'", name, "not finite")


def test_as_many_labels_as_images() -> None:
    with pytest.raises(DataError) as error:
        Dataset("mine", ("a", "b"), split(), Split(split(4).images, split(3).labels), split())
    assert_actionable(error, "'mine'", "4 images", "3 labels")


@pytest.mark.parametrize("name", ["train", "validation", "test"])
@pytest.mark.parametrize("shape", [(4, 1, 2, 3), (4, 2, 2), (4, 5, 1, 2, 2)])
def test_images_of_another_shape_are_refused(name: str, shape: tuple[int, ...]) -> None:
    splits = {"train": split(), "validation": split(), "test": split()}
    splits[name] = Split(np.zeros(shape, np.float32), split().labels)
    with pytest.raises(DataError) as error:
        Dataset("mine", ("a", "b"), **splits)
    assert_actionable(error, "'mine'", "shape", "channels, height, width")


def test_the_image_shape_of_recordings_is_that_of_one_step() -> None:
    frames = Split(np.zeros((4, 7, 2, 5, 6), np.uint8), np.arange(4) % 2)
    data = Dataset("mine", ("a", "b"), frames, frames, frames, temporal=True)
    assert data.image_shape == (2, 5, 6)
    with pytest.raises(DataError) as error:
        Dataset("mine", ("a", "b"), frames, frames, frames)
    assert_actionable(error, "(4, 7, 2, 5, 6)")
    with pytest.raises(DataError) as error:
        Dataset("mine", ("a", "b"), split(), split(), split(), temporal=True)
    assert_actionable(error, "steps, channels")


# --- idx files


def idx(shape: tuple[int, ...], data: bytes | None = None, kind: int = 8) -> bytes:
    """An idx file, unzipped; its data count up."""
    if data is None:
        data = bytes(i % 256 for i in range(int(np.prod(shape))))
    return bytes([0, 0, kind, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + data


def zipped(path: Path, raw: bytes) -> Path:
    path.write_bytes(gzip.compress(raw, mtime=0))
    return path


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 28, 28), (2, 1, 3, 2)])
def test_an_idx_file_is_read_as_bytes_of_its_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    found = read_idx(zipped(tmp_path / "a.gz", idx(shape)))
    assert found.dtype == np.uint8
    assert np.array_equal(found, (np.arange(np.prod(shape)) % 256).reshape(shape))


@pytest.mark.parametrize("lost", [1, 8, 20, 200])
def test_a_truncated_gzip_file_is_refused(tmp_path: Path, lost: int) -> None:
    noise = np.random.default_rng(0).bytes(1000)
    path = zipped(tmp_path / "images.gz", idx((1000,), noise))
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(DataError, match="truncated") as error:
        read_idx(path)
    assert_actionable(error, "images.gz", "Download it again")


@pytest.mark.parametrize(
    "content",
    [b"", b"\x1f\x8b", b"not gzip at all", idx((3,)), b"\x1f\x8b\x08\x00" + bytes(6) + b"\xff" * 20],
    ids=["empty", "magic only", "text", "not zipped", "bad deflate"],
)
def test_a_file_that_is_not_gzip_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_idx(path)
    assert_actionable(error, "images.gz")


def test_a_gzip_file_of_the_wrong_checksum_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "images.gz", idx((30,)))
    raw = bytearray(path.read_bytes())
    raw[-8] ^= 1  # the CRC
    path.write_bytes(raw)
    with pytest.raises(DataError) as error:
        read_idx(path)
    assert_actionable(error, "images.gz")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_idx(tmp_path / "images.gz")
    assert_actionable(error, "images.gz")


@pytest.mark.parametrize(
    "raw",
    [b"", b"\0\0\x08", b"\0\1\x08\1" + bytes(8), idx((2, 2), kind=0x0D), b"PNG" + bytes(20)],
    ids=["empty", "cut", "magic", "floats", "other"],
)
def test_a_wrong_magic_number_is_refused(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(DataError, match="not an idx file of unsigned bytes") as error:
        read_idx(zipped(tmp_path / "labels.gz", raw))
    assert_actionable(error, "labels.gz")


@pytest.mark.parametrize(
    "raw",
    [
        idx((3, 4), bytes(11)),
        idx((3, 4), bytes(13)),
        idx((3, 4), b""),
        idx((), b""),
        idx((3, 4))[:7],
        idx((65536,) * 4, b""),  # 2^64 bytes by its header, which is 0 in 64 bits
    ],
    ids=["one short", "one too many", "no data", "no shape", "half a shape", "product overflows"],
)
def test_a_header_that_does_not_match_the_size_is_refused(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(DataError, match="header") as error:
        read_idx(zipped(tmp_path / "images.gz", raw))
    assert_actionable(error, "images.gz")


# --- MNIST and Fashion-MNIST, from small files that stand in for the official ones

NAMES = tuple(IDX_SETS["mnist"].md5)


@pytest.fixture(params=["mnist", "fashion-mnist"])
def idx_set(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def small(idx_set: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with 50 training and 12 test images of 28x28, declared to be the official files."""
    declare(tmp_path, monkeypatch, idx_set)
    return tmp_path / idx_set


def declare(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str = "mnist",
    train: int = 50,
    images: bytes | None = None,
    labels: bytes | None = None,
) -> None:
    """Write the four files and take their checksums for the official ones."""
    monkeypatch.setenv(DATA_VARIABLE, str(folder))
    (folder / name).mkdir(exist_ok=True)
    contents = (
        images or idx((train, 28, 28), b"".join(bytes([i]) * 784 for i in range(train))),
        labels or idx((train,), bytes(i % 10 for i in range(train))),
        idx((12, 28, 28), b"".join(bytes([200 + i]) * 784 for i in range(12))),
        idx((12,), bytes(i % 10 for i in range(12))),
    )
    checksums = {}
    for file, raw in zip(NAMES, contents, strict=True):
        path = zipped(folder / name / file, raw)
        checksums[file] = md5(path.read_bytes())
    monkeypatch.setitem(IDX_SETS, name, dataclasses.replace(IDX_SETS[name], md5=checksums))


def md5(raw: bytes) -> str:
    return hashlib.md5(raw, usedforsecurity=False).hexdigest()


def test_an_idx_set_is_split_by_seed_and_keeps_the_official_test_set(small: Path, idx_set: str) -> None:
    data = load_dataset(idx_set, validation=20, seed=3)
    assert (data.name, data.note, data.temporal) == (idx_set, "official files, checksums verified", False)
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 20, 12)
    assert (data.image_shape, len(set(data.class_names))) == ((1, 28, 28), 10)
    assert data.train.images.dtype == np.float32

    def which(part: Split) -> list[int]:
        """Number of each image in its file; every pixel holds it."""
        assert (part.images == part.images[:, :, :1, :1]).all()
        numbers = np.rint(part.images[:, 0, 0, 0] * 255).astype(int)
        assert np.array_equal(part.labels, np.where(numbers >= 200, numbers - 200, numbers) % 10)
        return numbers.tolist()

    assert which(data.test) == list(range(200, 212))
    assert sorted(which(data.train) + which(data.validation)) == list(range(50))
    assert which(load_dataset(idx_set, validation=20, seed=3).validation) == which(data.validation)
    assert which(load_dataset(idx_set, validation=20, seed=4).validation) != which(data.validation)


def test_the_files_may_lie_in_the_named_folder_itself(small: Path, idx_set: str) -> None:
    for name in NAMES:
        (small / name).rename(small.parent / name)
    assert len(load_dataset(idx_set, validation=20, seed=3).train) == 30


def test_an_idx_set_with_nothing_left_to_train_on_is_refused(small: Path, idx_set: str) -> None:
    with pytest.raises(DataError) as error:
        load_dataset(idx_set, validation=50, seed=1)
    assert_actionable(error, idx_set, "50")


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_without_the_file_is_named_with_the_file(small: Path, idx_set: str, name: str) -> None:
    (small / name).unlink()
    with pytest.raises(DataError) as error:
        load_dataset(idx_set, validation=20, seed=1)
    assert_actionable(error, DATA_VARIABLE, str(small.parent), f"{idx_set}/{name}")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_another_checksum_is_refused(small: Path, idx_set: str, name: str) -> None:
    path = small / name
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DataError) as error:
        load_dataset(idx_set, validation=20, seed=1)
    assert_actionable(error, name, IDX_SETS[idx_set].md5[name], "Download it again")


def test_a_folder_in_the_place_of_a_file_is_refused(small: Path, idx_set: str) -> None:
    (small / NAMES[0]).unlink()
    (small / NAMES[0]).mkdir()
    with pytest.raises(DataError) as error:
        load_dataset(idx_set, validation=20, seed=1)
    assert_actionable(error, "cannot read", NAMES[0])


@pytest.mark.parametrize(
    "contents",
    [
        {"train": 0},
        {"images": idx((50, 14, 14))},
        {"images": idx((50,))},
        {"images": idx((49, 28, 28))},
        {"labels": idx((50, 1), bytes(50))},
    ],
    ids=["no images", "14x14", "no planes", "one label too many", "labels in a column"],
)
def test_files_of_the_wrong_shape_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: dict[str, object]
) -> None:
    declare(tmp_path, monkeypatch, **contents)  # type: ignore[arg-type]
    with pytest.raises(DataError) as error:
        load_dataset("mnist", validation=20, seed=1)
    assert_actionable(error)


def test_a_file_with_a_label_that_no_class_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    declare(tmp_path, monkeypatch, labels=idx((50,), bytes([10] * 50)))
    with pytest.raises(DataError) as error:
        load_dataset("mnist", validation=20, seed=1)
    assert_actionable(error, "labels", "0..9")


# --- CIFAR-10, from small files that stand in for the official ones

BATCHES = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
RECORDS = 6


def batch(number: int, label: int | None = None) -> bytes:
    """Records whose red, green and blue planes hold 3 k, 3 k + 1, 3 k + 2 for the k-th image of all."""
    records = b""
    for k in range(RECORDS * number, RECORDS * (number + 1)):
        records += bytes([k % 10 if label is None else label])
        records += b"".join(bytes([3 * k + plane]) * 1024 for plane in range(3))
    return records


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The unpacked folder with six records a file."""
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    monkeypatch.setattr(cifar10, "_RECORDS", RECORDS)
    folder = tmp_path / "cifar10" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for number, name in enumerate(BATCHES):
        (folder / name).write_bytes(batch(number))
    return folder


def pack(folder: Path, monkeypatch: pytest.MonkeyPatch, leave_out: str = "") -> Path:
    """The folder as the official archive, in its place."""
    path = folder.parent / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for file in sorted(folder.iterdir(), reverse=True):  # any order of members will do
            if file.name != leave_out:
                archive.add(file, f"{folder.name}/{file.name}")
            file.unlink()
    folder.rmdir()
    monkeypatch.setattr(cifar10, "_MD5", md5(path.read_bytes()))
    return path


@pytest.mark.parametrize("packed", [True, False])
def test_cifar10_from_its_archive_and_from_its_folder(
    cifar: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    if packed:
        pack(cifar, monkeypatch)
    data = load_dataset("cifar10", validation=10, seed=2)
    assert (len(data.train), len(data.validation), len(data.test)) == (20, 10, RECORDS)
    assert data.image_shape == (3, 32, 32)
    assert data.train.images.dtype == np.float32
    assert "checksum verified" in data.note if packed else "not the official files byte for byte" in data.note
    numbers = []
    for part in (data.train, data.validation, data.test):
        pixels = np.rint(part.images * 255).astype(int)
        assert (pixels == pixels[:, :1, :1, :1] + np.arange(3)[:, None, None]).all()
        numbers += (pixels[:, 0, 0, 0] // 3).tolist()
        assert np.array_equal(part.labels, pixels[:, 0, 0, 0] // 3 % 10)
    assert sorted(numbers[:30]) == list(range(30))
    assert numbers[30:] == list(range(30, 36))


def test_the_archive_of_cifar10_goes_before_the_folder(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(cifar, monkeypatch)
    cifar.mkdir()
    assert "checksum verified" in load_dataset("cifar10", validation=10, seed=2).note
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DataError) as error:
        load_dataset("cifar10", validation=10, seed=2)
    assert_actionable(error, path.name, "md5", "Download it again")


def test_a_folder_without_cifar10_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    with pytest.raises(DataError) as error:
        load_dataset("cifar10", validation=10, seed=2)
    assert_actionable(error, str(tmp_path), "cifar-10-binary.tar.gz", "cifar-10-batches-bin")


@pytest.mark.parametrize("content", [b"", batch(0)[:-1], batch(0) + b"\0", batch(0, label=10)])
@pytest.mark.parametrize("name", [BATCHES[0], BATCHES[-1]])
def test_a_damaged_batch_of_cifar10_is_refused(cifar: Path, name: str, content: bytes) -> None:
    (cifar / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        load_dataset("cifar10", validation=10, seed=2)
    assert_actionable(error, name)


@pytest.mark.parametrize("packed", [True, False])
def test_a_missing_batch_of_cifar10_is_named(cifar: Path, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    if packed:
        pack(cifar, monkeypatch, leave_out=BATCHES[3])
    else:
        (cifar / BATCHES[3]).unlink()
    with pytest.raises(DataError) as error:
        load_dataset("cifar10", validation=10, seed=2)
    assert_actionable(error, BATCHES[3], "cifar-10-binary.tar.gz")


@pytest.mark.parametrize("damage", ["cut", "not gzip", "not tar", "empty"])
def test_an_archive_that_cannot_be_read_is_refused(cifar: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    path = pack(cifar, monkeypatch)
    whole = path.read_bytes()
    content = {"cut": whole[: len(whole) // 2], "not gzip": b"text", "not tar": gzip.compress(b"text"), "empty": b""}
    path.write_bytes(content[damage])
    monkeypatch.setattr(cifar10, "_MD5", md5(path.read_bytes()))  # as if it had been damaged before it was published
    with pytest.raises(DataError) as error:
        load_dataset("cifar10", validation=10, seed=2)
    assert_actionable(error, path.name)


def tar_of(path: Path, *members: tarfile.TarInfo) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(bytes(member.size)))


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


@pytest.mark.parametrize(
    "members",
    [
        [member("../outside.bin")],
        [member("/outside.bin")],
        [member("cifar-10-batches-bin/../../outside.bin")],
        [member("cifar-10-batches-bin\\..\\outside.bin")],
        [member("twice"), member("twice")],
        [member("cifar-10-batches-bin/data_batch_1.bin", tarfile.SYMTYPE, "/etc/passwd")],
        [member("cifar-10-batches-bin/data_batch_1.bin", tarfile.LNKTYPE, "../../outside.bin")],
    ],
    ids=["up", "absolute", "up within", "backslash", "two of a name", "symbolic link", "hard link"],
)
def test_an_archive_cannot_lead_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: list[tarfile.TarInfo]
) -> None:
    path = tmp_path / "root" / "cifar-10-binary.tar.gz"
    path.parent.mkdir()
    tar_of(path, *members)
    monkeypatch.setenv(DATA_VARIABLE, str(path.parent))
    monkeypatch.setattr(cifar10, "_MD5", md5(path.read_bytes()))
    with pytest.raises(DataError) as error:
        load_dataset("cifar10", validation=10, seed=2)
    assert_actionable(error, path.name)
    assert [file.name for file in tmp_path.rglob("*")] == ["root", path.name]


# --- Downloads


@pytest.mark.parametrize(
    "failure",
    [
        ConnectionError("HTTPSConnectionPool(host='x', port=443): Max retries exceeded " + "very long " * 50),
        OSError("first line\nsecond line\nthird line"),
        ValueError("MD5 hash of downloaded file does not match the known hash"),
        TimeoutError(),  # whose text is empty
    ],
    ids=["long", "many lines", "checksum", "no text"],
)
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "nmnist"])
def test_a_failed_download_says_what_to_do(failure: Exception, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **keywords: object) -> str:
        raise failure

    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.setattr(pooch, "retrieve", fail)
    with pytest.raises(DataError) as error:
        load_dataset(name, validation=20, seed=1, steps=3, bin_ms=3 if name == "nmnist" else None)
    assert_actionable(error, "cannot download", f"{name}/", DATA_VARIABLE)
    assert len(str(error.value)) < 500


def test_a_download_is_checked_against_the_official_checksum(
    small: Path, idx_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def retrieve(url: str, known_hash: str, **keywords: object) -> str:
        name = url.rsplit("/", 1)[1]
        asked[name] = known_hash
        return str(small / name)

    monkeypatch.delenv(DATA_VARIABLE)
    monkeypatch.setattr(pooch, "retrieve", retrieve)
    assert len(load_dataset(idx_set, validation=20, seed=1).test) == 12
    assert asked == {name: f"md5:{checksum}" for name, checksum in IDX_SETS[idx_set].md5.items()}


@pytest.fixture
def server(small: Path, idx_set: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A server on this machine that stands in for the official one; yields the cache, which is empty."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = (small / self.path.rsplit("/", 1)[1]).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        monkeypatch.delenv(DATA_VARIABLE)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
        source = dataclasses.replace(IDX_SETS[idx_set], url=f"http://127.0.0.1:{running.server_port}/")
        monkeypatch.setitem(IDX_SETS, idx_set, source)
        yield tmp_path / "cache" / "spikeport" / idx_set
        running.shutdown()
        thread.join()


def test_files_are_downloaded_once(server: Path, small: Path, idx_set: str) -> None:
    first = load_dataset(idx_set, validation=20, seed=1)
    assert sorted(file.name for file in server.iterdir()) == sorted(NAMES)
    for name in NAMES:
        (small / name).unlink()
    assert np.array_equal(load_dataset(idx_set, validation=20, seed=1).train.images, first.train.images)


@pytest.mark.parametrize("damage", ["changed", "cut", "grown"])
def test_nothing_stays_of_a_download_that_is_damaged(server: Path, small: Path, idx_set: str, damage: str) -> None:
    whole = (small / NAMES[0]).read_bytes()
    damaged = {"changed": b"X" + whole[1:], "cut": whole[:-10], "grown": whole + b"X"}
    (small / NAMES[0]).write_bytes(damaged[damage])
    with pytest.raises(DataError) as error:
        load_dataset(idx_set, validation=20, seed=1)
    assert_actionable(error, "cannot download", NAMES[0], "hash")
    assert list(server.iterdir()) == []
    (small / NAMES[0]).write_bytes(whole)
    assert len(load_dataset(idx_set, validation=20, seed=1).test) == 12


def test_a_file_of_the_cache_that_is_damaged_is_downloaded_again(server: Path, idx_set: str) -> None:
    load_dataset(idx_set, validation=20, seed=1)
    (server / NAMES[0]).write_bytes(b"")
    assert len(load_dataset(idx_set, validation=20, seed=1).test) == 12


def test_nothing_stays_of_a_download_that_fills_the_disk(
    server: Path, idx_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(self: object, url: str, output_file: str, *args: object, **keywords: object) -> None:
        Path(output_file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", fill)
    with pytest.raises(DataError) as error:
        load_dataset(idx_set, validation=20, seed=1)
    assert_actionable(error, "No space left on device", "free some space", str(server))
    assert list(server.iterdir()) == []


# --- The official files, where they are at hand


def official(shared_data: Path, monkeypatch: pytest.MonkeyPatch, name: str, *files: str) -> None:
    if not any((shared_data / folder / file).exists() for folder in (name, ".") for file in files):
        pytest.skip(f"no {name}: the folder of data sets holds no {name}/{files[0]}")
    monkeypatch.setenv(DATA_VARIABLE, str(shared_data))


def test_the_official_mnist(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    official(shared_data, monkeypatch, "mnist", NAMES[0])
    data = load_dataset("mnist", validation=5000, seed=1)
    assert (len(data.train), len(data.validation), len(data.test)) == (55000, 5000, 10000)
    assert data.test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert np.bincount(data.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert data.test.images.max() == 1
    assert float(data.train.images[:2000].mean()) == pytest.approx(0.1307, abs=0.003)


def test_the_official_fashion_mnist(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # MNIST's files have the same names: only a folder of its own will do
    if not (shared_data / "fashion-mnist" / NAMES[0]).exists():
        pytest.skip(f"no fashion-mnist: the folder of data sets holds no fashion-mnist/{NAMES[0]}")
    monkeypatch.setenv(DATA_VARIABLE, str(shared_data))
    data = load_dataset("fashion-mnist", validation=5000, seed=1)
    assert (len(data.train), len(data.validation), len(data.test)) == (55000, 5000, 10000)
    assert np.bincount(data.test.labels).tolist() == [1000] * 10
    assert data.class_names[data.test.labels[0]] == "ankle boot"
    assert float(data.train.images[:5000].mean()) == pytest.approx(0.2860, abs=0.005)


def test_the_official_cifar10(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    official(shared_data, monkeypatch, "cifar10", "cifar-10-binary.tar.gz", "cifar-10-batches-bin")
    data = load_dataset("cifar10", validation=5000, seed=1)
    assert (len(data.train), len(data.validation), len(data.test)) == (45000, 5000, 10000)
    assert np.bincount(data.test.labels).tolist() == [1000] * 10
    assert [data.class_names[label] for label in data.test.labels[:4]] == ["cat", "ship", "ship", "airplane"]
    assert data.train.images.mean((0, 2, 3)) == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.001)
