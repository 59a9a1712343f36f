"""Model card of a folder that was converted from a GGUF file: what it is, and how it is loaded.

Its layout is the template ``gguf_card.md.jinja``. Cards of trained models, which name this file as
their base, are written by the pipeline.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.models.gguf_files import GgufHeader
from align.runtime.artifacts import Artifact
from align.runtime.markdown import load_template

FILE = "README.md"
_TEMPLATE = Path(__file__).with_name("gguf_card.md.jinja")
_LICENSE_KEYS = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
}
"""Keys of the Hub's metadata, and where a GGUF file has them."""


def gguf_card(
    file: Path, header: GgufHeader, artifact: Artifact, model: Any, tokenizer: Any
) -> str:
    """The card of the model that a file became; ``artifact`` is the record of the conversion."""
    import yaml

    values = {key: header.metadata.get(place) for key, place in _LICENSE_KEYS.items()}
    license = {key: value for key, value in values.items() if value and isinstance(value, str)}
    metadata = license | {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["align", artifact.stage],
    }
    rows = {
        "file": f"`{file.name}`, {file.stat().st_size:,} bytes",
        "SHA-256": f"`{artifact.recipe['sha256']}`",
        "license": license.get("license", "unknown: not in the file"),
        "architecture": f"{header.architecture}, read as `{type(model).__name__}`",
        "parameters": f"{model.num_parameters():,}",
        "vocabulary": f"{model.config.vocab_size:,} tokens",
        "positions": f"{header.positions:,}" if header.positions else "not in the file",
        "digest of the conversion": f"`{artifact.digest}`",
    }
    return load_template(_TEMPLATE).render(
        header=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        name=artifact.name,
        rows=rows,
        has_chat_template=tokenizer.chat_template is not None,
        versions=artifact.versions,
    )
