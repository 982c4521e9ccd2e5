"""From a name to a local path: folders, hub names, URLs."""

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
from diffusers import QwenImagePipeline

from lora_utils.errors import UserError
from lora_utils.io import download, transfer
from lora_utils.io.access import client_access
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
    assert download.download_model(str(random_model)) == random_model


@pytest.mark.parametrize(
    ("name", "message"),
    [("/no/such/folder", "neither a folder nor a hub name"), ("tests", "holds no model_index.json")],
)
def test_what_is_no_model_is_refused(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    with pytest.raises(UserError, match=message):
        download.download_model(name)


def test_a_hub_name_without_a_network_is_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="nor to be had from the hub"):
        download.download_model("Qwen/Qwen-Image-2512")


def fetch_in_a_fresh_process(name, endpoint, cache):
    """The hub's client reads its settings once, when it is imported. -> (what was printed, the folder or the error)"""
    code = f"""if True:
        from lora_utils import errors
        from lora_utils.io import download
        from lora_utils.io.logging import log_to_stdout
        log_to_stdout()
        try:
            print(download.download_model({name!r}))
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
    (repository / "demo.png").write_bytes(b"an image")
    with hub_server.serving(repository) as (endpoint, served):
        printed, folder = fetch_in_a_fresh_process(hub_server.REPO, endpoint, tmp_path / "cache")
        needed = {str(file.relative_to(tiny_model)) for file in tiny_model.rglob("*") if file.is_file()} - {"README.md"}
        size_gb = sum((tiny_model / name).stat().st_size for name in needed) / 1e9
        assert printed == [f"downloading {hub_server.REPO} from the hub: {size_gb:.2f} GB"]
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
    assert download.base_model_name() == "Qwen/Qwen-Image"
    monkeypatch.setenv("BASE_MODEL", "Qwen/Qwen-Image-2512")
    assert download.base_model_name() == "Qwen/Qwen-Image-2512"


def test_a_url_is_downloaded_once_and_completely(files, tmp_path):
    folder, url = files
    (folder / "w.zip").write_bytes(b"abc" * 1000)
    path = download.download_weights(f"{url}/w.zip", tmp_path / "cache")
    assert path.read_bytes() == b"abc" * 1000
    (folder / "w.zip").write_bytes(b"another")
    os.utime(folder / "w.zip", (1, 1))
    assert download.download_weights(f"{url}/w.zip", tmp_path / "cache").read_bytes() == b"another"


def test_a_url_that_fails_or_is_too_large_leaves_nothing(files, tmp_path, monkeypatch):
    folder, url = files
    with pytest.raises(UserError, match="404"):
        download.download_weights(f"{url}/missing.zip", tmp_path / "cache")
    (folder / "w.zip").write_bytes(b"abc" * 1000)
    monkeypatch.setattr(transfer, "MAX_BYTES", 100)
    with pytest.raises(UserError, match="larger than"):
        download.download_weights(f"{url}/w.zip", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_path_is_itself_and_a_missing_one_is_named(tmp_path):
    (tmp_path / "w.zip").write_bytes(b"")
    assert download.download_weights(str(tmp_path / "w.zip"), tmp_path) == tmp_path / "w.zip"
    with pytest.raises(UserError, match="there is no"):
        download.download_weights("weights.zip", tmp_path)


# --- weights of a hub repository ------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path):
    """A repository's folder with these files of a few bytes."""

    def write(*names):
        folder = tmp_path / "repository"
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(name.encode())
        return folder

    return write


def weights_from_the_hub(folder, source, cache, token=None, most_bytes=None):
    """What a fresh process says to it: a path's content, or the error."""
    code = f"""if True:
        import logging, sys
        logging.basicConfig(level="DEBUG", stream=sys.stderr)
        from pathlib import Path
        from lora_utils import errors
        from lora_utils.io import download, transfer
        from lora_utils.io.logging import log_to_stdout
        log_to_stdout()
        transfer.MAX_BYTES = {most_bytes} or transfer.MAX_BYTES
        try:
            print(download.download_weights({source!r}, Path({str(cache)!r}), {token!r}).read_text())
        except errors.UserError as error:
            print(error)
    """
    with hub_server.serving(folder) as (endpoint, served):
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(cache)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stdout + done.stderr, served


