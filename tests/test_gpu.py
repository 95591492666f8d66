"""On a GPU: captured and compiled steps compute what eager ones do, and what float64 on a CPU does."""
import os

import pytest
import torch
from helpers import load, log_of

import cifar
from resnet import wide_resnet

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')]
# 20 steps of 16 images, one epoch; AT, KD and F-ActT at once.
STEPS = ['--dataset', 'Digits', '--train_fraction', '0.222', '--test_fraction', '0.1', '--epochs',
         '1', '--batch_size', '16', '--depth', '10', '--lr', '0.01', '--no-check_teacher']
LOSSES = ['--teacher_id', 'teacher', '--beta', '100', '--alpha', '0.5', '--factt', '10']


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    """In a new folder: a teacher, and the students of seeds 0 and 1 in float64 on the CPU."""
    os.environ['NVIDIA_TF32_OVERRIDE'] = '0'  # before the first step on the GPU
    os.chdir(tmp_path_factory.mktemp('gpu'))
    cifar.main([*STEPS, '--width', '2', '--ngpu', '0', '--save', 'teacher'])
    train('double', '--dtype', 'double', '--ngpu', '0')


def train(name, *argv):
    torch.compiler.reset()
    cifar.main([*STEPS, *LOSSES, '--seed', '0,1', '--save', f'{name}{{seed}}', *argv])


def difference(a, b):
    """The greatest relative difference of parameters' changes in training, and of losses."""
    worst = []
    for seed in (0, 1):
        start = torch.cat([p.detach().flatten() for p in wide_resnet(10, 1, 10, seed)[1].values()])
        one, two = (torch.cat([p.flatten() for p in load(f'{name}{seed}')['params'].values()])
                    for name in (a, b))
        worst.append(((one - two).norm() / (two - start).norm()).item())
        one, two = (log_of(f'{name}{seed}')[0] for name in (a, b))
        worst += [abs(one[k] / two[k] - 1) for k in ('train_loss', 'ce_loss', 'kd_loss')]
        worst += [abs(x / y - 1) for k in ('at_losses', 'act_losses')
                  for x, y in zip(one[k], two[k], strict=True)]
    return max(worst)


@pytest.mark.parametrize('dtype, limit', [('float', 2e-3), ('bfloat16', .2), ('half', .05)])
def test_captured_compiled_steps_are_those_of_float64(reference, dtype, limit):
    eager, fast = f'{dtype}_eager', f'{dtype}_fast'
    train(eager, '--dtype', dtype, '--no-compile')
    train(fast, '--dtype', dtype, '--compile', '--capture')
    assert difference(eager, 'double') < limit
    assert difference(fast, 'double') < limit
    assert difference(fast, eager) < limit
