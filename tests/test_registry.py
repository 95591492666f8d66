"""What is added from outside: a loss, a network, and networks that are no functions of a dict."""
import csv
import re
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import fake, load, options, same, stopped_after

import cifar as script
import imagenet
import paper
import report
import resnet
import tables
from training.log import read_log
from training.options import settings_name
from utils import LOSSES, Loss, load_teacher, objective

# ---------------------------------------------------------------------------- a loss


def similarity_loss(student, teacher):
    """Similarity-preserving distillation (Tung & Mori, 2019), of groups (N, …): a scalar.

    ‖G_S − G_T‖² / N², G the Gram matrix of the flattened activations, each row of unit L2 norm.
    """
    G_S, G_T = (F.normalize(A.flatten(1) @ A.flatten(1).T) for A in (student, teacher.detach()))
    return (G_S - G_T).square().sum() / len(G_S) ** 2


@contextmanager
def similar(needs):
    """The registry with that loss in it."""
    entry = Loss('similarity', 'SP', 'sp_losses', 'weight of similarity-preserving distillation',
                 needs, lambda b, opt: torch.stack(
                     [similarity_loss(b.groups[g], b.teacher_groups[g]) for g in opt.at_groups]))
    LOSSES.append(entry)
    try:
        yield
    finally:
        LOSSES.remove(entry)


@pytest.fixture
def similarity():
    with similar(('groups',)):
        yield


@pytest.mark.parametrize('module', [script, imagenet])
def test_a_loss_is_an_option_of_both_scripts(similarity, module):
    text = ' '.join(module.make_parser().format_help().split())
    assert '--similarity WEIGHT weight of similarity-preserving distillation; 0: off' in text
    assert re.search(r'residual groups for [^;]*--similarity,', text)
    opt = module.make_parser().parse_args(['--similarity', '3e3'])
    assert settings_name(opt, 'net', 'logs/t').startswith(
        f'logs/{opt.dataset}_net_SP3000_from_t_seed0')


def test_a_loss_is_in_the_objective(similarity):
    generator = torch.Generator().manual_seed(0)
    S, T = ([torch.randn(5, c, 4, 4, generator=generator) for _ in range(3)] for c in (6, 8))
    z, y = torch.randn(5, 3, generator=generator), torch.tensor([0, 1, 2, 0, 1])
    S[1].requires_grad_()
    T[1].requires_grad_()
    opt = options('--similarity', 10, '--at_groups', '0,1')
    loss, figures = objective(lambda *_: (z, S), {}, (lambda *_: (z, T), {}),
                              torch.zeros(5, 3, 4, 4), y, opt)
    expected = []
    for A, B in zip(S[:2], T[:2], strict=True):
        a, b = (np.einsum('ichw,jchw->ij', *[G.detach().numpy()] * 2) for G in (A, B))
        a, b = (G / np.linalg.norm(G, axis=1, keepdims=True) for G in (a, b))
        expected.append(((a - b) ** 2).sum() / 25)
    assert figures['sp_losses'].tolist() == pytest.approx(expected, rel=1e-4)
    total = F.cross_entropy(z, y).item() + 10 * sum(expected)
    assert loss.item() == pytest.approx(total, rel=1e-4)
    loss.backward()
    assert S[1].grad.any() and T[1].grad is None


def test_a_loss_is_checked_trained_and_logged(similarity, cifar, work, refused):
    refused(lambda a: cifar(*a), ['--similarity', '1'], '--similarity needs a teacher')
    cifar('--save', 'logs/t', '--width', '0.5', '--epochs', '1')
    refused(lambda a: cifar(*a), ['--teacher_id', 't'], '--grad_at, --similarity')
    cifar('--teacher_id', 't', '--similarity', '100', '--epochs', '1')
    folder = work / 'logs' / 'folder_WRN-10-0.25_SP100_from_t_seed0'
    record = read_log(folder / 'log.txt')[0]
    assert record['similarity'] == 100 and len(record['sp_losses']) == 3
    expected = record['ce_loss'] + 100 * sum(record['sp_losses'])
    assert record['train_loss'] == pytest.approx(expected)


def test_a_loss_has_its_row_and_curves_in_a_table(similarity, work, monkeypatch):
    """Its entry in METHODS is its row. The paper has no figure for it."""
    monkeypatch.setitem(paper.METHODS, 'SP', '--similarity 3e3')
    table = replace(paper.TABLES['1'], cells=tuple(paper.table_1()))
    monkeypatch.setitem(paper.TABLES, '1', table)
    for seed, error in enumerate((9, 10)):
        fake(Path(f't/WRN-16-1_SP_WRN-16-2_seed{seed}'), [50, error], similarity=3e3)
    tables.save_table(*tables.make_parser().parse_known_args(
        ['1', '--row', 'WRN-16-1:WRN-16-2', '--folder', 't', '--seeds', '2']))
    lines = csv.DictReader(Path('t/table1.csv').read_text().splitlines())
    found = {line['method']: (line['paper'], line['confirmed'], line['median']) for line in lines}
    assert found['SP'] == ('', 'False', '9.5') and found['teacher'] == ('6.31', 'True', '')
    assert '>SP<' in Path('t/table1.svg').read_text()


def test_a_loss_on_maps_is_named_with_their_mapping():
    with similar(('groups', 'maps')):
        opt = script.make_parser().parse_args(['--similarity', '3', '--mapping', 'max'])
        assert settings_name(opt, 'net', None) == 'logs/CIFAR10_net_SP3_max2_seed0'
        assert report.method_of(vars(opt)) == 'SP max^2'


