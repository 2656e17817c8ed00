"""draftp.py with tiny random pipelines: images, gradients, rewards, prompts, runs, exports, bad input."""

import json
import math
import tarfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tiny_diffusion
import torch
import torch.nn.functional as F
from conftest import DATA, args_of, read_metrics
from torch import Tensor

import draftp
from common import diffusion, dist, image_rewards, models, pictures, pipelines
from common.packed import Example
from recipes import rewards_images

BRIEF = {
    "reward": "brightness",
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "batch_size": 4,
    "micro_batch_size": 4,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "warmup_steps": 1,
    "lora_rank": 2,
    "lora_alpha": 6.0,
    "eval_every": 2,
    "num_samples": 2,
    "images_per_prompt": 2,
    "schedules": "base,draft",
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sd, sd_v (predicts v, from pure noise), xl, sd3, flux: pipelines; clip: a reward; prompts: data."""
    folder = tmp_path_factory.mktemp("tiny_diffusion")
    tiny_diffusion.make_pipeline(folder / "sd")
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    tiny_diffusion.make_pipeline(folder / "sd_v", prediction_type="v_prediction", **zero)
    for kind in ("xl", "sd3", "flux"):
        tiny_diffusion.make_pipeline(folder / kind, kind)
    tiny_diffusion.make_clip(folder / "clip")
    (folder / "prompts").mkdir()
    tiny_diffusion.write_prompts(folder / "prompts")
    return folder


def settings(tiny: Path, name: str = "sd", **changes: Any) -> draftp.Args:
    options = {**BRIEF, "model": str(tiny / name), "dataset": str(tiny / "prompts"), **changes}
    if name == "flux":
        options.setdefault("image_size", 16)  # its pipelines do not say
    if options["lora_rank"] == 0:
        del options["lora_alpha"]
    return args_of(draftp.Args, **options)


def prepare(args: draftp.Args, device: torch.device) -> draftp.Sampler:
    pipe, policy = pipelines.load(args.model, device, args.system, args.seed)
    return draftp.setup(args, pipe, policy, None, examples("a cat", "a dog"))


def examples(*prompts: str) -> list[Example]:
    return [diffusion.as_example(prompt, {"prompt": prompt}) for prompt in prompts]


def run(tiny: Path, folder: Path | str, name: str = "sd", **changes: Any) -> list[dict]:
    draftp.main(settings(tiny, name, output_dir=str(folder), **changes))
    return read_metrics(folder)


def move(sampler: draftp.Sampler, size: float = 0.3) -> None:
    """Change the trained weights, alike on every call."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in sampler.policy.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn_like(parameter)


def trained(unet: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in unet.named_parameters() if p.requires_grad}


@pytest.fixture(scope="session")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with LoRA that moved far, and one with all weights and their average."""
    folder = tmp_path_factory.mktemp("finished")
    run(tiny, folder / "lora", learning_rate=0.3)
    run(tiny, folder / "full", lora_rank=0, ema_decay=0.5)
    return folder


# the images are those of diffusers


def call(pipe: Any, prompts: list[str], noise: Tensor, scale: float, num_steps: int) -> Tensor:
    """Images by diffusers' own pipeline."""
    options = {"guidance_scale": scale, "num_inference_steps": num_steps, "height": 16, "width": 16}
    if pipelines.is_flux(pipe):
        noise = pipe._pack_latents(noise, *noise.shape)
    return pipe(prompts, latents=noise, output_type="pt", **options).images


KINDS = ["sd", "xl", "sd3", "flux"]


@pytest.mark.parametrize("name", [*KINDS, "sd_v"])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_images_are_those_of_the_pipeline_itself(
    tiny: Path, device: torch.device, name: str, scale: float
) -> None:
    args = settings(tiny, name, guidance_scale=scale, num_inference_steps=5)
    sampler = prepare(args, device)
    noise = diffusion.noise(1, 0, [0, 1], sampler.pipe, sampler.size, device)
    prompts = ["two cats", "a dog"]
    eps, _ = draftp.predictors(sampler, prompts, scale)
    with torch.no_grad():
        x_0, _ = draftp.denoise(eps, None, noise, sampler.schedule, 1)
        images = diffusion.decode(sampler.pipe.vae, x_0, False).clamp(0, 1)
    theirs = call(pipelines.read_pipeline(args.model), prompts, noise, scale, 5)
    torch.testing.assert_close(images, theirs, rtol=0, atol=1e-5)
    assert (images[0] - images[1]).abs().max() > 0.01


def test_a_pipeline_with_another_scheduler_is_sampled_with_ddim(tiny: Path) -> None:
    from diffusers import PNDMScheduler

    pipe = pipelines.read_pipeline(str(tiny / "sd"))
    expected = diffusion.schedule(pipe, 10, 16, torch.device("cpu"))
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    found = diffusion.schedule(pipe, 10, 16, torch.device("cpu"))
    assert found.timesteps == expected.timesteps == [901 - 100 * i for i in range(10)]
    assert torch.equal(found.signal, expected.signal)


def test_noise_has_an_address(tiny: Path, device: torch.device) -> None:
    pipe = pipelines.read_pipeline(str(tiny / "sd"))

    def noise(seed: int, step: int, indices: list[int], copy: int = 0) -> Tensor:
        return diffusion.noise(seed, step, indices, pipe, 16, device, copy)

    all_at_once = noise(1, 5, [0, 1, 2])
    assert all_at_once.shape == (3, 4, 8, 8)
    assert torch.equal(all_at_once[2:], noise(1, 5, [2]))
    others = [noise(2, 5, [2]), noise(1, 6, [2]), noise(1, 5, [1]), noise(1, 5, [2], 1)]
    assert all((all_at_once[2:] - other).abs().max() > 0.1 for other in others)


# gradients


def one_batch(sampler: draftp.Sampler, args: draftp.Args, k: int = 1) -> tuple[Tensor, dict[str, tuple]]:
    (micro_batch,) = diffusion.micro_batches(examples("a cat", "a dog"), 4, sampler.device)
    return draftp.loss_and_metrics(sampler, micro_batch, 1, k, args)


def test_the_first_gradient_reaches_every_lora_b_and_no_lora_a(tiny: Path, device: torch.device) -> None:
    args = settings(tiny)
    sampler = prepare(args, device)
    loss, metrics = one_batch(sampler, args)
    loss.backward()
    assert metrics["kl"][0].item() == 0.0 and loss.item() == -metrics["reward"][0].item()
    for name, parameter in trained(sampler.policy).items():
        assert bool(parameter.grad.any()) == ("lora_B" in name), name


def test_adapters_off_is_the_base_model_exactly(tiny: Path, device: torch.device) -> None:
    args = settings(tiny)
    sampler = prepare(args, device)
    x = diffusion.noise(1, 0, [0], sampler.pipe, sampler.size, device)
    with torch.no_grad():
        eps, eps_base = draftp.predictors(sampler, ["a cat"], 3.0)
        before = eps(x, 1)
        move(sampler)
        assert torch.equal(eps_base(x, 1), before)
        assert (eps(x, 1) - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", KINDS)
def test_the_gradient_of_a_pipeline_is_that_of_finite_differences(
    tiny: Path, device: torch.device, name: str
) -> None:
    args = settings(tiny, name, kl_coef=0.0, step_checkpointing=False)
    sampler = prepare(args, device)
    move(sampler)
    one_batch(sampler, args, k=3)[0].backward()
    weights = pipelines.trained(sampler.policy)
    direction = [torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) for p in weights]
    slope, ends, h = sum((p.grad * d).sum() for p, d in zip(weights, direction, strict=True)), [], 2e-4
    with torch.no_grad():
        for step in (h, -2 * h):
            for p, d in zip(weights, direction, strict=True):
                p += step * d
            ends.append(one_batch(sampler, args, k=3)[0])
    assert ((ends[0] - ends[1]) / (2 * h)).item() == pytest.approx(slope.item(), rel=1e-2)
    assert abs(slope) > 0.03


@pytest.mark.parametrize("name", KINDS)
def test_bfloat16_computes_nearly_the_same(tiny: Path, device: torch.device, name: str) -> None:
    found = []
    for dtype in ("float32", "bfloat16"):
        args = settings(tiny, name, dtype=dtype)
        sampler = prepare(args, device)
        move(sampler, 0.05)  # random weights moved far multiply what bfloat16 rounds
        loss, _ = one_batch(sampler, args)
        loss.backward()
        gradient = torch.cat(
            [models.whole_tensor(p.grad).flatten() for p in pipelines.trained(sampler.policy)]
        )
        assert gradient.dtype == torch.float32
        found.append((loss.item(), gradient))
        # SDXL's decoder stays in float32, as its config asks for
        assert (sampler.pipe.vae.dtype == torch.float32) == (dtype == "float32" or name == "xl")
    (loss, gradient), (rough, other) = found
    assert rough == pytest.approx(loss, abs=0.01)  # a reward less a KL
    assert F.cosine_similarity(gradient, other, dim=0) > 0.9


@pytest.mark.parametrize("name", KINDS)
def test_checkpointing_changes_no_gradient(tiny: Path, device: torch.device, name: str) -> None:
    gradients = []
    for by_step, inside in ((True, "off"), (False, "off"), (True, "on")):
        args = settings(tiny, name, step_checkpointing=by_step, activation_checkpointing=inside)
        sampler = prepare(args, device)
        move(sampler)
        one_batch(sampler, args, k=2)[0].backward()
        gradients.append({n: p.grad for n, p in trained(sampler.policy).items()})
    assert all(torch.equal(g, other[n]) for n, g in gradients[0].items() for other in gradients[1:])
    assert all(g.any() for g in gradients[0].values())


def test_a_clamped_pixel_passes_no_gradient_and_is_counted(tiny: Path, device: torch.device) -> None:
    args = settings(tiny)
    sampler = prepare(args, device)
    last = sampler.pipe.vae.decoder.conv_out
    last.weight.data *= 0.1
    for bias, share in (([9.0, 0.0, -9.0], 2 / 3), ([9.0, 9.0, -9.0], 1)):
        last.bias.data = torch.tensor(bias)
        x_0 = torch.zeros(1, 4, 8, 8, requires_grad=True)
        (batch,) = diffusion.micro_batches(examples("a cat"), 4, device)
        losses, metrics, images = draftp.losses_and_images(sampler, x_0, torch.zeros(1), batch, args)
        losses.sum().backward()
        assert metrics["saturated_pixels_frac"].item() == pytest.approx(share)
        assert images.min() >= 0 and images.max() <= 1
        assert bool(x_0.grad.any()) == (share < 1)  # through green only


def test_draft_lv_averages_over_renoised_samples(tiny: Path, device: torch.device) -> None:
    args = settings(tiny, num_lv=3)
    sampler = prepare(args, device)
    move(sampler)
    eps, eps_base = draftp.predictors(sampler, ["a cat", "a dog"], args.guidance_scale)
    schedule, losses = sampler.schedule, []
    for draw in range(3):
        noise = diffusion.noise(1, 1, [0, 1], sampler.pipe, 16, device, draw)
        if draw == 0:
            first, kl = draftp.denoise(eps, eps_base, noise, schedule, 1)
            x_0 = first
        else:
            x = schedule.signal[2] * first.detach() + schedule.noise[2] * noise
            kl = (eps(x, 2) - eps_base(x, 2).detach()).square().mean((1, 2, 3))
            x_0 = draftp.sampler_step(eps(x, 2), x, schedule, 2)
        brightness = diffusion.decode(sampler.pipe.vae, x_0, False).clamp(0, 1).mean((1, 2, 3))
        losses.append((-brightness + args.kl_coef * kl).sum())
    (sum(losses) / 3).backward()
    expected = {n: p.grad.clone() for n, p in trained(sampler.policy).items()}
    sampler.policy.zero_grad()
    loss, _ = one_batch(sampler, args)
    loss.backward()
    torch.testing.assert_close(loss, sum(losses) / 3)
    for name, parameter in trained(sampler.policy).items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)
    assert abs(losses[0].item() - losses[1].item()) > 1e-6


