"""The docs: flags they name exist, and their commands run in order, in one fresh copy of the repository."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT
from test_layout import SCRIPTS, parse_command

from common import args

PAGE = (ROOT / "docs" / "migrating.md").read_text()


# ------------------------------------------------------------------------------------------ docs/migrating.md


def named_flags() -> list[tuple[str, str]]:
    """(script, flags) of each cell on the right of the tables: of the row's scripts, else the title's."""
    found = []
    for section in re.split(r"^##+ ", PAGE, flags=re.MULTILINE)[1:]:
        of_title = [s for s in re.findall(r"`(\w+)\.py`", section.partition("\n")[0]) if s in SCRIPTS]
        for row in re.findall(r"^\|.*\|$", section, re.MULTILINE):
            cells = "|".join(re.split(r"(?<!\\)\|", row)[2:])
            spans = re.findall(r"`([^`]+)`", cells)
            of_row = [s.removesuffix(".py") for s in spans if s.removesuffix(".py") in SCRIPTS and "." in s]
            for span in spans:
                script, _, flags = span.partition(".py ")
                if span.startswith("--"):
                    found += [(name, span) for name in of_row or of_title]
                elif flags.startswith("--"):
                    found.append((script, flags))
    return [*dict.fromkeys(found)]


def test_every_flag_of_the_migration_page_is_one_of_its_script(monkeypatch: pytest.MonkeyPatch) -> None:
    found = named_flags()
    assert len(found) > 250 and {script for script, _ in found} == set(SCRIPTS)
    for script, flags in found:
        name = re.match(r"--(?:no_)?(\w+)", flags)[1]
        module = __import__(script)
        assert name in args.flat(module.Args()), f"{script}.py has no --{name}"
        if " " in flags or "=" in flags:  # with a value, which must be one it takes
            parse_command(f"{script}.py --model=x {flags}", monkeypatch)


def test_every_metric_of_the_migration_page_is_explained_on_another() -> None:
    table = PAGE.partition("### Its metrics")[2].partition("\n## ")[0]
    others = "".join(p.read_text() for p in (ROOT / "docs").glob("*.md") if p.name != "migrating.md")
    names = [n for row in table.splitlines() for n in re.findall(r"`([^`]+)`", "|".join(row.split("|")[2:]))]
    assert len(names) > 12
    assert not [n for n in names if f"`{re.sub('^(train|eval)/', '', n)}`" not in others]


# ------------------------------------------------------------------------------------- commands run, in order


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    kind: str  # bash, python, diff, ...
    reason: str  # why it is not run here
    text: str


FEW = "--max_steps=2 --eval_every=9"
DRAWN = "--num_samples=1 --images_per_prompt=2 --num_inference_steps=4 --batch_size=2 --micro_batch_size=2"
SHORT = {  # script -> what makes a run of seconds of it
    "sft": f"{FEW} --num_samples=2",
    "dpo": f"{FEW} --num_samples=2",
    "spin": "--num_prompts=8 --batch_size=8 --num_iterations=1 --max_new_tokens=8 --num_samples=2",
    "reward_model": FEW,
    "ppo": f"{FEW} --num_samples=2 --rollout_size=8 --batch_size=8 --max_new_tokens=8",
    "steerlm": "--num_samples=2 --num_bootstrap_rounds=0 --sft.max_steps=2 --reward_model.max_steps=2",
    "steerlm2": f"{FEW} --num_samples=2 --num_prompts=4 --batch_size=4 --num_iterations=1 --max_new_tokens=8",
    "cai": "--num_red_team=24 --num_revisions=1 --num_samples=2 --max_new_tokens=24 --sft.max_steps=1 "
    "--reward_model.max_steps=1 --ppo.max_steps=1 --ppo.rollout_size=4 --ppo.batch_size=4 "
    "--ppo.max_new_tokens=8 --dpo.max_steps=1",
    "draftp": f"--max_steps=2 --eval_every=9 {DRAWN}",
}
ALONE = {  # what lines with such an option take
    "--groups": "--batch_size=2 --num_samples=2",
    "--draw_prompts": "--num_inference_steps=4",
}
PAGES = ["README.md", "sweeps/README.md"]
PAGES += [f"docs/{name}.md" for name in ("data", "sft", "dpo", "spin", "reward_model", "ppo")]
PAGES += [f"docs/{name}.md" for name in ("steerlm", "steerlm2", "cai", "draftp", "hacking", "reliability")]
PAGES += [f"docs/{name}.md" for name in ("obtaining_a_model", "models", "benchmarks", "migrating")]
PAGES += ["docs/before_a_run.md"]
PAGES += ["CONTRIBUTING.md", "recipes/README.md"]
PAGES += sorted({f"docs/{p.name}" for p in ROOT.glob("docs/*.md")} - set(PAGES))


def read_blocks(page: str) -> list[Block]:
    found = re.findall(r"^```(\w+)([^\n]*)\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [
        Block(page, kind, info.strip().removeprefix("notest").strip(), text) for kind, info, text in found
    ]


def shortened(command: str) -> str:
    """A line with the options that make a run of seconds, if it is one of a script or of a copy of it."""
    script = re.search(r"(?:^|\s)(?:my_)?(\w+)\.py\b", command)
    runs = re.match(r"\s*(?:\w+=\S+ )*(python|torchrun) ", command)
    if not (script and runs and script[1] in SHORT) or re.search(r"--(help|score)\b", command):
        return command
    line, mark, comment = command.partition("  #")
    small = next((options for name, options in ALONE.items() if name in line), SHORT[script[1]])
    return f"{line} {small}{mark}{comment}"


def do(block: Block, folder: Path) -> None:
    """Do in the folder what a reader would: run commands, apply a diff, save a file that names itself."""
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent), "OMP_NUM_THREADS": "1"}
    given, command = "", []  # an empty input ends a chat
    if block.kind == "diff":
        given, command = block.text, ["git", "apply"]
    elif block.kind == "python" and (name := re.match(r"# (\w+\.py)\b", block.text)):
        (folder / name[1]).write_text(block.text)
    elif block.kind == "bash" and not block.reason:
        lines = block.text.replace("\\\n", " ").splitlines()
        command = ["bash", "-euo", "pipefail", "-c", "\n".join(map(shortened, lines))]
    if command:
        done = subprocess.run(
            command, input=given, cwd=folder, env=environment, capture_output=True, text=True
        )
        said = f"{block.page}:\n{block.text}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        assert done.returncode == 0, said


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository without what runs have left in it, as after git clone."""
    folder = tmp_path_factory.mktemp("clone") / "cleanalign"
    left = shutil.ignore_patterns(
        ".git", "runs", "my_*", "*.jsonl", "wandb", ".venv", "__pycache__", ".pytest*"
    )
    worlds = str(ROOT / "toy")
    shutil.copytree(
        ROOT, folder, ignore=lambda at, names: left(at, names) if not at.startswith(worlds) else []
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "sweeps/README.md"])
def test_what_a_newcomer_types_runs_in_order_in_one_folder(page: str, fresh: Path) -> None:
    for block in read_blocks(page):
        do(block, fresh)


