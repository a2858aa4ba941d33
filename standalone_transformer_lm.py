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
  python convert_to_llama.py --ckpt run/ckpt_best.pt --out hf                # for transformers

Every command explains its flags with --help. `train @OUT/args.txt --max_steps 300000` repeats a
run with one change; the same --out_dir resumes. Each room uses only what stands above it.

Rooms
  Ground             constants, errors a user can act on, safe files, worker processes, progress
  Flags              dataclass fields become flags, @FILE and args.txt; no flag is known by name
  Settings           every setting once: name, type, default, help, choices and what it expands to
  Machine            device, dtype, seeds, signals, and the collectives of torch.distributed
  Sharding           one model trained on several devices
  Tokenizers         text to token ids and back
  Prep               text in any format becomes token files
  Streams            which samples make up which step
  Conversations      rows of every shape become turns, and turns become examples
  Model              the transformer; it touches no file and prints nothing
  LoRA               low-rank adapters: attach, merge
  Engine             sampling and cached generation; token ids only
  Losses             tensors in, tensors out
  Optimisers         parameter groups and schedules
  Checkpoints        the only place that saves and loads
  Metrics            figures of a run to files and services, and the progress line
  Trainer            the one training loop, given a loss
  Evaluation         how good is a model
  Tasks and rewards  rows made by rule, and functions that score completions
  Rollouts           generate, score, advantage, update
  Tuning             what sft, dpo, reward and grpo share
  Planning           what a checkpoint is, what a run takes, the fastest flags
  Commands           one cmd_* for each subcommand: wiring only
  Demo               from the interpreter's own documentation to a small chat model
  Front door         the table of commands and main

Shape legend
  B batch   T query positions   S cached positions   V vocabulary   L layers
  d d_model   F feed-forward width   H query heads   K key/value heads   D head size   N B*T

