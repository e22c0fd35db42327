"""Backbones: networks as ordered stages, their tensor names and files."""
