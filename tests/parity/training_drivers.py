"""Our side of a training step: loss, gradients and updated parameters in the references' names."""

import jax
import jax.numpy as jnp
import numpy as np
from shared_cases import Call
from shared_drivers import known_fields, load_mmdit, pe_of

from convert_weights.rules import make_plan
from convert_weights.tables import TABLES
from kontext_jax.batches import Conditioning, TokenBatch
from kontext_jax.flow import path as flow
from kontext_jax.models.mmdit import make_velocity_fn
from kontext_jax.models.presets import MMDiTConfig
from kontext_jax.objectives.base import make_gradient_step
from kontext_jax.objectives.flow_matching import velocity_loss
from kontext_jax.objectives.state import make_train_state
from kontext_jax.training.optimizer import OptimizerConfig, make_optimizer


def to_published(config: MMDiTConfig, tree, naming: str) -> dict[str, np.ndarray]:
    """A tree of the parameters' shape, gradients for instance, by the published names."""
    table = TABLES["mmdit"]
    plan = make_plan(table.rows(config), table.axis_sizes(config), naming)
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    assert leaves.keys() == plan.leaves.keys()
    tensors = {name: np.full(shape, np.nan, np.float32) for name, shape in plan.sources.items()}
    for move in plan.moves:
        leaf = leaves[move.path]
        move.to_theirs(leaf if move.layer is None else leaf[move.layer], tensors[move.source])
    return tensors


def make_predict(model):
    def predict(params, frozen, x_t, t, batch, guidance):
        cond = Conditioning(batch.txt, batch.vec, guidance, batch.ctx, batch.pe)
        return make_velocity_fn(model, params, cond)(x_t, t, None)

    return predict


def flux_train_step(call: Call) -> dict:
    x = call.inputs()
    config = known_fields(MMDiTConfig, call.spec["params"])
    model, params = load_mmdit(call.weights_path(), config)
    batch = TokenBatch(
        x0=x["x0"],
        ctx=x["context"],
        txt=x["txt"],
        vec=x["y"],
        null_txt=jnp.zeros_like(x["txt"][0]),
        null_vec=jnp.zeros_like(x["y"][0]),
        # The same positions in every sample.
        pe=pe_of(config, *(x[name][0] for name in ("txt_ids", "img_ids", "context_ids"))),
    )
    noise, t, guidance = x["noise"], x["t"], x["guidance"]
    predict = make_predict(model)

    def loss_fn(params, frozen, batch, key, sample_index):
        loss = velocity_loss(predict, params, frozen, batch, noise, t, guidance)
        return jnp.mean(loss), {}

    x_t = flow.interpolate(x["x0"], noise, t)
    loss_per_sample = jax.jit(lambda p: velocity_loss(predict, p, {}, batch, noise, t, guidance))(
        params
    )
    grads = jax.jit(jax.grad(lambda p: loss_fn(p, {}, batch, None, None)[0]))(params)
    grads = to_published(config, grads, "bfl")
    outputs = {
        "x_t": x_t,
        "pred": jax.jit(lambda p: predict(p, {}, x_t, t, batch, guidance))(params),
        "loss_per_sample": loss_per_sample,
        "grad_norms": np.array(
            [np.linalg.norm(grads[name]) for name in call.config["grad_norms_order"]]
        ),
        **{f"grad.{name}": gradient for name, gradient in grads.items()},
    }

    adamw = call.config["optimizer"]
    assert adamw["name"] == "AdamW"
    options = OptimizerConfig(
        name="adamw",
        learning_rate=adamw["lr"],
        b1=adamw["betas"][0],
        b2=adamw["betas"][1],
        eps=adamw["eps"],
        weight_decay=adamw["weight_decay"],
        clip_norm=0.0,
    )
    optimizer = make_optimizer(options, adamw["steps"])
    state = make_train_state(params, optimizer, with_ema=False)
    step, losses = jax.jit(make_gradient_step(loss_fn, optimizer)), []
    for _ in range(adamw["steps"] + 1):  # the last for its loss alone
        state, metrics = step(state, {}, batch, jax.random.key(0))
        losses.append(metrics["loss"])
        outputs.setdefault("loss", metrics["loss"])
        outputs.setdefault("global_grad_norm", metrics["grad_norm"])
    outputs["adamw_losses"] = np.array(losses)
    return outputs
