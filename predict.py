"""Cog's prediction entry point: a prompt and maybe a LoRA -> pictures. Cog reads the signature without importing it."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path as LocalPath
from typing import Optional

from cog import BasePredictor, Input, Path, Secret

from lora_utils import fetch, memory, models, outputs, plan, sampling
from lora_utils.adapters import applied
from lora_utils.config import SampleRequest, random_seed
from lora_utils.console import Progress, log_to_stdout, unexpected_errors_printed
from lora_utils.errors import UserError
from lora_utils.placeholder import Placeholders, undefined_tokens
from lora_utils.sampling import GeneratedImage
from lora_utils.sizes import Size
from lora_utils.ways import fast_ways, starting_point
from lora_utils.weights import SHELF_BYTES, Shelf, Weights, placeholders_of, versions


class Predictor(BasePredictor):
    def setup(self, weights: Optional[Path] = None) -> None:
        """Load the base model as the memory there is allows and, if COG_WEIGHTS names one, the default LoRA."""
        log_to_stdout()
        self.folder = LocalPath(tempfile.gettempdir()) / f"qwen-image-lora-predict-{os.getpid()}"
        self.prompts = sampling.Prompts()
        with unexpected_errors_printed():
            place = models.default_place()
            base_model = fetch.base_model_name()
            began = time.monotonic()
            folder = fetch.fetch_model(base_model)
            asked = os.environ.get("QUANTIZATION") or "auto"
            placement = plan.choose_placement(asked, folder, place.device, place.dtype)
            self.components = models.load_components(
                folder, place, placement.quantization, placement.text_encoder_on_card
            )
            print(f"loaded {base_model} on {place.device} in {time.monotonic() - began:.1f} s", flush=True)
            self.shelf = Shelf(min(SHELF_BYTES, 0.1 * memory.free_bytes(place.device)))
            source = str(weights) if weights else os.environ.get("COG_WEIGHTS", "")
            self.default_weights = fetch.fetch_weights(source, self.folder / "weights") if source else None
            if self.default_weights:
                self.shelf.get(self.default_weights, self.components)

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
        megapixels: Optional[float] = Input(
            default=None,
            ge=0.05,
            le=4,
            description="Area of the picture at that aspect ratio. Empty: the official size.",
        ),
        num_outputs: int = Input(default=1, ge=1, le=4, description="Pictures to draw; picture i uses seed + i."),
        seed: Optional[int] = Input(
            default=None,
            ge=-1,
            le=4294967295,
            description="The same seed gives the same picture. Empty or -1: random, and reported.",
        ),
        image: Optional[Path] = Input(
            default=None, description="A picture to start from; it gives the aspect ratio where width and height don't."
        ),
        strength: float = Input(
            default=0.7,
            ge=0,
            le=1,
            description="How far to go from image: the share of the steps that are run. 1 draws anew, 0 changes nothing.",
        ),
        mask: Optional[Path] = Input(
            default=None, description="What of image is drawn anew: white. The rest stays. Empty: all of it."
        ),
        go_fast: bool = Input(
            default=False,
            description="Faster and lossy: a Lightning LoRA draws without guidance on its own schedule; without one, steps that change little reuse earlier work.",
        ),
        lora_scale: float = Input(default=1.0, ge=-1, le=3, description="Strength of the LoRA; 0 is the base model."),
        replicate_weights: Optional[Path] = Input(
            default=None, description="weights.zip from a training, a tar of the same, or a .safetensors LoRA."
        ),
        extra_lora: str = Input(
            default="",
            description="A second LoRA: a URL, a path, or a hub repository as owner/name or owner/name/file.safetensors.",
        ),
        extra_lora_scale: float = Input(default=1.0, ge=-1, le=3, description="Strength of the second LoRA."),
        hf_token: Optional[Secret] = Input(
            default=None, description="Token of the hub, for a private repository. It is neither kept nor logged."
        ),
        output_format: str = Input(
            default="webp", choices=["webp", "jpg", "png"], description="Format of the pictures."
        ),
        output_quality: int = Input(default=95, ge=1, le=100, description="Quality of webp and jpg."),
        disable_metadata: bool = Input(default=False, description="Leave prompt and settings out of the files."),
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
                megapixels=megapixels,
                num_outputs=num_outputs,
                strength=strength,
                go_fast=go_fast,
                lora_scale=lora_scale,
                extra_lora=extra_lora,
                extra_lora_scale=extra_lora_scale,
                output_format=output_format,
                output_quality=output_quality,
                disable_metadata=disable_metadata,
                seed=random_seed() if seed is None or seed == -1 else seed,
            )
            began = time.monotonic()
            token = hf_token.get_secret_value() if hf_token else None
            loras = self.load(request, str(replicate_weights) if replicate_weights else "", token)
            loaded, encoded_before_s = time.monotonic(), self.prompts.seconds
            images, size = self.draw(request, loras, as_local(image), as_local(mask))
            paths = self.save(images, request, loras, size)
            self.record_metric("image_output_count", len(paths))
            self.record_metric("steps", request.steps)
            self.record_metric("load_s", round(loaded - began, 3))
            self.record_metric("encode_s", round(self.prompts.seconds - encoded_before_s, 3))
            self.record_metric("denoise_s", round(sum(drawn.denoise_s for drawn in images), 3))
            self.record_metric("decode_s", round(sum(drawn.decode_s for drawn in images), 3))
            return [Path(path) for path in paths]

    def load(self, request: SampleRequest, replicate_weights: str, token: str | None) -> list[tuple[Weights, float]]:
        """The call's LoRAs with their scales: the given or the default one, and the extra one."""
        found = []
        if replicate_weights:
            found.append((fetch.fetch_weights(replicate_weights, self.folder / "weights", token), request.lora_scale))
        elif self.default_weights:
            found.append((self.default_weights, request.lora_scale))
        if request.extra_lora:
            path = fetch.fetch_weights(request.extra_lora, self.folder / "weights", token)
            found.append((path, request.extra_lora_scale))
        return [(self.shelf.get(path, self.components), scale) for path, scale in found]

    def placeholders(self, request: SampleRequest, loras: list[tuple[Weights, float]]) -> Placeholders:
        """The rows that this prompt may use, or an error for a token that nothing defines."""
        known = placeholders_of([weights for weights, _ in loras], self.components)
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
        return placeholders_of([weights for weights, scale in loras if scale != 0], self.components)

    def draw(
        self,
        request: SampleRequest,
        loras: list[tuple[Weights, float]],
        image: LocalPath | None,
        mask: LocalPath | None,
    ) -> tuple[list[GeneratedImage], Size]:
        """Sample. The LoRAs and their rows are in place while it does, and never longer."""
        placeholders = self.placeholders(request, loras)
        if warning := models.length_warning(self.components.tokenizer, request.prompt, placeholders):
            print(f"warning: prompt {warning}")
        size, start = starting_point(self.components, request, image, mask)
        if request.width and request.height and (size.width_px, size.height_px) != (request.width, request.height):
            print(f"size {request.width}x{request.height} rounded to {size}: sides are multiples of 16")
        request, ways = fast_ways(request, [weights for weights, scale in loras if scale != 0], start)
        print(f"seed {request.seed}, size {size}", flush=True)
        with applied(self.components.transformer, [(weights.lora, scale) for weights, scale in loras]):
            on_step = progress_lines(request, start is not None)
            images = sampling.sample(self.components, request, size, placeholders, on_step, ways, self.prompts)
        return images, size

    def save(
        self, images: list[GeneratedImage], request: SampleRequest, loras: list[tuple[Weights, float]], size: Size
    ) -> list[LocalPath]:
        """Write the pictures, each with its settings unless they are to be left out, under names of their own."""
        settings = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "steps": request.steps,
            "guidance": request.guidance,
            "size": str(size),
            "strength": request.strength,
            "go_fast": request.go_fast,
            "loras": [{"sha256": weights.lora.sha256, "scale": scale} for weights, scale in loras],
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
            embedded = None if request.disable_metadata else {**settings, "seed": image.seed}
            paths.append(
                outputs.save_picture(
                    image.pixels, folder, name, request.output_format, request.output_quality, embedded
                )
            )
        return paths


def as_local(path: Optional[Path]) -> LocalPath | None:
    return LocalPath(str(path)) if path else None


def progress_lines(request: SampleRequest, started: bool) -> Callable[[range, int], None]:
    """Print at most ten lines per picture."""
    steps = request.steps_run if started else request.steps
    progress = Progress(steps * request.num_outputs, every_s=0.0)
    every = max(1, -(-steps // 10))

    def on_step(pictures: range, step: int) -> None:
        if step % every == 0 or step == steps:
            which = f"picture {pictures[0]}" if len(pictures) == 1 else f"pictures {pictures[0]} to {pictures[-1]}"
            done = pictures[0] * steps + step * len(pictures)
            print(f"{which} step {step}/{steps} {progress.pace(done)}", flush=True)

    return on_step
