"""Pictures to look at: images in a grid or one by one, reward over diversity; only rank 0 writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import dist


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


def save_images(folder: Path, prompts: list[str], columns: dict[str, Any]) -> None:
    """Each image in a PNG of its own, <heading>/<prompt>_<image>.png, and the prompts in prompts.txt."""
    if not dist.is_main():
        return
    from PIL import Image

    for heading, drawn in columns.items():
        (folder / heading).mkdir(parents=True, exist_ok=True)
        count = len(drawn.images) // len(prompts)
        for i, image in enumerate(drawn.images):
            name = f"{i // count:05d}_{i % count}.png"
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / heading / name)
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


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
