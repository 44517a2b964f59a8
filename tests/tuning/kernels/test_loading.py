"""A user's kernel that lacks something, or has it wrong, is one line."""

import pickle
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from splash_workbench.provenance import REPO_ROOT
from tuning.kernels import Kernel, KernelError, loading, promoted
from tuning.kernels.protocol import tunables
from tuning.search.tunables import TunableSpace, call_of

GOOD = """
import dataclasses
import jax, jax.numpy as jnp
from tuning.kernels import Kernel, compiler_option, one_of

@dataclasses.dataclass(frozen=True)
class Config:
    factor: int = one_of(range(2, 6, 2))
    flag: bool | None = compiler_option("xla_flag", None, True)

@dataclasses.dataclass(frozen=True)
class Sizes:
    n: int
    dtype: str = "float32"

class Double(Kernel):
    Config, Workload = Config, Sizes
    def arguments(self, workload): return [jax.ShapeDtypeStruct((workload.n,), workload.dtype)]
    def build(self, config): return lambda x: x * config.factor
    def reference(self, x): return x * 2
    def is_valid(self, config, workload): return config.factor < 4 or "factor too large"
"""
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a kernel's file, with replacements; return its FILE:CLASS."""

    def write(*replacements: tuple[str, str], name: str = "Double") -> str:
        text = GOOD
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "double.py").write_text(textwrap.dedent(text))
        return f"{tmp_path / 'double.py'}:{name}"

    return write


def test_a_kernel_is_found_and_lists_its_configurations(write: Write) -> None:
    spec = write()
    kernel = loading.find(spec)
    assert tunables(kernel) == {"factor": (2, 4), "flag": (None, True)}
    call = call_of(kernel, {"n": 12})
    assert (call.call, call.name, call.dtype) == ("n12-float32", "Double-n12-float32", "float32")
    space = TunableSpace(kernel, tunables(kernel))
    found = space.candidates(call)
    assert [candidate.options for candidate in found.valid] == [{"factor": 2, "flag": f} for f in (None, True)]
    assert found.pruned == {"factor too large": 2}
    assert space.first == ({"factor": 2, "flag": None},)
    assert kernel.compiler_options(found.valid[1].variant) == {"xla_flag": "true"}
    assert kernel.compiler_options(found.valid[0].variant) == {}
    assert kernel.hbm_bytes(kernel.Workload(n=12)) == 12 * 4 * 2
    assert loading.find(spec) is kernel and loading.spec_of(kernel) == spec


