"""What a run would need on hardware that is not here: `python -m kontext_jax.plan`.

    targets.py    "v5p:4x4x4" → the devices that the compiler knows
    programs.py   a config or a request → the programs that would run, from shapes alone
    measure.py    compiles them, keeps what the compiler says on disk
    report.py     memory, time, limits of a program: for people and as JSON
    sweep.py      many settings, sorted
    chart.py      the same as pictures

Everything runs on the CPU of this machine, so the package keeps JAX from looking for another device
before JAX is imported.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# libtpu would otherwise ask the cloud which machine this is, and refuse to be loaded twice.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
