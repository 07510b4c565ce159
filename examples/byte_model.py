"""A small byte-level decoder in plain PyTorch, with its attention left open to the caller.

The architecture and the parameter names are those of Hugging Face's Qwen2, so the directory that
`ByteModel.from_pretrained` reads also loads with `transformers.AutoModelForCausalLM`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ByteModelConfig:
    """Sizes of a `ByteModel`, named as in a Qwen2 `config.json`."""

    vocab_size: int = 256
    hidden_size: int = 256
    intermediate_size: int = 416
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 128
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    rope_theta: float = 500_000.0

    @classmethod
    def from_json(cls, path: str | Path) -> "ByteModelConfig":
        """Reads a `config.json`; keys that this model has no use for are ignored."""
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over this call's tokens alone: the `attend` of a model without a cache.

    q [B, Hq, T, D], k and v [B, Hkv, T, D] -> [B, Hq, T, D].
    """
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def rotary_tables(config: ByteModelConfig, position: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, D] of the rotary embedding for positions position .. position + length - 1."""
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    positions = torch.arange(position, position + length, device=device, dtype=torch.float32)
    angles = torch.outer(positions, config.rope_theta**-exponents).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies the rotary embedding to x [B, H, T, D]; channel i is paired with channel i + D / 2."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with biases on the query, key and value projections only."""

    def __init__(self, config: ByteModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size)
        self.k_proj = nn.Linear(config.hidden_size, key_size)
        self.v_proj = nn.Linear(config.hidden_size, key_size)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attend) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = attend(layer, rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """SwiGLU feed-forward block."""

    def __init__(self, config: ByteModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: ByteModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layer, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Holds the weights under the names that Qwen2 checkpoints use."""

    def __init__(self, config: ByteModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class ByteModel(nn.Module):
    """Decoder over bytes; the output layer shares the weights of the embedding."""

    def __init__(self, config: ByteModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> "ByteModel":
        """Loads `config.json` and `model.safetensors` from a directory, in eval mode and without gradients."""
        directory = Path(directory)
        model = cls(ByteModelConfig.from_json(directory / "config.json"))
        model.load_state_dict(load_file(directory / "model.safetensors"))
        return model.to(device=device, dtype=dtype).eval().requires_grad_(False)

    def forward(self, tokens: Tensor, attend: Attend | None = None, position: int = 0) -> Tensor:
        """Logits of the byte after each of the given ones.

        tokens: int64 [B, T], byte values.
        attend: `attend(layer, q, k, v) -> out`, called once per layer with q [B, Hq, T, D] and k, v [B, Hkv, T, D]
            after the rotary embedding, out [B, Hq, T, D]; it owns the cache. Without it, each token attends to
            the tokens of this call up to itself.
        position: position of tokens[:, 0].
        Returns float32 [B, T, vocab_size].
        """
        attend = attend or causal_attention
        x = self.model.embed_tokens(tokens)
        cos, sin = rotary_tables(self.config, position, tokens.shape[1], tokens.device)
        for index, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, index, attend)
        return functional.linear(self.model.norm(x), self.model.embed_tokens.weight).float()
