"""Contact sheets on the way: what prediction would draw from the weights as they are now.

Owns what is drawn and how a sheet looks. The weights go through the file that would be written, and the pictures
through the sampler and the hooks that prediction uses: a sheet after the last step is what `predict` draws, to within
the rounding of a modulation table.
"""

import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from PIL import Image, ImageDraw, ImageFont

from lora_utils import models, sampling
from lora_utils.adapters import applied, place_lora, without_lora
from lora_utils.captions import preserved_caption, trigger_written_out
from lora_utils.config import RunOptions, SampleRequest, TrainConfig
from lora_utils.disk import refusals_named, whole
from lora_utils.errors import UserError
from lora_utils.lora_file import LoraFile, read_lora_file, write_lora_file
from lora_utils.placeholder import Placeholders, undefined_tokens
from lora_utils.preparation import Run, learned
from lora_utils.sizes import picture_size

FOLDER = "samples"
_LABEL_PX, _MARGIN_PX, _LEAST_SIDE_PX = 14, 8, 256


Row = list[SampleRequest]  # of a sheet: a prompt and, where it holds a token, the same without it, from one seed


def plain_prompt(prompt: str, config: TrainConfig) -> str:
    """The prompt with the class word in the place of its tokens; without any, where there is no class word."""
    if config.class_word:
        return preserved_caption(prompt, config)
    for token in config.tokens:
        prompt = prompt.replace(token, " ")
    return re.sub(r"\s+", " ", prompt).strip(" ,") or " "


def rows_of(config: TrainConfig, options: RunOptions) -> list[Row]:
    """What is to be drawn, as predict's inputs, at the largest of the training's resolutions."""
    side, rows = max(config.resolutions_px), []
    for index, written in enumerate(options.prompts):
        prompt = trigger_written_out(written, config.trigger_word, config.tokens)
        first = SampleRequest(prompt, steps=options.sample_steps, width=side, height=side, seed=config.seed)
        texts = dict.fromkeys([prompt, plain_prompt(prompt, config)])
        rows.append([replace(first, prompt=text, seed=first.seed_of(index)) for text in texts])
    return rows


def check_prompts(rows: Sequence[Row], config: TrainConfig, tokenizer: Any) -> None:
    """Raise UserError for a token that the run doesn't train."""
    for prompt in (row[0].prompt for row in rows):
        if unknown := undefined_tokens(prompt, tokenizer, dict.fromkeys(config.tokens, 0)):
            trained = f"the run trains {', '.join(config.tokens)}" if config.tokens else "the run trains no token"
            raise UserError(f"sample_prompts hold {unknown[0]!r}, and {trained}; correct {prompt!r}.")


def stored(lora: LoraFile) -> LoraFile:
    """What prediction would read of it: written to a file, rounded as that is, and read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora_weights.safetensors"
        write_lora_file(path, lora)
        return read_lora_file(path)


def draw(run: Run, rows: Sequence[Row], model_folder: Path) -> list[list[Image.Image]]:
    """Rows of pictures. Nothing of the run is changed, nor is anything drawn that it draws.

    Raises UserError where there is no room for them beside the run.
    """
    try:
        return _draw(run, rows, model_folder)
    except UserError as error:
        raise UserError(f"{error} That is a sample: lower resolution, or leave sample_prompts empty.") from error
    finally:
        models.release_memory()


def _draw(run: Run, rows: Sequence[Row], model_folder: Path) -> list[list[Image.Image]]:
    lora = place_lora(stored(learned(run)), run.transformer, run.place)
    learned_rows = zip(run.placeholders.tokens, run.placeholders.rows, strict=True)
    placed = tuple(lora.rows[token][0].to(row.device) for token, row in learned_rows)
    placeholders = Placeholders(run.placeholders.tokens, run.placeholders.ids, placed)
    texts = {text for row in rows for request in row for text in (request.prompt, request.negative_prompt)}
    fixed = {text: models.join_text([run.texts[text]]) for text in texts if text in run.texts}
    prompts = sampling.Prompts({text: encoded.on(run.place.device) for text, encoded in fixed.items()})
    components = models.Components(
        run.tokenizer,
        run.schedule,
        cast(Any, run.text_encoder),  # None where no token is trained: then all prompts are encoded already
        models.load_vae(model_folder, run.place),
        run.transformer,
        run.place,
        model_folder,
    )

    def picture(request: SampleRequest) -> Image.Image:
        size = picture_size(request.width, request.height, request.aspect_ratio)
        return sampling.sample(components, request, size, placeholders, lambda *_: None, prompts=prompts)[0].pixels

    with without_lora(run.transformer), applied(run.transformer, [(lora, 1.0)]):
        return [[picture(request) for request in row] for row in rows]


def sheet(rows: Sequence[Row], drawn: Sequence[Sequence[Image.Image]], title: str) -> Image.Image:
    """The pictures under their prompts; small ones are enlarged without smoothing."""
    font = ImageFont.load_default(_LABEL_PX)
    side = drawn[0][0].width * max(1, -(-_LEAST_SIDE_PX // drawn[0][0].width))
    line, columns = _LABEL_PX + 6, max(map(len, drawn))
    cell_width, cell_height = side + _MARGIN_PX, side + line + _MARGIN_PX
    canvas = Image.new("RGB", (columns * cell_width + _MARGIN_PX, len(drawn) * cell_height + line), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((_MARGIN_PX, 2), title, "black", font)
    for index, (row, images) in enumerate(zip(rows, drawn, strict=True)):
        for column, (request, image) in enumerate(zip(row, images, strict=True)):
            left, top = _MARGIN_PX + column * cell_width, line + index * cell_height
            pen.text((left, top), _shortened(request.prompt, pen, font, side), "black", font)
            canvas.paste(image.resize((side, side), Image.Resampling.NEAREST), (left, top + line))
    return canvas


def _shortened(text: str, pen: ImageDraw.ImageDraw, font: Any, width_px: int) -> str:
    """As much of it as fits, the first line alone."""
    if pen.textlength(text, font) <= width_px:
        return text
    count = next((n for n in range(len(text), 0, -1) if pen.textlength(text[:n] + "...", font) <= width_px), 0)
    return text[:count] + "..."


def is_due(rows: Sequence[Row], every: int, step: int, steps: int) -> bool:
    """After `step` of `steps` steps: before the first, after the last, and every so many between."""
    return bool(rows) and (step in (0, steps) or (every > 0 and step % every == 0))


# --- sheets in a run's folder ---------------------------------------------------------------------------------------


def path_of(folder: Path, step: int) -> Path:
    return folder / FOLDER / f"step-{step:06d}.png"


def save(folder: Path, step: int, drawn: Image.Image) -> Path:
    """Whole or not there. Raises UserError for a full disk."""
    path = path_of(folder, step)
    with refusals_named(f"{path} can't be written", "free some room."):
        path.parent.mkdir(exist_ok=True)
        with whole(path) as partial:
            drawn.save(partial, "png")
    return path


def saved(folder: Path) -> list[Path]:
    """A run's sheets, the oldest first."""
    return sorted((folder / FOLDER).glob("step-*.png"))


def forget_after(folder: Path, step: int) -> None:
    """Remove the sheets of later steps: another run's, or of steps that a kill has undone."""
    for path in saved(folder):
        if path.stem > f"step-{step:06d}" or step == 0:
            path.unlink()
