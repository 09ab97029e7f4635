"""Networks to train: classifiers of square images ``(N, C, size, size)``, and a language model of characters."""

import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csq_kernels.train.resnet import BasicBlock as ImageNetBasicBlock
from csq_kernels.train.resnet import Bottleneck, resnet


def mlp(channels: int, image_size: int, classes: int, *, width: int = 64, depth: int = 2) -> nn.Module:
    """``depth`` hidden layers of ``width`` units with batch norm."""
    features = channels * image_size**2
    layers: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    for number in range(1, depth + 1):
        layers[f"hidden{number}"] = nn.Linear(features, width, bias=False)
        layers[f"norm{number}"] = nn.BatchNorm1d(width)
        layers[f"relu{number}"] = nn.ReLU()
        features = width
    layers["head"] = nn.Linear(features, classes)
    return nn.Sequential(OrderedDict(layers))


def _conv_bn(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(outputs)))


def _with_head(layers: dict[str, nn.Module], features: int, classes: int) -> nn.Sequential:
    """Average over the picture, then one linear layer."""
    ends = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "head": nn.Linear(features, classes)}
    return nn.Sequential(OrderedDict(layers | ends))


def _plain(channels: int, classes: int, width: int, convs_per_stage: int) -> nn.Sequential:
    """Three stages of 3x3 convolutions with batch norm; each ends in a halving, and the width doubles with each."""
    layers: dict[str, nn.Module] = {}
    inputs = channels
    for stage in range(3):
        for number in range(1, convs_per_stage + 1):
            suffix = f"{stage + 1}_{number}" if convs_per_stage > 1 else f"{stage + 1}"
            layers["block" + suffix] = _conv_bn(inputs, width << stage)
            layers["relu" + suffix] = nn.ReLU()
            inputs = width << stage
        layers[f"pool{stage + 1}"] = nn.MaxPool2d(2)
    return _with_head(layers, inputs, classes)


def cnn(channels: int, image_size: int, classes: int, *, width: int = 16) -> nn.Module:
    """Three 3x3 convolutions and a linear layer: 24,000 weights."""
    return _plain(channels, classes, width, convs_per_stage=1)


def vgg(channels: int, image_size: int, classes: int, *, width: int = 32) -> nn.Module:
    """Six 3x3 convolutions and a linear layer, in the manner of VGG: 287,000 weights."""
    return _plain(channels, classes, width, convs_per_stage=2)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut; a 1x1 convolution adapts the shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first = _conv_bn(inputs, outputs, stride)
        self.second = _conv_bn(outputs, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _conv_bn(inputs, outputs, stride, kernel=1)

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(input))) + self.shortcut(input))


def resnet20(channels: int, image_size: int, classes: int, *, width: int = 16, blocks: int = 3) -> nn.Module:
    """The CIFAR-type residual network: three stages of ``blocks`` blocks; the width doubles with each."""
    layers: dict[str, nn.Module] = {"stem": _conv_bn(channels, width), "relu": nn.ReLU()}
    inputs = width
    for stage in range(3):
        for number in range(1, blocks + 1):
            stride = 2 if stage > 0 and number == 1 else 1
            layers[f"block{stage + 1}_{number}"] = BasicBlock(inputs, width << stage, stride)
            inputs = width << stage
    return _with_head(layers, inputs, classes)


class Attention(nn.Module):
    """Multi-head self-attention; no token sees a later one if ``causal``."""

    def __init__(self, width: int, heads: int, causal: bool = False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        count, length, width = tokens.shape
        qkv = self.qkv(tokens).view(count, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(count, length, width))


class TransformerBlock(nn.Module):
    """Pre-norm attention and a two-layer perceptron, each with a shortcut."""

    def __init__(self, width: int, heads: int, causal: bool = False):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, causal)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.down(F.gelu(self.up(self.norm2(tokens))))


