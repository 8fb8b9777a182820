"""The published linear layers of a network, and which kernels of ours each of them holds.

A published layer may be several of our kernels. If they lie side by side in its outputs (BFL's
`qkv` and `linear1`), an adapter of the layer gives each its rows of b, and a to all of them; if
they lie side by side in its inputs (`linear2`), their columns of a, and b to all. Taking an adapter
apart like this is exact. Putting one together from adapters that share nothing is exact too, at the
sum of their ranks: then a and b are block-diagonal, and are recognised as such when read.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Shaped

from convert_weights.lora.table import XLABS, XLABS_SECTIONS
from convert_weights.rules import Flip, Move, Part, Row, make_plan
from convert_weights.tables import TABLES
from kontext_jax.models.presets import Config
from kontext_jax.weights.adapters import LowRank

OUTPUTS, INPUTS = 0, 1  # axes of a published weight [out, in]


class Slot:
    """One kernel of ours in a published layer: its sizes there, and its adapter's way here.

    Attributes:
      path: path of our module.
      has_bias: whether our module has one.
      sizes: published outputs and inputs of the kernel.
      our_shapes: input and output axes of our kernel.
    """

    def __init__(self, row: Row, dims: Mapping[str, int], naming: str, has_bias: bool):
        self.path, self.has_bias = row.path.removesuffix("/kernel"), has_bias
        dims = {**dims, **row.sizes}
        outer, inner = (axes if isinstance(axes, tuple) else (axes,) for axes in row.theirs)
        self.sizes = tuple(math.prod(dims[axis] for axis in axes) for axes in (outer, inner))
        name = row.names[naming]
        b_name = Flip("b", name.axis) if isinstance(name, Flip) else "b"
        self._rows = {
            "a": Row("a", (*inner, "rank"), ("rank", inner), {"": "a"}),
            "b": Row("b", ("rank", *row.ours[len(inner) :]), (outer, "rank"), {"": b_name}),
        }
        ours = tuple(
            math.prod(dims[atom] for atom in (axis if isinstance(axis, tuple) else (axis,)))
            for axis in row.ours
        )
        self.our_shapes = ours[: len(inner)], ours[len(inner) :]
        self._dims = dims
        self._moves: dict[tuple[str, int], Move] = {}

    def _move(self, part: str, rank: int) -> Move:
        if (part, rank) not in self._moves:
            plan = make_plan([self._rows[part]], {**self._dims, "rank": rank}, "")
            (self._moves[part, rank],) = plan.moves
        return self._moves[part, rank]

    def a_to_ours(self, a: Shaped[np.ndarray, "rank inputs"]) -> Shaped[np.ndarray, "*inputs rank"]:
        """[rank, in] → [*in, rank]."""
        return self._move("a", a.shape[0]).to_ours(a)

    def b_to_ours(
        self, b: Shaped[np.ndarray, "outputs rank"]
    ) -> Shaped[np.ndarray, "rank *outputs"]:
        """[out, rank] → [rank, *out]; a bias is a b of rank 1."""
        return self._move("b", b.shape[1]).to_ours(b)

    def a_to_theirs(
        self, a: Shaped[np.ndarray, "*inputs rank"]
    ) -> Shaped[np.ndarray, "rank inputs"]:
        """[*in, rank] → [rank, in]."""
        out = np.empty((a.shape[-1], self.sizes[INPUTS]), a.dtype)
        self._move("a", a.shape[-1]).to_theirs(a, out)
        return out

    def b_to_theirs(
        self, b: Shaped[np.ndarray, "rank *outputs"]
    ) -> Shaped[np.ndarray, "outputs rank"]:
        """[rank, *out] → [out, rank]."""
        out = np.empty((self.sizes[OUTPUTS], b.shape[0]), b.dtype)
        self._move("b", b.shape[0]).to_theirs(b, out)
        return out


@dataclasses.dataclass(frozen=True)
class PublishedLayer:
    """One linear layer by its published name; `axis` is the one that its slots divide."""

    name: str
    naming: str
    layer: int | None  # of our stack
    slots: tuple[Slot, ...]
    axis: int

    @property
    def sizes(self) -> tuple[int, int]:
        """Outputs and inputs."""
        sizes = list(self.slots[0].sizes)
        sizes[self.axis] = sum(slot.sizes[self.axis] for slot in self.slots)
        outputs, inputs = sizes
        return outputs, inputs

    def sections(self) -> Iterator[tuple[Slot, slice]]:
        """Each slot and its range on the divided axis."""
        start = 0
        for slot in self.slots:
            stop = start + slot.sizes[self.axis]
            yield slot, slice(start, stop)
            start = stop

    def split(
        self,
        a: Float[np.ndarray, "rank inputs"],
        b: Float[np.ndarray, "outputs rank"],
        factor: float,
        bias: Float[np.ndarray, " outputs"] | None,
    ) -> dict[str, LowRank]:
        """An adapter of this layer as adapters of our modules, by path.

        Args:
          a: float32 [rank, in].
          b: float32 [out, rank].
          factor: alpha / rank.
          bias: float32 [out] or None.
        """
        # Which slots each of the `rank` products reaches; more than one where they share a factor.
        divided = b if self.axis == OUTPUTS else a.T
        reaches = np.array([divided[section].any(axis=0) for _, section in self.sections()])
        is_block_diagonal = len(self.slots) > 1 and (reaches.sum(axis=0) == 1).all()
        changes = {}
        for (slot, section), own in zip(self.sections(), reaches, strict=True):
            kept = own if is_block_diagonal else np.ones_like(own)
            slot_bias = None
            if bias is not None and slot.has_bias:
                part = bias[section] if self.axis == OUTPUTS else bias
                slot_bias = slot.b_to_ours(np.ascontiguousarray(part[:, None]))[0]
            if not kept.any() and slot_bias is None:
                continue
            slot_a, slot_b = a[kept], b[:, kept]
            if self.axis == OUTPUTS:
                slot_b = slot_b[section]
            else:
                slot_a = slot_a[:, section]
            changes[slot.path] = LowRank(
                slot.a_to_ours(np.ascontiguousarray(slot_a)),
                slot.b_to_ours(np.ascontiguousarray(slot_b)),
                factor,
                slot_bias,
            )
        return changes

    def join(
        self, changes: Mapping[str, LowRank]
    ) -> (
        tuple[
            Float[np.ndarray, "rank inputs"],
            Float[np.ndarray, "outputs rank"],
            float,
            Float[np.ndarray, " outputs"] | None,
        ]
        | None
    ):
        """Inverse of `split`: (a, b, factor, bias), or None if no slot has an adapter.

        Modules that share a, or b where the slots divide the inputs, keep their rank; others are
        put side by side.
        """
        present = [(s, part, changes[s.path]) for s, part in self.sections() if s.path in changes]
        if not present:
            return None
        num_out, num_in = self.sizes
        factors = {change.factor for _, _, change in present}
        factor = factors.pop() if len(factors) == 1 else 1.0
        pairs = []
        for slot, _, change in present:
            b = slot.b_to_theirs(change.b)
            if change.factor != factor:
                b = b * np.float32(change.factor)
            pairs.append((slot.a_to_theirs(change.a), b))
        common = [pair[self.axis] for pair in pairs]  # a where the outputs are divided
        is_shared = all(np.array_equal(common[0], other) for other in common)
        ranks = [len(a) for a, _ in pairs]
        rank = ranks[0] if is_shared else sum(ranks)
        a, b = np.zeros((rank, num_in), np.float32), np.zeros((num_out, rank), np.float32)
        start = 0
        for (_, part, _), (slot_a, slot_b) in zip(present, pairs, strict=True):
            own = slice(None) if is_shared else slice(start, start + len(slot_a))
            start += len(slot_a)
            if self.axis == OUTPUTS:
                a[own], b[part, own] = slot_a, slot_b
            else:
                a[own, part], b[:, own] = slot_a, slot_b
        bias = None
        if any(change.bias is not None for _, _, change in present):
            bias = np.zeros(num_out, np.float32)
            for slot, part, change in present:
                if change.bias is not None:
                    values = slot.b_to_theirs(change.bias[None])[:, 0]
                    bias[part if self.axis == OUTPUTS else slice(None)] = values
        return a, b, factor, bias


def published_layers(kind: str, config: Config) -> dict[str, PublishedLayer]:
    """Every linear layer of a network by its name in every naming, in the tables' order."""
    table = TABLES[kind]
    rows, dims = table.rows(config), table.axis_sizes(config)
    paths = {row.path for row in rows}
    kernels = [row for row in rows if row.path.endswith("/kernel")]
    layers: dict[str, PublishedLayer] = {}
    for naming in table.NAMINGS:
        slots: dict[str, list[Slot]] = {}
        stacks: dict[str, int | None] = {}
        axes: dict[str, int] = {}
        for row in kernels:
            name = row.names[naming]
            pattern = name if isinstance(name, str) else name.name
            pattern = pattern.removesuffix(".weight")
            has_bias = row.path.removesuffix("kernel") + "bias" in paths
            slots.setdefault(pattern, []).append(Slot(row, dims, naming, has_bias))
            stacks[pattern] = None if row.layers is None else dims[row.layers]
            axes[pattern] = name.axis if isinstance(name, Part) else OUTPUTS
        for pattern, members in slots.items():
            _add_layers(layers, pattern, naming, stacks[pattern], members, axes[pattern])
        if kind == "mmdit" and naming == "bfl":
            for pattern, bfl in XLABS.items():
                members = slots[bfl][: XLABS_SECTIONS.get(pattern)]
                _add_layers(layers, pattern, "xlabs", stacks[bfl], members, axes[bfl])
    return layers


