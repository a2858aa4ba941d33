"""The converter: parity with transformers' logits and SentencePiece's ids, and folders all whole.

Tokenizers and models are made here. `spelled` builds SentencePiece models piece by piece, so that
the order of merges is tried on tables that no training would give.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
import sentencepiece
import torch
import transformers
from conftest import documents
from hypothesis import example, given, settings
from hypothesis import strategies as st

import convert_to_llama as converter
import standalone_transformer_lm as lm
import test_llama_model as script

TOLERANCE = 1e-4
SHAPES = {
    "tied, one key head": {"n_kv_head": 1},
    "untied, grouped": {"tie": False, "n_kv_head": 2, "rope_theta": 5e5},
    "as many key heads": {"ffn_mult": 4.0, "norm_eps": 1e-5},
    "its own head size": {"head_dim": 24, "n_kv_head": 2, "tie": False},
}
FILES = """README.md chat_template_train.jinja config.json generation_config.json tokenizer.json
tokenizer.model tokenizer_config.json""".split()
CHAT = [
    {"role": "system", "content": " Be brief.\n"},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "Very well:  2 + 2 = 4 🙂 "},
    {"role": "user", "content": "\n\tand then?"},
    {"role": "assistant", "content": "5"},
]
LLAMA = {
    "vocab_size": 410,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


# ---- Models ----


def model_of(vocab_size, **shape):
    """A small model whose weights are all far from their initial values."""
    plain = {"seq_len": 40, "n_layer": 2, "d_model": 64, "n_head": 4, "ffn_mult": 2.5}
    model = lm.Transformer(lm.ModelSettings(vocab_size=vocab_size, **{**plain, **shape})).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * 0.3 + (weight.dim() == 1))
    return model


def save(path, model, tokenizer=None, **changes):
    """A checkpoint as a trainer writes it."""
    lm.save_checkpoint(
        path,
        {
            "format": lm.CHECKPOINT_FORMAT,
            "kind": "train",
            "step": 3,
            "samples": 24,
            "best_val": math.inf,
            "model": model.state_dict(),
            "config": dataclasses.asdict(model.config),
            "tokenizer": tokenizer,
            **changes,
        },
    )
    return path


def random_ids(model, rows=2):
    """Without <s>, which would begin another document of a model with doc_mask."""
    return torch.randint(2, model.config.vocab_size, (rows, model.config.seq_len))


@torch.no_grad()
def difference(folder, model):
    """The largest difference between transformers' logits of `folder` and ours."""
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = random_ids(model)
    return float((hf(ids).logits - model(ids)).abs().max())


