"""The vendored messages beside those of other packages in one process."""

import subprocess
import sys

import pytest

from splash_workbench.profiles import xla_pb2
from splash_workbench.provenance import REPO_ROOT

OTHERS = ("tensorboard.compat.proto.event_pb2", "xprof.protobuf.op_metrics_pb2", "xprof.protobuf.hlo_stats_pb2")


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_no_clash_in_the_process_wide_pool(first: str) -> None:
    for name in OTHERS:
        pytest.importorskip(name)
    names = ["splash_workbench.profiles.xla_pb2", *OTHERS]
    code = "import " + ", ".join(names if first == "ours" else reversed(names))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=REPO_ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_clash_with_the_names_of_xla_and_tensorflow() -> None:
    from google.protobuf import descriptor_pb2, descriptor_pool

    pool = descriptor_pool.Default()
    for file, package, message in (
        ("xla/service/hlo.proto", "xla", "HloModuleProto"),
        ("xla/tsl/profiler/protobuf/xplane.proto", "tensorflow.profiler", "XSpace"),
    ):
        theirs = descriptor_pb2.FileDescriptorProto(name=file, package=package, syntax="proto3")
        theirs.message_type.add(name=message)
        try:
            pool.FindFileByName(file)
        except KeyError:
            pool.Add(theirs)
        assert pool.FindMessageTypeByName(f"{package}.{message}") is not None
    assert xla_pb2.XSpace.DESCRIPTOR.full_name == "splash_workbench.xla.XSpace"
