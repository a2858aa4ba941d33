"""A checkpoint becomes a Hugging Face folder, and a LLaMA folder becomes a checkpoint.

    python convert_to_llama.py --ckpt runs/lm/ckpt_best.pt --out hf
    python convert_to_llama.py --reverse some_llama_folder --out imported.pt

The folder holds model.safetensors, config.json, generation_config.json, tokenizer.model,
tokenizer.json and tokenizer_config.json (BOS on, chat template). transformers, vLLM, llama.cpp and
their like read it; AutoTokenizer needs neither protobuf nor sentencepiece for it. Where
transformers is installed, the folder is loaded and compared with the checkpoint before it gets its
name. A conversion that is interrupted or fails leaves no folder.

The tokens are SentencePiece's own, with one difference that every AutoTokenizer has: text that
spells a control symbol (`<|user|>`, `</s>`) becomes that symbol, for only so can a chat template
write one, whereas this program never lets text become a symbol. For text of strangers use
`tokenizer(text, split_special_tokens=True)`, which gives this program's ids, and, in recent
versions of transformers, `tokenizer.apply_chat_template(..., sanitize_control_tokens=True)`.
"""

import base64
import contextlib
import dataclasses
import importlib
import json
import math
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import standalone_transformer_lm as lm

# ==================================================================================================
# SentencePiece: a tokenizer.model read without protobuf
# ==================================================================================================

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of a piece
BPE_MODEL = 2  # TrainerSpec.model_type


