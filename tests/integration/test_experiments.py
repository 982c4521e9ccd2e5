"""The experiments on what teaches best and what holds a class: a short form of each runs, and its table is right."""

import numpy as np
import pytest
import torch

from benchmarks import experiment
from benchmarks.preservation import prompts as preserved_prompts
from benchmarks.preservation import report as preservation_report
from benchmarks.preservation import run as preservation_run
from benchmarks.preservation.ways import WAYS
from benchmarks.recipes import report as recipe_report
from benchmarks.recipes import run as recipe_run
from benchmarks.recipes.moves import MOVES
from benchmarks.recipes.peers import OURS, RECIPES, STYLES
from benchmarks.subjects import STYLE, SUBJECTS, inked
from benchmarks.teaching import PACE, set_up
from examples import evaluate, shapes
from lora_utils.config import TrainConfig
from lora_utils.model.adapter_sizes import adapted_layers


@pytest.mark.parametrize("name", [*RECIPES, *MOVES, *STYLES])
def test_each_recipe_is_one_of_this_package_and_names_its_source(name):
    recipe = {**RECIPES, **MOVES, **STYLES}[name]
    config = TrainConfig(**recipe.given, seed=0)
    adapted = adapted_layers(config.lora_targets, 6)
    assert len(set(map(len, adapted))) == 1, "the same layers of each block"
    assert recipe.source


def test_two_resolutions_are_trained_at():
    move = MOVES["two resolutions"]
    taught = SUBJECTS["fish"].images(recipe_run.RARE_WORD, 0).enlarged(move.side_px)
    run = set_up(taught, 0, move.given, beside={})
    assert {example.size.width_px for example in run.data.examples} == {64, 96}


def test_a_larger_alpha_is_a_larger_rate_of_the_second_matrix_alone():
    """LoRA+ under AdamW, but for the clipping and the decay: `moves` has its ratios as alphas."""

    def change(alpha, ratio):
        generator = torch.Generator().manual_seed(0)
        first, target = (torch.randn(2, 5, generator=generator, dtype=torch.float64) for _ in range(2))
        first, second = first.requires_grad_(), torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
        groups = [{"params": [first], "lr": 1e-2}, {"params": [second], "lr": 1e-2 * ratio}]
        optimizer = torch.optim.AdamW(groups, eps=0.0, weight_decay=0.0)
        for _ in range(4):
            optimizer.zero_grad()
            (alpha * second @ first - target).square().sum().backward()
            if first.grad is not None and not first.grad.any():
                first.grad = None  # B is zero at the first step: without eps AdamW would divide 0 by 0
            optimizer.step()
        return (alpha * second @ first).detach()

    torch.testing.assert_close(change(alpha=4.0, ratio=1.0), change(alpha=1.0, ratio=4.0))


def test_ours_is_what_a_training_does_by_default():
    default = TrainConfig(seed=0)
    assert {name: getattr(default, name) for name in OURS} == OURS


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_short_form_of_each_way_of_holding_a_class_runs(way):
    measured = preservation_run.run_way(experiment.Spec("ways", way, "fish", 0), steps=5, prompts=4)
    assert set(measured) == set(preservation_report.MEASURED)
    assert measured["class_kept"] == 1.0, "after so few steps"


@pytest.mark.slow
def test_the_class_is_right_without_a_lora():
    measured = preservation_run.run_way(experiment.Spec(preservation_run.BASE, "no LoRA", "fish", 0), prompts=4)
    assert measured["class_kept"] == 1.0


@pytest.mark.slow
def test_a_short_form_of_holding_prompts_runs():
    spec = experiment.Spec(preserved_prompts.GROUP, "a tenth of the batches", STYLE, 0)
    measured = preservation_run.run_way(spec, steps=5, prompts=4)
    assert set(measured) == set(preserved_prompts.MEASURED)
    assert measured["others"] == 1.0, "after so few steps"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "arm"),
    [(preservation_run.run_way, "orthogonal, 99 %"), (recipe_run.run_recipe, "ours, by a token, where it is named")],
)
def test_steps_are_timed_in_runs_of_their_own(run, arm):
    measured = run(experiment.Spec(PACE, arm, "fish", 0))
    assert set(measured) == {"seconds_a_step"}
    assert 0.0 < measured["seconds_a_step"] < 10.0


