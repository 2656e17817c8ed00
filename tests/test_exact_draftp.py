"""The sampler of draftp.py against finite differences (E13) and a closed form (E14), in float64."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import draftp
from common.diffusion import Schedule

D, S = 3, 5
ALPHAS = torch.linspace(0.05, 0.98, S + 1, dtype=torch.float64)
SIGMAS = torch.linspace(1, 0, S + 1, dtype=torch.float64) ** 0.7


def ddim(alphas: Tensor, predicts: str = "noise") -> Schedule:
    return Schedule([0.0] * (len(alphas) - 1), alphas.sqrt(), (1 - alphas).sqrt(), predicts)


def flow(sigmas: Tensor) -> Schedule:
    return Schedule([0.0] * (len(sigmas) - 1), 1 - sigmas, sigmas, "flow")


# v and the flow begin at pure noise
SCHEDULES = {"ddim": ddim(ALPHAS), "v": ddim(ALPHAS - ALPHAS[0], "v"), "flow": flow(SIGMAS)}


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return SCHEDULES[request.param]


def draws(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def linear_model(requires_grad: bool = True) -> SimpleNamespace:
    """Predictions p_t(x) = W_t x + b_t, each step with parameters of its own."""
    w, b = draws(1, S, D, D, scale=0.3), draws(2, S, D, scale=0.1)
    return SimpleNamespace(w=w.requires_grad_(requires_grad), b=b.requires_grad_(requires_grad))


def predict(model: SimpleNamespace) -> Callable[[Tensor, int], Tensor]:
    return lambda x, i: x @ model.w[i].T + model.b[i]


NOISE, GOAL = draws(3, 64, D), draws(4, D)


def loss_of(
    model: SimpleNamespace,
    num_grad_steps: int,
    schedule: Schedule,
    base: SimpleNamespace | None = None,
    kl_coef: float = 0.0,
    step_checkpointing: bool = False,
) -> Tensor:
    """The script's loss, averaged over 64 fixed noises, with reward -|x_0 - m|^2 / 2."""
    predict_base = predict(base) if base else None
    x_0, kl = draftp.denoise(
        predict(model), predict_base, NOISE, schedule, num_grad_steps, step_checkpointing
    )
    rewards = -(x_0 - GOAL).square().sum(1) / 2
    return draftp.draft_loss(rewards, kl, kl_coef).mean()


def gradients(loss: Tensor, model: SimpleNamespace) -> tuple[Tensor, Tensor]:
    return torch.autograd.grad(loss, (model.w, model.b))


def central_differences(loss: Callable[[], Tensor], parameter: Tensor, h: float = 1e-5) -> Tensor:
    found, flat = torch.zeros(parameter.numel(), dtype=torch.float64), parameter.data.view(-1)
    with torch.no_grad():
        for i in range(len(flat)):
            before = flat[i].item()
            ends = []
            for shifted in (before + h, before - h):
                flat[i] = shifted
                ends.append(loss().item())
            flat[i] = before
            found[i] = (ends[0] - ends[1]) / (2 * h)
    return found.view_as(parameter)


# E13: the gradient


def test_the_gradient_through_all_steps_is_that_of_finite_differences(schedule: Schedule) -> None:
    model = linear_model()
    for found, parameter in zip(
        gradients(loss_of(model, S, schedule), model), (model.w, model.b), strict=True
    ):
        expected = central_differences(lambda: loss_of(model, S, schedule), parameter)
        assert (found - expected).abs().max() < 1e-8


def test_with_the_kl_term_too_where_the_base_does_not_depend_on_the_latents(schedule: Schedule) -> None:
    model, base = linear_model(), linear_model(False)
    base.w, base.b = torch.zeros_like(base.w), base.b + 0.2
    _, found = gradients(loss_of(model, S, schedule, base, kl_coef=2.0), model)
    expected = central_differences(lambda: loss_of(model, S, schedule, base, kl_coef=2.0), model.b)
    assert (found - expected).abs().max() < 1e-8


@pytest.mark.parametrize("k", [1, 2, 3])
def test_draft_k_cuts_off_the_early_steps_and_leaves_the_last_as_they_are(k: int, schedule: Schedule) -> None:
    model = linear_model()
    whole, cut = (gradients(loss_of(model, steps, schedule), model) for steps in (S, k))
    for full, part in zip(whole, cut, strict=True):
        assert part[: S - k].eq(0).all()  # exactly
        assert torch.equal(part[S - k :], full[S - k :])
        assert full[: S - k].abs().min() > 0


