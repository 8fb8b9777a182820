"""LoRA files between diffusers (with PEFT) and us: what either writes, the other applies alike.

Each run draws other adapters; `--parity-seed` repeats a run.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lora_drivers import merged
from shared_drivers import pe_of

from convert_weights import read_component
from convert_weights.lora.read import read_lora
from convert_weights.lora.write import write_lora
from kontext_jax.models.lora import LoraConfig, init_lora
from kontext_jax.models.mmdit import MMDiT
from kontext_jax.pictures import latents
from kontext_jax.weights.adapters import adapter_from_tree
from kontext_jax.weights.bundle import ASSETS, parameter_shapes

pytestmark = pytest.mark.parity

TOKENIZER_DIRS = {kind: ASSETS / "tokenizers" / kind for kind in ("t5", "clip")}
NUM_TEXT, GRID, REFERENCE = 5, (3, 4), (2, 3)
ATOL = 2e-5  # a forward pass at small t
SCALE = 0.1  # of the adapters' values; the velocity, of size 1 to 5, changes by about as much


@pytest.fixture(scope="module")
def torch_models():
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    import torch_models

    return torch_models


@pytest.fixture(scope="module")
def seed(pytestconfig) -> int:
    given = pytestconfig.getoption("--parity-seed")
    return int(time.time()) % 1_000_000 if given is None else given


@pytest.fixture(scope="module")
def both(torch_models, tmp_path_factory, seed):
    """A pipeline of diffusers, and its transformer as ours."""
    sizes = torch_models.PipelineSizes(depth=2, depth_single=2, stored_dtype="float32")
    pipeline = torch_models.make_pipeline(sizes, TOKENIZER_DIRS, seed)
    folder = tmp_path_factory.mktemp("transformer")
    pipeline.transformer.save_pretrained(folder)
    config, params = read_component(folder, "mmdit")
    return pipeline, config, jax.tree.map(jnp.asarray, params)


@pytest.fixture(scope="module")
def forward(torch_models, both, seed):
    """(theirs(), ours(params)): velocities of one batch."""
    pipeline, config, _ = both
    torch, rng = torch_models.torch, np.random.default_rng(seed)
    length = GRID[0] * GRID[1] + REFERENCE[0] * REFERENCE[1]
    img = rng.standard_normal((2, length, config.in_channels)).astype(np.float32)
    txt = rng.standard_normal((2, NUM_TEXT, config.context_in_dim)).astype(np.float32)
    vec = rng.standard_normal((2, config.vec_in_dim)).astype(np.float32)
    t, guidance = np.array([3e-4, 7e-4], np.float32), np.array([1e-3, 2e-3], np.float32)
    txt_ids = latents.text_ids(NUM_TEXT)
    img_ids = np.concatenate([latents.image_ids(*GRID), latents.context_ids([REFERENCE])])
    pe = pe_of(config, txt_ids, img_ids)
    apply = jax.jit(MMDiT(config).apply)

    def theirs():
        arrays = map(torch.from_numpy, (img, txt, vec, t, np.float32(img_ids), np.float32(txt_ids)))
        hidden, encoder, pooled, times, ids, text_ids = arrays
        with torch.no_grad():
            return pipeline.transformer(
                hidden_states=hidden,
                encoder_hidden_states=encoder,
                pooled_projections=pooled,
                timestep=times,
                img_ids=ids,
                txt_ids=text_ids,
                guidance=torch.from_numpy(guidance),
                return_dict=False,
            )[0].numpy()

    def ours(params, lora=None):
        variables = {"params": params} | ({} if lora is None else {"lora": lora})
        return np.asarray(apply(variables, img, txt, vec, t, guidance, pe))

    return theirs, ours


def draw_adapter(config, targets, rank: int, alpha: float, seed: int):
    shapes = parameter_shapes("mmdit", config)
    tree = init_lora(LoraConfig(rank, alpha, targets), shapes, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    tree = jax.tree.map(lambda x: rng.normal(0, SCALE, x.shape).astype(np.float32), tree)
    return adapter_from_tree(tree, alpha, f"drawn {seed}")


# Of kohya's files diffusers reads linear1 at the published sizes alone, and drops what is outside
# the blocks.
KOHYA_TARGETS = ("double_*", "single_mod", "single_blocks/*_out")


@pytest.mark.parametrize(
    ("layout", "targets"),
    [("peft", ("kontext",)), ("peft", ("all-linear",)), ("kohya", KOHYA_TARGETS)],
    ids=["peft", "peft-all", "kohya"],
)
def test_diffusers_applies_what_we_write(
    both, forward, seed, tmp_path, layout, targets, comparisons
):
    (pipeline, config, params), (theirs, ours) = both, forward
    base = ours(params)
    np.testing.assert_allclose(base, theirs(), rtol=0, atol=ATOL)
    first = draw_adapter(config, targets, rank=4, alpha=3.0, seed=seed)
    second = draw_adapter(config, targets[:1], rank=3, alpha=6.0, seed=seed + 1)
    for name, adapter in (("first", first), ("second", second)):
        path = tmp_path / f"{name}.safetensors"
        write_lora(adapter, path, layout, {"mmdit": config})
        pipeline.load_lora_weights(path, adapter_name=name)
    try:
        pipeline.set_adapters(["first", "second"], [1.0, -0.7])
        expected = theirs()
    finally:
        pipeline.unload_lora_weights()
    both_merged = merged(merged(params, first, 1.0), second, -0.7)
    found = ours(both_merged)
    change, difference = np.abs(expected - base).max(), np.abs(found - expected).max()
    comparisons.notes.append(
        f"two LoRAs through {layout} files, {targets[0]}…: change of the velocity {change:.2f}, "
        f"difference to diffusers {difference:.1e}"
    )
    assert change > 0.1
    assert difference <= ATOL


def test_we_apply_what_diffusers_trains(torch_models, both, forward, seed, tmp_path):
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model_state_dict

    (pipeline, config, params), (theirs, ours) = both, forward
    torch, transformer = torch_models.torch, pipeline.transformer
    transformer.add_adapter(
        PeftConfig(
            r=4,
            lora_alpha=6,
            rank_pattern={"attn.to_q": 2, r"transformer_blocks.1.ff.net.2": 3},
            alpha_pattern={"attn.to_k": 1, "proj_mlp": 5},
            target_modules=["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "proj_mlp", "proj_out"],
        )
    )
    try:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in transformer.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        expected = theirs()
        layers = get_peft_model_state_dict(transformer)
        type(pipeline).save_lora_weights(
            tmp_path,
            transformer_lora_layers=layers,
            transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
        )
    finally:
        transformer.delete_adapters(["default"])
    adapter = read_lora(tmp_path, {"mmdit": config})
    assert {change.rank for change in adapter.networks["mmdit"].low_rank.values()} == {2, 3, 4}
    found = ours(merged(params, adapter, 1.0))
    assert np.abs(expected - ours(params)).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=ATOL)
