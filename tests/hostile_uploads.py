"""Uploads that would harm a careless reader: each with a piece of the sentence that refuses it."""

import gzip
import io
import struct
import tarfile
import warnings
import zipfile
import zlib

from PIL import Image


def zip_of(members: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return packed.getvalue()


def image(size: tuple[int, int] = (64, 64), **options: object) -> bytes:
    stored = io.BytesIO()
    Image.new("RGB", size, "red").save(stored, **{"format": "png", **options})
    return stored.getvalue()


def beginning_of_png(size: tuple[int, int]) -> bytes:
    """A PNG that says its size, and has no pixels yet: so small is a file that would take gigabytes."""
    header = b"IHDR" + struct.pack(">2L5B", *size, 8, 2, 0, 0, 0)
    ends = struct.pack(">2L", zlib.crc32(header), 10**6) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">L", 13) + header + ends


def tar_of(info: tarfile.TarInfo) -> bytes:
    stored = io.BytesIO()
    with tarfile.open(fileobj=stored, mode="w") as packed:
        packed.addfile(info)
    return stored.getvalue()


def special(kind: bytes, target: str = "") -> bytes:
    info = tarfile.TarInfo("a.png")
    info.type, info.linkname = kind, target
    return tar_of(info)


def squeezed(members: dict[str, bytes]) -> bytes:
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stored.getvalue()


def encrypted() -> bytes:
    raw = bytearray(zip_of({"a.png": image()}))
    raw[6] |= 1
    raw[raw.rindex(b"PK\x01\x02") + 8] |= 1
    return bytes(raw)


def many_files(count: int) -> bytes:
    """A zip of empty files, as small as it can be written: a header and a directory entry each."""
    local, directory = bytearray(), bytearray()
    for index in range(count):
        name = b"%06x.txt" % index
        directory += struct.pack(
            "<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, 0, 0, 0, 0, 33, 0, 0, 0, len(name), 0, 0, 0, 0, 0, len(local)
        )
        directory += name
        local += struct.pack("<4s2B4HL2L2H", b"PK\3\4", 20, 0, 0, 0, 0, 33, 0, 0, 0, len(name), 0) + name
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, len(directory), len(local), 0)
    return bytes(local + directory + end)


HOSTILE = {
    "nothing": (lambda: b"", "neither a zip nor a tar"),
    "path traversal": (lambda: zip_of({"a/../../evil.png": image()}), "unsafe path"),
    "absolute path": (lambda: zip_of({"/tmp/evil.png": image()}), "unsafe path"),
    "link": (lambda: special(tarfile.SYMTYPE, "/etc/passwd"), "a link or device"),
    "hard link": (lambda: special(tarfile.LNKTYPE, "/etc/passwd"), "a link or device"),
    "device": (lambda: special(tarfile.CHRTYPE), "a link or device"),
    "pipe": (lambda: special(tarfile.FIFOTYPE), "a link or device"),
    "zip bomb": (lambda: squeezed({"a.png": bytes(300_000_000)}), "times its size"),
    "nested bomb": (lambda: zip_of({"b.zip": squeezed({"a.png": bytes(300_000_000)})}), "times its size"),
    "too many files": (lambda: many_files(200_000), "holds more than 100000 files"),
    "image bomb": (lambda: zip_of({"a.png": beginning_of_png((20_000, 20_000))}), "a.png has more than 100 megapixels"),
    "truncated": (lambda: zip_of({"a.png": image()})[:-30], "neither a zip nor a tar"),
    "truncated tar": (lambda: gzip.compress(special(tarfile.REGTYPE))[:-12], "cut short"),
    "encrypted": (encrypted, "is encrypted"),
    "an image that is text": (lambda: zip_of({"a.png": b"#!/bin/sh\n"}), "image a.png can't be read"),
    "an image that is cut": (lambda: zip_of({"a.jpg": image(format="jpeg")[:300]}), "image a.jpg can't be read"),
    "binary caption": (lambda: zip_of({"a.png": image(), "a.txt": b"\xff\xfe\x00\x81"}), "isn't UTF-8 text"),
    "caption with zero bytes": (lambda: zip_of({"a.png": image(), "a.txt": b"a\0b"}), "holds zero bytes"),
    "caption of 100 MB": (lambda: squeezed({"a.png": image(), "a.txt": b"word " * 20_000_000}), "65536 are the most"),
    "the same name twice": (lambda: twice("a.png"), "twice"),
}


def twice(name: str) -> bytes:
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            archive.writestr(name, image())
    return stored.getvalue()
