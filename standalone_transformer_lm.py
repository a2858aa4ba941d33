#!/usr/bin/env python3
"""Train a language model of your own: one file, from raw text to a model in LLaMA format.

Quick start
  pip install torch sentencepiece numpy tqdm
  python standalone_transformer_lm.py demo                                # a trial in minutes
  python standalone_transformer_lm.py prep  --text_path docs.txt --out_dir data --vocab_size 8192
  python standalone_transformer_lm.py train --data_dir data --out_dir run --preset 138m
  torchrun --nproc_per_node=8 standalone_transformer_lm.py train --data_dir data --out_dir run
  python standalone_transformer_lm.py generate --ckpt run/ckpt_best.pt --prompt "Once upon a time"
  python standalone_transformer_lm.py sft   --ckpt run --data chats.jsonl --out_dir sft
  python standalone_transformer_lm.py dpo   --ckpt sft --data pairs.jsonl --out_dir dpo
  python convert_to_llama.py --ckpt run/ckpt_best.pt --out hf                # for transformers

Every command explains its flags with --help, and @FILE reads flags from a file; each run writes
OUT/args.txt, so `train @OUT/args.txt --max_steps 300000` repeats it with one change. The same
--out_dir resumes.

Each room uses only what stands above it.

Rooms
  Ground       constants, errors a user can act on, safe writing, progress
  Settings     every setting once: flags, checkpoint config and args.txt come from here
  Machine      device, number format, seeds, signals, and everything distributed
  Text         the tokenizer and the chat format
  Prep         text in any packing becomes token files
  Batches      which tokens make up which step
  Model        the transformer; it touches no file and prints nothing
  LoRA         low-rank adapters: attach, switch off, merge
  Engine       sampling and cached generation; token ids only
  Losses       tensors in, tensors out
  Optimisers   parameter groups and schedules
  Checkpoints  the only place that saves and loads
  Gauges       metrics to files and services, and the progress line
  Loop         the one training loop
  Judges       how good is a model
  Commands     one cmd_* for each subcommand: wiring only
  Front door   the table of commands and main

Shape legend
  B batch   T query positions   S cached positions   V vocabulary   L layers
  d d_model   F feed-forward width   H query heads   K key/value heads   D head size   N B*T

File formats
  data folder   tokenizer.model, train.bin, val.bin (little-endian uint16, or uint32 above 65,535
                ids), meta.json, written last; a document is <s> ids </s>
  checkpoint    one dict: model config optim scaler format kind step samples best_val rng args
                tokenizer ema gauges; whole, unwrapped fp32 weights; optim is a list, a state for
                each optimiser; read with weights_only=True
                A run with adapters stores them alone: lora says of which model they are
  metrics.jsonl one object a line: step tokens time, train/*, val/*, moe/*, perf/*, gpu/*,
                cost/*
  rows          .jsonl, .json or .parquet. sft: messages, or prompt and response, or instruction,
                input and output; dpo: prompt, chosen, rejected; reward: those, or a label

Exit codes: 0 done; 2 your mistake, told as `error:` and `fix:`; 1 a bug, with its traceback;
128 + signal after a signal, when the step was finished and saved.
"""

import argparse
import ast
import bisect
import bz2
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import functools
import glob
import gzip
import hashlib
import importlib
import inspect
import io
import json
import lzma
import math
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import signal
import struct
import sys
import sysconfig
import threading
import time
import typing
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

# ==================================================================================================
# Ground: constants, errors a user can act on, safe writing, progress
# ==================================================================================================

PROGRAM = "standalone_transformer_lm.py"
DATA_FORMAT = 1  # of meta.json; raised when an older reader would misread the folder
CHECKPOINT_FORMAT = 1
IGNORE = -100  # a target that is no target, torch's own convention
OTHER_RANKS_WAIT_S = 2.0  # before they tell an error that rank 0 has told and ended the job for
LINE_EVERY_S = 10.0  # between two progress lines when stderr is no terminal
DISK_FAULTS = {
    errno.ENOSPC: ("no space left on the device", "free some space, or name a folder elsewhere"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or name a folder elsewhere"),
    errno.EFBIG: ("the file grew beyond the size allowed", "raise `ulimit -f`"),
    errno.EACCES: ("permission denied", "name a folder you may write, or mend its permissions"),
    errno.EPERM: ("operation not permitted", "name a folder you may write"),
    errno.EROFS: ("the file system is read-only", "name a folder elsewhere"),
    errno.ENOENT: ("no such file or folder", "check the path"),
    errno.ENOTDIR: ("a part of the path is no folder", "check the path"),
    errno.EISDIR: ("that is a folder, not a file", "name a file in it"),
    errno.ENAMETOOLONG: ("the name is too long", "name a shorter path"),
    errno.ELOOP: ("its links run in a circle", "check the path"),
    errno.EIO: ("the disk cannot be read or written", "check the disk"),
    errno.EEXIST: ("something of that name is in the way", "name another path"),
}


class UserError(Exception):
    """A mistake the user can mend: what is wrong and how to fix it, a sentence each.

    Several faults found together travel in one error, as further (what, fix) pairs.
    """

    def __init__(self, what: str, fix: str, *more: tuple[str, str]):
        super().__init__(what, fix, *more)  # so that it crosses process borders whole
        self.faults = [(what, fix), *more]

    def __str__(self) -> str:
        return "\n".join(f"error: {what}\nfix: {fix}" for what, fix in self.faults)


def disk_error(fault: OSError, path: str | Path = "") -> UserError | None:
    """The sentence for an OSError of the user's disk or path, or None where it is a bug."""
    if fault.errno not in DISK_FAULTS:
        return None
    what, fix = DISK_FAULTS[fault.errno]
    return UserError(f"{fault.filename or path}: {what}" if fault.filename or path else what, fix)


def raise_all(faults: list[tuple[str, str]]) -> None:
    """Raise every fault found as one UserError; nothing happens when there is none."""
    if faults:
        raise UserError(*faults[0], *faults[1:])


def fsync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut; a no-op where folders cannot be opened."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "wb"):
    """Open `path` for writing so that it holds, at every moment, its old or its new content.

    The bytes go to a hidden neighbour, are fsynced and renamed; a failure removes the neighbour.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    encoding = None if "b" in mode else "utf-8"
    try:
        with open(temporary, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as fault:
        fault.filename = fault.filename or str(path)  # a failed write does not know its file
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def read_json(path: Path) -> dict:
    """A JSON object from a file; raises UserError where it is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as fault:
        raise UserError(f"{path} is not valid JSON ({fault})", "make the folder anew") from fault
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object", "make the folder anew")
    return value


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def short(number: float) -> str:
    """12345678 -> '12.3M'."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3), ("", 1.0)):
        if abs(number) >= 0.9995 * size:
            figure = number / size
            return f"{figure:.0f}{unit}" if abs(figure) >= 99.95 else f"{figure:.3g}{unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """3725.0 -> '1h02m'."""
    if not math.isfinite(seconds):
        return "?"
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def say(*lines: str) -> None:
    """Print for the person: on stdout, at once, and on rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(*lines, sep="\n", flush=True)


class Progress:
    """How far something is: a tqdm bar on a terminal, a plain line every few seconds elsewhere.

    Args: total in `unit`s (None where unknown), where it starts, and whether this process talks.
    """

    def __init__(self, what: str, total: float | None, unit: str, start: float = 0,
                 talks: bool = True):
        self.what, self.total, self.unit, self.done, self.start = what, total, unit, start, start
        self.began, self.last_line = None, time.monotonic()
        self.talks = talks
        self.bar = None
        if talks and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=start, desc=what, unit=unit, unit_scale=True,
                            dynamic_ncols=True, smoothing=0.1)

    def update(self, done: float, note: str = "") -> None:
        """`done` units of the total are finished; `note` stands behind the figures."""
        if self.began is None:  # what comes first warms up, and would spoil the estimate
            self.began, self.start = time.monotonic(), done
        step, self.done = done - self.done, done
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(step)
        elif self.talks and time.monotonic() - self.last_line >= LINE_EVERY_S:
            self.last_line = time.monotonic()
            print(self.line(note), file=sys.stderr, flush=True)

    def line(self, note: str = "") -> str:
        share = f" of {short(self.total)} ({self.done / self.total:.0%})" if self.total else ""
        more = self.total and self.done < self.total
        eta = f", {duration(self.eta())} left" if more else ""
        note = f"  {note}" if note else ""
        return f"{self.what}: {short(self.done)}{share} {self.unit}{eta}{note}"

    def eta(self) -> float:
        """Seconds left at the mean speed so far; infinity before that is known."""
        if not self.total or self.done <= self.start:
            return math.inf
        return (self.total - self.done) / (self.done - self.start) * (time.monotonic() - self.began)

    def close(self, note: str = "") -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.talks and note:
            print(self.line(note), file=sys.stderr, flush=True)


# ==================================================================================================
# Settings: every setting once: flags, checkpoint config and args.txt come from here
# ==================================================================================================

PURE = {"n_kv_head": 4, "qk_norm": True, "seq_len": 2048, "vocab_size": 50304}
PRESETS = {  # name -> values of settings fields; a flag given beside --preset wins
    "138m": {"n_layer": 12, "d_model": 768, "n_head": 12, "ffn_mult": 4.0},
    "350m": {"n_layer": 24, "d_model": 1024, "n_head": 16, "ffn_mult": 4.0},
    "700m": {"n_layer": 32, "d_model": 1280, "n_head": 20, "ffn_mult": 4.0},
    "sparsa-small": {"n_layer": 12, "d_model": 768, "n_head": 12, "n_kv_head": 4},
    "sparsa-base": {"n_layer": 28, "d_model": 1024, "n_head": 16, "n_kv_head": 8},
    "sparsa-large": {"n_layer": 32, "d_model": 1536, "n_head": 24, "n_kv_head": 8},
    "sparsa-xl": {"n_layer": 36, "d_model": 2048, "n_head": 32, "n_kv_head": 8},
    "pure-tiny": {**PURE, "n_layer": 12, "d_model": 512, "n_head": 8, "ffn_hidden": 1408},
    "pure-small": {**PURE, "n_layer": 16, "d_model": 768, "n_head": 12, "ffn_hidden": 2112},
    "pure-medium": {**PURE, "n_layer": 24, "d_model": 1024, "n_head": 16, "ffn_hidden": 2816},
    "smollm-600m": {"n_layer": 24, "d_model": 1536, "n_head": 12, "n_kv_head": 4,
                    "ffn_hidden": 4096, "nope_every": 4, "seq_len": 2048, "vocab_size": 32000,
                    "embed_scale": True, "trunc_init": True, "optimizer": "muon",
                    "schedule": "wsd"},
    "modern-253m": {"n_layer": 16, "d_model": 1024, "n_head": 16, "ffn_hidden": 3120,
                    "n_sink": 4, "seq_len": 2048, "vocab_size": 32000},
}
FILE_COMMENT = re.compile(r"""(?:^|(?<=\s))#.*$|('[^']*'|"(?:\\.|[^"\\])*"|\\.)""")
NOT_REPEATED = ("preset", "resume")  # its values are written out; it is said of one start alone
TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def setting(default, help: str, *, choices: Iterable = (), least=None, below=None,
            positional: bool = False, flag: bool = True):
    """A dataclass field that is also a flag.

    Args: its default, its help, the allowed `choices`, its `least` value, the bound it must stay
    `below`, whether it is given without its name, and whether it is a flag at all.
    """
    return field(default=default, metadata={
        "help": help, "choices": tuple(choices), "least": least, "below": below,
        "positional": positional, "flag": flag})


@dataclass
class PrepSettings:
    """Input, tokenizer and output of prep."""

    text_path: tuple[str, ...] = setting(
        (), "files, folders or globs of text, .jsonl or .parquet, plain or .gz .xz .bz2 .zst; "
        "- is stdin")
    out_dir: str = setting("", "folder to write: tokenizer.model, train.bin, val.bin, meta.json")
    vocab_size: int = setting(32000, "size of the tokenizer to train", least=280, below=1 << 24)
    val_split: float = setting(
        0.01, "share of documents held out for validation", least=0.0, below=1.0)
    document: str = setting("line", "what a document is in a text file",
                            choices=("line", "blank", "file", "jsonl"))
    text_key: str = setting("text", "key of the text in .jsonl and .parquet rows")
    errors: str = setting("strict", "invalid UTF-8: stop, or put U+FFFD in its place",
                          choices=("strict", "replace"))
    spm: str = setting("", "use this SentencePiece model instead of training one")
    sample_mb: float = setting(
        100.0, "megabytes of text the tokenizer is trained on, picked by hash", least=0.01)
    workers: int = setting(0, "encoding processes; 0 means one a core", least=0)
    shard: str = setting("", "do part i of n, as i/n counted from 0; --merge joins the parts")
    merge: bool = setting(False, "join the shards found in --out_dir")
    overwrite: bool = setting(False, "replace the data that --out_dir holds")

    def faults(self) -> Iterator[tuple[str, str]]:
        if not self.out_dir:
            yield "--out_dir is missing", "name the folder to write, --out_dir data"
        if not self.text_path and not self.merge:
            yield "--text_path is missing", "name your text, --text_path docs.txt"
        if self.shard and not re.fullmatch(r"\d+/\d+", self.shard):
            yield f"--shard {self.shard} is not of the form i/n", "the first of four is --shard 0/4"
        elif self.shard and not self.part()[0] < self.part()[1]:
            yield f"--shard {self.shard} counts past its end", "i/n runs from 0/n to (n-1)/n"
        if self.shard and not self.spm:
            yield ("--shard needs --spm: all parts must share one tokenizer",
                   "prep a sample of the text first and pass its tokenizer.model")

    def part(self) -> tuple[int, int]:
        """(i, n) of --shard; (0, 1) where the work is not split."""
        return tuple(map(int, self.shard.split("/"))) if self.shard else (0, 1)


@dataclass
class DataSettings:
    """Data to train on."""

    data_dir: str = setting("data", "folder that prep wrote, or a mixture of several as "
                            "NAME=FOLDER:WEIGHT,NAME=FOLDER:WEIGHT")

    def domains(self) -> list[tuple[str, str, float]]:
        """(name, folder, weight) of each part; weights sum to 1; one folder alone has no name."""
        if "=" not in self.data_dir:
            return [("", self.data_dir, 1.0)]
        parts = [re.fullmatch(r"([^=]+)=(.+):([0-9.eE+-]+)", p) for p in self.data_dir.split(",")]
        total = sum(float(part[3]) for part in parts)
        return [(part[1], part[2], float(part[3]) / total) for part in parts]

    def faults(self) -> Iterator[tuple[str, str]]:
        for part in self.data_dir.split(",") if "=" in self.data_dir else ():
            match = re.fullmatch(r"[\w-]+=.+:(\d*\.?\d+)", part)
            if not match or float(match[1]) <= 0:
                yield (f"--data_dir: {part} is not NAME=FOLDER:WEIGHT with a weight above 0",
                       "write web=data/web:0.9,code=data/code:0.1")
        names = [part.split("=")[0] for part in self.data_dir.split(",") if "=" in part]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"--data_dir names {name} twice", "give each part a name of its own"


@dataclass
class DeviceSettings:
    """Device and numbers."""

    seed: int = setting(1337, "seed of every random draw", least=0)
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = setting("auto", "matmul precision; auto takes bf16 where the hardware has it, "
                         "fp16 on older CUDA, else fp32", choices=("auto", "bf16", "fp16", "fp32"))
    threads: int = setting(0, "CPU threads; 0 shares the cores among the processes", least=0)


@dataclass
class StepSettings:
    """Size and price of a step."""

    preset: str = setting("", "a published size by name", choices=("", *PRESETS))
    batch_size: int = setting(8, "sequences in a micro-batch of one device", least=1)
    grad_accum_steps: int = setting(1, "micro-batches a step", least=1)
    grad_checkpoint: bool = setting(False, "compute each layer again in the backward pass, for "
                                    "much less memory")
    usd_per_hour: float = setting(0.0, "price of the machine; shows the money spent", least=0.0)


@dataclass
class RunSettings(StepSettings):
    """The run."""

    out_dir: str = setting("runs/lm", "folder of checkpoints and metrics; the same one resumes")
    resume: bool = setting(True, "go on from ckpt_last.pt; 0 refuses to touch an existing run")
    compile: str = setting("auto", "torch.compile; auto does where the run is long enough to repay "
                           "the wait", choices=("auto", "0", "1"))
    max_steps: int = setting(1000, "optimiser steps in all", least=1)
    log_interval: int = setting(10, "steps between lines of metrics.jsonl", least=1)
    eval_interval: int = setting(250, "steps between evaluations", least=1)
    eval_tokens: int = setting(2_000_000, "most validation tokens an evaluation reads", least=1)
    ckpt_interval: int = setting(250, "steps between checkpoints", least=1)
    keep_last: int = setting(2, "numbered checkpoints kept", least=1)
    wandb: str = setting("", "Weights & Biases project to log to")
    tensorboard: bool = setting(False, "write TensorBoard events to OUT/tensorboard")

    def faults(self) -> Iterator[tuple[str, str]]:
        if not self.out_dir:
            yield "--out_dir is empty", "name the folder of the run, --out_dir runs/lm"


@dataclass
class OptimSettings:
    """Optimiser and schedule."""

    lr: float = setting(6e-4, "peak learning rate", least=0.0)
    min_lr: float = setting(0.1, "where cosine and wsd end, as a share of --lr", least=0.0)
    optimizer: str = setting("muon", "muon takes the hidden matrices and leaves the rest to AdamW",
                             choices=("adamw", "muon"))
    schedule: str = setting(
        "wsd", "course of the learning rate after the warm-up; wsd is warm-up, stable, decay",
        choices=("cosine", "wsd", "wsd_sqrt", "constant", "inverse_sqrt"))
    warmup_steps: int = setting(100, "steps of linear warm-up", least=0)
    decay_share: float = setting(
        0.2, "share of --max_steps that wsd decays over", least=0.0, below=1.0)
    weight_decay: float = setting(0.1, "on matrices; never on norms and embeddings", least=0.0)
    beta1: float = setting(0.9, "AdamW's first moment", least=0.0, below=1.0)
    beta2: float = setting(0.95, "AdamW's second moment", least=0.0, below=1.0)
    grad_clip: float = setting(1.0, "largest gradient norm; 0 never clips", least=0.0)
    z_loss: float = setting(0.0, "weight of log(Z)^2, which keeps the logits small", least=0.0)
    muon_lr: float = setting(0.0, "Muon's peak learning rate; 0 means --lr", least=0.0)
    muon_scale: str = setting(
        "rms", "update size by shape: rms is AdamW's, so --lr carries over; shape is "
        "sqrt(max(1, rows/columns))", choices=("rms", "shape"))
    muon_momentum: float = setting(0.95, "Muon's momentum", least=0.0, below=1.0)
    muon_warmup: int = setting(300, "steps over which the momentum rises from 0.85", least=0)
    ema: float = setting(0.0, "decay of an average of the weights, which is evaluated and exported "
                         "in their place; 0 is off", least=0.0, below=1.0)


def divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def either(options: Iterable) -> str:
    """[16, 32] -> '16 or 32'."""
    return " or ".join(map(str, options))


