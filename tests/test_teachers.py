"""Checkpoints: where they are found, what they are recognised as, what is refused; nothing in them
is run."""
import os
from collections import OrderedDict

import pytest
import torch
from helpers import load

import cifar as script
from resnet import NETWORKS, STATISTICS, Architecture, initialize, wide_resnet
from utils import load_teacher
from weights import (
    InputError,
    find_checkpoint,
    fold_batch_norm,
    load_model,
    new_model,
    read_checkpoint,
)


def trained(depth=10, width=0.5, classes=4):
    f, params = wide_resnet(depth, width, classes, seed=1)
    f(torch.randn(8, 3, 8, 8), params, True)
    return f, {k: v.detach().clone() for k, v in params.items()}


X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def check(path, f, params):
    model, teacher = load_model(path), load_teacher(path)
    expected = f(X, params, False)[0]
    assert torch.equal(model.f(X, model.params, False)[0], expected)
    torch.testing.assert_close(teacher.f(X, teacher.params, False)[0], expected,
                               rtol=1e-4, atol=1e-4)
    return model


def test_found_under_logs_as_a_folder_and_as_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, params = trained()
    for folder in ('logs/a', 'elsewhere/b'):
        os.makedirs(folder)
        torch.save({'params': params}, f'{folder}/model.pt7')
    torch.save({'params': params}, 'c.pt7')
    for run, path in (('a', 'logs/a/model.pt7'), ('logs/a', 'logs/a/model.pt7'), ('c.pt7', 'c.pt7'),
                      ('elsewhere/b', 'elsewhere/b/model.pt7'),
                      ('logs/a/model.pt7', 'logs/a/model.pt7')):
        assert str(find_checkpoint(run)) == path
    os.makedirs('a')  # a folder that is there comes before a name under logs/
    torch.save({'params': params}, 'a/model.pt7')
    assert str(find_checkpoint('a')) == 'a/model.pt7'
    assert str(find_checkpoint('logs/a')) == 'logs/a/model.pt7'
    with pytest.raises(InputError, match=r'logs/d/model\.pt7'):
        find_checkpoint('d')


@pytest.mark.parametrize('depth, width, classes', [(10, 1, 10), (16, 0.3, 3), (22, 2.6, 100)])
def test_architecture_follows_from_the_parameters(tmp_path, depth, width, classes):
    f, params = trained(depth, width, classes)
    torch.save({'params': params}, tmp_path / 'model.pt7')
    model = check(tmp_path, f, params)
    assert model.num_classes == classes and model.n_groups == 3
    assert model.name == f'WRN-{depth}-{int(64 * width) / 64:g}'
    n = sum(v.numel() for k, v in params.items() if not k.endswith(STATISTICS))
    assert model.n_parameters == fold_batch_norm(model).n_parameters == n


@pytest.mark.parametrize('net, settings, name', [
    ('wrn', {'depth': 16, 'width': 0.3}, 'WRN-16-0.3'),
    ('nin', {'width': 0.05}, 'NIN-0.05'),
    ('nin', {'width': 0.07, 'batch_norm': False, 'pool_relu': False}, 'NIN-0.07-nobn-nopoolrelu'),
    ('resnet', {'depth': 34, 'width': 0.03}, 'ResNet-34-0.03')])
