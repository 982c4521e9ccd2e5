"""The real Cog server on this package, without Docker: started in a folder of its own, spoken to over HTTP."""

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from examples import serve


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
    """`mode` is predict or train. The server runs in the folder, which also takes its log."""
    serve.prepare_folder(folder)
    port = free_port()
    log = folder / "server.log"
    with log.open("w") as output:
        process = serve.start(folder, model, mode, port, env=environment, stdout=output, stderr=subprocess.STDOUT)
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