@pytest.mark.parametrize("k", [1, 3, S])
def test_step_checkpointing_changes_nothing(k: int, schedule: Schedule) -> None:
    model, base = linear_model(), linear_model(False)
    base.b = base.b + 0.1
    for on, off in zip(
        gradients(loss_of(model, k, schedule, base, 0.5, step_checkpointing=True), model),
        gradients(loss_of(model, k, schedule, base, 0.5), model),
        strict=True,
    ):
        assert torch.equal(on, off)


def test_a_latent_detached_between_steps_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch, schedule: Schedule
) -> None:
    model, honest = linear_model(), draftp.sampler_step
    expected = central_differences(lambda: loss_of(model, S, schedule), model.b)
    monkeypatch.setattr(draftp, "sampler_step", lambda p, x, *at: honest(p, x.detach(), *at))
    found = gradients(loss_of(model, S, schedule), model)[1]
    assert (found - expected).abs().max() > 1e-2


def test_latents_of_inference_mode_would_raise() -> None:
    model = linear_model()
    with torch.inference_mode():
        x, _ = draftp.denoise(predict(model), None, NOISE, ddim(ALPHAS[:3]), 1)
    with pytest.raises(RuntimeError, match="[Ii]nference"):
        draftp.denoise(predict(model), None, x, ddim(ALPHAS[2:]), 3)


def test_the_base_is_a_constant_at_the_policys_latents(schedule: Schedule) -> None:
    """Departure 2: d p_base / dx is left out where x carries a gradient."""
    model, base = linear_model(), linear_model(False)
    base.b = base.b + 0.3

    def by_hand(cut: bool) -> Tensor:
        x, kl = NOISE, 0.0
        for i in range(S):
            e, e_base = predict(model)(x, i), predict(base)(x, i)
            kl = kl + (e - (e_base.detach() if cut else e_base)).square().mean(1) / S
            x = draftp.sampler_step(e, x, schedule, i)
        return draftp.draft_loss(-(x - GOAL).square().sum(1) / 2, kl, 2.0).mean()

    ours = gradients(loss_of(model, S, schedule, base, 2.0), model)[1]
    torch.testing.assert_close(ours, gradients(by_hand(cut=True), model)[1], rtol=0, atol=1e-12)
    full = gradients(by_hand(cut=False), model)[1]
    expected = central_differences(lambda: loss_of(model, S, schedule, base, 2.0), model.b)
    torch.testing.assert_close(full, expected, rtol=0, atol=1e-7)
    assert (ours - full).abs().max() > 1e-3


def test_gradients_of_lora_are_those_of_finite_differences() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D, D)).double()
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=6, target_modules=["0"]), net)
    trained = [p for p in net.parameters() if p.requires_grad]
    assert len(trained) == 2
    for p in trained:
        p.data = p.data.double()
    trained[1].data += draws(5, *trained[1].shape, scale=0.3)

    def loss() -> Tensor:
        x_0, _ = draftp.denoise(lambda x, i: net(x), None, NOISE, SCHEDULES["flow"], S)
        return (x_0 - GOAL).square().sum(1).mean() / 2

    for found, parameter in zip(torch.autograd.grad(loss(), trained), trained, strict=True):
        assert (found - central_differences(loss, parameter)).abs().max() < 1e-6


# E14: the optimum of the regularised objective


def sampler_constants(schedule: Schedule) -> tuple[float, Tensor]:
    """x_0 = A noise + sum_t B_t p_t for predictions p_t that do not depend on x: each step is k x + c p."""
    s, to_s, n, to_n = schedule.signal[:-1], schedule.signal[1:], schedule.noise[:-1], schedule.noise[1:]
    if schedule.predicts == "noise":
        k, c = to_s / s, to_n - to_s * n / s
    elif schedule.predicts == "v":
        k, c = to_s * s + to_n * n, to_n * s - to_s * n
    else:
        k, c = torch.ones_like(n), to_n - n  # Euler's step over the change of sigma
    return k.prod().item(), torch.stack([c[t] * k[t + 1 :].prod() for t in range(S)])


