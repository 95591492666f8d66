"""Every command of the README is one that its script takes."""
import re
import shlex

import pytest
from conftest import ROOT

import cifar
import imagenet
import tables
import visualize

README = (ROOT / 'README.md').read_text()
COMMANDS = [line.partition('#')[0].strip() for block in README.replace('\\\n', ' ').split('```')[1::2]
            for line in block.splitlines() if re.search(r'\b(cifar|imagenet|tables|visualize)\.py', line)]


SCRIPTS = {f'{script.__name__}.py': script for script in (cifar, imagenet, tables, visualize)}


@pytest.mark.parametrize('command', COMMANDS)
def test_commands_parse(command):
    words = shlex.split(command)
    name = next(word for word in words if word in SCRIPTS)
    argv = words[words.index(name) + 1:]
    parser = SCRIPTS[name].make_parser()
    if name == 'tables.py':
        opt, extra = parser.parse_known_args(argv)
        assert opt.runs or opt.plot or tables.parsed(tables.TABLES[opt.table].script, tuple(extra))
    else:
        parser.parse_args(argv)


def test_published_commands_are_there_word_for_word():
    for command in ('python cifar.py --save logs/resnet_40_1_teacher --depth 40 --width 1',
                    'python cifar.py --save logs/resnet_16_2_teacher --depth 16 --width 2',
                    'python cifar.py --save logs/resnet_40_2_teacher --depth 40 --width 2',
                    'python cifar.py --save logs/at_16_1_16_2 --teacher_id resnet_16_2_teacher --beta 1e+3',
                    'python cifar.py --save logs/kd_16_1_16_2 --teacher_id resnet_16_2_teacher --alpha 0.9',
                    'python imagenet.py --imagenetpath ~/ILSVRC2012 --depth 18 --width 1 '
                    '--teacher_params resnet-34-export.hkl --gpu_id 0,1 --ngpu 2 --beta 1e+3'):
        assert command in [' '.join(c.split()) for c in COMMANDS]


@pytest.mark.parametrize('script', SCRIPTS.values())
def test_every_option_is_read(script):
    code = ''.join((ROOT / name).read_text() for name in (f'{script.__name__}.py', 'training.py'))
    code = re.sub(r'^(PLACE|DATA)_OPTIONS = \([^)]*\)', '', code, flags=re.M)  # there, they are only listed
    options = vars(script.make_parser().parse_args(['run'] if script is visualize else []))
    assert [name for name in options if not re.search(rf"opt\.{name}\b|[(, ]'{name}'", code)] == []  # or by getattr
