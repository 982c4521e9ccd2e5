"""Hubs on this machine: one that serves a folder as the repository `Qwen/small`, and one that takes what is pushed.

They answer the calls that a download, or a push without xet, makes.
"""

import base64
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

REPO = "Qwen/small"
COMMIT = "c" * 40


def _handler(folder: Path, served: list[str]) -> type[http.server.BaseHTTPRequestHandler]:
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path.startswith(f"/api/models/{REPO}/tree/"):
                self.reply_json(
                    [{"type": "file", "path": n, "size": p.stat().st_size, "oid": _oid(p)} for n, p in files.items()]
                )
            elif path == f"/api/models/{REPO}" or path.startswith(f"/api/models/{REPO}/revision/"):
                siblings = [{"rfilename": n, "size": p.stat().st_size, "blobId": _oid(p)} for n, p in files.items()]
                self.reply_json({"id": REPO, "sha": COMMIT, "siblings": siblings})
            elif path.startswith(f"/{REPO}/resolve/") and (name := path.split("/", 5)[-1]) in files:
                self.reply(files[name].read_bytes(), ETag=f'"{_oid(files[name])}"')
                if self.command == "GET":
                    served.append(name)
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.end_headers()

        do_HEAD = do_GET

        def reply_json(self, value: object) -> None:
            self.reply(json.dumps(value).encode(), **{"Content-Type": "application/json"})

        def reply(self, body: bytes, **headers: str) -> None:
            self.send_response(200)
            for name, value in {**headers, "X-Repo-Commit": COMMIT, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """-> (the hub's URL, the names of the files that were downloaded so far)"""
    served: list[str] = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(folder, served)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", served
        server.shutdown()


# --- pushing --------------------------------------------------------------------------------------------------------


@dataclass
class Pushed:
    """What a hub was told, and the files of its repository."""

    url: str = ""
    created: list[dict[str, object]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    large: dict[str, bytes] = field(default_factory=dict)  # by hash, on their way


READER = "hf_" + "r" * 20  # a token that may only read
_READER = f"Bearer {READER}"


def _receiver(pushed: Pushed, token: str, commits: bool) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            pushed.tokens.add(self.headers.get("Authorization", ""))
            if self.headers.get("Authorization") != f"Bearer {token}":
                self.reply({"error": "Invalid credentials in Authorization header"}, 401)
            elif self.path == "/api/repos/create":
                pushed.created.append(json.loads(body))
                self.reply({"url": f"{pushed.url}/me/it"})
            elif "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                modes = {name: "regular" if name.endswith((".md", ".json")) else "lfs" for name in names}
                self.reply(
                    {"files": [{"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in modes.items()]}
                )
            elif self.path.endswith("/objects/batch"):
                upload = [
                    {
                        "oid": one["oid"],
                        "size": one["size"],
                        "actions": {"upload": {"href": f"{pushed.url}/put/{one['oid']}"}},
                    }
                    for one in json.loads(body)["objects"]
                ]
                self.reply({"transfer": "basic", "objects": upload})
            elif "/commit/" in self.path and commits:
                for line in body.splitlines():
                    self.commit(**json.loads(line))
                self.reply({"commitUrl": f"{pushed.url}/me/it/commit/{COMMIT}", "commitOid": COMMIT})
            elif "/commit/" in self.path:
                self.reply({"error": "the disk is full"}, 500)
            else:
                self.reply({})

        def do_GET(self) -> None:
            if self.path == "/api/whoami-v2" and self.headers.get("Authorization") in (f"Bearer {token}", _READER):
                role = "read" if self.headers.get("Authorization") == _READER else "write"
                self.reply({"name": "me", "auth": {"accessToken": {"role": role}}})
            else:
                self.reply({"error": "Invalid username or password."}, 401)

        def do_PUT(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            pushed.large[self.path.rpartition("/")[2]] = content
            self.reply({})

        def commit(self, key: str, value: dict[str, str]) -> None:
            if key == "file":
                pushed.files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                pushed.files[value["path"]] = pushed.large[value["oid"]]

        def reply(self, value: object, status: int = 200) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextmanager
def receiving(token: str, commits: bool = True) -> Iterator[Pushed]:
    """A hub with the repository me/it, which this token may write to. `commits` False: every commit fails."""
    pushed = Pushed()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _receiver(pushed, token, commits)) as server:
        pushed.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield pushed
        server.shutdown()
