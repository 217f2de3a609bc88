"""Writing results so that an interrupted run never leaves a half-written file."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from spikeport.models.errors import SpikeportError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds, delete it otherwise.

    Raises SpikeportError where the folder cannot be written or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise SpikeportError(f"cannot write {path}: {error.strerror}. Choose another output folder.") from error
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        mode = 0o666 & ~_umask()
        temporary.chmod(mode)
        temporary.replace(path)
    except OSError as error:
        raise SpikeportError(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path, what: str) -> Iterator[Path]:
    """Yield a temporary folder beside `folder` that takes its place if the block succeeds, and is deleted otherwise.

    Raises SpikeportError where it cannot be written; `what` names what the folder holds.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            yield temporary
            temporary.chmod(0o755)
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise SpikeportError(f"cannot write the {what} {folder}: {error.strerror or error}.") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; NaN and infinity are refused, as JSON has no word for them."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path, made_by: str) -> Any:
    """Read a JSON file of the run folder; `made_by` names the command that writes it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpikeportError(f"{path} is missing. Run `{made_by}` first.") from None
    except (OSError, ValueError) as error:
        raise SpikeportError(f"{path} cannot be read ({error}). Run `{made_by}` again.") from None


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_arrays(path: Path, header: Any, arrays: dict[str, np.ndarray]) -> None:
    """Write named arrays and a JSON header into one .npz file, without pickle."""
    text = np.frombuffer(json.dumps(header, allow_nan=False).encode(), dtype=np.uint8)
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, allow_pickle=False, __header__=text, **arrays)


def read_arrays(path: Path, made_by: str) -> tuple[Any, dict[str, np.ndarray]]:
    """Read a file of `write_arrays`: its header and its arrays."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
        return json.loads(arrays.pop("__header__").tobytes()), arrays
    except FileNotFoundError:
        raise SpikeportError(f"{path} is missing. Run `{made_by}` first.") from None
    except Exception as error:  # a damaged zip raises anything from zlib.error to KeyError
        raise SpikeportError(f"{path} is damaged ({type(error).__name__}). Run `{made_by}` again.") from None
