"""Files made to do harm: each is refused with one line, within bounds of time and memory."""
import os
import signal
from pathlib import Path

import fuzz
import hostile
import pytest
from helpers import fake
from hostile import CHECKPOINTS, HICKLES, IMAGES, LOGS, READERS, outcome

import tables
from training import bounded
from training.images import Decoding, read_image
from training.log import read_log
from weights import InputError, load_model

MB = 2 ** 20


def check(path, megabytes):
    """Asserts that reading the file is refused, with this much memory at most, and runs nothing."""
    found = outcome(READERS.get(path.suffix, read_image), path)
    assert found.finding() is None and found.kind == 'InputError', found
    assert str(path) in found.message
    assert found.megabytes < megabytes + 4 * path.stat().st_size / MB, found
    assert not Path(f'{path}.ran').exists()


SLOW = ('deflated', 'deflated pickle', 'fill values', 'compressed', '20,000 data sets',
        'nested groups')


@pytest.mark.parametrize('suffix, name', [
    pytest.param(suffix, name, marks=[pytest.mark.slow] * (name in SLOW))
    for suffix, table in (('.pt7', CHECKPOINTS), ('.hkl', HICKLES)) for name in table])
def test_hostile_weights(tmp_path, monkeypatch, suffix, name):
    monkeypatch.setattr(bounded, 'SECONDS', 20 if name in SLOW else 3)
    path = tmp_path / f'x{suffix}'
    {'.pt7': CHECKPOINTS, '.hkl': HICKLES}[suffix][name](path)
    check(path, 300)


def test_what_never_ends_does_so_too_where_alarms_are_handled(tmp_path, monkeypatch):
    monkeypatch.setattr(bounded, 'SECONDS', 2)
    CHECKPOINTS['hash bomb'](tmp_path / 'x.pt7')
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    with pytest.raises(InputError, match='takes too long'):
        load_model(tmp_path / 'x.pt7')
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize('name', IMAGES)
def test_hostile_images(tmp_path, name, capfd):
    (tmp_path / name).write_bytes(IMAGES[name])
    check(tmp_path / name, 1100)
    assert capfd.readouterr().err == ''


@pytest.mark.parametrize('name', LOGS)
def test_hostile_logs(tmp_path, name):
    (tmp_path / 'x.txt').write_bytes(LOGS[name])
    found = outcome(hostile.read_report, tmp_path / 'x.txt')
    assert found.finding() is None and found.megabytes < 300, found


def test_images_are_decoded_by_threads_and_then_all_is_as_before(tmp_path, capfd):
    import resource
    from concurrent.futures import ThreadPoolExecutor
    (tmp_path / 'a.png').write_bytes(hostile.encoded('.png'))
    (tmp_path / 'b.png').write_bytes(IMAGES['checksum.png'])
    before = resource.getrlimit(resource.RLIMIT_AS)

    def read(name):
        try:
            return read_image(tmp_path / name).shape
        except InputError:
            return None
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(read, ['a.png', 'b.png'] * 50)) == {(40, 50, 3), None}
    assert Decoding.threads == 0 and resource.getrlimit(resource.RLIMIT_AS) == before
    os.write(2, b'still there')
    assert capfd.readouterr().err == 'still there'


@pytest.mark.parametrize('read', [load_model, read_image])
def test_only_regular_files_are_read(tmp_path, read):
    os.mkfifo(tmp_path / 'fifo')
    for path in (tmp_path / 'fifo', tmp_path, '/dev/zero'):
        with pytest.raises(InputError):
            read(path)
    assert read_log(tmp_path / 'fifo') == []


def test_a_picture_of_curves_does_not_replace_a_log(work, refused):
    fake(work / 'a', [50, 40])
    (work / 'a' / 'log.txt').rename('curves.png')
    (work / 'a' / 'log.txt').symlink_to('../curves.png')
    refused(tables.main, ['--plot', 'a'], '--output curves.png is one of the inputs')


def test_random_damage_gives_a_result_or_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fuzz, 'BATCH', 30)
    assert fuzz.fuzz(1, 0, tmp_path) == 0, capsys.readouterr().out
