"""A loaded model that predicts: LoRAs in, images with their settings out, and no trace of one call in the next."""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_utils.config import SampleFiles, SampleInputs, SampleRequest
from lora_utils.errors import UserError
from lora_utils.io.download import base_model_name, download_model, download_weights
from lora_utils.io.images import save_image
from lora_utils.io.logging import Progress
from lora_utils.lora.hooks import applied_loras
from lora_utils.lora.weights import LORA_CACHE_BYTES, LoraCache, Weights, package_versions, placeholders_of
from lora_utils.model import memory_plan
from lora_utils.model.components import load_components
from lora_utils.model.device import default_placement, free_bytes
from lora_utils.model.latents import Size
from lora_utils.model.text_encoder import length_warning
from lora_utils.placeholder.tokens import Placeholders, undefined_tokens
from lora_utils.sampling import sampler
from lora_utils.sampling.options import choose_options, load_init_image
from lora_utils.sampling.sampler import GeneratedImage, PromptCache, SamplingJob

log = logging.getLogger(__name__)

LINES_AN_IMAGE = 10  # of progress


@dataclass(frozen=True, slots=True)
class ScaledLora:
    """A loaded LoRA and the strength that a call gives it."""

    weights: Weights
    scale: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """The files of a call's images, and its numbers for whoever counts them."""

    paths: list[Path]
    metrics: dict[str, float]


