"""The method: losses against their formulas, options, teachers, and what others add."""
import shutil
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, SMALL, draw, load, log_of
from torch.autograd import gradcheck

import cifar as script
import utils
from resnet import NETWORKS, Architecture, InputError, initialize
from utils import activation_loss, at_loss, attention_map, kd_loss, load_teacher, objective

EXACT = {'rel': 1e-10, 'abs': 1e-14}


def unit(A):
    return A.flatten(1) / A.flatten(1).square().sum(1, keepdim=True).sqrt()


def plain_map(A, mapping='sum', p=2.0):
    A = A.abs() ** p
    return unit(A.sum(1) if mapping == 'sum' else A.max(1).values)


def mean_square(a, b):
    return pytest.approx(((a - b) ** 2).mean().item(), **EXACT)


@pytest.mark.parametrize('mapping', ['sum', 'max'])
@pytest.mark.parametrize('p', [1, 2, 3.5, 4])
def test_at_loss(mapping, p):
    S, T = draw(3, 5, 4, 6), draw(3, 8, 4, 6, seed=1)
    loss, Q_S, Q_T = at_loss(S, T, mapping, p), plain_map(S, mapping, p), plain_map(T, mapping, p)
    torch.testing.assert_close(attention_map(S, mapping, p), Q_S, rtol=1e-10, atol=0)
    assert loss.item() == mean_square(Q_S, Q_T)
    assert (loss == at_loss(S, T)) == ((mapping, p) == ('sum', 2))
    assert at_loss(7 * S, 0.1 * T, mapping, p).item() == pytest.approx(loss.item(), **EXACT)
    assert gradcheck(lambda S: at_loss(S, T, mapping, p), S.clone().requires_grad_())
    if p > 2:  # powers that overflow
        torch.testing.assert_close(attention_map(1e20 * S.float(), mapping, p), Q_S.float())
    dead = torch.zeros(3, 5, 4, 6, requires_grad=True)
    at_loss(dead, T.float(), mapping, p).backward()
    assert dead.grad.isfinite().all()


def test_maps_of_unequal_size_are_pooled_to_the_smaller():
    S, T = draw(2, 3, 8, 4), draw(2, 3, 4, 8, seed=1)
    Q_S = unit(S.square().sum(1).reshape(2, 4, 2, 4).mean(2))
    Q_T = unit(T.square().sum(1).reshape(2, 4, 4, 2).mean(3))
    assert at_loss(S, T).item() == mean_square(Q_S, Q_T)
    assert utils.map_similarity([S], [T]).item() == pytest.approx((Q_S * Q_T).sum(1).mean().item())
    A_S, A_T = S.reshape(2, 3, 4, 2, 4).mean(3), T.reshape(2, 3, 4, 4, 2).mean(4)
    assert activation_loss(S, T).item() == mean_square(unit(A_S), unit(A_T))


@pytest.mark.parametrize('loss', [
    at_loss, lambda S, T: at_loss(S, T, 'max', 4), activation_loss,
    lambda S, T: kd_loss(S.flatten(1), T.flatten(1), 4)])
def test_losses_are_float32_or_double_and_the_teacher_gets_no_gradient(loss):
    A, B = draw(2, 3, 4, 4).requires_grad_(), draw(2, 3, 4, 4, seed=1).requires_grad_()
    loss(A, B).backward()
    assert A.grad.any() and B.grad is None
    for dtype in (torch.bfloat16, torch.half):
        S, T = (200 * A).to(dtype), (200 * B).to(dtype)  # 200² > 65504 / 3
        result, exact = loss(S, T), loss(S.double(), T.double())
        assert (result.dtype, exact.dtype) == (torch.float32, torch.double)
        assert result.item() == pytest.approx(exact.item(), rel=1e-4)


def toy(channels, seed):
    """A network of three groups, 1×1 convolutions of the image, and a linear classifier."""
    params = {f'conv{g}': draw(channels, 3, 1, 1, seed=seed + g) for g in range(3)}
    params['fc'] = draw(7, 48, seed=seed)

    def f(x, params, training):
        groups = [F.conv2d(x, params[f'conv{g}']).relu() for g in range(3)]
        return x.flatten(1) @ params['fc'].T, groups
    return f, {name: p.requires_grad_() for name, p in params.items()}


