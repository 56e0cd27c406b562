"""Any text classification data set of TFDS, as tokens in memory."""

from typing import Any

import numpy as np

from experiments.data.arrays import dataset_from_arrays, stratified
from experiments.data.dataset import Dataset, Source
from experiments.data.encoded import VALIDATION_SHARE
from experiments.data.prepared import key_of, train_and_test
from experiments.data.splits import DatasetError
from experiments.data.tokens import SUBWORD, tokens_for

MAX_LENGTH = 128


def tfds_texts(source: Source, builder: Any) -> Dataset:
    """Returns a data set of texts that TFDS has prepared on disk.

    90 % of TFDS's training split are the training part, on which the tokenizer is fitted, and 10 %
    are the validation part. Neither depends on the seed. An "image" is the first
    `source.max_length` tokens of a text (128 by default), filled with 0: uint16, or int32 if there
    are more than 65,536 different ones.

    Args:
        source: the request.
        builder: TFDS's, of the data set.

    Raises:
        DatasetError: if the data set does not have one text and one label, or cannot be used as
            requested.
    """
    import tensorflow_datasets as tfds

    if source.image_size is not None:
        raise DatasetError(f"{source.name} has texts: image_size must be left out")
    info = builder.info
    supervised = info.supervised_keys or (None, None)
    text_key = key_of(info, tfds.features.Text, supervised[0], "text")
    label_key = key_of(info, tfds.features.ClassLabel, supervised[1], "label")
    parts = [_read(part, text_key, label_key) for part in train_and_test(builder, label_key)]
    (train_texts, train_labels), (test_texts, test_labels) = parts
    labels = np.concatenate([train_labels, test_labels])
    held_out = max(1, round(VALIDATION_SHARE * len(train_labels)))
    classes = info.features[label_key].num_classes
    rarest = np.bincount(train_labels, minlength=classes)
    if held_out < classes or 0 < rarest[rarest > 0].min() < 2:
        raise DatasetError(
            f"{info.full_name} has too few training texts, {len(train_labels)}: the validation "
            f"part is a tenth of them, and should have all {classes} classes"
        )
    fitted_on, _ = stratified(np.arange(len(train_labels)), labels, held_out)
    tokens = tokens_for(
        source.tokenizer or SUBWORD,
        (train_texts[number] for number in fitted_on),
        source.vocabulary_size,
    )
    return dataset_from_arrays(
        source,
        tokens.ids([*train_texts, *test_texts], source.max_length or MAX_LENGTH),
        labels,
        classes=classes,
        validation=held_out,
        test=np.arange(len(train_labels), len(labels)),
        mean=np.zeros(0, np.float32),
        std=np.zeros(0, np.float32),
    )._replace(vocabulary=tokens.vocabulary, tokenizer=tokens.content)


def _read(part: Any, text_key: str, label_key: str) -> tuple[list[str], np.ndarray]:
    texts, labels = [], []
    for number in range(len(part)):
        example = part[number]
        text = example[text_key]
        texts.append(text.decode(errors="replace") if isinstance(text, bytes) else str(text))
        labels.append(example[label_key])
    return texts, np.asarray(labels, np.int32)
