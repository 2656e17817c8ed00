"""common/generate.py: what comes out is exactly what the model says, however the batch was made up."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from common import chat, decode, dist, files, generate, models, packed
from common.args import System
from toy import language

EOS = 1
PROMPTS = [[5, 6, 7], [9], [3] * 11, [4, 5, 6, 7, 8, 9, 10, 11, 12], [20, 21], [2, 3]]


class Words:
    """A tokenizer whose token i reads "i "; 0 is special, and EOS the end of a turn."""

    chat_template, eos_token_id = None, EOS

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(f"{t} " for t in tokens if not (skip_special_tokens and t in (0, EOS)))


ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def options(**changes: Any) -> System:
    return System(**{"dtype": "float32", "activation_checkpointing": "off", **changes})


def save(folder: Path, kind: str = "Llama", seed: int = 0, eos: Any = EOS, **config: Any) -> nn.Module:
    """A random model of 60 tokens in a folder, its weights so wide that it is far from uniform."""
    import transformers

    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    if kind != "GPT2":
        sizes |= {"intermediate_size": 64, "num_key_value_heads": 2}
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "vocab_size": 60}
    settings = {**sizes, **tokens, "initializer_range": 0.3, "tie_word_embeddings": False, **config}
    head = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    model = getattr(transformers, head)(getattr(transformers, f"{kind}Config")(**settings)).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = eos, 0
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> nn.Module:
    folder = tmp_path_factory.mktemp("llama")
    save(folder)
    return models.load(str(folder), device, options())


def replies(policy: nn.Module, prompts: list = PROMPTS, **settings: Any) -> list[generate.Sample]:
    return generate.generate(policy, Words(), prompts, **{"max_new_tokens": 20, **settings})


def same(a: list[generate.Sample], b: list[generate.Sample]) -> bool:
    close = all(
        np.allclose(x.logps, y.logps, atol=1e-5) for x, y in zip(a, b, strict=True) if x.tokens == y.tokens
    )
    return [s.tokens for s in a] == [s.tokens for s in b] and close


# ------------------------------------------------------------------------------------- against transformers


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("Llama", {}),
        ("Qwen3", {"head_dim": 16}),
        ("GPT2", {}),
        ("Mistral", {"sliding_window": 6}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
        ("HyperCLOVAX", {"logits_scaling": 0.3}),
        ("GraniteMoeHybrid", {"layer_types": ["attention"] * 2, "num_local_experts": 0, "mamba_n_heads": 4}),
        ("Gemma2", {"head_dim": 8, "sliding_window": 6, "attn_logit_softcapping": 2.0}),
        ("GptOss", {"head_dim": 8, "sliding_window": 6, "num_local_experts": 4, "rope_parameters": ROPE}),
    ],
)
def test_greedy_equals_transformers_token_for_token(kind, config, tmp_path, device):
    model = save(tmp_path, kind, **config)
    model.set_attn_implementation("eager")  # others may leave out caps and sinks
    policy = models.load(str(tmp_path), device, options())
    for penalty in (1.0, 1.3):
        settings = {"max_new_tokens": 40, "repetition_penalty": penalty}
        for sample in replies(policy, temperature=0, max_batch=4, **settings):
            assert EOS not in sample.prompt_tokens  # which transformers would penalize
            prompt = torch.tensor([sample.prompt_tokens])
            whole = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **settings
            )
            assert sample.tokens == whole[0, prompt.shape[1] :].tolist()
            assert sample.ended == (sample.tokens[-1] == EOS)


def test_generation_config_adds_end_tokens_and_no_sampling_defaults(tmp_path, device):
    model = save(tmp_path, eos=[EOS, 7])
    model.generation_config.update(top_k=1, temperature=1e-3, repetition_penalty=9.0, do_sample=True)
    model.generation_config.save_pretrained(tmp_path)
    policy = models.load(str(tmp_path), device, options())
    assert policy.generation_config.top_k == 1
    samples = replies(policy, samples_per_prompt=50)
    assert len({s.tokens[0] for s in samples if s.prompt_index == 0}) > 10
    assert {s.tokens[-1] for s in samples if s.ended} == {EOS, 7}
    assert not any({EOS, 7} & set(s.tokens[:-1]) for s in samples)


# ------------------------------------------------------------------------------------------ distributions


def test_samples_follow_the_enumerated_distribution(tmp_path, device):
    """E18. Five tokens, at most three of them in an answer: 85 answers, whose probabilities sum to 1."""
    save(tmp_path, vocab_size=5, num_hidden_layers=1)
    policy = models.load(str(tmp_path), device, options())
    answers = [y for n in (1, 2, 3) for y in itertools.product(range(5), repeat=n)]
    answers = [y for y in answers if EOS not in y[:-1] and (y[-1] == EOS or len(y) == 3)]
    assert len(answers) == 85
    examples = [generate.to_example(generate.Sample(0, 0, [0, 2], list(y), [], True, "")) for y in answers]
    temperature, count = 0.7, 20_000
    row = packed.make_micro_batch(examples, list(range(85)), device)
    with torch.no_grad():
        logps = models.token_logps(policy, row, temperature)
    p = packed.segment_sum(logps, row.target_segments, 85).double().exp().numpy()
    assert abs(p.sum() - 1) < 1e-5

    def p_value(temperature: float) -> float:
        samples = replies(
            policy,
            [[0, 2]],
            samples_per_prompt=count,
            max_new_tokens=3,
            temperature=temperature,
            max_batch=5000,
        )
        found = np.zeros(85)
        for sample in samples:
            found[answers.index(tuple(sample.tokens))] += 1
        return chi_square_p(found, count * p)

    assert p_value(temperature) > 1e-3
    assert p_value(1.0) < 1e-6  # the temperature forgotten


def chi_square_p(found: np.ndarray, expected: np.ndarray) -> float:
    """P(a worse fit), cells expecting fewer than 5 merged; by Wilson and Hilferty's approximation."""
    small = expected < 5
    if small.any():
        found = np.append(found[~small], found[small].sum())
        expected = np.append(expected[~small], expected[small].sum())
    freedom = len(found) - 1
    statistic = ((found - expected) ** 2 / expected).sum()
    z = ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))
    return math.erfc(z / math.sqrt(2)) / 2


