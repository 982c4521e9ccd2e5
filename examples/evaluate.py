"""Measure what a model draws: sample prompts through the stock pipeline or ours, and let the exact scorer read them.

python -m examples.evaluate                      # the small model, on 200 held-out prompts and 100 of TOK
python -m examples.evaluate --weights out/weights.zip --object house
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import QwenImagePipeline
from PIL import Image

from examples import scorer, shapes
from lora_utils.config import SampleRequest
from lora_utils.lora.hooks import applied_loras
from lora_utils.lora.weights import Weights, load_weights, placeholders_of
from lora_utils.model.components import Components, load_components
from lora_utils.model.device import default_placement
from lora_utils.model.latents import Size
from lora_utils.model.text_encoder import encode_text
from lora_utils.model.vae import decode_images
from lora_utils.placeholder.embedding import initial_embedding
from lora_utils.placeholder.tokens import Placeholders, no_placeholders
from lora_utils.sampling import sampler
from lora_utils.sampling.sampler import Conditioning, LorasByText, SamplingJob

MODEL = Path(__file__).parent / "tiny_qwen_image"
STEPS, GUIDANCE = 20, 4.0


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt in one wording, with what the image must show."""

    prompt: shapes.Prompt
    text: str


@dataclass(frozen=True, slots=True)
class Score:
    """Shares of the images that show what was asked, 0 to 1. Places and sizes count where the prompt names them.

    `fit` is how crisp objects are: the mean share of an object's energy that its best template explains, 0 to 1.
    """

    kind: float
    colour: float
    background: float
    all_three: float
    size: float
    place: float
    fit: float
    images: int

    def __str__(self) -> str:
        shares = f"object {self.kind:.1%}, colour {self.colour:.1%}, background {self.background:.1%}"
        return (
            f"{shares}, all three {self.all_three:.1%}, size {self.size:.1%}, place {self.place:.1%} of {self.images}, "
            f"fit {self.fit:.3f}"
        )


def held_out_prompts(count: int, seed: int = 0) -> list[Asked]:
    """Different full descriptions of single shapes that pretraining never saw, each in a random wording."""
    rng = np.random.default_rng(seed)
    asked: dict[str, Asked] = {}
    while len(asked) < count:
        prompt = shapes.random_prompt(rng, part_share=0.0)
        if shapes.is_held_out(prompt):
            text = str(rng.choice(prompt.wordings()))
            asked[text] = Asked(prompt, text)
    return list(asked.values())


def object_prompts(naming: shapes.Prompt, count: int, seed: int = 0) -> list[Asked]:
    """Prompts for an object named in these words, on all backgrounds in turn, sizes and places now and then."""
    rng = np.random.default_rng(seed)
    asked = []
    for index in range(count):
        background = list(shapes.BACKGROUNDS)[index % len(shapes.BACKGROUNDS)]
        size = str(rng.choice(list(shapes.SIZES_PX))) if rng.random() < 0.3 else None
        place = str(rng.choice(list(shapes.PLACES))) if rng.random() < 0.3 else None
        prompt = replace(naming, background=background, size=size, place=place)
        asked.append(Asked(prompt, str(rng.choice(prompt.wordings()))))
    return asked


def score(images: Sequence[Image.Image], asked: Sequence[Asked], kind: str | None = None) -> Score:
    """Read every image and compare. `kind` is what the noun stands for, where it isn't the noun itself."""
    rows = []
    for image, question in zip(images, asked, strict=True):
        prompt, reading = question.prompt, scorer.read(image)
        right = reading.kind == (kind or prompt.noun)
        colour = prompt.colour is None or reading.colour == prompt.colour
        background = prompt.background is None or reading.background == prompt.background
        size = prompt.size is None or (right and reading.size == prompt.size)
        place = prompt.place is None or (right and reading.place == prompt.place)
        rows.append((right, colour, background, right and colour and background, size, place, reading.fit))
    return Score(*np.mean(rows, axis=0).tolist(), images=len(rows))


def sample_stock(model: Path, texts: Sequence[str], batch: int = 25) -> list[Image.Image]:
    """Through `QwenImagePipeline` itself; image i from seed i."""
    pipeline = QwenImagePipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(texts), batch):
        prompts = list(texts[start : start + batch])
        images += pipeline(
            prompt=prompts,
            negative_prompt=[" "] * len(prompts),
            true_cfg_scale=GUIDANCE,
            num_inference_steps=STEPS,
            width=shapes.SIDE_PX,
            height=shapes.SIDE_PX,
            generator=[torch.Generator().manual_seed(start + index) for index in range(len(prompts))],
            return_dict=False,
        )[0]
    return images


