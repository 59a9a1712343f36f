"""Folders of data files: which files a folder contains, and which of them belong to a split.

The path of a file names its split as in ``datasets``: by a folder or a file name that contains a
split name as a word, such as ``data/train/0000.parquet``, ``pairs-train.jsonl`` or
``train_prefs-00000-of-00001.parquet``. Folders written by ``save_to_disk`` are refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from align.data.files import SUFFIXES
from align.errors import DataError

_KEYWORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD = re.compile(r"-\d{4,}-of-\d{4,}.*")
_SEPARATORS = re.compile(r"[-._ 0-9]+")  # those of `datasets`
MAX_ENTRIES = 100_000  # files and folders that are searched
_METADATA = ("dataset_info.json", "dataset_infos.json")


class SplitName(NamedTuple):
    """Split that a path names. ``keyword`` is the standard split of which it may be a part."""

    name: str
    keyword: str | None


def split_files(folder: Path, split: str) -> list[Path]:
    """Files of a split, sorted; all files if ``split`` is empty.

    If no path names a split, all files are the split ``train``.

    Raises:
        DataError: The folder has no data files, or none of this split, or a path names two splits.
    """
    files = data_files(folder)
    if not split:
        return files
    names = {file: split_name(folder, file) for file in files}
    requested = _KEYWORDS.get(split.lower(), split.lower())
    if not any(names.values()) and requested == "train":
        return files
    matching = [file for file, name in names.items() if name and name.name == requested]
    if not matching:
        parts = {name.name for name in names.values() if name and name.keyword == requested}
        if len(parts) == 1:
            matching = [file for file, name in names.items() if name and name.name in parts]
    if not matching:
        raise DataError(f"{folder}: no files of split `{split}`; {_found(names)}")
    return matching


def _found(names: dict[Path, SplitName | None]) -> str:
    splits = sorted({name.name for name in names.values() if name})
    if not splits:
        return "its paths name no split, so it is read with `data_split: train`"
    unnamed = sum(name is None for name in names.values())
    more = f" and {unnamed} {'file whose path names' if unnamed == 1 else 'files whose paths name'}"
    more = f"{more} no split" if unnamed else ""
    return (
        f"found {', '.join(f'`{name}`' for name in splits)}{more}; set `data_split` to one of"
        " them, or name a file or a folder in it"
    )


def data_files(folder: Path) -> list[Path]:
    """Data files in a folder and the folders in it, sorted, without hidden files.

    Raises:
        DataError: The folder has no data files, or was written by ``save_to_disk``.
    """
    visible = _visible_files(folder)
    saved = next((file for file in visible if file.suffix == ".arrow"), None)
    if saved is not None and (saved.parent / "state.json").is_file():
        raise DataError(
            f"{saved.parent}: written by `save_to_disk`; convert it to Parquet:"
            f" `datasets.load_from_disk({str(saved.parent)!r}).to_parquet('train.parquet')`"
        )
    files = [
        file
        for file in visible
        if file.name.lower().endswith(SUFFIXES) and file.name not in _METADATA
    ]
    if not files:
        others = ", ".join(f"`{file.name}`" for file in visible[:5])
        raise DataError(
            f"{folder}: no data files ({', '.join(SUFFIXES)}); found {others or 'no files'}"
        )
    return files


def _visible_files(folder: Path) -> list[Path]:
    entries = list(islice(folder.rglob("*"), MAX_ENTRIES + 1))
    if len(entries) > MAX_ENTRIES:
        raise DataError(
            f"{folder}: contains more than {MAX_ENTRIES:,} files and folders; name the folder of the"
            " data"
        )
    return [file for file in sorted(entries) if not _is_hidden(file, folder) and file.is_file()]


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def split_name(folder: Path, file: Path) -> SplitName | None:
    """Split that the path of a file below ``folder`` names; None if it names none.

    Raises:
        DataError: The path names two standard splits.
    """
    parts: Sequence[str] = file.relative_to(folder).parts
    suffix = next((s for s in SUFFIXES if file.name.lower().endswith(s)), "")
    stem = file.name[: len(file.name) - len(suffix)]
    names = [name for part in [*parts[:-1], stem] if (name := _name_of_part(part)) is not None]
    standard = dict.fromkeys(name.name for name in names if name.name in _KEYWORDS)
    if len(standard) > 1:
        both = " and ".join(f"`{name}`" for name in standard)
        raise DataError(
            f"{file}: its path names the splits {both}; name a file or a folder in `source`"
        )
    if _SHARD.search(file.name) and file.parent.name == "data" and not names:
        return SplitName(_SHARD.sub("", file.name).lower(), None)
    return next((name for name in names if name.name in standard), next(iter(names), None))


def _name_of_part(part: str) -> SplitName | None:
    r"""Split that a folder or the stem of a file names.

    >>> _name_of_part("pairs-train")
    SplitName(name='train', keyword='train')
    >>> _name_of_part("train_prefs"), _name_of_part("train_prefs-00000-of-00001")
    (SplitName(name='train_prefs', keyword='train'), SplitName(name='train_prefs', keyword=None))
    """
    name = _SHARD.sub("", part).lower()
    words = [word for word in _SEPARATORS.split(name) if word]
    keywords = [_KEYWORDS[word] for word in words if word in _KEYWORDS]
    if not keywords:
        return None
    if words[-1] in _KEYWORDS:
        return SplitName(_KEYWORDS[words[-1]], _KEYWORDS[words[-1]])
    return SplitName(name, None if _SHARD.search(part) else keywords[0])
