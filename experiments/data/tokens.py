"""Tokens of texts: a subword tokenizer fitted on the training texts, or bytes."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.splits import DatasetError

# Ids of the padding and of the token before every text: no text is empty.
PADDING, START = 0, 1
_SPECIAL = ("[PAD]", "[START]")
# In a tokenizer of BERT's, which puts it before every text itself.
_CLASS = "[CLS]"
BYTES = "bytes"
SUBWORD = "subword"
VOCABULARY_SIZE = 8192


class Tokens:
    """Turns texts into ids.

    Args:
        content: a tokenizer of the package `tokenizers` as JSON, fitted here or BERT's; or "bytes".

    Attributes:
        content: see Args.
        vocabulary: number of different ids.
    """

    def __init__(self, content: str) -> None:
        self.content = content
        self._subwords = None if content == BYTES else _package().Tokenizer.from_str(content)
        if self._subwords is None:
            self.vocabulary = len(_SPECIAL) + 256
            return
        # The text "[PAD]" is text.
        self._subwords.encode_special_tokens = True
        self.vocabulary = self._subwords.get_vocab_size()
        ids = [self._subwords.token_to_id(name) for name in (*_SPECIAL, _CLASS)]
        self._is_berts = ids[0] == PADDING and ids[2] is not None
        if not (self._is_berts or ids[:2] == [PADDING, START]):
            raise ValueError(
                f"its first token should be {_SPECIAL[0]}, and there should be {_CLASS}, or "
                f"{_SPECIAL[1]} in the second place"
            )

    def ids(self, texts: Sequence[str], length: int) -> np.ndarray:
        """Returns the first ids of each text: uint16 or int32[texts, length], filled with 0."""
        dtype = np.uint16 if self.vocabulary <= 2**16 else np.int32
        ids = np.full((len(texts), length), PADDING, dtype)
        if self._subwords is not None and self._is_berts:
            self._subwords.no_padding()
            self._subwords.enable_truncation(length)  # and the last token stays
            for row, encoded in zip(ids, self._subwords.encode_batch(list(texts)), strict=True):
                row[: len(encoded.ids)] = encoded.ids
            return ids
        if self._subwords is None:
            known = [[len(_SPECIAL) + byte for byte in text.encode()] for text in texts]
        else:
            known = [encoded.ids for encoded in self._subwords.encode_batch(list(texts))]
        for row, tokens in zip(ids, known, strict=True):
            row[0] = START
            row[1 : 1 + len(tokens)] = tokens[: length - 1]
        return ids


def tokens_for(request: str, texts: Iterable[str], vocabulary_size: int | None = None) -> Tokens:
    """Returns the tokens that a user asks for.

    Args:
        request: "subword", for byte-level byte-pair encoding fitted on `texts`; "bytes"; or the
            path of a tokenizer.json, of an earlier run or of a pretrained BERT.
        texts: the training texts.
        vocabulary_size: largest number of subwords, at least 258; None for 8,192.

    Raises:
        DatasetError: if the file is no such tokenizer, or the package is not installed; or if a
            size is given and nothing is fitted.
    """
    if request == SUBWORD:
        return Tokens(_fitted(texts, vocabulary_size or VOCABULARY_SIZE))
    if vocabulary_size is not None:
        raise DatasetError(f"vocabulary_size has no meaning with the tokenizer {request!r}")
    if request == BYTES:
        return Tokens(BYTES)
    try:
        return Tokens(Path(request).expanduser().read_text())
    except DatasetError:
        raise
    except Exception as error:  # the package raises plain exceptions
        raise DatasetError(
            f"tokenizer must be {SUBWORD!r}, {BYTES!r} or the path of a run's tokenizer.json, got "
            f"{request!r}: {error}"
        ) from error


def _fitted(texts: Iterable[str], vocabulary_size: int) -> str:
    package = _package()
    tokenizer = package.Tokenizer(package.models.BPE())
    tokenizer.normalizer = package.normalizers.NFC()
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel()
    tokenizer.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(_SPECIAL),
        initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def _package() -> Any:
    # Imported here because only texts need it.
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise DatasetError(
            "texts need the package tokenizers: pip install 'bisam_jax[text]'"
        ) from error
    return tokenizers
