"""Base classes of the stage configurations, and the declarations that the pipeline reads from them.

A stage declares in its class which inputs and tables it reads, what it needs before it can run,
which settings its digest covers, and how much work it is. The pipeline reads these declarations and
never tests for the class of a stage, so a new stage is one module in ``config`` and one in
``stages``. Nothing here imports a training library.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import Discriminator, Field, Tag

from align.config.inputs import FUNCTION as FUNCTION
from align.config.inputs import Input as Input
from align.config.inputs import input_names
from align.config.keys import Config as Config
from align.config.keys import between_keys as between_keys

TAGS = ("«text»", "«new model»")  # of unions; they are not part of a key's address
Keys = tuple[str | int, ...]  # the address of a key below a stage: ("rewards", 0)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Table:
    """A table, ``<kind>-<split>.parquet``, that a stage reads from one of its inputs."""

    kind: str
    """``demonstrations``, ``pairs``, ``unpaired``, ``prompts`` or ``completions``."""
    input: str
    """The key of the stage that names the input."""
    split: str = "train"
    requested_by: str = ""
    """The key that makes the table necessary, for error messages; empty: the key that names the
    input."""

    @property
    def name(self) -> str:
        """The name of the file, without its suffix."""
        return f"{self.kind}-{self.split}"

    @property
    def key(self) -> str:
        """The key that an error about this table is reported at."""
        return self.requested_by or self.input


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A split other than ``train`` that a stage needs from one of its inputs."""

    keys: Keys
    """The key that makes the split necessary."""
    input: str
    """The key of the stage that names the input."""
    split: str


@dataclass(frozen=True, slots=True)
class Problem:
    """An error between keys that are each valid: the key it is reported at, and the message."""

    keys: Keys
    message: str


@dataclass(frozen=True, slots=True)
class ExternalSource:
    """Data from outside the recipe: a file, a folder or a Hub id, and the key that names it."""

    key: str
    name: str
    split: str
    """The split that is read; empty: every file of a folder."""
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class GymEnvironment:
    """A Gymnasium environment that a stage will make, with the action distribution it asks for."""

    name: str
    options: Mapping[str, Any]
    distribution: str | None = None
    needs: tuple[str, ...] = ()
    """What it must have: ``numbered states``, ``discrete actions``, ``continuous actions``,
    ``bounded continuous actions``, ``a table of transitions``, ``goals``, ``a cost``,
    ``several agents``."""


@dataclass(frozen=True, slots=True)
class GoldPrompts:
    """Prompts whose completions a stage scores with the gold score, which must parse them."""

    input: str
    """The key that names where the prompts come from: prepared data, or a stage that samples them.
    """
    split: str
    """The split of prepared data; of sampled completions, the sampling stage decides."""
    repair: str
    """The last part of the error message."""
    keys: Keys = ("judge",)
    """The key that an error is reported at."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The amount of work of a stage; None is unknown."""

    rows: int | None = None
    """Rows that it writes, trains on or samples."""
    steps: int | None = None
    """Optimizer steps; of ``control``, environment steps of all seeds."""
    tokens: int | None = None
    """Estimate from the words of the rows. Tokens of the chat template are not included."""
    pairs: int | None = None
    """Pairs that its judges compare, where their number is not that of the rows."""
    is_partial: bool = False
    """Whether training ends before all rows have been used."""