def optimum(kl_coef: float, num_grad_steps: int, schedule: Schedule) -> Tensor:
    """delta_t* = -(d / 2 lambda) B_t rho for the last steps, 0 before; lambda = kl_coef / K."""
    scale, constants = sampler_constants(schedule)
    b = constants * (torch.arange(S) >= S - num_grad_steps)
    c = D / (2 * kl_coef / num_grad_steps)
    base = linear_model(False).b
    mean = scale * NOISE.mean(0) + constants @ base
    rho = (mean - GOAL) / (1 + c * (b**2).sum())
    return -c * b[:, None] * rho


def shifted_loss(delta: Tensor, kl_coef: float, num_grad_steps: int, schedule: Schedule) -> Tensor:
    """The script's loss where the base predicts b_t and the policy b_t + delta_t."""
    b = linear_model(False).b
    policy, base = (lambda x, i: (b + delta)[i].expand_as(x)), (lambda x, i: b[i].expand_as(x))
    x_0, kl = draftp.denoise(policy, base, NOISE, schedule, num_grad_steps)
    return draftp.draft_loss(-(x_0 - GOAL).square().sum(1) / 2, kl, kl_coef).mean()


@pytest.mark.parametrize("k", [1, 2, S])
def test_the_loss_is_least_at_the_closed_form(k: int, schedule: Schedule) -> None:
    delta = torch.zeros(S, D, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([delta], max_iter=100, tolerance_grad=1e-13, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = shifted_loss(delta, 0.2 * k, k, schedule)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (delta - optimum(0.2 * k, k, schedule)).abs().max() < 1e-8
    assert optimum(0.2 * k, k, schedule).abs().max() > 0.1
    # the factor 1 / d dropped, or K forgotten, is another optimum
    assert (delta - optimum(0.2 * k / D, k, schedule)).abs().max() > 1e-2
    assert k == 1 or (delta - optimum(0.2, k, schedule)).abs().max() > 1e-2


def test_the_scripts_optimizer_gets_there() -> None:
    schedule = SCHEDULES["flow"]
    delta = torch.zeros(S, D, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([delta], lr=0.05, betas=(0.9, 0.999), weight_decay=0.0)
    for step in range(1000):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 1000)
        shifted_loss(delta, 0.2 * S, S, schedule).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (delta - optimum(0.2 * S, S, schedule)).abs().max() < 1e-3


def test_a_linear_reward_has_its_closed_form(schedule: Schedule) -> None:
    g, (_, b) = draws(6, D), sampler_constants(schedule)
    delta = torch.zeros(S, D, dtype=torch.float64, requires_grad=True)
    base = linear_model(False).b
    policy, reference = (lambda x, i: (base + delta)[i].expand_as(x)), (lambda x, i: base[i].expand_as(x))
    expected = D / (2 * 0.2) * b[:, None] * g
    with torch.no_grad():
        delta += expected
    x_0, kl = draftp.denoise(policy, reference, NOISE, schedule, S)
    (found,) = torch.autograd.grad(draftp.draft_loss(x_0 @ g, kl, 0.2 * S).mean(), delta)
    assert found.abs().max() < 1e-12


# by hand


@pytest.mark.parametrize(("kl_coef", "loss", "gradient"), [(0.0, 0.5625, -2.25), (0.1, 0.5785, -2.09)])
def test_one_step_by_hand(kl_coef: float, loss: float, gradient: float) -> None:
    # x_0 = (2 - .6 * .5 * 2) / .8 = 1.75; .75^2; 2 * .75 * -1.5; KL (2 * .2)^2, its gradient 2 * .4 * 2
    theta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x, alphas = torch.full((1, 1), 2.0, dtype=torch.float64), torch.tensor([0.64, 1.0], dtype=torch.float64)
    x_0, kl = draftp.denoise(lambda x, i: theta * x, lambda x, i: 0.3 * x, x, ddim(alphas), 1)
    found = draftp.draft_loss(-((x_0[:, 0] - 1) ** 2), kl, kl_coef).sum()
    found.backward()
    assert x_0.item() == pytest.approx(1.75, abs=1e-12)
    assert (found.item(), theta.grad.item()) == (
        pytest.approx(loss, abs=1e-12),
        pytest.approx(gradient, abs=1e-12),
    )


def test_the_kl_term_is_that_of_a_ddpm_step_up_to_its_weight() -> None:
    # |mu - mu'|^2 / (2 variance), where mu - mu' = beta / sqrt(alpha (1 - alphabar)) (eps - eps')
    beta, alphabar, variance = 0.02, 0.5, 0.02
    weight = beta**2 / (2 * variance * (1 - beta) * (1 - alphabar))
    eps, base = (lambda x, i: torch.full_like(x, 0.4)), (lambda x, i: torch.full_like(x, 0.1))
    _, kl = draftp.denoise(eps, base, torch.zeros(1, 1), ddim(torch.tensor([alphabar, 1.0])), 1)
    assert weight * kl.item() == pytest.approx(0.00183673, abs=1e-8)


def test_guidance_by_hand() -> None:
    assert draftp.guided(torch.tensor(1.0), torch.tensor(3.0), 7.5).item() == 16.0


def test_each_prediction_stands_for_its_image_and_noise(schedule: Schedule) -> None:
    image, eps, s, n = draws(7, 4), draws(8, 4), schedule.signal[2], schedule.noise[2]
    p = {"noise": eps, "v": s * eps - n * image, "flow": eps - image}[schedule.predicts]
    found = draftp.image_and_noise(p, s * image + n * eps, schedule, 2)
    torch.testing.assert_close(found, (image, eps))


def test_a_flow_steps_as_eulers_method_from_pure_noise() -> None:
    x, u, schedule = draws(7, 4), draws(8, 4), flow(SIGMAS)
    torch.testing.assert_close(
        draftp.sampler_step(u, x, schedule, 0), x + (SIGMAS[1] - SIGMAS[0]) * u, rtol=0, atol=1e-14
    )


def test_renoised_samples_carry_no_gradient() -> None:
    x_0 = draws(9, 2, 3).requires_grad_(True)
    x = draftp.renoise(x_0, draws(10, 2, 3), ddim(torch.tensor([0.64, 1.0], dtype=torch.float64)), 0)
    torch.testing.assert_close(x, 0.8 * x_0.detach() + 0.6 * draws(10, 2, 3))
    assert not x.requires_grad


# annealed importance guidance


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("base", [0, 0, 0, 0]),
        ("draft", [1, 1, 1, 1]),
        ("linear", [0, 0.25, 0.5, 0.75]),
        ("power_2.0", [0, 1 / 16, 1 / 4, 9 / 16]),
        ("power_0.5", [0, 0.5, math.sqrt(0.5), math.sqrt(0.75)]),
        ("step_0.5", [0, 0, 1, 1]),
        ("step_0.6", [0, 0, 0, 1]),
        ("step_0", [1, 1, 1, 1]),
    ],
)
def test_schedules_by_hand(name: str, weights: list[float]) -> None:
    assert draftp.annealing_weights(name, 4) == pytest.approx(weights)


