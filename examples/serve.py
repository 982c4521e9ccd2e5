"""Cog's real server on the small model, without Docker: `make serve`. Predictions on one port, trainings on the next.

This module owns the folder that stands in for the image, with the schema that `cog build` would write.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from examples.demo import MODEL
from scripts.cog_contract import write_schema

ROOT = Path(__file__).parent.parent


def prepare_folder(folder: Path) -> None:
    """Fill it with what the image would hold, and the schema that the server validates with."""
    for name in ("predict.py", "train.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "lora_utils").symlink_to(ROOT / "lora_utils")
    write_schema(ROOT, folder)


def start(folder: Path, model: Path, mode: str, port: int, **given: object) -> subprocess.Popen[bytes]:
    """The server in a prepared folder. `mode` is predict or train; the rest goes to Popen, `env` on top of ours.

    It listens to this machine alone unless `host` says otherwise: there is no password, and it reads local files.
    """
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # its worker is started as `python`
        "BASE_MODEL": str(model),
        "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
        "COG_TRAIN_TYPE_STUB": "train.py:train",
        "PORT": str(port),
        "OMP_NUM_THREADS": "1",
        **(given.pop("env", None) or {}),  # type: ignore[dict-item]
    }
    host = str(given.pop("host", "127.0.0.1"))
    mode_options = ["--x-mode", "train"] if mode == "train" else []
    command = [sys.executable, "-m", "cog.server.http", "--host", host, *mode_options]
    return subprocess.Popen(command, cwd=folder, env=environment, **given)  # type: ignore[call-overload]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=5000, help="of predictions; trainings are on the next")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in, without a password")
    port, host = (getattr(parser.parse_args(), name) for name in ("port", "host"))
    servers: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        prepare_folder(Path(folder))
        print(f"predictions on http://{host}:{port}, trainings on http://{host}:{port + 1}; stop with Ctrl-C")
        try:
            servers += [
                start(Path(folder), MODEL, mode, port + i, host=host) for i, mode in enumerate(("predict", "train"))
            ]
            while all(server.poll() is None for server in servers):
                time.sleep(0.2)
        except KeyboardInterrupt:
            pass
        finally:
            for server in servers:
                server.terminate()
            for server in servers:
                server.wait()


if __name__ == "__main__":
    main()
