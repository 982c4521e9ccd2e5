"""Measure how well a model edits: held-out edits through the stock pipeline or ours, read by the exact scorer.

python -m examples.evaluate_edit                  # the small editing model, 200 edits through diffusers' pipeline
python -m examples.evaluate_edit --ours --sheet out/edits.png
"""

import argparse
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from examples import edits, shapes, stock_edit
from lora_utils.config import SampleRequest
from lora_utils.lora.hooks import applied_loras
from lora_utils.lora.weights import Weights, placeholders_of
from lora_utils.model.components import Components, load_components
from lora_utils.model.controls import encode_controls
from lora_utils.model.device import default_placement
from lora_utils.model.latents import Size
from lora_utils.placeholder.tokens import no_placeholders
from lora_utils.sampling import sampler
from lora_utils.sampling.sampler import SamplingJob
from lora_utils.tracking.contact_sheet import draw_sheet

MODEL = Path(__file__).parent / "tiny_qwen_image_edit"
STEPS, GUIDANCE = 20, 4.0
SIZE = Size(shapes.SIDE_PX, shapes.SIDE_PX)
AREA_PX = shapes.SIDE_PX**2
PARTS = ("text_encoder", "transformer", "both")  # that have the images to edit


@dataclass(frozen=True, slots=True)
class Asked:
    """An instruction in one wording, with the images to edit."""

    text: str
    images: tuple[Image.Image, ...]


@dataclass(frozen=True, slots=True)
class AskedEdit(Asked):
    """One that the scorer knows the right result of."""

    edit: edits.Edit


@dataclass(frozen=True, slots=True)
class EditScores:
    """Shares of the images, 0 to 1: the change that was asked for is right, everything else is kept, and both."""

    changed: float
    kept: float
    both: float
    fit: float  # how crisp objects are: the mean of `edits.EditScore.fit`
    by_action: dict[str, float]  # both, by what is asked
    images: int

    def __str__(self) -> str:
        each = ", ".join(f"{name} {share:.0%}" for name, share in self.by_action.items())
        shares = f"changed {self.changed:.1%}, kept {self.kept:.1%}, both {self.both:.1%} of {self.images}"
        return f"{shares}, fit {self.fit:.3f} ({each})"


def held_out_edits(count: int, seed: int = 0) -> list[AskedEdit]:
    """Different edits that pretraining never saw and that change something, a fifth of them of two images."""
    rng, asked = np.random.default_rng(seed), list[AskedEdit]()
    while len(asked) < count:
        edit = edits.random_edit(rng, 2 if len(asked) % 5 == 4 else 1)
        images = tuple(shapes.to_image(shapes.draw(scene)) for scene in edit.sources)
        if edits.is_held_out(edit) and not edits.score(images[0], edit).changed:
            asked.append(AskedEdit(str(rng.choice(edit.instruction.wordings())), images, edit))
    return asked


def score(images: Sequence[Image.Image], asked: Sequence[AskedEdit]) -> EditScores:
    """Read every image and compare."""
    found = [edits.score(image, own.edit) for image, own in zip(images, asked, strict=True)]
    right, total = defaultdict[str, int](int), Counter(own.edit.instruction.action for own in asked)
    for each, own in zip(found, asked, strict=True):
        right[own.edit.instruction.action] += each.changed and each.kept
    return EditScores(
        float(np.mean([each.changed for each in found])),
        float(np.mean([each.kept for each in found])),
        float(np.mean([each.changed and each.kept for each in found])),
        float(np.mean([each.fit for each in found])),
        {name: right[name] / total[name] for name in sorted(total)},
        len(found),
    )


def edit_stock(model: Path, asked: Sequence[Asked], image_positions: bool = True) -> list[Image.Image]:
    """Edit through diffusers' own pipeline; image i from seed i."""
    pipeline: Any = stock_edit.load_pipeline(model, image_positions)
    with stock_edit.image_area(AREA_PX):
        return [
            pipeline(
                image=list(own.images),
                prompt=own.text,
                negative_prompt=" ",
                true_cfg_scale=GUIDANCE,
                num_inference_steps=STEPS,
                width=SIZE.width_px,
                height=SIZE.height_px,
                generator=torch.Generator().manual_seed(index),
            ).images[0]
            for index, own in enumerate(asked)
        ]


def edit_ours(
    components: Components,
    asked: Sequence[Asked],
    weights: Weights | None = None,
    steps: int = STEPS,
    black_for: str = "",
) -> list[Image.Image]:
    """Edit through the code that `predict.py` runs, with a LoRA and its tokens or without; image i from seed i.

    `black_for` is the part that has black images in place of the true ones: "text_encoder", "transformer" or "both".
    """
    placeholders = placeholders_of([weights], components) if weights else no_placeholders()
    black = Image.new("RGB", SIZE.pixels)
    images = []
    with applied_loras(components.transformer, [(weights.lora, 1.0)] if weights else []):
        for index, own in enumerate(asked):
            request = SampleRequest(own.text, steps=steps, guidance=GUIDANCE, width=64, height=64, seed=index)
            controls = encode_controls(components, own.images, AREA_PX)
            hidden = encode_controls(components, [black] * len(own.images), AREA_PX)
            if black_for in ("text_encoder", "both"):
                controls = replace(controls, seen=hidden.seen)
            if black_for in ("transformer", "both"):
                controls = replace(controls, latents=hidden.latents)
            job = SamplingJob(request, SIZE, placeholders, controls=controls)
            images += [made.pixels for made in sampler.sample(components, job, lambda *_: None)]
    return images


def sheet(images: Sequence[Image.Image], asked: Sequence[AskedEdit], rows: int = 12) -> Image.Image:
    """Draw some of them: the images to edit, what was made of them, and the target."""
    shown = list(zip(images, asked, strict=True))[:rows]
    labels = [["picture 1", *["picture 2"][: len(own.images) - 1], own.text, "target"] for _, own in shown]
    drawn = [[*own.images, image, shapes.to_image(shapes.draw(own.edit.target))] for image, own in shown]
    return draw_sheet(labels, drawn, "held-out edits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--edits", type=int, default=200)
    parser.add_argument("--ours", action="store_true", help="through this package in place of diffusers' pipeline")
    parser.add_argument("--black-for", choices=PARTS, default="", help="through this package; it has black images")
    parser.add_argument("--as-released", action="store_true", help="diffusers' pipeline without image positions")
    parser.add_argument("--sheet", type=Path, help="write a sheet of the first ones")
    arguments = parser.parse_args()
    began, asked = time.monotonic(), held_out_edits(arguments.edits)
    if arguments.ours or arguments.black_for:
        components = load_components(arguments.model, default_placement())
        images = edit_ours(components, asked, black_for=arguments.black_for)
    else:
        images = edit_stock(arguments.model, asked, not arguments.as_released)
    print(f"held-out edits, {STEPS} steps, CFG {GUIDANCE}: {score(images, asked)}")
    print(f"{time.monotonic() - began:.0f} s")
    if arguments.sheet:
        arguments.sheet.parent.mkdir(parents=True, exist_ok=True)
        sheet(images, asked).save(arguments.sheet)


if __name__ == "__main__":
    main()
