"""Functional networks: the parameters are a flat dict of tensors, a network is a function of them.

    f, params = wide_resnet(depth=16, width=1, num_classes=10)         # CIFAR
    f, params = network_in_network(width=0.5, num_classes=10)          # CIFAR, thin
    f, params = imagenet_resnet(depth=18, width=1, num_classes=1000)   # ImageNet
    logits, groups = f(x, params, training=True)                       # x: (N, 3, H, W)

`logits` is (N, num_classes); `groups` holds the output of each residual group, (N, C, H, W), from
which attention maps are made. The functions are pure, except that batch norm updates its running
statistics in training. Batch norm whose weight requires no gradient is fixed: it uses its running
statistics and does not update them. Parameter names follow the published code (NIN: our own).

A new network is a constructor and an entry in `NETWORKS`, at the end. For losses on groups it needs
as many groups as its teacher or student.
"""
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
Network = Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
Model = tuple[Network, Params]
STATISTICS = ('running_mean', 'running_var')  # the parts of batch norm that are not trained


class InputError(ValueError):
    """A wrong option, file or value. The scripts print it as one line and exit with status 2."""


def batch_norm_shapes(base: str, channels: int) -> Shapes:
    return {f'{base}.{name}': (channels,) for name in ('weight', 'bias', *STATISTICS)}


def initialize(shapes: Shapes, seed: int) -> Params:
    """New parameters of the given shapes; they depend on the seed alone.

    Convolutions (O, I, kH, kW) and linear weights (O, I) are kaiming-normal with fan-in (He et al.,
    2015), batch-norm weights uniform in [0, 1), running variances one, all else zero.
    """
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for name, shape in shapes.items():
        tensor = torch.zeros(shape)
        if len(shape) > 1:
            torch.nn.init.kaiming_normal_(tensor, generator=generator)
        elif name.endswith('.weight'):
            tensor.uniform_(generator=generator)
        elif name.endswith('.running_var'):
            tensor.fill_(1)
        params[name] = tensor if name.endswith(STATISTICS) else torch.nn.Parameter(tensor)
    return params


def trainable(params: Params) -> Params:
    """The entries that require gradients."""
    return {name: p for name, p in params.items() if p.requires_grad}


def freeze(params: Params, groups: int, batch_norm: bool) -> Params:
    """The same parameters, where frozen ones require no gradients.

    Frozen: the stem and the first `groups` groups (if not 0), and every batch norm if `batch_norm`.
    """
    early = ('conv0', 'bn0.', *(f'group{g}.' for g in range(groups))) if groups else ()
    return {name: p.detach() if name.startswith(early) or (batch_norm and '.bn' in f'.{name}')
            else p for name, p in params.items()}


# ------------------------------------------------------------------ layers

def conv2d(x: Tensor, params: Params, name: str, stride: int = 1, padding: int = 0) -> Tensor:
    """Convolution with the weight `name`, or with `name.weight` and, if it exists, `name.bias`."""
    weight = params[name if name in params else f'{name}.weight']
    return F.conv2d(x, weight, params.get(f'{name}.bias'), stride, padding)


def batch_norm(x: Tensor, params: Params, name: str, training: bool) -> Tensor:
    """Batch norm. Where it was folded: the affine a·x + b of `name.{a,b}`, or the identity.

    With `training` it uses the statistics of the batch, unless its weight is frozen.
    """
    if f'{name}.a' in params:
        return torch.addcmul(params[f'{name}.b'], x, params[f'{name}.a'])  # a, b: (C, 1, 1)
    if f'{name}.weight' not in params:
        return x  # folded into the convolution before it
    weight, bias, mean, var = (params[f'{name}.{part}'] for part in ('weight', 'bias', *STATISTICS))
    return F.batch_norm(x, mean, var, weight, bias, training and weight.requires_grad)


