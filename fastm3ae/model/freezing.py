"""Which mode the parts of a model are in: frozen ones that training leaves as they are, and all in an evaluation."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

__all__ = ["Freezable"]

Self = TypeVar("Self", bound="Freezable")


class Freezable(nn.Module):
    """A model of which parts can be frozen: their weights get no gradient and their dropout stays off."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen: tuple[str, ...] = ()

    def freeze(self, *parts: str) -> None:
        """Freezes the children of these names."""
        self.frozen = parts
        for part in parts:
            getattr(self, part).requires_grad_(False)
        self.train(self.training)

    def train(self: Self, mode: bool = True) -> Self:
        """Sets the mode of all that is not frozen; what is frozen is in evaluation mode."""
        super().train(mode)
        for part in self.frozen:
            getattr(self, part).eval()
        return self

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Puts the model into evaluation mode, and at the end back into the one that it had."""
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)
