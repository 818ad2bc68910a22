"""The arguments of a Megatron-LM training run as a GPTConfig, and back.

A run stores all its arguments, several hundred, most of which have to do with training. Read are those that shape the
model; of those that would ask for something that this model does not have, every one that Megatron-LM's legacy GPT
knows is refused unless it is off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flash_attn_models.errors import bad_argument
from flash_attn_models.gpt.config import GPTConfig
from flash_attn_models.gpt.hugging_face.config_fields import find_obstacles
from flash_attn_models.gpt.hugging_face.rope import share_of

# Argument to the values that are understood; the first one is what absence means.
_REQUIRED: dict[str, tuple[object, ...]] = {
    "apply_residual_connection_post_layernorm": (False, None),
    "apply_layernorm_1p": (False, None),
    "squared_relu": (False, None),
    "num_experts": (None, 1),
    "add_qkv_bias": (False, None),
    "qk_layernorm": (False, None),
    "num_shared_experts": (None,),
    "multi_latent_attention": (False, None),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "use_rope_scaling": (False, None),
    "rotary_scaling_factor": (None, 1.0),
    "pipeline_model_parallel_size": (1, None),
    "virtual_pipeline_model_parallel_size": (None, 1),
    "model_type": (None, "GPT"),
}
_NORMS = {"LayerNorm": "layer_norm", "RMSNorm": "rms_norm"}
_POSITIONS = {"learned_absolute": "learned", "rope": "rotary"}
_NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")


class Opaque:
    """Stands for an object of Megatron-LM's own classes, whose code is not loaded."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def config_from_args(args: Mapping[str, Any], *, padded_vocab_size: int) -> GPTConfig:
    """The GPTConfig of a run's arguments.

    Args:
        args: by name, as in ``vars(checkpoint["args"])``.
        padded_vocab_size: rows of the embedding. Those from ``vocab_size`` on, if a run knows it, are left out.

    Raises ValueError naming an argument that is missing, or that asks for what this model does not have.
    """
    for name in _NEEDED:
        if args.get(name) is None:
            raise _unsupported(name, "nothing", "a value")
    for name, understood in _REQUIRED.items():
        value = args.get(name, understood[0])
        if value not in understood and not isinstance(value, Opaque):
            raise _unsupported(name, repr(value), " or ".join(map(repr, understood)))
    vocab_size = args.get("vocab_size")
    if not isinstance(vocab_size, int) or not 0 < vocab_size <= padded_vocab_size:
        vocab_size = padded_vocab_size
    position = _choice(args, "position_embedding_type", _POSITIONS, "learned_absolute")
    if args.get("use_rotary_position_embeddings"):
        position = "rotary"
    dropout = args.get("hidden_dropout", 0.1)
    biases = bool(args.get("add_bias_linear", True))
    grouped = bool(args.get("group_query_attention"))
    heads, width = args["num_attention_heads"], args.get("kv_channels")
    rotary: dict[str, Any] = {}
    if position == "rotary":
        head_dim = args["hidden_size"] // heads if width is None else width
        rotary = {
            "rotary_base": float(args.get("rotary_base") or 10000.0),
            "rotary_dim": int(head_dim * args.get("rotary_percent", 1.0)),
            "rotary_interleaved": bool(args.get("rotary_interleaved", False)),
        }
    window = args.get("window_size")
    return GPTConfig(
        vocab_size=vocab_size,
        max_seqlen=args["max_position_embeddings"],
        n_layer=args["num_layers"],
        n_head=heads,
        n_head_kv=args.get("num_query_groups") if grouped else None,
        d_head=width,
        d_model=args["hidden_size"],
        d_inner=args.get("ffn_hidden_size") or 4 * args["hidden_size"],
        activation=_activation(args),
        norm=_choice(args, "normalization", _NORMS, "LayerNorm"),
        norm_eps=args.get("norm_epsilon", args.get("layernorm_epsilon", 1e-5)),
        position=position,
        **rotary,
        window=None if window is None else _window(window),
        qkv_bias=biases,
        out_bias=biases,
        mlp_bias=biases,
        tie_embeddings=not args.get("untie_embeddings_and_output_weights", False),
        dropout=dropout,
        attn_dropout=args.get("attention_dropout", 0.1),
        initializer_range=args.get("init_method_std", 0.02),
    )