@pytest.mark.parametrize("name", ["policy", "power", "power_x", "step_-1", "", "linear_2x"])
def test_other_schedules_are_refused(name: str) -> None:
    with pytest.raises(draftp.dist.RunError, match="power_p or step_p"):
        draftp.annealing_weights(name, 4)


def drawn(model: Any, base: Any, schedule: Schedule, weights: list[float]) -> torch.Tensor:
    """The sample of the noise under annealed guidance."""
    mixed = draftp.annealed(predict(model), predict(base), weights)
    return draftp.denoise(mixed, None, NOISE, schedule, 0)[0]


def test_the_ends_of_annealing_are_the_two_models_exactly(schedule: Schedule) -> None:
    model, base = linear_model(False), linear_model(False)
    base.b = base.b + 0.5
    for name, one in (("base", base), ("draft", model)):
        x = drawn(model, base, schedule, draftp.annealing_weights(name, S))
        assert torch.equal(x, draftp.denoise(predict(one), None, NOISE, schedule, S)[0])
    between = drawn(model, base, schedule, draftp.annealing_weights("linear", S))
    assert (between - x).abs().max() > 1e-3


def test_between_equal_models_annealing_changes_nothing(schedule: Schedule) -> None:
    model = linear_model(False)
    x = drawn(model, model, schedule, [0.5] * S)
    torch.testing.assert_close(x, draftp.denoise(predict(model), None, NOISE, schedule, S)[0])