def call(main, *argv):
    """(exit code, stdout, stderr) of a script's main in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in argv])
    return code, out.getvalue(), err.getvalue()


def convert(*argv):
    """Run the converter, which must succeed; what it printed."""
    code, out, err = call(converter.main, *argv)
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return lm.Tokenizer(tiny_tokenizer)


@pytest.fixture(scope="module")
def model(tokenizer):
    return model_of(tokenizer.vocab_size, n_kv_head=2)


@pytest.fixture(scope="module")
def ckpt(model, tokenizer, tmp_path_factory):
    return save(tmp_path_factory.mktemp("run") / "ckpt_best.pt", model, tokenizer.data)


@pytest.fixture(scope="module")
def folder(ckpt, tmp_path_factory):
    """A converted folder, for tests that only read it."""
    out = tmp_path_factory.mktemp("hf") / "model"
    convert("--ckpt", ckpt, "--out", out)
    return out


@pytest.fixture(scope="module")
def auto(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_greedy_tokens_agree(shape, tokenizer, tmp_path):
    model = model_of(tokenizer.vocab_size + 6, **SHAPES[shape])  # a padded vocabulary too
    out = tmp_path / "hf"
    said = convert("--ckpt", save(tmp_path / "a.pt", model, tokenizer.data), "--out", out)
    assert "verified" in said and len(said.splitlines()) == 1
    assert difference(out, model) <= TOLERANCE
    hf = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert set(os.listdir(out)) == {*FILES, "model.safetensors"}
    ids = torch.tensor([[tokenizer.bos, *tokenizer.encode("The quiet harbour")]])
    theirs = hf.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20
    )[0, ids.shape[1] :].tolist()
    greedy = lm.SamplingSettings(max_new_tokens=20, temperature=0)
    assert lm.complete(model, ids.tolist(), greedy, 0, frozenset({2}))[0] == theirs


FAMILIES = {  # name: (the architecture that holds it, settings)
    "linear": ("LlamaForCausalLM", {"rope_scaling": "linear", "rope_factor": 2.0}),
    "yarn": ("LlamaForCausalLM", {"rope_scaling": "yarn", "rope_factor": 4.0, "tie": False}),
    "embed_scale": ("LlamaForCausalLM", {"embed_scale": True, "n_kv_head": 2}),
    "doc_mask": ("LlamaForCausalLM", {"doc_mask": True, "trunc_init": True}),
    "qk_norm": ("Qwen3ForCausalLM", {"qk_norm": True, "n_kv_head": 2}),
    "qk_norm window": (
        "Qwen3ForCausalLM",
        {"qk_norm": True, "window": 7, "full_every": 2, "n_layer": 4},
    ),
    "qkv_bias": ("Qwen2ForCausalLM", {"qkv_bias": True, "n_kv_head": 2}),
    "qkv_bias window": ("Qwen2ForCausalLM", {"qkv_bias": True, "window": 7, "full_first": 1}),
    "qk_norm, full first": ("Qwen3ForCausalLM", {"qk_norm": True, "window": 7, "full_first": 1}),
    "llama3": (
        "LlamaForCausalLM",
        {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_high": 3.0, "rope_theta": 5e5},
    ),
    "nope_every": ("SmolLM3ForCausalLM", {"nope_every": 2, "n_layer": 4, "embed_scale": True}),
    "window": ("MistralForCausalLM", {"window": 7, "n_kv_head": 2, "tie": False}),
    "n_expert": ("MixtralForCausalLM", {"n_expert": 3, "n_kv_head": 2, "tie": False}),
    "n_expert qk_norm": (
        "Qwen3MoeForCausalLM",
        {"n_expert": 4, "n_expert_active": 3, "qk_norm": True, "n_kv_head": 2},
    ),
}
REFUSED = {
    "n_sink": {"n_sink": 2},
    "softcap": {"softcap": 5.0},
    "nope_every, --qk_norm": {"nope_every": 2, "qk_norm": True},
    "full_every, --window": {"window": 8, "full_every": 2},
    "n_expert, --nope_every": {"n_expert": 4, "nope_every": 2},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_agrees_and_comes_back(name, tokenizer, tmp_path):
    """Logits to 1e-4 and 50 greedy tokens, as the converter verifies, and the way back."""
    architecture, shape = FAMILIES[name]
    model = model_of(tokenizer.vocab_size, **{"seq_len": 80, **shape})
    ckpt = save(tmp_path / "a.pt", model, tokenizer.data)
    said = convert("--ckpt", ckpt, "--out", tmp_path / "hf")
    assert architecture in said and "verified" in said
    assert json.loads((tmp_path / "hf/config.json").read_text())["architectures"] == [architecture]
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert type(hf).__name__ == architecture
    assert difference(tmp_path / "hf", model) <= TOLERANCE
    prompt = torch.tensor([[tokenizer.bos, *tokenizer.encode("The quiet harbour")]])
    theirs = hf.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=50
    )[0, prompt.shape[1] :].tolist()
    greedy = lm.SamplingSettings(max_new_tokens=50, temperature=0)
    assert lm.complete(model, prompt.tolist(), greedy, 0, frozenset({2}))[0] == theirs
    convert("--reverse", tmp_path / "hf", "--out", tmp_path / "back.pt")
    back = lm.build_model(lm.load_checkpoint(tmp_path / "back.pt"), torch.device("cpu"))
    ids = random_ids(model)
    with torch.no_grad():
        torch.testing.assert_close(back(ids), model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flags", REFUSED)
def test_what_no_architecture_holds_is_refused_by_its_flag(flags, tokenizer, tmp_path):
    ckpt = save(tmp_path / "a.pt", model_of(tokenizer.vocab_size, **REFUSED[flags]), tokenizer.data)
    code, _, err = call(converter.main, "--ckpt", ckpt, "--out", tmp_path / "hf")
    assert code == 2 and f"--{flags}" in err and not (tmp_path / "hf").exists()


def test_config_says_what_the_model_is(folder, model, tokenizer):
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.num_key_value_heads, config.head_dim, config.max_position_embeddings) == (
        model.config.kv_heads,
        model.config.head_size,
        model.config.seq_len,
    )
    generation = transformers.GenerationConfig.from_pretrained(folder)
    assert (
        (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id)
        == (tokenizer.bos, tokenizer.eos, tokenizer.pad)
        == (1, 2, 3)
    )


def interleaved(qkv, config):
    """The rows of a half-split projection where the original program has them."""
    rows = []
    for head in range(config.n_head + config.kv_heads):
        start, half = head * config.head_size, config.head_size // 2
        rows += [start + half * (i % 2) + i // 2 for i in range(2 * half)]
    return qkv[rows + list(range(len(rows), len(qkv)))]


@pytest.mark.parametrize("tie", [True, False])
def test_checkpoint_of_the_original_program_converts(tie, tokenizer, tmp_path):
    model = model_of(tokenizer.vocab_size, tie=tie)
    weights = {
        "_orig_mod." + name: interleaved(w, model.config) if "qkv" in name else w
        for name, w in model.state_dict().items()
    }
    c = model.config
    config = {
        "vocab_size": c.vocab_size,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "d_model": c.d_model,
        "ffn_mult": c.ffn_mult,
        "max_seq_len": c.seq_len,
        "dropout": 0.1,
    }
    torch.save({"model": weights, "config": config, "optim": {}, "scaler": {}}, tmp_path / "old.pt")
    (tmp_path / "t.model").write_bytes(tokenizer.data)
    convert(
        "--ckpt", tmp_path / "old.pt", "--tokenizer", tmp_path / "t.model", "--out", tmp_path / "hf"
    )
    assert difference(tmp_path / "hf", model) <= TOLERANCE
    code, _, err = call(converter.main, "--ckpt", tmp_path / "old.pt", "--out", tmp_path / "x")
    assert code == 2 and "--tokenizer" in err


def test_rope_theta_overrides_the_checkpoint(model, ckpt, tmp_path):
    convert("--ckpt", ckpt, "--out", tmp_path / "hf", "--rope_theta", "500000")
    other = model_of(model.config.vocab_size, n_kv_head=2, rope_theta=5e5)
    assert difference(tmp_path / "hf", other) <= TOLERANCE
    assert difference(tmp_path / "hf", model) > 100 * TOLERANCE


# ---- Token ids ----


def hostile_text():
    """Text of what tokenizers stumble over: runs, mixed scripts, control characters, symbols."""
    words = st.sampled_from(
        [
            "a",
            "aa",
            "ab",
            "the",
            "The",
            " ",
            "  ",
            "\n",
            "\t",
            "\r\n",
            "\0",
            "-",
            "=",
            "....",
            "1",
            "\u2581",
            "\u2581\u2581",
            "é",
            "e\u0301",
            "東京",
            "Zürich",
            "🙂",
            "👩\u200d👧",
            "\u00a0",
            "\u3000",
            "\u2028",
            "\x85",
            "\ufeff",
            "<s>",
            "</s>",
            "<|user|>",
            "<unk>",
            "<0x41>",
            "<",
        ]
    )
    runs = st.builds(str.__mul__, words, st.integers(1, 30))
    mixed = st.lists(words | runs | st.text(max_size=4), max_size=12).map("".join)
    return mixed | st.text(max_size=40)


def same_ids(auto, tokenizer, text):
    """Without its matching of control symbols, AutoTokenizer gives SentencePiece's ids."""
    ids = auto(text, split_special_tokens=True).input_ids
    assert ids == [tokenizer.bos, *tokenizer.encode(text)], repr(text)