def config_to_args(config: GPTConfig) -> dict[str, Any]:
    """The arguments of a run that trains this model.

    Raises ValueError naming the fields of a config that Megatron-LM's GPT cannot express.
    """
    obstacles = find_obstacles(
        config,
        fixed={"head_bias": False},
        free={
            *("activation", "norm", "n_head_kv", "d_head", "tie_embeddings", "window"),
            *(
                "position",
                "rotary_base",
                "rotary_dim",
                "rotary_interleaved",
                "qkv_bias",
                "out_bias",
                "mlp_bias",
            ),
        },
        checks={
            "activation": (config.activation != "relu", "a GELU or 'swiglu'"),
            "position": (config.position in _POSITIONS.values(), "'learned' or 'rotary'"),
            "mlp_bias": (
                config.mlp_bias == config.out_bias == config.qkv_bias,
                "the same as qkv_bias and out_bias",
            ),
        },
    )
    if obstacles:
        raise bad_argument(
            "config",
            ", ".join(f"{name}={getattr(config, name)!r}" for name in obstacles),
            "what Megatron-LM's GPT has: "
            + ", ".join(f"{name} {expected}" for name, expected in obstacles.items()),
            "keep this model with save_pretrained",
        )
    args: dict[str, Any] = {
        "num_layers": config.n_layer,
        "hidden_size": config.d_model,
        "num_attention_heads": config.n_head,
        "kv_channels": config.head_dim,
        "ffn_hidden_size": config.inner_dim,
        "max_position_embeddings": config.max_seqlen,
        "seq_length": config.max_seqlen,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": config.vocab_size,
        "group_query_attention": config.num_heads_kv != config.n_head,
        "num_query_groups": config.num_heads_kv,
        "swiglu": config.activation == "swiglu",
        "bias_gelu_fusion": config.activation == "gelu_tanh" and config.mlp_bias,
        "openai_gelu": config.activation == "gelu_tanh" and not config.mlp_bias,
        "normalization": {ours: theirs for theirs, ours in _NORMS.items()}[config.norm],
        "layernorm_epsilon": config.norm_eps,
        "norm_epsilon": config.norm_eps,
        "position_embedding_type": {ours: theirs for theirs, ours in _POSITIONS.items()}[config.position],
        "add_position_embedding": config.position == "learned",
        "use_rotary_position_embeddings": config.position == "rotary",
        "add_bias_linear": config.mlp_bias,
        "untie_embeddings_and_output_weights": not config.tie_embeddings,
        "hidden_dropout": config.dropout,
        "attention_dropout": config.attn_dropout,
        "init_method_std": config.initializer_range,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }
    if config.window is not None:
        args["window_size"] = (config.window - 1, 0)
    if config.position == "rotary":
        args |= {
            "rotary_base": config.rotary_base,
            "rotary_percent": share_of(config),
            "rotary_interleaved": config.rotary_interleaved,
        }
    return args


def _activation(args: Mapping[str, Any]) -> str:
    if args.get("swiglu"):
        return "swiglu"
    # The fused kernel of bias and GELU computes the tanh approximation, torch's function the exact one.
    fused = args.get("bias_gelu_fusion", True) and args.get("add_bias_linear", True)
    return "gelu_tanh" if fused or args.get("openai_gelu") else "gelu"


def _choice(args: Mapping[str, Any], name: str, names: Mapping[str, str], default: str) -> str:
    value = args.get(name) or default
    if value not in names:
        raise _unsupported(name, repr(value), " or ".join(map(repr, names)))
    return names[value]


def _window(size: object) -> int:
    """Megatron-LM counts the keys before a token, and both sides."""
    if not isinstance(size, (tuple, list)) or len(size) != 2 or not isinstance(size[0], int) or size[1] != 0:
        raise _unsupported("window_size", repr(size), "(keys before a token, 0)")
    return size[0] + 1


def _unsupported(name: str, got: str, expected: str) -> ValueError:
    return bad_argument(f"Megatron-LM argument {name!r}", got, expected, "use a checkpoint of such a run")
