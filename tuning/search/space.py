"""List the candidates of a sweep: the product of the listed values, less those that cannot be valid."""

import collections
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

from splash_attn.kernel import vmem_bytes_estimate
from splash_attn.tuned import fit_block_q
from splash_attn.types import LANES, AttentionShape, BlockSizes, Variant
from tuning.trials.records import VARIANT_PREFIX, config_key
from tuning.trials.workloads import Workload

_BLOCK_FIELDS = tuple(field.name for field in dataclasses.fields(BlockSizes))


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a kernel: block sizes and variant of an attention, or the configuration of another kernel."""

    block_sizes: BlockSizes | None
    variant: Any

    @functools.cached_property
    def key(self) -> str:
        """Return the same string for the same candidate, in every process."""
        return config_key(self.block_sizes, self.options)

    @property
    def options(self) -> dict[str, Any]:
        """Return the variant or configuration as a record has it."""
        return dataclasses.asdict(self.variant)


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The candidates of a space to search for one workload, and how many were left out by reason."""

    valid: tuple[Candidate, ...]
    pruned: dict[str, int]


def listed(
    choices: Mapping[str, tuple[Any, ...]], candidate_or_reason: Callable[[dict[str, Any]], Candidate | str]
) -> Candidates:
    """Return the candidates of all combinations of values; where a text stands for one, it says why it is left out."""
    valid: dict[str, Candidate] = {}
    pruned: collections.Counter[str] = collections.Counter()
    for values in itertools.product(*choices.values()):
        found = candidate_or_reason(dict(zip(choices, values, strict=True)))
        if isinstance(found, str):
            pruned[found] += 1
        else:
            valid.setdefault(found.key, found)
    return Candidates(tuple(valid.values()), dict(pruned.most_common()))