File formats
  data folder   tokenizer.model, train.bin, val.bin (little-endian uint16, or uint32 above 65,535
                ids), meta.json, written last; a document is <s> ids </s>
  checkpoint    one dict: model config optim scaler format kind step samples best_val rng args
                tokenizer ema gauges; whole, unwrapped fp32 weights; optim is a list, a state for
                each optimiser; read with weights_only=True. Adapters are stored alone: lora
                says of which model; grpo adds critic critic_optim reference entropy
  metrics.jsonl one object a line: step tokens time train/* val/* moe/* perf/* gpu/* cost/*
  rows          .jsonl .json .parquet. sft: messages, or prompt response, or instruction input
                output; dpo: prompt chosen rejected; reward: those, or label; grpo: prompt answer

Exit codes: 0 done; 2 your mistake, told as `error:` and `fix:`; 1 a bug, with its traceback;
128 + signal after a signal, when the step was finished and saved.
"""

import argparse
import ast
import bisect
import bz2
import contextlib
import ctypes
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
import operator
import os
import pickle
import random
import re
import runpy
import shlex
import shutil
import signal
import struct
import sys
import sysconfig
import tempfile
import threading
import time
import typing
import warnings
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as TooLong
from concurrent.futures.process import BrokenProcessPool
from dataclasses import Field, asdict, dataclass, field, fields, make_dataclass, replace
from datetime import timedelta
from fractions import Fraction
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
# Ground: constants, errors a user can act on, safe files, worker processes, progress
# ==================================================================================================

PROGRAM = "standalone_transformer_lm.py"

DATA_FORMAT = 1  # of meta.json; raised when an older reader would misread the folder

CHECKPOINT_FORMAT = 1

IGNORE = -100  # a target that is no target, torch's own convention

OTHER_RANKS_WAIT_S = 2.0  # before they tell an error that rank 0 has told and ended the job for

LINE_EVERY_S = 10.0  # between two progress lines when stderr is no terminal

FAULTS_SHOWN = 5  # bad rows named in full; all are counted

LONE_SURROGATE = re.compile("[\ud800-\udfff]")

DISK_FAULTS = {  # that the user can mend, and how; the system says what is wrong
    errno.EFBIG: "raise `ulimit -f`",
    errno.EIO: "check the disk",
    errno.EISDIR: "name a file in it",
    errno.ENAMETOOLONG: "name a shorter path",
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, or name a folder elsewhere"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "name a folder you may write"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EEXIST), "check the path"),
}


class UserError(Exception):
    """A mistake the user can mend: what is wrong, how to fix it, and `more` such pairs."""

    def __init__(self, what: str, fix: str, *more: tuple[str, str]):
        super().__init__(what, fix, *more)  # so that it crosses process borders whole
        self.faults = [(what, fix), *more]

    def __str__(self) -> str:
        return "\n".join(f"error: {what}\nfix: {fix}" for what, fix in self.faults)


def disk_error(fault: OSError, path: str | Path = "") -> UserError | None:
    """The sentence for an OSError of the user's disk or path, or None where it is a bug."""
    if fault.errno not in DISK_FAULTS:
        return None
    what = f"{fault.filename or path or 'the disk'}: {os.strerror(fault.errno).lower()}"
    return UserError(what, DISK_FAULTS[fault.errno])


def raise_all(faults: list[tuple[str, str]]) -> None:
    if faults:
        raise UserError(*faults[0], *faults[1:])


def refuse(wrong: bool, what: str) -> None:
    if wrong:
        raise ValueError(what)


def need(module: str, package: str = ""):
    """A module of an optional package; raises UserError that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as fault:
        name = package or module.partition(".")[0]
        raise UserError(f"this needs the package {name}", f"pip install {name}") from fault


def fsync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut; a no-op where folders cannot be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "wb"):
    """Open `path` for writing so that it holds, at every moment, its old or its new content: the
    bytes go to a hidden neighbour, are fsynced and renamed; a failure removes the neighbour."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as fault:
        fault.filename = fault.filename or str(path)  # a failed write does not know its file
        raise
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def read_json(path: Path) -> dict:
    """A JSON object from a file; raises UserError where it is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
        return value
    except ValueError as fault:  # of the JSON or of its UTF-8
        raise UserError(f"{path} is not valid JSON ({fault})", "make the folder anew") from fault


def plain_value(value: object) -> object:
    """What JSON lacks, as numbers or text: numpy's numbers, bytes, dates, decimals."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(value)


def json_line(row: dict) -> str:
    """A row as a line of a .jsonl file, whatever a data set put into it; never an error."""
    line = json.dumps(row, ensure_ascii=False, default=plain_value)
    if LONE_SURROGATE.search(line):  # UTF-8 cannot hold it, JSON's escape can
        line = json.dumps(row, default=plain_value)
    return line + "\n"


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    with atomic_write(path, "w") as file:
        file.writelines(json_line(row) for row in rows)


def check_writable(path: Path) -> None:
    """OSError where a file cannot be written there: before hours of work, not after."""
    with atomic_write(path.with_name(f".{path.name}.probe")):
        pass
    path.with_name(f".{path.name}.probe").unlink()


def save_array(path: Path, array: np.ndarray) -> None:
    with atomic_write(path) as file:
        np.save(file, array)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def short(number: float) -> str:
    """12345678 -> '12.3M'."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """3725.0 -> '1h02m'."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(int(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def either(options: Iterable) -> str:
    return " or ".join(map(str, options))


def printable(text: str, stream: typing.TextIO) -> str:
    """The text as this stream can show it: what its encoding lacks becomes an escape."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say(*lines: str) -> None:
    """Print for the person: on stdout, at once, and on rank 0 alone. Nothing that happens to the
    terminal ends a run: where nobody reads on, later lines go nowhere."""
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        print(printable("\n".join(lines), sys.stdout), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say_aside(line: str) -> None:
    """Print a line of progress on stderr, where somebody reads it."""
    with contextlib.suppress(BrokenPipeError):
        print(printable(line, sys.stderr), file=sys.stderr, flush=True)


class Progress:
    """How far something is: a tqdm bar on a terminal, a plain line every few seconds elsewhere, and
    nothing from a process that does not talk. The total is None where it is unknown."""

    def __init__(
        self, what: str, total: float | None, unit: str, start: float = 0, talks: bool = True
    ):
        self.what, self.total, self.unit, self.done, self.start = what, total, unit, start, start
        self.began, self.last_line, self.talks, self.bar = None, time.monotonic(), talks, None
        if talks and sys.stderr.isatty():
            self.bar = tqdm(
                total=total,
                initial=start,
                desc=what,
                unit=unit,
                unit_scale=True,
                dynamic_ncols=True,
                smoothing=0.1,
            )

    def update(self, done: float, note: str = "") -> None:
        """`done` units of the total are finished; `note` stands behind the figures."""
        if self.began is None:  # what comes first warms up, and would spoil the estimate
            self.began, self.start = time.monotonic(), done
        self.done = done
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(done - self.bar.n)
        elif self.talks and time.monotonic() - self.last_line >= LINE_EVERY_S:
            self.last_line = time.monotonic()
            say_aside(self.line(note))

    def line(self, note: str = "") -> str:
        share = f" of {short(self.total)} ({self.done / self.total:.0%})" if self.total else ""
        eta = f", {duration(self.eta())} left" if self.total and self.done < self.total else ""
        return f"{self.what}: {short(self.done)}{share} {self.unit}{eta}{'  ' * bool(note)}{note}"

    def eta(self) -> float:
        """Seconds left at the mean speed so far; infinity before that is known."""
        if self.done <= self.start:
            return math.inf
        return (self.total - self.done) / (self.done - self.start) * (time.monotonic() - self.began)

    def close(self, note: str = "") -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.talks and note:
            say_aside(self.line(note))


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


def serve_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and end when it does, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def worker_pool(workers: int, start: str = "") -> Iterator[ProcessPoolExecutor]:
    """Processes that end with the block: at once where it fails, when done where it does not."""
    context = multiprocessing.get_context(start or ("fork" if sys.platform == "linux" else "spawn"))
    pool, done = ProcessPoolExecutor(workers, context, serve_parent), False
    try:
        yield pool
        done = True
    except BrokenProcessPool as fault:
        raise UserError(
            "a worker was killed, most likely because memory ran out",
            "use fewer --workers, or a smaller --sample_mb",
        ) from fault
    finally:
        for child in () if done else multiprocessing.active_children():
            child.terminate()
        pool.shutdown(cancel_futures=True)


# ==================================================================================================
# Flags: dataclass fields become flags, @FILE and args.txt; no flag is known by name
# ==================================================================================================

FILE_COMMENT = re.compile(r"""(?:^|(?<=\s))#.*$|('[^']*'|"(?:\\.|[^"\\])*"|\\.)""")

NOT_REPEATED = ("preset", "resume", "profile")  # written out; and said of one start alone

SWITCH = {
    "1": True,
    "true": True,
    "yes": True,
    "on": True,
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}

KINDS = {  # type of a flag -> its value in the help, what it is called, how argparse takes it
    bool: ("0|1", "1 or 0", {"nargs": "?", "const": "1"}),
    int: ("N", "a whole number", {}),
    float: ("X", "a number", {}),
    str: ("TEXT", "text", {}),
    tuple[str, ...]: ("PATH", "paths", {"nargs": "+", "action": "extend"}),
}


def setting(
    default,
    help: str,
    *,
    choices: Iterable = (),
    expands: dict[str, dict] | None = None,
    least: float | None = None,
    below: float | None = None,
    positional: bool = False,
    flag: bool = True,
):
    """A dataclass field that is also a flag, unless `flag` is off, or a `positional` argument.

    A value is the default or one of the `choices`; a number is at `least` 0 and stays `below`.
    What a value `expands` to are values of other fields, which their own flags override.
    """
    if least is None and type(default) in (int, float):
        least = 0
    metadata = {
        "help": help,
        "choices": tuple(choices or expands or ()),
        "expands": expands or {},
        "least": least,
        "below": below,
        "positional": positional,
        "flag": flag,
    }
    return field(default=default, metadata=metadata)


def with_defaults(kind: type, *hidden: str, **defaults) -> type:
    """The same settings with other defaults; the hidden ones are no flags."""
    made = [
        (
            f.name,
            f.type,
            field(
                default=defaults.get(f.name, f.default),
                metadata={**f.metadata, "flag": f.metadata["flag"] and f.name not in hidden},
            ),
        )
        for f in fields(kind)
    ]
    return make_dataclass(kind.__name__, made, bases=(kind,), namespace={"__doc__": kind.__doc__})


def flags(*groups) -> list[Field]:
    return [f for group in groups for f in fields(group) if f.metadata["flag"]]


def field_faults(settings) -> Iterator[tuple[str, str]]:
    for f in flags(settings):
        value, meta = getattr(settings, f.name), f.metadata
        if meta["choices"] and value not in (f.default, *meta["choices"]):
            near = difflib.get_close_matches(value, meta["choices"], 1)
            hint = f"did you mean {near[0]}? " if near else ""
            yield f"--{f.name} {value} is not known", f"{hint}choose {either(meta['choices'])}"
        if meta["least"] is not None and value < meta["least"]:
            yield f"--{f.name} {value} is too small", f"use at least {meta['least']}"
        if meta["below"] is not None and value >= meta["below"]:
            yield f"--{f.name} {value} is too large", f"stay below {meta['below']}"


def check(*groups) -> list[tuple[str, str]]:
    return [
        fault
        for settings in groups
        for fault in (*field_faults(settings), *getattr(settings, "faults", tuple)())
    ]


class FlagParser(argparse.ArgumentParser):
    """argparse with flags read from @FILE, a line each, and errors as UserError."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """The words of a line; # begins a comment where a word could begin."""
        line = arg_line.removeprefix("\ufeff")  # a byte-order mark
        return shlex.split(re.sub(FILE_COMMENT, lambda m: m[1] or "", line))

    def error(self, message: str):
        raise UserError(message, f"see {self.prog} --help")


def flag_help(f: Field) -> str:
    choices = ": " * bool(f.metadata["choices"]) + " | ".join(f.metadata["choices"])
    default = "none" if f.default in ("", ()) else f.default
    return f"{f.metadata['help']}{choices} (default: {default})".replace("%", "%%")


def make_parser(command: str, about: str, example: str, groups: tuple[type, ...]) -> FlagParser:
    """One command's parser: a group of flags a dataclass, a flag a field."""
    parser = FlagParser(
        prog=f"{PROGRAM} {command}",
        description=about,
        epilog=f"example:\n  {example}",
        fromfile_prefix_chars="@",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for group in groups:
        topic = parser.add_argument_group(group.__doc__.rstrip("."))
        for f in flags(group):
            if f.metadata["positional"]:
                topic.add_argument(f.name, nargs="?", metavar="PATH", help=flag_help(f))
            else:
                metavar, _, arity = KINDS[f.type]
                topic.add_argument(
                    f"--{f.name}",
                    help=flag_help(f),
                    **arity,
                    metavar="NAME" if f.metadata["choices"] else metavar,
                )
    return parser


def settings_of(command: Callable) -> tuple[type, ...]:
    return tuple(kind for name, kind in typing.get_type_hints(command).items() if name != "return")


def unknown_flags(unknown: list[str], groups: tuple[type, ...]) -> Iterator[tuple[str, str]]:
    names = [f"--{f.name}" for f in flags(*groups)]
    for place, word in enumerate(unknown):
        near = difflib.get_close_matches(word.split("=")[0], names, 1)
        hint = f"did you mean {near[0]}?" if near else "see --help; text with spaces wants quotes"
        if word.startswith("--") or place == 0:  # what follows an unknown flag is its value
            yield f"{word} is not known here", hint


def joined_values(argv: list[str], groups: tuple[type, ...]) -> list[str]:
    """--flag VALUE as --flag=VALUE where the value begins with - or @, which argparse misreads."""
    single = [f"--{f.name}" for f in flags(*groups) if f.type in (int, float, str)]
    words: list[str] = []
    for word in argv:
        if words and words[-1] in single and re.match("-(?!-|h$)|@", word):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def parse_value(kind: type, given: str | list[str]):
    """What argparse gave as a value of a field's type; KeyError or ValueError where it is none."""
    given = "--" if given == [] else given  # argparse drops this value
    if kind not in (bool, int, float):
        return tuple(given) if isinstance(given, list) else given
    if kind is bool:
        return SWITCH[given.lower()]
    value = float(given)  # 1e6 is a whole number too
    if not math.isfinite(value) or (kind is int and value % 1):
        raise ValueError(given)
    return kind(given if re.fullmatch(r"[+-]?[\d_]+", given) else value)  # a float is less exact


def read_flags(parser: FlagParser, groups: tuple[type, ...], argv: list[str]) -> list:
    """Settings of a command line: defaults, then presets, then flags; UserError has all faults."""
    for word in argv:
        if LONE_SURROGATE.search(word):
            raise UserError(
                f"the argument {ascii(word)} is not UTF-8",
                "set the terminal's encoding to UTF-8, or rename the file",
            )
    try:
        known, unknown = parser.parse_known_args(joined_values(argv, groups))
    except ValueError as fault:  # it is not UTF-8, or a quote is open
        raise UserError(
            f"a file of flags cannot be read: {fault}",
            "write a flag a line, as in the args.txt of a run",
        ) from fault
    given, found = vars(known), [*unknown_flags(unknown, groups)]
    values: dict[str, object] = {}
    for f in flags(*groups):
        if f.name in given and f.metadata["expands"]:
            values |= f.metadata["expands"].get(given[f.name], {})
    for f in flags(*groups):
        if f.name in given:
            try:
                values[f.name] = parse_value(f.type, given[f.name])
            except (KeyError, ValueError):
                noun = KINDS[f.type][1]
                found.append((f"--{f.name} {given[f.name]} is not {noun}", f"give {noun}"))
    made = [
        group(**{f.name: values[f.name] for f in fields(group) if f.name in values})
        for group in groups
    ]
    raise_all(found + check(*made))
    return made


def read_command(command: Callable, argv: list[str], about: str = "", example: str = "") -> list:
    groups, name = settings_of(command), command.__name__.removeprefix("cmd_")
    return read_flags(make_parser(name, about, example, groups), groups, argv)


def settings_text(*groups) -> str:
    """The settings as lines that @FILE reads back; what a preset gave is spelled out."""
    lines = []
    for settings in groups:
        lines.append(f"# {type(settings).__doc__}")
        for f in flags(settings):
            value = getattr(settings, f.name)
            value = int(value) if isinstance(value, bool) else value
            # one word where it can be, so that a value may begin with - or @
            words = [f"--{f.name}", *value] if isinstance(value, tuple) else [f"--{f.name}={value}"]
            if f.name not in NOT_REPEATED and value not in ("", ()):
                lines.append(shlex.join(words))
    return "\n".join(lines) + "\n"


def settings_dict(*groups) -> dict:
    return {k: v for settings in groups for k, v in asdict(settings).items()}


# ==================================================================================================
# Settings: every setting once: name, type, default, help, choices and what it expands to
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
    "smollm-600m": {
        "n_layer": 24,
        "d_model": 1536,
        "n_head": 12,
        "n_kv_head": 4,
        "nope_every": 4,
        "ffn_hidden": 4096,
        "seq_len": 2048,
        "vocab_size": 32000,
        "embed_scale": True,
        "trunc_init": True,
        "optimizer": "muon",
        "schedule": "wsd",
    },
    "modern-253m": {
        "n_layer": 16,
        "d_model": 1024,
        "n_head": 16,
        "ffn_hidden": 3120,
        "n_sink": 4,
        "seq_len": 2048,
        "vocab_size": 32000,
    },
}

PART = re.compile(r"([\w-]+)=(.+):(\d*\.?\d+)")  # of a mixture


@dataclass
class PrepSettings:
    """Input, tokenizer and output of prep."""

    text_path: tuple[str, ...] = setting((), "text, .jsonl or .parquet, packed or not; - is stdin")
    out_dir: str = setting("", "folder to write: tokenizer.model, train.bin, val.bin, meta.json")
    vocab_size: int = setting(32000, "size of the tokenizer to train", least=280, below=1 << 24)
    val_split: float = setting(0.01, "share of documents held out for validation", below=1.0)
    document: str = setting("line", "a document is one", choices=("line", "blank", "file", "jsonl"))
    text_key: str = setting("text", "key of the text in .jsonl and .parquet rows")
    errors: str = setting("strict", "bad UTF-8: stop or put U+FFFD", choices=("strict", "replace"))
    spm: str = setting("", "use this SentencePiece model instead of training one")
    sample_mb: float = setting(100.0, "MB the tokenizer is trained on, picked by hash", least=0.01)
    character_coverage: float = setting(
        0.9999,
        "share of the text's characters with a piece of their own; others become bytes",
        least=0.98,
        below=1.0,
    )
    workers: int = setting(0, "encoding processes; 0 means one a core")
    shard: str = setting("", "do part i of n, as i/n counted from 0; --merge joins the parts")
    merge: bool = setting(False, "join the shards found in --out_dir")
    overwrite: bool = setting(False, "replace the data that --out_dir holds")

    def faults(self) -> Iterator[tuple[str, str]]:
        if not self.out_dir:
            yield "--out_dir is missing", "name the folder to write, --out_dir data"
        if not self.text_path and not self.merge:
            yield "--text_path is missing", "name your text, --text_path docs.txt"
        if self.shard and not (re.fullmatch(r"\d+/\d+", self.shard) and operator.lt(*self.part())):
            yield f"--shard {self.shard} is not one of 0/n to (n-1)/n", "the first of four is 0/4"
        if self.shard and not self.spm:
            yield "--shard needs --spm", "prep a sample, and give its tokenizer.model to all parts"

    def part(self) -> tuple[int, int]:
        return tuple(map(int, self.shard.split("/"))) if self.shard else (0, 1)


def mixture(words: Iterable[str]) -> list[tuple[str, str, float]]:
    """(name, path, weight) of each NAME=PATH:WEIGHT; the weights sum to 1."""
    parts = [PART.fullmatch(word).groups() for word in words]
    total = sum(float(weight) for *_, weight in parts)
    return [(name, path, float(weight) / total) for name, path, weight in parts]


def mixture_faults(flag: str, kind: str, words: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Of words that are a mixture as soon as one of them has a name."""
    for place, word in enumerate(words if any("=" in word for word in words) else ()):
        part = PART.fullmatch(word)
        if not part or not float(part[3]):
            yield (
                f"--{flag}: {word} is not NAME={kind}:WEIGHT with a weight above 0",
                "write each part like web=data/web:0.9",
            )
        elif any(other.startswith(f"{part[1]}=") for other in words[:place]):
            yield f"--{flag} names {part[1]} twice", "give each part a name of its own"


@dataclass
class DataSettings:
    """Data to train on."""

    data_dir: str = setting("data", "folder that prep wrote, or a mixture, NAME=FOLDER:WEIGHT,…")

    def domains(self) -> list[tuple[str, str, float]]:
        """(name, folder, weight) of each part; weights sum to 1; one folder alone has no name."""
        words = self.data_dir.split(",")
        return mixture(words) if "=" in self.data_dir else [("", self.data_dir, 1.0)]

    def faults(self) -> Iterator[tuple[str, str]]:
        return mixture_faults("data_dir", "FOLDER", self.data_dir.split(","))


@dataclass
class DeviceSettings:
    """Device and numbers."""

    seed: int = setting(1337, "seed of every random draw")
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = setting(
        "auto",
        "of the matmuls; auto is bf16 where the hardware has it",
        choices=("auto", "bf16", "fp16", "fp32"),
    )
    threads: int = setting(0, "CPU threads; 0 shares the cores among the processes")
    flash: str = setting("", "SDPA's flash kernel on CUDA, by its package", choices=("FA3", "FA4"))


@dataclass
class StepSettings:
    """Size and price of a step."""

    preset: str = setting("", "a published size by name", expands=PRESETS)
    batch_size: int = setting(8, "sequences in a micro-batch of one device", least=1)
    grad_accum_steps: int = setting(1, "micro-batches a step", least=1)
    grad_checkpoint: bool = setting(False, "recompute layers in the backward pass: far less memory")
    usd_per_hour: float = setting(0.0, "price of the machine; shows the money spent")


@dataclass
class RunSettings(StepSettings):
    """The run."""

    out_dir: str = setting("runs/lm", "folder of checkpoints and metrics; the same one resumes")
    resume: bool = setting(True, "go on from ckpt_last.pt; 0 refuses to touch an existing run")
    compile: str = setting("auto", "torch.compile; auto: in long runs", choices=("auto", "0", "1"))
    max_steps: int = setting(1000, "optimiser steps in all; 0 means --epochs, in train one epoch")
    log_interval: int = setting(10, "steps between lines of metrics.jsonl", least=1)
    eval_interval: int = setting(250, "steps between evaluations", least=1)
    eval_tokens: int = setting(2_000_000, "most validation tokens an evaluation reads", least=1)
    ckpt_interval: int = setting(250, "steps between checkpoints", least=1)
    keep_last: int = setting(2, "numbered checkpoints kept", least=1)
    wandb: str = setting("", "Weights & Biases project to log to")
    tensorboard: bool = setting(False, "write TensorBoard events to OUT/tensorboard")
    profile: int = setting(0, "steps to profile: OUT/profile.json.gz, and the dearest operations")


@dataclass
class OptimSettings:
    """Optimiser and schedule."""

    lr: float = setting(6e-4, "peak learning rate")
    min_lr: float = setting(0.1, "where cosine and wsd end, as a share of --lr")
    optimizer: str = setting("muon", "muon takes hidden matrices alone", choices=("adamw", "muon"))
    schedule: str = setting(
        "wsd",
        "learning rate after the warm-up; wsd holds it, then decays",
        choices=("cosine", "wsd", "wsd_sqrt", "constant", "inverse_sqrt"),
    )
    warmup_steps: int = setting(100, "steps of linear warm-up")
    decay_share: float = setting(0.2, "share of --max_steps that wsd decays over", below=1.0)
    weight_decay: float = setting(0.1, "on matrices; never on norms and embeddings")
    beta1: float = setting(0.9, "AdamW's first moment", below=1.0)
    beta2: float = setting(0.95, "AdamW's second moment", below=1.0)
    grad_clip: float = setting(1.0, "largest gradient norm; 0 never clips")
    z_loss: float = setting(0.0, "weight of log(Z)^2, which keeps the logits small")
    muon_lr: float = setting(0.0, "Muon's peak learning rate; 0 means --lr")
    muon_scale: str = setting("rms", "update size: AdamW's, or by shape", choices=("rms", "shape"))
    muon_momentum: float = setting(0.95, "Muon's momentum", below=1.0)
    muon_warmup: int = setting(300, "steps over which the momentum rises from 0.85")
    ema: float = setting(0.0, "decay of averaged weights to judge and export; 0 is off", below=1.0)


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@dataclass
class ModelSettings:
    """Architecture."""

    seq_len: int = setting(512, "context length in tokens", least=2)
    n_layer: int = setting(12, "layers", least=1)
    d_model: int = setting(768, "width of the residual stream", least=2)
    n_head: int = setting(12, "query heads", least=1)
    n_kv_head: int = setting(0, "key/value heads; 0 means as many as query heads")
    head_dim: int = setting(0, "head size; 0 means d_model / n_head")
    ffn_mult: float = setting(4.0, "feed-forward width over d_model", least=0.01)
    ffn_hidden: int = setting(0, "feed-forward width, instead of --ffn_mult")
    dropout: float = setting(0.0, "dropout, attention included", below=1.0)
    tie: bool = setting(True, "the output head shares the embedding")
    rope_theta: float = setting(10000.0, "base of the rotary frequencies", least=1.0)
    norm_eps: float = setting(1e-6, "epsilon of RMSNorm")
    qk_norm: bool = setting(False, "RMSNorm on queries and keys, a head at a time")
    nope_every: int = setting(0, "every n-th layer has no rotary positions; 0 is off")
    window: int = setting(0, "attention reaches this many tokens back; 0 is no limit")
    full_every: int = setting(0, "with --window, every n-th layer attends without limit")
    n_sink: int = setting(0, "learned tokens before the text that every query may see")
    doc_mask: bool = setting(False, "packed documents do not see each other")
    n_expert: int = setting(0, "experts of a mixture in place of each feed-forward; 0 is off")
    n_expert_active: int = setting(2, "experts that each token goes through", least=1)
    balance_loss: float = setting(0.01, "weight of the experts' load-balance loss")
    router_z_loss: float = setting(0.001, "weight of the routers' z-loss")
    softcap: float = setting(0.0, "logits are bent to stay within this; 0 is off")
    embed_scale: bool = setting(False, "embeddings enter times sqrt(d_model)")
    trunc_init: bool = setting(False, "truncated-normal weights, std 0.5/sqrt(d_model)")
    rope_scaling: str = setting("none", "stretch the context", choices=("none", "linear", "yarn"))
    rope_factor: float = setting(1.0, "how far rotary positions are stretched", least=1.0)
    rope_original: int = setting(0, "context before stretching; 0 means seq_len / rope_factor")
    vocab_size: int = setting(0, "token ids, read off the tokenizer", flag=False)
    bos_id: int = setting(1, "id of <s>, read off the tokenizer", flag=False)
    scalar_head: bool = setting(False, "a head that scores, beside the one that speaks", flag=False)
    rope_layout: str = setting("half", "pairing of rotary dimensions", flag=False)

    def windowed(self, layer: int) -> bool:
        return bool(self.window) and not (self.full_every and (layer + 1) % self.full_every == 0)

    def rotates(self, layer: int) -> bool:
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
        width, heads = self.d_model, self.n_head
        if heads < 1 or width < 2:  # told as too small
            return
        if not self.head_dim and width % (2 * heads):
            fit = [n for n in divisors(width) if width % (2 * n) == 0]
            near = sorted(sorted(fit, key=lambda n: abs(n - heads))[:2])
            choice = f"--n_head {either(near)}, or " if near else ""
            below = width - width % (2 * heads)
            widths = either(n for n in (below, below + 2 * heads) if n)
            yield (
                f"--n_head {heads} does not divide --d_model {width} into heads of even size",
                f"use {choice}--d_model {widths}, or name --head_dim",
            )
        elif self.head_dim % 2:
            yield f"--head_dim {self.head_dim} is odd", f"use --head_dim {self.head_dim + 1}"
        if heads % self.kv_heads:
            yield (
                f"--n_kv_head {self.n_kv_head} does not divide --n_head {heads}",
                f"use {either(divisors(heads))}",
            )
        if self.hidden < 1:
            yield f"--ffn_mult {self.ffn_mult} leaves the feed-forward no width", "use a larger one"
        if self.full_every and not self.window:
            yield "--full_every needs --window", "give both, or neither"
        if self.n_expert and self.n_expert_active > self.n_expert:
            yield f"--n_expert_active is more than --n_expert {self.n_expert}", "use fewer"


@dataclass
class TuneSettings:
    """Where to start and what to learn from."""

    ckpt: str = setting("", "checkpoint to start from, or the folder of a run")
    spm: str = setting("", "tokenizer, for a checkpoint that carries none")
    data: tuple[str, ...] = setting((), "files of rows, .jsonl .json .parquet, or NAME=FILE:WEIGHT")
    val_data: tuple[str, ...] = setting((), "files of validation rows, in place of --val_split")
    val_split: float = setting(0.05, "share of rows to validate on, by first question", below=1.0)
    on_bad_row: str = setting("error", "what to do about wrong rows", choices=("error", "skip"))
    epochs: float = setting(1.0, "times through the data, where --max_steps is 0")
    seq_len: int = setting(0, "context length in tokens; 0 means the checkpoint's")
    dropout: float = setting(0.0, "dropout, attention included", below=1.0)

    def domains(self) -> list[tuple[str, tuple[str, ...], float]]:
        """(name, files, weight) of each part; weights sum to 1; files without one are one part."""
        if not any("=" in path for path in self.data):
            return [("", self.data, 1.0)]
        return [(name, (path,), weight) for name, path, weight in mixture(self.data)]

    def faults(self) -> Iterator[tuple[str, str]]:
        if not self.ckpt:
            yield "--ckpt is missing", "name the checkpoint to start from, --ckpt runs/lm"
        yield from mixture_faults("data", "FILE", self.data)


@dataclass
class SftSettings:
    """Conversations."""

    pack: bool = setting(True, "several conversations in a sequence, each blind to the others")
    samples: int = setting(3, "questions answered at each evaluation, for the eye")
    sample_tokens: int = setting(64, "most tokens of such an answer", least=1)


@dataclass
class DpoSettings:
    """Preference loss."""

    loss: str = setting(
        "sigmoid",
        "simpo and orpo need no reference model",
        choices=("sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down", "simpo", "orpo"),
    )
    beta: float = setting(0.1, "closeness to the reference; simpo wants about 2", least=1e-6)
    label_smoothing: float = setting(0.0, "share of pairs the wrong way round", below=0.5)
    simpo_gamma: float = setting(0.5, "margin that simpo asks for")


@dataclass
class LoraSettings:
    """Low-rank adapters."""

    lora_rank: int = setting(0, "rank of adapters trained in place of the weights; 0 trains all")
    lora_alpha: float = setting(0.0, "adapters count times alpha / rank; 0 means twice the rank")
    lora_dropout: float = setting(0.0, "dropout before the adapters", below=1.0)
    lora_targets: str = setting("qkv,proj,w1,w2,w3", "matrices that get one, by name")
    lora_merge: bool = setting(False, "also write OUT/merged.pt, a checkpoint that stands alone")

    @property
    def scale(self) -> float:
        return (self.lora_alpha or 2.0 * self.lora_rank) / max(1, self.lora_rank)

    def faults(self) -> Iterator[tuple[str, str]]:
        for name in sorted({*self.lora_targets.split(",")} - {"qkv", "proj", "w1", "w2", "w3"}):
            yield f"--lora_targets {name} is not known", "choose among qkv,proj,w1,w2,w3"


@dataclass
class RewardSettings:
    """Scoring, in place of training."""

    score: tuple[str, ...] = setting((), "score these rows with the reward model --ckpt")
    out: str = setting("", "file for the scored rows, .jsonl")


@dataclass
class TaskSettings:
    """Rows that are made, in place of --data."""

    task: str = setting("", "kind of rows", choices=("", "add", "countdown", "sort", "copy"))
    difficulty: int = setting(2, "most digits of a sum; numbers or letters of the others", least=1)
    task_rows: int = setting(10_000, "how many, where there are so many different ones", least=2)


ALGORITHMS = {  # name -> values of settings fields; a flag given beside --algo wins
    "grpo": {},
    "dr_grpo": {"advantage": "mean", "normalise": "constant"},
    "dapo": {"clip_high": 0.28, "normalise": "tokens", "dynamic_sampling": True, "overlong": 0.2},
    "gspo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"ratio": "weight", "clip_low": 1.0, "clip_high": 4.0, "normalise": "tokens"},
    "ppo": {"advantage": "gae", "normalise": "tokens", "value_clip": 0.2},
    "vapo": {
        "advantage": "gae",
        "clip_high": 0.28,
        "normalise": "tokens",
        "value_clip": 0.2,
        "lam": 1.0,
        "length_alpha": 0.05,
        "value_warmup": 20,
        "lm_loss": 0.1,
    },
}


@dataclass
class PolicySettings:
    """Policy loss."""

    algo: str = setting("grpo", "values for flags here and of rollouts", expands=ALGORITHMS)
    ratio: str = setting(
        "token",
        "what is clipped: each token's ratio, the sequence's mean one, "
        "or the weight of each log-prob",
        choices=("token", "sequence", "weight"),
    )
    clip_low: float = setting(0.2, "how far the ratio may fall below 1")
    clip_high: float = setting(0.2, "how far it may rise above 1")
    advantage: str = setting(
        "mean_std",
        "reward less its group's mean, over its deviation or not; gae asks a value model",
        choices=("mean_std", "mean", "gae"),
    )
    normalise: str = setting(
        "sequence",
        "a token is one of its completion's, of the step's, or of --max_new_tokens",
        choices=("sequence", "tokens", "constant"),
    )
    updates: int = setting(1, "optimiser steps on each batch of completions", least=1)
    kl: float = setting(0.0, "weight of the divergence from the reference model")
    reference_steps: int = setting(0, "steps until the model is the new reference; 0 is never")
    entropy_target: float = setting(0.0, "nats a token below which a bonus grows; 0 is off")
    lm_loss: float = setting(0.0, "weight of the plain likelihood of right completions")


@dataclass
class ValueSettings:
    """Value model, with --advantage gae."""

    gamma: float = setting(1.0, "discount a token")
    lam: float = setting(0.95, "lambda of the advantages")
    length_alpha: float = setting(0.0, "a: the policy's lambda is 1 - 1/(a length); 0 is off")
    value_lr: float = setting(0.0, "its learning rate; 0 means twice --lr")
    value_clip: float = setting(0.0, "how far a value may move in an update; 0 is off")
    value_warmup: int = setting(0, "first steps that train the value model alone")
    dense_reward: float = setting(0.0, "weight of each token's gain in smoothed value")
    dense_smoothing: float = setting(0.5, "share of a value that the next one keeps", below=1.0)


@dataclass
class RolloutSettings:
    """Completions and rewards."""

    prompts: int = setting(16, "prompts a step, of all devices together", least=1)
    group_size: int = setting(8, "completions of each", least=2)
    max_new_tokens: int = setting(128, "most tokens of a completion", least=1)
    temperature: float = setting(1.0, "of sampling, at the first step", least=1e-3)
    temperature_end: float = setting(0.0, "at the last; 0 means the same")
    rollout_batch: int = setting(256, "completions under way at once on a device", least=1)
    reward: tuple[str, ...] = setting(
        (),
        "number choice exact regex format length countdown FILE.py:FUNCTION or reward model, "
        "each with :WEIGHT or not; the first says what is right; none means --task's, or number",
    )
    pattern: str = setting("", "what regex looks for, in rows without a pattern of their own")
    reward_timeout: float = setting(5.0, "seconds that a FUNCTION may take", least=0.01)
    overlong: float = setting(0.0, "share of the length in which reward falls by 1", below=1.0)
    dynamic_sampling: bool = setting(False, "groups whose rewards are all equal are replaced")
    max_draws: int = setting(8, "most draws of prompts for that, a step", least=1)
    eval_prompts: int = setting(200, "held-out prompts answered at an evaluation", least=1)
    eval_samples: int = setting(4, "completions of each there: the k of pass@k", least=1)
    samples: int = setting(2, "completions a step to keep, and to show at an evaluation")


@dataclass
class SamplingSettings:
    """Sampling."""

    max_new_tokens: int = setting(200, "most tokens to generate", least=1)
    temperature: float = setting(0.8, "0 takes the likeliest token")
    top_k: int = setting(0, "sample among the k likeliest; 0 is off")
    top_p: float = setting(0.95, "sample among the likeliest that hold this probability; 1 is off")
    repetition_penalty: float = setting(1.0, "divides the logits of seen ids; 1 is off", least=1e-6)
    no_repeat_ngram_size: int = setting(0, "no n-gram of this length twice; 0 is off")


@dataclass
class GenerateSettings:
    """Prompts and output of generate."""

    ckpt: str = setting("", "checkpoint, or the folder of a run")
    spm: str = setting("", "tokenizer, for a checkpoint that carries none")
    prompt: str = setting("", "text to continue")
    prompt_file: str = setting("", "file of prompts, one a line, or .jsonl rows of sft to answer")
    batch_size: int = setting(64, "completions written at once", least=1)
    num_samples: int = setting(1, "continuations of each prompt", least=1)
    stop_at_eos: bool = setting(True, "a continuation ends at </s>")
    chat: bool = setting(False, "the prompt is a question to a chat model")
    system: str = setting("", "with --chat, the instruction before the question")
    best_of: int = setting(1, "completions drawn for one shown, the best by --reward_ckpt", least=1)
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
    vocab: int = setting(0, "ids of the planned model; 0 means the preset's, or 32,000")
    tokens: float = setting(0.0, "tokens to train on; 0 means 20 a parameter")
    gpu: str = setting("", "device to plan for, such as H100, working at --mfu")
    gpus: int = setting(1, "how many of them", least=1)
    mfu: float = setting(0.4, "share of its peak that --gpu reaches", least=0.01, below=1.0)
    tok_per_s: float = setting(0.0, "speed of the whole machine, where you know it")


@dataclass
class DemoSettings:
    """The demo."""

    out_dir: str = setting("demo", "folder of the demo's data and run")
    quick: bool = setting(False, "the same in about a minute, with a worse model")
    max_steps: int = setting(0, "training steps; 0 means as many as a few minutes hold")


BenchSettings = with_defaults(
    InfoSettings,
    "path",
    "grad_accum_steps",
    "grad_checkpoint",
    "gpu",
    "mfu",
    "tok_per_s",
    batch_size=4,
)

TuneRun = with_defaults(
    RunSettings, "preset", out_dir="runs/tuned", max_steps=0, eval_interval=100, ckpt_interval=100
)

TuneOptim = with_defaults(
    OptimSettings,
    "z_loss",
    lr=1e-4,
    optimizer="adamw",
    schedule="cosine",
    warmup_steps=10,
    weight_decay=0.0,
)

DpoOptim = with_defaults(TuneOptim, lr=1e-5)

GrpoOptim = with_defaults(TuneOptim, lr=1e-5, schedule="constant")

GrpoRun = with_defaults(
    TuneRun,
    "log_interval",
    "grad_accum_steps",
    "eval_tokens",
    max_steps=200,
    batch_size=32,
    log_interval=1,
    eval_interval=20,
    ckpt_interval=20,
)

GrpoTune = with_defaults(TuneSettings, "dropout")  # without it the first ratio is exactly 1

# ==================================================================================================
# Machine: device, dtype, seeds, signals, and the collectives of torch.distributed
# ==================================================================================================

PEAK_FLOPS = (  # dense bf16 (fp16 where there is no bf16) FLOP/s by a part of the device's name
    ("B200", 2250e12),
    ("B100", 1750e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H800", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 150e12),
    ("A30", 165e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 6000 Ada", 364e12),
    ("RTX A6000", 155e12),
    ("RTX 5090", 210e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
    ("V100", 125e12),
    ("T4", 65e12),
    ("MI300X", 1307e12),
    ("MI250", 181e12),
)


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
        exact = self.dtype == torch.float32
        return contextlib.nullcontext() if exact else torch.autocast(self.device.type, self.dtype)

    def to_device(self, tensor: Tensor) -> Tensor:
        """A copy on the device that overlaps with computing on CUDA."""
        cuda = self.device.type == "cuda"
        return (tensor.pin_memory() if cuda else tensor).to(self.device, non_blocking=cuda)

    def all_reduce_sum(
        self, *numbers: float, how: dist.ReduceOp = dist.ReduceOp.SUM
    ) -> list[float]:
        """Each number summed over all ranks, or what `how` says; on the CPU: no device waits."""
        found = torch.tensor(numbers, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(found, how)
        return found.tolist()

    def all_reduce_max(self, number: float) -> float:
        return self.all_reduce_sum(number, how=dist.ReduceOp.MAX)[0]

    def broadcast(self, value):
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, work: Callable, *args):
        """What work(*args) gives, done on rank 0 alone, or its failure, on every rank."""
        try:
            result = work(*args) if self.main else None
        except (OSError, UserError) as fault:
            result = fault
        if isinstance(result := self.broadcast(result), (OSError, UserError)):
            raise result
        return result


def bf16_cpu() -> bool:
    """Whether this CPU multiplies bf16 in hardware; where it does not, bf16 is slower than fp32."""
    with contextlib.suppress(OSError):  # not Linux
        words = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
        return not {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}.isdisjoint(words)
    return False


def pick_device(name: str) -> torch.device:
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    here = ["cuda"] * cuda + ["mps"] * mps + ["cpu"]
    name = here[0] if name == "auto" else name
    if name not in here:
        raise UserError(f"--device {name} is not available here", f"use --device {either(here)}")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    if device.type == "cuda":
        modern = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if modern else torch.float16
    return torch.bfloat16 if device.type == "cpu" and bf16_cpu() else torch.float32


def open_machine(settings: DeviceSettings) -> Machine:
    """Choose device and precision, seed, and join the process group where torchrun made one."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(settings.device)
    if settings.flash:
        try:
            torch.nn.attention.activate_flash_attention_impl(settings.flash)
        except (AttributeError, ImportError, RuntimeError, ValueError) as fault:
            raise UserError(
                f"--flash {settings.flash} is not to be had here ({fault})",
                "install its package and a newer torch, or drop it",
            ) from fault
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("highest" if settings.dtype == "fp32" else "high")
    else:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(settings.threads or max(1, cores // local))
        with contextlib.suppress(OSError, AttributeError):  # glibc shall keep freed large blocks:
            mallopt = ctypes.CDLL("libc.so.6").mallopt  # the next step asks for them again
            mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
            mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
            mallopt(-2, 64 << 20)  # M_TOP_PAD
    if world > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
        dist.barrier()  # so that no rank fails and leaves while another still joins
    return Machine(device, pick_dtype(settings.dtype, device), rank, world)


def derive_seed(*key: object) -> int:
    """A seed of torch's, for whatever is named: the same for the same key."""
    return int(hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=7).hexdigest(), 16)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step of one rank, so that a resumed step draws what it would have."""
    torch.manual_seed(derive_seed(seed, step, rank))


def flops_of(name: str) -> float | None:
    less = re.search(r"\b(MIG|Laptop)\b", name, re.I)  # a slice or a slower part of the same name
    known = (flops for part, flops in PEAK_FLOPS if re.search(rf"\b{part}\b", name, re.I))
    return None if less else next(known, None)


def peak_flops(device: torch.device) -> float | None:
    return flops_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


class Signals:
    """Remembers SIGTERM, SIGINT or SIGUSR1 instead of dying of it, but for a second Ctrl-C a second
    or more later; SIGTERM is never taken for impatience, as schedulers send it several times."""

    def __enter__(self) -> "Signals":
        self.received, self.at = 0, 0.0
        self.previous = {
            number: signal.signal(number, self.note)
            for number in signal.Signals
            if number.name in ("SIGTERM", "SIGINT", "SIGUSR1")
        }
        return self

    def note(self, number: int, _frame) -> None:
        now = time.monotonic()
        if self.received and number == signal.SIGINT and now - self.at > 1:
            signal.signal(number, self.previous[number])
            os.kill(os.getpid(), number)
        else:
            self.received, self.at = self.received or number, now

    def __exit__(self, *_fault) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


# ==================================================================================================
# Sharding: one model trained on several devices
# ==================================================================================================


def distribute(module: nn.Module, machine: Machine) -> nn.Module:
    if machine.world == 1:
        return module
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(module, gradient_as_bucket_view=True, **{name: False})


def no_sync(module: nn.Module, last: bool):
    """Hold the averaging of gradients back until the `last` micro-batch of a step."""
    averages = last or not isinstance(module, DistributedDataParallel)
    return contextlib.nullcontext() if averages else module.no_sync()


# ==================================================================================================
# Tokenizers: text to token ids and back
# ==================================================================================================

UNK, BOS, EOS, PAD = 0, 1, 2, 3

ROLES = ("system", "user", "assistant")

TOOL_RESULT, TOOL_CALL = "<|reserved_0|>", "<|reserved_1|>"
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
            raise UserError(
                f"{name} is no SentencePiece model",
                "name a tokenizer.model made by prep or by SentencePiece",
            ) from fault
        self.data, self.sha256, self.vocab_size = data, sha256(data), len(self.sp)
        self.bos, self.eos, self.pad = self.sp.bos_id(), self.sp.eos_id(), self.sp.pad_id()
        if min(self.bos, self.eos) < 0:
            raise UserError(f"{name} has no <s> or no </s>", "use a tokenizer with both")
        roles = {role: self.sp.piece_to_id(f"<|{role}|>") for role in ROLES}
        roles |= {"tool": self.sp.piece_to_id(TOOL_RESULT), "call": self.sp.piece_to_id(TOOL_CALL)}
        self.roles: dict[str, int] = {}
        if all(self.sp.is_control(marker) for marker in roles.values()):
            self.roles = roles

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


class Turn(typing.NamedTuple):
    """What one speaker says: role is system, user, assistant or tool (the result of a call)."""

    role: str
    text: str
    learned: bool = True  # an assistant's turn may be context alone
    calls: tuple[str, ...] = ()  # JSON of the tools that an assistant calls, behind its text


def encode_chat(
    tokenizer: Tokenizer, turns: Iterable[Turn | tuple[str, str]], reply: bool = False
) -> tuple[list[int], list[bool]]:
    """ids of the turns, and which are learned: what the assistant says, its calls and its </s>.

    `reply` opens an answer, or leaves the last turn open where that is the assistant's.
    """
    ids, learned = [tokenizer.bos], [False]
    role = ""
    for turn in turns:
        role, text, wanted, calls = Turn(*turn)
        marker, body = tokenizer.marker(role), tokenizer.encode(text)
        for call in calls:
            body += tokenizer.marker("call") + tokenizer.encode(call)
        body.append(tokenizer.eos)
        ids += marker + body
        learned += [False] * len(marker) + [role == "assistant" and wanted] * len(body)
    if reply and role == "assistant":
        return ids[:-1], learned[:-1]
    if reply:
        ids += tokenizer.marker("assistant")
        learned += [False] * (len(ids) - len(learned))
    return ids, learned


class TextStream:
    """Ids become text as they come, at a cost that does not grow with what was said before.

    Text that ends in the middle of a character waits for its rest. `context` are ids that stand
    before the first one.
    """

    def __init__(self, tokenizer: Tokenizer, context: list[int]):
        self.tokenizer = tokenizer
        self.ids = list(context)
        self.start = 0  # decoding begins here, so that a space is where it belongs
        self.told = len(context)  # ids whose text is out

    def push(self, token: int) -> str:
        """The text that this id completes; empty where a character is still open."""
        self.ids.append(token)
        text = self.waiting()
        if not text or text.endswith("\ufffd"):
            return ""
        self.start = self.told
        self.told = len(self.ids)
        return text

    def waiting(self) -> str:
        """The text of the ids that are not out yet, whole or not."""
        before = self.tokenizer.decode(self.ids[self.start : self.told])
        return self.tokenizer.decode(self.ids[self.start :])[len(before) :]


class Watched:
    """An iterator that keeps the exception it ended with, for callers that hide it."""

    def __init__(self, items: Iterable):
        self.items = iter(items)
        self.fault: Exception | None = None

    def __iter__(self) -> "Watched":
        return self

    def __next__(self):
        try:
            return next(self.items)
        except (UserError, OSError) as fault:
            self.fault = fault
            raise


def tokenizer_fault(vocab_size: int, fault: Exception) -> UserError:
    """The sentence for what SentencePiece refuses, without its source file names."""
    told = (
        re.sub(r"^.*?\.cc\(\d+\)\s*(\[.*?\])?\s*", "", str(fault)).strip()
        or "SentencePiece refused it"
    )
    fix = "give text with words in it, or another size"
    if most := re.search(r"value <= (\d+)", told):
        fix = f"use --vocab_size {most[1]} or less, or give more text"
    elif least := re.search(r"required_chars\. \d+ vs (\d+)", told):
        fix = f"use --vocab_size {least[1]} or more, or a lower --character_coverage"
    return UserError(f"--vocab_size {vocab_size} does not suit this text ({told})", fix)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, character_coverage: float = 0.9999
) -> bytes:
    """A SentencePiece BPE model that spells every string: decode(encode(s)) == s.

    Characters beyond `character_coverage` of the text are spelled in bytes, but the space and the
    line end never are. UserError where the size does not suit the text; a fault of `texts`
    itself comes out as it is.
    """
    lines = Watched(line for text in texts for line in text.split("\n") if line)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            pad_id=PAD,
            control_symbols=list(CONTROL),
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            required_chars=f"{SPACE}\n",
            character_coverage=character_coverage,
            max_sentence_length=1 << 30,
            minloglevel=2,
        )
    except (RuntimeError, ValueError, UserError, OSError) as fault:
        if lines.fault is not None:
            raise lines.fault from None
        if isinstance(fault, OSError):
            raise
        raise tokenizer_fault(vocab_size, fault) from fault
    return model.getvalue()


def splits_at_spaces(sp: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether this model encodes a text word by word, as prep's own do: BPE (whole scores),
    unnormalised, with the dummy prefix, no piece across space or line."""
    pieces = [
        sp.id_to_piece(i)
        for i in range(len(sp))
        if not (sp.is_control(i) or sp.is_byte(i) or sp.is_unknown(i))
    ]
    plain = all(SPACE not in p[1:] and ("\n" not in p or p == "\n") for p in pieces)
    bpe = all(float(sp.get_score(sp.piece_to_id(p))).is_integer() for p in pieces)
    odd = " \uff21\u2460\ufb01e\u0301  \u00a0\t\u3000x "
    return (
        plain
        and bpe
        and {SPACE, "\n"} <= set(pieces)
        and sp.normalize(odd) == SPACE + odd.replace(" ", SPACE)
    )


class WordEncoder(dict):
    """Text -> packed ids as SentencePiece would encode it, word by word: a dictionary from what
    stands between spaces, where a newline opens a key, to packed ids."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype):
        self.sp, self.dtype, self.by_word = tokenizer.sp, dtype, splits_at_spaces(tokenizer.sp)

    def pack(self, ids: list[int]) -> bytes:
        return np.array(ids, dtype=self.dtype).tobytes()

    def __missing__(self, word: str) -> bytes:
        ids = self.sp.encode(word or " ")
        if word[:1] in ("", "\n"):
            ids = ids[1:]  # SentencePiece puts a space before all, here it is one too many
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
# Prep: text in any format becomes token files
# ==================================================================================================

BLOCK = 4 << 20  # bytes read at once; a longer document is still read whole

FILE_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}

BLANK_LINES = re.compile(r"(?:^|\n)(?:[ \t\r]*\n)+")  # part the documents of --document blank

SPLITS = ("train", "val")

COUNTS = ("tokens", "documents", "bytes")  # of each split, in meta.json

DATA_FILES = ("tokenizer.model", "train.bin", "val.bin", "meta.json")

PACKINGS = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    # The package zstandard takes a file that was cut short for a whole one; pyarrow does not.
    ".zst": lambda raw: io.BufferedReader(need("pyarrow").CompressedInputStream(raw, "zstd")),
}


@dataclass(frozen=True)
class Source:  # one input file
    path: Path
    kind: str  # how documents are found in it: line, blank, file, jsonl or parquet
    shown: str  # its name in messages
    size: int


@dataclass(frozen=True)
class TextBlock:
    """Whole documents, as raw bytes of one source, or as rows where the packing gives rows."""

    source: Source
    line: int  # of the source at which the block begins, from 1
    data: bytes | list
    read: int  # bytes of the input read up to the block's end


def find_sources(paths: Iterable[str], document: str, flag: str = "--text_path") -> list[Source]:
    """The visible files that paths, folders and globs name."""
    found, faults = [], []
    for path in paths:
        files = set()
        for match in map(Path, [path] if os.path.exists(path) else glob.glob(path, recursive=True)):
            inside = {
                file
                for file in match.rglob("*")
                if file.is_file() and "/." not in f"/{file.relative_to(match).as_posix()}"
            }
            files |= inside if match.is_dir() else {match}
        if not files:
            faults.append((f"{flag} {path} does not exist or holds no file", "name one that does"))
        for file in sorted(files):
            inner = file.with_suffix("") if file.suffix.lower() in PACKINGS else file
            kind = FILE_KINDS.get(inner.suffix.lower(), document)
            found.append(Source(file, kind, str(file), file.stat().st_size))
    raise_all(faults)
    return found


def damaged(source: Source, where: str, fault: Exception) -> Exception:
    if getattr(fault, "errno", None):  # bz2 and pyarrow raise OSErrors without one
        return fault
    return UserError(f"{source.shown} is damaged after {where} ({fault})", "fetch or pack it again")


def read_parquet(source: Source, text_key: str) -> Iterator[TextBlock]:
    parquet, arrow, rows = need("pyarrow.parquet"), need("pyarrow"), 0
    try:
        table = parquet.ParquetFile(source.path)
        types = {column.name: str(column.type) for column in table.schema_arrow}
        if types.get(text_key) not in ("string", "large_string", "string_view"):
            raise UserError(
                f"{source.path} has no column {text_key} of strings",
                f"name one with --text_key; there are {', '.join(types)}",
            )
        for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
            first, rows = rows + 1, rows + len(batch)
            read = source.size * rows // max(1, table.metadata.num_rows)
            yield TextBlock(source, first, batch.column(0).to_pylist(), read)
    except (arrow.ArrowException, OSError) as fault:
        raise damaged(source, f"row {rows}", fault) from fault


def rest_of_document(file: typing.BinaryIO, data: bytes, kind: str) -> bytes:
    """The bytes from where `data` was cut off to the end of its last document."""
    rest = [] if data.endswith(b"\n") else [file.readline()]
    while kind == "blank" and (line := file.readline()):
        rest.append(line)
        if not line.strip(b" \t\r\n"):
            break
    return b"".join(rest)


def read_blocks(source: Source, text_key: str) -> Iterator[TextBlock]:
    """A source's documents, cut at document boundaries into blocks of about BLOCK bytes."""
    if source.kind == "parquet":
        yield from read_parquet(source, text_key)
        return
    line, suffix = 1, source.path.suffix.lower()
    with open(source.path, "rb") as raw:
        try:
            file = PACKINGS[suffix](raw) if suffix in PACKINGS else raw
            while data := file.read(-1 if source.kind == "file" else BLOCK):
                data += rest_of_document(file, data, source.kind)
                start = 3 if line == 1 and data.startswith(b"\xef\xbb\xbf") else 0
                yield TextBlock(source, line, data[start:], raw.tell())
                line += data.count(b"\n")
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as fault:
            raise damaged(source, f"line {line}", fault) from fault


def decode_block(block: TextBlock, errors: str) -> str:
    try:
        return block.data.decode("utf-8", errors)
    except UnicodeDecodeError as fault:
        if block.data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(
                f"{block.source.shown} is UTF-16 text",
                "convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW",
            ) from fault
        line = block.line + block.data.count(b"\n", 0, fault.start)
        raise UserError(
            f"{block.source.shown}, line {line}: invalid UTF-8 ({fault.reason})",
            "mend the file, or in prep use --errors replace",
        ) from fault


def numbered_lines(block: TextBlock, errors: str = "strict") -> Iterator[tuple[int, str]]:
    lines = enumerate(decode_block(block, errors).split("\n"), block.line)
    return ((number, line) for number, line in lines if line.strip())


def json_object(row: object) -> dict:
    """A row, parsed where it is still text; ValueError says what is wrong with it."""
    try:
        row = json.loads(row) if isinstance(row, str) else row
    except (ValueError, RecursionError) as fault:
        raise ValueError(f"not JSON ({fault})") from fault
    refuse(not isinstance(row, dict), "no JSON object")
    return row


def jsonl_texts(block: TextBlock, text_key: str, errors: str) -> Iterator[str]:
    for number, line in numbered_lines(block, errors):
        try:
            row = json_object(line)
            text = row.get(text_key)
            refuse(not isinstance(text, str), f"no text under {text_key} ({', '.join(row)})")
        except ValueError as fault:
            raise UserError(
                f"{block.source.shown}, line {number}: {fault}",
                "mend the line, or name another --text_key",
            ) from fault
        yield text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates


def block_documents(block: TextBlock, text_key: str, errors: str) -> Iterator[str]:
    """The documents of a block that hold a word; UserError names the line that cannot be read."""
    if block.source.kind == "jsonl":
        texts = jsonl_texts(block, text_key, errors)
    elif block.source.kind == "line":
        texts = (line.removesuffix("\r") for _, line in numbered_lines(block, errors))
    elif block.source.kind == "blank":
        texts = (part.strip("\r\n") for part in BLANK_LINES.split(decode_block(block, errors)))
    else:
        texts = block.data if block.source.kind == "parquet" else [decode_block(block, errors)]
    return (text for text in texts if text and not text.isspace())


def content_hash(text: bytes, salt: bytes = b"") -> float:
    """A document's place in [0, 1), by its content alone."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=7, salt=salt).digest(), "big") / 2**56


def shard_blocks(sources: list[Source], settings: PrepSettings) -> Iterator[TextBlock]:
    """This shard's blocks: whole files, or every n-th block of too few; `read` counts over all."""
    part, parts = settings.part()
    by_file, before = len(sources) >= parts, 0
    for i, source in enumerate(sources):
        if not by_file or i % parts == part:
            for j, block in enumerate(read_blocks(source, settings.text_key)):
                if by_file or j % parts == part:
                    yield replace(block, read=before + block.read)
        before += source.size


def sample_documents(sources: list[Source], settings: PrepSettings) -> Iterator[str]:
    """Documents worth about --sample_mb, picked evenly over all sources by their hash."""
    total = sum(
        s.size * (4 if s.path.suffix.lower() in (*PACKINGS, ".parquet") else 1) for s in sources
    )
    budget = left = settings.sample_mb * 1e6
    share, nearest = budget / max(total, 1), (1.0, "")
    with contextlib.closing(Progress("sampling text", sum(s.size for s in sources), "B")) as bar:
        for block in shard_blocks(sources, settings):
            bar.update(block.read)
            for text in block_documents(block, settings.text_key, settings.errors):
                data = text.encode()
                place = content_hash(data, b"sample")
                if place < share:
                    yield text
                    left -= len(data)
                    if left <= 0:
                        return
                nearest = min(nearest, (place, text))
    if left == budget and nearest[1]:  # few and large documents
        yield nearest[1]


def tokenizer_for(sources: list[Source], settings: PrepSettings) -> bytes:
    texts = sample_documents(sources, settings)
    return train_tokenizer(texts, settings.vocab_size, settings.character_coverage)


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 65535 else "<u4")


@functools.lru_cache(maxsize=1)
def word_encoder(spm: str) -> WordEncoder:
    tokenizer = Tokenizer.load(spm)
    return WordEncoder(tokenizer, token_dtype(tokenizer.vocab_size))


def encode_block(block: TextBlock, spm: str, settings: PrepSettings) -> dict[str, dict]:
    """A block's documents, `packed` as <s> ids </s>, and COUNTS: in train or val by content."""
    encoder = word_encoder(spm)
    splits = {name: {"packed": bytearray(), **dict.fromkeys(COUNTS, 0)} for name in SPLITS}
    bos, eos = encoder.pack([encoder.sp.bos_id()]), encoder.pack([encoder.sp.eos_id()])
    for text in block_documents(block, settings.text_key, settings.errors):
        data, packed = text.encode(), bos + encoder.encode(text) + eos
        split = splits["val" if content_hash(data) < settings.val_split else "train"]
        split["packed"] += packed
        split["tokens"] += len(packed) // encoder.dtype.itemsize
        split["documents"] += 1
        split["bytes"] += len(data)
    return splits


def encode_sources(sources: list[Source], settings: PrepSettings, out: Path) -> dict[str, dict]:
    """Encode everything into out/train.bin and out/val.bin on all cores, in flat memory."""
    workers = settings.workers or os.cpu_count() or 1
    work = functools.partial(encode_block, spm=str(out / "tokenizer.model"), settings=settings)
    totals = {name: dict.fromkeys(COUNTS, 0) for name in SPLITS}
    progress = Progress("encoding", sum(s.size for s in sources), "B")
    with worker_pool(workers) as pool, contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(atomic_write(out / f"{name}.bin")) for name in SPLITS}
        for block, splits in in_order(pool, work, shard_blocks(sources, settings), 2 * workers):
            for name, split in splits.items():
                files[name].write(split["packed"])
                for key in COUNTS:
                    totals[name][key] += split[key]
            progress.update(block.read, f"{short(totals['train']['tokens'])} tokens")
    progress.close("encoded")
    return totals


def format_of(tokenizer: Tokenizer) -> dict:
    """The part of meta.json that follows from this program and the tokenizer."""
    return {
        "format": DATA_FORMAT,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "dtype": token_dtype(tokenizer.vocab_size).name,
    }


def write_meta(out: Path, tokenizer: Tokenizer, splits: dict[str, dict], val_split: float) -> dict:
    """meta.json, the last file of a data folder: without it the folder is unfinished."""
    meta = format_of(tokenizer) | {"val_split": val_split, "splits": splits}
    with atomic_write(out / "meta.json", "w") as file:
        json.dump(meta, file, indent=1)
    return meta


def install(building: Path, final: Path) -> None:
    """Move finished files to their place; the old meta.json goes first, the new one comes last."""
    final.mkdir(parents=True, exist_ok=True)
    (final / "meta.json").unlink(missing_ok=True)
    for name in DATA_FILES:
        os.replace(building / name, final / name)
    fsync_folder(final)


class TokenFolder:
    """A prepared data folder, checked: its meta, tokenizer and splits; UserError where unsound."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "meta.json").exists():
            raise UserError(
                f"the data folder {folder} does not exist or is not finished",
                f"run: python {PROGRAM} prep --text_path TEXT --out_dir {folder}",
            )
        self.meta = read_json(self.folder / "meta.json")
        self.tokenizer = Tokenizer.load(self.folder / "tokenizer.model")
        for key, value in format_of(self.tokenizer).items():
            if self.meta.get(key) != value:
                raise UserError(
                    f"{folder}/meta.json says {key} {self.meta.get(key)}, not {value}",
                    "put the original tokenizer.model back, or run prep again",
                )
        if set(self.meta.get("splits", ())) != set(SPLITS):
            raise UserError(f"{folder}/meta.json lacks its splits", "run prep again")
        self.train, self.val = map(self.tokens, SPLITS)

    def tokens(self, split: str) -> np.ndarray:
        """A split's ids as a read-only memory map, its size and ids checked."""
        path, dtype = self.folder / f"{split}.bin", np.dtype(self.meta["dtype"]).newbyteorder("<")
        count, vocab_size = self.meta["splits"][split]["tokens"], self.meta["vocab_size"]
        size, promised = path.stat().st_size if path.exists() else 0, count * dtype.itemsize
        if size != promised:
            raise UserError(
                f"{path} holds {size} bytes where meta.json promises {promised}",
                "copy it again whole, or run prep again",
            )
        ids = np.memmap(path, dtype, "r") if count else np.zeros(0, dtype)
        probe = ids if count <= 1 << 26 else ids[:: count >> 22]
        if count and int(probe.max()) >= vocab_size:
            raise UserError(
                f"{path} holds an id beyond the vocabulary of {vocab_size}", "run prep again"
            )
        return ids

    def bytes_per_token(self, split: str) -> float:
        """UTF-8 bytes for each target of the split's stream, the measure behind bits per byte."""
        counts = self.meta["splits"][split]
        return counts["bytes"] / max(1, counts["tokens"] - 1)


def merge_shards(folder: Path, out: Path) -> dict:
    """Join folder/shard-*-of-n into the data folder `out`; UserError where a part is missing."""
    parts = sorted({shard.name.rpartition("-")[2] for shard in folder.glob("shard-*-of-*")})
    if len(parts) != 1:
        found = " and ".join(f"shard-*-of-{n}" for n in parts) or "no shard"
        raise UserError(f"{folder} holds {found}", "run prep --shard i/n for every i of one n")
    wanted = [folder / f"shard-{i:05d}-of-{parts[0]}" for i in range(int(parts[0]))]
    if missing := [shard.name for shard in wanted if not (shard / "meta.json").exists()]:
        raise UserError(f"{folder} lacks {', '.join(missing)}", "run prep --shard for these too")
    shards = [TokenFolder(shard) for shard in wanted]
    if len({shard.tokenizer.sha256 for shard in shards}) > 1:
        raise UserError("the shards do not share one tokenizer", "prep them with the same --spm")
    splits = {}
    for split in SPLITS:
        counts = [shard.meta["splits"][split] for shard in shards]
        splits[split] = {key: sum(count[key] for count in counts) for key in COUNTS}
        with atomic_write(out / f"{split}.bin") as file:
            file.writelines(getattr(shard, split) for shard in shards)
    (out / "tokenizer.model").write_bytes(shards[0].tokenizer.data)
    return write_meta(out, shards[0].tokenizer, splits, shards[0].meta["val_split"])


def build_data(settings: PrepSettings, out: Path) -> dict:
    pipes = [path for path in settings.text_path if path == "-" or Path(path).is_fifo()]
    files = (path for path in settings.text_path if path not in pipes)
    sources = find_sources(files, settings.document)
    for i, path in enumerate(pipes):  # written to files because they will be read twice
        file, shown = out / f"pipe-{i}", "stdin" if path == "-" else path
        with sys.stdin.buffer if path == "-" else open(path, "rb") as pipe, open(file, "wb") as raw:
            shutil.copyfileobj(pipe, raw)
        sources.append(Source(file, settings.document, shown, file.stat().st_size))
    if settings.spm:
        tokenizer = Tokenizer.load(settings.spm)
    else:
        say(f"training a tokenizer of {settings.vocab_size} pieces")
        with worker_pool(1) as pool:  # its memory goes with it
            tokenizer = Tokenizer(pool.submit(tokenizer_for, sources, settings).result())
    (out / "tokenizer.model").write_bytes(tokenizer.data)
    splits = encode_sources(sources, settings, out)
    if not splits["train"]["documents"] and not settings.shard:
        raise UserError(
            "no document came into the training split", "give more text, or a smaller --val_split"
        )
    return write_meta(out, tokenizer, splits, settings.val_split)


def prepare(settings: PrepSettings) -> dict:
    """Text -> a data folder; returns its meta. A failure leaves nothing that looks finished."""
    out = final = Path(settings.out_dir)
    if settings.shard and not settings.merge:
        final = out / "shard-{:05d}-of-{:05d}".format(*settings.part())
    for folder in (out, final):
        if (folder / "meta.json").exists() and not settings.overwrite:
            raise UserError(
                f"{folder} already holds prepared data",
                "name another --out_dir, or add --overwrite",
            )
    building = out / f".building-{final.name}"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        meta = merge_shards(out, building) if settings.merge else build_data(settings, building)
        install(building, final)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    for shard in out.glob("shard-*-of-*") if settings.merge else ():
        shutil.rmtree(shard)
    return meta


# ==================================================================================================
# Streams: which samples make up which step
# ==================================================================================================

MIXTURE_BLOCK = 1024  # samples in which each domain has its share

LENGTHS = 8  # a padded batch has one of so many lengths, so that compiling comes to an end


def permute(index: np.ndarray, size: int, key: str) -> np.ndarray:
    """A pseudo-random permutation of range(size), evaluated at `index` without a table: a Feistel
    network over the next even power of two, walked until it falls inside (Black and Rogaway 2002,
    "Ciphers with Arbitrary Finite Domains")."""
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=32).digest(), "<u8")  # 4 rounds

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


class Batch(typing.NamedTuple):
    """A micro-batch of texts: ids and targets (B, T); what is no target is IGNORE."""

    ids: Tensor
    targets: Tensor


class JudgedBatch(typing.NamedTuple):
    """Groups of g answers in turn: ids and targets (B g, T), and the groups' numbers (B, g)."""

    ids: Tensor
    targets: Tensor
    numbers: Tensor


AnyBatch = Batch | JudgedBatch

Batches = Iterator[tuple[AnyBatch, int]]  # micro-batches, and what the loss of each is counted in


@dataclass(frozen=True)
class StepBatch:
    """One rank's share of one step."""

    micros: list[AnyBatch]  # on the CPU
    targets: int  # what this share of the loss is counted in
    samples: int  # sequences of the whole step, all ranks
    tokens: int  # positions of this share


class Stream:
    """Samples to train on: sample i is a pure function of (seed, i), each epoch a permutation, so
    what a step sees depends neither on batch size, accumulation and ranks nor on restarts.

    A kind of stream sets `seed`, `count`, `tokens`, and `rows` or its own `items`, and says in
    `collate` how items become a batch.
    """

    seed: int
    count: int  # samples in an epoch
    tokens: int  # positions in an epoch
    rows: list  # an item for each place, unless `items` says otherwise
    per_step = 0  # samples of a step on all ranks, where batch size and accumulation do not say

    def items(self, places: np.ndarray) -> list:
        """What stands at these places of the data, in range(count)."""
        return [self.rows[place] for place in places]

    def collate(self, items: list) -> AnyBatch:
        raise NotImplementedError

    def targets(self, micro: AnyBatch) -> int:
        """What the loss of a micro-batch is counted in: target tokens."""
        return int((micro.targets != IGNORE).sum())

    def samples(self, numbers: np.ndarray) -> list:
        """The items of these sample numbers, which may be of any epoch."""
        epochs, places = np.divmod(numbers, self.count)
        chosen = np.empty_like(numbers)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = permute(places[here], self.count, f"{self.seed}/{epoch}")
        return self.items(chosen)

    def step(self, first: int, batch_size: int, accum: int, rank: int, world: int) -> StepBatch:
        """This rank's micro-batches of the step whose first sample number is `first`."""
        numbers = first + np.arange(batch_size * accum * world).reshape(accum, world, batch_size)
        micros = [self.collate(self.samples(mine)) for mine in numbers[:, rank]]
        targets = sum(self.targets(micro) for micro in micros)
        tokens = sum(micro.ids.numel() for micro in micros)
        return StepBatch(micros, targets, numbers.size, tokens)

    def in_order(self, batch_size: int, most: int, rank: int, world: int) -> Batches:
        """This rank's share of the items, each once, up to about `most` tokens."""
        count = min(self.count, -(-most * self.count // max(1, self.tokens)))
        mine = np.arange(rank, count, world)
        for i in range(0, len(mine), batch_size):
            micro = self.collate(self.items(mine[i : i + batch_size]))
            yield micro, self.targets(micro)


def padded(rows: list[tuple[np.ndarray, np.ndarray]], length: int, count: int = 0) -> Batch:
    """Rows (ids, targets) filled up with PAD and IGNORE to (B, length); B is at least `count`."""
    shape = max(count, len(rows)), length
    batch = Batch(torch.full(shape, PAD), torch.full(shape, IGNORE))
    for i, (ids, targets) in enumerate(rows):
        batch.ids[i, : len(ids)] = torch.from_numpy(ids)
        batch.targets[i, : len(ids)] = torch.from_numpy(targets)
    return batch


def padded_length(longest: int, limit: int) -> int:
    unit = -(-limit // LENGTHS)
    return min(limit, -(-longest // unit) * unit)


def pack_lengths(lengths: list[int], room: int) -> list[list[int]]:
    """Indices of lengths in bins that hold `room`: longest first, each where it fits best."""
    bins: list[tuple[int, list[int]]] = []  # (room left, indices), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(bins, (lengths[i], []))
        left, chosen = room, []
        if at < len(bins):
            left, chosen = bins.pop(at)
        bisect.insort(bins, (left - lengths[i], [*chosen, i]))
    return [chosen for _, chosen in bins]


class Windows(Stream):
    """The training stream cut into windows of seq_len + 1 ids, stride seq_len."""

    def __init__(self, ids: np.ndarray, seq_len: int, seed: int):
        self.ids = ids
        self.seq_len = seq_len
        self.seed = seed
        self.count = (len(ids) - 1) // seq_len
        self.tokens = self.count * seq_len
        if self.count < 1:
            shorter = f"use --seq_len {len(ids) - 1} or less, or " if len(ids) > 2 else ""
            raise UserError(
                f"{len(ids)} tokens to train on are too few for --seq_len {seq_len}",
                f"{shorter}prepare more text",
            )

    def items(self, places: np.ndarray) -> list[np.ndarray]:
        return [self.ids[start : start + self.seq_len + 1] for start in places * self.seq_len]

    def collate(self, items: list[np.ndarray]) -> Batch:
        """Inputs and targets (B, T); a target is the next id."""
        rows = torch.from_numpy(np.stack(items).astype(np.int64))
        return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())


class EvaluationWindows(Stream):
    """A split in order, its last and shorter window too; every batch is of full shape."""

    def __init__(self, ids: np.ndarray, seq_len: int, batch_size: int):
        self.ids = ids
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.tokens = max(0, len(ids) - 1)
        self.count = -(-self.tokens // seq_len)

    def items(self, places: np.ndarray) -> list[np.ndarray]:
        starts = places * self.seq_len
        return [self.ids[start : start + self.seq_len + 1].astype(np.int64) for start in starts]

    def collate(self, items: list[np.ndarray]) -> Batch:
        rows = [(window[:-1], window[1:]) for window in items]
        return padded(rows, self.seq_len, self.batch_size)


class Mixture(Stream):
    """Several streams, as stateless as one: every MIXTURE_BLOCK samples hold exactly each domain's
    share, rounded, in shuffled order, and a domain repeats nothing before its epoch ends."""

    def __init__(self, parts: list[Stream], weights: list[float]):
        self.parts = parts
        self.seed = parts[0].seed
        self.per_step = parts[0].per_step
        self.collate = parts[0].collate
        self.targets = parts[0].targets
        self.ends = np.round(np.cumsum(weights) * MIXTURE_BLOCK).astype(np.int64)
        self.shares = np.diff(self.ends, prepend=0)
        if not self.shares.all():
            raise UserError(
                f"a part of the data has less than 1 sample in {MIXTURE_BLOCK}",
                "raise its weight, or leave it out",
            )
        self.count = sum(part.count for part in parts)
        self.tokens = sum(part.tokens for part in parts)

    def domains(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The domain of each sample number, and its sample number there."""
        blocks, places = np.divmod(samples, MIXTURE_BLOCK)
        domains, numbers = np.empty_like(samples), np.empty_like(samples)
        for block in np.unique(blocks):
            order = permute(np.arange(MIXTURE_BLOCK), MIXTURE_BLOCK, f"{self.seed}/mixture/{block}")
            whole = np.searchsorted(self.ends, order, side="right")  # the domain of each place
            ranks = np.empty_like(order)
            for domain, share in enumerate(self.shares):
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
        raise UserError(
            "the parts of --data_dir do not share one tokenizer",
            "prep them all with the same --spm",
        )
    return domains


def mixed(parts: list[Stream], weights: list[float]) -> Stream:
    return parts[0] if len(parts) == 1 else Mixture(parts, weights)


# ==================================================================================================
# Conversations: rows of every shape become turns, and turns become examples
# ==================================================================================================

ROLE_NAMES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bing", "bard", "claude", "model"), "assistant"
    ),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
}
CHAT_KEYS = ("messages", "conversations", "conversation")
ANSWER_KEYS = ("response", "completion", "output")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")

Turns = list[Turn]

UNTAUGHT_KINDS = ("train",)  # checkpoints that have seen no conversation

Row = tuple[list[Turns], object]  # conversations judged together, and what is known of them

Part = tuple[str, float, Stream]  # a domain's name, weight and encoded rows

Prompt = tuple[Turns, object]  # what is to be answered, and the answer that a row gives, or None


def present(row: dict) -> dict:
    """The row without its nulls: where data sets were merged, null means absent."""
    return {key: value for key, value in row.items() if value is not None}


def first_of(row: dict, keys: Iterable[str]) -> object:
    """The value under the first of these keys that the row has, else None."""
    return next((row[key] for key in keys if key in row), None)


def whole_text(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates


def clean(value: object, what: str) -> str:
    refuse(not isinstance(value, str) or not value.strip(), f"{what} is missing, empty or no text")
    return whole_text(value)


def joined_parts(value: object, what: str) -> object:
    """The text of a list of parts, {"type": "text", "text": …} or strings; else the value."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        if isinstance(part, dict):
            kind = part.get("type", "text")
            refuse(kind != "text", f"{what} has a part of type {kind!r}, and only text is known")
            part = part.get("text")
        texts.append(clean(part, f"a part of {what}"))
    return "\n".join(texts)


def call_text(call: object) -> str:
    """A tool call as JSON, {"name": …, "arguments": …}, whatever its arguments are spelled in."""
    refuse(not isinstance(call, dict), "a tool call is no object")
    function = present(call.get("function") or call)
    refuse(not isinstance(function.get("name"), str), "a tool call has no name")
    arguments = function.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    name = json.dumps(function["name"], ensure_ascii=False)
    return whole_text(f'{{"name": {name}, "arguments": {arguments}}}')


def is_learned(message: dict) -> bool:
    """Whether a message is to be learned, by its `weight` or `train`; ValueError for others."""
    weight = message.get("weight", message.get("train", 1))
    refuse(weight not in (0, 1), f"weight {weight!r} is neither 0 nor 1")
    return bool(weight)


def message_turn(message: object, what: str) -> Turn | None:
    """One message of whatever shape as a turn; None for a system message that says nothing."""
    refuse(not isinstance(message, dict), f"{what} holds something else than messages")
    message = present(message)
    named = message.get("role", message.get("from"))
    role = ROLE_NAMES.get(str(named).lower())
    refuse(role is None, f"{what} has the unknown role {named!r}")
    text = joined_parts(first_of(message, ("content", "value", "text")), f"a {named} message")
    calls = tuple(call_text(call) for call in message.get("tool_calls") or ())
    if role == "system" and text in (None, ""):
        return None
    if role == "tool" or calls:
        text = whole_text(str("" if text is None else text))
    else:
        text = clean(text, f"a {named} message")
    reasoning = first_of(message, REASONING_KEYS)
    if role == "assistant" and isinstance(reasoning, str) and reasoning.strip():
        text = f"<think>\n{clean(reasoning, 'reasoning')}\n</think>\n\n{text}"
    return Turn(role, text, is_learned(message), calls)


def messages_of(value: object, what: str) -> list:
    """A list of messages from a list, from one message, or from a dict of lists."""
    if not isinstance(value, dict):
        return value
    lists = present(value)
    if not lists or not all(isinstance(column, list) for column in lists.values()):
        return [value]
    sizes = {len(column) for column in lists.values()}
    refuse(len(sizes) > 1, f"{what} has lists of unequal length")
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def turns_of(value: object, role: str, what: str) -> Turns:
    """Turns from a text, which `role` says, or from messages in any published shape."""
    if not isinstance(value, (list, dict)):
        return [Turn(role, clean(value, what))]
    turns = [message_turn(message, what) for message in messages_of(value, what)]
    return [turn for turn in turns if turn is not None]


def merged_turns(turns: Turns) -> Turns:
    """The turns with neighbours of one speaker joined by a blank line."""
    merged: Turns = []
    for turn in turns:
        last = merged[-1] if merged else None
        alike = last and last.role == turn.role and last.learned == turn.learned
        if alike and turn.role in ("user", "assistant") and not last.calls:
            merged[-1] = turn._replace(text=f"{last.text}\n\n{turn.text}")
        else:
            merged.append(turn)
    return merged


def check_turns(turns: Turns, answered: bool = False) -> Turns:
    """A conversation that can be trained on: a system turn or none, then user and assistant, whose
    calls may have results. An assistant's greeting before any question is not learned. ValueError
    where roles make no conversation, or nothing is said by the assistant at the end."""
    turns = merged_turns(turns)
    roles = "".join(turn.role[0] for turn in turns)  # s, u, a and t
    refuse(not re.fullmatch("s?a?u[aut]*", roles), "user and assistant do not speak in turn")
    refuse(bool(re.search("[su]t", roles)), "a tool's result stands behind no call")
    refuse(answered and roles[-1] != "a", "the last message is not the assistant's")
    greeting = roles.index("u") - 1
    if greeting >= 0 and turns[greeting].role == "assistant":
        turns[greeting] = turns[greeting]._replace(learned=False)
    return turns


def with_system(row: dict, turns: Turns) -> Turns:
    """The turns behind the system prompt of the row's own column, and its history."""
    before: Turns = []
    for pair in row.get("history") or []:
        refuse(not isinstance(pair, list) or len(pair) != 2, "history holds no pairs of texts")
        before.append(Turn("user", clean(pair[0], "history")))
        before.append(Turn("assistant", clean(pair[1], "history")))
    system = first_of(row, ("system", "system_prompt"))
    if isinstance(system, str) and system.strip() and not (turns and turns[0].role == "system"):
        before.insert(0, Turn("system", clean(system, "system")))
    return before + turns


def asked_turns(row: dict) -> Turns:
    """The question of a row: instruction with input or context, prompt, question or problem."""
    if "instruction" in row:
        text = clean(row["instruction"], "instruction")
        more = first_of(row, ("input", "context"))
        if isinstance(more, str) and more.strip():
            text += "\n\n" + clean(more, "input")
        return [Turn("user", text)]
    key = next((key for key in ("prompt", "question", "problem") if key in row), None)
    refuse(key is None, "it has neither messages nor prompt nor instruction")
    return turns_of(row[key], "user", key)


def conversation(row: dict) -> Turns:
    """The turns of a row of sft in any published shape: messages, or a question and its answer,
    with a system prompt and a history of its own. ValueError says what is wrong."""
    row = present(row)
    key = next((key for key in CHAT_KEYS if key in row), None)
    if key:
        turns = turns_of(row[key], "user", key)
    else:
        turns = asked_turns(row)
        answer = first_of(row, ANSWER_KEYS)
        if answer is None and "question" in row:
            answer = row.get("answer")
        turns += turns_of(answer, "assistant", "output" if "instruction" in row else "response")
    turns = check_turns(with_system(row, turns), answered=True)
    learned = any(turn.role == "assistant" and turn.learned for turn in turns)
    refuse(not learned, "no message of the assistant is to be learned")
    return turns


def hh_turns(text: object) -> Turns | None:
    """The turns of a text that spells them, "Human: …", "Assistant: …"; None for any other."""
    if not isinstance(text, str) or not text.lstrip("\n").startswith("Human:"):
        return None
    _, *pieces = HH_TURN.split(text)
    names = {"Human": "user", "Assistant": "assistant"}
    speakers, texts = pieces[::2], pieces[1::2]
    return [
        Turn(names[speaker], clean(said.strip(), f"what {speaker} says"))
        for speaker, said in zip(speakers, texts, strict=True)
    ]


def behind_prompt(prompt: Turns, answer: Turns) -> Turns:
    """The conversation of a prompt and an answer, which may repeat the prompt."""
    if answer[: len(prompt)] == prompt:
        return answer
    asked = [turn for turn in prompt if turn.role != "system"]
    if asked and answer[: len(asked)] == asked:
        return prompt[: len(prompt) - len(asked)] + answer
    return prompt + answer


def preference(row: dict) -> tuple[Turns, Turns]:
    """The conversations that end in the chosen and in the rejected answer."""
    row = present(row)
    prompt: Turns = []
    if key := next((key for key in CHAT_KEYS if key in row), None):
        prompt = turns_of(row[key], "user", key)
    elif {"instruction", "prompt", "question", "problem"} & set(row):
        prompt = asked_turns(row)
    prompt = with_system(row, prompt)
    sides = []
    for key in ("chosen", "rejected"):
        answer = hh_turns(row.get(key)) or turns_of(row.get(key), "assistant", key)
        sides.append(check_turns(behind_prompt(prompt, answer), answered=True))
    chosen, rejected = sides
    refuse(chosen == rejected, "chosen and rejected are identical")
    refuse(chosen[:-1] != rejected[:-1], "chosen and rejected answer different prompts")
    return chosen, rejected


def judged(row: dict) -> Row:
    row = present(row)
    if "label" not in row:
        return list(preference(row)), [0.0]
    refuse(row["label"] not in (0, 1), f"label {row['label']!r} is not 0 or 1")
    return [conversation(row)], [float(row["label"])]


def row_prompt(row: dict) -> Prompt:
    """What a row asks, and the answer it gives; a prompt's last assistant turn is continued."""
    row = present(row)
    if {*CHAT_KEYS, *ANSWER_KEYS, "instruction"} & set(row):
        *turns, last = conversation(row)
        return turns, last.text
    turns = check_turns(with_system(row, asked_turns(row)))
    return turns, first_of(row, ("answer", "solution"))


def row_command(row: object) -> str:
    """Which command such rows are for, in words; empty where it is none."""
    if not isinstance(row, dict):
        return ""
    for parse, told in (
        (preference, "dpo (prompt, chosen, rejected)"),
        (conversation, "sft (messages, or prompt and response)"),
        (row_prompt, "grpo (prompt and answer)"),
    ):
        with contextlib.suppress(ValueError):
            parse(row)
            return told
    return ""


def numbered_rows(source: Source) -> Iterator[tuple[int, object]]:
    """(line, text still to be parsed) of a .jsonl, or (row, object) of a .json or .parquet."""
    suffixes = [suffix.lower() for suffix in source.path.suffixes]
    packing = PACKINGS.get((suffixes or [""])[-1])
    text = ""
    if ".json" in suffixes[-2:]:
        with open(source.path, "rb") as raw:
            file = packing(raw) if packing else raw
            text = file.read().decode("utf-8-sig")
    if text.lstrip().startswith("["):
        yield from enumerate(json.loads(text), 1)
    elif source.kind == "parquet":
        yield from enumerate(need("pyarrow.parquet").read_table(source.path).to_pylist(), 1)
    else:
        for block in read_blocks(source, ""):
            yield from numbered_lines(block)


def row_sources(paths: Iterable[str], flag: str) -> list[Source]:
    sources = find_sources(paths, "jsonl", flag=flag)
    for source in sources:
        if {".csv", ".tsv"} & {suffix.lower() for suffix in source.path.suffixes}:
            raise UserError(
                f"{source.shown}: rows are read from .jsonl, .json and .parquet alone",
                "convert it with pandas: read_csv(FILE).to_json(OUT, orient='records', lines=True)",
            )
    return sources


def read_rows(
    paths: Iterable[str], parse: Callable[[dict], object], on_bad_row: str, flag: str = "--data"
) -> list:
    """Every row of the files, parsed; bad ones are counted and raise, or warn where "skip" says."""
    good, bad = [], []
    for_another = ""
    for source in row_sources(paths, flag):
        try:
            for number, row in numbered_rows(source):
                try:
                    row = json_object(row)
                    good.append(parse(row))
                except ValueError as fault:
                    if not bad:
                        for_another = row_command(row)
                    bad.append(f"{source.shown}, line {number}: {fault}")
        except (ValueError, RecursionError) as fault:
            raise UserError(f"{source.shown} is not JSON ({fault})", "mend the file") from fault
    if bad and not good and for_another:
        raise UserError(
            f"{', '.join(map(str, paths))}: these are rows of {for_another}",
            f"use that command, or give other rows; the first says: {bad[0]}",
        )
    if bad:
        shown = "; ".join(bad[:FAULTS_SHOWN])
        what = f"{len(bad)} of {len(bad) + len(good)} rows are bad, the first: {shown}"
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
        return np.append(np.where(self.learned[1:], self.ids[1:], IGNORE), IGNORE)


def example(tokenizer: Tokenizer, turns: Turns, limit: int) -> Example | None:
    """A conversation's answers, cut behind the last one within `limit` ids, or None."""
    ids, learned = map(np.array, encode_chat(tokenizer, turns))
    ends = 1 + np.flatnonzero(learned[:limit] & (ids[:limit] == tokenizer.eos))
    return Example(ids[: ends[-1]], learned[: ends[-1]]) if len(ends) else None


def last_answer(tokenizer: Tokenizer, turns: Turns, limit: int) -> Example | None:
    """The last answer alone to be learned; None where it does not fit."""
    start = len(encode_chat(tokenizer, turns[:-1], reply=True)[0])
    ids = np.array(encode_chat(tokenizer, turns)[0])
    return Example(ids, np.arange(len(ids)) >= start) if len(ids) <= limit else None


def question(tokenizer: Tokenizer, turns: Turns, limit: int) -> Example | None:
    """A prompt up to where the assistant is to speak; None where it does not fit."""
    ids, learned = map(np.array, encode_chat(tokenizer, turns, reply=True))
    return Example(ids, learned) if len(ids) <= limit else None


def held_out(turns: Turns, share: float) -> bool:
    """Whether a conversation is for validation: by its first question, so none is on both sides."""
    first = next(turn.text for turn in turns if turn.role == "user")
    return content_hash(first.encode(), b"rows") < share


def fit_rows(
    rows: list[list[Turns]], make: Callable[[Turns], Example | None], eos: int, name: str
) -> tuple[list[list[Example]], list[int]]:
    """Groups of examples and the rows they come from; says how many were cut or left out."""
    groups = [[make(turns) for turns in row] for row in rows]
    kept = [i for i, group in enumerate(groups) if all(group)]
    if not kept:
        raise UserError(f"{name}: every row is longer than the context", "use a larger --seq_len")
    cut = sum(
        (one.ids == eos).sum() < len(turns)
        for i in kept
        for one, turns in zip(groups[i], rows[i], strict=True)
    )
    say(
        f"{name}: {len(kept)} rows, {cut} cut behind the last answer that fits, "
        f"{len(rows) - len(kept)} longer than the context left out"
    )
    return [groups[i] for i in kept], kept


def data_key(groups: Iterable[list[Example]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for one in (one for group in groups for one in group):
        digest.update(one.ids.tobytes() + one.learned.tobytes())
    return digest.hexdigest()


class Chats(Stream):
    """Conversations, several packed in a sequence of seq_len, or one a sequence. Packed, each
    begins with <s> and its last id is a target only, as the model's doc_mask wants."""

    def __init__(self, examples: list[Example], seq_len: int, seed: int, pack: bool):
        self.seq_len = seq_len
        self.seed = seed
        self.pack = pack
        lengths = [len(one.ids) - 1 for one in examples]
        if pack:
            self.bins = pack_lengths(lengths, seq_len)
            self.tokens = len(self.bins) * seq_len
        else:
            self.bins = [[i] for i in range(len(lengths))]
            self.tokens = sum(lengths)
        self.rows = [[examples[i] for i in chosen] for chosen in self.bins]
        self.count = len(self.rows)

    def collate(self, items: list[list[Example]]) -> Batch:
        rows = []
        for item in items:
            ids = np.concatenate([one.ids[:-1] for one in item])
            targets = np.concatenate([one.targets()[:-1] for one in item])
            rows.append((ids, targets))
        if self.pack:
            return padded(rows, self.seq_len)
        longest = max(len(ids) for ids, _ in rows)
        return padded(rows, padded_length(longest, self.seq_len))


class Groups(Stream):
    """Groups of g answers that are judged together, with numbers (count, g): pairs with their
    reference's log-probs, or single answers with their label. A loss is counted in groups."""

    def __init__(self, groups: list[list[Example]], numbers: Iterable, seq_len: int, seed: int):
        self.groups = groups
        self.seq_len = seq_len
        self.seed = seed
        self.numbers = np.asarray(numbers)
        self.count = len(groups)
        self.tokens = sum(len(one.ids) for group in groups for one in group)

    def items(self, places: np.ndarray) -> list[tuple[list[Example], np.ndarray]]:
        return [(self.groups[place], self.numbers[place]) for place in places]

    def collate(self, items: list[tuple[list[Example], np.ndarray]]) -> JudgedBatch:
        rows = [(one.ids, one.targets()) for group, _ in items for one in group]
        length = padded_length(max(len(ids) for ids, _ in rows), self.seq_len)
        numbers = np.stack([numbers for _, numbers in items])
        return JudgedBatch(*padded(rows, length), torch.tensor(numbers).float())

    def targets(self, micro: JudgedBatch) -> int:
        return len(micro.numbers)


@dataclass(frozen=True)
class Problem:
    """What is to be answered: its ids (n,), its turns, and the row it comes from."""

    ids: np.ndarray
    turns: Turns
    row: dict


class Prompts(Stream):
    """Prompts, `per_step` of them a step, each answered at the cost of so many more tokens."""

    def __init__(self, prompts: list[Problem], seed: int, per_step: int, more: int):
        self.rows = prompts
        self.seed = seed
        self.per_step = per_step
        self.count = len(prompts)
        self.tokens = sum(len(one.ids) + more for one in prompts)


# ==================================================================================================
# Model: the transformer; it touches no file and prints nothing
# ==================================================================================================

YARN_FAST, YARN_SLOW = 32, 1  # turns over the original context that are kept, that are stretched


@functools.cache
def compiled(function: Callable, **options) -> Callable:
    return torch.compile(function, **options)


def yarn_frequencies(frequencies: Tensor, config: ModelSettings) -> Tensor:
    """Slow rotations stretched, fast ones kept, a ramp between (Peng et al. 2023, section 3.2)."""
    original = config.rope_original or round(config.seq_len / config.rope_factor)

    def dimension(turns: float) -> float:
        angle = original / (turns * 2 * math.pi)
        return config.head_size * math.log(angle) / (2 * math.log(config.rope_theta))

    low = max(0, math.floor(dimension(YARN_FAST)))
    high = min(config.head_size - 1, math.ceil(dimension(YARN_SLOW)))
    steps = torch.arange(len(frequencies), device=frequencies.device)
    ramp = ((steps - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequencies / config.rope_factor * ramp + frequencies * (1 - ramp)


def rope_tables(config: ModelSettings) -> tuple[Tensor, Tensor]:
    """cos and sin (positions, D/2) of the rotary angles (Su et al. 2021, eq. 15)."""
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.float32, device="cpu")
    exponents = exponents / config.head_size  # never on "meta", where torch loads half its compiler
    frequencies, scale = 1.0 / config.rope_theta**exponents, 1.0
    if config.rope_scaling == "linear":
        frequencies = frequencies / config.rope_factor
    elif config.rope_scaling == "yarn":
        frequencies = yarn_frequencies(frequencies, config)
        scale = 0.1 * math.log(config.rope_factor) + 1.0
    positions = torch.arange(config.n_sink + config.seq_len, dtype=torch.float32, device="cpu")
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

    def __init__(
        self,
        config: ModelSettings,
        rows: int,
        device: torch.device,
        dtype: torch.dtype,
        room: int = 0,
    ):
        self.config = config
        self.size = config.n_sink + min(room or config.seq_len, config.seq_len)
        shape = (config.n_layer, rows, config.kv_heads, self.size, config.head_size)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * rows

    def positions(self, new: int) -> Tensor:
        """Where `new` tokens a row will lie: (B, new)."""
        return (torch.tensor(self.lengths).unsqueeze(1) + torch.arange(new)).to(self.k.device)

    def write(
        self, layer: int, k: Tensor, v: Tensor, positions: Tensor, fixed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, D) at `positions` (B, T); the layer's tensors up to the longest row, or
        to a `fixed` end, which keeps the shapes of one step those of the next."""
        end = fixed or max(self.lengths) + k.shape[2]
        if not fixed and len(set(self.lengths)) == 1:
            span = slice(self.lengths[0], end)
            self.k[layer, :, :, span], self.v[layer, :, :, span] = k, v
        else:
            rows = torch.arange(k.shape[0], device=k.device).unsqueeze(1)
            self.k[layer][rows, :, positions] = k.transpose(1, 2).to(self.k.dtype)
            self.v[layer][rows, :, positions] = v.transpose(1, 2).to(self.v.dtype)
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def put(self, rows: list[int], other: "KVCache", picks: list[int]) -> None:
        """Begin `rows` anew with what the rows `picks` of another cache hold."""
        end = max(other.lengths)
        self.k[:, rows, :, :end] = other.k[:, picks, :, :end]
        self.v[:, rows, :, :end] = other.v[:, picks, :, :end]
        for row, pick in zip(rows, picks, strict=True):
            self.lengths[row] = other.lengths[pick]

    def keep(self, rows: list[int]) -> None:
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self.lengths = [self.lengths[r] for r in rows]

    def forget(self, rows: list[int], count: int, cos: Tensor, sin: Tensor) -> None:
        """Drop the `count` oldest tokens behind the sinks of full rows, and move the rest up.

        Moved keys turn back by as many positions (Xiao et al. 2023, section 3.2), so that no
        position ever passes the trained context. cos and sin (D/2,) are of `count` positions.
        """
        sinks = self.config.n_sink
        k, v = self.k[:, rows, :, sinks + count :], self.v[:, rows, :, sinks + count :]
        turned = torch.tensor([self.config.rotates(i) for i in range(len(k))], device=k.device)
        k = torch.where(turned.view(-1, 1, 1, 1, 1), rotate(k.float(), cos, -sin).to(k.dtype), k)
        self.k[:, rows, :, sinks : self.size - count] = k
        self.v[:, rows, :, sinks : self.size - count] = v
        for row in rows:
            self.lengths[row] -= count


@dataclass(frozen=True)
class AttentionMask:
    """What the queries of one forward pass may see.

    query (B, T) or (1, T) and key (1, S) are places in the sequence, counted from its first sink;
    documents (B, S) numbers the document of each place, sinks belonging to all.
    """

    query: Tensor
    key: Tensor
    documents: Tensor | None
    sinks: int

    def mask_mod(self, window: int) -> Callable[..., Tensor]:
        """True where, in row b and any head, a query sees a key."""
        documents, sinks = self.documents, self.sinks

        def visible(b, h, query, key):
            near = key <= query
            if window:
                near = near & (query - key < window)
            if documents is not None:
                near = near & (documents[b, query] == documents[b, key])
            return near | ((key < sinks) & (key <= query))

        return visible

    def mask(self, window: int) -> Tensor:
        """The rule at every query and key: (B, 1, T, S)."""
        query, key = self.query[:, None, :, None], self.key[:, None, None, :]
        rows = (
            None
            if self.documents is None
            else torch.arange(len(self.documents), device=key.device).view(-1, 1, 1, 1)
        )
        return self.mask_mod(window)(rows, None, query, key)

    def block_mask(self, window: int) -> BlockMask:
        """The same for flex_attention, which skips the blocks that nobody sees."""
        rows = None if self.documents is None else len(self.documents)
        eager = self.key.device.type == "cpu" or torch.compiler.is_compiling()
        create = create_block_mask if eager else compiled(create_block_mask)  # no whole (T, S)
        return create(
            self.mask_mod(window),
            rows,
            None,
            self.query.shape[1],
            self.key.shape[1],
            device=self.key.device,
        )


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None, dropout: float
) -> Tensor:
    """Attention of q (B, H, T, D) over k, v (B, K, S, D), by the fitting kernel; without a mask
    it is causal, a single query seeing every key."""
    grouped = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):
        flex = compiled(flex_attention, dynamic=False)  # the one fused kernel it is made for
        return flex(q, k, v, block_mask=mask, enable_gqa=grouped)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and q.shape[2] > 1,
        enable_gqa=grouped,
    )


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation in fp32 (Zhang and Sennrich 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


@dataclass(frozen=True)
class Context:
    """What all layers of one forward pass share: rotary tables, cache, and masks by window."""

    cos: Tensor
    sin: Tensor
    cache: KVCache | None
    positions: Tensor | None
    masks: dict[bool, Tensor | BlockMask | None]
    end: int = 0  # with a cache, where the keys seen end, if that is fixed


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
        both = qkv[:, : self.H + self.K]
        if self.q_norm is not None:
            both = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        both = rotate(both, context.cos, context.sin) if self.rotates else both
        q, k = both.split((self.H, self.K), dim=1)
        if context.cache is not None:
            k, v = context.cache.write(self.layer, k, v, context.positions, context.end)
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


def matmul_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Rows of x (N, d), sorted by expert, each through its own of weight (E, d, f); counts (E,)
    says how many rows each expert has. One kernel where torch offers it."""
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
        usage = torch.zeros(E, device="cpu")  # evaluated tokens of each
        self.register_buffer("usage", usage, persistent=False)

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
            0, experts.flatten(), torch.ones_like(experts.flatten())
        )
        rows = tokens[order // self.active]
        hidden = self.experts(rows, counts) * weights.flatten()[order].unsqueeze(-1).to(x.dtype)
        y = torch.zeros_like(tokens).index_add_(0, order // self.active, hidden.to(x.dtype))
        if not self.training:
            self.usage += counts
        share = counts.float() / counts.sum()
        aux_loss = self.balance_loss * self.E * (share * chances.mean(0)).sum()
        aux_loss = aux_loss + self.router_z_loss * scores.logsumexp(-1).square().mean()
        return y.view_as(x), aux_loss

    def experts(self, rows: Tensor, counts: Tensor) -> Tensor:
        dtype = matmul_dtype(rows)  # grouped_mm does not cast by itself
        rows, w1, w2, w3 = (t.to(dtype) for t in (rows, self.w1, self.w2, self.w3))
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
        y = self.mlp(self.norm2(x))
        y, aux_loss = y if isinstance(y, tuple) else (y, None)
        return x + self.drop(y), aux_loss


class Transformer(nn.Module):
    """A LLaMA-style decoder. `config.vocab_size` must be set."""

    def __init__(self, config: ModelSettings):
        super().__init__()
        assert config.rope_layout == "half", "load_checkpoint turns other layouts into this one"
        self.config, self.grad_checkpoint = config, False
        empty = torch.empty(config.vocab_size, config.d_model)  # init_weights fills it
        self.tok_emb = nn.Embedding.from_pretrained(empty, freeze=False)
        self.sinks = (
            nn.Parameter(torch.empty(config.n_sink, config.d_model)) if config.n_sink else None
        )
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Layer(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie:
            self.lm_head.weight = self.tok_emb.weight
        self.score = nn.Linear(config.d_model, 1, bias=False) if config.scalar_head else None
        for name, table in zip(("cos", "sin"), rope_tables(config), strict=True):
            self.register_buffer(name, table, persistent=False)  # (n_sink + seq_len, D/2)

    @property
    def device(self) -> torch.device:
        return self.tok_emb.weight.device

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal weights, the two maps into the residual stream smaller by sqrt(2 L), as GPT-2;
        with trunc_init, of deviation 0.5/sqrt(d_model) and truncated at three."""
        generator = torch.Generator().manual_seed(seed % 2**63)
        width, depth = math.sqrt(self.config.d_model), math.sqrt(2 * self.config.n_layer)
        std, bound = (0.5 / width, 3.0) if self.config.trunc_init else (0.02, math.inf)
        for name, weight in self.named_parameters():
            if weight.dim() < 2 or name == "score.weight":
                nn.init.constant_(weight, weight.dim() < 2)  # a new judge scores all alike
                continue
            into_stream = name.endswith(("attn.proj.weight", "mlp.w3.weight", "mlp.w3"))
            drawn = torch.randn(weight.shape, generator=generator).clamp_(-bound, bound) * std
            weight.copy_(drawn / depth if into_stream else drawn)

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
        starts = F.pad(ids == self.config.bos_id, (sinks, 0))
        places = torch.arange(starts.shape[1], device=ids.device)
        return starts.cumsum(1), places - torch.where(starts, places - sinks, 0).cummax(1).values

    def rotary(self, places: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (B, 1, T, D/2) at places (B, T), in the dtype that x is multiplied in."""
        dtype = matmul_dtype(x)
        return self.cos[places].unsqueeze(1).to(dtype), self.sin[places].unsqueeze(1).to(dtype)

    def context(self, ids: Tensor, x: Tensor, cache: KVCache | None) -> Context:
        """For ids and their input x, which follow what the cache holds; without a mask where
        causal order says it all."""
        config, seen, length = self.config, max(cache.lengths) if cache else 0, x.shape[1]
        key = torch.arange(seen + length, device=x.device).unsqueeze(0)
        positions = cache.positions(length) if seen else key
        documents, places = self.documents(ids) if cache is None else (None, None)
        attention_mask = AttentionMask(positions, key, documents, config.n_sink)
        flex = (
            cache is None
            and x.device.type == "cuda"
            and config.head_size >= 16
            and not (self.training and config.dropout)
        )
        make = attention_mask.block_mask if flex else attention_mask.mask
        plain = documents is None and (seen == 0 or (length == 1 and len(set(cache.lengths)) == 1))
        masks = {False: None if plain else make(0)}
        if config.window:
            short = seen + length - config.n_sink <= config.window
            masks[True] = masks[False] if short else make(config.window)
        turns = self.rotary(positions if places is None else places, x)
        return Context(*turns, cache, positions, masks)

    def hidden_and_aux_loss(
        self, ids: Tensor, cache: KVCache | None = None, lengths: list[int] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Final hidden states (B, T, d) of ids (B, T), and the mixture's side loss, if any. With
        a cache, ids follow what it holds; `lengths` says how many of a padded row count."""
        x, aux_losses = self.embed(ids, with_sinks=cache is None or max(cache.lengths) == 0), []
        context = self.context(ids, x, cache)
        for block in self.blocks:
            if self.grad_checkpoint and self.training:
                x, aux_loss = recompute(block, x, context, use_reentrant=False)
            else:
                x, aux_loss = block(x, context)
            aux_losses += [] if aux_loss is None else [aux_loss]
        extra = x.shape[1] - ids.shape[1]
        if cache is not None:
            new = lengths or [ids.shape[1]] * len(ids)
            cache.lengths = [old + extra + n for old, n in zip(cache.lengths, new, strict=True)]
        return self.norm(x[:, extra:]), sum(aux_losses) / len(aux_losses) if aux_losses else None

    def next_logits(self, ids: Tensor, positions: Tensor, cache: KVCache, end: int) -> Tensor:
        """Logits (B, V) after ids (B, 1), which lie at `positions` (B, 1), all before `end`. This
        is what is compiled: the cache's own lengths are neither read nor changed."""
        x = self.embed(ids, with_sinks=False)
        key = torch.arange(end, device=ids.device).unsqueeze(0)
        attention_mask = AttentionMask(positions, key, None, self.config.n_sink)
        masks = {
            windowed: attention_mask.mask(self.config.window * windowed)
            for windowed in (False, True)
        }
        context = Context(*self.rotary(positions, x), cache, positions, masks, end)
        for block in self.blocks:
            x, _ = block(x, context)
        return self.logits(self.norm(x))[:, -1]

    def hidden(self, ids: Tensor, *args) -> Tensor:
        return self.hidden_and_aux_loss(ids, *args)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (…, V) of final hidden states, bent by softcap (Gemma Team 2024, section 2)."""
        logits, cap = self.lm_head(hidden), self.config.softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) of ids (B, T)."""
        return self.logits(self.hidden(ids, cache))


def parameter_counts(config: ModelSettings) -> dict[str, int]:
    """Parameters by part: embedding, head (0 where tied), blocks (norms included), total; and
    those active for one token: of a mixture, its active experts alone."""
    with torch.device("meta"):
        model = Transformer(config)
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    embedding, head = sizes["tok_emb.weight"], sizes.get("lm_head.weight", 0)
    total = sum(sizes.values())
    idle = max(0, config.n_expert - config.n_expert_active) * 3 * config.d_model * config.hidden
    return {
        "embedding": embedding,
        "head": head,
        "blocks": total - embedding - head,
        "total": total,
        "active": total - idle * config.n_layer,
    }


def flops_per_token(config: ModelSettings) -> int:
    """Training FLOPs a token: 6 for each multiplied weight, 12 H D S for a layer's attention.

    Chowdhery et al. 2022 (PaLM), appendix B; the head multiplies, the embedding looks up; S is
    the context or the window, and of a mixture the active experts count.
    """
    counts = parameter_counts(config)
    layers = counts["active"] - counts["embedding"] - counts["head"]
    seen = sum(
        min(config.window, config.seq_len) if config.windowed(i) else config.seq_len
        for i in range(config.n_layer)
    )
    return (
        6 * (layers + config.vocab_size * config.d_model)
        + 12 * config.n_head * config.head_size * seen
    )


# ==================================================================================================
# LoRA: low-rank adapters: attach, merge
# ==================================================================================================


class LoraLinear(nn.Linear):
    """A frozen linear map W and a low-rank change of it: W x + scale B A x (Hu et al. 2021)."""

    def __init__(self, base: nn.Linear, settings: LoraSettings, generator: torch.Generator):
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.scale = base.weight, settings.scale
        self.drop = nn.Dropout(settings.lora_dropout)
        a = torch.rand(settings.lora_rank, base.in_features, generator=generator) * 2 - 1
        self.lora_a = nn.Parameter(a / math.sqrt(base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, settings.lora_rank))

    def forward(self, x: Tensor) -> Tensor:
        change = F.linear(F.linear(self.drop(x), self.lora_a), self.lora_b)
        return F.linear(x, self.weight) + change * self.scale


def attach_lora(model: Transformer, settings: LoraSettings, seed: int) -> None:
    """Freeze the model and give the named matrices adapters, which change nothing yet."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(derive_seed(seed, "lora"))
    parts = [part for block in model.blocks for part in (block.attn, block.mlp)]
    found = [
        (part, name)
        for part in parts
        for name in settings.lora_targets.split(",")
        if isinstance(getattr(part, name, None), nn.Linear)
    ]
    if not found:
        raise UserError(
            f"--lora_targets {settings.lora_targets}: this model has no such matrix",
            "experts take no adapter; use --lora_targets qkv,proj",
        )
    for part, name in found:
        setattr(part, name, LoraLinear(getattr(part, name), settings, generator))
    if model.score is not None:
        model.score.requires_grad_(True)


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: w.detach() for name, w in model.named_parameters() if w.requires_grad}


def merge_lora(
    weights: dict[str, Tensor], adapter: dict[str, Tensor], scale: float
) -> dict[str, Tensor]:
    """The weights with an adapter's trained_weights worked into them."""
    merged = weights | {name: w for name, w in adapter.items() if ".lora_" not in name}
    for stem in (name.removesuffix("lora_b") for name in adapter if name.endswith(".lora_b")):
        change = adapter[f"{stem}lora_b"].float() @ adapter[f"{stem}lora_a"].float()
        merged[f"{stem}weight"] = weights[f"{stem}weight"] + scale * change
    return merged


# ==================================================================================================
# Engine: sampling and cached generation; token ids only
# ==================================================================================================

DROP_WHEN = 0.25  # share of finished rows at which a batch takes in waiting ones, or shrinks

LEAST_END = 64  # of the keys that a compiled step sees; further ends are powers of two


def banned(history: list[int], n: int) -> list[int]:
    """Ids that would end an n-gram which the history already holds."""
    prefix = history[len(history) - n + 1 :]
    return [
        history[i + n - 1] for i in range(len(history) - n + 1) if history[i : i + n - 1] == prefix
    ]


def penalise(
    logits: Tensor,
    histories: list[list[int]],
    settings: SamplingSettings,
    stop: frozenset[int] = frozenset(),
) -> Tensor:
    """Repetition penalty (Keskar et al. 2019, section 4.1) and banned n-grams, on (B, V); a stop id
    is never banned, for a text must be able to end."""
    penalty, n = settings.repetition_penalty, settings.no_repeat_ngram_size
    if penalty == 1.0 and not n:
        return logits
    for row, history in zip(logits, histories, strict=True):
        seen = torch.tensor(sorted(set(history)), device=logits.device)
        scores = row[seen]
        row[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
        if not n:
            continue
        ids = set(banned(history, n)) - stop
        if len(ids) < len(row):  # where every id is banned, none is
            row[list(ids)] = -math.inf
    return logits


def draw(logits: Tensor, uniform: Tensor, settings: SamplingSettings) -> Tensor:
    """An id a row of logits (B, V), by inverting the cumulative distribution at uniform (B, 1):
    temperature, then top-k, then top-p; the likeliest id stays whatever top_p is."""
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


def prefill(
    model: Transformer, histories: list[list[int]], dtype: torch.dtype
) -> tuple[Tensor, KVCache]:
    """Run prompts of any lengths through the model: logits (B, V) after each, and their cache."""
    lengths = [len(h) for h in histories]
    ids = nn.utils.rnn.pad_sequence([torch.tensor(h) for h in histories], batch_first=True)
    cache = KVCache(model.config, len(histories), model.device, dtype, max(lengths))
    hidden = model.hidden(ids.to(model.device), cache, lengths)  # (B, T, d)
    hidden = hidden[range(len(histories)), [length - 1 for length in lengths]]
    return model.logits(hidden).float(), cache


class Decoder:
    """A batch of rows under generation: their histories, their cache, and the next logits.

    room: most tokens that a row will hold; live: rows whose text has not ended.
    """

    def __init__(
        self, model: Transformer, rows: int, room: int, dtype: torch.dtype, compiled: bool = False
    ):
        self.model, self.dtype, self.compiled = model, dtype, compiled
        self.half = max(1, model.config.seq_len // 2)  # what is forgotten beyond the context
        self.cache = KVCache(model.config, rows, model.device, dtype, room)
        self.histories: list[list[int]] = [[] for _ in range(rows)]
        self.logits = torch.zeros(rows, model.config.vocab_size, device=model.device)
        self.live: set[int] = set()

    def read(self, rows: list[int], texts: list[list[int]]) -> None:
        """Begin `rows` anew with these texts; equal ones are read once, of too long ones the
        newest half."""
        fits = self.model.config.seq_len
        windows = [tuple(text if len(text) <= fits else text[-self.half :]) for text in texts]
        unique = {window: i for i, window in enumerate(dict.fromkeys(windows))}
        logits, cache = prefill(self.model, [list(window) for window in unique], self.dtype)
        picks = [unique[window] for window in windows]
        self.cache.put(rows, cache, picks)
        self.logits[rows] = logits[picks]
        for row, text in zip(rows, texts, strict=True):
            self.histories[row] = list(text)
        self.live |= set(rows)

    def keep(self, rows: list[int]) -> None:
        self.cache.keep(rows)
        self.logits = self.logits[rows]
        self.histories = [self.histories[r] for r in rows]
        self.live = {i for i, row in enumerate(rows) if row in self.live}

    def push(self, tokens: list[int]) -> None:
        """Append one id a live row and compute the logits after it; the others stand still."""
        lengths, live = self.cache.lengths, self.live
        for row in live:
            self.histories[row].append(tokens[row])
        full = {row for row, length in enumerate(lengths) if length >= self.cache.size}
        if full & live and self.model.sinks is not None:
            unit = self.model.cos[0]  # YaRN's tables are scaled
            cos, sin = self.model.cos[self.half] / unit, self.model.sin[self.half] / unit
            self.cache.forget(sorted(full & live), self.half, cos, sin)
            full -= live
        for row in full:
            lengths[row] = self.model.config.n_sink
        if live - full:
            self.step(torch.tensor(tokens, device=self.model.device).unsqueeze(1))  # (B, 1)
        if again := sorted(full & live):
            self.read(again, [self.histories[row] for row in again])

    def step(self, ids: Tensor) -> None:
        model, cache = self.model, self.cache
        if not self.compiled:
            self.logits = model(ids, cache)[:, -1].float()
            return
        end = min(cache.size, max(LEAST_END, 1 << max(cache.lengths).bit_length()))
        step = compiled(
            Transformer.next_logits,
            dynamic=False,  # on CUDA captured as one graph
            mode="reduce-overhead" if ids.is_cuda else "default",
        )
        self.logits = step(model, ids, cache.positions(1), cache, end).float().clone()
        cache.lengths = [length + 1 for length in cache.lengths]


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    settings: SamplingSettings,
    seed: int,
    stop: frozenset[int] = frozenset(),
    dtype: torch.dtype = torch.float32,
    first: int = 0,
    at_once: int = 0,
    compiled: bool = False,
) -> Iterator[tuple[int, int]]:
    """Continue each prompt; yields (row, id) as ids are drawn, a stop id included.

    At most `at_once` rows are under way (0: all); as rows end, waiting ones take their places.
    In fp32 a row draws the same ids alone as in any batch, where `first` counts the rows before
    it; in bf16 the size of a batch changes the rounding of its matmuls.
    Beyond the context the oldest half is forgotten.
    """
    most, waiting = settings.max_new_tokens, deque(range(len(prompts)))
    slots = min(at_once or len(prompts), len(prompts))
    room = min(model.config.seq_len, max(map(len, prompts)) + most)
    decoder = Decoder(model, slots, room, dtype, compiled)
    rows = [0] * slots  # which prompt each slot continues
    chance = torch.zeros(slots, most)
    while waiting or decoder.live:
        idle = [slot for slot in range(slots) if slot not in decoder.live]
        enough = len(idle) >= DROP_WHEN * slots
        if waiting and enough:
            free = idle[: len(waiting)]
            for slot in free:
                rows[slot] = waiting.popleft()
                chance[slot] = uniforms(seed, first + rows[slot], most)
            decoder.read(free, [prompts[rows[slot]] for slot in free])
        elif enough and (not compiled or 2 * len(idle) >= slots):
            kept = sorted(decoder.live)
            if compiled:  # sizes are few, for each is compiled
                kept += idle[: slots // 2 - len(kept)]
            decoder.keep(kept)
            rows, chance, slots = [rows[slot] for slot in kept], chance[kept], len(kept)
        logits = penalise(decoder.logits.clone(), decoder.histories, settings, stop)
        drawn = [len(decoder.histories[slot]) - len(prompts[rows[slot]]) for slot in range(slots)]
        point = chance[range(slots), drawn].unsqueeze(1).to(logits.device)
        tokens = draw(logits, point, settings).tolist()
        for slot in sorted(decoder.live):
            yield rows[slot], tokens[slot]
            if tokens[slot] in stop or drawn[slot] + 1 == most:
                decoder.live.remove(slot)
        if decoder.live:
            decoder.push(tokens)


def complete(model: Transformer, prompts: list[list[int]], *args, **kwargs) -> list[list[int]]:
    rows = [[] for _ in prompts]
    for row, token in generate(model, prompts, *args, **kwargs):
        rows[row].append(token)
    return rows


# ==================================================================================================
# Losses: tensors in, tensors out
# ==================================================================================================

LOSS_ROWS = 4096  # positions whose logits stand in CUDA's memory at a time


def by_parts(work: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    """work(hidden (N, d), targets (N,)) of (B, T, d) and (B, T), joined in its last place, which
    may be 0 where IGNOREd: a CPU, not compiled, leaves that out. On CUDA by parts, made again in
    the backward pass, so that the logits never stand in memory whole."""
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    on_cpu = hidden.device.type == "cpu"
    if on_cpu and not torch.compiler.is_compiling() and not (kept := targets != IGNORE).all():
        found = work(hidden[kept], targets[kept])
        return found.new_zeros(*found.shape[:-1], len(targets)).masked_scatter(kept, found)
    if on_cpu or len(targets) <= LOSS_ROWS:
        return work(hidden, targets)
    pieces = zip(hidden.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True)
    return torch.cat([recompute(work, *piece, use_reentrant=False) for piece in pieces], -1)


def token_losses(
    hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, z_loss: float = 0.0
) -> Tensor:
    """Cross-entropy (N,) in nats of targets (B, T), 0 where IGNOREd; head: hidden to logits."""

    def work(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head(hidden).float()
        losses = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
        if z_loss:  # Chowdhery et al. 2022 (PaLM), section 5
            losses = losses + z_loss * logits.logsumexp(-1).square() * (targets != IGNORE)
        return losses

    return by_parts(work, hidden, targets)


def hidden_and_aux_loss(model: Transformer, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Final hidden states (B, T, d) and, in training, a mixture's side loss a row, or else 0."""
    hidden, aux_loss = model.hidden_and_aux_loss(ids)
    return hidden, aux_loss if model.training and aux_loss is not None else hidden.new_zeros(())


def pretrain_loss(model: Transformer, ids: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """Summed cross-entropy of a micro-batch (B, T), in nats; in training with the side losses."""
    hidden, aux_loss = hidden_and_aux_loss(model, ids)
    losses = token_losses(hidden, model.logits, targets, z_loss if model.training else 0.0)
    return losses.sum() + aux_loss * (targets != IGNORE).sum()


def sequence_logps(model: Transformer, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed log-probability of each row's targets (B,), and the side loss a row."""
    hidden, aux_loss = hidden_and_aux_loss(model, ids)
    return -token_losses(hidden, model.logits, targets).view(targets.shape).sum(1), aux_loss


def gap(pairs: Tensor) -> Tensor:  # (B, 2) -> (B,): the chosen less the rejected
    return pairs[:, 0] - pairs[:, 1]


def smoothed(margin: Tensor, share: float) -> Tensor:
    """Cross-entropy of a logit where a `share` of the labels is thought to be wrong."""
    return -F.logsigmoid(margin) * (1 - share) - F.logsigmoid(-margin) * share


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
    # Chowdhury et al. 2024, eq. 10: unbiased under flipped labels, by weights that add up to 1 too
    "robust": lambda rewards, means, s: smoothed(
        gap(rewards), -s.label_smoothing / (1 - 2 * s.label_smoothing)
    ),
    # D'Oosterlinck et al. 2024, section 3: chosen up and rejected down; or both down, it further
    "apo_zero": lambda rewards, means, s: 1 - rewards[:, 0].sigmoid() + rewards[:, 1].sigmoid(),
    "apo_down": lambda rewards, means, s: rewards[:, 0].sigmoid() + 1 - gap(rewards).sigmoid(),
    "simpo": lambda rewards, means, s: smoothed(gap(rewards) - s.simpo_gamma, s.label_smoothing),
    "orpo": orpo_loss,
}

BY_LENGTH = ("ipo", "simpo", "orpo")  # rewards are means a token (Meng et al. 2024, section 2.2)

REFERENCE_FREE = ("simpo", "orpo")

PAIR_METRICS = ("loss", "margin", "accuracy", "chosen_logp", "rejected_logp", "length_bias")

BINS = 10  # of calibration

JUDGE_METRICS = ("loss", "margin", "accuracy") + ("bin",) * BINS


def preference_loss(
    model: Transformer, ids: Tensor, targets: Tensor, reference: Tensor, settings: DpoSettings
) -> Tensor:
    """PAIR_METRICS summed over pairs: ids, targets (2B, T), chosen and rejected in turn; reference:
    log-probs (B, 2). length_bias: by how many tokens the answer of higher reward is longer."""
    logps, aux_loss = sequence_logps(model, ids, targets)
    policy, lengths = logps.view(-1, 2), (targets != IGNORE).sum(1).view(-1, 2)
    ratios = policy if settings.loss in REFERENCE_FREE else policy - reference
    rewards = settings.beta * (ratios / lengths if settings.loss in BY_LENGTH else ratios)
    losses = PREFERENCE_LOSSES[settings.loss](rewards, policy / lengths, settings) + aux_loss
    margin = gap(rewards.detach())
    metrics = margin, (margin > 0).float(), *policy.detach().unbind(1), margin.sign() * gap(lengths)
    return torch.stack([losses.sum(), *(m.sum() for m in metrics)])


def reward_scores(model: Transformer, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The scalar head at the end of each row's last target (B,), and the side loss a row."""
    hidden, aux_loss = hidden_and_aux_loss(model, ids)
    rows, places = (torch.arange(n, device=ids.device) for n in ids.shape)
    ends = ((targets != IGNORE) * places).amax(1) + 1
    return model.score(hidden[rows, ends]).squeeze(-1).float(), aux_loss


def judge_metrics(logits: Tensor, aux_loss: Tensor | float) -> Tensor:
    """JUDGE_METRICS summed, of logits (B,) in favour of what is right. A bin holds the confidence
    less the success of the judgements of such confidence (Guo et al. 2017, eq. 3)."""
    loss, logits = (aux_loss - F.logsigmoid(logits)).sum(), logits.detach()
    right, confidence = (logits > 0).float(), logits.abs().sigmoid()
    bins = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    error = torch.zeros(BINS, device=logits.device).scatter_add_(0, bins, confidence - right)
    return torch.cat((torch.stack((loss, logits.sum(), right.sum())), error))


def judge_loss(model: Transformer, ids: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
    """JUDGE_METRICS of pairs, chosen and rejected in turn (Bradley and Terry 1952), or of single
    answers with labels (B, 1): a verifier (Cobbe et al. 2021)."""
    scores, aux_loss = reward_scores(model, ids, targets)
    paired = len(scores) > len(labels)
    logits = gap(scores.view(-1, 2)) if paired else scores * (2 * labels.squeeze(1) - 1)
    return judge_metrics(logits, aux_loss)


SPREAD_FLOOR = 1e-4  # added to a group's standard deviation

POLICY_METRICS = ("loss", "kl", "entropy", "clip_low", "clip_high", "ratio_most", "ratio_least")


def group_advantages(rewards: Tensor, by_spread: bool) -> Tensor:
    """Rewards (P, G) less their group's mean (Liu et al. 2025, Dr. GRPO), by_spread over its
    deviation (Shao et al. 2024, section 4.1.2)."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + SPREAD_FLOOR) if by_spread else centred


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: Tensor) -> Tensor:
    """Generalised advantages (B, N) of tokens (Schulman et al. 2016, eq. 16); values: before each;
    mask: which are there, from the left; lam: (B,), a row's own."""
    values = values.masked_fill(~mask, 0.0)
    result = (rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values).masked_fill(~mask, 0.0)
    for t in reversed(range(result.shape[1] - 1)):
        result[:, t] += gamma * lam * result[:, t + 1]
    return result


def length_adaptive(lengths: Tensor, alpha: float) -> Tensor:
    """The policy's lambda for completions of so many tokens (Yue et al. 2025, VAPO, eq. 11)."""
    return (1 - 1 / (alpha * lengths)).clamp(min=0.0)


def dense_rewards(values: Tensor, mask: Tensor, gamma: float, smoothing: float) -> Tensor:
    """Each token's gain in smoothed value (B, N); over a completion they add up to no more than a
    constant, so that the best policy stays the best (Ng et al. 1999, theorem 1)."""
    smooth = values.clone()
    for t in range(1, values.shape[1]):
        smooth[:, t] = smoothing * smooth[:, t - 1] + (1 - smoothing) * values[:, t]
    smooth = smooth.masked_fill(~mask, 0.0)
    return gamma * F.pad(smooth[:, 1:], (0, 1)) - smooth


def overlong_penalty(lengths: Tensor, most: int, share: float) -> Tensor:
    """0 until the last `share` of the room, then falling to -1 (Yu et al. 2025, DAPO, eq. 13)."""
    buffer = max(1.0, share * most)
    return -((lengths - (most - buffer)) / buffer).clamp(0.0, 1.0)


def row_weights(lengths: Tensor, kind: str, rows: float, tokens: float, most: int) -> Tensor:
    """What a token of each completion counts; the sum is then divided by all ranks' `rows`."""
    return {
        "sequence": 1 / lengths,
        "constant": torch.full_like(lengths, 1 / most),
        "tokens": torch.full_like(lengths, rows / tokens),
    }[kind]


def completion_logps(
    model: Transformer, ids: Tensor, targets: Tensor, temperature: Tensor, spread: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs and entropies (B, T), 0 where ignored, the latter fixed unless `spread`; side."""

    def work(hidden: Tensor, targets: Tensor) -> Tensor:
        logps = (model.logits(hidden).float() / temperature).log_softmax(-1)  # (N, V)
        chosen = logps.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        whole = logps if spread else logps.detach()
        return torch.stack((chosen, -(whole.exp() * whole).sum(-1)))

    hidden, aux_loss = hidden_and_aux_loss(model, ids)
    both = by_parts(work, hidden, targets).view(2, *targets.shape) * (targets != IGNORE)
    return *both, aux_loss


def policy_loss(
    model: Transformer,
    ids: Tensor,
    targets: Tensor,
    old: Tensor,
    advantages: Tensor,
    reference: Tensor,
    weights: Tensor,
    scalars: Tensor,
    settings: PolicySettings,
) -> Tensor:
    """POLICY_METRICS of completions: the loss, to be divided by the step's rows, sums over tokens,
    and the extreme ratios. ids, targets, old, advantages, reference: (B, T); where old log-probs
    are NaN the ratio is 1. weights (B, 2): what a token counts, and what its plain log-likelihood
    does. scalars (B, 2): sampling temperature and entropy bonus, the same in each row."""
    temperature, bonus = scalars[0]
    logps, entropy, aux_loss = completion_logps(
        model, ids, targets, temperature, settings.entropy_target > 0
    )
    mask = targets != IGNORE
    log_ratio = (logps - torch.where(old.isnan(), logps.detach(), old)) * mask
    if settings.ratio == "sequence":  # Zheng et al. 2025 (GSPO), eq. 7
        log_ratio = (log_ratio.sum(1) / mask.sum(1).clamp(min=1)).unsqueeze(1).expand_as(logps)
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    if settings.ratio == "weight":  # MiniMax 2025 (CISPO), eq. 4
        gain = bounded.detach() * advantages * logps
    else:  # Schulman et al. 2017, eq. 7
        gain = torch.minimum(ratio * advantages, bounded * advantages)
    apart = (reference - logps) * mask
    kl = apart.exp() - apart - 1  # k3 (Schulman 2020, "Approximating KL divergence")
    loss = -gain - bonus * entropy
    if settings.kl:  # without a reference it may overflow, and 0 times that is no number
        loss = loss + settings.kl * kl
    loss = (mask * (loss * weights[:, :1] - logps * weights[:, 1:])).sum() + aux_loss * len(ids)
    low = (ratio < 1 - settings.clip_low) & (advantages < 0) & mask
    high = (ratio > 1 + settings.clip_high) & (advantages > 0) & mask
    metrics = kl.sum(), entropy.sum(), low.sum(), high.sum(), ratio.max(), ratio.min()
    return torch.stack([loss, *(m.detach().float() for m in metrics)])


def token_values(critic: Transformer, ids: Tensor) -> Tensor:  # (B, T)
    return critic.score(critic.hidden(ids)).squeeze(-1).float()


def value_loss(
    critic: Transformer, ids: Tensor, targets: Tensor, old: Tensor, returns: Tensor, clip: float
) -> Tensor:
    """Half the squared error of a micro-batch's values, not to be had by moving from the old ones
    (B, T) by more than `clip` (0: by any), and how many tokens that holds back."""
    values = token_values(critic, ids)
    bounded = old + (values - old).clamp(-clip, clip) if clip else values
    errors, held = (values - returns).square(), (bounded - returns).square()
    mask = targets != IGNORE
    loss = 0.5 * (mask * torch.maximum(errors, held)).sum()
    return torch.stack([loss, ((held > errors) & mask).sum()])


class Objective(nn.Module):
    """A model and its loss as one module, so that compile, DDP and FSDP wrap every gradient; the
    loss is a scalar, or a vector of sums that begins with the one to be trained on."""

    def __init__(self, model: Transformer, loss: Callable[..., Tensor]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *batch: Tensor) -> Tensor:
        return self.loss(self.model, *batch).reshape(-1)


# ==================================================================================================
# Optimisers: parameter groups and schedules
# ==================================================================================================

# How far a rate has come down from its peak to min_lr, by the share of its descent that is gone
DESCENTS = {
    "cosine": lambda gone: 0.5 * (1 - math.cos(math.pi * gone)),
    "wsd": lambda gone: gone,  # Hu et al. 2024, MiniCPM
    "wsd_sqrt": math.sqrt,  # Hagele et al. 2024, section 3
    "constant": lambda gone: 0.0,
}

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of Muon's authors

NEWTON_SCHULZ_STEPS = 5

MUON_AT_ONCE = 1 << 26  # numbers orthogonalised together

MUON_SCALES = {
    "rms": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "shape": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
}


def lr_scale(step: int, settings: OptimSettings, max_steps: int) -> float:
    """Share of the peak learning rate for a step counted from 0: warm-up, then the schedule.

    cosine descends from the warm-up's end on, wsd and wsd_sqrt over the last decay_share of the
    run; inverse_sqrt falls with the root of the step (Vaswani et al. 2017).
    """
    warm, name = settings.warmup_steps, settings.schedule
    if step < warm:
        return (step + 1) / warm
    if name == "inverse_sqrt":
        return math.sqrt(max(1, warm) / max(1, step))
    begin = warm if name == "cosine" else max(warm, max_steps * (1 - settings.decay_share))
    gone = min(1.0, max(0.0, (step - begin) / max(1e-9, max_steps - begin)))
    return 1 - (1 - settings.min_lr) * DESCENTS[name](gone)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Semi-orthogonal matrices near (n, rows, columns): singular values near 1, by Newton-Schulz
    iteration (Jordan et al. 2024); in bf16, but in fp32 on a CPU without it."""
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

    def __init__(
        self, groups: list[dict], lr: float, weight_decay: float, momentum: float, scale: str
    ):
        super().__init__(
            groups,
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "scale": scale,
                "rows": None,
            },
        )

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
            for shape, pairs in shapes.items():
                rows, columns = shape if len(shape) == 2 else shape[:-3:-1]  # experts: (in, out)
                size = group["lr"] * MUON_SCALES[group["scale"]](rows, columns)
                at_once = max(1, MUON_AT_ONCE // math.prod(shape))
                for i in range(0, len(pairs), at_once):
                    parts, updates = zip(*pairs[i : i + at_once], strict=True)
                    updates = torch.stack(updates)
                    directions = orthogonalise(updates.flatten(0, -3)).view_as(updates)
                    torch._foreach_add_(parts, list(directions), alpha=-size)

    def momentum(self, weight: Tensor, share: float) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].lerp_(weight.grad, 1 - share)
        return weight.grad.lerp_(state["momentum"], share)  # the gradient is spent


def split_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trained parameters: qkv, hidden (other matrices of the layers), head (with the routers),
    and norms and embeddings, spared from weight decay."""
    kinds: dict[str, list[nn.Parameter]] = {"qkv": [], "hidden": [], "head": [], "spared": []}
    for name, weight in model.named_parameters():
        if weight.dim() < 2 or name.endswith(("tok_emb.weight", "sinks")):
            kind = "spared"
        elif "blocks." not in name or name.endswith("router.weight"):
            kind = "head"
        else:
            kind = "qkv" if name.endswith("qkv.weight") else "hidden"
        if weight.requires_grad:
            kinds[kind].append(weight)
    return kinds


def make_optimizers(
    model: Transformer, settings: OptimSettings, device: torch.device
) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the layers' matrices and AdamW for the rest."""
    kinds, attn = split_parameters(model), model.blocks[0].attn
    muon = settings.optimizer == "muon"
    decayed = kinds["head"] + ([] if muon else kinds["qkv"] + kinds["hidden"])
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": kinds["spared"], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    made = (
        [
            torch.optim.AdamW(
                groups,
                lr=settings.lr,
                betas=(settings.beta1, settings.beta2),
                fused=device.type in ("cpu", "cuda"),
            )
        ]
        if groups
        else []
    )
    if muon:
        rows = tuple(count * attn.D for count in (attn.H, attn.K, attn.K))
        matrices = [{"params": kinds["qkv"], "rows": rows}, {"params": kinds["hidden"]}]
        made.append(
            Muon(
                [g for g in matrices if g["params"]],
                settings.muon_lr or settings.lr,
                settings.weight_decay,
                settings.muon_momentum,
                settings.muon_scale,
            )
        )
    return made


class EMA:
    """An exponential moving average of a model's weights, which can stand in for them."""

    def __init__(self, model: nn.Module, decay: float, weights: list[Tensor] | None):
        self.live, self.decay = [w for w in model.parameters() if w.requires_grad], decay
        self.weights = [
            torch.empty_like(live).copy_(start.detach())
            for live, start in zip(self.live, weights or self.live, strict=True)
        ]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimiser step `step`; the young average forgets faster, so it has no bias."""
        decay = min(self.decay, step / (step + 9))
        torch._foreach_lerp_(self.weights, self.live, 1 - decay)

    @contextlib.contextmanager
    def in_place(self):
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


def set_step(
    optimizers: list[torch.optim.Optimizer], settings: OptimSettings, step: int, max_steps: int
) -> float:
    """Set learning rates and Muon's momentum for a step; returns AdamW's learning rate."""
    scale = lr_scale(step, settings, max_steps)
    warm = min(1.0, step / settings.muon_warmup) if settings.muon_warmup else 1.0
    begin = min(0.85, settings.muon_momentum)
    for optimizer in optimizers:
        muon = isinstance(optimizer, Muon)
        for group in optimizer.param_groups:
            group["lr"] = scale * (muon and settings.muon_lr or settings.lr)
            if muon:
                group["momentum"] = begin + (settings.muon_momentum - begin) * warm
    return scale * settings.lr


# ==================================================================================================
# Checkpoints: the only place that saves and loads
# ==================================================================================================

WRAPPERS = re.compile(r"^((_orig_mod|module|model)\.)+")  # what compile and DDP leave in names

OLD_NAMES = {"max_seq_len": "seq_len", "block_size": "seq_len", "context_length": "seq_len"}

BROKEN = (  # whatever torch's reader runs into on bytes that lie
    RuntimeError,
    EOFError,
    zipfile.BadZipFile,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zlib.error,
    pickle.UnpicklingError,
)


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint so that `path` is at every moment whole; OSError if the disk refuses."""
    with atomic_write(Path(path)) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as fault:  # behind it torch hides the disk's own words
            raise fault.__context__ or fault from None


def read_checkpoint(path: Path, verify: bool = False) -> dict:
    """The dict in a file, no code run, its checksums held on `verify`; UserError if unusable."""
    if not path.exists():
        raise UserError(f"the checkpoint {path} does not exist", "check the path")
    try:
        if verify and zipfile.is_zipfile(path) and (bad := zipfile.ZipFile(path).testzip()):
            raise UserError(f"{path} is damaged (in {bad})", "use an earlier checkpoint")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as fault:
        damage = UserError(f"{path} is damaged ({fault})", "use an earlier checkpoint")
        raise disk_error(fault, path) or damage from fault
    except BROKEN as fault:
        if "Weights only load failed" in str(fault) and "GLOBAL" in str(fault):
            raise UserError(
                f"{path} holds code besides numbers, and was not loaded",
                "use only checkpoints of this program",
            ) from fault
        raise UserError(f"{path} is damaged or no checkpoint", "name another") from fault
    match checkpoint:
        case {"model": dict(), "config": dict(), **more}:
            version = more.get("format", CHECKPOINT_FORMAT)
            if isinstance(version, int) and version == CHECKPOINT_FORMAT:
                return checkpoint
    raise UserError(
        f"{path} is a file of some other program or of a newer version of this one",
        "name a ckpt_*.pt of this one, or update it",
    )


def numbered(out: Path) -> list[Path]:
    return sorted(out.glob("ckpt_" + "[0-9]" * 8 + ".pt"), reverse=True)


def checkpoint_path(path: str | Path) -> Path:
    """A checkpoint's file; for the folder of a run its best one, or else its last."""
    path = Path(path)
    if not path.is_dir():
        return path
    if (path / "ckpt_best.pt").exists():
        return path / "ckpt_best.pt"
    if (path / "config.json").exists() and not numbered(path):
        raise UserError(
            f"{path} holds a model of another program, in Hugging Face's form or as plain weights",
            f"import it: python convert_to_llama.py --reverse {path} --out imported.pt",
        )
    return path / "ckpt_last.pt"


def whole_config(stored: dict, weights: dict[str, Tensor], path: Path) -> ModelSettings:
    """ModelSettings from a stored config and, where it is old, from the weights it must fit."""
    config = {OLD_NAMES.get(k, k): v for k, v in stored.items() if v is not None}
    embedding = weights["tok_emb.weight"]
    if "rope_layout" not in config:  # the original program had settings besides
        config = {f.name: config[f.name] for f in fields(ModelSettings) if f.name in config}
        config["tie"] = torch.equal(weights.get("lm_head.weight", embedding), embedding)
    up = weights.get("blocks.0.mlp.w2.weight")  # of experts: w2 (E, d, F)
    width = weights["blocks.0.mlp.w2"].shape[2] if up is None else len(up)
    config |= {"vocab_size": len(embedding), "ffn_hidden": width, "rope_layout": "half"}
    settings = ModelSettings(**config)
    # Before a model is built, which takes memory and time by what the config says.
    layers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    if settings.n_layer != len(layers):
        raise UserError(
            f"{path}: its config says n_layer {settings.n_layer}, its weights have {len(layers)}",
            "name another",
        )
    if settings.tie:
        weights.setdefault("lm_head.weight", embedding)
    with torch.device("meta"):
        wanted = {(name, w.shape) for name, w in Transformer(settings).state_dict().items()}
    if wrong := wanted ^ {(name, w.shape) for name, w in weights.items()}:
        names = ", ".join(sorted({name for name, _ in wrong})[:3])
        raise UserError(f"{path}: its weights do not fit its config ({names})", "name another")
    return settings


def model_key(checkpoint: dict) -> str:
    """What tells one model's weights, or adapters, from any other's."""
    if "key" in checkpoint:  # of merged adapters that of their parts: sums differ by processor
        return checkpoint["key"]
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(checkpoint["model"].items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def with_base(checkpoint: dict, base: dict, path: Path) -> dict:
    """A checkpoint of adapters, merged into what they adapt; UserError where that has changed."""
    lora = checkpoint["lora"]
    if model_key(base) != lora["key"]:
        raise UserError(
            f"{lora['base']} is no longer the model that {path} adapts",
            "restore the original base checkpoint",
        )
    weights = merge_lora(base["model"], checkpoint["model"], lora["scale"])
    if not checkpoint["config"]["scalar_head"]:
        weights.pop("score.weight", None)
    parts = f"{lora['key']}/{model_key(checkpoint)}/{lora['scale']}"
    return {**checkpoint, "model": weights, "original": False, "key": sha256(parts.encode())}


def find_base(lora: dict, path: Path) -> Path:
    """The checkpoint that the adapters in `path` belong to: where it was, or moved with them."""
    if not isinstance(lora, dict) or not isinstance(lora.get("base"), str):
        raise UserError(f"{path} is damaged (its field lora)", "use an earlier checkpoint")
    base = Path(lora["base"])
    places = [base, path.parent / str(lora.get("relative", base.name)), path.with_name(base.name)]
    found = [place for place in places if place.exists() and place.resolve() != path.resolve()]
    if not found:
        raise UserError(
            f"{base}, which {path} adapts, is not there",
            "put it back, or keep the folders of both side by side",
        )
    return found[0]


def refuse_broken_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Raise UserError where a weight is no tensor, or NaN or infinite."""
    for name, weight in weights.items():
        if not isinstance(weight, Tensor):
            raise UserError(f"{path} is damaged (its weight {name})", "use an earlier checkpoint")
        if weight.is_floating_point() and not weight.isfinite().all():
            raise UserError(
                f"{path} holds weights that are NaN or infinite (in {name})",
                "use an earlier checkpoint, and train on with a lower --lr",
            )


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint of any age, ready to build from: with plain names, rotary pairs half-split and
    adapters merged; its tokenizer may be None. UserError where it cannot be used."""
    path = checkpoint_path(path)
    checkpoint = read_checkpoint(path)
    if lora := checkpoint.get("lora"):
        return with_base(checkpoint, load_checkpoint(find_base(lora, path)), path)
    original = "rope_layout" not in checkpoint["config"]
    weights = {WRAPPERS.sub("", str(name)): w for name, w in checkpoint["model"].items()}
    if original:  # it saved buffers too
        weights = {n: w for n, w in weights.items() if n.endswith((".weight", ".bias"))}
    refuse_broken_weights(weights, path)
    try:
        config = whole_config(checkpoint["config"], weights, path)
    except BROKEN as fault:
        raise UserError(
            f"{path} is of another program or a newer version ({fault})",
            "name a ckpt_*.pt of this one, or update it",
        ) from fault
    turned = (config.n_head + config.kv_heads) * config.head_size
    for name in [name for name in weights if original and name.endswith("attn.qkv.weight")]:
        pairs = weights[name][:turned].view(-1, config.head_size // 2, 2, config.d_model)
        half = pairs.transpose(1, 2).reshape(turned, config.d_model)  # (x0 x2 …)(x1 x3 …)
        weights[name] = torch.cat((half, weights[name][turned:]))
    return {
        **checkpoint,
        "model": weights,
        "config": asdict(config),
        "tokenizer": checkpoint.get("tokenizer"),
        "original": original,
    }


def build_model(checkpoint: dict, device: torch.device) -> Transformer:
    """The model of a loaded checkpoint, in evaluation mode."""
    with torch.device("meta"):
        model = Transformer(ModelSettings(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"], assign=True)
    if model.config.tie:
        model.lm_head.weight = model.tok_emb.weight
    return model.float().to(device).eval().requires_grad_(False)


def tokenizer_of(checkpoint: dict, spm: str, path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint, or --spm; raises UserError where neither fits."""
    own, ids = checkpoint["tokenizer"], checkpoint["config"]["vocab_size"]
    if not spm and not own:
        raise UserError(f"{path} carries no tokenizer", "name its tokenizer.model with --spm")
    tokenizer = Tokenizer.load(spm) if spm else Tokenizer(bytes(own), f"the tokenizer in {path}")
    if tokenizer.vocab_size > ids:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {ids}",
            "name the tokenizer.model that this model was trained with",
        )
    return tokenizer


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
    """The newest whole checkpoint of a run, or None where there is no run."""
    candidates = [*out.glob("ckpt_last.pt"), *numbered(out)]
    if not candidates:
        return None
    if not resume:
        raise UserError(f"{out} already holds a run", "name another --out_dir, or drop --resume 0")
    for path in candidates:
        try:
            read_checkpoint(path, verify=True)
            return path
        except UserError as fault:
            say(f"warning: {fault.faults[0][0]}; trying the one before it")
    raise UserError(f"every checkpoint in {out} is damaged", "start in another --out_dir")


def save_weights(out: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    """pytorch_model.bin, config.json and tokenizer.model, for programs that want plain weights."""
    save_checkpoint(
        out / "pytorch_model.bin",
        {name: w.detach().cpu() for name, w in model.state_dict().items()},
    )
    with atomic_write(out / "config.json", "w") as file:
        json.dump(asdict(model.config), file, indent=1)
    with atomic_write(out / "tokenizer.model") as file:
        file.write(tokenizer.data)


# ==================================================================================================
# Metrics: figures of a run to files and services, and the progress line
# ==================================================================================================


def cut_log(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a last line cut short, so that a run's log goes on."""
    if not path.exists():
        return
    kept = []
    # Not splitlines(): a text may hold U+2028, U+2029 or U+0085.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    with atomic_write(path, "w") as file:
        file.writelines(kept)


def open_sinks(run: RunSettings, out: Path, step: int) -> Iterator[Callable[[dict], None]]:
    if run.wandb:
        name = out / "wandb_id"
        if not name.exists():
            name.write_text(os.urandom(8).hex(), encoding="utf-8")
        service = need("wandb").init(
            project=run.wandb,
            dir=str(out),
            config=asdict(run),
            resume="allow",
            name=out.name,
            id=name.read_text(encoding="utf-8"),
        )
        yield lambda row: service.log(row, step=row["step"])
    if run.tensorboard:
        tensorboard = need("torch.utils.tensorboard", "tensorboard")
        writer = tensorboard.SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        yield lambda row: [
            writer.add_scalar(key, value, row["step"])
            for key, value in row.items()
            if "/" in key and value is not None
        ]


def profiler(run: RunSettings, out: Path, talks: bool):
    """Watches steps 5 to 4 + --profile of this start, then tells what took longest; on request."""

    def tell(watched) -> None:
        watched.export_chrome_trace(str(out / "profile.json.gz"))
        where = "device" if torch.cuda.is_available() else "cpu"
        say(
            watched.key_averages().table(f"self_{where}_time_total", row_limit=10),
            f"{out / 'profile.json.gz'} opens in ui.perfetto.dev",
        )

    if not (run.profile and talks):
        return contextlib.nullcontext()
    when = torch.profiler.schedule(wait=3, warmup=1, active=run.profile, repeat=1)
    return torch.profiler.profile(schedule=when, on_trace_ready=tell)


def report(prefix: str, names: tuple[str, ...], values: Iterable[float]) -> dict[str, float]:
    """Metrics under their prefix; bins of calibration as the one error they add up to."""
    pairs = list(zip(names, values, strict=True))
    row = {f"{prefix}/{name}": value for name, value in pairs if name != "bin"}
    bins = [abs(value) for name, value in pairs if name == "bin"]
    return {**row, f"{prefix}/calibration_error": sum(bins)} if bins else row


def curve(values: list[float], width: int = 60, height: int = 8) -> str:
    """Numbers as a drawing for the terminal, from the first at the left to the last."""
    columns = [np.mean(part) for part in np.array_split(values, min(width, len(values)))]
    levels = np.linspace(max(columns), min(columns), height)
    return "\n".join(
        f"{level:7.3f} " + "".join(" █"[int(value >= level)] for value in columns)
        for level in levels
    )


class Metrics:
    """What a run tells its logs, services and progress line, read off the device when it does."""

    def __init__(
        self,
        out: Path,
        run: RunSettings,
        machine: Machine,
        flops: int,
        state: dict,
        names: tuple[str, ...] = ("loss",),
    ):
        self.out = out
        self.run = run
        self.machine = machine
        self.flops = flops
        self.names = names
        zeros = (0.0,) * (len(names) + 1)
        self.sums = torch.tensor(state.get("sums", zeros), device=machine.device)
        self.step = state.get("step", 0)
        self.steps = state.get("steps", 0)  # since the last line
        self.tokens = state.get("tokens", 0)
        self.stopwatch = time.monotonic()
        self.timed_tokens = 0
        self.began = self.stopwatch - state.get("seconds", 0.0)  # earlier sessions included
        self.progress = Progress("training", run.max_steps, "steps", self.step, machine.main)
        self.note = ""
        self.sinks: list[Callable[[dict], None]] = []
        if machine.main:
            for log in ("metrics.jsonl", "samples.jsonl"):
                cut_log(out / log, self.step or -1)
            self.sinks = list(open_sinks(run, out, self.step))

    def add(self, step: int, losses: Tensor, norm: Tensor, tokens: int) -> None:
        """One step: its mean losses and gradient norm, still on the device, and its tokens."""
        self.sums += torch.cat((losses.detach().float().view(-1), norm.detach().float().view(1)))
        self.step, self.steps, self.tokens = step, self.steps + 1, self.tokens + tokens
        self.timed_tokens += tokens
        self.progress.update(step, self.note)

    def totals(self) -> list[float]:
        """Losses and gradient norm summed since the last line; UserError where one is no number."""
        *losses, norm = self.sums.tolist()
        totals = [total / self.machine.world for total in self.machine.all_reduce_sum(*losses)] + [
            norm
        ]
        if not math.isfinite(sum(totals)):
            raise UserError(
                f"the loss or its gradient is no longer a number at step {self.step}",
                "resume with a lower --lr, more --warmup_steps, or --dtype fp32",
            )
        return totals

    def row(self, lr: float) -> dict:
        """The figures since the last row, which starts the next."""
        *losses, norm = (total / max(1, self.steps) for total in self.totals())
        speed = self.timed_tokens / max(time.monotonic() - self.stopwatch, 1e-9)
        peak = peak_flops(self.machine.device)
        mfu = speed * self.flops / (peak * self.machine.world) if peak else None
        row = {
            **report("train", self.names, losses),
            "train/grad_norm": norm,
            "train/lr": lr,
            "perf/tok_per_s": round(speed, 1),
            "perf/mfu": mfu,
        }
        if self.machine.device.type == "cuda":
            row["gpu/memory_gb"] = torch.cuda.max_memory_allocated(self.machine.device) / 1e9
        if self.run.usd_per_hour:
            row["cost/usd"] = self.elapsed() / 3600 * self.run.usd_per_hour
        self.note = f"loss {row['train/loss']:.4f} lr {lr:.2e} {short(speed)} tok/s"
        if mfu is not None:
            self.note += f" mfu {mfu:.1%}"
        if "cost/usd" in row:
            self.note += f" ${row['cost/usd']:.2f}"
        self.sums.zero_()
        self.steps, self.timed_tokens, self.stopwatch = 0, 0, time.monotonic()
        return row

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def write(self, row: dict) -> None:
        """One line of metrics.jsonl and the services, if there is anything to tell."""
        if not row or not self.machine.main:
            return
        row = {"step": self.step, "tokens": self.tokens, "time": round(self.elapsed(), 3), **row}
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        for sink in self.sinks:
            sink(row)

    def write_samples(self, rows: list[dict], aloud: bool = True) -> None:
        """Answers of the model, a line each in samples.jsonl and, aloud, on the terminal."""
        with (self.out / "samples.jsonl").open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json_line({"step": self.step, **row}))
        for row in rows if aloud else ():
            reward = f"  reward {row['reward']:.2f}" if "reward" in row else ""
            say(f"  {row['prompt']!r} -> {row['answer']!r}{reward}")

    @contextlib.contextmanager
    def aside(self):
        """Time spent here, in evaluation or saving, does not count as training speed."""
        began = time.monotonic()
        yield
        self.stopwatch += time.monotonic() - began

    def state(self) -> dict:
        """What a resumed run's log goes on from; every rank calls it, for each holds its losses."""
        return {
            "sums": self.totals(),
            "steps": self.steps,
            "tokens": self.tokens,
            "seconds": self.elapsed(),
            "step": self.step,
        }


# ==================================================================================================
# Trainer: the one training loop, given a loss
# ==================================================================================================

COMPILE_REPAYS_S = 600.0  # of estimated eager training, from which torch.compile is worth its wait

ASSUMED_FLOPS = {("cpu", torch.float32): 1e11, ("cpu", torch.bfloat16): 1e12}  # eager, sustained

SAME_ON_RESUME = (
    "seed",
    "seq_len",
    "optimizer",
    "pack",
    "loss",
    "advantage",
    "lora_rank",
    "lora_alpha",
    "lora_targets",
    "lora_base",
    "data_key",
    "reference",
)

NOT_SAME = {
    "data_key": "other rows in --data",
    "reference": "another reference, or none",
    "lora_base": "it adapts another model",
}  # where no flag of the name tells it


NOT_TOLD_AS_CHANGED = ("resume", "profile", "preset", "threads", "step_samples", "data_key")


@dataclass
class Job:
    """What one trainer gives the loop: evaluate(module) runs on every rank, samples(model) on rank
    0; less is better of the metric `best`; names of the loss's sums; lora: what adapters adapt."""

    kind: str
    model: Transformer
    loss: Callable[..., Tensor]
    stream: Stream
    evaluate: Callable[[nn.Module], dict[str, float]]
    tokenizer: Tokenizer
    names: tuple[str, ...] = ("loss",)
    samples: Callable[[Transformer], list[dict]] | None = None
    lora: dict | None = None
    best: str = "val/loss"

    def step_samples(self, run: RunSettings, world: int) -> int:
        return self.stream.per_step or run.batch_size * run.grad_accum_steps * world

    @property
    def sample_tokens(self) -> float:
        return self.stream.tokens / self.stream.count


def can_compile(device: torch.device) -> bool:
    compilers = (os.environ.get("CXX") or "g++", "clang++", "cl")
    return device.type != "mps" and any(map(shutil.which, compilers))


def wants_compile(choice: str, flops: float, machine: Machine) -> bool:
    """Whether to compile: as told, or by the estimated length of the run, alike on a resume."""
    if choice != "auto":
        return choice == "1"
    # A guess good enough to choose by, too rough to be told: a run's first steps tell the time.
    key = (machine.device.type, machine.dtype)
    speed = ASSUMED_FLOPS.get(key) or 0.3 * (peak_flops(machine.device) or 1e14)
    if flops / speed / machine.world < COMPILE_REPAYS_S:
        say("not compiling: the run is short (--compile 1 compiles)")
        return False
    if not can_compile(machine.device):
        say("not compiling: no C++ compiler is found")
        return False
    say("compiling first, which a run of this length repays (--compile 0 skips it)")
    return True


def load_optimizers(optimizers: list[torch.optim.Optimizer], states: list[dict]) -> None:
    """Their states as saved, under the flags of this start."""
    for optimizer, saved in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": saved["state"]})


class Trainer:
    """One run: its model, optimiser and counters, and the steps that move them."""

    def __init__(
        self,
        job: Job,
        machine: Machine,
        run: RunSettings,
        optim: OptimSettings,
        args: dict,
        saved: dict | None,
    ):
        self.job, self.machine, self.run, self.optim, self.args = job, machine, run, optim, args
        self.out = Path(run.out_dir)
        saved = saved or {}  # the model has its weights
        self.step, self.samples = saved.get("step", 0), saved.get("samples", 0)
        self.best_val = saved.get("best_val", math.inf)
        self.optimizers = make_optimizers(job.model, optim, machine.device)
        self.ema = EMA(job.model, optim.ema, saved.get("ema")) if optim.ema else None
        self.averaged = self.ema.in_place if self.ema else contextlib.nullcontext
        self.scaler = torch.amp.GradScaler(
            machine.device.type, enabled=machine.dtype == torch.float16
        )
        if saved:
            load_optimizers(self.optimizers, saved["optim"])
        if saved.get("scaler"):
            self.scaler.load_state_dict(saved["scaler"])
        flops = flops_per_token(job.model.config)
        objective = Objective(job.model, job.loss)
        self.step_samples = job.step_samples(run, machine.world)
        total = float(flops) * run.max_steps * self.step_samples * job.sample_tokens
        self.compiled = wants_compile(run.compile, total, machine)
        if self.compiled:
            objective = torch.compile(objective, dynamic=False)
        self.objective, self.wrapped = objective, distribute(objective, machine)
        self.metrics = Metrics(self.out, run, machine, flops, saved.get("gauges", {}), job.names)

    def checkpoint(self) -> dict:
        model, lora = self.job.model, self.job.lora
        weights = trained_weights(model) if lora else model.state_dict()
        return {  # its gauges refuse a model whose loss is no number
            "format": CHECKPOINT_FORMAT,
            "kind": self.job.kind,
            "step": self.step,
            "samples": self.samples,
            "best_val": self.best_val,
            "model": {name: weight.detach() for name, weight in weights.items()},
            "config": asdict(model.config),
            "lora": lora,
            "optim": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.weights if self.ema else None,
            "rng": {"seed": self.args["seed"]},  # each step is seeded by (seed, step, rank)
            "args": {**self.args, "step_samples": self.step_samples},
            "gauges": self.metrics.state(),
            "tokenizer": self.job.tokenizer.data,
        }

    def due(self, interval: int) -> bool:
        return self.step % interval == 0 or self.step == self.run.max_steps

    def train_step(self, stop: int) -> bool:
        """One optimiser step over all ranks; whether any rank was told to stop."""
        run, machine = self.run, self.machine
        batch = self.job.stream.step(
            self.samples, run.batch_size, run.grad_accum_steps, machine.rank, machine.world
        )
        targets, tokens, stops = machine.all_reduce_sum(batch.targets, batch.tokens, stop)
        seed_step(self.args["seed"], self.step, machine.rank)
        lr = set_step(self.optimizers, self.optim, self.step, run.max_steps)
        losses = sum(self.accumulate(self.wrapped, batch.micros, machine.world / targets))
        norm = self.update(self.job.model, self.optimizers)
        self.step += 1
        if self.ema:
            self.ema.update(self.step)
        self.samples += batch.samples
        self.metrics.add(self.step, losses, norm, int(tokens))
        row = self.metrics.row(lr) if self.due(run.log_interval) else {}
        if self.due(run.eval_interval):
            row |= self.evaluate()
        self.metrics.write(row)
        return bool(stops)

    def accumulate(
        self, wrapped: nn.Module, micros: Iterable[tuple[Tensor, ...]], scale: float
    ) -> list[Tensor]:
        """Add up the gradient of the micro-batches' losses times `scale`; these, one by one."""
        found, micros = [], list(micros)
        for i, micro in enumerate(micros):
            tensors = [self.machine.to_device(t) for t in micro]
            with no_sync(wrapped, i + 1 == len(micros)):
                with self.machine.autocast():
                    losses = wrapped(*tensors) * scale
                self.scaler.scale(losses[0]).backward()
            found.append(losses.detach())
        return found

    def update(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Tensor:
        """Clip, step and clear; the gradient norm before clipping."""
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), self.optim.grad_clip or math.inf)
        if self.scaler.is_enabled() and not norm.isfinite():
            norm = torch.zeros_like(norm)  # fp16 overflows now and then: no optimiser steps
        else:
            for optimizer in optimizers:
                self.scaler.step(optimizer)
        model.zero_grad(set_to_none=True)
        self.scaler.update()
        return norm

    def evaluate(self) -> dict[str, float]:
        """Validation metrics; a new best is saved at once."""
        self.metrics.totals()  # refuses a model whose loss is no number
        with self.metrics.aside(), self.averaged():
            self.objective.eval()
            with torch.no_grad(), self.machine.autocast():
                row = self.job.evaluate(self.objective)
                if self.job.samples and self.machine.main:
                    self.metrics.write_samples(self.job.samples(self.job.model))
            self.objective.train()
            if not math.isfinite(sum(row.values())):
                raise UserError(
                    f"the evaluation at step {self.step} gave no number",
                    "resume with a lower --lr, or --dtype fp32",
                )
            if row.get(self.job.best, math.inf) < self.best_val:
                self.best_val = row[self.job.best]
                self.machine.on_main(save_checkpoint, self.out / "ckpt_best.pt", self.checkpoint())
        if self.machine.main and not self.metrics.progress.bar and row:
            figures = " ".join(f"{key} {value:.4f}" for key, value in row.items())
            say_aside(f"step {self.step}: {figures}")
        return row

    def save(self) -> None:
        with self.metrics.aside():
            self.machine.on_main(save_step, self.out, self.checkpoint(), self.run.keep_last)

    def fit(self) -> int:
        """Train to max_steps or to a signal; the exit code."""
        self.objective.train()
        watch = profiler(self.run, self.out, self.machine.main)
        with Signals() as signals, watch as watched:
            stop = False
            while self.step < self.run.max_steps and not stop:
                stop = self.train_step(signals.received)
                if watched:
                    watched.step()
                if stop or self.due(self.run.ckpt_interval):
                    self.save()
        self.metrics.progress.close()
        if self.step < self.run.max_steps:
            world = self.machine.world
            launcher = f"torchrun --nproc_per_node={world}" if world > 1 else "python"
            say(
                f"stopped at step {self.step}, saved; go on with:",
                f"  {launcher} {PROGRAM} "
                f"{self.job.kind} @{shlex.quote(str(self.out / 'args.txt'))}",
            )
            return 128 + (signals.received or signal.SIGTERM)
        with self.averaged():
            if self.ema and self.best_val == math.inf:  # nothing was evaluated: the last is best
                self.machine.on_main(save_checkpoint, self.out / "ckpt_best.pt", self.checkpoint())
            if not self.job.lora:
                self.machine.on_main(save_weights, self.out, self.job.model, self.job.tokenizer)
        return 0


def keep_step_size(run: RunSettings, saved: dict, world: int) -> None:
    """Keep a step what it was on another number of ranks, unless new flags say what it is."""
    old, now = saved["args"], run.batch_size * run.grad_accum_steps * world
    same = (old["batch_size"], old["grad_accum_steps"]) == (run.batch_size, run.grad_accum_steps)
    if now == old["step_samples"] or not same:
        return
    share, rest = divmod(old["step_samples"], world)
    if rest:
        raise UserError(
            f"a step of {old['step_samples']} sequences cannot be shared by {world} ranks",
            "give new --batch_size and --grad_accum_steps",
        )
    run.batch_size = max(b for b in divisors(share) if b <= run.batch_size)
    run.grad_accum_steps = share // run.batch_size
    say(
        f"resuming on {world} ranks: --batch_size {run.batch_size} --grad_accum_steps "
        f"{run.grad_accum_steps} keeps a step at {old['step_samples']} sequences"
    )


def check_same_run(
    saved: dict, kind: str, config: ModelSettings, tokenizer: Tokenizer, args: dict, out: Path
) -> None:
    """Raise UserError where the run in `out` is of another model, tokenizer or trainer."""
    if saved.get("kind") != kind or "gauges" not in saved:
        raise UserError(
            f"{out} holds a run of {saved.get('kind', 'the original program')}, not of {kind}",
            "name another --out_dir",
        )
    same = [key for key in SAME_ON_RESUME if key in args]
    new = {**asdict(config), **{key: args[key] for key in same}}
    old = {"scalar_head": False, **saved["config"], **{k: saved["args"].get(k) for k in same}}
    unlike = [
        NOT_SAME.get(k) or f"--{k} {old.get(k)} (now {new[k]})"
        for k in new
        if old.get(k) != new[k] and k != "dropout"
    ]
    unlike += ["another tokenizer"] * (sha256(saved["tokenizer"]) != tokenizer.sha256)
    if unlike:
        raise UserError(
            f"{out} holds another run: {', '.join(unlike)}",
            f"name another --out_dir, or repeat the run's own flags: {kind} @{out}/args.txt",
        )


def changed_flags(old: dict, new: dict) -> list[str]:
    """Flags that differ between the arguments of a run and those of its resumption, in words."""
    names = [name for name in new if name in old and name not in NOT_TOLD_AS_CHANGED]
    return [f"{name} {old[name]} → {new[name]}" for name in names if old[name] != new[name]]


def resume(job: Job, machine: Machine, run: RunSettings, args: dict) -> dict | None:
    """What the run in --out_dir goes on from, its weights in the model; None where none is."""
    out = Path(run.out_dir)
    newest = machine.on_main(newest_whole, out, run.resume)  # that rank 0 finds whole
    if not newest:
        return None
    saved = read_checkpoint(newest)
    check_same_run(saved, job.kind, job.model.config, job.tokenizer, args, out)
    if changed := changed_flags(saved["args"], args):
        say(f"changed since step {saved['step']}: {', '.join(changed)}")
    if not job.stream.per_step:
        keep_step_size(run, saved, machine.world)
    try:
        job.model.load_state_dict(saved["model"], strict=not job.lora)
    except (RuntimeError, AttributeError, TypeError) as fault:
        raise UserError(
            f"{newest} is damaged (its weights do not fit its config)",
            "remove it: the one before it is used then",
        ) from fault
    return saved


def describe_run(job: Job, machine: Machine, run: RunSettings, saved: dict | None) -> None:
    """Say what is trained, where, and on how much."""
    config, stream = job.model.config, job.stream
    total = parameter_counts(config)["total"]
    samples = job.step_samples(run, machine.world)
    step_tokens = samples * job.sample_tokens
    model = f"{short(total)} parameters"
    if run.preset:
        model = f"{run.preset}, {model}"
    if job.lora:
        trained = sum(weight.numel() for weight in trained_weights(job.model).values())
        model += f", {trained / total:.1%} of them trained"
    epochs = samples * run.max_steps / stream.count
    say(
        f"model: {model}, {config.n_layer} layers, context {config.seq_len}",
        f"machine: {machine.world} x {machine.device.type}, {str(machine.dtype)[len('torch.') :]}",
        f"data: {short(stream.tokens)} training tokens; a step has {step_tokens:,.0f}, "
        f"the run {short(step_tokens * run.max_steps)} ({epochs:.2g} epochs)",
    )
    if saved:
        say(f"resuming {run.out_dir} after step {saved['step']}")


def say_what_next(trainer: Trainer) -> None:
    """Say that the run is done, and the commands that use its model."""
    job = trainer.job
    folder = shlex.quote(str(trainer.out))
    newest = shlex.quote(str(checkpoint_path(trainer.out)))
    chat = "" if job.kind == "train" else " --chat"
    commands = [
        f'{PROGRAM} generate --ckpt {folder}{chat} --prompt "…"',
        f"convert_to_llama.py --ckpt {newest} --out {folder}/hf",
    ]
    if job.kind == "reward":
        commands = [f"{PROGRAM} reward --ckpt {folder} --score rows.jsonl"]
    best = ""
    if trainer.best_val < math.inf:
        best = f"best {job.best} {trainer.best_val:.4f}; "
    say(
        f"done after {trainer.step} steps in {duration(trainer.metrics.elapsed())}; {best}next:",
        *(f"  python {command}" for command in commands),
    )


def train_job(
    job: Job,
    machine: Machine,
    run: RunSettings,
    optim: OptimSettings,
    groups: tuple,
    told: dict,
    epochs: float = 1.0,
    make: Callable[..., Trainer] = Trainer,
) -> int:
    """Train from the start or where the run in --out_dir stands; its args are `groups`, `told`."""
    out = Path(run.out_dir)
    args, args_text = settings_dict(*groups) | told, settings_text(*groups)
    saved = resume(job, machine, run, args)
    job.model.to(machine.device).grad_checkpoint = run.grad_checkpoint
    if not run.max_steps:
        samples = job.step_samples(run, machine.world)
        run.max_steps = max(1, math.ceil(epochs * job.stream.count / samples))

    def begin() -> None:  # OSError here costs no paid hour
        with atomic_write(out / "args.txt", "w") as file:
            file.write(args_text)
        for half in out.glob(".ckpt_*.tmp"):  # left by a kill in the middle of writing
            half.unlink()

    machine.on_main(begin)
    describe_run(job, machine, run, saved)
    trainer, saved = make(job, machine, run, optim, args, saved), None  # frees it
    code = trainer.fit()
    if code == 0:
        say_what_next(trainer)
    return code


# ==================================================================================================
# Evaluation: how good is a model
# ==================================================================================================


def expert_usage(model: Transformer, machine: Machine) -> dict[str, float]:
    """The least and most used expert's share times the experts (1 is even) since the last call."""
    shares = []
    for block in model.blocks:
        if not isinstance(block.mlp, MoE):
            continue
        usage = machine.all_reduce_sum(*block.mlp.usage.tolist())
        shares += [share / max(1.0, sum(usage)) * len(usage) for share in usage]
        block.mlp.usage.zero_()
    if not shares:
        return {}
    return {"moe/least": min(shares), "moe/most": max(shares)}


def validate(
    module: nn.Module,
    parts: list[tuple[str, float, Batches]],
    machine: Machine,
    names: tuple[str, ...] = ("loss",),
) -> dict[str, float]:
    """val/* of an Objective over the parts (name, weight, batches) of all ranks, weighted as
    trained; val/loss/NAME of each named one. A part without targets is passed over."""
    by_domain, means, weights = {}, [], []
    for name, weight, batches in parts:
        found, targets = [torch.zeros(len(names))], 0
        for micro, size in batches:
            tensors = [machine.to_device(tensor) for tensor in micro]
            found.append(module(*tensors).view(-1))
            targets += size

        sums = torch.stack([part.cpu() for part in found]).double().sum(0)
        *sums, targets = machine.all_reduce_sum(*sums.tolist(), targets)
        if not targets:
            continue
        means.append([total / targets for total in sums])
        weights.append(weight)
        if name:
            by_domain[f"val/loss/{name}"] = means[-1][0]
    if not means:
        return {}
    weighted = np.average(means, axis=0, weights=weights).tolist()
    return {**report("val", names, weighted), **by_domain}


def perplexity(
    module: nn.Module,
    domains: list[tuple[str, TokenFolder, float]],
    batch_size: int,
    machine: Machine,
    seq_len: int,
    most: int,
) -> dict[str, float]:
    """val/loss (nats a token), val/ppl and val/bpb of the validation splits, weighted as trained;
    val/loss/NAME of each named domain. `module` is an Objective of pretrain_loss."""
    expert_usage(module.model, machine)  # count from here
    filled = [d for d in domains if len(d[1].val) > 1]
    parts = []
    for name, folder, weight in filled:
        windows = EvaluationWindows(folder.val[: most + 1], seq_len, batch_size)
        batches = windows.in_order(batch_size, most, machine.rank, machine.world)
        parts.append((name, weight, batches))
    row = validate(module, parts, machine)
    if not row:
        return {}
    span = np.average([d[1].bytes_per_token("val") for d in filled], weights=[d[2] for d in filled])
    row["val/ppl"] = math.exp(min(row["val/loss"], 700.0))
    row["val/bpb"] = float(row["val/loss"] / math.log(2) / max(span, 1e-9))
    return row | expert_usage(module.model, machine)


@torch.inference_mode()
def row_logps(model: Transformer, stream: Groups, batch_size: int, machine: Machine) -> np.ndarray:
    """Log-probability of every answer of a stream (count, g), each rank doing its share."""
    result = np.zeros(stream.numbers.shape)
    mine = np.arange(machine.rank, stream.count, machine.world)
    progress = Progress("reference log-probs", len(mine), "rows", talks=machine.main)
    for i in range(0, len(mine), batch_size):
        places = mine[i : i + batch_size]
        micro = stream.collate(stream.items(places))
        ids, targets = machine.to_device(micro.ids), machine.to_device(micro.targets)
        with machine.autocast():
            logps, _ = sequence_logps(model, ids, targets)
        result[places] = logps.view(len(places), -1).cpu()
        progress.update(min(len(mine), i + batch_size))
    progress.close()
    return np.array(machine.all_reduce_sum(*result.flatten())).reshape(result.shape)


@torch.inference_mode()
def score_answers(
    model: Transformer, tokenizer: Tokenizer, chats: list[Turns], batch_size: int, machine: Machine
) -> list[float]:
    """A reward model's score of the last answer of each conversation, of long ones by their end."""
    limit = model.config.seq_len
    scores: list[float] = []
    read = [np.array(encode_chat(tokenizer, turns)[0][-limit:]) for turns in chats]
    groups = [[Example(ids, np.arange(len(ids)) == len(ids) - 1)] for ids in read]
    stream = Groups(groups, np.zeros((len(groups), 0)), limit, 0)
    for micro, _ in stream.in_order(batch_size, stream.tokens, 0, 1):
        ids, targets = machine.to_device(micro.ids), machine.to_device(micro.targets)
        with machine.autocast():
            found, _ = reward_scores(model, ids, targets)
        scores += found.tolist()
    return scores


def sample_answers(
    model: Transformer, tokenizer: Tokenizer, questions: list[Turns], most: int, dtype: torch.dtype
) -> list[dict]:
    """The likeliest answers to fixed questions, as rows of samples.jsonl."""
    prompts, eos = [encode_chat(tokenizer, q, reply=True)[0] for q in questions], tokenizer.eos
    answers = complete(model, prompts, SamplingSettings(most, 0.0), 0, frozenset({eos}), dtype)
    return [
        {"prompt": turns[-1][1], "answer": tokenizer.decode(ids), "ended": ids[-1:] == [eos]}
        for turns, ids in zip(questions, answers, strict=True)
    ]


def open_judge(path: str, spm: str, machine: Machine) -> tuple[Transformer, Tokenizer]:
    """A reward model; raises UserError where the checkpoint is none."""
    saved = load_checkpoint(path)
    if not saved["config"].get("scalar_head"):
        raise UserError(f"{path} is no reward model", f"train one: python {PROGRAM} reward --help")
    return build_model(saved, machine.device), tokenizer_of(saved, spm, path)


# ==================================================================================================
# Tasks and rewards: rows made by rule, and functions that score completions
# ==================================================================================================

OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def arithmetic(text: str) -> Fraction:
    """The value of an expression of whole numbers, + - * / and brackets; else ValueError."""

    def value(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        parts = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
        return OPERATIONS[type(node.op)](*map(value, parts))

    refuse(not re.fullmatch(r"[\d\s()+*/-]*", text), "no arithmetic")  # 1_2 and # 3 are Python too
    try:
        return value(ast.parse(text.strip(), mode="eval").body)
    except (
        SyntaxError,
        AttributeError,
        KeyError,
        ZeroDivisionError,
        RecursionError,
        MemoryError,
    ) as fault:  # most are of nodes that have no place here
        raise ValueError("no arithmetic") from fault


