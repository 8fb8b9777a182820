"""What one JAX device can do: arithmetic, memory and links, by chip.

All nominal, from the makers' own tables: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e), NVIDIA's
data sheets (A100 80 GB SXM, H100 SXM and PCIe, H200 SXM). Links are of all a chip's ports together,
in one direction; a ring along one axis of a TPU's torus reaches a half or a third of that. DCN is
the network between slices or nodes, a chip's share of its host's; for GPUs that of NVIDIA's own
DGX (one 200 or 400 Gb/s adapter for each GPU).
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device.

    Attributes:
      name: first word of a topology's name ("v5p:4x4x4").
      device_kinds: beginnings of `jax.Device.device_kind`.
      bf16_flops: dense bfloat16 FLOP/s.
      hbm_bytes: size of the device memory.
      hbm_bytes_per_s: bandwidth of that memory.
      link_bytes_per_s: bandwidth of ICI or NVLink, all ports, one direction; 0 without any.
      dcn_bytes_per_s: bandwidth of the network beyond a slice or node, one direction.
      clock_hz: rate of the cycles in a TPU program's text; None for GPUs, which have none there.
    """

    name: str
    device_kinds: tuple[str, ...]
    bf16_flops: float
    hbm_bytes: float
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    dcn_bytes_per_s: float
    clock_hz: float | None = None

    @property
    def platform(self) -> str:
        """Name of the plug-in that compiles for it: "tpu" or "cuda"."""
        return "cuda" if self.clock_hz is None else "tpu"


# The first whose device kind matches counts, so the special ones come first.
_CHIPS = (
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 819e9, 200e9, 3.125e9, 1.5e9),
    Chip("v5p", ("TPU v5",), 459e12, 95 * GIB, 2765e9, 600e9, 6.25e9, 1.75e9),
    Chip("v6e", ("TPU v6",), 918e12, 32 * GIB, 1640e9, 448e9, 12.5e9, 1.75e9),
    Chip("v4i", ("TPU v4 lite",), 138e12, 8 * GIB, 614e9, 100e9, 3.125e9, 1.05e9),
    Chip("v4", ("TPU v4",), 275e12, 32 * GIB, 1228e9, 300e9, 6.25e9, 1.05e9),
    Chip("a100", ("NVIDIA A100",), 312e12, 79.2 * GIB, 2039e9, 300e9, 25e9),
    Chip("h100-pcie", ("NVIDIA H100 PCIe",), 756e12, 79.1 * GIB, 2000e9, 0, 50e9),
    Chip("h100", ("NVIDIA H100",), 989e12, 79.1 * GIB, 3352e9, 450e9, 50e9),
    Chip("h200", ("NVIDIA H200",), 989e12, 140 * GIB, 4800e9, 450e9, 50e9),
)
CHIPS = {chip.name: chip for chip in _CHIPS}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that a device is, by its `jax.Device.device_kind`; None where it is not known."""
    return next((c for c in _CHIPS if device_kind.startswith(c.device_kinds)), None)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device; None where it is not known."""
    chip = chip_of(device_kind)
    return chip and chip.bf16_flops
