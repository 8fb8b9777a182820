"""The name that a command had before `kontext_jax.precompute.encode`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("kontext_jax.precompute.encode", run_name="__main__")
