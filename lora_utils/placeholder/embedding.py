"""The zero-prior token's embedding: how it starts, how the text encoder reads it, and what is reported of it.

Nothing is written into the embedding matrix: a hook puts the embedding in where the token's id stands, so removing the
hook is all that unloading takes.

Legend: D the text encoder's width, V the rows of its embedding matrix, B batch, T tokens of the text.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLTextModel, Qwen2Tokenizer

from lora_utils import constants
from lora_utils.config import TrainConfig
from lora_utils.errors import UserError
from lora_utils.placeholder.tokens import Placeholders, assign_ids, no_placeholders

log = logging.getLogger(__name__)

LEARNING_RATE_SHARE = 1 / 30  # the default rate as a share of the median word's rms: 5e-4 for Qwen, in 2.5 to 5 %
_ROWS_AT_ONCE = 4096
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
    new = (initial_embedding(matrix.shape[1], config.placeholder_init_std, generator) for _ in ids)
    embeddings = tuple(embedding.to(matrix.device).requires_grad_(config.learns_tokens) for embedding in new)
    return Placeholders(tuple(ids), tuple(ids.values()), embeddings)


def start_embeddings(placeholders: Placeholders, learned: Mapping[str, Tensor]) -> None:
    """Copy the embeddings [1, D] that some tokens have learned before into theirs. Raises UserError for another D."""
    for token, embedding in zip(placeholders.tokens, placeholders.embeddings, strict=True):
        if token in learned:
            if learned[token].numel() != embedding.numel():
                raise UserError(f"the embedding of {token} in init_weights is of another width than the model's.")
            with torch.no_grad():
                embedding.copy_(learned[token].view(-1))


def embedding_learning_rate(config: TrainConfig, words: "WordEmbeddings") -> float:
    """Return the embeddings' learning rate: the one asked for, else a share of a usual embedding's rms."""
    if config.placeholder_learning_rate is not None:
        return config.placeholder_learning_rate
    rate = LEARNING_RATE_SHARE * words.median_norm / words.matrix.shape[1] ** 0.5
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


@dataclass(frozen=True, slots=True)
class WordEmbeddings:
    """The words that a text encoder knows, and their norms, which never change."""

    matrix: Tensor  # [W, D]: the rows of the embedding matrix that are words of the tokenizer's
    norms: Tensor  # [W] fp32
    median_norm: float
    rows: int  # of the complete matrix


def measure_words(text_encoder: Qwen2_5_VLTextModel, tokenizer: Qwen2Tokenizer) -> WordEmbeddings:
    """Measure the norms of the words, a part of the matrix at a time: in fp32 all of Qwen's would take 2.2 GB."""
    matrix = embedding_matrix(text_encoder).detach()
    words = matrix[: len(tokenizer)]
    norms = torch.cat([part.float().norm(dim=1) for part in words.split(_ROWS_AT_ONCE)])  # [W]
    return WordEmbeddings(words, norms, float(norms.median()), len(matrix))


def compare_with_words(embedding: Tensor, words: WordEmbeddings, tokenizer: Qwen2Tokenizer) -> EmbeddingReport:
    """Compare an embedding [D] with the words. The nearest is found in their dtype; its cosine is exact."""
    own = embedding.detach().float().to(words.norms.device)
    lengths = (words.norms * own.norm()).clamp_min(1e-12)
    best = int(((words.matrix @ own.to(words.matrix.dtype)).float() / lengths).argmax())
    return EmbeddingReport(
        norm=float(own.norm()),
        share_of_median=float(own.norm()) / words.median_norm,
        nearest=str(tokenizer.decode([best])),
        cosine=float(words.matrix[best].float() @ own / lengths[best]),
    )


def report_embeddings(
    placeholders: Placeholders, tokenizer: Qwen2Tokenizer, words: WordEmbeddings
) -> dict[str, EmbeddingReport]:
    """Return how each token's embedding stands among the words now."""
    pairs = zip(placeholders.tokens, placeholders.embeddings, strict=True)
    return {token: compare_with_words(embedding, words, tokenizer) for token, embedding in pairs}


def embedding_sha256(embedding: Tensor) -> str:
    """Return the SHA-256 of an embedding's fp32 bytes."""
    return hashlib.sha256(embedding.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


def describe_embeddings(
    placeholders: Placeholders, initial: Sequence[Tensor], tokenizer: Qwen2Tokenizer, words: WordEmbeddings
) -> list[dict[str, Any]]:
    """Return what meta.json says of each embedding. `token_id` is informative: ids aren't portable."""
    # What is the same for all: the words that they stand among.
    vocabulary = {
        "median_row_norm": words.median_norm,
        "tokenizer_length": len(tokenizer),
        "embedding_rows": words.rows,
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
