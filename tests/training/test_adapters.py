"""Adapters of each method, trained: they start as no change, learn, resume, and come out as a file that is the same."""

from dataclasses import replace

import pytest
import torch
from diffusers import QwenImagePipeline
from safetensors import safe_open

from lora_utils.config import TrainConfig
from lora_utils.errors import UserError
from lora_utils.lora.adapter import AdapterSettings, attach_adapter, load_adapter, trained_layers
from lora_utils.lora.formats import LoraFile, read_lora_file, write_lora_file
from lora_utils.lora.layers import DoraLinear, LokrLinear
from lora_utils.lora.ranks import rank_of
from lora_utils.lora.updates import Decomposed, Kronecker, LowRank
from lora_utils.lora.weights import load_weights, read_init_weights
from lora_utils.model.adapter_sizes import adapted_layers, count_adapter_weights
from lora_utils.model.components import load_components
from lora_utils.model.device import Placement, default_placement
from lora_utils.model.quantization import dense
from lora_utils.model.text_encoder import TextEmbeddings
from lora_utils.model.transformer import predict_velocity
from lora_utils.training.checkpoint import save_checkpoint
from lora_utils.training.state import final_lora
from tests.helpers import SHORT_RUN, losses, make_state, resume_state, same_result
from tests.lora import judge

METHODS = {"lora": LowRank, "dora": Decomposed, "lokr": Kronecker}
RANKS = {"lora": 4, "dora": 4, "lokr": 2}  # of the last, the larger matrix is a product
each_method = pytest.mark.parametrize("method", METHODS)


def config(method, **given):
    return replace(SHORT_RUN, adapter=method, rank=RANKS[method], **given)


def moved(parameters):
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * 0.15) if parameter.ndim > 1 else parameter.mul_(1 + 0.2 * noise.tanh())


def attach(components, method="lora", targets="attention", rank=4, alpha=None):
    settings = AdapterSettings(targets, rank, method, alpha)
    return attach_adapter(components.transformer, settings, torch.Generator().manual_seed(0))


def loss_of(components):
    states, latents = judge.given()
    text, level = TextEmbeddings(states, None), torch.full((1,), 0.5)
    return predict_velocity(components.transformer, latents, level, text, judge.SIZE).square().mean()


@each_method
def test_it_starts_as_no_change_at_all(method, random_model):
    components = load_components(random_model, default_placement())
    before = judge.ours(components)
    attach_adapter(
        components.transformer, AdapterSettings("attention_mlp", 4, method), torch.Generator().manual_seed(0)
    )
    assert torch.equal(judge.ours(components), before)


