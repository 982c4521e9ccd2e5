"""A dataset's folder, written as a user has it."""

import pytest
from PIL import Image

COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "teal")


@pytest.fixture
def folder(tmp_path):
    """A dataset's folder with these files: names with images in colours of their own, or with texts or bytes."""

    def write(*images, **texts):
        for index, name in enumerate(images):
            path = tmp_path / "set" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), COLOURS[index]).save(path, "JPEG" if "j" in path.suffix.lower() else "PNG")
        for name, content in texts.items():
            path = tmp_path / "set" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / "set"

    return write
