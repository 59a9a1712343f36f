"""Completions from a vLLM server, through TRL's own client; imported only where a recipe says ``sampler: vllm``.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "nccl"}'         --logprobs-mode processed_logprobs

The server gets the policy's weights before each step (an adapter's merged into its base, on the way), and says how likely
each token was to it. Those are not quite the policy's own figures, so the update weighs tokens by policy / server:
``importance_cap``. Weights go over NCCL: on a CPU there is no way to send them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from align.errors import UserError
from align.online_rl.experience import Completions, derive_seed
from align.online_rl.models import POLICY, ModelView
from align.runtime import distributed

REQUESTS = 64  # at once


class VLLMServer:
    """A connection to a server that samples. The main process sends weights; each process asks for its own completions."""

    def __init__(self, url: str, device: Any) -> None:
        try:
            from trl.generation.vllm_client import VLLMClient

            self.client: Any = VLLMClient(base_url=url)
            if distributed.is_main():
                self.client.init_communicator(device)
        except ImportError as error:
            raise UserError(f"sampler: vllm: {error}") from None
        except (
            Exception
        ) as error:  # the client raises bare ones, and requests' are no ConnectionError
            raise UserError(f"vllm_url: {url}: {' '.join(str(error).split())}") from error

    def sample(
        self,
        policy: ModelView,
        prompts: Sequence[Sequence[int]],
        stops: set[int],
        *,
        temperature: float,
        top_p: float,
        max_new_tokens: int,
        seed: int,
    ) -> Completions:
        """Send the weights, and sample one completion of each prompt."""
        if distributed.is_main():
            told = [  # a pass of its own: all merged weights at once would be the backbone once more
                (name, str(weight.dtype).removeprefix("torch."), list(weight.shape))
                for name, weight in merged_weights(policy.model)
            ]
            self.client.update_named_params(told, merged_weights(policy.model))
            self.client.reset_prefix_cache()
        distributed.barrier()

        def one(place: int) -> tuple[list[int], list[float]]:
            # A request a completion: a request's seed is that of all its prompts, and equal prompts would be answered alike.
            answer = self.client.generate(
                [list(prompts[place])],
                temperature=temperature,
                top_p=top_p,
                max_tokens=max_new_tokens,
                logprobs=0,
                generation_kwargs={
                    "stop_token_ids": sorted(stops),
                    "seed": derive_seed(seed, place) % 2**31,
                },
            )
            return list(answer["completion_ids"][0]), [t[0] for t in answer["logprobs"][0]]

        with ThreadPoolExecutor(REQUESTS) as pool:
            answers = list(pool.map(one, range(len(prompts))))
        completions = [row for row, _ in answers]
        return Completions(
            [list(prompt) for prompt in prompts],
            completions,
            [row[-1] in stops for row in completions],
            [logps for _, logps in answers],
        )


def merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
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
