"""Cog's prediction entry point: a prompt and maybe a LoRA -> pictures. Cog reads the signature without importing it."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path as LocalPath
from typing import Optional

from cog import BasePredictor, Input, Path

from lora_utils import fetch, models, outputs, sampling
from lora_utils.adapters import applied
from lora_utils.config import SampleRequest, random_seed
from lora_utils.console import Progress, log_to_stdout, unexpected_errors_printed
from lora_utils.errors import UserError
from lora_utils.lora_file import file_sha256
from lora_utils.placeholder import Placeholders, no_placeholders, undefined_tokens
from lora_utils.sampling import GeneratedImage
from lora_utils.sizes import picture_size
from lora_utils.weights import Weights, load_weights, placeholders_of, versions

LORAS_KEPT = 4  # on the device, by the hash of their file


class Predictor(BasePredictor):
    def setup(self, weights: Optional[Path] = None) -> None:
        """Load the base model and, if COG_WEIGHTS names one, the default LoRA."""
        log_to_stdout()
        self.folder = LocalPath(tempfile.gettempdir()) / f"qwen-image-lora-predict-{os.getpid()}"
        self.loaded: dict[str, Weights] = {}
        with unexpected_errors_printed():
            place = models.default_place()
            base_model = fetch.base_model_name()
            began = time.monotonic()
            self.components = models.load_components(fetch.fetch_model(base_model), place)
            print(f"loaded {base_model} on {place.device} in {time.monotonic() - began:.1f} s", flush=True)
            source = str(weights) if weights else os.environ.get("COG_WEIGHTS", "")
            self.default_weights = fetch.fetch_file(source, self.folder / "weights") if source else None
            if self.default_weights:
                self.load(self.default_weights)

    def predict(
        self,
        prompt: str = Input(description="What to draw. Name the placeholder token of your weights, if they have one."),
        negative_prompt: str = Input(
            default=" ", description="What to steer away from; used when guidance is above 1."
        ),
        steps: int = Input(default=50, ge=1, le=100, description="Denoising steps."),
        guidance: float = Input(
            default=4.0,
            ge=0,
            le=10,
            description="Classifier-free guidance. 1 or less turns it off and takes half the time.",
        ),
        width: Optional[int] = Input(
            default=None,
            ge=64,
            le=2048,
            description="Width in pixels, rounded to 16. Needs height; overrides aspect_ratio.",
        ),
        height: Optional[int] = Input(
            default=None,
            ge=64,
            le=2048,
            description="Height in pixels, rounded to 16. Needs width; overrides aspect_ratio.",
        ),
        aspect_ratio: str = Input(
            default="1:1",
            choices=["1:1", "16:9", "9:16", "4:3", "3:4", "3:2", "2:3"],
            description="One of the model's official sizes, 1328x1328 for 1:1.",
        ),
        num_outputs: int = Input(default=1, ge=1, le=4, description="Pictures to draw; picture i uses seed + i."),
        seed: Optional[int] = Input(
            default=None,
            ge=-1,
            le=4294967295,
            description="The same seed gives the same picture. Empty or -1: random, and reported.",
        ),
        lora_scale: float = Input(default=1.0, ge=-1, le=3, description="Strength of the LoRA; 0 is the base model."),
        replicate_weights: Optional[Path] = Input(
            default=None, description="weights.zip from a training, a tar of the same, or a .safetensors LoRA."
        ),
        output_format: str = Input(
            default="webp", choices=["webp", "jpg", "png"], description="Format of the pictures."
        ),
        output_quality: int = Input(default=95, ge=1, le=100, description="Quality of webp and jpg."),
    ) -> list[Path]:
        with unexpected_errors_printed():
            request = SampleRequest(
                prompt=prompt,
                negative_prompt=negative_prompt,
                steps=steps,
                guidance=guidance,
                width=width,
                height=height,
                aspect_ratio=aspect_ratio,
                num_outputs=num_outputs,
                lora_scale=lora_scale,
                output_format=output_format,
                output_quality=output_quality,
                seed=random_seed() if seed is None or seed == -1 else seed,
            )
            source = LocalPath(str(replicate_weights)) if replicate_weights else self.default_weights
            paths = self.draw(request, self.load(source) if source else None)
            self.record_metric("image_output_count", len(paths))
            return [Path(path) for path in paths]

    def load(self, source: LocalPath) -> Weights:
        """The weights of a file, from the few that are kept if its content was seen before."""
        if not source.is_file():
            raise UserError(f"there is no weights file {source}.")
        began, key = time.monotonic(), file_sha256(source)
        if key not in self.loaded:
            loaded = load_weights(source, self.components)
            while len(self.loaded) >= LORAS_KEPT:
                self.loaded.pop(next(iter(self.loaded)))
            self.loaded[key] = loaded
            tokens = f", with {', '.join(loaded.lora.rows)}" if loaded.lora.rows else ""
            layers = len(loaded.lora.layers)
            print(
                f"loaded a LoRA of {layers} layers{tokens} in {time.monotonic() - began:.2f} s, sha256 {loaded.lora.sha256}"
            )
        return self.loaded[key]

    def placeholders(self, request: SampleRequest, weights: Weights | None) -> Placeholders:
        """The rows that this prompt may use, or an error for a token that nothing defines."""
        known = placeholders_of([weights], self.components) if weights else no_placeholders()
        text = f"{request.prompt} {request.negative_prompt}"
        unused = bool(known.tokens) and not known.used_in([request.prompt]).tokens
        spellings = {token.casefold() for token in known.tokens}
        for token in undefined_tokens(text, self.components.tokenizer, known.slots):
            if unused and token.casefold() in spellings:
                continue  # `<ZWX>` for `<zwx>`: the hint below is enough
            defined = (
                f"the weights define {', '.join(known.tokens)}"
                if known.tokens
                else "no weights that define it are given"
            )
            raise UserError(
                f"the prompt holds {token!r}, but {defined}. Give its weights.zip as replicate_weights, or write the word "
                "without angle brackets."
            )
        if unused:
            print(
                f"hint: the prompt doesn't hold {' or '.join(known.tokens)}, written exactly so, as the weights define it"
            )
        return known if request.lora_scale != 0 else no_placeholders()

    def draw(self, request: SampleRequest, weights: Weights | None) -> list[LocalPath]:
        """Sample and save. The LoRA and its rows are in place while it samples, and never longer."""
        placeholders = self.placeholders(request, weights)
        if warning := models.length_warning(self.components.tokenizer, request.prompt, placeholders):
            print(f"warning: prompt {warning}")
        size = picture_size(request.width, request.height, request.aspect_ratio)
        if request.width and request.height and (size.width_px, size.height_px) != (request.width, request.height):
            print(f"size {request.width}x{request.height} rounded to {size}: sides are multiples of 16")
        print(f"seed {request.seed}, size {size}", flush=True)
        loras = [(weights.lora, request.lora_scale)] if weights else []
        with applied(self.components.transformer, loras):
            images = sampling.sample(self.components, request, placeholders, progress_lines(request))
        return self.save(images, request, weights)

    def save(self, images: list[GeneratedImage], request: SampleRequest, weights: Weights | None) -> list[LocalPath]:
        """Write the pictures, each with its settings, under names that no other call uses."""
        settings = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "steps": request.steps,
            "guidance": request.guidance,
            "size": f"{images[0].pixels.width}x{images[0].pixels.height}",
            "lora_sha256": weights.lora.sha256 if weights else None,
            "lora_scale": request.lora_scale,
            "base_model": fetch.base_model_name(),
            "versions": versions(),
        }
        folder = self.folder / "pictures"
        shutil.rmtree(folder, ignore_errors=True)  # the last call's, which the server has sent on
        folder.mkdir(parents=True)
        paths = []
        for index, image in enumerate(images):
            print(
                f"picture {index}: seed {image.seed}, {image.denoise_s:.2f} s denoising, {image.decode_s:.2f} s decoding"
            )
            name = f"{time.time_ns()}-{index}-seed{image.seed}"
            embedded = {**settings, "seed": image.seed}
            paths.append(
                outputs.save_picture(
                    image.pixels, folder, name, request.output_format, request.output_quality, embedded
                )
            )
        return paths


def progress_lines(request: SampleRequest) -> Callable[[int, int], None]:
    """Print at most ten lines per picture."""
    progress = Progress(request.steps * request.num_outputs, every_s=0.0)
    every = max(1, -(-request.steps // 10))

    def on_step(picture: int, step: int) -> None:
        if step % every == 0 or step == request.steps:
            print(
                f"picture {picture} step {step}/{request.steps} {progress.pace(picture * request.steps + step)}",
                flush=True,
            )

    return on_step
