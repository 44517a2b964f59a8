"""Dumps of programs of some lines, as the compiler would leave them."""

from pathlib import Path

from offline_tpu import archive

_OP = """  %x.{next} = f32[7,128]{{1,0:T(8,128)}} custom-call(%x.{number}), custom_call_target="tpu_custom_call"
"""
_KERNEL = """
     0   :  {{ %s1_s0 = smov.u32 1 }}
   0x1   :  {{ %s2_s1 = scalar_lea.sflag [#allocation7], %s1_s0 }}
   0x2   :  {{ %9 = dma.hbm_to_{memory} [thread:$0]  /*hbm=*/%s8_s3, /*size_in_granules=*/{granules}, \
/*{memory}=*/%s9_s4, /*dst_syncflagno=*/%s2_s1 /* base_bounds: (1) */ }}
{beside}
   {wait:#x}   :  {{ %12 = dma.done.wait [#allocation7 + $0x1], {granules} /* pipeline-emitter-dma-wait */ }}
{after}"""


def keep(
    path: Path, *, ops: int = 1, granules: int = 64, memory: str = "vmem", beside: int = 1, after: int = 1
) -> Path:
    """Keep a program of so many calls of a kernel: a DMA of granules, bundles beside it, a wait, and bundles after it.

    Args:
      memory: where the DMA goes from HBM, vmem or smem.
    """
    folder = path.with_suffix(".dump")
    folder.mkdir(parents=True)
    calls = "".join(_OP.format(number=number, next=number + 1) for number in range(ops))
    module = f"HloModule jit_f, is_scheduled=true\n\nENTRY %main (x.0: f32[7,128]) -> f32[7,128] {{\n\
  %x.0 = f32[7,128]{{1,0:T(8,128)}} parameter(0)\n{calls}}}\n".replace(f"  %x.{ops} =", f"  ROOT %x.{ops} =")
    (folder / "0-TLP-hlo.txt").write_text(module)
    wait = 3 + beside
    length = wait + 1 + after
    kernel = _KERNEL.format(
        memory=memory,
        granules=granules,
        wait=wait,
        beside="\n".join(f"   {address:#x}   :  {{}}" for address in range(3, wait)),
        after="".join(f"   {address:#x}   :  {{}}\n" for address in range(wait + 1, length)),
    )
    (folder / "1-x.1-02-final_bundles.txt").write_text(kernel)
    table = "== CAPACITY\nMATMUL, VSTORE:SPILL, VLOAD:FILL\n2 1 3\n== UTILIZATION\n" + "0 0 0\n" * length
    (folder / "1-x.1-00-per-bundle-utilization.txt").write_text(table)
    (folder / "0-vmem_report.html").write_text('DATA = {"hlo_breakdowns": {}}')
    archive.pack(folder, archive.Facts([[0, 0, 0]], 1, 1, 1.0, 1.0), path)
    return path
