"""F-ActT, mapping functions and losses on gradients, from command line to checkpoint and log."""
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import load, options, same, stopped_after, teach

import cifar as script
from training.log import read_log
from utils import (
    activation_loss,
    at_loss,
    fold_batch_norm,
    kd_loss,
    make_adapters,
    new_model,
    objective,
)

NIN = ['--net', 'nin', '--no-pool_relu', '--dataset', 'folder', '--dataroot', 'images',
       '--batch_size', '16', '--lr', '0.01', '--weight_decay', '0', '--epochs', '2']
SETTINGS = {'width': 0.05, 'batch_norm': False}


def nin(*argv):
    script.main([*NIN, '--no-batch_norm', '--width', '0.05', *map(str, argv)])


def teach_nin():
    script.main([*NIN, '--lr', '0.1', '--width', '0.1', '--epochs', '1', '--save', 'logs/t'])


def log_of(run):
    return read_log(Path(run, 'log.txt'))


def test_objective_is_the_sum_of_its_parts():
    """Every loss at once, against each written out."""
    opt = options('--alpha', 0.7, '--beta', 30, '--factt', 20, '--grad_at', 5, '--symmetry', 3,
                  '--min_l2', 2, '--mapping', 'max', '--power', 3, '--at_groups', '0,2')
    student, plain = new_model('nin', SETTINGS, 7), new_model('nin', {'width': 0.1}, 7, seed=1)
    teacher = fold_batch_norm(plain)
    f, g, folded = student.f, teacher.f, teacher.params
    params = student.params | make_adapters(student, teacher, opt.at_groups, seed=0)
    assert {'adapter0', 'adapter2'} <= params.keys() and 'adapter1' not in params
    x = torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 3, 0, 6])
    loss, figures = objective(f, params, (g, folded), x.clone(), y, opt, torch.tensor(0.25))

    def gradient(network, p, x):
        x = x.clone().requires_grad_()
        ce = F.cross_entropy(network(x, p, False)[0], y, reduction='sum')
        return torch.autograd.grad(ce, x)[0]

    (z, S), (t, T) = f(x, params, False), g(x, folded, False)
    J_S, J_T, J_M = gradient(f, params, x), gradient(g, folded, x), gradient(f, params, x.flip(3))
    best = z.topk(5).indices == y[:, None]
    expected = {
        'acc': 100 * best[:, 0].float().mean(), 'acc5': 100 * best.any(1).float().mean(),
        'ce_loss': F.cross_entropy(z, y), 'kd_loss': kd_loss(z, t, 4),
        'at_losses': torch.stack([at_loss(S[i], T[i], 'max', 3) for i in (0, 2)]),
        'act_losses': torch.stack([activation_loss(S[i], T[i], params[f'adapter{i}'])
                                   for i in (0, 2)])}
    for name, J in (('grad_at_loss', J_S - J_T), ('symmetry_loss', J_S - J_M.flip(3)),
                    ('min_l2_loss', J_S)):
        expected[name] = (J ** 2).sum() / 2 / 6
    weights = {'ce_loss': 0.3, 'kd_loss': 0.7, 'at_losses': 0.25 * 30, 'act_losses': 0.25 * 20,
               'grad_at_loss': 5, 'symmetry_loss': 3, 'min_l2_loss': 2}
    expected['loss'] = sum(w * expected[name].sum() for name, w in weights.items())
    assert figures.keys() == expected.keys() and figures['loss'] is loss
    for name, value in expected.items():
        torch.testing.assert_close(figures[name].float(), value, rtol=1e-4, atol=1e-6)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in params.values())
    assert all(p.grad is None for p in [*folded.values(), *plain.params.values()])


@pytest.mark.parametrize('argv', [('--mapping', 'sum', '--power', '1'),
                                  ('--mapping', 'max', '--power', '4')])
def test_mapping(cifar, work, argv):
    teach(cifar)
    for name, extra in (('plain', []), ('mapped', argv)):
        cifar('--save', name, '--teacher_id', 't', '--beta', '1000', '--epochs', '1', *extra)
    plain, mapped = (log_of(name)[0] for name in ('plain', 'mapped'))
    assert plain['at_losses'] != mapped['at_losses'] and all(a > 0 for a in mapped['at_losses'])
    assert (mapped['mapping'], mapped['power']) == (argv[1], float(argv[3]))


