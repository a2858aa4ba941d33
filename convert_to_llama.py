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
import importlib
import json
import math
import os
import re
import shutil
import struct
import sys
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
    r"|(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
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
        config["chat_template"] = lm.PLAIN_TEMPLATE
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
        kind = saved.get("kind", "train")
        parts.append(f"## Command\n\n```\npython {lm.PROGRAM} {kind} \\\n{text}\n```")
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


@dataclass
class ConvertSettings:
    """What to convert."""

    ckpt: str = lm.setting("", "checkpoint, or the folder of a run, to make a folder of")
    reverse: str = lm.setting("", "Hugging Face folder of a LLaMA to make a checkpoint of")
    base: str = lm.setting("", "of adapters in --ckpt, the checkpoint that they adapt, if moved")
    spm: str = lm.setting("", "tokenizer.model, where --ckpt or --reverse holds none")
    out: str = lm.setting("", "folder to write; with --reverse the checkpoint, CKPT.pt")
    dtype: str = lm.setting(
        "", "numbers of the weights; as the model was trained, if not given", choices=("", *DTYPES)
    )
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


def export_dtype(settings: ConvertSettings, saved: dict) -> torch.dtype:
    """What --dtype says, else what the model came in or was trained in."""
    known = {**DTYPES, "bfloat16": torch.bfloat16, "float16": torch.float16}
    args = saved.get("args") or {}
    for name in (settings.dtype, saved.get("dtype"), args.get("dtype")):
        if name in known:
            return known[name]
    return torch.float32


def export(settings: ConvertSettings) -> None:
    """Checkpoint → folder."""
    saved = lm.load_checkpoint(settings.ckpt, settings.base)
    if settings.rope_theta:
        saved["config"]["rope_theta"] = settings.rope_theta
    tokenizer = lm.tokenizer_of(saved, settings.spm, settings.ckpt)
    dtype = export_dtype(settings, saved)
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


def import_folder(settings: ConvertSettings) -> None:
    """Folder → checkpoint."""
    folder, out = Path(settings.reverse), Path(settings.out)
    if out.exists():
        raise lm.UserError(f"{out} exists already", "name another --out")
    saved = lm.import_model(folder, settings.spm)
    tokenizer = lm.tokenizer_of(saved, "", folder)
    model = lm.build_model(saved, torch.device("cpu"))
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