def test_random_k_is_drawn_anew_alike_on_every_rank(tiny: Path) -> None:
    args = settings(tiny, random_k=True, num_grad_steps=3)
    drawn = [draftp.grad_steps(step, args) for step in range(60)]
    assert set(drawn) == {1, 2, 3} and drawn == [draftp.grad_steps(step, args) for step in range(60)]
    assert draftp.grad_steps(1, settings(tiny, num_grad_steps=0)) == 3  # all steps


# rewards


def test_pixels_are_prepared_as_by_the_processor(tiny: Path) -> None:
    from PIL import Image
    from transformers import CLIPProcessor

    processor = CLIPProcessor.from_pretrained(tiny / "clip").image_processor
    coarse = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    image = torch.nn.functional.interpolate(coarse, (60, 90), mode="bilinear")
    image = (image * 255).round() / 255
    picture = Image.fromarray((image[0] * 255).byte().permute(1, 2, 0).numpy())
    theirs = processor(picture, return_tensors="pt").pixel_values
    ours = rewards_images.clip_pixels(image, processor)
    assert ours.shape == theirs.shape == (1, 3, 16, 16)
    assert (ours - theirs).abs().max() < 0.03  # PIL rounds to 1 / 255, over a deviation of .27
    plain = torch.nn.functional.interpolate(image, (24, 36), mode="bicubic")[:, :, 4:20, 10:26]
    mean, std = (torch.tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std))
    assert ((plain - mean) / std - theirs).abs().max() > (ours - theirs).abs().max()  # antialiasing matters


