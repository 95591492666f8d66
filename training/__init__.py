"""What cifar.py and imagenet.py share, one topic per file."""
