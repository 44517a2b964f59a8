import dataclasses
from pathlib import Path

import pytest

from offline_tpu import UnknownDumpFormatError
from offline_tpu.machine.dma import CoreTiming, DmaClock
from offline_tpu.schedule.bundles import Program
from offline_tpu.schedule.execute import RUN_IN_PART, execute, runs_alone
from offline_tpu.schedule.read import Schedule, read_schedule
from offline_tpu.schedule.scalar import SMEM_TABLE

TIMING = CoreTiming(bytes_per_cycle=100.0, latency_cycles=1000.0, vmem_bytes_per_stolen_cycle=4000.0, matmul_cycles=4.0)
LOOP = """
     0   :  { %s1_s0 = smov.u32 0 /* materialized constant */ } /* Start region 1 */
   0x1 LB: > { %s2_s1 = sphi %s1_s0, %s3_s2 /* phi copy */ } /* Start region 2 */
   0x2   : > { %s3_s2 = sadd.s32 1, %s2_s1 }
   0x3   : > { %p1_p0 = scmp.ge.s32.totalorder %s3_s2, 7 /* loop exit test */ }
   0x4   : > { %10 = sbr.rel (!%p1_p0) target = $region2 }
   0x5   : > {}
   0x6   : > {}
   0x7   : > {}
   0x8   : > {}
   0x9   :  { %11 = vst [vmem:[#allocation1] sm:$0xff] /*vst_source=*/%v1_v0 }
"""
TRANSFER = """
     0   :  { %s1_s0 = smov.u32 1 }
   0x1   :  { %s2_s1 = scalar_lea.sflag [#allocation7], %s1_s0 }
   0x2   :  { %9 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s8_s3, /*size_in_granules=*/64, /*vmem=*/%s9_s4, \
/*dst_syncflagno=*/%s2_s1 /* base_bounds: (1) */ }
   0x3   :  {}
   0x4   :  { %12 = dma.done.wait [#allocation7 + $0x1], 64 /* pipeline-emitter-dma-wait */ }
   0x5   :  {}
"""
#: The same, of which a chip's second core does nothing.
ALONE = """
     0   :  { %s7_s7 = sld [smem:[#allocation0]] /* megacore core id :: core id */ }
   0x1   :  { %p1_p0 = scmp.ne.s32.totalorder %s7_s7, 0 }
   0x2   :  { %10 = sbr.rel (%p1_p0) target = $region4 }
   0x3   :  {}
   0x4   :  {}
   0x5   :  {}
   0x6   :  {}
   0x7   :  { %9 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s8_s3, /*size_in_granules=*/64, /*vmem=*/%s9_s4, \
/*dst_syncflagno=*/[#allocation7] /* base_bounds: (1) */ }
   0x8   :  {}
   0x9   :  { %12 = dma.done.wait [#allocation7], 64 /* pipeline-emitter-dma-wait */ }
   0xa   :  {} /* Start region 4 */
"""
UTILIZATION = """== CAPACITY
MATMUL, VSTORE:SPILL, VLOAD:FILL
2 1 3
== UTILIZATION
"""


def test_a_loop_is_counted_by_running_its_counter() -> None:
    actual = execute(Program(LOOP), TIMING)
    assert actual.counts == [1, *[7] * 8, 1]
    assert actual.stall_cycles == pytest.approx(0)
    assert actual.unresolved == ()


def test_a_branch_on_an_unknown_scalar_is_reported() -> None:
    actual = execute(Program(LOOP.replace("%s3_s2, 7 /*", "%s99_s9, 7 /*")), TIMING)
    assert actual.counts == [1] * 10
    assert actual.unresolved == ("branch at 0x4",)


