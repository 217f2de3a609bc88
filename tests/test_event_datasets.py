"""Recordings of event cameras: their file formats, the frames they become, and what is refused."""

import hashlib
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikeport.models.datasets import DATA_VARIABLE, Dataset, Split, cifar10_dvs, dvs_gesture, load_dataset, nmnist
from spikeport.models.datasets.aedat import read_aedat2, read_aedat3
from spikeport.models.datasets.events import Binning, Events, FrameKind
from spikeport.models.datasets.nmnist import read_nmnist_events
from spikeport.models.errors import DataError

Event = tuple[int, int, int, int]
"""Column, row, polarity, microseconds."""


def assert_actionable(error: pytest.ExceptionInfo[DataError], *words: str) -> None:
    """One or two lines that hold each of the words."""
    text = str(error.value)
    assert 1 <= len(text.splitlines()) <= 2
    for word in words:
        assert word in text


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def as_list(events: Events) -> list[Event]:
    columns = (events.x, events.y, events.polarity, events.time)
    assert all(column.dtype == np.int64 for column in columns)
    return [(x, y, p, t) for x, y, p, t in np.stack(columns, axis=1).tolist()]


def events_in(height: int, width: int, last: int = 1 << 20) -> st.SearchStrategy[list[Event]]:
    one = st.tuples(st.integers(0, width - 1), st.integers(0, height - 1), st.integers(0, 1), st.integers(0, last))
    return st.lists(one, min_size=1, max_size=60)


# --- Frames


def binned(binning: Binning, events: list[Event], side: int, start: float = 0, stop: float = np.inf) -> np.ndarray:
    frames = np.zeros(binning.shape((side, side)), np.uint8)
    binning.into(frames, Events(*np.array(events, np.int64).reshape(-1, 4).T), start, stop)
    return frames


@pytest.mark.oracle
@given(
    events_in(12, 12, last=9000),
    st.integers(1, 6),
    st.sampled_from([0.5, 1.0, 1.7, 3.0]),
    st.sampled_from(["binary", "count"]),
    st.sampled_from([1, 2, 3, 12]),
    st.integers(0, 4000),
    st.integers(1, 6000),
)
def test_frames_equal_their_definition(
    events: list[Event], steps: int, bin_ms: float, kind: FrameKind, downsample: int, start: int, length: int
) -> None:
    side = 12 // downsample
    expected = np.zeros((steps, 2, side, side), int)
    for x, y, polarity, time in events:
        for step in range(steps):
            inside = start + 1000 * bin_ms * step <= time < start + 1000 * bin_ms * (step + 1)
            if inside and time < start + length:
                expected[step, polarity, y // downsample, x // downsample] += 1
    found = binned(Binning(steps, bin_ms, kind, downsample), events, 12, start, start + length)
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected.clip(max=1) if kind == "binary" else expected)


def test_a_count_saturates_at_255() -> None:
    events = [(1, 2, 1, 0)] * 300 + [(0, 0, 0, 0)] * 255
    frames = binned(Binning(2, 1.0, "count"), events, 3)
    assert frames[0, 1, 2, 1] == 255
    assert frames[0, 0, 0, 0] == 255
    assert frames.astype(int).sum() == 510


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"bin_ms": 0}, {"bin_ms": -1}, {"bin_ms": np.nan}, {"downsample": 0}])
def test_bins_that_make_no_sense_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(DataError) as error:
        Binning(**({"steps": 3, "bin_ms": 3} | wrong))  # type: ignore[arg-type]
    assert_actionable(error, f"{next(iter(wrong))} = {next(iter(wrong.values()))}")


