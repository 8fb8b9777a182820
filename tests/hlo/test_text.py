"""Counting the collectives of a compiled program's text."""

import pytest

from kontext_jax.hlo.collectives import collectives, collectives_of
from kontext_jax.hlo.text import Program

# In the words of a TPU program: a loop over three layers, whose gradient is reduced and scattered
# in a fusion, and asynchronous gathers and groups in each of their notations.
PROGRAM = """
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%x, %y)
}

%all-reduce-scatter.clone (input: f32[8,16]) -> f32[8,4] {
  %input = f32[8,16]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[8,16]{1,0:T(8,128)} all-reduce(%input), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %dynamic-slice.1 = f32[8,4]{1,0:T(8,128)} dynamic-slice(%all-reduce.1)
}

%condition (state: (s32[], bf16[8,16])) -> pred[] {
  %state = (s32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %bound = s32[]{:T(128)} constant(3)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%body (state.1: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %state.1 = (s32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %all-gather.1 = bf16[8,16]{1,0:T(8,128)(2,1)} all-gather(%part), replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}, dimensions={1}
  %fusion.1 = f32[8,4]{1,0:T(8,128)} fusion(%grads), kind=kCustom, calls=%all-reduce-scatter.clone
  ROOT %tuple = (s32[]{:T(128)}, bf16[8,16]{1,0}) tuple(%i, %all-gather.1)
}

ENTRY %main (param: bf16[8,4]) -> f32[2] {
  %while.1 = (s32[]{:T(128)}, bf16[8,16]{1,0}) while(%start), condition=%condition, body=%body
  %all-gather-start.2 = (bf16[8,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%rows), replica_groups=[4,2]<=[8], dimensions={0}
  %all-gather-done.2 = bf16[16,8]{1,0} all-gather-done(%all-gather-start.2)
  ROOT %all-reduce.2 = f32[2]{0:T(128)} all-reduce(%loss), replica_groups=[1,8]<=[8], to_apply=%add
}
"""  # noqa: E501


def test_a_path_is_free_of_what_flax_evaluates():
    text = """
ENTRY %main () -> f32[] {
  ROOT %x = f32[] add(%y, %y), metadata={op_name="jit(step)/while/body/eval_jaxpr/blocks/mul"}
}
"""
    assert Program(text).computations["main"]["x"].source == "jit(step)/while/body/blocks/mul"


def test_collectives_are_counted_as_often_as_their_loop_runs():
    found = collectives(PROGRAM)
    assert set(found) == {("all-gather", "bf16"), ("reduce-scatter", "f32"), ("all-reduce", "f32")}
    gather = found["all-gather", "bf16"]
    assert gather.count == 3 + 1
    assert gather.full_bytes == 3 * 8 * 16 * 2 + 16 * 8 * 2
    assert gather.link_bytes == 3 * 8 * 16 * 2 * 3 / 4 + 16 * 8 * 2 / 2
    scatter = found["reduce-scatter", "f32"]
    assert (scatter.count, scatter.full_bytes) == (3, 3 * 8 * 16 * 4)
    assert scatter.link_bytes == 3 * 8 * 16 * 4 * 3 / 4
    assert found["all-reduce", "f32"].link_bytes == 2 * 2 * 4 * 7 / 8


def test_a_loop_without_a_constant_bound_is_refused():
    unbounded = PROGRAM.replace("constant(3)", "get-tuple-element(%state)")
    with pytest.raises(ValueError, match="does not count up to a constant"):
        collectives(unbounded)


@pytest.mark.parametrize(
    ("notation", "group"),
    [
        ("replica_groups={{0,4},{1,5}}", (0, 4)),
        ("replica_groups=[4,2]<=[8]", (0, 1)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        ("source_target_pairs={{0,3},{3,0}}", (0, 3)),
        ("channel_id=1", tuple(range(8))),
    ],
)
def test_the_devices_of_a_collective_in_each_notation(notation, group):
    text = (
        "HloModule m, num_partitions=8\nENTRY %main (x: f32[8]) -> f32[8] {\n"
        f"  ROOT %r = f32[8]{{0}} all-reduce(%x), {notation}, to_apply=%add\n}}\n"
    )
    program = Program(text)
    (found,) = collectives_of(program, "main", program.root("main"))
    assert found.group == group
    assert found.link_bytes == 2 * 32 * (len(group) - 1) / len(group)