def test_the_clip_reward_is_the_logit_of_clip(tiny: Path, device: torch.device) -> None:
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(tiny / "clip")
    processor = CLIPProcessor.from_pretrained(tiny / "clip")
    images, prompts = torch.rand(2, 3, 24, 24, requires_grad=True), ["a cat", "two dogs"]
    pixels = rewards_images.clip_pixels(images, processor.image_processor)
    tokens = processor.tokenizer(prompts, padding=True, return_tensors="pt")
    expected = model(pixel_values=pixels, **tokens).logits_per_image.diagonal()
    reward = image_rewards.load_reward(f"{tiny / 'clip'}*0.5,brightness*2", device, examples("a cat"))
    values = reward(prompts, images, [{}, {}])
    torch.testing.assert_close(values[:, 0], expected)
    torch.testing.assert_close(values[:, 1], images.mean((1, 2, 3)))
    torch.testing.assert_close(values @ reward.weights, 0.5 * expected + 2 * images.mean((1, 2, 3)))
    values[:, 0].sum().backward()
    assert images.grad.any()
    assert reward.features(images).norm(dim=1).tolist() == pytest.approx([1, 1])


def constant(prompts: list[str], images: Tensor, records: list[dict]) -> Tensor:
    return torch.ones(len(images))


def not_a_number(prompts: list[str], images: Tensor, records: list[dict]) -> Tensor:
    return images.mean((1, 2, 3)) * math.nan


def one_for_all(prompts: list[str], images: Tensor, records: list[dict]) -> Tensor:
    return images.mean()


def failing(prompts: list[str], images: Tensor, records: list[dict]) -> Tensor:
    raise KeyError("weights")


