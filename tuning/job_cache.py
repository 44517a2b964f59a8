"""Results of jobs on disk, so that the same compilation is never paid for twice."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuning.environment import stable_hash


class JobCache:
    """One JSON file a result, named by a hash of everything that the result depends on.

    Args:
      directory: made when the first result is stored.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def key(self, target: str, payload: Mapping[str, Any], dependencies: Mapping[str, Any]) -> str:
        """Of a job: its name, its argument, and versions, flags and source hashes."""
        return stable_hash(json.dumps([target, payload, dependencies], sort_keys=True, default=str))

    def get(self, key: str) -> dict[str, Any] | None:
        """The stored result, None where there is none."""
        try:
            return json.loads(self._path(key).read_text())
        except FileNotFoundError:
            return None

    def put(self, key: str, result: Mapping[str, Any]) -> None:
        """Stores a result: whole or not at all, whatever else writes at the same time."""
        self._directory.mkdir(parents=True, exist_ok=True)
        temporary = self._path(key).with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(result))
        temporary.replace(self._path(key))

    def _path(self, key: str) -> Path:
        return self._directory / f"{key}.json"
