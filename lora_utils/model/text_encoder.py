"""Text: the language model that reads prompts, and prompts -> the embeddings that condition the transformer.

There is one encode path for training and sampling.

Legend: B batch, T text tokens, D the text encoder's width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, Qwen2Tokenizer

from lora_utils import constants
from lora_utils.errors import UserError
from lora_utils.model.device import Placement, freeze_on_device, to_device
from lora_utils.model.loading import check_complete, empty_weights, fill_parameters, stream_tensors
from lora_utils.model.variant import TEXT_TO_IMAGE, Variant
from lora_utils.model.vision import VisionFeatures, positions
from lora_utils.placeholder.embedding import embedding_matrix, spliced_embeddings
from lora_utils.placeholder.tokens import Placeholders, tokenize


@dataclass(frozen=True, slots=True)
class TextEmbeddings:
    """Encoded prompts: states [B, T, D], zero where padded, and the mask [B, T]; None where nothing is padded."""

    states: Tensor
    mask: Tensor | None

    def on(self, device: torch.device) -> "TextEmbeddings":
        """Return the same on another device."""
        return TextEmbeddings(self.states.to(device), None if self.mask is None else self.mask.to(device))

    def rows(self, chosen: Sequence[int]) -> "TextEmbeddings":
        """Return some of the prompts."""
        index = list(chosen)
        return TextEmbeddings(self.states[index], None if self.mask is None else self.mask[index])

    def repeated(self, count: int) -> "TextEmbeddings":
        """Return the same prompts, all of them so many times."""
        if count == 1:
            return self
        mask = None if self.mask is None else self.mask.repeat(count, 1)
        return TextEmbeddings(self.states.repeat(count, 1, 1), mask)


# --- loading --------------------------------------------------------------------------------------------------------


def load_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """Load the tokenizer of a model folder."""
    return Qwen2Tokenizer.from_pretrained(folder / "tokenizer")


def read_text_config(folder: Path) -> Qwen2_5_VLTextConfig:
    """Read the language model's config of a model folder."""
    config = Qwen2_5_VLConfig.from_pretrained(folder / "text_encoder").text_config
    assert isinstance(config, Qwen2_5_VLTextConfig)
    return config


def load_text_encoder(folder: Path, placement: Placement) -> Qwen2_5_VLTextModel:
    """Load the language model alone: the vision tower and the head do nothing for text, and aren't read."""
    source = folder / "text_encoder"
    with empty_weights():
        language_model = Qwen2_5_VLTextModel(read_text_config(folder))
    weights = stream_tensors(source, placement.device, placement.dtype, _language_model_name)
    fill_parameters(language_model, weights, source)
    check_complete(language_model, source)
    freeze_on_device(language_model, placement)
    return language_model


def _language_model_name(stored: str) -> str | None:
    """Return a weight's name within the language model; None for the vision tower's and the head's.

    Files written before transformers 4.52 (the real model's) and after it nest the language model differently.
    """
    if stored == "lm_head.weight" or "visual." in stored:
        return None
    return stored.removeprefix("model.").removeprefix("language_model.")


# --- encoding -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text and, for an editing model, what the text encoder sees of the images that it speaks of."""

    text: str
    images: tuple[VisionFeatures, ...] = ()


def as_prompt(prompt: str | Prompt) -> Prompt:
    """Return a prompt without images of a text, or the prompt that it is."""
    return Prompt(prompt) if isinstance(prompt, str) else prompt


def prompt_ids(
    tokenizer: Qwen2Tokenizer, prompt: str | Prompt, placeholders: Placeholders, variant: Variant = TEXT_TO_IMAGE
) -> list[int]:
    """Return the ids that the text encoder reads: the template around the prompt, with a mark for each image feature.

    A longer prompt is cut, as diffusers' text-to-image pipeline does; its images count for nothing there. Raises
    UserError for a text that holds the marks of images itself.
    """
    prompt = as_prompt(prompt)
    ids = tokenize(tokenizer, variant.prompt(prompt.text, len(prompt.images)), placeholders.ids_by_token)
    if variant.edits:
        ids = _with_features(ids, image_id(tokenizer), prompt)
    seen = sum(image.rows * image.columns for image in prompt.images)
    return ids[: variant.prefix_tokens + seen + constants.MAX_PROMPT_TOKENS]


def _with_features(ids: list[int], mark: int, prompt: Prompt) -> list[int]:
    """Return ids with each image's mark repeated for every feature of it."""
    if ids.count(mark) != len(prompt.images):
        raise UserError(
            f"the prompt {prompt.text[:60]!r} holds {constants.IMAGE_PAD}, which marks images for the model; leave it "
            "out: the images are put in front of the prompt."
        )
    images, marked = iter(prompt.images), list[int]()
    for token in ids:
        image = next(images) if token == mark else None
        marked += [token] if image is None else [token] * (image.rows * image.columns)
    return marked


