"""Wrong uses of the scripts: each is one line that names what is wrong, status 2, and no file."""
import shlex

import cv2
import numpy as np
import pytest
import torch
from helpers import fake, files

import cifar
import imagenet
import tables
import visualize
from resnet import imagenet_resnet, network_in_network, wide_resnet

SCRIPTS = {'cifar.py': cifar, 'imagenet.py': imagenet, 'tables.py': tables,
           'visualize.py': visualize}
SMALL = '--dataset folder --dataroot images'  # of the two that train, before what the table has
# Variables, script, options; and, after the bar, words of the line. The files are `place`'s.
TABLE = '''
cifar.py --unknown 1                                 | unrecognized arguments: --unknown 1
cifar.py --eval x                                    | unrecognized arguments: --eval
cifar.py stray                                       | unrecognized arguments: stray
cifar.py --depth                                     | argument --depth: expected one argument
cifar.py --depth 15                                  | depth 15: a Wide ResNet has 6n+4 layers
cifar.py --depth 4                                   | 6n+4
cifar.py --depth 16.5                                | argument --depth: must be a whole number
cifar.py --depth x                                   | not 'x'
cifar.py --depth 1000000000000000006                 | argument --depth: must be a whole number
cifar.py --width 0                                   | argument --width: must be a number above 0
cifar.py --width 0.01                                | at least 1/16
cifar.py --width -1                                  | argument --width
cifar.py --width nan                                 | argument --width
cifar.py --width 1e300                               | argument --width
cifar.py --width 1000                                | WRN-16-1000 has 170,755,
cifar.py --net nin --width 1000                      | training takes
cifar.py --net vgg                                   | invalid choice: 'vgg'
cifar.py --net resnet                                | invalid choice: 'resnet'
cifar.py --net nin --depth 16                        | --depth does not apply to --net nin
cifar.py --net nin --width 0.01                      | a layer has no channels
cifar.py --no-batch_norm                             | --batch_norm does not apply to --net wrn
cifar.py --pool_relu                                 | --pool_relu does not apply to --net wrn
cifar.py --dataset MNIST                             | invalid choice: 'MNIST'
cifar.py --dataroot nowhere                          | nowhere must hold train/<class>/*
cifar.py --dataroot damaged                          | damaged/train/1/0.png: not an image
cifar.py --dataroot odd                              | 1/0.png: 9×8, but others are 16×16
cifar.py --dataroot uneven                           | the class 3 is only in one of train/, test/
cifar.py --dataroot hollow                           | hollow/train/3: a class without images
cifar.py --dataset Digits --image_size 8             | --image_size is for --dataset folder
cifar.py --image_size 1                              | argument --image_size
cifar.py --image_size 1000000                        | argument --image_size
cifar.py --randomcrop_pad -1                         | argument --randomcrop_pad
cifar.py --randomcrop_pad 1.5                        | argument --randomcrop_pad
cifar.py --randomcrop_pad 16                         | less than the size of the images, 16
cifar.py --train_fraction 0                          | argument --train_fraction
cifar.py --train_fraction 1.5                        | argument --train_fraction
cifar.py --test_fraction 0                           | argument --test_fraction
cifar.py --test_fraction 1.5                         | argument --test_fraction
cifar.py --dtype int8                                | invalid choice: 'int8'
cifar.py --nthread -1                                | argument --nthread
cifar.py --batch_size 0                              | argument --batch_size
cifar.py --batch_size 1.5                            | argument --batch_size
cifar.py --batch_size 99999999999999999999           | argument --batch_size
cifar.py --lr 0                                      | argument --lr: must be a number above 0
cifar.py --lr nan                                    | argument --lr
cifar.py --lr inf                                    | argument --lr
cifar.py --lr fast                                   | argument --lr
cifar.py --epochs 0                                  | argument --epochs
cifar.py --epochs GOOGOL                             | argument --epochs: must be a whole number
cifar.py --save_every GOOGOL                         | argument --save_every
cifar.py --weight_decay -1                           | argument --weight_decay
cifar.py --weight_decay 1e999                        | argument --weight_decay
cifar.py --lr_decay_ratio 0                          | argument --lr_decay_ratio
cifar.py --lr_decay_ratio 2                          | argument --lr_decay_ratio
cifar.py --epoch_step 60                             | must be a JSON list
cifar.py --epoch_step [60,                           | must be a JSON list
cifar.py --epoch_step [60,60]                        | must be a JSON list of different
cifar.py --epoch_step [1.5]                          | must be a JSON list
cifar.py --epoch_step [true]                         | must be a JSON list
cifar.py --epoch_step {1:2}                          | must be a JSON list
cifar.py --epoch_step [0,1]                          | must be a JSON list
cifar.py --epoch_step NESTED                         | must be a JSON list
cifar.py --seed -1                                   | argument --seed
cifar.py --seed x                                    | argument --seed
cifar.py --test_every 0                              | argument --test_every
cifar.py --ngpu -1                                   | argument --ngpu
cifar.py --ngpu 2                                    | --ngpu 2: there are 0 GPUs
cifar.py --cuda                                      | --cuda: there is no GPU to use
cifar.py --gpu_id a                                  | argument --gpu_id
cifar.py --gpu_id 0                                  | --gpu_id 0: there are 0 GPUs
cifar.py --gpu_id 0 --ngpu 2                         | --gpu_id 0: there are 0 GPUs
cifar.py --capture                                   | --capture: needs a GPU, and there is none
cifar.py --temperature 0                             | argument --temperature
cifar.py --temperature 1e200                         | must be a number above 0 and up to 1e+06
cifar.py --temperature 8                             | --temperature does nothing without --alpha
cifar.py --beta_decay exp                            | invalid choice: 'exp'
cifar.py --beta_decay step                           | does nothing without --beta or --factt
cifar.py --mapping max                               | --mapping does nothing without --beta
cifar.py --power 4                                   | --power does nothing without --beta or
cifar.py --teacher_id three --factt 1 --power 4      | --power does nothing without --beta or
cifar.py --power 0.5                                 | --power: must be a number from 1 to 100
cifar.py --power nan                                 | argument --power
cifar.py --at_groups 0                               | --at_groups does nothing without --beta
cifar.py --at_groups 0,0                             | argument --at_groups: must be different
cifar.py --at_groups -1                              | argument --at_groups
cifar.py --at_groups x                               | argument --at_groups
cifar.py --at_epochs 0,1                             | --at_epochs does nothing without --beta
cifar.py --alpha 0.9                                 | --alpha needs a teacher: name it with
cifar.py --beta 1e3                                  | --beta needs a teacher: name it with
cifar.py --factt 1                                   | --factt needs a teacher: name it with
cifar.py --grad_at 1 --net nin --no-batch_norm       | --grad_at needs a teacher: name it with
cifar.py --teacher_id three --grad_at 1 --temperature 2 | --temperature does nothing without --alpha
cifar.py --beta -1 --teacher_id five                 | argument --beta
cifar.py --beta inf --teacher_id five                | argument --beta
cifar.py --alpha 1.1 --teacher_id five               | --alpha: must be a number from 0 to 1
cifar.py --alpha nan --teacher_id five               | --alpha: must be a number from 0 to 1
cifar.py --symmetry -1                               | argument --symmetry
cifar.py --teacher_id five                           | without --beta, --factt, --alpha, --grad_at
cifar.py --teacher_id five --min_l2 1                | without --beta, --factt, --alpha, --grad_at
cifar.py --teacher_id five --beta 1 --at_groups 3    | --at_groups 3: the student has 3 groups
cifar.py --teacher_id five --beta 1 --at_epochs 1    | --at_epochs: must be two numbers
cifar.py --teacher_id five --beta 1 --at_epochs 1,0  | --at_epochs: must be two numbers
cifar.py --teacher_id five --beta 1 --at_epochs 1,201 | up to --epochs, 200
cifar.py --teacher_id five --alpha 0.9               | teacher five has 5 classes, the data 3
cifar.py --teacher_id missing --beta 1               | there is no checkpoint missing: looked for
cifar.py --teacher_id short.pt7 --beta 1             | short.pt7: not a weight file, or a damaged
cifar.py --teacher_id empty.pt7 --beta 1             | empty.pt7: not a weight file, or a damaged
cifar.py --teacher_id notes.txt --beta 1             | notes.txt: not a weight file, or a
cifar.py --teacher_id tensor.pt7 --beta 1            | tensor.pt7: not the weights of a network
cifar.py --teacher_id large --beta 1                 | the student has 3 groups, the teacher large 4
cifar.py --min_l2 1                                  | has batch norm, through which
cifar.py --min_l2 1 --net nin                        | has batch norm, through which
cifar.py --min_l2 1 --net nin --no-batch_norm --compile | --compile: torch.compile cannot differ
cifar.py --symmetry 1 --net nin --no-batch_norm --dtype half | --dtype half: the gradients in
cifar.py --teacher_id diverged --beta 1              | fc.bias is not finite: the run has diverged
cifar.py --evaluate diverged                         | fc.bias is not finite
imagenet.py --teacher_params diverged-18 --beta 1    | fc.bias is not finite
imagenet.py --student_params diverged-18             | fc.bias is not finite
imagenet.py --evaluate diverged-18 --export x.pth    | fc.bias is not finite
visualize.py diverged --images 0.png                 | fc.bias is not finite
cifar.py --grad_at 1 --teacher_id nin --net nin --no-batch_norm | teacher nin has 5 classes, the
cifar.py --save ' '                                  | argument --save: must name a folder or a
cifar.py --teacher_id ' '                            | argument --teacher_id: must name
cifar.py --save notes.txt                            | notes.txt is not a folder that can be
cifar.py --save notes.txt/x                          | notes.txt is not a folder that can be
cifar.py --save dangling                             | dangling is not a folder that can be
cifar.py --save blocked                              | blocked/log.txt exists and is not a file
cifar.py --save three                                | three already holds a run
cifar.py --save teacher --teacher_id teacher --beta 1 --overwrite | is one of the inputs
cifar.py --resume missing                            | there is no checkpoint missing: looked for
cifar.py --resume LONG                               | there is no checkpoint xxxxxxx
cifar.py --resume RED                                | there is no checkpoint \\x1b[31mred
cifar.py --resume three                              | three/model.pt7: holds no state to resume
cifar.py --evaluate                                  | name what to test, as its value
cifar.py --evaluate missing                          | there is no checkpoint missing
cifar.py --evaluate five                             | five has 5 classes, the data 3
cifar.py --evaluate tensor.pt7                       | tensor.pt7: not the weights of a network
cifar.py --evaluate three --save b                   | --save does nothing with --evaluate
cifar.py --evaluate three --resume three             | --resume does nothing with --evaluate
cifar.py --evaluate three --temperature 8            | --temperature does nothing with --evaluate
cifar.py --evaluate three --lr 0.5                   | --lr does nothing with --evaluate
cifar.py --evaluate three --train_fraction 0.5       | --train_fraction does nothing with --evaluate
imagenet.py --evaluate large --crop short            | --crop does nothing with --evaluate
cifar.py --evaluate three --width 2                  | --width does nothing with --evaluate
cifar.py --evaluate three --tensorboard              | --tensorboard does nothing with --evaluate
imagenet.py --evaluate large --student_params large  | --student_params does nothing with --eval
LOCAL_RANK=0 cifar.py                                | LOCAL_RANK=0, no RANK, no WORLD_SIZE
RANK=0 cifar.py                                      | RANK=0, no WORLD_SIZE
WORLD_SIZE=2 cifar.py                                | no RANK, WORLD_SIZE=2
RANK=x WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1 cifar.py | RANK=x
RANK=2 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1 cifar.py | RANK=2, WORLD_SIZE=2
RANK=-1 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1 cifar.py | RANK=-1, WORLD_SIZE=2
RANK=0 WORLD_SIZE=2 cifar.py                         | no MASTER_ADDR, no MASTER_PORT
RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=b cifar.py | MASTER_PORT=b
RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=65536 cifar.py | MASTER_PORT=65536
LOCAL_WORLD_SIZE=x cifar.py                          | LOCAL_WORLD_SIZE=x
RANK=0 WORLD_SIZE=1 LOCAL_WORLD_SIZE=0 cifar.py      | LOCAL_WORLD_SIZE=0
RANK=1 imagenet.py --evaluate large --dataroot '' --export x.hkl | RANK=1, no WORLD_SIZE
imagenet.py --net wrn                                | invalid choice: 'wrn'
imagenet.py --depth 50                               | depth 50: an ImageNet ResNet here has 18 or
imagenet.py --width 0.001                            | group 0 has no channels
imagenet.py --width 1000                             | parameters: training takes
imagenet.py --batch_size 2147483649                  | argument --batch_size
imagenet.py --image_size 63                          | argument --image_size
imagenet.py --freeze 5                               | argument --freeze
imagenet.py --dataset imagenet --dataroot ''         | --imagenetpath must name the folder
imagenet.py --dataset cub --dataroot ''              | --dataroot must name the folder
imagenet.py --imagenetpath images                    | --imagenetpath is not for --dataset folder
imagenet.py --dataroot nowhere                       | nowhere must hold train/<class>/*
imagenet.py --dataset cub --dataroot images          | images/images.txt: there is no such file
imagenet.py --dataset scenes --dataroot images       | TrainImages.txt: there is no such file
imagenet.py --save_every 0                           | argument --save_every
imagenet.py --beta 1                                 | --beta needs a teacher: name it with
imagenet.py --teacher_params missing --beta 1        | there is no checkpoint missing: looked for
imagenet.py --teacher_params notes.txt --beta 1      | notes.txt: not a weight file, or a
imagenet.py --teacher_params large --alpha 0.9       | teacher large has 5 classes, the data 3
imagenet.py --teacher_params large                   | --teacher_params does nothing without --beta
imagenet.py --teacher_params large --beta 1 --at_groups 4 | --at_groups 4: the student has 4 groups
imagenet.py --teacher_params three --beta 1          | the student has 4 groups, the teacher three 3
imagenet.py --evaluate                               | name what to test, as its value
imagenet.py --evaluate large                         | large has 5 classes, the data 3
imagenet.py --evaluate large --export x.txt          | --export x.txt: must end in .pth
imagenet.py --export nowhere/x.pth                   | --export nowhere/x.pth: cannot be written
imagenet.py --export x.onnx                          | --export x.onnx: must end in .pth
imagenet.py --export x.hkl --export_format torchvision | --export x.hkl: must end in .pth
imagenet.py --export_format folded                   | --export_format does nothing without --export
imagenet.py --export x.pth --width 0.0625            | has no form in torchvision
imagenet.py --student_params large --width 1         | --width: the network is given by
imagenet.py --student_params large --depth 18        | --depth: the network is given by
imagenet.py --student_params three                   | WRN-10-0.25 is not a network for ImageNet
imagenet.py --student_params missing                 | there is no checkpoint missing
imagenet.py --student_params large --min_l2 1 --no-fix_batch_norm | has batch norm, through which
tables.py                                            | name one table first
tables.py 6                                          | argument table: invalid choice: '6'
tables.py --epochs 5                                 | name one table first
tables.py --epochs 3 1                               | name one table first
tables.py 1 --runs x                                 | name one table first
tables.py 1 --row x                                  | --row x: table 1 has NIN-thin:NIN-wide
tables.py 2 --method KD                              | --method KD: table 2 has
tables.py 1 --jobs 0                                 | argument --jobs
tables.py 1 --jobs 9223372036854775808               | argument --jobs: must be a whole number
tables.py 1 --seeds 0                                | argument --seeds
tables.py 1 --gpu_id 7                               | --gpu_id 7: there are 0 GPUs
tables.py 1 --dry_run --lr x                         | argument --lr: must be a number
tables.py 1 --dry_run --depht 3                      | unrecognized arguments: --depht 3
tables.py 1 --dry_run --seed 3                       | --seed: cannot be given
tables.py 1 --dry_run --overwrite                    | --overwrite: cannot be given
tables.py 1 --dry_run --alpha 0.9                    | --alpha: cannot be given
tables.py 2 --dry_run --factt 1                      | --factt: cannot be given
tables.py 1 --dry_run --width=2                      | --width: cannot be given
tables.py 2 --dry_run --power 4                      | --power: cannot be given
tables.py 3 --dry_run --no-batch_norm                | --batch_norm: cannot be given
tables.py 4 --dry_run --dataset cub                  | --dataset: cannot be given
tables.py 2 --dry_run --temperature 8                | --temperature does nothing in these runs
tables.py 1 --dry_run --top 5                        | --top does nothing with table 1
tables.py 1 --dry_run --cub x                        | --cub does nothing with table 1
tables.py 1 --report --dry_run                       | --dry_run does nothing with --report
tables.py 1 --report --epochs 3                      | --epochs does nothing with --report
tables.py 1 --report --folder nowhere                | --folder nowhere: no run of table 1
tables.py 1 --folder notes.txt                       | --folder notes.txt: notes.txt is not a folder
tables.py 1 --dataset folder --dataroot nowhere      | nowhere must hold train
tables.py 5 --imagenetpath nowhere                   | nowhere must hold train
tables.py 4 --row cub --cub nowhere                  | nowhere/images.txt: there is no such file
tables.py 1 --dataset folder --dataroot images --at_groups 7 | --at_groups 7: the student has
tables.py 1 --dataset folder --dataroot images --cuda | --cuda: there is no GPU to use
tables.py --plot x --flip                            | --flip does nothing with
tables.py --plot x --seeds 2                         | --seeds does nothing with
tables.py --plot x                                   | x: no log.txt
tables.py --plot run --top 5                         | --top 5: no log has a top-5 test error
tables.py --plot run --output x.jpg                  | --output x.jpg
tables.py --plot run --output nowhere/x.png          | --output nowhere/x.png
tables.py --runs x --output y.png                    | --output does nothing with
tables.py --runs three notes.txt                     | three, notes.txt: no log.txt
visualize.py                                         | the following arguments are required: RUN
visualize.py three                                   | with --images or a data set with
visualize.py three --images 0.png --dataset Digits   | with --images or a data set with
visualize.py missing --images 0.png                  | there is no checkpoint missing
visualize.py three --images no.png                   | no.png: not an image, or a damaged
visualize.py three --images thin.png                 | thin.png: 60000×1 pixels: too long and narrow
visualize.py three --images MANY                     | too large a picture
visualize.py three --images 0.png --index 1          | --index is for --dataset
visualize.py three --images 0.png --power 0.5        | argument --power
visualize.py three --images 0.png --output x.jpg     | --output x.jpg: must be a .png, .svg
visualize.py three --images 0.png --output no/x.png  | --output no/x.png: must be a .png
visualize.py three --images 0.png --output link.png  | --output link.png is one of the inputs
visualize.py net.pdf --images 0.png --output net.pdf | --output net.pdf is one of the inputs
visualize.py three --dataset folder --dataroot images --output images/test/0/0.png | of the inputs
visualize.py three --dataset Digits --image_size 64  | --image_size is for --dataset folder
visualize.py three --dataset folder --dataroot images --index 6 | --index 6: there are 6 test images
visualize.py large --dataset folder --dataroot images | large: an ImageNet network
'''
STAND_INS = {'LONG': ['x' * 5000], 'RED': ['\x1b[31mred'], 'GOOGOL': ['1' + 400 * '0'],
             'NESTED': ['[' * 100_000], 'MANY': ['0.png'] * 300}
