"""Training steps of small random transformers through diffusers and PyTorch, and through our code.

Each run draws another transformer; `--parity-seed` repeats a run.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared_drivers import pe_of
from training_drivers import make_predict, to_published

from convert_weights import read_component
from kontext_jax.batches import TokenBatch
from kontext_jax.models.mmdit import MMDiT
from kontext_jax.objectives.base import make_gradient_step
from kontext_jax.objectives.flow_matching import velocity_loss
from kontext_jax.objectives.state import make_train_state
from kontext_jax.pictures import latents
from kontext_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule

pytestmark = pytest.mark.parity

OPTIONS = OptimizerConfig(
    learning_rate=3e-3,
    schedule="cosine",
    warmup_steps=2,
    b1=0.8,
    b2=0.97,
    eps=1e-6,
    weight_decay=0.1,
    clip_norm=0.7,
)
NUM_STEPS, NUM_TEXT, TARGET, REFERENCES = 4, 5, (3, 4), [(2, 3), (3, 2)]


@pytest.fixture(scope="module")
def torch_models():
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    import torch_models

    return torch_models


def draw_transformer(torch_models, seed: int):
    """A transformer of diffusers, one in three without guidance, and a batch of two samples."""
    torch, has_guidance = torch_models.torch, seed % 3 != 0
    model = torch_models.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=8,
        guidance_embeds=has_guidance,
        axes_dims_rope=(4, 6, 6),
    )
    torch_models.randomize(model, torch.Generator().manual_seed(seed))
    rng = np.random.default_rng(seed)
    num_ctx = sum(rows * columns for rows, columns in REFERENCES)
    shapes = {
        "x0": (2, 12, 16),
        "noise": (2, 12, 16),
        "ctx": (2, num_ctx, 16),
        "txt": (2, NUM_TEXT, 12),
        "vec": (2, 8),
    }
    batch = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    # Small times and guidance: the sinusoids' arguments, 1000·t, round less.
    batch["t"] = rng.uniform(0.01, 0.05, 2).astype(np.float32)
    batch["guidance"] = np.float32([0.02, 0.03]) if has_guidance else None
    return model, batch


def torch_steps(torch_models, model, x: dict, text_ids, image_ids):
    """(loss, gradient norm) of each step, the first gradients, and the parameters at the end."""
    torch = torch_models.torch
    x = {name: None if value is None else torch.from_numpy(value) for name, value in x.items()}
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=1.0,
        betas=(OPTIONS.b1, OPTIONS.b2),
        eps=OPTIONS.eps,
        weight_decay=OPTIONS.weight_decay,
    )
    rate, figures, first = make_schedule(OPTIONS, NUM_STEPS), [], None
    t = x["t"][:, None, None]
    x_t = (1 - t) * x["x0"] + t * x["noise"]
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = float(rate(step))
        optimizer.zero_grad()
        velocity = model(
            hidden_states=torch.cat([x_t, x["ctx"]], dim=1),
            encoder_hidden_states=x["txt"],
            pooled_projections=x["vec"],
            timestep=x["t"],
            guidance=x["guidance"],
            img_ids=torch.from_numpy(image_ids),
            txt_ids=torch.from_numpy(text_ids),
            return_dict=False,
        )[0][:, : x_t.shape[1]]
        loss = ((velocity - (x["noise"] - x["x0"])) ** 2).mean()
        loss.backward()
        first = first or {n: p.grad.numpy().copy() for n, p in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIONS.clip_norm)
        optimizer.step()
        figures.append((loss.item(), norm.item()))
    return np.array(figures), first, {n: p.detach().numpy() for n, p in model.named_parameters()}


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def test_steps_of_drawn_transformers_equal_pytorchs(
    torch_models, pytestconfig, tmp_path, comparisons
):
    given_seed = pytestconfig.getoption("--parity-seed")
    seed = int(time.time()) % 1_000_000 if given_seed is None else given_seed
    comparisons.notes.append(f"drawn training steps: repeat with --parity-seed {seed}")
    model, x = draw_transformer(torch_models, seed)
    model.save_pretrained(tmp_path)
    text_ids = latents.text_ids(NUM_TEXT).astype(np.float32)
    image_ids = np.concatenate([latents.image_ids(*TARGET), latents.context_ids(REFERENCES)])
    before = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    figures, gradients, after = torch_steps(
        torch_models, model, x, text_ids, image_ids.astype(np.float32)
    )

    config, params = read_component(tmp_path, "mmdit")
    predict = make_predict(MMDiT(config, dtype=jnp.float32))
    x = {name: None if value is None else jnp.asarray(value) for name, value in x.items()}
    batch = TokenBatch(
        x0=x["x0"],
        ctx=x["ctx"],
        txt=x["txt"],
        vec=x["vec"],
        null_txt=jnp.zeros_like(x["txt"][0]),
        null_vec=jnp.zeros_like(x["vec"][0]),
        pe=pe_of(config, text_ids, image_ids),
    )

    def loss_fn(params, frozen, batch, key, sample_index):
        loss = velocity_loss(predict, params, frozen, batch, x["noise"], x["t"], x["guidance"])
        return jnp.mean(loss), {}

    optimizer = make_optimizer(OPTIONS, NUM_STEPS)
    state = make_train_state(jax.tree.map(jnp.asarray, params), optimizer, with_ema=False)
    ours = jax.jit(jax.grad(lambda p: loss_fn(p, {}, batch, None, None)[0]))(state.params)
    ours = to_published(config, ours, "diffusers")
    step, our_figures = jax.jit(make_gradient_step(loss_fn, optimizer)), []
    for _ in range(NUM_STEPS):
        state, metrics = step(state, {}, batch, jax.random.key(0))
        our_figures.append((metrics["loss"], metrics["grad_norm"]))
    found = to_published(config, state.params, "diffusers")

    assert ours.keys() == gradients.keys() == after.keys()
    worst = max(relative(ours[name], gradients[name]) for name in gradients)
    moves = {
        name: relative(found[name] - before[name], after[name] - before[name]) for name in after
    }
    comparisons.notes.append(
        f"training steps against PyTorch, relative: loss and norm "
        f"{relative(np.array(our_figures), figures):.1e}, gradients {worst:.1e}, "
        f"movement of parameters {max(moves.values()):.1e}"
    )
    assert figures[0, 1] > OPTIONS.clip_norm  # so that clipping counts
    np.testing.assert_allclose(our_figures, figures, rtol=1e-4)
    assert worst < 1e-4
    # AdamW divides by the size of the gradient, so it makes of its rounding what it makes of it.
    assert max(moves.values()) < 5e-3
