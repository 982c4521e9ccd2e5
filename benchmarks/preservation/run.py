"""One training in one of the ways, and what is measured after it. It doesn't know how runs are compared."""

from collections.abc import Sequence
from functools import lru_cache

from PIL import Image

from benchmarks.experiment import Run, Spec
from benchmarks.preservation import prompts as preserved_prompts
from benchmarks.preservation.changes import Bench
from benchmarks.preservation.ways import CLASSES, WAYS
from benchmarks.teaching import PACE, PACE_STEPS, class_prompts, images_of, sampled, seconds_a_step, set_up
from examples import evaluate, shapes
from examples.demo import MODEL, TOKEN
from lora_utils.model.components import load_components
from lora_utils.model.device import default_placement
from lora_utils.placeholder.tokens import no_placeholders
from lora_utils.training import loop
from lora_utils.training.state import final_lora

PROMPTS = 40
BASE = "base"  # the group of the model as it is, whose only arm has no LoRA


@lru_cache(maxsize=1)
def _bench() -> Bench:
    return Bench(load_components(MODEL, default_placement()))


def run_way(spec: Spec, steps: int | None = None, prompts: int = PROMPTS) -> Run:
    """Train in one way, with the seed's images, order and noise, and measure: its steps alone, if that's its group."""
    if spec.group == preserved_prompts.GROUP:
        return preserved_prompts.run_style(_bench().components, spec, steps, prompts)
    bench, noun = _bench(), CLASSES[spec.kind]
    plain = class_prompts(noun, prompts)
    if spec.group == BASE:
        images = evaluate.sample_ours(bench.components, [item.text for item in plain], no_placeholders())
        return {"class_kept": evaluate.score(images, plain).all_three}
    way, steps = WAYS[spec.arm], PACE_STEPS if spec.group == PACE else steps
    naming = shapes.Prompt(f"{TOKEN} {noun}")
    given = {**way.given, **({"class_word": noun} if way.holds else {}), **({"steps": steps} if steps else {})}
    run = set_up(images_of(naming, spec.seed, kind=spec.kind), spec.seed, given)
    with way.applied(bench, run, noun, spec.seed) as after_step:
        if spec.group == PACE:
            return {"seconds_a_step": seconds_a_step(run, after_step)}
        for _ in loop.train(run):
            after_step()
    lora, placeholders = final_lora(run), run.placeholders

    def shown(asked: Sequence[evaluate.Asked], named: bool = False) -> list[Image.Image]:
        return sampled(bench.components, lora, placeholders, [item.text for item in asked], named)

    objects = evaluate.object_prompts(naming, prompts)
    others = [item for item in evaluate.held_out_prompts(2 * prompts) if item.prompt.noun != noun][: prompts // 2]
    images = shown(objects)
    new = [index for index, item in enumerate(objects) if says_new_words(item.prompt)]
    in_new = [images[index] for index in new], [objects[index] for index in new]
    return {
        "named": evaluate.score(shown(objects, named=True), objects, spec.kind).kind,
        "fidelity": evaluate.score(images, objects, spec.kind).kind,
        "in_new_words": evaluate.score(*in_new, spec.kind).kind,
        "class_kept": evaluate.score(shown(plain), plain).all_three,
        "others": evaluate.score(shown(others), others).all_three,
    }


def says_new_words(prompt: shapes.Prompt) -> bool:
    """Return whether a prompt names what no caption here does: a size or a place."""
    return bool(prompt.size or prompt.place)
