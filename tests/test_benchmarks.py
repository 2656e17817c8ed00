"""The benchmarks at their smallest, in this process: the same code that is timed at full size."""

import json
import sys
import time
from typing import Any

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import cpu  # noqa: E402
import gpu  # noqa: E402
import harness  # noqa: E402
import loader  # noqa: E402
import vs_trl  # noqa: E402

from common import lm_head, models, packed  # noqa: E402


def tiny(group: str, cell: int = 0) -> dict[str, Any]:
    """What a worker of gpu.py answers, through JSON as its parent reads it."""
    figures = gpu.WORKERS[group](time.time(), **gpu.TINY[group][cell])
    return json.loads(json.dumps(figures, allow_nan=False))


# speed that must not cost correctness


@pytest.mark.parametrize("vocab_size", [100, 32_000, 128_256, 262_144])
def test_the_buffers_of_the_head_do_not_grow_with_the_vocabulary(
    vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor are they much smaller than the 2^22 numbers, 16 MiB, that a buffer may have."""
    chunks = []
    monkeypatch.setattr(lm_head._TokenStats, "apply", lambda *args: chunks.append(args[5]) or [None] * 4)
    head = torch.nn.Linear(1, vocab_size, bias=False, device="meta")
    lm_head.ChunkedHead.like(head)(torch.zeros(1, 1), torch.zeros(1, dtype=torch.long))
    (chunk,) = chunks
    assert chunk * vocab_size <= 2**22 and (chunk == 256 or chunk * vocab_size > 0.9 * 2**22)


def test_all_chunks_of_the_head_share_two_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor as large as a chunk of logits is counted: six chunks, forward and backward."""
    rows, vocab_size, sizes = 8, 3001, []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **kwargs or {})
            if isinstance(out, torch.Tensor) and func not in (torch.ops.aten.t.default,):
                storage = out.untyped_storage()
                if storage.nbytes() >= rows * vocab_size * 4:
                    sizes.append(storage.data_ptr())
            return out

    weight = torch.randn(vocab_size, 4, requires_grad=True)  # smaller than a chunk of logits
    h, y = torch.randn(6 * rows, 4, requires_grad=True), torch.randint(vocab_size, (6 * rows,))
    with Count():
        lm_head._TokenStats.apply(h, weight, None, y, 1.0, rows, False)[0].sum().backward()
    assert len(set(sizes)) <= 2  # one block of two buffers in forward, one in backward


