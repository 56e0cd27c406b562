"""Any classification data set that TFDS prepared: images or texts."""

from experiments.data.dataset import Dataset, Source
from experiments.data.prepared import open_builder
from experiments.data.tfds_images import tfds_images
from experiments.data.tfds_texts import tfds_texts


def tfds_prepared(source: Source) -> Dataset:
    """Returns a data set that TFDS has prepared on disk: texts if it has any and no images.

    Raises:
        DatasetError: if the data set is not on disk, not in array_record format, not a
            classification data set, or cannot be used as requested.
    """
    builder = open_builder(source.name, source.data_dir)

    import tensorflow_datasets as tfds

    features = builder.info.features.values()
    kinds = (tfds.features.Image, tfds.features.Text)
    images, texts = (any(isinstance(feature, kind) for feature in features) for kind in kinds)
    return tfds_texts(source, builder) if texts and not images else tfds_images(source, builder)
