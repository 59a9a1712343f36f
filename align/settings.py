"""What each stage can be told: one strict, frozen class a stage, named like its key in a recipe.

Only what means something to the pipeline stands here. Every other knob of a training run is a field of TRL's own
configuration class and goes under ``trainer:``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

POLICY_STAGES = ("sft", "dpo", "kto", "ppo")
TAGS = ("«text»", "«new model»")  # of unions; they are not part of a key's address


@dataclass(frozen=True, slots=True)
class Input:
    """A field that names what a stage reads: an earlier stage of these kinds, or a folder.

    Where ``models`` holds, the name may also be that of a model: any folder in Hugging Face layout, or a Hub id. Where
    ``functions`` holds, it may be a Python function as well: ``module:function``. A value in ``words`` names nothing, and
    means what it says.
    """

    stages: tuple[str, ...]
    models: bool = False
    functions: bool = False
    words: tuple[str, ...] = ()


class Settings(BaseModel):
    """Strict and frozen: a typo is an error, and a text is no number."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class Stage(Settings):
    """What all stages have.

    ``code_version`` rises when a stage's results change for the same settings; ``trainer_config`` is the class of TRL
    that ``trainer`` is checked against; ``inputs`` are the fields that name what the stage reads.
    """

    code_version: ClassVar[int] = 1
    trainer_config: ClassVar[str | None] = None
    main_process_only: ClassVar[bool] = False
    inputs: ClassVar[dict[str, Input]] = {}

    stage: str = ""
    """The kind of stage, where the key in the recipe is a name of your own."""