def shortcut(x: Tensor, params: Params, name: str, stride: int) -> Tensor:
    """A strided 1×1 convolution. On a CPU: x is subsampled first, then convolved with stride 1.

    The backward pass of oneDNN's strided 1×1 convolution writes out of bounds (channels-last, fewer
    than 16 channels; torch 2.13 and 2.15).
    """
    if x.is_cuda:
        return conv2d(x, params, name, stride)
    return conv2d(x[:, :, ::stride, ::stride], params, name)


def run_groups(x: Tensor, params: Params, training: bool, base: str, blocks: Sequence[int],
               block: Callable) -> tuple[Tensor, ...]:
    """The outputs of the residual groups. Each group except the first starts with stride 2."""
    groups = []
    for g, count in enumerate(blocks):
        for b in range(count):
            stride = 2 if g > 0 and b == 0 else 1
            x = block(x, params, training, f'{base}group{g}.block{b}', stride)
        groups.append(x)
    return tuple(groups)


def classify(x: Tensor, params: Params, base: str) -> Tensor:
    """Global average pooling and the linear classifier: (N, C, H, W) to (N, classes)."""
    x = F.adaptive_avg_pool2d(x, 1).flatten(1)  # (N, C)
    return F.linear(x, params[f'{base}fc.weight'], params[f'{base}fc.bias'])


# ------------------------------------------------------------------ Wide ResNet

def preactivation_block(x: Tensor, params: Params, training: bool, base: str, stride: int
                        ) -> Tensor:
    """BN-ReLU-conv twice (He et al., 2016). A shortcut convolution takes the activated input."""
    activated = F.relu(batch_norm(x, params, f'{base}.bn0', training), inplace=True)  # (N, C, H, W)
    y = conv2d(activated, params, f'{base}.conv0', stride, padding=1)          # (N, C', H/s, W/s)
    y = F.relu(batch_norm(y, params, f'{base}.bn1', training), inplace=True)
    y = conv2d(y, params, f'{base}.conv1', padding=1)
    if f'{base}.convdim' in params:
        x = shortcut(activated, params, f'{base}.convdim', stride)
    return y.add_(x)


def wide_resnet_forward(x: Tensor, params: Params, training: bool, base: str = '', *, blocks: int
                        ) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Images (N, 3, H, W) to logits (N, classes) and the outputs of the three groups.

    Group g is (N, 16·2^g·width, H/2^g, W/2^g), of `blocks` blocks; `base`: prefix of the names.
    """
    x = conv2d(x, params, f'{base}conv0', padding=1)  # (N, 16, H, W)
    groups = run_groups(x, params, training, base, [blocks] * 3, preactivation_block)
    x = F.relu(batch_norm(groups[-1], params, f'{base}bn', training))  # not in place: a group, too
    return classify(x, params, base), groups


def wide_resnet(depth: int = 16, width: float = 1, num_classes: int = 10, seed: int = 0) -> Model:
    """WRN-depth-width (Zagoruyko & Komodakis, 2016), pre-activation, for images of at least 4×4.

    Raises ValueError unless the depth is 6n+4 (n ≥ 1) and each group has a channel.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f'depth {depth}: a Wide ResNet has 6n+4 layers, such as 16, 28 or 40')
    if not 16 * width >= 1:
        raise ValueError(f'width {width:g}: must be at least 1/16, or group 0 has no channels')
    shapes, channels, blocks = {'conv0': (16, 3, 3, 3)}, 16, (depth - 4) // 6
    for g, base_width in enumerate((16, 32, 64)):
        out = int(base_width * width)
        for base in (f'group{g}.block{b}' for b in range(blocks)):
            shapes |= batch_norm_shapes(f'{base}.bn0', channels)
            shapes |= {f'{base}.conv0': (out, channels, 3, 3)}
            shapes |= batch_norm_shapes(f'{base}.bn1', out)
            shapes |= {f'{base}.conv1': (out, out, 3, 3)}
            if channels != out:
                shapes |= {f'{base}.convdim': (out, channels, 1, 1)}
            channels = out
    shapes |= batch_norm_shapes('bn', channels)
    shapes |= {'fc.weight': (num_classes, channels), 'fc.bias': (num_classes,)}
    return partial(wide_resnet_forward, blocks=blocks), initialize(shapes, seed)


