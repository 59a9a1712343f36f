"""Talk to a policy on a terminal, through the same template that it was trained with."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from align import artifact, model_files
from align.errors import UserError
from align.settings import POLICY_STAGES
from align.wording import nearest


def find(policy: str, runs: Path) -> Path | str:
    """The folder of a policy: one named, or the newest finished stage of a name under ``runs``; else a Hub id.

    Raises:
        UserError: There is no such stage, or it did not finish.
    """
    folder = Path(policy).expanduser()
    if folder.is_dir():
        model_files.model_folder(folder)
        return folder
    if "/" in policy:
        return policy
    return newest(policy, runs, POLICY_STAGES, recipe="recipes/sft.yaml")


def newest(name: str, runs: Path, stages: Sequence[str], *, recipe: str) -> Path:
    """The newest finished stage called ``name`` of these kinds; ``recipe`` is told to whoever has none.

    Raises:
        UserError: There is no such stage, or it did not finish.
    """
    made = [(p, artifact.read(p)) for p in runs.glob("*-????????????")]
    finished = [(p, a) for p, a in made if a is not None and a.stage in stages]
    mine = [p for p, a in finished if a.name == name]
    unfinished = any(a is None and p.name.startswith(f"{name}-") for p, a in made)
    if not mine:
        names = sorted({a.name for _, a in finished})
        raise UserError(
            f"{runs}: no finished policy `{name}`{' (it did not finish yet)' if unfinished else ''}"
            f"{nearest(name, names) if names else f'; run a recipe first, such as {recipe}'}"
        )
    return max(mine, key=lambda p: (p / artifact.FILE).stat().st_mtime)


def talk(source: Path | str, *, temperature: float, max_new_tokens: int, seed: int) -> None:
    """Read lines, print answers as they are sampled, until the input ends."""
    import torch
    from transformers import TextStreamer

    from align import generation, models

    tokenizer = models.load_tokenizer(source)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    model = models.load_to_infer(source, dtype=dtype).to(device).eval()
    torch.manual_seed(seed)
    print(f"{source}: an empty line forgets the conversation, Ctrl-D ends", file=sys.stderr)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    generation.set_sampling(
        model, tokenizer, temperature=temperature, top_p=1.0, max_new_tokens=max_new_tokens
    )
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            messages = []
            continue
        messages.append({"role": "user", "content": line})
        ids = generation.prompt_ids(tokenizer, [messages])
        inputs, mask = generation.padded(
            ids, pad=tokenizer.pad_token_id, side="left", device=device
        )
        with torch.inference_mode():
            output = model.generate(input_ids=inputs, attention_mask=mask, streamer=streamer)
        answer = tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True).strip()
        messages.append({"role": "assistant", "content": answer})
