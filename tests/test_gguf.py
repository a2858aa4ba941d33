"""GGUF: what is written is read back, by this program and, where it is installed, llama.cpp."""

import dataclasses
import importlib
import random

import pytest
import torch
from conftest import documents
from test_convert import call, convert, model_of, random_ids, save
from test_hf_tokenizers import save_hf

import convert_to_llama as converter
import standalone_transformer_lm as lm

gguf = pytest.importorskip("gguf")

ARCHITECTURES = {
    "llama": {"n_kv_head": 2},
    "llama, tied": {"tie": True, "head_dim": 24},
    "llama, llama3": {
        "rope_scaling": "llama3",
        "rope_factor": 8.0,
        "rope_original": 8192,
        "rope_theta": 5e5,
        "seq_len": 64,
    },
    "llama, yarn": {"rope_scaling": "yarn", "rope_factor": 2.0, "rope_original": 32},
    "llama, experts": {"n_expert": 4, "n_kv_head": 2},
    "qwen2": {"qkv_bias": True, "n_kv_head": 2},
    "qwen3": {"qk_norm": True, "n_kv_head": 2},
    "qwen3moe": {"qk_norm": True, "n_expert": 4, "ffn_hidden": 64},
    "smollm3": {"nope_every": 4, "n_layer": 4},
}


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return lm.Tokenizer(tiny_tokenizer)


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory):
    """`made(name)`: a checkpoint and its model."""

    def call(name):
        plain = {"tie": False, "seq_len": 64, "n_head": 4, "norm_eps": 1e-6}
        model = model_of(tokenizer.vocab_size, **plain | ARCHITECTURES[name])
        folder = tmp_path_factory.mktemp("gguf")
        return save(folder / "a.pt", model, tokenizer.data), model

    return call


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_written_is_read_back(made, name, tmp_path):
    ckpt, model = made(name)
    told = convert("--ckpt", ckpt, "--out", tmp_path / "m.gguf", "--format", "gguf")
    assert f": {name.split(',')[0]}, f32" in told
    convert("--reverse", tmp_path / "m.gguf", "--out", tmp_path / "back.pt")
    back = lm.load_checkpoint(tmp_path / "back.pt")
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, back["model"][key]), key
    config = lm.ModelSettings(**back["config"])
    for field in dataclasses.fields(config):
        if field.name not in ("ffn_mult", "ffn_hidden", "n_kv_head", "head_dim", "bos_id"):
            assert getattr(config, field.name) == getattr(model.config, field.name), field.name
    own = lm.make_tokenizer(back["tokenizer"])
    for text in documents(20, seed=3):
        assert own.prompt(text) == lm.Tokenizer(lm.load_checkpoint(ckpt)["tokenizer"]).prompt(text)
    assert own.roles and (tmp_path / "Modelfile").read_text().startswith("FROM ./m.gguf\n")