def test_the_chi_square_knows_its_quantiles():
    # 50 cells of 100: the 0.95 quantile of 49 degrees of freedom is 66.34, the 0.999 quantile 85.35
    for quantile, p in ((66.34, 0.05), (85.35, 0.001)):
        shift = math.sqrt(quantile * 100 / 50)
        found = 100 + shift * np.tile([1.0, -1.0], 25)
        assert chi_square_p(found, np.full(50, 100.0)) == pytest.approx(p, rel=0.03)


def test_inversion_finds_the_token_whose_share_of_the_interval_holds_the_number():
    weights = torch.tensor(
        [[0.0, 0.5, 0.0, 0.25, 0.125, 0.125, 0.0, 0.0, 0.0]]
    )  # 27 cells in blocks of 3 and 9
    found = {}
    for u in np.linspace(0, 1, 64, endpoint=False):
        for v in np.linspace(0, 1, 64, endpoint=False):
            uniforms = torch.tensor([[0.5, u, v]], dtype=torch.float64)
            token = decode.invert(weights, uniforms).item()
            found[token] = found.get(token, 0) + 1 / 64**2
    assert found == {1: 0.5, 3: 0.25, 4: 0.125, 5: 0.125}


def test_a_large_vocabulary_does_not_make_tokens_depend_on_rounding():
    torch.manual_seed(0)
    logits, uniforms = torch.randn(300, 50_000) * 3, torch.rand(300, 3, dtype=torch.float64)
    noisy = logits + 2e-6 * torch.randn_like(logits)  # what another batch does to logits in float32
    changed = decode.draw(logits, uniforms, 1.0, 0, 1.0)[0] != decode.draw(noisy, uniforms, 1.0, 0, 1.0)[0]
    assert changed.sum() <= 1


def test_broken_weights_draw_a_token_of_the_vocabulary():
    tokens, logps = decode.draw(torch.full((2, 50), math.nan), torch.rand(2, 3).double(), 1.0, 3, 0.9)
    assert tokens.max() < 50 and logps.isnan().all()