# ------------------------------------------------------------------ Network-in-Network

# Output channels and filter size of the three convolutions of each block.
NIN_BLOCKS = (((192, 5), (160, 1), (96, 1)),
              ((192, 5), (192, 1), (192, 1)),
              ((192, 3), (192, 1), (192, 1)))


def network_in_network_forward(x: Tensor, params: Params, training: bool, base: str = '', *,
                               pool_relu: bool = True) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Images (N, 3, H, W) to logits (N, classes) and the blocks' outputs, before pooling.

    Block g is (N, C, H/2^g, W/2^g), C = 96, 192, 192 times the width. Without `pool_relu` the last
    convolution of each block has no ReLU.
    """
    groups = []
    for g, block in enumerate(NIN_BLOCKS):
        for b, (_, size) in enumerate(block):
            name = f'{base}group{g}'
            x = conv2d(x, params, f'{name}.conv{b}', padding=size // 2)
            x = batch_norm(x, params, f'{name}.bn{b}', training)
            x = F.relu(x, inplace=True) if pool_relu or b < len(block) - 1 else x
        groups.append(x)
        if g < len(NIN_BLOCKS) - 1:
            x = (F.max_pool2d if g == 0 else F.avg_pool2d)(x, 3, stride=2, ceil_mode=True)
    return classify(x, params, base), tuple(groups)


def network_in_network(width: float = 1, num_classes: int = 10, seed: int = 0,
                       batch_norm: bool = True, pool_relu: bool = True) -> Model:
    """Network-in-Network (Lin et al., 2013), every convolution's channels times `width`.

    Width 1 is the paper's NIN-wide (1,005,642 parameters). Of NIN-thin the paper says only "0.2M";
    our reading is width 0.5 (256,298). A convolution has a bias exactly where it has no batch norm.
    Raises ValueError if a convolution would have no channels.
    """
    if not 96 * width >= 1:
        raise ValueError(f'width {width:g}: must be at least 1/96, or a layer has no channels')
    shapes, channels = {}, 3
    for g, block in enumerate(NIN_BLOCKS):
        for b, (full, size) in enumerate(block):
            name, out = f'group{g}.conv{b}', int(full * width)
            shape = (out, channels, size, size)
            if batch_norm:
                shapes |= {name: shape} | batch_norm_shapes(f'group{g}.bn{b}', out)
            else:
                shapes |= {f'{name}.weight': shape, f'{name}.bias': (out,)}
            channels = out
    shapes |= {'fc.weight': (num_classes, channels), 'fc.bias': (num_classes,)}
    return partial(network_in_network_forward, pool_relu=pool_relu), initialize(shapes, seed)


# ------------------------------------------------------------------ ImageNet ResNet

IMAGENET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


def imagenet_resnet_shapes(blocks: Sequence[int], stem: int, widths: Sequence[int],
                           num_classes: int) -> Shapes:
    """Name and shape of every parameter of a ResNet of basic blocks, from its channels.

    The shortcut has parameters (`convdim`, `bndim`) where channels or resolution change.
    """
    shapes = {'conv0': (stem, 3, 7, 7)} | batch_norm_shapes('bn0', stem)
    channels = stem
    for g, (count, out) in enumerate(zip(blocks, widths, strict=True)):
        for b in range(count):
            base = f'group{g}.block{b}'
            shapes |= {f'{base}.conv0': (out, channels, 3, 3)}
            shapes |= batch_norm_shapes(f'{base}.bn0', out)
            shapes |= {f'{base}.conv1': (out, out, 3, 3)}
            shapes |= batch_norm_shapes(f'{base}.bn1', out)
            if b == 0 and (g > 0 or channels != out):
                shapes |= {f'{base}.convdim': (out, channels, 1, 1)}
                shapes |= batch_norm_shapes(f'{base}.bndim', out)
            channels = out
    return shapes | {'fc.weight': (num_classes, channels), 'fc.bias': (num_classes,)}


def basic_block(x: Tensor, params: Params, training: bool, base: str, stride: int) -> Tensor:
    """Conv-BN-ReLU, conv-BN, shortcut, ReLU (He et al., 2015)."""
    y = conv2d(x, params, f'{base}.conv0', stride, padding=1)               # (N, C', H/s, W/s)
    y = F.relu(batch_norm(y, params, f'{base}.bn0', training), inplace=True)
    y = batch_norm(conv2d(y, params, f'{base}.conv1', padding=1), params, f'{base}.bn1', training)
    if f'{base}.convdim' in params or f'{base}.convdim.weight' in params:
        x = shortcut(x, params, f'{base}.convdim', stride)
        x = batch_norm(x, params, f'{base}.bndim', training)
    return F.relu(y.add_(x), inplace=True)


def imagenet_resnet_forward(x: Tensor, params: Params, training: bool, base: str = '', *,
                            blocks: Sequence[int], preactivation: bool = False
                            ) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Images (N, 3, H, W) to logits (N, classes) and the outputs of the four groups.

    Group g is (N, 64·2^g·width, H/2^(g+2), W/2^(g+2)). `preactivation`: the published ResNet-18
    trained by attention transfer; its first block has no batch norm before the first convolution.
    """
    x = conv2d(x, params, f'{base}conv0', stride=2, padding=3)              # (N, 64, H/2, W/2)
    x = F.relu(batch_norm(x, params, f'{base}bn0', training), inplace=True)
    x = F.max_pool2d(x, 3, stride=2, padding=1)                             # (N, 64, H/4, W/4)
    block = preactivation_block if preactivation else basic_block
    groups = run_groups(x, params, training, base, blocks, block)
    x = groups[-1]
    if preactivation:
        x = F.relu(batch_norm(x, params, f'{base}bn', training))
    return classify(x, params, base), groups