def test_no_prompt_that_is_held_is_measured():
    measured = {item.text for item in evaluate.held_out_prompts(preservation_run.PROMPTS)}
    assert not measured & {text for seed in range(8) for text in preserved_prompts.held_prompts(seed)}


def test_the_table_of_ways_compares_in_pairs():
    def run(arm, seed, fidelity):
        rest = {"named": 0.8, "in_new_words": 0.25, "class_kept": 1.0, "others": 0.5}
        return {"group": "ways", "arm": arm, "kind": "fish", "seed": seed, "fidelity": fidelity, **rest}

    runs = [run(preservation_report.REFERENCE, seed, 0.8) for seed in range(3)]
    runs += [run("a tenth of the batches", seed, 0.5 + 0.2 * seed) for seed in range(2)]
    runs += [
        {"group": PACE, "arm": arm, "kind": "fish", "seed": 0, "seconds_a_step": seconds}
        for arm, seconds in ((preservation_report.REFERENCE, 2.0), ("a tenth of the batches", 3.0))
    ]
    cells = preservation_report.table(runs).splitlines()[-1].strip("| ").split(" | ")
    assert cells[:4] == ["a tenth of the batches", "0.80 ± 0.00", "0.60 ± 0.10", "0.25 ± 0.00"]
    assert cells[4:6] == ["1.00 ± 0.00", "0.50 ± 0.00"]
    assert cells[6:] == ["+0 (p 1.000)", "-0.200 (p 1.000)", "1.50", "2"], "the third seed has no pair"
    assert preservation_report.table(runs).splitlines()[2].split(" | ")[6:8] == ["+0 (p 1.000)", "–"], "the reference"
    of_default = preservation_report.default_table(runs).splitlines()[-1].strip("| ").split(" | ")
    assert of_default[:3] == [preservation_report.REFERENCE, "+0 (p 1.000)", "-0.200 (p 1.000)"]
    assert of_default[-1] == "2", "pairs"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "name", "subject"),
    [
        *(("recipes", "musubi-tuner", subject) for subject in SUBJECTS),
        ("moves", "two resolutions", "fish"),
        ("moves", "A from the layer's own directions", "fish"),
        ("styles", "rate 2e-4", STYLE),
    ],
)
def test_a_short_form_of_the_recipes_runs(group, name, subject):
    length = recipe_run.Length(steps=4, measured_at=(2, 4), prompts=4, sampling_steps=2)
    run = recipe_run.run_recipe(experiment.Spec(group, name, subject, 0), length)
    assert [point["step"] for point in run["points"]] == [0, 2, 4]
    assert all(point["fidelity"] == 0.0 for point in run["points"]), "after so few steps"


