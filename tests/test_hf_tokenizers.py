"""Tokenizers in Hugging Face's form: ids, chats and special tokens as transformers has them."""

import base64
import json
import random
import unicodedata

import pytest

import standalone_transformer_lm as lm

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + '[/INST]' }}{% elif m['role'] == 'assistant' %}"
    "{{ ' ' + m['content'] + eos_token }}{% else %}{{ raise_exception('no such role') }}{% endif %}"
    "{% endfor %}"
)
KINDS = {  # template, special tokens, bos, eos
    "chatml": (CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>"),
    "base": (CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|endoftext|>"),
    "llama3": (
        LLAMA3,
        [
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ],
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "mistral": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>"),
    "none": (None, ["<s>", "</s>"], "<s>", "</s>"),
}
TEXTS = [
    "The lighthouse keeper wrote 3,141 letters; nobody answered them.",
    "  Two spaces,   three between, a tab\t, \n\n and lines \n",
    "def area(r):\n    return 3.14159 * r ** 2\n",
    "Größe, naïve, Ελλάδα, Москва, 東京, 👩‍👩‍👧 🙂 e\u0301 \ufb01",
    "it's we'll they'd 12345",
    "",
]
CHATS = [
    [("user", "Where is it?"), ("assistant", "In the harbour.")],
    [("user", "One"), ("assistant", "Two"), ("user", "\nThree "), ("assistant", " Four\n")],
    [("user", "a"), ("assistant", "")],
    [("user", "é 東京"), ("assistant", "naïve 🙂"), ("user", "?!"), ("assistant", "…")],
]


def save_hf(folder, kind="chatml", size=400, **more):
    """A folder with a byte-level BPE tokenizer and its configuration."""
    template, specials, bos, eos = KINDS[kind]
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(split, "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.normalizer = tokenizers.normalizers.NFC()
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=specials,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS * 3 + ["the user and the assistant say system"] * 5, trainer)
    if bos:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
        )
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, **more}
    if bos:
        config["bos_token"] = bos
    if template:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: save_hf(tmp_path_factory.mktemp(kind) / "hf", kind) for kind in KINDS}


def auto(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(folders, kind):
    ours, theirs = lm.load_tokenizer(folders[kind]), auto(folders[kind])
    assert ours.vocab_size == len(theirs)
    assert ours.eos == theirs.eos_token_id
    for text in TEXTS:
        assert ours.prompt(text) == (theirs(text).input_ids or [ours.eos])
        assert ours.decode(ours.encode(text)) == unicodedata.normalize("NFC", text)
    again = lm.make_tokenizer(ours.data)
    assert again.sha256 == ours.sha256 and again.prompt("x y") == ours.prompt("x y")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
@pytest.mark.parametrize("chat", CHATS)
def test_a_chat_is_spelled_by_its_template(folders, kind, chat):
    ours, theirs = lm.load_tokenizer(folders[kind]), auto(folders[kind])
    messages = [{"role": role, "content": text} for role, text in chat]

    def wanted(messages, **more):
        return theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **more)

    ids, learned = lm.encode_chat(ours, chat)
    assert ids == wanted(messages)
    assert len(learned) == len(ids)
    asked, none = lm.encode_chat(ours, chat[:-1], reply=True)
    assert asked == wanted(messages[:-1], add_generation_prompt=True)
    answers = [text for role, text in chat if role == "assistant"]
    spans, before = [], False
    for i, one in zip(ids, learned, strict=True):
        if one and not before:
            spans.append([])
        if one:
            spans[-1].append(i)
        before = one
    assert [ours.decode(span).strip() for span in spans] == [text.strip() for text in answers]
    assert all(span[-1] == ours.turn_end for span in spans)
    assert ours.turn_end in ours.stops and ours.eos in ours.stops


def test_an_answer_may_go_on(folders):
    ours = lm.load_tokenizer(folders["chatml"])
    whole = lm.encode_chat(ours, [("user", "a"), ("assistant", "In the harbour")])[0]
    begun = lm.encode_chat(ours, [("user", "a"), ("assistant", "In the harbour")], reply=True)[0]
    assert whole[: len(begun)] == begun and whole[len(begun)] == ours.turn_end


