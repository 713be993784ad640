"""What a cache's tar may hold, against tars that Python's tarfile wrote."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.format.tar import BLOCK, Member, TarError, members

KEY, OTHER = "0" * 32, "f" * 32
SUFFIXES = ("json", "text.safetensors")
Change = Callable[[tarfile.TarInfo], object]


def tar_of(
    *names: str, change: Change = lambda info: None, format: int = tarfile.USTAR_FORMAT
) -> bytes:
    """A tar of small files by these names; `change` is done to each header."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 100 * number + 1
            change(info)
            tar.addfile(info, io.BytesIO(bytes([number + 1]) * info.size))
    return stream.getvalue()


def read(data: bytes) -> list[Member]:
    return list(members(io.BytesIO(data), len(data), SUFFIXES))


def test_what_tarfile_wrote_comes_back() -> None:
    names = [f"{key}.{suffix}" for key in (KEY, OTHER) for suffix in SUFFIXES]
    data = tar_of(*names)
    found = read(data)
    assert [member.name for member in found] == names
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(info.offset_data, info.size) for info in tar]
    assert [(member.offset, member.size) for member in found] == expected
    assert data[found[3].offset : found[3].offset + found[3].size] == b"\4" * 301
    assert read(tar_of()) == []


def test_what_gnu_tar_wrote_comes_back(tmp_path: Path) -> None:
    import subprocess

    for suffix in SUFFIXES:
        (tmp_path / f"{KEY}.{suffix}").write_bytes(b"content")
    command = ["tar", "--format=ustar", "-cf", "-", *(f"{KEY}.{suffix}" for suffix in SUFFIXES)]
    data = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True).stdout
    assert [data[m.offset : m.offset + m.size] for m in read(data)] == [b"content"] * 2


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        f"a/{KEY}.json",
        f"./{KEY}.json",
        f"{KEY}",
        f"{KEY}.exe",
        f"{KEY}.json.pyd",
        f"{KEY.replace('0', 'A')}.json",
        f"{KEY}0.json",
        f"{KEY}.json\n",
        "é" * 16 + ".json",
        "manifest.json",
    ],
)
def test_other_names(name: str) -> None:
    with pytest.raises(TarError, match="unexpected member"):
        read(tar_of(name))


def test_members_once_and_in_order() -> None:
    json, text = (f"{KEY}.{suffix}" for suffix in SUFFIXES)
    for names in ([json, json], [text, json], [json, text, text]):
        with pytest.raises(TarError, match="occurs twice or is out of order"):
            read(tar_of(*names))
    with pytest.raises(TarError, match=r"the sample of member .* occurs twice"):
        read(tar_of(json, f"{OTHER}.json", text))


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.DIRTYPE,
        tarfile.FIFOTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.CONTTYPE,
        tarfile.AREGTYPE,
        tarfile.GNUTYPE_SPARSE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        b"?",
    ],
)
def test_what_is_no_regular_file(kind: bytes) -> None:
    def change(info: tarfile.TarInfo) -> None:
        info.type, info.size = kind, 0

    with pytest.raises(TarError, match=r"is no regular file|lies in a folder|unexpected member"):
        read(tar_of(f"{KEY}.json", change=change))


def test_extension_headers() -> None:
    def pax(info: tarfile.TarInfo) -> None:
        info.pax_headers = {"comment": "hidden"}

    with pytest.raises(TarError):
        read(tar_of(f"{KEY}.json", change=pax, format=tarfile.PAX_FORMAT))
    with pytest.raises(TarError):
        read(tar_of(f"{KEY}.json", format=tarfile.GNU_FORMAT))
    with pytest.raises(TarError):  # in a ustar tar a long name is a prefix
        read(tar_of(f"{'d' * 90}/{KEY}.json"))


def with_header(data: bytes, begin: int, value: bytes) -> bytes:
    """`value` put into the first header, and the checksum mended."""
    header = bytearray(data[:BLOCK])
    header[begin : begin + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[BLOCK:]


@pytest.mark.parametrize(
    "size",
    [
        b"77777777777\0",  # 8 GiB
        b"00000050000\0",  # a little more than there is
        b"-0000000001\0",
        b"0x000000001\0",
        b"           \0",
        b"\x80" + bytes(10) + b"\1",  # GNU's numbers of base 256
        b"\xff" * 12,
        b"0000000000_\0",
    ],
)
def test_sizes_that_are_none(size: bytes) -> None:
    data = with_header(tar_of(f"{KEY}.json"), 124, size)
    with pytest.raises(TarError, match=r"claims|has no size"):
        read(data)


def test_a_header_that_was_changed() -> None:
    data = tar_of(f"{KEY}.json")
    for position in range(BLOCK):
        changed = bytearray(data)
        changed[position] ^= 1
        if 148 <= position < 156:  # the checksum's own spelling
            continue
        with pytest.raises(TarError):
            read(bytes(changed))


def test_its_end() -> None:
    data = tar_of(f"{KEY}.json")
    whole = 2 * BLOCK
    assert len(read(data[: whole + 2 * BLOCK])) == 1
    for end in range(whole + 2 * BLOCK):
        with pytest.raises(TarError):
            read(data[:end])
    with pytest.raises(TarError, match="something follows its end, which is at byte 1024"):
        read(data[:-1] + b"x")
    with pytest.raises(TarError, match="something follows"):
        read(data + data)
    with pytest.raises(TarError, match="bytes follow its last member"):
        read(data + bytes(1 << 20))


def test_a_compressed_tar() -> None:
    import gzip

    with pytest.raises(TarError):
        read(gzip.compress(tar_of(f"{KEY}.json")).ljust(4 * BLOCK, b"\0"))
