"""Evaluation: prompts as lm-evaluation-harness writes them, figures as its and others' packages.

Rows are made here in the shapes of the published files.
"""

import itertools
import json
import math
import random
import signal

import numpy as np
import pytest
import torch
from conftest import complaint, documents, signal_at
from test_distributed import two
from test_lora import save_base

import standalone_transformer_lm as lm

PLACE = ["--device", "cpu", "--threads", "1", "--dtype", "fp32"]

# ---- Rows of published files ----

ARC_TEXTS = ["blood", "a cell", "an atom", "water"]
PUBLISHED = {
    "ARC": (
        {
            "id": "x",
            "question": "What is small?",
            "choices": {"text": ARC_TEXTS, "label": ["A", "B", "C", "D"]},
            "answerKey": "C",
        },
        ("What is small?", *ARC_TEXTS, 2),
    ),
    "ARC with numbers for labels": (
        {
            "question": "What is small?",
            "choices": {"text": ARC_TEXTS, "label": ["1", "2", "3", "4"]},
            "answerKey": "3",
        },
        ("What is small?", *ARC_TEXTS, 2),
    ),
    "ARC's own file": (
        {
            "question": {
                "stem": "What is small?",
                "choices": [
                    {"text": text, "label": label}
                    for text, label in zip(ARC_TEXTS, "ABCD", strict=True)
                ],
            },
            "answerKey": "C",
        },
        ("What is small?", *ARC_TEXTS, 2),
    ),
    "HellaSwag": (
        {
            "activity_label": "Rowing",
            "ctx_a": "A boat floats.",
            "ctx_b": "the man",
            "ctx": "A boat floats. the man",
            "endings": ["rows.", "flies."],
            "label": "0",
        },
        ("A boat floats. The man", "rows.", "flies.", 0),
    ),
    "PIQA": (
        {"goal": "Open a jar.", "sol1": "Turn the lid.", "sol2": "Sing.", "label": 0},
        ("Open a jar.", "Turn the lid.", "Sing.", 0),
    ),
    "WinoGrande": (
        {
            "sentence": "The cup fell off the table because _ was wet.",
            "option1": "the cup",
            "option2": "the table",
            "answer": "2",
        },
        ("The cup fell off the table because _ was wet.", "the cup", "the table", 1),
    ),
    "MMLU": (
        {"question": "1+1?", "subject": "college_biology", "choices": ["1", "2"], "answer": 1},
        ("1+1?", "1", "2", 1),
    ),
    "MMLU's own file": (
        {"question": "1+1?", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "B"},
        ("1+1?", "1", "2", "3", "4", 1),
    ),
    "OpenBookQA": (
        {
            "question_stem": "The sun is",
            "choices": {"text": ["hot", "cold"], "label": ["A", "B"]},
            "answerKey": "A",
        },
        ("The sun is", "hot", "cold", 0),
    ),
    "BoolQ": (
        {"question": "is water wet", "passage": "Water is wet.", "answer": True},
        ("is water wet", "no", "yes", 1),
    ),
    "BoolQ of SuperGLUE": (
        {"question": "is water dry", "passage": "Water is wet.", "label": 0},
        ("is water dry", "no", "yes", 0),
    ),
    "MedQA": (
        {
            "question": "Which drug?",
            "options": {"A": "one", "B": "two"},
            "answer": "two",
            "answer_idx": "B",
        },
        ("Which drug?", "one", "two", 1),
    ),
    "MedQA of BigBio": (
        {
            "question": "Which drug?",
            "options": [{"key": "A", "value": "one"}, {"key": "B", "value": "two"}],
            "answer": "two",
        },
        ("Which drug?", "one", "two", 1),
    ),
    "MedQA of lm-evaluation-harness": (
        {
            "sent1": "Which drug?",
            "ending0": "one",
            "ending1": "two",
            "ending2": "three",
            "ending3": "four",
            "label": 3,
        },
        ("Which drug?", "one", "two", "three", "four", 3),
    ),
    "this project's rows": (
        {"id": "1", "question": "What?", "choices": ["x", "y"], "answer": 1, "subject": None},
        ("What?", "x", "y", 1),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_row_is_read(name):
    row, (text, *choices, answer) = PUBLISHED[name]
    asked = lm.choice_question(row)
    assert (asked.text, list(asked.choices), asked.answer) == (text, choices, answer)


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"question": "What?", "choices": ["x", "y"]},
        {"question": "What?", "choices": ["x", "y"], "answer": 2},
        {"question": "What?", "choices": ["x", "y"], "answer": "z"},
        {"question": "What?", "choices": [], "answer": 0},
        {"question": "", "choices": ["x", "y"], "answer": 0},
        {"sentence": "no blank", "option1": "a", "option2": "b", "answer": "1"},
        {"question": "q", "passage": "p", "answer": "maybe"},
    ],
)
def test_a_row_without_choices_or_answer_is_refused(row):
    with pytest.raises(ValueError):
        lm.choice_question(row)


