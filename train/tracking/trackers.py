"""Where a run's numbers and images go: TensorBoard, CSV, and every tracker that accelerate has.

A resumed run repeats the updates after its checkpoint. TensorBoard and the CSV file cut what was
written of them, so no point is there twice; wandb keeps the first, which is the same.
"""

import csv
import importlib.util
import io
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shared.errors import UserError, first_line
from shared.io.durable import write_bytes
from shared.io.mp4 import Clip

CSV, TENSORBOARD, WANDB, ALL, NONE = "csv", "tensorboard", "wandb", "all", "none"
# Accelerate's names, which are those of the modules that must be there.
MODULES = (
    *(TENSORBOARD, WANDB, "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio"),
)
NAMES = (*MODULES, CSV, ALL, NONE)
CSV_FILE = "metrics.csv"
_RUN_ID = "wandb-run-id"
_STEP = "update"


@dataclass(frozen=True, kw_only=True)
class SampledClip:
    """What a tracker is shown of one validation clip."""

    name: str
    label: str
    clip: Clip
    mp4: Path


class Tracker:
    """One place. Steps count optimizer updates of all roles, from 1."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one update, or of what was measured after it."""

    def close(self) -> None:
        """Everything is where it belongs."""

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        """Numbers whose spread is what matters; not every tracker can show it."""

    def show(self, sheet: Image.Image, clips: Sequence[SampledClip], fps: float, step: int) -> None:
        """Validation clips; not every tracker can show them."""


