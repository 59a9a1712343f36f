"""Completions from a vLLM server, through TRL's own client; imported only where a recipe says ``sampler: vllm``.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "nccl"}' \
        --logprobs-mode processed_logprobs

The server gets the policy's weights before each step (an adapter's merged into its base, on the way), and says how likely
each token was to it. Those are not quite the policy's own figures, so the update weighs tokens by policy / server:
``importance_cap``. Weights go over NCCL: on a CPU there is no way to send them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from align import processes
from align.episodes import Episodes
from align.errors import UserError
from align.roles import POLICY, Role


class Server:
    """A connection to a server that samples. The main process sends weights; each process asks for its own completions."""

    def __init__(self, url: str, device: Any) -> None:
        try:
            from trl.generation.vllm_client import VLLMClient

            self.client: Any = VLLMClient(base_url=url)
            if processes.is_main():
                self.client.init_communicator(device)
        except ImportError as error:
            raise UserError(f"sampler: vllm: {error}") from None
        except (ConnectionError, RuntimeError, NotImplementedError) as error:
            raise UserError(f"vllm_url: {url}: {' '.join(str(error).split())}") from None

    def sample(
        self,
        policy: Role,
        prompts: Sequence[Sequence[int]],
        stops: set[int],
        *,
        temperature: float,
        top_p: float,
        max_new_tokens: int,
        seed: int,
    ) -> Episodes:
        """Send the weights, and sample one completion of each prompt."""
        if processes.is_main():
            found = dict(whole_weights(policy.model))
            told = [
                (k, str(v.dtype).removeprefix("torch."), list(v.shape)) for k, v in found.items()
            ]
            self.client.update_named_params(told, iter(found.items()))
            self.client.reset_prefix_cache()
        processes.wait()
        answer = self.client.generate(
            [list(prompt) for prompt in prompts],
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_new_tokens,
            logprobs=0,
            generation_kwargs={"stop_token_ids": sorted(stops), "seed": seed % 2**31},
        )
        completions = [list(row) for row in answer["completion_ids"]]
        return Episodes(
            [list(prompt) for prompt in prompts],
            completions,
            [row[-1] in stops for row in completions],
            [[token[0] for token in row] for row in answer["logprobs"]],
        )


def whole_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """A policy's weights by their plain names, its adapter added to what it stands on. The model stays as it is."""
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            continue
        layer, _, last = name.rpartition(".")
        if not layer.endswith(".base_layer"):
            yield name, weight.data
            continue
        adapted = model.get_submodule(layer.removesuffix(".base_layer"))
        data = weight.data
        if last == "weight" and POLICY in adapted.lora_A:
            data = data + adapted.get_delta_weight(POLICY).to(data.dtype)
        yield name.replace(".base_layer", ""), data
