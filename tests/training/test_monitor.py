"""What is seen of a training on its way: samples, the loss on images held out, curves, the report; and that looking
changes nothing."""

import io
import json
import logging
import re
import struct
from dataclasses import asdict, replace

import pytest
import torch
import wandb
from PIL import Image, ImageChops
from tensorboardX.proto.event_pb2 import Event

from examples.demo import call
from lora_utils.config import RunOptions, SampleRequest, TrainConfig
from lora_utils.errors import UserError
from lora_utils.model import transformer
from lora_utils.model.device import default_placement
from lora_utils.model.latents import Size
from lora_utils.model.text_encoder import encode_text
from lora_utils.model.transformer import predict_velocity
from lora_utils.tracking import contact_sheet, html_report, metrics
from lora_utils.tracking.metrics import METRICS_FILE, TENSORBOARD_FOLDER, WANDB_ID_FILE, MetricsLogger, read_metrics
from lora_utils.training import loop, previews, run
from lora_utils.training.batches import VALIDATION_SIGMAS, BatchStream, generator_for
from lora_utils.training.checkpoint import list_checkpoints
from lora_utils.training.previews import generate_previews, preview_rows
from lora_utils.training.run import train_once
from lora_utils.training.setup import setup
from lora_utils.training.state import TrainState
from lora_utils.training.validation import validate
from predict import Predictor
from tests.training.test_checkpoint import lora_of

CONFIG = TrainConfig(
    steps=8, rank=4, learning_rate=1e-3, batch_size=2, resolution="64", seed=3, train_placeholder_token=True,
    quantization="none",
)  # fmt: skip
PROMPTS = "a photo of <zwx> on a cyan background\na red circle"


@pytest.fixture
def train(archive, random_model, tmp_path, monkeypatch):
    """Train in a folder of its own. -> weights.zip and the run's folder"""
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)

    def run(name="run", config=CONFIG, stopped=lambda: False, **given):
        options = RunOptions(run_dir=str(tmp_path / name), **given)
        return train_once(config, options, archive, tmp_path / f"{name}.zip", stopped=stopped), tmp_path / name

    return run


def names(folder):
    return [path.name for path in contact_sheet.list_sheets(folder)]


# --- samples --------------------------------------------------------------------------------------------------------


def test_a_sheet_after_the_last_step_is_what_predict_draws(train, random_model, monkeypatch):
    """The same file, rounded as it is, through the same hooks and the same sampler; only the modulations come from a
    table in training, which rounds differently."""
    weights, folder = train(sample_prompts=PROMPTS, sample_steps=4)
    with Image.open(folder / "samples" / "step-000008.png") as sheet:
        drawn = sheet.convert("RGB")
    predictor = Predictor()
    predictor.setup()
    asked = [("a photo of <zwx> on a cyan background", 0, 0), ("a photo of on a cyan background", 1, 0),
             ("a red circle", 0, 1)]  # fmt: skip
    side = 4 * 64  # enlarged without smoothing
    for prompt, column, row in asked:
        seed = CONFIG.seed + row
        (path,) = call(
            predictor.predict, prompt=prompt, replicate_weights=weights, steps=4, width=64, height=64, seed=seed,
            output_format="png",
        )  # fmt: skip
        with Image.open(str(path)) as picture:
            expected = picture.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
        left, top = 8 + column * (side + 8), 20 + row * (side + 20 + 8) + 20
        found = drawn.crop((left, top, left + side, top + side))
        apart = ImageChops.difference(found, expected)
        assert max(most for _, most in apart.getextrema()) <= 1, prompt
        assert sum(apart.convert("L").histogram()[1:]) <= 0.001 * side**2, prompt


@pytest.mark.parametrize("targets", ["attention", "attention_mlp"])
@pytest.mark.parametrize("token", [True, False])
def test_a_run_that_is_watched_learns_what_it_learns_unseen(token, targets, train):
    config = replace(CONFIG, train_placeholder_token=token, lora_targets=targets, ema_decay=0.5)
    prompts = PROMPTS if token else "a red circle"
    seen, _ = train("seen", config, sample_prompts=prompts, sample_every=2, sample_steps=2, save_every=2)
    unseen, _ = train("unseen", config)
    assert lora_of(seen)[0] == lora_of(unseen)[0]


def test_sheets_come_before_the_first_step_on_the_way_and_after_the_last(train):
    _, folder = train(sample_prompts="a red circle", sample_every=3, sample_steps=1)
    assert names(folder) == ["step-000000.png", "step-000003.png", "step-000006.png", "step-000008.png"]
    _, folder = train(sample_prompts="a red circle", sample_steps=1)
    assert names(folder) == ["step-000000.png", "step-000008.png"], "a new run in that folder leaves no other's"


