"""Archives: what is read, what is refused, and what weights.zip looks like."""

import io
import json
import tarfile
import warnings
import zipfile

import pytest
from PIL import Image

from lora_utils.errors import UserError
from lora_utils.io import archive
from lora_utils.io.archive import archive_kind, extract_archive
from lora_utils.lora.weights_zip import (
    LORA_MEMBER,
    META_MEMBER,
    ExtractedWeights,
    Meta,
    extract_weights,
    write_weights_zip,
)

IMAGE = Image.new("RGB", (64, 64), "red")


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
            "a/b/one.png": IMAGE,
            "a/b/one.txt": "x",
            "__MACOSX/a/._one.png": b"x",
            "a/.DS_Store": b"x",
            "a/._one.png": b"x",
        }
    )
    files = extract_archive(path, tmp_path / "out")
    assert sorted(str(file.relative_to(tmp_path / "out")) for file in files) == ["a/b/one.png", "a/b/one.txt"]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_tars_are_recognised_by_content_whatever_their_name(tmp_path, mode):
    path = tar(tmp_path / "download", {"x/one.txt": b"hello"}, mode)
    (file,) = extract_archive(path, tmp_path / "out")
    assert file.read_text() == "hello"


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "a/../../evil.png", "..\\evil.png", "C:\\evil.png"])
def test_paths_out_of_the_folder_are_refused_and_nothing_is_written(name, write_zip, tmp_path):
    path = write_zip({name: b"x"})
    with pytest.raises(UserError, match="unsafe path"):
        extract_archive(path, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*"))
    assert not (tmp_path / "evil.png").exists()


def test_links_in_tars_and_zips_are_refused(tmp_path):
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "l.tar", "w") as packed:
        packed.addfile(link)
    with pytest.raises(UserError, match=r"'link.png', a link or device"):
        extract_archive(tmp_path / "l.tar", tmp_path / "out")
    info = zipfile.ZipInfo("link.png")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "l.zip", "w") as packed:
        packed.writestr(info, "/etc/passwd")
    with pytest.raises(UserError, match=r"the link 'link.png'"):
        extract_archive(tmp_path / "l.zip", tmp_path / "out")


def test_a_truncated_zip_a_damaged_member_and_a_stranger_are_named(write_zip, tmp_path):
    whole = write_zip({"one.png": IMAGE, "two.txt": "hello " * 100})
    damaged = bytearray(whole.read_bytes())
    damaged[60] ^= 0xFF  # within the first member's data
    (tmp_path / "damaged.zip").write_bytes(damaged)
    with pytest.raises(UserError, match=r"damaged.zip is damaged"):
        extract_archive(tmp_path / "damaged.zip", tmp_path / "out")
    (tmp_path / "cut.tar.gz").write_bytes(tar(tmp_path / "t.tgz", {"a": b"x" * 9999}, "w:gz").read_bytes()[:60])
    with pytest.raises(UserError, match=r"cut.tar.gz"):
        extract_archive(tmp_path / "cut.tar.gz", tmp_path / "out")
    (tmp_path / "text.zip").write_text("no archive")
    with pytest.raises(UserError, match="neither a zip nor a tar"):
        extract_archive(tmp_path / "text.zip", tmp_path / "out")
    with pytest.raises(UserError, match="there is no file"):
        extract_archive(tmp_path / "missing.zip", tmp_path / "out")


def test_an_encrypted_zip_is_named_as_such(write_zip, tmp_path):
    path = write_zip({"one.txt": "x"})
    raw = bytearray(path.read_bytes())
    central = raw.rindex(b"PK\x01\x02")
    raw[6] |= 1  # the flag in the local header
    raw[central + 8] |= 1  # and in the central directory
    path.write_bytes(raw)
    with pytest.raises(UserError, match="encrypted"):
        extract_archive(path, tmp_path / "out")


