"""Text: the language model that reads prompts, and prompts -> the embeddings that condition the transformer.

There is one encode path for training and sampling.

Legend: B batch, T text tokens, D the text encoder's width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, Qwen2Tokenizer

from lora_utils import constants
from lora_utils.model.device import Placement, freeze_on_device, to_device
from lora_utils.model.loading import check_complete, empty_weights, fill_parameters, stream_tensors
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


def prompt_ids(tokenizer: Qwen2Tokenizer, prompt: str, placeholders: Placeholders) -> list[int]:
    """Return the ids that the text encoder reads: the template around the prompt, cut as diffusers' pipeline does."""
    text = constants.TEMPLATE_PREFIX + prompt + constants.TEMPLATE_SUFFIX
    longest = constants.TEMPLATE_PREFIX_TOKENS + constants.MAX_PROMPT_TOKENS
    return tokenize(tokenizer, text, placeholders.ids_by_token)[:longest]


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
    text_encoder: Qwen2_5_VLTextModel, tokenizer: Qwen2Tokenizer, prompts: Sequence[str], placeholders: Placeholders
) -> list[Tensor]:
    """Encode prompts as the states [T_i, D] that condition the transformer.

    Shorter prompts are padded on the right, where causal attention keeps the padding from every real token; no mask is
    needed within. Gradients flow to the placeholders' embeddings if grad mode is on.
    """
    ids = [prompt_ids(tokenizer, prompt, placeholders) for prompt in prompts]
    padded = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long)
    for index, own in enumerate(ids):
        padded[index, : len(own)] = torch.tensor(own)
    with spliced_embeddings(text_encoder, placeholders):
        padded = to_device(padded, embedding_matrix(text_encoder).device)
        states = text_encoder(input_ids=padded, use_cache=False).last_hidden_state  # [B, 34 + T, D]
    return [state[constants.TEMPLATE_PREFIX_TOKENS : len(own)] for state, own in zip(states, ids, strict=True)]


def encode_text(
    text_encoder: Qwen2_5_VLTextModel, tokenizer: Qwen2Tokenizer, prompts: Sequence[str], placeholders: Placeholders
) -> TextEmbeddings:
    """Encode prompts as one batch."""
    return pad_embeddings(encode_prompts(text_encoder, tokenizer, prompts, placeholders))


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