def test_a_run_that_goes_on_draws_the_rest(train, tmp_path):
    _, whole = train("whole", sample_prompts=PROMPTS, sample_every=2, sample_steps=2)
    given = {"sample_prompts": PROMPTS, "sample_every": 2, "sample_steps": 2, "save_every": 3, "resume": "auto"}
    asked = iter([False, False, False, True])
    train("parts", stopped=lambda: next(asked), **given)
    (tmp_path / "parts.zip").unlink()
    train("parts", **given)
    assert names(tmp_path / "parts") == names(whole)
    for name in names(whole):
        with Image.open(whole / "samples" / name) as one, Image.open(tmp_path / "parts" / "samples" / name) as other:
            assert ImageChops.difference(one, other).getbbox() is None, name


@pytest.mark.parametrize(
    ("prompt", "config", "expected"),
    [
        ("a photo of <zwx> in a garden", CONFIG, ["a photo of <zwx> in a garden", "a photo of in a garden"]),
        ("<zwx>, a photo", CONFIG, ["<zwx>, a photo", "a photo"]),
        ("<zwx>", CONFIG, ["<zwx>", " "]),
        ("a photo of <zwx>", replace(CONFIG, class_word="house"), ["a photo of <zwx>", "a photo of house"]),
        ("[trigger] at dusk", CONFIG, ["<zwx> at dusk", "at dusk"]),
        ("a red circle", CONFIG, ["a red circle"]),
        ("ohwx at dusk", TrainConfig(trigger_word="ohwx", seed=0), ["ohwx at dusk"]),
        ("[trigger] at dusk", TrainConfig(trigger_word="ohwx", seed=0), ["ohwx at dusk"]),
    ],
)
def test_a_prompt_with_a_token_is_drawn_without_it_too(prompt, config, expected):
    (row,) = preview_rows(config, RunOptions(run_dir="x", sample_prompts=prompt))
    assert [request.prompt for request in row] == expected
    assert {request.seed for request in row} == {config.seed}, "from the same noise"


def test_several_prompts_have_seeds_of_their_own():
    rows = preview_rows(replace(CONFIG, resolution="64,128"), RunOptions("x", sample_prompts=" a | b\n\nc"))
    assert [(request.prompt, request.seed, request.width) for (request,) in rows] == [
        ("a", 3, 128), ("b", 4, 128), ("c", 5, 128),
    ]  # fmt: skip


def test_prompts_that_cannot_be_drawn_are_refused_before_anything_is_loaded(train, monkeypatch):
    monkeypatch.setattr(transformer, "load_text_encoder", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match="sample_prompts hold '<abc>', and the run trains <zwx>"):
        train(sample_prompts="a photo of <abc>")
    with pytest.raises(UserError, match="need a run_dir"):
        RunOptions(sample_prompts="a red circle")


def test_a_sample_that_fails_ends_a_run_at_its_start_and_not_later(train, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("lora_utils"), "propagate", True)
    calls, draw = [], generate_previews

    def failing(at):
        def drawn(*given):
            calls.append(1)
            if len(calls) == at:
                raise UserError("an image of 64x64 doesn't fit")
            return draw(*given)

        return drawn

    monkeypatch.setattr(previews, "draw", failing(1))
    with pytest.raises(UserError, match="doesn't fit"):
        train("first", sample_prompts="a red circle", sample_steps=1)
    calls.clear()
    monkeypatch.setattr(previews, "draw", failing(2))
    weights, folder = train("later", sample_prompts="a red circle", sample_every=4, sample_steps=1)
    assert weights.is_file()
    assert "no samples after step 4: an image of 64x64 doesn't fit" in caplog.text
    assert names(folder) == ["step-000000.png", "step-000008.png"]


# --- validation -----------------------------------------------------------------------------------------------------


@pytest.fixture
def prepare(dataset, random_model):
    def make(**given) -> TrainState:
        config = replace(CONFIG, validation_share=0.3, **given)
        return setup(config, dataset, random_model, default_placement())

    return make


def test_pictures_held_out_are_never_learned_from(prepare):
    run = prepare()
    held_out = {example.image_name for example in run.data.held_out}
    assert len(held_out) == 3
    assert len(run.data.examples) == 7
    stream = BatchStream(run.config, run.data.examples, run.components.schedule)
    seen = {name for _ in range(50) for name in next(stream).names}
    assert len(seen) == 7
    assert not seen & held_out


