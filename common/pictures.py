"""Pictures to look at: images in a grid or one by one, reward over diversity; only rank 0 writes."""

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common import dist


class Drawn(NamedTuple):
    """Images to look at, as many in a row of each prompt; alike on every rank."""

    images: Tensor  # (N, 3, H, W) uint8
    rewards: Tensor  # (N,)
    features: Tensor  # (N, F)


def gathered(found: list[tuple]) -> Drawn:
    """All ranks' (index, image, reward, features), in order."""
    rows = sorted(dist.gather(found), key=lambda row: row[0])
    return Drawn(*(torch.stack(column) for column in list(zip(*rows, strict=True))[1:]))


def joined(pieces: list[Drawn]) -> Drawn:
    return Drawn(*map(torch.cat, zip(*pieces, strict=True)))


def diversity(features: Tensor, images_per_prompt: int) -> float:
    """Mean distance between two images of one prompt; features (prompts * images_per_prompt, F)."""
    groups = features.view(-1, images_per_prompt, features.shape[1])
    distances = torch.cdist(groups, groups, compute_mode="donot_use_mm_for_euclid_dist")
    pairs = images_per_prompt * (images_per_prompt - 1)
    return distances.sum().item() / (len(groups) * pairs) if pairs else 0.0


def judged(
    prompts: list[str], drawn: Drawn, base: Drawn, judge: Callable | None
) -> tuple[list[dict], list[dict[str, float]]]:
    """For each image a row for samples.jsonl, its prompt, rewards and the judge's scores; and the scores."""
    rows, scores, count = [], [], len(drawn.images) // len(prompts)
    for i, image in enumerate(drawn.images):
        row = {"prompt": prompts[i // count], "image": i % count, "reward": drawn.rewards[i].item()}
        row["reward_base"] = base.rewards[i].item()
        scores.append(judge(row["prompt"], image / 255) if judge else {})
        rows.append(row | scores[-1])
    return rows, scores


def save_grid(path: Path, prompts: list[str], columns: dict[str, Drawn]) -> None:
    """A PNG of the images of each prompt under each heading, side by side; columns by their headings."""
    if not dist.is_main():
        return
    from matplotlib.figure import Figure

    images = torch.cat([drawn.images for drawn in columns.values()])
    side, count = max(48, min(256, images.shape[-1])), len(images) // len(columns) // len(prompts)
    how = "nearest" if side > images.shape[-1] else "area"  # the pixels of a toy stay pixels
    images = F.pad(F.interpolate(images.float(), side, mode=how), (2, 2, 2, 20), value=255)
    tiles = images.unflatten(0, (len(columns), len(prompts), count)).byte()
    sheet = tiles.permute(1, 4, 0, 2, 5, 3).flatten(2, 4).flatten(0, 1)  # (height, width, 3)
    scale = min(1, 2**15 / max(sheet.shape)) / 100  # inches of a pixel; matplotlib draws 2^16 dots at most
    figure = Figure([scale * n for n in sheet.shape[1::-1]], dpi=100)
    axis = figure.add_axes((0, 0, 1, 1), frameon=False)
    axis.imshow(sheet)
    width, height = count * (side + 4), side + 22
    axis.set_xticks([width * (c + 0.5) for c in range(len(columns))], columns, parse_math=False)
    texts = [textwrap.fill(prompt, 25, max_lines=4) for prompt in prompts]
    axis.set_yticks([height * (r + 0.5) for r in range(len(prompts))], texts, parse_math=False)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    for c, drawn in enumerate(columns.values()):
        for r, rewards in enumerate(drawn.rewards.split(count)):
            at = c * width + 2, (r + 1) * height - 6
            axis.text(*at, f"reward {rewards.mean():.3g}", color="dimgray", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")


def save_schedules(folder: Path, prompts: list[str], columns: dict[str, Drawn], count: int) -> None:
    """The grid of images, `count` of a prompt, and reward over diversity as a curve and in a .json."""
    save_grid(folder / "grid.png", prompts, columns)
    if not dist.is_main():
        return
    from matplotlib.figure import Figure

    points = {}
    figure = Figure(figsize=(5.2, 3.8), layout="tight")
    axis = figure.subplots()
    for name, drawn in columns.items():
        x, y = diversity(drawn.features, count), drawn.rewards.mean().item()
        points[name] = {"diversity": x, "reward": y}
        axis.plot(x, y, "o", color="tab:blue")
        axis.annotate(name, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axis.set(xlabel="diversity: mean distance of two images of a prompt", ylabel="reward")
    axis.margins(0.15)
    axis.grid(alpha=0.3)
    figure.savefig(folder / "curve.png", dpi=120)
    (folder / "curve.json").write_text(json.dumps(points, indent=2) + "\n")


def save_images(folder: Path, images: Tensor, first: int, count: int) -> None:
    """Each image in a PNG of its own, <prompt>_<image>.png: count of each prompt, which count from first."""
    if not dist.is_main():
        return
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        name = f"{first + i // count:05d}_{i % count}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name)
