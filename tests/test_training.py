"""The training loop against a plain one: its step, its figures, its log."""
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CPU,
    files,
    load,
    momenta,
    options,
    same,
    stopped_after,
    teach,
)
from torch.utils._python_dispatch import TorchDispatchMode

import cifar as script
from resnet import trainable, wide_resnet
from training import log, loop
from training.distributed import to_device
from training.log import read_log
from training.runs import Run
from utils import load_model, load_teacher


def log_of(run):
    return read_log(Path(run, 'log.txt'))


def test_the_loop_equals_a_plain_one(cifar, work):
    """SGD with momentum through an lr drop, weight decay on all, AT + KD with a decaying β."""
    teach(cifar)
    cifar('--save', 's', '--teacher_id', 't', '--beta', '1000', '--alpha', '0.9', '--beta_decay',
          'step', '--epochs', '4', '--epoch_step', '[1,3]', '--lr', '0.05')
    data = script.load_data(options(), CPU)
    teacher, (f, params) = load_teacher('t'), wide_resnet(10, 0.25, 3, seed=0)
    velocity = {k: torch.zeros_like(p) for k, p in trainable(params).items()}
    losses = []
    for epoch, lr in enumerate([0.05, 0.01, 0.01, 0.002]):
        total = 0
        for x, y, n, _ in data.train_batches(epoch):
            (z, S), (t, T) = f(x.contiguous(), params, True), teacher.f(x, teacher.params, False)
            maps = [[F.normalize(A.pow(2).sum(1).flatten(1)) for A in groups] for groups in (S, T)]
            at = sum((a - b).pow(2).mean() for a, b in zip(*maps, strict=True))
            q = F.softmax(t / 4, 1)
            kd = F.kl_div(F.log_softmax(z / 4, 1), q, reduction='batchmean') * 16
            loss = 0.9 * kd + 0.1 * F.cross_entropy(z, y) + 1000 * lr / 0.05 * at
            gradients = torch.autograd.grad(loss, [params[k] for k in velocity])
            with torch.no_grad():
                for (k, v), g in zip(velocity.items(), gradients, strict=True):
                    v.mul_(0.9).add_(g + 5e-4 * params[k])
                    params[k] -= lr * v
            total += n * loss.item()
        losses.append(total / 45)
    saved = load('s/model.pt7')['params']
    for k, p in params.items():
        torch.testing.assert_close(saved[k], p.detach(), rtol=1e-3, atol=1e-4)
    assert [r['train_loss'] for r in log_of('s')] == pytest.approx(losses, rel=1e-3)
    assert [r['lr'] for r in log_of('s')] == pytest.approx([0.05, 0.01, 0.01, 0.002])


def test_log(cifar, work):
    teach(cifar)
    cifar('--save', 'a/b/s', '--teacher_id', 't', '--beta', '1000', '--at_groups', '0,2')
    lines = Path('a/b/s/log.txt').read_text().splitlines()
    assert all(line.startswith('json_stats: {') for line in lines)
    records, state = log_of('a/b/s'), load('a/b/s/model.pt7')
    assert [r['epoch'] for r in records] == [1, 2] and len(lines) == 2
    assert records == state['records']
    last, f = records[-1], wide_resnet(10, 0.25, 3)[0]
    assert vars(script.make_parser().parse_args([])).keys() <= last.keys()
    assert len(last['at_losses']) == 2 and all(a > 0 for a in last['at_losses'])
    assert last['train_loss'] == pytest.approx(last['ce_loss'] + 1000 * sum(last['at_losses']))
    assert 'kd_loss' not in last and 'act_losses' not in last
    own = trainable(wide_resnet(10, 0.25, 3)[1]).values()
    assert last['n_parameters'] == sum(p.numel() for p in own)
    assert (last['network'], last['num_classes']) == ('WRN-10-0.25', 3)
    assert 'test_acc5' not in last and 'train_acc5' not in last
    assert last['train_time'] > 0 < last['test_time']
    data = script.load_data(options(), CPU)
    x, y = data.normalise(data.test[0]), data.test[1]
    logits = f(x, state['params'], False)[0]
    right = (logits.argmax(1) == y).float().mean().item()
    assert last['test_acc'] == pytest.approx(100 * right)
    plain = F.cross_entropy(logits, y).item()  # without AT
    assert last['test_loss'] == pytest.approx(plain, rel=1e-4)


