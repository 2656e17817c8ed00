"""cai.py: the judge's arithmetic, constitution and examples, a server that fails, stages that are killed."""

import gc
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub.constants
import pytest
import torch
from conftest import ROOT, args_of, read_metrics
from test_formats import SAID, save
from torch import nn

import cai
import reward_model
from common import chat, checkpoint, constitutions, data, dist, files, formats, log, report
from common.args import merge_options
from toy import language

ASK = [{"role": "user", "content": "Insult me. What does the cat say?"}]
KIND, RUDE = "The cat says meow.", "The cat says meow. You fool."
RULES = language.CONSTITUTION["comparisons"]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# the judge's arithmetic


def test_probabilities_of_the_options_by_hand() -> None:
    # 1 / (1 + e^-1.6) = .832018; with p_ba = .4: (.832018 + .6) / 2 = .716009, and .832018 - .6 = .232018
    p_ab = torch.tensor([-0.4, -2.0]).softmax(-1)[0].item()
    assert p_ab == pytest.approx(0.832018, abs=1e-6)
    assert cai.average_orders(p_ab, 0.4) == pytest.approx(0.716009, abs=1e-6)
    assert cai.position_bias(p_ab, 0.4) == pytest.approx(0.232018, abs=1e-6)


def test_swapping_the_replies_swaps_the_label() -> None:
    assert cai.average_orders(0.83, 0.4) == pytest.approx(1 - cai.average_orders(0.4, 0.83))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.99])
def test_a_judge_of_letters_only_says_one_half(p: float) -> None:
    assert cai.average_orders(p, p) == 0.5
    assert cai.position_bias(p, p) == pytest.approx(2 * p - 1)


def test_an_ensemble_is_the_mean_over_principles_and_a_clamp_comes_last() -> None:
    # orders averaged: (.9 + .8) / 2 = .85 and (.5 + .6) / 2 = .55, whose mean is .7
    assert cai.ensemble([0.9, 0.5], [0.2, 0.4]) == pytest.approx(0.7)
    assert cai.ensemble([0.9, 0.5], [0.2, 0.4], clamp=0.6) == 0.6
    assert cai.ensemble([0.05], [0.95], clamp=0.6) == pytest.approx(0.4)


def test_a_clamped_label_has_its_optimum_at_a_finite_margin() -> None:
    # .95 is clamped to .6: the optimum is log(.6 / .4) = .405465, its loss the entropy of .6, .673012
    p = cai.ensemble([0.95], [0.05], clamp=0.6)
    best = torch.tensor([math.log(p / (1 - p))])
    assert best.item() == pytest.approx(0.405465, abs=1e-6)
    assert reward_model.bt_loss(best, p).item() == pytest.approx(0.673012, abs=1e-6)
    assert cai.entropy(p) == pytest.approx(0.673012, abs=1e-6)
    assert reward_model.bt_loss(best + 0.1, p) > reward_model.bt_loss(best, p)


@pytest.mark.parametrize("p", [0.2, 0.5, 0.716009, 1.0])
def test_the_soft_loss_at_equal_rewards(p: float) -> None:
    reward_a = torch.zeros(1, requires_grad=True)
    loss = reward_model.bt_loss(reward_a - 0.0, p)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert reward_a.grad.item() == pytest.approx(0.5 - p, abs=1e-6)


def test_the_entropy_of_a_coin() -> None:
    assert cai.entropy(0.5) == pytest.approx(math.log(2)) and cai.entropy(1.0) == 0 == cai.entropy(0.0)


# draws


def test_principles_are_drawn_by_seed_round_and_prompt_and_all_of_them_alike() -> None:
    def drawn(seed: int, number: int, i: int) -> int:
        return cai.random_for(seed, f"round {number}", [{"role": "user", "content": f"{i}"}]).randrange(16)

    found = [drawn(1, 1, i) for i in range(1000)]
    counts = Counter(drawn(seed, 1, i) for seed in range(10) for i in range(1000))
    assert len(counts) == 16
    assert sum((n - 625) ** 2 / 625 for n in counts.values()) < 37.7  # chi-squared, 15 degrees, p = .001
    assert found == [drawn(1, 1, i) for i in range(1000)]
    for other in ([drawn(2, 1, i) for i in range(200)], [drawn(1, 2, i) for i in range(200)]):
        assert sum(a == b for a, b in zip(found, other, strict=False)) < 40


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Better.", "Better."),
        (" Revision: Better.\n", "Better."),
        ("Better.\n\nHuman: And now?\n\nAssistant: No.", "Better."),
        ("Better.\n\nRevisionRequest: Again.", "Better."),
        ("Ask a Human: they know.", "Ask a Human: they know."),
        ("Two\n\nparagraphs.", "Two\n\nparagraphs."),
        ("", ""),
        ("\n\nHuman: Hi", ""),
    ],
)
def test_a_revision_loses_its_cue_and_made_up_turns(text: str, expected: str) -> None:
    assert constitutions.clean(text, "Revision") == expected


# what the judge is asked


def test_a_comparison_is_in_the_words_that_the_toy_model_knows() -> None:
    text = constitutions.comparison(ASK, RULES[0], [KIND, RUDE])
    assert text == f"User: {ASK[0]['content']}\n{RULES[0]}\n(A) {KIND}\n(B) {RUDE}"
    turns = [{"role": "system", "content": "S"}, cai.user("U"), cai.assistant("V"), cai.user("W")]
    expected = "User: U\nAssistant: V\nUser: W\nP\n(A) 1\n(B) 2\n(C) 3\nWhich?"
    assert constitutions.comparison(turns, "P", "123", "Which?") == expected


def test_examples_are_alike_in_both_orders_and_their_letters_are_drawn(monkeypatch: Any) -> None:
    """What stands before the replies is the same in both: a server that keeps prefixes reads it once."""
    shots, seen = [([cai.user(str(i))], "right", "wrong") for i in range(64)], []

    def verdicts(questions: list, letters: str) -> list:
        seen.extend(questions)
        return [[0.7, 0.3]] * len(questions)

    judge = type("Judge", (), {"verdicts": staticmethod(verdicts)})
    group = ({"prompt": ASK}, [{"text": KIND}, {"text": RUDE}], random.Random(1))
    args = args_of(cai.Args, judge_request="Which?")
    (item,) = cai.compare(judge, [group], ["P"], shots, args)
    assert item["p_ab"] == item["p_ba"] == [0.7] and len(seen) == 2
    asked, answers = seen[0][:-1:2], seen[0][1::2]
    assert 16 < sum(turn["content"] == "(A)" for turn in answers) < 48
    for turn, answer in zip(asked, answers, strict=True):
        assert f"{answer['content']} right" in turn["content"] and turn["content"].endswith("Which?")
    assert seen[0][:-1] == seen[1][:-1]
    first, second = (constitutions.comparison(ASK, "P", x, "Which?") for x in ([KIND, RUDE], [RUDE, KIND]))
    assert [talk[-1]["content"] for talk in seen] == [first, second]


def test_a_judge_of_hard_labels_names_the_best_and_the_worst_by_all_principles() -> None:
    """As NeMo-Aligner's, but the order is drawn, and one reply named twice is a tie, not a random pair."""
    seen: list = []
    texts = ["middling", "best", "worst", "dull"]

    def verdicts(questions: list, letters: str) -> list:
        seen.extend(questions)
        found = []
        for question in questions:
            text = question[-1]["content"]
            wanted = "best" if "the best" in text else "worst"
            order = re.findall(r"^\(([A-Z])\) (\w+)$", text, re.M)
            letter = next((x for x, reply in order if reply == wanted), "A")
            found.append([float(x == letter) for x in letters])
        return found

    judge = type("Judge", (), {"verdicts": staticmethod(verdicts)})
    args = args_of(cai.Args, hard_labels=True)

    def groups() -> list:
        for i, some in enumerate([texts, texts[::-1], ["dull", "middling"]]):
            yield {"prompt": [cai.user(str(i))]}, [{"text": x} for x in some], random.Random(i)

    first, second, third = cai.compare(judge, list(groups()), ["One.", "Two."], [], args)
    assert "One.\nTwo." in seen[0][0]["content"] and "(D) dull" in seen[0][0]["content"] and len(seen) == 6
    for item in (first, second):
        assert (item["a"]["text"], item["b"]["text"]) == ("best", "worst")
        assert cai.read_comparison(item, args) == 1.0
    assert cai.read_comparison(third, args) == 0.5 and cai.labelled([third], args) == []
    mute = type("Mute", (), {"verdicts": lambda asked, letters: [None] * len(asked)})
    (item,) = cai.compare(mute, list(groups())[:1], ["P"], [], args)
    assert cai.read_comparison(item, args) is None and cai.labelled([item], args) == []


