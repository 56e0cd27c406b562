"""Batches of what does not fit in memory, decoded by worker processes."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import numpy as np

from experiments.data.image_files import centre_crop, random_resized_crop
from experiments.data.records import Records
from experiments.data.splits import DatasetError, Split
from experiments.data.workers import made_ahead


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """A part of a data set that is read, decoded and resized anew for each batch.

    A batch depends on the arguments alone, not on the number of workers or on where the stream was
    entered.

    Attributes:
        records: image files and labels.
        image_size: height and width of the images in the batches.
        workers: processes that make the batches; 0 for this one.
    """

    records: Records
    image_size: tuple[int, int]
    workers: int

    def __len__(self) -> int:
        return len(self.records)

    def training_batches(
        self, batch_size: int, seed: int, first_step: int = 0, epochs: int = 1
    ) -> Iterator[Split]:
        """Random parts of the images in random order, both new in each epoch.

        Args:
            batch_size: examples a batch; what is left over at the end of an epoch is dropped.
            seed: of the orders and the parts, at least 0 and below 2**32.
            first_step: number of batches to leave out, without reading them.
            epochs: passes over the examples, those left out included.

        Returns:
            Of NumPy arrays: uint8[batch, height, width, channels] and int32[batch].

        Raises:
            DatasetError: if there are fewer examples than in a batch.
        """
        import grain

        if not 1 <= batch_size <= len(self):
            raise DatasetError(
                f"batch_size must be at least 1 and at most {len(self)}, got {batch_size}"
            )
        # With several hosts, each would take its slice of the shuffled positions here.
        batches = (
            grain.MapDataset.range(len(self))
            .seed(seed)
            .shuffle()
            .batch(batch_size, drop_remainder=True)
            .random_map(self._random_parts)
            .repeat(epochs)
        )
        return made_ahead(batches[first_step:], self.workers)

    def batches(self, batch_size: int) -> Iterator[Split]:
        """The centres of all images in their order, for evaluation; the last batch may be shorter.

        Returns:
            Of NumPy arrays: uint8[batch, height, width, channels] and int32[batch].
        """
        import grain

        positions = grain.MapDataset.range(len(self)).batch(batch_size)
        return made_ahead(positions.map(self._centres), self.workers)

    def _random_parts(self, positions: np.ndarray, rng: np.random.Generator) -> Split:
        return self._batch(positions, functools.partial(random_resized_crop, rng=rng))

    def _centres(self, positions: np.ndarray) -> Split:
        return self._batch(positions, centre_crop)

    def _batch(self, positions: np.ndarray, decode: Callable[..., np.ndarray]) -> Split:
        files, labels = zip(*self.records.read(positions), strict=True)
        images = [decode(file, self.records.channels, self.image_size) for file in files]
        return Split(np.stack(images), np.asarray(labels, np.int32))