@pytest.mark.parametrize(
    ("names", "source", "expected"),
    [
        (["weights.zip", "other.safetensors", "README.md"], "Qwen/small", "weights.zip"),
        (["pytorch_lora_weights.safetensors", "x.safetensors"], "Qwen/small", "pytorch_lora_weights.safetensors"),
        (["only.safetensors", "model.bin"], "Qwen/small", "only.safetensors"),
        (["a/one.safetensors", "two.safetensors"], "Qwen/small/a/one.safetensors", "a/one.safetensors"),
        (["one.safetensors", "two.safetensors"], "Qwen/small", "name one, like 'Qwen/small/one.safetensors'"),
        (["model.bin", "weights.ckpt", "lora.pt"], "Qwen/small", "and holds none"),
        (["model.bin"], "Qwen/small/model.bin", "has no 'model.bin' that could be a LoRA"),
        (["one.safetensors"], "Qwen/other", "no repository 'Qwen/other' that may be read; for a private one give"),
    ],
)
def test_a_repositorys_lora_is_found_and_pickles_are_never_looked_at(names, source, expected, repository, tmp_path):
    said, _, served = weights_from_the_hub(repository(*names), source, tmp_path / "cache")
    assert expected in said
    assert not [name for name in served if name.endswith((".bin", ".pt", ".ckpt"))]


def test_a_token_is_in_no_log(repository, tmp_path):
    said, everything, _ = weights_from_the_hub(
        repository("only.safetensors"), "Qwen/small", tmp_path / "c", token="hf_secretsecret"
    )
    assert said == "only.safetensors"
    assert "hf_secretsecret" not in everything


def test_a_repositorys_file_that_is_too_large_is_not_downloaded(repository, tmp_path):
    said, _, served = weights_from_the_hub(
        repository("only.safetensors"), "Qwen/small", tmp_path / "cache", most_bytes=5
    )
    assert "is larger than" in said
    assert served == []


def test_a_redirect_is_followed_to_http_alone(tmp_path):
    (tmp_path / "secret").write_text("x")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", f"file://{tmp_path}/secret")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match="which is no http address"):
            download.download_weights(f"http://127.0.0.1:{server.server_address[1]}/w.zip", tmp_path / "cache")
        server.shutdown()
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_download_keeps_its_name_for_messages(files, tmp_path):
    folder, url = files
    (folder / "Qwen-Image-Lightning.safetensors").write_bytes(b"x")
    path = download.download_weights(f"{url}/Qwen-Image-Lightning.safetensors?download=true", tmp_path / "cache")
    assert path.name == "Qwen-Image-Lightning.safetensors"


# --- models of another kind -----------------------------------------------------------------------------------------

OTHERS = ["FluxPipeline", "FluxKontextPipeline", "QwenImageLayeredPipeline"]


@pytest.mark.parametrize("pipeline", [*OTHERS, "QwenImage21Pipeline", "StableDiffusionXLPipeline"])
def test_a_folder_of_another_kind_is_refused_by_its_pipeline(pipeline, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    with pytest.raises(UserError, match=f"is a model of {pipeline}, and not a Qwen-Image"):
        download.download_model(str(tmp_path))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "[" * 100_000])
def test_an_index_that_cannot_be_read_is_named(content, tmp_path):
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(UserError, match=r"model_index\.json of BASE_MODEL .* can't be read"):
        download.download_model(str(tmp_path))


def test_of_a_hub_model_of_another_kind_only_the_index_is_downloaded(tiny_model, tmp_path):
    repository = tmp_path / "repository"
    shutil.copytree(tiny_model, repository)
    index = json.loads((repository / "model_index.json").read_text())
    (repository / "model_index.json").write_text(json.dumps({**index, "_class_name": "QwenImageLayeredPipeline"}))
    with hub_server.serving(repository) as (endpoint, served):
        _, refused = fetch_in_a_fresh_process(hub_server.REPO, endpoint, tmp_path / "cache")
    assert "is a model of QwenImageLayeredPipeline" in refused
    assert served == ["model_index.json"]


@pytest.mark.parametrize("source", ["../..", "a/..", "./x", "owner/na--me", "-a/b"])
def test_names_that_the_hub_cannot_have_are_refused(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"there is no (weights )?file"):
        download.download_weights(source, tmp_path / "cache", access=client_access())
