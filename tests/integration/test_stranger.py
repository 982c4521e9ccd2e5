"""The real Cog server in a stranger's hands: the operator's token, folders, files and network stay the operator's."""

import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file

from examples import serve
from tests import hub_server
from tests.cog_server import Server, cog_server
from tests.integration.test_server import SHORT, SMALL, content_of, data_uri, dataset  # noqa: F401 (a fixture)
from tests.lora import judge

OPERATOR = "hf_" + "o" * 20


class Counting(http.server.BaseHTTPRequestHandler):
    """A web server that counts what it is asked, and is silent at /silent."""

    asked: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers.get("Authorization")))
        if self.path == "/silent":
            time.sleep(20)
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def inside() -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """A service of the operator's own network: its URL, and what it was asked with which token."""
    asked: list[tuple[str, str | None]] = []
    handler = type("Handler", (Counting,), {"asked": asked})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


@pytest.fixture(scope="module")
def hub() -> Iterator[hub_server.Pushed]:
    """A hub that takes the operator's token."""
    with hub_server.receiving(OPERATOR) as pushed:
        yield pushed


def start(folder: Path, model: Path, mode: str, endpoint: str, **environment: str):
    (folder / "tmp").mkdir()
    operators = {"HF_TOKEN": OPERATOR, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "TMPDIR": str(folder / "tmp")}
    return cog_server(folder, model, mode, **operators, HF_HOME=str(folder / "hf"), **environment)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, random_model, hub) -> Iterator[Server]:
    with start(tmp_path_factory.mktemp("trainer"), random_model, "train", hub.url) as server:
        yield server


@pytest.fixture(scope="module")
def predictor(tmp_path_factory, random_model, inside) -> Iterator[Server]:
    with start(tmp_path_factory.mktemp("predictor"), random_model, "predict", inside[0]) as server:
        yield server


def refused(server: Server, path: str, given: dict) -> str:
    reply = server.post(path, given).json()
    assert reply["status"] == "failed", reply
    server.wait_until_ready(5)
    assert len(reply["error"]) < 1000
    return reply["error"]


# --- trainings ------------------------------------------------------------------------------------------------------


def test_a_client_without_a_token_pushes_with_none(trainer, dataset, hub):  # noqa: F811
    given = {"dataset": data_uri(dataset), **SHORT, "hub_repo": "me/it", "hub_private": False}
    assert "hub_repo me/it needs hub_token" in refused(trainer, "/trainings", given)
    assert (hub.created, hub.tokens) == ([], set())


@pytest.mark.parametrize("run_dir", ["/tmp/victim", "victim", "../victim"])
def test_a_client_names_no_folder_of_the_server(run_dir, trainer, dataset):  # noqa: F811
    given = {"dataset": data_uri(dataset), **SHORT, "run_dir": run_dir, "resume": "auto"}
    assert "run_dir isn't open to requests" in refused(trainer, "/trainings", given)


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_dataset_is_not_the_servers_own_folder(name, trainer):
    assert "dataset is needed" in refused(trainer, "/trainings", {"dataset": name, **SHORT})


def test_a_training_that_fails_leaves_nothing_in_the_temporary_folder(trainer, dataset):  # noqa: F811
    refused(trainer, "/trainings", {"dataset": data_uri(dataset), **SHORT, "warmup_steps": 9})
    refused(trainer, "/trainings", {"dataset": data_uri(b"junk"), **SHORT})
    assert list((trainer.log.parent / "tmp").glob("qwen-image-lora-*")) == []


# --- predictions ----------------------------------------------------------------------------------------------------


def ask(**given) -> dict:
    return {"prompt": "a red circle", **SMALL, **given}


def test_a_client_reaches_no_address_inside(predictor, inside):
    url, asked = inside
    before = len(asked)
    for source in (f"{url}/x.safetensors", url.replace("127.0.0.1", "localhost"), "http://169.254.169.254/latest"):
        assert "leads into a private network" in refused(predictor, "/predictions", ask(extra_lora=source))
    assert len(asked) == before


