"""The house rules that a test can check: imports, names, help sentences, documented commands, sweeps."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from common import args, stages

SCRIPTS = sorted(p.stem for p in ROOT.glob("*.py"))
PIPELINES = {"cai", "steerlm"}
ALGORITHMS = r"\b(sft|dpo|ppo|grpo|rloo|spin|steerlm2?|draftp?|cai|ipo|rpo|simpo|reward_model)\b"
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HEADINGS = [
    "The algorithm",
    "Run it",
    "Options that matter",
    "Metrics",
    "Departures from the paper",
    "Results",
    "References",
]


def imports(path: Path) -> set[str]:
    """Top-level names of all modules a file imports."""
    nodes = ast.walk(ast.parse(path.read_text()))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_there_are_scripts() -> None:
    assert {"sft", "dpo", "reward_model", "ppo", "spin", "cai", "steerlm", "steerlm2"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_neither_the_toy_nor_each_other(script: str) -> None:
    found = imports(ROOT / f"{script}.py")
    assert "toy" not in found
    assert script in PIPELINES or not found & set(SCRIPTS)


@pytest.mark.parametrize("path", sorted((ROOT / "common").glob("*.py")), ids=lambda p: p.stem)
def test_common_names_no_algorithm_in_code(path: Path) -> None:
    assert not imports(path) & set(SCRIPTS)
    tree = ast.parse(path.read_text())
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    compared = [
        c.value
        for n in ast.walk(tree)
        if isinstance(n, ast.Compare)
        for c in n.comparators
        if isinstance(c, ast.Constant)
    ]
    assert texts and not [c for c in compared if re.search(ALGORITHMS, str(c))]


def arguments(script: str) -> dict[str, tuple[str, str]]:
    """Field -> (type, help sentence) of a script's Args, without its blocks."""
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Args").body
    found = {}
    for node, after in zip(body, body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and "OmitArgPrefixes" not in ast.unparse(node.annotation):
            assert isinstance(after, ast.Expr), f"{script}.{node.target.id} has no help sentence"
            found[node.target.id] = (ast.unparse(node.annotation), after.value.value)
    return found


def test_a_field_of_two_scripts_has_one_type_and_one_help_sentence() -> None:
    own = {"dataset", "batch_size", "loss", "max_length"}  # say what the script's examples are
    own |= {"max_new_tokens", "temperature", "num_epochs"}  # of samples to look at, or to learn from
    own |= {"attributes"}  # one set to go back to, or several to learn
    own |= {"beta", "learning_rate"}  # one value, or one for each iteration
    of_images = {"model", "reward", "judge", "num_samples"}
    seen: dict[str, tuple[str, str, str]] = {}
    for script in SCRIPTS:
        for name, (kind, text) in arguments(script).items():
            if name not in own and not (script == "draftp" and name in of_images):
                first = seen.setdefault(name, (script, kind, text))
                assert first[1:] == (kind, text), f"{name} differs between {first[0]} and {script}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_has_its_page_its_row_and_its_sweep(script: str) -> None:
    page = (ROOT / "docs" / f"{script}.md").read_text()
    assert re.findall(r"^## (.+)$", page, re.MULTILINE) == HEADINGS
    readme = (ROOT / "README.md").read_text().splitlines()
    (row,) = [line for line in readme if f"[docs/{script}.md](docs/{script}.md)" in line]
    num_lines = len((ROOT / f"{script}.py").read_text().splitlines())
    assert f"| {num_lines} |" in row
    assert (ROOT / "sweeps" / f"{script}.yaml").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_metric_of_a_script_is_explained_on_its_page(script: str) -> None:
    page = (ROOT / "docs" / f"{script}.md").read_text()
    source = (ROOT / f"{script}.py").read_text()
    metrics = source.partition("    metrics = {")[2]
    names = set(re.findall(r'^        "([\w/]+)":', metrics, re.MULTILINE))
    names |= set(re.findall(r'"(eval/[\w/]+)(?:/\{name\})?"', source))
    page = page.replace("`eval/", "`")
    assert names and not [name for name in names if f"`{name.removeprefix('eval/')}" not in page]


def commands(path: Path) -> list[str]:
    """Command lines that run one of our scripts, from the code blocks of a page."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", path.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [
        line
        for line in lines
        if re.search(rf"\b({'|'.join(SCRIPTS)})\.py\b", line) and " cp " not in f" {line}"
    ]


def parse_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line.split(" > ")[0].split("&&")[-1], comments=True)
    at = next(i for i, word in enumerate(words) if word.removesuffix(".py") in SCRIPTS)
    module = importlib.import_module(words[at].removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", words[at:])
    if "--help" not in words:
        names = getattr(module, "STAGES", {})
        parsed = args.parse(module.Args, module.TOY, names)
        if names:  # a pipeline, which reads the options of its stages when it begins
            stages.read_all(parsed.stages, names, module.RESERVED)


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_documented_commands_parse(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in commands(path):
        try:
            parse_command(line, monkeypatch)
        except SystemExit:
            pytest.fail(f"{path.name}: {line}")


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_command_a_sweep_agent_would_run_parses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = yaml.safe_load(path.read_text())
    chosen = {
        name: spec["values"][0] if "values" in spec else spec["min"]
        for name, spec in sweep["parameters"].items()
    }
    words = []
    for word in sweep["command"]:
        flags = [f"--{name}={value}" for name, value in chosen.items()]
        words += {"${env}": [], "${program}": [sweep["program"]], "${args}": flags}.get(word, [word])
    parse_command(shlex.join(words), monkeypatch)
    module = importlib.import_module(path.stem)
    assert sweep["program"] == f"{path.stem}.py"
    assert {name.partition(".")[0] for name in chosen} <= args.flat(module.Args()).keys()  # sft.learning_rate


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_field(script: str) -> None:
    done = subprocess.run(
        [sys.executable, f"{script}.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    for name in args.flat(importlib.import_module(script).Args()):
        assert f"--{name}" in done.stdout


def test_a_copied_script_runs_unchanged(few: Path, tmp_path: Path) -> None:
    copy = ROOT / "my_dpo_test_copy.py"
    copy.write_text((ROOT / "dpo.py").read_text())
    try:
        flags = ["--max_steps=1", "--batch_size=4", "--num_samples=0", f"--dataset={few}/pairs"]
        done = subprocess.run(
            [sys.executable, copy.name, *flags, f"--output_dir={tmp_path}/run"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "run" / copy.name).exists()
    finally:
        copy.unlink()


def test_the_text_is_ascii() -> None:
    for path in [*ROOT.glob("*.py"), *ROOT.glob("common/*.py"), *ROOT.glob("toy/*.py"), *DOCS]:
        assert path.read_text().isascii(), path
