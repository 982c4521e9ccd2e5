"""A LoRA that was trained with a class word changes what its own words name, and its class stays the base model's."""

import json
import zipfile

import numpy as np
import pytest

from lora_utils.lora.weights_zip import LORA_MEMBER, META_MEMBER
from lora_utils.sampling import sampler
from tests.sampling.calls import PLAIN_PROMPT, SMALL, draw, one, same

NAMED, CLASS = "a photo of <zwx> circle", "a photo of a circle"


@pytest.fixture(scope="module")
def of_class(tmp_path_factory, archives):
    """An archive, its meta.json saying that it was trained with these words."""

    def with_words(archive="token", class_word="circle", trigger_word="", goal="none"):
        path = tmp_path_factory.mktemp("of_class") / "of_class.zip"
        with zipfile.ZipFile(archives / f"{archive}.zip") as source, zipfile.ZipFile(path, "w") as packed:
            packed.writestr(LORA_MEMBER, source.read(LORA_MEMBER))
            meta = json.loads(source.read(META_MEMBER))
            meta["config"] |= {"class_word": class_word, "trigger_word": trigger_word, "goal": goal}
            packed.writestr(META_MEMBER, json.dumps(meta))
        return path

    return with_words


@pytest.fixture
def forwards(monkeypatch):
    """Which LoRAs act in each forward of the transformer, by their indices."""
    acting, original = [], sampler.predict_velocity

    def recorded(transformer, *given):
        hooks = [hook for module in transformer.modules() for hook in module._forward_hooks.values()]
        applied = next((hook.applied for hook in hooks if hasattr(hook, "applied")), None)
        acting.append(set(applied.acting) if applied else set())
        return original(transformer, *given)

    monkeypatch.setattr(sampler, "predict_velocity", recorded)
    return acting


def test_a_prompt_of_the_class_alone_is_the_base_models_bit_for_bit(predictor, of_class, capsys):
    path = of_class()
    assert same(one(predictor, CLASS, replicate_weights=path), one(predictor, CLASS))
    said = capsys.readouterr().out
    assert "the prompt doesn't name <zwx>" in said
    assert "this LoRA for a circle is left out" in said
    changed = one(predictor, CLASS, replicate_weights=path, lora_acts="always")
    assert not same(changed, one(predictor, CLASS))
    assert "left out" not in capsys.readouterr().out


def test_only_the_prompts_forward_has_the_lora_where_the_negative_prompt_does_not_name_it(
    predictor, of_class, forwards
):
    one(predictor, NAMED, replicate_weights=of_class())
    assert forwards == [{0}, set()] * SMALL["steps"]
    forwards.clear()
    one(predictor, NAMED, replicate_weights=of_class(), negative_prompt="an ugly <zwx>")
    assert forwards == [{0}] * SMALL["steps"], "one batch of both"
    forwards.clear()
    one(predictor, NAMED, replicate_weights=of_class(), lora_acts="always")
    assert forwards == [{0}] * SMALL["steps"]


def test_guidance_starts_from_the_base_models_velocity(predictor, of_class, archives):
    """Without guidance nothing tells the two ways apart; with it the image is another one."""
    path, all_acting = of_class(), archives / "token.zip"
    for guidance, equal in ((1.0, True), (4.0, False)):
        kept = one(predictor, NAMED, replicate_weights=path, guidance=guidance)
        assert same(kept, one(predictor, NAMED, replicate_weights=all_acting, guidance=guidance)) == equal


@pytest.mark.parametrize("goal", ["person", "object"])
def test_a_goal_that_is_one_thing_is_as_good_as_a_class(goal, predictor, of_class, forwards):
    one(predictor, NAMED, replicate_weights=of_class(class_word="", goal=goal))
    assert forwards == [{0}, set()] * SMALL["steps"]


@pytest.mark.parametrize("goal", ["none", "style", "else", 7])
def test_a_lora_of_no_one_thing_acts_everywhere(goal, predictor, of_class, forwards):
    one(predictor, CLASS, replicate_weights=of_class(class_word="", goal=goal))
    assert forwards == [{0}] * SMALL["steps"]


def test_a_lora_acts_everywhere_that_has_no_words_or_says_nothing(predictor, of_class, archives, forwards):
    for path in (archives / "token.zip", of_class("baseline", class_word="circle", goal="object")):
        one(predictor, CLASS, replicate_weights=path)
    assert forwards == [{0}] * SMALL["steps"] * 2


def test_a_trigger_word_names_it_too_in_any_capitals(predictor, of_class):
    path = of_class("baseline", trigger_word="TOK")
    assert same(one(predictor, "a circle", replicate_weights=path), one(predictor, "a circle"))
    assert not same(one(predictor, "a tok circle", replicate_weights=path), one(predictor, "a tok circle"))
    assert same(one(predictor, "TOKYO", replicate_weights=path), one(predictor, "TOKYO")), "another word"


def test_each_of_several_loras_acts_by_its_own_words(predictor, of_class, archives, forwards):
    other = str(archives / "baseline.zip")
    one(predictor, NAMED, replicate_weights=of_class(), extra_lora=other)
    assert forwards == [{0, 1}, {1}] * SMALL["steps"]
    forwards.clear()
    both = one(predictor, CLASS, replicate_weights=of_class(), extra_lora=other)
    assert same(both, one(predictor, CLASS, extra_lora=other))


def test_the_tokens_embedding_is_read_in_the_negative_prompt_alone(predictor, of_class, forwards):
    one(predictor, CLASS, replicate_weights=of_class(), negative_prompt="<zwx>")
    assert forwards == [set(), {0}] * SMALL["steps"]


def test_named_is_for_any_lora_that_knows_its_words(predictor, archives, forwards):
    one(predictor, NAMED, replicate_weights=archives / "token.zip", lora_acts="named")
    assert forwards == [{0}, set()] * SMALL["steps"]
    plain = one(predictor, CLASS, replicate_weights=archives / "token.zip", lora_acts="named")
    assert same(plain, one(predictor, CLASS))
    forwards.clear()
    one(predictor, CLASS, replicate_weights=archives / "baseline.zip", lora_acts="named")
    assert forwards == [{0}] * SMALL["steps"], "it has none"


@pytest.mark.parametrize("word", [None, 7, ["circle"]])
def test_a_meta_whose_class_is_no_text_keeps_none(word, predictor, of_class, archives):
    expected = one(predictor, PLAIN_PROMPT, replicate_weights=archives / "token.zip")
    assert same(one(predictor, PLAIN_PROMPT, replicate_weights=of_class(class_word=word)), expected)


def test_images_of_one_call_are_those_of_single_ones(predictor, of_class):
    path = of_class()
    several = draw(predictor, NAMED, replicate_weights=path, num_outputs=2)
    alone = [one(predictor, NAMED, replicate_weights=path, seed=seed) for seed in (5, 6)]
    for a, b in zip(several, alone, strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1


def test_the_cache_of_first_blocks_keeps_the_branches_apart(predictor, of_class):
    fast = one(predictor, NAMED, replicate_weights=of_class(), go_fast=True, steps=6)
    slow = one(predictor, NAMED, replicate_weights=of_class(), steps=6)
    assert np.abs(fast.astype(int) - slow).mean() < 12
