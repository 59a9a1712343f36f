"""The memory of a stage on a device: against what torch stores, and by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from align.config.base import NewModel, Workload
from align.config.memory import new_model_size
from align.config.memory_bill import (
    Sharding,
    Trained,
    Work,
    bill,
    parse_bytes,
    read_sharding,
    reductions,
    trained_weights,
)
from align.config.online_rl_stages import PPO
from align.config.training import DPO, KTO, SFT, Reward
from align.errors import RecipeError

SIZES = [
    NewModel(vocab_size=300, hidden_size=64, intermediate_size=192, num_hidden_layers=2),
    NewModel(
        vocab_size=300,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_key_value_heads=2,
    ),
    NewModel(vocab_size=300, hidden_size=192, intermediate_size=300, num_hidden_layers=8),
]


@pytest.mark.parametrize("new", SIZES, ids=["2 layers", "grouped keys", "8 layers"])
def test_activations_are_what_the_backward_pass_of_torch_needs_to_15_percent(new: NewModel):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**new.model_dump())).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    stored: dict[int, torch.Tensor] = {}  # holding the tensors keeps their addresses distinct

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            stored[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.model(input_ids=torch.randint(0, 300, (2, 64)), use_cache=False)
    assert hidden.last_hidden_state.requires_grad
    measured = sum(tensor.untyped_storage().nbytes() for tensor in stored.values())
    size = new_model_size(new)
    trained = trained_weights(size, SFT(model=new), Workload(), sharded=False)
    estimated = bill(size, trained, Work(tokens=128), Sharding()).activations
    assert estimated == pytest.approx(measured, rel=0.15)


def test_the_parts_by_hand():
    size = new_model_size(NewModel(vocab_size=512, hidden_size=8, intermediate_size=16,
                                   num_hidden_layers=3, num_attention_heads=1))  # fmt: skip
    trained = Trained(parameters=1000, optimizer_bytes=8, frozen=4000, embeddings=1)
    work = Work(tokens=10, sampled=(2, 20))
    alone = bill(size, trained, work, Sharding(device="cpu"))
    # A layer: 8 * 8 + 2 * 8 + 4 * 16 = 144 numbers; 3 layers and 2 * 8 at the end: 448 a token.
    # Its backward pass: 3 * 16 numbers. Logits: 10 tokens of a buffer with 32768 columns, and 7.25
    # copies of 512 columns. Cache: 2 rows * 20 tokens * 3 layers * 2 * 8, and their logits four
    # times: also probabilities, and random numbers twice.
    assert alone.parts() == {
        "weights": 4000,
        "gradients": 4000,
        "optimizer": 8000,
        "frozen": 4000,
        "exchange": 0,
        "activations": 10 * 448 * 4,
        "layer": 10 * 48 * 4,
        "logits": 10 * 4 * 32768 + 10 * 4 * 3712,
        "embedding": 4 * 512 * 8,
        "sampling": 2 * 20 * 3 * 2 * 8 * 4 + 4 * 2 * 512 * 4,
    }
    assert alone.peak == 4000 + 8000 + 4000 + 17920 + 1459200 + 16384
    # On a GPU the copies are missing. With more tokens than 4,096, the buffer stays as it is.
    gpu = bill(size, trained, work, Sharding())
    assert gpu.logits == 10 * 4 * 32768
    long = Work(tokens=5000, activation_bytes=2)
    assert bill(size, trained, long, Sharding()).logits == 4096 * 2 * 32768
    assert bill(size, trained, Work(tokens=5000), Sharding(device="cpu")).logits == (
        256 * 4 * 32768 + 256 * 4 * 3712
    )
    # With checkpointing: 3 layers store 8 numbers each, and one layer is computed again.
    again = bill(size, trained, Work(tokens=10, checkpointing=True), Sharding())
    assert again.activations == 10 * (3 * 8 + 16) * 4
    assert again.layer == 10 * (48 + 144) * 4
    # ZeRO-2 on 4 processes divides gradients and optimizer, ZeRO-3 weights and copies as well.
    two, three = (bill(size, trained, work, Sharding(4, stage)) for stage in (2, 3))
    assert (two.weights, two.gradients, two.optimizer, two.frozen) == (4000, 1000, 2000, 4000)
    assert (three.weights, three.gradients, three.optimizer) == (1000, 1000, 2000)
    assert three.frozen == 1000
    assert bill(size, trained, work, Sharding(4)).exchange == 4000  # the buckets of DDP
    # Gathered with ZeRO-3: the embeddings of 512 * 8 weights, and two layers of 4 * 8 * 8 + 3 * 8 *
    # 16 weights. The gradient of a layer is whole.
    assert two.exchange == 0
    assert three.exchange == 4 * (512 * 8 + 2 * 640) + 4 * 640
    half = Trained(parameters=100, optimizer_bytes=8, frozen=2 * size.parameters)  # bfloat16, LoRA
    assert bill(size, half, work, Sharding(4, 3)).exchange == 2 * (512 * 8 + 2 * 640)


def test_the_end_of_a_backward_pass_has_two_gradients_of_tied_embeddings():
    tied, untied = (
        new_model_size(SIZES[0].model_copy(update={"tie_word_embeddings": tie}))
        for tie in (True, False)
    )
    assert (tied.embeddings, untied.embeddings) == (1, 2)
    model = SFT(model="m")
    work = Work(tokens=1)  # almost no activations: the end of the pass is the peak
    matrix = 4 * 300 * 64
    for size, extra in ((tied, matrix), (untied, 0)):
        trained = trained_weights(size, model, Workload(), sharded=False)
        own = bill(size, trained, work, Sharding(device="cpu"))
        assert own.logits + own.layer + own.activations < own.gradients
        assert own.peak == 16 * size.parameters + extra
    # A reward model has a score head in place of the output layer.
    reward = trained_weights(untied, Reward(model="m"), Workload(), sharded=False)
    assert reward.parameters == untied.parameters - 300 * 64
    reward = trained_weights(tied, Reward(model="m"), Workload(), sharded=False)
    assert reward.parameters == tied.parameters
    lora = trained_weights(tied, SFT(model="m", lora={"r": 4}), Workload(), sharded=False)
    assert bill(tied, lora, work, Sharding()).embedding == 0


def test_gradients_of_earlier_passes_add_to_the_peak_of_a_forward_pass():
    size = new_model_size(SIZES[0])
    trained = Trained(1000, 8, 0)
    one = bill(size, trained, Work(tokens=64), Sharding())
    more = bill(size, trained, Work(tokens=64, accumulates=True), Sharding())
    assert more.peak - one.peak == 4000


def test_the_forward_pass_of_each_kind_of_stage_by_hand():
    size = new_model_size(SIZES[0])  # 512 positions
    batch = {"per_device_train_batch_size": 4, "max_length": 100}
    for stage, tokens in (
        (SFT(model="m", trainer=batch), 400),
        (DPO(model="m", trainer=batch), 800),  # chosen and rejected
        (KTO(model="m", trainer={**batch, "max_length": 1000}), 4 * 512),
        (DPO(model="m", trainer={"max_length": 100}, tokens_per_batch=77), 77),
    ):
        work = stage.forward_work(size, {}, 1)
        assert work is not None
        assert work.tokens == tokens


def test_the_forward_pass_of_online_rl_by_hand():
    size = new_model_size(SIZES[0])  # 512 positions
    keys: dict[str, Any] = {"model": "m", "rewards": ["r"], "steps": 1, "max_new_tokens": 9}
    statistics = {"longest_prompts": {"train": 20, "validation": 40}, "words": {"prompt_median": 2}}

    def planned(world_size: int = 1, **settings: Any) -> Any:
        work = PPO(**keys, **settings).forward_work(size, statistics, world_size)
        assert work is not None
        return work.tokens, work.sampled

    unknown = {"words": {"prompt_median": 20}}  # of an earlier version
    assert PPO(**keys, batch_size=8).forward_work(size, unknown, 1) is None
    row = 27 + 9  # 20 * 1.35 = 27
    assert planned(batch_size=8, micro_batch_size=4) == (4 * row, (8, row))
    # 64 completions on 8 processes are 8 for each, whatever fits into a batch.
    assert planned(batch_size=64) == (16 * row, (64, row))
    assert planned(8, batch_size=64) == (8 * row, (8, row))
    assert planned(8, batch_size=64, minibatches=2, sample_batch_size=4) == (4 * row, (4, row))
    # 20 completions are two forward passes of 10, as they are divided evenly.
    assert planned(batch_size=20) == (10 * row, (20, row))
    # Tokens of a forward pass: at least a row, at most those of a minibatch.
    assert planned(batch_size=64, tokens_per_batch=100)[0] == 100
    assert planned(batch_size=64, tokens_per_batch=5)[0] == row
    assert planned(batch_size=2, tokens_per_batch=1000)[0] == 2 * row
    # The held-out prompts are longer, and 24 on each of two processes: more than are trained on.
    held_out = {"batch_size": 8, "eval_steps": 1, "n_eval_prompts": 48}
    assert planned(2, **held_out) == (4 * (54 + 9), (24, 54 + 9))
    # An episode has up to three turns of the policy, and no row is longer than the model's 512.
    turns = {"environment": "arithmetic", "max_turns": 3}
    assert planned(batch_size=1, **turns)[0] == 27 + 3 * 9
    assert planned(batch_size=1, environment="arithmetic", max_turns=100)[0] == 512


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_copies_for_a_merged_adapter_are_those_that_torch_makes(targets: Any):
    from peft import LoraConfig, get_peft_model
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers import LlamaConfig, LlamaForCausalLM

    from align.models.decoding.merged import merged_adapter

    class Copies(TorchDispatchMode):
        n_bytes = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.clone.default:
                self.n_bytes += result.nbytes
            return result

    new = SIZES[1]
    model = LlamaForCausalLM(LlamaConfig(**new.model_dump()))
    get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    with Copies() as copies, merged_adapter(model, "default"):
        pass
    keys: dict[str, Any] = {"lora": {"r": 2, "target_modules": targets}, "max_new_tokens": 9}
    size, works = new_model_size(new), []
    for merges in (False, True):
        ppo = PPO(model="m", rewards=["r"], steps=1, batch_size=8, merge_adapter=merges, **keys)
        works.append(ppo.forward_work(size, {"longest_prompts": {"train": 20}}, 1))
    without, merged = works
    assert without is not None
    assert merged is not None
    assert (without.copied, merged.copied) == (0, copies.n_bytes)
    trained = Trained(1000, 8, 0)
    bills = [bill(size, trained, work, Sharding()) for work in (without, merged)]
    assert bills[1].sampling - bills[0].sampling == copies.n_bytes > 0
    (repaired,) = [w for name, w, _ in reductions(merged, Sharding()) if "merge" in name]
    assert repaired == without
    assert not [name for name, _, _ in reductions(without, Sharding()) if "merge" in name]


def test_sampling_from_divided_weights_gathers_all_of_them():
    size = new_model_size(SIZES[1])
    trained = Trained(parameters=1000, optimizer_bytes=8, frozen=6000)
    work = Work(tokens=1, sampled=(2, 3))
    stages = (0, 2, 3)
    whole, two, three = (bill(size, trained, work, Sharding(4, stage)) for stage in stages)
    assert three.sampling - whole.sampling == 4 * 1000 + 6000
    assert three.weights + three.frozen == (4 * 1000 + 6000) // 4  # and its own parts
    # ZeRO-2 is billed with all weights in every phase.
    assert two.sampling - whole.sampling == (4 * 1000 + 6000) // 4
    trains = replace(work, sampled=None)
    assert bill(size, trained, trains, Sharding(4, 3)).sampling == 0


def test_vllm_in_the_training_process_has_its_share_of_the_device_while_it_samples():
    size, trained = new_model_size(SIZES[1]), Trained(1000, 8, 0)
    keys: dict[str, Any] = {"model": "m", "rewards": ["r"], "steps": 1, "batch_size": 8}
    statistics = {"longest_prompts": {"train": 20}}
    colocated = keys | {"sampler": "vllm", "vllm_mode": "colocate"}
    work = PPO(**colocated, vllm_gpu_memory_utilization=0.4).forward_work(size, statistics, 1)
    served = PPO(**keys, sampler="vllm").forward_work(size, statistics, 1)
    assert work is not None and served is not None
    assert bill(size, trained, served, Sharding(), 10**10).sampling == 0
    own = bill(size, trained, work, Sharding(), 10**10)
    assert own.sampling == 4_000_000_000
    assert own.peak == own.weights + own.optimizer + own.frozen + own.sampling
    assert bill(size, trained, work, Sharding()).sampling == 0
    divided = bill(size, trained, work, Sharding(4, 3), 10**10)
    assert divided.sampling == 4_000_000_000 + 4 * 1000  # the weights that are gathered
    (half,) = [w for name, w, _ in reductions(work, Sharding()) if name.endswith("n: 0.2")]
    assert bill(size, trained, half, Sharding(), 10**10).sampling == 2_000_000_000


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"distributed_type": "NO"}, Sharding(1, 0)),
        ({"distributed_type": "MULTI_GPU", "num_processes": 8}, Sharding(8, 0)),
        (
            {"distributed_type": "DEEPSPEED", "num_processes": 2,
             "deepspeed_config": {"zero_stage": 3}},
            Sharding(2, 3, needs_deepspeed=True),
        ),
        (
            {"distributed_type": "FSDP", "num_processes": 4,
             "fsdp_config": {"fsdp_reshard_after_forward": False}},
            Sharding(4, 2),
        ),
        ({"distributed_type": "FSDP", "num_processes": 4}, Sharding(4, 3)),
        (
            {"distributed_type": "MULTI_GPU", "num_processes": 2, "use_cpu": True},
            Sharding(2, 0, "cpu"),
        ),
    ],
)  # fmt: skip
def test_the_sharding_of_a_launch_configuration(tmp_path: Path, content, expected):
    file = tmp_path / "launch.yaml"
    file.write_text(yaml.safe_dump(content))
    assert read_sharding(file) == expected


def test_wrong_files_and_sizes_are_errors_of_one_line(tmp_path: Path):
    with pytest.raises(RecipeError, match="No such file"):
        read_sharding(tmp_path / "none.yaml")
    file = tmp_path / "launch.yaml"
    for text, message in (("[1", "no YAML"), ("a", "mapping"), ("num_processes: 0", "from 1")):
        file.write_text(text)
        with pytest.raises(RecipeError, match=message):
            read_sharding(file)
    for wrong in ("24", "GB", "-1GB", "0GB", "x GB"):
        with pytest.raises(RecipeError, match="expected a size such as 24GB"):
            parse_bytes(wrong)
    assert parse_bytes("80GiB") == 80 * 2**30


def test_a_plan_says_that_data_of_an_earlier_version_lack_the_longest_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from typer.testing import CliRunner

    from align.cli.main import app
    from align.data.statistics import DatasetStatistics

    summary = DatasetStatistics.summary
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr(
        DatasetStatistics,
        "summary",
        lambda own: {k: v for k, v in summary(own).items() if k != "longest_prompts"},
    )
    runs = ["--runs", str(tmp_path), "prepare.max_rows=200", "--gpu-memory", "9GB"]
    done = CliRunner().invoke(app, ["plan", "recipes/ppo.yaml", *runs])
    assert "ppo: memory unknown: longest row unknown; run `prepare` with this" in done.output
    assert "sft: fits: " in done.output


def test_a_plan_says_what_fits_and_what_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from typer.testing import CliRunner

    from align.cli.main import app

    monkeypatch.chdir(Path(__file__).parents[2])
    runs = ["--runs", str(tmp_path), "prepare.max_rows=200"]
    done = CliRunner().invoke(app, ["plan", "recipes/ppo.yaml", *runs, "--gpu-memory", "40MB"])
    assert done.exit_code == 0, done.output
    assert "does not fit" in done.output
    assert "an 8-bit optimizer:" in done.output
    table = done.output[done.output.index("acts.") :]
    assert max(map(len, table.splitlines())) <= 80
    large = CliRunner().invoke(app, ["plan", "recipes/ppo.yaml", *runs, "--gpu-memory", "9GB"])
    assert "does not fit" not in large.output
    assert "sft: fits: " in large.output
    colocated = ["ppo.sampler=vllm", "ppo.vllm_mode=colocate", "--config"]
    colocated.append("accelerate_configs/single_gpu.yaml")
    done = CliRunner().invoke(app, ["plan", "recipes/ppo.yaml", *runs, *colocated])
    assert "ppo: without vLLM, which has 30 % of the device while it samples" in done.output
    limit = ["--gpu-memory", "9GB"]
    done = CliRunner().invoke(app, ["plan", "recipes/ppo.yaml", *runs, *colocated, *limit])
    assert "without vLLM" not in done.output
    assert "2.7G" in done.output
