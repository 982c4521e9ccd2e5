"""The machine's RAM: a container's limit counts, of either version of control groups; what is only cached doesn't."""

import pytest
import torch

from lora_utils.model import device, ram
from lora_utils.model.device import default_placement

LIMIT = 3 * 10**9  # below what any machine that runs this has


def make_group(root, mount, path, files):
    folder = root / mount / path.lstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")


def make_root(tmp_path, line):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(f"12:cpu:/somewhere\n{line}\n")
    return tmp_path


V2 = {"memory.max": LIMIT, "memory.current": 10**9, "memory.stat": "anon 1\ninactive_file 200\nactive_file 300"}
V1 = {
    "memory.limit_in_bytes": LIMIT,
    "memory.usage_in_bytes": 10**9,
    "memory.stat": "cache 9\ntotal_inactive_file 200\ntotal_active_file 300",
}


@pytest.mark.parametrize(
    ("line", "mount", "files"),
    [("0::/a/b", "sys/fs/cgroup", V2), ("4:memory:/a/b", "sys/fs/cgroup/memory", V1)],
    ids=["version 2", "version 1"],
)
@pytest.mark.parametrize("path", ["/a/b", "/a", "/"], ids=["the process's own group", "one above", "the topmost"])
def test_a_limit_counts_wherever_it_is_set(line, mount, files, path, tmp_path):
    root = make_root(tmp_path, line)
    make_group(root, mount, path, files)
    assert ram.free_ram_bytes(root) == LIMIT - 10**9 + 500


@pytest.mark.parametrize("limit", ["max", 9223372036854771712], ids=["version 2", "version 1"])
def test_a_group_without_a_limit_leaves_the_machines_memory(limit, tmp_path):
    root = make_root(tmp_path, "0::/\n4:memory:/")
    make_group(root, "sys/fs/cgroup", "/", {**V2, "memory.max": limit})
    make_group(root, "sys/fs/cgroup/memory", "/", {**V1, "memory.limit_in_bytes": limit})
    assert ram.free_ram_bytes(root) > LIMIT


def test_a_full_group_leaves_nothing_and_an_unreadable_one_is_none(tmp_path):
    root = make_root(tmp_path, "0::/full")
    make_group(root, "sys/fs/cgroup", "/full", {**V2, "memory.current": 2 * LIMIT})
    assert ram.free_ram_bytes(root) == 0
    (root / "sys/fs/cgroup/full/memory.stat").write_text("nonsense")
    assert ram.free_ram_bytes(root) > LIMIT
    assert ram.free_ram_bytes(tmp_path / "nowhere") > LIMIT


def test_what_is_held_and_what_is_mapped_are_told_apart(tmp_path):
    path = tmp_path / "weights"
    with path.open("wb") as file:
        file.truncate(50_000_000)
    before = ram.ram_usage()
    mapped = torch.from_file(str(path), size=50_000_000, dtype=torch.uint8)
    assert int(mapped.sum()) == 0  # each page is read
    now = ram.ram_usage()
    assert now.mapped - before.mapped == pytest.approx(50e6, rel=0.1)
    assert abs(now.held - before.held) < 20e6
    assert ram.peak_ram_bytes() >= now.held + now.mapped - 20e6


def test_a_small_model_computes_in_fp32_and_a_large_one_in_what_suits_the_machine(monkeypatch, caplog):
    caplog.set_level("INFO", "lora_utils")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def dtype_of(weights, fast, free):
        caplog.clear()
        monkeypatch.setattr(device, "multiplies_bf16_fast", lambda: fast)
        monkeypatch.setattr(device, "free_ram_bytes", lambda: free)
        return default_placement(weights).dtype

    for fast in (True, False):
        assert dtype_of(2_000_000, fast, 1e9) == torch.float32
        assert caplog.text == "", "nothing to say where there was no choice"
    assert dtype_of(20_000_000_000, True, 1e12) == torch.bfloat16
    assert "for which it has instructions" in caplog.text
    assert dtype_of(20_000_000_000, False, 64e9) == torch.bfloat16
    assert "there is no room for the weights in fp32" in caplog.text
    assert dtype_of(20_000_000_000, False, 128e9) == torch.float32
