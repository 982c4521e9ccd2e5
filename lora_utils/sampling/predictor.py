"""A loaded model that predicts: LoRAs in, images with their settings out, and no trace of one call in the next."""

import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_utils.config import SampleFiles, SampleInputs, SampleRequest
from lora_utils.errors import UserError
from lora_utils.io.access import CALLER, OWNER, Access
from lora_utils.io.download import base_model_label, base_model_name, download_model, download_weights, forget_download
from lora_utils.io.files import new_process_folder
from lora_utils.io.images import fit_settings, save_image
from lora_utils.io.logging import Progress
from lora_utils.lora.hooks import applied_loras
from lora_utils.lora.lora_cache import LORA_CACHE_BYTES, LoraCache
from lora_utils.lora.weights import (
    Weights,
    load_what_they_adapt,
    package_versions,
    placeholders_of,
)
from lora_utils.model import memory_estimate, memory_plan
from lora_utils.model.components import load_components
from lora_utils.model.device import default_placement, free_bytes
from lora_utils.model.latents import Size
from lora_utils.model.text_encoder import length_warning
from lora_utils.placeholder.tokens import Placeholders, near_spellings
from lora_utils.sampling import sampler
from lora_utils.sampling.acting import ScaledLora, Taught, acting_under, without_unnamed
from lora_utils.sampling.options import check_files, choose_options, load_controls, load_init_image
from lora_utils.sampling.sampler import GeneratedImage, LorasByText, PromptCache, SamplingJob
from lora_utils.triggers import expand_trigger, holds, holds_mark

log = logging.getLogger(__name__)

LINES_AN_IMAGE = 10  # of progress


@dataclass(frozen=True, slots=True)
class Prediction:
    """The files of a call's images, and its numbers for whoever counts them."""

    paths: list[Path]
    metrics: dict[str, float]


