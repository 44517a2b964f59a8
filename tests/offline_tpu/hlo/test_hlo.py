import pytest

from offline_tpu import UnknownDumpFormatError, collectives
from offline_tpu.hlo import values
from offline_tpu.hlo.module import HloModule, array_bytes
from offline_tpu.machine import devices
from offline_tpu.machine.links import Grid
from splash_workbench.profiles.xla_pb2 import ShapeProto

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
    assert kernel.scope == 'jit(f)/tokamax:{"op":1}/kernel'
    assert kernel.proto.custom_call_target == "tpu_custom_call"
    assert module.op("main", "while").called == ("body", "condition")
    assert module.root("main").name == "result"


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
    module = HloModule.parse(MODULE)
    kernel, state = module.op("main", "kernel.1").shape, module.op("main", "tuple").shape
    assert (array_bytes(kernel), array_bytes(kernel, hbm_only=True)) == (7 * 128 * 2, 0)
    assert (array_bytes(state), array_bytes(state, hbm_only=True)) == (4 + 7 * 128 * 2, 4)
    assert array_bytes(ShapeProto(element_type="S4", dimensions=[3])) == 2
    assert array_bytes(ShapeProto(element_type="F8E4M3FN", dimensions=[16])) == 16
    assert array_bytes(ShapeProto(element_type="TOKEN")) == 0


def test_an_element_type_that_has_no_size_is_refused() -> None:
    with pytest.raises(UnknownDumpFormatError, match="BUFFER: expected one of an array"):
        array_bytes(ShapeProto(element_type="BUFFER"))


def test_text_that_is_no_hlo_is_refused() -> None:
    with pytest.raises(UnknownDumpFormatError, match="XLA does not read the HLO text"):
        HloModule.parse("HloModule empty")


def test_a_jaxlib_without_the_parser_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("jaxlib._hlo.hlo_module_from_text")
    with pytest.raises(UnknownDumpFormatError, match="jaxlib does not read HLO as the pinned one"):
        HloModule.parse(MODULE)


def test_an_asynchronous_op_is_called_by_what_it_runs() -> None:
    text = """HloModule m, is_scheduled=true

ENTRY %main (x: bf16[8,128]) -> bf16[4,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  %start = ((bf16[8,128]{1,0}), bf16[4,128]{1,0:S(1)}, s32[]) slice-start(%x), slice={[0:4], [0:128]}
  ROOT %done = bf16[4,128]{1,0:S(1)} slice-done(%start)
}
"""
    assert [op.opcode for op in HloModule.parse(text).computations["main"]] == [
        "parameter",
        "slice-start",
        "slice-done",
    ]


def test_ops_with_the_same_content_have_the_same_signature() -> None:
    module = HloModule.parse(
        """HloModule m, is_scheduled=true

ENTRY %main (x: f32[8,128], y: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %y = f32[8,128]{1,0} parameter(1)
  %one = f32[8,128]{1,0} add(%x, %y), metadata={op_name="jit(f)/one"}
  %two = f32[8,128]{1,0} add(%one, %y), metadata={op_name="jit(f)/two"}
  ROOT %other = f32[8,128]{1,0} multiply(%one, %two)
}
"""
    )
    one, two, other = (module.signature("main", module.op("main", name)) for name in ("one", "two", "other"))
    assert one == two != other


def _collective(line: str) -> collectives.Collective:
    module = HloModule.parse(f"""HloModule m, is_scheduled=true, num_partitions=8

%add (a: bf16[], b: bf16[]) -> bf16[] {{
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}}

ENTRY %main (x: bf16[1024]) -> bf16[1024] {{
  %x = bf16[1024]{{0}} parameter(0)
  ROOT {line}
}}
""")
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


def test_replica_groups_over_a_part_of_an_axis_are_refused() -> None:
    with pytest.raises(UnknownDumpFormatError, match="replica_groups are not in a known form"):
        _collective(
            "%all-reduce = bf16[1024]{0} all-reduce(%x), replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}, to_apply=%add"
        )


def test_a_collective_that_is_not_modelled_is_refused() -> None:
    with pytest.raises(UnknownDumpFormatError, match="collective-broadcast is not modelled"):
        _collective("%r = bf16[1024]{0} collective-broadcast(%x), replica_groups={}")


def test_collective_permute_counts_the_busiest_link() -> None:
    pairs = "{{0,4},{2,6}}"  # two chips up the longer axis, from rows 0 and 1: both cross the link between rows 1 and 2
    actual = _collective(f"%c = bf16[1024]{{0}} collective-permute(%x), source_target_pairs={pairs}")
    assert actual.link_bytes == 2 * 2048


def test_a_call_on_a_sparse_core_is_read_phase_by_phase():
    text = """HloModule m, is_scheduled=true, entry_computation_layout={(bf16[8,128]{1,0})->bf16[8,128]{1,0}}

%called (p: bf16[8,128]) -> bf16[8,128] {
  ROOT %p = bf16[8,128]{1,0} parameter(0)
}

ENTRY %main (p0: bf16[8,128]) -> bf16[8,128] {
  %p0 = bf16[8,128]{1,0} parameter(0)
  %c.start = ((), (), (s32[4]{0})) custom-call-start(), async_execution_thread="sparsecore", custom_call_target="x", \
called_computations={%called}, metadata={op_name="a/b:{\\"n\\":{}}"}, backend_config={"core_ids":["0","1"]}
  %c.update = ((bf16[8,128]{1,0}), bf16[8,128]{1,0}, (s32[4]{0})) custom-call-update(%c.start, %p0), \
output_to_operand_aliasing={{2,0}: (0, {2,0})}
  ROOT %c.done = bf16[8,128]{1,0} custom-call-done(%c.update), metadata={op_name="a/b"}
}
"""
    ops = HloModule.parse(text).computations["main"]
    assert [op.opcode for op in ops] == ["parameter", "custom-call-start", "custom-call-update", "custom-call-done"]
    assert (ops[-1].scope, ops[-1].operands, ops[-1].is_root) == ("a/b", ("c.update",), True)
    assert (ops[1].scope, ops[1].called) == ('a/b:{"n":{}}', ("called",))
