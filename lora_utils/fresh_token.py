"""A zero-prior token in training: from the captions' check over its fresh row to what meta.json says of it.

Owns the row's start, rate and description; must not know the loop.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2_5_VLTextModel, Qwen2Tokenizer

from lora_utils import models, qwen
from lora_utils.config import TrainConfig
from lora_utils.errors import UserError
from lora_utils.lora_file import row_sha256
from lora_utils.placeholder import (
    Placeholders,
    RowReport,
    assign_slots,
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
    """The fresh row of the run's token, trainable unless its rate is 0; no rows if the feature is off."""
    if config.token is None:
        return no_placeholders()
    if config.placeholder_init_std > NEAR_ZERO_STD:
        log.warning("placeholder_init_std %g is no longer near zero", config.placeholder_init_std)
    matrix = embedding_matrix(text_encoder)
    slots = assign_slots([config.token], tokenizer, matrix.shape[0])
    row = fresh_row(matrix.shape[1], config.placeholder_init_std, generator)
    rows = row.unsqueeze(0).to(matrix.device).requires_grad_(config.placeholder_learning_rate != 0)
    return Placeholders(tuple(slots), tuple(slots.values()), rows)


def check_captions(captions: Sequence[str], token: str, tokenizer: Qwen2Tokenizer, placeholders: Placeholders) -> None:
    """Refuse captions that could never train the token; warn where some lack it."""
    without = [caption for caption in captions if token not in caption]
    if len(without) == len(captions):
        raise UserError(
            f"none of the {len(captions)} captions holds the placeholder token {token!r}; the first is {captions[0]!r}."
            f" Write {token!r} into the captions, or set default_caption to something like 'a photo of {token}'."
        )
    if without:
        log.warning("%d of %d captions lack %s, the first is %r", len(without), len(captions), token, without[0])
    for caption in captions:
        if token in caption and placeholders.ids[0] not in models.prompt_ids(tokenizer, caption, placeholders):
            raise UserError(
                f"the model reads {qwen.MAX_PROMPT_TOKENS} tokens, and {token!r} stands behind them in the caption "
                f"{caption[:80]!r}...; put it nearer to the start."
            )


def median_row_norm(text_encoder: Qwen2_5_VLTextModel, tokenizer: Qwen2Tokenizer) -> float:
    """Of the vocabulary's rows in the embedding matrix."""
    words = embedding_matrix(text_encoder)[: len(tokenizer)]
    return float(words.detach().float().norm(dim=1).median())


def learning_rate(config: TrainConfig, tokenizer: Qwen2Tokenizer, text_encoder: Qwen2_5_VLTextModel) -> float:
    """The row's: the one asked for, else a share of a usual row's rms."""
    if config.placeholder_learning_rate is not None:
        return config.placeholder_learning_rate
    width = embedding_matrix(text_encoder).shape[1]
    rate = RATE_SHARE * median_row_norm(text_encoder, tokenizer) / width**0.5
    log.info("learning rate of %s: %.1e", config.token, rate)
    return rate


def report(
    placeholders: Placeholders, tokenizer: Qwen2Tokenizer, text_encoder: Qwen2_5_VLTextModel
) -> dict[str, RowReport]:
    """How each token's row stands among the words now."""
    matrix = embedding_matrix(text_encoder)
    pairs = zip(placeholders.tokens, placeholders.rows, strict=True)
    return {token: report_row(row, matrix, tokenizer) for token, row in pairs}


def describe(
    placeholders: Placeholders, first_rows: Tensor, tokenizer: Qwen2Tokenizer, text_encoder: Qwen2_5_VLTextModel
) -> dict[str, Any]:
    """What meta.json says of a row. `token_id` is informative: ids aren't portable."""
    row = placeholders.rows.detach().float().cpu()[:1]
    return {
        "token": placeholders.tokens[0],
        "key": qwen.PLACEHOLDER_KEY.format(token=placeholders.tokens[0]),
        "token_id": placeholders.ids[0],
        "hidden_size": row.shape[1],
        "dtype": "float32",
        "sha256": row_sha256(row),
        "first_norm": float(first_rows[0].norm()),
        "last_norm": float(row.norm()),
        "median_row_norm": median_row_norm(text_encoder, tokenizer),
        "tokenizer_length": len(tokenizer),
        "embedding_rows": embedding_matrix(text_encoder).shape[0],
    }
