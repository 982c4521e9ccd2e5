"""Over the real Cog server with an editing model: pairs and images by URL and data URI, bad pairs, and a cancel."""

import base64
import functools
import http.server
import io
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from tests.cog_server import Server, cog_server
from tests.editing.material import write_pairs

SHORT = {"steps": 3, "rank": 2, "resolution": "64", "control_resolution": "auto", "batch_size": 2, "seed": 0}
SMALL = {
    "prompt": "make it red",
    "steps": 2,
    "width": 64,
    "height": 64,
    "output_format": "png",
    "seed": 5,
    "control_resolution": "64",
}


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png(colour: str, size: tuple[int, int] = (96, 64)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "png")
    return file.getvalue()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder's files on this machine. -> the URL"""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{files.server_address[1]}"
        finally:
            files.shutdown()


@pytest.fixture(scope="module")
def trainer(edit_models, tmp_path_factory) -> Iterator[Server]:
    with cog_server(tmp_path_factory.mktemp("trainer"), edit_models["2511"], "train") as server:
        yield server


@pytest.fixture(scope="module")
def predictor(edit_models, tmp_path_factory) -> Iterator[Server]:
    with cog_server(tmp_path_factory.mktemp("predictor"), edit_models["2511"], "predict") as server:
        yield server


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.zip")


@pytest.fixture(scope="module")
def weights(trainer, pairs) -> str:
    reply = trainer.post("/trainings", {"dataset": data_uri(pairs.read_bytes(), "application/zip"), **SHORT}).json()
    assert reply["status"] == "succeeded", reply
    return reply["output"]["weights"]


def image_of(reply: dict) -> Image.Image:
    assert reply["status"] == "succeeded", reply
    (output,) = reply["output"]
    return Image.open(io.BytesIO(base64.b64decode(output.split(",", 1)[1])))


def test_pairs_by_url_teach_what_they_do_by_data_uri(trainer, pairs, weights):
    with served(pairs.parent) as url:
        reply = trainer.post("/trainings", {"dataset": f"{url}/pairs.zip", **SHORT}).json()
    assert reply["status"] == "succeeded", reply
    member = "lora/lora_weights.safetensors"
    archives = [io.BytesIO(base64.b64decode(uri.split(",", 1)[1])) for uri in (weights, reply["output"]["weights"])]
    one, other = (zipfile.ZipFile(archive).read(member) for archive in archives)
    assert one == other


def test_images_by_url_and_by_data_uri_are_edited_alike_with_the_weights(predictor, weights, tmp_path):
    (tmp_path / "first.png").write_bytes(png("green"))
    (tmp_path / "second.png").write_bytes(png("blue", (48, 80)))
    with served(tmp_path) as url:
        given = {"image": f"{url}/first.png", "image_2": f"{url}/second.png"}
        by_url = image_of(predictor.post("/predictions", {**SMALL, **given, "replicate_weights": weights}).json())
    given = {"image": data_uri(png("green"), "image/png"), "image_2": data_uri(png("blue", (48, 80)), "image/png")}
    by_uri = image_of(predictor.post("/predictions", {**SMALL, **given, "replicate_weights": weights}).json())
    assert by_url.size == (64, 64)
    assert by_url.convert("RGB").tobytes() == by_uri.convert("RGB").tobytes()


def test_bad_pairs_are_refused_by_name_and_the_server_stays_ready(trainer, pairs, tmp_path):
    with zipfile.ZipFile(pairs) as packed, zipfile.ZipFile(tmp_path / "bad.zip", "w") as bad:
        for name in packed.namelist():
            if name != "3.control.png":
                bad.writestr(name, packed.read(name))
        bad.writestr("stray.control.png", packed.read("0.control.png"))
    given = data_uri((tmp_path / "bad.zip").read_bytes(), "application/zip")
    reply = trainer.post("/trainings", {"dataset": given, **SHORT}).json()
    assert reply["status"] == "failed"
    assert "3.png: no image to edit" in reply["error"]
    assert "stray.control.png: an image to edit without the image that is made of it" in reply["error"]
    trainer.wait_until_ready(10)


def test_a_request_without_an_image_is_refused_and_the_next_one_works(predictor):
    reply = predictor.post("/predictions", SMALL).json()
    assert reply["status"] == "failed"
    assert "the base model edits images, and there is none; give image" in reply["error"]
    reply = predictor.post("/predictions", {**SMALL, "image": data_uri(b"no image", "image/png")}).json()
    assert reply["status"] == "failed"
    predictor.wait_until_ready(10)
    assert image_of(predictor.post("/predictions", {**SMALL, "image": data_uri(png("green"), "image/png")}).json())


def test_a_cancelled_edit_leaves_no_trace(predictor):
    given = {**SMALL, "image": data_uri(png("green"), "image/png")}
    before = image_of(predictor.post("/predictions", given).json()).tobytes()
    long = {**given, "steps": 100, "width": 512, "height": 512}
    predictor.wait_until_ready(30)
    started = predictor.client.put(
        "/predictions/long", json={"id": "long", "input": long}, headers={"Prefer": "respond-async"}
    )
    assert started.status_code == 202
    time.sleep(1)
    predictor.client.post("/predictions/long/cancel")
    predictor.wait_until_ready(30)
    assert image_of(predictor.post("/predictions", given).json()).tobytes() == before
