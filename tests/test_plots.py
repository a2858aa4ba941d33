"""Curves of runs: what is drawn, against what, and the report that needs nothing from outside."""

import html
import html.parser
import json
import re

import numpy as np
import pytest
import torch
from conftest import complaint

import standalone_transformer_lm as lm


def log(folder, rows, samples=()):
    folder.mkdir(parents=True)
    for name, lines in (("metrics", rows), ("samples", samples)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


def pretraining(count=30, scale=1.0):
    rows = []
    for step in range(1, count + 1):
        row = {
            "step": step,
            "tokens": 1000 * step,
            "time": 36.0 * step,
            "train/loss": scale * 5 / step,
            "train/lr": 1e-3,
            "train/grad_norm": 1.0 / step,
            "perf/tok_per_s": 1000.0,
            "perf/mfu": None,
            "cost/usd": 0.1 * step,
        }
        rows.append(row)
        if step % 10 == 0:
            more = {"val/loss": scale * 6 / step, "val/loss/web": 1.0, "val/bpb": 2.0 / step}
            rows.append({key: row[key] for key in ("step", "tokens", "time")} | more)
    return rows


def practice():
    return [
        {
            "step": step,
            "time": float(step),
            "train/reward": step / 50,
            "train/reward/number": step / 50,
            "train/entropy": 0.3,
            "train/length": 7.0,
            "val/pass@1": step / 60,
            "val/pass@4": step / 55,
        }
        for step in range(1, 51)
    ]


@pytest.fixture
def runs(tmp_path):
    return log(tmp_path / "runs/a", pretraining()), log(tmp_path / "runs/b", pretraining(scale=2))


def test_panels_hold_what_was_logged(runs, tmp_path):
    found = {title: metrics for title, metrics, _ in lm.panels_of([lm.RunLog(runs[0])])}
    assert found == {
        "loss (nats)": ["train/loss", "val/loss", "val/loss/web"],
        "bits per byte": ["val/bpb"],
        "learning rate": ["train/lr"],
        "gradient norm": ["train/grad_norm"],
        "tokens per second": ["perf/tok_per_s"],
    }
    found = lm.panels_of([lm.RunLog(log(tmp_path / "rl", practice()))])
    assert [(title, metrics) for title, metrics, _ in found] == [
        ("reward", ["train/reward"]),  # its only part is the same curve
        ("held-out prompts solved", ["val/pass@1", "val/pass@4"]),
        ("completion length (tokens)", ["train/length"]),
        ("entropy (nats per token)", ["train/entropy"]),
    ]


@pytest.mark.parametrize(
    ("against", "last"), [("step", 30), ("tokens", 30_000), ("hours", 0.3), ("dollars", 3.0)]
)
def test_curves_stand_against_the_axis_that_is_named(against, last, runs):
    x, y = lm.RunLog(runs[0]).curve("train/loss", against)
    assert x[-1] == pytest.approx(last) and y[-1] == pytest.approx(5 / 30) and len(x) == 30


def lines_of(axes):
    return {line.get_label(): line.get_xydata() for line in axes.get_lines()}


def test_a_picture_has_each_curve_of_each_run(runs):
    pytest.importorskip("matplotlib")
    opened = lm.open_runs(map(str, runs), "step")
    assert [run.name for run in opened] == ["a", "b"]
    figure = lm.draw_runs(opened, "step")
    panels = {axes.get_title(loc="left"): lines_of(axes) for axes in figure.axes}
    names = ("train/loss", "val/loss", "val/loss/web")
    assert {f"{run} {name}" for run in "ab" for name in names} == set(panels["loss (nats)"])
    assert np.allclose(panels["loss (nats)"]["b val/loss"][:, 1], [1.2, 0.6, 0.4])
    assert set(panels["learning rate"]) == {"a", "b"}
    (norms,) = [axes for axes in figure.axes if axes.get_title(loc="left") == "gradient norm"]
    assert norms.get_yscale() == "log" and norms.get_xlabel() == "step"


def test_runs_keep_their_names_where_they_share_no_folder(runs, monkeypatch):
    monkeypatch.chdir(runs[0].parent)
    for folders in (["a", str(runs[1])], ["a", "a"], ["a"]):
        assert [run.name for run in lm.open_runs(folders, "step")] == folders


def test_a_long_curve_is_drawn_with_its_mean(tmp_path):
    pytest.importorskip("matplotlib")
    run = lm.RunLog(log(tmp_path / "long", pretraining(200)))
    (loss, *_) = lm.draw_runs([run], "step").axes
    assert len(loss.get_lines()) == 4
    y = np.arange(100.0)
    assert np.allclose(lm.running_mean(y)[10:-10], y[10:-10]) and len(lm.running_mean(y)) == 100


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_pictures_are_written_in_the_format_of_their_name(suffix, runs, run, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"out.{suffix}"
    code, out, err = run(["plot", *runs, "--out", path, "--against", "tokens"])
    assert code == 0 and "loss (nats)" in out, err
    head = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(head)


def test_the_terminal_shows_every_metric(runs, run):
    code, out, _ = run(["plot", runs[0], "--terminal"])
    assert code == 0 and "train/loss (loss (nats)), step 1 to 30, last 0.1667" in out
    assert out.count("█") > 100


class Page(html.parser.HTMLParser):
    """Checks that tags close in order, and keeps texts and what is loaded from elsewhere."""

    EMPTY = ("meta", "br", "img", "path", "use", "rect", "stop")

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.loaded = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.loaded += [v for k, v in attributes if k == "src" or (k == "href" and tag == "link")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_a_report_holds_settings_curves_samples_and_results(run, tmp_path):
    pytest.importorskip("matplotlib")
    samples = [
        {"step": step, "prompt": "2 < 3?", "answer": f"<b>at {step}</b>", "reward": 0.5}
        for step in range(1, 61)
    ]
    folder = log(tmp_path / "run", practice(), samples)
    (folder / "args.txt").write_text("--lr=1e-3\n")
    (folder / "eval").mkdir()
    figures = {"acc": 0.25, "acc_stderr": 0.01, "rows": 8}
    results = {"results": {"runs/<x>": {"arc_easy": figures}}}
    (folder / "eval" / "results.json").write_text(json.dumps(results))
    code, _, err = run(["plot", folder, "--html"])
    assert code == 0, err
    page = Page((folder / "report.html").read_text())
    text = " ".join(page.texts)
    for part in ("50 steps", "val/pass@4", "--lr=1e-3", "arc_easy", "25.0% ±1.0", "runs/<x>"):
        assert part in text, part
    assert "<b>at 60</b>" in text and "2 < 3?" in text
    assert not page.loaded and not re.search(
        r"https?://(?!www\.w3|purl|creativecommons)",
        (folder / "report.html").read_text().replace("https://matplotlib.org/", ""),
    )


def test_a_log_that_was_cut_is_read_up_to_there(runs, tmp_path):
    path = runs[0] / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 31, "train/lo')
    assert lm.RunLog(runs[0]).rows[-1]["step"] == 30


MISTAKES = {
    "no run": ([], "no run is named"),
    "no log": (["{empty}"], "has no metrics.jsonl"),
    "no cost": (["{plain}", "--against", "dollars"], "logged no dollars"),
    "two reports": (["{run}", "{run}", "--html"], "reports one run"),
    "both": (["{run}", "--html", "--terminal"], "both given"),
    "no picture": (["{run}", "--out", "{empty}/x.doc"], "is no picture"),
    "results of nothing": (["{run}", "--results", "x.json"], "--html"),
    "results that are missing": (["{run}", "--html", "--results", "{empty}/x.json"], "x.json"),
    "an axis": (["{run}", "--against", "time"], "--against time is not known"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_of_plot(name, run, runs, tmp_path):
    words, said = MISTAKES[name]
    (tmp_path / "empty").mkdir()
    plain = log(tmp_path / "plain", practice())
    places = {"empty": tmp_path / "empty", "plain": plain, "run": runs[0]}
    complaint(run(["plot", *(word.format(**places) for word in words)]), said)


# ---- Looking inside ----

SHAPES = {
    "plain": {},
    "grouped heads": {"n_kv_head": 2, "qk_norm": True},
    "windows and sinks": {"window": 4, "n_sink": 2},
    "documents": {"doc_mask": True},
}


def looked_at(tiny_tokenizer, **shape):
    tokenizer = lm.Tokenizer(tiny_tokenizer)
    plain = {"seq_len": 24, "n_layer": 2, "d_model": 32, "n_head": 4, "ffn_mult": 2.0}
    settings = lm.ModelSettings(vocab_size=tokenizer.vocab_size, **plain | shape)
    model = lm.Transformer(settings).eval()
    model.init_weights(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5 if weight.dim() > 1 else 1)
    machine = lm.Machine(torch.device("cpu"), torch.float32, 0, 1)
    return lm.Candidate("tiny", "key", model, tokenizer, machine, False, 4)


@pytest.mark.parametrize("name", SHAPES)
def test_attention_weights_give_the_attention_s_own_output(name, tiny_tokenizer):
    model = looked_at(tiny_tokenizer, **SHAPES[name]).model
    ids = torch.randint(4, 400, (1, 11))
    outputs, inputs = [], []

    def keep(_, given, output):
        inputs.append(given)
        outputs.append(output)

    hooks = [block.attn.register_forward_hook(keep) for block in model.blocks]
    with torch.no_grad():
        weights = lm.attention_weights(model, ids)
    for hook in hooks:
        hook.remove()
    for block, weight, given, output in zip(model.blocks, weights, inputs, outputs, strict=True):
        attn = block.attn
        with torch.no_grad():
            _, _, v = attn.heads(*given)
            mixed = weight @ v[0].repeat_interleave(attn.H // attn.K, dim=0)  # (H, T, D)
            wanted = attn.proj(mixed.transpose(0, 1).reshape(1, len(mixed[0]), -1))
        assert torch.allclose(wanted, output, atol=1e-5)
        assert torch.allclose(weight.sum(-1), torch.ones(()), atol=1e-5)


def test_a_page_colours_each_token_by_its_loss(tiny_tokenizer, tmp_path):
    candidate = looked_at(tiny_tokenizer)
    text = "The harbour <b>&</b> the café:\n  東京 and Zürich 12 🙂 " * 3
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    page = lm.token_page(candidate, str(tmp_path / "text.txt"))
    parsed = Page(page)
    shown = re.findall(r'title="([\d.]+) nats">(.*?)</span>', page, re.S)
    assert "".join(html.unescape(piece) for _, piece in shown) == text
    ids = candidate.tokenizer.encode(text)
    task = lm.PerplexityTask("t", [[candidate.tokenizer.bos, *ids]], [(1, 1)], 24, 12)
    figures = task.figures(task.answers(candidate, list(range(len(task)))))
    total = sum(float(loss) for loss, _ in shown)
    assert total == pytest.approx(figures["loss"] * len(ids), abs=0.01 * len(shown))
    assert f"{len(ids):,} tokens, {figures['loss']:.3f} nats a token" in " ".join(parsed.texts)


def test_eval_writes_what_it_looked_at(run, trained, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "text.txt").write_text("The harbour was quiet.")
    words = ["--attention", "The harbour $x", "--per_token", tmp_path / "text.txt"]
    code, _, err = run(["eval", "--ckpt", trained, "--out_dir", tmp_path, *words, "--threads", 1])
    assert code == 0, err
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert "nats a token" in (tmp_path / "per_token.html").read_text()
    assert not (tmp_path / "results.json").exists()
