import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offline_tpu.machine.devices import DEVICES
from tuning.validate import plain, programs
from tuning.validate.programs import CannotMakeError, Program, build
from tuning.validate.rows import MeasuredRow, read_shipped

SHIPPED = read_shipped()


def _row(op: str, arguments: dict[str, Any], **fields: Any) -> MeasuredRow:
    return MeasuredRow(
        id="x", source="s", device_kind="TPU v6 lite", op=op, arguments=arguments, times_ms=(1.0,), **fields
    )


def _build(row: MeasuredRow) -> Program:
    return build(row, DEVICES["v6e"])


def _shapes(program: Program) -> list[str]:
    return [str(leaf) for leaf in jax.tree.leaves(jax.eval_shape(program.fn, *program.args))]


def test_the_plain_programs() -> None:
    product = _row("matmul", {"m": 8, "k": 16, "n": 32, "dtype": "bfloat16"}, compiler_options={"xla_a": "1"})
    assert _build(product).compiler_options == {"xla_a": "1"}
    assert _shapes(_build(product)) == ["ShapeDtypeStruct(shape=(8, 32), dtype=bfloat16)"]
    assert _shapes(_build(_row("copy", {"bytes": 64}))) == ["ShapeDtypeStruct(shape=(32,), dtype=bfloat16)"]


@pytest.mark.compile
def test_the_pallas_matmul_is_a_matmul() -> None:
    x, y = (jax.random.normal(jax.random.key(n), (256, 256), jnp.bfloat16) for n in range(2))
    with jax.experimental.pallas.tpu.force_tpu_interpret_mode():
        actual = plain.pallas_matmul(128, 128, 128)(x, y)
    np.testing.assert_allclose(actual.astype(jnp.float32), (x @ y).astype(jnp.float32), rtol=0.02, atol=0.1)


@pytest.mark.compile
def test_the_chunked_cross_entropy_is_the_cross_entropy() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (37, 16)), jax.random.normal(keys[1], (16, 53))
    labels = jax.random.randint(keys[2], (37,), 0, 53)
    log_probabilities = jax.nn.log_softmax(x @ w)
    expected = -log_probabilities[jnp.arange(37), labels]
    loss, (lse,) = plain.chunked_cross_entropy(16, 8, "sum", True)(x, labels, w)
    # Padded columns have logits of 0 and count: as in the original, which pads the vocabulary to whole blocks.
    np.testing.assert_allclose(lse, jax.nn.logsumexp(jnp.pad(x @ w, ((0, 0), (0, 3))), axis=-1), rtol=1e-5)
    padded = jax.nn.logsumexp(jnp.pad(x @ w, ((0, 0), (0, 3))), axis=-1) - jax.nn.logsumexp(x @ w, axis=-1)
    np.testing.assert_allclose(loss, jnp.sum(expected + padded), rtol=1e-4)
    mean = plain.chunked_cross_entropy(16, 8, "mean", False)(x, labels, w)
    np.testing.assert_allclose(mean, loss / 37, rtol=1e-6)


def test_a_program_that_is_not_known_says_so() -> None:
    pytest.importorskip("tokamax")
    with pytest.raises(CannotMakeError, match=r"fft: tokamax \S+ has no such op"):
        _build(_row("fft", {}))
    with pytest.raises(CannotMakeError, match="matmul: no argument 'm'"):
        _build(_row("matmul", {}))


def test_one_row_of_every_program_on_every_chip_is_made() -> None:
    pytest.importorskip("tokamax")
    collectives = ("all_gather", "psum")  # their topologies need libtpu
    firsts = {(row.op, row.device_kind): row for row in SHIPPED if row.op not in collectives}
    for row in firsts.values():
        program = _build(row)
        assert jax.tree.leaves(program.args), row.id


def test_group_sizes_are_constants_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokamax")
    monkeypatch.setattr("sys.argv", ["worker"])  # tokamax reads its flags there
    row = next(row for row in SHIPPED if row.id == "tpu_v5_lite-ragged_dot-0000")
    program = _build(row)
    constants = jax.make_jaxpr(program.fn)(*program.args).consts
    assert any(np.array_equal(constant, row.arguments["group_sizes"]) for constant in constants)


def test_arguments_that_the_op_does_not_take_are_dropped_only_where_they_change_nothing() -> None:
    pytest.importorskip("tokamax")
    row = next(row for row in SHIPPED if row.id == "tpu_v5-ragged_dot-0000")
    assert row.arguments["zero_initialize"] is True
    _build(row)
    arguments = json.loads(json.dumps(row.arguments)) | {"zero_initialize": False}
    changed = MeasuredRow(**{**row.call, "arguments": arguments}, id="x", source="s", times_ms=(1.0,))
    with pytest.raises(CannotMakeError, match=r"ragged_dot: tokamax \S+ has no argument zero_initialize=False"):
        _build(changed)


def test_tiles_of_transposed_ragged_matmuls_divide_their_axes() -> None:
    pytest.importorskip("tokamax")
    fits = []
    for row in SHIPPED:
        dimensions = row.arguments.get("ragged_dot_dimension_numbers") or {}
        if row.op == "pallas_mosaic_tpu_ragged_dot" and dimensions["dot_dimension_numbers"][0] == [[1], [2]]:
            _, columns, contracted = map(int, row.arguments["rhs"][5:-1].split(","))
            config = programs._config(row)
            fits.append(contracted % config["tile_k"] == 0 and columns % config["tile_n"] == 0)
    assert fits.count(False) <= 2  # whose tiles divide the axes in neither order
    assert len(fits) == 31


def test_wrong_arguments_are_one_line() -> None:
    pytest.importorskip("tokamax")
    with pytest.raises(CannotMakeError, match="normalization: ") as error:
        _build(_row("normalization", {"x": 3}))
    assert "\n" not in str(error.value)