@pytest.mark.parametrize("name", ["nmnist", "dvs-gesture", "cifar10-dvs"])
def test_the_options_of_recordings_are_checked(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    with pytest.raises(DataError) as error:
        load_dataset(name, validation=1, seed=1, steps=5)
    assert_actionable(error, name, "bin_ms")
    with pytest.raises(DataError) as error:
        load_dataset(name, validation=1, seed=1, bin_ms=5.0)
    assert_actionable(error, name, "steps")
    with pytest.raises(DataError) as error:
        load_dataset(name, validation=1, seed=1, steps=5, bin_ms=5.0, downsample=5)
    assert_actionable(error, "downsample = 5")
    with pytest.raises(DataError) as error:
        load_dataset(name, validation=1, seed=1, steps=5, bin_ms=5.0, events="voxel")  # type: ignore[arg-type]
    assert_actionable(error, "'voxel'", "binary", "count")


# --- N-MNIST


def nmnist_file(events: list[Event]) -> bytes:
    return b"".join(
        bytes([x, y, polarity << 7 | time >> 16, time >> 8 & 0xFF, time & 0xFF]) for x, y, polarity, time in events
    )


@given(events_in(34, 34, last=(1 << 23) - 1))
def test_an_nmnist_file_is_read_back(events: list[Event]) -> None:
    assert as_list(read_nmnist_events(nmnist_file(events), "a.bin")) == events


def test_an_overflow_of_the_timer_moves_all_later_events() -> None:
    raw = nmnist_file([(1, 2, 1, 100), (0, 240, 0, 8191), (3, 4, 0, 5), (0, 240, 0, 0), (5, 6, 1, 7)])
    assert as_list(read_nmnist_events(raw, "a.bin")) == [(1, 2, 1, 100), (3, 4, 0, 8197), (5, 6, 1, 16391)]


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"", "no events"),
        (nmnist_file([(0, 240, 0, 0)]), "no events"),
        (nmnist_file([(1, 1, 1, 1)])[:-1], "truncated"),
        (nmnist_file([(1, 1, 1, 1)]) + b"\0", "truncated"),
        (nmnist_file([(34, 1, 1, 1)]), "34x34"),
        (nmnist_file([(1, 34, 1, 1)]), "34x34"),
    ],
)
def test_a_damaged_nmnist_file_is_refused(raw: bytes, word: str) -> None:
    with pytest.raises(DataError) as error:
        read_nmnist_events(raw, "Train/3/00017.bin")
    assert_actionable(error, "Train/3/00017.bin", word)


