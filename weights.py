"""Weight files: reading, writing, and finding out which network a file holds.

    model = load_model('logs/resnet_16_2_teacher')      # a run, a .pt7/.pth/.hkl file, torchvision
    logits, groups = model.f(x, model.params, training=False)

It reads checkpoints of this code and of the published code, the published exports (.hkl of hickle 2
to 5, or the same as .pth) and torchvision's ResNet-18 and -34. It never runs code in a file.
"""
import io
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from resnet import (
    IMAGENET_BLOCKS,
    NETWORKS,
    NIN_CONVS,
    STATISTICS,
    Architecture,
    Network,
    Params,
    Shapes,
    imagenet_resnet_forward,
    imagenet_resnet_shapes,
    initialize,
    network_in_network_forward,
    network_in_network_shapes,
    resnet_label,
)
from training.bounded import plain_copy, read_bounded
from training.errors import InputError

CHECKPOINT = 'model.pt7'  # the checkpoint's file in a run's folder
TORCHVISION = {'torchvision': 'ResNet34_Weights', 'torchvision-18': 'ResNet18_Weights'}
MAX_ARRAYS = 2000         # limit on the number of arrays in an HDF5 file


@dataclass(frozen=True)
class Model:
    """A network with its parameters, new or from a file."""
    f: Network
    params: Params
    name: str                    # for example WRN-16-2
    num_classes: int
    architecture: Architecture
    spec: dict[str, Any] | None = None   # arguments of `new_model` that rebuild the network
    n_before_folding: int | None = None  # number of parameters before folding

    @cached_property
    def group_channels(self) -> tuple[int, ...]:
        """The channels of each group, from a forward pass."""
        x = torch.zeros(1, 3, self.architecture.image_size, self.architecture.image_size)
        with torch.no_grad():
            _, groups = self.f(x, self.params, False)
        return tuple(A.shape[1] for A in groups)

    @property
    def n_groups(self) -> int:
        return len(self.group_channels)

    @property
    def n_parameters(self) -> int:
        """The number of parameters before folding, without batch norm's running statistics."""
        return self.n_before_folding or sum(p.numel() for name, p in self.params.items()
                                            if not name.endswith(STATISTICS))


def new_model(net: str, settings: dict[str, Any], num_classes: int, seed: int = 0) -> Model:
    """A new network of the registry `resnet.NETWORKS`.

    Settings that are no arguments of its constructor are ignored. Raises InputError if the
    constructor rejects the settings, or memory runs out.
    """
    kind = NETWORKS[net]
    settings = kind.settings(settings)
    try:
        name = kind.label(**settings)
        f, params = kind.build(num_classes=num_classes, seed=seed, **settings)
    except (ValueError, TypeError, RuntimeError, MemoryError) as e:
        raise InputError(f'--net {net}: {e}') from None
    spec = {'net': net, 'num_classes': num_classes, **settings}
    return Model(f, params, name, num_classes, kind, spec)


def new_classifier(model: Model, num_classes: int, seed: int) -> Model:
    """A trained network, prepared for fine-tuning: a new `fc`, and all parameters trainable."""
    shapes = {'fc.weight': (num_classes, model.params['fc.weight'].shape[1]),
              'fc.bias': (num_classes,)}
    params = {name: t.detach() if name.endswith(STATISTICS) else torch.nn.Parameter(t)
              for name, t in model.params.items()}
    spec = model.spec and model.spec | {'num_classes': num_classes}
    params |= initialize(shapes, seed)
    return replace(model, params=params, num_classes=num_classes, spec=spec)


# ---------------------------------------------------------------------------- reading files

def read_checkpoint(path: str | Path) -> dict:
    """The content of a file that `torch.save` wrote, on the CPU, without running code in it.

    It may hold dicts, lists, tuples, plain values and tensors of numbers. Raises InputError if
    there is no such file, or for any other content.
    """
    def read(path: str | Path) -> dict:
        state = torch.load(path, map_location='cpu', weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f'it holds a {type(state).__name__}, not a dict')
        return plain_copy(state, [4 * os.path.getsize(path)])
    return read_bounded(read, path)


