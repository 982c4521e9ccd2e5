"""Training: the loss is the formula, a run is a function of config, data and seed, and only what should learns."""

import contextlib
import logging
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lora_utils import constants
from lora_utils.config import TrainConfig
from lora_utils.dataset.scan import check_captions
from lora_utils.errors import UserError
from lora_utils.model import flow, transformer
from lora_utils.model.components import load_components
from lora_utils.model.device import Placement
from lora_utils.model.text_encoder import encode_prompts, encode_text
from lora_utils.placeholder.embedding import embedding_matrix
from lora_utils.training import loop
from lora_utils.training.batch_plans import bucket_batches, generator_for
from lora_utils.training.batches import BatchStream
from lora_utils.training.loss import batch_text, flow_matching_loss
from lora_utils.training.state import TrainState, describe_placeholders, final_lora
from tests.helpers import losses, make_state, train_archive

BASELINE = TrainConfig(steps=6, rank=4, learning_rate=1e-3, batch_size=3, resolution="64", seed=0)
TOKEN = replace(BASELINE, train_placeholder_token=True)


@pytest.fixture
def new_run(dataset, random_model):
    def make(config: TrainConfig, data=dataset) -> TrainState:
        return make_state(config, data, random_model)

    return make


def test_the_loss_of_a_batch_is_the_formula(new_run):
    run = new_run(replace(BASELINE, caption_dropout=0.0))
    loss = flow_matching_loss(run, next(BatchStream(run.config, run.data.examples, run.components.schedule))).mean()

    batch = next(bucket_batches(run.data.examples, 3, 0))
    noise_generator, sigma_generator = (generator_for(0, purpose) for purpose in ("noise", "sigma"))
    clean = torch.stack([example.latents for example in batch])
    noise = torch.randn(clean.shape, generator=noise_generator)
    sigma = flow.sample_sigmas(3, run.components.schedule.mu(16), sigma_generator)
    total = 0.0
    for i, example in enumerate(batch):  # one by one, without padding or masks
        noisy = (1 - sigma[i]) * clean[i] + sigma[i] * noise[i]
        velocity = run.components.transformer(
            hidden_states=noisy[None],
            timestep=sigma[i : i + 1],
            encoder_hidden_states=run.data.texts[example.caption][None],
            encoder_hidden_states_mask=None,
            img_shapes=[[(1, 4, 4)]],
        ).sample[0]
        total += F.mse_loss(velocity, noise[i] - clean[i]).item() / 3
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_captions_of_unequal_length_give_the_loss_of_one_by_one(new_run):
    run = new_run(replace(BASELINE, caption_dropout=0.0))
    lengths = {len(run.data.texts[example.caption]) for example in run.data.examples}
    assert len(lengths) > 1
    short = min(run.data.examples, key=lambda e: len(run.data.texts[e.caption]))
    long = max(run.data.examples, key=lambda e: len(run.data.texts[e.caption]))
    text = batch_text(run, [short.caption, long.caption])
    assert text.mask is not None
    assert text.mask.sum(dim=1).tolist() == [len(run.data.texts[short.caption]), len(run.data.texts[long.caption])]


@pytest.mark.parametrize("config", [BASELINE, TOKEN], ids=["baseline", "token"])
def test_the_same_seed_gives_the_same_run_bit_for_bit(config, new_run):
    first, second = new_run(config), new_run(config)
    assert losses(first) == losses(second)
    one, two = final_lora(first), final_lora(second)
    assert all(torch.equal(layer.up, two.layers[name].up) for name, layer in one.layers.items())
    assert all(torch.equal(row, two.embeddings[token]) for token, row in one.embeddings.items())
    assert losses(new_run(replace(config, seed=1))) != losses(new_run(config))


