import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import PLENTY_S
from splash_attn import tuned
from splash_attn.types import SEED_BLOCK_SIZES, AttentionShape, BlockSizes, Variant, clamp

KIND = "TPU v6 lite"
SHAPE = AttentionShape(batch_size=1, num_heads=12, q_seq_len=39826, kv_seq_len=39826, head_dim=64)
PROVENANCE = tuned.Provenance("predicted", 14.0, "cogvideox_720p", "r1", "k1", None, {"jax": "0.10.2"}, "2026-01-01")


def entry(time_ms: float = 14.0, label: str = "predicted", **changes: Any) -> tuned.TunedEntry:
    provenance = dataclasses.replace(PROVENANCE, time_ms=time_ms, label=label)
    defaults = {
        "shape": SHAPE,
        "dtype": "bfloat16",
        "block_sizes": BlockSizes(1024, 4096, 2048),
        "variant": Variant(),
        "provenance": provenance,
    }
    return tuned.TunedEntry(**(defaults | changes))


def write(directory: Path, *entries: tuned.TunedEntry) -> None:
    content = {"schema_version": 1, "device_kind": KIND, "entries": [e.to_dict() for e in entries]}
    tuned.path_for(KIND, directory).write_text(json.dumps(content))


def choose(directory: Path, shape: AttentionShape = SHAPE, dtype: str = "bfloat16", **options: Any) -> tuned.Choice:
    return tuned.choose(KIND, shape, dtype, directory=directory, **options)


def shape(**changes: int) -> AttentionShape:
    return dataclasses.replace(SHAPE, **changes)


def test_the_entry_for_the_shape_is_taken(tmp_path: Path) -> None:
    write(tmp_path, entry(shape=shape(q_seq_len=40009, kv_seq_len=40009), time_ms=1.0), entry())
    choice = choose(tmp_path)
    assert choice.entry == entry()
    assert choice.reason == "tuned for this shape: predicted 14.000 ms at 1x12x39826x64 (cogvideox_720p)."


def test_without_an_entry_the_default_is_taken_and_said(tmp_path: Path) -> None:
    choice = choose(tmp_path)
    assert (choice.block_sizes, choice.variant, choice.entry) == (SEED_BLOCK_SIZES, Variant(), None)
    assert "default 3328/2816/256" in choice.reason and "0 tuned entries for TPU v6 lite" in choice.reason


@pytest.mark.parametrize("other", [{"shape": shape(head_dim=128)}, {"dtype": "float32"}])
def test_other_head_dims_and_dtypes_do_not_count(tmp_path: Path, other: dict) -> None:
    write(tmp_path, entry(**other))
    choice = choose(tmp_path)
    assert choice.entry is None and "1 tuned entries for TPU v6 lite, none with head_dim 64" in choice.reason


def test_a_variant_that_is_asked_for_is_kept(tmp_path: Path) -> None:
    online = Variant(softmax="online")
    write(tmp_path, entry(time_ms=10.0), entry(time_ms=20.0, variant=online, block_sizes=BlockSizes(512, 512, 512)))
    assert choose(tmp_path).variant == Variant()
    assert choose(tmp_path, variant=online).block_sizes == BlockSizes(512, 512, 512)
    other = choose(tmp_path, variant=Variant(lookahead=7))
    assert (other.block_sizes, other.variant) == (entry().block_sizes, Variant(lookahead=7))
    assert other.reason.endswith("(cogvideox_720p), there with fixed_bound/256/4.")
    absent = choose(tmp_path, shape(head_dim=128), variant=Variant(lookahead=7))
    assert (absent.entry, absent.variant, absent.block_sizes) == (None, Variant(lookahead=7), SEED_BLOCK_SIZES)


def test_int8_is_chosen_only_where_it_is_asked_for(tmp_path: Path) -> None:
    int8 = entry(time_ms=9.0, variant=Variant(qk_dtype="int8", lookahead=2), block_sizes=BlockSizes(512, 512, 512))
    write(tmp_path, int8)
    assert choose(tmp_path).entry is None
    assert choose(tmp_path, qk_dtype="int8").entry == int8
    write(tmp_path, int8, entry(time_ms=14.0))
    assert choose(tmp_path).variant == Variant()
    assert choose(tmp_path, variant=int8.variant).entry == int8
    assert choose(tmp_path, shape(head_dim=128), qk_dtype="int8").variant == Variant(qk_dtype="int8")


