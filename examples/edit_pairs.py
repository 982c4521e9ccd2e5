"""The editing world's training set: pairs that are drawn, encoded and kept, for `examples.pretrain --edit`."""

import itertools
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from examples import edits, shapes
from examples.pretrain_vae import WORK, log, save_checkpoint, to_tensor
from lora_utils import constants
from lora_utils.model.device import Placement
from lora_utils.model.vae import encode_images, load_vae
from lora_utils.model.vision import resized

TEXT_TO_IMAGE = Path(__file__).parent / "tiny_qwen_image"
CPU = Placement(torch.device("cpu"), torch.float32)
SEEN_PX = 84  # a side of what the vision tower is shown: `small_model.new_processor` allows no more
SHARE_PAIRS = 2000  # that a process encodes at a time


@dataclass(frozen=True, slots=True)
class EditWorld:
    """Pairs: target latents [P, 16, 64], control latents and what is seen of them by image, and the instructions."""

    targets: Tensor
    controls: Tensor  # [I, 16, 64], of all images to edit
    seen: Tensor  # [I, 84, 84, 3] uint8
    images: list[tuple[int, ...]]  # of each pair: rows of `controls`
    wordings: list[list[str]]


def encode_pairs(pairs: int, two_images: float) -> EditWorld:
    """Draw the pairs, a share of them of two images, and encode them once. Kept in the work folder."""
    kept = WORK / f"edits_{pairs}.pt"
    if kept.exists():
        return EditWorld(**torch.load(kept))
    shares = pairs // SHARE_PAIRS
    of_two = round(two_images * shares)
    parts = list[EditWorld]()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as processes:
        for part in processes.map(_encode_share, range(shares), [2] * of_two + [1] * (shares - of_two)):
            parts.append(part)
            log(f"edits: {len(parts) * SHARE_PAIRS} of {pairs} encoded")
    world = _joined(parts)
    save_checkpoint(kept, {own.name: getattr(world, own.name) for own in fields(world)})
    return world


def _joined(parts: Sequence[EditWorld]) -> EditWorld:
    firsts = itertools.accumulate((len(part.controls) for part in parts), initial=0)
    return EditWorld(
        torch.cat([part.targets for part in parts]),
        torch.cat([part.controls for part in parts]),
        torch.cat([part.seen for part in parts]),
        [
            tuple(first + row for row in rows)
            for first, part in zip(firsts, parts, strict=False)
            for rows in part.images
        ],
        [wordings for part in parts for wordings in part.wordings],
    )


def _encode_share(share: int, images: int) -> EditWorld:
    """Draw and encode `SHARE_PAIRS` edits of so many images each. Held-out ones are skipped."""
    torch.set_num_threads(1)
    vae, rng = load_vae(TEXT_TO_IMAGE, CPU), np.random.default_rng((11, share))

    def encoded(scenes: list[shapes.Scene]) -> Tensor:
        drawn = [to_tensor([np.asarray(shapes.to_image(shapes.draw(scene)), float)]) for scene in scenes]
        return torch.cat([encode_images(vae, torch.cat(drawn[i : i + 64])) for i in range(0, len(drawn), 64)]).half()

    chosen = list[edits.Edit]()
    while len(chosen) < SHARE_PAIRS:
        edit = edits.random_edit(rng, images)
        if not edits.is_held_out(edit):
            chosen.append(edit)
    sources = [scene for edit in chosen for scene in edit.sources]
    return EditWorld(
        encoded([edit.target for edit in chosen]),
        encoded(sources),
        torch.stack([what_is_seen(shapes.to_image(shapes.draw(scene))) for scene in sources]),
        [tuple(range(pair * images, (pair + 1) * images)) for pair in range(SHARE_PAIRS)],
        [edit.instruction.wordings() for edit in chosen],
    )


def what_is_seen(image: Image.Image) -> Tensor:
    """Return what the vision tower is shown of an image, [84, 84, 3] uint8: scaled up, then down, as in sampling."""
    shown = resized(image, constants.VISION_AREA_PX).resize((SEEN_PX, SEEN_PX), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(shown))
