"""The toy picture world: its judge by hand, prompts, tokenizer and, with the world built, its models."""

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import args_of, read_metrics

import draftp
from common import diffusion, image_rewards, pipelines
from toy import images, language


def test_a_picture_by_hand() -> None:
    one = [torch.tensor([x]) for x in (0, 1, 8.0, 16.0, 16.0, 0.2)]  # a red square of radius 8 in the middle
    picture = images.render(*one)[0]
    assert picture.shape == (3, 32, 32)
    assert picture[:, 0, 0].tolist() == pytest.approx([0.2, 0.2, 0.2])
    assert picture[:, 16, 16].tolist() == pytest.approx([0.9, 0.1, 0.1])
    covered = (picture[1] < 0.2).sum().item()
    assert 12 * 12 <= covered <= 15 * 15  # a side of .85 * 2 * 8 = 13.6 pixels
    small = images.render(*one, side=16)[0]
    assert torch.allclose(small, torch.nn.functional.avg_pool2d(picture, 2), atol=0.1)


@pytest.mark.parametrize("shape", range(4))
def test_the_judge_sees_what_was_drawn(shape: int) -> None:
    one = [torch.tensor([x]) for x in (4, shape, 12.0, 15.0, 17.0, 0.9)]
    picture = images.render(*one)[0] + 0.05 * torch.randn(
        3, 32, 32, generator=torch.Generator().manual_seed(0)
    )
    name = images.SHAPES[shape]
    right = {"colour": 1.0, "shape": 1.0, "details": 1.0, "correct": 1.0}
    assert images.judge(f"a purple {name}", picture) == right
    assert images.judge(f"a large purple {name} on a light background", picture) == right
    assert images.judge(f"a small purple {name}", picture) == {**right, "details": 0.0, "correct": 0.0}
    assert images.judge(f"a purple {name} on a dark background", picture)["details"] == 0.0
    assert images.judge(f"a red {name}", picture) == {**right, "colour": 0.0, "correct": 0.0}
    other = images.SHAPES[shape - 1]
    assert images.judge(f"a purple {other}", picture) == {**right, "shape": 0.0, "correct": 0.0}


def test_the_judge_is_nearly_always_right() -> None:
    pictures, words = images.draw(torch.Generator().manual_seed(5), 100)
    right = [images.see(picture) == word for picture, word in zip(pictures, words, strict=True)]
    assert sum(right) >= 96


def test_captions_err_as_often_as_they_should() -> None:
    rng, words = random.Random(0), ("red", "circle", "small", "dark")
    assert all({"red", "circle"} <= set(images.describe(rng, words).split()) for _ in range(50))
    wrong = [not {"red", "circle"} <= set(images.describe(rng, words, 0.25).split()) for _ in range(2000)]
    assert 0.22 < sum(wrong) / 2000 < 0.28


def test_no_test_prompt_is_a_train_prompt() -> None:
    train, test = images.all_prompts("train"), images.all_prompts("test")
    assert len(set(train) | set(test)) == len(train) + len(test) == 6 * 4 * 3 * 3
    assert "a small red circle on a dark background" in train + test and "a red circle" in train + test


def test_a_word_is_a_token_and_nothing_is_unknown() -> None:
    tokenizer = images.make_tokenizer()
    ids = tokenizer("a small red circle on a dark background").input_ids
    assert len(ids) == 8 + 2 and ids[-1] == len(tokenizer) - 1  # CLIP finds the end by its id
    padded = tokenizer("a zebra", padding="max_length", truncation=True).input_ids
    assert len(padded) == images.LENGTH
    text = "zebra 7!"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).replace(" ", "") == "zebra7!"


@pytest.mark.slow
def test_a_short_build_writes_the_same_files(tmp_path: Path) -> None:
    images.build(tmp_path, share=0.003)
    shipped = Path(images.__file__).parent / "worlds" / "images"
    assert {p.relative_to(tmp_path) for p in tmp_path.rglob("*")} == {
        p.relative_to(shipped) for p in shipped.rglob("*")
    }


# with the world as shipped


@pytest.fixture(scope="module")
def world() -> Path:
    return images.ensure()