def test_the_nearest_lengths_win_by_ratio(tmp_path: Path) -> None:
    near = entry(shape=shape(q_seq_len=20011, kv_seq_len=20011), block_sizes=BlockSizes(128, 128, 128))
    far = entry(shape=shape(q_seq_len=89003, kv_seq_len=89003), block_sizes=BlockSizes(256, 256, 256))
    write(tmp_path, near, far)
    assert choose(tmp_path, shape(q_seq_len=40009, kv_seq_len=40009)).entry == near
    between = choose(tmp_path, shape(q_seq_len=50021, kv_seq_len=50021))  # nearer to 20011 by difference
    assert between.entry == far
    assert "nearest tuned shape by sequence lengths: predicted 14.000 ms at 1x12x89003x64" in between.reason


def test_same_lengths_prefer_same_heads_then_measured_then_time_per_head(tmp_path: Path) -> None:
    other_heads = entry(shape=shape(num_heads=6), time_ms=1.0)
    predicted, measured = entry(time_ms=13.0), entry(time_ms=15.0, label="measured")
    write(tmp_path, other_heads, predicted)
    assert choose(tmp_path).entry == predicted
    write(tmp_path, other_heads, predicted, measured)
    assert choose(tmp_path).entry == measured
    faster = entry(time_ms=14.5, label="measured", variant=Variant(lookahead=1))
    write(tmp_path, measured, faster)
    assert choose(tmp_path).entry == faster


@pytest.mark.parametrize(
    ("q_seq_len", "kv_seq_len", "expected"),
    [
        (39826, 39826, (3328, 2816, 256)),
        (1, 1, (128, 128, 128)),
        (1009, 77, (1024, 128, 128)),
        (3328, 2816, (3328, 2816, 256)),
        (3329, 2561, (3328, 2816, 256)),
        (7, 2560, (128, 2560, 256)),
        (129, 257, (256, 512, 256)),
    ],
)
def test_blocks_are_clamped_to_the_sequences(q_seq_len: int, kv_seq_len: int, expected: tuple) -> None:
    assert clamp(SEED_BLOCK_SIZES, shape(q_seq_len=q_seq_len, kv_seq_len=kv_seq_len)) == BlockSizes(*expected)


@pytest.mark.parametrize(
    ("block_q", "q_seq_len", "expected"),
    [(13312, 15076, 7552), (13312, 39826, 13312), (2048, 45106, 2048), (4992, 45106, 4608), (3328, 1, 128)],
)
def test_block_q_is_fitted_to_as_many_blocks(block_q: int, q_seq_len: int, expected: int) -> None:
    assert tuned.fit_block_q(block_q, q_seq_len) == expected
    assert -(-q_seq_len // expected) == -(-q_seq_len // block_q) > (q_seq_len - 1) // (expected + 128)
    blocks = tuned.fit(BlockSizes(block_q, 1536, 256), shape(q_seq_len=q_seq_len))
    assert blocks == BlockSizes(expected, 1536, 256)


def test_a_tuned_shape_gets_what_was_tuned(tmp_path: Path) -> None:
    write(tmp_path, entry(shape=shape(q_seq_len=15076), block_sizes=BlockSizes(13312, 1536, 256)))
    assert choose(tmp_path, shape(q_seq_len=15076)).block_sizes.block_q == 13312
    assert choose(tmp_path, shape(q_seq_len=15077)).block_sizes.block_q == 7552


def test_a_nearest_entry_is_clamped(tmp_path: Path) -> None:
    write(tmp_path, entry())
    assert choose(tmp_path, shape(q_seq_len=300, kv_seq_len=3000)).block_sizes == BlockSizes(384, 4096, 2048)


@pytest.mark.parametrize(
    ("tuned_at", "length", "counts"),
    [
        (1021, 39826, False),  # its blocks are cut by its sequence: the default is better
        (1021, 2039, False),
        (1021, 1024, True),  # the same number of blocks
        (1021, 503, True),
        (15076, 503, True),
        (15076, 119056, True),
        (4001, 119056, False),
    ],
)
@pytest.mark.parametrize("axes", [("q_seq_len",), ("kv_seq_len",), ("q_seq_len", "kv_seq_len")])
def test_a_short_sequences_entry_says_nothing_about_a_long_one(
    tmp_path: Path, tuned_at: int, length: int, counts: bool, axes: tuple[str, ...]
) -> None:
    rest = dict.fromkeys({"q_seq_len", "kv_seq_len"} - set(axes), 7)
    write(tmp_path, entry(shape=shape(**dict.fromkeys(axes, tuned_at), **rest), block_sizes=BlockSizes(128, 128, 128)))
    choice = choose(tmp_path, shape(**dict.fromkeys(axes, length), **rest))
    assert (choice.entry is not None) == counts


def test_the_users_entries_stand_beside_the_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user, shipped = tmp_path / "user", tmp_path / "shipped"
    for folder in (user, shipped):
        folder.mkdir()
    monkeypatch.setenv(tuned.USER_VARIABLE, str(user))
    monkeypatch.setattr(tuned, "TUNED_DIR", shipped)
    write(shipped, entry(time_ms=14.0, block_sizes=BlockSizes(256, 256, 256)))
    assert tuned.choose(KIND, SHAPE, "bfloat16").block_sizes == BlockSizes(256, 256, 256)
    for time_ms, expected in ((13.0, BlockSizes(512, 512, 512)), (15.0, BlockSizes(256, 256, 256))):
        write(user, entry(time_ms=time_ms, block_sizes=BlockSizes(512, 512, 512)))
        os.utime(tuned.path_for(KIND, user), ns=(int(time_ms), 1_000_000_000 + int(time_ms)))
        assert tuned.choose(KIND, SHAPE, "bfloat16").block_sizes == expected
    write(user, entry(shape=shape(head_dim=128)))
    os.utime(tuned.path_for(KIND, user), ns=(3, 3))
    assert len(tuned.load(KIND)) == 2 and len(tuned.load(KIND, shipped)) == 1


def test_without_a_home_the_shipped_entries_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (tuned.USER_VARIABLE, "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert tuned.load(KIND) == tuned.load(KIND, tuned.TUNED_DIR) != ()


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    write(tmp_path, entry())
    assert choose(tmp_path).entry is not None
    write(tmp_path)
    os.utime(tuned.path_for(KIND, tmp_path), ns=(1, 1))
    assert choose(tmp_path).entry is None


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b'{"schema_version": 2, "entries": []}', b'{"schema_version": 1}', b'{"device_kind": "\xff"}'],
)
def test_an_unreadable_file_is_an_error_not_a_default(tmp_path: Path, content: bytes) -> None:
    tuned.path_for(KIND, tmp_path).write_bytes(content)
    with pytest.raises(ValueError, match=r"tpu_v6_lite\.json: unreadable tuned entries"):
        choose(tmp_path)


