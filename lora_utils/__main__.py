"""Train and sample without Cog, by the same names: python -m lora_utils train --help, or sample --help."""

import argparse
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from lora_utils import cards, session
from lora_utils.command_line import add_options, described
from lora_utils.config import RunOptions, SampleRequest, TrainConfig
from lora_utils.console import log_to_stdout
from lora_utils.disk import refusals_named
from lora_utils.errors import UserError
from lora_utils.recipes import filled

ROOT = Path(__file__).parent.parent  # where Cog's entry points are


def train(given: dict[str, Any]) -> None:
    """Until the steps are done, or Ctrl-C or SIGTERM: then what has been learned is written all the same."""
    asked: list[int] = []

    def stop(number: int, _frame: object) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one ends it at once
        print("stopping after this step; once more ends it at once", flush=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    data, output, init = given.pop("dataset"), given.pop("output"), given.pop("init_weights")
    options = RunOptions(**{name: given.pop(name) for name in RunOptions.__dataclass_fields__ if name in given})
    given.setdefault("seed", session.seed_for(options))
    if output.exists():
        raise UserError(f"{output} is there already; name another --output.")
    train_it = session.run_on_all_cards if cards.several() > 1 else session.run
    train_it(TrainConfig(**filled(given)), options, data, output, init, stopped=lambda: bool(asked))
    print(f"the weights are in {output}", flush=True)


def sample(given: dict[str, Any]) -> None:
    from predict import Predictor  # noqa: PLC0415 (it brings Cog, which training does without)

    output, files = given.pop("output"), {name: given.pop(name) for name in ("image", "mask", "replicate_weights")}
    request = SampleRequest(**given)
    with refusals_named(f"the folder {output} can't be made", "name another --output."):
        output.mkdir(parents=True, exist_ok=True)
    predictor = Predictor()
    predictor.setup()
    loras = predictor.load(request, files["replicate_weights"] or "", None)
    images, size = predictor.draw(request, loras, files["image"], files["mask"])
    for path in predictor.save(images, request, loras, size):
        with refusals_named(f"{path.name} can't be written to {output}", "free some room."):
            print(f"wrote {shutil.copy(path, output)}")


def main(arguments: list[str] | None = None) -> int:
    """-> 0, or 1 with what was wrong on standard error."""
    parser = argparse.ArgumentParser(prog="python -m lora_utils", description="Qwen-Image LoRAs, without Cog.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    training = commands.add_parser("train", help="pictures -> weights.zip", description="BASE_MODEL names the model.")
    training.add_argument("dataset", type=Path, help="an archive or a folder of pictures and captions")
    training.add_argument("--output", type=Path, default=Path("weights.zip"), help="default weights.zip")
    training.add_argument("--init_weights", type=Path, help="a weights.zip or LoRA to go on learning from")
    add_options(training, TrainConfig, described(ROOT / "train.py"))
    add_options(training, RunOptions, described(ROOT / "train.py"))
    training.set_defaults(run=train)
    sampling = commands.add_parser("sample", help="a prompt -> pictures", description="BASE_MODEL names the model.")
    sampling.add_argument("--output", type=Path, default=Path("pictures"), help="a folder, default pictures")
    sampling.add_argument("--replicate_weights", help="weights.zip, a LoRA, a URL or a hub repository")
    sampling.add_argument("--image", type=Path, help="a picture to start from")
    sampling.add_argument("--mask", type=Path, help="what of it is drawn anew: white")
    add_options(sampling, SampleRequest, described(ROOT / "predict.py"))
    sampling.set_defaults(run=sample)
    given = vars(parser.parse_args(arguments))
    log_to_stdout()
    try:
        given.pop("run")(given)
    except UserError as error:
        print(f"{cards.ERROR_MARK}{error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