@pytest.mark.parametrize("kind", KINDS)
def test_no_control_symbol_comes_out_of_text(folders, kind):
    ours = lm.load_tokenizer(folders[kind])
    specials = set(ours.specials.values())
    hostile = "".join(ours.specials) + " and <|im_end|>"
    assert not specials & {*ours.encode(hostile)} and ours.decode(ours.encode(hostile)) == hostile
    calm = lm.encode_chat(ours, [("user", "a"), ("assistant", "b")])[0]
    ids, learned = lm.encode_chat(ours, [("user", hostile), ("assistant", f"x{hostile}y")])
    assert [i for i in ids if i in specials] == [i for i in calm if i in specials]
    answer = [i for i, one in zip(ids, learned, strict=True) if one]
    assert ours.decode(answer[:-1]) == f"x{hostile}y" and answer[-1] == ours.turn_end


def test_turns_that_are_context_alone_are_not_learned(folders):
    ours = lm.load_tokenizer(folders["llama3"])
    turns = [lm.Turn("user", "a"), lm.Turn("assistant", "no", learned=False), lm.Turn("user", "b")]
    ids, learned = lm.encode_chat(ours, [*turns, lm.Turn("assistant", "yes")])
    assert ours.decode([i for i, one in zip(ids, learned, strict=True) if one]) == "yes"
    last = lm.last_answer(ours, [*turns, lm.Turn("assistant", "yes")], 99)
    assert (last.learned == learned).all()


@pytest.mark.parametrize(
    ("template", "word"),
    [
        (
            "{% for m in messages %}{{ m['content'] | upper }}<|im_end|>{% endfor %}",
            "rewrites what is said",
        ),
        ("{{ messages[0]['content'] }}<|im_end|>", "leaves out what an assistant says"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "no special token ends"),
        ("{% for m in messages %}{{ m['content'] ", "chat template"),
        ("{{ raise_exception('not this') }}", "not this"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat template"),
    ],
)
def test_a_template_that_is_of_no_use_is_a_sentence(tmp_path, template, word):
    folder = save_hf(tmp_path / "hf", chat_template=template)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    ours = lm.load_tokenizer(folder)
    assert ours.prompt("text")
    with pytest.raises(lm.UserError, match=word):
        lm.encode_chat(ours, [("user", "a"), ("assistant", "b")])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"added_tokens": 3}'])
def test_damage_is_a_sentence(tmp_path, name, text):
    folder = save_hf(tmp_path / "hf")
    (folder / name).write_text(text)
    try:
        lm.load_tokenizer(folder)
    except lm.UserError as fault:
        assert "is damaged" in str(fault) or "no token that ends" in str(fault)
    else:
        assert name == "tokenizer_config.json" and text.startswith("{")


def test_prep_and_train_take_it(folders, run, tmp_path):
    for kind in ("chatml", "llama3"):
        out, ours = tmp_path / kind, lm.load_tokenizer(folders[kind])
        text = tmp_path / "text.txt"
        text.write_text("\n\n".join(f"The keeper wrote {i} letters." for i in range(400)))
        code, _, err = run(
            ["prep", "--text_path", text, "--out_dir", out / "data", "--tokenizer", folders[kind]]
        )
        assert code == 0, err
        folder = lm.TokenFolder(out / "data")
        assert folder.tokenizer.sha256 == ours.sha256
        ids = [*folder.train[:200]]
        assert ids[0] == ours.bos
        first = ids[1 : ids.index(ours.bos if kind == "chatml" else ours.eos, 1)]
        assert ours.decode(first).startswith("The keeper wrote")
        code, _, err = run(
            ["train", "--data_dir", out / "data", "--out_dir", out / "run", "--max_steps", 2]
            + "--n_layer 1 --d_model 32 --n_head 2 --seq_len 32 --device cpu --compile 0".split()
        )
        assert code == 0, err
        assert (out / "run" / "tokenizer.json").exists()
        code, told, err = run(
            ["generate", "--ckpt", out / "run", "--prompt", "The", "--max_new_tokens", 3]
        )
        assert code == 0 and told.startswith("The"), err


