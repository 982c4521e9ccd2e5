"""A step on paper: its operations counted on tensors without data, and the least time that a GPU would take for them.

    python -m benchmarks.trace --preset full --against plain
    python -m benchmarks.trace --preset full --resolution 512 --rank 32 --batch 1 --token
    python -m benchmarks.trace --preset full --sampling

One training step (forward and backward), or one sampling step with guidance, of all blocks on torch's fake tensors. It
takes seconds and little memory on any machine. Each operation's floating-point operations and the bytes that it reads
and writes are counted as a GPU would run them in eager mode: one kernel for an RMSNorm, none for a view. The roofline
is the sum over operations of max(operations / peak, bytes / bandwidth); the floor counts matrix products and attention
alone, at their peak. Neither knows of launches or of a kernel's own losses, so a measured step is slower than both.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering
from torch._inductor.output_code import CompiledFxGraph

from benchmarks.speed.jobs import PRESETS, Job, Preset
from benchmarks.speed.live_memory import LiveMemory
from benchmarks.speed.methods import SIGMA, batch_of, new_run, plain_loss, with_token
from benchmarks.speed.recorder import Kernel, Recorder, Trace, on_paper, store_quantized
from lora_utils import constants
from lora_utils.lora.adapter import without_lora
from lora_utils.model import blocks, flow, kernels, modulation, quantization
from lora_utils.model.device import Placement
from lora_utils.model.roofline import GPUS, Gpu
from lora_utils.model.text_encoder import TextEmbeddings
from lora_utils.model.transformer import predict_velocity
from lora_utils.training import loss
from lora_utils.training.state import TrainState

# --- steps ----------------------------------------------------------------------------------------------------------


def run_without_data(job: Job) -> TrainState:
    """Return a run on tensors without data, its modulations in a table that shows one timestep."""
    exact = replace(job, quantization="none")
    run = new_run(exact, table=False)
    transformer = run.components.transformer
    rows = 2 * job.batch if job.edit else 1  # those of images to edit behind the others
    shape = (rows, job.shape.blocks, len(modulation.STREAMS), 6 * job.shape.width)
    table = modulation.ModulationTable(
        torch.zeros(rows), torch.empty(shape, dtype=job.placement.dtype), torch.device("cpu")
    )
    table.current = table.rows
    for index, block in enumerate(transformer.transformer_blocks):
        for stream, name in enumerate(modulation.STREAMS):
            setattr(block, name, modulation._FromTable(table, index, stream))
    if job.quantization != "none":
        store_quantized(transformer, job.quantization)
    return run


def trace_training(job: Job, method: str) -> Trace:
    """Trace a training step: `ours`, `token`, ours with a token in the caption, or `plain`, peft on diffusers' blocks.

    The clipping and AdamW are counted as one kernel each over the LoRA's weights, the same for all. The peak of live
    memory is without the weights' gradients, which the memory plan counts among the optimizer's bytes.
    """
    with on_paper():
        if method == "plain":
            transformer, loss_of = plain_loss(job)
            learned = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        else:
            run, batch = run_without_data(job), batch_of(job)[0]
            if method == "token":
                run, batch = with_token(job, run)
            learned, loss_of = run.learned, lambda: loss.flow_matching_loss(run, batch).mean()
        loss_of()  # what is made once, like RoPE's table, is made
        with LiveMemory() as live, Recorder() as recorder:
            for parameter in learned:
                parameter.register_post_accumulate_grad_hook(lambda each: live.forget(each.grad))
            computed = loss_of()
            kept = live.live_bytes
            computed.backward()
        count = sum(parameter.numel() for parameter in learned)
    # Clipping reads the gradients, then reads and writes them; AdamW reads four numbers a weight and writes three.
    recorder.kernels += [Kernel("clip", 0.0, 12.0 * count), Kernel("adamw", 0.0, 28.0 * count)]
    return Trace(recorder.kernels, kept, live.peak_bytes)


def trace_sampling(job: Job) -> Trace:
    """Trace one sampling step with guidance: two forwards, the guidance and the Euler step."""
    with on_paper(), torch.no_grad():
        run, (batch, text) = run_without_data(job), batch_of(job)
        latents = torch.empty(job.batch, job.size.tokens, constants.PACKED_CHANNELS, dtype=job.placement.dtype)
        prompt = TextEmbeddings(text.expand(job.batch, -1, -1), None)
        sigma = torch.full((job.batch,), SIGMA)
        transformer = run.components.transformer
        for block in blocks.forwards_of(transformer):
            block.project = blocks.project_each
        with without_lora(transformer):
            given = latents, sigma, prompt, job.size, [own.latents for own in batch.controls]
            predict_velocity(transformer, *given)
            with LiveMemory() as live, Recorder() as recorder:
                velocity, unconditional = (predict_velocity(transformer, *given) for _ in range(2))
                flow.euler_step(latents, flow.guide(velocity, unconditional, 4.0), 0.5, 0.4)
    return Trace(recorder.kernels, 0.0, live.peak_bytes)


# --- compiled blocks ------------------------------------------------------------------------------------------------


def trace_compiled(job: Job) -> Trace:
    """Trace a training step whose blocks are compiled: the kernels that inductor plans for a block in the middle.

    They are planned for a CPU, whose fusions of what stands between products are a GPU's but for details. What stands
    outside of the blocks is one kernel here: a step of one block less what a second one adds.
    """
    shallow = [replace(job, preset=resized(job.preset, count)) for count in (1, 2)]
    one, two = (trace_training(each, "ours").kernels for each in shallow)

    def outside(value: Callable[[Kernel], float]) -> float:
        return 2 * sum(map(value, one)) - sum(map(value, two))

    rest = Kernel("outside of the blocks", outside(lambda each: each.flops), outside(lambda each: each.bytes))
    forward, backward = plan_block(shallow[0])
    again = job.checkpointed * len(forward)
    blocks_count = job.shape.blocks
    kernels_of_blocks = [*forward * (blocks_count + (job.checkpointed if again else 0)), *backward * blocks_count]
    learned = [each for each in trace_training(shallow[0], "ours").kernels if each.name in ("clip", "adamw")]
    share = [replace(each, bytes=each.bytes * (blocks_count - 1)) for each in learned]  # one block's are in the rest
    return Trace([*kernels_of_blocks, rest, *share], 0.0, 0.0)


def resized(preset: Preset, count: int) -> Preset:
    """Return a preset with another number of blocks."""
    return replace(preset, config={**preset.config, "num_layers": count})


def plan_block(job: Job) -> tuple[list[Kernel], list[Kernel]]:
    """Compile a block and its backward pass. -> the kernels of both, as inductor's scheduler has them"""
    run = new_run(job)
    transformer = run.components.transformer
    own, width = blocks.forwards_of(transformer)[0], job.shape.width
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(job.placement.dtype)

    image = random(job.batch, job.size.tokens, width).requires_grad_()
    text = random(job.batch, job.preset.text_tokens, width).requires_grad_()
    image_mod, text_mod = (random(job.batch, 6 * width) for _ in modulation.STREAMS)
    tokens = job.size.tokens + job.preset.text_tokens
    rope = torch.randn(tokens, job.preset.config["attention_head_dim"] // 2, 2, generator=generator)

    graphs: list[list[Kernel]] = []
    real = GraphLowering._update_scheduler

    def planned(self: GraphLowering) -> None:
        real(self)
        graphs.append([_kernel_of(node) for node in self.scheduler.nodes if node.get_read_write_buffers_sizes()])

    def run_nothing(_graph: CompiledFxGraph, _inputs: Sequence[Any]) -> Any:
        raise _PlannedError  # both passes are compiled before the first one runs, which at the true width takes long

    GraphLowering._update_scheduler = planned
    at_once = functorch_config.patch(force_non_lazy_backward_lowering=True)
    unrun = mock.patch.object(CompiledFxGraph, "__call__", run_nothing)
    try:
        with inductor_config.patch(force_disable_caches=True), at_once, unrun, suppress(_PlannedError):
            compute = torch.compile(blocks.compute_block, dynamic=False)
            compute(own.block, own.project, _planned_join, image, text, None, image_mod, text_mod, rope)
    finally:
        GraphLowering._update_scheduler = real
        torch._dynamo.reset()
    forward, backward = graphs
    return forward, backward


class _PlannedError(Exception):
    """The compiler has planned all that there is."""


def _planned_join(*given: Any) -> Tensor:
    """Let the compiler see the kernel. It runs here as the steps, whose operations the plan doesn't hold."""
    return kernels.norm_rope(*given)


def _kernel_of(node: Any) -> Kernel:
    """Return a node of inductor's scheduler as a kernel, attention's operations by its tensors' sizes."""
    inner, moved = node.node, float(node.get_read_write_buffers_sizes())
    name = str(getattr(inner, "python_kernel_name", None) or "fused")
    if "attention" in name:
        sizes = [[int(side) for side in each.get_size()] for each in inner.inputs]
        query, key = sizes[1:3] if "backward" in name else sizes[:2]
        products = 5 if "backward" in name else 2
        return Kernel(name, 2.0 * products * math.prod(query) * key[-2], moved)
    return Kernel(name, float(node.estimate_flops() or 0.0), moved)


# --- tables ---------------------------------------------------------------------------------------------------------


def table_of_cards(traces: dict[str, Trace]) -> list[str]:
    """Return the roofline of each trace on each GPU, beside the floor of the first."""
    first = next(iter(traces.values()))
    lines = ["| | floor, ms | " + " | ".join(f"{name}, ms | of the floor" for name in traces) + " |"]
    lines.append("|---|---|" + "---|---|" * len(traces))
    for gpu in GPUS:
        cells = [gpu.name, f"{1e3 * first.floor(gpu):.0f}"]
        for trace in traces.values():
            seconds = trace.seconds(gpu)
            cells += [f"{1e3 * seconds:.0f}", f"{seconds / first.floor(gpu):.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def table_of_kernels(trace: Trace, gpu: Gpu, most: int) -> list[str]:
    """Return where a step's bytes and seconds go, by operation."""
    found: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in trace.kernels:
        found[kernel.name].append(kernel)
    rows = [
        (sum(each.seconds(gpu) for each in own), name, len(own), sum(each.bytes for each in own))
        for name, own in found.items()
    ]
    lines = [f"| operation | kernels | GB | ms on the {gpu.name} |", "|---|---|---|---|"]
    for seconds, name, count, moved in sorted(rows, reverse=True)[:most]:
        lines.append(f"| {name} | {count} | {moved / 1e9:.1f} | {1e3 * seconds:.1f} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="full")
    parser.add_argument("--against", choices=["plain"], help="trace this too")
    parser.add_argument("--resolution", type=int, help="side of the image in pixels; the preset's without")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--checkpointed", type=int, default=0, help="blocks that are activation-checkpointed")
    parser.add_argument("--quantization", choices=["none", *quantization.WEIGHT_BYTES], default="none")
    parser.add_argument("--compiled", action="store_true", help="compiled blocks too; takes a minute and 4 GB")
    parser.add_argument("--edit", action="store_true", help="Qwen-Image-Edit-2511, with an image of the target's size")
    parser.add_argument("--token", action="store_true", help="a token in the caption")
    parser.add_argument(
        "--sampling", action="store_true", help="a sampling step with guidance in place of a training step"
    )
    parser.add_argument("--operations", type=int, default=12, help="how many operations to list")
    given = parser.parse_args(arguments)
    if given.edit and given.compiled:
        parser.error("--compiled plans blocks of text-to-image; leave out --edit")
    job = job_of(given)
    if given.sampling:
        traces = {"ours": trace_sampling(job)}
    else:
        method = "token" if given.token else "ours"
        traces = {method: trace_training(job, method)}
        if given.compiled:
            traces["compiled"] = trace_compiled(job)
        if given.against:
            traces[given.against] = trace_training(job, given.against)
    for name, trace in traces.items():
        print(
            f"{name}: {trace.flops / 1e12:.1f} TFLOP, {len(trace.kernels)} kernels move {trace.bytes / 1e9:.0f} GB; "
            f"{trace.kept_bytes / 1e9:.2f} GB are kept for the backward pass, at most {trace.peak_bytes / 1e9:.2f} live"
        )
        print("\n".join(["", *table_of_kernels(trace, GPUS[0], given.operations), ""]))
    print("\n".join(table_of_cards(traces)))


def job_of(given: argparse.Namespace) -> Job:
    """Return what is traced."""
    preset = PRESETS[given.preset]
    if given.resolution:
        preset = replace(preset, side_px=given.resolution)
    placement = Placement(torch.device("cpu"), torch.bfloat16)
    return Job(preset, placement, given.rank, given.batch, given.checkpointed, given.quantization, edit=given.edit)


if __name__ == "__main__":
    main()
