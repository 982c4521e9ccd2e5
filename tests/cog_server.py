"""The real Cog server on this package, without Docker: started in a folder of its own, spoken to over HTTP."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from tests.cog_contract import write_schema
from tests.conftest import ROOT


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass
class Server:
    client: httpx2.Client
    log: Path

    def health(self) -> str:
        try:
            return self.client.get("/health-check").json()["status"]
        except httpx2.TransportError:
            return "UNREACHABLE"

    def wait_until_ready(self, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while (status := self.health()) != "READY":
            if time.monotonic() > deadline or status == "SETUP_FAILED":
                raise AssertionError(f"server is {status}:\n{self.log.read_text()}")
            time.sleep(0.1)

    def post(self, path: str, given: dict[str, Any], **options: Any) -> httpx2.Response:
        """Ask, and once more while the last run is still being put away (409)."""
        for _ in range(100):
            reply = self.client.post(path, json={"input": given}, **options)
            if reply.status_code != 409:
                return reply
            time.sleep(0.1)
        return reply


@contextmanager
def cog_server(folder: Path, model: Path, mode: str, **environment: str) -> Iterator[Server]:
    """`mode` is predict or train. The folder holds what the image would, and the schema that `cog build` writes."""
    for name in ("predict.py", "train.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "lora_utils").symlink_to(ROOT / "lora_utils")
    write_schema(ROOT, folder)
    port = free_port()
    log = folder / "server.log"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # its worker is started as `python`
        "BASE_MODEL": str(model),
        "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
        "COG_TRAIN_TYPE_STUB": "train.py:train",
        "PORT": str(port),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    command = [sys.executable, "-m", "cog.server.http", *(["--x-mode", "train"] if mode == "train" else [])]
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            server = Server(client, log)
            server.wait_until_ready()
            yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
