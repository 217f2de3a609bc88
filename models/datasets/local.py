"""Where files come from: the folder that SPIKEPORT_DATA names, else a download; both checked by checksum.

Archives are read member by member in memory. No name that stands in an archive ever becomes a path on the disk.
"""

import errno
import hashlib
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from spikeport.models.errors import DataError

DATA_VARIABLE = "SPIKEPORT_DATA"


def find_local(dataset: str, *names: str) -> Path | None:
    """The first of the files or folders `names` that SPIKEPORT_DATA has; None where the variable is not set.

    Raises DataError where it is set and has none of them.
    """
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        return None
    for name in names:
        for candidate in (Path(folder) / dataset / name, Path(folder) / name):
            if candidate.exists():
                return candidate
    wanted = " or ".join(f"{dataset}/{name}" for name in names)
    raise DataError(f"{DATA_VARIABLE}={folder} holds no {wanted}. Put the official file there or unset it.")


def find_by_hand(dataset: str, page: str, *names: str) -> Path:
    """As `find_local`, for files that only a person can download, from `page`."""
    try:
        if found := find_local(dataset, *names):
            return found
        reason = f"{dataset} must be downloaded by hand"
    except DataError:
        reason = f"{DATA_VARIABLE}={os.environ[DATA_VARIABLE]} holds no {dataset}/{names[0]}"
    raise DataError(
        f"{reason}. Get {names[0]} from {page}\n"
        f"and let {DATA_VARIABLE} name the folder that holds {dataset}/{' or '.join(names)}."
    )


def download(dataset: str, name: str, url: str, md5: str) -> Path:
    """A file of the cache, downloaded once; nothing stays of a download that fails or has another checksum."""
    import pooch

    folder = Path(pooch.os_cache("spikeport")) / dataset
    try:
        return Path(pooch.retrieve(url, f"md5:{md5}", fname=name, path=folder))
    except Exception as error:  # requests, urllib3 and pooch raise a dozen unrelated types
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = f"free some space for {folder}" if full else "try again with a network"
        raise DataError(
            f"cannot download {url} ({reason}).\n"
            f"Set {DATA_VARIABLE} to a folder that holds {dataset}/{name}, or {remedy}."
        ) from None


def official_file(dataset: str, name: str, url: str, md5: str) -> Path:
    """The official file: from the folder that SPIKEPORT_DATA names, else downloaded once; checked."""
    path = find_local(dataset, name)
    return download(dataset, name, url, md5) if path is None else checked(path, md5)


def checked(path: Path, md5: str) -> Path:
    """The path of a file with this checksum. Raises DataError where it has another one or cannot be read."""
    if (found := md5_of(path)) != md5:
        raise DataError(f"{path} is damaged or not the official file (md5 {found}, expected {md5}). Download it again.")
    return path


def is_official(path: Path, md5: str, subset: bool) -> bool:
    """Whether a file has the official checksum; only with `subset` may it have another one.

    Raises DataError where it has and may not.
    """
    found = md5_of(path)
    if found != md5 and not subset:
        raise DataError(
            f"{path} is damaged or not the official file (md5 {found}, expected {md5}).\n"
            "Download it again, or set subset = true to use the recordings that it holds."
        )
    return found == md5


def md5_of(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}.") from None


@dataclass(frozen=True, eq=False)
class Members:
    """The files of a folder or an archive: sizes in bytes by name, in the order in which reading them is fast."""

    path: Path
    sizes: dict[str, int]
    _read: Callable[[str], bytes]

    @staticmethod
    def of(path: Path, sizes: list[tuple[str, int]], read: Callable[[str], bytes]) -> "Members":
        """Raises DataError where two members have one name, or one leads out of the archive's folder."""
        for name, _ in sizes:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
                raise DataError(f"{path} holds a member {name[:80]!r}, which no official archive does.")
        if len(dict(sizes)) != len(sizes):
            raise DataError(f"{path} holds two members of one name; no official archive does. Download it again.")
        return Members(path, dict(sizes), read)

    def read(self, name: str, limit: int) -> bytes:
        """Content of a member of at most `limit` bytes, the most that a sound file has."""
        if self.sizes[name] > limit:
            raise DataError(f"{self.path}: {name} has {self.sizes[name]} bytes, more than any file of this data set.")
        with _damage_is_a_data_error(self.path):
            content = self._read(name)
            if len(content) != self.sizes[name]:
                raise EOFError(f"{name} ends early")
            return content


@contextmanager
def open_members(path: Path) -> Iterator[Members]:
    """Open a folder, a .zip or a .tar.gz. Raises DataError where it is damaged or cannot be read."""
    with ExitStack() as stack:
        with _damage_is_a_data_error(path):
            if path.is_dir():
                members = _folder_members(path)
            elif path.suffix == ".zip":
                members = _zip_members(path, stack.enter_context(zipfile.ZipFile(path)))
            else:
                members = _tar_members(path, stack.enter_context(tarfile.open(path, "r:gz")))
        yield members


def _folder_members(path: Path) -> Members:
    files = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
    return Members.of(
        path, [(name, f.stat().st_size) for name, f in files.items()], lambda name: files[name].read_bytes()
    )


def _zip_members(path: Path, archive: zipfile.ZipFile) -> Members:
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    if any(entry.flag_bits & 1 for entry in entries):
        raise DataError(f"{path} is encrypted; no official archive is. Download it again.")
    return Members.of(path, [(entry.filename, entry.file_size) for entry in entries], archive.read)


def _tar_members(path: Path, archive: tarfile.TarFile) -> Members:
    entries = [entry for entry in archive.getmembers() if entry.isfile()]
    by_name = {entry.name: entry for entry in entries}

    def read(name: str) -> bytes:
        stream = archive.extractfile(by_name[name])
        return stream.read() if stream else b""

    return Members.of(path, [(entry.name, entry.size) for entry in entries], read)


@contextmanager
def _damage_is_a_data_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise DataError(f"{path} is truncated, damaged or cannot be read ({reason}). Download it again.") from None
