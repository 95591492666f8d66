"""F-ActT, mapping functions and losses on gradients, from the command line to the checkpoint and the log."""
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import load, same
from test_training import PLACE, argparse_of, stopped_after

import cifar as script
import training
from resnet import network_in_network
from training import read_log
from utils import Trained, activation_loss, at_loss, fold_batch_norm, kd_loss, make_adapters

NIN = ['--net', 'nin', '--no-batch_norm', '--no-pool_relu', '--dataset', 'folder', '--dataroot', 'images',
       '--batch_size', '16', '--lr', '0.01', '--weight_decay', '0', '--epochs', '3']


def nin(*argv):
    script.main([*NIN, '--width', '0.05', *map(str, argv)])


def teach(width=0.1):
    script.main(['--net', 'nin', '--no-pool_relu', '--width', str(width), '--dataset', 'folder', '--dataroot',
                 'images', '--epochs', '1', '--save', 'logs/t'])


def test_objective_is_the_sum_of_its_parts():
    """Every loss at once, against each written out."""
    opt = argparse_of('--alpha', '0.7', '--beta', '30', '--factt', '20', '--grad_at', '5', '--symmetry', '3',
                      '--min_l2', '2', '--mapping', 'max', '--power', '3')
    opt.at_groups = [0, 2]
    f, params = network_in_network(0.05, 4, batch_norm=False)
    g, teacher = network_in_network(0.1, 4, seed=1)
    folded = fold_batch_norm(teacher)
    x, y = torch.randn(6, 3, 12, 12), torch.tensor([0, 1, 2, 3, 0, 1])
    params |= make_adapters(f(x, params, False)[1], g(x, folded, False)[1], opt.at_groups, seed=0)
    assert {'adapter0', 'adapter2'} <= params.keys() and 'adapter1' not in params
    objective = training.make_objective(opt, PLACE, f, params, Trained(g, folded, '', 4, 3, 0))
    loss, means = objective(x.clone(), y, torch.tensor(0.25))

    def gradient(network, p, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(network(x, p, False)[0], y, reduction='sum'), x)[0]

    (z, S), (t, T) = f(x, params, False), g(x, folded, False)
    at = [at_loss(S[i], T[i], 'max', 3) for i in (0, 2)]
    act = [activation_loss(S[i], T[i], params[f'adapter{i}']) for i in (0, 2)]
    J_S, J_T, J_M = gradient(f, params, x), gradient(g, folded, x), gradient(f, params, x.flip(3))
    terms = [(J ** 2).sum() / 2 / 6 for J in (J_S - J_T, J_S - J_M.flip(3), J_S)]
    expected = (kd_loss(z, t, y, 4, 0.7) + 0.25 * (30 * sum(at) + 20 * sum(act))
                + 5 * terms[0] + 3 * terms[1] + 2 * terms[2])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    accuracy = (z.argmax(1) == y).float().mean()
    values = torch.stack([torch.ones(()), expected, accuracy, *at, *act, *terms]).detach().double()
    torch.testing.assert_close(means, values, rtol=1e-4, atol=1e-6)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in params.values())
    assert all(p.grad is None for p in teacher.values())
    record = training.named_terms(opt, means[3:].tolist())
    assert record.keys() == {'at_losses', 'act_losses', 'grad_at_loss', 'symmetry_loss', 'min_l2_loss'}
    assert record['act_losses'] == pytest.approx([a.item() for a in act], rel=1e-4)
    assert record['min_l2_loss'] == pytest.approx(terms[2].item(), rel=1e-4)


@pytest.mark.parametrize('argv', [('--mapping', 'sum', '--power', '1'), ('--mapping', 'max', '--power', '4')])
def test_mapping(cifar, work, argv):
    cifar('--save', 'logs/t', '--width', '0.5')
    for name, extra in (('plain', []), ('mapped', argv)):
        cifar('--save', name, '--teacher_id', 't', '--beta', '1000', '--epochs', '1', *extra)
    plain, mapped = (read_log(Path(name, 'log.txt'))[0] for name in ('plain', 'mapped'))
    assert plain['at_losses'] != mapped['at_losses'] and all(a > 0 for a in mapped['at_losses'])
    assert (mapped['mapping'], mapped['power']) == (argv[1], float(argv[3]))


@pytest.mark.parametrize('power', ['0.5', '0', 'nan', '1000'])
def test_power_below_1_is_refused(cifar, refused, power):
    refused(lambda a: cifar(*a), ['--power', power], 'argument --power: must be a number from 1 to 100')


