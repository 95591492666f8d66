"""Bad input: one line, exit status 2, nothing written. And what follows from the options alone."""
import os

import cv2
import numpy as np
import pytest
import torch
from helpers import CPU, files, load, options

import cifar as script
import imagenet
from resnet import wide_resnet
from training.distributed import choose_devices
from training.options import beta_decay, learning_rate

BAD = [
    # the network
    ('--depth 15', '6n+4'), ('--depth 4', '6n+4'), ('--depth 16.5', '--depth'),
    ('--depth x', '--depth'), ('--depth 1000000000000000006', '--depth'),
    ('--width 0', '--width'), ('--width 0.01', 'at least 1/16'), ('--width -1', '--width'),
    ('--width nan', '--width'), ('--width 1e300', '--width'), ('--width 1e5', '--width'),
    ('--net vgg', 'vgg'), ('--net resnet', 'resnet'), ('--pool_relu', '--pool_relu is no option'),
    # the data
    ('--dataset MNIST', 'MNIST'), ('--dataroot nowhere', 'nowhere'),
    ('--dataset Digits --image_size 8', '--image_size'), ('--image_size 1', '--image_size'),
    ('--image_size 1000000', '--image_size'), ('--randomcrop_pad -1', '--randomcrop_pad'),
    ('--randomcrop_pad 1.5', '--randomcrop_pad'), ('--randomcrop_pad 16', 'less than the size'),
    ('--train_fraction 0', '--train_fraction'), ('--train_fraction 1.5', '--train_fraction'),
    ('--test_fraction 0', '--test_fraction'), ('--test_fraction 1.5', '--test_fraction'),
    # training
    ('--dtype int8', 'int8'), ('--nthread -1', '--nthread'), ('--batch_size 0', '--batch_size'),
    ('--batch_size 1.5', '--batch_size'), ('--batch_size 99999999999999999999', '--batch_size'),
    ('--lr 0', '--lr'), ('--lr nan', '--lr'), ('--lr inf', '--lr'), ('--lr fast', '--lr'),
    ('--lr -0.1', '--lr'), ('--epochs 0', '--epochs'), ('--epochs -1', '--epochs'),
    ('--weight_decay -1', '--weight_decay'), ('--weight_decay 1e999', '--weight_decay'),
    ('--lr_decay_ratio 0', '--lr_decay_ratio'), ('--lr_decay_ratio 2', '--lr_decay_ratio'),
    ('--epoch_step 60', 'JSON list'), ('--epoch_step [60,', 'JSON list'),
    ('--epoch_step [60,60]', 'JSON list'), ('--epoch_step [1.5]', 'JSON list'),
    ('--epoch_step [true]', 'JSON list'), ('--epoch_step {"1":2}', 'JSON list'),
    ('--epoch_step [0,1]', 'JSON list'), ('--epoch_step ' + '[' * 100_000, 'JSON list'),
    ('--seed -1', '--seed'), ('--seed x', '--seed'), ('--ngpu -1', '--ngpu'),
    ('--gpu_id a', '--gpu_id'), ('--capture', '--capture: takes a GPU'),
    # losses
    ('--temperature 0', '--temperature'), ('--temperature -4', '--temperature'),
    ('--alpha 0.9', '--alpha needs a teacher'), ('--beta 1e3', '--beta needs a teacher'),
    ('--alpha 1.1 --teacher_id t', 'from 0 to 1'), ('--alpha -0.1 --teacher_id t', 'from 0 to 1'),
    ('--alpha nan --teacher_id t', 'from 0 to 1'), ('--beta -1 --teacher_id t', '--beta'),
    ('--beta inf --teacher_id t', '--beta'), ('--beta_decay exp', 'exp'),
    ('--teacher_id t', 'takes a weight: --beta, --factt, --alpha, --grad_at'),
    ('--at_groups 3', '--at_groups'), ('--at_groups 0,0', '--at_groups'),
    ('--at_groups -1', '--at_groups'), ('--at_groups x', '--at_groups'),
    ('--beta 1 --teacher_id t --at_epochs 1,3', 'up to --epochs'),
    ('--beta 1 --teacher_id t --at_epochs 1', 'two numbers'),
    ('--beta 1 --teacher_id t --at_epochs 1,0', 'the second larger'),
    ('--at_epochs 0,1', 'nothing is learned from a teacher'), ('--test_every 0', '--test_every'),
    # runs
    ('--teacher_id missing --beta 1', 'looked for'), ('--resume missing', 'looked for'),
    ('--evaluate missing', 'looked for'), ('--evaluate a --save b', '--evaluate'),
    ('--evaluate a --resume b', '--evaluate'), ('--evaluate', 'with --teacher_id'),
    ('--unknown 1', 'unrecognized'), ('--eval x', 'unrecognized'),
    ('--save images/train/0/0000.png/x', 'not a folder'),
    ('--save images/train/0/0000.png', 'not a folder'), ('--save dangling', 'not a folder'),
    ('--save blocked', 'in the way'),
]


