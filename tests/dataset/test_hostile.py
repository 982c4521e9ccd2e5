"""Whatever is uploaded: either a dataset or one UserError, no file outside the work folder, nothing left behind."""

import io
import shutil
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lora_utils.config import TrainConfig
from lora_utils.dataset import load
from lora_utils.errors import UserError
from lora_utils.io.archive import extract_archive

# Three thousand cases in all, spread over the kinds of damage.
CASES = settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
FORMATS = {
    "png": "png",
    "jpg": "jpeg",
    "webp": "webp",
    "bmp": "bmp",
    "gif": "gif",
    "tif": "tiff",
    "avif": "avif",
    "heic": "heif",
}
CAPTIONS = {
    "a.txt": b"a fox",
    "metadata.jsonl": b'{"file_name": "0.png", "text": "x"}\n',
    "captions.json": b'{"0.png": "x"}',
}


def encoded(name: str) -> bytes:
    stored = io.BytesIO()
    Image.fromarray(PIXELS).save(stored, FORMATS[name])
    return stored.getvalue()


PICTURES = {name: encoded(name) for name in FORMATS}


def transparent() -> bytes:
    stored = io.BytesIO()
    image = Image.fromarray(PIXELS).convert("RGBA")
    image.putalpha(Image.fromarray(PIXELS[..., 0]))
    image.save(stored, "png")
    return stored.getvalue()


TRANSPARENT = transparent()


def as_zip(members: dict[str, bytes]) -> bytes:
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    return stored.getvalue()


def as_tar(members: dict[str, bytes], mode: str = "w:gz") -> bytes:
    stored = io.BytesIO()
    with tarfile.open(fileobj=stored, mode=mode) as packed:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
    return stored.getvalue()


WHOLE = {"0.png": PICTURES["png"], "a.jpg": PICTURES["jpg"], **CAPTIONS}
ARCHIVES: list[Callable[[dict[str, bytes]], bytes]] = [
    as_zip, as_tar, lambda m: as_tar(m, "w"), lambda m: as_tar(m, "w:bz2"), lambda m: as_tar(m, "w:xz"),
    lambda m: as_zip({"inner.zip": as_zip(m)}), lambda m: as_zip({"inner.tar.gz": as_tar(m)}),
]  # fmt: skip

damage = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8)
cut = st.one_of(st.just(1.0), st.floats(0, 1))


def damaged(content: bytes, changes: list[tuple[float, int]], share: float) -> bytes:
    raw = bytearray(content[: max(1, int(share * len(content)))])
    for place, value in changes:
        raw[int(place * len(raw))] = value
    return bytes(raw)


def everything_below(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def refusal_of(upload: Path, work: Path, mask_from: str = "none") -> str | None:
    """What a UserError says of it; None if it is a dataset. Anything else that is raised fails the test."""
    try:
        extract_archive(upload, work)
        for example in load(work, TrainConfig(resolution="64", mask_from=mask_from, seed=0)).examples:
            example.pixels()
            example.shares()
    except UserError as error:
        return str(error)
    return None


def read_whatever(content: bytes, mask_from: str = "none") -> None:
    """Read an upload as a training does: it is a dataset, or a UserError and nothing else."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        work, upload = root / "work", root / "upload"
        work.mkdir()
        upload.write_bytes(content)
        before, threads, files = everything_below(root), threading.active_count(), open_files()
        refused = refusal_of(upload, work, mask_from)
        assert refused is None or refused.strip()
        (refused or "").encode()  # can be sent and printed
        shutil.rmtree(work)
        work.mkdir()
        assert everything_below(root) == before, "only the work folder was written to"
        assert threading.active_count() <= threads
        assert open_files() <= files, "every file was closed"


@CASES
@given(st.sampled_from(ARCHIVES), damage, cut)
def test_a_damaged_archive(pack, changes, share):
    read_whatever(damaged(pack(WHOLE), changes, share))


@CASES
@given(st.sampled_from(sorted(PICTURES)), st.sampled_from(sorted(PICTURES)), damage, cut)
def test_a_damaged_image_under_any_name(kind, name, changes, share):
    read_whatever(as_zip({f"0.{name}": damaged(PICTURES[kind], changes, share)}))


@CASES
@given(st.sampled_from(sorted(PICTURES)), damage, cut, st.sampled_from(["file", "alpha"]))
def test_a_damaged_mask_or_a_image_with_a_damaged_alpha(kind, changes, share, mask_from):
    other = damaged(PICTURES[kind] if mask_from == "file" else TRANSPARENT, changes, share)
    names = {"file": f"0.mask.{kind}", "alpha": "1.png"}
    read_whatever(as_zip({"0.png": TRANSPARENT, names[mask_from]: other}), mask_from)


@CASES
@given(st.sampled_from(sorted(CAPTIONS)), damage, cut, st.binary(max_size=40))
def test_damaged_captions(name, changes, share, more):
    read_whatever(as_zip({**WHOLE, name: damaged(CAPTIONS[name], changes, share) + more}))


@CASES
@given(st.lists(st.text(max_size=30), min_size=1, max_size=4), st.booleans())
def test_names_of_any_kind(names, tarred):
    members = {f"{name}{'.png' if index % 2 else ''}": PICTURES["png"] for index, name in enumerate(names)}
    try:
        content = (as_tar if tarred else as_zip)({**WHOLE, **members})
    except (ValueError, IndexError):  # a name that no packer writes
        return
    read_whatever(content)


@CASES
@given(st.binary(max_size=300))
def test_bytes_that_are_nothing(content):
    read_whatever(content)


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06" + b"\0" * 18, as_zip({}), as_zip({"a/": b""})])
def test_an_upload_of_nothing(content, tmp_path):
    (tmp_path / "upload").write_bytes(content)
    (tmp_path / "work").mkdir()
    said = refusal_of(tmp_path / "upload", tmp_path / "work")
    assert said is not None
    assert "neither a zip nor a tar" in said or "holds no images" in said
