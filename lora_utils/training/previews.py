"""Previews: images sampled during training, as prediction would sample them from the weights as they are now.

The weights go through the file that would be written, and the images through the sampler and the hooks that prediction
uses: a preview after the last step is what `predict` returns, to within the rounding of a modulation table.
"""

import logging
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageOps

from lora_utils.config import RunOptions, SampleRequest, TrainConfig, preview_request
from lora_utils.dataset.caption_texts import caption_choices, prior_caption
from lora_utils.dataset.examples import Dataset
from lora_utils.errors import UserError
from lora_utils.lora.adapter import without_lora
from lora_utils.lora.formats import LoraFile, read_lora_file, write_lora_file
from lora_utils.lora.hooks import AppliedLoras, applied_loras, move_lora
from lora_utils.model.controls import Controls, no_controls, text_key
from lora_utils.model.device import release_memory
from lora_utils.model.latents import Size, image_size
from lora_utils.model.text_encoder import pad_embeddings
from lora_utils.model.vae import load_vae
from lora_utils.placeholder.tokens import Placeholders, near_spellings, no_placeholders
from lora_utils.sampling import sampler
from lora_utils.sampling.acting import Taught
from lora_utils.sampling.sampler import LorasByText, PromptCache, SamplingJob
from lora_utils.training.state import TrainState, current_lora
from lora_utils.triggers import expand_trigger

log = logging.getLogger(__name__)

PreviewRow = list[SampleRequest]  # a prompt and, where it holds a token, the same without it, from one seed


def preview_rows(config: TrainConfig, options: RunOptions) -> list[PreviewRow]:
    """Return what is to be sampled, as predict's inputs: at the largest of the training's resolutions by default."""
    side, rows = max(config.resolutions_px), []
    usual = SampleRequest("", steps=options.sample_steps, width=side, height=side, seed=config.seed)
    for index, line in enumerate(options.prompts):
        first = preview_request(line, replace(usual, seed=usual.seed_of(index)))
        prompt = expand_trigger(first.prompt, config.trigger_word, config.tokens)
        texts = dict.fromkeys([prompt, plain_prompt(prompt, config)])
        rows.append([replace(first, prompt=text) for text in texts])
    return rows


@dataclass(frozen=True, slots=True)
class PreviewPair:
    """What a preview of an editing model is shown beside: the images to edit, and the target that they should become.

    Row i has the i-th image held out, or learned where none is; they take turns.
    """

    before: tuple[Image.Image, ...]
    target: Image.Image
    caption: str
    size: Size


PAIR_CAPTION = "[caption]"  # in sample_prompts: the pair's own


def preview_pairs(dataset: Dataset, config: TrainConfig, count: int) -> list[PreviewPair]:
    """Return the pairs of so many rows."""
    learned, held_out = dataset.split(config.validation_share)
    examples = (held_out.examples or learned.examples)[:count]
    return [
        PreviewPair(
            tuple(ImageOps.contain(control.shown(None), example.size.pixels) for control in example.controls),
            example.crop(),
            caption_choices(example.caption, config)[0],
            example.size,
        )
        for example in examples
    ]


def paired_rows(rows: Sequence[PreviewRow], pairs: Sequence[PreviewPair], usual: Size) -> list[PreviewRow]:
    """Return the rows as they are sampled of their pairs: at the target's size where they ask for none of their own.

    `usual` is the size that a row has which asks for none.
    """

    def paired(request: SampleRequest, pair: PreviewPair) -> SampleRequest:
        size = pair.size.pixels if (request.width, request.height) == usual.pixels else (request.width, request.height)
        prompt = request.prompt.replace(PAIR_CAPTION, pair.caption)
        return replace(request, prompt=prompt, width=size[0], height=size[1])

    return [[paired(request, pairs[index % len(pairs)]) for request in row] for index, row in enumerate(rows)]


def usual_size(config: TrainConfig) -> Size:
    """Return the size of a preview that asks for none."""
    side = max(config.resolutions_px)
    return Size(side, side)


def beside_pairs(
    labels: Sequence[Sequence[str]], images: Sequence[Sequence[Image.Image]], pairs: Sequence[PreviewPair]
) -> tuple[list[list[str]], list[list[Image.Image]]]:
    """Return rows of labels and images with those to edit in front, and the target behind."""
    all_labels, all_images = [], []
    for index, (texts, row) in enumerate(zip(labels, images, strict=True)):
        pair = pairs[index % len(pairs)]
        before = ["before"] if len(pair.before) == 1 else [f"picture {i + 1}" for i in range(len(pair.before))]
        all_labels.append([*before, *texts, "target"])
        all_images.append([*pair.before, *row, pair.target])
    return all_labels, all_images