class Stage(Config):
    """The keys and declarations of all stages; by default, a stage reads nothing."""

    code_version: ClassVar[int] = 1
    """Part of the digest. It is raised when the same settings give other results than before."""
    inputs: ClassVar[dict[str, Input]] = {}
    """The keys that name what the stage reads."""
    reads: ClassVar[tuple[Table, ...]] = ()
    """The training tables that the stage reads. Of several with the same input, one must exist."""
    trains_model: ClassVar[bool] = False
    """Whether the stage trains a language model: its result depends on the number of processes."""
    writes_policy: ClassVar[bool] = False
    """Whether the stage writes a causal language model that other stages can start from."""
    prepares_data: ClassVar[bool] = False
    """Whether the stage writes the tables that other stages read, from external sources."""
    later_keys: ClassVar[Mapping[str, Any]] = {}
    """Keys that earlier versions did not have, with the value that means the same as those.

    With this value, a key is not part of the digest. Those of base classes count as well.
    """
    prompt_keys: ClassVar[tuple[str, ...]] = ()
    """Keys that change only the tables of prompts, so that stages without prompts are reused."""
    main_process_only: ClassVar[bool] = False
    """Whether only the main process runs the stage, while the others wait."""
    trainer_config: ClassVar[str | None] = None
    """The TRL configuration class that ``trainer`` is checked against.

    A name such as ``DPOConfig``, or ``module:Class`` for a class outside of TRL's top level. Its
    fields are stored in ``config/trl_fields.json``; ``python -m align.training.trl_field_table``
    writes them.
    """
    metrics_class: ClassVar[str | None] = None
    """The class of the stage's metrics in the Python API, as ``module:Class``."""

    stage: str = ""
    """The kind of stage. Required if the key in the recipe is not itself the name of a kind."""

    def input_names(self) -> dict[str, str]:
        """The named inputs by key, such as ``{"model": "sft", "policies.0": "dpo"}``."""
        return input_names(self.inputs, {key: getattr(self, key) for key in self.inputs})

    def digest_settings(self) -> dict[str, Any]:
        """The settings that the digest of the stage covers."""
        settings = self.model_dump(exclude={"stage"})
        later = [vars(cls).get("later_keys", {}).items() for cls in type(self).__mro__]
        unused = {key for key, value in itertools.chain(*later) if settings[key] == value}
        return {key: value for key, value in settings.items() if key not in unused}

    def external_sources(self) -> tuple[ExternalSource, ...]:
        """Data from outside the recipe; its content is part of the digest."""
        return ()

    def named_paths(self) -> dict[str, str]:
        """Values that may be paths, by key; the content of existing ones is in the digest."""
        return {}

    def required_tables(self) -> tuple[Table, ...]:
        """The tables that the stage requires; of several with the same key, any one."""
        return self.reads

    def held_out(self) -> Iterator[HeldOut]:
        """The splits other than ``train`` that the stage needs from its inputs."""
        yield from ()

    def missing_split(self, split: str, name: str, stages: Mapping[str, Stage]) -> str | None:
        """The error if this stage, called ``name``, does not write ``split``, else None."""
        return None

    def problems(self, stages: Mapping[str, Stage]) -> Iterator[Problem]:
        """Errors between the keys of this stage, and with the ``stages`` of the recipe."""
        yield from ()

    @property
    def trains_without_dropout(self) -> bool:
        """Whether dropout is off while the stage trains, so that ``lora.dropout`` has no effect."""
        return False

    @property
    def reward_functions(self) -> Mapping[Keys, Any]:
        """The functions that score completions, by the key that names them."""
        return {}

    @property
    def environments(self) -> dict[Keys, str]:
        """Environments of language models, written ``module:Class``, by the key that names them."""
        return {}

    @property
    def servers(self) -> dict[str, str]:
        """Addresses of the vLLM servers that must answer, by key."""
        return {}

    @property
    def server_judges(self) -> Mapping[Keys, Any]:
        """The judges behind an API whose server must answer, by key."""
        return {}

    @property
    def annotation_files(self) -> dict[str, str]:
        """Files of annotations among the named paths, by key."""
        paths = self.named_paths()
        return {key: path for key, path in paths.items() if key.endswith("annotations")}

    @property
    def completion_files(self) -> dict[str, str]:
        """Files of completions among the named paths, by key."""
        return {}

    @property
    def trackers(self) -> tuple[str, ...]:
        """The experiment trackers that the stage reports to."""
        return ()

    @property
    def required_packages(self) -> dict[str, tuple[str, str]]:
        """The module of an optional dependency, and the argument of ``pip install``, by key."""
        return {}

    @property
    def gpu_keys(self) -> dict[str, str]:
        """Keys whose value needs an NVIDIA GPU, each with the repair where there is none."""
        return {}

    @property
    def gym_environments(self) -> tuple[GymEnvironment, ...]:
        """The Gymnasium environments that the stage makes."""
        return ()

    @property
    def gold_prompts(self) -> GoldPrompts | None:
        """The prompts that the gold score must be able to parse; None if it is not used."""
        return None

    @property
    def required_columns(self) -> dict[str, tuple[Table, str]]:
        """Columns that a table must have, by the key that makes them necessary."""
        return {}

    @property
    def labels_per_batch(self) -> int | None:
        """The batch size of a stage whose batches must hold both labels; None for other stages."""
        return None

    def batch_size_problems(self, world_size: int) -> Iterator[Problem]:
        """Errors of batch sizes that do not divide over ``world_size`` processes."""
        yield from ()

    def trl_arguments(self) -> dict[str, Any]:
        """The fields of ``trainer_config`` that the stage sets."""
        return {}

    def trl_value(self, field: str) -> Any:
        """The value of a field of ``trainer_config``: of the recipe, else the default."""
        raise NotImplementedError(f"{type(self).__name__} has no `trainer`")

    def workload(self, statistics: Mapping[str, Any], world_size: int) -> Workload:
        """Estimate the work of the stage.

        ``statistics`` are the metrics of the data that the stage reads, empty if unknown;
        ``world_size`` processes share the batches.
        """
        return Workload()

    def forward_work(self, size: Any, statistics: Mapping[str, Any], world_size: int) -> Any:
        """The size of a forward pass of one of ``world_size`` processes in training.

        None if it is unknown, or no model is trained.
        """
        return None

    def inference_work(self, statistics: Mapping[str, Any], world_size: int) -> Any:
        """The batches of one of ``world_size`` processes of a stage without gradients.

        None if their size is unknown, or the stage is none of these.
        """
        return None

    def memory_bytes(self, size: Any, workload: Workload, *, sharded: bool) -> int | None:
        """Estimate the memory of weights, gradients and optimizer states, without activations.

        ``size`` is that of the trained model, and ``workload`` that of the stage; with
        ``sharded``, FSDP or DeepSpeed is in use.
        """
        return None


