"""Cog's prediction entry point: a prompt and maybe a LoRA -> images. Cog reads the signature without importing it."""

import os
from typing import Optional

from cog import BasePredictor, Input, Path, Secret

from lora_utils.config import SampleInputs, from_inputs
from lora_utils.io.access import client_access
from lora_utils.io.libraries import import_libraries
from lora_utils.io.logging import logged_to_stdout

import_libraries()  # before anything else imports diffusers

from lora_utils.sampling.predictor import ModelPredictor  # noqa: E402 (see above)


class Predictor(BasePredictor):
    """The model that a server holds."""

    def setup(self, weights: Optional[Path] = None) -> None:
        """Load the base model and, if COG_WEIGHTS names one, the default LoRA."""
        with logged_to_stdout():
            self.model = ModelPredictor(str(weights or os.environ.get("COG_WEIGHTS", "")))

    def predict(
        self,
        # inputs from lora_utils/config.py, written by scripts/cog_signatures.py
        prompt: str = Input(description="What to show. Name the placeholder token of your weights, if they have one."),
        replicate_weights: Optional[Path] = Input(default=None, accept=".zip,.tar,.safetensors", description="weights.zip from a training, a tar of the same, or a .safetensors LoRA."),
        lora_scale: float = Input(default=1.0, ge=-1, le=3, description="Strength of the LoRA; 0 is the base model."),
        aspect_ratio: str = Input(default="1:1", choices=["1:1", "16:9", "9:16", "4:3", "3:4", "3:2", "2:3"], description="One of the model's official sizes, 1328x1328 for 1:1."),
        width: Optional[int] = Input(default=None, ge=64, le=2048, description="Width in pixels, rounded to 16. Needs height; overrides aspect_ratio."),
        height: Optional[int] = Input(default=None, ge=64, le=2048, description="Height in pixels, rounded to 16. Needs width; overrides aspect_ratio."),
        num_outputs: int = Input(default=1, ge=1, le=4, description="Number of images; image i uses seed + i."),
        seed: Optional[int] = Input(default=None, ge=-1, le=4294967295, description="The same seed gives the same image. Empty or -1: random, and reported."),
        steps: int = Input(default=50, ge=1, le=100, description="Denoising steps."),
        guidance: float = Input(default=4.0, ge=0, le=10, description="Classifier-free guidance. 1 or less turns it off and takes half the time."),
        negative_prompt: str = Input(default=" ", description="What to steer away from; used when guidance is above 1."),
        image: Optional[Path] = Input(default=None, accept="image/*", description="An image to start from or, with a base model that edits, to edit. It gives the aspect ratio where width and height don't."),
        image_2: Optional[Path] = Input(default=None, accept="image/*", description="A second image to edit, which the prompt calls picture 2. Only for a base model that edits several."),
        image_3: Optional[Path] = Input(default=None, accept="image/*", description="A third image to edit, picture 3."),
        mask: Optional[Path] = Input(default=None, accept="image/*", description="What of image is generated again: white. The rest stays. Empty: all of it."),
        strength: float = Input(default=0.7, ge=0, le=1, description="How far to go from image: the share of the steps that are run. 1 starts from noise, 0 changes nothing."),
        go_fast: bool = Input(default=False, description="Faster and lossy: a Lightning LoRA samples without guidance on its own schedule; without one, steps that change little reuse earlier work."),
        megapixels: Optional[float] = Input(default=None, ge=0.05, le=4, description="Area of the image at that aspect ratio. Empty: the official size."),
        control_resolution: str = Input(default="", description="Side in pixels of the square whose area images to edit are scaled to; auto: the area of what is made. Empty: as the LoRA was trained, else 1024."),
        extra_lora: str = Input(default="", description="More LoRAs, one a line or separated by |: a URL, a path, or a hub repository as owner/name or owner/name/file.safetensors. Each may end in a strength of its own, like --scale 0.8."),
        extra_lora_scale: float = Input(default=1.0, ge=-1, le=3, description="Strength of the extra LoRAs that have none of their own."),
        lora_acts: str = Input(default="auto", choices=["auto", "always", "named"], description="Under which texts a LoRA acts, prompt and negative prompt each. always: both. named: those that name what it was taught. auto: named for a LoRA of a person or an object, by its goal or class_word, else always."),
        lightning: str = Input(default="auto", choices=["auto", "yes", "no"], description="Whether a LoRA is a Lightning one, made for 4 or 8 steps. auto: its header, or its ranks and alphas, tell."),
        output_format: str = Input(default="webp", choices=["webp", "jpg", "png"], description="Format of the images."),
        output_quality: int = Input(default=95, ge=1, le=100, description="Quality of webp and jpg."),
        disable_metadata: bool = Input(default=False, description="Leave prompt and settings out of the files."),
        hf_token: Optional[Secret] = Input(default=None, description="Token of the hub, for a private repository. It is neither kept nor logged."),
        # end of inputs
    ) -> list[Path]:  # fmt: skip
        """Sample images."""
        inputs = {name: value for name, value in locals().items() if name != "self"}
        with logged_to_stdout():
            done = self.model.predict(from_inputs(SampleInputs, inputs), client_access())
        for name, value in done.metrics.items():
            self.record_metric(name, value)
        return [Path(path) for path in done.paths]