def add_row(rng: random.Random, digits: int) -> dict:
    """A sum of numbers of two (one, where --difficulty is 1) to so many digits."""
    sizes = [rng.randint(min(2, digits), digits) for _ in "ab"]
    a, b = (rng.randrange(10 ** (n - 1) if n > 1 else 0, 10**n) for n in sizes)
    return {"prompt": f"What is {a} + {b}?", "answer": str(a + b)}


def countdown_row(rng: random.Random, count: int) -> dict:
    """Numbers that make a target; the response only shows the form, and is right by chance."""
    numbers = [rng.randint(1, 12) for _ in range(max(2, count))]

    def expression() -> str:
        words = [str(n) for n in rng.sample(numbers, len(numbers))]
        return words[0] + "".join(f" {rng.choice('+-*')} {word}" for word in words[1:])

    target = next(n for _ in range(1000) if 0 < (n := arithmetic(expression())) < 100)
    return {
        "prompt": f"Make {target} from {', '.join(map(str, numbers))}.",
        "response": expression(),
        "answer": str(target),
        "numbers": numbers,
    }


def sort_row(rng: random.Random, count: int) -> dict:
    numbers = [rng.randrange(100) for _ in range(count + 1)]
    return {
        "prompt": f"Sort {' '.join(map(str, numbers))}.",
        "answer": " ".join(map(str, sorted(numbers))),
    }


