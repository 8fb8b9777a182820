"""The cost of a compiled program, by its text."""

import json

import pytest

from kontext_jax.hlo import cost as hlo_cost
from kontext_jax.hlo.text import Program
from kontext_jax.runtime.chips import CHIPS

# In the words of a TPU program: two layers around Pallas attention, gathered beside a product that
# takes 700 µs (1,225,000 cycles at 1.75 GHz), then four microbatches of a carried bound.
TPU = """
HloModule jit_step, is_scheduled=true, num_partitions=4

%product (a: bf16[64,64], b: bf16[64,64]) -> bf16[64,64] {
  %a = bf16[64,64]{1,0} parameter(0)
  %b = bf16[64,64]{1,0} parameter(1)
  ROOT %convolution = bf16[64,64]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

%square_sum (c: f32[64,64]) -> f32[64] {
  %c = f32[64,64]{1,0} parameter(0)
  ROOT %reduce = f32[64]{0} reduce(%c), dimensions={1}
}

%shift (d: f32[64]) -> f32[64] {
  %d = f32[64]{0} parameter(0)
  ROOT %slice = f32[64]{0} slice(%d), slice={[0:64]}
}

%gather_start (part: bf16[16,64]) -> (bf16[16,64], bf16[64,64], u32[]) {
  %part = bf16[16,64]{1,0} parameter(0)
  %all-gather.1 = bf16[64,64]{1,0} all-gather(%part), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %start = (bf16[16,64]{1,0}, bf16[64,64]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (part.1: bf16[16,64], e: bf16[64,64]) -> (bf16[64,64], bf16[64,64]) {
  %part.1 = bf16[16,64]{1,0} parameter(0)
  %e = bf16[64,64]{1,0} parameter(1)
  %all-gather.2 = bf16[64,64]{1,0} all-gather(%part.1), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  %convolution.1 = bf16[64,64]{1,0} convolution(%e, %e), dim_labels=bf_io->bf
  ROOT %tuple.1 = (bf16[64,64]{1,0}, bf16[64,64]{1,0}) tuple(%convolution.1, %all-gather.2)
}

%gather_done (part.2: bf16[16,64]) -> bf16[64,64] {
  %part.2 = bf16[16,64]{1,0} parameter(0)
  %all-gather.3 = bf16[64,64]{1,0} all-gather(%part.2), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %done = bf16[64,64]{1,0} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%layer_condition (state: (s32[], bf16[24,512,128])) -> pred[] {
  %state = (s32[]{:T(128)}, bf16[24,512,128]{2,1,0}) parameter(0)
  %two = s32[]{:T(128)} constant(2)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %two), direction=LT
}

%layer (state.1: (s32[], bf16[24,512,128])) -> (s32[], bf16[24,512,128]) {
  %state.1 = (s32[]{:T(128)}, bf16[24,512,128]{2,1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i.1, %one)
  %q = bf16[24,512,128]{2,1,0} get-tuple-element(%state.1), index=1
  %splash_mha_fwd.1 = (f32[512,128]{1,0}, bf16[24,512,128]{2,1,0}) custom-call(%q, %q, %q), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(step)/while/blocks_3/splash_mha_fwd"}
  %all-gather-start.1 = (bf16[24,512,128]{2,1,0}, u32[]{:S(2)}) fusion(%q), kind=kCustom, calls=%gather_start
  %fusion.2 = (bf16[64,64]{1,0}, bf16[64,64]{1,0}) fusion(%q, %q), kind=kOutput, calls=%async_collective_fusion.1, metadata={op_name="jit(step)/while/mlp"}, backend_config={"window_config":{"estimated_cycles":"1225000"}}
  %all-gather-done.1 = bf16[64,64]{1,0} fusion(%fusion.2), kind=kCustom, calls=%gather_done
  %out = bf16[24,512,128]{2,1,0} get-tuple-element(%splash_mha_fwd.1), index=1
  ROOT %tuple.2 = (s32[]{:T(128)}, bf16[24,512,128]{2,1,0}) tuple(%next, %out)
}

%part_condition (state.2: (s32[], s32[], f32[64])) -> pred[] {
  %state.2 = (s32[]{:T(128)}, s32[]{:T(128)}, f32[64]{0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%state.2), index=0
  %end = s32[]{:T(128)} get-tuple-element(%state.2), index=1
  ROOT %lt.1 = pred[]{:T(512)} compare(%j, %end), direction=LT
}

%part_body (state.3: (s32[], s32[], f32[64])) -> (s32[], s32[], f32[64]) {
  %state.3 = (s32[]{:T(128)}, s32[]{:T(128)}, f32[64]{0}) parameter(0)
  %j.1 = s32[]{:T(128)} get-tuple-element(%state.3), index=0
  %end.1 = s32[]{:T(128)} get-tuple-element(%state.3), index=1
  %x = f32[64]{0} get-tuple-element(%state.3), index=2
  %two.1 = s32[]{:T(128)} constant(2)
  %next.1 = s32[]{:T(128)} add(%j.1, %two.1)
  %fusion.3 = f32[64]{0} fusion(%x), kind=kLoop, calls=%shift, backend_config={"window_config":{"estimated_cycles":"1750"}}
  %fusion.4 = f32[64]{0} fusion(%x), kind=kLoop, calls=%square_sum, backend_config={"window_config":{"estimated_cycles":"3500"}}
  ROOT %tuple.3 = (s32[]{:T(128)}, s32[]{:T(128)}, f32[64]{0}) tuple(%next.1, %end.1, %fusion.4)
}

ENTRY %main (start: bf16[24,512,128], y: f32[64], steps: s32[]) -> f32[64] {
  %start = bf16[24,512,128]{2,1,0} parameter(0)
  %y = f32[64]{0} parameter(1)
  %steps = s32[]{:T(128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %eight = s32[]{:T(128)} constant(8)
  %tuple.4 = (s32[]{:T(128)}, bf16[24,512,128]{2,1,0}) tuple(%zero, %start)
  %while.1 = (s32[]{:T(128)}, bf16[24,512,128]{2,1,0}) while(%tuple.4), condition=%layer_condition, body=%layer
  %tuple.5 = (s32[]{:T(128)}, s32[]{:T(128)}, f32[64]{0}) tuple(%zero, %eight, %y)
  %while.2 = (s32[]{:T(128)}, s32[]{:T(128)}, f32[64]{0}) while(%tuple.5), condition=%part_condition, body=%part_body
  %z = f32[64]{0} get-tuple-element(%while.2), index=2
  %sort.1 = f32[64]{0} sort(%z), dimensions={0}
  ROOT %all-reduce.1 = f32[150000000]{0} all-reduce(%sort.1), replica_groups=[1,4]<=[4], to_apply=%add
}
"""  # noqa: E501


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
