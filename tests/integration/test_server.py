"""Over the real Cog server: train by URL and by data URI, predict with the result, cancel, and bad input."""

import base64
import functools
import http.server
import io
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from PIL import Image

from examples.shapes import Prompt
from tests.cog_server import Server, cog_server
from tests.hostile_uploads import HOSTILE, image, zip_of

SHORT = {"steps": 4, "rank": 2, "resolution": "64", "batch_size": 2, "train_placeholder_token": True, "seed": 0}
SMALL = {"steps": 2, "width": 64, "height": 64, "output_format": "png", "seed": 5}


def data_uri(content: bytes, kind: str = "application/zip") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def content_of(uri: str) -> bytes:
    return base64.b64decode(uri.split(",", 1)[1])


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, random_model) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("trainer")
    (folder / "tmp").mkdir()
    with cog_server(folder, random_model, "train", TMPDIR=str(folder / "tmp"), RUN_ROOT=str(folder / "runs")) as server:
        yield server


@pytest.fixture(scope="module")
def predictor(tmp_path_factory, random_model) -> Iterator[Server]:
    with cog_server(tmp_path_factory.mktemp("predictor"), random_model, "predict") as server:
        yield server


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> bytes:
    from examples import demo  # noqa: PLC0415

    path = tmp_path_factory.mktemp("data") / "dataset.zip"
    demo.write_dataset(path, "mushroom", Prompt("<zwx>"), count=10)
    return path.read_bytes()


@pytest.fixture(scope="module")
def weights(trainer, dataset) -> bytes:
    reply = trainer.post("/trainings", {"dataset": data_uri(dataset), **SHORT}).json()
    assert reply["status"] == "succeeded", reply
    assert reply["metrics"]["training_step_count"] == 4
    assert "step 4/4 loss" in reply["logs"]
    assert "seed 0" in reply["logs"]
    return content_of(reply["output"]["weights"])


def test_a_training_by_data_uri_returns_the_archive(weights):
    with zipfile.ZipFile(io.BytesIO(weights)) as packed:
        assert packed.namelist() == ["lora/lora_weights.safetensors", "meta.json"]


def test_a_training_by_url_gives_the_same_weights(trainer, dataset, weights, tmp_path):
    (tmp_path / "dataset.zip").write_bytes(dataset)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{files.server_address[1]}/dataset.zip"
        reply = trainer.post("/trainings", {"dataset": url, **SHORT}).json()
        files.shutdown()
    assert reply["status"] == "succeeded", reply
    lora = "lora/lora_weights.safetensors"
    with (
        zipfile.ZipFile(io.BytesIO(content_of(reply["output"]["weights"]))) as by_url,
        zipfile.ZipFile(io.BytesIO(weights)) as by_data,
    ):
        assert by_url.read(lora) == by_data.read(lora)


def test_the_trained_archive_predicts(predictor, weights):
    given = {"prompt": "a photo of <zwx>", "replicate_weights": data_uri(weights), "num_outputs": 2, **SMALL}
    reply = predictor.post("/predictions", given).json()
    assert reply["status"] == "succeeded", reply
    assert len(reply["output"]) == 2
    assert reply["metrics"]["image_output_count"] == 2
    assert {"steps", "load_s", "encode_s", "denoise_s", "decode_s"} <= set(reply["metrics"])
    assert Image.open(io.BytesIO(content_of(reply["output"][0]))).size == (64, 64)
    base = {"prompt": "a red circle", **SMALL}
    first, second = (predictor.post("/predictions", base).json()["output"] for _ in range(2))
    assert first == second


def test_a_cancelled_training_cleans_up_and_the_next_one_runs(trainer, dataset):
    reply = trainer.client.put(
        "/trainings/long",
        json={"input": {"dataset": data_uri(dataset), **SHORT, "steps": 20000}},
        headers={"Prefer": "respond-async"},
    )
    assert reply.status_code == 202, reply.text
    time.sleep(3)  # well into its steps
    assert trainer.health() == "BUSY"
    began = time.monotonic()
    assert trainer.client.post("/trainings/long/cancel").status_code == 200
    trainer.wait_until_ready(10)
    assert time.monotonic() - began < 5
    left = [path.name for path in (trainer.log.parent / "tmp").iterdir()]
    assert [name for name in left if name.startswith("qwen-image-lora-") and "train-" not in name] == []
    again = trainer.post("/trainings", {"dataset": data_uri(dataset), **SHORT}).json()
    assert again["status"] == "succeeded", again


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset": data_uri(b"no archive")}, "neither a zip nor a tar archive"),
        ({"dataset": data_uri(zip_of({"notes.txt": b"x"}))}, "holds no images"),
        ({"dataset": data_uri(zip_of({"cat.png": b"x"}))}, "image cat.png can't be read"),
        ({"dataset": data_uri(zip_of({"../cat.png": b"x"}))}, "unsafe path '../cat.png'"),
        ({"resolution": "big"}, "resolution must be pixels like '512'"),
        ({"placeholder_token": "zwx"}, "isn't a valid name"),
        ({"placeholder_token": "<abc>"}, "none of the 10 captions holds the placeholder token '<abc>'"),
    ],
)
def test_a_failed_training_tells_the_client_why_and_the_server_stays_ready(given, message, trainer, dataset):
    reply = trainer.post("/trainings", {"dataset": data_uri(dataset), **SHORT, **given}).json()
    assert reply["status"] == "failed", reply
    assert message in reply["error"]
    trainer.wait_until_ready(5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 0}, "0 is less than the minimum of 1"),
        ({"steps": "many"}, "steps"),
        ({"adapter": "everything"}, "adapter"),
        ({"goal": "dog"}, "goal"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"seed": None}, "seed"),
    ],
)
def test_inputs_outside_the_schema_never_reach_the_training(given, message, trainer, dataset):
    reply = trainer.post("/trainings", {"dataset": data_uri(dataset), **SHORT, **given})
    assert reply.status_code == 422
    assert message in reply.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": "red " * 30_000}, "prompt has 120000 characters; 100000 are the most"),
        ({"width": 64, "height": 64, "replicate_weights": data_uri(b"junk")}, "is no safetensors file"),
        ({"replicate_weights": data_uri(zip_of({"readme.txt": b""}))}, "0 .safetensors files, expected one"),
    ],
)
def test_a_failed_prediction_tells_the_client_why_and_the_server_stays_ready(given, message, predictor):
    reply = predictor.post("/predictions", {"prompt": "a red circle", **SMALL, **given}).json()
    assert reply["status"] == "failed", reply
    assert message in reply["error"]
    predictor.wait_until_ready(5)


