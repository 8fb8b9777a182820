"""The cost of a compiled program, by its text."""

import json

import pytest
from tpu_program import TPU

from kontext_jax.hlo import cost as hlo_cost
from kontext_jax.hlo.text import Program
from kontext_jax.runtime.chips import CHIPS


def test_cycles_are_summed_over_loops_by_what_they_do():
    found = hlo_cost.estimate(TPU, "v5p")
    assert found.seconds_by_category["matmul"] == pytest.approx(2 * 700e-6)
    assert found.seconds_by_category["data movement"] == pytest.approx(4 * 1e-6)
    assert found.seconds_by_category["reduction"] == pytest.approx(4 * 2e-6)
    assert "elementwise" not in found.seconds_by_category
    assert [(loop.times, loop.entered, loop.exact) for loop in found.loops] == [
        (2, 1, True),
        (4, 1, True),  # from 0 to the carried 8 by 2
    ]
    assert not found.analytic
    assert [row.kind for row in found.uncounted] == ["sort", "add"]


def test_attention_kernels_are_counted_at_the_peak():
    found = hlo_cost.estimate(TPU, "v5p")
    flops = 2 * (2 * 2 * 24 * 512 * 512 * 128)  # layers × products × 2·H·S·S·Dh
    assert found.attention_flops == flops
    assert found.seconds_by_category["attention"] == pytest.approx(flops / 459e12)
    (op,) = (op for op in found.ops if op.category == "attention")
    assert (op.count, op.estimated, op.source) == (
        2,
        False,
        "jit(step)/while/blocks_N/splash_mha_fwd",
    )


def test_a_gather_beside_a_longer_product_costs_nothing():
    found = hlo_cost.estimate(TPU, "v5p")
    rows = {row.kind: row for row in found.collectives}
    gather, reduce = rows["all-gather"], rows["all-reduce"]
    assert (gather.count, gather.count_async) == (2, 2)  # not once for each of its three fusions
    assert gather.link_bytes == 2 * 64 * 64 * 2 * 3 / 4
    assert gather.exposed_s == 0
    assert (reduce.count, reduce.count_async) == (1, 0)
    assert reduce.link_s == pytest.approx(2 * 150e6 * 4 * 3 / 4 / 600e9)
    assert reduce.exposed_s == reduce.link_s
    assert found.total_s == pytest.approx(found.compute_s + reduce.link_s)


def test_a_gather_longer_than_its_product_costs_the_rest():
    slow = TPU.replace("bf16[64,64]{1,0} all-gather", "bf16[600000000]{0} all-gather")
    (row,) = (r for r in hlo_cost.estimate(slow, "v5p").collectives if r.kind == "all-gather")
    assert row.link_s == pytest.approx(2 * 1.2e9 * 3 / 4 / 600e9)
    assert row.exposed_s == pytest.approx(2 * (1.5e-3 - 700e-6))


def test_a_loop_of_unknown_length_runs_as_often_as_the_caller_says():
    unknown = TPU.replace("tuple(%zero, %eight, %y)", "tuple(%zero, %steps, %y)")
    assert Program(unknown).entry == "main"
    found = hlo_cost.estimate(unknown, "v5p", unknown_trips=28)
    assert [(loop.times, loop.exact) for loop in found.loops] == [(2, True), (28, False)]
    assert found.seconds_by_category["reduction"] == pytest.approx(28 * 2e-6)


@pytest.mark.parametrize(
    ("name", "num_outputs", "products"),
    [
        ("splash_mha_fwd", 1, 2),
        ("splash_mha_dq", 1, 3),
        ("splash_mha_dkv", 2, 4),
        ("splash_mha_dkv", 3, 5),
        ("flash_attention_bwd", 3, 5),
    ],
)
def test_kernels_of_the_backward_pass_by_their_names(name, num_outputs, products):
    outputs = "bf16[24,512,128]{2,1,0}, " * num_outputs
    text = TPU.replace("splash_mha_fwd", name).replace("bf16[24,512,128]{2,1,0}) custom-call",
                                                       f"{outputs[:-2]}) custom-call")  # fmt: skip
    found = hlo_cost.estimate(text, "v5p")
    assert found.attention_flops == 2 * products * 2 * 24 * 512 * 512 * 128