def test_top_k_and_top_p_by_hand():
    p = torch.tensor([[0.125, 0.5, 0.25, 0.0625, 0.0625]])
    kept = lambda k, q: decode.keep_top(p, k, q)[0].tolist()  # noqa: E731
    assert kept(2, 1.0) == [0, 0.5, 0.25, 0, 0]
    assert kept(0, 0.5) == [0, 0.5, 0, 0, 0]  # 0.5 is reached by the first alone
    assert kept(0, 0.51) == [0, 0.5, 0.25, 0, 0]
    assert kept(0, 0.8) == [0.125, 0.5, 0.25, 0, 0]
    assert kept(2, 0.6) == [0, 0.5, 0, 0, 0]  # of the two left the first holds 2/3
    assert kept(9, 1.0) == p[0].tolist()
    uniforms = torch.rand(2000, 3, dtype=torch.float64)
    tokens, logps = decode.draw(p.log().expand(2000, -1), uniforms, 1.0, 2, 1.0)
    assert set(tokens.tolist()) == {1, 2}
    torch.testing.assert_close((tokens == 1).double().mean().item(), 2 / 3, atol=0.04, rtol=0)
    torch.testing.assert_close(logps.exp(), p[0][tokens])  # of the whole distribution


# ---------------------------------------------------------------------------------------------- log-probs


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logps_are_those_of_the_training_forward(policy, device, temperature):
    samples = replies(policy, temperature=temperature, top_p=0.9, samples_per_prompt=2)
    assert all(len(s.tokens) == len(s.logps) for s in samples)
    for row in packed.micro_batches([generate.to_example(s) for s in samples], 100, device):
        with torch.no_grad():
            logps = models.token_logps(policy, row, temperature or 1.0)
        torch.testing.assert_close(generate.sampled_logps(samples, row), logps, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------- batch and addresses


def test_samples_do_not_depend_on_the_batch(policy):
    settings = {"samples_per_prompt": 4, "seed": 3, "step": 2}
    samples = replies(policy, **settings)
    assert [(s.prompt_index, s.sample_index) for s in samples] == list(itertools.product(range(6), range(4)))
    assert len({len(s.tokens) for s in samples}) > 5  # so rows finish, are replaced and are compacted
    for max_batch in (1, 3, 64):
        assert same(replies(policy, max_batch=max_batch, **settings), samples)
    alone = replies(policy, PROMPTS[:1], **settings)
    assert same(alone, samples[:4])


def test_samples_do_not_depend_on_how_often_the_host_looks(policy, monkeypatch):
    settings = [{"samples_per_prompt": 3, "max_batch": 8}, {"stop": ["2 "]}, {"max_new_tokens": 1}]
    often = [replies(policy, **s) for s in settings]
    monkeypatch.setitem(decode.STRIDE, "cpu", 8)
    monkeypatch.setitem(decode.BUCKET, "cpu", 4)
    assert all(same(replies(policy, **s), samples) for s, samples in zip(settings, often, strict=True))


@pytest.mark.gpu
def test_graphs_replay_what_eager_steps_do(policy, monkeypatch):
    with_graphs = replies(policy, PROMPTS * 8, max_batch=16, max_new_tokens=40)
    monkeypatch.setattr(decode.Batch, "step", decode.Batch.forward)
    assert same(replies(policy, PROMPTS * 8, max_batch=16, max_new_tokens=40), with_graphs)


class Captured:
    """Stands for a CUDA graph on a CPU: the step again, with all that it read where it was then."""

    made = 0

    def __init__(self, batch, width):
        Captured.made += 1
        batch.forward(width)
        self.batch, self.width, self.then = batch, width, self.places(batch)

    @staticmethod
    def places(batch):
        read = [*batch.state, batch.ends, *itertools.chain(*batch.cache.layers.values())]
        return [x.data_ptr() for x in (*read, *batch.replica.model.state_dict().values())]

    def replay(self):
        assert self.places(self.batch) == self.then and self.batch.replica.awake
        self.batch.forward(self.width)


def test_a_step_is_captured_once_for_all_calls_while_the_weights_stay(tmp_path, device, monkeypatch):
    """The graphs of a call serve the next, of other sizes and seeds and after training, if memory allows."""
    save(tmp_path)
    policy = models.load(str(tmp_path), device, options())
    calls = [
        {"samples_per_prompt": 4, "max_batch": 16},
        {"seed": 2, "max_new_tokens": 12, "samples_per_prompt": 3, "max_batch": 16},
        {"prompts": PROMPTS[:2]},
        {"top_k": 5},
    ]
    plain, policy.room = [replies(policy, **call) for call in calls], 0.0
    monkeypatch.setattr(decode, "can_capture", lambda replica: True)
    monkeypatch.setattr(decode.Batch, "capture", lambda *step: Captured(*step))
    monkeypatch.setattr(decode, "BUCKET", {"cpu": 64})
    monkeypatch.setattr(Captured, "made", 0)
    assert same(replies(policy, **calls[0]), plain[0]) and Captured.made > 2  # 16 rows, 8, ...
    assert policy.replica.batch is None and not policy.replica.awake  # no room
    policy.room = 1e9
    assert same(replies(policy, **calls[0]), plain[0])
    made, batch = Captured.made, policy.replica.batch
    for call, expected in zip(calls[:3], plain[:3], strict=True):
        assert same(replies(policy, **call), expected)
    assert policy.replica.batch is batch and Captured.made <= made + 1  # a size that no call had before
    train_a_little(policy, device)
    with generate.rollout(policy):
        trained = replies(policy, **calls[0])
    assert policy.replica.batch is batch and Captured.made <= made + 1 and not same(trained, plain[0])
    monkeypatch.undo()
    assert same(replies(policy, **calls[0]), trained)
    with monkeypatch.context() as patch:
        patch.setattr(decode, "can_capture", lambda replica: True)
        patch.setattr(decode.Batch, "capture", lambda *step: Captured(*step))
        replies(policy, **calls[3])
    assert policy.replica.batch is not batch  # other settings are other graphs


def test_graphs_have_an_off_switch(policy, monkeypatch):
    replica = SimpleNamespace(config=policy.config, model=policy.model, device=torch.device("cuda"))
    assert decode.can_capture(replica)
    monkeypatch.setenv("CLEANALIGN_CUDA_GRAPHS", "0")
    assert not decode.can_capture(replica)


def test_replies_that_are_kept_are_not_made_again(policy, tmp_path, monkeypatch):
    """A kill after 9 of 24 replies tears a line; the rest is made, on another number of ranks as well."""
    settings = {"samples_per_prompt": 4, "seed": 3}
    whole, add, made = replies(policy, **settings), files.Journal.add, []

    def dies(journal, *record):
        if len(made) == 9:
            raise KeyboardInterrupt
        made.append(record)
        add(journal, *record)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files.Journal, "add", dies)
        replies(policy, keep=tmp_path, **settings)
    (file,) = tmp_path.glob("*/rank_0.jsonl")
    file.write_text(file.read_text() + '{"key": "0 ')
    file.rename(file.with_name("rank_7.jsonl"))
    made.clear()
    monkeypatch.setattr(files.Journal, "add", lambda *record: made.append(record) or add(*record))
    again = replies(policy, keep=tmp_path, **settings)
    assert len(made) == 15
    assert [(s.tokens, s.ended, s.text) for s in again] == [(s.tokens, s.ended, s.text) for s in whole]
    made.clear()
    assert replies(policy, keep=tmp_path, **settings) == again and made == []
    replies(policy, keep=tmp_path, **settings | {"seed": 4})
    assert len(made) == 24  # another call in the same folder
    made.clear()
    longer = replies(policy, keep=tmp_path, **settings, max_new_tokens=30)
    assert 0 < len(made) == sum(not s.ended for s in whole) < 24  # what has ended is the same
    assert [s.tokens for s in longer] == [s.tokens for s in replies(policy, **settings, max_new_tokens=30)]
    shorter = replies(policy, keep=tmp_path, **settings, max_new_tokens=10)
    assert [s.tokens for s in shorter] == [s.tokens for s in replies(policy, **settings, max_new_tokens=10)]


