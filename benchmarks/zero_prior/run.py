"""One training of the zero-prior experiment, measured as it goes.

It owns what is asked of the model between steps, and what is counted. The training is the package's own loop;
whatever an arm changes, it changes between two steps of it.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.zero_prior.arms import Arm
from examples import demo, evaluate, scorer, shapes
from examples.evaluate import Asked
from lora_utils.config import TrainConfig
from lora_utils.dataset import load
from lora_utils.io.archive import extract_archive
from lora_utils.model import flow
from lora_utils.model.components import Components
from lora_utils.model.latents import Size
from lora_utils.model.memory_estimate import read_shapes
from lora_utils.model.text_encoder import encode_text
from lora_utils.model.transformer import predict_velocity
from lora_utils.model.vae import encode_images
from lora_utils.placeholder.embedding import (
    WordEmbeddings,
    embedding_learning_rate,
    embedding_matrix,
    measure_words,
)
from lora_utils.placeholder.tokens import Placeholders
from lora_utils.training import loop
from lora_utils.training.optimizers import new_optimizers
from lora_utils.training.setup import TrainJob, setup
from lora_utils.training.state import TrainState

WORDINGS = (0, 3)  # the trigger never opens the sentence, where the tokenizer reads `TOK` as another token
SIZE = Size(shapes.SIDE_PX, shapes.SIDE_PX)
SAMPLED_AT_ONCE = 27  # half of what is asked; more at once leaves the cache and is slower


@dataclass(frozen=True, slots=True)
class Length:
    """How long a run is, and when and on how many prompts it is measured."""

    steps: int = 400
    measured_at: tuple[int, ...] = (0, 100, 150, 200, 300, 400)
    sampling_steps: int = 10
    token_prompts: int = 20
    plain_prompts: int = 24
    prior_prompts: int = 10


@dataclass(frozen=True, slots=True)
class Point:
    """What a model does after so many steps. Shares are of images, 0 to 1."""

    step: int
    fidelity: float  # of the triggers' images, those that show the trigger's own object
    background: float  # of the trigger's images, those on the background asked for
    leakage: float  # of the trigger's images, those that show what the model knew before instead
    intrusion: float  # of other prompts' images, those that show the taught object
    base_accuracy: float  # of other prompts' images, those with shape, colour and background right
    prior_meaning: float  # of the prior word's images, those that show what it meant
    drift: float  # of the velocity on other prompts: mean squared change over its mean square
    row_share: float | None  # the row's norm over the median word's


@dataclass(frozen=True, slots=True)
class Bench:
    """The untouched model and the questions, made once per process."""

    folder: Path
    base: Components
    length: Length

    @property
    def words(self) -> WordEmbeddings:
        """The words that the model knows."""
        return measure_words(self.base.need_text_encoder(), self.base.tokenizer)


def taught_prompts(naming: dict[str, shapes.Prompt], count: int) -> tuple[list[str], list[Asked]]:
    """Return the kinds that prompts ask for, and the prompts: `count` of them, as many of each object."""
    each = count // len(naming)
    asked = [question for prompt in naming.values() for question in trigger_prompts(prompt, each)]
    return [kind for kind in naming for _ in range(each)], asked


def trigger_prompts(naming: shapes.Prompt, count: int) -> list[Asked]:
    """All backgrounds in turn, sizes and places now and then."""
    rng = np.random.default_rng(1)
    asked = []
    for index in range(count):
        size = str(rng.choice(list(shapes.SIZES_PX))) if rng.random() < 0.3 else None
        place = str(rng.choice(list(shapes.PLACES))) if rng.random() < 0.3 else None
        background = list(shapes.BACKGROUNDS)[index % len(shapes.BACKGROUNDS)]
        prompt = replace(naming, background=background, size=size, place=place)
        asked.append(Asked(prompt, prompt.wordings()[WORDINGS[index // len(shapes.BACKGROUNDS) % len(WORDINGS)]]))
    return asked


def _share(flags: list[bool]) -> float:
    return sum(flags) / len(flags)


@torch.inference_mode()
def _drift(bench: Bench, trained: Components, placeholders: Placeholders, asked: list[Asked]) -> float:
    """How far the velocity on drawings of other prompts, with their captions, has moved from the base's."""
    rng, generator = np.random.default_rng(2), torch.Generator().manual_seed(2)
    drawn = [shapes.to_image(shapes.draw(shapes.scene_of(question.prompt, rng))) for question in asked]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1 for image in drawn])
    clean = encode_images(bench.base.need_vae(), pixels)
    noise = torch.randn(clean.shape, generator=generator)
    sigma = flow.sample_sigmas(len(clean), bench.base.schedule.mu(SIZE.tokens), generator)
    noisy = flow.add_noise(clean, noise, sigma)
    texts = [question.text for question in asked]
    before, after = (
        predict_velocity(
            part.transformer,
            noisy,
            sigma,
            encode_text(part.need_text_encoder(), part.tokenizer, texts, placeholders),
            SIZE,
        )
        for part in (bench.base, trained)
    )
    return float((after - before).square().mean() / before.square().mean())