def test_a_client_cannot_tell_local_files_from_missing_ones(predictor):
    said = {refused(predictor, "/predictions", ask(extra_lora=path)) for path in ("/etc/passwd", "/etc/nothing")}
    assert len({each.replace("passwd", "nothing") for each in said}) == 1


def test_the_operators_token_reads_nothing_for_a_client(predictor, inside):
    _, asked = inside
    asked.clear()
    assert "there is no file 'operator/private-lora'" in refused(
        predictor, "/predictions", ask(extra_lora="operator/private-lora")
    )
    assert asked
    assert {token for _, token in asked} == {None}


def test_a_data_uri_is_never_whole_in_an_error_or_the_log(predictor):
    content = data_uri(b"x" * 50_000)
    said = refused(predictor, "/predictions", ask(extra_lora=content))
    assert "data:..." in said
    assert content[100:400] not in predictor.log.read_text()


def test_a_prompt_of_60_megabytes_is_refused_at_once(predictor):
    began = time.monotonic()
    assert "60000000 characters; 100000 are the most" in refused(
        predictor, "/predictions", ask(prompt="a" * 60_000_000)
    )
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("output_format", ["jpg", "webp", "png"])
def test_a_prompt_of_45_000_letters_is_cut_in_the_files_settings_and_not_the_image_lost(output_format, predictor):
    given = ask(prompt="word " * 9000, output_format=output_format, steps=1)
    reply = predictor.post("/predictions", given).json()
    assert reply["status"] == "succeeded", reply
    assert len(reply["output"]) == 1
    cut = "the prompt is too long for the settings in a jpg file, and is cut there" in reply["logs"]
    assert cut == (output_format == "jpg")


def test_a_file_of_another_model_is_named_and_the_base_is_as_before(predictor, random_model, tmp_path):
    before = content_of(predictor.post("/predictions", ask()).json()["output"][0])
    flux = {"transformer.single_transformer_blocks.0.proj_out.lora_A.weight": judge.given()[0][0]}
    save_file(flux, tmp_path / "flux.safetensors")
    uri = data_uri((tmp_path / "flux.safetensors").read_bytes())
    assert "holds layers of FLUX" in refused(predictor, "/predictions", ask(replicate_weights=uri))
    assert content_of(predictor.post("/predictions", ask()).json()["output"][0]) == before


def test_what_a_failed_prediction_leaves_goes(predictor):
    refused(predictor, "/predictions", ask(extra_lora="operator/none"))
    (folder,) = (predictor.log.parent / "tmp").glob("qwen-image-lora-predict-*")
    assert [path for path in folder.rglob("*") if path.is_file()] == []


def test_a_cancel_ends_a_silent_download_within_a_second(tmp_path, random_model, inside):
    with start(tmp_path, random_model, "predict", inside[0], ALLOW_PRIVATE_ADDRESSES="1") as server:
        given = {"input": ask(extra_lora=f"{inside[0]}/silent")}
        headers = {"Prefer": "respond-async"}
        assert server.client.put("/predictions/slow", json=given, headers=headers).status_code == 202
        time.sleep(1)
        assert server.health() == "BUSY"
        began = time.monotonic()
        server.client.post("/predictions/slow/cancel")
        while server.health() != "READY":
            assert time.monotonic() - began < 5
            time.sleep(0.02)
        assert time.monotonic() - began < 1


@pytest.mark.parametrize(("given", "host"), [({}, "127.0.0.1"), ({"host": "0.0.0.0"}, "0.0.0.0")])
def test_make_serve_listens_to_this_machine_alone_unless_told_otherwise(given, host, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(serve.subprocess, "Popen", lambda command, **_: commands.append(command))
    serve.start(tmp_path, tmp_path, "predict", 5000, **given)
    assert commands[0][commands[0].index("--host") + 1] == host
