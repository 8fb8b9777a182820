"""Our side of the reference cases with LoRA files, merged as `sample.py --lora` merges them."""

import jax
import jax.numpy as jnp
import numpy as np
from shared_cases import Call
from shared_drivers import known_fields, load_mmdit, pe_of

from convert_weights.lora.read import read_lora
from kontext_jax.models.presets import MMDiTConfig
from kontext_jax.trees import flatten, unflatten
from kontext_jax.weights.adapters import Adapter, leaf_edits


def merged(params, adapter: Adapter, scale: float):
    """The transformer's parameters with an adapter merged in."""
    edits = leaf_edits([(adapter.networks["mmdit"], scale)])
    leaves = dict(flatten(params))
    assert edits.keys() <= leaves.keys()
    changed = {path: jnp.asarray(edit(np.array(leaves[path]))) for path, edit in edits.items()}
    return unflatten(leaves | changed)


def flux_lora_forward(call: Call) -> dict:
    x = call.inputs()
    config = known_fields(MMDiTConfig, call.spec["params"])
    model, params = load_mmdit(call.weights_path(), config)
    adapter = read_lora(call.folder / call.spec["lora"], {"mmdit": config})
    assert adapter.layout == call.spec["lora_format"]
    params = merged(params, adapter, call.spec["lora_scale"])
    pe = pe_of(config, x["txt_ids"], x["img_ids"])
    arguments = (x["img"], x["txt"], x["y"], x["timesteps"], x.get("guidance"), pe)
    return {"pred": jax.jit(model.apply)({"params": params}, *arguments)}


LORA_DRIVERS = {"flux_lora_forward": flux_lora_forward}
