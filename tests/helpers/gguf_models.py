"""A tiny Llama in a GGUF file, with the traps of a real one.

Pad is eos, bos opens every turn, and the template inserts a system turn that no row has.
"""

from __future__ import annotations

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
    path: Path, *, architecture: str = "llama", ends: tuple[int, ...] = (2,), **metadata: Any
) -> Path:
    """Write the model to ``path``: weights in Q8_0, norms in float32, tied embeddings.

    ``ends`` are the tokens that end a text, a turn and a message. ``metadata`` are more values by
    key, with ``__`` for the points. Skips the test without the package gguf.
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
    writer.add_chat_template(TEMPLATE)
    for key, value in metadata.items():
        writer.add_string(key.replace("__", "."), value)
    for name, values in weights(len(tokens)).items():
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
