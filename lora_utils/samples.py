"""Contact sheets on the way: what prediction would draw from the weights as they are now.

Owns what is drawn and how a sheet looks. The weights go through the file that would be written, and the pictures
through the sampler and the hooks that prediction uses: a sheet after the last step is what `predict` draws, to within
the rounding of a modulation table.
"""

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image, ImageDraw, ImageFont

from lora_utils import models, sampling
from lora_utils.adapters import applied, place_lora, without_lora
from lora_utils.captions import preserved_caption, trigger_written_out
from lora_utils.config import RunOptions, SampleRequest, TrainConfig
from lora_utils.errors import UserError
from lora_utils.lora_file import LoraFile, read_lora_file, write_lora_file
from lora_utils.placeholder import Placeholders, undefined_tokens
from lora_utils.preparation import Run, learned
from lora_utils.sizes import picture_size

FOLDER = "samples"
_LABEL_PX, _MARGIN_PX, _LEAST_SIDE_PX = 14, 8, 256


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt, and the same without the tokens where it holds some: both are drawn from one seed."""

    named: SampleRequest
    plain: SampleRequest | None


def plain_prompt(prompt: str, config: TrainConfig) -> str:
    """The prompt with the class word in the place of its tokens; without any, where there is no class word."""
    if config.class_word:
        return preserved_caption(prompt, config)
    for token in config.tokens:
        prompt = prompt.replace(token, " ")
    return re.sub(r"\s+", " ", prompt).strip(" ,") or " "


def pairs_of(config: TrainConfig, options: RunOptions) -> list[Pair]:
    """What is to be drawn, as predict's inputs, at the largest of the training's resolutions."""
    side, pairs = max(config.resolutions_px), []
    for index, written in enumerate(options.prompts):
        prompt = trigger_written_out(written, config.trigger_word, config.tokens)
        seeds = SampleRequest(prompt, seed=config.seed).seed_of(index)
        drawn = [
            SampleRequest(text, steps=options.sample_steps, width=side, height=side, seed=seeds)
            for text in dict.fromkeys([prompt, plain_prompt(prompt, config)])
        ]
        named, plain = drawn[0], drawn[1] if len(drawn) > 1 else None
        pairs.append(Pair(named, plain))
    return pairs


def requests_of(pairs: Sequence[Pair]) -> list[SampleRequest]:
    return [request for pair in pairs for request in (pair.named, pair.plain) if request]


def check_prompts(pairs: Sequence[Pair], config: TrainConfig, tokenizer: Any) -> None:
    """Raise UserError for a token that the run doesn't train."""
    for pair in pairs:
        if unknown := undefined_tokens(pair.named.prompt, tokenizer, dict.fromkeys(config.tokens, 0)):
            trained = f"the run trains {', '.join(config.tokens)}" if config.tokens else "the run trains no token"
            raise UserError(f"sample_prompts hold {unknown[0]!r}, and {trained}; correct {pair.named.prompt!r}.")


def stored(lora: LoraFile) -> LoraFile:
    """What prediction would read of it: written to a file, rounded as that is, and read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora_weights.safetensors"
        write_lora_file(path, lora)
        return read_lora_file(path)


def draw(run: Run, pairs: Sequence[Pair], model_folder: Path) -> list[list[Image.Image]]:
    """A row of pictures for each pair. Nothing of the run is changed, nor is anything drawn that it draws.

    Raises UserError where there is no room for them beside the run.
    """
    lora = place_lora(stored(learned(run)), run.transformer, run.place)
    rows = tuple(lora.rows[token][0].to(row.device) for token, row in _rows(run))
    placeholders = Placeholders(run.placeholders.tokens, run.placeholders.ids, rows)
    prompts = sampling.Prompts(
        {text: models.join_text([states]).on(run.place.device) for text, states in _texts(run, pairs).items()}
    )
    components = models.Components(
        run.tokenizer,
        run.schedule,
        cast(Any, run.text_encoder),  # None where no token is trained: then all prompts are encoded already
        models.load_vae(model_folder, run.place),
        run.transformer,
        run.place,
        model_folder,
    )
    drawn = []
    with without_lora(run.transformer), applied(run.transformer, [(lora, 1.0)]):
        for pair in pairs:
            row = []
            for request in requests_of([pair]):
                size = picture_size(request.width, request.height, request.aspect_ratio)
                images = sampling.sample(components, request, size, placeholders, lambda *_: None, prompts=prompts)
                row.append(images[0].pixels)
            drawn.append(row)
    del components
    models.release_memory()
    return drawn


def _rows(run: Run) -> list[tuple[str, torch.Tensor]]:
    return list(zip(run.placeholders.tokens, run.placeholders.rows, strict=True))


def _texts(run: Run, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
    """The states of the prompts that hold no token."""
    texts = {text for request in requests_of(pairs) for text in (request.prompt, request.negative_prompt)}
    return {text: run.texts[text] for text in texts if text in run.texts}


def sheet(pairs: Sequence[Pair], drawn: Sequence[Sequence[Image.Image]], title: str) -> Image.Image:
    """The pictures, a row for each pair, under their prompts; small ones are enlarged without smoothing."""
    font = ImageFont.load_default(_LABEL_PX)
    side = drawn[0][0].width * max(1, -(-_LEAST_SIDE_PX // drawn[0][0].width))
    line, columns = _LABEL_PX + 6, max(map(len, drawn))
    cell_width, cell_height = side + _MARGIN_PX, side + line + _MARGIN_PX
    canvas = Image.new("RGB", (columns * cell_width + _MARGIN_PX, len(drawn) * cell_height + line), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((_MARGIN_PX, 2), title, "black", font)
    for row, (pair, images) in enumerate(zip(pairs, drawn, strict=True)):
        for column, (request, image) in enumerate(zip(requests_of([pair]), images, strict=True)):
            left, top = _MARGIN_PX + column * cell_width, line + row * cell_height
            pen.text((left, top), _shortened(request.prompt, pen, font, side), "black", font)
            canvas.paste(image.resize((side, side), Image.Resampling.NEAREST), (left, top + line))
    return canvas


def _shortened(text: str, pen: ImageDraw.ImageDraw, font: Any, width_px: int) -> str:
    """As much of it as fits, the first line alone."""
    if pen.textlength(text, font) <= width_px:
        return text
    count = next((n for n in range(len(text), 0, -1) if pen.textlength(text[:n] + "...", font) <= width_px), 0)
    return text[:count] + "..."


def is_due(pairs: Sequence[Pair], every: int, step: int, steps: int) -> bool:
    """After `step` of `steps` steps: before the first, after the last, and every so many between."""
    return bool(pairs) and (step in (0, steps) or (every > 0 and step % every == 0))


# --- sheets in a run's folder ---------------------------------------------------------------------------------------


def path_of(folder: Path, step: int) -> Path:
    return folder / FOLDER / f"step-{step:06d}.png"


def save(folder: Path, step: int, drawn: Image.Image) -> Path:
    """Whole or not there."""
    path = path_of(folder, step)
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    drawn.save(partial, "png")
    partial.replace(path)
    return path


def saved(folder: Path) -> list[Path]:
    """A run's sheets, the oldest first."""
    return sorted((folder / FOLDER).glob("step-*.png"))


def forget_after(folder: Path, step: int) -> None:
    """Remove the sheets of later steps: another run's, or of steps that a kill has undone."""
    for path in saved(folder):
        if path.stem > f"step-{step:06d}" or step == 0:
            path.unlink()
