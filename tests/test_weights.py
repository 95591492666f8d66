"""ImageNet ResNets: file formats of teachers, folding, conversion to torchvision and back."""
from functools import partial
from pathlib import Path
from urllib.parse import urlparse

import hickle
import numpy as np
import pytest
import torch
import torchvision
from helpers import ROOT, affine_export

from resnet import STATISTICS, imagenet_resnet, imagenet_resnet_forward, trainable
from utils import load_teacher
from weights import (
    InputError,
    export_folded,
    export_torchvision,
    fold_batch_norm,
    load_model,
    new_model,
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
                t.uniform_(0.5, 1.5, generator=generator)
                t.sub_(0 if name.endswith(('var', 'weight')) else 1)
    return state


def shaken(prefix='', width=0.125):
    """A narrow ResNet-18 whose batch norm, where the names have this prefix, is random."""
    model = new_model('resnet', {'depth': 18, 'width': width}, 5)
    shake({k: v for k, v in model.params.items() if '.' in k and k.startswith(prefix)})
    return model


def close(a, b):
    a, b = (x[0] if isinstance(x, tuple) else x for x in (a, b))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('generation', [2, 3, 4, 5])
def test_every_hickle_gives_the_arrays(generation):
    path = HKL / f'tiny-resnet18-hickle{generation}.hkl'
    expected = np.load(HKL / 'tiny-resnet18.npz')
    arrays = read_hickle(path)
    assert arrays.keys() == set(expected.files)
    for name in expected.files:
        np.testing.assert_array_equal(arrays[name].numpy(), expected[name])
    model = load_model(path)
    assert (model.name, model.num_classes, model.n_groups) == ('ResNet-18-0.03125', 10, 4)
    assert model.group_channels == (8, 8, 16, 16)
    logits, groups = model.f(X, model.params, False)
    assert logits.shape == (2, 10) and [g.shape[1] for g in groups] == [8, 8, 16, 16]


def test_the_shortcuts_bias_is_used_where_the_file_has_one(tmp_path):
    arrays = {k: torch.from_numpy(v) for k, v in np.load(HKL / 'tiny-resnet18.npz').items()}
    torch.save(arrays, tmp_path / 'with.pth')
    fewer = {k: v for k, v in arrays.items() if not k.endswith('conv_dim.bias')}
    torch.save(fewer, tmp_path / 'without.pth')
    a, b = (load_model(tmp_path / f'{n}.pth') for n in ('with', 'without'))
    assert not torch.allclose(a.f(X, a.params, False)[0], b.f(X, b.params, False)[0], atol=1e-3)


@pytest.mark.parametrize('depth', [18, 34])
def test_torchvision_both_ways(tmp_path, depth):
    module = getattr(torchvision.models, f'resnet{depth}')(num_classes=7).eval()
    shake(module.state_dict())
    torch.save(module.state_dict(), tmp_path / 'tv.pth')
    model, teacher = load_model(tmp_path / 'tv.pth'), load_teacher(tmp_path / 'tv.pth')
    assert model.name == f'ResNet-{depth}' and model.num_classes == 7
    n = sum(p.numel() for p in module.parameters())
    assert model.n_parameters == teacher.n_parameters == n
    with torch.no_grad():
        expected = module(X)
        close(model.f(X, model.params, False), expected)
        close(teacher.f(X, teacher.params, False), expected)
    back = getattr(torchvision.models, f'resnet{depth}')(num_classes=7).eval()
    back.load_state_dict(export_torchvision(model.params))
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
    if width == 1:
        module = getattr(torchvision.models, f'resnet{depth}')(num_classes=5)
        module.load_state_dict(export_torchvision(params))
        close(f(X, params, True)[0], module.train()(X))
        close(params['group3.block0.bndim.running_var'],
              module.layer4[0].downsample[1].running_var)
    assert params['conv0'].shape == (64, 3, 7, 7)
    assert [g.shape for g in f(X, params, False)[1]] == [
        (2, int(c * width), s, s) for c, s in ((64, 16), (128, 8), (256, 4), (512, 2))]
    assert ('group0.block0.convdim' in params) == (width != 1)


def test_published_size_of_the_folded_resnet34():
    with torch.device('meta'):
        params = export_folded(new_model('resnet', {'depth': 34}, 1000))
    assert sum(t.numel() for t in params.values()) == 21_789_160
    assert {n for n in params if 'conv_dim' in n} == {
        f'group{g}.block0.conv_dim.{x}' for g in (1, 2, 3) for x in ('weight', 'bias')}


@pytest.mark.parametrize('suffix', ['pth', 'hkl'])
def test_folded_export_loads_with_the_same_outputs(tmp_path, suffix):
    model = shaken()
    folded = export_folded(model)
    path = tmp_path / f'x.{suffix}'
    if suffix == 'pth':
        torch.save(folded, path)
    else:
        hickle.dump({k: v.numpy() for k, v in folded.items()}, path)
    read = load_model(path)
    with torch.no_grad():
        close(read.f(X, read.params, False), model.f(X, model.params, False))


def test_student_without_batch_norm_in_its_shortcuts(tmp_path):
    whole = shaken()
    params = {k: v for k, v in whole.params.items() if '.bndim.' not in k}
    torch.save({'params': params, 'epoch': 3}, tmp_path / 'model.pt7')
    model, teacher = load_model(tmp_path), load_teacher(tmp_path)
    with torch.no_grad():
        expected = whole.f(X, params, False)
        close(model.f(X, model.params, False), expected)
        close(teacher.f(X, teacher.params, False), expected)
    assert 'group1.block0.conv_dim.bias' not in export_folded(model)


def test_published_size_of_the_attention_transfer_export():
    assert sum(t.numel() for t in affine_export().values()) == 11_687_720


def test_attention_transfer_export(tmp_path):
    p = affine_export(8, (8, 16, 16, 32), 5)
    hickle.dump({k: v.numpy() for k, v in p.items()}, tmp_path / 'at.hkl')
    model = load_model(tmp_path / 'at.hkl')

    def affine(x, name):
        a, b = (p[f'{name}.{ab}'][:, None, None] for ab in 'ab')
        return torch.relu(x * a + b)

    conv = torch.nn.functional.conv2d
    x = affine(conv(X, p['conv0'], stride=2, padding=3), 'affine0')
    x = torch.nn.functional.max_pool2d(x, 3, 2, 1)
    for g in range(4):
        for b in range(2):
            name, stride = f'group{g}.block{b}', 2 if g and not b else 1
            o = affine(x, f'{name}.affine0') if (g, b) != (0, 0) else x
            y = conv(o, p[f'{name}.conv0'], stride=stride, padding=1)
            y = conv(affine(y, f'{name}.affine1'), p[f'{name}.conv1'], padding=1)
            x = y + (conv(o, p[f'{name}.conv_dim'], stride=stride) if g and not b else x)
    x = affine(x, 'affine_last').mean((2, 3)) @ p['fc.weight'].T + p['fc.bias']
    torch.testing.assert_close(model.f(X, model.params, False)[0], x, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize('prefix', ['', 'group0.block0.', 'group1.block0.'])
def test_folded_equals_unfolded(prefix):
    model = shaken(prefix)
    folded = fold_batch_norm(model)
    with torch.no_grad():
        (a, a_groups), (b, b_groups) = (m.f(X, m.params, False) for m in (model, folded))
    close(a, b)
    for p, q in zip(a_groups, b_groups, strict=True):
        close(p, q)
    assert not any(k.split('.')[-1] in (*STATISTICS, 'a') for k in folded.params)
    assert folded.n_parameters == model.n_parameters


def refused(path, text):
    with pytest.raises(InputError, match=text) as e:
        load_model(path)
    assert len(str(e.value).splitlines()) == 1


def test_what_does_not_fit_is_named(tmp_path):
    path = tmp_path / 'x.pth'
    params = {k: v.detach() for k, v in imagenet_resnet(18, 0.125, 5)[1].items()}
    for change, text in (({'group0.block0.conv0': None}, 'blocks'),
                         ({'group2.block0.convdim': None}, 'convdim is missing'),
                         ({'bn0.running_var': None}, 'bn0.running_var is missing'),
                         ({'group3.block1.conv1': torch.zeros(3, 3, 3, 3)},
                          r'group3\.block1\.conv1 is \(3, 3, 3, 3\)'),
                         ({'extra': torch.zeros(3)}, 'extra is'),
                         ({'fc.weight': torch.zeros(5)}, 'not an ImageNet ResNet')):
        torch.save({k: v for k, v in (params | change).items() if v is not None}, path)
        refused(path, text)


def test_a_frozen_network_has_nothing_to_train():
    teacher = load_teacher(HKL / 'tiny-resnet18-hickle2.hkl')
    assert trainable(teacher.params) == {}
    assert isinstance(teacher.f, partial) and teacher.f.func is imagenet_resnet_forward