def test_the_same_pictures_are_held_out_whatever_the_seed(prepare):
    one, other = (sorted(example.image_name for example in prepare(seed=seed).held_out) for seed in (1, 2))
    assert one == other


def test_the_loss_is_that_of_fixed_noise_at_fixed_levels(prepare):
    """Equal for equal weights, whatever the seed, the batch size and what was measured before."""
    run = prepare()
    found = validate(run)
    assert validate(run) == found
    again = validate(prepare(seed=9, batch_size=5))
    assert again.loss == pytest.approx(found.loss, rel=1e-5)
    assert len(found.by_sigma) == len(VALIDATION_SIGMAS)
    assert found.loss == pytest.approx(sum(found.by_sigma) / len(found.by_sigma))


def test_it_is_the_training_loss_of_those_pictures(prepare):
    """By hand, for one image at one level."""
    run = prepare()
    example = run.data.held_out[0]
    noise = torch.randn(example.latents.shape, generator=generator_for(0, "validation 0"))
    sigma = VALIDATION_SIGMAS[2]
    noisy = ((1 - sigma) * example.latents + sigma * noise)[None]
    text = encode_text(run.components.text_encoder, run.components.tokenizer, [example.caption], run.placeholders)
    with torch.no_grad():
        velocity = predict_velocity(run.components.transformer, noisy, torch.tensor([sigma]), text, example.size)
    expected = float((velocity - (noise - example.latents)).square().mean())
    run.data.held_out = [example]
    assert validate(run).by_sigma[2] == pytest.approx(expected, rel=1e-4)


def test_a_class_that_is_held_and_dropped_captions_do_not_enter(prepare):
    plain, with_class = prepare(), prepare(class_word="square", preservation_weight=0.5, caption_dropout=1.0)
    assert validate(with_class).loss == pytest.approx(validate(plain).loss, rel=1e-5)


def test_it_measures_the_average_where_one_is_kept(prepare):
    run = prepare(ema_decay=0.9, learning_rate=0.05)
    list(loop.train(run))
    averaged = validate(run)
    run.optimizers.average = None
    assert validate(run).loss != pytest.approx(averaged.loss, rel=1e-4)


def test_one_picture_alone_cannot_be_held_out(dataset):
    alone = replace(dataset, examples=dataset.examples[:1])
    with pytest.raises(UserError, match="there is only one; set it to 0, or add some"):
        alone.split(0.1)
    learned, held_out = replace(dataset, examples=dataset.examples[:2]).split(0.5)
    assert (learned.num_images, held_out.num_images) == (1, 1)
    assert dataset.split(0.0)[0].examples == dataset.examples


def test_pictures_held_out_are_measured_in_their_smallest_size(dataset):
    sizes = [Size(96, 96), Size(64, 64), Size(128, 128)]
    several = replace(dataset, examples=[replace(e, size=size) for e in dataset.examples for size in sizes])
    learned, held_out = several.split(0.2)
    assert [example.size for example in held_out.examples] == [Size(64, 64)] * 2
    assert len(learned.examples) == 3 * 8


def test_a_token_that_only_stands_on_pictures_held_out_is_refused(dataset, random_model):
    _, held_out = dataset.split(0.1)
    (path,) = held_out.captions_by_image
    captions = {p: c if p == path else c.replace("<zwx>", "a thing") for p, c in dataset.captions_by_image.items()}
    with pytest.raises(UserError, match="none of the 9 captions holds the placeholder token '<zwx>'"):
        setup(replace(CONFIG, validation_share=0.1), dataset.with_captions(captions), random_model, default_placement())


# --- curves ---------------------------------------------------------------------------------------------------------


def test_metrics_hold_each_step_with_its_losses_by_level_of_noise(train):
    _, folder = train(config=replace(CONFIG, validation_share=0.2, class_word="square", steps=12))
    lines = list(read_metrics(folder))
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    for line in steps:
        of_bands = [loss for band in line["bands"].values() for loss in band]
        assert set(line["bands"]) <= {"0-0.25", "0.25-0.5", "0.5-0.75", "0.75-1"}
        if line["loss"] is None:
            assert not of_bands, "what held the class taught nothing"
        else:
            assert sum(of_bands) / len(of_bands) == pytest.approx(line["loss"])
    assert [line["step"] for line in lines if "validation" in line] == list(range(13))