# The prompts, character by character, as lm-evaluation-harness 0.4 has them.
ASKED = lm.Question("Why?", ("so", "thus"), 1, "high_school_physics")
PROMPTS = {
    "arc": [("Question: Why?\nAnswer:", " so"), ("Question: Why?\nAnswer:", " thus")],
    "openbookqa": [("Why?", " so"), ("Why?", " thus")],
    "mmlu": [("Why?\nA. so\nB. thus\nAnswer:", " A"), ("Why?\nA. so\nB. thus\nAnswer:", " B")],
    "medqa": [
        ("Question: Why?\nA. so\nB. thus\nAnswer:", " A"),
        ("Question: Why?\nA. so\nB. thus\nAnswer:", " B"),
    ],
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_those_of_the_harness(name):
    assert lm.FORMS[name](ASKED) == PROMPTS[name]


def test_prompts_with_forms_of_their_own():
    boolq = lm.Question("is water wet", ("no", "yes"), 1, "Water is wet.")
    context = "Water is wet.\nQuestion: is water wet?\nAnswer:"
    assert lm.FORMS["boolq"](boolq) == [(context, " no"), (context, " yes")]
    wino = lm.Question("It fell because _ was wet.", ("the cup", "the table"), 1)
    assert lm.FORMS["winogrande"](wino) == [
        ("It fell because the cup", " was wet."),
        ("It fell because the table", " was wet."),
    ]
    swag = lm.Question("[header] Row [title] Sit  down [step] Pull", ("row [substeps] on",), 0, "A")
    assert lm.FORMS["hellaswag"](swag) == [("A: Row. Sit down Pull", " row on")]


def test_examples_stand_before_a_question_and_are_never_itself():
    rows = [lm.Question(f"q{i}", ("a", "b"), i % 2, "some_subject") for i in range(6)]
    task = lm.ChoiceTask("t", rows, lm.FORMS["mmlu"], 3)
    for place, row in enumerate(rows):
        front = task.front(place)
        head = "The following are multiple choice questions (with answers) about some subject.\n\n"
        assert front.startswith(head) and front.count("Answer: ") == 3
        assert f"{row.text}\n" not in front
    pool = [lm.Question(f"p{i}", ("a", "b"), 1) for i in range(4)]
    front = lm.ChoiceTask("t", rows, lm.FORMS["arc"], 2, pool).front(5)
    assert front == "Question: p0\nAnswer: b\n\nQuestion: p1\nAnswer: b\n\n"


# ---- Scores ----


@pytest.fixture(scope="module")
def candidate(tiny_tokenizer):
    tokenizer = lm.Tokenizer(tiny_tokenizer)
    settings = lm.ModelSettings(
        seq_len=24, n_layer=2, d_model=32, n_head=4, ffn_mult=2.0, vocab_size=tokenizer.vocab_size
    )
    model = lm.Transformer(settings)
    model.init_weights(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    machine = lm.Machine(torch.device("cpu"), torch.float32, 0, 1)
    return lm.Candidate("tiny", "key", model.eval(), tokenizer, machine, False, 4)


def alone(candidate, context, continuation):
    """The log-probability of a continuation, id by id, in float64; of what fits, its end."""
    model = candidate.model
    ids = (context + continuation)[-(model.config.seq_len + 1) :]
    count = min(len(continuation), len(ids) - 1)
    with torch.no_grad():
        logps = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
    places = range(len(ids) - 1 - count, len(ids) - 1)
    best = [int(logps[at].argmax()) == ids[at + 1] for at in places]
    return sum(float(logps[at, ids[at + 1]]) for at in places), all(best)


def test_scores_equal_each_pair_alone(candidate):
    rng = random.Random(1)
    pairs = []
    for _ in range(23):
        sizes = rng.randint(1, 20), rng.randint(1, 12)
        pairs.append(tuple([rng.randrange(4, 400) for _ in range(size)] for size in sizes))
    pairs.append(([1], [5]))
    pairs.append(([1] * 30, [7] * 30))  # neither fits
    for pair, scored in zip(pairs, candidate.score(pairs), strict=True):
        logp, greedy = alone(candidate, *pair)
        assert scored.logp == pytest.approx(logp, abs=1e-4) and scored.greedy == greedy


def test_a_greedy_continuation_is_known_as_such(candidate):
    ids = [1, 50, 60]
    stop = frozenset({candidate.tokenizer.eos})
    sampling = lm.SamplingSettings(6, temperature=0.0)
    (new,) = lm.complete(candidate.model, [ids], sampling, 0, stop)
    other = [*new[:-1], (new[-1] + 1) % 400]
    assert [one.greedy for one in candidate.score([(ids, new), (ids, other)])] == [True, False]


def test_a_space_belongs_to_the_continuation(candidate):
    for context, more in (("Answer:", " yes"), ("Answer: ", "yes"), ("", "yes"), ("a b  ", "c")):
        left, right = lm.text_pair(candidate.tokenizer, context, more)
        assert left[0] == candidate.tokenizer.bos and right
        assert left[1:] + right == candidate.tokenizer.encode(context + more)
        assert left[1:] == candidate.tokenizer.encode(context.rstrip())


@pytest.mark.parametrize("length", [2, 3, 24, 25, 26, 48, 49, 100, 121])
@pytest.mark.parametrize("stride", [1, 5, 12, 24])
def test_windows_predict_every_id_once_with_ids_before_it(length, stride):
    limit, seen = 24, []
    for done in lm.rolling_starts(length, limit, stride):
        begin, end = lm.rolling_window(length, done, limit, stride)
        assert end - begin <= limit and begin <= done < end
        assert begin == 0 or done + 1 - begin >= limit - stride
        seen += range(done + 1, end + 1)
    assert seen == list(range(1, length))


@pytest.mark.parametrize("length", [1, 5, 23, 24, 25, 47, 48, 49, 100])
def test_disjoint_windows_are_the_harness_own(length):
    utils = pytest.importorskip("lm_eval.utils")
    tokens = list(range(10, 10 + length))
    theirs = utils.get_rolling_token_windows(tokens, 1, 24, 1)
    theirs = list(map(utils.make_disjoint_window, theirs))
    ids = [1, *tokens]
    ours = []
    for done in lm.rolling_starts(len(ids), 24, 24):
        begin, end = lm.rolling_window(len(ids), done, 24, 24)
        ours.append((ids[begin : done + 1], ids[done + 1 : end + 1]))
    assert ours == theirs


def test_perplexity_is_of_all_tokens_words_and_bytes(candidate):
    texts = list(itertools.islice(documents(20, seed=5), 20))
    rows = [[candidate.tokenizer.bos, *candidate.tokenizer.encode(text)] for text in texts]
    sizes = [(len(text.split()), len(text.encode())) for text in texts]
    task = lm.PerplexityTask("t", rows, sizes, 24, 24)
    figures = task.figures(task.answers(candidate, list(range(len(task)))))
    nll, tokens = 0.0, 0
    for ids in rows:
        for done in lm.rolling_starts(len(ids), 24, 24):
            begin, end = lm.rolling_window(len(ids), done, 24, 24)
            nll -= alone(candidate, ids[begin : done + 1], ids[done + 1 : end + 1])[0]
            tokens += end - done
    words, size = map(sum, zip(*sizes, strict=True))
    assert figures["loss"] == pytest.approx(nll / tokens, rel=1e-5)
    assert figures["word_perplexity"] == pytest.approx(math.exp(nll / words), rel=1e-4)
    assert figures["byte_perplexity"] == pytest.approx(math.exp(nll / size), rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(nll / size / math.log(2), rel=1e-5)


# ---- Figures against other packages ----


def test_macro_f1_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = random.Random(2)
    for labels in (2, 3, 5):
        rows = [lm.Question("t", tuple("abcde"[:labels]), rng.randrange(labels)) for _ in range(40)]
        task = lm.ClassTask("t", rows, lm.label_form)
        given = [rng.randrange(labels - (labels > 3)) for _ in rows]
        answers = [
            task.outcome(row, [float(place == said) for place in range(labels)])
            for row, said in zip(rows, given, strict=True)
        ]
        figures = task.figures(answers)
        right = [row.answer for row in rows]
        assert figures["macro_f1"] == pytest.approx(metrics.f1_score(right, given, average="macro"))
        assert figures["acc"] == pytest.approx(metrics.accuracy_score(right, given))
        lines = lm.confusion(answers)[1:]
        wanted = metrics.confusion_matrix(right, given, labels=range(labels))
        assert [list(map(int, line.split()[1:])) for line in lines] == wanted.tolist()


def test_rouge_is_that_of_rouge_score():
    module = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = module.RougeScorer(["rouge1", "rouge2", "rougeL"])
    texts = list(itertools.islice(documents(12, seed=6), 12))
    for right, given in zip(texts, texts[1:], strict=False):
        wanted = {k: v.fmeasure for k, v in scorer.score(right, given).items()}
        assert lm.rouge_checks(given, right) == wanted


def test_gsm8k_is_checked_as_the_harness_does():
    answer = "She has 4 x 3 = <<4*3=12>>12 dozen.\n#### 1,012"
    for text, strict, flexible in (
        ("so\n#### 1012", 1, 1),
        ("so #### 1,012 eggs", 1, 1),
        ("it is $1,012.", 0, 1),
        ("1012 or 1013", 0, 0),
        ("#### 1013\nthe answer is 1012", 0, 1),
        ("none", 0, 0),
    ):
        assert lm.gsm8k_checks(text, answer) == {"strict": strict, "flexible": flexible}, text


@pytest.mark.parametrize("tried", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(tried):
    for right in range(tried + 1):
        for k in range(1, tried + 1):
            draws = list(itertools.combinations([1] * right + [0] * (tried - right), k))
            share = sum(any(draw) for draw in draws) / len(draws)
            assert lm.pass_at(k, tried, right) == pytest.approx(share)


def test_the_standard_error_is_the_sample_mean_s():
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    wanted = np.std(values, ddof=1) / math.sqrt(5)
    assert lm.standard_error(values) == pytest.approx(wanted)
    assert lm.standard_error([1.0]) == 0.0


def test_of_several_answers_the_majority_and_the_best_are_told():
    exercise = lm.Exercise([lm.Turn("user", "2+2?")], "4", {"answer": "4"})
    task = lm.AnswerTask("t", [exercise], None, lm.SamplingSettings(), 0, 4)
    checked = [{"acc": 0.0}, {"acc": 1.0}, {"acc": 1.0}, {"acc": 0.0}]
    row = task.outcome(exercise, ["5", "is 4", "#### 4", "3"], checked, [0.1, 0.2, 0.3, 0.9])
    assert row["acc"] == 0.5 and row["maj@4"] == 1.0 and row["best@4"] == 0.0
    assert row["pass@2"] == pytest.approx(1 - 1 / 6) and row["pass@4"] == 1.0


# ---- The command ----


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def models(data_dir, tmp_path_factory):
    """Two checkpoints of other weights, the second of which chats."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = (data_dir / "tokenizer.model").read_bytes()
    for seed, name in enumerate(("base", "chat")):
        save_base(folder / f"{name}.pt", tokenizer, seed)
    saved = lm.read_checkpoint(folder / "chat.pt")
    lm.save_checkpoint(folder / "chat.pt", {**saved, "kind": "sft"})
    return folder / "base.pt", folder / "chat.pt"


@pytest.fixture(scope="module")
def files(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("files")
    choices = [
        {"question": text, "choices": ["the village", "a soldier", "gold"], "answer": i % 3}
        for i, text in enumerate(documents(30, seed=3))
    ]
    write(folder / "choice.jsonl", choices)
    write(folder / "number.jsonl", [{"prompt": f"{i} + 1?", "answer": i + 1} for i in range(9)])
    write(folder / "text.jsonl", [{"text": text} for text in documents(6, seed=4)])
    lines = [f"{text}\t{i % 2}\n" for i, text in enumerate(documents(12, seed=8))]
    (folder / "sst2.tsv").write_text("sentence\tlabel\n" + "".join(lines))
    return folder


def evaluated(run, out, *words):
    code, said, err = run(["eval", *PLACE, "--out_dir", out, "--max_new_tokens", 8, *words])
    assert code == 0, err
    return json.loads((out / "results.json").read_text())["results"], said


def answers_in(out):
    return [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


def all_tasks(files):
    return [
        f"choice={files}/choice.jsonl",
        f"choice@2={files}/choice.jsonl",
        f"{files}/number.jsonl",
        f"{files}/text.jsonl",
        f"{files}/sst2.tsv",
    ]


def test_a_table_of_checkpoints_and_tasks(run, models, files, tmp_path):
    tasks = all_tasks(files)
    results, said = evaluated(run, tmp_path, "--ckpt", *models, "--tasks", *tasks, "--worst", 2)
    assert list(results) == list(map(str, models))
    for found in results.values():
        assert list(found) == ["choice", "choice@2", "number", "text", "sst2"]
        assert found["choice"]["rows"] == 30 and 0 <= found["choice"]["acc_norm"] <= 1
        assert found["text"]["bits_per_byte"] > 0 and "macro_f1" in found["sst2"]
    assert results[str(models[0])]["text"] != results[str(models[1])]["text"]
    assert f"{files}/text.jsonl: read as ppl" in said and "macro_f1" in said
    assert "most telling errors" in said and "  right: " in said
    rows = answers_in(tmp_path)
    chosen = [row for row in rows if row["task"] == "choice" and row["ckpt"] == str(models[0])]
    assert [row["row"] for row in chosen] == list(range(30))
    acc = np.mean([row["predicted"] == row["answer"] for row in chosen])
    assert results[str(models[0])]["choice"]["acc"] == pytest.approx(acc)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_figures_do_not_depend_on_the_batch(batch_size, run, models, files, tmp_path):
    tasks = all_tasks(files)
    one, _ = evaluated(run, tmp_path / "a", "--ckpt", models[1], "--tasks", *tasks)
    flags = ["--batch_size", batch_size]
    two_, _ = evaluated(run, tmp_path / "b", "--ckpt", models[1], "--tasks", *tasks, *flags)
    for task, figures in one[str(models[1])].items():
        assert two_[str(models[1])][task] == pytest.approx(figures, rel=1e-4), task


def test_two_ranks_find_what_one_does(run, child, models, files, tmp_path):
    tasks = all_tasks(files)
    one, _ = evaluated(run, tmp_path / "a", "--ckpt", models[0], "--tasks", *tasks)
    command = ["eval", *PLACE, "--out_dir", tmp_path / "b", "--max_new_tokens", 8]
    ends = two(child, [*command, "--ckpt", models[0], "--tasks", *tasks])
    assert [code for code, _ in ends] == [0, 0], ends
    both = json.loads((tmp_path / "b" / "results.json").read_text())["results"]
    for task, figures in one[str(models[0])].items():
        assert both[str(models[0])][task] == pytest.approx(figures, rel=1e-4), task


def test_a_killed_evaluation_goes_on_where_it_was(run, child, models, files, tmp_path):
    words = ["--ckpt", models[0], "--tasks", f"choice={files}/choice.jsonl", "--batch_size", 1]
    whole, _ = evaluated(run, tmp_path / "a", *words)
    command = ["eval", *PLACE, "--out_dir", tmp_path / "b", "--max_new_tokens", 8, *words]
    code, _ = child(command, (signal_at, "AnswerFile.append", 3)).end()
    assert code == -signal.SIGKILL
    done = len(answers_in(tmp_path / "b"))
    assert 0 < done < 30
    calls = []
    score = lm.Candidate.score

    def counted(self, pairs):
        calls.append(len(pairs))
        return score(self, pairs)

    lm.Candidate.score = counted
    try:
        found, _ = evaluated(run, tmp_path / "b", *words)
    finally:
        lm.Candidate.score = score
    assert sum(calls) == 3 * (30 - done) and found == whole
    assert (tmp_path / "a/answers.jsonl").read_text() == (tmp_path / "b/answers.jsonl").read_text()


def test_other_settings_ask_anew_and_other_tasks_stay(run, models, files, tmp_path):
    evaluated(run, tmp_path, "--ckpt", models[0], "--tasks", f"{files}/text.jsonl")
    words = ["--ckpt", models[0], "--tasks", f"choice={files}/choice.jsonl"]
    first, _ = evaluated(run, tmp_path, *words)
    second, _ = evaluated(run, tmp_path, *words, "--limit", 10)
    assert first[str(models[0])]["text"] == second[str(models[0])]["text"]
    assert second[str(models[0])]["choice"]["rows"] == 10
    assert len([row for row in answers_in(tmp_path) if row["task"] == "choice"]) == 10


def test_several_answers_are_voted_on_and_judged(run, models, files, data_dir, tmp_path):
    tokenizer = (data_dir / "tokenizer.model").read_bytes()
    save_base(tmp_path / "judge.pt", tokenizer, scalar_head=True)
    words = ["--num_samples", 4, "--temperature", 1, "--reward_ckpt", tmp_path / "judge.pt"]
    tasks = ["--tasks", f"number={files}/number.jsonl"]
    results, _ = evaluated(run, tmp_path / "out", "--ckpt", models[1], *tasks, *words)
    figures = results[str(models[1])]["number"]
    assert {"acc", "pass@2", "pass@4", "maj@4", "best@4"} <= set(figures)
    assert all(len(row["samples"]) == 4 for row in answers_in(tmp_path / "out"))


def test_a_suite_takes_what_stands_in_a_folder(run, models, files, tmp_path):
    (files / "notes.jsonl").write_text('{"unknown": 1}\n')
    words = ["--suite", "basics", files, "--n_shot", 1, "--limit", 4]
    results, said = evaluated(run, tmp_path, "--ckpt", models[0], *words)
    found = list(results[str(models[0])])
    assert found == ["choice", "choice@1", "number", "number@1", "sst2", "sst2@1", "text"]
    assert "notes.jsonl: no task that is known; skipped" in said


def test_a_data_folder_has_the_figures_of_training(run, trained, data_dir, tmp_path):
    words = ["--ckpt", trained, "--tasks", f"held={data_dir}", "--stride", 32]
    results, _ = evaluated(run, tmp_path, *words)
    saved = lm.load_checkpoint(trained)
    machine = lm.Machine(torch.device("cpu"), torch.float32, 0, 1)
    module = lm.Objective(lm.build_model(saved, machine.device), lm.pretrain_loss)
    folder = lm.TokenFolder(data_dir)
    row = lm.perplexity(module, [("", folder, 1.0)], 4, machine, 32, len(folder.val))
    figures = results[str(trained)]["held"]
    assert figures["loss"] == pytest.approx(row["val/loss"], rel=2e-3)  # the last window differs
    assert figures["bits_per_byte"] == pytest.approx(row["val/bpb"], rel=2e-3)


def test_the_harness_finds_what_eval_does(run, models, files, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = files / "choice.jsonl"
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(
        f"task: local\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {path}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "Question: {{question}}\\nAnswer:"\ndoc_to_choice: "{{choices}}"\n'
        "doc_to_target: answer\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    words = ["--harness", "local", "--harness_path", tmp_path / "tasks"]
    words += ["--tasks", f"choice={path}"]
    results, _ = evaluated(run, tmp_path / "out", "--ckpt", models[0], *words)
    ours, theirs = (results[str(models[0])][name] for name in ("choice", "local"))
    for name in ("acc", "acc_norm"):
        assert ours[name] == theirs[name]
        assert ours[f"{name}_stderr"] == pytest.approx(theirs[f"{name}_stderr"])
    assert theirs["rows"] == 30


MISTAKES = {
    "no checkpoint": (["--tasks", "choice={files}/choice.jsonl"], "--ckpt is missing"),
    "nothing to do": (["--ckpt", "{model}"], "there is nothing to evaluate"),
    "no such file": (["--ckpt", "{model}", "--tasks", "arc=none.jsonl"], "none.jsonl"),
    "no such task": (["--ckpt", "{model}", "--tasks", "arcc={files}/choice.jsonl"], "did you mean"),
    "other rows": (["--ckpt", "{model}", "--tasks", "arc={files}/text.jsonl"], "row 1: "),
    "twice": (["--ckpt", "{model}", "{model}", "--tasks", "{files}/choice.jsonl"], "twice"),
    "no folder": (["--ckpt", "{model}", "--suite", "basics", "nowhere"], "is no folder"),
    "alike": (
        ["--ckpt", "{model}", "--tasks", "{files}/number.jsonl", "--num_samples", "4"],
        "--temperature",
    ),
    "too long a stride": (
        ["--ckpt", "{model}", "--tasks", "{files}/text.jsonl", "--stride", "999"],
        "--stride 999 is longer than the context",
    ),
    "a judge of nothing": (
        ["--ckpt", "{model}", "--tasks", "{files}/number.jsonl", "--reward_ckpt", "{model}"],
        "--num_samples",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_of_eval(name, run, models, files, tmp_path):
    words, said = MISTAKES[name]
    words = [word.format(files=files, model=models[0]) for word in words]
    complaint(run(["eval", *PLACE, "--out_dir", tmp_path, *words]), said)


def test_texts_end_at_a_mark_and_leave_the_batch(candidate, monkeypatch):
    """They are the whole ones, cut; and no token is drawn behind the mark."""
    tokenizer = candidate.tokenizer
    prompts = [[tokenizer.bos, *tokenizer.encode(text)] for text in documents(9, seed=12)]
    prompts = [prompt[:12] for prompt in prompts]
    sampling = lm.SamplingSettings(12, temperature=1.0, top_p=1.0)
    numbers = range(20, 29)
    whole = candidate.complete(prompts, sampling, 3, numbers)
    letters = sorted(set("".join(whole)), key="".join(whole).count)
    marks = [letters[len(letters) // 2], letters[-1] + letters[-2], "nowhere"]
    drawn = []
    step = lm.RunningBatch.step

    def counted(batch):
        found = step(batch)
        drawn.extend(found)
        return found

    monkeypatch.setattr(lm.RunningBatch, "step", counted)
    found = lm.complete_until(candidate, prompts, sampling, 3, numbers, marks)
    assert found == [lm.before_any(text, marks) for text in whole] != whole
    cut = len(drawn)
    drawn.clear()
    assert lm.complete_until(candidate, prompts, sampling, 3, numbers, ["nowhere"]) == whole
    assert cut < len(drawn)


def test_the_adapter_answers_every_kind_of_request(candidate):
    """In the order of the requests, whatever options stand among them."""
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    adapter, tokenizer = lm.harness_model(candidate, 5), candidate.tokenizer
    texts = list(itertools.islice(documents(6, seed=14), 6))
    texts = [" ".join(text.split()[:3]) for text in texts]
    options = [{"until": ["e"], "max_gen_toks": 9}, {"until": "a", "max_gen_toks": 5}]
    requests = [
        instance("generate_until", {}, (text, options[i % 2]), i) for i, text in enumerate(texts)
    ]
    for i, answer in enumerate(adapter.generate_until(requests)):
        ids = [tokenizer.bos, *tokenizer.encode(texts[i])]
        greedy = lm.SamplingSettings(options[i % 2]["max_gen_toks"], temperature=0.0)
        (whole,) = candidate.complete([ids], greedy, 0)
        assert answer == whole.partition("ea"[i % 2])[0]
    pairs = [instance("loglikelihood", {}, (text, " and"), i) for i, text in enumerate(texts)]
    for text, (logp, greedy) in zip(texts, adapter.loglikelihood(pairs), strict=True):
        wanted = alone(candidate, *lm.text_pair(tokenizer, text, " and"))
        assert (logp, greedy) == (pytest.approx(wanted[0], abs=1e-4), wanted[1])
    rolling = [
        instance("loglikelihood_rolling", {}, (text * 9,), i) for i, text in enumerate(texts)
    ]
    for text, total in zip(texts, adapter.loglikelihood_rolling(rolling), strict=True):
        ids = [tokenizer.bos, *tokenizer.encode(text * 9)]
        task = lm.PerplexityTask("t", [ids], [(1, 1)], 24, 24)
        figures = task.figures(task.answers(candidate, list(range(len(task)))))
        assert -total == pytest.approx(figures["loss"] * (len(ids) - 1), rel=1e-5)
