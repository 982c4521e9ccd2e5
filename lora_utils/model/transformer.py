"""The model's parts: loading, placing and freeing them; encoding text, encoding and decoding pictures.

Owns devices and dtypes, and with adapters.py and placeholder.py all use of diffusers, transformers and peft.

Legend: B batch, T text tokens, D the text encoder's width, N image tokens, C packed channels (64).
"""

import gc
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from diffusers.utils.logging import disable_progress_bar
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, Qwen2Tokenizer
from transformers.utils import logging as transformers_logging

from lora_utils import blocks, flops, flow, modulation, qwen, sharding, streaming
from lora_utils.errors import UserError
from lora_utils.placeholder import Placeholders, embedding_matrix, spliced, tokenize
from lora_utils.quantization import Quantizer
from lora_utils.single_frame import decode_frame, encode_frame, fold_temporal_convolutions
from lora_utils.sizes import Size, pack, unpack
from lora_utils.streaming import check_whole, stream_tensors, upload

disable_progress_bar()  # bars of carriage returns are noise in a server's log
transformers_logging.disable_progress_bar()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model runs, and the dtype it computes in."""

    device: torch.device
    dtype: torch.dtype


def default_place() -> Place:
    """This process's GPU, the first where nothing says which, in bf16; else the CPU in fp32."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return Place(device, torch.bfloat16)
    return Place(torch.device("cpu"), torch.float32)


@dataclass(frozen=True, slots=True)
class Text:
    """Encoded prompts: states [B, T, D], zero where padded, and the mask [B, T]; None where nothing is padded."""

    states: Tensor
    mask: Tensor | None

    def on(self, device: torch.device) -> "Text":
        return Text(self.states.to(device), None if self.mask is None else self.mask.to(device))

    def repeated(self, count: int) -> "Text":
        """The same prompts, all of them so many times."""
        if count == 1:
            return self
        return Text(self.states.repeat(count, 1, 1), None if self.mask is None else self.mask.repeat(count, 1))


@dataclass(slots=True)
class Components:
    """A whole model on its place. Made here and passed along."""

    tokenizer: Qwen2Tokenizer
    schedule: flow.Schedule
    text_encoder: Qwen2_5_VLTextModel
    vae: AutoencoderKLQwenImage
    transformer: QwenImageTransformer2DModel
    place: Place
    folder: Path


# --- loading and freeing --------------------------------------------------------------------------------------------


def load_tokenizer(folder: Path) -> Qwen2Tokenizer:
    return Qwen2Tokenizer.from_pretrained(folder / "tokenizer")


def load_schedule(folder: Path) -> flow.Schedule:
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return flow.Schedule(
        base_image_tokens=config["base_image_seq_len"],
        max_image_tokens=config["max_image_seq_len"],
        base_shift=config["base_shift"],
        max_shift=config["max_shift"],
        shift_terminal=config["shift_terminal"],
    )


def _settle(part: nn.Module, place: Place) -> None:
    """Onto the device, frozen."""
    part.to(place.device).eval().requires_grad_(False)


def _language_model_name(stored: str) -> str | None:
    """A weight's name within the language model, from the file's; None for the vision tower's and the head's.

    Files written before transformers 4.52 (the real model's) and after it nest the language model differently.
    """
    if stored == "lm_head.weight" or "visual." in stored:
        return None
    return stored.removeprefix("model.").removeprefix("language_model.")


def load_text_encoder(folder: Path, place: Place) -> Qwen2_5_VLTextModel:
    """The language model alone: vision tower and head do nothing for text, and aren't read."""
    source = folder / "text_encoder"
    config = cast(Qwen2_5_VLTextConfig, Qwen2_5_VLConfig.from_pretrained(source).text_config)
    with init_empty_weights():
        language_model = Qwen2_5_VLTextModel(config)
    streaming.fill(language_model, stream_tensors(source, place.device, place.dtype, _language_model_name), source)
    check_whole(language_model, source)
    _settle(language_model, place)
    return language_model


def load_vae(folder: Path, place: Place) -> AutoencoderKLQwenImage:
    """With its temporal convolutions folded, which is exact for pictures."""
    vae = AutoencoderKLQwenImage.from_pretrained(folder / "vae", torch_dtype=place.dtype)
    _settle(fold_temporal_convolutions(vae), place)
    return vae


_OF_OTHER_MODELS = ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")  # Qwen-Image-Edit's and -Layered's
Stream = Callable[
    [Callable[[str], str | None]], Iterator[tuple[str, Tensor]]
]  # weights, chosen and named by a function