@dataclass
class ModelSettings:
    """Architecture."""

    seq_len: int = setting(512, "context length in tokens", least=2)
    n_layer: int = setting(12, "layers", least=1)
    d_model: int = setting(768, "width of the residual stream", least=2)
    n_head: int = setting(12, "query heads", least=1)
    n_kv_head: int = setting(0, "key/value heads; 0 means as many as query heads", least=0)
    head_dim: int = setting(0, "head size; 0 means d_model / n_head", least=0)
    ffn_mult: float = setting(4.0, "feed-forward width over d_model", least=0.01)
    ffn_hidden: int = setting(0, "feed-forward width, instead of --ffn_mult", least=0)
    dropout: float = setting(0.0, "dropout, attention included", least=0.0, below=1.0)
    tie: bool = setting(True, "the output head shares the embedding")
    rope_theta: float = setting(10000.0, "base of the rotary frequencies", least=1.0)
    norm_eps: float = setting(1e-6, "epsilon of RMSNorm", least=0.0)
    qk_norm: bool = setting(False, "RMSNorm on queries and keys, a head at a time")
    nope_every: int = setting(0, "every n-th layer has no rotary positions; 0 is off", least=0)
    window: int = setting(0, "attention reaches this many tokens back; 0 is no limit", least=0)
    full_every: int = setting(0, "with --window, every n-th layer attends without limit", least=0)
    n_sink: int = setting(0, "learned tokens before the text that every query may see", least=0)
    doc_mask: bool = setting(False, "packed documents do not see each other")
    n_expert: int = setting(0, "experts of a mixture in place of each feed-forward; 0 is off",
                            least=0)
    n_expert_active: int = setting(2, "experts that each token goes through", least=1)
    balance_loss: float = setting(0.01, "weight of the experts' load-balance loss", least=0.0)
    router_z_loss: float = setting(0.001, "weight of the routers' z-loss", least=0.0)
    softcap: float = setting(0.0, "logits are bent to stay within this; 0 is off", least=0.0)
    embed_scale: bool = setting(False, "embeddings enter times sqrt(d_model)")
    trunc_init: bool = setting(False, "truncated-normal weights, std 0.5/sqrt(d_model)")
    rope_scaling: str = setting("none", "stretch rotary positions to a longer context",
                                choices=("none", "linear", "yarn"))
    rope_factor: float = setting(1.0, "how far they are stretched", least=1.0)
    rope_original: int = setting(0, "context before stretching; 0 means seq_len / rope_factor",
                                 least=0)
    vocab_size: int = setting(0, "token ids, read off the tokenizer", flag=False)
    bos_id: int = setting(1, "id of <s>, read off the tokenizer", flag=False)
    scalar_head: bool = setting(False, "a head that scores, beside the one that speaks",
                                flag=False)
    rope_layout: str = setting("half", "pairing of rotary dimensions", flag=False)

    def windowed(self, layer: int) -> bool:
        """Whether a layer, counted from 0, attends within --window only."""
        return bool(self.window) and not (self.full_every and (layer + 1) % self.full_every == 0)

    def rotates(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has rotary positions."""
        return not (self.nope_every and (layer + 1) % self.nope_every == 0)

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def head_size(self) -> int:
        return self.head_dim or self.d_model // self.n_head

    @property
    def hidden(self) -> int:
        return self.ffn_hidden or int(self.ffn_mult * self.d_model)

    def faults(self) -> Iterator[tuple[str, str]]:
        if self.n_head < 1 or self.d_model < 2:
            return
        if not self.head_dim and self.d_model % self.n_head:
            yield (f"--n_head {self.n_head} does not divide --d_model {self.d_model}",
                   self.nearest_heads())
        elif self.head_dim % 2:
            even = (n for n in (self.head_dim - 1, self.head_dim + 1) if n)
            yield (f"--head_dim {self.head_dim} is odd, and rotary positions turn pairs",
                   f"use --head_dim {either(even)}")
        elif self.head_size % 2:
            yield (f"the head size {self.head_size} is odd, and rotary positions turn pairs",
                   self.nearest_heads())
        if self.hidden < 1:
            yield (f"--ffn_mult {self.ffn_mult} leaves the feed-forward no width",
                   "use a larger --ffn_mult, or name --ffn_hidden")
        if self.n_expert and self.n_expert_active > self.n_expert:
            yield (f"--n_expert_active {self.n_expert_active} is more than --n_expert "
                   f"{self.n_expert}", f"use --n_expert_active {self.n_expert} or less")
        if self.full_every and not self.window:
            yield "--full_every needs --window", "give both, or neither"
        if self.kv_heads > 0 and self.n_head % self.kv_heads:
            yield (f"--n_kv_head {self.n_kv_head} does not divide --n_head {self.n_head}",
                   f"use {either(divisors(self.n_head))}")

    def nearest_heads(self) -> str:
        """Heads and widths near the ones asked for that do divide."""
        heads = [h for h in divisors(self.d_model) if self.d_model // h % 2 == 0]
        near = sorted(sorted(heads, key=lambda h: abs(h - self.n_head))[:2])
        unit = 2 * self.n_head
        widths = {max(unit, self.d_model // unit * unit), -(-self.d_model // unit) * unit}
        choice = f"--n_head {either(near)}, or " if near else ""
        return f"use {choice}--d_model {either(sorted(widths))}, or name --head_dim"


@dataclass
class TuneSettings:
    """Where to start and what to learn from."""

    ckpt: str = setting("", "checkpoint to start from, or the folder of a run")
    spm: str = setting("", "tokenizer, for a checkpoint that carries none")
    data: tuple[str, ...] = setting(
        (), "files of rows, .jsonl .json or .parquet; with weights as NAME=FILE:WEIGHT each")
    val_data: tuple[str, ...] = setting((), "files of validation rows, in place of --val_split")
    val_split: float = setting(
        0.05, "share of rows held out for validation, by their first question",
        least=0.0, below=1.0)
    on_bad_row: str = setting("error", "what to do about rows that are wrong",
                              choices=("error", "skip"))
    epochs: float = setting(1.0, "times through the data, where --max_steps is 0", least=0.0)
    seq_len: int = setting(0, "context length in tokens; 0 means the checkpoint's", least=0)
    dropout: float = setting(0.0, "dropout, attention included", least=0.0, below=1.0)

    def domains(self) -> list[tuple[str, tuple[str, ...], float]]:
        """(name, files, weight) of each part; weights sum to 1; files without one are one part."""
        if not any("=" in path for path in self.data):
            return [("", self.data, 1.0)]
        parts = DataSettings(",".join(self.data)).domains()
        return [(name, (path,), weight) for name, path, weight in parts]

    def faults(self) -> Iterator[tuple[str, str]]:
        if not self.ckpt:
            yield "--ckpt is missing", "name the checkpoint to start from, --ckpt runs/lm"
        if any("=" in path for path in self.data):
            for what, fix in DataSettings(",".join(self.data)).faults():
                yield (what.replace("--data_dir", "--data"),
                       fix.replace("web=data/web:0.9,code=data/code:0.1",
                                   "--data chat=chat.jsonl:0.9 math=math.jsonl:0.1"))


@dataclass
class SftSettings:
    """Conversations."""

    pack: bool = setting(True, "several conversations in a sequence, each blind to the others")
    samples: int = setting(3, "questions answered at each evaluation, for the eye", least=0)
    sample_tokens: int = setting(64, "most tokens of such an answer", least=1)


@dataclass
class DpoSettings:
    """Preference loss."""

    loss: str = setting("sigmoid", "simpo and orpo need no reference model", choices=(
        "sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down", "simpo", "orpo"))
    beta: float = setting(0.1, "how closely the reference is followed; simpo wants about 2",
                          least=1e-6)
    label_smoothing: float = setting(
        0.0, "share of pairs thought to be labelled the wrong way round (sigmoid, robust, simpo)",
        least=0.0, below=0.5)
    simpo_gamma: float = setting(0.5, "margin that simpo asks for", least=0.0)


@dataclass
class LoraSettings:
    """Low-rank adapters."""

    lora_rank: int = setting(0, "rank of adapters that are trained in place of the weights; "
                             "0 trains all weights", least=0)
    lora_alpha: float = setting(0.0, "adapters count times alpha / rank; 0 means twice the rank",
                                least=0.0)
    lora_dropout: float = setting(0.0, "dropout before the adapters", least=0.0, below=1.0)
    lora_targets: str = setting("qkv,proj,w1,w2,w3", "matrices that get one, by name")
    lora_merge: bool = setting(False, "also write OUT/merged.pt, a checkpoint that stands alone")

    @property
    def scale(self) -> float:
        return (self.lora_alpha or 2.0 * self.lora_rank) / max(1, self.lora_rank)

    def faults(self) -> Iterator[tuple[str, str]]:
        known = ("qkv", "proj", "w1", "w2", "w3")
        for name in self.lora_targets.split(","):
            if name not in known:
                yield f"--lora_targets {name} is not known", f"choose among {','.join(known)}"


@dataclass
class RewardSettings:
    """Scoring, in place of training."""

    score: tuple[str, ...] = setting((), "score these rows with the reward model --ckpt")
    out: str = setting("", "file for the scored rows, .jsonl")


@dataclass
class SamplingSettings:
    """Sampling."""

    max_new_tokens: int = setting(200, "most tokens to generate", least=1)
    temperature: float = setting(0.8, "0 takes the likeliest token", least=0.0)
    top_k: int = setting(0, "sample among the k likeliest; 0 is off", least=0)
    top_p: float = setting(0.95, "sample among the likeliest that hold this probability; 1 is off",
                           least=0.0)
    repetition_penalty: float = setting(1.0, "divides the logits of ids already seen; 1 is off",
                                        least=1e-6)
    no_repeat_ngram_size: int = setting(0, "no n-gram of this length twice; 0 is off", least=0)


@dataclass
class GenerateSettings:
    """Prompts and output of generate."""

    ckpt: str = setting("", "checkpoint, or the folder of a run")
    spm: str = setting("", "tokenizer, for a checkpoint that carries none")
    prompt: str = setting("", "text to continue")
    prompt_file: str = setting("", "file with a prompt a line, or .jsonl rows as sft reads them, "
                               "whose last answer is then asked for")
    batch_size: int = setting(64, "completions written at once", least=1)
    num_samples: int = setting(1, "continuations of each prompt", least=1)
    stop_at_eos: bool = setting(True, "a continuation ends at </s>")
    chat: bool = setting(False, "the prompt is a question to a chat model")
    system: str = setting("", "with --chat, the instruction before the question")
    best_of: int = setting(1, "completions drawn for each one shown, the best by --reward_ckpt",
                           least=1)
    reward_ckpt: str = setting("", "reward model that --best_of asks")
    out: str = setting("", "write {prompt, completion} rows to this .jsonl instead of the terminal")

    def faults(self) -> Iterator[tuple[str, str]]:
        if not self.ckpt:
            yield "--ckpt is missing", "name a checkpoint, --ckpt runs/lm/ckpt_best.pt"
        if self.prompt and self.prompt_file:
            yield "--prompt and --prompt_file are both given", "keep one of them"
        if (self.best_of > 1) != bool(self.reward_ckpt):
            yield "--best_of and --reward_ckpt need each other", "give both, or neither"
        if self.system and not self.chat:
            yield "--system is for a chat model", "add --chat"


@dataclass
class InfoSettings(StepSettings):
    """What to describe, or to plan."""

    path: str = setting("", "checkpoint, run folder or data folder", positional=True)
    vocab: int = setting(0, "ids of the planned model; 0 means the preset's, or 32,000", least=0)
    tokens: float = setting(0.0, "tokens to train on; 0 means 20 a parameter", least=0.0)
    gpu: str = setting("", "device to plan for, such as H100, working at --mfu")
    gpus: int = setting(1, "how many of them", least=1)
    mfu: float = setting(0.4, "share of its peak that --gpu reaches", least=0.01, below=1.0)
    tok_per_s: float = setting(0.0, "speed of the whole machine, where you know it", least=0.0)

    def faults(self) -> Iterator[tuple[str, str]]:
        if bool(self.path) == bool(self.preset):
            yield ("name either something to describe or a --preset to plan",
                   f"python {PROGRAM} info PATH, or info --preset 138m")


@dataclass
class DemoSettings:
    """The demo."""

    out_dir: str = setting("demo", "folder of the demo's data and run")
    quick: bool = setting(False, "the same in about a minute, with a worse model")
    max_steps: int = setting(0, "training steps; 0 means as many as a few minutes hold", least=0)


def parse_value(kind, text: str):
    """`text` as a value of the field type `kind`; raises ValueError where it is none."""
    if kind is bool:
        if text.lower() not in TRUE + FALSE:
            raise ValueError("1 or 0")
        return text.lower() in TRUE
    if kind is int:
        value = float(text)  # 1e6 and 1_000_000 are whole numbers too
        if value != int(value):
            raise ValueError("a whole number")
        return int(text) if re.fullmatch(r"[+-]?[\d_]+", text) else int(value)
    if kind is float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError("a finite number")
        return value
    return text


def with_defaults(kind: type, **defaults) -> type:
    """The same settings with other defaults, or with whole settings in the place of some."""
    known = {f.name: f for f in fields(kind)}
    changed = [(name, known[name].type, value if isinstance(value, dataclasses.Field)
                else field(default=value, metadata=known[name].metadata))
               for name, value in defaults.items()]
    return dataclasses.make_dataclass(kind.__name__, changed, bases=(kind,),
                                      namespace={"__doc__": kind.__doc__})


TuneRun = with_defaults(
    RunSettings, out_dir="runs/tuned", eval_interval=100, ckpt_interval=100,
    preset=setting("", "that of the checkpoint", flag=False),
    max_steps=setting(0, "optimiser steps in all; 0 means as many as --epochs take", least=0))
TuneOptim = with_defaults(
    OptimSettings, lr=1e-4, optimizer="adamw", schedule="cosine", warmup_steps=10,
    weight_decay=0.0, z_loss=setting(0.0, "of pretraining alone", flag=False))
DpoOptim = with_defaults(TuneOptim, lr=1e-5)


def field_faults(settings) -> Iterator[tuple[str, str]]:
    """Values outside their choices and bounds, each with a sentence."""
    for f in fields(settings):
        value, meta = getattr(settings, f.name), f.metadata
        if not meta["flag"]:
            continue
        if meta["choices"] and value not in meta["choices"]:
            near = difflib.get_close_matches(str(value), meta["choices"], 1)
            hint = f"did you mean {near[0]}? " if near else ""
            yield (f"--{f.name} {value} is not known",
                   f"{hint}choose {either(c for c in meta['choices'] if c)}")
        if meta["least"] is not None and value < meta["least"]:
            yield f"--{f.name} {value} is too small", f"use at least {meta['least']}"
        if meta["below"] is not None and value >= meta["below"]:
            yield f"--{f.name} {value} is too large", f"stay below {meta['below']}"


def check(*groups) -> list[tuple[str, str]]:
    """Every fault of the given settings, not the first alone."""
    found = []
    for settings in groups:
        found += field_faults(settings)
        found += settings.faults() if hasattr(settings, "faults") else ()
    return found


class FlagParser(argparse.ArgumentParser):
    """argparse with flags read from @FILE, a line each, and errors as UserError."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """The words of a line; # begins a comment where a word could begin."""
        try:
            return shlex.split(re.sub(FILE_COMMENT, lambda m: m[1] or "", arg_line))
        except ValueError as fault:
            raise UserError(f"the line {arg_line!r} of the flags' file: {fault}",
                            "close the quote, or put the value in quotes") from fault

    def error(self, message: str):
        raise UserError(message, f"see {self.prog} --help")


def flag_help(f: dataclasses.Field) -> str:
    choices = " | ".join(c for c in f.metadata["choices"] if c)
    default = " ".join(f.default) if isinstance(f.default, tuple) else str(f.default)
    text = f"{f.metadata['help']}" + (f": {choices}" if choices else "")
    return f"{text} (default: {default or 'none'})".replace("%", "%%")


def metavar(f: dataclasses.Field) -> str:
    if f.metadata["choices"] or f.type is str:
        return "NAME" if f.metadata["choices"] else "TEXT"
    return {int: "N", float: "X", bool: "0|1"}.get(f.type, "PATH")


def make_parser(command: str, about: str, example: str, groups: tuple[type, ...]) -> FlagParser:
    """One command's parser: a group of flags a dataclass, a flag a field."""
    parser = FlagParser(
        prog=f"{PROGRAM} {command}", description=about, epilog=f"example:\n  {example}",
        fromfile_prefix_chars="@", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for group in groups:
        topic = parser.add_argument_group(group.__doc__.rstrip("."))
        for f in fields(group):
            if not f.metadata["flag"]:
                continue
            if f.metadata["positional"]:
                topic.add_argument(f.name, nargs="?", metavar="PATH", help=flag_help(f))
                continue
            many = typing.get_origin(f.type) is tuple
            arity = {"nargs": "+", "action": "extend"} if many else {}
            if f.type is bool:
                arity = {"nargs": "?", "const": "1"}
            topic.add_argument(f"--{f.name}", metavar=metavar(f), help=flag_help(f), **arity)
    return parser


def settings_of(command: Callable) -> tuple[type, ...]:
    """The settings dataclasses that a cmd_* function takes, as its annotations say."""
    return tuple(kind for name, kind in typing.get_type_hints(command).items() if name != "return")


def unknown_flags(unknown: list[str], groups: tuple[type, ...]) -> list[tuple[str, str]]:
    names = [f"--{f.name}" for group in groups for f in fields(group) if f.metadata["flag"]]
    found = []
    for word in unknown:
        near = difflib.get_close_matches(word.split("=")[0], names, 1)
        hint = f"did you mean {near[0]}?" if near else "see --help; text with spaces wants quotes"
        if word.startswith("--") or not found:
            found.append((f"{word} is not known here", hint))
    return found


def joined_values(argv: list[str], groups: tuple[type, ...]) -> list[str]:
    """--flag VALUE as --flag=VALUE where the value begins with - or @, which argparse misreads."""
    single = {f"--{f.name}" for group in groups for f in fields(group)
              if f.type is not bool and typing.get_origin(f.type) is not tuple}
    words: list[str] = []
    for word in argv:
        odd = word.startswith("@") or (re.match(r"-[^-]", word) and word != "-h")
        if odd and words and words[-1] in single:
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def read_flags(parser: FlagParser, groups: tuple[type, ...], argv: list[str]) -> list:
    """Settings objects from the command line: defaults, then --preset, then the flags given.

    Raises UserError that lists every unknown flag, unreadable value and fault of the whole.
    """
    try:
        known, unknown = parser.parse_known_args(joined_values(argv, groups))
    except UnicodeDecodeError as fault:
        raise UserError(f"a flags' file is not UTF-8 text ({fault.reason})",
                        "write a flag a line, as in the args.txt of a run") from fault
    given, found = vars(known), unknown_flags(unknown, groups)
    values = dict(PRESETS.get(given.get("preset", ""), {}))
    for f in (f for group in groups for f in fields(group) if f.name in given):
        try:
            many = typing.get_origin(f.type) is tuple
            text = given[f.name] if many else given[f.name] or "--"  # argparse drops this value
            values[f.name] = tuple(text) if many else parse_value(f.type, text)
        except (ValueError, OverflowError):
            kind = {int: "a whole number", float: "a number", bool: "1 or 0"}[f.type]
            found.append((f"--{f.name} {given[f.name]} is not {kind}", f"give {kind}"))
    made = [group(**{f.name: values[f.name] for f in fields(group) if f.name in values})
            for group in groups]
    raise_all(found + check(*made))
    return made


def read_command(command: Callable, argv: list[str], about: str = "", example: str = "") -> list:
    """The settings that a cmd_* function takes, read from its flags."""
    groups = settings_of(command)
    name = command.__name__.removeprefix("cmd_")
    return read_flags(make_parser(name, about, example, groups), groups, argv)


def settings_text(*groups) -> str:
    """The settings as lines that @FILE reads back; what a preset gave is spelled out."""
    lines = []
    for settings in groups:
        lines.append(f"# {type(settings).__doc__}")
        for f in fields(settings):
            value = getattr(settings, f.name)
            if not f.metadata["flag"] or f.name in NOT_REPEATED or value in ("", ()):
                continue
            value = int(value) if isinstance(value, bool) else value
            if isinstance(value, tuple):
                lines.append(shlex.join((f"--{f.name}", *value)))
            else:  # one word, so that a value may begin with - or @
                lines.append(shlex.quote(f"--{f.name}={value}"))
    return "\n".join(lines) + "\n"


def settings_dict(*groups) -> dict:
    """One flat dict of all fields, for the checkpoint."""
    return {k: v for settings in groups for k, v in dataclasses.asdict(settings).items()}


# ==================================================================================================
# Machine: device, number format, seeds, signals, and everything distributed
# ==================================================================================================

PEAK_FLOPS = (  # dense bf16 (fp16 where there is no bf16) FLOP/s by a part of the device's name
    ("B200", 2250e12), ("B100", 1750e12), ("GH200", 989e12), ("H200", 989e12),
    ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12), ("H800", 989e12),
    ("H20", 148e12), ("A100", 312e12), ("A800", 312e12), ("A40", 150e12), ("A10G", 70e12),
    ("A10", 125e12), ("A30", 165e12),
    ("L40S", 362e12), ("L40", 181e12), ("L4", 121e12), ("RTX 6000 Ada", 364e12),
    ("RTX A6000", 155e12), ("RTX 5090", 210e12), ("RTX 4090", 165e12), ("RTX 3090", 71e12),
    ("V100", 125e12), ("T4", 65e12), ("MI300X", 1307e12), ("MI250", 181e12))
BF16_CPU_FLAGS = ("avx512_bf16", "amx_bf16", "bf16", "svebf16")  # as /proc/cpuinfo spells them
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


@dataclass(frozen=True)
class Machine:
    """Where this process computes and its place among its ranks."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def autocast(self):
        """Matmuls in the machine's precision; a null context in fp32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def to_device(self, tensor: Tensor) -> Tensor:
        """A copy on the device that overlaps with computing on CUDA."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def total(self, *numbers: float) -> list[float]:
        """Each number summed over all ranks, through the CPU, so that no device waits."""
        if self.world == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def from_main(self, value):
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, work: Callable[[], None]) -> None:
        """Do `work` on rank 0 alone; its failure is raised on every rank, so that none waits."""
        fault = None
        if self.main:
            try:
                work()
            except (OSError, UserError) as caught:
                fault = caught
        fault = self.from_main(fault)
        if fault is not None:
            raise fault


def bf16_cpu() -> bool:
    """Whether this CPU multiplies bf16 in hardware; where it does not, bf16 is slower than fp32."""
    try:
        words = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return False
    return any(flag in words for flag in BF16_CPU_FLAGS)


def pick_device(name: str) -> torch.device:
    """The device of --device; raises UserError where this machine has none such."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
            "cpu": True}
    if name == "auto":
        name = next(n for n in have if have[n])
    if not have[name]:
        raise UserError(f"--device {name} is not available here",
                        f"use --device {either(n for n in have if have[n])}")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The autocast precision of --dtype for a device."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    if device.type == "cuda":
        modern = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if modern else torch.float16
    return torch.bfloat16 if device.type == "cpu" and bf16_cpu() else torch.float32


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks: a training step frees and asks for the same ones.

    Returning them to the kernel costs a page fault for each 4 KiB of every step.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(M_TOP_PAD, 64 << 20)


def open_machine(settings: DeviceSettings) -> Machine:
    """Choose device and precision, seed, and join the process group where torchrun made one."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(settings.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("highest" if settings.dtype == "fp32" else "high")
    else:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(settings.threads or max(1, cores // local))
        keep_freed_memory()
    if world > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
        dist.barrier()  # so that no rank fails and leaves while another still joins
    return Machine(device, pick_dtype(settings.dtype, device), rank, world)


def close_machine() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def derive_seed(*key: object) -> int:
    """A seed of torch's, for whatever is named: the same for the same key."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step of one rank, so that a resumed step draws what it would have."""
    torch.manual_seed(derive_seed(seed, step, rank))


def flops_of(name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name, or None where it is not known."""
    if re.search(r"\b(MIG|Laptop)\b", name, re.I):  # a slice or a slower part of the same name
        return None
    return next((flops for part, flops in PEAK_FLOPS if re.search(rf"\b{part}\b", name, re.I)),
                None)


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 FLOP/s, or None where it is not known."""
    return flops_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def memory_gb(device: torch.device) -> float | None:
    """Most memory the device has held, in GB; None where it is not counted."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def distribute(module: nn.Module, machine: Machine) -> nn.Module:
    """The module with gradients averaged over ranks; itself on one rank."""
    if machine.world == 1:
        return module
    ids = [machine.device.index] if machine.device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True,
                                   **{name: False})


def no_sync(module: nn.Module, last: bool):
    """Hold the averaging of gradients back until the `last` micro-batch of a step."""
    if last or not isinstance(module, DistributedDataParallel):
        return contextlib.nullcontext()
    return module.no_sync()


class Signals:
    """Remembers SIGTERM, SIGINT or SIGUSR1 instead of dying of it.

    A second Ctrl-C, a second or more after the first, ends the program as usual. Schedulers send
    SIGTERM several times over, so that one is never taken for impatience.
    """

    def __init__(self):
        self.received, self.at = 0, 0.0
        self.previous = {}

    def __enter__(self) -> "Signals":
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            if hasattr(signal, name):
                number = getattr(signal, name)
                self.previous[number] = signal.signal(number, self.note)
        return self

    def note(self, number: int, _frame) -> None:
        now = time.monotonic()
        if self.received and number == signal.SIGINT and now - self.at > 1:
            signal.signal(number, self.previous[number])
            os.kill(os.getpid(), number)
            return
        self.received, self.at = self.received or number, now

    def __exit__(self, *_fault) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


# ==================================================================================================
# Text: the tokenizer and the chat format
# ==================================================================================================

UNK, BOS, EOS, PAD = 0, 1, 2, 3
ROLES = ("system", "user", "assistant")
CONTROL = tuple(f"<|{role}|>" for role in ROLES) + tuple(f"<|reserved_{i}|>" for i in range(13))
SPACE = "\u2581"  # how SentencePiece spells a space
WORDS_CACHED = 1 << 18  # most words a WordEncoder remembers
LONGEST_CACHED = 48  # characters


class Tokenizer:
    """A SentencePiece model with the ids this program needs; `data` are its bytes."""

    def __init__(self, data: bytes, name: str = "tokenizer"):
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as fault:
            raise UserError(f"{name} is no SentencePiece model",
                            "name a tokenizer.model made by prep or by SentencePiece") from fault
        self.data, self.sha256, self.vocab_size = data, sha256(data), len(self.sp)
        self.bos, self.eos, self.pad = self.sp.bos_id(), self.sp.eos_id(), self.sp.pad_id()
        if min(self.bos, self.eos) < 0:
            raise UserError(f"{name} has no <s> or no </s>", "use a tokenizer with both")
        roles = {role: self.sp.piece_to_id(f"<|{role}|>") for role in ROLES}
        self.roles = roles if all(map(self.sp.is_control, roles.values())) else {}

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        try:
            return cls(Path(path).read_bytes(), str(path))
        except OSError as fault:
            raise disk_error(fault, path) or fault from fault

    def encode(self, text: str) -> list[int]:
        return self.sp.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self.sp.decode([int(i) for i in ids if i < self.vocab_size])

    def marker(self, role: str) -> list[int]:
        """What opens a turn: a control symbol, or the same spelled in text where there is none."""
        return [self.roles[role]] if self.roles else self.sp.encode(f"<|{role}|>")


def encode_chat(tokenizer: Tokenizer, turns: Iterable[tuple[str, str]],
                reply: bool = False) -> tuple[list[int], list[bool]]:
    """ids of the turns (role, text), and which are to be learned: what the assistant says.

    With `reply` they end where the assistant is to speak.
    """
    ids, learned = [tokenizer.bos], [False]
    for role, text in turns:
        marker, body = tokenizer.marker(role), [*tokenizer.encode(text), tokenizer.eos]
        ids += marker + body
        learned += [False] * len(marker) + [role == "assistant"] * len(body)
    if reply:
        ids += tokenizer.marker("assistant")
        learned += [False] * (len(ids) - len(learned))
    return ids, learned


def vocabulary_error(message: str, vocab_size: int) -> Exception:
    """SentencePiece's complaint about the vocabulary's size as a sentence; else as it is."""
    largest = re.search(r"set it to a value <= (\d+)", message)
    least = re.search(r"is smaller than required_chars\. \d+ vs (\d+)", message)
    if largest:
        return UserError(f"--vocab_size {vocab_size} is more than this text can fill",
                         f"use --vocab_size {largest[1]} or less, or give more text")
    if least:
        return UserError(f"--vocab_size {vocab_size} cannot hold the characters of this text",
                         f"use --vocab_size {least[1]} or more")
    if "as int" in message:
        return UserError(f"--vocab_size {vocab_size} is beyond SentencePiece", "use a smaller one")
    if "empty" in message.lower() or "sentences_" in message:
        return UserError("there is no text to train a tokenizer on", "give text with words in it")
    return RuntimeError(message)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece BPE model that spells every string: decode(encode(s)) == s.

    Lines are trained on apart, so that no piece but the newline itself holds one.
    Raises UserError where the text is too small for the vocabulary.
    """
    lines = (line for text in texts for line in text.split("\n") if line)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, model_type="bpe", vocab_size=vocab_size,
            unk_id=UNK, bos_id=BOS, eos_id=EOS, pad_id=PAD, control_symbols=list(CONTROL),
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            split_digits=True, required_chars="\n", character_coverage=0.9999,
            max_sentence_length=1 << 30, minloglevel=2)
    except (RuntimeError, ValueError) as fault:
        raise vocabulary_error(str(fault), vocab_size) from fault
    return model.getvalue()


def splits_at_spaces(sp: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether this model encodes a text as the ids of its words, one after the other.

    True of BPE (whole scores), without normalisation, with the dummy prefix, where no piece
    crosses a space or a newline; prep's own models are such, imported ones often are not.
    """
    pieces = [sp.id_to_piece(i) for i in range(len(sp))
              if not (sp.is_control(i) or sp.is_byte(i) or sp.is_unknown(i))]
    plain = all(SPACE not in p[1:] and ("\n" not in p or p == "\n") for p in pieces)
    bpe = all(float(sp.get_score(sp.piece_to_id(p))).is_integer() for p in pieces)
    odd = " \uff21\u2460\ufb01e\u0301  \u00a0\t\u3000x "
    return (plain and bpe and {SPACE, "\n"} <= set(pieces)
            and sp.normalize(odd) == SPACE + odd.replace(" ", SPACE))


class WordEncoder(dict):
    """Text -> packed ids, word by word through a dictionary, as SentencePiece would encode it.

    The keys are what stands between spaces, and a newline opens a key of its own; the values are
    ids packed as `dtype`. A missing word is encoded by SentencePiece and remembered.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype):
        super().__init__()
        self.sp, self.dtype = tokenizer.sp, dtype
        self.by_word = splits_at_spaces(self.sp)

    def pack(self, ids: list[int]) -> bytes:
        return np.array(ids, dtype=self.dtype).tobytes()

    def __missing__(self, word: str) -> bytes:
        if word.startswith("\n"):
            ids = self.sp.encode(word)[1:]  # no space stands before this word
        else:
            ids = self.sp.encode(word) if word else [self.sp.piece_to_id(SPACE)]
        packed = self.pack(ids)
        if len(self) < WORDS_CACHED and len(word) <= LONGEST_CACHED:
            self[word] = packed
        return packed

    def encode(self, text: str) -> bytes:
        """The packed ids of a text, without <s> and </s>."""
        if not text or not self.by_word:
            return self.pack(self.sp.encode(text))
        return b"".join(map(self.__getitem__, text.replace("\n", " \n").split(" ")))


# ==================================================================================================
# Prep: text in any packing becomes token files
# ==================================================================================================

BLOCK = 4 << 20  # bytes read at once; a longer document is still read whole
SUFFIXES = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
BLANK_LINES = re.compile(r"(?:^|\n)(?:[ \t\r]*\n)+")  # part the documents of --document blank
TEXT_COLUMNS = ("string", "large_string", "string_view")
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
DATA_FILES = ("tokenizer.model", "train.bin", "val.bin", "meta.json")


