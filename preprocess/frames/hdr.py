"""Pictures of more brightness than 8-bit RGB shows, by what files say of their transfer curve.

They are refused: how bright a scene is to be is a choice, and as they are they look washed out.
"""

import struct
from pathlib import Path

CURVES = {16: "smpte2084", 18: "arib-std-b67"}
"""H.273's transfer characteristics, by FFmpeg's names: PQ, HLG."""
_UNSPECIFIED = (0, 2)
_AVIF_HEADER_BYTES = 1 << 16


def refusal(what: str, transfer: int, primaries: int, matrix: int, output: str) -> str | None:
    """Why a picture of that curve can't be taken, and how to convert it; None: it can.

    `transfer`, `primaries`, `matrix`: H.273's numbers. `output`: the name in the command.
    """
    curve = CURVES.get(transfer)
    if curve is None:
        return None
    # zscale converts nothing where the file does not say from what: HDR is BT.2020.
    given = f"tin={curve}"
    given += ":pin=bt2020" if primaries in _UNSPECIFIED else ""
    given += ":min=bt2020nc" if matrix in _UNSPECIFIED else ""
    return (
        f"the {what} is HDR ({curve}), which 8-bit RGB would show washed out. Convert it: ffmpeg "
        f"-i IN -vf zscale={given}:t=linear:npl=100,tonemap=hable,zscale=t=bt709:m=bt709:p=bt709:"
        f"r=tv,format=yuv420p {output}"
    )


def refusal_of_image(path: Path) -> str | None:
    """The same of a PNG (cICP) or AVIF (nclx), of which PIL does not tell."""
    with path.open("rb") as stream:
        start = stream.read(12)
        if start.startswith(b"\x89PNG\r\n\x1a\n"):
            stream.seek(8)
            while len(header := stream.read(8)) == 8 and header[4:] != b"IDAT":
                length = int.from_bytes(header[:4], "big")
                if header[4:] == b"cICP" and length == 4:
                    primaries, transfer, matrix, _ = stream.read(4)  # of RGB the matrix is 0
                    return refusal("image", transfer, primaries, matrix or 1, output="OUT.png")
                stream.seek(length + 4, 1)
        elif start[4:10] == b"ftypav":
            header = start + stream.read(_AVIF_HEADER_BYTES)
            at = header.find(b"colrnclx")
            if at >= 0 and len(header) >= at + 14:
                primaries, transfer, matrix = struct.unpack_from(">3H", header, at + 8)
                return refusal("image", transfer, primaries, matrix, output="OUT.png")
    return None
