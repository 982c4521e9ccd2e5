"""Qwen's real vocabulary, rebuilt without a hub from the byte-pair ranks that the package dashscope ships.

The file holds the tokens by rank but not the merges; a token's merge is the pair that byte-pair encoding by lower
ranks alone would have left of it.
"""

import base64
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files
from itertools import pairwise
from typing import Any, cast

from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from examples.small_model import ADDED_TOKENS


@dataclass(frozen=True)
class Vocabulary:
    """The byte-pair tokens by rank, in the spelling of vocab.json, and the merges that make them, in their order."""

    ranks: dict[str, int]
    merges: list[tuple[str, str]]

    @cached_property
    def ids(self) -> dict[str, int]:
        """The ids of the added tokens, which follow the byte-pair tokens."""
        return {token: len(self.ranks) + index for index, token in enumerate(ADDED_TOKENS)}


def _pair_of(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Merge `token`'s bytes by the ranks below its own until two parts are left."""
    parts = [bytes([byte]) for byte in token]
    own = ranks[token]
    while len(parts) > 2:
        pairs = [(ranks.get(a + b, own), index) for index, (a, b) in enumerate(pairwise(parts))]
        rank, index = min(pairs)
        if rank >= own:
            return []  # no merge of two makes it: it can't arise
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return parts


@lru_cache(maxsize=1)
def qwen_vocabulary() -> Vocabulary:
    """Return the 151 643 byte-pair tokens and their merges. The first call takes some seconds."""
    text = files("dashscope").joinpath("resources/qwen.tiktoken").read_text()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in text.splitlines())}
    letters = bytes_to_unicode()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    pairs = [_pair_of(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    merges = [(spell(pair[0]), spell(pair[1])) for pair in pairs if len(pair) == 2]
    return Vocabulary({spell(token): rank for token, rank in ranks.items()}, merges)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Return the tokenizer: 151 643 byte-pair tokens, then the 22 added ones up to <|file_sep|> = 151664."""
    vocabulary = qwen_vocabulary()
    tokenizer = Qwen2Tokenizer(vocab=vocabulary.ranks, merges=cast(Any, vocabulary.merges))
    tokenizer.add_tokens(list(ADDED_TOKENS), special_tokens=True)
    return tokenizer