def test_log_has_null_for_what_is_not_finite_and_reads_old_nan(work):
    record = {'epoch': 1, 'test_loss': float('nan'), 'at_losses': [1.5, float('inf')]}
    plain = {name: log.finite(value) for name, value in record.items()}
    text = log.log_text([plain]).decode()
    assert json.loads(text.removeprefix('json_stats: ')) == {
        'epoch': 1, 'test_loss': None, 'at_losses': [1.5, None]}
    old = 'json_stats: {"epoch": 2, "test_loss": NaN}\nnoise\njson_stats: {"epoch": 3, "te'
    Path('log.txt').write_text(text + old)
    assert [r['epoch'] for r in read_log(Path('log.txt'))] == [1, 2]


def test_top5_is_logged_from_six_classes_on(work):
    script.main(['--dataset', 'Digits', '--depth', '10', '--width', '0.25', '--train_fraction',
                 '0.1', '--epochs', '1', '--save', 's'])
    record = log_of('s')[0]
    assert record['test_acc'] <= record['test_acc5'] <= 100 and record['flip'] is False
    assert record['train_acc'] <= record['train_acc5'] <= 100


def test_name_without_save(cifar, work, capsys):
    teach(cifar)
    cifar('--teacher_id', 't', '--beta', '1e3', '--alpha', '0.9', '--epochs', '1', '--seed', '3')
    name = 'logs/folder_WRN-10-0.25_AT1000_KD0.9_from_t_seed3'
    assert (work / name / 'model.pt7').exists() and name in capsys.readouterr().out


def test_testing_every_few_epochs(cifar, work):
    cifar('--save', 's', '--epochs', '5', '--test_every', '2')
    assert [r['epoch'] for r in log_of('s') if 'test_acc' in r] == [2, 4, 5]
    assert all('train_acc' in r for r in log_of('s'))


def test_epochs_with_and_without_the_teacher(cifar, work):
    teach(cifar)
    argv = ['--teacher_id', 't', '--beta', '100', '--at_epochs', '1,2', '--epochs', '3']
    cifar('--save', 'whole', *argv)
    assert ['at_losses' in r for r in log_of('whole')] == [False, True, False]
    cifar('--save', 'alone', '--epochs', '1')
    assert log_of('alone')[0]['train_loss'] == log_of('whole')[0]['train_loss']
    for epochs in (1, 2):
        with stopped_after(epochs):
            cifar('--save', f'parts{epochs}', *argv)
        script.main(['--resume', f'parts{epochs}'])
        assert same(load('whole/model.pt7'), load(f'parts{epochs}/model.pt7'))


def test_double(cifar, work, capsys):
    teach(cifar)
    argv = ['--teacher_id', 't', '--beta', '100', '--dtype', 'double']
    cifar('--save', 'whole', *argv)
    with stopped_after(1):
        cifar('--save', 'parts', *argv)
    script.main(['--resume', 'parts'])
    state = load('whole/model.pt7')
    assert same(state, load('parts/model.pt7'))
    assert all(t.dtype == torch.double for t in [*state['params'].values(), *momenta(state)])
    script.main(['--evaluate', 'whole'])
    assert 'whole: WRN-10-0.25, 5,891 parameters, test error' in capsys.readouterr().out


# ---------------------------------------------------------------------------- the step

