"""fastm3ae: fast, exact multi-modal masked autoencoders for medical vision-and-language pre-training.

Importing the package is cheap: torch and the libraries of the towers are imported by the modules that need them.

Shape legend, for the whole repository. A tensor's name ends in its shape, a count starts with ``num_``, a fraction
ends in ``_frac``, and a mask says its polarity (``is_hidden_BN``, ``is_padding_BT``).

====  ==========================================================================================
B     samples (image-text pairs) of a batch
F     false images of a batch: one for each pair that image-text matching shows with a wrong image
N     patches of an image, in row-major order
K     kept (visible) patches
U     hidden patches of an image, N - K
L     tokens of an image sequence: CLS and patches, N + 1 or K + 1
T     text tokens, padding included
S     tokens of many sequences one after another, without padding
Q     the same of queries, where they are others than the keys
M     masked text tokens of a batch, or learned memory slots where the text says so
A     answers of the vocabulary, or of one question
R     texts that are scored with one image
D     width of a token
H     attention heads
P     pixels of a patch: patch height x patch width x 3 channels, in this order
V     vocabulary
C     classes
CHW   channels, height and width of an image
====  ==========================================================================================
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