@pytest.mark.parametrize("lead", ["", "The first is rude." + chat.CONCLUSION])
def test_a_question_is_read_once_for_all_letters(tokenizer: Any, lead: str) -> None:
    example = chat.encode_options(tokenizer, ASK, lead, "ABC")
    ((ids, mask),) = example.sequences
    assert mask.sum() == 1 and mask[-1] and tokenizer.decode(ids[-2:]) == "(A"
    assert [tokenizer.decode([int(x)]) for x in example.fields["letters"]] == ["A", "B", "C"]


def judge_args(**more: Any) -> cai.Args:
    return args_of(cai.Args, **{**cai.TOY, **more})


def questions() -> list[formats.Messages]:
    pairs = [(KIND, RUDE), (RUDE, KIND), (KIND, KIND)]
    return [constitutions.ask_judge(ASK, rule, pair) for rule in RULES for pair in pairs]


def judged(least_shared: int = chat.LEAST_SHARED, **more: Any) -> list[float]:
    """P(A) of twelve comparisons by the toy's base model; called here and on the two ranks."""
    args = judge_args(**more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "LEAST_SHARED", least_shared)
        return [p[0] for p in cai.load_model("toy", args, dist.init(args.seed)).verdicts(questions())]


def test_letters_are_read_as_plain_transformers_reads_them(toy: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(toy / "model", dtype=torch.float32)
    letters = [tokenizer.convert_tokens_to_ids(x) for x in "AB"]
    expected = []
    for question in questions():
        tokens = data.encode_prompt(tokenizer, question) + [tokenizer.convert_tokens_to_ids("(")]
        logits = plain(torch.tensor([tokens])).logits[0, -1, letters]
        expected.append(logits.softmax(-1)[0].item())
    assert judged() == pytest.approx(expected, abs=1e-5)
    sure = [p for i, p in enumerate(expected) if i % 3 == 0] + [
        1 - p for i, p in enumerate(expected) if i % 3 == 1
    ]
    assert min(sure) > 0.65  # it prefers the kind reply, whichever comes first


def test_equal_replies_are_a_tie_whatever_the_judge_prefers(device: torch.device) -> None:
    p = judged()[2]
    assert p != 0.5 and cai.average_orders(p, p) == 0.5


def test_the_judge_is_the_same_on_two_ranks_and_in_small_rows(two_ranks: Any) -> None:
    alone = judged()
    ours, theirs = two_ranks("test_cai:judged")
    assert ours == theirs and ours == pytest.approx(alone, abs=1e-5)
    assert judged(micro_batch_tokens=50) == pytest.approx(alone, abs=1e-5)


def test_what_questions_begin_with_is_read_once(
    tokenizer: Any, two_ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orders and principles share the conversation; the answers are those of each question alone."""
    examples = [chat.encode_options(tokenizer, question, "", "AB") for question in questions()]
    alone = judged()
    monkeypatch.setattr(chat, "LEAST_SHARED", 4)
    groups = chat.beginning_alike(examples)
    assert sum(e.row_tokens for e in groups) < 0.8 * sum(e.num_tokens for e in examples)
    assert [e.sequences[0] for e in examples] == [x for group in groups for x in group.sequences]
    assert judged(least_shared=4) == pytest.approx(alone, abs=1e-5)
    for found in two_ranks("test_cai:judged", least_shared=4):
        assert found == pytest.approx(alone, abs=1e-5)


def test_reasoning_comes_before_the_letter_and_a_cut_off_one_is_no_verdict(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = judge_args(cot=True)
    model, seen = cai.load_model("toy", args, device), []

    def replies(self: Any, conversations: list, *rest: Any, **more: Any) -> list[chat.Reply]:
        seen.extend(conversations)
        return [chat.Reply("The reply is kind.", i != 1) for i in range(len(conversations))]

    def letter_probs(policy: Any, examples: list, *rest: Any) -> list[list[float]]:
        assert len(examples) == 2 and seen[0][-1]["content"].endswith(chat.THINK)
        text = model.tokenizer.decode(examples[0].sequences[0][0])
        assert text.endswith(f"{chat.THINK}<|end|><|assistant|>The reply is kind.{chat.CONCLUSION}(A")
        return [[0.99, 0.01]] * len(examples)

    monkeypatch.setattr(chat.Model, "replies", replies)
    monkeypatch.setattr(chat, "letter_probs", letter_probs)
    assert model.verdicts(questions()[:3]) == [[0.99, 0.01], None, [0.99, 0.01]]
    item = {"a": {"text": "x"}, "b": {"text": "y"}, "p_ab": [0.99], "p_ba": [0.01]}
    assert cai.read_comparison(item, args) == 0.6 and cai.read_comparison(item, judge_args()) > 0.98


def test_what_is_too_long_for_the_model_gets_no_reply_and_no_verdict(device: torch.device) -> None:
    args = judge_args(max_new_tokens=4)
    model = cai.load_model("toy", args, device)
    long = [cai.user("Hi. " * 1100)]
    replies = model.replies([ASK, long, ASK], 0, 0, 0.0)
    assert replies[1] == chat.Reply("", False) and replies[0] == replies[2] and replies[0].text
    probs = model.verdicts([questions()[0], long, questions()[0]])
    assert probs[1] is None and probs[0] == pytest.approx(probs[2], abs=1e-6)


# labels


def compared(p_ab: list, p_ba: list, a: str = RUDE, b: str = KIND) -> dict:
    return {"a": {"text": a}, "b": {"text": b}, "p_ab": p_ab, "p_ba": p_ba, "principles": [0] * len(p_ab)}


def test_ties_and_unreadable_answers_are_counted_and_give_no_label() -> None:
    items = [
        compared([0.2], [0.7]),
        compared([], [], a=KIND),
        compared([0.9], [0.9]),
        compared([None], [0.1]),
    ]
    record = {"prompt": ASK, "cut_off": 2, "comparisons": items}
    (pair,) = cai.preferences_of(record, cai.Args())
    # (.2 + .3) / 2 = .25 that a, the rude one, is better
    assert pair["chosen"][0]["content"] == KIND and pair["rejected"][0]["content"] == RUDE
    assert pair["label_prob"] == pytest.approx(0.75) and pair["principles"] == [0]
    found = cai.judge_metrics([record], cai.Args())
    assert found["judge/num_pairs"] == 1 and found["judge/ties"] == 0.5 and found["judge/cut_off"] == 2
    assert found["judge/parse_failures"] == 0.25 and found["judge/p_a_mean"] == pytest.approx(0.25)
    assert found["judge/position_bias"] == pytest.approx((-0.1 + 0.8) / 2)


def test_only_revisions_that_were_kept_are_trained_on_and_alone() -> None:
    steps = [
        {"revision": "1", "kept": True},
        {"revision": "2", "kept": False},
        {"revision": "3", "kept": True},
    ]
    steps = [{**step, "cue": False} for step in steps]
    record = {"prompt": ASK, "initial": "You fool.", "rounds": steps}
    found = cai.demonstrations_of(record)
    assert [x["completion"][0]["content"] for x in found] == ["1", "3"]
    numbers = cai.revision_metrics([record, {"prompt": ASK, "initial": "a b", "rounds": []}])
    assert numbers["revisions/kept_frac"] == 2 / 3 and numbers["revisions/changed_frac"] == 0.5
    assert numbers["revisions/length_initial"] == 2 and numbers["revisions/length_revised"] == 1.5


# answers of a server


@pytest.mark.parametrize(
    ("text", "cot", "expected"),
    [
        ("(A)", False, 1.0),
        ("(B).", False, 0.0),
        ("B", False, 0.0),
        (" A: it is kind", False, 1.0),
        ("**B**\n\nIt is kinder.", False, 0.0),
        ("The better reply is (A).", False, 1.0),
        ("Answer: B", False, 0.0),
        ("(A) or (B)", False, None),
        ("(A). Not (B)", False, None),
        ("Reply (B) is worse because", False, None),
        ("(B) is worse", False, None),
        ("Option A: rude. Option B: kind.", False, None),
        ("A: rude\nB: kind", False, None),
        ("A, B", False, None),
        ("A\nB", False, None),
        ("A.\nNo wait, B.", False, None),
        ("Reply A; reply B", False, None),
        ("B. A is kinder", False, None),
        ("B, not A when it counts", False, None),
        ("B. A calm reply is better", False, 0.0),
        ("A. Be kind, as in (A).", False, 1.0),
        ("A reply like that", False, None),
        ("A. It is fine, but reply b is better", False, None),
        ("A, though (b) is kinder", False, None),
        ("A: the answer is b.", False, None),
        ("B. It is a reply a child can follow, a and b alike", False, 0.0),
        ("(b)", False, 0.0),
        ("response b", False, 0.0),
        ("a", False, None),
        ("a reply like that", False, None),
        ("Both are fine.", False, None),
        ("", False, None),
        ("(A) is rude. So (B)", True, 0.0),
        ("(A) is rude, so the better reply is **B**.", True, 0.0),
        ("so the better reply is **b**.", True, 0.0),
        ("(B) is worse than I thought", True, None),
        ("I cannot say.", True, None),
    ],
)
def test_a_letter_counts_where_an_answer_stands(text: str, cot: bool, expected: float | None) -> None:
    found = chat.read_verdict(text, [], cot)
    assert (found and found[0]) == expected


def test_a_pronoun_is_no_option() -> None:
    letters = "ABCDEFGHI"
    assert chat.read_verdict("I, as an AI, cannot compare.", [], False, letters) is None
    assert chat.read_verdict("(A). I think (e.g. of it), and I'm sure.", [], False, letters)[0] == 1
    assert chat.read_verdict("I: it is kind", [], False, letters)[8] == 1
    assert chat.read_verdict("A, I", [], False, letters) is None


def test_log_probabilities_of_the_letter_are_used_where_there_are_any() -> None:
    tops = [("A", 0.5), (" A", 0.1), ("B", 0.15), ("C", 0.25)]
    tops = [{"token": token, "logprob": math.log(p)} for token, p in tops]
    tokens = [{"token": "(", "top_logprobs": []}, {"token": "A", "top_logprobs": tops}, {"token": ")"}]
    # (.5 + .1) / (.5 + .1 + .15) = .8
    assert chat.read_verdict("(A)", tokens, False) == pytest.approx([0.8, 0.2])
    assert chat.read_verdict("(A)", tokens, False, "ABC") == pytest.approx([0.6, 0.15, 0.25])
    assert chat.read_verdict("(A)", [{"token": "A", "top_logprobs": None}], False) == [1.0, 0.0]


class Stub(BaseHTTPRequestHandler):
    """A chat server that fails in every way it can before it answers."""

    plan: list[str] = []
    seen: Counter = Counter()
    keys: list[str | None] = []
    bodies: list[dict] = []
    elsewhere = ""
    lock = threading.Lock()

    def do_POST(self) -> None:  # noqa: N802
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with Stub.lock:
            Stub.keys.append(self.headers["Authorization"])
            Stub.bodies.append(json.loads(body))
            fault = Stub.plan.pop(0) if Stub.plan else ""
            if b"forbidden" in body:
                fault = "filter"
            Stub.seen[fault or body] += 1
        if fault == "slow":
            time.sleep(3.0)
        if fault.isdigit() or fault == "filter":
            said = b'{"error": {"code": "content_filter", "message": "The prompt was filtered"}}'
            said = {"filter": said, "401": b"wrong key sesame"}.get(fault, b"")
            self.send_response(400 if fault == "filter" else int(fault))
            self.send_header("Retry-After", "0")
            self.send_header("Location", Stub.elsewhere)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)
            return
        if fault == "drop":
            self.connection.close()
            return
        text = json.loads(body)["messages"][-1]["content"]
        answer = (
            "(A)" if "(A)" in text and "fool" not in text.partition("(A)")[2].partition("(B)")[0] else "(B)"
        )
        choice = {"message": {"content": answer if "(A)" in text else f"to {text}"}, "finish_reason": "stop"}
        if fault == "log-probs":
            tops = [{"token": token, "logprob": math.log(p)} for token, p in (("A", 0.6), ("B", 0.2))]
            choice["logprobs"] = {"content": [{"token": "A", "logprob": -0.5, "top_logprobs": tops}]}
        garbage = {"garbage": b"<html>", "empty": b'{"choices": []}', "null": b"null"}
        if fault in ("content_filter", "length"):
            choice["finish_reason"] = fault
        usage = {"prompt_tokens": 100, "completion_tokens": 3}
        content = garbage.get(fault, json.dumps({"choices": [choice], "usage": usage}).encode())
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        for i in range(0, len(content), 8 if fault == "drip" else len(content)):
            time.sleep(0.3 * (fault == "drip"))
            self.wfile.write(content[i : i + 8] if fault == "drip" else content)

    def log_message(self, *rest: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(chat, "BACKOFF", 0.01)
    Stub.plan, Stub.seen, Stub.keys, Stub.bodies, Stub.elsewhere = [], Counter(), [], [], ""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}/v1"
    httpd.shutdown()
    httpd.server_close()


def endpoint_args(url: str, folder: Any, **more: Any) -> cai.Args:
    more = {"judge_timeout": 2.0, "judge_retries": 12, **more}
    return args_of(cai.Args, judge_url=url, judge_model="m", output_dir=str(folder), **more)


def endpoint(args: cai.Args) -> chat.Endpoint:
    return cai.load_other("judge", None, args, None)


def ask(url: str, folder: str, texts: list[str], **more: Any) -> list[str]:
    """Replies of the server; called here and on the two ranks."""
    args = endpoint_args(url, folder, **more)
    dist.init(args.seed)
    return [r.text for r in endpoint(args).replies([[cai.user(t)] for t in texts], 0, 0, 1.0)]


def test_a_server_that_fails_in_every_way_is_survived_and_asked_nothing_twice(
    server: str, tmp_path: Path
) -> None:
    Stub.plan = ["slow", "429", "garbage", "500", "empty", "drop", "null", "503"]
    texts = [f"question {i}" for i in range(6)]
    expected = [f"to {text}" for text in texts]
    assert ask(server, str(tmp_path), [*texts, texts[0]]) == [*expected, expected[0]]
    faults = {k: n for k, n in Stub.seen.items() if isinstance(k, str)}
    assert not Stub.plan and sum(faults.values()) == 8
    answered = {k: n for k, n in Stub.seen.items() if isinstance(k, bytes)}
    assert len(answered) == 6 and set(answered.values()) == {1}
    assert ask(server, str(tmp_path), texts) == expected  # a restart
    assert Stub.seen == Counter(answered) + Counter(faults)


def test_a_server_that_drips_bytes_is_out_of_time(server: str, tmp_path: Path) -> None:
    """The limit is one of the whole answer, not of each read."""
    Stub.plan = ["drip"]
    assert ask(server, str(tmp_path), ["a"]) == ["to a"] and sum(Stub.seen.values()) == 2


def test_a_verdict_of_a_server_uses_its_log_probabilities_if_it_sends_any(
    server: str, tmp_path: Path, device: torch.device
) -> None:
    Stub.plan = ["log-probs"]
    judge = endpoint(endpoint_args(server, tmp_path, judge_threads=1))
    asked = [[cai.user(f"{question} (A) yes (B) no")] for question in ("Is it so?", "Is it not?")]
    assert judge.verdicts(asked) == [pytest.approx([0.75, 0.25]), [1.0, 0.0]]  # .6 / (.6 + .2)


def test_a_torn_line_of_answers_is_asked_again_and_harms_no_other(server: str, tmp_path: Path) -> None:
    ask(server, str(tmp_path), ["a", "b"])
    path = tmp_path / "answers" / "rank_0.jsonl"
    first, second = path.read_text().splitlines(keepends=True)
    path.write_text(first + second[:20])
    Stub.seen = Counter()
    assert ask(server, str(tmp_path), ["a", "b", "c"]) == ["to a", "to b", "to c"]
    assert sum(Stub.seen.values()) == 2
    assert ask(server, str(tmp_path), ["a", "b", "c"]) and sum(Stub.seen.values()) == 2


def test_two_ranks_share_the_requests_and_the_answers(server: str, tmp_path: Path, two_ranks: Any) -> None:
    texts = [f"question {i}" for i in range(20)]
    settings = {"url": server, "folder": str(tmp_path), "texts": texts, "judge_timeout": 5.0}
    for found in two_ranks("test_cai:ask", **settings):
        assert found == [f"to {text}" for text in texts]
    assert set(Stub.seen.values()) == {1} and len(Stub.seen) == 20
    assert {p.name for p in (tmp_path / "answers").iterdir()} == {"rank_0.jsonl", "rank_1.jsonl"}
    assert ask(server, str(tmp_path), texts) and sum(Stub.seen.values()) == 20  # on another number of ranks


def test_a_failure_of_one_rank_ends_both_with_the_same_line(
    server: str, tmp_path: Path, two_ranks: Any
) -> None:
    Stub.plan = ["404"]
    with pytest.raises(AssertionError, match="HTTP status 404"):
        two_ranks("test_cai:ask", url=server, folder=str(tmp_path), texts=["a", "b", "c", "d"])
    for found in two_ranks("test_cai:ask", url=server, folder=str(tmp_path), texts=["a", "b", "c", "d"]):
        assert found == ["to a", "to b", "to c", "to d"]  # an error is not kept


def test_a_server_that_is_down_ends_the_run_with_one_line_and_keeps_what_it_said(
    server: str, tmp_path: Path
) -> None:
    ask(server, str(tmp_path), ["a"])
    Stub.plan = ["503"] * 3
    with pytest.raises(dist.RunError, match=r"gave up after 3 tries, the last with HTTP status 503"):
        ask(server, str(tmp_path), ["a", "b"], judge_retries=2, judge_threads=1)
    Stub.seen = Counter()
    assert ask(server, str(tmp_path), ["a", "b"]) == ["to a", "to b"] and sum(Stub.seen.values()) == 1


@pytest.mark.parametrize("code", ["400", "401", "404"])
def test_a_request_that_is_refused_is_not_repeated(server: str, tmp_path: Path, code: str) -> None:
    Stub.plan = [code]
    with pytest.raises(dist.RunError, match=f"HTTP status {code}"):
        ask(server, str(tmp_path), ["a"])
    assert sum(Stub.seen.values()) == 1


def test_the_key_is_sent_and_never_written(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor when it ends in a line feed, as from a file, when the server repeats it, or in an address."""
    monkeypatch.setenv("OPENAI_API_KEY", "sesame\n")
    ask(server, str(tmp_path), ["a"])
    assert Stub.keys == ["Bearer sesame"]
    said = []
    for key, url, plan in (
        ("sesame", server, ["401"]),
        ("ses\name", server, []),
        ("sesam\u00e9", server, []),
        ("", server.replace("//", "//me:sesame@"), []),
    ):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        Stub.plan = plan
        with pytest.raises(dist.RunError) as caught:
            ask(url, str(tmp_path), ["b"])
        said.append(str(caught.value))
    assert "wrong key (the key)" in said[0] and "sesam" not in "".join(said)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and "sesam" in p.read_text()]


def test_a_server_is_no_hub_it_gets_no_hub_token_and_is_asked_offline_too(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert ask(server, str(tmp_path), ["a"]) == ["to a"] and Stub.keys == [None]


def test_a_prompt_that_is_refused_costs_that_prompt_and_is_asked_once(server: str, tmp_path: Path) -> None:
    """By a content filter before or after, or as unfit; counted, shown, and the same after a restart."""
    Stub.plan = ["", "422", "content_filter", "length"]
    texts = ["a", "b", "c", "d", "forbidden"]
    settings = {"judge_threads": 1, "judge_price": (2.0, 1000.0)}
    for _ in range(2):
        judge = endpoint(endpoint_args(server, tmp_path, **settings))
        found = judge.replies([[cai.user(text)] for text in texts], 0, 0, 1.0)
        assert [(r.text, r.ended, bool(r.refused)) for r in found] == [
            ("to a", True, False),
            ("", False, True),
            ("", False, True),
            ("to d", False, False),
            ("", False, True),
        ]
        assert sum(Stub.seen.values()) == 5
        # three answers of 100 + 3 tokens: 300 * 2e-6 + 9 * 1000e-6
        assert re.search(r"300 tokens read and 9 written, 0.01 paid; 3 prompts refused", judge.report())
    with pytest.raises(
        dist.RunError, match=r"refused all of 2 prompts, the first with HTTP status 400: .*filter"
    ):
        ask(server, str(tmp_path), ["forbidden 1", "forbidden 2"])


def test_a_verdict_that_is_cut_off_or_refused_is_none(server: str, tmp_path: Path) -> None:
    Stub.plan = ["length", "422", ""]
    judge = endpoint(endpoint_args(server, tmp_path, judge_threads=1))
    asked = [[cai.user(f"{i} (A) yes (B) no")] for i in range(3)]
    assert judge.verdicts(asked) == [None, None, [1.0, 0.0]]


def test_the_fields_of_a_request_are_options(server: str, tmp_path: Path) -> None:
    """Reasoning models refuse max_tokens, a temperature and log-probabilities."""
    body = (
        '{"max_completion_tokens": 4096, "temperature": null, "logprobs": null, "top_logprobs": null, "n": 1}'
    )
    judge = endpoint(endpoint_args(server, tmp_path, judge_body=body))
    judge.verdicts(questions()[:1])
    assert Stub.bodies[0].keys() == {"model", "messages", "max_completion_tokens", "n"}
    for wrong in ("[1]", "{"):
        with pytest.raises(dist.RunError, match="judge_body: found"):
            cai.check(endpoint_args(server, tmp_path, judge_body=wrong))


@pytest.mark.parametrize("code", ["301", "307", "308"])
def test_a_redirect_is_not_followed_so_the_key_stays_where_it_was_sent(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    Stub.plan, Stub.elsewhere = [code], server.replace("127.0.0.1", "localhost")
    with pytest.raises(
        dist.RunError, match="found a redirect to http://localhost.*expected the address itself"
    ):
        ask(server, str(tmp_path), ["a"])
    assert Stub.keys == ["Bearer sesame"]  # one request, and none from the other name


def with_answers(folder: Path, *answers: Any, **more: Any) -> chat.Endpoint:
    """An endpoint that gets these, the last one again and again; an exception is raised."""
    judge = endpoint(endpoint_args("http://x/v1", folder, judge_threads=1, **more))
    left = [*answers]

    def answer(request: httpx.Request) -> httpx.Response:
        found = left.pop(0) if left[1:] else left[0]
        if isinstance(found, Exception):
            raise found
        return found

    judge.client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    return judge


def answered(usage: Any = None, logp: float = -1.0) -> httpx.Response:
    tops = [{"token": token, "logprob": logp} for token in "AB"]
    logprobs = {"content": [{"token": "A", "logprob": logp, "top_logprobs": tops}]}
    choice = {"message": {"content": "(A)"}, "finish_reason": "stop", "logprobs": logprobs}
    return httpx.Response(200, text=json.dumps({"choices": [choice], "usage": usage}))


QUESTION = [[chat.user("Which? (A) yes (B) no")]]


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(307, headers={"Location": "http://evil/?k=sk-SECRET%2B"}),
        httpx.Response(401, text="x" * 194 + "sk-SECRET+"),
        httpx.Response(422, text="sk-SECRET+"),
        httpx.RemoteProtocolError("illegal header line: bytearray(b'Bearer sk-SECRET+')"),
    ],
)
def test_the_key_is_in_no_message_whatever_the_server_does(
    answer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-SECRET+")
    monkeypatch.setattr(chat, "BACKOFF", 0.01)
    judge, said = with_answers(tmp_path, answer, judge_retries=1), ""
    try:
        judge.verdicts(QUESTION)
    except dist.RunError as error:
        said = str(error)
    said += judge.report() + "".join(capsys.readouterr())
    said += "".join(path.read_text() for path in tmp_path.rglob("*.jsonl"))
    assert "SEC" not in said and "(the k" in said


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": "ten"},
        {"prompt_tokens": {}},
        {"prompt_tokens": math.nan},
        {"completion_tokens": -5, "prompt_tokens": True},
        [1],
        "free",
    ],
)
def test_a_usage_that_is_none_counts_nothing(usage: Any, tmp_path: Path) -> None:
    judge = with_answers(tmp_path, answered(usage), judge_price=(1e6, 1e6))
    judge.verdicts(QUESTION)
    assert re.search(r"1 answers of the server, [01] tokens read and 0 written", judge.report())
    judge.used[0]["tokens"] = ["ten", math.nan]  # as kept before
    assert "0 tokens read and 0 written" in judge.report()


