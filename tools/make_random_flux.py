"""Writes a FLUX transformer of random bfloat16 weights in BFL's layout, of any size, streaming.

    python tools/make_random_flux.py flux1-dev-random.safetensors --depth 2 --single 8    # 3.4 GB
    python tools/make_random_flux.py flux1-dev-random.safetensors                         # 23.8 GB

For benchmarks and rehearsals: real names, real widths, no trained value. The same seed gives the
same bytes. Values are uniform in [-0.02, 0.02] but for the 7 low bits of the mantissa being drawn
too, so that nothing compresses or repeats.
"""

import argparse
from pathlib import Path

import ml_dtypes
import numpy as np

from convert_weights.rules import make_plan
from convert_weights.tables import mmdit
from kontext_jax.models.presets import MMDiTConfig
from kontext_jax.storage.safetensors_reader import TensorInfo
from kontext_jax.storage.safetensors_writer import SafetensorsWriter

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def random_bfloat16(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Bit patterns of magnitude 2^-9 to 2^-6, either sign: about [-0.03, 0.03]."""
    bits = generator.integers(0, 2**16, shape, dtype=np.uint16)
    bits &= 0x81FF  # sign, two bits of the exponent, mantissa
    bits |= 0x3B00
    return bits.view(BFLOAT16)


def write_random_flux(path: Path, config: MMDiTConfig, seed: int = 0) -> int:
    """Writes the file at `path`; returns the number of bytes of its tensors."""
    plan = make_plan(mmdit.rows(config), mmdit.axis_sizes(config), "bfl")
    infos = {name: TensorInfo(BFLOAT16, shape) for name, shape in plan.sources.items()}
    generator = np.random.Generator(np.random.SFC64(seed))
    with SafetensorsWriter(path, infos, {"format": "pt"}) as writer:
        for name, info in infos.items():
            writer.write(name, random_bfloat16(generator, info.shape))
    return sum(info.nbytes for info in infos.values())


def main() -> None:
    """Parses the flags and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--width", type=int, default=3072, help="hidden size, a multiple of 128")
    parser.add_argument("--depth", type=int, default=19, help="double-stream blocks")
    parser.add_argument("--single", type=int, default=38, help="single-stream blocks")
    parser.add_argument("--no-guidance", action="store_true", help="as flux-schnell")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = MMDiTConfig(
        hidden_size=args.width,
        num_heads=args.width // 128,
        depth=args.depth,
        depth_single_blocks=args.single,
        guidance_embed=not args.no_guidance,
    )
    count = write_random_flux(args.out, config, args.seed)
    print(f"{args.out}: {count / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