class VisionTransformer(nn.Module):
    """Patches, learned positions, transformer blocks, mean over tokens."""

    def __init__(self, channels: int, image_size: int, classes: int, width: int, depth: int, heads: int, patch: int):
        super().__init__()
        self.patch = nn.Conv2d(channels, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (image_size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def vit(
    channels: int,
    image_size: int,
    classes: int,
    *,
    width: int = 64,
    depth: int = 4,
    heads: int = 4,
    patch: int = 4,
) -> nn.Module:
    """A tiny vision transformer; ``patch`` divides the image size and ``heads`` the width."""
    if image_size % patch:
        raise ValueError(f"expected patch to divide the image size {image_size}, got {patch}")
    if width % heads:
        raise ValueError(f"expected heads to divide the width {width}, got {heads}")
    return VisionTransformer(channels, image_size, classes, width, depth, heads, patch)


class CharGPT(nn.Module):
    """Characters, learned positions, causal transformer blocks, and for each position the logits of what comes next."""

    def __init__(self, context: int, characters: int, width: int, depth: int, heads: int):
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, context, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                # As in GPT-2: what adds to the stream of tokens starts smaller, by the number of layers that do.
                adds = name.endswith((".out", ".down"))
                nn.init.normal_(module.weight, std=0.02 / (2 * depth) ** 0.5 if adds else 0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """From ``(N, length)``, at most ``context``, to ``(N, characters, length)``: classes where a loss has them."""
        stream = self.embedding(tokens) + self.position[:, : tokens.shape[1]]
        return self.head(self.norm(self.blocks(stream))).transpose(1, 2)


def char_gpt(
    channels: int, context: int, characters: int, *, width: int = 128, depth: int = 4, heads: int = 4
) -> nn.Module:
    """A small GPT, 0.8 million weights; its context is the length of the blocks, and ``heads`` divide the width."""
    if width % heads:
        raise ValueError(f"expected heads to divide the width {width}, got {heads}")
    return CharGPT(context, characters, width, depth, heads)


def resnet18(channels: int, image_size: int, classes: int, *, width: int = 64) -> nn.Module:
    """The ImageNet network of 18 layers, 11.7 million weights; ``width`` is that of the stem."""
    return resnet(ImageNetBasicBlock, (2, 2, 2, 2), channels, classes, width)


def resnet50(channels: int, image_size: int, classes: int, *, width: int = 64) -> nn.Module:
    """The ImageNet network of 50 layers, 25.6 million weights; ``width`` is that of the stem."""
    return resnet(Bottleneck, (3, 4, 6, 3), channels, classes, width)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "vgg": vgg,
    "resnet20": resnet20,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "vit": vit,
    "char_gpt": char_gpt,
}
# Those that read text; all others read images.
_TEXT_MODELS = {"char_gpt"}


def options(name: str) -> dict[str, Any]:
    """Options of the model ``name`` with their defaults."""
    if name not in MODELS:
        raise ValueError(f"expected model.name of {', '.join(MODELS)}, got {name!r}")
    parameters = inspect.signature(MODELS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def check_options(name: str, given: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless ``given`` are options of the model ``name`` with positive integers."""
    known = options(name)
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"expected options of model {name} among {', '.join(known)}, got {key!r}")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"expected {key} of model {name} as a positive integer, got {value!r}")


def check_input(name: str, data_name: str) -> None:
    """Raise ``ValueError`` unless the model ``name`` reads what the data set ``data_name`` gives: images, or text."""
    if (name in _TEXT_MODELS) != (data_name == "text"):
        fitting = [model for model in MODELS if (model in _TEXT_MODELS) == (data_name == "text")]
        raise ValueError(f"expected model.name of {', '.join(fitting)} for data set {data_name}, got {name!r}")


def build(name: str, channels: int, image_size: int, classes: int, **given: int) -> nn.Module:
    """Build a model for images of ``channels`` and ``image_size``, or for blocks of text of 1 channel and that length.

    Example:
        >>> build("cnn", 1, 28, 10, width=8)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    check_options(name, given)
    return MODELS[name](channels, image_size, classes, **given)


def example_input(name: str, channels: int, image_size: int, classes: int, batch: int = 1) -> Tensor:
    """Random input for the model that ``build`` makes of the same arguments: images, or the characters of a text.

    Example:
        >>> example_input("cnn", 1, 28, 10, batch=2).shape
        torch.Size([2, 1, 28, 28])
    """
    generator = torch.Generator().manual_seed(0)
    if name in _TEXT_MODELS:
        return torch.randint(classes, (batch, image_size), generator=generator)
    return torch.randn(batch, channels, image_size, image_size, generator=generator)
