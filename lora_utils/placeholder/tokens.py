"""The zero-prior token's name and id: which names are allowed, and how a text with such tokens becomes ids.

Nothing is written into the tokenizer: a text is split at the tokens, and their ids are put between the pieces.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen2Tokenizer

from lora_utils import constants
from lora_utils.config import PLACEHOLDER_PATTERN, check_token_name
from lora_utils.errors import UserError


@dataclass(frozen=True, slots=True)
class Placeholders:
    """Tokens, their ids and their embeddings [D] fp32, in one order. Without tokens everything here does nothing."""

    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    embeddings: tuple[Tensor, ...]

    @property
    def ids_by_token(self) -> dict[str, int]:
        """The id of each token."""
        return dict(zip(self.tokens, self.ids, strict=True))

    def used_in(self, texts: Iterable[str]) -> "Placeholders":
        """Return those that one of the texts holds. Any other's embedding gets no gradient then, rather than zeros."""
        read = "\n".join(texts)
        kept = [index for index, token in enumerate(self.tokens) if token in read]
        return Placeholders(
            tuple(self.tokens[i] for i in kept),
            tuple(self.ids[i] for i in kept),
            tuple(self.embeddings[i] for i in kept),
        )


def no_placeholders() -> Placeholders:
    """Return no tokens: texts are read as the base model reads them."""
    return Placeholders((), (), ())


def placeholders_without_embeddings(tokens: Sequence[str], tokenizer: Qwen2Tokenizer) -> Placeholders:
    """Return tokens whose embeddings are still to come: enough to read captions before any model is loaded."""
    for token in tokens:
        check_token(token, tokenizer)
    ids = range(len(tokenizer), len(tokenizer) + len(tokens))
    return Placeholders(tuple(tokens), tuple(ids), tuple(torch.empty(0) for _ in ids))


def check_token(token: str, tokenizer: Qwen2Tokenizer) -> None:
    """Refuse a name that the vocabulary holds already, or one that would change how other text is read.

    That `add_tokens` returns 1 proves nothing: it does so for `cat` and for `</s>` too.
    """
    check_token_name(token)
    if token in tokenizer.get_vocab():
        raise UserError(
            f"placeholder token {token!r} is in the text encoder's vocabulary already; choose another name."
        )
    if token in constants.TEMPLATE_PREFIX + constants.TEMPLATE_SUFFIX:
        raise UserError(f"placeholder token {token!r} is part of the prompt template; choose another name.")


def assign_ids(tokens: Sequence[str], tokenizer: Qwen2Tokenizer, embedding_rows: int) -> dict[str, int]:
    """Return the tokens' ids: the free rows of the embedding matrix behind the tokenizer's last, 151665 on for Qwen."""
    free = embedding_rows - len(tokenizer)
    if len(tokens) > free:
        raise UserError(f"{len(tokens)} placeholder tokens don't fit: the embedding matrix has {free} free rows.")
    for token in tokens:
        check_token(token, tokenizer)
    return {token: len(tokenizer) + index for index, token in enumerate(tokens)}


def tokenize(tokenizer: Qwen2Tokenizer, text: str, ids_by_token: Mapping[str, int]) -> list[int]:
    """Return the ids of a text: each placeholder token as one id, the pieces between read by the untouched tokenizer.

    They equal what a tokenizer with the tokens added (all AddedToken flags False) makes of the text.
    """
    for token, token_id in ids_by_token.items():
        if token in text:
            before, after = text.split(token, 1)
            return [*tokenize(tokenizer, before, ids_by_token), token_id, *tokenize(tokenizer, after, ids_by_token)]
    return tokenizer(text).input_ids if text else []


def undefined_tokens(text: str, tokenizer: Qwen2Tokenizer, known: Iterable[str]) -> list[str]:
    """Return what in a prompt looks like a placeholder token, but is none of `known` and no word of the vocabulary."""
    found, defined = dict.fromkeys(PLACEHOLDER_PATTERN.findall(text)), set(known)
    return [token for token in found if token not in defined and token not in tokenizer.get_vocab()]
