"""Draw the pictures of README.md and docs/ from the records: `python docs/pictures/make.py [NAME ...]`.

NAME is one of demo, lora, image, heatmap, plans, layer, thumbnails (all of these without a NAME), or step. `step`
compiles the denoise step of the 5B model for a v6e-8 (three minutes of CPU) and keeps the ops of one layer in
step.json, which `layer` draws.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import matplotlib
import numpy as np
from PIL import Image

from pipeline.checkpoints.shapes import draw, parse_caption, random_scene
from pipeline.requests.models import MODELS
from splash_workbench.records import jsonl
from splash_workbench.records.prediction import PredictionRecord
from tuning.trials import heatmap, records
from tuning.trials.figures import save_png

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

PICTURES = Path(__file__).parent
ROOT = PICTURES.parents[1]
STEP = PICTURES / "step.json"
TEMPLATES = ROOT / "comfyui/ComfyUI-CogVideoX-TPU/example_workflows"
#: Trials of a sweep that is worth a picture; shorter ones say again what the winner takes.
_LONG_SWEEP = 50
#: Kinds of work, with Okabe and Ito's colours, and the names that records give them.
KINDS = {
    "attention kernel": ("#0072b2", ("attention_kernel", "kernel")),
    "matrix products": ("#e69f00", ("projections", "matmul")),
    "norms, gates, softmax checks": ("#009e73", ("norms_and_gates", "elementwise")),
    "layout copies": ("#cc79a7", ("layout_copies", "layout")),
    "collectives": ("#d55e00", ("collectives", "collective")),
}


def demo() -> None:
    """Write demo.webp: the video that the tiny model makes for `make demo`, four times as large."""
    (frames,) = _videos([{"prompt": "a red circle moves right"}])
    large = [frame.resize((frame.width * 4, frame.height * 4), Image.Resampling.LANCZOS) for frame in frames]
    times = [round(1000 / MODELS["tiny"].fps)] * (len(large) - 1) + [1000]
    large[0].save(PICTURES / "demo.webp", save_all=True, append_images=large[1:], duration=times, loop=0, quality=80)


def lora() -> None:
    """Write lora.png: the same two videos without the tiny LoRA, at half and at full strength, a row each."""
    prompts = ("a red circle moves right", "a yellow star grows")
    lines = [{"prompt": prompt, "lora": f"tiny-outline:{by}"} for by in (0, 0.5, 1) for prompt in prompts]
    shown = [[video[frame] for frame in _SHOWN] for video in _videos(lines)]
    _sheet([[*left, *right] for left, right in zip(shown[::2], shown[1::2], strict=True)]).save(
        PICTURES / "lora.png", optimize=True
    )


def image() -> None:
    """Write image.png: drawn images and frames of what the tiny model makes of them, and square.png, the first."""
    tiny, rng = MODELS["tiny-i2v"], np.random.default_rng(0)
    captions = ("a red square moves right", "a green circle moves left", "a blue square grows")
    scenes = [random_scene(rng, tiny.height, tiny.width, spread=0, **parse_caption(caption)) for caption in captions]
    given = [Image.fromarray(draw(scene, 1, tiny.height, tiny.width)[0]) for scene in scenes]
    given[0].save(PICTURES / "square.png")
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{number}.png" for number in range(len(given))]
        for drawn, path in zip(given, paths, strict=True):
            drawn.save(path)
        lines = [{"prompt": caption, "image": path} for caption, path in zip(captions, paths, strict=True)]
        videos = _videos(lines, "model=tiny-i2v", f"image={paths[0]}")
    rows = [[drawn, *(video[frame] for frame in _SHOWN)] for drawn, video in zip(given, videos, strict=True)]
    _sheet(rows).save(PICTURES / "image.png", optimize=True)


_SHOWN = (0, 5, 10, 16)  # frames of the tiny model's videos


def _videos(lines: list[dict[str, str]], *arguments: str) -> list[list[Image.Image]]:
    """Return the frames of the videos that `pipeline.generate` makes of the lines of a batch file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "prompts.jsonl")
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        output = (f"output_dir={folder}", "name={line}", "results_path=null")
        _run("pipeline.generate", f"prompts={file}", *arguments, *output)
        return [_frames(next(Path(folder, str(line)).glob("*.mp4"))) for line in range(1, len(lines) + 1)]


