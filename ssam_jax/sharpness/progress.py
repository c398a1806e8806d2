"""A progress bar for work that is partly compiled."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

try:
    from tqdm.auto import tqdm
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "ssam_jax.sharpness needs tqdm: pip install '.[sharpness]' in a clone of ssam_jax.", name=error.name
    ) from None

_bars: list[Any] = []


@contextlib.contextmanager
def bar(total: int, description: str, unit: str, show: bool) -> Iterator[Callable[[], Any]]:
    """Show a bar on the first process, if asked to; yield a function that advances it by one.

    Compiled programs that run meanwhile advance it with `tick`.
    """
    with tqdm(total=total, desc=description, unit=unit, disable=not show or jax.process_index() > 0) as shown:
        _bars.append(shown)
        try:
            yield shown.update
        finally:
            if show:
                jax.effects_barrier()
            _bars.remove(shown)


def tick() -> None:
    """Advance the bar by one each time the program that is being traced reaches this point."""
    jax.debug.callback(_move)


def _move() -> None:
    if _bars:
        _bars[-1].update()
