"""DRaFT+: reward gradients through a diffusion sampler (Clark et al., 2023), https://arxiv.org/abs/2309.17400

A differentiable reward r of the finished image is raised by gradients through the last K sampler steps, while
the predictions p stay near those of the base model at the same latents (the +, from NeMo-Aligner):

    x      = s' x_0(p, x) + n' eps(p, x)     a step of DDIM or of a flow, to shares s' of image, n' of noise
    loss   = -r(decode(x_0), prompt) + kl_coef * mean (p - p_base)^2        over the K steps and dimensions

and its relatives: DRaFT through all steps, DRaFT-K, DRaFT-LV, random K (AlignProp). At inference, annealed
importance guidance, https://arxiv.org/abs/2409.06493, moves from the base to the tuned model step by step:

    p      = (1 - w_i) p_base + w_i p

    python draftp.py --help
    torchrun --nproc_per_node=8 draftp.py --model sd15 --reward PickScore_v1 --dataset prompts.txt
    python draftp.py --draw_prompts prompts.txt --schedules draft,base,power_2.0

Shapes: B images in a micro-batch, S sampler steps, K with gradient, R rewards; latents x (B, C, h, w).

Metrics, results and departures from the papers: docs/draftp.md
"""

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from common import certificate, checkpoint, data, diffusion, dist, files, formats, models, pictures, pipelines
from common.args import Optimization, Run, Weights, block, parse, snapshot
from common.evaluate import load_judge, mean_scores
from common.image_rewards import Reward, load_reward
from common.log import Log
from common.packed import Example
from common.plan import image_need
from common.plan import show as show_plan

SHOWN = ("loss", "reward", "kl", "diversity", "grad_norm")


@dataclass
class ImageSystem(Weights):
    """How the model fits the machine: memory and speed, and with dtype and LoRA the numbers too."""

    micro_batch_size: int = 4
    """images in one forward on one rank, memory not result"""
    step_checkpointing: bool = True
    """keep latents only and recompute each denoising step and decoded image in backward"""
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """recompute activations in backward; auto: where they would not fit into memory"""


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
    """draw this prompt, or this file's, with the model in output_dir by each of `schedules`; do not train"""
    lora_scale: float = 1.0
    """share of what adapters have learned that draw_prompts adds to the base model"""
    schedules: str = "base,power_4.0,power_2.0,linear,step_0.5,draft"
    """shares of the tuned model over the steps of the sampler: base, draft, linear, power_p, step_p"""


@dataclass
class Args:
    """DRaFT+: fine-tune a diffusion model through a differentiable reward."""

    model: str = "toy"
    """policy to start from: toy, run folder, folder or hub id of a diffusers pipeline, SD 1 to 3 or FLUX.1"""
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
    """weight of the prompt in classifier-free guidance, 1 is none; FLUX is told the number"""
    image_size: int = 0
    """pixels of a side; 0: what the model was trained for"""
    ema_decay: float = 0.0
    """decay of the moving average of the trained weights, which is evaluated and exported; 0 keeps none"""

    optimization: Optimization = block(Optimization, learning_rate=1e-4, max_grad_norm=10.0, batch_size=8)
    system: ImageSystem = block(
        ImageSystem, lora_rank=32, lora_alpha=32.0, lora_target="to_q,to_k,to_v,to_out.0"
    )
    run: ImageRun = block(ImageRun, output_dir=f"runs/{Path(__file__).stem}", eval_every=20, save_every=200)


class Sampler(NamedTuple):
    """What images are drawn with, and the reward that scores them."""

    pipe: Any
    policy: nn.Module
    ref_policy: nn.Module | None  # a frozen copy; None: the policy with adapters off
    has_reference: bool  # False: the policy is trained whole and nothing compares it with the base model
    schedule: diffusion.Schedule
    reward: Reward
    size: int  # pixels of a side
    device: torch.device
    encoded: diffusion.Encoded  # prompts so far


