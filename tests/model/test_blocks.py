"""Our blocks against diffusers' own, and our LoRA layers against peft's: the same numbers, less memory."""

import copy

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.modeling_utils import no_init_weights
from torch.autograd.graph import saved_tensors_hooks

from lora_utils.lora.adapter import AdapterSettings, _project_together, attach_adapter
from lora_utils.model import blocks, memory
from lora_utils.model.adapter_sizes import adapted_layers, layer_in_block
from lora_utils.model.latents import Size
from lora_utils.model.text_encoder import TextEmbeddings
from lora_utils.model.transformer import predict_velocity
from tests.helpers import use_pefts_layers

WIDTH, TEXT_WIDTH = 128, 48
SMALL, OBLONG, LARGE = Size(64, 64), Size(96, 64), Size(128, 128)


def stock(layers=2, dtype=torch.float32, width=WIDTH, std=0.1):
    with no_init_weights():  # all are drawn below
        transformer = QwenImageTransformer2DModel(
            num_layers=layers,
            attention_head_dim=32,
            num_attention_heads=width // 32,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=(8, 12, 12),
        )
    torch.manual_seed(0)
    for name, parameter in transformer.named_parameters():  # norms and biases too, so that each must be in its place
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=std) if std else parameter.data.zero_()
    return transformer.to(dtype).requires_grad_(False)


def ours_of(transformer):
    ours = copy.deepcopy(transformer)
    blocks.install_forwards(ours)
    return ours


def attach(transformer, targets="attention_mlp", own=True, method="lora", alpha=None):
    """An adapter that does something. `own` False: computed by peft itself."""
    settings = AdapterSettings(targets, 4, method, alpha)
    parameters = attach_adapter(transformer, settings, torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.1) if parameter.ndim > 1 else parameter.data.mul_(1.1)
    if not own:
        use_pefts_layers(transformer)
    return parameters


def velocity(transformer, batch, masked=False, size=OBLONG):
    torch.manual_seed(3)
    dtype = transformer.dtype
    latents, states = torch.randn(batch, size.tokens, 64).to(dtype), torch.randn(batch, 7, TEXT_WIDTH).to(dtype)
    mask = (torch.arange(7) < torch.tensor([[7], [4], [5]])[:batch]) if masked else None
    return predict_velocity(transformer, latents, torch.linspace(0.2, 0.9, batch), TextEmbeddings(states, mask), size)


def assert_same(one, other, share=1e-6):
    """Equal but for fp32's rounding, as a share of the whole."""
    assert (one - other).norm() <= share * other.norm()


@pytest.mark.parametrize(("batch", "masked"), [(1, False), (3, False), (3, True)])
def test_the_blocks_give_diffusers_numbers(batch, masked):
    theirs = stock()
    assert_same(velocity(ours_of(theirs), batch, masked), velocity(theirs, batch, masked))


@pytest.mark.parametrize("size", [Size(64, 64), Size(96, 64), Size(48, 112)])
def test_the_rope_table_is_that_of_the_size_and_the_texts_length(size):
    theirs = stock(layers=1)
    ours = ours_of(theirs)
    velocity(ours, 1)  # leaves the table of another size behind
    assert_same(velocity(ours, 1, size=size), velocity(theirs, 1, size=size))


def test_the_rope_table_is_made_once_per_shape_and_serves_training_after_sampling():
    ours = ours_of(stock())
    with torch.inference_mode():
        velocity(ours, 1)
    attach(ours)
    velocity(ours, 1).square().mean().backward()
    assert ours.pos_embed.table.cache_info().misses == 1


