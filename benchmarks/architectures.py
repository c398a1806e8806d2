"""The shapes of the parameters of well-known networks, without the networks."""

from collections.abc import Callable

Tree = dict[str, tuple[int, ...]]


def resnet18() -> Tree:
    """Return the 62 leaves of ResNet-18 for CIFAR: 3 x 3 stem, batch norm, ten classes."""
    return _resnet((2, 2, 2, 2), stem=3, classes=10, bottleneck=False)


def resnet50() -> Tree:
    """Return the 161 leaves of ResNet-50 for ImageNet."""
    return _resnet((3, 4, 6, 3), stem=7, classes=1000, bottleneck=True)


def _resnet(blocks: tuple[int, ...], stem: int, classes: int, *, bottleneck: bool) -> Tree:
    tree: Tree = {}

    def convolution(name: str, size: int, inputs: int, outputs: int) -> int:
        tree[f"{name}/kernel"] = (size, size, inputs, outputs)
        tree[f"{name}/scale"] = tree[f"{name}/bias"] = (outputs,)
        return outputs

    width = convolution("stem", stem, 3, 64)
    for stage, count in enumerate(blocks):
        for block in range(count):
            name, inner = f"stage{stage}/block{block}", 64 * 2**stage
            outputs = 4 * inner if bottleneck else inner
            if bottleneck:
                convolution(f"{name}/a", 1, width, inner)
                convolution(f"{name}/b", 3, inner, inner)
                convolution(f"{name}/c", 1, inner, outputs)
            else:
                convolution(f"{name}/a", 3, width, inner)
                convolution(f"{name}/b", 3, inner, inner)
            if width != outputs:
                convolution(f"{name}/shortcut", 1, width, outputs)
            width = outputs
    return {**tree, "head/kernel": (width, classes), "head/bias": (classes,)}


def vit_b16() -> Tree:
    """Return the 199 leaves of ViT-B/16 with a class token and fused projections, its layers unrolled."""
    tree: Tree = {
        "patches/kernel": (16, 16, 3, 768),
        "patches/bias": (768,),
        "token": (1, 1, 768),
        "positions": (1, 197, 768),
    }
    for i in range(12):
        tree |= _layer(f"layer{i:02}", 768, split=True)
    return {**tree, "norm/scale": (768,), "head/kernel": (768, 1000), "head/bias": (1000,)}


def gpt2() -> Tree:
    """Return the 580 leaves of GPT-2 of 48 layers, unrolled and narrow, so that it fits into any memory."""
    tree: Tree = {"tokens": (50257, 256), "positions": (1024, 256)}
    for i in range(48):
        tree |= _layer(f"layer{i:02}", 256, split=False)
    return {**tree, "norm/scale": (256,), "norm/bias": (256,)}


def _layer(name: str, width: int, *, split: bool) -> Tree:
    """Return a transformer's layer: twelve leaves, or 16 with heads apart."""
    heads = width // 64
    if split:
        attention: Tree = {"out/kernel": (heads, 64, width), "out/bias": (width,)}
        for part in ("query", "key", "value"):
            attention |= {f"{part}/kernel": (width, heads, 64), f"{part}/bias": (heads, 64)}
    else:
        attention = {
            "qkv/kernel": (width, 3 * width),
            "qkv/bias": (3 * width,),
            "out/kernel": (width, width),
            "out/bias": (width,),
        }
    rest: Tree = {
        "norm1/scale": (width,),
        "norm1/bias": (width,),
        "norm2/scale": (width,),
        "norm2/bias": (width,),
        "up/kernel": (width, 4 * width),
        "up/bias": (4 * width,),
        "down/kernel": (4 * width, width),
        "down/bias": (width,),
    }
    return {f"{name}/{part}": shape for part, shape in {**attention, **rest}.items()}


def densenet121() -> Tree:
    """Return the 364 leaves of DenseNet-121, some 60 of whose large shapes occur once."""
    tree: Tree = {"stem/kernel": (7, 7, 3, 64), "stem/scale": (64,), "stem/bias": (64,)}
    width = 64
    for stage, count in enumerate((6, 12, 24, 16)):
        for layer in range(count):
            name = f"stage{stage}/layer{layer:02}"
            tree |= {
                f"{name}/norm1/scale": (width,),
                f"{name}/norm1/bias": (width,),
                f"{name}/conv1/kernel": (1, 1, width, 128),
                f"{name}/norm2/scale": (128,),
                f"{name}/norm2/bias": (128,),
                f"{name}/conv2/kernel": (3, 3, 128, 32),
            }
            width += 32
        if stage < 3:
            tree |= {
                f"transition{stage}/scale": (width,),
                f"transition{stage}/bias": (width,),
                f"transition{stage}/kernel": (1, 1, width, width // 2),
            }
            width //= 2
    return {
        **tree,
        "norm/scale": (width,),
        "norm/bias": (width,),
        "head/kernel": (width, 1000),
        "head/bias": (1000,),
    }


def different() -> Tree:
    """Return 300 leaves of 300 shapes."""
    return {f"leaf{i:03}": (64 + i, 128) if i % 2 else (128, 64 + i) for i in range(300)}


ARCHITECTURES: dict[str, Callable[[], Tree]] = {
    "ResNet-18": resnet18,
    "ResNet-50": resnet50,
    "ViT-B/16": vit_b16,
    "DenseNet-121": densenet121,
    "GPT-2, 48 layers": gpt2,
    "300 shapes": different,
}
