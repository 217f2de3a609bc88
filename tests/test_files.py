"""Files are written whole or not at all, and one that cannot be read says which command makes it."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikeport.models.errors import SpikeportError
from spikeport.models.files import atomic_path, read_arrays, read_json, write_arrays, write_json, write_text

MADE_BY = "spikeport train"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- Writing


def test_a_file_appears_only_when_the_block_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "result.json"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent  # a rename within one folder is atomic
        assert temporary.suffix == path.suffix
    assert path.read_text() == "new"
    assert names(path.parent) == ["result.json"]


@pytest.mark.parametrize("failure", [ValueError("no"), KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("existed", [True, False])
def test_a_failed_block_leaves_nothing_behind_and_the_old_file_intact(
    tmp_path: Path, failure: BaseException, existed: bool
) -> None:
    path = tmp_path / "result.json"
    if existed:
        path.write_text("old")

    def write_half() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half of the n")
            raise failure

    with pytest.raises(SpikeportError if isinstance(failure, OSError) else type(failure)):
        write_half()
    assert names(tmp_path) == (["result.json"] if existed else [])
    assert not existed or path.read_text() == "old"


def test_a_full_disk_is_named_with_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(SpikeportError, match=r"cannot write .*result\.json: No space left on device\.$"),
        atomic_path(tmp_path / "result.json"),
    ):
        raise OSError(28, "No space left on device")


def test_an_old_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_text(path, "a much longer old text")
    write_text(path, "new")
    assert path.read_text() == "new"


def test_two_writers_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    with atomic_path(path) as first, atomic_path(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the last to finish
    assert names(tmp_path) == ["result.json"]


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.skipif(os.name != "posix", reason="no permission bits here")
def test_a_new_file_has_the_permissions_that_the_umask_leaves(tmp_path: Path, umask: None) -> None:
    write_text(tmp_path / "result.txt", "x")
    assert stat.S_IMODE((tmp_path / "result.txt").stat().st_mode) == 0o640
    assert os.umask(0o027) == 0o027  # unchanged by the writing


def assert_unwritable(path: Path) -> None:
    for write in (
        lambda: write_json(path, {}),
        lambda: write_text(path, ""),
        lambda: write_arrays(path, {}, {"a": np.zeros(1)}),
    ):
        with pytest.raises(SpikeportError, match="cannot write") as error:
            write()
        assert str(path) in str(error.value)
        assert len(str(error.value).splitlines()) == 1


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("in the way")
    assert_unwritable(tmp_path / "runs" / "result.json")
    assert_unwritable(tmp_path / "runs" / "digits" / "result.json")
    assert (tmp_path / "runs").read_text() == "in the way"


def test_a_folder_in_place_of_the_file_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "result.json").mkdir()
    assert_unwritable(tmp_path / "result.json")
    assert names(tmp_path) == ["result.json"]


def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write everywhere")
        assert_unwritable(tmp_path / "result.json")
    finally:
        tmp_path.chmod(0o755)
    assert names(tmp_path) == []


# --- JSON

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_json_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path, MADE_BY) == value
    assert path.read_text(encoding="utf-8").endswith("\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"accuracy": [1.0, float("nan")]}])
def test_values_that_json_has_no_word_for_are_refused_and_leave_the_old_file(tmp_path: Path, value: object) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"kept": True})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, value)
    assert read_json(path, MADE_BY) == {"kept": True}
    assert names(tmp_path) == ["summary.json"]


def assert_unreadable(error: pytest.ExceptionInfo[SpikeportError], path: Path) -> None:
    text = str(error.value)
    assert str(path) in text
    assert f"`{MADE_BY}`" in text
    assert len(text.splitlines()) <= 2


def test_a_missing_json_file_names_the_command_that_makes_it(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    with pytest.raises(SpikeportError, match=r"is missing\. Run .* first") as error:
        read_json(path, MADE_BY)
    assert_unreadable(error, path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"a": 1,}', b"[1, 2", b"\xff\xfe{}", b'{"a": 1}{"b": 2}', b"PK\x03\x04"]
)
def test_a_damaged_json_file_names_the_command_that_makes_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "summary.json"
    path.write_bytes(content)
    with pytest.raises(SpikeportError, match=r"cannot be read.*Run .* again") as error:
        read_json(path, MADE_BY)
    assert_unreadable(error, path)


def test_a_folder_in_place_of_a_json_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpikeportError, match="cannot be read") as error:
        read_json(tmp_path, MADE_BY)
    assert_unreadable(error, tmp_path)


# --- Arrays


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    header = {"format": "x", "sizes": [1, 2], "name": "µ"}
    arrays = {
        "spikes": np.arange(12, dtype=np.uint8).reshape(3, 4),
        "empty": np.zeros((0, 5), np.float32),
        "scalar": np.array(2**40),
        "a/b-c": np.array([True, False]),
    }
    write_arrays(tmp_path / "trace.npz", header, arrays)
    found_header, found = read_arrays(tmp_path / "trace.npz", MADE_BY)
    assert found_header == header
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert names(tmp_path) == ["trace.npz"]


def test_arrays_keep_the_name_of_their_file_whatever_its_ending(tmp_path: Path) -> None:
    write_arrays(tmp_path / "trace.data", {}, {"a": np.ones(2)})
    assert names(tmp_path) == ["trace.data"]
    assert read_arrays(tmp_path / "trace.data", MADE_BY)[1]["a"].tolist() == [1, 1]


def test_objects_that_would_need_pickle_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allow_pickle"):
        write_arrays(tmp_path / "trace.npz", {}, {"a": np.array([{}, []], dtype=object)})
    assert names(tmp_path) == []


def test_a_header_with_nan_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_arrays(tmp_path / "trace.npz", {"rate": float("nan")}, {})
    assert names(tmp_path) == []


def test_missing_arrays_name_the_command_that_makes_them(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    with pytest.raises(SpikeportError, match=r"is missing\. Run .* first") as error:
        read_arrays(path, MADE_BY)
    assert_unreadable(error, path)


def damaged(path: Path, how: str) -> None:
    write_arrays(path, {"format": "x"}, {"a": np.random.default_rng(0).integers(0, 9, 5000)})
    whole = path.read_bytes()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "cut by one byte":
        path.write_bytes(whole[:-1])
    elif how == "a flipped bit":
        at = whole.index(b"a.npy") + 2000
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    elif how == "text":
        path.write_text("no arrays")
    elif how == "one plain array":
        with path.open("wb") as stream:
            np.save(stream, np.ones(3))
    elif how == "without a header":
        with path.open("wb") as stream:
            np.savez(stream, a=np.ones(3))
    elif how == "a header that is no JSON":
        with path.open("wb") as stream:
            np.savez(stream, __header__=np.frombuffer(b"{", np.uint8))
    elif how == "pickled":
        with path.open("wb") as stream:
            np.savez(stream, __header__=np.frombuffer(b"{}", np.uint8), a=np.array([{}], dtype=object))
    else:
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize(
    "how",
    [
        "empty",
        "truncated",
        "cut by one byte",
        "a flipped bit",
        "text",
        "one plain array",
        "without a header",
        "a header that is no JSON",
        "pickled",
        "a folder",
    ],
)
def test_damaged_arrays_name_the_command_that_makes_them(tmp_path: Path, how: str) -> None:
    path = tmp_path / "trace.npz"
    damaged(path, how)
    with pytest.raises(SpikeportError, match=r"is damaged.*Run .* again") as error:
        read_arrays(path, MADE_BY)
    assert_unreadable(error, path)
