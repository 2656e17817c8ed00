"""Pictures to look at: images in a grid or one by one, reward over diversity; only rank 0 writes."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
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


def save_schedules(folder: Path, prompts: list[str], columns: dict[str, Drawn], count: int) -> None:
    """The grid of images, and the curve of reward over diversity, of `count` images a prompt."""
    points = {}
    for name, drawn in columns.items():
        spread = diversity(drawn.features, count)
        points[name] = {"diversity": spread, "reward": drawn.rewards.mean().item()}
    save_grid(folder / "grid.png", prompts, columns)
    save_curve(folder / "curve.png", points)


def diversity(features: Tensor, images_per_prompt: int) -> float:
    """Mean distance between two images of one prompt; features (prompts * images_per_prompt, F)."""
    groups = features.view(-1, images_per_prompt, features.shape[1])
    distances = torch.cdist(groups, groups, compute_mode="donot_use_mm_for_euclid_dist")
    pairs = images_per_prompt * (images_per_prompt - 1)
    return distances.sum().item() / (len(groups) * pairs) if pairs else 0.0


def save_grid(path: Path, prompts: list[str], columns: dict[str, Any]) -> None:
    """A PNG of the images of each prompt under each heading, side by side.

    Args:
        columns: heading -> what has `images` (N, 3, H, W) uint8 and `rewards` (N,), as many of each prompt.
    """
    if not dist.is_main():
        return
    from PIL import Image, ImageDraw, ImageFont

    first = next(iter(columns.values())).images
    count, side = len(first) // len(prompts), max(48, min(256, first.shape[-1]))
    width, height, margin = count * (side + 2) + 12, side + 24, 180
    font = ImageFont.load_default(size=13)
    sheet = Image.new("RGB", (margin + width * len(columns), 24 + height * len(prompts)), "white")
    pen = ImageDraw.Draw(sheet)
    for c, (heading, drawn) in enumerate(columns.items()):
        left = margin + c * width
        pen.text((left, 4), heading, "black", font)
        for r in range(len(prompts)):
            top, group = 24 + r * height, slice(r * count, (r + 1) * count)
            for i, image in enumerate(drawn.images[group]):
                tile = Image.fromarray(image.permute(1, 2, 0).numpy())
                small = tile.width < side  # the pixels of a toy stay pixels
                tile = tile.resize(
                    (side, side), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
                )
                sheet.paste(tile, (left + i * (side + 2), top))
            pen.text((left, top + side + 2), f"reward {drawn.rewards[group].mean():.3g}", "dimgray", font)
    for r, prompt in enumerate(prompts):
        pen.multiline_text((6, 28 + r * height), _wrapped(prompt, 25, 4), "black", font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def save_images(folder: Path, images: Any, first: int, count: int) -> None:
    """Each image in a PNG of its own, <prompt>_<image>.png: count of each prompt, which count from first."""
    if not dist.is_main():
        return
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        name = f"{first + i // count:05d}_{i % count}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name)


def save_prompts(folder: Path, prompts: list[str]) -> None:
    """The prompts of these images, one a line."""
    if dist.is_main():
        (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


def in_pieces(items: list, size: int) -> Iterator[tuple[list, int]]:
    """Pieces of a list and the place of each one's first item, with a bar that shows how far it is."""
    from tqdm import tqdm

    with tqdm(total=len(items), unit="prompt", disable=not dist.is_main()) as bar:
        for first in range(0, len(items), size):
            yield items[first : first + size], first
            bar.update(len(items[first : first + size]))


def judged(
    prompts: list[str], drawn: Any, base: Any, judge: Callable | None
) -> tuple[list[dict], list[dict[str, float]]]:
    """For each image a row for samples.jsonl, its prompt, rewards and the judge's scores; and the scores."""
    rows, scores, count = [], [], len(drawn.images) // len(prompts)
    for i, image in enumerate(drawn.images):
        row = {"prompt": prompts[i // count], "image": i % count, "reward": drawn.rewards[i].item()}
        row["reward_base"] = base.rewards[i].item()
        scores.append(judge(row["prompt"], image / 255) if judge else {})
        rows.append(row | scores[-1])
    return rows, scores


def _wrapped(text: str, width: int, lines: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text.encode("ascii", "replace").decode(), width)[:lines])


def save_curve(path: Path, points: dict[str, dict[str, float]]) -> None:
    """A PNG of reward over diversity, a point for each name; the numbers go into a .json beside it."""
    if not dist.is_main():
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5.2, 3.8))
    for i, (name, point) in enumerate(points.items()):
        at = (point["diversity"], point["reward"])
        axis.plot(*at, "o", color="tab:blue", markersize=5)
        axis.annotate(name, at, xytext=(6, -10 if i % 2 else 4), textcoords="offset points", fontsize=8)
    axis.set_xlabel("diversity: mean distance of two images of a prompt", fontsize=8)
    axis.set_ylabel("reward", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.margins(0.15)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    path.with_suffix(".json").write_text(json.dumps(points, indent=2) + "\n")
