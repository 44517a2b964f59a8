import pytest

from offline_tpu import UnknownDumpFormatError, collectives
from offline_tpu.hlo import values
from offline_tpu.hlo.module import HloModule, array_bytes
from offline_tpu.machine import devices
from offline_tpu.machine.links import Grid

MODULE = """HloModule jit_f, is_scheduled=true

%body (state.1: (s32[], bf16[7,128])) -> (s32[], bf16[7,128]) {
  %one = s32[]{:T(128)} constant(3)
  %state.1 = (s32[]{:T(128)}, bf16[7,128]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %x.1 = bf16[7,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%state.1), index=1
  %next = s32[]{:T(128)} add(%i.1, %one)
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[7,128]{1,0:T(8,128)(2,1)S(1)}) tuple(%next, %x.1)
}

%condition (state.2: (s32[], bf16[7,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(20)
  %state.2 = (s32[]{:T(128)}, bf16[7,128]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%state.2), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.2, %limit), direction=LT
}

ENTRY %main (x: bf16[7,128]) -> bf16[7,128] {
  %zero = s32[]{:T(128)} constant(2)
  %rows = s32[3]{0:T(128)} constant({4, 5, 6})
  %x = bf16[7,128]{1,0:T(8,128)(2,1)} parameter(0)
  %copied = s32[3]{0:T(128)S(1)} copy(%rows)
  %kernel.1 = bf16[7,128]{1,0:T(8,128)(2,1)S(1)} custom-call(%copied, %x), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(f)/tokamax:{\\"op\\":1}/kernel"}
  %tuple = (s32[]{:T(128)}, bf16[7,128]{1,0:T(8,128)(2,1)S(1)}) tuple(%zero, %kernel.1)
  %while = (s32[]{:T(128)}, bf16[7,128]{1,0:T(8,128)(2,1)S(1)}) while(%tuple), condition=%condition, body=%body
  ROOT %result = bf16[7,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%while), index=1
}
"""
V6E = devices.by_name("v6e")
GRID = Grid.around([(x, y, 0) for y in range(4) for x in range(2)], V6E.ici_wrap_length)


def test_ops_computations_and_scopes_are_read() -> None:
    module = HloModule.parse(MODULE)
    assert module.entry == "main"
    assert [op.name for op in module.computations["main"]][:3] == ["zero", "rows", "x"]
    kernel = module.op("main", "kernel.1")
    assert (kernel.opcode, kernel.operands) == ("custom-call", ("copied", "x"))
    assert kernel.scope == 'jit(f)/tokamax:{\\"op\\":1}/kernel'
    assert kernel.attribute("custom_call_target") == '"tpu_custom_call"'


def test_trip_count_runs_the_counter() -> None:
    module = HloModule.parse(MODULE)
    assert values.trip_count(module, "main", module.op("main", "while"), ()) == 6  # 2, 5, ..., 17


def test_trip_count_is_unknown_where_the_start_depends_on_data() -> None:
    module = HloModule.parse(MODULE.replace("tuple(%zero, %kernel.1)", "tuple(%x, %kernel.1)"))
    assert values.trip_count(module, "main", module.op("main", "while"), ()) is None


def test_words_of_a_constant_are_found_through_copies() -> None:
    module = HloModule.parse(MODULE)
    assert values.constant_words(module, "main", module.op("main", "copied")) == (4, 5, 6)
    assert values.constant_words(module, "main", module.op("main", "x")) is None


def test_words_that_the_text_leaves_out_are_unknown() -> None:
    module = HloModule.parse(MODULE.replace("{4, 5, 6}", "{...}"))
    assert values.constant_words(module, "main", module.op("main", "copied")) is None


def test_bytes_of_shapes() -> None:
    assert array_bytes("bf16[7,128]{1,0:T(8,128)(2,1)S(1)}") == 7 * 128 * 2
    assert array_bytes("bf16[7,128]{1,0:T(8,128)(2,1)S(1)}", hbm_only=True) == 0
    assert array_bytes("(f32[5]{0}, /*index=1*/s4[3]{0}, pred[])") == 20 + 2 + 1
    assert array_bytes("f8e4m3fn[16]{0}") == 16


def test_text_without_an_entry_is_refused() -> None:
    with pytest.raises(UnknownDumpFormatError, match="no entry computation"):
        HloModule.parse("HloModule empty")


def _collective(line: str) -> collectives.Collective:
    text = f"ENTRY %main (x: bf16[1024]) -> bf16[1024] {{\n  %x = bf16[1024]{{0}} parameter(0)\n  ROOT {line}\n}}\n"
    module = HloModule.parse(text)
    found = collectives.cost_of(module.root("main"), "main", module, GRID, V6E)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("groups", "size", "count"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4, 2),
        ("{}", 8, 1),
        ("[2,4]<=[8]", 4, 2),
        ("[4,2]<=[2,4]T(1,0)", 2, 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4, 2),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0', 'axis_1'}", 8, 1),
    ],
)
def test_replica_groups_in_every_form(groups: str, size: int, count: int) -> None:
    actual = _collective(f"%all-reduce = bf16[1024]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%add")
    assert (actual.group_size, actual.group_count, actual.size_bytes) == (size, count, 2048)


def test_replica_groups_in_another_form_are_refused() -> None:
    with pytest.raises(UnknownDumpFormatError, match="replica_groups are not in a known form"):
        _collective("%all-reduce = bf16[1024]{0} all-reduce(%x), replica_groups=?, to_apply=%add")


def test_a_collective_that_is_not_modelled_is_refused() -> None:
    with pytest.raises(UnknownDumpFormatError, match="ragged-all-to-all is not modelled"):
        _collective("%r = bf16[1024]{0} ragged-all-to-all(%x), replica_groups={}")


def test_collective_permute_counts_the_busiest_link() -> None:
    pairs = "{{0,4},{2,6}}"  # two chips up the longer axis, from rows 0 and 1: both cross the link between rows 1 and 2
    actual = _collective(f"%c = bf16[1024]{{0}} collective-permute(%x), source_target_pairs={pairs}")
    assert actual.link_bytes == 2 * 2048
