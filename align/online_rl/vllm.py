"""Completions from a vLLM server, through TRL's client; imported only for ``sampler: vllm``.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "nccl"}' \
        --logprobs-mode processed_logprobs

Before each step the server receives the policy's weights, with its adapter merged into the base. It
returns the log-probability of each token with the completions. They differ slightly from the
policy's, so the update weights tokens by policy / server, at most ``importance_cap``. Weights are
sent over NCCL, which needs a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from align.config.online_rl import OnlineRL
from align.errors import UserError
from align.models.adapters import adapter_layers
from align.online_rl.completions import Completions
from align.online_rl.models import POLICY, ModelView
from align.runtime import distributed
from align.runtime.seeds import derive_seed

MAX_REQUESTS = 64
"""Requests to the server at the same time."""


def connect(url: str, device: Any) -> Any:
    """TRL's client of a server; on the main process it can send weights from ``device``.

    Raises:
        UserError: vLLM is not installed, or the server cannot be reached.
    """
    try:
        from trl.generation.vllm_client import VLLMClient

        client: Any = VLLMClient(base_url=url)
        if distributed.is_main():
            client.init_communicator(device)
    except ImportError as error:
        raise UserError(f"sampler: vllm: {error}") from None
    except Exception as error:  # the client raises plain ones; requests' are no ConnectionError
        raise UserError(f"vllm_url: {url}: {' '.join(str(error).split())}") from error
    return client


@dataclass(frozen=True, slots=True)
class VLLMSampler:
    """Samples with a vLLM server.

    The main process sends weights; each process requests its own completions.
    """

    client: Any
    policy: ModelView
    stops: set[int]
    """Tokens that end a completion."""
    config: OnlineRL

    def generate(
        self, prompts: Sequence[Sequence[int]], *, seed: int, max_new_tokens: int | None = None
    ) -> Completions:
        """Send the policy's weights, and sample one completion per prompt."""
        self._send_weights()

        def request(i: int) -> tuple[list[int], list[float]]:
            # One request per completion: a request has one seed for all of its prompts, so equal
            # prompts would get equal completions.
            response = self.client.generate(
                [list(prompts[i])],
                temperature=self.config.temperature,
                top_p=1.0,
                max_tokens=max_new_tokens or self.config.max_new_tokens,
                logprobs=0,
                generation_kwargs={
                    "stop_token_ids": sorted(self.stops),
                    "seed": derive_seed(seed, i) % 2**31,
                },
            )
            logps = [token[0] for token in response["logprobs"][0]]
            return list(response["completion_ids"][0]), logps

        with ThreadPoolExecutor(MAX_REQUESTS) as pool:
            responses = list(pool.map(request, range(len(prompts))))
        completions = [row for row, _ in responses]
        if not all(completions):
            raise UserError(
                f"{self.config.vllm_url}: the server returned a completion without tokens; it must "
                "return the stop token too: start it without options that remove tokens"
            )
        return Completions(
            [list(prompt) for prompt in prompts],
            completions,
            [row[-1] in self.stops for row in completions],
            [logps for _, logps in responses],
        )

    def _send_weights(self) -> None:
        """Send the policy's weights to the server. The main process sends, and all ranks wait."""
        if distributed.is_main():
            # A separate pass: all merged weights at once would need the backbone's memory again.
            shapes = [
                (name, str(weight.dtype).removeprefix("torch."), list(weight.shape))
                for name, weight in merged_weights(self.policy.model)
            ]
            self.client.update_named_params(shapes, merged_weights(self.policy.model))
            self.client.reset_prefix_cache()
        distributed.barrier()


def check_mergeable(model: Any) -> None:
    """Check that the server can hold the policy: its adapter is a sum with weights of the base.

    Raises:
        UserError: The adapter is of another kind, or changes embeddings that the model ties.
    """
    adapter = getattr(model, "peft_config", {}).get(POLICY)
    if adapter is None:
        return
    tied = model.config.get_text_config().tie_word_embeddings
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    reason = None
    if adapter.use_dora or adapter.modules_to_save or adapter.trainable_token_indices:
        reason = "is more than LoRA"
    elif tied and any(layer in adapter_layers(model) for layer in embeddings):
        reason = "changes tied embeddings"
    if reason is not None:
        raise UserError(
            f"sampler: vllm: the adapter of the policy {reason}, which the server cannot hold; "
            "remove `sampler`, or remove `lora` to train all weights"
        )


def merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Weights of a policy under the base model's names, with its adapter added.

    The model is not changed.
    """
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
