"""Any text is a prompt, and what looks like a misspelt token is hinted at."""

import pytest

from tests.sampling.calls import one


@pytest.mark.parametrize("text", ["<html>", "<b>bold</b>", "<think>", "<zwx>", "a < b > c", "<|im_end|>", "<>"])
def test_angle_brackets_in_a_prompt_are_text_to_draw(text, predictor, capsys):
    one(predictor, f'a sign that reads "{text}"', negative_prompt=text)
    assert "hint" not in capsys.readouterr().out


def test_only_a_near_spelling_of_a_token_is_hinted_at(predictor, archives, capsys):
    one(predictor, "<zwx> beside <ZWX>, <zwxs> and <html>", replicate_weights=archives / "token.zip")
    hints = [line for line in capsys.readouterr().out.splitlines() if line.startswith("hint")]
    assert hints == [
        "hint: the prompt holds '<ZWX>', and the weights define <zwx>",
        "hint: the prompt holds '<zwxs>', and the weights define <zwx>",
    ]


@pytest.mark.parametrize("prompt", ["a photo of zwx", "a photo of < zwx >", "a photo of <ZWX>", "a red circle"])
def test_a_prompt_without_the_token_is_sampled_with_a_hint(prompt, predictor, archives, capsys):
    one(predictor, prompt, replicate_weights=archives / "token.zip")
    assert capsys.readouterr().out.count("hint: the prompt doesn't hold <zwx>, written exactly so") == 1


def test_a_prompt_longer_than_the_model_reads_is_said_and_not_cut_in_silence(predictor, capsys):
    one(predictor, "red " * 600)
    assert "tokens; the model was trained on up to 512" in capsys.readouterr().out
    one(predictor, "red " * 1100)
    assert "tokens; the model reads 1024, the rest is cut off" in capsys.readouterr().out


@pytest.mark.parametrize("prompt", ["", "🍄 ein Pilz {0} %s", "\n", '"quoted" <|im_end|>'])
def test_any_text_is_a_prompt(prompt, predictor):
    assert one(predictor, prompt).shape == (64, 64, 3)
