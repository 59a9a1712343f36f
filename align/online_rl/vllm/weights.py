"""Weights of the policy for vLLM, and the group over which a server receives them.

Weights are sent over NCCL by functions of the ``vllm`` package, which needs a GPU. While the
workers of the server receive, the request that lets them is under way: both must run at the same
time. NCCL waits for ever, so it runs in a thread of its process that nothing waits for once the
request has failed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar

import torch
from torch import Tensor

from align.errors import UserError
from align.models.adapters import adapter_layers
from align.online_rl.models import POLICY
from align.online_rl.vllm.client import Client

T = TypeVar("T")

DEVICE = "cuda"
"""Kind of device that NCCL sends from."""
_PLACE = "/update_weights"


class WeightChannel:
    """The group of this process, which is rank 0, and the workers of a server.

    Raises:
        UserError: vLLM is not installed, this process has no GPU, or the group cannot be made.
    """

    def __init__(self, client: Client, device: torch.device) -> None:
        try:
            from vllm.distributed.weight_transfer.nccl_common import trainer_init
            from vllm.distributed.weight_transfer.packed_tensor import (
                packed_nccl_broadcast_producer,
            )
            from vllm.utils.network_utils import get_ip, get_open_port
        except ImportError as error:
            raise UserError(
                f"sampler: vllm: vLLM 0.28 to 0.33 is not installed ({error}), and weights are "
                "sent with it; install `vllm`, or remove `sampler`"
            ) from None
        if device.type != DEVICE:
            raise UserError(
                f"sampler: vllm: weights are sent over NCCL, which needs a GPU, and the policy is on "
                f"{device.type}; train on a GPU, or remove `sampler`"
            )
        self._client, self._device = client, device
        self._broadcast = packed_nccl_broadcast_producer
        client.check_setup()
        info = {
            "master_address": get_ip(),
            "master_port": get_open_port(),
            "rank_offset": 1,
            "world_size": 1 + client.world_size(),
            "packed": True,
        }
        self._group = self._together(
            client.init_weight_transfer_engine(info),
            lambda: trainer_init(info),
            "/init_weight_transfer_engine",
        )

    def send(self, model: Any) -> None:
        """Send the policy's weights, while the server holds back its requests.

        Keys and values that the last weights computed are forgotten, so a request that is under
        way continues with the new weights alone.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # vLLM reads the weights in other streams
        # A separate pass: all merged weights at once would need the backbone's memory again.
        info: dict[str, list[Any]] = {"names": [], "dtype_names": [], "shapes": []}
        for name, weight in merged_weights(model):
            info["names"].append(name)
            info["dtype_names"].append(str(weight.dtype).removeprefix("torch."))
            info["shapes"].append(list(weight.shape))

        def broadcast() -> None:
            self._broadcast(
                iterator=merged_weights(model),
                group=self._group,
                src=0,
                post_iter_func=lambda named: named[1],
            )

        self._client.pause()
        self._client.start_weight_update()
        self._together(self._client.update_weights(info), broadcast, _PLACE)
        self._client.finish_weight_update()
        self._client.reset_prefix_cache()
        self._client.resume()

    def _together(self, request: Future[Any], work: Callable[[], T], path: str) -> T:
        """The result of ``work`` in another thread, while a request is under way."""
        worked: Future[T] = Future()

        def run() -> None:
            try:
                if self._device.type == "cuda":
                    torch.cuda.set_device(self._device)
                with torch.no_grad():
                    worked.set_result(work())
            except BaseException as error:
                worked.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        wait([request, worked], return_when=FIRST_COMPLETED)
        if request.done():
            request.result()  # an error of the server, which no longer receives
        try:
            result = worked.result(self._client.timeout)
        except Exception as error:
            reason = f"the weights were not sent ({type(error).__name__}: {error})"
            raise self._client.error(path, reason, "see the log of the server") from error
        request.result()
        return result


def check_mergeable(model: Any) -> None:
    """Check that vLLM can hold the policy: its adapter is a sum with weights of the base.

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
            f"sampler: vllm: the adapter of the policy {reason}, which vLLM cannot hold; "
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
