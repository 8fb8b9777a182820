"""The name that a command had before `kontext_jax.precompute.synthesize`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("kontext_jax.precompute.synthesize", run_name="__main__")