def mark(number: int) -> list[Event]:
    """A recording that tells its number, below 128: the column of one event at 3 ms, and one at 7 ms."""
    return [(number % 32, number // 32, 1, 3000), (0, 33, 0, 7000)]


def number_of(frames: np.ndarray) -> int:
    """The number that `mark` gave, of frames of 3 ms; nothing else may be in them."""
    [[step, polarity, row, column]] = np.argwhere(frames[:2])
    assert (step, polarity) == (1, 1)
    assert np.argwhere(frames[2:]).tolist() == [[0, 0, 33, 0]]
    return int(row * 32 + column)


def zip_of(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def small_nmnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with 20 training recordings, numbered from 1, and 6 test ones, from 101; the label is the last digit."""
    folder = tmp_path / "nmnist"
    for part, numbers in (("Train", range(20, 0, -1)), ("Test", range(101, 107))):
        members = {f"{part}/{n % 10}/{n:05}.bin": nmnist_file(mark(n)) for n in numbers}
        zip_of(folder / f"{part}.zip", {f"{part}/": b""} | members)
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    declare_nmnist(folder, monkeypatch)
    return folder


def declare_nmnist(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the checksums of the files for the official ones."""
    monkeypatch.setattr(nmnist, "_FILES", {name: ("url", md5(folder / name)) for name in nmnist._FILES})


def load_small_nmnist(**options: object) -> Dataset:
    given = {"validation": 6, "seed": 1, "steps": 4, "bin_ms": 3.0} | options
    return load_dataset("nmnist", **given)  # type: ignore[arg-type]


def numbers_of(split: Split) -> list[int]:
    numbers = [number_of(frames) for frames in split.images]
    assert split.labels.tolist() == [number % 10 for number in numbers]
    assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int64)
    return numbers


def test_nmnist_is_split_by_seed_and_keeps_the_official_test_set(small_nmnist: Path) -> None:
    data = load_small_nmnist()
    assert (data.note, data.temporal) == ("official files, checksums verified", True)
    assert data.train.images.shape == (14, 4, 2, 34, 34)
    assert data.image_shape == (2, 34, 34)
    assert sorted(numbers_of(data.train) + numbers_of(data.validation)) == list(range(1, 21))
    assert numbers_of(data.test) == list(range(101, 107))
    assert numbers_of(load_small_nmnist().validation) == numbers_of(data.validation)
    assert numbers_of(load_small_nmnist(seed=2).validation) != numbers_of(data.validation)


def test_nmnist_in_other_bins(small_nmnist: Path) -> None:
    data = load_small_nmnist(steps=1, bin_ms=10.0, events="count", downsample=17)
    assert data.image_shape == (2, 2, 2)
    assert data.test.images[0, 0].tolist() == [[[0, 0], [1, 0]], [[1, 0], [0, 0]]]
    assert load_small_nmnist(steps=2).test.images.sum() == 6  # the event at 7 ms comes too late


@pytest.mark.parametrize("name", ["Train.zip", "Test.zip"])
def test_a_subset_of_nmnist_is_taken_only_when_asked_for(small_nmnist: Path, name: str) -> None:
    part = name.removesuffix(".zip")
    zip_of(small_nmnist / name, {f"{part}/{n}/{n}.bin": nmnist_file(mark(n)) for n in range(1, 9)})
    with pytest.raises(DataError) as error:
        load_small_nmnist()
    assert_actionable(error, name, nmnist._FILES[name][1], md5(small_nmnist / name), "subset = true")
    expected = {
        "Train.zip": "subset: 8 training, 6 test recordings",
        "Test.zip": "subset: 20 training, 8 test recordings",
    }
    assert load_small_nmnist(subset=True).note == expected[name]


def test_the_official_files_are_no_subset(small_nmnist: Path) -> None:
    assert load_small_nmnist(subset=True).note == "official files, checksums verified"


def test_a_missing_file_of_nmnist_is_named(small_nmnist: Path) -> None:
    (small_nmnist / "Test.zip").unlink()
    with pytest.raises(DataError) as error:
        load_small_nmnist()
    assert_actionable(error, DATA_VARIABLE, "nmnist/Test.zip")


GOOD = nmnist_file(mark(1))


@pytest.mark.parametrize(
    ("members", "word"),
    [
        ({}, "Train/<label>/<index>.bin"),
        ({"Test/1/1.bin": GOOD}, "Train/<label>/<index>.bin"),
        ({"Train/11/1.bin": GOOD}, "Train/<label>/<index>.bin"),
        ({"Train/1/1.bin": GOOD, "../Train/1/2.bin": GOOD}, "../Train/1/2.bin"),
        ({"Train/1/1.bin": GOOD, "/Train/1/2.bin": GOOD}, "/Train/1/2.bin"),
        ({"Train/1/1.bin": GOOD, "Train/1/../../../2.bin": GOOD}, "Train/1/../../../2.bin"),
        ({"Train/1/1.bin": GOOD, "Train/1/2.bin": b""}, "Train/1/2.bin"),
        ({"Train/1/1.bin": GOOD, "Train/1/2.bin": GOOD[:-2]}, "Train/1/2.bin"),
        ({"Train/1/1.bin": GOOD, "Train/1/2.bin": bytes(5 << 20)}, "5242880 bytes"),
        ({"Train/1/1.bin": GOOD}, "1 training samples"),
    ],
    ids=["empty", "test", "label", "up", "absolute", "up within", "no events", "cut", "bomb", "none left to train on"],
)
def test_an_archive_of_wrong_content_is_refused(small_nmnist: Path, members: dict[str, bytes], word: str) -> None:
    before = sorted(small_nmnist.parent.rglob("*"))
    zip_of(small_nmnist / "Train.zip", members)
    with pytest.raises(DataError) as error:
        load_small_nmnist(validation=1, subset=True)
    assert_actionable(error, word)
    assert sorted(small_nmnist.parent.rglob("*")) == before


def cut(raw: bytearray) -> None:
    del raw[len(raw) // 2 :]


def flip_content(raw: bytearray) -> None:
    raw[raw.index(GOOD) + 4] ^= 1  # an event stays an event, but its checksum tells


def encrypt(raw: bytearray) -> None:
    raw[raw.index(b"PK\x01\x02") + 8] |= 1


def unknown_compression(raw: bytearray) -> None:
    for signature, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        raw[raw.index(signature) + offset] = 99


@pytest.mark.parametrize("damage", [cut, flip_content, encrypt, unknown_compression, bytearray.clear])
@pytest.mark.parametrize("name", ["Train.zip", "Test.zip"])
def test_a_damaged_archive_is_named(small_nmnist: Path, name: str, damage: Callable[[bytearray], None]) -> None:
    part = name.removesuffix(".zip")
    path = zip_of(small_nmnist / name, {f"{part}/1/{n}.bin": GOOD for n in range(9)}, zipfile.ZIP_STORED)
    raw = bytearray(path.read_bytes())
    damage(raw)
    path.write_bytes(raw)
    with pytest.raises(DataError) as error:
        load_small_nmnist(subset=True)
    assert_actionable(error, str(path), "Download it again")


def test_frames_beyond_the_memory_are_refused(small_nmnist: Path) -> None:
    recordings, of_a_step = 26, 2 * 34 * 34
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with pytest.raises(DataError) as error:
        load_small_nmnist(steps=memory // (recordings * of_a_step) + 1)
    assert_actionable(error, "GiB", "steps", "downsample")


# --- AEDAT 3.1 and DVS128 Gesture

AEDAT3_HEADER = (
    b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n"
    b"#Start-Time: 2015-12-03 14:47:00 (TZ+0100)\r\n#!END-HEADER\r\n"
)


def packet(events: list[Event], overflow: int = 0, kind: int = 1, number: int | None = None, size: int = 8) -> bytes:
    number = len(events) if number is None else number
    header = struct.pack("<hhiiiiii", kind, 1, size, 4, overflow, number, number, number)
    words = [(x << 17 | y << 2 | polarity << 1 | 1, time) for x, y, polarity, time in events]
    return header + b"".join(struct.pack("<Ii", *pair) for pair in words)


def aedat3(*packets: bytes) -> bytes:
    return AEDAT3_HEADER + b"".join(packets)


@given(st.lists(st.tuples(events_in(128, 128, last=(1 << 31) - 1), st.integers(0, 3)), min_size=1, max_size=4))
def test_an_aedat3_file_is_read_back(packets: list[tuple[list[Event], int]]) -> None:
    raw = aedat3(*(packet(events, overflow) for events, overflow in packets))
    expected = [(x, y, p, t + (o << 31)) for events, o in packets for x, y, p, t in events]
    assert as_list(read_aedat3(raw, "a.aedat")) == expected


def test_packets_of_other_events_are_passed_over() -> None:
    special, frame = packet([(0, 0, 0, 9)], kind=0), packet([], kind=2, number=2, size=20) + bytes(40)
    raw = aedat3(special, packet([(1, 2, 1, 3)]), frame, packet([]), packet([(4, 5, 0, 6)]))
    assert as_list(read_aedat3(raw, "a.aedat")) == [(1, 2, 1, 3), (4, 5, 0, 6)]


ONE = packet([(1, 2, 1, 3)])


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"", "no AEDAT 3.1"),
        (aedat3(ONE).replace(b"3.1", b"3.0", 1), "no AEDAT 3.1"),
        (aedat3(ONE).replace(b"#!END-HEADER", b"#", 1), "no AEDAT 3.1"),
        (aedat3(), "no events"),
        (aedat3(packet([])), "no events"),
        (aedat3(packet([(0, 0, 0, 9)], kind=0)), "no events"),
        (aedat3(ONE) + ONE[:27], "truncated"),
        (aedat3(ONE)[:-1], "truncated"),
        (aedat3(packet([(1, 2, 1, 3)], number=2)), "truncated"),
        (aedat3(packet([], number=(1 << 31) - 1)), "truncated"),
        (aedat3(packet([], number=-1)), "-1 events"),
        (aedat3(packet([], size=0)), "0 bytes"),
        (aedat3(packet([], kind=0, size=-8, number=3)), "-8 bytes"),
        (aedat3(packet([(1, 2, 1, 3)], size=16)), "16 bytes"),
        (aedat3(packet([(1, 2, 1, 3)], overflow=-1)), "a packet"),
        (aedat3(packet([(128, 2, 1, 3)])), "128x128"),
        (aedat3(packet([(1, 128, 1, 3)])), "128x128"),
    ],
)
def test_a_damaged_aedat3_file_is_refused(raw: bytes, word: str) -> None:
    with pytest.raises(DataError) as error:
        read_aedat3(raw, "user01_led.aedat")
    assert_actionable(error, "user01_led.aedat", word)


def trial_files(number: int) -> dict[str, bytes]:
    """A trial of user `number` with two gestures, of classes `number` % 10 and 10 (from 0).

    The first, from 1 s to 1.009 s, is marked at +3 and +7 ms. The second lasts from 2 s to 2.004 s, and is marked at +3
    ms; the event at +7 ms lies behind its end.
    """
    name = f"user{number:02}_fluorescent_led"
    events = [(x, y, p, start + t) for start in (1_000_000, 2_000_000) for x, y, p, t in mark(number)]
    table = f"class,startTime_usec,endTime_usec\n{number % 10 + 1},1000000,1009000\n11,2000000,2004000\n"
    return {f"{name}.aedat": aedat3(packet([(9, 9, 0, 999_999)]), packet(events)), f"{name}_labels.csv": table.encode()}


TRAIN_USERS, TEST_USERS = range(1, 8), range(24, 27)


def write_trials(folder: Path) -> None:
    folder.mkdir(parents=True)
    for part, users in (("train", TRAIN_USERS), ("test", TEST_USERS)):
        names = [name for user in users for name in trial_files(user)]
        listed = "".join(f"{name}\n" for name in names if name.endswith(".aedat"))
        (folder / f"trials_to_{part}.txt").write_text(listed + "\n")
    for user in (*TRAIN_USERS, *TEST_USERS):
        for name, content in trial_files(user).items():
            (folder / name).write_bytes(content)
    (folder / "gesture_mapping.csv").write_text("hand_clapping,1\n")


@pytest.fixture
def gestures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The unpacked folder of DVS128 Gesture with a trial of ten users."""
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    folder = tmp_path / "dvs-gesture" / "DvsGesture"
    write_trials(folder)
    return folder


def pack_gestures(folder: Path) -> Path:
    path = folder.with_name("DvsGesture.tar.gz")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, folder.name)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    return path


def load_gestures(**options: object) -> Dataset:
    given = {"validation": 4, "seed": 1, "steps": 4, "bin_ms": 3.0} | options
    return load_dataset("dvs-gesture", **given)  # type: ignore[arg-type]


def assert_gestures(data: Dataset, train_users: list[int], test_users: list[int]) -> None:
    def seen(*splits: Split) -> list[tuple[int, int]]:
        """User and class of each sample; the class decides how long the gesture lasts."""
        found = []
        for split in splits:
            for frames, label in zip(split.images, split.labels.tolist(), strict=True):
                [[polarity, row, column]] = np.argwhere(frames[1])
                assert polarity == 1
                assert np.argwhere(frames[[0, 2, 3]]).tolist() == ([] if label == 10 else [[1, 0, 33, 0]])
                found.append((int(row * 32 + column), label))
        return found

    def expected(users: list[int]) -> list[tuple[int, int]]:
        return [(user, label) for user in users for label in (user % 10, 10)]

    assert seen(data.test) == expected(test_users)
    assert sorted(seen(data.train, data.validation)) == sorted(expected(train_users))


def test_gestures_from_the_unpacked_folder(gestures: Path) -> None:
    data = load_gestures()
    assert (data.temporal, data.image_shape, len(set(data.class_names))) == (True, (2, 128, 128), 11)
    assert (len(data.train), len(data.validation), len(data.test)) == (10, 4, 6)
    assert data.note == "unpacked files, no checksum verified"
    assert_gestures(data, list(TRAIN_USERS), list(TEST_USERS))
    assert load_gestures(downsample=4).image_shape == (2, 32, 32)


def test_gestures_from_the_archive(gestures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack_gestures(gestures)
    with pytest.raises(DataError) as error:
        load_gestures()
    assert_actionable(error, path.name, dvs_gesture._MD5, "subset = true")
    data = load_gestures(subset=True)
    assert data.note == "subset: 14 training, 6 test recordings"
    assert_gestures(data, list(TRAIN_USERS), list(TEST_USERS))
    monkeypatch.setattr(dvs_gesture, "_MD5", md5(path))
    data = load_gestures()
    assert data.note == "official files, checksums verified"
    assert_gestures(data, list(TRAIN_USERS), list(TEST_USERS))


def test_a_trial_that_is_missing_is_left_out_of_a_subset_only(gestures: Path) -> None:
    (gestures / "user03_fluorescent_led.aedat").unlink()
    (gestures / "user03_fluorescent_led_labels.csv").unlink()
    with pytest.raises(DataError) as error:
        load_gestures()
    assert_actionable(error, "user03_fluorescent_led.aedat", "subset = true")
    data = load_gestures(subset=True)
    assert data.note == "subset: 12 training, 6 test recordings"
    assert_gestures(data, [1, 2, 4, 5, 6, 7], list(TEST_USERS))


@pytest.mark.parametrize("name", ["dvs-gesture", "cifar10-dvs"])
def test_who_has_not_downloaded_a_set_by_hand_reads_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    page = {"dvs-gesture": "https://ibm.ent.box.com/", "cifar10-dvs": "https://figshare.com/"}[name]
    for folder in (None, tmp_path):
        monkeypatch.delenv(DATA_VARIABLE, raising=False)
        if folder:
            monkeypatch.setenv(DATA_VARIABLE, str(folder))
        with pytest.raises(DataError) as error:
            load_dataset(name, validation=1, seed=1, steps=4, bin_ms=3.0)
        assert_actionable(error, page, DATA_VARIABLE, f"{name}/", str(folder) if folder else "by hand")


CSV = "user02_fluorescent_led_labels.csv"
HEAD = "class,startTime_usec,endTime_usec\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("trials_to_train.txt", None, ["trials_to_train.txt"]),
        ("trials_to_test.txt", None, ["trials_to_test.txt"]),
        ("trials_to_test.txt", "", ["no test recordings"]),
        ("trials_to_test.txt", "../../user24_led.aedat\n", ["trials_to_test.txt", "names no trial"]),
        ("trials_to_test.txt", "user24_fluorescent_led.aedat\n" * 2, ["trials_to_test.txt", "twice"]),
        ("trials_to_test.txt", "user01_fluorescent_led.aedat\n", ["share a trial"]),
        ("trials_to_test.txt", "\xff\xfe", ["trials_to_test.txt", "no text"]),
        (CSV, None, [CSV]),
        (CSV, HEAD + "0,1,2\n", [CSV, "0,1,2"]),
        (CSV, HEAD + "12,1,2\n", [CSV, "12,1,2"]),
        (CSV, HEAD + "1,5,5\n", [CSV, "1,5,5"]),
        (CSV, HEAD + "1,-5,5\n", [CSV, "1,-5,5"]),
        (CSV, HEAD + "1,5\n", [CSV, "1,5"]),
        (CSV, HEAD + "1,5," + "9" * 5000, [CSV, "no gesture"]),
        ("user02_fluorescent_led.aedat", "text", ["user02_fluorescent_led.aedat", "AEDAT 3.1"]),
    ],
)
def test_a_damaged_trial_is_named(gestures: Path, name: str, content: str | None, words: list[str]) -> None:
    (gestures / name).unlink()
    if content is not None:
        (gestures / name).write_text(content, encoding="latin-1")
    with pytest.raises(DataError) as error:
        load_gestures()
    assert_actionable(error, *words)


# --- AEDAT 2.0 and CIFAR10-DVS

AEDAT2_HEADER = (
    b"#!AER-DAT2.0\r\n# This is a raw AE data file - do not edit\r\n"
    b"# Data format is int32 address, int32 timestamp (8 bytes total), repeated for each event\r\n"
    b"# Timestamps tick is 1 us\r\n"
)


def aedat2(events: list[Event]) -> bytes:
    """Columns count from the right and rows from the bottom; polarity 0 is ON."""
    words = [((127 - y) << 8 | (127 - x) << 1 | (1 - polarity), time) for x, y, polarity, time in events]
    return AEDAT2_HEADER + b"".join(struct.pack(">II", *pair) for pair in words)


@given(events_in(128, 128, last=(1 << 31) - 1))
def test_an_aedat2_file_is_read_back(events: list[Event]) -> None:
    assert as_list(read_aedat2(aedat2(events), "a.aedat")) == events


def test_external_events_are_left_out() -> None:
    raw = aedat2([(1, 2, 1, 3)]) + struct.pack(">4I", 0x8000, 4, 0x8000_0000, 5)
    assert as_list(read_aedat2(raw, "a.aedat")) == [(1, 2, 1, 3)]


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"", "no AEDAT 2.0"),
        (aedat2([(1, 2, 1, 3)]).replace(b"2.0", b"3.1", 1), "no AEDAT 2.0"),
        (b"#!AER-DAT2.0", "truncated"),
        (AEDAT2_HEADER[:-2], "truncated"),
        (AEDAT2_HEADER, "no events"),
        (AEDAT2_HEADER + struct.pack(">II", 0x8000, 4), "no events"),
        (aedat2([(1, 2, 1, 3)])[:-1], "truncated"),
        (aedat2([(1, 2, 1, 3)]) + b"\0", "truncated"),
        (AEDAT2_HEADER + struct.pack(">II", 0x1_0000, 4), "128x128"),
    ],
)
def test_a_damaged_aedat2_file_is_refused(raw: bytes, word: str) -> None:
    with pytest.raises(DataError) as error:
        read_aedat2(raw, "cifar10_cat_7.aedat")
    assert_actionable(error, "cifar10_cat_7.aedat", word)


CLASSES = cifar10_dvs.CIFAR10_CLASSES


@pytest.fixture
def dvs_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten folders of 8 recordings; the first 6 of each class train.

    Recording k of class c is marked 8 c + k, and starts at a time of its own.
    """
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    monkeypatch.setattr(cifar10_dvs, "_PER_CLASS", 8)
    monkeypatch.setattr(cifar10_dvs, "_TRAIN_PER_CLASS", 6)
    for c, name in enumerate(CLASSES):
        folder = tmp_path / "cifar10-dvs" / name
        folder.mkdir(parents=True)
        for k in range(8):
            start = 360_000_000 * k
            events = [(127, 127, 0, start), *((x, y, p, start + t) for x, y, p, t in mark(8 * c + k))]
            (folder / f"cifar10_{name}_{k}.aedat").write_bytes(aedat2(events))
    return tmp_path / "cifar10-dvs"


def zip_folder(folder: Path) -> Path:
    members = {f"{folder.name}/{file.name}": file.read_bytes() for file in sorted(folder.iterdir())}
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    return zip_of(folder.with_suffix(".zip"), members)


def load_dvs(**options: object) -> Dataset:
    given = {"validation": 10, "seed": 1, "steps": 4, "bin_ms": 3.0} | options
    return load_dataset("cifar10-dvs", **given)  # type: ignore[arg-type]


def marks_of(split: Split) -> list[int]:
    """Marks of the recordings, and that their labels fit; the first event of each lies in the last pixel."""
    images = split.images.copy()
    assert (images[:, 0, 0, 127, 127] == 1).all()
    images[:, 0, 0, 127, 127] = 0
    marks = [number_of(frames) for frames in images]
    assert split.labels.tolist() == [mark // 8 for mark in marks]
    return marks


def test_cifar10_dvs_from_its_folders(dvs_folders: Path) -> None:
    data = load_dvs()
    assert (data.temporal, data.image_shape, data.class_names) == (True, (2, 128, 128), CLASSES)
    assert (len(data.train), len(data.validation), len(data.test)) == (50, 10, 20)
    assert data.note == "all recordings, no checksum verified"
    assert marks_of(data.test) == [8 * c + k for c in range(10) for k in (6, 7)]
    assert sorted(marks_of(data.train) + marks_of(data.validation)) == [8 * c + k for c in range(10) for k in range(6)]


def test_cifar10_dvs_from_its_archives(dvs_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_dvs()
    paths = {name: zip_folder(dvs_folders / name) for name in CLASSES}
    with pytest.raises(DataError) as error:
        load_dvs()
    assert_actionable(error, "airplane.zip", cifar10_dvs._MD5["airplane"])
    monkeypatch.setattr(cifar10_dvs, "_MD5", {name: md5(path) for name, path in paths.items()})
    data = load_dvs()
    assert data.note == "official files, checksums verified"
    for part in ("train", "validation", "test"):
        assert np.array_equal(getattr(data, part).images, getattr(expected, part).images)


def test_one_archive_among_folders_is_checked_too(dvs_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zip_folder(dvs_folders / "truck")
    with pytest.raises(DataError) as error:
        load_dvs()
    assert_actionable(error, "truck.zip")
    monkeypatch.setitem(cifar10_dvs._MD5, "truck", md5(path))
    assert load_dvs().note == "all recordings, no checksum verified"


def test_a_subset_of_cifar10_dvs_is_taken_only_when_asked_for(dvs_folders: Path) -> None:
    (dvs_folders / "cat" / "cifar10_cat_2.aedat").unlink()
    (dvs_folders / "cat" / "cifar10_dog_2.aedat").touch()  # neither this nor a number beyond counts
    (dvs_folders / "cat" / "cifar10_cat_8.aedat").touch()
    with pytest.raises(DataError) as error:
        load_dvs()
    assert_actionable(error, "cat", "7 recordings of 8", "subset = true")
    data = load_dvs(subset=True)
    assert data.note == "subset: 59 training, 20 test recordings"
    assert 8 * CLASSES.index("cat") + 2 not in marks_of(data.train) + marks_of(data.validation)


def test_a_missing_class_of_cifar10_dvs_is_named(dvs_folders: Path) -> None:
    zip_folder(dvs_folders / "horse").unlink()
    with pytest.raises(DataError) as error:
        load_dvs()
    assert_actionable(error, "horse.zip", "figshare")


def test_a_damaged_recording_of_cifar10_dvs_is_named(dvs_folders: Path) -> None:
    (dvs_folders / "frog" / "cifar10_frog_5.aedat").write_bytes(b"")
    with pytest.raises(DataError) as error:
        load_dvs()
    assert_actionable(error, "cifar10_frog_5.aedat")


def test_a_recording_that_vanishes_is_named(dvs_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = cifar10_dvs.read_aedat2

    def removing(raw: bytes, where: str) -> Events:
        (dvs_folders / "airplane" / "cifar10_airplane_1.aedat").unlink(missing_ok=True)
        return reader(raw, where)

    monkeypatch.setattr(cifar10_dvs, "read_aedat2", removing)
    with pytest.raises(DataError) as error:
        load_dvs()
    assert_actionable(error, "airplane", "cannot be read")


# --- Real recordings, where they are at hand


def test_real_nmnist_recordings(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shared_data / "nmnist" / "Test.zip"
    if not path.is_file():
        pytest.skip("no nmnist: the folder of data sets holds no nmnist/Test.zip")
    if path.stat().st_size > 1 << 27:
        pytest.skip("all of nmnist takes a minute to read and 5 GB; a part of it is enough here")
    monkeypatch.setenv(DATA_VARIABLE, str(shared_data))
    data = load_dataset("nmnist", validation=100, seed=1, steps=110, bin_ms=3.0, events="count", subset=True)
    assert data.note.startswith("subset: ")
    with zipfile.ZipFile(path) as archive:
        names = sorted((n for n in archive.namelist() if n.endswith(".bin")), key=lambda name: name.rsplit("/", 1)[1])
        assert data.test.labels.tolist() == [int(name.split("/")[1]) for name in names]
        for frames, name in zip(data.test.images[:3], names, strict=False):
            raw, expected = archive.read(name), np.zeros_like(frames)
            for at in range(0, len(raw), 5):
                time = int.from_bytes(raw[at + 2 : at + 5], "big") & 0x7FFFFF
                if time < 330_000:
                    expected[time // 3000, raw[at + 2] >> 7, raw[at + 1], raw[at]] += 1
            assert np.array_equal(frames, expected)