def test_a_recipe_is_read_where_it_reaches_the_fidelity():
    def run(arm, *fidelities):
        points = [{"step": 100 * i, "fidelity": f, "base_accuracy": 1.0} for i, f in enumerate(fidelities)]
        return {"group": "recipes", "arm": arm, "kind": "house", "seed": 0, "points": points}

    runs = [run("ours", 0.0, 0.8, 1.0), run("fal", 0.0, 0.1, 0.2, 0.3), run("diffusers", 0.0, 0.1, 0.2, 0.2, 0.4)]
    named = run("ours, where it is named", 0.0, 0.9, 1.0)
    assert recipe_report.ours_table([*runs, named]).splitlines()[-1] == (
        "| ours, where it is named, minus ours | -50 (p 1.000) | +0 (p 1.000) | +0 (p 1.000) | 1 |"
    )
    assert recipe_report.best_peer(runs) == "fal"
    timed = [{"group": PACE, "arm": arm, "seconds_a_step": seconds} for arm, seconds in (("ours", 0.02), ("fal", 0.03))]
    timed.append({**timed[0], "seconds_a_step": 0.04})
    rows = recipe_report.table(recipe_report.paced([*runs, *timed]), "recipes", "fal").splitlines()
    assert rows[2] == "| ours | 1 of 1 | 150 | 4.50 | 1.00 | 1.00 | 1.00 | -150 (p 1.000) |"
    assert rows[4] == "| fal | 0 of 1 | 300 | 9.00 | 1.00 | 0.30 | 0.30 | – |", "all that it took"
    assert rows[3].startswith("| diffusers | 0 of 1 | 400 | – |"), "its steps weren't timed"
    assert recipe_report.early_fidelity(runs[2]) == 0.2, "at 300 of its 400 steps"
    assert recipe_report.early_fidelity(runs[0]) == 1.0, "it ended at 200"
    rates = [
        {**run(f"rate {rate}", *fidelities), "group": "styles"}
        for rate, *fidelities in (("2e-4", 0.0, 0.2, 0.4), ("5e-4", 0.0, 0.5, 0.7))
    ]
    for each in rates:
        each["points"] = [{**point, "step": 10 * point["step"]} for point in each["points"]]
    row = recipe_report.rates_table(rates).splitlines()[-1]
    assert row == (
        "| rate 5e-4 minus rate 2e-4 | +0.300 (p 1.000) | +0.100 (p 1.000) | +0.300 (p 1.000) | +0 (p 1.000) | 1 |"
    )
    moved = [{**run("rank 1", 0.0, 0.2, 0.5, 0.9), "group": "moves"}, run("ours", 0.0, 0.1)]
    rows = recipe_report.table(recipe_report.moves_and_base([*moved, named]), "moves", recipe_report.BASE_ROW)
    assert [row.split(" | ")[0] for row in rows.splitlines()[2:]] == ["| unchanged", "| rank 1"]
    assert rows.endswith("| 0.90 | 0.90 | +200 (p 1.000) |"), "against where it is named, which an object's LoRA is"
    assert recipe_report.moves_part("house", [*moved, named], "steps")[-1] == rows
    assert not recipe_report.moves_part("house", runs, "steps"), "nothing was changed"
    rows = recipe_report.table([*runs, named], "recipes", "fal", "best fidelity").splitlines()
    assert rows[2].endswith("| +0.700 (p 1.000) |")
    unsteady = run("ours", 0.0, 0.95, 0.5, 0.9, 0.95)["points"]
    assert recipe_report.reached(unsteady) == unsteady[2:4], "one measurement that the next one denies doesn't count"


def test_a_drawing_in_the_style_is_read_and_one_that_is_not_is_not():
    for subject in SUBJECTS.values():
        taught = subject.images("ohwx", 3)
        assert len(taught.images) == len(taught.captions) in (15, 24)
        assert all("ohwx" in caption for caption in taught.captions)
    asked = SUBJECTS[STYLE].prompts("ohwx", 40)
    assert len({item.text for item in asked}) == 40
    for item in asked:
        drawn = shapes.draw(shapes.scene_of(item.prompt, np.random.default_rng(0)))
        assert SUBJECTS[STYLE].shows(shapes.to_image(inked(drawn)), item.prompt), item.text
    scene = shapes.Scene("ring", "gray", 18.0, (32.0, 32.0), "red")
    plain, prompt = shapes.draw(scene), shapes.Prompt("ring")
    shows = SUBJECTS[STYLE].shows
    assert shows(shapes.to_image(inked(plain)), prompt)
    assert not shows(shapes.to_image(inked(plain)), shapes.Prompt("bar"))
    assert not shows(shapes.to_image(plain), prompt)
    assert not shows(shapes.to_image(plain * 0 + 60.0), prompt)
