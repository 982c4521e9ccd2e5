"""Archives: reading the users' zips and tars safely, whatever is in them.

An archive is recognised by its content, not by its name: Cog's downloads have none.
"""

import errno
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from lora_utils.errors import UserError

MAX_EXTRACTED_BYTES = 20 * 10**9
# Images hardly compress, and text by a tenth; what swells more than this, beyond a first part, is a bomb.
MAX_RATIO = 200
FREE_OF_RATIO_BYTES = 100 * 10**6
MAX_MEMBERS = 100_000
MAX_NESTING = 3  # archives within archives
ARCHIVE_ENDINGS = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")

_TAR_BLOCK_BYTES = 512
_ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")  # a member, no member at all, the first of several parts
_PROGRAM_STARTS = (b"MZ", b"\x7fELF", b"#!")  # of an archive that unpacks itself
_FOREIGN_STARTS = {b"Rar!": "a RAR archive", b"7z\xbc\xaf": "a 7z archive", b"\x28\xb5\x2f\xfd": "a zstd archive"}

# What archivers and file managers leave behind.
_LITTER_FOLDERS = {"__macosx", ".git", ".ipynb_checkpoints", "@eadir"}
_LITTER_FILES = {"thumbs.db", "desktop.ini", ".ds_store"}


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file of an archive. `size_bytes` is what the archive claims."""

    name: str
    size_bytes: int
    source: IO[bytes]


def is_litter(path: PurePosixPath) -> bool:
    """Return whether archivers added this file, rather than a user."""
    folders = {part.lower() for part in path.parts[:-1]}
    return bool(folders & _LITTER_FOLDERS) or path.name.lower() in _LITTER_FILES or path.name.startswith("._")


def _safe_name(archive: Path, name: str) -> PurePosixPath:
    """Return a member's path. Raises UserError for one that would leave the folder it is extracted into."""
    readable = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    path = PurePosixPath(readable.replace("\\", "/"))
    first = path.parts[0] if path.parts else ""
    if path.is_absolute() or ".." in path.parts or first[1:2] == ":" or "\0" in name or not path.parts:
        raise UserError(f"{archive.name} holds the unsafe path {name!r}; pack the files with relative paths, no '..'.")
    return path


def _too_many(archive: Path) -> UserError:
    return UserError(f"{archive.name} holds more than {MAX_MEMBERS} files; pack fewer.")


def _check_directory(archive: Path) -> None:
    """Count the entries of a zip's directory without reading it: a million of them take zipfile half a gigabyte."""
    mark, found, before = b"PK\x01\x02", 0, b""
    with archive.open("rb") as file:
        while chunk := file.read(1 << 20):
            found += (before + chunk).count(mark)
            before = chunk[-3:]
            if found > MAX_MEMBERS:
                raise _too_many(archive)


def _zip_name(info: zipfile.ZipInfo) -> str:
    """Return a member's name. Many packers write UTF-8 without the flag that says so, and zipfile reads cp437 then."""
    if info.flag_bits & 0x800:
        return info.filename
    try:
        return info.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return info.filename


def _zip_members(archive: Path) -> Iterator[Member]:
    _check_directory(archive)
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            if info.is_dir():
                continue
            if (info.external_attr >> 16) & 0o170000 == 0o120000:
                raise UserError(f"{archive.name} holds the link {info.filename!r}; pack the file itself.")
            if info.flag_bits & 1:
                raise UserError(f"{archive.name} is encrypted; pack it without a password.")
            with opened.open(info) as source:
                yield Member(_zip_name(info), info.file_size, source)


def _tar_members(archive: Path) -> Iterator[Member]:
    with tarfile.open(archive) as opened:
        for info in opened:
            if info.isdir():
                continue
            source = opened.extractfile(info) if info.isreg() else None
            if source is None:
                raise UserError(f"{archive.name} holds {info.name!r}, a link or device; pack the file itself.")
            with source:
                yield Member(info.name, info.size, source)
        # tarfile stops at the end mark; only the compressed stream's own end holds its checksum.
        while opened.fileobj is not None and opened.fileobj.read(1 << 20):
            pass


# What the readers of zip, tar, gzip, bzip2 and xz have been seen to raise for bytes that aren't theirs.
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    lzma.LZMAError,
    zlib.error,
    struct.error,
    ArithmeticError,
    EOFError,
    LookupError,
    RuntimeError,
    ValueError,
)


def archive_kind(path: Path) -> str | None:
    """Return "zip" or "tar" by how a file begins and is built; None for no such archive.

    A zip is known by its end, and a tar whose last member is a zip ends like one. So what begins as a tar is a tar,
    and a file that doesn't begin as a zip is one only if it is a program that unpacks itself.
    """
    with path.open("rb") as file:
        start = file.read(_TAR_BLOCK_BYTES)
    if start.startswith(_ZIP_STARTS):
        return "zip" if zipfile.is_zipfile(path) else None
    with damage_as_user_error(path):
        if tarfile.is_tarfile(path):
            return "tar"
    return "zip" if start.startswith(_PROGRAM_STARTS) and zipfile.is_zipfile(path) else None


