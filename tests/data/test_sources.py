"""Sources: files, folders and Hub ids; errors of malformed or missing sources."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.preference_data import (
    PAIR,
    assistant,
    prepared_whole,
    training_rows,
    write_jsonl,
)

from align.data.formats import pair
from align.errors import UserError


def test_every_file_format_gives_the_same_rows(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [PAIR, {"prompt": 'A "word",\nplease', "chosen": "é", "rejected": "b"}]
    text = "".join(json.dumps(row) + "\n\n" for row in rows)
    files = {
        "a.jsonl": text.encode("utf-8-sig"),
        "a.jsonl.gz": gzip.compress(text.encode()),
        "a.json": json.dumps(rows).encode(),
        "a.csv": (
            'prompt,chosen,rejected\r\nSay a word.,Hello.,No.\r\n"A ""word"",\nplease",é,b\r\n'
        ).encode(),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    expected = [pair(row) for row in rows]
    for name in [*files, "a.parquet"]:
        assert training_rows(prepared_whole(tmp_path / name)) == expected, name
        assert training_rows(prepared_whole(tmp_path / name, max_rows=1)) == expected[:1], name


def test_a_folder_may_contain_pairs_and_demonstrations_and_hidden_files(tmp_path: Path):
    write_jsonl(tmp_path / "pairs.jsonl", [PAIR])
    write_jsonl(tmp_path / "demonstrations.jsonl", [{"prompt": "Hi", "completion": "Hey"}])
    write_jsonl(tmp_path / ".hidden.jsonl", [PAIR])
    data = prepared_whole(tmp_path)
    assert data.read == {"pairs": 1, "demonstrations": 1}
    assert [row["completion"][0]["content"] for row in training_rows(data, "demonstrations")] == [
        "Hey"
    ]
    assert len(training_rows(data, "prompts")) == 2


def test_files_of_a_folder_that_are_named_after_the_split_are_read(tmp_path: Path):
    write_jsonl(tmp_path / "train-00000.jsonl", [PAIR])
    write_jsonl(tmp_path / "test-00000.jsonl", [{**PAIR, "chosen": "Held out."}])
    assert [row["chosen"] for row in training_rows(prepared_whole(tmp_path))] == [
        [assistant("Hello.")]
    ]


H, A = "\n\nHuman: ", "\n\nAssistant: "


def lines(*texts: str) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode()


PAIR_LINE, REJECT = json.dumps(PAIR), '{"prompt": "a", "chosen": "b", "reject": "c"}'
TRANSCRIPT = json.dumps({"chosen": f"{H}a{A}b", "rejected": f"{H}a{A}c"})
PROBLEMS: list[tuple[str, str, bytes, dict[str, Any], str]] = [
    ("a column near the needed one", "a.jsonl", lines(REJECT), {},
     "a.jsonl: no column `rejected`; found `prompt`, `chosen`, `reject`;"
     " map it with `columns: {rejected: reject}`"),
    ("columns by other words", "a.jsonl", lines('{"question": "a", "answer": "b", "id": 1}'), {},
     "a.jsonl: no column `prompt`, `completion`; found `question`, `answer`, `id`;"
     " map it with `columns: {prompt: question, completion: answer}`"),
    ("pairs by other names", "a.jsonl", lines('{"question": "a", "good": "b", "bad": "c"}'), {},
     "a.jsonl: no column `prompt`, `chosen`, `rejected`; found `question`, `good`, `bad`;"
     " map it with `columns: {prompt: question, chosen: good, rejected: bad}`"),
    ("no column known", "a.jsonl", lines('{"text": "a"}'), {},
     "a.jsonl: found `text`; expected `prompt`, `chosen`, `rejected` or `prompt`, `completion` or"
     " `messages`; map them with `columns: {prompt: ...}`"),
    ("pairs of plain text without a prompt", "a.jsonl", lines('{"chosen": "a", "rejected": "b"}'),
     {}, "a.jsonl: no column `prompt`; found `chosen`, `rejected`;"
     " map it with `columns: {prompt: ...}`"),
    ("pairs without a prompt beside messages", "a.jsonl", lines('{"chosen": "a", "rejected": "b", "messages": []}'),
     {}, "a.jsonl: no column `prompt`; found `chosen`, `rejected`, `messages`;"
     " map it with `columns: {prompt: ...}`"),
    ("transcripts read as columns", "a.jsonl", lines(TRANSCRIPT), {},
     "a.jsonl: the rows are transcripts; read them with `reader: hh`"),
    ("columns read as transcripts", "a.jsonl", lines(PAIR_LINE), {"reader": "hh"},
     "a.jsonl: its rows are 1 × pairs with `prompt`, `chosen`, `rejected` (row 1); `reader: hh` does"
     " not read them; set `reader: columns`"),
    ("transcripts without a side", "a.jsonl", lines('{"chosen": "a"}'), {"reader": "hh"},
     "a.jsonl: no column `rejected`; found `chosen`; map it with `columns: {rejected: ...}`"),
    ("nothing usable", "a.jsonl", lines(PAIR_LINE.replace("No.", "Hello."), PAIR_LINE.replace("No.", "")), {},
     "a.jsonl: none of 2 pairs is usable: 1 chosen equals rejected (row 1), 1 blank completion"
     " (row 2: `rejected`); fix its rows, or map `columns:`"),
    ("only contradictions", "a.jsonl", lines(PAIR_LINE, json.dumps({**PAIR, "chosen": "No.", "rejected": "Hello."})), {},
     "a.jsonl: none of 2 pairs is usable: 2 contradiction (row 1, against row 2); fix its rows, or map `columns:`"),
    ("wrong roles", "a.jsonl", lines('{"messages": [{"role": "human", "content": "a"}]}'), {},
     "a.jsonl: none of 1 demonstrations is usable: 1 wrong roles (row 1: turn 1: role `human`; allowed are"
     " `system`, `user`, `assistant`, `tool`); fix its rows"),
    ("turns with other names", "a.jsonl", lines('{"messages": [{"speaker": "a", "text": "a"}]}'), {},
     "a.jsonl: none of 1 demonstrations is usable: 1 wrong roles (row 1: turn 1: a turn has `speaker`,"
     " `text`; rename to `role`, `content`); fix its rows"),
    ("unknown labels", "a.jsonl", lines(*(json.dumps({"prompt": f"{n}", "completion": "b", "label": n}) for n in (1, -1))), {},
     "a.jsonl: 1 of 2 labels are not true, false, 1 or 0 (row 2: it is '-1'); map every label, as in"
     " `labels: {up: true, down: false}`; other rows are then dropped"),
    ("nearly Alpaca's columns", "a.jsonl",
     lines('{"instruction": "a", "input": "b", "response": "c"}'), {},
     "a.jsonl: no column `prompt`, `completion`; found `instruction`, `input`, `response`;"
     " map it with `columns: {prompt: instruction, input: input, completion: response}`"),
    ("empty file", "a.jsonl", b"", {}, "a.jsonl: no rows; found 1 empty file"),
    ("malformed lines", "a.jsonl", lines(PAIR_LINE, "{,}", "[1]"), {},
     "a.jsonl:2: not JSON: Expecting property name enclosed in double quotes at column 2\n"
     "a.jsonl:3: expected an object, got a list"),
    ("too many malformed lines to show", "a.jsonl", lines(*["3"] * 12), {},
     "\n".join(f"a.jsonl:{n}: expected an object, got a number" for n in range(1, 11))
     + "\na.jsonl: and 2 more such lines"),
    ("not UTF-8", "a.jsonl", b'{"prompt": "\xff"}\n', {},
     "a.jsonl:1: not UTF-8 at byte 13; save it as UTF-8"),
    ("JSONL named JSON", "a.json", lines(PAIR_LINE, PAIR_LINE), {},
     "a.json:2: not JSON: Extra data; a file with one object per line is JSONL: name it .jsonl"),
    ("JSON that is no list", "a.json", PAIR_LINE.encode(), {},
     "a.json: expected a list of objects, got an object with the keys `prompt`, `chosen`, `rejected`;"
     " write only the list of rows"),
    ("JSON list of texts", "a.json", b'["a"]', {}, "a.json: row 1: expected an object, got a text"),
    ("CSV with a cell too many", "a.csv", lines("prompt,chosen,rejected", "a,b,c,d"), {},
     "a.csv:2: expected 3 cells, got 4; put text with commas in double quotes"),
    ("CSV with a column twice", "a.csv", lines("prompt,prompt", "a,b"), {},
     "a.csv:1: two columns are named `prompt`; rename one"),
    ("not Parquet", "a.parquet", b"PAR?", {}, "a.parquet: not Parquet: "),
    ("not gzip", "a.jsonl.gz", PAIR_LINE.encode(), {},
     "a.jsonl.gz: not a gzip file; rename it, or download it again"),
    ("half a gzip", "a.jsonl.gz", gzip.compress(PAIR_LINE.encode())[:-9], {},
     "a.jsonl.gz: a truncated or damaged gzip file; download it again"),
    ("unknown kind", "a.xlsx", b"", {},
     "a.xlsx: unknown file format; expected one of .jsonl, .jsonl.gz, .json, .json.gz, .csv, .csv.gz"),
    ("a key of `columns` that is no column of Align", "a.jsonl", lines(PAIR_LINE), {"columns": {"chosn": "chosen"}},
     "columns: chosn: not a column of `reader: columns`; did you mean `chosen`?"),
    ("a mapped column that does not exist", "a.jsonl", lines(REJECT), {"columns": {"rejected": "rejct"}},
     "columns: {rejected: rejct}: no column `rejct`; did you mean `reject`?"),
    ("a column mapped twice", "a.jsonl", lines(PAIR_LINE),
     {"columns": {"chosen": "rejected", "rejected": "rejected"}},
     "columns: `rejected` is mapped twice; keep one of the two keys"),
    ("an empty split", "a.jsonl", lines(PAIR_LINE), {"validation_fraction": 1e-9},
     "validation_fraction: 1e-09: none of 1 prompts is in split `validation`;"
     " raise it, set it to 0, add prompts or change `split_seed`"),
    ("demonstrations named twice", "a.jsonl", lines('{"prompt": "a", "completion": "b"}'),
     {"demonstrations": "a.jsonl"},
     "a.jsonl: contains only demonstrations, and `demonstrations` names another source;"),
    ("no desirable completion", "a.jsonl", lines('{"prompt":"a","completion":"b","label":false}'),
     {}, "a.jsonl: no completion is labeled true, so no completion can be demonstrated"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "keys", "message"),
    [row[1:] for row in PROBLEMS],
    ids=[r[0] for r in PROBLEMS],
)
def test_a_problem_with_a_source_has_this_message(
    name: str,
    content: bytes,
    keys: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    with pytest.raises(UserError) as error:
        prepared_whole(name, **keys)
    assert str(error.value).startswith(message)
    assert len(error.value.lines) == message.count("\n") + 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pears.jsonl", "pears.jsonl: no such file or folder; did you mean `pairs.jsonl`?"),
        ("pairs.json", "pairs.json: no such file or folder; did you mean `pairs.jsonl`?"),
        ("else.jsonl", "else.jsonl: no such file or folder"),  # the ending is no similarity
        ("./nothing", "./nothing: no such file or folder"),
        ("../a/b", "../a/b: no such file or folder"),
        ("a/b/c", "a/b/c: no such file or folder"),
        ("empty", "empty: no data files (.jsonl, "),
        ("two words", "'two words': not a file, a folder, or a Hub id (owner/name)"),
        (
            "owner/name",
            "owner/name: no such file or folder, and HF_HUB_OFFLINE is set and it is not in the"
            " cache; unset it, or name a local file",
        ),
        ("embeded", "embeded: no such file or folder, and HF_HUB_OFFLINE is set and it is not"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # from importing `datasets`
def test_a_missing_path_and_an_unreachable_hub_id_are_distinguished(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import datasets

    def no_hub(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach it on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", no_hub)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("pairs.jsonl"), [PAIR])
    Path("empty").mkdir()
    with pytest.raises(UserError) as error:
        prepared_whole(source)
    assert str(error.value).startswith(message)
    assert len(error.value.lines) == 1
    assert str(error.value).endswith("did you mean `embedded`?") == (source == "embeded")
    assert str(error.value).count("did you mean") == message.count("did you mean") + (
        source == "embeded"
    )


def test_without_a_network_a_hub_id_is_rejected_before_any_retry(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("align.runtime.hub.hub_is_reachable", lambda: False)
    with pytest.raises(UserError, match="the Hub cannot be reached; name a"):
        prepared_whole("owner/name")


@pytest.mark.filterwarnings("ignore")
def test_a_hub_data_set_is_loaded_with_configuration_split_and_revision(
    monkeypatch: pytest.MonkeyPatch,
):
    import datasets

    calls: list[Any] = []

    def load_dataset(*args: Any, **keywords: Any) -> datasets.Dataset:
        calls.append((args, keywords))
        return datasets.Dataset.from_list([PAIR, {**PAIR, "rejected": "Never."}])

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = prepared_whole(
        "owner/name", config="c", data_dir="d", data_split="s", revision="r", max_rows=1
    )
    assert calls == [(("owner/name", "c"), {"data_dir": "d", "split": "s", "revision": "r"})]
    assert training_rows(data) == [pair(PAIR)]
    assert data.files == []


@pytest.mark.parametrize(
    ("text", "message"),
    [("[" * 100_000, "nested too deep"), ("[" + "1" * 5000 + "]", "an integer is too long")],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_that_python_cannot_parse_gives_one_line(
    tmp_path: Path, name: str, text: str, message: str
):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=f"{name}.*: unreadable JSON: {message}") as error:
        prepared_whole(tmp_path / name)
    assert len(error.value.lines) == 1
