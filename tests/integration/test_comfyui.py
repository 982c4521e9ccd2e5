"""The node for ComfyUI, with a tokenizer and a text encoder that take and give what ComfyUI's do.

ComfyUI's `clip.tokenize` returns, by the text encoder's name, batches of (number or vector, weight), and its encoder
puts a vector where a number's embedding would stand (comfy/sd1_clip.py, `process_tokens`).
"""

import zipfile

import pytest
import torch
from safetensors.torch import save_file

from examples.comfyui import zero_prior_token as node
from lora_utils import constants
from lora_utils.lora.formats import LoraFile, write_embeddings, write_lora_file
from lora_utils.lora.weights_zip import LORA_MEMBER
from lora_utils.model.text_encoder import encode_text, load_tokenizer
from lora_utils.placeholder.embedding import embedding_matrix
from lora_utils.placeholder.tokens import Placeholders, assign_ids
from tests.lora.test_ranks import random_lora

PROMPT = "a red circle <zwx>, and <abc> on a cyan background"


class Clip:
    """What a node sees of ComfyUI's text encoder."""

    def __init__(self, tokenizer, text_encoder):
        self.tokenizer, self.text_encoder = tokenizer, text_encoder

    def tokenize(self, text):
        ids = self.tokenizer(constants.TEMPLATE_PREFIX + text + constants.TEMPLATE_SUFFIX)["input_ids"]
        return {"qwen25_7b": [[(number, 1.0) for number in ids]]}

    def encode_from_tokens_scheduled(self, tokens):
        (batch,) = tokens["qwen25_7b"]
        matrix = embedding_matrix(self.text_encoder)
        rows = [part.view(-1) if torch.is_tensor(part) else matrix[part] for part, _ in batch]
        with torch.no_grad():
            states = self.text_encoder(inputs_embeds=torch.stack(rows)[None], use_cache=False).last_hidden_state
        return [[states[:, constants.TEMPLATE_PREFIX_TOKENS :], {}]]


@pytest.fixture
def embeddings(components):
    generator = torch.Generator().manual_seed(0)
    width = embedding_matrix(components.text_encoder).shape[1]
    return {token: torch.randn(1, width, generator=generator) * 0.1 for token in ("<zwx>", "<abc>", "<other>")}


@pytest.fixture
def clip(components, random_model, monkeypatch):
    tokenizer = load_tokenizer(random_model)
    tokenizer.add_special_tokens({"additional_special_tokens": list(node.STAND_INS)})
    monkeypatch.setattr(node, "STAND_INS", {name: tokenizer.convert_tokens_to_ids(name) for name in node.STAND_INS})
    return Clip(tokenizer, components.text_encoder)


def test_a_prompt_is_encoded_as_this_package_encodes_it(clip, embeddings, components, tmp_path):
    lora = random_lora()
    lora.embeddings.update(embeddings)
    write_lora_file(tmp_path / "lora.safetensors", lora)
    with zipfile.ZipFile(tmp_path / "weights.zip", "w") as packed:
        packed.write(tmp_path / "lora.safetensors", LORA_MEMBER)
    write_embeddings(tmp_path / "apart.safetensors", lora)
    ids = assign_ids(list(embeddings), components.tokenizer, len(embedding_matrix(components.text_encoder)))
    placeholders = Placeholders(tuple(ids), tuple(ids.values()), tuple(each[0] for each in embeddings.values()))
    with torch.no_grad():
        want = encode_text(components.text_encoder, components.tokenizer, [PROMPT], placeholders).states
    for name in ("weights.zip", "lora.safetensors", "apart.safetensors"):
        (conditioning,) = node.ZeroPriorTokenEncode().encode(clip, PROMPT, str(tmp_path / name))
        torch.testing.assert_close(conditioning[0][0], want, atol=1e-5, rtol=1e-4)


def test_a_prompt_without_a_token_is_left_to_comfyui(clip, embeddings):
    assert node.tokenize(clip, "a red circle", embeddings) == clip.tokenize("a red circle")


def test_vectors_of_other_nodes_and_more_than_pairs_pass_through(embeddings):
    class Other:
        def tokenize(self, _text):
            vector, number = torch.ones(3), node.STAND_INS["<|object_ref_start|>"]
            return {"qwen25_7b": [[(vector, 0.5, 7), (number, 1.2, 8)]], "l": [[(5, 1.0)]]}

    got = node.tokenize(Other(), "<zwx>", embeddings)
    assert got["l"] == [[(5, 1.0)]]
    (first, second) = got["qwen25_7b"][0]
    assert torch.equal(first[0], torch.ones(3))
    assert torch.equal(second[0], embeddings["<zwx>"][0])
    assert (first[1:], second[1:]) == ((0.5, 7), (1.2, 8))


def test_what_holds_no_token_is_an_error_that_names_the_file(tmp_path):
    write_lora_file(tmp_path / "plain.safetensors", LoraFile(random_lora().layers))
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    for name in ("plain.safetensors", "other.safetensors"):
        with pytest.raises(ValueError, match=f"{name} holds no embedding"):
            node.read_embeddings(str(tmp_path / name))


def test_the_node_says_what_comfyui_asks_of_it():
    (kind,) = node.NODE_CLASS_MAPPINGS.values()
    assert set(kind.INPUT_TYPES()["required"]) == {"clip", "text", "weights"}
    assert kind.RETURN_TYPES == ("CONDITIONING",)
    assert callable(getattr(kind, kind.FUNCTION))
