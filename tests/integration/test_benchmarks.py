"""The experiments' statistics are right, and a short form of each runs."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import experiment, start, trace
from benchmarks.speed.jobs import PRESETS, Job
from benchmarks.speed.methods import METHODS
from benchmarks.speed.timing import seconds_of
from benchmarks.true_size import rehearsal
from benchmarks.true_size.hub_layout import SMALL
from benchmarks.zero_prior import plan as zero_prior_plan
from benchmarks.zero_prior import report as zero_prior_report
from benchmarks.zero_prior import run as zero_prior_run
from benchmarks.zero_prior.arms import ARMS, PAYS
from examples import demo
from lora_utils.model.components import load_components
from lora_utils.model.device import Placement, default_placement
from lora_utils.model.text_encoder import pad_embeddings


def points(*fidelities, metric=()):
    return [{"fidelity": f, "m": m} for f, m in zip(fidelities, metric or fidelities, strict=True)]


def test_a_metric_at_matched_fidelity_lies_on_the_line_between_two_measurements():
    curve = points(0.0, 0.4, 0.8, 0.6, metric=(1.0, 0.9, 0.7, 0.1))
    assert zero_prior_report.at_fidelity(curve, "m", 0.6) == pytest.approx(0.8)
    assert zero_prior_report.at_fidelity(curve, "m", 0.8) == pytest.approx(0.7)
    assert zero_prior_report.at_fidelity(curve, "m", 0.9) is None


def test_the_sign_flip_test_counts_every_way_to_draw_the_signs():
    assert experiment.sign_flip_p([1.0, 1.0, 1.0]) == 2 / 8
    assert experiment.sign_flip_p([1.0, -1.0]) == 1.0
    assert experiment.sign_flip_p([0.0] * 30) == 1.0
    assert experiment.sign_flip_p([1.0] * 30) == 2 / 2**30, "all of them are counted, none is sampled"
    assert experiment.sign_flip_p([0.1, 0.2, 0.3]) == experiment.sign_flip_p([1.0, 2.0, 3.0]) == 2 / 8
    assert experiment.sign_flip_p([0.3, -0.1, -0.2]) == 1.0, "but for rounding its mean is 0"
    assert experiment.sign_flip_p([1.0, 1.0, 1.0, -1.0]) == 10 / 16


def test_p_values_are_corrected_by_holms_method():
    assert experiment.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert experiment.holm([0.9, 0.8]) == [1.0, 1.0]


def test_differences_are_paired_by_object_and_seed():
    def run(kind, seed, value):
        return {"kind": kind, "seed": seed, "value": value}

    mine = [run("house", 0, 0.5), run("house", 1, 0.7), run("fish", 0, None)]
    theirs = [run("house", 1, 0.4), run("house", 0, 0.5), run("fish", 0, 0.1)]
    differences = experiment.paired_differences(mine, theirs, lambda one: one["value"])
    assert differences == pytest.approx([0.0, 0.3])


@pytest.mark.slow
def test_a_short_form_of_the_zero_prior_experiment_runs_and_resumes(random_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zero_prior_plan, "WORK", tmp_path / "work")
    monkeypatch.setattr(zero_prior_plan, "KEPT", tmp_path / "runs.jsonl")
    length = zero_prior_run.Length(steps=4, measured_at=(0, 4), token_prompts=5, plain_prompts=4, prior_prompts=2)
    specs = zero_prior_plan.plan(["arms", "remedies"], ["house"], seeds=2)
    some = [spec for spec in specs if spec.arm in {"prior word, row trained", "phrase", "fresh token, trained"}]
    more = zero_prior_plan.plan(["pays"], ["house"], seeds=1)
    some += [spec for spec in more if spec.arm.startswith(("2 embeddings,", "two look-alikes,"))]
    folder = zero_prior_plan.execute(some, random_model, length, processes=2)
    runs = experiment.load(folder)
    assert {(run["arm"], run["seed"]) for run in runs} == {(spec.arm, spec.seed) for spec in some}
    assert all([point["step"] for point in run["points"]] == [0, 4] for run in runs)
    shares = {run["arm"]: run["points"][-1]["row_share"] for run in runs}
    assert shares["phrase"] is None
    assert len(list(folder.glob("pays-two_look-alikes_trained-house-0-*.png"))) == 10, "five of each object"
    assert "| 2 embeddings | +0 (p 1.000) |" in zero_prior_report.pays_table(experiment.by_arm(runs, "pays"))
    assert shares["fresh token, trained"] > runs[0]["points"][0]["row_share"]

    capsys.readouterr()
    zero_prior_plan.execute(some, random_model, length, processes=2)
    assert f"{len(some)} runs, 0 to do" in capsys.readouterr().out

    experiment.keep(folder, zero_prior_plan.KEPT)
    monkeypatch.setattr(zero_prior_plan, "WORK", tmp_path / "elsewhere")
    folder = zero_prior_plan.execute(some, random_model, length, processes=2)
    assert f"{len(some)} runs, 0 to do" in capsys.readouterr().out, "a clone has the kept results"
    assert experiment.load(folder) == runs
    page = zero_prior_report.write(runs, folder, tmp_path).read_text()
    assert "| fresh token, trained |" in page
    assert (tmp_path / "zero_prior.png").stat().st_size > 1000
    assert json.loads((folder / f"{some[0].name}.json").read_text())["kind"] == "house"


def test_two_look_alikes_are_taught_by_a_token_each(random_model):
    base = load_components(random_model, default_placement())
    bench = zero_prior_run.Bench(random_model, base, zero_prior_run.Length(steps=1, measured_at=()))
    run = zero_prior_run.prepare_arm(bench, PAYS["two look-alikes, trained"], "fish", 0)
    captions = [example.caption for example in run.data.examples]
    assert [sum(token in caption for caption in captions) for token in ("<zwx>", "<zwy>")] == [8, 8]
    assert run.placeholders.tokens == ("<zwx>", "<zwy>")
    kinds, asked = zero_prior_run.taught_prompts(PAYS["two look-alikes, trained"].naming("fish"), 4)
    assert kinds == ["fish", "fish", "perch", "perch"]
    assert ["<zwy>" in question.text for question in asked] == [False, False, True, True]


def test_paired_arms_differ_in_the_name_of_the_object_and_in_nothing_else(random_model):
    base = load_components(random_model, default_placement())
    bench = zero_prior_run.Bench(random_model, base, zero_prior_run.Length(steps=1, measured_at=()))
    prepared = {name: zero_prior_run.prepare_arm(bench, arm, "fish", 3) for name, arm in ARMS.items()}
    reference = prepared["fresh token, trained"]
    for name, run in prepared.items():
        (naming,) = ARMS[name].naming("fish").values()
        pairs = list(zip(run.data.examples, reference.data.examples, strict=True))
        assert all(torch.equal(one.latents, other.latents) for one, other in pairs)
        assert all(torch.equal(one, other) for one, other in zip(run.lora, reference.lora, strict=True))
        same = {(one.caption.replace(naming.noun, demo.TOKEN), other.caption) for one, other in pairs}
        assert name == "phrase" or all(one == other for one, other in same)
        trained = [row for row in run.placeholders.embeddings if row.requires_grad]
        assert len(trained) == (ARMS[name].row == "trained")


def test_the_ways_that_are_timed_train_the_same_model_on_the_same_batch():
    place = Placement(torch.device("cpu"), torch.float32)
    losses = []
    for checkpointed in (0, 6):
        job = Job(PRESETS["tiny"], place, rank=4, batch=2, checkpointed=checkpointed)
        losses += [
            METHODS[method](job)() for method in ("ours", "plain")
        ]  # of the first step, where no LoRA has learned yet
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)


def test_the_token_is_timed_on_a_text_of_the_same_length(monkeypatch):
    lengths, join = [], pad_embeddings
    monkeypatch.setattr(
        "lora_utils.training.loss.pad_embeddings", lambda states: lengths.append(len(states[0])) or join(states)
    )
    job = Job(PRESETS["tiny"], default_placement(), rank=4, batch=2, checkpointed=0)
    for method in ("ours", "token"):
        METHODS[method](job)()
    assert lengths == [PRESETS["tiny"].text_tokens] * 2


def test_the_ways_are_timed_in_turns_after_a_warm_up():
    calls = []
    seconds_of({"one": lambda: calls.append("one"), "other": lambda: calls.append("other")}, rounds=2)
    assert calls == ["one", "other"] * 3


@pytest.mark.slow
def test_the_time_to_a_first_step_and_a_first_image_is_measured(random_model, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = [row.split(" | ") for row in start.table(random_model)[2:]]
    assert [row[0].split(": ")[0] for row in rows] == ["| train"] * 4 + ["| predict"] * 4
    assert rows[2][0].endswith("the first step taken")
    assert rows[6][0].endswith("sampled in 20 steps")
    for process in (rows[:4], rows[4:]):
        since = [float(row[1]) for row in process]
        assert since == sorted(since)
        assert since[0] > 0


# --- the rehearsal and the trace --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("edit", [[], ["--edit"]], ids=["from text", "editing"])
def test_the_rehearsal_trains_and_predicts_and_leaves_nothing(edit, tmp_path, capsys):
    """At small widths, through the very commands and files of the true size."""
    folder = tmp_path / "rehearsal"
    assert rehearsal.main([str(folder), "--blocks", "2", "--text-layers", "2", "--side", "64", *edit], SMALL) == 0
    said = capsys.readouterr().out
    assert "GB of disk are needed" in said
    assert "| memory that can't be taken back, at most | 0." in said
    assert "training: memory: " in said
    assert re.search(r"read from the disk until then \| [\d.]+ GB, [\d.]+ GB/s \|", said)
    assert not folder.exists()


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rehearsal.shutil, "disk_usage", lambda _folder: SimpleNamespace(free=10**9))
    monkeypatch.setattr(rehearsal, "write_folder", lambda *_: pytest.fail("it was written"))
    assert rehearsal.main([str(tmp_path / "rehearsal")]) == 1
    said = capsys.readouterr()
    assert "59.7 GB of disk are needed, 1.0 GB are free" in said.out
    assert "fewer --blocks" in said.err
    assert not (tmp_path / "rehearsal").exists()


@pytest.mark.slow
def test_the_trace_prints_where_a_step_goes_and_what_each_gpu_takes(capsys):
    trace.main(["--preset", "tiny", "--against", "plain", "--checkpointed", "2"])
    said = capsys.readouterr().out
    assert re.search(r"ours: [\d.]+ TFLOP, \d+ kernels move", said)
    assert "| addmm |" in said
    assert re.search(r"\| H200 \| \d+ \| \d+ \| [\d.]+ \| \d+ \| [\d.]+ \|", said)
    trace.main(["--preset", "tiny", "--sampling"])
    assert "norm_rope" in capsys.readouterr().out


@pytest.mark.slow
def test_a_step_that_edits_has_the_stock_models_products_and_moves_less():
    """Of tokens with two levels of noise, as Qwen-Image-Edit-2511 has them."""
    job = Job(PRESETS["tiny"], Placement(torch.device("cpu"), torch.bfloat16), 4, 2, 0, edit=True)
    ours, plain = (trace.trace_training(job, method) for method in ("ours", "plain"))
    assert ours.flops == pytest.approx(plain.flops, rel=0.01)
    assert ours.bytes < 0.7 * plain.bytes
    assert ours.kept_bytes < 0.7 * plain.kept_bytes
    sampled = trace.trace_sampling(job)
    assert sampled.flops > 1.5 * trace.trace_sampling(replace(job, edit=False)).flops


@pytest.mark.slow
def test_compiled_blocks_are_traced_by_what_the_compiler_plans():
    job = Job(PRESETS["wide"], Placement(torch.device("cpu"), torch.bfloat16), 32, 1, 0)
    eager, compiled = trace.trace_training(job, "ours"), trace.trace_compiled(job)
    assert compiled.flops == pytest.approx(eager.flops, rel=0.05)
    assert 0.8 < compiled.bytes / eager.bytes < 1.05
    names = {kernel.name for kernel in compiled.kernels}
    assert "fused" in names
    assert any("norm_rope" in name for name in names)