def copy_row(rng: random.Random, count: int) -> dict:
    letters = " ".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(count + 1))
    return {"prompt": f"Repeat {letters}.", "answer": letters}


TASKS = {"add": add_row, "countdown": countdown_row, "sort": sort_row, "copy": copy_row}

TASK_REWARDS = {"add": "number", "countdown": "countdown", "sort": "exact", "copy": "exact"}


def task_rows(settings: TaskSettings, seed: int) -> list[dict]:
    """Different rows of --task, the same for the same seed; fewer where there are not so many."""
    rows = {}
    for i in range(20 * settings.task_rows):
        rng = random.Random(f"{seed}/{settings.task}/{settings.difficulty}/{i}")
        row = TASKS[settings.task](rng, settings.difficulty)
        rows.setdefault(row["prompt"], {"response": row["answer"], **row})
        if len(rows) == settings.task_rows:
            break
    return list(rows.values())


NUMBER = re.compile(  # a minus behind a number or a word subtracts
    r"(?P<minus>(?<![\w.)])(?<![\d)%]\s)[-−]\s?|[$€£]-)?[$€£]?"
    r"(?:\\[dt]?frac\{(?P<top>-?\d+)\}\{(?P<bottom>\d+)\}"
    r"|(?P<whole>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:\s?/\s?(?P<over>\d+))?)"
    r"\s?(?P<percent>\\?%)?"
)