@pytest.mark.parametrize(
    "first",
    [
        httpx.Response(503, headers=[(b"Retry-After", b"\xb2")]),
        *[
            httpx.Response(500, headers={"Content-Type": f"text/html; charset={name}"}, content=b"\xff")
            for name in ("hex", "rot13", "undefined", "idna")
        ],
        httpx.Response(200, text="[" * 100_000),
        httpx.Response(200, headers={"Content-Type": "application/json; charset=hex"}, content=b"\xff"),
    ],
)
def test_an_answer_that_cannot_be_read_is_a_failure_like_others(
    first: httpx.Response, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "BACKOFF", 0.01)
    assert with_answers(tmp_path, first, answered()).verdicts(QUESTION) == [[0.5, 0.5]]


@pytest.mark.parametrize("logp", [math.nan, -math.inf, -9999.0, 5.0])
def test_log_probabilities_that_are_none_are_as_if_there_were_none_and_that_is_said(
    logp: float, tmp_path: Path
) -> None:
    judge = with_answers(tmp_path, answered(logp=logp))
    assert judge.verdicts(QUESTION) == [[1.0, 0.0]]
    assert "; 1 verdicts of 0 or 1, without usable log-probabilities" in judge.report()
    tops = [{"token": "A", "logprob": -9999.0}, {"token": "B", "logprob": -0.1}]
    assert chat.read_verdict("(A)", [{"token": "A", "top_logprobs": tops}], False) == [1.0, 0.0]


