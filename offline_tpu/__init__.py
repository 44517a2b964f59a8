# ruff: noqa: E402
"""Predicts what JAX functions cost on a TPU that is not here, from the schedule that libtpu makes for it."""

from splash_workbench.startup import quit_on_interrupt

quit_on_interrupt()  # what is imported next takes seconds

from offline_tpu.collectives import Collective as Collective
from offline_tpu.compile import predict as predict
from offline_tpu.compile import trace as trace
from offline_tpu.libtpu import SOURCES as SOURCES
from offline_tpu.libtpu import SUPPORTED_LIBTPU as SUPPORTED_LIBTPU
from offline_tpu.libtpu import capture as capture
from offline_tpu.libtpu import check_setup as check_setup
from offline_tpu.libtpu import topology_mesh as topology_mesh
from offline_tpu.libtpu import worker_environment as worker_environment
from offline_tpu.machine.errors import UnknownDumpFormatError as UnknownDumpFormatError
from offline_tpu.options import CompilerOptionError as CompilerOptionError
from offline_tpu.prediction import Loop as Loop
from offline_tpu.prediction import OpCost as OpCost
from offline_tpu.prediction import Prediction as Prediction
