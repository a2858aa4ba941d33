#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9,<=2.13.0", "sentencepiece>=0.2.0", "numpy>=1.26", "tqdm>=4.66"]
# ///
"""Train a language model of your own: one file, from raw text to a model in LLaMA format.

Quick start
  pip install torch sentencepiece numpy tqdm
  python standalone_transformer_lm.py demo                                # a trial in minutes
  python standalone_transformer_lm.py prep  --text_path docs.txt --out_dir data --vocab_size 8192
  python standalone_transformer_lm.py train --data_dir data --out_dir run --preset 138m
  torchrun --nproc_per_node=8 standalone_transformer_lm.py train --data_dir data --out_dir run
  python standalone_transformer_lm.py generate --ckpt run/ckpt_best.pt --prompt "Once upon a time"
  python standalone_transformer_lm.py sft   --ckpt run --data chats.jsonl --out_dir sft
  python standalone_transformer_lm.py eval  --ckpt run sft --tasks arc_easy=arc.jsonl
  python convert_to_llama.py --ckpt run/ckpt_best.pt --out hf                # for transformers

Every command explains its flags with --help, all of them with --help_all. The same --out_dir
resumes a run, and `train @OUT/args.txt --max_steps 300000` repeats one with one change. Each room
uses only what stands above it.

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
  Families           which published architecture holds which model, and under which names
  Checkpoints        the only place that saves and loads
  Endurance          one run a folder, a second place for its files, and what happened to it
  Metrics            figures of a run to files and services, and the progress line
  Trainer            the one training loop, given a loss
  Tools              programs that a model writes, functions that it calls, answers of several turns
  Evaluation         how good is a model
  Tasks and rewards  rows made by rule, and functions that score completions
  Benchmarks         files become tasks of eval, and a model's answers become figures
  Rollouts           generate, score, advantage, update
  Tuning             what sft, distill, dpo, reward and grpo share
  Planning           what a checkpoint is, what a run takes, the fastest flags
  Plots              the curves of runs, in a picture, on the terminal, or in a report
  Chat               a conversation in the terminal
  Commands           one cmd_* for each subcommand: wiring only
  Demo               from the interpreter's own documentation to a small chat model
  Front door         the table of commands and main

Shape legend
  B batch   T query positions   S cached positions   V vocabulary   L layers
  d d_model   F feed-forward width   H query heads   K key/value heads   D head size   N B*T

File formats
  data folder   tokenizer.model, train.bin, val.bin (little-endian uint16, or uint32 above 65,535
                ids), meta.json, written last; a document is <s> ids </s>
  checkpoint    one dict: model config optim scaler format kind dtype step samples best_val rng args
                tokenizer ema gauges; whole, unwrapped fp32 weights; optim is a list, a state for
                each optimiser; read with weights_only=True. Adapters are stored alone: lora says
                of which model; grpo adds reference entropy uninformative curriculum critic
                critic_optim
  metrics.jsonl one object a line: step tokens time train/* val/* moe/* perf/* gpu/* cost/*
  events.jsonl  what happened to a run besides: step event told, and facts of the event
  results.json  of eval: {"results": {CKPT: {TASK: {"acc": …, "acc_stderr": …, "rows": …}}}}
  rows          .jsonl .json .parquet. sft: messages, or prompt response, or instruction input
                output; distill: those, or a prompt; dpo: prompt chosen rejected; reward: those, or
                label; grpo: prompt answer

Exit codes: 0 done; 2 your mistake, told as `error:` and `fix:`; 1 a bug, with its traceback, or the
end of another rank; 128 + signal after a signal, when the step was finished and saved.
"""

import argparse
import array
import ast
import base64
import bisect
import bz2
import codecs
import contextlib
import copy
import csv
import ctypes
import difflib
import errno
import faulthandler
import fnmatch
import functools
import gc
import glob
import gzip
import hashlib
import html
import http.client
import importlib
import inspect
import io
import itertools
import json
import logging
import lzma
import math
import multiprocessing
import operator
import os
import pickle
import platform
import queue
import random
import re
import runpy
import shlex
import shutil
import signal
import string
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import types
import typing
import urllib.error
import urllib.request
import uuid
import warnings
import zipfile
import zlib
from collections import ChainMap, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLong
from concurrent.futures import wait as wait_for_futures
from concurrent.futures.process import BrokenProcessPool
from dataclasses import Field, asdict, astuple, dataclass, field, fields, replace
from datetime import timedelta
from fractions import Fraction
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
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

UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)  # of a compressed file cut short


START_METHOD = "fork" if sys.platform == "linux" else "spawn"  # of worker processes

FREE_SPACE = "free some space, or use a folder on another disk"

WRITABLE = "use a folder that you may write to"

DISK_FAULTS = {  # errors that the user can fix, and how; the system says what is wrong
    errno.EFBIG: "raise `ulimit -f`",
    errno.EIO: "check the disk",
    errno.EISDIR: "give a file in it",
    errno.ENAMETOOLONG: "use a shorter path",
    errno.ENOSPC: FREE_SPACE,
    errno.EDQUOT: FREE_SPACE,
    errno.EACCES: WRITABLE,
    errno.EPERM: WRITABLE,
    errno.EROFS: WRITABLE,
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.ELOOP: "check the path",
    errno.EEXIST: "check the path",
}


class UserError(Exception):
    """A mistake that the user can fix: what is wrong, how to fix it, and `more` such pairs."""

    def __init__(self, what: str, fix: str, *more: tuple[str, str]):
        super().__init__(what, fix, *more)  # the arguments, so that it can be pickled
        self.faults = [(what, fix), *more]

    def __str__(self) -> str:
        return "\n".join(f"error: {what}\nfix: {fix}" for what, fix in self.faults)


def disk_error(fault: OSError, path: str | Path = "") -> UserError | None:
    """The sentence for an OSError of the user's disk or path; None where it is a bug."""
    if fault.errno not in DISK_FAULTS:
        return None
    what = f"{fault.filename or path or 'the disk'}: {os.strerror(fault.errno).lower()}"
    return UserError(what, DISK_FAULTS[fault.errno])


def sentence(fault: BaseException) -> str:
    """What went wrong, in a line without its remedy."""
    if isinstance(fault, OSError) and (told := disk_error(fault)):
        return told.faults[0][0]
    lines = str(fault).splitlines() or [type(fault).__name__]
    return lines[0]


def raise_all(faults: list[tuple[str, str]]) -> None:
    if faults:
        raise UserError(*faults[0], *faults[1:])


def out_of_memory(fault: BaseException) -> UserError | None:
    """The sentence for memory that ran out, or None where the fault is another."""
    message = str(fault)
    by_torch_on_cpu = "can't allocate memory" in message or "Cannot allocate memory" in message
    by_type = isinstance(fault, (MemoryError, torch.OutOfMemoryError))
    if not by_type and not by_torch_on_cpu:
        return None
    reason = message.splitlines()[0] if message else type(fault).__name__
    return UserError(
        f"memory ran out ({reason})",
        "use a smaller --batch_size, a shorter --seq_len or a smaller model; when training, "
        "--grad_checkpoint also saves memory",
    )


def free_memory(device: torch.device) -> None:
    """Give back what torch and the C library keep for later, once what held it is gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


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


class Caught:
    """A block whose failure is kept as `fault`, for work that others wrote and that may fail in
    ways of its own; a demand to end the process passes."""

    fault: Exception | None = None

    def __enter__(self) -> "Caught":
        return self

    def __exit__(self, _kind, fault: BaseException | None, _trace) -> bool:
        if fault is None or not isinstance(fault, Exception):
            return False
        self.fault = fault
        return True


def fsync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut; a no-op where folders cannot be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "wb"):
    """Open `path` for writing so that it holds its old or its new content at every moment.

    The bytes go to a hidden file beside it, which is fsynced and renamed; on failure it is removed.
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
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def read_json(path: Path) -> dict:
    """A JSON object from a file; raises UserError where it is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
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
    if minutes:
        return f"{minutes}m{seconds:02d}s"
    return f"{seconds}s"


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
    """Progress of a task: a tqdm bar on a terminal, or else a plain line every few seconds.

    The total is None where it is unknown. A process that does not talk prints nothing.
    """

    def __init__(
        self,
        what: str,
        total: float | None,
        unit: str,
        start: float = 0,
        talks: bool = True,
    ):
        self.what = what
        self.total = total
        self.unit = unit
        self.done = start
        self.start = start
        self.began: float | None = None
        self.last_line = time.monotonic()
        self.talks = talks
        self.bar: tqdm | None = None
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
        """`done` units of the total are finished; `note` is shown behind the figures."""
        if self.began is None:  # the first update includes warm-up: not part of the estimate
            self.began = time.monotonic()
            self.start = done
        self.done = done
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(done - self.bar.n)
        elif self.talks and time.monotonic() - self.last_line >= LINE_EVERY_S:
            self.last_line = time.monotonic()
            say_aside(self.line(note))

    def expect(self, total: float) -> None:
        """The total has become another."""
        self.total = total
        if self.bar is not None:
            self.bar.total = total

    def line(self, note: str = "") -> str:
        """The figures as text: `encoding: 2M of 10M (20%) B, 12s left  5K tokens`."""
        text = f"{self.what}: {short(self.done)}"
        if self.total:
            text += f" of {short(self.total)} ({self.done / self.total:.0%})"
        text += f" {self.unit}"
        if self.total and self.done < self.total:
            text += f", {duration(self.eta())} left"
        if note:
            text += f"  {note}"
        return text

    def eta(self) -> float:
        """Seconds left at the mean speed so far; infinity before that is known."""
        if self.began is None or self.done <= self.start:
            return math.inf
        per_unit = (time.monotonic() - self.began) / (self.done - self.start)
        return (self.total - self.done) * per_unit

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


def serve_parent(end: Callable[[], object] | None = None) -> None:
    """In a worker: leave Ctrl-C to the parent, and `end`, or exit, when it does, however it
    ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def follow() -> None:
        multiprocessing.parent_process().join()
        if end:
            end()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def end_session(leader: int) -> None:
    """End a process that leads a session, and all that it began."""
    with contextlib.suppress(AttributeError, ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def serve_alone(memory: int) -> None:
    """serve_parent, as the leader of a session that ends with it, and with so many bytes of memory
    at most beyond what it has now."""
    end = functools.partial(end_session, 0)
    if hasattr(os, "setsid"):
        os.setsid()
        importlib.import_module("multiprocessing.util").Finalize(None, end, exitpriority=0)
    with contextlib.suppress(ImportError, OSError, ValueError):
        limits = importlib.import_module("resource")
        used = int(Path("/proc/self/statm").read_text().split()[0]) * limits.getpagesize()
        hard = limits.getrlimit(limits.RLIMIT_AS)[1]
        most = used + memory
        if hard in (limits.RLIM_INFINITY, max(hard, most)):
            limits.setrlimit(limits.RLIMIT_AS, (most, hard))
    serve_parent(end)


def cores_here() -> int:
    """The processor cores that each process of this machine may use."""
    cores = os.cpu_count() or 1
    if sys.platform == "linux":
        cores = len(os.sched_getaffinity(0))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def start_method() -> str:
    """How worker processes begin: as copies of this one, but not once CUDA and NCCL have threads
    in it, which a copy would lack."""
    if START_METHOD == "fork" and torch.cuda.is_initialized():
        return "forkserver"
    return START_METHOD


@contextlib.contextmanager
def worker_pool(workers: int, start: str = "") -> Iterator[ProcessPoolExecutor]:
    """Processes that end with the block: at once where it fails, when done where it does not."""
    context = multiprocessing.get_context(start or start_method())
    pool = ProcessPoolExecutor(workers, context, serve_parent)
    done = False
    try:
        yield pool
        done = True
    except BrokenProcessPool as fault:
        raise UserError(
            "a worker process was killed, most likely because memory ran out",
            "use fewer --workers, or a smaller --sample_mb",
        ) from fault
    finally:
        if not done:
            for child in multiprocessing.active_children():
                child.terminate()
        pool.shutdown(cancel_futures=True)


# ==================================================================================================
# Flags: dataclass fields become flags, @FILE and args.txt; no flag is known by name
# ==================================================================================================

FILE_COMMENT = re.compile(r"""(?:^|(?<=\s))#.*$|('[^']*'|"(?:\\.|[^"\\])*"|\\.)""")


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
    repeated: bool = True,
    same_on_resume: bool = False,
    basic: bool = False,
    zero: str = "",
    off: int = 0,
    also: str = "",
):
    """A dataclass field that is also a flag, unless `flag` is off, or a `positional` argument.

    A value is the default or one of the `choices`; a number is at `least` 0 and stays `below`.
    What a value `expands` to are values of other fields, which their own flags override.
    One that is not `repeated` concerns a single start and is left out of args.txt.
    A resumed run must find it the `same_on_resume`. --help shows what is `basic`, --help_all all.
    A number 0 is written as the word `zero`, where there is one, and a written 0 stands for the
    number `off`, or else is refused; `also` is an older name of it.
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
        "repeated": repeated,
        "same_on_resume": same_on_resume,
        "basic": basic,
        "zero": zero,
        "off": off,
        "also": also,
    }
    return field(default=default, metadata=metadata)


def with_defaults(*hidden: str, **defaults) -> Callable[[type], type]:
    """Class decorator: the settings of the base class with other defaults, some without a flag."""

    def change(kind: type) -> type:
        kind.__annotations__ = {}
        for f in fields(kind):
            if f.name not in hidden and f.name not in defaults:
                continue
            shown = f.metadata["flag"] and f.name not in hidden
            changed = field(
                default=defaults.get(f.name, f.default), metadata={**f.metadata, "flag": shown}
            )
            setattr(kind, f.name, changed)
            kind.__annotations__[f.name] = f.type
        return dataclass(kind)

    return change


def flags(*groups) -> list[Field]:
    return [f for group in groups for f in fields(group) if f.metadata["flag"]]


def field_faults(settings) -> Iterator[tuple[str, str]]:
    for f in flags(settings):
        value, meta = getattr(settings, f.name), f.metadata
        for word in value if isinstance(value, tuple) else (value,):
            if not meta["choices"] or word in (f.default, *meta["choices"]):
                continue
            near = difflib.get_close_matches(word, meta["choices"], 1)
            hint = f"did you mean {near[0]}? " if near else ""
            yield f"--{f.name} {word} is not known", f"{hint}choose {either(meta['choices'])}"
        if meta["least"] is not None and value < meta["least"]:
            yield f"--{f.name} {value} is too small", f"use at least {meta['least']}"
        if meta["below"] is not None and value >= meta["below"]:
            yield f"--{f.name} {value} is too large", f"stay below {meta['below']}"


def check(*groups) -> list[tuple[str, str]]:
    """Every fault of the settings, as (what, fix)."""
    found = []
    for settings in groups:
        found += field_faults(settings)
        if hasattr(settings, "faults"):
            found += settings.faults()
    return found


class FlagParser(argparse.ArgumentParser):
    """argparse with flags read from @FILE, a line each, and errors as UserError."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """The words of a line; # begins a comment where a word could begin."""
        line = arg_line.removeprefix("\ufeff")  # a byte-order mark
        return shlex.split(re.sub(FILE_COMMENT, lambda m: m[1] or "", line))

    def error(self, message: str):
        raise UserError(message, f"see {self.prog} --help")


def flag_help(f: Field) -> str:
    """The help of a flag: what it is, its choices and its default."""
    text = f.metadata["help"]
    if f.metadata["choices"]:
        text += ": " + " | ".join(f.metadata["choices"])
    default = f.default
    if default in ("", ()):
        default = "none"
    if f.metadata["zero"] and not default:
        default = f.metadata["zero"]
    return f"{text} (default: {default})".replace("%", "%%")


def add_flag(topic: argparse._ArgumentGroup, f: Field, shown: bool) -> None:
    """A field as an argument of its topic; one that is not `shown` is missing in the help alone."""
    text = argparse.SUPPRESS
    if shown:
        text = flag_help(f)
    metavar, _, arity = KINDS[f.type]
    if f.metadata["choices"]:
        metavar = "NAME"
    if not f.metadata["positional"]:
        names = [f"--{name}" for name in (f.name, f.metadata["also"]) if name]
        topic.add_argument(*names, dest=f.name, help=text, metavar=metavar, **arity)
    elif f.type is str:
        topic.add_argument(f.name, nargs="?", metavar="PATH", help=text)
    else:
        topic.add_argument(f.name, nargs="*", metavar="PATH", help=text)


class HelpAll(argparse.Action):
    """--help_all: the help with every flag."""

    def __init__(self, option_strings, dest, default, make: Callable[[], FlagParser]):
        about = "show the help of every flag and exit"
        super().__init__(option_strings, dest, 0, default=default, help=about)
        self.make = make

    def __call__(self, parser: FlagParser, *_) -> None:
        self.make().print_help()
        parser.exit()


def make_parser(
    command: str,
    about: str,
    example: str,
    groups: tuple[type, ...],
    everything: bool = False,
) -> FlagParser:
    """One command's parser: a group of flags a dataclass, a flag a field. Its help has the basic
    ones, or `everything`."""
    parser = FlagParser(
        prog=f"{PROGRAM} {command}",
        description=about,
        epilog=f"example:\n  {example}",
        fromfile_prefix_chars="@",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hidden = sum(not f.metadata["basic"] for f in flags(*groups))
    if not everything:
        if hidden:
            parser.epilog += f"\n\n--help_all explains {hidden} more flags."
        whole = functools.partial(make_parser, command, about, example, groups, True)
        parser.add_argument("--help_all", action=HelpAll, make=whole)
    for group in groups:
        topic = parser.add_argument_group(group.__doc__.rstrip("."))
        for f in flags(group):
            add_flag(topic, f, everything or f.metadata["basic"])
    return parser


def settings_of(command: Callable) -> tuple[type, ...]:
    return tuple(kind for name, kind in typing.get_type_hints(command).items() if name != "return")


def unknown_flags(
    unknown: list[str],
    groups: tuple[type, ...],
    elsewhere: dict[str, list[str]],
) -> Iterator[tuple[str, str]]:
    """Faults of the words that no flag took; `elsewhere`: commands by the flags that they have."""
    names = [f"--{f.name}" for f in flags(*groups)]
    for place, word in enumerate(unknown):
        if place and not word.startswith("--"):  # the value of an unknown flag
            continue
        flag = word.split("=")[0]
        near = difflib.get_close_matches(flag, names, 1)
        hint = "see --help; text with spaces needs quotes"
        if near:
            hint = f"did you mean {near[0]}?"
        if flag in elsewhere:
            commands = ", ".join(elsewhere[flag])
            yield f"{word} is not a flag of this command but of {commands}", f"remove it, or {hint}"
        else:
            yield f"{word} is not a known flag", hint


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


def parse_number(kind: type, given: str) -> int | float:
    """A finite number; 1e6 is a whole number too."""
    value = float(given)
    if not math.isfinite(value) or (kind is int and value % 1):
        raise ValueError(given)
    if re.fullmatch(r"[+-]?[\d_]+", given):
        return kind(given)  # a float is less exact
    return kind(value)


def parse_value(kind: type, given: str | list[str]):
    """What argparse gave as a value of a field's type; KeyError or ValueError where it is none."""
    if given == []:
        given = "--"  # argparse drops this value
    if kind is bool:
        return SWITCH[given.lower()]
    if kind in (int, float):
        return parse_number(kind, given)
    if isinstance(given, list):
        return tuple(given)
    return given


def refuse_undecodable(argv: Iterable[str]) -> None:
    for word in argv:
        if LONE_SURROGATE.search(word):
            raise UserError(
                f"the argument {ascii(word)} is not UTF-8",
                "set the terminal's encoding to UTF-8, or rename the file",
            )


def read_flags(
    parser: FlagParser,
    groups: tuple[type, ...],
    argv: list[str],
    elsewhere: dict[str, list[str]] | None = None,
) -> list:
    """Settings of a command line: defaults, then presets, then flags; UserError has all faults."""
    refuse_undecodable(argv)
    try:
        known, unknown = parser.parse_known_args(joined_values(argv, groups))
    except ValueError as fault:  # not UTF-8, or an open quote
        raise UserError(
            f"a file of flags cannot be read: {fault}",
            "write one flag a line, as in the args.txt of a run",
        ) from fault
    given = vars(known)
    values: dict[str, object] = {}
    found: list[tuple[str, str]] = []
    if any(hasattr(group, "words") for group in groups):  # that are flags of another command
        values["words"] = tuple(unknown)
    else:
        found += unknown_flags(unknown, groups, elsewhere or {})
    for f in flags(*groups):
        if f.name in given and f.metadata["expands"]:
            values |= f.metadata["expands"].get(given[f.name], {})
    for f in flags(*groups):
        if f.name not in given:
            continue
        word = f.metadata["zero"]
        if word and given[f.name] == word:
            values[f.name] = f.type(0)
            continue
        try:
            values[f.name] = parse_value(f.type, given[f.name])
            if word and not values[f.name]:
                values[f.name] = f.metadata["off"]
            if word and not values[f.name]:
                least = "at least 1" if f.type is int else "more"
                found.append((f"--{f.name} 0 is too small", f"use {least}, or {word}"))
        except (KeyError, ValueError):
            noun = KINDS[f.type][1]
            if word:
                noun += f", or {word}"
            found.append((f"--{f.name} {given[f.name]} is not {noun}", f"give {noun}"))

    made = []
    for group in groups:
        own = {f.name: values[f.name] for f in fields(group) if f.name in values}
        made.append(group(**own))
    raise_all(found + check(*made))
    return made


def read_command(
    command: Callable,
    argv: list[str],
    about: str = "",
    example: str = "",
    elsewhere: dict[str, list[str]] | None = None,
) -> list:
    """The settings that a command's parameters are annotated with, read from its arguments."""
    groups = settings_of(command)
    name = command.__name__.removeprefix("cmd_")
    return read_flags(make_parser(name, about, example, groups), groups, argv, elsewhere)


def flag_words(f: Field, value: object) -> list[str]:
    """A flag and its value as words that argparse reads back."""
    if isinstance(value, tuple):
        return [f"--{f.name}", *value]
    if isinstance(value, bool):
        value = int(value)
    if f.metadata["zero"]:
        value = value or f.metadata["zero"]
    return [f"--{f.name}={value}"]  # one word, so that a value may begin with - or @


def settings_text(*groups) -> str:
    """The settings as lines that @FILE reads back; what a preset gave is spelled out."""
    lines = []
    for settings in groups:
        lines.append(f"# {type(settings).__doc__}")
        for f in flags(settings):
            value = getattr(settings, f.name)
            if f.metadata["repeated"] and value not in ("", ()):
                lines.append(shlex.join(flag_words(f, value)))
    return "\n".join(lines) + "\n"


def settings_dict(*groups) -> dict:
    merged = {}
    for settings in groups:
        merged |= asdict(settings)
    return merged


def same_on_resume(*groups) -> list[str]:
    """Names of the flags that a resumed run must find unchanged."""
    return [f.name for f in flags(*groups) if f.metadata["same_on_resume"]]


# ==================================================================================================
# Settings: every setting once: name, type, default, help, choices and what it expands to
# ==================================================================================================

PURE = {"n_kv_head": 4, "qk_norm": True, "seq_len": 2048, "vocab_size": 50304}

SMALL = {"tie": False, "seq_len": 256}

PRESETS = {  # name -> values of settings fields; a flag given beside --preset wins
    "1m": {**SMALL, "n_layer": 5, "d_model": 128, "n_head": 4, "ffn_hidden": 384},
    "5m": {**SMALL, "n_layer": 6, "d_model": 256, "n_head": 4, "ffn_hidden": 704},
    "15m": {**SMALL, "n_layer": 8, "d_model": 384, "n_head": 6, "ffn_hidden": 1024},
    "50m": {**SMALL, "n_layer": 12, "d_model": 576, "n_head": 9, "ffn_hidden": 1536},
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

SMALLEST_TOKENIZER = 280  # pieces


def mixture(words: Iterable[str]) -> list[tuple[str, str, float]]:
    """(name, path, weight) of each NAME=PATH:WEIGHT; the weights sum to 1."""
    parts = [PART.fullmatch(word).groups() for word in words]
    total = sum(float(weight) for *_, weight in parts)
    return [(name, path, float(weight) / total) for name, path, weight in parts]


def mixture_faults(flag: str, kind: str, words: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Faults of words that are a mixture as soon as one of them has a name."""
    if not any("=" in word for word in words):
        return
    names = set()
    for word in words:
        part = PART.fullmatch(word)
        if not part or float(part[3]) == 0:
            yield (
                f"--{flag}: {word} is not NAME={kind}:WEIGHT with a weight above 0",
                "write each part like web=data/web:0.9",
            )
            continue
        if part[1] in names:
            yield f"--{flag} has two parts called {part[1]}", "give each part its own name"
        names.add(part[1])


@dataclass
class PrepSettings:
    """Input, tokenizer and output of prep."""

    text_path: tuple[str, ...] = setting(
        (),
        "files, folders or globs of text, .jsonl or .parquet, compressed or not, here or behind "
        "hf://datasets/… s3:// gs:// https://, or a mixture, NAME=FILES:WEIGHT; .npy and .bin of "
        "token ids; - is stdin",
        basic=True,
    )
    out_dir: str = setting(
        "", "folder to write: tokenizer.model, train.bin, val.bin, meta.json", basic=True
    )
    vocab_size: int = setting(
        0,
        "size of the tokenizer to train; auto: by the size of the text, 32,000 at most",
        below=1 << 24,
        zero="auto",
        basic=True,
    )
    max_tokens: float = setting(
        0.0, "end behind so many tokens to train on, as 10e9; 0: take all", basic=True
    )
    val_split: float = setting(
        0.01, "fraction of documents used for validation", below=1.0, basic=True
    )
    document: str = setting(
        "line",
        "what one document is; blank: text up to a blank line",
        choices=("line", "blank", "file", "jsonl"),
        basic=True,
    )
    text_key: str = setting("text", "key of the text in .jsonl and .parquet rows", basic=True)
    errors: str = setting(
        "strict", "invalid UTF-8: stop, or insert U+FFFD", choices=("strict", "replace")
    )
    tokenizer: str = setting(
        "",
        "use this tokenizer instead of training one: a SentencePiece model, or a Hugging Face "
        "tokenizer.json or folder",
        basic=True,
        also="spm",
    )
    tokenizer_type: str = setting(
        "sentencepiece",
        "tokenizer to train: SentencePiece's BPE, or a byte-level one as Llama 3 and Qwen have it",
        choices=("sentencepiece", "bytebpe"),
    )
    digits: int = setting(1, "digits that bytebpe joins at most", least=1, below=4)
    sample_mb: float = setting(100.0, "MB of text that the tokenizer is trained on", least=0.01)
    character_coverage: float = setting(
        0.9999,
        "fraction of the text's characters with a piece of their own; others become bytes",
        least=0.98,
        below=1.0,
    )
    workers: int = setting(0, "encoding processes; 0 means one per core", basic=True)
    shard: str = setting("", "do only part i of n, as i/n counted from 0; --merge joins the parts")
    merge: bool = setting(False, "join the shards found in --out_dir")
    overwrite: bool = setting(False, "replace the data in --out_dir")

    def domains(self) -> list[tuple[str, tuple[str, ...], float]]:
        """(name, paths, share) of each part of the corpus; files without a name are one part."""
        if not any(map(PART.fullmatch, self.text_path)):
            return [("", self.text_path, 1.0)]
        return [(name, (path,), weight) for name, path, weight in mixture(self.text_path)]

    def faults(self) -> Iterator[tuple[str, str]]:
        if not self.out_dir:
            yield "--out_dir is missing", "give the folder to write, --out_dir data"
        if not self.text_path and not self.merge:
            yield "--text_path is missing", "give your text, --text_path docs.txt"
        if any(map(PART.fullmatch, self.text_path)):
            yield from mixture_faults("text_path", "FILES", self.text_path)
        if 0 < self.vocab_size < SMALLEST_TOKENIZER:
            yield (
                f"--vocab_size {self.vocab_size} is less than {SMALLEST_TOKENIZER}, which bytes "
                "and control symbols need",
                f"use {SMALLEST_TOKENIZER} or more",
            )
        if self.shard and not self.shard_exists():
            yield f"--shard {self.shard} is not one of 0/n to (n-1)/n", "the first of four is 0/4"
        if self.shard and not self.tokenizer:
            yield (
                "--shard needs --tokenizer",
                "run prep on a sample, and pass its tokenizer.model to all parts",
            )

    def shard_exists(self) -> bool:
        if not re.fullmatch(r"\d+/\d+", self.shard):
            return False
        part, parts = self.part()
        return part < parts

    def part(self) -> tuple[int, int]:
        """(i, n) of --shard i/n."""
        if not self.shard:
            return 0, 1
        part, parts = self.shard.split("/")
        return int(part), int(parts)


@dataclass
class DataSettings:
    """Data to train on."""

    data_dir: str = setting(
        "data",
        "folder written by prep, or a mixture, NAME=FOLDER:WEIGHT,NAME=FOLDER:WEIGHT",
        basic=True,
    )
    tokens: float = setting(0.0, "tokens to train on, instead of --max_steps, as 10e9", basic=True)
    epochs: float = setting(0.0, "passes over the data, instead of --max_steps", basic=True)
    init: str = setting(
        "auto",
        "what embedding and head begin with: numbers drawn at random, or what the text says "
        "follows each token; auto: that, where --tie 0 lets them differ",
        choices=("auto", "normal", "bigram"),
    )

    def domains(self) -> list[tuple[str, str, float]]:
        """(name, folder, weight) of each part; weights sum to 1; one folder alone has no name."""
        if "=" not in self.data_dir:
            return [("", self.data_dir, 1.0)]
        return mixture(self.data_dir.split(","))

    def faults(self) -> Iterator[tuple[str, str]]:
        yield from mixture_faults("data_dir", "FOLDER", self.data_dir.split(","))
        if self.tokens and self.epochs:
            yield "--tokens and --epochs are both given", "keep one of them"


@dataclass
class DeviceSettings:
    """Device and precision."""

    seed: int = setting(1337, "random seed", same_on_resume=True, basic=True)
    device: str = setting(
        "auto", "device to compute on", choices=("auto", "cpu", "cuda", "mps"), basic=True
    )
    dtype: str = setting(
        "auto",
        "precision of matrix multiplications; auto is bf16 where the hardware is faster in it",
        choices=("auto", "bf16", "fp16", "fp32"),
        basic=True,
    )
    threads: int = setting(0, "CPU threads; 0 divides the cores among the processes")
    flash: str = setting(
        "", "flash-attention package that SDPA uses on CUDA", choices=("FA3", "FA4")
    )


@dataclass
class InferenceSettings(DeviceSettings):
    """Device and precision."""

    compile: str = setting(
        "auto",
        "compile generation (torch.compile); auto: on CUDA",
        choices=("auto", "0", "1"),
        basic=True,
    )


@dataclass
class StepSettings:
    """Size and cost of a step."""

    preset: str = setting(
        "",
        "model size; in train by default what data, time and device suggest",
        expands=PRESETS,
        repeated=False,
        basic=True,
    )
    batch_size: int = setting(
        0,
        "sequences per micro-batch and device; auto: as many as fit on a GPU, few on a CPU",
        below=1 << 20,
        zero="auto",
        basic=True,
    )
    grad_accum_steps: int = setting(
        0,
        "micro-batches per optimizer step; auto: 1, or what an automatic --batch_size leaves",
        below=1 << 20,
        zero="auto",
        basic=True,
    )
    grad_checkpoint: bool = setting(
        False, "recompute activations in the backward pass: slower, with far less memory"
    )
    zero: int = setting(
        0,
        "what the devices divide among them: 1 optimizer state, 2 gradients too, 3 weights too",
        below=4,
        basic=True,
    )
    zero_group: int = setting(
        0, "devices that divide a model, as those of a node; 0: all; groups repeat each other"
    )
    offload: bool = setting(
        False, "keep weights, gradients and optimizer state in the host's memory: slow"
    )
    sharded_ckpt: bool = setting(
        False,
        "each device writes its part of a checkpoint, to a folder that all share: for models that "
        "one host's memory does not hold",
    )
    usd_per_hour: float = setting(0.0, "price of the machine per hour; logs the cost of the run")
    usual_batch = 8  # sequences of a step on a device, where no flag says more

    @property
    def micro_batch(self) -> int:
        """Sequences that surely fit, where --batch_size is automatic."""
        return self.batch_size or self.usual_batch


SPAN = re.compile(r"(\d+\.?\d*|\.\d+)\s*([smhd]?)")  # of time

SPAN_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass
class RunSettings(StepSettings):
    """The run."""

    out_dir: str = setting(
        "runs/lm", "folder of checkpoints and metrics; the same one resumes", basic=True
    )
    resume: bool = setting(
        True, "continue from ckpt_last.pt; 0 refuses to overwrite a run", repeated=False
    )
    compile: str = setting(
        "auto",
        "use torch.compile; auto: in long runs",
        choices=("auto", "0", "1"),
        basic=True,
    )
    fp8: bool = setting(
        False,
        "train matrices of at least 1,024 rows and columns in 8 bits, on Hopper GPUs and newer; "
        "pays from about 1B parameters",
    )
    max_steps: int = setting(
        1000,
        "optimizer steps in total; 0 means --epochs, of train one epoch unless it says more",
        basic=True,
    )
    log_interval: int = setting(10, "steps between lines of metrics.jsonl", least=1)
    eval_interval: int = setting(250, "steps between evaluations", least=1, basic=True)
    eval_tokens: int = setting(
        0,
        "maximum validation tokens per evaluation; auto: about 5% of the time of training",
        zero="auto",
    )
    ckpt_interval: int = setting(250, "steps between checkpoints", least=1, basic=True)
    ckpt_minutes: float = setting(
        15.0, "minutes between checkpoints at most, the first after one minute; 0: no matter"
    )
    keep_last: int = setting(2, "numbered checkpoints to keep", least=1)
    mirror: str = setting(
        "",
        "second place for the run's files, a folder or s3:// gs:// hf:// …; a fresh machine goes "
        "on from there",
        basic=True,
    )
    time: str = setting(
        "",
        "train for so long, as 20m or 8h, instead of --max_steps: the learning rate has come down "
        "when the time is over; a number alone is of hours",
        basic=True,
        also="hours",
    )
    max_hours: float = setting(
        0.0, "stop and save after so many hours, as at a SIGTERM; 0: off", repeated=False
    )
    stall_minutes: float = setting(
        60.0,
        "a step that takes longer ends the process, with the stacks of its threads; 0: off",
        below=1e5,
    )
    wandb: str = setting("", "Weights & Biases project to log to", basic=True)
    tensorboard: bool = setting(False, "write TensorBoard events to OUT/tensorboard")
    profile: int = setting(
        0, "profile N steps: write a trace and print the 10 slowest operations", repeated=False
    )

    @property
    def budget(self) -> float:
        """Seconds of --time, or 0."""
        known = SPAN.fullmatch(self.time)
        if not known:
            return 0.0
        return float(known[1]) * SPAN_UNITS[known[2] or "h"]

    def faults(self) -> Iterator[tuple[str, str]]:
        if self.time and not self.budget:
            yield f"--time {self.time} is no time", "write it as 90s, 20m or 8h"
        if self.budget and self.max_steps not in (0, type(self).max_steps):
            yield f"--time and --max_steps {self.max_steps} are both given", "keep one of them"


@dataclass
class OptimSettings:
    """Optimizer and schedule."""

    lr: float = setting(
        0.0,
        "peak learning rate; auto: by the model's size",
        zero="auto",
        basic=True,
    )
    embed_lr: float = setting(
        0.0, "the embeddings' own; auto: in proportion to --lr, by size", zero="auto"
    )
    head_lr: float = setting(
        0.0, "the output head's own; auto: in proportion to --lr, by size", zero="auto"
    )
    min_lr: float = setting(0.1, "final learning rate of cosine and wsd, as a fraction of --lr")
    optimizer: str = setting(
        "muon",
        "muon updates the layers' matrices, AdamW the rest",
        choices=("adamw", "muon"),
        same_on_resume=True,
        basic=True,
    )
    schedule: str = setting(
        "wsd",
        "learning rate after the warm-up; wsd is constant, then decays",
        choices=("cosine", "wsd", "wsd_sqrt", "constant", "inverse_sqrt"),
        basic=True,
    )
    warmup_steps: int = setting(
        0,
        "steps of linear warm-up; auto: a twentieth of the run, 100 at most",
        zero="auto",
        off=1,
    )
    decay_share: float = setting(
        0.2, "fraction of --max_steps over which wsd decays the learning rate", below=1.0
    )
    weight_decay: float = setting(0.1, "weight decay; not applied to norms and embeddings")
    beta1: float = setting(0.9, "AdamW's beta1", below=1.0)
    beta2: float = setting(0.95, "AdamW's beta2", below=1.0)
    grad_clip: float = setting(1.0, "maximum gradient norm; 0 disables clipping")
    z_loss: float = setting(0.0, "weight of log(Z)^2, which keeps the logits small")
    muon_lr: float = setting(0.0, "Muon's peak learning rate; 0 means --lr")
    muon_scale: str = setting(
        "rms",
        "size of Muon's updates: as AdamW's, or by the matrix's shape",
        choices=("rms", "shape"),
    )
    muon_momentum: float = setting(0.95, "Muon's momentum", below=1.0)
    muon_warmup: int = setting(300, "steps over which Muon's momentum rises from 0.85")
    ema: float = setting(
        0.0, "decay of averaged weights, which are then evaluated and exported; 0: off", below=1.0
    )


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


CONTEXT_LIMIT = 1 << 24  # tokens: the rotary tables of all places are in memory


@dataclass
class ModelSettings:
    """Architecture."""

    seq_len: int = setting(
        512, "context length in tokens", least=2, below=CONTEXT_LIMIT, basic=True
    )
    n_layer: int = setting(12, "number of layers", least=1, below=1 << 14, basic=True)
    d_model: int = setting(768, "width of the residual stream", least=2, basic=True)
    n_head: int = setting(12, "number of query heads", least=1, basic=True)
    n_kv_head: int = setting(0, "number of key/value heads; 0 means as many as query heads")
    head_dim: int = setting(0, "head size; 0 means d_model / n_head")
    ffn_mult: float = setting(4.0, "feed-forward width as a multiple of d_model", least=0.01)
    ffn_hidden: int = setting(0, "feed-forward width, instead of --ffn_mult")
    dropout: float = setting(0.0, "dropout probability, also in attention", below=1.0)
    tie: bool = setting(True, "share the weights of embedding and output head")
    rope_theta: float = setting(10000.0, "base of the rotary frequencies", least=1.0)
    norm_eps: float = setting(1e-6, "epsilon of RMSNorm")
    qk_norm: bool = setting(False, "RMSNorm on the queries and keys of each head")
    qkv_bias: bool = setting(False, "biases on queries, keys and values, as Qwen2 has them")
    nope_every: int = setting(0, "every n-th layer has no rotary embedding (NoPE); 0: off")
    window: int = setting(0, "sliding-window attention over this many tokens; 0: off")
    full_every: int = setting(0, "with --window, every n-th layer has full attention; 0: none")
    full_first: int = setting(0, "with --window, the first n layers have full attention")
    n_sink: int = setting(0, "learned tokens before the text that every query may attend to")
    doc_mask: bool = setting(False, "packed documents do not attend to each other")
    n_expert: int = setting(0, "experts of each feed-forward layer (mixture of experts); 0: off")
    n_expert_active: int = setting(2, "experts used for each token", least=1)
    balance_loss: float = setting(0.01, "weight of the experts' load-balancing loss")
    router_z_loss: float = setting(0.001, "weight of the routers' z-loss")
    softcap: float = setting(0.0, "soft-cap logits at ±X (tanh); 0: off")
    embed_scale: bool = setting(False, "multiply embeddings by sqrt(d_model)")
    trunc_init: bool = setting(False, "truncated-normal initialization, std 0.5/sqrt(d_model)")
    rope_scaling: str = setting(
        "none",
        "extend the context of a trained model",
        choices=("none", "linear", "llama3", "yarn"),
    )
    rope_factor: float = setting(1.0, "factor by which the context is extended", least=1.0)
    rope_original: int = setting(0, "context before extension; 0 means seq_len / rope_factor")
    rope_low: float = setting(
        1.0, "of llama3 scaling: turns over that context up to which all is stretched", least=0.0
    )
    rope_high: float = setting(4.0, "the same, from which nothing is", least=0.0)
    vocab_size: int = setting(0, "number of token ids, from the tokenizer", flag=False)
    bos_id: int = setting(1, "id of <s>, from the tokenizer", flag=False)
    scalar_head: bool = setting(False, "a head that scores, beside the output head", flag=False)
    rope_layout: str = setting("half", "pairing of rotary dimensions", flag=False)

    def windowed(self, layer: int) -> bool:
        full = self.full_every > 0 and (layer + 1) % self.full_every == 0
        return self.window > 0 and not full and layer >= self.full_first

    def rotates(self, layer: int) -> bool:
        return self.nope_every == 0 or (layer + 1) % self.nope_every > 0

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def head_size(self) -> int:
        return self.head_dim or self.d_model // self.n_head

    @property
    def ffn_width(self) -> int:
        return self.ffn_hidden or int(self.ffn_mult * self.d_model)

    def faults(self) -> Iterator[tuple[str, str]]:
        if self.n_head < 1 or self.d_model < 2:  # reported as too small
            return
        if not self.head_dim and self.d_model % (2 * self.n_head):
            yield self.uneven_heads()
        elif self.head_dim % 2:
            yield f"--head_dim {self.head_dim} is odd", f"use --head_dim {self.head_dim + 1}"
        if self.n_head % self.kv_heads:
            yield (
                f"--n_kv_head {self.n_kv_head} does not divide --n_head {self.n_head}",
                f"use {either(divisors(self.n_head))}",
            )
        if self.ffn_width < 1:
            yield f"--ffn_mult {self.ffn_mult} makes the feed-forward width 0", "use a larger one"
        for name in ("full_every", "full_first"):
            if getattr(self, name) and not self.window:
                yield f"--{name} needs --window", "give both, or neither"
        if self.rope_scaling == "llama3" and self.rope_low >= self.rope_high:
            yield "--rope_low is not below --rope_high", "use a lower one"
        if self.n_expert and self.n_expert_active > self.n_expert:
            yield f"--n_expert_active is more than --n_expert {self.n_expert}", "use fewer"

    def uneven_heads(self) -> tuple[str, str]:
        """The fault of heads that are no even size, with the nearest numbers that are."""
        width, heads = self.d_model, self.n_head
        fit = [n for n in divisors(width) if width % (2 * n) == 0]
        near = sorted(sorted(fit, key=lambda n: abs(n - heads))[:2])
        below = width - width % (2 * heads)
        widths = either(n for n in (below, below + 2 * heads) if n)
        fix = f"--d_model {widths}, or give --head_dim"
        if near:
            fix = f"--n_head {either(near)}, or {fix}"
        return (
            f"--n_head {heads} does not divide --d_model {width} into heads of even size",
            f"use {fix}",
        )


@dataclass
class TuneSettings:
    """Starting point and data."""

    ckpt: str = setting("", "checkpoint to start from, or the folder of a run", basic=True)
    base: str = setting("", "base checkpoint of the adapters in --ckpt, where it has moved")
    tokenizer: str = setting(
        "",
        "tokenizer.model, or a Hugging Face folder, for a checkpoint that carries none",
        also="spm",
    )
    data: tuple[str, ...] = setting(
        (),
        "files of rows, .jsonl .json .parquet, or a mixture, NAME=FILE:WEIGHT",
        basic=True,
    )
    val_data: tuple[str, ...] = setting((), "files of validation rows, instead of --val_split")
    val_split: float = setting(
        0.05,
        "fraction of rows for validation, chosen by their first question",
        below=1.0,
        basic=True,
    )
    on_bad_row: str = setting(
        "error", "what to do with rows that cannot be read", choices=("error", "skip")
    )
    epochs: float = setting(1.0, "passes over the data, where --max_steps is 0", basic=True)
    seq_len: int = setting(
        0, "context length in tokens; 0 means the checkpoint's", below=CONTEXT_LIMIT
    )
    dropout: float = setting(0.0, "dropout probability, also in attention", below=1.0)

    def domains(self) -> list[tuple[str, tuple[str, ...], float]]:
        """(name, files, weight) of each part; weights sum to 1; files without one are one part."""
        if not any("=" in path for path in self.data):
            return [("", self.data, 1.0)]
        return [(name, (path,), weight) for name, path, weight in mixture(self.data)]

    def faults(self) -> Iterator[tuple[str, str]]:
        if not self.ckpt:
            yield "--ckpt is missing", "give the checkpoint to start from, --ckpt runs/lm"
        yield from mixture_faults("data", "FILE", self.data)


DIVERGENCES = ("auto", "forward", "reverse", "jsd")


@dataclass
class DistillSettings:
    """Teacher."""

    teacher: str = setting(
        "",
        "model to learn from: a checkpoint, a run, or a Hugging Face folder, of the same tokenizer",
        basic=True,
    )
    data_dir: str = setting(
        "",
        "folder written by prep, or a mixture of such, to learn on text instead of --data",
        basic=True,
    )
    divergence: str = setting(
        "auto",
        "forward: from teacher to student, so that it covers all that the teacher may say; "
        "reverse: from student to teacher, so that it keeps to the teacher's likeliest; jsd: from "
        "both to their mean; auto: reverse with --on_policy, else forward",
        choices=DIVERGENCES,
    )
    on_policy: float = setting(
        0.0,
        "share of the rows that the student answers itself, to be corrected by the teacher, "
        "from 0 to 1",
        below=1.0 + 1e-9,
        basic=True,
    )
    soften: float = setting(
        1.0, "temperature that both models' probabilities are compared at", least=1e-2
    )
    text_weight: float = setting(
        0.0, "weight of the cross-entropy of the rows' own answers, or of the text"
    )
    max_new_tokens: int = setting(128, "maximum tokens of a student's answer", least=1)
    temperature: float = setting(1.0, "sampling temperature of a student's answer", least=1e-3)
    rollout_batch: int = setting(256, "answers generated at a time on a device", least=1)

    def faults(self) -> Iterator[tuple[str, str]]:
        if not self.teacher:
            yield "--teacher is missing", "name the model to learn from, --teacher runs/large"
        if self.data_dir and self.on_policy:
            yield "--on_policy needs questions", "give rows with --data instead of --data_dir"
        yield from mixture_faults("data_dir", "FOLDER", self.data_dir.split(","))

    @property
    def measure(self) -> str:
        """The divergence itself."""
        if self.divergence != "auto":
            return self.divergence
        return "reverse" if self.on_policy else "forward"


@dataclass
class SftSettings:
    """Conversations."""

    pack: bool = setting(
        True,
        "pack several conversations into a sequence; they do not attend to each other",
        same_on_resume=True,
    )
    samples: int = setting(3, "validation questions answered and printed at each evaluation")
    sample_tokens: int = setting(64, "maximum tokens of such an answer", least=1)


PREFERENCES = {  # name of a loss -> values of settings fields; a flag given beside --loss wins
    "sigmoid": {},
    "ipo": {},
    "hinge": {},
    "robust": {},
    "apo_zero": {},
    "apo_down": {},
    "simpo": {"beta": 2.0},
    "orpo": {},
}


@dataclass
class DpoSettings:
    """Preference loss."""

    loss: str = setting(
        "sigmoid",
        "simpo and orpo need no reference model; simpo sets --beta 2",
        expands=PREFERENCES,
        same_on_resume=True,
        basic=True,
    )
    beta: float = setting(0.1, "strength of the pull to the reference", least=1e-6, basic=True)
    label_smoothing: float = setting(
        0.0,
        "fraction of pairs assumed to be labelled the wrong way round; for sigmoid, robust, simpo",
        below=0.5,
    )
    simpo_gamma: float = setting(0.5, "target margin of simpo")

    def faults(self) -> Iterator[tuple[str, str]]:
        if self.label_smoothing and self.loss not in ("sigmoid", "robust", "simpo"):
            yield (
                f"--label_smoothing has no meaning in --loss {self.loss}",
                "drop it, or use --loss sigmoid, robust or simpo",
            )


@dataclass
class LoraSettings:
    """Low-rank adapters."""

    lora_rank: int = setting(
        0,
        "rank of the adapters trained instead of the weights; 0: off",
        same_on_resume=True,
        basic=True,
    )
    lora_alpha: float = setting(
        0.0, "adapters are scaled by alpha / rank; 0 means twice the rank", same_on_resume=True
    )
    lora_dropout: float = setting(0.0, "dropout on the adapters' input", below=1.0)
    lora_targets: str = setting(
        "qkv,proj,w1,w2,w3", "names of the matrices that get adapters", same_on_resume=True
    )
    lora_merge: bool = setting(
        False, "also write OUT/merged.pt, a checkpoint that does not need its base"
    )

    @property
    def scale(self) -> float:
        alpha = self.lora_alpha or 2.0 * self.lora_rank
        return alpha / max(1, self.lora_rank)

    def faults(self) -> Iterator[tuple[str, str]]:
        for name in sorted({*self.lora_targets.split(",")} - {"qkv", "proj", "w1", "w2", "w3"}):
            yield f"--lora_targets {name} is not known", "choose from qkv,proj,w1,w2,w3"


@dataclass
class RewardSettings:
    """Scoring instead of training."""

    score: tuple[str, ...] = setting(
        (), "score these rows with the reward model --ckpt", basic=True
    )
    out: str = setting("", "file for the scored rows, .jsonl", basic=True)


@dataclass
class TaskSettings:
    """Generated rows, instead of --data."""

    task: str = setting(
        "", "kind of rows", choices=("", "add", "countdown", "sort", "copy"), basic=True
    )
    difficulty: int = setting(
        2,
        "maximum digits of a number to add; how many numbers or letters in other tasks",
        least=1,
        basic=True,
    )
    task_rows: int = setting(10_000, "number of rows, as far as there are different ones", least=2)


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

    algo: str = setting(
        "grpo", "sets the flags below and of rollouts", expands=ALGORITHMS, basic=True
    )
    ratio: str = setting(
        "token",
        "what is clipped: the ratio of each token, the mean ratio of the sequence, "
        "or the weight of each log-probability",
        choices=("token", "sequence", "weight"),
    )
    clip_low: float = setting(0.2, "the ratio is clipped at 1 - X")
    clip_high: float = setting(0.2, "the ratio is clipped at 1 + X")
    advantage: str = setting(
        "mean_std",
        "reward minus the group's mean, divided by its standard deviation or not; "
        "gae uses a value model",
        choices=("mean_std", "mean", "gae"),
        same_on_resume=True,
    )
    normalise: str = setting(
        "sequence",
        "the loss is averaged over each completion's tokens, over all tokens of the step, "
        "or divided by --max_new_tokens",
        choices=("sequence", "tokens", "constant"),
    )
    updates: int = setting(1, "passes over each batch of completions", least=1)
    minibatches: int = setting(
        1,
        "optimizer steps per pass: the completions are split by prompts",
        least=1,
        basic=True,
    )
    mask_truncated: bool = setting(
        False, "completions cut off at --max_new_tokens have no policy loss"
    )
    clip_dual: float = setting(
        0.0, "bound on the loss of a negative advantage, as a multiple of it (dual clip); 0: off"
    )
    tis_cap: float = setting(
        0.0,
        "weight tokens by trainer over sampler probability, up to X "
        "(truncated importance sampling); 0: off",
    )
    fp32_head: bool = setting(
        False, "compute logits in fp32, in sampling and in training, where --dtype is bf16"
    )
    kl: float = setting(0.0, "weight of the KL divergence from the reference model", basic=True)
    kl_in_reward: bool = setting(
        False, "subtract the divergence from the reward, instead of adding it to the loss"
    )
    reference_steps: int = setting(
        0, "steps after which the reference becomes a copy of the policy; 0: never"
    )
    entropy_target: float = setting(
        0.0, "entropy in nats per token below which an entropy bonus grows; 0: off"
    )
    lm_loss: float = setting(0.0, "weight of the language-model loss on correct completions")


@dataclass
class ValueSettings:
    """Value model, with --advantage gae."""

    gamma: float = setting(1.0, "discount factor per token")
    lam: float = setting(0.95, "lambda of generalized advantage estimation")
    length_alpha: float = setting(
        0.0, "alpha: the policy's lambda is 1 - 1/(alpha * length); 0: off"
    )
    value_lr: float = setting(0.0, "learning rate of the value model; 0 means twice --lr")
    value_clip: float = setting(0.0, "maximum change of a value in an update; 0: off")
    value_warmup: int = setting(0, "first steps that train the value model only")
    dense_reward: float = setting(
        0.0, "weight of the gain in smoothed value, as a reward for each token"
    )
    dense_smoothing: float = setting(
        0.5, "weight of the previous value in the smoothed value", below=1.0
    )


TOOL_NAMES = ("calculator", "python")

TOOLS_HELP = "what the model may call: a call ends its turn, and it goes on from the result"

TURNS_HELP = "maximum answers of an episode, where something replies to them"


@dataclass
class JudgeSettings:
    """A language model as a judge, --reward judge:URL."""

    judge_model: str = setting("", "name of the model that the judge's server is asked for")
    judge_rubric: str = setting(
        "", "file of what a good answer is; the judge gives 0 to 10 points, which become 0 to 1"
    )
    judge_tokens: int = setting(512, "maximum tokens of a judgement", least=1)
    judge_at_once: int = setting(16, "requests at a time on each rank", least=1)
    judge_seconds: float = setting(60.0, "maximum seconds of a request", least=0.01)
    judge_usd: float = setting(
        0.0, "price of a million of its tokens, prompts included, for cost/judge_usd"
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        if self.judge_rubric and not Path(self.judge_rubric).is_file():
            yield f"--judge_rubric {self.judge_rubric} does not exist", "check the path"


@dataclass
class RolloutSettings:
    """Completions and rewards."""

    prompts: int = setting(
        16, "prompts per step, over all devices", least=1, below=1 << 20, basic=True
    )
    group_size: int = setting(8, "completions per prompt", least=2, below=1 << 16, basic=True)
    max_new_tokens: int = setting(128, "maximum tokens of a completion", least=1, basic=True)
    temperature: float = setting(
        1.0, "sampling temperature at the first step", least=1e-3, basic=True
    )
    temperature_end: float = setting(0.0, "temperature at the last step; 0 means the same")
    rollout_batch: int = setting(256, "completions generated at a time on a device", least=1)
    tools: tuple[str, ...] = setting((), TOOLS_HELP, choices=TOOL_NAMES, basic=True)
    env: str = setting(
        "",
        "FILE.py:CLASS of an environment of several turns: reset(row) gives messages, step(text) "
        "an observation, a reward, and whether it is done",
    )
    max_turns: int = setting(4, TURNS_HELP, least=1)
    share_prompts: bool = setting(
        True, "in training, read each prompt once for all its completions; not where compiled"
    )
    reward: tuple[str, ...] = setting(
        (),
        "number math choice exact regex format length countdown code FILE.py:FUNCTION judge:URL or "
        "a reward model, each optionally with :WEIGHT; the first one says what is correct; "
        "default: the task's, or number",
        basic=True,
    )
    pattern: str = setting("", "regular expression of the reward regex, for rows without their own")
    reward_timeout: float = setting(
        5.0, "maximum seconds of a call of FUNCTION, or of a program under test", least=0.01
    )
    overlong: float = setting(
        0.0, "last fraction of --max_new_tokens over which the reward falls by 1", below=1.0
    )
    skip_solved: int = setting(
        0,
        "leave out a prompt for a while that all completions solved so many times in a row; 0: off",
    )
    curriculum: bool = setting(
        False, "draw prompts the likelier, the more their last completions differed"
    )
    dynamic_sampling: bool = setting(False, "replace groups whose rewards are all equal")
    max_draws: int = setting(8, "maximum draws of prompts per step for that", least=1)
    eval_prompts: int = setting(200, "held-out prompts per evaluation", least=1)
    eval_samples: int = setting(
        4, "completions of each at an evaluation: the k of pass@k", least=1, below=1 << 16
    )
    samples: int = setting(2, "completions per step to keep, and to print at an evaluation")

    def faults(self) -> Iterator[tuple[str, str]]:
        if self.tools and self.env:
            yield (
                "--tools and --env are both given",
                "call the tools in the environment, or drop one",
            )


@dataclass
class SamplingSettings:
    """Sampling."""

    max_new_tokens: int = setting(200, "maximum tokens to generate", least=1, basic=True)
    temperature: float = setting(0.8, "sampling temperature; 0 is greedy", basic=True)
    top_k: int = setting(0, "sample from the k most likely tokens; 0: off", basic=True)
    top_p: float = setting(
        0.95,
        "sample from the most likely tokens of this total probability; 1: off",
        basic=True,
    )
    repetition_penalty: float = setting(
        1.0, "divides the logits of tokens that were seen; 1: off", least=1e-6
    )
    no_repeat_ngram_size: int = setting(0, "no n-gram of this length occurs twice; 0: off")

    @property
    def penalises(self) -> bool:
        """Whether what was drawn changes the chances of what comes."""
        return self.repetition_penalty != 1.0 or self.no_repeat_ngram_size > 0


@dataclass
class GenerateSettings:
    """Prompts and output of generate."""

    ckpt: str = setting("", "checkpoint, or the folder of a run", basic=True)
    base: str = setting("", "base checkpoint of the adapters in --ckpt, where it has moved")
    tokenizer: str = setting(
        "",
        "tokenizer.model, or a Hugging Face folder, for a checkpoint that carries none",
        also="spm",
    )
    prompt: str = setting("", "text to continue", basic=True)
    prompt_file: str = setting(
        "", "file of prompts, one per line, or rows of sft to answer", basic=True
    )
    batch_size: int = setting(64, "completions generated at a time", least=1, below=1 << 20)
    num_samples: int = setting(1, "completions of each prompt", least=1, below=1 << 20, basic=True)
    stop_at_eos: bool = setting(True, "stop at </s>")
    chat: bool = setting(False, "the prompt is a question to a chat model", basic=True)
    tools: tuple[str, ...] = setting((), TOOLS_HELP, choices=TOOL_NAMES)
    max_turns: int = setting(4, TURNS_HELP, least=1)
    system: str = setting("", "system prompt, with --chat", basic=True)
    best_of: int = setting(
        1,
        "generate N completions and keep the one that --reward_ckpt scores highest",
        least=1,
        below=1 << 16,
    )
    reward_ckpt: str = setting("", "reward model for --best_of")
    out: str = setting(
        "", "write {prompt, completion} rows to this .jsonl instead of printing", basic=True
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        if not self.ckpt:
            yield "--ckpt is missing", "give a checkpoint, --ckpt runs/lm/ckpt_best.pt"
        if self.prompt and self.prompt_file:
            yield "--prompt and --prompt_file are both given", "keep one of them"
        if (self.best_of > 1) != bool(self.reward_ckpt):
            yield "--best_of and --reward_ckpt need each other", "give both, or neither"
        if self.tools and not self.chat:
            yield "--tools are called in a chat", "add --chat"
        if self.system and not self.chat:
            yield "--system is for a chat model", "add --chat"


@dataclass
class ChatSettings:
    """The model and the conversation."""

    ckpt: str = setting("", "checkpoint, or the folder of a run", basic=True)
    base: str = setting(
        "", "base checkpoint of the adapters in --ckpt, where it has moved", basic=True
    )
    tokenizer: str = setting(
        "",
        "tokenizer.model, or a Hugging Face folder, for a checkpoint that carries none",
        basic=True,
        also="spm",
    )
    system: str = setting("", "system prompt", basic=True)
    load: str = setting("", "conversation to go on with, as /save writes it", basic=True)
    tools: tuple[str, ...] = setting((), TOOLS_HELP, choices=TOOL_NAMES, basic=True)
    max_turns: int = setting(4, TURNS_HELP, least=1)

    def faults(self) -> Iterator[tuple[str, str]]:
        if not self.ckpt:
            yield "--ckpt is missing", "give a checkpoint, --ckpt runs/sft"


@with_defaults(max_new_tokens=512)
class ChatSampling(SamplingSettings):
    """Sampling."""


@with_defaults(max_new_tokens=256, temperature=0.0, top_p=1.0)
class EvalSampling(SamplingSettings):
    """Sampling of answers."""


@dataclass
class EvalSettings:
    """What to evaluate, and on what."""

    ckpt: tuple[str, ...] = setting((), "checkpoints, or folders of runs, to compare", basic=True)
    base: str = setting("", "base checkpoint of the adapters in --ckpt, where it has moved")
    tokenizer: str = setting(
        "",
        "tokenizer.model, or a Hugging Face folder, for a checkpoint that carries none",
        also="spm",
    )
    tasks: tuple[str, ...] = setting(
        (),
        "NAME=FILE or NAME@SHOTS=FILE[,FILE OF SHOTS]; NAME is arc hellaswag piqa winogrande mmlu "
        "commonsenseqa openbookqa boolq medqa choice (multiple choice), sst2 classify, ppl, rouge, "
        "gsm8k humaneval mbpp, or a checker of answers: number math letter exact regex code; "
        "or a data folder; of a FILE alone the columns tell the NAME",
        basic=True,
    )
    suite: tuple[str, ...] = setting(
        (),
        "basics DIR: every file of a folder that is a task, without and with --n_shot examples",
        basic=True,
    )
    n_shot: int = setting(0, "solved examples before each question; 5 in a --suite", basic=True)
    limit: int = setting(0, "rows of each task, from its first; 0: all", basic=True)
    chat: str = setting(
        "auto",
        "ask for answers in the chat format; auto: where the model was taught it",
        choices=("auto", "0", "1"),
    )
    num_samples: int = setting(
        1,
        "answers to each question, for pass@k and majority vote",
        least=1,
        below=1 << 16,
        basic=True,
    )
    reward_ckpt: str = setting("", "reward model that chooses one of --num_samples answers")
    tools: tuple[str, ...] = setting((), TOOLS_HELP, choices=TOOL_NAMES)
    max_turns: int = setting(4, TURNS_HELP, least=1)
    pattern: str = setting("", "regular expression of the checker regex")
    reward_timeout: float = setting(
        5.0, "maximum seconds of a check by math, or of a program under test", least=0.01
    )
    stride: int = setting(
        0, "tokens that each window of ppl predicts; 0: half the context; the context: disjoint"
    )
    batch_size: int = setting(32, "sequences at a time on a device", least=1, below=1 << 20)
    out_dir: str = setting("eval", "folder for results.json and answers.jsonl", basic=True)
    worst: int = setting(0, "print the N most telling errors of each task", basic=True)
    confusion: bool = setting(False, "print the confusion matrix of classify and sst2")
    attention: str = setting("", "draw what every head attends to in this text, DIR/attention.png")
    per_token: str = setting(
        "", "file of text whose tokens are coloured by their loss, DIR/per_token.html"
    )
    harness: str = setting(
        "", "tasks of lm-evaluation-harness, arc_easy,hellaswag,gsm8k", basic=True
    )
    harness_path: str = setting("", "folder of task files of your own for --harness")

    def faults(self) -> Iterator[tuple[str, str]]:
        if not self.ckpt:
            yield "--ckpt is missing", "give checkpoints to compare, --ckpt runs/lm runs/sft"
        looks = self.attention or self.per_token
        if not (self.tasks or self.suite or self.harness or looks):
            yield (
                "there is nothing to evaluate",
                "give --tasks NAME=FILE …, --suite basics DIR or --harness NAMES",
            )
        if self.suite and (len(self.suite) != 2 or self.suite[0] != "basics"):
            yield f"--suite {' '.join(self.suite)} is not known", "use --suite basics DIR"
        if self.reward_ckpt and self.num_samples == 1:
            yield "--reward_ckpt has one answer to choose from", "add --num_samples 8"
        if len(set(self.ckpt)) < len(self.ckpt):
            yield "--ckpt names a checkpoint twice", "name it once"


@dataclass
class InfoSettings(StepSettings):
    """What to describe, or to plan."""

    path: str = setting("", "checkpoint, run folder or data folder", positional=True, basic=True)
    vocab: int = setting(
        0, "vocabulary of the planned model; 0 means the preset's, or 32,000", basic=True
    )
    tokens: float = setting(0.0, "tokens to train on; 0 means 20 per parameter", basic=True)
    gpu: str = setting("", "GPU to plan for, such as H100, at the utilization --mfu", basic=True)
    gpus: int = setting(1, "number of GPUs to plan for", least=1, basic=True)
    mfu: float = setting(0.4, "fraction of its peak that --gpu reaches", least=0.01, below=1.0)
    tok_per_s: float = setting(0.0, "measured tokens per second of all GPUs, instead of --gpu")


@dataclass
class PlotSettings:
    """What to plot."""

    runs: tuple[str, ...] = setting((), "folders of runs", positional=True, basic=True)
    out: str = setting("", "picture to write, .png .svg .pdf; default: RUN/plot.png", basic=True)
    against: str = setting(
        "step", "the x axis", choices=("step", "tokens", "hours", "dollars"), basic=True
    )
    terminal: bool = setting(False, "draw with text on the terminal instead", basic=True)
    html: bool = setting(
        False,
        "write a report of one run: settings, curves, samples, results of eval",
        basic=True,
    )
    results: tuple[str, ...] = setting(
        (),
        "results.json of eval, or its folders, for the report; RUN/eval is found by itself",
        basic=True,
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        if not self.runs:
            yield "no run is named", "give the folders of runs, plot runs/lm runs/sft"
        if self.html and len(self.runs) > 1:
            yield "--html reports one run", "name one, or drop --html"
        if self.html and self.terminal:
            yield "--html and --terminal are both given", "keep one of them"
        if self.results and not self.html:
            yield "--results is for the report", "add --html"


@dataclass
class DemoSettings:
    """The demo."""

    out_dir: str = setting("demo", "folder of the demo's data and runs", basic=True)
    quick: bool = setting(False, "a smaller model, trained in about a minute", basic=True)
    max_steps: int = setting(
        0, "training steps; 0 means as many as a few minutes allow", basic=True
    )


@with_defaults("path", "grad_accum_steps", "grad_checkpoint", "gpu", "mfu", "tok_per_s")
class BenchSettings(InfoSettings):
    """What to measure, and to plan."""


@dataclass
class SweepSettings:
    """What to try, besides the flags of the command: those with several values are combined."""

    command: str = setting(
        "train",
        "command whose flags follow",
        choices=("train", "sft", "dpo", "reward", "grpo"),
        basic=True,
    )
    out_dir: str = setting("runs/sweep", "folder of the runs, a folder each", basic=True)
    metric: str = setting("", "metric to sort by; default: val/loss, or that of the command")
    jobs: int = setting(1, "runs at a time, a GPU each", least=1, below=1 << 10, basic=True)
    words: tuple[str, ...] = setting((), "flags of the command", flag=False)


@with_defaults("preset", out_dir="runs/tuned", max_steps=0, eval_interval=100, ckpt_interval=100)
class TuneRun(RunSettings):
    """The run."""


@with_defaults(
    "z_loss",
    optimizer="adamw",
    schedule="cosine",
    weight_decay=0.0,
)
class TuneOptim(OptimSettings):
    """Optimizer and schedule."""


@with_defaults(schedule="constant")
class GrpoOptim(TuneOptim):
    """Optimizer and schedule."""


@with_defaults(
    "log_interval",
    "grad_accum_steps",
    "eval_tokens",
    max_steps=200,
    log_interval=1,
    eval_interval=20,
    ckpt_interval=20,
)
class GrpoRun(TuneRun):
    """The run."""

    usual_batch = 32


@with_defaults("dropout")  # without it the first ratio is exactly 1
class GrpoTune(TuneSettings):
    """Starting point and data."""


@with_defaults("lora_dropout")  # likewise
class GrpoLora(LoraSettings):
    """Low-rank adapters."""


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


def on_cuda(x: Tensor | torch.device) -> bool:
    """Whether what is done with x goes CUDA's way. This alone decides it, so that tests take that
    way on a CPU."""
    device = x.device if isinstance(x, Tensor) else x
    return device.type == "cuda"


@dataclass(frozen=True)
class Gathered:
    """Rows that are on their way from all ranks."""

    rows: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        if self.work:
            self.work.wait()
        return self.rows


@dataclass(frozen=True)
class Machine:
    """The device and precision of this process, and its place among the ranks."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1
    compiles: bool = False  # what generates

    @property
    def main(self) -> bool:
        return self.rank == 0

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def to_device(self, tensor: Tensor) -> Tensor:
        """A copy on the device; on CUDA the transfer overlaps with computation."""
        if on_cuda(self.device) and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=on_cuda(self.device))

    def all_reduce_sum(
        self,
        *numbers: float,
        how: dist.ReduceOp = dist.ReduceOp.SUM,
    ) -> list[float]:
        """Each number summed over all ranks, or as `how` says; on the CPU, so no device waits."""
        found = torch.tensor(numbers, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(found, how)
        return found.tolist()

    def all_reduce_max(self, number: float) -> float:
        return self.all_reduce_sum(number, how=dist.ReduceOp.MAX)[0]

    def all_gather(self, value) -> list:
        """The values of all ranks, in their order, on every rank."""
        if self.world == 1:
            return [value]
        box = [None] * self.world
        dist.all_gather_object(box, value)
        return box

    def share_of(self, rows: Tensor) -> Tensor:
        """This rank's part of rows (n, …), as many as any other's: filled up with zeros."""
        if self.world == 1:
            return rows
        each = -(-len(rows) // self.world)
        mine = rows[self.rank * each : (self.rank + 1) * each]
        return torch.cat((mine, rows.new_zeros(each - len(mine), *rows.shape[1:])))

    def gather(self, mine: Tensor, count: int) -> "Gathered":
        """Begin to gather the shares of all ranks to the `count` rows that they are of."""
        if self.world == 1:
            return Gathered(mine, None)
        whole = mine.new_empty(len(mine) * self.world, *mine.shape[1:])
        gather = getattr(dist, "all_gather_single", None)  # since torch 2.13
        gather = gather or dist.all_gather_into_tensor
        work = gather(whole, mine.contiguous(), async_op=True)
        return Gathered(whole[:count], work)

    def broadcast(self, value):
        """The value of rank 0, on every rank."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def spread(self, tensor: Tensor) -> None:
        """Give a tensor the numbers that it has on rank 0."""
        if self.world > 1:
            dist.broadcast(tensor, 0)

    def on_main(self, work: Callable, *args):
        """The result of work(*args), done on rank 0 alone, or its failure, on every rank."""
        result = None
        if self.main:
            try:
                result = work(*args)
            except (OSError, UserError) as fault:
                result = fault
        result = self.broadcast(result)
        if isinstance(result, (OSError, UserError)):
            raise result
        return result


def can_compile(device: torch.device) -> bool:
    compilers = (os.environ.get("CXX") or "g++", "clang++", "cl")
    return device.type != "mps" and any(map(shutil.which, compilers))


SHAPES_COMPILED = 64  # of one function; those beyond would run eager


def raise_shape_limits() -> None:
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, SHAPES_COMPILED)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 1024)


def compiled(function: Callable, **options) -> Callable:
    """The function or module compiled, anew for each of its shapes."""
    raise_shape_limits()
    return torch.compile(function, dynamic=False, **options)


@functools.cache
def compiled_once(function: Callable, **options) -> Callable:
    return compiled(function, **options)


def bf16_cpu() -> bool:
    """Whether this CPU multiplies bf16 faster than fp32: by AMX, by Arm's bf16, or by AVX-512, of
    which Intel's processors without AMX do no more in a second than of fp32 (measured 0.6)."""
    with contextlib.suppress(OSError):  # not Linux
        words = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
        if "avx512_bf16" in words and "GenuineIntel" not in words:
            return True
        return not {"amx_bf16", "bf16", "svebf16"}.isdisjoint(words)
    return False


def pick_device(name: str) -> torch.device:
    """The device of --device; UserError where it is not available."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name == "auto":
        name = available[0]
    if name not in available:
        raise UserError(
            f"--device {name} is not available here", f"use --device {either(available)}"
        )
    if name == "cuda":
        return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of --dtype; auto is the fastest that trains well on the device."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    if on_cuda(device):
        modern = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if modern else torch.float16
    if device.type == "cpu" and bf16_cpu():
        return torch.bfloat16
    return torch.float32


def activate_flash(name: str) -> None:
    try:
        torch.nn.attention.activate_flash_attention_impl(name)
    except (AttributeError, ImportError, RuntimeError, ValueError) as fault:
        raise UserError(
            f"--flash {name} is not available here ({fault})",
            "install its package and a newer torch, or drop the flag",
        ) from fault


def prepare_cpu(threads: int) -> None:
    """Share the cores among the processes of this machine, and keep freed memory for reuse."""
    torch.set_num_threads(threads or cores_here())
    # Each step asks for the large blocks that the step before freed: glibc shall keep them.
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
        mallopt(-2, 64 << 20)  # M_TOP_PAD


def backends(device: torch.device) -> str:
    """Of the collectives; numbers in the CPU's memory are exchanged too."""
    return "cpu:gloo,cuda:nccl" if on_cuda(device) else "gloo"


JOIN_TIMEOUT = timedelta(minutes=30)  # for ranks to begin, and for each exchange between them


def fresh_store(store: dist.Store, rank: int, world: int) -> dist.Store:
    """A store in which there is nothing yet, the same for all ranks that live.

    torchrun keeps one store through its restarts, in which a rank may read the address of one that
    is dead. So rank 0 names a new part of it, and tells each rank that has answered to the name.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("part", own)
        for other in range(1, world):
            answer = store.get(f"{own}/{other}").decode()
            store.set(f"part of {answer}", own)
        return dist.PrefixStore(own, store)
    told = f"part of {own}"
    until = time.monotonic() + JOIN_TIMEOUT.total_seconds()
    while not store.check([told]):
        if time.monotonic() > until:
            raise TimeoutError(f"rank 0 has not answered within {JOIN_TIMEOUT}")
        part = store.get("part").decode()
        store.set(f"{part}/{rank}", own)
        time.sleep(0.02)
    return dist.PrefixStore(store.get(told).decode(), store)


def open_machine(settings: DeviceSettings) -> Machine:
    """Choose device and precision, and join the process group where torchrun made one."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(settings.device)
    if settings.flash:
        activate_flash(settings.flash)
    if on_cuda(device):
        torch.cuda.set_device(device)
        precision = "highest" if settings.dtype == "fp32" else "high"
        torch.set_float32_matmul_precision(precision)
    else:
        prepare_cpu(settings.threads)
    if world > 1 and not dist.is_initialized():
        store, _, _ = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
        dist.init_process_group(
            backends(device),
            store=fresh_store(store, rank, world),
            rank=rank,
            world_size=world,
            timeout=JOIN_TIMEOUT,
        )
        dist.barrier()  # so that no rank fails and leaves while another still joins
    return Machine(device, pick_dtype(settings.dtype, device), rank, world)


def compiles_generation(choice: str, device: torch.device) -> bool:
    """Whether --compile lets generation be compiled, which on CUDA is captured as a graph too."""
    if choice == "auto" and not (on_cuda(device) and can_compile(device)):
        return False
    if choice == "0":
        return False
    say("compiling: the first token takes a minute or less (--compile 0 skips it)")
    return True


def open_to_generate(settings: InferenceSettings) -> Machine:
    machine = open_machine(settings)
    return replace(machine, compiles=compiles_generation(settings.compile, machine.device))


def derive_seed(*key: object) -> int:
    """A seed of torch's, for whatever is named: the same for the same key."""
    return int(hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=7).hexdigest(), 16)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step of one rank, so that a resumed step draws what it would have."""
    torch.manual_seed(derive_seed(seed, step, rank))


def flops_of(name: str) -> float | None:
    """Peak FLOP/s of a device by its name; None where it is unknown, as for a slice of a GPU."""
    if re.search(r"\b(MIG|Laptop)\b", name, re.I):
        return None
    for part, flops in PEAK_FLOPS:
        if re.search(rf"\b{part}\b", name, re.I):
            return flops
    return None


def peak_flops(device: torch.device) -> float | None:
    if not on_cuda(device):
        return None
    return flops_of(torch.cuda.get_device_name(device))


class Signals:
    """Remembers SIGTERM, SIGINT or SIGUSR1, so that the running step can end and be saved.

    A second Ctrl-C, a second or more later, ends the process at once. SIGTERM never does, as
    schedulers send it several times.
    """

    def __enter__(self) -> "Signals":
        self.received = 0
        self.at = 0.0
        self.previous = {}
        for number in signal.Signals:
            if number.name in ("SIGTERM", "SIGINT", "SIGUSR1"):
                self.previous[number] = signal.signal(number, self.note)
        return self

    def note(self, number: int, _frame) -> None:
        now = time.monotonic()
        if not self.received:
            self.received = number
            self.at = now
        elif number == signal.SIGINT and now - self.at > 1:
            signal.signal(number, self.previous[number])
            os.kill(os.getpid(), number)

    def __exit__(self, *_fault) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


# ==================================================================================================
# Sharding: one model trained on several devices
# ==================================================================================================


GRADIENT_BUCKETS = 8  # at most about so many: a compiled graph is cut where one is full


def distribute(module: nn.Module, machine: Machine) -> nn.Module:
    """The module in DDP, where there are several ranks."""
    if machine.world == 1:
        return module
    known = inspect.signature(DistributedDataParallel).parameters
    name = "broadcast_buffers"  # older than torch 2.10
    if "forward_sync_buffers" in known:
        name = "forward_sync_buffers"
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    size = sum(weight.numel() * weight.element_size() for weight in trained)
    return DistributedDataParallel(
        module,
        gradient_as_bucket_view=True,
        bucket_cap_mb=max(25, math.ceil(size / 2**20 / GRADIENT_BUCKETS)),
        **{name: False},
    )


@dataclass(frozen=True)
class Shards:
    """How a model's weights, gradients and optimizer states are divided among ranks (ZeRO:
    Rajbhandari et al. 2020)."""

    root: nn.Module  # whose forward pass gathers the weights outside the layers
    skeleton: nn.Module  # the model as it was, on the meta device
    stage: int


def is_sharded(module: nn.Module) -> bool:
    """Whether an Objective's model is sharded."""
    return bool(getattr(getattr(module, "model", None), "shards", None))


def no_sync(module: nn.Module, last: bool):
    """Delay the exchange of gradients until the `last` micro-batch of a step, as far as the stage
    of a sharded model has memory for them."""
    if is_sharded(module):
        stage = module.model.shards.stage
        module.set_requires_gradient_sync(last or stage > 1)
        module.set_requires_all_reduce(last)
        module.set_reshard_after_backward(last or stage > 2)
    elif not last and isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()


def divides(settings: StepSettings, machine: Machine) -> bool:
    """Whether a run's model is sharded: among ranks, or between device and host."""
    return settings.offload or (settings.zero > 0 and machine.world > 1)


def check_sharding(settings: StepSettings, machine: Machine) -> None:
    """UserError where the ranks cannot divide a model as the flags say."""
    if settings.zero_group and not settings.zero:
        raise UserError("--zero_group is given without --zero", "add --zero 2, or drop it")
    if not divides(settings, machine):
        if settings.sharded_ckpt:
            raise UserError(
                "--sharded_ckpt needs a model that several devices divide",
                "add --zero 2 under torchrun, or drop it",
            )
        return
    if machine.dtype == torch.float16:
        raise UserError("--zero and --offload need --dtype bf16 or fp32", "give one of them")
    if settings.zero_group and machine.world % settings.zero_group:
        raise UserError(
            f"{machine.world} ranks cannot form groups of --zero_group {settings.zero_group}",
            f"use one of {', '.join(map(str, divisors(machine.world)))}",
        )


def twin_of(model: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a model whose weights are make(weight), and take no gradient."""
    twins = {
        id(weight): nn.Parameter(make(weight.detach()), requires_grad=False)
        for weight in model.parameters()
    }
    return copy.deepcopy(model, twins)


def shard(
    module: nn.Module,
    machine: Machine,
    settings: StepSettings,
    compiles: bool,
) -> nn.Module:
    """An Objective whose model is sharded layer by layer, with FSDP2; the same again where the
    model already is."""
    model = module.model
    if model.shards:
        return model.shards.root
    fsdp = importlib.import_module("torch.distributed.fsdp")
    meshes = importlib.import_module("torch.distributed.device_mesh")
    if not dist.is_initialized():  # one rank, with --offload
        dist.init_process_group(
            backends(machine.device), store=dist.HashStore(), rank=0, world_size=1
        )
    group = settings.zero_group or machine.world
    shape, names = (group,), ("shard",)
    if group < machine.world:
        shape, names = (machine.world // group, group), ("repeat", "shard")
    options: dict = {
        "mesh": meshes.init_device_mesh(machine.device.type, shape, mesh_dim_names=names)
    }
    if settings.offload:
        options["offload_policy"] = fsdp.CPUOffloadPolicy(pin_memory=on_cuda(machine.device))
    precision = fsdp.MixedPrecisionPolicy()
    if machine.dtype == torch.bfloat16 and not model.config.n_expert:  # routers need all bits
        precision = fsdp.MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    stage = settings.zero or 3
    skeleton = twin_of(model, lambda weight: torch.empty_like(weight, device="meta"))
    for block in model.blocks:
        if compiles:
            raise_shape_limits()
            block.compile(dynamic=False)
        fsdp.fully_shard(block, reshard_after_forward=stage > 2, mp_policy=precision, **options)
    fsdp.fully_shard(module, reshard_after_forward=False, **options)
    model.shards = Shards(module, skeleton, stage)
    return module


class Stored(typing.NamedTuple):
    """A tensor in the folder of a checkpoint, of which each rank reads its own part."""

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[Tensor], None]  # into a tensor of that shape, whole or sharded


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is one rank's part of a larger one."""
    return hasattr(tensor, "device_mesh")


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """The numbers of a tensor that this rank has, in its memory."""
    return tensor.to_local() if is_shard(tensor) else tensor


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """A tensor with the numbers of all ranks, which all must ask for."""
    if not is_shard(tensor):
        return tensor
    return tensor.to(tensor.device_mesh.device_type).full_tensor()


def rows_of(tensor: Tensor) -> slice:
    """The rows of the whole tensor that this rank has."""
    count = len(tensor)
    if not is_shard(tensor):
        return slice(0, count)
    mesh = tensor.device_mesh
    first = min(count, -(-count // mesh.size(-1)) * mesh.get_local_rank(-1))
    return slice(first, first + len(local(tensor)))


@torch.no_grad()
def shard_like(value: Tensor | Stored, like: Tensor) -> Tensor:
    """A copy of value, stored, whole or sharded, that is sharded as `like` is."""
    if value.shape != like.shape:
        raise ValueError(f"a shape is {tuple(value.shape)}, not {tuple(like.shape)}")
    found = torch.empty_like(like)
    if isinstance(value, Stored):
        value.read(found)
        return found
    own = local(value) if is_shard(value) else value[rows_of(like)]
    local(found).copy_(own)
    return found


def load_weights(
    model: nn.Module, weights: dict[str, Tensor | Stored], strict: bool = True
) -> None:
    """model.load_state_dict, of stored or whole weights into a model that may be sharded."""
    known = model.state_dict()
    fitting = {
        name: shard_like(weight, known[name])
        for name, weight in weights.items()
        if name in known and (model.shards or isinstance(weight, Stored))
    }
    model.load_state_dict({**weights, **fitting}, strict=strict)


def gathered(value: object, machine: Machine, seen: dict | None = None) -> object:
    """What holds sharded tensors with whole ones in the CPU's memory instead, on rank 0; None in
    their place on other ranks, which all must ask for it. One tensor stays one."""
    seen = {} if seen is None else seen
    if isinstance(value, dict):
        return {key: gathered(one, machine, seen) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(gathered(one, machine, seen) for one in value)
    if not isinstance(value, Tensor):
        return value
    if id(value) not in seen:
        found = whole(value)
        if machine.main:
            found = found.cpu() if is_shard(value) else found.to("cpu", copy=True)
        seen[id(value)] = value, found if machine.main else None
    return seen[id(value)][1]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """model.state_dict(), in which a weight of two names is one tensor."""
    seen: dict[int, Tensor] = {}
    state = model.state_dict(keep_vars=True)
    return {name: seen.setdefault(id(w), w.detach()) for name, w in state.items()}


def reshard(model: nn.Module) -> None:
    """Forget gathered weights of a sharded model, as its own have changed."""
    if not model.shards:
        return
    for module in model.shards.root.modules():
        if hasattr(module, "reshard"):
            module.reshard()


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


CHARACTER_BYTES = 4  # of the longest UTF-8 character


MARKERS = {role: f"<|{role}|>" for role in ROLES} | {"tool": TOOL_RESULT, "call": TOOL_CALL}


def splits_at_spaces(sp: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether this model encodes a text word by word, as prep's own do: BPE (whole scores),
    unnormalised, with the dummy prefix, no piece across space or line."""
    pieces = []
    for i in range(len(sp)):
        if sp.is_control(i) or sp.is_byte(i) or sp.is_unknown(i):
            continue
        piece = sp.id_to_piece(i)
        across_space = SPACE in piece[1:]
        across_line = "\n" in piece and piece != "\n"
        if across_space or across_line or not float(sp.get_score(i)).is_integer():
            return False
        pieces.append(piece)
    odd = " \uff21\u2460\ufb01e\u0301  \u00a0\t\u3000x "
    unnormalised = sp.normalize(odd) == SPACE + odd.replace(" ", SPACE)
    return unnormalised and {SPACE, "\n"} <= set(pieces)


class Tokenizer:
    """A SentencePiece model with the ids this program needs; `data` are its bytes."""

    template: typing.Any = None  # a ChatTemplate, where its model spells a chat not in our way

    def __init__(self, data: bytes, name: str = "tokenizer"):
        self.data = data
        self.name = name
        self.sha256 = sha256(data)
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=data)
            pieces = [self.sp.id_to_piece(i) for i in range(len(self.sp))]
        except (RuntimeError, ValueError) as fault:  # a damaged one may hold invalid UTF-8
            raise UserError(
                f"{name} is not a SentencePiece model, or is damaged",
                "use a tokenizer.model made by prep or by SentencePiece",
            ) from fault
        self.vocab_size = len(pieces)
        self.bos = self.sp.bos_id()
        self.eos = self.sp.eos_id()
        self.pad = self.sp.pad_id()
        for special, i in (("<s>", self.bos), ("</s>", self.eos)):
            if not 0 <= i < self.vocab_size:
                raise UserError(f"{name} has no {special}", "use a tokenizer with <s> and </s>")
        self.opening = [self.bos]
        roles = {role: self.sp.piece_to_id(marker) for role, marker in MARKERS.items()}
        self.roles: dict[str, int] = {}
        if all(self.sp.is_control(i) for i in roles.values()):
            self.roles = roles

    def spellings(self) -> list[str]:
        """The text of each id, by which two tokenizers of one vocabulary are known."""
        return [self.sp.id_to_piece(i) for i in range(self.vocab_size)]

    @property
    def turn_end(self) -> int:
        """The id that ends what an assistant says."""
        return self.eos

    @property
    def stops(self) -> frozenset[int]:
        """The ids that end an answer."""
        return frozenset({self.eos})

    @property
    def by_word(self) -> bool:
        """Whether a text's ids are those of its words."""
        return splits_at_spaces(self.sp)

    def files(self) -> dict[str, bytes]:
        """The files that a folder has of it."""
        return {"tokenizer.model": self.data}

    def encode(self, text: str) -> list[int]:
        return self.sp.encode(text)

    def prompt(self, text: str) -> list[int]:
        """The ids of a text, with what a document begins with before it."""
        return [*self.opening, *self.encode(text)] or [self.eos]

    def decode(self, ids: Iterable[int]) -> str:
        return self.sp.decode([int(i) for i in ids if i < self.vocab_size])

    def marker(self, role: str) -> list[int]:
        """What opens a turn: a control symbol, or a line of text where there is none."""
        if self.roles:
            return [self.roles[role]]
        return self.encode(f"<|{role}|>\n")


class Turn(typing.NamedTuple):
    """What one speaker says: role is system, user, assistant or tool (the result of a call)."""

    role: str
    text: str
    learned: bool = True  # an assistant's turn may be context alone
    calls: tuple[str, ...] = ()  # JSON of the tools that an assistant calls, behind its text


def encode_chat(
    tokenizer: Tokenizer,
    turns: Iterable[Turn | tuple[str, str]],
    reply: bool = False,
) -> tuple[list[int], list[bool]]:
    """ids of the turns, and which are learned: what the assistant says, its calls and its </s>.

    `reply` opens an answer, or leaves the last turn open where that is the assistant's.
    """
    if tokenizer.template:
        return tokenizer.template.encode([Turn(*turn) for turn in turns], reply)
    ids, learned = [*tokenizer.opening], [False] * len(tokenizer.opening)
    role = ""
    for turn in turns:
        role, text, wanted, calls = Turn(*turn)
        marker = tokenizer.marker(role)
        if tokenizer.roles:
            body = tokenizer.encode(text)
            for call in calls:
                body += [tokenizer.roles["call"], *tokenizer.encode(call)]
        else:
            said = text + "".join(f"<|call|>{call}" for call in calls)
            body = tokenizer.encode(f"<|{role}|>\n{said}")[len(marker) :]
        body.append(tokenizer.eos)
        ids += marker + body
        learned += [False] * len(marker) + [role == "assistant" and wanted] * len(body)
    if reply and role == "assistant":
        return ids[:-1], learned[:-1]
    if reply:
        ids += tokenizer.marker("assistant")
        learned += [False] * (len(ids) - len(learned))
    return ids, learned


def said_at(place: int) -> str:
    """What stands for the text of a turn while a template is looked at: no template changes it."""
    return f"\ue000{place}\ue001"


class ChatTemplate:
    """The jinja template by which a tokenizer's model spells a chat: its ids are those that
    transformers makes of it, except that no special token comes out of what is said."""

    def __init__(self, tokenizer: Tokenizer):
        jinja = need("jinja2")
        sandbox = need("jinja2.sandbox", "jinja2")

        class Generation(need("jinja2.ext", "jinja2").Extension):
            """{% generation %}: a mark around what an assistant says, without effect here."""

            tags: typing.ClassVar = {"generation"}

            def parse(self, parser):
                next(parser.stream)
                return parser.parse_statements(["name:endgeneration"], drop_needle=True)

        def refused(message: str):
            raise jinja.TemplateError(message)

        def as_json(value: object, indent: int | None = None, **_more: object) -> str:
            return json.dumps(value, ensure_ascii=False, indent=indent)

        self.tokenizer = tokenizer
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = as_json
        environment.globals["raise_exception"] = refused
        environment.globals["strftime_now"] = lambda form: time.strftime(form)
        self.faults = (jinja.TemplateError, TypeError, ValueError, LookupError, AttributeError)
        texts = {i: token for token, i in tokenizer.specials.items()}
        self.variables = {"eos_token": texts.get(tokenizer.eos, "")}
        if tokenizer.named_bos is not None:
            self.variables["bos_token"] = texts.get(tokenizer.named_bos, "")
        self.parsing = need("tokenizers").Tokenizer.from_str(tokenizer.texts["tokenizer.json"])
        self.parsing.no_truncation()
        self.parsing.no_padding()
        self.special = re.compile(
            "|".join(map(re.escape, sorted(tokenizer.specials)[::-1])) or "$^"
        )
        try:
            self.template = environment.from_string(tokenizer.template_text)
        except self.faults as fault:
            raise self.refusal(sentence(fault)) from fault
        turns = [Turn("user", "a"), Turn("assistant", "b")]
        ids, learned = self.encode(turns)
        self.turn_end = [i for i, one in zip(ids, learned, strict=True) if one][-1]

    def refusal(self, why: str) -> UserError:
        return UserError(
            f"the chat template of {self.tokenizer.name} cannot be used here ({why})",
            "give plain text, or another model",
        )

    def render(self, turns: list[Turn], texts: list[str], reply: bool) -> str:
        messages = []
        for turn, text in zip(turns, texts, strict=True):
            message: dict = {"role": turn.role, "content": text}
            if turn.calls:
                calls = [{"type": "function", "function": json.loads(one)} for one in turn.calls]
                message["tool_calls"] = calls
            messages.append(message)
        try:
            return self.template.render(
                messages=messages, add_generation_prompt=reply, tools=None, **self.variables
            )
        except self.faults as fault:
            raise self.refusal(sentence(fault)) from fault

    def encode(self, turns: list[Turn], reply: bool = False) -> tuple[list[int], list[bool]]:
        """encode_chat, of this template."""
        texts = [turn.text for turn in turns]
        asks = reply and (not turns or turns[-1].role != "assistant")
        skeleton = self.render(turns, [said_at(i) for i in range(len(turns))], asks)
        rendered = self.render(turns, texts, asks)
        parts = re.split("\ue000([0-9]+)\ue001", skeleton)  # template, place, template, place, …
        answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        if not {*map(str, answers)} <= {*parts[1::2]}:
            raise self.refusal("it leaves out what an assistant says")
        for said in (texts, [text.strip() for text in texts]):
            filled = parts[:1]
            for place, after in zip(parts[1::2], parts[2::2], strict=True):
                filled += said[int(place)], after
            if "".join(filled) == rendered:
                break
        else:
            raise self.refusal("it rewrites what is said, so that answers cannot be told apart")
        if reply and not asks:  # the answer goes on
            filled[-1] = ""
        spans, at = [], 0
        for i, part in enumerate(filled):
            turn = turns[int(parts[i])] if i % 2 else None
            if turn and turn.role == "assistant":
                end = at + len(part)
                stop = self.special.search(filled[i + 1])
                open_end = reply and not asks and i == len(filled) - 2
                if not stop and not open_end:
                    raise self.refusal("no special token ends an answer")
                spans.append((at, end + (stop.end() if stop else 0), turn.learned))
            at += len(part)
        return self.tokens(filled, spans)

    def tokens(
        self, filled: list[str], spans: list[tuple[int, int, bool]]
    ) -> tuple[list[int], list[bool]]:
        """The ids of parts, template and said in turn, and which have a share in a learned span."""
        pieces = [("".join(filled), 0, self.parsing)]
        if any(self.special.search(text) for text in filled[1::2]):
            pieces = [*self.pieces(filled)]
        ids, learned = [], []
        for text, at, encoder in pieces:
            encoded = encoder.encode(text, add_special_tokens=False)
            ids += encoded.ids
            for begin, end in encoded.offsets:
                learned.append(
                    any(wanted and at + end > a and at + begin < z for a, z, wanted in spans)
                )
        return ids, learned

    def pieces(self, filled: list[str]) -> Iterator[tuple[str, int, object]]:
        """Texts between the template's own special tokens, and these; with where each begins, and
        what encodes it."""
        text, begin, at = "", 0, 0
        for i, part in enumerate(filled):
            cut = 0
            for found in self.special.finditer(part) if i % 2 == 0 else ():
                text += part[cut : found.start()]
                if text:
                    yield text, begin, self.tokenizer.hf
                yield found[0], at + found.start(), self.parsing
                text, cut = "", found.end()
                begin = at + cut
            text += part[cut:]
            at += len(part)
        if text:
            yield text, begin, self.tokenizer.hf


HF_FILES = (  # those of a Hugging Face folder that say something of its tokenizer
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)

PLAIN_TEMPLATE = (  # of a chat, for a tokenizer that comes without one
    "{{ bos_token or '' }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + (message['content'] or '') }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '<|call|>' + (call['function'] or call) | tojson }}{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

END_TOKENS = "</s> <|endoftext|> <|end_of_text|> <|im_end|> <eos>".split()  # where none is named


class HFTokenizer(Tokenizer):
    """A Hugging Face tokenizer.json, with what other files of its folder say of special tokens and
    of chats; `data` is a JSON object, from file names to texts.

    No special token comes out of encode(): they are spelled as other text is.
    """

    def __init__(self, data: bytes, name: str = "tokenizer"):
        self.data = data
        self.name = name
        self.sha256 = sha256(data)
        try:
            self.texts: dict[str, str] = json.loads(data)
            config, names, generation = map(self.settings, HF_FILES[1:3] + HF_FILES[4:])
            text = self.texts["tokenizer.json"]
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as fault:
            raise self.damage(fault) from fault
        library = need("tokenizers")
        with Caught() as caught:  # the library raises plain Exception
            self.hf = library.Tokenizer.from_str(text)
            self.hf.no_truncation()
            self.hf.no_padding()
            self.hf.encode_special_tokens = True
            self.vocab_size = 1 + max(self.hf.get_vocab().values())
            begin = self.hf.encode("").ids
        if caught.fault:
            raise self.damage(caught.fault)
        if self.vocab_size > CONTEXT_LIMIT:
            raise self.damage(ValueError(f"it has an id {self.vocab_size - 1}"))
        self.specials = {
            added.content: i
            for i, added in self.hf.get_added_tokens_decoder().items()
            if added.special
        }

        def named(key: str) -> int | None:
            for place in (config, names):
                token = place.get(f"{key}_token")
                if isinstance(token, dict):
                    token = token.get("content")
                if isinstance(token, str) and (found := self.hf.token_to_id(token)) is not None:
                    return found
            return None

        ends = generation.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = [i for i in ends if type(i) is int and 0 <= i < self.vocab_size]
        known = [named("eos"), *self.ends, *map(self.hf.token_to_id, END_TOKENS)]
        eos = next((i for i in known if i is not None), None)
        if eos is None:
            raise UserError(f"{name} has no token that ends a text", "use another tokenizer")
        bos = named("bos")
        self.eos = eos
        pad = named("pad")
        self.pad = -1 if pad is None else pad
        self.opening = begin[:-1] if begin[-1:] == [eos] and eos != bos else begin
        if config.get("add_bos_token") is False:
            self.opening = []
        elif config.get("add_bos_token") is True and bos is not None:
            self.opening = [bos]
        self.bos = self.opening[0] if self.opening else eos  # before a document
        self.named_bos = bos
        roles = {role: self.specials.get(marker) for role, marker in MARKERS.items()}
        self.roles = {}
        if None not in roles.values():
            self.roles = roles
        told = self.texts.get("chat_template.jinja") or config.get("chat_template")
        if isinstance(told, list):  # several of them, by name
            named_ones = [one for one in told if isinstance(one, dict)]
            told = next((o.get("template") for o in named_ones if o.get("name") == "default"), None)
        self.has_template = isinstance(told, str) and bool(told)
        self.template_text = told if self.has_template else PLAIN_TEMPLATE

    def settings(self, name: str) -> dict:
        found = json.loads(self.texts.get(name, "{}"))
        refuse(not isinstance(found, dict), f"{name} is no object")
        json.dumps(found, ensure_ascii=False).encode()  # a ValueError where it is no Unicode
        return found

    def damage(self, fault: Exception) -> UserError:
        return UserError(
            f"{self.name} is not a Hugging Face tokenizer, or is damaged ({sentence(fault)})",
            "use the folder of a model, or its tokenizer.json",
        )

    @functools.cached_property
    def template(self) -> ChatTemplate | None:
        if self.roles and not self.has_template:
            return None
        return ChatTemplate(self)

    by_word = False

    def spellings(self) -> list[str]:
        return [self.hf.id_to_token(i) for i in range(self.vocab_size)]

    @functools.cached_property
    def turn_end(self) -> int:
        if not self.has_template:
            return self.eos
        try:
            return self.template.turn_end
        except UserError:  # without jinja2, or of a template that is not for chats
            return self.eos

    @functools.cached_property
    def stops(self) -> frozenset[int]:
        return frozenset({self.eos, *self.ends, self.turn_end})

    def files(self) -> dict[str, bytes]:
        return {name: text.encode() for name, text in self.texts.items()}

    def encode(self, text: str) -> list[int]:
        return self.hf.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.hf.decode([int(i) for i in ids if i < self.vocab_size])


def byte_words(digits: int) -> str:
    """The texts that a byte-level BPE joins, as Qwen2 has them, with up to so many digits."""
    number = "" if digits == 1 else f"{{1,{digits}}}"
    return (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{number}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def byte_level(model: typing.Any, words: str) -> typing.Any:
    """A tokenizer of the package tokenizers with that BPE over bytes, within those words."""
    library = need("tokenizers")
    steps = library.pre_tokenizers
    made = library.Tokenizer(model)
    made.pre_tokenizer = steps.Sequence(
        [
            steps.Split(library.Regex(words), "isolated"),
            steps.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = library.decoders.ByteLevel()
    return made


def hf_bytes(made: typing.Any, named: dict[str, str]) -> bytes:
    """The bytes of an HFTokenizer from one of the package tokenizers, with its bos, eos and pad;
    a text begins with bos, where there is one."""
    if bos := named.get("bos"):
        made.post_processor = need("tokenizers").processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
        )
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {f"{key}_token": token for key, token in named.items()}
    files = {
        "tokenizer.json": made.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config),
    }
    return json.dumps(files, ensure_ascii=False).encode()


TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n")

GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

CASED_WORDS = (  # of GPT-4o, which parts CamelCase
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TiktokenForm(typing.NamedTuple):
    """What a file of ranks does not say: the words within which it joins, and special tokens."""

    name: str
    words: str
    specials: dict[int, str]  # by id
    named: dict[str, str]  # which of them is eos, and bos where a text begins with it
    ignore_merges: bool = True  # a word that is a token needs none, as tiktoken has it


LLAMA3_SPECIALS = {
    128000: "<|begin_of_text|>",
    128001: "<|end_of_text|>",
    128006: "<|start_header_id|>",
    128007: "<|end_header_id|>",
    128008: "<|eom_id|>",
    128009: "<|eot_id|>",
    128255: "<|reserved_128255|>",
}

END_OF_TEXT = "<|endoftext|>"

TIKTOKEN_FORMS = {  # by the highest rank: as tiktoken, and the models of that name, have them
    50255: TiktokenForm("GPT-2", GPT2_WORDS, {50256: END_OF_TEXT}, {"eos": END_OF_TEXT}),
    50280: TiktokenForm("p50k_base", GPT2_WORDS, {50256: END_OF_TEXT}, {"eos": END_OF_TEXT}),
    100255: TiktokenForm(
        "cl100k_base",
        byte_words(3),
        {
            100257: END_OF_TEXT,
            100258: "<|fim_prefix|>",
            100259: "<|fim_middle|>",
            100260: "<|fim_suffix|>",
            100276: "<|endofprompt|>",
        },
        {"eos": END_OF_TEXT},
    ),
    127999: TiktokenForm(
        "Llama 3",
        byte_words(3),
        LLAMA3_SPECIALS,
        {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"},
    ),
    151642: TiktokenForm(
        "Qwen",
        byte_words(1),
        {151643: END_OF_TEXT, 151644: "<|im_start|>", 151645: "<|im_end|>"},
        {"eos": END_OF_TEXT},
        ignore_merges=False,  # as its tokenizer.json says
    ),
    199997: TiktokenForm(
        "o200k_base",
        CASED_WORDS,
        {199999: END_OF_TEXT, 200018: "<|endofprompt|>"},
        {"eos": END_OF_TEXT},
    ),
}


def byte_characters() -> list[str]:
    """The character that a byte-level BPE writes for each byte (Radford et al. 2019)."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = itertools.count(256)
    return [chr(byte) if byte in shown else chr(next(others)) for byte in range(256)]


def from_tiktoken(data: bytes, name: str) -> bytes:
    """The bytes of an HFTokenizer with the ids of a file of tiktoken, lines of a token in base64
    and its rank. UserError where it is damaged."""
    try:
        lines = (line.split() for line in data.splitlines())
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as fault:
        raise UserError(
            f"{name} is no file of tiktoken, or is damaged ({sentence(fault)})",
            "download it again",
        ) from fault
    most = max(ranks.values())
    if len({*ranks.values()}) < len(ranks) or any(bytes([i]) not in ranks for i in range(256)):
        raise UserError(f"{name} lacks bytes, or has a rank twice", "download it again")
    if most > CONTEXT_LIMIT:
        raise UserError(f"{name} is damaged (it has a rank {most})", "download it again")
    unknown = TiktokenForm("", byte_words(3), {most + 1: END_OF_TEXT}, {"eos": END_OF_TEXT})
    form = TIKTOKEN_FORMS.get(most, unknown)
    if form is unknown:
        say(f"note: {name} is of no known model: words are cut as GPT-4 does")
    written = byte_characters()
    spelled = {token: "".join(written[byte] for byte in token) for token in ranks}
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    holes = {*range(max(most, *form.specials) + 1)} - {*ranks.values()}
    specials = {i: form.specials.get(i, f"<|reserved_{i}|>") for i in sorted(holes)}
    vocab |= {token: i for i, token in specials.items()}
    merges = []  # every two tokens that make a third, which tiktoken may join
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [pair for pair in halves if pair[0] in ranks and pair[1] in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spelled[left], spelled[right]) for left, right in known]
    bpe = need("tokenizers").models.BPE
    model = bpe(vocab=vocab, merges=merges, ignore_merges=form.ignore_merges)
    made = byte_level(model, form.words)
    made.add_special_tokens([*specials.values()])
    return hf_bytes(made, form.named)


def make_tokenizer(data: bytes, name: str = "tokenizer") -> Tokenizer:
    """The tokenizer of a checkpoint's bytes, SentencePiece's or Hugging Face's."""
    if data[:1] == b"{":
        return HFTokenizer(data, name)
    return Tokenizer(data, name)


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file; of a tokenizer.json, what the files beside it say belongs to it."""
    try:
        data = path.read_bytes()
        if TIKTOKEN_LINE.match(data):
            return HFTokenizer(from_tiktoken(data, str(path)), str(path))
        if path.suffix != ".json":
            return Tokenizer(data, str(path))
        texts = {"tokenizer.json": data.decode()}
        for name in HF_FILES[1:]:
            if (file := path.with_name(name)).exists():
                texts[name] = file.read_text(encoding="utf-8")
    except OSError as fault:
        raise disk_error(fault, path) or fault from fault
    except UnicodeDecodeError as fault:
        raise UserError(f"{path} is damaged ({fault})", "download it again") from fault
    return HFTokenizer(json.dumps(texts, ensure_ascii=False).encode(), str(path))


def load_tokenizer(place: str | Path) -> Tokenizer:
    """A tokenizer.model, a tokenizer.json, or a folder that holds one of them, or both: then the
    one that knows how chats are spelled."""
    folder = Path(place)
    if not folder.is_dir():
        return read_tokenizer(folder)
    pieces, text = folder / "tokenizer.model", folder / "tokenizer.json"
    if not pieces.exists() and not text.exists():
        raise UserError(f"{folder} has neither tokenizer.model nor tokenizer.json", "add one")
    fast = text.exists() and importlib.util.find_spec("tokenizers")
    if not pieces.exists():
        return read_tokenizer(text)
    try:
        found = read_tokenizer(pieces)
    except UserError:  # of another form, as Llama 3 has it beside its tokenizer.json
        if not fast:
            raise
        return read_tokenizer(text)
    if found.roles or not fast:
        return found
    other = read_tokenizer(text)
    return other if other.has_template or isinstance(found, HFTokenizer) else found


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    for name, data in tokenizer.files().items():
        (folder / name).write_bytes(data)


class TextStream:
    """Decodes ids as they come, at a cost per id that does not grow with the text before it.

    Text that ends in the middle of a character waits for the rest. `context` are ids that stand
    before the first one.
    """

    def __init__(self, tokenizer: Tokenizer, context: list[int]):
        self.tokenizer = tokenizer
        self.ids = list(context[-CHARACTER_BYTES:])
        self.start = 0  # decoding begins here, so that a space is where it belongs
        self.shown = len(self.ids)  # ids whose text has been returned

    def push(self, token: int) -> str:
        """The text that this id completes; empty while a character is incomplete."""
        self.ids.append(token)
        text = self.waiting()
        end = len(self.ids)
        if not text or text.endswith("\ufffd"):
            if end - self.shown < CHARACTER_BYTES:
                return ""
            end = self.shown + 1  # too long for one character: the first id begins none
            text = self.waiting(end)
        self.start = self.shown
        self.shown = end
        return text

    def waiting(self, end: int | None = None) -> str:
        """The text of the ids up to `end` that were not returned yet, complete or not."""
        before = self.tokenizer.decode(self.ids[self.start : self.shown])
        return self.tokenizer.decode(self.ids[self.start : end])[len(before) :]


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
        except (UserError, *UNREADABLE) as fault:
            self.fault = fault
            raise


class WrongSize(UserError):
    """A text does not suit a tokenizer's size; `least` and `most` are what it suits, where
    known."""

    def __init__(self, what: str, fix: str, least: int = 0, most: int = 0):
        super().__init__(what, fix)
        self.least = least
        self.most = most


def tokenizer_fault(vocab_size: int, fault: Exception) -> WrongSize:
    """The sentence for what SentencePiece refuses, without its source file names."""
    message = re.sub(r"^.*?\.cc\(\d+\)\s*(\[.*?\])?\s*", "", str(fault)).strip()
    what = f"--vocab_size {vocab_size} does not suit this text ({message or 'it was refused'})"
    if most := re.search(r"value <= (\d+)", message):
        fix = f"use --vocab_size {most[1]} or less, or give more text"
        return WrongSize(what, fix, most=int(most[1]))
    if least := re.search(r"required_chars\. \d+ vs (\d+)", message):
        fix = f"use --vocab_size {least[1]} or more, or a lower --character_coverage"
        return WrongSize(what, fix, least=int(least[1]))
    return WrongSize(what, "give text with words in it, or another size")


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    character_coverage: float = 0.9999,
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


def train_bytes(texts: Iterable[str], vocab_size: int, digits: int) -> bytes:
    """The bytes of a byte-level BPE in Hugging Face's form, which joins up to so many digits and
    has the symbols of this program's chats. UserError where the size does not suit the text."""
    library = need("tokenizers")
    specials = ["<s>", "</s>", "<pad>", *CONTROL]
    if vocab_size < 256 + len(specials) + 1:
        raise UserError(
            f"--vocab_size {vocab_size} is too small for bytes and symbols",
            f"use {256 + len(specials) + 1} or more",
        )
    made = byte_level(library.models.BPE(), byte_words(digits))
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    found = made.get_vocab_size()
    if found < vocab_size:
        raise WrongSize(
            f"--vocab_size {vocab_size} does not suit this text, which gives {found} tokens",
            f"use --vocab_size {found} or less, or give more text",
            most=found,
        )
    return hf_bytes(made, {"bos": "<s>", "eos": "</s>", "pad": "<pad>"})


class WordEncoder(dict):
    """Text -> packed ids as its tokenizer would encode it; where that goes word by word, through a
    dictionary from what stands between spaces, where a newline opens a key, to packed ids."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype):
        super().__init__()
        self.one = tokenizer.encode
        self.decode = tokenizer.decode
        self.vocab_size = tokenizer.vocab_size
        self.dtype = dtype
        self.bos = tokenizer.bos
        self.closing = [tokenizer.eos] if tokenizer.eos != tokenizer.bos else []
        self.by_word = tokenizer.by_word

    def pack(self, ids: list[int]) -> bytes:
        return np.array(ids, dtype=self.dtype).tobytes()

    def __missing__(self, word: str) -> bytes:
        ids = self.one(word or " ")
        if word[:1] in ("", "\n"):
            ids = ids[1:]  # SentencePiece puts a space before all, here it is one too many
        packed = self.pack(ids)
        if len(self) < WORDS_CACHED and len(word) <= LONGEST_CACHED:
            self[word] = packed
        return packed

    def encode(self, text: str) -> bytes:
        """The packed ids of a text, without <s> and </s>."""
        if not text or not self.by_word:
            return self.pack(self.one(text))
        return b"".join(map(self.__getitem__, text.replace("\n", " \n").split(" ")))


# ==================================================================================================
# Prep: text in any format becomes token files
# ==================================================================================================

BLOCK = 4 << 20  # bytes read at once; a longer document is still read whole

FILE_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".npy": "ids",
    ".bin": "ids",
}

BLANK_LINES = re.compile(r"(?:^|\n)(?:[ \t\r]*\n)+")  # part the documents of --document blank


ABOUT_DATA = re.compile(r"(README|LICENSE|LICENCE|NOTICE|CITATION|dataset_infos?)(\.\w+)?", re.I)

DATASET_NAME = re.compile(r"[\w-]+/[\w.-]+")  # a name on the Hugging Face Hub, or a relative path

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


class IdForm(typing.NamedTuple):
    """How a file holds token ids: of which type, behind how many bytes, and between which ids its
    documents stand."""

    dtype: str
    skip: int
    marks: tuple[int, ...]


@dataclass(frozen=True)
class Source:  # one input file
    path: Path  # of a URL what follows the protocol
    kind: str  # how documents are found in it: line, blank, file, jsonl, json, parquet or ids
    shown: str  # its name in messages
    size: int  # 0 where a server does not say it
    url: str = ""  # where it is no local file
    ids: IdForm | None = None  # where it holds token ids
    part: int = 0  # of a corpus that is mixed from several


@dataclass(frozen=True)
class TextBlock:
    """Whole documents, as raw bytes of one source, or as rows where the packing gives rows."""

    source: Source
    line: int  # of the source at which the block begins, from 1
    data: bytes | list
    read: int  # bytes of the input read up to the block's end


def is_data(parts: Sequence[str]) -> bool:
    """Whether a file of a folder, by the parts of its path there, is visible, and no description
    of the data."""
    hidden = any(part.startswith(".") for part in parts)
    return not hidden and not ABOUT_DATA.fullmatch(parts[-1])


def files_in(folder: Path) -> set[Path]:
    """The visible files of a folder and its folders; what describes a data set is no data."""
    found = set()
    for file in folder.rglob("*"):
        if file.is_file() and is_data(file.relative_to(folder).parts):
            found.add(file)
    return found


REMOTE_TRIES = 6  # of a broken connection, 1, 2, 4, ... seconds apart

IN_VAIN = (FileNotFoundError, PermissionError, UserError)  # to try again


def is_url(path: str) -> bool:
    return "://" in path


def url_place(url: str, flag: str) -> tuple[typing.Any, str]:
    """The file system of fsspec that a URL names, and the path there; UserError where there is
    none."""
    core = need("fsspec.core", "fsspec")
    try:
        return core.url_to_fs(url)
    except (ImportError, ValueError) as fault:  # a protocol unknown, or without its package
        raise UserError(
            f"{flag} {url} cannot be opened ({sentence(fault)})",
            "install the package of that protocol: huggingface_hub for hf://, s3fs for s3://, "
            "gcsfs for gs://, aiohttp for https://",
        ) from fault


def persistently(work: Callable[[], typing.Any], what: str) -> typing.Any:
    """What `work` returns, tried again where a connection breaks; UserError where it stays so."""
    for attempt in range(REMOTE_TRIES):
        if attempt:
            time.sleep(2.0 ** (attempt - 1))
        with Caught() as caught:  # each protocol has exceptions of its own
            return work()
        if isinstance(caught.fault, IN_VAIN):
            raise caught.fault
    raise UserError(
        f"{what} cannot be read ({sentence(caught.fault)}), after {REMOTE_TRIES} tries",
        "check the connection and the address, and run the same command again",
    ) from caught.fault


class RemoteFile(io.RawIOBase):
    """A file behind a URL, read piece by piece; where the connection breaks, it is opened again
    at the place that was reached."""

    def __init__(self, url: str, size: int):
        self.url = url
        self.size = size  # 0: unknown
        self.place = 0
        self.in_order = False  # whether the server gives no parts of a file
        self.file: typing.BinaryIO | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        self.place = begin + offset
        return self.place

    def readinto(self, buffer) -> int:
        data = persistently(lambda: self.piece(len(buffer)), self.url)
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)

    def piece(self, count: int) -> bytes:
        """At most `count` bytes from here on; where that fails, the next call opens it anew."""
        file, self.file = self.file, None
        if file is None:
            files, path = url_place(self.url, "the file")
            file = files.open(path, "rb", block_size=0 if self.in_order else BLOCK)
        if file.tell() != self.place:
            self.move(file)
        try:
            data = file.read(count)
        except ValueError as fault:  # fsspec's, of a web server
            self.in_order = "range requests" in str(fault)
            raise
        if not data and self.place < self.size:
            raise EOFError(f"the connection ended at byte {self.place:,} of {self.size:,}")
        self.file = file
        return data

    def move(self, file: typing.BinaryIO) -> None:
        """Go to this place, in a file that perhaps can be read in order only."""
        if not self.in_order:
            file.seek(self.place)
            return
        if self.url.partition("?")[0].lower().endswith(".parquet"):
            raise UserError(
                f"{self.url}: its server does not give parts of a file, which .parquet needs",
                "download the file first",
            )
        while left := self.place - file.tell():
            if not file.read(min(BLOCK, left)):
                raise EOFError("the connection ended")

    def close(self) -> None:
        if self.file is not None:
            with Caught():  # what was read is whole
                self.file.close()
        super().close()


def open_source(source: Source) -> typing.BinaryIO:
    if source.url:
        return io.BufferedReader(RemoteFile(source.url, source.size), BLOCK)
    return open(source.path, "rb")


def remote_files(url: str, flag: str) -> dict[str, int]:
    """URL and size of the files that a URL, the URL of a folder or a glob in it names."""
    files, root = url_place(url, flag)
    web = url.startswith("http")
    magic = "*" in root or "[" in root  # a ? may ask a web server something

    def listed() -> dict[str, dict]:
        if magic:
            return files.glob(root, detail=True)
        if web and root.endswith("/"):
            return files.find(root, detail=True)
        about = files.info(root)
        if about["type"] == "directory":
            return files.find(root, detail=True)
        return {root: about}

    found = {}
    with contextlib.suppress(FileNotFoundError):
        for path, about in sorted(persistently(listed, f"{flag} {url}").items()):
            parts = path.removeprefix(root).strip("/").split("/")
            if magic:
                wanted = not any(part.startswith(".") for part in parts)
            else:
                wanted = path == root or is_data(parts)
            if about["type"] != "file" or not wanted:
                continue
            if web and about.get("size") is None:  # a list of links does not say it
                about = persistently(functools.partial(files.info, path), path)
            found[files.unstrip_protocol(path)] = about.get("size") or 0
    return found


def unpacked(path: Path, raw: typing.BinaryIO) -> typing.BinaryIO:
    """The file as it was before it was compressed, by its suffix."""
    packing = PACKINGS.get(path.suffix.lower())
    return packing(raw) if packing else raw


def holds_list(source: Source) -> bool:
    """Whether a file of JSON begins with a list."""
    with open_source(source) as raw, contextlib.suppress(*UNREADABLE):  # reported when it is read
        start = unpacked(source.path, raw).read(4096).removeprefix(codecs.BOM_UTF8)
        return start.lstrip().startswith(b"[")
    return False


def source_of(file: Path, document: str, url: str = "", size: int = 0) -> Source:
    """A file, and how documents are found in it: by its suffix, or as `document` says."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in PACKINGS:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    shown = url or str(file)
    if suffix == ".arrow":
        raise UserError(
            f"{shown} is in Arrow's form, as save_to_disk of datasets writes it",
            "write it with to_parquet() or to_json(), and give that",
        )
    if not url:
        size = file.stat().st_size
    source = Source(file, FILE_KINDS.get(suffix, document), shown, size, url)
    if source.kind == "json" and not holds_list(source):
        return replace(source, kind="jsonl")  # published files of such rows are often called .json
    return source


def missing_files(path: str, flag: str) -> tuple[str, str]:
    what = f"{flag} {path} does not exist or holds no file"
    if DATASET_NAME.fullmatch(path):
        return what, (
            f"if it is a data set on the Hugging Face Hub, give its files: "
            f"{flag} 'hf://datasets/{path}/**/*.parquet'"
        )
    return what, "check the path"


def find_sources(paths: Iterable[str], document: str, flag: str = "--text_path") -> list[Source]:
    """The files that paths, folders, globs and URLs match; UserError names each that matches
    none."""
    found, faults = [], []
    for path in paths:
        before = len(found)
        if is_url(path):
            for url, size in remote_files(path, flag).items():
                place = Path(url.partition("://")[2].partition("?")[0])
                found.append(source_of(place, document, url, size))
        else:
            matches = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
            files: set[Path] = set()
            for match in map(Path, matches):
                files |= files_in(match) if match.is_dir() else {match}
            found += [source_of(file, document) for file in sorted(files)]
        if len(found) == before:
            faults.append(missing_files(path, flag))
    raise_all(faults)
    return found


def damaged(source: Source, where: str, fault: Exception) -> Exception:
    if getattr(fault, "errno", None):  # bz2 and pyarrow raise OSErrors without one
        return fault
    return UserError(
        f"{source.shown} is damaged after {where} ({fault})", "download or compress it again"
    )


def check_text_column(source: Source, schema, text_key: str) -> None:
    """UserError where a Parquet file's schema has no column of strings under text_key."""
    types = {}
    for column in schema:
        kind = column.type
        if str(kind).startswith("dictionary"):
            kind = kind.value_type
        types[column.name] = str(kind)
    if types.get(text_key) not in ("string", "large_string", "string_view"):
        raise UserError(
            f"{source.shown} has no column {text_key} of strings",
            f"give one with --text_key; its columns are {', '.join(types)}",
        )


def read_parquet(source: Source, text_key: str) -> Iterator[TextBlock]:
    parquet, arrow = need("pyarrow.parquet"), need("pyarrow")
    rows = 0
    try:
        with open_source(source) as file:
            table = parquet.ParquetFile(file)
            check_text_column(source, table.schema_arrow, text_key)
            for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
                first = rows + 1
                rows += len(batch)
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


def read_json_rows(source: Source) -> TextBlock:
    """The rows of a .json file that is one list; UserError where it is damaged."""
    with open_source(source) as raw:
        try:
            rows = json.loads(unpacked(source.path, raw).read().decode("utf-8-sig"))
        except UNREADABLE as fault:
            raise damaged(source, "its start", fault) from fault
        except (ValueError, RecursionError) as fault:
            raise UserError(
                f"{source.shown} is not JSON ({fault})",
                "correct the file; for one JSON object per line use the suffix .jsonl",
            ) from fault
    return TextBlock(source, 1, rows, source.size)


def token_dtype(vocab_size: int) -> np.dtype:
    if vocab_size <= 65535:
        return np.dtype("<u2")
    return np.dtype("<u4")


LLM_C = {20240520: "<u2", 20240801: "<u4"}  # the first number of a .bin file of llm.c: its ids

LLM_C_HEADER = 1024  # bytes


def id_form(source: Source, tokenizer: Tokenizer) -> IdForm:
    """How a .npy or .bin file holds ids: as NumPy, llm.c or nanoGPT write them; UserError where it
    holds something else."""
    marks = tuple({tokenizer.bos, tokenizer.eos})
    with open_source(source) as raw:
        if source.path.suffix.lower() == ".bin":
            (magic,) = struct.unpack("<i", raw.read(4).ljust(4, b"\0"))
            if magic in LLM_C:
                return IdForm(LLM_C[magic], LLM_C_HEADER, marks)
            return IdForm(token_dtype(tokenizer.vocab_size).str, 0, marks)
        try:
            version = np.lib.format.read_magic(raw)
            read_header = np.lib.format.read_array_header_2_0
            if version == (1, 0):
                read_header = np.lib.format.read_array_header_1_0
            shape, _, dtype = read_header(raw)
        except ValueError as fault:
            raise UserError(f"{source.shown} is not a file of NumPy", "check the file") from fault
        if dtype.kind not in "iu" or len(shape) > 1:
            raise UserError(
                f"{source.shown} holds {dtype} of shape {shape}, not token ids in a row",
                "save a flat array of whole numbers",
            )
        return IdForm(dtype.str, raw.tell(), marks)


def read_ids(source: Source) -> Iterator[TextBlock]:
    """Blocks of token ids that end where a document does; `line`: the place of the first id."""
    dtype, skip, marks = source.ids
    width = np.dtype(dtype).itemsize
    first, waiting = 1, b""
    with open_source(source) as raw:
        raw.read(skip)
        while data := raw.read(BLOCK):
            waiting += data
            ids = np.frombuffer(waiting, dtype, len(waiting) // width)
            ends = np.flatnonzero(np.isin(ids, marks))
            if len(ends):
                cut = int(ends[-1])
                yield TextBlock(source, first, waiting[: cut * width], raw.tell())
                first, waiting = first + cut, waiting[cut * width :]
        yield TextBlock(source, first, waiting, raw.tell())


def read_blocks(source: Source, text_key: str) -> Iterator[TextBlock]:
    """A source's documents, cut at document boundaries into blocks of about BLOCK bytes."""
    if source.kind == "parquet":
        yield from read_parquet(source, text_key)
        return
    if source.kind == "json":
        yield read_json_rows(source)
        return
    if source.kind == "ids":
        yield from read_ids(source)
        return
    line = 1
    size = -1 if source.kind == "file" else BLOCK
    with open_source(source) as raw:
        try:
            file = unpacked(source.path, raw)
            while data := file.read(size):
                data += rest_of_document(file, data, source.kind)
                if line == 1:
                    data = data.removeprefix(codecs.BOM_UTF8)
                yield TextBlock(source, line, data, raw.tell())
                line += data.count(b"\n")
        except UNREADABLE as fault:
            raise damaged(source, f"line {line}", fault) from fault


def decode_block(block: TextBlock, errors: str) -> str:
    try:
        return block.data.decode("utf-8", errors)
    except UnicodeDecodeError as fault:
        if block.data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UserError(
                f"{block.source.shown} is UTF-16 text",
                "convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW",
            ) from fault
        line = block.line + block.data.count(b"\n", 0, fault.start)
        raise UserError(
            f"{block.source.shown}, line {line}: invalid UTF-8 ({fault.reason})",
            "correct the file, or in prep use --errors replace",
        ) from fault


def numbered_lines(block: TextBlock, errors: str = "strict") -> Iterator[tuple[int, str]]:
    lines = enumerate(decode_block(block, errors).split("\n"), block.line)
    return ((number, line) for number, line in lines if line.strip())


def whole_text(text: str) -> str:
    """The text without lone surrogates, which UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def json_object(row: object) -> dict:
    """A row, parsed where it is still text; ValueError says what is wrong with it."""
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except (ValueError, RecursionError) as fault:
            raise ValueError(f"not JSON ({fault})") from fault
    refuse(not isinstance(row, dict), "not a JSON object")
    return row


def row_text(row: object, text_key: str) -> str:
    """The text of a row of JSON; ValueError where it has none."""
    row = json_object(row)
    text = row.get(text_key)
    if not isinstance(text, str):
        raise ValueError(f"no text under the key {text_key!r}; its keys are {', '.join(row)}")
    return whole_text(text)


def row_texts(block: TextBlock, text_key: str, errors: str) -> Iterator[str]:
    """The texts of a block of rows, as lines of JSON or already parsed."""
    if isinstance(block.data, list):
        rows = enumerate(block.data, block.line)
    else:
        rows = numbered_lines(block, errors)
    for number, row in rows:
        try:
            yield row_text(row, text_key)
        except ValueError as fault:
            raise UserError(
                f"{block.source.shown}, line {number}: {fault}",
                "correct the row, or give another --text_key",
            ) from fault


def block_documents(block: TextBlock, text_key: str, errors: str) -> Iterator[str]:
    """The documents of a block that hold a word; UserError names the line that cannot be read."""
    kind = block.source.kind
    if kind in ("jsonl", "json"):
        texts = row_texts(block, text_key, errors)
    elif kind == "line":
        texts = (line.removesuffix("\r") for _, line in numbered_lines(block, errors))
    elif kind == "blank":
        texts = (part.strip("\r\n") for part in BLANK_LINES.split(decode_block(block, errors)))
    elif kind == "parquet":
        texts = block.data
    else:
        texts = [decode_block(block, errors)]
    return (text for text in texts if text and not text.isspace())


def content_hash(text: bytes, salt: bytes = b"") -> float:
    """A document's place in [0, 1), by its content alone."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=7, salt=salt).digest(), "big") / 2**56


def shard_blocks(sources: list[Source], settings: PrepSettings) -> Iterator[TextBlock]:
    """This shard's blocks: whole files, or every n-th block of too few; `read` counts over all."""
    part, parts = settings.part()
    by_file = len(sources) >= parts
    before = 0
    for i, source in enumerate(sources):
        if not by_file or i % parts == part:
            for j, block in enumerate(read_blocks(source, settings.text_key)):
                if by_file or j % parts == part:
                    yield replace(block, read=before + block.read)
        before += source.size


def text_size(source: Source) -> int:
    """Bytes of text in a file, about: what is compressed holds four times its size."""
    packed = source.path.suffix.lower() in (*PACKINGS, ".parquet")
    return 4 * source.size if packed else source.size


SAMPLED_FILES = 64  # of those that are not on this machine


def blocks_to_sample(
    sources: list[Source],
    settings: PrepSettings,
    budget: float,
) -> tuple[float, Iterator[TextBlock]]:
    """Blocks that a sample is taken of, and about how many bytes of text they hold: all of what is
    on this machine, and the beginnings of files that are not, which are not read twice."""
    local = [source for source in sources if not source.url]
    remote = [source for source in sources if source.url]
    remote = remote[:: max(1, math.ceil(len(remote) / SAMPLED_FILES))]
    most = max(BLOCK, int(2 * budget / max(1, len(remote))))

    def blocks() -> Iterator[TextBlock]:
        yield from shard_blocks(local, settings)
        before = sum(source.size for source in local)
        for source in remote:
            for block in read_blocks(source, settings.text_key):
                yield replace(block, read=before + block.read)
                if block.read >= most:
                    break
            before += source.size

    beginnings = (min(text_size(source) or most, most) for source in remote)
    return sum(map(text_size, local)) + sum(beginnings), blocks()


def sample_documents(
    sources: list[Source],
    settings: PrepSettings,
    weight: float = 1.0,
) -> Iterator[str]:
    """Documents worth about --sample_mb, or a part of it, picked evenly over all sources by their
    hash."""
    budget = settings.sample_mb * 1e6 * weight
    left = budget
    size, blocks = blocks_to_sample(sources, settings, budget)
    share = budget / max(size, 1)
    nearest = (1.0, "")
    progress = Progress("sampling text", sum(source.size for source in sources), "B")
    with contextlib.closing(progress):
        for block in blocks:
            progress.update(block.read)
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


def check_first_rows(sources: list[Source], settings: PrepSettings) -> None:
    """UserError where the first file of rows begins with one that has no text: a wrong --text_key
    is told before a tokenizer is trained."""
    for source in sources:
        if source.kind in ("jsonl", "json", "parquet"):
            block = next(iter(read_blocks(source, settings.text_key)), None)
            if block is not None:
                next(block_documents(block, settings.text_key, settings.errors), None)
            return


def tokenizer_for(
    parts: list[list[Source]],
    shares: list[float],
    vocab_size: int,
    settings: PrepSettings,
) -> bytes:
    """A tokenizer trained on a sample of the corpus, of its parts by their shares; where no flag
    says its size, of one that the text suits."""
    texts = itertools.chain.from_iterable(
        sample_documents(sources, settings, share)
        for sources, share in zip(parts, shares, strict=True)
    )
    try:
        if settings.tokenizer_type == "bytebpe":
            return train_bytes(texts, vocab_size, settings.digits)
        return train_tokenizer(texts, vocab_size, settings.character_coverage)
    except WrongSize as fault:
        better = fault.most
        if fault.least:  # its characters alone
            better = 1 << fault.least.bit_length()
        if settings.vocab_size or not better or better == vocab_size:
            raise
        return tokenizer_for(parts, shares, better, settings)


SMALLEST_VOCAB, LARGEST_VOCAB = 512, 32000  # that prep chooses


def fitting_vocab(size: float) -> int:
    """A tokenizer's size for so many bytes of text: a power of two near 1.3 times their root, so
    4,096 for 10 MB and 32,000 from 600 MB on, where a piece is seen often enough to be learned."""
    root = 1.3 * math.sqrt(max(1.0, size))
    return min(LARGEST_VOCAB, max(SMALLEST_VOCAB, 1 << round(math.log2(root))))


BYTES_PER_TOKEN = 4.0  # of text, about, before a tokenizer is there to count


def corpus_size(parts: list[list[Source]], settings: PrepSettings) -> float:
    """Bytes of text that are going to be encoded, about."""
    size = sum(text_size(source) for sources in parts for source in sources)
    if settings.max_tokens:
        size = min(size or math.inf, BYTES_PER_TOKEN * settings.max_tokens)
    return size


@functools.lru_cache(maxsize=1)
def word_encoder(spm: str) -> WordEncoder:
    tokenizer = load_tokenizer(spm)
    return WordEncoder(tokenizer, token_dtype(tokenizer.vocab_size))


def id_documents(block: TextBlock, encoder: WordEncoder) -> Iterator[tuple[bytes, bytes]]:
    """Text and packed ids of each document of a block of ids; UserError where one is no id of the
    tokenizer."""
    form, shown = block.source.ids, block.source.shown
    if len(block.data) % np.dtype(form.dtype).itemsize:
        raise UserError(f"{shown} ends in the middle of an id", "copy or write it again")
    ids = np.frombuffer(block.data, form.dtype)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < encoder.vocab_size:
        wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise UserError(
            f"{shown} holds the id {wrong}, which is none of the tokenizer's "
            f"{encoder.vocab_size:,}",
            "name the tokenizer that the file was written with, --tokenizer FILE",
        )
    for part in np.split(ids, np.flatnonzero(np.isin(ids, form.marks))):
        part = part[~np.isin(part, form.marks)]
        if len(part):
            yield encoder.decode(part.tolist()).encode(), encoder.pack(part)


def packed_documents(
    block: TextBlock,
    encoder: WordEncoder,
    settings: PrepSettings,
) -> Iterator[tuple[bytes, bytes]]:
    """Text and packed ids of each document of a block."""
    if block.source.kind == "ids":
        yield from id_documents(block, encoder)
        return
    for text in block_documents(block, settings.text_key, settings.errors):
        yield text.encode(), encoder.encode(text)


class Packed:
    """Documents as ids in a row: their bytes, and where each ends."""

    def __init__(self):
        self.ids = bytearray()
        self.ends = array.array("q")  # of each document, in `ids`
        self.texts = array.array("q")  # bytes of each document's text

    def add(self, ids: bytes, text: int) -> None:
        self.ids += ids
        self.ends.append(len(self.ids))
        self.texts.append(text)

    def first(self, count: int) -> "Packed":
        """Its first documents."""
        part = Packed()
        part.ends, part.texts = self.ends[:count], self.texts[:count]
        part.ids = self.ids[: part.ends[-1] if count else 0]
        return part

    def documents(self) -> Iterator["Packed"]:
        """Each for itself."""
        begin = 0
        for end, text in zip(self.ends, self.texts, strict=True):
            one = Packed()
            one.add(self.ids[begin:end], text)
            yield one
            begin = end


def encode_block(block: TextBlock, spm: str, settings: PrepSettings) -> dict[str, Packed]:
    """A block's documents as <s> ids </s>, or as </s> ids where there is no <s>, in train or val
    by content."""
    encoder = word_encoder(spm)
    splits = {name: Packed() for name in SPLITS}
    bos, eos = encoder.pack([encoder.bos]), encoder.pack(encoder.closing)
    for text, ids in packed_documents(block, encoder, settings):
        name = "val" if content_hash(text) < settings.val_split else "train"
        splits[name].add(bos + ids + eos, len(text))
    return splits


class DataWriter:
    """Writes the splits of a data folder and counts what is in them, up to `most` tokens to train
    on, where that is not 0, and the document they end in."""

    def __init__(self, files: dict[str, typing.BinaryIO], width: int, most: int):
        self.files = files
        self.width = width  # bytes of an id
        self.most = most
        self.totals = {name: dict.fromkeys(COUNTS, 0) for name in SPLITS}

    @property
    def full(self) -> bool:
        return 0 < self.most <= self.totals["train"]["tokens"]

    def write(self, name: str, packed: Packed) -> None:
        counts = self.totals[name]
        if self.most:
            room = (self.most - self.totals["train"]["tokens"]) * self.width
            if room <= 0:
                return
            if name == "train":
                packed = packed.first(bisect.bisect_left(packed.ends, room) + 1)
        self.files[name].write(packed.ids)
        counts["tokens"] += len(packed.ids) // self.width
        counts["documents"] += len(packed.ends)
        counts["bytes"] += sum(packed.texts)


def lowest(taken: Sequence[float], shares: Sequence[float]) -> int:
    """The part of which the least was taken, by its share."""
    return min(range(len(shares)), key=lambda i: taken[i] / shares[i])


class Weave:
    """Writes the documents of a corpus's parts so that their tokens stand in the parts' shares at
    every place."""

    def __init__(self, writer: DataWriter, shares: list[float]):
        self.writer = writer
        self.shares = shares
        self.taken = [0] * len(shares)  # tokens
        self.waiting: list[deque[Packed]] = [deque() for _ in shares]

    def write(self, part: int, packed: Packed) -> None:
        self.waiting[part].extend(packed.documents())
        while True:
            next_one = lowest(self.taken, self.shares)
            if not self.waiting[next_one] or self.writer.full:
                return
            one = self.waiting[next_one].popleft()
            self.writer.write("train", one)
            self.taken[next_one] += len(one.ids) // self.writer.width


READ_BEYOND = 1.25  # of what a part of a corpus seems to need: its tokens a byte are estimated


def block_size(block: TextBlock) -> int:
    if isinstance(block.data, bytes):
        return len(block.data)
    return sum(len(str(row)) for row in block.data)


def blocks_in_shares(
    parts: list[list[Source]],
    shares: list[float],
    work: Callable[[TextBlock], dict[str, Packed]],
    settings: PrepSettings,
) -> Iterator[TextBlock]:
    """The blocks of a corpus's parts in turn, so that about their shares are read of each, until
    the first has no more; tokens a byte of each are taken from its first block."""
    streams, rates = [], []
    for sources in parts:
        stream = shard_blocks(sources, settings)
        first = next(stream, None)
        rates.append(1.0)
        if first is not None:
            ids = work(first)["train"].ids
            rates[-1] = max(1, len(ids)) / max(1, block_size(first))
            stream = itertools.chain([first], stream)
        streams.append(stream)
    taken, enough = [0.0] * len(parts), math.inf
    while True:
        part = lowest(taken, shares)
        if taken[part] / shares[part] >= enough:
            return
        block = next(streams[part], None)
        if block is None:
            enough = min(enough, READ_BEYOND * taken[part] / shares[part])
            taken[part] = math.inf
            continue
        taken[part] += rates[part] * block_size(block)
        yield block


def encode_sources(
    parts: list[list[Source]],
    shares: list[float],
    settings: PrepSettings,
    out: Path,
) -> tuple[dict[str, dict], list[int]]:
    """Encode everything into out/train.bin and out/val.bin on all cores, in flat memory: the
    COUNTS of each split, and the tokens of each part of a corpus that has several."""
    workers = settings.workers or cores_here()
    work = functools.partial(encode_block, spm=str(out), settings=settings)
    read = [0] * len(parts)
    progress = Progress("encoding", sum(s.size for sources in parts for s in sources), "B")
    with worker_pool(workers) as pool, contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(atomic_write(out / f"{name}.bin")) for name in SPLITS}
        width = token_dtype(load_tokenizer(out).vocab_size).itemsize
        writer = DataWriter(files, width, math.ceil(settings.max_tokens / settings.part()[1]))
        weave = Weave(writer, shares)
        blocks = shard_blocks(parts[0], settings)
        if len(parts) > 1:
            blocks = blocks_in_shares(parts, shares, work, settings)
        for block, splits in in_order(pool, work, blocks, 2 * workers):
            part = block.source.part
            writer.write("val", splits["val"])
            if len(parts) > 1:
                weave.write(part, splits["train"])
            else:
                writer.write("train", splits["train"])
            read[part] = block.read
            progress.update(sum(read), f"{short(writer.totals['train']['tokens'])} tokens")
            if writer.full:
                break
    progress.close("encoded")
    return writer.totals, weave.taken


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
    for name in ("tokenizer.model", *HF_FILES):  # of another tokenizer
        (final / name).unlink(missing_ok=True)
    names = {path.name for path in building.iterdir()} - {*DATA_FILES}
    for name in (*sorted(names & {*HF_FILES}), *DATA_FILES):
        if (building / name).exists():
            os.replace(building / name, final / name)
    fsync_folder(final)


PROBED = 1 << 20  # ids read at once to check or copy a split


class TokenFile:
    """The ids of a split, read from the disk slice by slice, which a memory map would not survive:
    a file cut short under it ends the process without a word. UserError where the file changes."""

    def __init__(self, path: Path, dtype: np.dtype, count: int):
        self.path = path
        self.dtype = dtype
        self.count = count
        self.file = io.FileIO(path)
        self.lock = threading.Lock()  # of the file's position, where reading cannot name one
        self.seen = self.stamp()
        self.print = self.fingerprint()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice | int) -> np.ndarray:
        """The ids of a slice, or one; UserError where the file is no longer what it was."""
        if not isinstance(part, slice):
            place = range(self.count)[part]
            return self[place : place + 1][0]
        start, stop, step = part.indices(self.count)
        self.check()
        size = self.dtype.itemsize
        data = self.read(start * size, max(0, stop - start) * size)
        return np.frombuffer(data, self.dtype)[::step]

    def read(self, start: int, count: int) -> bytes:
        if hasattr(os, "pread"):
            data = os.pread(self.file.fileno(), count, start)
        else:
            with self.lock:
                self.file.seek(start)
                data = self.file.read(count)
        if len(data) == count:
            return data
        if not data:
            raise self.changed()
        return data + self.read(start + len(data), count - len(data))  # at most 2 GiB at once

    def stamp(self) -> tuple[int, int]:
        state = os.fstat(self.file.fileno())
        return state.st_size, state.st_mtime_ns

    def fingerprint(self) -> str:
        """A hash of 64 places of the file, which tells whether one that was touched is the same."""
        size = self.count * self.dtype.itemsize
        digest = hashlib.blake2b(digest_size=16)
        for place in range(0, size, max(4096, size // 64)):
            digest.update(self.read(place, min(4096, size - place)))
        return digest.hexdigest()

    def check(self) -> None:
        """Raise UserError where the file was changed since it was opened."""
        if (now := self.stamp()) == self.seen:
            return
        if now[0] != self.seen[0] or self.fingerprint() != self.print:
            raise self.changed()
        self.seen = now

    def changed(self) -> UserError:
        return UserError(
            f"{self.path} has changed while it was read",
            "restore it, or run prep again, and resume: the run's checkpoints are whole",
        )


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
        self.tokenizer = load_tokenizer(self.folder)
        self.check_meta()
        self.train = self.tokens("train")
        self.val = self.tokens("val")

    def check_meta(self) -> None:
        for key, value in format_of(self.tokenizer).items():
            if self.meta.get(key) != value:
                raise UserError(
                    f"{self.folder}/meta.json says {key} {self.meta.get(key)}, not {value}",
                    "restore the original tokenizer.model, or run prep again",
                )
        splits = self.meta.get("splits")
        if not isinstance(splits, dict) or set(splits) != set(SPLITS):
            raise UserError(f"{self.folder}/meta.json lacks its splits", "run prep again")
        for split, counts in splits.items():
            for key in COUNTS:
                count = counts.get(key) if isinstance(counts, dict) else None
                if type(count) is not int or count < 0:
                    raise UserError(
                        f"{self.folder}/meta.json: {key} of {split} is not a number",
                        "run prep again",
                    )

    def tokens(self, split: str) -> TokenFile | np.ndarray:
        """A split's ids, its size and ids checked."""
        path = self.folder / f"{split}.bin"
        dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        count = self.meta["splits"][split]["tokens"]
        vocab_size = self.meta["vocab_size"]

        size = path.stat().st_size if path.exists() else 0
        if size != count * dtype.itemsize:
            raise UserError(
                f"{path} holds {size} bytes where meta.json says {count * dtype.itemsize}",
                "copy the whole file again, or run prep again",
            )
        if not count:
            return np.zeros(0, dtype)
        ids = TokenFile(path, dtype, count)
        parts = range(0, count, PROBED)
        if count > 1 << 26:
            parts = np.linspace(0, count - PROBED, 64).astype(int).tolist()
        if max(int(ids[start : start + PROBED].max()) for start in parts) >= vocab_size:
            raise UserError(
                f"{path} holds an id beyond the vocabulary of {vocab_size}", "run prep again"
            )
        return ids

    def bytes_per_token(self, split: str) -> float:
        """UTF-8 bytes for each target of the split's stream, the measure behind bits per byte."""
        counts = self.meta["splits"][split]
        return counts["bytes"] / max(1, counts["tokens"] - 1)


def find_shards(folder: Path) -> list[TokenFolder]:
    """folder/shard-*-of-n, in order; UserError where one is missing or of another tokenizer."""
    parts = sorted({shard.name.rpartition("-")[2] for shard in folder.glob("shard-*-of-*")})
    if len(parts) != 1:
        found = " and ".join(f"shard-*-of-{n}" for n in parts) or "no shard"
        raise UserError(f"{folder} holds {found}", "run prep --shard i/n for every i of one n")
    wanted = [folder / f"shard-{i:05d}-of-{parts[0]}" for i in range(int(parts[0]))]
    missing = [shard.name for shard in wanted if not (shard / "meta.json").exists()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}", "run prep --shard for these too")
    shards = [TokenFolder(shard) for shard in wanted]
    if len({shard.tokenizer.sha256 for shard in shards}) > 1:
        raise UserError(
            "the shards do not share one tokenizer", "prep them with the same --tokenizer"
        )
    return shards


def merge_shards(folder: Path, out: Path) -> dict:
    """Join the shards in `folder` into the data folder `out`; returns its meta."""
    shards = find_shards(folder)
    splits = {}
    for split in SPLITS:
        counts = [shard.meta["splits"][split] for shard in shards]
        splits[split] = {key: sum(count[key] for count in counts) for key in COUNTS}
        with atomic_write(out / f"{split}.bin") as file:
            for ids in (getattr(shard, split) for shard in shards):
                for start in range(0, len(ids), PROBED):
                    file.write(ids[start : start + PROBED].tobytes())
    write_tokenizer(shards[0].tokenizer, out)
    return write_meta(out, shards[0].tokenizer, splits, shards[0].meta["val_split"])


def is_pipe(path: str) -> bool:
    return path == "-" or Path(path).is_fifo()


def open_pipe(path: str) -> typing.BinaryIO:
    if path == "-":
        return sys.stdin.buffer
    return open(path, "rb")


def copy_pipes(paths: Iterable[str], document: str, out: Path) -> list[Source]:
    """stdin and named pipes as files in `out`, because they are read twice."""
    sources = []
    for path in filter(is_pipe, paths):
        file = out / f"pipe-{len([*out.glob('pipe-*')])}"
        shown = "stdin" if path == "-" else path
        with open_pipe(path) as pipe, open(file, "wb") as copy:
            shutil.copyfileobj(pipe, copy)
        sources.append(Source(file, document, shown, file.stat().st_size))
    return sources


def corpus(settings: PrepSettings, out: Path) -> tuple[list[str], list[list[Source]], list[float]]:
    """Names, files and shares of the corpus's parts; one part without a name is the usual."""
    names, parts, shares = [], [], []
    for i, (name, paths, share) in enumerate(settings.domains()):
        files = [path for path in paths if not is_pipe(path)]
        sources = find_sources(files, settings.document)
        sources += copy_pipes(paths, settings.document, out)
        names.append(name)
        parts.append([replace(source, part=i) for source in sources])
        shares.append(share)
    return names, parts, shares


def with_id_forms(sources: list[Source], settings: PrepSettings) -> list[Source]:
    """The sources, of which those of token ids know their form; UserError where their tokenizer is
    not named."""
    known = []
    for source in sources:
        if source.kind == "ids":
            if not settings.tokenizer:
                raise UserError(
                    f"{source.shown} holds token ids",
                    "name the tokenizer that they are of, --tokenizer FILE",
                )
            source = replace(source, ids=id_form(source, load_tokenizer(settings.tokenizer)))
        known.append(source)
    return known


def say_shares(names: list[str], tokens: list[int], shares: list[float], ended: bool) -> None:
    """What became of a mixture."""
    total = max(1, sum(tokens))
    told = (f"{name} {short(n)} ({n / total:.1%})" for name, n in zip(names, tokens, strict=True))
    say(f"tokens of {', '.join(told)}")
    if ended:
        scarce = names[lowest(tokens, shares)]
        say(f"{scarce} is used up: more of the others would change the shares")


def build_data(settings: PrepSettings, out: Path) -> dict:
    """Text -> tokenizer.model, train.bin, val.bin and meta.json in `out`; returns the meta."""
    names, parts, shares = corpus(settings, out)
    parts = [with_id_forms(sources, settings) for sources in parts]
    for sources in parts:
        check_first_rows(sources, settings)
    if settings.tokenizer:
        tokenizer = load_tokenizer(settings.tokenizer)
    else:
        vocab_size = settings.vocab_size
        if not vocab_size:
            vocab_size = fitting_vocab(corpus_size(parts, settings))
        say(f"training a tokenizer of {vocab_size:,} pieces")
        with worker_pool(1) as pool:  # its memory is freed with it
            work = pool.submit(tokenizer_for, parts, shares, vocab_size, settings)
            tokenizer = make_tokenizer(work.result())
        if tokenizer.vocab_size != vocab_size:
            say(f"this text suits one of {tokenizer.vocab_size:,} pieces, which it has now")
    write_tokenizer(tokenizer, out)

    splits, tokens = encode_sources(parts, shares, settings, out)
    if not splits["train"]["documents"] and not settings.shard:
        raise UserError(
            "the training split has no document", "give more text, or a smaller --val_split"
        )
    if len(parts) > 1:
        full = 0 < settings.max_tokens <= splits["train"]["tokens"] * settings.part()[1]
        say_shares(names, tokens, shares, not full)
    return write_meta(out, tokenizer, splits, settings.val_split)


class Terminated(BaseException):
    """A SIGTERM that clears up on its way out."""


@contextlib.contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """A SIGTERM inside the block leaves it by Terminated."""

    def leave(*_) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def prepare(settings: PrepSettings) -> dict:
    """Text -> a data folder; returns its meta. A failure leaves nothing that looks finished."""
    out = final = Path(settings.out_dir)
    if settings.shard and not settings.merge:
        part, parts = settings.part()
        final = out / f"shard-{part:05d}-of-{parts:05d}"
    for folder in (out, final):
        if (folder / "meta.json").exists() and not settings.overwrite:
            raise UserError(
                f"{folder} already holds prepared data",
                "use another --out_dir, or add --overwrite",
            )

    building = out / f".building-{final.name}"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        with sigterm_unwinds():
            if settings.merge:
                meta = merge_shards(out, building)
            else:
                meta = build_data(settings, building)
            install(building, final)
    finally:
        shutil.rmtree(building, ignore_errors=True)

    if settings.merge:
        for shard in out.glob("shard-*-of-*"):
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


def halves(micro: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """A micro-batch as two of half its groups each, or as it is where it has one group. A last
    vector says of each row which prompt it continues; the prompts stay together."""
    shared: tuple[Tensor, ...] = ()
    rows = tuple(micro)
    if micro[-1].dim() == 1:
        rows, shared = (*micro[:-2], micro[-1]), micro[-2:-1]
    groups = min(map(len, rows))
    if groups < 2:
        return [micro]
    found = []
    for part in (slice(0, groups // 2), slice(groups // 2, groups)):
        cut = []
        for tensor in rows:
            each = len(tensor) // groups
            cut.append(tensor[part.start * each : part.stop * each])
        if shared:
            cut[-1:-1] = shared
        found.append(tuple(cut))
    return found


def in_halves(
    work: Callable[..., Tensor],
    micro: tuple[Tensor, ...],
    device: torch.device,
) -> Tensor:
    """work(*micro), a sum over rows; where memory runs out, as the sum of its halves."""
    parts = halves(micro)
    try:
        return work(*micro)
    except (MemoryError, RuntimeError) as fault:  # torch.OutOfMemoryError is one
        if len(parts) < 2 or not out_of_memory(fault):
            raise
    free_memory(device)
    return sum(in_halves(work, part, device) for part in parts)


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

    def places(self, numbers: np.ndarray) -> np.ndarray:
        """Which items these sample numbers are, which may be of any epoch."""
        epochs, places = np.divmod(numbers, self.count)
        chosen = np.empty_like(numbers)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = permute(places[here], self.count, f"{self.seed}/{epoch}")
        return chosen

    def samples(self, numbers: np.ndarray) -> list:
        """The items of these sample numbers."""
        return self.items(self.places(numbers))

    def step(self, first: int, batch_size: int, accum: int, rank: int, world: int) -> StepBatch:
        """This rank's micro-batches of the step whose first sample number is `first`."""
        numbers = first + np.arange(batch_size * accum * world).reshape(accum, world, batch_size)
        micros = [self.collate(self.samples(mine)) for mine in numbers[:, rank]]
        targets = sum(self.targets(micro) for micro in micros)
        tokens = sum(micro.ids.numel() for micro in micros)
        return StepBatch(micros, targets, numbers.size, tokens)

    def in_order(self, batch_size: int, most: int, rank: int, world: int) -> Batches:
        """This rank's share of the items, each once, up to about `most` tokens; without targets
        where others have more micro-batches, so that all have as many."""
        count = min(self.count, -(-most * self.count // max(1, self.tokens)))
        mine = np.arange(rank, count, world)
        for i in range(0, -(-count // world), batch_size):
            places = mine[i : i + batch_size]
            if len(places):
                micro = self.collate(self.items(places))
                yield micro, self.targets(micro)
            else:
                micro = self.collate(self.items(np.zeros(batch_size, int)))
                yield micro._replace(targets=torch.full_like(micro.targets, IGNORE)), 0


def padded(rows: list[tuple[np.ndarray, np.ndarray]], length: int, count: int = 0) -> Batch:
    """Rows (ids, targets) filled up with PAD and IGNORE to (B, length); B is at least `count`."""
    shape = max(count, len(rows)), length
    batch = Batch(torch.full(shape, PAD), torch.full(shape, IGNORE))
    for i, (ids, targets) in enumerate(rows):
        batch.ids[i, : len(ids)] = torch.from_numpy(ids)
        batch.targets[i, : len(ids)] = torch.from_numpy(targets)
    return batch


def padded_length(longest: int, limit: int) -> int:
    """The length to pad to: one of LENGTHS multiples up to the limit."""
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
            fix = "prepare more text"
            if len(ids) > 2:
                fix = f"use --seq_len {len(ids) - 1} or less, or {fix}"
            raise UserError(
                f"{len(ids)} tokens to train on are too few for --seq_len {seq_len}", fix
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
        self.latest: tuple = (-1, None, None)

    def domains(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The domain of each sample number, and its sample number there."""
        blocks, places = np.divmod(samples, MIXTURE_BLOCK)
        domains, numbers = np.empty_like(samples), np.empty_like(samples)
        for block in np.unique(blocks):
            here = blocks == block
            whole, ranks = self.block(int(block))
            domains[here], numbers[here] = whole[places[here]], ranks[places[here]]
        return domains, numbers

    def block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each place in a block the domain, and the sample number there; the latest is kept, as
        steps that follow each other share it."""
        if self.latest[0] != block:
            order = permute(np.arange(MIXTURE_BLOCK), MIXTURE_BLOCK, f"{self.seed}/mixture/{block}")
            whole = np.searchsorted(self.ends, order, side="right")
            ranks = np.empty_like(order)
            for domain, share in enumerate(self.shares):
                ranks[whole == domain] = block * share + np.arange(share)
            self.latest = block, whole, ranks
        return self.latest[1:]

    def places(self, numbers: np.ndarray) -> np.ndarray:
        domains, own = self.domains(numbers)
        begins = np.cumsum([0] + [part.count for part in self.parts])
        found = np.empty_like(numbers)
        for domain in np.unique(domains):
            here = domains == domain
            found[here] = begins[domain] + self.parts[domain].places(own[here])
        return found

    def items(self, places: np.ndarray) -> list:
        ends = np.cumsum([part.count for part in self.parts])
        domains = np.searchsorted(ends, places, side="right")
        found: list = [None] * len(places)
        for domain in np.unique(domains):
            here = np.flatnonzero(domains == domain)
            part = self.parts[domain]
            own = places[here] - (ends[domain] - part.count)
            for place, item in zip(here, part.items(own), strict=True):
                found[place] = item
        return found


def open_domains(data: DataSettings) -> list[tuple[str, TokenFolder, float]]:
    """(name, folder, weight) of --data_dir's parts; raises UserError where tokenizers differ."""
    domains = [(name, TokenFolder(path), weight) for name, path, weight in data.domains()]
    if len({folder.tokenizer.sha256 for _, folder, _ in domains}) > 1:
        raise UserError(
            "the parts of --data_dir do not share one tokenizer",
            "prep them all with the same --tokenizer",
        )
    return domains


def mixed(parts: list[Stream], weights: list[float]) -> Stream:
    if len(parts) == 1:
        return parts[0]
    return Mixture(parts, weights)


class Ahead:
    """Steps' batches, each made in a thread while the device works on the one before."""

    def __init__(self, make: Callable[[int], StepBatch]):
        self.make = make
        self.thread = ThreadPoolExecutor(1)
        self.coming: tuple[int, Future] | None = None

    def forget(self) -> None:
        """What was begun is not wanted any more."""
        self.coming = None

    def take(self, first: int) -> StepBatch:
        """The step whose first sample number is `first`; that behind it is begun."""
        if self.coming and self.coming[0] == first:
            batch = self.coming[1].result()
        else:
            batch = self.make(first)
        behind = first + batch.samples
        self.coming = behind, self.thread.submit(self.make, behind)
        return batch


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

ON_TEXT = "distill on text"  # the kind of a checkpoint that may have seen some or none


def command_of(kind: str) -> str:
    """The command that makes checkpoints of a kind."""
    return kind.partition(" ")[0]


ON_OWN_ANSWERS = "distill on own answers"

# Those that answer in the chat format.
TAUGHT_KINDS = ("sft", "distill", ON_OWN_ANSWERS, "dpo", "grpo", "imported chat")

Row = tuple[list[Turns], object]  # conversations judged together, and what is known of them

Part = tuple[str, float, Stream]  # a domain's name, weight and encoded rows

Prompt = tuple[Turns, object]  # what is to be answered, and the answer that a row gives, or None


def present(row: dict) -> dict:
    """The row without its nulls: where data sets were merged, null means absent."""
    return {key: value for key, value in row.items() if value is not None}


def first_of(row: dict, keys: Iterable[str]) -> object:
    """The value under the first of these keys that the row has, else None."""
    return next((row[key] for key in keys if key in row), None)


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


def message_text(message: dict, named: object, optional: bool) -> str:
    """The text of a message, which may be absent where it is `optional`."""
    text = joined_parts(first_of(message, ("content", "value", "text")), f"a {named} message")
    if optional:
        return "" if text is None else whole_text(str(text))
    return clean(text, f"a {named} message")


def message_turn(message: object, what: str) -> Turn | None:
    """One message of whatever shape as a turn; None for a system message that says nothing."""
    refuse(not isinstance(message, dict), f"{what} holds something else than messages")
    message = present(message)
    named = message.get("role", message.get("from"))
    role = ROLE_NAMES.get(str(named).lower())
    refuse(role is None, f"{what} has the unknown role {named!r}")
    if role == "system" and first_of(message, ("content", "value", "text")) in (None, ""):
        return None

    calls = tuple(call_text(call) for call in message.get("tool_calls") or ())
    text = message_text(message, named, optional=role == "tool" or bool(calls))
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
    if source.kind == "parquet":
        with open_source(source) as file:
            yield from enumerate(need("pyarrow.parquet").read_table(file).to_pylist(), 1)
    elif source.kind == "json":
        yield from enumerate(read_json_rows(source).data, 1)
    else:
        for block in read_blocks(source, ""):
            yield from numbered_lines(block)


def row_sources(paths: Iterable[str], flag: str) -> list[Source]:
    sources = find_sources(paths, "jsonl", flag=flag)
    for source in sources:
        if {".csv", ".tsv", ".npy", ".bin"} & {suffix.lower() for suffix in source.path.suffixes}:
            raise UserError(
                f"{source.shown}: rows are read from .jsonl, .json and .parquet only",
                "convert it with pandas: read_csv(FILE).to_json(OUT, orient='records', lines=True)",
            )
    return sources


def read_rows(
    paths: Iterable[str],
    parse: Callable[[dict], object],
    on_bad_row: str,
    flag: str = "--data",
) -> list:
    """Every row of the files, parsed; bad ones raise UserError, or a warning where "skip" says."""
    good, bad = [], []
    for_another = ""
    for source in row_sources(paths, flag):
        for number, row in numbered_rows(source):
            try:
                row = json_object(row)
                good.append(parse(row))
            except ValueError as fault:
                if not bad:
                    for_another = row_command(row)
                bad.append(f"{source.shown}, line {number}: {fault}")
    if bad and not good and for_another:
        raise UserError(
            f"{', '.join(map(str, paths))}: these are rows of {for_another}",
            f"use that command, or give other rows; the first bad one: {bad[0]}",
        )
    if bad:
        shown = "; ".join(bad[:FAULTS_SHOWN])
        what = f"{len(bad)} of {len(bad) + len(good)} rows are bad, the first: {shown}"
        if on_bad_row == "error":
            raise UserError(what, "correct them, or skip them with --on_bad_row skip")
        say(f"warning: {what}; skipped")
    if not good:
        raise UserError(f"there is no row in {', '.join(paths)}", "give files with rows")
    return good


@dataclass(frozen=True)
class Example:
    """One conversation: its ids (n,), which of them are learned (n,), and whether all its answers
    are there."""

    ids: np.ndarray
    learned: np.ndarray
    whole: bool = True

    def targets(self) -> np.ndarray:
        """The target of each place (n,): the next id where that is learned, else IGNORE."""
        return np.append(np.where(self.learned[1:], self.ids[1:], IGNORE), IGNORE)

    def asked(self) -> np.ndarray:
        """The ids up to where the last answer begins; all where there is none."""
        if not self.learned.any():
            return self.ids
        last = np.flatnonzero(self.learned)[-1]
        return self.ids[: last - np.argmin(self.learned[last::-1]) + 1]


def example(tokenizer: Tokenizer, turns: Turns, limit: int) -> Example | None:
    """A conversation, truncated after its last answer that ends within `limit` ids; else None."""
    ids, learned = map(np.array, encode_chat(tokenizer, turns))
    ends = 1 + np.flatnonzero(learned[:limit] & np.isin(ids[:limit], [*tokenizer.stops]))
    if not len(ends):
        return None
    last = ends[-1]
    return Example(ids[:last], learned[:last], not learned[last:].any())


def last_answer(tokenizer: Tokenizer, turns: Turns, limit: int) -> Example | None:
    """A conversation of which the last answer alone is learned; None where it does not fit."""
    last = len(turns) - 1
    marked = [Turn(*turn)._replace(learned=i == last) for i, turn in enumerate(turns)]
    ids, learned = map(np.array, encode_chat(tokenizer, marked))
    if len(ids) > limit:
        return None
    return Example(ids, learned)


def question(tokenizer: Tokenizer, turns: Turns, limit: int) -> Example | None:
    """A prompt up to where the assistant is to answer; None where it does not fit."""
    ids, learned = map(np.array, encode_chat(tokenizer, turns, reply=True))
    if len(ids) > limit:
        return None
    return Example(ids, learned)


def question_or_example(
    tokenizer: Tokenizer, turns: Turns, limit: int, most: int
) -> Example | None:
    """A conversation, or a question alone, that an answer of `most` tokens may follow within
    `limit`: then None of it is learned."""
    if turns[-1][0] != "assistant":
        return question(tokenizer, turns, limit - most)
    found = example(tokenizer, turns, limit)
    if found is None or len(found.asked()) + most > limit:
        return question(tokenizer, turns[:-1], limit - most)
    return found


def held_out(turns: Turns, share: float) -> bool:
    """Whether a conversation is for validation: by its first question, so none is on both sides."""
    first = next(turn.text for turn in turns if turn.role == "user")
    return content_hash(first.encode(), b"rows") < share


def fit_rows(
    rows: list[list[Turns]],
    make: Callable[[Turns], Example | None],
    name: str,
) -> tuple[list[list[Example]], list[int]]:
    """Groups of examples and the rows they come from; says how many were cut or left out."""
    groups, kept = [], []
    cut = 0
    for i, row in enumerate(rows):
        group = [make(turns) for turns in row]
        if not all(group):
            continue
        groups.append(group)
        kept.append(i)
        cut += sum(not one.whole for one in group)
    if not kept:
        raise UserError(f"{name}: every row is longer than the context", "use a larger --seq_len")
    say(
        f"{name}: {len(kept)} rows, {cut} truncated after the last answer that fits, "
        f"{len(rows) - len(kept)} longer than the context left out"
    )
    return groups, kept


def data_key(groups: Iterable[list[Example]]) -> str:
    """A hash of what is trained on."""
    digest = hashlib.blake2b(digest_size=16)
    for group in groups:
        for one in group:
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


class Answerable(Chats):
    """Conversations and questions, one a sequence, of which a share is answered anew; `more` tokens
    are what such an answer costs."""

    def __init__(self, examples: list[Example], seq_len: int, seed: int, share: float, more: int):
        super().__init__(examples, seq_len, seed, pack=False)
        self.share = share
        self.tokens += int(share * more * self.count)

    def anew(self, number: int, one: Example) -> bool:
        """Whether a sample is answered by the student: always where its row gives no answer."""
        spread = math.floor((number + 1) * self.share) > math.floor(number * self.share)
        return spread or not one.learned.any()


@dataclass(frozen=True)
class Problem:
    """What is to be answered: its ids (n,), its turns, the row it comes from, and the state of the
    environment that asks it."""

    ids: np.ndarray
    turns: Turns
    row: dict
    state: bytes = b""


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


def llama3_frequencies(frequencies: Tensor, config: ModelSettings) -> Tensor:
    """Rotations of few turns over the original context stretched, of many kept, a ramp between by
    their turns (Llama 3.1: Grattafiori et al. 2024)."""
    original = config.rope_original or round(config.seq_len / config.rope_factor)
    turns = original * frequencies / (2 * math.pi)
    kept = ((turns - config.rope_low) / (config.rope_high - config.rope_low)).clamp(0, 1)
    return frequencies / config.rope_factor * (1 - kept) + frequencies * kept


def rope_tables(config: ModelSettings) -> tuple[Tensor, Tensor]:
    """cos and sin (positions, D/2) of the rotary angles (Su et al. 2021, eq. 15)."""
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.float32, device="cpu")
    exponents = exponents / config.head_size  # never on "meta", where torch loads half its compiler
    frequencies, scale = 1.0 / config.rope_theta**exponents, 1.0
    if config.rope_scaling == "linear":
        frequencies = frequencies / config.rope_factor
    elif config.rope_scaling == "llama3":
        frequencies = llama3_frequencies(frequencies, config)
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
    """Keys and values of the tokens seen so far, a row each its own length; a tensor (B, K, S, D)
    for each layer, so that a step that writes one copies no other.

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
        shape = (rows, config.kv_heads, self.size, config.head_size)
        layers = range(config.n_layer)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.lengths = [0] * rows
        self.static = False

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.k, *self.v]

    def first(self, rows: int) -> "KVCache":
        """Its first rows as a cache in the same memory, which stays where it is: a CUDA graph that
        writes there can be captured."""
        part = copy.copy(self)
        part.k = [tensor[:rows] for tensor in self.k]
        part.v = [tensor[:rows] for tensor in self.v]
        part.lengths = [0] * rows
        part.static = True
        for tensor in part.tensors:
            torch._dynamo.mark_static_address(tensor, guard=False)
        return part

    def positions(self, new: int) -> Tensor:
        """Where `new` tokens a row will lie: (B, new)."""
        return (torch.tensor(self.lengths).unsqueeze(1) + torch.arange(new)).to(self.k[0].device)

    def write(
        self,
        layer: int,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        fixed: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, D) at `positions` (B, T); the layer's tensors up to the longest row, or
        to a `fixed` end, which keeps the shapes of one step those of the next."""
        end = fixed or max(self.lengths) + k.shape[2]
        kept_k, kept_v = self.k[layer], self.v[layer]
        if not fixed and len(set(self.lengths)) == 1:
            span = slice(self.lengths[0], end)
            kept_k[:, :, span], kept_v[:, :, span] = k, v
        else:
            rows = torch.arange(k.shape[0], device=k.device).unsqueeze(1)
            kept_k[rows, :, positions] = k.transpose(1, 2).to(kept_k.dtype)
            kept_v[rows, :, positions] = v.transpose(1, 2).to(kept_v.dtype)
        return kept_k[:, :, :end], kept_v[:, :, :end]

    def put(self, rows: list[int], other: "KVCache", picks: list[int]) -> None:
        """Begin `rows` anew with what the rows `picks` of another cache hold."""
        end = max(other.lengths)
        at, source = (torch.tensor(places, device=self.k[0].device) for places in (rows, picks))
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            mine[at, :, :end] = theirs[source, :, :end]
        for row, pick in zip(rows, picks, strict=True):
            self.lengths[row] = other.lengths[pick]

    def keep(self, rows: list[int]) -> "KVCache":
        """A cache of these rows; a static one in the same memory."""
        kept, places = self, list(range(len(rows)))
        if self.static:
            kept = self.first(len(rows))
            kept.put(places, self, rows)
            return kept
        at = torch.tensor(rows, device=self.k[0].device)
        self.k, self.v = [k[at] for k in self.k], [v[at] for v in self.v]
        self.lengths = [self.lengths[row] for row in rows]
        return self

    def forget(self, rows: list[int], count: int, cos: Tensor, sin: Tensor) -> None:
        """Drop the `count` oldest tokens behind the sinks of full rows, and move the rest up.

        Moved keys turn back by as many positions (Xiao et al. 2023, section 3.2), so that no
        position ever passes the trained context. cos and sin (D/2,) are of `count` positions.
        """
        sinks = self.config.n_sink
        for layer, (kept_k, kept_v) in enumerate(zip(self.k, self.v, strict=True)):
            k, v = kept_k[rows, :, sinks + count :], kept_v[rows, :, sinks + count :]
            if self.config.rotates(layer):
                k = rotate(k.float(), cos, -sin).to(k.dtype)
            kept_k[rows, :, sinks : self.size - count] = k
            kept_v[rows, :, sinks : self.size - count] = v
        for row in rows:
            self.lengths[row] -= count


FAR = 1 << 30  # the place of a key that no query may see


class SharedPrompts:
    """Keys and values of prompts with their gradients, which all completions of a prompt attend to,
    so that training reads each prompt once (a prefix tree of depth 1)."""

    def __init__(self, layers: dict[int, tuple[Tensor, Tensor]], owners: Tensor | None = None):
        """owners (B,): the prompt of each completion; None while the prompts are read."""
        self.layers = layers
        self.owners = owners

    def write(self, layer: int, k: Tensor, v: Tensor, *_) -> tuple[Tensor, Tensor]:
        """Keep what prompts give (P, K, S, D), or put it before what completions do
        (B, K, T, D)."""
        if self.owners is None:
            self.layers[layer] = k, v
            return k, v
        before_k, before_v = self.layers[layer]
        return (
            torch.cat((before_k[self.owners], k), dim=2),
            torch.cat((before_v[self.owners], v), dim=2),
        )


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
        rows = None
        if self.documents is not None:
            rows = torch.arange(len(self.documents), device=key.device).view(-1, 1, 1, 1)
        return self.mask_mod(window)(rows, None, query, key)

    def block_mask(self, window: int) -> BlockMask:
        """The same for flex_attention, which skips the blocks that no query attends to."""
        rows = None if self.documents is None else len(self.documents)
        create = create_block_mask
        if on_cuda(self.key) and not torch.compiler.is_compiling():
            create = compiled_once(create_block_mask)  # eager, it would build the whole (T, S)
        return create(
            self.mask_mod(window),
            rows,
            None,
            self.query.shape[1],
            self.key.shape[1],
            device=self.key.device,
        )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | BlockMask | None,
    dropout: float,
) -> Tensor:
    """Attention of q (B, H, T, D) over k, v (B, K, S, D): FlexAttention where the mask is a
    BlockMask, else SDPA; without a mask it is causal, and a single query sees every key."""
    grouped = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):
        flex = flex_attention
        if not torch.compiler.is_compiling():
            flex = compiled_once(flex_attention)  # eager, it is not fused
        return flex(q, k, v, block_mask=mask, enable_gqa=grouped)
    single = q.shape[2] == 1
    queries = q
    if grouped and single:  # the queries of a group as rows: every kernel takes them
        queries = q.reshape(len(q), k.shape[1], -1, q.shape[3])
    y = F.scaled_dot_product_attention(
        queries,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and not single,
        enable_gqa=grouped and not single,
    )
    return y.reshape(q.shape)


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
    counted: Tensor | None = None  # (B, T): places that are not padding, where there is some


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key/value heads."""

    def __init__(self, config: ModelSettings, layer: int):
        super().__init__()
        self.layer = layer
        self.H = config.n_head
        self.K = config.kv_heads
        self.D = config.head_size
        self.dropout = config.dropout
        self.rotates = config.rotates(layer)
        self.windowed = config.windowed(layer)
        rows = (self.H + 2 * self.K) * self.D
        self.qkv = nn.Linear(config.d_model, rows, bias=config.qkv_bias)
        self.proj = nn.Linear(self.H * self.D, config.d_model, bias=False)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm:
            self.q_norm = RMSNorm(self.D, config.norm_eps)
            self.k_norm = RMSNorm(self.D, config.norm_eps)

    def heads(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, D), keys and values (B, K, T, D) of the input."""
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, self.H + 2 * self.K, self.D).transpose(1, 2)
        q, k, v = qkv.split((self.H, self.K, self.K), dim=1)  # (B, H | K, T, D)

        both = qkv[:, : self.H + self.K]
        if self.q_norm is not None:
            both = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        if self.rotates:
            both = rotate(both, context.cos, context.sin)
        q, k = both.split((self.H, self.K), dim=1)
        return q, k, v

    def forward(self, x: Tensor, context: Context) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.heads(x, context)
        if context.cache is not None:
            k, v = context.cache.write(self.layer, k, v, context.positions, context.end)
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, v, context.masks[self.windowed], dropout)
        return self.proj(y.transpose(1, 2).reshape(B, T, self.H * self.D))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): w1 gate, w2 up, w3 down."""

    def __init__(self, config: ModelSettings):
        super().__init__()
        self.w1 = nn.Linear(config.d_model, config.ffn_width, bias=False)
        self.w2 = nn.Linear(config.d_model, config.ffn_width, bias=False)
        self.w3 = nn.Linear(config.ffn_width, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype that x is multiplied in: autocast's, or its own."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def to_fp8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in 8 bits, and the factor, one for the whole tensor, that gives it back."""
    most = torch.finfo(dtype).max
    scale = (x.abs().amax().float() / most).clamp(min=1e-12)
    return (x / scale).clamp(-most, most).to(dtype), scale


def scaled_matmul(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """a (n, k) times the transpose of b (m, k), both in 8 bits with their factors, in bf16."""
    return torch._scaled_mm(a, b.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=torch.bfloat16)


class Fp8Matmul(torch.autograd.Function):
    """x (N, d) times the transpose of a weight (f, d) in 8 bits, and so its gradients: e4m3 for
    both, e5m2 for what comes back (Micikevicius et al. 2022)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        a, a_scale = to_fp8(x, torch.float8_e4m3fn)
        b, b_scale = to_fp8(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(a, a_scale, b, b_scale)
        ctx.dtypes = x.dtype, weight.dtype
        return scaled_matmul(a, a_scale, b, b_scale).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, a_scale, b, b_scale = ctx.saved_tensors
        g, g_scale = to_fp8(gradient, torch.float8_e5m2)
        of_x = scaled_matmul(g, g_scale, b.t().contiguous(), b_scale)
        of_weight = scaled_matmul(g.t().contiguous(), g_scale, a.t().contiguous(), a_scale)
        return of_x.to(ctx.dtypes[0]), of_weight.to(ctx.dtypes[1])


class Fp8Linear(nn.Linear):
    """A linear map that trains in 8 bits where 16 divides its rows, and is evaluated in 16."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).to(matmul_dtype(x))
        if not self.training or len(rows) % 16:
            return super().forward(x)
        y = Fp8Matmul.apply(rows, self.weight).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Rows of x (N, d), sorted by expert, each through its own of weight (E, d, f); counts (E,)
    says how many rows each expert has. For an eager CPU, as it reads the counts."""
    parts = x.split(counts.tolist())
    return torch.cat([part @ w for part, w in zip(parts, weight, strict=True)])


def in_blocks(counts: Tensor, rows: int) -> tuple[Tensor, Tensor, int]:
    """A layout of rows, sorted by expert, in blocks that belong to one expert each, whose shapes do
    not depend on the counts (E,): the place of each row, the expert of each block, and the
    rows of a block. Twice as many blocks as experts hold whatever the counts are."""
    experts = len(counts)
    size = -(-rows // experts)
    blocks = (counts + size - 1) // size  # of each expert
    ends = blocks.cumsum(0)
    owners = torch.arange(2 * experts, device=counts.device)
    owners = torch.searchsorted(ends, owners, right=True).clamp(max=experts - 1)
    place = torch.arange(rows, device=counts.device)
    expert = torch.searchsorted(counts.cumsum(0), place, right=True)
    shift = (ends - blocks) * size - (counts.cumsum(0) - counts)
    return place + shift[expert], owners, size


class MoE(nn.Module):
    """A mixture of SwiGLU experts, each token through its likeliest few; none is dropped.

    Mixtral's router (Jiang et al. 2024): softmax over all experts, the chosen ones' weights
    scaled to sum to 1. Load-balance loss: Fedus et al. 2021, eq. 4; z-loss: Zoph et al. 2022.
    """

    def __init__(self, config: ModelSettings):
        super().__init__()
        E, d, width = config.n_expert, config.d_model, config.ffn_width
        self.E = E
        self.active = config.n_expert_active
        self.balance_loss = config.balance_loss
        self.router_z_loss = config.router_z_loss
        self.router = nn.Linear(d, E, bias=False)
        self.w1 = nn.Parameter(torch.empty(E, d, width))
        self.w2 = nn.Parameter(torch.empty(E, d, width))
        self.w3 = nn.Parameter(torch.empty(E, width, d))
        usage = torch.zeros(E, device="cpu")  # evaluated tokens of each expert
        self.register_buffer("usage", usage, persistent=False)

    def forward(self, x: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, T, d) -> the same and a scalar auxiliary loss, of the `counted` places (B, T)."""
        tokens = x.flatten(0, 1)  # (N, d)
        with torch.autocast(x.device.type, enabled=False):  # near-ties must not flip
            scores = F.linear(tokens.float(), self.router.weight.float())  # (N, E)
        probs = scores.softmax(-1)
        weights, experts = probs.topk(self.active, dim=-1)  # (N, active)
        weights = weights / weights.sum(-1, keepdim=True)

        chosen = experts.flatten()  # (N * active,)
        order = chosen.argsort(stable=True)  # sorted by expert
        counts = torch.zeros_like(self.usage, dtype=torch.long)
        counts = counts.scatter_add_(0, chosen, torch.ones_like(chosen))
        places = order // self.active
        y = self.experts(tokens[places], counts)
        y = y * weights.flatten()[order].unsqueeze(-1).to(x.dtype)
        y = torch.zeros_like(tokens).index_add_(0, places, y.to(x.dtype))

        if not self.training:
            self.usage += counts
        return y.view_as(x), self.aux_loss(scores, probs, experts, counted)

    def aux_loss(
        self,
        scores: Tensor,
        probs: Tensor,
        experts: Tensor,
        counted: Tensor | None,
    ) -> Tensor:
        """Load-balance and z-loss of scores and probs (N, E) and of the chosen experts
        (N, active), of the counted tokens alone."""
        share = torch.full_like(probs[:, 0], 1 / len(probs))  # of each token in the mean
        if counted is not None:
            share = counted.flatten().float()
            share = share / share.sum().clamp(min=1)
        usage = torch.zeros_like(self.usage).scatter_add_(
            0, experts.flatten(), share.repeat_interleave(self.active) / self.active
        )
        balance = self.E * (usage * (share @ probs)).sum()
        z = (share * scores.logsumexp(-1).square()).sum()
        return self.balance_loss * balance + self.router_z_loss * z

    def experts(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows (R, d), sorted by expert, through their own; in one kernel a matrix where torch has
        that, and never with a wait for the device."""
        dtype = matmul_dtype(rows)  # grouped_mm does not cast by itself
        rows, w1, w2, w3 = (t.to(dtype) for t in (rows, self.w1, self.w2, self.w3))
        aligned = w1.shape[-1] % 8 == w1.shape[-2] % 8 == 0  # strides of 16 bytes
        if hasattr(F, "grouped_mm") and dtype == torch.bfloat16 and aligned:
            linear = functools.partial(F.grouped_mm, offs=counts.cumsum(0).int())
        elif on_cuda(rows) or torch.compiler.is_compiling():
            places, owners, size = in_blocks(counts, len(rows))
            laid = rows.new_zeros(len(owners) * size, rows.shape[1])
            rows = laid.index_copy(0, places, rows).view(len(owners), size, -1)
            y = torch.bmm(F.silu(rows @ w1[owners]) * (rows @ w2[owners]), w3[owners])
            return y.flatten(0, 1)[places]
        else:
            linear = functools.partial(grouped_linear, counts=counts)
        return linear(F.silu(linear(rows, w1)) * linear(rows, w2), w3)


class Layer(nn.Module):
    """One pre-norm layer: (B, T, d) -> the same and the auxiliary loss of its experts, if any."""

    def __init__(self, config: ModelSettings, layer: int):
        super().__init__()
        self.norm1 = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config, layer)
        self.norm2 = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MoE(config) if config.n_expert else MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        x = x + self.drop(self.attn(self.norm1(x), context))
        aux_loss = None
        if isinstance(self.mlp, MoE):
            y, aux_loss = self.mlp(self.norm2(x), context.counted)
        else:
            y = self.mlp(self.norm2(x))
        return x + self.drop(y), aux_loss


def is_residual_output(name: str) -> bool:
    """Whether a weight of that name writes into the residual stream."""
    return name.endswith(("attn.proj.weight", "mlp.w3.weight", "mlp.w3"))


class Transformer(nn.Module):
    """A LLaMA-style decoder. `config.vocab_size` must be set."""

    def __init__(self, config: ModelSettings):
        super().__init__()
        assert config.rope_layout == "half", "load_checkpoint converts other layouts to this one"
        self.config = config
        self.grad_checkpoint = False
        self.memory: KVCache | None = None  # kept for the next generation, where it is compiled
        self.fp32_head = False  # logits in fp32 where all else is bf16 (MiniMax 2025, section 3.2)
        self.shards: Shards | None = None  # where ranks divide it among them
        empty = torch.empty(config.vocab_size, config.d_model)  # init_weights fills it
        self.tok_emb = nn.Embedding.from_pretrained(empty, freeze=False)
        self.sinks: nn.Parameter | None = None
        if config.n_sink:
            self.sinks = nn.Parameter(torch.empty(config.n_sink, config.d_model))
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Layer(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie:
            self.lm_head.weight = self.tok_emb.weight
        self.score: nn.Linear | None = None
        if config.scalar_head:
            self.score = nn.Linear(config.d_model, 1, bias=False)
        for name, table in zip(("cos", "sin"), rope_tables(config), strict=True):
            self.register_buffer(name, table, persistent=False)  # (n_sink + seq_len, D/2)

    @property
    def device(self) -> torch.device:
        return self.tok_emb.weight.device

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal weights of deviation 0.02, or with trunc_init of 0.5/sqrt(d_model), truncated at
        three deviations. What writes into the residual stream is divided by sqrt(2 L), as in
        GPT-2. Norms begin at 1, a scalar head at 0: it scores everything alike."""
        generator = torch.Generator().manual_seed(seed % 2**63)
        std, bound = 0.02, math.inf
        if self.config.trunc_init:
            std, bound = 0.5 / math.sqrt(self.config.d_model), 3.0
        depth = math.sqrt(2 * self.config.n_layer)
        for name, weight in self.named_parameters():
            if name == "score.weight" or name.endswith(".bias"):
                nn.init.zeros_(weight)
            elif weight.dim() < 2:
                nn.init.ones_(weight)
            else:
                drawn = torch.randn(weight.shape, generator=generator).clamp_(-bound, bound) * std
                if is_residual_output(name):
                    drawn = drawn / depth
                weight.copy_(drawn)

    def embed(self, ids: Tensor, with_sinks: bool) -> Tensor:
        """Input vectors (B, T, d), the learned sinks before them where the sequence begins."""
        x = self.tok_emb(ids)
        if self.config.embed_scale:
            x = x * math.sqrt(self.config.d_model)
        if with_sinks and self.sinks is not None:
            x = torch.cat((self.sinks.to(x.dtype).expand(len(ids), -1, -1), x), dim=1)
        return self.drop(x)

    def documents(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The document of each place (B, S) and its position in that document; sinks are 0."""
        sinks = self.config.n_sink
        starts = F.pad(ids == self.config.bos_id, (sinks, 0))
        places = torch.arange(starts.shape[1], device=ids.device)
        first = torch.where(starts, places - sinks, 0).cummax(1).values
        return starts.cumsum(1), places - first

    def rotary(self, places: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (B, 1, T, D/2) at places (B, T), in the dtype that x is multiplied in."""
        dtype = matmul_dtype(x)
        return self.cos[places].unsqueeze(1).to(dtype), self.sin[places].unsqueeze(1).to(dtype)

    def context(
        self,
        ids: Tensor,
        x: Tensor,
        cache: KVCache | None,
        counted: Tensor | None = None,
    ) -> Context:
        """The context of ids and their input x, which follow what the cache holds."""
        seen = max(cache.lengths) if cache else 0
        length = x.shape[1]
        key = torch.arange(seen + length, device=x.device).unsqueeze(0)
        positions = cache.positions(length) if seen else key
        documents, places = None, positions
        if cache is None and self.config.doc_mask:
            documents, places = self.documents(ids)

        attention_mask = AttentionMask(positions, key, documents, self.config.n_sink)
        make = attention_mask.mask
        if cache is None and self.uses_flex(x):
            make = attention_mask.block_mask
        cos, sin = self.rotary(places, x)
        masks = self.masks(make, attention_mask, cache)
        if counted is not None:
            counted = F.pad(counted, (length - ids.shape[1], 0), value=True)  # sinks count
        return Context(cos, sin, cache, positions, masks, counted=counted)

    def uses_flex(self, x: Tensor) -> bool:
        """Whether masks are for FlexAttention, which has neither dropout nor tiny heads."""
        dropout = self.training and self.config.dropout > 0
        return on_cuda(x) and self.config.head_size >= 16 and not dropout

    def masks(
        self,
        make: Callable,
        attention_mask: AttentionMask,
        cache: KVCache | None,
    ) -> dict[bool, Tensor | BlockMask | None]:
        """Masks by whether a layer is windowed; None where causal order is all there is."""
        seen = max(cache.lengths) if cache else 0
        length = attention_mask.query.shape[1]
        one_by_one = length == 1 and seen > 0 and len(set(cache.lengths)) == 1
        causal = attention_mask.documents is None and (seen == 0 or one_by_one)
        masks = {False: None if causal else make(0)}

        window = self.config.window
        if window:
            reached = seen + length - self.config.n_sink <= window
            masks[True] = masks[False] if reached else make(window)
        return masks

    def run_blocks(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """The last layer's output (B, T, d), and the experts' mean auxiliary loss, if any."""
        aux_losses = []
        for block in self.blocks:
            if self.grad_checkpoint and self.training:
                x, aux_loss = recompute(block, x, context, use_reentrant=False)
            else:
                x, aux_loss = block(x, context)
            if aux_loss is not None:
                aux_losses.append(aux_loss)
        if not aux_losses:
            return x, None
        return x, sum(aux_losses) / len(aux_losses)

    def hidden_and_aux_loss(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        lengths: list[int] | None = None,
        counted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Final hidden states (B, T, d) of ids (B, T), and the experts' auxiliary loss, if any.

        With a cache, ids follow what it holds; `lengths` says how many ids of a padded row count.
        `counted` (B, T) are the places that the auxiliary loss is of, by default all.
        """
        x = self.embed(ids, with_sinks=cache is None or max(cache.lengths) == 0)
        context = self.context(ids, x, cache, counted)
        sinks = x.shape[1] - ids.shape[1]
        x, aux_loss = self.run_blocks(x, context)
        if cache is not None:
            new = lengths or [ids.shape[1]] * len(ids)
            cache.lengths = [old + sinks + n for old, n in zip(cache.lengths, new, strict=True)]
        return self.norm(x[:, sinks:]), aux_loss

    def hidden_behind(self, prompts: Tensor, owners: Tensor, ids: Tensor) -> Tensor:
        """Final hidden states (B, T, d) of ids (B, T) that continue prompts (P, S), padded with
        IGNORE at their ends; owners (B,) says which. Each prompt is one document, and read once."""
        layers: dict[int, tuple[Tensor, Tensor]] = {}
        known = prompts != IGNORE
        x = self.embed(prompts.clamp(min=0), with_sinks=True)
        context = self.context(prompts, x, None)
        self.run_blocks(x, replace(context, cache=SharedPrompts(layers)))

        sinks = self.config.n_sink
        x = self.embed(ids, with_sinks=False)
        seen = F.pad(known, (sinks, 0), value=True)[owners]  # (B, n_sink + S)
        query = seen.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=ids.device)
        key = torch.arange(seen.shape[1], device=ids.device).expand_as(seen)
        key = torch.cat((torch.where(seen, key, FAR), query), dim=1)
        attention_mask = AttentionMask(query, key, None, sinks)
        masks = {False: attention_mask.mask(0), True: None}
        if self.config.window:
            masks[True] = attention_mask.mask(self.config.window)
        cos, sin = self.rotary(query.clamp(max=len(self.cos) - 1), x)  # padding may lie beyond
        x, _ = self.run_blocks(x, Context(cos, sin, SharedPrompts(layers, owners), query, masks))
        return self.norm(x)

    def next_logits(self, ids: Tensor, positions: Tensor, cache: KVCache, end: int) -> Tensor:
        """Logits (B, V) after ids (B, 1), which lie at `positions` (B, 1), all before `end`.

        This is what is compiled: the cache's own lengths are neither read nor changed.
        """
        x = self.embed(ids, with_sinks=False)
        key = torch.arange(end, device=ids.device).unsqueeze(0)
        attention_mask = AttentionMask(positions, key, None, self.config.n_sink)
        masks = {False: attention_mask.mask(0), True: attention_mask.mask(self.config.window)}
        cos, sin = self.rotary(positions, x)
        context = Context(cos, sin, cache, positions, masks, end)
        for block in self.blocks:
            x, _ = block(x, context)
        return self.logits(self.norm(x))[:, -1]

    def hidden(self, ids: Tensor, *args) -> Tensor:
        return self.hidden_and_aux_loss(ids, *args)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (…, V) of final hidden states, soft-capped (Gemma Team 2024, section 2)."""
        if self.fp32_head:
            with torch.autocast(hidden.device.type, enabled=False):
                logits = F.linear(hidden.float(), self.lm_head.weight.float())
        else:
            logits = self.lm_head(hidden)
        cap = self.config.softcap
        if cap:
            logits = cap * torch.tanh(logits / cap)
        return logits

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) of ids (B, T)."""
        return self.logits(self.hidden(ids, cache))


BIGRAM_TOKENS = 1 << 24  # of the text, whose pairs are counted

BIGRAM_PRIOR = 50.0  # occurrences of a token that its followers' frequencies in all text count for

BIGRAM_ROUNDS = 1  # of subspace iteration

BIGRAM_SPARE = 16  # directions more than are kept


class Bigrams:
    """log p(next | token) of a text as a matrix (V, V) in little memory: sparse where a pair was
    seen, elsewhere of the next token's own frequency (a Dirichlet prior); each row less its mean,
    which no softmax sees."""

    def __init__(self, ids: Tensor, vocab_size: int):
        counts = torch.bincount(ids, minlength=vocab_size).float() + 1
        self.share = counts / counts.sum()
        pairs, seen = (ids[:-1] * vocab_size + ids[1:]).unique(return_counts=True)
        rows, columns = pairs // vocab_size, pairs % vocab_size
        ratios = (seen / (BIGRAM_PRIOR * self.share[columns])).log1p()
        places = torch.stack((rows, columns))
        size = (vocab_size, vocab_size)
        self.seen = torch.sparse_coo_tensor(places, ratios, size, check_invariants=False).coalesce()
        self.seen_turned = self.seen.t().coalesce()
        self.log_share = self.share.log()
        self.mean = self.times_seen(self.seen, self.share) + self.share @ self.log_share

    @staticmethod
    def times_seen(matrix: Tensor, vector: Tensor) -> Tensor:
        return torch.sparse.mm(matrix, vector.unsqueeze(1)).squeeze(1)

    def times(self, x: Tensor) -> Tensor:
        """The matrix times x (V, k)."""
        sums = x.sum(0)
        return torch.sparse.mm(self.seen, x) + self.log_share @ x - self.mean.outer(sums)

    def turned_times(self, x: Tensor) -> Tensor:
        """The transposed matrix times x (V, k)."""
        sums = x.sum(0)
        return torch.sparse.mm(self.seen_turned, x) + self.log_share.outer(sums) - self.mean @ x

    def factors(self, rank: int, seed: int) -> tuple[Tensor, Tensor]:
        """X and W (V, rank) whose X W^T is near the matrix, most so for frequent tokens: a singular
        value decomposition of the matrix weighted by the roots of their frequencies, by subspace
        iteration (Halko et al. 2011, algorithms 4.4 and 5.1)."""
        generator = torch.Generator().manual_seed(seed % 2**63)
        weight = self.share.sqrt().unsqueeze(1)
        width = min(rank + BIGRAM_SPARE, len(weight))
        begin = torch.randn(len(weight), width, generator=generator).to(weight)
        basis = torch.linalg.qr(weight * self.times(weight * begin)).Q
        for _ in range(BIGRAM_ROUNDS):
            basis = torch.linalg.qr(weight * self.turned_times(weight * basis)).Q
            basis = torch.linalg.qr(weight * self.times(weight * basis)).Q
        left, sizes, right = torch.linalg.svd(
            (weight * self.turned_times(weight * basis)).T, full_matrices=False
        )
        x = basis @ left[:, :rank] * sizes[:rank]
        return x / weight, right[:rank].T / weight


UNSEEN_SHARE = 0.3  # of a row's length that is drawn at random where its token is not in the text


@torch.no_grad()
def begin_with_bigrams(model: Transformer, ids: Tensor, seed: int) -> None:
    """Have a new model predict what in a text follows each token, before it is trained: embedding
    and head are factors of the text's Bigrams, what the layers add begins at 0.

    The final norm makes all rows of one length, so that a dimension that the head does not read
    fills them up; no coordinate is special, as a random rotation mixes them. The head must have
    weights of its own.
    """
    vocab_size, width = model.tok_emb.weight.shape
    rank = min(width - 1, vocab_size)
    ids = ids.to(model.device)
    generator = torch.Generator().manual_seed(seed % 2**63)
    x, head = Bigrams(ids, vocab_size).factors(rank, seed)
    lengths = x.norm(dim=1, keepdim=True)
    most = lengths.quantile(0.999)  # beyond: the rarest tokens
    x = x * (most / lengths).clamp(max=1.0)
    unseen = torch.bincount(ids, minlength=vocab_size) == 0  # as the marks of a chat: told apart
    drawn = torch.randn(x.shape, generator=generator).to(x) / math.sqrt(rank)
    x = torch.where(unseen.unsqueeze(1), UNSEEN_SHARE * most * drawn, x)
    rest = (most.square() - x.square().sum(1, keepdim=True)).clamp(min=0.0).sqrt()
    fill = width - rank
    x = torch.cat((x, rest / math.sqrt(fill) * torch.ones_like(x[:, :1]).expand(-1, fill)), 1)
    head = F.pad(head, (0, fill))
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q.to(x)
    scale = math.sqrt(width) / most
    model.lm_head.weight.copy_(head @ turn / scale)
    if model.config.embed_scale:
        scale = scale / math.sqrt(width)
    model.tok_emb.weight.copy_(x @ turn * scale)
    for name, weight in model.named_parameters():
        if is_residual_output(name):
            weight.zero_()


FP8_LEAST = 1024  # rows and columns of a matrix, below which 8 bits cost more than they save


def attach_fp8(model: Transformer) -> int:
    """Make the large matrices of the layers train in 8 bits; how many these are."""
    changed = 0
    for block in model.blocks:
        for part in (block.attn, block.mlp):
            for name, old in [*part.named_children()]:
                plain = type(old) is nn.Linear  # no adapter
                fits = plain and min(old.weight.shape) >= FP8_LEAST
                if fits and not any(size % 16 for size in old.weight.shape):
                    new = Fp8Linear(old.in_features, old.out_features, bias=False, device="meta")
                    new.weight, new.bias = old.weight, old.bias
                    setattr(part, name, new)
                    changed += 1
    return changed


def parameter_counts(config: ModelSettings) -> dict[str, int]:
    """Parameters by part: embedding, head (0 where tied), blocks (norms included), total; and
    those active for one token: of the experts, only the active ones."""
    with torch.device("meta"):
        model = Transformer(config)
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    embedding = sizes["tok_emb.weight"]
    head = sizes.get("lm_head.weight", 0)
    total = sum(sizes.values())
    idle_experts = max(0, config.n_expert - config.n_expert_active)
    idle = idle_experts * 3 * config.d_model * config.ffn_width * config.n_layer
    return {
        "embedding": embedding,
        "head": head,
        "blocks": total - embedding - head,
        "total": total,
        "active": total - idle,
    }


def multiplied(model: Transformer) -> Iterator[tuple[nn.Module, str]]:
    """The weights that autocast casts each time they are read: their modules and names there."""
    for name, module in model.named_modules():
        kept = name in ("score", "lm_head" if model.fp32_head else "")
        if isinstance(module, MoE):
            yield from ((module, matrix) for matrix in ("w1", "w2", "w3"))
        elif isinstance(module, nn.Linear) and not kept and not name.endswith("router"):
            yield from ((module, matrix) for matrix, _ in module.named_parameters(recurse=False))


def lower(module: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Keep a module's weight in `dtype`; it can be trained no more."""
    weight = getattr(module, name).detach().to(dtype)
    setattr(module, name, nn.Parameter(weight, requires_grad=False))


def lower_weights(model: Transformer, dtype: torch.dtype) -> Transformer:
    """The model, which from here on is only read, with the weights of its matmuls in `dtype`: under
    autocast it computes the same, and casts none of them again for every token."""
    if dtype != torch.float32:
        for module, name in [*multiplied(model)]:
            lower(module, name, dtype)
    return model


def flops_per_token(config: ModelSettings) -> int:
    """Training FLOPs a token: 6 for each multiplied weight, 12 H D S for a layer's attention.

    Chowdhery et al. 2022 (PaLM), appendix B; the head multiplies, the embedding looks up; S is
    the context or the window, and only active experts count.
    """
    counts = parameter_counts(config)
    multiplied = counts["active"] - counts["embedding"] - counts["head"]
    multiplied += config.vocab_size * config.d_model
    seen = 0
    for layer in range(config.n_layer):
        if config.windowed(layer):
            seen += min(config.window, config.seq_len)
        else:
            seen += config.seq_len
    return 6 * multiplied + 12 * config.n_head * config.head_size * seen


# ==================================================================================================
# LoRA: low-rank adapters: attach, merge
# ==================================================================================================


class LoraLinear(nn.Linear):
    """A frozen linear map W and a low-rank change of it: W x + scale B A x (Hu et al. 2021)."""

    def __init__(self, base: nn.Linear, settings: LoraSettings, generator: torch.Generator):
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight = base.weight
        self.bias = base.bias
        self.scale = settings.scale
        self.drop = nn.Dropout(settings.lora_dropout)
        a = torch.rand(settings.lora_rank, base.in_features, generator=generator) * 2 - 1
        self.lora_a = nn.Parameter(a / math.sqrt(base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, settings.lora_rank))

    def forward(self, x: Tensor) -> Tensor:
        change = F.linear(F.linear(self.drop(x), self.lora_a), self.lora_b)
        return F.linear(x, self.weight, self.bias) + change * self.scale


def attach_lora(
    model: Transformer, settings: LoraSettings, seed: int, dtype: torch.dtype = torch.float32
) -> None:
    """Freeze the model and give the named matrices adapters, which change nothing yet. What is
    frozen is kept in `dtype`, in which autocast would read it: that is the same, in less memory."""
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
    for module, name in [*multiplied(model)]:
        if module is not model.lm_head:  # which may be the embedding, read in fp32
            lower(module, name, dtype)
    for part, name in found:
        setattr(part, name, LoraLinear(getattr(part, name), settings, generator))
    if model.score is not None:
        model.score.requires_grad_(True)


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: w.detach() for name, w in model.named_parameters() if w.requires_grad}


def merge_lora(
    weights: dict[str, Tensor],
    adapter: dict[str, Tensor],
    scale: float,
) -> dict[str, Tensor]:
    """The weights with an adapter's trained_weights worked into them."""
    merged = weights | {name: w for name, w in adapter.items() if ".lora_" not in name}
    for stem in (name.removesuffix("lora_b") for name in adapter if name.endswith(".lora_b")):
        change = adapter[f"{stem}lora_b"].float() @ adapter[f"{stem}lora_a"].float()
        merged[f"{stem}weight"] = weights[f"{stem}weight"].float() + scale * change
    return merged


# ==================================================================================================
# Engine: sampling and cached generation; token ids only
# ==================================================================================================

DROP_WHEN = 0.25  # share of finished rows at which a batch takes in waiting ones, or shrinks

LEAST_END = 256  # of the keys that a compiled step sees; further ends are powers of two

LEAST_ROWS = 8  # of a compiled batch of more than one, whose sizes are powers of two

LOOK_EVERY = 8  # ids drawn on a GPU before any is looked at, which waits for it


@torch.no_grad()
def renew_copy(twin: Transformer, model: Transformer) -> None:
    """Give a reading_copy the weights that the model has now."""
    if model.shards:
        theirs = dict(twin.named_parameters(remove_duplicate=False))
        for name, weight in model.named_parameters(remove_duplicate=False):
            theirs[name].copy_(whole(weight))
    elif twin is not model:
        pairs = zip(multiplied(twin), multiplied(model), strict=True)
        theirs, ours = zip(*((getattr(*a), getattr(*b)) for a, b in pairs), strict=True)
        torch._foreach_copy_(theirs, ours)


def reading_copy(model: Transformer, dtype: torch.dtype) -> Transformer:
    """The model as generation reads it, in evaluation mode: itself in fp32, or else a copy that
    shares all but the weights of its matmuls (renew_copy). Of a sharded model always a whole copy,
    for which all ranks must ask."""
    if model.shards:
        device = model.cos.device
        twin = lower_weights(twin_of(model.shards.skeleton, torch.clone), dtype)
        twin = twin_of(twin, lambda weight: torch.empty_like(weight, device=device)).to(device)
        renew_copy(twin, model)
        return twin.eval()
    if dtype == torch.float32:
        return model.eval()
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return lower_weights(copy.deepcopy(model, shared), dtype).eval()


def compiled_rows(rows: int) -> int:
    """The rows of a compiled batch that has room for so many."""
    return rows if rows == 1 else max(LEAST_ROWS, 1 << (rows - 1).bit_length())


def without_cudnn():
    """SDPA without cuDNN, which plans anew for each number of keys."""
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(kernels)


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
    if not settings.penalises:
        return logits
    for row, history in zip(logits, histories, strict=True):
        seen = torch.tensor(sorted(set(history)), dtype=torch.long, device=logits.device)
        scores = row[seen]
        row[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
        if not n:
            continue
        ids = set(banned(history, n)) - stop
        if len(ids) < len(row):  # where every id is banned, none is
            row[list(ids)] = -math.inf
    return logits


def draw(logits: Tensor, uniform: Tensor, settings: SamplingSettings) -> Tensor:
    """An id for each row of logits (B, V), by inverting the cumulative distribution at uniform
    (B, 1): temperature, then top-k, then top-p; the likeliest id stays whatever top_p is."""
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() - logits.amax(dim=-1, keepdim=True)  # a tiny temperature overflows
    logits = logits / max(settings.temperature, 1e-30)
    order = None
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
    if order is not None:
        choice = order.gather(-1, choice)
    return choice.squeeze(-1)


def uniforms(seed: int, row: int, count: int) -> Tensor:
    """The uniform numbers that a row draws with, whatever stands beside it in a batch."""
    generator = torch.Generator().manual_seed(derive_seed(seed, row))
    return torch.rand(count, generator=generator)


def prefill(
    model: Transformer,
    histories: list[list[int]],
    dtype: torch.dtype,
) -> tuple[Tensor, KVCache]:
    """Run prompts of any lengths through the model: logits (B, V) after each, and their cache."""
    lengths = [len(history) for history in histories]
    rows = [torch.tensor(history) for history in histories]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    cache = KVCache(model.config, len(histories), model.device, dtype, max(lengths))
    with without_cudnn():
        hidden = model.hidden(ids.to(model.device), cache, lengths)  # (B, T, d)
    hidden = hidden[range(len(histories)), [length - 1 for length in lengths]]
    return model.logits(hidden).float(), cache


@dataclass
class Slot:
    """A row under generation: which prompt it continues, its ids so far, how many it may draw, and
    how many it has drawn."""

    prompt: int
    history: list[int]
    most: int
    drawn: int = 0
    live: bool = True  # its text has not ended


class Decoder:
    """A batch of rows under generation: their cache, the logits after each, and the uniform numbers
    that each draws by, all on the device.

    room: most tokens that a row will hold.
    """

    def __init__(
        self,
        model: Transformer,
        rows: int,
        room: int,
        dtype: torch.dtype,
        compiled: bool = False,
    ):
        self.model = model
        self.dtype = dtype
        self.compiled = compiled
        self.half = max(1, model.config.seq_len // 2)  # what is dropped beyond the context
        self.memory: KVCache | None = None
        if compiled:
            rows = compiled_rows(rows)
            self.memory = self.borrow(rows, room)
            self.cache = self.memory.first(rows)
        else:
            self.cache = KVCache(model.config, rows, model.device, dtype, room)
        self.slots = [Slot(0, [], 0, live=False) for _ in range(rows)]
        self.logits = torch.zeros(rows, model.config.vocab_size, device=model.device)
        self.points = torch.zeros(rows, 1, device=model.device)
        self.places = torch.zeros(rows, 1, device=model.device, dtype=torch.long)  # in points
        self.positions: Tensor | None = None  # (B, 1), where the next ids will lie

    def borrow(self, rows: int, room: int) -> KVCache:
        """The memory that the model keeps, for captured graphs write to it; larger if need be."""
        kept, room = self.model.memory, self.end(room + self.model.config.n_sink)
        self.model.memory = None  # until `close`
        fits = kept is not None and len(kept.lengths) >= rows and kept.size >= room
        if not fits or kept.k[0].dtype != self.dtype:
            del kept  # frees it first
            kept = KVCache(self.model.config, rows, self.model.device, self.dtype, room)
        return kept

    def close(self) -> None:
        """Give back what it borrowed."""
        if self.memory is not None:
            self.model.memory = self.memory

    def end(self, length: int) -> int:
        """Where the keys end that a compiled step of rows of at most this length sees."""
        most = self.model.config.n_sink + self.model.config.seq_len
        return min(most, max(LEAST_END, 1 << (length - 1).bit_length()))

    def live(self) -> list[int]:
        return [row for row, slot in enumerate(self.slots) if slot.live]

    def begin(self, rows: list[int], slots: list[Slot], points: list[Tensor]) -> None:
        """Read the histories of new slots, which draw by `points` (most,) each."""
        widest = max(map(len, points))
        if widest > self.points.shape[1]:
            self.points = F.pad(self.points, (0, widest - self.points.shape[1]))
        laid = nn.utils.rnn.pad_sequence(points, batch_first=True)
        self.points[rows, :widest] = laid.to(self.points.device)
        self.places[rows] = 0
        self.read(rows, slots)

    def read(self, rows: list[int], slots: list[Slot]) -> None:
        """Begin `rows` with the histories of these slots; equal ones are read once, and of those
        longer than the context the newest half."""
        fits = self.model.config.seq_len
        windows = []
        for slot in slots:
            text = slot.history
            windows.append(tuple(text if len(text) <= fits else text[-self.half :]))
        unique = {window: i for i, window in enumerate(dict.fromkeys(windows))}
        logits, cache = prefill(self.model, [list(window) for window in unique], self.dtype)
        picks = [unique[window] for window in windows]
        self.cache.put(rows, cache, picks)
        self.logits[rows] = logits[picks]
        self.positions = None
        for row, slot in zip(rows, slots, strict=True):
            self.slots[row] = slot

    def keep(self, rows: list[int]) -> None:
        self.cache = self.cache.keep(rows)
        self.logits, self.points = self.logits[rows], self.points[rows]
        self.places, self.positions = self.places[rows], None
        self.slots = [self.slots[row] for row in rows]

    def run(
        self,
        settings: SamplingSettings,
        stop: frozenset[int],
        scored: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Draw ids (n, B) for each row, several before any is looked at where looking waits for the
        device, and with `scored` their log-probabilities; the last ids are still to be read."""
        drawn, logps = [], []
        for _ in range(self.ahead(settings)):
            if drawn:
                self.step(drawn[-1].unsqueeze(1))
            drawn.append(self.draw(settings, stop))
            if scored:
                logps.append(self.logps(drawn[-1], settings.temperature))
            self.count()
        return torch.stack(drawn), torch.stack(logps) if scored else None

    def count(self) -> None:
        """Each row has used one of its numbers; those that have ended may have none left."""
        self.places += 1
        self.places.clamp_(max=self.points.shape[1] - 1)

    def ahead(self, settings: SamplingSettings) -> int:
        """How many ids to draw before they are looked at: no row may pass the end of its cache, and
        penalties need to know what was drawn."""
        if not on_cuda(self.logits) or settings.penalises:
            return 1
        lengths, live = self.cache.lengths, self.live()
        for row, length in enumerate(lengths):
            if not self.slots[row].live and length + LOOK_EVERY > self.cache.size:
                lengths[row], self.positions = self.model.config.n_sink, None
        left = max(self.slots[row].most - self.slots[row].drawn for row in live)
        room = min(self.cache.size - lengths[row] for row in live)
        return max(1, min(LOOK_EVERY, left, room))

    def push(self, ids: Tensor) -> None:
        """Compute the logits after one more id (B,) of each live row, which its history ends with;
        others stand still."""
        lengths = self.cache.lengths
        live = set(self.live())
        full = {row for row, length in enumerate(lengths) if length >= self.cache.size}
        if full:
            self.positions = None
        if full & live and self.model.sinks is not None:
            unit = self.model.cos[0]  # YaRN's tables are scaled
            cos, sin = self.model.cos[self.half] / unit, self.model.sin[self.half] / unit
            self.cache.forget(sorted(full & live), self.half, cos, sin)
            full -= live
        for row in full:
            lengths[row] = self.model.config.n_sink
        if live - full:
            self.step(ids.unsqueeze(1))
        if again := sorted(full & live):
            self.read(again, [self.slots[row] for row in again])

    def step(self, ids: Tensor) -> None:
        """The logits after ids (B, 1), none of whose rows is full."""
        model, cache = self.model, self.cache
        if not self.compiled:
            with without_cudnn():
                self.logits = model(ids, cache)[:, -1].float()
            return
        if self.positions is None:
            self.positions = cache.positions(1)
        step = compiled_once(
            Transformer.next_logits,  # on CUDA captured as one graph
            mode="reduce-overhead" if on_cuda(ids) else "default",
        )
        with without_cudnn():
            logits = step(model, ids, self.positions, cache, self.end(max(cache.lengths) + 1))
        self.logits.copy_(logits)  # the next step writes to the same place
        self.positions += 1
        cache.lengths = [length + 1 for length in cache.lengths]

    def shrink(self) -> None:
        """Drop the rows that have ended; compiled, to half of the rows or not at all, for each
        size is compiled."""
        kept = self.live()
        if self.compiled:
            half = len(self.slots) // 2
            if len(kept) > half or half < LEAST_ROWS:
                return
            idle = [row for row in range(len(self.slots)) if row not in kept]
            kept += idle[: half - len(kept)]
        self.keep(kept)

    def draw(
        self,
        settings: SamplingSettings,
        stop: frozenset[int],
        rows: list[int] | None = None,
    ) -> Tensor:
        """The next id of each row, or of these (n,); of those that have ended an arbitrary one."""
        logits, points, places, slots = self.logits, self.points, self.places, self.slots
        if rows is not None:
            logits, points, places = logits[rows], points[rows], places[rows]
            slots = [slots[row] for row in rows]
        if settings.penalises:
            histories = [slot.history for slot in slots]
            logits = penalise(logits.clone(), histories, settings, stop)
        return draw(logits, points.gather(1, places), settings)

    def logps(self, tokens: Tensor, temperature: float) -> Tensor:
        """The log-probabilities (B,) of these next ids, without top-k, top-p and penalties."""
        scores = self.logits / temperature
        chosen = scores.gather(1, tokens.unsqueeze(1)).squeeze(1)
        return chosen - scores.logsumexp(1)


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    settings: SamplingSettings,
    seed: int,
    stop: frozenset[int] = frozenset(),
    dtype: torch.dtype = torch.float32,
    numbers: Sequence[int] | None = None,
    at_once: int = 0,
    compiled: bool = False,
    logps: list[list[float]] | None = None,
    follow: Callable[[list[tuple[int, list[int]]]], list[list[int] | None]] | None = None,
) -> Iterator[tuple[int, int]]:
    """Continue each prompt; yields (row, id) as ids are drawn, a stop id included.

    At most `at_once` rows are generated together (0: all); as rows end, waiting ones take their
    places. A row draws by the seed and its number, by default its place: in fp32 the same ids alone
    as in any batch, while in bf16 the size of a batch changes the rounding of matmuls.
    Beyond the context the oldest half is dropped. `logps` takes, for each prompt, the
    log-probability of each id at the sampling temperature. Under autocast a model of lower_weights
    is faster. `follow` is told the rows that drew a stop id, and all ids of each; what it gives for
    a row is read behind these, and the row draws on; None ends it.
    """
    most, context = settings.max_new_tokens, model.config.seq_len
    numbers = numbers or range(len(prompts))
    texts = [list(prompt) for prompt in prompts]
    drawn_by = [0] * len(prompts)
    waiting = deque(range(len(prompts)))
    rows = min(at_once or len(prompts), len(prompts))
    room = min(context, max(map(len, prompts)) + most)
    if follow:
        room = context
    with contextlib.closing(Decoder(model, rows, room, dtype, compiled)) as decoder:
        while waiting or decoder.live():
            idle = [row for row, slot in enumerate(decoder.slots) if not slot.live]
            if waiting:
                idle = idle[: rows - len(decoder.live())]  # a compiled batch has more of them
            if idle and len(idle) >= DROP_WHEN * min(rows, len(decoder.slots)):
                if waiting:
                    idle = idle[: len(waiting)]
                    begun = [waiting.popleft() for _ in idle]
                    slots, points = [], []
                    for row in begun:
                        left = most - drawn_by[row]
                        if follow:  # of what is learned from, nothing is dropped
                            left = max(1, min(left, context - len(texts[row])))
                        slots.append(Slot(row, texts[row], left))
                        points.append(uniforms(seed, numbers[row], most)[drawn_by[row] :][:left])
                    decoder.begin(idle, slots, points)
                else:
                    decoder.shrink()

            drawn, scores = decoder.run(settings, stop, logps is not None)
            found = [[]] * len(drawn) if scores is None else scores.tolist()
            ended = []
            for tokens, scored in zip(drawn.tolist(), found, strict=True):
                for row in decoder.live():
                    slot, token = decoder.slots[row], tokens[row]
                    slot.drawn += 1
                    slot.history.append(token)
                    drawn_by[slot.prompt] += 1
                    if scored:
                        logps[slot.prompt].append(scored[row])
                    yield slot.prompt, token
                    if token in stop or slot.drawn == slot.most:
                        slot.live = False
                        ended.append((slot.prompt, slot.history, token in stop))
            if decoder.live():
                decoder.push(drawn[-1])
            stopped = [(row, ids) for row, ids, by_itself in ended if by_itself]
            if follow and stopped:
                for (row, ids), more in zip(stopped, follow(stopped), strict=True):
                    if more and drawn_by[row] < most and len(ids) + len(more) < context:
                        texts[row] = ids + more
                        waiting.append(row)


class Followed(typing.Protocol):
    """What follows on texts that ended, as `generate` asks it, and can begin anew."""

    def restart(self) -> None: ...

    def __call__(self, ended: list[tuple[int, list[int]]]) -> list[list[int] | None]: ...


def complete(
    model: Transformer,
    prompts: list[list[int]],
    settings: SamplingSettings,
    seed: int,
    stop: frozenset[int] = frozenset(),
    dtype: torch.dtype = torch.float32,
    numbers: Sequence[int] | None = None,
    at_once: int = 0,
    compiled: bool = False,
    logps: list[list[float]] | None = None,
    follow: Followed | None = None,
) -> list[list[int]]:
    """The ids that `generate` draws for each prompt; where memory runs out, with half as many rows
    at once."""
    at_once = min(at_once or len(prompts), len(prompts))
    while True:
        rows: list[list[int]] = [[] for _ in prompts]
        drawn = generate(
            model, prompts, settings, seed, stop, dtype, numbers, at_once, compiled, logps, follow
        )
        try:
            for row, token in drawn:
                rows[row].append(token)
            return rows
        except (MemoryError, RuntimeError) as fault:  # torch.OutOfMemoryError is one
            if at_once < 2 or not out_of_memory(fault):
                raise
        at_once //= 2
        for one in logps or ():
            one.clear()
        if follow:
            follow.restart()
        free_memory(model.tok_emb.weight.device)
        say(f"memory ran out: generating {at_once} rows at once")


@dataclass(eq=False)
class Generation:
    """One text in a running batch: its prompt's ids, how it is sampled, and what was drawn."""

    ids: list[int]
    sampling: SamplingSettings
    seed: int
    number: int = 0  # its own among those of one seed
    stop: frozenset[int] = frozenset()
    likeliest: int = 0  # so many alternatives are told with each id
    drawn: int = 0
    ended: bool = False


class Drawn(typing.NamedTuple):
    """An id that a text drew, its log-probability, and the likeliest (id, log-probability)."""

    token: int
    logp: float
    likeliest: list[tuple[int, float]]


class RunningBatch:
    """Texts that are generated together, which join and leave between two steps. In fp32 each draws
    the same ids as alone, but for draws within rounding of the border between two ids. The batch
    grows and shrinks by halves with the texts in it."""

    def __init__(
        self,
        model: Transformer,
        most: int,
        dtype: torch.dtype,
        compiled: bool = False,
    ):
        self.model = model
        self.most = most
        self.dtype = dtype
        self.compiled = compiled
        if compiled:
            self.sized(most).close()  # whose memory all sizes share
        self.decoder = self.sized(1)
        self.rows: list[Generation | None] = [None]

    def sized(self, rows: int) -> Decoder:
        room = self.model.config.seq_len
        return Decoder(self.model, rows, room, self.dtype, self.compiled)

    def live(self) -> list[int]:
        return [row for row, generation in enumerate(self.rows) if generation is not None]

    @property
    def full(self) -> bool:
        return len(self.live()) >= self.most

    @torch.inference_mode()
    def resize(self, rows: int) -> None:
        """A batch of so many rows, with the texts that are in this one."""
        old, kept = self.decoder, self.live()
        old.close()
        self.decoder = self.sized(rows)
        rows = len(self.decoder.slots)
        places = list(range(len(kept)))
        if kept:
            self.decoder.cache.put(places, old.cache, kept)
            self.decoder.logits[places] = old.logits[kept]
            self.decoder.points = old.points.new_zeros(rows, old.points.shape[1])
            self.decoder.points[places] = old.points[kept]
            self.decoder.places[places] = old.places[kept]
        for place, row in enumerate(kept):
            self.decoder.slots[place] = old.slots[row]
        self.rows = [self.rows[row] for row in kept] + [None] * (rows - len(kept))

    @torch.inference_mode()
    def join(self, generation: Generation) -> None:
        """Read a text's prompt and take it in; the batch must not be full."""
        if None not in self.rows:
            self.resize(min(self.most, 2 * len(self.rows)))
        row = self.rows.index(None)
        most = generation.sampling.max_new_tokens
        points = uniforms(generation.seed, generation.number, most)
        self.decoder.begin([row], [Slot(0, list(generation.ids), most)], [points])
        self.rows[row] = generation

    def leave(self, generation: Generation) -> None:
        """Free the row of a text, if it has one."""
        if generation in self.rows:
            row = self.rows.index(generation)
            self.rows[row] = None
            self.decoder.slots[row].live = False
        half = len(self.rows) // 2
        smaller = compiled_rows(half) < len(self.rows) if self.compiled else half > 0
        if smaller and len(self.live()) <= half // 2:
            self.resize(half)

    @torch.inference_mode()
    def step(self) -> list[tuple[Generation, Drawn]]:
        """Draw an id for each text; those that end leave."""
        decoder = self.decoder
        alike: dict[tuple, list[int]] = {}
        for row in self.live():
            generation = self.rows[row]
            key = (*astuple(generation.sampling)[1:], generation.stop)  # all but how many ids
            alike.setdefault(key, []).append(row)
        tokens = [0] * len(self.rows)
        for rows in alike.values():
            generation = self.rows[rows[0]]
            drawn = decoder.draw(generation.sampling, generation.stop, rows)
            for row, token in zip(rows, drawn.tolist(), strict=True):
                tokens[row] = token
        decoder.count()
        return self.push(tokens)

    def push(self, tokens: list[int]) -> list[tuple[Generation, Drawn]]:
        """Tell what was drawn, let go of what has ended, and read the rest."""
        decoder, found = self.decoder, []
        live = self.live()
        logps = decoder.logits[live].log_softmax(-1)
        picks = torch.tensor([[tokens[row]] for row in live], device=logps.device)
        chosen = logps.gather(1, picks).squeeze(1).tolist()
        ended = []
        for place, row in enumerate(live):
            generation = self.rows[row]
            best = []
            if generation.likeliest:
                values, ids = logps[place].topk(generation.likeliest)
                best = list(zip(ids.tolist(), values.tolist(), strict=True))
            found.append((generation, Drawn(tokens[row], chosen[place], best)))
            generation.drawn += 1
            decoder.slots[row].drawn += 1
            decoder.slots[row].history.append(tokens[row])
            whole = generation.drawn >= generation.sampling.max_new_tokens
            generation.ended = whole or tokens[row] in generation.stop
            if generation.ended:
                ended.append(generation)
                decoder.slots[row].live = False
        if decoder.live():
            decoder.push(torch.tensor(tokens, device=decoder.logits.device))
        for generation in ended:
            self.leave(generation)
        return found

    def close(self) -> None:
        self.decoder.close()


# ==================================================================================================
# Losses: tensors in, tensors out
# ==================================================================================================

LOSS_ROWS = 4096  # positions whose logits stand in CUDA's memory at a time


def by_parts(work: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    """work(hidden (N, d), targets (N,)) of (B, T, d) and (B, T), joined in its last dimension.

    The result may be 0 where targets are IGNORE: an eager CPU leaves those positions out. On CUDA
    the work is done in parts, again in the backward pass, so that the logits are never in memory
    as a whole.
    """
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    if hidden.device.type == "cpu" and not on_cuda(hidden):
        if torch.compiler.is_compiling() or (targets != IGNORE).all():
            return work(hidden, targets)
        kept = targets != IGNORE
        found = work(hidden[kept], targets[kept])
        whole = found.new_zeros(*found.shape[:-1], len(targets))
        return whole.masked_scatter(kept, found)
    if len(targets) <= LOSS_ROWS:
        return work(hidden, targets)
    pieces = zip(hidden.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True)
    return torch.cat([recompute(work, *piece, use_reentrant=False) for piece in pieces], -1)


def token_losses(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    z_loss: float = 0.0,
) -> Tensor:
    """Cross-entropy (N,) in nats of targets (B, T), 0 where IGNOREd; head: hidden to logits."""

    def work(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head(hidden).float()
        losses = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
        if z_loss:  # Chowdhery et al. 2022 (PaLM), section 5
            losses = losses + z_loss * logits.logsumexp(-1).square() * (targets != IGNORE)
        return losses

    return by_parts(work, hidden, targets)


def hidden_and_aux_loss(model: Transformer, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Final hidden states (B, T, d) and, in training, the experts' auxiliary loss, or else 0.

    Padding has no part in it: what stands behind the last target of a row.
    """
    counted = None
    if model.config.n_expert:
        known = (targets != IGNORE).int()
        counted = known.flip(1).cummax(1).values.flip(1) > 0
    hidden, aux_loss = model.hidden_and_aux_loss(ids, counted=counted)
    if aux_loss is None or not model.training:
        aux_loss = hidden.new_zeros(())
    return hidden, aux_loss


def pretrain_loss(model: Transformer, ids: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """Summed cross-entropy of a micro-batch (B, T), in nats; in training with auxiliary losses."""
    hidden, aux_loss = hidden_and_aux_loss(model, ids, targets)
    if not model.training:
        z_loss = 0.0
    losses = token_losses(hidden, model.logits, targets, z_loss)
    return losses.sum() + aux_loss * (targets != IGNORE).sum()


DISTILL_METRICS = ("loss", "divergence", "cross_entropy")


def divergence(kind: str, theirs: Tensor, ours: Tensor) -> Tensor:
    """Divergences (N,) in nats of log-probs (N, V) of teacher and student (Agarwal et al. 2024,
    GKD, eqs. 1 and 2, the latter at 1/2)."""
    if kind == "reverse":
        theirs, ours = ours, theirs
    if kind == "jsd":
        mean = torch.logaddexp(theirs, ours) - math.log(2)
        both = (F.kl_div(mean, one, log_target=True, reduction="none") for one in (theirs, ours))
        return 0.5 * sum(both).sum(-1)
    return F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)


def distill_loss(
    model: Transformer,
    ids: Tensor,
    targets: Tensor,
    teacher: Transformer,
    settings: DistillSettings,
) -> Tensor:
    """DISTILL_METRICS summed over the targets of (B, T). Gradients at a temperature T are T**2
    times as large, to be as those at 1 (Hinton et al. 2015, section 2)."""
    hidden, aux_loss = hidden_and_aux_loss(model, ids, targets)
    with torch.no_grad():
        theirs = teacher.hidden(ids)
    width, size = hidden.shape[-1], min(model.config.vocab_size, teacher.config.vocab_size)
    weight = settings.text_weight

    def work(both: Tensor, targets: Tensor) -> Tensor:
        logits = model.logits(both[:, :width]).float()
        with torch.no_grad():  # what a model has beyond the tokenizer's ids is never meant
            wanted = teacher.logits(both[:, width:]).float()[:, :size] / settings.soften
        ours = (logits[:, :size] / settings.soften).log_softmax(-1)
        apart = divergence(settings.measure, wanted.log_softmax(-1), ours)
        apart = settings.soften**2 * apart * (targets != IGNORE)
        known = logits if weight else logits.detach()
        text = F.cross_entropy(known, targets, ignore_index=IGNORE, reduction="none")
        return torch.stack((apart, text))

    apart, text = by_parts(work, torch.cat((hidden, theirs.to(hidden.dtype)), -1), targets).sum(-1)
    loss = apart + aux_loss * (targets != IGNORE).sum()
    if weight:
        loss = loss + weight * text
    return torch.stack((loss, apart.detach(), text.detach()))


def sequence_logps(model: Transformer, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed log-probability of each row's targets (B,), and the side loss a row."""
    hidden, aux_loss = hidden_and_aux_loss(model, ids, targets)
    return -token_losses(hidden, model.logits, targets).view(targets.shape).sum(1), aux_loss


def gap(pairs: Tensor) -> Tensor:  # (B, 2) -> (B,): the chosen less the rejected
    return pairs[:, 0] - pairs[:, 1]


def smoothed(margin: Tensor, share: float) -> Tensor:
    """Cross-entropy of a logit where a `share` of the labels is thought to be wrong."""
    return -F.logsigmoid(margin) * (1 - share) - F.logsigmoid(-margin) * share


# Losses (B,) of pairs: their rewards (B, 2), the policy's mean log-probs per token (B, 2), settings


def sigmoid_loss(rewards: Tensor, means: Tensor, s: DpoSettings) -> Tensor:
    """Rafailov et al. 2023 (DPO), eq. 7."""
    return smoothed(gap(rewards), s.label_smoothing)


def ipo_loss(rewards: Tensor, means: Tensor, s: DpoSettings) -> Tensor:
    """Azar et al. 2023, eq. 17."""
    return (gap(rewards) / s.beta - 0.5 / s.beta).square()


def hinge_loss(rewards: Tensor, means: Tensor, s: DpoSettings) -> Tensor:
    """Zhao et al. 2023 (SLiC-HF)."""
    return F.relu(1 - gap(rewards))


def robust_loss(rewards: Tensor, means: Tensor, s: DpoSettings) -> Tensor:
    """Chowdhury et al. 2024, eq. 10: unbiased under flipped labels; the weights add up to 1."""
    share = s.label_smoothing
    return smoothed(gap(rewards), -share / (1 - 2 * share))


def apo_zero_loss(rewards: Tensor, means: Tensor, s: DpoSettings) -> Tensor:
    """D'Oosterlinck et al. 2024, section 3: the chosen up and the rejected down."""
    chosen, rejected = rewards.sigmoid().unbind(1)
    return 1 - chosen + rejected


def apo_down_loss(rewards: Tensor, means: Tensor, s: DpoSettings) -> Tensor:
    """The same, section 3: both down, the rejected further."""
    chosen = rewards[:, 0].sigmoid()
    return chosen + 1 - gap(rewards).sigmoid()


def simpo_loss(rewards: Tensor, means: Tensor, s: DpoSettings) -> Tensor:
    """Meng et al. 2024, eq. 6."""
    return smoothed(gap(rewards) - s.simpo_gamma, s.label_smoothing)


def orpo_loss(rewards: Tensor, means: Tensor, s: DpoSettings) -> Tensor:
    """Likelihood of the chosen and its odds over the rejected (Hong et al. 2024, eq. 6)."""
    odds = means - torch.log1p(-means.clamp(max=-1e-6).exp())
    return -means[:, 0] - s.beta * F.logsigmoid(gap(odds))


PREFERENCE_LOSSES = {
    "sigmoid": sigmoid_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "robust": robust_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "simpo": simpo_loss,
    "orpo": orpo_loss,
}

BY_LENGTH = ("ipo", "simpo", "orpo")  # rewards are means a token (Meng et al. 2024, section 2.2)

REFERENCE_FREE = ("simpo", "orpo")

PAIR_METRICS = ("loss", "margin", "accuracy", "chosen_logp", "rejected_logp", "length_bias")

BINS = 10  # of calibration

JUDGE_METRICS = ("loss", "margin", "accuracy") + ("bin",) * BINS


def preference_loss(
    model: Transformer,
    ids: Tensor,
    targets: Tensor,
    reference: Tensor,
    settings: DpoSettings,
) -> Tensor:
    """PAIR_METRICS summed over pairs: ids, targets (2B, T), chosen and rejected in turn; reference:
    log-probs (B, 2). length_bias: by how many tokens the answer of higher reward is longer."""
    logps, aux_loss = sequence_logps(model, ids, targets)
    policy = logps.view(-1, 2)
    lengths = (targets != IGNORE).sum(1).view(-1, 2)
    rewards = policy
    if settings.loss not in REFERENCE_FREE:
        rewards = rewards - reference
    if settings.loss in BY_LENGTH:
        rewards = rewards / lengths
    rewards = settings.beta * rewards
    losses = PREFERENCE_LOSSES[settings.loss](rewards, policy / lengths, settings) + aux_loss

    margin = gap(rewards.detach())
    chosen, rejected = policy.detach().unbind(1)
    bias = margin.sign() * gap(lengths)
    metrics = (losses, margin, (margin > 0).float(), chosen, rejected, bias)
    return torch.stack([metric.sum() for metric in metrics])


def reward_scores(model: Transformer, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The scalar head at the end of each row's last target (B,), and the side loss a row."""
    hidden, aux_loss = hidden_and_aux_loss(model, ids, targets)
    rows, places = (torch.arange(n, device=ids.device) for n in ids.shape)
    ends = ((targets != IGNORE) * places).amax(1) + 1
    return model.score(hidden[rows, ends]).squeeze(-1).float(), aux_loss


def judge_metrics(logits: Tensor, aux_loss: Tensor | float) -> Tensor:
    """JUDGE_METRICS summed, of logits (B,) in favour of what is right. A bin holds the confidence
    less the success of the judgements of such confidence (Guo et al. 2017, eq. 3)."""
    loss = (aux_loss - F.logsigmoid(logits)).sum()
    logits = logits.detach()
    right = (logits > 0).float()
    confidence = logits.abs().sigmoid()
    bins = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    error = torch.zeros(BINS, device=logits.device).scatter_add_(0, bins, confidence - right)
    return torch.cat((torch.stack((loss, logits.sum(), right.sum())), error))


def judge_loss(model: Transformer, ids: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
    """JUDGE_METRICS of pairs, chosen and rejected in turn (Bradley and Terry 1952), or of single
    answers with labels (B, 1): a verifier (Cobbe et al. 2021)."""
    scores, aux_loss = reward_scores(model, ids, targets)
    if len(scores) > len(labels):  # pairs
        return judge_metrics(gap(scores.view(-1, 2)), aux_loss)
    signs = 2 * labels.squeeze(1) - 1
    return judge_metrics(scores * signs, aux_loss)


STD_FLOOR = 1e-4  # added to a standard deviation before dividing by it

POLICY_METRICS = ("loss", "kl", "entropy", "clip_low", "clip_high", "ratio_most", "ratio_least")


LOG_RATIO_MOST = 20.0  # a larger one is cut, as its exponential would overflow


def group_advantages(rewards: Tensor, by_std: bool) -> Tensor:
    """Rewards (P, G) less their group's mean (Liu et al. 2025, Dr. GRPO), by_std divided by its
    standard deviation (Shao et al. 2024, section 4.1.2)."""
    centred = rewards - rewards.mean(1, keepdim=True)
    if not by_std:
        return centred
    return centred / (rewards.std(1, keepdim=True) + STD_FLOOR)


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


def hidden_of_completions(
    model: Transformer,
    ids: Tensor,
    targets: Tensor,
    prompts: Tensor | None,
    owners: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`hidden_and_aux_loss`, of ids that may continue prompts which they share."""
    if prompts is None:
        return hidden_and_aux_loss(model, ids, targets)
    hidden = model.hidden_behind(prompts, owners, ids)
    return hidden, hidden.new_zeros(())


def completion_logps(
    model: Transformer,
    hidden: Tensor,
    targets: Tensor,
    temperature: Tensor,
    spread: bool = False,
) -> Tensor:
    """Log-probs and entropies (2, B, T), 0 where ignored; entropies have a gradient only with
    `spread`."""

    def work(hidden: Tensor, targets: Tensor) -> Tensor:
        logps = (model.logits(hidden).float() / temperature).log_softmax(-1)  # (N, V)
        chosen = logps.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        whole = logps if spread else logps.detach()
        return torch.stack((chosen, -(whole.exp() * whole).sum(-1)))

    return by_parts(work, hidden, targets).view(2, *targets.shape) * (targets != IGNORE)


def policy_loss(
    model: Transformer,
    ids: Tensor,
    targets: Tensor,
    old: Tensor,
    advantages: Tensor,
    reference: Tensor,
    importance: Tensor,
    weights: Tensor,
    scalars: Tensor,
    prompts: Tensor | None = None,
    owners: Tensor | None = None,
    *,
    settings: PolicySettings,
) -> Tensor:
    """POLICY_METRICS of completions, and behind them the log-probabilities (B * T,).

    ids, targets, old and reference log-probs, advantages, importance: (B, T). weights (B, 3): what
    a token counts in the policy loss, as plain log-likelihood, and in the mean entropy. scalars
    (B, 3), the same in each row: sampling temperature, entropy bonus, and 1 where the policy is
    still the one that sampled, so that every ratio is 1, or else 0. prompts (P, S) and owners (B,):
    what the ids continue, where they do not hold it themselves (Transformer.hidden_behind).
    The loss is to be divided by the step's rows; metrics are sums over tokens, and the extremes.
    """
    temperature, bonus, unmoved = scalars[0]
    hidden, aux_loss = hidden_of_completions(model, ids, targets, prompts, owners)
    logps, entropy = completion_logps(
        model, hidden, targets, temperature, settings.entropy_target > 0
    )
    mask = targets != IGNORE
    old = torch.where(unmoved > 0, logps.detach(), old)
    log_ratio = torch.where(mask, logps - old, 0.0).clamp(-LOG_RATIO_MOST, LOG_RATIO_MOST)
    if settings.ratio == "sequence":  # Zheng et al. 2025 (GSPO), eq. 7
        log_ratio = (log_ratio.sum(1) / mask.sum(1).clamp(min=1)).unsqueeze(1).expand_as(logps)
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    if settings.ratio == "weight":  # MiniMax 2025 (CISPO), eq. 4
        gain = bounded.detach() * advantages * logps
    else:  # Schulman et al. 2017, eq. 7
        gain = torch.minimum(ratio * advantages, bounded * advantages)
    if settings.clip_dual:  # Ye et al. 2020, eq. 5
        floor = settings.clip_dual * advantages
        gain = torch.where(advantages < 0, torch.maximum(gain, floor), gain)

    apart = torch.where(mask, reference - logps, 0.0).clamp(-LOG_RATIO_MOST, LOG_RATIO_MOST)
    kl = apart.exp() - apart - 1  # k3 (Schulman 2020, "Approximating KL divergence")
    loss = -gain * importance
    if settings.kl and not settings.kl_in_reward:
        loss = loss + settings.kl * kl
    policy, likelihood, mean = weights.unsqueeze(2).unbind(1)  # (B, 1) each
    loss = loss * policy - logps * likelihood - bonus * entropy * mean
    loss = (mask * loss).sum() + aux_loss * len(ids)

    low = (ratio < 1 - settings.clip_low) & (advantages < 0) & mask
    high = (ratio > 1 + settings.clip_high) & (advantages > 0) & mask
    metrics = kl.sum(), entropy.sum(), low.sum(), high.sum(), ratio.max(), ratio.min()
    sums = torch.stack([loss, *(metric.detach().float() for metric in metrics)])
    return torch.cat((sums, logps.detach().flatten()))


def token_values(
    critic: Transformer,
    ids: Tensor,
    targets: Tensor,
    prompts: Tensor | None = None,
    owners: Tensor | None = None,
) -> Tensor:
    """What a value model expects before each target (B, T)."""
    hidden, _ = hidden_of_completions(critic, ids, targets, prompts, owners)
    return critic.score(hidden).squeeze(-1).float()


def value_loss(
    critic: Transformer,
    ids: Tensor,
    targets: Tensor,
    old: Tensor,
    returns: Tensor,
    prompts: Tensor | None = None,
    owners: Tensor | None = None,
    *,
    clip: float,
) -> Tensor:
    """Half the squared error of a micro-batch's values, which does not fall where they move from
    the old ones (B, T) by more than `clip` (0: off); and how many tokens that clips."""
    values = token_values(critic, ids, targets, prompts, owners)
    bounded = values
    if clip:
        bounded = old + (values - old).clamp(-clip, clip)
    errors = (values - returns).square()
    clipped = (bounded - returns).square()
    mask = targets != IGNORE
    loss = 0.5 * (mask * torch.maximum(errors, clipped)).sum()
    return torch.stack([loss, ((clipped > errors) & mask).sum()])


class Objective(nn.Module):
    """A model and its loss as one module, so that compile, DDP and FSDP wrap every gradient; the
    loss is a scalar, or a vector of sums that begins with the one to be trained on."""

    def __init__(self, model: Transformer, loss: Callable[..., Tensor]):
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, *batch: Tensor, work: Callable[..., Tensor] | None = None) -> Tensor:
        """The loss of a batch, or what another `work` on the model makes of it."""
        found = (work or self.loss)(self.model, *batch).reshape(-1)
        return found.clone()  # FSDP wants no view


# ==================================================================================================
# Optimisers: parameter groups and schedules
# ==================================================================================================

# How much of the way from its peak to min_lr a rate has come, by the elapsed part of its decay
DESCENTS = {
    "cosine": lambda elapsed: 0.5 * (1 - math.cos(math.pi * elapsed)),
    "wsd": lambda elapsed: elapsed,  # Hu et al. 2024, MiniCPM
    "wsd_sqrt": math.sqrt,  # Hagele et al. 2024, section 3
    "constant": lambda elapsed: 0.0,
}

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of Muon's authors

NEWTON_SCHULZ_STEPS = 5

MUON_AT_ONCE = 1 << 26  # numbers orthogonalised together

MUON_SCALES = {
    "rms": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "shape": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
}


def decay_begin(settings: OptimSettings, max_steps: int) -> float:
    """The step behind which the learning rate falls from its peak."""
    if settings.schedule.startswith("wsd"):
        return max(settings.warmup_steps, max_steps * (1 - settings.decay_share))
    return settings.warmup_steps


STABLE = "ckpt_stable.pt"  # of the last step before wsd's learning rate falls


def lr_scale(step: int, settings: OptimSettings, max_steps: int) -> float:
    """The learning rate of a step, counted from 0, as a fraction of its peak: warm-up, schedule.

    cosine decays from the end of the warm-up, wsd and wsd_sqrt over the last decay_share of the
    run; inverse_sqrt falls with the root of the step (Vaswani et al. 2017).
    """
    warm, name = settings.warmup_steps, settings.schedule
    if step < warm:
        return (step + 1) / warm
    if name == "inverse_sqrt":
        return math.sqrt(max(1, warm) / max(1, step))
    begin = decay_begin(settings, max_steps)
    elapsed = min(1.0, max(0.0, (step - begin) / max(1e-9, max_steps - begin)))
    return 1 - (1 - settings.min_lr) * DESCENTS[name](elapsed)


def newton_schulz(x: Tensor) -> Tensor:
    """Semi-orthogonal matrices near wide ones (n, rows, columns): singular values near 1."""
    a, b, c = NEWTON_SCHULZ
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def orthogonal_dtype(tensor: Tensor) -> torch.dtype:
    """The precision that matrices are orthogonalised in: bf16, but fp32 on a CPU without it."""
    return torch.bfloat16 if on_cuda(tensor) or bf16_cpu() else torch.float32


def orthogonalise(matrices: Tensor, compiled: bool = False) -> Tensor:
    """Semi-orthogonal matrices near (n, rows, columns), by Newton-Schulz iteration (Jordan et al.
    2024)."""
    iterate = compiled_once(newton_schulz) if compiled else newton_schulz
    x = matrices.to(orthogonal_dtype(matrices))
    if x.shape[-2] > x.shape[-1]:
        return iterate(x.mT).mT.to(matrices.dtype)
    return iterate(x).to(matrices.dtype)


def rows_at(tensor: Tensor, rows: slice) -> Tensor:
    """The rows of a tensor, which is itself where they are all."""
    return tensor if rows == slice(0, len(tensor)) else tensor[rows]


class Matrix(typing.NamedTuple):
    """A matrix, or a tensor of experts, that Muon moves: some rows of a weight."""

    shape: torch.Size
    weight: Tensor  # what this rank has of it
    rows: slice  # which of its rows these are
    update: Tensor  # of the whole weight
    place: slice  # its rows in the weight

    def whole_update(self) -> Tensor:
        """Its update from all ranks, in the precision that it is orthogonalised in."""
        update = self.update
        if is_shard(update):
            update = whole(update.to(orthogonal_dtype(update)))
        return rows_at(update, self.place)


def matrix_of(weight: Tensor, update: Tensor, first: int, count: int) -> Matrix:
    """`count` rows of a weight from `first` on."""
    here = rows_of(weight)
    begin = min(max(here.start, first), first + count)
    end = max(begin, min(here.stop, first + count))
    own = rows_at(local(weight), slice(max(0, begin - here.start), max(0, end - here.start)))
    rows, place = slice(begin - first, end - first), slice(first, first + count)
    return Matrix(torch.Size((count, *weight.shape[1:])), own, rows, update, place)


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for hidden matrices (Jordan et al. 2024).

    As torch.optim.Muon, but with all matrices of a shape in one batch, of which each rank
    orthogonalises its share; in fp32 on CPUs without bf16 (where torch's would take minutes a
    step); and with a group's "rows" naming the parts of a fused projection that are matrices of
    their own.
    """

    def __init__(
        self,
        groups: list[dict],
        lr: float,
        weight_decay: float,
        momentum: float,
        scale: str,
        machine: Machine,
        compiled: bool = False,
    ):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(groups, {**defaults, "scale": scale, "rows": None})
        self.machine = machine
        self.compiled = compiled
        self.found_inf: Tensor | None = None  # as torch's fused optimisers: 1 skips the step

    @property
    def share(self) -> Tensor | float:
        """What a step does of itself: 0 or 1."""
        return 1.0 if self.found_inf is None else 1 - self.found_inf

    @torch.no_grad()
    def step(self) -> None:
        waiting = None
        for size, parts, updates in self.batches():
            found = self.begin(updates)
            if waiting:  # for the other ranks, while the next batch is computed
                self.move(*waiting)
            waiting = size, parts, found
        if waiting:
            self.move(*waiting)

    def begin(self, matrices: Tensor) -> Gathered:
        """Orthogonalise this rank's share of matrices (n, rows, columns), and send for the rest."""
        mine = self.machine.share_of(matrices).to(self.machine.device)
        return self.machine.gather(orthogonalise(mine, self.compiled), len(matrices))

    def move(self, size: float, parts: list[Matrix], found: Gathered) -> None:
        directions = found.wait().view(len(parts), *parts[0].shape)
        weights, own = [], []
        for part, direction in zip(parts, directions, strict=True):
            if len(part.weight):
                weights.append(part.weight)
                own.append(rows_at(direction, part.rows).to(part.weight))
        if weights:
            torch._foreach_add_(weights, own, alpha=-size)

    def batches(self) -> Iterator[tuple[float, list[Matrix], Tensor]]:
        """Matrices of one shape, by how much they are to move, and their updates (n, rows,
        columns), which are 0 in a step that is skipped."""
        for group in self.param_groups:
            for shape, parts in self.matrices(group).items():
                rows, columns = shape[-2:]
                if len(shape) > 2:  # experts are stored (in, out)
                    rows, columns = columns, rows
                size = group["lr"] * MUON_SCALES[group["scale"]](rows, columns)
                at_once = max(1, MUON_AT_ONCE // math.prod(shape))
                for i in range(0, len(parts), at_once):
                    some = parts[i : i + at_once]
                    updates = torch.stack([part.whole_update() for part in some]).flatten(0, -3)
                    if self.found_inf is not None:
                        updates *= self.share
                    yield size, some, updates

    def matrices(self, group: dict) -> dict[torch.Size, list[Matrix]]:
        """The matrices of a group, by shape; the weights are decayed."""
        shapes: dict[torch.Size, list[Matrix]] = {}
        kept = 1 - group["lr"] * group["weight_decay"] * self.share
        for weight in group["params"]:
            if weight.grad is None:
                continue
            update = self.momentum(weight, group["momentum"])
            local(weight).mul_(kept)
            first = 0
            for count in group["rows"] or (len(weight),):
                part = matrix_of(weight, update, first, count)
                shapes.setdefault(part.shape, []).append(part)
                first += count
        return shapes

    def momentum(self, weight: Tensor, beta: float) -> Tensor:
        """Nesterov momentum of a weight, in the memory of its gradient, which is used up."""
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        moving, gradient = local(state["momentum"]), local(weight.grad)
        if self.found_inf is not None:
            gradient.nan_to_num_(0.0, 0.0, 0.0)
        moving.lerp_(gradient, (1 - beta) * self.share)
        gradient.lerp_(moving, beta)
        return weight.grad


def parameter_kind(name: str, weight: nn.Parameter) -> str:
    """qkv, hidden (other matrices of the layers), head (with the routers), embedding, or vector."""
    if name.endswith(("tok_emb.weight", "sinks")):
        return "embedding"
    if weight.dim() < 2:
        return "vector"
    if "blocks." not in name or name.endswith("router.weight"):
        return "head"
    if name.endswith("qkv.weight"):
        return "qkv"
    return "hidden"


def split_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trained parameters by their kind."""
    kinds: dict[str, list[nn.Parameter]] = {
        "qkv": [],
        "hidden": [],
        "head": [],
        "embedding": [],
        "vector": [],
    }
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            kinds[parameter_kind(name, weight)].append(weight)
    return kinds


def muon_rate(width: int, scale: str) -> float:
    """Muon's peak learning rate for a model of that width: 0.02 for updates of spectral norm 1, as
    nanochat and modded-nanogpt have it at 768 to 1,280, which is 0.1 / sqrt(width) where updates
    have AdamW's size; sweeps at widths 64 to 384 agree (benchmarks/RESULTS.md)."""
    if scale == "shape":
        return 0.02
    return 0.1 / math.sqrt(width)


def adamw_rate(width: int, parameters: float, tokens: float) -> float:
    """AdamW's peak learning rate for the pretraining of so many parameters, without embedding and
    head, on so many tokens (Li et al. 2025, "Predictable Scale", eq. 1), which grows with the
    tokens beyond what has been tried: at most 3e-3 at a width of 576, as SmolLM2-135M has it, and
    in inverse proportion to the width (Yang et al. 2022), so 8.4e-4 at 2,048, where SmolLM-1.7B has
    5e-4. No width below 256 was swept."""
    return min(1.79 * parameters**-0.713 * tokens**0.307, 3e-3 * 576 / width)


def end_rates(init: str, steps: int) -> tuple[float, float]:
    """Learning rates of embedding and head, in parts of the matrices', by what they begin with:
    what the text says of them is disturbed little in a short run, and improved on in a long one
    (fitted on 50 to 1,000 steps, benchmarks/RESULTS.md)."""
    if init != "bigram":
        return 1.0, 1.0
    share = min(1.0, steps / 1000)
    return 2.0 * share**0.7, 0.5 * share**1.4


LARGEST_RATE = 5e-3  # of tuning

WARMUP = 0.05, 100  # of the steps, and steps at most, where no flag says it


def tuning_rate(width: int, kind: str, adapters: bool) -> float:
    """AdamW's peak learning rate for training a model further: 2e-5 at a width of 4,096 in sft, as
    Llama 2's and Zephyr's authors have it, and 3e-3 at 128 (benchmarks/RESULTS.md); preferences,
    rewards and a student's own answers a tenth of that; adapters ten times as much (Schulman et al.
    2025, "LoRA without regret")."""
    rate = 3e-3 * (128 / width) ** 1.45
    if kind not in ("sft", "distill", ON_TEXT):
        rate /= 10
    if adapters:
        rate *= 10
    return min(LARGEST_RATE, rate)


LARGE_ENDS = 0.2  # root mean square of weights, which few published embeddings reach

USUAL_ENDS = 0.04


def end_factor(weight: Tensor) -> float:
    """By how much an embedding or head learns faster when a model is trained further: where its
    numbers are large, as those of `begin_with_bigrams`, a rate moves them less."""
    size = float(weight.detach().float().square().mean().sqrt())
    if size <= LARGE_ENDS:
        return 1.0
    return size / USUAL_ENDS


CHOSEN_RATES = ("lr", "embed_lr", "head_lr", "warmup_steps")  # where no flag gives them


def with_rates(
    settings: OptimSettings,
    model: Transformer,
    kind: str,
    tokens: float,
    steps: int,
    adapters: bool = False,
    init: str = "normal",
) -> OptimSettings:
    """The settings with learning rates and a warm-up for what no flag gave. `kind`: the trainer;
    tokens, steps: of the run; `init`: what embedding and head begin with."""
    share, most = WARMUP
    config = model.config
    if kind == "train":
        rate = adamw_rate(config.d_model, parameter_counts(config)["blocks"], tokens)
        if settings.optimizer == "muon":
            rate = muon_rate(config.d_model, settings.muon_scale)
        parts = end_rates(init, steps)
    else:
        rate = tuning_rate(config.d_model, kind, adapters)
        parts = end_factor(model.tok_emb.weight), end_factor(model.lm_head.weight)
    lr = settings.lr or rate
    return replace(
        settings,
        lr=lr,
        embed_lr=settings.embed_lr or parts[0] * lr,
        head_lr=settings.head_lr or parts[1] * lr,
        warmup_steps=settings.warmup_steps or max(1, min(most, round(share * steps))),
    )


def kept_rates(optim: OptimSettings, given: OptimSettings, saved: dict | None) -> OptimSettings:
    """The rates that a run has begun with, where the flags of them are what they were."""
    args = saved["args"] if saved else {}
    known = args.get("rates")
    same = all(args.get(name) == getattr(given, name) for name in (*CHOSEN_RATES, "optimizer"))
    if not same or not isinstance(known, list) or len(known) != len(CHOSEN_RATES):
        return optim
    return replace(optim, **dict(zip(CHOSEN_RATES, known, strict=True)))


def make_optimizers(
    model: Transformer,
    settings: OptimSettings,
    machine: Machine,
    compiled: bool = False,
) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the layers' matrices and AdamW for the rest; a group's peak learning rate
    is its "peak"."""
    kinds = split_parameters(model)
    muon = settings.optimizer == "muon"
    decay = settings.weight_decay
    head, embedding = settings.head_lr or settings.lr, settings.embed_lr or settings.lr

    optimizers: list[torch.optim.Optimizer] = []
    groups = [{"params": kinds["head"], "weight_decay": decay, "peak": head}]
    if not muon:
        matrices = kinds["qkv"] + kinds["hidden"]
        groups.append({"params": matrices, "weight_decay": decay, "peak": settings.lr})
    groups += [
        {"params": kinds["embedding"], "weight_decay": 0.0, "peak": embedding},
        {"params": kinds["vector"], "weight_decay": 0.0, "peak": settings.lr},
    ]
    groups = [group for group in groups if group["params"]]
    if groups:
        betas = (settings.beta1, settings.beta2)
        fused = machine.device.type in ("cpu", "cuda")
        optimizers.append(torch.optim.AdamW(groups, lr=settings.lr, betas=betas, fused=fused))
    if muon:
        attn = model.blocks[0].attn
        rows = tuple(count * attn.D for count in (attn.H, attn.K, attn.K))
        peak = settings.muon_lr or settings.lr
        groups = [{"params": kinds["qkv"], "rows": rows}, {"params": kinds["hidden"]}]
        optimizers.append(
            Muon(
                [{**group, "peak": peak} for group in groups if group["params"]],
                peak,
                settings.weight_decay,
                settings.muon_momentum,
                settings.muon_scale,
                machine,
                compiled,
            )
        )
    return optimizers


class WeightCopy:
    """A copy of a model's trained weights, which can stand in for them."""

    def __init__(self, model: nn.Module, weights: list[Tensor] | None = None):
        self.model = model
        self.live = [w for w in model.parameters() if w.requires_grad]
        self.weights = []
        for live, start in zip(self.live, weights or self.live, strict=True):
            if isinstance(start, Tensor):
                start = start.detach()
            self.weights.append(shard_like(start, live.detach()))

    @contextlib.contextmanager
    def in_place(self):
        """The model computes with these weights inside the block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        for mine, live in zip(map(local, self.weights), map(local, self.live), strict=True):
            kept = live.clone()
            live.copy_(mine)
            mine.copy_(kept)
        reshard(self.model)


class EMA:
    """An exponential moving average of a model's weights, which can stand in for them."""

    def __init__(self, model: nn.Module, decay: float, weights: list[Tensor] | None):
        self.decay = decay
        self.copy = WeightCopy(model, weights)

    @property
    def weights(self) -> list[Tensor]:
        return self.copy.weights

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step `step`; the young average decays faster, so it has no bias."""
        decay = min(self.decay, step / (step + 9))
        averages, live = [*map(local, self.copy.weights)], [*map(local, self.copy.live)]
        torch._foreach_lerp_(averages, live, 1 - decay)

    def in_place(self):
        return self.copy.in_place()


def muon_momentum(step: int, settings: OptimSettings) -> float:
    """Muon's momentum at a step: it rises over muon_warmup steps from at most 0.85."""
    if step >= settings.muon_warmup:
        return settings.muon_momentum
    begin = min(0.85, settings.muon_momentum)
    return begin + (settings.muon_momentum - begin) * step / settings.muon_warmup


def set_step(
    optimizers: list[torch.optim.Optimizer],
    settings: OptimSettings,
    step: int,
    max_steps: int,
) -> float:
    """Set learning rates and Muon's momentum for a step; returns AdamW's learning rate."""
    scale = lr_scale(step, settings, max_steps)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = scale * group["peak"]
            if isinstance(optimizer, Muon):
                group["momentum"] = muon_momentum(step, settings)
    return scale * settings.lr


def skip_where(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """Have the next step of an optimiser change nothing where `bad` (), a flag on the device, is
    set; the device decides it, and nobody waits for it."""
    fused = isinstance(optimizer, Muon) or optimizer.defaults.get("fused")
    if fused:
        optimizer.found_inf = bad.float()
    elif bad:  # a device without fused optimisers: no gradient, no step
        optimizer.zero_grad(set_to_none=True)


# ==================================================================================================
# Families: which published architecture holds which model, and under which names
# ==================================================================================================


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

MLP_LAYER = {
    "mlp.w1.weight": ("mlp.gate_proj.weight",),
    "mlp.w2.weight": ("mlp.up_proj.weight",),
    "mlp.w3.weight": ("mlp.down_proj.weight",),
}
ATTENTION_LAYER = {
    "norm1.weight": ("input_layernorm.weight",),
    "attn.qkv.weight": tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
    "attn.proj.weight": ("self_attn.o_proj.weight",),
    "norm2.weight": ("post_attention_layernorm.weight",),
}
QK_NORM = {
    "attn.q_norm.weight": ("self_attn.q_norm.weight",),
    "attn.k_norm.weight": ("self_attn.k_norm.weight",),
}
CONFIG_NEEDS = """model_type vocab_size hidden_size intermediate_size num_hidden_layers
num_attention_heads""".split()
CONFIG_ONLY = {  # config key: the one value that our model computes, whatever the family
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
SCALINGS = {  # "dynamic" changes nothing within the context, which is all that ours computes
    "default": "none",
    "dynamic": "none",
    "linear": "linear",
    "llama3": "llama3",
    "yarn": "yarn",
}


def is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31


def is_number(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def is_list(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(type(part) is kind for part in value)


CONFIG_FORMS = (  # (what a value must be, its test, the keys of config.json that must be so)
    (
        "a positive whole number",
        is_count,
        """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
        num_key_value_heads head_dim max_position_embeddings num_local_experts num_experts
        num_experts_per_tok moe_intermediate_size original_max_position_embeddings""",
    ),
    (
        "a positive number",
        is_number,
        """rms_norm_eps rope_theta factor low_freq_factor high_freq_factor beta_fast beta_slow
        attention_factor""",
    ),
    (
        "true or false",
        lambda value: type(value) is bool,
        "tie_word_embeddings use_sliding_window norm_topk_prob",
    ),
    (
        "a whole number",
        lambda value: value == 0 or is_count(value),
        "sliding_window max_window_layers",
    ),
    ("text", lambda value: isinstance(value, str), "model_type rope_type type"),
    ("a list of text", is_list(str), "layer_types"),
    ("a list of whole numbers", is_list(int), "no_rope_layers mlp_only_layers"),
    ("an object", lambda value: isinstance(value, dict), "rope_parameters rope_scaling"),
)


def wrong_values(config: dict) -> list[str]:
    """What config.json says that cannot be meant; a key that is null is as good as absent."""
    faults = []
    for form, fits, keys in CONFIG_FORMS:
        for key in keys.split():
            value = config.get(key)
            if value is not None and not fits(value):
                faults.append(f"{key} is {value!r:.40}, not {form}")
    return faults


def refuse_config(faults: list[str]) -> None:
    if faults:
        raise UserError(
            f"config.json describes a model that is not ours: {'; '.join(faults)}",
            "give the folder of a model without these",
        )


def rope_of(config: dict) -> dict:
    """What config.json says of the rotary embedding, in the spelling of transformers 4 or 5."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "rope_type" not in rope:
        rope = {**rope, "rope_type": rope.get("type", "default")}
    return rope


def unknown_scaling(rope: dict) -> list[str]:
    """What of a scaling ours does not compute; values that mean the usual are as good as absent."""
    kind = rope["rope_type"]
    if not isinstance(kind, str) or kind not in SCALINGS:  # it may be a list
        return [f"rope_scaling is of type {kind!r}"]
    usual = {"beta_fast": YARN_FAST, "beta_slow": YARN_SLOW, "mscale": 1.0, "mscale_all_dim": 0.0}
    if is_number(rope.get("factor")):
        usual["attention_factor"] = 0.1 * math.log(rope["factor"]) + 1.0
    keys = [*usual, "attention_factor"] if kind == "yarn" else []
    odd = []
    for key in keys:
        value = rope.get(key)
        if value is not None and not (
            type(value) in (int, float) and math.isclose(value, usual.get(key, math.nan))
        ):
            odd.append(f"rope_scaling is of type 'yarn' with {key} {value!r:.40}")
    return odd


@dataclass(frozen=True)
class Family:
    """A row of the table: one architecture of transformers.

    `requires` and `allows` name the settings beyond a plain LLaMA that its models always and may
    have. `layer` maps our keys of a layer to theirs: several of theirs are ours stacked by rows
    (q, k, v), and a name with {} is one for each expert. `config` makes the keys of config.json
    that LLaMA lacks, `settings` the reverse; `only` are the values that we can read, and `needs`
    the keys, or one of A|B, that must be there besides those of a LLaMA.
    """

    architecture: str
    model_type: str
    requires: frozenset[str]
    allows: frozenset[str]
    layer: dict[str, tuple[str, ...]]
    config: Callable[[ModelSettings], dict]
    settings: Callable[[dict], dict]
    only: dict[str, object] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    def names(self, model: ModelSettings) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(our key, their keys) of every weight."""
        yield "tok_emb.weight", ("model.embed_tokens.weight",)
        for i in range(model.n_layer):
            for ours, theirs in self.layer.items():
                if "{}" in theirs[0]:
                    theirs = tuple(theirs[0].format(e) for e in range(model.n_expert))
                yield f"blocks.{i}.{ours}", tuple(f"model.layers.{i}.{name}" for name in theirs)
        yield "norm.weight", ("model.norm.weight",)
        if not model.tie:
            yield "lm_head.weight", ("lm_head.weight",)


def expert_layer(router: str, *names: str) -> dict[str, tuple[str, ...]]:
    """The names of a mixture: its router, and gate, up and down of each expert."""
    ours = ("mlp.w1", "mlp.w2", "mlp.w3")
    return {"mlp.router.weight": (router,), **{k: (n,) for k, n in zip(ours, names, strict=True)}}


def rope_config(model: ModelSettings) -> dict:
    """The rotary keys, for transformers 4 and 5."""
    scaled = {"rope_type": "default"}
    if model.rope_scaling != "none":
        original = model.rope_original or round(model.seq_len / model.rope_factor)
        scaled = {
            "rope_type": model.rope_scaling,
            "factor": model.rope_factor,
            "original_max_position_embeddings": original,
        }
    if model.rope_scaling == "llama3":
        scaled |= {"low_freq_factor": model.rope_low, "high_freq_factor": model.rope_high}
    keys = {
        "rope_theta": model.rope_theta,
        "rope_parameters": {**scaled, "rope_theta": model.rope_theta},
    }
    return keys if model.rope_scaling == "none" else {**keys, "rope_scaling": scaled}


def common_config(model: ModelSettings) -> dict:
    """The keys of config.json that all families share."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.ffn_width,
        "num_hidden_layers": model.n_layer,
        "num_attention_heads": model.n_head,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": model.seq_len,
        "rms_norm_eps": model.norm_eps,
        **rope_config(model),
        "tie_word_embeddings": model.tie,
        "attention_bias": False,
        "mlp_bias": False,
    }


def context_of(config: dict, rope: dict) -> int:
    """The context length: what the model was made for, or extended to."""
    length = config.get("max_position_embeddings") or 2048
    if rope["rope_type"] == "dynamic":
        return int(rope.get("original_max_position_embeddings") or length)
    return length


def judges(config: dict) -> bool:
    """Whether config.json is of a reward model: one score, and no other head."""
    names, labels = config.get("architectures"), config.get("id2label")
    names = names if isinstance(names, list) else []
    scores = any(str(name).endswith("ForSequenceClassification") for name in names)
    if scores and isinstance(labels, dict) and len(labels) != 1:
        refuse_config([f"it is a classifier of {len(labels)} labels, not of one"])
    return scores


def common_settings(config: dict, family: Family) -> dict:
    """Our settings for a config.json. Raises UserError with all that they cannot say."""
    refuse_config(wrong_values(config))
    rope = rope_of(config)
    faults = wrong_values(rope)
    for key, wanted in {**CONFIG_ONLY, **family.only}.items():
        if config.get(key) not in (None, wanted):
            faults.append(f"{key} is {config[key]!r:.40}, not {wanted!r}")
    faults += unknown_scaling(rope)
    for key in (*CONFIG_NEEDS, *family.needs):
        names = key.split("|")  # of which one has to be there
        if not any(config.get(name) for name in names):
            faults.append(f"{names[0]} is missing")
    refuse_config(faults)
    heads = config["num_attention_heads"]
    scaling = SCALINGS[rope["rope_type"]]
    original = int(rope.get("original_max_position_embeddings") or 0)
    return {
        "vocab_size": config["vocab_size"],
        "d_model": config["hidden_size"],
        "ffn_hidden": config["intermediate_size"],
        "n_layer": config["num_hidden_layers"],
        "n_head": heads,
        "n_kv_head": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "seq_len": context_of(config, rope),
        "norm_eps": float(config.get("rms_norm_eps") or 1e-6),
        "rope_theta": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        "rope_scaling": scaling,
        "rope_factor": 1.0 if scaling == "none" else float(rope.get("factor") or 1.0),
        "rope_original": 0 if scaling == "none" else original,
        "rope_low": float(rope.get("low_freq_factor") or 1.0),
        "rope_high": float(rope.get("high_freq_factor") or 4.0),
        "tie": bool(config.get("tie_word_embeddings")) or judges(config),
        "scalar_head": judges(config),
    }


def no_more(_: object) -> dict:
    return {}


def window_config(model: ModelSettings) -> dict:
    return {"sliding_window": model.window or None}


def window_settings(config: dict) -> dict:
    return {"window": config.get("sliding_window") or 0}


def layer_kinds(model: ModelSettings, n_layer: int) -> list[str]:
    """transformers' name for the attention of each layer."""
    kinds = {True: "sliding_attention", False: "full_attention"}
    return [kinds[model.windowed(i)] for i in range(n_layer)]


def qwen_config(model: ModelSettings) -> dict:
    return {
        "use_sliding_window": bool(model.window),
        "sliding_window": model.window or None,
        "max_window_layers": model.full_first if model.window else model.n_layer,
        "layer_types": layer_kinds(model, model.n_layer),
    }


def qwen_settings(config: dict) -> dict:
    """The layers that Qwen's windows are in: all from max_window_layers on, or as layer_types
    says."""
    n_layer = config["num_hidden_layers"]
    window = 0
    if config.get("use_sliding_window"):
        window = config.get("sliding_window") or 0
    kinds = config.get("layer_types") or []
    if not kinds and window:
        first = config.get("max_window_layers")
        first = min(n_layer, 28 if first is None else first)  # as transformers has it
        kinds = ["full_attention"] * first + ["sliding_attention"] * (n_layer - first)
    if "sliding_attention" not in kinds:
        return {}
    first, every = kinds.index("sliding_attention"), 0
    if "full_attention" in kinds[first:]:  # every n-th, with no full ones first but these
        every = kinds.index("full_attention", first) + 1
        first = 0
    model = {"window": window, "full_every": every, "full_first": first}
    if not window or kinds != layer_kinds(ModelSettings(**model), len(kinds)):
        raise UserError(
            "layer_types of config.json is no pattern that this program has",
            "give a model in which every n-th layer, or the first n, have full attention",
        )
    return model


def qwen2_settings(config: dict) -> dict:
    return {"qkv_bias": True, **qwen_settings(config)}


def qwen3_settings(config: dict) -> dict:
    return {"qk_norm": True, **qwen_settings(config)}


def smollm3_config(model: ModelSettings) -> dict:
    return {
        "no_rope_layers": [int(model.rotates(i)) for i in range(model.n_layer)],
        "no_rope_layer_interval": model.nope_every,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": ["full_attention"] * model.n_layer,
    }


def smollm3_settings(config: dict) -> dict:
    rotates = config.get("no_rope_layers") or []
    every = 0
    if 0 in rotates:
        every = rotates.index(0) + 1
    model = ModelSettings(nope_every=every)
    if rotates != [int(model.rotates(i)) for i in range(config["num_hidden_layers"])]:
        raise UserError(
            "no_rope_layers of config.json is no pattern that this program has",
            "give a model in which every n-th layer is without RoPE",
        )
    return {"nope_every": every}


def mixtral_config(model: ModelSettings) -> dict:
    return {
        "num_local_experts": model.n_expert,
        "num_experts_per_tok": model.n_expert_active,
        "router_aux_loss_coef": model.balance_loss,
        **window_config(model),
    }


def mixtral_settings(config: dict) -> dict:
    return {
        "n_expert": config["num_local_experts"],
        "n_expert_active": config["num_experts_per_tok"],
        **window_settings(config),
    }


def qwen3_moe_config(model: ModelSettings) -> dict:
    return {
        "num_experts": model.n_expert,
        "num_experts_per_tok": model.n_expert_active,
        "moe_intermediate_size": model.ffn_width,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
        "router_aux_loss_coef": model.balance_loss,
    }


def qwen3_moe_settings(config: dict) -> dict:
    if not config.get("norm_topk_prob") or config.get("mlp_only_layers"):
        raise UserError(
            "norm_topk_prob is off or mlp_only_layers is set, which ours are not",
            "give the folder of a model without these",
        )
    return {
        "qk_norm": True,
        "n_expert": config.get("num_experts") or config["num_local_experts"],
        "n_expert_active": config["num_experts_per_tok"],
        "ffn_hidden": config["moe_intermediate_size"],
    }


LLAMA = {**ATTENTION_LAYER, **MLP_LAYER}
EXPERTS = frozenset({"n_expert", "n_expert_active"})
FAMILIES = (
    Family(
        "LlamaForCausalLM",
        "llama",
        frozenset(),
        frozenset(),
        LLAMA,
        no_more,
        no_more,
        {"sliding_window": None},
    ),
    Family(
        "Qwen2ForCausalLM",
        "qwen2",
        frozenset({"qkv_bias"}),
        frozenset({"window", "full_every", "full_first"}),
        {**LLAMA, "attn.qkv.bias": tuple(f"self_attn.{x}_proj.bias" for x in "qkv")},
        qwen_config,
        qwen2_settings,
    ),
    Family(
        "Qwen3ForCausalLM",
        "qwen3",
        frozenset({"qk_norm"}),
        frozenset({"window", "full_every", "full_first"}),
        {**LLAMA, **QK_NORM},
        qwen_config,
        qwen3_settings,
    ),
    Family(
        "SmolLM3ForCausalLM",
        "smollm3",
        frozenset({"nope_every"}),
        frozenset(),
        LLAMA,
        smollm3_config,
        smollm3_settings,
        {"use_sliding_window": False},
    ),
    Family(
        "MistralForCausalLM",
        "mistral",
        frozenset({"window"}),
        frozenset(),
        LLAMA,
        window_config,
        window_settings,
    ),
    Family(
        "MixtralForCausalLM",
        "mixtral",
        frozenset({"n_expert"}),
        EXPERTS | {"window"},
        {
            **ATTENTION_LAYER,
            **expert_layer(
                "block_sparse_moe.gate.weight",
                "block_sparse_moe.experts.{}.w1.weight",
                "block_sparse_moe.experts.{}.w3.weight",
                "block_sparse_moe.experts.{}.w2.weight",
            ),
        },
        mixtral_config,
        mixtral_settings,
        needs=("num_local_experts", "num_experts_per_tok"),
    ),
    Family(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        frozenset({"n_expert", "qk_norm"}),
        EXPERTS,
        {
            **ATTENTION_LAYER,
            **QK_NORM,
            **expert_layer(
                "mlp.gate.weight",
                "mlp.experts.{}.gate_proj.weight",
                "mlp.experts.{}.up_proj.weight",
                "mlp.experts.{}.down_proj.weight",
            ),
        },
        qwen3_moe_config,
        qwen3_moe_settings,
        {"use_sliding_window": False, "decoder_sparse_step": 1},
        needs=("num_experts|num_local_experts", "num_experts_per_tok", "moe_intermediate_size"),
    ),
)
ANY_FAMILY = frozenset(
    """seq_len n_layer d_model n_head n_kv_head head_dim ffn_mult ffn_hidden dropout tie rope_theta
    norm_eps vocab_size rope_layout rope_scaling rope_factor rope_original rope_low rope_high
    bos_id doc_mask
    trunc_init balance_loss router_z_loss""".split()
)  # the settings that every family can hold, or that do not outlive training


def family_of(model: ModelSettings) -> Family:
    """The first family that holds `model`. Raises UserError with the flags that none holds."""
    used = {f.name for f in fields(model) if getattr(model, f.name) != f.default} - ANY_FAMILY
    used -= {"scalar_head"}
    used -= EXPERTS if not model.n_expert else frozenset()
    for family in FAMILIES:
        if family.requires <= used <= family.requires | family.allows:
            return family
    flags = ", ".join(f"--{name}" for name in sorted(used))
    known = ", ".join(family.architecture for family in FAMILIES)
    raise UserError(
        f"no architecture that this converter knows ({known}) has {flags}",
        "keep this model in the program's own format, or train one without",
    )


def folded(
    weights: dict[str, Tensor],
    model: ModelSettings,
) -> tuple[dict[str, Tensor], ModelSettings]:
    """The same function without embed_scale: the scale goes into an input embedding of its own."""
    if not model.embed_scale:
        return weights, model
    scaled = weights["tok_emb.weight"] * math.sqrt(model.d_model)
    return (
        {**weights, "tok_emb.weight": scaled},
        replace(model, embed_scale=False, tie=False),
    )


def to_family(weights: dict[str, Tensor], model: ModelSettings, family: Family) -> dict:
    """Our weights under the family's names; no two of them share memory."""
    heads = [n * model.head_size for n in (model.n_head, model.kv_heads, model.kv_heads)]
    renamed = {}
    for ours, theirs in family.names(model):
        weight = weights[ours]
        parts = [weight]
        if weight.dim() == 3:  # (E, in, out), of which each expert is a linear map of its own
            parts = [expert.T.contiguous() for expert in weight]
        elif len(theirs) == 3:
            parts = [part.clone() for part in weight.split(heads)]
        renamed |= zip(theirs, parts, strict=True)
    return renamed


def check_names(weights: dict[str, Tensor], wanted: set[str], tie: bool) -> None:
    """Raise UserError for weights that are missing or left over."""
    spare = {name for name in weights if name.endswith("rotary_emb.inv_freq")}
    if tie:
        spare.add("lm_head.weight")
    faults = [f"it lacks {name}" for name in sorted(wanted - set(weights))]
    faults += [f"it has {name}" for name in sorted(set(weights) - wanted - spare)]
    if len(faults) > 3:
        faults[3:] = [f"and {len(faults) - 3} more"]
    if faults:
        raise UserError(
            f"the weights are not those of its config.json: {'; '.join(faults)}",
            "download the folder again, or name another",
        )


def from_family(weights: dict[str, Tensor], model: ModelSettings, family: Family) -> dict:
    """The reverse, in the numbers of the file. Raises UserError for weights that are not the
    config's."""
    layers = {name.split(".")[2] for name in weights if name.startswith("model.layers.")}
    if model.n_layer > len(layers) + 1:
        raise UserError(
            f"config.json says num_hidden_layers {model.n_layer}, the weights have {len(layers)}",
            "download the folder again, or name another",
        )
    names = dict(family.names(model))
    if model.scalar_head:
        names["score.weight"] = ("score.weight",)
    check_names(weights, {name for theirs in names.values() for name in theirs}, model.tie)
    ours = {}
    try:
        for name, theirs in names.items():
            parts = [weights[part] for part in theirs]
            if name.endswith(("mlp.w1", "mlp.w2", "mlp.w3")):  # a tensor (E, in, out) of experts
                ours[name] = torch.stack([part.T for part in parts])
            else:
                ours[name] = torch.cat(parts)
    except RuntimeError as fault:
        raise UserError(
            f"the weights do not fit together in {name} ({fault})",
            "download the folder again, or name another",
        ) from fault
    return {**ours, "lm_head.weight": ours.get("lm_head.weight", ours["tok_emb.weight"])}


def indexed_files(folder: Path, index: Path) -> list[Path]:
    """The files that an index names, all in its own folder. Raises UserError for any other."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map", "download the folder again")
    names = list(weight_map.values())
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise UserError(
                f"{index} names {name!r}, which is no file of its folder",
                "use a folder from a source that you trust",
            )
    return [folder / name for name in sorted(set(names))]


def damaged_tensors(path: Path, fault: Exception) -> UserError:
    missing = UserError(f"{path} cannot be read ({fault})", "download it again")
    if isinstance(fault, OSError):
        return disk_error(fault, path) or missing
    return UserError(f"{path} is damaged", "download it again")


class SafeTensors(Mapping):
    """The tensors of a .safetensors file, each read when it is asked for."""

    def __init__(self, path: Path):
        self.path = path
        self.damage = (need("safetensors").SafetensorError, OSError)
        try:
            self.file = need("safetensors").safe_open(path, framework="pt")
        except self.damage as fault:
            raise damaged_tensors(path, fault) from fault
        self.names = frozenset(self.file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        try:
            return self.file.get_tensor(name)
        except self.damage as fault:
            raise damaged_tensors(self.path, fault) from fault

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.names))

    def __len__(self) -> int:
        return len(self.names)


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    """The tensors of one file, no code run. Raises UserError where it is missing or damaged."""
    if path.suffix == ".safetensors":
        return SafeTensors(path)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, *BROKEN) as fault:
        raise damaged_tensors(path, fault) from fault
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise UserError(f"{path} is no dict of tensors", "download it again")
    return weights


def read_weights(folder: Path) -> Mapping[str, Tensor]:
    """All weights of a Hugging Face folder, from safetensors or .bin, one file or several; each is
    read when it is asked for."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        files = []
        if index.exists():
            files = indexed_files(folder, index)
        elif single.exists():
            files = [single]
        if files:
            return ChainMap(*map(read_tensors, files))
    raise UserError(
        f"{folder} has no weights",
        "it needs model.safetensors, pytorch_model.bin or an index of several such files",
    )


def is_foreign(folder: Path) -> bool:
    """Whether a folder holds a model in Hugging Face's form, rather than a run."""
    config = folder / "config.json"
    if not config.is_file() or any(folder.glob("ckpt_*.pt")):
        return False
    return "model_type" in read_json(config)


def read_folder(folder: Path, spm: str = "") -> dict:
    """A checkpoint's dict from a Hugging Face folder. Raises UserError for one that is not ours."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} has no config.json", "name the folder of a LLaMA")
    config = read_json(folder / "config.json")
    families = {family.model_type: family for family in FAMILIES}
    named = config.get("model_type")
    if not isinstance(named, str) or named not in families:
        raise UserError(
            f"config.json describes a model that is not ours: model_type is {named!r}",
            f"give one of {', '.join(families)}",
        )
    family = families[named]
    model = ModelSettings(**{**common_settings(config, family), **family.settings(config)})
    if faults := check(model):
        refuse_config([fault for fault, _ in faults])
    names = ("tokenizer.model", "tokenizer.json")
    if not spm and not any((folder / name).exists() for name in names):
        raise UserError(
            f"{folder} has neither tokenizer.model nor tokenizer.json",
            "add its tokenizer, or name one with --tokenizer",
        )
    tokenizer = load_tokenizer(spm or folder)
    chats = isinstance(tokenizer, HFTokenizer) and tokenizer.has_template
    return {
        "format": CHECKPOINT_FORMAT,
        "kind": "imported chat" if chats else "imported",
        "step": 0,
        "samples": 0,
        "best_val": math.inf,
        "model": from_family(read_weights(folder), model, family),
        "config": asdict(replace(model, bos_id=tokenizer.bos)),
        "dtype": config.get("dtype") or config.get("torch_dtype") or "float32",
        "tokenizer": tokenizer.data,
    }


# ==================================================================================================
# Checkpoints: the only place that saves and loads
# ==================================================================================================

WRAPPERS = re.compile(r"^((_orig_mod|module|model)\.)+")  # what compile and DDP leave in names

OLD_NAMES = {"max_seq_len": "seq_len", "block_size": "seq_len", "context_length": "seq_len"}


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint so that `path` is at every moment whole; OSError if the disk refuses."""
    with atomic_write(Path(path)) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as fault:  # torch hides the disk's own error behind it
            raise fault.__context__ or fault from None


# A sharded checkpoint is a small file like any other, in whose dict {"part": NAME} stands for each
# sharded tensor, and a folder of torch.distributed.checkpoint beside it, which holds these.

PARTS = re.compile(r"ckpt_([a-z]+_)?[0-9]{8}\.parts")  # such folders

DESCRIPTION_NAMES = {  # all that a description of tensors calls by name, besides dtypes
    "torch.distributed.checkpoint.metadata": (
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
}


class DescriptionReader(pickle.Unpickler):
    """Reads the description of a folder's tensors, and calls nothing else that its bytes name."""

    def find_class(self, module: str, name: str) -> object:
        known = name in DESCRIPTION_NAMES.get(module, ())
        if known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def describe_parts(folder: Path, digest: str, verify: bool) -> typing.Any:
    """The description of a folder's tensors, of that digest, which its files bear out; their
    checksums too where they are to be verified. One of BROKEN, or OSError, where they do not."""
    data = (folder / ".metadata").read_bytes()
    refuse(sha256(data) != digest, "its .metadata is another")
    found = DescriptionReader(io.BytesIO(data)).load()
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    tensors = found.state_dict_metadata.values()
    total = sum(math.prod(one.size) * one.properties.dtype.itemsize for one in tensors)
    refuse(total > sum(sizes.values()), "it is shorter than its tensors")
    for place in found.storage_data.values():
        begin, length, name = place.offset, place.length, place.relative_path
        refuse(min(begin, length) < 0 or begin + length > sizes[name], f"{name} is too short")
        if verify:
            with (folder / name).open("rb") as file:
                file.seek(begin)
                bad = zipfile.ZipFile(io.BytesIO(file.read(length))).testzip()
            refuse(bool(bad), f"in {name}")
    return found


def read_parts(folder: Path, description: typing.Any, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, whole or sharded, by their names in a folder; no rank waits for another."""
    dcp = importlib.import_module("torch.distributed.checkpoint")
    reader = dcp.FileSystemReader(folder)
    reader.read_metadata = lambda **_options: description
    try:
        with warnings.catch_warnings():  # which say that ranks read on their own
            warnings.simplefilter("ignore")
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except dcp.api.CheckpointException as fault:
        (cause, _), *_ = fault.failures.values()
        raise UserError(
            f"{folder} is damaged ({sentence(cause)})", "use an earlier checkpoint"
        ) from fault


def replace_parts(value: object, found: dict[str, Tensor | Stored]) -> object:
    match value:
        case {"part": str(name)}:
            return found[name]
        case dict():
            return {key: replace_parts(one, found) for key, one in value.items()}
        case list() | tuple():
            return type(value)(replace_parts(one, found) for one in value)
    return value


def with_parts(checkpoint: dict, path: Path, verify: bool, sharded: bool) -> dict:
    """A checkpoint with the tensors of its folder: whole, or Stored where it is to be sharded."""
    name = str(checkpoint["parts"])
    folder = path.parent / name
    damage = f"{folder}, which holds the weights of {path.name}, is damaged"
    if not PARTS.fullmatch(name):
        raise UserError(f"{path} is damaged (its field parts)", "use an earlier checkpoint")
    if not folder.is_dir():
        raise UserError(
            f"{folder}, which holds the weights of {path.name}, does not exist",
            "copy a sharded checkpoint together with its folder",
        )
    try:
        description = describe_parts(folder, str(checkpoint.get("parts_digest")), verify)
        known = description.state_dict_metadata
        found = {
            key: Stored(
                one.size,
                one.properties.dtype,
                lambda tensor, key=key: read_parts(folder, description, {key: tensor}),
            )
            for key, one in known.items()
        }
        if not sharded:
            found = {key: torch.empty(one.shape, dtype=one.dtype) for key, one in found.items()}
            read_parts(folder, description, found)
        return {**replace_parts(checkpoint, found), "parts": name}
    except OSError as fault:
        raise UserError(f"{damage} ({sentence(fault)})", "use an earlier checkpoint") from fault
    except BROKEN as fault:
        raise UserError(f"{damage} ({fault})", "use an earlier checkpoint") from fault


def take_shards(
    value: object,
    shards: dict[str, Tensor],
    name: str = "",
    seen: dict[int, str] | None = None,
) -> object:
    """What holds tensors, with {"part": NAME} for each sharded one, which goes to `shards`."""
    seen = {} if seen is None else seen
    if isinstance(value, dict):
        return {
            key: take_shards(one, shards, f"{name}/{key}" if name else str(key), seen)
            for key, one in value.items()
        }
    if isinstance(value, (list, tuple)):
        return type(value)(
            take_shards(one, shards, f"{name}/{i}", seen) for i, one in enumerate(value)
        )
    if not isinstance(value, Tensor) or not is_shard(value):
        return value
    if id(value) not in seen:
        seen[id(value)] = name
        shards[name] = value
    return {"part": seen[id(value)]}


class Unwritten(OSError):
    """A checkpoint could not be written, and is lost: what it held is no longer there."""


class ShardWriter:
    """Writes sharded checkpoints' folders: each rank its own shards, in a thread, one folder at a
    time. All ranks must call it, for which they have a process group of their own."""

    def __init__(self):
        self.group = dist.new_group(backend="gloo")
        self.future: Future | None = None

    def begin(self, folder: Path, checkpoint: dict) -> dict:
        """Begin to write the shards in a checkpoint, which may change at once; what is left of it,
        for the file beside the folder."""
        self.wait()
        shards: dict[str, Tensor] = {}
        rest = take_shards(checkpoint, shards)
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        dcp = importlib.import_module("torch.distributed.checkpoint")
        self.future = dcp.async_save(shards, checkpoint_id=folder, process_group=self.group)
        return {**rest, "parts": folder.name}

    def wait(self) -> None:
        """Until the folder is written, or cannot be, which rank 0 says."""
        if self.future:
            wait_for_futures([self.future])


def parts_of(path: Path) -> str:
    """The name of the folder that a checkpoint's weights are in; "" where it has none."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        name = str(checkpoint.get("parts", ""))
    except (OSError, *BROKEN):
        return ""
    return name if PARTS.fullmatch(name) else ""


def named_parts(out: Path) -> set[str]:
    """The folders of a run that its checkpoints name."""
    return {name for path in out.glob("ckpt_*.pt") if (name := parts_of(path))}


def after_shards(shards: Future, folder: Path, checkpoint: dict, work: Callable) -> None:
    """work(), which writes the checkpoint beside a folder, once that is whole; folders that no
    checkpoint names any longer go. Unwritten where it cannot become whole."""
    wait_for_futures([shards])
    if fault := shards.exception():
        failures = getattr(fault, "failures", {0: (fault, None)})
        rank, (cause, _) = next(iter(failures.items()))
        shutil.rmtree(folder, ignore_errors=True)
        raise Unwritten(f"on rank {rank}: {sentence(cause)}") from fault
    checkpoint["parts_digest"] = sha256((folder / ".metadata").read_bytes())
    before = named_parts(folder.parent)
    work()
    for name in before - named_parts(folder.parent):
        shutil.rmtree(folder.with_name(name), ignore_errors=True)


def remove_checkpoint(path: Path) -> None:
    """Remove it, and its folder where no other checkpoint has the same."""
    name = parts_of(path)
    path.unlink()
    if name and name not in named_parts(path.parent):
        shutil.rmtree(path.parent / name, ignore_errors=True)


def sweep_parts(out: Path) -> None:
    """Remove folders that no checkpoint names, as a run leaves that was killed while it wrote."""
    folders = {path.name for path in out.glob("ckpt_*.parts") if PARTS.fullmatch(path.name)}
    for name in folders - named_parts(out):
        shutil.rmtree(out / name, ignore_errors=True)


def read_checkpoint(path: Path, verify: bool = False, sharded: bool = False) -> dict:
    """The dict in a file, without running code from it; UserError if it is unusable.

    `verify` checks the checksums too; `sharded` leaves what lies in a folder beside it as Stored,
    for each rank to read what it needs.
    """
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
                f"{path} contains code besides numbers, and was not loaded",
                "use only checkpoints of this program",
            ) from fault
        raise UserError(
            f"{path} is damaged or not a checkpoint", "use another checkpoint"
        ) from fault
    match checkpoint:
        case {"model": dict(), "config": dict(), **more}:
            version = more.get("format", CHECKPOINT_FORMAT)
            if isinstance(version, int) and version == CHECKPOINT_FORMAT:
                if "parts" in more:
                    return with_parts(checkpoint, path, verify, sharded)
                return checkpoint
    raise UserError(
        f"{path} is a file of another program or of a newer version of this one",
        "use a ckpt_*.pt of this program, or update it",
    )


NUMBERED = re.compile(r"ckpt_[0-9]{8}\.pt")


def numbered(out: Path) -> list[Path]:
    """The numbered checkpoints of a run, the newest first."""
    if not out.is_dir():
        return []
    return sorted((p for p in out.iterdir() if NUMBERED.fullmatch(p.name)), reverse=True)


def checkpoint_path(path: str | Path) -> Path:
    """A checkpoint's file; for the folder of a run its best one, or else its last; a folder in
    Hugging Face's form itself."""
    path = Path(path)
    if not path.is_dir() or is_foreign(path):
        return path
    if (path / "ckpt_best.pt").exists():
        return path / "ckpt_best.pt"
    if (path / "config.json").exists() and not numbered(path):
        raise UserError(
            f"{path} holds plain weights, which no run goes on from",
            "give the ckpt_*.pt of the run",
        )
    return path / "ckpt_last.pt"


def refuse_broken_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Raise UserError where a weight is not a tensor, or NaN or infinite."""
    for name, weight in weights.items():
        plain = isinstance(weight, Tensor) and weight.layout == torch.strided
        if not plain or not weight.is_floating_point():
            raise UserError(f"{path} is damaged (its weight {name})", "use an earlier checkpoint")
        if not weight.isfinite().all():
            raise UserError(
                f"{path} holds weights that are NaN or infinite (in {name})",
                "use an earlier checkpoint, and train on with a lower --lr",
            )


def check_config(settings: ModelSettings, weights: dict[str, Tensor], path: Path) -> None:
    """UserError where a stored config cannot be of these weights: before a model is built, which
    takes memory and time by what the config says."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        number = f.type is float and type(value) is int
        finite = not isinstance(value, float) or math.isfinite(value)
        if not finite or not (number or type(value) is f.type):
            raise UserError(f"{path}: its config says {f.name} {value!r}", "use another checkpoint")
    if faults := check(settings):
        raise UserError(f"{path}: its config is wrong ({faults[0][0]})", "use another checkpoint")
    layers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    qkv = weights.get("blocks.0.attn.qkv.weight", ())
    heads = settings.n_head + 2 * settings.kv_heads
    for name, said, has in (
        ("n_layer", settings.n_layer, len(layers)),
        ("n_sink", settings.n_sink, len(weights.get("sinks", ()))),
        ("attention rows", heads * settings.head_size, len(qkv)),
    ):
        if said != has:
            raise UserError(
                f"{path}: its config says {name} {said}, its weights have {has}",
                "use another checkpoint",
            )


def whole_config(stored: dict, weights: dict[str, Tensor], path: Path) -> ModelSettings:
    """ModelSettings from a stored config and, where it is old, from the weights it must fit."""
    config = {OLD_NAMES.get(k, k): v for k, v in stored.items() if v is not None}
    embedding = weights["tok_emb.weight"]
    if "rope_layout" not in config:  # the original program had other settings too
        config = {f.name: config[f.name] for f in fields(ModelSettings) if f.name in config}
        config["tie"] = torch.equal(weights.get("lm_head.weight", embedding), embedding)
    if "blocks.0.mlp.w2.weight" in weights:
        width = len(weights["blocks.0.mlp.w2.weight"])
    else:
        width = weights["blocks.0.mlp.w2"].shape[2]  # of experts: (E, d, F)
    config |= {"vocab_size": len(embedding), "ffn_hidden": width, "rope_layout": "half"}
    settings = ModelSettings(**config)
    check_config(settings, weights, path)
    if settings.tie:
        weights.setdefault("lm_head.weight", embedding)
    with torch.device("meta"):
        wanted = {(name, w.shape) for name, w in Transformer(settings).state_dict().items()}
    if wrong := wanted ^ {(name, w.shape) for name, w in weights.items()}:
        names = ", ".join(sorted({name for name, _ in wrong})[:3])
        raise UserError(
            f"{path}: its weights do not fit its config ({names})", "use another checkpoint"
        )
    return settings


def model_key(checkpoint: dict) -> str:
    """What tells one model's weights, or adapters, from any other's."""
    if "key" in checkpoint:  # of merged adapters that of their parts: sums differ by processor
        return checkpoint["key"]
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(checkpoint["model"].items()):
        digest.update(name.encode())
        numbers = weight.detach().cpu().float().contiguous().flatten()  # in whatever it is kept
        digest.update(numbers.view(torch.uint8).numpy())
    return digest.hexdigest()


def with_base(checkpoint: dict, base: dict, path: Path) -> dict:
    """A checkpoint of adapters, merged into their base; UserError where that has changed."""
    lora = checkpoint["lora"]
    if model_key(base) != lora["key"]:
        raise UserError(
            f"{lora['base']} is no longer the model that {path} adapts",
            "restore the original base checkpoint",
        )
    try:
        weights = merge_lora(base["model"], checkpoint["model"], lora["scale"])
        scored = checkpoint["config"]["scalar_head"]
        settings = ModelSettings(**checkpoint["config"])
    except BROKEN as fault:
        raise UserError(
            f"{path} is damaged (its adapters do not fit their base: {fault})",
            "use an earlier checkpoint",
        ) from fault
    if not scored:
        weights.pop("score.weight", None)
    refuse_broken_weights(weights, path)
    check_config(settings, weights, path)
    parts = f"{lora['key']}/{model_key(checkpoint)}/{lora['scale']}"
    return {**checkpoint, "model": weights, "original": False, "key": sha256(parts.encode())}


def find_base(lora: dict, path: Path) -> Path:
    """The checkpoint that the adapters in `path` belong to: where it was, or moved with them."""
    scale = lora.get("scale") if isinstance(lora, dict) else None
    named = isinstance(scale, (int, float)) and isinstance(lora.get("base"), str)
    if not named or not isinstance(lora.get("key"), str):
        raise UserError(f"{path} is damaged (its field lora)", "use an earlier checkpoint")
    base = Path(lora["base"])
    places = [base, path.parent / str(lora.get("relative", base.name)), path.with_name(base.name)]
    for place in places:
        if place.exists() and place.resolve() != path.resolve():
            return place
    raise UserError(
        f"{base}, the base of the adapters in {path}, does not exist",
        "restore it, give it with --base, or keep both folders side by side",
    )


def check_tokenizer(checkpoint: dict, path: Path) -> None:
    if not isinstance(checkpoint.get("tokenizer"), (bytes, Tensor, type(None))):
        raise UserError(f"{path} is damaged (its field tokenizer)", "use an earlier checkpoint")


def split_rotary_pairs(weights: dict[str, Tensor], config: ModelSettings) -> None:
    """Turn interleaved rotary pairs (x0 x1)(x2 x3)… into half-split ones (x0 x2 …)(x1 x3 …)."""
    turned = (config.n_head + config.kv_heads) * config.head_size
    for name, weight in weights.items():
        if name.endswith("attn.qkv.weight"):
            pairs = weight[:turned].view(-1, config.head_size // 2, 2, config.d_model)
            half = pairs.transpose(1, 2).reshape(turned, config.d_model)
            weights[name] = torch.cat((half, weight[turned:]))


def import_model(folder: Path, spm: str = "") -> dict:
    """A checkpoint of a folder in Hugging Face's form, ready to build from."""
    imported = read_folder(folder, spm)
    weights = imported["model"]
    refuse_broken_weights(weights, folder)
    config = ModelSettings(**imported["config"])
    with torch.device("meta"):
        wanted = {name: w.shape for name, w in Transformer(config).state_dict().items()}
    wrong = [name for name, shape in wanted.items() if weights[name].shape != shape]
    if wrong:
        raise UserError(
            f"the weights in {folder} have other shapes than its config.json says "
            f"({', '.join(wrong[:3])})",
            "download the folder again, or name another",
        )
    return {**imported, "original": False}


def load_checkpoint(path: str | Path, base: str | Path = "") -> dict:
    """A checkpoint of any age, ready to build from: with plain names, rotary pairs half-split and
    adapters merged; its tokenizer may be None. UserError where it cannot be used.

    `base`: of adapters, the checkpoint that they adapt, in place of the one that they name.
    """
    path = checkpoint_path(path)
    if path.is_dir():
        return import_model(path)
    checkpoint = read_checkpoint(path)
    check_tokenizer(checkpoint, path)
    if lora := checkpoint.get("lora"):
        found = find_base({**lora, "base": str(base)} if base else lora, path)
        return with_base(checkpoint, load_checkpoint(found), path)
    if base:
        raise UserError(f"--base is given, but {path} holds no adapters", "drop --base")
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
            "use a ckpt_*.pt of this program, or update it",
        ) from fault
    if original:
        split_rotary_pairs(weights, config)
    return {
        **checkpoint,
        "model": weights,
        "config": asdict(config),
        "tokenizer": checkpoint.get("tokenizer"),
        "original": original,
    }


def build_model(
    checkpoint: dict,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """The model of a loaded checkpoint, in evaluation mode; in another dtype than fp32 it computes
    under autocast alone (lower_weights)."""
    with torch.device("meta"):
        model = Transformer(ModelSettings(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"], assign=True)
    if model.config.tie:
        model.lm_head.weight = model.tok_emb.weight
    lower_weights(model, dtype)  # first: what a file has in this dtype is not copied
    lowered = {getattr(*place) for place in multiplied(model) if dtype != torch.float32}
    for weight in model.parameters():
        if weight not in lowered:
            weight.data = weight.data.float()
    return model.to(device).eval().requires_grad_(False)


def tokenizer_of(checkpoint: dict, spm: str, path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint, or --tokenizer; raises UserError where neither fits."""
    own, ids = checkpoint["tokenizer"], checkpoint["config"]["vocab_size"]
    if spm:
        tokenizer = load_tokenizer(spm)
    elif own:
        tokenizer = make_tokenizer(bytes(own), f"the tokenizer in {path}")
    else:
        raise UserError(f"{path} carries no tokenizer", "give its tokenizer.model with --tokenizer")
    if tokenizer.vocab_size > ids:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {ids}",
            "give the tokenizer.model that this model was trained with",
        )
    return tokenizer


def on_host(value: object, seen: dict | None = None) -> object:
    """A copy in the CPU's memory of what holds tensors, which training may then change; those that
    share memory share it in the copy too."""
    seen = {} if seen is None else seen
    if isinstance(value, dict):
        return {key: on_host(one, seen) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_host(one, seen) for one in value)
    if not isinstance(value, Tensor):
        return value
    place = value.data_ptr(), value.shape, value.stride(), value.dtype, value.device
    if place not in seen:
        host = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        seen[place] = host.copy_(value, non_blocking=True)
    return seen[place]


class WriteJob(typing.NamedTuple):
    """work(*args) writes a file; of the `best` checkpoint no other holds the weights."""

    work: Callable
    args: tuple
    best: bool


RETRY_S = 60.0  # between two tries to write what the disk refuses

PATIENCE_S = 60.0  # of tries at the end of a run


class Writer:
    """Writes files in a thread, so that training does not wait for the disk: one at a time, each
    whole before the next is begun, and after() behind each. What the disk refuses is tried again
    until it takes it, or a newer checkpoint takes its place."""

    def __init__(self, after: Callable[[], None] = int):
        self.after = after
        self.changed = threading.Condition()
        self.jobs: list[WriteJob] = []  # the first one is being written
        self.fault: Exception | None = None  # of its last try
        self.lost: Unwritten | None = None  # since the last one that was written
        self.closed = False
        self.thread: threading.Thread | None = threading.Thread(target=self.run, daemon=True)
        try:  # at once: one that begins where memory is short may hang
            self.thread.start()
        except RuntimeError:  # there is no memory for one
            self.thread = None

    def submit(self, work: Callable, *args, best: bool = False) -> None:
        """Begin work(*args), after what was begun before."""
        if not self.thread:
            work(*args)
            self.after()
            return
        with self.changed:
            self.settle()
            waiting = [job for job in self.jobs if job.best and not best]
            self.jobs = [*waiting, WriteJob(work, args, best)]
            self.changed.notify_all()

    def settle(self) -> None:
        """Wait until what was begun is written, or cannot be for now."""
        with self.changed:
            self.changed.wait_for(lambda: self.fault or not self.jobs)
            self.raise_bug()

    def run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.jobs or self.closed)
                if not self.jobs:
                    return
                job = self.jobs[0]
            with Caught() as caught:
                job.work(*job.args)
            fault = caught.fault
            if not fault:
                self.after()
            with self.changed:
                if fault and not self.fault:
                    self.tell(fault)
                self.lost = fault if isinstance(fault, Unwritten) else None
                self.fault = None if self.lost else fault
                if not self.fault:
                    self.jobs = [other for other in self.jobs if other is not job]
                del job, caught, fault  # no memory is held, nor freed when the process ends
                self.changed.notify_all()
                if self.fault:
                    self.changed.wait(RETRY_S)

    def tell(self, fault: Exception) -> None:
        again = "it is tried again every minute"
        if isinstance(fault, Unwritten):
            again = "the next one is tried"
        if isinstance(fault, OSError):
            say(
                f"warning: a checkpoint cannot be written ({sentence(fault)}); training goes on, "
                f"and {again}"
            )

    def raise_bug(self) -> None:
        if self.fault and not isinstance(self.fault, OSError):
            raise self.fault

    def wait(self) -> None:
        """Wait until all is written; raise what the disk says where it still refuses after
        PATIENCE_S."""
        until = time.monotonic() + PATIENCE_S
        with self.changed:
            while self.jobs:
                self.raise_bug()
                self.changed.notify_all()
                if self.fault and time.monotonic() > until:
                    fault, self.jobs = self.fault, []
                    raise fault
                self.changed.wait(1.0)
            if self.lost:
                raise self.lost

    def close(self) -> None:
        """Wait for what is being written where another fault ends the run, which tells that one;
        its thread ends."""
        with Caught():
            self.wait()
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        if self.thread:  # one that the interpreter's end meets in the midst of C++ ends it badly
            self.thread.join(10)


def link(path: Path, name: Path) -> None:
    """Make `name` the same file as `path`, in one moment."""
    twin = name.with_name(f".{name.name}.tmp")
    twin.unlink(missing_ok=True)
    try:
        os.link(path, twin)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, twin)
    os.replace(twin, name)


def save_step(out: Path, checkpoint: dict, keep_last: int, also: Sequence[str] = ()) -> None:
    """Write ckpt_NNNNNNNN.pt once, make it ckpt_last.pt and what it is `also`, and drop the oldest
    beyond keep_last."""
    path = out / f"ckpt_{checkpoint['step']:08d}.pt"
    save_checkpoint(path, checkpoint)
    for name in ("ckpt_last.pt", *also):
        link(path, out / name)
    fsync_folder(out)
    for old in numbered(out)[keep_last:]:
        old.unlink()


def newest_whole(out: Path, resume: bool, before: int | None = None) -> Path | None:
    """The newest whole checkpoint of a run, or None where there is no run; with `before`, of the
    numbered ones up to that step, and those behind it are removed."""
    candidates = [*out.glob("ckpt_last.pt"), *numbered(out)]
    if before is not None:
        candidates = numbered(out)
        later = [path for path in candidates if int(path.stem[-8:]) > before]
        candidates = candidates[len(later) :]
        if candidates:
            link(candidates[0], out / "ckpt_last.pt")
            for path in later:
                remove_checkpoint(path)
    if not candidates:
        return None
    if not resume:
        raise UserError(f"{out} already holds a run", "use another --out_dir, or drop --resume 0")
    for path in candidates:
        try:
            read_checkpoint(path, verify=True, sharded=True)
            return path
        except UserError as fault:
            say(f"warning: {fault.faults[0][0]}; trying the one before it")
    raise UserError(f"every checkpoint in {out} is damaged", "start in another --out_dir")


def save_weights(
    out: Path,
    weights: dict[str, Tensor],
    config: ModelSettings,
    tokenizer: Tokenizer,
) -> None:
    """pytorch_model.bin, config.json and tokenizer.model, for programs that want plain weights."""
    save_checkpoint(out / "pytorch_model.bin", weights)
    with atomic_write(out / "config.json", "w") as file:
        json.dump(asdict(config), file, indent=1)
    for name, data in tokenizer.files().items():
        with atomic_write(out / name) as file:
            file.write(data)


# ==================================================================================================
# Endurance: one run a folder, a second place for its files, and what happened to it
# ==================================================================================================

LOCK_WAIT_S = 2.0  # for the lock of a run that is just ending

RESTART_WAIT_S = 30.0  # the same, where torchrun starts a run again


class Lock:
    """A folder that one run has at a time. The system lets go of it when that run's process ends,
    however it ends; where the file system knows no locks there is none."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / ".lock"
        self.handle: int | None = None

    def acquire(self) -> None:
        """UserError where another run has the folder."""
        patience = LOCK_WAIT_S
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            patience = RESTART_WAIT_S
        until = time.monotonic() + patience
        self.folder.mkdir(parents=True, exist_ok=True)
        while not self.attempt():
            if time.monotonic() > until:
                raise UserError(
                    f"another run is at work in {self.folder} ({self.holder()})",
                    "wait for its end, stop it, or use another --out_dir",
                )
            time.sleep(0.1)

    def attempt(self) -> bool:
        try:
            locks = importlib.import_module("fcntl")
        except ImportError:  # not POSIX
            return True
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            locks.lockf(handle, locks.LOCK_EX | locks.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(handle)
            return False
        except OSError:  # a file system without locks
            os.close(handle)
            return True
        if not self.path.exists() or os.stat(self.path).st_ino != os.fstat(handle).st_ino:
            os.close(handle)  # the run before removed it in between
            return False
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())
        self.handle = handle
        return True

    def holder(self) -> str:
        with contextlib.suppress(OSError):
            return self.path.read_text(encoding="utf-8", errors="replace")
        return "of which nothing is known"

    def release(self) -> None:
        if self.handle is not None:
            self.path.unlink(missing_ok=True)
            os.close(self.handle)
            self.handle = None
        with contextlib.suppress(OSError):  # it holds something, as it should
            self.folder.rmdir()


class LogFile:
    """A file of JSON lines that grows with a run. Lines that the disk refuses are kept for the
    next time, as no log is worth a run."""

    def __init__(self, path: Path):
        self.path = path
        self.waiting: list[str] = []
        self.told = False

    def write(self, *rows: dict) -> None:
        self.waiting += [json_line(row) for row in rows]
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(self.waiting)
        except OSError as fault:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)  # no line twice
            if not self.told:
                say(
                    f"warning: {self.path} cannot be written ({sentence(fault)}); "
                    "its lines are kept until it can"
                )
            self.told = True
        else:
            self.waiting.clear()


def read_log(path: Path) -> list[dict]:
    """The rows of a .jsonl of a run; none where there is no such file."""
    rows = []
    if path.exists():
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, RecursionError):  # that a kill cut short
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


class Events:
    """events.jsonl, what happened to a run besides training; its process tells it too."""

    def __init__(self, out: Path, machine: Machine):
        self.log = LogFile(out / "events.jsonl")
        self.machine = machine

    def add(self, step: int, kind: str, told: str, **facts: object) -> None:
        """Say what happened, and write it with its facts."""
        if self.machine.main:
            say(told)
            self.log.write({"step": step, "event": kind, "told": told, **facts})

    def note(self, step: int, kind: str, **facts: object) -> None:
        """Write it without a word."""
        if self.machine.main:
            self.log.write({"step": step, "event": kind, **facts})

    def count(self, kind: str, step: int) -> int:
        """How often it happened up to a step, in all starts of the run."""
        return sum(
            row.get("event") == kind and type(row.get("step")) is int and row["step"] <= step
            for row in read_log(self.log.path)
        )


class FolderPlace:
    """A folder that is a mirror, on another disk or one that is mounted."""

    def __init__(self, root: str):
        self.root = Path(root)

    def names(self, folder: str = "") -> list[str]:
        place = self.root / folder
        if not place.exists():
            return []
        names = [path.name for path in place.iterdir() if path.is_file()]
        folders = [path.name for path in place.glob("*.parts") if PARTS.fullmatch(path.name)]
        return folders + [name for name in names if folder or not name.startswith(".")]

    def put(self, file: Path, name: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(f".{path.name}.tmp")
        shutil.copyfile(file, half)
        os.replace(half, path)

    def put_again(self, old: str, name: str) -> None:
        """Give what it holds as `old` another name too."""
        link(self.root / old, self.root / name)

    def get(self, name: str, file: Path) -> None:
        shutil.copyfile(self.root / name, file)

    def remove(self, name: str) -> None:
        path = self.root / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class UrlPlace:
    """The same in a bucket or on a server, through fsspec."""

    def __init__(self, url: str):
        self.files, self.root = url_place(url, "--mirror")

    def names(self, folder: str = "") -> list[str]:
        self.files.invalidate_cache()
        place = f"{self.root}/{folder}".rstrip("/")
        if not self.files.exists(place):
            return []
        paths = self.files.ls(place, detail=False)
        return [path.rstrip("/").rpartition("/")[2] for path in paths]

    def put(self, file: Path, name: str) -> None:
        path = f"{self.root}/{name}"
        self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
        self.files.put_file(str(file), path)

    def put_again(self, old: str, name: str) -> None:
        self.files.cp_file(f"{self.root}/{old}", f"{self.root}/{name}")

    def get(self, name: str, file: Path) -> None:
        self.files.get_file(f"{self.root}/{name}", str(file))

    def remove(self, name: str) -> None:
        self.files.rm(f"{self.root}/{name}", recursive=True)


def open_place(where: str) -> FolderPlace | UrlPlace:
    if "://" in where:
        return UrlPlace(where)
    return FolderPlace(where)


MIRROR_WAIT_S = 600.0  # for the last copies, when a run has ended

Stamp = tuple[int, int, int]  # inode, time and size of a file, by which a new one is known


class Mirror:
    """Copies a run's files to a second place, in a thread: training waits for none of it, and
    where the place is slow or gone, the newest files are copied when it is back."""

    def __init__(self, where: str, out: Path, keep_last: int):
        self.where = where
        self.out = out
        self.keep_last = keep_last
        self.place = open_place(where)
        self.sent: dict[str, Stamp] = {}
        self.changed = threading.Condition()
        self.asked = self.done = 0
        self.fault: Exception | None = None
        threading.Thread(target=self.run, daemon=True).start()

    def renew(self) -> None:
        """Have the files copied that are new; what is under way is finished first."""
        with self.changed:
            self.asked += 1
            self.changed.notify_all()

    def run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.asked > self.done)
                goal = self.asked
            with Caught() as caught:
                self.copy()
            with self.changed:
                if caught.fault and not self.fault:
                    say(
                        f"warning: {self.where} cannot be written ({sentence(caught.fault)}); "
                        "training goes on, and it is tried again behind each checkpoint"
                    )
                if self.fault and not caught.fault:
                    say(f"{self.where} can be written again, and holds the newest files")
                self.fault = caught.fault
                self.done = goal
                self.changed.notify_all()

    def copy(self) -> None:
        """Copy what is new, checkpoints first, and drop numbered ones beyond keep_last."""
        files = [path for path in self.out.iterdir() if not path.name.startswith(".")]
        for path in sorted(files, key=lambda path: (path.suffix != ".pt", path.name)):
            if path.name == "ckpt_last.pt":  # the newest numbered one is
                continue
            with contextlib.suppress(FileNotFoundError):  # dropped since
                if path.suffix == ".pt" and (folder := parts_of(path)):
                    for part in sorted((self.out / folder).iterdir()):
                        self.send(part)
                self.send(path)
        names = self.place.names()
        stored = sorted(filter(NUMBERED.fullmatch, names), reverse=True)
        for name in stored[self.keep_last :]:
            self.place.remove(name)
            self.sent.pop(name, None)
        kept = {name[-11:-3] for name in stored[: self.keep_last]}  # their steps
        for folder in filter(PARTS.fullmatch, names):
            if folder[-14:-6] not in kept and not (self.out / folder).exists():
                self.place.remove(folder)

    def send(self, path: Path) -> None:
        """Copy a file where the place has another, or none, of that name."""
        name = path.relative_to(self.out).as_posix()
        state = path.stat()
        stamp = state.st_ino, state.st_mtime_ns, state.st_size
        if not path.is_file() or self.sent.get(name) == stamp:
            return
        for other, held in self.sent.items():
            if held == stamp:
                self.place.put_again(other, name)
                break
        else:
            self.place.put(path, name)
        self.sent[name] = stamp

    def wait(self) -> None:
        """Wait up to MIRROR_WAIT_S for what was asked for, and say so where it is in vain."""
        with self.changed:
            if not self.changed.wait_for(lambda: self.done >= self.asked, 2.0):
                say(f"copying to {self.where}")
            self.changed.wait_for(lambda: self.done >= self.asked, MIRROR_WAIT_S)
            if self.fault or self.done < self.asked:
                say(f"warning: {self.where} lacks the newest files, which are in {self.out}")


def fetch(place: FolderPlace | UrlPlace, name: str, out: Path) -> Path:
    """Fetch a file, and of a sharded checkpoint its folder before it."""
    path = out / name
    half = path.with_name(f".{path.name}.tmp")
    half.parent.mkdir(exist_ok=True)
    place.get(name, half)
    if path.suffix == ".pt" and (folder := parts_of(half)):
        for part in place.names(folder):
            fetch(place, f"{folder}/{part}", out)
    os.replace(half, path)
    return path


def fetch_run(place: FolderPlace | UrlPlace, out: Path) -> str:
    """Fetch the files of a run from its mirror, where it is further than the folder; the name of
    its checkpoint, or "" where nothing was fetched."""
    names = place.names()
    stored = sorted(filter(NUMBERED.fullmatch, names), reverse=True)
    own = [path.name for path in numbered(out)]
    newer = [name for name in stored if not own or name > own[0]]
    if newer:
        for other in set(names) - set(stored):
            if not PARTS.fullmatch(other):
                fetch(place, other, out)
    for name in newer:  # last, as by it a run is known to be fetched
        path = fetch(place, name, out)
        try:
            read_checkpoint(path, verify=True)
        except UserError as fault:
            say(f"warning: {fault.faults[0][0]}; trying the one before it")
            remove_checkpoint(path)
            continue
        link(path, out / "ckpt_last.pt")
        return name
    return ""


def restore_run(where: str, out: Path) -> None:
    """Continue from --mirror where it is further than --out_dir; UserError where it cannot be read
    and nothing else is there to continue from."""
    place = open_place(where)
    out.mkdir(parents=True, exist_ok=True)
    with Caught() as caught:
        if name := fetch_run(place, out):
            say(f"fetched {name} and its run from {where}")
    if not caught.fault:
        return
    if not numbered(out):
        raise UserError(
            f"--mirror {where} cannot be read ({sentence(caught.fault)})",
            "check its name and your rights to it, or drop --mirror to begin a new run",
        ) from caught.fault
    say(f"warning: {where} cannot be read ({sentence(caught.fault)}); going on with {out}")


def note_memory(out: Path, batch_size: int) -> None:
    """Leave word, for the next start of a run, that micro-batches of this size ran out of memory
    where the step could not be repeated."""
    with contextlib.suppress(OSError), atomic_write(out / ".memory", "w") as file:
        json.dump({"batch_size": batch_size}, file)


def noted_memory(out: Path) -> int:
    """The size of micro-batches that ran out of memory in this folder; 0 where none did."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        size = json.loads((out / ".memory").read_text(encoding="utf-8")).get("batch_size")
        if type(size) is int and size > 0:
            return size
    return 0


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


def open_wandb(run: RunSettings, out: Path, args: dict) -> Callable[[dict], None]:
    """A Weights & Biases run of its own for each --out_dir, which a resumed run continues."""
    wandb = need("wandb")
    name = out / "wandb_id"
    if not name.exists():
        name.write_text(os.urandom(8).hex(), encoding="utf-8")
    try:
        service = wandb.init(
            project=run.wandb,
            dir=str(out),
            config=args,
            allow_val_change=True,  # by a resumed run
            resume="allow",
            name=out.name,
            id=name.read_text(encoding="utf-8"),
        )
    except (wandb.Error, OSError, ValueError) as fault:  # no key, no network, a wrong project
        raise UserError(
            f"Weights & Biases cannot be used ({str(fault).splitlines()[0]})",
            "run `wandb login`, set WANDB_MODE=offline, or drop --wandb",
        ) from fault
    return lambda row: service.log(row, step=row["step"])


def open_tensorboard(out: Path, step: int) -> Callable[[dict], None]:
    tensorboard = need("torch.utils.tensorboard", "tensorboard")
    writer = tensorboard.SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def write(row: dict) -> None:
        for key, value in row.items():
            if "/" in key and value is not None:
                writer.add_scalar(key, value, row["step"])

    return write


def open_sinks(
    run: RunSettings,
    out: Path,
    step: int,
    args: dict,
) -> list[Callable[[dict], None]]:
    """Functions that take each row of metrics, one for each service, which is told the settings
    `args`."""
    sinks = []
    if run.wandb:
        sinks.append(open_wandb(run, out, args))
    if run.tensorboard:
        sinks.append(open_tensorboard(out, step))
    return sinks


def profiler(run: RunSettings, out: Path, talks: bool):
    """With --profile N: traces steps 5 to 4 + N of this start, and prints what took longest."""

    def show(trace) -> None:
        trace.export_chrome_trace(str(out / "profile.json.gz"))
        where = "device" if torch.cuda.is_available() else "cpu"
        say(
            trace.key_averages().table(f"self_{where}_time_total", row_limit=10),
            f"open {out / 'profile.json.gz'} in ui.perfetto.dev",
        )

    if not (run.profile and talks):
        return contextlib.nullcontext()
    when = torch.profiler.schedule(wait=3, warmup=1, active=run.profile, repeat=1)
    return torch.profiler.profile(schedule=when, on_trace_ready=show)


def report(prefix: str, names: tuple[str, ...], values: Iterable[float]) -> dict[str, float]:
    """Metrics under their prefix; bins of calibration as the one error they add up to."""
    row: dict[str, float] = {}
    bins = []
    for name, value in zip(names, values, strict=True):
        if name == "bin":
            bins.append(abs(value))
        else:
            row[f"{prefix}/{name}"] = value
    if bins:
        row[f"{prefix}/calibration_error"] = sum(bins)
    return row


def curve(values: list[float], width: int = 60, height: int = 8) -> str:
    """Numbers as a drawing for the terminal, from the first at the left to the last."""
    columns = [np.mean(part) for part in np.array_split(values, min(width, len(values)))]
    levels = np.linspace(max(columns), min(columns), height)
    return "\n".join(
        f"{level:7.3f} " + "".join(" █"[int(value >= level)] for value in columns)
        for level in levels
    )


SPIKE_WINDOW = 128  # steps that a step is compared with

SPIKE_LEAST = 32  # so many are needed to judge by

SPIKE_Z = 8.0  # robust deviations above the median, from which a figure is a spike

SPIKE_FLOOR = 0.05  # of the median: a deviation is at least so large

SPIKE_RISE = 0.1  # of the loss: what rises by less is no spike, however small the loss was

FAULT_RISE = 0.5  # of the loss: what rises by less comes back, as where a warm-up begins anew

FAULT_WINDOW = 100  # steps in which skipped steps are counted together

SPIKE_FAULT_WINDOW = 20  # the same for spikes of the loss: what is lost does not come back at once

FAULTS_MOST = 5  # in one of these windows; with more the run goes back to a checkpoint


class StepFigures(typing.NamedTuple):
    """What a step gave, on all ranks, and the numbers of its samples: `samples` from `first`."""

    step: int
    first: int
    samples: int
    loss: float
    norm: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class StepFault(typing.NamedTuple):
    """A step that was skipped, or a spike, and by how many deviations it stands out.

    `window` is the number of steps for which it counts towards going back: 0 for a small spike, and
    for one of the gradient alone, which clipping has made harmless.
    """

    figures: StepFigures
    kind: str
    z: float
    window: int


def robust_z(value: float, before: list[float]) -> float:
    """By how many deviations a value is above the median, measured by the median absolute
    deviation (Iglewicz and Hoaglin 1993)."""
    median = float(np.median(before))
    deviation = 1.4826 * float(np.median(np.abs(np.array(before) - median)))
    return (value - median) / max(deviation, SPIKE_FLOOR * abs(median), 1e-12)


class FaultWatch:
    """Notices the steps that went wrong, among those before them."""

    def __init__(self):
        self.before: deque[StepFigures] = deque(maxlen=SPIKE_WINDOW)
        self.faults: list[StepFault] = []

    def look(self, steps: Iterable[StepFigures]) -> list[StepFault]:
        """The faults among further steps."""
        found = []
        for one in steps:
            if not one.finite:
                found.append(StepFault(one, "skipped", math.inf, FAULT_WINDOW))
            elif one.norm == 0:
                continue  # as in grpo where all rewards are alike: it teaches and tells nothing
            elif spike := self.spike(one):
                found.append(spike)  # it is no measure for others
            else:
                self.before.append(one)
        self.faults += [fault for fault in found if fault.window]
        return found

    def spike(self, one: StepFigures) -> StepFault | None:
        """What is wrong with a step, measured by those before it."""
        if len(self.before) < SPIKE_LEAST:
            return None
        losses, norms = ([getattr(o, key) for o in self.before] for key in ("loss", "norm"))
        by_loss, by_norm = robust_z(one.loss, losses), robust_z(one.norm, norms)
        rise = one.loss - float(np.median(losses))
        high = by_loss > SPIKE_Z and rise > SPIKE_RISE
        if not high and by_norm <= SPIKE_Z:
            return None
        window = 0
        if high and rise > FAULT_RISE:
            window = SPIKE_FAULT_WINDOW
        return StepFault(one, "spike", max(by_loss, by_norm), window)

    def too_many(self, step: int) -> StepFault | None:
        """The first of more than FAULTS_MOST in the last steps, or None."""
        self.faults = [fault for fault in self.faults if fault.figures.step > step - fault.window]
        if len(self.faults) > FAULTS_MOST:
            return self.faults[0]
        return None


class Metrics:
    """What a run reports to its logs, services and progress line.

    Figures stay on the device until a row is due.
    """

    def __init__(
        self,
        out: Path,
        run: RunSettings,
        machine: Machine,
        flops: int,
        state: dict,
        names: tuple[str, ...] = ("loss",),
        args: dict | None = None,
    ):
        self.out = out
        self.run = run
        self.machine = machine
        self.flops = flops
        self.names = names
        zeros = (0.0,) * (len(names) + 2)  # the last one counts steps that were skipped
        sums = [*state.get("sums", zeros), 0.0][: len(zeros)]
        self.sums = torch.tensor(sums, device=machine.device)
        self.step = state.get("step", 0)
        self.steps = state.get("steps", 0)  # since the last row
        self.tokens = state.get("tokens", 0)
        self.latest: list[tuple[int, int, int, Tensor]] = []  # steps since the last row
        self.stopwatch = self.last_row = time.monotonic()
        self.timed_tokens = 0
        self.began = self.stopwatch - state.get("seconds", 0.0)  # earlier starts included
        self.progress = Progress("training", run.max_steps, "steps", self.step, machine.main)
        self.note = ""
        self.noted = self.stopwatch
        self.log = LogFile(out / "metrics.jsonl")
        self.samples_log = LogFile(out / "samples.jsonl")
        self.sinks: list[Callable[[dict], None]] = []
        if machine.main:
            for log in (self.log, self.samples_log):
                cut_log(log.path, self.step or -1)
            self.sinks = open_sinks(run, out, self.step, args or {})

    def add(
        self,
        step: int,
        losses: Tensor,
        norm: Tensor,
        tokens: int,
        first: int = 0,
        samples: int = 0,
    ) -> None:
        """One step: its mean losses and gradient norm, still on the device, its tokens, and which
        samples it saw. One that is not finite, and so was skipped, has no part in the means."""
        figures = torch.cat((losses.detach().float().view(-1), norm.detach().float().view(1)))
        good = figures.isfinite().all()
        self.sums[:-1] += torch.where(good, figures, 0.0)
        self.sums[-1] += ~good
        self.latest.append((step, first, samples, figures))
        self.step = step
        self.steps += 1
        self.tokens += tokens
        self.timed_tokens += tokens
        if self.machine.main and time.monotonic() - self.noted >= LINE_EVERY_S:
            self.renew_note()
        self.progress.update(step, self.note)

    def renew_note(self) -> None:
        """Between two rows: the loss of this rank since the last one, so that none shown is old."""
        loss = float(self.sums[0]) / self.steps
        self.note = f"{self.names[0]} {loss:.4f} {short(self.speed(self.last_row))} tok/s"
        self.noted = time.monotonic()

    def speed(self, since: float) -> float:
        """Tokens per second since the last row: of training alone `since` the stopwatch, which
        stands still meanwhile, or of all `since` that row."""
        return self.timed_tokens / max(time.monotonic() - since, 1e-9)

    def totals(self) -> list[float]:
        """Losses, gradient norm and skipped steps, summed since the last row; the losses are means
        over the ranks."""
        *losses, norm, skipped = self.sums.tolist()
        losses = [total / self.machine.world for total in self.machine.all_reduce_sum(*losses)]
        return [*losses, norm, skipped]

    def step_figures(self) -> list[StepFigures]:
        """The steps since the last row."""
        if not self.latest:
            return []
        found = torch.stack([figures for *_, figures in self.latest]).tolist()
        losses = self.machine.all_reduce_sum(*(loss for loss, *_ in found))
        rows = []
        for (step, first, samples, _), loss, (*_, norm) in zip(
            self.latest, losses, found, strict=True
        ):
            rows.append(StepFigures(step, first, samples, loss / self.machine.world, norm))
        self.latest.clear()
        return rows

    def row(self, lr: float) -> dict:
        """The figures since the last row, which starts the next."""
        *sums, skipped = self.totals()
        means = [total / max(1, self.steps - skipped) for total in sums]
        speed, overall = self.speed(self.stopwatch), self.speed(self.last_row)
        peak = peak_flops(self.machine.device)
        mfu = None
        if peak:
            mfu = speed * self.flops / (peak * self.machine.world)
        row = {}
        self.note = f"every step was skipped, lr {lr:.2e} {short(overall)} tok/s"
        if skipped < self.steps:
            row = {**report("train", self.names, means[:-1]), "train/grad_norm": means[-1]}
            loss = f"loss {row[f'train/{self.names[0]}']:.4f}"
            self.note = f"{loss} lr {lr:.2e} {short(overall)} tok/s"
        if skipped:
            row["train/skipped"] = int(skipped)
        row |= {
            "train/lr": lr,
            "perf/tok_per_s": round(speed, 1),
            "perf/wall_tok_per_s": round(overall, 1),
            "perf/mfu": mfu,
        }
        if on_cuda(self.machine.device):
            row["gpu/memory_gb"] = torch.cuda.max_memory_allocated(self.machine.device) / 1e9
        if self.run.usd_per_hour:
            row["cost/usd"] = self.elapsed() / 3600 * self.run.usd_per_hour

        if mfu is not None:
            self.note += f" mfu {mfu:.1%}"
        if "cost/usd" in row:
            self.note += f" ${row['cost/usd']:.2f}"
        self.noted = self.stopwatch = self.last_row = time.monotonic()
        self.sums.zero_()
        self.steps = 0
        self.timed_tokens = 0
        return row

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def write(self, row: dict) -> None:
        """One line of metrics.jsonl and of each service, unless the row is empty."""
        if not row or not self.machine.main:
            return
        row = {"step": self.step, "tokens": self.tokens, "time": round(self.elapsed(), 3), **row}
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                row[key] = None
        self.log.write(row)
        for sink in self.sinks:
            sink(row)

    def write_samples(self, rows: list[dict], aloud: bool = True) -> None:
        """Answers of the model, a line each in samples.jsonl and, `aloud`, on the terminal."""
        self.samples_log.write(*({"step": self.step, **row} for row in rows))
        if not aloud:
            return
        for row in rows:
            line = f"  {row['prompt']!r} -> {row['answer']!r}"
            if "reward" in row:
                line += f"  reward {row['reward']:.2f}"
            say(line)

    @contextlib.contextmanager
    def aside(self):
        """Time spent here, in evaluation or saving, does not count as training speed."""
        began = time.monotonic()
        yield
        self.stopwatch += time.monotonic() - began

    def state(self) -> dict:
        """What a resumed run's log continues from; every rank calls it, as each has its losses."""
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


NOT_SAME = {  # what differs, where no flag of the name says it
    "data_key": "other rows in --data",
    "reference": "another reference, or none",
    "lora_base": "it adapts another model",
}

RESUMED = {  # fields of a checkpoint that a run resumes from, and their types
    "step": int,
    "samples": int,
    "best_val": (int, float),
    "optim": list,
    "args": dict,
    "gauges": dict,
    "tokenizer": bytes,
    "scaler": dict,
    "rng": dict,
}

GAUGES = {"sums": (list, tuple), "step": int, "steps": int, "tokens": int, "seconds": (int, float)}


@dataclass
class Job:
    """What a trainer gives the loop.

    evaluate(module, run) and samples(model) run on every rank. The best checkpoint is that of the
    lowest `best` metric, or of the highest with `maximise`. `names` are those of the loss's sums;
    `lora` describes adapters and their base.
    """

    kind: str
    model: Transformer
    loss: Callable[..., Tensor]
    stream: Stream
    evaluate: Callable[[nn.Module, RunSettings], dict[str, float]]
    tokenizer: Tokenizer
    names: tuple[str, ...] = ("loss",)
    samples: Callable[[Transformer], list[dict]] | None = None
    lora: dict | None = None
    best: str = "val/loss"
    maximise: bool = False
    begin: Callable[[], None] | None = None  # done to the model of a new run
    init: str = "normal"  # what embedding and head begin with

    def step_samples(self, run: RunSettings, world: int) -> int:
        return self.stream.per_step or run.batch_size * run.grad_accum_steps * world

    @property
    def command(self) -> str:
        return command_of(self.kind)

    @property
    def sample_tokens(self) -> float:
        return self.stream.tokens / self.stream.count


def plan_memory(
    config: ModelSettings,
    settings: StepSettings,
    optim: OptimSettings,
    devices: int = 1,
) -> dict[str, float]:
    """Bytes on each of so many devices: weights, gradients, optimizer, activations (bf16, fused
    attention); as Rajbhandari et al. 2020 (ZeRO), figure 1, but with fp32 gradients."""
    counts = parameter_counts(config)
    total = counts["total"]
    tokens = settings.micro_batch * config.seq_len
    active = config.n_expert_active if config.n_expert else 1
    heads = config.head_size * (config.n_head + config.kv_heads)
    layer = 4 * (heads + 3 * config.d_model + 2 * config.ffn_width * active)
    activations = layer * config.n_layer
    if settings.grad_checkpoint:  # of most layers only the input is kept
        activations = 2 * config.d_model * config.n_layer + layer

    optimizer = 8 * total
    if optim.optimizer == "muon":
        optimizer -= 4 * counts["blocks"]
    if optim.ema:
        optimizer += 4 * total
    logits = min(tokens, LOSS_ROWS) * config.vocab_size * 10
    planned = {
        "weights": 6 * total,  # fp32, and the bf16 copies that matmuls read
        "gradients": 4 * total,
        "optimizer": optimizer,
        "activations": tokens * activations + logits,
    }
    stage = settings.zero if devices > 1 else 0
    if not stage and not settings.offload:
        return planned
    stage = stage or 3
    share = 1 / (settings.zero_group or devices)
    ends = counts["embedding"] + counts["head"]
    own = 0 if settings.offload else share
    present = ends + 2 * counts["blocks"] / config.n_layer  # one layer computes, one is on its way
    gathered = 2 * (total if stage < 3 else present) + 2 * ends  # the ends stay fp32
    planned["weights"] = 4 * total * own + gathered
    planned["gradients"] = 4 * (total if stage < 2 else total * own + present)
    planned["optimizer"] = optimizer * own
    return planned


def use_fp8(model: Transformer, machine: Machine) -> None:
    """Train in 8 bits; UserError where the device, or the model, is not made for it."""
    device = machine.device
    if not on_cuda(device) or torch.cuda.get_device_capability(device) < (9, 0):
        raise UserError("--fp8 needs an NVIDIA GPU of the Hopper generation or newer", "drop it")
    if machine.dtype != torch.bfloat16:
        raise UserError("--fp8 needs --dtype bf16", "drop one of them")
    if not attach_fp8(model):
        raise UserError(
            f"--fp8: no matrix of this model has {FP8_LEAST} rows and columns",
            "drop it: it pays from about 1B parameters",
        )


def wants_compile(choice: str, flops: float, machine: Machine) -> bool:
    """Whether to compile: as --compile says, or by the estimated length of the whole run."""
    if choice != "auto":
        return choice == "1"
    # Good enough to choose by, too rough to print: the first steps of a run measure its time.
    speed = ASSUMED_FLOPS.get((machine.device.type, machine.dtype))
    if not speed:
        speed = 0.3 * (peak_flops(machine.device) or 1e14)
    if flops / speed / machine.world < COMPILE_REPAYS_S:
        say("not compiling: the run is short (--compile 1 compiles)")
        return False
    if not can_compile(machine.device):
        say("not compiling: there is no C++ compiler")
        return False
    say("compiling first: it takes a minute or more (--compile 0 skips it)")
    return True


def damaged_field(name: str) -> UserError:
    return UserError(
        f"the newest checkpoint is damaged (its field {name})",
        "remove it: the one before it is used then",
    )


def moments_of(optimizer: torch.optim.Optimizer) -> set[str]:
    """What it remembers of a weight."""
    return {"momentum"} if isinstance(optimizer, Muon) else {"step", "exp_avg", "exp_avg_sq"}


def load_optimizers(
    optimizers: list[torch.optim.Optimizer],
    states: list[dict],
    field_name: str = "optim",
) -> None:
    """Their states as saved, under the flags of this start; UserError where they do not fit."""
    try:
        for optimizer, saved in zip(optimizers, states, strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            found = {}
            for i, state in saved["state"].items():
                refuse(state.keys() != moments_of(optimizer), "other moments")
                kinds = [value.dtype for value in state.values()]
                refuse(not all(kind.is_floating_point for kind in kinds), "no numbers")
                like = params[i].detach()
                found[i] = {
                    key: shard_like(value, like) for key, value in state.items() if key != "step"
                }
                if "step" in state:
                    found[i]["step"] = state["step"].reshape(())
            optimizer.load_state_dict({**optimizer.state_dict(), "state": found})
    except BROKEN as fault:
        raise damaged_field(field_name) from fault


FIRST_CKPT_S = 60.0  # after a start, where --ckpt_minutes is on

ESTIMATE_AFTER_S = 5.0  # of steps, from which the time of the others is told

PACED_STEPS = 3  # whose pace a plan follows

ROLLBACKS_MOST = 3  # of one start; a run that needs more has another fault than its data


class RollBack(Exception):
    """A run must go back to a checkpoint of `before` that step, and go on with sample `samples`."""

    def __init__(self, before: int, samples: int, told: str):
        super().__init__(told)
        self.before = before
        self.samples = samples
        self.told = told


class Wishes(typing.NamedTuple):
    """What a rank asks of all, exchanged with each step's counts: to stop, to save, and to have
    smaller micro-batches."""

    stop: bool = False
    save: bool = False
    smaller: bool = False


@contextlib.contextmanager
def stall_watch() -> Iterator[None]:
    """The watch over steps that take too long, which each step sets anew, ends with the block."""
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def write_args(out: Path, text: str) -> None:
    with atomic_write(out / "args.txt", "w") as file:
        file.write(text)


EVAL_SPEED = 3  # tokens that are evaluated in the time of one that is trained on


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
        saved = saved or {}  # the model has its weights
        sizes = {"batch_size": run.micro_batch, "grad_accum_steps": max(1, run.grad_accum_steps)}
        run = replace(run, **sizes)  # as choose_step left them
        self.job = job
        self.machine = machine
        self.run = run
        self.optim = optim
        self.args = args
        self.out = Path(run.out_dir)
        self.step = saved.get("step", 0)
        self.samples = saved.get("samples", 0)
        self.best_val = saved.get("best_val", math.inf)
        self.best_is_new = False
        self.args_text = ""  # of args.txt
        self.fitting = False  # rather than measured
        self.events = Events(self.out, machine)
        self.watch = FaultWatch()
        self.mirror: Mirror | None = None
        if run.mirror and machine.main:
            self.mirror = Mirror(run.mirror, self.out, run.keep_last)
        self.writer = Writer(self.mirror.renew if self.mirror else int)
        self.shard_writer: ShardWriter | None = None
        self.ahead = Ahead(self.step_batch)
        self.began = self.saved_at = self.step_at = time.monotonic()
        self.step_s = 0.0  # of the latest step
        self.begin_step = self.step  # of this start
        self.first: tuple[int, float] | None = None  # step and time where the pace is counted from
        self.eval_s = 0.0  # of the latest evaluation
        self.estimated = False  # whether the time of the run was told
        self.ever_saved = False  # in this start
        self.short_of_memory = False  # since the last step, on this rank
        self.exchanging = False  # gradients with other ranks

        self.scaler = torch.amp.GradScaler(
            machine.device.type, enabled=machine.dtype == torch.float16
        )
        if saved.get("scaler"):
            self.scaler.load_state_dict(saved["scaler"])

        flops = flops_per_token(job.model.config)
        self.step_samples = job.step_samples(run, machine.world)
        total = float(flops) * run.max_steps * self.step_samples * job.sample_tokens
        self.compiled = wants_compile(run.compile, total, machine)
        self.sharded = divides(run, machine)
        self.objective, self.wrapped = self.wrap(Objective(job.model, job.loss))
        if run.sharded_ckpt:
            self.shard_writer = ShardWriter()
        self.ema: EMA | None = None
        if optim.ema:
            self.ema = EMA(job.model, optim.ema, saved.get("ema"))
        self.optimizers = make_optimizers(job.model, optim, machine, self.compiled)
        self.falling = False  # whether the learning rate is, by wsd
        if saved:
            load_optimizers(self.optimizers, saved["optim"])
        self.metrics = Metrics(
            self.out,
            run,
            machine,
            flops,
            saved.get("gauges", {}),
            job.names,
            {**args, **asdict(run), **asdict(optim), **asdict(job.model.config)},
        )

    def wrap(self, objective: Objective) -> tuple[nn.Module, nn.Module]:
        """An objective as it is evaluated and as it is trained: compiled, and sharded or repeated
        over the ranks."""
        if self.sharded:
            root = shard(objective, self.machine, self.run, self.compiled)
            return root, root
        module = compiled(objective) if self.compiled else objective
        return module, distribute(module, self.machine)

    def averaged(self):
        """The model has its averaged weights inside the block, where --ema asks for them."""
        if self.ema:
            return self.ema.in_place()
        return contextlib.nullcontext()

    def checkpoint(self) -> dict:
        """All that a run resumes from; of a sharded model, for which all ranks must ask, whole on
        rank 0, or in shards where they are written as such."""
        saved = self.state()
        if self.sharded and not self.run.sharded_ckpt:
            return gathered(saved, self.machine)
        return saved

    def state(self) -> dict:
        """All that a run resumes from, as this rank has it."""
        model, lora = self.job.model, self.job.lora
        weights = trained_weights(model) if lora else state_of(model)
        return {
            "format": CHECKPOINT_FORMAT,
            "kind": self.job.kind,
            "dtype": str(self.machine.dtype).removeprefix("torch."),
            "step": self.step,
            "samples": self.samples,
            "best_val": self.best_val,
            "model": weights,
            "config": asdict(model.config),
            "lora": lora,
            "optim": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.weights if self.ema else None,
            "rng": {"seed": self.args["seed"]},  # each step is seeded by (seed, step, rank)
            "args": {
                **self.args,
                "step_samples": self.step_samples,
                "planned_steps": self.run.max_steps,
                "rates": [getattr(self.optim, name) for name in CHOSEN_RATES],
            },
            "gauges": self.metrics.state(),
            "tokenizer": self.job.tokenizer.data,
        }

    def due(self, interval: int) -> bool:
        return self.step % interval == 0 or self.step == self.run.max_steps

    def wishes(self, stop: int) -> Wishes:
        """What this rank asks for, which was told to `stop` or not."""
        now, run = time.monotonic(), self.run
        late = run.max_hours and now - self.began + self.step_s > run.max_hours * 3600
        save = False
        if run.ckpt_minutes:
            wait = run.ckpt_minutes * 60
            if not self.ever_saved:
                wait = min(FIRST_CKPT_S, wait)
            save = now - self.saved_at > wait
        return Wishes(bool(stop or late), save and self.machine.main, self.short_of_memory)

    def agree(self, stop: int, *numbers: float) -> tuple[Wishes, list[float]]:
        """What all ranks do, and these numbers summed over them; the step begins here."""
        now = time.monotonic()
        self.step_s, self.step_at = now - self.step_at, now
        if self.fitting and self.run.stall_minutes and hasattr(sys.stderr, "fileno"):
            # stderr is no file, or no memory is left for a thread
            with contextlib.suppress(io.UnsupportedOperation, RuntimeError):
                faulthandler.dump_traceback_later(self.run.stall_minutes * 60, exit=True)
        mine = self.wishes(stop)
        planned = 0
        if self.machine.main:
            planned = self.planned_steps(now)
            self.tell_time_left(now, planned)
        found = self.machine.all_reduce_sum(*mine, planned, *numbers)
        wishes = Wishes(*(total > 0 for total in found[: len(mine)]))
        if wishes.smaller:
            self.use_smaller_batches()
        if self.run.budget:
            self.run = replace(self.run, max_steps=int(found[len(mine)]))
            self.metrics.progress.expect(self.run.max_steps)
        return wishes, found[len(mine) + 1 :]

    def pace(self, now: float) -> float:
        """Seconds a step of this start took, but for the first, which compiles; 0 until a few are
        done, or a good part of the --time is over."""
        if not self.first:
            if self.step > self.begin_step:
                self.first = self.step, now
            return 0.0
        steps, seconds = self.step - self.first[0], now - self.first[1]
        if steps < 1 or (steps < PACED_STEPS and seconds < 0.05 * self.run.budget):
            return 0.0
        return seconds / steps

    def planned_steps(self, now: float) -> int:
        """The steps of the run: where it has a --time, as many as it has room for."""
        run, pace = self.run, self.pace(now)
        if not run.budget:
            return run.max_steps
        if not pace:
            return max(run.max_steps, self.step + PACED_STEPS)
        last = self.eval_s
        if not last:
            last = pace * run.eval_tokens / EVAL_SPEED / max(1, self.step_tokens)
        left = run.budget - self.metrics.elapsed() - last
        return self.step + max(1, int(left / pace))

    def tell_time_left(self, now: float, steps: int) -> None:
        """Once, as soon as the first steps have shown it."""
        pace = self.pace(now)
        if self.estimated or not pace or now - self.first[1] < ESTIMATE_AFTER_S:
            return
        self.estimated = True
        left = steps - self.step
        say_aside(f"about {duration(pace * left)} for {left:,} more steps")

    @property
    def step_tokens(self) -> float:
        return self.step_samples * self.job.sample_tokens

    def use_smaller_batches(self) -> None:
        """Halve the micro-batches of the steps to come, on all ranks; a step stays what it is."""
        self.short_of_memory = False
        run = self.run
        share = run.batch_size * run.grad_accum_steps
        if self.job.stream.per_step:
            share = run.batch_size
        if run.batch_size < 2:
            return
        size = max(n for n in divisors(share) if n <= run.batch_size // 2)
        accum = run.grad_accum_steps
        if not self.job.stream.per_step:
            accum = share // size
        self.run = replace(run, batch_size=size, grad_accum_steps=accum)
        self.ahead.forget()
        self.events.add(
            self.step,
            "memory",
            f"memory ran out at step {self.step}, which was repeated: micro-batches of {size} "
            f"instead of {run.batch_size} sequences from here on",
            batch_size=size,
        )

    def next_batch(self) -> StepBatch:
        return self.ahead.take(self.samples)

    def train_step(self, stop: int = 0) -> Wishes:
        """One optimizer step over all ranks, and what they wished for."""
        run, machine = self.run, self.machine
        batch = self.next_batch()
        wishes, (targets, tokens) = self.agree(stop, batch.targets, batch.tokens)
        seed_step(self.args["seed"], self.step, machine.rank)
        lr = set_step(self.optimizers, self.optim, *self.schedule_place())
        losses = sum(self.accumulate(self.wrapped, batch.micros, machine.world / targets))
        norm = self.update(self.job.model, self.optimizers)
        self.count_step()
        first, self.samples = self.samples, self.samples + batch.samples
        self.metrics.add(self.step, losses, norm, int(tokens), first, batch.samples)
        row = {}
        if self.due(run.log_interval):
            row = self.metrics.row(lr)
            self.judge_steps()
        if self.due(run.eval_interval):
            row |= self.evaluate()
        self.metrics.write(row)
        return wishes

    def schedule_place(self) -> tuple[int, int]:
        """The step, and the steps in all, that the learning rate follows."""
        return self.step, self.run.max_steps

    def judge_steps(self) -> None:
        """Write down the latest steps that went wrong; where there are too many, go back."""
        for fault in self.watch.look(self.metrics.step_figures()):
            one = fault.figures
            facts = {"loss": one.loss, "grad_norm": one.norm, "deviations": fault.z}
            facts = {key: value if math.isfinite(value) else None for key, value in facts.items()}
            facts["samples"] = [one.first, one.first + one.samples]
            self.events.note(one.step, fault.kind, **facts)
        first = self.watch.too_many(self.step)
        if first:
            raise RollBack(
                first.figures.step - 1,
                self.samples,
                f"the loss or its gradient is NaN or infinite, or far from those before, in "
                f"{len(self.watch.faults)} of the steps {first.figures.step}–{self.step}",
            )

    def step_batch(self, first: int) -> StepBatch:
        """This rank's share of the step whose first sample is `first`, ready for the device."""
        run, machine = self.run, self.machine
        size = run.batch_size, run.grad_accum_steps
        batch = self.job.stream.step(first, *size, machine.rank, machine.world)
        if not on_cuda(machine.device):
            return batch
        torch.cuda.set_device(machine.device)  # of this thread: else rank 1 would pin on device 0
        pinned = [type(micro)(*(tensor.pin_memory() for tensor in micro)) for micro in batch.micros]
        return replace(batch, micros=pinned)

    def count_step(self) -> None:
        self.step += 1
        if self.ema:
            self.ema.update(self.step)

    def accumulate(
        self,
        wrapped: nn.Module,
        micros: Iterable[tuple[Tensor, ...]],
        scale: float,
    ) -> list[Tensor]:
        """Accumulate the gradient of the micro-batches' losses times `scale`; these, one by one.

        Where memory runs out it is done again in halves of them, of which each has its losses then,
        unless gradients were on their way to other ranks.
        """
        micros = list(micros)
        while True:
            try:
                return self.accumulate_once(wrapped, micros, scale)
            except (MemoryError, RuntimeError) as fault:  # torch.OutOfMemoryError is one
                smaller = [half for micro in micros for half in halves(micro)]
                if not out_of_memory(fault):
                    raise
                if len(smaller) == len(micros):
                    raise self.too_long() from fault
                if self.exchanging or (self.sharded and self.machine.world > 1):
                    raise
            # Behind the handler, as the fault holds what the step had in memory.
            micros = smaller
            wrapped.zero_grad(set_to_none=True)
            free_memory(self.machine.device)
            self.short_of_memory = True

    def too_long(self) -> UserError:
        """The sentence for a micro-batch of one sample that memory does not hold."""
        return UserError(
            f"memory ran out with one sample of --seq_len {self.job.model.config.seq_len} at a "
            "time, which is not divided among devices",
            "use --grad_checkpoint 1, --zero 3 on several devices, a shorter --seq_len or a "
            "smaller model",
        )

    def accumulate_once(
        self,
        wrapped: nn.Module,
        micros: list[tuple[Tensor, ...]],
        scale: float,
    ) -> list[Tensor]:
        found = []
        self.exchanging = False
        for i, micro in enumerate(micros):
            last = i + 1 == len(micros)
            tensors = [self.machine.to_device(tensor) for tensor in micro]
            with no_sync(wrapped, last):
                with self.machine.autocast():
                    losses = wrapped(*tensors) * scale
                self.exchanging = last and self.machine.world > 1
                self.scaler.scale(losses[0]).backward()
            found.append(losses.detach())
        self.exchanging = False
        return found

    def update(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Tensor:
        """Clip, step and clear; the gradient norm before clipping. Where it is not finite, the
        same on all ranks, the step changes nothing."""
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), self.optim.grad_clip or math.inf)
        norm = whole(norm)
        if self.scaler.is_enabled() and not norm.isfinite():
            norm = torch.zeros_like(norm)  # fp16 overflows now and then: no optimiser steps
        else:
            bad = ~norm.isfinite()
            if self.run.offload:  # the optimizer's numbers are in the host's memory
                bad = bad.cpu()
            for optimizer in optimizers:
                if not self.scaler.is_enabled():
                    skip_where(optimizer, bad)
                self.scaler.step(optimizer)
        model.zero_grad(set_to_none=True)
        self.scaler.update()
        return norm

    def evaluate(self, keep_best: bool = True) -> dict[str, float]:
        """Validation metrics; unless `keep_best` is off, a new best is saved at once."""
        began = time.monotonic()
        with self.metrics.aside(), self.averaged():
            row = self.measure_model()
            if keep_best and self.job.best in row and self.is_best(row[self.job.best]):
                self.best_val = row[self.job.best]
                if self.ema:
                    self.save_best()
                else:
                    self.best_is_new = True  # and is saved when the step is over
        self.eval_s = time.monotonic() - began
        if self.machine.main and not self.metrics.progress.bar and row:
            figures = " ".join(f"{key} {value:.4f}" for key, value in row.items())
            say_aside(f"step {self.step}: {figures}")
        return row

    def is_best(self, value: float) -> bool:
        """Whether a value of the metric Job.best is the best so far, or as good."""
        if self.best_val == math.inf:  # the first
            return True
        if self.job.maximise:
            return value >= self.best_val
        return value <= self.best_val

    def measure_model(self) -> dict[str, float]:
        """The metrics of Job.evaluate, in evaluation mode; samples are written and printed."""
        self.objective.eval()
        with torch.no_grad(), self.machine.autocast():
            row = self.job.evaluate(self.objective, self.run)
            if self.job.samples:
                rows = self.job.samples(self.job.model)
                if self.machine.main:
                    self.metrics.write_samples(rows)
        self.objective.train()
        if not math.isfinite(sum(row.values())):
            told = f"the evaluation at step {self.step} gave NaN or infinity"
            raise RollBack(self.step - 1, self.samples, told)
        return row

    def save_best(self) -> None:
        """Write ckpt_best.pt, of the weights that the model has now."""
        self.write("ckpt_best", save_checkpoint, self.out / "ckpt_best.pt", self.checkpoint())

    def write(
        self,
        name: str,
        work: Callable,
        where: Path,
        saved: dict,
        *args,
        best: bool = True,
    ) -> None:
        """Have rank 0 write a checkpoint, of which it takes a copy at once; all ranks write the
        shards in it, to a folder that begins with `name`."""
        folder = self.out / f"{name}_{self.step:08d}.parts"
        if self.shard_writer:
            self.machine.on_main(self.writer.settle)
            saved = self.shard_writer.begin(folder, saved)

        def begin() -> None:
            gathers = self.sharded and not self.shard_writer
            copied = saved if gathers else on_host(saved)
            if on_cuda(self.machine.device):
                torch.cuda.synchronize()  # the copies
            if self.args_text and not (self.out / "args.txt").exists():  # somebody removed it
                with contextlib.suppress(OSError):
                    write_args(self.out, self.args_text)
            write = functools.partial(work, where, copied, *args)
            if self.shard_writer:
                write = functools.partial(
                    after_shards, self.shard_writer.future, folder, copied, write
                )
            self.writer.submit(write, best=best)

        self.machine.on_main(begin)

    def save(self, numbered: bool) -> None:
        """Write the checkpoints that are due, once: the `numbered` one, the best if it is new, and
        that before the decay; averaged weights are the best ones, and were written when they were
        measured."""
        best, self.best_is_new = self.best_is_new, False
        also = ["ckpt_best.pt"] * best + [STABLE] * self.before_decay()
        if not numbered and not also:
            return
        with self.metrics.aside():
            saved = self.checkpoint()
            if not numbered:
                for name in also:
                    self.write(name.removesuffix(".pt"), save_checkpoint, self.out / name, saved)
                return
            self.write(
                "ckpt", save_step, self.out, saved, self.run.keep_last, also, best=bool(also)
            )
            self.saved_at = time.monotonic()
            self.ever_saved = True

    def past_decay_begin(self) -> bool:
        """Whether the learning rate falls from this step on, under wsd."""
        step, steps = self.schedule_place()
        begin = int(decay_begin(self.optim, steps))
        return self.optim.schedule.startswith("wsd") and 0 < begin <= step < steps

    def before_decay(self) -> bool:
        """Whether the next step is the first whose learning rate falls, under wsd; to be asked
        once a step."""
        before, self.falling = self.falling, self.past_decay_begin()
        return self.falling and not before

    def fit(self) -> int:
        """Train to max_steps or to a signal; the exit code."""
        self.fitting = True
        self.falling = self.past_decay_begin()  # of a run that was stopped behind it
        self.objective.train()
        with (
            Signals() as signals,
            profiler(self.run, self.out, self.machine.main) as trace,
            stall_watch(),
        ):
            stop = False
            while self.step < self.run.max_steps and not stop:
                wishes = self.train_step(signals.received)
                stop = wishes.stop
                if trace:
                    trace.step()
                self.save(stop or wishes.save or self.due(self.run.ckpt_interval))
            self.wait_for_writer()
        self.metrics.progress.close()
        if self.step < self.run.max_steps:
            self.finish_mirror()
            self.say_how_to_resume()
            return 128 + (signals.received or signal.SIGTERM)
        with self.averaged():
            if self.ema and self.best_val == math.inf:  # nothing was evaluated: the last is best
                self.save_best()
            if not self.job.lora and not self.shard_writer:
                weights = gathered(state_of(self.job.model), self.machine)
                self.machine.on_main(
                    save_weights, self.out, weights, self.job.model.config, self.job.tokenizer
                )
        self.wait_for_writer()
        self.finish_mirror()
        return 0

    def wait_for_writer(self) -> None:
        if self.shard_writer:
            self.shard_writer.wait()
        self.machine.on_main(self.writer.wait)

    def finish_mirror(self) -> None:
        if self.mirror:
            self.mirror.renew()
            self.mirror.wait()

    def say_how_to_resume(self) -> None:
        launcher = "python"
        if self.machine.world > 1:
            launcher = f"torchrun --nproc_per_node={self.machine.world}"
        args = shlex.quote(str(self.out / "args.txt"))
        say(
            f"stopped at step {self.step} and saved; resume with:",
            f"  {launcher} {PROGRAM} {self.job.command} @{args}",
        )


def share_of_step(samples: int, world: int) -> int:
    """A rank's sequences of a step of so many."""
    share, rest = divmod(samples, world)
    if rest:
        raise UserError(
            f"a step of {samples} sequences cannot be divided among {world} ranks",
            "give new --batch_size and --grad_accum_steps",
        )
    return share


def keep_step_size(run: RunSettings, saved: dict, world: int) -> RunSettings:
    """Keep the size of a step on another number of ranks, unless new flags say what it is."""
    old, now = saved["args"], run.batch_size * max(1, run.grad_accum_steps) * world
    same = (old["batch_size"], old["grad_accum_steps"]) == (run.batch_size, run.grad_accum_steps)
    if now == old["step_samples"] or not same:
        return run
    share = share_of_step(old["step_samples"], world)
    batch_size = max(size for size in divisors(share) if size <= run.batch_size)
    run = replace(run, batch_size=batch_size, grad_accum_steps=share // batch_size)
    say(
        f"resuming on {world} ranks: --batch_size {run.batch_size} --grad_accum_steps "
        f"{run.grad_accum_steps} keeps a step at {old['step_samples']} sequences"
    )
    return run


STEP_TOKENS = (  # (parameters, tokens of a step from there on): small models learn from small steps
    (0, 1 << 15),
    (10e6, 1 << 16),
    (30e6, 1 << 17),
    (60e6, 1 << 18),
    (100e6, 1 << 19),  # GPT-2 124M's and nanochat's, up to 700M
    (1e9, 1 << 20),
)

MICRO_TOKENS = 1 << 17  # of a micro-batch: more does not train faster

CPU_STEP = 1 << 10, 1 << 16  # fewest and most tokens: Muon takes as long for any

MEMORY_USED = 0.85  # of a device's memory, by plan


def step_tokens(parameters: int) -> int:
    """Tokens of an optimizer step that a model of such a size learns well from."""
    return max(tokens for least, tokens in STEP_TOKENS if parameters >= least)


CPU_MICRO_TOKENS = 1 << 13


def step_tokens_for(tokens: float) -> float:
    """Tokens of a step for a run on so many (Li et al. 2025, "Predictable Scale", eq. 2), where
    a device does not need more to be busy: a CPU."""
    least, most = CPU_STEP
    return max(least, min(most, 0.58 * tokens**0.571))


def device_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


def largest_batch(job: Job, machine: Machine, run: RunSettings, optim: OptimSettings) -> int:
    """The largest power of two of samples whose planned memory the device has; at least 1."""
    config, rows = job.model.config, 1
    if not job.stream.per_step:
        rows = len(job.stream.collate(job.stream.items(np.array([0]))).ids)  # of a pair 2
    size = max(1, MICRO_TOKENS // (config.seq_len * rows))
    size = 1 << (size.bit_length() - 1)
    room = MEMORY_USED * device_memory(machine.device)
    while size > 1:
        sized = replace(run, batch_size=size * rows)
        planned = plan_memory(config, sized, optim, machine.world)
        if sum(planned.values()) <= room:
            break
        size //= 2
    return size


def measured_speed(job: Job, machine: Machine) -> float:
    """Tokens a second that all ranks train on, about: on a CPU measured, elsewhere by what the
    device can do; 0 where a sample is made only in its step."""
    if job.stream.per_step:
        return 0.0
    if machine.device.type != "cpu":
        peak = peak_flops(machine.device) or 1e14
        return 0.3 * peak * machine.world / flops_per_token(job.model.config)
    model = job.model.train()
    places = np.arange(min(4, job.stream.count))
    tensors = job.stream.collate(job.stream.items(places))
    seconds = math.inf
    for _ in range(2):
        began = time.monotonic()
        with machine.autocast():
            losses = job.loss(model, *tensors).reshape(-1)
        losses[0].backward()
        model.zero_grad(set_to_none=True)
        seconds = min(seconds, time.monotonic() - began)
    return machine.all_reduce_sum(tensors[0].numel() / max(seconds, 1e-9))[0]


def steps_of(
    run: RunSettings,
    job: Job,
    machine: Machine,
    saved: dict | None,
    tokens: float,
) -> int:
    """The steps of a run: as given, or for so many tokens; of a --time that is over, those that
    were done."""
    steps = tokens / job.sample_tokens / job.step_samples(run, machine.world)
    if not run.budget:
        return run.max_steps or max(1, math.ceil(round(steps, 6)))
    if not saved:
        return max(1, round(steps) or run.max_steps)
    args, done = saved["args"], saved["step"]
    if args.get("time") == run.time and args.get("planned_steps") == done:
        return done
    left = max(0.0, 1 - saved["gauges"]["seconds"] / run.budget)
    return done + max(1, round(steps * left))


def choose_step(
    run: RunSettings,
    job: Job,
    machine: Machine,
    optim: OptimSettings,
    samples: int,
    tokens: float = 0.0,
) -> RunSettings:
    """The run with the sizes of its step: where --batch_size is automatic, what the device holds,
    accumulated to `samples`, or where that is 0 to a size that suits the model; on a CPU one that
    suits a run of so many `tokens`, where that is known."""
    accum, cuda = run.grad_accum_steps, on_cuda(machine.device)
    if run.batch_size:
        return replace(run, grad_accum_steps=accum or 1)
    size = largest_batch(job, machine, run, optim) if cuda else run.micro_batch
    if job.stream.per_step:
        return replace(run, batch_size=size, grad_accum_steps=1)
    if accum and not samples:
        return replace(run, batch_size=size)
    if not samples and cuda and job.kind == "train":
        wanted = step_tokens(parameter_counts(job.model.config)["total"])
        share = max(1, round(wanted / (job.model.config.seq_len * machine.world)))
        size = min(size, 1 << (share.bit_length() - 1))
        share = -(-share // size) * size
    elif not samples and tokens and job.kind == "train":
        share = max(1, round(step_tokens_for(tokens) / (job.sample_tokens * machine.world)))
        size = min(share, max(size, CPU_MICRO_TOKENS // job.model.config.seq_len))
    elif not samples:
        share = run.usual_batch
    else:
        share = share_of_step(samples, machine.world)
    size = max(n for n in divisors(share) if n <= size)
    return replace(run, batch_size=size, grad_accum_steps=share // size)


def fit_noted_memory(run: RunSettings, job: Job, machine: Machine) -> RunSettings:
    """The run with micro-batches of at most half the size of those that ended an earlier start of
    it; a step stays what it is."""
    size = machine.on_main(noted_memory, Path(run.out_dir))
    if not size or run.batch_size < max(2, size):
        return run
    accum = max(1, run.grad_accum_steps)
    share = run.batch_size if job.stream.per_step else run.batch_size * accum
    half = max(n for n in divisors(share) if n <= max(1, size // 2))
    say(
        f"micro-batches of {half} instead of {run.batch_size} sequences, as memory ran out with "
        f"{size} (remove {run.out_dir}/.memory to try these again)"
    )
    accum = accum if job.stream.per_step else share // half
    return replace(run, batch_size=half, grad_accum_steps=accum)


EVAL_SHARE = 0.05  # of the time of training


EVAL_TOKENS = (1 << 14, 2_000_000)  # fewest and most of an evaluation, where --eval_tokens is auto


def choose_eval_tokens(run: RunSettings, job: Job, machine: Machine) -> RunSettings:
    """The run with the tokens of an evaluation. A token takes a third as long there as in training,
    so they follow from those trained on in between, and are the same after a restart."""
    if run.eval_tokens:
        return run
    steps = min(run.eval_interval, run.max_steps)
    trained = steps * job.step_samples(run, machine.world) * job.sample_tokens
    least, most = EVAL_TOKENS
    wanted = round(EVAL_SPEED * EVAL_SHARE * trained)
    return replace(run, eval_tokens=max(least, min(most, wanted)))


def check_fields(saved: dict, types: dict[str, object], name: str = "") -> None:
    """Raise UserError for a field of another type; `name` is the field that `saved` itself is."""
    for key, kind in types.items():
        if not isinstance(saved.get(key), kind) or isinstance(saved[key], bool):
            raise damaged_field(name or key)


def check_resumable(saved: dict, job: Job, out: Path) -> None:
    """Raise UserError where a checkpoint is of another trainer, or is damaged."""
    stored = saved.get("kind", "the original program")
    if not isinstance(stored, str) or stored != job.kind or "gauges" not in saved:
        raise UserError(
            f"{out} holds a run of {stored}, not of {job.kind}",
            "use another --out_dir",
        )
    check_fields(saved, RESUMED)
    check_fields(saved["gauges"], GAUGES, "gauges")
    check_fields(saved["args"], {"batch_size": int, "step_samples": int}, "args")
    sums = saved["gauges"]["sums"]
    numbers = [isinstance(number, (int, float)) for number in sums]
    known = len(job.names) + 1  # and since then the skipped steps
    if not all(numbers) or len(sums) not in (known, known + 1):
        raise damaged_field("gauges")
    for name in ("args", "config"):
        if any(isinstance(value, Tensor) for value in saved[name].values()):
            raise damaged_field(name)


def check_same_run(saved: dict, job: Job, args: dict, same: list[str], out: Path) -> None:
    """Raise UserError where the run in `out` is of another model, tokenizer or data; `same` are
    the arguments that may not change."""
    new = asdict(job.model.config) | {key: args[key] for key in same}
    old = {"scalar_head": False, **saved["config"], **{k: saved["args"].get(k) for k in same}}
    unlike = []
    for key, value in new.items():
        if old.get(key) != value and key != "dropout":
            unlike.append(NOT_SAME.get(key) or f"--{key} {old.get(key)} (now {value})")
    if sha256(saved["tokenizer"]) != job.tokenizer.sha256:
        unlike.append("another tokenizer")
    if unlike:
        raise UserError(
            f"{out} holds another run: {', '.join(unlike)}",
            f"use another --out_dir, or repeat the run's own flags: {job.kind} @{out}/args.txt",
        )


def changed_flags(old: dict, new: dict, names: Iterable[str]) -> list[str]:
    """Those of the named arguments that differ between a run and its resumption, in words."""
    changed = [name for name in names if name in old and old[name] != new[name]]
    return [f"{name} {old[name]} → {new[name]}" for name in changed]


def resume(
    job: Job,
    machine: Machine,
    run: RunSettings,
    args: dict,
    groups: tuple,
    extra: dict,
    before: int | None = None,
) -> dict | None:
    """The checkpoint that --out_dir continues from, its weights in the model; None for a new run.

    args: of this start; groups: the settings behind them; extra: what is not a flag; before: the
    last step that is good.
    """
    out = Path(run.out_dir)
    resumes = run.resume or before is not None
    newest = machine.on_main(newest_whole, out, resumes, before)  # that rank 0 finds whole
    if not newest:
        return None
    saved = read_checkpoint(newest, sharded=divides(run, machine))
    check_resumable(saved, job, out)
    whole_weights = {n: w for n, w in saved["model"].items() if not isinstance(w, Stored)}
    refuse_broken_weights(whole_weights, newest)
    check_same_run(saved, job, args, [*same_on_resume(*groups), *extra], out)
    names = [f.name for f in flags(*groups) if f.metadata["repeated"]]
    changed = changed_flags(saved["args"], args, names)
    if changed and before is None:
        told = f"changed since step {saved['step']}: {', '.join(changed)}"
        Events(out, machine).add(saved["step"], "changed", told, flags=changed)
    try:
        load_weights(job.model, saved["model"], strict=not job.lora)
    except (RuntimeError, AttributeError, TypeError, ValueError) as fault:
        raise damaged_field("model") from fault
    return saved


def chosen_sizes(job: Job, machine: Machine, run: RunSettings, given: RunSettings) -> Iterator[str]:
    """What was chosen instead of the user, who had not `given` it."""
    if job.stream.per_step:
        return
    if on_cuda(machine.device) and not given.batch_size:
        yield (
            f"batch: {run.grad_accum_steps} x {run.batch_size} sequences on each device, as the "
            "model and the device suggest (--batch_size, --grad_accum_steps)"
        )
    if not given.eval_tokens:
        yield (
            f"evaluation: at most {short(run.eval_tokens)} tokens every {run.eval_interval} steps, "
            f"about {EVAL_SHARE:.0%} of the time (--eval_tokens)"
        )


def begin_with_text(
    network: Transformer,
    domains: list[tuple[str, TokenFolder, float]],
    seed: int,
    machine: Machine,
) -> None:
    """begin_with_bigrams, on a sample of all domains by their weights, the same on all ranks."""

    def begin() -> None:
        parts = []
        for _, folder, weight in domains:
            most = max(1, int(weight * BIGRAM_TOKENS))
            piece = min(PROBED, most)
            every = math.ceil(len(folder.train) / most)
            for start in range(0, len(folder.train), piece * every):
                parts.append(folder.train[start : start + piece].astype(np.int64))
        begin_with_bigrams(network, torch.from_numpy(np.concatenate(parts)), seed)

    machine.on_main(begin)
    for weight in network.parameters():
        machine.spread(weight.data)


def described_sharding(run: RunSettings, machine: Machine) -> str:
    words = ""
    if divides(run, machine):
        words += f", ZeRO stage {run.zero or 3}"
        if run.zero_group and run.zero_group < machine.world:
            words += f" in groups of {run.zero_group}"
        if run.offload:
            words += ", in the host's memory"
    return words


def described_rates(optim: OptimSettings, config: ModelSettings) -> str:
    told = f"{optim.lr:.2g}"
    if optim.optimizer == "muon" and optim.muon_lr:
        told += f", Muon's {optim.muon_lr:.2g}"
    if optim.embed_lr != optim.lr:
        told += f", embeddings' {optim.embed_lr:.2g}"
    if not config.tie and optim.head_lr != optim.lr:
        told += f", head's {optim.head_lr:.2g}"
    return told


def describe_run(
    job: Job,
    machine: Machine,
    run: RunSettings,
    given: RunSettings,
    saved: dict | None,
    optim: OptimSettings,
    optim_given: OptimSettings,
) -> None:
    """Say what is trained, where, and on how much; `given` are the settings before defaults that
    depend on model and machine."""
    config, stream = job.model.config, job.stream
    total = parameter_counts(config)["total"]
    samples = job.step_samples(run, machine.world)
    step_tokens = samples * job.sample_tokens
    epochs = samples * run.max_steps / stream.count
    model = f"{short(total)} parameters"
    if run.preset:
        model = f"{run.preset}, {model}"
    if job.lora:
        trained = sum(weight.numel() for weight in trained_weights(job.model).values())
        model += f", {trained / total:.1%} of them trained"
    say(
        f"model: {model}, {config.n_layer} layers, context {config.seq_len}",
        f"machine: {machine.world} x {machine.device.type}, "
        f"{str(machine.dtype)[len('torch.') :]}{described_sharding(run, machine)}",
        f"data: {short(stream.tokens)} training tokens; {step_tokens:,.0f} per step, "
        f"{short(step_tokens * run.max_steps)} in the run ({epochs:.2g} epochs)",
        *chosen_sizes(job, machine, run, given),
    )
    if run.budget:
        say(f"time: {duration(run.budget)}")
    if not optim_given.lr:
        say(f"learning rate: {described_rates(optim, config)}, by the model's size (--lr)")
    elif {optim.embed_lr, optim.head_lr} != {optim.lr}:
        say(f"learning rate: {described_rates(optim, config)}")
    if saved:
        say(f"resuming {run.out_dir} after step {saved['step']}")


def say_what_next(trainer: Trainer) -> None:
    """Say that the run is done, and the commands that use its model."""
    job = trainer.job
    folder = shlex.quote(str(trainer.out))
    newest = shlex.quote(str(checkpoint_path(trainer.out)))
    chat = "" if job.kind in ("train", ON_TEXT) else " --chat"
    commands = [
        f'{PROGRAM} generate --ckpt {folder}{chat} --prompt "…"',
        f"convert_to_llama.py --ckpt {newest} --out {folder}/hf",
    ]
    if job.kind == "reward":
        commands = [f"{PROGRAM} reward --ckpt {folder} --score rows.jsonl"]
    best = ""
    if trainer.best_val < math.inf:
        best = f"best {job.best} {trainer.best_val:.4f}, in {newest}; "
    say(
        f"done after {trainer.step} steps in {duration(trainer.metrics.elapsed())}; {best}next:",
        *(f"  python {command}" for command in commands),
    )


def begin_run(out: Path, args_text: str) -> None:
    """Write args.txt, and remove what a kill in the middle of writing left behind; an OSError here
    costs no hour of training."""
    write_args(out, args_text)
    for half in out.glob(".ckpt_*.tmp"):
        half.unlink()
    sweep_parts(out)


def say_schedule(saved: dict, job: Job, run: RunSettings, optim: OptimSettings) -> None:
    """Where a run that has begun to decay its learning rate is given more steps, say what becomes
    of it, and how to branch off from before."""
    old, out = saved["args"].get("planned_steps"), Path(run.out_dir)
    if not optim.schedule.startswith("wsd") or not isinstance(old, int) or run.max_steps <= old:
        return
    begin = int(decay_begin(optim, old))
    if saved["step"] <= begin:
        return
    say(
        f"warning: the learning rate had begun to fall at step {begin} of {old}; of "
        f"{run.max_steps} steps it falls from {int(decay_begin(optim, run.max_steps))} on, and is "
        "at its peak again until then"
    )
    if (out / STABLE).exists():
        folder, longer = shlex.quote(str(out)), shlex.quote(f"{out}-longer")
        say(
            "to train on from before the fall instead, stop, and:",
            f"  mkdir {longer} && cp {folder}/{STABLE} {longer}/ckpt_last.pt",
            f"  python {PROGRAM} {job.command} @{folder}/args.txt --out_dir {longer} "
            f"--max_steps {run.max_steps}",
        )


def say_faults(trainer: Trainer) -> None:
    """What went wrong in a run that is done."""
    kinds = {
        "skipped": "steps skipped, whose loss or gradient was not finite",
        "spike": "spikes of loss or gradient",
        "back": "times back to a checkpoint",
        "memory": "times out of memory",
    }
    events = trainer.events
    found = {what: events.count(kind, trainer.step) for kind, what in kinds.items()}
    told = [f"{count} {what}" for what, count in found.items() if count]
    if told and trainer.machine.main:
        say(f"in this run: {', '.join(told)}; see {events.log.path}")


def broken_run(back: RollBack, more: str = "") -> UserError:
    return UserError(
        f"{back.told}{more}",
        "resume with a lower --lr, more --warmup_steps, or --dtype fp32",
    )


def sized_run(
    run: RunSettings,
    job: Job,
    machine: Machine,
    optim: OptimSettings,
    saved: dict | None,
    epochs: float,
) -> RunSettings:
    """The run with the size of its step, that of a resumed run if it can be, and their number."""
    samples, tokens = 0, 0.0
    if saved and not job.stream.per_step:
        if run.batch_size:
            run = keep_step_size(run, saved, machine.world)
        elif saved["args"]["grad_accum_steps"] == run.grad_accum_steps:
            samples = saved["args"]["step_samples"]
    if run.budget:
        tokens = run.budget * measured_speed(job, machine)
    elif not run.max_steps:
        tokens = epochs * job.stream.tokens
    run = choose_step(run, job, machine, optim, samples, tokens)
    return replace(run, max_steps=steps_of(run, job, machine, saved, tokens))


def rates_of_run(
    run: RunSettings,
    job: Job,
    machine: Machine,
    optim: OptimSettings,
    saved: dict | None,
) -> OptimSettings:
    """The settings with all rates: by size, or as a resumed run has begun."""
    chosen = with_rates(
        optim,
        job.model,
        job.kind,
        job.step_samples(run, machine.world) * job.sample_tokens * run.max_steps,
        run.max_steps,
        adapters=job.lora is not None,
        init=job.init,
    )
    return kept_rates(chosen, optim, saved)


def train_once(
    job: Job,
    machine: Machine,
    run: RunSettings,
    optim: OptimSettings,
    groups: tuple,
    extra: dict,
    epochs: float,
    make: Callable[..., Trainer],
    back: RollBack | None,
) -> tuple[int, RollBack | None]:
    """Train from the newest checkpoint, or from one that it goes `back` to; the exit code, and
    where it has to go back to next."""
    args, args_text = settings_dict(*groups) | extra, settings_text(*groups)
    saved = resume(job, machine, run, args, groups, extra, back and back.before)
    if back:
        if not saved:
            raise broken_run(back, ", and there is no checkpoint from before")
        told = f"{back.told}: going back to step {saved['step']}, and on with sample {back.samples}"
        Events(Path(run.out_dir), machine).add(back.before, "back", told, to=saved["step"])
        saved["samples"] = back.samples
    given, optim_given = run, optim
    run = sized_run(run, job, machine, optim, saved, epochs)
    optim = rates_of_run(run, job, machine, optim, saved)
    run = fit_noted_memory(run, job, machine)
    run = choose_eval_tokens(run, job, machine)
    check_sharding(run, machine)
    if not divides(run, machine):
        job.model.to(machine.device)
    job.model.grad_checkpoint = run.grad_checkpoint
    if run.fp8 and not back:
        use_fp8(job.model, machine)
    machine.on_main(begin_run, Path(run.out_dir), args_text)
    if not back:
        describe_run(job, machine, run, given, saved, optim, optim_given)
    if job.begin and not saved:
        job.begin()
    if saved and not back:
        say_schedule(saved, job, run, optim)
    trainer = make(job, machine, run, optim, args, saved)
    trainer.args_text = args_text
    del saved  # frees its memory
    try:
        code = trainer.fit()
    except RollBack as wrong:
        trainer.wait_for_writer()
        trainer.metrics.progress.close()
        return 1, wrong.with_traceback(None)  # which held the trainer's memory
    except (MemoryError, RuntimeError) as fault:  # torch.OutOfMemoryError is one
        told = out_of_memory(fault)
        if not told or machine.world == 1 or trainer.run.batch_size < 2:
            raise
        note_memory(trainer.out, trainer.run.batch_size)
        raise UserError(
            told.faults[0][0],
            "start all ranks again, or give torchrun --max-restarts: the run goes on from its "
            "newest checkpoint with micro-batches of half the size",
        ) from fault
    finally:
        trainer.writer.close()
    if code == 0:
        say_what_next(trainer)
        say_faults(trainer)
    return code, None


def train_job(
    job: Job,
    machine: Machine,
    run: RunSettings,
    optim: OptimSettings,
    groups: tuple,
    extra: dict,
    epochs: float = 1.0,
    make: Callable[..., Trainer] = Trainer,
) -> int:
    """Train from the start, or from where the run in --out_dir stands; the exit code.

    The run's arguments are those of `groups`, the settings, and `extra`. A run whose steps go wrong
    goes back to its last good checkpoint, and on behind the data that it had seen.
    """
    lock = Lock(Path(run.out_dir))
    machine.on_main(lock.acquire)
    try:
        if run.mirror:
            machine.on_main(restore_run, run.mirror, Path(run.out_dir))
        start = functools.partial(train_once, job, machine, run, optim, groups, extra, epochs, make)
        back: RollBack | None = None
        for _ in range(ROLLBACKS_MOST + 1):
            code, again = start(back)
            if not again:
                return code
            back = again
        machine.on_main(newest_whole, Path(run.out_dir), True, back.before)
        raise broken_run(back, f", also after {ROLLBACKS_MOST} times back to a checkpoint")
    finally:
        lock.release()


# ==================================================================================================
# Tools: programs that a model writes, functions that it calls, answers of several turns
# ==================================================================================================


OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def arithmetic(text: str, decimals: bool = False) -> Fraction:
    """The value of an expression of whole numbers, or of `decimals` too, + - * / and brackets; else
    ValueError."""

    def value(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(str(node.value))
        parts = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
        return OPERATIONS[type(node.op)](*map(value, parts))

    allowed = r"[\d\s()+*/.-]*" if decimals else r"[\d\s()+*/-]*"
    refuse(not re.fullmatch(allowed, text), "no arithmetic")  # 1_2 and # 3 are Python too
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


RUN_FILE = functools.cache(runpy.run_path)  # once in each process


WORKER_MEMORY = 8 << 30  # bytes that a reward function may use beyond what this program takes


class Worker:
    """A process that makes one call at a time, and is replaced where it dies or takes too long; its
    own processes end with it."""

    def __init__(self):
        self.pool: ProcessPoolExecutor | None = None

    def start(self) -> None:
        if self.pool is None:
            context = multiprocessing.get_context(start_method())
            self.pool = ProcessPoolExecutor(1, context, serve_alone, (WORKER_MEMORY,))
            self.pool.submit(os.getpid).result()  # the start takes none of the call's time

    def call(self, function: Callable, args: tuple, seconds: float) -> object:
        """What the function returns, or the exception that it ended with, instead of raising it."""
        try:
            self.start()
            future = self.pool.submit(function, *args)
            fault = future.exception(seconds)
        except TooLong:
            fault = TooLong(f"took more than {seconds:g} seconds")
        except BrokenProcessPool as broken:  # between two calls
            fault = broken
        if isinstance(fault, (TooLong, BrokenProcessPool)):
            self.kill()
        return future.result() if fault is None else fault

    def kill(self) -> None:
        for process in list(self.pool._processes.values()):
            end_session(process.pid)
            process.kill()
            process.join(1.0)
        self.pool = None

    def close(self) -> None:
        if self.pool:
            self.pool.shutdown()
            self.pool = None


class Workers:
    """Several of them, which share calls of a function out among each other."""

    def __init__(self, function: Callable, seconds: float):
        self.function = function
        self.seconds = seconds
        self.workers = [Worker() for _ in range(cores_here())]

    def map(self, calls: list[tuple]) -> list[object]:
        """What the calls return, in their order, or the exceptions that they end with."""
        workers = self.workers[: len(calls)]
        for worker in workers:
            worker.start()  # by this thread, one after the other
        if len(workers) < 2:
            return [workers[0].call(self.function, call, self.seconds) for call in calls]
        idle = queue.SimpleQueue()
        for worker in workers:
            idle.put(worker)

        def by_idle(call: tuple) -> object:
            worker = idle.get()
            try:
                return worker.call(self.function, call, self.seconds)
            finally:
                idle.put(worker)

        with ThreadPoolExecutor(len(workers)) as threads:
            return list(threads.map(by_idle, calls))

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


CODE_MEMORY = 1 << 30  # bytes that a program under test may use


SHUT_OFF = r"""
mount -t tmpfs -o size=64m tmpfs "$0" || exit 125
if [ -d /dev/shm ]; then mount -t tmpfs -o size=64m tmpfs /dev/shm || exit 125; fi
while read -r _ place _ options _; do
  place=$(printf %b "$place")
  case "$place" in "$0" | /dev/shm) continue ;; esac
  kept=
  for flag in nosuid nodev noexec; do
    case ",$options," in *",$flag,"*) kept=$kept,$flag ;; esac
  done
  mount -o "remount,bind,ro$kept" "$place"  # fails where another mount hides it
done < /proc/self/mounts
while read -r _ place _; do
  place=$(printf %b "$place")
  case "$place" in "$0" | /dev/shm) continue ;; esac
  if [ -w "$place" ]; then exit 125; fi
done < /proc/self/mounts
cd "$0" && exec unshare --user --mount "$@"
"""  # every mount is read-only, /dev and /proc too, which a second namespace cannot undo

SANDBOX = [  # namespaces of its own: no network, other processes unseen, and all end together
    *"unshare --user --map-root-user --net --ipc --pid --mount --fork --kill-child".split(),
    *("--mount-proc", "sh", "-c", SHUT_OFF),
]


RUNNER = """
import ast, json, os, resource, sys
with os.fdopen({source}) as file:
    job = json.load(file)
token = bytes.fromhex(job["token"])
for name, most in (("CPU", job["seconds"]), ("AS", job["memory"]), ("FSIZE", 1 << 24),
                   ("NOFILE", 64), ("NPROC", 64), ("CORE", 0)):
    try:
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
    except (ValueError, OSError):  # a system that lacks this limit, or has a lower one
        pass
scope = {{"__name__": "__main__"}}
def run(text):
    tree = ast.parse(text, "program")
    last = []
    if job["shows"] and tree.body and isinstance(tree.body[-1], ast.Expr):
        last = [tree.body.pop()]
    exec(compile(tree, "program", "exec"), scope)
    for one in last:
        value = eval(compile(ast.Expression(one.value), "program", "eval"), scope)
        if value is not None:
            print(value)
def attempt(text):
    try:
        run(text)
        return True
    except SystemExit:
        return False
    except BaseException as fault:
        print(type(fault).__name__ + ": " + str(fault))
        return False
if attempt(job["program"]):
    for test in job["tests"]:
        if attempt(test):
            os.write({give}, token)
"""  # a token comes back for each test that has run to its end, so that an early exit passes none


@functools.cache
def has_namespaces() -> bool:
    """Whether programs can be shut off here; says once where they cannot."""
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.suppress(OSError, subprocess.TimeoutExpired),
    ):
        done = subprocess.run([*SANDBOX, folder, "true"], capture_output=True, timeout=20)
        if done.returncode == 0:
            return True
    say(
        "warning: this system gives no namespaces (unshare), so code that is tested has time and "
        "memory limits alone; run it in a container"
    )
    return False


def sandboxed(folder: str, command: list[str]) -> list[str]:
    """The command within namespaces of its own, its folder alone writable, where the system allows
    that; else as it is."""
    if not has_namespaces():
        return command
    return [*SANDBOX, folder, *command]


class Ran(typing.NamedTuple):
    """Of a program that was run: how many of its tests it passed, and what it printed."""

    passed: int
    output: str


OUTPUT_MOST = 1 << 16  # bytes of what a program prints


def run_program(
    program: str,
    tests: list[str],
    seconds: float,
    stdin: str = "",
    shows: bool = False,
) -> Ran:
    """Run a Python program and then its tests, each in what it leaves behind: in a process of its
    own, in an empty folder, with limits of time, memory and files, and with no network where the
    system allows. With `shows` the value of its last expression is printed."""
    token = os.urandom(16)
    back, give = os.pipe()
    limits = {"seconds": math.ceil(seconds) + 1, "memory": CODE_MEMORY}
    job = {"token": token.hex(), "program": program, "tests": tests, "shows": shows, **limits}
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryFile() as source,
        tempfile.TemporaryFile() as asked,
        tempfile.TemporaryFile() as printed,
    ):
        source.write(json.dumps(job).encode())
        asked.write(stdin.encode("utf-8", "replace"))
        for file in (source, asked):
            file.seek(0)
        runner = RUNNER.format(source=source.fileno(), give=give)
        process = subprocess.Popen(
            sandboxed(folder, [sys.executable, "-I", "-X", "utf8", "-c", runner]),
            stdin=asked,
            stdout=printed,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.environ.get("PATH", os.defpath), "HOME": folder, "TMPDIR": folder},
            pass_fds=(source.fileno(), give),
            start_new_session=True,
        )
        os.close(give)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            printed.seek(0, os.SEEK_END)
            printed.write(f"\ntook more than {seconds:g} seconds".encode())
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        printed.seek(0)
        output = printed.read(OUTPUT_MOST).decode("utf-8", "replace")
    os.set_blocking(back, False)
    try:
        found = os.read(back, len(token) * (len(tests) + 1))
    except BlockingIOError:  # a child that outlived it holds the pipe
        found = b""
    finally:
        os.close(back)
    whole = [found[i : i + len(token)] == token for i in range(0, len(found), len(token))]
    return Ran(sum(whole), output.strip())


TOOL_SECONDS = 5.0  # that a program of the tool python may take

TOOL_OUTPUT = 1000  # characters of what it prints that are read on


def calculate(expression: str) -> str:
    """The value of an expression of numbers, + - * / and brackets."""
    refuse(len(expression) > 200, "the expression is too long")
    plain = expression.replace("×", "*").replace("÷", "/").replace(",", "")
    value = arithmetic(plain, decimals=True)
    if value.denominator == 1:
        return str(value)
    return f"{float(value):.10g}"


def run_python(code: str) -> str:
    """What a program prints, its last expression included."""
    output = run_program(code, [], TOOL_SECONDS, shows=True).output
    return output[:TOOL_OUTPUT] or "(nothing was printed)"


TOOLS = {  # name: (what it does with its argument, what a call names the argument)
    "calculator": (calculate, "expression"),
    "python": (run_python, "code"),
}


def use_tool(call: str, tools: Sequence[str]) -> str:
    """The result of a call, JSON of its name and arguments; of a mistake in it a sentence, which
    the model may learn from."""
    try:
        told = json.loads(call)
        name, arguments = told["name"], told.get("arguments") or {}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return 'error: a call is JSON, {"name": …, "arguments": {…}}'
    if name not in tools:
        return f"error: there is no tool {str(name)[:40]!r}, only {', '.join(tools)}"
    function, argument = TOOLS[name]
    if isinstance(arguments, dict):
        arguments = arguments.get(argument)
    if not isinstance(arguments, str):
        return f"error: {name} needs the argument {argument}"
    try:
        return function(arguments)
    except (ValueError, OverflowError) as fault:
        return f"error: {fault}"


WRITTEN_CALL = re.compile(
    r"(?:<\|call\|>|<tool_call>)\s*(.*?)\s*(?:</tool_call>|<\|call\|>|\Z)", re.S
)


def assistant_turn(tokenizer: Tokenizer, ids: list[int]) -> Turn:
    """What an assistant said by these ids, and the first of the tools that it calls: spelled by a
    control symbol, or in text where its tokenizer has none."""
    while ids and ids[-1] in tokenizer.stops:
        ids = ids[:-1]
    marker = tokenizer.roles.get("call")
    if marker is not None and marker in ids:
        at = ids.index(marker)
        rest = ids[at + 1 :]
        if marker in rest:
            rest = rest[: rest.index(marker)]
        return Turn("assistant", tokenizer.decode(ids[:at]), calls=(tokenizer.decode(rest),))
    text = tokenizer.decode(ids)
    found = marker is None and WRITTEN_CALL.search(text)
    if found:
        return Turn("assistant", text[: found.start()], calls=(found[1],))
    return Turn("assistant", text)


class Step(typing.NamedTuple):
    """What an environment makes of an answer: its own state behind it, what it says, or None where
    the episode is over, and what it pays."""

    state: bytes
    observation: Turn | None
    reward: float = 0.0


class Toolbox:
    """The environment of a model that may call tools: it says their results, and pays nothing."""

    def __init__(self, names: Sequence[str]):
        if sys.platform == "win32" and "python" in names:
            raise UserError("--tools python needs Linux or macOS", "use WSL or a container")
        self.names = tuple(names)

    def step(self, rows: list[tuple[bytes, Turn]]) -> list[Step]:
        """What follows on the turns of several episodes."""

        def one(row: tuple[bytes, Turn]) -> Step:
            state, turn = row
            if not turn.calls:
                return Step(state, None)
            return Step(state, Turn("tool", use_tool(turn.calls[0], self.names)))

        if "python" not in self.names:
            return [one(row) for row in rows]
        with ThreadPoolExecutor(cores_here()) as threads:
            return list(threads.map(one, rows))


def called_lines(turns: Turns) -> list[str]:
    """What was called in turns of assistant and tools, for people to read: a line a call."""
    lines = []
    for turn, result in itertools.pairwise(turns):
        if turn.calls and result.role == "tool":
            lines.append(f"[{turn.calls[0]} -> {result.text}]")
    return lines


def user_module(path: str) -> types.ModuleType:
    """The module in a file, under one name in every process, so that its objects can be pickled."""
    name = f"environment_{sha256(str(Path(path).resolve()).encode())[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def seed_user(*parts: object) -> None:
    """Give the user's code random numbers that are the same wherever and whenever it runs."""
    seed = derive_seed(0, repr(parts))
    random.seed(seed)
    np.random.seed(seed % (1 << 32))


def begin_episode(path: str, name: str, row: dict) -> tuple[bytes, list]:
    """The state of a new environment, and the messages that it begins with."""
    seed_user(name, row)
    environment = getattr(user_module(path), name)()
    messages = environment.reset(row)
    return pickle.dumps(environment), messages


def go_on_with_episode(
    path: str, name: str, state: bytes, text: str
) -> tuple[bytes, object, float, bool]:
    """The state, observation and reward behind an answer, and whether the episode is done."""
    user_module(path)
    seed_user(name, state, text)
    environment = pickle.loads(state)
    observation, reward, done = environment.step(text)
    return pickle.dumps(environment), observation, float(reward), bool(done)


class UserEnvironment:
    """The environment FILE.py:CLASS: reset(row) gives the messages that an episode begins with,
    step(text) an observation (a text or a message), a reward, and whether it is done.

    It runs in processes of its own, in which its objects live only for a call, so that neither an
    error nor an endless loop nor a crash in one of them touches the others: that episode ends with
    no further reward, and it is told once.
    """

    def __init__(self, spec: str, seconds: float):
        path, _, name = spec.rpartition(":")
        if not path.endswith(".py") or not Path(path).exists():
            raise UserError(f"--env {spec} is no FILE.py:CLASS", "name a file that is there")
        try:
            tree = ast.parse(Path(path).read_text(encoding="utf-8-sig"), path)
        except (SyntaxError, ValueError) as fault:
            raise UserError(f"{path} cannot be read ({fault})", "mend the file") from fault
        if name not in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}:
            raise UserError(
                f"{path} has no class {name}",
                f"write class {name} with reset(self, row) and step(self, text)",
            )
        self.name = spec
        self.told: set[str] = set()
        self.begin = Workers(functools.partial(begin_episode, path, name), seconds)
        self.go_on = Workers(functools.partial(go_on_with_episode, path, name), seconds)

    def reset(self, row: dict) -> tuple[bytes, list]:
        """The state of an episode of the row, and its messages; ValueError where it has none."""
        [found] = self.begin.map([(row,)])
        if isinstance(found, BaseException):
            raise ValueError(f"{self.name} gave {type(found).__name__}: {found}")
        return found

    def step(self, rows: list[tuple[bytes, Turn]]) -> list[Step]:
        """What follows on the turns of several episodes."""
        found = self.go_on.map([(state, turn.text) for state, turn in rows])
        return [self.accepted(*pair) for pair in zip(rows, found, strict=True)]

    def accepted(self, row: tuple[bytes, Turn], found: object) -> Step:
        """A step, or the end of the episode instead of an exception or of what is no step."""
        fault = found
        if not isinstance(found, BaseException):
            state, observation, reward, done = found
            if isinstance(observation, dict):
                role, content = observation.get("role", "user"), observation.get("content", "")
                observation = Turn(str(role), str(content))
            elif observation is not None:
                observation = Turn("user", str(observation))
            known = observation is None or observation.role in ("user", "tool", "system")
            if math.isfinite(reward) and known:
                return Step(state, None if done else observation, reward)
            fault = ValueError(f"the reward {reward}, or the role of {observation}")
        what = f"{type(fault).__name__}: {fault}"
        if what not in self.told and len(self.told) < FAULTS_SHOWN:
            self.told.add(what)
            say(f"warning: {self.name} gave {what}; that episode ends")
        return Step(row[0], None)

    def close(self) -> None:
        self.begin.close()
        self.go_on.close()


class Episodes:
    """Answers of several turns, as `complete` follows them: when one ends, the environment says
    something, which the model reads and draws on behind; of that nothing is learned."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        asked: list[Turns],
        prompts: list[list[int]],
        environment: Toolbox | UserEnvironment,
        most: int,
        states: list[bytes] | None = None,
    ):
        """most: turns of the model in an episode; states: of the environment at their begin."""
        self.tokenizer = tokenizer
        self.asked = asked
        self.prompts = prompts
        self.environment = environment
        self.most = most
        self.begun = states or [b""] * len(asked)
        self.restart()

    def restart(self) -> None:
        """Forget what has happened."""
        count = len(self.asked)
        self.turns: list[Turns] = [list(turns) for turns in self.asked]
        self.states = list(self.begun)
        self.read = [len(prompt) for prompt in self.prompts]  # ids before the answer under way
        self.drawn = [0] * count  # ids drawn in the turns that have ended
        self.observed: list[list[tuple[int, list[int]]]] = [[] for _ in range(count)]
        self.said = [0] * count
        self.paid = [0.0] * count
        self.over = [False] * count

    def __call__(self, ended: list[tuple[int, list[int]]]) -> list[list[int] | None]:
        rows = []
        for row, ids in ended:
            own = ids[self.read[row] :]
            self.drawn[row] += len(own)
            self.said[row] += 1
            turn = assistant_turn(self.tokenizer, own)
            self.turns[row].append(turn)
            rows.append((self.states[row], turn))
        found = []
        steps = self.environment.step(rows)
        for (row, ids), one in zip(ended, steps, strict=True):
            self.states[row] = one.state
            self.paid[row] += one.reward
            self.over[row] = one.observation is None
            more = None
            if one.observation is not None and self.said[row] < self.most:
                more = self.observe(row, ids, one.observation)
            found.append(more)
        return found

    def observe(self, row: int, ids: list[int], observation: Turn) -> list[int]:
        """The ids of what the environment says, up to where the next answer begins."""
        turns = self.turns[row]
        before, _ = encode_chat(self.tokenizer, turns)
        turns.append(observation)
        after, _ = encode_chat(self.tokenizer, turns, reply=True)
        if after[: len(before)] != before:
            raise UserError(
                "the chat template of this model rewrites earlier turns, so that none can follow "
                "another",
                "drop --tools and --env, or use a model with another template",
            )
        stops = self.tokenizer.stops
        last = max((i for i, token in enumerate(before) if token in stops), default=-1)
        more = after[last + 1 :]
        self.observed[row].append((self.drawn[row], more))
        self.read[row] = len(ids) + len(more)
        return more

    def laid(self, row: int, drawn: list[int]) -> tuple[list[int], list[bool]]:
        """All ids behind the prompt up to the last that was drawn, and which of them were."""
        ids: list[int] = []
        own: list[bool] = []
        at = 0
        for count, more in self.heard(row, drawn):
            ids += drawn[at:count] + more
            own += [True] * (count - at) + [False] * len(more)
            at = count
        ids += drawn[at:]
        own += [True] * (len(drawn) - at)
        return ids, own

    def heard(self, row: int, drawn: list[int]) -> list[tuple[int, list[int]]]:
        """What was said to the model and answered by it: nothing is where there was no room."""
        return [(count, more) for count, more in self.observed[row] if count < len(drawn)]

    def last_text(self, row: int, drawn: list[int]) -> str:
        """What the model said last."""
        if heard := self.heard(row, drawn):
            drawn = drawn[heard[-1][0] :]
        return assistant_turn(self.tokenizer, drawn).text


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
    divided = machine.world > 1 and is_sharded(module)
    by_domain, means, weights = {}, [], []
    for name, weight, batches in parts:
        found, targets = [torch.zeros(len(names))], 0
        for micro, size in batches:
            tensors = tuple(machine.to_device(tensor) for tensor in micro)
            if divided:  # by halves, one rank would wait for others
                sums = module(*tensors)
            else:
                sums = in_halves(module, tensors, machine.device)
            if size:
                found.append(sums.view(-1))
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
    model: Transformer,
    tokenizer: Tokenizer,
    chats: list[Turns],
    batch_size: int,
    machine: Machine,
    ended: Iterable[bool] | None = None,
) -> list[float]:
    """A reward model's score of the last answer of each conversation, of long ones by their end;
    no </s> stands behind an answer that has not `ended` (by default all have)."""
    limit = model.config.seq_len
    groups = []
    for turns, whole in zip(chats, ended or [True] * len(chats), strict=True):
        ids = np.array(encode_chat(tokenizer, turns, reply=not whole)[0][-limit:])
        groups.append([Example(ids, np.arange(len(ids)) == len(ids) - 1)])
    stream = Groups(groups, np.zeros((len(groups), 0)), limit, 0)
    scores: list[float] = []
    for micro, _ in stream.in_order(batch_size, stream.tokens, 0, 1):
        ids, targets = machine.to_device(micro.ids), machine.to_device(micro.targets)
        with machine.autocast():
            found, _ = reward_scores(model, ids, targets)
        scores += found.tolist()
    return scores


def sample_answers(
    model: Transformer,
    tokenizer: Tokenizer,
    questions: list[Turns],
    most: int,
    machine: Machine,
) -> list[dict]:
    """Greedy answers to fixed questions, as rows of samples.jsonl; on rank 0 alone."""
    prompts = [encode_chat(tokenizer, turns, reply=True)[0] for turns in questions]
    greedy = SamplingSettings(most, temperature=0.0)
    stop = tokenizer.stops
    if not machine.main and not model.shards:
        return []
    reader = reading_copy(model, machine.dtype)
    if not machine.main:
        return []
    answers = complete(reader, prompts, greedy, 0, stop, machine.dtype)
    rows = []
    for turns, ids in zip(questions, answers, strict=True):
        ended = not tokenizer.stops.isdisjoint(ids[-1:])
        rows.append({"prompt": turns[-1].text, "answer": tokenizer.decode(ids), "ended": ended})
    return rows


LOGITS_AT_ONCE = 4096  # places whose logits over the vocabulary are in memory together


class Scored(typing.NamedTuple):
    """What a model gives a continuation: its log-probability in nats, and whether each of its
    tokens is the likeliest."""

    logp: float
    greedy: bool


Pair = tuple[list[int], list[int]]  # ids of a context, and of what continues it


def text_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Ids of a context behind <s> and of its continuation, encoded as one text; a space between
    them belongs to the continuation, as in lm-evaluation-harness."""
    stem = context.rstrip()
    whole = tokenizer.encode(context + continuation)
    start = len(tokenizer.encode(stem))
    return [*tokenizer.opening, *whole[:start]] or [tokenizer.eos], whole[start:]


def rolling_window(length: int, done: int, limit: int, stride: int) -> tuple[int, int]:
    """(begin, end) of the window of ids that predicts those behind id `done`: the first one as many
    as fit, each later one `stride`, with as many ids before them as fit."""
    size = stride if done else limit
    end = min(done + size, length - 1)
    return max(0, end - limit), end


def rolling_starts(length: int, limit: int, stride: int) -> Iterator[int]:
    """The id behind which each window over `length` ids begins to predict."""
    done = 0
    while done < length - 1:
        yield done
        done = rolling_window(length, done, limit, stride)[1]


def rolling_pairs(ids: list[int], limit: int, stride: int) -> list[Pair]:
    """The windows over ids, each as what it reads first and what it predicts."""
    pairs = []
    for done in rolling_starts(len(ids), limit, stride):
        begin, end = rolling_window(len(ids), done, limit, stride)
        pairs.append((ids[begin : done + 1], ids[done + 1 : end + 1]))
    return pairs


@dataclass(frozen=True)
class Candidate:
    """A model under evaluation; `name` is that of the command line, `key` tells its weights."""

    name: str
    key: str
    model: Transformer
    tokenizer: Tokenizer
    machine: Machine
    chats: bool  # it is asked in the chat format
    batch_size: int
    tools: tuple[str, ...] = ()  # that it may call, in so many answers at most
    max_turns: int = 1

    @torch.inference_mode()
    def score(self, pairs: list[Pair]) -> list[Scored]:
        """The continuations of pairs, the longest first; of a pair longer than the context its
        end."""
        return [
            Scored(float(logps.sum()), bool(greedy.all()))
            for logps, greedy in self.score_tokens(pairs)
        ]

    @torch.inference_mode()
    def score_tokens(self, pairs: list[Pair]) -> list[tuple[Tensor, Tensor]]:
        """Of each token of the continuations its log-probability, and whether it is the
        likeliest."""
        limit = self.model.config.seq_len
        order = sorted(range(len(pairs)), key=lambda place: -sum(map(len, pairs[place])))
        found: list[tuple[Tensor, Tensor]] = [()] * len(pairs)
        for first in range(0, len(order), self.batch_size):
            places = order[first : first + self.batch_size]
            rows, counts = [], []
            for place in places:
                context, continuation = pairs[place]
                rows.append((context + continuation)[-(limit + 1) :])
                counts.append(min(len(continuation), len(rows[-1]) - 1))
            for place, scored in zip(places, self.score_in_halves(rows, counts), strict=True):
                found[place] = scored
        return found

    def score_in_halves(self, rows: list[list[int]], counts: list[int]) -> list:
        """score_rows, of half the rows at once where memory runs out."""
        try:
            return list(self.score_rows(rows, counts))
        except (MemoryError, RuntimeError) as fault:  # torch.OutOfMemoryError is one
            if len(rows) < 2 or not out_of_memory(fault):
                raise
        free_memory(self.machine.device)
        half = len(rows) // 2
        first = self.score_in_halves(rows[:half], counts[:half])
        return first + self.score_in_halves(rows[half:], counts[half:])

    def score_rows(self, rows: list[list[int]], counts: list[int]) -> Iterable:
        """The same of the last counts[i] ids of each row."""
        inputs = [torch.tensor(row[:-1]) for row in rows]
        ids = nn.utils.rnn.pad_sequence(inputs, batch_first=True)
        places = [
            (row, column)
            for row, count in enumerate(counts)
            for column in range(len(inputs[row]) - count, len(inputs[row]))
        ]
        targets = [token for row, n in zip(rows, counts, strict=True) for token in row[-n:]]
        logps, greedy = [], []
        with self.machine.autocast():
            hidden = self.model.hidden(self.machine.to_device(ids))
            for first in range(0, len(places), LOGITS_AT_ONCE):
                chosen = torch.tensor(places[first : first + LOGITS_AT_ONCE]).T
                wanted = torch.tensor(targets[first : first + LOGITS_AT_ONCE])
                wanted = self.machine.to_device(wanted)
                logits = self.model.logits(hidden[chosen[0], chosen[1]]).float()  # (n, V)
                best = logits.argmax(1)
                right = logits.gather(1, wanted.unsqueeze(1)).squeeze(1) - logits.logsumexp(1)
                logps.append(right.cpu().double())  # MPS has no float64
                greedy.append((best == wanted).cpu())
        return zip(torch.cat(logps).split(counts), torch.cat(greedy).split(counts), strict=True)

    def shortened(self, prompt: list[int], sampling: SamplingSettings) -> list[int]:
        """A prompt, or of one beyond the context the end that leaves room for an answer."""
        limit = self.model.config.seq_len
        if len(prompt) <= limit:
            return prompt
        return prompt[-max(1, limit - sampling.max_new_tokens) :]

    def complete(
        self,
        prompts: list[list[int]],
        sampling: SamplingSettings,
        seed: int,
        numbers: Sequence[int] | None = None,
        asked: list[Turns] | None = None,
    ) -> list[str]:
        """Texts that continue the prompts; `numbers` are the prompts' own, which they draw by.
        Where
        what they ask is given too, tools may be called, and the last answers are the texts.
        """
        prompts = [self.shortened(prompt, sampling) for prompt in prompts]
        episodes = None
        if asked and self.tools:
            box = Toolbox(self.tools)
            episodes = Episodes(self.tokenizer, asked, prompts, box, self.max_turns)
        with self.machine.autocast():
            found = complete(
                self.model,
                prompts,
                sampling,
                seed,
                self.tokenizer.stops,
                self.machine.dtype,
                numbers=numbers,
                at_once=self.batch_size,
                compiled=self.machine.compiles,
                follow=episodes,
            )
        if episodes:
            return [episodes.last_text(row, new) for row, new in enumerate(found)]
        texts = []
        for prompt, new in zip(prompts, found, strict=True):
            before = self.tokenizer.decode(prompt)
            texts.append(self.tokenizer.decode(prompt + new)[len(before) :])
        return texts


def before_any(text: str, marks: Iterable[str]) -> str:
    """The text up to the first of the marks in it."""
    for mark in marks:
        if mark:
            text = text.partition(mark)[0]
    return text


@torch.inference_mode()
def complete_until(
    candidate: Candidate,
    prompts: list[list[int]],
    sampling: SamplingSettings,
    seed: int,
    numbers: Sequence[int],
    marks: Sequence[str],
) -> list[str]:
    """Texts that continue the prompts up to the first of the marks, where they end and leave the
    batch to others; `numbers` are the prompts' own, which they draw by."""
    tokenizer, stop = candidate.tokenizer, candidate.tokenizer.stops
    machine = candidate.machine
    batch = RunningBatch(candidate.model, candidate.batch_size, machine.dtype, machine.compiles)
    streams: dict[Generation, TextStream] = {}
    texts: dict[Generation, str] = {}
    for prompt, number in zip(prompts, numbers, strict=True):
        ids = candidate.shortened(prompt, sampling)
        generation = Generation(ids, sampling, seed, number, stop)
        streams[generation], texts[generation] = TextStream(tokenizer, ids), ""
    waiting = deque(texts)
    with contextlib.closing(batch), machine.autocast():
        while waiting or batch.live():
            while waiting and not batch.full:
                batch.join(waiting.popleft())
            for generation, drawn in batch.step():
                texts[generation] += streams[generation].push(drawn.token)
                if any(mark in texts[generation] for mark in marks):
                    batch.leave(generation)
    return [
        before_any(text + streams[generation].waiting(), marks)
        for generation, text in texts.items()
    ]


def harness_sampling(options: dict) -> SamplingSettings:
    """What a task of the harness asks for; greedy where it does not sample."""
    temperature = 0.0
    if options.get("do_sample"):
        temperature = options.get("temperature", 1.0)
    return SamplingSettings(
        max_new_tokens=options.get("max_gen_toks", 256),
        temperature=temperature,
        top_p=options.get("top_p", 1.0),
    )


def harness_stops(options: dict) -> list[str]:
    until = options.get("until") or []
    if isinstance(until, str):
        return [until]
    return until


def harness_model(candidate: Candidate, seed: int) -> object:
    """A candidate as a model of lm-evaluation-harness, which an optional package defines."""
    api = need("lm_eval.api.model", "lm-eval")
    tokenizer = candidate.tokenizer

    class Adapter(api.LM):
        """Every request of the harness, batched by this program's engine."""

        def loglikelihood(self, requests, disable_tqdm=False) -> list[tuple[float, bool]]:
            pairs = [text_pair(tokenizer, *request.args) for request in requests]
            return [tuple(scored) for scored in candidate.score(pairs)]

        def loglikelihood_rolling(self, requests, disable_tqdm=False) -> list[float]:
            limit = candidate.model.config.seq_len
            found = []
            for request in requests:
                ids = tokenizer.prompt(request.args[0])
                pairs = rolling_pairs(ids, limit, limit)
                found.append(sum(scored.logp for scored in candidate.score(pairs)))
            return found

        def generate_until(self, requests, disable_tqdm=False) -> list[str]:
            texts: dict[int, str] = {}
            alike: dict[str, list[int]] = {}  # requests by their options
            for place, request in enumerate(requests):
                alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(place)
            for text, places in alike.items():
                options = json.loads(text)
                prompts = [tokenizer.prompt(requests[place].args[0]) for place in places]
                sampling, marks = harness_sampling(options), harness_stops(options)
                found = complete_until(candidate, prompts, sampling, seed, places, marks)
                texts |= zip(places, found, strict=True)
            return [texts[place] for place in range(len(requests))]

    return Adapter()


def run_harness(
    candidate: Candidate, settings: EvalSettings, seed: int
) -> dict[str, dict[str, float]]:
    """What lm-evaluation-harness finds: figures by task; UserError for what it refuses."""
    harness = need("lm_eval", "lm-eval")
    tasks = need("lm_eval.tasks", "lm-eval")
    manager = tasks.TaskManager(include_path=settings.harness_path or None)
    try:
        found = harness.simple_evaluate(
            model=harness_model(candidate, seed),
            tasks=settings.harness.split(","),
            task_manager=manager,
            num_fewshot=settings.n_shot or None,
            limit=settings.limit or None,
            bootstrap_iters=1000,
            random_seed=seed,
        )
    except (ValueError, KeyError, OSError) as fault:
        raise UserError(
            f"lm-evaluation-harness cannot run {settings.harness} ({str(fault).splitlines()[0]})",
            "see `lm-eval ls tasks` for names; its data sets are downloaded",
        ) from fault
    results = {}
    for task, figures in found["results"].items():
        kept = {}
        for name, value in figures.items():
            metric, _, about = name.partition(",")
            if isinstance(value, float):
                kept[metric if about == "none" else name] = value
        results[task] = {**kept, "rows": found["n-samples"].get(task, {}).get("effective", 0)}
    return results


def open_judge(
    path: str,
    spm: str,
    machine: Machine,
    base: str = "",
) -> tuple[Transformer, Tokenizer]:
    """A reward model; raises UserError where the checkpoint is of another kind."""
    saved = load_checkpoint(path, base)
    if not saved["config"].get("scalar_head"):
        raise UserError(
            f"{path} is not a reward model", f"train one: python {PROGRAM} reward --help"
        )
    return build_model(saved, machine.device, machine.dtype), tokenizer_of(saved, spm, path)


# ==================================================================================================
# Tasks and rewards: rows made by rule, and functions that score completions
# ==================================================================================================


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


MARKS = re.compile(r"####\s*([^\n]+)|<answer>(.*?)</answer>|\\f?boxed\s*\{", re.I | re.S)

BOX = re.compile(r"\\f?boxed\s*\{")

STATED = re.compile(r"\banswer(?: is\b:?|:)\s*(?=\S)", re.I)

ANSWERS_READ = 8  # the last ones of a text, so that one that repeats itself is read in time


def closing_braces(text: str) -> dict[int, int]:
    """Where the brace that opens at a place is closed, for all of them that are."""
    found, opened = {}, []
    for match in re.finditer("[{}]", text):
        if match[0] == "{":
            opened.append(match.start())
        elif opened:
            found[opened.pop()] = match.start()
    return found


def answers_in(text: str) -> Iterator[str]:
    """The answers that a text marks, best first: behind ####, in \\boxed{} or <answer>, then what
    stands after "answer is" or "answer:", of each the last before the others."""
    closed = closing_braces(text)

    def inside(box: re.Match) -> str:
        brace = box.end() - 1
        return text[brace + 1 : closed.get(brace, brace)]

    for match in reversed([*MARKS.finditer(text)][-ANSWERS_READ:]):
        group = next((i for i in (1, 2) if match[i]), 0)
        box = BOX.search(text, *match.span(group)) if group else match
        answer = inside(box) if box else match[group]
        if answer.strip():
            yield answer.strip()
    for match in reversed([*STATED.finditer(text)][-ANSWERS_READ:]):
        yield text[match.end() :].partition("\n")[0].strip()


def marked_answer(text: str) -> str | None:
    return next(answers_in(text), None)


SPELLINGS = [  # (what a number is written with, one spelling of it), in turn
    (r"[−–‐‑]", "-"),
    (r"[\u00a0\u2009\u202f]|\\[,;: ]|~", " "),  # spaces
    (r"\\([$%#&_])", r"\1"),
    (r"\{,\}(?=\d{3}(?!\d))", ","),
    (r"\{,\}", "."),  # a decimal comma
    (r"\\!|\\left\b|\\right\b|\\displaystyle\b", ""),
    (r"\\[()\[\]]", " "),
    (r"\\[dtc]frac", r"\\frac"),
    *[(r"\\(?:text|math|mbox|operatorname)[a-z]*\s*\{([^{}]*)\}", r" \1 ")] * 3,  # nested, too
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree\b|°", " degrees"),
    (r"\\times\b|\\cdot\b|[×·⋅]", "*"),
    (r"\\approx\b|≈", "="),
    ("¼", " 1/4"),
    ("½", " 1/2"),
    ("¾", " 3/4"),
    ("⅓", " 1/3"),
    ("⅔", " 2/3"),
    (r"([⁻⁰¹²³⁴-⁹]+)", r"^{\1}"),
    (r"’(?=\d{3})", "'"),
    (r"(?<!\d)\*\*|\*\*(?![\d-])|__", ""),  # bold type
]

SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")

NUMBER = re.compile(
    r"""
    (?<![\d^_]) (?<![\^_]\{) (?<!\^-) (?<!\^\{-)       # neither an exponent nor an index
    (?P<minus> (?<![\w.)}]) (?<![\d)}%]\s) -\s? | [$€£¥₹]-)?  # behind a number it subtracts
    (?P<behind> (?<=\d/) )?                             # as in a date
    (?: [$€£¥₹] \s? )?
    (?:
        (?: (?P<mixed> \d+ ) \s? )?
        \\frac \s* (?: \{\s* (?P<top> -?\s?\d+ ) \s*\} | (?P<top_digit> \d ) )
               \s* (?: \{\s* (?P<bottom> \d+ ) \s*\} | (?P<bottom_digit> \d ) )
      | (?P<units> \d+ ) \s (?P<part> \d+ ) \s?/\s? (?P<parts> \d+ ) (?!\s?/|[\d.])
      | (?P<whole>
            (?: [1-9]\d{0,2} (?: (?:,\d{3})+ | (?:'\d{3})+ | (?:_\d{3})+ | (?:\ \d{3})+ )
              | [1-9]\d? (?:,\d\d)+ ,\d{3}             # Indian grouping
              | \d+ ) (?: \.\d+ )? (?!\d)
          | \.\d+ )
        (?: \^\s?\{?\s? (?P<power> -?\d+ ) \s?\}? | \*\* (?P<raised> -?\d+ ) )?
        (?(behind) | (?: \s?/\s? (?P<over> \d+ ) (?!\s?/|\d) )? )
    )
    (?: [eE] (?P<exponent> [+-]?\d+ ) (?!\w)
      | \s? [*xX] \s? 10 \s? (?: \^ | \*\* ) \s? \{?\s? (?P<tens> [+-]?\d+ ) \s?\}? )?
    (?: \s? (?P<scale> thousand | million | billion | trillion ) \b )?
    (?P<percent> \s?% | \s?per\s?cent\b )?
    """,
    re.VERBOSE,
)

EUROPEAN = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:(?:\.\d{3})+,\d+|(?:\.\d{3}){2,})(?![\d.,]\d)")

SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

MOST_EXPONENT = 400  # of ten; numbers beyond it are no answers

BEFORE_NUMBER = re.compile(r"(?:[^\W\d_][^\W\d_'.-]*[\s:,.]+)*[\s${(*:~+]*")

BEHIND_NUMBER = re.compile(r"[^\d\\^+*=<>|]*\*?[\s).]*")

FUNCTION = re.compile(r"\b(?:sqrt|root|log|ln|sin|cos|tan|exp)\s*\(?\s*$", re.I)

UNIT_EXPONENT = re.compile(r"(?<=[^\W\d_])\s?\^\s?\{?\s?-?\d\s?\}?")

VARIABLE = re.compile(r"\s?[abceinpqrxyzπ]\W*")

NO_MORE_NUMBERS = re.compile(  # a sentence goes on, and not with another number of a list
    r"\s*(?:$|[.,;:!?)}$*]+(?:$|\s(?!\s*\S*\d))|(?<=\s)(?!(?:or|and|to|by)\b)(?:[^\W\d_]|\())"
)

EQUATIONS = re.compile(r"=.*(?:\bor\b|\band\b|[,;]).*=")  # as of two solutions


def spelled(text: str) -> str:
    """Text with numbers in the one spelling that NUMBER reads."""
    for written, one in SPELLINGS:
        text = re.sub(written, one, text)
    text = text.translate(SUPERSCRIPTS)
    return EUROPEAN.sub(lambda match: match[0].replace(".", "").replace(",", "."), text)


class Number(typing.NamedTuple):
    value: Fraction
    percent: bool


def number_of(match: re.Match) -> Number | None:
    """What NUMBER matched; None where it has thousands of digits, or a part of 0."""
    try:
        top = match["top"] or match["top_digit"]
        if top:
            value = Fraction(top.replace(" ", ""))
            value /= Fraction(match["bottom"] or match["bottom_digit"])
            value += Fraction(match["mixed"] or 0)
        elif match["units"]:
            value = Fraction(match["units"]) + Fraction(match["part"]) / Fraction(match["parts"])
        else:
            value = Fraction(re.sub("[,' _]", "", match["whole"]))
            power = int(match["power"] or match["raised"] or 1)
            if power != 1 and len(match["whole"]) * abs(power) > MOST_EXPONENT:
                return None
            value **= power
            value /= Fraction(match["over"] or 1)
        exponent = int(match["exponent"] or match["tens"] or 0)
    except (ValueError, ZeroDivisionError):
        return None
    if abs(exponent) > MOST_EXPONENT:
        return None
    value *= Fraction(10) ** exponent * SCALES.get(match["scale"], 1)
    return Number(-value if match["minus"] else value, bool(match["percent"]))


def plain_number(text: str) -> Number | None:
    """The number that a text is: with money, percent, a unit, words, or behind "x ="; None where
    it is an expression, a list, or several numbers."""
    if EQUATIONS.search(text):
        return None
    text = text.rpartition("=")[2]
    match = NUMBER.search(text)
    if match is None:
        return None
    before = text[: match.start()]
    behind = UNIT_EXPONENT.sub("", text[match.end() :])
    if not BEFORE_NUMBER.fullmatch(before) or FUNCTION.search(before):
        return None
    if not BEHIND_NUMBER.fullmatch(behind) or VARIABLE.fullmatch(behind):
        return None
    return number_of(match)


def first_number(text: str) -> Number | None:
    """The number that a statement begins with, where no expression or list follows."""
    match = NUMBER.search(text)
    if match is None:
        return None
    before, behind = text[: match.start()], UNIT_EXPONENT.sub("", text[match.end() :])
    if not BEFORE_NUMBER.fullmatch(before) or FUNCTION.search(before):
        return None
    if not NO_MORE_NUMBERS.match(behind):
        return None
    return number_of(match)


def final_number(text: str) -> Number | None:
    """The number of the best marked answer that has digits, or else the last one in the text."""
    for answer in answers_in(text):
        answer = spelled(answer)
        if not re.search(r"\d", answer):
            continue
        sentence = re.split(r"[.!?](?=\s|$)", answer)[0]
        return plain_number(sentence) or plain_number(answer) or first_number(answer)
    matches = list(NUMBER.finditer(spelled(text)))
    return number_of(matches[-1]) if matches else None


def gold_number(text: str) -> Number | None:
    """The number that a row's answer is, which may stand marked behind its derivation."""
    for answer in (*answers_in(text), text):
        answer = spelled(answer)
        if re.search(r"\d", answer):
            return plain_number(answer)
    return None


def number_reward(prompt: str, completion: str, row: dict) -> float:
    """1 where the completion's final number is the answer's, 12 % being 0.12 too."""
    wanted, given = gold_number(str(row["answer"])), final_number(completion)
    if wanted is None or given is None:
        return 0.0
    near = wanted.value, wanted.value * Fraction(100) ** (given.percent - wanted.percent)
    return float(any(abs(given.value - value) <= abs(value) / 10**6 for value in near))


CHOICE = re.compile(
    r"(?i:\b(?:option|choice|letter|answer(?:\s+is)?)\s*:?\s*[(*\"']*)([A-Za-z])(?![\w'])"
    r"|^\W*(?![AI]\s+[\w'])([A-Z])(?![\w'])|^\W*([a-z])(?:\W*$|[).:])"
    r"|\(([A-Za-z])\)|\b([A-Z])(?=[).:,]|\W*$)"
)


def choice_letter(text: str) -> str | None:
    """The letter that a text chooses: of a marked answer, or at the front, or the last in view."""
    marked = marked_answer(text)
    shown = (text if marked is None else marked).strip()
    found = [letter for match in CHOICE.finditer(shown) for letter in match.groups() if letter]
    if not found:
        return None
    first = marked is not None or CHOICE.match(shown)
    return found[0 if first else -1].upper()


ARITHMETIC_SPELLINGS = [
    (r"\\times\b|\\cdot\b|[×·⋅]", "*"),
    (r"\\div\b|÷", "/"),
    (r"[−–]", "-"),
    (r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))"),
    (r"\\left\b|\\right\b|\\[()\[\],;! ]|[$`]|\*\*", ""),
    (r"[\[{]", "("),
    (r"[\]}]", ")"),
]


def countdown_reward(prompt: str, completion: str, row: dict) -> float:
    """1 where the row's numbers, each once, make the answer; 0.1 where they make another one. Of
    an equation either side counts."""
    text = marked_answer(completion) or completion
    for written, one in ARITHMETIC_SPELLINGS:
        text = re.sub(written, one, text)
    numbers, wanted = sorted(map(int, row["numbers"])), int(row["answer"])
    for side in text.split("="):
        side = side.strip().rstrip(".").strip()
        try:
            value = arithmetic(side)
            used = sorted(map(int, re.findall(r"\d+", side)))
        except ValueError:
            continue
        if used == numbers:
            return 1.0 if value == wanted else 0.1
    return 0.0


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

YES_OR_NO = ("number", "math", "choice", "exact", "regex", "format", "countdown", "code")

REWARD_NAMES = ("number", "math", *[name for name in REWARDS if name != "number"], "code")

PAID = "env"  # the part of a reward that the environment pays

REWARD_SPEC = re.compile(  # what it is, and its weight; the port of a judge is none
    r"(judge:https?://[^/:]+(?::\d+)?(?:/[^:]*)?|(?!judge:).*?)(?::(-?\d*\.?\d+))?", re.S
)


def call_user(path: str, name: str, *args) -> float:
    return float(RUN_FILE(path)[name](*args))


MATH_PACKAGE = "math-verify[antlr4_13_2]"


def parsed_math(text: str) -> list:
    """What math-verify reads in a text; the time limit is that of the process it runs in."""
    module = need("math_verify", MATH_PACKAGE)
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return module.parse(text, parsing_timeout=None)


def boxed(answer: str) -> str:
    return f"\\boxed{{{answer.strip().strip('$')}}}"


def math_gold(text: str) -> list:
    """What a row's answer is; an empty list where nothing is read in it."""
    return parsed_math(boxed(marked_answer(text) or text))


def math_reward(prompt: str, completion: str, row: dict) -> float:
    """1 where the completion's answer is the row's: as plain numbers where both are, or else by
    math-verify, which knows expressions, roots, tuples, intervals, sets and equations."""
    answer, marked = str(row["answer"]), marked_answer(completion)
    numbers = gold_number(answer), marked and plain_number(spelled(marked))
    if all(numbers):
        return number_reward(prompt, boxed(marked), row)
    given = parsed_math(completion if marked is None else boxed(marked))
    verify = need("math_verify", MATH_PACKAGE).verify
    return float(bool(given) and verify(math_gold(answer), given, timeout_seconds=None))


class CallReward:
    """A function that scores completions in processes of its own, so that neither an error nor an
    endless loop nor a crash in it ends the run: that completion gets 0, and it is told once."""

    def __init__(self, name: str, function: Callable[[str, str, dict], float], seconds: float):
        self.name = name
        self.seconds = seconds
        self.told: set[str] = set()
        self.pool = Workers(function, seconds)
        self.workers = self.pool.workers

    def score(self, calls: list[tuple[str, str, dict]]) -> list[float]:
        """The scores of (prompt, completion, row), in their order."""
        return [self.accepted(value) for value in self.pool.map(calls)]

    def accepted(self, value: object) -> float:
        """A score, or 0 instead of an exception or of what is no number."""
        if isinstance(value, float) and math.isfinite(value):
            return value
        what = f"gave {value}"
        if isinstance(value, BaseException):
            what = f"{type(value).__name__}: {value}"
        if what not in self.told and len(self.told) < FAULTS_SHOWN:
            self.told.add(what)
            say(f"warning: {self.name} {what}; that completion gets 0")
        return 0.0

    def close(self) -> None:
        self.pool.close()


def user_reward(path: str, name: str, seconds: float) -> CallReward:
    """The reward FILE.py:FUNCTION; UserError where the file has no such function."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8-sig"), path)
    if name not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
        raise UserError(
            f"{path} has no function {name}",
            f"write def {name}(prompt, completion, row): return a number",
        )
    return CallReward(f"{path}:{name}", functools.partial(call_user, path, name), seconds)


CODE_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.S)


def code_in(completion: str) -> str:
    """The program in an answer: its last fenced block that is not empty, or all of it."""
    blocks = [block for block in CODE_FENCE.findall(completion) if block.strip()]
    return blocks[-1] if blocks else completion


CODE_ENDS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(")  # where a function is over


def whole_program(row: dict, completion: str) -> tuple[str, list[str]]:
    """A program and the tests that it is to pass: of HumanEval (prompt, test, entry_point), of MBPP
    (test_list) or with `tests`, a list or a text of asserts."""
    code = code_in(completion)
    if "entry_point" in row:
        if re.search(rf"def\s+{re.escape(row['entry_point'])}\b", code):
            code = row["prompt"].partition("def ")[0] + code  # its imports
        else:
            code = row["prompt"] + before_any(code, CODE_ENDS)
        return code, [f"{row['test']}\n\ncheck({row['entry_point']})\n"]
    tests = first_of(row, ("test_list", "tests"))
    if not isinstance(tests, list):
        tests = [tests]
    front = first_of(row, ("test_imports", "test_setup_code")) or ""
    if isinstance(front, list):
        front = "\n".join(map(str, front))
    return f"{front}\n{before_any(code, ('[DONE]',))}\n", [*map(str, tests)]


def output_pairs(row: dict) -> list[tuple[str, str]]:
    """(standard input, standard output) pairs of a row: a list `tests` of {input, output}, or lists
    of both in `input_output`, as APPS has it."""
    told = row.get("input_output")
    if isinstance(told, str):
        told = json.loads(told)
    if isinstance(told, dict):
        pairs = zip(told["inputs"], told["outputs"], strict=True)
        return [(str(given), str(wanted)) for given, wanted in pairs]
    tests = row.get("tests")
    if isinstance(tests, list) and tests and all(isinstance(one, dict) for one in tests):
        return [(str(one["input"]), str(one["output"])) for one in tests]
    return []


def same_output(found: str, wanted: str) -> bool:
    """Whether two outputs agree, but for spaces at the ends of lines."""
    sides = ([line.rstrip() for line in side.strip().splitlines()] for side in (found, wanted))
    return operator.eq(*sides)


def code_share(row: dict, completion: str, seconds: float) -> float:
    """The share of its row's tests that a completion's program passes."""
    if pairs := output_pairs(row):
        code = code_in(completion)
        right = 0
        for given, wanted in pairs:
            right += same_output(run_program(code, [], seconds, given).output, wanted)
        return right / len(pairs)
    program, tests = whole_program(row, completion)
    return run_program(program, tests, seconds).passed / len(tests)


TESTS_MOST = 1000  # of a row


def check_code_row(row: dict) -> None:
    """ValueError where a row has no tests."""
    if "entry_point" in row:
        good = all(isinstance(row.get(key), str) for key in ("prompt", "test", "entry_point"))
        refuse(not good, "it has no tests: an entry_point goes with prompt and test")
        return
    try:
        pairs = output_pairs(row)
    except (ValueError, LookupError, TypeError) as fault:
        raise ValueError(f"its tests have no inputs and outputs ({fault})") from fault
    tests = pairs or first_of(row, ("test_list", "tests"))
    good = isinstance(tests, (str, list)) and bool(tests)
    refuse(not good, "it has no tests: test and entry_point, test_list, tests, or input_output")
    refuse(len(tests) > TESTS_MOST and isinstance(tests, list), f"more than {TESTS_MOST} tests")


class CodeReward:
    """The share of its row's tests that a completion's program passes, several at a time."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def score(self, calls: list[tuple[str, str, dict]]) -> list[float]:
        """The scores of (prompt, completion, row), in their order; equal programs run once."""
        alike = {(code_in(completion), id(row)): (completion, row) for _, completion, row in calls}

        def share(call: tuple[str, dict]) -> float:
            completion, row = call
            return code_share(row, completion, self.seconds)

        with ThreadPoolExecutor(cores_here()) as threads:
            found = dict(zip(alike, threads.map(share, alike.values()), strict=True))
        return [found[code_in(completion), id(row)] for _, completion, row in calls]


JUDGE_RUBRIC = "A good answer is correct, complete, clear and to the point."

JUDGE_PROMPT = """Judge an answer to a question. {rubric}

Question:
{question}
{reference}
Answer:
{answer}

Say in a sentence what is good and bad about it. End with a line "Score: N", where N is a number
from 0 (worst) to 10 (best)."""

JUDGE_SCORE = re.compile(r"score\W{0,6}(\d+(?:\.\d+)?)(?:\s*/\s*10)?", re.I)

JUDGE_TRIES = 5

JUDGE_LEAST = 4  # answers of which one must be judged: a run without a judge would learn nothing

JUDGE_WAIT_S = 1.0  # before the second of them; then twice as long each time

JUDGE_KEYS = ("JUDGE_API_KEY", "OPENAI_API_KEY")  # environment variables


def judged_score(text: str) -> float:
    """The points of a judgement, from 0 to 1; ValueError where it has none."""
    found = JUDGE_SCORE.findall(text) or re.findall(r"\A\s*(\d+(?:\.\d+)?)\s*\Z", text)
    refuse(not found, f"the judge gave no score: {text[-80:]!r}")
    points = float(found[-1])
    refuse(not 0 <= points <= 10, f"the judge gave {points:g} of 10 points")
    return points / 10


class Judge:
    """A language model behind an OpenAI-compatible address that gives points to answers.

    Judgements are kept in OUT/judge.jsonl by what was asked, so that none is paid for twice and a
    resumed run finds those of the run before it. Where the address does not answer after
    JUDGE_TRIES, or says nothing that holds a score, the answer gets 0, and it is told once. The key
    is that of the environment variable JUDGE_API_KEY or OPENAI_API_KEY.
    """

    def __init__(self, url: str, settings: JudgeSettings, out: Path | None):
        self.url = url.rstrip("/")
        if not self.url.endswith("/chat/completions"):
            self.url += "/chat/completions"
        self.settings = settings
        self.rubric = JUDGE_RUBRIC
        if settings.judge_rubric:
            self.rubric = Path(settings.judge_rubric).read_text(encoding="utf-8-sig").strip()
        self.known: dict[str, float] = {}
        self.log: LogFile | None = None
        if out:
            self.log = LogFile(out / "judge.jsonl")
            for row in read_log(self.log.path):
                with contextlib.suppress(ValueError, TypeError, LookupError):  # what a kill cut
                    self.known[row["key"]] = float(row["score"])
        self.told: set[str] = set()
        self.fault = ""
        self.asked = self.tokens = 0
        self.lock = threading.Lock()

    def score(self, calls: list[tuple[str, str, dict]]) -> list[float]:
        """The scores of (prompt, completion, row), in their order; equal ones are asked once."""
        asked = [self.request(*call) for call in calls]
        keys = [sha256(json.dumps(body, sort_keys=True).encode()) for body in asked]
        new = {key: body for key, body in zip(keys, asked, strict=True) if key not in self.known}
        with ThreadPoolExecutor(self.settings.judge_at_once) as threads:
            found = [*threads.map(self.judge, new.values())]
        judged = {key: one for key, one in zip(new, found, strict=True) if one is not None}
        if len(new) >= JUDGE_LEAST and not judged:
            raise UserError(
                f"the judge {self.url} gave no answer a score ({self.fault})",
                "check its address, --judge_model and the key in JUDGE_API_KEY; the same command "
                "goes on from the newest checkpoint",
            )
        self.known |= judged
        if self.log and judged:
            self.log.write(*({"key": key, "score": score} for key, score in judged.items()))
        return [self.known.get(key, 0.0) for key in keys]

    def request(self, question: str, answer: str, row: dict) -> dict:
        reference = ""
        if row.get("answer"):
            reference = f"\nA right answer:\n{row['answer']}\n"
        prompt = JUDGE_PROMPT.format(
            rubric=self.rubric, question=question, reference=reference, answer=answer
        )
        return {
            "model": self.settings.judge_model or "default",
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self.settings.judge_tokens,
        }

    def judge(self, body: dict) -> float | None:
        """The score of a request, or None where there is none."""
        headers = {"Content-Type": "application/json"}
        if key := next((os.environ[name] for name in JUDGE_KEYS if os.environ.get(name)), ""):
            headers["Authorization"] = f"Bearer {key}"
        fault: Exception = ValueError("it was not asked")
        for attempt in range(JUDGE_TRIES):
            if attempt:
                time.sleep(JUDGE_WAIT_S * 2.0 ** (attempt - 1))
            request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
            try:
                with urllib.request.urlopen(request, timeout=self.settings.judge_seconds) as reply:
                    told = json.loads(reply.read(OUTPUT_MOST))
                self.count(told)
                return judged_score(str(told["choices"][0]["message"]["content"]))
            except urllib.error.HTTPError as wrong:
                fault = wrong
                if wrong.code not in (408, 409, 425, 429) and wrong.code < 500:
                    break
            except (OSError, http.client.HTTPException) as broken:
                fault = broken
            except (ValueError, LookupError, TypeError) as odd:
                fault = odd  # asked again at a temperature of 0 it would say the same
                break
        self.fault = what = f"{type(fault).__name__}: {fault}"
        with self.lock:
            if what not in self.told and len(self.told) < FAULTS_SHOWN:
                self.told.add(what)
                say(f"warning: {self.url}: {what}; that answer gets 0")
        return None

    def count(self, told: dict) -> None:
        usage = told.get("usage") or {}
        with self.lock:
            self.asked += 1
            self.tokens += int(usage.get("total_tokens") or 0)

    def costs(self) -> dict[str, float]:
        """What this start has asked for."""
        spent = {"cost/judge_calls": self.asked, "cost/judge_tokens": self.tokens}
        if self.settings.judge_usd:
            spent["cost/judge_usd"] = self.tokens * self.settings.judge_usd / 1e6
        return spent


class Rewards:
    """The parts of --reward, each a score of a completion, and their weights; UserError where one
    is neither known, nor a function, nor a reward model."""

    def __init__(
        self,
        specs: tuple[str, ...],
        seconds: float,
        batch_size: int,
        machine: Machine,
        judge: JudgeSettings | None = None,
        out: Path | None = None,
    ):
        """judge: how judge:URL asks; out: the folder of the file that keeps its answers."""
        self.judge = judge or JudgeSettings()
        self.out = out
        self.batch_size = batch_size
        self.machine = machine
        self.parts: dict[str, object] = {}
        self.weights: list[float] = []
        for spec in specs:
            found = REWARD_SPEC.fullmatch(spec)
            if not found:
                raise UserError(
                    f"--reward {spec} has no address", "write it as judge:http://HOST:8000/v1"
                )
            what, weight = found.groups()
            name = "judge" if what.startswith("judge:") else Path(what).name
            if name in self.parts:
                name = what
            if name in self.parts:
                raise UserError(f"--reward {what} is given twice", "give it once, with a :WEIGHT")
            self.parts[name] = REWARDS.get(what) or self.open(what, seconds)
            self.weights.append(float(weight or 1.0))
        self.yes_or_no = next(iter(self.parts)) in YES_OR_NO

    def open(self, what: str, seconds: float) -> object:
        if what == "math":
            need("math_verify", MATH_PACKAGE)
            return CallReward("the reward math", math_reward, seconds)
        if what.startswith("judge:"):
            return Judge(what.removeprefix("judge:"), self.judge, self.out)
        if what == PAID:
            return PAID
        if what == "code":
            if sys.platform == "win32":
                raise UserError("--reward code needs Linux or macOS", "use WSL or a container")
            return CodeReward(seconds)
        path, _, name = what.partition(".py:")
        path += ".py" if name else ""
        if not what or not Path(path).exists():
            raise UserError(
                f"--reward {what} is neither known, nor FILE.py:FUNCTION, nor a file",
                f"choose {either(REWARD_NAMES)}",
            )
        if not name:
            return open_judge(path, "", self.machine)
        try:
            return user_reward(path, name, seconds)
        except (SyntaxError, ValueError) as fault:
            raise UserError(f"{path} cannot be read ({fault})", "mend the file") from fault

    def check(self, row: dict) -> dict:
        """The row; ValueError where a part lacks something in it, or cannot read it."""
        try:
            for name in (name for name in self.parts if name in REWARDS):
                REWARDS[name]("", "1", row)
            answer = str(row["answer"]) if {"number", "math"} & set(self.parts) else ""
        except KeyError as fault:
            raise ValueError(f"{fault.args[0]} is missing, which the reward needs") from fault
        except (TypeError, ValueError, OverflowError, re.error) as fault:
            raise ValueError(f"it is not what the reward needs ({fault})") from fault
        if "code" in self.parts:
            check_code_row(row)
        if "number" in self.parts and gold_number(answer) is None:
            raise ValueError(f"the answer {answer[:60]!r} is no plain number: use --reward math")
        if "math" in self.parts and gold_number(answer) is None:
            worker = self.parts["math"].workers[0]
            found = worker.call(math_gold, (answer,), self.parts["math"].seconds)
            if not isinstance(found, list) or not found:
                raise ValueError(f"math-verify reads nothing in the answer {answer[:60]!r}")
        return row

    def costs(self) -> dict[str, float]:
        """What this start has spent on a judge, on this rank."""
        for part in self.parts.values():
            if isinstance(part, Judge):
                return part.costs()
        return {}

    def right(self, scores: np.ndarray) -> bool:
        """Whether the first part calls a completion right: a program only where all tests pass."""
        return bool(scores[0] > (0.999 if next(iter(self.parts)) == "code" else 0.5))

    def score(
        self,
        asked: list[Problem],
        texts: list[str],
        ended: Iterable[bool] | None = None,
        paid: Sequence[float] = (),
    ) -> np.ndarray:
        """What each part gives each completion: (completions, parts); those that have not `ended`
        were cut off, and a reward model sees no </s> behind them; `paid`: by the environment."""
        calls = [
            (one.turns[-1].text, text, one.row) for one, text in zip(asked, texts, strict=True)
        ]
        columns = []
        for part in self.parts.values():
            if part is PAID:
                columns.append(paid)
            elif isinstance(part, (CallReward, CodeReward, Judge)):
                columns.append(part.score(calls))
            elif isinstance(part, tuple):
                pairs = zip(asked, texts, strict=True)
                chats = [[*one.turns, Turn("assistant", text)] for one, text in pairs]
                columns.append(score_answers(*part, chats, self.batch_size, self.machine, ended))
            else:
                columns.append([part(*call) for call in calls])
        return np.array(columns, dtype=np.float64).T


# ==================================================================================================
# Benchmarks: files become tasks of eval, and a model's answers become figures
# ==================================================================================================

BASICS_SHOTS = 5  # of a suite, unless --n_shot says another number

CHUNK_BATCHES = 8  # after which answers are written, so that a killed evaluation goes on there

LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Question:
    """A multiple-choice question; `about` is a subject, a passage or an activity."""

    text: str
    choices: tuple[str, ...]
    answer: int
    about: str = ""


def answer_place(answer: object, labels: list[str], choices: list[str]) -> int:
    """Which choice an answer names: by its label, its place from 0, its letter or its text."""
    text = str(answer).strip()
    if text in labels:
        return labels.index(text)
    place = -1
    if isinstance(answer, int):
        place = answer
    elif text in choices:
        place = choices.index(text)
    elif text.isdigit():
        place = int(text)
    elif len(text) == 1:
        place = LETTERS.find(text.upper())
    refuse(not 0 <= place < len(choices), f"the answer {text[:40]!r} is none of the choices")
    return place


def labelled(options: object) -> tuple[list[str], list[str]]:
    """Labels and texts of choices, in any published form: a list of texts or of {label, text}, a
    dict of lists or of texts by letter."""
    if isinstance(options, dict) and {"text", "label"} <= set(options):
        return list(map(str, options["label"])), list(map(str, options["text"]))
    if isinstance(options, dict):
        return list(map(str, options)), list(map(str, options.values()))
    refuse(not isinstance(options, list) or not options, "choices are missing or empty")
    if isinstance(options[0], dict):
        labels = [str(first_of(option, ("label", "key"))) for option in options]
        return labels, [str(first_of(option, ("text", "value"))) for option in options]
    return [], list(map(str, options))


def listed_question(row: dict) -> Question:
    """A row with its choices in a list: ARC, CommonsenseQA, OpenBookQA, MMLU, MedQA and others."""
    stem = first_of(row, ("question", "question_stem", "sent1", "query", "input"))
    options = first_of(row, ("choices", "options"))
    if isinstance(stem, dict):
        options = stem.get("choices", options)
        stem = stem.get("stem")
    if options is None and "ending0" in row:
        options = [row[f"ending{place}"] for place in range(4)]
    if options is None and {"A", "B"} <= set(row):
        options = {letter: row[letter] for letter in LETTERS if letter in row}
    refuse(options is None, "it has no choices")
    labels, choices = labelled(options)
    keys = ("answerKey", "answer_idx", "answer", "label", "target", "gold")
    answer = first_of(row, keys)
    refuse(answer is None, "it has no answer")
    about = first_of(row, ("subject", "activity_label", "category")) or ""
    return Question(
        clean(stem, "question"), tuple(choices), answer_place(answer, labels, choices), str(about)
    )


def hellaswag_question(row: dict) -> Question:
    text = row.get("ctx", "")
    if "ctx_a" in row:
        text = f"{row['ctx_a']} {str(row.get('ctx_b', '')).capitalize()}"
    endings = labelled(row["endings"])[1]
    place = answer_place(row.get("label"), [], endings)
    return Question(text, tuple(endings), place, str(row.get("activity_label", "")))


def piqa_question(row: dict) -> Question:
    choices = [str(row["sol1"]), str(row["sol2"])]
    return Question(str(row["goal"]), tuple(choices), answer_place(row.get("label"), [], choices))


def winogrande_question(row: dict) -> Question:
    choices = [str(row["option1"]), str(row["option2"])]
    place = answer_place(row.get("answer"), ["1", "2"], choices)
    refuse("_" not in row["sentence"], "its sentence has no _")
    return Question(row["sentence"], tuple(choices), place)


def boolq_question(row: dict) -> Question:
    answer = first_of(row, ("answer", "label"))
    refuse(answer not in (0, 1, "0", "1"), f"the answer {answer!r} is neither true nor false")
    question = clean(row.get("question"), "question")
    return Question(question, ("no", "yes"), int(answer), clean(row["passage"], "passage"))


QUESTION_SHAPES = (  # (columns that tell a published file, how its rows are read)
    ({"endings"}, hellaswag_question),
    ({"goal", "sol1", "sol2"}, piqa_question),
    ({"sentence", "option1", "option2"}, winogrande_question),
    ({"passage", "question"}, boolq_question),
)


def choice_question(row: dict) -> Question:
    """A row of any published multiple-choice set. ValueError says what is wrong with it."""
    row = present(row)
    for columns, read in QUESTION_SHAPES:
        if columns <= set(row):
            return read(row)
    return listed_question(row)


def plain_form(asked: Question) -> list[tuple[str, str]]:
    context = f"Question: {asked.text}\nAnswer:"
    return [(context, f" {choice}") for choice in asked.choices]


def bare_form(asked: Question) -> list[tuple[str, str]]:
    return [(asked.text, f" {choice}") for choice in asked.choices]


def without_brackets(text: str) -> str:
    """HellaSwag's texts without the marks of WikiHow, as lm-evaluation-harness cleans them."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def hellaswag_form(asked: Question) -> list[tuple[str, str]]:
    context = asked.text
    if asked.about:
        context = f"{asked.about}: {context}"
    context = without_brackets(context)
    return [(context, f" {without_brackets(choice)}") for choice in asked.choices]


def winogrande_form(asked: Question) -> list[tuple[str, str]]:
    before, _, behind = asked.text.partition("_")
    return [(before + choice, f" {behind.strip()}") for choice in asked.choices]


def lettered(asked: Question, front: str = "") -> list[tuple[str, str]]:
    options = "".join(
        f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, asked.choices, strict=False)
    )
    context = f"{front}{asked.text.strip()}\n{options}Answer:"
    return [(context, f" {letter}") for letter in LETTERS[: len(asked.choices)]]


def boolq_form(asked: Question) -> list[tuple[str, str]]:
    context = f"{asked.about}\nQuestion: {asked.text}?\nAnswer:"
    return [(context, f" {choice}") for choice in asked.choices]


def sentiment_form(asked: Question) -> list[tuple[str, str]]:
    context = f"{asked.text}\nQuestion: Is this sentence positive or negative?\nAnswer:"
    return [(context, f" {choice}") for choice in asked.choices]


def label_form(asked: Question) -> list[tuple[str, str]]:
    return [(f"{asked.text}\nAnswer:", f" {choice}") for choice in asked.choices]


FORMS: dict[str, Callable[[Question], list[tuple[str, str]]]] = {  # as lm-evaluation-harness has
    "choice": plain_form,
    "arc": plain_form,
    "piqa": plain_form,
    "hellaswag": hellaswag_form,
    "winogrande": winogrande_form,
    "mmlu": lettered,
    "commonsenseqa": functools.partial(lettered, front="Question: "),
    "medqa": functools.partial(lettered, front="Question: "),
    "openbookqa": bare_form,
    "boolq": boolq_form,
}

MMLU_HEADER = "The following are multiple choice questions (with answers) about {}.\n\n"


class Benchmark:
    """A task of eval: its rows, what a model answers to some of them, and the figures of all."""

    def __init__(self, name: str, rows: list, shots: int = 0, pool: list | None = None):
        self.name = name
        self.rows = rows
        self.shots = shots
        self.pool = pool  # rows that examples are taken from; None: the other rows

    def __len__(self) -> int:
        return len(self.rows)

    def identity(self) -> str:
        """What tells this task's answers from those of any other."""
        return sha256(repr((type(self), self.rows, self.shots, self.pool)).encode())

    def examples(self, place: int) -> list:
        """The solved examples before a row: the first of a file of their own, as in the harness, or
        rows of the same file, drawn for each row alone."""
        if self.pool is not None:
            return self.pool[: self.shots]
        others = [other for other in range(len(self.rows)) if other != place]
        drawn = random.Random(derive_seed(self.shots, place))
        return [self.rows[other] for other in drawn.sample(others, min(self.shots, len(others)))]

    def answers(self, candidate: Candidate, places: list[int]) -> list[dict]:
        raise NotImplementedError

    def figures(self, answers: list[dict]) -> dict[str, float]:
        raise NotImplementedError

    def wrongness(self, answer: dict) -> float:
        """How telling an error an answer is; 0 where it is none."""
        return 1.0 - answer["acc"]


def standard_error(values: list[float]) -> float:
    """Of the mean: the sample's deviation over the root of its size."""
    if len(values) < 2:
        return 0.0
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def means(answers: list[dict], names: Iterable[str]) -> dict[str, float]:
    """The mean of each figure and its standard error."""
    found = {}
    for name in names:
        values = [float(answer[name]) for answer in answers]
        found[name] = float(np.mean(values))
        found[f"{name}_stderr"] = standard_error(values)
    return found


class ChoiceTask(Benchmark):
    """Questions whose choices are scored by their likelihood: acc takes the likeliest one, acc_norm
    that of the highest log-probability a character."""

    def __init__(self, name: str, rows: list[Question], form: Callable, *args):
        super().__init__(name, rows, *args)
        self.form = form

    def front(self, place: int) -> str:
        """What stands before a question: the subject's header of MMLU, and the examples."""
        text = ""
        if self.form is lettered and self.rows[place].about:
            text = MMLU_HEADER.format(self.rows[place].about.replace("_", " "))
        for shown in self.examples(place) if self.shots else ():
            text += "".join(self.form(shown)[shown.answer]) + "\n\n"
        return text

    def answers(self, candidate: Candidate, places: list[int]) -> list[dict]:
        pairs, counts = [], []
        for place in places:
            front = self.front(place)
            found = self.form(self.rows[place])
            counts.append(len(found))
            pairs += [text_pair(candidate.tokenizer, front + text, more) for text, more in found]
        scored = iter(candidate.score(pairs))
        answers = []
        for place, count in zip(places, counts, strict=True):
            logps = [next(scored).logp for _ in range(count)]
            answers.append(self.outcome(self.rows[place], logps))
        return answers

    def outcome(self, asked: Question, logps: list[float]) -> dict:
        sizes = [max(1, len(more) - 1) for _, more in self.form(asked)]  # without the space
        best = int(np.argmax(logps))
        normed = int(np.argmax(np.array(logps) / sizes))
        return {
            "question": asked.text,
            "choices": list(asked.choices),
            "answer": asked.answer,
            "predicted": best,
            "acc": float(best == asked.answer),
            "acc_norm": float(normed == asked.answer),
            "logps": [round(logp, 4) for logp in logps],
        }

    def figures(self, answers: list[dict]) -> dict[str, float]:
        return means(answers, ("acc", "acc_norm"))

    def wrongness(self, answer: dict) -> float:
        logps = answer["logps"]
        return logps[answer["predicted"]] - logps[answer["answer"]]


def f1_of(answers: list[dict], label: int) -> float:
    """The harmonic mean of precision and recall of a label; 0 where it is never right."""
    both = sum(a["predicted"] == label == a["answer"] for a in answers)
    named = sum(a["predicted"] == label for a in answers)
    meant = sum(a["answer"] == label for a in answers)
    return 2 * both / max(1, named + meant)


class ClassTask(ChoiceTask):
    """Texts to be labelled: accuracy, and the mean of the labels' F1. A model that chats is asked
    in its own format, where its answer ends behind the label."""

    def asked(self, row: Question) -> str:
        return self.form(row)[0][0].removesuffix("\nAnswer:")

    def answers(self, candidate: Candidate, places: list[int]) -> list[dict]:
        if not candidate.chats:
            return super().answers(candidate, places)
        pairs = []
        for place in places:
            turns = []
            for shown in self.examples(place) if self.shots else ():
                turns.append(Turn("user", self.asked(shown)))
                turns.append(Turn("assistant", shown.choices[shown.answer]))
            turns.append(Turn("user", self.asked(self.rows[place])))
            ids = encode_chat(candidate.tokenizer, turns, reply=True)[0]
            for choice in self.rows[place].choices:
                label = [*candidate.tokenizer.encode(choice), candidate.tokenizer.turn_end]
                pairs.append((ids, label))
        scored = iter(candidate.score(pairs))
        found = []
        for place in places:
            asked = self.rows[place]
            found.append(self.outcome(asked, [next(scored).logp for _ in asked.choices]))
        return found

    def figures(self, answers: list[dict]) -> dict[str, float]:
        labels = {a["answer"] for a in answers} | {a["predicted"] for a in answers}
        macro = float(np.mean([f1_of(answers, label) for label in labels]))
        return {**means(answers, ("acc",)), "macro_f1": macro}


def confusion(answers: list[dict]) -> list[str]:
    """Lines of a table: how often each label (a line) was taken for each (a column)."""
    names = answers[0]["choices"]
    counts = np.zeros((len(names), len(names)), dtype=int)
    for answer in answers:
        counts[answer["answer"], answer["predicted"]] += 1
    wide = max(max(map(len, names)), len(str(counts.max()))) + 2
    lines = ["".rjust(wide) + "".join(name.rjust(wide) for name in names)]
    for name, row in zip(names, counts, strict=True):
        lines.append(name.rjust(wide) + "".join(str(count).rjust(wide) for count in row))
    return lines


@dataclass(frozen=True)
class Span:
    """A window of a document: ids begin to end are read, those behind `done` predicted."""

    document: int
    begin: int
    done: int
    end: int


class PerplexityTask(Benchmark):
    """Texts in windows: nats a token, perplexity a token, a word and a byte, and bits a byte. Each
    text stands behind <s>; with a stride below the context every token has ids before it."""

    def __init__(
        self,
        name: str,
        documents: list,  # ids of each, <s> first
        sizes: list[tuple[int, int]],  # words and bytes of each; 0 words where unknown
        limit: int,
        stride: int,
    ):
        spans = []
        for number, ids in enumerate(documents):
            for done in rolling_starts(len(ids), limit, stride):
                begin, end = rolling_window(len(ids), done, limit, stride)
                spans.append(Span(number, begin, done, end))
        super().__init__(name, spans)
        self.documents = documents
        self.sizes = sizes

    def identity(self) -> str:
        digest = hashlib.blake2b(repr(self.rows).encode())
        for ids in self.documents:
            digest.update(np.asarray(ids).tobytes())
        return digest.hexdigest()

    def answers(self, candidate: Candidate, places: list[int]) -> list[dict]:
        pairs = []
        for place in places:
            span = self.rows[place]
            ids = self.documents[span.document]
            context = [int(i) for i in ids[span.begin : span.done + 1]]
            pairs.append((context, [int(i) for i in ids[span.done + 1 : span.end + 1]]))
        found = []
        for place, pair, scored in zip(places, pairs, candidate.score(pairs), strict=True):
            text = candidate.tokenizer.decode(pair[1][:40])
            found.append(
                {
                    "document": self.rows[place].document,
                    "tokens": len(pair[1]),
                    "nll": -scored.logp,
                    "text": text,
                }
            )
        return found

    def figures(self, answers: list[dict]) -> dict[str, float]:
        nll, tokens = sum(a["nll"] for a in answers), sum(a["tokens"] for a in answers)
        seen = {answer["document"] for answer in answers}
        words = sum(self.sizes[number][0] for number in seen)
        size = sum(self.sizes[number][1] for number in seen)
        found = {"loss": nll / tokens, "ppl": math.exp(min(nll / tokens, 700.0))}
        if words:
            found["word_perplexity"] = math.exp(min(nll / words, 700.0))
        found["byte_perplexity"] = math.exp(min(nll / size, 700.0))
        found["bits_per_byte"] = nll / size / math.log(2)
        return found

    def wrongness(self, answer: dict) -> float:
        return answer["nll"] / answer["tokens"]


@dataclass(frozen=True)
class Exercise:
    """A question to be answered in words: its turns, the row's answer, and the row."""

    turns: Turns
    answer: str
    row: dict


def pass_at(k: int, tried: int, right: int) -> float:
    """The chance that one of k answers is right, by `right` of `tried` (Chen et al. 2021)."""
    if tried - right < k:
        return 1.0
    return 1.0 - math.comb(tried - right, k) / math.comb(tried, k)


def voted(text: str) -> str:
    """What an answer counts as in a majority vote: its number, what it marks, or its text."""
    number = final_number(text)
    if number is not None:
        return str(number.value)
    return (marked_answer(text) or text).strip()


class AnswerTask(Benchmark):
    """Questions that are answered in words and checked: acc, of several answers pass@k, the answer
    of most and, with a reward model, the best one's. A model that was not taught to chat ends an
    answer at one of the `marks`."""

    marks = ("Question:",)

    def __init__(
        self,
        name: str,
        rows: list[Exercise],
        check: Callable[[list[Exercise], list[str]], list[dict]],
        sampling: SamplingSettings,
        seed: int,
        samples: int = 1,
        judge: tuple[Transformer, Tokenizer] | None = None,
        shots: int = 0,
        pool: list | None = None,
    ):
        super().__init__(name, rows, shots, pool)
        self.check = check
        self.sampling = sampling
        self.seed = seed
        self.samples = samples
        self.judge = judge

    def identity(self) -> str:
        about = (super().identity(), self.sampling, self.seed, self.samples, bool(self.judge))
        return sha256(repr(about).encode())

    def asked(self, place: int) -> Turns:
        """The turns of a chat that ask a question, solved examples before it included."""
        turns = []
        for one in self.examples(place) if self.shots else []:
            turns += [*one.turns, Turn("assistant", one.answer)]
        return turns + self.rows[place].turns

    def prompt(self, candidate: Candidate, place: int) -> list[int]:
        exercise = self.rows[place]
        if candidate.chats:
            return encode_chat(candidate.tokenizer, self.asked(place), reply=True)[0]
        text = ""
        for one in self.examples(place) if self.shots else []:
            text += f"Question: {one.turns[-1].text}\nAnswer: {one.answer}\n\n"
        text += f"Question: {exercise.turns[-1].text}\nAnswer:"
        return candidate.tokenizer.prompt(text)

    def answers(self, candidate: Candidate, places: list[int]) -> list[dict]:
        n = self.samples
        prompts = [self.prompt(candidate, place) for place in places for _ in range(n)]
        numbers = [place * n + sample for place in places for sample in range(n)]
        if candidate.chats:
            turns = [self.asked(place) for place in places for _ in range(n)]
            texts = candidate.complete(prompts, self.sampling, self.seed, numbers, turns)
        else:
            texts = complete_until(
                candidate, prompts, self.sampling, self.seed, numbers, self.marks
            )
            texts = [self.answer_in(text) for text in texts]
        asked = [self.rows[place] for place in places for _ in range(n)]
        checked = self.check(asked, texts)
        scores = self.scores(candidate, asked, texts)
        found = []
        for row, place in enumerate(places):
            part = slice(row * n, row * n + n)
            found.append(self.outcome(self.rows[place], texts[part], checked[part], scores[part]))
        return found

    def answer_in(self, text: str) -> str:
        """The answer of a model that continues a text."""
        return text.strip()

    def scores(self, candidate: Candidate, asked: list[Exercise], texts: list[str]) -> list[float]:
        """What the reward model gives each answer; nothing without one."""
        if not self.judge:
            return []
        chats = [
            [*one.turns, Turn("assistant", text)] for one, text in zip(asked, texts, strict=True)
        ]
        return score_answers(*self.judge, chats, candidate.batch_size, candidate.machine)

    def outcome(
        self,
        exercise: Exercise,
        texts: list[str],
        checked: list[dict],
        scores: list[float],
    ) -> dict:
        row = {
            "question": exercise.turns[-1].text,
            "expected": exercise.answer,
            "predicted": texts[0],
        }
        for name in checked[0]:
            row[name] = float(np.mean([one[name] for one in checked]))
        if len(texts) == 1:
            return row
        right = sum(one["acc"] > 0.5 for one in checked)
        k = 2
        while k <= len(texts):
            row[f"pass@{k}"] = pass_at(k, len(texts), right)
            k *= 2
        votes = [voted(text) for text in texts]
        most = max(votes, key=votes.count)
        row[f"maj@{len(texts)}"] = checked[votes.index(most)]["acc"]
        if scores:
            row[f"best@{len(texts)}"] = checked[int(np.argmax(scores))]["acc"]
        return row | {"samples": texts}

    def figures(self, answers: list[dict]) -> dict[str, float]:
        names = [name for name, value in answers[0].items() if isinstance(value, float)]
        return means(answers, names)


GSM8K_IGNORED = [r",", r"\$", r"(?s).*#### ", r"\.$"]

GSM8K_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")

GSM8K_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def gsm8k_text(text: str) -> str:
    for ignored in GSM8K_IGNORED:
        text = re.sub(ignored, "", text)
    return text.lower()


def gsm8k_checks(completion: str, answer: str) -> dict[str, float]:
    """exact_match of lm-evaluation-harness by its two filters: the number behind ####, and the last
    one in the text."""
    wanted = gsm8k_text(answer)
    strict = GSM8K_STRICT.search(completion)
    loose = ["".join(found) for found in GSM8K_FLEXIBLE.findall(completion)]
    return {
        "strict": float(bool(strict) and gsm8k_text(strict[1]) == wanted),
        "flexible": float(bool(loose) and gsm8k_text(loose[-1]) == wanted),
    }


def rouge_checks(completion: str, answer: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L by the package rouge-score: their F-measures."""
    scorer = need("rouge_score.rouge_scorer", "rouge-score").RougeScorer(
        ["rouge1", "rouge2", "rougeL"]
    )
    return {name: score.fmeasure for name, score in scorer.score(answer, completion).items()}


class RougeTask(AnswerTask):
    def wrongness(self, answer: dict) -> float:
        return 1.0 - answer["rougeL"]


MBPP_PROMPT = (  # of the task's authors (Austin et al. 2021), as lm-evaluation-harness has it
    "You are an expert Python programmer, and here is your task: {} "
    "Your code should pass these tests:\n\n{}\n[BEGIN]\n"
)


def code_question(row: dict) -> tuple[Turns, str]:
    """What a row with tests asks, and its solution: a function to be completed (HumanEval), or a
    task and the tests to pass (MBPP)."""
    if "entry_point" in row:
        return [Turn("user", row["prompt"])], str(row.get("canonical_solution", ""))
    text = clean(first_of(row, ("text", "prompt", "question", "instruction")), "prompt")
    tests = first_of(row, ("test_list", "tests"))
    if isinstance(tests, list):
        tests = "\n".join(map(str, tests[:3]))
    return [Turn("user", MBPP_PROMPT.format(text, tests))], str(row.get("code", ""))


class CodeTask(AnswerTask):
    """Programs that must pass the tests of their rows. A model that was not taught to chat goes on
    where the prompt ends."""

    marks = ("[DONE]",)

    def prompt(self, candidate: Candidate, place: int) -> list[int]:
        if candidate.chats:
            return super().prompt(candidate, place)
        text = ""
        for one in self.examples(place) if self.shots else ():
            text += f"{one.turns[-1].text}{one.answer}\n[DONE]\n\n"
        text += self.rows[place].turns[-1].text
        return candidate.tokenizer.prompt(text)

    def answer_in(self, text: str) -> str:
        return text  # the spaces in front are the code's


class TaskSpec(typing.NamedTuple):
    """One of --tasks: what it is called in the table, what it is, and its files."""

    label: str
    name: str
    shots: int
    path: str
    pool: str  # a file of examples, or none


TASK = re.compile(r"(?:(?P<name>[\w.-]+)(?:@(?P<shots>\d+))?=)?(?P<path>.+)", re.S)

CHECKERS = {
    "letter": "choice",
    **{name: name for name in ("number", "math", "exact", "regex", "code")},
    **dict.fromkeys(("humaneval", "mbpp"), "code"),
}

TASK_NAMES = (*FORMS, "sst2", "classify", "ppl", "rouge", "gsm8k", *CHECKERS)

TEXT_KEYS = ("text", "page", "content")

TABLES = {".csv": ",", ".tsv": "\t"}


def known_task(name: str) -> str:
    """The task that a name begins with, as arc of arc_easy; empty where it is none."""
    found = [known for known in TASK_NAMES if name == known or name.startswith(f"{known}_")]
    return max(found, key=len, default="")


def read_table(path: str) -> list[dict]:
    """Rows of a .csv or .tsv; of MMLU's own files, which have no header, by their six columns."""
    delimiter = TABLES[Path(path).suffix.lower()]
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file, delimiter=delimiter, quoting=quoting))
    except (UnicodeDecodeError, csv.Error) as fault:
        raise UserError(f"{path} cannot be read ({fault})", "save it as UTF-8") from fault
    if lines and all(len(line) == 6 and line[5] in tuple("ABCD") for line in lines):
        lines.insert(0, ["question", *"ABCD", "answer"])
    if len(lines) < 2:
        raise UserError(f"{path} has no rows", "give a table with a header and rows")
    return [dict(zip(lines[0], line, strict=False)) for line in lines[1:]]


@functools.cache
def task_rows_of(path: str) -> list[dict]:
    """The rows of a file in any form; of a plain text the one row that holds it."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if not Path(path).is_file():
        raise UserError(*missing_files(path, "--tasks"))
    if suffixes[-1:] and suffixes[-1] in TABLES:
        return read_table(path)
    if {".jsonl", ".ndjson", ".json", ".parquet"} & set(suffixes):
        return read_rows([path], dict, "error", "--tasks")
    try:
        return [{"text": Path(path).read_text(encoding="utf-8-sig")}]
    except UnicodeDecodeError as fault:
        raise UserError(f"{path} is not UTF-8 text ({fault})", "save it as such") from fault


RECOGNISED = (  # (columns, the task that rows with them are of), the first that fits
    ({"endings"}, "hellaswag"),
    ({"goal", "sol1", "sol2"}, "piqa"),
    ({"sentence", "option1", "option2"}, "winogrande"),
    ({"passage", "question"}, "boolq"),
    ({"question_stem"}, "openbookqa"),
    ({"question_concept"}, "commonsenseqa"),
    ({"options", "answer_idx"}, "medqa"),
    ({"entry_point", "test"}, "humaneval"),
    ({"test_list"}, "mbpp"),
    ({"subject", "choices"}, "mmlu"),
    ({"A", "B", "C", "D"}, "mmlu"),
    ({"choices", "answerKey"}, "arc"),
    ({"choices"}, "choice"),
    ({"options"}, "choice"),
    ({"sentence", "label"}, "classify"),
    ({"text", "label"}, "classify"),
    ({"text"}, "ppl"),
    ({"page"}, "ppl"),
)


def recognised(path: str) -> str:
    """The task that a file is, by its name or the columns of its first row; empty for none."""
    if name := known_task(Path(path).name.partition(".")[0]):
        return name
    row = present(task_rows_of(path)[0])
    for columns, name in RECOGNISED:
        if columns <= set(row):
            return name
    with contextlib.suppress(ValueError):
        answer = str(row_prompt(row)[1])
        if "####" in answer:
            return "gsm8k"
        return "rouge" if gold_number(answer) is None else "number"
    return ""


def task_spec(word: str, n_shot: int) -> TaskSpec:
    """What a word of --tasks means; UserError where it names neither a task nor a file."""
    if Path(word).exists():
        name, shots, path = "", None, word
    else:
        name, shots, path = TASK.fullmatch(word).group("name", "shots", "path")
    pool = ""
    if "," in path and not Path(path).exists():
        path, _, pool = path.partition(",")
    label = name or Path(path).name.partition(".")[0]
    if Path(path).is_dir():
        return TaskSpec(label, "data", 0, path, "")
    kind = known_task(name) if name else recognised(path)
    if not kind:
        near = difflib.get_close_matches(name, TASK_NAMES, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"--tasks {word} is no known task",
            f"{hint}give NAME=FILE, NAME being {either(TASK_NAMES)}",
        )
    if not name:
        say(f"{path}: read as {kind}")
    if shots is not None:
        label += f"@{shots}"
    return TaskSpec(label, kind, int(shots or n_shot), path, pool)


def suite_specs(folder: str, n_shot: int) -> list[TaskSpec]:
    """Every file of a folder that is a task, without and with examples."""
    if not Path(folder).is_dir():
        raise UserError(f"--suite basics {folder} is no folder", "check the path")
    specs = []
    for path in sorted(files_in(Path(folder))):
        name = ""
        with contextlib.suppress(UserError, UnicodeDecodeError):
            name = recognised(str(path))
        if not name:
            say(f"{path}: no task that is known; skipped")
            continue
        label = path.name.partition(".")[0]
        specs.append(TaskSpec(label, name, 0, str(path), ""))
        if name not in ("ppl", "rouge"):
            shots = n_shot or BASICS_SHOTS
            specs.append(TaskSpec(f"{label}@{shots}", name, shots, str(path), ""))
    if not specs:
        raise UserError(f"{folder} holds no file that is a task", "give --tasks NAME=FILE")
    return specs


def eval_specs(settings: EvalSettings) -> list[TaskSpec]:
    """The tasks of --tasks and --suite; of two with one name each is called by its file too."""
    specs = [task_spec(word, settings.n_shot) for word in settings.tasks]
    if settings.suite:
        specs += suite_specs(settings.suite[1], settings.n_shot)
    labels = [spec.label for spec in specs]
    named = []
    for spec in specs:
        if labels.count(spec.label) > 1:
            spec = spec._replace(label=f"{spec.label}:{Path(spec.path).name}")
        named.append(spec)
    if len({spec.label for spec in named}) < len(named):
        raise UserError("--tasks names a task twice", "name it once")
    return named


def class_rows(rows: list[dict], path: str) -> list[Question]:
    """Texts with their labels: columns text or sentence, and label; or questions and answers."""
    found, labels = [], []
    for number, row in enumerate(map(present, rows), 1):
        text = first_of(row, ("sentence", "text", "content", "review"))
        label = first_of(row, ("label_text", "label"))
        if text is None or label is None:
            try:
                turns, label = row_prompt(row)
            except ValueError as fault:
                raise UserError(
                    f"{path}, row {number}: {fault}", "give rows with text and label"
                ) from fault
            text = turns[-1].text
        found.append(str(text))
        labels.append(str(label).strip())
    names = tuple(sorted(set(labels)))
    if not 2 <= len(names) <= len(LETTERS):
        raise UserError(f"{path} has {len(names)} labels", "give rows of 2 to 26 labels")
    return [
        Question(text, names, names.index(label)) for text, label in zip(found, labels, strict=True)
    ]


def parsed_rows(rows: list[dict], parse: Callable, path: str) -> list:
    found = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(parse(row))
        except (ValueError, KeyError, TypeError) as fault:
            raise UserError(
                f"{path}, row {number}: {fault}", "give rows of the task that is named"
            ) from fault
    return found


def sentiment(row: dict) -> Question:
    """A row of SST-2: label 1 is positive."""
    names = ["negative", "positive"]
    place = answer_place(row.get("label"), ["0", "1"], names)
    return Question(clean(row.get("sentence", row.get("text")), "sentence"), tuple(names), place)


class TaskMaker:
    """Makes the tasks of eval for one candidate after another."""

    def __init__(self, settings: EvalSettings, sampling: SamplingSettings, machine, seed: int):
        self.settings = settings
        self.sampling = sampling
        self.machine = machine
        self.seed = seed
        self.judge: tuple[Transformer, Tokenizer] | None = None
        if settings.reward_ckpt:
            self.judge = open_judge(settings.reward_ckpt, settings.tokenizer, machine)

    def make(self, spec: TaskSpec, candidate: Candidate) -> Benchmark:
        if spec.name == "data":
            return self.data_folder(spec, candidate)
        rows = task_rows_of(spec.path)
        if self.settings.limit:
            rows = rows[: self.settings.limit]
        if spec.name == "ppl":
            return self.texts(spec, rows, candidate)
        pool = task_rows_of(spec.pool)[: spec.shots] if spec.pool else None
        if spec.name in FORMS:
            return self.choices(spec, rows, pool)
        if spec.name in ("sst2", "classify"):
            return self.classes(spec, rows, pool)
        return self.exercises(spec, rows, pool)

    def choices(self, spec: TaskSpec, rows: list[dict], pool: list[dict] | None) -> ChoiceTask:
        asked = parsed_rows(rows, choice_question, spec.path)
        shown = pool and parsed_rows(pool, choice_question, spec.pool)
        return ChoiceTask(spec.label, asked, FORMS[spec.name], spec.shots, shown)

    def classes(self, spec: TaskSpec, rows: list[dict], pool: list[dict] | None) -> ClassTask:
        if spec.name == "sst2" and "label" in rows[0]:
            form, asked = sentiment_form, parsed_rows(rows, sentiment, spec.path)
            shown = pool and parsed_rows(pool, sentiment, spec.pool)
        else:
            form, asked = label_form, class_rows(rows, spec.path)
            shown = pool and class_rows(pool, spec.pool)
        return ClassTask(spec.label, asked, form, spec.shots, shown)

    def exercises(self, spec: TaskSpec, rows: list[dict], pool: list[dict] | None) -> AnswerTask:
        check, kind, valid = self.checker(spec.name)

        def parse(row: dict) -> Exercise:
            if CHECKERS.get(spec.name) == "code":
                turns, answer = code_question(present(row))
                return Exercise(turns, answer, valid(row))
            turns, answer = row_prompt(row)
            row = present({"pattern": self.settings.pattern or None, "answer": answer} | row)
            return Exercise(turns, str(answer), valid(row))

        return kind(
            spec.label,
            parsed_rows(rows, parse, spec.path),
            check,
            self.sampling,
            self.seed,
            self.settings.num_samples,
            self.judge,
            spec.shots,
            pool and parsed_rows(pool, parse, spec.pool),
        )

    def checker(self, name: str) -> tuple[Callable, type, Callable[[dict], dict]]:
        """How answers are checked, the kind of task, and what refuses a row that cannot be."""
        if name == "rouge":

            def rouge(asked: list[Exercise], texts: list[str]) -> list[dict]:
                pairs = zip(texts, asked, strict=True)
                return [rouge_checks(text, one.answer) for text, one in pairs]

            return rouge, RougeTask, lambda row: row
        reward = CHECKERS.get(name, "number")
        kind = AnswerTask
        if reward == "code":
            kind = CodeTask
        rewards = Rewards(
            (reward,), self.settings.reward_timeout, self.settings.batch_size, self.machine
        )

        def check(asked: list[Exercise], texts: list[str]) -> list[dict]:
            scores = rewards.score(asked, texts)[:, 0]
            if reward == "code":  # all tests, as pass@k counts
                scores = scores == 1
            found = [{"acc": float(score)} for score in scores]
            if name == "gsm8k":
                for one, text, row in zip(asked, texts, found, strict=True):
                    row |= gsm8k_checks(text, one.answer)
            return found

        return check, kind, rewards.check

    def texts(self, spec: TaskSpec, rows: list[dict], candidate: Candidate) -> PerplexityTask:
        documents, sizes = [], []
        for row in rows:
            text = first_of(present(row), TEXT_KEYS)
            if not isinstance(text, str) or not text:
                raise UserError(f"{spec.path}: a row has no text", "give rows with a key text")
            documents.append(candidate.tokenizer.prompt(text))
            sizes.append((len(re.split(r"\s+", text)), len(text.encode())))
        return self.windows(spec, documents, sizes, candidate)

    def data_folder(self, spec: TaskSpec, candidate: Candidate) -> PerplexityTask:
        folder = TokenFolder(spec.path)
        if folder.tokenizer.sha256 != candidate.tokenizer.sha256:
            raise UserError(
                f"{spec.path} was made with another tokenizer than {candidate.name} has",
                "give the text itself, ppl=FILE",
            )
        if len(folder.val) < 2:
            raise UserError(f"{spec.path} has no validation text", "run prep with --val_split")
        size = round(folder.bytes_per_token("val") * (len(folder.val) - 1))
        return self.windows(spec, [folder.val], [(0, size)], candidate)

    def windows(
        self,
        spec: TaskSpec,
        documents: list,
        sizes: list[tuple[int, int]],
        candidate: Candidate,
    ) -> PerplexityTask:
        limit = candidate.model.config.seq_len
        stride = self.settings.stride or max(1, limit // 2)
        if stride > limit:
            raise UserError(
                f"--stride {stride} is longer than the context of {candidate.name}, {limit}",
                f"use at most {limit}",
            )
        return PerplexityTask(spec.label, documents, sizes, limit, stride)


ANSWER_HEAD = ("key", "ckpt", "task", "row")


class AnswerFile:
    """answers.jsonl: a row an answer, kept by what it answers, so that an evaluation that was
    stopped goes on, and one with other settings begins anew."""

    def __init__(self, path: Path, machine: Machine):
        self.path = path
        self.machine = machine
        self.used: dict[str, tuple[str, str]] = {}  # (candidate, task) by key

    def rows(self) -> Iterator[dict]:
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").split("\n"):
            with contextlib.suppress(ValueError):  # the last line may be cut
                yield json.loads(line)

    def known(self, candidate: Candidate, task: Benchmark) -> tuple[str, dict[int, dict]]:
        """The key of these answers, and those that stand in the file, by their row."""
        about = (candidate.key, candidate.chats, str(candidate.machine.dtype), task.identity())
        key = sha256(repr(about).encode())[:16]
        self.used[key] = (candidate.name, task.name)
        found = {}
        for row in self.rows():
            if row.get("key") == key:
                found[row["row"]] = {k: v for k, v in row.items() if k not in ANSWER_HEAD}
        return key, self.machine.broadcast(found)

    def append(self, key: str, answers: dict[int, dict]) -> None:
        head = dict(zip(("key", "ckpt", "task"), (key, *self.used[key]), strict=True))
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(
                json_line({**head, "row": place, **answer}) for place, answer in answers.items()
            )

    def tidy(self) -> None:
        """Drop the answers that others to the same task have replaced, and sort the rest."""
        replaced = set(self.used.values())
        kept = [
            row
            for row in self.rows()
            if row.get("key") in self.used or (row.get("ckpt"), row.get("task")) not in replaced
        ]
        kept.sort(key=lambda row: (str(row["ckpt"]), str(row["task"]), row["row"]))
        write_jsonl(self.path, kept)


def run_task(task: Benchmark, candidate: Candidate, file: AnswerFile) -> list[dict]:
    """A candidate's answers to all rows of a task, every rank giving its share."""
    machine = candidate.machine
    key, answers = file.known(candidate, task)
    waiting = [place for place in range(len(task)) if place not in answers]
    chunk = candidate.batch_size * CHUNK_BATCHES * machine.world
    progress = Progress(
        f"{candidate.name} {task.name}", len(task), "rows", len(answers), machine.main
    )
    for first in range(0, len(waiting), chunk):
        places = waiting[first : first + chunk]
        mine = places[machine.rank :: machine.world]
        found = task.answers(candidate, mine) if mine else []
        new: dict[int, dict] = {}
        for part in machine.all_gather(dict(zip(mine, found, strict=True))):
            new |= part
        machine.on_main(file.append, key, new)
        answers |= new
        progress.update(len(answers))
    progress.close()
    return [answers[place] for place in range(len(task))]


PLAIN_FIGURES = ("loss", "ppl", "word_perplexity", "byte_perplexity", "bits_per_byte")

Results = dict[str, dict[str, dict[str, float]]]  # figures by candidate and task


def shown_figure(figures: dict[str, float], name: str) -> str:
    if name not in figures:
        return "-"
    if name in PLAIN_FIGURES or abs(figures[name]) > 1:
        return f"{figures[name]:.5g}"
    text = f"{figures[name]:.1%}"
    if f"{name}_stderr" in figures:
        text += f" ±{100 * figures[f'{name}_stderr']:.1f}"
    return text


def results_cells(results: Results) -> list[list[str]]:
    """A table as cells, its head first: a measure of a task a line, a candidate a column."""
    tasks = dict.fromkeys(task for found in results.values() for task in found)
    lines = [["task", "rows", "measure", *results]]
    for task in tasks:
        cells = [found.get(task, {}) for found in results.values()]
        names = dict.fromkeys(name for cell in cells for name in cell)
        rows = max(int(cell.get("rows", 0)) for cell in cells)
        head = [task, f"{rows:,}"]
        for name in names:
            if name == "rows" or name.endswith("_stderr"):
                continue
            lines.append([*head, name, *(shown_figure(cell, name) for cell in cells)])
            head = ["", ""]
    return lines


def results_table(results: Results) -> list[str]:
    """The same as lines of text."""
    lines = results_cells(results)
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for line in lines:
        left = f"{line[0]:{wide[0]}}  {line[1]:>{wide[1]}}  {line[2]:{wide[2]}}"
        right = "".join(f"  {cell:>{size}}" for cell, size in zip(line[3:], wide[3:], strict=True))
        texts.append(left + right)
    return texts


def telling_errors(task: Benchmark, answers: list[dict], count: int) -> list[str]:
    """The errors that say most about a model: right answers thought unlikely first."""
    wrong = [answer for answer in answers if task.wrongness(answer) > 0]
    wrong.sort(key=task.wrongness, reverse=True)
    lines = []
    for answer in wrong[:count]:
        if "choices" in answer:
            said, meant = (answer["choices"][answer[k]] for k in ("predicted", "answer"))
            lines.append(f"- {answer['question']}\n  said: {said}\n  right: {meant}")
        elif "expected" in answer:
            lines.append(
                f"- {answer['question']}\n  said: {answer['predicted']}\n"
                f"  right: {answer['expected']}"
            )
        else:
            lines.append(f"- {task.wrongness(answer):.2f} nats a token: {answer['text']!r}")
    return lines


def about_answers(
    settings: EvalSettings,
    task: Benchmark,
    answers: list[dict],
    name: str,
) -> list[str]:
    """What --worst and --confusion show of a candidate's answers to a task."""
    lines = []
    if settings.worst:
        shown = telling_errors(task, answers, settings.worst)
        lines += [f"{name}, {task.name}: the {len(shown)} most telling errors", *shown, ""]
    if settings.confusion and isinstance(task, ClassTask):
        head = f"{name}, {task.name}: right labels by line, given ones by column"
        lines += [head, *confusion(answers), ""]
    return lines


def merge_results(path: Path, results: Results) -> None:
    """Write results.json: what was found now, beside what stood there of other tasks."""
    stored: Results = {}
    if path.exists():
        stored = read_json(path).get("results", {})
    for name, found in results.items():
        stored[name] = {**stored.get(name, {}), **found}
    with atomic_write(path, "w") as file:
        json.dump({"results": stored}, file, indent=1, ensure_ascii=False)


# ==================================================================================================
# Rollouts: generate, score, advantage, update
# ==================================================================================================

ENTROPY_STEP = 0.005  # by which the bonus moves a step (He et al. 2025, Skywork-OR1, section 5)


ENTROPY_BONUS_MOST = 0.1

UNINFORMATIVE_STEPS = 3  # without any difference between rewards, before it is said

LEARN_NOTHING = (
    "use easier prompts, a model that sometimes succeeds (teach it with sft first), a larger "
    "--group_size, or a higher --temperature"
)


@dataclass(frozen=True)
class Completion:
    """A sampled answer: its ids (n,), which of them were drawn (n,), the log-probabilities that
    these were drawn with, its text, whether it ended by itself, its rewards by part, and whether
    the first of them calls it right."""

    problem: Problem
    ids: np.ndarray
    own: np.ndarray
    logps: np.ndarray
    text: str
    ended: bool
    scores: np.ndarray
    reward: float
    right: bool

    @property
    def drawn(self) -> int:
        """How many ids were drawn."""
        return len(self.logps)


class Answer(typing.NamedTuple):
    """What the model made of a problem: as of a Completion, and what its environment paid."""

    ids: list[int]
    own: list[bool]
    logps: list[float]
    text: str
    ended: bool
    paid: float = 0.0


Group = list[Completion]  # the completions of one prompt


def informative(group: Group) -> bool:
    """Whether the first reward tells the completions of a group apart."""
    return len({float(one.scores[0]) for one in group}) > 1


class Sampler:
    """Draws completions from a model in training and scores them."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        rewards: Rewards | None,
        settings: RolloutSettings,
        machine: Machine,
        compiled: bool,
        environment: Toolbox | UserEnvironment | None = None,
    ):
        """rewards: None for one that only generates."""
        self.environment = environment
        self.model = model
        self.tokenizer = tokenizer
        self.rewards = rewards
        self.settings = settings
        self.machine = machine
        self.compiled = compiled
        self.latest: list[Group] = []
        self.reader: Transformer | None = None  # the model as it is sampled from

    def draw(
        self,
        problems: list[Problem],
        count: int,
        temperature: float,
        seed: int,
        first: int,
    ) -> list[Group]:
        """`count` completions of each problem; `first` numbers the first of them, for its random
        numbers."""
        asked = [one for one in problems for _ in range(count)]
        numbers = range(first, first + len(asked))
        found = self.answers(asked, temperature, seed, numbers)
        rewards = self.rewards
        texts, ended, paid = ([getattr(o, key) for o in found] for key in ("text", "ended", "paid"))
        scores = rewards.score(asked, texts, ended, paid)
        totals = scores @ np.array(rewards.weights)
        if self.settings.overlong:
            lengths = torch.tensor([len(one.logps) for one in found])
            most = self.settings.max_new_tokens
            totals += overlong_penalty(lengths, most, self.settings.overlong).numpy()
        made = []
        for problem, one, each, total in zip(asked, found, scores, totals, strict=True):
            laid = np.array(one.ids), np.array(one.own), np.array(one.logps, np.float32)
            about = one.text, one.ended, each, float(total), rewards.right(each)
            made.append(Completion(problem, *laid, *about))
        self.latest = [made[i : i + count] for i in range(0, len(made), count)]
        return self.latest

    def answers(
        self, asked: list[Problem], temperature: float, seed: int, numbers: Sequence[int]
    ) -> list[Answer]:
        """What the model makes of each problem, in one turn or in several."""
        episodes = None
        if self.environment:
            episodes = Episodes(
                self.tokenizer,
                [one.turns for one in asked],
                [one.ids.tolist() for one in asked],
                self.environment,
                self.settings.max_turns,
                [one.state for one in asked],
            )
        found, logps = self.generate(asked, temperature, seed, numbers, episodes)
        answers = []
        for row, (ids, scored) in enumerate(zip(found, logps, strict=True)):
            ended = ids[-1] in self.tokenizer.stops
            if episodes:
                text, laid = episodes.last_text(row, ids), episodes.laid(row, ids)
                ended = ended and episodes.over[row]
                answers.append(Answer(*laid, scored, text, ended, episodes.paid[row]))
            else:
                text = self.tokenizer.decode(ids)
                answers.append(Answer(ids, [True] * len(ids), scored, text, ended))
        return answers

    def renew(self) -> None:
        """Draw from the model as it is now; all ranks do so together."""
        if self.reader is None:
            self.reader = reading_copy(self.model, self.machine.dtype)
        renew_copy(self.reader, self.model)

    def generate(
        self,
        asked: list[Problem],
        temperature: float,
        seed: int,
        numbers: Sequence[int],
        follow: Followed | None = None,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """The ids of a completion of each problem, drawn by its number, and their
        log-probabilities; of several turns where something may `follow` on one."""
        logps: list[list[float]] = [[] for _ in asked]
        self.model.eval()
        with self.machine.autocast():
            found = complete(
                self.reader,
                [one.ids.tolist() for one in asked],
                SamplingSettings(self.settings.max_new_tokens, temperature, 0, 1.0),
                seed,
                self.tokenizer.stops,
                self.machine.dtype,
                numbers,
                self.settings.rollout_batch,
                self.compiled,
                logps,
                follow,
            )
        return found, logps

    def evaluate(self, prompts: Prompts, seed: int) -> dict[str, float]:
        """Of held-out prompts: pass@1, pass@k, mean reward and length, and 1 - pass@1. Every rank
        does its share."""
        s, machine = self.settings, self.machine
        places = np.arange(min(prompts.count, s.eval_prompts))
        own = np.array_split(places, machine.world)[machine.rank]
        sums = np.zeros(4)
        self.renew()
        if len(own):
            problems, first = prompts.items(own), own[0] * s.eval_samples
            key = derive_seed(seed, "eval")
            for group in self.draw(problems, s.eval_samples, s.temperature, key, first):
                right = [one.right for one in group]
                reward = np.mean([one.reward for one in group])
                length = np.mean([one.drawn for one in group])
                sums += (np.mean(right), any(right), reward, length)
        means = [total / len(places) for total in machine.all_reduce_sum(*sums)]
        first, some, reward, length = means
        return {
            "val/pass@1": first,
            f"val/pass@{s.eval_samples}": some,
            "val/reward": reward,
            "val/length": length,
            "val/error": 1 - first,
        }

    def shown(self) -> list[dict]:
        """A few of the latest completions, as rows of samples.jsonl."""
        rows = []
        for one, *_ in self.latest[: self.settings.samples]:
            answer = one.text
            if not one.own.all():
                answer = self.tokenizer.decode(one.ids)
            row = {"prompt": one.problem.turns[-1].text, "answer": answer, "ended": one.ended}
            row["reward"] = one.reward
            row |= zip(self.rewards.parts, one.scores, strict=True)
            rows.append(row)
        return rows


class MicroRollout(typing.NamedTuple):
    """A micro-batch of completions: which of the rollout's they are, the places of their tokens
    among those of all (n,), and ids and targets (B, T). Where the ids do not hold the prompts,
    `shared` are these (P, S) and which of them each row continues (B,)."""

    rows: list[int]
    tokens: Tensor
    ids: Tensor
    targets: Tensor
    shared: tuple[Tensor, ...] = ()


def can_share(config: ModelSettings, groups: list[Group]) -> bool:
    """Whether completions may share one reading of their prompt: not with experts, whose balance is
    measured over all tokens together, nor where a document begins within a row."""
    if config.n_expert:
        return False
    for group in groups:
        prompt = group[0].problem.ids
        if len(prompt) < 2:
            return False
        if config.doc_mask:
            later = [prompt[1:], *(one.ids for one in group)]
            if any((ids == config.bos_id).any() for ids in later):
                return False
    return True


class Rollout:
    """The completions of one step on this rank, laid out once for its measurements and updates.

    Numbers of tokens are vectors (n,), over the tokens of all completions in turn.
    """

    def __init__(
        self,
        groups: list[Group],
        temperature: float,
        minibatches: int,
        batch_size: int,
        length: int = 0,
        shared: bool = False,
    ):
        """length: the one to pad all to, or 0 for that of each micro-batch; shared: completions of
        a prompt share one reading of it."""
        self.completions = [one for group in groups for one in group]
        self.temperature = temperature
        self.group_size = len(groups[0])
        self.lengths = torch.tensor([one.drawn for one in self.completions])
        self.places = torch.arange(int(self.lengths.sum())).split(self.lengths.tolist())
        self.sampled = torch.from_numpy(np.concatenate([one.logps for one in self.completions]))
        numbers = np.arange(len(self.completions)).reshape(len(groups), -1)
        self.minibatches = []
        for part in np.array_split(numbers, minibatches):
            rows = part.flatten().tolist()
            laid = (
                self.share(rows, batch_size) if shared else self.lay_out(rows, batch_size, length)
            )
            self.minibatches.append(list(laid))

    def lay_out(self, rows: list[int], batch_size: int, length: int) -> Iterator[MicroRollout]:
        """Micro-batches of completions alike in length."""
        examples = {}
        for row in rows:
            one = self.completions[row]
            ids = np.concatenate((one.problem.ids, one.ids))
            asked = np.zeros(len(one.problem.ids), bool)
            example = Example(ids, np.concatenate((asked, one.own)))
            examples[row] = ids[:-1], example.targets()[:-1]
        limit = length or max(len(ids) for ids, _ in examples.values()) + 1
        order = sorted(rows, key=lambda row: len(examples[row][0]))
        for i in range(0, len(order), batch_size):
            chosen = order[i : i + batch_size]
            longest = max(len(examples[row][0]) for row in chosen)
            batch = padded([examples[row] for row in chosen], padded_length(longest, limit))
            yield MicroRollout(chosen, torch.cat([self.places[row] for row in chosen]), *batch)

    def share(self, rows: list[int], batch_size: int) -> Iterator[MicroRollout]:
        """Micro-batches of completions alike in length, whose rows begin at the last id of their
        prompts: what stands before it is read once for all completions of a prompt."""
        limit = max(len(self.completions[row].ids) for row in rows)

        def alike(row: int) -> tuple[int, int]:
            return padded_length(len(self.completions[row].ids), limit), row

        order = sorted(rows, key=alike)
        for i in range(0, len(order), batch_size):
            chosen = order[i : i + batch_size]
            prompts: dict[int, int] = {}  # the place of each problem of the micro-batch
            texts, owners, examples = [], [], []
            for row in chosen:
                one = self.completions[row]
                if id(one.problem) not in prompts:
                    prompts[id(one.problem)] = len(texts)
                    texts.append(torch.from_numpy(one.problem.ids[:-1]))
                owners.append(prompts[id(one.problem)])
                ids = np.concatenate((one.problem.ids[-1:], one.ids[:-1]))
                examples.append((ids, np.where(one.own, one.ids, IGNORE)))
            batch = padded(examples, padded_length(max(len(ids) for ids, _ in examples), limit))
            before = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=IGNORE)
            tokens = torch.cat([self.places[row] for row in chosen])
            yield MicroRollout(chosen, tokens, *batch, (before, torch.tensor(owners)))

    def halves(self, micro: MicroRollout) -> list[MicroRollout]:
        """A micro-batch as `halves` divides its tensors."""
        if len(micro.rows) < 2:
            return [micro]
        half = len(micro.rows) // 2
        lengths = self.lengths[micro.rows]
        tokens = micro.tokens.split([int(lengths[:half].sum()), int(lengths[half:].sum())])
        rows = micro.rows[:half], micro.rows[half:]
        tensors = halves((micro.ids, micro.targets, *micro.shared))
        return [
            MicroRollout(*part, ids, targets, tuple(shared))
            for *part, (ids, targets, *shared) in zip(rows, tokens, tensors, strict=True)
        ]

    def micros(self) -> Iterator[MicroRollout]:
        for part in self.minibatches:
            yield from part

    def tokens(self, part: list[MicroRollout]) -> Tensor:
        """The places of a minibatch's tokens."""
        return torch.cat([micro.tokens for micro in part])

    def of_rows(self, numbers: Tensor) -> Tensor:
        """Numbers of completions (rows,) at each of their tokens (n,)."""
        return numbers.repeat_interleave(self.lengths)

    def batches(
        self,
        part: list[MicroRollout],
        by_token: list[Tensor],
        by_row: tuple[Tensor, ...] = (),
    ) -> Iterator[tuple[Tensor, ...]]:
        """The micro-batches of a minibatch with numbers of tokens (B, T) and of rows (B, …)."""
        for micro in part:
            laid = torch.zeros(len(by_token), *micro.ids.shape)
            laid[:, micro.targets != IGNORE] = torch.stack(
                [numbers[micro.tokens].float() for numbers in by_token]
            )
            of_rows = (numbers[micro.rows] for numbers in by_row)
            yield micro.ids, micro.targets, *laid, *of_rows, *micro.shared

    def collect(self, values: Iterable[tuple[MicroRollout, Tensor]]) -> Tensor:
        """The tokens' numbers (n,) from micro-batches and their (B, T)."""
        found = torch.zeros(len(self.sampled))
        for micro, laid in values:
            found[micro.tokens] = laid.float().cpu()[micro.targets != IGNORE]
        return found


class Critic:
    """The value model of PPO and VAPO, with its optimizer."""

    def __init__(self, trainer: Trainer, model: Transformer, settings: ValueSettings, saved: dict):
        self.trainer = trainer
        self.model = model
        lr = settings.value_lr or 2 * trainer.optim.lr
        self.optim = replace(trainer.optim, lr=lr, embed_lr=lr, head_lr=lr)
        loss = functools.partial(value_loss, clip=settings.value_clip)
        objective = Objective(model, loss)
        _, self.wrapped = trainer.wrap(objective)
        self.objective = self.wrapped if trainer.sharded else objective
        self.optimizers = make_optimizers(model, self.optim, trainer.machine, trainer.compiled)
        model.grad_checkpoint = trainer.run.grad_checkpoint
        if saved:
            try:
                load_weights(model, saved["critic"], strict=not trainer.job.lora)
            except BROKEN as fault:
                raise damaged_field("critic") from fault
            load_optimizers(self.optimizers, saved.get("critic_optim"), "critic_optim")

    def state(self) -> dict:
        """What a checkpoint keeps of it."""
        lora = self.trainer.job.lora
        return {
            "critic": trained_weights(self.model) if lora else state_of(self.model),
            "critic_optim": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    @torch.no_grad()
    def values(self, rollout: Rollout) -> Tensor:
        """What it expects before each token (n,)."""
        trainer = self.trainer

        def work(micro: MicroRollout) -> Tensor:
            tensors = (micro.ids, micro.targets, *micro.shared)
            tensors = [trainer.machine.to_device(tensor) for tensor in tensors]
            return self.objective(*tensors, work=token_values).view(micro.ids.shape)

        self.model.eval()
        found = trainer.measure(rollout, work)
        self.model.train()
        return found

    def update(self, rollout: Rollout, values: Tensor, returns: Tensor, updates: int) -> dict:
        """One optimizer step a minibatch and update; what it explained of the returns before them
        (1 is all)."""
        trainer, machine = self.trainer, self.trainer.machine
        set_step(self.optimizers, self.optim, trainer.step, trainer.run.max_steps)
        self.wrapped.train()
        for _ in range(updates):
            sums = torch.zeros(2)
            for part in rollout.minibatches:
                [tokens] = machine.all_reduce_sum(len(rollout.tokens(part)))
                batches = rollout.batches(part, [values, returns])
                found = trainer.accumulate(self.wrapped, batches, machine.world / tokens)
                trainer.update(self.model, self.optimizers)
                sums += sum(found).cpu() * tokens / machine.world
        error = returns - values
        moments = returns.sum(), returns.square().sum(), error.sum(), error.square().sum()
        loss, clipped, tokens, *moments = machine.all_reduce_sum(*sums, len(values), *moments)
        spread = moments[1] - moments[0] ** 2 / tokens
        unexplained = moments[3] - moments[2] ** 2 / tokens
        return {
            "train/value_loss": loss / tokens,
            "train/value_clipped": clipped / tokens,
            "train/value_explained": 1 - unexplained / spread if spread > 1e-9 else 0.0,
        }


CURRICULUM_FLOOR = 0.02  # added to p (1 - p), so that no problem is lost for ever

LONGEST_LEFT_OUT = 6  # a solved problem is left out for 2**6 passes at most


class Curriculum:
    """Which problems a policy is given next, by what it made of them before.

    One that was solved by all its completions `solved` times in a row (0: never) is left out for a
    pass over the others, then for two, four and so on, as long as it stays solved. With `weighs`
    the others come the likelier, the more their completions differed when they were drawn last,
    p (1 - p) of a share p that was right: those never drawn as if half were.
    """

    def __init__(self, stream: Stream, solved: int, weighs: bool, seed: int):
        self.stream = stream
        self.solved = solved
        self.weighs = weighs
        self.seed = seed
        self.share = torch.full((stream.count,), 0.5)  # that was right last time
        self.streak = torch.zeros(stream.count, dtype=torch.int32)
        self.due = torch.zeros(stream.count, dtype=torch.int64)  # sample number to come back at
        self.cursor = torch.zeros(1, dtype=torch.int64)  # how far the stream's order was followed

    def state(self) -> dict[str, Tensor]:
        return {
            "share": self.share,
            "streak": self.streak,
            "due": self.due,
            "cursor": self.cursor,
        }

    def restore(self, saved: dict[str, Tensor] | None) -> None:
        for name, value in (saved or {}).items():
            getattr(self, name).copy_(value)

    def left_out(self, number: int) -> float:
        """The share of problems that are left out at a sample number."""
        return float((self.due > number).float().mean())

    def choose(self, count: int, number: int) -> np.ndarray:
        """The places of the next `count` problems, from a sample number on: all that are not left
        out, or where these are too few those of them that come back first."""
        open_ones = torch.nonzero(self.due <= number).flatten().numpy()
        if len(open_ones) < count:
            order = torch.sort(self.due, stable=True).indices.numpy()
            return np.resize(order, count)
        rng = np.random.default_rng(derive_seed(self.seed, f"curriculum/{number}"))
        if self.weighs:
            share = self.share[open_ones].double().numpy()
            weights = share * (1 - share) + CURRICULUM_FLOOR
            return rng.choice(open_ones, count, replace=False, p=weights / weights.sum())
        chosen: list[int] = []
        while len(chosen) < count:  # in the stream's own order
            [place] = self.stream.places(self.cursor.numpy())
            self.cursor += 1
            if self.due[place] <= number and place not in chosen:
                chosen.append(int(place))
        return np.array(chosen)

    def learn(self, places: np.ndarray, right: np.ndarray, number: int) -> None:
        """What became of problems that were drawn up to a sample number."""
        for place, share in zip(places.tolist(), right.tolist(), strict=True):
            self.share[place] = share
            self.streak[place] = self.streak[place] + 1 if share == 1 else 0
            beyond = int(self.streak[place]) - self.solved
            if self.solved and beyond >= 0:
                passes = 2 ** min(beyond, LONGEST_LEFT_OUT)
                self.due[place] = number + passes * self.stream.count


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
        saved = saved or {}
        self.sampler = sampler
        self.policy = policy
        self.value = value
        self.bonus, self.entropy = saved.get("entropy", (0.0, math.inf))
        self.reference: WeightCopy | None = None
        if policy.kl:
            self.reference = WeightCopy(job.model, saved.get("reference"))
        self.critic: Critic | None = None
        if critic is not None:
            self.critic = Critic(self, critic, value, saved)
        self.warned: set[str] = set()
        self.uninformative = saved.get("uninformative", 0)  # steps that taught nothing
        self.curriculum: Curriculum | None = None
        s = sampler.settings
        if s.skip_solved or s.curriculum:
            stream, seed = job.stream, args["seed"]
            self.curriculum = Curriculum(stream, s.skip_solved, s.curriculum, seed)
            self.curriculum.restore(saved.get("curriculum"))

    def state(self) -> dict:
        saved = super().state()
        saved["entropy"] = (self.bonus, self.entropy)
        saved["uninformative"] = self.uninformative
        saved["curriculum"] = self.curriculum.state() if self.curriculum else None
        saved["reference"] = self.reference.weights if self.reference else None
        if self.critic:
            saved |= self.critic.state()
        return saved

    def temperature(self) -> float:
        """The sampling temperature of this step, on the line from the first to the last."""
        s = self.sampler.settings
        end = s.temperature_end or s.temperature
        return s.temperature + (end - s.temperature) * self.step / max(1, self.run.max_steps - 1)

    def draw_groups(self, count: int) -> list[Group]:
        """Groups of the next `count` prompts of the stream, or of those that the curriculum
        chooses, from all ranks, in their order."""
        s, machine = self.sampler.settings, self.machine
        numbers = self.samples + np.arange(count)
        places = self.job.stream.places(numbers)
        if self.curriculum:
            places = self.curriculum.choose(count, self.samples)
        share = np.array_split(np.arange(count), machine.world)[machine.rank]
        groups = []
        self.sampler.renew()
        if len(share):
            problems = self.job.stream.items(places[share])
            seed = derive_seed(self.args["seed"], "rollout")
            first = int(numbers[share[0]]) * s.group_size
            groups = self.sampler.draw(problems, s.group_size, self.temperature(), seed, first)
        self.samples += s.prompts
        found = [group for part in machine.all_gather(groups) for group in part]
        if self.curriculum:
            right = [float(np.mean([one.right for one in group])) for group in found]
            self.curriculum.learn(places, np.array(right), self.samples)
        return found

    def gather(self) -> tuple[list[Group], dict[str, float]]:
        """The groups of the step on this rank, and what drawing them took.

        With dynamic sampling, groups that the first reward does not tell apart are replaced while
        draws are left. Groups are chosen over all ranks, and every rank has its share of each
        minibatch, so that the number of ranks changes nothing.
        """
        s, machine = self.sampler.settings, self.machine
        most = s.max_draws if s.dynamic_sampling else 1
        kept: list[Group] = []
        uninformative: list[Group] = []
        draws = 0
        while draws < most and len(kept) < s.prompts:
            for group in self.draw_groups(min(s.prompts, 2 * (s.prompts - len(kept)))):
                (kept if informative(group) else uninformative).append(group)
            draws += 1

        drawn = kept + uninformative
        alike = [len({one.reward for one in group}) == 1 for group in drawn]
        row = {
            "train/zero_spread": float(np.mean(alike)),
            "train/draws": draws,
            "train/reward_drawn": float(np.mean([one.reward for group in drawn for one in group])),
        }
        places = np.arange(s.prompts).reshape(self.policy.minibatches, machine.world, -1)
        if self.curriculum:
            row["train/left_out"] = self.curriculum.left_out(self.samples)
        return [drawn[place] for place in places[:, machine.rank].flatten()], row

    def lay_out(self, groups: list[Group]) -> Rollout:
        config = self.job.model.config
        length = config.seq_len if self.compiled else 0
        return Rollout(
            groups,
            self.temperature(),
            self.policy.minibatches,
            self.run.batch_size,
            length,
            self.sampler.settings.share_prompts
            and not self.compiled
            and not self.sharded  # a layer gathers its weights for one call
            and can_share(config, groups),
        )

    def measure(self, rollout: Rollout, work: Callable[[MicroRollout], Tensor]) -> Tensor:
        """Numbers of the completions' tokens (n,), of which work(micro) finds those of a
        micro-batch (B, T)."""
        waiting, found = [*rollout.micros()], []
        while waiting:
            micro = waiting.pop(0)
            parts = rollout.halves(micro)
            try:
                with self.machine.autocast():
                    found.append((micro, work(micro)))
                continue
            except (MemoryError, RuntimeError) as fault:  # torch.OutOfMemoryError is one
                alone = self.machine.world == 1 or not self.sharded
                if not out_of_memory(fault) or len(parts) < 2 or not alone:
                    raise
            free_memory(self.machine.device)
            waiting = [*parts, *waiting]
        return rollout.collect(found)

    def logps(self, rollout: Rollout) -> Tensor:
        """The policy's log-probs of the completions' tokens (n,), through the same module, in the
        same mode and micro-batches as an update, so that an unmoved policy gives the same ones."""
        zeros = torch.zeros(len(rollout.sampled))
        weights = torch.zeros(len(rollout.completions), 3)
        scalars = self.scalars(rollout, unmoved=True)

        def work(micro: MicroRollout) -> Tensor:
            [batch] = rollout.batches([micro], [zeros] * 4, (weights, scalars))
            output = self.objective(*(self.machine.to_device(tensor) for tensor in batch))
            return output.detach()[len(POLICY_METRICS) :].view(micro.ids.shape)

        return self.measure(rollout, work)

    def reference_logps(self, rollout: Rollout) -> Tensor:
        if not self.reference:
            return torch.zeros(len(rollout.sampled))
        with self.reference.in_place():
            return self.logps(rollout)

    def scalars(self, rollout: Rollout, unmoved: bool) -> Tensor:
        """What policy_loss takes once a step, in each row (rows, 3)."""
        bonus = 0.0
        if self.entropy < self.policy.entropy_target:
            bonus = self.bonus
        scalars = torch.tensor([rollout.temperature, bonus, float(unmoved)])
        return scalars.repeat(len(rollout.completions), 1)

    def rewards(
        self,
        rollout: Rollout,
        old: Tensor | None,
        reference: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The reward of each completion (rows,), and of each token (n,) its penalty for the
        divergence from the reference, with --kl_in_reward."""
        rewards = torch.tensor([one.reward for one in rollout.completions], dtype=torch.float64)
        penalty = torch.zeros(len(rollout.sampled), dtype=torch.float64)
        if self.policy.kl and self.policy.kl_in_reward:
            penalty = self.policy.kl * (reference - old).double()
        return rewards, penalty

    def advantages(
        self,
        rollout: Rollout,
        rewards: Tensor,
        penalty: Tensor,
        values: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The advantages of the completions' tokens (n,) and the returns that the values (n,) are
        to predict, where there is a value model."""
        if values is not None:
            return self.gae_advantages(rollout, rewards, penalty, values)
        totals = rewards.clone()
        rows = rollout.of_rows(torch.arange(len(rewards)))
        totals.index_add_(0, rows, penalty)
        groups = totals.view(-1, rollout.group_size)
        each = group_advantages(groups, self.policy.advantage == "mean_std").flatten()
        return rollout.of_rows(each), None

    def gae_advantages(
        self,
        rollout: Rollout,
        rewards: Tensor,
        penalty: Tensor,
        values: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Generalized advantages (n,), standardized over all ranks, and the values' targets."""
        s, lengths = self.value, rollout.lengths
        mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)  # (rows, N)
        before = torch.zeros(mask.shape, dtype=torch.float64)
        before[mask] = values.double()
        paid = torch.zeros(mask.shape, dtype=torch.float64)
        paid[mask] = penalty
        paid[torch.arange(len(lengths)), lengths - 1] += rewards
        if s.dense_reward:
            paid += s.dense_reward * dense_rewards(before, mask, s.gamma, s.dense_smoothing)

        lam = torch.full_like(rewards, s.lam)
        targets = gae(paid, before, mask, s.gamma, lam)[mask] + values
        if s.length_alpha:
            lam = length_adaptive(lengths.double(), s.length_alpha)
        own = gae(paid, before, mask, s.gamma, lam)[mask]
        count, total, squares = self.machine.all_reduce_sum(len(own), own.sum(), own.square().sum())
        mean = total / count
        deviation = math.sqrt(max(0.0, squares / count - mean**2))
        return (own - mean) / (deviation + STD_FLOOR), targets

    def token_weights(
        self,
        rollout: Rollout,
        part: list[MicroRollout],
    ) -> tuple[Tensor, float, float]:
        """What a token of each row counts (rows, 3), as policy_loss takes it; and the completions
        and tokens of a minibatch on all ranks."""
        rows = [row for micro in part for row in micro.rows]
        learned = torch.zeros(len(rollout.completions))
        right = torch.zeros(len(rollout.completions))
        for row in rows:
            one = rollout.completions[row]
            learned[row] = one.ended or not self.policy.mask_truncated
            right[row] = one.right
        lengths = rollout.lengths.float()
        own = lengths[rows]
        count, tokens, learned_tokens, right_tokens = self.machine.all_reduce_sum(
            len(rows), own.sum(), (own * learned[rows]).sum(), (own * right[rows]).sum()
        )
        policy = row_weights(
            lengths,
            self.policy.normalise,
            count,
            max(1.0, learned_tokens),
            self.sampler.settings.max_new_tokens,
        )
        likelihood = self.policy.lm_loss * right * count / max(1.0, right_tokens)
        entropy = torch.full_like(lengths, count / tokens)
        return torch.stack((policy * learned, likelihood, entropy), 1), count, tokens

    def improve(
        self,
        rollout: Rollout,
        advantages: Tensor,
        old: Tensor | None,
        reference: Tensor,
    ) -> tuple[dict[str, float], Tensor, Tensor]:
        """The policy's optimizer steps on the step's completions: its metrics, loss and gradient
        norm. `old` is None where each completion is learned from once, by an unmoved policy."""
        machine, policy = self.machine, self.policy
        width = len(POLICY_METRICS)
        importance = torch.ones(len(rollout.sampled))
        if policy.tis_cap:  # Yao et al. 2025, truncated importance sampling
            importance = (old - rollout.sampled).exp().clamp(max=policy.tis_cap)
        before = old if old is not None else torch.zeros_like(importance)
        numbers = [before, advantages, reference, importance]
        table = []
        for _ in range(policy.updates):
            for place, part in enumerate(rollout.minibatches):
                weights, count, tokens = self.token_weights(rollout, part)
                scalars = self.scalars(rollout, unmoved=not table)
                batches = rollout.batches(part, numbers, (weights, scalars))
                scale = machine.world / count
                found = self.accumulate(self.wrapped, batches, scale)
                while len(part) < len(found):  # memory ran out
                    part = [half for micro in part for half in rollout.halves(micro)]
                rollout.minibatches[place] = part
                norm = self.update(self.job.model, self.optimizers)
                found = [output / scale for output in found]
                sums = torch.stack([output[:width] for output in found]).cpu()
                loss, *means = sums[:, :-2].sum(0)
                means = [total / tokens for total in machine.all_reduce_sum(*means)]
                extremes = [sums[:, -2].max().item(), sums[:, -1].min().item()]
                table.append([loss.item() * scale, *means, *extremes])
        row, loss = self.policy_row(np.array(table))
        if old is None:  # there was one update, by the policy that sampled
            logps = []
            for micro, output in zip(part, found, strict=True):
                logps.append((micro, output[width:].view(micro.ids.shape)))
            row |= self.sampler_gap(rollout, rollout.collect(logps))
        return row, loss, norm

    def policy_row(self, table: np.ndarray) -> tuple[dict[str, float], Tensor]:
        """The metrics of the step's minibatches (minibatches, metrics), and their mean loss; where
        all were skipped the latter is NaN."""
        done = table[np.isfinite(table).all(1)]
        if not len(done):
            done = np.full_like(table[:1], np.nan)
        loss, *means = done[:, :-2].mean(0)
        most = self.machine.all_reduce_max(done[:, -2].max())
        least = -self.machine.all_reduce_max(-done[:, -1].min())
        row = report("train", POLICY_METRICS[1:], [*map(float, means), most, least])
        if not self.reference:
            del row["train/kl"]
        if math.isfinite(row["train/entropy"]):
            self.entropy = row["train/entropy"]
        if self.policy.entropy_target:
            move = math.copysign(ENTROPY_STEP, self.policy.entropy_target - self.entropy)
            self.bonus = min(ENTROPY_BONUS_MOST, max(0.0, self.bonus + move))
            row["train/entropy_bonus"] = self.bonus
        return row, torch.tensor(loss, device=self.machine.device)

    def reward_row(self, rollout: Rollout) -> dict[str, float]:
        """Means over all completions of the step, on all ranks."""
        parts = (f"reward/{name}" for name in self.sampler.rewards.parts)
        names = (*parts, "reward", "length", "truncated", "right")
        rows = []
        for one in rollout.completions:
            rows.append((*one.scores, one.reward, one.drawn, not one.ended, one.right))
        count, *sums = self.machine.all_reduce_sum(len(rows), *np.sum(rows, axis=0))
        row = report("train", names, (total / count for total in sums))
        row["train/temperature"] = rollout.temperature
        if costs := self.sampler.rewards.costs():
            names, spent = zip(*costs.items(), strict=True)
            row |= zip(names, self.machine.all_reduce_sum(*spent), strict=True)
        return row

    def sampler_gap(self, rollout: Rollout, logps: Tensor) -> dict[str, float]:
        """How far the trainer's log-probs are from those that the completions were drawn with."""
        apart = (logps - rollout.sampled).abs()
        count, total = self.machine.all_reduce_sum(len(apart), apart.sum())
        return {
            "train/sampler_gap": total / count,
            "train/sampler_gap_most": self.machine.all_reduce_max(apart.max().item()),
        }

    def needs_old_logps(self) -> bool:
        """Whether an update needs log-probs from before it; a single one has the ratio 1."""
        p = self.policy
        return p.updates * p.minibatches > 1 or p.tis_cap > 0 or (p.kl > 0 and p.kl_in_reward)

    def learn(self, rollout: Rollout) -> tuple[dict[str, float], Tensor, Tensor]:
        """All updates on the step's completions: metrics, loss and gradient norm."""
        self.objective.train()
        row = self.reward_row(rollout)
        values = self.critic.values(rollout) if self.critic else None
        old = None
        if self.needs_old_logps():
            old = self.logps(rollout)
            row |= self.sampler_gap(rollout, old)
        reference = self.reference_logps(rollout)
        rewards, penalty = self.rewards(rollout, old, reference)
        advantages, returns = self.advantages(rollout, rewards, penalty, values)
        loss = norm = torch.zeros((), device=self.machine.device)
        if self.critic:
            row |= self.critic.update(rollout, values, returns, self.policy.updates)
        if not self.critic or self.step >= self.value.value_warmup:
            more, loss, norm = self.improve(rollout, advantages, old, reference)
            row |= more
        return row, loss, norm

    def schedule_place(self) -> tuple[int, int]:
        """The policy's schedule begins where the value model's own steps end."""
        alone = self.value.value_warmup if self.critic else 0
        return max(0, self.step - alone), max(1, self.run.max_steps - alone)

    def train_step(self, stop: int = 0) -> Wishes:
        """Generate, score and learn; what all ranks wished for."""
        if self.step == 0:
            self.metrics.write(self.evaluate(keep_best=False))
        wishes, _ = self.agree(stop)
        seed_step(self.args["seed"], self.step, self.machine.rank)
        lr = set_step(self.optimizers, self.optim, *self.schedule_place())
        first = self.samples
        times = [time.monotonic()]
        groups, row = self.gather()
        times.append(time.monotonic())
        rollout = self.lay_out(groups)
        more, loss, norm = self.learn(rollout)
        row |= more
        times.append(time.monotonic())

        self.count_step()
        every = self.policy.reference_steps
        if self.reference and every and self.step % every == 0:
            self.reset_reference()
        [tokens] = self.machine.all_reduce_sum(len(rollout.sampled))
        self.metrics.add(self.step, loss, norm, int(tokens), first, self.samples - first)
        row |= self.metrics.row(lr)
        self.judge_steps()
        row["perf/rollout_tok_per_s"], row["perf/update_tok_per_s"] = tokens / np.diff(times)
        self.metrics.note = f"reward {row['train/reward']:.3f} {self.metrics.note}"
        self.warn(row)
        if self.machine.main:
            self.metrics.write_samples(self.sampler.shown(), aloud=False)
        if self.due(self.run.eval_interval):
            row |= self.evaluate()
        self.metrics.write(row)
        return wishes

    def reset_reference(self) -> None:
        """The policy becomes the reference, and its optimizer starts again (Liu et al. 2025,
        ProRL, section 2.2.2)."""
        self.reference = WeightCopy(self.job.model)
        self.optimizers = make_optimizers(self.job.model, self.optim, self.machine, self.compiled)

    def warn(self, row: dict[str, float]) -> None:
        """Say, once each, when steps teach nothing or completions are cut off."""
        if self.policy.advantage != "gae":
            self.uninformative += row["train/zero_spread"] == 1
        if self.uninformative == UNINFORMATIVE_STEPS:
            self.warn_once(
                f"in {UNINFORMATIVE_STEPS} steps no prompt had completions of different rewards, "
                f"so nothing is learned from them: {LEARN_NOTHING}"
            )
        if row["train/truncated"] > 0.5:
            self.warn_once(
                f"{row['train/truncated']:.0%} of the completions are cut off at "
                f"--max_new_tokens {self.sampler.settings.max_new_tokens}: use a larger one"
            )

    def warn_once(self, what: str) -> None:
        kind = what.split(":")[-1]
        if kind not in self.warned:
            self.warned.add(kind)
            say(f"warning: {what}")

    def fit(self) -> int:
        code = super().fit()
        if self.uninformative == self.step > 0:
            say(f"warning: no step taught the model anything: {LEARN_NOTHING}")
        return code


class DistillTrainer(Trainer):
    """Trains a student on answers of its own, which it draws anew for each step, so that a run
    resumes between two; and on those of the rows."""

    def __init__(self, *args, sampler: Sampler):
        super().__init__(*args)
        self.sampler = sampler

    def next_batch(self) -> StepBatch:
        run, machine, stream = self.run, self.machine, self.job.stream
        shape = run.grad_accum_steps, machine.world, run.batch_size
        numbers = self.samples + np.arange(math.prod(shape)).reshape(shape)
        own = numbers[:, machine.rank].flatten()
        items = [one for [one] in stream.samples(own)]
        anew = [i for i, one in enumerate(items) if stream.anew(int(own[i]), one)]
        self.sampler.renew()
        for i, made in zip(anew, self.answers([items[i] for i in anew], own[anew]), strict=True):
            items[i] = made
        micros = []
        for i in range(0, len(items), run.batch_size):
            micros.append(stream.collate([[one] for one in items[i : i + run.batch_size]]))
        targets = sum(stream.targets(micro) for micro in micros)
        return StepBatch(micros, targets, numbers.size, sum(micro.ids.numel() for micro in micros))

    def answers(self, asked: list[Example], numbers: np.ndarray) -> list[Example]:
        """The questions of examples with the student's answers, drawn by their numbers."""
        if not asked:
            return []
        prompts = [one.asked() for one in asked]
        problems = [Problem(ids, [], {}) for ids in prompts]
        seed = derive_seed(self.args["seed"], "rollout")
        temperature = self.sampler.settings.temperature
        found, _ = self.sampler.generate(problems, temperature, seed, numbers.tolist())
        made = []
        for prompt, answer in zip(prompts, found, strict=True):
            ids = np.concatenate((prompt, np.array(answer, prompt.dtype)))
            made.append(Example(ids, np.arange(len(ids)) >= len(prompt)))
        return made


def check_rollouts(
    rollout: RolloutSettings,
    policy: PolicySettings,
    world: int,
    seq_len: int,
) -> None:
    """UserError where prompts cannot be shared out, or completions leave no room."""
    shares = world * policy.minibatches
    if rollout.prompts % shares:
        raise UserError(
            f"--prompts {rollout.prompts} cannot be divided among {world} ranks and "
            f"{policy.minibatches} minibatches",
            f"use a multiple of {shares}",
        )
    if rollout.max_new_tokens >= seq_len:
        raise UserError(
            f"--max_new_tokens {rollout.max_new_tokens} leaves a prompt no room in a context of "
            f"{seq_len}",
            "use fewer, or a longer --seq_len",
        )


# ==================================================================================================
# Tuning: what sft, distill, dpo, reward and grpo share
# ==================================================================================================


def save_merged(out: Path) -> None:
    """merged.pt: the run's best model with its adapters merged into the base."""
    kept = "format kind dtype step samples best_val model config tokenizer".split()
    merged = {key: value for key, value in load_checkpoint(out).items() if key in kept}
    save_checkpoint(out / "merged.pt", merged)


class Tuning:
    """What sft, distill, dpo, reward and grpo share: the model that they start from, their rows and
    their run."""

    def __init__(
        self,
        kind: str,
        run: RunSettings,
        tune: TuneSettings,
        lora: LoraSettings,
        optim: OptimSettings,
        device: DeviceSettings,
        *more,
        text: str = "",
        **config,
    ):
        """more: other settings of the command; text: data of prep, which stand for rows; config:
        architecture that it changes."""
        self.kind = kind
        self.run = run
        self.tune = tune
        self.lora = lora
        self.optim = optim
        self.groups = (run, tune, *more, lora, optim, device)
        self.task = next((one for one in more if isinstance(one, TaskSettings) and one.task), None)
        if not text:
            self.check_rows()
        self.machine = open_machine(device)
        self.seed = device.seed
        self.path = checkpoint_path(tune.ckpt)
        base = load_checkpoint(self.path, tune.base)
        self.tokenizer = tokenizer_of(base, tune.tokenizer, tune.ckpt)
        self.weights = base["model"]
        self.key = model_key(base)
        # Arguments of the run besides its flags, which a resumed run must find again.
        self.extra: dict[str, object] = {"lora_base": self.key if lora.lora_rank else None}
        self.original = ModelSettings(**base["config"])
        self.config = self.tuned_config(self.original, config)
        self.questions: list[Turns] = []  # of held-out rows

    def check_rows(self) -> None:
        """UserError where no rows are named, or two kinds."""
        if self.tune.data and self.task:
            raise UserError("--data and --task are both given", "keep one of them")
        if not self.tune.data and not self.task:
            raise UserError(
                "--data is missing", "give --data rows.jsonl, or in sft and grpo a --task"
            )

    def tuned_config(self, old: ModelSettings, changes: dict) -> ModelSettings:
        """The checkpoint's architecture, with the command's and the user's changes."""
        original = 0
        if old.rope_scaling != "none":
            original = old.rope_original or round(old.seq_len / old.rope_factor)
        return replace(
            old,
            seq_len=self.tune.seq_len or old.seq_len,
            dropout=self.tune.dropout,
            bos_id=self.tokenizer.bos,
            rope_original=original,
            **{"doc_mask": False, "scalar_head": False, **changes},
        )

    def parts(
        self,
        parse: Callable[[dict], Row],
        make: Callable[..., Example | None],
        stream: Callable[..., Stream] = Groups,
    ) -> tuple[list[Part], list[Part]]:
        """Rows to train on and rows held out; make is example or last_answer, and a stream is
        made of groups of them, what is known of each, the context length and the seed."""
        tune = self.tune
        read = functools.partial(read_rows, parse=parse, on_bad_row=tune.on_bad_row)
        encode = functools.partial(self.encode, make, stream)
        train, val, learned = [], [], []
        for name, files, weight in tune.domains():
            if self.task:
                rows = [parse(row) for row in task_rows(self.task, self.seed)]
            else:
                rows = read(files)
            share = 0.0 if tune.val_data else tune.val_split
            own = [row for row in rows if not held_out(row[0][0], share)]
            held = [row for row in rows if held_out(row[0][0], share)]
            if not own:
                raise UserError("--val_split leaves no row to train on", "use a smaller one")
            label = f" of {name}" if name else ""
            groups, _, made = encode(own, f"rows{label}")
            learned += groups
            train.append((name, weight, made))
            if held:
                val.append((name, weight, self.encode_held(encode, held, f"held-out rows{label}")))
        if tune.val_data:
            rows = read(tune.val_data)
            val = [("", 1.0, self.encode_held(encode, rows, "validation rows"))]
        self.extra["data_key"] = data_key(learned)
        return train, val

    def encode(
        self,
        make: Callable,
        stream: Callable,
        rows: list[Row],
        label: str,
    ) -> tuple[list[list[Example]], list[int], Stream]:
        """Groups of examples of the rows that fit, which rows these are, and their stream."""
        one = functools.partial(make, self.tokenizer, limit=self.config.seq_len)
        groups, kept = fit_rows([turns for turns, _ in rows], one, label)
        known = [rows[i][1] for i in kept]
        return groups, kept, stream(groups, known, self.config.seq_len, self.seed)

    def encode_held(self, encode: Callable, rows: list[Row], label: str) -> Stream:
        """The stream of held-out rows, whose questions are kept to be answered."""
        _, kept, stream = encode(rows, label)
        for [turns, *_], _ in (rows[i] for i in kept):
            answered = turns[-1][0] == "assistant"
            self.questions.append(turns[:-1] if answered else turns)
        return stream

    def network(self, **config) -> Transformer:
        """The checkpoint's model, with what the changed architecture adds to it."""
        network = Transformer(replace(self.config, **config))
        network.init_weights(self.seed)
        if network.score is not None and not network.config.tie:
            network.lm_head.requires_grad_(False)  # a score does not depend on it
        weights = {name: w for name, w in self.weights.items() if name != "score.weight"}
        network.load_state_dict(weights, strict=False)
        return network if divides(self.run, self.machine) else network.to(self.machine.device)

    def can_pack(self) -> bool:
        """Whether conversations can be packed, for which a token has to begin each; says where
        not."""
        if self.tokenizer.opening:
            return True
        self.config = replace(self.config, doc_mask=False)
        say("conversations are not packed, as no token of this tokenizer begins one")
        return False

    def sampled(self, sft: SftSettings) -> Callable[[Transformer], list[dict]] | None:
        """What answers the first held-out questions, where there are any."""
        questions = self.questions[: sft.samples]
        if not questions:
            return None
        return functools.partial(
            sample_answers,
            tokenizer=self.tokenizer,
            questions=questions,
            most=sft.sample_tokens,
            machine=self.machine,
        )

    def adapters(self) -> dict:
        """What a checkpoint of adapters says of itself and its base."""
        return {
            "base": str(self.path.resolve()),
            "relative": os.path.relpath(self.path, self.run.out_dir),  # so that both may be moved
            "key": self.key,
            "scale": self.lora.scale,
            **asdict(self.lora),
        }

    def start(
        self,
        network: Transformer,
        train: list[Part],
        val: list[Part],
        loss: Callable[..., Tensor],
        names: tuple[str, ...] = ("loss",),
        make: Callable[..., Trainer] = Trainer,
        **job_fields,
    ) -> int:
        """Train the network, or adapters of it, on the rows; job_fields: more of a Job."""
        run, machine = self.run, self.machine
        lora = None
        if self.lora.lora_rank:
            kept = torch.float32 if divides(run, machine) else machine.dtype
            attach_lora(network, self.lora, self.seed, kept)
            lora = self.adapters()

        def evaluate(module: nn.Module, run: RunSettings) -> dict[str, float]:
            share = run.batch_size, run.eval_tokens, machine.rank, machine.world
            parts = [(name, weight, stream.in_order(*share)) for name, weight, stream in val]
            return validate(module, parts, machine, names)

        stream = mixed([stream for *_, stream in train], [weight for _, weight, _ in train])
        made = {"evaluate": evaluate, "names": names, "lora": lora, **job_fields}
        job = Job(self.kind, network, loss, stream, tokenizer=self.tokenizer, **made)
        self.weights = None  # the network has them
        code = train_job(
            job, machine, run, self.optim, self.groups, self.extra, self.tune.epochs, make
        )
        if code == 0 and lora and self.lora.lora_merge:
            machine.on_main(save_merged, Path(run.out_dir))
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
        network.to(machine.device)
        logps = row_logps(network.eval(), pairs, tuning.run.micro_batch, machine)
        machine.on_main(save_array, path, logps)
    for stream in streams:
        stream.numbers, logps = logps[: stream.count], logps[stream.count :]


def score_rows(
    reward: RewardSettings,
    run: RunSettings,
    tune: TuneSettings,
    device: DeviceSettings,
) -> int:
    """Write the rows of --score again, with the reward model's score of each answer."""
    machine = open_machine(device)
    out = reward.out or "scored.jsonl"
    check_writable(Path(out))
    model, tokenizer = open_judge(tune.ckpt, tune.tokenizer, machine, tune.base)

    def parse(row: dict) -> tuple[dict, list[Turns]]:
        if "chosen" in row:
            return row, list(preference(row))
        return row, [conversation(row)]

    found = read_rows(reward.score, parse, tune.on_bad_row, "--score")
    chats = [turns for _, group in found for turns in group]
    scores = iter(score_answers(model, tokenizer, chats, run.micro_batch, machine))
    names = {1: ("reward",), 2: ("chosen_reward", "rejected_reward")}
    rows = [row | {name: next(scores) for name in names[len(group)]} for row, group in found]
    write_jsonl(out, rows)

    say(f"{len(rows)} rows scored in {out}")
    pairs = [row for row in rows if "chosen" in row]
    if pairs:
        right = sum(row["chosen_reward"] > row["rejected_reward"] for row in pairs)
        say(f"the chosen answer scores higher in {right / len(pairs):.1%} of {len(pairs)} pairs")
    return 0


# ==================================================================================================
# Planning: what a checkpoint is, what a run takes, the fastest flags
# ==================================================================================================

BENCH_BATCH = 4  # sequences of the first trial

BENCH_WARMUP = 2  # steps before timing

BENCH_REPEATS = (3, 12)  # fewest and most timings of a trial

BENCH_SECONDS = 1.0  # a timing takes at least so long

BENCH_STABLE = 0.03  # timings agree where their median is known so well

BENCH_TOKENS = 1 << 19  # of a micro-batch: more never trains better, and is not tried

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


CHOSEN_PRESETS = {"1m": 1e6, "5m": 5e6, "15m": 15e6, "50m": 50e6, "138m": 1e8}  # without the ends


REPEATS = 10.0  # passes over a text, behind which more of them teach a larger model more


def usual_seconds(device: torch.device) -> float:
    """How long a run takes whose time is not given."""
    if device.type == "cpu":
        return 1200.0
    return 3600.0


def fitting_preset(tokens: float, seconds: float, device: torch.device) -> str:
    """The preset for a text of so many tokens and so long a run: the model that reads 20 tokens a
    parameter in that time (Hoffmann et al. 2022), or a larger one where it would read them all
    over REPEATS times, but none of more than ten parameters a token."""
    speed = ASSUMED_FLOPS.get((device.type, torch.float32)) or 0.3 * (peak_flops(device) or 1e14)
    flops = speed * (seconds or usual_seconds(device))
    wanted = max(math.sqrt(flops / 120), flops / (6 * REPEATS * tokens))
    wanted = min(wanted, 10.0 * tokens)
    return min(CHOSEN_PRESETS, key=lambda name: abs(math.log(CHOSEN_PRESETS[name] / wanted)))


SHAPE = ("n_layer", "d_model", "n_head", "n_kv_head", "head_dim", "ffn_mult", "ffn_hidden")


def fitted(
    run: RunSettings,
    model: ModelSettings,
    tokens: int,
    machine: Machine,
) -> tuple[RunSettings, ModelSettings]:
    """The settings with a model that suits the text, the time and the device, where no flag gives
    its shape; of a run that is there already, its own model."""
    if run.preset or any(getattr(model, name) != getattr(ModelSettings, name) for name in SHAPE):
        return run, model
    newest = machine.on_main(newest_whole, Path(run.out_dir), run.resume)
    if newest:
        config = read_checkpoint(newest, sharded=True)["config"]
        known = {f.name for f in flags(ModelSettings)} & {*config}
        return run, replace(model, **{name: config[name] for name in known})
    name = fitting_preset(tokens, run.budget, machine.device)
    shape = {
        key: value
        for key, value in PRESETS[name].items()
        if getattr(model, key) == getattr(ModelSettings, key)
    }
    return replace(run, preset=name), replace(model, **shape)


def describe_checkpoint(path: Path) -> Iterator[str]:
    saved = load_checkpoint(path)
    config = ModelSettings(**saved["config"])
    counts = parameter_counts(config)
    kind = saved.get("kind", "model")
    if saved["original"]:
        kind = "of the original program"
    best = ""
    if saved.get("best_val", math.inf) < math.inf:
        best = f", best validation metric {saved['best_val']:.4f}"
    size = sum(part.stat().st_size for part in (path, *path.glob("*"))) / 1e6
    yield f"{path}: {kind}, step {saved.get('step', '?')}{best}, {size:.1f} MB"
    yield (
        f"parameters: {counts['total']:,} (embedding {counts['embedding']:,}, head "
        f"{counts['head'] or 'tied'}, layers {counts['blocks']:,}), "
        f"{short(flops_per_token(config))} training FLOPs per token"
    )
    yield "config: " + " ".join(f"{k}={v}" for k, v in saved["config"].items())
    if saved["tokenizer"]:
        pieces = make_tokenizer(bytes(saved["tokenizer"])).vocab_size
        yield f"tokenizer: {pieces:,} pieces, in the checkpoint"
    else:
        yield "tokenizer: none in the checkpoint, use --tokenizer"


def plan(settings: InfoSettings, config: ModelSettings, optim: OptimSettings) -> Iterator[str]:
    """What a run of a preset would take: parameters, FLOPs, memory, hours, money."""
    counts = parameter_counts(config)
    flops = flops_per_token(config)
    tokens = settings.tokens or 20 * counts["active"]  # (Hoffmann et al. 2022)
    yield (
        f"{settings.preset or 'model'}: {counts['total']:,} parameters (embedding "
        f"{counts['embedding']:,}, head {counts['head'] or 'tied'}, layers "
        f"{counts['blocks']:,}; {counts['active']:,} active), vocabulary "
        f"{config.vocab_size:,}, context {config.seq_len:,}"
    )
    memory = plan_memory(config, settings, optim, settings.gpus)
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.items())
    yield f"memory per device, about: {sum(memory.values()) / 1e9:.2f} GB ({parts})"
    step = settings.micro_batch * max(1, settings.grad_accum_steps) * settings.gpus
    step *= config.seq_len
    yield (
        f"compute: {short(flops)} FLOPs per token, {flops * tokens:.3g} for {short(tokens)} "
        f"tokens, {tokens / step:,.0f} steps of {step:,} tokens"
    )
    speed = settings.tok_per_s
    if not speed:
        speed = (flops_of(settings.gpu) or 0.0) * settings.gpus * settings.mfu / flops
    if speed:
        hours = tokens / speed / 3600
        cost = ""
        if settings.usd_per_hour:
            cost = f", ${hours * settings.usd_per_hour:,.2f}"
        yield f"time: {hours:,.1f} hours at {short(speed)} tokens per second{cost}"
    elif settings.gpu:
        raise UserError(f"the speed of --gpu {settings.gpu} is not known", "give --tok_per_s")
    else:
        yield "time: unknown; give --gpu NAME or --tok_per_s N"


def planned(settings: InfoSettings, model: ModelSettings) -> ModelSettings:
    vocab = settings.vocab or PRESETS.get(settings.preset, {}).get("vocab_size", 32000)
    return replace(model, vocab_size=vocab)


def stable(speeds: list[float]) -> bool:
    """Whether the timings agree: half of them lie within BENCH_STABLE of their median."""
    fewest, most = BENCH_REPEATS
    if len(speeds) < fewest:
        return False
    low, middle, high = np.percentile(speeds, (25, 50, 75))
    return len(speeds) >= most or high - low <= BENCH_STABLE * middle


def time_row(trainer: Trainer) -> dict:
    """The metrics of as many steps as BENCH_SECONDS hold."""
    began = time.monotonic()
    while True:
        trainer.train_step(0)
        if time.monotonic() - began >= BENCH_SECONDS:
            return trainer.metrics.row(0.0)


def time_steps(
    config: ModelSettings,
    optim: OptimSettings,
    device: DeviceSettings,
    run: RunSettings,
) -> dict:
    """The metrics of training steps on random tokens, timed until their speed is stable."""
    machine = open_machine(device)
    network = Transformer(config)
    network.init_weights(device.seed)
    network.to(machine.device).grad_checkpoint = run.grad_checkpoint
    size = (BENCH_WARMUP + 8) * run.batch_size * config.seq_len + 1
    ids = np.random.default_rng(device.seed).integers(config.vocab_size, size=size)
    job = Job(
        "bench",
        network,
        functools.partial(pretrain_loss, z_loss=optim.z_loss),
        Windows(ids, config.seq_len, device.seed),
        lambda *_: {},
        None,
    )
    with contextlib.redirect_stderr(io.StringIO()):
        trainer = Trainer(job, machine, run, optim, {"seed": device.seed}, None)
        for _ in range(BENCH_WARMUP):
            trainer.train_step(0)
        trainer.metrics.row(0.0)  # ends the warm-up, and begins to count
        speeds = []
        while not stable(speeds):
            row = time_row(trainer)
            speeds.append(row["perf/tok_per_s"])
    return row | {"perf/tok_per_s": float(np.median(speeds))}


def trial(
    config: ModelSettings,
    optim: OptimSettings,
    device: DeviceSettings,
    flags: dict,
) -> float:
    """Tokens per second of training with these flags, 0 where they do not fit in memory. It has a
    process of its own, so that it leaves neither memory nor compiled code, and may die alone."""
    step = {name: value for name, value in flags.items() if name != "dtype"}
    device = replace(device, dtype=flags["dtype"])
    shown = " ".join(f"--{name} {value}" for name, value in flags.items())
    with tempfile.TemporaryDirectory() as out, worker_pool(1, "spawn") as pool:
        run = RunSettings(out_dir=out, max_steps=1_000_000, log_interval=1_000_000, **step)
        run = replace(run, eval_interval=1_000_000)
        try:
            row = pool.submit(time_steps, config, optim, device, run).result()
        except RuntimeError as fault:  # killed, or refused by torch
            if not isinstance(fault, BrokenProcessPool) and not out_of_memory(fault):
                raise
            say(f"  {shown}: does not fit in memory")
            return 0.0
    figures = f"{short(row['perf/tok_per_s'])} tokens per second"
    if row["perf/mfu"]:
        figures += f", mfu {row['perf/mfu']:.1%}"
    if "gpu/memory_gb" in row:
        figures += f", {row['gpu/memory_gb']:.2f} GB"
    say(f"  {shown}: {figures}")
    return row["perf/tok_per_s"]


def fastest(
    speed: Callable[[dict], float],
    flags: dict,
    changes: Iterable[dict],
    largest: int,
) -> tuple[dict, float]:
    """The flags of most speed, and that: each change is made to the best so far, and the batch
    doubled, up to the `largest`, while it pays; layers are recomputed where memory ended that."""
    most = 0.0
    full = False
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
            if found < BENCH_GAIN * before or 2 * tried["batch_size"] > largest:
                break
            tried = tried | {"batch_size": 2 * tried["batch_size"]}
        full = full or not found
    return flags, most


# ==================================================================================================
# Plots: the curves of runs, in a picture, on the terminal, or in a report
# ==================================================================================================

AXES = {  # --against: (key of a row of metrics, what its unit is divided by, label)
    "step": ("step", 1, "step"),
    "tokens": ("tokens", 1, "tokens"),
    "hours": ("time", 3600, "hours"),
    "dollars": ("cost/usd", 1, "dollars"),
}

PANELS = (  # (title, patterns of the metrics in it, whether its values span orders of magnitude)
    ("loss (nats)", ("train/loss", "val/loss", "val/loss/*", "train/value_loss"), False),
    ("bits per byte", ("val/bpb",), False),
    ("divergence from the teacher (nats)", ("train/divergence", "val/divergence"), False),
    ("reward", ("train/reward", "val/reward", "train/reward/*"), False),
    ("held-out prompts solved", ("val/pass@*",), False),
    ("completion length (tokens)", ("train/length", "val/length"), False),
    ("entropy (nats per token)", ("train/entropy",), False),
    ("share of groups without spread", ("train/zero_spread",), False),
    ("share of prompts left out", ("train/left_out",), False),
    ("accuracy", ("train/accuracy", "val/accuracy"), False),
    ("reward margin", ("train/margin", "val/margin"), False),
    ("learning rate", ("train/lr",), False),
    ("gradient norm", ("train/grad_norm",), True),
    ("tokens per second", ("perf/tok_per_s", "perf/rollout_tok_per_s"), False),
    ("model FLOPs utilization", ("perf/mfu",), False),
    ("GPU memory (GB)", ("gpu/memory_gb",), False),
)

COLOURS = (  # of Okabe and Ito 2008, told apart by every eye
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)

LINES = ("-", "-.", ":")  # of the metrics of training in one panel

MARKS_OF_POINTS = ("o", "s", "^", "D")  # of the held-out ones

MARKED = 40  # most points of a curve that are marked

SMOOTHED = 60  # points of a curve from which it is drawn as a mean over its neighbours as well

Curve = tuple[np.ndarray, np.ndarray]  # x and y


LARGEST = 1e100  # of what can be drawn


def numbers_of(row: dict) -> dict[str, float]:
    """The numbers of a row of metrics.jsonl, or nothing where it is of no step."""
    if type(row.get("step")) is not int:
        return {}
    numbers = {name: value for name, value in row.items() if type(value) in (int, float)}
    return {name: value for name, value in numbers.items() if not abs(value) >= LARGEST}


class RunLog:
    """What a run has logged."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.name = str(folder)
        rows = map(numbers_of, read_log(self.folder / "metrics.jsonl"))
        self.rows = [row for row in rows if "step" in row]
        if not self.rows:
            raise UserError(f"{folder} has no metrics.jsonl with rows", "give the folder of a run")

    def metrics(self, pattern: str) -> list[str]:
        """The metrics that a pattern matches, in their order of appearance."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return [name for name in names if fnmatch.fnmatchcase(name, pattern)]

    def curve(self, metric: str, against: str) -> Curve:
        key, unit, _ = AXES[against]
        points = [
            (row[key] / unit, row[metric])
            for row in self.rows
            if isinstance(row.get(metric), (int, float)) and isinstance(row.get(key), (int, float))
        ]
        x, y = np.array(points, dtype=float).reshape(-1, 2).T
        return x, y


def open_runs(folders: Iterable[str], against: str) -> list[RunLog]:
    """The logs of runs; UserError where one has no value for the x axis."""
    runs = [RunLog(folder) for folder in folders]
    for run in runs:
        if not run.metrics(AXES[against][0]):
            raise UserError(
                f"{run.name} logged no {against}",
                "use --against step; dollars are logged where --usd_per_hour is given",
            )
    names = [run.name for run in runs]
    prefix = ""
    if len(set(names)) > 1:
        with contextlib.suppress(ValueError):  # of absolute and relative paths together
            prefix = os.path.commonpath(names)
    for run in runs:  # short names where they tell the runs apart
        if prefix and run.name != prefix:
            run.name = str(Path(run.name).relative_to(prefix))
    return runs


def panels_of(runs: list[RunLog]) -> list[tuple[str, list[str], bool]]:
    """(title, metrics, logarithmic) of the panels that the runs have curves for."""
    found = []
    for title, patterns, logarithmic in PANELS:
        metrics = dict.fromkeys(
            metric for pattern in patterns for run in runs for metric in run.metrics(pattern)
        )
        shown: dict[
            tuple, str
        ] = {}  # of metrics with one curve, as a reward's only part, the first
        for metric in metrics:
            points = tuple(run.curve(metric, "step")[1].tobytes() for run in runs)
            if any(points):
                shown.setdefault(points, metric)
        if shown:
            found.append((title, list(shown.values()), logarithmic))
    return found


def running_mean(y: np.ndarray) -> np.ndarray:
    """The mean over a twentieth of the points around each."""
    width = max(3, len(y) // 20) | 1
    padded_ends = np.pad(y, width // 2, mode="edge")
    return np.convolve(padded_ends, np.ones(width) / width, mode="valid")


def draw_curve(axes, curve: Curve, colour: str, label: str, place: int, held_out: bool) -> None:
    """A curve: of training thin, with its mean over it; of held-out data with a mark a point.
    `place` tells the metrics of one run apart."""
    x, y = curve
    line, mark = LINES[place % len(LINES)], MARKS_OF_POINTS[place % len(MARKS_OF_POINTS)]
    style = {"color": colour, "linewidth": 1.7, "label": label, "linestyle": line}
    if held_out:
        style |= {"linestyle": "--", "linewidth": 1.4}
        if len(x) <= MARKED:
            style |= {"marker": mark, "markersize": 4}
    elif len(x) > SMOOTHED:
        axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.3)
        y = running_mean(y)
    axes.plot(x, y, **style)


def draw_panel(
    axes,
    panel: tuple[str, list[str], bool],
    runs: list[RunLog],
    against: str,
) -> None:
    """One panel: a colour a run, or a metric where there is one run."""
    title, metrics, logarithmic = panel
    for number, run in enumerate(runs):
        for place, metric in enumerate(metrics):
            curve = run.curve(metric, against)
            if not len(curve[0]):
                continue
            colour, label = number, f"{run.name} {metric}"
            if len(runs) == 1:
                colour, label = place, metric
            elif len(metrics) == 1:
                label = run.name
            colour = COLOURS[colour % len(COLOURS)]
            draw_curve(axes, curve, colour, label, place, metric.startswith("val/"))
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(AXES[against][2], fontsize=8)
    axes.tick_params(labelsize=8, which="both")
    if against == "tokens":
        axes.xaxis.set_major_formatter(need("matplotlib.ticker").EngFormatter(sep=""))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if logarithmic:
        axes.set_yscale("log")
    if len(runs) > 1 or len(metrics) > 1:
        axes.legend(fontsize=7, frameon=False)


def draw_runs(runs: list[RunLog], against: str):
    """A figure of matplotlib with every panel of the runs."""
    need("matplotlib").use("Agg")
    pyplot = need("matplotlib.pyplot")
    panels = panels_of(runs)
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, grid = pyplot.subplots(
        rows,
        columns,
        figsize=(4.6 * columns, 3.1 * rows),
        squeeze=False,
        layout="constrained",
    )
    places = list(grid.flat)
    for axes, panel in zip(places, panels, strict=False):
        draw_panel(axes, panel, runs, against)
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    return figure


def save_plot(runs: list[RunLog], against: str, path: Path) -> None:
    """Write a picture in the format of its suffix; UserError for one that matplotlib lacks."""
    figure = draw_runs(runs, against)
    kinds = figure.canvas.get_supported_filetypes()
    kind = path.suffix.lower().lstrip(".")
    if kind not in kinds:
        raise UserError(
            f"--out {path} is no picture", "end its name in .png, .svg or .pdf, or use --html"
        )
    with atomic_write(path) as file:
        figure.savefig(file, format=kind, dpi=150)
    need("matplotlib.pyplot").close(figure)


def terminal_plot(runs: list[RunLog], against: str) -> list[str]:
    """Every panel as lines of text, a curve below the other."""
    lines = []
    for title, metrics, _ in panels_of(runs):
        for run in runs:
            for metric in metrics:
                x, y = run.curve(metric, against)
                if not len(x):
                    continue
                name, unit = AXES[against][2], short
                about = f"{run.name}: {metric} ({title}), {name} {unit(x[0])} to {unit(x[-1])}, "
                lines += [f"{about}last {y[-1]:.4g}", curve(y.tolist()), ""]
    return lines


REPORT_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #ffffff; --line: #d8d8d8;
  --soft: #f4f4f4; --accent: #0072B2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181b; --line: #3a3d42;
  --soft: #202327; --accent: #6db7e8; } .curves { background: #fff; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
.about { color: var(--accent); margin-top: 0; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem; text-align: left;
  vertical-align: top; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
th { background: var(--soft); }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; font-size: 12.5px;
  white-space: pre-wrap; }
.wide { overflow-x: auto; } .curves { border-radius: 6px; }
.curves svg { width: 100%; height: auto; }
details { margin: .4rem 0; } summary { cursor: pointer; }
"""


def html_table(head: list[str], rows: list[list[object]]) -> str:
    """A table; columns of numbers stand at the right."""
    right = [all(isinstance(row[i], float) for row in rows) for i in range(len(head))]
    lines = []
    for place, row in enumerate([head, *rows]):
        tag = "td" if place else "th"
        cells = []
        for cell, number in zip(row, right, strict=True):
            shown = f"{cell:.4g}" if isinstance(cell, float) else str(cell)
            kind = ' class="number"' if number else ""
            cells.append(f"<{tag}{kind}>{html.escape(shown)}</{tag}>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    body = "\n".join(lines)
    return f'<div class="wide"><table>\n{body}\n</table></div>'


def report_summary(run: RunLog) -> str:
    """The first lines of a report: the best and the last figures of a run."""
    last = run.rows[-1]
    took = f"{last['step']:,} steps, {short(last.get('tokens', 0))} tokens"
    took += f", {duration(last.get('time', 0.0))}"
    if run.metrics("cost/usd"):
        took += f", ${run.curve('cost/usd', 'step')[1][-1]:.2f}"
    rows = []
    for metric in (*run.metrics("val/*"), *run.metrics("train/loss")):
        x, y = run.curve(metric, "step")
        if len(x):
            low, high = int(np.argmin(y)), int(np.argmax(y))
            rows.append([metric, float(y[0]), float(y[-1]), float(y[low]), float(y[high])])
    table = html_table(["metric", "first", "last", "lowest", "highest"], rows)
    return f'<p class="about">{html.escape(took)}</p>\n{table}'


def report_samples(run: RunLog) -> str:
    """What the model answered at each evaluation, the newest first."""
    by_step: dict[int, list[dict]] = {}
    for row in read_log(run.folder / "samples.jsonl"):
        by_step.setdefault(row.get("step", 0), []).append(row)
    parts = []
    shown = sorted(by_step, reverse=True)
    for step in shown[:: max(1, len(shown) // 20)]:
        rows = []
        for row in by_step[step]:
            cells = [row.get("prompt", ""), row.get("answer", "")]
            rows.append([*cells, float(row["reward"])] if "reward" in row else cells)
        head = ["prompt", "answer", "reward"][: len(rows[0])]
        opened = " open" if step == shown[0] else ""
        parts.append(
            f"<details{opened}><summary>step {step:,}</summary>{html_table(head, rows)}</details>"
        )
    return "\n".join(parts)


def report_results(paths: Iterable[Path]) -> str:
    """The tables of eval, in one."""
    results: Results = {}
    for path in paths:
        for name, found in read_json(path).get("results", {}).items():
            results[name] = {**results.get(name, {}), **found}
    head, *rows = results_cells(results)
    return html_table(head, rows)


def run_report(run: RunLog, against: str, results: list[Path]) -> str:
    """A report of a run as one HTML page that needs nothing from outside."""
    drawn = io.StringIO()
    figure = draw_runs([run], against)
    figure.savefig(drawn, format="svg")
    need("matplotlib.pyplot").close(figure)
    picture = drawn.getvalue()
    picture = picture[picture.index("<svg") :]
    parts = [f"<h1>{html.escape(run.name)}</h1>", report_summary(run)]
    parts += ["<h2>Curves</h2>", f'<div class="curves">{picture}</div>']
    if results:
        parts += ["<h2>Evaluation</h2>", report_results(results)]
    if samples := report_samples(run):
        parts += ["<h2>Samples</h2>", samples]
    flags_of_run = run.folder / "args.txt"
    if flags_of_run.exists():
        text = html.escape(flags_of_run.read_text(encoding="utf-8"))
        parts += ["<h2>Settings</h2>", f"<pre>{text}</pre>"]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(run.name)}</title><style>{REPORT_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


@torch.inference_mode()
def attention_weights(model: Transformer, ids: Tensor) -> list[Tensor]:
    """What every head of each layer attends to in ids (1, T): (H, T, S), a row summing to 1; S has
    the learned sinks before the tokens. The model must be on the CPU."""
    found = []

    def watch(layer: Attention, inputs: tuple[Tensor, Context], _) -> None:
        x, context = inputs
        q, k, _ = layer.heads(x, context)
        k = k.repeat_interleave(layer.H // layer.K, dim=1)
        mask = context.masks[layer.windowed]
        if mask is None:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        scores = (q @ k.transpose(2, 3)).float() / math.sqrt(layer.D)
        found.append(scores.masked_fill(~mask, -math.inf).softmax(-1)[0])

    hooks = [block.attn.register_forward_hook(watch) for block in model.blocks]
    try:
        model.hidden(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return found


LABELLED = 32  # most tokens that are written beside a picture of attention


def draw_attention(candidate: Candidate, text: str, path: Path) -> None:
    """A picture of every head, a layer a line: queries down, keys across."""
    need("matplotlib").use("Agg")
    pyplot = need("matplotlib.pyplot")
    tokenizer = candidate.tokenizer
    ids = tokenizer.prompt(text)[: candidate.model.config.seq_len]
    device = candidate.model.device
    on_cpu = replace(candidate.machine, device=torch.device("cpu"))
    try:
        with on_cpu.autocast():
            weights = attention_weights(candidate.model.cpu(), torch.tensor([ids]))
    finally:
        candidate.model.to(device)
    sinks = weights[0].shape[1] - len(ids)
    names = ["sink"] * sinks + ["<s>", *(tokenizer.decode([i]) or "·" for i in ids[1:])]
    names = [name.replace("\n", "\\n").replace("$", r"\$") for name in names]
    layers, heads = len(weights), len(weights[0])
    size = 1.5 if len(names) <= LABELLED else 1.1
    figure, grid = pyplot.subplots(
        layers,
        heads,
        figsize=(size * heads + 1.2, size * layers + 1.0),
        squeeze=False,
        layout="constrained",
    )
    for layer in range(layers):
        for head in range(heads):
            axes = grid[layer][head]
            axes.imshow(weights[layer][head].numpy(), cmap="magma", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            if layer == 0:
                axes.set_title(f"head {head}", fontsize=8)
            if head == 0:
                axes.set_ylabel(f"layer {layer}", fontsize=8)
            if len(names) > LABELLED:
                continue
            if head == 0:
                axes.set_yticks(range(len(names)), names, fontsize=4)
            if layer == layers - 1:
                axes.set_xticks(range(len(names)), names, fontsize=4, rotation=90)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=200)
    pyplot.close(figure)


TOKEN_STYLE = """
.text { white-space: pre-wrap; font: 15px/1.9 ui-monospace, monospace; overflow-wrap: anywhere; }
.text span { border-radius: 3px; padding: 1px 0; }
.text span:hover { outline: 1px solid var(--accent); }
.scale { display: inline-block; width: 14em; height: .8em; border-radius: 3px;
  background: linear-gradient(to right, rgba(213, 94, 0, 0), rgba(213, 94, 0, .75)); }
"""

LOSS_SHOWN = 10.0  # nats from which a token has the full colour


def token_page(candidate: Candidate, path: str) -> str:
    """A text as an HTML page, each token coloured by its loss, which the pointer shows."""
    [row, *_] = task_rows_of(path)
    text = str(first_of(row, TEXT_KEYS) or "")
    if not text:
        raise UserError(f"--per_token {path} holds no text", "give a file of text")
    tokenizer, limit = candidate.tokenizer, candidate.model.config.seq_len
    ids = tokenizer.prompt(text)
    pairs = rolling_pairs(ids, limit, max(1, limit // 2))
    losses = -torch.cat([logps for logps, _ in candidate.score_tokens(pairs)])
    stream, spans, waiting = TextStream(tokenizer, []), [], 0.0
    for token, loss in zip(ids[1:], losses.tolist(), strict=True):
        piece, waiting = stream.push(token), waiting + loss
        if not piece:  # the first byte of a character
            continue
        strength = min(1.0, max(0.0, waiting / LOSS_SHOWN)) * 0.75
        spans.append(
            f'<span style="background: rgba(213, 94, 0, {strength:.2f})" '
            f'title="{waiting:.2f} nats">{html.escape(piece)}</span>'
        )
        waiting = 0.0
    about = f"{len(losses):,} tokens, {losses.mean():.3f} nats a token"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(candidate.name)}</title>"
        f"<style>{REPORT_STYLE}{TOKEN_STYLE}</style></head>\n<body>"
        f"<h1>{html.escape(Path(path).name)}</h1>"
        f'<p class="about">{html.escape(candidate.name)}: {about}</p>'
        f'<p>0 <span class="scale"></span> {LOSS_SHOWN:g} nats and more</p>'
        f'<div class="text">{"".join(spans)}</div></body></html>\n'
    )


# ==================================================================================================
# Chat: a conversation in the terminal
# ==================================================================================================


def without_oldest(turns: Turns) -> Turns:
    """The turns without the oldest question and what followed it; the system prompt stays."""
    asked = [place for place, turn in enumerate(turns) if turn.role == "user"]
    kept = [turn for turn in turns[: asked[0]] if turn.role == "system"]
    return kept + turns[asked[1] :]


def fit_turns(tokenizer: Tokenizer, turns: Turns, room: int) -> tuple[Turns, int]:
    """The turns whose prompt has at most `room` ids, and how many of the oldest were dropped; the
    last question stays, however long it is."""
    kept = turns
    while sum(turn.role == "user" for turn in kept) > 1:
        if len(encode_chat(tokenizer, kept, reply=True)[0]) <= room:
            break
        kept = without_oldest(kept)
    return kept, len(turns) - len(kept)


class ChatSession:
    """A conversation with a model: its turns, and how it answers. A model that was never taught to
    chat continues each text by itself."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        sampling: SamplingSettings,
        machine: Machine,
        seed: int,
        chats: bool,
        tools: Sequence[str] = (),
        max_turns: int = 1,
    ):
        """tools: that the model may call, in so many answers to a question at most."""
        self.box = Toolbox(tools) if tools else None
        self.max_turns = max_turns
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.machine = machine
        self.seed = seed
        self.chats = chats
        self.turns: Turns = []
        self.answers = 0  # drawn so far: each draws by its own number
        self.commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/reset": (self.reset, "forget the conversation, not the system prompt"),
            "/retry": (self.retry, "answer the last question again"),
            "/system": (self.system, "TEXT: begin anew with this system prompt; none without TEXT"),
            "/temp": (self.temperature, "X: sampling temperature from here; 0 is greedy"),
            "/save": (self.save, "FILE: write the conversation as a row of sft"),
            "/load": (self.load, "FILE: go on with a conversation that /save wrote"),
            "/help": (self.help, "this list"),
        }

    def prompt(self) -> tuple[list[int], list[int]]:
        """The ids to continue, and those whose text stands before the answer's."""
        if not self.chats:
            ids = self.tokenizer.prompt(self.turns[-1].text)
            return ids, ids
        limit = self.model.config.seq_len
        room = max(limit // 2, limit - self.sampling.max_new_tokens)
        kept, dropped = fit_turns(self.tokenizer, self.turns, room)
        if dropped:
            self.turns = kept
            say(f"(the context of {limit} tokens is full: the oldest {dropped} turns are dropped)")
        ids = encode_chat(self.tokenizer, kept, reply=True)[0]
        if len(ids) > limit:
            say(f"(the question has {len(ids)} tokens, the context {limit}: its end is read)")
        return ids, []

    def answer(self) -> Iterator[str]:
        """Pieces of the answer to the last question, with the tools that it calls."""
        for _ in range(self.max_turns):
            yield from self.say()
            last = self.turns[-1]
            if not self.box or not last.calls:
                return
            [step] = self.box.step([(b"", last)])
            self.turns.append(step.observation)
            yield "".join(f"{line}\n" for line in called_lines(self.turns[-2:]))

    def say(self) -> Iterator[str]:
        """Pieces of one answer, which is a turn when they end, or where the caller stops."""
        ids, context = self.prompt()
        stream = generate(
            self.model,
            [ids],
            self.sampling,
            self.seed,
            self.tokenizer.stops,
            self.machine.dtype,
            numbers=[self.answers],
            compiled=self.machine.compiles,
        )
        self.answers += 1
        text, pieces, own = TextStream(self.tokenizer, context), [], []
        calls = self.tokenizer.roles.get("call") if self.box else None
        try:
            with self.machine.autocast():
                for _, token in stream:
                    own.append(token)
                    if calls not in own:
                        pieces.append(text.push(token))
                        yield pieces[-1]
            if calls not in own:
                pieces.append(text.waiting())
                yield pieces[-1]
        finally:
            if self.box:
                self.turns.append(assistant_turn(self.tokenizer, own))
            elif self.chats:
                self.turns.append(Turn("assistant", "".join(pieces)))

    def show_answer(self) -> None:
        """Print the answer as it comes; Ctrl-C ends it where it is."""
        pieces = self.answer()
        try:
            for piece in pieces:
                print(printable(piece, sys.stdout), end="", flush=True)
            print()
        except KeyboardInterrupt:
            pieces.close()
            print("\n(stopped)")

    def take(self, line: str) -> None:
        """A line of the person's: a command, or what the model answers."""
        name, _, rest = line.partition(" ")
        if name in self.commands:
            self.commands[name][0](rest.strip())
        elif re.fullmatch(r"/[a-z]+", name):
            say(f"{name} is not a command; /help lists them")
        elif line.strip():
            self.turns.append(Turn("user", line))
            self.show_answer()

    def reset(self, _: str) -> None:
        self.turns = [turn for turn in self.turns if turn.role == "system"]

    def system(self, text: str) -> None:
        self.turns = [Turn("system", text)] if text else []

    def retry(self, _: str) -> None:
        while self.turns and self.turns[-1].role in ("assistant", "tool"):
            self.turns.pop()
        if not self.turns or self.turns[-1].role != "user":
            say("there is no question yet")
            return
        self.show_answer()

    def temperature(self, text: str) -> None:
        try:
            value = parse_number(float, text)
            refuse(value < 0, "below 0")
        except ValueError:
            say(f"{text or 'nothing'} is no temperature: give a number, as in /temp 0.7")
            return
        self.sampling = replace(self.sampling, temperature=value)

    def save(self, path: str) -> None:
        messages = []
        for turn in self.turns:
            messages.append({"role": turn.role, "content": turn.text})
            with contextlib.suppress(ValueError):  # a call that is no JSON is not kept
                if turn.calls:
                    messages[-1]["tool_calls"] = [{"function": json.loads(turn.calls[0])}]
        try:
            refuse(not path, "no file is named, as in /save talk.jsonl")
            write_jsonl(path, [{"messages": messages}])
            say(f"{len(messages)} turns in {path}")
        except (OSError, ValueError) as fault:
            say(f"not saved: {fault}")

    def load(self, path: str) -> None:
        """Raises nothing: what cannot be read is told, and the conversation stays."""
        try:
            with open(path, encoding="utf-8-sig") as file:
                messages = json_object(file.readline()).get("messages")
            self.turns = [  # an answer may be empty
                Turn(
                    ROLE_NAMES[message["role"]],
                    whole_text(message["content"]),
                    calls=tuple(map(call_text, message.get("tool_calls") or ())),
                )
                for message in messages
            ]
            say(f"{len(self.turns)} turns from {path}")
        except OSError as fault:
            say(f"not loaded: {fault}")
        except (ValueError, KeyError, TypeError, AttributeError):
            say(f"not loaded: {path} holds no conversation that /save wrote")

    def help(self, _: str) -> None:
        rows = [f"  {name:9}{about}" for name, (_, about) in self.commands.items()]
        say(*rows, "  Ctrl-C    stop an answer; Ctrl-D or /quit: leave")

    def talk(self) -> None:
        """Questions and answers until the input ends."""
        while True:
            try:
                line = input("> ")
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /quit leaves)")
                continue
            except EOFError:
                print()
                return
            if line.strip() in ("/quit", "/exit"):
                return
            self.take(LONE_SURROGATE.sub("\ufffd", line))


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
        raise UserError(
            "--chat has no question",
            "give --prompt or --prompt_file; for a conversation run: "
            f"python {PROGRAM} chat --ckpt {shlex.quote(settings.ckpt)}",
        )
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
            ids = tokenizer.prompt(turns[-1].text)
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
    settings: GenerateSettings,
    requests: list[Request],
    rows: list[dict],
    machine: Machine,
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
    """All completions, to the terminal or as rows of a .jsonl, and how many of them ended."""
    if settings.out:
        write_jsonl(settings.out, rows)
        say(f"{len(rows)} completions in {settings.out}")
    else:
        between = "\n> " if settings.chat else ""
        for i, row in enumerate(rows, 1):
            say(f"--- {i} of {len(rows)}\n{row['prompt']}{between}{row['completion']}")

    ended = sum(row["ended"] for row in rows)
    figures = f"{ended / len(rows):.1%} ended with </s>"
    expected = [row for row in rows if "expected" in row]
    if expected:
        same = sum(row["completion"].strip() == str(row["expected"]).strip() for row in expected)
        figures += f"; {same / len(expected):.1%} equal the expected answer"
    say(figures)


def cmd_prep(settings: PrepSettings) -> int:
    began = time.monotonic()
    meta = prepare(settings)
    seconds = max(time.monotonic() - began, 1e-9)
    total = 0
    for name, counts in meta["splits"].items():
        total += counts["bytes"]
        ratio = counts["bytes"] / max(1, counts["tokens"])
        say(
            f"{name}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, "
            f"{counts['bytes']:,} bytes ({ratio:.2f} per token)"
        )
    tokens = max(1, meta["splits"]["train"]["tokens"])
    device = pick_device("auto")
    span = usual_seconds(device)
    preset = fitting_preset(tokens, span, device)
    say(
        f"{settings.out_dir}: vocabulary of {meta['vocab_size']:,}, {duration(seconds)}, "
        f"{total / 1e6 / seconds:.1f} MB/s",
        f"next: python {PROGRAM} train --data_dir {shlex.quote(settings.out_dir)} "
        f"--preset {preset} --time {span / 60:.0f}m",
        f"(the size that suits {short(tokens)} tokens and so long on this machine's {device.type}; "
        "give the time that you have)",
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
    run, model = fitted(run, model, sum(len(folder.train) for _, folder, _ in domains), machine)
    config = replace(model, vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos)
    network = Transformer(config)
    network.init_weights(device.seed)
    windows = [Windows(folder.train, config.seq_len, device.seed) for _, folder, _ in domains]
    stream = mixed(windows, [weight for *_, weight in domains])
    epochs = data.epochs or data.tokens / stream.tokens
    given = f"--max_steps {run.max_steps}" * (run.max_steps not in (0, RunSettings.max_steps))
    given = given or f"--time {run.time}" * bool(run.time)
    if epochs and given:
        raise UserError(f"{given} and --tokens or --epochs are both given", "keep one of them")
    if epochs:
        run = replace(run, max_steps=0)
    init = data.init
    if init == "auto":
        init = "normal" if config.tie else "bigram"
    if init == "bigram" and config.tie:
        raise UserError("--init bigram needs a head of its own", "add --tie 0")
    begin = None
    if init == "bigram":
        begin = functools.partial(begin_with_text, network, domains, device.seed, machine)
    job = Job(
        "train",
        network,
        functools.partial(pretrain_loss, z_loss=optim.z_loss),
        stream,
        lambda module, run: perplexity(
            module, domains, run.batch_size, machine, config.seq_len, run.eval_tokens
        ),
        tokenizer,
        begin=begin,
        init=init,
    )
    groups = (run, data, model, optim, device)
    return train_job(job, machine, run, optim, groups, {}, epochs or 1.0)


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
    pack = sft.pack and tuning.can_pack()
    train, val = tuning.parts(
        lambda row: ([conversation(row)], None),
        example,
        lambda groups, _, seq_len, seed: Chats([one for (one,) in groups], seq_len, seed, pack),
    )
    samples = tuning.sampled(sft)
    return tuning.start(tuning.network(), train, val, pretrain_loss, samples=samples)


def open_teacher(distill: DistillSettings, tuning: Tuning) -> Transformer:
    """The model of --teacher, to be read beside the student; UserError where its tokenizer or its
    context is another."""
    saved = load_checkpoint(distill.teacher)
    tokenizer = tokenizer_of(saved, "", distill.teacher)
    if tokenizer.spellings() != tuning.tokenizer.spellings():
        raise UserError(
            f"{distill.teacher} has another tokenizer than {tuning.tune.ckpt}, so that its "
            "probabilities are of other tokens",
            "use a teacher of the same tokenizer, or train on its answers: generate, then sft",
        )
    config = ModelSettings(**saved["config"])
    if config.seq_len < tuning.config.seq_len:
        raise UserError(
            f"the teacher's context has {config.seq_len} tokens, the student's "
            f"{tuning.config.seq_len}",
            f"add --seq_len {config.seq_len}",
        )
    tuning.extra["teacher"] = model_key(saved)
    changes = {"doc_mask": tuning.config.doc_mask, "bos_id": tuning.config.bos_id}
    saved["config"] = {**saved["config"], **changes}
    machine = tuning.machine
    return build_model(saved, machine.device, machine.dtype)


def distill_on_text(distill: DistillSettings, tuning: Tuning) -> tuple[list[Part], list[Part]]:
    """Windows of text to train on and to evaluate on."""
    data = DataSettings(data_dir=distill.data_dir)
    train, val = [], []
    for name, folder, weight in open_domains(data):
        if folder.tokenizer.spellings() != tuning.tokenizer.spellings():
            raise UserError(
                f"{folder.folder} is of another tokenizer than {tuning.tune.ckpt}",
                "prepare it again, prep --tokenizer with the student's own, which is in the folder "
                "that convert_to_llama.py writes",
            )
        length = tuning.config.seq_len
        train.append((name, weight, Windows(folder.train, length, tuning.seed)))
        if len(folder.val) > 1:
            held = EvaluationWindows(folder.val, length, tuning.run.batch_size)
            val.append((name, weight, held))
    return train, val


def distill_on_rows(
    distill: DistillSettings, tuning: Tuning, packs: bool
) -> tuple[list[Part], list[Part]]:
    """Conversations to train on and to evaluate on; questions alone too, where the student answers
    them itself."""
    own, most = distill.on_policy > 0, distill.max_new_tokens

    def parse(row: dict) -> Row:
        with contextlib.suppress(ValueError):
            return [conversation(row)], None
        if not own:
            return [conversation(row)], None  # whose fault is told
        return [row_prompt(row)[0]], None

    def stream(examples: list[list[Example]], _: list, seq_len: int, seed: int) -> Stream:
        whole = [one for (one,) in examples]
        if own:
            return Answerable(whole, seq_len, seed, distill.on_policy, most)
        return Chats(whole, seq_len, seed, packs)

    make = example
    if own:
        make = functools.partial(question_or_example, most=most)
    return tuning.parts(parse, make, stream)


def cmd_distill(
    run: TuneRun,
    tune: TuneSettings,
    task: TaskSettings,
    distill: DistillSettings,
    sft: SftSettings,
    lora: LoraSettings,
    optim: TuneOptim,
    device: DeviceSettings,
) -> int:
    text, own = distill.data_dir, distill.on_policy > 0
    if text and (tune.data or task.task):
        raise UserError("--data_dir and --data or --task are both given", "keep one of them")
    kind = "distill"
    if text or own:
        kind = ON_TEXT if text else ON_OWN_ANSWERS
    packs = sft.pack and not own and not text
    groups = (task, distill, sft)
    tuning = Tuning(kind, run, tune, lora, optim, device, *groups, text=text, doc_mask=packs)
    machine, most = tuning.machine, distill.max_new_tokens
    if text:
        tuning.config = replace(tuning.config, doc_mask=tuning.original.doc_mask)
    packs = packs and tuning.can_pack()
    if own and most >= tuning.config.seq_len:
        raise UserError(
            f"--max_new_tokens {most} leaves a question no room in a context of "
            f"{tuning.config.seq_len}",
            "use fewer, or a longer --seq_len",
        )
    teacher = open_teacher(distill, tuning)
    if text:
        train, val = distill_on_text(distill, tuning)
    else:
        train, val = distill_on_rows(distill, tuning, packs)
    network, make = tuning.network(), Trainer
    if own:
        settings = RolloutSettings(
            max_new_tokens=most,
            temperature=distill.temperature,
            rollout_batch=distill.rollout_batch,
        )
        compiles = compiles_generation(run.compile, machine.device)
        sampler = Sampler(network, tuning.tokenizer, None, settings, machine, compiles)
        make = functools.partial(DistillTrainer, sampler=sampler)
    say(
        f"learning from {distill.teacher} ({short(parameter_counts(teacher.config)['total'])} "
        f"parameters): {distill.measure} divergence"
    )
    loss = functools.partial(distill_loss, teacher=teacher, settings=distill)
    samples = tuning.sampled(sft)
    return tuning.start(network, train, val, loss, DISTILL_METRICS, make, samples=samples)


def cmd_dpo(
    run: TuneRun,
    tune: TuneSettings,
    dpo: DpoSettings,
    lora: LoraSettings,
    optim: TuneOptim,
    device: DeviceSettings,
) -> int:
    tuning = Tuning("dpo", run, tune, lora, optim, device, dpo)
    train, val = tuning.parts(lambda row: (list(preference(row)), [0.0]), last_answer)
    network = tuning.network()
    if dpo.loss not in REFERENCE_FREE:
        tuning.extra["reference"] = tuning.key
        add_reference(tuning, network, [stream for *_, stream in train + val])
    loss = functools.partial(preference_loss, settings=dpo)
    return tuning.start(network, train, val, loss, PAIR_METRICS)


def cmd_reward(
    run: TuneRun,
    tune: TuneSettings,
    reward: RewardSettings,
    lora: LoraSettings,
    optim: TuneOptim,
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
    judge: JudgeSettings,
    policy: PolicySettings,
    value: ValueSettings,
    lora: GrpoLora,
    optim: GrpoOptim,
    device: DeviceSettings,
) -> int:
    groups = (task, rollout, judge, policy, value)
    tuning = Tuning("grpo", run, tune, lora, optim, device, *groups)
    machine, most = tuning.machine, rollout.max_new_tokens
    check_rollouts(rollout, policy, machine.world, tuning.config.seq_len)
    specs = rollout.reward or (TASK_REWARDS.get(task.task, "number"),)
    environment = None
    if rollout.tools:
        environment = Toolbox(rollout.tools)
    if rollout.env:
        environment = UserEnvironment(rollout.env, rollout.reward_timeout)
        specs = (PAID, *rollout.reward)
    out = Path(run.out_dir)
    rewards = Rewards(specs, rollout.reward_timeout, run.micro_batch, machine, judge, out)
    say(f"algorithm: {policy.algo}, rewards: {', '.join(rewards.parts)}")

    def parse(row: dict) -> Row:
        if rollout.env:
            state, messages = environment.reset(row)
            turns = check_turns(turns_of(messages, "user", "messages"))
            return [turns], (turns, rewards.check(present({"answer": ""} | row)), state)
        turns, answer = row_prompt(row)
        row = present({"pattern": rollout.pattern or None, "answer": answer} | row)
        return [turns], (turns, rewards.check(row))

    def stream(groups: list[list[Example]], known: list, _: int, seed: int) -> Prompts:
        problems = [Problem(one.ids, *told) for (one,), told in zip(groups, known, strict=True)]
        return Prompts(problems, seed, rollout.prompts, rollout.group_size * most)

    def prompt(tokenizer: Tokenizer, turns: Turns, limit: int) -> Example | None:
        return question(tokenizer, turns, limit - most)

    train, val = tuning.parts(parse, prompt, stream)
    network = tuning.network()
    network.fp32_head = policy.fp32_head
    critic = None
    if policy.advantage == "gae":
        critic = tuning.network(scalar_head=True)
        if lora.lora_rank:
            attach_lora(critic, lora, tuning.seed)
    compiles = compiles_generation(run.compile, machine.device)
    sampler = Sampler(network, tuning.tokenizer, rewards, rollout, machine, compiles, environment)
    held = Prompts([one for *_, part in val for one in part.rows], device.seed, 1, 0)
    if policy.kl:  # a run begun without it has no reference to go on with
        tuning.extra["reference"] = tuning.key
    make = functools.partial(
        PolicyTrainer, sampler=sampler, policy=policy, value=value, critic=critic
    )
    return tuning.start(
        network,
        train,
        val,
        functools.partial(policy_loss, settings=policy),
        make=make,
        samples=lambda _: sampler.shown(),
        best="val/error" if rewards.yes_or_no else "val/reward",
        maximise=not rewards.yes_or_no,
        evaluate=lambda *_: sampler.evaluate(held, device.seed) if held.count else {},
    )


def cmd_generate(
    settings: GenerateSettings,
    sampling: SamplingSettings,
    device: InferenceSettings,
) -> int:
    machine = open_to_generate(device)
    saved = load_checkpoint(settings.ckpt, settings.base)
    tokenizer = tokenizer_of(saved, settings.tokenizer, settings.ckpt)
    requests = make_requests(settings, tokenizer, saved)
    if settings.out:
        check_writable(Path(settings.out))
    stop = tokenizer.stops if settings.stop_at_eos else frozenset()
    prompts, episodes = [request.ids for request in requests], None
    if settings.tools:
        asked = [request.turns for request in requests]
        box = Toolbox(settings.tools)
        episodes = Episodes(tokenizer, asked, prompts, box, settings.max_turns)
    stream = generate(
        build_model(saved, machine.device, machine.dtype),
        prompts,
        sampling,
        device.seed,
        stop,
        machine.dtype,
        at_once=settings.batch_size,
        compiled=machine.compiles,
        follow=episodes,
    )
    if len(requests) == 1 and not settings.out and not episodes:
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
            progress.update(min(len(requests), progress.done + ended))
    progress.close()

    rows = []
    for place, (request, new) in enumerate(zip(requests, found, strict=True)):
        text = tokenizer.decode(request.context + new)[len(tokenizer.decode(request.context)) :]
        ended = not tokenizer.stops.isdisjoint(new[-1:])
        if episodes:
            text, ended = episodes.last_text(place, new), episodes.over[place]
            called = called_lines(episodes.turns[place][len(request.turns) :])
            if not settings.out:
                text = "\n".join([*called, text])
        row = {"prompt": request.asked, "completion": text, "ended": ended}
        if episodes and settings.out:
            row["calls"] = called
        if request.expected is not None:
            row["expected"] = request.expected
        rows.append(row)
    if settings.best_of > 1:
        rows = best_rows(settings, requests, rows, machine)
    write_samples(settings, rows)
    return 0


def cmd_chat(settings: ChatSettings, sampling: ChatSampling, device: InferenceSettings) -> int:
    machine = open_to_generate(device)
    saved = load_checkpoint(settings.ckpt, settings.base)
    tokenizer = tokenizer_of(saved, settings.tokenizer, settings.ckpt)
    chats = saved.get("kind") not in UNTAUGHT_KINDS
    model = build_model(saved, machine.device, machine.dtype)
    calls = settings.tools, settings.max_turns
    session = ChatSession(model, tokenizer, sampling, machine, device.seed, chats, *calls)
    if not chats:
        say("This model was never taught to chat: it continues each text by itself (sft teaches).")
    session.system(settings.system)
    if settings.load:
        session.load(settings.load)
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # arrow keys and a history of lines
    say("/help lists the commands; Ctrl-D leaves.")
    session.talk()
    return 0


def open_candidate(path: str, settings: EvalSettings, machine: Machine) -> Candidate:
    saved = load_checkpoint(path, settings.base)
    tokenizer = tokenizer_of(saved, settings.tokenizer, path)
    chats = settings.chat == "1"
    if settings.chat == "auto":
        chats = saved.get("kind") in TAUGHT_KINDS
    key, model = model_key(saved), build_model(saved, machine.device, machine.dtype)
    key = sha256(f"{key} {settings.tools} {settings.max_turns}".encode()) if settings.tools else key
    calls = settings.tools, settings.max_turns
    return Candidate(path, key, model, tokenizer, machine, chats, settings.batch_size, *calls)


def look_inside(settings: EvalSettings, candidate: Candidate, out: Path) -> None:
    """The pictures of --attention and --per_token; of several candidates each in its own file."""
    suffix = ""
    if len(settings.ckpt) > 1:
        suffix = f"_{settings.ckpt.index(candidate.name) + 1}"
    if settings.attention:
        path = out / f"attention{suffix}.png"
        draw_attention(candidate, settings.attention, path)
        say(f"{path}: what each head of {candidate.name} attends to")
    if settings.per_token:
        path = out / f"per_token{suffix}.html"
        page = token_page(candidate, settings.per_token)
        with atomic_write(path, "w") as file:
            file.write(page)
        say(f"{path}: the loss of {candidate.name} token by token")


def cmd_eval(settings: EvalSettings, sampling: EvalSampling, device: InferenceSettings) -> int:
    if settings.num_samples > 1 and sampling.temperature == 0:
        raise UserError(
            f"--num_samples {settings.num_samples} are all alike at --temperature 0",
            "add --temperature 0.8",
        )
    machine, out = open_to_generate(device), Path(settings.out_dir)
    specs = eval_specs(settings)
    file = AnswerFile(out / "answers.jsonl", machine)
    machine.on_main(check_writable, file.path)
    maker = TaskMaker(settings, sampling, machine, device.seed)
    results: Results = {}
    lines: list[str] = []
    for path in settings.ckpt:
        candidate = open_candidate(path, settings, machine)
        found = results[path] = {}
        for spec in specs:
            task = maker.make(spec, candidate)
            answers = run_task(task, candidate, file)
            found[spec.label] = {**task.figures(answers), "rows": len(answers)}
            machine.on_main(merge_results, out / "results.json", results)
            lines += about_answers(settings, task, answers, path)
        if settings.harness:
            found |= machine.on_main(run_harness, candidate, settings, device.seed)
            machine.on_main(merge_results, out / "results.json", results)
        machine.on_main(look_inside, settings, candidate, out)
    if not any(results.values()):
        return 0
    machine.on_main(file.tidy)
    say(*lines, *results_table(results))
    say(f"in {out}/results.json; each answer in {file.path}")
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
    elif path.is_dir() and not list(path.glob("ckpt_*.pt")) and not is_foreign(path):
        say(*describe_data(path))
    else:
        say(*describe_checkpoint(checkpoint_path(path)))
    return 0


SWEPT = {"train": cmd_train, "sft": cmd_sft, "dpo": cmd_dpo, "reward": cmd_reward, "grpo": cmd_grpo}

SWEEP_METRICS = {"grpo": "val/reward"}  # of others val/loss


def sweep_axes(command: Callable, words: Iterable[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The words of flags that all runs share, and the values of those that have several."""
    known = {f"--{f.name}": f for f in flags(*settings_of(command))}
    known |= {f"--{f.metadata['also']}": f for f in known.values() if f.metadata["also"]}
    given: dict[str, list[str]] = {}
    values: list[str] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            values = given[name] = [value] if equals else []
        else:
            values.append(word)
    shared, axes = [], {}
    for name, values in given.items():
        field_type = known[name].type if name in known else str
        if len(values) > 1 and field_type != tuple[str, ...]:
            axes[name.removeprefix("--")] = values
        elif len(values) == 1 and field_type != tuple[str, ...]:
            shared.append(f"{name}={values[0]}")
        else:
            shared += [name, *values]
    return shared, axes


class Sweep:
    """The runs of all combinations of some flags, each a process and a folder of its own."""

    def __init__(self, settings: SweepSettings):
        self.settings = settings
        self.out = Path(settings.out_dir)
        command = SWEPT[settings.command]
        shared, axes = sweep_axes(command, settings.words)
        if not axes:
            raise UserError("no flag has several values", "give some, as in --lr 1e-3 3e-3")
        self.runs: dict[str, list[str]] = {}  # the words of each, by its name
        for values in itertools.product(*axes.values()):
            named = dict(zip(axes, values, strict=True))
            name = ",".join(f"{flag}={value}" for flag, value in named.items())
            name = re.sub(r"[^\w.,=+-]", "_", name)
            words = [*shared, *(f"--{flag}={value}" for flag, value in named.items())]
            self.runs[name] = [*words, f"--out_dir={self.out / name}"]
        for words in self.runs.values():  # all mistakes, before the first run begins
            read_command(command, words)
        self.codes: dict[str, int] = {}
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self.processes: list[subprocess.Popen] = []
        self.places: queue.SimpleQueue = queue.SimpleQueue()
        for place in range(settings.jobs):
            self.places.put(place)

    def start(self, name: str) -> None:
        """Run one to its end, or on from where it stands."""
        if self.stopped.is_set():
            return
        place = self.places.get()
        env = dict(os.environ)
        if self.settings.jobs > 1 and torch.cuda.device_count() > 1:
            env["CUDA_VISIBLE_DEVICES"] = str(place % torch.cuda.device_count())
        program = [sys.executable, str(Path(__file__).resolve()), self.settings.command]
        self.out.mkdir(parents=True, exist_ok=True)
        with open(self.out / f"{name}.log", "a", encoding="utf-8") as log:
            process = subprocess.Popen(
                [*program, *self.runs[name]], stdout=log, stderr=subprocess.STDOUT, env=env
            )
            self.processes.append(process)
            code = process.wait()
        self.codes[name] = code
        self.places.put(place)
        if code >= 128 or code < 0:
            self.stopped.set()
        what = "done" if code == 0 else f"ended with exit code {code}, see {self.out / name}.log"
        say(f"{name}: {what}")
        if code == 0:
            with self.noted() as done:
                done[name] = self.runs[name]

    @contextlib.contextmanager
    def noted(self) -> Iterator[dict]:
        """The words of runs that are done, by name, to be changed in the block."""
        path = self.out / "sweep.json"
        with self.lock:
            found = read_json(path) if path.exists() else {}
            yield found
            with atomic_write(path, "w") as file:
                json.dump(found, file, indent=1)

    def run(self) -> int:
        """Make all runs that are not done; the exit code."""
        done: dict = {}
        if (self.out / "sweep.json").exists():
            done = read_json(self.out / "sweep.json")
        left = [name for name, words in self.runs.items() if done.get(name) != words]
        say(f"{len(self.runs)} runs, {len(left)} of them to make")
        with ThreadPoolExecutor(self.settings.jobs) as threads:
            futures = [threads.submit(self.start, name) for name in left]
            try:
                with sigterm_unwinds():
                    wait_for_futures(futures)
            except (KeyboardInterrupt, Terminated):
                self.stopped.set()
                for process in self.processes:  # they save what they have
                    process.terminate()
                raise
        for future in futures:
            future.result()
        return int(any(self.codes.values()))

    def results(self) -> list[tuple[str, float, int]]:
        """(name, best value, its step) of the runs that have any, the best first."""
        command = self.settings.command
        metric = self.settings.metric or SWEEP_METRICS.get(command, "val/loss")
        higher = not metric.endswith(("loss", "ppl", "bpb", "error"))
        found = []
        for name in self.runs:
            rows = map(numbers_of, read_log(self.out / name / "metrics.jsonl"))
            values = [(row[metric], int(row["step"])) for row in rows if {metric, "step"} <= {*row}]
            values = [value for value in values if math.isfinite(value[0])]
            if values:
                found.append((name, *(max if higher else min)(values, key=lambda one: one[0])))
        return sorted(found, key=lambda one: one[1], reverse=higher)


def cmd_sweep(settings: SweepSettings) -> int:
    sweep = Sweep(settings)
    code = sweep.run()
    results = sweep.results()
    metric = settings.metric or SWEEP_METRICS.get(settings.command, "val/loss")
    if not results:
        say(f"no run logged {metric}, of which --metric names another")
        return code
    width = max(len(name) for name, *_ in results)
    say(f"{'run':{width}}  best {metric}    at step")
    for name, value, step in results:
        say(f"{name:{width}}  {value:<{len(metric) + 7}.5g}  {step}")
    runs = open_runs([str(sweep.out / name) for name, *_ in results], "step")
    if importlib.util.find_spec("matplotlib"):
        save_plot(runs, "step", sweep.out / "sweep.png")
        say(f"curves in {sweep.out}/sweep.png")
    else:
        say(*terminal_plot(runs, "step"))
    return code


def cmd_plot(settings: PlotSettings) -> int:
    runs = open_runs(settings.runs, settings.against)
    if settings.terminal:
        say(*terminal_plot(runs, settings.against))
        return 0
    folder = runs[0].folder
    if settings.html:
        path = Path(settings.out or folder / "report.html")
        given = [Path(name) for name in settings.results or (folder / "eval",)]
        found = [name / "results.json" if name.is_dir() else name for name in given]
        found = [name for name in found if settings.results or name.exists()]
        page = run_report(runs[0], settings.against, found)
        with atomic_write(path, "w") as file:
            file.write(page)
    else:
        path = Path(settings.out or folder / "plot.png")
        save_plot(runs, settings.against, path)
    say(f"{path}: {', '.join(title for title, *_ in panels_of(runs))}")
    return 0


def cmd_bench(
    settings: BenchSettings,
    model: ModelSettings,
    optim: OptimSettings,
    device: DeviceSettings,
) -> int:
    if "RANK" in os.environ:
        raise UserError("bench times one device", "start it with python; --gpus plans for several")
    config = planned(settings, model)
    place = pick_device(device.device)
    flags = {
        "batch_size": settings.batch_size or BENCH_BATCH,
        "dtype": device.dtype,
        "compile": "0",
        "grad_checkpoint": 0,
    }
    changes: list[dict] = [{}]
    if device.dtype == "auto" and pick_dtype("auto", place) != torch.float32:
        changes.append({"dtype": "fp32"})
    if can_compile(place):
        changes.append({"compile": "1"})
    largest = max(flags["batch_size"], BENCH_TOKENS // config.seq_len)
    say(f"training on {place.type}, one trial per line:")
    flags, speed = fastest(functools.partial(trial, config, optim, device), flags, changes, largest)
    if not speed:
        raise UserError(
            "not even the smallest batch fits in memory",
            "use --batch_size 1, a shorter --seq_len or a smaller model",
        )
    planned_run = replace(
        settings,
        batch_size=flags["batch_size"],
        grad_checkpoint=bool(flags["grad_checkpoint"]),
        tok_per_s=speed * settings.gpus,
    )
    say(
        "fastest: " + " ".join(f"--{name} {value}" for name, value in flags.items()),
        *plan(planned_run, config, optim),
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


def library_texts() -> list[str]:
    """The docstrings of the interpreter's own library, each once."""
    texts: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if {"test", "tests", "site-packages", "dist-packages"} & set(path.parts):
            continue
        with contextlib.suppress(SyntaxError, ValueError):  # of templates and odd encodings
            code = path.read_text(encoding="utf-8", errors="replace")
            texts |= dict.fromkeys(docstrings(code))
    texts = [text for text in texts if len(text) >= 200]
    if sum(map(len, texts)) < 200_000:
        raise UserError(
            "this Python was installed without its documentation",
            f"use your own text: python {PROGRAM} prep --text_path FILE --out_dir data",
        )
    return texts


def demo_rows(out: Path) -> None:
    """The library's docstrings; and sums, answered in two styles, one of which is preferred."""
    pairs, chats = [], []
    for a in range(10):
        for b in range(10):
            prompt, answer = f"What is {a} + {b}?", str(a + b)
            chosen, rejected = f"The sum is {answer}.", answer
            both = {"chosen": chosen, "rejected": rejected}
            pairs.append({"prompt": prompt, **both, "answer": answer})
            chats.append({"prompt": prompt, "response": chosen})
            chats.append({"prompt": prompt, "response": rejected})
    write_jsonl(out / "corpus.jsonl", ({"text": text} for text in library_texts()))
    write_jsonl(out / "pairs.jsonl", pairs)
    write_jsonl(out / "chats.jsonl", chats)


def demo_step(command: Callable[..., int], flags: str) -> None:
    name = command.__name__.removeprefix("cmd_")
    say("", f"$ python {PROGRAM} {name} {flags}")
    if command(*read_command(command, shlex.split(flags))):
        raise UserError(f"the demo stopped at {name}", "run the line above again by hand")


@dataclass(frozen=True)
class DemoSizes:
    """What the demo trains: sizes of its model and numbers of its steps."""

    vocab: int
    layers: int
    width: int
    batch: int
    steps: int
    grpo_steps: int


def demo_sizes(settings: DemoSettings) -> DemoSizes:
    if settings.quick:
        return DemoSizes(1024, 2, 128, 8, settings.max_steps or 60, 30)
    return DemoSizes(4096, 4, 256, 16, settings.max_steps or 250, 80)


def demo_pretraining(out: str, sizes: DemoSizes) -> None:
    """Text to a small base model, and what it writes after one step and after all."""
    demo_step(
        cmd_prep,
        f"--text_path {out}/corpus.jsonl --out_dir {out}/data --vocab_size {sizes.vocab} "
        "--val_split 0.05 --overwrite",
    )
    shape = (
        f"--n_layer {sizes.layers} --d_model {sizes.width} --n_head 4 --ffn_mult 3 --seq_len 256"
    )
    for about, name, steps, init in (
        ("Begun at random, after a single step it writes:", "begun", 1, " --init normal"),
        ("After its training:", "run", sizes.steps, ""),
    ):
        demo_step(
            cmd_train,
            f"--data_dir {out}/data --out_dir {out}/{name} --batch_size {sizes.batch} --tie 0 "
            f"--eval_interval {max(1, sizes.steps // 4)} {shape}{init} --compile 0 "
            f"--max_steps {steps}",
        )
        say("", about)
        demo_step(cmd_generate, f"--ckpt {out}/{name} --prompt 'Return a' --max_new_tokens 60")


def demo_alignment(out: str, sizes: DemoSizes) -> None:
    """The base model is taught to answer, to prefer one style, and to be right."""
    ask = "--chat --prompt 'What is 3 + 4?' --num_samples 4 --temperature 1 --max_new_tokens 16"
    for about, command, start, flags in (
        (
            "Now it is taught to answer questions, in two styles:",
            cmd_sft,
            "run",
            f"--data {out}/chats.jsonl --epochs 30 --batch_size 4 --lr 0.002",
        ),
        (
            "And to prefer the more polite one:",
            cmd_dpo,
            "sft",
            f"--data {out}/pairs.jsonl --epochs 3 --batch_size 8 --lr 0.0001 --beta 0.3",
        ),
        (
            "And, by reinforcement learning, to give the right sum, which dpo made it forget:",
            cmd_grpo,
            "dpo",
            f"--data {out}/pairs.jsonl --max_steps {sizes.grpo_steps} --prompts 25 "
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


def cmd_demo(settings: DemoSettings) -> int:
    folder = Path(settings.out_dir)
    out = shlex.quote(str(folder))
    sizes = demo_sizes(settings)
    for name in ("begun", "run", "sft", "dpo", "grpo"):
        shutil.rmtree(folder / name, ignore_errors=True)
    say("This demo trains a small model on the documentation of your Python interpreter.")
    demo_rows(folder)
    demo_pretraining(out, sizes)
    demo_alignment(out, sizes)

    log = (folder / "grpo" / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in log if line]
    rewards = [row["train/reward"] for row in rows if "train/reward" in row]
    say("", "fraction of correct sums, step by step of grpo:", curve(rewards))
    say(
        "",
        f"The model is {out}/run/ckpt_best.pt. Talk to what it was taught, or look at it:",
        f"  python {PROGRAM} chat --ckpt {out}/sft",
        "  pip install fastapi uvicorn    # for the browser",
        f"  python chat_server.py --ckpt {out}/sft    # then open http://127.0.0.1:8000",
        f"  python {PROGRAM} plot {out}/run --terminal",
        f"  python {PROGRAM} info {out}/run",
        "What you can do next:",
        f"  python {PROGRAM} train @{out}/run/args.txt --max_steps {sizes.steps * 4}",
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
        (
            "distill",
            cmd_distill,
            "learn a larger model's probabilities",
            "--ckpt runs/small --teacher runs/large --data chats.jsonl --on_policy 1",
        ),
        ("dpo", cmd_dpo, "prefer the better of two answers", "--ckpt runs/sft --data pairs.jsonl"),
        ("reward", cmd_reward, "a model that scores answers", "--ckpt runs/sft --data pairs.jsonl"),
        ("grpo", cmd_grpo, "learn from rewards: GRPO, DAPO, VAPO …", "--ckpt runs/sft --task add"),
        (
            "generate",
            cmd_generate,
            "continue prompts",
            '--ckpt runs/lm --prompt "Once upon a time"',
        ),
        ("chat", cmd_chat, "a conversation in the terminal", "--ckpt runs/sft"),
        (
            "eval",
            cmd_eval,
            "compare checkpoints on benchmarks and texts",
            "--ckpt runs/lm runs/sft --tasks arc_easy=arc.jsonl ppl=valid.txt",
        ),
        ("info", cmd_info, "say what a checkpoint or a data folder is", "runs/lm"),
        ("plot", cmd_plot, "the curves of runs: a picture, text or a report", "runs/lm runs/sft"),
        (
            "sweep",
            cmd_sweep,
            "every combination of some flags of train, a run each",
            "--data_dir data --lr 1e-3 3e-3 --optimizer muon adamw --out_dir runs/sweep",
        ),
        ("bench", cmd_bench, "the fastest flags of train on this machine", "--preset 138m"),
    )
}


def complain(fault: UserError) -> int:
    """Print a fault, once where all ranks share it: rank 0 ends the others before they speak."""
    rank = int(os.environ.get("RANK", 0))
    speaker = ""
    if rank:
        time.sleep(OTHER_RANKS_WAIT_S)
        speaker = f"rank {rank}: "
    say_aside(f"{speaker}{fault}")
    return 2


def flags_elsewhere(command: Command) -> dict[str, list[str]]:
    """Commands by the flags that they have and this one lacks."""
    own = {f.name for f in flags(*settings_of(command.run))}
    found: dict[str, list[str]] = {}
    for name, other in COMMANDS.items():
        for f in flags(*settings_of(other.run)):
            if f.name not in own and not f.metadata["positional"]:
                found.setdefault(f"--{f.name}", []).append(name)
    return found


def earlier_flags(argv: list[str]) -> str:
    """The args.txt of the run that a command line is about, if it does not read one itself."""
    if any(word.startswith("@") for word in argv):
        return ""
    for place, word in enumerate(argv):
        out = ""
        if word == "--out_dir":
            out = "".join(argv[place + 1 : place + 2])
        elif word.startswith("--out_dir="):
            out = word.partition("=")[2]
        if out and os.path.exists(f"{out}/args.txt"):
            return f"{out}/args.txt"
    return ""


def with_hint(fault: UserError, args: str) -> UserError:
    """The fault, and where the flags of the run stand that was to be resumed."""
    if not args or f"@{args}" in str(fault):
        return fault
    (what, fix), *more = fault.faults
    hint = f"to go on with the run there, repeat its flags with @{args}"
    return UserError(what, f"{fix}; {hint}", *more)


LOST_RANK = (  # how gloo and NCCL say that another process is gone
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL communicator was aborted",
    "remote process exited",
)


def lost_rank(fault: Exception) -> UserError | None:
    """The sentence for the end of another rank, or None where the fault is another."""
    if not dist.is_initialized() or not any(words in str(fault) for words in LOST_RANK):
        return None
    return UserError(
        "another rank has ended, without which this one cannot go on",
        "see what that one said; the same command goes on from the newest checkpoint",
    )


def run_command(command: Command, argv: list[str]) -> int:
    """Parse and run one command; the exit code. Users' mistakes become sentences on stderr."""
    earlier = earlier_flags(argv)
    try:
        code = command.run(
            *read_command(
                command.run, argv, command.about, command.example, flags_elsewhere(command)
            )
        )
        if dist.is_initialized():  # not after a bug: a traceback must not wait for other ranks
            # DDP's reducers first: the last to hold a group would end it with the interpreter
            # locked, for which the group's threads may still wait.
            gc.collect()
            dist.destroy_process_group()
        return code
    except UserError as fault:
        return complain(with_hint(fault, earlier))
    except (MemoryError, RuntimeError) as fault:  # torch.OutOfMemoryError is a RuntimeError
        if sentence := out_of_memory(fault):
            return complain(sentence)
        if sentence := lost_rank(fault):
            complain(sentence)
            return 1  # for a supervisor, which may start all ranks again
        raise
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Terminated:
        return 128 + signal.SIGTERM
    except BrokenPipeError:  # `generate | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as fault:
        if sentence := disk_error(fault):
            return complain(sentence)
        raise


def main(argv: list[str] | None = None) -> int:
    """The program; the exit code."""
    if argv is None:
        argv = sys.argv[1:]
    name, *rest = argv or ["help"]
    if name in ("-h", "--help", "help"):
        rows = "\n".join(f"  {name:10}{command.about}" for name, command in COMMANDS.items())
        print(
            f"usage: python {PROGRAM} COMMAND [--flag value …] [@FILE]\n\n{rows}\n\n"
            f"python {PROGRAM} COMMAND --help explains the flags of a command."
        )
        return 0
    if name in COMMANDS:
        return run_command(COMMANDS[name], rest)
    fix = f"choose {either(COMMANDS)}"
    if near := difflib.get_close_matches(name, COMMANDS, 1):
        fix = f"did you mean {near[0]}?"
    return complain(UserError(f"{name} is not a command", fix))


if __name__ == "__main__":
    sys.exit(main())