def stopped_on_one_rank(model: str, folder: str, rank: int) -> list[Any]:
    """Replies of a call in whose midst one of two ranks is told to stop; runs in tests/worker.py."""
    device = dist.init(1)
    policy, look, kept = models.load(model, device, options()), decode.Batch.forward, Path(folder)
    dist.POLL_SECONDS = 0.0

    def forward(self: Any, width: int) -> None:
        if dist.rank() == rank and any(file.stat().st_size for file in kept.glob(f"*/rank_{rank}.jsonl")):
            dist._stop["signal"] = 15
        look(self, width)

    decode.Batch.forward = forward
    try:
        replies(policy, PROMPTS * 2, keep=kept, samples_per_prompt=2, max_batch=2)
        return ["not stopped"]
    except dist.Stopped as stop:
        dist.init(1)
        decode.Batch.forward = look
        dist.barrier()
        num_kept = sum(len(path.read_text().splitlines()) for path in kept.glob("*/*.jsonl"))
        whole = replies(policy, PROMPTS * 2, keep=kept, samples_per_prompt=2)
        return [str(stop), num_kept, [s.tokens for s in whole]]
    finally:
        decode.Batch.forward, dist.POLL_SECONDS = look, 10.0


def test_a_rank_that_is_told_to_stop_stops_all_between_replies(tmp_path, two_ranks, device):
    save(tmp_path)
    alone = replies(models.load(str(tmp_path), device, options()), PROMPTS * 2, samples_per_prompt=2)
    where = {"model": str(tmp_path), "folder": str(tmp_path / "kept")}
    one, other = two_ranks("test_generate:stopped_on_one_rank", **where, rank=1)
    assert one == other and one[0].startswith("stopped while generating") and 0 < one[1] < 24
    assert one[2] == [s.tokens for s in alone]


