"""Data sets: reproducible splits, and what a user reads when a file is missing, damaged or not the official one."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pooch
import pytest

from spikeport.models import datasets
from spikeport.models.datasets import DATA_VARIABLE, Dataset, Split, load_dataset, read_idx
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
    assert_actionable(error, "'cifar'", "digits", "mnist")


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


# --- MNIST, from small files that stand in for the official ones

NAMES = tuple(datasets._MNIST_MD5)


@pytest.fixture
def small_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with 50 training and 12 test images of 28x28, declared to be the official files."""
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    declare(tmp_path, monkeypatch)
    return tmp_path


def declare(folder: Path, monkeypatch: pytest.MonkeyPatch, train: int = 50, labels: bytes | None = None) -> None:
    """Write the four files and take their checksums for the official ones."""
    (folder / "mnist").mkdir(exist_ok=True)
    contents = (
        idx((train, 28, 28), b"".join(bytes([i]) * 784 for i in range(train))),
        idx((train,), labels or bytes(i % 10 for i in range(train))),
        idx((12, 28, 28), b"".join(bytes([200 + i]) * 784 for i in range(12))),
        idx((12,), bytes(i % 10 for i in range(12))),
    )
    checksums = {}
    for name, raw in zip(NAMES, contents, strict=True):
        path = zipped(folder / "mnist" / name, raw)
        checksums[name] = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(datasets, "_MNIST_MD5", checksums)


def test_mnist_is_split_by_seed_and_keeps_the_official_test_set(small_mnist: Path) -> None:
    data = load_dataset("mnist", validation=20, seed=3)
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 20, 12)
    assert data.image_shape == (1, 28, 28)
    assert data.train.images.dtype == np.float32

    def which(part: Split) -> list[int]:
        """Number of each image in its file; every pixel holds it."""
        assert (part.images == part.images[:, :, :1, :1]).all()
        numbers = np.rint(part.images[:, 0, 0, 0] * 255).astype(int)
        assert np.array_equal(part.labels, np.where(numbers >= 200, numbers - 200, numbers) % 10)
        return numbers.tolist()

    assert which(data.test) == list(range(200, 212))
    assert sorted(which(data.train) + which(data.validation)) == list(range(50))
    assert which(load_dataset("mnist", validation=20, seed=3).validation) == which(data.validation)
    assert which(load_dataset("mnist", validation=20, seed=4).validation) != which(data.validation)


def test_the_files_may_lie_in_the_named_folder_itself(small_mnist: Path) -> None:
    for name in NAMES:
        (small_mnist / "mnist" / name).rename(small_mnist / name)
    assert len(load_dataset("mnist", validation=20, seed=3).train) == 30


def test_mnist_with_nothing_left_to_train_on_is_refused(small_mnist: Path) -> None:
    with pytest.raises(DataError) as error:
        load_dataset("mnist", validation=50, seed=1)
    assert_actionable(error, "50")


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_without_the_file_is_named_with_the_file(small_mnist: Path, name: str) -> None:
    (small_mnist / "mnist" / name).unlink()
    with pytest.raises(DataError) as error:
        load_dataset("mnist", validation=20, seed=1)
    assert_actionable(error, DATA_VARIABLE, str(small_mnist), name)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_another_checksum_is_refused(small_mnist: Path, name: str) -> None:
    path = small_mnist / "mnist" / name
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DataError) as error:
        load_dataset("mnist", validation=20, seed=1)
    assert_actionable(error, name, datasets._MNIST_MD5[name], "Download it again")


def test_a_file_with_no_images_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    declare(tmp_path, monkeypatch, train=0)
    with pytest.raises(DataError) as error:
        load_dataset("mnist", validation=20, seed=1)
    assert_actionable(error)


def test_a_file_with_a_label_that_no_class_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    declare(tmp_path, monkeypatch, labels=bytes([10] * 50))
    with pytest.raises(DataError) as error:
        load_dataset("mnist", validation=20, seed=1)
    assert_actionable(error, "labels", "0..9")


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
def test_a_failed_download_says_what_to_do(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **keywords: object) -> str:
        raise failure

    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.setattr(pooch, "retrieve", fail)
    with pytest.raises(DataError) as error:
        load_dataset("mnist", validation=20, seed=1)
    assert_actionable(error, "cannot download", NAMES[0], DATA_VARIABLE)
    assert len(str(error.value)) < 500


def test_a_download_is_checked_against_the_official_checksum(
    small_mnist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def retrieve(url: str, known_hash: str, **keywords: object) -> str:
        name = url.rsplit("/", 1)[1]
        asked[name] = known_hash
        return str(small_mnist / "mnist" / name)

    monkeypatch.delenv(DATA_VARIABLE)
    monkeypatch.setattr(pooch, "retrieve", retrieve)
    assert len(load_dataset("mnist", validation=20, seed=1).test) == 12
    assert asked == {name: f"md5:{md5}" for name, md5 in datasets._MNIST_MD5.items()}


# --- The official files, where they are at hand


def test_the_official_mnist(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not any((shared_data / folder / NAMES[0]).is_file() for folder in ("mnist", ".")):
        pytest.skip(f"no MNIST: the folder of data sets holds no mnist/{NAMES[0]}")
    monkeypatch.setenv(DATA_VARIABLE, str(shared_data))
    data = load_dataset("mnist", validation=5000, seed=1)
    assert (len(data.train), len(data.validation), len(data.test)) == (55000, 5000, 10000)
    assert data.test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert np.bincount(data.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert data.test.images.max() == 1
    assert float(data.train.images[:2000].mean()) == pytest.approx(0.1307, abs=0.003)