def test_with_the_feature_off_its_inputs_change_nothing(new_run, caplog, monkeypatch):
    odd = replace(BASELINE, placeholder_token="<other>", placeholder_init_std=0.05, placeholder_learning_rate=1.0)
    assert losses(new_run(BASELINE)) == losses(new_run(odd))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_lora_learns_its_first_step_alike_with_and_without_the_embedding(new_run):
    """The row starts near zero and has a clip and a generator of its own, so it doesn't disturb the LoRA.

    Texts are encoded one by one here: beside others they round otherwise.
    """
    one_step = replace(TOKEN, steps=1, batch_size=1)
    frozen, trained = (new_run(replace(one_step, placeholder_learning_rate=rate)) for rate in (0.0, 1e-3))
    losses(frozen), losses(trained)
    one, two = final_lora(frozen), final_lora(trained)
    assert all(torch.equal(layer.up, two.layers[name].up) for name, layer in one.layers.items())
    assert not torch.equal(one.embeddings["<zwx>"], two.embeddings["<zwx>"])


def test_a_package_without_the_feature_trains_the_same_baseline(new_run, monkeypatch):
    """With all that the token does taken away, a baseline run gives the same LoRA, bit for bit."""
    run = new_run(BASELINE)
    expected, with_feature = losses(run), final_lora(run)

    def missing(*_):
        raise AssertionError("the baseline asked for something of the token")

    for name in ("encoding.new_placeholders", "setup.embedding_learning_rate", "state.describe_embeddings"):
        monkeypatch.setattr(f"lora_utils.training.{name}", missing)
    monkeypatch.setattr("lora_utils.model.text_encoder.spliced_embeddings", lambda *_: contextlib.nullcontext())
    run = new_run(BASELINE)
    assert losses(run) == expected
    without = final_lora(run)
    assert all(torch.equal(layer.up, without.layers[name].up) for name, layer in with_feature.layers.items())
    assert all(torch.equal(layer.down, without.layers[name].down) for name, layer in with_feature.layers.items())


def test_conditioning_is_bit_equal_in_training_and_prediction(new_run, components):
    """Cached captions and those with the token: what a step reads is what `predict` reads for the same prompt."""
    run = new_run(replace(TOKEN, batch_size=1))
    assert components.text_encoder is not run.components.text_encoder
    for caption in (run.data.examples[0].caption, constants.EMPTY_PROMPT):
        in_training = batch_text(run, [caption])
        in_prediction = encode_text(components.text_encoder, components.tokenizer, [caption], run.placeholders)
        assert torch.equal(in_training.states, in_prediction.states)
        assert in_training.mask is in_prediction.mask is None


def test_captions_with_the_token_are_encoded_at_every_step_and_the_others_once(new_run, dataset, monkeypatch):
    mixed = replace(dataset, examples=[*dataset.examples[:5], replace(dataset.examples[5], caption="a red circle")])
    run = new_run(replace(TOKEN, caption_dropout=0.0, steps=4, batch_size=6), mixed)
    assert set(run.data.texts) == {"a red circle", constants.EMPTY_PROMPT}
    encoded, encode = [], encode_prompts
    monkeypatch.setattr(
        "lora_utils.training.loss.encode_prompts",
        lambda *given: encoded.append([p.text for p in given[2]]) or encode(*given),
    )
    losses(run)
    probe, *steps = encoded
    assert len(probe) == 1
    assert len(steps) == 4
    different = len({example.caption for example in run.data.examples if "<zwx>" in example.caption})
    assert all(len(captions) == different and all("<zwx>" in caption for caption in captions) for captions in steps)


def test_only_the_tokens_embedding_of_the_text_encoder_learns(new_run):
    run = new_run(TOKEN)
    assert run.components.text_encoder is not None
    before = {name: value.clone() for name, value in run.components.text_encoder.state_dict().items()}
    base = {name: p.clone() for name, p in run.components.transformer.named_parameters() if not p.requires_grad}
    losses(run)
    assert all(torch.equal(before[name], value) for name, value in run.components.text_encoder.state_dict().items())
    now = dict(run.components.transformer.named_parameters())
    assert all(torch.equal(value, now[name]) for name, value in base.items())
    assert len(embedding_matrix(run.components.text_encoder)) == 576  # never resized
    assert not torch.equal(run.placeholders.embeddings[0], run.initial_embeddings[0])


def test_without_the_token_text_encoder_and_vae_are_gone_before_training(new_run):
    run = new_run(BASELINE)
    assert run.components.text_encoder is None
    assert set(run.data.texts) == {example.caption for example in run.data.examples} | {constants.EMPTY_PROMPT}


