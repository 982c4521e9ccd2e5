"""What captions say: their triggers and classes, which of several is shown, and what is wrong with them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import Qwen2Tokenizer

from lora_utils import constants
from lora_utils.config import TrainConfig
from lora_utils.errors import UserError
from lora_utils.placeholder.tokens import placeholders_without_embeddings, tokenize
from lora_utils.triggers import expand_trigger, holds, replace_words

_SIDES = re.compile(r"\b(left|right|leftmost|rightmost|gauche|droite|izquierda|derecha|rechts)\b|左|右", re.IGNORECASE)


def names_a_side(caption: str) -> bool:
    """Return whether a caption speaks of left or right, which a mirrored image turns round."""
    return _SIDES.search(caption) is not None


def with_trigger(caption: str, trigger_word: str, tokens: Sequence[str]) -> str:
    """Return the caption with `[trigger]` replaced, and with the trigger word in front where it lacks it."""
    caption = expand_trigger(caption, trigger_word, tokens)
    if trigger_word and not holds(caption, trigger_word):
        return f"{trigger_word}, {caption}" if caption else trigger_word
    return caption


def taught_caption(text: str, prefix: str, config: TrainConfig) -> str:
    """Return the caption of an image that teaches: each line, where lines are captions, with prefix and trigger."""
    choices = caption_choices(text, config)
    return "\n".join(with_trigger(prefix + each, config.trigger_word, config.tokens) for each in choices)


def regularisation_caption(caption: str, class_of_folder: str, config: TrainConfig) -> str:
    """Return the caption of a regularisation image: its own, what its folder is called, or the class word's.

    It is empty where there is none of them. Raises UserError for one that names what is taught.
    """
    of_class = prior_caption(config.default_caption, config) or config.class_word if config.class_word else ""
    found = caption or class_of_folder or of_class
    if any(holds(found, trigger) for trigger in config.triggers):
        raise UserError(f"the caption of a regularisation image names what is taught: {found[:60]!r}; name the class.")
    return found


def prior_caption(caption: str, config: TrainConfig) -> str:
    """Return the caption with the class word in place of what is taught; as it is where it names nothing of it."""
    return replace_words(caption, config.triggers, config.class_word) if config.class_word else caption


def caption_choices(caption: str, config: TrainConfig) -> list[str]:
    """Return the captions that an image may be shown under, before tags are shuffled: one, or its lines."""
    lines = [line.strip() for line in caption.splitlines() if line.strip()] if config.caption_variants else []
    return lines or [caption]


def shown_caption(caption: str, config: TrainConfig, generator: torch.Generator) -> str:
    """Return the caption that an image is shown under this time: one of its lines, its tags shuffled, as asked for."""
    choices = caption_choices(caption, config)
    chosen = choices[int(torch.randint(len(choices), (1,), generator=generator))] if len(choices) > 1 else choices[0]
    if config.caption_shuffle is None:
        return chosen
    tags = [tag.strip() for tag in chosen.split(",")]
    kept, moved = tags[: config.caption_shuffle], tags[config.caption_shuffle :]
    order = torch.randperm(len(moved), generator=generator).tolist()
    return ", ".join([*kept, *(moved[index] for index in order)])


def count_tokens(captions: Iterable[str], tokens: Sequence[str], tokenizer: Qwen2Tokenizer) -> dict[str, int]:
    """Return the number of tokens of each different caption; a placeholder token is one.

    Raises UserError for a placeholder token that the tokenizer can't take.
    """
    ids = placeholders_without_embeddings(tokens, tokenizer).ids_by_token
    return {caption: len(tokenize(tokenizer, caption, ids)) for caption in dict.fromkeys(captions)}


def caption_problems(captions: Mapping[Path, str], counts: Mapping[str, int]) -> list[str]:
    """Say which captions the model can't read to their end, by their images and numbers of tokens."""
    most = constants.MAX_PROMPT_TOKENS
    return [
        f"the caption of {path.name} has {counts[caption]} tokens, and the model reads {most}: {caption[:60]!r}...; "
        "shorten it."
        for path, caption in captions.items()
        if counts[caption] > most
    ]


def missing_tokens(captions: Sequence[str], tokens: Sequence[str]) -> list[str]:
    """Say which of the tokens these captions could never train."""
    return [
        f"none of the {len(captions)} captions holds the placeholder token {token!r}; the first is {captions[0]!r}. "
        f"Write {token!r} into the captions, or set default_caption to something like 'a photo of {token}'."
        for token in tokens
        if captions and not any(token in caption for caption in captions)
    ]
