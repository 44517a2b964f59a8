"""Outcomes of jobs on disk, so that the same compilation is never paid for twice.

Kept are results and the failures that would come again (`STATUSES`), of jobs that time nothing: a time that was
measured is never taken from a cache.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from splash_workbench.errors import UserError
from splash_workbench.files import atomic_path
from splash_workbench.provenance import CACHE_VARIABLE, user_cache_dir
from splash_workbench.status import Status
from splash_workbench.workers.pool import Outcome

#: A time limit says something of the machine, and a crash may be of another making.
STATUSES = frozenset({Status.OK, Status.WRONG, Status.OUT_OF_MEMORY, Status.COMPILE_ERROR})


class JobCache:
    """One JSON file an outcome, named by a hash of everything that it depends on.

    Args:
      directory: made if absent.

    Raises:
      UserError: nothing can be written there.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cache=true: cannot write to {directory} ({error.strerror}); set ${CACHE_VARIABLE} to a folder, or "
                "cache=false."
            ) from error

    @classmethod
    def of_user(cls, enabled: bool) -> Self | None:
        """The cache in $COGVIDEOX_SPLASH_CACHE or the user's cache folder; None where it is switched off."""
        return cls(user_cache_dir() / "tuning") if enabled else None

    @property
    def numerics_dir(self) -> Path:
        """For the outcomes of numerics checks, which several jobs can share."""
        return self._directory / "numerics"

    @staticmethod
    def key(target: str, payload: Mapping[str, Any], dependencies: Mapping[str, Any]) -> str:
        """Of a job: its name, its argument, and versions, flags and source hashes."""
        text = json.dumps([target, payload, dependencies], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def outcome(self, key: str, run: Callable[[], Outcome]) -> tuple[Outcome, bool]:
        """The stored outcome, or that of `run`, stored if it would come again; and whether it was there."""
        try:
            stored = json.loads(self._path(key).read_text())
            return Outcome(Status(stored["status"]), stored["result"], stored["error"], "", 0.0), True
        except (FileNotFoundError, json.JSONDecodeError):  # absent, or torn by a disk that was full
            pass
        outcome = run()
        if outcome.status in STATUSES:
            self._put(key, {"status": outcome.status, "result": outcome.result, "error": outcome.error})
        return outcome, False

    def _put(self, key: str, stored: Mapping[str, Any]) -> None:
        """Whole or not at all, whatever else writes at the same time."""
        with atomic_path(self._path(key)) as temporary:
            temporary.write_text(json.dumps(stored))

    def _path(self, key: str) -> Path:
        return self._directory / f"{key}.json"