@given(text=hostile_text())
@settings(max_examples=400)
@example("")
@example(" ")
@example("a" * 999)
def test_token_ids_of_hostile_text_are_the_same(auto, tokenizer, text):
    same_ids(auto, tokenizer, text)
    assert auto.decode(auto(text, split_special_tokens=True).input_ids[1:]) == tokenizer.decode(
        tokenizer.encode(text)
    )


def test_token_ids_of_a_corpus_are_the_same(auto, tokenizer):
    texts = list(documents(200, seed=9))
    for text in [*texts, "\n".join(texts)]:
        same_ids(auto, tokenizer, text)
        assert auto(text).input_ids == [tokenizer.bos, *tokenizer.encode(text)]


def test_text_that_spells_unk_stays_text(auto, tokenizer):
    """WikiText is full of it; with byte fallback no id of it is ever wanted."""
    text = "the <unk> of <unk><unk> and<unk>"
    assert auto(text).input_ids == [tokenizer.bos, *tokenizer.encode(text)]
    assert auto.unk_token is None


def test_text_that_spells_a_control_symbol(auto, tokenizer):
    """It becomes the symbol in every AutoTokenizer, unless that is switched off."""
    text = "a <|user|> b"
    assert tokenizer.roles["user"] in auto(text).input_ids
    assert tokenizer.roles["user"] not in auto(text, split_special_tokens=True).input_ids


def varint(number):
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def field(number, value):
    """A protobuf field: an int, bytes or a float."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def spelled(words, letters, dummy_prefix):
    """A tokenizer.model of these longer pieces, best first, and of single letters."""
    scored = [*words, *letters]
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [(text, -float(rank), 1) for rank, text in enumerate(scored)]
    data = b"".join(
        field(1, field(1, text.encode()) + field(2, score) + field(3, kind))
        for text, score, kind in pieces
    )
    normalizer = field(1, b"identity") + field(3, int(dummy_prefix)) + field(4, 0)
    return data + field(2, field(3, 2) + field(35, 1)) + field(3, normalizer)


def fast_tokenizer(data):
    """The tokenizer.json of a model, loaded, that matches no control symbol in text."""
    from tokenizers import Tokenizer

    pieces = converter.read_piece_model(data)
    fast = Tokenizer.from_str(json.dumps(converter.tokenizer_json(pieces, 1)))
    fast.encode_special_tokens = True
    return fast


@given(
    words=st.lists(st.text("ab\u2581", min_size=2, max_size=7), max_size=20, unique=True),
    dummy_prefix=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=250)
@example(words=["aa", "aaa", "aaaa"], dummy_prefix=False, seed=0)
@example(words=["ab", "ba", "aba", "bab"], dummy_prefix=False, seed=0)
def test_any_table_of_pieces_merges_alike(words, dummy_prefix, seed):
    data = spelled(words, "ab\u2581", dummy_prefix)
    sp, fast = sentencepiece.SentencePieceProcessor(model_proto=data), fast_tokenizer(data)
    rng = random.Random(seed)
    for length in (1, 2, 3, 5, 8, 20, 50):
        text = "".join(rng.choice("ab ") for _ in range(length))
        for each in (text, text[0] * length):
            assert fast.encode(each, add_special_tokens=False).ids == sp.encode(each), each


def trained(**options):
    """A SentencePiece model with other options than prep's."""
    model = io.BytesIO()
    plain = {"model_type": "bpe", "vocab_size": 420, "byte_fallback": True, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=documents(300, seed=2), model_writer=model, **{**plain, **options}
    )
    return model.getvalue()


IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
IMPORTED = {
    "LLaMA": {**IDENTITY, "allow_whitespace_only_pieces": True, "split_digits": True},
    "no dummy prefix": {**IDENTITY, "add_dummy_prefix": False},
    "SentencePiece's own defaults": {},
    "no bytes": {**IDENTITY, "byte_fallback": False, "vocab_size": 160},
    "user symbols": {**IDENTITY, "user_defined_symbols": ["\u2581\u2581", "<sep>", "<|user|>"]},
}


@pytest.mark.parametrize("kind", IMPORTED)
def test_token_ids_of_imported_tokenizers_are_the_same(kind):
    data = trained(**IMPORTED[kind])
    sp, fast = sentencepiece.SentencePieceProcessor(model_proto=data), fast_tokenizer(data)
    hostile = [
        "",
        " ",
        "a  b   c",
        "  x ",
        "aaaa----    ",
        "<sep><sep>  <|user|>a<sep>",
        "東 🙂",
        "tab\tnew\nline",
        "ﬁ ① é",
        "  <sep> \u2581\u2581 b",
    ]
    for text in itertools.chain(hostile, documents(100, seed=4)):
        assert fast.encode(text, add_special_tokens=False).ids == sp.encode(text), repr(text)


def test_pieces_of_equal_score_are_counted():
    data = spelled(["ab", "ba"], "ab", False)
    pieces = converter.read_piece_model(data)
    assert converter.tied_scores(pieces) == 0
    equal = [p._replace(score=-1.0) if len(p.text) == 2 else p for p in pieces.pieces]
    assert converter.tied_scores(dataclasses.replace(pieces, pieces=equal)) == 1


def test_tokenizer_without_words_in_json_is_refused():
    data = trained(model_type="unigram", vocab_size=400, treat_whitespace_as_suffix=True)
    with pytest.raises(lm.UserError, match=r"not a BPE model; .*treat_whitespace_as_suffix"):
        converter.tokenizer_json(converter.read_piece_model(data), 1)


# ---- Chat ----


def conversation(tokenizer, turns, prompt):
    """Ids and loss mask of a conversation, from its definition."""
    ids, mask = [tokenizer.bos], [0]
    for turn in turns:
        answer = [*tokenizer.encode(turn["content"]), tokenizer.eos]
        ids += [tokenizer.roles[turn["role"]], *answer]
        mask += [0] + [int(turn["role"] == "assistant")] * len(answer)
    return (ids + [tokenizer.roles["assistant"]], mask + [0]) if prompt else (ids, mask)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("turns", [1, 2, 3, 5])
def test_chat_template_gives_the_conversations_ids(auto, folder, tokenizer, turns, prompt):
    plain = auto.apply_chat_template(
        CHAT[:turns], tokenize=True, add_generation_prompt=prompt, return_dict=False
    )
    parts = [
        {**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in CHAT[:turns]
    ]
    assert plain == auto.apply_chat_template(
        parts, tokenize=True, add_generation_prompt=prompt, return_dict=False
    )
    got = auto.apply_chat_template(
        CHAT[:turns],
        chat_template=(folder / "chat_template_train.jinja").read_text(),
        tokenize=True,
        add_generation_prompt=prompt,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    wanted = conversation(tokenizer, CHAT[:turns], prompt)
    assert (got["input_ids"], got["assistant_masks"]) == wanted
    assert plain == wanted[0]


def test_chat_template_refuses_an_unknown_role(auto):
    with pytest.raises(Exception, match="there is no role narrator"):
        auto.apply_chat_template([{"role": "narrator", "content": "Once"}])


def test_chat_template_spells_tools_as_training_does(auto, folder, tiny_tokenizer):
    call = {"function": {"name": "f", "arguments": {"x": "é"}}}
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "Hello."},
    ]
    told = auto.apply_chat_template(
        chat,
        chat_template=(folder / "chat_template_train.jinja").read_text(),
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenize=True,
    )
    ids, learned = lm.encode_chat(lm.Tokenizer(tiny_tokenizer), lm.conversation({"messages": chat}))
    assert told["input_ids"] == ids
    assert [bool(mark) for mark in told["assistant_masks"]] == learned
    assert auto.apply_chat_template(chat, return_dict=False) == ids


def test_chat_template_is_read_by_plain_jinja(folder, tokenizer):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = jinja2.Environment().from_string(config["chat_template"])
    text = template.render(messages=CHAT, bos_token="<s>", eos_token="</s>")
    assert text.startswith("<s><|system|> Be brief.\n</s><|user|></s><|assistant|>Very well")


