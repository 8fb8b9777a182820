"""The name that a command had before `kontext_jax.hlo.cost`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("kontext_jax.hlo.cost", run_name="__main__")