def test_adapters_train_and_are_not_the_students(cifar, work):
    cifar('--save', 'logs/t', '--width', '0.5')
    argv = ['--teacher_id', 't', '--factt', '1000', '--epochs', '3', '--beta_decay', 'linear']
    cifar('--save', 'whole', *argv)
    with stopped_after(2):
        cifar('--save', 'parts', *argv)
    script.main(['--resume', 'parts'])
    whole, parts = load('whole/model.pt7'), load('parts/model.pt7')
    # WRN-10-0.25 from WRN-10-0.5: 4 and 8, 8 and 16, 16 and 32 channels
    assert {k: tuple(t.shape) for k, t in whole['adapters'].items()} == {
        'adapter0': (8, 4, 1, 1), 'adapter1': (16, 8, 1, 1), 'adapter2': (32, 16, 1, 1)}
    assert same(whole, parts)
    assert all(torch.equal(t, parts['adapters'][k]) for k, t in whole['adapters'].items())
    assert not any('adapter' in k for k in whole['params'])
    new = make_adapters([torch.zeros(1, c, 1, 1) for c in (4, 8, 16)], [torch.zeros(1, c, 1, 1) for c in (8, 16, 32)],
                        [0, 1, 2], seed=0)
    assert not any(torch.equal(new[k], whole['adapters'][k]) for k in new)
    records = read_log(Path('whole/log.txt'))
    assert all(len(r['act_losses']) == 3 and r['at_losses'] == [] for r in records)
    assert records[0]['n_parameters'] == sum(t.numel() for k, t in whole['params'].items() if 'running' not in k)
    assert records[-1]['act_losses'][0] < records[0]['act_losses'][0]
    cifar('--evaluate', 'whole')  # the student is whole without them
    del parts['adapters']
    torch.save(parts, 'parts/model.pt7')
    with pytest.raises(SystemExit, match='2'):
        script.main(['--resume', 'parts', '--epochs', '4'])


def test_no_adapters_where_widths_agree(cifar, work):
    cifar('--save', 'logs/t')
    cifar('--save', 's', '--teacher_id', 't', '--factt', '1000', '--epochs', '1')
    assert 'adapters' not in load('s/model.pt7')


@pytest.mark.parametrize('argv, terms', [
    (['--min_l2', '1'], {'min_l2_loss'}), (['--symmetry', '1'], {'symmetry_loss'}),
    (['--teacher_id', 't', '--grad_at', '1'], {'grad_at_loss'}),
    (['--teacher_id', 't', '--grad_at', '1', '--symmetry', '1', '--min_l2', '1', '--beta', '1000', '--alpha', '0.9',
      '--lr', '0.001'],
     {'grad_at_loss', 'symmetry_loss', 'min_l2_loss'})])
def test_losses_on_gradients_train_and_resume(work, argv, terms):
    teach()
    nin('--save', 'whole', *argv)
    with stopped_after(1):
        nin('--save', 'parts', *argv)
    script.main(['--resume', 'parts'])
    assert same(load('whole/model.pt7'), load('parts/model.pt7'))
    records = read_log(Path('whole/log.txt'))
    for record in records:
        assert {k for k in record if k in ('min_l2_loss', 'symmetry_loss', 'grad_at_loss')} == terms
        assert record['deterministic'] is True and record['train_loss'] > 0
    nin('--save', 'none')
    plain = read_log(Path('none/log.txt'))
    assert plain[0]['deterministic'] is False and plain[-1]['train_loss'] != records[-1]['train_loss']


def test_a_run_with_losses_on_gradients_is_tested_in_any_way(work, capsys):
    nin('--save', 's', '--min_l2', '1', '--epochs', '1')
    for way in ('--compile', '--dtype=bfloat16'):
        capsys.readouterr()
        script.main(['--evaluate', 's', way])
        assert 's: NIN-0.046875' in capsys.readouterr().out


def test_min_l2_makes_gradients_smaller(work):
    for weight in (0, 30):
        nin('--save', str(weight), '--min_l2', weight or 1e-9, '--epochs', '6')
    a, b = (read_log(Path(run, 'log.txt'))[-1]['min_l2_loss'] for run in ('0', '30'))
    assert b < a / 2


@pytest.mark.parametrize('argv, text', [
    (['--min_l2', '1', '--compile'], '--compile: torch.compile cannot differentiate twice, as --min_l2 needs'),
    (['--symmetry', '1', '--dtype', 'half'], '--dtype half'), (['--grad_at', '1'], '--grad_at needs a teacher'),
    (['--factt', '1'], '--factt needs a teacher'), (['--symmetry', '-1'], '--symmetry'),
    (['--teacher_id', 't', '--grad_at', '1'], '--grad_at: the teacher t has 5 classes, the data 3')])
def test_refused(work, refused, argv, text):
    Path('logs/t').mkdir(parents=True)
    torch.save({'params': network_in_network(0.05, 5)[1]}, 'logs/t/model.pt7')
    refused(script.main, [*NIN, '--width', '0.05', *argv], text)


@pytest.mark.parametrize('argv', [['--net', 'nin', '--width', '0.05', '--batch_norm'], ['--depth', '10']])
def test_gradients_through_batch_norm_are_refused(work, refused, argv):
    refused(script.main, ['--dataset', 'folder', '--dataroot', 'images', *argv, '--min_l2', '1'], 'has batch norm')


def test_bfloat16_gradients_are_near_those_of_float(work):
    for dtype in ('float', 'bfloat16'):
        nin('--save', dtype, '--dtype', dtype, '--symmetry', '1', '--min_l2', '1')
    a, b = (read_log(Path(run, 'log.txt'))[0] for run in ('float', 'bfloat16'))
    for key in ('symmetry_loss', 'min_l2_loss', 'train_loss'):
        assert b[key] == pytest.approx(a[key], rel=0.05) and a[key] != b[key]