def test_a_checkpoint_of_ours_is_rebuilt_as_it_says(tmp_path, net, settings, name):
    model = new_model(net, settings, 4, seed=1)
    params = {k: p.detach() for k, p in model.params.items()}
    torch.save({'params': params, 'network': model.spec}, tmp_path / 'model.pt7')
    read = load_model(tmp_path)
    assert (read.name, read.spec, read.f.keywords) == (name, model.spec, model.f.keywords)
    assert (read.num_classes, read.architecture.image_size) == (4, model.architecture.image_size)
    x = torch.randn(2, 3, model.architecture.image_size // 4, model.architecture.image_size // 4)
    assert torch.equal(read.f(x, read.params, False)[0], model.f(x, params, False)[0])
    torch.save({'params': params}, tmp_path / 'model.pt7')  # an older one: the shapes tell
    assert load_model(tmp_path).n_parameters == model.n_parameters


def tiny(width=1, num_classes=10, seed=0):
    """A network of one convolution and one linear layer."""
    channels = int(4 * width)
    shapes = {'stem': (channels, 3, 3, 3), 'fc.weight': (num_classes, channels)}

    def f(x, params, training):
        x = torch.conv2d(x, params['stem'], stride=2)  # (N, C, h, w)
        return x.relu().mean((2, 3)) @ params['fc.weight'].T, (x,)
    return f, initialize(shapes, seed)


def test_a_new_network_takes_an_entry_and_its_checkpoints_teach_and_resume(work, monkeypatch,
                                                                            capsys):
    entry = Architecture(tiny, lambda width: f'Tiny-{width:g}', 32)
    monkeypatch.setitem(NETWORKS, 'tiny', entry)
    argv = ['--net', 'tiny', '--dataset', 'folder', '--dataroot', 'images']
    script.main([*argv, '--epochs', '1', '--width', '1.25', '--save', 'logs/t'])
    script.main(['--resume', 't', '--epochs', '2'])
    assert load('logs/t/model.pt7')['epoch'] == 2
    script.main([*argv, '--epochs', '1', '--save', 's', '--teacher_id', 't', '--beta', '1'])
    assert 'teacher t: Tiny-1.25, 150 parameters' in capsys.readouterr().out
    script.main(['--evaluate', 's'])
    assert 's: Tiny-1, 120 parameters' in capsys.readouterr().out


def test_published_student_with_its_teacher(tmp_path):
    f, params = trained()
    both = OrderedDict({f'student.{k}': v if k.endswith(STATISTICS) else torch.nn.Parameter(v)
                        for k, v in params.items()})
    both.update({f'teacher.{k}': v for k, v in trained(16, 1)[1].items()})
    optimizer = torch.optim.SGD([v for v in both.values() if v.requires_grad], 0.1)
    torch.save({'params': both, 'optimizer': optimizer.state_dict(), 'epoch': 200},
               tmp_path / 'model.pt7')
    check(tmp_path, f, params)


def test_published_legacy_format_with_statistics_apart(tmp_path):
    f, params = trained()
    torch.save({'params': {k: v for k, v in params.items() if not k.endswith(STATISTICS)},
                'stats': {k: v for k, v in params.items() if k.endswith(STATISTICS)},
                'epoch': 1}, tmp_path / 'model.pt7', _use_new_zipfile_serialization=False)
    check(tmp_path, f, params)


def refused(path, content, text):
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=text) as e:
        load_model(path)
    assert str(path) in str(e.value) and len(str(e.value).splitlines()) == 1


def test_what_is_no_network_is_refused(tmp_path):
    path = tmp_path / 'model.pt7'
    _, params = trained()
    whole = {'params': params}
    torch.save(whole, path)
    raw = path.read_bytes()
    refused(path, raw[:len(raw) // 2], 'a damaged one')
    refused(path, b'\x89PNG not torch at all', 'a damaged one')
    refused(path, [1, 2], 'holds a list')
    refused(path, {'epoch': 1}, 'is not a named tensor')
    refused(path, {'params': 1}, "'params' is not a dict")
    refused(path, {'params': {'conv0': 3}}, 'is not a named tensor')
    refused(path, {'params': {'a': torch.zeros(2)}}, 'not the weights of a network')
    refused(path, {'params': {**params, 'extra': torch.zeros(2)}}, 'extra')
    refused(path, {'params': {k: v for k, v in params.items() if k != 'bn.running_var'}},
            'bn.running_var is missing')
    refused(path, {'params': {**params, 'group1.block0.conv1': torch.zeros(16, 16, 1, 1)}},
            'group1.block0.conv1')
    refused(path, {'params': {'a': torch.zeros(2)}, 'stats': 5}, 'not the weights of a network')


@pytest.mark.parametrize('change, text', [
    ({'net': 'transformer'}, 'not the weights of a network that is known here'),
    ({'net': None}, 'known here'), ({'net': ['wrn']}, 'known here'),
    ({'net': {'net': torch.zeros(3, 3)}}, 'known here'), ({'depth': 604}, 'known here'),
    ({'depth': 6 * 10 ** 9 + 4}, 'known here'), ({'depth': '10'}, 'known here'),
    ({'depth': [10]}, 'known here'),
    ({'width': torch.zeros(3, 3)}, 'known here'), ({'width': float('nan')}, 'known here'),
    ({'width': float('inf')}, 'known here'), ({'width': -10 ** 400}, 'of type int'),
    ({'x': {'y': 1}}, 'known here'), ({'num_classes': 2 ** 40}, 'known here'),
    ({'depth': 11}, 'depth 11: a Wide ResNet has'), ({'depth': 10.0}, 'integer'),
    ({'width': -1}, 'group 0 has no channels'),
    ({'width': 2000}, r'is \(8, 16, 3, 3\), but WRN-10-2000'),
    ({'num_classes': 5}, r'fc.weight is \(4, 32\), but WRN-10-0.5 has \(5, 32\)'),
    ({'num_classes': -4}, 'negative'), ({'net': 'nin'}, 'is missing, but NIN-0.5'),
    ({'net': 'resnet', 'depth': 18}, 'but ResNet-18-0.5')])
def test_a_hostile_network_entry_is_refused(tmp_path, change, text):
    """At once, and without building what would not fit the memory."""
    network = {'net': 'wrn', 'depth': 10, 'width': 0.5, 'num_classes': 4}
    refused(tmp_path / 'model.pt7', {'params': trained()[1], 'network': network | change}, text)


def test_missing_file():
    with pytest.raises(InputError, match='no such file'):
        read_checkpoint('/nowhere/model.pt7')
