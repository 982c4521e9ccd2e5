"""A LoRA from one tool's layout to another's.

python -m lora_utils.convert weights.zip lora_for_comfyui.safetensors --to comfyui
"""

import argparse
import sys
import tempfile
from pathlib import Path

from lora_utils.errors import UserError

LAYOUTS = ("diffusers", "comfyui", "kohya", "diffsynth", "peft", "lycoris")  # `formats.LAYOUTS`, known without torch
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # torch's names


def convert(source: Path, target: Path, layout: str, dtype: str) -> str:
    """Read any layout, from a weights.zip or a bare file, and write one. -> what was done, in a sentence

    Raises UserError for a target that exists and for what is no LoRA.
    """
    import torch  # noqa: PLC0415 (help and wrong options do without)

    from lora_utils.lora.formats import read_lora_file, write_lora_file  # noqa: PLC0415
    from lora_utils.lora.weights_zip import extract_weights  # noqa: PLC0415

    if target.exists():
        raise UserError(f"{target} is there already; name another file.")
    with tempfile.TemporaryDirectory() as folder:
        lora_path, _ = extract_weights(source, Path(folder))
        lora = read_lora_file(lora_path, source.name)
    write_lora_file(target, lora, layout, getattr(torch, DTYPES[dtype]))
    tokens = f" and the embeddings of {', '.join(lora.embeddings)}, which only this package reads"
    return f"wrote {target}: {len(lora.layers)} layers in the layout of {layout}{tokens if lora.embeddings else ''}"


def main(arguments: list[str] | None = None) -> int:
    """Convert as the command line says. -> 0, or 1 with what was wrong on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m lora_utils.convert", description="Rewrite a LoRA for another tool."
    )
    parser.add_argument("source", type=Path, help="a weights.zip, or a .safetensors LoRA of any known layout")
    parser.add_argument("target", type=Path, help="the .safetensors file to write")
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
