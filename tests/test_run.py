"""A run of cifar.py: its files, going on to the same bits, what stops it, and its figures."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from helpers import ROOT, SMALL, files, load, log_of, place, same_run, write_image

import cifar as script
import engine
from resnet import trainable, wide_resnet
from utils import load_teacher

AT_KD = '--teacher_id t --alpha 0.9 --beta 1000'
DATA = ['--dataroot', 'images']


@pytest.fixture
def teacher(cifar):
    """A run logs/t, twice as wide as the others."""
    cifar('--save logs/t --width 0.5 --epochs 1')


def cifar_main(argv):
    script.main([*SMALL, *argv])


def test_files(cifar, work, teacher):
    cifar('--save a/b --at_groups 0,2', AT_KD)
    assert files('a/b').keys() == {Path('.lock'), Path('log.txt'), Path('model.pt7')}
    for number, line in enumerate(Path('a/b/log.txt').read_text().splitlines(), 1):
        name, _, text = line.partition(' ')
        record = json.loads(text, parse_constant=pytest.fail)  # NaN is no JSON
        assert name == 'json_stats:' and record['epoch'] == number
    assert number == 2 and record.keys() >= vars(script.make_parser().parse_args([])).keys() | {
        'lr', 'train_acc', 'test_loss', 'test_acc', 'train_time', 'test_time', 'device', 'commit'}
    assert (record['seed'], record['num_classes'], record['network']) == (0, 3, 'WRN-10-0.25')
    assert len(record['at_losses']) == 2 and 'test_acc5' not in record and record['flip'] is True
    terms = 0.1 * record['ce_loss'] + 0.9 * record['kd_loss'] + 1000 * sum(record['at_losses'])
    assert record['train_loss'] == pytest.approx(terms)
    params = wide_resnet(10, 0.25, 3)[1]
    assert record['n_parameters'] == sum(p.numel() for p in trainable(params).values())
    state, loaded = load('a/b'), load_teacher('a/b')[1]
    assert state.keys() == {'params', 'optimizer', 'options', 'records', 'rng', 'network', 'data'}
    assert state['params'].keys() == params.keys() and state['records'] == log_of('a/b')
    assert state['network'] == {'net': 'wrn', 'depth': 10, 'width': 0.25, 'num_classes': 3}
    assert state['data']['classes'] == ['0', '1', '2'] and state['data']['size'] == [16, 16]
    assert all(torch.equal(p, loaded[name]) for name, p in state['params'].items())


def test_default_folder(cifar, work, teacher, capsys):
    """It names what was given and is not the default."""
    cifar(AT_KD, '--epochs 1 --seed 3')
    name, = (p.name for p in Path('logs').iterdir() if p.name != 't')
    assert name.startswith('images_WRN-10-0.25_') and name.endswith('_beta1000_alpha0.9_seed3')
    assert 'power' not in name and 'flip' not in name  # not given
    assert f'logs/{name}' in capsys.readouterr().out
    cifar(AT_KD, '--epochs 1 --seed 3 --power 4')
    assert len(list(Path('logs').glob('*_power4_seed3'))) == 1


def test_every(cifar, work):
    """Always after the last epoch. The five best are logged from six classes on."""
    cifar('--dataset ClutteredDigits --train_fraction 0.02 --test_fraction 0.1 --save a',
          '--test_every 2 --epochs 3')
    *_, last = records = log_of('a')
    assert ['test_acc' in r for r in records] == [False, True, True] and last['flip'] is False
    assert last['test_acc'] <= last['test_acc5'] and last['train_acc'] <= last['train_acc5'] <= 100


def test_tensorboard(cifar, work, teacher):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    cifar('--save a --beta 10 --teacher_id t --tensorboard')
    (events := EventAccumulator('a')).Reload()
    for name, value in (('test_acc', lambda r: r['test_acc']),
                        ('at_losses/2', lambda r: r['at_losses'][2])):
        expected = [(r['epoch'], pytest.approx(value(r))) for r in log_of('a')]
        assert [(e.step, e.value) for e in events.Scalars(name)] == expected


def test_the_same_command_does_nothing_when_finished(cifar, work, capsys):
    cifar('--save a')
    before = files('a')
    cifar('--save a')
    cifar('--save a --compile')  # as on another machine
    script.main(['--resume', 'a', *DATA])
    assert files('a') == before
    assert capsys.readouterr().out.endswith('a: all 2 epochs are done\n' * 3)


@pytest.mark.parametrize('method, more', [
    ('', set()), (f'{AT_KD} --beta_decay step', set()), ('--teacher_id t --factt 10', {'adapters'}),
    ('--teacher_id t --beta 100 --dtype half', {'scaler'})])
def test_an_epoch_and_another_equal_two(cifar, work, teacher, method, more):
    cifar('--save whole --epoch_step 1', method)
    cifar('--save parts --epoch_step 1 --epochs 1', method)
    cifar('--save parts --epoch_step 1', method)
    same_run('whole', 'parts')
    assert load('parts').keys() & {'adapters', 'scaler'} == more


def test_resume_elsewhere_leaves_the_run_alone(cifar, work):
    """With the options of the run; where that folder holds this run already, it goes on there."""
    cifar('--save a --epochs 1 --lr 0.05')
    before = files('a')
    script.main(['--resume', 'a', *DATA, '--save', 'b', '--epochs', '2'])
    script.main(['--resume', 'a/model.pt7', *DATA, '--save', 'b', '--epochs', '3'])
    assert files('a') == before
    cifar('--save whole --epochs 3 --lr 0.05')
    same_run('whole', 'b')
    script.main(['--resume', 'a', *DATA, '--epochs', '3'])  # and in its own folder
    same_run('whole', 'a')


def test_a_run_goes_on_with_its_own_options(cifar, work, teacher, refused):
    cifar('--save a')
    before, decay = files('a'), ['--save', 'b', *AT_KD.split(), '--beta_decay', 'linear']
    for argv in ('--width 0.5', '--lr 0.2', '--seed 1', '--epochs 1', '--dtype bfloat16',
                 '--batch_size 8', '--epoch_step 1', '--test_fraction 0.5'):
        option, value = argv.split()
        error = refused(cifar_main, ['--save', 'a', option, value], f'its {option} is')
        assert value in error and '--overwrite' in error
    refused(cifar_main, ['--save', 'a', '--no-flip'], 'its --flip is True')
    refused(script.main, ['--resume', 'a', *DATA, '--lr', '0.2'], 'its --lr is 0.1, not 0.2')
    assert files('a') == before
    cifar(*decay)  # depends on the number of epochs
    refused(cifar_main, [*decay, '--epochs', '3'], 'its --epochs is 2, not 3')


def test_other_images_and_classes_are_noticed(cifar, work, refused, capsys):
    """A run does not go on with them. It is tested with the mean of its own images."""
    cifar('--save a')
    shutil.copytree('images', 'other')
    for path in Path('other/train/0').iterdir():
        write_image(path, np.full((16, 16, 3), 255, np.uint8))
    other, before = ['--dataroot', 'other'], files('a')
    refused(cifar_main, ['--save', 'a', '--epochs', '3', *other], 'other images or classes')
    assert files('a') == before
    script.main(['--evaluate', 'a', *other])
    assert f'loss {log_of("a")[-1]["test_loss"]:.4f}' in capsys.readouterr().out
    for part in ('train', 'test'):
        Path('other', part, '2').rename(Path('other', part, '3'))
    refused(script.main, ['--evaluate', 'a', *other], 'classes are not')


def test_leftovers_of_a_killed_process_are_replaced(cifar, work):
    cifar('--save a --epochs 1')
    for name in ('model.pt7.tmp', 'log.txt.tmp', 'notes.tmp'):
        Path('a', name).write_text('x')
    Path('a/log.txt').unlink()  # killed between checkpoint and log
    cifar('--save a --epochs 1')
    assert len(log_of('a')) == 1
    cifar('--save a')
    assert {p.name for p in Path('a').iterdir()} == {'.lock', 'log.txt', 'model.pt7', 'notes.tmp'}
    assert len(log_of('a')) == 2
    cifar('--save a --overwrite --epochs 1 --seed 1')
    assert [r['seed'] for r in log_of('a')] == [1]


def test_a_run_that_diverges_keeps_its_last_checkpoint(cifar, work, monkeypatch, capsys):
    with pytest.raises(SystemExit, match='1'):
        cifar('--save a --lr 1e8 --weight_decay 1')
    assert files('a').keys() == {Path('.lock')}
    monkeypatch.setattr(engine, 'SAVE_SECONDS', 0)  # a checkpoint after each epoch
    with pytest.raises(SystemExit, match='1'):
        cifar('--save b --epochs 4 --epoch_step 2 --lr_decay_ratio 1e20')
    assert 'b: diverged in epoch 3' in capsys.readouterr().err
    assert all(p.isfinite().all() for p in load('b')['params'].values())
    assert [r['epoch'] for r in log_of('b')] == [1, 2]
    with pytest.raises(SystemExit, match='1'):  # the loss of the only step is finite
        cifar('--save c --batch_size 64 --test_every 2 --lr 1e300')
    assert files('c').keys() == {Path('.lock')}


def test_several_seeds_are_each_seed_alone(cifar, work):
    cifar('--save logs/t{seed} --seed 1,2 --epochs 1 --width 0.5')
    method = '--beta 100 --epoch_step 1'
    cifar('--save s{seed} --teacher_id t{seed} --seed 1,2 --epochs 1', method)
    cifar('--save s2 --teacher_id t2 --seed 2', method)                # goes on alone
    cifar('--save s{seed} --teacher_id t{seed} --seed 1,2', method)    # the other is left
    for seed in (1, 2):
        cifar(f'--save alone{seed} --teacher_id t{seed} --seed {seed}', method)
        same_run(f's{seed}', f'alone{seed}')
    assert log_of('s1')[0]['train_loss'] != log_of('s2')[0]['train_loss']


def test_the_time_of_several_seeds_is_shared(cifar, work, monkeypatch):
    """Among those that still train: seed 0 is alone after the first step of its second epoch."""
    def slow(self, epoch, batches=script.DeviceData.train_batches):
        for batch in batches(self, epoch):
            time.sleep(0.2)  # three times an epoch
            yield batch
    cifar('--save s1 --seed 1 --epochs 1')
    monkeypatch.setattr(script.DeviceData, 'train_batches', slow)
    start = time.monotonic()
    cifar('--save s{seed} --seed 0,1 --test_every 9')
    passed = time.monotonic() - start
    (first, alone), (_, other) = ([r['train_time'] for r in log_of(f's{s}')] for s in (0, 1))
    assert alone > 0.44 and 1.5 < first + alone + other < passed


def test_a_seed_that_diverges_ends_alone(cifar, work):
    """One seed is where its rate is harmless again, the other begins where it is absurd."""
    cifar('--save s1 --seed 1 --epochs 1')
    state = load('s1')
    state['options'] |= {'epoch_step': [1], 'lr': 1e20, 'lr_decay_ratio': 1e-22}
    torch.save(state, 's1/model.pt7')
    with pytest.raises(SystemExit, match='1'):
        cifar('--save s{seed} --seed 0,1 --epoch_step 1 --lr 1e20 --lr_decay_ratio 1e-22')
    assert not Path('s0/model.pt7').exists() and [r['epoch'] for r in log_of('s1')] == [1, 2]


METHOD = f'{AT_KD} --factt 10 --epochs 8 --epoch_step 2,5'


def start(argv, code=None):
    """cifar.py, or this code, as a process of its own."""
    command = [sys.executable, *(['-c', code] if code else [str(ROOT / 'cifar.py')]), *SMALL]
    return subprocess.Popen([*command, *argv.split()], stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.PIPE, env=os.environ | {'PYTHONPATH': str(ROOT)})


@pytest.mark.parametrize('signum, status', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_with_one_line(work, refused, monkeypatch, signum, status):
    """Meanwhile no other process trains in its folder, afterwards one does."""
    process = start('--save a --epochs 9999')
    try:
        assert 'epoch 1/9999' in process.stdout.readline()
        monkeypatch.setattr(engine, 'FileLock', lambda path, timeout: FileLock(path, 0.1))
        refused(cifar_main, ['--save', 'a', '--epochs', '9999'], 'a: another process is training')
        process.send_signal(signum)
        error = process.communicate(timeout=20)[1]
    finally:
        process.kill()
    assert process.returncode == status and error.count('\n') == 1 and 'stopped' in error
    assert len(log_of('a')) == len(load('a')['records']) == 1
    cifar_main(['--save', 'a', '--overwrite', '--epochs', '1'])


def test_killed_and_continued_to_the_same_bits(cifar, work, teacher):
    process = start(f'--save parts {METHOD}')
    while 'epoch 3/8' not in process.stdout.readline():
        assert process.poll() is None
    process.kill()
    process.communicate()
    assert len(load('parts')['records']) < 8
    for name in ('parts', 'whole'):
        cifar('--save', name, METHOD)
    same_run('parts', 'whole')


@pytest.mark.slow
def test_killed_at_many_moments_and_continued(cifar, work, teacher):
    """Each process is killed a little later than the one before; a checkpoint an epoch."""
    argv, code = f'--save parts {METHOD} --epochs 40', 'import engine, cifar; ' \
        'engine.SAVE_SECONDS = 0\nwith engine.one_line_errors(): cifar.main()'
    seconds, epochs = 0.03, [0]
    while epochs[-1] < 40 and len(epochs) < 40:
        process = start(argv, code)
        process.stdout.readline()  # the teacher's error, at the start
        time.sleep(seconds)
        process.kill()
        error = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), error
        epochs.append(len(load('parts')['records']) if Path('parts/model.pt7').exists() else 0)
        seconds += 0.06
    assert epochs == sorted(epochs) and len({*epochs}) > 3
    cifar(argv)
    cifar(argv, '--save whole')
    same_run('parts', 'whole')


def test_wrong_use_ends_with_one_line_and_status_2(work):
    process = start('--depth 15 --save a')
    out, error = process.communicate()
    assert process.returncode == 2 and out == ''
    assert error.count('\n') == 1 and error.startswith('error: ') and 'depth 15' in error


@pytest.mark.parametrize('argv, words', [
    ('--gpu_id 0,1', '1 ranks on GPUs [0, 1]'), ('--ngpu 3', '3 ranks'), ('--gpu_id 2', '[2]')])
def test_gpus_are_as_many_as_named(work, refused, monkeypatch, argv, words):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    refused(cifar_main, argv.split(), words, '2 are visible')


def test_training_equals_a_plain_loop(cifar, work, teacher):
    """SGD with momentum through drops of the rate, weight decay on all, AT + KD, β decaying."""
    cifar('--save s --epochs 4 --epoch_step 1,3 --lr 0.05 --dtype double --beta_decay step', AT_KD)
    opt = Namespace(**load('s')['options'])
    data = script.DeviceData(opt, place(), *script.read_arrays(opt, place()))
    (g, teacher_params), (f, params) = load_teacher('t'), wide_resnet(10, 0.25, 3, seed=0)
    teacher_params, params = ({k: p.detach().double().requires_grad_(p.requires_grad)
                               for k, p in each.items()} for each in (teacher_params, params))
    velocity, losses = {k: torch.zeros_like(p) for k, p in trainable(params).items()}, []
    for lr in (0.05, 0.01, 0.01, 0.002):
        total = 0
        for x, y in data.train_batches(len(losses)):
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
    cifar('--save a --teacher_id t --beta 1000 --factt 100 --lr 0.01 --epochs 4 --epoch_step 1,3',
          '--beta_decay', decay)
    found = [(r['train_loss'] - r['ce_loss'])
             / (1000 * sum(r['at_losses']) + 100 * sum(r['act_losses'])) for r in log_of('a')]
    assert found == pytest.approx(factors, rel=1e-3)


def test_at_epochs(cifar, work, teacher):
    """Before and after them the run learns as without a teacher, by cross-entropy alone."""
    cifar('--save a --factt 10 --at_epochs 1,2 --epochs 3', AT_KD)
    cifar('--save b --epochs 3')
    a, b = log_of('a'), log_of('b')
    terms = ('at_losses', 'act_losses', 'kd_loss')
    assert [[name in r for name in terms] for r in a] == [[False] * 3, [True] * 3, [False] * 3]
    assert [r['train_loss'] == r['ce_loss'] for r in a] == [True, False, True]
    assert a[0]['train_loss'] == b[0]['train_loss'] and a[0]['test_loss'] == b[0]['test_loss']


@pytest.mark.parametrize('argv', [
    '--dtype float', '--dtype bfloat16', '--dtype half', '--dtype double',
    pytest.param('--compile', marks=pytest.mark.slow)])
def test_precision_and_compiling(cifar, work, teacher, argv):
    for name, more in (('a', argv), ('b', '')):
        cifar('--teacher_id t --alpha 0.9 --lr 0.01 --save', name, more)
    kind = torch.double if 'double' in argv else torch.float
    assert all(p.dtype == kind for p in load('a')['params'].values())
    a, b = (log_of(name)[-1]['train_loss'] for name in 'ab')
    assert a == pytest.approx(b, rel=0.05)
    assert (a == b) == (argv == '--dtype float') or argv == '--compile'
    cifar('--evaluate a')


def test_evaluate(cifar, work, teacher, capsys):
    """A run with its own options, weight files, and how similar their maps are."""
    cifar('--save a --image_size 8', AT_KD)
    record, params = log_of('a')[-1], load('a')['params']
    error = f'test error {100 - record["test_acc"]:.2f}%, loss '
    torch.save(params, 'weights.pth')
    torch.save({'params': {f'student.{k}': p for k, p in params.items()}}, 'student.pt7')
    before = files(work)
    for argv in ('a', 'weights.pth --image_size 8', '--teacher_id student.pt7 --image_size 8'):
        script.main(['--dataset', 'folder', *DATA, '--evaluate', *argv.split()])
        _, found, loss = capsys.readouterr().out.rpartition(error)
        assert found and float(loss) == pytest.approx(record['test_loss'], abs=1e-4)
    script.main([*DATA, '--evaluate', 'a', '--teacher_id', 'weights.pth'])
    assert capsys.readouterr().out.endswith('group by group: 1.0000, 1.0000, 1.0000\n')
    script.main([*DATA, '--evaluate', 'a', '--teacher_id', 't'])
    values = capsys.readouterr().out.rpartition(': ')[2].split(', ')
    assert len(values) == 3 and all(0 < float(v) < 1 for v in values)
    assert files(work) == before


def test_a_run_of_the_code_before_is_tested(cifar, capsys):
    """Its options may be None, and its checkpoint does not describe the data."""
    cifar('--save a')
    state = load('a')
    del state['data']
    state['options'] |= {'image_size': None, 'save_every': None, 'evaluate': None, 'seed': 3}
    torch.save(state, 'a/model.pt7')
    capsys.readouterr()
    script.main(['--dataset', 'folder', *DATA, '--evaluate', 'a'])
    assert f'test error {100 - state["records"][-1]["test_acc"]:.2f}%' in capsys.readouterr().out