@pytest.mark.parametrize('argv, text', BAD, ids=[argv[:60] for argv, _ in BAD])
def test_bad_options(cifar, refused, work, argv, text):
    (work / 'dangling').symlink_to('nowhere')
    (work / 'blocked' / 'log.txt').mkdir(parents=True)
    before = files(work)
    refused(lambda a: cifar(*a), argv.split(), text)
    assert files(work) == before and not (work / 'logs').exists()


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


@pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a GPU')
@pytest.mark.parametrize('argv', ['--cuda', '--ngpu 2', '--gpu_id 0', '--gpu_id 0 --ngpu 2'])
def test_gpus_that_are_not_there(cifar, refused, argv):
    refused(lambda a: cifar(*a), argv.split(), 'GPU' if argv != '--ngpu 2' else '--ngpu 2')


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


def test_bad_teachers(cifar, refused, work):
    def refuses(argv, text):
        refused(lambda a: cifar(*a), argv.split(), text)

    model = work / 'logs' / 't' / 'model.pt7'
    save_network(model, classes=5)
    before = files(work)
    refuses('--teacher_id t --alpha 0.9', 'has 5 classes, the data 3')
    refuses('--evaluate t', 'has 5 classes, the data 3')
    assert files(work) == before
    for content in (model.read_bytes()[:3000], b'', b'log'):
        model.write_bytes(content)
        refuses('--teacher_id t --beta 1', 'damaged')
    torch.save({'params': {'fc.weight': torch.zeros(3, 4)}}, model)
    refuses('--teacher_id t --beta 1', 'not the weights of a network')
    refuses('--evaluate t', 'not the weights of a network')


def test_attention_transfer_alone_needs_no_common_classes(cifar, work, capsys):
    save_network(work / 'logs' / 't' / 'model.pt7', classes=5)
    cifar('--teacher_id', 't', '--beta', '1', '--epochs', '1', '--save', 's')
    assert 'not tested: it has 5 classes, the data 3' in capsys.readouterr().out
    assert (work / 's' / 'model.pt7').exists()


def test_bad_folders(cifar, refused, work):
    images = work / 'images'
    odd = images / 'train' / '1' / '0003.png'
    whole = odd.read_bytes()
    for content in (b'', b'no image', whole[:60]):
        odd.write_bytes(content)
        refused(lambda a: cifar(*a), [], str(odd.relative_to(work)))
    cv2.imwrite(str(odd), np.zeros((8, 8, 3), np.uint8))
    refused(lambda a: cifar(*a), [], f'{odd.relative_to(work)}: 8×8, but others are 16×16')
    odd.write_bytes(whole)
    (images / 'train' / '3').mkdir()
    refused(lambda a: cifar(*a), [], 'the class 3 is only in one of train/, test/')
    (images / 'test' / '3').mkdir()
    refused(lambda a: cifar(*a), [], 'images/train/3: a class without images')
    assert not (work / 'logs').exists()


def test_hidden_files_and_folders_are_no_data(work):
    for part in ('train', 'test'):
        (work / 'images' / part / '.ipynb_checkpoints').mkdir()
    (work / 'images' / 'train' / '0' / '._0000.png').write_bytes(b'')
    opt = script.make_parser().parse_args(['--dataset', 'folder', '--dataroot', 'images'])
    assert script.count_classes(opt) == 3 and len(script.read_folder(opt, CPU)[0]) == 45


@pytest.mark.parametrize('dataset', ['CIFAR10', 'CIFAR100', 'SVHN'])
def test_data_that_is_not_there_and_cannot_be_downloaded(refused, work, monkeypatch, dataset):
    def no_network(*args, **kwargs):
        raise OSError('no network')

    monkeypatch.setattr('urllib.request.urlopen', no_network)
    refused(script.main, ['--dataset', dataset, '--dataroot', 'nowhere'],
            f'not whole in {work / "nowhere"}')
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


def test_numbers_beyond_any_use(cifar, refused):
    for option in ('--nthread', '--epochs', '--save_every', '--randomcrop_pad'):
        refused(lambda a: cifar(*a), [option, '1' + 400 * '0'],
                f'argument {option}: must be a whole number')
