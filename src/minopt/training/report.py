"""What a run shows: a bar on a terminal, plain lines elsewhere; on stderr, of the first process."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

from minopt.progress import bar, on_terminal, say


class Reporter:
    """Shows a run's progress.

    Args:
        shown: whether this process shows anything.
        first_step: steps that were done before.
        total_steps: of the whole run.
    """

    def __init__(self, shown: bool, first_step: int, total_steps: int) -> None:
        self.shown = shown and sys.stderr is not None
        self.draws = self.shown and on_terminal()
        self.first_step, self.total_steps = first_step, total_steps
        self.began = time.perf_counter()
        self.bar = bar(total_steps, "step", initial=first_step, shown=self.draws)

    def say(self, text: str) -> None:
        """A line."""
        if self.shown:
            say(text)

    def step(self, metrics: Mapping[str, float] | None, step: int) -> None:
        """One more step is done.

        Args:
            metrics: of the steps since the last that had any, or ``None``.
            step: how many are done.
        """
        if self.draws:  # on a terminal, which does not go away
            if metrics is not None:
                self.bar.set_postfix_str(_short(metrics), refresh=False)
            self.bar.update()
        elif metrics is not None:
            left = (time.perf_counter() - self.began) / (step - self.first_step) * (self.total_steps - step)
            self.say(f"step {step}/{self.total_steps}  {_short(metrics)}  {tqdm.format_interval(left)} left")

    def close(self) -> None:
        """Leaves the bar as it is."""
        self.bar.close()


def _short(metrics: Mapping[str, float]) -> str:
    text = (
        f"loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.2e}  {metrics['tokens_per_second']:,.0f} tokens/s"
    )
    return text + (f"  {metrics['skipped_steps']:.0f} skipped" if metrics["skipped_steps"] else "")