def test_a_padded_batch_generates_as_its_rows_do(folder, tokenizer, auto):
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = ["The quiet harbour", "The"]
    more = {"do_sample": False, "max_new_tokens": 6}
    batch = hf.generate(**auto(texts, return_tensors="pt", padding=True), **more)[:, -6:]
    for text, row in zip(texts, batch, strict=True):
        alone = hf.generate(**auto(text, return_tensors="pt"), **more)[0, -6:]
        assert torch.equal(row, alone)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_are_written_in_another_dtype(ckpt, tmp_path, dtype):
    assert "verified" in convert("--ckpt", ckpt, "--out", tmp_path / "hf", "--dtype", dtype)
    weights = lm.read_weights(tmp_path / "hf")
    assert {weights[name].dtype for name in weights} == {converter.DTYPES[dtype]}
    convert("--reverse", tmp_path / "hf", "--out", tmp_path / "back.pt")
    convert("--ckpt", tmp_path / "back.pt", "--out", tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_large_models_are_written_in_shards(ckpt, model, tmp_path, monkeypatch):
    monkeypatch.setattr(converter, "SHARD_BYTES", 60_000)
    assert "verified" in convert("--ckpt", ckpt, "--out", tmp_path / "hf")
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 130_000 for file in files)
    assert difference(tmp_path / "hf", model) <= TOLERANCE
    convert("--ckpt", ckpt, "--out", tmp_path / "hf")


def test_a_reward_model_is_exported_to_score(tokenizer, tmp_path):
    judge = model_of(tokenizer.vocab_size, n_kv_head=2, scalar_head=True)
    ckpt = save(tmp_path / "a.pt", judge, tokenizer.data, kind="reward")
    told = convert("--ckpt", ckpt, "--out", tmp_path / "hf")
    assert "LlamaForSequenceClassification" in told and "scores and token ids are the same" in told


def test_a_reward_model_comes_in_from_score(tokenizer, tmp_path):
    judge = model_of(tokenizer.vocab_size, n_kv_head=2, scalar_head=True, tie=False)
    torch.nn.init.normal_(judge.score.weight)
    ckpt = save(tmp_path / "a.pt", judge, tokenizer.data, kind="reward")
    convert("--ckpt", ckpt, "--out", tmp_path / "hf")
    machine = lm.Machine(torch.device("cpu"), torch.float32)
    chats = [[lm.Turn("user", "The quiet?"), lm.Turn("assistant", word)] for word in ("a", "bcd")]
    found = []
    for place in (ckpt, tmp_path / "hf"):
        model, own = lm.open_judge(place, "", machine)
        found.append(lm.score_answers(model, own, chats, 2, machine))
    assert found[0] == pytest.approx(found[1], abs=1e-5) and found[0][0] != found[0][1]
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config |= {"id2label": {"0": "a", "1": "b"}}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(lm.UserError, match="2 labels"):
        lm.open_judge(tmp_path / "hf", "", machine)


def test_the_card_tells_of_the_model_and_is_kept_where_somebody_wrote_it(ckpt, tmp_path):
    convert("--ckpt", ckpt, "--out", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| architecture | LlamaForCausalLM |" in card and "| steps | 3 |" in card
    (tmp_path / "hf" / "README.md").write_text("mine")
    convert("--ckpt", ckpt, "--out", tmp_path / "hf")
    assert (tmp_path / "hf" / "README.md").read_text() == "mine"


def test_tokenizer_without_roles_spells_chats_as_text(tmp_path):
    data = trained(**IMPORTED["LLaMA"])
    tokenizer = lm.Tokenizer(data)
    converter.write_tokenizer(tmp_path, tokenizer, 64)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert auto.pad_token == auto.eos_token
    turns = [(turn["role"], turn["content"]) for turn in CHAT]
    for count in (2, 4):
        asked = auto.apply_chat_template(
            CHAT[:count], add_generation_prompt=True, return_dict=False
        )
        assert lm.encode_chat(tokenizer, turns[:count], reply=True)[0] == asked
    ids, learned = lm.encode_chat(tokenizer, turns)
    assert ids == auto.apply_chat_template(CHAT, return_dict=False)
    assert tokenizer.decode([i for i, one in zip(ids, learned, strict=True) if one]).endswith("5")
    assert auto("two words").input_ids == [tokenizer.bos, *tokenizer.encode("two words")]


# ---- The way back ----


def test_reverse_gives_the_checkpoint_back(model, tokenizer, folder, tmp_path):
    convert("--reverse", folder, "--out", tmp_path / "back.pt")
    back = lm.load_checkpoint(tmp_path / "back.pt")
    assert back["tokenizer"] == tokenizer.data
    old, new = model.config, lm.ModelSettings(**back["config"])
    for name in ("seq_len", "kv_heads", "head_size", "ffn_width", "tie", "rope_theta", "norm_eps"):
        assert getattr(old, name) == getattr(new, name), name
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, back["model"][name]), name
    convert("--ckpt", tmp_path / "back.pt", "--out", tmp_path / "again")
    for name in {*os.listdir(folder)} - {"README.md"}:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


