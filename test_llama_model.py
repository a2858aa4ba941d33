"""Loads a converted folder with transformers, holds it against its checkpoint, and generates.

    python test_llama_model.py hf
    python test_llama_model.py hf --ckpt runs/lm/ckpt_best.pt --prompt "Once upon a time"

A script to run by hand after convert_to_llama.py; it needs transformers.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import convert_to_llama as converter
import standalone_transformer_lm as lm

EXAMPLE = 'python test_llama_model.py hf --ckpt runs/lm/ckpt_best.pt --prompt "Once upon a time"'


@dataclass
class TrialSettings:
    """What to try."""

    folder: str = lm.setting("hf", "folder that convert_to_llama.py wrote", positional=True)
    ckpt: str = lm.setting("", "the checkpoint it was made of, to compare the logits")
    prompt: str = lm.setting("Once upon a time", "text to continue")
    max_new_tokens: int = lm.setting(100, "most tokens to generate", least=1)
    temperature: float = lm.setting(0.8, "0 takes the likeliest token", least=0.0)
    seed: int = lm.setting(1337, "seed of the sampling", least=0)

    def faults(self) -> Iterator[tuple[str, str]]:
        if not (Path(self.folder) / "config.json").exists():
            yield f"{self.folder} is no converted folder", "make one with convert_to_llama.py"


def load(folder: str):
    """transformers' model, in fp32, and tokenizer of a folder."""
    transformers = converter.quiet_transformers() or lm.need("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def compare(hf, settings: TrialSettings) -> str:
    """A sentence on the logits. Raises UserError where folder and checkpoint are not one model."""
    saved = lm.load_checkpoint(settings.ckpt)
    spm = str(Path(settings.folder) / "tokenizer.model")
    tokenizer = lm.tokenizer_of(saved, "" if saved["tokenizer"] else spm, settings.ckpt)
    model = lm.build_model(saved, torch.device("cpu"))
    alike = model.config.vocab_size == hf.config.vocab_size
    gap = converter.logit_gap(hf, model, tokenizer) if alike else float("inf")
    if not gap <= converter.LOGIT_TOLERANCE:
        raise lm.UserError(
            f"the logits of {settings.folder} and {settings.ckpt} differ by {gap:.2g}",
            "convert this checkpoint again, or name the one the folder is made of",
        )
    return f"its logits agree with {settings.ckpt} to {gap:.1e}"


def generate(hf, tokenizer, settings: TrialSettings) -> None:
    """Print the prompt and its continuation as it comes."""
    inputs = tokenizer(settings.prompt, return_tensors="pt")
    room = hf.config.max_position_embeddings - inputs.input_ids.shape[1]
    if room < 1:
        raise lm.UserError(
            f"the prompt fills the context of {hf.config.max_position_embeddings}",
            "give a shorter one",
        )
    torch.manual_seed(settings.seed)
    sampling = {"do_sample": False}
    if settings.temperature:
        sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": 0.95}
    streamer = lm.need("transformers").TextStreamer(tokenizer, skip_special_tokens=True)
    hf.generate(
        **inputs, **sampling, max_new_tokens=min(settings.max_new_tokens, room), streamer=streamer
    )


def trial(settings: TrialSettings) -> int:
    hf, tokenizer = load(settings.folder)
    lm.say(
        f"{settings.folder}: {type(hf).__name__}, {lm.short(hf.num_parameters())} parameters, "
        f"{len(tokenizer)} tokens, context {hf.config.max_position_embeddings}"
    )
    if settings.ckpt:
        lm.say(compare(hf, settings))
    generate(hf, tokenizer, settings)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The script; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    about = "load a converted folder with transformers and generate"

    def run() -> int:
        parser = lm.make_parser("", about, EXAMPLE, (TrialSettings,))
        parser.prog = Path(__file__).name
        return trial(*lm.read_flags(parser, (TrialSettings,), words))

    return lm.run_command(lm.Command(run, about, EXAMPLE), [])


if __name__ == "__main__":
    sys.exit(main())