class ModelPredictor:
    """The base model in memory, with the LoRAs used last."""

    def __init__(self, default_weights: str = ""):
        """Load the base model as the free memory allows and, if they are named, the default LoRA's weights."""
        self.folder = new_process_folder("predict")
        self.prompts = PromptCache()
        began, base_model = time.monotonic(), base_model_name()
        folder, asked = download_model(base_model), os.environ.get("QUANTIZATION") or "auto"
        shapes = memory_estimate.read_shapes(folder)
        placement = default_placement(shapes.weights)
        estimate = memory_estimate.sampling_estimate(shapes, memory_estimate.measure_room(placement))
        plan = memory_plan.choose_sampling_plan(asked, estimate)
        memory_plan.log_plan(plan, asked, estimate)
        self.components = load_components(folder, placement, plan.quantization, plan.text_encoder_on_device)
        log.info("loaded %s on %s in %.1f s", base_model, placement.device, time.monotonic() - began)
        self.loras = LoraCache(min(LORA_CACHE_BYTES, 0.1 * free_bytes(placement.device)))
        self.default_weights = None
        if default_weights:  # the operator's own
            self.default_weights = download_weights(default_weights, self.folder / "default", access=OWNER)
            self.loras.get(self.default_weights, self.components)

    def predict(self, inputs: SampleInputs, access: Access = CALLER) -> Prediction:
        """Sample a request's images into files, which stay until the next call. Raises UserError for bad input.

        `access` says what the caller may reach beyond the request itself. A call that fails leaves no file behind.
        """
        began, encoded_before_s = time.monotonic(), self.prompts.seconds
        shutil.rmtree(self.images_folder, ignore_errors=True)  # the last call's, which the server has sent on
        try:
            loras = self.load_loras(inputs.request, inputs.files, access)
            request = self.read_prompts(inputs.request, loras)
            loras = without_unnamed(request, loras)
            loaded = time.monotonic()
            images, size = self.sample(request, loras, inputs.files)
            paths = self.save(images, request, loras, size)
        except BaseException:
            shutil.rmtree(self.images_folder, ignore_errors=True)
            raise
        metrics = {
            "image_output_count": len(paths),
            "steps": request.steps,
            "load_s": round(loaded - began, 3),
            "encode_s": round(self.prompts.seconds - encoded_before_s, 3),
            "denoise_s": round(sum(image.denoise_s for image in images), 3),
            "decode_s": round(sum(image.decode_s for image in images), 3),
        }
        return Prediction(paths, metrics)

    @property
    def images_folder(self) -> Path:
        """Where a call's images are until the next one."""
        return self.folder / "images"

    def close(self) -> None:
        """Remove the files of this process: downloads, and the last call's images."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def load_loras(self, request: SampleRequest, files: SampleFiles, access: Access = CALLER) -> list[ScaledLora]:
        """Load a call's LoRAs: the given or the default one, and the extra ones. The first came with the request."""
        found = []
        if files.replicate_weights:
            given = self._load(files.replicate_weights, files.hf_token, replace(access, local_paths=True))
            found.append(ScaledLora(given, request.lora_scale))
        elif self.default_weights:
            found.append(ScaledLora(self.loras.get(self.default_weights, self.components), request.lora_scale))
        for source, scale in request.extra_loras:
            found.append(ScaledLora(self._load(source, files.hf_token, access), scale))
        return found

    def _load(self, source: str, hf_token: str | None, access: Access) -> Weights:
        """Download and load a LoRA. What was downloaded and turns out to be none isn't kept."""
        folder = self.folder / "weights"
        path = download_weights(source, folder, hf_token, access)
        try:
            return self.loras.get(path, self.components)
        except UserError:
            forget_download(path, folder)
            raise

    def read_prompts(self, request: SampleRequest, loras: Sequence[ScaledLora]) -> SampleRequest:
        """Return the request with `[trigger]` in its prompts replaced, as the weights were trained with it.

        Without weights that say what it stands for it is text like any other. What the weights were taught by and the
        prompt lacks is hinted at.
        """
        taught = [Taught.by(lora.weights) for lora in loras]
        for each in (each for each in taught if each.trigger_word or each.tokens):
            texts = request.prompt, request.negative_prompt
            prompt, negative_prompt = (expand_trigger(text, each.trigger_word, each.tokens) for text in texts)
            request = replace(request, prompt=prompt, negative_prompt=negative_prompt)
        if holds_mark(request.prompt):
            log.info("hint: [trigger] is text like any other: no weights say what it is called")
        for each in taught:
            if each.trigger_word and not holds(request.prompt, each.trigger_word):
                log.info("hint: the prompt doesn't hold %r, the word that the weights were taught", each.trigger_word)
        return request

    def placeholders(self, request: SampleRequest, loras: Sequence[ScaledLora]) -> Placeholders:
        """Return the tokens that a prompt may hold, and hint at what is nearly one of them."""
        known = placeholders_of([lora.weights for lora in loras], self.components)
        if known.tokens and not known.used_in([request.prompt]).tokens:
            log.info(
                "hint: the prompt doesn't hold %s, written exactly so, as the weights define it",
                " or ".join(known.tokens),
            )
        for written, meant in near_spellings(f"{request.prompt} {request.negative_prompt}", known.tokens).items():
            log.info("hint: the prompt holds %r, and the weights define %s", written, meant)
        return placeholders_of([lora.weights for lora in loras if lora.scale != 0], self.components)

    def sample(
        self, request: SampleRequest, loras: Sequence[ScaledLora], files: SampleFiles
    ) -> tuple[list[GeneratedImage], Size]:
        """Sample the images. The LoRAs and their tokens are in place while it does, and never longer."""
        placeholders = self.placeholders(request, loras)
        if warning := length_warning(self.components.tokenizer, request.prompt, placeholders):
            log.warning("prompt %s", warning)
        active = [lora.weights for lora in loras if lora.scale != 0]
        check_files(files, self.components.variant)
        controls, init_image = None, None
        if self.components.variant.edits:  # `image` is to be edited, not to start from, unless a mask keeps some of it
            size, controls = load_controls(self.components, request, files, active)
            request = replace(request, strength=1.0)
            if files.mask is not None:
                _, init_image = load_init_image(self.components, request, files.image, files.mask, size)
        else:
            size, init_image = load_init_image(self.components, request, files.image, files.mask)
        if request.width and request.height and size.pixels != (request.width, request.height):
            log.info("size %dx%d rounded to %s: sides are multiples of 16", request.width, request.height, size)
        if not request.disable_metadata and self.settings(request, loras, size)[1]:
            log.warning("the prompt is too long for the settings in a %s file, and is cut there", request.output_format)
        request, options = choose_options(request, active, init_image)
        log.info("seed %d, size %s", request.seed, size)
        load_what_they_adapt([weights.lora for weights in active], self.components)
        scaled = [(lora.weights.lora, lora.scale) for lora in loras]
        with applied_loras(self.components.transformer, scaled) as applied:
            by_text = LorasByText(
                applied,
                acting_under(request.prompt, request, loras),
                acting_under(request.negative_prompt, request, loras),
            )
            job = SamplingJob(request, size, placeholders, options, controls, by_text)
            images = sampler.sample(self.components, job, progress_lines(job), self.prompts)
        return images, size

    def settings(self, request: SampleRequest, loras: Sequence[ScaledLora], size: Size) -> tuple[dict[str, Any], bool]:
        """Return what is embedded in each image but its seed, and whether texts of it were cut for the format."""
        settings = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "steps": request.steps,
            "guidance": request.guidance,
            "size": str(size),
            "strength": request.strength,
            "go_fast": request.go_fast,
            "lora_acts": request.lora_acts,
            "loras": [{"sha256": lora.weights.lora.sha256, "scale": lora.scale} for lora in loras],
            "base_model": base_model_label(),
            "versions": package_versions(),
        }
        return fit_settings(settings, request.output_format)

    def save(
        self, images: Sequence[GeneratedImage], request: SampleRequest, loras: Sequence[ScaledLora], size: Size
    ) -> list[Path]:
        """Write the images, each with its settings unless they are to be left out, under names of their own."""
        settings, _ = self.settings(request, loras, size)
        self.images_folder.mkdir(parents=True)
        paths = []
        for index, image in enumerate(images):
            log.info(
                "image %d: seed %d, %.2f s denoising, %.2f s decoding",
                index,
                image.seed,
                image.denoise_s,
                image.decode_s,
            )
            name = f"{time.time_ns()}-{index}-seed{image.seed}.{request.output_format}"
            embedded = None if request.disable_metadata else {**settings, "seed": image.seed}
            paths.append(save_image(image.pixels, self.images_folder / name, request.output_quality, embedded))
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
