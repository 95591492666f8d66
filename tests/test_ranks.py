"""Two real processes (torchrun, gloo on the CPU) against one process that runs the same shards."""
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, SMALL, load, log_of, place

import cifar as cifar_script
import engine
import imagenet
import utils
from resnet import STATISTICS, imagenet_resnet, initialize, trainable, wide_resnet

CIFAR = ['cifar.py', *SMALL, '--dtype', 'double']
IMAGENET = 'imagenet.py --dataset folder --image_size 64 --width 0.0625 --batch_size 16 ' \
           '--epochs 2 --nthread 0 --lr 0.01 --dtype double --dataroot'


def torchrun(script, *argv):
    """The script on two ranks."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node',
               '2', str(ROOT / script), *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env=os.environ | {'PYTHONPATH': str(ROOT)})


def train_shards(opt, shards, f, params, teacher, adapters):
    """Trains in plain words: batch norm per shard, gradients and statistics averaged.

    `shards` are the data of the ranks. Returns the means over all samples, an epoch each.
    """
    trained, records = trainable(params) | adapters, []
    velocity = {k: torch.zeros_like(p) for k, p in trained.items()}
    statistics = [{k: t.clone() for k, t in params.items() if k.endswith(STATISTICS)}
                  for _ in shards]
    for epoch in range(opt.epochs):
        first, end = opt.at_epochs or (0, opt.epochs)
        now, sums, count = teacher if first <= epoch < end else None, {}, 0
        for batches in zip(*(data.train_batches(epoch) for data in shards), strict=True):
            total = 0
            for (x, y), own in zip(batches, statistics, strict=True):
                loss, terms = utils.objective(f, params | own, now, x.double(), y, opt, 1, adapters)
                total, count = total + loss / len(shards), count + len(y)
                sums = {k: sums.get(k, 0) + v.detach() * len(y) for k, v in terms.items()}
            gradients = torch.autograd.grad(total, [*trained.values()], allow_unused=True)
            with torch.no_grad():
                for (k, p), g in zip(trained.items(), gradients, strict=True):
                    if g is not None:
                        velocity[k].mul_(0.9).add_(g + opt.weight_decay * p)
                        p -= opt.lr * velocity[k]
        records.append({k: v / count for k, v in sums.items()})
        means = {k: sum(own[k] for own in statistics) / len(shards) for k in statistics[0]}
        for to in (params, *statistics):
            to |= {k: t.clone() for k, t in means.items()}
    return records


def check(run, data, shards, f, params, adapters):
    """Compares a run of two ranks, in this folder, with `train_shards`."""
    opt, double = Namespace(**load(run)['options']), Namespace(dtype='double')
    g, teacher_params = utils.load_teacher('t')
    params, teacher_params, adapters = (engine.to_device(p, torch.device('cpu'), double)
                                        for p in (params, teacher_params, adapters))
    expected = train_shards(opt, shards, f, params, (g, teacher_params), adapters)
    state, close = load(run), {'rtol': 1e-5, 'atol': 1e-8}
    stored = state['params'] | state.get('adapters', {})
    for k, p in (params | adapters).items():
        torch.testing.assert_close(stored[k], p.detach(), **close)
    for record, means in zip(log_of(run), expected, strict=True):
        for k, v in means.items():
            name = f'train_{k}' if k in ('loss', 'acc') else k
            torch.testing.assert_close(torch.tensor(record[name]).double(), v.double(), **close)
    x, y = (torch.cat(parts) for parts in zip(*data.test_batches(), strict=True))
    with torch.no_grad():
        logits = f(x.double(), params, False)[0]
    assert record['test_loss'] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert record['test_acc'] == pytest.approx(100 * (logits.argmax(1) == y).double().mean().item())
    assert record['device'].startswith('2 × CPU')
    return log_of(run)


def test_two_ranks_of_cifar(cifar, work):
    """45 images in batches of 16: the last is smaller, and one image is left out."""
    cifar('--save logs/t --width 0.5 --epochs 1')
    argv = '--save two --teacher_id t --alpha 0.5 --beta 1000 --factt 100 --at_epochs 1,2'
    done = torchrun(*CIFAR, *argv.split(), '--epochs', '3')
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('epoch 3/3') == 1  # one rank speaks
    opt = Namespace(**load('two')['options'])
    arrays = cifar_script.read_arrays(opt, place())
    data, *shards = (cifar_script.DeviceData(opt, p, *arrays)
                     for p in (place(), place(0, 2), place(1, 2)))
    adapters = initialize({f'adapter{g}': (2 * c, c, 1, 1) for g, c in enumerate((4, 8, 16))}, 0)
    records = check('two', data, shards, *wide_resnet(10, 0.25, 3, seed=0), adapters)
    assert ['act_losses' in r for r in records] == [False, True, False]
    cifar(*CIFAR[1:], argv, '--epochs 4')  # one process goes on
    assert len(log_of('two')) == 4


def test_two_ranks_of_imagenet(work):
    argv = [*IMAGENET.split(), str(work / 'images')]
    imagenet.main([*argv[1:], '--save', 'logs/t', '--epochs', '1', '--depth', '34'])
    done = torchrun(*argv, '--save', 'two', '--teacher_params', 't', '--alpha', '0.9', '--beta',
                    '1000')
    assert done.returncode == 0, done.stderr
    opt = Namespace(**load('two')['options'])
    data, *shards = (imagenet.ImageLoader(opt, p, Path(opt.dataroot))
                     for p in (place(), place(0, 2), place(1, 2)))
    records = check('two', data, shards, *imagenet_resnet(18, 0.0625, 3, seed=0), {})
    assert [len(r['at_losses']) for r in records] == [2, 2]


@pytest.mark.slow
def test_machines_share_the_folder_of_a_run(work):
    """Two ranks, each in its own folder: a run can begin, but not go on, as only one writes."""
    Path('machine.py').write_text('import os, cifar; os.makedirs(r := os.environ["RANK"], '
                                  'exist_ok=True); os.chdir(r); cifar.main()')
    argv = work / 'machine.py', *CIFAR[1:], '--save', 'a', '--dataroot', str(work / 'images')
    assert torchrun(*argv, '--epochs', '1').returncode == 0
    done = torchrun(*argv)
    assert done.returncode != 0 and 'not all machines see the checkpoint' in done.stderr
    assert len(log_of('0/a')) == 1


def test_the_batch_size_is_a_multiple_of_the_ranks(work):
    done = torchrun(*CIFAR, '--save', 'a', '--batch_size', '5')
    assert done.returncode != 0 and not Path('a').exists()
    assert 'error: --batch_size 5 is no multiple of 2 ranks' in done.stderr.splitlines()
