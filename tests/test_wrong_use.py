"""Wrong uses that a new user meets: each is a short line that names what is wrong, and no file."""
import shlex
import shutil

import cv2
import pytest
import torch
from helpers import files, random_images, write_image

import cifar
import imagenet
import utils

SCRIPTS = {'cifar.py': cifar, 'imagenet.py': imagenet}
DATA = '--dataset folder --dataroot images --nthread 0 --epochs 1'  # before what the table has
# Script and options; after the bars, words of the line. The files are those of `place`.
TABLE = '''
cifar.py --unknown 1                         | unrecognized arguments: --unknown 1
cifar.py --depth 15                          | --net wrn | depth 15 | 6n+4
cifar.py --depth 16.5                        | argument --depth
cifar.py --width 0.01                        | --net wrn | width 0.01 | 1/16
cifar.py --net nin --depth 40                | --depth: --net nin has no such option
cifar.py --no-batch_norm                     | --batch_norm: --net wrn has no such option
cifar.py --dataset MNIST                     | argument --dataset | 'MNIST'
cifar.py --dataroot nowhere                  | nowhere must hold train/<class>/*
cifar.py --dataroot damaged                  | damaged/train/1/0.png: not an image
cifar.py --dataroot odd                      | odd/train/1/0.png: 9×8 | 16×16 | --image_size
cifar.py --dataroot uneven                   | uneven | train/ and test/ must have the same classes
cifar.py --image_size 4                              | 8×8 or larger
cifar.py --randomcrop_pad 16                 | --randomcrop_pad 16 | 16×16
cifar.py --train_fraction 0                  | --train_fraction | 0
cifar.py --epochs 0                          | --epochs
cifar.py --lr 0                              | --lr
cifar.py --weight_decay -1                   | --weight_decay
cifar.py --epoch_step 60,x                   | argument --epoch_step | '60,x'
cifar.py --seed x                            | argument --seed
cifar.py --seed -1                           | --seed
cifar.py --seed 0,1 --save x                 | {seed} in --save
cifar.py --ngpu 2                            | --ngpu | no GPU
cifar.py --alpha 0.9                         | --alpha needs a teacher: --teacher_id
cifar.py --grad_at 1                         | --grad_at needs a teacher: --teacher_id
cifar.py --beta -1 --teacher_id five         | --beta
cifar.py --alpha 1.1 --teacher_id five       | --alpha must be from 0 to 1
cifar.py --teacher_id five                   | --teacher_id needs a loss | --beta
cifar.py --teacher_id five --alpha 0.9       | the teacher five: its 5 classes | not the 3 of
cifar.py --teacher_id missing --beta 1       | no checkpoint missing | logs/missing
cifar.py --teacher_id notes.txt --beta 1     | notes.txt: not a weight file
cifar.py --teacher_id short.pt7 --beta 1     | short.pt7: not a weight file, or damaged
cifar.py --teacher_id diverged --beta 1      | diverged | finite
cifar.py --teacher_id large --beta 1         | the teacher has 4 groups, the student 3
cifar.py --teacher_id three --alpha 1 --temperature 0   | --temperature above 0
cifar.py --teacher_id three --beta 1 --at_groups 3      | --at_groups 3 | 3 groups
cifar.py --teacher_id three --beta 1 --at_groups -1     | --at_groups
cifar.py --teacher_id three --beta 1 --at_epochs 1      | --at_epochs must be FIRST,END
cifar.py --min_l2 1                          | --min_l2 | --net nin --no-batch_norm
cifar.py --min_l2 1 --net nin --no-batch_norm --compile  | --min_l2 | --compile
cifar.py --symmetry 1 --dtype half           | --symmetry works neither
cifar.py --save notes.txt                    | --save notes.txt
cifar.py --save three                        | three/model.pt7 | --save | --overwrite
cifar.py --evaluate                          | --evaluate | --teacher_id
imagenet.py --dataset imagenet               | --imagenetpath must name its folder
imagenet.py --dataset cub --dataroot ''      | --dataroot must name its folder
imagenet.py --teacher_params three --beta 1  | the teacher has 3 groups, the student 4
imagenet.py --student_params three           | --student_params three: not a network for ImageNet
imagenet.py --student_params large --depth 34 | --depth: --student_params says which network
cifar.py --save old                          | old | its log has no checkpoint | --overwrite
cifar.py --resume three --overwrite          | --resume | --overwrite
imagenet.py --image_size 32                  | --image_size must be 33 or more
imagenet.py --export x.onnx                  | --export | .pth or .hkl
imagenet.py --evaluate large --dataroot '' --export x.pth | x.pth: torchvision has no such network
'''
CASES = [[part.strip() for part in line.split(' | ')] for line in TABLE.strip().splitlines()]


@pytest.fixture(scope='module')
def template(tmp_path_factory):
    """The folder that the table is about, and what is in it."""
    place = tmp_path_factory.mktemp('place')
    image = random_images(1)[0]
    for name in ('images', 'damaged', 'odd', 'uneven'):
        for path in ('train/0/0', 'train/1/0', 'train/2/0', 'test/0/0', 'test/1/0', 'test/2/0'):
            write_image(place / name / f'{path}.png', image)
    (place / 'damaged/train/1/0.png').write_bytes(b'no image')
    write_image(place / 'odd/train/1/0.png', cv2.resize(image, (9, 8)))
    write_image(place / 'uneven/train/3/0.png', image)
    for name, net, classes in (('three', 'wrn', 3), ('five', 'wrn', 5), ('diverged', 'wrn', 3),
                               ('large', 'resnet', 3)):
        settings = {'depth': 10 if net == 'wrn' else 18, 'width': 0.0625}
        _, params, network = utils.new_network(net, settings, classes)
        params['fc.bias'].data[1] = float('nan') if name == 'diverged' else 0
        (place / name).mkdir()
        torch.save({'params': params, 'network': network}, place / name / 'model.pt7')
    (place / 'short.pt7').write_bytes((place / 'three/model.pt7').read_bytes()[:1000])
    (place / 'notes.txt').write_text('notes')
    (place / 'old').mkdir()
    (place / 'old/log.txt').write_text('log')
    return place


@pytest.mark.parametrize('case', CASES, ids=[case[0] for case in CASES])
def test_wrong_use(template, tmp_path, monkeypatch, refused, case):
    place = shutil.copytree(template, tmp_path / 'place')
    monkeypatch.chdir(place)
    command, *words = case
    script, *argv = shlex.split(command)
    error = refused(SCRIPTS[script].main, [*DATA.split(), *argv], *words)
    assert len(error) < 400
    assert {k: v for k, v in files(place).items() if k.name != '.lock'} == files(template)