def test_an_image_to_start_from_and_a_mask_come_as_data_uris(predictor):
    half = Image.new("L", (64, 64), 0)
    half.paste(255, (0, 0, 32, 64))
    stored = io.BytesIO()
    half.save(stored, "png")
    given = {"image": data_uri(image(), "image/png"), "mask": data_uri(stored.getvalue(), "image/png"), "strength": 1}
    reply = predictor.post("/predictions", {"prompt": "a red circle", **SMALL, **given}).json()
    assert reply["status"] == "succeeded", reply


def test_the_hubs_token_is_in_no_log_and_no_reply(predictor):
    given = {"extra_lora": "owner/private", "hf_token": "hf_verysecret"}
    reply = predictor.post("/predictions", {"prompt": "a red circle", **SMALL, **given})
    assert reply.json()["status"] == "failed"
    assert "hf_verysecret" not in reply.text
    assert "hf_verysecret" not in predictor.log.read_text()


def test_the_hubs_token_of_a_training_is_in_none_either(trainer, dataset):
    given = {"dataset": data_uri(dataset), **SHORT, "hub_repo": "me/it", "hub_token": "hf_verysecret"}
    reply = trainer.post("/trainings", given)
    assert "hub_repo me/it can't be written to" in reply.json()["error"]  # there is no network
    assert "hf_verysecret" not in reply.text
    assert "hf_verysecret" not in trainer.log.read_text()


def test_a_goal_fills_what_is_left_out_and_a_folder_keeps_what_is_seen(trainer, dataset):
    given = {
        "dataset": data_uri(dataset),
        "goal": "object",
        "steps": 2,
        "resolution": "64",
        "optimizer": "adafactor",
        "run_dir": "mine",
        "sample_prompts": "a red circle",
        "sample_steps": 1,
    }
    reply = trainer.post("/trainings", given).json()
    assert reply["status"] == "succeeded", reply
    assert "goal object: steps 2 (yours; the goal's is 1000), learning_rate 0.0005, rank 16" in reply["logs"]
    made = {path.name for path in (trainer.log.parent / "runs" / "mine").iterdir()}
    assert made == {"metrics.jsonl", "report.html", "samples", "status.json", "tensorboard"}


def test_a_folder_that_cog_cannot_reach_is_a_clear_error(trainer):
    reply = trainer.post("/trainings", {"dataset": "/no/such/file.zip", **SHORT}).json()
    assert "there is no file" in reply["error"]


def test_the_server_is_not_left_with_files(trainer, weights):
    assert isinstance(weights, bytes)
    kept = list((Path(trainer.log.parent) / "tmp").glob("qwen-image-lora-*"))
    assert len(kept) <= 1, kept  # the last weights.zip, which the next run replaces
    assert httpx2.get(f"{trainer.client.base_url}/health-check").json()["status"] == "READY"


# --- hostile uploads ------------------------------------------------------------------------------------------------


# One of each kind: a path, a size, an image, a stream, a caption. All twenty are in dataset/test_hostile.py.
@pytest.mark.parametrize("name", ["path traversal", "nested bomb", "image bomb", "truncated tar", "binary caption"])
def test_a_hostile_upload_is_refused_in_one_sentence_and_leaves_nothing(name, trainer, weights):
    """The server's own temporary folder is looked at before and after."""
    assert weights  # the trainer has worked before
    make, message = HOSTILE[name]
    temporary = Path(trainer.log.parent) / "tmp"
    before = {path.name for path in temporary.iterdir()}
    reply = trainer.post("/trainings", {"dataset": data_uri(make()), **SHORT, "default_caption": "a <zwx>"}).json()
    assert reply["status"] == "failed", reply
    assert message in reply["error"]
    assert "Traceback" not in reply["logs"]
    trainer.wait_until_ready(5)
    assert {path.name for path in temporary.iterdir()} <= before
    assert not Path("/tmp/evil.png").exists()


def test_after_all_of_them_it_trains_as_before(trainer, dataset, weights):
    reply = trainer.post("/trainings", {"dataset": data_uri(dataset), **SHORT}).json()
    assert reply["status"] == "succeeded", reply
    lora = "lora/lora_weights.safetensors"
    contents = [io.BytesIO(content) for content in (content_of(reply["output"]["weights"]), weights)]
    again, first = (zipfile.ZipFile(content).read(lora) for content in contents)
    assert again == first
