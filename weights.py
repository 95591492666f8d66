"""Published weight files: finding out which network a file holds, and writing one.

It reads checkpoints of the published code, its exports (.hkl of hickle 2 to 5, or the same as
.pth), and torchvision's ResNet-18 and -34. `utils.load_network` calls it for files from which
`utils.new_network` cannot build the network. No code in a file is run.
"""
import re
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

import resnet
from resnet import IMAGENET_BLOCKS, NETWORKS, InputError, Network, Params, Shapes
from utils import PRETRAINED


def load(run: str, state: dict[str, Any]) -> tuple[Network, Params, Shapes, dict[str, Any]]:
    """(f, params, shapes, network) of 'torchvision', 'torchvision-18', a .hkl or a torch file.

    `state` is a torch file's content, `shapes` what f expects; `network`, as of `new_network`, has
    the entry `form` if `new_network` cannot rebuild it. Raises errors of many types.
    """
    if run in PRETRAINED:
        from torchvision import models  # imported here: it takes seconds
        entry = getattr(models, PRETRAINED[run]).DEFAULT
        params = entry.get_state_dict(check_hash=True, weights_only=True)
    elif run.endswith('.hkl'):
        params = read_hickle(run)
    else:  # early published files have the running statistics apart
        params = state.get('params', state) | state.get('stats', {})
    params = rename({name: t.detach().float() for name, t in params.items()})
    stem = params.get('conv0', params.get('conv0.weight'))
    if stem is None or 'fc.weight' not in params:
        raise ValueError('no network that is known here')
    recognise = recognise_resnet if stem.shape[-1] == 7 else recognise_wide_resnet
    f, shapes, network = recognise(params)
    return f, params, shapes, network


def read_hickle(path: str) -> Params:
    """The arrays of a dict that hickle 2 to 5 saved, {name: tensor}. Nothing is unpickled."""
    params = {}
    with h5py.File(path, 'r') as file:
        # hickle 2: data_0/NAME/data_0, 3: data_0/'NAME'/data_0, 4: data/'NAME'/data, 5: data/"NAME"
        for name, item in file['data' if 'data' in file else 'data_0'].items():
            array = item if isinstance(item, h5py.Dataset) else next(iter(item.values()))
            params[name.strip('\'"')] = torch.from_numpy(np.asarray(array[()], np.float32))
    return params


def torchvision_name(name: str) -> str:
    """The name in torchvision's state dict of a parameter of `imagenet_resnet`."""
    for ours, theirs in ((r'group(\d)\.block(\d+)', lambda m: f'layer{int(m[1]) + 1}.{m[2]}'),
                         (r'\bconvdim$', 'downsample.0.weight'), (r'\bbndim\.', 'downsample.1.'),
                         (r'\bconv1$', 'conv2.weight'), (r'\bconv0$', 'conv1.weight'),
                         (r'\bbn1\.', 'bn2.'), (r'\bbn0\.', 'bn1.')):
        name = re.sub(ours, theirs, name)
    return name


def rename(params: Params) -> Params:
    """The parameters of any file, named as in `resnet`; unknown names are kept.

    The prefix 'student.' goes, and so do 'teacher.' parameters; 'module.' is DataParallel's. Files
    with folded batch norm write `conv_dim` where we write `convdim`. The attention-transfer export
    has an affine y = a·x + b for each batch norm, which becomes `bn….a` and `bn….b`.
    """
    params = {name.removeprefix('module.'): t for name, t in params.items()}
    if any(name.startswith('student.') for name in params):
        params = {name.removeprefix('student.'): t for name, t in params.items()
                  if name.startswith('student.')}
    if 'layer1.0.conv1.weight' in params:
        shapes = resnet.imagenet_resnet_shapes(IMAGENET_BLOCKS[34], 64, (64, 128, 256, 512), 1)
        ours = {torchvision_name(name): name for name in shapes}  # ResNet-18 has a part of them
        params = {ours.get(name, name): t for name, t in params.items()
                  if not name.endswith('num_batches_tracked')}
    renamed = {}
    for name, t in params.items():
        name = re.sub(r'\baffine(\d)\b', r'bn\1', name)
        name = name.replace('affine_last', 'bn').replace('conv_dim', 'convdim')
        renamed[name] = t.reshape(-1, 1, 1) if name.endswith(('.a', '.b')) else t
    return renamed


