"""python -m lora_utils.dataset DATASET: what a training would find in an archive or a folder."""

import sys

from lora_utils import cli
from lora_utils.config import TrainInputs, from_inputs
from lora_utils.conflicts import check_conflicts
from lora_utils.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Print the report on a dataset, or what is wrong with it. -> 0, or 1 where a training would refuse it."""
    given = vars(cli.dataset_parser().parse_args(arguments))
    try:
        print_report(from_inputs(TrainInputs, given))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def print_report(inputs: TrainInputs) -> None:
    """Print the report, which shows all that was found. Raises UserError with all that is wrong with the dataset."""
    warnings = check_conflicts(inputs.config, inputs.options)
    from lora_utils.io.libraries import import_libraries  # noqa: PLC0415 (help and wrong options do without)

    import_libraries()  # before anything else imports diffusers
    from lora_utils.dataset.report import describe_dataset  # noqa: PLC0415
    from lora_utils.dataset.scan import inspect, raise_problems  # noqa: PLC0415
    from lora_utils.io.archive import extracted  # noqa: PLC0415
    from lora_utils.io.download import base_model_name, download_model  # noqa: PLC0415
    from lora_utils.io.files import temporary_folder  # noqa: PLC0415
    from lora_utils.model.text_encoder import load_tokenizer  # noqa: PLC0415
    from lora_utils.model.variant import TEXT_TO_IMAGE, read_variant  # noqa: PLC0415

    try:
        model = download_model(base_model_name(), ("tokenizer",))
        tokenizer, variant = load_tokenizer(model), read_variant(model)
    except UserError as error:
        print(f"the captions' tokens aren't counted: {error}", file=sys.stderr)
        tokenizer, variant = None, TEXT_TO_IMAGE
    with temporary_folder("data") as folder:
        found = inspect(extracted(inputs.files.dataset, folder), inputs.config, tokenizer, variant)
        print("\n".join([*describe_dataset(found, inputs.config), *(f"  warning: {each}" for each in warnings)]))
        raise_problems(found.problems)


if __name__ == "__main__":
    sys.exit(main())