# ---------------------------------------------------------------------------- a network

def cifar_resnet(depth=20, width=1, num_classes=10, seed=0):
    """ResNet-20 to -110 for CIFAR (He et al., 2015), post-activation, 6n+2 layers."""
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f'depth {depth}: a CIFAR ResNet has 6n+2 layers')
    blocks, widths = [(depth - 2) // 6] * 3, [int(c * width) for c in (16, 32, 64)]
    shapes = resnet.imagenet_resnet_shapes(blocks, widths[0], widths, num_classes)
    shapes['conv0'] = (widths[0], 3, 3, 3)
    return partial(cifar_resnet_forward, blocks=blocks), resnet.initialize(shapes, seed)


def cifar_resnet_forward(x, params, training, base='', *, blocks):
    x = resnet.conv2d(x, params, f'{base}conv0', padding=1)
    x = F.relu(resnet.batch_norm(x, params, f'{base}bn0', training))
    groups = resnet.run_groups(x, params, training, base, blocks, resnet.basic_block)
    return resnet.classify(groups[-1], params, base), groups


@pytest.fixture
def resnet20(monkeypatch):
    """The registry with that network in it."""
    def label(depth, width):
        return f'CIFAR-ResNet-{depth}-{width:g}'
    entry = resnet.Architecture(cifar_resnet, label, 32, resnet.POST_ACTIVATION)
    monkeypatch.setitem(resnet.NETWORKS, 'cifar_resnet', entry)


def test_a_network_trains_resumes_is_tested_and_teaches(resnet20, work, capsys, refused,
                                                         monkeypatch):
    def train(*argv, net='cifar_resnet'):
        script.main(['--net', net, '--width', '0.25', '--dataset', 'folder', '--dataroot', 'images',
                     '--batch_size', '16', '--epochs', '2', *argv])
    train('--save', 'logs/whole')
    with stopped_after(1):
        train('--save', 'logs/parts')
    script.main(['--resume', 'logs/parts'])
    assert same(load('logs/whole/model.pt7'), load('logs/parts/model.pt7'))
    record = read_log(work / 'logs' / 'whole' / 'log.txt')[-1]
    assert (record['net'], record['depth']) == ('cifar_resnet', 20)
    capsys.readouterr()
    script.main(['--evaluate', 'logs/whole'])
    size, error = f'{record["n_parameters"]:,} parameters', f'{100 - record["test_acc"]:.2f}%'
    assert f'CIFAR-ResNet-20-0.25, {size}, test error {error}' in capsys.readouterr().out
    teacher = load_teacher('whole')
    assert 'conv0.bias' in teacher.params and 'bn0.weight' not in teacher.params  # folded
    train('--save', 'logs/a', '--teacher_id', 'whole', '--beta', '10', '--alpha', '0.5')
    train('--save', 'logs/b', '--teacher_id', 'a', '--factt', '10', '--depth', '10', net='wrn')
    assert len(read_log(work / 'logs' / 'b' / 'log.txt')[0]['act_losses']) == 3
    argv = ['--net', 'cifar_resnet', '--dataset', 'Digits']
    refused(script.main, [*argv, '--depth', '21'], 'depth 21: a CIFAR ResNet has 6n+2 layers')
    monkeypatch.delitem(resnet.NETWORKS, 'cifar_resnet')  # a colleague who has not got it
    refused(script.main, ['--resume', 'logs/a'], '--net: must be one of wrn, nin')
    refused(script.main, ['--dataset', 'Digits', '--teacher_id', 'whole', '--beta', '1'],
            'not the weights of a network that is known here')


# ---------------------------------------------------------------------------- any module

def as_function(module, layers):
    """An nn.Module as f(x, params, training) → (logits, groups), and its parameters."""
    groups = []
    for name in layers:
        module.get_submodule(name).register_forward_hook(lambda m, x, y: groups.append(y))

    def f(x, params, training):
        groups.clear()
        logits = torch.func.functional_call(module.train(training), params, (x,))
        return logits, tuple(groups)
    return f, {name: t.detach() for name, t in module.state_dict().items()}


def test_any_module_is_student_and_teacher():
    models = pytest.importorskip('torchvision.models')
    layers = [f'layer{i}' for i in range(1, 5)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 64, 64, generator=generator)
    y = torch.tensor([0, 1, 2, 3])
    torch.manual_seed(0)
    f, params = as_function(models.resnet18(num_classes=7), layers)
    g, teacher = as_function(models.resnet18(num_classes=7), layers)
    params = {name: t.requires_grad_() if t.is_floating_point() and 'running' not in name else t
              for name, t in params.items()}
    opt = options('--alpha', 0.9, '--beta', 1000, '--at_groups', '0,1,2,3')
    mean = params['bn1.running_mean'].clone()
    loss, figures = objective(f, params, (g, teacher), x, y, opt)
    loss.backward()
    assert figures['at_losses'].shape == (4,) and (figures['at_losses'] > 0).all()
    assert all(t.grad is not None for t in params.values() if t.requires_grad)
    assert params['layer1.0.conv1.weight'].grad.any() and params['fc.weight'].grad.any()
    assert not any(t.requires_grad for t in teacher.values())
    assert not torch.equal(params['bn1.running_mean'], mean)  # the student trains
