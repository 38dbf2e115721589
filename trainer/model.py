"""A transformers causal language model, from scratch or from a folder, ready to train.

Any family that goes through transformers' `AutoModelForCausalLM` is taken as it is; nothing here edits its source.
"""

import math
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from optim.int8_model import quantize_weights
from parallel.sequence import fused
from trainer.errors import UserError, first_line
from trainer.linear_config import LINEAR, SOFTMAX, LinearLlamaConfig
from trainer.linear_llama import LinearLlamaForCausalLM
from trainer.precision import Int8Matrices, torch_dtype, widen
from trainer.rope.frequencies import check_heeded, pin_length
from trainer.rope.scaling import extend, longest_of
from trainer.rows import Part, draw_rows, without_storage
from trainer.schema import Dtype, Initial, LinearKind, ModelConfig
from trainer.sizes import ROUND_VOCABULARY
from trainer.streamed import read_rows

transformers.AutoConfig.register(LinearLlamaConfig.model_type, LinearLlamaConfig, exist_ok=True)
transformers.AutoModelForCausalLM.register(LinearLlamaConfig, LinearLlamaForCausalLM, exist_ok=True)


def model_config(
    cfg: ModelConfig, tokenizer: transformers.PreTrainedTokenizerBase, needed: int
) -> transformers.PretrainedConfig:
    """Return the transformers configuration that `cfg` describes, with the tokenizer's special tokens.

    Args:
        needed: embeddings the tokenizer needs; where `cfg` leaves it open, the vocabulary is this, rounded up.
    """
    if cfg.path is not None:
        return hub_config(cfg)
    vocabulary = cfg.vocab_size or -(-needed // ROUND_VOCABULARY) * ROUND_VOCABULARY
    kind, linear = (
        (transformers.LlamaConfig, {}) if cfg.linear is LinearKind.none else (LinearLlamaConfig, linear_layers(cfg))
    )
    config = kind(
        **linear,
        vocab_size=vocabulary,
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads or cfg.heads,
        max_position_embeddings=cfg.max_length,
        tie_word_embeddings=cfg.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
        attention_dropout=cfg.dropout,
        rms_norm_eps=1e-6,
        initializer_range=0.02,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    extend(config, cfg.rope)
    return config


def linear_layers(cfg: ModelConfig) -> dict[str, Any]:
    """What the configuration of a model with linear attention says beside a LLaMA's."""
    every = cfg.softmax_every
    layers = range(1, (cfg.layers or 0) + 1)
    types = [SOFTMAX if every is not None and layer % every == 0 else LINEAR for layer in layers]
    return {"linear_attention": cfg.linear.value, "layer_types": types}


def hub_config(cfg: ModelConfig) -> transformers.PretrainedConfig:
    """Read the configuration of `cfg.path`, a local folder or a hub name, with the positions of `cfg.rope`.

    Raises:
        UserError: it cannot be read, or has no such positions.
    """
    try:
        config: transformers.PretrainedConfig = transformers.AutoConfig.from_pretrained(
            cfg.path, trust_remote_code=cfg.trust_remote_code
        )
    except (OSError, ValueError) as error:
        what = (
            "the folder's config.json cannot be read" if Path(str(cfg.path)).is_dir() else "no such folder or hub model"
        )
        raise UserError(
            f"model.path={cfg.path}: {what} ({first_line(error)}). Give a folder that holds a transformers "
            "model (config.json and *.safetensors), or a hub name reachable from here."
        ) from error
    extend(config, cfg.rope)
    return config


def build_model(
    cfg: ModelConfig,
    config: transformers.PretrainedConfig,
    *,
    weights: Dtype,
    device: torch.device,
    seed: int,
    length: int | None = None,
    int8: Int8Matrices | None = None,
    share: Part | None = None,
) -> nn.Module:
    """Make the model on `device` with weights in `weights`, from `seed` or from `cfg.path`, in training mode.

    Args:
        length: tokens in a row, for rotary positions that depend on it (`trainer.rope.frequencies`); None for a model
            that will not run.
        int8: what of it to keep in int8. Such a model begins in the host's memory and arrives on `device` one matrix
            after the other, where it would not fit in full.
        share: of each parameter, the part to keep. Parameters then have no storage and carry that part as attribute
            `rows`, for `parallel.shard` or DeepSpeed, and no more than one of them was ever held whole.

    Raises:
        UserError: the folder has no safetensors, its weights do not fit its own configuration, `int8` finds none, or
            the model does not heed `cfg.rope`.
    """
    options: dict[str, Any] = {"attn_implementation": cfg.attention.value, "trust_remote_code": cfg.trust_remote_code}
    # fp64 starts from the fp32 draw, so that both precisions train the same model.
    dtype = torch.float32 if weights is Dtype.fp64 else torch_dtype(weights)
    first = device if int8 is None else torch.device("cpu")

    def make() -> nn.Module:
        with first:
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **options)  # type: ignore[no-any-return]

    if cfg.weights is Initial.pretrained and share is not None:
        with without_storage():
            model = make()
        read_rows(model, str(cfg.path), share.read, dtype, first)
    elif cfg.weights is Initial.pretrained:
        model = load_pretrained(cfg, config, dtype, options)
    else:
        torch.manual_seed(seed)
        try:
            model = make() if share is None else draw_rows(make, share.cut, first)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"model.attention={cfg.attention.value}: {type(config).__name__} cannot be built with it "
                f"({first_line(error)}). Try model.attention=eager."
            ) from error
        except NotImplementedError as error:
            raise UserError(
                f"parallel.zero: {type(config).__name__}'s weights cannot be drawn one at a time "
                f"({first_line(error)}). Use parallel.zero=1 or 0."
            ) from error
    if int8 is not None:
        try:
            quantize_weights(model, int8.targets, int8.group, device)
        except ValueError as error:
            raise UserError(str(error)) from error
    if share is not None:
        move_rows(model, device)
    # Never `to(dtype)`: it would round the rotary frequencies too, which stay fp32 in a model with bf16 weights.
    elif any(tensor.device != device for tensor in model.parameters()):
        model.to(device)
    if weights is Dtype.fp64:
        widen(model)
    check_heeded(model, cfg.rope)
    if length is not None:
        pin_length(model, length)
    model.config.use_cache = False  # type: ignore[union-attr]  # a cache would also switch off the mask between packed documents
    model.train()
    return model


