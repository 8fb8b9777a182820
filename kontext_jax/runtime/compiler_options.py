"""XLA options of every program of ours, as data: they travel with `compile()`, not in XLA_FLAGS.

A compiler that does not know an option refuses to compile, so an option that another version lacks
is an error and never silence. Each entry says what it is for; docs/performance.md has the figures.
"""

from typing import Literal

Purpose = Literal["train", "sample"]
Options = dict[str, bool | int | str]

PURPOSES = ("train", "sample")

_TPU: Options = {
    # Fusions and Pallas kernels may use this much VMEM, of which a v5p core has 64 MiB (others
    # 128). The default, 16 MiB, is too little for the blocks of attention's backward pass, and
    # costs products their fused reductions; with 64 there is none left for collectives that run
    # beside products.
    "xla_tpu_scoped_vmem_limit_kib": 32768,
}
_TPU_TRAIN: Options = _TPU | {
    # Gathers of parameters and reduce-scatters of gradients run inside the products next to them;
    # without either option of a pair, each of its collectives stops the chip.
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_enable_async_reduce_scatter_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": True,
    # Over all chips of a slice, a gather would be the sum of buffers filled with zeros: twice the
    # bytes, and never beside a product.
    "xla_tpu_prefer_async_allgather_to_allreduce": True,
}
_GPU: Options = {
    # Collectives are started early and waited for late, with products between.
    "xla_gpu_enable_latency_hiding_scheduler": True,
}
_GPU_SAMPLE: Options = _GPU | {
    # Or the kernels of q, k and v are put end to end in every pass, for one product instead of
    # three: 57 MB copied for a few rows of text.
    "xla_gpu_dot_merger_threshold_mb": 0,
}
_OPTIONS: dict[str, dict[Purpose, Options]] = {
    "tpu": {"train": _TPU_TRAIN, "sample": _TPU},
    "gpu": {"train": _GPU, "sample": _GPU_SAMPLE},
    "cpu": {"train": {}, "sample": {}},
}
# Options that replace those above on some chips (names in `runtime.chips`).
_CHIP_OPTIONS: dict[str, dict[Purpose, Options]] = {
    # 128 MiB of VMEM: products find larger tiles, 2.22 ms a single block instead of 2.64. On v5p
    # 64 MiB of 64 are worse than 32.
    "v6e": {"sample": {"xla_tpu_scoped_vmem_limit_kib": 65536}},
}
_ALIASES = {"cuda": "gpu", "rocm": "gpu"}


def options(platform: str, purpose: Purpose, chip: str | None = None) -> Options:
    """What to pass as `compiler_options=` for a program compiled for `platform`.

    Args:
      platform: platform to compile for: "tpu", "gpu" or "cuda", "cpu".
      purpose: "train" for programs with a backward pass, "sample" for all others.
      chip: name of the chip in `runtime.chips`; None where it is not known.

    Raises:
      ValueError: for an unknown platform or purpose.
    """
    platform = _ALIASES.get(platform, platform)
    if platform not in _OPTIONS:
        raise ValueError(f"unknown platform {platform!r}; choose one of {tuple(_OPTIONS)}")
    if purpose not in PURPOSES:
        raise ValueError(f"unknown purpose {purpose!r}; choose one of {PURPOSES}")
    return _OPTIONS[platform][purpose] | _CHIP_OPTIONS.get(chip, {}).get(purpose, {})
