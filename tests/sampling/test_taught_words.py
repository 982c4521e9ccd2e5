"""The words that weights were taught by: what `[trigger]` in a prompt stands for, and what is hinted at."""

import json
import zipfile

import pytest

from lora_utils.lora.weights_zip import LORA_MEMBER, META_MEMBER
from tests.sampling.calls import TOKEN_PROMPT, one, same


@pytest.fixture(scope="module")
def worded(tmp_path_factory, archives):
    """The archive without a token, its meta.json saying another trigger word."""

    def with_word(word):
        path = tmp_path_factory.mktemp("worded") / "worded.zip"
        with zipfile.ZipFile(archives / "baseline.zip") as source, zipfile.ZipFile(path, "w") as packed:
            packed.writestr(LORA_MEMBER, source.read(LORA_MEMBER))
            meta = json.loads(source.read(META_MEMBER))
            meta["config"]["trigger_word"] = word
            packed.writestr(META_MEMBER, json.dumps(meta))
        return path

    return with_word


@pytest.mark.parametrize("mark", ["[trigger]", "[Trigger]", "[TRIGGER]"])
@pytest.mark.parametrize("word", ["ohwx", "<ohwx>", "小猫"])
def test_the_mark_in_a_prompt_is_the_word_that_the_weights_were_taught(mark, word, predictor, worded):
    path = worded(word)
    named = one(predictor, f"a {word} wall", replicate_weights=path)
    assert same(one(predictor, f"a {mark} wall", replicate_weights=path), named)


def test_the_mark_is_the_token_where_there_is_no_word(predictor, archives):
    named = one(predictor, TOKEN_PROMPT, replicate_weights=archives / "token.zip")
    marked = TOKEN_PROMPT.replace("<zwx>", "[trigger]")
    assert same(one(predictor, marked, replicate_weights=archives / "token.zip"), named)


def test_a_prompt_without_the_taught_word_gets_a_hint_and_one_with_it_none(predictor, worded, capsys):
    path = worded("TOK")
    for prompt, hinted in (("a lamp in TOKYO", True), ("a tok lamp", False), ("a TOK's lamp", False)):
        one(predictor, prompt, replicate_weights=path)
        assert ("hint: the prompt doesn't hold 'TOK'" in capsys.readouterr().out) == hinted, prompt
    one(predictor, "a [trigger] wall")
    assert "[trigger] is text like any other" in capsys.readouterr().out


@pytest.mark.parametrize("word", [None, 7, ["x"], ""])
def test_a_meta_whose_word_is_no_text_says_nothing(word, predictor, worded):
    one(predictor, "a wall", replicate_weights=worded(word))