@dataclass(frozen=True)
class Source:
    """One input file: how it is packed and how its documents are found."""

    path: Path
    kind: str  # line, blank, file, jsonl or parquet
    shown: str  # its name in messages

    @property
    def size(self) -> int:
        return self.path.stat().st_size


@dataclass(frozen=True)
class TextBlock:
    """Whole documents, as raw bytes of one source, or as rows where the packing gives rows."""

    name: str
    kind: str
    line: int  # of the source at which the block begins, from 1
    data: bytes | list
    read: int  # bytes of the source read up to the block's end


def kind_of(path: Path, document: str) -> str:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in (*SUFFIXES, ".zst"):
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    return {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}.get(last, document)


def visible_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        inside = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") for part in inside):
            yield path


def find_sources(paths: Iterable[str], document: str, names: dict[str, str] | None = None,
                 flag: str = "--text_path") -> list[Source]:
    """The files that the paths, folders and globs name, sorted within each.

    `names` may say how messages name a path. Raises UserError that lists every path which names
    no file.
    """
    found, faults = [], []
    for path in paths:
        shown = (names or {}).get(path, path)
        exact = os.path.exists(path)
        named = [path] if exact else sorted(glob.glob(path, recursive=True))
        for match in map(Path, named):
            files = sorted(visible_files(match)) if match.is_dir() else [match]
            found += [Source(f, kind_of(f, document), shown if exact and f == match else str(f))
                      for f in files]
            if not files:
                named = []
        if not named:
            what = "holds no file" if exact else "does not exist"
            faults.append((f"{flag} {path} {what}", "name a file, folder or glob with text"))
    raise_all(faults)
    return found


def need(module: str, package: str = ""):
    """A module of an optional package; raises UserError that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as fault:
        name = package or module.partition(".")[0]
        raise UserError(f"this needs the package {name}", f"pip install {name}") from fault


class ZstdFile(io.RawIOBase):
    """The unpacked bytes of a .zst of any number of frames; EOFError where it is damaged or cut.

    (The package's own reader takes a file that was cut short for a whole one.)
    """

    def __init__(self, raw: typing.BinaryIO):
        self.raw, self.package = raw, need("zstandard")
        self.frame, self.packed, self.ready = None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.ready:
            packed = self.packed or self.raw.read(1 << 16)
            if not packed:
                if self.frame:
                    raise EOFError("the last frame is cut short")
                return 0
            self.frame = self.frame or self.package.ZstdDecompressor().decompressobj()
            try:
                self.ready, self.packed = self.frame.decompress(packed), b""
            except self.package.ZstdError as fault:
                raise EOFError(str(fault)) from fault
            if self.frame.eof:
                self.packed, self.frame = self.frame.unused_data, None
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        return size


def open_packed(path: Path, raw: typing.BinaryIO) -> typing.BinaryIO:
    """The unpacked bytes of an open file, by its suffix; .zst needs its package."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        return io.BufferedReader(ZstdFile(raw), BLOCK)
    return SUFFIXES[suffix](raw) if suffix in SUFFIXES else raw


def damaged(source: Source, where: str, fault: Exception) -> UserError:
    return UserError(f"{source.shown} is damaged after {where} ({fault})", "fetch or pack it again")


def read_parquet(source: Source, text_key: str) -> Iterator[TextBlock]:
    """A .parquet file's column of text, some rows at a time."""
    parquet, arrow = need("pyarrow.parquet"), need("pyarrow")
    rows = 0
    try:
        table = parquet.ParquetFile(source.path)
        names = table.schema_arrow.names
        texts = [n for n in names if str(table.schema_arrow.field(n).type) in TEXT_COLUMNS]
        if text_key not in texts:
            what = "no text" if text_key in names else "no column"
            raise UserError(f"{source.path} has {what} {text_key}",
                            f"use --text_key with one of {', '.join(texts) or 'another file'}")
        for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
            rows += len(batch)
            texts = [text for text in batch.column(0).to_pylist() if text is not None]
            read = source.size * rows // max(1, table.metadata.num_rows)
            yield TextBlock(source.shown, "parquet", rows - len(batch) + 1, texts, read)
    except (arrow.ArrowException, OSError) as fault:
        if isinstance(fault, OSError) and fault.errno in DISK_FAULTS:
            raise
        raise damaged(source, f"row {rows}", fault) from fault


def rest_of_document(file, data: bytes, kind: str) -> bytes:
    """The bytes from where `data` was cut off to the end of its last document."""
    if kind == "file":
        return b""
    rest = [] if data.endswith(b"\n") else [file.readline()]
    if kind == "blank":
        while line := file.readline():
            rest.append(line)
            if not line.strip(b" \t\r\n"):
                break
    return b"".join(rest)


def read_blocks(source: Source, text_key: str) -> Iterator[TextBlock]:
    """A source's documents, cut at document boundaries into blocks of about BLOCK bytes."""
    line = 1
    if source.kind == "parquet":
        yield from read_parquet(source, text_key)
        return
    with open(source.path, "rb") as raw:
        try:
            file = open_packed(source.path, raw)
            while data := file.read(-1 if source.kind == "file" else BLOCK):
                data += rest_of_document(file, data, source.kind)
                start = 3 if line == 1 and data.startswith(b"\xef\xbb\xbf") else 0
                yield TextBlock(source.shown, source.kind, line, data[start:], raw.tell())
                line += data.count(b"\n")
        except DAMAGED as fault:
            raise damaged(source, f"line {line}", fault) from fault
        except OSError as fault:
            if fault.errno is None:  # bz2 raises bare OSErrors
                raise damaged(source, f"line {line}", fault) from fault
            raise


def decode_block(block: TextBlock, errors: str) -> str:
    try:
        return block.data.decode("utf-8", errors)
    except UnicodeDecodeError as fault:
        line = block.line + block.data.count(b"\n", 0, fault.start)
        raise UserError(f"{block.name}, line {line}: invalid UTF-8 ({fault.reason})",
                        "mend the file, or use --errors replace") from fault


def jsonl_texts(block: TextBlock, text: str, text_key: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), block.line):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as fault:
            raise UserError(f"{block.name}, line {number}: not JSON ({fault})",
                            "mend or remove the line") from fault
        if not isinstance(row, dict) or not isinstance(row.get(text_key), str):
            keys = ", ".join(row) if isinstance(row, dict) else "no object"
            raise UserError(f"{block.name}, line {number}: no text under {text_key} ({keys})",
                            "name the key of the text with --text_key")
        yield row[text_key].encode("utf-8", "replace").decode("utf-8")  # lone surrogates


def block_documents(block: TextBlock, text_key: str, errors: str) -> Iterator[str]:
    """The documents of a block; those without a word are passed over.

    Raises UserError with file and line for invalid UTF-8 and for rows that are no rows.
    """
    if block.kind == "parquet":
        texts = block.data
    else:
        text = decode_block(block, errors)
        if block.kind == "jsonl":
            texts = jsonl_texts(block, text, text_key)
        elif block.kind == "line":
            texts = (line.removesuffix("\r") for line in text.split("\n"))
        elif block.kind == "blank":
            texts = (part.strip("\r\n") for part in re.split(BLANK_LINES, text))
        else:
            texts = [text]
    return (text for text in texts if text and not text.isspace())


def content_hash(text: bytes, salt: bytes = b"") -> float:
    """A document's place in [0, 1), by its content alone."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=7, salt=salt).digest(), "big") / 2 ** 56


def sample_documents(sources: list[Source], settings: PrepSettings) -> Iterator[str]:
    """Documents worth about --sample_mb, picked evenly over all sources by their hash."""
    total = sum(s.size * (4 if s.path.suffix.lower() in (*SUFFIXES, ".zst", ".parquet") else 1)
                for s in sources)
    budget = settings.sample_mb * 1e6
    share = budget / max(total, 1)
    progress = Progress("sampling text", sum(s.size for s in sources), "B")
    done, least, chosen = 0, 1.0, None
    for source in sources:
        for block in read_blocks(source, settings.text_key):
            progress.update(done + block.read)
            for text in block_documents(block, settings.text_key, settings.errors):
                data = text.encode()
                place = content_hash(data, b"sample")
                if place < share and budget > 0:
                    budget -= len(data)
                    yield text
                elif place < least:
                    least, chosen = place, text
            if budget <= 0:
                progress.close()
                return
        done += source.size
    progress.close()
    if budget == settings.sample_mb * 1e6 and chosen is not None:  # few and large documents
        yield chosen


@dataclass
class Split:
    """Counts of one split, and the packed tokens of a block of it."""

    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    packed: list = field(default_factory=list)

    def add(self, tokens: int, documents: int, size: int) -> None:
        self.tokens += tokens
        self.documents += documents
        self.bytes += size

    def counts(self) -> dict:
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes}


@functools.lru_cache(maxsize=1)
def word_encoder(spm: str, dtype: str) -> WordEncoder:
    """The encoder of this process; its dictionary outlives the blocks."""
    return WordEncoder(Tokenizer.load(spm), np.dtype(dtype))


def encode_block(block: TextBlock, spm: str, dtype: str, val_split: float, text_key: str,
                 errors: str) -> dict[str, Split]:
    """Encode a block's documents as <s> ids </s>, each to train or val by its content."""
    encoder = word_encoder(spm, dtype)
    bos, eos = encoder.pack([encoder.sp.bos_id()]), encoder.pack([encoder.sp.eos_id()])
    splits = {"train": Split(), "val": Split()}
    for text in block_documents(block, text_key, errors):
        data = text.encode()
        split = splits["val" if content_hash(data) < val_split else "train"]
        packed = bos + encoder.encode(text) + eos
        split.packed.append(packed)
        split.add(len(packed) // encoder.dtype.itemsize, 1, len(data))
    for split in splits.values():
        split.packed = [b"".join(split.packed)]
    return splits


def in_order(pool: ProcessPoolExecutor, work: Callable, jobs: Iterable, ahead: int) -> Iterator:
    """(job, result) in the order of the jobs, never more than `ahead` of them in memory."""
    waiting: deque[tuple[object, Future]] = deque()
    for job in jobs:
        waiting.append((job, pool.submit(work, job)))
        if len(waiting) >= ahead:
            job, future = waiting.popleft()
            yield job, future.result()
    for job, future in waiting:
        yield job, future.result()


def shard_blocks(sources: list[Source], settings: PrepSettings) -> Iterator[TextBlock]:
    """This shard's blocks: whole files where there are enough of them, else every n-th block."""
    part, parts = settings.part()
    by_file = len(sources) >= parts
    for i, source in enumerate(sources):
        if by_file and i % parts != part:
            continue
        for j, block in enumerate(read_blocks(source, settings.text_key)):
            if by_file or j % parts == part:
                yield block


def serve_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and end when it does, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with the block: at once where it fails, when done where it does not."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool, done = ProcessPoolExecutor(workers, context, serve_parent), False
    try:
        yield pool
        done = True
    except BrokenProcessPool as fault:
        raise UserError("a worker was killed, most likely because memory ran out",
                        "use fewer --workers, or a smaller --sample_mb") from fault
    finally:
        for child in () if done else multiprocessing.active_children():
            child.terminate()
        pool.shutdown(cancel_futures=True)


def encode_sources(sources: list[Source], settings: PrepSettings, spm: Path, dtype: np.dtype,
                   out: Path) -> dict[str, Split]:
    """Encode everything into out/train.bin and out/val.bin on all cores, in flat memory."""
    workers = settings.workers or os.cpu_count() or 1
    work = functools.partial(
        encode_block, spm=str(spm), dtype=dtype.str, val_split=settings.val_split,
        text_key=settings.text_key, errors=settings.errors)
    totals = {"train": Split(), "val": Split()}
    progress = Progress("encoding", sum(s.size for s in sources), "B")
    with (worker_pool(workers) as pool,
          open(out / "train.bin", "wb") as train, open(out / "val.bin", "wb") as val):
        files = {"train": train, "val": val}
        done, last = 0, None
        blocks = shard_blocks(sources, settings)
        for block, splits in in_order(pool, work, blocks, ahead=2 * workers):
            done += last.read if last and last.name != block.name else 0
            last = block
            for key, split in splits.items():
                files[key].write(split.packed[0])
                totals[key].add(split.tokens, split.documents, split.bytes)
            progress.update(done + block.read, f"{short(totals['train'].tokens)} tokens")
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    progress.close("encoded")
    return totals


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 65535 else "<u4")


def write_meta(out: Path, tokenizer: Tokenizer, splits: dict[str, dict], val_split: float) -> dict:
    """meta.json, the last file of a data folder: without it the folder is unfinished."""
    meta = {"format": DATA_FORMAT, "dtype": token_dtype(tokenizer.vocab_size).name,
            "vocab_size": tokenizer.vocab_size, "tokenizer_sha256": tokenizer.sha256,
            "val_split": val_split, "splits": splits}
    with atomic_write(out / "meta.json", "w") as file:
        json.dump(meta, file, indent=1)
    return meta


def refuse_finished(folder: Path, overwrite: bool) -> None:
    if (folder / "meta.json").exists() and not overwrite:
        raise UserError(f"{folder} already holds prepared data",
                        "name another --out_dir, or add --overwrite")


def install(building: Path, final: Path) -> None:
    """Move finished files to their place; the old meta.json goes first, the new one comes last."""
    final.mkdir(parents=True, exist_ok=True)
    (final / "meta.json").unlink(missing_ok=True)
    for name in DATA_FILES:
        os.replace(building / name, final / name)
    fsync_folder(final)


class TokenFolder:
    """A prepared data folder, checked: meta, tokenizer, and its splits as memory maps.

    Raises UserError where the folder is missing, unfinished, damaged or of another tokenizer.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "meta.json").exists():
            here = "is not finished" if self.folder.is_dir() else "does not exist"
            raise UserError(f"the data folder {folder} {here}",
                            f"run: python {PROGRAM} prep --text_path TEXT --out_dir {folder}")
        self.meta = read_json(self.folder / "meta.json")
        if self.meta.get("format") != DATA_FORMAT:
            raise UserError(f"{folder} is of data format {self.meta.get('format')}, "
                            f"this program reads {DATA_FORMAT}", "run prep again")
        self.tokenizer = Tokenizer.load(self.folder / "tokenizer.model")
        self.check_meta()
        self.train, self.val = self.tokens("train"), self.tokens("val")

    def check_meta(self) -> None:
        """Raise UserError where meta.json lacks something, or belongs to another vocabulary."""
        meta, lacks = self.meta, []
        if meta.get("dtype") not in ("uint16", "uint32"):
            lacks.append("a dtype of uint16 or uint32")
        if meta.get("tokenizer_sha256", self.tokenizer.sha256) != self.tokenizer.sha256:
            raise UserError(
                f"{self.folder}/tokenizer.model is not the one the data was encoded with",
                "put the original back, or run prep again")
        if meta.get("vocab_size") != self.tokenizer.vocab_size:
            lacks.append(f"the tokenizer's vocabulary size of {self.tokenizer.vocab_size}")
        if not isinstance(meta.get("tokenizer_sha256"), str):
            lacks.append("the tokenizer's sha256")
        for split in ("train", "val"):
            splits = meta.get("splits")
            counts = splits.get(split) if isinstance(splits, dict) else None
            if not isinstance(counts, dict) or not all(
                    isinstance(counts.get(key), int) for key in ("tokens", "documents", "bytes")):
                lacks.append(f"the counts of {split}")
        if lacks:
            raise UserError(f"{self.folder}/meta.json lacks {', '.join(lacks)}", "run prep again")

    def tokens(self, split: str) -> np.ndarray:
        """A split's ids as a read-only memory map, its size and ids checked."""
        path, dtype = self.folder / f"{split}.bin", np.dtype(self.meta["dtype"]).newbyteorder("<")
        count = self.meta["splits"][split]["tokens"]
        size = path.stat().st_size if path.exists() else -1
        if size != count * dtype.itemsize:
            raise UserError(f"{path} holds {max(size, 0)} bytes where meta.json promises "
                            f"{count * dtype.itemsize}", "copy it again whole, or run prep again")
        ids = np.memmap(path, dtype, "r") if count else np.zeros(0, dtype)
        probe = ids if count <= 1 << 26 else ids[::max(1, count >> 22)]
        if count and int(probe.max()) >= self.meta["vocab_size"]:
            raise UserError(f"{path} holds an id beyond the vocabulary of "
                            f"{self.meta['vocab_size']}", "run prep again")
        return ids

    def bytes_per_token(self, split: str) -> float:
        """UTF-8 bytes for each target of the split's stream, the measure behind bits per byte."""
        counts = self.meta["splits"][split]
        return counts["bytes"] / max(1, counts["tokens"] - 1)


def merge_shards(out: Path) -> dict:
    """Join out/shard-*-of-n into one data folder; raises UserError where a part is missing."""
    kinds = sorted({int(shard.name.rsplit("-", 1)[1]) for shard in out.glob("shard-*-of-*")})
    if len(kinds) > 1:
        each = " and ".join(f"shard-*-of-{n:05d}" for n in kinds)
        raise UserError(f"{out} holds both {each}",
                        "remove the shards that do not belong")
    parts = kinds[0] if kinds else 0
    wanted = [out / f"shard-{i:05d}-of-{parts:05d}" for i in range(parts)]
    missing = [w.name for w in wanted if not (w / "meta.json").exists()]
    if missing or not wanted:
        raise UserError(f"{out} lacks {', '.join(missing) or 'any shard'}",
                        "run prep --shard i/n for every i, then --merge")
    data = [TokenFolder(folder) for folder in wanted]
    if len({d.tokenizer.sha256 for d in data}) > 1:
        raise UserError("the shards do not share one tokenizer", "prep them with the same --spm")
    building = out / ".building-merge"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    splits = {}
    for split in ("train", "val"):
        with open(building / f"{split}.bin", "wb") as file:
            for folder in wanted:
                with open(folder / f"{split}.bin", "rb") as part:
                    shutil.copyfileobj(part, file, BLOCK)
        counts = [d.meta["splits"][split] for d in data]
        splits[split] = {key: sum(c[key] for c in counts) for key in counts[0]}
    shutil.copyfile(wanted[0] / "tokenizer.model", building / "tokenizer.model")
    meta = write_meta(building, data[0].tokenizer, splits, data[0].meta["val_split"])
    install(building, out)
    for folder in (building, *wanted):
        shutil.rmtree(folder)
    return meta


@contextlib.contextmanager
def spooled(settings: PrepSettings, out: Path) -> Iterator[dict[str, str]]:
    """The paths to read, and how messages name them.

    Stdin (-) and pipes are first written to a file, since they are read twice.
    """
    names: dict[str, str] = {}
    try:
        for number, path in enumerate(settings.text_path):
            if path != "-" and not Path(path).is_fifo():
                names[path] = path
                continue
            spool = out / f"stdin-{number}"
            names[str(spool)] = "stdin" if path == "-" else path
            with (sys.stdin.buffer if path == "-" else open(path, "rb")) as pipe, \
                    open(spool, "wb") as file:
                shutil.copyfileobj(pipe, file)
        yield names
    finally:
        for spool in out.glob("stdin-*"):
            spool.unlink()


def some(texts: Iterator[str], sources: list[Source]) -> Iterator[str]:
    """The texts; raises UserError where there is not one."""
    first = next(texts, None)
    if first is None:
        names = ", ".join(s.shown for s in sources[:3])
        raise UserError(f"there is no text in {names}", "give files with words in them")
    yield first
    yield from texts


def tokenizer_for(sources: list[Source], settings: PrepSettings) -> bytes:
    """A new tokenizer trained on a sample of the sources."""
    texts = sample_documents(sources, settings)
    return train_tokenizer(some(texts, sources), settings.vocab_size)


def build_data(settings: PrepSettings, out: Path) -> dict:
    """Tokenizer, token files and meta.json into the folder `out`."""
    with spooled(settings, out) as names:
        sources = find_sources(names, settings.document, names)
        if settings.spm:
            tokenizer = Tokenizer.load(settings.spm)
        else:
            say(f"training a tokenizer of {settings.vocab_size} pieces")
            with worker_pool(1) as pool:  # its memory goes with it
                tokenizer = Tokenizer(pool.submit(tokenizer_for, sources, settings).result())
        (out / "tokenizer.model").write_bytes(tokenizer.data)
        dtype = token_dtype(tokenizer.vocab_size)
        splits = encode_sources(sources, settings, out / "tokenizer.model", dtype, out)
    if not splits["train"].documents and not settings.shard:
        raise UserError("no document came into the training split",
                        "give more text, or a smaller --val_split")
    counts = {name: split.counts() for name, split in splits.items()}
    return write_meta(out, tokenizer, counts, settings.val_split)


def prepare(settings: PrepSettings) -> dict:
    """Text -> a data folder; returns its meta. A failure leaves nothing that looks finished.

    Raises UserError for missing, empty, damaged or undecodable input and for a bad vocabulary.
    """
    out = Path(settings.out_dir)
    refuse_finished(out, settings.overwrite)
    out.mkdir(parents=True, exist_ok=True)
    if settings.merge:
        return merge_shards(out)
    part, parts = settings.part()
    final = out / f"shard-{part:05d}-of-{parts:05d}" if settings.shard else out
    refuse_finished(final, settings.overwrite)
    building = out / f".building-{part:05d}"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        meta = build_data(settings, building)
        install(building, final)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return meta


# ==================================================================================================
# Batches: which tokens make up which step
# ==================================================================================================

FEISTEL_ROUNDS = 4
MIXTURE_BLOCK = 1024  # samples in which each domain has its share
Batches = Iterator[tuple[tuple[Tensor, ...], int]]  # micro-batches and their targets


