"""From a name to a local path: folders, hub names, URLs."""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading

import pytest
from diffusers import QwenImagePipeline

from lora_utils import fetch
from lora_utils.errors import UserError
from tests import hub_server


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


def fetch_in_a_fresh_process(name, endpoint, cache):
    """The hub's client reads its settings once, when it is imported. -> (what was printed, the folder or the error)"""
    code = f"""if True:
        from lora_utils import errors, fetch
        try:
            print(fetch.fetch_model({name!r}))
        except errors.UserError as error:
            print(error)
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    *printed, last = done.stdout.splitlines()
    return printed, last


def test_a_hub_model_is_fetched_once_only_the_needed_files_with_a_line_of_their_size(tiny_model, tmp_path):
    repository = tmp_path / "repository"
    shutil.copytree(tiny_model, repository)
    (repository / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"another format")
    (repository / "demo.png").write_bytes(b"a picture")
    with hub_server.serving(repository) as (endpoint, served):
        printed, folder = fetch_in_a_fresh_process(hub_server.REPO, endpoint, tmp_path / "cache")
        needed = {str(file.relative_to(tiny_model)) for file in tiny_model.rglob("*") if file.is_file()} - {"README.md"}
        size_gb = sum((tiny_model / name).stat().st_size for name in needed) / 1e9
        assert printed == [f"fetching {hub_server.REPO} from the hub: {size_gb:.2f} GB"]
        assert set(served) == needed
        assert QwenImagePipeline.from_pretrained(folder).transformer is not None

        again, same_folder = fetch_in_a_fresh_process(hub_server.REPO, endpoint, tmp_path / "cache")
        assert (again, same_folder, len(served)) == ([], folder, len(needed))
        _, refused = fetch_in_a_fresh_process("Qwen/other", endpoint, tmp_path / "cache")
        assert refused.startswith("the hub has no model 'Qwen/other'")
    offline, kept = fetch_in_a_fresh_process(hub_server.REPO, endpoint, tmp_path / "cache")
    assert (offline, kept) == ([], folder), "with the hub gone, the cache is enough"


def test_base_model_alone_selects_the_model(monkeypatch):
    monkeypatch.delenv("BASE_MODEL", raising=False)
    assert fetch.base_model_name() == "Qwen/Qwen-Image"
    monkeypatch.setenv("BASE_MODEL", "Qwen/Qwen-Image-2512")
    assert fetch.base_model_name() == "Qwen/Qwen-Image-2512"


def test_a_url_is_downloaded_once_and_whole(files, tmp_path):
    folder, url = files
    (folder / "w.zip").write_bytes(b"abc" * 1000)
    path = fetch.fetch_weights(f"{url}/w.zip", tmp_path / "cache")
    assert path.read_bytes() == b"abc" * 1000
    (folder / "w.zip").unlink()
    assert fetch.fetch_weights(f"{url}/w.zip", tmp_path / "cache") == path


def test_a_url_that_fails_or_is_too_large_leaves_nothing(files, tmp_path, monkeypatch):
    folder, url = files
    with pytest.raises(UserError, match="404"):
        fetch.fetch_weights(f"{url}/missing.zip", tmp_path / "cache")
    (folder / "w.zip").write_bytes(b"abc" * 1000)
    monkeypatch.setattr(fetch, "MAX_DOWNLOAD_BYTES", 100)
    with pytest.raises(UserError, match="larger than"):
        fetch.fetch_weights(f"{url}/w.zip", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_path_is_itself_and_a_missing_one_is_named(tmp_path):
    (tmp_path / "w.zip").write_bytes(b"")
    assert fetch.fetch_weights(str(tmp_path / "w.zip"), tmp_path) == tmp_path / "w.zip"
    with pytest.raises(UserError, match="there is no"):
        fetch.fetch_weights("weights.zip", tmp_path)