def chosen(report_to: Sequence[str]) -> tuple[str, ...]:
    """The trackers that these names stand for. UserError for unknown ones and missing packages.

    `all`: the CSV file and all of which the package is installed.
    """
    for name in report_to:
        if name not in NAMES:
            raise UserError(f"--report-to: found {name!r}, expected one of {', '.join(NAMES)}.")
    if NONE in report_to:
        if len(report_to) > 1:
            raise UserError(f"--report-to: found {NONE} with others, expected only {NONE}.")
        return ()
    if ALL in report_to:
        return (*filter(_is_installed, MODULES), CSV)
    for name in report_to:
        if not _is_installed(name):  # csv is Python's own
            raise UserError(
                f"--report-to: {name} is not installed. Install it: pip install "
                f"{name.replace('_', '-')}; or choose another: {TENSORBOARD}, {CSV}."
            )
    return tuple(dict.fromkeys(report_to))


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@contextmanager
def open_trackers(
    names: Sequence[str], folder: Path, project: str, *, done: int, settings: Mapping[str, Any]
) -> Iterator[list[Tracker]]:
    """Trackers of a run of which `done` updates are done (0: a new run), by `chosen` names.

    `settings` are shown as the run's configuration where a tracker does that. Raises UserError
    where one can't be opened. All are closed behind the block.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trackers: list[Tracker] = []
    with ExitStack() as opened:
        for name in names:
            if name == CSV:
                trackers.append(CsvTracker(folder / CSV_FILE, done=done))
            elif name == TENSORBOARD:
                trackers.append(TensorBoard(folder, done=done))
            else:
                trackers.append(OfAccelerate(name, folder, project, done=done, settings=settings))
            opened.callback(trackers[-1].close)
        yield trackers


class TensorBoard(Tracker):
    """Event files in the folder itself."""

    def __init__(self, folder: Path, *, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=done + 1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        # Not by accelerate's tracker, which flushes after every call.
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        self._writer.add_histogram(name, np.asarray(values), step)

    def show(self, sheet: Image.Image, clips: Sequence[SampledClip], fps: float, step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._writer.add_image("validation", np.asarray(sheet), step, dataformats="HWC")
        for one in clips:
            # As torch's add_video does, which wants moviepy for it: an animation as an image.
            _, height, width, _ = one.clip.shape
            image = Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=_gif(one.clip, fps)
            )
            summary = Summary(value=[Summary.Value(tag=f"validation/{one.name}", image=image)])
            self._writer.file_writer.add_summary(summary, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _gif(clip: Clip, fps: float) -> bytes:
    stream = io.BytesIO()
    first, *others = (Image.fromarray(frame) for frame in clip)
    more = {"save_all": True, "append_images": others, "duration": 1000 / fps, "loop": 0}
    first.save(stream, format="GIF", **more)
    return stream.getvalue()


class CsvTracker(Tracker):
    """A line an update, a column a number, empty where an update has none of that name.

    Of histograms the mean stands in the lines; clips lie in the run's folder.
    """

    def __init__(self, path: Path, *, done: int) -> None:
        """Keeps the lines of the first `done` updates of a file that is there."""
        self._path = path
        rows = _rows_of(path, done)
        self._columns = list(dict.fromkeys([_STEP, *(name for row in rows for name in row)]))
        self._begin(rows)

    def _begin(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Write the file whole with these lines, and stay at its end."""
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, self._columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        write_bytes(self._path, stream.getvalue().encode())
        self._stream = self._path.open("a", newline="")
        self._writer = csv.DictWriter(self._stream, self._columns, restval="")

    def log(self, values: Mapping[str, float], step: int) -> None:
        if not values.keys() <= set(self._columns):  # the first update of a role
            self._stream.close()
            self._columns += [name for name in values if name not in self._columns]
            self._begin(_rows_of(self._path, step))
        self._writer.writerow({_STEP: step, **values})
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def _rows_of(path: Path, done: int) -> list[dict[str, str]]:
    """Lines of the first `done` updates; a last line that a kill cut short is left out."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    whole = text[: text.rfind("\n") + 1]
    rows = []
    for row in csv.DictReader(io.StringIO(whole, newline="")):
        step = row.get(_STEP) or ""
        if step.isdigit() and int(step) <= done and None not in row:
            rows.append({name: value for name, value in row.items() if value is not None})
    return rows


class OfAccelerate(Tracker):
    """wandb, MLflow, Comet … through accelerate."""

    def __init__(
        self, name: str, folder: Path, project: str, *, done: int, settings: Mapping[str, Any]
    ) -> None:
        from accelerate.state import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # without which accelerate's own logging raises
        self._name = name
        more: dict[str, Any] = {}
        if name == WANDB:  # a resumed run goes on in the same one
            more = {"dir": str(folder), "id": _wandb_id(folder, done), "resume": "allow"}
        try:
            kind = LOGGER_TYPE_TO_CLASS[name]
            places = [str(folder)] if kind.requires_logging_directory else []
            self._tracker = kind(project, *places, **more)
            if hasattr(self._tracker, "start"):  # older ones start where they are made
                self._tracker.start()
            plain = {
                key: value if isinstance(value, bool | int | float | str) else str(value)
                for key, value in settings.items()
            }
            self._tracker.store_init_configuration(plain)
        except Exception as error:  # of eight libraries, each with its own
            offline = " Without a network: WANDB_MODE=offline." if name == WANDB else ""
            raise UserError(
                f"--report-to: {name} cannot be opened ({first_line(error)}). Fix its settings, "
                f"or choose another: {TENSORBOARD}, {CSV}.{offline}"
            ) from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._tracker.log(dict(values), step=step)

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        if self._name == WANDB:
            import wandb

            self._tracker.log({name: wandb.Histogram(list(values))}, step=step)

    def show(self, sheet: Image.Image, clips: Sequence[SampledClip], fps: float, step: int) -> None:
        if self._name == WANDB:
            import wandb

            shown: dict[str, Any] = {"validation": wandb.Image(sheet)}
            for one in clips:
                video = wandb.Video(str(one.mp4), caption=one.label, format="mp4")
                shown[f"validation/{one.name}"] = video
            self._tracker.log(shown, step=step)
        elif hasattr(self._tracker, "log_images"):
            self._tracker.log_images({"validation": [np.asarray(sheet)]}, step=step)

    def close(self) -> None:
        self._tracker.finish()


def _wandb_id(folder: Path, done: int) -> str:
    """Of the run in this folder: a new one for a new run."""
    path = folder / _RUN_ID
    if done:
        with suppress(FileNotFoundError):
            return path.read_text().strip()
    run_id = uuid.uuid4().hex[:12]
    write_bytes(path, run_id.encode())
    os.environ.setdefault("WANDB_SILENT", "true")  # its lines would tear the progress bar
    return run_id