def test_the_hash_is_of_all_of_a_package_beside_it(write: Write, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").touch()
    (tmp_path / "mine" / "inside.py").write_text("FACTOR = 2\n")
    spec = write(("import dataclasses\n", "import dataclasses\nfrom mine.inside import FACTOR\n"))
    first = loading.hash_of(spec)
    (tmp_path / "mine" / "inside.py").write_text("FACTOR = 3\n")
    assert loading.hash_of(spec) != first
    assert [path.name for path in loading.files_of(tmp_path / "double.py")] == ["double.py", "__init__.py", "inside.py"]


def test_the_hash_is_found_in_threads_too(write: Write) -> None:
    """Python 3.11's parser fails where two threads are in it (python/cpython#106905)."""
    spec, before = (
        str(REPO_ROOT / "examples" / "kernels" / "paged_attention.py:PagedAttention"),
        sys.getswitchinterval(),
    )
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as threads:
            assert len(set(threads.map(loading.hash_of, [spec] * 100))) == 1
    finally:
        sys.setswitchinterval(before)


def test_the_hash_is_of_the_file_and_of_what_it_imports_beside_it(write: Write, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("FACTOR = 2\n")
    spec = write(("import dataclasses\n", "import dataclasses\nimport beside\n"))
    first = loading.hash_of(spec)
    (tmp_path / "beside.py").write_text("FACTOR = 2  # a comment\n")
    assert loading.hash_of(spec) == first
    (tmp_path / "beside.py").write_text("FACTOR = 3\n")
    assert loading.hash_of(spec) != first


@pytest.mark.parametrize(
    ("replacements", "message"),
    [
        ((("    def reference(self, x): return x * 2\n", ""),), "Double: expected the method reference"),
        ((("(frozen=True)", ""),), "Double.Config: not hashable; expected @dataclasses.dataclass"),
        ((("    Config, Workload = Config, Sizes\n", "    Workload = Sizes\n"),), "Double.Config: expected a frozen"),
        ((("one_of(range(2, 6, 2))", "2"),), "Double.Config.factor: expected values, as in"),
        ((("one_of(range(2, 6, 2))", "one_of(2, 2)"),), r"Double.Config.factor=\[2, 2\]: expected each value once"),
        ((("one_of(range(2, 6, 2))", "one_of(2, default=3)"),), "its default 3 is not one of its values"),
        ((("one_of(range(2, 6, 2))", "one_of((1, 2), (3, 4))"),), "a tuple is kept in no record"),
        ((("import jax, ", "import no_such_module, jax, "),), r"double\.py:3: ModuleNotFoundError: No module"),
        (
            (("class Double(Kernel):", "class Double(Kernel):\n    requires = ('no_such',)"),),
            "no_such is not installed",
        ),
        ((("class Double(Kernel):", "class Double(Kernel):\n    def __init__(self, n): self.n = n"),), "without arg"),
        ((("class Double(Kernel):", "class Double(Kernel)"),), r"double\.py.*SyntaxError"),
        ((("class Double(Kernel):", "import sys; sys.exit(0)\nclass Double(Kernel):"),), "SystemExit: 0"),
        (
            (("class Double(Kernel):", "class Double(Kernel):\n    tolerance = -1"),),
            "Double.tolerance=-1: expected a number above 0",
        ),
        (
            (("class Double(Kernel):", "class Double(Kernel):\n    vmem_grows_with = ('blok',)"),),
            r"vmem_grows_with=\('blok',\): expected a tuple of some of its tunables",
        ),
        (
            (("class Double(Kernel):", "class Double(Kernel):\n    tolerance = 'x'"),),
            "Double.tolerance='x': expected a number above 0",
        ),
        (
            (("class Double(Kernel):", "class Double(Kernel):\n    requires = 'numpy'"),),
            "Double.requires='numpy': expected a tuple of names",
        ),
        (
            (("class Double(Kernel):", "class Double(Kernel):\n    def __init__(self): raise RuntimeError('no')"),),
            r"Double\(\): RuntimeError: no",
        ),
        (
            (("    flag: bool", "    def __post_init__(self): assert self.factor > 3, 'too small'\n    flag: bool"),),
            r"Double\.Config\(\), the default: AssertionError: too small",
        ),
        (
            (
                ("    factor: int = one_of(range(2, 6, 2))\n", ""),
                ('    flag: bool | None = compiler_option("xla_flag", None, True)\n', "    pass\n"),
            ),
            "Double.Config: expected tunables, as in",
        ),
    ],
)
def test_what_is_wrong_with_a_kernel_is_one_line(
    write: Write, replacements: tuple[tuple[str, str], ...], message: str
) -> None:
    with pytest.raises(KernelError, match=message) as caught:
        loading.find(write(*replacements))
    assert "\n" not in str(caught.value)


def test_two_kernels_of_a_file_are_of_one_module() -> None:
    source = str(Path(__file__).with_name("scaled.py"))
    first, _ = loading.find(f"{source}:Scaled"), loading.find(f"{source}:Idle")
    assert type(pickle.loads(pickle.dumps(first))) is type(first)


def test_a_kernel_that_is_not_there(write: Write, tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="no kernel 'Triple'; its subclasses of Kernel are: Double"):
        loading.find(write(name="Triple"))
    with pytest.raises(KernelError, match="there is no file"):
        loading.find(f"{tmp_path / 'absent.py'}:Double")
    with pytest.raises(KernelError, match="kernel=nonsense: expected splash_attn, jax_splash"):
        loading.find("nonsense")


def test_values_that_do_not_fit(write: Write) -> None:
    kernel = loading.find(write())
    with pytest.raises(KernelError, match=r"workload\.m: Double\.Workload has n, dtype"):
        call_of(kernel, {"m": 1})
    with pytest.raises(KernelError, match=r"workload\.n: expected a value"):
        call_of(kernel, {})
    with pytest.raises(KernelError, match=r"workload\.dtype=3: expected str"):
        call_of(kernel, {"n": 1, "dtype": 3})
    with pytest.raises(KernelError, match=r"workload\.n='x': expected int\.$"):
        call_of(kernel, {"n": "x"})
    with pytest.raises(KernelError, match=r"space\.block: Double has factor, flag"):
        TunableSpace(kernel, {"block": (1,)})
    with pytest.raises(KernelError, match=r"configurations, expected at most"):
        TunableSpace(kernel, {"factor": tuple(range(2000)), "flag": tuple(range(2000))})


_FIELDS = """
    n: int
    kind: str | None = None
    scale: float = 1.0
    rows: int = dataclasses.field(default_factory=lambda: 8)
"""


def test_a_workload_may_have_optional_and_float_fields(write: Write) -> None:
    kernel = loading.find(write(("\n    n: int\n", _FIELDS)))
    assert call_of(kernel, {"n": 1}).sizes == {"n": 1, "kind": None, "scale": 1.0, "rows": 8, "dtype": "float32"}
    sizes = call_of(kernel, {"n": 1, "kind": "a", "scale": 2}).sizes
    assert (sizes["kind"], sizes["scale"], type(sizes["scale"])) == ("a", 2.0, float)
    with pytest.raises(KernelError, match=r"workload\.kind=3: expected str or None, as None"):
        call_of(kernel, {"n": 1, "kind": 3})


@pytest.mark.parametrize("value", ["(1, 2)", "jnp.float32", "jnp.dtype('int8')", "Config()"])
def test_a_workload_that_no_record_keeps_is_refused(write: Write, value: str) -> None:
    """A tuple would come back as a list, and the promoted winner would not be found."""
    kernel = loading.find(write(('dtype: str = "float32"', f"dtype: object = {value}")))
    with pytest.raises(KernelError, match=r"Double\.Workload\.dtype=.*is kept in no record; expected a number, text"):
        call_of(kernel, {"n": 1})
    with pytest.raises(KernelError, match="is kept in no record"):
        promoted.lookup(kernel, kernel.Workload(n=1), device_kind="v6e", default=kernel.Config())


def test_what_a_workload_asserts_is_one_line(write: Write) -> None:
    kernel = loading.find(write(("    n: int\n", "    n: int\n    def __post_init__(self): assert self.n > 1, 'n'\n")))
    with pytest.raises(KernelError, match=r"^workload: AssertionError: n$"):
        call_of(kernel, {"n": 1})


def test_a_configuration_that_asserts_is_left_out(write: Write) -> None:
    new = "    def __post_init__(self): assert self.factor < 4\n    flag: bool"
    kernel = loading.find(write(("    flag: bool", new)))
    found = TunableSpace(kernel, tunables(kernel)).candidates(call_of(kernel, {"n": 1}))
    assert found.pruned == {"not a configuration: an assertion of Config": 2}


def test_values_that_are_given_get_the_types_of_the_kernels_own() -> None:
    """A winner of another type was refused when it was looked up, after the whole sweep."""
    found = loading.of_own_types("space.x", [128.0, 256, None], (64, None))
    assert found == (128, 256, None) and [type(value) for value in found] == [int, int, type(None)]
    assert [type(value) for value in loading.of_own_types("space.x", [1], (0.5,))] == [float]
    for value, own in (("128", (64,)), (True, (64,)), (1, (True, False)), (0.5, (64,)), (None, (64,)), (2, ("a",))):
        with pytest.raises(KernelError, match=r"space\.x=.*: expected values of type .*, as the kernel's own"):
            loading.of_own_types("space.x", [value], own)


@pytest.mark.parametrize("verdict", ["None", "16", "['a']"])
def test_what_is_valid_says_must_be_yes_no_or_a_text(write: Write, verdict: str) -> None:
    kernel = loading.find(write(('config.factor < 4 or "factor too large"', verdict)))
    with pytest.raises(KernelError, match=r"Double\.is_valid\(.*\) returns .*: expected True, False, or a text"):
        TunableSpace(kernel, tunables(kernel)).candidates(call_of(kernel, {"n": 1}))


def test_numpys_yes_is_a_yes(write: Write) -> None:
    new = '__import__("numpy").bool_(config.factor < 4)'
    kernel = loading.find(write(('config.factor < 4 or "factor too large"', new)))
    found = TunableSpace(kernel, tunables(kernel)).candidates(call_of(kernel, {"n": 1}))
    assert len(found.valid) == 2 and found.pruned == {"refused by is_valid": 2}


def test_a_file_that_tunes_when_it_is_imported_is_refused(write: Write) -> None:
    loop = "\nfrom tuning.autotune import autotune\nautotune(Double(), Sizes(n=4))\n"
    spec = write(("    def is_valid", "    def is_valid"))
    path = Path(spec.rpartition(":")[0])
    path.write_text(path.read_text() + loop)
    with pytest.raises(KernelError, match=r"tunes when it is imported; put that under"):
        loading.find(spec)


@pytest.mark.parametrize("path", sorted((REPO_ROOT / "examples" / "kernels").glob("*.py")), ids=lambda path: path.stem)
def test_the_examples_are_kernels(path: Path) -> None:
    namespace = loading._run(path, 0)
    kinds = [k for k in vars(namespace).values() if isinstance(k, type) and issubclass(k, Kernel) and k is not Kernel]
    kinds = [kind for kind in kinds if not kind.__abstractmethods__]
    assert kinds
    for kind in kinds:
        kernel = loading.checked(kind)
        assert TunableSpace(kernel, tunables(kernel)).candidates(call_of(kernel, {})).valid
        assert kernel.hbm_bytes(kernel.Workload())