def read_hickle(path: str | Path) -> Params:
    """The arrays of a dict that hickle 2 to 5 saved: {name: float32 tensor}.

    Only arrays of numbers are read; nothing is unpickled. Raises InputError for any other file or
    content.
    """
    params = {}

    def visit(name: str, item: h5py.HLObject) -> None:
        if isinstance(item, h5py.Dataset):
            if item.dtype.kind not in 'fiu' or item.is_virtual or item.external:
                raise ValueError(f'{name} has type {item.dtype}, or is stored in another file')
            if len(params) == MAX_ARRAYS:
                raise ValueError('more arrays than a network has')
            array = np.asarray(item[()], dtype=np.float32)
            params[name.partition('/')[0].strip('\'"')] = torch.from_numpy(array)

    def read(path: str | Path) -> None:
        params.clear()
        with h5py.File(path, 'r') as file:
            # hickle 2: data_0/NAME/data_0, 3: data_0/'NAME'/data_0,
            # hickle 4: data/'NAME'/data,   5: data/"NAME"
            top = next((name for name in ('data', 'data_0') if name in file), None)
            if top is None or not isinstance(file.get(top, getlink=True), h5py.HardLink):
                raise ValueError('not written by hickle')
            file[top].visititems(visit)
    read_bounded(read, path)
    return params


def parameters_of(state: dict, path: Path) -> Params:
    """The float32 parameters of a checkpoint, or of a dict of parameters, named as in `resnet`.

    Raises InputError if there is no dict of parameters, or an entry is not a named tensor.
    """
    params = state.get('params', state)
    if not isinstance(params, dict):
        raise InputError(f"{path}: not a checkpoint of this code: 'params' is not a dict")
    if isinstance(state.get('stats'), dict):  # the running statistics, in early published files
        params = params | state['stats']
    for name, tensor in params.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(f'{path}: not the weights of a network: {name!r} is not a named '
                             'tensor')
    return rename_parameters({name: tensor.float() for name, tensor in params.items()})


def find_checkpoint(run: str | Path) -> Path:
    """The checkpoint of `run`: a run's folder, a file, or else the name of a run under logs/.

    Raises InputError, which lists the paths that were tried.
    """
    places = [Path(run), *([Path('logs', run)] if Path(run).parts[:1] != ('logs',) else [])]
    candidates = [path for place in places for path in (place / CHECKPOINT, place)]
    for path in candidates:
        if os.path.isfile(path):  # also False for an invalid name, where others raise
            return path
    raise InputError(f'there is no checkpoint {run}: looked for '
                     + ', '.join(map(str, candidates)))


def check_not_an_input(option: str, output: str | Path, runs: Iterable[str | None],
                       files: Iterable[str | Path] = ()) -> None:
    """Raises InputError, which names the option, if the output file is also an input.

    Inputs are `files` and the checkpoints of `runs`, in which None and torchvision are skipped.
    """
    read = [*files, *(find_checkpoint(run) for run in runs if run and run not in TORCHVISION)]
    if Path(output).resolve() in [Path(path).resolve() for path in read]:
        raise InputError(f'{option} {output} is one of the inputs')


