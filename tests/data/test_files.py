"""Files: bounds on what a file may expand to, and encodings that are refused."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from helpers.preference_data import PAIR

from align.data import file_limits, files
from align.data.files import read_file
from align.errors import DataError


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch):
    """Limits of 64 KiB per file, 8 KiB per row and 131,072 values."""
    monkeypatch.setattr(file_limits, "ALWAYS_ALLOWED", 2**16)
    monkeypatch.setattr(files, "ALLOWED_VALUES", 2**17)
    for module in (file_limits, files):
        monkeypatch.setattr(module, "MAX_ROW", 2**13)


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, compression="zstd", **options)


LINE = json.dumps({**PAIR, "chosen": "a" * 100}) + "\n"


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(LINE.encode() * 2000), "bytes expand to more than"),
        ("a.jsonl", b'"' + b"a" * 2**20, "a.jsonl:1: a row of more than"),
        ("a.jsonl.gz", gzip.compress(LINE.encode() * 2000)[:-4] + bytes(4), "bytes expand to more than"),
        ("a.json.gz", gzip.compress(f"[{LINE.replace(chr(10), ',') * 2000}{LINE}]".encode()),
         "bytes expand to more than"),
        ("a.json.gz", gzip.compress(b'["' + b"a" * 2**20), "bytes expand to more than"),
        ("a.csv.gz", gzip.compress(b"prompt,chosen\n" + b"a,b\n" * 2**16), "bytes expand to more"),
        ("a.csv", b"prompt,chosen\n" + b"a" * 2**20, "a row of more than"),
        ("a.csv", b'prompt,chosen\n"' + b"a\n" * 2**20, "a row of more than"),
    ],
)  # fmt: skip
def test_a_compressed_file_that_expands_too_far_is_refused(
    name: str, content: bytes, message: str, tmp_path: Path
):
    (tmp_path / name).write_bytes(content)
    tracemalloc.start()
    with pytest.raises(DataError, match=message) as error:
        for _ in read_file(tmp_path / name):
            pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(error.value.lines) == 1
    assert peak < 2**20


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"a": ["x" * 1000] * 5000}, {}, "expand to more than"),  # one value, repeated
        ({"a": ["x" * 10_000] * 5}, {}, "a row of more than"),
        ({"a": ["x" * 1000] * 5000}, {"use_dictionary": False}, "expand to more than"),
        ({"a": [[0] * 300_000]}, {}, "expand to 300,000 values"),
        ({"a": [None] * 300_000}, {}, "expand to 300,000 values"),
    ],
)
def test_parquet_that_expands_too_far_is_refused(
    columns: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
):
    write_parquet(tmp_path / "a.parquet", columns, **options)
    with pytest.raises(DataError, match=f"a.parquet(:1)?: (.*bytes )?{message}"):
        list(read_file(tmp_path / "a.parquet"))


def test_a_small_file_that_compresses_well_is_read(tmp_path: Path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINE.encode() * 2000))
    assert len(list(read_file(tmp_path / "a.jsonl.gz"))) == 2000
    write_parquet(tmp_path / "a.parquet", {"a": ["x" * 1000] * 5000})
    assert len(list(read_file(tmp_path / "a.parquet"))) == 5000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt,chosen\n".encode("utf-16"), "UTF-16; save it as UTF-8"),
        ("a.csv", "prompt,chosen\n".encode("utf-16-le"), "UTF-16 or binary; save it as UTF-8"),
        ("a.jsonl", LINE.encode("utf-16"), "UTF-16; save it as UTF-8"),
        ("a.json", LINE.encode("utf-16-be"), "UTF-16 or binary; save it as UTF-8"),
        ("a.csv", b"prompt,chosen\n\xff,a\n", "a.csv:2: not UTF-8; save it as UTF-8"),
        ("a.csv", b"prompt;chosen\na;b\n", "separated by semicolons; use commas"),
        ("a.csv", b"prompt, chosen\na, b\n", "1: the name of the column ` chosen` begins or ends"),
        ("a.csv", b"prompt\tchosen, good\trejected\na\tb\tc\n", "separated by tabs; use commas"),
        ("a.csv", b"sep=;\nprompt;chosen\n", "separated by semicolons; use commas"),
        ("a.json", b'[{"a": 1}, {"a": \n 2},]', "a.json:2: not JSON: Expecting value"),
        ("a.json", b'[{"a": 1}\n{"a": 2}]', "a.json:2: not JSON: Expecting ']'"),
        ("a.json", b'[{"a": 1}', "a.json:1: not JSON: Expecting ']'"),
        ("a.json", b'[{"a": 1}] []', "a.json:1: not JSON: Extra data"),
        ("a.json", b"", "a.json:1: not JSON: Expecting value"),
        ("a.json", b'[{"a": "\xff"}]', "a.json:1: not UTF-8; save it as UTF-8"),
        ("a.json", b'{"data": []}', "got an object with the keys `data`; write only the list"),
    ],
)
def test_an_unreadable_file_has_this_message(
    name: str, content: bytes, message: str, tmp_path: Path
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        list(read_file(tmp_path / name))
    assert message in str(error.value)


def test_a_json_list_is_read_across_the_ends_of_chunks(tmp_path: Path):
    rows = [{"text": "é\n" * (n % 7 * 1000), "n": n} for n in range(200)]
    for indent in (None, 2):
        (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False, indent=indent))
        assert list(read_file(tmp_path / "a.json")) == rows
    (tmp_path / "a.json").write_text(" [ ] \n")
    assert list(read_file(tmp_path / "a.json")) == []
