"""Network-in-Network against the same in torch.nn, sizes, files, and table 3's weights."""
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, load, rows_of
from torch import nn

import cifar as script
from resnet import STATISTICS, network_in_network, trainable
from training.log import read_log
from utils import fold_batch_norm, load_model, load_teacher, new_model

VARIANTS = [(bn, relu) for bn in (True, False) for relu in (True, False)]


def reference(width, classes, batch_norm, pool_relu):
    """The three blocks, pooled, and the classifier, as modules."""
    def block(channels, sizes):
        layers = []
        for i, (ni, no, size) in enumerate(zip(channels, channels[1:], sizes, strict=False)):
            layers += [nn.Conv2d(ni, no, size, padding=size // 2, bias=not batch_norm)]
            layers += [nn.BatchNorm2d(no)] * batch_norm + [nn.ReLU()] * (pool_relu or i < 2)
        return nn.Sequential(*layers)

    a, b, c = (int(n * width) for n in (192, 160, 96))
    return nn.ModuleList([block((3, a, b, c), (5, 1, 1)), nn.MaxPool2d(3, 2, ceil_mode=True),
                          block((c, a, a, a), (5, 1, 1)), nn.AvgPool2d(3, 2, ceil_mode=True),
                          block((a, a, a, a), (3, 1, 1)), nn.AvgPool2d(8), nn.Linear(a, classes)])


@pytest.mark.parametrize('width, batch_norm, count', [
    (1, True, 1_005_642), (0.5, True, 256_298),
    (1, False, 1_005_642 - 2 * 1600 + 1600), (0.5, False, 255_498)])
def test_parameter_counts(width, batch_norm, count):
    params = network_in_network(width, 10, batch_norm=batch_norm)[1]
    assert sum(p.numel() for p in trainable(params).values()) == count
    assert any(k.endswith('conv0.bias') for k in params) != batch_norm
    assert any('.bn' in k for k in params) == batch_norm


@pytest.mark.parametrize('batch_norm, pool_relu', VARIANTS)
def test_equals_the_same_network_in_modules(batch_norm, pool_relu):
    f, params = network_in_network(1 / 12, 7, 3, batch_norm, pool_relu)
    modules = reference(1 / 12, 7, batch_norm, pool_relu)
    ours, theirs = ([p for p in group if p.dim() > 1]
                    for group in (trainable(params).values(), modules.parameters()))
    with torch.no_grad():
        for a, b in zip(theirs, ours, strict=True):
            a.copy_(b)
        weights = [p for k, p in params.items() if '.bn' in k and k.endswith('.weight')]
        norms = [m for m in modules.modules() if isinstance(m, nn.BatchNorm2d)]
        for module, weight in zip(norms, weights, strict=True):
            module.weight.copy_(weight)
        for module in modules.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                module.bias.zero_()
    x = torch.randn(3, 3, 32, 32)
    for training in (True, False):
        logits, groups = f(x, params, training)
        y, expected = x, []
        for i, module in enumerate(modules.train(training)[:6]):
            y = module(y)
            expected += [y] * (i % 2 == 0)
        torch.testing.assert_close(logits, modules[6](y.flatten(1)), rtol=1e-4, atol=1e-4)
        for a, b in zip(groups, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert all((a.min() >= 0) == pool_relu for a in groups)


@pytest.mark.parametrize('batch_norm', [True, False])
def test_folded_equals_unfolded(batch_norm):
    model = new_model('nin', {'width': 0.1, 'batch_norm': batch_norm}, 5, seed=1)
    f, params = model.f, model.params
    for _ in range(3):
        f(torch.randn(8, 3, 16, 16) + 1, params, True)
    folded, x = fold_batch_norm(model).params, torch.randn(4, 3, 16, 16)
    (a, a_groups), (b, b_groups) = f(x, params, False), f(x, folded, False)
    for p, q in zip((a, *a_groups), (b, *b_groups), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
    assert not any(k.endswith(STATISTICS) or '.bn' in k for k in folded)


@pytest.mark.parametrize('batch_norm, pool_relu', VARIANTS)
def test_a_run_is_read_as_what_it_was(work, batch_norm, pool_relu, capsys):
    settings = {'batch_norm': batch_norm, 'pool_relu': pool_relu}
    script.main(['--net', 'nin', '--width', '0.05', '--dataset', 'folder', '--dataroot', 'images',
                 '--lr', '0.001', '--epochs', '1',
                 *(f'--{"" if on else "no-"}{name}' for name, on in settings.items())])
    name = f'NIN-0.05{"" if batch_norm else "-nobn"}{"" if pool_relu else "-nopoolrelu"}'
    run = f'logs/folder_{name}_seed0'
    state = load(f'{run}/model.pt7')
    assert state['network'] == {'net': 'nin', 'width': 0.05, 'num_classes': 3} | settings
    del state['network']  # as older checkpoints, whose names, shapes and options tell
    torch.save(state, 'old.pt7')
    f, _ = network_in_network(0.05, 3, 0, batch_norm, pool_relu)
    x = torch.randn(2, 3, 16, 16)
    for model in (load_model(run), load_teacher(run), load_model('old.pt7')):
        torch.testing.assert_close(model.f(x, model.params, False)[0],
                                   f(x, state['params'], False)[0], rtol=1e-3, atol=1e-3)
        assert model.n_groups == 3 and model.num_classes == 3
    for path, expected in ((run, name), ('old.pt7', 'NIN-0.046875')):
        capsys.readouterr()
        script.main(['--evaluate', path])
        assert f'{path}: {expected}, ' in capsys.readouterr().out


def test_what_is_no_nin_is_named(work, refused):
    argv = ['--evaluate', 'x.pt7', '--dataset', 'folder', '--dataroot', 'images']
    params = network_in_network(0.05, 3)[1]
    for name, text in (('group1.bn2.weight', 'group1.bn2.weight is missing'),
                       ('group2.conv1', 'not a Network-in-Network')):
        del params[name]
        torch.save({'params': params}, 'x.pt7')
        refused(script.main, argv, text)


@pytest.mark.slow
def test_weights_benchmark_chooses_on_held_out_training_images(work):
    command = [sys.executable, ROOT / 'tests' / 'benchmarks' / 'loss_weights.py', '--folder', 'w',
               '--images', 'images', '--train', '6', '--held_out', '9', '--weights', '1', '10',
               '--width', '0.05', '--batch_size', '16', '--epochs', '1', '--ngpu', '0']
    first, again = (subprocess.run(command, check=True, capture_output=True, text=True).stdout
                    for _ in range(2))
    assert 'epoch 1/1' in first and 'epoch' not in again and first.endswith(again)
    held_out, trained_on = ({p.resolve() for p in (work / 'w/images' / part).glob('*/*')}
                            for part in ('test', 'train'))
    assert (len(held_out), len(trained_on)) == (27, 18) and not held_out & trained_on
    assert all(work / 'images/train' in p.parents for p in held_out | trained_on)
    alone, *rows = rows_of(again)
    assert alone[0] == 'none' and {row[1] for row in rows} >= {'1', '10'}
    for label in ('gradient AT', 'symmetry norm', 'min-l2'):
        errors = {row[1]: float(row[2]) for row in rows if row[0] == label}
        chosen, = (row[1] for row in rows if row[0] == label and row[4])
        assert errors[chosen] == min(errors.values())
        run = work / f'w/NIN-thin-nobn_{label.replace(" ", "-")}_{chosen}_seed0'
        error = 100 - read_log(run / 'log.txt')[-1]['test_acc']
        assert errors[chosen] == pytest.approx(error, abs=0.01)