def detached(prompts: list[str], images: Tensor, records: list[dict]) -> Tensor:
    return images.detach().mean((1, 2, 3)) * images.mean() * 0


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("test_draftp:constant", "no gradient reaches the images"),
        ("test_draftp:detached", "no gradient reaches the images"),
        ("test_draftp:not_a_number", r"returned \[nan, nan\]"),
        ("test_draftp:one_for_all", r"returned shape \[\] for two images"),
        ("test_draftp:failing", "reward test_draftp:failing: raised KeyError: 'weights' .*test_draftp.py"),
        ("test_draftp:missing", "expected package.module:function"),
        ("/no/such/folder", "no such folder, .*; expected brightness, package.module:function"),
        ("brightness*0", "optional .weight above 0"),
    ],
)
def test_a_reward_that_cannot_be_used_is_refused_at_once(
    device: torch.device, reward: str, message: str
) -> None:
    with pytest.raises(dist.RunError, match=message):
        image_rewards.load_reward(reward, device, examples("a cat"))


def test_prompts_that_are_none_are_named_or_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lines = {"a.jsonl": '{"prompt": "a cat"}\n{"prompt": ""}', "b.jsonl": '{"prompt": 3}', "c.txt": ""}
    for name, text in lines.items():
        (tmp_path / name).write_text(text)
    assert len(diffusion.read_prompts(str(tmp_path / "a.jsonl"))) == 1
    assert "dropped 1 with an empty prompt" in capsys.readouterr().out
    with pytest.raises(dist.RunError, match="b.jsonl:1: found a prompt that is no text: 3"):
        diffusion.read_prompts(str(tmp_path / "b.jsonl"))
    with pytest.raises(dist.RunError, match="c.txt: found no prompts"):
        diffusion.read_prompts(str(tmp_path / "c.txt"))


def wants_its_record(prompts: list[str], images: Tensor, records: list[dict]) -> Tensor:
    assert [record["prompt"] for record in records] == prompts
    return images.mean((1, 2, 3)) * torch.tensor([float(record["worth"]) for record in records])


