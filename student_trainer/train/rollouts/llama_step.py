"""Decodes a token of models shaped like Llama in few operations, since transformers' own pass costs a small model several times its arithmetic.

The weights are those of the model at the time of construction, joined where that is cheap. Axes: B sequences, L keys, H hidden
units, N heads, D units of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from stillhouse.student_trainer.train.loss.products import by_onednn, uses_onednn

_FAMILIES = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
_ROTARY = {"default", "linear", "llama3", "yarn"}
"""Kinds of rotary embedding that depend on a token's place alone."""
MOST_COPIED, _MERGED_WEIGHTS = 2**23, 2**26
"""Weights of a model up to which projections are copied, those of one input side by side, and adapters are added to copies of their
layers. Those of larger models take longer to read than to start."""

Project = Callable[[Tensor], Tensor]


class Memory(Protocol):
    """Keys and values of one layer."""

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Adds a token's, [B, N, 1, D]; returns all of them, [B, N, L, D]."""


def decodes(model: Any) -> bool:
    """True if a causal model's class and settings are those that `LlamaStep` computes, whatever its weights."""
    plain = plain_model(model)
    if type(plain).__name__ not in _FAMILIES or not type(plain).__module__.startswith("transformers."):
        return False
    body = plain.model
    norms = [
        body.norm,
        *(
            getattr(layer, name)
            for layer in body.layers
            for name in ("input_layernorm", "post_attention_layernorm")
        ),
    ]
    return body.rotary_emb.rope_type in _ROTARY and all(
        type(norm).__name__.endswith("RMSNorm") for norm in norms
    )


class LlamaStep:
    """Decodes one more token of each sequence."""

    def __init__(self, model: Any, num_positions: int) -> None:
        """`decodes(model)` must hold, and positions be below `num_positions`; the precision is that of the surrounding autocast."""
        plain = plain_model(model)
        body = plain.model
        size = sum(each.numel() for each in plain.parameters())
        self._embed = body.embed_tokens
        self._turns = turns(body, num_positions)
        self._layers = [_Layer(layer, size) for layer in body.layers]
        self._norm = _Norm(body.norm)
        self._head = _side_by_side([plain.lm_head], size)

    def __call__(
        self, ids_B: Tensor, positions_B: Tensor, mask_B11L: Tensor | None, memory: Sequence[Memory]
    ) -> Tensor:
        """Logits [B, V] behind `ids_B`; `mask_B11L` is False at padding before it, None if there is none."""
        hidden_BH = self._embed(ids_B)
        cos_B1D, sin_B1D = torch.split(self._turns[positions_B], 1, dim=1)
        for layer, own in zip(self._layers, memory, strict=True):
            hidden_BH = layer(hidden_BH, cos_B1D, sin_B1D, mask_B11L, own)
        return self._head(self._norm(hidden_BH))