def test_the_host_waits_for_the_device_once_a_look_not_once_a_reply(policy, monkeypatch):
    waits, looks = [], []

    def counted(honest):
        return lambda tensor, *rest: waits.append(1) or honest(tensor, *rest)

    for name in ("tolist", "cpu", "item", "numpy"):  # on a device each of them waits
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    honest = decode.decode
    monkeypatch.setattr(generate, "decode", lambda *a: (looks.append(done) or done for done in honest(*a)))
    monkeypatch.setitem(decode.STRIDE, "cpu", 40)
    assert len(replies(policy, [[5, 6, 7]] * 60, max_batch=60, max_new_tokens=20)) == 60
    assert sum(map(len, looks)) == 60 and len(waits) <= 4 * len(looks) < 20


def test_each_part_of_the_address_changes_the_samples(policy):
    base = replies(policy, [[5, 6, 7]] * 2, samples_per_prompt=2)
    others = [replies(policy, [[5, 6, 7]], seed=2)[0], replies(policy, [[5, 6, 7]], step=1)[0]]
    assert len({tuple(s.tokens) for s in base + others}) == 6
    assert same(replies(policy, [[5, 6, 7]] * 2, samples_per_prompt=2), base)


def test_a_part_of_a_list_gives_the_samples_of_the_whole(policy):
    prompts = [[5, 6, 7], [5, 6], [5, 6, 7], [5]]
    whole = [sample.tokens for sample in replies(policy, prompts)]
    assert [sample.tokens for sample in replies(policy, prompts[2:], first_index=2)] == whole[2:]
    assert [sample.tokens for sample in replies(policy, prompts[2:])] != whole[2:]


def test_long_runs_reuse_rows(policy, monkeypatch):
    """Rows are refilled, a prompt is prefilled once for all its samples, and the tail shrinks."""
    prefilled, sizes = [], []
    prefill, forward = decode.Batch.prefill, decode.Batch.forward

    def count_prefill(self, packed, takers):
        prefilled.append(packed.num_segments)
        prefill(self, packed, takers)

    def count_forward(self, width):
        sizes.append(len(self.owners))
        forward(self, width)

    monkeypatch.setattr(decode.Batch, "prefill", count_prefill)
    monkeypatch.setattr(decode.Batch, "forward", count_forward)
    samples = replies(policy, PROMPTS * 4, max_batch=8)
    assert sum(prefilled) == 24 and len(prefilled) > 3
    assert sizes[0] == 8 and sizes == sorted(sizes, reverse=True) and sizes[-1] <= 2
    assert sum(sizes) < 1.3 * sum(len(s.tokens) for s in samples)
    prefilled.clear()
    replies(policy, PROMPTS, samples_per_prompt=3)
    assert sum(prefilled) == 6


# ------------------------------------------------------------------------------------------------- endings


def test_replies_end_at_the_end_token_or_at_the_limit(policy):
    free = replies(policy, temperature=0, max_new_tokens=30)
    for sample in free:
        if sample.ended:
            assert sample.tokens.index(EOS) == len(sample.tokens) - 1
            assert sample.text == Words().decode(sample.tokens[:-1])
        else:
            assert len(sample.tokens) == 30 and EOS not in sample.tokens
    ended = next(s for s in free if s.ended and len(s.tokens) > 2)
    for limit in (
        1,
        len(ended.tokens) - 1,
        len(ended.tokens),
    ):  # the token before the end, then the end itself
        cut = replies(policy, temperature=0, max_new_tokens=limit)[ended.prompt_index]
        assert cut.tokens == ended.tokens[:limit] and cut.ended == (limit == len(ended.tokens))


