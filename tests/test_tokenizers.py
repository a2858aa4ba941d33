"""Room Tokenizers: every string comes back, control symbols stay out of reach."""

import functools
import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from conftest import documents
from hypothesis import example, given
from hypothesis import strategies as st

import standalone_transformer_lm as lm

PIECES = [
    "the",
    "quiet",
    "harbour",
    "A",
    "a b",
    "0",
    "2024",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "\0",
    "東京",
    "é",
    "e\u0301",
    "🙂",
    "👩\u200d👧",
    "ﬁ",
    "Ａ",
    "\u00a0",
    "\u3000",
    "\u2028",
    "\ufeff",
    "\ufffd",
    "\u2585",
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<|user|>",
    "<|reserved_0|>",
    "<0x41>",
    "x" * 60,
]
SPELLED = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
STRINGS = SPELLED | st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
ROUND = STRINGS.map(lambda text: text.replace(lm.SPACE, ""))


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return lm.Tokenizer(tiny_tokenizer)


def encoder_of(tokenizer):
    return lm.WordEncoder(tokenizer, np.dtype("<u2"))


def unpack(packed):
    return np.frombuffer(packed, "<u2").tolist()


# ---- The tokenizer that prep trains ----


def test_special_ids_are_where_the_design_puts_them(tokenizer):
    sp = tokenizer.sp
    assert (sp.unk_id(), sp.bos_id(), sp.eos_id(), sp.pad_id()) == (0, 1, 2, 3)
    assert [sp.id_to_piece(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<pad>"]
    control = ["<|system|>", "<|user|>", "<|assistant|>"] + [f"<|reserved_{i}|>" for i in range(13)]
    assert [sp.id_to_piece(i) for i in range(4, 20)] == control
    assert all(sp.is_control(i) for i in (1, 2, *range(4, 20)))
    assert all(sp.is_byte(i) for i in range(20, 276)) and not sp.is_byte(276)
    assert tokenizer.roles == {"system": 4, "user": 5, "assistant": 6, "tool": 7, "call": 8}
    assert tokenizer.vocab_size == len(sp) == 400


@given(ROUND)
@example("")
@example(" ")
@example("   leading, trailing  ")
@example("\n")
@example("\n \n\t\0")
@example("<|user|></s><s><0x0A>")
def test_every_string_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(SPELLED | st.sampled_from(lm.CONTROL).flatmap(lambda c: SPELLED.map(lambda s: s + c + s)))
def test_no_text_spells_a_control_symbol(tokenizer, text):
    assert not [i for i in tokenizer.encode(text) if i < 20]


def test_a_number_is_spelled_digit_by_digit_however_often_it_was_seen():
    sp = lm.Tokenizer(lm.train_tokenizer(["the year 2024 , the year 1999"] * 50, 300)).sp
    assert lm.SPACE + "year" in sp.encode("the year", out_type=str)
    for number in ("2024", "1999", "11"):
        assert sp.encode(number, out_type=str) == [lm.SPACE, *number]


def test_no_piece_but_the_newline_holds_one_and_none_crosses_a_space():
    sp = lm.Tokenizer(
        lm.train_tokenizer(["the same line\nthe same line\n  indented\n\n\nthe end"] * 50, 310)
    ).sp
    pieces = [sp.id_to_piece(i) for i in range(len(sp))]
    assert [p for p in pieces if "\n" in p] == ["\n"]
    assert not [p for p in pieces if lm.SPACE in p[1:]]


def test_training_twice_gives_the_same_bytes(tiny_tokenizer):
    assert lm.train_tokenizer(documents(300, seed=2), 400) == tiny_tokenizer


def test_a_line_of_100_000_characters_is_learned_from():
    """SentencePiece drops lines beyond 4192 bytes unless told otherwise."""
    line = " ".join(text.replace("\n", " ") for text in documents(1200, seed=3))
    assert len(line) > 100_000
    sp = lm.Tokenizer(lm.train_tokenizer([line], 700)).sp
    assert lm.SPACE + "harbour" in [sp.id_to_piece(i) for i in range(len(sp))]


def test_decoding_ignores_ids_beyond_the_vocabulary(tokenizer):
    """A model's output layer may be padded."""
    ids = tokenizer.encode("quiet")
    assert tokenizer.decode(np.array([*ids, 400, 65535])) == "quiet"


# ---- Vocabularies that do not fit ----


def needed(texts, size):
    """The number that the refusal of a vocabulary names."""
    with pytest.raises(lm.UserError, match=f"--vocab_size {size} ") as caught:
        lm.train_tokenizer(texts, size)
    return int(lm.re.search(r"--vocab_size (\d+)", caught.value.faults[0][1])[1])


TEXTS = {
    "sentences": list(documents(100, seed=4)),
    "words": ["hello world"],
    "letters": ["ab"],
    "han": ["漢字かな交じり文"] * 3,
    "lines": ["one\ntwo\n\n three"],
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_largest_vocabulary_named_is_the_largest_that_works(name):
    largest = needed(TEXTS[name], 30_000)
    assert lm.Tokenizer(lm.train_tokenizer(TEXTS[name], largest)).vocab_size == largest
    assert needed(TEXTS[name], largest + 1) == largest


@pytest.mark.parametrize("name", ["sentences", "words", "han"])
def test_the_smallest_vocabulary_named_is_the_smallest_that_works(name):
    smallest = needed(TEXTS[name], 280)
    assert lm.Tokenizer(lm.train_tokenizer(TEXTS[name], smallest)).vocab_size == smallest
    assert needed(TEXTS[name], smallest - 1) == smallest


def test_a_vocabulary_of_billions_is_the_users_mistake():
    with pytest.raises(lm.UserError, match="5000000000"):
        lm.train_tokenizer(TEXTS["sentences"], 5_000_000_000)


@pytest.mark.parametrize("texts", [[], [""], ["\n\n\n"]])
def test_no_text_is_the_users_mistake(texts):
    with pytest.raises(lm.UserError, match="give text with words in it"):
        lm.train_tokenizer(texts, 400)


# ---- Files that are no tokenizer ----


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"hello world\n" * 20,
        lambda data: bytes(1000),
        lambda data: data[: len(data) // 2],
        lambda data: data[100:],
        lambda data: b"{}",
        lambda data: b"PK\x03\x04" + data,
    ],
    ids=["empty", "text", "zeros", "head", "tail", "json", "zip"],
)
def test_what_is_no_tokenizer_is_named(tiny_tokenizer, tmp_path, damage):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(damage(tiny_tokenizer))
    with pytest.raises(lm.UserError, match="tokenizer.model"):
        lm.load_tokenizer(path)


def test_a_missing_tokenizer_and_a_folder_in_its_place_are_named(tmp_path):
    for path in (tmp_path / "no.model", tmp_path):
        with pytest.raises(lm.UserError, match=str(path)):
            lm.load_tokenizer(path)


def test_a_flipped_byte_of_a_tokenizer_is_another_tokenizer_or_a_sentence(tiny_tokenizer):
    """SentencePiece itself takes most flips; what it takes must be usable, the rest told."""
    told = 0
    for at in range(0, len(tiny_tokenizer), 23):
        data = bytearray(tiny_tokenizer)
        data[at] ^= 0x80  # which makes its pieces no UTF-8
        try:
            tokenizer = lm.Tokenizer(bytes(data))
            tokenizer.decode(tokenizer.encode("The harbour, 12 engines"))
        except lm.UserError:
            told += 1
    assert told > 5


# ---- The word encoder ----


@given(STRINGS)
@example("")
@example("\n")
@example(" \n ")
@example("a\n\nb \n c")
@example(f"{lm.SPACE} {lm.SPACE}a{lm.SPACE}\n{lm.SPACE}")
def test_words_encode_as_the_whole_text_does(tokenizer, text):
    encoder = encoder_of(tokenizer)
    assert encoder.by_word
    for _ in range(2):  # the second time from the dictionary
        assert unpack(encoder.encode(text)) == tokenizer.sp.encode(text)


def test_words_encode_alike_over_a_corpus_with_a_warm_dictionary(tokenizer):
    encoder = encoder_of(tokenizer)
    text = "\n\n".join(documents(500, seed=5)) + Path(lm.__file__).read_text(encoding="utf-8")
    for part in (*documents(500, seed=6), text):
        assert unpack(encoder.encode(part)) == tokenizer.sp.encode(part)
    assert len(encoder) > 100  # or the dictionary was not used at all


def test_the_dictionary_is_bounded_and_forgets_long_words(tokenizer, monkeypatch):
    monkeypatch.setattr(lm, "WORDS_CACHED", 5)
    encoder = encoder_of(tokenizer)
    for text in ("x" * 1000, *documents(30, seed=7), "y" * (lm.LONGEST_CACHED + 1)):
        assert unpack(encoder.encode(text)) == tokenizer.sp.encode(text)
    assert len(encoder) == 5 and max(map(len, encoder)) <= lm.LONGEST_CACHED


def test_packed_ids_are_as_wide_as_asked(tokenizer):
    wide = lm.WordEncoder(tokenizer, np.dtype("<u4")).encode("the quiet harbour")
    assert np.frombuffer(wide, "<u4").tolist() == tokenizer.sp.encode("the quiet harbour")


OWN = {
    "model_type": "bpe",
    "vocab_size": 400,
    "byte_fallback": True,
    "required_chars": "\n",
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}
FOREIGN = {
    "nmt_nfkc": {"normalization_rule_name": "nmt_nfkc"},
    "case folding": {"normalization_rule_name": "nfkc_cf"},
    "collapsed spaces": {"remove_extra_whitespaces": True},
    "no dummy prefix": {"add_dummy_prefix": False},
    "space as suffix": {"treat_whitespace_as_suffix": True},
    "pieces across spaces": {"split_by_whitespace": False},
    "pieces of spaces": {"allow_whitespace_only_pieces": True},
    "symbols with spaces": {"user_defined_symbols": ["a b", "the quiet", " harbour", "\n\n", "  "]},
    "symbols with U+2581": {"user_defined_symbols": ["a\u2581b", "\u2581the", "quiet\u2581"]},
    "symbols in words": {"user_defined_symbols": ["ou", "0", "<|user|>", "x"]},
    "symbol over a newline": {"user_defined_symbols": ["the\nquiet"]},
    "no newline piece": {"required_chars": ""},
    "no bytes": {"byte_fallback": False},
    "unigram": {"model_type": "unigram"},
    "characters": {"model_type": "char"},
    "words": {"model_type": "word", "vocab_size": 330},
}


@functools.cache
def foreign(name):
    """A tokenizer with one setting unlike prep's own."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=documents(200, seed=8),
        model_writer=model,
        minloglevel=4,
        hard_vocab_limit=False,
        **{**OWN, **FOREIGN[name]},
    )
    return lm.Tokenizer(model.getvalue())


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_tokenizer_encodes_as_sentencepiece_does(name):
    tokenizer = foreign(name)
    encoder = encoder_of(tokenizer)

    @given(STRINGS)
    @example("the quiet harbour  a b\nthe\nquiet \n\n Ａ①ﬁ x")
    def check(text):
        assert unpack(encoder.encode(text)) == tokenizer.sp.encode(text)

    check()


@pytest.mark.parametrize(
    "name",
    [
        "nmt_nfkc",
        "case folding",
        "collapsed spaces",
        "unigram",
        "no dummy prefix",
        "space as suffix",
        "pieces across spaces",
    ],
)
def test_a_tokenizer_that_looks_across_words_is_recognised(name):
    assert not lm.splits_at_spaces(foreign(name).sp)


def test_a_tokenizer_without_chat_symbols_has_no_roles():
    assert foreign("nmt_nfkc").roles == {}
    assert foreign("symbols in words").roles == {}  # <|user|> is there, but as plain text


def test_a_tokenizer_without_sentence_marks_is_refused():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=documents(50, seed=9),
        model_writer=model,
        vocab_size=150,
        eos_id=-1,
        minloglevel=4,
        hard_vocab_limit=False,
    )
    with pytest.raises(lm.UserError, match="no </s>"):
        lm.Tokenizer(model.getvalue())


def test_a_fault_of_the_text_comes_out_as_it_is():
    def texts():
        yield "hello world " * 100
        raise lm.UserError("docs.gz is damaged after line 7", "fetch it again")

    with pytest.raises(lm.UserError, match="docs.gz is damaged"):
        lm.train_tokenizer(texts(), 300)


@pytest.mark.parametrize("text", ["ACGT" * 50_000, "TTAGGGCC" * 20_000])
def test_space_and_line_end_have_pieces_where_they_are_rare(text):
    tokenizer = lm.Tokenizer(lm.train_tokenizer([text] * 5, 288))
    assert tokenizer.sp.piece_to_id(lm.SPACE) != lm.UNK
    assert tokenizer.sp.piece_to_id("\n") != lm.UNK
    assert tokenizer.decode(tokenizer.encode("a b\nc")) == "a b\nc"
    assert len(tokenizer.encode("A C")) <= 5


def test_sentencepiece_is_told_without_its_source_files():
    with pytest.raises(lm.UserError) as told:
        lm.train_tokenizer(["hello world"], 30000)
    assert ".cc" not in str(told.value) and "or less" in str(told.value)


def test_too_many_characters_for_the_vocabulary_has_a_fix_that_exists():
    rare = "".join(map(chr, range(0x4E00, 0x5200)))
    text = rare + "the cat sat on the mat " * 5000
    with pytest.raises(lm.UserError, match="--character_coverage"):
        lm.train_tokenizer([text], 300)
    assert lm.Tokenizer(lm.train_tokenizer([text], 300, 0.98)).vocab_size == 300
