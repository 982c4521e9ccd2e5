"""Prediction through the Predictor: what a user asks for, and no trace of it in the next call."""

import hashlib
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from examples.demo import call
from lora_utils.config import SampleFiles, SampleRequest
from lora_utils.errors import UserError
from lora_utils.io.images import read_settings
from lora_utils.lora.weights_zip import LORA_MEMBER, META_MEMBER
from lora_utils.model import memory_plan
from lora_utils.model.text_encoder import encode_text
from lora_utils.placeholder.tokens import no_placeholders
from predict import Predictor
from tests.sampling.calls import PLAIN_PROMPT, SMALL, TOKEN_PROMPT, draw, one, same

# --- no trace -------------------------------------------------------------------------------------------------------


def test_the_base_image_is_bit_identical_before_and_after_any_lora(predictor, archives):
    def fingerprint():
        parts = (
            predictor.model.components.text_encoder,
            predictor.model.components.transformer,
            predictor.model.components.vae,
        )
        states = [value.numpy().tobytes() for part in parts for value in part.state_dict().values()]
        return hashlib.sha256(b"".join(states)).hexdigest(), len(predictor.model.components.tokenizer)

    before, state = one(predictor), fingerprint()
    with_a = one(predictor, TOKEN_PROMPT, replicate_weights=archives / "token.zip")
    with_b = one(predictor, TOKEN_PROMPT, replicate_weights=archives / "other.zip")
    assert not same(with_a, with_b)
    assert same(one(predictor), before)
    assert same(one(predictor, TOKEN_PROMPT, replicate_weights=archives / "token.zip"), with_a)
    one(predictor, TOKEN_PROMPT)  # letters like any others, without weights
    assert same(one(predictor), before)
    assert fingerprint() == state


def test_lora_scale_zero_is_the_base_and_other_scales_are_not(predictor, archives):
    base = one(predictor)
    assert same(one(predictor, replicate_weights=archives / "token.zip", lora_scale=0.0), base)
    as_words = encode_text(
        predictor.model.components.text_encoder, predictor.model.components.tokenizer, [TOKEN_PROMPT], no_placeholders()
    )
    with_token = SampleRequest(TOKEN_PROMPT, lora_scale=0.0, seed=0)
    loaded = predictor.model.load_loras(with_token, SampleFiles(replicate_weights=str(archives / "token.zip")))
    unregistered = predictor.model.placeholders(with_token, loaded)
    read = encode_text(
        predictor.model.components.text_encoder, predictor.model.components.tokenizer, [TOKEN_PROMPT], unregistered
    )
    assert torch.equal(read.states, as_words.states), "at 0 the token is read as the base reads its letters"
    images = [one(predictor, replicate_weights=archives / "token.zip", lora_scale=scale) for scale in (-0.5, 0.5, 1.0)]
    assert not any(same(image, base) for image in images)
    assert not same(images[1], images[2])


def test_the_same_content_is_loaded_once_whatever_its_name(predictor, archives, tmp_path, capsys):
    (tmp_path / "copy").write_bytes((archives / "baseline.zip").read_bytes())
    one(predictor, replicate_weights=archives / "baseline.zip")
    capsys.readouterr()
    one(predictor, replicate_weights=tmp_path / "copy")
    out = capsys.readouterr().out
    assert "swapped to" in out
    assert "loaded" not in out


def test_a_cancel_within_a_step_leaves_no_trace(predictor, archives, monkeypatch):
    before = one(predictor)

    class Cancelled(BaseException):
        pass

    def cancel(*_):
        raise Cancelled

    with monkeypatch.context() as patch:
        patch.setattr("lora_utils.sampling.predictor.progress_lines", lambda *_: cancel)
        with pytest.raises(Cancelled):
            one(predictor, TOKEN_PROMPT, replicate_weights=archives / "token.zip")
    assert same(one(predictor), before)


# --- what is asked for ----------------------------------------------------------------------------------------------


def test_image_i_is_the_image_of_seed_plus_i_alone(predictor):
    several = draw(predictor, num_outputs=3, seed=10)
    for index, image in enumerate(several):  # drawn in one batch, whose sums round differently
        assert np.abs(image.astype(int) - one(predictor, seed=10 + index)).max() <= 1
    assert not same(several[0], several[1])


def test_no_seed_is_random_and_reported(predictor, capsys):
    images = []
    for given in ({"seed": None}, {"seed": -1}):
        images.append(one(predictor, **given))
        out = capsys.readouterr().out
        assert same(images[-1], one(predictor, seed=int(out.split("seed ")[1].split(",")[0])))
        capsys.readouterr()
    assert not same(*images)


def test_guidance_of_one_or_less_turns_cfg_off(predictor):
    off = one(predictor, guidance=1.0)
    assert same(one(predictor, guidance=0.0, negative_prompt="something else"), off)
    assert not same(one(predictor, guidance=4.0), off)


def test_odd_sizes_are_rounded_and_said_so(predictor, capsys):
    image = one(predictor, width=70, height=90, steps=1)
    assert image.shape == (96, 64, 3)
    assert "70x90 rounded to 64x96" in capsys.readouterr().out


@pytest.mark.parametrize("output_format", ["webp", "jpg", "png"])
def test_files_have_unique_names_and_carry_their_settings(predictor, archives, output_format):
    paths = call(
        predictor.predict,
        prompt=TOKEN_PROMPT,
        replicate_weights=archives / "token.zip",
        num_outputs=2,
        **{**SMALL, "output_format": output_format},
    )
    assert len({Path(path).name for path in paths}) == 2
    assert {Path(path).suffix for path in paths} == {f".{output_format}"}
    settings = [read_settings(Path(path)) for path in paths]
    assert [item["seed"] for item in settings] == [5, 6]
    assert (settings[0]["prompt"], settings[0]["lora_acts"]) == (TOKEN_PROMPT, "auto")
    assert len(settings[0]["loras"][0]["sha256"]) == 64  # type: ignore[index]
    assert "diffusers" in settings[0]["versions"]  # type: ignore[operator]