@pytest.mark.release
@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_the_docs_runs_in_order_in_one_folder(page: str, fresh: Path) -> None:
    for block in read_blocks(page):
        do(block, fresh)


def test_contributors_are_told_what_every_file_of_common_is_for() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    assert not [p.name for p in (ROOT / "common").glob("[a-z]*.py") if f"    {p.name} " not in page]


REASONS = {"8 GPUs", "the hub", "a server", "Slurm", "a login", "installs", "minutes"}


def test_the_readme_is_short_and_a_block_that_is_not_run_says_why() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180
    blocks = [block for page in PAGES for block in read_blocks(page) if block.kind == "bash"]
    skipped = [block for block in blocks if block.reason]
    assert all(any(word in block.reason for word in REASONS) for block in skipped)
    assert len(skipped) <= 36 and len(blocks) - len(skipped) >= 30


HAD = {"python", "torchrun", "bash", "cp", "head", "for", "done", "ruff"}  # what a reader has on the path
MAKES = {"--output_dir", "--output", "--score_output"}


class Command(NamedTuple):
    """A line of a block: its program, its other words, the folder of its run if it trains, what it makes."""

    program: str
    words: list[str]
    trains: str
    made: set[str]


def read_commands(block: Block) -> list[Command]:
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        for part in re.split(r" && |; do\b", re.sub(r"\s#.*", "", line)):
            words = [word for word in shlex.split(part) if not re.match(r"[A-Z_]+=", word)]
            if not words:
                continue
            given = dict(pair for word in words if (pair := word.split("=", 1))[1:])
            given |= {word: after for word, after in zip(words, words[1:], strict=False) if word[:2] == "--"}
            made = {given[name] for name in MAKES if name in given} | set(re.findall(r"> (\S+)", part))
            made |= {words[-1]} if words[0] == "cp" else set(re.findall(r"\bOUT=(\S+)", part))
            script = next((word.removesuffix(".py") for word in words[1:] if word.endswith(".py")), "")
            looks = words[0] == "cp" or re.search(r"--(help|plan|check|score|draw_prompts)\b", part)
            is_run = script.removeprefix("my_") in SHORT and not looks
            trains = given.get("--output_dir", f"runs/{script}") if is_run else ""
            found.append(Command(words[0], words[1:], trains, made | ({trains} if is_run else set())))
    return found


def lacking(command: Command, made: set[str]) -> list[str]:
    """What a line uses that neither the repository nor an earlier line has."""
    missing = [] if command.program in HAD else [command.program]
    ranks = [int(n) for word in command.words for n in re.findall(r"nproc_per_node=(\d+)", word)]
    missing += [f"{n} processes" for n in ranks if n > 2]
    missing += [f"the time for {word}" for word in command.words if re.match(r"tests/|pytest$", word)]
    for word in command.words:
        for name in re.split(r"[=,]", word):
            name = re.sub(r"(\*[\d.]+|:\w+)$", "", name)  # of several rewards, and a function
            is_file = re.fullmatch(r"[\w./-]+\.(jsonl|json|txt|tsv|csv|parquet|gz|gguf|tar|yaml|sh|py)", name)
            if " " in name or "$" in name or not ("/" in name or is_file):
                continue
            known = any(name == x or name.startswith(f"{x}/") for x in made | command.made)
            ours = not re.match(r"runs/|.*\.\.", name) and (ROOT / name).exists()  # not what runs left here
            if not known and not ours:
                missing.append(name)
    return missing


