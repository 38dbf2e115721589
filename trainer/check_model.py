"""Whether a model can be what the configuration says: its sizes, or the folder it is read from. No torch.

Each function returns problems as texts, `key=asked: what was found; what to do`.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from trainer.nearest import hint
from trainer.schema import Attention, Initial, LinearKind, ModelConfig, shown, too_small

ARCHITECTURE = (
    "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "vocab_size", "max_length",
    "tie_embeddings", "rope_theta", "dropout",
)  # fmt: skip
"""Options of [model] that a model read from `model.path` takes from its own config.json."""

LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")
WIDTH_KEYS = ("hidden_size", "n_embd", "d_model")


def is_read(model: ModelConfig) -> bool:
    """Whether architecture and weights come from `model.path`."""
    return model.name == "hf"


def model_problems(model: ModelConfig) -> list[str]:
    """Check options against each other, then against the files of a local folder."""
    if not is_read(model):
        return sizes_problems(model) + head_problems(model) + linear_problems(model)
    return read_problems(model) + (folder_problems(model) if model.path else [])


def linear_problems(model: ModelConfig) -> list[str]:
    """Layers of linear attention among those that attend by softmax."""
    every, most = model.softmax_every, max(model.layers or 0, 2)
    asked = f"model.softmax_every={every}"
    if model.linear is LinearKind.none and every is not None:
        return [
            f"{asked}: has no effect with model.linear=none, where every layer attends by softmax; leave it out, or "
            "use model.linear=basic"
        ]
    if every is not None and not 1 < every <= most:
        return [
            f"{asked}: of {model.layers} layers every N-th attends by softmax; use a number from 2 to {most}, or leave "
            "it out, and none does"
        ]
    if model.linear is LinearKind.none or every is not None:
        return []
    why, found = f"has no effect with model.linear={model.linear.value}, where no layer attends by softmax", []
    if model.dropout:
        found.append(f"model.dropout={model.dropout}: {why}; use model.dropout=0")
    if model.attention is not Attention.sdpa:
        found.append(f"model.attention={model.attention.value}: {why}; leave it out")
    return found


def read_problems(model: ModelConfig) -> list[str]:
    """A model read from `model.path`: everything about its architecture stands in its config.json."""
    found = []
    if not model.path:
        found.append("model=hf: needs model.path=PATH, a local folder (config.json, *.safetensors) or a hub name")
    for name in ARCHITECTURE:
        value = getattr(model, name)
        if value is not None:
            found.append(
                f"model.{name}={shown(value)}: has no effect with model=hf, whose own config.json decides; "
                "leave it out, or build from scratch with model=llama_tiny or larger"
            )
    for name in ("linear", "softmax_every"):
        value = getattr(model, name)
        if value != getattr(ModelConfig, name):
            found.append(
                f"model.{name}={shown(value)}: is for a model from scratch, and model=hf is read as it is; leave it "
                "out, or use model=llama_linear_tiny or larger"
            )
    return found


def sizes_problems(model: ModelConfig) -> list[str]:
    """A LLaMA built from sizes."""
    name = model.name
    found = too_small(
        "model", model, hidden_size=1, intermediate_size=1, layers=1, heads=1, kv_heads=1, vocab_size=2, max_length=2
    )
    for option in ARCHITECTURE:
        if getattr(model, option) is None and option not in ("kv_heads", "vocab_size"):
            found.append(f"model.{option}=null: model={name} is built from scratch and needs a value here")
    if model.path is not None:
        found.append(f"model.path={model.path}: has no effect with model={name}; write model=hf to read a model")
    if model.weights is Initial.pretrained:
        found.append(f"model.weights=pretrained: model={name} has no files to read; write model=hf model.path=PATH")
    if model.trust_remote_code:
        found.append(f"model.trust_remote_code=true: has no effect with model={name}; leave it out, or use model=hf")
    if model.dropout is not None and not 0 <= model.dropout < 1:
        found.append(f"model.dropout={model.dropout}: must lie in [0, 1); 0 switches it off")
    if model.rope_theta is not None and not model.rope_theta > 0:
        found.append(f"model.rope_theta={model.rope_theta}: must be above 0; 10000 is usual")
    return found


def head_problems(model: ModelConfig) -> list[str]:
    """Heads must split the hidden size into even widths (rotary embeddings turn pairs), key heads must divide heads."""
    hidden, heads, kv_heads = model.hidden_size or 0, model.heads or 0, model.kv_heads or 0
    found = []
    if hidden > 0 and heads > 0 and (hidden % heads or hidden // heads % 2):
        fitting = [n for n in range(1, hidden + 1) if hidden % n == 0 and hidden // n % 2 == 0]
        near = sorted(sorted(fitting, key=lambda n: abs(n - heads))[:3])
        remedy = f"use model.heads={' or '.join(map(str, near))}" if near else "use an even model.hidden_size"
        found.append(f"model.heads={heads}: model.hidden_size={hidden} does not split into even widths; {remedy}")
    if heads > 0 and kv_heads > 0 and heads % kv_heads:
        fitting = [n for n in range(1, heads + 1) if heads % n == 0]
        found.append(
            f"model.kv_heads={kv_heads}: does not divide model.heads={heads}; "
            f"use model.kv_heads={' or '.join(map(str, fitting))}"
        )
    return found


def folder_problems(model: ModelConfig) -> list[str]:
    """A local folder must hold a config.json and, to start from its weights, safetensors; a hub name is only a name."""
    asked = f"model.path={model.path}"
    path = Path(str(model.path))
    if not path.exists():
        return absent_problems(asked, path)
    if not path.is_dir():
        return [f"{asked}: is a file; give the folder it is in, with config.json and *.safetensors"]
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            return [f"{asked}: holds an adapter alone; merge it into its base model and give the merged folder"]
        return [f"{asked}: has no config.json; give a folder that save_pretrained wrote"]
    if not isinstance(read_json(path / "config.json"), dict):
        return [f"{asked}: its config.json cannot be read as JSON; copy the model again"]
    return weights_problems(asked, path) if model.weights is Initial.pretrained else []


def absent_problems(asked: str, path: Path) -> list[str]:
    """Nothing is at `path`: a wrong path, or a hub name?"""
    text = asked.removeprefix("model.path=")
    in_a_folder = path.parent != Path() and path.parent.is_dir()
    if in_a_folder or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", text):
        beside = [entry.name for entry in path.parent.iterdir()] if in_a_folder else []
        return [f"{asked}: no such folder; {hint(path.name, beside)}give a folder with config.json, or a hub name"]
    if offline() and not (hub_cache() / f"models--{text.replace('/', '--')}").is_dir():
        return [
            f"{asked}: no such folder, and the hub is switched off (HF_HUB_OFFLINE) without a copy in {hub_cache()}; "
            "give a local folder, or download the model first"
        ]
    return []


def weights_problems(asked: str, path: Path) -> list[str]:
    """Only safetensors are read: other formats can run code while loading."""
    index = read_json(path / "model.safetensors.index.json")
    if isinstance(index, dict):
        files = sorted(set(index.get("weight_map", {}).values()))
        missing = [name for name in files if not (path / name).is_file()]
        if missing:
            return [
                f"{asked}: {len(missing)} of {len(files)} weight files are missing, first {missing[0]}; "
                "copy the whole folder again"
            ]
    if any(file.stat().st_size for file in path.glob("*.safetensors")):
        return []
    other = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if other:
        return [
            f"{asked}: has {other[0]} but no *.safetensors, the only weights read here. Convert it once, where you "
            "trust its author: AutoModelForCausalLM.from_pretrained(PATH).save_pretrained(NEW_PATH)"
        ]
    return [f"{asked}: has no *.safetensors; add them, or train this architecture from scratch: model.weights=random"]


def longest_sequence(model: ModelConfig) -> int | None:
    """Return the most tokens the model takes, None where that can't be known yet (a hub name)."""
    return model.rope.longest(length_before(model), file_rope(model))


