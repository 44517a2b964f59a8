"""The commands, for tests of what they have in common."""

import importlib
from collections.abc import Callable

from splash_workbench.provenance import REPO_ROOT

#: Module -> an argument with a value that is wrong. Those that Hydra configures take key=value.
HYDRA_COMMANDS = {
    "tuning.sweep": "workers=many",
    "tuning.results": "top=many",
    "tuning.choose": "workload.head_dim=wide",
    "tuning.peers": "timeout_s=long",
    "tuning.hparams": "workload=nope",
    "tuning.validate": "reuse=perhaps",
    "tuning.report": "top=0",
    "tuning.selfcheck": "resume=perhaps",
    "pipeline.generate": "height=tall",
    "pipeline.predict": "timeout_s=long",
    "pipeline.tune": "workers=many",
    "pipeline.quality": "seeds=[one]",
    "pipeline.calibrate": "num_inference_steps=many",
    "pipeline.quantize": "output=weights.bin",
    "pipeline.train_tiny": "vae.steps=many",
}
FLAG_COMMANDS = {
    "tuning.compare": "--depth=deep",
    "pipeline.predict_table": "no-such-file",
    "offline_tpu": "no-such:function",
    "tuning.validate.fit": "--set=many",
    "tuning.validate.residuals": "no-such-file",
}
COMMANDS = HYDRA_COMMANDS | FLAG_COMMANDS


def main_of(module: str) -> Callable[[], int]:
    """Return the entry point of a command."""
    is_folder = (REPO_ROOT / module.replace(".", "/")).is_dir()
    return importlib.import_module(f"{module}.__main__" if is_folder else module).main
