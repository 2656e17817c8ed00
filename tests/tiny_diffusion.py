"""Random diffusion pipelines and CLIP rewards of a few thousand parameters, for the tests."""

import json
from pathlib import Path
from typing import Any

import torch


def tokenizer(length: int = 16) -> Any:
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={n: i for i, n in enumerate(names)}, merges=[], model_max_length=length)


def text_settings(words: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(words),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": words.model_max_length,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }


def widen(model: torch.nn.Module) -> torch.nn.Module:
    """Larger weights than at a fresh start, so that prompts, steps and adapters matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(1.5)
    return model.eval()


def make_pipeline(folder: Path, xl: bool = False, **scheduler: Any) -> str:
    """A Stable Diffusion (XL) pipeline of 16 x 16 images on 8 x 8 latents, saved in diffusers' form."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    words = tokenizer()
    extra = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    }
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32 if xl else 16,
        attention_head_dim=8,
        norm_num_groups=4,
        **(extra if xl else {}),
    )
    vae = diffusers.AutoencoderKL(
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=16,
    )
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    parts = {"vae": vae, "unet": widen(unet), "tokenizer": words}
    if xl:
        config = CLIPTextConfig(**text_settings(words), projection_dim=16)
        pipe = diffusers.StableDiffusionXLPipeline(
            **parts,
            text_encoder=widen(CLIPTextModel(config)),
            text_encoder_2=widen(CLIPTextModelWithProjection(config)),
            tokenizer_2=words,
            scheduler=diffusers.EulerDiscreteScheduler(**schedule, timestep_spacing="leading", **scheduler),
        )
    else:
        schedule |= {"clip_sample": False, "set_alpha_to_one": True}
        pipe = diffusers.StableDiffusionPipeline(
            **parts,
            text_encoder=widen(CLIPTextModel(CLIPTextConfig(**text_settings(words)))),
            scheduler=diffusers.DDIMScheduler(**{**schedule, **scheduler}),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.save_pretrained(folder)
    return str(folder)


def make_clip(folder: Path, size: int = 24) -> str:
    """A CLIP model and its processor, which resizes pictures to `size` and crops 16 x 16 out of them."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(1)
    words = tokenizer()
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = CLIPConfig(
        text_config=text_settings(words),
        vision_config={**vision, "image_size": 16, "patch_size": 4},
        projection_dim=8,
    )
    widen(CLIPModel(config)).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": size}, "crop_size": {"height": 16, "width": 16}}
    CLIPProcessor(CLIPImageProcessor(**sizes), words).save_pretrained(folder)
    return str(folder)


def write_prompts(folder: Path) -> str:
    """Prompts of a train and a test split."""
    for split, count in (("train", 40), ("test", 6)):
        lines = [json.dumps({"prompt": f"{split} {i} cats"}) for i in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return str(folder)
