"""Are two sets of weights the same, whatever layouts they are in? And what is this file?"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from convert_weights.io import AnyComponent, ForeignComponent, OwnComponent, iterate_slices
from convert_weights.layouts import TITLES, guess_preset
from convert_weights.rules import WeightMismatchError, difference_lines
from convert_weights.sources import naming_hints, resolve
from convert_weights.to_jax import Advance, gather
from kontext_jax.models.presets import PRESETS, Config, MMDiTConfig
from kontext_jax.storage.safetensors_reader import dtype_name
from kontext_jax.weights import bundle as checkpoint
from kontext_jax.weights.bundle import KINDS


def open_any(path: str, axes_dim: tuple[int, ...] | None = None) -> dict[str, AnyComponent]:
    """The components at `path` in whatever layout, ours included, by kind."""
    if (Path(path) / checkpoint.MANIFEST).is_file():
        kinds = checkpoint.read_manifest(path)["components"]
        return {kind: OwnComponent(Path(path), kind) for kind in kinds}
    return dict(gather([path], axes_dim).components)


def config_differences(a: Config, b: Config) -> list[str]:
    """Sizes in which two networks of one kind differ, a line each."""
    fields = dataclasses.asdict(b)
    return [
        f"{name} {value!r} and {fields[name]!r}"
        for name, value in dataclasses.asdict(a).items()
        if value != fields[name]
    ]


def compare(
    path_a: str,
    path_b: str,
    axes_dim: tuple[int, ...] | None = None,
    start: Callable[[int], Advance] = lambda total: lambda count: None,
) -> tuple[list[str], list[str]]:
    """All differences between the weights at two paths, and remarks that are none.

    Values are compared bit for bit where dtypes agree, and as float64 where they do not: the same
    values in another dtype are a remark, not a difference.

    Returns:
      (differences, remarks), a line each; no differences means the same weights.
    """
    sides = [open_any(path_a, axes_dim)]
    try:
        sides.append(open_any(path_b, axes_dim))
        return _compare(sides[0], sides[1], start)
    finally:
        for components in sides:
            for component in components.values():
                component.close()


def _compare(
    side_a: dict[str, AnyComponent],
    side_b: dict[str, AnyComponent],
    start: Callable[[int], Advance],
) -> tuple[list[str], list[str]]:
    differences = [
        f"- {TITLES[k]} is only in the first" for k in KINDS if k in side_a.keys() - side_b
    ]
    differences += [
        f"+ {TITLES[k]} is only in the second" for k in KINDS if k in side_b.keys() - side_a
    ]
    remarks: list[str] = []
    shared = [kind for kind in KINDS if kind in side_a and kind in side_b]
    advance = start(sum(i.nbytes for kind in shared for i in side_a[kind].leaves.values()))
    for kind in shared:
        a, b = side_a[kind], side_b[kind]
        shapes_a, shapes_b = ({p: i.shape for p, i in c.leaves.items()} for c in (a, b))
        differences += [f"{kind}: {line}" for line in difference_lines(shapes_a, shapes_b)]
        lines = config_differences(a.config, b.config)
        differences += [f"{kind}: config {line}" for line in lines]
        recast: Counter[str] = Counter()
        for path, layer in iterate_slices(a):
            if shapes_b.get(path) != shapes_a[path]:
                continue
            x, y = a.read_slice(path, layer), b.read_slice(path, layer)
            where = f"{kind}: {path}" if layer is None else f"{kind}: {path} [{layer}]"
            if x.dtype == y.dtype:
                same = bool(
                    np.array_equal(x.reshape(-1).view(np.uint8), y.reshape(-1).view(np.uint8))
                )
            else:
                recast[f"{dtype_name(x.dtype)} and {dtype_name(y.dtype)}"] += 1
                same = bool(np.array_equal(x.astype(np.float64), y.astype(np.float64)))
            if not same:
                gap = np.abs(x.astype(np.float64) - y.astype(np.float64)).max()
                differences.append(f"{where} values differ by up to {gap:.3g}")
            advance(x.nbytes)
        remarks += [f"{kind}: {count} tensors stored as {names}" for names, count in recast.items()]
    return differences, remarks


def describe(
    path: str, axes_dim: tuple[int, ...] | None = None
) -> list[tuple[str, list[tuple[str, Any]]]]:
    """What the weights at `path` are: for each component its title and (label, value) rows."""
    described = []
    components = open_any(str(resolve(path)), axes_dim)
    for kind in KINDS:
        if kind not in components:
            continue
        component = components[kind]
        counts = Counter(dtype_name(info.dtype) for info in component.sources.values())
        largest = max(component.leaves.values(), key=lambda info: info.nbytes)
        rows = [
            ("file", str(component.path)),
            ("layout", component.naming),
            ("model", _model_names(component, path)),
            ("parameters", f"{component.num_parameters:,}"),
            ("tensors", ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))),
            ("bytes", f"{sum(i.nbytes for i in component.sources.values()):,}"),
            ("largest of ours", f"{largest.nbytes / 2**20:,.0f} MiB stacked"),
            ("config", component.config),
        ]
        if isinstance(component, OwnComponent) and component.stays:
            rows.append(("published layouts", f"none: {component.stays}"))
        if component.scaled:
            rows.append(("quantised", "8-bit weights with a scale each (ComfyUI)"))
        if isinstance(component, ForeignComponent) and component.ignored:
            rows.append(("no parameters", ", ".join(component.ignored)))
        rows += [(f"metadata {k}", v[:200]) for k, v in sorted(component.reader.metadata.items())]
        described.append((TITLES[kind], rows))
        component.close()
    return described


def _model_names(component: AnyComponent, path: str) -> str:
    if isinstance(component, OwnComponent):
        return str(checkpoint.read_manifest(path)["preset"])
    fitting = [p.name for p in PRESETS.values() if getattr(p, component.kind) == component.config]
    size = f"the size of {', '.join(fitting)}" if fitting else "not the size of a preset"
    if not isinstance(component.config, MMDiTConfig):
        return size
    try:
        hints = naming_hints(Path(path), {"mmdit": component})
        return f"{guess_preset(component.config, hints, path)} (by its name or shapes), {size}"
    except WeightMismatchError:
        return f"{' or '.join(fitting) or 'a model with guidance'} (shapes cannot tell), {size}"
