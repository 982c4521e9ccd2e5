"""The zero-prior token: a name that no text holds, a row of its own, and nothing of the model changed.

Owns which names are allowed, how a prompt with such tokens becomes ids, the fresh row, and its splicing into the text
encoder's input embeddings. Nothing is written into the tokenizer or the embedding matrix, so removing the hook is all
that unloading takes.

Legend: D the text encoder's width, B batch, T tokens of the text.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import Qwen2Tokenizer

from lora_utils import qwen
from lora_utils.config import PLACEHOLDER_PATTERN
from lora_utils.errors import UserError


@dataclass(frozen=True, slots=True)
class Placeholders:
    """Tokens, their ids and their rows [D] fp32, in one order. No tokens: everything here does nothing."""

    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    rows: tuple[Tensor, ...]

    @property
    def slots(self) -> dict[str, int]:
        return dict(zip(self.tokens, self.ids, strict=True))

    def used_in(self, texts: Iterable[str]) -> "Placeholders":
        """Those that one of the texts holds. The row of any other gets no gradient then, rather than one of zeros."""
        read = "\n".join(texts)
        kept = [index for index, token in enumerate(self.tokens) if token in read]
        return Placeholders(
            tuple(self.tokens[i] for i in kept), tuple(self.ids[i] for i in kept), tuple(self.rows[i] for i in kept)
        )


def no_placeholders() -> Placeholders:
    return Placeholders((), (), ())


def check_name(token: str, tokenizer: Qwen2Tokenizer) -> None:
    """Refuse a name that the vocabulary holds already, or one that would change how other text is read.

    That `add_tokens` returns 1 proves nothing: it does so for `cat` and for `</s>` too.
    """
    if not PLACEHOLDER_PATTERN.fullmatch(token):
        raise UserError(
            f"placeholder token {token!r} must be '<', a letter, up to 30 of letters, digits, '_', '-', '>'."
        )
    if token in tokenizer.get_vocab():
        raise UserError(
            f"placeholder token {token!r} is in the text encoder's vocabulary already; choose another name."
        )
    if token in qwen.TEMPLATE_PREFIX + qwen.TEMPLATE_SUFFIX:
        raise UserError(f"placeholder token {token!r} is part of the prompt template; choose another name.")


def assign_slots(tokens: Sequence[str], tokenizer: Qwen2Tokenizer, embedding_rows: int) -> dict[str, int]:
    """Token -> id: the free rows of the embedding matrix behind the tokenizer's last, 151665 onward for Qwen."""
    free = embedding_rows - len(tokenizer)
    if len(tokens) > free:
        raise UserError(f"{len(tokens)} placeholder tokens don't fit: the embedding matrix has {free} free rows.")
    for token in tokens:
        check_name(token, tokenizer)
    return {token: len(tokenizer) + index for index, token in enumerate(tokens)}


def tokenize(tokenizer: Qwen2Tokenizer, text: str, slots: Mapping[str, int]) -> list[int]:
    """Ids of a text, each placeholder token as one id and the pieces between read by the untouched tokenizer.

    Equal to what a tokenizer with the tokens added (all AddedToken flags False) makes of it.
    """
    for token, slot in slots.items():
        if token in text:
            before, after = text.split(token, 1)
            return [*tokenize(tokenizer, before, slots), slot, *tokenize(tokenizer, after, slots)]
    return tokenizer(text).input_ids if text else []


def fresh_row(width: int, std: float, generator: torch.Generator) -> Tensor:
    """A near-zero row [D] fp32: noise of this standard deviation.

    The first layer's RMSNorm (eps 1e-6) bounds its gain at 1000, so below 1e-5 the std makes no difference.
    """
    return torch.randn(width, generator=generator) * std


def undefined_tokens(text: str, tokenizer: Qwen2Tokenizer, slots: Mapping[str, int]) -> list[str]:
    """What in a prompt looks like a placeholder token but stands for nothing here."""
    found = dict.fromkeys(PLACEHOLDER_PATTERN.findall(text))
    return [token for token in found if token not in slots and token not in tokenizer.get_vocab()]


def embedding_matrix(text_encoder: nn.Module) -> Tensor:
    """The text encoder's input embeddings [V, D]. V counts the spare rows too, 152064 for Qwen."""
    return cast(nn.Embedding, text_encoder.get_submodule("embed_tokens")).weight


@contextmanager
def spliced(text_encoder: nn.Module, placeholders: Placeholders) -> Iterator[None]:
    """Within it, the text encoder reads the rows where the ids stand. Gradients reach the rows and nothing else.

    The matrix's own rows at these ids are looked up and thrown away, so whatever stands there, NaN even, has no effect.
    """

    def put_rows(_module: nn.Module, arguments: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        ids = arguments[0]  # [B, T]
        for slot, row in zip(placeholders.ids, placeholders.rows, strict=True):
            embedded = torch.where((ids == slot).unsqueeze(-1), row.to(embedded), embedded)  # [B, T, D]
        return embedded

    handle = text_encoder.get_submodule("embed_tokens").register_forward_hook(put_rows)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True, slots=True)
class RowReport:
    """How a row stands among the words: its norm, its share of the median word's, and the nearest word."""

    norm: float
    share_of_median: float
    nearest: str
    cosine: float


def report_row(row: Tensor, matrix: Tensor, tokenizer: Qwen2Tokenizer) -> RowReport:
    """Compare a row [D] with the words' rows of the embedding matrix [V, D]."""
    words = matrix[: len(tokenizer)].detach().float()
    own = row.detach().float().to(words.device)
    norms = words.norm(dim=1)
    cosines = (words @ own) / (norms * own.norm()).clamp_min(1e-12)
    best = int(cosines.argmax())
    return RowReport(
        norm=float(own.norm()),
        share_of_median=float(own.norm() / norms.median()),
        nearest=str(tokenizer.decode([best])),
        cosine=float(cosines[best]),
    )