def test_the_entries_in_the_tree_can_be_read() -> None:
    for path in tuned.TUNED_DIR.glob("*.json"):
        kind = json.loads(path.read_text())["device_kind"]
        assert tuned.path_for(kind) == path
        assert tuned.load(kind)


def test_choosing_needs_no_jax() -> None:
    """Only this module and types: importing the package itself brings JAX in."""
    code = (
        "import sys, importlib.util\n"
        "sys.modules['splash_attn'] = package = type(sys)('splash_attn')\n"
        f"package.__path__ = [{str(Path(tuned.__file__).parent)!r}]\n"
        "import splash_attn.tuned\n"
        "assert not {'jax', 'torch', 'numpy', 'hydra', 'pandas'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PLENTY_S)


def test_a_folder_or_a_link_to_itself_in_the_files_place(tmp_path: Path) -> None:
    path = tuned.path_for(KIND, tmp_path)
    path.mkdir()
    with pytest.raises(ValueError, match=r"tpu_v6_lite\.json: unreadable tuned entries \(.*directory.*remove"):
        choose(tmp_path)
    path.rmdir()
    path.symlink_to(path)
    with pytest.raises(ValueError, match=r"tpu_v6_lite\.json: unreadable tuned entries \(.*remove"):
        choose(tmp_path)


def test_a_file_of_another_device(tmp_path: Path) -> None:
    write(tmp_path, entry())
    tuned.path_for(KIND, tmp_path).rename(tuned.path_for("TPU v5 lite", tmp_path))
    with pytest.raises(ValueError, match=r"tpu_v5_lite\.json: its device_kind is 'TPU v6 lite'; expected that of its"):
        tuned.choose("TPU v5 lite", SHAPE, "bfloat16", directory=tmp_path)


@pytest.mark.parametrize("time_ms", [0.0, float("inf"), float("nan")])
def test_a_time_that_cannot_be(time_ms: float) -> None:
    with pytest.raises(ValueError, match="expected a positive number"):
        dataclasses.replace(PROVENANCE, time_ms=time_ms)


def test_a_named_folder_that_is_not_there_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(tuned.USER_VARIABLE, str(tmp_path / "mispelt"))
    for _ in range(2):
        assert tuned.load(KIND)
    assert caplog.text.count("mispelt: there is no such folder; only the shipped entries are read") == 1
