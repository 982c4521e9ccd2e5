"""Whatever is uploaded: either a dataset or one UserError, no file outside the work folder, nothing left behind."""

import io
import shutil
import tarfile
import tempfile
import threading
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
from tests.hostile_uploads import HOSTILE, squeezed

CASES = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
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


IMAGES = {name: encoded(name) for name in FORMATS}


def transparent() -> bytes:
    stored = io.BytesIO()
    image = Image.fromarray(PIXELS).convert("RGBA")
    image.putalpha(Image.fromarray(PIXELS[..., 0]))
    image.save(stored, "png")
    return stored.getvalue()


TRANSPARENT = transparent()


def as_tar(members: dict[str, bytes], mode: str = "w:gz") -> bytes:
    stored = io.BytesIO()
    with tarfile.open(fileobj=stored, mode=mode) as packed:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
    return stored.getvalue()


WHOLE = {"0.png": IMAGES["png"], "a.jpg": IMAGES["jpg"], **CAPTIONS}
ARCHIVES: list[Callable[[dict[str, bytes]], bytes]] = [
    squeezed,
    as_tar,
    lambda m: as_tar(m, "w"),
    lambda m: as_tar(m, "w:bz2"),
    lambda m: as_tar(m, "w:xz"),
    lambda m: squeezed({"inner.zip": squeezed(m)}),
    lambda m: squeezed({"inner.tar.gz": as_tar(m)}),
]

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


def read_archive(pack, changes, share):
    read_whatever(damaged(pack(WHOLE), changes, share))


def read_image(kind, name, changes, share):
    read_whatever(squeezed({f"0.{name}": damaged(IMAGES[kind], changes, share)}))


def read_mask_or_alpha(kind, changes, share, mask_from):
    other = damaged(IMAGES[kind] if mask_from == "file" else TRANSPARENT, changes, share)
    names = {"file": f"0.mask.{kind}", "alpha": "1.png"}
    read_whatever(squeezed({"0.png": TRANSPARENT, names[mask_from]: other}), mask_from)


def read_captions(name, changes, share, more):
    read_whatever(squeezed({**WHOLE, name: damaged(CAPTIONS[name], changes, share) + more}))


def read_names(names, tarred):
    members = {f"{name}{'.png' if index % 2 else ''}": IMAGES["png"] for index, name in enumerate(names)}
    try:
        content = (as_tar if tarred else squeezed)({**WHOLE, **members})
    except (ValueError, IndexError):  # a name that no packer writes
        return
    read_whatever(content)


def read_bytes(content):
    read_whatever(content)


formats = st.sampled_from(sorted(IMAGES))
KINDS = {
    "a damaged archive": (read_archive, (st.sampled_from(ARCHIVES), damage, cut)),
    "a damaged image under any name": (read_image, (formats, formats, damage, cut)),
    "a damaged mask or alpha": (read_mask_or_alpha, (formats, damage, cut, st.sampled_from(["file", "alpha"]))),
    "damaged captions": (read_captions, (st.sampled_from(sorted(CAPTIONS)), damage, cut, st.binary(max_size=40))),
    "names of any kind": (read_names, (st.lists(st.text(max_size=30), min_size=1, max_size=4), st.booleans())),
    "bytes that are nothing": (read_bytes, (st.binary(max_size=300),)),
}


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_damaged_is_a_dataset_or_one_error(kind, count):
    """Three thousand cases among the slow tests, 360 of the same in each run."""
    read, parts = KINDS[kind]
    settings(CASES, max_examples=count)(given(*parts)(read))()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_upload_is_refused_in_one_sentence_and_leaves_nothing_outside_its_folder(name, tmp_path):
    make, message = HOSTILE[name]
    upload = tmp_path / "upload"
    upload.write_bytes(make())
    (tmp_path / "work").mkdir()
    refused = refusal_of(upload, tmp_path / "work")
    assert refused is not None
    assert message in refused
    assert {path.name for path in tmp_path.iterdir()} == {"upload", "work"}
    assert not Path("/tmp/evil.png").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06" + b"\0" * 18, squeezed({}), squeezed({"a/": b""})])
def test_an_upload_of_nothing(content, tmp_path):
    (tmp_path / "upload").write_bytes(content)
    (tmp_path / "work").mkdir()
    said = refusal_of(tmp_path / "upload", tmp_path / "work")
    assert said is not None
    assert "neither a zip nor a tar" in said or "holds no images" in said
