"""The autotuner: sweeps, predictions, measurements and their records."""

from splash_workbench.startup import quit_on_interrupt

quit_on_interrupt()
