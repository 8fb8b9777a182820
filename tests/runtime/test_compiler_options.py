import importlib.util
import os
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import pytest

from kontext_jax.runtime.compiler_options import PURPOSES, options
from kontext_jax.runtime.programs import Executables, Program, Timings


def test_an_unknown_platform_or_purpose_is_refused():
    with pytest.raises(ValueError, match=r"unknown platform 'metal'.*tpu.*gpu.*cpu"):
        options("metal", "train")
    with pytest.raises(ValueError, match="unknown purpose 'serve'"):
        options("tpu", "serve")


def test_cuda_is_the_gpu_and_the_cpu_needs_nothing():
    for purpose in PURPOSES:
        assert options("cuda", purpose) == options("gpu", purpose)
        assert options("cpu", purpose) == {}


def test_a_chip_replaces_options_and_an_unknown_one_does_not():
    common = options("tpu", "sample")
    of_v6e = options("tpu", "sample", "v6e")
    assert of_v6e.keys() == common.keys()
    assert of_v6e != common
    assert options("tpu", "train", "v6e") == options("tpu", "train")
    assert options("tpu", "sample", None) == options("tpu", "sample", "v5p") == common


def test_options_reach_the_compiler():
    x = jnp.ones(4)
    program = Program("f", lambda: lambda x: x + 1, (x,))
    programs = Executables(Timings(), compiler_options={"xla_no_such_option": True})
    with pytest.raises(Exception, match="No such compile option: 'xla_no_such_option'"):
        programs.get(program)
    programs = Executables(Timings(), compiler_options={"xla_cpu_enable_fast_math": False})
    assert programs.get(program)(x).tolist() == [2.0] * 4


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs jax[tpu]")
def test_the_tpu_compiler_knows_every_option():
    program = """
        import jax, jax.numpy as jnp
        from jax.experimental import topologies
        from jax.sharding import SingleDeviceSharding
        from kontext_jax.runtime.compiler_options import PURPOSES, options

        device = topologies.get_topology_desc("v5e:2x2", "tpu").devices[0]
        x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=SingleDeviceSharding(device))
        for purpose in PURPOSES:
            jax.jit(lambda x: x + 1).lower(x).compile(compiler_options=options("tpu", purpose))
    """
    environment = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | environment,
        check=True,
    )
