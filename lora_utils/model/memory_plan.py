"""The memory plan: which of the engine's switches a training or a server uses, chosen here before the model is loaded.

This module owns the choice and what is said of it; it doesn't know how a switch works. How many blocks are
activation-checkpointed follows from what is really free once the model is there: see `training.recompute`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora_utils.config import QUANTIZATIONS
from lora_utils.errors import UserError
from lora_utils.model import memory
from lora_utils.model.loading import PASSING_BYTES
from lora_utils.model.memory_estimate import SHARDED, Candidate, MemoryEstimate, Shortage
from lora_utils.model.roofline import Gpu, Step
from lora_utils.options import choice

log = logging.getLogger(__name__)

# From the exact one to the one that rounds most. int8 is as large as fp8 and as slow; it is there for who asks for it.
AUTO_SCHEMES = ("none", "fp8", "nf4")
# On a CPU a step on fp8 takes three times nf4's seconds, whose weights bitsandbytes makes dense faster (two cores,
# 2026-11-26, `benchmarks.train --preset wide --quantization fp8`).
CPU_SCHEMES = ("none", "nf4")

# On the careful side, for no GPU has measured them yet (`benchmarks.train --compiled` will).
COMPILE_S = 90.0  # to compile a block, forward and backward, and again for the first, whose inputs have no gradient


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The switches that a run or a server uses. All but the quantisation leave its numbers as they are."""

    quantization: str  # of the transformer; "none" or a scheme
    text_encoder_on_device: bool  # or on the CPU: slower, with the same result
    compiled: bool = False  # the blocks' arithmetic
    sharded: bool = False  # the transformer over several GPUs
    checkpointed_blocks: int = 0  # that keep only their inputs for the backward pass
    mapped_bytes: float = 0.0  # of the weights that stay on a CPU: views of the files, which seem to be free memory
    read_again_bytes: float = 0.0  # of mapped weights, on the CPU or beside a GPU, that have no room to stay
    predicted_s: float = 0.0  # of a step on one of the largest images, at least, by the GPU's data sheet; 0: not known


@dataclass(frozen=True, slots=True)
class Timing:
    """What a run's time follows from: the GPU, a step on one image, what it keeps in memory, and the run's images."""

    gpu: Gpu
    step: Step
    size: memory.StepSize  # of the largest batch
    images: int  # that the run shows, each as often as it does

    def step_with(self, candidate: Candidate, estimate: MemoryEstimate) -> Step:
        """Return the step of an image with the model held like this, as many blocks checkpointed as must be."""
        text = estimate.text_encoder if candidate.text_encoder_stays else 0.0
        lora = 4.0 * self.size.lora_parameters
        left = estimate.free - estimate.transformer[candidate.scheme] - text - lora
        quantization = "none" if candidate.scheme == SHARDED else candidate.scheme
        checkpointed = memory.blocks_to_checkpoint(self.size, left)
        return replace(self.step, checkpointed=checkpointed, quantization=quantization)

    def compiled_gain_s(self, step: Step) -> float:
        """Return the seconds that compiled blocks would save the run."""
        return self.images * (step.seconds(self.gpu) - replace(step, compiled=True).seconds(self.gpu))


# --- choices --------------------------------------------------------------------------------------------------------


def choose(candidates: Sequence[Candidate], estimate: MemoryEstimate, advice: str) -> tuple[Candidate, float]:
    """Return the first candidate that fits with all that it maps, else the one that reads least again: how much.

    Raises UserError with the numbers of the last one if none fits.
    """
    shortages = [(estimate.shortage(candidate), candidate) for candidate in candidates]
    if possible := [(lack.read_again, index) for index, (lack, _) in enumerate(shortages) if lack.fits]:
        read_again, index = min(possible)
        return candidates[index], read_again
    lack, last = shortages[-1]
    if not lack.device:
        raise UserError(_too_little_ram(estimate, last, lack))
    scheme, least = last.scheme, estimate.needed(last.scheme, last.text_encoder_stays)
    raise UserError(
        f"{estimate.purpose} needs {least / 1e9:.3g} GB (the model in {_scheme_name(scheme)} "
        f"{estimate.transformer[scheme] / 1e9:.3g}, {estimate.work_name} {estimate.work / 1e9:.3g}, to spare "
        f"{memory.SPARE_BYTES / 1e9:.3g}), and {estimate.free / 1e9:.3g} GB are free; {advice}."
    )


