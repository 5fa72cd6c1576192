"""Samples of a model's inputs: files and folders of images, checked and in batches."""
