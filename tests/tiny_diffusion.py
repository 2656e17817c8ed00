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


def t5(width: int) -> tuple[Any, Any]:
    """A T5 of letters and its tokenizer."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *letters]
    words = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=16)
    sizes = {"d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
    config = T5Config(vocab_size=len(words), d_model=width, dropout_rate=0.0, **sizes)
    return widen(T5EncoderModel(config)), words


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


def make_pipeline(folder: Path, kind: str = "sd", **scheduler: Any) -> str:
    """A pipeline of 16 x 16 images on 8 x 8 latents, of kind sd, xl, sd3 or flux, in diffusers' form."""
    torch.manual_seed(0)
    {"sd": _sd, "xl": _xl, "sd3": _sd3, "flux": _flux}[kind](tokenizer(), scheduler).save_pretrained(folder)
    return str(folder)


def _vae(**extra: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=16,
        **extra,
    )


FLOW_VAE = {"scaling_factor": 1.5, "shift_factor": 0.1, "use_post_quant_conv": False}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def _unet(width: int, **extra: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return widen(
        UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=width,
            attention_head_dim=8,
            norm_num_groups=4,
            **extra,
        )
    )


def _sd(words: Any, scheduler: dict) -> Any:
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    schedule = {**SCHEDULE, "clip_sample": False, "set_alpha_to_one": True, **scheduler}
    return diffusers.StableDiffusionPipeline(
        unet=_unet(16),
        vae=_vae(),
        tokenizer=words,
        text_encoder=widen(CLIPTextModel(CLIPTextConfig(**text_settings(words)))),
        scheduler=diffusers.DDIMScheduler(**schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _xl(words: Any, scheduler: dict) -> Any:
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    extra["projection_class_embeddings_input_dim"] = 16 + 6 * 8
    config = CLIPTextConfig(**text_settings(words), projection_dim=16)
    return diffusers.StableDiffusionXLPipeline(
        unet=_unet(32, **extra),
        vae=_vae(),
        tokenizer=words,
        tokenizer_2=words,
        text_encoder=widen(CLIPTextModel(config)),
        text_encoder_2=widen(CLIPTextModelWithProjection(config)),
        scheduler=diffusers.EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading", **scheduler),
    )


def _sd3(words: Any, scheduler: dict) -> Any:
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(**text_settings(words), projection_dim=16)
    text_encoder_3, tokenizer_3 = t5(32)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=6,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        vae=_vae(**FLOW_VAE),
        transformer=widen(transformer),
        tokenizer=words,
        tokenizer_2=words,
        tokenizer_3=tokenizer_3,
        text_encoder=widen(CLIPTextModelWithProjection(config)),
        text_encoder_2=widen(CLIPTextModelWithProjection(config)),
        text_encoder_3=text_encoder_3,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
    )


def _flux(words: Any, scheduler: dict) -> Any:
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    text_encoder_2, tokenizer_2 = t5(32)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    return diffusers.FluxPipeline(
        vae=_vae(**FLOW_VAE),
        transformer=widen(transformer),
        tokenizer=words,
        tokenizer_2=tokenizer_2,
        text_encoder=widen(CLIPTextModel(CLIPTextConfig(**text_settings(words)))),
        text_encoder_2=text_encoder_2,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"use_dynamic_shifting": True, **scheduler}),
    )


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
