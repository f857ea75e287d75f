"""Models of real size, built from configurations: nothing is fetched. Stacks of equal blocks are cut to a few of them.

The libraries are imported when a model is built, so that their absence is one model's affair.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PROMPT = 128  # tokens that are in the cache when a decode step begins


@dataclass(frozen=True)
class Model:
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    memory_format: torch.memory_format = torch.contiguous_format
    training: bool = True
    decodes: bool = False  # one token, after a prompt whose keys and values are cached

    def make(self) -> nn.Module:
        return self.build().to(memory_format=self.memory_format).train(self.training)

    def make_inputs(self) -> dict[str, Any]:
        def arranged(value):
            is_image = isinstance(value, Tensor) and value.dim() == 4
            return value.contiguous(memory_format=self.memory_format) if is_image else value

        return {name: arranged(value) for name, value in self.inputs().items()}


def resnet50():
    from transformers import ResNetConfig, ResNetModel

    return ResNetModel(ResNetConfig())


def mobilenet_v2():
    from transformers import MobileNetV2Config, MobileNetV2Model

    return MobileNetV2Model(MobileNetV2Config())


def convnext_tiny():
    from transformers import ConvNextConfig, ConvNextModel

    return ConvNextModel(ConvNextConfig())


def ddpm_unet():
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        norm_num_groups=32,
        add_attention=True,
    )


def dynunet():
    from monai.networks.nets import DynUNet

    kernels, strides = [3] * 5, [1, 2, 2, 2, 2]
    return DynUNet(3, 1, 3, kernel_size=kernels, strides=strides, upsample_kernel_size=strides[1:])


def bert_base():
    from transformers import BertConfig, BertModel

    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertModel(BertConfig(num_hidden_layers=4, **none), add_pooling_layer=False)


def vit_base():
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(num_hidden_layers=4), add_pooling_layer=False)


def sam_encoder():
    from transformers import SamVisionConfig, SamVisionModel

    # Weights of the size that training begins with; the configuration's own are zero but for rounding.
    return SamVisionModel(
        SamVisionConfig(image_size=512, num_hidden_layers=2, global_attn_indexes=(1,), initializer_range=0.02)
    )


def llama():
    from transformers import LlamaConfig, LlamaModel

    heads = {"num_attention_heads": 32, "num_key_value_heads": 4}
    return LlamaModel(
        LlamaConfig(vocab_size=4096, hidden_size=2048, intermediate_size=5632, num_hidden_layers=2, **heads)
    )


def _tokens(batch: int, length: int):
    return lambda: {"input_ids": torch.randint(0, 4096, (batch, length))}


def _images(batch: int, size: int):
    return lambda: {"pixel_values": torch.randn(batch, 3, size, size)}


def _noisy_images():
    return {"sample": torch.randn(4, 3, 32, 32), "timestep": torch.tensor(10)}


_channels_last = {"memory_format": torch.channels_last}
MODELS = [
    Model("ResNet-50 8x3x160x160", resnet50, _images(8, 160)),
    Model("ResNet-50 8x3x160x160 channels_last", resnet50, _images(8, 160), **_channels_last),
    Model("MobileNetV2 8x3x160x160", mobilenet_v2, _images(8, 160)),
    Model("ConvNeXt-T 8x3x160x160", convnext_tiny, _images(8, 160)),
    Model("ConvNeXt-T 8x3x160x160 channels_last", convnext_tiny, _images(8, 160), **_channels_last),
    Model("DDPM U-Net 4x3x32x32", ddpm_unet, _noisy_images),
    Model("DynUNet 1x1x64x64x64", dynunet, lambda: {"x": torch.randn(1, 1, 64, 64, 64)}),
    Model("BERT-base, 4 layers, 8x128", bert_base, _tokens(8, 128)),
    Model("ViT-B/16, 4 layers, 4x3x224x224", vit_base, _images(4, 224)),
    Model("SAM image encoder, 2 layers, 1x3x512x512", sam_encoder, _images(1, 512)),
    Model("Llama, width 2048, 2 layers, 1x256", llama, _tokens(1, 256)),
    Model("ResNet-50 1x3x224x224, inference", resnet50, _images(1, 224), training=False),
    Model("Llama, decode step", llama, _tokens(1, 1), training=False, decodes=True),
]