MARKED = re.compile(
    r"####\s*([^\n]+)|\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}|<answer>(.*?)</answer>"
    r"|\banswer(?: is\b:?|:)\s*(?=([^\n]+))",
    re.I | re.S,
)

CHOICE = re.compile(r"^\W*(?![AI]\s+[\w'])([A-Z])(?![\w'])|\(([A-Z])\)|\b([A-Z])(?=[).:,]|\W*$)")


def marked_answer(text: str) -> str | None:
    """What stands behind the last ####, in the last \\boxed{}, <answer> or after "answer is"."""
    found = [part for match in MARKED.finditer(text) for part in match.groups() if part]
    return found[-1].strip() if found else None


def final_number(text: str) -> tuple[Fraction, bool] | None:
    """The first number of a marked answer, or the last of the text, and if it is a percentage."""
    marked = marked_answer(text)
    shown, place = (text, -1) if marked is None else (marked, 0)
    try:
        match = list(NUMBER.finditer(shown))[place]
        value = Fraction((match["top"] or match["whole"]).replace(",", ""))
        value /= Fraction(match["bottom"] or match["over"] or 1)
    except (IndexError, ValueError, ZeroDivisionError):  # none, thousands of digits, a part of 0
        return None
    return -value if match["minus"] else value, bool(match["percent"])


