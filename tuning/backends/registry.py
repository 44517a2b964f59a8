"""All backends by name."""

from tuning.backends.interpret import INTERPRET
from tuning.backends.measure import MEASURE
from tuning.backends.offline import OFFLINE

BACKENDS = {backend.name: backend for backend in (OFFLINE, MEASURE, INTERPRET)}
