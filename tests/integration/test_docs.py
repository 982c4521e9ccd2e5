"""README and docs/: their commands run as they are written, their links lead somewhere, their messages exist."""

import ast
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from safetensors.torch import load_file, save_file

from examples.demo import call, write_dataset
from examples.shapes import Prompt
from lora_utils import cli
from predict import Predictor
from scripts import cog_contract, prose_length
from tests.cog_server import cog_server
from tests.helpers import ROOT
from train import train

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
# In place of what a line says, or behind it. With a seed: one in hundreds drops the captions of both steps.
FAST_TRAINING = {"steps": 2, "resolution": "64", "rank": 2, "seed": 0}


def console_lines() -> Iterator[tuple[str, str]]:
    """Yield each command line of a console block, with its page."""
    for page, text in PAGES.items():
        for block in re.findall(r"```console\n(.*?)```", text, re.S):
            yield from ((page, line) for line in block.splitlines() if line)


EDITING = "docs/editing.md"  # whose lines need another base model: tests/editing/test_edit_docs.py
LINES = sorted({(page, line) for page, line in console_lines() if page != EDITING})
COG = sorted({line for _, line in LINES if line.startswith(("cog train", "cog predict"))})
PREDICT = [line for line in COG if line.startswith("cog predict")]
MODULES = sorted({line for _, line in LINES if re.match(r"python -m (examples|benchmarks|scripts)\.", line)})
PACKAGE = [(page, line) for page, line in LINES if re.match(r"python -m lora_utils[ .]", line)]
MAKE = sorted({line for _, line in LINES if line.startswith("make ")})
HTTP = [line for _, line in LINES if line.startswith(("curl ", "python3 -c"))]
LAUNCH = [line for _, line in LINES if line.startswith("accelerate ")]
REGISTRY = [line for _, line in LINES if line in ("cog login", "cog push r8.im/you/qwen-image-lora")]


def given_inputs(line: str, folder: Path) -> dict[str, object]:
    """Return the inputs of a `cog train` or `cog predict` line, typed by the signature as Cog's command line does."""
    words = shlex.split(line)
    declared = {item.name: item for item in cog_contract.inputs((ROOT / f"{words[1]}.py").read_text())}
    pairs = [words[index + 1].split("=", 1) for index, word in enumerate(words) if word == "-i"]
    casts = {"int": int, "float": float, "bool": lambda text: text == "true", "str": str}
    typed: dict[str, object] = {}
    for name, value in pairs:
        kind = declared[name].type
        typed[name] = folder / value.removeprefix("@") if kind == "Path" else casts[kind](value)
    return typed


