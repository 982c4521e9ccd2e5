"""The zero-prior token's name and id: which names are allowed, and how a text with such tokens becomes ids.

Nothing is written into the tokenizer: a text is split at the tokens, and their ids are put between the pieces.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen2Tokenizer

from lora_utils import constants
from lora_utils.config import check_token_name
from lora_utils.errors import UserError

_BRACKETED = re.compile(r"<\s*[^<>\s][^<>]{0,38}>")


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
    pieces = re.split("(" + "|".join(map(re.escape, ids_by_token)) + ")", text) if ids_by_token else [text]
    ids: list[int] = []
    for piece in filter(None, pieces):
        ids += [ids_by_token[piece]] if piece in ids_by_token else tokenizer(piece).input_ids
    return ids


def near_spellings(text: str, known: Sequence[str]) -> dict[str, str]:
    """Return what in a text is nearly one of the known tokens, but not it: with the token that may be meant.

    Other capitals, spaces within the brackets, and a letter more, less or other are near. Brackets around anything else
    are text like any other, as in an image of the word `<html>`.
    """
    found = {}
    for written in dict.fromkeys(_BRACKETED.findall(text)):
        plain = re.sub(r"\s", "", written).casefold()
        meant = next((token for token in known if _apart(plain, token.casefold()) <= 1), None)
        if meant is not None and written not in known:
            found[written] = meant
    return found


def _apart(one: str, other: str) -> int:
    """Return 0 for equal texts, 1 where one letter more, less or other makes them equal, and 2 for all else."""
    if one == other:
        return 0
    if abs(len(one) - len(other)) > 1:
        return 2
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    rests = {
        (one[same + 1 :], other[same + 1 :]),
        (one[same + 1 :], other[same:]),
        (one[same:], other[same + 1 :]),
    }
    return 1 if any(a == b for a, b in rests) else 2
