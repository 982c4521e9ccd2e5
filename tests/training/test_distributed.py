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
from lora_utils.tracking import contact_sheet, html_report
from lora_utils.tracking.metrics import read_metrics
from lora_utils.training import distributed
from lora_utils.training.checkpoint import list_checkpoints
from lora_utils.training.launch import _last_words, launch
from lora_utils.training.run import train_on_all_gpus
from tests.cog_server import free_port
from tests.conftest import ROOT
from tests.training.test_checkpoint import lora_of

CONFIG = TrainConfig(
    steps=8, rank=4, learning_rate=1e-3, batch_size=2, resolution="64", seed=0, train_placeholder_token=True,
    caption_dropout=0.3, class_word="square", preservation_weight=0.3, quantization="none",
)  # fmt: skip


@pytest.fixture
def trained(archive, random_model, tmp_path, capsys, monkeypatch):
    """What each of so many processes says of a run."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    extract_archive(archive, tmp_path / "images")

    def run(count, config, shard_base="never"):
        given = json.dumps(asdict(config))
        monkeypatch.setenv("CACHE_DIR", str(tmp_path / f"cache{count}"))
        worker = ["tests.card_worker", str(random_model), str(tmp_path / "images"), given, shard_base]
        launch(worker, count, ROOT)
        lines = [line.partition("{") for line in capsys.readouterr().out.splitlines() if '"rank"' in line]
        said = [json.loads(brace + rest) for _, brace, rest in lines]
        return sorted(said, key=lambda one: one["rank"])

    return run


def test_two_processes_give_the_losses_of_one_with_twice_the_accumulation(trained):
    (alone,) = trained(1, replace(CONFIG, gradient_accumulation=4))
    first, second = trained(2, replace(CONFIG, gradient_accumulation=2))
    assert first["losses"] == second["losses"], "each process knows them all"
    assert first["digest"] == second["digest"], "and has the same LoRA, bit for bit"
    for one, other in zip(alone["losses"], first["losses"], strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-7)
    assert first["norm"] == pytest.approx(alone["norm"], rel=1e-5)


def test_a_base_that_is_shared_out_gives_the_same_and_each_process_holds_its_part(trained):
    given = replace(CONFIG, gradient_accumulation=2)
    whole, _ = trained(2, given)
    first, second = trained(2, given, "always")
    assert first["digest"] == second["digest"]
    assert [first["held"] / whole["held"], second["held"] / whole["held"]] == pytest.approx([0.5, 0.5], abs=0.01)
    for one, other in zip(whole["losses"], first["losses"], strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-7)
    assert first["norm"] == pytest.approx(whole["norm"], rel=1e-5)


def test_a_token_that_only_some_processes_see_is_trained_all_the_same(trained):
    """A row without a gradient here, but with one there: dropped captions of one process, say."""
    given = replace(CONFIG, caption_dropout=0.6, batch_size=1, preservation_weight=0.0, class_word="")
    (alone,) = trained(1, replace(given, gradient_accumulation=2))
    first, second = trained(2, given)
    assert first["digest"] == second["digest"]
    assert first["norm"] == pytest.approx(alone["norm"], rel=1e-5)


@pytest.mark.parametrize("shard_base", ["never", "always"])
def test_a_run_on_all_cards_writes_one_file_and_relays_what_is_said(
    shard_base, archive, random_model, tmp_path, monkeypatch, capsys
):
    """With samples and a loss on images held out, for which processes that share a base out must keep in step."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(distributed, "several", lambda: 2)
    options = RunOptions(
        run_dir="run", save_every=4, sample_prompts="a photo of <zwx>", sample_steps=2, sample_every=4,
        shard_base=shard_base,
    )  # fmt: skip
    config = replace(CONFIG, validation_share=0.2)
    train_on_all_gpus(config, options, archive, tmp_path / "weights.zip")
    said = capsys.readouterr().out
    assert "seed 0, 2 GPUs" in said
    assert ("parts on several GPUs" in said) == (shard_base == "always")
    assert said.count("step 8/8 loss") == said.count("step 8: loss on images held out") == 1
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-000004", "step-000008"]
    assert len(contact_sheet.list_sheets(tmp_path / "run")) == 3
    lines = list(read_metrics(tmp_path / "run"))
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert (tmp_path / "run" / html_report.REPORT_FILE).is_file()
    with zipfile.ZipFile(tmp_path / "weights.zip") as packed:
        assert LORA_MEMBER in packed.namelist()


