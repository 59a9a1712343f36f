"""Preferences: what is read, what is refused in which words, what is dropped, and who is where."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.config.data import Prepare
from align.data import statistics
from align.data.formats import demonstration, hh_pair, hh_turns, pair
from align.data.prepare import PreparedData, prepare
from align.data.rows import DroppedError, normalize_text, prompt_id
from align.data.splits import split_of
from align.errors import UserError

HH = Path(__file__).parents[3] / "shared" / "data" / "hh-rlhf" / "harmless-base-test.jsonl.gz"
GOOD = {"prompt": "Say a word.", "chosen": "Hello.", "rejected": "No."}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def whole(source: Path | str, **keys: Any) -> PreparedData:
    """Prepare without a held-out split, so that a file of one row is enough."""
    return prepare(Prepare.model_validate({"source": str(source), "test_fraction": 0.0, **keys}))


def kept(prepared: PreparedData, kind: str = "pairs") -> list[dict[str, Any]]:
    return prepared.tables()[kind]["train"]


# Formats


def test_plain_text_becomes_one_turn_each():
    assert pair(GOOD) == {
        "prompt": [user("Say a word.")],
        "chosen": [assistant("Hello.")],
        "rejected": [assistant("No.")],
        "prompt_id": prompt_id([user("Say a word.")]),
    }


def test_the_common_beginning_of_two_conversations_is_the_prompt():
    start = [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hm?"), user("Go")]
    row = pair({"chosen": [*start, assistant("A")], "rejected": [*start, assistant("B")]})
    assert row["prompt"] == start
    assert (row["chosen"], row["rejected"]) == ([assistant("A")], [assistant("B")])


def test_a_prompt_column_beside_whole_conversations_must_repeat_one_of_their_turns():
    sides = {"chosen": [user("Hi"), assistant("A")], "rejected": [user("Hi"), assistant("B")]}
    assert pair({"prompt": "Hi", **sides})["prompt"] == [user("Hi")]
    with pytest.raises(DroppedError, match="prompt is not in the transcripts"):
        pair({"prompt": "Bye", **sides})


def test_the_last_turn_of_messages_is_the_completion():
    turns = [user("Hi"), assistant("Hm?"), user("Go"), assistant("A")]
    row = demonstration({"messages": turns})
    assert (row["prompt"], row["completion"]) == (turns[:3], turns[3:])


def test_fields_beside_role_and_content_do_not_come_along():
    row = demonstration({"prompt": [{**user("Hi"), "tool_calls": None}], "completion": "A"})
    assert row["prompt"] == [user("Hi")]


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        pytest.param("\n\nHuman: a\n\nAssistant: b", [user("a"), assistant("b")], id="plain"),
        pytest.param(
            "\n\nHuman: say Human: or\nAssistant: x\n\nAssistant: b",
            [user("say Human: or\nAssistant: x"), assistant("b")],
            id="a name inside a text is text",
        ),
        pytest.param(
            "Human: a\n\nAssistant: one\n\ntwo\n\nHuman: c",
            [user("a"), assistant("one\n\ntwo"), user("c")],
            id="no leading newlines, paragraphs, a last user turn",
        ),
        pytest.param(
            "\n\nHuman: a\n\nAssistant:", [user("a"), assistant("")], id="empty last turn"
        ),
    ],
)
def test_transcripts_by_hand(text: str, turns: list[dict[str, str]]):
    assert hh_turns(text) == turns


H, A = "\n\nHuman: ", "\n\nAssistant: "


@pytest.mark.parametrize(
    ("reader", "raw", "reason"),
    [
        ("columns", {**GOOD, "prompt": " \n"}, "blank prompt"),
        ("columns", {**GOOD, "prompt": []}, "blank prompt"),
        ("columns", {**GOOD, "prompt": None}, "no prompt"),
        ("columns", {**GOOD, "prompt": 3}, "content is not text"),
        (
            "columns",
            {**GOOD, "prompt": [user("a"), user("b")]},
            "two turns in a row by one speaker",
        ),
        ("columns", {**GOOD, "prompt": [user("a"), assistant("b")]}, "in a row by one speaker"),
        ("columns", {**GOOD, "prompt": [assistant("a"), user("b")]}, "wrong roles"),
        ("columns", {**GOOD, "prompt": [{"role": "human", "content": "a"}]}, "wrong roles"),
        ("columns", {**GOOD, "prompt": [{"role": "system", "content": "a"}]}, "wrong roles"),
        ("columns", {**GOOD, "chosen": ""}, "blank completion"),
        ("columns", {**GOOD, "rejected": "  "}, "blank completion"),
        ("columns", {**GOOD, "rejected": []}, "blank completion"),
        ("columns", {**GOOD, "rejected": None}, "missing value"),
        ("columns", {**GOOD, "rejected": 1.5}, "content is not text"),
        ("columns", {**GOOD, "chosen": "\ud83d"}, "content is not Unicode text"),
        ("columns", {**GOOD, "chosen": [assistant("a"), assistant("b")]}, "not one assistant turn"),
        ("columns", {**GOOD, "chosen": [user("a")]}, "completion is not one assistant turn"),
        ("columns", {**GOOD, "chosen": [{"role": "assistant"}]}, "content is not text"),
        ("columns", {**GOOD, "rejected": "Hello. "}, "chosen equals rejected"),
        ("hh", {"chosen": f"{H}a{A}b", "rejected": f"{H}a{A}b"}, "chosen equals rejected"),
        ("hh", {"chosen": f"{H}a{A}b", "rejected": f"{H}a{A}"}, "blank completion"),
        ("hh", {"chosen": f"{H}a{A}b", "rejected": f"{H}a{A}b{H}c"}, "ends in a user turn"),
        ("hh", {"chosen": f"{H}a{A}b{H}c{A}d", "rejected": f"{H}a{A}x{H}c{A}d"}, "part before"),
        ("hh", {"chosen": f"{H}a{A}b{H}c{A}d", "rejected": f"{H}x{A}b{H}c{A}d"}, "no beginning"),
        ("hh", {"chosen": f"{H}a{A}b{A}c", "rejected": f"{H}a{A}b{A}d"}, "in a row by one speaker"),
        ("hh", {"chosen": f"{A}a{H}b{A}c", "rejected": f"{A}a{H}b{A}d"}, "not an HH transcript"),
        ("hh", {"chosen": "a", "rejected": "b"}, "not an HH transcript"),
        ("hh", {"chosen": f"{H}a{A}b"}, "missing value"),
    ],
)
def test_a_row_that_does_not_fit_is_dropped_for_a_named_reason(
    reader: str, raw: dict[str, Any], reason: str
):
    with pytest.raises(DroppedError, match=reason):
        {"columns": pair, "hh": hh_pair}[reader](raw)


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [GOOD, {"prompt": 'A "word",\nplease', "chosen": "é", "rejected": "b"}]
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
        assert kept(whole(tmp_path / name)) == expected, name
        assert kept(whole(tmp_path / name, max_rows=1)) == expected[:1], name


def test_a_folder_may_hold_pairs_and_demonstrations_and_hidden_files(tmp_path: Path):
    jsonl(tmp_path / "pairs.jsonl", [GOOD])
    jsonl(tmp_path / "said.jsonl", [{"prompt": "Hi", "completion": "Hey"}])
    jsonl(tmp_path / ".hidden.jsonl", [GOOD])
    prepared = whole(tmp_path)
    assert prepared.read == {"pairs": 1, "demonstrations": 1}
    assert [row["completion"][0]["content"] for row in kept(prepared, "demonstrations")] == ["Hey"]
    assert len(kept(prepared, "prompts")) == 2


def test_of_a_folder_the_files_named_after_the_split_are_read(tmp_path: Path):
    jsonl(tmp_path / "train-00000.jsonl", [GOOD])
    jsonl(tmp_path / "test-00000.jsonl", [{**GOOD, "chosen": "Held out."}])
    assert [row["chosen"] for row in kept(whole(tmp_path))] == [[assistant("Hello.")]]


def test_a_mapped_column_keeps_no_second_name(tmp_path: Path):
    file = jsonl(tmp_path / "a.jsonl", [GOOD])
    swapped = whole(file, columns={"chosen": "rejected", "rejected": "chosen"})
    assert kept(swapped)[0]["chosen"] == [assistant("No.")]
    told = whole(file, columns={"completion": "chosen"})
    assert sorted(told.tables()) == ["demonstrations", "prompts"]


def test_labels_are_read_from_numbers_and_words_and_a_completion_with_both_is_dropped(
    tmp_path: Path,
):
    labels = [(True, "a"), (0, "b"), ("False", "c"), ("perhaps", "d"), (1, "e"), (0, "e")]
    rows = [{"prompt": "Hi", "completion": text, "label": label} for label, text in labels]
    prepared = whole(jsonl(tmp_path / "a.jsonl", rows))
    assert [row["label"] for row in kept(prepared, "unpaired")] == [True, False, False]
    assert [row["completion"] for row in kept(prepared, "demonstrations")] == [[assistant("a")]]
    assert prepared.dropped == {
        "unpaired: contradiction": 2,
        "unpaired: label is not true or false": 1,
    }


def test_another_source_of_demonstrations_takes_their_place(tmp_path: Path):
    pairs = jsonl(tmp_path / "pairs.jsonl", [GOOD])
    said = jsonl(tmp_path / "said.jsonl", [{"messages": [user("Hi"), assistant("Hey")]}] * 2)
    prepared = whole(pairs, demonstrations=str(said))
    assert [row["completion"] for row in kept(prepared, "demonstrations")] == [[assistant("Hey")]]
    assert prepared.read == {"demonstrations": 2, "pairs": 1}
    assert prepared.dropped == {"demonstrations: exact duplicate": 1}
    assert [file.name for file in prepared.files] == ["pairs.jsonl", "said.jsonl"]


# Repeats


def test_repeats_are_dropped_once_and_contradictions_on_both_sides(tmp_path: Path):
    ab, ba = {**GOOD}, {**GOOD, "chosen": "No.", "rejected": "Hello."}
    other = {**GOOD, "rejected": "Never."}
    again = {**other, "prompt": "say  A WORD."}
    prepared = whole(jsonl(tmp_path / "a.jsonl", [ab, other, ba, again, ab]))
    assert kept(prepared) == [pair(other)]
    assert prepared.dropped == {"pairs: contradiction": 3, "pairs: exact duplicate": 1}
    assert prepared.read == {"pairs": 5}


# What is wrong, in words


def lines(*texts: str) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode()


PAIR, REJECT = json.dumps(GOOD), '{"prompt": "a", "chosen": "b", "reject": "c"}'
TRANSCRIPT = json.dumps({"chosen": f"{H}a{A}b", "rejected": f"{H}a{A}c"})
WRONG: list[tuple[str, str, bytes, dict[str, Any], str]] = [
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
    ("transcripts read as columns", "a.jsonl", lines(TRANSCRIPT), {},
     "a.jsonl: the rows are whole transcripts; read them with `reader: hh`"),
    ("columns read as transcripts", "a.jsonl", lines(PAIR), {"reader": "hh"},
     "a.jsonl: none of 1 pairs is usable: 1 not an HH transcript; try `reader: columns`"),
    ("transcripts without a side", "a.jsonl", lines('{"chosen": "a"}'), {"reader": "hh"},
     "a.jsonl: no column `rejected`; found `chosen`; map it with `columns: {rejected: ...}`"),
    ("nothing usable", "a.jsonl", lines(PAIR.replace("No.", "Hello."), PAIR.replace("No.", "")), {},
     "a.jsonl: none of 2 pairs is usable: 1 chosen equals rejected, 1 blank completion"),
    ("empty file", "a.jsonl", b"", {}, "a.jsonl: no rows; found 1 empty file"),
    ("malformed lines", "a.jsonl", lines(PAIR, "{,}", "[1]"), {},
     "a.jsonl:2: not JSON: Expecting property name enclosed in double quotes at column 2\n"
     "a.jsonl:3: expected an object, got a list"),
    ("too many malformed lines to show", "a.jsonl", lines(*["3"] * 12), {},
     "\n".join(f"a.jsonl:{n}: expected an object, got a int" for n in range(1, 11))
     + "\na.jsonl: and 2 more such lines"),
    ("not UTF-8", "a.jsonl", b'{"prompt": "\xff"}\n', {},
     "a.jsonl:1: not UTF-8 at byte 12; save it as UTF-8"),
    ("JSONL named JSON", "a.json", lines(PAIR, PAIR), {},
     "a.json:2: not JSON: Extra data; a file with one object per line is JSONL: name it .jsonl"),
    ("JSON that is no list", "a.json", PAIR.encode(), {},
     "a.json: expected a list of objects, got an object"),
    ("JSON list of texts", "a.json", b'["a"]', {}, "a.json: row 1: expected an object, got a text"),
    ("CSV with a cell too many", "a.csv", lines("prompt,chosen,rejected", "a,b,c,d"), {},
     "a.csv:2: expected 3 cells, got 4; put text with commas in double quotes"),
    ("CSV with a column twice", "a.csv", lines("prompt,prompt", "a,b"), {},
     "a.csv:1: two columns are named `prompt`; rename one"),
    ("not Parquet", "a.parquet", b"PAR?", {}, "a.parquet: not Parquet: "),
    ("not gzip", "a.jsonl.gz", PAIR.encode(), {},
     "a.jsonl.gz: not a gzip file; rename it, or download it again"),
    ("half a gzip", "a.jsonl.gz", gzip.compress(PAIR.encode())[:-9], {},
     "a.jsonl.gz: truncated gzip file"),
    ("unknown kind", "a.xlsx", b"", {},
     "a.xlsx: unknown file format; expected one of .jsonl, .jsonl.gz, .json, .json.gz, .csv, .csv.gz"),
    ("unknown column of ours", "a.jsonl", lines(PAIR), {"columns": {"chosn": "chosen"}},
     "columns: chosn: not a column of `reader: columns`; did you mean `chosen`?"),
    ("unknown column of theirs", "a.jsonl", lines(REJECT), {"columns": {"rejected": "rejct"}},
     "columns: {rejected: rejct}: no column `rejct`; did you mean `reject`?"),
    ("a column mapped twice", "a.jsonl", lines(PAIR),
     {"columns": {"chosen": "rejected", "rejected": "rejected"}},
     "columns: `rejected` is mapped twice; keep one of the two keys"),
    ("an empty split", "a.jsonl", lines(PAIR), {"validation_fraction": 1e-9},
     "validation_fraction: 1e-09: none of 1 prompts is in split `validation`;"
     " raise it, set it to 0, add prompts or change `split_seed`"),
    ("demonstrations named twice", "a.jsonl", lines('{"prompt": "a", "completion": "b"}'),
     {"demonstrations": "a.jsonl"},
     "a.jsonl: contains only demonstrations, and `demonstrations` names another source;"),
    ("no desirable completion", "a.jsonl", lines('{"prompt":"a","completion":"b","label":false}'),
     {}, "a.jsonl: no completion is labeled true, so no completion can be demonstrated"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "knobs", "message"), [row[1:] for row in WRONG], ids=[r[0] for r in WRONG]
)
def test_what_is_wrong_with_a_source_is_said_in_these_words(
    name: str,
    content: bytes,
    knobs: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        whole(name, **knobs)
    assert str(caught.value).startswith(message)
    assert len(caught.value.lines) == message.count("\n") + 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pears.jsonl", "pears.jsonl: no such file or folder; did you mean `pairs.jsonl`?"),
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
@pytest.mark.filterwarnings("ignore")  # importing `datasets` is not ours to answer for
def test_a_missing_path_and_an_unreachable_hub_id_are_told_apart(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import datasets

    def no_hub(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach it on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", no_hub)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    jsonl(Path("pairs.jsonl"), [GOOD])
    Path("empty").mkdir()
    with pytest.raises(UserError) as caught:
        whole(source)
    assert str(caught.value).startswith(message)
    assert len(caught.value.lines) == 1
    assert str(caught.value).endswith("did you mean `embedded`?") == (source == "embeded")


def test_without_a_network_a_hub_id_is_refused_before_any_retry(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("align.runtime.hub.hub_is_reachable", lambda: False)
    with pytest.raises(UserError, match="the Hub cannot be reached; name a"):
        whole("owner/name")


@pytest.mark.filterwarnings("ignore")
def test_a_hub_data_set_is_asked_for_by_configuration_split_and_revision(
    monkeypatch: pytest.MonkeyPatch,
):
    import datasets

    asked: list[Any] = []

    def load_dataset(*args: Any, **knobs: Any) -> datasets.Dataset:
        asked.append((args, knobs))
        return datasets.Dataset.from_list([GOOD, {**GOOD, "rejected": "Never."}])

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prepared = whole(
        "owner/name", config="c", data_dir="d", data_split="s", revision="r", max_rows=1
    )
    assert asked == [(("owner/name", "c"), {"data_dir": "d", "split": "s", "revision": "r"})]
    assert kept(prepared) == [pair(GOOD)]
    assert prepared.files == []


# The split


@settings(max_examples=50)
@given(st.text(), st.sampled_from(["\n", "  ", "\t "]))
def test_letter_case_and_white_space_make_no_other_prompt(text: str, space: str):
    spaced = space + text.replace(" ", space) + space
    assert prompt_id([user(spaced)]) == prompt_id([user(text)])
    assert (
        normalize_text(normalize_text("\uff21\uff22 \ufb01  \xdf"))
        == normalize_text("ab fi SS")
        == "ab fi ss"
    )


def test_the_speaker_and_the_order_of_turns_make_another_prompt():
    turns = [user("a"), assistant("b"), user("c")]
    others = [[user("a b c")], [user("c"), assistant("b"), user("a")], [user("abc")], turns[2:]]
    assert len({prompt_id(prompt) for prompt in [turns, *others]}) == 5


@given(
    st.lists(st.text(min_size=1), unique=True, min_size=1),
    st.lists(st.text(min_size=1), unique=True),
    st.integers(),
    st.floats(0, 0.5),
    st.floats(0, 0.49),
)
def test_adding_rows_moves_nobody(
    old: list[str], new: list[str], seed: int, test: float, validation: float
):
    def splits(ids: list[str]) -> dict[str, str]:
        return {
            name: split_of(name, seed=seed, test_fraction=test, validation_fraction=validation)
            for name in ids
        }

    before, after = splits(old), splits([*new, *old])
    assert before.items() <= after.items()


@given(st.text(), st.integers(), st.floats(0, 0.5), st.floats(0, 0.49))
def test_a_larger_fraction_only_adds_to_a_split(key: str, seed: int, test: float, more: float):
    small = split_of(key, seed=seed, test_fraction=test)
    assert split_of(key, seed=seed, test_fraction=test + more) == "test" or small == "train"
    wider = split_of(key, seed=seed, test_fraction=test, validation_fraction=more)
    assert (wider == "test") == (small == "test")


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from([0.02, 0.1, 0.3]), st.sampled_from([0.05, 0.2]))
def test_fractions_are_met_within_binomial_noise(seed: int, test: float, validation: float):
    n = 4000
    found = [
        split_of(f"{k:016x}", seed=seed, test_fraction=test, validation_fraction=validation)
        for k in range(n)
    ]
    for split, p in (("test", test), ("validation", validation)):
        # five standard deviations: once in a million and a half
        assert abs(found.count(split) - n * p) < 5 * math.sqrt(n * p * (1 - p))


def test_the_split_of_a_prompt_is_the_same_in_every_version_of_this_code():
    # a change here would put trained prompts into the test split of everybody's data
    key = prompt_id([user("Say a word.")])
    assert key == "e96c5cb71da4ab7b"
    assert [split_of(key, seed=s, test_fraction=0.5)[:2] for s in range(8)] == [
        "tr",
        "tr",
        "tr",
        "tr",
        "tr",
        "tr",
        "te",
        "tr",
    ]


def test_pairs_and_demonstrations_of_a_prompt_fall_into_the_same_split():
    prepared = prepare(Prepare(source="embedded", validation_fraction=0.1))
    where: dict[str, set[str]] = {}
    tables = prepared.tables()
    for splits in tables.values():
        for split, rows in splits.items():
            for row in rows:
                where.setdefault(row["prompt_id"], set()).add(split)
    assert {len(splits) for splits in where.values()} == {1}
    assert set().union(*where.values()) == {"train", "test", "validation"}
    shared = {row["prompt_id"] for row in tables["pairs"]["test"]}
    assert shared & {row["prompt_id"] for row in tables["demonstrations"]["test"]}


# Figures and real data


def test_length_figures_by_hand(tmp_path: Path):
    # chosen of 3, 2, 1, 3 words against rejected of 1: longer 3 of 4, equal 1 of 4
    words = ["a b c", "d e", "f", "g h i"]
    rows = [{"prompt": "one two", "chosen": text, "rejected": f"no{text[0]}"} for text in words]
    figures = statistics.collect(whole(jsonl(tmp_path / "a.jsonl", rows))).summary()
    assert (figures["chosen_longer_share"], figures["equal_length_share"]) == (0.75, 0.25)
    assert figures["prefer_longer_accuracy"] == 0.875
    assert len(figures["warnings"]) == 1
    assert "right for 87.5% of the pairs" in figures["warnings"][0]
    assert figures["words"]["chosen_median"] == 2.5
    assert (figures["words"]["chosen_p95"], figures["words"]["prompt_median"]) == (3, 2)


@pytest.mark.skipif(not HH.is_file(), reason="the HH-RLHF file is not beside this checkout")
def test_of_2312_real_pairs_13_are_dropped_for_three_reasons():
    prepared = prepare(Prepare(source=str(HH), reader="hh"))
    assert prepared.read == {"pairs": 2312}
    assert prepared.dropped == {
        "pairs: blank completion": 4,
        "pairs: transcripts part before the last turn": 5,
        "pairs: two turns in a row by one speaker": 4,
    }
    figures = statistics.collect(prepared).summary()
    assert figures["pairs"] == {"train": 2050, "test": 249}
    assert figures["prompts"] == {"train": 2049, "test": 248}
    # One row's prompt is often the beginning of another's: no conversation is on both sides.
    openings = {
        split: {row["prompt"][0]["content"] for row in rows}
        for split, rows in prepared.tables()["pairs"].items()
    }
    assert openings["train"].isdisjoint(openings["test"])


def test_rows_that_begin_the_same_conversation_fall_into_one_split(tmp_path: Path):
    rows = []
    for i in range(50):
        turns = [user(f"Hello {i}."), assistant("Hi."), user("And?")]
        rows += [{**GOOD, "prompt": turns[:length]} for length in (1, 3)]
    prepared = prepare(Prepare(source=str(jsonl(tmp_path / "a.jsonl", rows)), test_fraction=0.5))
    parts = prepared.tables()["prompts"].values()
    openings = [{row["prompt"][0]["content"] for row in part} for part in parts]
    assert openings[0].isdisjoint(openings[1])
    assert all(len(part) == 2 * len(o) for part, o in zip(parts, openings, strict=True))


def test_importing_is_light():
    code = (
        "import sys, align.stages.prepare;"
        "print(sorted({'torch', 'transformers', 'trl', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "[]"


def test_demonstrations_from_labelled_completions_are_all_accounted_for(tmp_path: Path):
    said = [{"prompt": f"Q {k}", "completion": f"c {k}", "label": k % 3 == 0} for k in range(60)]
    said += [{"prompt": "Q 0", "completion": "c 0", "label": True}]
    labelled_rows = jsonl(tmp_path / "said.jsonl", said)
    pairs = jsonl(tmp_path / "pairs.jsonl", [{**GOOD, "prompt": f"P {k}"} for k in range(5)])
    found = whole(pairs, demonstrations=str(labelled_rows))
    assert found.read["demonstrations"] == 61
    assert found.dropped == {
        "demonstrations: exact duplicate": 1,
        "demonstrations: not desirable": 40,
    }
    assert len(kept(found, "demonstrations")) == 20


@pytest.mark.parametrize(
    ("text", "message"),
    [("[" * 100_000, "nested too deep"), ("[" + "1" * 5000 + "]", "an integer is too long")],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_that_python_cannot_read_is_one_line(
    tmp_path: Path, name: str, text: str, message: str
):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=f"{name}.*: unreadable JSON: {message}") as found:
        whole(tmp_path / name)
    assert len(found.value.lines) == 1
