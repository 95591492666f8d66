"""ImageNet ResNets: the file formats of teachers, folding, and conversion to torchvision and back."""
import os
from functools import partial
from pathlib import Path
from urllib.parse import urlparse

import h5py
import hickle
import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT

from resnet import STATISTICS, imagenet_resnet, imagenet_resnet_forward, imagenet_resnet_shapes, initialize, trainable
from utils import (
    InputError,
    export_folded,
    export_torchvision,
    fold_batch_norm,
    load_network,
    load_teacher,
    read_hickle,
)

HKL = ROOT / 'tests' / 'hkl'
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def shake(state, seed=0):
    """Random batch-norm parameters and statistics: what is dropped or swapped then shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, t in state.items():
        if t.dim() == 1 and not name.startswith('fc'):
            with torch.no_grad():
                t.uniform_(0.5, 1.5, generator=generator).sub_(0.0 if 'var' in name or name.endswith('weight') else 1)
    return state


def close(a, b):
    a, b = (x[0] if isinstance(x, tuple) else x for x in (a, b))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('generation', [2, 3, 4, 5])
def test_every_hickle_gives_the_arrays(generation):
    path, expected = HKL / f'tiny-resnet18-hickle{generation}.hkl', np.load(HKL / 'tiny-resnet18.npz')
    arrays = read_hickle(path)
    assert arrays.keys() == set(expected.files)
    for name in expected.files:
        np.testing.assert_array_equal(arrays[name].numpy(), expected[name])
    network = load_network(path)
    assert network.name == 'ResNet-18-0.03125' and network.num_classes == 10 and network.n_groups == 4
    logits, groups = network.f(X, network.params, False)
    assert logits.shape == (2, 10) and [g.shape[1] for g in groups] == [8, 8, 16, 16]


def test_the_shortcuts_bias_is_used_where_the_file_has_one(tmp_path):
    arrays = {k: torch.from_numpy(v) for k, v in np.load(HKL / 'tiny-resnet18.npz').items()}
    torch.save(arrays, tmp_path / 'with.pth')
    torch.save({k: v for k, v in arrays.items() if not k.endswith('conv_dim.bias')}, tmp_path / 'without.pth')
    a, b = (load_network(tmp_path / f'{n}.pth') for n in ('with', 'without'))
    assert not torch.allclose(a.f(X, a.params, False)[0], b.f(X, b.params, False)[0], atol=1e-3)


@pytest.mark.parametrize('depth', [18, 34])
def test_torchvision_both_ways(tmp_path, depth):
    module = getattr(torchvision.models, f'resnet{depth}')(num_classes=7).eval()
    shake(module.state_dict())
    torch.save(module.state_dict(), tmp_path / 'tv.pth')
    network, teacher = load_network(tmp_path / 'tv.pth'), load_teacher(tmp_path / 'tv.pth')
    assert network.name == f'ResNet-{depth}' and network.num_classes == 7
    assert network.n_parameters == sum(p.numel() for p in module.parameters())
    with torch.no_grad():
        expected = module(X)
        close(network.f(X, network.params, False), expected)
        close(teacher.f(X, teacher.params, False), expected)
    back = getattr(torchvision.models, f'resnet{depth}')(num_classes=7).eval()
    back.load_state_dict(export_torchvision(network.params))
    assert torch.equal(back(X), module(X))


def test_torchvisions_own(tmp_path, monkeypatch):
    """A file where torchvision keeps what it has downloaded."""
    name = Path(urlparse(torchvision.models.ResNet34_Weights.DEFAULT.url).path).name
    module = torchvision.models.resnet34().eval()
    shake(module.state_dict())
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    (tmp_path / 'hub' / 'checkpoints').mkdir(parents=True)
    torch.save(module.state_dict(), tmp_path / 'hub' / 'checkpoints' / name)
    teacher = load_teacher('torchvision')
    assert teacher.name == 'ResNet-34'
    with torch.no_grad():
        close(teacher.f(X, teacher.params, False), module(X))


@pytest.mark.parametrize('depth, width', [(18, 0.25), (34, 0.1), (18, 1)])
def test_equals_torchvision_in_training(depth, width):
    f, params = imagenet_resnet(depth, width, 5)
    blocks = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3]}[depth]
    if width == 1:
        module = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, blocks, num_classes=5)
        module.load_state_dict(export_torchvision(params))
        close(f(X, params, True)[0], module.train()(X))
        close(params['group3.block0.bndim.running_var'], module.layer4[0].downsample[1].running_var)
    assert params['conv0'].shape == (64, 3, 7, 7)
    assert [g.shape for g in f(X, params, False)[1]] == [(2, int(c * width), s, s) for c, s in
                                                        ((64, 16), (128, 8), (256, 4), (512, 2))]
    assert ('group0.block0.convdim' in params) == (width != 1)


def test_published_size_of_the_folded_resnet34():
    shapes = export_folded(imagenet_resnet(34, 1, 1000)[1])
    assert sum(t.numel() for t in shapes.values()) == 21_789_160
    assert {n for n in shapes if 'conv_dim' in n} == {f'group{g}.block0.conv_dim.{x}' for g in (1, 2, 3)
                                                      for x in ('weight', 'bias')}


@pytest.mark.parametrize('suffix', ['pth', 'hkl'])
def test_folded_export_loads_with_the_same_outputs(tmp_path, suffix):
    f, params = imagenet_resnet(18, 0.125, 5)
    shake({k: v for k, v in params.items() if '.' in k})
    folded = export_folded(params)
    path = tmp_path / f'x.{suffix}'
    if suffix == 'pth':
        torch.save(folded, path)
    else:
        hickle.dump({k: v.numpy() for k, v in folded.items()}, path)
    network = load_network(path)
    with torch.no_grad():
        close(network.f(X, network.params, False), f(X, params, False))


def test_student_without_batch_norm_in_its_shortcuts(tmp_path):
    f, params = imagenet_resnet(18, 0.125, 5)
    shake({k: v for k, v in params.items() if '.' in k})
    params = {k: v for k, v in params.items() if '.bndim.' not in k}
    torch.save({'params': params, 'epoch': 3}, tmp_path / 'model.pt7')
    network, teacher = load_network(tmp_path), load_teacher(tmp_path)
    with torch.no_grad():
        close(network.f(X, network.params, False), f(X, params, False))
        close(teacher.f(X, teacher.params, False), f(X, params, False))
    assert 'group1.block0.conv_dim.bias' not in export_folded(params)


def affine_export(stem=64, widths=(64, 128, 256, 512), classes=1000):
    """A random network in the published naming of the attention-transfer export."""
    shapes = imagenet_resnet_shapes((2, 2, 2, 2), stem, widths, classes)
    params = {k.replace('convdim', 'conv_dim'): v.detach() for k, v in initialize(
        {k: s for k, s in shapes.items() if len(s) == 4 or k.startswith('fc.')}, 0).items()}
    sizes = {'affine0': stem, 'affine_last': widths[-1]}
    for g in range(4):
        for b in range(2):
            if (g, b) != (0, 0):
                sizes[f'group{g}.block{b}.affine0'] = widths[max(g - 1, 0)] if b == 0 else widths[g]
            sizes[f'group{g}.block{b}.affine1'] = widths[g]
    generator = torch.Generator().manual_seed(1)
    return params | {f'{n}.{ab}': torch.randn(size, generator=generator) for n, size in sizes.items() for ab in 'ab'}


def test_published_size_of_the_attention_transfer_export():
    assert sum(t.numel() for t in affine_export().values()) == 11_687_720


def test_attention_transfer_export(tmp_path):
    p = affine_export(8, (8, 16, 16, 32), 5)
    hickle.dump({k: v.numpy() for k, v in p.items()}, tmp_path / 'at.hkl')
    network = load_network(tmp_path / 'at.hkl')

    def affine(x, name):
        return torch.relu(x * p[name + '.a'][:, None, None] + p[name + '.b'][:, None, None])

    conv = torch.nn.functional.conv2d
    x = torch.nn.functional.max_pool2d(affine(conv(X, p['conv0'], stride=2, padding=3), 'affine0'), 3, 2, 1)
    for g in range(4):
        for b in range(2):
            name, stride = f'group{g}.block{b}', 2 if g and not b else 1
            o = affine(x, f'{name}.affine0') if (g, b) != (0, 0) else x
            y = conv(affine(conv(o, p[f'{name}.conv0'], stride=stride, padding=1), f'{name}.affine1'),
                     p[f'{name}.conv1'], padding=1)
            x = y + (conv(o, p[f'{name}.conv_dim'], stride=stride) if g and not b else x)
    x = affine(x, 'affine_last').mean((2, 3)) @ p['fc.weight'].T + p['fc.bias']
    torch.testing.assert_close(network.f(X, network.params, False)[0], x, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize('prefix', ['', 'group0.block0.', 'group1.block0.'])
def test_folded_equals_unfolded(prefix):
    f, params = imagenet_resnet(18, 0.125, 5)
    shake({k: v for k, v in params.items() if '.' in k and k.startswith(prefix)})
    with torch.no_grad():
        (a, a_groups), (b, b_groups) = f(X, params, False), f(X, fold_batch_norm(params), False)
    close(a, b)
    for p, q in zip(a_groups, b_groups, strict=True):
        close(p, q)
    assert not any(k.split('.')[-1] in (*STATISTICS, 'a') for k in fold_batch_norm(params))


def refused(path, text):
    with pytest.raises(InputError, match=text) as e:
        load_network(path)
    assert len(str(e.value).splitlines()) == 1


def test_what_does_not_fit_is_named(tmp_path):
    path = tmp_path / 'x.pth'
    params = {k: v.detach() for k, v in imagenet_resnet(18, 0.125, 5)[1].items()}
    for change, text in (({'group0.block0.conv0': None}, 'blocks'),
                         ({'group2.block0.convdim': None}, 'convdim is missing'),
                         ({'bn0.running_var': None}, 'bn0.running_var is missing'),
                         ({'group3.block1.conv1': torch.zeros(3, 3, 3, 3)}, r'group3\.block1\.conv1 is \(3, 3, 3, 3\)'),
                         ({'extra': torch.zeros(3)}, 'extra is'),
                         ({'fc.weight': torch.zeros(5)}, 'not an ImageNet ResNet')):
        torch.save({k: v for k, v in (params | change).items() if v is not None}, path)
        refused(path, text)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_hostile_hkl(tmp_path):
    import pickle
    path, marker = tmp_path / 'x.hkl', tmp_path / 'marker'
    with h5py.File(path, 'w') as f:
        f['data/"conv0.weight"'] = np.zeros(3, np.float32)
        for item in (f, f['data'], f['data/"conv0.weight"']):
            item.attrs['type'] = np.void(pickle.dumps(Bomb(marker)))
        f['data/"x"'] = np.void(pickle.dumps(Bomb(marker)))
    refused(path, 'not the weights')
    with h5py.File(path, 'w') as f:  # a terabyte in a few kilobytes
        f.create_dataset('data/"fc.bias"', shape=(2 ** 38,), dtype='f4', chunks=(2 ** 20,), compression='gzip')
    refused(path, 'not the weights')
    with h5py.File(path, 'w') as f:
        f['data'] = h5py.ExternalLink(str(HKL / 'tiny-resnet18-hickle5.hkl'), '/data')
    refused(path, 'not a file that hickle wrote')
    with h5py.File(path, 'w') as f:
        f['data/"fc.bias"'] = h5py.Empty('f')
    refused(path, 'not the weights')
    (tmp_path / 'secret').write_bytes(bytes(64))
    with h5py.File(path, 'w') as f:
        f.create_dataset('data/"conv0.weight"', (16,), 'f4', external=[(str(tmp_path / 'secret'), 0, 64)])
    refused(path, 'not the weights')
    for content in (b'', b'no HDF5', (HKL / 'tiny-resnet18-hickle5.hkl').read_bytes()[:5000]):
        path.write_bytes(content)
        refused(path, 'not an HDF5 file')
    assert not marker.exists()


def test_a_frozen_network_has_nothing_to_train():
    teacher = load_teacher(HKL / 'tiny-resnet18-hickle2.hkl')
    assert trainable(teacher.params) == {}
    assert isinstance(teacher.f, partial) and teacher.f.func is imagenet_resnet_forward
