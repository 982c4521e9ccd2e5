"""LoRAs from files to files: another tool's layout, another rank, several as one, or what lies between two checkpoints.

python -m lora_utils.convert weights.zip lora_for_comfyui.safetensors --to comfyui
python -m lora_utils.convert style.zip person.zip both.safetensors --scales 1 0.6 --rank 32
python -m lora_utils.convert tuned.safetensors lora.safetensors --base BASE_MODEL --rank 64
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_utils.errors import UserError
from lora_utils.io.files import atomic_path, disk_errors

if TYPE_CHECKING:
    from lora_utils.lora.merge import Merged

LAYOUTS = ("diffusers", "comfyui", "kohya", "diffsynth", "peft", "lycoris")  # `formats.LAYOUTS`, known without torch
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # torch's names
EXTRACTED_RANK = 64


@dataclass(frozen=True, slots=True)
class Conversion:
    """What is read, what becomes of it, and what is written."""

    sources: Sequence[Path]
    target: Path
    layout: str = "diffusers"
    dtype: str = "bf16"
    scales: Sequence[float] = ()  # of the sources; none: 1 each
    rank: int | None = None  # None: the sum of the sources'
    base: Path | None = None  # the checkpoint that the one source is compared with


def convert(job: Conversion) -> str:
    """Read any layouts, from weights.zip, files or adapter folders, and write one. -> what was done, in sentences

    peft's is a folder, every other a file. Raises UserError for a target that is there or can't be written, for what is
    no LoRA, and for numbers that the dtype can't hold. What fails leaves nothing behind.
    """
    import torch  # noqa: PLC0415 (help and wrong options do without)

    from lora_utils.io.libraries import configure_libraries  # noqa: PLC0415
    from lora_utils.io.logging import log_to_stdout  # noqa: PLC0415

    configure_libraries()
    log_to_stdout()
    from lora_utils.lora.formats import (  # noqa: PLC0415
        LAYOUTS,
        write_embeddings,
        write_lora_file,
        write_peft_folder,
    )

    # What is there, and what may be written.
    target, layout = job.target, job.layout
    apart = target.with_name(f"{target.stem}.embeddings.safetensors")
    for path in (target, apart):
        if path.exists():
            raise UserError(f"{path} is there already; name another file.")
    if not target.parent.is_dir():
        raise UserError(f"there is no folder {target.parent}; make it, or name another file.")
    made = _make(job)
    lora = made.lora

    # The layers and, where the layout's readers don't take them, the embeddings beside them.
    numbers, tokens = getattr(torch, DTYPES[job.dtype]), ", ".join(lora.embeddings)
    with disk_errors(f"{target.name} can't be written", "free some room."), atomic_path(target) as partial:
        if layout == "peft":
            write_peft_folder(partial, lora, numbers)
        else:
            write_lora_file(partial, lora, layout, numbers)
        if tokens and not LAYOUTS[layout].takes_embeddings:
            write_embeddings(apart, lora)
    lost = f"\n{made.lost:.1%} of the size of the changes is lost" if made.lost > 5e-4 else ""
    done = f"wrote {target}: {len(lora.names)} layers in the layout of {layout}"
    if not tokens:
        return done + lost
    if LAYOUTS[layout].takes_embeddings:
        return f"{done}, with the embeddings of {tokens}{lost}"
    beside = f"wrote {apart}: the embeddings of {tokens}, for readers of {layout} refuse them beside the layers"
    return f"{done}\n{beside}{lost}"


def _make(job: Conversion) -> "Merged":
    """Return the LoRA that is to be written, and what it has lost of what it is made from."""
    from lora_utils.lora.merge import extract, merge  # noqa: PLC0415
    from lora_utils.lora.weights import read_weights  # noqa: PLC0415

    if job.base is not None:
        if len(job.sources) != 1 or job.scales:
            raise UserError("--base compares one checkpoint with it; give a single source, and no --scales.")
        return extract(job.sources[0], job.base, job.rank or EXTRACTED_RANK)
    if job.scales and len(job.scales) != len(job.sources):
        raise UserError(f"--scales has {len(job.scales)} numbers for {len(job.sources)} sources; give one for each.")
    loras = [read_weights(source)[0] for source in job.sources]
    return merge(
        list(zip(loras, job.scales or [1.0] * len(loras), strict=True)), job.rank, [p.name for p in job.sources]
    )


def main(arguments: list[str] | None = None) -> int:
    """Convert as the command line says. -> 0, or 1 with what was wrong on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m lora_utils.convert",
        description="Rewrite a LoRA for another tool, merge several, change a rank, or extract one from a checkpoint.",
    )
    parser.add_argument(
        "source", type=Path, nargs="+", help="weights.zip, .safetensors LoRAs of any layout, or folders of peft's"
    )
    parser.add_argument("target", type=Path, help="the .safetensors file to write; for peft the folder")
    parser.add_argument("--to", choices=LAYOUTS, default="diffusers")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--scales", type=float, nargs="+", default=(), help="of the sources; default 1 each")
    parser.add_argument("--rank", type=int, help="of the result; default: the sum of the sources', which is exact")
    parser.add_argument("--base", type=Path, help="extract what the source, a checkpoint, has changed of this one")
    given = parser.parse_args(arguments)
    if given.rank is not None and given.rank < 1:
        parser.error("--rank must be at least 1")
    job = Conversion(given.source, given.target, given.to, given.dtype, given.scales, given.rank, given.base)
    try:
        print(convert(job))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
