"""Published weight files: every form is read, no code in them is run, what is wrong is named."""
import math
import os
import pickle
import shutil
from pathlib import Path

import h5py
import hickle
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import ROOT, close, draw, shaken

import imagenet
import weights
from resnet import (
    IMAGENET_BLOCKS,
    STATISTICS,
    InputError,
    imagenet_resnet,
    imagenet_resnet_shapes,
    wide_resnet,
)
from utils import load_network, load_teacher

HKL = ROOT / 'tests' / 'hkl'
X = draw(2, 3, 64, 64, dtype=torch.float)


def saved(content, path='file.pth'):
    torch.save(content, path)
    return load_network(path)


def equal(network, expected, x=X):
    close(network[0](x, network[1], False), expected[0](x, expected[1], False))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Code:
    def __reduce__(self):
        return os.mkdir, ('code-was-run',)


@pytest.mark.parametrize('generation', [2, 3, 4, 5])
def test_every_hickle_gives_the_arrays_and_nothing_is_unpickled(generation):
    shutil.copy(HKL / f'tiny-resnet18-hickle{generation}.hkl', 'x.hkl')
    with h5py.File('x.hkl', 'a') as file:  # where hickle 4 and 5 store pickled types
        for item in (file, *file.values()):
            item.attrs['type'] = item.attrs['base_type'] = np.void(pickle.dumps(Code()))
    arrays, expected = weights.read_hickle('x.hkl'), np.load(HKL / 'tiny-resnet18.npz')
    assert arrays.keys() == set(expected.files)
    assert all(np.array_equal(arrays[name].numpy(), expected[name]) for name in expected.files)
    Path('logs').mkdir()
    shutil.copy('x.hkl', 'logs/y.hkl')
    equal(load_network('y.hkl'), load_network('x.hkl'))  # found under logs/
    equal(load_network('x.hkl'), saved({k: torch.from_numpy(v) for k, v in expected.items()}))
    assert not Path('code-was-run').exists()


def folded(params):
    """Batch norm folded into the convolutions, y = γ (w·x − μ) / √(σ² + ε) + β, published names."""
    result = {name: p for name, p in params.items() if name.startswith('fc.')}
    for name, w in params.items():
        if w.dim() == 4:
            bn = name.replace('convdim', 'bndim').replace('conv', 'bn')
            gamma, beta, mean, var = (params[f'{bn}.{x}'] for x in ('weight', 'bias', *STATISTICS))
            scale, name = gamma / (var + 1e-5).sqrt(), name.replace('convdim', 'conv_dim')
            result |= {f'{name}.weight': w * scale[:, None, None, None],
                       f'{name}.bias': beta - mean * scale}
    return result


@pytest.mark.parametrize('depth', [18, 34])
def test_folded_export_with_and_without_the_shortcuts_bias(depth):
    whole = shaken(imagenet_resnet(depth, 0.125, 5))
    params = folded(whole[1])
    equal(saved(params), whole)
    biases = {name for name in params if name.endswith('conv_dim.bias')}
    assert len(biases) == 4  # at this width group 0 has a shortcut, too
    without = saved({name: p for name, p in params.items() if name not in biases})
    equal(without, saved(params | {name: torch.zeros_like(params[name]) for name in biases}))
    outputs = [f(X, p, False)[0] for f, p in (whole, without[:2])]
    assert (outputs[0] - outputs[1]).abs().max() > 0.01  # the bias is used where there is one


@pytest.mark.parametrize('form, depth, number', [
    (weights.folded_shapes, 34, 21_789_160), (weights.affine_shapes, 18, 11_687_720)])
def test_published_sizes_of_exports(form, depth, number):
    shapes = imagenet_resnet_shapes(IMAGENET_BLOCKS[depth], 64, (64, 128, 256, 512), 1000)
    assert sum(map(math.prod, form(shapes).values())) == number


def test_attention_transfer_export():
    """Pre-activation, with affines y = a·x + b: as the published code computes it."""
    shapes = imagenet_resnet_shapes((2, 2, 2, 2), 8, (8, 16, 16, 32), 5)
    names = {'bn0': 'affine0', 'bn1': 'affine1', 'bn': 'affine_last', 'convdim': 'conv_dim'}
    p = {'.'.join(names.get(part, part) for part in name.split('.')):
         draw(*shape, seed=i, dtype=torch.float) / shape[-1]
         for i, (name, shape) in enumerate(weights.affine_shapes(shapes).items())}
    p = {name: t.flatten() if name.endswith(('.a', '.b')) else t for name, t in p.items()}

    def affine(x, name):
        a, b = (p[f'{name}.{ab}'][:, None, None] for ab in 'ab')
        return torch.relu(x * a + b)

    def plain(x, *_):
        x = affine(F.conv2d(x, p['conv0'], stride=2, padding=3), 'affine0')
        x, groups = F.max_pool2d(x, 3, 2, 1), []
        for g in range(4):
            for b in range(2):
                name, stride = f'group{g}.block{b}', 2 if g and not b else 1
                o = affine(x, f'{name}.affine0') if (g, b) != (0, 0) else x
                y = F.conv2d(o, p[f'{name}.conv0'], stride=stride, padding=1)
                y = F.conv2d(affine(y, f'{name}.affine1'), p[f'{name}.conv1'], padding=1)
                x = y + (F.conv2d(o, p[f'{name}.conv_dim'], stride=stride) if g and not b else x)
            groups.append(x)
        return affine(x, 'affine_last').mean((2, 3)) @ p['fc.weight'].T + p['fc.bias'], groups
    hickle.dump({name: v.numpy() for name, v in p.items()}, 'at.hkl')  # of today
    equal(load_network('at.hkl'), (plain, p))