def choose_training_plan(
    asked: str, estimate: MemoryEstimate, live_text: bool, timing: Timing | None = None, shard_base: str = "never"
) -> MemoryPlan:
    """Choose how a training holds the model. Raises UserError if nothing fits.

    `live_text`: the text encoder stays beside the transformer, because a token is trained. It is never quantised; where
    it has no room on the GPU, it runs on the CPU. `timing`: of a GPU whose data sheet is known. Blocks are compiled
    where that saves the run more than it takes; never on a CPU, where a resumed run is the uninterrupted one bit for
    bit: the code for a shape, and how it rounds, depend on the shapes that the process has seen before.
    """
    schemes = schemes_for(asked, shard_base, SHARDED in estimate.transformer)
    if asked == "auto" and estimate.ram_free is None:
        schemes = tuple(scheme for scheme in schemes if scheme in (*CPU_SCHEMES, SHARDED))
    # Beside a GPU the text encoder may run on the CPU; without a GPU there is only one place for it.
    places = ((True, False) if estimate.ram_free is not None else (True,)) if live_text else (False,)
    candidates = [Candidate(scheme, stays, live_text and not stays) for stays in places for scheme in schemes]
    larger = "a machine with more memory" if estimate.ram_free is None else "a larger GPU"
    advice = f"lower resolution or batch_size, or use {larger}"
    if asked not in ("auto", "nf4"):
        advice += ", or set quantization to auto"
    chosen, read_again = choose(candidates, estimate, advice)
    alone = estimate.text_encoder + memory.SPARE_BYTES <= estimate.free
    compiled, seconds = False, 0.0
    if timing is not None:
        step = timing.step_with(chosen, estimate)
        compiled = chosen.scheme == "none" and timing.compiled_gain_s(step) > COMPILE_S
        seconds = replace(step, compiled=compiled).seconds(timing.gpu)
    return MemoryPlan(
        quantization="none" if chosen.scheme == SHARDED else chosen.scheme,
        text_encoder_on_device=chosen.text_encoder_stays if live_text else alone or estimate.ram_free is None,
        compiled=compiled,
        sharded=chosen.scheme == SHARDED,
        mapped_bytes=estimate.mapped_bytes(chosen.scheme, live_text) if estimate.ram_free is None else 0.0,
        read_again_bytes=read_again,
        predicted_s=seconds,
    )


def schemes_for(asked: str, shard_base: str, several: bool) -> tuple[str, ...]:
    """Return what may be tried, in this order. Raises UserError for what excludes each other.

    Sharding comes before rounding: it costs time, and nothing of the result.
    """
    if not several or shard_base == "never":
        return AUTO_SCHEMES if asked == "auto" else (asked,)
    if shard_base == "always":
        if asked not in ("auto", "none"):
            raise UserError(f"shard_base shards weights as they are; set quantization to auto, not {asked}.")
        return (SHARDED,)
    return {"auto": ("none", SHARDED, *AUTO_SCHEMES[1:]), "none": ("none", SHARDED)}.get(asked, (asked,))


def choose_sampling_plan(asked: str, estimate: MemoryEstimate) -> MemoryPlan:
    """Choose how a server holds the model: all on the GPU, else the text encoder on the CPU, else the rest rounded.

    `asked` is what QUANTIZATION says. Raises UserError where nothing fits, or for a scheme that doesn't exist.
    """
    choice("QUANTIZATION", asked, QUANTIZATIONS)
    on_cpu = estimate.ram_free is None
    advice = "use a machine with more memory" if on_cpu else "use a larger GPU"
    if asked != "auto":
        candidates = [Candidate(asked, True), Candidate(asked, False, True)]
        advice += ", or set QUANTIZATION to auto"
    else:
        candidates = [Candidate("none", True), *(Candidate(scheme, False, True) for scheme in AUTO_SCHEMES)]
    if on_cpu:  # where the text encoder has only one place
        candidates = [Candidate(scheme, True) for scheme in (CPU_SCHEMES if asked == "auto" else (asked,))]
    chosen, read_again = choose(candidates, estimate, advice)
    mapped = estimate.mapped_bytes(chosen.scheme, True) if on_cpu else 0.0
    return MemoryPlan(chosen.scheme, chosen.text_encoder_stays, mapped_bytes=mapped, read_again_bytes=read_again)


