"""Weight files: where they are found, what is recognised, what is refused, and that nothing in them runs."""
import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch

from resnet import STATISTICS, wide_resnet
from utils import InputError, find_checkpoint, load_network, load_teacher, read_checkpoint


def trained(depth=10, width=0.5, classes=4):
    f, params = wide_resnet(depth, width, classes, seed=1)
    f(torch.randn(8, 3, 8, 8), params, True)
    return f, {k: v.detach().clone() for k, v in params.items()}


X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def check(path, f, params):
    network = load_network(path)
    assert torch.equal(network.f(X, network.params, False)[0], f(X, params, False)[0])
    teacher = load_teacher(path)
    torch.testing.assert_close(teacher.f(X, teacher.params, False)[0], f(X, params, False)[0], rtol=1e-4, atol=1e-4)
    return network


def test_found_under_logs_as_a_folder_and_as_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, params = trained()
    for folder in ('logs/a', 'elsewhere/b'):
        os.makedirs(folder)
        torch.save({'params': params}, f'{folder}/model.pt7')
    torch.save({'params': params}, 'c.pt7')
    for run, path in (('a', 'logs/a/model.pt7'), ('logs/a', 'logs/a/model.pt7'), ('c.pt7', 'c.pt7'),
                      ('elsewhere/b', 'elsewhere/b/model.pt7'), ('logs/a/model.pt7', 'logs/a/model.pt7')):
        assert str(find_checkpoint(run)) == path
    os.makedirs('a')  # a folder that is there comes before a name under logs/
    torch.save({'params': params}, 'a/model.pt7')
    assert str(find_checkpoint('a')) == 'a/model.pt7' and str(find_checkpoint('logs/a')) == 'logs/a/model.pt7'
    with pytest.raises(InputError, match=r'logs/d/model\.pt7'):
        find_checkpoint('d')


@pytest.mark.parametrize('depth, width, classes', [(10, 1, 10), (16, 0.3, 3), (22, 2.6, 100)])
def test_architecture_follows_from_the_parameters(tmp_path, depth, width, classes):
    f, params = trained(depth, width, classes)
    torch.save({'params': params}, tmp_path / 'model.pt7')
    network = check(tmp_path, f, params)
    assert network.num_classes == classes and network.n_groups == 3
    assert network.name == f'WRN-{depth}-{int(64 * width) / 64:g}'
    assert network.n_parameters == sum(v.numel() for k, v in params.items() if not k.endswith(STATISTICS))


def test_published_student_with_its_teacher(tmp_path):
    f, params = trained()
    both = OrderedDict({f'student.{k}': torch.nn.Parameter(v, requires_grad=not k.endswith(STATISTICS))
                        for k, v in params.items()})
    both.update({f'teacher.{k}': v for k, v in trained(16, 1)[1].items()})
    optimizer = torch.optim.SGD([v for v in both.values() if v.requires_grad], 0.1)
    torch.save({'params': both, 'optimizer': optimizer.state_dict(), 'epoch': 200}, tmp_path / 'model.pt7')
    check(tmp_path, f, params)


def test_published_legacy_format_with_statistics_apart(tmp_path):
    f, params = trained()
    torch.save({'params': {k: v for k, v in params.items() if not k.endswith(STATISTICS)},
                'stats': {k: v for k, v in params.items() if k.endswith(STATISTICS)}, 'epoch': 1},
               tmp_path / 'model.pt7', _use_new_zipfile_serialization=False)
    check(tmp_path, f, params)


def refused(path, content, text):
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=text) as e:
        load_network(path)
    assert str(path) in str(e.value) and len(str(e.value).splitlines()) == 1


def test_what_is_no_network_is_refused(tmp_path):
    path = tmp_path / 'model.pt7'
    _, params = trained()
    whole = {'params': params}
    torch.save(whole, path)
    raw = path.read_bytes()
    refused(path, raw[:len(raw) // 2], 'not a checkpoint')
    refused(path, b'', 'not a checkpoint')
    refused(path, b'\x89PNG not torch at all', 'not a checkpoint')
    refused(path, [1, 2], 'holds a list')
    refused(path, {'epoch': 1}, 'no named tensor')
    refused(path, {'params': 1}, "'params' are no dict")
    refused(path, {'params': {'conv0': 3}}, 'no named tensor')
    refused(path, {'params': {'a': torch.zeros(2)}}, 'not a Wide ResNet')
    refused(path, {'params': {**params, 'extra': torch.zeros(2)}}, 'extra')
    refused(path, {'params': {k: v for k, v in params.items() if k != 'bn.running_var'}}, 'bn.running_var')
    refused(path, {'params': {**params, 'group1.block0.conv1': torch.zeros(16, 16, 1, 1)}}, 'group1.block0.conv1')
    for odd in (torch.zeros(32, device='meta'), torch.zeros(32, dtype=torch.cfloat)):
        refused(path, {'params': {**params, 'bn.bias': odd}}, 'bn.bias is no tensor of real')
    refused(path, {'params': {'a': torch.zeros(2)}, 'stats': 5}, 'not a Wide ResNet')
    refused(path, {'params': {**params, 'fc.weight': torch.zeros(1).expand(10 ** 9, 32)}}, 'not stored in full')


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('legacy', [False, True])
def test_hostile_file_runs_nothing(tmp_path, legacy):
    marker, path = tmp_path / 'marker', tmp_path / 'model.pt7'
    torch.save({'params': Bomb(marker)}, path, _use_new_zipfile_serialization=not legacy)
    refused(path, None, 'not a checkpoint')
    refused(path, pickle.dumps(Bomb(marker)), 'not a checkpoint')
    assert not marker.exists()


def test_compressed_file_is_refused(tmp_path):
    """torch itself would unpack a few kilobytes to any size."""
    torch.save({'params': {'conv0': torch.zeros(10 ** 6)}}, tmp_path / 'plain.pt7')
    with zipfile.ZipFile(tmp_path / 'plain.pt7') as plain, \
            zipfile.ZipFile(tmp_path / 'model.pt7', 'w', zipfile.ZIP_DEFLATED) as bomb:
        for part in plain.infolist():
            bomb.writestr(part.filename, plain.read(part))
    assert (tmp_path / 'model.pt7').stat().st_size < 10 ** 4
    refused(tmp_path / 'model.pt7', None, 'compressed')


def test_missing_file():
    with pytest.raises(InputError, match='no such file'):
        read_checkpoint('/nowhere/model.pt7')
