"""Models of different kinds, small, built from configurations: no weights are fetched."""

import dataclasses
from collections.abc import Callable

import diffusers
import monai.networks.nets as monai
import torch
import transformers as hf


@dataclasses.dataclass(frozen=True)
class Model:
    name: str
    build: Callable
    inputs: Callable  # () -> keyword arguments
    converted: dict  # how many layers of which class
    left: dict = dataclasses.field(default_factory=dict)  # class: why
    # Whether the layers are the same function in float64. Llama's and its kin compute in float32 inside.
    float64: bool = True


def pixels(*shape):
    return lambda: {"pixel_values": torch.randn(*shape)}


def tokens(batch, length, **more):
    return lambda: {"input_ids": torch.randint(0, 90, (batch, length)), **{k: v() for k, v in more.items()}}


TEXT = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
CAUSAL = {**TEXT, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "head_dim": 16}
VISION = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}

MODELS = [
    Model(
        "ResNet",
        lambda: hf.ResNetModel(hf.ResNetConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[2, 2])),
        pixels(8, 3, 96, 96),
        {"BatchNorm2d": 14},
    ),
    Model(
        "DenseNet",
        lambda: monai.DenseNet(2, 3, 10, init_features=16, growth_rate=8, block_config=(3, 3), dropout_prob=0.1),
        lambda: {"x": torch.randn(4, 3, 48, 48)},
        {"BatchNorm2d": 15},
    ),
    Model(
        "ConvNeXt",
        lambda: hf.ConvNextModel(hf.ConvNextConfig(num_stages=2, hidden_sizes=[32, 64], depths=[3, 3])),
        pixels(2, 3, 32, 32),
        {"LayerNorm": 1, "ConvNextLayerNorm": 8},
    ),
    Model(
        "ConvNeXt V2",
        lambda: hf.ConvNextV2Model(hf.ConvNextV2Config(num_stages=2, hidden_sizes=[32, 64], depths=[2, 2])),
        pixels(2, 3, 32, 32),
        {"LayerNorm": 1, "ConvNextV2LayerNorm": 6},
        {"ConvNextV2GRN": "no entry"},
    ),
    Model(
        "ViT",
        lambda: hf.ViTModel(hf.ViTConfig(**VISION, image_size=64, patch_size=8)),
        pixels(8, 3, 64, 64),
        {"LayerNorm": 7},
    ),
    Model(
        "Swin",
        lambda: hf.SwinModel(
            hf.SwinConfig(
                image_size=64,
                patch_size=4,
                embed_dim=32,
                depths=[2, 2],
                num_heads=[2, 4],
                window_size=4,
                drop_path_rate=0.0,
            )
        ),
        pixels(8, 3, 64, 64),
        {"LayerNorm": 11},
    ),
    Model("BERT", lambda: hf.BertModel(hf.BertConfig(**TEXT)), tokens(8, 64), {"LayerNorm": 7}),
    Model(
        "Llama",
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**CAUSAL)),
        tokens(8, 64),
        {"LlamaRMSNorm": 7},
        float64=False,
    ),
    Model(
        "Qwen3",
        lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**CAUSAL)),
        tokens(8, 64),
        {"Qwen3RMSNorm": 13},
        float64=False,
    ),
    Model(
        "Gemma",
        lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**CAUSAL)),
        tokens(8, 64),
        {"GemmaRMSNorm": 7},
        float64=False,
    ),
    Model(
        "T5",
        lambda: hf.T5Model(hf.T5Config(vocab_size=96, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)),
        tokens(8, 48, decoder_input_ids=lambda: torch.randint(0, 90, (8, 16))),
        {"T5LayerNorm": 12},
        float64=False,
    ),
    Model(
        "Mamba 2",
        lambda: hf.Mamba2Model(
            hf.Mamba2Config(
                vocab_size=96, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8, n_groups=2
            )
        ),
        tokens(2, 32, use_cache=lambda: False),
        {"Mamba2RMSNorm": 3},
        {"MambaRMSNormGated": "no entry"},
        float64=False,
    ),
    Model(
        "Wav2Vec2",
        lambda: hf.Wav2Vec2Model(
            hf.Wav2Vec2Config(
                **TEXT,
                conv_dim=[32, 32, 32],
                conv_stride=[5, 2, 2],
                conv_kernel=[10, 3, 3],
                num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=4,
                apply_spec_augment=False,
                layerdrop=0.0,
            )
        ),
        lambda: {"input_values": torch.randn(4, 8000)},
        {"GroupNorm": 1, "LayerNorm": 8},
    ),
    Model(
        "diffusion U-Net",
        lambda: diffusers.UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=8,
        ),
        lambda: {
            "sample": torch.randn(4, 4, 16, 16),
            "timestep": torch.tensor(10),
            "encoder_hidden_states": torch.randn(4, 8, 32),
        },
        {"GroupNorm": 21, "LayerNorm": 12},
    ),
    Model(
        "VAE",
        lambda: diffusers.AutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=8,
        ),
        lambda: {"sample": torch.randn(2, 3, 32, 32)},
        {"GroupNorm": 24},
    ),
    Model(
        "3-d U-Net",
        lambda: monai.UNet(
            3, 1, 3, channels=(16, 32, 64), strides=(2, 2), num_res_units=2, norm=("INSTANCE", {"affine": True})
        ),
        lambda: {"x": torch.randn(2, 1, 32, 32, 32)},
        {"InstanceNorm3d": 9},
    ),
    Model(
        "SegResNet",
        lambda: monai.SegResNet(3, 8, 1, 2, blocks_down=(1, 2), blocks_up=(1,), norm=("GROUP", {"num_groups": 4})),
        lambda: {"x": torch.randn(2, 1, 16, 16, 16)},
        {"GroupNorm": 9},
    ),
]
