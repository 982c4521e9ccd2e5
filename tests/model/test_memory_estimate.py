"""Estimates: what a GPU, RAM and a machine without a GPU hold, and what is refused before anything is loaded."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.speed.live_memory import LiveMemory
from lora_utils.errors import UserError
from lora_utils.model import loading, memory, memory_estimate, memory_plan
from lora_utils.model.device import Placement
from lora_utils.model.memory_estimate import Room
from lora_utils.model.vae import decode_frame, fold_temporal_convolutions
from lora_utils.training import recompute
from tests.helpers import make_state
from tests.model.test_memory_plan import CONFIG, QWEN_IMAGE, QWEN_TEXT, TEXT, estimate_of, size_of

SHAPES = memory_estimate.ModelShapes(
    QWEN_IMAGE, QWEN_TEXT, 96, torch.bfloat16, torch.bfloat16, 27_500_000_000, 126_000_000
)
GPU, CPU = (Placement(torch.device(name), torch.bfloat16) for name in ("cuda", "cpu"))


def server_on(room, asked="auto"):
    return memory_plan.choose_sampling_plan(asked, memory_estimate.sampling_estimate(SHAPES, room))


def training_in(room, live_text=True, asked="auto", side_px=1024):
    estimate = memory_estimate.training_estimate(SHAPES, size_of(side_px), 506, room)
    return memory_plan.choose_training_plan(asked, estimate, live_text), estimate


def test_the_table_of_modulations_counts_into_ram():
    estimate = memory_estimate.sampling_estimate(SHAPES, Room(GPU, 80e9, 64e9))
    assert estimate.table == pytest.approx(763 * 4.4237e6, rel=1e-3)  # 4.42 MB a timestep
    with pytest.raises(UserError, match=r"needs 5\.95 GB of the machine's own memory \(the table of modulations 3\.38"):
        server_on(Room(GPU, 80e9, 5e9))


def test_processes_have_a_table_each_and_share_what_is_mapped():
    one, four = (memory_estimate.sampling_estimate(SHAPES, Room(GPU, 24e9, 64e9, count)) for count in (1, 4))
    each = one.table + loading.PASSING_BYTES
    assert four.ram_needed(True) - one.ram_needed(True) == pytest.approx(3 * each)


def test_a_text_encoder_that_would_be_converted_must_have_room_in_ram():
    """The files are bf16: in fp32 28 GB of memory are held, and can't be taken back."""
    room = Room(Placement(torch.device("cuda"), torch.float32), 1e12, 24e9)
    estimate = memory_estimate.sampling_estimate(SHAPES, room)
    assert not estimate.mapped_text
    in_ram_alone = replace(estimate, free=estimate.needed("nf4", False) + 1)
    with pytest.raises(UserError, match=r"of the machine's own memory \(the text encoder 28\.3"):
        memory_plan.choose_sampling_plan("nf4", in_ram_alone)


def test_a_text_encoder_of_a_machine_with_little_ram_is_read_again_and_that_is_said():
    room = Room(GPU, 24e9, 12e9)
    plan, estimate = training_in(room)
    assert not plan.text_encoder_on_device
    assert plan.read_again_bytes > 3e9
    assert "read from the disk again whenever they are used" in " ".join(
        memory_plan.describe_plan(plan, "auto", estimate)
    )
    assert training_in(Room(GPU, 24e9, 64e9))[0].read_again_bytes == 0


def test_a_cpu_is_one_memory_that_takes_what_is_held_and_evicts_what_is_mapped():
    """24 GB, as the trial at the true size had: nf4, whose other weights and the text encoder are mapped."""
    plan, estimate = training_in(Room(CPU, 24e9))
    assert plan.quantization == "nf4"
    assert plan.mapped_bytes == pytest.approx(TEXT + 4.62e9, rel=0.01)
    assert 0 < plan.read_again_bytes < plan.mapped_bytes
    said = " ".join(memory_plan.describe_plan(plan, "auto", estimate))
    assert "of these weights 18.8 GB are mapped from their files" in said
    assert training_in(Room(CPU, 128e9))[0].quantization == "none"
    assert training_in(Room(CPU, 128e9))[0].read_again_bytes == 0
    assert server_on(Room(CPU, 64e9)).quantization == "none"


def test_a_cpu_never_chooses_the_scheme_that_is_slow_there():
    _, estimate = training_in(Room(CPU, 64e9))
    sizes = [replace(estimate, free=gb * 1e9) for gb in range(12, 140, 4)]
    chosen = {memory_plan.choose_training_plan("auto", each, True).quantization for each in sizes}
    assert chosen == {"none", "nf4"}
    assert training_in(Room(CPU, 64e9), asked="fp8")[0].quantization == "fp8", "whoever asks for it gets it"


def test_a_cpu_without_room_is_refused_rather_than_killed():
    """In fp32 nothing is mapped: what the trial at the true size was promised, and the kernel killed."""
    with pytest.raises(UserError, match="GB are free; use a machine with more memory"):
        server_on(Room(Placement(torch.device("cpu"), torch.float32), 24e9))
    with pytest.raises(UserError, match="or use a machine with more memory"):
        training_in(Room(Placement(torch.device("cpu"), torch.float32), 24e9))


def test_a_text_encoder_alone_must_fit_too(random_model):
    """Without a token it is freed before the transformer comes, but it is there first."""
    estimate = replace(estimate_of(CONFIG, random_model, 76), text_encoder=50e9, free=40e9, mapped_text=False)
    with pytest.raises(UserError):
        memory_plan.choose_training_plan("auto", estimate, live_text=False)


def test_blocks_are_checkpointed_before_mapped_weights_are_evicted(dataset, random_model, monkeypatch):
    run = make_state(CONFIG, dataset, random_model)
    step = run.largest.step_size
    room = memory.SPARE_BYTES + step.needed_bytes(0) + 1e9
    monkeypatch.setattr(recompute, "free_bytes", lambda _device: room)
    recompute.plan_recompute(run)
    assert run.plan.checkpointed_blocks == 0
    run.plan = replace(run.plan, mapped_bytes=1e9 + step.needed_bytes(0) - step.needed_bytes(1) - 1)
    recompute.plan_recompute(run)
    assert run.plan.checkpointed_blocks == 1


def test_each_process_of_a_cpu_gets_its_share(monkeypatch):
    monkeypatch.setattr(memory_estimate, "free_bytes", lambda _device: 64e9)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    room = memory_estimate.measure_room(CPU)
    assert (room.free, room.ram_free, room.processes) == (32e9, None, 2)


def test_the_folded_vae_decodes_in_what_the_plan_says():
    """Counted on tensors without data, at the true width: what is alive at once, without a convolution's workspace."""
    for dtype, counted in ((torch.bfloat16, 7.03), (torch.float32, 6.01)):
        with FakeTensorMode(), torch.no_grad():
            vae = fold_temporal_convolutions(AutoencoderKLQwenImage(base_dim=96))
            for parameter in vae.parameters():
                parameter.data = parameter.data.to(dtype)
            latents = torch.zeros(1, 16, 128, 128, dtype=dtype)
            with LiveMemory() as live:
                decode_frame(vae, latents)
        planned = memory.decode_bytes(1024 * 1024, dtype.itemsize, 96)
        assert live.peak_bytes / (1024 * 1024 * dtype.itemsize * 96) == pytest.approx(counted, abs=0.01)
        assert 1.0 < planned / live.peak_bytes < 1.3