def length_before(model: ModelConfig) -> int | None:
    """Return the most tokens the model takes without `model.rope`, None where that can't be known yet."""
    return file_number(model, LENGTH_KEYS) if is_read(model) else model.max_length


def file_rope(model: ModelConfig) -> dict[str, Any]:
    """Return how a local model's config.json says that its rotary positions are scaled; empty where it does not."""
    config = read_json(Path(str(model.path)) / "config.json") if is_read(model) and model.path else None
    for part in text_parts(config):
        held = part.get("rope_parameters") or part.get("rope_scaling")
        if isinstance(held, dict):
            held = dict(held.get("full_attention") or held)  # families with parameters for each kind of layer
            outside = part.get("original_max_position_embeddings")  # Phi-3
            return held | ({"original_max_position_embeddings": outside} if isinstance(outside, int) else {})
    return {}


def smallest_side(model: ModelConfig) -> int | None:
    """Return the smaller side of the largest matrices inside attention and MLP, None where it can't be known yet."""
    if is_read(model):
        return file_number(model, WIDTH_KEYS)
    return min(model.hidden_size, model.intermediate_size) if model.hidden_size and model.intermediate_size else None


def file_number(model: ModelConfig, keys: tuple[str, ...]) -> int | None:
    """Return the first of `keys` in a local model's config.json that is a number."""
    config = read_json(Path(str(model.path)) / "config.json") if model.path else None
    for part in text_parts(config):
        for key in keys:
            if isinstance(part.get(key), int):
                return int(part[key])
    return None


def text_parts(config: Any) -> list[dict[str, Any]]:
    """Return where a config.json may say something of the part that reads text."""
    parts = (config, config.get("text_config") if isinstance(config, dict) else None)
    return [part for part in parts if isinstance(part, dict)]


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, None if there is none or it is broken."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def offline() -> bool:
    """Whether the user switched the hub off."""
    switches = (os.environ.get(name, "").upper() for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(switch in ("1", "ON", "YES", "TRUE") for switch in switches)


def hub_cache() -> Path:
    """Return the folder where huggingface_hub keeps what it downloads."""
    home = Path(os.environ.get("HF_HOME", Path("~/.cache/huggingface").expanduser()))
    return Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
