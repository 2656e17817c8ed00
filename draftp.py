"""DRaFT+: reward gradients through a diffusion sampler (Clark et al., 2023), https://arxiv.org/abs/2309.17400

A differentiable reward r of the finished image is raised by gradients through the last K sampler steps, while
the noise predictions stay near those of the base model at the same latents (the +, from NeMo-Aligner):

    x      = sqrt(alpha') (x - sqrt(1 - alpha) eps) / sqrt(alpha) + sqrt(1 - alpha') eps     a step of DDIM
    loss   = -r(decode(x_0), prompt) + kl_coef * mean (eps - eps_base)^2      over the K steps and dimensions

and its relatives: DRaFT through all steps, DRaFT-K, DRaFT-LV, random K (AlignProp). At inference, annealed
importance guidance, https://arxiv.org/abs/2409.06493, moves from the base to the tuned model step by step:

    eps    = (1 - w_i) eps_base + w_i eps

    python draftp.py --help
    torchrun --nproc_per_node=8 draftp.py --model sd15 --reward PickScore_v1 --dataset prompts.txt
    python draftp.py --draw_prompts prompts.txt --schedules draft,base,power_2.0

Shapes: B images in a micro-batch, S sampler steps, K with gradient, R rewards; latents x (B, C, h, w).

Metrics, results and departures from the papers: docs/draftp.md
"""

import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute
from tyro.conf import OmitArgPrefixes

from common import certificate, checkpoint, data, diffusion, dist, files, formats, models, pictures, plan
from common.args import Optimization, Run, Weights, block, parse, snapshot
from common.evaluate import load_judge, mean_scores
from common.log import Log

SHOWN = ("loss", "reward", "kl", "diversity", "grad_norm")


@dataclass
class ImageSystem(Weights):
    """How the model fits the machine: memory and speed, and with dtype and LoRA the numbers too."""

    micro_batch_size: int = 4
    """images in one forward on one rank, memory not result"""
    step_checkpointing: bool = True
    """keep latents only and recompute each denoising step and decoded image in backward"""


@dataclass
class ImageRun(Run):
    """Where a run is kept, how long it takes and what it records on the way."""

    num_samples: int = 16
    """prompts drawn and judged at each evaluation"""
    images_per_prompt: int = 4
    """images of each prompt at an evaluation, from fixed noises: for the picture and the diversity"""
    judge: str = ""
    """package.module:function, (prompt, image) -> a number or a dict; default: exact for toy, else none"""
    draw_prompts: str = ""
    """do not train, but draw this file's prompts with the model in output_dir, under each of `schedules`"""
    schedules: str = "base,power_4.0,power_2.0,linear,step_0.5,draft"
    """shares of the tuned model over the steps of the sampler: base, draft, linear, power_p, step_p"""


@dataclass
class Args:
    """DRaFT+: fine-tune a diffusion model through a differentiable reward."""

    model: str = "toy"
    """policy to start from: toy, a run folder, folder or hub id of a diffusers SD 1.x, 2.x or XL pipeline"""
    dataset: str = "toy"
    """prompts: toy, .txt, .tsv, .tar, .jsonl/.json/.parquet, folder, hub/name[:config[:split]]; a,b mixes"""
    eval_dataset: str = ""
    """held-out data; default: the data set's test split, else 5 % of its prompts"""
    seed: int = 1
    """seed of the order of data and of samples"""

    # algorithm
    reward: str = "toy"
    """toy, brightness, a CLIP model (PickScore's format), package.module:function; a,b*0.5 adds several"""
    num_grad_steps: int = 1
    """K, how many of the last sampler steps gradients pass through; 0: all (DRaFT)"""
    random_k: bool = False
    """draw K from 1 to num_grad_steps at each optimizer step (AlignProp)"""
    num_lv: int = 1
    """samples of the last step to average over, from the second on noised anew; >= 2 is DRaFT-LV"""
    kl_coef: float = 0.2
    """weight of the divergence from the reference policy; 0 loads no reference"""
    num_inference_steps: int = 50
    """S, steps of the sampler"""
    guidance_scale: float = 7.5
    """weight of the prompt in classifier-free guidance; 1 is none"""
    image_size: int = 0
    """pixels of a side; 0: what the model was trained for"""
    ema_decay: float = 0.0
    """decay of the moving average of the trained weights, which is evaluated and exported; 0 keeps none"""

    optimization: OmitArgPrefixes[Optimization] = block(
        Optimization, learning_rate=1e-4, max_grad_norm=10.0, batch_size=8
    )
    system: OmitArgPrefixes[ImageSystem] = block(
        ImageSystem, lora_rank=32, lora_alpha=32.0, lora_target="to_q,to_k,to_v,to_out.0"
    )
    run: OmitArgPrefixes[ImageRun] = block(
        ImageRun, output_dir=f"runs/{Path(__file__).stem}", eval_every=20, save_every=200
    )


