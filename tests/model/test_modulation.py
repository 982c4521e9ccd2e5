"""The modulation table: the same numbers as the layers it replaces, for a third of the weights less."""

import itertools
from dataclasses import replace

import pytest
import torch

from lora_utils.config import SampleRequest, TrainConfig
from lora_utils.lora.formats import LoraFile, write_lora_file
from lora_utils.lora.hooks import applied_loras
from lora_utils.lora.updates import LowRank
from lora_utils.lora.weights import load_weights
from lora_utils.model import flow, modulation
from lora_utils.model.components import load_components
from lora_utils.model.device import Placement, default_placement
from lora_utils.model.latents import Size
from lora_utils.model.text_encoder import TextEmbeddings, encode_text
from lora_utils.model.transformer import Storage, load_transformer, predict_velocity
from lora_utils.placeholder.tokens import no_placeholders
from lora_utils.sampling import sampler
from lora_utils.sampling.sampler import Conditioning, SamplingJob
from lora_utils.training import loop
from lora_utils.training.batches import other_timesteps, run_timesteps
from tests.helpers import make_state

PLACE = default_placement()
TIMES = torch.tensor([0.9, 0.123, 0.5])
CONFIG = TrainConfig(steps=20, rank=4, learning_rate=1e-3, batch_size=3, resolution="64", seed=0)


