"""A small decoder-only transformer with log positions: what ``python -m logpe train`` trains and bench compares."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logpe.attention import log_attention
from logpe.distributed import ContextParallel
from logpe.files import load_tensors, save_tensors, write_whole
from logpe.module import HeadNorm, HeadSink
from logpe.position import ROTATION, LogPosition

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

EMBEDDING_STD = 0.25  # of what enters the first block


@dataclass(frozen=True)
class Shape:
    """The size of a model. Raises ValueError where ``dim`` is not a multiple of ``heads``."""

    dim: int = 128
    layers: int = 3
    heads: int = 4
    qk_norm: bool = False  # RMSNorm on queries and keys
    vocabulary: int = 256
    sink: bool = False  # a key of each head without a position, see HeadSink

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "heads", "vocabulary"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads, got {self.dim} and {self.heads}")


class Attention(nn.Module):
    """Causal self-attention; ``position`` are LogPosition's keywords."""

    def __init__(self, shape: Shape, position: Mapping[str, Any]) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.dim, 3 * shape.dim, bias=False)
        self.out = nn.Linear(shape.dim, shape.dim, bias=False)
        head_norm = HeadNorm if shape.qk_norm else nn.Identity
        self.query_norm, self.key_norm = (head_norm(shape.dim // shape.heads) for _ in range(2))
        self.sink = HeadSink(shape.heads, shape.dim // shape.heads) if shape.sink else None
        self.position = LogPosition(shape.heads, shape.dim // shape.heads, **position)
        self.context_parallel: ContextParallel | None = None
        self.head_mesh: DeviceMesh | None = None

    def shard_heads(self, mesh: DeviceMesh, source: int | None = 0) -> None:
        """Share out the heads among the ranks of ``mesh``: see :class:`logpe.HeadParallel`."""
        from torch.distributed.tensor import Shard
        from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

        from logpe.tensor_parallel import check_heads, distribute

        if self.head_mesh is not None:
            raise ValueError("the heads of an Attention must be shared out once, got a mesh for them again")
        check_heads(mesh, heads=self.heads)
        for module in (self.position, self.query_norm, self.key_norm, self.sink):
            if isinstance(module, LogPosition | HeadNorm | HeadSink):
                module.shard_heads(mesh, source)
        distribute(self.qkv, {"weight": Shard(0)}, mesh, source)
        parallelize_module(self.out, mesh, RowwiseParallel(), src_data_rank=source)
        self.head_mesh = mesh

    def project(self, x: Tensor, last: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return q (B, H, last or N, D), k and v (B, H, N, D) of x (B, N, dim), with this rank's heads."""
        if self.head_mesh is None:
            projected = self.qkv(x)
        else:
            from logpe.tensor_parallel import rows_of_heads, share

            weight = rows_of_heads(self.qkv.weight, 3 * [self.qkv.in_features])
            projected = F.linear(share(x, self.head_mesh), weight)
        q, k, v = projected.unflatten(-1, (3, -1, self.qkv.in_features // self.heads)).permute(2, 0, 3, 1, 4)
        return self.query_norm(q if last is None else q[:, :, -last:]), self.key_norm(k), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the output, shaped as q (B, H, last or N, D), of attention to k and v (B, H, N, D)."""
        sink, parallel = None if self.sink is None else self.sink(q), self.context_parallel
        return log_attention(q, k, v, self.position, is_causal=True, sink=sink, context_parallel=parallel)

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        """Return (B, last or N, dim), of x (B, N, dim); ``last``: of so many positions at the end alone."""
        return self.out(self.attend(*self.project(x, last)).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU with 8 dim^2 weights."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = 8 * dim // 3
        self.up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP of x, (..., dim)."""
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, dim: int, attention: nn.Module) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.attention, self.mlp = attention, MLP(dim)

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        """Return (B, last or N, dim), of x (B, N, dim); ``last``: of so many positions at the end alone."""
        attended = self.attention(self.attention_norm(x), last)
        x = x[:, -attended.shape[1] :] + attended
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nn.Module):
    """A decoder-only transformer, from tokens to logits of the next token, embeddings tied.

    Args:
        shape: its size.
        position: LogPosition's keywords (``preset``, ``query_gain`` and so on), for every layer.
        seed: the same seed gives every position the same weights to start from.
        attention: makes the attention of a layer from shape and position.

    Raises:
        ValueError, TypeError: an argument that LogPosition does not take.
    """

    def __init__(
        self,
        shape: Shape,
        position: Mapping[str, Any],
        seed: int,
        attention: Callable[[Shape, Mapping[str, Any]], nn.Module] = Attention,
    ) -> None:
        super().__init__()
        self.config = dict(shape=asdict(shape), position=dict(position))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(shape.vocabulary, shape.dim)
            self.blocks = nn.ModuleList(Block(shape.dim, attention(shape, position)) for _ in range(shape.layers))
            self.norm = nn.RMSNorm(shape.dim)
        generator = torch.Generator().manual_seed(seed)  # of its own: positions may draw from the global one
        for name, weight in self.named_parameters():
            if weight.ndim == 2 and not name.endswith("sink.key"):  # which starts at zero
                std = weight.shape[1] ** -0.5
                if name.endswith(("out.weight", "down.weight")):  # into the residual stream
                    std *= (2 * shape.layers) ** -0.5
                elif name == "embedding.weight":  # or, being tied, it starts by predicting the token it just read
                    std *= EMBEDDING_STD
                nn.init.normal_(weight, std=std, generator=generator)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings (B, N, dim) of tokens int64 (B, N)."""
        return self.embedding(tokens) * self.embedding.embedding_dim**0.5

    def forward(self, tokens: Tensor, last: int | None = None) -> Tensor:
        """Return logits (B, N, vocabulary) of tokens int64 (B, N), or those of the ``last`` few positions alone."""
        x = self.embed(tokens)
        for index, block in enumerate(self.blocks):
            x = block(x, last if index == len(self.blocks) - 1 else None)
        return F.linear(self.norm(x), self.embedding.weight)


def load_model(folder: Path) -> nn.Module:
    """Return the model of a folder, in float32 on the CPU.

    Args:
        folder: a checkpoint of ``python -m logpe train``, or what ``load_converted`` takes.

    Returns:
        A LanguageModel, or a model of Transformers where it is of one.

    Raises:
        OSError, ValueError: there is none, or it is damaged.
    """
    config = read_config(folder)
    if "shape" not in config:
        return load_converted(folder, dtype=torch.float32)
    try:
        model = LanguageModel(Shape(**config["shape"]), config["position"], seed=0)
        model.load_state_dict(load_tensors(folder / "model.safetensors"))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder} holds no model that can be loaded: {error}") from None
    return model


def find_model(folder: Path) -> Path:
    """Return ``folder``, or its folder ``transformers`` where it is the output of ``python -m logpe train``."""
    inside = folder / "transformers"
    return inside if not (folder / "config.json").exists() and (inside / "config.json").exists() else folder


def read_config(folder: Path) -> dict[str, Any]:
    """Return what the config.json of a model says. Raises ValueError where there is none."""
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} is not a folder with a config.json")
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return config


def one_line(error: Exception) -> str:
    """Return the message of an error of another library, which may have many lines."""
    return " ".join(str(error).split()) or type(error).__name__


def load_converted(folder: Path, **options: Any) -> Any:
    """Return a Transformers model that was saved with log positions.

    It runs no code from the folder, reads no pickles, asks nobody and does not use the network.

    Args:
        folder: what ``save_pretrained`` wrote.
        options: those of ``logpe.transformers.from_pretrained``.

    Raises:
        ValueError: there is no such model, it is damaged, or Transformers is not installed.
    """
    config = read_config(folder)
    for name in ("attn_implementation", "_attn_implementation"):  # anything else may name code on the Hub
        if config.get(name, "logpe") != "logpe":
            raise ValueError(f"{folder}: {name} in its config.json must be 'logpe', got {config[name]!r}")
    try:
        from logpe.transformers import from_pretrained
    except ImportError as error:
        raise ValueError(f"{error}: pip install 'logpe[hf]'") from None
    try:
        return from_pretrained(folder, use_safetensors=True, trust_remote_code=False, local_files_only=True, **options)
    except Exception as error:  # the folder is anybody's, and Transformers raises what comes
        raise ValueError(f"{folder} cannot be loaded: {one_line(error)}") from None


def save_pretrained(model: LanguageModel, folder: Path, end: int) -> None:
    """Write ``model`` as Transformers' Llama, or Qwen3 where it normalises queries and keys, with log positions.

    ``logpe.transformers.from_pretrained`` loads it, and ``python -m logpe generate`` writes on with it.

    Args:
        model: on the CPU.
        folder: gets config.json and model.safetensors.
        end: id of the token that ends a document.

    Raises:
        OSError: the folder cannot be written.
    """
    shape, first = Shape(**model.config["shape"]), next(m for m in model.modules() if isinstance(m, LogPosition))
    # All of it: what is left out there is taken from the configuration of Llama's own rotation.
    rotation = {name: getattr(first, name) for name in ROTATION}
    position = {"preset": first.preset, **model.config["position"], **rotation}
    position |= {"sink": True} if shape.sink else {}
    state = model.state_dict()
    embedding = state["embedding.weight"]
    weights = {
        # Not tied there: it does not scale what it reads.
        "model.embed_tokens.weight": embedding * shape.dim**0.5,
        "lm_head.weight": embedding,
        "model.norm.weight": state["norm.weight"],
    }
    for index, block in enumerate(model.blocks):
        ours = block.state_dict()
        theirs = dict(zip(("q_proj", "k_proj", "v_proj"), ours["attention.qkv.weight"].chunk(3), strict=True))
        theirs |= {"o_proj": ours["attention.out.weight"]}
        layer = {f"self_attn.{name}.weight": x for name, x in theirs.items()}
        gate, up = ours["mlp.up.weight"].chunk(2)
        layer |= {
            "mlp.gate_proj.weight": gate,
            "mlp.up_proj.weight": up,
            "mlp.down_proj.weight": ours["mlp.down.weight"],
        }
        layer["input_layernorm.weight"] = ours["attention_norm.weight"]
        layer["post_attention_layernorm.weight"] = ours["mlp_norm.weight"]
        if shape.qk_norm:
            layer["self_attn.q_norm.weight"] = ours["attention.query_norm.weight"]
            layer["self_attn.k_norm.weight"] = ours["attention.key_norm.weight"]
        for part in ("position", "sink"):
            prefix = f"attention.{part}."
            layer |= {n.replace(prefix, f"self_attn.log_{part}."): x for n, x in ours.items() if n.startswith(prefix)}
        weights |= {f"model.layers.{index}.{name}": x for name, x in layer.items()}
    config = dict(
        architectures=["Qwen3ForCausalLM" if shape.qk_norm else "LlamaForCausalLM"],
        model_type="qwen3" if shape.qk_norm else "llama",
        vocab_size=shape.vocabulary,
        hidden_size=shape.dim,
        intermediate_size=8 * shape.dim // 3,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.dim // shape.heads,
        hidden_act="silu",
        rms_norm_eps=torch.finfo(torch.float32).eps,  # what nn.RMSNorm takes where it is given none
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=end,
        dtype="float32",
        log_position=dict(share_position=False, keep_positions=False, **position),
        attn_implementation="logpe",
    )
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: x.contiguous() for name, x in weights.items()}
    write_whole(folder / "model.safetensors", lambda path: save_tensors(weights, path, {"format": "pt"}))
    write_whole(folder / "config.json", lambda path: path.write_text(json.dumps(config, indent=1) + "\n"))