def test_adapters_train_and_are_not_the_students(cifar, work):
    teach(cifar)
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
    student, teacher = (new_model('wrn', {'depth': 10, 'width': w}, 3) for w in (0.25, 0.5))
    new = make_adapters(student, teacher, [0, 1, 2], seed=0)
    assert not any(torch.equal(new[k], whole['adapters'][k]) for k in new)
    records = log_of('whole')
    assert all(len(r['act_losses']) == 3 and 'at_losses' not in r for r in records)
    assert records[0]['n_parameters'] == student.n_parameters
    assert records[-1]['act_losses'][0] < records[0]['act_losses'][0]
    script.main(['--evaluate', 'whole'])  # the student is whole without them
    del parts['adapters']
    torch.save(parts, 'parts/model.pt7')
    with pytest.raises(SystemExit, match='2'):
        script.main(['--resume', 'parts', '--epochs', '4'])


def test_adapters_that_are_not_finite_are_not_saved(cifar, work, monkeypatch, capsys):
    """As when they alone become so in an epoch's last step, of finite loss."""
    from training import runs
    teach(cifar)
    real = runs.Run.after_epoch

    def after_epoch(run, record):
        run.params['adapter0'].data.fill_(float('inf'))
        real(run, record)
    monkeypatch.setattr(runs.Run, 'after_epoch', after_epoch)
    with pytest.raises(SystemExit, match='1'):
        cifar('--save', 's', '--teacher_id', 't', '--factt', '1')
    assert 'not finite' in capsys.readouterr().err and not Path('s/model.pt7').exists()


def test_no_adapters_where_widths_agree(cifar, work):
    cifar('--save', 'logs/t', '--epochs', '1')
    cifar('--save', 's', '--teacher_id', 't', '--factt', '1000', '--epochs', '1')
    assert 'adapters' not in load('s/model.pt7')


ALL = ['--teacher_id', 't', '--grad_at', '1', '--symmetry', '1', '--min_l2', '1',
       '--beta', '1000', '--alpha', '0.9', '--lr', '0.001']


@pytest.mark.parametrize('argv, terms', [
    (['--min_l2', '1'], {'min_l2_loss'}), (['--symmetry', '1'], {'symmetry_loss'}),
    (['--teacher_id', 't', '--grad_at', '1'], {'grad_at_loss'}),
    (ALL, {'grad_at_loss', 'symmetry_loss', 'min_l2_loss'})])
def test_losses_on_gradients_train_and_resume(work, argv, terms):
    if '--teacher_id' in argv:
        teach_nin()
    nin('--save', 'whole', *argv)
    with stopped_after(1):
        nin('--save', 'parts', *argv)
    script.main(['--resume', 'parts'])
    assert same(load('whole/model.pt7'), load('parts/model.pt7'))
    records = log_of('whole')
    for record in records:
        assert {'min_l2_loss', 'symmetry_loss', 'grad_at_loss'} & record.keys() == terms
        assert record['deterministic'] is True and record['train_loss'] > 0
    nin('--save', 'none')
    plain = log_of('none')
    assert plain[0]['deterministic'] is False
    assert plain[-1]['train_loss'] != records[-1]['train_loss']


def test_a_run_with_losses_on_gradients_is_tested_in_any_way(work, capsys):
    nin('--save', 's', '--min_l2', '1', '--epochs', '1')
    for way in ('--dtype=half', '--dtype=bfloat16'):  # to train in half is refused
        capsys.readouterr()
        script.main(['--evaluate', 's', way])
        assert 's: NIN-0.05-nobn-nopoolrelu' in capsys.readouterr().out


def test_min_l2_makes_gradients_smaller(work):
    for weight in (0, 30):
        nin('--save', str(weight), '--min_l2', weight or 1e-9, '--epochs', '6')
    a, b = (log_of(run)[-1]['min_l2_loss'] for run in ('0', '30'))
    assert b < a / 2


def test_bfloat16_gradients_are_near_those_of_float(work):
    for dtype in ('float', 'bfloat16'):
        nin('--save', dtype, '--dtype', dtype, '--symmetry', '1', '--min_l2', '1')
    a, b = (log_of(run)[0] for run in ('float', 'bfloat16'))
    for key in ('symmetry_loss', 'min_l2_loss', 'train_loss'):
        assert b[key] == pytest.approx(a[key], rel=0.05) and a[key] != b[key]