def image_id(tokenizer: Qwen2Tokenizer) -> int:
    """Return the id of the token that stands for an image's feature."""
    return cast(int, tokenizer.convert_tokens_to_ids(constants.IMAGE_PAD))


def length_warning(tokenizer: Qwen2Tokenizer, prompt: str, placeholders: Placeholders) -> str | None:
    """Say that a prompt is longer than the model reads, or than it saw in training; None for one that isn't."""
    tokens = len(tokenize(tokenizer, prompt, placeholders.ids_by_token))
    begins = f"{prompt[:60]!r}... has {tokens} tokens"
    if tokens > constants.MAX_PROMPT_TOKENS:
        return f"{begins}; the model reads {constants.MAX_PROMPT_TOKENS}, the rest is cut off"
    if tokens > constants.TRAINED_PROMPT_TOKENS:
        return f"{begins}; the model was trained on up to {constants.TRAINED_PROMPT_TOKENS}"
    return None


def encode_prompts(
    text_encoder: Qwen2_5_VLTextModel,
    tokenizer: Qwen2Tokenizer,
    prompts: Sequence[str | Prompt],
    placeholders: Placeholders,
    variant: Variant = TEXT_TO_IMAGE,
) -> list[Tensor]:
    """Encode prompts as the states [T_i, D] that condition the transformer, those of the template's prefix left out.

    Shorter prompts are padded on the right, where causal attention keeps the padding from every real token; no mask is
    needed within. Gradients flow to the placeholders' embeddings, and to the images' features, if grad mode is on.
    """
    given = [as_prompt(prompt) for prompt in prompts]
    ids = [prompt_ids(tokenizer, prompt, placeholders, variant) for prompt in given]
    padded = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long)
    for index, own in enumerate(ids):
        padded[index, : len(own)] = torch.tensor(own)
    device = embedding_matrix(text_encoder).device
    padded = to_device(padded, device)
    with spliced_embeddings(text_encoder, placeholders):
        if any(prompt.images for prompt in given):
            states = _states_with_images(text_encoder, given, ids, padded, image_id(tokenizer))
        else:
            states = text_encoder(input_ids=padded, use_cache=False).last_hidden_state
    dropped = variant.prefix_tokens  # of states [B, prefix + T, D]
    return [state[dropped : len(own)] for state, own in zip(states, ids, strict=True)]


def _states_with_images(
    text_encoder: Qwen2_5_VLTextModel, prompts: Sequence[Prompt], ids: list[list[int]], padded: Tensor, mark: int
) -> Tensor:
    """Return the states [B, T, D] of prompts with images: their features in the marks' place, at their positions."""
    embedded = text_encoder.get_submodule("embed_tokens")(padded)  # [B, T, D], the placeholders' in place
    seen = [image.states for prompt in prompts for image in prompt.images]
    embedded = embedded.masked_scatter((padded == mark).unsqueeze(-1), torch.cat(seen).to(embedded))
    places = torch.zeros(3, *padded.shape, dtype=torch.long)
    for index, (own, prompt) in enumerate(zip(ids, prompts, strict=True)):
        places[:, index, : len(own)] = positions(own, mark, prompt.images)
    places = to_device(places, padded.device)
    return text_encoder(inputs_embeds=embedded, position_ids=places, use_cache=False).last_hidden_state


def encode_text(
    text_encoder: Qwen2_5_VLTextModel,
    tokenizer: Qwen2Tokenizer,
    prompts: Sequence[str | Prompt],
    placeholders: Placeholders,
    variant: Variant = TEXT_TO_IMAGE,
) -> TextEmbeddings:
    """Encode prompts as one batch."""
    return pad_embeddings(encode_prompts(text_encoder, tokenizer, prompts, placeholders, variant))


def pad_embeddings(states: Sequence[Tensor]) -> TextEmbeddings:
    """Make one batch of single prompts' states [T_i, D], zero-filled; without a mask where all have one length."""
    lengths = [len(state) for state in states]
    longest = max(lengths)
    padded = torch.stack([F.pad(state, (0, 0, 0, longest - len(state))) for state in states])  # [B, T, D]
    if min(lengths) == longest:
        return TextEmbeddings(padded, None)
    mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    return TextEmbeddings(padded, to_device(mask, padded.device))  # [B, T]


def concatenate_embeddings(*texts: TextEmbeddings) -> TextEmbeddings:
    """Make one batch of several, each prompt without its padding before it is padded again."""
    prompts = []
    for text in texts:
        lengths = [text.states.shape[1]] * len(text.states) if text.mask is None else text.mask.sum(dim=1).tolist()
        prompts += [state[:length] for state, length in zip(text.states, lengths, strict=True)]
    return pad_embeddings(prompts)