@pytest.mark.parametrize(
    ("quant", "most"), [("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 1e-2), ("q4_0", 0.2)]
)
def test_quantised_weights_are_near(made, quant, most, tmp_path):
    ckpt, model = made("llama")
    out = tmp_path / "m.gguf"
    convert("--ckpt", ckpt, "--out", out, "--format", "gguf", "--quant", quant)
    convert("--reverse", out, "--out", tmp_path / "back.pt")
    back = lm.load_checkpoint(tmp_path / "back.pt")["model"]
    for key, weight in model.state_dict().items():
        scale = weight.abs().max()
        assert float((weight - back[key]).abs().max() / scale) <= most, key


@pytest.mark.parametrize("kind", ["chatml", "llama3", "none"])
def test_byte_level_tokenizers_go_out_and_come_back(kind, tmp_path):
    folder = save_hf(tmp_path / "hf", kind)
    ours = lm.load_tokenizer(folder)
    model = model_of(410, tie=False)
    ckpt = save(tmp_path / "a.pt", model, ours.data)
    convert("--ckpt", ckpt, "--out", tmp_path / "m.gguf", "--format", "gguf")
    convert("--reverse", tmp_path / "m.gguf", "--out", tmp_path / "back.pt")
    back = lm.make_tokenizer(lm.load_checkpoint(tmp_path / "back.pt")["tokenizer"])
    assert (back.eos, back.opening, back.stops) == (ours.turn_end, ours.opening, ours.stops)
    for text in documents(20, seed=4):
        assert back.prompt(text) == ours.prompt(text)
    chat = [("user", "Hello 12"), ("assistant", "There.")]
    assert lm.encode_chat(back, chat) == lm.encode_chat(ours, chat)


def test_mistakes_are_sentences(made, tmp_path):
    ckpt, _ = made("llama")
    out = tmp_path / "m.gguf"
    for argv, word in (
        (["--ckpt", ckpt, "--out", tmp_path, "--format", "gguf"], "is a folder"),
        (["--ckpt", ckpt, "--out", out, "--quant", "q8_0"], "--quant is for --format gguf"),
        (["--ckpt", ckpt, "--out", out, "--format", "gguf", "--dtype", "bf16"], "--dtype is for"),
    ):
        code, _, err = call(converter.main, *argv)
        assert code == 2 and word in err, err
    convert("--ckpt", ckpt, "--out", out, "--format", "gguf")
    whole = out.read_bytes()
    rng = random.Random(5)
    for _ in range(40):
        data = bytearray(whole)
        at = rng.randrange(min(len(data), 20000))
        match rng.randrange(3):
            case 0:
                data = data[:at]
            case 1:
                data[at : at + 8] = rng.randbytes(8)
            case 2:
                data[at] ^= 1 << rng.randrange(8)
        out.write_bytes(data)
        (tmp_path / "back.pt").unlink(missing_ok=True)
        code, _, err = call(converter.main, "--reverse", out, "--out", tmp_path / "back.pt")
        assert code in (0, 2) and "Traceback" not in err, err


# ---- llama.cpp ----


@pytest.fixture
def llama_cpp():
    return pytest.importorskip("llama_cpp")


def greedy(llama, ids, count, stops):
    """What llama.cpp continues ids with."""
    llama.reset()
    found = []
    for token in llama.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        if token in stops or len(found) == count:
            break
        found.append(token)
    return found


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if "llama3" not in name])
def test_llama_cpp_computes_the_same(made, name, tmp_path, llama_cpp):
    ckpt, model = made(name)
    convert("--ckpt", ckpt, "--out", tmp_path / "m.gguf", "--format", "gguf")
    llama = llama_cpp.Llama(
        str(tmp_path / "m.gguf"), n_ctx=64, logits_all=True, verbose=False, n_threads=2
    )
    ids = random_ids(model, 1)[0, :40]
    llama.eval(ids.tolist())
    with torch.no_grad():
        ours = model(ids[None])[0]
    theirs = torch.tensor(llama.scores[:40])
    assert float((ours - theirs).abs().max() / ours.abs().max()) < 5e-3


def test_llama_cpp_has_the_same_ids_and_chats(made, tokenizer, tmp_path, llama_cpp):
    ckpt, _ = made("llama")
    convert("--ckpt", ckpt, "--out", tmp_path / "m.gguf", "--format", "gguf")
    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, verbose=False, vocab_only=True)
    for text in documents(60, seed=8):
        assert llama.tokenize(text.encode(), add_bos=True, special=False) == tokenizer.prompt(text)
    chat = [("user", "a b"), ("assistant", "c"), ("user", "d")]
    template = llama.metadata["tokenizer.chat_template"]
    form = importlib.import_module("llama_cpp.llama_chat_format")
    render = form.Jinja2ChatFormatter(template, eos_token="</s>", bos_token="<s>")
    text = render(messages=[{"role": role, "content": said} for role, said in chat]).prompt
    ids = llama.tokenize(text.encode(), add_bos=False, special=True)
    assert ids == lm.encode_chat(tokenizer, chat, reply=True)[0]