def test_a_block_uses_what_a_reader_has_and_trains_each_run_in_a_folder_of_its_own() -> None:
    """Blocks that are run name no hub, no 8 GPUs and no file that nothing made before."""
    made, trained, wrong = set(), {}, []
    for page in PAGES:
        for block in read_blocks(page):
            if block.kind == "python" and (name := re.match(r"# (\w+\.py)\b", block.text)):
                made |= {name[1], *re.findall(r'open\("([\w.]+)", "w"\)', block.text)}
            for command in read_commands(block) if block.kind == "bash" else ():
                if not block.reason:
                    wrong += [f"{page}: {what}" for what in lacking(command, made)]
                    made |= command.made
                if command.trains and "$" not in command.trains:
                    run = [word for word in command.words if "nproc_per_node" not in word]
                    of, before = trained.get(command.trains, ("", run))
                    if of == page or before != run:  # the same run on another page only prints its table
                        wrong.append(f"{page}: {command.trains} is a run of {of} already")
                    trained.setdefault(command.trains, (page, run))
    assert not wrong


# --------------------------------------------------------------------------------------------------- recipes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "runs"), [("sft_chat", ["sft"]), ("dpo_rpo", ["dpo", "rpo"]), ("spin", ["spin"])]
)
def test_a_recipe_of_training_runs_in_its_small_form(recipe: str, runs: list[str], tmp_path: Path) -> None:
    """Its own commands and options, on the toy and with fewer steps."""
    environment = {**os.environ, "SMOKE": "1", "OUT": str(tmp_path)}
    done = subprocess.run(
        ["bash", f"recipes/{recipe}.sh"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.parent.parent.name for path in tmp_path.glob("*/model/config.json")} == set(runs)


@pytest.mark.parametrize("recipe", ["sft_chat", "dpo_rpo", "spin"])
@pytest.mark.parametrize("more", [{}, {"ITERATIONS": "4"}])
def test_the_commands_of_a_recipe_parse(
    recipe: str, more: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun is played by a script that writes down what it was given."""
    told = tmp_path / "torchrun"
    told.write_text(f'#!/bin/sh\nfor word in "$@"; do printf "%s\\0" "$word"; done >> {tmp_path}/told\n')
    told.chmod(0o755)
    environment = {**os.environ, **more, "PATH": f"{tmp_path}:{os.environ['PATH']}", "NPROC": "4"}
    subprocess.run(["bash", f"recipes/{recipe}.sh"], cwd=ROOT, env=environment, check=True)
    commands = (tmp_path / "told").read_text().split("--nproc_per_node=4\0")[1:]
    for command in commands:
        parse_command(shlex.join(["python", *command.split("\0")[:-1]]), monkeypatch)
    assert commands


# --------------------------------------------------------------------------- exports in other people's tools

TASK = """
task: animals
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {max_gen_toks: 24, do_sample: false, until: []}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.release
@pytest.mark.parametrize("lora", [False, True])
def test_lm_eval_loads_an_export_and_gets_the_answers_it_was_trained_on(lora: bool, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="needs pip install lm-eval")
    options = ["--lora_rank=16", "--learning_rate=3e-3"] if lora else []
    done = subprocess.run(
        [sys.executable, "sft.py", "--num_samples=0", *options, f"--output_dir={tmp_path}/run"], cwd=ROOT
    )
    assert done.returncode == 0
    says = {"dog": "woof", "cat": "meow", "cow": "moo", "duck": "quack", "sheep": "baa", "lion": "roar"}
    asked = [{"question": f"Hi. What does the {x} say?", "answer": sound} for x, sound in says.items()]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (tmp_path / "animals.yaml").write_text(TASK.replace("QUESTIONS", f"{tmp_path}/questions.jsonl"))
    model = f"pretrained={tmp_path}/run/model"
    if lora:
        base = json.loads((tmp_path / "run/model/adapter_config.json").read_text())["base_model_name_or_path"]
        model = f"pretrained={base},peft={tmp_path}/run/model,tokenizer={tmp_path}/run/model"
    found = lm_eval.simple_evaluate(
        "hf",
        model_args=f"{model},dtype=float32",
        tasks=["animals"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path)),
        apply_chat_template=True,
        device="cpu",
    )
    for sample in found["samples"]["animals"]:
        prompt, reply = sample["arguments"][0][0], sample["resps"][0][0]
        assert prompt == f"<|user|>{sample['doc']['question']}<|end|><|assistant|>"
        assert sample["doc"]["answer"] in reply.lower() and "<|" not in reply
