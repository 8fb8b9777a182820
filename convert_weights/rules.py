"""One row per parameter says where it lies in our layout and in the published ones; both ways.

A row names the axes of the published tensor and of ours. Axes that one side keeps together are
tuples: a fused `(heads · channels)` dimension is `("H", "Dh")`. From that the shapes of both sides,
the way there and the way back follow, so a fact stands once and cannot disagree with itself:

    theirs (("H", "P", "R"), "D")   →  ours ("D", "H", ("R", "P"))

splits the rows into heads, P rotary pairs and the R = 2 members of a pair, transposes, and joins
the head's channels again with the members outermost: head-major and half-split in one line. What a
permutation of axes cannot say is a `Part` of a fused tensor, a `Flip` of an axis of two, and a
matrix published as a `OneByOne` convolution.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Shaped

Axes = tuple  # of axis names, or of tuples of them for dimensions that are kept together

# A transposing copy goes by tiles: as many elements along the source's fastest axis, by as many
# along the target's. Smaller ones spend their time in calls, larger ones leave the cache.
TILE_SOURCE, TILE_TARGET = 512, 256


class WeightMismatchError(ValueError):
    """Weights do not fit the model they were taken for; the message lists every difference."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One of several parameters that a published tensor concatenates along `axis`."""

    name: str
    sections: tuple[str, ...]  # the dimension that gives each section's length
    index: int
    axis: int = 0


@dataclasses.dataclass(frozen=True)
class Flip:
    """A published tensor that holds axis `axis` (of two) in the other order."""

    name: str
    axis: str


@dataclasses.dataclass(frozen=True)
class OneByOne:
    """A matrix that is published as a convolution, with two dimensions of 1 behind it."""

    name: str


