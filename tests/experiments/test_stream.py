"""Data sets that do not fit in memory, or whose images differ in size."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import data
from experiments.data import image_files
from tests.experiments import tiny_dataset

ROOT = Path(__file__).parents[2]
SIZE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of 30 JPEG files of four sizes to train, each of a class of its own."""
    folder = tmp_path_factory.mktemp("data")
    sizes = tiny_dataset.VARIED
    tiny_dataset.write(folder, train=30, test=10, classes=30, sizes=sizes, encoding="jpeg")
    return folder


@pytest.fixture(scope="module")
def dataset(folder):
    return data.load("tiny", data_dir=folder, image_size=SIZE, workers=0)


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.labels, b.labels)


def test_what_does_not_fit_is_streamed(folder, tmp_path):
    assert data.load("tiny", data_dir=folder).image_shape == (224, 224, 3)
    tiny_dataset.write(tmp_path)
    in_memory = 80 * 12 * 12 * 3
    for options, streamed, size in (
        ({}, False, 12),
        ({"image_size": 12}, False, 12),
        ({"memory_limit": in_memory}, False, 12),
        ({"memory_limit": in_memory - 1}, True, 12),
        ({"image_size": 20}, True, 20),
    ):
        dataset = data.load("tiny", data_dir=tmp_path, **options)
        assert dataset.image_shape == (size, size, 3)
        assert all(isinstance(split, data.Stream) == streamed for split in dataset[:3])


def test_a_stream_has_the_examples_and_the_noise_of_the_same_data_in_memory(tmp_path):
    tiny_dataset.write(tmp_path)
    arguments = {"data_dir": tmp_path, "label_noise": 0.4, "seed": 2, "train_examples": 33}
    in_memory = data.load("tiny", **arguments)
    streamed = data.load("tiny", **arguments, memory_limit=0, workers=0)
    for arrays, stream in zip(in_memory[:3], streamed[:3], strict=True):
        assert len(stream) == len(arrays.labels)
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


def test_it_resumes_bit_for_bit_at_any_step(dataset):
    complete = list(dataset.train.training_batches(7, seed=3, epochs=3))
    assert len(complete) == 9
    for step in range(10):
        rest = dataset.train.training_batches(7, seed=3, first_step=step, epochs=3)
        assert_same(list(rest), complete[step:])


def test_workers_change_nothing_and_use_no_device(folder, dataset, monkeypatch):
    # A worker that asked for a device would fail.
    monkeypatch.setenv("JAX_PLATFORMS", "none")
    stream = data.load("tiny", data_dir=folder, image_size=SIZE, workers=2).train
    for batches in (
        lambda stream: stream.training_batches(5, seed=1, first_step=3, epochs=2),
        lambda stream: stream.batches(8),
    ):
        assert_same(list(batches(stream)), list(batches(dataset.train)))


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
    dataset = data.load("tiny", data_dir=sys.argv[1], image_size=8, workers=1)
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


def test_a_random_part_follows_the_rule():
    rng = np.random.default_rng(0)
    width, height = 400, 300
    boxes = np.array([image_files.random_box((width, height), rng) for _ in range(3000)])
    left, top, right, bottom = boxes.T
    assert min(left.min(), top.min()) == 0
    assert (right.max(), bottom.max()) == (width, height)
    areas = (right - left) * (bottom - top) / (width * height)
    ratios = (right - left) / (bottom - top)
    assert 0.078 < areas.min() < 0.1
    assert areas.max() > 0.9
    assert 0.73 < ratios.min() < 0.77
    assert 1.31 < ratios.max() < 1.36
    small = areas < 0.5
    assert abs(areas[small].mean() - 0.29) < 0.01
    assert abs(np.log(ratios[small]).mean()) < 0.01


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((90, 3), (43, 0, 47, 3)),
        ((3, 90), (0, 43, 3, 47)),
    ],
)
def test_a_part_that_never_fits_becomes_the_central_one(size, box):
    rng = np.random.default_rng(0)
    assert image_files.random_box(size, rng) == box


def test_a_random_part_is_resized_to_the_size():
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    result = image_files.random_resized_crop(
        tiny_dataset.encoded(image), 3, (8, 6), np.random.default_rng(5)
    )
    box = image_files.random_box((40, 30), np.random.default_rng(5))
    expected = Image.fromarray(image).resize((6, 8), Image.Resampling.BILINEAR, box=box)
    np.testing.assert_array_equal(result, np.asarray(expected))


def test_the_centre_is_224_of_256_pixels():
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    centre = image_files.centre_crop(tiny_dataset.encoded(image), 3, (28, 28))
    np.testing.assert_array_equal(centre, image[2:30, 10:38])
    tall = image_files.centre_crop(tiny_dataset.encoded(image), 3, (28, 14))
    np.testing.assert_array_equal(tall, image[2:30, 17:31])


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "1"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_any_colour_model_becomes_the_channels(mode, channels):
    image = Image.fromarray(np.full((3, 5, 3), 255, np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "tiff" if mode == "CMYK" else "png")
    decoded = image_files.decode(buffer.getvalue(), channels)
    assert decoded.shape == (3, 5, channels)
    assert decoded.dtype == np.uint8
    assert (decoded == 255).all()
