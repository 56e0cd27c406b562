"""Collectives in the text of a program, and the bytes that a device sends for them."""

from experiments.benchmarks.collectives import Collective, collectives

HLO = """
HloModule jit_step, is_scheduled=true, num_partitions=8

ENTRY %main.1 (param: f32[4,8], param.1: pred[3]) -> (f32[4,8], f32[]) {
  %param = f32[4,8]{1,0} parameter(0)
  %all-reduce.1 = f32[4,8]{1,0} all-reduce(%param), channel_id=1, replica_groups={{0,1},{2,3}}
  %all-reduce.2 = (f32[10]{0}, bf16[3,2]{1,0:T(8,128)(2,1)}, /*index=2*/f32[]) all-reduce(%a, %b,\
 /*index=2*/%c), replica_groups=[2,4]<=[8], to_apply=%add, metadata={op_name="jit(step)/all-reduce"}
  %all-gather.1 = f32[64]{0} all-gather(%d), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %reduce-scatter.1 = s32[5]{0} reduce-scatter(%e), replica_groups={}, dimensions={0}
  %all-to-all.1 = (pred[2,3]{1,0}, pred[2,3]{1,0}) all-to-all(%f, %g), replica_groups={{0,1},{2,3}}
  %collective-permute.1 = f64[2]{0} collective-permute(%h), source_target_pairs={{0,1},{1,0}}
  %all-reduce-start.1 = (f32[6]{0}, f32[]) all-reduce-start(%i, %j), replica_groups={{0,1,2,3}}
  %all-reduce-done.1 = (f32[6]{0}, f32[]) all-reduce-done(%all-reduce-start.1)
  %all-gather-start.1 = (f32[2]{0}, f32[16]{0}) all-gather-start(%k), replica_groups=[1,8]<=[8]
  %all-gather-start.2 = ((f32[2]{0}, u8[1]{0}), (f32[8]{0}, u8[4]{0})) all-gather-start(%k, %l),\
 replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
  %reduce-scatter-start = ((f32[8]{0}), f32[2]{0}, u32[]) reduce-scatter-start(%m),\
 replica_groups=mesh['x'=2,'y'=8] {'x','y':(2)4}
  %collective-permute-start = (f16[9]{0}, f16[9]{0}, u32[], u32[]) collective-permute-start(%n)
  %all-reduce.3 = f32[7]{0} all-reduce(%o), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}
  ROOT %fusion = (f32[4,8]{1,0}, f32[]) fusion(%all-reduce.1, %all-reduce.2), kind=kLoop
}
"""

FOUND = [
    Collective("all-reduce", 128, 2),
    Collective("all-reduce", 56, 4),
    Collective("all-gather", 256, 2),
    Collective("reduce-scatter", 20, 8),
    Collective("all-to-all", 12, 2),
    Collective("collective-permute", 16, 8),
    Collective("all-reduce", 28, 4),
    Collective("all-gather", 64, 8),
    Collective("all-gather", 36, 4),
    Collective("reduce-scatter", 8, 8),
    Collective("collective-permute", 18, 8),
]


def test_collectives():
    assert collectives(HLO, devices=8) == FOUND


def test_sent():
    sent = [collective.sent for collective in FOUND]
    assert sent == [128, 84, 128, 140, 6, 16, 42, 56, 27, 56, 18]
