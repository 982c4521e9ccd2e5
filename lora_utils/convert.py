"""A LoRA from one tool's layout to another's.

python -m lora_utils.convert weights.zip lora_for_comfyui.safetensors --to comfyui
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from lora_utils.bundle import unpack_weights
from lora_utils.errors import UserError
from lora_utils.lora_file import LAYOUTS, read_lora_file, write_lora_file

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def convert(source: Path, target: Path, layout: str, dtype: torch.dtype) -> str:
    """Read any layout, from a weights.zip or a bare file, and write one. -> what was done, in a sentence."""
    if target.exists():
        raise UserError(f"{target} is there already; name another file.")
    with tempfile.TemporaryDirectory() as folder:
        lora_path, _ = unpack_weights(source, Path(folder))
        lora = read_lora_file(lora_path, source.name)
    write_lora_file(target, lora, layout, dtype)
    rows = f" and the rows of {', '.join(lora.rows)}, which only this package reads" if lora.rows else ""
    return f"wrote {target}: {len(lora.layers)} layers in the layout of {layout}{rows}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lora_utils.convert", description="Rewrite a LoRA for another tool."
    )
    parser.add_argument("source", type=Path, help="a weights.zip, or a .safetensors LoRA of any known layout")
    parser.add_argument("target", type=Path, help="the .safetensors file to write")
    parser.add_argument("--to", choices=list(LAYOUTS), default="diffusers")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    given = parser.parse_args(arguments)
    try:
        print(convert(given.source, given.target, given.to, DTYPES[given.dtype]))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