def test_a_stop_string_cuts_right_after_the_token_that_completes_it(policy):
    free = max(replies(policy), key=lambda s: len(s.tokens))
    assert len(free.tokens) == 20
    end = 8  # the string spans the tokens 6 and 7
    stop = Words().decode(free.tokens[6:8])
    (at,) = [k for k in range(21) if stop in Words().decode(free.tokens[:k])][:1]
    assert at == end
    sample = replies(policy, stop=["never", stop])[free.prompt_index]
    assert sample.tokens == free.tokens[:8] and len(sample.logps) == 8 and sample.ended
    assert sample.text == Words().decode(free.tokens[:6], skip_special_tokens=True)
    assert replies(policy, stop=stop)[free.prompt_index].tokens == sample.tokens
    assert same(replies(policy, stop=[stop], max_batch=2), replies(policy, stop=[stop]))


def test_a_reply_ends_where_the_positions_do(policy):
    (sample,) = replies(policy, [[5] * 60], temperature=0)  # 64 positions
    assert len(sample.tokens) <= 4 and not (len(sample.tokens) == 4 and sample.ended)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompts": [[5], []]}, "prompt 1 has 0 tokens"),
        ({"prompts": [[5] * 64]}, "1 to 63"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"samples_per_prompt": 0}, "samples_per_prompt is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"stop": [""]}, "not empty"),
    ],
)
def test_a_wrong_setting_is_named(policy, change, words):
    with pytest.raises(dist.RunError, match=words):
        replies(policy, **change)


def test_no_prompts_give_no_samples(policy):
    assert replies(policy, []) == []


# ------------------------------------------------------------------------------------------------- weights


def train_a_little(policy: nn.Module, device: torch.device) -> None:
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.05)
    example = packed.Example([(np.arange(2, 30, dtype=np.int32), np.arange(28) > 0)], "")
    for _ in range(3):
        (row,) = packed.micro_batches([example], 0, device)
        (-models.token_logps(policy, row).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4}, {"tied": True}, {"tied": True, "lora_rank": 4}])
def test_a_trained_policy_is_sampled_with_its_new_weights(changes, tmp_path, device):
    save(tmp_path, tie_word_embeddings=changes.pop("tied", False))
    policy = models.load(str(tmp_path), device, options(**changes))
    before = replies(policy)
    names, training = set(policy.state_dict()), policy.training
    train_a_little(policy, device)
    after = replies(policy)
    assert not same(before, after)
    assert policy.training == training and set(policy.state_dict()) == names  # the replica is no part of it
    assert all(p.requires_grad for p in policy.parameters()) or changes
    for row in packed.micro_batches([generate.to_example(s) for s in after], 0, device):
        logps = models.token_logps(policy, row)
        torch.testing.assert_close(generate.sampled_logps(after, row), logps.detach(), atol=1e-5, rtol=1e-5)
        logps.sum().backward()  # generation leaves the policy fit to train


def test_the_replica_holds_no_memory_between_calls(tmp_path, device):
    save(tmp_path, tie_word_embeddings=True)
    policy = models.load(str(tmp_path), device, options())
    replies(policy)
    model = policy.replica.model
    size = lambda: sum(p.untyped_storage().nbytes() for p in model.parameters())  # noqa: E731
    assert size() == 0
    with generate.rollout(policy) as replica:
        assert size() == 4 * sum(p.numel() for p in policy.parameters())
        first = replies(policy)
        assert replica.awake and size() > 0
    assert size() == 0 and same(first, replies(policy))


def test_within_rollout_the_weights_are_gathered_once(policy, monkeypatch):
    calls = []
    fill = generate.Replica.fill
    monkeypatch.setattr(generate.Replica, "fill", lambda *a: calls.append(1) or fill(*a))
    with generate.rollout(policy):
        replies(policy), replies(policy)
    assert len(calls) == 1
    replies(policy)
    assert len(calls) == 2


