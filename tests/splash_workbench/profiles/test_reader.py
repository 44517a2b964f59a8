"""The reader against xplanes that jaxlib serializes from text, and against a profile of this machine."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.profiler import ProfileData

from splash_workbench.profiles import reader
from splash_workbench.profiles.scopes import named_scope
from splash_workbench.profiles.xla_pb2 import HloModuleProto, HloProto, XSpace

DEVICE = """
planes {
  name: "/device:TPU:0"
  lines { name: "Steps" timestamp_ns: 7
    events { metadata_id: 1 offset_ps: 0 duration_ps: 1000500 }
    events { metadata_id: 2 offset_ps: 1001000 duration_ps: 900000 }
  }
  lines { name: "XLA Modules" timestamp_ns: 7 events { metadata_id: 6 offset_ps: 0 duration_ps: 990000 } }
  lines { name: "XLA Ops" timestamp_ns: 7
    events { metadata_id: 3 offset_ps: 500 duration_ps: 900000 }
    events { metadata_id: 4 offset_ps: 1500 duration_ps: 600250 }
    events { metadata_id: 5 offset_ps: 700000 duration_ps: 100000 }
    events { metadata_id: 4 offset_ps: 1100000 duration_ps: 500000 }
  }
  lines { name: "Async XLA Ops" events { metadata_id: 5 offset_ps: 0 duration_ps: 900000 } }
  event_metadata { key: 1 value { id: 1 name: "1" } }
  event_metadata { key: 2 value { id: 2 name: "2" } }
  event_metadata { key: 3 value { id: 3 name: "%while.3 = (f32[]) while()" } }
  event_metadata { key: 4 value { id: 4 name: "%custom-call.2 = f32[8]{0} custom-call()" display_name: "custom-call.2"
    stats { metadata_id: 1 str_value: "jit(step)/denoise/blocks/while/body/closed_call/attention/pallas_call:" }
    stats { metadata_id: 2 ref_value: 3 } } }
  event_metadata { key: 5 value { id: 5 name: "copy.1" } }
  event_metadata { key: 6 value { id: 6 name: "jit_step(42)" } }
  stat_metadata { key: 1 value { id: 1 name: "tf_op" } }
  stat_metadata { key: 2 value { id: 2 name: "hlo_category" } }
  stat_metadata { key: 3 value { id: 3 name: "custom-call" } }
}
planes {
  name: "/device:TPU:0 SparseCore 1"
  lines { name: "XLA Ops" events { metadata_id: 1 offset_ps: 0 duration_ps: 77 } }
  event_metadata { key: 1 value { id: 1 name: "gather" } }
}
"""


def write(tmp_path: Path, text: str, host: str = "vm") -> Path:
    path = tmp_path / f"{host}{reader.SUFFIX}"
    path.write_bytes(ProfileData.text_proto_to_serialized_xspace(text))
    return path


def test_device_plane(tmp_path):
    profile = reader.read(write(tmp_path, DEVICE, "host-1"))
    assert (profile.host, profile.planes, profile.on_device) == ("host-1", ("/device:TPU:0",), True)
    assert not profile.predicted
    loop, first, copy, second = profile.ops
    assert (loop.name, loop.self_ps, loop.duration_ps) == ("while.3", 0, 900_000)  # its ops have its time
    assert (first.name, first.scope, first.opcode) == ("custom-call.2", "denoise/blocks/attention", "custom-call")
    assert (first.start_ps, first.duration_ps, first.self_ps) == (8500, 600_250, 600_250)  # not rounded to ns
    assert (copy.name, copy.scope) == ("copy.1", "")
    assert profile.seconds_by_scope() == {"denoise/blocks/attention": 1.10025e-6, "": 1e-7}
    assert [(step.number, len(ops)) for step, ops in profile.ops_by_step()] == [(1, 3), (2, 1)]
    assert [step.duration_ps for step in profile.steps] == [1_000_500, 900_000]
    assert [(module.program, module.duration_ps) for module in profile.modules] == [("jit_step", 990_000)]
    assert profile.matching("attention") == (first, second)


def test_several_planes_are_averaged(tmp_path):
    profile = reader.read(write(tmp_path, DEVICE + DEVICE.replace("TPU:0", "TPU:1")))
    assert profile.planes == ("/device:TPU:0", "/device:TPU:1")
    assert profile.seconds_by_scope() == {"denoise/blocks/attention": 1.10025e-6, "": 1e-7}
    assert [module.plane for module in profile.modules] == ["/device:TPU:0", "/device:TPU:1"]


@pytest.mark.parametrize(
    ("op_name", "expected"),
    [
        ("jit(step)/blocks/while/body/closed_call/attention/dot_general", "blocks/attention"),
        ("jit(step)/blocks/while/body/eval_jaxpr/attention/dot_general", "blocks/attention"),
        ("jit(f)/shard_map/blocks/checkpoint/qkv/bsc,hdc->bhds/dot_general", "blocks/qkv"),
        ("jit(f)/attention/jit(_where)/select_n;jit(f)/other/add", "attention"),
        ("jit(f)/cond/branch_1_fun/norm/mul:", "norm"),
        ("jit(f)/add", ""),
        ("weights['x']", ""),
        ("", ""),
    ],
)
def test_named_scope(op_name, expected):
    assert named_scope(op_name) == expected


def hlo(scope: str) -> bytes:
    module = HloModuleProto(name="jit_step")
    computation = module.computations.add(name="main", id=1)
    for name, opcode in (("dot.1", "dot"), ("add.2", "add"), ("while.3", "while")):
        computation.instructions.add(name=name, opcode=opcode, metadata={"op_name": f"jit(step)/{scope}/x"})
    computation.instructions.add(name="fusion.4", opcode="fusion", called_computation_ids=[1])
    return HloProto(hlo_module=module).SerializeToString()


def host_space(program_id: int, scopes: dict[int, str]):
    """Ops of program `program_id` on two threads, and the HLO of programs by their id."""
    space = XSpace()
    metadata = space.planes.add(name="/host:metadata")
    metadata.stat_metadata[1].name = "Hlo Proto"
    for number, scope in scopes.items():
        metadata.event_metadata[number].name = f"jit_step({number})"
        metadata.event_metadata[number].stats.add(metadata_id=1, bytes_value=hlo(scope))
    plane = space.planes.add(name="/host:CPU")
    for number, name in enumerate(("hlo_op", "hlo_module", "program_id", "_p", "_c"), start=1):
        plane.stat_metadata[number].name = name
    threads = [plane.lines.add(name=name) for name in ("one", "two")]

    def begin(thread: int, op: str, start: int, duration: int, flow: int) -> None:
        number = len(plane.event_metadata) + 1
        plane.event_metadata[number].name = op
        event = threads[thread].events.add(metadata_id=number, offset_ps=start, duration_ps=duration)
        event.stats.add(metadata_id=1, str_value=op)
        event.stats.add(metadata_id=2, str_value="jit_step")
        event.stats.add(metadata_id=3, int64_value=program_id)
        event.stats.add(metadata_id=4, uint64_value=flow)

    def end(thread: int, op: str, start: int, flow: int) -> None:
        number = len(plane.event_metadata) + 1
        plane.event_metadata[number].name = f"end: {op}"
        event = threads[thread].events.add(metadata_id=number, offset_ps=start, duration_ps=1)
        event.stats.add(metadata_id=5, uint64_value=flow)

    begin(0, "while.3", 0, 1000, flow=1)
    begin(0, "dot.1", 100, 50, flow=2)  # returns at once, goes on in other threads
    end(1, "dot.1", 500, flow=2)
    begin(1, "add.2", 300, 300, flow=3)
    end(1, "add.2", 600, flow=3)
    begin(1, "fusion.4", 700, 100, flow=4)
    return space


def test_cpu_ops_last_to_their_end_and_share_the_time_in_which_they_overlap():
    profile = reader.from_space(host_space(7, {7: "blocks"}), "vm")
    found = {op.name: (op.opcode, op.scope, op.duration_ps, op.self_ps) for op in profile.ops}
    assert found == {
        "while.3": ("while", "blocks", 1000, 0),
        "dot.1": ("dot", "blocks", 400, 300),  # alone from 100 to 300, then one of two
        "add.2": ("add", "blocks", 300, 200),
        "fusion.4": ("fusion", "blocks", 100, 100),  # has no scope itself: that of the ops in it
    }
    assert profile.seconds_by_scope() == {"blocks": 600e-12}


def test_a_program_out_of_the_compilation_cache_runs_under_another_number():
    profile = reader.from_space(host_space(3, {7: "blocks"}), "vm")
    assert {op.scope for op in profile.ops} == {"blocks"}
    ambiguous = reader.from_space(host_space(3, {7: "blocks", 8: "other"}), "vm")
    assert {op.scope for op in ambiguous.ops} == {""}


def test_profile_of_this_machine(tmp_path):
    def layer(x, weights):
        with jax.named_scope("attention"):
            x = jax.nn.softmax(x @ x.T) @ x
        with jax.named_scope("feed_forward"):
            return jnp.tanh(x @ weights), None

    def step(x, weights):
        with jax.named_scope("blocks"):
            return lax.scan(layer, x, weights)[0]

    x, weights = jnp.ones((131, 67)), jnp.ones((3, 67, 67))
    compiled = jax.jit(step).lower(x, weights).compile()
    options = jax.profiler.ProfileOptions()
    options.session_id, options.python_tracer_level = "run", 0
    with jax.profiler.trace(tmp_path, profiler_options=options):
        for number in range(2):
            with jax.profiler.StepTraceAnnotation("denoise", step_num=number):
                compiled(x, weights).block_until_ready()
    (path,) = (tmp_path / "plugins" / "profile" / "run").glob(f"*{reader.SUFFIX}")
    profile = reader.read(path)
    assert profile.planes == ("/host:CPU",) and not profile.on_device
    assert [(step.name, step.number) for step in profile.steps] == [("denoise", 0), ("denoise", 1)]
    seconds = profile.seconds_by_scope()
    assert {"blocks/attention", "blocks/feed_forward"} <= set(seconds)
    for step, ops in profile.ops_by_step():
        scopes = [op.scope for op in ops]
        assert scopes.count("blocks/attention") >= 3, step  # one of each layer at least
        assert scopes.count("blocks/feed_forward") >= 3, step


@pytest.mark.parametrize("content", [b"\xff\xff not a message", b""])
def test_what_is_no_xplane(content, tmp_path):
    path = tmp_path / "x.xplane.pb"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.xplane\.pb: expected an xplane"):
        reader.read(path)