def test_a_branch_to_the_region_behind_the_last_bundle_ends_the_op() -> None:
    text = LOOP.replace("%10 = sbr.rel (!%p1_p0)", "%10 = sbr.rel (%p1_p0)").replace("$region2", "$region9")
    actual = execute(Program(text.replace("%s3_s2, 7 /*", "%s3_s2, 1 /*")), TIMING)
    assert actual.counts == [1] * 9 + [0]


@pytest.mark.parametrize(("skipped", "trips"), [(1, 7), (0, 3)])
def test_a_phi_behind_what_a_branch_may_skip_has_the_value_of_the_way_that_was_taken(skipped: int, trips: int) -> None:
    text = (
        f"     0   :  {{ %p9_p9 = scmp.eq.s32.totalorder {skipped}, 1 ;; %s8_s8 = smov.u32 7 }} /* Start region 1 */\n"
        "   0x1   :  { %9 = sbr.rel (%p9_p9) target = $region3 }\n"
        "   0x2   :  {}\n   0x3   :  {}\n   0x4   :  {}\n   0x5   :  {}\n"
        "   0x6   :  { %s9_s9 = smov.u32 3 }\n"
        "   0x7 PF:  { %s7_s7 = sphi %s8_s8, %s9_s9 ;; %s1_s0 = smov.u32 0 } /* Start region 3 */\n"
        "   0x8 LB: > { %s2_s1 = sphi %s1_s0, %s3_s2 /* phi copy */ } /* Start region 2 */\n"
        "   0x9   : > { %s3_s2 = sadd.s32 1, %s2_s1 }\n"
        "   0xa   : > { %p1_p0 = scmp.ge.s32.totalorder %s3_s2, %s7_s7 /* loop exit test */ }\n"
        "   0xb   : > { %10 = sbr.rel (!%p1_p0) target = $region2 }\n"
        "   0xc   : > {}\n   0xd   : > {}\n   0xe   : > {}\n   0xf   : > {}\n"
    )
    actual = execute(Program(text), TIMING)
    assert actual.counts[8] == trips
    assert actual.unresolved == ()


def test_a_scalar_operand_that_the_caller_knows_is_used() -> None:
    operand = "%s9_s9 = inlined_call_operand.<no memory space> [shape: s32[], index: 2, kind: input]"
    text = LOOP.replace("{ %s1_s0", f"{{ {operand}  ;;  %s1_s0").replace("%s3_s2, 7 /*", "%s3_s2, %s9_s9 /*")
    actual = execute(Program(text), TIMING, {2: (5,)})
    assert actual.counts[1] == 5
    assert actual.unresolved == ()


def test_a_wait_stalls_until_the_transfer_is_done() -> None:
    actual = execute(Program(TRANSFER), TIMING)
    size = 64 * 32
    assert actual.hbm_bytes == size
    # Started in bundle 2, waited for in bundle 4.
    starts = 2 + size / TIMING.vmem_bytes_per_stolen_cycle
    assert actual.stall_cycles == pytest.approx(starts + TIMING.latency_cycles + size / TIMING.bytes_per_cycle - 4)
    assert actual.unresolved == ()


def test_a_wait_for_nothing_known_is_reported() -> None:
    actual = execute(Program(TRANSFER.replace("[#allocation7 + $0x1]", "[#allocation8]")), TIMING)
    assert actual.unresolved == ("wait at 0x4 for a DMA that is not known",)


def test_a_transfer_of_unknown_size_is_reported_and_not_counted() -> None:
    actual = execute(Program(TRANSFER.replace("/*size_in_granules=*/64", "/*size_in_granules=*/%s77_s7")), TIMING)
    assert actual.hbm_bytes == 0
    assert "size of the DMA at 0x2" in actual.unresolved


def test_what_fills_vmem_takes_cycles_of_the_core() -> None:
    clock = DmaClock(TIMING)
    clock.start("flag", 100_000, ("hbm", "vmem"))
    clock.advance(100)
    assert clock.now == pytest.approx(100 + 100_000 / TIMING.vmem_bytes_per_stolen_cycle)
    clock.start("other", 100_000, ("hbm", "smem"))
    assert clock.now == pytest.approx(125)