@each_method
@pytest.mark.parametrize("alpha", [None, 9.0])
def test_what_was_trained_is_what_its_file_computes(method, alpha, random_model, components, tmp_path, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    trained = load_components(random_model, default_placement())
    moved(attach(trained, method, "attention_mlp", RANKS[method], alpha))
    layers = trained_layers(trained.transformer)
    assert {type(layer) for layer in layers.values()} == {METHODS[method]}
    write_lora_file(tmp_path / "l.safetensors", LoraFile(layers), dtype=torch.float32)
    loaded = load_weights(tmp_path / "l.safetensors", components).lora
    assert judge.error(judge.ours(components, loaded), judge.ours(trained), judge.ours(components)) < 1e-5


def test_a_lokr_computes_its_kronecker_product_and_that_ones_gradients():
    base, generator = torch.nn.Linear(96, 64), torch.Generator().manual_seed(0)
    for rank in (2, 50):
        layer = LokrLinear(base, rank, 3.0, generator)
        assert len(layer.right) == (2 if rank == 2 else 1)
        moved(layer.weights)
        x = torch.randn(3, 5, 96, generator=generator)
        right = layer.right[0] @ layer.right[1] if rank == 2 else layer.right[0]
        want = base(x) + x @ torch.kron(layer.left, right).T * (1.5 if rank == 2 else 1)
        grads = torch.autograd.grad(want.square().sum(), layer.weights)
        got = layer(x)
        assert torch.allclose(got, want, atol=1e-5)
        for one, other in zip(torch.autograd.grad(got.square().sum(), layer.weights), grads, strict=True):
            assert torch.allclose(one, other, rtol=1e-3, atol=1e-3)


def test_a_doras_lengths_are_those_of_the_changed_matrix_also_on_a_quantised_base(random_model):
    for quantization in ("none", "nf4", "int8"):
        stored = load_components(random_model, Placement(torch.device("cpu"), torch.float32), quantization)
        moved(attach(stored, "dora"))
        for layer in stored.transformer.modules():
            if isinstance(layer, DoraLinear):
                want = (dense(layer.base_layer.weight).float() + layer.up @ layer.down).norm(dim=1)
                assert torch.allclose(layer.lengths(), want, rtol=1e-4)


def test_in_16_bits_a_small_gain_is_not_rounded_to_the_next_number():
    """bf16 knows 1 and 1.0078, and nothing between: a gain of 1.006 would be a third too large."""
    base = torch.nn.Linear(64, 64).to(torch.bfloat16)
    layer, x = DoraLinear(base, 4, 4, torch.Generator().manual_seed(0)), torch.randn(4096, 64).to(torch.bfloat16)
    with torch.no_grad():
        layer.magnitude.mul_(1.006)
        unbiased = (base(x) - base.bias).float()
        slope = ((layer(x).float() - base(x).float()) * unbiased).mean() / unbiased.square().mean()
    assert float(slope) == pytest.approx(6e-3, rel=0.15)


@each_method
def test_a_run_learns_and_is_resumed_bit_for_bit(method, dataset, random_model, tmp_path):
    given = config(method, placeholder_learning_rate=1e-2)
    whole = make_state(given, dataset, random_model)
    first = losses(whole)
    half = make_state(given, dataset, random_model)
    assert losses(half, 3) == first[:3]
    saved = save_checkpoint(half, tmp_path, 1)
    other = resume_state(given, dataset, random_model, saved)
    assert losses(other) == first[3:]
    assert same_result(whole, other)


@each_method
def test_checkpointed_blocks_change_nothing(method, dataset, random_model):
    free = make_state(config(method), dataset, random_model)
    full = make_state(config(method), dataset, random_model, plan=replace(free.plan, checkpointed_blocks=2))
    assert losses(free) == losses(full)
    assert same_result(free, full)


@each_method
@pytest.mark.parametrize("targets", ["attention", "attention_mlp", "transformer_blocks.{1-1}.attn.to_*,*.img_mlp.*"])
def test_the_weights_are_as_many_as_the_memory_plan_counts(method, targets, random_model):
    transformer = judge.stock(random_model)
    for rank in (2, 8):
        parameters = attach_adapter(
            judge.stock(random_model), AdapterSettings(targets, rank, method), torch.Generator().manual_seed(0)
        )
        layers = adapted_layers(targets, 2)
        assert sum(map(torch.numel, parameters)) == count_adapter_weights(method, rank, layers, transformer.inner_dim)


def test_patterns_choose_layers_of_some_blocks():
    assert adapted_layers("transformer_blocks.{1,3-4}.attn.to_q", 6) == [
        [f"transformer_blocks.{block}.attn.to_q"] if block in (1, 3, 4) else [] for block in range(6)
    ]
    both = adapted_layers("*.attn.to_k, attention", 2)
    assert both == adapted_layers("attention", 2)
    with pytest.raises(UserError, match="matches no layer that can be adapted"):
        adapted_layers("transformer_blocks.9.*", 2)
    with pytest.raises(UserError, match="matches no layer"):
        adapted_layers("*.img_mod.1", 2)
    for text in ("{0-999}{0-999}{0-999}", ",".join(["attention"] * 2000)):
        with pytest.raises(UserError, match="1000 are the most"):
            adapted_layers(TrainConfig(lora_targets=text, seed=0).lora_targets, 2)
    with pytest.raises(UserError, match="lora_targets takes attention, attention_mlp"):
        TrainConfig(lora_targets="transformer_blocks.{" + "9" * 5000 + "}.attn.to_q")
    with pytest.raises(UserError, match="lora_targets takes attention, attention_mlp, or patterns"):
        TrainConfig(lora_targets="transformer_blocks.{a}.attn")
    assert TrainConfig(lora_targets=" attention ,\n*.img_mlp.net.2").lora_targets == "attention,*.img_mlp.net.2"


def test_a_run_on_some_layers_writes_those(dataset, random_model):
    state = make_state(config("lora", lora_targets="transformer_blocks.1.attn.to_*"), dataset, random_model)
    losses(state)
    names = ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")
    assert set(final_lora(state).layers) == {f"transformer_blocks.1.attn.{name}" for name in names}


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_weights_of_another_rank_to_start_from_are_padded_or_cut(method, random_model, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    source = load_components(random_model, default_placement())
    moved(attach(source, method))
    path = tmp_path / "l.safetensors"
    write_lora_file(path, LoraFile(trained_layers(source.transformer)), dtype=torch.float32)
    for rank, alpha in ((8, None), (8, 20.0), (4, 2.0)):
        target = load_components(random_model, default_placement())
        parameters = attach(target, method, rank=rank, alpha=alpha)
        load_adapter(target.transformer, read_init_weights(path, config(method)).layers)
        assert judge.error(judge.ours(target), judge.ours(source), torch.zeros(())) < 1e-5
        loss = loss_of(target)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        ups = [each for each in gradients if each is not None and each.ndim == 2 and each.shape[1] == rank]
        assert sum(bool(each[:, -1].any()) for each in ups) >= 13, "what was added can learn"
    small = read_init_weights(path, replace(config(method), rank=2))
    assert {rank_of(update) for update in small.layers.values()} == {2}
    assert "cut to rank 2, which loses" in caplog.text


def test_weights_of_another_method_are_refused(random_model, tmp_path, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    source = load_components(random_model, default_placement())
    moved(attach(source, "dora"))
    target = load_components(random_model, default_placement())
    attach(target)
    with pytest.raises(UserError, match="is of another shape or method than the run's"):
        load_adapter(target.transformer, trained_layers(source.transformer))


def test_stock_diffusers_takes_a_trained_dora(random_model, components, tmp_path):
    trained = load_components(random_model, default_placement())
    moved(attach(trained, "dora"))
    path = tmp_path / "l.safetensors"
    write_lora_file(path, LoraFile(trained_layers(trained.transformer)), dtype=torch.float32)
    stock = QwenImagePipeline.from_pretrained(random_model)
    stock.load_lora_weights(str(path))
    assert judge.error(judge.truth(stock.transformer), judge.ours(trained), judge.ours(components)) < 1e-4


def test_magnitudes_are_written_in_full_precision(random_model, tmp_path):
    trained = load_components(random_model, default_placement())
    moved(attach(trained, "dora"))
    write_lora_file(tmp_path / "l.safetensors", LoraFile(trained_layers(trained.transformer)))
    with safe_open(tmp_path / "l.safetensors", framework="pt") as file:
        dtypes = {key.rpartition(".lora_")[2]: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    assert dtypes == {"A.weight": "BF16", "B.weight": "BF16", "magnitude_vector": "F32"}
    assert read_lora_file(tmp_path / "l.safetensors").layers


def test_at_one_alpha_every_rank_learns_as_fast(dataset, random_model):
    """AdamW moves each of R columns by its rate, and alpha / R undoes that."""

    def learned(rank, alpha):
        run = make_state(replace(SHORT_RUN, rank=rank, lora_alpha=alpha), dataset, random_model, any_timestep=True)
        before = judge.ours(run.components)
        losses(run)
        return (judge.ours(run.components) - before).norm().item()

    at_one_alpha = [learned(rank, 16.0) for rank in (1, 4, 64)]
    assert max(at_one_alpha) < 1.5 * min(at_one_alpha)
    assert learned(64, 64.0) > 10 * learned(4, 4.0)  # at one strength they don't