def load_transformer(
    folder: Path, place: Place, timesteps: Tensor | None = None, quantization: str = "none", shards: int = 1
) -> QwenImageTransformer2DModel:
    """For any timestep; or for these alone [S], with a table in place of the modulations where that is smaller.

    `shards`: the processes, of which this is one, that the blocks are shared out over.
    """
    source = folder / "transformer"
    config = cast(dict[str, Any], QwenImageTransformer2DModel.load_config(source))
    if other := [name for name in _OF_OTHER_MODELS if config.get(name)]:
        raise UserError(
            f"{folder} isn't a text-to-image Qwen-Image: its transformer has {other[0]}, as editing and layered models "
            "do. Set BASE_MODEL to Qwen/Qwen-Image or Qwen/Qwen-Image-2512."
        )
    stream = partial(stream_tensors, source, place.device, place.dtype)
    return build_transformer(config, stream, source, place, timesteps, quantization, shards)


def build_transformer(
    config: dict[str, Any], stream: Stream, source: Path, place: Place, timesteps: Tensor | None, quantization: str,
    shards: int = 1,
) -> QwenImageTransformer2DModel:  # fmt: skip
    """From a config and weights on their way to the device; `source` is what errors speak of."""
    with init_empty_weights():
        transformer = cast(QwenImageTransformer2DModel, QwenImageTransformer2DModel.from_config(config))
    fill = partial(streaming.fill, transformer, source=source)
    if quantization != "none":
        fill = partial(fill, store=Quantizer(transformer, quantization, place.device, place.dtype).store)
    if timesteps is not None and not modulation.pays(len(timesteps), transformer.inner_dim):
        timesteps = None
    fill(stream(lambda name: None if sharding.in_a_block(name) else name))
    if timesteps is not None:
        weights = stream(lambda name: name if modulation.is_modulation(name) else None)
        modulation.install_table(transformer, modulation.build_table(transformer, timesteps, weights))
    if shards > 1:
        sharding.shard(transformer, place.device, shards)
        fill = partial(fill, store=partial(sharding.store, transformer))

    def in_a_block(name: str) -> str | None:
        tabled = timesteps is not None and modulation.is_modulation(name)
        return name if sharding.in_a_block(name) and not tabled else None

    fill(stream(in_a_block))
    check_whole(transformer, source)
    blocks.install_forward(transformer)
    _settle(transformer, place)
    return transformer


def load_components(
    folder: Path, place: Place, quantization: str = "none", text_encoder_on_card: bool = True
) -> Components:
    """All of a model, for sampling: where the dtype leaves few enough timesteps, with a table of them all."""
    text_place = place if text_encoder_on_card else replace(place, device=torch.device("cpu"))
    return Components(
        load_tokenizer(folder),
        load_schedule(folder),
        load_text_encoder(folder, text_place),
        load_vae(folder, place),
        load_transformer(folder, place, modulation.sampling_timesteps(place.dtype), quantization),
        place,
        folder,
    )


def restore_modulations(components: Components) -> None:
    """Load the layers that the table stands for: a LoRA is about to adapt them. They stay."""
    source, place = components.folder / "transformer", components.place
    names = stream_tensors(source, place.device, place.dtype, lambda n: n if modulation.is_modulation(n) else None)
    modulation.remove_table(components.transformer, names, source)
    check_whole(components.transformer, source)
    _settle(components.transformer, place)


