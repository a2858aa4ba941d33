"""A checkpoint becomes a Hugging Face folder, a GGUF file or a PEFT adapter, and these come back.

    python convert_to_llama.py --ckpt runs/lm/ckpt_best.pt --out hf
    python convert_to_llama.py --ckpt runs/lm/ckpt_best.pt --out lm.gguf --format gguf --quant q8_0
    python convert_to_llama.py --reverse some_llama_folder_or_file.gguf --out imported.pt

The folder holds model.safetensors, config.json, generation_config.json, tokenizer.json and
tokenizer_config.json (padding on the left, chat template), of a SentencePiece model tokenizer.model
too, and a model card. transformers, vLLM, llama.cpp and their like read it; AutoTokenizer needs
neither protobuf nor sentencepiece for it. Where transformers is installed, the folder is loaded and
compared with the checkpoint before it gets its name. A conversion that is interrupted or fails
leaves nothing.

The tokens are this program's own, with one difference that every AutoTokenizer has: text that
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
import typing
from collections.abc import Iterator
from dataclasses import dataclass
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
# Folder: everything that transformers reads, whole or not at all
# ==================================================================================================

FOLDER_FILES = re.compile(
    r"config\.json|generation_config\.json|special_tokens_map\.json|README\.md|\.gitattributes"
    r"|tokenizer\.model|tokenizer\.json|tokenizer_config\.json|chat_template(_train)?\.jinja"
    r"|adapter_config\.json|(model|pytorch_model|adapter_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
)
SHARD_BYTES = 5 << 30  # of one file of weights
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CALL_TEMPLATE = (
    "{% for call in message['tool_calls'] or [] %}{% set function = call['function'] or call %}"
    f"{{{{ '{lm.TOOL_CALL}' }}}}"
    "{{ '{\"name\": ' + (function['name'] | tojson) + ', \"arguments\": ' }}"
    "{% if function['arguments'] is string %}{{ function['arguments'] }}"
    "{% else %}{{ function['arguments'] | tojson }}{% endif %}{{ '}' }}{% endfor %}"
)
TEXT_TEMPLATE = (  # what a message says, as a string or as a list of parts
    "{% set said = namespace(text='') %}"
    "{% if message['content'] is string %}{% set said.text = message['content'] %}{% else %}"
    "{% for part in message['content'] or [] %}"
    "{% set said.text = said.text + (part['text'] or '') %}{% endfor %}{% endif %}"
)


def chat_template(begin: str = "", end: str = "") -> str:
    """The chats of this program's own tokenizers, in jinja; `begin` and `end` are around what an
    assistant says."""
    return (
        "{{ bos_token }}{% for message in messages %}"
        f"{{% if message['role'] not in {[*lm.ROLES, 'tool']} %}}"
        "{{ raise_exception('there is no role ' + message['role']) }}{% endif %}"
        + TEXT_TEMPLATE
        + f"{{% if message['role'] == 'tool' %}}{{{{ '{lm.TOOL_RESULT}' }}}}"
        "{% else %}{{ '<|' + message['role'] + '|>' }}{% endif %}"
        "{% if message['role'] == 'assistant' %}"
        + begin
        + "{{ said.text }}"
        + CALL_TEMPLATE
        + "{{ eos_token }}"
        + end
        + "{% else %}{{ said.text + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A hidden folder to fill, which gets the name `target` when the block ends without a fault.

    An earlier conversion at `target` is replaced, but for a README.md that somebody wrote. Raises
    UserError for a folder with other files.
    """
    target = target.resolve()
    if target.exists():
        names = os.listdir(target) if target.is_dir() else [target.name]
        if not target.is_dir() or not all(map(FOLDER_FILES.fullmatch, names)):
            raise lm.UserError(
                f"{target} holds other things than a conversion", "name another --out"
            )
    work = target.with_name(f".{target.name}.{os.getpid()}.part")
    aside = work.with_suffix(".old")
    work.mkdir(parents=True)
    try:
        yield work
        keep_readme(target, work)
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
    """The names of the special tokens that this tokenizer has, under transformers' keys; </s> pads
    where nothing else is there to."""
    ids = {"bos": tokenizer.bos, "eos": tokenizer.eos, "pad": pad_of(tokenizer)}
    if not pieces.byte_fallback:
        ids["unk"] = tokenizer.sp.unk_id()
    return {f"{key}_token": tokenizer.sp.id_to_piece(i) for key, i in ids.items() if i >= 0}


def pad_of(tokenizer: lm.Tokenizer) -> int:
    return tokenizer.pad if tokenizer.pad >= 0 else tokenizer.eos


def write_hf_tokenizer(folder: Path, tokenizer: lm.HFTokenizer) -> None:
    """Its files as they came, but that it pads on the left, has something to pad with, and a chat
    template."""
    texts = {name: text for name, text in tokenizer.texts.items() if "generation" not in name}
    config = json.loads(texts.get("tokenizer_config.json", "{}"))
    config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    config["padding_side"] = "left"
    texts_of = {i: text for text, i in tokenizer.specials.items()}
    for key, i in (("eos", tokenizer.eos), ("pad", pad_of(tokenizer))):
        if not config.get(f"{key}_token") and i in texts_of:
            config[f"{key}_token"] = texts_of[i]
    if not tokenizer.has_template:
        config["chat_template"] = chat_template() if tokenizer.roles else lm.PLAIN_TEMPLATE
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    write_json(folder / "tokenizer_config.json", config)


def write_tokenizer(folder: Path, tokenizer: lm.Tokenizer, seq_len: int) -> None:
    """tokenizer.model where there is one, tokenizer.json and tokenizer_config.json."""
    if isinstance(tokenizer, lm.HFTokenizer):
        write_hf_tokenizer(folder, tokenizer)
        return
    pieces = read_piece_model(tokenizer.data)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the one that takes tokenizer.json as it is
        "add_bos_token": True,
        "add_eos_token": False,
        **special_names(tokenizer, pieces),
        "padding_side": "left",  # a batch is generated from its right end
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": chat_template() if tokenizer.roles else lm.PLAIN_TEMPLATE,
    }
    if tokenizer.roles:
        masked = chat_template("{% generation %}", "{% endgeneration %}")
        (folder / "chat_template_train.jinja").write_text(masked, encoding="utf-8")
    if tied := tied_scores(pieces):
        lm.say(
            f"note: {tied} pieces of the tokenizer share a score; where two of them compete, "
            "tokenizer.json may join another one than SentencePiece"
        )
    write_json(folder / "tokenizer.json", tokenizer_json(pieces, tokenizer.bos))
    write_json(folder / "tokenizer_config.json", config)
    (folder / "tokenizer.model").write_bytes(tokenizer.data)