@pytest.mark.parametrize(
    "changes", [{}, {"head_dim": 16, "num_key_value_heads": 4}, {"tie_word_embeddings": True}]
)
@pytest.mark.parametrize("form", ["whole", "sharded", "bin"])
def test_llama_of_transformers_is_imported(changes, form, tokenizer, tmp_path):
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **changes})).eval()
    hf.save_pretrained(tmp_path / "hf", max_shard_size="50KB" if form == "sharded" else "5GB")
    (tmp_path / "hf" / "tokenizer.model").write_bytes(tokenizer.data)
    if form == "bin":
        (tmp_path / "hf" / "model.safetensors").unlink()
        torch.save(hf.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
    assert (form == "sharded") == (tmp_path / "hf" / "model.safetensors.index.json").exists()
    convert("--reverse", tmp_path / "hf", "--out", tmp_path / "a.pt")
    model = lm.build_model(lm.load_checkpoint(tmp_path / "a.pt"), torch.device("cpu"))
    ids = random_ids(model)
    with torch.no_grad():
        assert float((hf(ids).logits - model(ids)).abs().max()) <= TOLERANCE


@pytest.fixture
def foreign(folder, tmp_path):
    """A copy of the converted folder with changes to its config.json."""

    def copy(remove=(), **config):
        (tmp_path / "hf").mkdir()
        for path in folder.iterdir():
            if path.name not in remove:
                (tmp_path / "hf" / path.name).write_bytes(path.read_bytes())
        config = {**json.loads((folder / "config.json").read_text()), **config}
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
        return tmp_path / "hf"

    return copy


@pytest.mark.parametrize(
    "config",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"pretraining_tp": 2},
        {"model_type": "gpt2"},
        {"hidden_size": None},
        {"quantization_config": {"bits": 4}},
        {"sliding_window": 128},
    ],
)
def test_reverse_names_what_our_model_cannot_hold(config, foreign, tmp_path):
    code, _, err = call(converter.main, "--reverse", foreign(**config), "--out", tmp_path / "a.pt")
    assert code == 2 and next(iter(config)) in err and "fix: " in err
    assert not (tmp_path / "a.pt").exists()


def test_reverse_names_every_fault_at_once(foreign, tmp_path):
    hf = foreign(attention_bias=True, rope_parameters={"rope_type": "longrope", "factor": 4.0})
    code, _, err = call(converter.main, "--reverse", hf, "--out", tmp_path / "a.pt")
    assert code == 2 and "attention_bias" in err and "rope_scaling is of type 'longrope'" in err


@pytest.mark.parametrize(
    ("remove", "sentence"),
    [
        (["tokenizer.model", "tokenizer.json"], "has neither tokenizer.model nor tokenizer.json"),
        (["model.safetensors"], "has no weights"),
    ],
)
def test_reverse_names_what_a_folder_lacks(remove, sentence, foreign, tmp_path):
    code, _, err = call(
        converter.main, "--reverse", foreign(remove=remove), "--out", tmp_path / "a.pt"
    )
    assert code == 2 and sentence in err


