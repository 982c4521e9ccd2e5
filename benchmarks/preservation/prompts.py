"""What `preserve_prompts` is worth where there is no class: a style, which changes all other images as it is taught.

For `benchmarks.preservation`. The prompts that are held describe shapes as a user would; none is among those measured.
"""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np

from benchmarks.experiment import Run, Spec, by_arm, corrected, markdown_table, mean_and_error, paired_differences
from benchmarks.subjects import STYLE, SUBJECTS
from benchmarks.teaching import sampled, set_up
from examples import evaluate, shapes
from lora_utils.model.components import Components
from lora_utils.training import loop
from lora_utils.training.state import final_lora

GROUP, TRIGGER, HELD = "prompts", "ohwx", 24
REFERENCE = "nothing held"
SHARES: Mapping[str, Mapping[str, Any]] = {
    REFERENCE: {},
    "a tenth of the batches": {"preservation_weight": 0.1},
    "a quarter of the batches": {"preservation_weight": 0.25},
}
MEASURED = {"fidelity": "style and shape right", "others": "other prompts right", "fit": "their fit"}


def held_prompts(seed: int) -> list[str]:
    """Return different prompts of shapes, none of which `evaluate.held_out_prompts` may hold."""
    rng, found = np.random.default_rng(seed), dict[str, None]()
    while len(found) < HELD:
        prompt = shapes.random_prompt(rng, tok_share=0.0, thing_share=0.0, part_share=0.0)
        if not shapes.is_held_out(prompt):
            found[str(rng.choice(prompt.wordings()))] = None
    return list(found)


def run_style(components: Components, spec: Spec, steps: int | None, prompts: int) -> Run:
    """Teach the style with a share of the batches that holds, and measure both."""
    given = dict(SHARES[spec.arm]) | ({"steps": steps} if steps else {})
    if spec.arm != REFERENCE:
        given["preserve_prompts"] = "\n".join(held_prompts(spec.seed))
    plain_word = {"train_placeholder_token": False, "trigger_word": TRIGGER}
    run = set_up(SUBJECTS[STYLE].images(TRIGGER, spec.seed), spec.seed, {**plain_word, **given})
    for _ in loop.train(run):
        pass
    lora, asked, others = final_lora(run), SUBJECTS[STYLE].prompts(TRIGGER, prompts), evaluate.held_out_prompts(prompts)
    styled, plain = (
        sampled(components, lora, run.placeholders, [item.text for item in some]) for some in (asked, others)
    )
    shown = [SUBJECTS[STYLE].shows(image, item.prompt) for image, item in zip(styled, asked, strict=True)]
    score = evaluate.score(plain, others)
    return {"fidelity": float(np.mean(shown)), "others": score.all_three, "fit": score.fit}


def table(runs: Sequence[Run]) -> str:
    """Return what each share came to, and its differences from none, paired by seed, with p corrected by Holm."""
    arms = by_arm(runs, GROUP)
    differences = {
        (name, metric): paired_differences(own, arms.get(REFERENCE, []), itemgetter(metric))
        for name, own in arms.items()
        for metric in ("fidelity", "others")
        if name != REFERENCE
    }
    compared, rows = corrected(differences), []
    for name in (name for name in SHARES if name in arms):
        cells = [mean_and_error([run[metric] for run in arms[name]]) for metric in MEASURED]
        cells += [compared.get((name, metric), "–") for metric in ("fidelity", "others")]
        rows.append([name, *cells, str(len(arms[name]))])
    return markdown_table(["", *MEASURED.values(), "style, against none", "others, against none", "runs"], rows)
