"""Streams: data sets larger than the memory, or with images of several sizes."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import data
from experiments.data import image_files
from experiments.data.prepared import open_builder
from experiments.data.tfds_images import tfds_images
from experiments.data.workers import WorkerError, made_ahead
from tests.experiments import tiny_dataset

ROOT = Path(__file__).parents[3]
SIZE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of 30 JPEG files of four sizes to train, each in its own class."""
    folder = tmp_path_factory.mktemp("data")
    sizes = tiny_dataset.VARIED
    tiny_dataset.write(folder, train=30, test=10, classes=30, sizes=sizes, encoding="jpeg")
    return folder


def load(folder, memory_limit=None, **options):
    source = data.Source("tiny", data_dir=folder, **options)
    return (
        data.load(source)
        if memory_limit is None
        else tfds_images(
            source, open_builder(source.name, source.data_dir), memory_limit=memory_limit
        )
    )


@pytest.fixture(scope="module")
def dataset(folder):
    return load(folder, image_size=SIZE, workers=0)


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.labels, b.labels)


def test_larger_data_sets_are_streamed(folder, tmp_path):
    assert load(folder).image_shape == (224, 224, 3)
    tiny_dataset.write(tmp_path)
    in_memory = 80 * 12 * 12 * 3
    for options, streamed, size in (
        ({}, False, 12),
        ({"image_size": 12}, False, 12),
        ({"memory_limit": in_memory}, False, 12),
        ({"memory_limit": in_memory - 1}, True, 12),
        ({"image_size": 20}, True, 20),
    ):
        dataset = load(tmp_path, **options)
        assert dataset.image_shape == (size, size, 3)
        assert all(part.streamed == streamed for part in dataset[:3])


def test_a_stream_has_the_examples_and_the_noise_of_the_same_data_in_memory(tmp_path):
    tiny_dataset.write(tmp_path)
    arguments = {"label_noise": 0.4, "seed": 2, "train_examples": 33}
    in_memory = load(tmp_path, **arguments)
    streamed = load(tmp_path, memory_limit=0, workers=0, **arguments)
    for arrays, stream in zip(in_memory[:3], streamed[:3], strict=True):
        assert stream.examples == arrays.examples
        (batch,) = stream.batches(100)
        np.testing.assert_array_equal(batch.labels, arrays.labels)
        assert batch.images.shape == arrays.images.shape
    examples = zip(streamed.train.records.read(slice(None)), in_memory.train.images, strict=True)
    for (file, _), image in examples:
        np.testing.assert_array_equal(image_files.decode(file, 3), image)


def test_statistics_of_a_stream(dataset):
    (batch,) = dataset.train.batches(100)
    pixels = batch.images.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(dataset.mean, pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(dataset.std, pixels.std(0), rtol=1e-6)


def test_an_epoch_has_each_example_once_and_the_next_has_new_orders_and_parts(dataset):
    batches = list(dataset.train.training_batches(5, seed=0, epochs=2))
    for batch in batches:
        assert batch.images.shape == (5, SIZE, SIZE, 3)
        assert batch.images.dtype == np.uint8
        assert batch.labels.dtype == np.int32
    labels = np.concatenate([batch.labels for batch in batches])
    images = np.concatenate([batch.images for batch in batches])
    first, second = labels[:25], labels[27 // 5 * 5 :]
    assert len(set(first)) == len(set(second)) == 25
    assert (first != second).any()
    everything = {int(label) for _, label in dataset.train.records.read(slice(None))}
    assert set(labels) <= everything
    assert len(everything) == 27
    both = set(first) & set(second)
    for label in both:
        part, other = images[labels == label]
        assert (part != other).any()
    for seed in (1, 2):
        other = next(dataset.train.training_batches(5, seed=seed))
        assert (other.labels != first[:5]).any()


def test_a_stream_resumes_bit_for_bit_at_any_step(dataset):
    complete = list(dataset.train.training_batches(7, seed=3, epochs=3))
    assert len(complete) == 9
    for step in range(10):
        rest = dataset.train.training_batches(7, seed=3, first_step=step, epochs=3)
        assert_same(list(rest), complete[step:])


def test_workers_change_nothing_and_use_no_device(folder, dataset, monkeypatch):
    # A worker that asked for a device would fail.
    monkeypatch.setenv("JAX_PLATFORMS", "none")
    stream = load(folder, image_size=SIZE, workers=2).train
    options = {"batch_size": 5, "seed": 1, "first_step": 3, "epochs": 2}
    expected = list(dataset.train.training_batches(**options))
    assert_same(list(stream.training_batches(**options)), expected)


def test_evaluation_is_in_order_and_complete(dataset):
    stream = dataset.test
    batches = list(stream.batches(4))
    assert_same(list(stream.batches(4)), batches)
    assert [len(batch.labels) for batch in batches] == [4, 4, 2]
    labels = np.concatenate([batch.labels for batch in batches])
    np.testing.assert_array_equal(labels, np.arange(10))
    images = np.concatenate([batch.images for batch in batches])
    for image, (file, _) in zip(images, stream.records.read(slice(None)), strict=True):
        np.testing.assert_array_equal(image, image_files.centre_crop(file, 3, (SIZE, SIZE)))


@pytest.mark.parametrize("batch_size", [0, 28])
def test_a_batch_must_fit_into_an_epoch(dataset, batch_size):
    with pytest.raises(data.DatasetError, match=f"at least 1 and at most 27, got {batch_size}"):
        dataset.train.training_batches(batch_size, seed=0)


SCRIPT = """
import signal, sys
from experiments import data
if __name__ == "__main__":
    dataset = data.load(data.Source("tiny", data_dir=sys.argv[1], image_size=8, workers=1))
    batches = dataset.train.training_batches(4, seed=0, epochs=1_000_000)
    next(batches)
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.append(1))
    print("started", flush=True)
    while sys.argv[2] != "exit" and not stop:
        next(batches)
    for _ in range(20):
        next(batches)
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["exit", "SIGINT", "SIGTERM", "SIGKILL"])
def test_workers_end_with_the_program(end, folder, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, script, folder, end],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == "started\n"
        if end in ("SIGINT", "SIGTERM"):
            # As Ctrl-C in a terminal does, and the end of a job: to all processes.
            os.killpg(process.pid, signal.Signals[end])
        elif end == "SIGKILL":
            process.kill()
        # The pipes end when the last process that inherited them does.
        _, err = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if end != "SIGKILL":
        assert (process.returncode, err) == (0, "")


class Large:
    """Items that do not fit into a pipe: a worker is nearly always within the write of one."""

    def __len__(self):
        return 10_000

    def __getitem__(self, index):
        return bytes(4_000_000)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [1, 3])
def test_a_killed_worker_is_an_error(kept):
    """It does not wait for ever, and leaves no other worker behind."""
    before = set(multiprocessing.active_children())
    items = made_ahead(Large(), 2)
    for _ in range(kept):
        next(items)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    workers.pop().kill()
    with pytest.raises(WorkerError, match="has ended, perhaps for lack of memory"):
        list(items)
    assert not set(multiprocessing.active_children()) - before