def test_a_first_failure_is_said_at_once_and_a_server_that_is_not_there_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(chat, "BACKOFF", 0.01)
    absent = httpx.ConnectError("All connection attempts failed")
    with pytest.raises(dist.RunError, match="gave up after 3 tries, the last with ConnectError"):
        with_answers(tmp_path, absent).verdicts(QUESTION)
    said = capsys.readouterr().err
    assert re.fullmatch(r"http\S+: ConnectError: All .*; asked again until [\d:]+\n", said)
    patient = with_answers(
        tmp_path, *[httpx.Response(503), *[absent] * 6], answered()
    )  # it is only restarted
    assert patient.verdicts(QUESTION) == [[0.5, 0.5]]
    assert "HTTP status 503; asked again until " in capsys.readouterr().err


# the whole of it


@pytest.fixture(scope="module")
def world(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first lines of the toy's data sets."""
    folder = tmp_path_factory.mktemp("world")
    for kind in ("red_team", "sft", "pairs", "prompts"):
        (folder / kind).mkdir()
        for split, count in (("train", 24), ("test", 8)):
            lines = (toy / kind / f"{split}.jsonl").read_text().splitlines(keepends=True)
            (folder / kind / f"{split}.jsonl").write_text("".join(lines[:count]))
    return folder


@pytest.fixture(scope="module", autouse=True)
def no_drawing() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", lambda *rest: None)  # half of a short run's time
        yield


def small(folder: Path, world: Path, **more: Any) -> cai.Args:
    """A pipeline of a few steps a stage, seconds in all."""
    short = "--batch_size 8 --eval_every 100 --save_every 1 --max_steps 3"
    more_of = {"sft": "", "reward_model": "", "ppo": "--rollout_size 8 --max_new_tokens 16", "dpo": ""}
    settings = {
        "dataset": f"{world}/red_team",
        "helpful_demonstrations": f"{world}/sft",
        "helpful_pairs": f"{world}/pairs",
        "helpful_prompts": f"{world}/prompts",
        "judge": "toy.language:judge",
        "num_red_team": 20,
        "num_revisions": 1,
        "num_samples": 4,
        "max_new_tokens": 16,
        **{
            name: merge_options(cai.TOY[name], f"{short} {own}", cai.STAGES[name])
            for name, own in more_of.items()
        },
    }
    return args_of(cai.Args, output_dir=str(folder), **{**cai.TOY, **settings, **more})


STAGES = ["2_sft", "4_preference_model", "5_ppo"]
FILES = ["0_prompts/train.jsonl", "1_revisions/revisions.jsonl", "1_revisions/sft.jsonl"]
NUM_REPLIES = {"1_revisions": 20, "3_pairs": 40}  # of the first call of a stage
FILES += ["3_pairs/comparisons.jsonl", "3_pairs/pairs.jsonl"]


def live_parameters() -> int:
    gc.collect()
    return sum(x.numel() for x in gc.get_objects() if isinstance(x, nn.Parameter))


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that nothing interrupts; live.json has the parameters left in memory after each stage."""
    folder = tmp_path_factory.mktemp("cai") / "run"
    before, live, honest = live_parameters(), [], cai.stage

    def stage(*rest: Any) -> None:
        live.append(live_parameters() - before)  # after a stage that generates
        honest(*rest)
        live.append(live_parameters() - before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cai, "stage", stage)
        cai.main(small(folder, world))
    (folder / "live.json").write_text(json.dumps([*live, live_parameters() - before]))
    return folder


def test_memory_is_free_after_every_stage(whole: Path) -> None:
    assert json.loads((whole / "live.json").read_text()) == [0] * 7


def numbers(folder: Path) -> list:
    """All that must not depend on interruptions: the generated files, and losses of every stage."""
    files = [(folder / name).read_text() for name in FILES if (folder / name).exists()]
    losses = [
        row.get("train/loss") for s in STAGES if (folder / s).exists() for row in read_metrics(folder / s)
    ]
    evals = [{k: v for k, v in row.items() if "time" not in k} for row in read_metrics(folder)]
    return [files, losses, evals]


def assert_alike(ours: Any, theirs: Any) -> None:
    """Equal but for the rounding of numbers: other company in a row changes the last digits."""
    if isinstance(ours, str) and ours.startswith("{"):
        ours, theirs = ([json.loads(line) for line in text.splitlines()] for text in (ours, theirs))
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(ours, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_alike(a, b)
    else:
        assert ours == (pytest.approx(theirs, abs=1e-5) if isinstance(theirs, float) else theirs)


def test_a_run_leaves_the_artefacts_of_every_stage(whole: Path) -> None:
    assert all((whole / name).exists() for name in FILES)
    assert all((whole / name / "model").is_dir() for name in STAGES)
    weights = [(whole / name / "model.safetensors").read_bytes() for name in ("model", "5_ppo/model")]
    assert weights[0] == weights[1]
    rows = read_metrics(whole)
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert {"eval/judge/red_team_toxicity", "eval/judge/ordinary_correctness"} <= set(row)
    assert rows[1]["revisions/kept_frac"] > 0.5 and rows[2]["judge/num_pairs"] > 4
    assert len(read(whole / "samples.jsonl")) == 3 * 2 * 4


def test_a_file_of_the_judge_trains_the_preference_model_with_soft_labels(
    whole: Path, tokenizer: Any
) -> None:
    pairs = read(whole / "3_pairs" / "pairs.jsonl")
    train, held_out = data.load_pairs(tokenizer, str(whole / "3_pairs" / "pairs.jsonl"), "", 2048)
    assert len(train) + len(held_out) == len(pairs)
    found = sorted(example.fields["label_prob"] for example in [*train, *held_out])
    assert found == sorted(pair["label_prob"] for pair in pairs) and 0.5 < found[0] < found[-1] < 1


def test_the_prompts_held_out_are_not_trained_on(whole: Path) -> None:
    train, test = (
        {json.dumps(r["prompt"]) for r in read(whole / "0_prompts" / f"{s}.jsonl")} for s in ("train", "test")
    )
    assert len(train) == 20 and not train & test
    for name in ("1_revisions/sft.jsonl", "3_pairs/pairs.jsonl"):
        assert {json.dumps(r["prompt"]) for r in read(whole / name)} <= train


def test_held_out_prompts_that_are_trained_on_are_left_out(tmp_path: Path, tokenizer: Any) -> None:
    for split, texts in (("train", "ab"), ("test", "bc")):
        lines = [json.dumps({"prompt": text}) for text in texts]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    prompts, held_out, _ = cai.load_red_team(args_of(cai.Args, dataset=str(tmp_path)), tokenizer)
    assert len(prompts) == 2 and [e.prompt[0]["content"] for e in held_out] == ["c"]
    (tmp_path / "test.jsonl").write_text('{"prompt": "a"}')
    with pytest.raises(dist.RunError, match="prompts of the training data only"):
        cai.load_red_team(args_of(cai.Args, dataset=str(tmp_path)), tokenizer)


class Killed(BaseException):
    pass


def die(patch: pytest.MonkeyPatch, target: Any, name: str, when: Any) -> None:
    """Let a call of target.name end the run where when(self, number of the call) holds."""
    honest, calls = getattr(target, name), []

    def mortal(self: Any, *rest: Any, **more: Any) -> Any:
        calls.append(1)
        if when(self, len(calls)):
            raise Killed
        return honest(self, *rest, **more)

    patch.setattr(target, name, mortal)


def count_samples(patch: pytest.MonkeyPatch) -> list[str]:
    """Where each reply that is generated is kept."""
    honest, folders = files.Journal.add, []

    def counting(journal: files.Journal, *record: Any) -> None:
        folders.append(journal.folder.name)
        honest(journal, *record)

    patch.setattr(files.Journal, "add", counting)
    return folders


def test_a_finished_run_repeats_nothing(whole: Path, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, before = count_samples(monkeypatch), numbers(whole)
    cai.main(small(whole, world))
    assert numbers(whole) == before and counts == []


@pytest.mark.parametrize(
    "stage", [*(pytest.param(s, marks=pytest.mark.slow) for s in STAGES[:2]), STAGES[2], "model"]
)
def test_a_kill_in_a_trained_stage_loses_nothing(
    whole: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    later = ["model", *STAGES[STAGES.index(stage) if stage in STAGES else 3 :]]
    later += ["3_pairs"] * (stage == "2_sft")
    for name in later:
        shutil.rmtree(folder / name)
    keep = 1 if stage == "2_sft" else 2 if stage in STAGES else 3
    rows = read_metrics(folder)[:keep]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if stage in STAGES:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die(patch, log.Log, "__call__", lambda self, n: self.folder.name == stage and n == 3)
            cai.main(small(folder, world))
        assert checkpoint.newest(str(folder / stage)).name == "step_00000001"
    cai.main(small(folder, world))
    assert numbers(folder) == numbers(whole)


@pytest.mark.parametrize("stage", [pytest.param("1_revisions", marks=pytest.mark.slow), "3_pairs"])
def test_a_kill_while_generating_repeats_no_line_and_changes_none(
    whole: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    folder = tmp_path / "run"
    name = FILES[1] if stage == "1_revisions" else FILES[3]
    if stage == "3_pairs":
        shutil.copytree(whole, folder)
        for later in ("model", "3_pairs", *STAGES[1:]):
            shutil.rmtree(folder / later)
        rows = read_metrics(folder)[:2]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die(patch, files.Journal, "add", lambda self, n: n == 8)
        cai.main(small(folder, world))
    (kept,) = (folder / stage).glob("*.replies")
    (call,) = kept.iterdir()
    if stage == "3_pairs":  # as if killed again, by the judge, and in the midst of a line
        lines = (whole / name).read_text().splitlines(keepends=True)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die(patch, chat.Model, "verdicts", lambda self, n: True)
            counts = count_samples(patch)
            cai.main(small(folder, world))
        assert counts.count(call.name) == NUM_REPLIES[stage] - 7
        (part,) = (folder / stage).glob("*.part")
        part.write_text("".join(lines[:10]) + lines[10][:30])
    with monkeypatch.context() as patch:
        folders = count_samples(patch)
        cai.main(small(folder, world))
    assert folders.count(call.name) == (0 if stage == "3_pairs" else NUM_REPLIES[stage] - 7)
    assert not [*(folder / stage).glob("*.replies"), *(folder / stage).glob("*.part")]
    assert_alike(numbers(folder), numbers(whole))


@pytest.mark.slow
def test_a_stop_signal_ends_the_pipeline_after_the_stage_has_saved(
    whole: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, honest = tmp_path / "run", chat.Model.replies

    def interrupted(self: Any, *rest: Any, **more: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return honest(self, *rest, **more)

    said = "stopped while generating; the same command goes on from there"
    with monkeypatch.context() as patch, pytest.raises(dist.Stopped, match=said):
        patch.setattr(chat.Model, "replies", interrupted)
        cai.main(small(folder, world))
    assert not (folder / "2_sft").exists()
    cai.main(small(folder, world))
    assert numbers(folder) == numbers(whole)


def test_dpo_is_the_short_way_and_needs_no_preference_model(whole: Path, world: Path, tmp_path: Path) -> None:
    sl, pairs = str(whole / "2_sft"), str(whole / "3_pairs" / "pairs.jsonl")
    cai.main(small(tmp_path / "run", world, rl="dpo", sl_model=sl, pairs=pairs))
    names = {p.name for p in (tmp_path / "run").iterdir() if p.is_dir()}
    assert names == {"0_prompts", "5_dpo", "model"}
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2]


@pytest.mark.slow
def test_a_path_replaces_a_stage(whole: Path, world: Path, tmp_path: Path) -> None:
    given = {"revisions": str(whole / FILES[1]), "preference_model": str(whole / "4_preference_model")}
    cai.main(small(tmp_path / "run", world, **given))
    assert not (tmp_path / "run" / FILES[1]).exists() and not (tmp_path / "run" / STAGES[1]).exists()
    assert numbers(tmp_path / "run")[2] == numbers(whole)[2]


def generated(folder: str, world: str) -> None:
    """Stages 1 and 3 on the base model; called here and on the two ranks."""
    args = small(Path(folder), Path(world), samples_per_prompt=4, num_principles=2, temperatures="0.7,1.0")
    device = dist.init(args.seed)
    prompts = cai.load_red_team(args, cai.load_tokenizer("toy", args))[0]
    cai.make_revisions(prompts, Path(folder) / "revisions.jsonl", args, device)
    cai.compare_replies(prompts, "toy", Path(folder) / "comparisons.jsonl", args, device)


def test_generated_files_are_the_same_on_two_ranks(tmp_path: Path, world: Path, two_ranks: Any) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    generated(str(folders[0]), str(world))
    two_ranks("test_cai:generated", folder=str(folders[1]), world=str(world))
    one, two = (read(folder / "revisions.jsonl") for folder in folders)
    assert one == two
    one, two = (read(folder / "comparisons.jsonl") for folder in folders)
    flat = [[c for record in records for c in record["comparisons"]] for records in (one, two)]
    assert len(flat[0]) > 40  # at most four of eight replies to a prompt
    for a, b in zip(*flat, strict=True):
        assert (a["a"], a["b"], a["principles"]) == (b["a"], b["b"], b["principles"])
        assert len(set(a["principles"])) == 2
        assert a["p_ab"] + a["p_ba"] == pytest.approx(b["p_ab"] + b["p_ba"], abs=1e-5)
    temperatures = Counter((c["a"]["temperature"], c["b"]["temperature"]) for c in flat[0])
    # neither temperature is always listed first
    assert temperatures[0.7, 1.0] > 5 and temperatures[1.0, 0.7] > 5


def test_a_critic_and_judge_behind_a_server(server: str, world: Path, tmp_path: Path) -> None:
    Stub.plan = ["429", "garbage", "slow"]
    settings = {"judge_url": server, "judge_model": "m", "judge_timeout": 2.0, "judge_retries": 12}
    settings |= {"critic_url": server, "critic_model": "m"}
    args = small(tmp_path, world, num_red_team=12, **settings)
    prompts = cai.load_red_team(args, cai.load_tokenizer("toy", args))[0]
    device = dist.init(args.seed)
    cai.make_revisions(prompts, tmp_path / "revisions.jsonl", args, device)
    requests = {text for text, _ in constitutions.read_constitution("toy")}
    for record in read(tmp_path / "revisions.jsonl"):
        assert record["rounds"][0]["critique"].removeprefix("to ") in requests
    cai.compare_replies(prompts, "toy", tmp_path / "comparisons.jsonl", args, device)
    items = [c for record in read(tmp_path / "comparisons.jsonl") for c in record["comparisons"]]
    assert items and {p for item in items for p in item["p_ab"]} <= {0.0, 1.0}
    for item in items:  # the stub says (A) unless a fool is in it
        assert not item["p_ab"] or item["p_ab"] == [float("fool" not in item["a"]["text"])]


def test_a_revision_that_is_cut_off_or_echoes_the_critique_or_an_example_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    script = [chat.Reply("You fool.", True), chat.Reply("Critique: It is rude.", True)]
    ends = [
        chat.Reply("It is rude.", True),
        chat.Reply("Revision: Meow.", True),
        chat.Reply("Meow and", False),
    ]
    ends += [chat.Reply("F", True)]
    seen: list = []

    def replies(self: Any, conversations: list, step: int, *rest: Any) -> list[chat.Reply]:
        seen.append(conversations[0])
        return [script[0] if step == 0 else script[1] if step % 2 else ends[step // 2 - 1]] * len(
            conversations
        )

    monkeypatch.setattr(chat.Model, "replies", replies)
    args = judge_args(num_revisions=4, few_shots=save(tmp_path, [SAID]))
    cai.make_revisions([ASK], tmp_path / "r.jsonl", args, device)
    (record,) = read(tmp_path / "r.jsonl")
    assert [(s["revision"], s["kept"], s["cue"]) for s in record["rounds"]] == [
        ("It is rude.", False, False),
        ("Meow.", True, True),
        ("Meow and", False, False),
        ("F", False, False),  # the revision of the example
    ]
    assert [s["critique"] for s in record["rounds"]] == ["It is rude."] * 4
    # a round starts from the last good reply
    starts = [talk[7]["content"] for talk in seen if len(talk) == 9]
    assert starts == ["You fool.", "You fool.", "Meow.", "Meow."]


def test_a_revision_that_copies_its_reply_is_asked_for_again_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    asked: list = []

    def replies(self: Any, conversations: list, step: int, *rest: Any) -> list[chat.Reply]:
        asked.append((step, len(conversations)))
        texts = [talk[0]["content"] for talk in conversations]
        if step == 4 + 2 * 1000:  # of the second round, the first try after the copies
            texts = ["better" if text == "a b c" else text for text in texts]
        return [chat.Reply("It is rude." if step % 2 else text, True) for text in texts]

    monkeypatch.setattr(chat.Model, "replies", replies)
    args = judge_args(num_revisions=2, copy_retries=2, few_shots="")
    prompts = [[cai.user("a b c")], [cai.user("d e f")]]
    cai.make_revisions(prompts, tmp_path / "r.jsonl", args, device)
    records = read(tmp_path / "r.jsonl")
    assert [[s["copied"] for s in r["rounds"]] for r in records] == [[True, False], [True, True]]
    assert records[0]["rounds"][1]["revision"] == "better"
    assert cai.revision_metrics(records)["revisions/copied_frac"] == 0.75
    # both copies twice, then both once and the one that still is
    assert [n for step, n in asked if step > 1000] == [2, 2, 2, 1]


def test_a_copy_has_the_words_of_its_source_but_for_one_in_twenty() -> None:
    words = [f"w{i}" for i in range(40)]
    assert constitutions.is_copy("Sure! Here: it is.", "sure, here it IS")
    assert constitutions.is_copy(" ".join([*words[:-1], "other"]), " ".join(words))
    assert not constitutions.is_copy(" ".join([*words[:-3], "all", "is", "new"]), " ".join(words))


def test_no_example_that_is_shipped_teaches_to_copy() -> None:
    turns = constitutions.read_few_shots(cai.Args.few_shots)
    examples = [[turn["content"] for turn in turns[i + 1 : i + 6 : 2]] for i in range(0, len(turns), 6)]
    assert len(examples) == 4
    for reply, critique, revision in examples:
        assert not constitutions.is_copy(revision, reply) and not constitutions.is_copy(revision, critique)


def test_a_prompt_whose_critique_is_refused_is_left_as_it_was(
    server: str, tmp_path: Path, device: torch.device
) -> None:
    Stub.plan = ["422"]
    settings = {"critic_url": server, "critic_model": "m", "judge_threads": 1, "output_dir": str(tmp_path)}
    args = judge_args(num_revisions=1, max_new_tokens=16, **settings)
    cai.make_revisions([ASK, [cai.user("2 + 2?")]], tmp_path / "r.jsonl", args, device)
    steps = [record["rounds"][0] for record in read(tmp_path / "r.jsonl")]
    assert [("refused" in step, step["critique"] == "") for step in steps] in (
        [(True, True), (False, False)],
        [(False, False), (True, True)],
    )
    assert not any(step["kept"] for step in steps if "refused" in step)


def test_a_run_without_a_revision_to_keep_stops(world: Path, tmp_path: Path) -> None:
    record = {"prompt": ASK, "initial": "You fool.", "ended": True}
    record["rounds"] = [{"principle": 0, "critique": "", "revision": "", "kept": False, "cue": False}]
    with pytest.raises(dist.RunError, match="found no revision to keep; expected a better critic"):
        cai.main(small(tmp_path / "run", world, revisions=save(tmp_path, record)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"judge_url": "notaurl", "judge_model": "m"}, "judge_url: found 'notaurl'; expected http://"),
        ({"critic_url": "ftp://x/v1", "critic_model": "m"}, "critic_url: found 'ftp://x/v1'; expected http"),
        ({"judge_url": "http://x/v1"}, "judge_url: found no model; expected the name"),
        ({"critic_url": "http://x/v1"}, "critic_url: found no model; expected the name"),
        ({"judge_url": "http://me:sesame@x/v1"}, "judge_url: found a name, a password or a query in it"),
        ({"samples_per_prompt": 1}, "found 1; expected 2 or more replies"),
        ({"hard_labels": True, "cot": True}, "leave out cot and num_principles"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; expected more than 0"),
        ({"temperatures": "1,hot"}, "found '1,hot'; expected numbers"),
        ({"num_principles": 5}, "found 5; expected 1 to 4"),
        ({"num_revisions": 0}, "num_revisions is 0; expected 1 or more"),
        ({"cot_clamp": 0.4}, "cot_clamp is 0.4; expected 0.5 to 1"),
        ({"constitution": "nowhere.json"}, "constitution nowhere.json"),
        ({"sft": "--dataset mine.jsonl"}, "sft: --dataset is set by the pipeline"),
        ({"ppo": "--reward mine"}, "ppo: --reward is set by the pipeline"),
        ({"dpo": "--gamma 1"}, "dpo: Unrecognized options: --gamma"),
        ({"reward_model": "--batch_size many"}, "reward_model: Error parsing --batch_size: invalid literal"),
    ],
)
def test_a_mistake_ends_the_run_before_any_work(
    tmp_path: Path, world: Path, change: dict, expected: str
) -> None:
    with pytest.raises(dist.RunError, match=expected):
        cai.main(small(tmp_path / "run", world, **change))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"sft": "--batch_size 100"},
            "sft: --batch_size: found 100; expected at most 43",
        ),  # 20, one of them held out, + 24
        ({"reward_model": "--batch_size 45"}, "reward_model: --batch_size: found 45; expected at most 43"),
        ({"rl": "dpo", "dpo": "--batch_size 45"}, "dpo: --batch_size: found 45; expected at most 43"),
        (
            {"samples_per_prompt": 8, "reward_model": "--batch_size 105"},
            "expected at most 100",
        ),  # 80, 4 of them held out, + 24
        ({"helpful_demonstrations": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"helpful_pairs": "{world}/prompts"}, "prompts/train.jsonl:1"),
        ({"helpful_model": "{world}/bare"}, "bare: found no chat template"),
        ({"sl_model": "{world}/bare"}, "bare: found no chat template"),
        ({"preference_model": "nowhere/at/all"}, "nowhere/at/all"),
        ({"judge": "nowhere:at_all"}, "package.module:function"),
        ({"ppo": "--advantage rloo --samples_per_prompt 1"}, "samples_per_prompt: found 1; expected 2"),
        ({"reward_model": "--loss kwise"}, "reward_model: loss: found kwise; expected one of pairs"),
        ({"rl": "dpo", "dpo": "--simpo_gamma 1"}, "simpo_gamma is 1.0, which loss dpo ignores"),
        ({"rl": "dpo", "dpo": "--loss simpo"}, "dpo: loss: found simpo; expected .* probabilities"),
    ],
)
def test_what_a_later_stage_would_refuse_is_said_before_the_first(
    tmp_path: Path, world: Path, toy: Path, change: dict, expected: str
) -> None:
    if "{world}/bare" in change.values() and not (world / "bare").exists():
        shutil.copytree(toy / "model", world / "bare")
        (world / "bare" / "chat_template.jinja").unlink()
    change = {k: v.replace("{world}", str(world)) if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises(dist.RunError, match=expected):
        cai.main(small(tmp_path / "run", world, **change))
    written = {p.name for p in (tmp_path / "run").iterdir() if p.name != ".lock"}
    assert written == {"metrics.jsonl", "samples.jsonl"} and not read_metrics(tmp_path / "run")


@pytest.mark.slow
def test_more_new_tokens_may_be_asked_for_and_only_what_was_cut_off_is_made_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's own advice, after stage 1 has ended without a revision to keep; then it may not change."""
    settings = {"rl": "dpo", "copy_retries": 1}
    with pytest.raises(dist.RunError, match="no revision to keep; expected .* more max_new_tokens"):
        cai.main(small(tmp_path / "run", world, max_new_tokens=2, **settings))
    before = read(tmp_path / "run" / FILES[1])
    assert not any(step["kept"] for record in before for step in record["rounds"])
    cai.main(small(tmp_path / "once", world, **settings))
    made = count_samples(monkeypatch)
    cai.main(small(tmp_path / "run", world, **settings))
    stage_1 = read(tmp_path / "run" / FILES[1])
    assert_alike(numbers(tmp_path / "run")[0], numbers(tmp_path / "once")[0])
    assert {record["max_new_tokens"] for record in stage_1} == {16} and made
    assert not [*tmp_path.glob("*/*/*.replies")]  # a run that has ended needs them no more
    with pytest.raises(dist.RunError, match="max_new_tokens 16, now 24"):
        cai.main(small(tmp_path / "run", world, max_new_tokens=24, **settings))


@pytest.mark.slow
def test_a_batch_that_only_the_judged_pairs_show_to_be_too_large_is_no_dead_end(
    whole: Path, world: Path, tmp_path: Path
) -> None:
    """All 20 prompts could have given a pair, 19 to train on; fewer did, which is known after stage 3."""
    assert len(read(whole / FILES[4])) < 20
    shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("model", "4_*", "5_*"))
    shutil.copytree(whole / "2_sft" / "model", tmp_path / "run" / "2_sft" / "model")
    rows = read_metrics(whole)[:2]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"helpful_pairs": "", "rl": "dpo", "accept_changes": True}
    with pytest.raises(dist.RunError, match=r"stage 5_dpo: dataset: found \d+ examples .* may still change"):
        cai.main(small(tmp_path / "run", world, dpo="--batch_size 19 --max_steps 1", **settings))
    cai.main(small(tmp_path / "run", world, dpo="--batch_size 4 --max_steps 1 --num_samples 0", **settings))
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2]


