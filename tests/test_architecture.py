"""The house stays as docs/architecture.md draws it: who may import whom."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def load_rooms():
    spec = importlib.util.spec_from_file_location("rooms", ROOT / "tools" / "rooms.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rooms = load_rooms()


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def packages_used(path: Path) -> set[str]:
    return {name.split(".")[0] for name in rooms.imported_modules(path)}


def test_every_room_stands_on_a_floor():
    strangers = {rooms.room_of_file(path) for path in rooms.files()} - rooms.FLOOR_OF.keys()
    assert not strangers, f"put {sorted(strangers)} on a floor of tools/rooms.py"


def test_every_arrow_goes_to_a_lower_floor():
    assert not rooms.not_down(rooms.arrows())


def test_an_arrow_that_does_not_go_down_is_found():
    """Along a floor, up, and to the face: all are told."""
    across = {"sampling": {"training": ("a.py",)}, "ops": {"models": ("b.py",), "types": ()}}
    assert [line.split(":")[0] for line in rooms.not_down(across)] == [
        "sampling (floor 5) imports training (floor 5)",
        "ops (floor 2) imports models (floor 3)",
    ]
    assert rooms.room_of_import("kontext_jax.anything") == rooms.FACE
    assert rooms.room_of_import("kontext_jax.flow.path.velocity_target") == "flow"
    assert rooms.room_of_import("numpy.linalg") is None


def test_circles_and_floors_are_counted():
    circle = {"a": {"b": ()}, "b": {"c": ()}, "c": {"b": (), "d": ()}}
    assert rooms.circles(circle) == [{"b", "c"}]
    assert rooms.longest_way_down(circle) == 3
    assert rooms.circles(rooms.arrows()) == []
    assert rooms.longest_way_down(rooms.arrows()) <= len(rooms.FLOORS)


def test_samplers_and_objectives_do_not_know_a_network():
    arrows = rooms.arrows()
    for room in ("flow", "objectives", "ops"):
        assert "models" not in arrows[room], room


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
