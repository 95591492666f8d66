"""Files made to do harm: what reads them must refuse them. fuzz.py damages good files at random.

Each file is read by the function that the scripts read it with, in a child process: a file that
kills it is a finding, and not the end. A result may come out, or an InputError of one line.
"""
import ctypes
import io
import json
import os
import pickle
import resource
import signal
import time
import zipfile
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import cv2
import h5py
import numpy as np
import torch
from helpers import ROOT, photo

import report
from resnet import wide_resnet
from training.bounded import bound_memory
from training.errors import one_line
from training.images import read_image
from weights import load_model

# ---------------------------------------------------------------------------- a child that reads

def read_report(path):
    """What tables.py --runs does with a log."""
    folder = path.with_suffix('')
    folder.mkdir(exist_ok=True)
    (folder / 'log.txt').write_bytes(path.read_bytes())
    with redirect_stdout(io.TextIOWrapper(io.BytesIO(), 'utf-8')):
        report.print_runs([str(folder)])


READERS = {'.pt7': load_model, '.hkl': load_model, '.txt': read_report, '.jpg': read_image,
           '.png': read_image}


class Outcome(NamedTuple):
    """What came of reading a file: 'result', 'InputError' or what else was raised; the message."""
    kind: str
    message: str
    seconds: float
    megabytes: float    # of memory at most, more than before

    def finding(self):
        """What should not have come of any file, or None."""
        if self.kind not in ('result', 'InputError'):
            return f'{self.kind}: {self.message[:500]}'
        return None