def recognise_wide_resnet(params: Params) -> tuple[Network, Shapes, dict[str, Any]]:
    """The Wide ResNet that has these parameters: the function, its shapes, `network`."""
    blocks = sum(f'group0.block{b}.conv0' in params for b in range(len(params)))
    num_classes, channels = params['fc.weight'].shape  # the last group has 64 · width channels
    settings = {'depth': 6 * blocks + 4, 'width': channels / 64, 'num_classes': num_classes}
    f, expected = NETWORKS['wrn'].build(**settings)
    return f, shapes_of(expected), {'net': 'wrn', **settings}


def recognise_resnet(params: Params) -> tuple[Network, Shapes, dict[str, Any]]:
    """The ImageNet ResNet that has these parameters: complete, without bndim, folded, or affine."""
    bare = {name.removesuffix('.weight'): shape
            for name, shape in shapes_of(params).items() if len(shape) == 4}
    blocks = tuple(sum(f'group{g}.block{b}.conv0' in bare for b in range(len(bare)))
                   for g in range(4))
    depth = {counts: depth for depth, counts in IMAGENET_BLOCKS.items()}.get(blocks)
    if depth is None:
        raise ValueError(f'a ResNet of {blocks} blocks; 18 has 2, 2, 2, 2, 34 has 3, 4, 6, 3')
    widths = [bare[f'group{g}.block0.conv1'][0] for g in range(4)]
    num_classes = len(params['fc.weight'])
    shapes = resnet.imagenet_resnet_shapes(blocks, bare['conv0'][0], widths, num_classes)
    network = {'net': 'resnet', 'depth': depth, 'width': widths[-1] / 512,
               'num_classes': num_classes}
    if params.keys() != shapes.keys():
        network['form'] = 'published'
    preactivation = 'bn.a' in params
    if preactivation:
        shapes = affine_shapes(shapes)
    elif 'conv0.bias' in params:
        shapes = folded_shapes(shapes)
    shapes = {name: shape for name, shape in shapes.items() if name in params
              or not re.search(r'\.bndim\.|\.convdim\.bias$', name)}  # files may lack them
    f = partial(resnet.imagenet_resnet_forward, blocks=blocks, preactivation=preactivation)
    return f, shapes, network


def shapes_of(params: Params) -> Shapes:
    return {name: tuple(t.shape) for name, t in params.items()}


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
    for name, shape in affine.items():
        if name.endswith('.conv0'):
            sizes[name.replace('conv0', 'bn0')] = shape[1]
            sizes[name.replace('conv0', 'bn1')] = shape[0]
    del sizes['group0.block0.bn0']
    return affine | {f'{name}.{ab}': (size, 1, 1) for name, size in sizes.items() for ab in 'ab'}


def export(params: Params, path: Path) -> None:
    """Writes a ResNet: .hkl as it is, .pth for torchvision. Raises InputError where it cannot."""
    params = {name: t.detach().cpu().contiguous() for name, t in params.items()}
    if path.suffix == '.hkl':
        import hickle
        hickle.dump({name: t.numpy() for name, t in params.items()}, str(path), mode='w')
        return
    theirs = [resnet.imagenet_resnet_shapes(blocks, 64, (64, 128, 256, 512), len(params['fc.bias']))
              for blocks in IMAGENET_BLOCKS.values()]
    if shapes_of(params) not in theirs:
        raise InputError(f'{path}: torchvision has no such network: it needs width 1, and batch '
                         'norm also in the shortcuts; a .hkl file takes any')
    exported = {torchvision_name(name): t for name, t in params.items()}
    for name in [name for name in exported if name.endswith('running_var')]:
        exported[name.replace('running_var', 'num_batches_tracked')] = torch.tensor(0)
    torch.save(exported, path)
