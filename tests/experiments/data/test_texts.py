"""Texts as tokens: what is fitted on what, and what is kept."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tokenizers

from experiments import data
from experiments.data.dataset import Source
from experiments.data.tokens import PADDING, START, Tokens, tokens_for
from tests.experiments import tiny_dataset

TEXTS = ["the ship sails", "the ship sank", "a cat sat", "a cat ate"] * 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    tiny_dataset.write_texts(folder)
    return folder


def load(folder, **options):
    return data.load(Source("texts", data_dir=folder, **options))


def test_ids_are_the_text_and_padding():
    tokens = tokens_for("subword", TEXTS, 280)
    assert 258 < tokens.vocabulary <= 280
    ids = tokens.ids(["the ship", "a cat sat", ""], 6)
    assert ids.dtype == np.uint16
    assert ids[:, 0].tolist() == [START] * 3
    assert ids[2].tolist() == [START, *[PADDING] * 5]
    decoder = tokenizers.Tokenizer.from_str(tokens.content)
    assert decoder.decode(ids[0][ids[0] > START].tolist()).strip() == "the ship"
    # The first tokens are kept, and the rest is cut off.
    np.testing.assert_array_equal(tokens.ids(["the ship"], 2), ids[:1, :2])
    # What no training text had is still there, byte by byte.
    strange = tokens.ids(["\u0416"], 6)[0]
    assert (strange != PADDING).sum() == 4


def test_the_same_texts_give_the_same_tokens():
    texts = [f"{word} {number}" for number in range(200) for word in TEXTS]
    assert tokens_for("subword", texts, 400).content == tokens_for("subword", texts, 400).content


def test_bytes():
    tokens = tokens_for("bytes", [])
    assert tokens.vocabulary == 258
    assert tokens.ids(["a\u00e9"], 6).tolist() == [[START, 2 + 97, 2 + 195, 2 + 169, 0, 0]]
    assert Tokens(tokens.content).vocabulary == 258


def test_the_tokenizer_is_fitted_on_training_texts_only(folder):
    loaded = load(folder)
    assert (loaded.image_shape, loaded.classes) == ((128,), 2)
    assert loaded.vocabulary == Tokens(loaded.tokenizer).vocabulary
    parts = [part.examples for part in (loaded.train, loaded.validation, loaded.test)]
    assert parts == [36, 4, 10]
    # A word that was seen ten times has become one token.
    ids = Tokens(loaded.tokenizer).ids([f" {tiny_dataset.word(n)}" for n in range(50)], 8)
    seen = np.flatnonzero((ids != PADDING).sum(1) == 2)
    assert len(seen) == 36
    assert seen.max() < 40


def test_noise_and_fewer_examples_leave_the_tokens(folder):
    first, other = load(folder), load(folder, label_noise=0.5, seed=3, train_examples=10)
    assert other.tokenizer == first.tokenizer
    np.testing.assert_array_equal(other.train.images, first.train.images[:10])
    assert (other.validation.labels != first.validation.labels).sum() == 2
    np.testing.assert_array_equal(other.test.labels, first.test.labels)
    assert other.fingerprint != first.fingerprint


def test_tokens_of_an_earlier_run(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokens_for("subword", TEXTS, 270).content)
    loaded = load(folder, tokenizer=str(tmp_path / "tokenizer.json"), max_length=16)
    assert loaded.tokenizer == (tmp_path / "tokenizer.json").read_text()
    assert loaded.train.images.shape == (36, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "none.json"}, "tokenizer must be 'subword', 'bytes' or the path"),
        ({"tokenizer": __file__}, "tokenizer must be 'subword', 'bytes' or the path"),
        ({"tokenizer": "bytes", "vocabulary_size": 300}, "no meaning with the tokenizer 'bytes'"),
        ({"image_size": 8}, "texts has texts: image_size must be left out"),
    ],
    ids=["no file", "no tokenizer", "size of bytes", "image size"],
)
def test_bad_requests(options, message, folder):
    with pytest.raises(data.DatasetError, match=message):
        load(folder, **options)


def test_a_tokenizer_with_other_first_tokens_is_refused(folder, tmp_path):
    content = tokens_for("subword", TEXTS, 270).content.replace("[START]", "[OTHER]")
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(data.DatasetError, match=r"its first token should be \[PAD\]"):
        load(folder, tokenizer=str(tmp_path / "other.json"))


@pytest.mark.parametrize("name", ["max_length", "tokenizer", "vocabulary_size"])
def test_images_have_no_tokens(name):
    value = {"tokenizer": "bytes"}.get(name, 300)
    with pytest.raises(data.DatasetError, match=f"{name} has no meaning for digits, which has no"):
        data.load(Source("digits", **{name: value}))


def test_two_texts_are_refused(tmp_path):
    features = {
        "one": tfds.features.Text(),
        "other": tfds.features.Text(),
        "label": tfds.features.ClassLabel(num_classes=2),
    }
    rows = [{"one": "a", "other": "b", "label": n % 2} for n in range(4)]
    tiny_dataset.build(tmp_path, "pairs", features, {"train": rows, "test": rows})
    with pytest.raises(data.DatasetError, match="should have one Text, but has"):
        data.load(Source("pairs", data_dir=tmp_path))