def number_reward(prompt: str, completion: str, row: dict) -> float:
    """1 where the completion's final number is the answer's, 12 % being 0.12 too."""
    wanted, given = final_number(str(row["answer"])), final_number(completion)
    if wanted is None or given is None:
        return 0.0
    near = wanted[0], wanted[0] * Fraction(100) ** (given[1] - wanted[1])
    return float(any(abs(given[0] - value) <= abs(value) / 10**6 for value in near))


def choice_letter(text: str) -> str | None:
    """The letter that a text chooses: of a marked answer, or at the front, or the last in view."""
    marked = marked_answer(text)
    shown = (text if marked is None else marked).strip()
    found = [letter for match in CHOICE.finditer(shown) for letter in match.groups() if letter]
    first = marked is not None or CHOICE.match(shown)
    return found[0 if first else -1] if found else None


def countdown_reward(prompt: str, completion: str, row: dict) -> float:
    """1 where the row's numbers, each once, make the answer; 0.1 where they make another one."""
    text = (marked_answer(completion) or completion).partition("=")[0]
    numbers, wanted = sorted(map(int, row["numbers"])), int(row["answer"])
    try:
        value = arithmetic(text)
    except ValueError:
        return 0.0
    if sorted(map(int, re.findall(r"\d+", text))) != numbers:
        return 0.0
    return 1.0 if value == wanted else 0.1


