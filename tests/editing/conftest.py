"""Editing models with random weights, one of each kind, and images to edit."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_utils.model.components import Components, load_components
from tests.editing.material import CPU, KINDS, write_model


@pytest.fixture(scope="session")
def edit_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of the three kinds."""
    return {kind: write_model(tmp_path_factory.mktemp(kind.lower()), kind) for kind in KINDS}


@pytest.fixture(scope="session")
def parts_of(edit_models: dict[str, Path]) -> dict[str, Components]:
    """Our parts of the three kinds. Tests leave them as they found them."""
    return {kind: load_components(folder, CPU) for kind, folder in edit_models.items()}


@pytest.fixture(scope="session")
def to_edit() -> list[Image.Image]:
    """Three images of unequal sizes and aspect ratios, of noise, so that no pixel is like another."""
    generator = torch.Generator().manual_seed(3)
    noise = [torch.randint(0, 255, (h, w, 3), generator=generator) for h, w in ((64, 96), (80, 48), (50, 50))]
    return [Image.fromarray(pixels.byte().numpy()) for pixels in noise]