def fetch_torchvision(weights: str) -> Params:
    """torchvision's weights of that name, downloaded once. Raises InputError if that fails."""
    from torchvision import models  # imported here, because that takes seconds
    try:
        return getattr(models, weights).DEFAULT.get_state_dict(check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as e:
        raise InputError(f'torchvision could not download its weights ({e})') from None


# ---------------------------------------------------------------------------- names

def torchvision_name(name: str) -> str:
    """The name in torchvision's state dict of a parameter of `imagenet_resnet`."""
    for ours, theirs in ((r'group(\d)\.block(\d+)', lambda m: f'layer{int(m[1]) + 1}.{m[2]}'),
                         (r'\bconvdim$', 'downsample.0.weight'), (r'\bbndim\.', 'downsample.1.'),
                         (r'\bconv1$', 'conv2.weight'), (r'\bconv0$', 'conv1.weight'),
                         (r'\bbn1\.', 'bn2.'), (r'\bbn0\.', 'bn1.')):
        name = re.sub(ours, theirs, name)
    return name


TORCHVISION_TO_OURS = {torchvision_name(name): name
                       for name in imagenet_resnet_shapes((3, 4, 6, 3), 1, (2, 4, 8, 16), 1)}


def rename_parameters(params: Params) -> Params:
    """Renames the parameters of any supported file as in `resnet`; keeps unknown names.

    The prefix 'student.' is removed, and 'teacher.' parameters are dropped. Folded files have
    `conv_dim` for `convdim`; the attention-transfer export has affines y = a·x + b.
    """
    if any(name.startswith('student.') for name in params):
        params = {name.removeprefix('student.'): t for name, t in params.items()
                  if name.startswith('student.')}
    if 'layer1.0.conv1.weight' in params:
        params = {TORCHVISION_TO_OURS.get(name, name): t for name, t in params.items()
                  if not name.endswith('num_batches_tracked')}
    renamed = {}
    for name, tensor in params.items():
        name = re.sub(r'\baffine(\d)\b', r'bn\1', name)
        name = name.replace('affine_last', 'bn').replace('conv_dim', 'convdim')
        renamed[name] = tensor.reshape(-1, 1, 1) if name.endswith(('.a', '.b')) else tensor
    return renamed


# ---------------------------------------------------------------------------- which network

def load_model(run: str | Path) -> Model:
    """A trained network, from a run, a weight file, or 'torchvision' ('torchvision-18').

    A checkpoint of this code names its network. For other files the network is inferred from the
    parameters' names and shapes. Raises InputError if the file or its parameters do not fit.
    """
    if run in TORCHVISION:
        return recognise_resnet(rename_parameters(fetch_torchvision(TORCHVISION[run])), Path(run))
    path = find_checkpoint(run)
    state = {} if path.suffix == '.hkl' else read_checkpoint(path)
    params = parameters_of(state, path) if state else rename_parameters(read_hickle(path))
    if isinstance(state.get('network'), dict):
        return rebuild(state['network'], params, path)
    if 'group0.conv0' in params or 'group0.conv0.weight' in params:
        options = state.get('options')  # pool_relu cannot be inferred from the parameters
        pool_relu = not isinstance(options, dict) or options.get('pool_relu') is not False
        return recognise_nin(params, path, pool_relu)
    stem = params.get('conv0', params.get('conv0.weight'))
    imagenet = stem is not None and stem.shape[2:] == (7, 7)
    return (recognise_resnet if imagenet else recognise_wide_resnet)(params, path)


def rebuild(spec: dict, params: Params, path: Path) -> Model:
    """The network that `spec`, from a checkpoint of this code, describes, with these parameters."""
    net, numbers = spec.get('net'), {name: v for name, v in spec.items() if name != 'net'}
    # No setting can exceed the size of the largest tensor, and the depth not the number of tensors.
    largest = max((t.numel() for t in params.values()), default=0)
    possible = all(type(v) in (int, float, bool) and abs(v) <= largest for v in numbers.values())
    known = isinstance(net, str) and net in NETWORKS
    if not (known and possible) or numbers.get('depth', 0) > len(params):
        raise InputError(f'{path}: not the weights of a network that is known here')
    try:
        with torch.device('meta'):  # no memory: a small file may describe a network of any size
            model = new_model(net, numbers, numbers.pop('num_classes', 0))
    except InputError as e:
        raise InputError(f'{path}: {e}') from None
    expected = {name: tuple(p.shape) for name, p in model.params.items()}
    check_params(params, expected, '$^', model.name, path)
    return replace(model, params=params)


def check_params(params: Params, expected: Shapes, optional: str, name: str, path: Path) -> None:
    """Raises InputError, naming the first parameter that does not fit, or is not finite.

    A parameter whose name matches the regular expression `optional` may be missing.
    """
    for key in [*expected, *params]:
        found, wanted = tuple(params[key].shape) if key in params else None, expected.get(key)
        if found != wanted and not (found is None and re.search(optional, key)):
            raise InputError(f'{path}: {key} is {found or "missing"}, '
                             f'but {name} has {wanted or "none"}')
        if found and not params[key].isfinite().all():
            raise InputError(f'{path}: {key} is not finite: the run has diverged')


def recognise_wide_resnet(params: Params, path: Path) -> Model:
    """The Wide ResNet that has these parameters. Raises InputError if there is none."""
    blocks = sum(f'group0.block{b}.conv0' in params for b in range(len(params)))
    if not blocks or getattr(params.get('fc.weight'), 'ndim', 0) != 2:
        raise InputError(f'{path}: not the weights of a network that is known here')
    num_classes, channels = params['fc.weight'].shape
    # int(c·w) = int(c·(int(64w)/64)) for c = 16, 32, 64: the last group's channels give the width.
    spec = {'depth': 6 * blocks + 4, 'width': channels / 64, 'num_classes': num_classes}
    return rebuild({'net': 'wrn'} | spec, params, path)


def recognise_resnet(params: Params, path: Path) -> Model:
    """The ImageNet ResNet, folded or not, that has these parameters. Raises InputError if none."""
    bare = {name.removesuffix('.weight'): tuple(t.shape)
            for name, t in params.items() if t.dim() == 4}
    blocks = tuple(sum(f'group{g}.block{b}.conv0' in bare for b in range(len(bare)))
                   for g in range(4))
    depth = {counts: depth for depth, counts in IMAGENET_BLOCKS.items()}.get(blocks)
    try:
        num_classes, _ = params['fc.weight'].shape
        widths = [bare[f'group{g}.block0.conv1'][0] for g in range(4)]
        expected = imagenet_resnet_shapes(blocks, bare['conv0'][0], widths, num_classes)
    except (KeyError, ValueError) as e:
        raise InputError(f'{path}: not an ImageNet ResNet ({e})') from None
    if depth is None:
        raise InputError(f'{path}: a ResNet with {blocks} blocks; '
                         'a ResNet-18 has 2, 2, 2, 2, a ResNet-34 3, 4, 6, 3')
    preactivation, optional = 'bn.a' in params, r'\.bndim\.'  # the published students had no bndim
    if preactivation:
        expected = affine_shapes(expected)
    elif 'conv0.bias' in params:
        expected, optional = folded_shapes(expected), r'\.convdim\.bias$'
    name = resnet_label(depth, widths[-1] / 512)
    check_params(params, expected, optional, name, path)
    f = partial(imagenet_resnet_forward, blocks=blocks, preactivation=preactivation)
    return Model(f, params, name, num_classes, NETWORKS['resnet'])


def recognise_nin(params: Params, path: Path, pool_relu: bool) -> Model:
    """The NIN that has these parameters. Raises InputError if there is none."""
    batch_norm = 'group0.bn0.weight' in params
    try:
        num_classes, channels = params['fc.weight'].shape
        widths = [len(params[name if batch_norm else f'{name}.weight']) for name in NIN_CONVS]
        expected = network_in_network_shapes(widths, num_classes, batch_norm)
    except (KeyError, ValueError, TypeError) as e:
        raise InputError(f'{path}: not a Network-in-Network ({e})') from None
    name = f'NIN-{channels / 192:g}'
    check_params(params, expected, '$^', name, path)
    f = partial(network_in_network_forward, pool_relu=pool_relu)
    return Model(f, params, name, num_classes, NETWORKS['nin'])


def folded_shapes(shapes: Shapes) -> Shapes:
    """Names and shapes once batch norm is folded into the convolutions."""
    folded = {name: shape for name, shape in shapes.items() if name.startswith('fc.')}
    for name, shape in shapes.items():
        if len(shape) == 4:
            folded |= {f'{name}.weight': shape, f'{name}.bias': shape[:1]}
    return folded


def affine_shapes(shapes: Shapes) -> Shapes:
    """Names and shapes of the attention-transfer export: pre-activation, affines for batch norm."""
    affine = {k: shape for k, shape in shapes.items() if len(shape) == 4 or k.startswith('fc.')}
    sizes = {'bn0': shapes['conv0'][0], 'bn': shapes['fc.weight'][1]}
    for name, (out, channels, *_) in [(k, s) for k, s in affine.items() if len(s) == 4]:
        if name.startswith('group') and name.endswith('conv0'):
            sizes[name.replace('conv0', 'bn0')] = channels
            sizes[name.replace('conv0', 'bn1')] = out
    del sizes['group0.block0.bn0']
    return affine | {f'{name}.{ab}': (size, 1, 1) for name, size in sizes.items() for ab in 'ab'}


# ---------------------------------------------------------------------------- folding and export

def fold_batch_norm(model: Model) -> Model:
    """A faster equivalent network, for evaluation only: batch norm is folded.

    Batch norm directly after a convolution is merged into it, as `conv.{weight,bias}`. Any other
    batch norm becomes the affine `name.{a,b}`, y = a·x + b, of shape (C, 1, 1). Computed in
    float64. If the architecture's `folds` is None, nothing is folded.
    """
    folded = {name: tensor.detach() for name, tensor in model.params.items()}
    norms = [name.removesuffix('.running_var') for name in folded if name.endswith('.running_var')]
    for bn in norms if model.architecture.folds is not None else ():
        weight, bias, mean, var = (folded.pop(f'{bn}.{part}').double()
                                   for part in ('weight', 'bias', *STATISTICS))
        scale = weight / torch.sqrt(var + 1e-5)  # (C,)
        shift = bias - mean * scale
        dtype = model.params[f'{bn}.weight'].dtype
        block, _, last = bn.rpartition('.')
        if last in model.architecture.folds:
            conv = f'{block}.{model.architecture.folds[last]}'.removeprefix('.')
            scaled = folded.pop(conv).double() * scale[:, None, None, None]
            folded |= {f'{conv}.weight': scaled.to(dtype), f'{conv}.bias': shift.to(dtype)}
        else:
            folded[f'{bn}.a'] = scale.to(dtype)[:, None, None]
            folded[f'{bn}.b'] = shift.to(dtype)[:, None, None]
    return replace(model, params=folded, n_before_folding=model.n_parameters)


def export_torchvision(params: Params) -> Params:
    """The state dict of torchvision's resnet18 or resnet34, from `imagenet_resnet` at width 1."""
    exported = {torchvision_name(name): tensor.detach() for name, tensor in params.items()}
    for name in [name for name in exported if name.endswith('running_var')]:
        exported[name.replace('running_var', 'num_batches_tracked')] = torch.tensor(0)
    return exported


def is_torchvision(model: Model) -> bool:
    """Whether this is torchvision's resnet18 or resnet34: width 1, batch norm not folded."""
    shapes = {name: tuple(t.shape) for name, t in model.params.items()}
    return any(shapes == imagenet_resnet_shapes(blocks, 64, (64, 128, 256, 512), model.num_classes)
               for blocks in IMAGENET_BLOCKS.values())


def export_folded(model: Model) -> Params:
    """An ImageNet ResNet, folded, with the published names: `conv.{weight,bias}`, `conv_dim`."""
    folded = {name if name.endswith(('.weight', '.bias')) else f'{name}.weight': tensor
              for name, tensor in fold_batch_norm(model).params.items()}
    return {name.replace('convdim', 'conv_dim'): tensor for name, tensor in folded.items()}


def export_format(path: str, chosen: str | None) -> str:
    """'torchvision' or 'folded'. Raises InputError if `path` has a wrong suffix or folder."""
    suffix = Path(path).suffix
    chosen = chosen or ('folded' if suffix == '.hkl' else 'torchvision')
    if suffix not in ('.pth', '.hkl') or (suffix == '.hkl' and chosen == 'torchvision'):
        raise InputError(f'--export {path}: must end in .pth, or in .hkl for the folded format')
    if Path(path).is_dir() or not os.access(Path(path).absolute().parent, os.W_OK):
        raise InputError(f'--export {path}: cannot be written: a folder, or no permission')
    return chosen


def export_content(model: Model, path: str, chosen: str | None) -> bytes:
    """The content of the file of --export: an ImageNet ResNet's weights in the chosen format.

    Raises InputError if the network cannot be written in this format.
    """
    chosen = export_format(path, chosen)
    if chosen == 'torchvision' and not is_torchvision(model):
        raise InputError(f'--export {path}: {model.name} has no form in torchvision, which needs '
                         'width 1, and batch norm also in the shortcuts, not folded; '
                         'try --export_format folded')
    if chosen == 'folded' and 'bn.a' in model.params:
        raise InputError(f'--export {path}: the attention-transfer export has no folded form')
    params = export_torchvision(model.params) if chosen == 'torchvision' else export_folded(model)
    file = io.BytesIO()
    if Path(path).suffix == '.pth':
        torch.save(params, file)
    else:
        import hickle
        with h5py.File(file, 'w') as hdf:
            hickle.dump({name: t.numpy() for name, t in params.items()}, hdf)
    return file.getvalue()