class Piece(NamedTuple):
    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class PieceModel:
    """What a tokenizer.model says. Fields not written in it have SentencePiece's defaults."""

    pieces: list[Piece]
    model_type: int
    byte_fallback: bool
    space_as_suffix: bool
    charsmap: bytes
    dummy_prefix: bool
    strip_spaces: bool
    escape_spaces: bool

    def of_kind(self, *kinds: int) -> list[tuple[int, str]]:
        """(id, text) of every piece that is of one of `kinds`."""
        return [(i, p.text) for i, p in enumerate(self.pieces) if p.kind in kinds]


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at` in base 128, lowest digit first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def read_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of a protobuf message: an int for a varint, else raw bytes."""
    at = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        wire_type = tag & 7
        if wire_type == 0:
            value, at = read_varint(data, at)
        else:
            size, at = read_varint(data, at) if wire_type == 2 else ({1: 8, 5: 4}[wire_type], at)
            value, at = data[at : at + size], at + size
        yield tag >> 3, value


def read_piece(data: bytes) -> Piece:
    field = dict(read_fields(data))
    score = struct.unpack("<f", field.get(2, bytes(4)))[0]
    return Piece(field[1].decode(), score, field.get(3, NORMAL))


def read_piece_model(data: bytes) -> PieceModel:
    """Parse `data`, a tokenizer.model that SentencePiece itself has accepted."""
    pieces, trainer, normalizer = [], {}, {}
    for number, value in read_fields(data):
        if number == 1:
            pieces.append(read_piece(value))
        elif number == 2:
            trainer = dict(read_fields(value))
        elif number == 3:
            normalizer = dict(read_fields(value))
    return PieceModel(
        pieces=pieces,
        model_type=trainer.get(3, 1),
        byte_fallback=bool(trainer.get(35, 0)),
        space_as_suffix=bool(trainer.get(24, 0)),
        charsmap=normalizer.get(2, b""),
        dummy_prefix=bool(normalizer.get(3, 1)),
        strip_spaces=bool(normalizer.get(4, 1)),
        escape_spaces=bool(normalizer.get(5, 1)),
    )


# ==================================================================================================
# Tokenizer: the same tokenizer as tokenizer.json
# ==================================================================================================


def last_merge(piece: str, rank: dict[str, float]) -> tuple[str, str] | None:
    """The pair that SentencePiece joins last to make `piece`, None if it never makes it.

    Of all neighbours whose union is a piece it joins the best-ranked, the leftmost of equals.
    """
    parts = list(piece)
    while True:
        unions = [left + right for left, right in zip(parts, parts[1:], strict=False)]
        ranked = [(rank[union], at) for at, union in enumerate(unions) if union in rank]
        if not ranked:
            return None
        at = min(ranked)[1]
        if len(parts) == 2:
            return parts[0], parts[1]
        parts[at : at + 2] = [unions[at]]


def merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """The pairs that make Hugging Face's BPE equal to SentencePiece's, the first to join first.

    SentencePiece ranks a union by its score, Hugging Face each pair by its place in this list. One
    pair a piece is enough: what happens inside a stretch of text that ends as one piece depends on
    nothing outside it (a join across its edge would end it), so a piece is made by the same last
    pair wherever it is made. Pairs that SentencePiece never joins are left out, and the order of
    two pairs with one union cannot matter. Two pieces of equal score would be ambiguous.
    """
    rank = {p.text: -p.score for p in pieces if p.kind == NORMAL}
    longer = sorted((text for text in rank if len(text) > 1), key=rank.__getitem__)
    return [pair for text in longer if (pair := last_merge(text, rank))]


def tied_scores(model: PieceModel) -> int:
    """How many pieces of two or more characters share their score with another such piece."""
    scores = [p.score for p in model.pieces if p.kind == NORMAL and len(p.text) > 1]
    return len(scores) - len(set(scores))


def refuse_tokenizer(model: PieceModel) -> None:
    """Raise UserError for a SentencePiece model that tokenizer.json has no words for."""
    faults = []
    if model.model_type != BPE_MODEL:
        faults.append("it is not a BPE model")
    if model.space_as_suffix:
        faults.append("it puts the space at the end of words (treat_whitespace_as_suffix)")
    if not model.escape_spaces:
        faults.append("it keeps the space as it is (escape_whitespaces=false)")
    if model.of_kind(UNUSED):
        faults.append("it has unused pieces")
    if faults:
        what = f"this tokenizer cannot become a tokenizer.json: {'; '.join(faults)}"
        raise lm.UserError(what, "train one with `prep`, or use a LLaMA tokenizer")


def replace_step(pattern: dict[str, str], content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def normalizer(model: PieceModel) -> dict:
    """Text → SentencePiece's normalised text, for each stretch between two control symbols.

    SentencePiece's own clean-up, where a model asks for it, knows only the plain space.
    """
    steps = []
    if model.charsmap:
        charsmap = base64.b64encode(model.charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.strip_spaces:
        steps.append(replace_step({"Regex": r"\A +"}, ""))
        steps.append(replace_step({"Regex": " {2,}"}, " "))
        steps.append(replace_step({"Regex": rf"[ {lm.SPACE}]+\z"}, ""))
    if model.dummy_prefix:
        steps.append({"type": "Prepend", "prepend": lm.SPACE})
    steps.append(replace_step({"String": " "}, lm.SPACE))
    return {"type": "Sequence", "normalizers": steps}


def user_symbol_splitter(model: PieceModel) -> dict | None:
    """The step that cuts out user-defined symbols, which SentencePiece joins to nothing.

    They are whole words to BPE then, so `ignore_merges` must find them. It finds as well, wrongly,
    the name of a byte (`<0x41>`) that stands alone between two of them.
    """
    symbols = sorted((text for _, text in model.of_kind(USER_DEFINED)), key=len, reverse=True)
    if not symbols:
        return None
    pattern = {"Regex": "|".join(map(re.escape, symbols))}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def decoder(model: PieceModel) -> dict:
    """Tokens → text: spaces, bytes, and without the prefix that encoding put in front."""
    steps = [replace_step({"String": lm.SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if model.dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def bos_first(token: str, token_id: int) -> dict:
    """The post-processor that puts `token` before each text of one or of a pair."""
    bos = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, bos, second],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def added_token(token_id: int, text: str) -> dict:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": text, **plain, "special": True}


def tokenizer_json(model: PieceModel, bos_id: int) -> dict:
    """The contents of tokenizer.json. Raises UserError where `model` cannot be written so."""
    refuse_tokenizer(model)
    unknown = model.of_kind(UNKNOWN)
    # With byte fallback nothing is unknown, and text that spells <unk> (WikiText) stays text.
    marked = (CONTROL,) if model.byte_fallback else (UNKNOWN, CONTROL)
    splitter = user_symbol_splitter(model)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(*piece) for piece in model.of_kind(*marked)],
        "normalizer": normalizer(model),
        "pre_tokenizer": splitter,
        "post_processor": bos_first(model.pieces[bos_id].text, bos_id) if bos_id >= 0 else None,
        "decoder": decoder(model),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown[0][1] if unknown else None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.byte_fallback,
            "ignore_merges": splitter is not None,
            "vocab": {piece.text: i for i, piece in enumerate(model.pieces)},
            "merges": merges(model.pieces),
        },
    }


# ==================================================================================================
# Families: which published architecture holds which model, and under which names
# ==================================================================================================


MLP_LAYER = {
    "mlp.w1.weight": ("mlp.gate_proj.weight",),
    "mlp.w2.weight": ("mlp.up_proj.weight",),
    "mlp.w3.weight": ("mlp.down_proj.weight",),
}
ATTENTION_LAYER = {
    "norm1.weight": ("input_layernorm.weight",),
    "attn.qkv.weight": tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
    "attn.proj.weight": ("self_attn.o_proj.weight",),
    "norm2.weight": ("post_attention_layernorm.weight",),
}
QK_NORM = {
    "attn.q_norm.weight": ("self_attn.q_norm.weight",),
    "attn.k_norm.weight": ("self_attn.k_norm.weight",),
}
NEEDS = """model_type vocab_size hidden_size intermediate_size num_hidden_layers
num_attention_heads""".split()
ONLY = {  # config key: the one value that our model computes, whatever the family
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
SCALINGS = {"default": "none", "linear": "linear", "yarn": "yarn"}
ODD_SCALING = {"beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"}


def is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31


def is_number(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def is_list(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(type(part) is kind for part in value)


FORMS = (  # (what a value must be, its test, the keys of config.json that must be so)
    (
        "a positive whole number",
        is_count,
        """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
        num_key_value_heads head_dim max_position_embeddings num_local_experts num_experts
        num_experts_per_tok moe_intermediate_size original_max_position_embeddings""",
    ),
    ("a positive number", is_number, "rms_norm_eps rope_theta factor"),
    (
        "true or false",
        lambda value: type(value) is bool,
        "tie_word_embeddings use_sliding_window norm_topk_prob",
    ),
    ("a number of tokens", lambda value: value == 0 or is_count(value), "sliding_window"),
    ("text", lambda value: isinstance(value, str), "model_type rope_type type"),
    ("a list of text", is_list(str), "layer_types"),
    ("a list of whole numbers", is_list(int), "no_rope_layers mlp_only_layers"),
    ("an object", lambda value: isinstance(value, dict), "rope_parameters rope_scaling"),
)


def wrong_values(config: dict) -> list[str]:
    """What config.json says that cannot be meant; a key that is null is as good as absent."""
    faults = []
    for form, fits, keys in FORMS:
        for key in keys.split():
            value = config.get(key)
            if value is not None and not fits(value):
                faults.append(f"{key} is {value!r:.40}, not {form}")
    return faults


def refuse_config(faults: list[str]) -> None:
    if faults:
        raise lm.UserError(
            f"config.json describes a model that is not ours: {'; '.join(faults)}",
            "give the folder of a model without these",
        )


def rope_of(config: dict) -> dict:
    """What config.json says of the rotary embedding, in the spelling of transformers 4 or 5."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "rope_type" not in rope:
        rope = {**rope, "rope_type": rope.get("type", "default")}
    return rope


def unknown_scaling(rope: dict) -> list[str]:
    odd = sorted(ODD_SCALING & set(rope))
    if odd:
        return [f"rope_scaling is of type {rope['rope_type']!r} with {odd}"]
    if rope["rope_type"] not in [*SCALINGS]:  # it may be a list
        return [f"rope_scaling is of type {rope['rope_type']!r}"]
    return []


@dataclass(frozen=True)
class Family:
    """A row of the table: one architecture of transformers.

    `requires` and `allows` name the settings beyond a plain LLaMA that its models always and may
    have. `layer` maps our keys of a layer to theirs: several of theirs are ours stacked by rows
    (q, k, v), and a name with {} is one for each expert. `config` makes the keys of config.json
    that LLaMA lacks, `settings` the reverse; `only` are the values that we can read, and `needs`
    the keys that must be there besides those of a LLaMA.
    """

    architecture: str
    model_type: str
    requires: frozenset[str]
    allows: frozenset[str]
    layer: dict[str, tuple[str, ...]]
    config: Callable[[lm.ModelSettings], dict]
    settings: Callable[[dict], dict]
    only: dict[str, object] = dataclasses.field(default_factory=dict)
    needs: tuple[str, ...] = ()

    def names(self, model: lm.ModelSettings) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(our key, their keys) of every weight."""
        yield "tok_emb.weight", ("model.embed_tokens.weight",)
        for i in range(model.n_layer):
            for ours, theirs in self.layer.items():
                if "{}" in theirs[0]:
                    theirs = tuple(theirs[0].format(e) for e in range(model.n_expert))
                yield f"blocks.{i}.{ours}", tuple(f"model.layers.{i}.{name}" for name in theirs)
        yield "norm.weight", ("model.norm.weight",)
        if not model.tie:
            yield "lm_head.weight", ("lm_head.weight",)


def expert_layer(router: str, *names: str) -> dict[str, tuple[str, ...]]:
    """The names of a mixture: its router, and gate, up and down of each expert."""
    ours = ("mlp.w1", "mlp.w2", "mlp.w3")
    return {"mlp.router.weight": (router,), **{k: (n,) for k, n in zip(ours, names, strict=True)}}


def rope_config(model: lm.ModelSettings) -> dict:
    """The rotary keys, for transformers 4 and 5."""
    scaled = {"rope_type": "default"}
    if model.rope_scaling != "none":
        original = model.rope_original or round(model.seq_len / model.rope_factor)
        scaled = {
            "rope_type": model.rope_scaling,
            "factor": model.rope_factor,
            "original_max_position_embeddings": original,
        }
    keys = {
        "rope_theta": model.rope_theta,
        "rope_parameters": {**scaled, "rope_theta": model.rope_theta},
    }
    return keys if model.rope_scaling == "none" else {**keys, "rope_scaling": scaled}


def common_config(model: lm.ModelSettings) -> dict:
    """The keys of config.json that all families share."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.ffn_width,
        "num_hidden_layers": model.n_layer,
        "num_attention_heads": model.n_head,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": model.seq_len,
        "rms_norm_eps": model.norm_eps,
        **rope_config(model),
        "tie_word_embeddings": model.tie,
        "attention_bias": False,
        "mlp_bias": False,
    }


def common_settings(config: dict, family: Family) -> dict:
    """Our settings for a config.json. Raises UserError with all that they cannot say."""
    refuse_config(wrong_values(config))
    rope = rope_of(config)
    faults = wrong_values(rope)
    for key, wanted in {**ONLY, **family.only}.items():
        if config.get(key) not in (None, wanted):
            faults.append(f"{key} is {config[key]!r:.40}, not {wanted!r}")
    faults += unknown_scaling(rope)
    faults += [f"{key} is missing" for key in (*NEEDS, *family.needs) if not config.get(key)]
    refuse_config(faults)
    heads = config["num_attention_heads"]
    return {
        "vocab_size": config["vocab_size"],
        "d_model": config["hidden_size"],
        "ffn_hidden": config["intermediate_size"],
        "n_layer": config["num_hidden_layers"],
        "n_head": heads,
        "n_kv_head": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "seq_len": config.get("max_position_embeddings") or 2048,
        "norm_eps": float(config.get("rms_norm_eps") or 1e-6),
        "rope_theta": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        "rope_scaling": SCALINGS[rope["rope_type"]],
        "rope_factor": float(rope.get("factor") or 1.0),
        "rope_original": int(rope.get("original_max_position_embeddings") or 0),
        "tie": bool(config.get("tie_word_embeddings")),
    }


def nothing(_: object) -> dict:
    return {}


def window_config(model: lm.ModelSettings) -> dict:
    return {"sliding_window": model.window or None}


def window_settings(config: dict) -> dict:
    return {"window": config.get("sliding_window") or 0}


def layer_kinds(model: lm.ModelSettings, n_layer: int) -> list[str]:
    """transformers' name for the attention of each layer."""
    kinds = {True: "sliding_attention", False: "full_attention"}
    return [kinds[model.windowed(i)] for i in range(n_layer)]


def qwen3_config(model: lm.ModelSettings) -> dict:
    return {
        "use_sliding_window": bool(model.window),
        "sliding_window": model.window or None,
        "layer_types": layer_kinds(model, model.n_layer),
    }


def qwen3_settings(config: dict) -> dict:
    kinds = config.get("layer_types") or []
    window = every = 0
    if config.get("use_sliding_window"):
        window = config.get("sliding_window") or 0
    if window and "full_attention" in kinds:
        every = kinds.index("full_attention") + 1
    model = {"qk_norm": True, "window": window, "full_every": every}
    if kinds and kinds != layer_kinds(lm.ModelSettings(**model), len(kinds)):
        raise lm.UserError(
            "layer_types of config.json is no pattern that this program has",
            "give a model in which every n-th layer has full attention",
        )
    return model


def smollm3_config(model: lm.ModelSettings) -> dict:
    return {
        "no_rope_layers": [int(model.rotates(i)) for i in range(model.n_layer)],
        "no_rope_layer_interval": model.nope_every,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": ["full_attention"] * model.n_layer,
    }


def smollm3_settings(config: dict) -> dict:
    rotates = config.get("no_rope_layers") or []
    every = 0
    if 0 in rotates:
        every = rotates.index(0) + 1
    model = lm.ModelSettings(nope_every=every)
    if rotates != [int(model.rotates(i)) for i in range(config["num_hidden_layers"])]:
        raise lm.UserError(
            "no_rope_layers of config.json is no pattern that this program has",
            "give a model in which every n-th layer is without RoPE",
        )
    return {"nope_every": every}


def mixtral_config(model: lm.ModelSettings) -> dict:
    return {
        "num_local_experts": model.n_expert,
        "num_experts_per_tok": model.n_expert_active,
        "router_aux_loss_coef": model.balance_loss,
        **window_config(model),
    }


def mixtral_settings(config: dict) -> dict:
    return {
        "n_expert": config["num_local_experts"],
        "n_expert_active": config["num_experts_per_tok"],
        **window_settings(config),
    }


def qwen3_moe_config(model: lm.ModelSettings) -> dict:
    return {
        "num_experts": model.n_expert,
        "num_experts_per_tok": model.n_expert_active,
        "moe_intermediate_size": model.ffn_width,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
        "router_aux_loss_coef": model.balance_loss,
    }


def qwen3_moe_settings(config: dict) -> dict:
    if not config.get("norm_topk_prob") or config.get("mlp_only_layers"):
        raise lm.UserError(
            "norm_topk_prob is off or mlp_only_layers is set, which ours are not",
            "give the folder of a model without these",
        )
    return {
        "qk_norm": True,
        "n_expert": config["num_experts"],
        "n_expert_active": config["num_experts_per_tok"],
        "ffn_hidden": config["moe_intermediate_size"],
    }


LLAMA = {**ATTENTION_LAYER, **MLP_LAYER}
EXPERTS = frozenset({"n_expert", "n_expert_active"})
FAMILIES = (
    Family(
        "LlamaForCausalLM",
        "llama",
        frozenset(),
        frozenset(),
        LLAMA,
        nothing,
        nothing,
        {"sliding_window": None},
    ),
    Family(
        "Qwen3ForCausalLM",
        "qwen3",
        frozenset({"qk_norm"}),
        frozenset({"window", "full_every"}),
        {**LLAMA, **QK_NORM},
        qwen3_config,
        qwen3_settings,
    ),
    Family(
        "SmolLM3ForCausalLM",
        "smollm3",
        frozenset({"nope_every"}),
        frozenset(),
        LLAMA,
        smollm3_config,
        smollm3_settings,
        {"use_sliding_window": False},
    ),
    Family(
        "MistralForCausalLM",
        "mistral",
        frozenset({"window"}),
        frozenset(),
        LLAMA,
        window_config,
        window_settings,
    ),
    Family(
        "MixtralForCausalLM",
        "mixtral",
        frozenset({"n_expert"}),
        EXPERTS | {"window"},
        {
            **ATTENTION_LAYER,
            **expert_layer(
                "block_sparse_moe.gate.weight",
                "block_sparse_moe.experts.{}.w1.weight",
                "block_sparse_moe.experts.{}.w3.weight",
                "block_sparse_moe.experts.{}.w2.weight",
            ),
        },
        mixtral_config,
        mixtral_settings,
        needs=("num_local_experts", "num_experts_per_tok"),
    ),
    Family(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        frozenset({"n_expert", "qk_norm"}),
        EXPERTS,
        {
            **ATTENTION_LAYER,
            **QK_NORM,
            **expert_layer(
                "mlp.gate.weight",
                "mlp.experts.{}.gate_proj.weight",
                "mlp.experts.{}.up_proj.weight",
                "mlp.experts.{}.down_proj.weight",
            ),
        },
        qwen3_moe_config,
        qwen3_moe_settings,
        {"use_sliding_window": False, "decoder_sparse_step": 1},
        needs=("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    ),
)
PLAIN = frozenset(
    """seq_len n_layer d_model n_head n_kv_head head_dim ffn_mult ffn_hidden dropout tie rope_theta
    norm_eps vocab_size rope_layout rope_scaling rope_factor rope_original bos_id doc_mask
    trunc_init balance_loss router_z_loss""".split()
)  # the settings that every family can hold, or that do not outlive training


def family_of(model: lm.ModelSettings) -> Family:
    """The first family that holds `model`. Raises UserError with the flags that none holds."""
    used = {f.name for f in fields(model) if getattr(model, f.name) != f.default} - PLAIN
    used -= EXPERTS if not model.n_expert else frozenset()
    for family in FAMILIES:
        if family.requires <= used <= family.requires | family.allows:
            return family
    flags = ", ".join(f"--{name}" for name in sorted(used))
    known = ", ".join(family.architecture for family in FAMILIES)
    raise lm.UserError(
        f"no architecture that this converter knows ({known}) has {flags}",
        "keep this model in the program's own format, or train one without",
    )


def folded(
    weights: dict[str, Tensor],
    model: lm.ModelSettings,
) -> tuple[dict[str, Tensor], lm.ModelSettings]:
    """The same function without embed_scale: the scale goes into an input embedding of its own."""
    if not model.embed_scale:
        return weights, model
    scaled = weights["tok_emb.weight"] * math.sqrt(model.d_model)
    return (
        {**weights, "tok_emb.weight": scaled},
        dataclasses.replace(model, embed_scale=False, tie=False),
    )


def to_family(weights: dict[str, Tensor], model: lm.ModelSettings, family: Family) -> dict:
    """Our weights under the family's names; no two of them share memory."""
    heads = [n * model.head_size for n in (model.n_head, model.kv_heads, model.kv_heads)]
    renamed = {}
    for ours, theirs in family.names(model):
        weight = weights[ours]
        parts = [weight]
        if weight.dim() == 3:  # (E, in, out), of which each expert is a linear map of its own
            parts = [expert.T.contiguous() for expert in weight]
        elif len(theirs) == 3:
            parts = [part.clone() for part in weight.split(heads)]
        renamed |= zip(theirs, parts, strict=True)
    return renamed


def check_names(weights: dict[str, Tensor], wanted: set[str], tie: bool) -> None:
    """Raise UserError for weights that are missing or left over."""
    spare = {name for name in weights if name.endswith("rotary_emb.inv_freq")}
    if tie:
        spare.add("lm_head.weight")
    faults = [f"it lacks {name}" for name in sorted(wanted - set(weights))]
    faults += [f"it has {name}" for name in sorted(set(weights) - wanted - spare)]
    if len(faults) > 3:
        faults[3:] = [f"and {len(faults) - 3} more"]
    if faults:
        raise lm.UserError(
            f"the weights are not those of its config.json: {'; '.join(faults)}",
            "download the folder again, or name another",
        )


def from_family(weights: dict[str, Tensor], model: lm.ModelSettings, family: Family) -> dict:
    """The reverse, in fp32. Raises UserError for weights that are not the config's."""
    layers = {name.split(".")[2] for name in weights if name.startswith("model.layers.")}
    if model.n_layer > len(layers) + 1:
        raise lm.UserError(
            f"config.json says num_hidden_layers {model.n_layer}, the weights have {len(layers)}",
            "download the folder again, or name another",
        )
    names = dict(family.names(model))
    check_names(weights, {name for theirs in names.values() for name in theirs}, model.tie)
    ours = {}
    try:
        for name, theirs in names.items():
            parts = [weights[part].float() for part in theirs]
            if name.endswith(("mlp.w1", "mlp.w2", "mlp.w3")):  # a tensor (E, in, out) of experts
                ours[name] = torch.stack([part.T for part in parts])
            else:
                ours[name] = torch.cat(parts)
    except RuntimeError as fault:
        raise lm.UserError(
            f"the weights do not fit together in {name} ({fault})",
            "download the folder again, or name another",
        ) from fault
    return {**ours, "lm_head.weight": ours.get("lm_head.weight", ours["tok_emb.weight"])}


# ==================================================================================================
# Folder: everything that transformers reads, whole or not at all
# ==================================================================================================

FOLDER_FILES = frozenset(
    """config.json generation_config.json model.safetensors pytorch_model.bin tokenizer.model
    tokenizer.json tokenizer_config.json""".split()
)
CALL_TEMPLATE = (
    "{% for call in message['tool_calls'] or [] %}{% set function = call['function'] or call %}"
    f"{{{{ '{lm.TOOL_CALL}' }}}}"
    "{{ '{\"name\": ' + (function['name'] | tojson) + ', \"arguments\": ' }}"
    "{% if function['arguments'] is string %}{{ function['arguments'] }}"
    "{% else %}{{ function['arguments'] | tojson }}{% endif %}{{ '}' }}{% endfor %}"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    f"{{% if message['role'] not in {[*lm.ROLES, 'tool']} %}}"
    "{{ raise_exception('there is no role ' + message['role']) }}{% endif %}"
    f"{{% if message['role'] == 'tool' %}}{{{{ '{lm.TOOL_RESULT}' }}}}"
    "{% else %}{{ '<|' + message['role'] + '|>' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] or '' }}"
    + CALL_TEMPLATE
    + "{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ (message['content'] or '') + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A hidden folder to fill, which gets the name `target` when the block ends without a fault.

    An earlier conversion at `target` is replaced. Raises UserError for a folder with other files.
    """
    target = target.resolve()
    if target.exists() and not (target.is_dir() and set(os.listdir(target)) <= FOLDER_FILES):
        raise lm.UserError(f"{target} holds other things than a conversion", "name another --out")
    work = target.with_name(f".{target.name}.{os.getpid()}.part")
    aside = work.with_suffix(".old")
    work.mkdir(parents=True)
    try:
        yield work
        flush_folder(work)
        if target.exists():
            os.replace(target, aside)
        os.replace(work, target)
        lm.fsync_folder(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    """Make the files of a folder survive a power cut."""
    for path in folder.iterdir():
        with open(path, "r+b") as file:
            os.fsync(file.fileno())
    lm.fsync_folder(folder)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def special_names(tokenizer: lm.Tokenizer, pieces: PieceModel) -> dict[str, str]:
    """The names of the special tokens that this tokenizer has, under transformers' keys."""
    ids = {"bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.pad}
    if not pieces.byte_fallback:
        ids["unk"] = tokenizer.sp.unk_id()
    return {f"{key}_token": tokenizer.sp.id_to_piece(i) for key, i in ids.items() if i >= 0}


def write_tokenizer(folder: Path, tokenizer: lm.Tokenizer, seq_len: int) -> None:
    """tokenizer.model, tokenizer.json and tokenizer_config.json."""
    pieces = read_piece_model(tokenizer.data)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the one that takes tokenizer.json as it is
        "add_bos_token": True,
        "add_eos_token": False,
        **special_names(tokenizer, pieces),
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if tokenizer.roles:
        config["chat_template"] = CHAT_TEMPLATE
    if tied := tied_scores(pieces):
        lm.say(
            f"note: {tied} pieces of the tokenizer share a score; where two of them compete, "
            "tokenizer.json may join another one than SentencePiece"
        )
    write_json(folder / "tokenizer.json", tokenizer_json(pieces, tokenizer.bos))
    write_json(folder / "tokenizer_config.json", config)
    (folder / "tokenizer.model").write_bytes(tokenizer.data)


def write_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    """model.safetensors; pytorch_model.bin where safetensors is not installed."""
    if find_spec("safetensors") is None:
        lm.say("note: safetensors is not installed, so the weights are in pytorch_model.bin")
        lm.save_checkpoint(folder / "pytorch_model.bin", weights)
        return
    safetensors = lm.need("safetensors")
    try:
        save_file = lm.need("safetensors.torch").save_file
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / "model.safetensors")  # it wrote 0600
    except safetensors.SafetensorError as fault:  # of the disk: it has no other to tell here
        fix = "free some space, or name a folder elsewhere"
        raise lm.UserError(f"{folder}: {fault}", fix) from fault


def write_folder(
    folder: Path,
    weights: dict[str, Tensor],
    model: lm.ModelSettings,
    tokenizer: lm.Tokenizer,
) -> None:
    weights, model = folded(weights, model)
    family = family_of(model)
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    if tokenizer.pad >= 0:
        ids["pad_token_id"] = tokenizer.pad
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **common_config(model),
        **family.config(model),
        **ids,
        "torch_dtype": "float32",
    }
    write_tokenizer(folder, tokenizer, model.seq_len)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", ids)
    write_weights(folder, to_family(weights, model, family))


def indexed_files(folder: Path, index: Path) -> list[Path]:
    """The files that an index names, all in its own folder. Raises UserError for any other."""
    weight_map = lm.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise lm.UserError(f"{index} has no weight_map", "download the folder again")
    names = list(weight_map.values())
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise lm.UserError(
                f"{index} names {name!r}, which is no file of its folder",
                "use a folder from a source that you trust",
            )
    return [folder / name for name in sorted(set(names))]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a Hugging Face folder, from safetensors or .bin, one file or several."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        files = []
        if index.exists():
            files = indexed_files(folder, index)
        elif single.exists():
            files = [single]
        if files:
            return {name: w for path in files for name, w in read_tensors(path).items()}
    raise lm.UserError(
        f"{folder} has no weights",
        "it needs model.safetensors, pytorch_model.bin or an index of several such files",
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, no code run. Raises UserError where it is missing or damaged."""
    damage = lm.BROKEN
    try:
        if path.suffix == ".safetensors":
            damage = lm.need("safetensors").SafetensorError
            return lm.need("safetensors.torch").load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as fault:
        missing = lm.UserError(f"{path} cannot be read ({fault})", "download it again")
        raise lm.disk_error(fault, path) or missing from fault
    except damage as fault:
        raise lm.UserError(f"{path} is damaged", "download it again") from fault
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise lm.UserError(f"{path} is no dict of tensors", "download it again")
    return weights


# ==================================================================================================
# Verification: the folder against the checkpoint, through transformers
# ==================================================================================================


class MismatchError(RuntimeError):
    """The folder does not compute what the checkpoint does."""


LOGIT_TOLERANCE = 1e-4
ROUNDING = 3e-5  # of the largest logit: what fp32 itself loses in a deep model with large ones
POSITIONS = 256  # at most, in each text that is compared
NEW_TOKENS = 50  # generated and compared
SAMPLE_TEXTS = (
    "",
    " ",
    "The lighthouse keeper wrote 3,141 letters; nobody answered them.",
    "  Two spaces before,   three between, a tab\t, and at the end two  ",
    "def area(r):\n    return 3.14159 * r ** 2\n\n\n# ----====####",
    "aaaaaaaaaaaaaaaaaaaaaaaaa -------------- ............ hahahahaha 00000000",
    "Größe, naïve, Ελλάδα, Москва, 東京, नमस्ते, سلام, 👩‍👩‍👧 🙂 e\u0301 \ufb01",
    "\x00\x07\r\n\u00a0\u200b\ufeff\u2028",
)


def quiet_transformers():
    """transformers without its bars and warnings, or None where it is not installed."""
    if find_spec("transformers") is None:
        return None
    transformers = lm.need("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def sample_ids(model: lm.Transformer, tokenizer: lm.Tokenizer) -> list[Tensor]:
    """Random ids and the ids of real text, each (1, T)."""
    length = min(POSITIONS, model.config.seq_len)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(model.config.vocab_size, (1, length), generator=generator)
    text = [tokenizer.bos, *tokenizer.encode(" ".join(SAMPLE_TEXTS))][:length]
    return [noise, torch.tensor([text])]


@torch.no_grad()
def logit_gap(hf, model: lm.Transformer, tokenizer: lm.Tokenizer) -> float:
    """The largest difference between the logits of transformers' model and ours.

    Where logits are beyond 3 it is measured in their size, for there fp32 rounding is.
    """
    gaps = []
    for ids in sample_ids(model, tokenizer):
        ours = model(ids)
        scale = max(1.0, float(ours.abs().max()) * ROUNDING / LOGIT_TOLERANCE)
        gaps.append(float((hf(ids).logits - ours).abs().max()) / scale)
    return max(gaps)


@torch.no_grad()
def greedy_gap(hf, model: lm.Transformer, tokenizer: lm.Tokenizer) -> float:
    """How much less likely than its best token our model finds any of transformers' greedy ones.

    Zero where both choose the same, and next to it where two tokens are as good as equal. These
    tokens come through transformers' cache, so that one is held against our logits as well.
    """
    prompt = sample_ids(model, tokenizer)[1]
    prompt = prompt[:, : max(1, model.config.seq_len - NEW_TOKENS)]
    start, new = prompt.shape[1], min(NEW_TOKENS, model.config.seq_len - prompt.shape[1])
    ids = hf.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=new
    )
    logits = model(ids)[0, start - 1 : -1]  # (new, V)
    chosen = logits.gather(1, ids[0, start:, None]).squeeze(1)
    return float((logits.max(dim=1).values - chosen).max())


def compare_tokenizer(hf, tokenizer: lm.Tokenizer) -> None:
    """Raise MismatchError where AutoTokenizer and SentencePiece disagree on the sample texts."""
    for text in SAMPLE_TEXTS:
        ours = [tokenizer.bos, *tokenizer.encode(text)]
        if hf(text).input_ids != ours:
            raise MismatchError(
                f"the folder's tokenizer.json encodes {text!r} otherwise than tokenizer.model does"
            )


def verify(folder: Path, model: lm.Transformer, tokenizer: lm.Tokenizer, ours: bool) -> str:
    """One sentence on how `folder` compares with `model` and, if the folder is `ours`, its ids.

    Raises MismatchError where they differ.
    """
    transformers = quiet_transformers()
    if transformers is None:
        return "not verified, for transformers is not installed"
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    gap = logit_gap(hf, model, tokenizer)
    if gap > LOGIT_TOLERANCE or math.isnan(gap):
        raise MismatchError(f"the folder's logits differ by {gap:.2g} from the checkpoint's")
    greedy = greedy_gap(hf, model, tokenizer)
    if greedy > 2 * LOGIT_TOLERANCE or math.isnan(greedy):
        raise MismatchError("the folder's greedy continuation differs from the checkpoint's")
    same = "greedy tokens are the same"
    if ours:
        compare_tokenizer(transformers.AutoTokenizer.from_pretrained(folder), tokenizer)
        same = "greedy tokens and token ids are the same"
    return (
        f"verified with transformers {transformers.__version__}: logits agree to {gap:.1e}, {same}"
    )


def verify_import(folder: Path, model: lm.Transformer, tokenizer: lm.Tokenizer) -> str:
    """`verify` of a folder that others made. Raises UserError where transformers refuses it."""
    refusals = (*lm.BROKEN, OSError, ImportError)
    with contextlib.suppress(ImportError):  # transformers 5 checks a config with it
        refusals += (importlib.import_module("huggingface_hub.errors").StrictDataclassError,)
    try:
        return verify(folder, model, tokenizer, ours=False)
    except MismatchError:
        raise
    except refusals as fault:
        raise lm.UserError(
            f"transformers cannot load {folder}: {str(fault).strip().splitlines()[0]}",
            "mend its config.json, or download the folder again",
        ) from fault


# ==================================================================================================
# Front door: the two directions and main
# ==================================================================================================

EXAMPLE = "python convert_to_llama.py --ckpt runs/lm/ckpt_best.pt --out hf"


@dataclass
class ConvertSettings:
    """What to convert."""

    ckpt: str = lm.setting("", "checkpoint, or the folder of a run, to make a folder of")
    reverse: str = lm.setting("", "Hugging Face folder of a LLaMA to make a checkpoint of")
    base: str = lm.setting("", "of adapters in --ckpt, the checkpoint that they adapt, if moved")
    spm: str = lm.setting("", "tokenizer.model, where --ckpt or --reverse holds none")
    out: str = lm.setting("", "folder to write; with --reverse the checkpoint, CKPT.pt")
    rope_theta: float = lm.setting(
        0.0,
        "base of the rotary frequencies, for a checkpoint that tells a wrong one; 0 keeps it",
        least=0.0,
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        if not self.ckpt and not self.reverse:
            yield "--ckpt is missing", "name a checkpoint, --ckpt runs/lm/ckpt_best.pt"
        if self.ckpt and self.reverse:
            yield "--ckpt and --reverse are both given", "keep one of them"
        if self.reverse and self.rope_theta:
            yield "--rope_theta is for --ckpt alone", "drop it: config.json tells it"
        if self.reverse and self.base:
            yield "--base is for --ckpt alone", "drop it"
        if self.reverse and not self.out:
            yield "--out is missing", "name a file, --out imported.pt"
        elif not self.out:
            yield "--out is missing", "name a folder, --out hf"


def export(settings: ConvertSettings) -> None:
    """Checkpoint → folder."""
    saved = lm.load_checkpoint(settings.ckpt, settings.base)
    if settings.rope_theta:
        saved["config"]["rope_theta"] = settings.rope_theta
    tokenizer = lm.tokenizer_of(saved, settings.spm, settings.ckpt)
    model = lm.build_model(saved, torch.device("cpu"))
    with whole_folder(Path(settings.out)) as folder:
        write_folder(folder, model.state_dict(), model.config, tokenizer)
        result = verify(folder, model, tokenizer, ours=True)
    family = family_of(folded(model.state_dict(), model.config)[1])
    lm.say(f"{settings.out}: {family.architecture}, {result}")


def read_folder(folder: Path, spm: str) -> dict:
    """A checkpoint's dict from a Hugging Face folder. Raises UserError for one that is not ours."""
    if not (folder / "config.json").exists():
        raise lm.UserError(f"{folder} has no config.json", "name the folder of a LLaMA")
    config = lm.read_json(folder / "config.json")
    families = {family.model_type: family for family in FAMILIES}
    named = config.get("model_type")
    if not isinstance(named, str) or named not in families:
        raise lm.UserError(
            f"config.json describes a model that is not ours: model_type is {named!r}",
            f"give one of {', '.join(families)}",
        )
    family = families[named]
    model = lm.ModelSettings(**{**common_settings(config, family), **family.settings(config)})
    if faults := lm.check(model):
        refuse_config([fault for fault, _ in faults])
    if not spm and not (folder / "tokenizer.model").exists():
        raise lm.UserError(
            f"{folder} has no tokenizer.model",
            "only a model with a SentencePiece tokenizer can be imported; name it with --spm",
        )
    tokenizer = lm.load_tokenizer(spm or folder / "tokenizer.model")
    return {
        "format": lm.CHECKPOINT_FORMAT,
        "kind": "imported",
        "step": 0,
        "samples": 0,
        "best_val": math.inf,
        "model": from_family(read_weights(folder), model, family),
        "config": dataclasses.asdict(model),
        "tokenizer": tokenizer.data,
    }


def import_folder(settings: ConvertSettings) -> None:
    """Folder → checkpoint."""
    folder, out = Path(settings.reverse), Path(settings.out)
    if out.exists():
        raise lm.UserError(f"{out} exists already", "name another --out")
    saved = read_folder(folder, settings.spm)
    tokenizer = lm.tokenizer_of(saved, "", folder)
    try:
        model = lm.build_model(saved, torch.device("cpu"))
    except RuntimeError as fault:
        raise lm.UserError(
            f"the weights in {folder} have other shapes than its config.json says "
            f"({str(fault).splitlines()[-1].strip()})",
            "download the folder again, or name another",
        ) from fault
    result = verify_import(folder, model, tokenizer)
    lm.save_checkpoint(out, saved)
    lm.say(f"{out}: {result}")


def convert(settings: ConvertSettings) -> int:
    (import_folder if settings.reverse else export)(settings)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The converter; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    about, example = "a checkpoint becomes a Hugging Face folder, or the reverse", EXAMPLE

    def run() -> int:
        parser = lm.make_parser("", about, example, (ConvertSettings,))
        parser.prog = Path(__file__).name
        return convert(*lm.read_flags(parser, (ConvertSettings,), words))

    return lm.run_command(lm.Command(run, about, example), [])


if __name__ == "__main__":
    sys.exit(main())