def test_bundles_take_no_less_than_their_matmuls_hold_the_matrix_units() -> None:
    kinds = enumerate(["mubr.bf16.gmra", "f32.gmra", "lmr.bf16.gmra.16"])  # of the last one, half a register's rows
    matmuls = "".join(f"%v{i}_v0 = vmatmul.{kind}.mxu0 %v9_v9  ;;  " for i, kind in kinds)
    program = Program(LOOP.replace("   0x5   : > {}", f"   0x5   : > {{ {matmuls} }}"))
    assert program.matmuls[-1] == 2.0
    actual = execute(program, TIMING)
    assert actual.counts == [1, *[7] * 8, 1]
    assert actual.stall_cycles == pytest.approx(0)  # eight bundles a trip hide eight cycles of matmuls
    slow = dataclasses.replace(TIMING, matmul_cycles=10.0)
    assert execute(program, slow).stall_cycles == pytest.approx(
        5 * (20 - 8) + 2 * (20 - 9)
    )  # the first and last have nine


def test_a_word_that_the_core_stores_to_smem_is_known_when_it_is_loaded() -> None:
    text = LOOP.replace(
        "{ %s1_s0", "{ %8 = sst [smem:[#allocation6 + $0x1]] %s7_s7  ;;  %s7_s7 = smov.u32 5  ;;  %s1_s0"
    )
    text = text.replace("%s7_s7  ;;  %s7_s7 = smov.u32 5", "5")
    text = text.replace("0x2   : > {", "0x2   : > { %s9_s9 = sld [smem:[#allocation6 + $0x1]]  ;; ")
    actual = execute(Program(text.replace("%s3_s2, 7 /*", "%s3_s2, %s9_s9 /*")), TIMING)
    assert actual.counts[1] == 5
    assert actual.unresolved == ()


@pytest.mark.parametrize("word", ["[#allocation4]] /* megacore core id :: core id", "[%s77_s7]] /* core id"])
def test_the_first_of_two_cores_that_share_an_op_is_followed(word: str) -> None:
    """As libtpu 0.0.52 says it, and as earlier ones do."""
    core = f"%s9_s9 = sld [smem:{word} */  ;;  %s8_s8 = sadd.s32 6, %s9_s9"
    text = LOOP.replace("0x2   : > {", f"0x2   : > {{ {core}  ;; ").replace("%s3_s2, 7 /*", "%s3_s2, %s8_s8 /*")
    actual = execute(Program(text), TIMING)
    assert actual.counts[1] == 6
    assert actual.unresolved == ()


