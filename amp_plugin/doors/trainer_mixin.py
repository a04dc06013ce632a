"""`TrainerMixin`: the base of classes that change any `transformers.Trainer` which they stand before."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from transformers import Trainer

_R = TypeVar("_R")

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object  # the Trainer is the class that follows the mixins


class TrainerMixin(_Trainer):
    """A base without methods, which makes sure that its subclasses come before the Trainer.

    Raises:
        TypeError: When a class is made whose bases have a Trainer before a mixin, which would then do nothing.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a Trainer before a mixin."""
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(TrainerMixin):
            raise TypeError(f"in {cls.__name__} a mixin follows the Trainer and would do nothing; put the mixins first")


class MethodOfEither(Generic[_R]):
    """A method of the instance, or of the class where there is none, for what is static in the Trainer.

    A Trainer that overrides it may have made a method of it, which needs the instance.
    """

    def __init__(self, function: Callable[..., _R]) -> None:
        self.__func__ = function
        self.__doc__ = function.__doc__

    def __get__(self, instance: Any, owner: type) -> Callable[..., _R]:
        return MethodType(self.__func__, owner if instance is None else instance)