@torch.inference_mode()
def sample_ours(
    components: Components,
    texts: Sequence[str],
    placeholders: Placeholders,
    steps: int = STEPS,
    batch: int = 60,
    loras: LorasByText | None = None,
) -> list[Image.Image]:
    """Through the code that `predict.py` runs, in batches; image i from seed i. LoRAs are the caller's to apply."""
    size = Size(shapes.SIDE_PX, shapes.SIDE_PX)
    images = []
    for start in range(0, len(texts), batch):
        prompts = list(texts[start : start + batch])
        request = SampleRequest("", steps=steps, guidance=GUIDANCE, seed=0)
        text, empty = (
            encode_text(components.need_text_encoder(), components.tokenizer, words, placeholders)
            for words in (prompts, [request.negative_prompt] * len(prompts))
        )
        noise = torch.cat([sampler.initial_noise(size, start + index) for index in range(len(prompts))])
        job = SamplingJob(request, size, placeholders, loras=loras)
        latents = sampler.denoise(components, job, noise, Conditioning(text, empty), lambda _step: None)
        images += decode_images(components.need_vae(), latents, size)
    return images


def sample_with(components: Components, texts: Sequence[str], weights: Weights | None) -> list[Image.Image]:
    """`sample_ours` under a LoRA and its rows."""
    placeholders = placeholders_of([weights], components) if weights else no_placeholders()
    with applied_loras(components.transformer, [(weights.lora, 1.0)] if weights else []):
        return sample_ours(components, texts, placeholders)


def evaluate_base(model: Path, prompts: int) -> tuple[Score, Score]:
    """(held-out descriptions, TOK) through the stock pipeline."""
    asked, tok = held_out_prompts(prompts), object_prompts(shapes.Prompt(shapes.TOK), prompts // 2)
    described = score(sample_stock(model, [question.text for question in asked]), asked)
    return described, score(sample_stock(model, [question.text for question in tok]), tok)


def evaluate_weights(model: Path, path: Path, kind: str, token: str, prompts: int) -> dict[str, Score]:
    """What a LoRA has learned, and what it has left alone: by name of the measurement."""
    components = load_components(model, default_placement())
    weights = load_weights(path, components)
    taught, plain = object_prompts(shapes.Prompt(token), prompts), held_out_prompts(prompts)
    taught_texts, plain_texts = [item.text for item in taught], [item.text for item in plain]
    measured = {
        f"{token} with the LoRA": score(sample_with(components, taught_texts, weights), taught, kind),
        "other prompts with the LoRA": score(sample_with(components, plain_texts, weights), plain),
        "other prompts, base model": score(sample_with(components, plain_texts, None), plain),
    }
    if weights.lora.embeddings:
        forgotten = replace(weights, lora=replace(weights.lora, embeddings=new_embeddings(weights)))
        measured[f"{token} with the LoRA but a new embedding"] = score(
            sample_with(components, taught_texts, forgotten), taught, kind
        )
    return measured


def new_embeddings(weights: Weights) -> dict[str, torch.Tensor]:
    """Return embeddings as they were before training: what an archive that forgot to save them would predict with."""
    generator = torch.Generator().manual_seed(0)
    return {
        token: initial_embedding(embedding.shape[1], 1e-5, generator).view(1, -1)
        for token, embedding in weights.lora.embeddings.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--weights", type=Path, help="measure this weights.zip instead of the base model")
    parser.add_argument("--object", default="house", help="what the weights' token stands for")
    parser.add_argument("--token", default="<zwx>")
    arguments = parser.parse_args()
    began = time.monotonic()
    if arguments.weights:
        measured = evaluate_weights(
            arguments.model, arguments.weights, arguments.object, arguments.token, arguments.prompts
        )
        for name, result in measured.items():
            print(f"{name}: {result}")
    else:
        described, tok = evaluate_base(arguments.model, arguments.prompts)
        print(f"held-out prompts, {STEPS} steps, CFG {GUIDANCE}: {described}")
        print(f"TOK: {tok}")
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
