"""The text of a small TPU program, as XLA's compiler prints one."""

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
