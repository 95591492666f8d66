"""The machinery that cifar.py and imagenet.py share, a concern a file."""