def processes_of_runs():
    """Those that `launch` has started; torch's compiler, say, keeps others."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            found += [child] if "WORLD_SIZE" in child.environ() else []
    return found


def test_one_that_fails_ends_all_with_its_words(archive, random_model, tmp_path, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(distributed, "several", lambda: 2)
    config = replace(CONFIG, placeholder_token="<abc>")
    with pytest.raises(UserError, match="none of the 10 captions holds the placeholder token '<abc>'"):
        train_on_all_gpus(config, RunOptions(), archive, tmp_path / "weights.zip")
    assert not processes_of_runs()
    assert not (tmp_path / "weights.zip").exists()


def test_one_that_is_killed_ends_all(archive, random_model, tmp_path, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(distributed, "several", lambda: 2)

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
        train_on_all_gpus(replace(CONFIG, steps=20000), RunOptions(), archive, tmp_path / "weights.zip")
    assert not processes_of_runs()


def test_several_lines_of_an_error_are_all_relayed():
    lines = ["loading", "error: the dataset has 2 problems:", "- a", "- b"]
    assert _last_words(lines) == "the dataset has 2 problems:\n- a\n- b"
    assert _last_words(["Traceback", "ValueError: x", ""]) == "ValueError: x"


def test_torchs_launcher_starts_them_too(archive, random_model, tmp_path):
    """As on several machines, where we start nothing: `accelerate launch` hands over to this one."""
    given = [f"--{name}={value}" for name, value in {"steps": 4, "rank": 2, "resolution": 64, "seed": 0}.items()]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    command += ["-m", "lora_utils", "train", str(archive), *given, f"--output={tmp_path / 'weights.zip'}"]
    environment = {**os.environ, "BASE_MODEL": str(random_model), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("seed 0, 2 GPUs") == 1
    assert zipfile.is_zipfile(tmp_path / "weights.zip")


def test_a_cancel_ends_all(tmp_path, monkeypatch):
    class Cancelled(BaseException):
        pass

    def cancel(*_):
        raise Cancelled

    monkeypatch.setattr(distributed, "_wait", cancel)
    with pytest.raises(Cancelled):
        launch(["http.server", "0"], 2, ROOT)
    assert not processes_of_runs()


def test_a_stop_of_the_one_that_started_them_reaches_all_and_the_run_can_be_gone_on_with(
    archive, random_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(distributed, "several", lambda: 2)
    config, options = replace(CONFIG, steps=60), RunOptions(run_dir=str(tmp_path / "run"), save_every=10, resume="auto")

    def has_saved():
        return bool(list_checkpoints(tmp_path / "run"))

    train_on_all_gpus(config, options, archive, tmp_path / "early.zip", stopped=has_saved)
    assert "of 60, as asked" in capsys.readouterr().out
    assert not processes_of_runs()
    assert 10 <= lora_of(tmp_path / "early.zip")[1]["training_steps"] < 60
    train_on_all_gpus(config, options, archive, tmp_path / "late.zip")
    train_on_all_gpus(config, RunOptions(), archive, tmp_path / "whole.zip")
    assert lora_of(tmp_path / "late.zip")[0] == lora_of(tmp_path / "whole.zip")[0]


def test_a_token_of_the_hub_is_no_option_that_others_could_read(archive, tmp_path, monkeypatch):
    launched = []
    monkeypatch.setattr(
        distributed, "launch", lambda command, _count, _root, secrets, _stopped: launched.append((command, secrets))
    )
    options = RunOptions(hub_repo="me/it")
    train_on_all_gpus(CONFIG, options, archive, tmp_path / "weights.zip", hub_token="hf_secret")
    ((command, secrets),) = launched
    assert secrets == {"HF_TOKEN": "hf_secret"}
    assert "hf_secret" not in " ".join(command)


def test_alone_nothing_is_exchanged():
    ranks, weight = distributed.Ranks(), nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    distributed.all_reduce_gradients(ranks, [weight])
    assert torch.equal(weight.grad, torch.ones(2))
    assert distributed.broadcast(ranks, "x") == "x"
    assert torch.equal(distributed.all_gather_losses(ranks, torch.arange(3)), torch.arange(3))
    assert ranks.part([1, 2, 3]) == [1, 2, 3]
    assert distributed.Ranks(1, 2).part([0, 1, 2, 3]) == [1, 3]
    assert "RANK" not in os.environ