def test_an_op_that_the_second_core_leaves_to_the_first_has_the_whole_bandwidth(tmp_path: Path) -> None:
    """So libtpu compiles tokamax's ragged matmuls: a branch over all of it, first of all."""
    timing = dataclasses.replace(TIMING, cores=2)
    assert runs_alone(Program(ALONE), timing)
    both = ALONE.replace("%s7_s7, 0 }", "%s7_s7, 1 }")
    of_unknown_size = both.replace("/*size_in_granules=*/64", "/*size_in_granules=*/%s77_s7")
    for shared_text in (TRANSFER, LOOP, both, of_unknown_size):
        assert not runs_alone(Program(shared_text), timing)

    def read(text: str, timing: CoreTiming) -> Schedule:
        (tmp_path / "bundles").write_text(text)
        (tmp_path / "utilization").write_text(UTILIZATION + "0 0 0\n" * Program(text).length)
        return read_schedule("op", tmp_path / "bundles", tmp_path / "utilization", timing=timing, record=True)

    shared, whole = read(TRANSFER, timing), read(ALONE, timing)
    size = 64 * 32
    assert (shared.is_alone, whole.is_alone) == (False, True)
    assert shared.stall_cycles - whole.stall_cycles == pytest.approx(size / timing.bytes_per_cycle / 2)
    assert (shared.hbm_bytes, whole.hbm_bytes) == (size, size // 2)  # of each core's share of the bandwidth
    assert whole.at(timing).stall_cycles == pytest.approx(whole.stall_cycles)
    assert not read(ALONE, TIMING).is_alone  # a chip of one core
    without = ALONE.replace("dma.hbm_to_vmem", "dma.vmem_to_vmem")
    assert not read(without, timing).is_alone  # whose bandwidth does not matter


def test_a_transfer_into_both_cores_takes_half_of_the_time_of_each() -> None:
    """Its flag has the other core's in the upper half; the bandwidth of a core is half of the chip's."""
    both = "%s2_s1 = sor.u32 %s4_s3, %s3_s2  ;;  %s4_s3 = sshll.u32 %s5_s4, 16  ;;  %s5_s4 = sor.u32 24576, %s3_s2"
    text = TRANSFER.replace("%s2_s1 = scalar_lea.sflag", "%s3_s2 = scalar_lea.sflag")
    shared = text.replace("   0x2   :  {", f"   0x2   :  {{ {both}  ;; ")
    alone, together = (execute(Program(one), TIMING) for one in (TRANSFER, shared))
    assert (alone.hbm_bytes, together.hbm_bytes) == (64 * 32, 32 * 32)
    assert together.unresolved == ()
    transfer = 64 * 32 / TIMING.bytes_per_cycle
    assert alone.stall_cycles - together.stall_cycles == pytest.approx(transfer / 2)


def test_a_divisions_quotient_is_popped_first_and_its_remainder_then() -> None:
    pops = "%9 = sdivrem.u32 20, 6  ;;  %s8_s8 = spop.drf %9  ;;  %s9_s9 = spop.drf %9  ;;  "
    pops += "%s7_s7 = sadd.s32 %s8_s8, %s9_s9"
    text = LOOP.replace("0x2   : > {", f"0x2   : > {{ {pops}  ;; ").replace("%s3_s2, 7 /*", "%s3_s2, %s7_s7 /*")
    actual = execute(Program(text), TIMING)
    assert (actual.counts[1], actual.unresolved) == (3 + 2, ())
    reversed_text = text.replace("%s7_s7 = sadd.s32 %s8_s8, %s9_s9", "%s7_s7 = sshll.u32 %s8_s8, %s9_s9")
    assert execute(Program(reversed_text), TIMING).counts[1] == 3 << 2


def test_transfers_share_hbm_in_the_order_of_their_starts() -> None:
    clock = DmaClock(TIMING)
    clock.start("first", 100_000, ("hbm", "vmem"))
    clock.start("second", 50_000, ("vmem", "hbm"))
    assert clock.wait("second", 50_000)
    assert clock.now == pytest.approx(25 + 1000 + 1000 + 500)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no bundles at all", "no VLIW bundles"),
        (LOOP.replace("   0x4 ", "   0x7 "), "expected address 0x4"),
        (
            LOOP.replace("Start region", "Begin region").replace(
                "{ %s1_s0", "{ %1 = sbr.rel target = $region9 ;; %s1_s0"
            ),
            "unknown regions 2, 9",
        ),
        (TRANSFER.replace("/*size_in_granules=*/64, ", ""), "expected size_in_granules"),
        (TRANSFER.replace("[#allocation7 + $0x1], 64", "[#allocation7 + $0x1]"), "expected a flag and a size"),
    ],
)
def test_bundles_in_another_form_are_refused(text: str, message: str) -> None:
    with pytest.raises(UnknownDumpFormatError, match=message):
        Program(text)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    bundles, table = tmp_path / "1-op-02-final_bundles.txt", tmp_path / "1-op-00-utilization.txt"
    bundles.write_text(LOOP)
    table.write_text(UTILIZATION + "2 0 0\n" * 9 + "0 1 3\n")
    return bundles, table