def _foreign_archive(path: Path) -> str | None:
    """Return what an archive is that can't be read here."""
    with path.open("rb") as file:
        start = file.read(8)
    return next((kind for mark, kind in _FOREIGN_STARTS.items() if start.startswith(mark)), None)


@contextmanager
def damage_as_user_error(archive: Path) -> Iterator[None]:
    """Turn what a reader raises for damage into a UserError; the system's own errors, like a full disk, stay."""
    try:
        yield
    except UserError:
        raise
    except (*_DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: damage sent it before 0
            raise
        raise UserError(f"{archive.name} is damaged or cut short ({error}); pack or upload it again.") from error


def archive_members(archive: Path) -> Iterator[Member]:
    """Yield the archive's files in their order, litter left out. Each `source` is open until the next is asked for.

    Raises UserError for what is no archive, is damaged or encrypted, or holds links or unsafe paths.
    """
    with damage_as_user_error(archive):
        kind = archive_kind(archive)
        if kind is None:
            what = _foreign_archive(archive) or "neither a zip nor a tar archive"
            raise UserError(f"{archive.name} is {what}; pack the files as .zip or .tar.gz.")
        found = _zip_members(archive) if kind == "zip" else _tar_members(archive)
        for count, member in enumerate(found, start=1):
            if count > MAX_MEMBERS:
                raise _too_many(archive)
            path = _safe_name(archive, member.name)
            if not is_litter(path):
                yield Member(str(path), member.size_bytes, member.source)


@dataclass(slots=True)
class ExtractionBudget:
    """What an archive may still write, with the archives within it. What it claims of its sizes isn't believed."""

    archive: Path
    left_bytes: int
    left_files: int = MAX_MEMBERS

    @classmethod
    def of(cls, archive: Path) -> "ExtractionBudget":
        """Return the budget of an archive of this size. Raises UserError where there is no file."""
        if not archive.is_file():
            raise UserError(f"there is no file {archive}.")
        swollen = FREE_OF_RATIO_BYTES + MAX_RATIO * archive.stat().st_size
        return cls(archive, min(MAX_EXTRACTED_BYTES, swollen))

    def copy(self, source: IO[bytes], target: Path) -> None:
        """Write a member to `target`. Raises UserError where it is too much."""
        self.left_files -= 1
        if self.left_files < 0:
            raise _too_many(self.archive)
        with target.open("xb") as sink:
            while chunk := source.read(1 << 20):
                self.left_bytes -= len(chunk)
                if self.left_bytes < 0:
                    raise UserError(
                        f"{self.archive.name} unpacks to more than {MAX_EXTRACTED_BYTES / 1e9:g} GB, or to more than "
                        f"{MAX_RATIO} times its size; pack less."
                    )
                sink.write(chunk)


def extract_archive(archive: Path, folder: Path) -> list[Path]:
    """Extract every file into `folder`, which the caller owns and removes. -> the files, in the archive's order

    An archive within it is extracted into a folder of its name. Raises UserError as `archive_members` does.
    """
    return _extract(archive, folder, ExtractionBudget.of(archive), nesting=1)


def extracted(source: Path, folder: Path) -> Path:
    """Return `source` if it is a folder, else `folder` with what the archive `source` holds."""
    if source.is_dir():
        return source
    extract_archive(source, folder)
    return folder


def _extract(archive: Path, folder: Path, budget: ExtractionBudget, nesting: int) -> list[Path]:
    unpacked = []
    for member in archive_members(archive):
        target = folder / member.name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with damage_as_user_error(archive):
                budget.copy(member.source, target)
        except FileExistsError as error:
            raise UserError(
                f"{archive.name} holds {member.name!r} twice, or a file where its folder would be; give each file a "
                "name of its own."
            ) from error
        except OSError as error:
            raise UserError(f"{member.name[:80]!r} of {archive.name} can't be written ({error.strerror}).") from error
        if target.name.lower().endswith(ARCHIVE_ENDINGS):
            unpacked += _extract_nested(target, budget, nesting)
        else:
            unpacked.append(target)
    return unpacked


def _extract_nested(archive: Path, budget: ExtractionBudget, nesting: int) -> list[Path]:
    if nesting >= MAX_NESTING:
        raise UserError(f"{archive.name} is nested {nesting} archives deep; pack the images in one.")
    inside = archive.with_name(f"{archive.name}.unpacked")
    unpacked = _extract(archive, inside, budget, nesting + 1)
    archive.unlink()
    return unpacked