Name = str | Part | Flip | OneByOne


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter of ours: `path`, its axes, theirs, and its name in each naming.

    `{}` in a name is the layer of a stack; `layers` names the dimension that counts them. `sizes`
    gives lengths of axes that hold for this row only.
    """

    path: str
    ours: Axes
    theirs: Axes
    names: Mapping[str, Name]
    layers: str | None = None
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)


def dense(
    path: str,
    in_axes: Axes | str,
    out_axes: Axes | str,
    names: Mapping[str, Name],
    layers: str | None = None,
    bias: bool = True,
    ours_out: Axes | None = None,
) -> list[Row]:
    """The rows of a linear layer: `kernel` [*in, *out] ↔ `weight` [out, in], and its bias.

    Args:
      path: path of the layer in our tree.
      in_axes: axes of the input in our layout; theirs are the same, fused.
      out_axes: axes of the output, likewise.
      names: names of the layer, without `.weight`, by naming.
      layers: dimension that counts a stack's layers.
      bias: whether there is one.
      ours_out: our order of the output axes, where it is not theirs.
    """
    inner = in_axes if isinstance(in_axes, tuple) else (in_axes,)
    outer = out_axes if isinstance(out_axes, tuple) else (out_axes,)
    ours_outer = outer if ours_out is None else ours_out
    rows = [
        Row(
            f"{path}/kernel",
            inner + ours_outer,
            (outer, inner),
            with_suffix(names, ".weight"),
            layers,
        )
    ]
    if bias:
        rows.append(Row(f"{path}/bias", ours_outer, (outer,), with_suffix(names, ".bias"), layers))
    return rows


def with_suffix(names: Mapping[str, Name], suffix: str) -> dict[str, Name]:
    """`names`, each with `suffix` behind it."""
    return {
        naming: name + suffix
        if isinstance(name, str)
        else dataclasses.replace(name, name=name.name + suffix)
        for naming, name in names.items()
    }


def _atoms(axes: Axes) -> tuple[str, ...]:
    return tuple(a for axis in axes for a in (axis if isinstance(axis, tuple) else (axis,)))


def _shape(axes: Axes, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(
        math.prod(sizes[a] for a in (axis if isinstance(axis, tuple) else (axis,))) for axis in axes
    )


@dataclasses.dataclass(frozen=True)
class Move:
    """One row for one layer in one naming: a region of a published tensor ↔ a slice of a leaf."""

    path: str
    layer: int | None
    source: str
    region: slice | None  # of the source's axis `region_axis`; None is all of it
    region_axis: int
    our_shape: tuple[int, ...]  # of the slice, without the stack's axis
    our_atoms: tuple[int, ...]
    their_atoms: tuple[int, ...]
    permutation: tuple[int, ...]  # their atoms → our atoms
    flip: int | None  # which of their atoms is reversed

    def row_region(self) -> slice | None:
        """The region where it is a range of rows, so that nothing else need be read."""
        return self.region if self.region_axis == 0 else None

    def their_view(
        self, tensor: Shaped[np.ndarray, "..."], has_region: bool = False
    ) -> Shaped[np.ndarray, "..."]:
        """The region of a whole published `tensor` as a view with our atoms as axes."""
        if self.region is not None and not has_region:
            index = (slice(None),) * self.region_axis + (self.region,)
            tensor = tensor[index]
        view = tensor.reshape(self.their_atoms)
        if self.flip is not None:
            view = np.flip(view, self.flip)
        return view.transpose(self.permutation)

    def to_ours(
        self,
        tensor: Shaped[np.ndarray, "..."],
        out: Shaped[np.ndarray, "..."] | None = None,
        has_region: bool = False,
    ) -> Shaped[np.ndarray, "..."]:
        """Our slice, contiguous, from the published tensor (or already its region).

        Args:
          tensor: the published tensor.
          out: array of `our_shape` to fill.
          has_region: `tensor` is the region, not the whole.
        """
        if out is None:
            out = np.empty(self.our_shape, tensor.dtype)
        tiled_copy(out.reshape(self.our_atoms), self.their_view(tensor, has_region))
        return out

    def to_theirs(self, ours: Shaped[np.ndarray, "..."], out: Shaped[np.ndarray, "..."]) -> None:
        """Writes our slice into its region of the published tensor `out`."""
        tiled_copy(self.their_view(out), ours.reshape(self.our_atoms))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows expanded for one config and naming: shapes of both sides and every move between them."""

    leaves: dict[str, tuple[int, ...]]  # our paths → shapes, stacks included
    sources: dict[str, tuple[int, ...]]  # published names → shapes
    moves: tuple[Move, ...]

    def moves_by_source(self) -> dict[str, list[Move]]:
        """The moves that read each published tensor."""
        groups: dict[str, list[Move]] = {name: [] for name in self.sources}
        for move in self.moves:
            groups[move.source].append(move)
        return groups

    def moves_by_leaf(self) -> dict[str, list[Move]]:
        """The moves that fill each leaf, layer by layer."""
        groups: dict[str, list[Move]] = {path: [] for path in self.leaves}
        for move in self.moves:
            groups[move.path].append(move)
        return groups


def make_plan(rows: Iterable[Row], dims: Mapping[str, int], naming: str) -> Plan:
    """Expands `rows` over their layers, and checks that they cover both sides exactly once.

    Args:
      rows: a component's table.
      dims: length of every axis the rows name.
      naming: which of the rows' names to use.
    """
    leaves: dict[str, tuple[int, ...]] = {}
    sources: dict[str, tuple[int, ...]] = {}
    covered: dict[str, list[tuple[int, int]]] = {}
    region_axis: dict[str, int] = {}
    moves = []
    for row in rows:
        sizes = {**dims, **row.sizes}
        our_shape = _shape(row.ours, sizes)
        part_shape = _shape(row.theirs, sizes)
        their_names, our_names = _atoms(row.theirs), _atoms(row.ours)
        if sorted(their_names) != sorted(our_names) or len(set(our_names)) != len(our_names):
            raise ValueError(f"{row.path}: {row.ours} is not a reordering of {row.theirs}")
        count = None if row.layers is None else sizes[row.layers]
        if row.path in leaves:
            raise ValueError(f"{row.path} has two rows")
        leaves[row.path] = our_shape if count is None else (count, *our_shape)
        name = row.names[naming]
        region, axis, flip, shape = None, 0, None, part_shape
        if isinstance(name, Part):
            lengths, axis = [sizes[s] for s in name.sections], name.axis
            start = sum(lengths[: name.index])
            region = slice(start, start + lengths[name.index])
            if part_shape[axis] != lengths[name.index]:
                raise ValueError(f"{row.path}: its section of {name.name} has another length")
            shape = (*part_shape[:axis], sum(lengths), *part_shape[axis + 1 :])
        elif isinstance(name, Flip):
            flip = their_names.index(name.axis)
        elif isinstance(name, OneByOne):
            shape = (*part_shape, 1, 1)
        pattern = name if isinstance(name, str) else name.name
        for layer in [None] if count is None else range(count):
            source = pattern if layer is None else pattern.format(layer)
            if sources.setdefault(source, shape) != shape:
                raise ValueError(f"{row.path}: {source} is {sources[source]} in another row")
            bounds = (0, shape[axis]) if region is None else (region.start, region.stop)
            covered.setdefault(source, []).append(bounds)
            region_axis[source] = axis
            moves.append(
                Move(
                    path=row.path,
                    layer=layer,
                    source=source,
                    region=region,
                    region_axis=axis,
                    our_shape=our_shape,
                    our_atoms=tuple(sizes[a] for a in our_names),
                    their_atoms=tuple(sizes[a] for a in their_names),
                    permutation=tuple(their_names.index(a) for a in our_names),
                    flip=flip,
                )
            )
    for source, intervals in covered.items():
        ends = [0] + [stop for _, stop in sorted(intervals)]
        length = sources[source][region_axis[source]]
        if [start for start, _ in sorted(intervals)] + [length] != ends:
            raise ValueError(f"the rows of {source} overlap or leave a hole: {sorted(intervals)}")
    return Plan(leaves, sources, tuple(moves))


