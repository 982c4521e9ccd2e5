"""A small stand-in for the hosted API: what the `replicate` client calls, passed on to real Cog servers.

It keeps uploads, runs a training in the background, and makes of each training a version that starts with its weights
in COG_WEIGHTS. `VERSION` of any model is the package without weights of its own.
"""

import base64
import email
import email.policy
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cog_server import Server, cog_server

BASE_VERSION = "VERSION"
CREATED = "2026-11-26T00:00:00Z"
OUTPUT_SCHEMA = {"components": {"schemas": {"Output": {"type": "array", "items": {"type": "string", "format": "uri"}}}}}


@dataclass
class HostedApi:
    """What the stand-in knows: files, trainings and versions by their names, and the servers behind them."""

    folder: Path
    model: Path
    servers: ExitStack
    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    trainings: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, Server] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)

    def start_server(self, name: str, mode: str, **environment: str) -> Server:
        """Start Cog's server in a folder of its own."""
        (self.folder / name).mkdir()
        return self.servers.enter_context(cog_server(self.folder / name, self.model, mode, **environment))

    def keep(self, content: bytes, name: str) -> str:
        """Keep a file. -> its URL"""
        path = f"/files/{len(self.files)}/{name}"
        self.files[path] = content
        return self.url + path

    def create_training(self, version: str, body: dict[str, Any]) -> dict[str, Any]:
        """Begin a training in the background."""
        identifier = f"training{len(self.trainings)}"
        training = {"id": identifier, "model": "you/qwen-image-lora", "version": version, "status": "starting"}
        training |= {"input": body["input"], "created_at": CREATED}
        self.trainings[identifier] = training
        threading.Thread(target=self._train, args=(training, body["destination"]), daemon=True).start()
        return training

    def _train(self, training: dict[str, Any], destination: str) -> None:
        trainer = self.start_server(training["id"], "train")
        reply = trainer.post("/trainings", training["input"]).json()
        training["error"] = reply.get("error")
        if reply["status"] == "succeeded":
            weights = base64.b64decode(reply["output"]["weights"].split(",")[1])
            version = f"v{len(self.trainings)}"
            self.weights[version] = self.keep(weights, "weights.zip")
            training["output"] = {"version": f"{destination}:{version}", "weights": self.weights[version]}
        training["status"] = reply["status"]  # last, for a client may read at any moment

    def predict(self, version: str, given: dict[str, Any]) -> dict[str, Any]:
        """Run a prediction on a version's server, which is started where it doesn't run yet."""
        if version not in self.versions:
            environment = {"COG_WEIGHTS": self.weights[version]} if version in self.weights else {}
            self.versions[version] = self.start_server(version, "predict", **environment)
        reply = self.versions[version].post("/predictions", given).json()
        return {"id": "p", "model": "", "version": version, "input": given, "created_at": CREATED, **reply}


def _handler(api: HostedApi) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            match self.path.strip("/").split("/"):
                case ["files", *_]:
                    self.reply(api.files[self.path])
                case ["v1", "trainings", identifier]:
                    self.reply_json(api.trainings[identifier])
                case ["v1", "models", _, _, "versions", version]:
                    self.reply_json(
                        {"id": version, "created_at": CREATED, "cog_version": "", "openapi_schema": OUTPUT_SCHEMA}
                    )

        def do_POST(self) -> None:
            assert self.headers["Authorization"] == "Bearer secret"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            match self.path.strip("/").split("/"):
                case ["v1", "files"]:
                    name, content = uploaded(self.headers["Content-Type"], body)
                    file = {"id": name, "name": name, "content_type": "", "size": len(content), "etag": ""}
                    urls = {"get": api.keep(content, name)}
                    self.reply_json({**file, "checksums": {}, "metadata": {}, "created_at": CREATED, "urls": urls})
                case ["v1", "models", _, _, "versions", version, "trainings"]:
                    self.reply_json(api.create_training(version, json.loads(body)))
                case ["v1", "predictions"]:
                    asked = json.loads(body)
                    self.reply_json(api.predict(asked["version"], asked["input"]))

        def reply_json(self, value: object) -> None:
            self.reply(json.dumps(value).encode(), "application/json")

        def reply(self, body: bytes, kind: str = "application/zip") -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def uploaded(content_type: str, body: bytes) -> tuple[str, bytes]:
    """Return the name and the content of the one file of a form."""
    header = f"Content-Type: {content_type}\r\n\r\n".encode()
    (part,) = email.message_from_bytes(header + body, policy=email.policy.HTTP).iter_parts()
    return str(part.get_filename()), part.get_content()


@contextmanager
def hosted_api(folder: Path, model: Path) -> Iterator[HostedApi]:
    """Run the stand-in on this machine."""
    with ExitStack() as servers:
        api = HostedApi(folder, model, servers)
        listener = servers.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(api)))
        api.url = f"http://127.0.0.1:{listener.server_address[1]}"
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        try:
            yield api
        finally:
            listener.shutdown()