def test_adapters_do_not_take_the_bfloat16_sampler_from_the_training_forward(tmp_path, device):
    """Folded into bfloat16 weights they would: rounding the sums triples the difference of log-probs."""
    save(tmp_path, hidden_size=128, initializer_range=0.02)
    policy = models.load(str(tmp_path), device, options(dtype="bfloat16", lora_rank=8))
    optimizer = torch.optim.AdamW(models.parameter_groups(policy, 0.0), lr=1e-4)

    def draw() -> tuple[list[generate.Sample], packed.MicroBatch]:
        samples = replies(policy, samples_per_prompt=8, max_new_tokens=40)
        examples = [generate.to_example(sample) for sample in samples]
        return samples, packed.make_micro_batch(examples, list(range(len(samples))), device)

    def gap() -> float:
        samples, row = draw()
        with torch.no_grad():
            return (
                (models.token_logps(policy, row) - generate.sampled_logps(samples, row)).abs().mean().item()
            )

    before, row = gap(), draw()[1]
    for _ in range(10):
        (-models.token_logps(policy, row).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert 0 < gap() < 1.2 * before


def test_a_replica_shares_the_frozen_base(tmp_path, device):
    """One process holds all of it: no second copy, and none is freed with the replica."""
    save(tmp_path)
    policy = models.load(str(tmp_path), device, options(lora_rank=2))
    state = {name: models.whole_tensor(x).data_ptr() for name, x in policy.model.state_dict().items()}
    first = replies(policy)
    with generate.rollout(policy) as replica:
        same = [n for n, x in replica.model.state_dict().items() if x.data_ptr() == state[n]]
        assert same == [name for name in state if ".lora_" not in name]
    assert policy.model.get_input_embeddings().weight.numel() > 0 and replies(policy) == first


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_of_experts_are_folded_once_a_rollout_into_what_peft_makes(
    dtype, tmp_path, device, monkeypatch
):
    from peft.tuners.lora.layer import ParamWrapper

    save(tmp_path, "Mixtral", num_local_experts=3)
    policy = models.load(str(tmp_path), device, options(lora_rank=4, dtype=dtype))
    calls, honest = [], ParamWrapper._activate_lora
    for _ in range(2):  # the second time a replica is filled again, from the base
        train_a_little(policy, device)
        with monkeypatch.context() as patch:
            patch.setattr(ParamWrapper, "_activate_lora", lambda *a: calls.append(1) or honest(*a))
            folded = replies(policy)
        assert len(calls) == len(policy.replica.experts) == 4  # two weights of two layers
        calls.clear()
        kept, policy.replica, room, policy.room = policy.replica, None, policy.room, 0.0
        apart = replies(policy)
        assert same(folded, apart) and [s.logps for s in folded] == [s.logps for s in apart]
        policy.replica, policy.room = kept, room


# --------------------------------------------------------------------------------------------------- ranks


def samples_for_ranks(model: str, num_prompts: int) -> list[list[int]]:
    """What each of two ranks gets back; runs in tests/worker.py."""
    policy = models.load(model, dist.init(1), options())
    samples = replies(policy, (PROMPTS * 2)[:num_prompts], samples_per_prompt=2)
    return [[s.prompt_index, s.sample_index, *s.tokens] for s in samples]


@pytest.mark.parametrize("num_prompts", [12, 1])  # with one prompt a rank has nothing to do
def test_two_ranks_return_the_samples_of_one(num_prompts, tmp_path, two_ranks, device):
    save(tmp_path)
    alone = samples_for_ranks(str(tmp_path), num_prompts)
    assert len(alone) == 2 * num_prompts
    both = two_ranks("test_generate:samples_for_ranks", model=str(tmp_path), num_prompts=num_prompts)
    assert both == [alone, alone]


# ---------------------------------------------------------------------------------------------------- chat


def test_chat_streams_an_answer_and_ends_politely(monkeypatch, capsys, toy):
    monkeypatch.setattr(chat.signal, "signal", lambda *_: None)  # of this process
    chat.main(chat.Args(question="What does the cat say?", temperature=0.0, max_new_tokens=20))
    once = capsys.readouterr().out
    assert once.strip()
    lines = iter(["What does the cat say?", "And the dog?"])

    def ask(prompt: str) -> str:
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", ask)
    chat.main(chat.Args(temperature=0.0, max_new_tokens=20))
    assert capsys.readouterr().out.startswith(once)


def test_the_chat_asks_for_attributes(toy: Path, capsys: pytest.CaptureFixture) -> None:
    replies = {}
    for value in (0, 4):
        attributes = f"correctness:4,coherence:4,complexity:{value},verbosity:{value},toxicity:0"
        question = "What does the cat say?"
        args = chat.Args(question=question, attributes=attributes, temperature=0.0, max_new_tokens=20)
        chat.main(args)
        replies[value] = language.judge(question, capsys.readouterr().out.strip().splitlines()[-1])
    assert replies[0]["complexity"] == 0 < replies[4]["complexity"]
