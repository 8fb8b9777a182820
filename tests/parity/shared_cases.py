"""The reference cases: folders of a `config.json`, tensors and weights made by PyTorch.

A case lists `calls`: which function on which inputs, and for each output the key of the expected
tensor with its tolerance. Nothing here knows a size, a seed or a tolerance.
"""

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

ENVIRONMENT_VARIABLE = "KONTEXT_PARITY_DIR"


def find_parity_dir() -> Path | None:
    """The folder of cases: $KONTEXT_PARITY_DIR, else ../shared/parity beside the checkout."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    folder = Path(named) if named else Path(__file__).parents[3] / "shared" / "parity"
    return folder if folder.is_dir() else None


@functools.lru_cache(maxsize=4)
def _tensors(path: Path) -> dict[str, np.ndarray]:
    return load_file(path)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of one case."""

    root: Path  # the folder of all cases
    case: str
    config: dict[str, Any]  # the whole config.json
    spec: dict[str, Any]  # this call

    @property
    def id(self) -> str:
        return f"{self.case}-{self.spec['id']}"

    @property
    def fn(self) -> str:
        return self.spec["fn"]

    @property
    def folder(self) -> Path:
        return self.root / self.case

    @property
    def is_heavy(self) -> bool:
        return "heavy" in (self.config.get("level"), self.spec.get("level"))

    def inputs(self) -> dict[str, jax.Array]:
        """The tensors the call is made with, by parameter name."""
        tensors = _tensors(self.root / self.spec.get("inputs_from", self.case) / "io.safetensors")
        return {name: jnp.asarray(tensors[key]) for name, key in self.spec["inputs"].items()}

    def weights_path(self, key: str = "weights") -> Path:
        """Where the weights named by `key` ("weights" or "vae_weights") are."""
        other_case = {"weights": "weights_from", "vae_weights": "vae_from"}[key]
        return self.root / self.spec.get(other_case, self.case) / self.spec[key]

    def expectations(self) -> dict[str, dict[str, Any]]:
        """Name of each output and intermediate value → its key and tolerance."""
        return self.spec.get("outputs", {}) | self.spec.get("intermediates", {})

    def expected(self, name: str) -> np.ndarray:
        return _tensors(self.folder / "io.safetensors")[self.expectations()[name]["key"]]


def find_calls(root: Path) -> list[Call]:
    """Every call of every case below `root`, sub-cases included."""
    calls = []
    for path in sorted(root.rglob("config.json")):
        config = json.loads(path.read_text())
        for spec in config.get("calls", []):  # a model's own config.json has none
            calls.append(Call(root, path.parent.relative_to(root).as_posix(), config, spec))
    return calls


def share_of_tolerance(call: Call, name: str, value: Any) -> float:
    """Largest difference of `value` from what is expected, divided by the tolerance.

    Raises:
      AssertionError: if shapes differ, or a value that must be equal is not.
    """
    expected, spec = call.expected(name), call.expectations()[name]
    value = np.asarray(value)
    assert value.shape == expected.shape, f"{name}: shape {value.shape}, expected {expected.shape}"
    difference = np.abs(value.astype(np.float64) - expected.astype(np.float64)).max(initial=0.0)
    assert not np.isnan(difference), f"{name}: NaN"
    atol = 0.0 if spec.get("exact") else spec.get("atol", spec.get("atol_levels"))
    if atol == 0:
        assert difference == 0, f"{name}: differs by {difference}, must be equal"
        return 0.0
    return float(difference / atol)
