"""A matrix as a picture: one pixel an element, in a palette of 256 colours.

A heat map of 224 layers and 128 channels, before and after, is 57,344 elements.  As SVG rectangles they would be some
MiB; as pixels that the browser enlarges without smoothing they are a few KiB, and can still be counted.
PNG: ISO/IEC 15948, colour type 3, 8 bits, filter 0 on every row.
"""

import base64
import struct
import zlib
from collections.abc import Sequence

# cividis (Nunez et al. 2018, PLoS ONE 13(7) e0199239), made to look alike with and without colour vision: nine points
# of it, joined by straight lines
_CIVIDIS = ("#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#fee838")


def _palette() -> bytes:
    stops = [tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in _CIVIDIS]
    colours = bytearray()
    for index in range(256):
        left, part = divmod(index * (len(stops) - 1), 255)
        right = min(left + 1, len(stops) - 1)
        colours += bytes(round(a + (b - a) * part / 255) for a, b in zip(stops[left], stops[right], strict=True))
    return bytes(colours)


PALETTE = _palette()


def data_uri(rows: Sequence[Sequence[int]]) -> str:
    """A PNG as a data URI.

    Args:
        rows: Equally long rows of palette indices, 0..255, the darkest colour first.
    """
    assert rows, "a picture has rows"
    assert len({len(row) for row in rows}) == 1, "rows are equally long"
    pixels = b"".join(b"\0" + bytes(row) for row in rows)
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"PLTE", PALETTE), (b"IDAT", zlib.compress(pixels, 9)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    return "data:image/png;base64," + base64.b64encode(png).decode()