REWARDS: dict[str, Callable[[str, str, dict], float]] = {  # of prompt, completion, row
    "number": number_reward,
    "choice": lambda prompt, text, row: float(
        choice_letter(text) == (choice_letter(str(row["answer"])) or "")
    ),
    "exact": lambda prompt, text, row: float(text.strip() == str(row["answer"]).strip()),
    "regex": lambda prompt, text, row: float(re.search(row["pattern"], text) is not None),
    "format": lambda prompt, text, row: float(marked_answer(text) is not None),
    "length": lambda prompt, text, row: -len(text) / 1000,  # a point for 1,000 characters
    "countdown": countdown_reward,
}

REWARD_SPEC = re.compile(r"(.*?)(?::(-?\d*\.?\d+))?", re.S)  # what it is, and its weight

RUN_FILE = functools.cache(runpy.run_path)  # once in each process


def call_user(path: str, name: str, *args) -> float:
    return float(RUN_FILE(path)[name](*args))


class UserReward:
    """A function of the user's file, in a process of its own, so that neither an error nor an
    endless loop nor a crash in it ends the run: that completion gets 0, and it is told once."""

    def __init__(self, path: str, name: str, seconds: float):
        self.path, self.name, self.seconds = path, name, seconds
        self.pool, self.told = None, set()
        tree = ast.parse(Path(path).read_text(encoding="utf-8-sig"), path)
        if name not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
            raise UserError(
                f"{path} has no function {name}",
                f"write def {name}(prompt, completion, row): return a number",
            )

    def __call__(self, prompt: str, completion: str, row: dict) -> float:
        try:
            if self.pool is None:
                start = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
                self.pool = ProcessPoolExecutor(1, start, serve_parent)
                self.pool.submit(os.getpid).result()  # the start takes none of the call's time
            asked = self.pool.submit(call_user, self.path, self.name, prompt, completion, row)
            fault = asked.exception(self.seconds)
        except TooLong:
            fault = TooLong(f"took more than {self.seconds:g} seconds")
        except BrokenProcessPool as broken:  # between two calls
            fault = broken
        if fault is None and math.isfinite(asked.result()):
            return asked.result()
        what = f"{type(fault).__name__}: {fault}" if fault else f"gave {asked.result()}"
        if what not in self.told and len(self.told) < FAULTS_SHOWN:
            self.told.add(what)
            say(f"warning: {self.path}:{self.name} {what}; that completion gets 0")
        if isinstance(fault, (TooLong, BrokenProcessPool)):
            for process in list(self.pool._processes.values()):
                process.kill()
            self.pool = None
        return 0.0


class Rewards:
    """The parts of --reward, each a score of a completion, and their weights; UserError where one
    is neither known, nor a function, nor a reward model."""

    def __init__(self, specs: tuple[str, ...], seconds: float, batch_size: int, machine: Machine):
        self.batch_size, self.machine = batch_size, machine
        self.parts, self.weights = {}, []
        for what, weight in (REWARD_SPEC.fullmatch(spec).groups() for spec in specs):
            name = Path(what).name if Path(what).name not in self.parts else what
            if name in self.parts:
                raise UserError(f"--reward {what} is given twice", "give it once, with a :WEIGHT")
            self.parts[name] = REWARDS.get(what) or self.open(what, seconds)
            self.weights.append(float(weight or 1.0))

    def open(self, what: str, seconds: float) -> object:
        path, _, name = what.partition(".py:")
        path += ".py" if name else ""
        if not what or not Path(path).exists():
            raise UserError(
                f"--reward {what} is neither known, nor FILE.py:FUNCTION, nor a file",
                f"choose {either(REWARDS)}",
            )
        if not name:
            return open_judge(path, "", self.machine)
        try:
            return UserReward(path, name, seconds)
        except (SyntaxError, ValueError) as fault:
            raise UserError(f"{path} cannot be read ({fault})", "mend the file") from fault

    def check(self, row: dict) -> dict:
        """The row; ValueError where a part lacks something in it, or cannot read it."""
        try:
            for name in (name for name in self.parts if name in REWARDS):
                REWARDS[name]("", "1", row)
        except KeyError as fault:
            raise ValueError(f"{fault.args[0]} is missing, which the reward needs") from fault
        except (TypeError, ValueError, OverflowError, re.error) as fault:
            raise ValueError(f"it is not what the reward needs ({fault})") from fault
        return row

    def score(self, asked: list[Problem], texts: list[str]) -> np.ndarray:
        """What each part gives each completion: (completions, parts)."""
        columns = []
        for part in self.parts.values():
            pairs = zip(asked, texts, strict=True)
            if isinstance(part, tuple):
                chats = [[*one.turns, Turn("assistant", text)] for one, text in pairs]
                columns.append(score_answers(*part, chats, self.batch_size, self.machine))
            else:
                columns.append([part(one.turns[-1][1], text, one.row) for one, text in pairs])
        return np.array(columns, dtype=np.float64).T


# ==================================================================================================
# Rollouts: generate, score, advantage, update
# ==================================================================================================

ENTROPY_STEP = 0.005  # by which the bonus moves a step (He et al. 2025, Skywork-OR1, section 5)


@dataclass(frozen=True)
class Completion:
    """A sampled answer: its ids (n,), its text, whether it ended itself, its rewards by part."""

    problem: Problem
    ids: np.ndarray
    text: str
    ended: bool
    scores: np.ndarray
    reward: float

    @property
    def right(self) -> bool:
        return bool(self.scores[0] > 0.5)


class Sampler:
    """Draws completions from a model in training and has them judged."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        rewards: Rewards,
        settings: RolloutSettings,
        machine: Machine,
        compiled: bool,
    ):
        self.model, self.tokenizer, self.rewards = model, tokenizer, rewards
        self.settings, self.machine, self.compiled = settings, machine, compiled
        self.latest: list[list[Completion]] = []

    def draw(
        self, problems: list[Problem], count: int, temperature: float, seed: int, first: int
    ) -> list[list[Completion]]:
        """`count` completions of each problem; `first` numbers the first one, for its chance."""
        s, eos = self.settings, self.tokenizer.eos
        asked = [one for one in problems for _ in range(count)]
        sampling = SamplingSettings(s.max_new_tokens, temperature, 0, 1.0)
        self.model.eval()
        with self.machine.autocast():
            found = complete(
                self.model,
                [one.ids.tolist() for one in asked],
                sampling,
                seed,
                frozenset({eos}),
                self.machine.dtype,
                first,
                s.rollout_batch,
                self.compiled,
            )
        texts = [self.tokenizer.decode(ids) for ids in found]
        scores = self.rewards.score(asked, texts)
        totals = scores @ np.array(self.rewards.weights)
        if s.overlong:
            lengths = torch.tensor(list(map(len, found)))
            totals += overlong_penalty(lengths, s.max_new_tokens, s.overlong).numpy()
        rows = zip(asked, found, texts, scores, totals, strict=True)
        made = [
            Completion(one, np.array(ids), text, ids[-1] == eos, score, float(total))
            for one, ids, text, score, total in rows
        ]
        self.latest = [made[i : i + count] for i in range(0, len(made), count)]
        return self.latest

    def evaluate(self, prompts: Prompts, seed: int) -> dict[str, float]:
        """Of held-out prompts: pass@1, pass@k, mean reward and length, and 1 - pass@1, by which the
        best checkpoint is chosen. Every rank does its share."""
        s, machine = self.settings, self.machine
        places = np.arange(min(prompts.count, s.eval_prompts))
        own = np.array_split(places, machine.world)[machine.rank]
        groups = (
            self.draw(
                prompts.items(own),
                s.eval_samples,
                s.temperature,
                derive_seed(seed, "eval"),
                own[0] * s.eval_samples,
            )
            if len(own)
            else []
        )
        sums = np.zeros(4)
        for group in groups:
            right = [one.right for one in group]
            sums += (
                np.mean(right),
                any(right),
                np.mean([one.reward for one in group]),
                np.mean([len(one.ids) for one in group]),
            )
        first, some, reward, length = (
            total / len(places) for total in machine.all_reduce_sum(*sums)
        )
        return {
            "val/pass@1": first,
            f"val/pass@{s.eval_samples}": some,
            "val/reward": reward,
            "val/length": length,
            "val/error": 1 - first,
        }

    def shown(self) -> list[dict]:
        """A few of the latest completions, as rows of samples.jsonl."""
        return [
            {
                "prompt": one.problem.turns[-1][1],
                "answer": one.text,
                "ended": one.ended,
                "reward": one.reward,
                **dict(zip(self.rewards.parts, one.scores, strict=True)),
            }
            for one, *_ in self.latest[: self.settings.samples]
        ]


class PolicyTrainer(Trainer):
    """Trains a policy on its own completions. A step is one batch of these with all its updates,
    so that a run resumes between two."""

    def __init__(
        self,
        job: Job,
        machine: Machine,
        run: RunSettings,
        optim: OptimSettings,
        args: dict,
        saved: dict | None,
        sampler: Sampler,
        policy: PolicySettings,
        value: ValueSettings,
        critic: Transformer | None,
    ):
        super().__init__(job, machine, run, optim, args, saved)
        self.sampler, self.policy, self.value, saved = sampler, policy, value, saved or {}
        self.share = sampler.settings.prompts // machine.world  # of the prompts
        self.bonus, self.entropy = saved.get("entropy", (0.0, math.inf))
        self.reference = EMA(job.model, 0.0, saved.get("reference")) if policy.kl else None
        self.critic, self.critic_model, self.critic_optimizers = None, critic, []
        if critic is not None:
            loss = Objective(critic, functools.partial(value_loss, clip=value.value_clip))
            self.critic = distribute(
                torch.compile(loss, dynamic=False) if self.compiled else loss, machine
            )
            self.critic_optim = replace(optim, lr=value.value_lr or 2 * optim.lr)
            self.critic_optimizers = make_optimizers(critic, self.critic_optim, machine.device)
            if saved:
                critic.load_state_dict(saved["critic"])
                load_optimizers(self.critic_optimizers, saved["critic_optim"])

    def checkpoint(self) -> dict:
        return {
            **super().checkpoint(),
            "entropy": (self.bonus, self.entropy),
            "critic": self.critic_model.state_dict() if self.critic_model else None,
            "critic_optim": [o.state_dict() for o in self.critic_optimizers],
            "reference": self.reference.weights if self.reference else None,
        }

    def temperature(self) -> float:
        s, way = self.sampler.settings, self.step / max(1, self.run.max_steps - 1)
        return s.temperature + ((s.temperature_end or s.temperature) - s.temperature) * way

    def gather(self) -> tuple[list[Completion], dict[str, float]]:
        """This rank's completions of the step, group by group, and what drawing them took. With
        dynamic sampling groups without a spread are replaced while draws are left; all ranks draw
        equally often, and each has the same number in the end."""
        s, machine = self.sampler.settings, self.machine
        kept, zero_variance, draws, missing = [], [], 0, self.share
        while draws < (s.max_draws if s.dynamic_sampling else 1) and missing:
            first = self.samples + machine.rank * self.share
            lacking = max(0, self.share - len(kept))
            own = first + np.arange(
                min(self.share, 2 * lacking)
            )  # some of these may be zero_variance too
            groups = (
                self.sampler.draw(
                    self.job.stream.samples(own),
                    s.group_size,
                    self.temperature(),
                    derive_seed(self.args["seed"], "rollout"),
                    first * s.group_size,
                )
                if lacking
                else []
            )
            for group in groups:
                (kept if len({one.reward for one in group}) > 1 else zero_variance).append(group)
            self.samples += s.prompts
            draws += 1
            [missing] = machine.all_reduce_sum(max(0, self.share - len(kept)))
        drawn, alike = machine.all_reduce_sum(len(kept) + len(zero_variance), len(zero_variance))
        rows = [one for group in (kept + zero_variance)[: self.share] for one in group]
        return rows, {"train/zero_spread": alike / drawn, "train/draws": draws}

    def micros(self, rows: list[Completion]) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
        """Micro-batches of rows alike in length: which they are, the places of their tokens among
        those of all completions in turn (n,), ids and targets (B, T)."""
        whole, size = [], self.run.batch_size
        for one in rows:
            ids = np.concatenate((one.problem.ids, one.ids))
            whole.append(Example(ids, np.arange(len(ids)) >= len(one.problem.ids)))
        room = self.job.model.config.seq_len if self.compiled else max(len(e.ids) for e in whole)
        chats = Chats(whole, room, self.args["seed"], pack=False)
        lengths = [len(one.ids) for one in rows]
        places = torch.arange(sum(lengths)).split(lengths)
        order = sorted(range(len(rows)), key=lambda i: len(whole[i].ids))
        for chosen in (order[i : i + size] for i in range(0, len(order), size)):
            tokens = torch.cat([places[i] for i in chosen])
            yield chosen, tokens, *chats.collate(chats.items(chosen))

    def laid_out(
        self, rows: list[Completion], parts: list[Tensor], *more: Tensor
    ) -> Iterator[tuple[Tensor, ...]]:
        """Micro-batches with numbers of the completions' tokens (B, T), and of each row."""
        for chosen, tokens, ids, targets in self.micros(rows):
            laid = torch.zeros(len(parts), *ids.shape)
            laid[:, targets != IGNORE] = torch.stack([part[tokens].float() for part in parts])
            yield ids, targets, *laid, *(numbers[chosen] for numbers in more)

    @torch.no_grad()
    def measure(self, rows: list[Completion], what: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What a model says of the completions' tokens (n,); what(ids, targets): (B, T)."""
        found = torch.zeros(sum(len(one.ids) for one in rows))
        for _, tokens, *both in self.micros(rows):
            with self.machine.autocast():
                values = what(*map(self.machine.to_device, both))
            found[tokens] = values.float().cpu()[both[1] != IGNORE]
        return found

    def logps(self, rows: list[Completion]) -> Tensor:
        temperature = torch.tensor(self.temperature(), device=self.machine.device)
        return self.measure(
            rows, lambda *both: completion_logps(self.job.model, *both, temperature)[0]
        )

    def advantages(self, rows: list[Completion], values: Tensor) -> tuple[Tensor, Tensor]:
        """The advantages of the completions' tokens (n,) and the returns that the values (n,),
        with --advantage gae, are to predict."""
        rewards = torch.tensor([one.reward for one in rows], dtype=torch.float64)
        s, lengths = self.value, torch.tensor([len(one.ids) for one in rows])
        if self.policy.advantage != "gae":
            groups = rewards.view(self.share, -1)
            each = group_advantages(groups, self.policy.advantage == "mean_std").flatten()
            return each.repeat_interleave(lengths), values
        mask = torch.arange(lengths.max()) < lengths.unsqueeze(1)  # (rows, N)
        before, paid = torch.zeros(2, *mask.shape, dtype=torch.float64)
        before[mask] = values.double()
        paid[torch.arange(len(rows)), lengths - 1] = rewards
        if s.dense_reward:
            paid += s.dense_reward * dense_rewards(before, mask, s.gamma, s.dense_smoothing)
        lam = torch.full_like(rewards, s.lam)
        lams = lam, length_adaptive(lengths.double(), s.length_alpha) if s.length_alpha else lam
        critic, own = (gae(paid, before, mask, s.gamma, lam)[mask] for lam in lams)
        count, total, squares = self.machine.all_reduce_sum(len(own), own.sum(), own.square().sum())
        deviation = math.sqrt(max(0.0, squares / count - (total / count) ** 2))
        return (own - total / count) / (deviation + SPREAD_FLOOR), critic + values

    def weights(self, rows: list[Completion]) -> tuple[Tensor, float, float]:
        """What a token of each row counts in the policy loss and as plain likelihood (n, 2), and
        the step's rows and tokens on all ranks."""
        lengths, right = torch.tensor([(float(len(one.ids)), one.right) for one in rows]).T
        count, tokens, right_tokens = self.machine.all_reduce_sum(
            len(rows), lengths.sum(), (lengths * right).sum()
        )
        own = row_weights(
            lengths, self.policy.normalise, count, tokens, self.sampler.settings.max_new_tokens
        )
        plain = self.policy.lm_loss * right * count / max(1.0, right_tokens)
        return torch.stack((own, plain), 1), count, tokens

    def improve(
        self,
        rows: list[Completion],
        advantages: Tensor,
        weights: Tensor,
        count: float,
        tokens: float,
    ) -> tuple[dict[str, float], Tensor, Tensor]:
        """The policy's updates on the step's completions: its metrics, loss and gradient norm."""
        machine, policy, found = self.machine, self.policy, []
        now = torch.full_like(advantages, math.nan)
        old = self.logps(rows) if policy.updates > 1 else now
        with self.reference.in_place() if self.reference else contextlib.nullcontext():
            reference = self.logps(rows) if self.reference else now
        bonus = self.bonus if self.entropy < policy.entropy_target else 0.0
        scalars = torch.tensor([self.temperature(), bonus]).repeat(len(rows), 1)
        scale = machine.world / count
        for update in range(policy.updates):
            micros = self.laid_out(
                rows, [old if update else now, advantages, reference], weights, scalars
            )
            found += self.accumulate(self.wrapped, micros, scale)
            norm = self.update(self.job.model, self.optimizers)
        table = torch.stack(found).cpu() / scale  # (updates and micro-batches, metrics)
        loss, *sums = table[:, :-2].sum(0) / policy.updates
        values = [total / tokens for total in machine.all_reduce_sum(*sums)]
        values += [
            machine.all_reduce_max(table[:, -2].max()),
            -machine.all_reduce_max(-table[:, -1].min()),
        ]
        row = report("train", POLICY_METRICS[1:], values)
        if not self.reference:
            del row["train/kl"]  # nothing to diverge from
        self.entropy = row["train/entropy"]
        if policy.entropy_target:
            move = math.copysign(ENTROPY_STEP, policy.entropy_target - self.entropy)
            self.bonus = row["train/entropy_bonus"] = max(0.0, self.bonus + move)
        return row, loss.to(norm.device) * scale, norm

    def teach_critic(
        self, rows: list[Completion], values: Tensor, returns: Tensor, tokens: float
    ) -> dict[str, float]:
        """The value model's updates; what it explained of the returns before them (1 is all)."""
        machine = self.machine
        set_step(self.critic_optimizers, self.critic_optim, self.step, self.run.max_steps)
        for _ in range(self.policy.updates):
            micros = self.laid_out(rows, [values, returns])
            found = self.accumulate(self.critic, micros, machine.world / tokens)
            self.update(self.critic_model, self.critic_optimizers)
        loss, clipped, *sums = machine.all_reduce_sum(
            *sum(found),
            *(
                power.sum()
                for part in (returns, returns - values)
                for power in (part, part.square())
            ),
        )
        spread, error = (sums[i + 1] - sums[i] ** 2 / tokens for i in (0, 2))
        row = {
            "value_loss": loss / machine.world,
            "value_clipped": clipped / machine.world,
            "value_explained": 1 - error / spread if spread > 1e-9 else 0.0,
        }
        return {f"train/{key}": number for key, number in row.items()}

    def reward_row(self, rows: list[Completion], count: float) -> dict[str, float]:
        """Means over all completions of the step, on all ranks."""
        parts = (f"reward/{name}" for name in self.sampler.rewards.parts)
        names = (*parts, "reward", "length", "truncated", "right")
        sums = np.sum(
            [(*one.scores, one.reward, len(one.ids), not one.ended, one.right) for one in rows],
            axis=0,
        )
        means = (total / count for total in self.machine.all_reduce_sum(*sums))
        return report("train", names, means) | {"train/temperature": self.temperature()}

    def train_step(self, stop: int) -> bool:
        """Complete, judge and learn; whether any rank was told to stop."""
        if self.step == 0:
            self.metrics.write(self.evaluate())
        [stops] = self.machine.all_reduce_sum(stop)
        seed_step(self.args["seed"], self.step, self.machine.rank)
        lr = set_step(self.optimizers, self.optim, self.step, self.run.max_steps)
        times = [time.monotonic()]
        rows, row = self.gather()
        times.append(time.monotonic())
        self.objective.train()
        values = (
            self.measure(rows, lambda ids, targets: token_values(self.critic_model, ids))
            if self.critic
            else torch.zeros(0)
        )
        advantages, returns = self.advantages(rows, values)
        weights, count, tokens = self.weights(rows)
        row |= self.reward_row(rows, count)
        loss = norm = torch.zeros((), device=self.machine.device)
        if self.critic:
            row |= self.teach_critic(rows, values, returns, tokens)
        if not self.critic or self.step >= self.value.value_warmup:
            more, loss, norm = self.improve(rows, advantages, weights, count, tokens)
            row |= more
        times.append(time.monotonic())
        self.step += 1
        if self.ema:
            self.ema.update(self.step)
        if self.reference and self.step % (self.policy.reference_steps or math.inf) == 0:
            self.reference = EMA(self.job.model, 0.0, None)
        self.metrics.add(self.step, loss, norm, int(tokens))
        row |= self.metrics.row(lr)
        row["perf/rollout_tok_per_s"], row["perf/update_tok_per_s"] = tokens / np.diff(times)
        self.metrics.note = f"reward {row['train/reward']:.3f} {self.metrics.note}"
        if self.machine.main:
            self.metrics.write_samples(self.sampler.shown(), aloud=False)
        if self.due(self.run.eval_interval):
            row |= self.evaluate()
        self.metrics.write(row)
        return bool(stops)


# ==================================================================================================
# Tuning: what sft, dpo, reward and grpo share
# ==================================================================================================


class Tuning:
    """What sft, dpo, reward and grpo share: the model they start from, their rows, their run."""

    def __init__(
        self,
        kind: str,
        run: RunSettings,
        tune: TuneSettings,
        lora: LoraSettings,
        optim: OptimSettings,
        device: DeviceSettings,
        *more,
        **config,
    ):
        self.task = next((one for one in more if isinstance(one, TaskSettings) and one.task), None)
        if bool(tune.data) == bool(self.task):
            what = "--data and --task are both given" if tune.data else "--data is missing"
            raise UserError(what, "give --data rows.jsonl, or in sft and grpo a --task")
        self.kind, self.run, self.tune, self.lora, self.optim = kind, run, tune, lora, optim
        self.groups = (run, tune, *more, lora, optim, device)
        self.machine, self.seed = open_machine(device), device.seed
        self.path = checkpoint_path(tune.ckpt)
        base = load_checkpoint(self.path)
        self.tokenizer, self.weights = tokenizer_of(base, tune.spm, tune.ckpt), base["model"]
        self.key = model_key(base)
        self.told: dict[str, object] = {"lora_base": self.key if lora.lora_rank else None}
        old = ModelSettings(**base["config"])
        original = old.rope_original or round(old.seq_len / old.rope_factor)
        self.config = replace(
            old,
            seq_len=tune.seq_len or old.seq_len,
            dropout=tune.dropout,
            bos_id=self.tokenizer.bos,
            rope_original=original if old.rope_scaling != "none" else 0,
            **{"doc_mask": False, "scalar_head": False, **config},
        )
        self.questions: list[Turns] = []  # of rows that are held out

    def parts(
        self,
        parse: Callable[[dict], Row],
        make: Callable[..., Example | None],
        stream: Callable[..., Stream] = Groups,
    ) -> tuple[list[Part], list[Part]]:
        """Rows to train on and rows held out; make is example or last_answer, and a stream is
        made of groups of them, what is known of each, the context length and the seed."""
        tune, learned, train, val = self.tune, [], [], []
        read = functools.partial(read_rows, parse=parse, on_bad_row=tune.on_bad_row)
        one = functools.partial(make, self.tokenizer, limit=self.config.seq_len)

        def part(name: str, weight: float, rows: list[Row], kind: str = "") -> Part:
            groups, kept = fit_rows(
                [row[0] for row in rows],
                one,
                self.tokenizer.eos,
                f"{kind}rows{' of ' * bool(name)}{name}",
            )
            if kind:
                self.questions += [rows[i][0][0][:-1] for i in kept]
            else:
                learned.extend(groups)
            known = [rows[i][1] for i in kept]
            return name, weight, stream(groups, known, self.config.seq_len, self.seed)

        for name, files, weight in tune.domains():
            aux_losses: tuple[list[Row], list[Row]] = [], []
            for row in map(parse, task_rows(self.task, self.seed)) if self.task else read(files):
                aux_losses[held_out(row[0][0], 0.0 if tune.val_data else tune.val_split)].append(
                    row
                )
            if not aux_losses[0]:
                raise UserError("--val_split leaves no row to train on", "use a smaller one")
            train.append(part(name, weight, aux_losses[0]))
            val += [part(name, weight, aux_losses[1], "held-out ")] if aux_losses[1] else []
        if tune.val_data:
            val = [part("", 1.0, read(tune.val_data), "validation ")]
        self.told["data_key"] = data_key(learned)
        return train, val

    def network(self, **config) -> Transformer:
        network = Transformer(replace(self.config, **config))
        network.init_weights(self.seed)
        if network.score is not None and not network.config.tie:
            network.lm_head.requires_grad_(False)  # it has no part in a score
        network.load_state_dict(
            {k: w for k, w in self.weights.items() if k != "score.weight"}, strict=False
        )
        return network.to(self.machine.device)

    def start(
        self,
        network: Transformer,
        train: list[Part],
        val: list[Part],
        loss: Callable[..., Tensor],
        names: tuple[str, ...] = ("loss",),
        make: Callable[..., Trainer] = Trainer,
        **how,
    ) -> int:
        """Train the network, or adapters of it, on the rows; `how` is more of a Job."""
        run, machine, lora = self.run, self.machine, None
        if self.lora.lora_rank:
            attach_lora(network, self.lora, self.seed)
            lora = {
                "base": str(self.path.resolve()),
                "relative": os.path.relpath(self.path, run.out_dir),  # so that both may be moved
                "key": self.key,
                "scale": self.lora.scale,
                **asdict(self.lora),
            }

        def evaluate(module: nn.Module) -> dict[str, float]:
            share = run.batch_size, run.eval_tokens, machine.rank, machine.world
            parts = [(name, weight, stream.in_order(*share)) for name, weight, stream in val]
            return validate(module, parts, machine, names)

        stream = mixed([stream for *_, stream in train], [weight for _, weight, _ in train])
        job = Job(
            self.kind,
            network,
            loss,
            stream,
            tokenizer=self.tokenizer,
            names=names,
            lora=lora,
            **{"evaluate": evaluate, **how},
        )
        self.weights = None  # the network has them
        code = train_job(
            job, machine, run, self.optim, self.groups, self.told, self.tune.epochs, make
        )
        if code == 0 and lora and self.lora.lora_merge:
            kept = ("format", "kind", "step", "samples", "best_val", "model", "config", "tokenizer")
            machine.on_main(
                lambda: save_checkpoint(
                    Path(run.out_dir) / "merged.pt",
                    {k: value for k, value in load_checkpoint(run.out_dir).items() if k in kept},
                )
            )
        return code


def add_reference(tuning: Tuning, network: Transformer, streams: list[Groups]) -> None:
    """Give every pair the starting model's log-probs, which are kept in a file in --out_dir."""
    machine = tuning.machine
    everything = [group for stream in streams for group in stream.groups]
    key = f"{tuning.key}/{data_key(everything)}/{machine.dtype}"
    path = Path(tuning.run.out_dir) / f"reference_{sha256(key.encode())[:16]}.npy"
    if machine.broadcast(path.exists()):
        logps = np.load(path)
    else:
        pairs = Groups(everything, np.zeros((len(everything), 2)), tuning.config.seq_len, 0)
        logps = row_logps(network.eval(), pairs, tuning.run.batch_size, machine)
        machine.on_main(save_array, path, logps)
    for stream in streams:
        stream.numbers, logps = logps[: stream.count], logps[stream.count :]


def score_rows(
    reward: RewardSettings, run: RunSettings, tune: TuneSettings, device: DeviceSettings
) -> int:
    """Write the rows of --score again, with the reward model's score of each answer."""
    machine, out = open_machine(device), reward.out or "scored.jsonl"
    check_writable(Path(out))
    model, tokenizer = open_judge(tune.ckpt, tune.spm, machine)
    found = read_rows(
        reward.score,
        lambda row: (row, preference(row) if "chosen" in row else [conversation(row)]),
        tune.on_bad_row,
        "--score",
    )
    chats = [turns for _, group in found for turns in group]
    scores = iter(score_answers(model, tokenizer, chats, run.batch_size, machine))
    names = {1: ("reward",), 2: ("chosen_reward", "rejected_reward")}
    rows = [row | {name: next(scores) for name in names[len(group)]} for row, group in found]
    right = [row["chosen_reward"] > row["rejected_reward"] for row in rows if "chosen" in row]
    write_jsonl(out, rows)
    say(
        f"{len(rows)} rows scored in {out}",
        *(
            [
                f"the chosen answer scores higher in "
                f"{sum(right) / len(right):.1%} of {len(right)} pairs"
            ]
            if right
            else ()
        ),
    )
    return 0


# ==================================================================================================
# Planning: what a checkpoint is, what a run takes, the fastest flags
# ==================================================================================================

BENCH_STEPS = (2, 3)  # to warm up, and timed

BENCH_GAIN = 1.03  # of the best speed: below it a change is not followed


def describe_data(path: Path) -> Iterator[str]:
    folder = TokenFolder(path)
    tokenizer = folder.tokenizer
    yield f"{path}: prepared data, {folder.meta['dtype']} ids, vocabulary {tokenizer.vocab_size:,}"
    for split, counts in folder.meta["splits"].items():
        yield (
            f"{split}: {counts['tokens']:,} tokens, {counts['documents']:,} documents, "
            f"{counts['bytes']:,} bytes, {folder.bytes_per_token(split):.2f} bytes a token"
        )
    yield f"begins: {tokenizer.decode(folder.train[:60])!r}"


def describe_checkpoint(path: Path) -> Iterator[str]:
    saved = load_checkpoint(path)
    config, best = ModelSettings(**saved["config"]), saved.get("best_val", math.inf)
    counts, inside = parameter_counts(config), saved["tokenizer"]
    kind = "of the original program" if saved["original"] else saved.get("kind", "model")
    told = f", best validation loss {best:.4f}" if best < math.inf else ""
    yield f"{path}: {kind}, step {saved.get('step', '?')}{told}, {path.stat().st_size / 1e6:.1f} MB"
    yield (
        f"parameters: {counts['total']:,} (embedding {counts['embedding']:,}, head "
        f"{counts['head'] or 'tied'}, layers {counts['blocks']:,}), "
        f"{short(flops_per_token(config))} training FLOPs a token"
    )
    yield "config: " + " ".join(f"{k}={v}" for k, v in saved["config"].items())
    yield "tokenizer: " + (
        f"{Tokenizer(bytes(inside)).vocab_size:,} pieces, inside"
        if inside
        else "none inside, use --spm"
    )


def plan_memory(
    config: ModelSettings, settings: InfoSettings, optim: OptimSettings
) -> dict[str, float]:
    """Bytes on a device: weights, gradients, optimiser, activations (bf16, fused attention)."""
    counts, tokens = parameter_counts(config), settings.batch_size * config.seq_len
    total, active = counts["total"], config.n_expert_active if config.n_expert else 1
    layer = 4 * (
        config.head_size * (config.n_head + config.kv_heads)
        + 3 * config.d_model
        + 2 * config.hidden * active
    )
    inputs = 2 * config.d_model * config.n_layer  # all that --grad_checkpoint keeps of most layers
    kept = inputs + layer if settings.grad_checkpoint else layer * config.n_layer
    moments = 8 * total - 4 * counts["blocks"] * (optim.optimizer == "muon")
    return {
        "weights": 6 * total,  # fp32, and the bf16 copies that the matmuls read
        "gradients": 4 * total,
        "optimiser": moments + 4 * total * bool(optim.ema),
        "activations": tokens * kept + min(tokens, LOSS_ROWS) * config.vocab_size * 10,
    }


def plan(settings: InfoSettings, config: ModelSettings, optim: OptimSettings) -> Iterator[str]:
    """What a run of a preset would take: parameters, FLOPs, memory, hours, money."""
    counts, flops = parameter_counts(config), flops_per_token(config)
    tokens = settings.tokens or 20 * counts["active"]  # (Hoffmann et al. 2022)
    yield (
        f"{settings.preset or 'model'}: {counts['total']:,} parameters (embedding "
        f"{counts['embedding']:,}, head {counts['head'] or 'tied'}, layers "
        f"{counts['blocks']:,}; {counts['active']:,} active), vocabulary "
        f"{config.vocab_size:,}, context {config.seq_len:,}"
    )
    memory = plan_memory(config, settings, optim)
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.items())
    yield f"memory a device, about: {sum(memory.values()) / 1e9:.2f} GB ({parts})"
    step = settings.batch_size * settings.grad_accum_steps * settings.gpus * config.seq_len
    yield (
        f"compute: {short(flops)} FLOPs a token, {flops * tokens:.3g} for {short(tokens)} "
        f"tokens, {tokens / step:,.0f} steps of {step:,} tokens"
    )
    peak = (flops_of(settings.gpu) or 0.0) * settings.gpus
    if speed := settings.tok_per_s or peak * settings.mfu / flops:
        hours = tokens / speed / 3600
        cost = f", ${hours * settings.usd_per_hour:,.2f}" if settings.usd_per_hour else ""
        yield f"time: {hours:,.1f} hours at {short(speed)} tokens a second{cost}"
    elif settings.gpu:
        raise UserError(f"the speed of --gpu {settings.gpu} is not known", "give --tok_per_s")
    else:
        yield "time: unknown; give --gpu NAME or --tok_per_s N"


