"""The zero-prior token: its name, its id, its row, and everything that it leaves alone."""

import hashlib
import random
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AddedToken

from benchmarks.true_size.qwen_vocabulary import qwen_tokenizer
from lora_utils import constants
from lora_utils.config import TrainConfig
from lora_utils.errors import UserError
from lora_utils.lora.formats import LoraFile
from lora_utils.lora.weights import Weights, placeholders_of
from lora_utils.model.text_encoder import encode_text, load_text_encoder, prompt_ids
from lora_utils.placeholder.embedding import (
    WordEmbeddings,
    compare_with_words,
    embedding_matrix,
    measure_words,
    new_placeholders,
    spliced_embeddings,
)
from lora_utils.placeholder.tokens import (
    Placeholders,
    assign_ids,
    check_token,
    near_spellings,
    no_placeholders,
    tokenize,
)

TOKEN = "<zwx>"
ROWS = 152064  # of Qwen's embedding matrix


@pytest.fixture(scope="module")
def real():
    return qwen_tokenizer()


def with_row(components, row):
    slots = assign_ids([TOKEN], components.tokenizer, len(embedding_matrix(components.text_encoder)))
    return Placeholders((TOKEN,), (slots[TOKEN],), (row,))


def encode(components, prompts, placeholders):
    return encode_text(components.text_encoder, components.tokenizer, prompts, placeholders)


# --- the real vocabulary --------------------------------------------------------------------------------------------


def test_the_real_tokenizer_and_the_ids_in_it(real):
    assert len(real) == 151665
    assert len(real(constants.TEMPLATE_PREFIX).input_ids) == constants.TEMPLATE_PREFIX_TOKENS
    slots = assign_ids([TOKEN, "<abc>"], real, ROWS)
    assert slots == {TOKEN: 151665, "<abc>": 151666}
    assert tokenize(real, f"a photo of {TOKEN}", slots) == [64, 6548, 315, 220, 151665]


def test_unregistered_the_name_is_four_ordinary_tokens(real):
    ids = tokenize(real, f"a photo of {TOKEN}", {})
    assert len(ids) == 3 + 4
    assert max(ids) < 151643


def test_piecewise_encoding_is_that_of_an_added_token(real):
    words = [
        "a",
        "photo",
        "of",
        TOKEN,
        "<abc>",
        "\n",
        " ",
        "  ",
        "s",
        ",",
        "'s",
        "Bär",
        "🐻",
        "1st",
        "<",
        ">",
        "zwx",
        "<|im_end|>",
    ]
    added = qwen_tokenizer()
    added.add_tokens([AddedToken(token, normalized=False) for token in (TOKEN, "<abc>")])
    slots = assign_ids([TOKEN, "<abc>"], real, ROWS)
    assert [tokenize(real, token, slots) for token in slots] == [[slot] for slot in slots.values()]
    rng = random.Random(0)
    texts = [rng.choice(["", " "]).join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(20_000)]
    for text, expected in zip(texts, added(texts).input_ids, strict=True):
        assert tokenize(real, text, slots) == expected, text


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["zwx", "<>", "<1a>", "<a b>", "<a>b", "< zwx >", "<ä>", "<" + "a" * 32 + ">", "<a,b>", ""]
)
def test_names_that_are_no_names_are_refused(name):
    with pytest.raises(UserError, match="valid name"):
        TrainConfig(train_placeholder_token=True, placeholder_token=name)
    assert TrainConfig(train_placeholder_token=False, placeholder_token=name).tokens == ()


def test_names_of_the_vocabulary_are_refused(real):
    with pytest.raises(UserError, match="vocabulary already"):
        check_token("<tool_call>", real)
    with pytest.raises(UserError, match="isn't a valid name: write '<'"):
        check_token("cat", real)


def test_a_matrix_without_free_rows_is_refused(real):
    with pytest.raises(UserError, match="1 free rows"):
        assign_ids([TOKEN, "<abc>"], real, 151666)


@pytest.mark.parametrize("std", [-1e-9, 0.2, float("nan"), float("inf")])
def test_init_std_outside_its_range_is_refused_only_with_the_feature_on(std):
    with pytest.raises(UserError, match="placeholder_init_std"):
        TrainConfig(train_placeholder_token=True, placeholder_init_std=std)
    TrainConfig(train_placeholder_token=False, placeholder_init_std=std)


def test_a_first_size_that_is_no_longer_near_zero_is_said(components, caplog, monkeypatch):
    for std, said in ((1e-3, False), (2e-3, True)):
        caplog.clear()
        config = TrainConfig(train_placeholder_token=True, placeholder_init_std=std)
        generator = torch.Generator().manual_seed(0)
        new_placeholders(config, components.tokenizer, components.text_encoder, generator)
        assert ("no longer near zero" in caplog.text) == said


# --- weights side by side -------------------------------------------------------------------------------------------


def weights_with(name, **rows):
    return Weights(
        LoraFile({}, {f"<{token}>": torch.full((1, 128), value) for token, value in rows.items()}), None, name
    )


def test_the_tokens_of_two_archives_get_an_id_each_and_a_shared_embedding_one(components):
    first = len(components.tokenizer)
    loaded = [weights_with("a.zip", anna=1.0, both=2.0), weights_with("b.zip", ben=3.0, both=2.0)]
    together = placeholders_of(loaded, components)
    assert together.ids_by_token == {"<anna>": first, "<both>": first + 1, "<ben>": first + 2}
    assert [float(row[0]) for row in together.embeddings] == [1.0, 2.0, 3.0]


