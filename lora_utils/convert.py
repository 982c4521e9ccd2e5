"""A LoRA from one tool's layout to another's.

python -m lora_utils.convert weights.zip lora_for_comfyui.safetensors --to comfyui
"""

import argparse
import sys
from pathlib import Path

from lora_utils.errors import UserError
from lora_utils.io.files import atomic_path, disk_errors

LAYOUTS = ("diffusers", "comfyui", "kohya", "diffsynth", "peft", "lycoris")  # `formats.LAYOUTS`, known without torch
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # torch's names


def convert(source: Path, target: Path, layout: str, dtype: str) -> str:
    """Read any layout, from a weights.zip, a file or an adapter folder, and write one. -> what was done, in sentences

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
    from lora_utils.lora.weights import read_weights  # noqa: PLC0415

    # What is there, and what may be written.
    apart = target.with_name(f"{target.stem}.embeddings.safetensors")
    for path in (target, apart):
        if path.exists():
            raise UserError(f"{path} is there already; name another file.")
    if not target.parent.is_dir():
        raise UserError(f"there is no folder {target.parent}; make it, or name another file.")
    lora, _ = read_weights(source)

    # The layers and, where the layout's readers don't take them, the embeddings beside them.
    numbers, tokens = getattr(torch, DTYPES[dtype]), ", ".join(lora.embeddings)
    with disk_errors(f"{target.name} can't be written", "free some room."), atomic_path(target) as partial:
        if layout == "peft":
            write_peft_folder(partial, lora, numbers)
        else:
            write_lora_file(partial, lora, layout, numbers)
        if tokens and not LAYOUTS[layout].takes_embeddings:
            write_embeddings(apart, lora)
    done = f"wrote {target}: {len(lora.layers)} layers in the layout of {layout}"
    if not tokens:
        return done
    if LAYOUTS[layout].takes_embeddings:
        return f"{done}, with the embeddings of {tokens}"
    return f"{done}\nwrote {apart}: the embeddings of {tokens}, for readers of {layout} refuse them beside the layers"


def main(arguments: list[str] | None = None) -> int:
    """Convert as the command line says. -> 0, or 1 with what was wrong on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m lora_utils.convert", description="Rewrite a LoRA for another tool."
    )
    parser.add_argument("source", type=Path, help="a weights.zip, a .safetensors LoRA of any layout, or peft's folder")
    parser.add_argument("target", type=Path, help="the .safetensors file to write; for peft the folder")
    parser.add_argument("--to", choices=LAYOUTS, default="diffusers")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    given = parser.parse_args(arguments)
    try:
        print(convert(given.source, given.target, given.to, given.dtype))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