def planned(settings: InfoSettings, model: ModelSettings) -> ModelSettings:
    vocab = settings.vocab or PRESETS.get(settings.preset, {}).get("vocab_size", 32000)
    return replace(model, vocab_size=vocab)


def time_steps(
    config: ModelSettings, optim: OptimSettings, device: DeviceSettings, run: RunSettings
) -> dict:
    """The gauges' row of a few steps on random tokens, after others that warm up."""
    machine, network = open_machine(device), Transformer(config)
    network.init_weights(device.seed)
    network.to(machine.device).grad_checkpoint = run.grad_checkpoint
    size = sum(BENCH_STEPS) * run.batch_size * config.seq_len + 1
    ids = np.random.default_rng(device.seed).integers(config.vocab_size, size=size)
    job = Job(
        "bench",
        network,
        functools.partial(pretrain_loss, z_loss=optim.z_loss),
        Windows(ids, config.seq_len, device.seed),
        lambda module: {},
        None,
    )
    with contextlib.redirect_stderr(io.StringIO()):
        trainer = Trainer(job, machine, run, optim, {"seed": device.seed}, None)
        for count in BENCH_STEPS:
            for _ in range(count):
                trainer.train_step(0)
            row = trainer.metrics.row(0.0)  # of the time since the row before
    return row


def trial(
    config: ModelSettings, optim: OptimSettings, device: DeviceSettings, flags: dict
) -> float:
    """Tokens a second of training with these flags, 0 where they do not fit in memory. It has a
    process of its own, so that it leaves neither memory nor compiled code, and may die alone."""
    step = {name: value for name, value in flags.items() if name != "dtype"}
    device, told = replace(device, dtype=flags["dtype"]), "does not fit in memory"
    with tempfile.TemporaryDirectory() as out, worker_pool(1, "spawn") as pool:
        run = RunSettings(out_dir=out, **step)  # too few steps for a log or an evaluation
        try:
            row = pool.submit(time_steps, config, optim, device, run).result()
            told = f"{short(row['perf/tok_per_s'])} tokens a second"
            told += f", mfu {row['perf/mfu']:.1%}" if row["perf/mfu"] else ", mfu unknown"
            told += f", {row['gpu/memory_gb']:.2f} GB" if "gpu/memory_gb" in row else ""
        except RuntimeError as fault:  # killed, or told so by torch
            row = {"perf/tok_per_s": 0.0}
            if not isinstance(fault, BrokenProcessPool) and "allocate" not in str(fault):
                raise
    say("  " + " ".join(f"--{name} {value}" for name, value in flags.items()) + f": {told}")
    return row["perf/tok_per_s"]


def fastest(
    speed: Callable[[dict], float], flags: dict, changes: Iterable[dict]
) -> tuple[dict, float]:
    """The flags of most speed, and that: each change is made to the best so far, and the batch
    doubled for as long as it pays; layers are recomputed where memory ended that."""
    most, full = 0.0, False
    for change in (*changes, {"grad_checkpoint": 1}):
        tried = flags | change
        if tried["grad_checkpoint"]:
            if not full:
                break
            tried["batch_size"] *= 2 if most else 1
        while found := speed(tried):
            before = most
            if found > most:
                flags, most = tried, found
            if found < BENCH_GAIN * before:
                break
            tried = tried | {"batch_size": 2 * tried["batch_size"]}
        full = full or not found
    return flags, most


# ==================================================================================================
# Commands: one cmd_* for each subcommand: wiring only
# ==================================================================================================


@dataclass(frozen=True)
class Request:
    """One continuation that generate is asked for, and the answer that its row expects."""

    turns: Turns
    ids: list[int]
    context: list[int]  # ids whose text stands before the completion's
    expected: object = None

    @property
    def asked(self) -> str:
        return self.turns[-1].text


def read_prompts(settings: GenerateSettings) -> list[Prompt]:
    """What --prompt or --prompt_file asks, behind --system where it has no system turn itself."""
    path, prompts = settings.prompt_file, [([Turn("user", settings.prompt)], None)]
    if {".jsonl", ".ndjson", ".json", ".parquet"} & {s.lower() for s in Path(path).suffixes}:
        prompts = read_rows([path], row_prompt, "error", "--prompt_file")
    elif path:
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as fault:
            raise UserError(f"{path} is not UTF-8 text ({fault})", "save it as such") from fault
        prompts = [([Turn("user", line)], None) for line in lines if line.strip()]
        if not prompts:
            raise UserError(f"{path} holds no prompt", "write one a line")
    elif settings.chat and not settings.prompt.strip():
        raise UserError("--chat has no question", "give --prompt or --prompt_file")
    several = any(len(turns) > 1 for turns, _ in prompts)
    if several and not settings.chat:
        raise UserError(
            f"{path} holds conversations, of which plain text would keep the last turn alone",
            "add --chat",
        )
    if not settings.system:
        return prompts
    system = Turn("system", settings.system)
    found = []
    for turns, expected in prompts:
        if turns[0].role != "system":
            turns = [system, *turns]
        found.append((turns, expected))
    return found


def make_requests(settings: GenerateSettings, tokenizer: Tokenizer, saved: dict) -> list[Request]:
    """The requests of the prompts, --num_samples and --best_of times each; says on stderr what the
    model cannot do well."""
    requests = []
    for turns, expected in read_prompts(settings):
        if settings.chat:
            ids, context = encode_chat(tokenizer, turns, reply=True)[0], []
        else:
            ids = [tokenizer.bos, *tokenizer.encode(turns[-1].text)]
            context = ids
        request = Request(turns, ids, context, expected)
        requests += [request] * (settings.num_samples * settings.best_of)

    limit = saved["config"]["seq_len"]
    longest = max(len(request.ids) for request in requests)
    if longest > limit:
        say_aside(
            f"warning: a prompt has {longest} tokens, the context {limit}: "
            f"only its last {limit // 2} are read"
        )
    if settings.chat and saved.get("kind") in UNTAUGHT_KINDS:
        say_aside("warning: this model was never taught to chat; teach it with sft")
    return requests


def best_rows(
    settings: GenerateSettings, requests: list[Request], rows: list[dict], machine: Machine
) -> list[dict]:
    """Of each --best_of rows the one that the reward model scores highest."""
    judge, tokenizer = open_judge(settings.reward_ckpt, "", machine)
    chats = []
    for request, row in zip(requests, rows, strict=True):
        chats.append([*request.turns, Turn("assistant", row["completion"])])
    scores = score_answers(judge, tokenizer, chats, settings.batch_size, machine)
    best = []
    for first in range(0, len(rows), settings.best_of):
        places = range(first, first + settings.best_of)
        best.append(rows[max(places, key=scores.__getitem__)])
    return best


def print_stream(stream: Iterator[tuple[int, int]], prompt: str, text: TextStream) -> None:
    """Print a continuation as it comes."""
    print(printable(prompt, sys.stdout), end="", flush=True)
    for _, token in stream:
        print(printable(text.push(token), sys.stdout), end="", flush=True)
    print(printable(text.waiting(), sys.stdout))


def write_samples(settings: GenerateSettings, rows: list[dict]) -> None:
    """All completions, to the terminal or as rows of a .jsonl, and a count of how they fare."""
    if settings.out:
        write_jsonl(settings.out, rows)
        say(f"{len(rows)} completions in {settings.out}")
    else:
        between = "\n> " if settings.chat else ""
        say(
            *(
                f"--- {i} of {len(rows)}\n{row['prompt']}{between}{row['completion']}"
                for i, row in enumerate(rows, 1)
            )
        )
    same = [
        row["completion"].strip() == str(row["expected"]).strip()
        for row in rows
        if "expected" in row
    ]
    say(
        f"{sum(row['ended'] for row in rows) / len(rows):.1%} ended with </s>"
        + (f"; {sum(same) / len(same):.1%} are the expected answer" if same else "")
    )


def cmd_prep(settings: PrepSettings) -> int:
    began = time.monotonic()
    meta = prepare(settings)
    seconds = max(time.monotonic() - began, 1e-9)
    total = sum(counts["bytes"] for counts in meta["splits"].values())
    say(
        *(
            f"{name}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, "
            f"{counts['bytes']:,} bytes ({counts['bytes'] / max(1, counts['tokens']):.2f} a token)"
            for name, counts in meta["splits"].items()
        ),
        f"{settings.out_dir}: vocabulary of {meta['vocab_size']:,}, {duration(seconds)}, "
        f"{total / 1e6 / seconds:.1f} MB/s",
        f"next: python {PROGRAM} train --data_dir {shlex.quote(settings.out_dir)}",
    )
    return 0


def cmd_train(
    run: RunSettings,
    data: DataSettings,
    model: ModelSettings,
    optim: OptimSettings,
    device: DeviceSettings,
) -> int:
    machine, domains = open_machine(device), open_domains(data)
    tokenizer = domains[0][1].tokenizer
    config = replace(model, vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos)
    network = Transformer(config)
    network.init_weights(device.seed)
    windows = [Windows(folder.train, config.seq_len, device.seed) for _, folder, _ in domains]
    job = Job(
        "train",
        network,
        functools.partial(pretrain_loss, z_loss=optim.z_loss),
        mixed(windows, [weight for *_, weight in domains]),
        lambda module: perplexity(
            module, domains, run.batch_size, machine, config.seq_len, run.eval_tokens
        ),
        tokenizer,
    )
    return train_job(job, machine, run, optim, (run, data, model, optim, device), {})


def cmd_sft(
    run: TuneRun,
    tune: TuneSettings,
    task: TaskSettings,
    sft: SftSettings,
    lora: LoraSettings,
    optim: TuneOptim,
    device: DeviceSettings,
) -> int:
    tuning = Tuning("sft", run, tune, lora, optim, device, task, sft, doc_mask=sft.pack)
    train, val = tuning.parts(
        lambda row: ([conversation(row)], None),
        example,
        lambda groups, _, seq_len, seed: Chats([one for (one,) in groups], seq_len, seed, sft.pack),
    )
    samples = None
    if questions := tuning.questions[: sft.samples]:
        samples = functools.partial(
            sample_answers,
            tokenizer=tuning.tokenizer,
            questions=questions,
            most=sft.sample_tokens,
            dtype=tuning.machine.dtype,
        )
    return tuning.start(tuning.network(), train, val, pretrain_loss, samples=samples)


def cmd_dpo(
    run: TuneRun,
    tune: TuneSettings,
    dpo: DpoSettings,
    lora: LoraSettings,
    optim: DpoOptim,
    device: DeviceSettings,
) -> int:
    tuning = Tuning("dpo", run, tune, lora, optim, device, dpo)
    train, val = tuning.parts(lambda row: (list(preference(row)), [0.0]), last_answer)
    network, loss = tuning.network(), functools.partial(preference_loss, settings=dpo)
    if dpo.loss not in REFERENCE_FREE:
        tuning.told["reference"] = tuning.key
        add_reference(tuning, network, [stream for *_, stream in train + val])
    return tuning.start(network, train, val, loss, PAIR_METRICS)


def cmd_reward(
    run: TuneRun,
    tune: TuneSettings,
    reward: RewardSettings,
    lora: LoraSettings,
    optim: DpoOptim,
    device: DeviceSettings,
) -> int:
    if reward.score:
        return score_rows(reward, run, tune, device)
    tuning = Tuning("reward", run, tune, lora, optim, device, scalar_head=True)
    train, val = tuning.parts(judged, last_answer)
    sizes = {len(group) for *_, stream in train + val for group in stream.groups}
    if len(sizes) > 1:
        raise UserError("--data holds both pairs and labelled answers", "train on one kind")
    return tuning.start(tuning.network(), train, val, judge_loss, JUDGE_METRICS)


def cmd_grpo(
    run: GrpoRun,
    tune: GrpoTune,
    task: TaskSettings,
    rollout: RolloutSettings,
    policy: PolicySettings,
    value: ValueSettings,
    lora: LoraSettings,
    optim: GrpoOptim,
    device: DeviceSettings,
) -> int:
    tuning = Tuning("grpo", run, tune, lora, optim, device, task, rollout, policy, value)
    machine, most = tuning.machine, rollout.max_new_tokens
    if rollout.prompts % machine.world:
        raise UserError(
            f"--prompts {rollout.prompts} cannot be shared by {machine.world} ranks",
            f"use a multiple of {machine.world}",
        )
    if most >= (room := tuning.config.seq_len):
        raise UserError(
            f"--max_new_tokens {most} leaves a prompt no room in a context of {room}",
            "use fewer, or a longer --seq_len",
        )
    rewards = Rewards(
        rollout.reward or (TASK_REWARDS.get(task.task, "number"),),
        rollout.reward_timeout,
        run.batch_size,
        machine,
    )
    say(f"algorithm: {policy.algo}, rewards: {', '.join(rewards.parts)}")

    def parse(row: dict) -> Row:
        turns, answer = row_prompt(row)
        row = {"pattern": rollout.pattern or None, "answer": answer} | row
        row = {key: value for key, value in row.items() if value is not None}
        return [turns], (turns, rewards.check(row))

    def stream(groups: list[list[Example]], known: list, _: int, seed: int) -> Prompts:
        problems = [Problem(one.ids, *told) for (one,), told in zip(groups, known, strict=True)]
        return Prompts(problems, seed, rollout.prompts, rollout.group_size * most)

    train, val = tuning.parts(parse, lambda *args, limit: question(*args, limit - most), stream)
    network = tuning.network()
    critic = tuning.network(scalar_head=True) if policy.advantage == "gae" else None
    sampler = Sampler(
        network,
        tuning.tokenizer,
        rewards,
        rollout,
        machine,
        run.compile == "1" or (run.compile == "auto" and machine.device.type == "cuda"),
    )
    held = Prompts([one for *_, part in val for one in part.rows], device.seed, 1, 0)
    if policy.kl:  # a run begun without has no reference to go on with
        tuning.told["reference"] = tuning.key
    loss, make = (
        functools.partial(policy_loss, settings=policy),
        functools.partial(
            PolicyTrainer, sampler=sampler, policy=policy, value=value, critic=critic
        ),
    )
    return tuning.start(
        network,
        train,
        val,
        loss,
        make=make,
        samples=lambda _: sampler.shown(),
        best="val/error",
        evaluate=lambda _: sampler.evaluate(held, device.seed) if held.count else {},
    )


def cmd_generate(
    settings: GenerateSettings, sampling: SamplingSettings, device: DeviceSettings
) -> int:
    machine, saved = open_machine(device), load_checkpoint(settings.ckpt)
    tokenizer = tokenizer_of(saved, settings.spm, settings.ckpt)
    requests = make_requests(settings, tokenizer, saved)
    if settings.out:
        check_writable(Path(settings.out))
    stop = frozenset({tokenizer.eos} if settings.stop_at_eos else ())
    stream = generate(
        build_model(saved, machine.device),
        [request.ids for request in requests],
        sampling,
        device.seed,
        stop,
        machine.dtype,
        at_once=settings.batch_size,
    )
    if len(requests) == 1 and not settings.out:
        (one,) = requests
        prompt = "" if settings.chat else one.asked
        with machine.autocast():
            print_stream(stream, prompt, TextStream(tokenizer, one.context))
        return 0

    found: list[list[int]] = [[] for _ in requests]
    progress = Progress("writing", len(requests), "completions")
    with machine.autocast():
        for row, token in stream:
            found[row].append(token)
            ended = token in stop or len(found[row]) == sampling.max_new_tokens
            progress.update(progress.done + ended)
    progress.close()

    rows = []
    for request, new in zip(requests, found, strict=True):
        text = tokenizer.decode(request.context + new)[len(tokenizer.decode(request.context)) :]
        ended = new[-1:] == [tokenizer.eos]
        row = {"prompt": request.asked, "completion": text, "ended": ended}
        if request.expected is not None:
            row["expected"] = request.expected
        rows.append(row)
    if settings.best_of > 1:
        rows = best_rows(settings, requests, rows, machine)
    write_samples(settings, rows)
    return 0


def cmd_info(settings: InfoSettings, model: ModelSettings, optim: OptimSettings) -> int:
    path = Path(settings.path)
    if bool(settings.path) == bool(settings.preset):
        raise UserError(
            "name something to describe or a --preset to plan", "info PATH, or info --preset 138m"
        )
    if settings.preset:
        say(*plan(settings, planned(settings, model), optim))
    elif not path.exists():
        raise UserError(f"{path} does not exist", "name a checkpoint, a run or a data folder")
    elif path.is_dir() and not list(path.glob("ckpt_*.pt")):
        say(*describe_data(path))
    else:
        say(*describe_checkpoint(checkpoint_path(path)))
    return 0


def cmd_bench(
    settings: BenchSettings, model: ModelSettings, optim: OptimSettings, device: DeviceSettings
) -> int:
    if "RANK" in os.environ:
        raise UserError("bench times one device", "start it with python; --gpus plans for several")
    config, place = planned(settings, model), pick_device(device.device)
    flags = {
        "batch_size": settings.batch_size,
        "dtype": device.dtype,
        "compile": "0",
        "grad_checkpoint": 0,
    }
    other = device.dtype == "auto" and pick_dtype("auto", place) != torch.float32
    changes = [{}, *[{"dtype": "fp32"}] * other, *[{"compile": "1"}] * can_compile(place)]
    say(f"training on {place.type}, a trial a line:")
    flags, speed = fastest(functools.partial(trial, config, optim, device), flags, changes)
    if not speed:
        raise UserError(
            "not even the smallest batch fits in memory",
            "use --batch_size 1, a shorter --seq_len or a smaller model",
        )
    settings.batch_size, settings.grad_checkpoint = flags["batch_size"], flags["grad_checkpoint"]
    settings.tok_per_s = speed * settings.gpus
    say(
        "fastest: " + " ".join(f"--{name} {value}" for name, value in flags.items()),
        *plan(settings, config, optim),
    )
    return 0


# ==================================================================================================
# Demo: from the interpreter's own documentation to a small chat model
# ==================================================================================================


def docstrings(code: str) -> Iterator[str]:
    """The docstrings of a module, its classes and functions; SyntaxError where it is no Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old escapes in other people's strings
        tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def demo_rows(out: Path) -> None:
    """The docstrings of the interpreter's own library; and sums, answered in two styles, one of
    which is preferred."""
    texts: dict[str, None] = {}  # in order, each once
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if {"test", "tests", "site-packages", "dist-packages"} & set(path.parts):
            continue
        with contextlib.suppress(SyntaxError, ValueError):  # of templates and odd encodings
            code = path.read_text(encoding="utf-8", errors="replace")
            texts |= dict.fromkeys(docstrings(code))
    prose = [{"text": text} for text in texts if len(text) >= 200]
    if sum(len(row["text"]) for row in prose) < 200_000:
        raise UserError(
            "this Python was installed without its documentation",
            f"bring your own: python {PROGRAM} prep --text_path FILE --out_dir data",
        )
    pairs = [
        {
            "prompt": f"What is {a} + {b}?",
            "chosen": f"The sum is {a + b}.",
            "rejected": str(a + b),
            "answer": str(a + b),
        }
        for a in range(10)
        for b in range(10)
    ]
    write_jsonl(out / "corpus.jsonl", prose)
    write_jsonl(out / "pairs.jsonl", pairs)
    write_jsonl(
        out / "chats.jsonl",
        (
            {"prompt": pair["prompt"], "response": pair[style]}
            for pair in pairs
            for style in ("chosen", "rejected")
        ),
    )


def demo_step(command: Callable[..., int], flags: str) -> None:
    name = command.__name__.removeprefix("cmd_")
    say("", f"$ python {PROGRAM} {name} {flags}")
    if command(*read_command(command, shlex.split(flags))):
        raise UserError(f"the demo stopped at {name}", "run the line above again by hand")


def cmd_demo(settings: DemoSettings) -> int:
    folder = Path(settings.out_dir)
    out, steps = shlex.quote(str(folder)), settings.max_steps or (60 if settings.quick else 250)
    vocab, layers, width, batch = (1024, 2, 128, 8) if settings.quick else (4096, 4, 256, 16)
    shape = f"--n_layer {layers} --d_model {width} --n_head 4 --ffn_mult 3 --seq_len 256"
    ask = "--chat --prompt 'What is 3 + 4?' --num_samples 4 --temperature 1 --max_new_tokens 16"
    for name in ("begun", "run", "sft", "dpo", "grpo"):
        shutil.rmtree(folder / name, ignore_errors=True)
    say("This demo trains a small model on the documentation of your Python interpreter.")
    demo_rows(folder)
    demo_step(
        cmd_prep,
        f"--text_path {out}/corpus.jsonl --out_dir {out}/data --vocab_size {vocab} "
        "--val_split 0.05 --overwrite",
    )
    for about, name, count in (
        ("After a single step it writes:", "begun", 1),
        ("After its training:", "run", steps),
    ):
        demo_step(
            cmd_train,
            f"--data_dir {out}/data --out_dir {out}/{name} --batch_size {batch} "
            f"--lr 0.002 --warmup_steps {steps // 10} --eval_interval {max(1, steps // 4)} "
            f"{shape} --compile 0 --max_steps {count}",
        )
        say("", about)
        demo_step(cmd_generate, f"--ckpt {out}/{name} --prompt 'Return a' --max_new_tokens 60")
    for about, command, start, flags in (
        (
            "Now it is taught to answer questions, in two styles:",
            cmd_sft,
            "run",
            f"--data {out}/chats.jsonl --epochs 30 --batch_size 4 --lr 0.002",
        ),
        (
            "And to prefer the kinder one:",
            cmd_dpo,
            "sft",
            f"--data {out}/pairs.jsonl --epochs 3 --batch_size 8 --lr 0.0001 --beta 0.3",
        ),
        (
            "And, by reinforcement learning, to give the right sum, which dpo made it forget:",
            cmd_grpo,
            "dpo",
            f"--data {out}/pairs.jsonl --max_steps {30 if settings.quick else 80} --prompts 25 "
            "--max_new_tokens 16 --batch_size 100 --lr 0.002 --optimizer muon --warmup_steps 2",
        ),
    ):
        name = command.__name__.removeprefix("cmd_")
        say("", about)
        demo_step(
            command,
            f"--ckpt {out}/{start} --out_dir {out}/{name} {flags} --compile 0 --val_split 0",
        )
        demo_step(cmd_generate, f"--ckpt {out}/{name} {ask}")
    log = (folder / "grpo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    say(
        "",
        "share of right sums, step by step of grpo:",
        curve([row["train/reward"] for row in map(json.loads, log) if "train/reward" in row]),
    )
    say(
        "",
        f"The model is {out}/run/ckpt_best.pt. What you may do next:",
        f"  python {PROGRAM} train @{out}/run/args.txt --max_steps {steps * 4}",
        f"  python {PROGRAM} info {out}/run",
        f"  python convert_to_llama.py --ckpt {out}/run/ckpt_best.pt --out {out}/hf",
        f"  python {PROGRAM} prep --text_path YOUR.txt --out_dir data",
    )
    return 0


# ==================================================================================================
# Front door: the table of commands and main
# ==================================================================================================


class Command(typing.NamedTuple):
    """A subcommand: what runs, its one-line purpose and an example that works."""

    run: Callable[..., int]
    about: str
    example: str


COMMANDS = {
    name: Command(run, about, f"python {PROGRAM} {name} {flags}".strip())
    for name, run, about, flags in (
        ("demo", cmd_demo, "text to trained model in minutes, on any machine", ""),
        ("prep", cmd_prep, "text becomes token files", "--text_path docs.txt --out_dir data"),
        ("train", cmd_train, "pretrain a model on prepared data", "--data_dir data --preset 138m"),
        ("sft", cmd_sft, "teach a model to answer", "--ckpt runs/lm --data chats.jsonl"),
        ("dpo", cmd_dpo, "prefer the better of two answers", "--ckpt runs/sft --data pairs.jsonl"),
        ("reward", cmd_reward, "a model that scores answers", "--ckpt runs/sft --data pairs.jsonl"),
        ("grpo", cmd_grpo, "learn from rewards: GRPO, DAPO, VAPO …", "--ckpt runs/sft --task add"),
        (
            "generate",
            cmd_generate,
            "continue prompts",
            '--ckpt runs/lm --prompt "Once upon a time"',
        ),
        ("info", cmd_info, "say what a checkpoint or a data folder is", "runs/lm"),
        ("bench", cmd_bench, "the fastest flags of train on this machine", "--preset 138m"),
    )
}


def complain(fault: UserError) -> int:
    """Print a fault, once where all ranks share it: rank 0 ends the others before they speak."""
    rank = int(os.environ.get("RANK", 0))
    time.sleep(OTHER_RANKS_WAIT_S if rank else 0)
    speaker = f"rank {rank}: " if rank else ""
    say_aside(f"{speaker}{fault}")
    return 2


def out_of_memory(fault: BaseException) -> UserError | None:
    """The sentence for memory that ran out, or None where the fault is another."""
    told = str(fault)
    by_torch_on_cpu = "can't allocate memory" in told or "Cannot allocate memory" in told
    by_type = isinstance(fault, (MemoryError, torch.OutOfMemoryError))
    if not by_type and not by_torch_on_cpu:
        return None
    return UserError(
        f"memory ran out ({told.splitlines()[0] if told else type(fault).__name__})",
        "use a smaller --batch_size, a shorter --seq_len or a smaller model; when training, "
        "--grad_checkpoint also saves memory",
    )


def run_command(command: Command, argv: list[str]) -> int:
    """Parse and run one command; the exit code. Users' mistakes become sentences on stderr."""
    try:
        code = command.run(*read_command(command.run, argv, command.about, command.example))
        if dist.is_initialized():  # not after a bug: a traceback must not wait for other ranks
            dist.destroy_process_group()
        return code
    except UserError as fault:
        return complain(fault)
    except (MemoryError, RuntimeError) as fault:  # torch.OutOfMemoryError is a RuntimeError
        if sentence := out_of_memory(fault):
            return complain(sentence)
        raise
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `generate | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as fault:
        if sentence := disk_error(fault):
            return complain(sentence)
        raise


def main(argv: list[str] | None = None) -> int:
    """The program; the exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["help"]
    if name in ("-h", "--help", "help"):
        rows = "\n".join(f"  {name:10}{command.about}" for name, command in COMMANDS.items())
        print(
            f"usage: python {PROGRAM} COMMAND [--flag value …] [@FILE]\n\n{rows}\n\n"
            f"python {PROGRAM} COMMAND --help explains the flags of a command."
        )
        return 0
    if name in COMMANDS:
        return run_command(COMMANDS[name], rest)
    near = [f"did you mean {close}?" for close in difflib.get_close_matches(name, COMMANDS, 1)]
    return complain(UserError(f"{name} is no command", *near or [f"choose {either(COMMANDS)}"]))


if __name__ == "__main__":
    sys.exit(main())
