"""Train and sample without Cog, by the same names: python -m lora_utils train --help, or sample --help."""

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from lora_utils import cli
from lora_utils.config import SampleInputs, TrainInputs, from_inputs
from lora_utils.errors import UserError
from lora_utils.io.access import OWNER
from lora_utils.io.files import disk_errors
from lora_utils.io.libraries import import_libraries
from lora_utils.io.logging import log_to_stdout, log_uncaught_to_stderr


def main(arguments: list[str] | None = None) -> int:
    """Run a command. -> 0, or 1 with what was wrong on standard error."""
    given = vars(cli.parser().parse_args(arguments))
    command = {"train": train, "sample": sample}[given.pop("command")]
    log_to_stdout()
    try:
        command(given.pop("output"), given)
    except UserError as error:
        log_uncaught_to_stderr(error)
        return 1
    return 0


def train(output: Path, given: dict[str, Any]) -> None:
    """Train until the steps are done, or Ctrl-C or SIGTERM: then what has been learned is written all the same."""
    from_inputs(TrainInputs, given)  # what is wrong is said before the libraries are imported
    if output.exists():
        raise UserError(f"{output} is there already; name another --output.")
    asked: list[int] = []

    def stop(number: int, _frame: object) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one ends it at once
        print("stopping after this step; once more ends it at once", flush=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    import_libraries()
    from lora_utils.training import launch  # noqa: PLC0415 (help and wrong options do without it)

    token = os.environ.get(launch.TOKEN_VARIABLE) or OWNER.hub_token(None)
    done = launch.train({**given, "hub_token": token}, output, stopped=lambda: bool(asked))
    print(f"the weights are in {done.weights}", flush=True)


def sample(output: Path, given: dict[str, Any]) -> None:
    """Sample a prompt's images into a folder."""
    inputs = from_inputs(SampleInputs, given)
    with disk_errors(f"the folder {output} can't be made", "name another --output."):
        output.mkdir(parents=True, exist_ok=True)
    import_libraries()
    from lora_utils.sampling.predictor import ModelPredictor  # noqa: PLC0415 (help and wrong options do without it)

    model = ModelPredictor()
    try:
        for path in model.predict(inputs, OWNER).paths:
            with disk_errors(f"{path.name} can't be written to {output}", "free some room."):
                print(f"wrote {shutil.copy(path, output)}", flush=True)
    finally:
        model.close()


def end(code: int) -> NoReturn:
    """End the process, as one of a run on several GPUs if it is one."""
    if "RANK" in os.environ:
        from lora_utils.training.distributed import end_process  # noqa: PLC0415 (a run on one GPU does without it)

        end_process(code)
    sys.exit(code)


if __name__ == "__main__":
    end(main())