def options(weights, *others):
    parser = ArgumentParser()
    utils.add_loss_options(parser)
    return parser.parse_args([*(f'--{name}={value}' for name, value in weights.items()), *others])


X, Y = 0.3 * draw(6, 3, 4, 4, seed=50), torch.tensor([0, 1, 2, 3, 4, 6])
STUDENT, TEACHER = toy(4, seed=10), toy(6, seed=20)
ADAPTERS = {f'adapter{g}': draw(6, 4, 1, 1, seed=30 + g).requires_grad_() for g in range(3)}
TERMS = {'beta': 'at_losses', 'factt': 'act_losses', 'alpha': 'kd_loss', 'grad_at': 'grad_at_loss',
         'symmetry': 'symmetry_loss', 'min_l2': 'min_l2_loss'}
ALL = dict(zip(TERMS, (100, 10, 0.9, 2, 3, 5), strict=True))


def plain_terms(groups):
    """All terms for the toys and X, Y. J = (softmax − one-hot) W, of the sum over the batch."""
    (z, A), (t, B) = (f(X, params, True) for f, params in (STUDENT, TEACHER))

    def gradient(params, x):
        p = F.softmax(x.flatten(1) @ params['fc'].T, 1)
        return ((p - F.one_hot(Y, 7)) @ params['fc']).reshape(x.shape)
    J_S, J_T = gradient(STUDENT[1], X), gradient(TEACHER[1], X)
    J_m = gradient(STUDENT[1], X.flip(3)).flip(3)
    maps = [[plain_map(C[g], 'max', 3) for C in (A, B)] for g in groups]
    units = [[unit(F.conv2d(A[g], ADAPTERS[f'adapter{g}'])), unit(B[g])] for g in groups]
    p, q = F.softmax(z / 2, 1), F.softmax(t / 2, 1)  # temperature 2
    better = (z > z[range(6), Y][:, None]).sum(1)
    terms = {'acc': 100 * (better < 1).double().mean(), 'acc5': 100 * (better < 5).double().mean(),
             'ce_loss': -F.softmax(z, 1)[range(6), Y].log().mean(),
             'kd_loss': 4 * (q * (q / p).log()).sum(1).mean(),
             'at_losses': torch.stack([((a - b) ** 2).mean() for a, b in maps]),
             'act_losses': torch.stack([((a - b) ** 2).mean() for a, b in units]),
             'grad_at_loss': ((J_S - J_T) ** 2).sum() / 12, 'min_l2_loss': (J_S ** 2).sum() / 12,
             'symmetry_loss': ((J_S - J_m) ** 2).sum() / 12}  # ½, of 6 images
    return {name: term.tolist() for name, term in terms.items()}


OTHERS = '--mapping', 'max', '--power', '3', '--temperature', '2', '--at_groups'


@pytest.mark.parametrize('weights, groups', [*(({name: 0.75}, '') for name in TERMS), (ALL, '0,2')])
@pytest.mark.parametrize('teacher', [TEACHER, None], ids=['teacher', 'alone'])
def test_objective(weights, groups, teacher):
    """Without a teacher its losses are left out, and cross-entropy counts whole."""
    opt = options(weights, *OTHERS, groups)
    expected = plain_terms([0, 2] if groups else [0, 1, 2])
    loss, metrics = objective(*STUDENT, teacher, X, Y, opt, 0.5, ADAPTERS)
    used = {k: w for k, w in weights.items() if teacher or k in ('symmetry', 'min_l2')}
    assert metrics.keys() == {'loss', 'acc', 'acc5', 'ce_loss', *(TERMS[name] for name in used)}
    for term in metrics.keys() & expected.keys():
        assert metrics[term].tolist() == pytest.approx(expected[term], **EXACT)
    total = (1 - used.get('alpha', 0)) * expected['ce_loss']
    for name, weight in used.items():
        total += weight * np.sum(expected[TERMS[name]]) * (0.5 if name in ('beta', 'factt') else 1)
    assert loss.item() == metrics['loss'].item() == pytest.approx(total, **EXACT)