def test_in_bf16_the_blocks_are_no_further_from_fp32_than_diffusers_own():
    exact = velocity(stock(), 1)
    theirs = stock(dtype=torch.bfloat16)
    errors = [(velocity(part, 1).float() - exact).square().mean() for part in (ours_of(theirs), theirs)]
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize(("method", "alpha"), [("lora", None), ("lora", 10.0), ("dora", None), ("dora", 1.5)])
@pytest.mark.parametrize("targets", ["attention", "attention_mlp"])
def test_the_lora_layers_give_pefts_numbers_and_gradients(targets, method, alpha):
    results = []
    for own in (True, False):
        transformer = stock()
        parameters = attach(transformer, targets, own, method, alpha)
        out = velocity(transformer, 2)
        out.square().mean().backward()
        results.append((out, [parameter.grad for parameter in parameters]))
    (ours, our_gradients), (theirs, their_gradients) = results
    assert_same(ours, theirs)
    reached = 0
    for mine, peft in zip(our_gradients, their_gradients, strict=True):
        assert (mine is None) == (peft is None)
        if mine is not None:
            reached += 1
            assert_same(mine, peft, 1e-5)
    assert reached >= len(our_gradients) * 7 / 8, "only the last block's text beyond attention shows in no image"


def test_a_projection_whose_neighbours_have_no_lora_is_computed_alone():
    transformer = stock(layers=1)
    attach(transformer, "attention")
    attn = transformer.transformer_blocks[0].attn
    x = torch.randn(2, 5, WIDTH)
    expected = [attn.to_q(x), attn.to_k.base_layer(x), attn.to_v(x)]
    got = _project_together((attn.to_q, attn.to_k.base_layer, attn.to_v), x)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def kept_bytes(transformer, size=LARGE):
    """Bytes that autograd keeps for the backward pass, each storage once, weights apart; and their dtypes."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in transformer.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        out = velocity(transformer, 1, size=size)
    return sum(count for count, _ in kept.values()), [tensor for _, tensor in kept.values()], out


@pytest.mark.parametrize("method", ["lora", "dora", "lokr"])
@pytest.mark.parametrize("targets", ["attention", "attention_mlp", "*.attn.to_q", "*.attn.to_[ok]*", "*.img_mlp.net.2"])
def test_a_block_keeps_the_widths_that_the_memory_plan_counts_with(targets, method):
    width = 1024 if method == "lokr" else 512  # LoKr keeps more that doesn't grow with the width
    of_one_block = []
    for size in (SMALL, LARGE):
        kept = []
        for layers in (1, 2):
            transformer = stock(layers, width=width, std=0)  # what is kept follows from shapes alone
            attach(transformer, targets, method=method)
            kept.append(kept_bytes(transformer, size)[0])
        of_one_block.append(kept[1] - kept[0])
    wanted = memory.kept_widths(map(layer_in_block, adapted_layers(targets, 1)[0]), method)
    per_token = (of_one_block[1] - of_one_block[0]) / (LARGE.tokens - SMALL.tokens)
    assert per_token / (4 * width) == pytest.approx(wanted, rel=0.02)


def test_no_layer_keeps_an_fp32_copy_of_its_input():
    """peft casts a layer's bf16 input to the fp32 of its weights, and keeps that for the backward pass."""
    copies = []
    for own in (True, False):
        transformer = stock(dtype=torch.bfloat16, width=512)
        attach(transformer, own=own)
        wide = [tensor for tensor in kept_bytes(transformer)[1] if tensor.dtype == torch.float32]
        copies.append(sum(tensor.shape[-1] >= 512 for tensor in wide))
    assert copies[0] == 0
    assert copies[1] > 0, "else this test couldn't fail"


def test_checkpointed_blocks_give_the_same_gradients_and_keep_their_inputs_alone():
    gradients, kept = [], []
    for count in (0, 1, 3):
        transformer = stock(layers=3)
        parameters = attach(transformer)
        blocks.set_checkpointed(transformer, 3)
        blocks.set_checkpointed(transformer, count)
        total, _, out = kept_bytes(transformer)
        kept.append(total)
        out.square().mean().backward()
        gradients.append([parameter.grad for parameter in parameters])
    for other in gradients[1:]:
        for one, two in zip(gradients[0], other, strict=True):
            assert one is two is None or torch.equal(one, two)
    assert kept[0] > 1.3 * kept[1] > 3 * kept[2]