class _Layer:
    """Attention and MLP of one layer."""

    def __init__(self, layer: Any, size: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._head_dim = int(attention.head_dim)
        self._scaling = float(attention.scaling)
        groups = int(attention.num_key_value_groups)
        self._num_keys = attention.config.num_key_value_heads
        self._num_queries = groups * self._num_keys
        self._is_grouped = groups > 1
        self._before, self._after = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self._query_norm, self._key_norm = (
            _Norm(norm) if (norm := getattr(attention, name, None)) is not None else None
            for name in ("q_norm", "k_norm")
        )
        self._attend_in = _side_by_side([attention.q_proj, attention.k_proj, attention.v_proj], size)
        self._attend_out = _side_by_side([attention.o_proj], size)
        self._mlp_in = _side_by_side([mlp.gate_proj, mlp.up_proj], size)
        self._mlp_out = _side_by_side([mlp.down_proj], size)
        self._activation: Project = functional.silu if isinstance(mlp.act_fn, nn.SiLU) else mlp.act_fn

    def __call__(
        self, hidden_BH: Tensor, cos_B1D: Tensor, sin_B1D: Tensor, mask_B11L: Tensor | None, memory: Memory
    ) -> Tensor:
        batch, turned = hidden_BH.shape[0], self._num_queries + self._num_keys
        heads_BND = self._attend_in(self._before(hidden_BH)).view(batch, -1, self._head_dim)
        turned_BND = heads_BND[:, :turned]
        if self._query_norm is not None and self._key_norm is not None:
            queries_BND, keys_BND = torch.split(turned_BND, [self._num_queries, self._num_keys], dim=1)
            turned_BND = torch.cat([self._query_norm(queries_BND), self._key_norm(keys_BND)], dim=1)
        turned_BND = turned_BND * cos_B1D + turned_BND.roll(self._head_dim // 2, -1) * sin_B1D
        turned_BN1D = turned_BND.unsqueeze(2)
        keys_BNLD, values_BNLD = memory.update(
            turned_BN1D[:, self._num_queries :], heads_BND[:, turned:].unsqueeze(2)
        )
        attended_BN1D = functional.scaled_dot_product_attention(
            turned_BN1D[:, : self._num_queries],
            keys_BNLD,
            values_BNLD,
            attn_mask=mask_B11L,
            scale=self._scaling,
            enable_gqa=self._is_grouped,
        )
        hidden_BH = hidden_BH + self._attend_out(attended_BN1D.reshape(batch, -1))
        gate, up = self._mlp_in(self._after(hidden_BH)).chunk(2, dim=-1)
        return hidden_BH + self._mlp_out(self._activation(gate) * up)


class _Norm:
    """RMSNorm, in float32 inside."""

    def __init__(self, norm: Any) -> None:
        self._weight: Tensor = norm.weight
        self._epsilon = float(norm.variance_epsilon)

    def __call__(self, hidden: Tensor) -> Tensor:
        return functional.rms_norm(hidden, self._weight.shape, self._weight, self._epsilon)


def turns(body: Any, num_positions: int) -> Tensor:
    """Cosines and sines of rotary embedding, [positions, 2, D]: those of the lower half are negative, as it gets what the upper gives."""
    weight = body.embed_tokens.weight
    positions = torch.arange(num_positions, device=weight.device).unsqueeze(0)
    cos, sin = body.rotary_emb(weight, positions)
    # rotate_half(x) * sin = roll(x) * sin, with the sign of the lower half turned.
    lower, upper = sin[0].chunk(2, dim=-1)
    return torch.stack([cos[0], torch.cat([-lower, upper], dim=-1)], dim=1)


def plain_model(model: Any) -> Any:
    """A model without the adapters around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _side_by_side(modules: Sequence[Any], size: int) -> Project:
    """A function that applies linear layers of a model of `size` weights to one input and puts their outputs side by side."""
    weights = [weight_of(module) if size <= _MERGED_WEIGHTS else None for module in modules]
    copies = size <= MOST_COPIED
    each_alone = [
        module if own is None else _linear(*own, copies=copies)
        for module, own in zip(modules, weights, strict=True)
    ]
    if len(each_alone) == 1:
        return each_alone[0]
    found = [each for each in weights if each is not None]
    if len(found) < len(modules) or not copies:
        return lambda hidden: torch.cat([project(hidden) for project in each_alone], dim=-1)
    joined = torch.cat([weight for weight, _ in found])
    if all(bias is None for _, bias in found):
        return _linear(joined, None, copies=copies)
    biases = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in found]
    return _linear(joined, torch.cat(biases), copies=copies)


def _linear(weight: Tensor, bias: Tensor | None, *, copies: bool) -> Project:
    device = weight.device.type
    # Autocast remembers its copies of trained weights alone, and would make those of others, copies too, for every token.
    if torch.is_autocast_enabled(device) and (copies or not weight.requires_grad):
        dtype = torch.get_autocast_dtype(device)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    elif bias is None and uses_onednn(weight[:1], weight):
        return lambda hidden: by_onednn(hidden, weight)
    elif copies and device == "cpu":
        # A product of few rows takes up to a third of its time where the inputs' weights lie side by side.
        turned = weight.t().contiguous()
        if bias is None:
            return lambda hidden: torch.mm(hidden, turned)
        return lambda hidden: torch.addmm(bias, hidden, turned)
    return lambda hidden: functional.linear(hidden, weight, bias)


def weight_of(module: Any) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a linear layer, with its plain LoRA adapters added; None for any other."""
    if type(module) is nn.Linear:
        return module.weight, module.bias
    if type(module).__name__ != "Linear" or not type(module).__module__.startswith("peft.tuners.lora."):
        return None
    base, names = module.base_layer, [name for name in module.active_adapters if name in module.lora_A]
    is_plain = type(base) is nn.Linear and base.weight.dtype == torch.float32
    has_more = any(name in module.lora_variant or module.lora_bias[name] for name in names)
    if not is_plain or has_more or module.merged or module.disable_adapters:
        return None
    weight: Tensor = base.weight
    for name in names:
        weight = weight + module.get_delta_weight(name)
    return weight, base.bias