def permute(index: np.ndarray, size: int, key: str) -> np.ndarray:
    """A pseudo-random permutation of range(size), evaluated at `index` without a table.

    A Feistel network over the next even power of two, walked until it falls inside
    (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    digest = hashlib.blake2b(key.encode(), digest_size=8 * FEISTEL_ROUNDS).digest()
    keys = np.frombuffer(digest, "<u8")

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> np.uint64(half), x & mask
        for k in keys:
            mixed = (right + k) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        return (left << np.uint64(half)) | right

    x = network(np.asarray(index, np.uint64))
    while (outside := x >= np.uint64(size)).any():
        x[outside] = network(x[outside])
    return x.astype(np.int64)


@dataclass(frozen=True)
class StepBatch:
    """One rank's share of one step: its micro-batches and what the whole step counts.

    micros: tuples of tensors, on the CPU; targets, tokens: what this rank's share of the loss is
    counted in, and its positions; samples: sequences of the whole step, all ranks.
    """

    micros: list[tuple[Tensor, ...]]
    targets: int
    samples: int
    tokens: int


class Stream:
    """Samples to train on: sample i is a pure function of (seed, i), each epoch a permutation.

    So what a step sees depends neither on batch size, accumulation and ranks nor on restarts. A
    kind of stream says what its samples are (items) and how they become tensors (collate).
    count: samples in an epoch; tokens: positions in an epoch.
    """

    def place(self, samples: np.ndarray) -> np.ndarray:
        """Which item each sample number is."""
        epochs, places = np.divmod(samples, self.count)
        chosen = np.empty_like(samples)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = permute(places[here], self.count, f"{self.seed}/{epoch}")
        return chosen

    def targets(self, micro: tuple[Tensor, ...]) -> int:
        """What the loss of a micro-batch is counted in: target tokens."""
        return int((micro[1] != IGNORE).sum())

    def samples(self, numbers: np.ndarray) -> list:
        return self.items(self.place(numbers))

    def batch(self, numbers: np.ndarray) -> tuple[Tensor, ...]:
        """The micro-batch of the given sample numbers."""
        return self.collate(self.samples(numbers))

    def step(self, first: int, batch_size: int, accum: int, rank: int, world: int) -> StepBatch:
        """This rank's micro-batches of the step whose first sample number is `first`."""
        numbers = first + np.arange(batch_size * accum * world).reshape(accum, world, batch_size)
        micros = [self.batch(numbers[m, rank]) for m in range(accum)]
        return StepBatch(micros, sum(map(self.targets, micros)), numbers.size,
                         sum(micro[0].numel() for micro in micros))

    def in_order(self, batch_size: int, most: int, rank: int, world: int) -> Batches:
        """This rank's share of the items, each once, up to `most` tokens: (micro, targets)."""
        count = min(self.count, -(-most * self.count // max(1, self.tokens)))
        mine = np.arange(rank, count, world)
        for i in range(0, len(mine), batch_size):
            micro = self.collate(self.items(mine[i:i + batch_size]))
            yield micro, self.targets(micro)


class Windows(Stream):
    """The training stream cut into windows of seq_len + 1 ids, stride seq_len."""

    def __init__(self, ids: np.ndarray, seq_len: int, seed: int):
        self.ids, self.seq_len, self.seed = ids, seq_len, seed
        self.count = (len(ids) - 1) // seq_len
        self.tokens = self.count * seq_len
        if self.count < 1:
            raise UserError(
                f"the training split holds {len(ids)} tokens, too few for --seq_len {seq_len}",
                (f"use --seq_len {len(ids) - 1} or less, or " if len(ids) > 2 else "")
                + "prepare more text")

    def items(self, places: np.ndarray) -> list[np.ndarray]:
        starts = places * self.seq_len
        return [self.ids[s:s + self.seq_len + 1] for s in starts]

    def collate(self, items: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T); a target is the next id."""
        rows = torch.from_numpy(np.stack(items).astype(np.int64))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


class Mixture(Stream):
    """Several streams, each with its share of the samples; as stateless as one.

    Every MIXTURE_BLOCK samples hold exactly each domain's share, rounded, in shuffled order; a
    domain's own samples follow its own permutations, so it repeats nothing before its epoch ends.
    """

    def __init__(self, parts: list[Stream], weights: list[float]):
        self.parts, self.seed = parts, parts[0].seed
        self.collate, self.targets = parts[0].collate, parts[0].targets
        self.ends = np.round(np.cumsum(weights) * MIXTURE_BLOCK).astype(np.int64)
        self.starts = np.concatenate(([0], self.ends[:-1]))
        if (self.ends == self.starts).any():
            raise UserError(f"a part of the data has less than 1 sample in {MIXTURE_BLOCK}",
                            "raise its weight, or leave it out")
        self.count = sum(part.count for part in parts)
        self.tokens = sum(part.tokens for part in parts)

    def domains(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The domain of each sample number, and its sample number there."""
        blocks, places = np.divmod(samples, MIXTURE_BLOCK)
        domains, numbers = np.empty_like(samples), np.empty_like(samples)
        shares = self.ends - self.starts
        for block in np.unique(blocks):
            order = permute(np.arange(MIXTURE_BLOCK), MIXTURE_BLOCK,
                            f"{self.seed}/mixture/{block}")
            whole = np.searchsorted(self.ends, order, side="right")  # the domain of each place
            ranks = np.empty_like(order)
            for domain, share in enumerate(shares):
                ranks[whole == domain] = block * share + np.arange(share)
            here = blocks == block
            domains[here], numbers[here] = whole[places[here]], ranks[places[here]]
        return domains, numbers

    def samples(self, numbers: np.ndarray) -> list:
        pairs = zip(*self.domains(numbers), strict=True)
        return [self.parts[domain].samples(np.array([i]))[0] for domain, i in pairs]


def open_domains(data: DataSettings) -> list[tuple[str, TokenFolder, float]]:
    """(name, folder, weight) of --data_dir's parts; raises UserError where tokenizers differ."""
    domains = [(name, TokenFolder(path), weight) for name, path, weight in data.domains()]
    if len({folder.tokenizer.sha256 for _, folder, _ in domains}) > 1:
        raise UserError("the parts of --data_dir do not share one tokenizer",
                        "prep them all with the same --spm")
    return domains


def mixed(parts: list[Stream], weights: list[float]) -> Stream:
    return parts[0] if len(parts) == 1 else Mixture(parts, weights)


def training_stream(domains: list[tuple[str, TokenFolder, float]], seq_len: int,
                    seed: int) -> Stream:
    parts = [Windows(folder.train, seq_len, seed) for _, folder, _ in domains]
    return mixed(parts, [weight for *_, weight in domains])


def evaluation_batches(ids: np.ndarray, seq_len: int, batch_size: int, most: int, rank: int,
                       world: int) -> Batches:
    """This rank's share of a split in order, up to `most` tokens, every batch of full shape.

    Yields (inputs, targets) and how many targets they hold. The ragged end is filled with PAD
    inputs and IGNOREd targets, so each target counts once.
    """
    targets = min(len(ids) - 1, most)
    windows = -(-targets // seq_len)
    mine = list(range(rank, windows, world))
    for i in range(0, len(mine), batch_size):
        x = torch.full((batch_size, seq_len), PAD)
        y = torch.full((batch_size, seq_len), IGNORE)
        for row, window in enumerate(mine[i:i + batch_size]):
            start = window * seq_len
            length = min(seq_len, targets - start)
            piece = torch.from_numpy(ids[start:start + length + 1].astype(np.int64))
            x[row, :length], y[row, :length] = piece[:-1], piece[1:]
        yield (x, y), int((y != IGNORE).sum())


ROLE_NAMES = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}
FAULTS_SHOWN = 5  # bad rows named in full; all are counted
LENGTHS = 8  # a padded batch has one of so many lengths, so that compiling comes to an end
Turns = list[tuple[str, str]]


def clean(value: object, what: str) -> str:
    """`value` as text; ValueError where it is none, or blank."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is missing" if value is None else f"{what} is no text")
    if not value.strip():
        raise ValueError(f"{what} is empty")
    return value.encode("utf-8", "replace").decode("utf-8")  # lone surrogates


def turns_of(value: object, role: str, what: str) -> Turns:
    """Turns from a text, which `role` says, or from a list of messages."""
    if not isinstance(value, list):
        return [(role, clean(value, what))]
    turns = []
    for message in value:
        if not isinstance(message, dict):
            raise ValueError(f"{what} holds something else than messages")
        named = message.get("role", message.get("from"))
        if not isinstance(named, str) or named not in ROLE_NAMES:
            raise ValueError(f"{what} has the unknown role {named!r}")
        text = clean(message.get("content", message.get("value")), f"a {named} message")
        turns.append((ROLE_NAMES[named], text))
    return turns


def check_turns(turns: Turns) -> Turns:
    """A conversation: a system turn or none, then user and assistant in turn; else ValueError."""
    roles = [role for role, _ in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    for i, role in enumerate(spoken):
        if role == "system":
            raise ValueError("a system message stands behind the first place")
        if i and role == spoken[i - 1]:
            raise ValueError(f"two {role} messages in a row")
    if not spoken or spoken[0] != "user":
        raise ValueError("the user does not speak first")
    return turns


def answered(turns: Turns) -> Turns:
    if check_turns(turns)[-1][0] != "assistant":
        raise ValueError("the last message is not the assistant's")
    return turns


def conversation(row: dict) -> Turns:
    """The turns of a row: messages, or prompt and response, or instruction, input and output."""
    key = next((k for k in ("messages", "conversations") if k in row), None)
    if key:
        return answered(turns_of(row[key], "user", key))
    if "instruction" in row:
        text = clean(row["instruction"], "instruction")
        if isinstance(row.get("input"), str) and row["input"].strip():
            text += "\n\n" + clean(row["input"], "input")
        return answered([("user", text), *turns_of(row.get("output"), "assistant", "output")])
    if "prompt" not in row:
        raise ValueError("it has neither messages nor prompt nor instruction")
    answer = "response" if "response" in row else "completion"
    return answered(turns_of(row["prompt"], "user", "prompt")
                    + turns_of(row.get(answer), "assistant", "response"))


def preference(row: dict) -> tuple[Turns, Turns]:
    """The conversations that end in the chosen and in the rejected answer."""
    prompt = turns_of(row["prompt"], "user", "prompt") if "prompt" in row else []
    pair = []
    for key in ("chosen", "rejected"):
        turns = turns_of(row.get(key), "assistant", key)
        whole = turns if turns[:len(prompt)] == prompt else prompt + turns
        pair.append(answered(whole))
    if pair[0] == pair[1]:
        raise ValueError("chosen and rejected are identical")
    if pair[0][:-1] != pair[1][:-1]:
        raise ValueError("chosen and rejected answer different prompts")
    return pair[0], pair[1]


def labelled(row: dict) -> tuple[Turns, float]:
    """A conversation and whether its answer is right: 1.0 or 0.0."""
    label = row.get("label")
    if label not in (0, 1):
        raise ValueError("label is missing" if label is None else f"label {label!r} is not 0 or 1")
    return conversation(row), float(label)


def numbered_rows(source: Source) -> Iterator[tuple[int, object]]:
    """(line, text still to be parsed) of a .jsonl, or (row, object) of a .json or .parquet."""
    if source.kind == "parquet":
        yield from enumerate(need("pyarrow.parquet").read_table(source.path).to_pylist(), 1)
        return
    blocks = read_blocks(dataclasses.replace(source, kind="file") if source.path.suffix == ".json"
                         else source, "")
    for block in blocks:
        text = decode_block(block, "strict")
        if block.kind == "file" and text.lstrip().startswith("["):
            yield from enumerate(json.loads(text), 1)
            return
        for number, line in enumerate(text.split("\n"), block.line):
            if line.strip():
                yield number, line


def parse_row(row: object, parse: Callable[[dict], object]):
    """The parsed row; ValueError says what is wrong with it."""
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except (ValueError, RecursionError) as fault:
            raise ValueError(f"not JSON ({fault})") from fault
    if not isinstance(row, dict):
        raise ValueError("no JSON object")
    return parse(row)


def read_rows(paths: Iterable[str], parse: Callable[[dict], object], on_bad_row: str,
              flag: str = "--data") -> list:
    """Every row of the files, parsed.

    Raises UserError that names the first bad rows by file and line and counts all of them, and
    where there is no row at all; with on_bad_row "skip" the bad ones are named and passed over.
    """
    good, bad = [], []
    for source in find_sources(paths, "jsonl", flag=flag):
        try:
            for number, row in numbered_rows(source):
                try:
                    good.append(parse_row(row, parse))
                except ValueError as fault:
                    bad.append(f"{source.shown}, line {number}: {fault}")
        except (ValueError, RecursionError) as fault:
            raise UserError(f"{source.shown} is not JSON ({fault})", "mend the file") from fault
    if bad:
        shown = "; ".join(bad[:FAULTS_SHOWN])
        more = f"; and {len(bad) - FAULTS_SHOWN} more" if len(bad) > FAULTS_SHOWN else ""
        what = f"{len(bad)} of {len(bad) + len(good)} rows are bad: {shown}{more}"
        if on_bad_row == "error":
            raise UserError(what, "mend them, or pass over them with --on_bad_row skip")
        say(f"warning: {what}; passed over")
    if not good:
        raise UserError(f"there is no row in {', '.join(paths)}", "give rows to learn from")
    return good


@dataclass(frozen=True)
class Example:
    """One conversation: its ids (n,) and which of them are learned (n,)."""

    ids: np.ndarray
    learned: np.ndarray

    def targets(self) -> np.ndarray:
        """The target of each place (n,): the next id where that is learned, else IGNORE."""
        shifted = np.append(self.ids[1:], 0)
        return np.where(np.append(self.learned[1:], False), shifted, IGNORE)


def example(tokenizer: Tokenizer, turns: Turns, limit: int) -> Example | None:
    """A conversation's answers, cut behind the last one within `limit` ids, or None."""
    ids, learned = encode_chat(tokenizer, turns)
    if len(ids) > limit:
        ends = [i + 1 for i in range(limit) if learned[i] and ids[i] == tokenizer.eos]
        ids, learned = ids[:max(ends, default=0)], learned[:max(ends, default=0)]
    return Example(np.array(ids), np.array(learned)) if ids else None


def last_answer(tokenizer: Tokenizer, turns: Turns, limit: int) -> Example | None:
    """The last answer alone to be learned; None where it does not fit."""
    prompt = encode_chat(tokenizer, turns[:-1], reply=True)[0]
    ids = encode_chat(tokenizer, turns)[0]
    learned = np.arange(len(ids)) >= len(prompt)
    return Example(np.array(ids), learned) if len(ids) <= limit else None


def held_out(turns: Turns, share: float) -> bool:
    """Whether a conversation is for validation: by its first question, so none is on both sides."""
    first = next(text for role, text in turns if role == "user")
    return content_hash(first.encode(), b"rows") < share


def fit_rows(rows: list[list[Turns]], make: Callable[[Turns], Example | None], eos: int,
             name: str) -> tuple[list[list[Example]], list[int]]:
    """Groups of examples and the rows they come from; says how many were cut, how many left out.

    Raises UserError where not one fits.
    """
    groups = [[make(turns) for turns in row] for row in rows]
    kept = [i for i, group in enumerate(groups) if all(group)]
    cut = sum((one.ids == eos).sum() < len(turns) for i in kept
              for one, turns in zip(groups[i], rows[i], strict=True))
    notes = [f"{cut} cut behind the last answer that fits"] * bool(cut)
    notes += [f"{len(rows) - len(kept)} longer than the context left out"] \
        * (len(kept) < len(rows))
    if not kept:
        raise UserError(f"{name}: every row is longer than the context", "use a larger --seq_len")
    say(f"{name}: {len(kept)} rows" + "".join(f", {note}" for note in notes))
    return [groups[i] for i in kept], kept


def data_key(groups: Iterable[list[Example]]) -> str:
    """What tells these rows from any others, as they are encoded."""
    digest = hashlib.blake2b(digest_size=16)
    for one in (one for group in groups for one in group):
        digest.update(one.ids.tobytes())
        digest.update(one.learned.tobytes())
    return digest.hexdigest()


def padded(rows: list[tuple[np.ndarray, np.ndarray]], length: int) -> tuple[Tensor, Tensor]:
    """ids and targets (B, length) of rows of ids and targets, each from the left."""
    x, y = torch.full((len(rows), length), PAD), torch.full((len(rows), length), IGNORE)
    for i, (ids, targets) in enumerate(rows):
        x[i, :len(ids)], y[i, :len(ids)] = torch.from_numpy(ids), torch.from_numpy(targets)
    return x, y


def padded_length(longest: int, limit: int) -> int:
    unit = -(-limit // LENGTHS)
    return min(limit, -(-longest // unit) * unit)


def pack_lengths(lengths: list[int], room: int) -> list[list[int]]:
    """Indices of lengths in bins that hold `room`: longest first, each where it fits best."""
    bins: list[list[int]] = []
    spare: list[tuple[int, int]] = []  # (room left, bin), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(spare, (lengths[i], -1))
        left, chosen = spare.pop(at) if at < len(spare) else (room, len(bins))
        if chosen == len(bins):
            bins.append([])
        bins[chosen].append(i)
        bisect.insort(spare, (left - lengths[i], chosen))
    return bins


class Chats(Stream):
    """Conversations, several packed in a sequence of seq_len, or one a sequence.

    Packed, each begins with <s> and its last id is a target only, as the model's doc_mask wants.
    """

    def __init__(self, examples: list[Example], seq_len: int, seed: int, pack: bool):
        self.examples, self.seq_len, self.seed, self.pack = examples, seq_len, seed, pack
        lengths = [len(one.ids) - 1 for one in examples]
        self.bins = pack_lengths(lengths, seq_len) if pack else [[i] for i in range(len(examples))]
        self.count = len(self.bins)
        self.tokens = self.count * seq_len if pack else sum(lengths)

    def items(self, places: np.ndarray) -> list[list[Example]]:
        return [[self.examples[i] for i in self.bins[place]] for place in places]

    def collate(self, items: list[list[Example]]) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T)."""
        rows = [(np.concatenate([one.ids[:-1] for one in item]),
                 np.concatenate([one.targets()[:-1] for one in item])) for item in items]
        longest = max(len(ids) for ids, _ in rows)
        return padded(rows, self.seq_len if self.pack else padded_length(longest, self.seq_len))


class Groups(Stream):
    """Answers that are judged together, each with a number: pairs with their reference's
    log-probs, or single answers with their label.

    groups: each g Examples; numbers (count, g). A loss is counted in groups.
    """

    def __init__(self, groups: list[list[Example]], numbers: np.ndarray, seq_len: int, seed: int):
        self.groups, self.numbers, self.seq_len, self.seed = groups, numbers, seq_len, seed
        self.count = len(groups)
        self.tokens = sum(len(one.ids) for group in groups for one in group)

    def items(self, places: np.ndarray) -> list[tuple[list[Example], np.ndarray]]:
        return [(self.groups[place], self.numbers[place]) for place in places]

    def collate(self, items: list[tuple[list[Example], np.ndarray]]) -> tuple[Tensor, ...]:
        """ids and targets (B g, T), a group's answers in turn, and numbers (B, g)."""
        rows = [(one.ids, one.targets()) for group, _ in items for one in group]
        longest = max(len(ids) for ids, _ in rows)
        numbers = torch.from_numpy(np.stack([number for _, number in items]).astype(np.float32))
        return *padded(rows, padded_length(longest, self.seq_len)), numbers

    def targets(self, micro: tuple[Tensor, ...]) -> int:
        return len(micro[2])


# ==================================================================================================
# Model: the transformer; it touches no file and prints nothing
# ==================================================================================================

INIT_STD = 0.02
YARN_FAST, YARN_SLOW = 32, 1  # turns over the original context that are kept, that are stretched


def yarn_frequencies(frequencies: Tensor, config: ModelSettings) -> Tensor:
    """Slow rotations stretched, fast ones kept, a ramp between (Peng et al. 2023, section 3.2)."""
    original = config.rope_original or round(config.seq_len / config.rope_factor)

    def dimension(turns: float) -> float:
        """The pair that makes `turns` full turns over the original context."""
        angle = original / (turns * 2 * math.pi)
        return config.head_size * math.log(angle) / (2 * math.log(config.rope_theta))

    pairs = len(frequencies)
    low = max(0, math.floor(dimension(YARN_FAST)))
    high = min(config.head_size - 1, math.ceil(dimension(YARN_SLOW)))
    ramp = (torch.arange(pairs, dtype=torch.float32) - low) / max(high - low, 1e-3)
    stretched = ramp.clamp(0, 1)
    return frequencies / config.rope_factor * stretched + frequencies * (1 - stretched)


def rope_tables(config: ModelSettings) -> tuple[Tensor, Tensor]:
    """cos and sin (positions, D/2) of the rotary angles (Su et al. 2021, eq. 15)."""
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
    frequencies, scale = 1.0 / config.rope_theta ** exponents, 1.0
    if config.rope_scaling == "linear":
        frequencies = frequencies / config.rope_factor
    elif config.rope_scaling == "yarn":
        frequencies = yarn_frequencies(frequencies, config)
        scale = 0.1 * math.log(config.rope_factor) + 1.0
    positions = torch.arange(config.n_sink + config.seq_len, dtype=torch.float32)
    angles = torch.outer(positions, frequencies)
    return angles.cos() * scale, angles.sin() * scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) of (B, heads, T, D); cos and sin broadcast to D/2."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class KVCache:
    """Keys and values of the tokens seen so far, a row each its own length.

    A row lies at 0..length-1, learned sinks first, so positions need no shift and prompts of
    unequal length share a batch: what a longer neighbour's padding wrote is overwritten before
    it is seen.
    """

    def __init__(self, config: ModelSettings, rows: int, device: torch.device, dtype: torch.dtype):
        self.config, self.size = config, config.n_sink + config.seq_len
        shape = (config.n_layer, rows, config.kv_heads, self.size, config.head_size)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * rows

    @property
    def even(self) -> bool:
        return min(self.lengths) == max(self.lengths)

    def positions(self, new: int) -> Tensor:
        """Where `new` tokens a row will lie: (B, new)."""
        starts = torch.tensor(self.lengths).unsqueeze(1)
        return (starts + torch.arange(new)).to(self.k.device)

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, D) at `positions` (B, T); the layer's tensors up to the longest row."""
        end = max(self.lengths) + k.shape[2]
        if self.even:
            span = slice(self.lengths[0], end)
            self.k[layer, :, :, span], self.v[layer, :, :, span] = k, v
        else:
            rows = torch.arange(k.shape[0], device=k.device).unsqueeze(1)
            self.k[layer][rows, :, positions] = k.transpose(1, 2).to(self.k.dtype)
            self.v[layer][rows, :, positions] = v.transpose(1, 2).to(self.v.dtype)
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def take(self, rows: list[int]) -> "KVCache":
        """A cache of the given rows, which may repeat."""
        taken = object.__new__(KVCache)
        index = torch.tensor(rows, device=self.k.device)
        taken.config, taken.size = self.config, self.size
        taken.k, taken.v = self.k.index_select(1, index), self.v.index_select(1, index)
        taken.lengths = [self.lengths[r] for r in rows]
        return taken

    def forget(self, rows: list[int], count: int, cos: Tensor, sin: Tensor) -> None:
        """Drop the `count` oldest tokens behind the sinks of full rows, and move the rest up.

        Moved keys turn back by as many positions (Xiao et al. 2023, section 3.2), so that no
        position ever passes the trained context. cos and sin (D/2,) are of `count` positions.
        """
        sinks = self.config.n_sink
        k, v = self.k[:, rows, :, sinks + count:], self.v[:, rows, :, sinks + count:]
        turned = [self.config.rotates(layer) for layer in range(self.config.n_layer)]
        turned = torch.tensor(turned, device=k.device).view(-1, 1, 1, 1, 1)
        k = torch.where(turned, rotate(k.float(), cos, -sin).to(k.dtype), k)
        self.k[:, rows, :, sinks:self.size - count] = k
        self.v[:, rows, :, sinks:self.size - count] = v
        for row in rows:
            self.lengths[row] -= count


@functools.lru_cache(maxsize=1)
def compiled_block_mask() -> Callable[..., BlockMask]:
    """create_block_mask that never holds the whole (T, S) mask."""
    return torch.compile(create_block_mask)


@dataclass(frozen=True)
class Sight:
    """What the queries of one forward pass may see.

    query (B, T) or (1, T) and key (1, S) are places in the sequence, counted from its first sink;
    documents (B, S) numbers the document of each place, sinks belonging to all.
    """

    query: Tensor
    key: Tensor
    documents: Tensor | None
    sinks: int

    def mask(self, window: int) -> Tensor:
        """True where a query sees a key: (B, 1, T, S)."""
        query, key = self.query.unsqueeze(-1), self.key.unsqueeze(-2)
        near = key <= query
        if window:
            near = near & (query - key < window)
        if self.documents is not None:
            near = near & (self.documents.unsqueeze(-1) == self.documents.unsqueeze(-2))
        return (near | ((key < self.sinks) & (key <= query))).unsqueeze(1)

    def block_mask(self, window: int) -> BlockMask:
        """The same for flex_attention, which skips the blocks that nobody sees."""
        documents, sinks = self.documents, self.sinks

        def visible(b, h, query, key):
            near = key <= query
            if window:
                near = near & (query - key < window)
            if documents is not None:
                near = near & (documents[b, query] == documents[b, key])
            return near | ((key < sinks) & (key <= query))

        rows = None if documents is None else len(documents)
        eager = self.key.device.type == "cpu" or torch.compiler.is_compiling()
        create = create_block_mask if eager else compiled_block_mask()
        return create(visible, rows, None, self.query.shape[1], self.key.shape[1],
                      device=self.key.device)


@functools.lru_cache(maxsize=1)
def compiled_flex() -> Callable[..., Tensor]:
    """flex_attention as the one fused kernel it is made for."""
    return torch.compile(flex_attention, dynamic=False)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None,
           dropout: float) -> Tensor:
    """Attention of q (B, H, T, D) over k, v (B, K, S, D); the one place that picks a kernel.

    Without a mask it is causal, a single query seeing every key.
    """
    grouped = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):
        return compiled_flex()(q, k, v, block_mask=mask, enable_gqa=grouped)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and q.shape[2] > 1,
        enable_gqa=grouped)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        return normed.to(x.dtype)