def difference_lines(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Every difference of names and shapes, sorted by name: `-` missing, `+` unexpected."""
    lines = [(name, f"- {name} {list(expected[name])}") for name in expected.keys() - found.keys()]
    lines += [(name, f"+ {name} {list(found[name])}") for name in found.keys() - expected.keys()]
    lines += [
        (name, f"shape {name} expected {list(expected[name])}, found {list(found[name])}")
        for name in expected.keys() & found.keys()
        if tuple(expected[name]) != tuple(found[name])
    ]
    return [line for _, line in sorted(lines, key=lambda item: natural_key(item[0]))]


def natural_key(name: str) -> list:
    """Sorts `blocks.2` before `blocks.10`."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name)]


def tiled_copy(out: Shaped[np.ndarray, "*shape"], source: Shaped[np.ndarray, "*shape"]) -> None:
    """`out[...] = source`, in tiles that stay in cache where the two differ in their fastest axis.

    NumPy's own strided copy of a large transposition misses the cache at every element; going
    through two small contiguous tiles is some five times faster.
    """
    if out.size < TILE_SOURCE * TILE_TARGET // 2:
        np.copyto(out, source)
        return
    rank = out.ndim
    longest = [axis for axis in range(rank) if out.shape[axis] > 1]
    fast_out = min(longest, key=lambda axis: abs(out.strides[axis]))
    fast_in = min(longest, key=lambda axis: abs(source.strides[axis]))
    if fast_out == fast_in or source.shape[fast_in] < 16:
        np.copyto(out, source)
        return
    tile = [1] * rank
    tile[fast_in] = min(TILE_SOURCE, out.shape[fast_in])
    room = TILE_TARGET
    for axis in sorted(longest, key=lambda axis: abs(out.strides[axis])):
        if axis != fast_in and room > 1:
            tile[axis] = min(out.shape[axis], room)
            room //= tile[axis]
    # Read tiles keep the source's fastest axis last, padded so that columns do not share cache
    # sets.
    order = [axis for axis in range(rank) if axis != fast_in] + [fast_in]
    back = np.argsort(order)
    read_shape = [tile[axis] for axis in order]
    read_buffer = np.empty([*read_shape[:-1], read_shape[-1] + 16], out.dtype)
    write_buffer = np.empty(tile, out.dtype)
    for start in np.ndindex(*(-(-n // t) for n, t in zip(out.shape, tile, strict=True))):
        index = tuple(slice(i * t, i * t + t) for i, t in zip(start, tile, strict=True))
        target = out[index]
        read = read_buffer[tuple(slice(0, target.shape[axis]) for axis in order)]
        write = write_buffer[tuple(slice(0, n) for n in target.shape)]
        np.copyto(read, source[index].transpose(order))
        np.copyto(write, read.transpose(back))
        np.copyto(target, write)
