"""Several LoRAs at once, where they come from, and which of them stay loaded."""

import hashlib
import zipfile

import pytest

from lora_utils.errors import UserError
from lora_utils.lora.lora_cache import LoraCache, lora_bytes
from lora_utils.lora.weights_zip import LORA_MEMBER
from tests.sampling.calls import TOKEN_PROMPT, one, same


def test_two_loras_add_up_each_at_its_scale(predictor, archives):
    a, b = archives / "token.zip", str(archives / "baseline.zip")
    base, with_a = one(predictor), one(predictor, replicate_weights=a)
    both = one(predictor, replicate_weights=a, extra_lora=b)
    assert not same(both, with_a)
    assert not same(both, base)
    assert same(one(predictor, replicate_weights=a, extra_lora=b, extra_lora_scale=0.0), with_a)
    assert same(one(predictor, replicate_weights=a, lora_scale=0.0, extra_lora=b), one(predictor, extra_lora=b))
    assert same(one(predictor), base)


def test_several_extra_loras_each_have_a_strength_of_their_own(predictor, archives):
    a, b = (str(archives / name) for name in ("baseline.zip", "other.zip"))
    both = one(predictor, replicate_weights=a, lora_scale=0.5, extra_lora=b, extra_lora_scale=0.25)
    listed = f"{a} --scale 0.5 | {b}"
    assert same(one(predictor, extra_lora=listed, extra_lora_scale=0.25), both)
    assert not same(one(predictor, extra_lora=f"{a}|{b}"), both)
    assert same(one(predictor, extra_lora=f"{a} --scale 0\n{b} --scale 0"), one(predictor))


def test_the_second_ones_token_is_known_too(predictor, archives):
    alone = one(predictor, TOKEN_PROMPT, replicate_weights=archives / "token.zip")
    assert same(one(predictor, TOKEN_PROMPT, extra_lora=str(archives / "token.zip")), alone)
    both = {"replicate_weights": archives / "baseline.zip", "extra_lora": str(archives / "token.zip")}
    assert not same(one(predictor, TOKEN_PROMPT, **both), alone)


def test_what_was_loaded_is_logged_with_its_checksum(predictor, archives, caplog):
    caplog.set_level("INFO", "lora_utils")
    one(predictor, extra_lora=str(archives / "other.zip"))
    with zipfile.ZipFile(archives / "other.zip") as packed:
        expected = hashlib.sha256(packed.read(LORA_MEMBER)).hexdigest()
    assert f"sha256 {expected}" in caplog.text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/file.zip", "there is no weights file '/no/such/file.zip'"),
        ("ftp://host/w.zip", "there is no weights file 'ftp://host/w.zip'"),
        ("owner/name", "the hub can't be asked for it"),
        ("http://127.0.0.1:9/w.zip", "leads into a private network"),
    ],
)
def test_a_source_that_is_none_is_refused_and_the_next_image_is_as_ever(source, message, predictor):
    before = one(predictor)
    with pytest.raises(UserError, match=message):
        one(predictor, extra_lora=source)
    assert same(one(predictor), before)


def test_the_cache_holds_what_was_used_last_up_to_its_limit(predictor, archives):
    cache = LoraCache(most_bytes=0)
    for name in ("token", "other", "token"):
        cache.get(archives / f"{name}.zip", predictor.model.components)
        assert [weights.name for weights in cache.loaded.values()] == [f"{name}.zip"], "the one in use always fits"
    roomy = LoraCache(most_bytes=2.5 * lora_bytes(cache.get(archives / "token.zip", predictor.model.components)))
    for name in ("token", "other", "token", "baseline"):
        roomy.get(archives / f"{name}.zip", predictor.model.components)
    assert [weights.name for weights in roomy.loaded.values()] == ["token.zip", "baseline.zip"]