def move_rows(model: nn.Module, device: torch.device) -> None:
    """Bring to `device` the rows that parameters of no storage carry, and the buffers."""
    for parameter in model.parameters():
        parameter.rows = parameter.rows.to(device)  # type: ignore[attr-defined]
    for module in model.modules():
        for key, buffer in module.named_buffers(recurse=False):
            module._buffers[key] = buffer.to(device)


def linear_remarks(model: nn.Module, device: torch.device) -> list[str]:
    """Say what computes linear attention where it could be quicker."""
    if not isinstance(model, LinearLlamaForCausalLM) or device.type != "cuda" or fused.function() is not None:
        return []
    return [
        "linear attention is computed by torch, block by block: flash-linear-attention's kernels are quicker, and are "
        "used where that package is installed (pip install flash-linear-attention)"
    ]


def load_pretrained(cfg: ModelConfig, config: Any, dtype: torch.dtype, options: dict[str, Any]) -> nn.Module:
    """Load safetensors weights from a folder or the hub; other formats run code on loading and are refused."""
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            cfg.path, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"model.path={cfg.path}: cannot load its weights ({first_line(error)}). A folder needs "
            "*.safetensors; convert others once with save_pretrained(..., safe_serialization=True)."
        ) from error
    missing = sorted(set(info["missing_keys"]))
    if missing:
        raise UserError(
            f"model.path={cfg.path}: its files lack {len(missing)} weights, first {missing[0]}; "
            "training would start from random values there. Give a complete causal language model."
        )
    return model  # type: ignore[no-any-return]


def check_vocabulary(config: transformers.PretrainedConfig, need: int) -> None:
    """Refuse a tokenizer that can produce ids (below `need`) the model has no embedding for."""
    have = int(config.get_text_config().vocab_size)
    if need > have:
        raise UserError(
            f"data.tokenizer makes ids up to {need - 1}, the model has {have} embeddings. "
            f"Use the model's own tokenizer, or model.vocab_size={need} or more for a model from scratch."
        )


def check_length(config: transformers.PretrainedConfig, sequence_length: int) -> None:
    """Refuse rows longer than the positions the model knows."""
    longest = longest_of(config)
    if longest is not None and sequence_length > longest:
        raise UserError(
            f"data.sequence_length={sequence_length}: the model accepts at most {longest} tokens. "
            f"Use data.sequence_length={longest} or less."
        )


def parameter_count(model: nn.Module) -> int:
    """Number of distinct weights (tied ones once), wherever they lie."""
    return sum(math.prod(global_shape(p)) for p in model.parameters())


def global_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of the whole parameter; DeepSpeed's ZeRO-3 leaves an empty tensor between its uses."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