def test_the_optimizer_is_one_kernel_and_computes_adamw(device: torch.device) -> None:
    policy = harness.random_policy(harness.llama(64, 16, 1, 2), device)
    groups = models.parameter_groups(policy, 0.1)
    assert all(group["fused"] for group in groups)
    plain = [p.detach().clone().requires_grad_() for group in groups for p in group["params"]]
    decay = [group["weight_decay"] for group in groups for _ in group["params"]]
    ours = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
    theirs = torch.optim.AdamW(
        [{"params": [p], "weight_decay": d} for p, d in zip(plain, decay, strict=True)],
        lr=0.01,
        betas=(0.9, 0.95),
        foreach=False,
    )
    for step in range(5):
        torch.manual_seed(step)
        for p, q in zip((p for group in groups for p in group["params"]), plain, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad.clone()
        ours.step()
        theirs.step()
    for p, q in zip((p for group in groups for p in group["params"]), plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_padding_and_dense_logits_change_the_cost_but_not_the_losses() -> None:
    """The two ends of the cells of SFT: what they compare is the same training."""
    packed, padded = tiny("sft", 0), tiny("sft", 1)
    assert packed["useful_share"] == 1.0 and padded["useful_share"] < 0.8
    assert packed["losses"] == pytest.approx(padded["losses"], abs=1e-5)
    assert packed["losses"][0] != packed["losses"][1]


# the cells of gpu.py


def test_every_group_has_tiny_cells_with_the_settings_of_the_large_ones() -> None:
    assert set(gpu.TINY) == set(gpu.CELLS)
    for group, (_, cells) in gpu.CELLS.items():
        known = {name for cell in cells for name in cell}
        if group == "checks":  # each has settings of its own
            continue
        assert all(set(cell) <= known for cell in gpu.TINY[group])


def test_attention_kernels_agree_where_they_are_timed() -> None:
    found = tiny("attention")
    for kernel in ("ours", "sdpa_by_document", "sdpa_dense_mask"):
        assert max(found[kernel]["relative_gaps_out_dq_dk_dv"]) < 1e-5
        assert 0 < found[kernel]["forward_ms"] < found[kernel]["forward_backward_ms"]


def test_lora_trains_fewer_weights_in_its_cell() -> None:
    found = tiny("sft_8b")
    assert found["useful_tokens_per_second"] > 0 and found["losses"][0] != found["losses"][1]


def test_the_head_and_its_ceiling_are_measured() -> None:
    assert tiny("ceilings")["gemm_flops"] > 0
    found = tiny("head")
    assert found["seconds"] > 0 and 0 < found["of_gemm"] < 2


def test_decode_is_timed_against_its_roofline() -> None:
    found = tiny("decode")
    assert found["step_ms"] > 0 and found["of_copy"] == pytest.approx(
        found["roofline_ms"] / found["step_ms"], rel=1e-6
    )


@pytest.mark.parametrize("check", gpu.TINY["checks"], ids=lambda cell: cell["check"])
def test_the_checks_pass_on_a_cpu(check: dict[str, Any]) -> None:
    found = json.loads(json.dumps(gpu.run_check(0.0, **check), allow_nan=False))
    assert found["ok"] is True, found


def test_a_check_notices_logits_that_were_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = lm_head.float32_logits

    def rounded(h: Any, weight: Any, bias: Any, out: Any = None, cap: Any = None) -> torch.Tensor:
        logits = whole(h, weight, bias).bfloat16().float()
        return logits if out is None else out.copy_(logits)

    monkeypatch.setattr(lm_head, "float32_logits", rounded)
    settings = next(cell for cell in gpu.TINY["checks"] if cell["check"] == "check_head")
    assert gpu.run_check(0.0, **settings)["ok"] is False


@pytest.mark.slow
def test_a_day_goes_on_after_a_cell_that_fails_and_ends_in_time(monkeypatch, capfd) -> None:
    """Each cell is a line; one that dies or is too slow is an error there; a wrong check is the exit code."""
    cells = {"ceilings": [{}], "checks": [{"check": "check_score_head"}, {"check": "no such"}]}
    monkeypatch.setattr(gpu, "TINY", cells)
    assert not gpu.day(1.0, small=True, only="")
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["task"] for line in lines] == ["ceilings", "checks", "checks"]
    assert lines[0]["gemm_flops"] > 0 and lines[1]["ok"] and "KeyError" in lines[2]["error"]
    assert gpu.day(0.1, small=True, only="") and "are over before" in capfd.readouterr().out
    worker = harness.Worker(gpu.__file__, threads=1)
    assert worker.ask("ceilings", {}, limit=0.1) == {"error": "no answer in 0 s"}


def test_ppo_says_where_its_time_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tiny("ppo")
    assert sum(found["shares"].values()) == pytest.approx(1.0)
    assert {"rollout", "scoring", "advantages", "value", "policy"} == set(found["shares"])


def test_without_a_gpu_only_small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "day"])
    with pytest.raises(SystemExit, match="only --small runs here"):
        gpu.main()


# those of cpu.py and the comparison


def test_the_cpu_workers_answer() -> None:
    shape = (512, 32, 1, 2)
    heads = [cpu.run_head(0.0, kind, 1000, 50, 16)["loss"] for kind in ("chunked", "dense")]
    assert heads[0] == pytest.approx(heads[1], abs=1e-5)
    found = cpu.run_length(0.0, shape, [64, 256], tokens=256, rounds=1)
    assert found["flops"][1] > found["flops"][0] > 0 and min(found["seconds"]) > 0
    assert cpu.run_tokens(0.0, shape, 256, 64, 1)["peak_rss_mib"] > 0
    found = cpu.run_ranks(0.0, shape, num_documents=4, row_tokens=512, steps=1, sharding="full")
    assert found["imbalance"] == 1.0 and found["tokens_per_second"] > 0
    found = cpu.run_loader(0.0, 300)
    assert found["fill"] > 0.9 and found["tokenise_tokens_per_second"] > 0