def outcome(read, path, memory=2 ** 32, seconds=100):
    """Reads a file in a child process, which gets that much, and says what came of it."""
    begin, (out, into) = time.time(), os.pipe()
    if not (child := os.fork()):
        try:
            signal.alarm(seconds)
            ctypes.CDLL(None).malloc_trim(0)  # no free heap of earlier tests, which has no bound
            bound_memory(memory)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                read(path)
                kind, message = 'result', ''
            except BaseException as e:
                kind, message = type(e).__name__, one_line(str(e))
            peak = max(resource.getrusage(who).ru_maxrss
                       for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
            os.write(into, pickle.dumps((kind, message, (peak - before) / 1024)))
        finally:
            os._exit(0)
    os.close(into)
    with open(out, 'rb') as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    kind, message, size = pickle.loads(answer) if answer else (f'killed by {status}', '', 0)
    return Outcome(kind, message, time.time() - begin, size)


# ---------------------------------------------------------------------------- .pt7

class Call:
    """An object whose unpickling calls a function."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def saved(content, legacy=False):
    def make(path):
        torch.save(content(path) if callable(content) else content, path,
                   _use_new_zipfile_serialization=not legacy)
    return make


def zipped(opcodes, compression=zipfile.ZIP_STORED, behind=b''):
    """A file as torch.save makes it, around this pickle."""
    def make(path):
        with zipfile.ZipFile(path, 'w', compression) as file:
            for name, content in (('data.pkl', opcodes), ('byteorder', b'little'),
                                  ('version', b'3\n')):
                file.writestr(f'archive/{name}', content)
        path.write_bytes(path.read_bytes() + behind)
    return make


def deflated(path):
    """Half a gigabyte of zeros, deflated."""
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
        buffer = io.BytesIO()
        torch.save({'params': {'conv0': torch.zeros(2 ** 27)}}, buffer)
        with zipfile.ZipFile(buffer) as plain:
            for part in plain.infolist():
                file.writestr(part.filename, plain.read(part))


def twice(value, times, make=lambda v: [v, v]):
    """A value in two places of a list that is in two places of a list, and so on."""
    for _ in range(times):
        value = make(value)
    return value


def cycle():
    value = {}
    value['params'] = value
    return value


def with_attributes(tensor, **attributes):
    vars(tensor).update(attributes)
    return tensor


def weights():
    return {k: v.detach() for k, v in wide_resnet(10, 0.25, 3)[1].items()}


def with_tensor(tensor):
    """A good network but for one tensor."""
    return saved(lambda path: {'params': weights() | {'bn.bias': tensor()}})


def with_name(name):
    """A good network and one more tensor, of this name."""
    return saved(lambda path: {'params': weights() | {name: torch.zeros(3)}})


def with_entry(**entries):
    return saved(lambda path: {'params': weights()} | entries)


def quantised():
    return torch.quantize_per_tensor(torch.zeros(16), 0.1, 0, torch.qint8)


DEEP = 200_000
KEY = b'\x80\x02}' + b')' + b'\x85' * DEEP + b'K\x01s.'      # {((((…),),),): 1}
VALUE = b'\x80\x02}K\x01' + b']' * DEEP + b'a' * (DEEP - 1) + b's.'
HASH = b'\x80\x02})' + b'q\x00h\x00\x86' * 60 + b'K\x01s.'     # hashed in 2⁶⁰ steps

CHECKPOINTS = {
    'empty': lambda path: path.write_bytes(b''),
    'zeros': lambda path: path.write_bytes(bytes(10 ** 6)),
    'text': lambda path: path.write_text('no checkpoint\n' * 100),
    'runs code': saved(lambda path: {'params': Call(os.mkdir, f'{path}.ran')}),
    'runs code, legacy': saved(lambda path: {'params': Call(os.mkdir, f'{path}.ran')}, True),
    'runs code, bare pickle':
        lambda path: path.write_bytes(pickle.dumps(Call(os.mkdir, f'{path}.ran'))),
    'bytearray': saved({'params': Call(bytearray, 2 ** 31)}),
    'bytearray, legacy': saved({'params': Call(bytearray, 2 ** 31)}, True),
    'bytearray, bare pickle': lambda path: path.write_bytes(pickle.dumps(
        Call(bytearray, 2 ** 31), 2)),
    'tensor of any size': saved({'params': {'conv0': Call(torch.Tensor, 2 ** 30)}}),
    'storage of any size': saved({'params': {'conv0': Call(torch.UntypedStorage, 2 ** 32)}}),
    'string of any size': lambda path: zipped(b'\x80\x02X\xff\xff\xff\xff.')(path),
    'deflated': deflated,
    'deflated pickle': zipped(b'\x80\x02}X\x00\x00\x00\x20' + bytes(2 ** 29) + b'K\x01s.',
                              zipfile.ZIP_DEFLATED, bytes(67_000)),
    'expanded': with_tensor(lambda: torch.zeros(1).expand(16, 10 ** 9)),
    'expanded elsewhere': with_entry(rng={'cpu': torch.zeros(1).byte().expand(10 ** 10)}),
    'one storage, many tensors': saved(lambda path: {'params': dict.fromkeys(
        map(str, range(10 ** 4)), torch.zeros(10 ** 6, dtype=torch.half))}),
    'key nested deep': zipped(KEY), 'value nested deep': zipped(VALUE), 'hash bomb': zipped(HASH),
    'lists in lists': with_entry(options={'lr': twice(1, 40)}),
    'tuples in tuples': with_entry(network={'net': 'wrn', 'x': twice(1, 40, lambda v: (v, v))}),
    'a cycle': saved(cycle()),
    'sparse': with_tensor(lambda: torch.ones(16).to_sparse()),
    'sparse rows': with_tensor(lambda: torch.ones(4, 4).to_sparse_csr()),
    'complex': with_tensor(lambda: torch.zeros(16, dtype=torch.cfloat)),
    'meta': with_tensor(lambda: torch.zeros(16, device='meta')),
    'nested': with_tensor(lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
    'bool': with_tensor(lambda: torch.zeros(16, dtype=torch.bool)),
    'quantised': with_tensor(quantised),
    'float8': with_tensor(lambda: torch.zeros(16, dtype=torch.float8_e8m0fnu)),
    'float4': with_tensor(lambda: torch.zeros(16, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)),
    'bits': with_tensor(lambda: torch.zeros(16, dtype=torch.uint8).view(torch.bits8)),
    'a storage': with_entry(params={'conv0': torch.zeros(4).untyped_storage()}),
    'tensor with attributes': with_entry(params={'conv0': with_attributes(
        torch.zeros(16), numel=1, detach=2, float=3, shape=4)}),
    'dict with attributes': zipped(
        b'\x80\x02ccollections\nOrderedDict\n)R}X\x03\0\0\0getK\x01sb.'),
    'counter': saved({'params': Counter(a=2 ** 40)}),
    'a set': saved({'params': {1, 2}}), 'a list': saved([1]), 'a tensor': saved(torch.zeros(3)),
    'name with escapes': with_name('\x1b[2J\r\nbn\u202e'),
    'name half a character': with_name('\ud800'),
    'name of a megabyte': with_name('a' * 10 ** 6),
    'name of a million escapes': with_name('\0' * 10 ** 6),
    'number of 400 digits': with_entry(network={'net': 'wrn', 'depth': 10 ** 400}),
    'name no string': with_entry(params={(1, 2): torch.zeros(3)}),
    'options of tensors': with_entry(network={'net': 'wrn', 'depth': torch.zeros(3)}),
}


# ---------------------------------------------------------------------------- .hkl

def hdf(make, top='data'):
    def write(path):
        with h5py.File(path, 'w') as file:
            make(file if top is None else file.create_group(top), path)
    return write


def low_level(kind, name=b'"x"'):
    """A data set of a type that NumPy has not."""
    def make(group, path):
        h5py.h5d.create(group.id, name, kind(), h5py.h5s.create_simple((2,)))
    return hdf(make)


def wide_integer():
    kind = h5py.h5t.STD_I64LE.copy()
    kind.set_size(32)
    kind.set_precision(256)
    return kind


def unknown_filter(group, path):
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((2,))
    plist.set_filter(32_000, h5py.h5z.FLAG_OPTIONAL, ())
    h5py.h5d.create(group.id, b'"x"', h5py.h5t.NATIVE_FLOAT, h5py.h5s.create_simple((2,)), plist)


def outside(group, path):
    Path(f'{path}.secret').write_bytes(bytes(64))
    group.create_dataset('"x"', (16,), 'f4', external=[(f'{path}.secret', 0, 64)])


def virtual(group, path):
    layout = h5py.VirtualLayout((2 ** 30,), 'f4')
    layout[:] = h5py.VirtualSource(ROOT / 'tests/hkl/tiny-resnet18-hickle5.hkl', 'x', (2 ** 30,))
    group.create_virtual_dataset('"x"', layout)


def many(group, path):
    for i in range(20_000):
        group[f'"{i}"'] = np.zeros(1, np.float32)


def nested_groups(group, path):
    for _ in range(3000):
        group = group.create_group('g')
    group['x'] = np.zeros(1, np.float32)


def put(value):
    return hdf(lambda group, path: group.__setitem__('"conv0"', value(group, path)))


def link(group, path):
    return h5py.ExternalLink(str(ROOT / 'tests/hkl/tiny-resnet18-hickle5.hkl'), '/data')


HICKLES = {
    'empty': lambda path: path.write_bytes(b''),
    'text': lambda path: path.write_text('no HDF5'),
    'signature alone': lambda path: path.write_bytes(b'\x89HDF\r\n\x1a\n' + bytes(2000)),
    'nothing in it': hdf(lambda group, path: None),
    'pickles in attributes': hdf(lambda group, path: group.attrs.update(
        type=np.void(pickle.dumps(Call(os.mkdir, f'{path}.ran'))))),
    'pickle': put(lambda group, path: np.void(pickle.dumps(Call(os.mkdir, f'{path}.ran')))),
    'fill value': hdf(lambda group, path: group.create_dataset(
        '"x"', (2 ** 15, 2 ** 15), 'f4', fillvalue=1)),
    'fill values': hdf(lambda group, path: [group.create_dataset(
        f'"{i}"', (2 ** 24,), 'f4', fillvalue=1) for i in range(50)]),
    'a terabyte': hdf(lambda group, path: group.create_dataset(
        '"x"', (2 ** 38,), 'f4', chunks=(2 ** 20,), compression='gzip')),
    'compressed': hdf(lambda group, path: group.create_dataset(
        '"x"', data=np.zeros(2 ** 27, 'f4'), chunks=(2 ** 22,), compression='gzip')),
    'one huge chunk': hdf(lambda group, path: group.create_dataset(
        '"x"', (2,), 'f4', chunks=(2 ** 29,), maxshape=(None,), fillvalue=1)),
    '20,000 data sets': hdf(many), 'nested groups': hdf(nested_groups),
    'no filter': hdf(unknown_filter), 'in another file': hdf(outside), 'virtual': hdf(virtual),
    'times': low_level(h5py.h5t.UNIX_D32LE.copy), 'wide integers': low_level(wide_integer),
    'no UTF-8': low_level(h5py.h5t.NATIVE_FLOAT.copy, b'"\xff\xfe\x1b[2J\n"'),
    'bits': low_level(h5py.h5t.STD_B32LE.copy),
    'references': put(lambda group, path: np.array([group.ref], h5py.ref_dtype)),
    'regions': hdf(lambda group, path: group.create_dataset('"x"', (2,), h5py.regionref_dtype)),
    'strings': put(lambda group, path: ['a', 'b']), 'text in it': put(lambda group, path: 'abc'),
    'complex': put(lambda group, path: np.zeros(3, np.complex64)),
    'bool': put(lambda group, path: np.zeros(3, bool)),
    'records': put(lambda group, path: np.zeros(3, 'f4,i4')),
    'array of arrays': put(lambda group, path: np.zeros(3, '(2000,2000)f4')),
    'of any length': hdf(lambda group, path: group.create_dataset(
        '"x"', (2,), h5py.vlen_dtype(np.float32))),
    'no value': put(lambda group, path: h5py.Empty('f')),
    'a type': put(lambda group, path: np.dtype('f4')),
    'external link': put(link),
    'external link at the top': hdf(lambda file, path: file.__setitem__('data', link(file, path)),
                                    None),
    'soft link to itself': put(lambda group, path: h5py.SoftLink('/data/"conv0"')),
    'soft link at the top': hdf(lambda file, path: file.__setitem__('data', h5py.SoftLink('/')),
                                None),
    'a cycle': put(lambda group, path: group),
    'data set at the top': hdf(lambda file, path: file.__setitem__('data', np.zeros(3)), None),
}


# ---------------------------------------------------------------------------- log.txt

def line(**entries):
    record = {'epoch': 1, 'epochs': 2, 'test_acc': 50.0} | entries
    return b'json_stats: ' + json.dumps(record).encode() + b'\n'


LOGS = {
    **{f'400 digits of {name}': line(**{name: 10 ** 400}) for name in (
        'epoch', 'epochs', 'test_acc', 'lr', 'seed', 'depth', 'width', 'train_time', 'beta')},
    **{f'infinite {name}': line(**{name: float('inf')}) for name in (
        'epochs', 'test_acc', 'lr', 'seed', 'depth', 'width', 'train_time', 'beta')},
    '400 digits in a list': line(at_losses=[10 ** 400], epoch_step=[10 ** 400]),
    '5,000 digits': b'json_stats: {"epoch": ' + b'9' * 5000 + b'}\n',
    'half a character': line(network='\ud800') + line(save='\udfff', teacher_id='\ud800'),
    'nested deep': b'json_stats: {"epoch": 1, "x": ' + b'[' * 10 ** 6 + b'\n',
    'nested less': b'json_stats: {"epoch": 1, "test_acc": 5, "beta": '
                   + b'[' * 900 + b']' * 900 + b'}\n',
    'escapes': line(network='\x1b[2J\r\n\u202e', dataset='\x00', mapping='a' * 10 ** 6),
    'no object': b'json_stats: [1]\njson_stats: null\njson_stats: 3\njson_stats: \n',
    'wrong types': line(epoch=True) + line(epoch='1') + line(epoch=1.5) + line(lr='x')
    + line(network=[1]) + line(test_acc={}),
    'binary': bytes(range(256)) * 100,
    'negative': line(epoch=-5, epochs=-3, train_time=-1, test_acc=1e308),
    'many epochs': line(epoch=10 ** 12, epochs=10 ** 15) + line(epoch=2),
}


# ---------------------------------------------------------------------------- images

def encoded(suffix='.jpg', height=40, width=50):
    return cv2.imencode(suffix, photo(height, width))[1].tobytes()


def blank(height, width):
    return cv2.imencode('.png', np.zeros((height, width), np.uint8))[1].tobytes()


def chunk_of_gigabytes():
    """A PNG file with a chunk that says it is two gigabytes long."""
    png = encoded('.png')
    return png[:33] + b'\x7f' + png[34:]


IMAGES = {
    'empty.jpg': b'', 'text.jpg': b'no image\n' * 50, 'zeros.png': bytes(5000),
    'half.jpg': encoded()[:600], 'half.png': encoded('.png')[:3000],
    'half.bmp': encoded('.bmp')[:300], 'half.tif': encoded('.tif')[:300],
    'half.webp': encoded('.webp')[:300], 'header.ppm': b'P6 100000 100000 255\n',
    'changed.png': encoded('.png').replace(b'IDAT', b'IDAX'),
    'checksum.png': encoded('.png')[:1000] + b'\xff' * 20 + encoded('.png')[1020:],
    'chunk.png': chunk_of_gigabytes(), 'narrow.png': blank(1, 60_000),
    'large.png': blank(20_000, 20_000),
}
