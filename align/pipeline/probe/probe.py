"""Measure the stages of a plan one after another, each on the models that the last ones wrote.

Everything is written into a temporary folder, except the converted folder of a GGUF file, which the
run needs as well.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from align.config.completions import Label, Sample
from align.config.control.base import Control
from align.config.data import Prepare
from align.config.evaluate import Evaluate
from align.config.online_rl import OnlineRL
from align.config.training_base import TRLStage
from align.data.prepare import PreparedData, prepare
from align.errors import UserError
from align.models import gguf_conversion
from align.pipeline.plan import PlannedStage
from align.pipeline.probe import control, inference, online_rl, training
from align.pipeline.probe.data import SampledData, data_inputs, sample
from align.pipeline.probe.timing import Seconds, StageTime, Stopwatch
from align.runtime import distributed

NO_DATA = "its data are not prepared yet and are too large or on the Hub"


def measure(
    stages: Sequence[PlannedStage],
    prepared: Mapping[Path, PreparedData],
    runs: Path,
    *,
    announce: Callable[[str], None],
    watch: Stopwatch | None = None,
) -> dict[str, StageTime]:
    """The expected time of each unfinished stage, by name.

    ``prepared`` are data in memory, by the folder of their stage. ``announce`` is called with the
    name of each stage before it is measured.
    """
    watch = watch or Stopwatch()
    times: dict[str, StageTime] = {}
    with tempfile.TemporaryDirectory(prefix="align-probe-") as name:
        folder = Path(name)
        data = sample(stages, prepared, folder / "data")
        folders: dict[Path, Path] = {}
        for stage in stages:
            if stage.status == "reused":
                continue
            announce(stage.name)
            distributed.reset_process_state(0)
            for file in stage.gguf_files.values():
                gguf_conversion.converted(file, runs, announce)
            output_dir = folder / stage.name
            output_dir.mkdir(exist_ok=True)
            times[stage.name] = _measure(stage, data, folders, output_dir, watch)
            if stage.config.trains_model:
                folders[stage.folder] = output_dir
    return times


def _measure(
    stage: PlannedStage,
    data: Mapping[Path, SampledData],
    folders: Mapping[Path, Path],
    output_dir: Path,
    watch: Stopwatch,
) -> StageTime:
    """The time of one stage; an error of the stage is its remark."""
    config = stage.config
    if isinstance(config, Prepare):
        if stage.folder not in data:
            return StageTime(known=False, remark=NO_DATA)
        return StageTime({"prepare": Seconds.exactly(watch.once(lambda: prepare(config)))})
    if isinstance(config, Control):
        return control.measure(config, watch)
    sources = data_inputs(stage)
    if any(source not in data for source in sources):
        return StageTime(known=False, remark=NO_DATA)
    sampled = data[sources[0]]
    inputs: dict[str, Path | str] = {
        key: data[Path(target)].folder
        if Path(target) in data
        else folders.get(Path(target), target)
        for key, target in stage.inputs.items()
    }
    missing = [i for i in inputs.values() if isinstance(i, Path) and not i.is_dir()]
    if missing:
        return StageTime(known=False, remark="a stage that it reads could not be measured")
    try:
        if isinstance(config, TRLStage):
            return training.measure(config, stage.stage, inputs, sampled, output_dir, watch)
        if isinstance(config, OnlineRL):
            return online_rl.measure(config, inputs, sampled, output_dir, watch)
        if isinstance(config, Sample):
            return inference.measure_sample(config, inputs, sampled, watch)
        if isinstance(config, Label):
            return inference.measure_label(config, inputs, sampled, watch)
        if isinstance(config, Evaluate):
            return inference.measure_evaluate(config, inputs, sampled, watch)
    except UserError as error:
        return StageTime(known=False, remark=error.lines[0])
    return StageTime(known=False, remark="this kind of stage has no probe")
