"""A training run from start to end: its data, its folder, its loop."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax

from experiments import data
from experiments.config.config import CHANGEABLE, TOKENIZER, Config
from experiments.config.recipe import Recipe, differences, filled_in, resolve
from experiments.data.workers import WorkerError
from experiments.run.ends import StoppedRunError
from experiments.run.experiment import Experiment, experiment_of
from experiments.run.folder import CONFIG, RunFolder, as_json, as_text, read_config
from experiments.run.loop import Run
from experiments.step.layout import layout_of
from experiments.system import files, processes
from experiments.system.command_line import ArgumentError
from experiments.system.exhaustion import ExhaustedError, what_is_exhausted
from experiments.system.interruption import Interruption, SharedInterruption


def train(config: Config, resume: Path | None = None) -> dict[str, Any]:
    """Trains as configured. Returns the summary in the run folder, and the path of the folder.

    Args:
        config: the options. To resume a run, they are those of its folder.
        resume: the folder of a run to resume from its last checkpoint; None for a new run.

    Raises:
        ArgumentError: if the options do not fit the data, or the run folder exists or cannot be
            made.
        DatasetError: if the data set is not there.
        CheckpointError: if a checkpoint cannot be read.
        StoppedRunError: if data can no longer be read, or, as a NonFiniteLossError, if a loss or a
            parameter is not finite. The message names the step, and how to resume.
        InterruptedRunError: on Ctrl-C, after a checkpoint at the end of the current launch. A
            SIGTERM also writes a checkpoint, but returns. In both cases the status in the summary
            is "interrupted". If there are several processes, Ctrl-C ends one at once.
    """
    if resume is not None:
        summary = RunFolder(resume).read_summary()
        if summary is not None and summary.is_finished:
            return dataclasses.asdict(summary) | {"folder": str(resume.resolve())}
    with contextlib.ExitStack() as stack:
        shared = jax.process_count() > 1
        interruption = stack.enter_context(SharedInterruption() if shared else Interruption())
        if resume is None:
            processes.from_first(lambda: _check_output(config.output))  # before the data is read
        if shared:
            stack.enter_context(processes.last_words(_last_words(resume or config.output)))
        run = None
        try:
            experiment = experiment_from(config, resume)
            every = config.checkpoint_every or _usual_interval(experiment)
            output = config.output or _new_folder(experiment.recipe)
            asked, config = config, _with_defaults(config, experiment.recipe, every, output)
            folder = stack.enter_context(contextlib.closing(_open(output, config, resume)))
            if content := experiment.dataset.tokenizer:
                folder.write_sealed({TOKENIZER: content})
            print(_in_words(asked, experiment, output))
            run = Run(experiment, folder, every, config.keep_checkpoints)
            stack.enter_context(contextlib.closing(run))
            if resume is not None:
                folder.write_sealed(_changed_config(config, resume))
            run.train(interruption)
            return run.finish(interruption)
        except StoppedRunError as error:
            if run is not None:
                run.write_summary(error.why)
            raise
        except (WorkerError, data.DatasetError) as error:
            if run is None:
                raise
            why = f"stopped: {error}"
            run.write_summary(why)
            raise StoppedRunError(why, f"to resume: {_resuming(run.folder.path)}") from error
        except Exception as error:
            if shared and processes.is_lost_peer(error):
                processes.abandon(error)
            if run is not None and (what := what_is_exhausted(error)):
                how = f"What was saved is kept. To resume: {_resuming(run.folder.path)}"
                raise ExhaustedError(f"{what}. {how}") from error
            raise


def experiment_from(config: Config, folder: Path | None = None) -> Experiment:
    """Loads the data and builds the experiment that the options describe.

    Args:
        config: the options.
        folder: the folder of the run, whose checkpoints will be restored; None for a new run.

    Raises:
        ArgumentError: if the options contradict each other, the data or the devices.
        DatasetError: if the data set is not there, or processes have different ones.
    """
    recipe = resolve(config)
    layout = layout_of(recipe, config)
    source, start = config.source(config.seed), None
    if folder is not None and RunFolder(folder).has_checkpoints:
        start = {}  # everything comes from the run's own checkpoints
        if data.dataset_spec(source.name).kind == "texts" or (folder / TOKENIZER).is_file():
            tokenizer = str(folder / TOKENIZER)
            source = dataclasses.replace(source, tokenizer=tokenizer, vocabulary_size=None)
    dataset = processes.agreed(lambda: data.load(source), lambda loaded: loaded.fingerprint, "data")
    return experiment_of(recipe, dataset, layout, start)


def _in_words(config: Config, experiment: Experiment, output: Path) -> str:
    """Returns what is trained, and a table of the options that are not at their defaults."""
    recipe, train = experiment.recipe, experiment.train
    devices = experiment.layout.mesh.size
    lines = [
        f"{recipe.label} on {recipe.dataset}: {recipe.model}, {recipe.epochs} epochs of "
        f"{experiment.steps_per_epoch} steps, {train.examples:,} training examples in batches of "
        f"{recipe.batch_size}, on {devices} {'device' if devices == 1 else 'devices'}"
    ]
    table = [("option", "value", "default"), *differences(config)]
    if len(table) > 1:
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        cells = (zip(row, widths, strict=True) for row in table)
        lines += ["  " + "  ".join(f"{text:{n}}" for text, n in row).rstrip() for row in cells]
    return "\n".join([*lines, f"all options: {files.as_typed(output / 'config.json')}"])


def _usual_interval(experiment: Experiment) -> int:
    """Returns the steps between checkpoints."""
    epochs = data.dataset_spec(experiment.recipe.dataset).checkpoint_epochs
    return epochs * experiment.steps_per_epoch


def _new_folder(recipe: Recipe) -> Path:
    dataset = data.base_name(recipe.dataset)
    return files.new_folder(f"{dataset}-{recipe.method}-seed{recipe.seed}")


def _with_defaults(config: Config, recipe: Recipe, every: int, output: Path) -> Config:
    """Returns the options with every value filled in, for the run folder."""
    return dataclasses.replace(
        filled_in(config, recipe),
        checkpoint_every=every,
        data_dir=config.data_dir and config.data_dir.resolve(),
        output=output,
    )


def _changed_config(config: Config, folder: Path) -> dict[str, str]:
    """Returns config.json with what was changed when the run was resumed; nothing if nothing."""
    there = read_config(folder)
    changed = {name: getattr(config, name) for name in CHANGEABLE}
    new = dataclasses.replace(there, **changed)
    return {} if new == there else {CONFIG: as_text(as_json(new))}


def _resuming(folder: Path) -> str:
    return f"python -m experiments.train --resume {files.as_typed(folder)}"


def _last_words(folder: Path | None) -> str:
    return (
        "error: this process was ended. If a line above says that a task died or a connection was "
        "lost, another process of the run is gone. To resume from the last checkpoint, start all "
        f"processes again with --resume {folder or 'and the run folder'}\n"
    )


def _check_output(path: Path | None) -> str:
    if path is not None:
        try:
            files.check_new(path)
        except OSError as error:
            raise ArgumentError(f"--output must be a new folder: {error}") from error
    return ""


def _open(output: Path, config: Config, resume: Path | None) -> RunFolder:
    """Returns the folder to write to. The first process makes and locks it."""
    opened = []

    def open_() -> str:
        try:
            if resume is None:
                folder = RunFolder.create(output, as_json(config))
            else:
                folder = RunFolder(resume)
                folder.lock()
        except OSError as error:
            raise ArgumentError(f"--output must be a folder to write to: {error}") from error
        opened.append(folder)
        return str(folder.path)

    path = Path(processes.from_first(open_))
    return opened[0] if opened else RunFolder(path, writes=False)