@dataclasses.dataclass(frozen=True)
class Space:
    """Listed values of every parameter ("block_q", "variant.softmax", ...), and which candidates to try first.

    first: parameters of the candidates to try before any other; what they leave out has its default. max_block_scores:
    largest min(unroll_q, block_q) * block_kv, which is unrolled: more takes minutes to compile.

    Raises ValueError for a parameter that is unknown, a list that is empty or repeats itself, or a value not listed.
    """

    name: str
    choices: Mapping[str, tuple[Any, ...]]
    first: tuple[Mapping[str, Any], ...] = ()
    max_block_scores: int | None = None
    #: Parameters with which the need for VMEM grows.
    grows_with: ClassVar[tuple[str, ...]] = ("block_q", "block_kv")

    def __post_init__(self) -> None:
        variant_fields = tuple(VARIANT_PREFIX + field.name for field in dataclasses.fields(Variant))
        for parameter, values in self.choices.items():
            if parameter not in _BLOCK_FIELDS + variant_fields:
                raise ValueError(f"space.{parameter}: expected one of {', '.join(_BLOCK_FIELDS + variant_fields)}.")
            if not values or len(set(values)) != len(values):
                raise ValueError(f"space.{parameter}={list(values)}: expected one or more values, each once.")
        for parameter in _BLOCK_FIELDS:
            if parameter not in self.choices:
                raise ValueError(f"space.{parameter}: expected a list of block sizes, got none.")
            for value in self.choices[parameter]:
                if not isinstance(value, int) or value < LANES or value % LANES:
                    raise ValueError(f"space.{parameter}={value!r}: expected a positive multiple of {LANES}.")
        if self.max_block_scores is not None and self.max_block_scores < 1:
            raise ValueError(f"space.max_block_scores={self.max_block_scores}: expected a positive number, or null.")
        for parameter, value in (named for parameters in self.first for named in self.complete(parameters).items()):
            if value not in self.choices[parameter]:
                raise ValueError(f"space.first {parameter}={value!r}: expected one of {list(self.choices[parameter])}.")

    @property
    def fingerprint(self) -> str:
        """Return what a study's name is made from; `first` and the name do not change what is searched."""
        choices = {name: list(values) for name, values in self.choices.items()}
        return json.dumps(choices | {"max_block_scores": self.max_block_scores}, sort_keys=True)

    def complete(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parameters with what they leave out: the default of Variant where listed, else the first value.

        Raises ValueError for a parameter that is not one of this space.
        """
        if unknown := set(parameters) - set(self.choices):
            raise ValueError(f"space.first {', '.join(sorted(unknown))}: expected {', '.join(self.choices)}.")
        defaults = {VARIANT_PREFIX + name: value for name, value in Variant().to_dict().items()}
        return {
            name: parameters.get(name, defaults[name] if defaults.get(name) in values else values[0])
            for name, values in self.choices.items()
        }

    def candidate_of(self, parameters: Mapping[str, Any]) -> Candidate:
        """Return the candidate of parameters. Raises ValueError where BlockSizes or Variant refuses them."""
        blocks = {name: parameters[name] for name in _BLOCK_FIELDS}
        variant = {name.removeprefix(VARIANT_PREFIX): parameters[name] for name in parameters if name not in blocks}
        return Candidate(BlockSizes(**blocks), Variant.from_dict(variant))

    def parameters_of(self, candidate: Candidate) -> dict[str, Any]:
        """Return the parameters of a candidate that the space lists, so that `candidate_of` gives it back."""
        variant = candidate.variant.to_dict()
        assert candidate.block_sizes is not None
        values = dataclasses.asdict(candidate.block_sizes) | {VARIANT_PREFIX + name: variant[name] for name in variant}
        return {name: values[name] for name in self.choices}

    def candidates(self, workload: Workload, vmem_limit_bytes: int | None = None) -> Candidates:
        """Return every candidate that is worth compiling for a workload, in the space's order.

        vmem_limit_bytes: VMEM of one core; None leaves out the estimate.
        """
        return listed(self.choices, lambda named: self._candidate_or_reason(named, workload, vmem_limit_bytes))

    def _candidate_or_reason(
        self, parameters: Mapping[str, Any], workload: Workload, vmem_limit_bytes: int | None
    ) -> Candidate | str:
        """Return the candidate of parameters, or why it is left out, in words that group."""
        if parameters["block_kv"] % parameters["block_kv_compute"]:
            return "block_kv_compute does not divide block_kv"
        try:
            candidate = self.candidate_of(parameters)
        except (ValueError, NotImplementedError) as error:
            return f"not a kernel: {error}"
        blocks, unroll_q = candidate.block_sizes, candidate.variant.unroll_q
        assert blocks is not None
        # A block longer than the sequence is the same kernel as the block clamped to it, only with more padding.
        if blocks.block_kv >= workload.shape.kv_seq_len + blocks.block_kv_compute:
            return "block_kv longer than the padded kv sequence"
        if unroll_q is not None and unroll_q >= blocks.block_q:
            return "unroll_q is all of block_q, as with null"
        limit = self.max_block_scores
        if limit is not None and (unroll_q or blocks.block_q) * blocks.block_kv > limit:
            return "more scores unrolled than space.max_block_scores"
        vmem_bytes = vmem_bytes_estimate(workload.shape, blocks, candidate.variant, workload.itemsize)
        if vmem_limit_bytes is not None and vmem_bytes > vmem_limit_bytes:
            return "VMEM estimate over the device's"
        return candidate

    def fitted_to(self, shape: AttentionShape) -> Self:
        """Return the space with each block_q the smallest that needs no more blocks; see `tuned.fit_block_q`."""

        def fitted(parameters: Mapping[str, Any]) -> dict[str, Any]:
            block_q = parameters.get("block_q")
            return dict(parameters) | ({"block_q": fit_block_q(block_q, shape.q_seq_len)} if block_q else {})

        block_q = dict.fromkeys(fit_block_q(value, shape.q_seq_len) for value in self.choices["block_q"])
        return dataclasses.replace(
            self, choices={**self.choices, "block_q": tuple(block_q)}, first=tuple(map(fitted, self.first))
        )
