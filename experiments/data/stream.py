"""Batches of a data set that does not fit in memory, decoded by worker processes."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from experiments.data.image_files import centre_crop, random_resized_crop
from experiments.data.records import Records
from experiments.data.splits import BLOCK, DatasetError, Split, damaged_files
from experiments.data.workers import made_ahead


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """A part of a data set that is read, decoded and resized again for each batch.

    A batch depends only on the arguments, not on the number of workers or on the first step that
    is read.

    Attributes:
        records: image files and labels.
        image_size: height and width of the images in the batches.
        workers: number of processes that make the batches; 0 to make them in this process.
    """

    records: Records
    image_size: tuple[int, int]
    workers: int

    @property
    def streamed(self) -> bool:
        """True: it is read from disk."""
        return True

    @property
    def examples(self) -> int:
        """The number of examples."""
        return len(self.records)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images in the batches."""
        return (*self.image_size, self.records.channels)

    @property
    def identity(self) -> tuple[np.ndarray, ...]:
        """The indices of the records, and their label noise."""
        return (self.records.indices, self.records.offsets)

    def sample(self) -> Iterator[np.ndarray]:
        """Yields the central crops of the first images."""
        return (
            centre_crop(file, self.records.channels, self.image_size)
            for file, _ in self.records.read(slice(0, BLOCK))
        )

    def training_batches(
        self,
        batch_size: int,
        seed: int,
        first_step: int = 0,
        epochs: int = 1,
        rows: np.ndarray | None = None,
    ) -> Iterator[Split]:
        """Returns random parts of the images in random order, both new in each epoch.

        Args:
            batch_size: examples per batch. An epoch drops its incomplete last batch.
            seed: seed of the orders and the parts, at least 0 and below 2**32.
            first_step: number of batches to skip. They are not read.
            epochs: passes over the examples, skipped batches included.
            rows: int[rows], the rows of each batch to make here (default: all). They do not
                depend on the other rows.

        Returns:
            Batches of NumPy arrays: uint8[rows, height, width, channels] and int32[rows].

        Raises:
            DatasetError: if a batch has more examples than there are, or none.
        """
        import grain

        if not 1 <= batch_size <= self.examples:
            raise DatasetError(
                f"batch_size must be at least 1 and at most {self.examples}, got {batch_size}"
            )
        batches = (
            grain.MapDataset.range(self.examples)
            .seed(seed)
            .shuffle()
            .batch(batch_size, drop_remainder=True)
            .random_map(functools.partial(self._random_parts, rows=rows))
            .repeat(epochs)
        )
        return made_ahead(batches[first_step:], self.workers)

    def batches(self, batch_size: int, rows: np.ndarray | None = None) -> Iterator[Split]:
        """Returns the central parts of all images in order; the last batch may be shorter.

        Args:
            batch_size: examples per batch.
            rows: int[rows], the rows of each batch to make here (default: all).

        Returns:
            Batches of NumPy arrays: uint8[rows, height, width, channels] and int32[rows], without
            the rows that the last batch lacks.
        """
        import grain

        batches = grain.MapDataset.range(-(-self.examples // batch_size))
        rows = np.arange(batch_size) if rows is None else rows
        centres = functools.partial(self._centres, batch_size=batch_size, rows=rows)
        return made_ahead(batches.map(centres), self.workers)

    def _random_parts(
        self, positions: np.ndarray, rng: np.random.Generator, rows: np.ndarray | None
    ) -> Split:
        # One seed per image: an image does not depend on which process makes the others.
        seeds = rng.integers(2**32, size=len(positions))
        here = slice(None) if rows is None else rows
        decode = [
            functools.partial(random_resized_crop, rng=np.random.default_rng(seed))
            for seed in seeds[here]
        ]
        return self._batch(positions[here], decode)

    def _centres(self, number: int, batch_size: int, rows: np.ndarray) -> Split:
        positions = number * batch_size + rows
        positions = positions[positions < self.examples]
        return self._batch(positions, [centre_crop] * len(positions))

    def _batch(self, positions: np.ndarray, decoders: Sequence[Callable[..., np.ndarray]]) -> Split:
        channels = self.records.channels
        images = np.zeros((len(positions), *self.image_size, channels), np.uint8)
        labels = np.zeros(len(positions), np.int32)
        with damaged_files("the data set"):
            for row, (file, label) in enumerate(self.records.read(positions)):
                images[row] = decoders[row](file, channels, self.image_size)
                labels[row] = label
        return Split(images, labels)
