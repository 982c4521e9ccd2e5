"""Zero-prior tokens in training: from the captions' check over their fresh rows to what meta.json says of them.

Owns the rows' start, rate and description; must not know the loop.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2_5_VLTextModel, Qwen2Tokenizer

from lora_utils import qwen
from lora_utils.config import TrainConfig
from lora_utils.lora_file import row_sha256
from lora_utils.placeholder import (
    Placeholders,
    RowReport,
    assign_slots,
    check_name,
    embedding_matrix,
    fresh_row,
    no_placeholders,
    report_row,
)

log = logging.getLogger(__name__)

RATE_SHARE = 1 / 30  # the default learning rate as a share of the median row's rms: 5e-4 for Qwen, in 2.5 to 5 %
NEAR_ZERO_STD = 1e-3  # the first RMSNorm amplifies smaller rows; from here on the token has a direction of its own


def new_placeholders(
    config: TrainConfig, tokenizer: Qwen2Tokenizer, text_encoder: Qwen2_5_VLTextModel, generator: torch.Generator
) -> Placeholders:
    """The fresh rows of the run's tokens, trainable unless their rate is 0; none if the feature is off."""
    if not config.tokens:
        return no_placeholders()
    if config.placeholder_init_std > NEAR_ZERO_STD:
        log.warning("placeholder_init_std %g is no longer near zero", config.placeholder_init_std)
    matrix = embedding_matrix(text_encoder)
    slots = assign_slots(config.tokens, tokenizer, matrix.shape[0])
    trained = config.placeholder_learning_rate != 0
    rows = (fresh_row(matrix.shape[1], config.placeholder_init_std, generator) for _ in slots)
    placed = tuple(row.to(matrix.device).requires_grad_(trained) for row in rows)
    return Placeholders(tuple(slots), tuple(slots.values()), placed)


def unplaced(config: TrainConfig, tokenizer: Qwen2Tokenizer) -> Placeholders:
    """The run's tokens with rows still to come: enough to read captions by before any model is loaded."""
    for token in config.tokens:
        check_name(token, tokenizer)
    ids = range(len(tokenizer), len(tokenizer) + len(config.tokens))
    return Placeholders(config.tokens, tuple(ids), tuple(torch.empty(0) for _ in ids))


def missing_tokens(captions: Sequence[str], tokens: Sequence[str]) -> list[str]:
    """What is wrong with captions that could never train one of the tokens."""
    return [
        f"none of the {len(captions)} captions holds the placeholder token {token!r}; the first is {captions[0]!r}. "
        f"Write {token!r} into the captions, or set default_caption to something like 'a photo of {token}'."
        for token in tokens
        if captions and not any(token in caption for caption in captions)
    ]


def median_row_norm(text_encoder: Qwen2_5_VLTextModel, tokenizer: Qwen2Tokenizer) -> float:
    """Of the vocabulary's rows in the embedding matrix."""
    words = embedding_matrix(text_encoder)[: len(tokenizer)]
    return float(words.detach().float().norm(dim=1).median())


def learning_rate(config: TrainConfig, tokenizer: Qwen2Tokenizer, text_encoder: Qwen2_5_VLTextModel) -> float:
    """The rows': the one asked for, else a share of a usual row's rms."""
    if config.placeholder_learning_rate is not None:
        return config.placeholder_learning_rate
    width = embedding_matrix(text_encoder).shape[1]
    rate = RATE_SHARE * median_row_norm(text_encoder, tokenizer) / width**0.5
    log.info("learning rate of %s: %.1e", config.placeholder_token, rate)
    return rate


def report(
    placeholders: Placeholders, tokenizer: Qwen2Tokenizer, text_encoder: Qwen2_5_VLTextModel
) -> dict[str, RowReport]:
    """How each token's row stands among the words now."""
    matrix = embedding_matrix(text_encoder)
    pairs = zip(placeholders.tokens, placeholders.rows, strict=True)
    return {token: report_row(row, matrix, tokenizer) for token, row in pairs}


def describe(
    placeholders: Placeholders,
    first_rows: Sequence[Tensor],
    tokenizer: Qwen2Tokenizer,
    text_encoder: Qwen2_5_VLTextModel,
) -> list[dict[str, Any]]:
    """What meta.json says of each row. `token_id` is informative: ids aren't portable."""
    vocabulary = {
        "median_row_norm": median_row_norm(text_encoder, tokenizer),
        "tokenizer_length": len(tokenizer),
        "embedding_rows": embedding_matrix(text_encoder).shape[0],
    }
    described = []
    for (token, slot), row, first in zip(placeholders.slots.items(), placeholders.rows, first_rows, strict=True):
        saved = row.detach().float().cpu().view(1, -1)
        described.append(
            {
                "token": token,
                "key": qwen.PLACEHOLDER_KEY.format(token=token),
                "token_id": slot,
                "hidden_size": saved.shape[1],
                "dtype": "float32",
                "sha256": row_sha256(saved),
                "first_norm": float(first.norm()),
                "last_norm": float(saved.norm()),
                **vocabulary,
            }
        )
    return described
