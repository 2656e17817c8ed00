"""Preview: what training will see of a data set. python -m common.data FILE --kind sft --model MODEL"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.text import Text

from common import data, dist, files
from common.packed import Example, Tokens
from common.streams import read_sources, wrong


@dataclass
class Args:
    """Show each sequence of a data set as training will see it, and which of its tokens are scored."""

    file: tyro.conf.Positional[str]
    """the data set: toy, a file, a folder or hub/name[:config[:split]]"""
    kind: Literal["sft", "pairs", "ranked", "prompts", "ratings"]
    """what the records are: demonstrations, preferences, rankings, prompts, or rated replies"""
    model: str = "toy"
    """the model whose tokenizer and template are used: toy, a run folder, a folder, a hub id, a .gguf file"""
    output: str = ""
    """JSON lines to write, one a sequence; without it lengths and the first few records are printed"""
    overwrite: bool = False
    """replace the file that output names"""
    max_length: int = 2048
    """most tokens of a sequence; longer ones are cut or dropped as in training"""
    max_prompt_length: int = 1024
    """most tokens of a prompt, with --kind prompts; longer ones are dropped"""
    chat_template: str = ""
    """a Jinja file or "chatml" in place of the model's own chat template"""
    chat_template_kwargs: str = ""
    """variables of the chat template, as JSON: {"enable_thinking": false}"""


def decode(tokenizer: Any, ids: np.ndarray) -> str:
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def describe(examples: Sequence[Example], tokenizer: Any) -> list[dict]:
    """A row for each sequence, special tokens kept: `text`, and `trained`, the part of it that is scored.

    `record` counts the examples, `sequence` those of an example: 0 is chosen and 1 rejected of a pair.
    """
    return [
        {"record": i, "sequence": k, "text": decode(tokenizer, ids), "trained": decode(tokenizer, ids[mask])}
        for i, example in enumerate(examples)
        for k, (ids, mask) in enumerate(example.sequences)
    ]


def lengths_table(examples: Sequence[Example]) -> str:
    """How long the sequences are, in ten steps, and what share of their tokens is trained."""
    found = [(len(ids), int(mask.sum())) for example in examples for ids, mask in example.sequences]
    lengths, trained = np.array(found).T
    # nothing of prompts is
    share = f", {trained.sum() / lengths.sum():.1%} of them trained" if trained.any() else ""
    middle = np.percentile(lengths, [50, 95]).astype(int)
    lines = [
        f"{len(lengths):,} sequences, {lengths.sum():,} tokens{share}; half of the "
        f"sequences have {middle[0]:,} tokens at most, 95 % {middle[1]:,}, the longest {lengths.max():,}"
    ]
    counts, edges = np.histogram(lengths, 10, (0, -(-int(lengths.max() + 1) // 10) * 10))
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        bar = "#" * -(-40 * count // counts.max())
        lines.append(f"{f'{low:,.0f} - {high - 1:,.0f}':>17} {count:>9,} {bar}")
    return "\n".join(lines)


def in_colour(sequence: Tokens, tokenizer: Any) -> Text:
    """A sequence as text, what is trained bold; where there are no colours, between marks."""
    ids, mask = sequence
    ends = [*np.flatnonzero(np.diff(mask.astype(int))) + 1, len(ids)]
    text, shown = Text(), 0
    for end in ends:
        part = decode(tokenizer, ids[:end])  # pieces by themselves may be other text
        is_trained, new = bool(mask[end - 1]), part[shown:]
        new = f"[[{new}]]" if is_trained and not sys.stdout.isatty() else new
        text.append(new, "bold green" if is_trained else "dim")
        shown = len(part)
    return text


def show(examples: list[Example], tokenizer: Any) -> None:
    """Print each sequence of some examples, and below it what is trained."""
    console = Console(soft_wrap=True, highlight=False)
    sequences = [(i, k, s) for i, e in enumerate(examples) for k, s in enumerate(e.sequences)]
    for i, k, sequence in sequences:
        console.print(f"\nrecord {i}, sequence {k}\n  text:")
        for line in in_colour(sequence, tokenizer).split("\n"):
            console.print(Text("    ") + line)
        if not sequence.mask.any():
            continue
        trained = decode(tokenizer, sequence.ids[sequence.mask])
        print("  trained:", *(f"    {line}" for line in trained.splitlines() or ["-"]), sep="\n")


def refuse_output(args: Args) -> None:
    """End the run if `output` is there and may not be replaced, as a folder and the data never are."""
    target = Path(args.output).expanduser()
    sources = [Path(name).expanduser().resolve() for name, _ in read_sources(args.file)]
    is_read = any(source in (target.resolve(), *target.resolve().parents) for source in sources)
    may = args.overwrite and target.is_file() and not is_read
    if args.output and (target.exists() or target.is_symlink()) and not may:
        expected = "a new name" + ", or --overwrite" * (target.is_file() and not is_read)
        raise wrong(f"output {target}", "data that are read" if is_read else "something there", expected)


def main(args: Args) -> None:
    refuse_output(args)
    tokenizer = data.load_tokenizer(args.model, args.chat_template, args.chat_template_kwargs)
    limit = args.max_prompt_length if args.kind == "prompts" else args.max_length
    examples, _ = getattr(data, f"load_{args.kind}")(tokenizer, args.file, None, limit)
    if not args.output:
        print(lengths_table(examples))
        show(examples[:3], tokenizer)
        return
    try:
        with files.whole(Path(args.output).expanduser(), shared=True) as unfinished:
            unfinished.write_text(files.as_lines(describe(examples, tokenizer)), encoding="utf-8")
    except OSError as error:
        raise dist.RunError(f"output {args.output}: cannot be written ({error.strerror})") from error