def test_a_run_that_goes_on_continues_its_metrics(train, tmp_path):
    """Also where the one before has got beyond its last checkpoint, and was killed within a line."""
    config = replace(CONFIG, validation_share=0.2)
    _, whole = train("whole", config)
    asked = iter([False] * 4 + [True])
    train("parts", config, save_every=2, stopped=lambda: next(asked))
    last = list_checkpoints(tmp_path / "parts")[-1]
    last.rename(last.with_name("gone"))  # as if killed before it
    with (tmp_path / "parts" / METRICS_FILE).open("a") as file:
        file.write('{"step": 6, "loss": 0.1')
    train("parts", config, save_every=2, resume="auto")
    one, other = (list(read_metrics(folder)) for folder in (whole, tmp_path / "parts"))
    assert one == other


def events(folder, kind="simple_value"):
    """(step, name, value) of TensorBoard's file: records of a length, its checksum, an event and its checksum."""
    found = []
    for path in sorted((folder / TENSORBOARD_FOLDER).rglob("events*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            values = [value for value in event.summary.value if value.WhichOneof("value") == kind]
            found += [(event.step, value.tag, getattr(value, kind)) for value in values]
            at += 16 + length
    return found


def test_tensorboard_has_the_curves(train):
    _, folder = train(config=replace(CONFIG, validation_share=0.2))
    found = events(folder)
    losses = {step: value for step, name, value in found if name == "train/loss"}
    expected = {line["step"]: line["loss"] for line in read_metrics(folder) if "loss" in line}
    assert losses == pytest.approx(expected)
    assert {"validation/loss", "train/learning_rate", "train/grad_norm"} <= {name for _, name, _ in found}
    assert any(name.startswith("sigma/") for _, name, _ in found)


def test_tensorboard_has_the_samples(train):
    _, folder = train(sample_prompts="a red circle", sample_every=4, sample_steps=1)
    shown = events(folder, kind="image")
    assert [(step, name) for step, name, _ in shown] == [(0, "samples"), (4, "samples"), (8, "samples")]
    for (_, _, image), path in zip(shown, contact_sheet.list_sheets(folder), strict=True):
        with Image.open(io.BytesIO(image.encoded_image_string)) as seen, Image.open(path) as saved:
            assert ImageChops.difference(seen.convert("RGB"), saved.convert("RGB")).getbbox() is None


@pytest.fixture
def told(monkeypatch):
    """What accelerate's trackers for wandb are told, each of them."""
    made = []

    class Tracker:
        def __init__(self, project, **settings):
            made.append(self)
            self.project, self.settings, self.losses, self.shown, self.finished = project, settings, {}, [], False

        def start(self):
            pass

        def log(self, values, step):
            assert step > max(self.losses, default=0)  # wandb drops what comes late
            self.losses[step] = values["train/loss"]

        def log_images(self, values, step):
            assert step >= max(self.losses, default=0)
            self.shown.append((step, len(values["samples"])))

        def finish(self):
            self.finished = True

    monkeypatch.setattr(metrics, "WandBTracker", Tracker)
    return made


def test_wandb_is_told_too_if_its_key_is_set(train, told, monkeypatch):
    train("without")
    assert told == []
    monkeypatch.setattr(run.fetch.os, "environ", {**run.fetch.os.environ, "WANDB_API_KEY": "k" * 40})
    _, folder = train("with", sample_prompts="a red circle", sample_every=4, sample_steps=1)
    (tracker,) = told
    assert tracker.project == "qwen-image-lora"
    assert tracker.settings["config"] == {"run_dir": str(folder), **asdict(CONFIG)}
    assert list(tracker.losses) == list(range(1, 9))
    assert tracker.shown == [(0, 1), (4, 1), (8, 1)]
    assert tracker.finished


@pytest.fixture
def train_with_wandb(train, monkeypatch):
    """The real one, which needs no network when it is told so."""
    for name, value in {"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    yield train
    wandb.teardown()  # it would remember


def test_a_run_that_goes_on_adds_to_its_curves_in_wandb(train_with_wandb):
    config, drawn = replace(CONFIG, steps=4), {"sample_prompts": "a red circle", "sample_steps": 1}
    train_with_wandb(config=config, save_every=2, stopped=iter([False, True]).__next__)
    _, folder = train_with_wandb(config=config, resume="auto", **drawn)
    run_id = (folder / WANDB_ID_FILE).read_text()
    assert len(list(folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))) == 2
    assert len(list(folder.glob("wandb/offline-run-*"))) == 2
    (shown,) = folder.glob("wandb/offline-run-*/files/media/images/samples_4_*.png")
    with Image.open(shown) as seen, Image.open(folder / "samples" / "step-000004.png") as saved:
        assert ImageChops.difference(seen.convert("RGB"), saved.convert("RGB")).getbbox() is None


def test_a_key_that_wandb_does_not_take_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "too short")
    monkeypatch.setenv("WANDB_MODE", "online")
    kept = MetricsLogger(tmp_path, {})
    with pytest.raises(UserError, match=r"WANDB_API_KEY .*; correct it, or unset it"):
        kept.open(0)
    kept.close()


class Tracker:
    """Counts those that are open."""

    name, open_now = "tensorboard", 0

    def __init__(self, *_, **__):
        pass

    def start(self):
        Tracker.open_now += 1

    def log(self, *_, **__):
        raise self.error

    def log_images(self, *_, **__):
        pass

    def finish(self):
        Tracker.open_now -= 1


@pytest.mark.parametrize("when", ["begin", "step"])
def test_a_run_that_fails_leaves_no_tracker_open(when, train, monkeypatch):
    """A server lives on, and its next run has trackers of its own."""

    def no_room(*_):
        raise UserError("no room")

    monkeypatch.setattr(metrics, "TensorBoardTracker", Tracker)
    monkeypatch.setattr(Tracker, "error", KeyboardInterrupt(), raising=False)
    if when == "begin":
        monkeypatch.setattr(previews, "draw", no_room)
    with pytest.raises((UserError, KeyboardInterrupt)):
        train(sample_prompts="a red circle", sample_steps=1)
    assert Tracker.open_now == 0


def test_a_tracker_that_fails_costs_its_curves_alone(train, monkeypatch, caplog):
    monkeypatch.setattr(metrics, "TensorBoardTracker", Tracker)
    monkeypatch.setattr(Tracker, "error", OSError(28, "No space left on device"), raising=False)
    weights, folder = train()
    assert caplog.text.count("tensorboard is told no more: [Errno 28] No space left on device") == 1
    assert Tracker.open_now == 0
    assert [line["step"] for line in read_metrics(folder)] == list(range(1, 9))
    assert weights.is_file()


def test_curves_that_find_no_place_are_refused_before_the_first_step(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / TENSORBOARD_FOLDER).write_text("not a folder")
    with pytest.raises(
        UserError, match=r"curves can't be written to .*run \(.*\); free some room, or name another run_dir"
    ):
        train()


def test_a_report_that_cannot_be_written_does_not_lose_the_weights(train, tmp_path, caplog):
    (tmp_path / "run" / html_report.REPORT_FILE).mkdir(parents=True)
    weights, folder = train()
    assert weights.is_file()
    assert "report.html can't be written (Is a directory)" in caplog.text
    assert list(folder.glob("*.partial")) == []


def test_a_new_run_in_an_old_ones_folder_leaves_no_curves_of_that(train):
    train(config=replace(CONFIG, steps=9))
    _, folder = train()
    assert max(step for step, _, _ in events(folder)) == 8
    assert max(line["step"] for line in read_metrics(folder)) == 8


def test_without_a_folder_nothing_is_kept(archive, random_model, tmp_path, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    monkeypatch.chdir(tmp_path)
    train_once(CONFIG, RunOptions(), archive, tmp_path / "weights.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.zip"]


# --- the report -----------------------------------------------------------------------------------------------------


def test_the_report_is_one_file_that_needs_no_other(train, random_model):
    config = replace(CONFIG, validation_share=0.2, default_caption="<script>alert(1)</script> <zwx>")
    _, folder = train(config=config, sample_prompts=PROMPTS, sample_steps=2)
    page = (folder / html_report.REPORT_FILE).read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "http" not in page
    assert page.count('src="data:image/webp;base64,') == 2
    assert "<script" not in page
    assert "&lt;zwx&gt;" in page
    for told in (
        "Loss, smoothed",
        "held out",
        "level of noise",
        "<td>rank</td><td>4</td>",
        "bucket 64x64: 10",
        "GB of",
    ):
        assert told in page, told


def test_a_chart_shows_a_curve_from_its_first_step_to_its_last():
    drawn = html_report.chart("Loss", {"training": [(1, 4.0), (5, 3.0), (9, 2.0)]})
    (points,) = re.findall(r'points="([^"]+)"', drawn)
    xs, ys = zip(*(map(float, point.split(",")) for point in points.split()), strict=True)
    assert xs == (64.0, 407.0, 750.0)
    assert ys == (12.0, 112.0, 212.0), "the largest above"
    assert html_report.chart("Loss", {"training": []}) == ""
    assert "nan" not in html_report.chart("Flat", {"training": [(1, 2.0)]})


def test_requests_are_predicts_own():
    ((request,),) = preview_rows(CONFIG, RunOptions(run_dir="x", sample_prompts="a"))
    assert request == SampleRequest("a", steps=20, width=64, height=64, seed=3)


def test_the_metrics_are_json(train):
    _, folder = train()
    for line in (folder / METRICS_FILE).read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
