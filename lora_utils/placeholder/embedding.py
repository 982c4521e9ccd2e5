"""The zero-prior token's embedding: how it starts, how the text encoder reads it, and what is reported of it.

Nothing is written into the embedding matrix: a hook puts the embedding in where the token's id stands, so removing the
hook is all that unloading takes.

Legend: D the text encoder's width, V the rows of its embedding matrix, B batch, T tokens of the text.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLTextModel, Qwen2Tokenizer

from lora_utils import constants
from lora_utils.config import TrainConfig
from lora_utils.placeholder.tokens import Placeholders, assign_ids, no_placeholders

log = logging.getLogger(__name__)

LEARNING_RATE_SHARE = 1 / 30  # the default rate as a share of the median word's rms: 5e-4 for Qwen, in 2.5 to 5 %
NEAR_ZERO_STD = 1e-3  # the first RMSNorm amplifies smaller embeddings; from here on the token has its own direction


def embedding_matrix(text_encoder: nn.Module) -> Tensor:
    """Return the text encoder's input embeddings [V, D]. V counts the spare rows too, 152064 for Qwen."""
    embeddings = text_encoder.get_submodule("embed_tokens")
    assert isinstance(embeddings, nn.Embedding)
    return embeddings.weight


def initial_embedding(width: int, std: float, generator: torch.Generator) -> Tensor:
    """Return a near-zero embedding [D] fp32: noise of this standard deviation.

    The first layer's RMSNorm (eps 1e-6) bounds its gain at 1000, so below 1e-5 the std makes no difference.
    """
    return torch.randn(width, generator=generator) * std


def new_placeholders(
    config: TrainConfig, tokenizer: Qwen2Tokenizer, text_encoder: Qwen2_5_VLTextModel, generator: torch.Generator
) -> Placeholders:
    """Return the run's tokens with new embeddings, trainable unless their rate is 0; none if the feature is off."""
    if not config.tokens:
        return no_placeholders()
    if config.placeholder_init_std > NEAR_ZERO_STD:
        log.warning("placeholder_init_std %g is no longer near zero", config.placeholder_init_std)
    matrix = embedding_matrix(text_encoder)
    ids = assign_ids(config.tokens, tokenizer, matrix.shape[0])
    trained = config.placeholder_learning_rate != 0
    new = (initial_embedding(matrix.shape[1], config.placeholder_init_std, generator) for _ in ids)
    embeddings = tuple(embedding.to(matrix.device).requires_grad_(trained) for embedding in new)
    return Placeholders(tuple(ids), tuple(ids.values()), embeddings)


def embedding_learning_rate(config: TrainConfig, tokenizer: Qwen2Tokenizer, text_encoder: Qwen2_5_VLTextModel) -> float:
    """Return the embeddings' learning rate: the one asked for, else a share of a usual embedding's rms."""
    if config.placeholder_learning_rate is not None:
        return config.placeholder_learning_rate
    width = embedding_matrix(text_encoder).shape[1]
    rate = LEARNING_RATE_SHARE * median_word_norm(text_encoder, tokenizer) / width**0.5
    log.info("learning rate of %s: %.1e", config.placeholder_token, rate)
    return rate


@contextmanager
def spliced_embeddings(text_encoder: nn.Module, placeholders: Placeholders) -> Iterator[None]:
    """Let the text encoder read the embeddings where the ids stand, within it. Gradients reach them and nothing else.

    The matrix's own rows at these ids are looked up and thrown away, so whatever stands there, NaN even, has no effect.
    """

    def splice(_module: nn.Module, arguments: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        ids = arguments[0]  # [B, T]
        for token_id, embedding in zip(placeholders.ids, placeholders.embeddings, strict=True):
            embedded = torch.where((ids == token_id).unsqueeze(-1), embedding.to(embedded), embedded)  # [B, T, D]
        return embedded

    handle = text_encoder.get_submodule("embed_tokens").register_forward_hook(splice)
    try:
        yield
    finally:
        handle.remove()


# --- what is reported of it -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EmbeddingReport:
    """How an embedding stands among the words: its norm, its share of the median word's, and the nearest word."""

    norm: float
    share_of_median: float
    nearest: str
    cosine: float


def median_word_norm(text_encoder: Qwen2_5_VLTextModel, tokenizer: Qwen2Tokenizer) -> float:
    """Return the median norm of the vocabulary's embeddings."""
    words = embedding_matrix(text_encoder)[: len(tokenizer)]
    return float(words.detach().float().norm(dim=1).median())


def compare_with_words(embedding: Tensor, matrix: Tensor, tokenizer: Qwen2Tokenizer) -> EmbeddingReport:
    """Compare an embedding [D] with the words' rows of the embedding matrix [V, D]."""
    words = matrix[: len(tokenizer)].detach().float()
    own = embedding.detach().float().to(words.device)
    norms = words.norm(dim=1)
    cosines = (words @ own) / (norms * own.norm()).clamp_min(1e-12)
    best = int(cosines.argmax())
    return EmbeddingReport(
        norm=float(own.norm()),
        share_of_median=float(own.norm() / norms.median()),
        nearest=str(tokenizer.decode([best])),
        cosine=float(cosines[best]),
    )


def report_embeddings(
    placeholders: Placeholders, tokenizer: Qwen2Tokenizer, text_encoder: Qwen2_5_VLTextModel
) -> dict[str, EmbeddingReport]:
    """Return how each token's embedding stands among the words now."""
    matrix = embedding_matrix(text_encoder)
    pairs = zip(placeholders.tokens, placeholders.embeddings, strict=True)
    return {token: compare_with_words(embedding, matrix, tokenizer) for token, embedding in pairs}


def embedding_sha256(embedding: Tensor) -> str:
    """Return the SHA-256 of an embedding's fp32 bytes."""
    return hashlib.sha256(embedding.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


def describe_embeddings(
    placeholders: Placeholders, initial: Sequence[Tensor], tokenizer: Qwen2Tokenizer, text_encoder: Qwen2_5_VLTextModel
) -> list[dict[str, Any]]:
    """Return what meta.json says of each embedding. `token_id` is informative: ids aren't portable."""
    # What is the same for all: the words that they stand among.
    vocabulary = {
        "median_row_norm": median_word_norm(text_encoder, tokenizer),
        "tokenizer_length": len(tokenizer),
        "embedding_rows": embedding_matrix(text_encoder).shape[0],
    }

    # Each embedding, as it was at first and as it is saved.
    described = []
    pairs = zip(placeholders.ids_by_token.items(), placeholders.embeddings, initial, strict=True)
    for (token, token_id), embedding, first in pairs:
        saved = embedding.detach().float().cpu().view(1, -1)
        described.append(
            {
                "token": token,
                "key": constants.PLACEHOLDER_KEY.format(token=token),
                "token_id": token_id,
                "hidden_size": saved.shape[1],
                "dtype": "float32",
                "sha256": embedding_sha256(saved),
                "first_norm": float(first.norm()),
                "last_norm": float(saved.norm()),
                **vocabulary,
            }
        )
    return described
