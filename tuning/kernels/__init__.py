"""Kernels that can be tuned: what one must say of itself, ours, and the peers."""

from tuning.kernels.protocol import Kernel as Kernel
from tuning.kernels.protocol import KernelError as KernelError
from tuning.kernels.protocol import Unrolled as Unrolled
from tuning.kernels.protocol import compiler_option as compiler_option
from tuning.kernels.protocol import one_of as one_of
