"""Finds a data set that TFDS prepared on disk. TFDS itself would use the network."""

import os
import re
from pathlib import Path
from typing import Any

from experiments.data.splits import DatasetError
from experiments.system.suggestions import did_you_mean

_NAME = re.compile(
    r"(?P<dataset>[a-z_]\w*)(/(?P<config>[\w+\-.]*\w))?(:(?P<version>\d+\.\d+\.\d+))?"
)
VERSION = re.compile(r"\d+\.\d+\.\d+")
_METADATA = ("dataset_info.json", "features.json")


def open_builder(name: str, data_dir: str | os.PathLike[str] | None = None) -> Any:
    """Returns the TFDS builder that reads a prepared data set.

    Args:
        name: as TFDS writes it: `name`, `name/config`, `name:version` or `name/config:version`.
            The default version is the newest, the default configuration the only one. Or the path
            of its folder.
        data_dir: the folder that TFDS prepared it in; by default TFDS's own, `TFDS_DATA_DIR` or
            `~/tensorflow_datasets`.

    Raises:
        DatasetError: if it is not there, or its format needs TensorFlow to read. The message has
            the commands that prepare it.
    """
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    root = Path(default if data_dir is None else data_dir).expanduser()
    folder = _newest(Path(name).expanduser()) if is_path(name) else _folder(name, root)

    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise DatasetError(
            f"{folder} is in the format {' and '.join(sorted(formats))}, not array_record: "
            f"delete it or choose another folder, and {_how_to_prepare(name, root)}"
        )
    return builder


def key_of(info: Any, kind: type, *preferred: Any) -> str:
    """Returns the key of the only feature of a kind, or of a preferred one.

    Raises:
        DatasetError: if there is none, or if there are several.
    """
    keys = sorted(key for key, value in info.features.items() if isinstance(value, kind))
    for key in preferred:
        if key in keys:
            return key
    if len(keys) != 1:
        raise DatasetError(
            f"{info.full_name} is no data set to classify: it should have one {kind.__name__}, but "
            f"has {keys} in {info.features}"
        )
    return keys[0]


def train_and_test(builder: Any, label_key: str) -> tuple[Any, Any]:
    """Returns TFDS's data sources of the training and the test part. Images are not decoded.

    The test part is TFDS's `test`, or `validation` if `test` is missing or has no labels.

    Raises:
        DatasetError: if a part is missing or cannot be read.
    """
    import tensorflow_datasets as tfds

    features = builder.info.features
    images = [key for key in features if isinstance(features[key], tfds.features.Image)]
    skip = {key: tfds.decode.SkipDecoding() for key in images}

    def source(split: str) -> Any:
        return builder.as_data_source(split, decoders=skip, file_format="array_record")

    def first_label(split: str) -> int:
        try:
            return source(split)[0][label_key]
        except Exception as error:
            raise DatasetError(f"{builder.data_dir} cannot be read: {error}") from error

    splits = builder.info.splits
    if "train" in splits:
        for name in ("test", "validation"):
            # In ImageNet's test split the labels are -1.
            if name in splits and first_label(name) >= 0:
                return source("train"), source(name)
    raise DatasetError(
        f"{builder.info.full_name} should have the split train, and test or validation with "
        f"labels, but has {', '.join(splits)}"
    )


def is_path(name: str) -> bool:
    """Returns whether the name of a data set is the path of a folder."""
    return name.startswith((".", "/", "~")) or ("/" in name and Path(name).is_dir())


def is_prepared(path: Path) -> bool:
    """Returns whether TFDS prepared the folder: a version, or the folder of several versions."""
    return bool(_is_version(path.expanduser()) or _versions(path.expanduser()))


def _folder(name: str, root: Path) -> Path:
    """Returns the folder of the version, which has the files that describe it."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise DatasetError(
            f"{name!r} names no data set: use 'digits'; 'mnist1d'; a TFDS name: 'name', "
            "'name/config', 'name:1.0.0' or 'name/config:1.0.0'; or the path of a folder"
        )
    folder = root / match["dataset"]
    if match["config"]:
        folder /= match["config"]
    versions = _versions(folder)
    if not versions and not match["config"]:
        configs = [path.name for path in _folders(folder) if _versions(path)]
        if len(configs) > 1:
            names = ", ".join(f"{match['dataset']}/{config}" for config in configs)
            raise DatasetError(f"{folder} has several configurations, name one: {names}")
        folder = folder.joinpath(*configs)
        versions = _versions(folder)
    if match["version"]:
        versions = [path for path in versions if path.name == match["version"]]
    if not versions:
        there = [path.name for path in _folders(root) if _folders(path)]
        meant = did_you_mean(name, [*there, "digits"])
        what_to_do = f".{meant}" if meant else f": {_how_to_prepare(name, root)}"
        raise DatasetError(f"there is no {name} in {root}{what_to_do}")
    return _newest(folder, versions)


def _newest(folder: Path, versions: list[Path] | None = None) -> Path:
    """Returns the folder of the newest version; `folder` may be one itself."""
    if _is_version(folder):
        return folder
    versions = versions or _versions(folder)
    return max(versions, key=lambda path: [int(part) for part in path.name.split(".")])


def _folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir()) if path.is_dir() else []


def _versions(path: Path) -> list[Path]:
    return [child for child in _folders(path) if _is_version(child)]


def _is_version(path: Path) -> bool:
    has_metadata = all((path / file).is_file() for file in _METADATA)
    return has_metadata and VERSION.fullmatch(path.name) is not None


def _how_to_prepare(name: str, root: Path) -> str:
    return (
        "prepare it once, with TensorFlow installed, by\n"
        "    pip install tensorflow tensorflow-datasets\n"
        '    python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir='{root}', file_format='array_record')"
        '.download_and_prepare()"'
    )