# --- what is said of it ---------------------------------------------------------------------------------------------


def _too_little_ram(estimate: MemoryEstimate, last: Candidate, lack: Shortage) -> str:
    """Say what of the machine's own memory is missing. A mapped text encoder needs none that must stay."""
    assert estimate.ram_free is not None
    held = 0.0 if estimate.mapped_text else estimate.text_encoder * estimate.processes
    text = f"the text encoder {held / 1e9:.3g}, " if held and estimate.text_encoder_on_cpu(last) else ""
    return (
        f"{estimate.purpose} needs {(estimate.ram_free + lack.ram) / 1e9:.3g} GB of the machine's own memory ({text}"
        f"the table of modulations {estimate.table * estimate.processes / 1e9:.3g}, what passes through "
        f"{PASSING_BYTES * estimate.processes / 1e9:.3g}, to spare {memory.SPARE_BYTES / 1e9:.3g}), and "
        f"{estimate.ram_free / 1e9:.3g} GB are free; use a machine or container with more memory, or a larger GPU."
    )


def _scheme_name(scheme: str) -> str:
    return {"none": "its own precision", SHARDED: "parts on several GPUs"}.get(scheme, scheme)


def describe_plan(plan: MemoryPlan, asked: str, estimate: MemoryEstimate) -> list[str]:
    """Say what a plan is, and why."""
    scheme = SHARDED if plan.sharded else plan.quantization
    lines = [
        f"memory: {estimate.free / 1e9:.3g} GB free; the transformer in {_scheme_name(scheme)} takes "
        f"{estimate.transformer[scheme] / 1e9:.3g}, the text encoder {estimate.text_encoder / 1e9:.3g}, "
        f"{estimate.work_name} {estimate.work / 1e9:.3g}"
    ]
    if plan.mapped_bytes:
        lines.append(
            f"of these weights {plan.mapped_bytes / 1e9:.3g} GB are mapped from their files: the system reads them as "
            "they are used, and may take their memory back"
        )
    if estimate.ram_free is not None:
        text_on_cpu = not plan.text_encoder_on_device
        text = f", the text encoder {estimate.text_encoder / 1e9:.3g}" if text_on_cpu else ""
        lines.append(
            f"memory of the machine: {estimate.ram_free / 1e9:.3g} GB free; what passes through takes "
            f"{PASSING_BYTES * estimate.processes / 1e9:.3g}{text}"
        )
    if estimate.timesteps:
        lines.append(
            f"a table of {estimate.timesteps} timesteps replaces the modulations; it takes {estimate.table / 1e9:.3g} "
            "GB of the machine's memory"
        )
    if plan.read_again_bytes:
        lines.append(
            f"{plan.read_again_bytes / 1e9:.3g} GB of the mapped weights don't fit into memory: they are read from the "
            "disk again whenever they are used, which is slow"
        )
    if plan.quantization != "none":
        why = "as asked" if asked != "auto" else "because it doesn't fit otherwise"
        lines.append(f"quantised to {plan.quantization} {why}: its weights are rounded, LoRAs aren't")
    if not plan.text_encoder_on_device:
        lines.append("the text encoder runs on the CPU, for want of room on the GPU: slower, with the same result")
    if plan.predicted_s:
        lines.append(f"a step on the largest image takes at least {plan.predicted_s:.2g} s, by the GPU's data sheet")
    if plan.compiled:
        lines.append(
            "the blocks are compiled, which takes a minute or two, because the run is long enough to win it back"
        )
    return lines


def log_plan(plan: MemoryPlan, asked: str, estimate: MemoryEstimate) -> None:
    """Log what a plan is, and why."""
    for line in describe_plan(plan, asked, estimate):
        log.info(line)