@dataclass(frozen=True)
class Context:
    """What all layers of one forward pass share: rotary tables, cache, and masks by window."""

    cos: Tensor
    sin: Tensor
    cache: KVCache | None
    positions: Tensor | None
    masks: dict[bool, Tensor | BlockMask | None]


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key/value heads."""

    def __init__(self, config: ModelSettings, layer: int):
        super().__init__()
        self.layer, self.D, self.dropout = layer, config.head_size, config.dropout
        self.H, self.K = config.n_head, config.kv_heads
        self.rotates, self.windowed = config.rotates(layer), config.windowed(layer)
        self.qkv = nn.Linear(config.d_model, (self.H + 2 * self.K) * self.D, bias=False)
        self.proj = nn.Linear(self.H * self.D, config.d_model, bias=False)
        self.q_norm = RMSNorm(self.D, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.D, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, self.H + 2 * self.K, self.D).transpose(1, 2)
        q, k, v = qkv.split((self.H, self.K, self.K), dim=1)  # (B, H | K, T, D)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotates:
            q, k = rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)
        if context.cache is not None:
            k, v = context.cache.write(self.layer, k, v, context.positions)
        y = attend(q, k, v, context.masks[self.windowed], self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).reshape(B, T, self.H * self.D))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): w1 gate, w2 up, w3 down."""

    def __init__(self, config: ModelSettings):
        super().__init__()
        self.w1 = nn.Linear(config.d_model, config.hidden, bias=False)
        self.w2 = nn.Linear(config.d_model, config.hidden, bias=False)
        self.w3 = nn.Linear(config.hidden, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Rows of x (N, d), sorted by expert, each through its own of weight (E, d, f).

    counts (E,) says how many rows each expert has. One kernel where torch offers it.
    """
    aligned = weight.shape[-1] % 8 == weight.shape[-2] % 8 == 0  # strides of 16 bytes
    if hasattr(F, "grouped_mm") and x.dtype == torch.bfloat16 and aligned:
        return F.grouped_mm(x, weight, offs=counts.cumsum(0).int())
    parts = x.split(counts.tolist())
    return torch.cat([part @ w for part, w in zip(parts, weight, strict=True)])


class MoE(nn.Module):
    """A mixture of SwiGLU experts, each token through its likeliest few; none is dropped.

    Mixtral's router (Jiang et al. 2024): softmax over all experts, the chosen ones' weights
    scaled to sum to 1. Load-balance loss: Fedus et al. 2021, eq. 4; z-loss: Zoph et al. 2022.
    """

    def __init__(self, config: ModelSettings):
        super().__init__()
        E, d, width = config.n_expert, config.d_model, config.hidden
        self.active, self.E = config.n_expert_active, E
        self.balance_loss, self.router_z_loss = config.balance_loss, config.router_z_loss
        self.router = nn.Linear(d, E, bias=False)
        self.w1 = nn.Parameter(torch.empty(E, d, width))
        self.w2 = nn.Parameter(torch.empty(E, d, width))
        self.w3 = nn.Parameter(torch.empty(E, width, d))
        self.register_buffer("usage", torch.zeros(E), persistent=False)  # evaluated tokens

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, d) -> the same and a scalar side loss."""
        tokens = x.flatten(0, 1)  # (N, d)
        with torch.autocast(x.device.type, enabled=False):  # near-ties must not flip
            scores = F.linear(tokens.float(), self.router.weight.float())  # (N, E)
        chances = scores.softmax(-1)
        weights, experts = chances.topk(self.active, dim=-1)  # (N, active)
        weights = weights / weights.sum(-1, keepdim=True)
        order = experts.flatten().argsort(stable=True)  # (N * active,), sorted by expert
        counts = torch.zeros_like(self.usage, dtype=torch.long).scatter_add_(
            0, experts.flatten(), torch.ones_like(experts.flatten()))
        rows = tokens[order // self.active]
        hidden = self.experts(rows, counts) * weights.flatten()[order].unsqueeze(-1).to(x.dtype)
        y = torch.zeros_like(tokens).index_add_(0, order // self.active, hidden.to(x.dtype))
        if not self.training:
            self.usage += counts
        share = counts.float() / counts.sum()
        side = self.balance_loss * self.E * (share * chances.mean(0)).sum()
        side = side + self.router_z_loss * scores.logsumexp(-1).square().mean()
        return y.view_as(x), side

    def experts(self, rows: Tensor, counts: Tensor) -> Tensor:
        w1, w2, w3 = self.w1, self.w2, self.w3
        if torch.is_autocast_enabled(rows.device.type):  # grouped_mm does not cast by itself
            dtype = torch.get_autocast_dtype(rows.device.type)
            rows, w1, w2, w3 = (t.to(dtype) for t in (rows, w1, w2, w3))
        gate, up = grouped_linear(rows, w1, counts), grouped_linear(rows, w2, counts)
        return grouped_linear(F.silu(gate) * up, w3, counts)


class Layer(nn.Module):
    """One pre-norm layer: (B, T, d) -> the same and the mixture's side loss, if any."""

    def __init__(self, config: ModelSettings, layer: int):
        super().__init__()
        self.norm1, self.attn = RMSNorm(config.d_model, config.norm_eps), Attention(config, layer)
        self.norm2 = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MoE(config) if config.n_expert else MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        x = x + self.drop(self.attn(self.norm1(x), context))
        y, side = self.mlp(self.norm2(x)), None
        if isinstance(y, tuple):
            y, side = y
        return x + self.drop(y), side


class Transformer(nn.Module):
    """A LLaMA-style decoder. `config.vocab_size` must be set."""

    def __init__(self, config: ModelSettings):
        super().__init__()
        assert config.rope_layout == "half", "load_checkpoint turns other layouts into this one"
        self.config = config
        self.grad_checkpoint = False
        self.tok_emb = nn.Embedding(config.vocab_size, config.d_model)
        self.sinks = nn.Parameter(torch.empty(config.n_sink, config.d_model)) \
            if config.n_sink else None
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Layer(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie:
            self.lm_head.weight = self.tok_emb.weight
        self.score = nn.Linear(config.d_model, 1, bias=False) if config.scalar_head else None
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)  # (n_sink + seq_len, D/2)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.tok_emb.weight.device

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal weights; the two maps into the residual stream smaller by sqrt(2 L), as GPT-2.

        With trunc_init, truncated at three deviations of 0.5/sqrt(d_model) instead.
        """
        generator = torch.Generator().manual_seed(seed % 2 ** 63)
        width, depth = self.config.d_model, math.sqrt(2 * self.config.n_layer)
        std = 0.5 / math.sqrt(width) if self.config.trunc_init else INIT_STD
        bound = 3 * std if self.config.trunc_init else math.inf
        for name, weight in self.named_parameters():
            if weight.dim() < 2 or name == "score.weight":
                nn.init.constant_(weight, weight.dim() < 2)  # a new judge scores all alike
                continue
            into_stream = name.endswith(("attn.proj.weight", "mlp.w3.weight", "mlp.w3"))
            drawn = torch.randn(weight.shape, generator=generator) * std
            weight.copy_(drawn.clamp_(-bound, bound) / (depth if into_stream else 1.0))

    def embed(self, ids: Tensor, with_sinks: bool) -> Tensor:
        """Input vectors (B, T, d), the learned sinks before them where the sequence begins."""
        x = self.tok_emb(ids)
        if self.config.embed_scale:
            x = x * math.sqrt(self.config.d_model)
        if with_sinks and self.sinks is not None:
            x = torch.cat((self.sinks.to(x.dtype).expand(len(ids), -1, -1), x), dim=1)
        return self.drop(x)

    def documents(self, ids: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """With doc_mask: the document of each place (B, S) and its position in it; sinks are 0."""
        if not self.config.doc_mask:
            return None, None
        sinks = self.config.n_sink
        starts = ids == self.config.bos_id
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        first = torch.where(starts, places, 0).cummax(dim=1).values
        front = torch.arange(sinks, device=ids.device).expand(len(ids), -1)
        documents = torch.cat((torch.zeros_like(front), starts.cumsum(1) + 1), dim=1)
        return documents, torch.cat((front, places - first + sinks), dim=1)

    def context(self, ids: Tensor, length: int, cache: KVCache | None,
                dtype: torch.dtype) -> Context:
        """Positions and masks for `length` places, which follow what the cache holds."""
        positions = None if cache is None else cache.positions(length)
        documents, places = self.documents(ids) if cache is None else (None, None)
        if cache is None and places is None:
            cos, sin = self.cos[:length], self.sin[:length]  # (T, D/2)
        else:
            at = positions if places is None else places  # (B, T)
            cos, sin = self.cos[at].unsqueeze(1), self.sin[at].unsqueeze(1)
        masks = self.masks(length, cache, positions, documents)
        return Context(cos.to(dtype), sin.to(dtype), cache, positions, masks)

    def masks(self, length: int, cache: KVCache | None, positions: Tensor | None,
              documents: Tensor | None) -> dict[bool, Tensor | BlockMask | None]:
        """The mask of full and of windowed layers; None where causal order says it all."""
        seen = max(cache.lengths) if cache else 0
        plain = seen == 0 or (length == 1 and cache.even)
        query = positions if seen else torch.arange(length, device=self.device).unsqueeze(0)
        key = torch.arange(seen + length, device=self.device).unsqueeze(0)
        sight = Sight(query, key, documents, self.config.n_sink)
        flex = (cache is None and self.device.type == "cuda" and self.config.head_size >= 16
                and not (self.training and self.config.dropout))
        make = sight.block_mask if flex else sight.mask
        masks = {False: None if plain and documents is None else make(0)}
        if self.config.window:
            short = seen + length - self.config.n_sink <= self.config.window
            masks[True] = masks[False] if short else make(self.config.window)
        return masks

    def hidden_and_side(self, ids: Tensor, cache: KVCache | None = None,
                        lengths: list[int] | None = None) -> tuple[Tensor, Tensor | None]:
        """Final hidden states (B, T, d) of ids (B, T), and the mixture's side loss, if any.

        With a cache, ids follow what it holds; `lengths` says how many of a padded row count.
        """
        begins = cache is None or max(cache.lengths) == 0
        x = self.embed(ids, begins)
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        context = self.context(ids, x.shape[1], cache, dtype)
        sides = []
        for block in self.blocks:
            if self.grad_checkpoint and self.training:
                x, side = recompute(block, x, context, use_reentrant=False)
            else:
                x, side = block(x, context)
            sides += [] if side is None else [side]
        extra = x.shape[1] - ids.shape[1]
        if cache is not None:
            new = lengths or [ids.shape[1]] * len(ids)
            cache.lengths = [old + extra + n for old, n in zip(cache.lengths, new, strict=True)]
        return self.norm(x[:, extra:]), sum(sides) / len(sides) if sides else None

    def hidden(self, ids: Tensor, cache: KVCache | None = None,
               lengths: list[int] | None = None) -> Tensor:
        """Final hidden states (B, T, d), as hidden_and_side."""
        return self.hidden_and_side(ids, cache, lengths)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (…, V) of final hidden states, bent by softcap (Gemma Team 2024, section 2)."""
        logits = self.lm_head(hidden)
        cap = self.config.softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) of ids (B, T)."""
        return self.logits(self.hidden(ids, cache))


def parameter_counts(config: ModelSettings) -> dict[str, int]:
    """Parameters by part: embedding, head (0 where tied), blocks (norms included), total.

    "active" are those that one token goes through: of a mixture, its active experts alone.
    """
    with torch.device("meta"):
        model = Transformer(config)
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    embedding, head = sizes["tok_emb.weight"], sizes.get("lm_head.weight", 0)
    total = sum(sizes.values())
    blocks = total - embedding - head
    idle = max(0, config.n_expert - config.n_expert_active) * 3 * config.d_model * config.hidden
    return {"embedding": embedding, "head": head, "blocks": blocks, "total": total,
            "active": total - idle * config.n_layer}


def flops_per_token(config: ModelSettings) -> int:
    """Training FLOPs a token: 6 for each multiplied weight, 12 H D S for a layer's attention.

    Chowdhery et al. 2022 (PaLM), appendix B; the head multiplies, the embedding looks up; S is
    the context or the window, and of a mixture the active experts count.
    """
    counts = parameter_counts(config)
    weights = counts["active"] - counts["embedding"] - counts["head"]
    weights += config.vocab_size * config.d_model
    seen = sum(min(config.window, config.seq_len) if config.windowed(i) else config.seq_len
               for i in range(config.n_layer))
    return 6 * weights + 12 * config.n_head * config.head_size * seen


# ==================================================================================================
# LoRA: low-rank adapters: attach, switch off, merge
# ==================================================================================================


class LoraLinear(nn.Linear):
    """A frozen linear map W and a low-rank change of it: W x + scale B A x (Hu et al. 2021)."""

    def __init__(self, base: nn.Linear, settings: LoraSettings, generator: torch.Generator):
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.scale, self.enabled = base.weight, settings.scale, True
        self.drop = nn.Dropout(settings.lora_dropout)
        a = torch.rand(settings.lora_rank, base.in_features, generator=generator) * 2 - 1
        self.lora_a = nn.Parameter(a / math.sqrt(base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, settings.lora_rank))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        if not self.enabled:
            return y
        return y + F.linear(F.linear(self.drop(x), self.lora_a), self.lora_b) * self.scale


def attach_lora(model: Transformer, settings: LoraSettings, seed: int) -> None:
    """Freeze the model and give the named matrices adapters, which change nothing yet.

    Raises UserError where the model has no such matrix.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(derive_seed(seed, "lora"))
    attached = 0
    for part in (part for block in model.blocks for part in (block.attn, block.mlp)):
        for name in settings.lora_targets.split(","):
            if isinstance(base := getattr(part, name, None), nn.Linear):
                setattr(part, name, LoraLinear(base, settings, generator))
                attached += 1
    if not attached:
        raise UserError(f"--lora_targets {settings.lora_targets}: this model has no such matrix",
                        "experts take no adapter; use --lora_targets qkv,proj")
    if model.score is not None:
        model.score.requires_grad_(True)


@contextlib.contextmanager
def without_lora(model: nn.Module):
    """Inside, the model is the one that was adapted: the reference of DPO and GRPO."""
    adapters = [part for part in model.modules() if isinstance(part, LoraLinear)]
    for part in adapters:
        part.enabled = False
    try:
        yield
    finally:
        for part in adapters:
            part.enabled = True


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: w.detach() for name, w in model.named_parameters() if w.requires_grad}


def merge_lora(weights: dict[str, Tensor], adapter: dict[str, Tensor],
               scale: float) -> dict[str, Tensor]:
    """The weights with an adapter's trained_weights worked into them."""
    merged = dict(weights)
    for name, value in adapter.items():
        stem, _, part = name.rpartition(".")
        if part == "lora_b":
            change = value.float() @ adapter[f"{stem}.lora_a"].float()
            merged[f"{stem}.weight"] = weights[f"{stem}.weight"] + scale * change
        elif part != "lora_a":
            merged[name] = value
    return merged


# ==================================================================================================
# Engine: sampling and cached generation; token ids only
# ==================================================================================================

DROP_WHEN = 0.25  # share of finished rows at which a batch is made smaller


def banned(history: list[int], n: int) -> list[int]:
    """Ids that would end an n-gram which the history already holds."""
    prefix = tuple(history[len(history) - n + 1:])
    if len(prefix) < n - 1:
        return []
    return [history[i + n - 1] for i in range(len(history) - n + 1)
            if tuple(history[i:i + n - 1]) == prefix]


def penalise(logits: Tensor, histories: list[list[int]], settings: SamplingSettings) -> Tensor:
    """Repetition penalty (Keskar et al. 2019, section 4.1) and banned n-grams, on (B, V)."""
    if settings.repetition_penalty != 1.0:
        for row, history in zip(logits, histories, strict=True):
            seen = torch.tensor(sorted(set(history)), device=logits.device)
            scores = row[seen]
            row[seen] = torch.where(scores > 0, scores / settings.repetition_penalty,
                                    scores * settings.repetition_penalty)
    if settings.no_repeat_ngram_size:
        for row, history in zip(logits, histories, strict=True):
            ids = banned(history, settings.no_repeat_ngram_size)
            if len(set(ids)) < len(row):  # where every id is banned, none is
                row[ids] = -math.inf
    return logits


def draw(logits: Tensor, uniform: Tensor, settings: SamplingSettings) -> Tensor:
    """An id a row of logits (B, V), by inverting the cumulative distribution at uniform (B, 1).

    Temperature, then top-k, then top-p; the likeliest id stays whatever top_p is.
    """
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() - logits.amax(dim=-1, keepdim=True)  # a tiny temperature overflows
    logits, order = logits / max(settings.temperature, 1e-30), None
    if settings.top_k and settings.top_k < logits.shape[-1]:
        logits, order = logits.topk(settings.top_k, dim=-1)
    elif settings.top_p < 1:
        logits, order = logits.sort(dim=-1, descending=True)
    weights = logits.softmax(dim=-1)
    if settings.top_p < 1:
        before = weights.cumsum(dim=-1) - weights
        weights = weights.masked_fill((before >= settings.top_p) & (before > 0), 0.0)
    mass = weights.cumsum(dim=-1)
    point = torch.minimum(uniform * mass[:, -1:], mass[:, -1:].nextafter(torch.zeros_like(uniform)))
    choice = torch.searchsorted(mass, point, right=True)
    return (choice if order is None else order.gather(-1, choice)).squeeze(-1)


def uniforms(seed: int, row: int, count: int) -> Tensor:
    """The uniform numbers that row draws with, whatever stands beside it in a batch."""
    return torch.rand(count, generator=torch.Generator().manual_seed(derive_seed(seed, row)))


def prefill(model: Transformer, histories: list[list[int]],
            dtype: torch.dtype) -> tuple[Tensor, KVCache]:
    """Run prompts of any lengths through the model: logits (B, V) after each, and their cache."""
    lengths = [len(h) for h in histories]
    ids = torch.full((len(histories), max(lengths)), PAD)
    for row, history in zip(ids, histories, strict=True):
        row[:len(history)] = torch.tensor(history)
    ids = ids.clamp_(max=model.config.vocab_size - 1).to(model.device)
    cache = KVCache(model.config, len(histories), model.device, dtype)
    hidden = model.hidden(ids, cache, lengths)  # (B, T, d)
    last = torch.tensor(lengths, device=ids.device) - 1
    hidden = hidden[torch.arange(len(histories), device=ids.device), last]
    return model.logits(hidden).float(), cache


class Decoder:
    """A batch of rows under generation: their histories, their cache, and the next logits."""

    def __init__(self, model: Transformer, prompts: list[list[int]], dtype: torch.dtype):
        self.model, self.dtype = model, dtype
        self.context = model.config.seq_len
        self.histories = [list(p) for p in prompts]
        self.starts = [0 if len(p) <= self.context else self.newest_half(p) for p in prompts]
        windows = [tuple(p[s:]) for p, s in zip(prompts, self.starts, strict=True)]
        unique = list(dict.fromkeys(windows))
        self.logits, self.cache = prefill(model, [list(w) for w in unique], dtype)
        if len(unique) < len(prompts):
            index = {window: i for i, window in enumerate(unique)}
            rows = [index[w] for w in windows]
            self.cache, self.logits = self.cache.take(rows), self.logits[rows]

    def newest_half(self, history: list[int]) -> int:
        """Where reading begins again in a history that does not fit."""
        return len(history) - max(1, self.context // 2)

    def keep(self, rows: list[int]) -> None:
        self.cache, self.logits = self.cache.take(rows), self.logits[rows]
        self.histories = [self.histories[r] for r in rows]
        self.starts = [self.starts[r] for r in rows]

    def push(self, tokens: list[int]) -> None:
        """Append one id a row and compute the logits after it."""
        for history, token in zip(self.histories, tokens, strict=True):
            history.append(token)
        full = [i for i, n in enumerate(self.cache.lengths) if n >= self.cache.size]
        if full and self.model.sinks is None:  # full rows read their newest half again
            for i in full:
                self.starts[i] = self.newest_half(self.histories[i])
            windows = [h[s:] for h, s in zip(self.histories, self.starts, strict=True)]
            self.logits, self.cache = prefill(self.model, windows, self.dtype)
            return
        if full:
            count = max(1, self.context // 2)
            unit = self.model.cos[0]  # YaRN's tables are scaled
            cos, sin = self.model.cos[count] / unit, self.model.sin[count] / unit
            self.cache.forget(full, count, cos, sin)
        ids = torch.tensor(tokens, device=self.model.device).unsqueeze(1)  # (B, 1)
        self.logits = self.model(ids, self.cache)[:, -1].float()


@torch.inference_mode()
def generate(model: Transformer, prompts: list[list[int]], settings: SamplingSettings, seed: int,
             stop: frozenset[int] = frozenset(), dtype: torch.dtype = torch.float32,
             first: int = 0) -> Iterator[tuple[int, int]]:
    """Continue each prompt; yields (row, id) as ids are drawn, a stop id included.

    Each distinct prompt is read once and finished rows leave the batch. A row draws the same ids
    alone as in any batch, where `first` counts the rows before it. Beyond the context the oldest
    half is forgotten.
    """
    rows = list(range(len(prompts)))
    chance = torch.stack([uniforms(seed, first + r, settings.max_new_tokens) for r in rows])
    decoder = Decoder(model, prompts, dtype)
    done: set[int] = set()
    for t in range(settings.max_new_tokens):
        logits = penalise(decoder.logits.clone(), decoder.histories, settings)
        point = chance[rows, t].unsqueeze(1).to(logits.device)
        tokens = draw(logits, point, settings).tolist()
        for row, token in zip(rows, tokens, strict=True):
            if row not in done:
                yield row, token
                if token in stop:
                    done.add(row)
        if len(done) == len(prompts) or t + 1 == settings.max_new_tokens:
            return
        finished = sum(row in done for row in rows)
        if finished and finished >= DROP_WHEN * len(rows):
            live = [i for i, row in enumerate(rows) if row not in done]
            decoder.keep(live)
            rows, tokens = [rows[i] for i in live], [tokens[i] for i in live]
        decoder.push(tokens)


def complete(model: Transformer, prompts: list[list[int]], *args, **kwargs) -> list[list[int]]:
    """All continuations at once; arguments as of generate."""
    rows = [[] for _ in prompts]
    for row, token in generate(model, prompts, *args, **kwargs):
        rows[row].append(token)
    return rows


# ==================================================================================================
# Losses: tensors in, tensors out
# ==================================================================================================

LOSS_ROWS = 4096  # positions whose logits stand in CUDA's memory at a time


def some_token_losses(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor,
                      z_loss: float) -> Tensor:
    logits = head(hidden).float()
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    if z_loss:  # Chowdhery et al. 2022 (PaLM), section 5
        losses = losses + z_loss * logits.logsumexp(-1).square() * (targets != IGNORE)
    return losses


def token_losses(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor,
                 z_loss: float = 0.0) -> Tensor:
    """Cross-entropy in nats of each target (B, T) given hidden (B, T, d): (N,).

    `head` maps hidden states to logits; an IGNOREd target costs 0. On CUDA the logits are made in
    parts, and again in the backward pass, so that they never stand in memory whole.
    """
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    if hidden.device.type == "cpu" or len(targets) <= LOSS_ROWS:
        return some_token_losses(hidden, head, targets, z_loss)
    pieces = zip(hidden.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True)
    return torch.cat([recompute(some_token_losses, h, head, t, z_loss, use_reentrant=False)
                      for h, t in pieces])


def pretrain_loss(model: Transformer, ids: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """Summed cross-entropy of a micro-batch (B, T), in nats; in training with the side losses."""
    hidden, side = model.hidden_and_side(ids)
    loss = token_losses(hidden, model.logits, targets, z_loss if model.training else 0.0).sum()
    if model.training and side is not None:
        loss = loss + side * (targets != IGNORE).sum()
    return loss


def sequence_logps(model: Transformer, ids: Tensor,
                   targets: Tensor) -> tuple[Tensor, Tensor | float]:
    """Summed log-probability of each row's targets (B,), and the mixture's side loss a row."""
    hidden, side = model.hidden_and_side(ids)
    logps = -token_losses(hidden, model.logits, targets).view(targets.shape).sum(1)
    return logps, 0.0 if side is None or not model.training else side


def gap(pairs: Tensor) -> Tensor:
    """What the chosen has more than the rejected: (B, 2) -> (B,)."""
    return pairs[:, 0] - pairs[:, 1]


def smoothed(margin: Tensor, share: float) -> Tensor:
    """Cross-entropy of a logit where a `share` of the labels is thought to be wrong."""
    return -F.logsigmoid(margin) * (1 - share) - F.logsigmoid(-margin) * share


def robust_loss(rewards: Tensor, means: Tensor, s: DpoSettings) -> Tensor:
    """Unbiased under flipped labels (Chowdhury et al. 2024, eq. 10)."""
    margin, share = gap(rewards), s.label_smoothing
    return (-F.logsigmoid(margin) * (1 - share) + F.logsigmoid(-margin) * share) / (1 - 2 * share)


def orpo_loss(rewards: Tensor, means: Tensor, s: DpoSettings) -> Tensor:
    """Likelihood of the chosen and its odds over the rejected (Hong et al. 2024, eq. 6)."""
    odds = means - torch.log1p(-means.clamp(max=-1e-6).exp())
    return -means[:, 0] - s.beta * F.logsigmoid(gap(odds))


# name -> loss (B,) of pairs' rewards (B, 2), their policy's mean log-probs a token (B, 2), settings
PREFERENCE_LOSSES = {
    # Rafailov et al. 2023, eq. 7; Azar et al. 2023; Zhao et al. 2023
    "sigmoid": lambda rewards, means, s: smoothed(gap(rewards), s.label_smoothing),
    "ipo": lambda rewards, means, s: (gap(rewards) / s.beta - 0.5 / s.beta).square(),
    "hinge": lambda rewards, means, s: F.relu(1 - gap(rewards)),
    "robust": robust_loss,
    # D'Oosterlinck et al. 2024, section 3: chosen up and rejected down; or both down, it further
    "apo_zero": lambda rewards, means, s: 1 - rewards[:, 0].sigmoid() + rewards[:, 1].sigmoid(),
    "apo_down": lambda rewards, means, s: rewards[:, 0].sigmoid() + 1 - gap(rewards).sigmoid(),
    "simpo": lambda rewards, means, s: smoothed(gap(rewards) - s.simpo_gamma, s.label_smoothing),
    "orpo": orpo_loss}
BY_LENGTH = ("ipo", "simpo", "orpo")  # rewards are means a token (Meng et al. 2024, section 2.2)
REFERENCE_FREE = ("simpo", "orpo")
PAIR_METRICS = ("loss", "margin", "accuracy", "chosen_logp", "rejected_logp", "length_bias")
BINS = 10  # of calibration
JUDGE_METRICS = ("loss", "margin", "accuracy") + ("bin",) * BINS


def preference_loss(model: Transformer, ids: Tensor, targets: Tensor, reference: Tensor,
                    settings: DpoSettings) -> Tensor:
    """PAIR_METRICS summed over pairs: ids, targets (2B, T), chosen and rejected in turn.

    reference (B, 2) holds the reference's log-probs. length_bias: by how many tokens the answer
    with the higher reward is the longer one.
    """
    logps, side = sequence_logps(model, ids, targets)
    policy, lengths = logps.view(-1, 2), (targets != IGNORE).sum(1).view(-1, 2)
    ratios = policy if settings.loss in REFERENCE_FREE else policy - reference
    rewards = settings.beta * (ratios / lengths if settings.loss in BY_LENGTH else ratios)
    losses = PREFERENCE_LOSSES[settings.loss](rewards, policy / lengths, settings) + side
    margin = gap(rewards.detach())
    metrics = (margin, (margin > 0).float(), *policy.detach().unbind(1),
               margin.sign() * gap(lengths))
    return torch.stack([losses.sum(), *(m.sum() for m in metrics)])


def reward_scores(model: Transformer, ids: Tensor,
                  targets: Tensor) -> tuple[Tensor, Tensor | float]:
    """The scalar head at the end of each row's last target (B,), and the side loss a row."""
    hidden, side = model.hidden_and_side(ids)
    places = torch.arange(ids.shape[1], device=ids.device)
    ends = ((targets != IGNORE) * places).amax(1) + 1
    rows = torch.arange(len(ids), device=ids.device)
    scores = model.score(hidden[rows, ends]).squeeze(-1).float()
    return scores, 0.0 if side is None or not model.training else side


def judge_metrics(losses: Tensor, logits: Tensor, right: Tensor) -> Tensor:
    """JUDGE_METRICS summed: a judgement's logit in favour of what is right, and its confidence
    less its success, by bins of confidence (Guo et al. 2017, eq. 3)."""
    logits = logits.detach()
    confidence = logits.abs().sigmoid()
    bins = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    error = torch.zeros(BINS, device=logits.device).scatter_add_(0, bins, confidence - right)
    return torch.cat((torch.stack((losses.sum(), logits.sum(), right.sum())), error))


def pair_loss(model: Transformer, ids: Tensor, targets: Tensor, numbers: Tensor) -> Tensor:
    """JUDGE_METRICS of pairs, chosen and rejected in turn (Bradley and Terry 1952)."""
    scores, side = reward_scores(model, ids, targets)
    margin = gap(scores.view(-1, 2))
    return judge_metrics(side - F.logsigmoid(margin), margin, (margin > 0).float())


def label_loss(model: Transformer, ids: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
    """JUDGE_METRICS of single answers with labels (B, 1): a verifier (Cobbe et al. 2021)."""
    scores, side = reward_scores(model, ids, targets)
    signed = scores * (2 * labels.squeeze(1) - 1)
    return judge_metrics(side - F.logsigmoid(signed), signed, (signed > 0).float())


class Objective(nn.Module):
    """A model and its loss as one module, so that compile, DDP and FSDP wrap every gradient.

    The loss is a scalar, or a vector of sums that begins with the one to be trained on.
    """

    def __init__(self, model: Transformer, loss: Callable[..., Tensor]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *batch: Tensor) -> Tensor:
        return self.loss(self.model, *batch).reshape(-1)


# ==================================================================================================
# Optimisers: parameter groups and schedules
# ==================================================================================================


def cosine_scale(step: int, s: OptimSettings, max_steps: int) -> float:
    span = max(1, max_steps - s.warmup_steps)
    turned = math.cos(math.pi * min(1.0, (step - s.warmup_steps) / span))
    return s.min_lr + (1 - s.min_lr) * 0.5 * (1 + turned)


def decay_share(step: int, s: OptimSettings, max_steps: int) -> float:
    """How far into the last decay_share of the run a step is: 0 before it, 1 at the end."""
    begin = max(s.warmup_steps, max_steps * (1 - s.decay_share))
    return min(1.0, max(0.0, (step - begin) / max(1e-9, max_steps - begin)))


def wsd_scale(step: int, s: OptimSettings, max_steps: int) -> float:
    """Stable, then a linear decay over the last decay_share (Hu et al. 2024, MiniCPM)."""
    return 1 - (1 - s.min_lr) * decay_share(step, s, max_steps)


def wsd_sqrt_scale(step: int, s: OptimSettings, max_steps: int) -> float:
    """Stable, then a decay as 1 - sqrt (Hagele et al. 2024, section 3)."""
    return 1 - (1 - s.min_lr) * math.sqrt(decay_share(step, s, max_steps))


def inverse_sqrt_scale(step: int, s: OptimSettings, max_steps: int) -> float:
    """Falls with the root of the step, from the warm-up's end on (Vaswani et al. 2017)."""
    return math.sqrt(max(1, s.warmup_steps) / max(1, s.warmup_steps, step))


SCHEDULES = {"cosine": cosine_scale, "wsd": wsd_scale, "wsd_sqrt": wsd_sqrt_scale,
             "constant": lambda step, s, max_steps: 1.0, "inverse_sqrt": inverse_sqrt_scale}
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of Muon's authors
NEWTON_SCHULZ_STEPS = 5
MUON_AT_ONCE = 1 << 26  # numbers orthogonalised together
MUON_SCALES = {"rms": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
               "shape": lambda rows, columns: math.sqrt(max(1.0, rows / columns))}


def lr_scale(step: int, settings: OptimSettings, max_steps: int) -> float:
    """Share of the peak learning rate for a step counted from 0: warm-up, then the schedule."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    return SCHEDULES[settings.schedule](step, settings, max_steps)


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices to (n, rows, columns), roughly: singular values near 1.

    Newton-Schulz iteration (Jordan et al. 2024); in bf16 on CUDA, in fp32 on a CPU without it.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(torch.bfloat16 if matrices.is_cuda or bf16_cpu() else torch.float32)
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for hidden matrices (Jordan et al. 2024).

    As torch.optim.Muon, but with all matrices of a shape in one batch, in fp32 on CPUs without
    bf16 (where torch's would take minutes a step), and with a group's "rows" naming the parts of
    a fused projection that are matrices of their own.
    """

    def __init__(self, groups: list[dict], lr: float, weight_decay: float, momentum: float,
                 scale: str):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum,
                                  "scale": scale, "rows": None})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for weight in (w for w in group["params"] if w.grad is not None):
                update = self.momentum(weight, group["momentum"])
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                rows = group["rows"] or (weight.shape[-2],)
                for pair in zip(weight.split(rows, -2), update.split(rows, -2), strict=True):
                    shapes.setdefault(pair[0].shape, []).append(pair)
            for shape, pairs in self.batches(shapes):
                rows, columns = shape if len(shape) == 2 else shape[:-3:-1]  # experts: (in, out)
                size = group["lr"] * MUON_SCALES[group["scale"]](rows, columns)
                updates = torch.stack([update for _, update in pairs])
                directions = orthogonalise(updates.flatten(0, -3)).view_as(updates)
                for (part, _), direction in zip(pairs, directions, strict=True):
                    part.sub_(direction, alpha=size)

    @staticmethod
    def batches(shapes: dict) -> Iterator[tuple[torch.Size, list[tuple[Tensor, Tensor]]]]:
        """The matrices of a shape, no more at once than MUON_AT_ONCE numbers."""
        for shape, pairs in shapes.items():
            count = max(1, MUON_AT_ONCE // math.prod(shape))
            yield from ((shape, pairs[i:i + count]) for i in range(0, len(pairs), count))

    def momentum(self, weight: Tensor, share: float) -> Tensor:
        """Nesterov's look-ahead average of the gradients."""
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].lerp_(weight.grad, 1 - share)
        return weight.grad.lerp_(state["momentum"], share)  # the gradient is spent


def split_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters by how they are trained: qkv, hidden (other matrices of the layers), head
    (with the routers), spared.

    Spared from weight decay are norms and embeddings.
    """
    kinds: dict[str, list[nn.Parameter]] = {"qkv": [], "hidden": [], "head": [], "spared": []}
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        if weight.dim() < 2 or name.endswith(("tok_emb.weight", "sinks")):
            kinds["spared"].append(weight)
        elif "blocks." not in name or name.endswith("router.weight"):
            kinds["head"].append(weight)
        else:
            kinds["qkv" if name.endswith("qkv.weight") else "hidden"].append(weight)
    return kinds


def make_optimizers(model: Transformer, settings: OptimSettings,
                    device: torch.device) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the layers' matrices and AdamW for the rest."""
    kinds, config = split_parameters(model), model.config
    muon = settings.optimizer == "muon"
    decayed = kinds["head"] + ([] if muon else kinds["qkv"] + kinds["hidden"])
    groups = [{"params": decayed, "weight_decay": settings.weight_decay},
              {"params": kinds["spared"], "weight_decay": 0.0}]
    groups = [g for g in groups if g["params"]]
    made = [torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2),
                              fused=device.type in ("cpu", "cuda"))] if groups else []
    if muon:
        heads = (config.n_head, config.kv_heads, config.kv_heads)
        rows = tuple(count * config.head_size for count in heads)
        matrices = [{"params": kinds["qkv"], "rows": rows}, {"params": kinds["hidden"]}]
        made.append(Muon([g for g in matrices if g["params"]],
                         settings.muon_lr or settings.lr, settings.weight_decay,
                         settings.muon_momentum, settings.muon_scale))
    return made


class Average:
    """An exponential moving average of a model's weights, which can stand in for them."""

    def __init__(self, model: nn.Module, decay: float, weights: list[Tensor] | None):
        self.live, self.decay = [w for w in model.parameters() if w.requires_grad], decay
        self.weights = [w.detach().clone() for w in self.live]
        for mine, stored in zip(self.weights, weights or (), strict=bool(weights)):
            mine.copy_(stored)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimiser step `step`; the young average forgets faster, so it has no bias."""
        decay = min(self.decay, step / (step + 9))
        torch._foreach_lerp_(self.weights, self.live, 1 - decay)

    @contextlib.contextmanager
    def in_place(self):
        """The model computes with the average inside this context."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        for mine, live in zip(self.weights, self.live, strict=True):
            kept = live.clone()
            live.copy_(mine)
            mine.copy_(kept)


def set_step(optimizers: list[torch.optim.Optimizer], settings: OptimSettings, step: int,
             max_steps: int) -> float:
    """Set learning rates and Muon's momentum for a step; returns AdamW's learning rate."""
    scale = lr_scale(step, settings, max_steps)
    warm = min(1.0, step / settings.muon_warmup) if settings.muon_warmup else 1.0
    for optimizer in optimizers:
        muon = isinstance(optimizer, Muon)
        for group in optimizer.param_groups:
            group["lr"] = scale * (muon and settings.muon_lr or settings.lr)
            if muon:
                begin = min(0.85, settings.muon_momentum)
                group["momentum"] = begin + (settings.muon_momentum - begin) * warm
    return scale * settings.lr


# ==================================================================================================
# Checkpoints: the only place that saves and loads
# ==================================================================================================

WRAPPERS = ("_orig_mod.", "module.", "model.")  # prefixes that compile and DDP leave in names
OLD_NAMES = {"max_seq_len": "seq_len", "block_size": "seq_len", "context_length": "seq_len"}
OLD_BUFFERS = ("rope", "inv_freq", "mask", "cos", "sin", "freqs")  # of the original program
BROKEN = (  # whatever torch's reader runs into on bytes that lie
    RuntimeError, EOFError, zipfile.BadZipFile, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, ArithmeticError, MemoryError, struct.error, zlib.error)


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint so that `path` is at every moment whole: the old one or the new one.

    Raises OSError where the disk refuses; the old file is then untouched.
    """
    with atomic_write(Path(path)) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as fault:
            if isinstance(fault.__context__, OSError):  # torch hides the disk's own words
                raise fault.__context__ from None
            raise


def read_checkpoint(path: Path, verify: bool = False) -> dict:
    """The dict in a file, no code run; with `verify`, every byte held against its checksum.

    Raises UserError where the file is missing, damaged, of another program, or unsafe.
    """
    if not path.exists():
        raise UserError(f"the checkpoint {path} does not exist", "check the path")
    try:
        if verify and zipfile.is_zipfile(path) and (bad := zipfile.ZipFile(path).testzip()):
            raise UserError(f"{path} is damaged (in {bad})", "use an earlier checkpoint")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as fault:
        if "Weights only load failed" not in str(fault) or "GLOBAL" not in str(fault):
            raise UserError(f"{path} is no checkpoint, or a damaged one", "name another") from fault
        raise UserError(f"{path} holds code besides numbers, and was not loaded",
                        "use only checkpoints of this program") from fault
    except OSError as fault:
        raise disk_error(fault, path) or fault from fault
    except BROKEN as fault:
        raise UserError(f"{path} is damaged or no checkpoint", "use an earlier one") from fault
    kinds = {"model": dict, "config": dict, "format": int}
    if not isinstance(checkpoint, dict) or not all(
            isinstance(checkpoint.get(key, 0), kind) for key, kind in kinds.items()):
        raise UserError(f"{path} is a file of some other program", "name a ckpt_*.pt of this one")
    if checkpoint.get("format", 0) > CHECKPOINT_FORMAT:
        raise UserError(f"{path} was written by a newer version", "update this program")
    return checkpoint


def checkpoint_path(path: str | Path) -> Path:
    """A checkpoint's file; for the folder of a run its best one, or else its last."""
    path = Path(path)
    if path.is_dir():
        best, last = path / "ckpt_best.pt", path / "ckpt_last.pt"
        return best if best.exists() else last
    return path


def unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def whole_config(stored: dict, weights: dict[str, Tensor], path: Path) -> ModelSettings:
    """ModelSettings from a stored config; what an old one lacks is read off the weights."""
    names = {f.name for f in fields(ModelSettings)}
    config = {OLD_NAMES.get(k, k): v for k, v in stored.items()}
    strange = sorted(set(config) - names)
    if strange and "rope_layout" in config:
        raise UserError(f"{path} uses {', '.join(strange)}, unknown to this version",
                        "update this program")
    config = {k: v for k, v in config.items() if k in names and v is not None}
    config["vocab_size"] = weights["tok_emb.weight"].shape[0]
    config["ffn_hidden"] = weights["blocks.0.mlp.w2.weight"].shape[0] \
        if "blocks.0.mlp.w2.weight" in weights else weights["blocks.0.mlp.w2"].shape[2]
    if "rope_layout" not in config:
        head = weights.get("lm_head.weight")
        config["tie"] = head is None or torch.equal(head, weights["tok_emb.weight"])
    return ModelSettings(**{**config, "rope_layout": "half"})


def check_weights(config: ModelSettings, weights: dict[str, Tensor], path: Path) -> None:
    with torch.device("meta"):
        wanted = {name: w.shape for name, w in Transformer(config).state_dict().items()}
    if config.tie:
        weights.setdefault("lm_head.weight", weights["tok_emb.weight"])
    wrong = [n for n in wanted if n not in weights or weights[n].shape != wanted[n]]
    wrong += [n for n in weights if n not in wanted]
    if wrong:
        raise UserError(f"{path}: its weights do not fit its config ({', '.join(wrong[:3])})",
                        "use a checkpoint that is whole and of this program")


def half_split(qkv: Tensor, config: ModelSettings) -> Tensor:
    """Rows of an interleaved (x0 x1)(x2 x3)… projection as (x0 x2 …)(x1 x3 …), q and k alone."""
    turned = (config.n_head + config.kv_heads) * config.head_size
    rows = qkv[:turned].view(-1, config.head_size // 2, 2, qkv.shape[1])
    return torch.cat((rows.transpose(1, 2).reshape(turned, qkv.shape[1]), qkv[turned:]))


def weights_key(weights: dict[str, Tensor]) -> str:
    """What tells one model's weights from any other's."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def model_key(checkpoint: dict) -> str:
    """weights_key, or for merged adapters that of their parts: sums differ between processors."""
    return checkpoint.get("key") or weights_key(checkpoint["model"])


def base_of(lora: dict, path: Path) -> Path:
    """The checkpoint that the adapters in `path` belong to; raises UserError where it is gone."""
    places = (Path(lora["base"]), path.parent / Path(lora["base"]).name)
    found = next((place for place in places if place.exists() and place != path), None)
    if found is None:
        raise UserError(f"the model {lora['base']}, which {path} adapts, is not there",
                        "put it back where it was")
    return found


def with_base(checkpoint: dict, base: dict, path: Path) -> dict:
    """A checkpoint of adapters, merged into what they adapt; UserError where that has changed."""
    lora = checkpoint["lora"]
    if model_key(base) != lora["key"]:
        raise UserError(f"{lora['base']} is no longer the model that {path} adapts",
                        "put the model of that time back")
    weights = merge_lora(base["model"], checkpoint["model"], lora["scale"])
    if not checkpoint["config"]["scalar_head"]:
        weights.pop("score.weight", None)
    parts = f"{lora['key']}/{weights_key(checkpoint['model'])}/{lora['scale']}"
    return {**checkpoint, "model": weights, "original": False, "key": sha256(parts.encode())}


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint of any age, ready to build from: names unwrapped, rotary pairs half-split.

    "config" is a whole dict of ModelSettings fields, "tokenizer" the model's bytes or None;
    adapters are merged into what they adapt. Raises UserError where it cannot be used.
    """
    path = checkpoint_path(path)
    checkpoint = read_checkpoint(path)
    if checkpoint.get("lora"):
        return with_base(checkpoint, load_checkpoint(base_of(checkpoint["lora"], path)), path)
    original = "rope_layout" not in checkpoint["config"]
    weights = {unwrapped(str(name)): weight for name, weight in checkpoint["model"].items()}
    if original:
        weights = {n: w for n, w in weights.items() if not any(b in n for b in OLD_BUFFERS)}
    try:
        config = whole_config(checkpoint["config"], weights, path)
        check_weights(config, weights, path)
    except (KeyError, TypeError, AttributeError, IndexError, ArithmeticError, ValueError,
            RuntimeError) as fault:
        raise UserError(f"{path} is a file of some other program ({fault})",
                        "name a ckpt_*.pt of this one") from fault
    if original:
        weights = {name: half_split(weight, config) if name.endswith("attn.qkv.weight") else weight
                   for name, weight in weights.items()}
    return {**checkpoint, "model": weights, "config": dataclasses.asdict(config),
            "tokenizer": checkpoint.get("tokenizer"), "original": original}


def build_model(checkpoint: dict, device: torch.device) -> Transformer:
    """The model of a loaded checkpoint, in evaluation mode."""
    with torch.device("meta"):
        model = Transformer(ModelSettings(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"], strict=True, assign=True)
    if model.config.tie:
        model.lm_head.weight = model.tok_emb.weight
    model.cos, model.sin = rope_tables(model.config)
    for block in model.blocks:
        if isinstance(block.mlp, MoE):
            block.mlp.usage = torch.zeros(model.config.n_expert)
    return model.float().to(device).eval().requires_grad_(False)


def tokenizer_of(checkpoint: dict, spm: str, path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint, or --spm; raises UserError where neither fits."""
    if spm:
        tokenizer = Tokenizer.load(spm)
    elif checkpoint["tokenizer"]:
        tokenizer = Tokenizer(bytes(checkpoint["tokenizer"]), f"the tokenizer in {path}")
    else:
        raise UserError(f"{path} carries no tokenizer", "name its tokenizer.model with --spm")
    ids = checkpoint["config"]["vocab_size"]
    if tokenizer.vocab_size > ids:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {ids}",
            "name the tokenizer.model that this model was trained with")
    return tokenizer


def numbered(out: Path) -> list[Path]:
    """The numbered checkpoints of a run, newest first."""
    return sorted(out.glob("ckpt_" + "[0-9]" * 8 + ".pt"), reverse=True)


def save_step(out: Path, checkpoint: dict, keep_last: int) -> None:
    """Write ckpt_NNNNNNNN.pt, make it ckpt_last.pt too, and drop the oldest beyond keep_last."""
    path = out / f"ckpt_{checkpoint['step']:08d}.pt"
    save_checkpoint(path, checkpoint)
    twin = out / ".ckpt_last.pt.tmp"
    twin.unlink(missing_ok=True)
    try:
        os.link(path, twin)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, twin)
    os.replace(twin, out / "ckpt_last.pt")
    fsync_folder(out)
    for old in numbered(out)[keep_last:]:
        old.unlink()


def newest_whole(out: Path, resume: bool) -> Path | None:
    """The newest whole checkpoint of a run, or None where there is none to go on from.

    A damaged one is named and the one before it taken. Raises UserError where --resume 0 meets a
    run, or where every checkpoint is damaged.
    """
    last = out / "ckpt_last.pt"
    candidates = ([last] if last.exists() else []) + numbered(out)
    if candidates and not resume:
        raise UserError(f"{out} already holds a run", "name another --out_dir, or drop --resume 0")
    for path in candidates:
        try:
            read_checkpoint(path, verify=True)
            return path
        except UserError as fault:
            say(f"warning: {fault.faults[0][0]}; trying the one before it")
    if candidates:
        raise UserError(f"every checkpoint in {out} is damaged", "start in another --out_dir")
    return None


def resume_point(out: Path, resume: bool, machine: Machine) -> dict | None:
    """The checkpoint to go on from, the one that rank 0 finds whole, on every rank; or None."""
    found: list[Path | None] = []
    machine.on_main(lambda: found.append(newest_whole(out, resume)))
    path = machine.from_main(found[0] if found else None)
    return read_checkpoint(path) if path else None


def save_weights(out: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    """pytorch_model.bin, config.json and tokenizer.model, for programs that want plain weights."""
    save_checkpoint(out / "pytorch_model.bin",
                    {name: w.detach().cpu() for name, w in model.state_dict().items()})
    with atomic_write(out / "config.json", "w") as file:
        json.dump(dataclasses.asdict(model.config), file, indent=1)
    with atomic_write(out / "tokenizer.model") as file:
        file.write(tokenizer.data)


# ==================================================================================================
# Gauges: metrics to files and services, and the progress line
# ==================================================================================================


def cut_log(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a last line cut short, so that a run's log goes on."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    with atomic_write(path, "w") as file:
        file.writelines(kept)


def wandb_sink(project: str, out: Path, config: dict) -> Callable[[dict], None]:
    name = out / "wandb_id"
    if not name.exists():
        with atomic_write(name, "w") as file:
            file.write(os.urandom(8).hex())
    run = need("wandb").init(project=project, dir=str(out), config=config, resume="allow",
                             name=out.name, id=name.read_text(encoding="utf-8"))
    return lambda row: run.log(row, step=row["step"])


def tensorboard_sink(out: Path, step: int) -> Callable[[dict], None]:
    tensorboard = need("torch.utils.tensorboard", "tensorboard")
    writer = tensorboard.SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def write(row: dict) -> None:
        for key, value in row.items():
            if "/" in key and value is not None:
                writer.add_scalar(key, value, row["step"])
    return write


def report(prefix: str, names: tuple[str, ...], values: Iterable[float]) -> dict[str, float]:
    """Metrics under their prefix; bins of calibration as the one error they add up to."""
    row, error = {}, None
    for name, value in zip(names, values, strict=True):
        if name == "bin":
            error = (error or 0.0) + abs(value)
        else:
            row[f"{prefix}/{name}"] = value
    return row if error is None else {**row, f"{prefix}/calibration_error": error}


class Gauges:
    """What a run tells: metrics.jsonl, optional services, and the progress line.

    Losses and gradient norms gather on the device and are read when a line is written.
    """

    def __init__(self, out: Path, run: RunSettings, machine: Machine, flops: int, state: dict,
                 names: tuple[str, ...] = ("loss",)):
        self.out, self.run, self.machine, self.flops = out, run, machine, flops
        self.names = names  # of the loss's sums
        zeros = (0.0,) * (len(names) + 1)
        self.sums = torch.tensor(state.get("sums", zeros), device=machine.device)
        self.steps, self.tokens = state.get("steps", 0), state.get("tokens", 0)
        self.seconds_before = state.get("seconds", 0.0)
        self.began, self.stopwatch, self.timed_tokens = time.monotonic(), time.monotonic(), 0
        self.step = state.get("step", 0)
        self.progress = Progress("training", run.max_steps, "steps", self.step, machine.main)
        self.note = ""
        self.file, self.sinks = None, []
        if machine.main:
            for log in ("metrics.jsonl", "samples.jsonl"):
                cut_log(out / log, self.step)
            self.file = (out / "metrics.jsonl").open("a", encoding="utf-8")
            self.sinks += [wandb_sink(run.wandb, out, dataclasses.asdict(run))] if run.wandb else []
            self.sinks += [tensorboard_sink(out, self.step)] if run.tensorboard else []

    def add(self, step: int, losses: Tensor, norm: Tensor, tokens: int) -> None:
        """One step: its mean losses and gradient norm, still on the device, and its tokens."""
        self.sums += torch.cat((losses.detach().float().view(-1), norm.detach().float().view(1)))
        self.step, self.steps = step, self.steps + 1
        self.tokens += tokens
        self.timed_tokens += tokens
        self.progress.update(step, self.note)

    def totals(self) -> list[float]:
        """Losses and gradient norm summed since the last line, over all ranks."""
        *losses, norm = self.sums.tolist()
        return [total / self.machine.world for total in self.machine.total(*losses)] + [norm]

    def means(self) -> list[float]:
        """Mean losses and gradient norm since the last line, over all ranks.

        Raises UserError where the loss is no longer a number.
        """
        totals = self.totals()
        if not math.isfinite(sum(totals)):
            raise UserError(
                f"the loss or its gradient is no longer a number at step {self.step}",
                "resume with a lower --lr, more --warmup_steps, or --dtype fp32; the last "
                "checkpoint is whole")
        return [total / max(1, self.steps) for total in totals]

    def row(self, lr: float) -> dict:
        """The figures since the last row, which starts the next."""
        *losses, norm = self.means()
        seconds = max(time.monotonic() - self.stopwatch, 1e-9)
        speed = self.timed_tokens / seconds
        peak = peak_flops(self.machine.device)
        mfu = speed * self.flops / (peak * self.machine.world) if peak else None
        row = {**report("train", self.names, losses), "train/grad_norm": norm, "train/lr": lr,
               "perf/tok_per_s": round(speed, 1), "perf/mfu": mfu}
        if (memory := memory_gb(self.machine.device)) is not None:
            row["gpu/memory_gb"] = memory
        if self.run.usd_per_hour:
            row["cost/usd"] = self.elapsed() / 3600 * self.run.usd_per_hour
        self.note = self.describe(row)
        self.sums.zero_()
        self.steps = self.timed_tokens = 0
        self.stopwatch = time.monotonic()
        return row

    def describe(self, row: dict) -> str:
        mfu = "unknown" if row["perf/mfu"] is None else f"{row['perf/mfu']:.1%}"
        cost = f" ${row['cost/usd']:.2f}" if "cost/usd" in row else ""
        return (f"loss {row['train/loss']:.4f} lr {row['train/lr']:.2e} "
                f"{short(row['perf/tok_per_s'])} tok/s mfu {mfu}{cost}")

    def elapsed(self) -> float:
        """Seconds of the whole run, earlier sessions included."""
        return self.seconds_before + time.monotonic() - self.began

    def write(self, row: dict) -> None:
        """One line of metrics.jsonl, and the services."""
        if not self.file:
            return
        row = {"step": self.step, "tokens": self.tokens, "time": round(self.elapsed(), 3), **row}
        self.file.write(json.dumps(row, allow_nan=False) + "\n")
        self.file.flush()
        for sink in self.sinks:
            sink(row)

    def write_samples(self, rows: list[dict]) -> None:
        """Answers of the model, a line each in samples.jsonl and on the terminal."""
        with (self.out / "samples.jsonl").open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"step": self.step, **row}, ensure_ascii=False) + "\n")
        say(*(f"  {row['prompt']!r} -> {row['answer']!r}" for row in rows))

    @contextlib.contextmanager
    def aside(self):
        """Time spent here, in evaluation or saving, does not count as training speed."""
        began = time.monotonic()
        yield
        self.stopwatch += time.monotonic() - began

    def state(self) -> dict:
        """What a resumed run needs so that its log goes on as if never interrupted.

        To be called on every rank, for each holds its part of the loss.
        """
        return {"sums": self.totals(), "steps": self.steps, "tokens": self.tokens,
                "seconds": self.elapsed(), "step": self.step}

    def close(self) -> None:
        self.progress.close()
        if self.file:
            self.file.close()


# ==================================================================================================
# Loop: the one training loop
# ==================================================================================================

COMPILE_REPAYS_S = 600.0  # of estimated eager training, from which torch.compile is worth its wait
ASSUMED_FLOPS = {("cpu", torch.float32): 1e11, ("cpu", torch.bfloat16): 1e12}  # eager, sustained
SAME_ON_RESUME = ("seed", "seq_len", "optimizer", "pack", "loss", "lora_rank", "lora_alpha",
                  "lora_targets", "data_key", "reference")


@dataclass
class Job:
    """What one trainer gives the loop.

    evaluate(module) runs on every rank and returns metrics with val/loss among them;
    samples(model) runs on rank 0 and returns answers to be shown. names are those of the loss's
    sums, and lora says what adapters belong to, where only such are trained.
    """

    kind: str
    model: Transformer
    loss: Callable[..., Tensor]
    stream: Stream
    evaluate: Callable[[nn.Module], dict[str, float]]
    tokenizer: Tokenizer
    names: tuple[str, ...] = ("loss",)
    samples: Callable[[Transformer], list[dict]] | None = None
    lora: dict | None = None

    @property
    def sample_tokens(self) -> float:
        return self.stream.tokens / self.stream.count


def wants_compile(choice: str, flops: float, machine: Machine) -> bool:
    """Whether to compile: as told, or by the run's estimated length, and said either way.

    A pure function of settings and machine, so that a resumed run decides the same.
    """
    if choice != "auto":
        return choice == "1"
    key = (machine.device.type, machine.dtype)
    speed = ASSUMED_FLOPS.get(key) or 0.3 * (peak_flops(machine.device) or 1e14)
    seconds = flops / speed / machine.world
    compilers = (os.environ.get("CXX") or "g++", "clang++", "cl")
    able = machine.device.type != "mps" and any(map(shutil.which, compilers))
    worth = seconds >= COMPILE_REPAYS_S
    say(f"about {duration(seconds)} of training if not compiled: "
        + ("compiling first (--compile 0 skips it)" if worth and able else "not compiling"
           + (", no C++ compiler is found" if worth else "")))
    return worth and able


class Trainer:
    """One run: its model, optimiser and counters, and the steps that move them."""

    def __init__(self, job: Job, machine: Machine, run: RunSettings, optim: OptimSettings,
                 args: dict, saved: dict | None):
        self.job, self.machine, self.run, self.optim, self.args = job, machine, run, optim, args
        self.out = Path(run.out_dir)
        self.step, self.samples, self.best_val = 0, 0, math.inf
        self.optimizers = make_optimizers(job.model, optim, machine.device)
        stored = saved.get("ema") if saved else None
        self.ema = Average(job.model, optim.ema, stored) if optim.ema else None
        half = machine.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=half)
        if saved:
            self.restore(saved)
        flops = flops_per_token(job.model.config)
        objective = Objective(job.model, job.loss)
        self.step_samples = run.batch_size * run.grad_accum_steps * machine.world
        total = float(flops) * run.max_steps * self.step_samples * job.sample_tokens
        if wants_compile(run.compile, total, machine):
            objective = torch.compile(objective, dynamic=False)
        self.objective, self.wrapped = objective, distribute(objective, machine)
        gauges = saved["gauges"] if saved else {}
        self.gauges = Gauges(self.out, run, machine, flops, gauges, job.names)

    def restore(self, saved: dict) -> None:
        """Continue from a checkpoint's counters and optimiser; the model has its weights."""
        self.step, self.samples, self.best_val = saved["step"], saved["samples"], saved["best_val"]
        for optimizer, state in zip(self.optimizers, saved["optim"], strict=True):
            flags = [{k: v for k, v in group.items() if k != "params"}
                     for group in optimizer.param_groups]
            optimizer.load_state_dict(state)
            for group, given in zip(optimizer.param_groups, flags, strict=True):
                group.update(given)  # the flags of this start, not of the one before
        if saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])

    def checkpoint(self) -> dict:
        model, lora = self.job.model, self.job.lora
        weights = trained_weights(model) if lora else model.state_dict()
        return {
            "format": CHECKPOINT_FORMAT, "kind": self.job.kind, "step": self.step,
            "samples": self.samples, "best_val": self.best_val,
            "model": {name: weight.detach() for name, weight in weights.items()},
            "config": dataclasses.asdict(model.config), "lora": lora,
            "optim": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(), "ema": self.ema.weights if self.ema else None,
            "rng": {"seed": self.args["seed"]},  # each step is seeded by (seed, step, rank)
            "args": {**self.args, "step_samples": self.step_samples},
            "gauges": self.gauges.state(),
            "tokenizer": self.job.tokenizer.data}

    def due(self, interval: int) -> bool:
        return self.step % interval == 0 or self.step == self.run.max_steps

    def train_step(self, stop: int) -> bool:
        """One optimiser step over all ranks; whether any rank was told to stop."""
        run, machine = self.run, self.machine
        batch = self.job.stream.step(self.samples, run.batch_size, run.grad_accum_steps,
                                     machine.rank, machine.world)
        targets, tokens, stops = machine.total(batch.targets, batch.tokens, stop)
        seed_step(self.args["seed"], self.step, machine.rank)
        lr = set_step(self.optimizers, self.optim, self.step, run.max_steps)
        losses = self.gradients(batch, machine.world / targets)
        norm = self.update()
        self.step += 1
        if self.ema:
            self.ema.update(self.step)
        self.samples += batch.samples
        self.gauges.add(self.step, losses, norm, int(tokens))
        row = self.gauges.row(lr) if self.due(run.log_interval) else {}
        if self.due(run.eval_interval):
            row |= self.evaluate()
        if row:
            self.gauges.write(row)
        return bool(stops)

    def gradients(self, batch: StepBatch, scale: float) -> Tensor:
        """Accumulate the gradient of the step's mean loss; this rank's share of its losses."""
        total = torch.zeros(len(self.job.names), device=self.machine.device)
        for i, micro in enumerate(batch.micros):
            tensors = [self.machine.to_device(t) for t in micro]
            with no_sync(self.wrapped, i + 1 == len(batch.micros)):
                with self.machine.autocast():
                    losses = self.wrapped(*tensors) * scale
                self.scaler.scale(losses[0]).backward()
            total += losses.detach()
        return total

    def update(self) -> Tensor:
        """Clip, step and clear; the gradient norm before clipping."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        most = self.optim.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.job.model.parameters(), most)
        whole = not self.scaler.is_enabled() or bool(norm.isfinite())
        if not whole:  # fp16 overflows now and then, and skips that step for every optimiser
            norm = torch.zeros_like(norm)
        for optimizer in self.optimizers:
            if whole:
                self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return norm

    def averaged(self):
        """The weights that are evaluated and exported: their average, where one is kept."""
        return self.ema.in_place() if self.ema else contextlib.nullcontext()

    def evaluate(self) -> dict[str, float]:
        """Validation metrics; a new best is saved at once."""
        self.gauges.means()  # refuses a model whose loss is no number
        with self.gauges.aside(), self.averaged():
            self.objective.eval()
            with torch.no_grad(), self.machine.autocast():
                row = self.job.evaluate(self.objective)
                if self.job.samples and self.machine.main:
                    self.gauges.write_samples(self.job.samples(self.job.model))
            self.objective.train()
            if row.get("val/loss", math.inf) < self.best_val:
                self.best_val = row["val/loss"]
                best = self.checkpoint()
                self.machine.on_main(lambda: save_checkpoint(self.out / "ckpt_best.pt", best))
        if self.machine.main and not self.gauges.progress.bar and row:
            print(f"step {self.step}: " + " ".join(f"{k} {v:.4f}" for k, v in row.items()),
                  file=sys.stderr, flush=True)
        return row

    def save(self) -> None:
        with self.gauges.aside():
            self.gauges.means()  # refuses to save a model whose loss is no number
            newest = self.checkpoint()
            self.machine.on_main(lambda: save_step(self.out, newest, self.run.keep_last))

    def fit(self) -> int:
        """Train to max_steps or to a signal; the exit code."""
        self.objective.train()
        with Signals() as signals:
            saved = self.step
            while self.step < self.run.max_steps:
                stop = self.train_step(signals.received)
                if stop or self.due(self.run.ckpt_interval):
                    self.save()
                    saved = self.step
                if stop:
                    break
        assert saved == self.step, "a run ends with its last step saved"
        self.gauges.close()
        if self.step < self.run.max_steps:
            say(f"stopped at step {self.step}, saved; go on with:\n  {self.again()}")
            return 128 + (signals.received or signal.SIGTERM)
        with self.averaged():
            if self.ema and self.best_val == math.inf:  # nothing was evaluated: the last is best
                best = self.checkpoint()
                self.machine.on_main(lambda: save_checkpoint(self.out / "ckpt_best.pt", best))
            if not self.job.lora:
                self.machine.on_main(
                    lambda: save_weights(self.out, self.job.model, self.job.tokenizer))
        return 0

    def again(self) -> str:
        world = self.machine.world
        launcher = f"torchrun --nproc_per_node={world}" if world > 1 else "python"
        return f"{launcher} {PROGRAM} {self.job.kind} @{shlex.quote(str(self.out / 'args.txt'))}"


def keep_step_size(run: RunSettings, saved: dict, world: int) -> None:
    """On another number of ranks, set accumulation and batch so that a step stays what it was.

    Only where the flags are as they were: new ones are taken at their word.
    """
    old, now = saved["args"], run.batch_size * run.grad_accum_steps * world
    same = (old["batch_size"], old["grad_accum_steps"]) == (run.batch_size, run.grad_accum_steps)
    if now == old["step_samples"] or not same:
        return
    share, rest = divmod(old["step_samples"], world)
    if rest:
        raise UserError(
            f"a step of {old['step_samples']} sequences cannot be shared by {world} ranks",
            "give new --batch_size and --grad_accum_steps, or another number of ranks")
    run.batch_size = max(b for b in divisors(share) if b <= run.batch_size)
    run.grad_accum_steps = share // run.batch_size
    say(f"resuming on {world} ranks: --batch_size {run.batch_size} --grad_accum_steps "
        f"{run.grad_accum_steps} keeps a step at {old['step_samples']} sequences")


def check_same_run(saved: dict, kind: str, config: ModelSettings, tokenizer: Tokenizer, args: dict,
                   out: Path) -> None:
    """Raise UserError where the run in `out` is of another model, tokenizer or trainer."""
    again = f"name another --out_dir, or repeat the run's own flags: {kind} @{out}/args.txt"
    if saved.get("kind") != kind or "gauges" not in saved:
        raise UserError(f"{out} holds a run of {saved.get('kind', 'the original program')}, not of "
                        f"{kind}", "name another --out_dir")
    if (saved.get("lora") or {}).get("key") != args.get("lora_base"):
        raise UserError(f"{out} adapts another model than this, or trains whole weights", again)
    if sha256(saved["tokenizer"]) != tokenizer.sha256:
        raise UserError(f"{out} was trained with another tokenizer than this data's", again)
    same = [key for key in SAME_ON_RESUME if key in args]
    new = {**dataclasses.asdict(config), **{key: args[key] for key in same}}
    old = {"scalar_head": False, **saved["config"], **{k: saved["args"].get(k) for k in same}}
    told = {"data_key": "other rows in --data", "reference": "another --ckpt as reference"}
    unlike = [told.get(k) or f"--{k} {old.get(k)} (now {new[k]})" for k in new
              if old.get(k) != new[k] and k != "dropout"]
    if unlike:
        raise UserError(f"{out} holds another model: {', '.join(unlike)}", again)


def open_run(out: Path, args_text: str, machine: Machine) -> None:
    """Make the run's folder and write args.txt; raises OSError before any hour is paid for."""
    def write() -> None:
        with atomic_write(out / "args.txt", "w") as file:
            file.write(args_text)
        for half in out.glob(".ckpt_*.tmp"):  # left by a kill in the middle of writing
            half.unlink()
    machine.on_main(write)


# ==================================================================================================
# Judges: how good is a model
# ==================================================================================================


def expert_usage(model: Transformer, machine: Machine) -> dict[str, float]:
    """The least and the most used expert's share of its layer's tokens, times the experts.

    1 is even, 0 a dead expert. Counts evaluated tokens since the last call, which it ends.
    """
    shares = []
    for block in model.blocks:
        if isinstance(block.mlp, MoE):
            usage = machine.total(*block.mlp.usage.tolist())
            shares += [share / max(1.0, sum(usage)) * len(usage) for share in usage]
            block.mlp.usage.zero_()
    return {"moe/least": min(shares), "moe/most": max(shares)} if shares else {}


def mean_metrics(module: nn.Module, batches: Batches, machine: Machine,
                 count: int) -> list[float] | None:
    """The `count` sums of an Objective over (micro-batch, targets) of all ranks, a target."""
    found, targets = [torch.zeros(count)], 0
    for micro, size in batches:
        found.append(module(*(machine.to_device(t) for t in micro)).view(-1))
        targets += size
    sums = torch.stack([part.cpu() for part in found]).double().sum(0)
    *sums, targets = machine.total(*sums.tolist(), targets)
    return [total / targets for total in sums] if targets else None


def validate(module: nn.Module, parts: list[tuple[str, float, Batches]], machine: Machine,
             names: tuple[str, ...] = ("loss",)) -> dict[str, float]:
    """val/* of an Objective over the parts (name, weight, batches), weighted as trained.

    Named parts add val/loss/NAME each; a part without targets is passed over.
    """
    row, means, weights = {}, [], []
    for name, weight, batches in parts:
        found = mean_metrics(module, batches, machine, len(names))
        if found is not None:
            row |= {f"val/loss/{name}": found[0]} if name else {}
            means.append(found)
            weights.append(weight)
    if not means:
        return {}
    mean = np.average(means, axis=0, weights=weights).tolist()
    return {**report("val", names, mean), **row}


def perplexity(module: nn.Module, domains: list[tuple[str, TokenFolder, float]], batch_size: int,
               machine: Machine, seq_len: int, most: int) -> dict[str, float]:
    """val/loss (nats a token), val/ppl and val/bpb of the validation splits, weighted as trained.

    `module` is an Objective of pretrain_loss. Named domains add val/loss/NAME each.
    """
    expert_usage(module.model, machine)  # count from here
    filled = [d for d in domains if len(d[1].val) > 1]
    parts = [(name, weight, evaluation_batches(folder.val, seq_len, batch_size, most, machine.rank,
                                               machine.world)) for name, folder, weight in filled]
    row = validate(module, parts, machine)
    if not row:
        return {}
    spans = [folder.bytes_per_token("val") for _, folder, _ in filled]
    span = np.average(spans, weights=[weight for *_, weight in filled])
    loss = row.pop("val/loss")
    return {"val/loss": loss, "val/ppl": math.exp(min(loss, 700.0)),
            "val/bpb": float(loss / math.log(2) / max(span, 1e-9)), **row,
            **expert_usage(module.model, machine)}


@torch.inference_mode()
def row_logps(model: Transformer, stream: Groups, batch_size: int, machine: Machine) -> np.ndarray:
    """Log-probability of every answer of a stream (count, g), each rank doing its share."""
    result = np.zeros(stream.numbers.shape)
    mine = np.arange(machine.rank, stream.count, machine.world)
    progress = Progress("reference log-probs", len(mine), "rows", talks=machine.main)
    for i in range(0, len(mine), batch_size):
        places = mine[i:i + batch_size]
        ids, targets, _ = map(machine.to_device, stream.collate(stream.items(places)))
        with machine.autocast():
            result[places] = sequence_logps(model, ids, targets)[0].view(len(places), -1).cpu()
        progress.update(min(len(mine), i + batch_size))
    progress.close()
    return np.array(machine.total(*result.flatten())).reshape(result.shape)


@torch.inference_mode()
def score_answers(model: Transformer, tokenizer: Tokenizer, chats: list[Turns], batch_size: int,
                  machine: Machine) -> list[float]:
    """A reward model's score of the last answer of each conversation; what is too long is read
    from its newest end."""
    limit, scores = model.config.seq_len, []
    for i in range(0, len(chats), batch_size):
        rows = []
        for turns in chats[i:i + batch_size]:
            ids = np.array(encode_chat(tokenizer, turns)[0][-limit:])
            rows.append((ids, np.where(np.arange(len(ids)) == len(ids) - 2, ids[-1], IGNORE)))
        longest = max(len(ids) for ids, _ in rows)
        with machine.autocast():
            ids, targets = map(machine.to_device, padded(rows, padded_length(longest, limit)))
            scores += reward_scores(model, ids, targets)[0].tolist()
    return scores


def sample_answers(model: Transformer, tokenizer: Tokenizer, questions: list[Turns], most: int,
                   dtype: torch.dtype) -> list[dict]:
    """The likeliest answers to fixed questions, as rows of samples.jsonl."""
    prompts = [encode_chat(tokenizer, turns, reply=True)[0] for turns in questions]
    answers = complete(model, prompts, SamplingSettings(max_new_tokens=most, temperature=0.0), 0,
                       frozenset({tokenizer.eos}), dtype)
    return [{"prompt": turns[-1][1], "answer": tokenizer.decode(ids),
             "ended": bool(ids) and ids[-1] == tokenizer.eos}
            for turns, ids in zip(questions, answers, strict=True)]


# ==================================================================================================
# Commands: one cmd_* for each subcommand: wiring only
# ==================================================================================================


def cmd_prep(settings: PrepSettings) -> int:
    began = time.monotonic()
    meta = prepare(settings)
    seconds = max(time.monotonic() - began, 1e-9)
    for name, counts in meta["splits"].items():
        say(f"{name}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, "
            f"{counts['bytes']:,} bytes ({counts['bytes'] / max(1, counts['tokens']):.2f} a token)")
    total = sum(counts["bytes"] for counts in meta["splits"].values())
    say(f"{settings.out_dir}: vocabulary of {meta['vocab_size']:,}, {duration(seconds)}, "
        f"{total / 1e6 / seconds:.1f} MB/s",
        f"next: python {PROGRAM} train --data_dir {shlex.quote(settings.out_dir)}")
    return 0


def announce(job: Job, machine: Machine, run: RunSettings, saved: dict | None) -> None:
    """What is about to be trained, on what, and from where."""
    config, stream = job.model.config, job.stream
    counts = parameter_counts(config)
    samples = run.batch_size * run.grad_accum_steps * machine.world
    embedded = short(counts["embedding"] + counts["head"])
    preset = f"{run.preset}, " if run.preset else ""
    trained = sum(w.numel() for w in job.model.parameters() if w.requires_grad)
    part = f", {trained / counts['total']:.1%} of them trained" if job.lora else ""
    step_tokens = samples * job.sample_tokens
    say(f"model: {preset}{short(counts['total'])} parameters ({embedded} in embeddings){part}, "
        f"{config.n_layer} layers, context {config.seq_len}",
        f"machine: {machine.world} x {machine.device.type}, "
        f"{str(machine.dtype).removeprefix('torch.')}",
        f"data: {short(stream.tokens)} training tokens; a step has {step_tokens:,.0f}, "
        f"the run {short(step_tokens * run.max_steps)} "
        f"({samples * run.max_steps / stream.count:.2g} epochs)")
    if saved:
        say(f"resuming {run.out_dir} after step {saved['step']}")


def finish(trainer: Trainer) -> int:
    """Train, and say what came of it and what to do next."""
    code, out = trainer.fit(), trainer.out
    if code == 0:
        seconds, best = trainer.gauges.elapsed(), trainer.best_val
        best = f"best validation loss {best:.4f}; " if best < math.inf else ""
        kind, name = trainer.job.kind, shlex.quote(str(out))
        speak = "" if kind == "train" else " --chat"
        more = [f"{PROGRAM} reward --ckpt {name} --score rows.jsonl"] if kind == "reward" else [
            f"{PROGRAM} generate --ckpt {name}{speak} --prompt \"…\"",
            f"convert_to_llama.py --ckpt {shlex.quote(str(checkpoint_path(out)))} --out {name}/hf"]
        say(f"done after {trainer.step} steps in {duration(seconds)}; {best}next:",
            *(f"  python {line}" for line in more))
    return code


def cmd_train(run: RunSettings, data: DataSettings, model: ModelSettings, optim: OptimSettings,
              device: DeviceSettings) -> int:
    machine = open_machine(device)
    domains = open_domains(data)
    tokenizer = domains[0][1].tokenizer
    config = dataclasses.replace(model, vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos)
    windows = training_stream(domains, config.seq_len, device.seed)
    groups = (run, data, model, optim, device)
    args, text, out = settings_dict(*groups), settings_text(*groups), Path(run.out_dir)
    saved = resume_point(out, run.resume, machine)
    if saved:
        check_same_run(saved, "train", config, tokenizer, args, out)
        keep_step_size(run, saved, machine.world)
    open_run(out, text, machine)
    network = Transformer(config)
    network.init_weights(device.seed)
    if saved:
        network.load_state_dict(saved["model"])
    network.grad_checkpoint = run.grad_checkpoint
    loss = functools.partial(pretrain_loss, z_loss=optim.z_loss)
    job = Job("train", network.to(machine.device), loss, windows, functools.partial(
        perplexity, domains=domains, batch_size=run.batch_size, machine=machine,
        seq_len=config.seq_len, most=run.eval_tokens), tokenizer)
    announce(job, machine, run, saved)
    trainer, saved = Trainer(job, machine, run, optim, args, saved), None  # frees it
    return finish(trainer)


Row = tuple[list[Turns], float]  # conversations judged together, and their number


@dataclass
class Part:
    """Encoded rows of one domain, each a group with its number, and the domain's weight."""

    name: str
    groups: list[list[Example]]
    numbers: np.ndarray
    weight: float


class Tuning:
    """What sft, dpo and reward share: the model they start from, their rows, their run."""

    def __init__(self, kind: str, run: RunSettings, tune: TuneSettings, lora: LoraSettings,
                 optim: OptimSettings, device: DeviceSettings, *more, **config):
        if not tune.data:
            raise UserError("--data is missing", "name a file of rows, --data rows.jsonl")
        self.kind, self.run, self.tune, self.lora, self.optim = kind, run, tune, lora, optim
        self.machine, self.seed = open_machine(device), device.seed
        self.path, self.out = checkpoint_path(tune.ckpt), Path(run.out_dir)
        base = load_checkpoint(self.path)
        self.tokenizer, self.weights = tokenizer_of(base, tune.spm, tune.ckpt), base["model"]
        old = ModelSettings(**base["config"])
        original = old.rope_original or round(old.seq_len / old.rope_factor)
        self.config = dataclasses.replace(
            old, seq_len=tune.seq_len or old.seq_len, dropout=tune.dropout,
            bos_id=self.tokenizer.bos, rope_original=original if old.rope_scaling != "none" else 0,
            **{"doc_mask": False, "scalar_head": False, **config})
        self.questions: list[Turns] = []  # of rows that are held out
        groups = (run, tune, *more, lora, optim, device)
        self.args, self.text = settings_dict(*groups), settings_text(*groups)
        self.key = model_key(base)
        self.args["lora_base"] = self.key if lora.lora_rank else None

    def parts(self, parse: Callable[[dict], Row], make: Callable[..., Example | None],
              ) -> tuple[list[Part], list[Part]]:
        """Rows to train on and rows held out, encoded; `make` is example or last_answer."""
        tune, train, val = self.tune, [], []
        read = functools.partial(read_rows, parse=parse, on_bad_row=tune.on_bad_row)
        share = 0.0 if tune.val_data else tune.val_split
        for name, files, weight in tune.domains():
            sides: tuple[list[Row], list[Row]] = [], []
            for row in read(files):
                sides[held_out(row[0][0], share)].append(row)
            train.append(self.part(name, sides[0], weight, make))
            val.append(self.part(name, sides[1], weight, make, "held-out "))
        if tune.val_data:
            val = [self.part("", read(tune.val_data), 1.0, make, "validation ")]
        if not all(part and part.groups for part in train):
            raise UserError("--val_split leaves no row to train on", "use a smaller one")
        self.args["data_key"] = data_key(group for part in train for group in part.groups)
        return train, [part for part in val if part]

    def part(self, name: str, rows: list[Row], weight: float,
             make: Callable[..., Example | None], kind: str = "") -> Part | None:
        if not rows:
            return None
        one = functools.partial(make, self.tokenizer, limit=self.config.seq_len)
        shown = f"{kind}rows of {name}" if name else f"{kind}rows"
        groups, kept = fit_rows([row[0] for row in rows], one, self.tokenizer.eos, shown)
        if kind:
            self.questions += [rows[i][0][0][:-1] for i in kept]
        return Part(name, groups, np.array([rows[i][1] for i in kept])[:, None], weight)

    def groups(self, part: Part) -> Groups:
        return Groups(part.groups, part.numbers, self.config.seq_len, self.seed)

    def network(self) -> Transformer:
        """The model to train, with the weights it starts from."""
        network = Transformer(self.config)
        network.init_weights(self.seed)
        network.load_state_dict({k: w for k, w in self.weights.items() if k != "score.weight"},
                                strict=False)
        return network.to(self.machine.device)

    def start(self, network: Transformer, train: list[Part], val: list[Part],
              as_stream: Callable[[Part], Stream], loss: Callable[..., Tensor],
              names: tuple[str, ...] = ("loss",), samples: Callable | None = None) -> int:
        """Train, from the start or from where the run in --out_dir stands; the exit code."""
        run, machine, lora = self.run, self.machine, None
        stream = mixed(list(map(as_stream, train)), [part.weight for part in train])
        held = [(part.name, part.weight, as_stream(part)) for part in val]
        saved = resume_point(self.out, run.resume, machine)
        if saved:
            check_same_run(saved, self.kind, self.config, self.tokenizer, self.args, self.out)
            keep_step_size(run, saved, machine.world)
        if self.lora.lora_rank:
            attach_lora(network, self.lora, self.seed)
            lora = {"base": str(self.path.resolve()), "key": self.args["lora_base"],
                    "scale": self.lora.scale, **dataclasses.asdict(self.lora)}
        elif self.config.scalar_head and not self.config.tie:
            network.lm_head.requires_grad_(False)  # it has no part in a score
        if saved:
            network.load_state_dict(saved["model"], strict=not lora)
        network.to(machine.device).grad_checkpoint = run.grad_checkpoint
        samples_a_step = run.batch_size * run.grad_accum_steps * machine.world
        run.max_steps = run.max_steps or max(
            1, math.ceil(self.tune.epochs * stream.count / samples_a_step))
        open_run(self.out, self.text, machine)

        def evaluate(module: nn.Module) -> dict[str, float]:
            parts = [(name, weight, part.in_order(run.batch_size, run.eval_tokens, machine.rank,
                                                  machine.world)) for name, weight, part in held]
            return validate(module, parts, machine, names)

        job = Job(self.kind, network, loss, stream, evaluate, self.tokenizer, names, samples, lora)
        announce(job, machine, run, saved)
        self.weights = None  # the network has them
        code = finish(Trainer(job, machine, run, self.optim, self.args, saved))
        if code == 0 and self.lora.lora_merge and lora:
            machine.on_main(self.merge)
        return code

    def merge(self) -> None:
        merged = load_checkpoint(self.out)
        kept = ("format", "kind", "step", "samples", "best_val", "model", "config", "tokenizer")
        save_checkpoint(self.out / "merged.pt", {key: merged[key] for key in kept})


def cmd_sft(run: TuneRun, tune: TuneSettings, sft: SftSettings, lora: LoraSettings,
            optim: TuneOptim, device: DeviceSettings) -> int:
    tuning = Tuning("sft", run, tune, lora, optim, device, sft)
    tuning.config.doc_mask = sft.pack
    train, val = tuning.parts(lambda row: ([conversation(row)], 0.0), example)

    def chats(part: Part) -> Chats:
        return Chats([one for one, in part.groups], tuning.config.seq_len, device.seed, sft.pack)

    samples = functools.partial(
        sample_answers, tokenizer=tuning.tokenizer, questions=tuning.questions[:sft.samples],
        most=sft.sample_tokens, dtype=tuning.machine.dtype)
    return tuning.start(tuning.network(), train, val, chats, pretrain_loss,
                        samples=samples if sft.samples and tuning.questions else None)


def save_beside(places: list[Path], array: np.ndarray) -> None:
    """Write an array to the first place that takes it."""
    for place in places:
        with contextlib.suppress(OSError):
            with atomic_write(place) as file:
                np.save(file, array)
            return


def add_reference(tuning: Tuning, network: Transformer, parts: list[Part]) -> None:
    """Give every pair the starting model's log-probs, which are kept in a file beside the data."""
    everything = [group for part in parts for group in part.groups]
    name, machine = Path(tuning.tune.domains()[0][1][0]), tuning.machine
    key = f"{tuning.key}/{data_key(everything)}/{machine.dtype}"
    file = f".{name.name}.{sha256(key.encode())[:16]}.reference.npy"
    places = [folder / file for folder in (name.parent, tuning.out)]
    found = machine.from_main(next((p for p in places if p.exists()), None))
    if found:
        logps = np.load(found)
    else:
        stream = Groups(everything, np.zeros((len(everything), 2)), tuning.config.seq_len, 0)
        logps = row_logps(network.eval(), stream, tuning.run.batch_size, machine)
        machine.on_main(lambda: save_beside(places, logps))
    ends = np.cumsum([len(part.groups) for part in parts])[:-1]
    for part, numbers in zip(parts, np.split(logps, ends), strict=True):
        part.numbers = numbers


def cmd_dpo(run: TuneRun, tune: TuneSettings, dpo: DpoSettings, lora: LoraSettings,
            optim: DpoOptim, device: DeviceSettings) -> int:
    tuning = Tuning("dpo", run, tune, lora, optim, device, dpo)
    train, val = tuning.parts(lambda row: (list(preference(row)), 0.0), last_answer)
    network = tuning.network()
    if dpo.loss not in REFERENCE_FREE:
        tuning.args["reference"] = tuning.key
        add_reference(tuning, network, train + val)
    loss = functools.partial(preference_loss, settings=dpo)
    return tuning.start(network, train, val, tuning.groups, loss, PAIR_METRICS)


def judged(row: dict) -> Row:
    """A row for a reward model: a pair, or one answer with its label."""
    if "label" in row:
        turns, label = labelled(row)
        return [turns], label
    return list(preference(row)), 0.0


def open_judge(path: str, spm: str, machine: Machine) -> tuple[Transformer, Tokenizer]:
    """A reward model; raises UserError where the checkpoint is none."""
    saved = load_checkpoint(path)
    if not saved["config"].get("scalar_head"):
        raise UserError(f"{path} is no reward model", f"train one: python {PROGRAM} reward --help")
    return build_model(saved, machine.device), tokenizer_of(saved, spm, path)


def score_rows(reward: RewardSettings, run: RunSettings, tune: TuneSettings,
               device: DeviceSettings) -> int:
    """Write the rows of --score again, with the reward model's score of each answer."""
    machine = open_machine(device)
    model, tokenizer = open_judge(tune.ckpt, tune.spm, machine)

    def parse(row: dict) -> tuple[dict, list[Turns]]:
        return row, list(preference(row)) if "chosen" in row else [conversation(row)]

    rows = read_rows(reward.score, parse, tune.on_bad_row, "--score")
    chats = [turns for _, group in rows for turns in group]
    scores = iter(score_answers(model, tokenizer, chats, run.batch_size, machine))
    right, pairs = 0, 0
    with atomic_write(Path(reward.out or "scored.jsonl"), "w") as file:
        for row, group in rows:
            keys = ("reward",) if len(group) == 1 else ("chosen_reward", "rejected_reward")
            found = {key: next(scores) for key in keys}
            pairs += len(group) == 2
            right += len(group) == 2 and found["chosen_reward"] > found["rejected_reward"]
            file.write(json.dumps({**row, **found}, ensure_ascii=False) + "\n")
    say(f"{len(rows)} rows scored in {reward.out or 'scored.jsonl'}"
        + (f"; the chosen answer scores higher in {right / pairs:.1%} of {pairs} pairs"
           if pairs else ""))
    return 0


def cmd_reward(run: TuneRun, tune: TuneSettings, reward: RewardSettings, lora: LoraSettings,
               optim: DpoOptim, device: DeviceSettings) -> int:
    if reward.score:
        return score_rows(reward, run, tune, device)
    tuning = Tuning("reward", run, tune, lora, optim, device, scalar_head=True)
    train, val = tuning.parts(judged, last_answer)
    sizes = {len(group) for part in train + val for group in part.groups}
    if len(sizes) > 1:
        raise UserError("--data holds both pairs and labelled answers", "train on one kind")
    loss = pair_loss if sizes == {2} else label_loss
    return tuning.start(tuning.network(), train, val, tuning.groups, loss, JUDGE_METRICS)


@dataclass(frozen=True)
class Prompt:
    """What is to be continued or answered, and the answer that a row gives, if any."""

    turns: Turns
    expected: str | None = None


def row_prompt(row: dict) -> Prompt:
    if any(key in row for key in ("messages", "conversations", "instruction", "response")):
        *turns, (_, answer) = conversation(row)
        return Prompt(turns, answer)
    return Prompt(check_turns(turns_of(row.get("prompt"), "user", "prompt")), row.get("answer"))


def read_prompts(settings: GenerateSettings) -> list[Prompt]:
    path = settings.prompt_file
    system = [("system", settings.system)] if settings.system else []
    if path.endswith((".jsonl", ".json", ".parquet")):
        rows = read_rows([path], row_prompt, "error", "--prompt_file")
        return [row if row.turns[0][0] == "system"
                else dataclasses.replace(row, turns=system + row.turns) for row in rows]
    if not path:
        return [Prompt([*system, ("user", settings.prompt)])]
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as fault:
        raise UserError(f"{path} is not UTF-8 text ({fault.reason})", "save it as UTF-8") from fault
    prompts = [Prompt([*system, ("user", line)]) for line in text.split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompt", "write one a line")
    return prompts


def continuation(ids: list[int], new: list[int], tokenizer: Tokenizer) -> str:
    """The text that `new` adds behind `ids`."""
    return tokenizer.decode(ids + new)[len(tokenizer.decode(ids)):]


def print_stream(stream: Iterator[tuple[int, int]], prompt: str, ids: list[int],
                 tokenizer: Tokenizer) -> None:
    """Print a continuation as it comes; a character cut in the middle waits for its rest."""
    print(prompt, end="", flush=True)
    new, shown = [], ""
    for _, token in stream:
        new.append(token)
        text = continuation(ids, new, tokenizer)
        if not text.endswith("\ufffd"):
            print(text[len(shown):], end="", flush=True)
            shown = text
    print(continuation(ids, new, tokenizer)[len(shown):])


def completions(model: Transformer, tokenizer: Tokenizer, ids: list[list[int]], size: int,
                chat: bool, **how) -> Iterator[tuple[str, bool]]:
    """The text that continues each prompt, `size` of them at once, and whether it ended itself."""
    progress = Progress("writing", len(ids), "completions")
    for i in range(0, len(ids), size):
        batch = ids[i:i + size]
        for prompt, new in zip(batch, complete(model, batch, first=i, **how), strict=True):
            text = continuation([] if chat else prompt, new, tokenizer)
            yield text, new[-1:] == [tokenizer.eos]
        progress.update(min(len(ids), i + size))
    progress.close()


def write_samples(prompts: list[Prompt], found: list[tuple[str, bool]],
                  settings: GenerateSettings) -> None:
    """All completions, to the terminal or as rows of a .jsonl, and a count of how they fare."""
    rows = [{"prompt": prompt.turns[-1][1], "completion": text, "ended": ended}
            | ({} if prompt.expected is None else {"expected": prompt.expected})
            for prompt, (text, ended) in zip(prompts, found, strict=True)]
    if settings.out:
        with atomic_write(Path(settings.out), "w") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        say(f"{len(rows)} completions in {settings.out}")
    else:
        between = "\n> " if settings.chat else ""
        say(*(f"--- {i} of {len(rows)}\n{row['prompt']}{between}{row['completion']}"
              for i, row in enumerate(rows, 1)))
    known = [row for row in rows if "expected" in row]
    same = sum(row["completion"].strip() == str(row["expected"]).strip() for row in known)
    say(f"{sum(row['ended'] for row in rows) / len(rows):.1%} ended with </s>"
        + (f"; {same / len(known):.1%} are the expected answer" if known else ""))


def keep_best(settings: GenerateSettings, prompts: list[Prompt], found: list[tuple[str, bool]],
              machine: Machine) -> tuple[list[Prompt], list[tuple[str, bool]]]:
    """Of every --best_of completions the one that the reward model likes best."""
    judge, tokenizer = open_judge(settings.reward_ckpt, "", machine)
    chats = [[*prompt.turns, ("assistant", text)]
             for prompt, (text, _) in zip(prompts, found, strict=True)]
    scores = score_answers(judge, tokenizer, chats, settings.batch_size, machine)
    best = [max(range(i, i + settings.best_of), key=scores.__getitem__)
            for i in range(0, len(chats), settings.best_of)]
    return [prompts[i] for i in best], [found[i] for i in best]


def cmd_generate(settings: GenerateSettings, sampling: SamplingSettings,
                 device: DeviceSettings) -> int:
    machine = open_machine(device)
    saved = load_checkpoint(settings.ckpt)
    tokenizer = tokenizer_of(saved, settings.spm, settings.ckpt)
    model = build_model(saved, machine.device)
    count = settings.num_samples * settings.best_of
    prompts = [p for p in read_prompts(settings) for _ in range(count)]
    if settings.chat:
        ids = [encode_chat(tokenizer, p.turns, reply=True)[0] for p in prompts]
    else:
        ids = [[tokenizer.bos, *tokenizer.encode(p.turns[-1][1])] for p in prompts]
    how = {"settings": sampling, "seed": device.seed, "dtype": machine.dtype,
           "stop": frozenset({tokenizer.eos} if settings.stop_at_eos else ())}
    with machine.autocast():
        if len(prompts) == 1 and not settings.out:
            shown = ("", []) if settings.chat else (prompts[0].turns[-1][1], ids[0])
            print_stream(generate(model, ids, **how), *shown, tokenizer)
            return 0
        found = list(completions(model, tokenizer, ids, settings.batch_size, settings.chat, **how))
    if settings.best_of > 1:
        prompts, found = keep_best(settings, prompts, found, machine)
    write_samples(prompts, found, settings)
    return 0


def describe_data(path: Path) -> Iterator[str]:
    folder = TokenFolder(path)
    yield (f"{path}: prepared data, {folder.meta['dtype']} ids, "
           f"vocabulary {folder.tokenizer.vocab_size:,}")
    for split in ("train", "val"):
        counts = folder.meta["splits"][split]
        yield (f"{split}: {counts['tokens']:,} tokens, {counts['documents']:,} documents, "
               f"{counts['bytes']:,} bytes, {folder.bytes_per_token(split):.2f} bytes a token")
    start = folder.tokenizer.decode(folder.train[:60].tolist())
    yield f"begins: {start!r}"


def describe_checkpoint(path: Path) -> Iterator[str]:
    saved = load_checkpoint(path)
    config = ModelSettings(**saved["config"])
    counts = parameter_counts(config)
    kind = "of the original program" if saved["original"] else saved.get("kind", "model")
    yield f"{path}: {kind}, step {saved.get('step', '?')}, {path.stat().st_size / 1e6:.1f} MB"
    yield (f"parameters: {counts['total']:,} (embedding {counts['embedding']:,}, head "
           f"{counts['head'] or 'tied'}, layers {counts['blocks']:,})")
    yield "config: " + " ".join(f"{k}={v}" for k, v in saved["config"].items())
    yield f"compute: {short(flops_per_token(config))} training FLOPs a token"
    if saved.get("best_val", math.inf) < math.inf:
        yield f"best validation loss: {saved['best_val']:.4f}"
    if saved["tokenizer"]:
        yield f"tokenizer: {Tokenizer(bytes(saved['tokenizer'])).vocab_size:,} pieces, inside"
    else:
        yield "tokenizer: none inside, use --spm"


TOKENS_A_PARAMETER = 20  # (Hoffmann et al. 2022)


def plan_memory(config: ModelSettings, settings: InfoSettings,
                optim: OptimSettings) -> dict[str, float]:
    """Bytes on a device: weights, gradients, optimiser, activations (bf16, fused attention)."""
    total = parameter_counts(config)["total"]
    tokens = settings.batch_size * config.seq_len
    width = 2 * config.head_size * (config.n_head + config.kv_heads) + 6 * config.d_model
    active = config.n_expert_active if config.n_expert else 1
    layer = 2 * (width + 4 * config.hidden * active)
    kept = 2 * config.d_model * config.n_layer + layer if settings.grad_checkpoint \
        else layer * config.n_layer
    logits = min(tokens, LOSS_ROWS) * config.vocab_size * 10
    with torch.device("meta"):
        kinds = split_parameters(Transformer(config))
    lone = sum(w.numel() for kind in ("qkv", "hidden") for w in kinds[kind])
    states = 8 * total - 4 * lone * (optim.optimizer == "muon") + 4 * total * bool(optim.ema)
    return {"weights": 6 * total,  # fp32, and the bf16 copies that the matmuls read
            "gradients": 4 * total, "optimiser": states,
            "activations": tokens * kept + logits}


def plan(settings: InfoSettings, config: ModelSettings, optim: OptimSettings) -> Iterator[str]:
    """What a run of a preset would take: parameters, FLOPs, memory, hours, money."""
    counts, flops = parameter_counts(config), flops_per_token(config)
    tokens = settings.tokens or TOKENS_A_PARAMETER * counts["active"]
    yield (f"{settings.preset}: {counts['total']:,} parameters (embedding {counts['embedding']:,}, "
           f"head {counts['head'] or 'tied'}, layers {counts['blocks']:,}; {counts['active']:,} "
           f"active), vocabulary {config.vocab_size:,}, context {config.seq_len:,}")
    memory = plan_memory(config, settings, optim)
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.items())
    yield f"memory a device, about: {sum(memory.values()) / 1e9:.2f} GB ({parts})"
    step = settings.batch_size * settings.grad_accum_steps * settings.gpus * config.seq_len
    yield (f"compute: {short(flops)} FLOPs a token, {flops * tokens:.3g} for {short(tokens)} "
           f"tokens, {tokens / step:,.0f} steps of {step:,} tokens")
    peak = flops_of(settings.gpu)
    speed = settings.tok_per_s or (peak or 0.0) * settings.gpus * settings.mfu / flops
    if settings.gpu and not peak and not settings.tok_per_s:
        raise UserError(f"the speed of --gpu {settings.gpu} is not known", "give --tok_per_s")
    if speed:
        hours = tokens / speed / 3600
        cost = f", ${hours * settings.usd_per_hour:,.2f}" if settings.usd_per_hour else ""
        yield f"time: {hours:,.1f} hours at {short(speed)} tokens a second{cost}"
    else:
        yield "time: unknown; give --gpu NAME or --tok_per_s N"


def cmd_info(settings: InfoSettings, model: ModelSettings, optim: OptimSettings) -> int:
    if settings.preset:
        named = PRESETS[settings.preset].get("vocab_size", 32000)
        config = dataclasses.replace(model, vocab_size=settings.vocab or named)
        say(*plan(settings, config, optim))
        return 0
    path = Path(settings.path)
    if not path.exists():
        raise UserError(f"{path} does not exist", "name a checkpoint, a run or a data folder")
    is_data = path.is_dir() and not list(path.glob("ckpt_*.pt"))
    say(*(describe_data(path) if is_data else describe_checkpoint(checkpoint_path(path))))
    return 0


def python_documentation() -> Iterator[str]:
    """The interpreter's own prose: its help topics and the docstrings of its library."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if {"test", "tests", "site-packages", "dist-packages"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        if path.name == "topics.py":
            yield from (n.value for n in ast.walk(tree)
                        if isinstance(n, ast.Constant) and isinstance(n.value, str))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        yield from (text for node in ast.walk(tree) if isinstance(node, kinds)
                    if (text := ast.get_docstring(node)))


def demo_corpus(path: Path) -> None:
    texts = [text for text in dict.fromkeys(python_documentation()) if len(text) >= 200]
    if sum(map(len, texts)) < 200_000:
        raise UserError("this Python was installed without its documentation",
                        f"bring your own: python {PROGRAM} prep --text_path FILE --out_dir data")
    with atomic_write(path, "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def demo_step(command: Callable[..., int], *flags: object) -> None:
    """Run one of our own commands as its user would, shown before it runs."""
    name, argv = command.__name__.removeprefix("cmd_"), [str(flag) for flag in flags]
    say("", f"$ python {PROGRAM} {name} {shlex.join(argv)}")
    if command(*read_command(command, argv)):
        raise UserError(f"the demo stopped at {name}", "run the line above again by hand")


def demo_untrained(data: Path, shape: tuple) -> None:
    folder = TokenFolder(data)
    config = read_command(cmd_train, [str(flag) for flag in shape])[2]
    config.vocab_size = folder.tokenizer.vocab_size
    model = Transformer(config).eval()
    model.init_weights(0)
    ids = [folder.tokenizer.bos, *folder.tokenizer.encode("Return a")]
    print_stream(generate(model, [ids], SamplingSettings(max_new_tokens=20), 0), "Return a", ids,
                 folder.tokenizer)


def demo_chats(out: Path) -> None:
    """Sums, asked and answered in two styles, and which of the two is preferred."""
    chats, pairs = [], []
    for a, b in ((a, b) for a in range(10) for b in range(10)):
        prompt, kind, curt = f"What is {a} + {b}?", f"The sum is {a + b}.", str(a + b)
        chats += [{"prompt": prompt, "response": answer} for answer in (kind, curt)]
        pairs.append({"prompt": prompt, "chosen": kind, "rejected": curt})
    for name, rows in (("chats", chats), ("pairs", pairs)):
        with atomic_write(out / f"{name}.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def demo_alignment(out: Path, base: Path) -> None:
    """Teach the demo's model to answer, then to answer in the kinder of two styles."""
    demo_chats(out)
    ask = ("--chat", "--prompt", "What is 3 + 4?", "--num_samples", 4, "--temperature", 1,
           "--max_new_tokens", 16, "--ckpt")
    common = ("--compile", 0, "--val_split", 0)
    say("", "Now it is taught to answer questions, in two styles:")
    demo_step(cmd_sft, "--ckpt", base, "--data", out / "chats.jsonl", "--out_dir", out / "sft",
              "--epochs", 30, "--batch_size", 4, "--lr", 2e-3, *common)
    demo_step(cmd_generate, *ask, out / "sft")
    say("", "And to prefer the kinder one:")
    demo_step(cmd_dpo, "--ckpt", out / "sft", "--data", out / "pairs.jsonl", "--out_dir",
              out / "dpo", "--epochs", 3, "--batch_size", 8, "--lr", 1e-4, "--beta", 0.3,
              *common)
    demo_step(cmd_generate, *ask, out / "dpo")


def cmd_demo(settings: DemoSettings) -> int:
    out = Path(settings.out_dir)
    data, run = out / "data", out / "run"
    steps = settings.max_steps or (60 if settings.quick else 250)
    vocab, layers, width, batch = (1024, 2, 128, 8) if settings.quick else (4096, 4, 256, 16)
    for folder in (run, out / "sft", out / "dpo"):
        shutil.rmtree(folder, ignore_errors=True)
    say("This demo trains a small model on the documentation of your Python interpreter.")
    demo_corpus(out / "corpus.jsonl")
    demo_step(cmd_prep, "--text_path", out / "corpus.jsonl", "--out_dir", data,
              "--vocab_size", vocab, "--val_split", 0.05, "--overwrite")
    shape = ("--n_layer", layers, "--d_model", width, "--n_head", 4, "--ffn_mult", 3,
             "--seq_len", 256)
    train = ("--data_dir", data, "--out_dir", run, "--batch_size", batch, "--lr", 2e-3,
             "--warmup_steps", steps // 10, "--eval_interval", max(1, steps // 4), "--compile", 0)
    sample = ("--prompt", "Return a", "--max_new_tokens", 60, "--ckpt")
    say("", "An untrained model of this size writes:")
    demo_untrained(data, shape)
    demo_step(cmd_train, *train, *shape, "--max_steps", steps)
    demo_step(cmd_generate, *sample, run / "ckpt_best.pt")
    demo_alignment(out, run)
    say("", f"The model is {run}/ckpt_best.pt. What you may do next:",
        f"  python {PROGRAM} train @{run}/args.txt --max_steps {steps * 4}",
        f"  python {PROGRAM} info {run}",
        f"  python convert_to_llama.py --ckpt {run}/ckpt_best.pt --out {out}/hf",
        f"  python {PROGRAM} prep --text_path YOUR.txt --out_dir data")
    return 0


# ==================================================================================================
# Front door: the table of commands and main
# ==================================================================================================


@dataclass(frozen=True)
class Command:
    """A subcommand: what runs, its one-line purpose and an example that works."""

    run: Callable[..., int]
    about: str
    example: str


COMMANDS = {
    "demo": Command(cmd_demo, "text to trained model in minutes, on any machine",
                    f"python {PROGRAM} demo"),
    "prep": Command(cmd_prep, "text becomes a tokenizer and token files",
                    f"python {PROGRAM} prep --text_path docs.txt --out_dir data --vocab_size 8192"),
    "train": Command(cmd_train, "pretrain a model on prepared data",
                     f"python {PROGRAM} train --data_dir data --out_dir runs/lm --preset 138m"),
    "sft": Command(cmd_sft, "teach a model to answer, from conversations",
                   f"python {PROGRAM} sft --ckpt runs/lm --data chats.jsonl --out_dir runs/sft"),
    "dpo": Command(cmd_dpo, "prefer the better of two answers",
                   f"python {PROGRAM} dpo --ckpt runs/sft --data pairs.jsonl --out_dir runs/dpo"),
    "reward": Command(cmd_reward, "a model that scores answers, from pairs or labels",
                      f"python {PROGRAM} reward --ckpt runs/sft --data pairs.jsonl "
                      "--out_dir runs/reward"),
    "generate": Command(cmd_generate, "continue prompts with a trained model",
                        f'python {PROGRAM} generate --ckpt runs/lm --prompt "Once upon a time"'),
    "info": Command(cmd_info, "say what a checkpoint or a data folder is",
                    f"python {PROGRAM} info runs/lm"),
}


def usage() -> str:
    rows = "\n".join(f"  {name:10}{command.about}" for name, command in COMMANDS.items())
    return (f"usage: python {PROGRAM} COMMAND [--flag value …] [@FILE]\n\n{rows}\n\n"
            f"python {PROGRAM} COMMAND --help explains the flags of a command.")


def complain(fault: UserError) -> int:
    """Print a fault, once where all ranks share it: rank 0 ends the others before they speak."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(OTHER_RANKS_WAIT_S)
    print(f"{f'rank {rank}: ' if rank else ''}{fault}", file=sys.stderr, flush=True)
    return 2


def run_command(command: Command, argv: list[str]) -> int:
    """Parse and run one command; the exit code. Users' mistakes become sentences on stderr."""
    try:
        code = command.run(*read_command(command.run, argv, command.about, command.example))
        close_machine()  # not after a bug: its traceback must not wait for the other ranks
        return code
    except UserError as fault:
        return complain(fault)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `generate | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as fault:
        sentence = disk_error(fault)
        if sentence is None:
            raise
        return complain(sentence)


def main(argv: list[str] | None = None) -> int:
    """The program; the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose {either(COMMANDS)}"
        return complain(UserError(f"{name} is no command", hint))
    return run_command(COMMANDS[name], rest)


if __name__ == "__main__":
    sys.exit(main())
