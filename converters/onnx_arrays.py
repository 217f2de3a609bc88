"""Arrays of ONNX files, read as data from a stranger.

What an array declares is held against the bytes that are there before anything is allocated for it. Bytes that are kept
in another file are read from the model's own folder only.
"""

import math
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import onnx

LARGEST_TOTAL = 1 << 31
"""Bytes that all arrays of a model may take once read."""

_STORED: dict[int, tuple[np.dtype[np.generic], str]] = {
    onnx.TensorProto.FLOAT: (np.dtype("<f4"), "float_data"),
    onnx.TensorProto.DOUBLE: (np.dtype("<f8"), "double_data"),
    onnx.TensorProto.FLOAT16: (np.dtype("<f2"), "int32_data"),
    onnx.TensorProto.INT64: (np.dtype("<i8"), "int64_data"),
    onnx.TensorProto.INT32: (np.dtype("<i4"), "int32_data"),
    onnx.TensorProto.BOOL: (np.dtype("u1"), "int32_data"),
}
"""Types that are read: how their bytes lie in raw data, and the field that lists them otherwise."""


class Fault(Exception):
    """What is wrong with a node or its arrays; the reader says with which one."""


class Arrays:
    """Reads the arrays of one model, which lies in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.left = LARGEST_TOTAL

    def read(self, tensor: onnx.TensorProto) -> np.ndarray:
        """An array as float64 or int64. Raises Fault."""
        name = shown(tensor.name)
        if tensor.data_type not in _STORED or tensor.HasField("segment"):
            known = ", ".join(onnx.TensorProto.DataType.keys()[kind] for kind in _STORED)
            raise Fault(f"array {name} is of a type that is not read ({known} are)")
        dtype, field = _STORED[tensor.data_type]
        shape = tuple(int(extent) for extent in tensor.dims)
        if len(shape) > 8 or any(extent < 0 for extent in shape):
            raise Fault(f"array {name} has the shape {shown(shape)}")
        count = math.prod(shape)
        size = count * dtype.itemsize
        self.left -= 8 * count
        if self.left < 0:
            raise Fault(f"array {name} declares {shown(shape)} numbers, more than a network can hold")
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            values = np.frombuffer(self._external(tensor, size), dtype)
        elif tensor.HasField("raw_data"):
            if len(tensor.raw_data) != size:
                raise Fault(f"array {name} declares {size:,} bytes and has {len(tensor.raw_data):,}")
            values = np.frombuffer(tensor.raw_data, dtype)
        else:
            listed = getattr(tensor, field)
            if len(listed) != count:
                raise Fault(f"array {name} declares {shown(shape)} numbers and has {len(listed):,}")
            # halves are listed as the 16 bits of each
            half = tensor.data_type == onnx.TensorProto.FLOAT16
            values = (
                np.array([bits & 0xFFFF for bits in listed], "<u2").view("<f2") if half else np.array(listed, dtype)
            )
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise Fault(f"array {name} holds NaN or infinity")
        return values.astype(np.float64 if values.dtype.kind == "f" else np.int64).reshape(shape)

    def _external(self, tensor: onnx.TensorProto, size: int) -> bytes:
        """The bytes of an array that is kept in another file of the model's folder."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        kept = f"array {shown(tensor.name)} is kept in {shown(location)}"
        paths = (PurePosixPath(location), PureWindowsPath(location))
        if not location or any(path.is_absolute() or path.drive or ".." in path.parts for path in paths):
            raise Fault(f"{kept}; only files in the model's folder are read")
        try:
            folder = self.folder.resolve()
            file = (folder / location).resolve(strict=True)
            if not file.is_relative_to(folder):
                raise Fault(f"{kept}, a link out of the model's folder")
            found = file.stat()
            if not stat.S_ISREG(found.st_mode):
                raise Fault(f"{kept}, which is no file")
            offset, length = int(entries.get("offset", "0")), int(entries.get("length", str(size)))
            if offset < 0 or length != size or offset + length > found.st_size:
                place = f"{shown(length)} bytes from byte {shown(offset)} of {found.st_size:,}"
                raise Fault(f"{kept}, {place}; it declares {size:,}")
            with file.open("rb") as stream:
                stream.seek(offset)
                raw: bytes = stream.read(size)
                return raw
        except (OSError, ValueError, RuntimeError) as error:
            raise Fault(f"{kept}, which cannot be read ({shown(error)})") from None


def shown(value: object) -> str:
    """Whatever a file holds, on one line and not too long."""
    text = repr(str(value) if isinstance(value, Exception) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."
