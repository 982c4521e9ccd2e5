"""Several processes as one run, with gloo on the CPU: the losses of one process, one file, one end."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import asdict, replace

import psutil
import pytest
import torch
from torch import nn

from lora_utils.config import RunOptions, TrainConfig
from lora_utils.errors import UserError
from lora_utils.io.archive import extract_archive
from lora_utils.lora.weights_zip import LORA_MEMBER
from lora_utils.tracking import contact_sheet
from lora_utils.tracking.html_report import REPORT_FILE
from lora_utils.tracking.metrics import read_metrics
from lora_utils.training import distributed, launch
from lora_utils.training.checkpoint import list_checkpoints
from lora_utils.training.distributed import Ranks
from tests.cog_server import free_port
from tests.helpers import ROOT, inputs, lora_of

CONFIG = TrainConfig(
    steps=8,
    rank=4,
    learning_rate=1e-3,
    batch_size=2,
    resolution="64",
    seed=0,
    train_placeholder_token=True,
    caption_dropout=0.3,
    class_word="square",
    preservation_weight=0.3,
    quantization="none",
)
TWICE = replace(CONFIG, gradient_accumulation=2)


@pytest.fixture
def two_gpus(random_model, monkeypatch):
    """What a machine with two GPUs does, with processes on the CPU."""
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(launch, "gpu_count", lambda: 2)


@pytest.fixture(scope="module")
def run_workers(archive, random_model, tmp_path_factory):
    """Train in so many processes. -> what each of them says of the run"""
    folder = tmp_path_factory.mktemp("workers")
    extract_archive(archive, folder / "images")

    def run(count, config, shard_base="never"):
        said: list[str] = []
        environment = {"CUDA_VISIBLE_DEVICES": "", "CACHE_DIR": str(folder / "cache")}
        worker = ["tests.training.distributed_worker", str(random_model), str(folder / "images")]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch.log, "info", said.append)
            launch.launch([*worker, json.dumps(asdict(config)), shard_base], count, environment)
        lines = [line.partition("{") for line in said if '"rank"' in line]
        return sorted((json.loads(brace + rest) for _, brace, rest in lines), key=lambda one: one["rank"])

    return run


@pytest.fixture(scope="module")
def in_two(run_workers):
    """The run that the others are compared with: two processes, each with all of the base."""
    return run_workers(2, TWICE)


def close(one, other):
    return all(
        losses == pytest.approx(others, rel=1e-5, abs=1e-7)
        for losses, others in zip(one["losses"], other["losses"], strict=True)
    ) and one["norm"] == pytest.approx(other["norm"], rel=1e-5)


# --- the same run ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_with_twice_the_accumulation(run_workers, in_two):
    (alone,) = run_workers(1, replace(CONFIG, gradient_accumulation=4))
    first, second = in_two
    assert first["losses"] == second["losses"], "each process knows them all"
    assert first["digest"] == second["digest"], "and has the same LoRA, bit for bit"
    assert close(alone, first)


@pytest.mark.slow
def test_a_sharded_base_gives_the_same_and_each_process_holds_its_part(run_workers, in_two):
    first, second = run_workers(2, TWICE, "always")
    assert first["digest"] == second["digest"]
    complete = in_two[0]["held"]
    assert [first["held"] / complete, second["held"] / complete] == pytest.approx([0.5, 0.5], abs=0.01)
    assert close(in_two[0], first)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["dora", "lokr"])
def test_other_adapters_are_trained_on_a_sharded_base_too(adapter, run_workers):
    config = replace(TWICE, adapter=adapter)
    (alone, _), (first, second) = (run_workers(2, config, shard) for shard in ("never", "always"))
    assert first["digest"] == second["digest"]
    assert close(alone, first)


@pytest.mark.slow
def test_a_token_that_only_some_processes_see_is_trained_all_the_same(run_workers):
    """An embedding without a gradient here, but with one there: dropped captions of one process, say."""
    given = replace(CONFIG, caption_dropout=0.6, batch_size=1, preservation_weight=0.0, class_word="")
    (alone,) = run_workers(1, replace(given, gradient_accumulation=2))
    first, second = run_workers(2, given)
    assert first["digest"] == second["digest"]
    assert first["norm"] == pytest.approx(alone["norm"], rel=1e-5)


@pytest.mark.parametrize("shard_base", [pytest.param("never", marks=pytest.mark.slow), "always"])
def test_a_run_on_all_gpus_writes_one_file_and_relays_what_is_said(
    shard_base, archive, two_gpus, tmp_path, monkeypatch, capsys
):
    """With previews and a loss on images held out, for which processes with a sharded base must keep in step."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "cache"))
    options = RunOptions(
        run_dir="run",
        save_every=4,
        sample_prompts="a photo of <zwx>",
        sample_steps=2,
        sample_every=4,
        shard_base=shard_base,
    )
    given = inputs(replace(CONFIG, validation_share=0.2), archive, options)
    launch.train_on_all_gpus(given, tmp_path / "weights.zip")
    said = capsys.readouterr().out
    assert "seed 0, 2 processes" in said
    assert ("parts on several GPUs" in said) == (shard_base == "always")
    assert said.count("step 8/8 loss") == said.count("step 8: loss on images held out") == 1
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-000004", "step-000008"]
    assert len(contact_sheet.list_sheets(tmp_path / "run")) == 3
    lines = list(read_metrics(tmp_path / "run"))
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert (tmp_path / "run" / REPORT_FILE).is_file()
    with zipfile.ZipFile(tmp_path / "weights.zip") as packed:
        assert LORA_MEMBER in packed.namelist()


