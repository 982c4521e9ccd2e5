"""Words that name what is taught: found as words, in any capitals and any script, by one rule."""

import pytest

from lora_utils.config import TrainConfig
from lora_utils.dataset.caption_texts import prior_caption, with_trigger
from lora_utils.errors import UserError
from lora_utils.triggers import expand_trigger, holds, replace_words

WORDS = [
    ("a lamp in TOKYO", "TOK", False),
    ("a TOK lamp", "TOK", True),
    ("TOK", "TOK", True),
    ("TOK's lamp", "TOK", True),
    ('(TOK), "TOK"', "TOK", True),
    ("un-TOK-able", "TOK", True),
    ("two TOKs", "TOK", False),  # a plural is another word
    ("a tok, at night", "TOK", True),  # capitals don't matter
    ("TOK2", "TOK", False),
    ("TOK_2", "TOK", False),
    ("a woman", "man", False),
    ("a man and a woman", "man", True),
    ("mañana", "ma", False),
    ("MAÑANA", "mañana", True),
    ("the old man of the sea", "old man", True),
    ("#me too", "#me", True),
    ("#mesh", "#me", False),
    ("", "TOK", False),
    # other scripts
    ("кот на столе", "кот", True),
    ("который час", "кот", False),
    ("КОТ", "кот", True),
    ("η γάτα", "γάτα", True),
    ("القطة", "قط", False),
    ("קטנה", "קט", False),
    ("किताब", "क", False),  # the vowel sign belongs to the letter
    ("यह राम है", "राम", True),
    ("cafe\u0301 noir", "caf\u00e9", True),  # composed or not
    ("caf\u00e9 noir", "cafe\u0301", True),
    ("cafe\u0301", "cafe", False),
    # scripts that write words without spaces, or particles onto them
    ("一只小猫在桌上", "小猫", True),
    ("桌上的TOK在睡觉", "TOK", True),
    ("かわいいネコです", "ネコ", True),
    ("철수는 웃는다", "철수", True),
    ("แมวน้อย", "แมว", True),
    # tokens are found as they are written, for so they are read
    ("<zwx>s and x<zwx>", "<zwx>", True),
    ("<ZWX>", "<zwx>", False),
    ("<zwxy>", "<zwx>", False),
]


@pytest.mark.parametrize(("text", "word", "found"), WORDS)
def test_a_word_is_found_where_it_stands_as_a_word(text, word, found):
    assert holds(text, word) == found


@pytest.mark.parametrize(
    ("text", "words", "by", "expected"),
    [
        ("a woman", ["man"], "person", "a woman"),
        ("a Man", ["man"], "person", "a person"),
        ("a photo of <zwx> person", ["<zwx>"], "person", "a photo of person"),
        ("a photo of <zwx> personality", ["<zwx>"], "person", "a photo of person personality"),
        ("ohwx woman", ["ohwx"], "woman", "woman"),
        ("ohwx Woman at sea", ["ohwx"], "woman", "woman at sea"),
        ("a TOK man, TOK", ["TOK"], "man", "a man, man"),
        ("<a> beside <b>", ["<a>", "<b>"], "cat", "cat beside cat"),
        ("old ohwx house", ["ohwx", "old ohwx"], "x", "x house"),
        ("TOK in TOKYO", ["TOK"], r"a\1", r"a\1 in TOKYO"),
    ],
)
def test_words_are_replaced_as_words_and_the_class_is_not_doubled(text, words, by, expected):
    assert replace_words(text, words, by) == expected


def test_a_class_woman_beside_a_trigger_man_is_fine():
    config = TrainConfig(trigger_word="man", class_word="woman", seed=0)
    assert prior_caption("a man and a woman", config) == "a woman and a woman"
    with pytest.raises(UserError, match="holds the token or trigger word itself"):
        TrainConfig(trigger_word="man", class_word="old Man", seed=0)


def test_the_trigger_word_is_put_in_front_where_only_a_longer_word_holds_it():
    assert with_trigger("a lamp in TOKYO", "TOK", ()) == "TOK, a lamp in TOKYO"
    assert with_trigger("tok at night", "TOK", ()) == "tok at night"


@pytest.mark.parametrize("mark", ["[trigger]", "[Trigger]", "[TRIGGER]"])
def test_the_mark_is_replaced_in_any_capitals(mark):
    assert expand_trigger(f"a {mark} wall", r"oh\1wx", ()) == r"a oh\1wx wall"
    assert expand_trigger(f"a {mark} wall", "", ("<zwx>",)) == "a <zwx> wall"
