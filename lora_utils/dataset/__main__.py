"""python -m lora_utils.dataset DATASET: what a training would find in an archive or a folder."""

import sys
import tempfile
from pathlib import Path

from lora_utils import cli
from lora_utils.config import TrainInputs, from_inputs
from lora_utils.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Print the report on a dataset, or what is wrong with it. -> 0, or 1 where a training would refuse it."""
    given = vars(cli.dataset_parser().parse_args(arguments))
    try:
        inputs = from_inputs(TrainInputs, given)
        print("\n".join(report(inputs)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def report(inputs: TrainInputs) -> list[str]:
    """Return the report's lines. Raises UserError with all that is wrong with the dataset."""
    from lora_utils.dataset.report import describe_dataset  # noqa: PLC0415 (help and wrong options do without)
    from lora_utils.dataset.scan import load  # noqa: PLC0415
    from lora_utils.io.archive import extracted  # noqa: PLC0415
    from lora_utils.io.download import base_model_name, download_model  # noqa: PLC0415
    from lora_utils.io.logging import configure_libraries  # noqa: PLC0415

    configure_libraries()
    from lora_utils.model.text_encoder import load_tokenizer  # noqa: PLC0415

    try:
        tokenizer = load_tokenizer(download_model(base_model_name(), ("tokenizer",)))
    except UserError as error:
        print(f"the captions' tokens aren't counted: {error}", file=sys.stderr)
        tokenizer = None
    with tempfile.TemporaryDirectory(prefix="qwen-image-lora-") as folder:
        found = load(extracted(inputs.files.dataset, Path(folder)), inputs.config, tokenizer)
        return describe_dataset(found, inputs.config)


if __name__ == "__main__":
    sys.exit(main())
