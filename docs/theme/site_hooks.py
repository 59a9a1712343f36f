"""Hooks of the documentation site: documents outside `docs/`, links between them, docstrings.

Documents are written so that their links work in the repository. On the site, `docs/` is the root:
links to included documents are rewritten, and links to files that the site does not show become
plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
INCLUDED = {  # path in the repository: path on the site
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "recipes/README.md": "shipped-recipes.md",
    "benchmarks/README.md": "benchmarks.md",
    "tests/README.md": "tests.md",
    "accelerate_configs/README.md": "launch-configurations.md",
    "data/embedded/README.md": "embedded-task.md",
}
REPOSITORY_PATHS = {site: path for path, site in INCLUDED.items()}
ROLE = re.compile(r":(?:func|class|mod|meth|attr):(?=`)")
EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the included documents to the site."""
    for path, on_site in INCLUDED.items():
        content = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, on_site, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite links between files of the repository into links between pages of the site."""
    source = page.file.src_uri
    folder = posixpath.dirname(REPOSITORY_PATHS.get(source, f"docs/{source}"))

    def rewrite(match: re.Match[str]) -> str:
        text, target = match.groups()
        path, hash_sign, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return match[0]
        in_repository = posixpath.normpath(posixpath.join(folder, path))
        on_site = INCLUDED.get(in_repository, in_repository.removeprefix("docs/"))
        if files.get_file_from_path(on_site) is None:
            return text
        relative = posixpath.relpath(on_site, posixpath.dirname(source) or ".")
        return f"[{text}]({relative}{hash_sign}{anchor})"

    return LINK.sub(rewrite, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Keep intervals (80.8–86.2) and percentages (83.6 %) on one line, outside of code blocks."""
    parts = re.split(r"(<pre.*?</pre>)", html, flags=re.DOTALL)
    for number in range(0, len(parts), 2):
        text = re.sub(r"(?<=\d)–(?=\d)", "\u2060–\u2060", parts[number])
        parts[number] = re.sub(r"(?<=\d) %", "\u00a0%", text)
    return "".join(parts)


class MarkdownDocstrings(griffe.Extension):
    """Turn reStructuredText in docstrings into Markdown: roles and doctests become code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object before it is parsed."""
        if obj.docstring is not None:
            text = ROLE.sub("", obj.docstring.value)
            obj.docstring.value = EXAMPLE.sub(r"```pycon\n\g<0>\n```", text)
