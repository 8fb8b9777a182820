"""The rectified-flow transformer of FLUX.1 and FLUX.1 Kontext: velocity from tokens and time.

    vec      = time_in(1000·t) + guidance_in(1000·guidance) + vector_in(CLIP pooled)
    double   txt and img have weights of their own and attend together, text first
    single   one stream [txt ‖ img]; attention and MLP side by side from one norm
    velocity = Linear((1 + scale)·LN(img) + shift)

Blocks are scanned, their parameters stacked on axis 0 (docs/architecture.md), or listed where that
is faster (`block_stack`). Modulation stands outside the stack and takes times of any leading shape,
so that a sampling run computes it for all its steps in one product.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from kontext_jax.batches import Conditioning
from kontext_jax.models.block_stack import BlockForm, make_stack, unstack
from kontext_jax.models.layers import (
    Dense,
    MLPEmbedder,
    Modulation,
    RMSFactors,
    gated,
    modulated_norm,
    scale_time,
    timestep_embedding,
)
from kontext_jax.models.parameter_axes import BLOCK_STACKS
from kontext_jax.models.presets import MMDiTConfig
from kontext_jax.models.token_layout import TokenLayout, attend
from kontext_jax.numerics import EXACT, Numerics
from kontext_jax.ops.attention import Backend, keeps_attention
from kontext_jax.ops.rope import Rotation, full_width, rotate, scaled
from kontext_jax.runtime.sharding import constrain
from kontext_jax.types import Array, Float, Params, RandomKey, VelocityFn

Remat = Literal["none", "full", "save_attention", "save_outputs", "save_qkv", "save_products"]

# Policy → the products of a block that are kept for the backward pass besides the block's input.
# All but "none" (everything is kept) and "full" also keep what attention needs of its forward run.
REMAT_POLICIES: dict[str, tuple[str, ...] | None] = {
    "none": None,
    "full": None,
    "save_attention": (),
    "save_outputs": ("block_out",),
    "save_qkv": ("qkv", "block_out"),
    "save_products": ("qkv", "block_out", "mlp"),
}


class ModulationVectors(NamedTuple):
    """Shifts, scales and gates of the whole network at some times; leaves lead with [..., B]."""

    double_img: jax.Array  # [..., B, N, 6, D]
    double_txt: jax.Array  # [..., B, N, 6, D]
    single: jax.Array  # [..., B, N, 3, D]
    final: jax.Array  # [..., B, 2, D]


class Heads(NamedTuple):
    """What a stream brings to attention, with the norm and rotation of q and k still to be done.

    Tokens are the last axis but one of every field, so that streams can be joined along it.
    """

    q: jax.Array  # [B, H, S, Dh], as k and v
    k: jax.Array
    v: jax.Array
    q_gain: jax.Array  # [B, H, S, 1]
    k_gain: jax.Array
    q_rotation: Rotation  # two of [(B,) S, Dh]
    k_rotation: Rotation

    def attend(self, layout: TokenLayout, backend: Backend) -> Float[Array, "B H S Dh"]:
        """[B, H, S, Dh]; the scores' scale is part of q's rotation."""
        q = rotate(self.q, self.q_gain, self.q_rotation)
        k = rotate(self.k, self.k_gain, self.k_rotation)
        return attend(q, k, self.v, layout, backend, scale=1.0)


class _Projections(nn.Module):
    """The projections of one stream to heads and back."""

    config: MMDiTConfig
    use_bias: bool
    dtype: Any

    def setup(self):
        heads = (self.config.num_heads, self.config.head_dim)
        project = functools.partial(Dense, heads, use_bias=self.use_bias, dtype=self.dtype)
        self.q, self.k, self.v = project(), project(), project()
        self.query_norm, self.key_norm = RMSFactors(), RMSFactors()

    def heads(self, x: jax.Array, pe: Rotation) -> Heads:
        q, k, v = (
            constrain(
                checkpoint_name(jnp.swapaxes(project(x), 1, 2), "qkv"),
                *("batch", "heads", "tokens", "head_dim"),
            )
            for project in (self.q, self.k, self.v)
        )
        q_gain, q_scale = self.query_norm(q)
        k_gain, k_scale = self.key_norm(k)
        q_scale = q_scale * self.config.head_dim**-0.5
        return Heads(q, k, v, q_gain, k_gain, scaled(pe, q_scale), scaled(pe, k_scale))

    def out_projection(self, use_bias: bool) -> Dense:
        """From heads [B, S, H, Dh] back to [B, S, D]."""
        return Dense((self.config.hidden_size,), 2, use_bias=use_bias, dtype=self.dtype)


class DoubleStreamAttention(_Projections):
    """One stream's side of a double block's attention."""

    def setup(self):
        super().setup()
        self.proj = self.out_projection(use_bias=True)

    def project(self, attended: Float[Array, "B H S Dh"]) -> Float[Array, "B S D"]:
        """[B, H, S, Dh] → [B, S, D]."""
        return self.proj(jnp.swapaxes(attended, 1, 2))


class MLP(nn.Module):
    """Linear, GELU (tanh), linear: [B, S, D] → [B, S, D]."""

    config: MMDiTConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        x = _mlp_hidden(Dense((self.config.mlp_dim,), dtype=self.dtype, name="in_layer")(x))
        return Dense((self.config.hidden_size,), dtype=self.dtype, name="out_layer")(x)


def _mlp_hidden(x: jax.Array) -> jax.Array:
    return nn.gelu(constrain(checkpoint_name(x, "mlp"), "batch", "tokens", "mlp"))


def _stream(x: jax.Array) -> jax.Array:
    """Tokens [B, S, D] between blocks, pinned, or the partitioner gathers the batch everywhere."""
    return constrain(x, "batch", "stream", "width")


class DoubleBlock(nn.Module):
    """Text and image with separate weights, attending over both (BFL `DoubleStreamBlock`)."""

    config: MMDiTConfig
    dtype: Any
    attention_backend: Backend

    def setup(self):
        stream = functools.partial(
            DoubleStreamAttention, self.config, self.config.qkv_bias, self.dtype
        )
        self.img_attn, self.txt_attn = stream(), stream()
        self.img_mlp, self.txt_mlp = MLP(self.config, self.dtype), MLP(self.config, self.dtype)

    def __call__(
        self,
        carry: tuple[Float[Array, "B L D"], Float[Array, "B T D"]],
        img_mod: Float[Array, "B 6 D"],
        txt_mod: Float[Array, "B 6 D"],
        pe: Rotation,
        layout: TokenLayout,
    ) -> tuple[tuple[Float[Array, "B L D"], Float[Array, "B T D"]], None]:
        """carry (img, txt); img_mod, txt_mod [B, 6, D]."""
        img, txt = (_stream(x) for x in carry)
        txt_pe, img_pe = zip(*(layout.separate(x, axis=-2) for x in pe), strict=True)
        img_mod, txt_mod = (jnp.moveaxis(mod, 1, 0) for mod in (img_mod, txt_mod))
        txt_heads = self.txt_attn.heads(modulated_norm(txt, txt_mod[0], txt_mod[1]), txt_pe)
        img_heads = self.img_attn.heads(modulated_norm(img, img_mod[0], img_mod[1]), img_pe)
        heads = jax.tree.map(functools.partial(layout.join, axis=-2), txt_heads, img_heads)
        attended = heads.attend(layout, self.attention_backend)
        txt_attended, img_attended = layout.separate(attended, axis=2)
        txt = _finish_stream(txt, txt_attended, txt_mod, self.txt_attn, self.txt_mlp)
        img = _finish_stream(img, img_attended, img_mod, self.img_attn, self.img_mlp)
        return (img, txt), None


def _finish_stream(x, attended, mod, attn, mlp):
    x = _stream(x + gated(mod[2], checkpoint_name(attn.project(attended), "block_out")))
    mlp_out = checkpoint_name(mlp(modulated_norm(x, mod[3], mod[4])), "block_out")
    return _stream(x + gated(mod[5], mlp_out))


class SingleBlock(_Projections):
    """Attention and MLP side by side over one stream (BFL `SingleStreamBlock`)."""

    attention_backend: Backend

    def setup(self):
        super().setup()
        self.mlp_in = Dense((self.config.mlp_dim,), dtype=self.dtype)
        self.attn_out = self.out_projection(use_bias=False)
        self.mlp_out = Dense((self.config.hidden_size,), dtype=self.dtype)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        mod: Float[Array, "B 3 D"],
        pe: Rotation,
        layout: TokenLayout,
    ) -> tuple[Float[Array, "B S D"], None]:
        """x [B, S, D]; mod [B, 3, D]."""
        x = _stream(x)
        normed = modulated_norm(x, mod[:, 0], mod[:, 1])
        attended = self.heads(normed, pe).attend(layout, self.attention_backend)
        # Two products added: the published single product over [attention ‖ mlp] runs slower.
        attn_out = self.attn_out(jnp.swapaxes(attended, 1, 2))
        # Sum, gate and residual join the smaller product: the larger one would run at 3/4 speed.
        mlp_out = lax.optimization_barrier(self.mlp_out(_mlp_hidden(self.mlp_in(normed))))
        out = checkpoint_name(attn_out + mlp_out, "block_out")
        return _stream(x + gated(mod[:, 2], out)), None


class MMDiT(nn.Module):
    """The transformer of FLUX.1 (BFL `Flux`).

    Attributes:
      dtype: compute dtype; parameters may be stored in another.
      attention_backend: see `kontext_jax.ops.attention`.
      remat: what a block keeps for the backward pass, which recomputes the rest: "none" (of it
        recomputed), "full" (recomputed from the block's input), or a policy of `REMAT_POLICIES`
        between the two, from little memory to much.
      zero_init: start training with every block the identity and the velocity zero, as DiT does;
        False draws modulation and output as well, so that an untrained network answers its inputs.
      block_form: "scan" for stacked parameters, "list" for those of `unstacked`.
    """

    config: MMDiTConfig
    dtype: Any = jnp.float32
    attention_backend: Backend = "auto"
    remat: Remat = "none"
    zero_init: bool = True
    block_form: BlockForm = "scan"

    def setup(self):
        config, dtype = self.config, self.dtype
        width = config.hidden_size
        self.img_in, self.txt_in = Dense((width,), dtype=dtype), Dense((width,), dtype=dtype)
        self.time_in, self.vector_in = MLPEmbedder(width, dtype), MLPEmbedder(width, dtype)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(width, dtype)
        self.double_mod = _DoubleModulation(config.depth, dtype, self.zero_init)
        self.single_mod = Modulation(config.depth_single_blocks, 3, dtype, self.zero_init)
        self.final_mod = Modulation(None, 2, dtype, self.zero_init)
        backend = self.attention_backend
        double, single = (config, dtype, backend), (config, True, dtype, backend)
        self.double_blocks = self._stack(DoubleBlock, double, config.depth, 2)
        self.single_blocks = self._stack(SingleBlock, single, config.depth_single_blocks, 1)
        self.final_layer = Dense(
            (config.out_channels,),
            dtype=dtype,
            kernel_init=nn.initializers.zeros if self.zero_init else None,
        )

    def _stack(
        self, block: type[nn.Module], arguments: tuple[Any, ...], length: int, num_layered: int
    ) -> nn.Module:
        block = self._rematerialised(block)
        return make_stack(self.block_form, block, arguments, length, num_layered, num_shared=2)

    def _rematerialised(self, block: type[nn.Module]) -> type[nn.Module]:
        if self.remat not in REMAT_POLICIES:
            raise ValueError(
                f"unknown remat policy {self.remat!r}; choose one of {tuple(REMAT_POLICIES)}"
            )
        if self.remat == "none":
            return block
        return nn.remat(block, prevent_cse=False, policy=_remat_policy(self.remat))

    def __call__(
        self,
        img: Float[Array, "B L inputs"],
        txt: Float[Array, "B T features"],
        vec: Float[Array, "B pooled"],
        t: Float[Array, " B"],
        guidance: Float[Array, " B"] | None,
        pe: Float[Array, "... S half"],
    ) -> Float[Array, "B L C"]:
        """Velocity of all image tokens: [B, L, C]. Arguments as in `modulation` and `denoise`."""
        return self.denoise(img, txt, pe, self.modulation(t, guidance, vec))

    def modulation(
        self,
        t: Float[Array, "... B"],
        guidance: Float[Array, " B"] | None,
        vec: Float[Array, "B pooled"],
        timestep_rounding: Literal["none", "bfl", "diffusers"] = "none",
    ) -> ModulationVectors:
        """Everything the blocks need to know of time, guidance and pooled text.

        Args:
          t: [..., B] in [0, 1], not multiplied by 1000; leading axes are sampling steps.
          guidance: [B], or None for a model that takes none.
          vec: [B, vec_in_dim] pooled CLIP features.
          timestep_rounding: see `kontext_jax.numerics`.

        Raises:
          ValueError: if guidance is given to a model that takes none, or missing where needed.
        """
        if self.config.guidance_embed and guidance is None:
            raise ValueError(
                "this model was trained with guidance as an input (guidance_embed=True); "
                "pass guidance, for instance 2.5"
            )
        if not self.config.guidance_embed and guidance is not None:
            raise ValueError(
                "this model takes no guidance (guidance_embed=False, as FLUX.1 schnell); pass None"
            )
        summed = self.time_in(timestep_embedding(scale_time(t, timestep_rounding, self.dtype)))
        if guidance is not None:
            # diffusers' detour through its scheduler is for t alone.
            is_exact = timestep_rounding == "none"
            scaled = scale_time(guidance, "none" if is_exact else "bfl", self.dtype)
            summed = summed + self.guidance_in(timestep_embedding(scaled))
        summed = summed + self.vector_in(vec)
        double_img, double_txt = self.double_mod(summed)
        single, final = self.single_mod(summed), self.final_mod(summed)
        return ModulationVectors(double_img, double_txt, single, final)

    def denoise(
        self,
        img: Float[Array, "B L inputs"],
        txt: Float[Array, "B T features"],
        pe: Float[Array, "... S half"],
        modulation: ModulationVectors,
    ) -> Float[Array, "B L C"]:
        """Velocity of all image tokens, given the modulation of their time: [B, L, C].

        Args:
          img: [B, L, in_channels], target tokens first, then those of the references.
          txt: [B, T, context_in_dim] T5 features.
          pe: rotary table [2, T + L, Dh/2] or [B, 2, T + L, Dh/2], text first.
          modulation: result of `modulation`, leaves [B, …].

        Raises:
          ValueError: if pe does not have one position per token.
        """
        num_img = img.shape[1]
        carry, pe, layout = self._enter(img, txt, pe)
        double = modulation.double_img, modulation.double_txt
        (img, txt), _ = self.double_blocks(carry, *double, pe, layout)
        stream = layout.join(txt, img, axis=1)
        stream, _ = self.single_blocks(stream, modulation.single, pe, layout)
        _, img = layout.separate(stream, axis=1)
        final = modulation.final
        velocity = self.final_layer(modulated_norm(img, final[:, 0], final[:, 1]))
        return velocity[:, :num_img]

    def _enter(self, img: jax.Array, txt: jax.Array, pe: jax.Array):
        """What the blocks take: ((img, txt), rotations, layout)."""
        num_txt, num_img = txt.shape[1], img.shape[1]
        if pe.shape[-2] != num_txt + num_img:
            raise ValueError(
                f"pe has {pe.shape[-2]} positions, but there are {num_txt} text and "
                f"{num_img} image tokens"
            )
        layout = TokenLayout.on_mesh(num_txt, num_img)
        batch_axes = ("batch",) * (pe.ndim - 3)
        names = (*batch_axes, "tokens", None)
        rotations = tuple(constrain(layout.lay(x, axis=-2), *names) for x in full_width(pe))
        img, txt = (_stream(layout.pad(x, axis=1)) for x in (img, txt))
        return (_stream(self.img_in(img)), _stream(self.txt_in(txt))), rotations, layout


def _remat_policy(name: Remat) -> Callable[..., bool] | None:
    if name == "full":
        return None
    policies = jax.checkpoint_policies
    kept: Any = REMAT_POLICIES[name]
    products = policies.save_only_these_names(*kept)
    return policies.save_from_both_policies(keeps_attention, products)


class _DoubleModulation(nn.Module):
    num_layers: int
    dtype: Any
    zero_init: bool

    @nn.compact
    def __call__(self, vec):
        make = functools.partial(Modulation, self.num_layers, 6, self.dtype, self.zero_init)
        return make(name="img")(vec), make(name="txt")(vec)


def init_params(model: MMDiT, key: RandomKey) -> Params:
    """Fresh float32 parameters as a plain nested dict; `jax.eval_shape` it for shapes alone."""
    config = model.config
    guidance = jnp.ones((1,)) if config.guidance_embed else None
    return model.init(
        key,
        jnp.zeros((1, 1, config.in_channels)),
        jnp.zeros((1, 1, config.context_in_dim)),
        jnp.zeros((1, config.vec_in_dim)),
        jnp.zeros((1,)),
        guidance,
        jnp.zeros((2, 2, config.head_dim // 2)),
    )["params"]


def unstacked(params: Params) -> Params:
    """Parameters for `block_form` "list", of stacked ones; `checkpoint.Listed` loads them so."""
    return {name: unstack(tree) if name in BLOCK_STACKS else tree for name, tree in params.items()}


def block_form_for(platform: str) -> BlockForm:
    """The form that samples fastest on a platform ("tpu", "gpu", "cuda", "cpu")."""
    return "list" if platform in ("gpu", "cuda") else "scan"


def make_velocity_fn(
    model: MMDiT, params: Params, cond: Conditioning, lora: Params | None = None
) -> VelocityFn:
    """The network as a function of target tokens and time alone.

    References are put after the target on the sequence axis and their predictions cut off. The
    step input is one entry of `prepare_steps`; None computes the modulation from t, unrounded.

    Args:
      lora: adapters to apply beside the parameters, of `models.lora.scaled`.
    """
    variables = {"params": params} | ({} if lora is None else {"lora": lora})

    def velocity_fn(x_t, t, step_input):
        if step_input is None:
            step_input = model.apply(variables, t, cond.guidance, cond.vec, method="modulation")
        img = x_t
        if cond.ctx is not None:
            img = jnp.concatenate([x_t, cond.ctx.astype(x_t.dtype)], axis=1)
        velocity = model.apply(variables, img, cond.txt, cond.pe, step_input, method="denoise")
        return velocity[:, : x_t.shape[1]]

    return velocity_fn


def prepare_steps(
    model: MMDiT,
    params: Params,
    cond: Conditioning,
    timesteps: Float[Array, " times"],
    numerics: Numerics = EXACT,
) -> ModulationVectors:
    """Modulation of all steps of a run in one product, for `euler_sample`'s step_inputs.

    Args:
      timesteps: float32 [N + 1]; the last is where the run ends and needs none.

    Returns:
      Leaves lead with [N, B].
    """
    t = jnp.asarray(timesteps, jnp.float32)[:-1, None]
    t = jnp.broadcast_to(t, (t.shape[0], cond.vec.shape[0]))
    vectors: Any = model.apply(
        {"params": params},
        t,
        cond.guidance,
        cond.vec,
        numerics.timestep_rounding,
        method="modulation",
    )
    return vectors
