"""What `pipeline.generate` shows on a terminal."""

from collections.abc import Sequence

from tqdm import tqdm

from pipeline.profiling import StageEvent, StageTimings

_BAR_FORMAT = "  {desc:<8} {bar:24} {n_fmt}/{total_fmt} {unit}{postfix}, {elapsed} so far, {remaining} left"
_UNITS = {"text": "prompts", "denoise": "steps", "vae": "batches"}


class ConsoleProgress:
    """A `Progress` that shows one line a stage: what it is doing, then a bar with seconds a step and the time left."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def __call__(self, event: StageEvent) -> None:
        if event.phase != "run":
            self.close()
            tqdm.write(f"  {event.stage:<8} {event.phase} ...")
        elif event.total_steps and event.step == 0:
            self.close()
            self._bar = tqdm(
                total=event.total_steps, desc=event.stage, unit=_UNITS[event.stage], bar_format=_BAR_FORMAT
            )
        elif self._bar is not None and event.step_time_s is not None:
            self._bar.set_postfix_str(f"{event.step_time_s:.2f} s each", refresh=False)
            self._bar.update(event.step - self._bar.n)
            if event.step == event.total_steps:
                self.close()

    def close(self) -> None:
        """Leave the last line on the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def timing_table(timings: Sequence[StageTimings]) -> str:
    """A table of seconds a stage."""
    lines = [f"  {'stage':<8} {'load s':>8} {'compile s':>10} {'run s':>8} {'steps':>6} {'s a step':>9}"]
    for timing in timings:
        step = f"{timing.step_time_s:>9.3f}" if timing.step_time_s is not None else f"{'':>9}"
        lines.append(
            f"  {timing.stage:<8} {timing.load_time_s:>8.2f} {timing.compile_time_s:>10.2f} {timing.run_time_s:>8.2f} "
            f"{len(timing.step_times_s):>6} {step}"
            + ("  reused, times of the run that made it" if timing.reused else "")
        )
    ran = [timing for timing in timings if not timing.reused]
    total = sum(timing.load_time_s + timing.compile_time_s + timing.run_time_s for timing in ran)
    lines.append(f"  {'total':<8} {total:>8.2f}" + ("" if len(ran) == len(timings) else " of this run"))
    return "\n".join(lines)