def _frames(video: Path) -> list[Image.Image]:
    reader = imageio_ffmpeg.read_frames(video)
    size = next(reader)["size"]
    return [Image.frombytes("RGB", size, frame) for frame in reader]


def _sheet(rows: list[list[Image.Image]], scale: int = 2, gap: int = 4) -> Image.Image:
    """Return pictures of one size in rows, on white."""
    width, height = (side * scale for side in rows[0][0].size)
    size = len(rows[0]) * (width + gap) - gap, len(rows) * (height + gap) - gap
    sheet = Image.new("RGB", size, "white")
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            large = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(large, (column * (width + gap), row * (height + gap)))
    return sheet


def thumbnails() -> None:
    """Write the ComfyUI templates' .jpg: frames of demo.webp, the pictures of LoRA and image, and the 720p workflow."""
    with Image.open(PICTURES / "demo.webp") as video:
        width, height = video.size
        sheet = Image.new("RGB", (2 * width, 2 * height))
        for tile, frame in enumerate(range(0, video.n_frames, video.n_frames // 3)[:4]):  # type: ignore[attr-defined]
            video.seek(frame)
            sheet.paste(video.convert("RGB"), (tile % 2 * width, tile // 2 * height))
    sheet.save(TEMPLATES / "cogvideox_t2v_tiny.jpg", quality=85)
    for name, picture in (("lora", "lora.png"), ("i2v", "image.png")):
        Image.open(PICTURES / picture).save(TEMPLATES / f"cogvideox_{name}_tiny.jpg", quality=85)
    Image.open(TEMPLATES / "cogvideox_t2v_720p.png").convert("RGB").save(
        TEMPLATES / "cogvideox_t2v_720p.jpg", quality=85
    )


def heat_map() -> None:
    """Write heatmap.png: every exact candidate of the newest long sweep of CogVideoX at 720p on a v6e."""
    files = (ROOT / "results/sweeps").glob(f"cogvideox_720p-v6e-offline-*/{records.TRIALS_FILE}")
    sweeps = [trials for trials in map(records.read, files) if len(trials) >= _LONG_SWEEP]
    trials = max(sweeps, key=lambda trials: max(trial.created_at for trial in trials))
    figure = heatmap.draw([trial for trial in trials if records.is_exact(trial.variant)])
    assert figure is not None
    save_png(figure, PICTURES / "heatmap.png")


def plans() -> None:
    """Write plans.png: seconds a denoise step by plan and kind of work, beside what was reported."""
    runs = jsonl.read(ROOT / "results/predict.jsonl", PredictionRecord)
    size = ("zai-org/CogVideoX1.5-5B", "1280x720x81", "v6e-8")
    runs = [run for run in runs if (run.video.checkpoint, run.video.size, run.topology) == size]
    newest = {run.plan.plan: run for run in runs if run.step_time_s and not run.request.get("quantization")}
    ours, published = newest["ulysses"], newest["seed_tp"]
    others = {plan.partition(" ")[0]: t for run in runs for plan, t in run.other_plans.items()}
    megatron_s = others["megatron"]
    assert isinstance(megatron_s, float)
    assert published.reported and published.step_time_s and published.step_time_own_kernel_s and ours.step_time_s
    figure, axes = plt.subplots(figsize=(9, 3.4), layout="constrained")
    axes.barh(0, published.reported.step_time_s, color="white", edgecolor="black", hatch="///")
    extra_s = published.step_time_s - published.step_time_own_kernel_s
    _stack(axes, 1, published.stages["denoise"].breakdown_s, kernel_extra_s=extra_s)
    axes.barh(2, megatron_s, color="#999999")
    _stack(axes, 3, ours.stages["denoise"].breakdown_s)
    totals = (published.reported.step_time_s, published.step_time_s, megatron_s, ours.step_time_s)
    for row, total_s in enumerate(totals):
        axes.text(total_s + 0.02, row, f"{total_s:.3g} s", va="center", fontweight="bold")
    axes.set_yticks(
        range(4),
        [
            "published nodes\nreported by their author",
            "their plan and kernel\npredicted",
            "Megatron\npredicted",
            "Ulysses, the default\npredicted",
        ],
    )
    axes.set(xlabel="seconds a denoise step", xlim=(0, max(totals) * 1.1))
    axes.spines[["top", "right"]].set_visible(False)
    colours = [Patch(color=colour, label=kind) for kind, (colour, _) in KINDS.items()]
    axes.legend(handles=[*colours, Patch(color="#999999", label="kinds not on record")], loc="upper right", fontsize=8)
    axes.set_title(
        f"CogVideoX1.5-5B, 1280x720, 81 frames, on a TPU v6e-8 (predicted: {_compiler(ours.environment.versions)})",
        fontsize=10,
    )
    _save(figure, "plans.png")


def layer() -> None:
    """Write layer.png: the predicted timeline of one transformer layer, whole, then before and after attention."""
    record = json.loads(STEP.read_text())
    ops = record["ops"]
    end_ms = max(op["start_ms"] + op["time_ms"] for op in ops)
    attention = [op for op in ops if op["scope"] == "attention" and op["category"] == "kernel"]
    kernels = [op for op in attention if op["time_ms"] > 0.01]  # one a group of heads; no head goes to the fallbacks
    kernel_end_ms = kernels[-1]["start_ms"] + kernels[-1]["time_ms"]
    figure, rows = plt.subplots(3, 1, figsize=(11, 5.6), layout="constrained", height_ratios=(1, 1.6, 1.6))
    views = (("one layer", 0.0, end_ms), ("before the kernel", 0.0, kernels[0]["start_ms"]))
    for axes, (title, start_ms, stop_ms) in zip(rows, (*views, ("after it", kernel_end_ms, end_ms)), strict=True):
        for op in ops:
            is_norm = op["category"] == "kernel" and op not in attention
            colour = _colour("elementwise" if is_norm else op["category"])
            axes.add_patch(Rectangle((op["start_ms"], 0), op["time_ms"], 1, color=colour, lw=0))
        if title != "one layer":
            _name_parts(axes, ops, start_ms, stop_ms)
        axes.set(xlim=(start_ms, stop_ms), ylim=(0, 1), yticks=[])
        axes.set_ylabel(title.replace(" the", "\nthe"), rotation=0, ha="right", va="center")
        axes.spines[["top", "left", "right"]].set_visible(False)
    for kernel in kernels:
        rows[0].text(kernel["start_ms"] + kernel["time_ms"] / 2, 0.5, f"attention kernel {kernel['time_ms']:.2f} ms",
                     ha="center", va="center", color="white", fontweight="bold")  # fmt: skip
    rows[-1].set_xlabel("milliseconds")
    figure.legend(
        handles=[Patch(color=colour, label=kind) for kind, (colour, _) in KINDS.items()],
        loc="outside lower center", ncols=len(KINDS), frameon=False, fontsize=9,
    )  # fmt: skip
    rows[0].set_title(
        f"One of {record['layers']} layers of CogVideoX1.5-5B, 1280x720, 81 frames, one chip of a v6e-8, "
        f"{record['plan']}: predicted, {record['compiler']}",
        fontsize=10,
    )
    _save(figure, "layer.png")


def step() -> None:
    """Write step.json: the ops of one layer of the denoise step, compiled for a v6e-8."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.json"
        _run("pipeline.predict", "topology=v6e-8", "parallel=ulysses", "stages=denoise", "results_path=null",
             f"json={path}")  # fmt: skip
        report = json.loads(path.read_text())
    denoise = report["stages"]["denoise"]
    layers = denoise["num_layers"]
    ops = [op for op in denoise["timeline"] if op["calls"] == layers and op["time_s"] > 0]
    first_s = ops[0]["start_s"]
    kept = [
        {
            "name": op["name"],
            "scope": re.sub(r".*/closed_call/|/.*", "", op["scope"]) if "closed_call" in op["scope"] else "",
            "category": op["category"],
            "start_ms": round((op["start_s"] - first_s) * 1e3, 6),
            "time_ms": round(op["time_s"] / layers * 1e3, 6),
        }
        for op in ops
    ]
    plan = report["plan"]
    about = {
        "label": "predicted",
        "compiler": _compiler(report["environment"]["versions"]),
        "plan": f"{plan['plan']} {plan['dp']} x {plan['model']}",
        "layers": layers,
        "step_time_s": report["step_time_s"],
        "created_at": report["created_at"],
        "git_commit": report["environment"]["git_commit"],
    }
    lines = ",\n".join(f"  {json.dumps(op)}" for op in kept)
    STEP.write_text(json.dumps(about, indent=1)[:-2] + f',\n "ops": [\n{lines}\n ]\n}}\n')


def _name_parts(axes: Axes, ops: list[dict[str, Any]], start_ms: float, stop_ms: float) -> None:
    """Write the model's named scopes above the ops of each, where there is room."""
    spans: list[list[Any]] = []
    for op in ops:
        if op["start_ms"] < start_ms - 1e-6 or op["start_ms"] >= stop_ms - 1e-6 or not op["scope"]:
            continue
        end_ms = op["start_ms"] + op["time_ms"]
        if spans and spans[-1][0] == op["scope"]:
            spans[-1][2] = end_ms
        else:
            spans.append([op["scope"], op["start_ms"], end_ms])
    for scope, begin, end in spans:
        if end - begin > 0.05 * (stop_ms - start_ms):
            name = scope.replace("_", "\n")
            axes.text((begin + end) / 2, 1.03, name, ha="center", va="bottom", fontsize=7, linespacing=0.9)
            axes.plot([begin, end], [1.01, 1.01], color="black", lw=0.8, clip_on=False)


def _stack(axes: Axes, row: int, breakdown_s: dict[str, float], kernel_extra_s: float = 0.0) -> None:
    left = 0.0
    if "attention_kernel" in breakdown_s:  # other kernels are those of norms
        of_norms_s = breakdown_s.get("elementwise", 0.0) + breakdown_s.get("kernel", 0.0)
        breakdown_s = {**breakdown_s, "elementwise": of_norms_s, "kernel": 0.0}
    for kind, (colour, names) in KINDS.items():
        width = sum(time_s for name, time_s in breakdown_s.items() if name in names)
        width += kernel_extra_s if kind == "attention kernel" else 0.0
        axes.barh(row, width, left=left, color=colour)
        left += width


def _colour(category: str) -> str:
    return next((colour for colour, names in KINDS.values() if category in names), "#999999")


def _compiler(versions: dict[str, str]) -> str:
    return f"libtpu {versions['libtpu']}"


def _run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=True)


def _save(figure: Any, name: str) -> None:
    figure.savefig(PICTURES / name, dpi=130)
    plt.close(figure)
    image = Image.open(PICTURES / name).convert("RGB").quantize(128)  # a quarter of the size, the same to the eye
    image.save(PICTURES / name, optimize=True)


DRAW: dict[str, Callable[[], None]] = {
    "demo": demo,
    "lora": lora,
    "image": image,
    "heatmap": heat_map,
    "plans": plans,
    "layer": layer,
    "thumbnails": thumbnails,
}


def main() -> int:
    """Run the pictures named on the command line, or all of them."""
    names = sys.argv[1:] or list(DRAW)
    choices = DRAW | {"step": step}
    if unknown := [name for name in names if name not in choices]:
        print(f"error: {', '.join(unknown)}: expected one of {', '.join(choices)}", file=sys.stderr)
        return 2
    for name in names:
        choices[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
