"""Fields that all records of the pipeline have: when, where and from which sources, and for which video."""

import datetime
import uuid
from collections.abc import Mapping
from typing import Any

import msgspec

from splash_workbench.provenance import Environment
from splash_workbench.records.jsonl import decode
from splash_workbench.trial_status import Label


def utc_now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def new_id() -> str:
    """Return a fresh record_id."""
    return uuid.uuid4().hex


class Video(msgspec.Struct, frozen=True):
    """The part of a request that decides how much work a video is."""

    checkpoint: str
    width: int
    height: int
    num_frames: int
    num_inference_steps: int

    @property
    def size(self) -> str:
        """Width, height and frames, e.g. "1280x720x81"."""
        return f"{self.width}x{self.height}x{self.num_frames}"

    def __str__(self) -> str:
        steps = f"{self.num_inference_steps} step{'s' if self.num_inference_steps != 1 else ''}"
        return f"{self.width}x{self.height}, {self.num_frames} frames, {steps}"


class Devices(msgspec.Struct, frozen=True):
    """The devices of a run, as JAX names and counts them."""

    platform: str
    kind: str
    count: int

    def __str__(self) -> str:
        return f"{self.count} x {self.kind}"


class PipelineRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of every record of the pipeline; `request` is the whole request, as its own dataclass writes it."""

    created_at: str = msgspec.field(default_factory=utc_now)
    label: Label
    environment: Environment
    request: dict[str, Any]

    @property
    def video(self) -> Video:
        """The video that was asked for."""
        return decode(self.request, Video)

    @classmethod
    def upgrade(cls, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the fields of an earlier schema, which had "versions" and "git" for an environment, as today's."""
        if "environment" in fields or "versions" not in fields:
            return fields
        git = fields.get("git") or {"commit": None, "dirty": False}
        environment = {
            "versions": fields["versions"],
            "flags": {},
            "git_commit": git["commit"],
            "git_dirty": git["dirty"],
            "kernel_hash": "",
            "backend_hash": "",
            "host": fields.get("host", ""),
            "cpu_count": 0,
        }
        return {**fields, "environment": environment}