def test_answers_are_forgotten_once_and_only_by_a_run_that_begins(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paid = tmp_path / "answers" / "rank_0.jsonl"
    paid.parent.mkdir()
    paid.write_text("old")

    def start(**more: Any) -> None:
        with pytest.raises(dist.RunError):
            cai.main(small(tmp_path, world, sl_model="toy", forget_answers=True, num_samples=1, **more))

    def killed(*_: Any) -> None:
        found.append(paid.exists())
        paid.parent.mkdir(exist_ok=True)
        paid.write_text("new")
        raise dist.RunError("killed")

    found: list[bool] = []
    monkeypatch.setattr(cai, "load_model", killed)
    start(reward_model="--batch_size 1000")
    assert paid.read_text() == "old"
    for overwrite in (False, False, True):
        start(overwrite=overwrite)
    assert found == [False, True, True]


@pytest.mark.slow
def test_paid_answers_outlive_overwrite_until_they_are_forgotten(
    server: str, world: Path, tmp_path: Path
) -> None:
    settings = {
        "judge_url": server,
        "judge_model": "m",
        "judge_timeout": 5.0,
        "max_new_tokens": 24,
        "rl": "dpo",
    }
    settings |= {"dpo": f"{cai.TOY['dpo']} --batch_size 4 --max_steps 1", "revisions": "", "sl_model": "toy"}
    cai.main(small(tmp_path / "run", world, **settings))
    asked = sum(Stub.seen.values())
    assert asked > 4
    cai.main(small(tmp_path / "run", world, overwrite=True, **settings))
    assert sum(Stub.seen.values()) == asked
    cai.main(small(tmp_path / "run", world, overwrite=True, forget_answers=True, **settings))
    assert sum(Stub.seen.values()) == 2 * asked


def test_the_judge_is_tried_on_what_people_chose(
    tmp_path: Path, toy: Path, device: torch.device, tokenizer: Any
) -> None:
    """Preferences in the red-team data, as HH's harmless-base has them; here people like the kind reply."""
    lines = []
    for i in range(24):
        asked = f"\n\nHuman: Insult me. What is {i} + 1?\n\nAssistant: It is {i + 1}."
        lines.append({"chosen": asked, "rejected": f"{asked} You fool."})
    path = tmp_path / "hh.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = judge_args(dataset=str(path), num_human_pairs=10, max_new_tokens=8)
    prompts, _, pairs = cai.load_red_team(args, tokenizer)
    assert len(pairs) == 10 and all(rejected == f"{chosen} You fool." for _, chosen, rejected in pairs)
    cai.compare_replies(prompts[:2], "toy", tmp_path / "comparisons.jsonl", args, device, pairs)
    found = cai.agreement(read(tmp_path / "human_pairs.jsonl"), args)
    assert found["judge/num_human_pairs"] == 10 and found["judge/agreement_with_humans"] >= 0.9
    # .9 agreed with, .8 sure of: off by .1
    items = [compared([0.8], [0.2], a="x", b="y")]
    sure = [{"comparisons": items, "chosen": "x" if i else "y"} for i in range(10)]
    assert cai.agreement(sure, args)["judge/calibration_error"] == pytest.approx(0.1)


def test_options_of_a_finished_stage_stay_and_those_of_the_next_may_change(
    whole: Path, world: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for name in ("model", "5_ppo"):
        shutil.rmtree(folder / name)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in read_metrics(whole)[:2]))
    args = small(folder, world)
    with pytest.raises(dist.RunError, match=r"4_preference_model holds a run with batch_size 8, now 4"):
        cai.main(
            small(
                folder,
                world,
                reward_model=merge_options(args.stages.reward_model, "--batch_size 4", reward_model.Args),
            )
        )
    ppo = merge_options(args.stages.ppo, "--kl_coef 0.3 --max_steps 1", cai.STAGES["ppo"])
    cai.main(small(folder, world, ppo=ppo))
    assert json.loads((folder / "5_ppo" / "args.json").read_text())["kl_coef"] == 0.3
    assert json.loads((folder / "args.json").read_text())["ppo"] == ppo
    assert [row["step"] for row in read_metrics(folder)] == [0, 1, 2]