@pytest.mark.slow
def test_torchs_launcher_starts_them_too(archive, random_model, tmp_path):
    """As on several machines, where we start nothing: `accelerate launch` hands over to this one."""
    given = [f"--{name}={value}" for name, value in {"steps": 4, "rank": 2, "resolution": 64, "seed": 0}.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    command += [str(free_port()), "-m", "lora_utils", "train", str(archive), *given]
    command += [f"--output={tmp_path / 'weights.zip'}"]
    environment = {**os.environ, "BASE_MODEL": str(random_model), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("seed 0, 2 processes") == 1
    assert zipfile.is_zipfile(tmp_path / "weights.zip")


# --- the same end ---------------------------------------------------------------------------------------------------


def processes_of_runs():
    """Return those that `launch` has started; torch's compiler, say, keeps others."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            found += [child] if "WORLD_SIZE" in child.environ() else []
    return found


def test_one_that_fails_ends_all_with_its_words(archive, two_gpus, tmp_path):
    given = inputs(replace(CONFIG, placeholder_token="<abc>"), archive)
    with pytest.raises(UserError, match="none of the 10 captions holds the placeholder token '<abc>'"):
        launch.train_on_all_gpus(given, tmp_path / "weights.zip")
    assert not processes_of_runs()
    assert not (tmp_path / "weights.zip").exists()


@pytest.mark.slow
def test_one_that_is_killed_ends_all(archive, two_gpus, tmp_path):
    def kill_the_second():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for child in processes_of_runs():
                if child.environ().get("RANK") == "1" and child.cpu_times().user > 4:  # it has begun
                    child.kill()
                    return
            time.sleep(0.05)

    threading.Thread(target=kill_the_second, daemon=True).start()
    with pytest.raises(UserError):
        launch.train_on_all_gpus(inputs(replace(CONFIG, steps=20000), archive), tmp_path / "weights.zip")
    assert not processes_of_runs()


def test_several_lines_of_an_error_are_all_relayed():
    lines = ["loading", "error: the dataset has 2 problems:", "- a", "- b"]
    assert launch._last_words(lines) == "the dataset has 2 problems:\n- a\n- b"
    assert launch._last_words(["Traceback", "ValueError: x", ""]) == "ValueError: x"


def test_a_cancel_ends_all(monkeypatch):
    class Cancelled(BaseException):
        pass

    def cancel(*_):
        raise Cancelled

    monkeypatch.setattr(launch, "_wait", cancel)
    with pytest.raises(Cancelled):
        launch.launch(["http.server", "0"], 2)
    assert not processes_of_runs()


@pytest.mark.slow
def test_a_stop_reaches_all_and_the_run_can_be_resumed(archive, two_gpus, tmp_path, capsys):
    config = replace(CONFIG, steps=40)
    options = RunOptions(run_dir=str(tmp_path / "run"), save_every=10, resume="auto")

    def has_saved():
        return bool(list_checkpoints(tmp_path / "run"))

    launch.train_on_all_gpus(inputs(config, archive, options), tmp_path / "early.zip", stopped=has_saved)
    assert "of 40, as asked" in capsys.readouterr().out
    assert not processes_of_runs()
    assert 10 <= lora_of(tmp_path / "early.zip")[1]["training_steps"] < 40
    launch.train_on_all_gpus(inputs(config, archive, options), tmp_path / "late.zip")
    launch.train_on_all_gpus(inputs(config, archive), tmp_path / "uninterrupted.zip")
    assert lora_of(tmp_path / "late.zip") == lora_of(tmp_path / "uninterrupted.zip")


def test_a_token_of_the_hub_is_no_option_that_others_could_read(archive, tmp_path, monkeypatch):
    launched = []
    monkeypatch.setattr(
        launch, "launch", lambda module, _count, environment, _stopped: launched.append((module, environment))
    )
    given = inputs(CONFIG, archive, RunOptions(hub_repo="me/it"), hub_token="hf_secret")
    launch.train_on_all_gpus(given, tmp_path / "weights.zip")
    ((module, environment),) = launched
    assert environment == {"HUB_TOKEN": "hf_secret"}, "the operator's HF_TOKEN stays what the model is loaded with"
    assert "hf_secret" not in " ".join(module)


def test_alone_nothing_is_exchanged():
    ranks, weight = Ranks(), nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    distributed.all_reduce_gradients(ranks, [weight])
    assert torch.equal(weight.grad, torch.ones(2))
    assert distributed.broadcast(ranks, "x") == "x"
    assert torch.equal(distributed.all_gather_losses(ranks, torch.arange(3)), torch.arange(3))
    assert ranks.shard([1, 2, 3]) == [1, 2, 3]
    assert Ranks(1, 2).shard([0, 1, 2, 3]) == [1, 3]
    assert "RANK" not in os.environ


def test_a_process_that_has_written_all_ends_well_though_its_libraries_would_not():
    """One was seen to abort while the interpreter ended, after a complete run."""
    script = (
        "import atexit, os; atexit.register(os.abort)\n"
        "from lora_utils.training.distributed import end_process\n"
        "print('done'); end_process(0)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
