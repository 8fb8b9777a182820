"""torch stays out of a run even where it is installed."""

import json
import subprocess
import sys
from pathlib import Path

import kontext_jax

PROGRAM = """
import importlib, json, pkgutil, shutil, sys, tempfile
from pathlib import Path

import kontext_jax
for module in pkgutil.walk_packages(kontext_jax.__path__, "kontext_jax."):
    importlib.import_module(module.name)

import jax
import jax.numpy as jnp
from kontext_jax.models.conditioning import encode_text
from kontext_jax.models.clip import CLIPText
from kontext_jax.models.presets import PRESETS
from kontext_jax.models.t5 import T5Encoder
from kontext_jax.models.tokenizing import Tokenizers

assets = Path(kontext_jax.__file__).parent / "assets" / "tokenizers"
ids, _ = Tokenizers(assets / "t5", assets / "clip").tokenize(["make it blue"], 8)
loaded = {"fast": sorted({"torch", "transformers"} & set(sys.modules))}

with tempfile.TemporaryDirectory() as folder:
    shutil.copy(assets / "t5" / "spiece.model", folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(assets / "clip" / name, folder)
    Tokenizers(folder, folder).tokenize(["make it blue"], 8)

tiny = PRESETS["tiny"]
t5, clip = T5Encoder(tiny.t5), CLIPText(tiny.clip)
shape = jnp.zeros((1, 8), jnp.int32)
params = [jax.jit(net.init)(jax.random.key(0, impl="rbg"), shape)["params"] for net in (t5, clip)]
jax.jit(encode_text, static_argnums=(0, 1))(t5, clip, *params, ids)
loaded["run"] = sorted({"torch", "diffusers", "tensorflow", "convert_weights"} & set(sys.modules))
print(json.dumps(loaded))
"""


def test_importing_tokenizing_and_encoding_never_import_torch():
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(kontext_jax.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    # A tokenizer.json is read without transformers, too, whose import takes seconds.
    assert json.loads(run.stdout.splitlines()[-1]) == {"fast": [], "run": []}