def test_the_loader_is_measured_on_chats_it_can_read(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLEANALIGN_CACHE", str(tmp_path / "cache"))
    loader.write_chats(tmp_path / "chats.jsonl", 40, 100)
    loader.write_model(tmp_path, tmp_path / "chats.jsonl")
    found = loader.run_ours(0.0, str(tmp_path), str(tmp_path / "chats.jsonl"), num_batches=0)
    assert found["examples"] == 40 and found["cpu"] > 0 and found["uss_mib"] > 0
    assert loader.run_map(0.0, str(tmp_path), str(tmp_path / "chats.jsonl"))["cpu"] > 0


def test_documents_have_the_tokens_they_say() -> None:
    fixed = harness.fixed_documents(3, 40, 512)
    assert [(e.num_tokens, e.num_targets) for e in fixed] == [(40, 39)] * 3
    some = harness.documents(20, 512, max_length=200)
    assert len(some) == 20 and all(0 < e.num_targets < e.num_tokens <= 200 for e in some)
    padded = gpu.pad(some, group=4)
    assert [e.num_targets for e in padded] == [e.num_targets for e in some]
    assert all(len({e.num_tokens for e in padded[i : i + 4]}) == 1 for i in range(0, 20, 4))


@pytest.mark.parametrize("task", vs_trl.OF_TASK)
def test_both_sides_of_the_comparison_get_the_same_examples(task: str, tmp_path: Any) -> None:
    work = vs_trl.Work(task, **vs_trl.SMALL)
    vs_trl.prepare(work, tmp_path)
    steps = vs_trl.read_steps(tmp_path)
    assert len(steps) == work.num_steps
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert lines == [example for step in steps for example in step["examples"]]
    for step in steps:
        tokens = sum(map(vs_trl.example_tokens, step["examples"]))
        if task == "sft":
            assert sum(step["rows"]) == len(step["examples"])
            assert 0.8 * work.row_tokens < tokens <= work.row_tokens * work.rows_per_step
        else:
            assert len(step["examples"]) == work.pairs_per_step


@pytest.mark.slow
@pytest.mark.parametrize("task", vs_trl.OF_TASK)
def test_the_comparison_runs_and_its_losses_agree(task: str, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    """It ends with an error where a loss differs by more than 1e-3."""
    pytest.importorskip("trl")
    monkeypatch.setattr(sys, "argv", ["vs_trl.py", task, "--small", "--rounds", "1"])
    vs_trl.main()
    out = capfd.readouterr().out
    assert "useful tokens/s" in out and "largest difference of a step's loss" in out


@pytest.mark.slow
def test_two_ranks_of_the_benchmark_compute_what_one_does(capfd) -> None:
    """It ends with an error where a loss differs by more than 1e-5."""
    assert set(cpu.ranks(small=True)["ratios"]) == {"one rank", "two, shards", "two, copies"}


@pytest.mark.slow
def test_compiled_blocks_are_one_graph_whatever_is_packed(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Compiled once for all blocks and any shape; the kernel, as FlashAttention's, is one operation.

    What varies are sizes of the row alone: as a variable the width of a head would slow rotary embeddings.
    """
    from torch._dynamo.utils import counters
    from torch._inductor.compile_fx import compile_fx

    inputs: list[str] = []

    def backend(graph: torch.fx.GraphModule, examples: list) -> Any:
        inputs.extend(node.name for node in graph.graph.nodes if node.op == "placeholder")
        return compile_fx(graph, examples)

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compile(f, backend=backend, **how))

    @torch.library.custom_op("benchmarks::attend", mutates_args=())
    def attend(q: torch.Tensor, cu_seqlens: torch.Tensor, longest: int) -> torch.Tensor:
        return q.sin()

    attend.register_fake(lambda q, cu_seqlens, longest: torch.empty_like(q))
    attend.register_autograd(lambda ctx, g: (g, None, None))

    def attention(module: Any, query: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        out = attend(query, kwargs["cu_seq_lens_q"], kwargs["max_length_q"])
        return out.transpose(1, 2), None

    monkeypatch.setattr(packed, "packed_attention", attention)
    torch._dynamo.reset()
    counters.clear()
    policy = harness.random_policy(harness.llama(512, 32, 3, 2), device, compile=True, dtype="bfloat16")
    optimizer = torch.optim.AdamW(models.parameter_groups(policy, 0.0))
    examples, graphs = harness.documents(300, 512, max_length=256), []
    for step in range(6):
        batch = examples[step * 20 : step * 20 + 10 + step]  # other lengths, other row counts
        harness.sft_step(policy, optimizer, batch, 1024, device)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1] * 6 and not counters["graph_break"]
    assert any("hidden" in name or "args" in name for name in inputs)
    assert not [name for name in inputs if name.endswith(("head_dim", "scaling"))]