CASES = [[part.strip() for part in line.split(' | ')] for line in TABLE.strip().splitlines()]


def diverged(params):
    params['fc.bias'].data[1] = float('nan')
    return params


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """The folder that the table is about, and what is in it."""
    place = tmp_path_factory.mktemp('place')
    grey = np.full((16, 16, 3), 100, np.uint8)
    for part, n in (('train', 3), ('test', 2)):
        for name in ('images', 'damaged', 'odd', 'uneven', 'hollow'):
            for c in range(3):
                (place / name / part / str(c)).mkdir(parents=True)
                for i in range(n):
                    cv2.imwrite(str(place / name / part / str(c) / f'{i}.png'), grey)
    (place / 'damaged/train/1/0.png').write_bytes(b'no image')
    (place / 'uneven/train/3').mkdir()
    (place / 'hollow/train/3').mkdir()
    (place / 'hollow/test/3').mkdir()
    cv2.imwrite(str(place / 'odd/train/1/0.png'), grey[:8, :9])
    cv2.imwrite(str(place / '0.png'), grey)
    cv2.imwrite(str(place / 'thin.png'), np.zeros((1, 60000), np.uint8))
    for name, params in (('three', wide_resnet(10, 0.25, 3)[1]),
                         ('five', wide_resnet(10, 0.25, 5)[1]),
                         ('teacher', wide_resnet(16, 0.25, 3)[1]),
                         ('large', imagenet_resnet(18, 0.0625, 5)[1]),
                         ('nin', network_in_network(0.05, 5)[1]),
                         ('diverged', diverged(wide_resnet(10, 0.25, 3)[1])),
                         ('diverged-18', diverged(imagenet_resnet(18, 0.0625, 3)[1]))):
        (place / name).mkdir()
        torch.save({'params': params}, place / name / 'model.pt7')
    whole = (place / 'three/model.pt7').read_bytes()
    for name, content in (('short.pt7', whole[:3000]), ('empty.pt7', b''), ('net.pdf', whole),
                          ('notes.txt', b'notes')):
        (place / name).write_bytes(content)
    torch.save({'params': {'fc.weight': torch.zeros(3, 4)}}, place / 'tensor.pt7')
    (place / 'dangling').symlink_to('nowhere')
    (place / 'link.png').symlink_to('0.png')
    (place / 'blocked/log.txt').mkdir(parents=True)
    fake(place / 'run', [50, 10])
    return place


@pytest.mark.parametrize('command, text', CASES, ids=[command for command, _ in CASES])
def test_wrong_use(place, capsys, monkeypatch, command, text):
    before = files(place)
    monkeypatch.chdir(place)
    words = [w for word in shlex.split(command) for w in STAND_INS.get(word, [word])]
    while '=' in words[0]:
        monkeypatch.setenv(*words.pop(0).split('='))
    script, *argv = words
    trains = script in ('cifar.py', 'imagenet.py')
    with pytest.raises(SystemExit) as e:
        SCRIPTS[script].main([*SMALL.split() * trains, *argv])
    err = capsys.readouterr().err
    assert e.value.code == 2, err
    assert err.count('\n') == 1 and text in err and len(err) < 1100, err
    assert err.startswith(('error: ', 'cifar.py: error: ', f'{script}: error: '))
    assert files(place) == before
