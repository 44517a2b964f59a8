"""Named attention shapes, each a file in configs/workload/. The shape counts; the name is for people and folders."""

import collections
import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from omegaconf import OmegaConf

from splash_attn.types import AttentionShape
from splash_workbench.provenance import CONFIG_DIR, stable_hash

if TYPE_CHECKING:
    from tuning.trials.records import Trial

_WORKLOAD_DIR = CONFIG_DIR / "workload"
_ITEMSIZES = {"bfloat16": 2, "float32": 4}
DTYPES = tuple(_ITEMSIZES)
_LENGTHS = ("seq_len", "q_seq_len", "kv_seq_len")
_MAX_NAME_LENGTH = 100  # with device, backend and hash it is the name of a folder


@dataclasses.dataclass(frozen=True)
class Workload:
    """One attention call of a model on one chip.

    Raises ValueError for a dtype that is not one of DTYPES, a size that no array has, or a name that is not one for a
    folder.
    """

    name: str
    shape: AttentionShape
    dtype: str
    sizes: ClassVar[Mapping[str, Any]] = {}  # the shape says all

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: expected one of {DTYPES}.")
        for name, value in dataclasses.asdict(self.shape).items():
            if value >= 2**31:
                raise ValueError(f"{name}={value}: expected less than 2**31, as XLA counts in 32 bits.")
        if _clean(self.name) != self.name:
            raise ValueError(
                f"workload.name={self.name!r}: expected at most {_MAX_NAME_LENGTH} letters, digits, _ . + and -, "
                "the first a letter or digit, without two dots in a row."
            )

    @property
    def call(self) -> str:
        """What is called, in one word."""
        return str(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _ITEMSIZES[self.dtype]

    @property
    def identity(self) -> tuple[AttentionShape, str]:
        """Shape and dtype, which are the same for the same call whatever its name."""
        return self.shape, self.dtype

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], overridden: Collection[str] = ()) -> Self:
        """Return the workload of a file's fields, with seq_len or both of q_seq_len and kv_seq_len.

        overridden: names of the fields that are not the file's own. Where a length is, the file's do not count. Raises
        ValueError where one of two lengths is missing.
        """
        count = set(_LENGTHS) & set(overridden) or set(_LENGTHS)
        given = {name: fields[name] for name in _LENGTHS if name in count and fields.get(name) is not None}
        lengths = dict.fromkeys(("q_seq_len", "kv_seq_len"), given["seq_len"]) if set(given) == {"seq_len"} else given
        if set(lengths) != {"q_seq_len", "kv_seq_len"}:
            raise ValueError(
                f"{', '.join(f'workload.{name}={value}' for name, value in given.items()) or 'no length'}: "
                "expected workload.seq_len for self-attention, or both of workload.q_seq_len and workload.kv_seq_len."
            )
        shape = AttentionShape(**{name: fields[name] for name in ("batch_size", "num_heads", "head_dim")}, **lengths)
        return cls(name=fields["name"], shape=shape, dtype=fields["dtype"])

    def under_its_own_name(self, overridden: Collection[str]) -> Self:
        """Return the workload, under a derived name if its own is that of another shape or dtype.

        A name among the `overridden` fields is kept, unless it is one of configs/workload/.
        """
        if self.name in names():
            right = self.identity == load(self.name).identity
        else:
            right = not overridden or "name" in overridden
        return self if right else dataclasses.replace(self, name=_derived(self.name, *self.identity))


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A call of a kernel that is no attention: the kernel's name, and the fields of its workload."""

    kernel: str
    sizes: Mapping[str, Any]
    shape = None

    @property
    def call(self) -> str:
        """What is called, in one word."""
        return sizes_text(self.sizes)

    @property
    def name(self) -> str:
        """Return a name for a folder."""
        name = _clean(f"{self.kernel}-{self.call}")
        return name if len(name) < _MAX_NAME_LENGTH else f"{self.kernel}-{stable_hash(self.call)}"

    @property
    def dtype(self) -> str:
        """Return the workload's dtype, where it has a field of that name."""
        return str(self.sizes.get("dtype", ""))


def sizes_text(sizes: Mapping[str, Any]) -> str:
    """Return the fields of a workload in one word, e.g. "m8192-n4096-bfloat16"."""
    return "-".join(f"{name}{value}" if isinstance(value, int) else str(value) for name, value in sizes.items())


def names() -> tuple[str, ...]:
    """Return every workload that `load` knows."""
    return tuple(sorted(path.stem for path in _WORKLOAD_DIR.glob("*.yaml")))


def load(name: str) -> Workload:
    """Return the workload of that name. Raises ValueError where there is none, with those there are."""
    if name not in names():
        raise ValueError(f"workload={name!r}: expected one of {', '.join(names())}.")
    return Workload.from_dict(dict(OmegaConf.to_container(OmegaConf.load(_WORKLOAD_DIR / f"{name}.yaml"))))  # type: ignore[arg-type]


def named_apart(trials: Sequence["Trial"]) -> list["Trial"]:
    """Return trials with derived names where theirs stand for several shapes or dtypes, or are not names for a file."""
    named = [(_clean(trial.workload), trial) for trial in trials]
    meanings = collections.defaultdict(set)
    for name, trial in named:
        if trial.shape is not None:  # another kernel's workload is named by its sizes
            meanings[name].add((trial.shape, trial.dtype))
    published = {name: load(name).identity for name in meanings.keys() & set(names())}
    found = []
    for name, trial in named:
        if trial.shape is None:
            found.append(trial)
            continue
        identity = (trial.shape, trial.dtype)
        right = len(meanings[name]) == 1 or published.get(name) == identity
        name = name if right else _derived(name, *identity)
        found.append(dataclasses.replace(trial, workload=_with_options(name, trial.compiler_options)))
    return found


def _clean(name: str) -> str:
    """Return a name with "x" in place of each character that does not belong in one, and cut to length."""
    return re.sub(r"[^A-Za-z0-9_.+-]|\.(?=\.)|^[^A-Za-z0-9]", "x", name)[:_MAX_NAME_LENGTH] or "x"


def _with_options(name: str, options: Mapping[str, str]) -> str:
    """Return a name that trials with other compiler options do not have."""
    suffix = "".join(f"+{option}-{_clean(value)}" for option, value in options.items())
    if name.endswith(suffix):
        return name
    return name + suffix if len(name + suffix) <= _MAX_NAME_LENGTH else f"{name}+options-{stable_hash(suffix)[:8]}"


def _derived(name: str, shape: AttentionShape, dtype: str) -> str:
    """Return e.g. "tiny+1x24x4680x64", with "-float32" where it is not bfloat16."""
    suffix = f"+{shape}".replace(":", "-") + ("" if dtype == "bfloat16" else f"-{dtype}")
    return name if name.endswith(suffix) else name[: _MAX_NAME_LENGTH - len(suffix)] + suffix
