"""The operations that speeds are reckoned with are those that torch counts."""

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lora_utils.lora.adapter import AdapterSettings, attach_adapter
from lora_utils.model import blocks, flops
from lora_utils.model.latents import Size
from lora_utils.model.text_encoder import TextEmbeddings
from lora_utils.model.transformer import predict_velocity

SIZE, TEXT_TOKENS = Size(128, 96), 20
SHAPE = flops.Shape(blocks=3, width=256, channels=64, text_width=128)


def counted(checkpointed):
    """Forward, and forward with backward, by torch's counter on attention written out as products."""
    transformer = QwenImageTransformer2DModel(
        num_layers=3, attention_head_dim=32, num_attention_heads=8, joint_attention_dim=128, axes_dims_rope=(8, 12, 12)
    ).requires_grad_(False)
    for parameter in attach_adapter(transformer, AdapterSettings("attention", 1), torch.Generator().manual_seed(0)):
        torch.nn.init.ones_(parameter)
    blocks.set_checkpointed(transformer, checkpointed)
    latents, text = torch.randn(1, SIZE.tokens, 64), TextEmbeddings(torch.randn(1, TEXT_TOKENS, 128), None)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        velocity = predict_velocity(transformer, latents, torch.tensor([0.5]), text, SIZE)
        forward = counter.get_total_flops()
        velocity.square().mean().backward()
        return forward, counter.get_total_flops()


def test_a_forwards_operations_are_those_counted():
    forward, _ = counted(0)
    assert flops.forward_flops(SHAPE, SIZE.tokens, TEXT_TOKENS) == pytest.approx(forward, rel=0.02)


@pytest.mark.parametrize("checkpointed", [0, 2, 3])
def test_a_steps_operations_are_those_counted(checkpointed):
    """Written out, attention's backward has four products; fused, it makes one of the forward's again."""
    fused = SHAPE.blocks * 2 * (SIZE.tokens + TEXT_TOKENS) ** 2 * SHAPE.width
    _, step = counted(checkpointed)
    expected = flops.training_flops(SHAPE, SIZE.tokens, TEXT_TOKENS, checkpointed) - fused
    assert expected == pytest.approx(step, rel=0.025)


def test_the_real_models_step_takes_what_is_known_of_it():
    """At 1024x1024: 70.6 TFLOP forward, 161 a step, 231 with every block checkpointed."""
    real = flops.Shape(60, 3072, 64, 3584)
    assert flops.forward_flops(real, 4096, 128) / 1e12 == pytest.approx(70.6, rel=0.01)
    assert flops.training_flops(real, 4096, 128, 0) / 1e12 == pytest.approx(161, rel=0.01)
    assert flops.training_flops(real, 4096, 128, 60) / 1e12 == pytest.approx(231, rel=0.01)


def test_the_devices_peak_is_measured():
    assert 1e9 < flops.measured_peak(torch.device("cpu"), torch.float32, seconds=0.01) < 1e14