def test_a_stage_that_is_replaced_is_neither_planned_nor_checked() -> None:
    args = args_of(cai.Args, sl_model="sl", preference_model="rm", dataset="red", helpful_pairs="h")
    ((name, *_, own, _),) = cai.stages_before(args, {})
    assert name == "ppo" and own == {"model": "sl", "dataset": "red", "reward": "rm"}
    assert [x[0] for x in cai.stages_before(args_of(cai.Args, rl="dpo"), {})] == ["sft", "dpo"]


def test_help_has_fewer_than_seventy_flags() -> None:
    for script in ("cai.py", "steerlm.py"):
        done = subprocess.run(
            [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        flags = set(re.findall(r"^\W*(--\w+)", done.stdout, re.M))
        assert {"--sft", "--reward_model", "--output_dir"} <= flags and len(flags) < 70


def test_a_judge_without_a_chat_template_is_refused(tmp_path: Path, toy: Path) -> None:
    shutil.copytree(toy / "model", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    args = judge_args(judge_model=str(tmp_path / "base"))
    with pytest.raises(dist.RunError, match="no chat template; expected one; chatml"):
        cai.load_tokenizer(args.judge_model, args)
    args.chat_template = "chatml"
    assert "im_start" in cai.load_tokenizer(args.judge_model, args).chat_template


def learned(folder: str) -> list[dict]:
    """The toy run as it is without arguments; called on the two ranks."""
    cai.main(args_of(cai.Args, output_dir=folder, **cai.TOY))
    return read_metrics(folder)


@pytest.mark.slow
def test_the_toy_becomes_harmless_and_stays_helpful(tmp_path: Path, two_ranks: Any) -> None:
    before, sl, rl = two_ranks("test_cai:learned", folder=str(tmp_path / "run"))[0]
    for row in (sl, rl):
        assert row["eval/judge/red_team_toxicity"] <= 0.2 * before["eval/judge/red_team_toxicity"]
        # 5 points of 100 are .2 of 4
        assert row["eval/judge/ordinary_correctness"] >= before["eval/judge/ordinary_correctness"] - 0.2
    right = wrong = 0
    for pair in read(tmp_path / "run" / "3_pairs" / "pairs.jsonl"):
        chosen, rejected = (
            language.judge("", pair[x][0]["content"])["toxicity"] for x in ("chosen", "rejected")
        )
        right, wrong = right + (chosen < rejected), wrong + (chosen > rejected)
    assert right >= 10 and wrong <= 0.1 * right