class NewModel(Config):
    """A new Llama model, and a byte-level BPE tokenizer trained on the demonstrations."""

    vocab_size: int = Field(512, ge=264, le=1_000_000)
    """Upper bound on the size of the vocabulary, including the 256 bytes and the special tokens."""
    hidden_size: int = Field(128, ge=8, le=65_536)
    """Width of the hidden states."""
    intermediate_size: int = Field(384, ge=8, le=1_000_000)
    """Width of the feed-forward layers."""
    num_hidden_layers: int = Field(4, ge=1, le=1_000)
    """Number of layers."""
    num_attention_heads: int = Field(4, ge=1, le=1_000)
    """Number of attention heads; twice this number must divide ``hidden_size``."""
    num_key_value_heads: int | None = Field(None, ge=1)
    """Number of key and value heads (grouped-query attention). Default: ``num_attention_heads``."""
    max_position_embeddings: int = Field(512, ge=16, le=10_000_000)
    """Longest sequence in tokens."""
    tie_word_embeddings: bool = True
    """Use the input embeddings as the output layer."""
    initializer_range: float = Field(0.02, gt=0.0)
    """Standard deviation of random weights. With more, narrow models soon learn to copy words."""

    @between_keys
    def _check_heads(self) -> Iterator[str]:
        if self.hidden_size % (2 * self.num_attention_heads):
            yield (
                f"`hidden_size` ({self.hidden_size}) must be a multiple of twice "
                f"`num_attention_heads` ({self.num_attention_heads}), because rotary "
                "embeddings rotate pairs of channels"
            )
        if self.num_key_value_heads and self.num_attention_heads % self.num_key_value_heads:
            yield (
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of "
                f"`num_key_value_heads` ({self.num_key_value_heads})"
            )

    def count_parameters(self) -> int:
        """Parameters of a Llama of this shape, as transformers builds it (RMS norms, no biases)."""
        width, heads = self.hidden_size, self.num_attention_heads
        key_value = width // heads * (self.num_key_value_heads or heads)
        attention = 2 * width * width + 2 * width * key_value
        layer = attention + 3 * width * self.intermediate_size + 2 * width
        embeddings = self.vocab_size * width * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings + width


class Lora(Config):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), trained with peft."""

    r: int = Field(16, ge=1)
    """Rank of the update."""
    alpha: int = Field(32, ge=1)
    """Scale of the update: it is multiplied by ``alpha / r``."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout probability at the input of the adapters, in this stage. ``dpo``, ``kto`` and
    ``reward`` have none unless ``trainer`` has ``disable_dropout: false``; online RL never has."""
    target_modules: Annotated[
        Annotated[str, Tag(TAGS[0])] | Annotated[list[str], Tag(TAGS[1])],
        Discriminator(lambda v: TAGS[1] if isinstance(v, list) else TAGS[0]),
    ] = "all-linear"
    """Names of the adapted layers, or ``all-linear``: all linear layers but the output layer."""

    @property
    def shape(self) -> dict[str, Any]:
        """What an adapter keeps when another stage trains it further."""
        return self.model_dump(exclude={"dropout"})


ModelOrNew = Annotated[
    Annotated[str, Tag(TAGS[0])] | Annotated[NewModel, Tag(TAGS[1])],
    Discriminator(lambda v: TAGS[1] if isinstance(v, (dict, NewModel)) else TAGS[0]),
]


def duplicates(values: Sequence[T]) -> list[T]:
    """The values that occur more than once, each listed once."""
    return [value for value in dict.fromkeys(values) if values.count(value) > 1]
