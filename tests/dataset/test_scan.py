"""Images and captions as users have them."""

import numpy as np
import pytest
import torch
from PIL import Image

from lora_utils.config import TrainConfig
from lora_utils.dataset import load
from lora_utils.dataset.examples import Example
from lora_utils.errors import UserError
from lora_utils.io.images import open_image
from lora_utils.model.latents import Size

GRADIENT = Image.fromarray(np.dstack([np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))] * 3))


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@pytest.mark.parametrize("ending", ["jpg", "jpeg", "png", "webp", "bmp", "avif", "heic", "PNG"])
def test_every_format_is_read(ending, tmp_path):
    save(GRADIENT, tmp_path / f"one.{ending}")
    found = load(tmp_path, TrainConfig(resolution="64", default_caption="x", seed=0))
    assert found.num_images == 1
    pixels = np.asarray(open_image(tmp_path / f"one.{ending}"), float)
    assert np.abs(pixels - np.asarray(GRADIENT, float)).mean() < 3


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: stored 64x48, meant 48x64
    path = save(GRADIENT, tmp_path / "one.jpg", exif=exif)
    assert open_image(path).size == (48, 64)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode, tmp_path):
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 32, 64))
    path = save(image.convert(mode), tmp_path / "one.png")
    assert open_image(path).getpixel((60, 5)) == (255, 255, 255)


def test_captions_stand_beside_their_images_else_the_default(tmp_path):
    save(GRADIENT, tmp_path / "a" / "one.png")
    (tmp_path / "a" / "one.txt").write_text("\ufeffein Bär \n", encoding="utf-8")
    save(GRADIENT, tmp_path / "b" / "one.png")
    save(GRADIENT, tmp_path / "b" / "two.png")
    (tmp_path / "b" / "two.txt").write_text("  \n")
    (tmp_path / "b" / "notes.txt").write_text("no image has this name")
    found = load(tmp_path, TrainConfig(resolution="64", default_caption="a default", seed=0))
    assert found.captions == ["ein Bär", "a default", "a default"]
    assert found.left_out == ["b/notes.txt"]


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    save(GRADIENT, tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:100])
    with pytest.raises(UserError, match=r"broken\.png can't be read"):
        load(tmp_path, TrainConfig(resolution="64", default_caption="", seed=0))
    (tmp_path / "broken.png").write_bytes(b"no image at all")
    with pytest.raises(UserError, match=r"broken\.png can't be read"):
        load(tmp_path, TrainConfig(resolution="64", default_caption="", seed=0))


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    (tmp_path / "movie.mp4").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no images.*movie\.mp4"):
        load(tmp_path, TrainConfig(resolution="64", default_caption="", seed=0))


def test_pixels_cover_the_bucket_and_are_cropped_about_the_centre(tmp_path):
    path = save(GRADIENT, tmp_path / "one.png")
    pixels = Example(path, "", Size(32, 48)).pixels()
    assert pixels.shape == (3, 48, 32)
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    columns = pixels[0].mean(dim=0)
    assert torch.allclose(columns[15:17].mean(), torch.tensor(126 / 127.5 - 1), atol=0.02)
