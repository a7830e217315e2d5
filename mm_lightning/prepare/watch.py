"""How far a run is, how fast, and whether too much of it fails."""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mm_lightning.prepare.sources import Chunk

logger = logging.getLogger(__name__)

MIN_FAILURES = 5  # fewer unexpected errors never stop a run
SHARE_WINDOW = 1000  # items over which `max_error_share` is judged before as many are done
LOG_EVERY = 60.0  # seconds, where no progress bar can be shown


class TooManyErrorsError(ValueError):
    """More items failed unexpectedly than `max_error_share` allows."""


class Watch:
    """Shows how far a run is, and ends it when too much fails.

    Args:
        chunks: all of the run, by name.
        max_error_share: of the items that may fail unexpectedly.
    """

    def __init__(self, chunks: list[tuple[str, Chunk]], max_error_share: float) -> None:
        sizes = [chunk.num_items for _, chunk in chunks]
        self.total = None if None in sizes else sum(sizes)
        self.num_chunks, self.num_done = len(chunks), 0
        self.max_error_share = max_error_share
        self.num_items = self.num_accepted = self.num_failed = self.num_before = 0
        self.errors: Counter[str] = Counter()
        self.start = self.logged = time.monotonic()
        self.progress = progress_bar()

    def __enter__(self) -> Watch:
        self.num_before, self.start = self.num_items, time.monotonic()
        self.progress.start()
        # What is there from before counts as done, not for the speed.
        self.task = self.progress.add_task("items", total=self.total, completed=self.num_items, text="starting")
        self.check()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def add(self, status: dict[str, Any]) -> None:
        self.num_done += 1
        self.num_items += status["num_items"]
        self.num_accepted += status["num_accepted"]
        self.num_failed += status["num_failed"]
        self.errors.update(status["errors"])

    def advance(self, status: dict[str, Any]) -> None:
        """
        Raises:
            TooManyErrorsError: see `check`.
        """
        self.add(status)
        rate = max(self.num_items - self.num_before, 1) / (time.monotonic() - self.start)
        text = f"{rate:.1f}/s, {self.num_accepted} samples"
        total = self.total or self.num_items * self.num_chunks // self.num_done  # as far as is known
        self.progress.update(self.task, completed=self.num_items, total=max(total, self.num_items), text=text)
        if self.progress.disable and time.monotonic() - self.logged > LOG_EVERY:
            self.logged, left = time.monotonic(), (total - self.num_items) / rate / 60
            logger.info("%d of %d items, %s, about %.0f min left", self.num_items, total, text, left)
        self.check()

    def check(self) -> None:
        """
        Raises:
            TooManyErrorsError: more have failed than the share allows, of the items that are done or, while these are
                few, of all.
        """
        known = SHARE_WINDOW if self.total is None else min(self.total, SHARE_WINDOW)
        allowed = self.max_error_share * max(self.num_items, known)
        if self.num_failed > allowed and self.num_failed >= MIN_FAILURES:
            most = "; ".join(f"{number}x {text}" for text, number in self.errors.most_common(2))
            raise TooManyErrorsError(
                f"{self.num_failed} of {self.num_items} items failed unexpectedly, more than max_error_share="
                f"{self.max_error_share} allows: {most}. Mend it and run again with retry_failed=true, or allow more."
            )


def progress_bar() -> Progress:
    """Count, rate and estimate; nothing where the output is no terminal."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        speed_estimate_period=300.0,
    )
    progress.disable = not progress.console.is_terminal
    return progress
