"""Text and image tokens on the devices among which an example's tokens are split.

    streams    txt [B, T, D] and img [B, L, D], each padded so that all parts are equally long
    joined     [txt_0 ‖ img_0 ‖ txt_1 ‖ img_1 ‖ …], part after part
    attention  over the tokens without the padding

A plain [txt ‖ img] would begin in the middle of some device's image; joined part by part, nothing
moves between devices when streams are put together or taken apart. Attention sees no order of
tokens but that of their positions, which are joined alike. With one part nothing is padded or
reordered.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kontext_jax.ops.attention import Backend, attention
from kontext_jax.runtime import sharding
from kontext_jax.runtime.sharding import constrain
from kontext_jax.types import Array, Float, Shaped


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """How many tokens each stream has, and in how many parts they lie."""

    num_txt: int
    num_img: int
    parts: int = 1

    @classmethod
    def on_mesh(cls, num_txt: int, num_img: int) -> "TokenLayout":
        """For the mesh that is active while tracing."""
        return cls(num_txt, num_img, sharding.num_parts("stream"))

    @property
    def has_padding(self) -> bool:
        return self.num_txt % self.parts > 0 or self.num_img % self.parts > 0

    def pad(self, x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
        """A stream with zeros behind it, up to a multiple of the parts."""
        missing = -x.shape[axis] % self.parts
        padding = [(0, missing if i == axis % x.ndim else 0) for i in range(x.ndim)]
        return jnp.pad(x, padding) if missing else x

    def lay(self, x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
        """A plain [txt ‖ img] padded and joined."""
        txt, img = jnp.split(x, [self.num_txt], axis)
        return self.join(self.pad(txt, axis), self.pad(img, axis), axis)

    def join(
        self, txt: Shaped[Array, "..."], img: Shaped[Array, "..."], axis: int
    ) -> Shaped[Array, "..."]:
        """Both padded streams as one."""
        axis %= txt.ndim
        both = jnp.concatenate([self._by_part(x, axis) for x in (txt, img)], axis + 1)
        return _merge(both, axis)

    def separate(
        self, x: Shaped[Array, "..."], axis: int
    ) -> tuple[Shaped[Array, "..."], Shaped[Array, "..."]]:
        """The padded streams of a joined one."""
        axis %= x.ndim
        txt_of_part = -(-self.num_txt // self.parts)
        txt, img = jnp.split(self._by_part(x, axis), [txt_of_part], axis + 1)
        return _merge(txt, axis), _merge(img, axis)

    def cut(self, x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
        """A joined stream without its padding and then plain; as it is if it has none."""
        if not self.has_padding:
            return x
        streams = zip(self.separate(x, axis), (self.num_txt, self.num_img), strict=True)
        return jnp.concatenate([jax.lax.slice_in_dim(s, 0, n, axis=axis) for s, n in streams], axis)

    def uncut(self, x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
        """Inverse of `cut`, with zeros in place of the padding."""
        return self.lay(x, axis) if self.has_padding else x

    def _by_part(self, x: jax.Array, axis: int) -> jax.Array:
        """[…, S, …] → […, parts, S / parts, …]."""
        shape = (self.parts, x.shape[axis] // self.parts)
        return x.reshape(*x.shape[:axis], *shape, *x.shape[axis + 1 :])


def _merge(x: jax.Array, axis: int) -> jax.Array:
    """[…, parts, S / parts, …] → […, S, …]."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def attend(
    q: Float[Array, "B H S Dh"],
    k: Float[Array, "B H S Dh"],
    v: Float[Array, "B H S Dh"],
    layout: TokenLayout,
    backend: Backend,
    scale: float | None = None,
) -> Float[Array, "B H S Dh"]:
    """Attention over joined streams [B, H, S, Dh] whose tokens are split, as is the result.

    All-to-all (Ulysses, arXiv:2309.14509): each device gets some of the heads with all their
    tokens. Where the heads cannot be split so far, it gets all keys and values for its own queries.

    Raises:
      ValueError: the mesh's `tensor` does not divide the heads.
    """
    num_heads, parts = q.shape[1], sharding.num_parts("heads")
    if num_heads % parts:
        raise ValueError(
            f"attention has {num_heads} heads, which the mesh's tensor = {parts} does not divide; "
            "set it (--config.mesh.tensor, --mesh tensor=N) to a divisor, or use context"
        )
    by_heads = sharding.attends_by_heads(num_heads)

    def whole(x: jax.Array) -> jax.Array:
        # Pinned on both sides, or what made x would move to this one: its other inputs would travel
        # as well, and x in float32.
        x = constrain(x, "batch", "heads", "tokens", "head_dim")
        heads = "attended_heads" if by_heads else "heads"
        return layout.cut(constrain(x, "batch", heads, None, "head_dim"), 2)

    if by_heads:
        attended = layout.uncut(attention(*map(whole, (q, k, v)), backend=backend, scale=scale), 2)
        attended = constrain(attended, "batch", "attended_heads", None, "head_dim")
    else:
        attended = attention(q, whole(k), whole(v), backend=backend, scale=scale)
    return constrain(attended, "batch", "heads", "tokens", "head_dim")
