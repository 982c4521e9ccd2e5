"""All of the model: the one mutable holder of its parts, made here and passed along."""

import json
from dataclasses import dataclass
from pathlib import Path

from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from transformers import Qwen2_5_VLTextModel, Qwen2Tokenizer

from lora_utils.io.tensor_store import content_key, folder_fingerprint
from lora_utils.model import flow, modulation
from lora_utils.model.device import Placement
from lora_utils.model.text_encoder import load_text_encoder, load_tokenizer
from lora_utils.model.transformer import Storage, load_transformer
from lora_utils.model.vae import load_vae
from lora_utils.model.variant import TEXT_TO_IMAGE, Variant, read_variant
from lora_utils.model.vision import Vision, load_vision


@dataclass(slots=True)
class Components:
    """A model's parts and where they are. A training frees the text encoder and the VAE once they have no more to do.

    `load_components` and `training.setup` make it. `lora.weights` may put the modulations in the place of their table.
    """

    tokenizer: Qwen2Tokenizer
    schedule: flow.Schedule
    text_encoder: Qwen2_5_VLTextModel | None
    vae: AutoencoderKLQwenImage | None
    transformer: QwenImageTransformer2DModel
    placement: Placement
    folder: Path
    variant: Variant = TEXT_TO_IMAGE
    vision: Vision | None = None  # of an editing model

    def need_vision(self) -> Vision:
        """Return the vision tower. Raises RuntimeError where it was freed, or where the model has no use for it."""
        if self.vision is None:
            raise RuntimeError("an image is to be shown to the text encoder, and the vision tower isn't loaded")
        return self.vision

    def need_text_encoder(self) -> Qwen2_5_VLTextModel:
        """Return the text encoder. Raises RuntimeError where it was freed."""
        if self.text_encoder is None:
            raise RuntimeError("a text is to be encoded, and the text encoder was freed")
        return self.text_encoder

    def need_vae(self) -> AutoencoderKLQwenImage:
        """Return the VAE. Raises RuntimeError where it was freed."""
        if self.vae is None:
            raise RuntimeError("an image is to be encoded or decoded, and the VAE was freed")
        return self.vae


def load_schedule(folder: Path) -> flow.Schedule:
    """Read the noise schedule of a model folder."""
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return flow.Schedule(
        base_image_tokens=config["base_image_seq_len"],
        max_image_tokens=config["max_image_seq_len"],
        base_shift=config["base_shift"],
        max_shift=config["max_shift"],
        shift_terminal=config["shift_terminal"],
    )


def model_key(folder: Path) -> str:
    """Return a key of a model folder's files, so that a checkpoint can tell another base model from its own."""
    return content_key(**{part: folder_fingerprint(folder / part) for part in ("transformer", "text_encoder", "vae")})


def load_components(
    folder: Path, placement: Placement, quantization: str = "none", text_encoder_on_device: bool = True
) -> Components:
    """Load all of a model for sampling, with a table of the modulations where the dtype leaves few enough timesteps."""
    storage, variant = Storage(quantization, modulation.sampling_timesteps(placement.dtype)), read_variant(folder)
    reading = placement if text_encoder_on_device else placement.on_cpu()
    return Components(
        load_tokenizer(folder),
        load_schedule(folder),
        load_text_encoder(folder, reading),
        load_vae(folder, placement),
        load_transformer(folder, placement, storage),
        placement,
        folder,
        variant,
        load_vision(folder, reading) if variant.edits else None,
    )