def imagenet_resnet(depth: int = 18, width: float = 1, num_classes: int = 1000,
                    seed: int = 0) -> Model:
    """ResNet-18 or -34. `width` multiplies the groups' channels; the stem always has 64.

    Raises ValueError for another depth, or if a group would have no channels.
    """
    if depth not in IMAGENET_BLOCKS:
        raise ValueError(f'depth {depth}: an ImageNet ResNet here has 18 or 34 layers')
    widths = [int(c * width) for c in (64, 128, 256, 512)]
    if widths[0] < 1:
        raise ValueError(f'width {width:g}: must be at least 1/64, or group 0 has no channels')
    blocks = IMAGENET_BLOCKS[depth]
    shapes = imagenet_resnet_shapes(blocks, 64, widths, num_classes)
    return partial(imagenet_resnet_forward, blocks=blocks), initialize(shapes, seed)


class Architecture(NamedTuple):
    """An architecture, as `--net` offers it and checkpoints name it.

    build:  constructor (…, num_classes, seed) → (f, params); its other arguments are options of the
            script, with its defaults. Raises ValueError for settings that it cannot have
    label:  these arguments → the network's name, such as WRN-16-2
    large:  whether it is made for ImageNet, and for imagenet.py
    """
    build: Callable[..., Model]
    label: Callable[..., str]
    large: bool = False

    def settings(self, given: dict[str, Any]) -> dict[str, Any]:
        """The constructor's arguments without num_classes and seed: as given, or its defaults."""
        arguments = inspect.signature(self.build).parameters.items()
        return {name: p.default if given.get(name) is None else given[name]
                for name, p in arguments if name not in ('num_classes', 'seed')}


def nin_label(width: float, batch_norm: bool, pool_relu: bool) -> str:
    return f'NIN-{width:g}' + '-nobn' * (not batch_norm) + '-nopoolrelu' * (not pool_relu)


NETWORKS = {
    'wrn': Architecture(wide_resnet, lambda depth, width: f'WRN-{depth}-{width:g}'),
    'nin': Architecture(network_in_network, nin_label),
    'resnet': Architecture(imagenet_resnet, lambda depth, width: f'ResNet-{depth}'
                           + f'-{width:g}' * (width != 1), large=True)}
