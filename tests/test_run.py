"""A run of cifar.py: its files, going on to the same bits, what stops it, and its figures."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from helpers import ROOT, SMALL, files, load, log_of, same_run

import cifar as script
import engine
from resnet import InputError, trainable, wide_resnet
from utils import load_teacher

DATA = ['--dataroot', 'images']
AT_KD = ['--teacher_id', 't', '--alpha', '0.9', '--beta', '1000']


@pytest.fixture
def teacher(cifar):
    """A run logs/t, twice as wide as the others."""
    cifar('--save', 'logs/t', '--width', '0.5', '--epochs', '1')


# ------------------------------------------------------------------ files

def test_files(cifar, work, teacher):
    cifar('--save', 'a/b', *AT_KD, '--at_groups', '0,2')
    assert files('a/b').keys() == {Path('.lock'), Path('log.txt'), Path('model.pt7')}
    for number, line in enumerate(Path('a/b/log.txt').read_text().splitlines(), 1):
        name, _, text = line.partition(' ')
        record = json.loads(text, parse_constant=pytest.fail)  # NaN is no JSON
        assert name == 'json_stats:' and record['epoch'] == number
    assert number == 2
    assert record.keys() >= vars(script.make_parser().parse_args([])).keys() | {
        'lr', 'seed', 'train_loss', 'train_acc', 'test_loss', 'test_acc', 'kd_loss', 'ce_loss',
        'train_time', 'test_time', 'device', 'torch', 'commit', 'network'}
    assert (record['seed'], record['num_classes'], record['network']) == (0, 3, 'WRN-10-0.25')
    assert len(record['at_losses']) == 2 and 'test_acc5' not in record
    params = wide_resnet(10, 0.25, 3)[1]
    assert record['n_parameters'] == sum(p.numel() for p in trainable(params).values())
    terms = 0.1 * record['ce_loss'] + 0.9 * record['kd_loss'] + 1000 * sum(record['at_losses'])
    assert record['train_loss'] == pytest.approx(terms)
    state = load('a/b')
    assert state.keys() == {'params', 'optimizer', 'options', 'records', 'rng', 'network', 'data'}
    assert state['params'].keys() == params.keys() and state['records'] == log_of('a/b')
    assert state['network'] == {'net': 'wrn', 'depth': 10, 'width': 0.25, 'num_classes': 3}
    assert state['data']['classes'] == ['0', '1', '2'] and state['data']['size'] == [16, 16]
    loaded = load_teacher('a/b')[1]
    assert loaded.keys() == params.keys()
    assert all(torch.equal(p, loaded[name]) for name, p in state['params'].items())


def test_top5_is_logged_from_six_classes_on(work):
    script.main(['--dataset', 'Digits', '--depth', '10', '--width', '0.0625', '--train_fraction',
                 '0.05', '--test_fraction', '0.1', '--epochs', '1', '--save', 's'])
    record = log_of('s')[0]
    assert record['test_acc'] <= record['test_acc5'] <= 100
    assert record['train_acc'] <= record['train_acc5'] <= 100 and record['flip'] is False


def test_default_folder(cifar, work, teacher, capsys):
    """It names what is not the default, also a loss; a second command goes elsewhere."""
    cifar(*AT_KD, '--epochs', '1', '--seed', '3')
    name, = (p.name for p in Path('logs').iterdir() if p.name != 't')
    assert name.startswith('folder_WRN-10-0.25_') and name.endswith('_seed3')
    assert all(part in name.split('_') for part in ('beta1000', 'alpha0.9'))
    assert 'power' not in name and 'flip' not in name  # not given
    assert f'logs/{name}' in capsys.readouterr().out
    cifar(*AT_KD, '--epochs', '1', '--seed', '3', '--power', '4')
    assert len(list(Path('logs').glob('*_power4_seed3'))) == 1


def test_every(cifar, work):
    cifar('--save', 'a', '--epochs', '3', '--test_every', '2')
    assert ['test_acc' in r for r in log_of('a')] == [False, True, True]  # always the last
    cifar('--save', 'b', '--epochs', '3')
    assert log_of('a')[2]['test_loss'] == log_of('b')[2]['test_loss']


def test_tensorboard(cifar, work, teacher):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    cifar('--save', 'a', '--beta', '10', '--teacher_id', 't', '--tensorboard')
    events = EventAccumulator('a')
    events.Reload()
    for name, value in (('test_acc', lambda r: r['test_acc']), ('lr', lambda r: r['lr']),
                        ('at_losses/2', lambda r: r['at_losses'][2])):
        expected = [(r['epoch'], pytest.approx(value(r))) for r in log_of('a')]
        assert [(e.step, e.value) for e in events.Scalars(name)] == expected


# ------------------------------------------------------------------ going on

def test_the_same_command_does_nothing_when_finished(cifar, work, capsys):
    cifar('--save', 'a')
    before = files('a')
    cifar('--save', 'a')
    script.main(['--resume', 'a', *DATA])
    assert files('a') == before
    assert capsys.readouterr().out.splitlines()[-2:] == ['a: all 2 epochs are done'] * 2


@pytest.mark.parametrize('method', [
    [], [*AT_KD, '--beta_decay', 'step'], ['--teacher_id', 't', '--factt', '10'],
    ['--dtype', 'half', '--beta', '10', '--teacher_id', 't']],
    ids=['alone', 'AT+KD', 'F-ActT', 'half'])
def test_an_epoch_and_another_equal_two(cifar, work, teacher, method):
    cifar('--save', 'whole', *method, '--epoch_step', '1')
    cifar('--save', 'parts', *method, '--epoch_step', '1', '--epochs', '1')
    cifar('--save', 'parts', *method, '--epoch_step', '1')
    same_run('whole', 'parts')
    assert ('adapters' in load('parts')) == ('--factt' in method)
    assert ('scaler' in load('parts')) == ('half' in method)


def test_resume_elsewhere_leaves_the_run_alone(cifar, work):
    """With the options of the run; where that folder holds this run already, it goes on there."""
    cifar('--save', 'a', '--epochs', '1', '--lr', '0.05')
    before = files('a')
    script.main(['--resume', 'a', *DATA, '--save', 'b', '--epochs', '2'])
    script.main(['--resume', 'a/model.pt7', *DATA, '--save', 'b', '--epochs', '3'])
    assert files('a') == before
    cifar('--save', 'whole', '--epochs', '3', '--lr', '0.05')
    same_run('whole', 'b')
    script.main(['--resume', 'a', *DATA, '--epochs', '3'])  # and in its own folder
    same_run('whole', 'a')


def cifar_main(argv):
    script.main([*SMALL, *argv])


def test_a_run_goes_on_with_its_own_options(cifar, work, refused):
    cifar('--save', 'a')
    before = files('a')
    for argv in ('--width 0.5', '--lr 0.2', '--seed 1', '--epochs 1', '--flip False',
                 '--dtype bfloat16', '--batch_size 8', '--epoch_step 1', '--test_fraction 0.5'):
        option, value = argv.split()
        given = ['--no-flip'] if option == '--flip' else [option, value]
        error = refused(cifar_main, ['--save', 'a', *given], f'its {option} is', '--overwrite')
        assert value in error
    refused(script.main, ['--resume', 'a', *DATA, '--lr', '0.2'], 'its --lr is 0.1, not 0.2')
    assert files('a') == before


def test_more_epochs_are_refused_where_beta_depends_on_them(cifar, work, teacher, refused):
    argv = ['--save', 'a', '--teacher_id', 't', '--beta', '10', '--beta_decay', 'linear']
    cifar(*argv)
    refused(cifar_main, [*argv, '--epochs', '3'], 'its --epochs is 2, not 3')


def test_overwrite(cifar, work):
    cifar('--save', 'a', '--seed', '1')
    cifar('--save', 'a', '--overwrite', '--epochs', '1')
    cifar('--save', 'b', '--epochs', '1')
    same_run('a', 'b')


def test_leftovers_of_a_killed_process_are_removed(cifar, work):
    cifar('--save', 'a', '--epochs', '1')
    for name in ('model.pt7.tmp', 'log.txt.tmp', 'notes.txt'):
        Path('a', name).write_text('x')
    Path('a/log.txt').unlink()  # killed between checkpoint and log
    cifar('--save', 'a')
    assert {p.name for p in Path('a').iterdir()} == {'.lock', 'log.txt', 'model.pt7', 'notes.txt'}
    assert [r['epoch'] for r in log_of('a')] == [1, 2]


def test_a_file_of_weights_is_no_run_to_go_on_with(cifar, work, refused):
    Path('w').mkdir()
    torch.save({'params': wide_resnet(10, 0.25, 3)[1]}, 'w/model.pt7')
    before = files('w')
    refused(cifar_main, ['--save', 'w'], 'w/model.pt7', '--overwrite')
    assert files('w').items() >= before.items()


def test_a_run_that_diverges_keeps_its_last_checkpoint(cifar, work, monkeypatch, capsys):
    with pytest.raises(SystemExit, match='1'):
        cifar('--save', 'a', '--lr', '1e8', '--weight_decay', '1')
    assert files('a').keys() == {Path('.lock')}
    monkeypatch.setattr(engine, 'SAVE_SECONDS', 0)  # a checkpoint after each epoch
    argv = ['--epochs', '4', '--epoch_step', '2', '--lr_decay_ratio', '1e20']
    with pytest.raises(SystemExit, match='1'):
        cifar('--save', 'b', *argv)
    assert 'b: diverged in epoch 3' in capsys.readouterr().err
    assert all(p.isfinite().all() for p in load('b')['params'].values())
    assert [r['epoch'] for r in log_of('b')] == [1, 2]


def test_several_seeds_are_each_seed_alone(cifar, work):
    cifar('--save', 'logs/t{seed}', '--seed', '1,2', '--epochs', '1', '--width', '0.5')
    method = ['--teacher_id', 't{seed}', '--beta', '100', '--epoch_step', '1']
    cifar('--save', 's{seed}', '--seed', '1,2', *method, '--epochs', '1')
    cifar('--save', 's2', '--seed', '2', *method, '--teacher_id', 't2')  # goes on alone
    cifar('--save', 's{seed}', '--seed', '1,2', *method)                 # one more is to do
    for seed in '12':
        cifar('--save', f'alone{seed}', '--seed', seed, *method, '--teacher_id', f't{seed}')
        same_run(f's{seed}', f'alone{seed}')
    assert log_of('s1')[0]['train_loss'] != log_of('s2')[0]['train_loss']


def test_a_seed_that_diverges_ends_alone(cifar, work):
    """One seed goes on where its rate is still finite, the other begins where it is absurd."""
    argv = ['--save', 's{seed}', '--epoch_step', '1', '--lr', '1e20', '--lr_decay_ratio', '1e-22']
    cifar('--save', 's1', '--seed', '1', '--epochs', '1', '--lr', '1e-3', '--epoch_step', '1')
    state = load('s1')
    state['options'] |= {'lr': 1e20, 'lr_decay_ratio': 1e-22}  # 0.01 from now on
    torch.save(state, 's1/model.pt7')
    with pytest.raises(SystemExit, match='1'):
        cifar(*argv, '--seed', '0,1')
    assert not Path('s0/model.pt7').exists() and [r['epoch'] for r in log_of('s1')] == [1, 2]


# ------------------------------------------------------------------ processes

def start(*argv, code=None):
    """cifar.py, or this code, as a process of its own."""
    script = ['-c', code] if code else [str(ROOT / 'cifar.py')]
    return subprocess.Popen([sys.executable, *script, *SMALL, *argv], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True,
                            env=os.environ | {'PYTHONPATH': str(ROOT)})


@pytest.mark.parametrize('signum, status', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_with_one_line(work, refused, monkeypatch, signum, status):
    """Meanwhile no other process trains in its folder, afterwards one does."""
    process = start('--save', 'a', '--epochs', '9999')
    try:
        assert process.stdout.readline().startswith('epoch 1/9999')
        monkeypatch.setattr(engine, 'FileLock', lambda path, timeout: FileLock(path, 0.1))
        refused(cifar_main, ['--save', 'a', '--epochs', '9999'], 'a: another process is training')
        process.send_signal(signum)
        error = process.communicate(timeout=20)[1]
    finally:
        process.kill()
    assert process.returncode == status and error.count('\n') == 1 and 'stopped' in error
    assert [r['epoch'] for r in log_of('a')] == [r['epoch'] for r in load('a')['records']] == [1]
    cifar_main(['--save', 'a', '--overwrite', '--epochs', '1'])


METHOD = ['--teacher_id', 't', '--alpha', '0.9', '--beta', '1000', '--factt', '10', '--epochs', '8',
          '--epoch_step', '2,5']


def test_killed_and_continued_to_the_same_bits(cifar, work, teacher):
    process = start('--save', 'parts', *METHOD)
    while not process.stdout.readline().startswith('epoch 3/8'):
        assert process.poll() is None
    process.kill()
    process.communicate()
    assert len(load('parts')['records']) < 8
    cifar('--save', 'parts', *METHOD)
    cifar('--save', 'whole', *METHOD)
    same_run('parts', 'whole')


@pytest.mark.slow
def test_killed_at_many_moments_and_continued(cifar, work, teacher):
    """Each process is killed a little later than the one before; a checkpoint an epoch."""
    cifar('--save', 'whole', *METHOD, '--epochs', '40')
    code = 'import engine, cifar; engine.SAVE_SECONDS = 0\nwith engine.one_line_errors(): ' \
           'cifar.main()'
    seconds, epochs = 0.03, []
    for _ in range(40):
        process = start('--save', 'parts', *METHOD, '--epochs', '40', code=code)
        process.stdout.readline()  # the teacher's error, at the start
        time.sleep(seconds)
        process.kill()
        error = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), error
        epochs.append(len(load('parts')['records']) if Path('parts/model.pt7').exists() else 0)
        seconds += 0.06
        if epochs[-1] == 40:
            break
    assert epochs == sorted(epochs) and len({*epochs}) > 3
    cifar('--save', 'parts', *METHOD, '--epochs', '40')
    same_run('parts', 'whole')


def test_wrong_use_ends_with_one_line_and_status_2(work):
    process = start('--depth', '15', '--save', 'a')
    out, error = process.communicate()
    assert process.returncode == 2 and out == ''
    assert error.count('\n') == 1 and error.startswith('error: ') and 'depth 15' in error


# ------------------------------------------------------------------ the figures

def test_training_equals_a_plain_loop(cifar, work, teacher):
    """SGD with momentum through drops of the rate, weight decay on all, AT + KD, β decaying."""
    argv = [*SMALL, *AT_KD, '--beta_decay', 'step', '--epochs', '4', '--epoch_step', '1,3',
            '--lr', '0.05', '--dtype', 'double', '--save', 's']
    script.main(argv)
    opt, place = script.make_parser().parse_args(argv), engine.Place(torch.device('cpu'), 0, 1)
    opt.seed, opt.flip = 0, True
    data = script.DeviceData(opt, place, *script.read_arrays(opt, place))
    (g, teacher_params), (f, params) = load_teacher('t'), wide_resnet(10, 0.25, 3, seed=0)
    teacher_params, params = ({k: p.detach().double().requires_grad_(p.requires_grad)
                               for k, p in each.items()} for each in (teacher_params, params))
    velocity = {k: torch.zeros_like(p) for k, p in trainable(params).items()}
    losses = []
    for epoch, lr in enumerate([0.05, 0.01, 0.01, 0.002]):
        total = 0
        for x, y in data.train_batches(epoch):
            (z, S), (t, T) = (f(x.double(), params, True), g(x.double(), teacher_params, False))
            maps = [[F.normalize(A.pow(2).sum(1).flatten(1)) for A in groups] for groups in (S, T)]
            at = sum((a - b).pow(2).mean() for a, b in zip(*maps, strict=True))
            kd = F.kl_div(F.log_softmax(z / 4, 1), F.softmax(t / 4, 1), reduction='batchmean') * 16
            loss = 0.9 * kd + 0.1 * F.cross_entropy(z, y) + 1000 * lr / 0.05 * at
            gradients = torch.autograd.grad(loss, [params[k] for k in velocity])
            with torch.no_grad():
                for (k, v), gradient in zip(velocity.items(), gradients, strict=True):
                    v.mul_(0.9).add_(gradient + 5e-4 * params[k])
                    params[k] -= lr * v
            total += len(y) * loss.item()
        losses.append(total / 45)
    for k, p in load('s')['params'].items():
        torch.testing.assert_close(p, params[k].detach(), rtol=1e-5, atol=1e-8)
    assert [r['train_loss'] for r in log_of('s')] == pytest.approx(losses, rel=1e-5)
    assert [r['lr'] for r in log_of('s')] == pytest.approx([0.05, 0.01, 0.01, 0.002])


@pytest.mark.parametrize('decay, factors', [
    ('none', [1, 1, 1, 1]), ('step', [1, 0.2, 0.2, 0.04]), ('linear', [1, 0.75, 0.5, 0.25]),
    ('cosine', [(1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)])])
def test_beta_decay(cifar, work, teacher, decay, factors):
    cifar('--save', 'a', '--teacher_id', 't', '--beta', '1000', '--factt', '100', '--lr', '0.01',
          '--beta_decay', decay, '--epochs', '4', '--epoch_step', '1,3')
    found = [(r['train_loss'] - r['ce_loss'])
             / (1000 * sum(r['at_losses']) + 100 * sum(r['act_losses'])) for r in log_of('a')]
    assert found == pytest.approx(factors, rel=1e-3)


def test_at_epochs(cifar, work, teacher):
    """Before and after them the run learns as without a teacher, by cross-entropy alone."""
    cifar('--save', 'a', *AT_KD, '--factt', '10', '--at_epochs', '1,2', '--epochs', '3')
    cifar('--save', 'b', '--epochs', '3')
    a, b = log_of('a'), log_of('b')
    terms = ('at_losses', 'act_losses', 'kd_loss')
    assert [[name in r for name in terms] for r in a] == [[False] * 3, [True] * 3, [False] * 3]
    assert [r['train_loss'] == r['ce_loss'] for r in a] == [True, False, True]
    assert a[0]['train_loss'] == b[0]['train_loss'] and a[0]['test_loss'] == b[0]['test_loss']


@pytest.mark.parametrize('dtype', ['float', 'bfloat16', 'half', 'double'])
def test_dtype(cifar, work, teacher, dtype):
    method = ['--teacher_id', 't', '--alpha', '0.9', '--lr', '0.01']
    cifar('--save', 'a', *method, '--dtype', dtype)
    kind = torch.double if dtype == 'double' else torch.float
    assert all(p.dtype == kind for p in load('a')['params'].values())
    cifar('--save', 'b', *method)
    a, b = log_of('a')[-1]['train_loss'], log_of('b')[-1]['train_loss']
    assert a == pytest.approx(b, rel=0.05) and (a == b) == (dtype == 'float')
    cifar('--evaluate', 'a')


@pytest.mark.slow
def test_compile(cifar, work, teacher):
    for name, argv in (('a', ['--compile']), ('b', [])):
        cifar('--save', name, *AT_KD, '--lr', '0.01', *argv, '--epochs', '1')
    assert log_of('a')[-1]['train_loss'] == pytest.approx(log_of('b')[-1]['train_loss'], rel=1e-3)


# ------------------------------------------------------------------ evaluation

def test_evaluate(cifar, work, teacher, capsys):
    """A run, with its own network and data options, without data of a checkpoint, and maps."""
    cifar('--save', 'a', '--image_size', '8', *AT_KD)
    error = f'test error {100 - log_of("a")[-1]["test_acc"]:.2f}%, loss '
    state = load('a')
    torch.save(state['params'], 'weights.pth')
    torch.save({'params': {f'student.{k}': p for k, p in state['params'].items()}}, 'student.pt7')
    before = files(work)
    for argv in (['a'], ['weights.pth', '--image_size', '8'],
                 ['--teacher_id', 'student.pt7', '--image_size', '8']):
        capsys.readouterr()
        script.main(['--dataset', 'folder', *DATA, '--evaluate', *argv])
        _, found, loss = capsys.readouterr().out.partition(error)
        assert found and float(loss) == pytest.approx(log_of('a')[-1]['test_loss'], abs=1e-4)
    script.main([*DATA, '--evaluate', 'a', '--teacher_id', 'weights.pth'])
    assert capsys.readouterr().out.endswith('group by group: 1.0000, 1.0000, 1.0000\n')
    script.main([*DATA, '--evaluate', 'a', '--teacher_id', 't'])
    values = capsys.readouterr().out.rpartition(': ')[2].split(', ')
    assert len(values) == 3 and all(0 < float(v) < 1 for v in values)
    assert files(work) == before


def test_the_teacher_is_tested_unless_told_otherwise(cifar, work, teacher, capsys):
    error = f'{100 - log_of("logs/t")[-1]["test_acc"]:.2f}%'
    capsys.readouterr()
    cifar('--save', 'a', *AT_KD, '--epochs', '1')
    assert f'teacher t, WRN-10-0.5: test error {error}' in capsys.readouterr().out
    cifar('--save', 'b', *AT_KD, '--epochs', '1', '--no-check_teacher')
    assert 'teacher' not in capsys.readouterr().out


def test_a_distilled_student_teaches(cifar, work, teacher):
    cifar('--save', 'logs/a', *AT_KD, '--epochs', '1')
    cifar('--save', 'b', '--teacher_id', 'logs/a/model.pt7', '--beta', '10', '--epochs', '1')
    assert log_of('b')[0]['at_losses'][0] > 0
    with pytest.raises(InputError, match='no checkpoint nothing'):
        cifar('--save', 'c', '--teacher_id', 'nothing', '--beta', '10')
