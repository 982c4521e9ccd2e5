"""Who may import whom: the column of the map in docs/design.md, without exceptions; and what stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

LIBRARY = ROOT / "lora_utils"
ROOT_FILES = {
    "errors",
    "constants",
    "config",
    "conflicts",
    "options",
    "presets",
    "prompts",
    "triggers",
}  # every folder may import them
MAY_IMPORT = {
    "io": set(),
    "placeholder": set(),
    "tracking": {"io"},
    "model": {"io", "placeholder"},
    "lora": {"io", "placeholder", "model"},
    "dataset": {"io", "placeholder", "model"},
    "sampling": {"io", "placeholder", "model", "lora"},
    "training": {"io", "placeholder", "tracking", "model", "lora", "dataset", "sampling", "cli"},
}
ENTRY_POINTS = {"__main__", "cli", "convert", "dataset/__main__"}


def modules_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.py") if path.name not in ("__init__.py", "__main__.py"))


def imports_of(path: Path) -> set[str]:
    """Return the dotted names below lora_utils that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lora_utils":
            inside = str(node.module).split(".")[1:]
            if len(inside) == 2:
                found.add(".".join(inside))
            else:  # from lora_utils import x, or from lora_utils.folder import module
                found |= {".".join([*inside, alias.name]) for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("lora_utils.") for alias in node.names if "lora_utils" in alias.name}
    return found


def test_the_folders_are_those_of_the_map():
    folders = {path.name for path in LIBRARY.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(MAY_IMPORT)
    top = {path.stem for path in LIBRARY.glob("*.py")}
    assert top == ROOT_FILES | {"__init__", "__main__", "cli", "convert"}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_what_the_map_allows(folder):
    allowed = MAY_IMPORT[folder] | ROOT_FILES | {folder}
    for path in modules_of(LIBRARY / folder):
        for name in imports_of(path):
            assert name.split(".")[0] in allowed, f"{folder}/{path.name} imports {name}"


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_within_a_folder_imports_go_down_only(folder):
    """No module imports one that imports it, over however many others."""
    names = {path.stem: imports_of(path) for path in modules_of(LIBRARY / folder)}
    inside = {
        stem: {name.split(".")[1] for name in found if name.startswith(f"{folder}.")} & set(names)
        for stem, found in names.items()
    }

    def reaches(start: str) -> set[str]:
        seen: set[str] = set()
        pending = list(inside[start])
        while pending:
            name = pending.pop()
            if name not in seen:
                seen.add(name)
                pending += inside[name]
        return seen

    for stem in inside:
        assert stem not in reaches(stem), f"{folder}/{stem}.py is imported by what it imports"


@pytest.mark.parametrize("name", sorted(ROOT_FILES))
def test_the_root_files_need_the_standard_library_alone(name):
    for node in ast.walk(ast.parse((LIBRARY / f"{name}.py").read_text())):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            top = module.split(".")[0]
            assert top == "lora_utils" or top in sys.stdlib_module_names, f"{name} imports {module}"
    assert {found.split(".")[0] for found in imports_of(LIBRARY / f"{name}.py")} <= ROOT_FILES


def test_only_entry_points_know_cog_or_parse_arguments():
    for path in sorted(LIBRARY.rglob("*.py")):
        name = str(path.relative_to(LIBRARY).with_suffix(""))
        imported = {
            alias
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        }
        assert not {module for module in imported if module.split(".")[0] in ("cog", "train", "predict")}, name
        assert "argparse" not in imported or name in ENTRY_POINTS, name


HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "PIL", "huggingface_hub", "cog")


@pytest.mark.parametrize(
    "command",
    [
        ["lora_utils"],
        ["lora_utils", "--help"],
        ["lora_utils", "train", "--help"],
        ["lora_utils", "sample", "--help"],
        ["lora_utils", "train", "d.zip", "--nonsense", "1"],
        ["lora_utils", "train", "d.zip", "--rank", "0"],
        ["lora_utils", "sample", "--prompt", "x", "--width", "64"],
        ["lora_utils.dataset", "--help"],
        ["lora_utils.convert", "--help"],
    ],
    ids=" ".join,
)
def test_help_and_wrong_options_import_no_heavy_library(command):
    """Modules are counted, not seconds: a machine may be busy."""
    code = f"""
import runpy, sys
sys.argv = {command!r}
try:
    runpy.run_module({command[0]!r}, run_name="__main__", alter_sys=True)
except SystemExit:
    pass
print("imported", *(name for name in {HEAVY!r} if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported", done.stdout[-200:]