def image_and_noise(p: Tensor, x: Tensor, schedule: diffusion.Schedule, i: int) -> tuple[Tensor, Tensor]:
    """x_0 and eps of x = s x_0 + n eps before step i, from the prediction p at x; all of one shape.

    p is eps itself, v = s eps - n x_0 where s^2 + n^2 = 1, or a flow's eps - x_0 where s + n = 1. Only the
    first divides by s, which is 0 where a flow begins.
    """
    s, n = schedule.signal[i], schedule.noise[i]
    if schedule.predicts == "noise":
        return (x - n * p) / s, p
    if schedule.predicts == "v":
        return s * x - n * p, s * p + n * x
    return x - n * p, x + s * p


def sampler_step(p: Tensor, x: Tensor, schedule: diffusion.Schedule, i: int) -> Tensor:
    """Step i, without noise of its own: DDIM's with eta 0, https://arxiv.org/abs/2010.02502, or a flow's."""
    x_0, eps = image_and_noise(p, x, schedule, i)
    return schedule.signal[i + 1] * x_0 + schedule.noise[i + 1] * eps


def guided(p_empty: Tensor, p_prompt: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, https://arxiv.org/abs/2207.12598, with scale counted as in diffusers."""
    return p_empty + scale * (p_prompt - p_empty)


def denoise(
    predict: Callable[[Tensor, int], Tensor],
    predict_base: Callable[[Tensor, int], Tensor] | None,
    x: Tensor,
    schedule: diffusion.Schedule,
    num_grad_steps: int,
    step_checkpointing: bool = False,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """DRaFT-K: from noise x to the sample x_0, gradients through the last num_grad_steps steps only.

    Args:
        predict, predict_base: (x, i) -> prediction at sampler step i of S, of the policy and the base model.
        step_checkpointing: keep only the latents between steps; predict again in backward.
        first: the step that x is the latent of.

    Returns:
        x_0, and (B,) the mean of (p - p_base)^2 over these steps and all dimensions, both at the policy's
        latents. Gradients of p_base with respect to x are left out (departure 2); zero without predict_base.
    """
    num_steps = len(schedule.signal) - 1
    kl = x.new_zeros(len(x))
    with torch.no_grad():
        for i in range(first, num_steps - num_grad_steps):
            x = sampler_step(predict(x, i), x, schedule, i)
    for i in range(max(first, num_steps - num_grad_steps), num_steps):
        p = recompute(predict, x, i, **diffusion.RECOMPUTE) if step_checkpointing else predict(x, i)
        if predict_base is not None:
            with torch.no_grad():
                p_base = predict_base(x, i)
            kl = kl + (p - p_base).square().flatten(1).mean(1) / num_grad_steps
        x = sampler_step(p, x, schedule, i)
    return x, kl


def renoise(x_0: Tensor, noise: Tensor, schedule: diffusion.Schedule, i: int) -> Tensor:
    """DRaFT-LV: another latent before step i, from the finished sample and without its gradient."""
    return schedule.signal[i] * x_0.detach() + schedule.noise[i] * noise


def annealed(predict: Callable, predict_base: Callable, weights: list[float]) -> Callable:
    """Annealed importance guidance: weights[i] of the policy's prediction at step i, the rest base's."""

    def mixed(x: Tensor, i: int) -> Tensor:
        w = weights[i]
        p = (1 - w) * predict_base(x, i) if w < 1 else 0.0  # a model that has no share is not asked
        return p + w * predict(x, i) if w > 0 else p

    return mixed


def annealing_weights(name: str, num_steps: int) -> list[float]:
    """Shares of the tuned model at the steps 0 .. S - 1, under NeMo-Aligner's names.

    Raises:
        RunError: no such name.
    """
    same = {"base": "step_1", "draft": "step_0", "linear": "power_1"}
    found = re.fullmatch(r"(power|step)_(\d*\.?\d+)", same.get(name, name))
    if not found:
        raise formats.wrong("schedules", name, "base, draft, linear, power_p or step_p, with a number p")
    shape, p = found[1], float(found[2])
    t = (i / num_steps for i in range(num_steps))  # never reaches 1
    return [x**p if shape == "power" else float(x >= p) for x in t]


def draft_loss(rewards: Tensor, kl: Tensor, kl_coef: float) -> Tensor:
    """The loss of each image, DRaFT+'s with kl_coef > 0; rewards and kl (B,). -> (B,)"""
    return -rewards + kl_coef * kl


def predictors(sampler: Sampler, prompts: list[str], scale: float) -> tuple[Callable, Callable | None]:
    """Predictions (x, i) -> p of the policy for these prompts, and of the base model, None if not at hand.

    Both are guided, and float32 whatever the compute dtype.
    """
    pipe, device = sampler.pipe, sampler.device
    diffusion.encode_all(pipe, prompts, sampler.encoded, len(prompts), device)
    given = diffusion.conditions(pipe, sampler.encoded, prompts, sampler.size, scale, device)
    is_guided = diffusion.has_guidance(pipe, scale)

    def predict(x: Tensor, i: int, denoiser: nn.Module = sampler.policy) -> Tensor:
        rows = torch.cat([x, x]) if is_guided else x  # without and with the prompt
        p = diffusion.prediction(denoiser, rows, sampler.schedule.timesteps[i], given)
        return guided(*p.chunk(2), scale) if is_guided else p

    def predict_base(x: Tensor, i: int) -> Tensor:
        with models.reference(sampler.policy, sampler.ref_policy) as denoiser:
            return predict(x, i, denoiser)

    return predict, predict_base if sampler.has_reference else None


def losses_and_images(
    sampler: Sampler, x_0: Tensor, kl: Tensor, micro_batch: diffusion.MicroBatch, args: Args
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Losses (B,) and metrics (B,) of finished samples, and their images (B, 3, H, W) in [0, 1]."""
    pixels = diffusion.decode(sampler.pipe.vae, x_0, args.system.step_checkpointing)
    images = pixels.clamp(0, 1)  # a clamped pixel passes no gradient
    parts = sampler.reward(micro_batch.prompts, images, micro_batch.records)  # (B, R)
    rewards = parts @ sampler.reward.weights
    losses = draft_loss(rewards, kl, args.kl_coef)
    metrics = {
        "loss": losses.detach(),
        "reward": rewards.detach(),
        "reward_std": rewards.detach() ** 2,  # made a standard deviation by conclude()
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
    both, schedule = predictors(sampler, micro_batch.prompts, args.guidance_scale), sampler.schedule
    first, samples = 0, []
    for copy in range(args.num_lv):
        at = (args.seed, step, micro_batch.indices)
        x = diffusion.noise(*at, sampler.pipe, sampler.size, sampler.device, copy)
        if copy:  # the last step again, K = 1
            first = args.num_inference_steps - 1
            x = renoise(samples[0][0], x, schedule, first)
        samples.append(denoise(*both, x, schedule, num_grad_steps, args.system.step_checkpointing, first))
    loss, totals = 0.0, Counter()
    for x_0, kl in samples:
        losses, metrics, _ = losses_and_images(sampler, x_0, kl, micro_batch, args)
        loss = loss + losses @ micro_batch.weights / len(samples)
        totals.update({name: value @ micro_batch.weights / len(samples) for name, value in metrics.items()})
    num_images = micro_batch.weights.sum()
    return loss, {name: (total, num_images) for name, total in totals.items()}


@torch.no_grad()
def draw_images(
    sampler: Sampler, examples: list[Example], args: Args, name: str = "", first: int = 0
) -> tuple[pictures.Drawn, dist.Totals]:
    """Draw prompts from the noises of step 0, by the policy or a schedule's name; also this rank's metrics.

    The prompts are a piece of a list, from its prompt `first` on."""
    totals, found, count = dist.Totals(), [], args.run.images_per_prompt
    items = [example for example in examples for _ in range(count)]
    for micro_batch in diffusion.micro_batches(items, args.system.micro_batch_size, sampler.device):
        predict, predict_base = predictors(sampler, micro_batch.prompts, args.guidance_scale)
        if name:
            weights = annealing_weights(name, args.num_inference_steps)
            predict, predict_base = annealed(predict, predict_base, weights), None
        indices = [first * count + i for i in micro_batch.indices]
        x = diffusion.noise(args.seed, 0, indices, sampler.pipe, sampler.size, sampler.device)
        x_0, kl = denoise(predict, predict_base, x, sampler.schedule, most_grad_steps(args))
        _, metrics, images = losses_and_images(sampler, x_0, kl, micro_batch, args)
        num_images = micro_batch.weights.sum()
        totals.update({name: (value @ micro_batch.weights, num_images) for name, value in metrics.items()})
        if num_images > 0:  # else it only keeps collectives matched
            parts = (images.mul(255).round().byte(), metrics["reward"], sampler.reward.features(images))
            found += zip(micro_batch.indices, *(part.cpu() for part in parts), strict=True)
    return pictures.gathered(found), totals


def most_grad_steps(args: Args) -> int:
    return args.num_grad_steps or args.num_inference_steps


def grad_steps(step: int, args: Args) -> int:
    """K of an optimizer step."""
    most = most_grad_steps(args)
    return int(np.random.default_rng((args.seed, step)).integers(1, most + 1)) if args.random_k else most


def check(args: Args) -> None:
    """Refuse settings that do not go together, before anything is loaded."""
    K, S, run = args.num_grad_steps, args.num_inference_steps, args.run
    for name, value, is_good, expected in (
        ("num_grad_steps", K, 0 <= K <= S, f"0 to {S}, all steps"),
        ("num_lv", args.num_lv, 1 in (K, args.num_lv), "num_grad_steps 1: it repeats the last step"),
        ("num_samples", run.num_samples, run.num_samples >= 1, "at least 1: images are compared"),
        ("lora_scale", run.lora_scale, run.lora_scale == 1 or run.draw_prompts, "1 without draw_prompts"),
    ):
        if not is_good:
            raise formats.wrong(name, value, expected)
    for name in run.schedules.split(","):
        annealing_weights(name, S)


def setup(args: Args, pipe: Any, policy: nn.Module, ref_policy: nn.Module | None, examples: list) -> Sampler:
    """Everything else that images are drawn with; rewards are tried on the first of the examples."""
    size, device = diffusion.image_size(pipe, args.image_size), next(policy.parameters()).device
    diffusion.has_guidance(pipe, args.guidance_scale)  # refuses a scale that means nothing
    schedule = diffusion.schedule(pipe, args.num_inference_steps, size, device)
    reward = load_reward(args.reward, device, examples)
    has_reference = ref_policy is not None or pipelines.has_adapters(policy)
    return Sampler(pipe, policy, ref_policy, has_reference, schedule, reward, size, device, {})


def beside(args: Args) -> dict[str, str]:
    """The models that a run holds beside the policy, and where they are."""
    return {"reference": args.model} if args.system.lora_rank == 0 and args.kl_coef > 0 else {}


def load_reference(args: Args, device: torch.device) -> nn.Module:
    """A frozen copy of the model that training begins with."""
    return pipelines.load(args.model, device, args.system, args.seed, trainable=False)[1]


def checks(sampler: Sampler, prompts: list[str], args: Args) -> Iterator[certificate.Line]:
    """What --check tries: sampling against diffusers, the gradient of a reward, and the export."""
    device, scale, schedule = sampler.device, args.guidance_scale, sampler.schedule
    num_steps, K = args.num_inference_steps, most_grad_steps(args)
    is_low = models.resolve_dtype(args.system.dtype, device) != torch.float32
    part = diffusion.as_micro_batch([diffusion.as_example(x, {"prompt": x}) for x in prompts[:2]], device)
    start = diffusion.noise(args.seed, 0, part.indices, sampler.pipe, sampler.size, device)
    predict = predictors(sampler, part.prompts, scale)[0]
    yield certificate.of_duplicates(prompts)
    ours = denoise(predict, None, start, schedule, 0)[0]
    theirs = diffusion.drawn_by_diffusers(sampler.pipe, part.prompts, start, num_steps, scale)
    gap = ((ours - theirs).abs().mean() / ours.std()).item()
    yield certificate.at_most("latents against those of diffusers, relative", gap, 0.1 if is_low else 1e-2)

    def loss() -> Tensor:  # of the last K steps alone, as their gradient is
        first = num_steps - K
        middle = renoise(ours, start, schedule, first)
        x_0, kl = denoise(predict, None, middle, schedule, K, args.system.step_checkpointing, first)
        return losses_and_images(sampler, x_0, kl, part, args)[0].sum()

    slope = certificate.slope_over_norm(loss, sampler.policy, 0.05 if is_low else 2e-3)
    yield certificate.near("slope along the gradient over its norm", slope, 1.0, 0.5 if is_low else 0.05)
    with files.beside(args.run.output_dir) as folder, torch.no_grad():
        pipelines.export(folder, sampler.pipe, sampler.policy, args.model, args.run.merge_lora)
        dist.from_main(lambda: files.write(Path(folder) / "args.json", json.dumps({"model": args.model})))
        pipe = pipelines.read_pipeline(f"{folder}/model").to(device, sampler.pipe.text_encoder.dtype)
        read = sampler._replace(pipe=pipe, policy=pipelines.denoiser_of(pipe), encoded={})
        far = predict(start, 0) - predictors(read, part.prompts, scale)[0](start, 0)
    most = far.abs().max().item()
    yield certificate.at_most("export, loaded again, most of a prediction", most, 0.1 if is_low else 1e-2)


def draw_finished(args: Args, device: torch.device) -> None:
    """Draw run.draw_prompts with the model that a finished run left in output_dir; no training."""
    run, fixed = args.run, ("model", "guidance_scale", "num_inference_steps", "image_size")
    pipelines.check_finished(
        run.output_dir, {name: getattr(args, name) for name in fixed}, run.accept_changes
    )
    examples, title = diffusion.prompts_to_draw(run.draw_prompts)
    pipe, policy = pipelines.load(run.output_dir, device, args.system, args.seed, False, fuse=False)
    pipelines.scale_adapters(policy, run.lora_scale)
    ref_policy = None if pipelines.has_adapters(policy) else load_reference(args, device)
    sampler = setup(args, pipe, policy, ref_policy, examples)
    folder, texts = Path(run.output_dir) / "annealed" / title, diffusion.texts(examples)
    columns: dict[str, list] = {name: [] for name in run.schedules.split(",")}
    size = args.system.micro_batch_size * dist.world_size()
    for first in dist.progress(range(0, len(examples), size), "prompts", len(examples), lambda _: size):
        sampler.encoded.clear()
        for name, drawn in columns.items():
            piece, _ = draw_images(sampler, examples[first : first + size], args, name, first)
            pictures.save_images(folder / name, piece.images, first, run.images_per_prompt)
            shown = len(texts[first : run.num_samples]) * run.images_per_prompt
            drawn.append(piece._replace(images=piece.images[:shown]))  # the others are on disk
    joined = {name: pictures.joined(pieces) for name, pieces in columns.items()}
    pictures.save_schedules(folder, texts[: run.num_samples], joined, run.images_per_prompt)
    dist.from_main(lambda: files.write(folder / "prompts.txt", "\n".join(texts) + "\n"))


TOY = dict(num_inference_steps=20, guidance_scale=1.0, kl_coef=1.0, learning_rate=5e-4, warmup_steps=5)
TOY |= dict(batch_size=32, micro_batch_size=32, max_steps=30, lora_rank=0, eval_every=15, num_samples=24)
TOY |= dict(schedules="base,power_2.0,linear,draft")


def main(args: Args) -> None:
    # setup
    device = dist.init(args.seed)
    check(args)
    show_plan(args, beside, image_need)
    if args.run.draw_prompts:
        return draw_finished(args, device)
    optimization, run = args.optimization, args.run
    log = Log(run, __file__, SHOWN, snapshot(args, TOY))

    # data
    train_set, eval_set = diffusion.load_prompts(args.dataset, args.eval_dataset)
    num_steps = data.num_steps(train_set, optimization.batch_size, run.num_epochs, run.max_steps)
    shown = [*dict(zip(diffusion.texts(eval_set), eval_set, strict=True)).values()][: run.num_samples]
    prompts = diffusion.texts(shown)

    if log.is_finished(num_steps, files.inputs(args.model, None, train_set, eval_set)):
        return
    log.start(num_steps, optimization)

    # models
    pipe, policy = pipelines.load(args.model, device, args.system, args.seed)
    ref_policy = load_reference(args, device) if beside(args) else None
    sampler = setup(args, pipe, policy, ref_policy, train_set)
    certificate.run(run, checks(sampler, diffusion.texts(train_set), args))
    how = (optimization.batch_size, args.seed, run.num_epochs, run.max_steps)
    batches = [data.batch(train_set, step, *how) for step in range(1, num_steps + 1)]  # alike on every rank
    drawn_later = [example for example in shown for _ in range(run.images_per_prompt)]
    ahead = diffusion.encode_ahead(pipe, [*batches, drawn_later], args.system.micro_batch_size, device)
    sampler.encoded.update(ahead)
    groups = models.parameter_groups(policy, optimization.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    ema = pipelines.average(policy, args.ema_decay) if args.ema_decay > 0 else None
    parts = {"policy": (policy, optimizer)}
    if ema:
        parts["ema"] = (nn.ParameterList(ema.shadow_params), None)  # the same memory under names
    base, base_totals = draw_images(sampler, shown, args)  # before resume() changes the policy
    columns = {"base": base}  # drawn already, of the schedules at the end
    start_step = checkpoint.resume(run.output_dir, parts)["step"]

    def evaluate(step: int) -> dict[str, float]:
        with pipelines.averaged(policy, ema):
            drawn, totals = draw_images(sampler, shown, args) if step else (base, base_totals)
        columns["draft"] = drawn
        metrics = sampler.reward.conclude(totals.reduce("eval/"), "eval/")
        metrics["eval/reward/base"] = base.rewards.mean().item()
        metrics["eval/reward/gain"] = (drawn.rewards - base.rewards).mean().item()
        metrics["eval/diversity"] = pictures.diversity(drawn.features, run.images_per_prompt)
        metrics["eval/diversity/base"] = pictures.diversity(base.features, run.images_per_prompt)
        picture = log.folder / "images" / f"step_{step:08d}.png"
        pictures.save_grid(picture, prompts, {"base": base, "tuned": drawn})
        log.picture(step, picture)
        rows, scores = pictures.judged(prompts, drawn, base, judge)
        log.samples(step, rows)
        return metrics | {f"eval/judge/{name}": mean for name, mean in mean_scores(scores).items()}

    judge = load_judge(run.judge, args.dataset, toy="toy.images:judge")
    if start_step == 0:
        log(0, num_steps, evaluate(step=0))

    for step in range(start_step + 1, num_steps + 1):
        # update
        step_start, examples = time.perf_counter(), batches[step - 1]
        lr = optimization.learning_rate * models.lr_factor(step, num_steps, optimization)
        models.set_lr(optimizer, lr)
        totals, num_grad_steps = dist.Totals(), grad_steps(step, args)
        for micro_batch in diffusion.micro_batches(examples, args.system.micro_batch_size, device):
            loss, metrics = loss_and_metrics(sampler, micro_batch, step, num_grad_steps, args)
            (loss / len(examples)).backward()  # gradients add over micro-batches and ranks: the batch's mean
            totals.update(metrics)
        grad_norm = models.clip_grad_norm(policy, optimization.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if ema:
            ema.optimization_step = step - 1  # the decay grows with the steps of the run, resumed or not
            ema.step(pipelines.trained(policy))
        totals.update({"grad_norm": (grad_norm, 1)})
        metrics = sampler.reward.conclude(totals.reduce("train/"), "train/")  # the step's one synchronisation

        # evaluate
        metrics |= {
            "train/epoch": step * optimization.batch_size / train_set.epoch_size,
            "train/learning_rate": lr,
            "train/num_grad_steps": num_grad_steps,
            "train/images_per_second": len(examples) / (time.perf_counter() - step_start),
            **diffusion.memory(device),
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

    with pipelines.averaged(policy, ema):
        if sampler.has_reference:
            names = run.schedules.split(",")
            columns |= {n: draw_images(sampler, shown, args, n)[0] for n in names if n not in columns}
            drawn = {name: columns[name] for name in names}
            pictures.save_schedules(log.folder / "annealed", prompts, drawn, run.images_per_prompt)
            log.picture(num_steps, log.folder / "annealed" / "curve.png")
        pipelines.export(run.output_dir, pipe, policy, args.model, run.merge_lora)
    log.finish()


if __name__ == "__main__":
    dist.run(main, parse(Args, TOY))