def test_gradients_of_the_objective():
    def by_weights(*tensors):
        params = dict(zip(STUDENT[1], tensors, strict=True))
        return objective(STUDENT[0], params, TEACHER, X, Y, opt, 0.5, ADAPTERS)[0]
    opt = options(ALL, *OTHERS, '')
    assert gradcheck(by_weights, [*STUDENT[1].values()], fast_mode=True)  # with double backward


def test_cross_entropy_of_bfloat16_logits_is_float32():
    params = {name: p.detach().bfloat16() for name, p in STUDENT[1].items()}
    loss, _ = objective(STUDENT[0], params, None, X.bfloat16(), Y, options({}))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize('width, adapters', [(0.25, []), (0.5, [0, 1, 2])])
def test_full_activations_of_equal_widths_need_no_adapters(width, adapters):
    student, teacher = (utils.new_network('wrn', {'depth': 10, 'width': w}, 3)[:2]
                        for w in (0.25, width))
    opt = Namespace(**vars(options({'factt': 1})), deterministic=False, seed=0)
    found = utils.check_networks(opt, *student, teacher, (16, 16))
    assert [*found] == [f'adapter{g}' for g in adapters]


def test_teachers_by_name_folder_and_file(cifar):
    cifar('--save', 'logs/t', '--width', 0.5)
    state, x = load('logs/t'), draw(2, 3, 16, 16, dtype=torch.float)
    f, _, _ = utils.new_network('wrn', {'depth': 10, 'width': 0.5}, 3)
    shutil.copy('logs/t/model.pt7', 't.pt7')
    for name in ('t', 'logs/t', 'logs/t/model.pt7', 't.pt7'):
        g, params = load_teacher(name)
        assert not any(p.requires_grad for p in params.values())
        assert torch.equal(g(x, params, False)[0], f(x, state['params'], False)[0])
    torch.save(state | {'params': state['params'] | {'fc.bias': torch.zeros(4)}}, 't.pt7')
    with pytest.raises(InputError, match=r't\.pt7: fc\.bias is \(4,\), but WRN-10-0\.5 has \(3,\)'):
        load_teacher('t.pt7')


def test_a_distilled_student_is_a_teacher(cifar, capsys):
    cifar('--save', 'logs/t', '--width', 0.5)
    cifar('--save', 'logs/s', '--teacher_id', 't', '--factt', 10, '--at_groups', '0,2')
    assert {name: list(p.shape) for name, p in load('logs/s')['adapters'].items()} == \
        {'adapter0': [8, 4, 1, 1], 'adapter2': [32, 16, 1, 1]}
    assert load('logs/s')['params'].keys() == load('logs/t')['params'].keys()
    cifar('--save', 'logs/u', '--teacher_id', 's', '--beta', 10, '--alpha', 0.5)
    assert 'teacher s, WRN-10-0.25: test error' in capsys.readouterr().out
    assert len(log_of('logs/u')[-1]['at_losses']) == 3 and log_of('logs/u')[-1]['kd_loss'] > 0


def run_python(code, folder):
    return subprocess.check_output([sys.executable, '-c', code], cwd=folder, text=True)


def test_two_files_are_enough_in_another_project(tmp_path):
    for name in ('utils.py', 'resnet.py'):
        shutil.copy(ROOT / name, tmp_path)
    code = 'import torch; from utils import at_loss; A = torch.eye(4).view(4, 1, 2, 2);' \
           'print(at_loss(A[:2], A[2:]))'
    assert run_python(code, tmp_path) == 'tensor(0.5000)\n'


PATCHES = {  # before these words, as utils.py says to add a loss
    "'beta', 'factt'": "'means', ",
    "    add('--temperature'": "    add('--means', default=0, type=float)\n",
    '    if opt.min_l2:\n': """    if opt.means and teacher:
        terms['means_losses'] = torch.stack([*map(F.mse_loss, groups, t_groups)])
        loss = loss + opt.means * terms['means_losses'].sum()\n"""}