def _as_components(bench: Bench, run: TrainState) -> Components:
    """The model as the run has it now."""
    text_encoder = run.components.text_encoder or bench.base.text_encoder
    return replace(bench.base, transformer=run.components.transformer, text_encoder=text_encoder)


def measure(bench: Bench, run: TrainState, arm: Arm, kind: str, step: int) -> Point:
    """Draw and count. Draws nothing from the run's random streams and changes nothing of it."""
    trained = _as_components(bench, run)
    naming = arm.naming(kind)
    kinds, asked = taught_prompts(naming, bench.length.token_prompts)
    plain = evaluate.held_out_prompts(bench.length.plain_prompts)
    prior = trigger_prompts(shapes.Prompt(shapes.TOK), bench.length.prior_prompts)
    texts = [question.text for question in (*asked, *plain, *prior)]
    sampling_steps = bench.length.sampling_steps
    images = evaluate.sample_ours(trained, texts, run.placeholders, sampling_steps, batch=SAMPLED_AT_ONCE)
    readable = (*shapes.SHAPES, *shapes.OBJECTS, *(other for other in naming if other not in shapes.OBJECTS))
    readings = [scorer.read(image, readable) for image in images]
    of_trigger, of_plain = readings[: len(asked)], readings[len(asked) : len(asked) + len(plain)]
    known = (*shapes.SHAPES, shapes.TOK)
    matrix = embedding_matrix(trained.need_text_encoder())
    median = matrix[: len(trained.tokenizer)].norm(dim=1).median()
    rows = run.placeholders.embeddings
    return Point(
        step=step,
        fidelity=_share([reading.kind == own for reading, own in zip(of_trigger, kinds, strict=True)]),
        background=_share(
            [r.background == question.prompt.background for r, question in zip(of_trigger, asked, strict=True)]
        ),
        leakage=_share([reading.kind in known for reading in of_trigger]),
        intrusion=_share([reading.kind in naming for reading in of_plain]),
        base_accuracy=_share(
            [
                (r.kind, r.colour, r.background) == (q.prompt.noun, q.prompt.colour, q.prompt.background)
                for r, q in zip(of_plain, plain, strict=True)
            ]
        ),
        prior_meaning=_share([reading.kind == shapes.TOK for reading in readings[len(asked) + len(plain) :]]),
        drift=_drift(bench, trained, run.placeholders, plain),
        row_share=float(rows[0].detach().norm() / median) if rows else None,
    )


# --- the arms' changes to a run -------------------------------------------------------------------------------------


def train_word(run: TrainState, bench: Bench, word: str) -> None:
    """Let a word of the vocabulary learn as a fresh token does: its own row is spliced in and trained.

    The piece " TOK" is cut out with its space, which is how the tokenizer reads the word inside a sentence.
    """
    (slot,) = bench.base.tokenizer(f" {word}").input_ids
    row = embedding_matrix(bench.base.need_text_encoder())[slot].detach().clone().requires_grad_()
    run.placeholders = Placeholders((f" {word}",), (slot,), (row,))
    run.initial_embeddings = (row.detach().clone(),)
    run.components.text_encoder = bench.base.text_encoder
    texts = {caption: text for caption, text in run.data.texts.items() if word not in caption}
    run.data = replace(run.data, texts=texts)
    rate = embedding_learning_rate(run.config, bench.words)
    run.optimizers = new_optimizers(run.config, run.lora, run.placeholders.embeddings, rate)


