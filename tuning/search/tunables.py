"""List the configurations of a kernel that is no attention: the product of its tunables, less what is not valid."""

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

import numpy as np

from splash_workbench.errors import OF_USERS_CODE
from tuning.kernels import Kernel, KernelError, loading
from tuning.kernels.protocol import tunables
from tuning.search.space import Candidate, Candidates, listed
from tuning.trials.workloads import KernelCall

#: More are not listed, for each is looked at before the search.
_MOST = 1_000_000


@dataclasses.dataclass(frozen=True)
class TunableSpace:
    """Values of the tunables of a kernel; `first` names the default configuration, where it is among them.

    Raises KernelError for values that are none, or too many.
    """

    kernel: Kernel[Any, Any]
    choices: Mapping[str, tuple[Any, ...]]

    def __post_init__(self) -> None:
        known = tunables(self.kernel)
        for name, values in self.choices.items():
            if name not in known:
                raise KernelError(f"space.{name}: {self.kernel.name} has {', '.join(known)}.")
            if not values:
                raise KernelError(f"space.{name}=[]: expected one or more values.")
            loading.check_values(f"space.{name}", values)
        if (count := math.prod(map(len, self.choices.values()))) > _MOST:
            raise KernelError(f"space: {count} configurations, expected at most {_MOST}; give fewer values.")

    @property
    def name(self) -> str:
        """Return the name of the kernel, whose space it is."""
        return self.kernel.name

    @property
    def grows_with(self) -> tuple[str, ...]:
        """Return the tunables with which the need for VMEM grows."""
        return self.kernel.vmem_grows_with

    @property
    def fingerprint(self) -> str:
        """Return what a study's name is made from."""
        return json.dumps({name: list(values) for name, values in self.choices.items()}, sort_keys=True)

    @functools.cached_property
    def defaults(self) -> dict[str, Any]:
        """Return the parameters of the default configuration."""
        return dataclasses.asdict(self.kernel.Config())

    @property
    def first(self) -> tuple[Mapping[str, Any], ...]:
        """Return what to try before anything else."""
        inside = all(value in self.choices[name] for name, value in self.defaults.items())
        return (self.defaults,) if inside else ()

    def complete(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parameters with what they leave out."""
        return {name: parameters.get(name, self.defaults[name]) for name in self.choices}

    def candidate_of(self, parameters: Mapping[str, Any]) -> Candidate:
        """Return the candidate of parameters. Raises ValueError where Config refuses them."""
        return Candidate(None, self.kernel.Config(**parameters))

    def parameters_of(self, candidate: Candidate) -> dict[str, Any]:
        """Return the parameters of a candidate."""
        return candidate.options

    def candidates(self, call: KernelCall, vmem_limit_bytes: int | None = None) -> Candidates:
        """Return the configurations that the kernel calls valid for a workload. Raises KernelError where it fails."""
        del vmem_limit_bytes  # the compiler says what does not fit
        workload = self.kernel.Workload(**call.sizes)
        return listed(self.choices, lambda parameters: self._candidate_or_reason(parameters, workload))

    def _candidate_or_reason(self, parameters: Mapping[str, Any], workload: Any) -> Candidate | str:
        """Return the candidate of parameters, or why it is left out."""
        try:
            candidate = self.candidate_of(parameters)
        except (ValueError, NotImplementedError, AssertionError) as error:
            return f"not a configuration: {str(error) or 'an assertion of Config'}"
        except OF_USERS_CODE as error:
            raise KernelError(f"{self.name}.Config(**{parameters}): {type(error).__name__}: {error}") from error
        try:
            verdict = self.kernel.is_valid(candidate.variant, workload)
        except OF_USERS_CODE as error:
            what = f"{self.name}.is_valid({candidate.variant})"
            raise KernelError(f"{what}: {type(error).__name__}: {error}") from error
        if isinstance(verdict, str):
            return verdict
        if not isinstance(verdict, bool | np.bool_):
            what = f"{self.name}.is_valid({candidate.variant}) returns {verdict!r}"
            raise KernelError(f"{what}: expected True, False, or a text that says why not.")
        return candidate if verdict else "refused by is_valid"


def call_of(kernel: Kernel[Any, Any], given: Mapping[str, Any]) -> KernelCall:
    """Return a kernel's workload with the fields given. Raises KernelError for one that is not a field, or missing."""
    fields = {field.name: field for field in dataclasses.fields(kernel.Workload) if field.init}
    sizes = dict(given)
    for name, value in given.items():
        if name not in fields:
            raise KernelError(f"workload.{name}: {kernel.name}.Workload has {', '.join(fields)}.")
        expected = _types_of(kernel.Workload, fields[name])
        if float in expected and type(value) is int:
            sizes[name] = float(value)
        elif expected and type(value) not in expected:
            kinds = " or ".join("None" if kind is types.NoneType else kind.__name__ for kind in expected)
            default = fields[name].default
            like = "" if default is dataclasses.MISSING else f", as {default!r}"
            raise KernelError(f"workload.{name}={value!r}: expected {kinds}{like}.")
    optional = {n for n, f in fields.items() if not (f.default is f.default_factory is dataclasses.MISSING)}
    if missing := [name for name in fields if name not in given and name not in optional]:
        raise KernelError(f"workload.{missing[0]}: expected a value; {kernel.name}.Workload has no default for it.")
    try:
        workload = kernel.Workload(**sizes)
    except OF_USERS_CODE as error:
        kind = "" if isinstance(error, ValueError | TypeError) else f"{type(error).__name__}: "
        raise KernelError(f"workload: {kind}{str(error) or 'refused'}") from error
    return KernelCall(kernel.name, loading.sizes_of(kernel, workload))


def _types_of(workload: type, field: dataclasses.Field[Any]) -> tuple[type, ...]:
    """Return the types of a field by its annotation, or by its default where that names none; empty: any."""
    try:
        kind = typing.get_type_hints(workload)[field.name]
    except (NameError, TypeError, KeyError):
        kind = None if field.default is dataclasses.MISSING else type(field.default)
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    return kinds if all(isinstance(each, type) and not typing.get_origin(each) for each in kinds) else ()