def plain_prompt(prompt: str, config: TrainConfig) -> str:
    """Return the prompt with the class word in place of its tokens; without any, where there is no class word."""
    if config.class_word:
        return prior_caption(prompt, config)
    for token in config.tokens:
        prompt = prompt.replace(token, " ")
    return re.sub(r"\s+", " ", prompt).strip(" ,") or " "


def hint_at_tokens(rows: Sequence[PreviewRow], config: TrainConfig) -> None:
    """Log what in the prompts is nearly a token of the run, as prediction does."""
    for prompt in (row[0].prompt for row in rows):
        for written, meant in near_spellings(prompt, config.tokens).items():
            log.info("hint: sample_prompts hold %r, and the run trains %s", written, meant)


def preview_due(rows: Sequence[PreviewRow], every: int, step: int, steps: int) -> bool:
    """Return whether to sample after `step` of `steps` steps: at the start, at the end, and every so many between."""
    return bool(rows) and (step in (0, steps) or (every > 0 and step % every == 0))


def generate_previews(state: TrainState, rows: Sequence[PreviewRow]) -> list[list[Image.Image]]:
    """Sample rows of images. Nothing of the run is changed, and none of its random numbers is used.

    Raises UserError where there is no room for them beside the run.
    """
    try:
        return _generate(state, rows)
    except UserError as error:
        raise UserError(f"{error} That is a preview: lower resolution, or leave sample_prompts empty.") from error
    finally:
        release_memory()


def _generate(state: TrainState, rows: Sequence[PreviewRow]) -> list[list[Image.Image]]:
    # The weights and embeddings as a file would hold them.
    components, transformer = state.components, state.components.transformer
    lora = move_lora(as_written(current_lora(state)), transformer, components.placement)
    placeholders = no_placeholders()  # where none learns, all prompts were encoded beforehand
    if state.config.learns_tokens:
        tokens = state.placeholders.tokens
        pairs = zip(tokens, state.placeholders.embeddings, strict=True)
        embeddings = tuple(lora.embeddings[token][0].to(own.device) for token, own in pairs)
        placeholders = Placeholders(tokens, state.placeholders.ids, embeddings)

    # The prompts that were encoded beforehand, and the VAE.
    keys = preview_texts(state, rows)
    fixed = {name: pad_embeddings([state.data.texts[name]]) for name in keys if name in state.data.texts}
    prompts = PromptCache({text: encoded.on(components.placement.device) for text, encoded in fixed.items()})
    components = replace(components, vae=load_vae(components.folder, components.placement))

    pairs = state.data.held_out or state.data.examples

    def image(request: SampleRequest, controls: Controls | None) -> Image.Image:
        size = image_size(request.width, request.height, request.aspect_ratio)
        with applied_loras(transformer, [(lora, request.lora_scale)]) as applied:
            by_text = loras_by_text(applied, request, state.config)
            job = SamplingJob(request, size, placeholders, controls=controls, loras=by_text)
            return sampler.sample(components, job, _ignore, prompts)[0].pixels

    images = []
    with without_lora(transformer):
        for index, row in enumerate(rows):
            own = pairs[index % len(pairs)].controls
            controls = own.load() if own else None
            images.append([image(request, controls) for request in row])
    return images


def loras_by_text(applied: AppliedLoras, request: SampleRequest, config: TrainConfig) -> LorasByText:
    """Return under which texts the LoRA acts: as in prediction, but under a prompt that doesn't name it as well.

    Prediction may leave it out there. The preview shows whether the LoRA itself keeps a class, as in other tools.
    """
    taught = Taught(config.trigger_word, config.tokens, config.class_word, config.goal)
    under_prompt, under_negative = (taught.acts_under(t, "auto") for t in (request.prompt, request.negative_prompt))
    rests = under_prompt and not under_negative
    return LorasByText(applied, frozenset({0}), frozenset() if rests else frozenset({0}))


def preview_texts(state: TrainState, rows: Sequence[PreviewRow]) -> list[str]:
    """Return what the embeddings of these rows' prompts are kept under."""
    pairs, found = state.data.held_out or state.data.examples, list[str]()
    for index, row in enumerate(rows):
        own = pairs[index % len(pairs)].controls
        controls = replace(no_controls(), key=own.key) if own else None
        texts = [text for request in row for text in (request.prompt, request.negative_prompt)]
        found += [text_key(text, controls) for text in texts]
    return list(dict.fromkeys(found))


def _ignore(_images: range, _step: int) -> None:
    pass


def as_written(lora: LoraFile) -> LoraFile:
    """Return what prediction would read of a LoRA: written to a file, rounded as that is, and read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora_weights.safetensors"
        write_lora_file(path, lora)
        return read_lora_file(path)
