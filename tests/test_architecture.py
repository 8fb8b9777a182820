"""The house stays as docs/architecture.md draws it: who may import whom."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENTRY_POINTS = {
    "sample.py",
    "train.py",
    "encode.py",
    "synthesize.py",
    "edits.py",
    "reconstruction.py",
    "distilled.py",
    "multi_turn.py",
}

# Rooms from the ground up; a room imports from rooms on lower floors, or on its own.
FLOORS = {
    0: (
        "types",
        "numerics",
        "compiling",
        "executable_files",
        "compiler_options",
        "sharding",
        "chips",
        "hlo",
        "hlo_collectives",
        "hlo_kernels",
        "hlo_cost",
        "config_tree",
        "metrics",
        "processes",
        "checksums",
        "command_line",
    ),
    1: (
        "guidance",
        "policy",
        "model_card",
        "placement",
        "ops",
        "latents",
        "flow",
        "tensor_files",
        "step_folders",
    ),
    2: (
        "models",
        "tokenizing",
        "images",
        "sizes",
        "tensor_writing",
        "data",
        "train_state",
        "array_store",
    ),
    3: (
        "conditioning",
        "sampler",
        "checkpoint",
        "requests",
        "objectives",
        "optimizer",
        "training_checkpoints",
        "adapters",
        "flops",
        "perceptual_weights",
    ),
    4: (
        "stages",
        "encoding",
        "training_bundle",
        "train_config",
        "sample_grid",
    ),
    5: ("pipeline", "synthesis", "training_tasks", "training_data", "teacher"),
    6: (
        "evaluation",
        "runs",
        "warming",
        "training_journal",
        "transformer_task",
        "flow_matching_task",
        "ladd_task",
        "distillation_task",
        "autoencoder_task",
    ),
    7: ("task_table",),
    8: ("train_loop",),
    9: ("plan",),
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Dotted names of everything a file imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(path: Path) -> str:
    """The first name below kontext_jax: a folder, or a file without its suffix."""
    return path.relative_to(ROOT / "kontext_jax").parts[0].removesuffix(".py")


def rooms_used(path: Path) -> set[str]:
    """Rooms of kontext_jax that a file imports from."""
    parts = [name.split(".") for name in imported_modules(path)]
    return {p[1] for p in parts if p[0] == "kontext_jax" and len(p) > 1}


def packages_used(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_modules(path)}


def test_arrows_point_down():
    upward = []
    for path in python_files("kontext_jax"):
        room = room_of(path)
        if room == "__init__" or path.name in ENTRY_POINTS:
            continue
        assert room in FLOOR_OF, f"{room} stands on no floor; add it to FLOORS and architecture.md"
        for used in rooms_used(path) & FLOOR_OF.keys():
            if FLOOR_OF[used] > FLOOR_OF[room]:
                upward.append(f"{path.relative_to(ROOT)} imports {used}")
    assert not upward


def test_samplers_and_objectives_do_not_know_a_network():
    files = [ROOT / "kontext_jax" / name for name in ("sampler.py", "flow.py")]
    for path in files + python_files("kontext_jax/objectives"):
        assert "models" not in rooms_used(path), path.name


def test_only_entry_points_import_convert_weights():
    importers = {p for p in python_files("kontext_jax") if "convert_weights" in packages_used(p)}
    importers |= {p for p in ROOT.glob("*.py") if "convert_weights" in packages_used(p)}
    assert {p.name for p in importers} <= ENTRY_POINTS


def test_the_package_never_imports_pytorch():
    for path in python_files("kontext_jax", "convert_weights"):
        assert not packages_used(path) & {"torch", "diffusers", "torchvision", "einops"}, path


def test_ops_do_not_know_flax():
    for path in python_files("kontext_jax/ops"):
        assert "flax" not in packages_used(path), path


def tracked_text_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True
    ).stdout
    paths = [ROOT / name for name in listed.split("\0") if name]
    return [p for p in paths if p.is_file() and b"\0" not in p.read_bytes()[:8192]]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_path_of_a_developers_machine():
    path_pattern = re.compile(r"(?<![\w.])/(?:home|root|work|Users|mnt|farm)/\w")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked_text_files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
        if path_pattern.search(line)
    ]
    assert not found
