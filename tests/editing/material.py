"""What tests of editing are made with: models with random weights, one of each kind, and datasets of pairs."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from examples import edits, shapes, small_model, stock_edit
from lora_utils.config import TrainConfig
from lora_utils.dataset import Dataset, load
from lora_utils.io.archive import extract_archive
from lora_utils.model.device import Placement
from lora_utils.model.latents import Size
from lora_utils.model.variant import EDIT, EDIT_PLUS, Variant

CPU = Placement(torch.device("cpu"), torch.float32)
KINDS = {  # the pipeline's class and zero_cond_t, by the model that has them
    "Edit": (EDIT, False),
    "2509": (EDIT_PLUS, False),
    "2511": (EDIT_PLUS, True),
}


def write_model(folder: Path, kind: str) -> Path:
    """Write a folder as the hub's, with random weights: two blocks, and a vision tower that tells images apart."""
    variant, zero_cond_t = KINDS[kind]
    torch.manual_seed(1)
    tokenizer = small_model.train_tokenizer(edit=True)
    transformer = small_model.new_transformer(zero_cond_t, blocks=2)
    text_encoder = small_model.new_text_encoder(tokenizer, small_model.EDIT_VISION)
    for part in (transformer, text_encoder.model.visual):
        for parameter in part.parameters():  # away from the tame initialisation, so that differences show
            torch.nn.init.normal_(parameter, std=0.08) if parameter.ndim > 1 else None
    vae = small_model.new_vae([0.1 * i - 0.8 for i in range(16)], [0.5 + 0.1 * i for i in range(16)])
    parts = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
    for name, part in {**parts, "scheduler": small_model.new_scheduler()}.items():
        part.save_pretrained(folder / name)
    small_model.new_processor().save_pretrained(folder / "processor")
    tokenizer.save_pretrained(folder / "processor")
    (folder / "model_index.json").write_text(small_model.edit_model_index(variant.pipeline))
    return folder


def stock_run(
    stock: Any, images: list[Image.Image], prompt: str, size: Size, guidance: float, area_px: int
) -> torch.Tensor:
    """Return the latents of four steps of diffusers' own pipeline from seed 7, the images at this area."""
    with stock_edit.image_area(area_px):
        return stock(
            image=images if len(images) > 1 else images[0],
            prompt=prompt,
            negative_prompt=" " if guidance > 1 else None,
            true_cfg_scale=guidance,
            num_inference_steps=4,
            width=size.width_px,
            height=size.height_px,
            generator=torch.Generator().manual_seed(7),
            output_type="latent",
        ).images


def draw_pairs(count: int, controls: int = 1) -> list[edits.Edit]:
    """Return edits of plain scenes, all of one or of two images."""
    rng = np.random.default_rng(5)
    return [edits.random_edit(rng, controls) for _ in range(count)]


def write_pairs(path: Path, count: int = 6, controls: int = 1, caption: str = "", folders: bool = False) -> Path:
    """Write a dataset of pairs: NAME.png, NAME.txt, and NAME.control.png or control/NAME.png."""
    with zipfile.ZipFile(path, "w") as packed:
        for index, edit in enumerate(draw_pairs(count, controls)):
            scenes = {f"{index}.png": edit.target}
            for number, source in enumerate(edit.sources):
                numbered = f"_{number + 1}" if controls > 1 else ""
                name = f"control{numbered}/{index}.png" if folders else f"{index}.control{numbered}.png"
                scenes[name] = source
            for name, scene in scenes.items():
                with packed.open(name, "w") as file:
                    shapes.to_image(shapes.draw(scene)).save(file, "png")
            packed.writestr(f"{index}.txt", caption or edit.instruction.wordings()[0])
    return path


def extracted_pairs(folder: Path, config: TrainConfig, variant: Variant = EDIT_PLUS, **given: Any) -> Dataset:
    """Return a dataset of pairs, extracted and checked."""
    archive = write_pairs(folder / "pairs.zip", **given)
    extract_archive(archive, folder / "images")
    return load(folder / "images", config, variant=variant)
