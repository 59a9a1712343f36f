"""data.data_card"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.config import catalog
from align.data.sources import EMBEDDED
from align.data.statistics import LONG_ROW, LONGER_WARNING


def data_card(config: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """Word the figures; the header lets ``datasets.load_dataset(folder, "pairs")`` read them."""
    kinds = [k for k in ("demonstrations", "pairs", "unpaired", "prompts") if k in figures]
    many = [config["source"], *(entry["source"] for entry in config["mixture"])]
    sources = [name for name in (*many, config["demonstrations"]) if name]
    licences = {source: catalog.license_of(source) for source in sources}
    known = {licence[0] for licence in licences.values()}
    lines = ["---"]
    if len(known) == 1 and known != {""}:
        lines += [f"license: {known.pop()}"]
    lines += ["configs:"]
    for kind in kinds:
        lines += [f"- config_name: {kind}", "  data_files:"]
        for split in figures[kind]:
            lines += [f"  - split: {split}", f"    path: {kind}-{split}.parquet"]
    lines += ["---", "", "# Data card", ""]
    lines += [f"Source `{source}`. Licence: {licences[source][1]}." for source in sources]
    lines += [f"\n**Warning:** {warning}." for warning in figures["warnings"]]

    splits = list(figures["prompts"])
    lines += ["", "## Rows", "", *_table(["", "read", "kept", *splits])]
    for kind in kinds:
        counts = figures[kind]
        read = figures["rows"].get(kind, "")
        lines.append(_line([kind, read, sum(counts.values()), *(counts[s] for s in splits)]))
    if "demonstrations" not in figures["rows"]:
        lines += ["", "The demonstrations are the chosen (or desirable) completions, each once."]
    lines += [
        "",
        "No prompt is in two splits: a hash of the seed and of the prompt's beginning decides, normalised, up to its first"
        " user's turn, a system turn included."
        + (
            " Of nearly equal prompts the first that came decides for all."
            if config["near_duplicates"]
            else ""
        ),
    ]

    lines += ["", "## Dropped", ""]
    if figures["dropped"]:
        lines += [*_table(["reason", "rows"]), *map(_line, figures["dropped"].items())]
    else:
        lines.append("Nothing.")

    if config["mixture"]:
        lines += ["", "## Sources", "", *_table(["source", "kind", "read", "kept", "dropped"])]
        for source, found in figures["sources"].items():
            for kind, counts in found.items():
                why = "; ".join(
                    f"{count} × {reason}" for reason, count in counts["dropped"].items()
                )
                lines.append(_line([source, kind, counts["read"], counts["kept"], why]))

    words = figures["words"]
    lines += ["", "## Length in words", "", *_table(["", "median", "95th percentile"])]
    for column in [name.removesuffix("_median") for name in words if name.endswith("_median")]:
        lines.append(_line([column, f"{words[f'{column}_median']:g}", words[f"{column}_p95"]]))
    if "pairs" in figures:
        lines += [
            "",
            f"The chosen completion is longer in {figures['chosen_longer_share']:.1%} of the pairs,"
            f" as long in {figures['equal_length_share']:.1%}. Always preferring the longer is"
            f" right for {figures['prefer_longer_accuracy']:.1%} (warning above"
            f" {LONGER_WARNING:.0%}).",
        ]
    lines += ["", *summary_sentences(figures)]

    lines += ["", "## Settings", "", *_table(["setting", "value"])]
    lines += [_line([name, f"`{value}`"]) for name, value in config.items()]
    lines += ["", "## Source files", ""]
    if figures["files"]:
        lines += [*_table(["file", "SHA-256"]), *map(_line, figures["files"].items())]
    else:
        pinned = f"revision `{config['revision']}`" if config["revision"] else "no pinned revision"
        lines.append(f"None: from the Hub, {pinned}.")
    return "\n".join(lines) + "\n"


def summary_sentences(figures: Mapping[str, Any]) -> list[str]:
    """What else was found, a sentence each."""
    lines = []
    if "margins" in figures:
        margins = figures["margins"]
        lines.append(
            f"Margins of scores: median {margins['median']:g}, 5th percentile {margins['p5']:g}, 95th {margins['p95']:g}."
        )
    if "bag_of_words" in figures:
        floor = figures["bag_of_words"]
        lines.append(
            f"A classifier that only counts words is right for {floor['accuracy']:.1%} ± {floor['half_width']:.1%} of"
            f" {floor['pairs']:,} pairs it did not see: a reward model must beat that."
        )
    for kind, found in figures["longest_rows"].items():
        lines.append(
            f"The longest of the {kind} has {found['words']:,} words (prompt_id `{found['prompt_id']}`);"
            f" above {LONG_ROW:,} words: {found['long']:,}."
        )
    if "near_duplicate_prompts" in figures:
        what = "are dropped" if figures["near_duplicates"] == "drop" else "share its split"
        lines.append(
            f"{figures['near_duplicate_prompts']:,} prompts nearly repeat an earlier one; they {what}."
        )
    leak = figures["leakage"]
    lines.append(
        f"A split by row would have trained on {leak['leaked_by_row']:,} of its {leak['test_prompts_by_row']:,} test"
        f" prompts; this one on {leak['leaked']:,} of {leak['test_prompts']:,}."
    )
    return lines


def shown_path(file: Path) -> str:
    if file.is_relative_to(EMBEDDED):
        return file.relative_to(EMBEDDED.parents[1]).as_posix()
    return file.as_posix()


def _table(names: list[str]) -> list[str]:
    return [_line(names), _line(["---"] * len(names))]


def _line(cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