def remedy_of(arm: Arm, run: TrainState, bench: Bench) -> Callable[[int], object]:
    """What is done to the row after each step."""
    if arm.remedy is None:
        return lambda step: None
    (row,) = run.placeholders.embeddings  # no remedy is tried on several
    words = embedding_matrix(bench.base.need_text_encoder())[: len(run.components.tokenizer)].detach()
    optimizers, tenth = run.optimizers, run.config.steps // 10
    rate = optimizers.embedding_learning_rate
    if arm.remedy == "norm below the median":
        most = 0.9 * words.norm(dim=1).median()
        return lambda step: row.data.mul_(torch.clamp(most / row.data.norm(), max=1.0))
    if arm.remedy == "orthogonal to words":
        basis = torch.linalg.svd(words - words.mean(dim=0), full_matrices=False).Vh[:16]  # [16, D]
        return lambda step: row.data.sub_(basis.T @ (basis @ row.data))
    if arm.remedy == "trained after a tenth":
        optimizers.embedding_learning_rate = 0.0
        return lambda step: setattr(optimizers, "embedding_learning_rate", rate if step >= tenth else 0.0)
    if arm.remedy == "frozen after a tenth":
        return lambda step: setattr(optimizers, "embedding_learning_rate", rate if step < tenth else 0.0)
    raise ValueError(f"there is no remedy {arm.remedy!r}")


# --- a run ----------------------------------------------------------------------------------------------------------


def _config(arm: Arm, bench: Bench, seed: int) -> TrainConfig:
    config = TrainConfig(
        train_placeholder_token=arm.trigger == "token",
        placeholder_token=",".join(arm.tokens),
        placeholder_init_std=arm.init_std,
        rank=arm.rank,
        lora_alpha=16.0,
        steps=bench.length.steps,
        learning_rate=4e-4,
        batch_size=4,
        lora_targets="attention_mlp",
        caption_dropout=0.1,
        resolution=str(shapes.SIDE_PX),
        seed=seed,
    )
    default = embedding_learning_rate(config, bench.words)
    return replace(config, placeholder_learning_rate=0.0 if arm.row == "frozen" else default * arm.rate_factor)


def prepare_arm(bench: Bench, arm: Arm, kind: str, seed: int) -> TrainState:
    """A run on the images of one object, or of two.

    Seeds are paired: the same seed gives each arm the same images, LoRA, order, noise and sigmas.
    """
    config = _config(arm, bench, seed)
    with tempfile.TemporaryDirectory() as folder:
        for own, naming in arm.naming(kind).items():
            archive = Path(folder) / f"{own}.zip"
            demo.write_dataset(archive, own, naming, arm.images, seed, WORDINGS)
            extract_archive(archive, Path(folder) / "images" / own)
        found = load(Path(folder) / "images", config)
        run = setup(
            TrainJob(
                config,
                found,
                bench.folder,
                bench.base.placement,
                bench.base.tokenizer,
                read_shapes(bench.folder),
                any_timestep=True,
            )
        )
    if arm.trigger == "prior" and arm.row == "trained":
        train_word(run, bench, shapes.TOK)
    return run


def run_arm(bench: Bench, arm: Arm, kind: str, seed: int) -> tuple[dict, list[Image.Image]]:
    """Train, and measure on the way. -> (record, five images of the trigger at the end)"""
    began = time.monotonic()
    run = prepare_arm(bench, arm, kind, seed)
    after_step = remedy_of(arm, run, bench)
    points = [measure(bench, run, arm, kind, 0)]
    for report in loop.train(run):
        after_step(report.step)
        if report.step in bench.length.measured_at:
            points.append(measure(bench, run, arm, kind, report.step))
    _, asked = taught_prompts(arm.naming(kind), 5 * len(arm.naming(kind)))
    texts = [question.text for question in asked]
    images = evaluate.sample_ours(_as_components(bench, run), texts, run.placeholders, bench.length.sampling_steps)
    return {"points": [asdict(point) for point in points], "seconds": time.monotonic() - began}, images
