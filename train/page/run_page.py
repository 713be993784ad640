"""`index.html` of a run: rewritten while it trains, whole or not at all.

It is made of files in the run's folder, so what it shows survives a resume, and what is not on disk
is not shown.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Literal, Protocol

from shared.errors import UserError, first_line
from shared.interrupt import Interruption
from shared.io.durable import write_bytes
from shared.pages.html import templates
from train.config import TrainConfig
from train.page import content, figures
from train.page.charts import BOTTOM, HEIGHT, LEFT, RIGHT, WIDTH
from train.page.content import Card, cards_of
from train.page.usage import comfyui_hint, sampling_hint
from train.run import Run
from train.saving.export import lora_path
from train.saving.provenance import TITLES
from train.tracking.held_out import losses_of
from train.tracking.metrics_file import METRICS, read_metrics
from train.tracking.step_log import PEAK
from train.tracking.validation import FOLDER

PAGE = "index.html"
Status = Literal["training", "finished", "stopped", "failed"]
_OURS = '<meta name="generator" content="wandistill">'
_SHARE = 0.01
"""Of the time of a run, that updating its page may take."""
_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))


class Counted(Protocol):
    """What knows how many updates are done."""

    updates: int


class RunPage:
    """Writes the page of a run at the right times. Its troubles are said, and end no training."""

    def __init__(
        self, run: Run, state: Counted, say: Callable[[str], None], *, writes: bool
    ) -> None:
        """Without `writes` nothing happens: of several processes one writes."""
        self.writes = writes
        self._run, self._state, self._say = run, state, say
        self._cards: Sequence[Card] | None = None
        self._next = 0.0
        self._told = False

    def refresh(self, *, at_once: bool = False) -> None:
        """Write it, `at_once` or if the last time was long enough ago to cost little."""
        if at_once or time.monotonic() >= self._next:
            self.write("training")

    def write(self, status: Status, why: str = "") -> None:
        """Write it now. `why`: of a run that failed."""
        if not self.writes:
            return
        began = time.monotonic()
        with _troubles_said(self._tell):
            if self._cards is None:
                self._cards = cards_of(self._run.data)
            html = page(self._run, self._state.updates, status, self._cards, why)
            _write(self._run.config.output_dir, html)
            self._told = False
        now = time.monotonic()
        self._next = now + (now - began) / _SHARE

    def _tell(self, trouble: str) -> None:
        """Once, until it can be written again."""
        if not self._told:
            self._say(trouble)
        self._told = True

    @contextmanager
    def until_the_end(self, signals: Interruption) -> Iterator[None]:
        """Block that trains; behind it the page says how it ended."""
        try:
            yield
        except BaseException as error:
            # A message of ours is for people; one of a library may hold anything.
            why = str(error) if isinstance(error, UserError) else type(error).__name__
            with signals.deferred(raise_after=False):
                self.write("failed", why)
            raise
        done = self._state.updates >= self._run.updates
        with signals.deferred(raise_after=False):
            self.write("finished" if done else "stopped")


def page(run: Run, updates: int, status: Status, cards: Sequence[Card], why: str = "") -> str:
    """The page of a run after so many updates, as HTML text; everything it shows is inside it."""
    config, objective = run.config, run.objective
    folder = config.output_dir
    metrics = read_metrics(folder / METRICS, updates)
    held_out = sorted(point for point in losses_of(folder) if point[0] <= updates)
    steps, _ = run.counted(updates)
    spent = figures.seconds_spent(metrics)
    left = figures.seconds_left(run, updates, metrics) if status == "training" else None
    peak = max((record.get(PEAK) or 0.0 for record in metrics), default=0.0)
    processes = run.ranks.world_size
    on_gpu = run.device.startswith("cuda")
    role = "" if len(objective.learning_rates) == 1 else f"{objective.main_role} "
    numbers = [(f"{steps:,} of {run.steps:,}", f"{role}updates")]
    if run.updates != run.steps:
        numbers.append((f"{updates:,} of {run.updates:,}", "updates of all roles"))
    numbers.append((duration(spent), "of updates"))
    if left is not None:
        numbers.append((f"about {duration(left)}", "to go, without validation"))
    if peak:
        numbers.append((f"{peak:.1f} GiB", f"peak of {'GPU' if on_gpu else 'process'} memory"))
    cost = {
        "samples": f"{figures.samples_shown(metrics):,}, repeats counted",
        "time of updates": f"{duration(spent)}, validation not counted",
        f"{'GPU' if on_gpu else 'process'}-hours": f"{spent * processes / 3600:.2f}",
    }
    there = lora_path(folder, objective.expert, "diffusers").exists()
    return (
        templates(Path(__file__).parent)
        .get_template("run_page.html")
        .render(
            title=f"{objective.method}: {TITLES[objective.expert]}",
            folder=str(folder),
            status=status,
            why=why,
            written=now(),
            share=steps / run.steps,
            numbers=numbers,
            charts=figures.charts_of(metrics, held_out, updates),
            size=(WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM),
            clips=content.clips_of(folder / FOLDER, steps),
            cards=cards,
            samples=len(run.data),
            about=[(line[:9].strip(), line[9:]) for line in run.describe()],
            options=content.configuration_of(folder, objective.method),
            cost=cost,
            files=content.files_of(folder),
            usage=hints(config, [run]) if there else None,
        )
    )


def hints(config: TrainConfig, runs: Sequence[Run]) -> dict[str, str]:
    """What to do with the LoRAs of runs."""
    return {"Sample": sampling_hint(config, runs), "ComfyUI": comfyui_hint(config, runs)}


def write_page_of_experts(
    config: TrainConfig, runs: Sequence[Run], say: Callable[[str], None], *, ended: bool
) -> None:
    """`index.html` above the runs of both experts, which leads to their pages."""
    template = templates(Path(__file__).parent).get_template("experts_page.html")
    html = template.render(
        folder=str(config.output_dir),
        experts={run.objective.expert: TITLES[run.objective.expert] for run in runs},
        page=PAGE,
        clips=content.clips_of(config.output_dir / FOLDER, runs[-1].steps) if ended else None,
        usage=hints(config, runs) if ended else None,
    )
    with _troubles_said(say):
        _write(config.output_dir, html)


@contextmanager
def _troubles_said(say: Callable[[str], None]) -> Iterator[None]:
    """Whatever goes wrong in the block, weeks of training are worth more than a page."""
    try:
        yield
    except Exception as error:
        say(f"warning  {PAGE} can't be written ({first_line(error)}); training goes on")


def _write(folder: Path, html: str) -> None:
    path = folder / PAGE
    if path.exists() and _OURS not in path.read_text(errors="replace"):
        raise UserError("somebody else's page is there")
    write_bytes(path, html.encode("utf-8", "replace"))


def duration(seconds: float) -> str:
    """In the largest unit that gives 1 or more."""
    for length, unit in _UNITS:
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def now() -> str:
    return datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
