"""Merged, resized and extracted LoRAs: exact where ranks allow it, else the nearest, with what is lost told truly."""

import pytest
import torch
from safetensors.torch import save_file

from lora_utils.convert import main
from lora_utils.errors import UserError
from lora_utils.lora.formats import LoraFile, read_lora_file, write_lora_file
from lora_utils.lora.merge import extract, merge
from lora_utils.lora.ranks import cut_rank, low_rank_of, share_lost
from lora_utils.lora.updates import Decomposed, Hadamard, LowRank
from lora_utils.lora.weights import load_weights
from tests.lora import judge

QUERY, KEY = (f"transformer_blocks.0.attn.to_{name}" for name in "qk")


def random_lora(seed=0, rank=4, layers=(QUERY, KEY), alpha=6.0):
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape):
        return torch.randn(shape, generator=generator) * 0.2

    return LoraFile({name: LowRank(matrix(rank, 128), matrix(128, rank), alpha) for name in layers})


def test_cutting_a_rank_keeps_the_largest_singular_values():
    update = random_lora(rank=8).layers[QUERY]
    values = torch.linalg.svdvals(update.matrix())
    for rank in (1, 3, 7):
        cut = cut_rank(update, rank)
        assert cut.rank == rank
        assert torch.allclose(torch.linalg.svdvals(cut.matrix())[:rank], values[:rank], rtol=1e-4)
        lost = (values[rank:8].square().sum() / values.square().sum()).sqrt()
        assert share_lost({QUERY: update}, {QUERY: cut}) == pytest.approx(float(lost), rel=1e-3)
        assert float((cut.matrix() - update.matrix()).norm() / update.matrix().norm()) == pytest.approx(
            float(lost), rel=1e-3
        )
    assert cut_rank(update, 8) is update


@pytest.mark.parametrize("width", [96, 1100])
def test_a_low_rank_matrix_is_found_again_in_full(width):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(width, 5, generator=generator) @ torch.randn(5, width + 40, generator=generator)
    before = torch.random.get_rng_state()
    found = low_rank_of(matrix, 32)
    assert found.rank == 5
    assert float((found.matrix() - matrix).norm() / matrix.norm()) < 1e-5
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_merged_lora_computes_what_its_parts_compute_together(components, random_model, tmp_path):
    files = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for seed, (path, layers) in enumerate(zip(files, [(QUERY, KEY), (KEY,)], strict=True)):
        write_lora_file(path, random_lora(seed, layers=layers), dtype=torch.float32)
    target = tmp_path / "merged.safetensors"
    assert main([*map(str, files), str(target), "--scales", "0.5", "-1.5", "--dtype", "fp32"]) == 0
    parts = [(load_weights(path, components).lora, scale) for path, scale in zip(files, (0.5, -1.5), strict=True)]
    merged = load_weights(target, components).lora
    assert {name: layer.rank for name, layer in merged.layers.items()} == {QUERY: 4, KEY: 8}
    base, want = judge.ours(components), judge.ours(components, *parts)
    assert judge.error(judge.ours(components, merged), want, base) < 1e-5


def test_the_command_tells_what_a_smaller_rank_loses(tmp_path, capsys):
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    lora = random_lora(rank=8)
    write_lora_file(source, lora, dtype=torch.float32)
    assert main([str(source), str(target), "--rank", "2", "--dtype", "fp32"]) == 0
    cut = read_lora_file(target)
    one, other = (torch.cat([each.layers[name].matrix().flatten() for name in (QUERY, KEY)]) for each in (lora, cut))
    assert (
        f"{float((one - other).norm() / one.norm()):.1%} of the size of the changes is lost" in capsys.readouterr().out
    )


def test_tokens_are_kept_and_two_meanings_of_one_are_refused(tmp_path):
    one, other = random_lora(0), random_lora(1)
    one.embeddings["<a>"], other.embeddings["<b>"] = torch.ones(1, 128), torch.zeros(1, 128)
    assert set(merge([(one, 1), (other, 1)], None, ["one", "other"]).lora.embeddings) == {"<a>", "<b>"}
    other.embeddings["<a>"] = torch.zeros(1, 128)
    with pytest.raises(UserError, match="<a> of other means another thing"):
        merge([(one, 1), (other, 1)], None, ["one", "other"])


def test_another_method_is_merged_at_a_rank_and_a_dora_not_at_all():
    lora, generator = random_lora(), torch.Generator().manual_seed(3)
    pairs = [(torch.randn(128, 2, generator=generator), torch.randn(2, 128, generator=generator)) for _ in range(2)]
    loha = LoraFile({QUERY: Hadamard(pairs[0], pairs[1], 0.5)})
    with pytest.raises(UserError, match="give --rank"):
        merge([(lora, 1), (loha, 1)], None, ["a", "b"])
    found = merge([(lora, 1), (loha, 0.5)], 8, ["a", "b"])
    want = lora.layers[QUERY].matrix() + 0.5 * loha.layers[QUERY].matrix()
    assert found.lost < 1e-3, "the ranks are 4 and 2 * 2"
    assert torch.allclose(found.lora.layers[QUERY].matrix(), want, atol=1e-4)
    dora = LoraFile({QUERY: Decomposed(lora.layers[QUERY], torch.ones(128, 1))})
    for loras, rank in (([dora, lora], 8), ([dora], 2)):
        with pytest.raises(UserError, match="can't be merged or cut"):
            merge([(each, 1) for each in loras], rank, ["a", "b"][: len(loras)])


def test_what_lies_between_two_checkpoints_is_extracted(random_model, components, tmp_path):
    base = judge.stock(random_model)
    tuned, lora = judge.stock(random_model).requires_grad_(False), random_lora(2)
    for name, layer in lora.layers.items():
        tuned.get_submodule(name).weight += layer.matrix()
    tuned.proj_out.bias += 1
    weights = {f"model.diffusion_model.{name}": value for name, value in tuned.state_dict().items()}
    save_file(weights, tmp_path / "tuned.safetensors")
    found = extract(tmp_path / "tuned.safetensors", random_model, 8)
    assert set(found.lora.layers) == {QUERY, KEY}
    assert found.lost < 1e-3
    for name, layer in found.lora.layers.items():
        assert torch.allclose(layer.matrix(), lora.layers[name].matrix(), atol=1e-5)
    assert 0.1 < extract(tmp_path / "tuned.safetensors", random_model, 2).lost < 0.9
    base.save_pretrained(tmp_path / "same")
    with pytest.raises(UserError, match="there is nothing to extract"):
        extract(tmp_path / "same", random_model, 8)
    base.proj_out = torch.nn.Linear(128, 32)
    base.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="has two shapes"):
        extract(tmp_path / "other", random_model, 8)