class NewModel(Settings):
    """A Llama-architecture model with random weights, and a byte-level BPE tokenizer trained on the demonstrations."""

    vocab_size: int = Field(512, ge=264)
    """Tokens, the 256 bytes and the special ones included; the tokenizer may end up with fewer."""
    hidden_size: int = Field(128, ge=8)
    intermediate_size: int = Field(384, ge=8)
    num_hidden_layers: int = Field(4, ge=1)
    num_attention_heads: int = Field(4, ge=1)
    num_key_value_heads: int | None = Field(None, ge=1)
    max_position_embeddings: int = Field(512, ge=16)
    tie_word_embeddings: bool = True
    initializer_range: float = Field(0.02, gt=0.0)
    """Standard deviation of the random weights; narrow models learn to copy sooner with more."""

    @model_validator(mode="after")
    def _divisible(self) -> NewModel:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"`hidden_size` {self.hidden_size} must be a multiple of twice `num_attention_heads` "
                f"{self.num_attention_heads} (rotary embeddings turn pairs)"
            )
        if self.num_key_value_heads and self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` {self.num_attention_heads} must be a multiple of "
                f"`num_key_value_heads` {self.num_key_value_heads}"
            )
        return self


class Lora(Settings):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) through peft."""

    r: int = Field(16, ge=1)
    """Rank."""
    alpha: int = Field(32, ge=1)
    """The update is scaled by ``alpha / r``."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    target_modules: Annotated[
        Annotated[str, Tag(TAGS[0])] | Annotated[list[str], Tag(TAGS[1])],
        Discriminator(lambda v: TAGS[1] if isinstance(v, list) else TAGS[0]),
    ] = "all-linear"
    """Names of the adapted layers, or ``all-linear``: every linear layer but the output head."""


ModelOrNew = Annotated[
    Annotated[str, Tag(TAGS[0])] | Annotated[NewModel, Tag(TAGS[1])],
    Discriminator(lambda v: TAGS[1] if isinstance(v, (dict, NewModel)) else TAGS[0]),
]


class Source(Settings):
    """Where preference data comes from, and how it is read. A name of the catalogue stands for all of it."""

    reader: Literal["columns", "hh", "ultrafeedback", "shp", "tldr", "oasst"] = "columns"
    """``hh`` reads whole transcripts as in Anthropic's HH-RLHF; the others the shapes of the sets they are named after."""
    config: str | None = None
    """The configuration (subset) of a Hub data set."""
    data_dir: str | None = None
    """The folder of a Hub data set to read, such as ``harmless-base``."""
    data_split: str = "train"
    """The split of a Hub data set to read."""
    revision: str | None = None
    """The commit, branch or tag of a Hub data set."""
    columns: dict[str, str] = {}
    """Our column names to the source's: ``{rejected: reject}``; of ``ultrafeedback``, ``shp`` and ``tldr`` those that they
    need: ``{history: post}``."""
    pairing: Literal["best_worst", "best_random", "all"] | None = None
    """Of several scored completions: best against worst (the default), best against a random other, or all pairs."""
    margin: float | None = Field(None, ge=0.0)
    """The least difference of scores (of ranks in ``oasst``) of a pair."""
    ratio: float | None = Field(None, ge=1.0)
    """The least ratio of votes in ``shp``."""
    languages: list[str] = []
    """Of ``oasst``: the languages that are kept; without it, all."""
    max_rows: int | None = Field(None, ge=1)
    """Read no more than the first so many rows; of ``oasst``, trees."""

    @model_validator(mode="before")
    @classmethod
    def _from_the_catalogue(cls, told: Any) -> Any:
        from align import catalogue

        return catalogue.filled(told) if isinstance(told, dict) else told

    @model_validator(mode="after")
    def _options_mean_something(self) -> Source:
        for key, readers in {
            "pairing": ("ultrafeedback", "oasst"),
            "margin": ("ultrafeedback", "oasst"),
            "ratio": ("shp",),
            "languages": ("oasst",),
        }.items():
            if getattr(self, key) not in (None, []) and self.reader not in readers:
                raise ValueError(
                    f"`{key}` means nothing to `reader: {self.reader}`; remove it, or read with "
                    f"{' or '.join(f'`reader: {reader}`' for reader in readers)}"
                )
        return self


class Mixed(Source):
    """One source of a mixture."""

    source: str = Field(min_length=1)
    weight: float | None = Field(None, gt=0.0)
    """Its share of the mixture, in proportion to the others'; no row is repeated, the others are thinned by seed."""


class Prepare(Source, Stage):
    """Preference data in, checked and split by prompt, Parquet out."""

    code_version: ClassVar[int] = 3
    main_process_only: ClassVar[bool] = True

    source: str | None = Field(None, min_length=1)
    """``embedded``, a file or folder (JSONL, JSONL.gz, CSV, Parquet), a name of the catalogue, or a Hub id."""
    mixture: list[Mixed] = []
    """Several sources in place of one, each with its own reader, ``max_rows`` and ``weight``."""
    demonstrations: str | None = None
    """Another source for SFT, no name of the catalogue; without it, SFT trains on the chosen completions."""
    test_fraction: float = Field(0.1, ge=0.0, lt=1.0)
    """The share of prompts held out for ``evaluate``."""
    validation_fraction: float = Field(0.0, ge=0.0, lt=1.0)
    """The share of prompts held out for evaluation while training."""
    split_seed: int = 0
    """Another split of the same data; another draw of random pairs, and of what weights leave out."""
    near_duplicates: Literal["keep", "drop"] | None = None
    """Look for nearly equal prompts: ``keep`` puts them into one split, ``drop`` keeps the first. Without it, nobody looks."""
    near_duplicate_threshold: float = Field(0.8, ge=0.5, le=1.0)
    """The Jaccard similarity of 5-character pieces from which two prompts are nearly equal. It is estimated from 128
    hashes, so it may be 0.07 off (two standard deviations at 0.8)."""
    decontaminate: list[str] = []
    """Files, folders (all of their files) or Hub ids (their ``test``) with evaluation prompts, no names of the catalogue:
    rows with one of these prompts are dropped."""
    ngram: int = Field(13, ge=3)
    """So many words in a row, shared with an evaluation prompt, are contamination; shorter prompts are matched whole."""
    keep: list[str] = []
    """Columns of the source that come along into ``prompts-*.parquet``, of a prompt's first row; lists and objects as JSON
    text."""

    @model_validator(mode="after")
    def _one_source_or_many(self) -> Prepare:
        if bool(self.source) == bool(self.mixture):
            raise ValueError("give one of `source` and `mixture`")
        if self.mixture:
            own = [key for key in Source.model_fields if key in self.model_fields_set]
            if own:
                raise ValueError(f"`{own[0]}` goes into each entry of `mixture`")
            if len({entry.weight is None for entry in self.mixture}) > 1:
                raise ValueError("give every entry of `mixture` a `weight`, or none")
        taken = {"prompt", "prompt_id"} & set(self.keep)
        if taken:
            raise ValueError(
                f"`keep`: `{min(taken)}` is a column of ours; give the source's another name"
            )
        return self

    @model_validator(mode="after")
    def _fractions(self) -> Prepare:
        if self.test_fraction + self.validation_fraction >= 1.0:
            raise ValueError(
                "`test_fraction` and `validation_fraction` together leave nothing to train on"
            )
        return self

    def sources(self) -> list[tuple[str, str, str | None]]:
        """What is read from outside: source, split and revision of each."""
        first = [(e.source, e.data_split, e.revision) for e in self.mixture]
        if self.source:
            first = [(self.source, self.data_split, self.revision)]
        if self.demonstrations:
            first.append((self.demonstrations, self.data_split, None))
        return first


class Trained(Stage):
    """What every stage has that trains a language model."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of the weights as loaded. Mixed precision is TRL's own ``trainer: {bf16: true}``."""
    revision: str | None = None
    """The commit, branch or tag of a model from the Hub."""
    lora: Lora | None = None
    """Train adapters; without it, all weights."""
    seed: int = Field(0, ge=0, lt=2**32)
    prefix_sharing: bool = True
    """Compute shared prompts once and no padding; the results are the same, up to rounding."""
    keep_checkpoints: bool = False
    """Leave the checkpoints in the folder when the stage is complete."""


class Training(Trained):
    """What every stage has that trains a model with a trainer of TRL."""

    trainer: dict[str, Any] = {}
    """Fields of TRL's own configuration class, verbatim."""


class SFT(Training):
    """Supervised fine-tuning on demonstrations."""

    trainer_config: ClassVar[str | None] = "SFTConfig"
    inputs: ClassVar = {
        "model": Input(POLICY_STAGES, models=True),
        "demonstrations": Input(("prepare",)),
    }

    model: ModelOrNew
    """An earlier stage, a folder, a Hub id; or a mapping that describes a new model to train from scratch."""
    demonstrations: str = "prepare"

    @model_validator(mode="after")
    def _adapters_need_weights(self) -> SFT:
        if self.lora and isinstance(self.model, NewModel):
            raise ValueError(
                "`lora` freezes the model, and this one is new: remove `lora`, or name a trained `model`"
            )
        return self


class DPO(Training):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) and the other losses of TRL's trainer."""

    trainer_config: ClassVar[str | None] = "DPOConfig"
    inputs: ClassVar = {
        "model": Input(POLICY_STAGES, models=True),
        "pairs": Input(("prepare", "label")),
    }

    model: str
    """An earlier stage, a folder or a Hub id: the policy at the start, and the reference."""
    pairs: str = "prepare"
    beta: float = Field(0.1, gt=0.0)
    """How much the policy is held to the reference."""


class Reward(Training):
    """A Bradley-Terry reward model (Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, eq. 1)."""

    trainer_config: ClassVar[str | None] = "RewardConfig"
    inputs: ClassVar = {
        "model": Input(POLICY_STAGES, models=True),
        "pairs": Input(("prepare", "label")),
    }

    model: str
    """An earlier stage, a folder or a Hub id: the layers below the score. The SFT model, as a rule."""
    pairs: str = "prepare"
    """Pairs to learn from; those held out measure it, and the demonstrations beside them are given a mean score of 0."""
    margin_coef: float = Field(0.0, ge=0.0)
    """Scores by which a pair is asked to differ, for each unit of its ``margin`` (Touvron et al. 2023, arXiv:2307.09288)."""


class PPO(Trained):
    """Policy optimisation against a reward, held to a reference by a KL penalty (Ziegler et al. 2019, arXiv:1909.08593)."""

    inputs: ClassVar = {
        "model": Input(POLICY_STAGES, models=True),
        "prompts": Input(("prepare",)),
        "rewards": Input(("reward",), models=True, functions=True),
    }

    model: str
    """An earlier stage, a folder or a Hub id: the policy at the start, and the reference."""
    prompts: str = "prepare"
    rewards: list[str] = Field(min_length=1)
    """Where scores come from: ``reward`` stages, folders, Hub ids, or functions written ``module:function``."""
    weights: list[float] | None = None
    """Of the rewards, in their order; without it, 1 each."""
    judge: Literal["gold"] | None = None
    """``gold``: the embedded task's own score is logged beside the reward. It teaches nothing."""

    steps: int = Field(ge=1)
    """Updates; each samples anew."""
    batch_size: int = Field(ge=1)
    """Completions an update, of all processes together."""
    n_completions: int = Field(1, ge=1)
    """Completions a prompt."""
    temperature: float = Field(1.0, gt=0.0)
    """Of the policy and of the reference, wherever they speak."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Below 1 the policy is sampled from without its tail, and its log-probabilities are those with it."""
    max_new_tokens: int = Field(256, ge=1)
    missing_eos_penalty: float | None = Field(None, ge=0.0)
    """Taken off the score of a completion that does not end by itself."""
    sampler: Literal["transformers", "vllm"] = "transformers"
    """What draws completions; ``vllm`` is a server, at ``vllm_url``."""
    vllm_url: str = "http://localhost:8000"
    importance_cap: float = Field(2.0, gt=0.0)
    """Of the weights policy / sampler, where another engine samples."""

    advantages: Literal["gae", "rloo", "reinforce"] = "gae"
    """``gae`` has a critic; ``rloo`` compares completions of one prompt, ``reinforce`` (whitened) those of a batch."""
    gamma: float = Field(1.0, ge=0.0, le=1.0)
    lam: float = Field(0.95, ge=0.0, le=1.0)
    """Of generalised advantage estimation."""
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    """Scale rewards to variance 1; their mean stays."""
    kl_coef: float = Field(0.05, ge=0.0)
    """How much the policy is held to the reference."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    kl_target: float | None = Field(None, gt=0.0)
    """Nats a completion; with it ``kl_coef`` is adapted, without it fixed."""
    kl_horizon: int = Field(10_000, ge=1)
    """Completions in which ``kl_coef`` changes by 20 % at most."""

    learning_rate: float = Field(1e-5, gt=0.0)
    critic_learning_rate: float | None = Field(None, gt=0.0)
    """Without it, that of the policy."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = Field(0, ge=0)
    """Updates in which the learning rates rise from 0."""
    critic_warmup_steps: int = Field(0, ge=0)
    """Updates at the start in which the critic learns alone."""
    epochs: int = Field(4, ge=1)
    """Passes over what was sampled."""
    minibatches: int = Field(1, ge=1)
    """Optimizer steps in a pass."""
    micro_batch_size: int = Field(16, ge=1)
    """Completions that pass through the models at once, on each process. It saves memory and changes no result."""
    sample_batch_size: int = Field(64, ge=1)
    """Completions that are sampled at once, on each process."""
    clip: float = Field(0.2, gt=0.0)
    clip_high: float | None = Field(None, gt=0.0)
    """The upper bound, where it differs."""
    dual_clip: float | None = Field(None, gt=1.0)
    value_clip: float | None = Field(0.2, gt=0.0)
    value_coef: float = Field(0.1, ge=0.0)
    entropy_coef: float = Field(0.0, ge=0.0)
    max_grad_norm: float = Field(1.0, gt=0.0)
    target_kl: float | None = Field(None, gt=0.0)
    """KL(old, new) a token at which an update stops early."""
    gradient_checkpointing: bool = False
    quantization: Literal["nf4"] | None = None
    """Hold the frozen backbone in 4 bits (needs ``lora``)."""

    eval_steps: int | None = Field(None, ge=1)
    """Every so many updates, sample on held-out prompts."""
    eval_split: Literal["test", "validation"] = "validation"
    n_eval_prompts: int = Field(128, ge=1)
    save_steps: int | None = Field(None, ge=1)
    """A checkpoint every so many updates; without it, ten in all."""

    def _says_nothing_in_vain(self) -> None:
        """Refuse keys that the others make meaningless."""
        critic = ("lam", "value_clip", "value_coef", "critic_learning_rate")
        vain: list[tuple[tuple[str, ...], str]] = []
        if self.advantages != "gae":
            vain.append((critic, f"to `advantages: {self.advantages}`"))
        if self.advantages == "rloo":
            vain.append((("gamma",), "to `advantages: rloo`"))
        if self.sampler != "vllm":
            vain.append((("vllm_url",), "without `sampler: vllm`"))
        if self.kl_target is None:
            vain.append((("kl_horizon",), "without `kl_target`"))
        if self.eval_steps is None:
            vain.append((("eval_split", "n_eval_prompts"), "without `eval_steps`"))
        for keys, why in vain:
            for key in keys:
                if key in self.model_fields_set:
                    raise ValueError(f"`{key}` means nothing {why}: remove it")

    @model_validator(mode="after")
    def _fits_together(self) -> PPO:
        self._says_nothing_in_vain()
        if max(self.critic_warmup_steps, self.warmup_steps) >= self.steps:
            raise ValueError(
                f"a warm-up of {max(self.critic_warmup_steps, self.warmup_steps)} steps, and `steps` are {self.steps}: "
                "nothing is left; shorten it"
            )
        if len(set(self.rewards)) < len(self.rewards):
            raise ValueError("a reward stands twice in `rewards`; name each once, with a weight")
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("`kl_target` multiplies `kl_coef`, and 0 stays 0: set it above 0")
        if self.kl_target is not None and self.batch_size >= 5 * self.kl_horizon:
            raise ValueError(
                f"`kl_horizon` {self.kl_horizon} is below a fifth of `batch_size` {self.batch_size}, so one step could turn "
                "the coefficient's sign: raise it"
            )
        if self.weights is not None and len(self.weights) != len(self.rewards):
            raise ValueError(
                f"`weights` has {len(self.weights)} entries and `rewards` {len(self.rewards)}; give one for each"
            )
        if self.batch_size % self.n_completions:
            raise ValueError(
                f"`batch_size` {self.batch_size} is no multiple of `n_completions` {self.n_completions}: a prompt's "
                "completions are of one update; change one of them"
            )
        if self.advantages == "rloo" and self.n_completions < 2:
            raise ValueError(
                "`rloo` compares the completions of a prompt: set `n_completions` to 2 or more"
            )
        if self.minibatches > self.batch_size:
            raise ValueError(
                f"`minibatches: {self.minibatches}` of a batch of {self.batch_size}: one has a completion at least; lower it"
            )
        if self.advantages != "gae" and self.critic_warmup_steps:
            raise ValueError(
                f"`{self.advantages}` has no critic: remove `critic_warmup_steps`, or set `advantages: gae`"
            )
        if self.quantization and self.sampler == "vllm":
            raise ValueError(
                "`sampler: vllm` needs whole weights, and `quantization` holds none: remove one"
            )
        if self.dtype == "bfloat16" and not self.lora:
            raise ValueError(
                "`dtype: bfloat16` trained in full rounds small updates away (8 bits of precision): keep float32, or set "
                "`lora`, whose adapters stay in float32"
            )
        if self.quantization and not self.lora:
            raise ValueError("`quantization` freezes the backbone: set `lora`, or remove it")
        return self


class KTO(Training):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306): labels instead of pairs."""

    trainer_config: ClassVar[str | None] = "KTOConfig"
    inputs: ClassVar = {
        "model": Input(POLICY_STAGES, models=True),
        "preferences": Input(("prepare", "label")),
    }

    model: str
    """An earlier stage, a folder or a Hub id: the policy at the start, and the reference."""
    preferences: str = "prepare"
    """Completions with labels of their own, and both sides of pairs."""
    beta: float = Field(0.1, gt=0.0)
    """How much the policy is held to the reference."""
    desirable_weight: float | None = Field(None, gt=0.0)
    """Of desirable completions; without it, so that both labels' sums stand 1:1 to 4:3, as the paper advises."""
    undesirable_weight: float | None = Field(None, gt=0.0)
    """Of undesirable completions; without it, likewise."""


class Sample(Stage):
    """Completions of a policy, several a prompt: what ``label`` makes pairs of."""

    inputs: ClassVar = {
        "model": Input(POLICY_STAGES, models=True),
        "prompts": Input(("prepare",)),
    }

    model: str
    """The policy: an earlier stage, a folder or a Hub id."""
    prompts: str = "prepare"
    split: Literal["train", "validation", "test"] = "train"
    n_prompts: int | None = Field(None, ge=1)
    """The first so many prompts only."""
    n_completions: int = Field(4, ge=1)
    """Completions a prompt."""
    temperature: float = Field(1.0, ge=0.0)
    """0 takes the likeliest token."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    max_new_tokens: int = Field(256, ge=1)
    batch_size: int = Field(64, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    revision: str | None = None
    """The commit, branch or tag of a model from the Hub."""
    seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _draws(self) -> Sample:
        if self.temperature == 0 and self.n_completions > 1:
            raise ValueError(
                "`temperature: 0.0` gives the same completion every time: raise it, or set `n_completions: 1`"
            )
        return self


class Label(Stage):
    """Pairs from sampled completions, by the scores of a judge."""

    inputs: ClassVar = {
        "completions": Input(("sample",)),
        "judge": Input(("reward",), models=True, words=("gold",)),
    }

    completions: str = "sample"
    judge: str
    """``gold``, the embedded task's own score; or a reward model: a stage, a folder or a Hub id."""
    pairing: Literal["best_worst", "best_random", "all"] = "best_worst"
    """Of each prompt's completions: the best against the worst, against any other, or each against each."""
    margin: float = Field(0.0, ge=0.0)
    """Pairs whose scores lie closer are left out."""
    labels: Literal["exact", "bradley_terry"] = "exact"
    """``bradley_terry`` draws the chosen one with probability sigmoid(slope × gap), noisy like people."""
    slope: float | None = Field(None, gt=0.0)
    """Of ``bradley_terry``: that of the embedded task's labels for ``gold``, 1 for a reward model."""
    max_pairs: int | None = Field(None, ge=1)
    """No more than so many pairs, drawn at random."""
    batch_size: int = Field(64, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _slope_has_a_use(self) -> Label:
        if self.slope is not None and self.labels == "exact":
            raise ValueError(
                "`slope` is for noisy labels: set `labels: bradley_terry`, or remove it"
            )
        return self


class Evaluate(Stage):
    """Held-out win rates against a baseline, and accuracies of implicit rewards on held-out pairs."""

    inputs: ClassVar = {
        "policies": Input(POLICY_STAGES, models=True),
        "baseline": Input(POLICY_STAGES, models=True),
        "prompts": Input(("prepare",)),
    }

    policies: list[str] = Field(min_length=1)
    baseline: str
    prompts: str = "prepare"
    """Where the held-out prompts and pairs are."""
    split: Literal["test", "validation"] = "test"
    judge: Literal["gold"] | None = None
    """``gold``: the embedded task's own score. Without a judge no completion is sampled."""
    implicit_rewards: bool = False
    """Measure on held-out pairs how often the chosen completion has the higher implicit reward."""
    n_prompts: int | None = Field(None, ge=1)
    """The first so many held-out prompts (and pairs) only."""
    n_completions: int = Field(1, ge=1)
    """Completions a prompt and policy."""
    temperature: float = Field(0.7, ge=0.0)
    """0 takes the likeliest token."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    max_new_tokens: int = Field(256, ge=1)
    batch_size: int = Field(64, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    prefix_sharing: bool = True
    """Compute shared prompts once and no padding where completions are scored."""
    level: float = Field(0.95, gt=0.0, lt=1.0)
    """Of the intervals."""
    resamples: int = Field(2000, ge=100)
    seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _measures_something(self) -> Evaluate:
        if self.judge is None and not self.implicit_rewards:
            raise ValueError("nothing to measure: set `judge: gold`, or `implicit_rewards: true`")
        return self


class Control(Stage):
    """REINFORCE, A2C or PPO on a Gymnasium environment, through the update that language models are trained with."""

    environment: str = Field(min_length=1)
    """A Gymnasium id, such as ``CartPole-v1``; ``module:Name-v0`` imports the module first."""
    environment_options: dict[str, Any] = {}
    """Passed to ``gymnasium.make``."""
    algorithm: Literal["reinforce", "a2c", "ppo"] = "ppo"
    baseline: Literal["value", "none"] = "value"
    """REINFORCE's: a learned value, or nothing."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field([0], min_length=1)
    """Each is trained and evaluated by itself; several processes share them."""
    steps: int = Field(ge=1)
    """Steps of the environments, for each seed."""
    envs: int = Field(16, ge=1)
    """Environments in step with each other."""
    stretch: int | None = Field(None, ge=1)
    """Steps of each environment between updates: 128 for PPO, 16 for A2C. REINFORCE takes whole episodes."""
    gamma: float = Field(0.99, ge=0.0, le=1.0)
    lam: float | None = Field(None, ge=0.0, le=1.0)
    """Of generalised advantage estimation: 0.95, and 1 for REINFORCE."""
    learning_rate: float = Field(1e-3, gt=0.0)
    value_learning_rate: float | None = Field(None, gt=0.0)
    """The critic's; without it, that of the policy."""
    schedule: Literal["linear", "constant"] = "linear"
    """``linear`` takes the learning rates to 0 over the run."""
    epochs: int | None = Field(None, ge=1)
    """PPO's passes over what was collected: 4."""
    minibatches: int | None = Field(None, ge=1)
    """PPO's optimizer steps in a pass: 4."""
    clip: float | None = Field(None, gt=0.0)
    """PPO's bound on the ratio: 0.2."""
    clip_high: float | None = Field(None, gt=0.0)
    """PPO's upper bound, where it differs."""
    value_clip: float | None = Field(None, gt=0.0)
    """PPO's bound on the critic's step, in units of returns."""
    target_kl: float | None = Field(None, gt=0.0)
    """PPO's KL at which an update stops early."""
    entropy_coef: float = Field(0.0, ge=0.0)
    max_grad_norm: float | None = Field(None, gt=0.0)
    """Of policy and critic together; without it, gradients stay as they are."""
    whiten: bool = True
    """Advantages get mean 0 and variance 1 in each update."""
    hidden: list[Annotated[int, Field(ge=1)]] = [64, 64]
    """Widths of the layers of policy and critic, which share none."""
    activation: Literal["tanh", "relu"] = "tanh"
    distribution: Literal["categorical", "gaussian", "squashed"] | None = None
    """Over actions; without it, what the environment takes: categorical, or gaussian."""
    normalize_observations: bool = False
    """By running mean and deviation, which stay with the policy."""
    normalize_rewards: bool = False
    """By the running deviation of discounted returns; in training only."""
    episodes: int = Field(100, ge=1)
    """Of the greedy policy, in the evaluation of each seed."""
    level: float = Field(0.95, gt=0.0, lt=1.0)
    """Of the intervals."""
    resamples: int = Field(2000, ge=100)
    keep_checkpoints: bool = False
    """Leave the checkpoints in the folder when the stage is complete."""

    @model_validator(mode="after")
    def _fits_the_algorithm(self) -> Control:
        of_ppo = ("epochs", "minibatches", "clip", "clip_high", "value_clip", "target_kl")
        given = [key for key in of_ppo if getattr(self, key) is not None]
        if self.algorithm != "ppo" and given:
            raise ValueError(
                f"`{given[0]}` is PPO's: `{self.algorithm}` takes one step for each update; remove it, or set "
                "`algorithm: ppo`"
            )
        if self.algorithm != "reinforce" and self.baseline == "none":
            raise ValueError(f"`{self.algorithm}` learns from values: remove `baseline: none`")
        if self.algorithm == "reinforce" and self.stretch is not None:
            raise ValueError("`reinforce` takes whole episodes: remove `stretch`")
        if self.algorithm == "reinforce" and self.lam not in (None, 1.0):
            raise ValueError("`reinforce` takes whole returns, which is `lam: 1.0`: remove `lam`")
        collected = self.envs * (self.stretch or 128)
        if self.algorithm == "ppo" and (self.minibatches or 4) > collected:
            raise ValueError(
                f"`minibatches: {self.minibatches or 4}` of the {collected} steps that `envs` times `stretch` collect: "
                "one has a step at least; lower it, or raise `stretch`"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed stands twice in `seeds`; name each once")
        return self


STAGES: dict[str, type[Stage]] = {
    "prepare": Prepare,
    "sft": SFT,
    "dpo": DPO,
    "reward": Reward,
    "kto": KTO,
    "ppo": PPO,
    "sample": Sample,
    "label": Label,
    "evaluate": Evaluate,
    "control": Control,
}