def shards_of(weights: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The weights in files of at most SHARD_BYTES, where one weight is not larger."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, weight in weights.items():
        own = weight.numel() * weight.element_size()
        if shards[-1] and size + own > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = weight
        size += own
    return shards


def write_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    """model.safetensors, or several of them and their index; pytorch_model.bin where safetensors is
    not installed."""
    if find_spec("safetensors") is None:
        lm.say("note: safetensors is not installed, so the weights are in pytorch_model.bin")
        lm.save_checkpoint(folder / "pytorch_model.bin", weights)
        return
    safetensors = lm.need("safetensors")
    save_file = lm.need("safetensors.torch").save_file
    shards = shards_of(weights)
    names = ["model.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        index = {
            "metadata": {"total_size": sum(w.numel() * w.element_size() for w in weights.values())},
            "weight_map": {
                key: name for name, part in zip(names, shards, strict=True) for key in part
            },
        }
        write_json(folder / "model.safetensors.index.json", index)
    try:
        for name, part in zip(names, shards, strict=True):
            save_file(part, folder / name, metadata={"format": "pt"})
            shutil.copymode(folder / "config.json", folder / name)  # it wrote 0600
    except safetensors.SafetensorError as fault:  # of the disk: it has no other to tell here
        fix = "free some space, or name a folder elsewhere"
        raise lm.UserError(f"{folder}: {fault}", fix) from fault


CARD_MARK = "<!-- written by convert_to_llama.py -->"


def keep_readme(target: Path, work: Path) -> None:
    """Let a README.md at `target` that is not ours take the place of the new one."""
    old = target / "README.md"
    if old.exists() and CARD_MARK not in old.read_text(encoding="utf-8", errors="replace"):
        shutil.copyfile(old, work / "README.md")


def model_card(saved: dict, model: lm.ModelSettings, architecture: str, run: Path) -> str:
    """README.md: what the model is, what it was trained on and how, and how good it is."""
    counts = lm.parameter_counts(model)
    shape = {
        "architecture": architecture,
        "parameters": f"{counts['total']:,}",
        "layers": model.n_layer,
        "width": model.d_model,
        "heads": f"{model.n_head}, {model.kv_heads} of keys and values",
        "context": f"{model.seq_len:,} tokens",
        "vocabulary": f"{model.vocab_size:,}",
    }
    args = saved.get("args") or {}
    training = {"kind": saved.get("kind", "")}
    if saved.get("step"):
        training |= {"steps": saved["step"], "samples": saved.get("samples")}
    best = saved.get("best_val")
    if isinstance(best, float) and math.isfinite(best):
        training["best value of its validation metric"] = f"{best:.4f}"
    for key in ("data_dir", "data", "task", "optimizer", "lr", "batch_size", "max_steps", "dtype"):
        if args.get(key) not in (None, "", 0, ()):
            training[key] = args[key]
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---",
        CARD_MARK,
        f"# {run.resolve().name}",
        "## Model\n\n" + table(shape),
        "## Training\n\n" + table(training),
    ]
    if results := evaluations(run):
        parts.append("## Evaluation\n\n" + results)
    arguments = run / "args.txt"
    if arguments.exists():
        text = arguments.read_text(encoding="utf-8", errors="replace").strip()
        command = lm.command_of(saved.get("kind", "train"))
        parts.append(f"## Command\n\n```\npython {lm.PROGRAM} {command} \\\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def table(rows: dict[str, object]) -> str:
    lines = [f"| {key} | {str(value).replace('|', '/')} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def evaluations(run: Path) -> str:
    """The table of a results.json of eval beside the checkpoint; "" where there is none."""
    path = run / "results.json"
    if not path.exists():
        return ""
    found = {}
    for name, tasks in lm.read_json(path).get("results", {}).items():
        for task, figures in tasks.items():
            told = [f"{k} {v:.4g}" for k, v in figures.items() if isinstance(v, (int, float))]
            found[f"{Path(name).name}: {task}"] = ", ".join(told)
    return table(found)


def warn_others(model: lm.ModelSettings, tokenizer: lm.Tokenizer) -> None:
    """Say where llama.cpp computes something else, or cannot read the folder."""
    if model.window:
        lm.say(
            "note: llama.cpp ignores the window of this model, so that it answers otherwise in "
            f"texts longer than {model.window} tokens"
        )
    if model.nope_every not in (0, 4):
        lm.say(
            f"note: llama.cpp takes every 4th layer to be without rotary embedding, not every "
            f"{model.nope_every}th: it computes another model"
        )
    if model.n_expert and model.qk_norm and not isinstance(tokenizer, lm.HFTokenizer):
        lm.say("note: llama.cpp's converter does not know the tokenizer of a Qwen3-MoE model")


def write_folder(
    folder: Path,
    weights: dict[str, Tensor],
    model: lm.ModelSettings,
    tokenizer: lm.Tokenizer,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Everything but the model card; the name of the architecture."""
    weights, model = lm.folded(weights, model)
    family = lm.family_of(model)
    ids: dict = {"eos_token_id": sorted(tokenizer.stops), "pad_token_id": pad_of(tokenizer)}
    if len(tokenizer.stops) == 1:
        ids["eos_token_id"] = tokenizer.eos
    named = tokenizer.bos
    if isinstance(tokenizer, lm.HFTokenizer):
        named = tokenizer.named_bos
    if named is not None:
        ids["bos_token_id"] = named
    architecture, more = family.architecture, {}
    renamed = lm.to_family(weights, model, family)
    if model.scalar_head:
        architecture = architecture.replace("ForCausalLM", "ForSequenceClassification")
        renamed["score.weight"] = weights["score.weight"]
        renamed.pop("lm_head.weight", None)
        more = {"id2label": {"0": "reward"}, "label2id": {"reward": 0}, "num_labels": 1}
    config = {
        "architectures": [architecture],
        "model_type": family.model_type,
        **lm.common_config(model),
        **family.config(model),
        **ids,
        **more,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    write_tokenizer(folder, tokenizer, model.seq_len)
    write_json(folder / "config.json", config)
    sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
    if not model.scalar_head:
        write_json(folder / "generation_config.json", {**ids, **sampling})
    write_weights(folder, {name: w.to(dtype).contiguous() for name, w in renamed.items()})
    warn_others(model, tokenizer)
    return architecture


# ==================================================================================================
# GGUF: the one file that llama.cpp, Ollama and LM Studio read
# ==================================================================================================

GGUF_LAYER = {  # our key of a layer: llama.cpp's, of which q, k and v are three
    "norm1.weight": ("attn_norm.weight",),
    "attn.qkv.weight": ("attn_q.weight", "attn_k.weight", "attn_v.weight"),
    "attn.qkv.bias": ("attn_q.bias", "attn_k.bias", "attn_v.bias"),
    "attn.q_norm.weight": ("attn_q_norm.weight",),
    "attn.k_norm.weight": ("attn_k_norm.weight",),
    "attn.proj.weight": ("attn_output.weight",),
    "norm2.weight": ("ffn_norm.weight",),
    "mlp.w1.weight": ("ffn_gate.weight",),
    "mlp.w2.weight": ("ffn_up.weight",),
    "mlp.w3.weight": ("ffn_down.weight",),
    "mlp.router.weight": ("ffn_gate_inp.weight",),
    "mlp.w1": ("ffn_gate_exps.weight",),
    "mlp.w2": ("ffn_up_exps.weight",),
    "mlp.w3": ("ffn_down_exps.weight",),
}
GGUF_WHOLE = {
    "tok_emb.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
GGUF_ARCH = {  # transformers' model_type: llama.cpp's architecture
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "smollm3": "smollm3",
}
PAIRED = ("llama", "smollm3")  # whose rotary pairs are neighbours: (x0 x1)(x2 x3)…
QUANTS = ("f32", "f16", "bf16", "q8_0", "q4_0")  # --quant
READABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")


def byte_level(use_regex: bool) -> dict:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def split_words(digits: int) -> dict:
    pattern = {"Regex": lm.byte_words(digits)}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level(False)]}


WORD_SPLITTERS = {  # llama.cpp's name: (how tokenizer.json says it, whether it ignores merges)
    "gpt-2": (byte_level(True), False),
    "smollm": (
        {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level(True)],
        },
        False,
    ),
    "llama-bpe": (split_words(3), True),
    "qwen2": (split_words(1), False),
}


def paired(weight: Tensor, heads: int) -> Tensor:
    """Rows in half-split rotary order (x0 x2 … x1 x3 …) in that of neighbours (x0 x1 x2 x3 …)."""
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def halved(weight: Tensor, heads: int) -> Tensor:
    """The reverse of paired()."""
    return weight.view(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def rotation_factors(model: lm.ModelSettings) -> Tensor:
    """By how much the scaling of a model slows each of its rotations (D/2,)."""
    speeds = []
    for one in (dataclasses.replace(model, rope_scaling="none"), model):
        cos, sin = lm.rope_tables(one)
        speeds.append(torch.atan2(sin[1].double(), cos[1].double()))  # at position 1
    return (speeds[0] / speeds[1]).float()


def gguf_tensors(
    weights: dict[str, Tensor], model: lm.ModelSettings, arch: str
) -> Iterator[tuple[str, Tensor]]:
    """(llama.cpp's name, tensor) of every weight."""
    heads = (model.n_head, model.kv_heads, model.kv_heads)
    for ours, theirs in GGUF_WHOLE.items():
        if ours != "lm_head.weight" or not model.tie:
            yield theirs, weights[ours]
    for i in range(model.n_layer):
        for ours, theirs in GGUF_LAYER.items():
            weight = weights.get(f"blocks.{i}.{ours}")
            if weight is None:
                continue
            parts = [weight]
            if len(theirs) == 3:
                parts = list(weight.split([n * model.head_size for n in heads]))
                if arch in PAIRED:
                    parts[:2] = (
                        paired(part, n) for part, n in zip(parts[:2], heads[:2], strict=True)
                    )
            elif weight.dim() == 3:  # (E, in, out)
                parts = [weight.transpose(1, 2)]
            for name, part in zip(theirs, parts, strict=True):
                yield f"blk.{i}.{name}", part.contiguous()
    if model.rope_scaling == "llama3":  # by how much each rotation is slower
        yield "rope_freqs.weight", rotation_factors(model)


def gguf_metadata(writer, model: lm.ModelSettings, name: str, quant: str, arch: str) -> None:
    gguf = lm.need("gguf")
    writer.add_name(name)
    writer.add_type("model")
    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}
    kind = kinds.get(quant) or f"MOSTLY_{quant.upper()}"
    writer.add_file_type(gguf.LlamaFileType[kind])
    if quant.startswith("q"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(model.seq_len)
    writer.add_embedding_length(model.d_model)
    writer.add_block_count(model.n_layer)
    writer.add_feed_forward_length(model.ffn_width)
    writer.add_head_count(model.n_head)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head_size)
    writer.add_value_length(model.head_size)
    writer.add_rope_dimension_count(model.head_size)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    if model.window:
        writer.add_sliding_window(model.window)
    if model.n_expert:
        writer.add_expert_count(model.n_expert)
        writer.add_expert_used_count(model.n_expert_active)
        if arch == "qwen3moe":
            writer.add_expert_feed_forward_length(model.ffn_width)
    if model.rope_scaling in ("linear", "yarn"):
        original = model.rope_original or round(model.seq_len / model.rope_factor)
        writer.add_rope_scaling_type(gguf.RopeScalingType(model.rope_scaling))
        writer.add_rope_scaling_factor(model.rope_factor)
        writer.add_rope_scaling_orig_ctx_len(original)


def gguf_pieces(writer, tokenizer: lm.Tokenizer, size: int) -> None:
    """The pieces of a SentencePiece model."""
    model = read_piece_model(tokenizer.data)
    refuse_tokenizer(model)
    rows = [(p.text.encode(), p.score, p.kind) for p in model.pieces]
    rows += [(f"[PAD{i}]".encode(), -1000.0, UNUSED) for i in range(len(rows), size)]
    texts, scores, kinds = zip(*rows, strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(model.dummy_prefix)
    writer.add_chat_template(chat_template() if tokenizer.roles else lm.PLAIN_TEMPLATE)


def splitter_name(told: dict, tokenizer: lm.HFTokenizer) -> str:
    """llama.cpp's name for how a tokenizer.json splits words. UserError where it has none."""
    bpe = told["model"]

    def essence(step: object) -> object:
        if isinstance(step, dict):
            skipped = ("trim_offsets", "add_prefix_space", "invert")
            return {key: essence(value) for key, value in step.items() if key not in skipped}
        return [essence(one) for one in step] if isinstance(step, list) else step

    if bpe["type"] == "BPE" and not bpe.get("byte_fallback"):
        for name, (splitter, ignores) in WORD_SPLITTERS.items():
            same = essence(told["pre_tokenizer"]) == essence(splitter)
            if same and bool(bpe.get("ignore_merges")) == ignores:
                return name
    raise lm.UserError(
        f"llama.cpp knows no tokenizer that splits words as {tokenizer.name} does",
        "export the Hugging Face folder instead, without --format gguf",
    )


def gguf_bytes(writer, tokenizer: lm.HFTokenizer, size: int) -> None:
    """The tokens of a byte-level BPE."""
    told = json.loads(tokenizer.texts["tokenizer.json"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter_name(told, tokenizer))
    rows = [(f"[PAD{i}]".encode(), UNUSED) for i in range(size)]
    for text, i in told["model"]["vocab"].items():
        rows[i] = text.encode(), NORMAL
    for added in told["added_tokens"]:
        rows[added["id"]] = added["content"].encode(), CONTROL if added["special"] else USER_DEFINED
    texts, kinds = zip(*rows, strict=True)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in told["model"]["merges"]]
    writer.add_token_merges(pairs)
    writer.add_add_bos_token(bool(tokenizer.opening))
    writer.add_add_space_prefix(False)
    own = tokenizer.roles and not tokenizer.has_template
    writer.add_chat_template(chat_template() if own else tokenizer.template_text)


def quantised(gguf, name: str, weight: Tensor, quant: str):
    """A weight as llama.cpp stores it, and its type: norms and routers whole, embedding and head of
    a 4-bit model in 8 bits, and in 16 what does not divide into blocks of 32."""
    kinds = gguf.GGMLQuantizationType
    values = weight.float().numpy()
    if weight.dim() < 2 or "ffn_gate_inp" in name:
        return values, kinds.F32
    kind = kinds[quant.upper()]
    if kind == kinds.Q4_0 and name in ("token_embd.weight", "output.weight"):
        kind = kinds.Q8_0
    if quant.startswith("q") and values.shape[-1] % 32:
        kind = kinds.F16
    return gguf.quantize(values, kind), kind


def write_gguf(path: Path, saved: dict, tokenizer: lm.Tokenizer, quant: str) -> str:
    """A checkpoint as a GGUF file, whole or not at all; its architecture."""
    gguf = lm.need("gguf")
    model = lm.ModelSettings(**saved["config"])
    weights, model = lm.folded(saved["model"], model)
    if model.scalar_head:
        raise lm.UserError("llama.cpp has no reward models", "export it without --format gguf")
    arch = GGUF_ARCH[lm.family_of(model).model_type]
    half = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        writer = gguf.GGUFWriter(half, arch)
        gguf_metadata(writer, model, path.stem, quant, arch)
        if isinstance(tokenizer, lm.HFTokenizer):
            gguf_bytes(writer, tokenizer, model.vocab_size)
        else:
            gguf_pieces(writer, tokenizer, model.vocab_size)
        named = tokenizer.bos
        if isinstance(tokenizer, lm.HFTokenizer):
            named = tokenizer.named_bos
        if named is not None:
            writer.add_bos_token_id(named)
        writer.add_eos_token_id(tokenizer.turn_end)
        writer.add_pad_token_id(pad_of(tokenizer))
        for name, weight in gguf_tensors(weights, model, arch):
            values, kind = quantised(gguf, name, weight, quant)
            writer.add_tensor(name, values, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)
    warn_others(model, tokenizer)
    return arch


def modelfile(path: Path, tokenizer: lm.Tokenizer) -> str:
    """What `ollama create` takes; its template is written in another language than jinja."""
    lines = [f"FROM ./{path.name}"]
    end = None
    if tokenizer.roles and not tokenizer.template:
        end = "</s>"
        lines.append(
            'TEMPLATE """{{ range .Messages }}<|{{ .Role }}|>{{ .Content }}</s>{{ end }}'
            '<|assistant|>"""'
        )
    elif isinstance(tokenizer, lm.HFTokenizer) and "<|im_start|>" in tokenizer.template_text:
        end = "<|im_end|>"
        lines.append(
            'TEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n'
            '{{ end }}<|im_start|>assistant\n"""'
        )
    if end:
        lines.append(f"PARAMETER stop {end}")
    return "\n".join([*lines, "PARAMETER temperature 0.8"]) + "\n"


# ---- The way back ----


class GgufFile:
    """A GGUF file's facts and tensors. UserError where it is damaged or of a kind that is not
    read."""

    def __init__(self, path: Path):
        self.path = path
        self.gguf = lm.need("gguf")
        with lm.Caught() as caught:  # its reader trusts the bytes
            reader = self.gguf.GGUFReader(path)
            self.facts = {key: field.contents() for key, field in reader.fields.items()}
            self.tensors = {tensor.name: tensor for tensor in reader.tensors}
            self.arch = self.facts["general.architecture"]
        if caught.fault:
            raise lm.UserError(
                f"{path} is not a GGUF file, or is damaged", "download it again"
            ) from caught.fault
        if self.arch not in GGUF_ARCH.values():
            raise lm.UserError(
                f"{path} is of the architecture {self.arch}, which is not ours",
                f"give one of {', '.join(sorted(set(GGUF_ARCH.values())))}",
            )

    def fact(self, key: str, default: object = None) -> typing.Any:
        """A fact of this architecture. UserError where it has to be there and is not."""
        found = self.facts.get(f"{self.arch}.{key}", default)
        if found is None:
            raise lm.UserError(f"{self.path} does not say {self.arch}.{key}", "download it again")
        return found

    def weight(self, name: str) -> Tensor | None:
        """In fp32, dequantised; None where there is none of that name."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        if tensor.tensor_type.name not in READABLE:
            raise lm.UserError(
                f"{self.path}: {name} is of the type {tensor.tensor_type.name}",
                f"give a file in one of {', '.join(READABLE)}",
            )
        values = self.gguf.dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(values.astype("float32"))


LLAMA3_SCALINGS = ((8.0, 1.0, 4.0), (32.0, 1.0, 4.0))  # (factor, low, high) of Llama 3.1 and 3.2


def gguf_settings(file: GgufFile) -> lm.ModelSettings:
    """Our settings for what a file says."""
    heads = file.fact("attention.head_count")
    kind = str(file.fact("rope.scaling.type", "none"))
    if kind not in ("none", "linear", "yarn"):
        raise lm.UserError(
            f"{file.path} scales its rotary angles by {kind}", "give a file without that"
        )
    experts = file.fact("expert_count", 0)
    width = file.fact("feed_forward_length")
    if file.arch == "qwen3moe":
        width = file.fact("expert_feed_forward_length")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise lm.UserError(f"{file.path} has no token_embd.weight", "download it again")
    window = file.fact("attention.sliding_window", 0)
    model = lm.ModelSettings(
        vocab_size=int(embedding.shape[1]),
        d_model=file.fact("embedding_length"),
        ffn_hidden=width,
        n_layer=file.fact("block_count"),
        n_head=heads,
        n_kv_head=file.fact("attention.head_count_kv", heads),
        head_dim=file.fact("attention.key_length", file.fact("embedding_length") // heads),
        seq_len=file.fact("context_length"),
        norm_eps=round_trip(file.fact("attention.layer_norm_rms_epsilon")),
        rope_theta=round_trip(file.fact("rope.freq_base", 10000.0)),
        rope_scaling=kind,
        rope_factor=round_trip(file.fact("rope.scaling.factor", 1.0)),
        rope_original=file.fact("rope.scaling.original_context_length", 0),
        tie="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        nope_every=4 if file.arch == "smollm3" else 0,
        window=window if file.arch == "llama" else 0,
        n_expert=experts,
        n_expert_active=file.fact("expert_used_count", 2),
    )
    factors = file.weight("rope_freqs.weight")
    return model if factors is None else llama3_settings(model, factors, file.path)


def round_trip(value: float) -> float:
    """A number that went through fp32, as it was written."""
    return float(f"{value:.6g}")


def llama3_settings(model: lm.ModelSettings, factors: Tensor, path: Path) -> lm.ModelSettings:
    """The llama3 scaling that gives these factors, of the published ones."""
    for factor, low, high in LLAMA3_SCALINGS:
        for original in (8192, round(model.seq_len / factor)):
            found = dataclasses.replace(
                model,
                rope_scaling="llama3",
                rope_factor=factor,
                rope_low=low,
                rope_high=high,
                rope_original=original,
            )
            if torch.allclose(rotation_factors(found), factors, rtol=1e-3):
                return found
    raise lm.UserError(f"{path} scales its rotary angles in an unknown way", "give another file")


def gguf_weights(file: GgufFile, model: lm.ModelSettings) -> dict[str, Tensor]:
    """The weights under our names, in fp32. UserError where one is missing or of another shape."""
    with torch.device("meta"):
        wanted = {name: w.shape for name, w in lm.Transformer(model).state_dict().items()}
    heads = (model.n_head, model.kv_heads, model.kv_heads)
    found: dict[str, Tensor] = {}

    def take(name: str) -> Tensor:
        weight = file.weight(name)
        if weight is None:
            raise lm.UserError(f"{file.path} lacks {name}", "download it again")
        return weight

    for ours in wanted:
        if ours in GGUF_WHOLE:
            theirs = GGUF_WHOLE[ours]
            if ours == "lm_head.weight" and model.tie:
                theirs = GGUF_WHOLE["tok_emb.weight"]
            found[ours] = take(theirs)
            continue
        _, layer, key = ours.split(".", 2)
        parts = [take(f"blk.{layer}.{name}") for name in GGUF_LAYER[key]]
        if len(parts) == 3 and file.arch in PAIRED:
            parts[:2] = (halved(part, n) for part, n in zip(parts[:2], heads[:2], strict=True))
        weight = torch.cat(parts)
        found[ours] = weight.transpose(1, 2).contiguous() if weight.dim() == 3 else weight
    wrong = [name for name, shape in wanted.items() if found[name].shape != shape]
    if wrong:
        raise lm.UserError(
            f"{file.path}: its weights have other shapes than it says ({', '.join(wrong[:3])})",
            "download it again",
        )
    return found


def varint(value: int) -> bytes:
    """A number of protobuf."""
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def message(*fields: tuple[int, bytes | int | float]) -> bytes:
    """A message of protobuf."""
    data = b""
    for number, value in fields:
        if isinstance(value, bytes):
            data += varint(number << 3 | 2) + varint(len(value)) + value
        elif isinstance(value, float):
            data += varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            data += varint(number << 3) + varint(value % 2**64)
    return data


def piece_model(file: GgufFile) -> bytes:
    """A tokenizer.model of the pieces in a file."""
    facts = file.facts
    texts = facts["tokenizer.ggml.tokens"]
    scores = facts.get("tokenizer.ggml.scores") or [0.0] * len(texts)
    kinds = facts.get("tokenizer.ggml.token_type") or [NORMAL] * len(texts)
    pieces = b""
    for text, score, kind in zip(texts, scores, kinds, strict=True):
        piece = message((1, text.encode()), (2, float(score)), (3, int(kind)))
        pieces += message((1, piece))
    ids = {"unknown": 0, "bos": 1, "eos": 2, "padding": -1}
    ids = {name: facts.get(f"tokenizer.ggml.{name}_token_id", i) for name, i in ids.items()}
    trainer = message(
        (3, BPE_MODEL),
        (35, int(BYTE in kinds)),
        (40, ids["unknown"]),
        (41, ids["bos"]),
        (42, ids["eos"]),
        (43, ids["padding"] if ids["padding"] != ids["eos"] else -1),
    )
    prefix = int(facts.get("tokenizer.ggml.add_space_prefix", True))
    normal = message((1, b"identity"), (3, prefix), (4, 0), (5, 1))
    return pieces + message((2, trainer), (3, normal))


def byte_tokenizer(file: GgufFile) -> bytes:
    """The files of a Hugging Face tokenizer of the byte-level tokens in a file."""
    facts = file.facts
    splitter = facts.get("tokenizer.ggml.pre", "gpt-2")
    if splitter not in WORD_SPLITTERS:
        raise lm.UserError(
            f"{file.path} splits words in the way of {splitter!r}, which is not known here",
            "name the tokenizer.json of its model with --tokenizer",
        )
    texts = facts["tokenizer.ggml.tokens"]
    kinds = facts.get("tokenizer.ggml.token_type") or [NORMAL] * len(texts)
    added = [
        {**added_token(i, text), "special": kind == CONTROL}
        for i, (text, kind) in enumerate(zip(texts, kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    split, ignores = WORD_SPLITTERS[splitter]
    bos = facts.get("tokenizer.ggml.bos_token_id")
    opens = bool(facts.get("tokenizer.ggml.add_bos_token", splitter == "llama-bpe"))
    told = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if splitter == "qwen2" else None,
        "pre_tokenizer": split,
        "post_processor": bos_first(texts[bos], bos) if opens and bos is not None else None,
        "decoder": byte_level(True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignores,
            "vocab": {text: i for i, text in enumerate(texts)},
            "merges": list(facts["tokenizer.ggml.merges"]),
        },
    }
    config: dict = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": opens}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        i = facts.get(f"tokenizer.ggml.{name}_token_id")
        if i is not None:
            config[f"{key}_token"] = texts[i]
    if template := facts.get("tokenizer.chat_template"):
        config["chat_template"] = template
    files = {"tokenizer.json": json.dumps(told), "tokenizer_config.json": json.dumps(config)}
    return json.dumps(files, ensure_ascii=False).encode()


def read_gguf(path: Path, spm: str = "") -> dict:
    """A checkpoint's dict of a GGUF file."""
    file = GgufFile(path)
    model = gguf_settings(file)
    if faults := lm.check(model):
        raise lm.UserError(f"{path}: {faults[0][0]}", "download it again")
    kind = file.facts.get("tokenizer.ggml.model")
    if spm:
        tokenizer = lm.load_tokenizer(spm)
    elif kind in ("llama", "gpt2"):
        with lm.Caught() as caught:
            data = piece_model(file) if kind == "llama" else byte_tokenizer(file)
        if isinstance(caught.fault, lm.UserError):
            raise caught.fault
        if caught.fault:
            raise lm.UserError(f"the tokenizer in {path} is damaged", "name one with --tokenizer")
        tokenizer = lm.make_tokenizer(data, f"the tokenizer in {path}")
    else:
        raise lm.UserError(
            f"{path} has a tokenizer of the kind {kind!r}", "name one with --tokenizer"
        )
    chats = isinstance(tokenizer, lm.HFTokenizer) and tokenizer.has_template
    return {
        "format": lm.CHECKPOINT_FORMAT,
        "kind": "imported chat" if chats or tokenizer.roles else "imported",
        "step": 0,
        "samples": 0,
        "best_val": math.inf,
        "model": gguf_weights(file, model),
        "config": dataclasses.asdict(dataclasses.replace(model, bos_id=tokenizer.bos)),
        "tokenizer": tokenizer.data,
    }


# ==================================================================================================
# Adapters: low-rank changes in the form of PEFT
# ==================================================================================================

PEFT_PREFIX = "base_model.model."


def adapter_names(model: lm.ModelSettings) -> dict[str, tuple[str, ...]]:
    """Our matrices that may have adapters, and theirs, which are ours stacked by rows."""
    family = lm.family_of(model)
    names = dict(family.names(model))
    kinds = ("attn.qkv.weight", "attn.proj.weight", "mlp.w1.weight", "mlp.w2.weight")
    return {
        ours.removesuffix(".weight"): tuple(name.removesuffix(".weight") for name in theirs)
        for ours, theirs in names.items()
        if ours.endswith((*kinds, "mlp.w3.weight"))
    }


def write_adapter(folder: Path, checkpoint: dict, base: dict) -> None:
    """adapter_config.json and adapter_model.safetensors, of a checkpoint of adapters."""
    model = lm.ModelSettings(**base["config"])
    heads = [n * model.head_size for n in (model.n_head, model.kv_heads, model.kv_heads)]
    adapters, found, targets, rank = checkpoint["model"], {}, set(), 1
    for ours, theirs in adapter_names(model).items():
        a, b = (adapters.get(f"{ours}.lora_{part}") for part in "ab")
        if a is None or b is None:
            continue
        rank = len(a)
        parts = b.split(heads) if len(theirs) == 3 else [b]
        for name, part in zip(theirs, parts, strict=True):
            targets.add(name.rpartition(".")[2])
            found[f"{PEFT_PREFIX}{name}.lora_A.weight"] = a.clone()
            found[f"{PEFT_PREFIX}{name}.lora_B.weight"] = part.contiguous()
    if not found or "score.weight" in adapters:
        raise lm.UserError(
            "adapters of a reward model have no form in PEFT",
            "export the merged model, without --format peft",
        )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(checkpoint["lora"]["base"]),
        "r": rank,
        "lora_alpha": checkpoint["lora"]["scale"] * rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(targets),
        "bias": "none",
        "inference_mode": True,
    }
    write_json(folder / "adapter_config.json", config)
    lm.need("safetensors.torch").save_file(
        found, folder / "adapter_model.safetensors", metadata={"format": "pt"}
    )


def read_adapter(folder: Path, base: Path, out: Path) -> dict:
    """A checkpoint of the adapters in a folder of PEFT, for the model that they belong to."""
    config = lm.read_json(folder / "adapter_config.json")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if config.get("peft_type") != "LORA" or not lm.is_count(rank) or not lm.is_number(alpha):
        raise lm.UserError(f"{folder} holds no LoRA adapter", "give one of the type LORA")
    odd = [
        key
        for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")
        if config.get(key)
    ]
    if odd or config.get("bias", "none") != "none":
        raise lm.UserError(
            f"{folder} has {', '.join(odd) or 'biases'}, which adapters here have not",
            "merge it into its base with PEFT, and import that",
        )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    whole = lm.load_checkpoint(base)
    weights = lm.read_tensors(folder / "adapter_model.safetensors")
    model = lm.ModelSettings(**whole["config"])
    left, found = set(weights), {}
    for ours, theirs in adapter_names(model).items():
        parts = []
        for name in theirs:
            keys = [f"{PEFT_PREFIX}{name}.lora_{part}.weight" for part in "AB"]
            if all(key in left for key in keys):
                parts.append(tuple(weights[key].float() for key in keys))
                left -= {*keys}
            else:
                parts.append(None)
        if any(parts):
            a, b = stacked(parts, whole["model"][f"{ours}.weight"], model, len(theirs))
            found |= {f"{ours}.lora_a": a, f"{ours}.lora_b": b}
    if left or not found:
        names = ", ".join(sorted(left)[:3]) or "nothing"
        raise lm.UserError(
            f"{folder} adapts what {base} has not: {names}", "give the base that it was made for"
        )
    return {
        "format": lm.CHECKPOINT_FORMAT,
        "kind": "imported",
        "step": 0,
        "samples": 0,
        "best_val": math.inf,
        "model": found,
        "config": whole["config"],
        "lora": {
            "base": str(base.resolve()),
            "relative": os.path.relpath(base, out.parent),
            "key": lm.model_key(whole),
            "scale": scale,
        },
        "tokenizer": whole["tokenizer"],
    }


def stacked(
    parts: list[tuple[Tensor, Tensor] | None],
    weight: Tensor,
    model: lm.ModelSettings,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Adapters (A, B) of matrices that are ours stacked by rows, as one: their A below each other,
    and their B where the rows and those of A cross."""
    heights = [len(weight)]
    if count == 3:
        heights = [n * model.head_size for n in (model.n_head, model.kv_heads, model.kv_heads)]
    blocks = []
    for part, height in zip(parts, heights, strict=True):
        blocks.append(part[1] if part else torch.zeros(height, 0))
    a = torch.cat([part[0] for part in parts if part])
    return a, torch.block_diag(*blocks)


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
    noise[noise == model.config.bos_id] = tokenizer.eos  # it would begin another document
    text = tokenizer.prompt(" ".join(SAMPLE_TEXTS))[:length]
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
    hf.generation_config.temperature = hf.generation_config.top_p = None  # of sampling alone
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
        ours = [*tokenizer.opening, *tokenizer.encode(text)]
        if hf(text).input_ids != ours:
            raise MismatchError(
                f"the folder's tokenizer.json encodes {text!r} otherwise than this program does"
            )


@torch.no_grad()
def score_gap(hf, model: lm.Transformer, tokenizer: lm.Tokenizer) -> float:
    """The largest difference between the scores of transformers' reward model and ours."""
    gaps = []
    for ids in sample_ids(model, tokenizer):
        ids = torch.cat((ids[:, :-1], torch.tensor([[tokenizer.eos]])), dim=1)
        targets = torch.full_like(ids, lm.IGNORE)
        targets[:, -1] = tokenizer.eos
        hidden, _ = lm.hidden_and_aux_loss(model, ids, targets)
        ours = model.score(hidden[:, -1]).squeeze(-1)
        gaps.append(float((hf(ids).logits.squeeze(-1) - ours).abs().max()))
    return max(gaps)


def verify(folder: Path, model: lm.Transformer, tokenizer: lm.Tokenizer, ours: bool) -> str:
    """One sentence on how `folder` compares with `model` and, if the folder is `ours`, its ids.

    Raises MismatchError where they differ.
    """
    transformers = quiet_transformers()
    if transformers is None:
        return "not verified, for transformers is not installed"
    kind = transformers.AutoModelForCausalLM
    if model.config.scalar_head:
        kind = transformers.AutoModelForSequenceClassification
    hf = kind.from_pretrained(folder, dtype=torch.float32).eval()
    if model.config.scalar_head:
        gap, same = score_gap(hf, model, tokenizer), "scores are the same"
    else:
        gap, same = logit_gap(hf, model, tokenizer), "greedy tokens are the same"
    if gap > LOGIT_TOLERANCE or math.isnan(gap):
        raise MismatchError(f"the folder's logits differ by {gap:.2g} from the checkpoint's")
    if not model.config.scalar_head:
        greedy = greedy_gap(hf, model, tokenizer)
        if greedy > 2 * LOGIT_TOLERANCE or math.isnan(greedy):
            raise MismatchError("the folder's greedy continuation differs from the checkpoint's")
    if ours:
        reader = transformers.AutoTokenizer
        if model.config.qkv_bias and not isinstance(tokenizer, lm.HFTokenizer):
            lm.say(
                "note: AutoTokenizer of transformers 5 reads every Qwen2 tokenizer as that of "
                "Qwen2; use PreTrainedTokenizerFast.from_pretrained"
            )
            reader = transformers.PreTrainedTokenizerFast
        compare_tokenizer(reader.from_pretrained(folder), tokenizer)
        same = same.replace(" are the same", " and token ids are the same")
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


REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass
class ConvertSettings:
    """What to convert."""

    ckpt: str = lm.setting("", "checkpoint, or the folder of a run, to make a folder of")
    reverse: str = lm.setting(
        "", "Hugging Face folder, or GGUF file, of a model to make a checkpoint of"
    )
    base: str = lm.setting(
        "", "of adapters, the model that they adapt; of those in --ckpt, if it was moved"
    )
    tokenizer: str = lm.setting("", "tokenizer.model, where --ckpt or --reverse holds none")
    out: str = lm.setting("", "folder or file to write; with --reverse the checkpoint, CKPT.pt")
    format: str = lm.setting(
        "hf",
        "Hugging Face folder, GGUF file, or the adapters alone in PEFT's form",
        choices=("hf", "gguf", "peft"),
    )
    quant: str = lm.setting(
        "", "numbers of a GGUF file; as the model was trained, if not given", choices=("", *QUANTS)
    )
    dtype: str = lm.setting(
        "",
        "numbers of the weights; as the model was trained, if not given; with --reverse those of "
        "the checkpoint, fp32 if not given",
        choices=("", *DTYPES),
    )
    rope_theta: float = lm.setting(
        0.0,
        "base of the rotary frequencies, for a checkpoint that tells a wrong one; 0 keeps it",
        least=0.0,
    )
    push: str = lm.setting(
        "", "repository on the Hugging Face Hub to upload it to, USER/NAME; a new one is private"
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        if self.push and not REPOSITORY.fullmatch(self.push):
            yield f"--push {self.push} is no repository", "write it as USER/NAME"
        if self.push and self.reverse:
            yield "--push is for --ckpt alone", "drop it"
        if not self.ckpt and not self.reverse:
            yield "--ckpt is missing", "name a checkpoint, --ckpt runs/lm/ckpt_best.pt"
        if self.ckpt and self.reverse:
            yield "--ckpt and --reverse are both given", "keep one of them"
        if self.reverse and self.rope_theta:
            yield "--rope_theta is for --ckpt alone", "drop it: config.json tells it"
        adapters = (Path(self.reverse) / "adapter_config.json").exists()
        if self.reverse and self.base and not adapters:
            yield "--base is for adapters", "drop it"
        if self.reverse and adapters and not self.base:
            yield "--base is missing", "name the checkpoint or folder that the adapters belong to"
        if self.quant and self.format != "gguf":
            yield "--quant is for --format gguf", "add it, or use --dtype"
        if self.dtype and self.format == "gguf":
            yield "--dtype is for Hugging Face folders", "use --quant"
        if self.dtype and self.base and self.reverse:
            yield "--dtype is not for adapters, which stay fp32", "drop it"
        if self.reverse and not self.out:
            yield "--out is missing", "name a file, --out imported.pt"
        elif not self.out:
            yield "--out is missing", "name a folder, --out hf"


def export_dtype(settings: ConvertSettings, saved: dict) -> torch.dtype:
    """What --dtype says, else what the model came in or was trained in."""
    known = {**DTYPES, "bfloat16": torch.bfloat16, "float16": torch.float16}
    args = saved.get("args") or {}
    for name in (settings.dtype, saved.get("dtype"), args.get("dtype")):
        if name in known:
            return known[name]
    return torch.float32


def export_gguf(
    settings: ConvertSettings, saved: dict, tokenizer: lm.Tokenizer, dtype: torch.dtype
) -> None:
    path = Path(settings.out)
    if path.is_dir():
        raise lm.UserError(f"{path} is a folder", f"name a file, --out {path}/model.gguf")
    names = {kind: name.replace("fp", "f") for name, kind in DTYPES.items()}
    quant = settings.quant or names[dtype]
    arch = write_gguf(path, saved, tokenizer, quant)
    with lm.atomic_write(path.with_name("Modelfile"), "w") as file:
        file.write(modelfile(path, tokenizer))
    lm.say(f"{path}: {arch}, {quant}, {path.stat().st_size / 1e6:.1f} MB; a Modelfile beside it")


def export_adapter(settings: ConvertSettings) -> None:
    path = lm.checkpoint_path(settings.ckpt)
    checkpoint = lm.read_checkpoint(path)
    lora = checkpoint.get("lora")
    if not lora:
        raise lm.UserError(f"{path} holds no adapters", "drop --format peft")
    if settings.base:
        lora = {**lora, "base": settings.base}
    base = lm.load_checkpoint(lm.find_base(lora, path))
    with whole_folder(Path(settings.out)) as folder:
        write_adapter(folder, checkpoint, base)
    lm.say(f"{settings.out}: the adapters of {path}, for {lora['base']}")


def export(settings: ConvertSettings) -> None:
    """Checkpoint → folder."""
    if settings.format == "peft":
        export_adapter(settings)
        return
    saved = lm.load_checkpoint(settings.ckpt, settings.base)
    if settings.rope_theta:
        saved["config"]["rope_theta"] = settings.rope_theta
    tokenizer = lm.tokenizer_of(saved, settings.tokenizer, settings.ckpt)
    dtype = export_dtype(settings, saved)
    if settings.format == "gguf":
        export_gguf(settings, saved, tokenizer, dtype)
        return
    if dtype != torch.float32:  # and compared with what is written
        rounded = {name: w.to(dtype).float() for name, w in saved["model"].items()}
        saved = {**saved, "model": rounded}
    model = lm.build_model(saved, torch.device("cpu"))
    run = Path(settings.ckpt)
    run = run if run.is_dir() else run.parent
    with whole_folder(Path(settings.out)) as folder:
        architecture = write_folder(folder, model.state_dict(), model.config, tokenizer, dtype)
        card = model_card(saved, model.config, architecture, run)
        (folder / "README.md").write_text(card, encoding="utf-8")
        result = verify(folder, model, tokenizer, ours=True)
    lm.say(f"{settings.out}: {architecture}, {result}")


def in_dtype(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights in `dtype`; one that has two names stays one."""
    kept = {weight: weight.to(dtype) for weight in weights.values()}
    return {name: kept[weight] for name, weight in weights.items()}


def import_folder(settings: ConvertSettings) -> None:
    """Folder → checkpoint."""
    folder, out = Path(settings.reverse), Path(settings.out)
    if out.exists():
        raise lm.UserError(f"{out} exists already", "name another --out")
    if settings.base:
        saved = read_adapter(folder, Path(settings.base), out)
        lm.save_checkpoint(out, saved)
        lm.say(f"{out}: adapters of {len(saved['model']) // 2} matrices, from {folder}")
        return
    if folder.suffix == ".gguf" or folder.is_file():
        saved = read_gguf(folder, settings.tokenizer)
        result = f"{lm.ModelSettings(**saved['config']).n_layer} layers, from {folder}"
    else:
        saved = lm.import_model(folder, settings.tokenizer)
        tokenizer = lm.tokenizer_of(saved, "", folder)
        result = verify_import(folder, lm.build_model(saved, torch.device("cpu")), tokenizer)
    saved["model"] = in_dtype(saved["model"], DTYPES[settings.dtype or "fp32"])
    lm.save_checkpoint(out, saved)
    lm.say(f"{out}: {result}")


def push(repository: str, out: Path) -> None:
    """Upload a folder, or a GGUF file and its Modelfile; UserError where the Hub refuses."""
    hub = lm.need("huggingface_hub")
    with lm.Caught() as caught:  # the package has many exceptions of its own
        api = hub.HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        if out.is_dir():
            api.upload_folder(repo_id=repository, folder_path=str(out))
        else:
            for file in (out, out.with_name("Modelfile")):
                api.upload_file(
                    path_or_fileobj=str(file), path_in_repo=file.name, repo_id=repository
                )
    if caught.fault:
        raise lm.UserError(
            f"{out} is written, but {repository} did not take it ({lm.sentence(caught.fault)})",
            f"log in with `hf auth login` or set HF_TOKEN, then: hf upload {repository} {out}",
        ) from caught.fault
    lm.say(f"uploaded to https://huggingface.co/{repository}")


def convert(settings: ConvertSettings) -> int:
    (import_folder if settings.reverse else export)(settings)
    if settings.push:
        push(settings.push, Path(settings.out))
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
