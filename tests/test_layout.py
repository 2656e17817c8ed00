"""The house rules that a test can check: imports, names, help sentences, documented commands, sweeps."""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, read_metrics

from common import args, report, stages

SCRIPTS = ["cai", "dpo", "draftp", "ppo", "reward_model", "sft", "spin", "steerlm", "steerlm2"]  # not a copy
PIPELINES = {"cai", "steerlm"}
ALGORITHMS = r"\b(sft|dpo|ppo|grpo|rloo|spin|steerlm2?|draftp?|cai|ipo|rpo|simpo|reward_model)\b"
DOCS = [
    *ROOT.glob("*.md"),
    *sorted(p for at in ("docs", "recipes", "sweeps") for p in (ROOT / at).glob("*.md")),
]
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


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_command_in_a_card_gives_the_very_settings_of_the_run(
    script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of options given at the class's default too, where the toy, another model or a preset has another."""
    module = importlib.import_module(script)
    own, stages_of = args.flat(module.Args()), module.STAGES if script in PIPELINES else {}

    def parse(words: list[str]) -> Any:
        monkeypatch.setattr(sys, "argv", [script, *words])
        return args.parse(module.Args, module.TOY, stages_of)

    presets = [f"--{name}={x}" for name, found in args.presets_of(module.Args).items() for x in found]
    for base in ([], ["--model=x"], *([preset] for preset in presets)):
        start = args.flat(parse(base))
        chosen = ("model", *args.presets_of(module.Args))
        given = {name: x for name, x in own.items() if name not in chosen and x != start[name]}
        assert given
        for words in (base, base + report.as_words(given)):
            found = parse(words)
            again = parse(report.as_words(args.snapshot(found, module.TOY).changed))
            assert args.flat(again) == args.flat(found), words


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


def arguments(path: Path) -> dict[str, tuple[str, str]]:
    """Option -> (type, help sentence) of the dataclasses of a file that hold options."""
    found = {}
    for body in (n.body for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef)):
        for node, after in zip(body, [*body[1:], None], strict=True):
            kind = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) and node.value else ""
            if kind and not kind.startswith("ClassVar") and "block(" not in ast.unparse(node.value):
                assert isinstance(after, ast.Expr), f"{path.stem}.{node.target.id} has no help sentence"
                found[node.target.id] = (kind, after.value.value)
    return found


FILES = [*(ROOT / f"{script}.py" for script in SCRIPTS), ROOT / "common" / "args.py"]