def test_unpacking_stops_at_the_limit_whatever_the_archive_claims(write_zip, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_EXTRACTED_BYTES", 10**6)
    path = write_zip({"zeros.png": b"\0" * (3 * 10**6)})
    with pytest.raises(UserError, match="unpacks to more than"):
        extract_archive(path, tmp_path / "out")
    written = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert written <= 10**6


def test_weights_zip_holds_exactly_two_members_stored_uncompressed(tmp_path):
    (tmp_path / "lora").write_bytes(b"\0" * 1000)
    write_weights_zip(tmp_path / "weights.zip", tmp_path / "lora", Meta(base_model="m", rank=4))
    with zipfile.ZipFile(tmp_path / "weights.zip") as packed:
        assert packed.namelist() == [LORA_MEMBER, META_MEMBER]
        assert {info.compress_type for info in packed.infolist()} == {zipfile.ZIP_STORED}
        assert json.loads(packed.read(META_MEMBER))["placeholder_token"] is None
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_weights_are_found_in_a_zip_a_tar_or_bare(tmp_path):
    (tmp_path / "bare.safetensors").write_bytes(b"not read here")
    assert extract_weights(tmp_path / "bare.safetensors", tmp_path) == ExtractedWeights(tmp_path / "bare.safetensors")
    path = tar(tmp_path / "w.tar", {LORA_MEMBER: b"abc", META_MEMBER: b'{"rank": 8}'})
    found = extract_weights(path, tmp_path)
    assert found.lora_path.read_bytes() == b"abc"
    assert found.meta == Meta(rank=8)


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
            extract_archive(path, tmp_path / "out")


def test_an_archive_with_two_loras_or_none_is_refused(tmp_path):
    for members in ({"a.safetensors": b"", "b.safetensors": b""}, {"readme.txt": b""}):
        with pytest.raises(UserError, match="expected one"):
            extract_weights(tar(tmp_path / "w.tar", members), tmp_path)


def test_an_archive_within_an_archive_is_unpacked_too(write_zip, tmp_path):
    inner = write_zip({"a/one.png": IMAGE, "a/one.txt": "x"}, "inner.zip")
    middle = tar(tmp_path / "middle.tar.gz", {"Inner.ZIP": inner.read_bytes()}, "w:gz")
    outer = write_zip({"sets/middle.tar.gz": middle.read_bytes(), "notes.gz": b"no archive"}, "outer.zip")
    files = extract_archive(outer, tmp_path / "out")
    assert [file.name for file in files] == ["one.png", "one.txt", "notes.gz"]
    assert all(file.is_file() for file in files)
    assert len([path for path in (tmp_path / "out").rglob("*") if path.is_file()]) == 3


def test_archives_nested_without_end_are_refused(write_zip, tmp_path):
    path = write_zip({"one.png": IMAGE}, "0.zip")
    for depth in range(1, 5):
        path = write_zip({f"{depth - 1}.zip": path.read_bytes()}, f"{depth}.zip")
    with pytest.raises(UserError, match="nested 3 archives deep"):
        extract_archive(path, tmp_path / "out")


@pytest.mark.parametrize("nested", [False, True])
def test_what_swells_two_hundredfold_is_a_bomb(nested, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "FREE_OF_RATIO_BYTES", 10**6)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for index in range(20):
            packed.writestr(f"{index}.bmp", b"\0" * 10**6)
    path = tmp_path / "bomb.zip"
    if nested:
        with zipfile.ZipFile(tmp_path / "outer.zip", "w", zipfile.ZIP_DEFLATED) as packed:
            packed.write(path, "bomb.zip")
        path = tmp_path / "outer.zip"
    with pytest.raises(UserError, match=rf"{path.name} unpacks to more than 20 GB, or to more than 200 times its size"):
        extract_archive(path, tmp_path / "out")
    written = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert written <= 10**6 + 200 * path.stat().st_size + 10**6


def test_too_many_files_are_refused_before_one_is_written(write_zip, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_MEMBERS", 10)
    with pytest.raises(UserError, match="more than 10 files; pack fewer"):
        extract_archive(write_zip({f"{index}.txt": "x" for index in range(11)}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_name_that_stands_twice_or_is_too_long_is_named(tmp_path):
    for names, message in (
        (["a.txt", "a.txt"], r"holds 'a\.txt' twice"),
        (["a", "a/b.txt"], r"holds 'a/b\.txt' twice, or a file where its folder would be"),
        (["x" * 300], "can't be written \\(File name too long\\)"),
    ):
        path = tmp_path / f"{len(names[0])}{len(names[-1])}.tar"
        with tarfile.open(path, "w") as packed:
            for name in names:
                packed.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
        with pytest.raises(UserError, match=message):
            extract_archive(path, tmp_path / f"out{path.stem}")


def test_names_in_any_script_survive_packers_that_forget_the_flag(tmp_path):
    path = tmp_path / "d.zip"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("狐 Bär.txt", "x")
    raw = bytearray(path.read_bytes())
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(header) + flags + 1] &= ~0x08
    path.write_bytes(raw)
    assert zipfile.ZipFile(path).namelist() != ["狐 Bär.txt"], "the flag is gone"
    assert [file.name for file in extract_archive(path, tmp_path / "out")] == ["狐 Bär.txt"]
    with tarfile.open(tmp_path / "d.tar", "w") as packed:
        packed.addfile(tarfile.TarInfo("caf\udce9.txt"), io.BytesIO(b""))
    assert [file.name for file in extract_archive(tmp_path / "d.tar", tmp_path / "out")] == ["caf\ufffd.txt"]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_a_tar_whose_last_member_is_a_zip_is_that_tar(mode, write_zip, tmp_path):
    """A zip is known by its end, and such a tar ends like one: of twelve images two were read."""
    inner = write_zip({"a/1.png": b"1", "a/2.png": b"2"}, "inner.zip").read_bytes()
    path = tar(tmp_path / "d.tar", {**{f"{n}.png": b"x" for n in range(10)}, "last.zip": inner}, mode)
    assert archive_kind(path) == "tar"
    assert len(extract_archive(path, tmp_path / "out")) == 12


def test_archives_are_told_by_how_they_begin(write_zip, tmp_path):
    zipped = write_zip({"d.tar": tar(tmp_path / "t.tar", {"1.png": b"x"}).read_bytes()}, "z.zip")
    assert archive_kind(zipped) == "zip"
    (tmp_path / "sfx.exe").write_bytes(b"MZ" + b"\0" * 600 + zipped.read_bytes())
    assert archive_kind(tmp_path / "sfx.exe") == "zip"
    (tmp_path / "l.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}" + zipped.read_bytes())
    assert archive_kind(tmp_path / "l.safetensors") is None


@pytest.mark.parametrize(
    ("begins", "what"), [(b"Rar!\x1a\x07", "a RAR archive"), (b"7z\xbc\xaf\x27\x1c", "a 7z archive")]
)
def test_archives_of_other_kinds_are_named(begins, what, tmp_path):
    (tmp_path / "d.bin").write_bytes(begins + bytes(600))
    with pytest.raises(UserError, match=f"is {what}; pack the files as"):
        extract_archive(tmp_path / "d.bin", tmp_path / "out")


def test_weights_with_two_metas_or_a_member_twice_are_refused(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    two = tar(tmp_path / "w.tar", {LORA_MEMBER: b"x", META_MEMBER: b"{}", f"old/{META_MEMBER}": b"{}"})
    with pytest.raises(UserError, match=r"holds 2 files meta\.json"):
        extract_weights(two, tmp_path / "one")
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as packed, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's own, of the name that stands twice
        packed.writestr(LORA_MEMBER, b"one")
        packed.writestr(LORA_MEMBER, b"two")
    with pytest.raises(UserError, match="twice; pack each file once"):
        extract_weights(tmp_path / "w.zip", tmp_path / "two")