def test_a_token_that_means_two_things_is_refused_with_both_names(components):
    with pytest.raises(UserError, match=r"<anna> means different things in a\.zip and b\.zip"):
        placeholders_of([weights_with("a.zip", anna=1.0), weights_with("b.zip", anna=2.0)], components)


# --- the row --------------------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_full_matrix_masked_to_the_tokens_row(components, random_model):
    row = torch.randn(128, generator=torch.Generator().manual_seed(0)) * 1e-5
    ours = with_row(components, row.clone().requires_grad_())
    encode(components, [f"a photo of {TOKEN}, {TOKEN}s"], ours).states.square().sum().backward()

    encoder = load_text_encoder(random_model, components.placement)
    matrix = embedding_matrix(encoder).requires_grad_()
    with torch.no_grad():
        matrix[ours.ids[0]] = row
    ids = torch.tensor([prompt_ids(components.tokenizer, f"a photo of {TOKEN}, {TOKEN}s", ours)])
    states = encoder(input_ids=ids, use_cache=False).last_hidden_state[:, constants.TEMPLATE_PREFIX_TOKENS :]
    states.square().sum().backward()
    assert ours.embeddings[0].grad is not None
    assert matrix.grad is not None
    full = matrix.grad[ours.ids[0]]
    assert (ours.embeddings[0].grad - full).norm() < 1e-5 * full.norm()


def test_below_1e_5_the_first_size_of_the_embedding_makes_no_difference(components):
    """Layer 0's RMSNorm bounds the gain at 1 / sqrt(1e-6): near zero the token is its context and nothing else."""
    noise, prompt = torch.randn(128, generator=torch.Generator().manual_seed(0)), [f"a photo of {TOKEN}"]
    zero, tiny, small, usual = (
        encode(components, prompt, with_row(components, std * noise)).states for std in (0.0, 1e-6, 1e-5, 2e-2)
    )
    change = (usual - zero).norm()
    assert (tiny - zero).norm() < 0.01 * change
    assert (small - zero).norm() < 0.1 * change


def test_what_stands_in_the_matrixs_free_rows_never_reaches_an_output(components, random_model):
    placeholders = with_row(components, torch.randn(128))
    clean = encode(components, [f"a photo of {TOKEN}"], placeholders).states
    encoder = load_text_encoder(random_model, components.placement)
    with torch.no_grad():
        embedding_matrix(encoder)[len(components.tokenizer) :] = torch.nan
    poisoned = encode_text(encoder, components.tokenizer, [f"a photo of {TOKEN}"], placeholders).states
    assert torch.equal(clean, poisoned)


def test_the_embedding_matters_to_its_token_alone(components):
    one, other = with_row(components, torch.randn(128)), with_row(components, torch.randn(128))
    prompt = f"a photo of {TOKEN} on a pink background"
    assert not torch.allclose(encode(components, [prompt], one).states, encode(components, [prompt], other).states)
    plain = "a photo of a red circle"
    assert torch.equal(encode(components, [plain], one).states, encode(components, [plain], no_placeholders()).states)


def test_splicing_changes_neither_encoder_nor_tokenizer(components):
    def fingerprint():
        state = components.text_encoder.state_dict()
        return hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()

    before, words = fingerprint(), len(components.tokenizer)
    with (
        pytest.raises(KeyboardInterrupt),
        spliced_embeddings(components.text_encoder, with_row(components, torch.ones(128))),
    ):
        raise KeyboardInterrupt
    assert fingerprint() == before
    assert len(components.tokenizer) == words
    assert not components.text_encoder.get_submodule("embed_tokens")._forward_hooks


def test_near_spellings_are_found_and_other_brackets_are_text():
    text = "a <zwx> and <ZWX>, < zwx >, <zwxs>, <abc>, <tool_call>, <|im_end|>, a < b > c, <>, <html>"
    assert near_spellings(text, [TOKEN]) == dict.fromkeys(("<ZWX>", "< zwx >", "<zwxs>"), TOKEN)
    assert near_spellings(text, []) == {}


def test_a_thousand_tokens_are_read_in_a_loop(components):
    ids = tokenize(components.tokenizer, "<zwx>" * 1200, {TOKEN: 478})
    assert ids == [478] * 1200


def test_the_nearest_word_is_found_without_a_copy_of_the_vocabulary(components):
    """Against the formula in fp32; the bf16 product picks a word as near."""
    encoder, tokenizer = components.text_encoder, components.tokenizer
    words = measure_words(encoder, tokenizer)
    matrix = embedding_matrix(encoder)[: len(tokenizer)]
    assert torch.equal(words.norms, matrix.norm(dim=1))
    assert words.rows == len(embedding_matrix(encoder))
    own = matrix[7] + 0.01 * torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0))
    cosines = (matrix @ own) / (matrix.norm(dim=1) * own.norm())
    for dtype in (torch.float32, torch.bfloat16):
        report = compare_with_words(own, replace(words, matrix=matrix.to(dtype)), tokenizer)
        assert report.nearest == tokenizer.decode([int(cosines.argmax())])
        assert report.cosine == pytest.approx(float(cosines.max()), abs=1e-5 if dtype == torch.float32 else 5e-3)
        assert report.share_of_median == pytest.approx(float(own.norm() / matrix.norm(dim=1).median()), rel=1e-5)


@pytest.mark.slow
def test_a_line_about_the_token_takes_a_fifth_of_a_second_at_the_true_size(components):
    matrix = torch.randn(151_665, 3584).to(torch.bfloat16)
    words = WordEmbeddings(matrix, torch.ones(len(matrix)), 1.0, 152_064)
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        compare_with_words(torch.randn(3584), words, SimpleNamespace(decode=str))
        taken.append(time.perf_counter() - began)
    assert min(taken) < 0.2
