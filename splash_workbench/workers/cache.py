"""Keep outcomes of jobs on disk, so that the same compilation is never paid for twice.

Kept are the conclusive ones, of jobs that time nothing: a time that was measured is never taken from a cache.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from splash_workbench.files import atomic_path
from splash_workbench.provenance import CACHE_VARIABLE, user_cache_dir
from splash_workbench.records.jsonl import decode
from splash_workbench.workers.pool import Outcome


class JobCache:
    """One JSON file an outcome, named by a hash of everything that it depends on.

    It never fails its caller: an entry that cannot be read is made again, and one that cannot be written is left out;
    `trouble` then says why, in a line for the user.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.trouble: str | None = None

    @classmethod
    def of_user(cls, enabled: bool) -> Self | None:
        """Return the cache in $COGVIDEOX_SPLASH_CACHE or the user's cache folder; None where it is switched off."""
        return cls(user_cache_dir() / "tuning") if enabled else None

    @staticmethod
    def key(target: str, payload: Mapping[str, Any], dependencies: Mapping[str, Any]) -> str:
        """Return the name of a job's outcome, from the job's name, its argument, and versions, flags and hashes."""
        text = json.dumps([target, payload, dependencies], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def outcome(
        self, key: str, run: Callable[[], Outcome], accept: Callable[[Outcome], object] = lambda outcome: None
    ) -> tuple[Outcome, bool]:
        """Return the stored outcome, or that of `run`, stored if it is conclusive; and whether it was there.

        accept: raises ValueError for a stored outcome that cannot be one of this job; it is made again.
        """
        path = self.directory / f"{key}.json"
        try:
            outcome = decode(json.loads(path.read_bytes()), Outcome)
            accept(outcome)
            if outcome.status.conclusive:
                return outcome, True
        except (OSError, ValueError, RecursionError):  # absent, torn by a full disk, or not ours
            pass
        outcome = run()
        if outcome.status.conclusive:
            try:
                with atomic_path(path) as temporary:
                    stored = {"status": outcome.status, "result": outcome.result, "error": outcome.error}
                    temporary.write_text(json.dumps(stored))
            except OSError as error:
                self.trouble = (
                    f"cache: {path}: {error.strerror}; what was compiled is not kept there: remove it"
                    if path.is_dir()
                    else f"cache: cannot write to {self.directory} ({error.strerror}): what is compiled is not kept; "
                    f"set ${CACHE_VARIABLE} to a folder with space, or reuse=false"
                )
        return outcome, False
