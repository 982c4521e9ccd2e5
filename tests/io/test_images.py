"""Image files of every kind: upright, in sRGB, or refused by name before much is spent on them."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from lora_utils.config import TrainConfig
from lora_utils.dataset import load
from lora_utils.errors import UserError
from lora_utils.io.images import difference_hash, open_image

RAMP = np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))  # [48, 64], dark to bright
COLOURS = np.dstack([RAMP, RAMP[:, ::-1], np.full_like(RAMP, 90)])


def pixels(path):
    return np.asarray(open_image(path), float)


@pytest.mark.parametrize("ending", ["gif", "tif", "tiff", "webp"])
def test_of_a_moving_image_the_first_frame_is_taken(ending, tmp_path):
    first, second = Image.fromarray(COLOURS), Image.new("RGB", (64, 48), "blue")
    options = {"lossless": True} if ending == "webp" else {}
    first.save(tmp_path / f"one.{ending}", save_all=True, append_images=[second], **options)
    assert np.abs(pixels(tmp_path / f"one.{ending}") - COLOURS).mean() < 8  # a gif has 256 colours


def test_sixteen_bits_of_grey_are_scaled_and_not_clipped(tmp_path):
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / "one.png")
    assert np.array_equal(pixels(tmp_path / "one.png")[..., 1], RAMP)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "CMYK", "YCbCr", "LAB"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    source = Image.fromarray(COLOURS)
    if mode == "LAB":
        to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        stored = ImageCms.applyTransform(source, to_lab)
    else:
        stored = source.convert("L").convert(mode) if mode in ("LA", "L", "1") else source.convert(mode)
    stored.save(tmp_path / "one.tif")
    expected = np.asarray(source.convert("L").convert("RGB") if mode in ("L", "LA", "1") else source, float)
    assert np.abs(pixels(tmp_path / "one.tif").mean(axis=(0, 1)) - expected.mean(axis=(0, 1))).max() < 12


def test_an_icc_profile_is_converted_to_srgb(tmp_path):
    """A profile whose red and blue are exchanged: whoever ignores it sees the wrong colours."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for one, other in ((b"rXYZ", b"bXYZ"), (b"rTRC", b"bTRC")):
        first, second = profile.index(one), profile.index(other)
        profile[first : first + 4], profile[second : second + 4] = other, one
    Image.fromarray(COLOURS).save(tmp_path / "one.png", icc_profile=bytes(profile))
    assert np.abs(pixels(tmp_path / "one.png") - COLOURS[..., ::-1]).mean() < 3
    rgba = Image.fromarray(np.dstack([COLOURS, np.full_like(RAMP, 255)]))
    rgba.save(tmp_path / "two.png", icc_profile=bytes(profile))
    assert np.array_equal(pixels(tmp_path / "two.png"), pixels(tmp_path / "one.png"))


def test_a_damaged_profile_is_as_good_as_none(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "one.png", icc_profile=b"not a profile" * 20)
    assert np.array_equal(pixels(tmp_path / "one.png"), COLOURS)


def test_the_content_counts_and_not_the_ending(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "one.jpg", "png")
    assert np.array_equal(pixels(tmp_path / "one.jpg"), COLOURS)
    (tmp_path / "two.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(UserError, match=r"two\.jpg can't be read"):
        open_image(tmp_path / "two.jpg")


def test_an_image_that_would_swell_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    Image.new("1", (15_000, 10_000)).save(tmp_path / "large.png")  # 150 megapixels in some 20 kB
    monkeypatch.setattr(Image.Image, "load", lambda _self: pytest.fail("it was decoded"))
    with pytest.raises(UserError, match=r"large\.png has 15000x10000 pixels; scale it down to 100 megapixels"):
        open_image(tmp_path / "large.png")


def test_an_image_that_claims_more_than_any_decoder_takes_is_refused(tmp_path):
    stored = io.BytesIO()
    Image.new("L", (8, 8)).save(stored, "bmp")
    raw = bytearray(stored.getvalue())
    raw[18:26] = (60_000).to_bytes(4, "little") * 2
    (tmp_path / "bomb.bmp").write_bytes(raw)
    with pytest.raises(UserError, match=r"bomb\.bmp has more than 100 megapixels"):
        open_image(tmp_path / "bomb.bmp")


def test_duplicates_and_small_ones_are_named(tmp_path):
    big = Image.fromarray(COLOURS).resize((640, 480))
    big.save(tmp_path / "a.png")
    big.resize((600, 450)).save(tmp_path / "b.jpg", quality=80)
    Image.fromarray(COLOURS).rotate(90, expand=True).save(tmp_path / "c.png")
    said = "\n".join(load(tmp_path, TrainConfig(resolution="256", seed=0)).notes)
    assert "look the same, and count as often: a.png, b.jpg" in said
    assert "too small for the smallest bucket, and enlarged: c.png" in said


def test_the_hash_tells_other_images_apart():
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(20)]
    assert len({difference_hash(image) for image in noise}) == 20
    assert difference_hash(noise[0].resize((80, 70), Image.Resampling.BOX)) is not None
