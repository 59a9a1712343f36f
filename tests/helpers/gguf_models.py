"""A tiny Llama in a GGUF file, with the traps of a real one, and files written byte by byte.

Pad is eos, bos opens every turn, and the template inserts a system turn that no row has.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
POSITIONS = 192
WIDTH, LAYERS, HEADS, KEY_VALUE_HEADS, INNER = 32, 2, 4, 2, 64


def write_model(
    path: Path,
    *,
    architecture: str = "llama",
    ends: tuple[int, ...] = (2,),
    without: str = r"$^",
    template: str = TEMPLATE,
    **metadata: Any,
) -> Path:
    """Write the model to ``path``: weights in Q8_0, norms in float32, tied embeddings.

    ``ends`` are the tokens that end a text, a turn and a message. Keys and tensors whose names
    match ``without`` are left out. ``metadata`` are more values by key, with ``__`` for the points.
    Skips the test without the package gguf.
    """
    gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*SPECIAL, *bytes_to_unicode().values(), "Ġt", "he"]
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["Ġ t", "h e"])
    writer.add_bos_token_id(1)
    adders = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, token in zip(adders, ends, strict=False):
        add(token)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(template)
    for key, value in metadata.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_string
        add(key.replace("__", "."), value)
    for key in filter(re.compile(without).match, list(writer.kv_data[0])):
        del writer.kv_data[0][key]
    for name, values in weights(len(tokens)).items():
        if re.match(without, name):
            continue
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def weights(n_tokens: int) -> dict[str, Any]:
    """The weights by llama.cpp's names, before they are quantized."""
    import numpy as np

    rng = np.random.default_rng(0)
    key_value = WIDTH // HEADS * KEY_VALUE_HEADS
    shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (key_value, WIDTH), "attn_v": (key_value, WIDTH),
              "attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH),
              "ffn_down": (WIDTH, INNER), "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}  # fmt: skip
    named = {"token_embd.weight": (n_tokens, WIDTH), "output_norm.weight": (WIDTH,)}
    named |= {f"blk.{i}.{n}.weight": s for i in range(LAYERS) for n, s in shapes.items()}
    return {
        name: rng.normal(float(len(shape) == 1), 0.2, shape).astype(np.float32)
        for name, shape in named.items()
    }


def text(value: str) -> bytes:
    """A text as GGUF files store it."""
    return struct.pack("<Q", len(value.encode())) + value.encode()


def by_hand(
    *,
    architecture: str = "llama",
    values: int = 4,
    tensor: str = "token_embd.weight",
    metadata: Mapping[str, str | int] | None = None,
    **texts: str,
) -> bytes:
    """A GGUF file without the package: keys and one float32 tensor of ``values`` × 2.

    Without an architecture or a name of the tensor, it has none. ``metadata`` are further keys,
    ``texts`` further values of the tokenizer.
    """
    sizes = ("embedding_length", "block_count", "attention.head_count",
             "attention.layer_norm_rms_epsilon")  # fmt: skip
    named: dict[str, str | int] = {
        f"{architecture}.{key}": int(key != "block_count") for key in sizes
    }
    texts = {"model": "llama"} | texts
    named |= {f"tokenizer.ggml.{key}": value for key, value in texts.items()} | (metadata or {})
    named |= {"general.architecture": architecture} if architecture else {}
    keys = [
        *(
            text(key) + (struct.pack("<II", 4, value) if isinstance(value, int) else
                         struct.pack("<I", 8) + text(value))
            for key, value in named.items()
        ),
        text(f"{architecture}.context_length") + struct.pack("<II", 4, 77),
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("Ġb"),
        text("tokenizer.ggml.scores") + struct.pack("<IIQff", 9, 6, 2, 0.0, 0.0),
    ]  # fmt: skip
    header = b"GGUF" + struct.pack("<IQQ", 3, bool(tensor), len(keys)) + b"".join(keys)
    if tensor:
        header += text(tensor) + struct.pack("<IQQIQ", 2, values, 2, 0, 0)
    return header.ljust(-(-len(header) // 32) * 32, b"\0") + bytes(4 * 2 * values)
