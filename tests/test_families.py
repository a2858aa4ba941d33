"""Models in transformers' own format: logits, ids and a step of training, and out again."""

import json
import shutil

import pytest
import torch
from conftest import log_rows
from test_convert import LLAMA, call, convert, random_ids
from test_hf_tokenizers import save_hf
from test_lora import chat_rows, write_rows

import convert_to_llama as converter
import standalone_transformer_lm as lm

transformers = pytest.importorskip("transformers")

SHAPE = {**LLAMA, "vocab_size": 410, "max_position_embeddings": 256}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500000.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "rope_theta": 10000.0,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {  # name: (transformers' name, what its config has besides, kind of tokenizer)
    "Llama 1": ("Llama", {}, "none"),
    "Llama 3": ("Llama", {"rope_parameters": LLAMA3, "rope_theta": 500000.0}, "llama3"),
    "Llama, yarn": ("Llama", {"rope_parameters": YARN}, "none"),
    "Llama, dynamic": ("Llama", {"rope_parameters": DYNAMIC}, "none"),
    "Mistral": ("Mistral", {"sliding_window": 8, "head_dim": 16}, "mistral"),
    "Mistral, full": ("Mistral", {"sliding_window": None}, "mistral"),
    "Qwen2": ("Qwen2", {"use_sliding_window": False, "tie_word_embeddings": True}, "chatml"),
    "Qwen2, window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "base",
    ),
    "Qwen3": ("Qwen3", {"head_dim": 20, "tie_word_embeddings": True}, "chatml"),
    "Qwen3, window": (
        "Qwen3",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "chatml",
    ),
    "SmolLM2": ("Llama", {"tie_word_embeddings": True, "rope_theta": 100000.0}, "chatml"),
    "SmolLM3": ("SmolLM3", {"no_rope_layer_interval": 2, "pad_token_id": 0}, "chatml"),
    "Mixtral": ("Mixtral", EXPERTS, "mistral"),
    "Qwen3-MoE": (
        "Qwen3Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
        "chatml",
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(name)`: a folder as transformers saves it, and its model."""
    known = {}

    def call(name):
        if name not in known:
            family, more, kind = FAMILIES[name]
            config = getattr(transformers, f"{family}Config")(**{**SHAPE, **more})
            torch.manual_seed(1)
            hf = getattr(transformers, f"{family}ForCausalLM")(config).eval()
            with torch.no_grad():
                for weight in hf.parameters():
                    weight.add_(torch.randn(weight.shape) * 0.1)
            folder = tmp_path_factory.mktemp("model") / "hf"
            hf.save_pretrained(folder)
            save_hf(folder, kind)
            known[name] = folder, hf
        return known[name]

    return call


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_comes_in_as_it_is_and_goes_out_again(made, name, tmp_path):
    folder, hf = made(name)
    saved = lm.load_checkpoint(folder)
    model = lm.build_model(saved, torch.device("cpu"))
    ids = random_ids(model)
    with torch.no_grad():
        theirs, ours = hf(ids).logits, model(ids)
    assert float((theirs - ours).abs().max()) <= 1e-4 * max(1.0, float(theirs.abs().max()))
    tokenizer, auto = lm.tokenizer_of(saved, "", folder), None
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("The keeper wrote 3,141 letters.", " é 東京\n\n 🙂"):
        assert tokenizer.prompt(text) == auto(text).input_ids
    convert("--reverse", folder, "--out", tmp_path / "in.pt")
    convert("--ckpt", tmp_path / "in.pt", "--out", tmp_path / "hf")
    out = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    for key, weight in hf.state_dict().items():
        assert torch.equal(weight, out.state_dict()[key]), key
    again = lm.load_checkpoint(tmp_path / "hf")
    for key, weight in saved["model"].items():
        assert torch.equal(weight, again["model"][key]), key
    assert again["config"] == saved["config"]
    other = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert other("The keeper 🙂").input_ids == auto("The keeper 🙂").input_ids


@pytest.mark.parametrize("name", ["Llama 3", "Mixtral"])
def test_bf16_weights_stay_bf16_where_they_may(made, name, tmp_path):
    source, hf = made(name)
    folder = tmp_path / "hf"
    shutil.copytree(source, folder)
    hf.bfloat16().save_pretrained(folder)
    hf.float()
    saved = lm.load_checkpoint(folder)
    assert {w.dtype for w in saved["model"].values()} == {torch.bfloat16}
    convert("--reverse", folder, "--out", tmp_path / "fp32.pt")
    convert("--reverse", folder, "--out", tmp_path / "bf16.pt", "--dtype", "bf16")
    sizes = [(tmp_path / f"{kind}.pt").stat().st_size for kind in ("bf16", "fp32")]
    assert sizes[0] < 0.65 * sizes[1]
    kept, whole = (lm.load_checkpoint(tmp_path / f"{kind}.pt") for kind in ("bf16", "fp32"))
    assert lm.model_key(kept) == lm.model_key(whole) == lm.model_key(saved)
    for name, weight in kept["model"].items():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight.float(), whole["model"][name])
    cpu = torch.device("cpu")
    ids = torch.randint(410, (2, 20))
    for dtype in (torch.float32, torch.bfloat16):
        models = [lm.build_model(one, cpu, dtype) for one in (saved, kept, whole)]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            a, b, c = (model(ids) for model in models)
        assert torch.equal(a, b) and torch.equal(a, c)
        kinds = {w.dtype for name, w in models[0].named_parameters() if "norm" in name}
        assert kinds == {torch.float32}
        assert models[0].blocks[0].attn.qkv.weight.dtype == dtype


@pytest.mark.parametrize("own", [0, 1])
def test_an_open_model_teaches_and_learns(made, tmp_path, run, own):
    folder, _ = made("Qwen3")
    rows = write_rows(tmp_path / "rows.jsonl", chat_rows(12))
    argv = ["distill", "--ckpt", folder, "--teacher", folder, "--data", rows, "--on_policy", own]
    argv += "--max_steps 2 --batch_size 2 --device cpu --compile 0 --val_split 0.3".split()
    argv += ["--out_dir", tmp_path / "run", "--max_new_tokens", 8, "--log_interval", 1]
    code, _, err = run(argv)
    assert code == 0, err
    losses = [row["train/loss"] for row in log_rows(tmp_path / "run")]
    assert abs(losses[0]) < 1e-4, "it is its own teacher"


@pytest.mark.parametrize("name", FAMILIES)
def test_it_learns_a_step_and_talks(made, name, tmp_path, run):
    folder, _ = made(name)
    rows = write_rows(tmp_path / "rows.jsonl", chat_rows(12))
    flags = "--max_steps 2 --batch_size 2 --device cpu --compile 0 --val_split 0.2".split()
    out = tmp_path / "run"
    lora = ["--lora_rank", 2] if name in ("Qwen2", "Llama 3") else []
    code, _, err = run(["sft", "--ckpt", folder, "--data", rows, "--out_dir", out, *flags, *lora])
    assert code == 0, err
    code, told, err = run(
        ["generate", "--ckpt", out, "--chat", "--prompt", "Hello", "--max_new_tokens", 4]
    )
    assert code == 0, err
    convert("--ckpt", out, "--out", tmp_path / "hf")
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    messages = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    saved = lm.load_checkpoint(out)
    ours = lm.encode_chat(lm.tokenizer_of(saved, "", out), [("user", "a b"), ("assistant", "c")])
    assert auto.apply_chat_template(messages, return_dict=False) == ours[0]


def test_every_command_takes_a_folder(made, run, tmp_path):
    folder, _ = made("Qwen2")
    for argv in (
        ["generate", "--ckpt", folder, "--prompt", "The", "--max_new_tokens", 3],
        ["info", folder],
    ):
        code, _, err = run(argv)
        assert code == 0, err


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"num_hidden_layers": 1}, "it has model.layers.1"),
        ({"hidden_size": 96, "head_dim": 12}, "other shapes"),
        ({"max_window_layers": "all", "use_sliding_window": True}, "max_window_layers"),
    ],
)
def test_what_is_wrong_with_a_folder_is_a_sentence(made, run, tmp_path, change, word):
    folder, _ = made("Qwen2")
    copy = tmp_path / "hf"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    code, _, err = run(["generate", "--ckpt", copy, "--prompt", "The"])
    assert code == 2 and word in err, err


# ---- Adapters ----


def test_adapters_go_to_peft_and_come_back(made, run, tmp_path):
    peft = pytest.importorskip("peft")
    folder, hf = made("Qwen2")
    rows = write_rows(tmp_path / "rows.jsonl", chat_rows(12))
    flags = "--max_steps 3 --batch_size 2 --device cpu --compile 0 --lr 1e-2 --lora_rank 4".split()
    code, _, err = run(
        ["sft", "--ckpt", folder, "--data", rows, "--out_dir", tmp_path / "run", *flags]
    )
    assert code == 0, err
    ours = lm.build_model(lm.load_checkpoint(tmp_path / "run"), torch.device("cpu"))
    ids = random_ids(ours)
    convert("--ckpt", tmp_path / "run", "--out", tmp_path / "adapter", "--format", "peft")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapter").eval()
    with torch.no_grad():
        wanted = ours(ids)
        assert float((hf(ids).logits - wanted).abs().max()) > 1e-2
        assert float((theirs(ids).logits - wanted).abs().max()) < 1e-3
    convert("--reverse", tmp_path / "adapter", "--base", folder, "--out", tmp_path / "back.pt")
    back = lm.build_model(lm.load_checkpoint(tmp_path / "back.pt"), torch.device("cpu"))
    with torch.no_grad():
        assert float((back(ids) - wanted).abs().max()) < 1e-3


def test_adapters_of_others_come_in(made, tmp_path):
    peft = pytest.importorskip("peft")
    folder, _ = made("Llama 3")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=True
    )
    theirs = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    convert("--reverse", tmp_path / "adapter", "--base", folder, "--out", tmp_path / "a.pt")
    ours = lm.build_model(lm.load_checkpoint(tmp_path / "a.pt"), torch.device("cpu"))
    ids = random_ids(ours)
    with torch.no_grad():
        wanted = theirs(ids).logits
        assert float((ours(ids) - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
    other, _ = made("Mixtral")
    code, _, err = call(
        converter.main, *["--reverse", tmp_path / "adapter", "--base", other, "--out", "b.pt"]
    )
    assert code == 2 and "adapts what" in err