def test_a_field_of_two_scripts_has_one_type_and_one_help_sentence() -> None:
    own = {"dataset", "loss", "max_length"}  # say what the script's examples are
    own |= {"max_new_tokens", "temperature", "num_epochs"}  # of samples to look at, or to learn from
    own |= {"attributes"}  # one set to go back to, or several to learn
    own |= {"beta", "learning_rate"}  # one value, or one for each iteration
    of_images = {"model", "reward", "judge", "num_samples"}
    of_stages = {"sft", "reward_model", "ppo", "dpo"}
    seen: dict[str, tuple[str, str, str]] = {}
    for path in FILES:
        for name, (kind, text) in arguments(path).items():
            if name not in own | of_stages and not (path.stem == "draftp" and name in of_images):
                first = seen.setdefault(name, (path.stem, kind, text))
                assert first[1:] == (kind, text), f"{name} differs between {first[0]} and {path.stem}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_help_sentence_can_stand_alone(path: Path) -> None:
    for name, (_, text) in arguments(path).items():
        assert not re.match(r"(of|and|or|it|its|such|the same|these|those|this)\b", text), f"{name}: {text}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_has_its_page_its_row_and_its_sweep(script: str) -> None:
    page = (ROOT / "docs" / f"{script}.md").read_text()
    assert re.findall(r"^## (.+)$", page, re.MULTILINE) == HEADINGS
    readme = (ROOT / "README.md").read_text().splitlines()
    assert len([line for line in readme if f"[docs/{script}.md](docs/{script}.md)" in line]) == 1
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
    blocks = re.findall(r"```(?:bash|sh)[^\n]*\n(.*?)```", path.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [
        line
        for line in lines
        if re.search(rf"\b({'|'.join(SCRIPTS)})\.py\b", line)
        and not re.search(r"\b(cp|tests/\w+\.py) ", line)
        and "$" not in line  # of the shell
    ]


def parse_command(line: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    words = shlex.split(line.split(" > ")[0].split("&&")[-1], comments=True)
    at = next(i for i, word in enumerate(words) if word.removesuffix(".py") in SCRIPTS)
    module = importlib.import_module(words[at].removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", words[at:])
    if "--help" not in words:
        names = getattr(module, "STAGES", {})
        parsed = args.parse(module.Args, module.TOY, names)
        if names:  # a pipeline, which reads the options of its stages when it begins
            stages.read_all(parsed.stages, names, module.RESERVED)
        return parsed
    return None


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_documented_commands_parse(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in commands(path):
        try:
            parse_command(line, monkeypatch)
        except SystemExit:
            pytest.fail(f"{path.name}: {line}")


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_command_a_sweep_agent_would_run_parses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With each value of each parameter, of which none does nothing."""
    sweep, module = yaml.safe_load(path.read_text()), importlib.import_module(path.stem)
    values = {name: spec.get("values", [spec.get("min")]) for name, spec in sweep["parameters"].items()}
    assert sweep["program"] == f"{path.stem}.py"
    assert {name.partition(".")[0] for name in values} <= args.flat(module.Args()).keys()  # sft.learning_rate
    first = {name: several[0] for name, several in values.items()}
    for chosen in [first, *({**first, name: x} for name, several in values.items() for x in several[1:])]:
        words = []
        for word in sweep["command"]:
            flags = [f"--{name}={value}" for name, value in chosen.items()]
            words += {"${env}": [], "${program}": [sweep["program"]], "${args}": flags}.get(word, [word])
        parsed = parse_command(shlex.join(words), monkeypatch)
        if path.stem in ("dpo", "ppo"):  # whose losses and advantages do not read all options
            module.check(parsed)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_boolean_is_read_as_a_sweep_agent_writes_it(
    script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = args.flat(importlib.import_module(script).Args())
    booleans = [name for name, value in options.items() if isinstance(value, bool)]
    for value in (True, False):
        words = [f"{script}.py", "--model=x", *(f"--{name}={value}" for name in booleans)]
        found = args.flat(parse_command(shlex.join(words), monkeypatch))
        assert len(booleans) > 2 and {found[name] for name in booleans} == {value}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_field(script: str) -> None:
    done = subprocess.run(
        [sys.executable, f"{script}.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    for name, value in args.flat(importlib.import_module(script).Args()).items():
        assert f"--{'no_' if value is True else ''}{name}" in done.stdout  # of a boolean what changes it
    assert "optimization options" in done.stdout or script in PIPELINES


def run_copy(script: str, change: tuple[str, str], folder: Path, *flags: str) -> list[dict]:
    """The rows of metrics of a copy of a script with one change, run in a folder of its own."""
    source = (ROOT / f"{script}.py").read_text()
    assert source.count(change[0]) == 1
    copy = folder / f"my_{script}.py"
    copy.write_text(source.replace(*change))
    done = subprocess.run(
        [sys.executable, str(copy), *flags, f"--output_dir={folder}/run"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "run" / copy.name).read_text() == copy.read_text()
    return read_metrics(folder / "run")


FEW_STEPS = ["--max_steps=2", "--num_samples=0", "--micro_batch_tokens=300"]  # several rows a step


def test_a_copied_script_runs_unchanged(few: Path, tmp_path: Path) -> None:
    rows = run_copy("dpo", ("def dpo_loss", "def dpo_loss"), tmp_path, *FEW_STEPS, f"--dataset={few}/pairs")
    assert [row["step"] for row in rows] == [0, 1, 2]


@pytest.mark.parametrize("script", ["dpo", "ppo"])
def test_a_metric_added_to_a_copy_as_the_readme_says_has_its_true_value(
    script: str, few: Path, tmp_path: Path
) -> None:
    (pair,) = re.findall(r'`("my_entropy": \(.*\))`', (ROOT / "README.md").read_text())
    before, flags, ours = {
        "dpo": ('        "rewards/chosen"', [f"--dataset={few}/pairs", "--batch_size=8"], "entropy"),
        "ppo": ('        "loss/policy_avg"', ["--rollout_size=8", "--batch_size=8"], "policy/entropy_avg"),
    }[script]
    rows = run_copy(script, (before, f"        {pair},\n{before}"), tmp_path, *FEW_STEPS, *flags)
    assert len(rows) == 3
    for row in rows[1:]:
        assert row["train/my_entropy"] == pytest.approx(row[f"train/{ours}"], rel=1e-6)
        assert 0.1 < row["train/my_entropy"] < 3


def test_no_code_that_comes_with_a_model_is_run() -> None:
    calls = []
    for path in (*ROOT.glob("*.py"), *(ROOT / "common").glob("*.py")):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            called = ast.unparse(call.func)
            if re.search(r"\bAuto\w+\.from_(pretrained|config)$", called):
                calls.append((path.name, called, {k.arg: ast.unparse(k.value) for k in call.keywords}))
    assert len(calls) > 5
    fresh = [(name, called) for name, called, given in calls if given.get("trust_remote_code") != "False"]
    assert not fresh


def test_the_text_is_ascii() -> None:
    for path in [*FILES, *ROOT.glob("common/*.py"), *ROOT.glob("toy/*.py"), *DOCS]:
        assert path.read_text().isascii(), path