class NoWaiting(TorchDispatchMode):
    """Counts what would make a process wait for its GPU: reading a number, above all."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ('aten._local_scalar_dense', 'aten.equal', 'aten.nonzero')
        self.count += str(func).startswith(waits)
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_the_gpu(cifar, work):
    teach(cifar)
    opt = options('--beta', '1e3', '--alpha', '0.9')
    data, (f, params), teacher = script.load_data(opt, CPU), wide_resnet(10, 0.25, 3), \
        load_teacher('t')
    params = to_device(params, CPU.device)
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    run = Run(opt, CPU, params, loop.make_optimizer(opt, params, CPU.device), scaler)
    step = loop.make_step(opt, run, f, teacher)
    counts = []
    with NoWaiting() as counter:
        for x, y, n, n_global in data.train_batches(0):
            step(x, y, n, n_global, torch.tensor(1.0))
            counts.append(counter.count)
        assert counts == [0, 0, 0]
        run.totals.clear()
        loop.train_epoch(step, data, run)
    assert counter.count == 0  # tolist() is no operation of its own, and comes once an epoch


def test_evaluation_makes_no_graph(cifar, work):
    cifar('--save', 's', '--epochs', '1')
    model, opt, seen = load_model('s'), options(), []

    def spy(x, params, training):
        logits, groups = model.f(x, params, training)
        seen.append((training, logits.requires_grad))
        return logits, groups
    trained = {name: t.requires_grad_() for name, t in model.params.items()}
    spied = loop.replace(model, f=spy, params=trained)
    loop.evaluate(spied, script.load_data(opt, CPU), opt, CPU)
    assert seen == [(False, False)]


@pytest.mark.parametrize('dtype', ['bfloat16', 'half'])
def test_dtypes(cifar, work, dtype):
    """Autocast trains much as float32 does; half's first steps overflow and are left out."""
    teach(cifar)
    argv = ['--teacher_id', 't', '--beta', '1000', '--alpha', '0.9', '--epochs', '10',
            '--lr', '0.02']
    cifar('--save', 'float', *argv)
    cifar('--save', 'lower', *argv, '--dtype', dtype)
    state = load('lower/model.pt7')
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in state['params'].values())
    assert ('scaler' in state) == (dtype == 'half')
    a, b = ([r['train_loss'] for r in log_of(run)] for run in ('float', 'lower'))
    assert a != b and a[-1] < a[0] / 2 and b[-1] == pytest.approx(a[-1], rel=0.3)


def test_half_precision_survives_an_overflow_in_its_first_step():
    params = {'w': torch.nn.Parameter(torch.ones(3))}
    optimizer = loop.make_optimizer(options(), params, CPU.device)
    scaler = torch.amp.GradScaler('cpu')
    for factor in (float('inf'), 1.0):
        scaler.scale((params['w'] * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    expected = torch.full((3,), 1 - 0.1 * (1 + 5e-4))  # as if it had not been
    torch.testing.assert_close(params['w'].detach(), expected)


@pytest.mark.slow
def test_compiled_step_is_the_same_step(cifar, work):
    if not shutil.which('g++'):
        pytest.skip('needs a C++ compiler')
    teach(cifar)
    argv = ['--teacher_id', 't', '--beta', '1000', '--alpha', '0.9', '--batch_size', '15',
            '--epochs', '1']
    cifar('--save', 'a', *argv)
    cifar('--save', 'b', *argv, '--compile')
    a, b = (log_of(run)[0] for run in 'ab')
    assert a['train_loss'] == pytest.approx(b['train_loss'], rel=1e-3)


def test_compile_without_a_compiler(cifar, work, refused, monkeypatch):
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    refused(lambda a: cifar(*a), ['--compile'], 'no C++ compiler')
    assert not Path('logs').exists()


def test_evaluate(cifar, work, capsys):
    cifar('--save', 'a')
    record, before = log_of('a')[-1], files(work)
    capsys.readouterr()
    script.main(['--evaluate', 'a'])
    text = f'test error {100 - record["test_acc"]:.2f}% on 21 images'
    assert text in capsys.readouterr().out
    shutil.copy('a/model.pt7', 'c.pt7')
    script.main(['--evaluate', 'c.pt7'])
    assert text in capsys.readouterr().out
    os.remove('c.pt7')
    assert files(work) == before


def test_tensorboard(cifar, work):
    name = 'tensorboard.backend.event_processing.event_accumulator'
    accumulator = pytest.importorskip(name)
    teach(cifar)
    argv = ['--save', 's', '--teacher_id', 't', '--beta', '1e3', '--at_groups', '0,2',
            '--tensorboard', '--epochs', '3']
    with stopped_after(2):
        cifar(*argv)
    script.main(['--resume', 's', '--tensorboard'])
    events, records = accumulator.EventAccumulator('s').Reload(), log_of('s')
    assert [e.step for e in events.Scalars('test_loss')] == [1, 2, 3]
    for tag, values in (('train_loss', [r['train_loss'] for r in records]), ('lr', [0.1] * 3),
                        ('test_acc', [r['test_acc'] for r in records]),
                        ('at_losses/1', [r['at_losses'][1] for r in records])):
        assert [e.value for e in events.Scalars(tag)] == pytest.approx(values)
    cifar(*argv[:-1], '1', '--overwrite')  # another run's figures do not stay
    assert [e.step for e in accumulator.EventAccumulator('s').Reload().Scalars('lr')] == [1]


def test_tensorboard_that_is_not_installed(cifar, work, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    refused(lambda a: cifar(*a), ['--tensorboard'], '--tensorboard: not installed')
    assert not Path('logs').exists()