GPU = """
HloModule jit_run, is_scheduled=true

%dynamic_slice (stack: bf16[38,3072,3072], n: s32[]) -> bf16[1,3072,3072] {
  %stack = bf16[38,3072,3072]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %o = s32[] constant(0)
  ROOT %part = bf16[1,3072,3072]{2,1,0} dynamic-slice(%stack, %n, %o, %o), dynamic_slice_sizes={1,3072,3072}
}

%gemm (x: bf16[4096,3072], w: bf16[3072,3072]) -> bf16[4096,3072] {
  %x = bf16[4096,3072]{1,0} parameter(0)
  %w = bf16[3072,3072]{1,0} parameter(1)
  ROOT %dot = bf16[4096,3072]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x.1: bf16[4096,3072], all: bf16[38,3072,3072], k: s32[], q: bf16[1,4096,24,128]) -> bf16[4096,3072] {
  %x.1 = bf16[4096,3072]{1,0} parameter(0)
  %all = bf16[38,3072,3072]{2,1,0} parameter(1)
  %k = s32[] parameter(2)
  %q = bf16[1,4096,24,128]{3,2,1,0} parameter(3)
  %loop_dynamic_slice_fusion = bf16[1,3072,3072]{2,1,0} fusion(%all, %k), kind=kLoop, calls=%dynamic_slice
  %bitcast = bf16[3072,3072]{1,0} bitcast(%loop_dynamic_slice_fusion)
  %gemm_fusion = bf16[4096,3072]{1,0} fusion(%x.1, %bitcast), kind=kCustom, calls=%gemm
  %attention.1 = (bf16[1,24,4096,128]{3,1,2,0}, u8[1024]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["1", "24", "4096", "4096"]}}}
  ROOT %out = bf16[4096,3072]{1,0} custom-call(%gemm_fusion, %bitcast), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
}
"""  # noqa: E501


def test_gpu_kernels_are_counted_at_the_roofline():
    found, chip = hlo_cost.estimate(GPU, "h100"), CHIPS["h100"]
    gemm = 2 * 4096 * 3072 * 3072 / chip.bf16_flops  # bound by its arithmetic
    assert found.analytic
    assert found.seconds_by_category["matmul"] == pytest.approx(2 * gemm)
    copied = 2 * 3072 * 3072 * 2 / chip.hbm_bytes_per_s  # of the stack, one layer
    assert found.seconds_by_category["data movement"] == pytest.approx(
        copied, rel=1e-6
    )  # and an index
    assert found.attention_flops == 4 * 24 * 4096 * 4096 * 128
    assert all(not op.estimated for op in found.ops)


def test_a_fusion_that_starts_early_costs_what_it_does_in_its_place():
    plain = "bf16[1,3072,3072]{2,1,0} fusion(%all, %k), kind=kLoop, calls=%dynamic_slice"
    start = (
        "((bf16[38,3072,3072]{2,1,0}, s32[]), bf16[1,3072,3072]{2,1,0}, u32[]) "
        "fusion-start(%all, %k), kind=kLoop, calls=%dynamic_slice\n"
        "  %done = bf16[1,3072,3072]{2,1,0} fusion-done(%loop_dynamic_slice_fusion)"
    )
    early = GPU.replace(plain, start)
    early = early.replace("bitcast(%loop_dynamic_slice_fusion)", "bitcast(%done)")
    found, expected = hlo_cost.estimate(early, "h100"), hlo_cost.estimate(GPU, "h100")
    assert early != GPU
    assert found.seconds_by_category == expected.seconds_by_category
    assert found.bytes == expected.bytes


def test_the_command_prints_lines_and_json(tmp_path, capsys):
    file = tmp_path / "step.hlo"
    file.write_text(TPU)
    assert hlo_cost.main([str(file), "--chip", "v5p"]) == 0
    shown = capsys.readouterr().out
    assert "ms on one v5p (compiler's cycles, attention at peak)" in shown
    assert "all-gather         bf16  ×2 (2 beside computation)" in shown
    assert hlo_cost.main([str(file), "--json", "--top", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["ops"]) == 1
    assert found["total_s"] == pytest.approx(hlo_cost.estimate(TPU, "v5p").total_s)