def test_published_student_without_batch_norm_in_its_shortcuts():
    f, params = shaken(imagenet_resnet(18, 0.125, 5))
    params = {name: p for name, p in params.items() if '.bndim.' not in name}
    read = saved({'params': params, 'epoch': 3})
    equal(read, (f, params))
    equal(saved({'params': read[1], 'network': read[2]['network']}), (f, params))  # trained on


def test_published_cifar_checkpoints():
    """Alone; beside its teacher, the prefixes with and without DataParallel's; statistics apart."""
    f, params = shaken(wide_resnet(16, 2, 7))
    student = {f'student.{name}': torch.nn.Parameter(p) for name, p in params.items()}
    both = student | {f'teacher.{name}': p for name, p in wide_resnet(10, 1)[1].items()}
    apart = {part: {name: p for name, p in params.items() if name.endswith(STATISTICS) == late}
             for part, late in (('params', False), ('stats', True))}
    for content in ({'params': params, 'optimizer': {}, 'epoch': 200}, params, {'params': both},
                    {'params': {f'module.{name}': p for name, p in both.items()}}, apart):
        g, read, state = saved(content)
        assert state['network'] == {'net': 'wrn', 'depth': 16, 'width': 2, 'num_classes': 7}
        assert read.keys() == params.keys() and not any(p.requires_grad for p in read.values())
        equal((g, read), (f, params), X[..., :16, :16])


@pytest.mark.parametrize('depth', [18, 34])
def test_torchvision_both_ways(depth, monkeypatch):
    _, params = shaken(imagenet_resnet(depth))
    torch.save({'params': params, 'network': {'net': 'resnet', 'depth': depth, 'width': 1,
                                              'num_classes': 1000}}, 'model.pt7')
    url = getattr(torchvision.models, f'ResNet{depth}_Weights').DEFAULT.url
    downloaded = Path('hub', 'checkpoints', url.rpartition('/')[2])  # where torch keeps it
    downloaded.parent.mkdir(parents=True)
    imagenet.main(['--evaluate', 'model.pt7', '--export', str(downloaded)])
    module = getattr(torchvision.models, f'resnet{depth}')().eval()
    module.load_state_dict(torch.load(downloaded, weights_only=True), strict=True)
    monkeypatch.setenv('TORCH_HOME', '.')
    os.link(downloaded, 'torchvision.pth')
    for name in ('torchvision' + '-18' * (depth == 18), str(downloaded), 'torchvision.pth'):
        g, read = load_teacher(name)
        torch.testing.assert_close(g(X, read, False)[0], module(X), rtol=1e-3, atol=1e-3)


def test_what_is_no_weight_file_is_named_in_one_error():
    good = shaken(imagenet_resnet(18, 0.125, 5))[1]
    torch.save(good, 'good.pth')
    for path in (Path('good.pth'), HKL / 'tiny-resnet18-hickle2.hkl'):
        Path(f'cut{path.suffix}').write_bytes(path.read_bytes()[:-9999])
        Path(f'text{path.suffix}').write_text('fc.weight = 1')
    Path('code.pt7').write_bytes(pickle.dumps({'params': Code()}, protocol=2))
    for name, content in (('code', {'params': Code()}), ('list', [1]), ('number', {'conv0': 3})):
        torch.save(content, f'{name}.pth')
    for name, key, content in (('strings', 'data_0/fc.weight/data_0', ['a', 'b']),
                               ('other', 'images', [1, 2]), ('array', 'data', [1, 2])):
        with h5py.File(f'{name}.hkl', 'w') as file:
            file[key] = content
    texts = {path.name: 'not a weight file' for path in Path().iterdir() if path.stem != 'good'}
    for key, p, text in (('group3.block1.conv1', torch.zeros(3, 3, 3, 3), r'is \(3, 3, 3, 3\)'),
                         ('bn0.bias', torch.full((64,), torch.nan), 'is not finite'),
                         ('group0.extra', torch.zeros(1), r'is \(1,\), but'),
                         ('bn0.running_var', None, 'is missing'),
                         ('group2.block2.conv0', torch.zeros(1, 1, 3, 3), 'not a weight file')):
        torch.save({k: v for k, v in (good | {key: p}).items() if v is not None}, key)
        texts[key] = text
    for name, text in texts.items():
        with pytest.raises(InputError, match=f'^{name}: .*{text}'):
            load_teacher(name)
    assert len(texts) == 16 and not Path('code-was-run').exists()