def test_uses_are_weighed_by_executions(files: tuple[Path, Path]) -> None:
    actual = read_schedule("op", *files, timing=TIMING)
    assert (len(actual.counts), actual.cycles) == (10, 58)
    assert actual.unit_uses == {"MATMUL": 2 * 57, "VSTORE:SPILL": 1, "VLOAD:FILL": 3}
    assert actual.utilization("MATMUL") == pytest.approx(57 / 58)
    assert (actual.spill_count, actual.fill_count) == (1, 3)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("something else\n", "expected a capacity header"),
        (UTILIZATION + "2 0 0\n" * 9, "9 bundles, expected the 10 of 1-op-02-final_bundles.txt"),
        (UTILIZATION + "2 0\n" * 10, "expected 3 figures a line"),
    ],
)
def test_utilization_in_another_form_is_refused(files: tuple[Path, Path], table: str, message: str) -> None:
    files[1].write_text(table)
    with pytest.raises(UnknownDumpFormatError, match=message):
        read_schedule("op", *files, timing=TIMING)


TABLE = """
     0   :  { %s1_s1 = sld [smem:[#allocation12]]  ;;  %s2_s2 = int_to_ptr.smem [resolvable:$false] %s1_s1 }
   0x1   :  { %s3_s3 = reloc 0  ;;  %s8_s8 = smov.u32 1 } /* Start region 1 */
   0x2   :  { %s4_s4 = sld [smem:[%s2_s2 + %s3_s3]]  ;;  %s5_s5 = int_to_ptr.smem [resolvable:$false] %s4_s4 }
   0x3   :  { %s6_s6 = scalar_lea.smem %s5_s5, %s8_s8 }
   0x4   :  { %s7_s7 = sld [smem:[%s6_s6 + %s8_s8]] }
   0x5 LB: > { %s12_s1 = sphi 0, %s13_s2 /* phi copy */ } /* Start region 2 */
   0x6   : > { %s13_s2 = sadd.s32 1, %s12_s1 }
   0x7   : > { %p1_p0 = scmp.ge.s32.totalorder %s13_s2, %s7_s7 /* loop exit test */ }
   0x8   : > { %10 = sbr.rel (!%p1_p0) target = $region2 }
   0x9   : > {}
   0xa   : > {}
   0xb   : > {}
   0xc   : > {}
"""


def test_words_of_the_table_that_the_vector_unit_fills_decide_trips() -> None:
    assert execute(Program(TABLE), TIMING, {SMEM_TABLE: (0, 3, 11)}).counts[5] == 11
    assert execute(Program(TABLE), TIMING).unresolved == ("branch at 0x8",)


def test_a_long_loop_over_the_table_is_run_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offline_tpu.schedule.execute.SAMPLED_INSTRUCTIONS", 100)
    assert execute(Program(TABLE), TIMING, {SMEM_TABLE: (0, 3, 1000)}).counts[5] == pytest.approx(1000, rel=0.05)


def test_any_other_long_loop_is_run_in_part_too_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    text = TABLE.replace("%s7_s7 /* loop", "4000 /* loop")
    whole = execute(Program(text), TIMING)
    monkeypatch.setattr("offline_tpu.schedule.execute.LONG_INSTRUCTIONS", 5000)
    part = execute(Program(text), TIMING)
    assert part.counts[5] == pytest.approx(whole.counts[5], rel=0.01)
    assert part.stall_cycles == pytest.approx(whole.stall_cycles, rel=0.01)
    assert whole.unresolved == ()
    (note,) = part.unresolved
    assert note.startswith("its loop was run for 31.") and not note.endswith(RUN_IN_PART)
    (note,) = execute(Program(text), TIMING, {0: (1, 2, 3)}).unresolved  # what it is given may tell trips apart
    assert note.endswith(RUN_IN_PART)
