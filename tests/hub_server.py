"""A hub on this machine that serves one folder as the repository `Qwen/small`: the calls that a download makes."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