def velocity(transformer, sigma, text):
    latents = torch.randn(len(sigma), 16, 64, generator=torch.Generator().manual_seed(0))
    return predict_velocity(transformer, latents.to(transformer.dtype), sigma, text, Size(64, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_with_the_table_gives_the_numbers_of_the_layers(dtype, random_model):
    place = Placement(torch.device("cpu"), dtype)
    sigma = TIMES[[2, 0]]
    plain = load_transformer(random_model, place)
    tabled = load_transformer(random_model, place, Storage(timesteps=flow.model_time(TIMES, dtype)))
    text = TextEmbeddings(torch.randn(2, 9, 128, generator=torch.Generator().manual_seed(1)).to(dtype), None)
    with torch.no_grad():
        torch.testing.assert_close(velocity(tabled, sigma, text), velocity(plain, sigma, text))


def test_the_modulations_weights_never_join_the_transformer(random_model):
    plain = load_transformer(random_model, PLACE)
    tabled = load_transformer(random_model, PLACE, Storage(timesteps=flow.model_time(TIMES, torch.float32)))
    names, left = ({name for name, _ in part.named_parameters()} for part in (plain, tabled))
    assert names - left == {name for name in names if modulation.is_modulation(name)}
    assert len(names - left) == 2 * 2 * 2, "two blocks, two streams, weight and bias"
    assert not left - names


def test_an_unknown_timestep_is_refused_and_not_rounded(random_model):
    tabled = load_transformer(random_model, PLACE, Storage(timesteps=flow.model_time(TIMES, torch.float32)))
    for unknown in (0.4, 0.95, 0.01):
        with pytest.raises(KeyError, match="has no timestep"):
            velocity(tabled, torch.tensor([unknown]), TextEmbeddings(torch.zeros(1, 5, 128), None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_bit_for_bit_whatever_else_the_table_holds(dtype, random_model):
    """Else a run would learn something else for the previews that are sampled on the way."""
    place = Placement(torch.device("cpu"), dtype)
    velocities = []
    for others in ([], [0.2], torch.linspace(0.01, 0.99, 98).tolist()):
        times = flow.model_time(torch.tensor([0.5, *others]), dtype)
        tabled = load_transformer(random_model, place, Storage(timesteps=times))
        with torch.no_grad():
            velocities.append(
                velocity(tabled, torch.tensor([0.5]), TextEmbeddings(torch.ones(1, 5, 128).to(dtype), None))
            )
    assert torch.equal(velocities[0], velocities[1])
    assert torch.equal(velocities[0], velocities[2])


def test_a_table_larger_than_the_weights_is_not_used(random_model):
    assert modulation.pays(506, 3072), "bf16 leaves 506 of the 1000 steps apart: the real model always has a table"
    many = torch.linspace(0, 1, 129)
    part = load_transformer(random_model, PLACE, Storage(timesteps=many))
    assert any(modulation.is_modulation(name) for name, _ in part.named_parameters())


def test_a_run_knows_its_timesteps_beforehand(dataset, random_model, monkeypatch):
    run = make_state(replace(CONFIG, gradient_accumulation=2), dataset, random_model, placement=PLACE)
    schedule = run.components.schedule
    own = run_timesteps(run.config, run.data.examples, schedule, PLACE.dtype)
    foreseen = torch.cat([own, other_timesteps(run.config, (), schedule, PLACE.dtype)]).unique()
    seen, predict = [], predict_velocity
    monkeypatch.setattr(
        "lora_utils.training.loss.predict_velocity", lambda *given: seen.append(given[2]) or predict(*given)
    )
    list(loop.train(run))
    assert torch.equal(flow.model_time(torch.cat(seen), PLACE.dtype).unique(), foreseen)


@pytest.mark.parametrize("token", [False, True])
def test_the_loss_curve_is_that_of_the_layers(token, dataset, random_model, monkeypatch):
    config = replace(CONFIG, train_placeholder_token=token)
    tabled = make_state(config, dataset, random_model, placement=PLACE)
    assert not any(modulation.is_modulation(name) for name, _ in tabled.components.transformer.named_parameters())
    with monkeypatch.context() as patch:
        patch.setattr(modulation, "pays", lambda *_: False)
        plain = make_state(config, dataset, random_model, placement=PLACE)
    curves = [[report.loss for report in loop.train(run)] for run in (tabled, plain)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


# --- sampling -------------------------------------------------------------------------------------------------------

BF16 = Placement(torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("size", [Size(64, 64), Size(1024, 1024), Size(1664, 928), Size(2048, 2048)])
def test_in_bf16_every_timestep_that_sampling_can_show_is_in_the_table(size):
    known = modulation.sampling_timesteps(torch.bfloat16)
    assert known is not None
    for steps, terminal in itertools.product(range(1, 101), (0.02, None)):
        sigmas = torch.tensor(flow.Schedule(shift_terminal=terminal).sampling_sigmas(steps, size.tokens)[:-1])
        shown = flow.model_time(sigmas, torch.bfloat16)
        assert torch.isin(shown, known).all(), f"{steps} steps at {size}"
    assert len(known) == 763, "3.4 GB on the CPU for Qwen-Image"
    assert modulation.sampling_timesteps(torch.float32) is None


@pytest.fixture
def tabled(random_model, monkeypatch):
    """The random model as the real one is loaded for sampling on a GPU. Its width is too small for a table to pay."""
    monkeypatch.setattr(modulation, "pays", lambda *_: True)
    components = load_components(random_model, BF16)
    assert modulation.has_table(components.transformer)
    return components


def latents_of(components, lora=None, scale=1.0):
    request = SampleRequest("a red circle", steps=4, guidance=4.0, width=64, height=64, seed=0)
    with torch.inference_mode(), applied_loras(components.transformer, [(lora, scale)] if lora else []):
        text, empty = (
            encode_text(components.text_encoder, components.tokenizer, [words], no_placeholders())
            for words in (request.prompt, " ")
        )
        noise = sampler.initial_noise(Size(64, 64), 0)
        job = SamplingJob(request, Size(64, 64), no_placeholders())
        return sampler.denoise(components, job, noise, Conditioning(text, empty), lambda _step: None)


def test_sampling_with_the_table_gives_the_latents_of_the_layers(tabled, random_model, monkeypatch):
    monkeypatch.undo()
    plain = load_components(random_model, BF16)
    assert not modulation.has_table(plain.transformer)
    torch.testing.assert_close(latents_of(tabled), latents_of(plain))


def test_a_lora_that_adapts_the_modulations_switches_the_table_off_by_itself(
    tabled, random_model, tmp_path, monkeypatch
):
    name, width = "transformer_blocks.1.img_mod.1", 128
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, width, generator=generator), torch.randn(6 * width, 4, generator=generator)
    write_lora_file(tmp_path / "lora.safetensors", LoraFile({name: LowRank(down, up, alpha=4.0)}, {}))
    before = latents_of(tabled)
    lora = load_weights(tmp_path / "lora.safetensors", tabled).lora
    monkeypatch.undo()
    plain = load_components(random_model, BF16)
    adapted = latents_of(tabled, lora)
    assert modulation.has_table(tabled.transformer)
    assert torch.equal(latents_of(tabled), before), "without the LoRA it is the base again, bit for bit"
    assert torch.equal(adapted, latents_of(plain, load_weights(tmp_path / "lora.safetensors", plain).lora))
    assert (adapted - before).norm() > 0.1 * before.norm()
