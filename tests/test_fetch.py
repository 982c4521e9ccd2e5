"""From a name to a local path: folders, hub names that can't be had here, URLs."""

import functools
import http.server
import threading

import pytest

from lora_utils import fetch
from lora_utils.errors import UserError


@pytest.fixture
def files(tmp_path):
    """A web server on this machine. -> (its folder, its URL)"""
    (tmp_path / "www").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path / "www", f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_model_folder_is_taken_as_it_is(random_model):
    assert fetch.fetch_model(str(random_model)) == random_model


@pytest.mark.parametrize(
    ("name", "message"),
    [("/no/such/folder", "neither a folder nor a hub name"), ("tests", "holds no model_index.json")],
)
def test_what_is_no_model_is_refused(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    with pytest.raises(UserError, match=message):
        fetch.fetch_model(name)


def test_a_hub_name_without_a_network_is_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="nor to be had from the hub"):
        fetch.fetch_model("Qwen/Qwen-Image-2512")


def test_base_model_alone_selects_the_model(monkeypatch):
    monkeypatch.delenv("BASE_MODEL", raising=False)
    assert fetch.base_model_name() == "Qwen/Qwen-Image"
    monkeypatch.setenv("BASE_MODEL", "Qwen/Qwen-Image-2512")
    assert fetch.base_model_name() == "Qwen/Qwen-Image-2512"


def test_a_url_is_downloaded_once_and_whole(files, tmp_path):
    folder, url = files
    (folder / "w.zip").write_bytes(b"abc" * 1000)
    path = fetch.fetch_file(f"{url}/w.zip", tmp_path / "cache")
    assert path.read_bytes() == b"abc" * 1000
    (folder / "w.zip").unlink()
    assert fetch.fetch_file(f"{url}/w.zip", tmp_path / "cache") == path


def test_a_url_that_fails_or_is_too_large_leaves_nothing(files, tmp_path, monkeypatch):
    folder, url = files
    with pytest.raises(UserError, match="404"):
        fetch.fetch_file(f"{url}/missing.zip", tmp_path / "cache")
    (folder / "w.zip").write_bytes(b"abc" * 1000)
    monkeypatch.setattr(fetch, "MAX_DOWNLOAD_BYTES", 100)
    with pytest.raises(UserError, match="larger than"):
        fetch.fetch_file(f"{url}/w.zip", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_path_is_itself_and_a_missing_one_is_named(tmp_path):
    (tmp_path / "w.zip").write_bytes(b"")
    assert fetch.fetch_file(str(tmp_path / "w.zip"), tmp_path) == tmp_path / "w.zip"
    with pytest.raises(UserError, match="there is no file"):
        fetch.fetch_file("weights.zip", tmp_path)
