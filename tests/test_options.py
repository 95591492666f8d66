"""What follows from the options alone."""
import os

import numpy as np
import pytest
import torch
from helpers import CPU, load, options

import cifar as script
import imagenet
import tables
from resnet import wide_resnet
from training.distributed import choose_devices
from training.options import beta_decay, learning_rate


@pytest.mark.parametrize('script, option', [
    *((script, name) for name in ('save', 'resume', 'evaluate', 'teacher_id')),
    *((imagenet, name) for name in ('save', 'resume', 'evaluate', 'teacher_params'))])
def test_empty_names(refused, script, option):
    opt = script.make_parser().parse_args([f'--{option}', ''])
    assert getattr(opt, option) is None  # the same as leaving it out
    refused(script.main, [f'--{option}', ' '], 'is blank')


def test_a_run_with_values_as_the_published_scripts_took_them(cifar, work):
    cifar('--save', '', '--resume', '', '--teacher_id', '', '--nthread', '0', '--dtype', 'double',
          '--randomcrop_pad', '4.0', '--epoch_step', '[2,1]', '--epochs', '3')
    state = load('logs/folder_WRN-10-0.25_seed0/model.pt7')
    assert state['params']['conv0'].dtype == torch.float64
    expected = {'nthread': 0, 'randomcrop_pad': 4, 'epoch_step': [1, 2], 'teacher_id': None}
    assert state['options'].items() >= expected.items()


def test_numbers_and_milestones_may_be_written_in_other_ways():
    opt = options('--epochs', '4.0', '--batch_size', '1e2', '--epoch_step', '[120, 60]')
    assert (opt.epochs, opt.batch_size, opt.epoch_step) == (4, 100, [60, 120])
    assert type(opt.epochs) is int and options('--seed', 2 ** 63 - 1).seed == 2 ** 63 - 1


@pytest.mark.parametrize('argv, ids', [
    ('', [0]), ('--ngpu 2', [0, 1]), ('--gpu_id 2,0 --ngpu 2', [2, 0]), ('--gpu_id 3', [3]),
    ('--gpu_id 1,2', [1]), ('--ngpu 0', None), ('--cuda --ngpu 4', [0, 1, 2, 3])])
def test_devices_of_a_machine_with_four_gpus(monkeypatch, argv, ids):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,5,6,7')
    opt = script.make_parser().parse_args(argv.split())
    gpus = [torch.device('cuda', i) for i in ids or ()]
    assert choose_devices(opt) == (gpus or [torch.device('cpu')])
    assert os.environ['CUDA_VISIBLE_DEVICES'] == '4,5,6,7'


@pytest.mark.parametrize('argv', ['--ngpu 5', '--gpu_id 4', '--gpu_id 0,1 --ngpu 3',
                                  '--cuda --ngpu 0', '--gpu_id 0 --ngpu 0'])
def test_devices_that_four_gpus_do_not_give(cifar, refused, monkeypatch, argv):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    refused(lambda a: cifar(*a), argv.split(), argv.split()[0])


def save_network(path, depth=10, width=0.25, classes=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({'params': wide_resnet(depth, width, classes)[1]}, path)


def test_attention_transfer_alone_needs_no_common_classes(cifar, work, capsys):
    save_network(work / 'logs' / 't' / 'model.pt7', classes=5)
    cifar('--teacher_id', 't', '--beta', '1', '--epochs', '1', '--save', 's')
    assert 'not tested: it has 5 classes, the data 3' in capsys.readouterr().out
    assert (work / 's' / 'model.pt7').exists()


def test_hidden_files_and_folders_are_no_data(work):
    for part in ('train', 'test'):
        (work / 'images' / part / '.ipynb_checkpoints').mkdir()
    (work / 'images' / 'train' / '0' / '._0000.png').write_bytes(b'')
    opt = options()
    assert script.count_classes(opt) == 3 and len(script.read_folder(opt, CPU)[0]) == 45


@pytest.mark.parametrize('dataset', ['CIFAR10', 'CIFAR100', 'SVHN'])
def test_data_that_is_not_there_and_cannot_be_downloaded(refused, work, monkeypatch, dataset):
    def no_network(*args, **kwargs):
        raise OSError('no network')

    monkeypatch.setattr('urllib.request.urlopen', no_network)
    where = ['--dataset', dataset, '--dataroot', 'nowhere']
    for main, argv in ((script.main, where), (tables.main, ['1', *where])):
        refused(main, argv, f'not complete in {work / "nowhere"}')
    assert not (work / 'nowhere').exists() and not (work / 'logs').exists()


def test_learning_rate_drops_after_completed_epochs():
    opt = script.make_parser().parse_args([])
    rates = [learning_rate(opt, epoch) for epoch in range(200)]
    expected = [0.1] * 60 + [0.02] * 60 + [0.004] * 40 + [0.0008] * 40
    assert rates == pytest.approx(expected, rel=1e-12)


def test_beta_decay():
    def betas(decay):
        opt = script.make_parser().parse_args(['--beta', '1000', '--beta_decay', decay])
        return [opt.beta * beta_decay(opt, epoch) for epoch in range(201)]

    assert betas('none') == [1000] * 201
    assert betas('step')[:200] == pytest.approx([1000] * 60 + [200] * 60 + [40] * 40 + [8] * 40)
    assert betas('linear') == pytest.approx(np.linspace(1000, 0, 201))
    assert betas('cosine') == pytest.approx(500 * (1 + np.cos(np.linspace(0, np.pi, 201))))
    assert betas('cosine')[200] == pytest.approx(0, abs=1e-12)


def test_published_flags_and_defaults():
    published = {
        'width': 1, 'dataset': 'CIFAR10', 'dataroot': '.', 'dtype': 'float',
        'teacher_id': None, 'batch_size': 128, 'lr': 0.1, 'epochs': 200, 'weight_decay': 0.0005,
        'epoch_step': [60, 120, 160], 'lr_decay_ratio': 0.2, 'resume': None, 'randomcrop_pad': 4,
        'temperature': 4, 'alpha': 0, 'beta': 0, 'cuda': False, 'save': None, 'ngpu': 1,
        'gpu_id': None, 'seed': 0}
    opt = script.make_parser().parse_args([])
    student = script.setup(opt).student
    assert vars(opt).items() >= published.items()
    assert student.name == 'WRN-16-1' and opt.depth == 16 and opt.at_groups == [0, 1, 2]


@pytest.mark.parametrize('cores, argv, world, expected', [
    (8, [], None, 8), (64, [], None, 16), (8, ['--ngpu', '4'], None, 2), (2, [], '4', 1),
    (8, ['--ngpu', '0'], None, 8), (8, [], '2', 4), (8, ['--nthread', '0'], None, 0)])
def test_workers_by_default_are_a_ranks_cores(monkeypatch, cores, argv, world, expected):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(cores)))
    if world:
        monkeypatch.setenv('LOCAL_WORLD_SIZE', world)
    opt = script.make_parser().parse_args(argv)
    script.fill_defaults(opt)
    assert opt.nthread == expected