def test_progress_has_at_most_ten_lines_an_image(predictor, capsys):
    one(predictor, steps=37)
    assert 5 <= sum(" step " in line for line in capsys.readouterr().out.splitlines()) <= 10


# --- weights in their forms -----------------------------------------------------------------------------------------


def test_a_zip_a_tar_and_the_bare_file_give_the_same_image(predictor, archives, tmp_path):
    with zipfile.ZipFile(archives / "token.zip") as packed:
        packed.extractall(tmp_path)
    with tarfile.open(tmp_path / "w.tar", "w") as packed:
        for name in (LORA_MEMBER, META_MEMBER):
            packed.add(tmp_path / name, name)
    forms = (archives / "token.zip", tmp_path / "w.tar", tmp_path / LORA_MEMBER)
    images = [one(predictor, TOKEN_PROMPT, replicate_weights=form) for form in forms]
    assert same(images[0], images[1])
    assert same(images[0], images[2])


def test_cog_weights_are_the_default_and_replicate_weights_win(archives, predictor, monkeypatch):
    expected = one(predictor, TOKEN_PROMPT, replicate_weights=archives / "token.zip")
    monkeypatch.setenv("COG_WEIGHTS", str(archives / "token.zip"))
    ready = Predictor()

    ready.setup()
    assert same(one(ready, TOKEN_PROMPT), expected)
    other = one(predictor, TOKEN_PROMPT, replicate_weights=archives / "other.zip")
    assert same(one(ready, TOKEN_PROMPT, replicate_weights=archives / "other.zip"), other)


# --- images to start from, metadata, placement --------------------------------------------------------------------


def test_an_image_to_start_from_gives_the_size_and_part_of_the_look(predictor, tmp_path):
    Image.new("RGB", (96, 64), (250, 0, 0)).save(tmp_path / "a.png")
    given = {"image": tmp_path / "a.png", "width": None, "height": None, "steps": 10}
    near, far = (one(predictor, **given, strength=strength) for strength in (0.1, 1.0))
    assert near.shape == (64, 96, 3)
    red = np.array([250, 0, 0])
    assert np.abs(near.astype(int) - red).mean() < np.abs(far.astype(int) - red).mean()


def test_settings_can_be_left_out(predictor):
    for output_format in ("png", "webp", "jpg"):
        given = {**SMALL, "output_format": output_format, "disable_metadata": True}
        (path,) = call(predictor.predict, prompt=PLAIN_PROMPT, **given)
        assert read_settings(Path(path)) == {}
        assert PLAIN_PROMPT.encode() not in Path(path).read_bytes()


@pytest.mark.parametrize("scheme", ["fp8", "int8", "nf4"])
def test_a_quantised_server_generates_nearly_the_same(scheme, predictor, archives, monkeypatch, tiny_model):
    monkeypatch.setenv("BASE_MODEL", str(tiny_model))
    images = []
    for asked in ("none", scheme):
        monkeypatch.setenv("QUANTIZATION", asked)
        ready = Predictor()
        ready.setup()
        images.append(one(ready, steps=20).astype(int))
    assert 0 < np.abs(images[0] - images[1]).mean() < 20


def test_a_text_encoder_on_the_cpu_generates_the_same(predictor, monkeypatch, archives):
    given = {"replicate_weights": archives / "token.zip"}
    expected = one(predictor, TOKEN_PROMPT, **given)
    monkeypatch.setattr(
        memory_plan, "choose_sampling_plan", lambda *_: memory_plan.MemoryPlan("none", text_encoder_on_device=False)
    )
    ready = Predictor()
    ready.setup()
    assert same(one(ready, TOKEN_PROMPT, **given), expected)


# --- the long run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [64, pytest.param(200, marks=pytest.mark.slow)])
def test_after_calls_of_every_kind_the_base_image_is_the_first_and_memory_is_flat(count, predictor, archives, tmp_path):
    """LoRAs, scales, none, failures and cancels in turn: nothing adds up."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    first = one(predictor)

    class Cancelled(BaseException):
        pass

    def cancelled(*_):
        def cancel(*_):
            raise Cancelled

        return cancel

    calls = [
        lambda: one(predictor, TOKEN_PROMPT, replicate_weights=archives / "token.zip"),
        lambda: one(predictor, replicate_weights=archives / "other.zip", lora_scale=0.3, go_fast=True),
        lambda: draw(predictor, num_outputs=3, guidance=1.0),
        lambda: one(predictor, image=tmp_path / "a.png", extra_lora=str(archives / "baseline.zip")),
        lambda: failing(lambda: one(predictor, "red " * 30_000)),
        lambda: failing(lambda: one(predictor, extra_lora="/missing")),
        lambda: failing(lambda: one(predictor, replicate_weights=archives / "token.zip", go_fast=True), Cancelled),
        lambda: one(predictor),
    ]

    def failing(run, error: type[BaseException] = UserError):
        with pytest.MonkeyPatch.context() as patch:
            if error is Cancelled:
                patch.setattr("lora_utils.sampling.predictor.progress_lines", cancelled)
            with pytest.raises(error):
                run()

    resident = psutil.Process().memory_info
    for index in range(count):
        calls[index % len(calls)]()
        if index == 32:
            settled = resident().rss
    assert same(one(predictor), first)
    assert resident().rss - settled < 20e6, "bytes"
    assert not any(block._forward_hooks for block in predictor.model.components.transformer.modules())