@pytest.fixture(scope="module")
def folder(tmp_path_factory, random_model):
    """A user's folder: dataset.zip, and the weights.zip of a training with the token."""
    path = tmp_path_factory.mktemp("user")
    write_dataset(path / "dataset.zip", "mushroom", Prompt("<zwx>"), count=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BASE_MODEL", str(random_model))
        output = call(train, dataset=path / "dataset.zip", train_placeholder_token=True, **FAST_TRAINING)
    shutil.move(str(output.weights), path / "weights.zip")
    return path


def run_module(line: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    """Run a `python -m ...` line in this process. -> its exit code"""
    words = shlex.split(line)[2:]
    monkeypatch.setattr(sys, "argv", [words[0], *words[1:], *more])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    return int(ended.value.code or 0)


def test_every_command_is_of_a_kind_that_is_tested_here():
    tested = {*COG, *MODULES, *MAKE, *HTTP, *LAUNCH, *REGISTRY, *(line for _, line in PACKAGE)}
    assert {line for _, line in LINES} == tested
    assert len(REGISTRY) == 2
    assert {"make demo", "make test"} <= set(MAKE)


# --- Cog's command line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [line for line in COG if line.startswith("cog train")])
def test_train_lines_train(line, folder, random_model, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    given = given_inputs(line, folder)
    output = call(train, **{**given, **FAST_TRAINING})
    with zipfile.ZipFile(str(output.weights)) as archive:
        assert sorted(archive.namelist()) == ["lora/lora_weights.safetensors", "meta.json"]


@pytest.fixture(scope="module")
def predictor(random_model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BASE_MODEL", str(random_model))
        loaded = Predictor()
        loaded.setup()
        yield loaded


@pytest.mark.parametrize("line", PREDICT)
def test_predict_lines_sample(line, folder, predictor):
    given = given_inputs(line, folder)
    small = {"width": 64, "height": 64} if "width" in given else {"megapixels": 0.05}
    paths = call(predictor.predict, **{**given, **small, "steps": 2})
    assert len(paths) == given.get("num_outputs", 1)


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in PREDICT if "width" in line or "aspect_ratio=16:9" in line])
def test_predict_lines_sample_in_the_size_they_say(line, folder, predictor):
    given = given_inputs(line, folder)
    paths = call(predictor.predict, **{**given, "steps": 2})
    with Image.open(str(paths[0])) as image:
        assert image.size == ((1024, 1024) if "width" in given else (1664, 928))


# --- plain Python ---------------------------------------------------------------------------------------------------


def write_files_to_convert(weights, model, folder):
    """Two LoRAs to merge, and a checkpoint with its base."""
    for name in ("style.zip", "person.zip"):
        shutil.copy(weights, folder / name)
    shutil.copytree(model, folder / "qwen-image")
    tuned = load_file(next((model / "transformer").glob("*.safetensors")))
    tuned["transformer_blocks.0.attn.to_q.weight"] += 0.1
    save_file(tuned, folder / "tuned.safetensors")


@pytest.mark.parametrize("page", sorted({page for page, _ in PACKAGE}))
def test_the_packages_own_commands_run_in_the_order_of_the_page(page, folder, random_model, tmp_path, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    monkeypatch.chdir(tmp_path)
    shutil.copy(folder / "dataset.zip", tmp_path)
    if page != "docs/training.md":  # that page's commands make their own
        shutil.copy(folder / "weights.zip", tmp_path)
    if page == "docs/prediction.md":
        write_files_to_convert(folder / "weights.zip", random_model, tmp_path)
    fewer = {
        "train": [f"--{name}={value}" for name, value in FAST_TRAINING.items()],
        "sample": ["--steps=2", "--width=64", "--height=64"],
    }
    block_order = [line for text in [PAGES[page]] for line in re.findall(r"^python -m lora_utils.*$", text, re.M)]
    for line in block_order:
        words = shlex.split(line.replace("DATASET", "dataset.zip"))
        more = [] if "--help" in words else fewer.get(words[3], [])
        assert run_module(shlex.join(words), monkeypatch, *more) == 0, line


def test_an_output_that_exists_is_not_overwritten(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(folder / "weights.zip", tmp_path)
    assert run_module("python -m lora_utils train dataset.zip", monkeypatch) == 1
    assert "weights.zip is there already" in capsys.readouterr().err


@pytest.mark.parametrize("line", MODULES)
def test_developers_commands_take_these_options(line, monkeypatch, capsys):
    """They run for minutes to hours, so only as far as their help."""
    module = shlex.split(line)[2]
    more = "--check" if module == "scripts.cog_signatures" else "--help"
    assert run_module(line, monkeypatch, more) == 0
    output = capsys.readouterr().out
    assert all(option in output for option in re.findall(r"--[a-z_-]+", line))


@pytest.mark.parametrize("line", LAUNCH)
def test_the_line_for_several_machines_is_understood(line):
    """By accelerate, which starts it, and by our own command line. Two processes do run in test_distributed."""
    launch = launch_command_parser().parse_args(shlex.split(line)[2:])
    assert (launch.num_machines, launch.num_processes, launch.module) == (2, 16, True)
    assert launch.training_script == "lora_utils"
    assert cli.parser().parse_args(launch.training_script_args).steps == 2000


def test_make_targets_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    named = {line.split()[1] for line in MAKE} | set(re.findall(r"`make ([a-z-]+)`", "".join(PAGES.values())))
    assert named <= set(targets)


# --- over HTTP ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_requests_to_make_serve_work_as_written(tmp_path, tiny_model):
    """All but their ports, which may be taken here."""
    (tmp_path / "out").mkdir()
    write_dataset(tmp_path / "out" / "dataset.zip", "house", Prompt("<zwx>"))
    block = next(part for part in re.findall(r"```console\n(.*?)```", PAGES["docs/serving.md"], re.S) if "curl" in part)
    train_line, weights_line, predict_line, image_line, long_line, cancel_line = block.strip().splitlines()
    folders = {mode: tmp_path / mode for mode in ("predict", "train")}
    for made in folders.values():
        made.mkdir()

    def run(line: str) -> str:
        for port, mode in (("5000", "predict"), ("5001", "train")):
            line = line.replace(
                f"localhost:{port}", str(servers[mode].client.base_url).removeprefix("http://").rstrip("/")
            )
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout

    with (
        cog_server(folders["predict"], tiny_model, "predict") as predicts,
        cog_server(folders["train"], tiny_model, "train") as trains,
    ):
        servers = {"predict": predicts, "train": trains}
        run(train_line)
        run(weights_line)
        assert zipfile.is_zipfile(tmp_path / "out" / "weights.zip")
        run(predict_line)
        run(image_line)
        with Image.open(tmp_path / "out" / "served.png") as image:
            assert image.size == (64, 64)
        predicts.wait_until_ready(10)
        assert re.search('"(starting|processing)"', run(long_line))
        run(cancel_line)
        predicts.wait_until_ready(30)


# --- texts ----------------------------------------------------------------------------------------------------------


def anchors(markdown: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", markdown, flags=re.S), re.M)
    return {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = Path(os.path.normpath((ROOT / page).parent / name)) if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text()), target


def spoken_texts() -> str:
    """Return all string literals of the package, each f-string with `...` for its values."""
    texts = []
    for path in ROOT.glob("lora_utils/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values]
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"%[a-z.0-9]+", "...", node.value))
    return "\n".join(texts)


def test_messages_in_troubleshooting_are_messages_of_the_package():
    known = spoken_texts()
    quoted = re.findall(r'"([^"]+)"', PAGES["docs/troubleshooting.md"])
    assert len(quoted) > 20
    for text in quoted:
        for piece in re.split(r"\s*\(?\.\.\.\)?;?\s*", text):
            assert piece in known, f"{text!r}: nothing says {piece!r}"


def refusals() -> list[str]:
    """Return the text of each error that a caller can cause, with `...` for its values."""
    texts = []
    for path in ROOT.glob("lora_utils/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError":
                texts.append(text_of(node.args[0]))
    return texts


def text_of(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "".join(map(text_of, node.values)) if isinstance(node, ast.JoinedStr) else "..."


def test_each_message_that_a_user_can_meet_is_in_troubleshooting():
    quoted = re.findall(r'"([^"]+)"', PAGES["docs/troubleshooting.md"])
    pieces = [[piece for piece in re.split(r"\s*\(?\.\.\.\)?;?\s*", text) if piece] for text in quoted]
    refused = [text for text in refusals() if re.search("[a-z]{3}", text)]
    assert len(refused) > 140
    for text in refused:
        assert any(all(piece in text for piece in each) for each in pieces if each), f"nothing says what {text!r} means"


def test_readme_is_short_and_the_sentences_are_too(capsys):
    assert len(PAGES["README.md"].splitlines()) <= 150
    assert prose_length.main() == 0, capsys.readouterr().out


def test_long_sentences_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading of many words that does not count\n\n" + "A short one. " * 3 + "A " + "word " * 40 + ".\n"
    )
    median, p90, count = prose_length.measure([page])
    assert (median, count) == (3, 4)
    assert p90 > prose_length.MOST_P90_WORDS
    page.write_text("| a table |\n```\ncode is not prose\n```\nOne `code span` is a [link of words](x.md).\n")
    assert [prose_length.count_words(text) for text in prose_length.sentences(page.read_text())] == [7]


@pytest.mark.parametrize("name", ["train", "predict"])
def test_the_tables_of_inputs_are_complete(name):
    page = PAGES[{"train": "docs/training.md", "predict": "docs/prediction.md"}[name]]
    table = page.split("<!-- inputs")[1]
    listed = re.findall(r"^\| `([a-z0-9_]+)` \|", table, re.M)
    assert listed == [item.name for item in cog_contract.inputs((ROOT / f"{name}.py").read_text())]