def release_memory() -> None:
    """Give back what unreferenced parts held. The caller has dropped its references."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def shape_of(transformer: QwenImageTransformer2DModel) -> flops.Shape:
    return flops.Shape(
        len(transformer.transformer_blocks),
        transformer.inner_dim,
        transformer.img_in.in_features,
        transformer.txt_in.in_features,
    )


# --- text -----------------------------------------------------------------------------------------------------------


def prompt_ids(tokenizer: Qwen2Tokenizer, prompt: str, placeholders: Placeholders) -> list[int]:
    """The ids that the text encoder reads: the template around the prompt, cut as the pipeline cuts it."""
    text = qwen.TEMPLATE_PREFIX + prompt + qwen.TEMPLATE_SUFFIX
    return tokenize(tokenizer, text, placeholders.slots)[: qwen.TEMPLATE_PREFIX_TOKENS + qwen.MAX_PROMPT_TOKENS]


def length_warning(tokenizer: Qwen2Tokenizer, prompt: str, placeholders: Placeholders) -> str | None:
    """What to tell of a prompt that is longer than the model reads, or than it saw in training."""
    tokens = len(tokenize(tokenizer, prompt, placeholders.slots))
    if tokens > qwen.MAX_PROMPT_TOKENS:
        return f"{prompt[:60]!r}... has {tokens} tokens; the model reads {qwen.MAX_PROMPT_TOKENS}, the rest is cut off"
    if tokens > qwen.TRAINED_PROMPT_TOKENS:
        return f"{prompt[:60]!r}... has {tokens} tokens; the model was trained on up to {qwen.TRAINED_PROMPT_TOKENS}"
    return None


def encode_states(
    text_encoder: Qwen2_5_VLTextModel, tokenizer: Qwen2Tokenizer, prompts: Sequence[str], placeholders: Placeholders
) -> list[Tensor]:
    """Prompts -> the states [T_i, D] that condition the transformer. The one encode path of training and sampling.

    Shorter prompts are padded on the right, where causal attention keeps the padding from every real token; no mask is
    needed within. Gradients flow to the placeholders' rows if grad mode is on.
    """
    ids = [prompt_ids(tokenizer, prompt, placeholders) for prompt in prompts]
    padded = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long)
    for index, row in enumerate(ids):
        padded[index, : len(row)] = torch.tensor(row)
    with spliced(text_encoder, placeholders):
        padded = upload(padded, embedding_matrix(text_encoder).device)
        states = text_encoder(input_ids=padded, use_cache=False).last_hidden_state  # [B, 34 + T, D]
    return [state[qwen.TEMPLATE_PREFIX_TOKENS : len(row)] for state, row in zip(states, ids, strict=True)]


def encode_text(
    text_encoder: Qwen2_5_VLTextModel, tokenizer: Qwen2Tokenizer, prompts: Sequence[str], placeholders: Placeholders
) -> Text:
    """Prompts as one batch."""
    return join_text(encode_states(text_encoder, tokenizer, prompts, placeholders))


def join_text(states: Sequence[Tensor]) -> Text:
    """States of single prompts [T_i, D] -> one batch, zero-filled; without a mask where all are of one length."""
    lengths = [len(state) for state in states]
    longest = max(lengths)
    padded = torch.stack([F.pad(state, (0, 0, 0, longest - len(state))) for state in states])  # [B, T, D]
    if min(lengths) == longest:
        return Text(padded, None)
    mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    return Text(padded, upload(mask, padded.device))  # [B, T]


def join_texts(*texts: Text) -> Text:
    """Several batches as one, each prompt without its padding before it is padded anew."""
    prompts = []
    for text in texts:
        lengths = [text.states.shape[1]] * len(text.states) if text.mask is None else text.mask.sum(dim=1).tolist()
        prompts += [state[:length] for state, length in zip(text.states, lengths, strict=True)]
    return join_text(prompts)


# --- pictures -------------------------------------------------------------------------------------------------------


def _latent_statistics(vae: AutoencoderKLQwenImage, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std per latent channel [1, 16, 1, 1]."""
    mean, std = (torch.tensor(values).to(like) for values in (vae.config["latents_mean"], vae.config["latents_std"]))
    return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)


@torch.no_grad()
def encode_pictures(vae: AutoencoderKLQwenImage, pixels: Tensor) -> Tensor:
    """[B, 3, H, W] in -1 to 1 -> normalised packed latents [B, N, C] fp32: the mode, not a draw."""
    latents = encode_frame(vae, pixels.to(vae.device, vae.dtype))[0].float()  # [B, 16, H/8, W/8]
    mean, std = _latent_statistics(vae, latents)
    return pack((latents - mean) / std)


@torch.no_grad()
def decode_pictures(vae: AutoencoderKLQwenImage, latents: Tensor, size: Size) -> list[Image.Image]:
    """Normalised packed latents [B, N, C] -> pictures. Raises UserError where they aren't finite."""
    if not torch.isfinite(latents).all():
        raise UserError("the picture came out as NaN or infinity; lower lora_scale or guidance.")
    grid = unpack(latents, size).to(vae.device, vae.dtype)  # [B, 16, H/8, W/8]
    mean, std = _latent_statistics(vae, grid)
    frames = decode_frame(vae, grid * std + mean)  # [B, 3, H, W]
    pixels = ((frames.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def predict_velocity(
    transformer: QwenImageTransformer2DModel, latents: Tensor, sigma: Tensor, text: Text, size: Size
) -> Tensor:
    """One forward: noisy latents [B, N, C] at sigma [B], on the host, under the text -> velocity [B, N, C]."""
    rows, columns = size.grid
    time = flow.model_time(sigma, latents.dtype)
    return transformer(
        hidden_states=latents,
        timestep=time if modulation.has_table(transformer) else upload(time, latents.device),
        encoder_hidden_states=text.states,
        encoder_hidden_states_mask=text.mask,
        img_shapes=[[(1, rows, columns)]] * len(latents),
        return_dict=False,
    )[0]
