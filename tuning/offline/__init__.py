"""The device that is not here: compile for a TPU topology with libtpu and read the compiler's own schedule."""

from tuning.offline.collectives import Collective as Collective
from tuning.offline.cost import OpCost as OpCost
from tuning.offline.cost import Prediction as Prediction
from tuning.offline.errors import UnknownDumpFormatError as UnknownDumpFormatError
from tuning.offline.topology import SUPPORTED_LIBTPU as SUPPORTED_LIBTPU
from tuning.offline.topology import predict as predict
from tuning.offline.topology import topology_mesh as topology_mesh
from tuning.offline.topology import worker_environment as worker_environment