def test_a_new_loss_is_added_in_utils_alone(work):
    for path in ROOT.glob('*.py'):
        text = path.read_text()
        for old, new in PATCHES.items():
            text = text.replace(old, new + old) if path.name == 'utils.py' else text
        Path(path.name).write_text(text)
    out = run_python(f'''
import cifar, glob, imagenet, tables
cifar.main([*{SMALL}, '--save', 'logs/t'])
cifar.main([*{SMALL}, '--teacher_id', 't', '--means', '3'])
assert imagenet.make_parser().parse_args(['--means', '3']).means == 3
tables.main(['--runs', *glob.glob('logs/images*')])''', work)
    folder, = Path('logs').glob('images*_means3_*')
    record = log_of(folder)[-1]
    total = pytest.approx(record['ce_loss'] + 3 * sum(record['means_losses']))
    assert record['train_loss'] == total and len(record['means_losses']) == 3
    assert any(f'| {folder} ' in line and '| means ' in line for line in out.splitlines())


def test_a_new_mapping_is_an_entry(monkeypatch):
    monkeypatch.setitem(utils.MAPPINGS, 'mean', lambda A, p: A.pow(p).mean(1))
    opt = script.make_parser().parse_args(['--mapping', 'mean'])
    S, T = draw(2, 3, 4, 4), draw(2, 5, 4, 4, seed=1)  # normalised, means are as sums
    assert at_loss(S, T, opt.mapping).item() == pytest.approx(at_loss(S, T).item(), **EXACT)


def tiny(depth=1, width=1, num_classes=10, seed=0):
    """A network of one convolution and a linear layer, with names of its own."""
    shapes = {'stem': (int(20 * width), 3, 3, 3), 'head': (num_classes, int(20 * width))}

    def f(x, params, training):
        x = torch.conv2d(x, params['stem'], stride=2)
        return x.relu().mean((2, 3)) @ params['head'].T, (x,)
    return f, initialize(shapes, seed)


def test_a_new_network_is_an_entry(cifar, monkeypatch, capsys):
    """It trains, goes on, is tested, and teaches."""
    network = Architecture(tiny, lambda depth, width: f'Tiny-{width:g}')
    monkeypatch.setitem(NETWORKS, 'tiny', network)
    cifar('--net', 'tiny', '--width', 2, '--save', 'logs/t', '--epochs', 1)
    script.main(['--resume', 't', '--epochs', '2', '--dataroot', 'images'])
    assert [record['network'] for record in log_of('logs/t')] == ['Tiny-2'] * 2
    cifar('--net', 'tiny', '--save', 'logs/s', '--teacher_id', 't', '--factt', 1, '--alpha', 0.5)
    assert 'teacher t, Tiny-2: test error' in capsys.readouterr().out
    assert load('logs/s')['adapters']['adapter0'].shape == (40, 5, 1, 1)
    cifar('--evaluate', 's')
    assert f'error {100 - log_of("logs/s")[-1]["test_acc"]:.2f}%' in capsys.readouterr().out


def test_a_new_data_set_is_an_entry(cifar, monkeypatch):
    def read_stripes(opt):
        images = np.random.default_rng(0).integers(0, 99, (64, 8, 8, 3), dtype=np.uint8)
        labels = np.arange(64) % 2
        images[labels == 1, :, ::2] += 150
        return images[:48], labels[:48], images[48:], labels[48:], ['plain', 'striped']
    monkeypatch.setitem(script.DATASETS, 'stripes', (read_stripes, True))
    cifar('--dataset', 'stripes', '--epochs', 4, '--batch_size', 8, '--save', 's')
    record = log_of('s')[-1]
    assert (record['dataset'], record['flip'], record['num_classes']) == ('stripes', True, 2)
    assert load('s')['data']['classes'] == ['plain', 'striped'] and record['test_acc'] > 80