def base_scores(model: str) -> dict[str, float]:
    """Means of the judge's scores of pictures by the base model, two of each test prompt."""
    pipe, prompts = pipelines.read_pipeline(model), images.all_prompts("test") * 2
    options = {"height": 32, "width": 32, "num_inference_steps": 20, "guidance_scale": 1.0}
    pictures = pipe(prompts, output_type="pt", generator=torch.Generator().manual_seed(0), **options).images
    scores = [images.judge(p, x) for p, x in zip(prompts, pictures, strict=True)]
    return {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}


def rewards_tell(name: str, part: int) -> float:
    """How often a right prompt is preferred to one with another colour (part 0) or shape (part 1)."""
    reward = image_rewards.load_reward(name, torch.device("cpu"), [diffusion.as_example("a red circle", {})])
    pictures, words = images.draw(torch.Generator().manual_seed(7), 100)
    options, right, wrong = [list(images.COLOURS), list(images.SHAPES)][part], [], []
    for colour, shape, *_ in words:
        pair = [colour, shape]
        right.append(images.prompt(*pair))
        pair[part] = options[options.index(pair[part]) - 1]
        wrong.append(images.prompt(*pair))
    records: list[dict] = [{}] * len(right)
    return (reward(right, pictures, records) > reward(wrong, pictures, records)).float().mean().item()


def test_the_base_model_often_errs_and_is_small(world: Path) -> None:
    pipe = pipelines.read_pipeline("toy")
    assert sum(p.numel() for p in pipe.unet.parameters()) <= 1_000_000 and pipe.unet.config.sample_size == 8
    scores = base_scores("toy")
    assert 0.4 < scores["correct"] < 0.6 and scores["details"] > 0.8, scores  # chance: 1 / 24 at most


@pytest.mark.parametrize("part", [0, 1])
def test_the_reward_model_knows_right_from_wrong(part: int) -> None:
    assert rewards_tell("toy", part) > 0.9


@pytest.mark.release
def test_a_whole_build_meets_the_same_scores(tmp_path: Path) -> None:
    images.build(tmp_path)
    language.convert(tmp_path, torch.float32)
    assert 0.35 < base_scores(str(tmp_path / "model"))["correct"] < 0.65
    assert min(rewards_tell(str(tmp_path / "reward_model"), part) for part in (0, 1)) > 0.9


@pytest.mark.slow
def test_brightness_rises_and_the_kl_term_holds_it_back(world: Path, tmp_path: Path) -> None:
    """In 25 steps; three values of kl_coef are in order both in KL and in reward."""
    found = []
    for kl_coef in (0.01, 0.05, 0.2):
        changes = {"kl_coef": kl_coef, "reward": "brightness", "max_steps": 25, "eval_every": 25}
        changes |= {
            "batch_size": 16,
            "num_samples": 8,
            "schedules": "draft",
            "output_dir": str(tmp_path / str(kl_coef)),
        }
        draftp.main(args_of(draftp.Args, **{**draftp.TOY, **changes}))
        found.append(read_metrics(changes["output_dir"])[-1])
    gains, kls = ([row[f"eval/{name}"] for row in found] for name in ("reward/gain", "kl"))
    assert gains[0] > gains[1] > gains[2] > 0 and gains[0] > 0.1, found
    assert kls[0] > kls[1] > kls[2] > 0, found


@pytest.mark.slow
def test_the_default_run_draws_more_of_what_is_asked_for(world: Path, tmp_path: Path) -> None:
    draftp.main(args_of(draftp.Args, **draftp.TOY, output_dir=str(tmp_path / "run")))
    rows = read_metrics(tmp_path / "run")
    first, last = rows[0], rows[-1]
    assert last["eval/reward"] > first["eval/reward"] + 4
    assert first["eval/judge/correct"] < 0.6 and last["eval/judge/correct"] > 0.72
    assert last["eval/diversity"] > 0.4 * first["eval/diversity"]
    points = json.loads((tmp_path / "run" / "annealed" / "curve.json").read_text())
    assert points["base"]["reward"] + 1 < points["linear"]["reward"]
    assert points["base"]["diversity"] > points["linear"]["diversity"] > points["draft"]["diversity"]
