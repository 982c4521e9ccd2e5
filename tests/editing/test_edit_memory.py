"""What editing costs: the memory plan counts the images to edit, and docs/editing.md's table is arithmetic."""

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from lora_utils.config import TrainConfig
from lora_utils.errors import UserError
from lora_utils.model import flops, memory_estimate, memory_plan
from lora_utils.model.device import Placement
from lora_utils.model.memory_estimate import Room
from lora_utils.model.variant import EDIT_PLUS
from lora_utils.training.loss import flow_matching_loss
from tests.editing.material import CPU, extracted_pairs
from tests.helpers import ROOT, make_state
from tests.model.test_memory_plan import GPUS, QWEN_IMAGE, QWEN_TEXT, TEXT_TOKENS, checkpointed_of, demand_of

SEEN_TOKENS = 196 + 8  # of an image of 384 x 384: 14 x 14 features, its marks and its label
VISION_WEIGHTS = 676_550_144  # of Qwen2.5-VL-7B's vision tower
CONFIG = TrainConfig(
    steps=2, rank=4, batch_size=2, resolution="64", control_resolution="auto", seed=0, quantization="none"
)


def step_of(side_px, control_px):
    tokens = (side_px**2 + control_px**2) // 256 + TEXT_TOKENS + SEEN_TOKENS
    return memory_estimate.step_size(TrainConfig(seed=0), QWEN_IMAGE, tokens, 2)


def test_the_page_says_how_many_times_the_work_editing_is():
    """In operations of forward and backward, without activation checkpointing."""
    shape = flops.Shape(60, 3072, 64, 3584)

    def work(side_px, control_px):
        images = (side_px**2 + control_px**2) // 256
        text = TEXT_TOKENS + (SEEN_TOKENS if control_px else 0)
        return flops.training_flops(shape, images, text, 0)

    page = (ROOT / "docs" / "editing.md").read_text()
    assert f"{work(1024, 1024) / work(1024, 0):.1f} times the operations" in page
    assert f"{work(512, 1024) / work(512, 512):.1f} times those at `control_resolution=auto`" in page


def run_of(gpu, step, live_text):
    """What a GPU of so many GB runs with, and how many of 60 blocks are checkpointed."""
    try:
        chosen = memory_plan.choose_training_plan("auto", demand_of(step, gpu * 1e9), live_text)
    except UserError:
        return "too small"
    scheme = {"none": "bf16"}.get(chosen.quantization, chosen.quantization)
    return f"{scheme}, {checkpointed_of(chosen, gpu * 1e9, step, live_text)}"


def test_the_page_says_what_each_gpu_runs_with():
    for gpu in GPUS:
        runs = [run_of(gpu, step, live) for live in (False, True) for step in (step_of(512, 512), step_of(1024, 1024))]
        line = f"| {gpu} GB | {' | '.join(runs)} |"
        print(line)
        assert line in (ROOT / "docs" / "editing.md").read_text()


def test_a_server_that_edits_needs_room_for_the_vision_tower_and_the_images():
    shapes = memory_estimate.ModelShapes(
        QWEN_IMAGE, QWEN_TEXT, 8, torch.bfloat16, torch.bfloat16, 27_500_000_000, 126_000_000
    )
    room = Room(Placement(torch.device("cuda"), torch.bfloat16), 80e9, 64e9)
    plain = memory_estimate.sampling_estimate(shapes, room)
    edits = memory_estimate.sampling_estimate(replace(shapes, vision_weights=VISION_WEIGHTS), room)
    assert edits.text_encoder - plain.text_encoder == 2 * VISION_WEIGHTS
    assert edits.work > 1.3 * plain.work, "with a VAE so narrow that the transformer's forward is the most"


def test_the_largest_batch_counts_the_images_to_edit(edit_models, tmp_path):
    dataset = extracted_pairs(tmp_path, CONFIG, controls=2)
    state = make_state(CONFIG, dataset, edit_models["2511"], placement=CPU, variant=EDIT_PLUS)
    assert state.largest.control_tokens == 2 * 16
    own = state.data.examples[0]
    assert own.controls is not None
    texts = max(len(own) for own in state.data.texts.values())
    assert state.largest.text_tokens == texts, "with the features, the marks and the labels of the images"
    assert state.largest.step_size.tokens == 2 * (16 + 32 + texts)


def test_a_level_of_their_own_for_the_images_keeps_hardly_more_for_the_backward_pass(edit_models, tmp_path):
    """So the memory plan's formulas hold for both kinds of block."""
    kept = {}
    dataset = extracted_pairs(tmp_path, CONFIG)
    for kind in ("2509", "2511"):
        state = make_state(CONFIG, dataset, edit_models[kind], placement=CPU, variant=EDIT_PLUS)
        saved = dict[int, torch.Tensor]()  # by storage; held, so that none of it is used again

        def keep(tensor, saved=saved):
            saved[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = flow_matching_loss(state, next(state.stream))
        assert loss.requires_grad
        weights = {own.untyped_storage()._cdata for own in state.components.transformer.parameters()}
        kept[kind] = sum(own.untyped_storage().nbytes() for key, own in saved.items() if key not in weights)
    assert kept["2511"] == pytest.approx(kept["2509"], rel=0.03)