def test_training_lowers_the_loss(new_run):
    curve = losses(new_run(replace(TOKEN, steps=60, learning_rate=3e-3)))
    assert sum(curve[-10:]) < 0.9 * sum(curve[:10])


def test_accumulation_counts_optimizer_steps_and_averages_micro_batches(new_run):
    run = new_run(replace(BASELINE, steps=2, batch_size=1, gradient_accumulation=5))
    reports = list(loop.train(run))
    assert [report.step for report in reports] == [1, 2]


def test_a_batch_never_mixes_buckets_and_an_epoch_shows_every_image_once(new_run):
    run = new_run(BASELINE)
    mixed = [replace(e, size=transformer.Size(96, 48)) if i % 2 else e for i, e in enumerate(run.data.examples)]
    stream = bucket_batches(mixed, batch_size=2, seed=0)
    epoch = [next(stream) for _ in range(6)]  # 5 + 5 images in batches of two: 3 + 3
    assert all(len({example.size for example in batch}) == 1 for batch in epoch)
    assert sorted(e.image_name for batch in epoch for e in batch) == sorted(e.image_name for e in mixed)


@pytest.mark.parametrize(
    ("scheduler", "expected"), [("constant", [1, 1, 1]), ("linear", [1, 0.5, 0.1]), ("cosine", [1, 0.5, 0.0245])]
)
def test_rates_warm_up_and_then_follow_the_schedule(scheduler, expected):
    config = replace(BASELINE, steps=14, warmup_steps=4, lr_scheduler=scheduler)
    assert [loop.rate_factor(step, config) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert [loop.rate_factor(step, config) for step in (4, 9, 13)] == pytest.approx(expected, abs=1e-3)


def test_a_loss_that_is_not_finite_stops_with_images_and_sigma(new_run):
    run = new_run(BASELINE)
    run.data.examples[0] = replace(run.data.examples[0], tensors={"latents": torch.full((16, 64), torch.nan)})
    with pytest.raises(UserError, match=r"the loss is nan at step \d.*00\.png.*sigma"):
        list(loop.train(run))


@pytest.mark.usefixtures("without_models")
def test_captions_without_the_token_are_refused_before_a_model_is_loaded(archive, random_model, tmp_path, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    with pytest.raises(UserError, match=r"none of the 10 captions holds .*'<abc>'; the first is 'a photo of <zwx>"):
        train_archive(replace(TOKEN, placeholder_token="<abc>"), archive, tmp_path / "weights.zip")


@pytest.fixture
def without_models(monkeypatch):
    """Whoever loads one fails the test."""
    for name in ("encoding.load_text_encoder", "encoding.cache_examples", "setup.load_transformer"):
        monkeypatch.setattr(f"lora_utils.training.{name}", lambda *_, name=name: pytest.fail(name))


@pytest.mark.parametrize("config", [BASELINE, TOKEN], ids=["baseline", "token"])
def test_captions_longer_than_the_model_reads_are_refused(config, components, dataset):
    late = [replace(example, caption="red " * 1100 + "<zwx>") for example in dataset.examples[:2]]
    with pytest.raises(
        UserError, match=r"has 2 problems:\n- the caption of 00.png has \d+ tokens, and the model reads"
    ):
        check_captions(replace(dataset, examples=[*late, *dataset.examples[2:]]), config, components.tokenizer)


def test_an_embedding_that_never_learns_is_written_as_it_began_and_said(new_run, caplog):
    run = new_run(TOKEN)
    texts = {**run.data.texts, **{caption: torch.zeros(5, 128) for caption in run.data.captions}}
    run.data = replace(run.data, texts=texts)
    assert not any(report.token_grad_norms for report in loop.train(run))
    lora = final_lora(run)
    assert torch.equal(lora.embeddings["<zwx>"][0], run.initial_embeddings[0])
    assert "<zwx> has learned nothing: its embedding is as it began" in caplog.text
    (described,) = describe_placeholders(run, lora)
    assert described["moved"] is False


def test_a_first_gradient_of_the_embedding_that_is_not_finite_stops_the_run(new_run):
    run = new_run(replace(TOKEN, caption_dropout=0.0))
    run.placeholders.embeddings[0].register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(UserError, match=r"the gradient of <zwx> is (nan|inf) at step 1; lower its rate"):
        list(loop.train(run))


def test_a_text_encoder_without_grad_mode_is_found_at_the_first_step(new_run, monkeypatch):
    monkeypatch.setattr("lora_utils.training.loss.encode_prompts", torch.no_grad()(encode_prompts))
    with pytest.raises(RuntimeError, match="no gradient reaches <zwx>"):
        list(loop.train(new_run(replace(TOKEN, caption_dropout=0.0))))


def test_a_rate_of_zero_keeps_the_embedding_as_it_starts(new_run):
    run = new_run(replace(TOKEN, placeholder_learning_rate=0.0, placeholder_init_std=1e-4))
    losses(run)
    assert torch.equal(final_lora(run).embeddings["<zwx>"][0], run.initial_embeddings[0])
    assert 0.8e-4 < run.initial_embeddings[0].std() < 1.2e-4
    (described,) = describe_placeholders(run, final_lora(run))
    assert described["learning_rate"] == 0.0
    assert described["first_norm"] == described["last_norm"] > 0


def test_a_token_that_does_not_learn_costs_what_a_word_costs(new_run):
    """Its captions are encoded once, and no text encoder is kept; the run is the one that encodes at every step."""
    config = replace(TOKEN, placeholder_learning_rate=0.0, class_word="square", preservation_weight=0.3)
    run, stepwise = new_run(config), new_run(config)
    assert run.components.text_encoder is None
    assert any("<zwx>" in text for text in run.data.texts)
    components = load_components(run.components.folder, run.components.placement)
    stepwise.components = replace(stepwise.components, text_encoder=components.text_encoder)
    without = {text: states for text, states in stepwise.data.texts.items() if "<zwx>" not in text}
    stepwise.data = replace(stepwise.data, texts=without)
    assert losses(run) == pytest.approx(losses(stepwise), rel=1e-5)


def test_a_token_that_does_not_learn_is_read_as_it_was_learned_before(dataset, random_model):
    config = replace(TOKEN, placeholder_learning_rate=0.0)
    plain = make_state(config, dataset, random_model)
    learned = torch.ones(1, len(plain.placeholders.embeddings[0]))
    weights = replace(final_lora(plain), embeddings={"<zwx>": learned})
    continued = make_state(config, dataset, random_model, init_weights=weights)
    assert torch.equal(continued.placeholders.embeddings[0], learned[0])
    for text, states in plain.data.texts.items():
        assert torch.equal(states, continued.data.texts[text]) == ("<zwx>" not in text), text


def test_random_streams_are_independent_of_each_other():
    drawn = {purpose: torch.rand(4, generator=generator_for(0, purpose)) for purpose in ("noise", "row", "lora")}
    assert not torch.equal(drawn["noise"], drawn["row"])
    assert torch.equal(drawn["row"], torch.rand(4, generator=generator_for(0, "row")))


def test_in_bf16_the_lora_stays_fp32_and_learns(dataset, random_model):
    """The way a GPU runs, on the CPU: base and matmuls in bf16, LoRA and row in fp32."""
    placement = Placement(torch.device("cpu"), torch.bfloat16)
    run = make_state(replace(TOKEN, steps=3), dataset, random_model, placement=placement)
    assert {parameter.dtype for parameter in run.lora} == {torch.float32}
    assert run.placeholders.embeddings[0].dtype == torch.float32
    assert next(iter(run.data.texts.values())).dtype == torch.bfloat16
    base = {p.dtype for p in run.components.transformer.parameters() if not p.requires_grad}
    assert base == {torch.bfloat16}
    in_bf16 = losses(run)
    in_fp32 = losses(make_state(replace(TOKEN, steps=3), dataset, random_model))
    assert in_bf16[0] == pytest.approx(in_fp32[0], rel=0.02)
    assert in_bf16 == pytest.approx(in_fp32, rel=0.05), "each step's rounding moves the next"
    assert final_lora(run).embeddings["<zwx>"].dtype == torch.float32
