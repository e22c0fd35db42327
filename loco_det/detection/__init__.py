"""The R-CNN family on torchvision operators, and the engines that train it."""