class Sampler(NamedTuple):
    """What images are drawn with, and the reward that scores them."""

    pipe: Any
    policy: nn.Module
    ref_policy: nn.Module | None  # a frozen copy; None: the policy with adapters off
    has_reference: bool  # False: the policy is trained whole and nothing compares it with the base model
    schedule: diffusion.Schedule
    reward: diffusion.Reward
    size: int  # pixels of a side
    device: torch.device


def ddim_step(eps: Tensor, x: Tensor, alpha: Tensor, alpha_next: Tensor) -> Tensor:
    """Eq. 12 of DDIM, https://arxiv.org/abs/2010.02502, with sigma 0: no noise is added.

    Args:
        eps: predicted noise in x, of x's shape.
        alpha, alpha_next: alpha-bar at x and where the step leads, scalars.
    """
    x_0 = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()
    return alpha_next.sqrt() * x_0 + (1 - alpha_next).sqrt() * eps


def guided(eps_empty: Tensor, eps_prompt: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, https://arxiv.org/abs/2207.12598, with scale counted as in diffusers."""
    return eps_empty + scale * (eps_prompt - eps_empty)


def noise_from_v(v: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
    """The noise that a prediction of v = sqrt(alpha) eps - sqrt(1 - alpha) x_0 stands for."""
    return alpha.sqrt() * v + (1 - alpha).sqrt() * x


def denoise(
    eps: Callable[[Tensor, int], Tensor],
    eps_base: Callable[[Tensor, int], Tensor] | None,
    x: Tensor,
    alphas: Tensor,
    num_grad_steps: int,
    step_checkpointing: bool = False,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """DRaFT-K: from noise x to the sample x_0, gradients through the last num_grad_steps steps only.

    Args:
        eps, eps_base: (x, i) -> predicted noise at sampler step i of S, of the policy and of the base model.
        alphas: (S + 1,) alpha-bar before each step and after the last.
        step_checkpointing: keep only the latents between steps; predict again in backward.
        first: the step that x is the latent of.

    Returns:
        x_0, and (B,) the mean of (eps - eps_base)^2 over these steps and all dimensions, both at the policy's
        latents. Gradients of eps_base with respect to x are left out (departure 2); zero without eps_base.
    """
    num_steps = len(alphas) - 1
    kl = x.new_zeros(len(x))
    with torch.no_grad():
        for i in range(first, num_steps - num_grad_steps):
            x = ddim_step(eps(x, i), x, alphas[i], alphas[i + 1])
    for i in range(max(first, num_steps - num_grad_steps), num_steps):
        e = recompute(eps, x, i, **diffusion.RECOMPUTE) if step_checkpointing else eps(x, i)
        if eps_base is not None:
            with torch.no_grad():
                e_base = eps_base(x, i)
            kl = kl + (e - e_base).square().flatten(1).mean(1) / num_grad_steps
        x = ddim_step(e, x, alphas[i], alphas[i + 1])
    return x, kl


def renoise(x_0: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """DRaFT-LV: another latent before the last step, from the finished sample and without its gradient."""
    return alpha.sqrt() * x_0.detach() + (1 - alpha).sqrt() * noise


def annealed(
    eps: Callable[[Tensor, int], Tensor],
    eps_base: Callable[[Tensor, int], Tensor],
    x: Tensor,
    alphas: Tensor,
    weights: list[float],
) -> Tensor:
    """Annealed importance guidance: x_0 when step i follows weights[i] of the policy and the rest base."""
    for i, w in enumerate(weights):
        if w in (0.0, 1.0):  # exactly one of the models, and half the work
            e = eps(x, i) if w else eps_base(x, i)
        else:
            e = (1 - w) * eps_base(x, i) + w * eps(x, i)
        x = ddim_step(e, x, alphas[i], alphas[i + 1])
    return x


def annealing_weights(name: str, num_steps: int) -> list[float]:
    """Shares of the tuned model at the steps 0 .. S - 1, under NeMo-Aligner's names.

    Raises:
        RunError: no such name.
    """
    shape, _, p = name.partition("_")
    t = [i / num_steps for i in range(num_steps)]  # never reaches 1
    if name in ("base", "draft"):
        return [float(name == "draft")] * num_steps
    if name == "linear":
        return t
    if shape in ("power", "step") and re.fullmatch(r"\d*\.?\d+", p):
        return [x ** float(p) if shape == "power" else float(x >= float(p)) for x in t]
    raise formats.wrong("schedules", name, "base, draft, linear, power_p or step_p, with a number p")


def draft_loss(rewards: Tensor, kl: Tensor, kl_coef: float) -> Tensor:
    """The loss of each image, DRaFT+'s with kl_coef > 0; rewards and kl (B,). -> (B,)"""
    return -rewards + kl_coef * kl


def predictors(sampler: Sampler, prompts: list[str], scale: float) -> tuple[Callable, Callable | None]:
    """eps(x, i) of the policy for these prompts, and eps_base of the base model, None if that is not at hand.

    Both are guided, and float32 whatever the compute dtype.
    """
    is_guided = scale != 1
    conditions = diffusion.encode(sampler.pipe, prompts, sampler.size, is_guided, sampler.device)
    alphas = sampler.schedule.alphas

    def predict(unet: nn.Module, x: Tensor, i: int) -> Tensor:
        rows = torch.cat([x, x]) if is_guided else x  # without and with the prompt
        out = unet(rows, sampler.schedule.timesteps[i], **conditions, return_dict=False)[0].float()
        out = guided(*out.chunk(2), scale) if is_guided else out
        return noise_from_v(out, x, alphas[i]) if sampler.schedule.predicts_v else out

    def eps(x: Tensor, i: int) -> Tensor:
        return predict(sampler.policy, x, i)

    def eps_base(x: Tensor, i: int) -> Tensor:
        with models.reference(sampler.policy, sampler.ref_policy) as unet:
            return predict(unet, x, i)

    return eps, eps_base if sampler.has_reference else None


def losses_and_images(
    sampler: Sampler, x_0: Tensor, kl: Tensor, prompts: list[str], args: Args
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Losses (B,) and metrics (B,) of finished samples, and their images (B, 3, H, W) in [0, 1]."""
    pixels = diffusion.decode(sampler.pipe.vae, x_0, args.system.step_checkpointing)
    images = pixels.clamp(0, 1)  # a clamped pixel passes no gradient
    parts = sampler.reward(images, prompts)  # (B, R)
    rewards = parts @ sampler.reward.weights
    losses = draft_loss(rewards, kl, args.kl_coef)
    metrics = {
        "loss": losses.detach(),
        "reward": rewards.detach(),
        "reward_std": rewards.detach() ** 2,  # made a standard deviation by `conclude`
        "kl": kl.detach(),
        "saturated_pixels_frac": (pixels != images).float().mean((1, 2, 3)),
    }
    if not sampler.has_reference:
        del metrics["kl"]
    if len(sampler.reward.names) > 1:
        names = [f"rewards/{name.rpartition('/')[2]}" for name in sampler.reward.names]
        metrics |= dict(zip(names, parts.detach().unbind(1), strict=True))
    return losses, metrics, images


def loss_and_metrics(
    sampler: Sampler, micro_batch: diffusion.MicroBatch, step: int, num_grad_steps: int, args: Args
) -> tuple[Tensor, dict[str, tuple]]:
    """Loss of a micro-batch, a sum over its images that the caller divides, and metrics as (sum, count)."""

    def noise(copy: int) -> Tensor:
        at, shape = (args.seed, step, micro_batch.indices), (sampler.pipe, sampler.size)
        return diffusion.noise(*at, *shape, sampler.device, copy)

    eps, eps_base = predictors(sampler, micro_batch.prompts, args.guidance_scale)
    alphas, last = sampler.schedule.alphas, args.num_inference_steps - 1
    samples = [denoise(eps, eps_base, noise(0), alphas, num_grad_steps, args.system.step_checkpointing)]
    for copy in range(1, args.num_lv):
        x = renoise(samples[0][0], noise(copy), alphas[last])
        samples.append(denoise(eps, eps_base, x, alphas, 1, args.system.step_checkpointing, first=last))
    loss, totals = 0.0, Counter()
    for x_0, kl in samples:
        losses, metrics, _ = losses_and_images(sampler, x_0, kl, micro_batch.prompts, args)
        loss = loss + losses @ micro_batch.weights / len(samples)
        totals.update({name: value @ micro_batch.weights / len(samples) for name, value in metrics.items()})
    num_images = micro_batch.weights.sum()
    return loss, {name: (total, num_images) for name, total in totals.items()}


def conclude(metrics: dict[str, float], prefix: str, sampler: Sampler) -> dict[str, float]:
    """Metrics with the standard deviation of the rewards, of which they hold the mean square.

    Raises:
        RunError: a reward is not finite.
    """
    mean = metrics[f"{prefix}reward"]
    if not math.isfinite(mean):
        raise formats.wrong(
            f"reward {'+'.join(sampler.reward.names)}", f"{mean} on average", "finite numbers; the run stops"
        )
    return metrics | {f"{prefix}reward_std": max(0.0, metrics[f"{prefix}reward_std"] - mean**2) ** 0.5}


class Image(NamedTuple):
    """One image of a batch."""

    index: int  # its place in the batch
    pixels: Tensor  # (3, H, W) uint8
    reward: Tensor  # scalar
    features: Tensor  # (F,)


class Drawn(NamedTuple):
    """Images to look at, images_per_prompt in a row of each prompt; alike on every rank."""

    images: Tensor  # (N, 3, H, W) uint8
    rewards: Tensor  # (N,)
    features: Tensor  # (N, F)


@torch.no_grad()
def draw_images(
    sampler: Sampler, prompts: list[str], args: Args, weights: list[float] | None = None
) -> tuple[Drawn, dist.Totals]:
    """Draw each prompt from the noises of step 0, by the policy or annealed; also this rank's metrics."""
    totals, found = dist.Totals(), []
    items = [prompt for prompt in prompts for _ in range(args.run.images_per_prompt)]
    for micro_batch in diffusion.micro_batches(items, args.system.micro_batch_size, sampler.device):
        eps, eps_base = predictors(sampler, micro_batch.prompts, args.guidance_scale)
        x = diffusion.noise(args.seed, 0, micro_batch.indices, sampler.pipe, sampler.size, sampler.device)
        if weights is None:
            x_0, kl = denoise(eps, eps_base, x, sampler.schedule.alphas, most_grad_steps(args))
        else:
            x_0, kl = annealed(eps, eps_base, x, sampler.schedule.alphas, weights), x.new_zeros(len(x))
        _, metrics, images = losses_and_images(sampler, x_0, kl, micro_batch.prompts, args)
        num_images = micro_batch.weights.sum()
        totals.update({name: (value @ micro_batch.weights, num_images) for name, value in metrics.items()})
        pixels = images.mul(255).round().byte().cpu()
        rewards, features = metrics["reward"].cpu(), sampler.reward.features(images).cpu()
        if num_images > 0:  # else it only keeps collectives matched
            columns = zip(micro_batch.indices, pixels, rewards, features, strict=True)
            found += [Image(*image) for image in columns]
    found = sorted(dist.gather(found), key=lambda image: image.index)
    drawn = Drawn(
        torch.stack([image.pixels for image in found]),
        torch.stack([image.reward for image in found]),
        torch.stack([image.features for image in found]),
    )
    return drawn, totals


def draw_schedules(sampler: Sampler, prompts: list[str], args: Args, folder: Path) -> dict[str, Drawn]:
    """Draw the prompts under each of run.schedules; write a grid and the curve."""
    points, columns = {}, {}
    for name in args.run.schedules.split(","):
        drawn, _ = draw_images(sampler, prompts, args, annealing_weights(name, args.num_inference_steps))
        spread = diffusion.diversity(drawn.features, args.run.images_per_prompt)
        points[name] = {"diversity": spread, "reward": drawn.rewards.mean().item()}
        columns[name] = drawn
    pictures.save_grid(folder / "grid.png", prompts, columns)
    pictures.save_curve(folder / "curve.png", points)
    return columns


def most_grad_steps(args: Args) -> int:
    return args.num_grad_steps or args.num_inference_steps


def grad_steps(step: int, args: Args) -> int:
    """K of an optimizer step."""
    most = most_grad_steps(args)
    return int(np.random.default_rng((args.seed, step)).integers(1, most + 1)) if args.random_k else most


def check(args: Args) -> None:
    """Refuse settings that do not go together, before anything is loaded."""
    if not 0 <= args.num_grad_steps <= args.num_inference_steps:
        raise formats.wrong(
            "num_grad_steps", args.num_grad_steps, f"0 to {args.num_inference_steps}, all steps"
        )
    if args.num_lv > 1 and args.num_grad_steps != 1:
        raise formats.wrong("num_lv", args.num_lv, "num_grad_steps 1 with it: it repeats the last step alone")
    if args.run.num_samples < 1:
        raise formats.wrong("num_samples", args.run.num_samples, "at least 1: images are compared")
    for name in args.run.schedules.split(","):
        annealing_weights(name, args.num_inference_steps)


def setup(
    args: Args, pipe: Any, policy: nn.Module, ref_policy: nn.Module | None, device: torch.device
) -> Sampler:
    schedule = diffusion.schedule(pipe, args.num_inference_steps)
    schedule = schedule._replace(alphas=schedule.alphas.to(device))
    reward, size = diffusion.load_reward(args.reward, device), diffusion.image_size(pipe, args.image_size)
    has_reference = ref_policy is not None or diffusion.has_adapters(policy)
    return Sampler(pipe, policy, ref_policy, has_reference, schedule, reward, size, device)


def beside(args: Args) -> dict[str, str]:
    """The models that a run holds beside the policy, and where they are."""
    return {"reference": args.model} if args.system.lora_rank == 0 and args.kl_coef > 0 else {}


def load_reference(args: Args, device: torch.device) -> nn.Module:
    """A frozen copy of the model that training begins with."""
    return diffusion.load(args.model, device, args.system, args.seed, trainable=False)[1]


def checks(sampler: Sampler, prompts: list[str], args: Args) -> Iterator[certificate.Line]:
    """What --check tries: the gradient of a reward, sampling against diffusers, and the export."""
    device, scale, num_steps = sampler.device, args.guidance_scale, args.num_inference_steps
    is_low, chosen, K = sampler.pipe.vae.dtype != torch.float32, prompts[:2], most_grad_steps(args)
    alphas, eps = sampler.schedule.alphas, predictors(sampler, chosen, scale)[0]
    start = diffusion.noise(args.seed, 0, [*range(len(chosen))], sampler.pipe, sampler.size, device)
    yield certificate.of_duplicates(prompts)
    with torch.no_grad():
        ours, middle = denoise(eps, None, start, alphas, 0)[0], start
        for i in range(num_steps - K):
            middle = ddim_step(eps(middle, i), middle, alphas[i], alphas[i + 1])
    theirs = diffusion.drawn_by_diffusers(sampler.pipe, chosen, start, num_steps, scale)
    gap = ((ours - theirs).abs().mean() / ours.std()).item()
    yield certificate.at_most("latents against those of diffusers, relative", gap, 0.1 if is_low else 1e-2)

    def loss() -> Tensor:  # of the last K steps alone, as their gradient is
        x_0, kl = denoise(eps, None, middle, alphas, K, args.system.step_checkpointing, num_steps - K)
        return losses_and_images(sampler, x_0, kl, chosen, args)[0].sum()

    slope = certificate.slope_over_norm(loss, sampler.policy, 0.05 if is_low else 2e-3)
    yield certificate.near("slope along the gradient over its norm", slope, 1.0, 0.5 if is_low else 0.05)
    with files.beside(args.run.output_dir) as folder, torch.no_grad():
        diffusion.export(folder, sampler.pipe, sampler.policy, args.model, args.run.merge_lora)
        dist.from_main(lambda: files.write(Path(folder) / "args.json", json.dumps({"model": args.model})))
        pipe = diffusion.read_pipeline(f"{folder}/model").to(device, sampler.pipe.vae.dtype)
        again = predictors(sampler._replace(pipe=pipe, policy=pipe.unet), chosen, scale)[0]
        far = (eps(start, 0) - again(start, 0)).abs().max().item()
    yield certificate.at_most("export, loaded again, most of a predicted noise", far, 0.1 if is_low else 1e-2)


def draw_finished(args: Args, device: torch.device) -> None:
    """Draw the prompts of run.draw_prompts with the model a finished run left in output_dir; no training."""
    prompts = diffusion.read_prompts(args.run.draw_prompts)
    began = diffusion.trained_from(args.run.output_dir)
    if began != args.model:
        raise formats.wrong(
            f"output_dir {args.run.output_dir}", f"a run that began with {began}", f"--model {began}"
        )
    pipe, policy = diffusion.load(args.run.output_dir, device, args.system, args.seed, False, fuse=False)
    ref_policy = None if diffusion.has_adapters(policy) else load_reference(args, device)
    folder = Path(args.run.output_dir) / "annealed" / Path(args.run.draw_prompts).stem
    columns = draw_schedules(setup(args, pipe, policy, ref_policy, device), prompts, args, folder)
    pictures.save_images(folder, prompts, columns)


TOY = dict(num_inference_steps=20, guidance_scale=3.0, kl_coef=1.0, learning_rate=3e-4, warmup_steps=5)
TOY |= dict(batch_size=32, micro_batch_size=32, max_steps=40, lora_rank=0, eval_every=20, num_samples=24)


def main(args: Args) -> None:
    # setup
    device = dist.init(args.seed)
    check(args)
    plan.show(args, beside, plan.image_need)
    if args.run.draw_prompts:
        return draw_finished(args, device)
    optimization, run = args.optimization, args.run
    log = Log(run, __file__, SHOWN, snapshot(args, TOY))

    # data
    train_set, eval_set = diffusion.load_prompts(args.dataset, args.eval_dataset)
    num_steps = data.num_steps(train_set, optimization.batch_size, run.num_epochs, run.max_steps)
    shown = [*dict.fromkeys(diffusion.texts(eval_set))][: run.num_samples]
    if log.is_finished(num_steps, files.inputs(args.model, None, train_set, eval_set)):
        return
    log.start(num_steps, optimization)

    # models
    pipe, policy = diffusion.load(args.model, device, args.system, args.seed)
    ref_policy = load_reference(args, device) if beside(args) else None
    sampler = setup(args, pipe, policy, ref_policy, device)
    certificate.run(run, checks(sampler, diffusion.texts(train_set), args))
    groups = models.parameter_groups(policy, optimization.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    ema, parts = None, {"policy": (policy, optimizer)}
    if args.ema_decay > 0:
        ema = diffusion.average(policy, args.ema_decay)
        parts["ema"] = (nn.ParameterList(ema.shadow_params), None)  # the same memory under names
    base, _ = draw_images(sampler, shown, args)  # before resume() changes the policy
    start_step = checkpoint.resume(run.output_dir, parts)["step"]

    def evaluate(step: int) -> dict[str, float]:
        with diffusion.averaged(policy, ema):
            drawn, totals = draw_images(sampler, shown, args)
        metrics = conclude(totals.reduce("eval/"), "eval/", sampler)
        metrics["eval/reward/base"] = base.rewards.mean().item()
        metrics["eval/reward/gain"] = (drawn.rewards - base.rewards).mean().item()
        metrics["eval/diversity"] = diffusion.diversity(drawn.features, run.images_per_prompt)
        metrics["eval/diversity/base"] = diffusion.diversity(base.features, run.images_per_prompt)
        picture = log.folder / "images" / f"step_{step:08d}.png"
        pictures.save_grid(picture, shown, {"base": base, "tuned": drawn})
        log.picture(step, picture)
        rows, scores = pictures.judged(shown, drawn, base, judge)
        log.samples(step, rows)
        return metrics | {f"eval/judge/{name}": mean for name, mean in mean_scores(scores).items()}

    judge = load_judge(run.judge, args.dataset, toy="toy.images:judge")
    if start_step == 0:
        log(0, num_steps, evaluate(step=0))

    for step in range(start_step + 1, num_steps + 1):
        # update
        step_start = time.perf_counter()  # the batch is the same on every rank
        batch = data.batch(train_set, step, optimization.batch_size, args.seed, run.num_epochs, run.max_steps)
        lr = optimization.learning_rate * models.lr_factor(step, num_steps, optimization)
        models.set_lr(optimizer, lr)
        totals, num_grad_steps = dist.Totals(), grad_steps(step, args)
        for micro_batch in diffusion.micro_batches(
            diffusion.texts(batch), args.system.micro_batch_size, device
        ):
            loss, metrics = loss_and_metrics(sampler, micro_batch, step, num_grad_steps, args)
            (loss / len(batch)).backward()  # gradients add over micro-batches and ranks: the batch's mean
            totals.update(metrics)
        grad_norm = models.clip_grad_norm(policy, optimization.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if ema:
            ema.optimization_step = step - 1  # the decay grows with the steps of the run, resumed or not
            ema.step(diffusion.trained(policy))
        totals.update({"grad_norm": (grad_norm, 1)})
        metrics = conclude(totals.reduce("train/"), "train/", sampler)  # the step's one synchronisation

        # evaluate
        metrics |= {
            "train/epoch": step * optimization.batch_size / train_set.epoch_size,
            "train/learning_rate": lr,
            "train/num_grad_steps": num_grad_steps,
            "train/images_per_second": len(batch) / (time.perf_counter() - step_start),
        }
        stop = dist.stop_requested()
        if step % run.eval_every == 0 or step == num_steps:
            metrics |= evaluate(step)

        # log and save
        log(step, num_steps, metrics)
        if step % run.save_every == 0 or step == num_steps or stop:
            checkpoint.save(run, step, parts)
        if stop and step < num_steps:
            return log.finish(stopped_at=step)

    with diffusion.averaged(policy, ema):
        if sampler.has_reference:
            draw_schedules(sampler, shown, args, log.folder / "annealed")
            log.picture(num_steps, log.folder / "annealed" / "curve.png")
        diffusion.export(run.output_dir, pipe, policy, args.model, run.merge_lora)
    log.finish()


if __name__ == "__main__":
    dist.run(main, parse(Args, TOY))
