"""A run's numbers: each step once, in metrics.jsonl, TensorBoard and wandb, however often it was resumed."""

import io
import struct
from dataclasses import asdict, replace

import pytest
import wandb
from PIL import Image, ImageChops
from tensorboardX.proto.event_pb2 import Event

from lora_utils.config import RunOptions
from lora_utils.errors import UserError
from lora_utils.tracking import contact_sheet, metrics
from lora_utils.tracking.html_report import REPORT_FILE
from lora_utils.tracking.metrics import METRICS_FILE, TENSORBOARD_FOLDER, WANDB_ID_FILE, MetricsLogger, read_metrics
from lora_utils.training.checkpoint import list_checkpoints
from tests.helpers import SHORT_RUN, train_archive


@pytest.fixture(scope="module")
def folder(archive, random_model, tmp_path_factory):
    """What a run with all curves and images leaves there."""
    config = replace(SHORT_RUN, validation_share=0.2, class_word="square", steps=12)
    made = tmp_path_factory.mktemp("run")
    options = RunOptions(run_dir=str(made), sample_prompts="a red circle", sample_every=4, sample_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BASE_MODEL", str(random_model))
        patch.delenv("WANDB_API_KEY", raising=False)
        train_archive(config, archive, made / "weights.zip", options)
    return made


def test_metrics_hold_each_step_with_its_losses_by_level_of_noise(folder):
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


def test_a_run_that_is_resumed_continues_its_metrics(train_run, tmp_path):
    """Also where the one before has got beyond its last checkpoint, and was killed within a line."""
    config = replace(SHORT_RUN, validation_share=0.2)
    _, whole = train_run("whole", config)
    asked = iter([False] * 4 + [True])
    train_run("parts", config, save_every=2, stopped=lambda: next(asked))
    last = list_checkpoints(tmp_path / "parts")[-1]
    last.rename(last.with_name("gone"))  # as if killed before it
    with (tmp_path / "parts" / METRICS_FILE).open("a") as file:
        file.write('{"step": 6, "loss": 0.1')
    train_run("parts", config, save_every=2, resume="auto")
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


def test_tensorboard_has_the_curves(folder):
    found = events(folder)
    losses = {step: value for step, name, value in found if name == "train/loss"}
    expected = {line["step"]: line["loss"] for line in read_metrics(folder) if line.get("loss") is not None}
    assert losses == pytest.approx(expected)
    assert {"validation/loss", "train/learning_rate", "train/grad_norm"} <= {name for _, name, _ in found}
    assert any(name.startswith("sigma/") for _, name, _ in found)


def test_tensorboard_has_the_samples(folder):
    shown = events(folder, kind="image")
    assert [(step, name) for step, name, _ in shown] == [(step, "previews") for step in (0, 4, 8, 12)]
    for (_, _, image), path in zip(shown, contact_sheet.list_sheets(folder), strict=True):
        with Image.open(io.BytesIO(image.encoded_image_string)) as seen, Image.open(path) as saved:
            assert ImageChops.difference(seen.convert("RGB"), saved.convert("RGB")).getbbox() is None


@pytest.fixture
def trackers(monkeypatch):
    """What accelerate's trackers for wandb get, each of them."""
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
            self.shown.append((step, len(values["previews"])))

        def finish(self):
            self.finished = True

    monkeypatch.setattr(metrics, "WandBTracker", Tracker)
    return made


def test_wandb_gets_the_metrics_too_if_its_key_is_set(train_run, trackers, monkeypatch):
    train_run("without", replace(SHORT_RUN, steps=1))
    assert trackers == []
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    _, folder = train_run("with", sample_prompts="a red circle", sample_every=4, sample_steps=1)
    (tracker,) = trackers
    assert tracker.project == "qwen-image-lora"
    assert tracker.settings["config"] == {"run_dir": str(folder), **asdict(SHORT_RUN)}
    assert list(tracker.losses) == list(range(1, 9))
    assert tracker.shown == [(0, 1), (4, 1), (8, 1)]
    assert tracker.finished


@pytest.fixture
def train_with_wandb(train_run, monkeypatch):
    """The real one, which needs no network when it is asked to."""
    for name, value in {"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    yield train_run
    wandb.teardown()  # it would remember


def test_a_run_that_is_resumed_adds_to_its_curves_in_wandb(train_with_wandb):
    config, drawn = replace(SHORT_RUN, steps=4), {"sample_prompts": "a red circle", "sample_steps": 1}
    train_with_wandb(config=config, save_every=2, stopped=iter([False, True]).__next__)
    _, folder = train_with_wandb(config=config, resume="auto", **drawn)
    run_id = (folder / WANDB_ID_FILE).read_text()
    assert len(list(folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))) == 2
    assert len(list(folder.glob("wandb/offline-run-*"))) == 2
    (shown,) = folder.glob("wandb/offline-run-*/files/media/images/previews_4_*.png")
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
def test_a_run_that_fails_leaves_no_tracker_open(when, train_run, monkeypatch):
    """A server lives on, and its next run has trackers of its own."""

    def no_room(*_):
        raise UserError("no room")

    monkeypatch.setattr(metrics, "TensorBoardTracker", Tracker)
    monkeypatch.setattr(Tracker, "error", KeyboardInterrupt(), raising=False)
    if when == "begin":
        monkeypatch.setattr("lora_utils.training.monitor.generate_previews", no_room)
    with pytest.raises((UserError, KeyboardInterrupt)):
        train_run(sample_prompts="a red circle", sample_steps=1)
    assert Tracker.open_now == 0


def test_a_tracker_that_fails_costs_its_curves_alone(train_run, monkeypatch, caplog):
    monkeypatch.setattr(metrics, "TensorBoardTracker", Tracker)
    monkeypatch.setattr(Tracker, "error", OSError(28, "No space left on device"), raising=False)
    weights, folder = train_run()
    assert caplog.text.count("tensorboard is no longer written: [Errno 28] No space left on device") == 1
    assert Tracker.open_now == 0
    assert [line["step"] for line in read_metrics(folder)] == list(range(1, 9))
    assert weights.is_file()


def test_curves_that_find_no_place_are_refused_before_the_first_step(train_run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / TENSORBOARD_FOLDER).write_text("not a folder")
    with pytest.raises(
        UserError, match=r"curves can't be written to .*run \(.*\); free some room, or name another run_dir"
    ):
        train_run()


def test_a_report_that_cannot_be_written_does_not_lose_the_weights(train_run, tmp_path, caplog):
    (tmp_path / "run" / REPORT_FILE).mkdir(parents=True)
    weights, folder = train_run()
    assert weights.is_file()
    assert "report.html can't be written (Is a directory)" in caplog.text
    assert list(folder.glob("*.partial")) == []


def test_a_new_run_in_an_old_ones_folder_leaves_no_curves_of_that(train_run):
    train_run(config=replace(SHORT_RUN, steps=3))
    _, folder = train_run(config=replace(SHORT_RUN, steps=2))
    assert max(step for step, _, _ in events(folder)) == 2
    assert max(line["step"] for line in read_metrics(folder)) == 2


def test_without_a_folder_nothing_is_kept(archive, random_model, tmp_path, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    monkeypatch.chdir(tmp_path)
    train_archive(SHORT_RUN, archive, tmp_path / "weights.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.zip"]