def test_reverse_names_strange_and_damaged_weights(foreign, tmp_path):
    hf = foreign(num_hidden_layers=3)
    code, _, err = call(converter.main, "--reverse", hf, "--out", tmp_path / "a.pt")
    assert code == 2 and "it lacks model.layers.2." in err and " and 6 more" in err
    whole = (hf / "model.safetensors").read_bytes()
    (hf / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    code, _, err = call(converter.main, "--reverse", hf, "--out", tmp_path / "a.pt")
    assert code == 2 and "model.safetensors is damaged" in err


# ---- Folders ----


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError])
def test_conversion_that_does_not_end_leaves_nothing(fault, ckpt, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise fault("here")

    monkeypatch.setattr(converter, "verify", stop)
    with contextlib.suppress(RuntimeError):
        assert call(converter.main, "--ckpt", ckpt, "--out", tmp_path / "hf")[0] == 130
    assert not list(tmp_path.iterdir())


def test_kill_during_a_conversion_leaves_no_folder_of_its_name(ckpt, tmp_path):
    code = (
        "import os, sys; import convert_to_llama as c; c.verify = lambda *a, **k: os._exit(9);"
        "c.main(sys.argv[1:])"
    )
    argv = [sys.executable, "-c", code, "--ckpt", str(ckpt), "--out", str(tmp_path / "hf")]
    done = subprocess.run(argv, cwd=Path(converter.__file__).parent, capture_output=True)
    assert done.returncode == 9
    assert not (tmp_path / "hf").exists()


def test_wrong_logits_are_an_error(ckpt, tmp_path, monkeypatch):
    right = lm.to_family

    def wrong(*args):
        weights = right(*args)
        weights["model.norm.weight"] = weights["model.norm.weight"] * 1.01
        return weights

    monkeypatch.setattr(lm, "to_family", wrong)
    with pytest.raises(RuntimeError, match="logits differ"):
        call(converter.main, "--ckpt", ckpt, "--out", tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_wrong_token_ids_are_an_error(ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr(converter, "merges", lambda pieces: [])
    with pytest.raises(RuntimeError, match=r"tokenizer\.json encodes"):
        call(converter.main, "--ckpt", ckpt, "--out", tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_only_a_conversion_is_replaced(ckpt, tmp_path):
    out = tmp_path / "hf"
    convert("--ckpt", ckpt, "--out", out)
    convert("--ckpt", ckpt, "--out", out)
    (out / "notes.txt").write_text("mine")
    code, _, err = call(converter.main, "--ckpt", ckpt, "--out", out)
    assert code == 2 and "holds other things" in err
    assert (out / "notes.txt").exists() and list(tmp_path.iterdir()) == [out]
    code, _, err = call(converter.main, "--reverse", out, "--out", ckpt)
    assert code == 2 and "exists already" in err


def without(monkeypatch, *packages):
    """As if these were not installed."""
    found = converter.find_spec
    monkeypatch.setattr(converter, "find_spec", lambda n: None if n in packages else found(n))


def test_conversion_without_the_optional_packages(ckpt, model, tmp_path, monkeypatch):
    without(monkeypatch, "transformers", "safetensors")
    said = convert("--ckpt", ckpt, "--out", tmp_path / "hf")
    assert "safetensors is not installed" in said and "not verified" in said
    assert set(os.listdir(tmp_path / "hf")) == {*FILES, "pytorch_model.bin"}
    monkeypatch.undo()
    assert difference(tmp_path / "hf", model) <= TOLERANCE


def test_folder_loads_without_sentencepiece_and_protobuf(folder, tokenizer):
    texts = [*documents(20, seed=5), "", "  \n\taaaa 🙂"]
    code = """if True:
        import json, sys
        from importlib.machinery import PathFinder
        find = PathFinder.find_spec
        def find_others(name, path=None, target=None):
            hidden = name.split(".")[0] == "sentencepiece" or name.startswith("google.protobuf")
            return None if hidden else find(name, path, target)
        PathFinder.find_spec = staticmethod(find_others)
        from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
        print(json.dumps([tokenizer(text).input_ids for text in json.loads(sys.argv[2])]))"""
    argv = [sys.executable, "-c", code, str(folder), json.dumps(texts)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[tokenizer.bos, *tokenizer.encode(t)] for t in texts]


# ---- The user's mistakes ----


def test_faults_are_told_together():
    code, _, err = call(converter.main, "--rope_theta", "-1", "--spam", "x")
    assert code == 2
    for sentence in ("--ckpt is missing", "--out is missing", "--rope_theta", "--spam"):
        assert sentence in err
    assert call(converter.main, "--ckpt", "no.pt", "--out", "x")[0] == 2
    code, _, err = call(converter.main, "--ckpt", "a", "--reverse", "b", "--out", "c")
    assert code == 2 and "both given" in err


def test_help_names_this_script(capsys):
    for main, name in ((converter.main, "convert_to_llama"), (script.main, "test_llama_model")):
        with pytest.raises(SystemExit):
            main(["--help"])
        assert f"usage: {name}.py" in capsys.readouterr().out


def test_options_beyond_llama_are_refused_by_name():
    @dataclasses.dataclass
    class Wider(lm.ModelSettings):
        window_of_tests: int = lm.setting(0, "none of the program's")

    assert lm.family_of(Wider()).architecture == "LlamaForCausalLM"
    with pytest.raises(lm.UserError, match="--window_of_tests"):
        lm.family_of(Wider(window_of_tests=8))


# ---- The user's script ----


def test_script_compares_and_generates(folder, ckpt):
    code, out, err = call(
        script.main, folder, "--ckpt", ckpt, "--prompt", "The quiet", "--max_new_tokens", "5"
    )
    assert code == 0, err
    assert "its logits agree with" in out and out.splitlines()[-1].startswith("The quiet")
    assert call(script.main, folder, "--temperature", "0", "--max_new_tokens", "5")[0] == 0


def test_script_names_mistakes(folder, tokenizer, tmp_path):
    code, _, err = call(script.main, tmp_path)
    assert code == 2 and "is no converted folder" in err
    other = save(tmp_path / "b.pt", model_of(tokenizer.vocab_size), tokenizer.data)
    code, _, err = call(script.main, folder, "--ckpt", other)
    assert code == 2 and "differ by" in err
    code, _, err = call(script.main, folder, "--prompt", "word " * 50)
    assert code == 2 and "fills the context" in err


# ---- Folders that lie ----


@pytest.mark.parametrize("name", ["../x.safetensors", "/dev/zero", "a/b.safetensors", 3, ""])
def test_an_index_may_name_files_of_its_own_folder_alone(tmp_path, name):
    index = {"weight_map": {"model.norm.weight": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(lm.UserError, match="no file of its folder"):
        lm.read_weights(tmp_path)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', "[]"])
def test_a_malformed_index_is_a_sentence(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(lm.UserError):
        lm.read_weights(tmp_path)


@pytest.mark.parametrize("content", [[1], {"a": 1}])
def test_a_bin_that_holds_no_tensors_is_a_sentence(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(lm.UserError, match="no dict of tensors"):
        lm.read_weights(tmp_path)


HOSTILE = (None, "", "text", -1, 0, 1.5, True, [], ["x"], [1], {}, {"rope_type": 3}, 10**6, 1e400)


@pytest.mark.slow
def test_any_value_in_config_json_is_read_or_told_in_a_sentence(foreign, tmp_path):
    """Every key that is read, with every kind of value: no traceback, and no checkpoint of it."""
    hf = foreign()
    whole = json.loads((hf / "config.json").read_text())
    told = 0
    for key in [*whole, "rope_scaling", "layer_types", "sliding_window", "no_such_key"]:
        for value in HOSTILE:
            (hf / "config.json").write_text(json.dumps({**whole, key: value}))
            code, _, err = call(converter.main, "--reverse", hf, "--out", tmp_path / "a.pt")
            assert code in (0, 2) and "Traceback" not in err, (key, value, err)
            assert (code == 0) == (tmp_path / "a.pt").exists(), (key, value)
            (tmp_path / "a.pt").unlink(missing_ok=True)
            told += code == 2
    assert told > 100


@pytest.mark.parametrize("family", lm.FAMILIES, ids=lambda family: family.model_type)
def test_a_family_names_the_keys_that_it_misses(family, foreign, tmp_path):
    hf = foreign(model_type=family.model_type, layer_types=[1], no_rope_layers="1")
    code, _, err = call(converter.main, "--reverse", hf, "--out", tmp_path / "a.pt")
    assert code == 2 and "layer_types is [1], not a list of text" in err
    assert "no_rope_layers is '1', not a list of whole numbers" in err
    (hf / "config.json").write_text(json.dumps({"model_type": family.model_type}))
    code, _, err = call(converter.main, "--reverse", hf, "--out", tmp_path / "a.pt")
    assert code == 2
    for key in (*lm.CONFIG_NEEDS[1:], *family.needs):
        assert f"{key.split('|')[0]} is missing" in err


def test_reverse_believes_the_weights_about_the_number_of_layers(foreign, tmp_path):
    hf = foreign(num_hidden_layers=10_000)
    code, _, err = call(converter.main, "--reverse", hf, "--out", tmp_path / "a.pt")
    assert code == 2 and "num_hidden_layers 10000, the weights have 2" in err


def test_adapters_are_exported_with_a_base_that_was_moved(ckpt, model, tokenizer, tmp_path):
    lora = lm.LoraSettings(lora_rank=2)
    adapted = model_of(tokenizer.vocab_size, n_kv_head=2)
    lm.attach_lora(adapted, lora, 0)
    weights = {n: w for n, w in adapted.state_dict().items() if "lora" in n}
    weights = {n: torch.full_like(w, 0.05) for n, w in weights.items()}
    fields = {"base": "gone.pt", "key": lm.model_key(lm.load_checkpoint(ckpt)), "scale": 0.5}
    adapters = tmp_path / "adapters" / "ckpt_last.pt"
    adapters.parent.mkdir()
    lm.save_checkpoint(adapters, {**lm.read_checkpoint(ckpt), "model": weights, "lora": fields})
    code, _, err = call(converter.main, "--ckpt", adapters, "--out", tmp_path / "hf")
    assert code == 2 and "--base" in err
    convert("--ckpt", adapters, "--base", ckpt, "--out", tmp_path / "hf")
    merged = lm.build_model(lm.load_checkpoint(adapters, ckpt), torch.device("cpu"))
    assert difference(tmp_path / "hf", merged) <= TOLERANCE
    assert difference(tmp_path / "hf", model) > 100 * TOLERANCE


# ---- Upload ----


class Hub:
    """Stands in for huggingface_hub.HfApi."""

    def __init__(self, refuses=False):
        self.refuses = refuses
        self.done = []

    def create_repo(self, name, private, exist_ok):
        if self.refuses:
            raise RuntimeError("401 Client Error\nmore lines")
        self.done.append((name, private, exist_ok))

    def upload_folder(self, repo_id, folder_path):
        self.done.append((repo_id, sorted(os.listdir(folder_path))))

    def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
        assert os.path.exists(path_or_fileobj)
        self.done.append((repo_id, path_in_repo))


def test_push_uploads_what_was_written(ckpt, tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    told = convert("--ckpt", ckpt, "--out", tmp_path / "hf", "--push", "me/model")
    assert "https://huggingface.co/me/model" in told
    assert hub.done == [
        ("me/model", True, True),
        ("me/model", sorted(os.listdir(tmp_path / "hf"))),
    ]


def test_a_hub_that_refuses_costs_no_export(ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: Hub(refuses=True))
    argv = ["--ckpt", str(ckpt), "--out", str(tmp_path / "hf"), "--push"]
    assert converter.main([*argv, "me/model"]) == 2
    told = capsys.readouterr().err
    assert "401 Client Error" in told and "hf auth login" in told and "more lines" not in told
    assert (tmp_path / "hf" / "config.json").exists()
    assert converter.main([*argv, "model"]) == 2
    assert "USER/NAME" in capsys.readouterr().err
