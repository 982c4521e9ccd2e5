"""Archives: what is read, what is refused, and what weights.zip looks like."""

import io
import json
import tarfile
import zipfile

import pytest
from PIL import Image

from lora_utils import archive
from lora_utils.archive import LORA_MEMBER, META_MEMBER, Meta
from lora_utils.errors import UserError

PICTURE = Image.new("RGB", (64, 64), "red")


def tar(path, members, mode="w"):
    with tarfile.open(path, mode) as packed:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
    return path


def test_a_nested_zip_is_unpacked_without_litter(write_zip, tmp_path):
    path = write_zip(
        {
            "a/b/one.png": PICTURE,
            "a/b/one.txt": "x",
            "__MACOSX/a/._one.png": b"x",
            "a/.DS_Store": b"x",
            "a/._one.png": b"x",
        }
    )
    files = archive.unpack(path, tmp_path / "out")
    assert sorted(str(file.relative_to(tmp_path / "out")) for file in files) == ["a/b/one.png", "a/b/one.txt"]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_tars_are_told_by_content_whatever_their_name(tmp_path, mode):
    path = tar(tmp_path / "download", {"x/one.txt": b"hello"}, mode)
    (file,) = archive.unpack(path, tmp_path / "out")
    assert file.read_text() == "hello"


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "a/../../evil.png", "..\\evil.png", "C:\\evil.png"])
def test_paths_out_of_the_folder_are_refused_and_nothing_is_written(name, write_zip, tmp_path):
    path = write_zip({name: b"x"})
    with pytest.raises(UserError, match="unsafe path"):
        archive.unpack(path, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*"))
    assert not (tmp_path / "evil.png").exists()


def test_links_in_tars_and_zips_are_refused(tmp_path):
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "l.tar", "w") as packed:
        packed.addfile(link)
    with pytest.raises(UserError, match=r"'link.png', a link or device"):
        archive.unpack(tmp_path / "l.tar", tmp_path / "out")
    info = zipfile.ZipInfo("link.png")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "l.zip", "w") as packed:
        packed.writestr(info, "/etc/passwd")
    with pytest.raises(UserError, match=r"the link 'link.png'"):
        archive.unpack(tmp_path / "l.zip", tmp_path / "out")


def test_a_truncated_zip_a_damaged_member_and_a_stranger_are_named(write_zip, tmp_path):
    whole = write_zip({"one.png": PICTURE, "two.txt": "hello " * 100})
    damaged = bytearray(whole.read_bytes())
    damaged[60] ^= 0xFF  # within the first member's data
    (tmp_path / "damaged.zip").write_bytes(damaged)
    with pytest.raises(UserError, match=r"damaged.zip is damaged"):
        archive.unpack(tmp_path / "damaged.zip", tmp_path / "out")
    (tmp_path / "cut.tar.gz").write_bytes(tar(tmp_path / "t.tgz", {"a": b"x" * 9999}, "w:gz").read_bytes()[:60])
    with pytest.raises(UserError, match=r"cut.tar.gz"):
        archive.unpack(tmp_path / "cut.tar.gz", tmp_path / "out")
    (tmp_path / "text.zip").write_text("no archive")
    with pytest.raises(UserError, match="neither a zip nor a tar"):
        archive.unpack(tmp_path / "text.zip", tmp_path / "out")
    with pytest.raises(UserError, match="there is no file"):
        archive.unpack(tmp_path / "missing.zip", tmp_path / "out")


def test_an_encrypted_zip_is_named_as_such(write_zip, tmp_path):
    path = write_zip({"one.txt": "x"})
    raw = bytearray(path.read_bytes())
    central = raw.rindex(b"PK\x01\x02")
    raw[6] |= 1  # the flag in the local header
    raw[central + 8] |= 1  # and in the central directory
    path.write_bytes(raw)
    with pytest.raises(UserError, match="encrypted"):
        archive.unpack(path, tmp_path / "out")


def test_unpacking_stops_at_the_limit_whatever_the_archive_claims(write_zip, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_UNPACKED_BYTES", 10**6)
    path = write_zip({"zeros.png": b"\0" * (3 * 10**6)})
    with pytest.raises(UserError, match="unpacks to more than"):
        archive.unpack(path, tmp_path / "out")
    written = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert written <= 10**6


def test_weights_zip_holds_exactly_two_members_stored_uncompressed(tmp_path):
    (tmp_path / "lora").write_bytes(b"\0" * 1000)
    archive.write_weights(tmp_path / "weights.zip", tmp_path / "lora", Meta(base_model="m", rank=4))
    with zipfile.ZipFile(tmp_path / "weights.zip") as packed:
        assert packed.namelist() == [LORA_MEMBER, META_MEMBER]
        assert {info.compress_type for info in packed.infolist()} == {zipfile.ZIP_STORED}
        assert json.loads(packed.read(META_MEMBER))["placeholder_token"] is None
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_weights_are_found_in_a_zip_a_tar_or_bare(tmp_path):
    (tmp_path / "bare.safetensors").write_bytes(b"not read here")
    assert archive.unpack_weights(tmp_path / "bare.safetensors", tmp_path) == (tmp_path / "bare.safetensors", None)
    path = tar(tmp_path / "w.tar", {LORA_MEMBER: b"abc", META_MEMBER: b'{"rank": 8}'})
    lora_path, meta = archive.unpack_weights(path, tmp_path)
    assert lora_path.read_bytes() == b"abc"
    assert meta == Meta(rank=8)


def test_metas_of_older_and_newer_versions_load(tmp_path):
    assert Meta.from_json('{"rank": 8, "from_the_future": 1}', "x") == Meta(rank=8)
    assert Meta.from_json("{}", "x").placeholder is None
    with pytest.raises(UserError, match="isn't JSON"):
        Meta.from_json("{", "x")


def test_a_meta_whose_placeholder_is_broken_and_a_damaged_stream_are_named(tmp_path):
    for broken in ('"<zwx>"', "{}", '{"token": "<zwx>"}'):
        with pytest.raises(UserError, match="placeholder must be null or name"):
            Meta.from_json(f'{{"placeholder": {broken}}}', "x")
    for mode in ("w:gz", "w:bz2", "w:xz"):
        path = tar(tmp_path / "w.tar", {"a.txt": bytes(range(256)) * 4000}, mode)
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 0xFF
        path.write_bytes(raw)
        with pytest.raises(UserError, match=r"w\.tar"):
            archive.unpack(path, tmp_path / "out")


def test_an_archive_with_two_loras_or_none_is_refused(tmp_path):
    for members in ({"a.safetensors": b"", "b.safetensors": b""}, {"readme.txt": b""}):
        with pytest.raises(UserError, match="expected one"):
            archive.unpack_weights(tar(tmp_path / "w.tar", members), tmp_path)
