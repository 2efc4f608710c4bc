"""Script that prints, as JSON, which methods of a derived class the CuPy that Python finds calls, and for which views.

The real one needs no GPU for it: views read no element, and the memory of its arrays is not there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import cupy

METHODS = ("__getitem__", "diagonal", "ravel", "reshape", "squeeze", "swapaxes", "transpose", "view")
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "broadcast_to": ((3, 2, 1),),
    "transpose": (),
    "permute_dims": (),
    "matrix_transpose": (),
    "reshape": ((1, 2),),
    "ravel": (),
    "squeeze": (),
    "expand_dims": (0,),
    "swapaxes": (0, 1),
    "moveaxis": (0, 1),
    "rollaxis": (1,),
    "flip": (),
    "rot90": (),
    "split": (2,),
    "diagonal": (),
    "real": (),
}
"""Functions of views, and their arguments behind an array of shape (2, 1)."""
OTHERS: dict[str, Callable[[Any], Any]] = {
    "array.T": lambda array: array.T,
    "array[1:]": lambda array: array[1:],
    "array.view()": lambda array: array.view(),
    "array.transpose()": lambda array: array.transpose(),
    "array.swapaxes(0, 1)": lambda array: array.swapaxes(0, 1),
    "array.reshape(2)": lambda array: array.reshape(2),
    "array.ravel()": lambda array: array.ravel(),
    "array.squeeze()": lambda array: array.squeeze(),
    "array.diagonal()": lambda array: array.diagonal(),
}


def derived(called: set[str]) -> Any:
    """An array of a derived class, whose methods note that they have been called."""

    def noting(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            called.add(name)
            return getattr(cupy.ndarray, name)(self, *args, **kwargs)

        return method

    cls = type("Derived", (cupy.ndarray,), {name: noting(name) for name in METHODS})
    if hasattr(cupy, "emulator"):
        return cls((2, 1), "f4")
    memory = cupy.cuda.memory.UnownedMemory(1 << 40, 1 << 10, None, 0)
    return cls((2, 1), "f4", memptr=cupy.cuda.memory.MemoryPointer(memory, 0))


def main() -> None:
    calls = {
        name: lambda array, name=name, args=args: getattr(cupy, name)(array, *args) for name, args in FUNCTIONS.items()
    }
    found = {}
    for name, call in (calls | OTHERS).items():
        called: set[str] = set()
        result = call(derived(called))
        first = result[0] if isinstance(result, (list, tuple)) else result
        found[name] = [type(first).__name__, *sorted(called)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
