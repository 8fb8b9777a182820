"""XLA options of every program of ours, as data: they travel with `compile()`, not in XLA_FLAGS.

A compiler that does not know an option refuses to compile, so an option that another version lacks
is an error and never silence. Each entry says what it is for; docs/performance.md has the figures.
"""

from typing import Literal

Purpose = Literal["train", "sample"]
Options = dict[str, bool | int | str]

PURPOSES = ("train", "sample")

_TPU: Options = {
    # Fusions and Pallas kernels may use this much of the 128 MiB on a chip at a time. The default,
    # 16 MiB, is too little for the blocks of attention's backward pass.
    "xla_tpu_scoped_vmem_limit_kib": 65536,
}
_GPU: Options = {
    # Collectives are started early and waited for late, with products between.
    "xla_gpu_enable_latency_hiding_scheduler": True,
}
_OPTIONS: dict[str, dict[Purpose, Options]] = {
    "tpu": {"train": _TPU, "sample": _TPU},
    "gpu": {"train": _GPU, "sample": _GPU},
    "cpu": {"train": {}, "sample": {}},
}
_ALIASES = {"cuda": "gpu", "rocm": "gpu"}


def options(platform: str, purpose: Purpose) -> Options:
    """What to pass as `compiler_options=` for a program compiled for `platform`.

    Args:
      platform: that the program is compiled for: "tpu", "gpu" or "cuda", "cpu".
      purpose: "train" for programs with a backward pass, "sample" for all others.

    Raises:
      ValueError: for an unknown platform or purpose.
    """
    platform = _ALIASES.get(platform, platform)
    if platform not in _OPTIONS:
        raise ValueError(f"unknown platform {platform!r}; choose one of {tuple(_OPTIONS)}")
    if purpose not in PURPOSES:
        raise ValueError(f"unknown purpose {purpose!r}; choose one of {PURPOSES}")
    return dict(_OPTIONS[platform][purpose])