# ---- Files of tiktoken ----


def save_ranks(path, merges=200):
    """A file of tiktoken with 256 bytes and what a byte-level BPE learned of TEXTS; its ranks."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256 + merges,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS * 5 + ["banana bandana ananas anna nana aaaaaaa"], trainer)
    byte_of = {character: i for i, character in enumerate(lm.byte_characters())}
    learned = sorted(made.get_vocab().items(), key=lambda pair: pair[1])
    tokens = [bytes(byte_of[c] for c in token) for token, _ in learned]
    order = [bytes([i]) for i in range(256)] + [t for t in tokens if len(t) > 1]
    ranks = {token: i for i, token in enumerate(order)}
    lines = (f"{base64.b64encode(token).decode()} {i}\n" for token, i in ranks.items())
    path.write_text("".join(lines))
    return ranks


def hostile_texts(count=300):
    rng = random.Random(5)
    letters = " \t\n\r'sStaanb 01239.,;!?/-_(){}é東京🙂ÀŁ́²Ⅷǅʰ\u00a0\u2028\ufeff"
    return ["".join(rng.choices(letters, k=rng.randint(0, 40))) for _ in range(count)]


def test_ids_are_those_of_tiktoken(tmp_path, capsys):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = save_ranks(tmp_path / "own.tiktoken")
    ours = lm.load_tokenizer(tmp_path / "own.tiktoken")
    assert "note: " in capsys.readouterr().out
    theirs = tiktoken.Encoding(
        "own",
        pat_str=lm.byte_words(3),
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": len(ranks)},
    )
    assert ours.vocab_size == theirs.n_vocab and ours.eos == theirs.eot_token
    for text in TEXTS + hostile_texts() + ["<|endoftext|>"]:
        ids = theirs.encode_ordinary(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == text


@pytest.mark.parametrize(
    ("highest", "encoding"), [(50255, "r50k_base"), (100255, "cl100k_base"), (199997, "o200k_base")]
)
def test_known_files_are_read_as_tiktoken_does(highest, encoding, monkeypatch):
    public = pytest.importorskip("tiktoken_ext.openai_public")
    regex = pytest.importorskip("regex")
    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: {})
    theirs, form = public.ENCODING_CONSTRUCTORS[encoding](), lm.TIKTOKEN_FORMS[highest]
    assert {token: i for i, token in form.specials.items()} == theirs["special_tokens"]
    cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(form.words), "isolated")
    for text in TEXTS + hostile_texts():
        words = [word for word, _ in cut.pre_tokenize_str(text)]
        assert words == regex.findall(theirs["pat_str"], text), text


def test_llama_3_has_its_special_tokens(tmp_path):
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)]
    lines += [f"{base64.b64encode(b'%06d' % i).decode()} {i}\n" for i in (*range(256, 300), 127999)]
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    found = lm.load_tokenizer(tmp_path)
    assert (found.vocab_size, found.bos, found.eos) == (128256, 128000, 128001)
    assert found.specials["<|eot_id|>"] == 128009
    assert found.prompt("a") == [128000, 97]


@pytest.mark.parametrize("damage", ["cut", "lost byte", "twice", "no base64", "huge"])
def test_a_damaged_file_is_a_sentence(tmp_path, damage):
    path = tmp_path / "own.tiktoken"
    save_ranks(path)
    lines = path.read_text().splitlines()
    changed = {
        "cut": [*lines[:-1], lines[-1].split()[0]],
        "lost byte": lines[:64] + lines[65:],
        "twice": [*lines, "YWJjZGVmZw== 300"],
        "no base64": [*lines, "?? 600"],
        "huge": [*lines, f"YWJjZGVmZw== {10**9}"],
    }[damage]
    path.write_text("\n".join(changed) + "\n")
    with pytest.raises(lm.UserError, match="own.tiktoken"):
        lm.load_tokenizer(path)