def test_a_reward_gets_the_record_of_its_prompt(tiny: Path, device: torch.device, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a cat", "worth": 2}\n{"prompt": "a dog", "worth": 3}')
    found = diffusion.read_prompts(str(tmp_path / "a.jsonl"))
    args = settings(tiny, reward="test_draftp:wants_its_record")
    pipe, policy = pipelines.load(args.model, device, args.system, args.seed)
    sampler = draftp.setup(args, pipe, policy, None, found)
    (batch,) = diffusion.micro_batches(found, 4, device)
    _, metrics = draftp.loss_and_metrics(sampler, batch, 1, 1, args)
    plain = sampler._replace(reward=image_rewards.load_reward("brightness", device, found))
    images = draftp.losses_and_images(plain, torch.zeros(2, 4, 8, 8), torch.zeros(2), batch, args)[2]
    assert sampler.reward(batch.prompts, images, batch.records)[:, 0].tolist() == pytest.approx(
        [2 * images[0].mean().item(), 3 * images[1].mean().item()]
    )


def test_diversity_by_hand() -> None:
    features = torch.tensor([[0.0, 0], [3, 4], [1, 1], [1, 1]])
    assert pictures.diversity(features, 2) == pytest.approx(2.5)  # 5 of one prompt, 0 of the other
    assert pictures.diversity(features, 1) == 0.0


def test_coarse_pixels_differ_by_their_root_mean_square() -> None:
    a, b = torch.zeros(1, 3, 32, 32), torch.full((1, 3, 32, 32), 0.25)
    assert (image_rewards.coarse_pixels(a) - image_rewards.coarse_pixels(b)).norm().item() == pytest.approx(
        0.25
    )


# prompts


def test_every_format_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat\n\n  a dog \n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a cat"}\n{"caption": "a dog"}\n')
    (tmp_path / "refl.json").write_text('[{"text": "a cat", "image": "x"}, {"text": "a dog"}]')
    (tmp_path / "parti.tsv").write_text('Prompt\tCategory\na cat\tAnimals\n"a dog\tAnimals\n')
    (tmp_path / "shards").mkdir()
    for shard, text in (("1", "a dog"), ("0", "a cat")):
        for name, content in ((f"sample{shard}.txt", text), (f"sample{shard}.json", "{}")):
            (tmp_path / name).write_text(content)
        with tarfile.open(tmp_path / "shards" / f"{shard}.tar", "w") as tar:
            tar.add(tmp_path / f"sample{shard}.txt", f"sample{shard}.txt")
            tar.add(tmp_path / f"sample{shard}.json", f"sample{shard}.json")
    for name in ("a.txt", "a.jsonl", "refl.json", "shards"):
        assert diffusion.texts(diffusion.read_prompts(str(tmp_path / name))) == ["a cat", "a dog"]
    parti = diffusion.read_prompts(str(tmp_path / "parti.tsv"))
    assert diffusion.texts(parti) == ["a cat", '"a dog'] and parti[0].record["Category"] == "Animals"
    assert diffusion.texts(diffusion.read_prompts(str(tmp_path / "shards" / "0.tar"))) == ["a cat"]
    assert diffusion.read_prompts(str(tmp_path / "a.txt"), "test") is None


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
def test_parti_prompts_are_read_whole() -> None:
    prompts = diffusion.texts(diffusion.read_prompts(str(DATA / "parti_prompts.tsv")))
    assert len(prompts) == 1632 and prompts[0] == "bond"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "\n \n", "found no prompts"),
        ("empty.tsv", "Prompt\tCategory\n", "empty.tsv: cannot be loaded"),
        ("other.tsv", "Words\na cat\n", "other.tsv:2: found the fields Words; expected a prompt"),
        ("other.jsonl", '{"prompt": "a"}\n{"words": "b"}', "other.jsonl:2: found the fields words"),
        ("torn.tar", "no archive", "torn.tar: cannot be loaded"),
        ("latin.txt", b"caf\xe9", "latin.txt: cannot be loaded: 'utf-8'"),
        ("missing.txt", None, "no such file"),
    ],
)
def test_a_bad_file_of_prompts_is_named(tmp_path: Path, name: str, content: Any, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(dist.RunError, match=message):
        diffusion.read_prompts(str(tmp_path / name))


def test_held_out_prompts_are_not_trained_on(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(f"{i} cats" for i in range(100)))
    train, held_out = diffusion.load_prompts(str(tmp_path / "a.txt"), "")
    assert len(train) == 95 and not set(diffusion.texts(train)) & set(diffusion.texts(held_out))


# runs


def test_step_zero_is_the_base_model_and_the_run_moves_on(tiny: Path, finished: Path) -> None:
    rows = read_metrics(finished / "lora")
    assert rows[0]["eval/kl"] == 0 and rows[0]["eval/reward/gain"] == 0
    assert rows[0]["eval/loss"] == pytest.approx(-rows[0]["eval/reward"], abs=1e-7)
    assert rows[0]["eval/diversity"] == rows[0]["eval/diversity/base"] > 0
    assert rows[-1]["eval/kl"] > 0 and rows[-1]["eval/reward/gain"] != 0
    assert rows[-1]["eval/reward/base"] == rows[0]["eval/reward/base"]  # fixed noises
    samples = [json.loads(line) for line in (finished / "lora" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * 4 and {"step", "prompt", "reward", "reward_base"} <= set(samples[0])


EQUAL = {"max_grad_norm": 0.01, "weight_decay": 0.1, "learning_rate": 5e-3, "kl_coef": 5.0, "max_steps": 3}
EQUAL |= {"eval_every": 1, "batch_size": 3}


def test_cuts_into_micro_batches_and_ranks_do_not_show(tiny: Path, tmp_path: Path, two_ranks: Any) -> None:
    changes = {**EQUAL, "reward": f"{tiny / 'clip'},brightness"}
    canonical = steps(tiny, tmp_path / "one", **changes)
    assert abs(canonical[-1][2] - canonical[0][2]) > 1e-3
    assert_same(steps(tiny, tmp_path / "micro", micro_batch_size=1, **changes), canonical)
    assert steps(tiny, tmp_path / "often", save_every=1, **changes) == canonical  # saving changes nothing
    assert_same_weights(tmp_path / "often" / "model", tmp_path / "one" / "model")
    changes |= {
        "tiny": str(tiny),
        "folder": str(tmp_path / "two"),
        "micro_batch_size": 1,
    }  # a dummy on rank 1
    ours, also = two_ranks("test_draftp:steps", **changes)
    assert ours == also
    assert_same(ours, canonical)


def loaded(model: str, lora_rank: int) -> dict[str, Any]:
    """Run on each rank: how often it read the pipeline, and whether all that it holds is what files say."""
    plain = pipelines.read_pipeline(model)
    device, options = dist.init(1), args_of(draftp.Args, lora_rank=lora_rank).system
    with mock.patch.object(pipelines, "read_pipeline", wraps=pipelines.read_pipeline) as read:
        pipe, unet = pipelines.load(model, device, options, seed=1)
    equal = []
    for name, part in pipelines.modules(plain).items():
        found = dict(models.full_weights(getattr(pipe, name)))
        found = {n.replace(".base_layer.", "."): t for n, t in found.items() if ".lora_" not in n}
        found |= dict(getattr(pipe, name).named_buffers())
        expected = part.state_dict() | dict(part.named_buffers())
        equal += [expected.keys() == found.keys(), *(torch.equal(found[n], t) for n, t in expected.items())]
    adapters = [t.sum().item() for n, t in models.full_weights(unet) if ".lora_A." in n]
    return {"reads": read.call_count, "equal": all(equal), "adapters": adapters}


@pytest.mark.parametrize(("kind", "lora_rank"), [("sd", 2), ("xl", 0), ("flux", 2)])
def test_only_one_rank_reads_a_pipeline_and_all_have_it(
    kind: str, lora_rank: int, tiny: Path, two_ranks: Any
) -> None:
    first, second = two_ranks("test_draftp:loaded", model=str(tiny / kind), lora_rank=lora_rank)
    assert (first["reads"], second["reads"]) == (1, 0) and first["equal"] and second["equal"]
    assert first["adapters"] == second["adapters"] and bool(first["adapters"]) == bool(lora_rank)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rank", "rate"), [("sd3", 0, EQUAL["learning_rate"]), ("flux", 2, 0.1)])
def test_flows_are_the_same_on_two_ranks(
    tiny: Path, tmp_path: Path, two_ranks: Any, name: str, rank: int, rate: float
) -> None:
    changes = {**EQUAL, "name": name, "lora_rank": rank, "learning_rate": rate}
    changes |= {"activation_checkpointing": "on"}
    canonical = steps(tiny, tmp_path / "one", **changes)
    assert abs(canonical[-1][2] - canonical[0][2]) > 1e-4
    exported = images_of(pipelines.read_pipeline(str(tmp_path / "one")))
    assert exported.mean((1, 2, 3)).tolist() == pytest.approx(last_rewards(tmp_path / "one"), abs=1e-5)
    changes |= {"tiny": str(tiny), "folder": str(tmp_path / "two"), "micro_batch_size": 1}
    ours, also = two_ranks("test_draftp:steps", **changes)
    assert ours == also
    assert_same(ours, canonical)


def test_a_run_stopped_on_two_ranks_resumes_on_one(tiny: Path, tmp_path: Path, two_ranks: Any) -> None:
    changes = {**EQUAL, "lora_rank": 0, "ema_decay": 0.5, "num_grad_steps": 2, "reward": str(tiny / "clip")}
    canonical = steps(tiny, tmp_path / "one", **changes)
    often = {**changes, "save_every": 1}
    stopped = {**often, "max_steps": 2, "sharding": "none", "folder": str(tmp_path / "two")}
    two_ranks("test_draftp:steps", tiny=str(tiny), **stopped)
    assert_same(steps(tiny, tmp_path / "two", **often), canonical)
    assert_same_weights(tmp_path / "two" / "model", tmp_path / "one" / "model")


def steps(tiny: str | Path, folder: str | Path, **changes: Any) -> list[tuple[float, float, float | None]]:
    """(loss, gradient norm, held-out loss) after each step of a run; called here and on the two ranks."""
    rows = run(Path(tiny), folder, **changes)
    return [(r["train/loss"], r["train/grad_norm"], r.get("eval/loss")) for r in rows if r["step"] > 0]


def assert_same(ours: list, theirs: list) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            assert (x is None) == (y is None)
            assert x is None or abs(x - y) <= 1e-5 * max(1.0, abs(y)), f"{ours}\n{theirs}"


def assert_same_weights(one: Path, two: Path) -> None:
    from safetensors.torch import load_file

    files = sorted(p.relative_to(one) for p in one.rglob("*.safetensors"))
    assert files == sorted(p.relative_to(two) for p in two.rglob("*.safetensors")) and files
    for file in files:
        a, b = load_file(one / file), load_file(two / file)
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


def test_the_reward_rises_and_the_kl_term_holds_it_back(tiny: Path, tmp_path: Path) -> None:
    found = []
    for kl_coef in (0.01, 0.5, 2.0):
        changes = {"lora_rank": 0, "learning_rate": 3e-3, "max_steps": 8, "eval_every": 8}
        rows = run(tiny, tmp_path / str(kl_coef), kl_coef=kl_coef, reward=str(tiny / "clip"), **changes)
        found.append((rows[-1]["eval/reward/gain"], rows[-1]["eval/kl"]))
    gains, kls = zip(*found, strict=True)
    assert gains[0] > gains[1] > gains[2] > 0.0 and gains[0] > 0.3, found
    assert kls[0] > kls[1] > kls[2] > 0, found


def test_the_average_of_weights_by_hand(tiny: Path, device: torch.device) -> None:
    sampler = prepare(settings(tiny), device)
    ema = pipelines.average(sampler.policy, 0.75)
    before = {n: p.clone() for n, p in trained(sampler.policy).items()}
    move(sampler)
    after = {n: p.clone() for n, p in trained(sampler.policy).items()}
    ema.optimization_step = 99  # its decay is past the warm-up
    ema.step(pipelines.trained(sampler.policy))
    with pipelines.averaged(sampler.policy, ema):
        for name, parameter in trained(sampler.policy).items():
            torch.testing.assert_close(parameter, 0.75 * before[name] + 0.25 * after[name])
    assert all(torch.equal(p, after[n]) for n, p in trained(sampler.policy).items())
    assert [ema.get_decay(step) for step in (1, 2, 99)] == [2 / 11, 3 / 12, 0.75]  # (n + 1) / (n + 10)


def becomes_nan(prompts: list[str], images: Tensor, records: list[dict]) -> Tensor:
    """Fine until it is trained on."""
    is_checked = images.shape[-1] == 64
    return images.mean((1, 2, 3)) * (1 if is_checked or not images.requires_grad else math.nan)


def test_a_reward_that_becomes_nan_stops_the_run(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(dist.RunError, match="reward test_draftp:becomes_nan: found nan on average"):
        run(tiny, tmp_path / "run", reward="test_draftp:becomes_nan")
    assert len(read_metrics(tmp_path / "run")) == 1 and not list((tmp_path / "run" / "checkpoints").iterdir())


# exports


def images_of(pipe: Any, scale: float = 3.0) -> Tensor:
    noise = diffusion.noise(1, 0, [0, 1], pipe, 16, torch.device("cpu"))
    return call(pipe, ["test 0 cats"] * 2, noise, scale, 3)


def last_rewards(folder: Path) -> list[float]:
    """Brightness of the first prompt's images at the last evaluation of a run."""
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return [r["reward"] for r in rows if r["step"] == rows[-1]["step"] and r["prompt"] == "test 0 cats"]


def drawn(folder: Path, column: str = "draft") -> Tensor:
    from PIL import Image

    files = [folder / column / f"00000_{i}.png" for i in range(2)]
    return torch.stack([torch.from_numpy(np.array(Image.open(f))).permute(2, 0, 1) / 255 for f in files])


def sampled(tiny: Path, run_folder: Path, tmp_path: Path, **changes: Any) -> Path:
    """Images of `--draw_prompts` with the run's model."""
    (tmp_path / "two.txt").write_text("test 0 cats\ntest 1 cats\n")
    changes = {"draw_prompts": str(tmp_path / "two.txt"), "schedules": "draft,base,power_2.0", **changes}
    draftp.main(settings(tiny, output_dir=str(run_folder), **changes))
    return run_folder / "annealed" / "two"


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_sampling_from_a_finished_run_and_the_ends_of_annealing(
    tiny: Path, finished: Path, tmp_path: Path, kind: str
) -> None:
    folder = sampled(tiny, finished / kind, tmp_path)
    base = pipelines.read_pipeline(str(tiny / "sd"))
    tuned = pipelines.read_pipeline(str(finished / kind))
    for column, pipe in (("base", base), ("draft", tuned)):
        assert (drawn(folder, column) - images_of(pipe)).abs().max() <= 0.51 / 255
    assert (drawn(folder, "base") - drawn(folder, "draft")).abs().max() > 2 / 255
    assert (folder / "prompts.txt").read_text() == "test 0 cats\ntest 1 cats\n"
    points = json.loads((folder / "curve.json").read_text())
    assert list(points) == ["draft", "base", "power_2.0"]


def test_a_prompt_alone_is_drawn_and_adapters_by_their_scale(
    tiny: Path, finished: Path, tmp_path: Path
) -> None:
    """At scale 0 the tuned model is the base model, and what is drawn does not depend on the pieces."""
    options = {"draw_prompts": "test 0 cats", "schedules": "draft,base", "micro_batch_size": 1}
    whole = drawn(sampled(tiny, finished / "lora", tmp_path))
    sampled(tiny, finished / "lora", tmp_path, **options)
    folder = finished / "lora" / "annealed" / "test_0_cats"
    assert (drawn(folder) - whole).abs().max() <= 1 / 255  # rounded once
    sampled(tiny, finished / "lora", tmp_path, lora_scale=0.0, **options)
    assert torch.equal(drawn(folder), drawn(folder, "base"))
    with pytest.raises(dist.RunError, match="lora_scale: found 0.5; expected 1: that run trained all"):
        sampled(tiny, finished / "full", tmp_path, lora_scale=0.5, lora_rank=0)


def test_drawing_wants_the_sampler_of_the_run(tiny: Path, finished: Path, tmp_path: Path) -> None:
    changes = {"guidance_scale": 2.0, "schedules": "draft"}
    with pytest.raises(dist.RunError, match=r"guidance_scale: found 2.0; expected --guidance_scale 3.0"):
        sampled(tiny, finished / "lora", tmp_path, **changes)
    sampled(tiny, finished / "lora", tmp_path, accept_changes=True, **changes)


def test_lora_weights_load_in_diffusers_with_their_scale(tiny: Path, finished: Path) -> None:
    from diffusers import StableDiffusionPipeline

    plain = StableDiffusionPipeline.from_pretrained(tiny / "sd", safety_checker=None)
    before = images_of(plain)
    plain.load_lora_weights(finished / "lora" / "model")
    after = images_of(plain)
    assert (after - before).abs().max() > 2 / 255
    ours = images_of(pipelines.read_pipeline(str(finished / "lora")))  # folded in
    torch.testing.assert_close(after, ours, rtol=0, atol=1e-5)
    assert after.mean((1, 2, 3)).tolist() == pytest.approx(last_rewards(finished / "lora"), abs=1e-5)


def test_a_full_or_merged_export_is_a_pipeline(tiny: Path, finished: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    run(tiny, tmp_path / "run", learning_rate=0.3, merge_lora=True)
    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "model", safety_checker=None)
    apart = pipelines.read_pipeline(str(finished / "lora"))
    torch.testing.assert_close(images_of(merged), images_of(apart), rtol=0, atol=1e-5)
    full = StableDiffusionPipeline.from_pretrained(finished / "full" / "model", safety_checker=None)
    assert (images_of(full) - images_of(pipelines.read_pipeline(str(tiny / "sd")))).abs().max() > 1e-3
    assert images_of(full).mean((1, 2, 3)).tolist() == pytest.approx(
        last_rewards(finished / "full"), abs=1e-5
    )


def test_a_run_goes_on_from_another_ones_model(tiny: Path, finished: Path, tmp_path: Path) -> None:
    rows = run(tiny, tmp_path / "run", model=str(finished / "lora"), max_steps=1)
    before = read_metrics(finished / "lora")[-1]["eval/reward"]
    assert rows[0]["eval/reward/base"] == pytest.approx(before, abs=1e-5)


@pytest.mark.parametrize("name", ["xl", "sd3", "flux"])
def test_other_kinds_train_and_export(tiny: Path, tmp_path: Path, name: str) -> None:
    rows = run(tiny, tmp_path / "run", name, learning_rate=0.3)
    assert rows[0]["eval/kl"] == 0 and rows[-1]["eval/kl"] > 0
    pipe = pipelines.read_pipeline(str(tmp_path / "run"))
    assert images_of(pipe).mean((1, 2, 3)).tolist() == pytest.approx(last_rewards(tmp_path / "run"), abs=1e-5)


def test_pictures_to_look_at(finished: Path) -> None:
    from PIL import Image

    for name in (
        "images/step_00000000.png",
        "images/step_00000002.png",
        "annealed/grid.png",
        "annealed/curve.png",
    ):
        with Image.open(finished / "lora" / name) as picture:
            assert min(picture.size) > 100
    points = json.loads((finished / "lora" / "annealed" / "curve.json").read_text())
    row = read_metrics(finished / "lora")[-1]
    assert points["draft"]["reward"] == pytest.approx(row["eval/reward"], abs=1e-6)
    assert points["base"]["reward"] == pytest.approx(row["eval/reward/base"], abs=1e-6)
    assert points["draft"]["diversity"] == pytest.approx(row["eval/diversity"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_check_of_each_kind_draws_and_exports_as_diffusers_does(
    tiny: Path, tmp_path: Path, name: str
) -> None:
    """Its slope is left out: random weights bend the loss too much for the step that it takes."""
    with pytest.raises(SystemExit):
        draftp.main(settings(tiny, name, check=True, output_dir=str(tmp_path / "run")))
    lines = {line["name"]: line for line in json.loads((tmp_path / "run" / "check.json").read_text())}
    assert lines["latents against those of diffusers, relative"]["value"] < 1e-5
    assert lines["export, loaded again, most of a prediction"]["value"] < 1e-4


# bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/no/such/folder"}, "no such folder"),
        ({"num_grad_steps": 4}, "num_grad_steps: found 4; expected 0 to 3"),
        ({"num_lv": 2, "num_grad_steps": 2}, "num_lv: found 2; expected num_grad_steps 1"),
        ({"num_samples": 0}, "num_samples: found 0; expected at least 1"),
        ({"schedules": "base,cosine"}, "schedules: found cosine"),
        ({"image_size": 18}, "image_size 18; expected a multiple of 4"),
        ({"lora_scale": 0.5}, "lora_scale: found 0.5"),
        ({"lora_target": "to_nothing"}, "lora_target 'to_nothing'"),
        ({"num_inference_steps": 2000}, "num_inference_steps 2000; expected 1 to 1000"),
        ({"reward": "test_draftp:constant"}, "no gradient reaches the images"),
        ({"draw_prompts": "x.txt", "output_dir": "/no/run"}, "x.txt|no finished run"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(
    tiny: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(dist.RunError, match=message):
        run(tiny, changes.pop("output_dir", tmp_path / "run"), **changes)


def test_sampling_wants_the_model_the_run_began_with(tiny: Path, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(dist.RunError, match="expected --model"):
        sampled(tiny, finished / "lora", tmp_path, model=str(tiny / "sd_v"))


def test_pipelines_that_cannot_be_used_are_refused(tiny: Path, tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = pipelines.read_pipeline(str(tiny / "sd"))
    ddim = pipe.scheduler
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(dist.RunError, match="FlowMatchEulerDiscreteScheduler.* cannot be used"):
        diffusion.schedule(pipe, 3, 16, torch.device("cpu"))
    pipe = pipelines.read_pipeline(str(tiny / "flux"))
    pipe.scheduler = ddim
    with pytest.raises(dist.RunError, match="DDIMScheduler.* cannot be used; expected FlowMatch"):
        diffusion.schedule(pipe, 3, 16, torch.device("cpu"))
    pipe.scheduler = None
    with pytest.raises(dist.RunError, match="NoneType.* cannot be used"):
        diffusion.schedule(pipe, 3, 16, torch.device("cpu"))
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    folder = tiny_diffusion.make_pipeline(tmp_path / "zero", **zero)
    with pytest.raises(dist.RunError, match="alpha-bar 0"):
        diffusion.schedule(pipelines.read_pipeline(folder), 3, 16, torch.device("cpu"))
    index = json.loads((tmp_path / "zero" / "model_index.json").read_text())
    (tmp_path / "zero" / "model_index.json").write_text(
        json.dumps({**index, "_class_name": "KolorsPipeline"})
    )
    with pytest.raises(
        dist.RunError, match="found a KolorsPipeline; expected one of StableDiffusionPipeline"
    ):
        pipelines.read_pipeline(folder)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text("{}")
    with pytest.raises(dist.RunError, match="has not finished"):
        pipelines.read_pipeline(str(tmp_path / "run"))
    (tmp_path / "run" / "model").mkdir()
    with pytest.raises(dist.RunError, match="cannot be loaded"):
        pipelines.read_pipeline(str(tmp_path / "run"))


def test_a_changed_setting_is_refused_on_resume(tiny: Path, finished: Path) -> None:
    with pytest.raises(dist.RunError, match="holds a run with guidance_scale 3.0, now 4.0"):
        run(tiny, finished / "lora", learning_rate=0.3, guidance_scale=4.0)
