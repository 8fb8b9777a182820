"""Public functions over arrays say their dimensions, in the letters of kontext_jax/types.py."""

import ast
import collections
import importlib.util
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Rooms (tools/rooms.py) whose public functions all name their dimensions.
DONE: tuple[str, ...] = (
    *("__init__", "charts", "convert_weights", "evaluation", "fields", "flow", "models"),
    *("objectives", "ops", "pictures", "plan", "runtime", "sampling", "training", "weights"),
)

PACKAGES = ("kontext_jax", "convert_weights")
ARRAYS = {"jax.Array", "np.ndarray", "jnp.ndarray", "Array", "ndarray"}
SHAPED = {"Float", "Int", "UInt8", "Bool", "Shaped", "Num", "Inexact", "Integer", "UInt", "Key"}
FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef


def load_rooms():
    spec = importlib.util.spec_from_file_location("rooms", ROOT / "tools" / "rooms.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rooms = load_rooms()


def kinds_of_arrays(annotation: ast.expr) -> set[str]:
    """Of an annotation: "bare" if it names an array without a shape, "shaped" if with one.

    Functions that are passed in are not looked into: their docstrings say what they take.
    """
    if ast.unparse(annotation) in ARRAYS:
        return {"bare"}
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return kinds_of_arrays(ast.parse(annotation.value, mode="eval").body)
    if isinstance(annotation, ast.Subscript):
        head = ast.unparse(annotation.value).rpartition(".")[2]
        if head == "Callable":
            return set()
        if head in SHAPED:
            return {"shaped"}
    children = (node for node in ast.iter_child_nodes(annotation) if isinstance(node, ast.expr))
    return set().union(*map(kinds_of_arrays, children))


def public_functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions of a module and methods of its classes that begin with no underscore."""
    for node in tree.body:
        if isinstance(node, FUNCTIONS) and not node.name.startswith("_"):
            yield node.name, node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                named = isinstance(method, FUNCTIONS) and (
                    method.name == "__call__" or not method.name.startswith("_")
                )
                if named:
                    yield f"{node.name}.{method.name}", method


def kinds_of_function(function: ast.FunctionDef) -> set[str]:
    arguments = function.args
    annotations = [
        argument.annotation
        for argument in (
            *(*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs),
            *(arguments.vararg, arguments.kwarg),
        )
        if argument is not None and argument.annotation is not None
    ]
    if function.returns is not None:
        annotations.append(function.returns)
    return set().union(*map(kinds_of_arrays, annotations))


def functions_over_arrays() -> dict[str, dict[str, bool]]:
    """Room → "file: function" → whether all its arrays have shapes."""
    found = collections.defaultdict(dict)
    for path in rooms.files():
        if path.parts[0] not in PACKAGES:
            continue
        for name, function in public_functions(ast.parse((ROOT / path).read_text("utf-8"))):
            if kinds := kinds_of_function(function):
                found[rooms.room_of_file(path)][f"{path}: {name}"] = "bare" not in kinds
    return found


def test_public_functions_name_their_dimensions():
    found = functions_over_arrays()
    bare = [name for room in DONE for name, shaped in found[room].items() if not shaped]
    assert not bare
    assert set(DONE) <= rooms.FLOOR_OF.keys()


def test_arrays_are_found_in_annotations():
    kinds = {
        'Float[Array, "B L"] | None': {"shaped"},
        "tuple[jax.Array, ...]": {"bare"},
        'Mapping[str, Float[Array, "B"] | np.ndarray]': {"bare", "shaped"},
        '"jax.Array"': {"bare"},
        "Callable[[jax.Array], jax.Array]": set(),
        "Params": set(),
    }
    for text, expected in kinds.items():
        assert kinds_of_arrays(ast.parse(text, mode="eval").body) == expected, text


if __name__ == "__main__":
    total = [0, 0]
    for room, functions in sorted(functions_over_arrays().items()):
        total[0] += sum(functions.values())
        total[1] += len(functions)
        print(f"{room}: {sum(functions.values())} of {len(functions)}")
        print(*(f"  {name}" for name, shaped in functions.items() if not shaped), sep="\n")
    print(f"{total[0]} of {total[1]} public functions over arrays name all dimensions")
