"""Lines with settings of their own: `a photo of <zwx> --size 768x512 --seed 5 --negative "blurry"`.

This module owns what a prompt's line may hold, and a LoRA's. It imports the standard library alone.
"""

import re
import shlex

from lora_utils.errors import UserError, shown

# By what a line calls them, the inputs of predict that are set.
SETTINGS = {
    "size": "width",  # and height
    "seed": "seed",
    "guidance": "guidance",
    "steps": "steps",
    "scale": "lora_scale",
    "negative": "negative_prompt",
}
_FIRST_SETTING = re.compile(r"(?:^|\s)--(?=[A-Za-z])")
_SIZE = re.compile(r"(\d{1,5})\s*[xX×]\s*(\d{1,5})")


def split_prompts(text: str) -> list[str]:
    """Return prompts that are separated by lines, or by | outside of quotes. A quote without its other half is none."""
    found: list[str] = []
    for line in text.split("\n"):
        apart = line.split('"')
        if len(apart) % 2 == 0:
            found += line.split("|")
            continue
        bars = [part.replace("|", "\n") if index % 2 == 0 else part for index, part in enumerate(apart)]
        found += '"'.join(bars).split("\n")
    return [prompt.strip() for prompt in found if prompt.strip()]


def split_scale(line: str) -> tuple[str, str | None]:
    """Return a LoRA's source, and the scale that may stand behind it as `--scale 0.8`."""
    source, mark, scale = line.rpartition(" --scale ")
    return (source.strip(), scale.strip()) if mark else (line.strip(), None)


def split_settings(line: str) -> tuple[str, dict[str, str]]:
    """Return a line's prompt, and its settings as texts by the names that predict's inputs have.

    Raises UserError for a setting that there isn't, or one without a value.
    """
    first = _FIRST_SETTING.search(line)
    if first is None:
        return line.strip(), {}
    prompt, rest = line[: first.start()].strip(), line[first.start() :]
    try:
        words = shlex.split(rest)
    except ValueError:
        raise UserError(f"sample_prompts: a quotation mark is missing in {shown(line)!r}; close it.") from None
    found: dict[str, str] = {}
    for name, value in zip(words[::2], [*words[1::2], ""], strict=False):
        setting = name.removeprefix("--")
        if not name.startswith("--") or setting not in SETTINGS or not value or value.startswith("--"):
            raise UserError(
                f"sample_prompts: {shown(name)!r} in {shown(line)!r} is no setting with a value; after the prompt come "
                f"{', '.join(f'--{each}' for each in SETTINGS)}, each with one, like --size 768x512."
            )
        if setting == "size":
            size = _SIZE.fullmatch(value)
            if size is None:
                raise UserError(f"sample_prompts: --size must be WIDTHxHEIGHT like 768x512, got {shown(value)!r}.")
            found |= {"width": size[1], "height": size[2]}
        else:
            found[SETTINGS[setting]] = value
    return prompt, found
