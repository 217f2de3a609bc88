"""AEDAT files of a DVS128 event camera, formats 2.0 and 3.1 (iniVation, "AEDAT file formats")."""

import numpy as np

from spikeport.models.datasets.events import Events
from spikeport.models.errors import DataError

DVS128 = (128, 128)

# 3.1: little-endian packet header
_PACKET = np.dtype(
    [
        ("type", "<i2"),
        ("source", "<i2"),
        ("size", "<i4"),  # bytes of an event
        ("time_offset", "<i4"),
        ("overflow", "<i4"),  # how often the 31-bit timestamps have wrapped
        ("capacity", "<i4"),
        ("number", "<i4"),
        ("valid", "<i4"),
    ]
)
_POLARITY_EVENT = 1
_END_OF_HEADER = b"#!END-HEADER\r\n"

# 2.0: addresses above these 16 bits do not come from a DVS128
_EXTERNAL = 0x8000_8000
_ADDRESS = 0x7FFF


def read_aedat3(raw: bytes, where: str) -> Events:
    """Polarity events of an AEDAT 3.1 file; packets of other types are passed over.

    An event is two little-endian words: column << 17 | row << 2 | polarity << 1 | valid mark, then microseconds. The
    rows count from the top. The valid mark is not looked at: DVS128 Gesture's own description has no such bit.

    Raises DataError, naming `where`, for another format, a truncated file or events outside the sensor.
    """
    end = raw.find(_END_OF_HEADER)
    if not raw.startswith(b"#!AER-DAT3.1") or end < 0:
        raise DataError(f"{where} is no AEDAT 3.1 file: its header does not begin or end as one. Download it again.")
    position = end + len(_END_OF_HEADER)
    words, overflows = [], []
    while position < len(raw):
        if len(raw) - position < _PACKET.itemsize:
            raise DataError(f"{where} is truncated within the header of a packet. Download it again.")
        packet = np.frombuffer(raw, _PACKET, 1, position)[0]
        position += _PACKET.itemsize
        size, number, overflow = int(packet["size"]), int(packet["number"]), int(packet["overflow"])
        is_polarity = packet["type"] == _POLARITY_EVENT
        if size < 1 or number < 0 or overflow < 0 or (is_polarity and size != 8):
            raise DataError(f"{where} holds a packet of {number} events of {size} bytes. Download it again.")
        if len(raw) - position < size * number:
            raise DataError(f"{where} is truncated within a packet of {number} events. Download it again.")
        if is_polarity:
            words.append(np.frombuffer(raw, "<u4", 2 * number, position).reshape(-1, 2))
            overflows.append(np.full(number, overflow, np.int64))
        position += size * number
    data, time = np.concatenate([np.empty((0, 2), np.uint32), *words]).T.astype(np.int64)
    time += np.concatenate([np.empty(0, np.int64), *overflows]) << 31
    return Events(data >> 17 & 0x7FFF, data >> 2 & 0x7FFF, data >> 1 & 1, time).check(where, DVS128)


def read_aedat2(raw: bytes, where: str) -> Events:
    """Events of an AEDAT 2.0 file of a DVS128; external events are left out.

    An event is two big-endian words: an address, row << 8 | column << 1 | polarity, then microseconds. As in jAER, the
    program that wrote such files, rows count from the bottom, columns from the right, and polarity 0 is ON.

    Raises DataError, naming `where`, for another format, a truncated file or events outside the sensor.
    """
    if not raw.startswith(b"#!AER-DAT2.0"):
        raise DataError(f"{where} is no AEDAT 2.0 file. Download it again.")
    position = 0
    while raw[position : position + 1] == b"#":  # the first byte of a DVS128 address is 0
        position = raw.find(b"\n", position) + 1
        if not position:
            raise DataError(f"{where} is truncated within its header. Download it again.")
    if (len(raw) - position) % 8:
        raise DataError(f"{where} is truncated: {len(raw) - position} bytes are no whole number of events of 8 bytes.")
    address, time = np.frombuffer(raw, ">u4", offset=position).reshape(-1, 2).T.astype(np.int64)
    own = (address & _EXTERNAL) == 0
    address, time = address[own], time[own]
    if (address > _ADDRESS).any():
        raise DataError(f"{where} holds events outside the sensor of 128x128 pixels. Download it again.")
    return Events(127 - (address >> 1 & 0x7F), 127 - (address >> 8), 1 - (address & 1), time).check(where, DVS128)