class ModelPredictor:
    """The base model in memory, with the LoRAs used last."""

    def __init__(self, default_weights: str = ""):
        """Load the base model as the free memory allows and, if they are named, the default LoRA's weights."""
        self.folder = Path(tempfile.gettempdir()) / f"qwen-image-lora-predict-{os.getpid()}"
        self.prompts = PromptCache()
        began, placement, base_model = time.monotonic(), default_placement(), base_model_name()
        folder, asked = download_model(base_model), os.environ.get("QUANTIZATION") or "auto"
        shapes = memory_plan.read_shapes(folder)
        estimate = memory_plan.sampling_estimate(shapes, placement.dtype, free_bytes(placement.device))
        plan = memory_plan.choose_sampling_plan(asked, estimate)
        memory_plan.log_plan(plan, asked, estimate)
        self.components = load_components(folder, placement, plan.quantization, plan.text_encoder_on_device)
        log.info("loaded %s on %s in %.1f s", base_model, placement.device, time.monotonic() - began)
        self.loras = LoraCache(min(LORA_CACHE_BYTES, 0.1 * free_bytes(placement.device)))
        self.default_weights = download_weights(default_weights, self.folder / "weights") if default_weights else None
        if self.default_weights:
            self.loras.get(self.default_weights, self.components)

    def predict(self, inputs: SampleInputs) -> Prediction:
        """Sample a request's images into files, which stay until the next call. Raises UserError for bad input."""
        began, encoded_before_s = time.monotonic(), self.prompts.seconds
        loras = self.load_loras(inputs.request, inputs.files)
        loaded = time.monotonic()
        images, size = self.sample(inputs.request, loras, inputs.files)
        paths = self.save(images, inputs.request, loras, size)
        metrics = {
            "image_output_count": len(paths),
            "steps": inputs.request.steps,
            "load_s": round(loaded - began, 3),
            "encode_s": round(self.prompts.seconds - encoded_before_s, 3),
            "denoise_s": round(sum(image.denoise_s for image in images), 3),
            "decode_s": round(sum(image.decode_s for image in images), 3),
        }
        return Prediction(paths, metrics)

    def load_loras(self, request: SampleRequest, files: SampleFiles) -> list[ScaledLora]:
        """Load a call's LoRAs: the given or the default one, and the extra one."""
        found, folder = [], self.folder / "weights"
        if files.replicate_weights:
            found.append((download_weights(files.replicate_weights, folder, files.hf_token), request.lora_scale))
        elif self.default_weights:
            found.append((self.default_weights, request.lora_scale))
        if request.extra_lora:
            found.append((download_weights(request.extra_lora, folder, files.hf_token), request.extra_lora_scale))
        return [ScaledLora(self.loras.get(path, self.components), scale) for path, scale in found]

    def placeholders(self, request: SampleRequest, loras: Sequence[ScaledLora]) -> Placeholders:
        """Return the tokens that a prompt may hold. Raises UserError for one that nothing defines."""
        known = placeholders_of([lora.weights for lora in loras], self.components)
        text = f"{request.prompt} {request.negative_prompt}"
        unused = bool(known.tokens) and not known.used_in([request.prompt]).tokens
        spellings = {token.casefold() for token in known.tokens}
        for token in undefined_tokens(text, self.components.tokenizer, known.tokens):
            if unused and token.casefold() in spellings:
                continue  # `<ZWX>` for `<zwx>`: the hint below is enough
            defined = (
                f"the weights define {', '.join(known.tokens)}"
                if known.tokens
                else "no weights that define it are given"
            )
            raise UserError(
                f"the prompt holds {token!r}, but {defined}. Give its weights.zip as replicate_weights, or write the "
                "word without angle brackets."
            )
        if unused:
            log.info(
                "hint: the prompt doesn't hold %s, written exactly so, as the weights define it",
                " or ".join(known.tokens),
            )
        return placeholders_of([lora.weights for lora in loras if lora.scale != 0], self.components)

    def sample(
        self, request: SampleRequest, loras: Sequence[ScaledLora], files: SampleFiles
    ) -> tuple[list[GeneratedImage], Size]:
        """Sample the images. The LoRAs and their tokens are in place while it does, and never longer."""
        placeholders = self.placeholders(request, loras)
        if warning := length_warning(self.components.tokenizer, request.prompt, placeholders):
            log.warning("prompt %s", warning)
        size, init_image = load_init_image(self.components, request, files.image, files.mask)
        if request.width and request.height and size.pixels != (request.width, request.height):
            log.info("size %dx%d rounded to %s: sides are multiples of 16", request.width, request.height, size)
        active = [lora.weights for lora in loras if lora.scale != 0]
        request, options = choose_options(request, active, init_image)
        log.info("seed %d, size %s", request.seed, size)
        job = SamplingJob(request, size, placeholders, options)
        with applied_loras(self.components.transformer, [(lora.weights.lora, lora.scale) for lora in loras]):
            images = sampler.sample(self.components, job, progress_lines(job), self.prompts)
        return images, size

    def save(
        self, images: Sequence[GeneratedImage], request: SampleRequest, loras: Sequence[ScaledLora], size: Size
    ) -> list[Path]:
        """Write the images, each with its settings unless they are to be left out, under names of their own."""
        # What is embedded in each.
        settings = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "steps": request.steps,
            "guidance": request.guidance,
            "size": str(size),
            "strength": request.strength,
            "go_fast": request.go_fast,
            "loras": [{"sha256": lora.weights.lora.sha256, "scale": lora.scale} for lora in loras],
            "base_model": base_model_name(),
            "versions": package_versions(),
        }

        # The files.
        folder = self.folder / "images"
        shutil.rmtree(folder, ignore_errors=True)  # the last call's, which the server has sent on
        folder.mkdir(parents=True)
        paths = []
        for index, image in enumerate(images):
            log.info(
                "image %d: seed %d, %.2f s denoising, %.2f s decoding",
                index,
                image.seed,
                image.denoise_s,
                image.decode_s,
            )
            path = folder / f"{time.time_ns()}-{index}-seed{image.seed}.{request.output_format}"
            embedded = None if request.disable_metadata else {**settings, "seed": image.seed}
            paths.append(save_image(image.pixels, path, request.output_quality, embedded))
        return paths


def progress_lines(job: SamplingJob) -> Callable[[range, int], None]:
    """Return what logs at most ten lines of progress an image."""
    request = job.request
    steps = request.steps_run if job.options.init_image else request.steps
    progress = Progress(steps * request.num_outputs, every_s=0.0)
    every = max(1, -(-steps // LINES_AN_IMAGE))

    def on_step(images: range, step: int) -> None:
        if step % every == 0 or step == steps:
            which = f"image {images[0]}" if len(images) == 1 else f"images {images[0]} to {images[-1]}"
            done = images[0] * steps + step * len(images)
            log.info("%s step %d/%d %s", which, step, steps, progress.pace(done))

    return on_step