def _add_layers(
    layers: dict[str, PublishedLayer],
    pattern: str,
    naming: str,
    count: int | None,
    slots: Sequence[Slot],
    axis: int,
) -> None:
    for layer in [None] if count is None else range(count):
        name = pattern if layer is None else pattern.format(layer)
        layers[name] = PublishedLayer(name, naming, layer, tuple(slots), axis)


@dataclasses.dataclass(frozen=True)
class PublishedLeaf:
    """One parameter by its published name."""

    name: str
    naming: str
    move: Move

    @property
    def shape(self) -> tuple[int, ...]:
        return (math.prod(self.move.their_atoms),)

    def to_theirs(self, ours: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """Our slice in the published layout."""
        out = np.empty(self.shape, ours.dtype)
        self.move.to_theirs(ours, out)
        return out


def replaceable_leaves(kind: str, config: Config) -> dict[str, PublishedLeaf]:
    """Every parameter that an adapter may replace outright, by its name in every naming.

    These are the scales of the transformer's q and k norms, as BFL's control LoRAs have them.
    """
    if kind != "mmdit":
        return {}
    table = TABLES[kind]
    rows = [row for row in table.rows(config) if row.path.endswith("_norm/scale")]
    return {
        move.source: PublishedLeaf(move.source, naming, move)
        for naming in table.NAMINGS
        for move in make_plan(rows, table.axis_sizes(config), naming).moves
    }
