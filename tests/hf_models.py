"""Tiny random transformers models of many families, head dim 64, for test_transformers.py."""

import copy
import sys
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from torch_tqattn.integrations.transformers.attention import tqattn_attention
from torch_tqattn.integrations.transformers.forward import Handle

VOCABULARY = 97
WINDOW = 24
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.08,
    "tie_word_embeddings": False,
}
HEAD_DIM = {"head_dim": 64}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
GEMMA_N = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 2}

# Family: config class, and what is given to it beside SIZES.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", HEAD_DIM),
    "mistral": ("MistralConfig", {**HEAD_DIM, "sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "qwen3": ("Qwen3Config", HEAD_DIM),
    "gemma2": (
        "Gemma2Config",
        {**HEAD_DIM, "sliding_window": WINDOW, "query_pre_attn_scalar": 50, "attn_logit_softcapping": 5.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {**HEAD_DIM, "sliding_window": WINDOW, "query_pre_attn_scalar": 50, "layer_types": MIXED[:3]},
    ),
    "gemma3n": (
        "Gemma3nTextConfig",
        {
            **HEAD_DIM,
            **GEMMA_N,
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 4,
            "layer_types": MIXED,
        },
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {
            **HEAD_DIM,
            **GEMMA_N,
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "global_head_dim": 128,
            "layer_types": MIXED,
        },
    ),
    "gpt_oss": ("GptOssConfig", {**HEAD_DIM, **EXPERTS, "sliding_window": WINDOW}),
    "phi3": ("Phi3Config", {}),
    "granite": ("GraniteConfig", {}),
    "olmo3": ("Olmo3Config", {"sliding_window": WINDOW, "layer_types": MIXED[:3]}),
    "mixtral": ("MixtralConfig", {**HEAD_DIM, **EXPERTS}),
    "llama4": (
        "Llama4TextConfig",
        {
            **HEAD_DIM,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 96,
            "attention_chunk_size": WINDOW,
            "interleave_moe_layer_step": 2,
            "num_hidden_layers": 4,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "first_k_dense_replace": 2,
        },
    ),
}


def additive(mask: Tensor | None, queries: int, positions: int, device: torch.device) -> Tensor:
    """The additive mask that eager attention takes, for what sdpa_mask made."""
    if mask is None:
        mask = torch.ones(1, 1, queries, positions, dtype=torch.bool, device=device).tril(positions - queries)
    return torch.zeros(mask.shape, device=device).masked_fill(~mask, torch.finfo(torch.float32).min)


def eager_over_dense(
    module: nn.Module, query: Tensor, key: Any, value: Any, mask: Tensor | None, **options: Any
) -> Any:
    """The model's own eager attention, over the dense tensors that the cache makes of itself."""
    if isinstance(key, Handle):
        key.forward.learn_padding(mask)
        key, value = key.dense(), value.dense()
    mask = additive(mask, query.shape[2], key.shape[2], query.device)
    model_file = sys.modules[type(module).__module__]
    return model_file.eager_attention_forward(module, query, key, value, mask, **options)


class Checked:
    """ "tqattn", with every call compared to the eager attention over what its handle is as a tensor."""

    worst = 0.0  # the largest relative error of a query's output
    calls: ClassVar[dict[str, int]] = {}  # how often each kind of forward was seen

    @classmethod
    def reset(cls) -> None:
        cls.worst, cls.calls = 0.0, {}

    @classmethod
    def attention(
        cls, module: nn.Module, query: Tensor, key: Any, value: Any, mask: Tensor | None, **options: Any
    ) -> Any:
        result = tqattn_attention(module, query, key, value, mask, **options)
        if isinstance(key, Handle) and key.forward.past + query.shape[2] > 1:
            kind = type(key.forward).__name__ + (" with a past" if key.forward.past else "")
            cls.calls[kind] = cls.calls.get(kind, 0) + 1
            if kind.startswith("Stepwise"):  # its queries see different things
                return result
            expected = eager_over_dense(module, query, key, value, mask, **options)[0]
            # A query of padding sees nothing. Eager attention then looks at everything.
            sees = torch.ones(1) if mask is None else mask[:, 0].any(-1)[..., None, None].to(query)
            error = (result[0] - expected).mul(sees.to(query.device)).norm(dim=-1) / expected.norm(dim=-1)
            cls.worst = max(cls.worst, float(error.max()))
        return result


AttentionInterface.register("eager_over_dense", eager_over_dense)
AttentionMaskInterface.register("eager_over_dense", sdpa_mask)
AttentionInterface.register("checked", Checked.attention)
AttentionMaskInterface.register("checked", sdpa_mask)


def config_of(family: str) -> transformers.PretrainedConfig:
    name, options = FAMILIES[family]
    return getattr(transformers, name)(**{**SIZES, **options})


def make_model(
    family: str,
    attention: str,
    device: str = "cpu",
    noise: float = 0.0,
    config: transformers.PretrainedConfig | None = None,
) -> PreTrainedModel:
    """The model of a family, always with the same weights, but for `noise`, relative."""
    torch.manual_seed(0)
    config = copy.deepcopy(config) if config else config_of(family)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for name, parameter in model.named_parameters():
        if "sinks" in name or (parameter.dim() == 1 and "norm" in name):  # those are trivial in a new model
            parameter.data += 0.3 * torch.randn(parameter.shape)
        parameter.data *= 1 + noise * torch.randn(parameter.shape)
    return ready(model, device)


def make_vision_model(attention: Any, device: str = "cpu") -> PreTrainedModel:
    """A Gemma3 with a vision tower: the tokens of an image see each other in both directions."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=config_of("gemma3").to_dict(),
        vision_config={**vision, "image_size": 28, "patch_size": 7},
        mm_tokens_per_image=4,
        image_token_index=90,
        boi_token_index=91,
        eoi_token_index=92,
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation=attention)
    return ready(model, device)


def ready(model: PreTrainedModel, device: str) -> PreTrainedModel:
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval().to(device)


def prompts(length: int = 40, padding: int = 9, device: str = "cpu", seed: int = 5) -> dict[str, Tensor]:
    """Two prompts, the first padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY - 10, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, :padding] = mask[0, :padding] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def one_prompt(length: int = 40, device: str = "cpu") -> dict[str, Tensor]:
    return {name: x[1:] for name, x in prompts(length, 0, device).items()}


def generate(
    model: PreTrainedModel, inputs: dict[str, Tensor], cache: Any, tokens: int = 16, **options: Any
) -> tuple[Tensor, Tensor]:
    """The new tokens [batch, tokens] and the logits [batch, tokens, vocabulary] that they were chosen from."""
    torch.manual_seed(1)
    settings = {"do_sample": False, "max_new_tokens": tokens, "output_logits": True, "return_dict_in_generate": True}
    done = model.generate(**inputs, past_key_values=cache, **{**settings, **options})
    return done.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(done.logits, dim=1)
