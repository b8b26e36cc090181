"""Whether a video file is as long as its own structure says."""

import struct
from pathlib import Path
from typing import BinaryIO

_MATROSKA_SEGMENT = 0x18538067
_EBML = b"\x1a\x45\xdf\xa3"


def is_cut_short(path: Path, head: bytes) -> bool | None:
    """True if a part of the file reaches beyond its end, False if none does, None where the format does not say.

    Counts of frames and durations in headers are no proof: an AVI counts frames that were dropped, a stream that was
    cut out of a longer one begins with pictures that cannot be decoded.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp"):
            return _boxes_cut(file, size)
        if head[:4] == b"RIFF":
            return _riff_cut(file, size)
        if head[:4] == _EBML:
            return _segment_cut(file, size)
    return None


def _boxes_cut(file: BinaryIO, size: int) -> bool | None:
    """ISO base media (MP4, MOV): boxes follow each other up to the end."""
    place = 0
    while place + 8 <= size:
        file.seek(place)
        length = struct.unpack(">I", file.read(4))[0]
        file.read(4)
        if length == 1:
            length = struct.unpack(">Q", file.read(8).ljust(8, b"\0"))[0]
        if length < 8:
            return None  # up to the end of the file, however far that is
        place += length
        if place > size:
            return True
    return False


def _riff_cut(file: BinaryIO, size: int) -> bool | None:
    """AVI: one RIFF chunk for each gigabyte or so."""
    place = 0
    while place + 8 <= size:
        file.seek(place)
        name, length = file.read(4), struct.unpack("<I", file.read(4))[0]
        if name != b"RIFF":
            break  # something was appended
        if length in (0, 0xFFFFFFFF):
            return None  # the recording was not finished
        place += 8 + length
        if place > size:
            return True
        place += length % 2
    return False


def _segment_cut(file: BinaryIO, size: int) -> bool | None:
    """Matroska and WebM: an EBML header, then one segment, whose length live recordings leave open."""
    for _ in range(8):
        name, length = _vint(file, keep_marker=True), _vint(file, keep_marker=False)
        if name is None or length is None:
            return None
        if name == _MATROSKA_SEGMENT:
            return file.tell() + length > size
        file.seek(length, 1)
    return None


def _vint(file: BinaryIO, keep_marker: bool) -> int | None:
    """A number of variable length; None at the end of the file and for a length that is left open."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    more = 8 - first[0].bit_length()
    rest = file.read(more)
    if len(rest) < more:
        return None
    value = int.from_bytes(first + rest, "big")
    if keep_marker:
        return value
    bits = 7 * (more + 1)
    value &= (1 << bits) - 1
    return None if value == (1 << bits) - 1 else value
